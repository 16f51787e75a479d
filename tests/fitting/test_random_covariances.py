"""Fits with covariances of random effects by words: against dense algebra, and R."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from independent import criterion_at, gradient

import jaxreml
from jaxreml.model.covariance.natural import places

WORDS = [
    "diag(0 + f | g)",
    "homdiag(0 + f | g)",
    "cs(0 + f | g)",
    "cs(0 + f | g, hom=True)",
    "ar1(0 + f | g)",
    "hetar1(0 + f | g)",
    "toep(0 + f | g)",
    "homtoep(0 + f | g)",
    "ou(t | g)",
    "exp(t + s | g)",
    "gau(t | g)",
    "mat(t + s | g)",
    "mat(t | g, nu=2.5)",
    "rr(0 + f | g, d=1)",
    "rr(0 + f | g)",
]


@cache
def small(seed: int = 1, groups: int = 14, kinds: int = 4) -> pd.DataFrame:
    """Unbalanced, with two measurements of a kind or so, and weights."""
    rng = np.random.default_rng(seed)
    rows = [(f"g{i:02d}", k) for i in range(groups) for k in range(kinds) for _ in range(2)]
    data = pd.DataFrame(rows, columns=["g", "k"])
    data["f"] = "f" + data["k"].astype(str)
    data["t"] = np.array([0.0, 1.0, 2.5, 3.0, 5.0])[data["k"]]
    data["s"] = np.array([0.5, 0.0, 1.0, 3.0, 2.0])[data["k"]]
    apart = np.abs(np.subtract.outer(range(kinds), range(kinds)))
    effects = rng.multivariate_normal(np.zeros(kinds), 1.5 * 0.7**apart, size=groups)
    effects *= np.linspace(0.8, 1.3, kinds)
    data["x"], data["w"] = rng.normal(size=len(data)), rng.uniform(0.5, 2, len(data))
    data["h"] = rng.integers(0, 6, len(data)).astype(str)
    shared = rng.normal(size=6)[data["h"].astype(int)]
    which = data["g"].str[1:].astype(int)
    data["y"] = data["x"] + effects[which, data["k"]] + shared + rng.normal(size=len(data))
    return data[rng.random(len(data)) > 0.15].reset_index(drop=True)


def dense(fit, parameters: np.ndarray) -> np.ndarray:
    """V of a fit at other parameters, from the definition."""
    V = np.diag(np.exp(parameters[-1]) / fit.prior_weights)
    start = 0
    for term, block in zip(fit.frame.terms, fit.covariance.blocks, strict=True):
        q, count = block.size, len(block.parameter_names("", term.effect_names))
        own = parameters[start : start + count]
        start += count
        if term.covariance.word == "rr":
            loadings = np.zeros((q, block.rank))
            loadings.T[np.triu_indices(block.rank, m=q)] = own
            sigma = loadings @ loadings.T
        else:
            logs, z = own[: block.log_variances], own[block.log_variances :]
            sds = np.broadcast_to(np.exp(logs / 2), q)
            R = np.eye(q)
            if term.covariance.word != "us":
                R = correlations(term.covariance, z, q)[places(q)]
            sigma = sds[:, None] * R * sds
        V += (term.effects @ sigma @ term.effects.T) * (term.codes[:, None] == term.codes)
    return V


def correlations(said, z: np.ndarray, q: int) -> np.ndarray:
    """Entries of the lower triangle, by definition."""
    rows, columns = (np.array(part) for part in np.triu_indices(q)[::-1])
    lags = rows - columns
    if said.word in ("diag", "homdiag"):
        return (lags == 0).astype(float)
    if said.word in ("cs", "homcs"):
        ratio = np.exp(2 * z[0])  # of 1 + (q - 1) rho to 1 - rho
        return np.where(lags == 0, 1.0, (ratio - 1) / (ratio + q - 1))
    if said.word in ("ar1", "hetar1"):
        return np.tanh(z[0]) ** lags
    if said.word in ("toep", "homtoep"):
        return autocorrelations(np.tanh(z))[lags]
    points = np.array(said.places).reshape(q, -1)
    x = np.linalg.norm(points[rows] - points[columns], axis=1) / np.exp(z[0])
    if said.word == "gau":
        return np.exp(-(x**2))
    if said.word == "mat":
        third = 1 / 3 if dict(said.options) else 0.0
        return (1 + x + third * x**2) * np.exp(-x)
    return np.exp(-x)


def autocorrelations(partial: np.ndarray) -> np.ndarray:
    """By solving for each what its partial one says, given those before."""
    found = np.ones(1)
    for own in partial:
        k = len(found)
        if k == 1:
            found = np.append(found, own)
            continue
        inner = found[np.abs(np.subtract.outer(range(k - 1), range(k - 1)))]
        ends = found[1:]
        solved = np.linalg.solve(inner, ends)
        left = 1 - ends @ solved
        found = np.append(found, own * left + ends[::-1] @ solved)
    return found


def criterion(fit, parameters: np.ndarray) -> float:
    V = dense(fit, parameters)
    return criterion_at(V, fit.frame.X, fit.y, reml=fit.method == "REML")


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("beside", ["", " + (1 | h)"])
def test_dense_algebra(word, beside):
    if beside and not word.startswith(("cs", "ar1", "exp", "rr(0 + f | g)")):
        return
    method = "ML" if "hom" in word else "REML"
    fit = jaxreml.fit(f"y ~ x + {word}{beside}", small(), method, weights="w")
    assert fit.converged and not fit.is_singular and fit.engine == "numpy"
    assert fit.criterion == pytest.approx(criterion(fit, fit.parameters), rel=1e-11)
    slope = gradient(lambda at: criterion(fit, at), fit.parameters)
    np.testing.assert_allclose(slope, 0, atol=2e-5)
    # Standard errors by a numerical Hessian
    steps = 1e-3 * np.eye(len(slope))
    found = np.array(
        [
            [
                sum(
                    i * j * criterion(fit, fit.parameters + i * a + j * b)
                    for i in (1, -1)
                    for j in (1, -1)
                )
                / 4e-6
                for a in steps
            ]
            for b in steps
        ]
    )
    expected = 2 * np.linalg.inv(found)
    np.testing.assert_allclose(
        np.sqrt(np.diagonal(fit.parameters_vcov_array)), np.sqrt(np.diagonal(expected)), rtol=2e-4
    )
    inverse = np.linalg.inv(dense(fit, fit.parameters))
    vcov = np.linalg.inv(fit.frame.X.T @ inverse @ fit.frame.X)
    np.testing.assert_allclose(fit.vcov, vcov, rtol=1e-8)

    def of_vcov(at):
        inner = np.linalg.inv(dense(fit, at))
        return np.linalg.inv(fit.frame.X.T @ inner @ fit.frame.X)[1, 1]

    moved = gradient(of_vcov, fit.parameters)
    degrees = 2 * vcov[1, 1] ** 2 / (moved @ expected @ moved)
    assert fit.coefficients()["df"].iloc[1] == pytest.approx(degrees, rel=1e-3)


# References

HERE = Path(__file__).parents[1] / "reference" / "random_covariances"
RECORDED = {
    "diag": "diag(0 + f | g)",
    "cs": "cs(0 + f | g)",
    "ar1": "ar1(0 + f | g)",
    "toep": "toep(0 + f | g)",
    "ou": "ou(t | g)",
    "exp": "exp(t + s | g)",
    "gau": "gau(t + s | g)",
    "mat": "mat(t + s | g)",
    "mat5": "mat(t + s | g, nu=2.5)",
    "rr": "rr(0 + f | g, d=2)",
    "rr1": "rr(0 + f | g, d=1)",
    "pdDiag": "diag(0 + f | g)",
    "pdIdent": "homdiag(0 + f | g)",
    "pdCompSymm": "homcs(0 + f | g)",
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_glmmtmb_and_nlme(name, method):
    expected = json.loads((HERE / "fits.json").read_text())[f"{name}_{method.lower()}"]
    data = pd.read_csv(HERE / "simulated.csv.gz")
    fit = jaxreml.fit(f"y ~ x + {RECORDED[name]}", data, method)
    assert fit.converged and not fit.is_singular
    assert fit.criterion == pytest.approx(expected["criterion"], abs=1e-5)
    np.testing.assert_allclose(fit.params, expected["beta"], atol=2e-4)
    # glmmTMB orders places on a plane in another way.
    ours, theirs = np.asarray(fit.cov_re), np.array(expected["covariance"])
    if name in ("exp", "gau", "mat", "mat5"):
        ours, theirs = np.linalg.eigvalsh(ours), np.linalg.eigvalsh(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert fit.sigma == pytest.approx(expected["sigma"], abs=1e-4)
    if name.startswith("pd"):
        np.testing.assert_allclose(fit.bse, expected["se"], rtol=1e-3)
        return
    # glmmTMB's errors take those of the variances into account: not compared.
    # glmmTMB's parameters: fixed effects by ML, log sigma^2, log-SDs, and what else there is
    found = expected["parameters"][2 if method == "ML" else 0 :]
    last, count = fit.parameters[-1], fit.covariance.blocks[0].log_variances
    assert last == pytest.approx(found[0], abs=1e-4)
    if not name.startswith("rr"):
        np.testing.assert_allclose(fit.parameters[:count] / 2, found[1 : 1 + count], atol=1e-4)
    if name in ("ou", "exp", "gau", "mat", "mat5"):
        assert fit.parameters[1] == pytest.approx(-found[2] if name == "ou" else found[2], abs=1e-4)


# The boundary


def on_boundary(kind: str, seed: int) -> pd.DataFrame:
    """Effects of three occasions whose correlation is at a limit, or without a variance."""
    rng = np.random.default_rng(seed)
    g, k = (part.ravel() for part in np.meshgrid(np.arange(20), np.arange(3), indexing="ij"))
    g, k = np.repeat(g, 3), np.repeat(k, 3)
    shared, own = rng.normal(size=20), rng.normal(size=(20, 3))
    effects = {
        "same": np.repeat(shared[:, None], 3, axis=1),
        "turned": shared[:, None] * np.array([1.0, -1.0, 1.0]),
        "apart": own - own.mean(axis=1, keepdims=True),
        "none": np.zeros((20, 3)),
        "alone": own,
        "last": own * np.array([1.0, 1.0, 0.0]),
    }[kind]
    y = 1 + 2 * effects[g, k] + rng.normal(size=g.size)
    names = [f"k{i}" for i in k]
    return pd.DataFrame(
        {"y": y, "g": g, "f": names, "t": k.astype(float), "x": rng.normal(size=g.size)}
    )


BOUNDARIES = [
    ("homcs(0 + f | g)", "same", {1: np.inf}),
    ("homcs(0 + f | g)", "apart", {1: -np.inf}),
    ("homcs(0 + f | g)", "none", {0: -np.inf, 1: np.nan}),
    ("cs(0 + f | g)", "apart", {3: -np.inf}),
    ("ar1(0 + f | g)", "same", {1: np.inf}),
    ("ar1(0 + f | g)", "turned", {1: -np.inf}),
    ("homtoep(0 + f | g)", "same", {1: np.inf, 2: np.nan}),
    ("ou(t | g)", "same", {1: np.inf}),
    ("gau(t | g)", "same", {1: np.inf}),
    ("mat(t | g)", "same", {1: np.inf}),
    ("ou(t | g)", "apart", {1: -np.inf}),
    ("gau(t | g)", "turned", {1: -np.inf}),
    ("hetar1(0 + f | g)", "last", {2: -np.inf}),
    ("diag(0 + f | g)", "last", {2: -np.inf}),
    ("rr(0 + f | g, d=2)", "same", {3: np.nan, 4: np.nan}),
]


@pytest.mark.parametrize(("word", "kind", "expected"), BOUNDARIES)
def test_boundary(word, kind, expected):
    """Of responses simulated on the boundary, the first whose optimum is there too: recognised, not
    improved by moving off, and the other standard errors given it."""
    for seed in range(40):
        fit = jaxreml.fit(f"y ~ x + {word}", on_boundary(kind, seed))
        assert fit.converged, fit.message
        odd = {int(k): fit.parameters[k] for k in np.flatnonzero(~np.isfinite(fit.parameters))}
        if odd.keys() == expected.keys():
            break
    np.testing.assert_equal(odd, {k: float(value) for k, value in expected.items()})
    assert fit.is_singular and "singular" in fit.message
    errors = np.sqrt(np.diagonal(fit.parameters_vcov_array))
    inside = np.isfinite(fit.parameters)
    assert np.isnan(errors[~inside]).all() and np.isfinite(errors[inside]).all()

    # Well inside, by the definition: it is the limit, and lower than nearby
    def at(moved, distance):
        own = fit.parameters.copy()
        for k, value in expected.items():
            centre = np.log(1.0) if word.startswith(("ou", "gau", "mat")) else 0.0
            if k < fit.covariance.blocks[0].log_variances:
                distance, centre = 3 * distance, 0.0
            own[k] = 0.0 if np.isnan(value) else centre + np.sign(value) * distance
        own[inside] += moved
        return criterion(fit, own)

    none = np.zeros(inside.sum())
    assert at(none, 18.0) == pytest.approx(fit.criterion, abs=2e-5)
    assert fit.criterion <= at(none, 2.0) + 1e-7
    slope = gradient(lambda moved: at(moved, 18.0), none)
    np.testing.assert_allclose(slope, 0, atol=2e-4)
    if inside.sum() < 4:
        steps = 1e-3 * np.eye(inside.sum())
        found = [
            [
                sum(i * j * at(i * a + j * b, 18.0) for i in (1, -1) for j in (1, -1)) / 4e-6
                for a in steps
            ]
            for b in steps
        ]
        expected_errors = np.sqrt(np.diagonal(2 * np.linalg.inv(found)))
        np.testing.assert_allclose(errors[inside], expected_errors, rtol=2e-3)


# Relations between families


def test_same_model_in_other_words():
    data = small()

    def value(word, **options):
        return jaxreml.fit(f"y ~ x + {word}", data, **options)

    pairs = [
        ("us(0 + f | g)", "(0 + f | g)"),
        ("cs(0 + f | g, hom=True)", "homcs(0 + f | g)"),
        ("ar1(0 + f | g, hom=False)", "hetar1(0 + f | g)"),
        ("diag(x | g)", "(x || g)"),
        ("cs(x | g)", "(x | g)"),
        ("exp(t-1 | g)", "ou(0 + t | g)"),
        ("mat(t | g, nu=0.5)", "ou(t | g)"),
        ("csh(0 + f | g)", "cs(0 + f | g)"),
        ("homcs(0 + f | g)", "(1 | g) + (1 | g:f)"),
    ]
    for first, second in pairs:
        one, other = value(first), value(second)
        assert one.criterion == pytest.approx(other.criterion, abs=1e-8), (first, second)
        np.testing.assert_allclose(one.bse, other.bse, rtol=1e-6)
        assert one.coefficients()["df"].iloc[1] == pytest.approx(
            other.coefficients()["df"].iloc[1], rel=1e-5
        )
    tables = [own.coefficients("kenward-roger")[["std_error", "df"]] for own in (one, other)]
    np.testing.assert_allclose(*tables, rtol=1e-6)  # of compound symmetry, which is linear
    # Units of a covariate are those of its variance.
    far = data.assign(x=data["x"] * 1e5)
    one, other = value("cs(x | g)"), jaxreml.fit("y ~ x + cs(x | g)", far)
    np.testing.assert_allclose(one.parameters[[0, 2, 3]], other.parameters[[0, 2, 3]], atol=1e-6)
    assert one.parameters[1] - other.parameters[1] == pytest.approx(2 * np.log(1e5))


def test_nested_terms_and_several():
    data = small().assign(big=lambda d: "b" + (d["g"].str[1:].astype(int) // 3).astype(str))
    fit = jaxreml.fit("y ~ x + ar1(0 + f | big/g)", data)
    assert [own.name for own in fit.groupings] == ["g:big", "big"] and fit.converged
    assert fit.criterion == pytest.approx(
        jaxreml.fit("y ~ x + ar1(0 + f | big) + ar1(0 + f | big:g)", data).criterion, abs=1e-7
    )
    assert len(fit.parameters) == 5


# Everything that follows from a fit


@cache
def fitted(word: str):
    return jaxreml.fit(f"y ~ x + {word}", small())


def test_summary_says_which_covariance():
    text = fitted("ar1(0 + f | g)").summary()
    assert (
        "g, ar1: correlations rho^|i - j|, one variance for all effects; corr f[f1].f[f0]" in text
    )
    assert "f[f0]..f[f3]" in text
    text = fitted("cs(0 + f | g)").summary()
    assert "g, cs: equal correlations, a variance for each effect" in text
    text = fitted("rr(0 + f | g)").summary()
    assert "g, rr: loadings on fewer factors than effects" in text
    assert " g, " not in fitted("(0 + f | g)").summary().split("Number of obs")[0]


@pytest.mark.parametrize("word", ["ar1(0 + f | g)", "cs(0 + f | g)", "ou(t | g)", "rr(0 + f | g)"])
def test_variances_have_standard_errors(word):
    fit = fitted(word)
    components = fit.variance_components
    own = components[components["group"] == "g"]
    variances = np.diagonal(fit.cov_re)
    shared = word.startswith(("ar1", "ou"))
    assert len(own) == (1 if shared else 4)
    np.testing.assert_allclose(own["variance"], variances[:1] if shared else variances)
    np.testing.assert_allclose(own["log_variance"], np.log(own["variance"]))
    table = fit.variance_parameters()
    sds = table[table.index.str.startswith("sd_")]
    expected = 2 * sds["std_error"] / sds["estimate"]
    np.testing.assert_allclose(own["log_variance_se"], expected, rtol=1e-6)
    assert np.isfinite(table["std_error"]).all()
    tidy = fit.tidy("ran_pars", conf_int=True)
    np.testing.assert_allclose(tidy["estimate"].sort_values(), table["estimate"].sort_values())


@pytest.mark.parametrize("word", ["ar1(0 + f | g)", "ou(t | g)", "rr(0 + f | g)"])
def test_predictions_by_definition(word):
    fit = fitted(word)
    frame, V = fit.frame, dense(fit, fit.parameters)
    weighted = np.linalg.solve(V, fit.y - frame.X @ fit.beta)
    (term,) = frame.terms
    sigma = fit.cov_re.to_numpy()
    for level in (0, 3):
        own = term.codes == level
        modes = sigma @ term.effects[own].T @ weighted[own]
        np.testing.assert_allclose(fit.random_effects["g"].iloc[level], modes, rtol=1e-7, atol=1e-9)
    new = small().iloc[[0, 5]]
    expected = fit.fittedvalues.iloc[[0, 5]]
    np.testing.assert_allclose(fit.predict(new), expected, rtol=1e-9)
    unseen = fit.predict(new.assign(g="new"), allow_new_levels=True, interval="prediction")
    np.testing.assert_allclose(unseen["prediction"], frame.X[[0, 5]] @ fit.beta, rtol=1e-9)
    spread = np.einsum("ia,ab,ib->i", term.effects[[0, 5]], sigma, term.effects[[0, 5]])
    known = (
        spread
        + fit.sigma**2
        + np.einsum("ia,ab,ib->i", *[frame.X[[0, 5]], fit.vcov_array, frame.X[[0, 5]]])
    )
    np.testing.assert_allclose(unseen["std_error"] ** 2, known, rtol=1e-7)


def test_saved_and_read(tmp_path):
    for word in ("mat(t + s | g, nu=2.5)", "cs(0 + f | g, hom=True)", "rr(0 + f | g, d=1)"):
        fit = fitted(word)
        fit.save(tmp_path / "fit.json")
        again = jaxreml.load(tmp_path / "fit.json")
        assert again.summary() == fit.summary()
        pd.testing.assert_frame_equal(again.variance_components, fit.variance_components)
        new = small().iloc[:3]
        pd.testing.assert_series_equal(again.predict(new), fit.predict(new))


def test_compared():
    fits = [fitted(word) for word in ("homcs(0 + f | g)", "cs(0 + f | g)", "(0 + f | g)")]
    table = jaxreml.compare(*fits, refit=False)
    assert table["df"].tolist()[1:] == [3, 5] and (table["note"] == "").all()
    table = jaxreml.compare(fitted("(1 | g)"), fitted("ar1(0 + f | g)"), refit=False)
    assert table["df"].iloc[1] == 1 and "boundary" in table["note"].iloc[1]
    other = jaxreml.compare(fitted("ar1(0 + f | g)"), fitted("cs(0 + f | g)"), refit=False)
    assert "ar1(f[f0] + f[f1] + f[f2] + f[f3] | g) is a case of none" in other["note"].iloc[1]


def test_tables_and_plots():
    from matplotlib.figure import Figure

    fit = fitted("ar1(0 + f | g)")
    assert "f[f0]..f[f3]" in fit.to_markdown() and "f[f1]" in fit.to_markdown("random_effects")
    assert fit.plot(ax=Figure().subplots(2, 2).ravel()) is not None
    assert jaxreml.plots.caterpillar(fit) is not None
    assert "ar1(0 + f | g)" in fit.ranova().index[1]


def test_bad_input():
    data = small()

    def fit(word, own=data):
        return jaxreml.fit(f"y ~ x + {word}", own)

    for word, message in (
        ("un(0 + f | g)", "'un' is no covariance of random effects; there are us, diag"),
        ("ad(0 + f | g)", "'ad' is a word for residuals"),
        ("us(0 + f | g, hom=True)", "'us' takes no options"),
        ("ou(t | g, hom=True)", "'ou' takes no options"),
        ("cs(0 + f | g, nu=1.5)", "'cs' takes the option hom"),
        ("cs(0 + f | g, hom=2)", "hom is True or False"),
        ("mat(t | g, nu=2)", "one of 0.5, 1.5, 2.5"),
        ("ar1(f | g)", r"intercept among its effects.*write ar1\(0 \+"),
        ("ou(log(t) | g)", "names of columns of numbers"),
    ):
        with pytest.raises(jaxreml.FormulaError, match=message):
            fit(word)
    for word, message in (
        ("cs(1 | g)", "two or more effects of a term, not of one"),
        ("ou(f | g)", "need numbers for 'f', and it has values such as 'f0'"),
        ("rr(0 + f | g, d=4)", "a whole number from 1 to 3"),
        ("rr(0 + f | g, d=True)", "a whole number from 1 to 3"),
        ("rr(0 + f | big, d=3)", "2 levels"),
        ("homcs(0 + row | g)", "cannot be told apart"),
    ):
        own = data.assign(big=(data["g"] > "g06").map({True: "a", False: "b"}))
        own["row"] = own.groupby("g").cumcount().map("r{}".format)
        with pytest.raises(jaxreml.DataError, match=message):
            fit(word, own)
    with pytest.raises(jaxreml.DataError, match="t has one value"):
        fit("ou(t | g)", data.assign(t=1.0))
    with pytest.raises(jaxreml.DataError, match="more than 100"):
        twice = pd.concat([data, data], ignore_index=True)
        fit("ou(t | g)", twice.assign(t=np.arange(len(twice))))
    with pytest.raises(jaxreml.DataError, match=r"has \d+ effects.*more than 100"):
        fit("ar1(0 + factor(t) | g)", twice.assign(t=np.arange(len(twice))))
    with pytest.raises(jaxreml.DataError, match=r"t 0\.7 in row"):
        fitted("ou(t | g)").predict(data.head(1).assign(t=0.7))
    with pytest.raises(jaxreml.DataError, match=r"cannot fit many responses: the term ar1\("):
        jaxreml.fit_many("~ x + ar1(0 + f | g)", data, np.zeros((len(data), 2)))
