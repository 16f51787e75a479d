"""Every script in examples/ runs, and its figures are right."""

from __future__ import annotations

import importlib.util
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import independent
import jax
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from research_examples import (
    check_experiment_design,
    check_hyper_gradient,
    check_influence,
)
from scipy import stats

import jaxreml
from jaxreml import Status

DAYS = np.array([0.0, 9.0])  # the ends of sleepstudy
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def check_schools(figures: dict, text: str) -> None:
    anova = figures["anova"]
    tau2_reml = anova["var_means"] - anova["msw"] / 4
    tau2_ml = anova["var_means"] * 2 / 3 - anova["msw"] / 4
    assert tau2_reml > tau2_ml > 0
    np.testing.assert_allclose(figures["reml"], [tau2_reml, anova["msw"]], rtol=1e-12)
    np.testing.assert_allclose(figures["ml"], [tau2_ml, anova["msw"]], rtol=1e-12)

    # Unbiased and biased down, by formula and by simulation; its standard error is about 0.13.
    average = figures["average"]
    assert average["reml_expected"] == pytest.approx(36, rel=1e-12)
    assert average["ml_expected"] == pytest.approx((36 + 25 / 4) * 2 / 3 - 25 / 4, rel=1e-12)
    assert average["reml"] == pytest.approx(average["reml_expected"], abs=0.5)
    assert average["ml"] == pytest.approx(average["ml_expected"], abs=0.5)

    log_variances = figures["log_variances_fit"]
    assert figures["converged"]
    np.testing.assert_allclose(np.exp(log_variances), figures["reml"], rtol=1e-8)
    np.testing.assert_allclose(figures["log_variances_numpy"], log_variances, rtol=0, atol=1e-6)
    np.testing.assert_allclose(figures["log_variances_optax"], log_variances, rtol=0, atol=1e-6)
    np.testing.assert_allclose(figures["criterion_numpy"], figures["criterion_fit"], rtol=1e-12)
    np.testing.assert_allclose(figures["se_numpy"], figures["se_fit"], rtol=1e-6)

    # In closed form: tau2 = (MSB - MSW) / n with independent mean squares of 2 and 9 degrees of
    # freedom, var MS = 2 MS^2 / df, and the delta method for logarithms.
    msb, msw = anova["msb"], anova["msw"]
    se_tau2 = np.sqrt(2 * msb**2 / 2 + 2 * msw**2 / 9) / 4
    np.testing.assert_allclose(figures["se_fit"], [se_tau2 / tau2_reml, np.sqrt(2 / 9)], rtol=1e-8)
    assert 0 < figures["optax_steps"] < 50
    assert "All five routes agree." in text


def check_optax_lbfgs(figures: dict, text: str) -> None:
    assert figures["status"] == 0
    # lme4: REML criterion 1743.628 and variances 612.10, 35.07, 654.94 on sleepstudy
    assert figures["criterion_optax"] == pytest.approx(figures["criterion_estimate"], abs=1e-6)
    assert figures["criterion_optax"] == pytest.approx(1743.6283, abs=1e-4)
    variances = np.exp(figures["params_optax"][[0, 1, 3]])
    np.testing.assert_allclose(variances, [612.10, 35.07, 654.94], rtol=2e-4)
    np.testing.assert_allclose(
        figures["params_optax"], figures["params_estimate"], rtol=0, atol=1e-5
    )
    assert all(name in text for name in figures["names"])

    # Scaling y by 1 + a adds 2 log(1 + a) to a log-variance: by Euler, y' gradient = 2.
    assert figures["derivative"] == pytest.approx(figures["difference"], rel=1e-6)
    assert figures["gradient"].shape == figures["y"].shape == (180,)
    assert figures["y"] @ figures["gradient"] == pytest.approx(2, rel=1e-6)

    assert not figures["statuses"].any()
    assert figures["log_variances_vmap"].shape == (8, 3)
    np.testing.assert_allclose(
        figures["log_variances_vmap"], figures["log_variances_loop"], rtol=0, atol=1e-6
    )


def check_genes(figures: dict, text: str) -> None:
    results, truth, table = (figures[name] for name in ("results", "truth", "discoveries"))
    assert len(results) == len(truth) == 2000
    assert sorted(results.status[results.status != 0]) == [Status.CONSTANT, Status.TOO_FEW_ROWS]
    assert (results.n_missing[results.converged] == 15).sum() == 3
    for name in results.responses[~results.converged]:
        assert f"    {name}: {results.message[name]}" in text

    # Benjamini and Hochberg by hand: all p-values up to the last one below its share of 5%.
    p = results.pvalues["treatment[T.treated]"].dropna().sort_values()
    below = np.flatnonzero(p.to_numpy() <= 0.05 * np.arange(1, len(p) + 1) / len(p))
    found = p.index[: below[-1] + 1]
    assert set(found) == set(table.index[table["discovery"]]) and len(found) == figures["n_found"]
    responds = truth["treatment"] != 0
    assert responds.sum() == 200
    false = (~responds[found]).sum() / len(found)
    power = responds[found].sum() / responds[p.index].sum()
    assert figures["false_discovery_proportion"] == pytest.approx(false)
    assert figures["power"] == pytest.approx(power)
    assert f"power {power:.1%}" in text and f"false discovery proportion {false:.1%}" in text
    assert power > 0.95
    assert false < 0.1  # 4.5% on average, with a standard deviation of 1.5%
    error = results.params["treatment[T.treated]"] - truth["treatment"]
    covered = (error.abs() <= 1.96 * results.bse["treatment[T.treated]"])[p.index].mean()
    assert figures["coverage"] == pytest.approx(covered)
    assert 0.93 < covered < 0.97  # 95% with a standard deviation of 0.5%
    assert figures["null_uniform"] > 0.001

    donor = figures["donor"]
    assert donor["correlation"] > 0.95 and abs(donor["bias"]) < 0.01
    assert 0.45 < donor["singular_without"] < 0.6  # a half for many donors
    assert donor["singular_with"] < 0.02
    assert set(figures["agreement"]) == {"complete", "missing values", "singular"}
    assert max(figures["agreement"].values()) < 1e-8

    # Both panels are drawn: the discoveries' red, the histogram's blue.
    assert f"Plot: {figures['plot']}" in text
    image = imread(figures["plot"])[..., :3]
    assert image.shape == (600, 1500, 3)
    for colour, half in ((to_rgb("C3"), image[:, :750]), (to_rgb("C0"), image[:, 750:])):
        assert (np.abs(half - colour).max(axis=-1) < 0.01).sum() > 500


def check_insteval(figures: dict, text: str) -> None:
    fit, table = figures["fit"], figures["lecturers"]
    assert fit.converged and fit.structure == "crossed"
    assert fit.criterion == pytest.approx(237733.83412752, abs=1e-5)  # lme4
    assert len(table) == 1128 and table["effect"].is_monotonic_decreasing
    assert table["n_ratings"].sum() == 73421
    # A lecturer alone would have variance tau2 / (1 + n tau2 / sigma2); the students add to it.
    variances = fit.variance_components.set_index("group")["variance"]
    alone = variances["d"] / (1 + table["n_ratings"] * variances["d"] / variances["Residual"])
    assert (table["se"] ** 2 > alone).all() and (table["se"] ** 2 < variances["d"]).all()
    assert (table["rank_lower"] <= table["rank_upper"]).all()
    assert figures["shares"].sum() == pytest.approx(1)
    above, below = figures["apart"]
    assert 150 < above < 350 and 150 < below < 350
    assert figures["shrunk"][0] < 0.7 < figures["shrunk"][1] < 1.1
    image = imread(figures["plot"])[..., :3]
    assert image.shape == (675, 1350, 3)
    for colour in ("C0", "C3"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.02).sum() > 500


def check_voxels(figures: dict, text: str) -> None:
    results, images, truth, table = (figures[k] for k in ("results", "images", "truth", "table"))
    assert results.converged.all() and len(results) == truth["mask"].sum() > 20_000
    assert results.responses.equals(table.index) and table.index[0] == images.names[0]

    # Found where it is: around the hippocampi, and hardly elsewhere.
    found, real = table["discovery"], table["true_effect"] < -0.1
    assert figures["n_found"] == found.sum() > 100
    assert figures["power"] == pytest.approx((found & real).sum() / real.sum()) and (
        figures["power"] > 0.6
    )
    # Neighbours are alike, so that it varies more than the false discovery rate of 5% says.
    assert figures["false_discovery_proportion"] < 0.15
    assert 0.93 < figures["coverage"] < 0.97
    surest = table.loc[figures["peak"]["voxel"]]
    centre = [np.copysign(24, surest["x"]), -18, -12]
    assert np.linalg.norm(surest[["x", "y", "z"]] - centre) < 17
    assert figures["peak"]["difference"] < 1e-6
    assert f"The voxel {figures['peak']['voxel']} alone:" in text
    shares = figures["shares"]
    assert shares["share"].corr(shares["true_share"]) > 0.9
    assert abs((shares["share"] - shares["true_share"]).mean()) < 0.03

    # The maps hold these numbers at their places, in single precision.
    maps, place = figures["maps"], tuple(surest[["i", "j", "k"]].astype(int))
    assert maps["faster_t"][place] == pytest.approx(surest["t"], rel=1e-6)
    assert np.isnan(maps["faster_t"][~truth["mask"]]).all()
    assert (maps["faster_found"][truth["mask"]] != 0).sum() == figures["n_found"]
    np.testing.assert_allclose(maps["fixed_effects"][place], results.params.loc[surest.name], 1e-6)

    image = imread(figures["plot"])[..., :3]
    assert image.shape == (840, 1440, 3)
    assert (np.abs(image - to_rgb("black")).max(axis=-1) < 0.2).sum() > 500  # ventricles
    for colour in ("#440154", "#fde725"):  # the ends of the last colour bar
        assert (np.abs(image[:, 1080:] - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 20


def check_dream(figures: dict, text: str) -> None:
    accuracy, results = figures["accuracy"], figures["results"]
    ours, one, none = (
        accuracy[name] for name in ("mixed models", "one correlation", "no correlation")
    )
    assert len(results) == 2000 and results.converged.mean() > 0.99
    # A share of donors of its own keeps what is promised; one for all, or none, does not.
    assert ours["false"] < 0.08 and abs(ours["size"] - 0.05) < 0.015 and ours["power"] > 0.6
    assert one["false"] > 0.15 and none["false"] > 0.2
    assert figures["table"].index.isin(results.responses).all()
    assert figures["plot"].stat().st_size > 20_000


def check_eqtl(figures: dict, text: str) -> None:
    mixed, plain = figures["mixed"], figures["plain"]
    assert len(figures["results"]) == 4800 and figures["results"].converged.all()
    assert abs(mixed["size"] - 0.05) < 0.02 < 0.05 < plain["size"] - 0.05
    assert mixed["power"] > 0.6 and mixed["false"] < 0.15 < plain["false"]
    assert figures["gap"] < 1e-8
    assert "genes found" in text and figures["plot"].stat().st_size > 10_000


def check_shrinkage(figures: dict, text: str) -> None:
    fit, lines, spread, errors = (figures[k] for k in ("fit", "lines", "spread", "errors"))
    assert fit.nobs == 138 and fit.converged
    rows = fit.table[fit.table["Subject"] == "352"]
    X = np.column_stack([np.ones(3), rows["Days"]])
    own = np.linalg.solve(X.T @ X, X.T @ rows["Reaction"])
    np.testing.assert_allclose(lines.loc["352", ["own_intercept", "own_slope"]], own)
    mixed = lines.loc["352", "mixed_intercept"] + lines.loc["352", "mixed_slope"] * DAYS
    at = {"Days": DAYS, "Subject": ["352"] * 2}
    np.testing.assert_allclose(mixed, fit.predict(at))
    # Drawn to the mean: a little where there are ten days, most of the way where there are three.
    assert 0.5 < spread.loc[False, "mixed_slope"] / spread.loc[False, "own_slope"] < 1
    assert spread.loc[True, "mixed_slope"] / spread.loc[True, "own_slope"] < 0.2
    assert errors["mixed"] < 0.6 * errors["own"] and f"mixed model {errors['mixed']:.0f}" in text
    image = imread(figures["plot"])[..., :3]
    for colour in ("#0072B2", "#D55E00"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 500
    of_docs = EXAMPLES[0].parents[1] / "docs" / "_static" / "shrinkage.png"
    for drawn in (figures["plot"], of_docs):
        assert 10_000 < drawn.stat().st_size < 60_000
    assert imread(of_docs).shape == imread(figures["plot"]).shape


def check_learned_kernel(figures: dict, text: str) -> None:
    learned, errors, surface = (figures[name] for name in ("learned", "errors", "surface"))
    assert learned["status"] == Status.CONVERGED and "converged" in text
    assert figures["gap"] < 1e-8
    assert (surface.to_numpy() > learned["criterion"]).all()
    assert errors["learned lengths"] < 0.75 * errors["independent orchards"]
    assert errors["true lengths"] < errors["independent orchards"]

    # The criterion of fits by eigenvectors, the variances estimated anew: its gradient is zero, and
    # twice the inverse of its Hessian is the same as the part of the joint one.
    module, records = load("learned_kernel"), figures["records"]
    places = figures["places"][: records["orchard"].nunique()]

    def criterion(logs: np.ndarray) -> float:
        kernel = module.matern(places, np.exp(logs))
        return jaxreml.fit(module.FORMULA, records, kernels={"orchard": kernel}).criterion

    at, h = np.log(learned["lengths"]), 0.05
    steps = {(i, j): criterion(at + h * np.array([i, j])) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    slope = [steps[1, 0] - steps[-1, 0], steps[0, 1] - steps[0, -1]]
    np.testing.assert_allclose(np.array(slope) / (2 * h), 0, atol=2e-2)
    across = (steps[1, 1] - steps[1, -1] - steps[-1, 1] + steps[-1, -1]) / 4
    own = [steps[1, 0] + steps[-1, 0], steps[0, 1] + steps[0, -1]] - 2 * np.full(2, steps[0, 0])
    hessian = (np.diag(own) + across * (1 - np.eye(2))) / h**2
    np.testing.assert_allclose(2 * np.linalg.inv(hessian), learned["vcov"], rtol=2e-2)
    image = imread(figures["plot"])[..., :3]
    for colour in ("#0072B2", "#D55E00"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 50


def check_heritability(figures: dict, text: str) -> None:
    found, results = figures["found"], figures["results"]
    assert results.converged.all() and len(found) == 300 and figures["gap"] < 1e-8
    # 95% and 0, with three standard deviations of their sampling.
    inside = found[(found["estimate"] > 0) & (found["truth"] > 0)]
    covered = (inside["lower"] <= inside["truth"]) & (inside["truth"] <= inside["upper"])
    assert figures["coverage"] == pytest.approx(covered.mean()) and 0.91 < covered.mean() < 0.99
    assert abs(figures["bias"]) < 0.03 and found["estimate"].corr(found["truth"]) > 0.7
    zero = found["estimate"] == 0
    assert figures["n_zero"] == zero.sum() > 10
    assert found.loc[zero, ["std_error", "lower", "upper"]].isna().all(axis=None)
    assert found.loc[~zero, ["std_error", "lower", "upper"]].notna().all(axis=None)
    # By dense algebra: the criterion, its gradient, and the standard error of the ratio.
    name = found.index[(found["truth"] > 0.3) & ~zero][0]
    y, table = figures["values"][name].to_numpy(), figures["table"]
    X = np.column_stack([np.ones(len(table)), table["sex"] == "m"]).astype(float)
    K = figures["kinship"].loc[table["calf"], table["calf"]].to_numpy()
    genes, noise = results.variances.loc[name]

    def criterion(logs: np.ndarray) -> float:
        V = np.exp(logs[0]) * K + np.exp(logs[1]) * np.eye(len(K))
        return independent.criterion_at(V, X, y, reml=True)

    at = np.log([genes, noise])
    assert results.criterion[name] == pytest.approx(criterion(at), abs=1e-7)
    np.testing.assert_allclose(independent.gradient(criterion, at), 0, atol=1e-4)
    share = genes / (genes + noise)
    assert found.loc[name, "estimate"] == pytest.approx(share)
    slope = share * (1 - share) * np.array([1, -1])  # of the share in the logarithms
    vcov = 2 * np.linalg.inv(independent.hessian(criterion, at, step=3e-2))
    assert found.loc[name, "std_error"] == pytest.approx(np.sqrt(slope @ vcov @ slope), rel=1e-3)
    image = imread(figures["plot"])[..., :3]
    for colour in ("#0072B2", "#D55E00"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 50


def check_neural_mixed_model(figures: dict, text: str) -> None:
    table, variances, counts = (figures[name] for name in ("table", "variances", "counts"))
    whole = table[table["where"] == "known"].set_index(["share", "method"])["error"]
    sizes = table[table["where"] == "by size"].groupby(["share", "method", "rows"])["error"].mean()
    for share in ("0.5", "0.5, confounded"):
        # Effects of variance 1 altogether are predicted, better from more rows; without groups
        # they are errors in full.
        assert whole[share, "random effects"] < 0.8 * whole[share, "no groups"]
        assert whole[share, "no groups"] > 0.9
        by_rows = sizes[share, "random effects"]
        assert by_rows["32-60"] < by_rows["2-3"]
    assert len(counts) == 200 and counts.min() == 2 and counts.max() == 60
    assert (abs(variances["REML"] - variances["true"])[:2] < 4 * variances["SE"][:2]).all()
    # The square is 2 / J for J groups whose effects are known, more as they are not
    assert variances["SE"].iloc[:2].between(np.sqrt(2 / 200), 2 * np.sqrt(2 / 200)).all()
    assert "known groups by their rows" in text
    of_docs = EXAMPLES[0].parents[1] / "docs" / "_static" / "neural_mixed_model.png"
    assert imread(of_docs).shape == imread(figures["plot"]).shape
    image = imread(figures["plot"])[..., :3]
    for colour in ("#0072B2", "#999999"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 500


def check_bayesian(figures: dict, text: str) -> None:
    few, many = figures["studies"]
    for own in (few, many):
        assert own["r_hat"] < 1.02 and own["divergent"] < 5 and len(own["draws"]) == 4000
        assert f"{own['worth']:.0f}" in text
    for kind in ("Wald", "profile likelihood"):  # where there are many, all say nearly the same
        np.testing.assert_allclose(
            many["intervals"].loc["posterior, wide prior"], many["intervals"].loc[kind], rtol=0.2
        )
    assert few["intervals"].loc["profile likelihood", "lower"] == 0 < few["fit"].sigma

    # The posterior of three schools on a grid of log-variances, by the textbook's formula
    fit, y = few["fit"], few["fit"].y
    objective = load("schools").neg2_restricted_loglik(y, fit.table["school"].to_numpy())
    between, within = np.linspace(-6, 10, 81), np.linspace(0.5, 6.5, 41)
    logs = np.array([[-objective(np.array([a, b])) / 2 for b in within] for a in between])
    for axis in (between[:, None], within):
        logs = logs + stats.t(3, scale=2.5 * y.std()).logpdf(np.exp(axis / 2)) + axis / 2
    weights = np.exp(logs - logs.max()).sum(axis=1)
    sds, wide = np.exp(between / 2), stats.t(3, scale=2.5 * y.std())
    draws, again = few["draws"], few["weights"]
    for of_grid, of_draws in (
        (weights, np.full(len(draws), 1 / len(draws))),
        (weights * stats.expon(scale=5).pdf(sds) / wide.pdf(sds), again),
    ):
        of_grid = of_grid / of_grid.sum()
        for limit in (2.0, 5.0, 10.0, 20.0):
            share = np.interp(limit, sds, np.cumsum(of_grid) - of_grid / 2)
            assert of_draws[draws < limit].sum() == pytest.approx(share, abs=0.06)
        assert of_draws @ np.log(draws) == pytest.approx(of_grid @ np.log(sds), abs=0.08)

    image = imread(figures["plot"])[..., :3]
    assert image.shape == (598, 1170, 3)
    for colour in ("#0072B2", "#D55E00", "#009E73"):
        assert (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.05).sum() > 500


CHECKS = {
    "bayesian": check_bayesian,
    "dream": check_dream,
    "eqtl": check_eqtl,
    "experiment_design": check_experiment_design,
    "genes": check_genes,
    "heritability": check_heritability,
    "hyper_gradient": check_hyper_gradient,
    "influence": check_influence,
    "insteval": check_insteval,
    "learned_kernel": check_learned_kernel,
    "neural_mixed_model": check_neural_mixed_model,
    "optax_lbfgs": check_optax_lbfgs,
    "schools": check_schools,
    "shrinkage": check_shrinkage,
    "voxels": check_voxels,
}


BOUNDED = {
    "heritability": {"calves": 200, "traits": 300},
    "influence": {"rows": [5, 7, 9, 21, 30, 39, 56, 57, 59, 90, 92, 130, 166]},
    "learned_kernel": {"orchards": 60, "grid": 3},
    "neural_mixed_model": {
        "seeds": 1,
        "shares": (0.5,),
        "epochs": 12,
        "methods": ("no groups", "random effects"),
    },
}


def test_examples_and_checks_correspond():
    assert {path.stem for path in EXAMPLES} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_gallery_shows_it(name):
    docs = EXAMPLES[0].parents[1] / "docs"
    text = (docs / "guides" / "gallery.md").read_text()
    assert f"\n    python examples/{name}.py {name}.png\n" in text
    assert f"\n```{{image}} ../_static/{name}.png\n" in text
    assert 5_000 < (docs / "_static" / f"{name}.png").stat().st_size < 80_000


def load(name: str):
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, tmp_path):
    module, path = load(name), tmp_path / f"{name}.png"
    text = io.StringIO()
    with jax.enable_x64(False), redirect_stdout(text):  # as for a user who has set nothing
        figures = module.main(path, **BOUNDED.get(name, {}))
    CHECKS[name](figures, text.getvalue())
    assert Path(figures["plot"]) == path and imread(path).std() > 0.05


def test_genes_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert load("genes").draw(None, None, None, Path("genes.png")) is None
    assert "pip install 'jaxreml[plots]'" in capsys.readouterr().out
