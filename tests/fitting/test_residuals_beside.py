"""Covariances of residuals beside random effects of other factors: against nlme, glmmTMB and the
same model in dense algebra, in both structures that take them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from independent import gradient, hessian

import jaxreml
from jaxreml.data.frame import model_frame
from jaxreml.model.objective import expand, neg2_loglik
from jaxreml.model.structures.crossed import planning

HERE = Path(__file__).parents[1] / "reference" / "residuals"


@cache
def trial() -> pd.DataFrame:
    return pd.read_csv(HERE / "beside.csv.gz")


@cache
def recorded() -> dict:
    return json.loads((HERE / "beside.json").read_text())


def small(seed: int = 0, subjects: int = 14, visits: int = 3) -> pd.DataFrame:
    """Subjects in sites, items that cross them, visits missing here and there."""
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        [(f"s{i:02d}", float(t)) for i in range(subjects) for t in range(visits)],
        columns=["subject", "time"],
    )
    who = np.repeat(np.arange(subjects), visits)
    what = rng.integers(0, 5, len(data))
    data["site"], data["item"] = np.char.add("c", (who % 5).astype(str)), what
    data["x"], data["w"] = rng.normal(size=len(data)), rng.uniform(0.5, 2, len(data))
    data["arm"] = np.where(who % 3 == 0, "new", "old")
    shared = rng.normal(size=subjects)[who] + rng.normal(size=5)[what] + rng.normal(size=5)[who % 5]
    data["y"] = data["x"] + shared + rng.normal(size=len(data)) * (1 + data["time"] / 3)
    data = data[rng.random(len(data)) > 0.15].reset_index(drop=True)
    return data.assign(row=np.arange(len(data)))


@cache
def fitted(random: str, residual: str, structure: str | None = None, **options):
    data = small(options.pop("seed", 3), subjects=options.pop("subjects", 20))
    return jaxreml.fit(f"y ~ x + {random}", data, residual=residual, structure=structure, **options)


# References


@pytest.mark.parametrize(
    ("name", "random", "residual", "options"),
    [
        ("ar1_nested", "(1 | site/subject)", "ar1(v | subject)", {}),
        ("ar1_site", "(1 | site)", "ar1(v | subject)", {}),
        ("ar1_site_ml", "(1 | site)", "ar1(v | subject)", {"method": "ML"}),
        ("ar1h_site", "(1 | site)", "ar1h(v | subject)", {}),
        ("us_site", "(1 | site)", "us(v | subject)", {}),
        ("cs_site", "(1 | site)", "cs(v | subject)", {}),
        ("sp_exp_site", "(1 | site)", "sp_exp(v | subject)", {}),
        ("ar1_site_weights", "(1 | site)", "ar1(v | subject)", {"weights": "w"}),
        ("us_item_tmb", "(1 | item)", "us(visit | subject)", {}),
        ("ar1_item_site_tmb", "(1 | item) + (1 | site)", "ar1(visit | subject)", {}),
        ("diag_nested", "(1 | site/subject)", "diag(arm)", {}),
        ("diag_nested_ml", "(1 | site/subject)", "diag(arm)", {"method": "ML"}),
        ("diag_crossed_tmb", "(1 | item) + (1 | subject)", "diag(arm)", {}),
    ],
)
def test_nlme_and_glmmtmb(name, random, residual, options):
    expected = recorded()[name]
    fit = jaxreml.fit(f"y ~ arm * visit + x + {random}", trial(), residual=residual, **options)
    assert fit.converged and not fit.is_singular
    assert fit.criterion == pytest.approx(expected["criterion"], abs=1e-5)
    np.testing.assert_allclose(fit.params, expected["beta"], rtol=5e-4, atol=1e-5)
    if "variances" in expected:  # of glmmTMB
        found = fit.variances
        for factor in set(found.index.get_level_values("group")) - {"Residual"}:
            assert found[factor].iloc[0] == pytest.approx(expected["variances"][factor], rel=5e-4)
        own = np.diagonal(fit.residual_cov)
        theirs = expected["variances"]["subject"]
        if expected["dispersion"]:
            theirs = np.exp(np.cumsum(list(expected["dispersion"].values())))
        np.testing.assert_allclose(own, theirs, rtol=5e-4)
        return
    np.testing.assert_allclose(fit.bse, expected["se"], rtol=1e-4)
    assert fit.sigma == pytest.approx(expected["sigma"], rel=1e-4)
    random = fit.variance_components.query("group != 'Residual'")
    ours = sorted(random["variance"])  # theirs are printed with seven digits
    np.testing.assert_allclose(ours, np.sort(np.ravel(expected["random"])), rtol=1e-4)
    matrix = fit.residual_corr.to_numpy()
    if residual.startswith("us"):
        below = matrix.T[np.triu_indices(4, 1)]
        np.testing.assert_allclose(below, expected["correlation"], rtol=1e-3)
    elif not residual.startswith(("sp", "diag")):
        assert matrix[1, 0] == pytest.approx(expected["correlation"], rel=1e-4)
    if expected.get("ratios"):
        sds = np.sqrt(np.diagonal(fit.residual_cov))
        np.testing.assert_allclose(sds / sds[0], list(expected["ratios"].values()), rtol=2e-4)
    modes = fit.random_effects["site"]["(Intercept)"]
    np.testing.assert_allclose(modes, expected["blups"], rtol=2e-4, atol=1e-4)


# Dense algebra


def parts(frame, block, parameters: np.ndarray) -> list[np.ndarray]:
    """Per random intercept its part of V, and the residuals' part, from the definition."""
    own = frame.residual
    count = len(block.parameter_names("", tuple(map(str, range(block.size)))))
    mine = parameters[len(parameters) - 1 - count : -1]
    logs, z = mine[: block.log_variances], mine[block.log_variances :]
    sds = np.sqrt(np.append(np.exp(parameters[-1]), np.exp(logs)))[list(block.variances)]
    matrix = np.zeros((block.size, block.size))
    rows, columns = np.triu_indices(block.size)
    matrix[rows, columns] = matrix[columns, rows] = block.correlation.entries(z)
    matrix = sds[:, None] * matrix * sds
    R = matrix[np.ix_(own.places, own.places)] * (own.codes[:, None] == own.codes)
    root = np.sqrt(np.ones(len(R)) if frame.weights is None else frame.weights)
    random = [
        value * (term.effects @ term.effects.T) * (term.codes[:, None] == term.codes)
        for term, value in zip(frame.terms, np.exp(parameters), strict=False)
    ]
    return [*random, R / root[:, None] / root]


def covariance(fit, parameters: np.ndarray) -> np.ndarray:
    return sum(parts(fit.frame, fit.residual.block, parameters))


def criterion(fit, parameters: np.ndarray) -> float:
    return of_covariance(fit.frame, covariance(fit, parameters), fit.method)


def of_covariance(frame, V: np.ndarray, method: str) -> float:
    X, y = frame.X, frame.y
    inverse = np.linalg.inv(V)
    M = X.T @ inverse @ X
    rest = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
    n, p = X.shape
    value = np.linalg.slogdet(V)[1] + rest @ inverse @ rest
    if method == "ML":
        return n * np.log(2 * np.pi) + value
    return (n - p) * np.log(2 * np.pi) + value + np.linalg.slogdet(M)[1]


MODELS = [
    ("(1 | site)", "us(time | subject)", "REML"),
    ("(1 | item)", "ar1(time | subject)", "REML"),
    ("(1 | item) + (1 | site)", "csh(time | subject)", "ML"),
    ("(1 | site/subject)", "ar1h(time | subject)", "REML"),
    ("(0 + x | site) + (1 | item)", "toep(time | arm/subject)", "REML"),
    ("(1 | item) + (1 | subject)", "diag(arm)", "REML"),
    ("(1 | row) + (1 | site)", "ar1(time | subject)", "REML"),  # with an error of measurement
]


@pytest.mark.parametrize(("random", "residual", "method"), MODELS)
def test_derivatives_anywhere(random, residual, method):
    """Value, gradient and Hessian of the criterion at a point that is no optimum."""
    data = small(3, subjects=20)
    frame = model_frame(f"y ~ x + {random}", data, weights="w", residual=residual)
    block = frame.residual.term.covariance(0)
    rng = np.random.default_rng(7)
    k = len(frame.design("dense").parameter_names)
    at, way = 0.3 * rng.normal(size=k), rng.normal(size=k)

    def dense(parameters):
        return of_covariance(frame, sum(parts(frame, block, parameters)), method)

    value, slope = dense(at), gradient(dense, at)
    steps = [gradient(dense, at + sign * 1e-4 * way) for sign in (1, -1)]
    bend = (steps[0] - steps[1]) / 2e-4
    for structure in ("dense", "crossed"):
        design, reml = frame.design(structure), method == "REML"
        assert type(design.structure).__name__ == structure.title()
        omega, log_sigma2 = design.units.omega(at, design.covariance)
        found = neg2_loglik(omega, log_sigma2, design, reml=reml)
        assert found == pytest.approx(value, rel=1e-12)
        inner = np.array(at)  # a unit is a constant in a log-variance
        for i, matrix in enumerate(design.units.matrices[:-1]):
            inner[i] += 2 * np.log(matrix[0, 0])
        around = expand(omega, design, reml=reml, log_sigma2=log_sigma2)
        first, second = design.covariance.in_parameters(
            inner, around.joint_gradient, around.joint_hessian
        )
        ours = first.T @ around.joint_gradient
        np.testing.assert_allclose(ours, slope, rtol=1e-7, atol=1e-7, err_msg=structure)
        np.testing.assert_allclose(second @ way, bend, rtol=1e-5, atol=1e-4, err_msg=structure)


@pytest.mark.parametrize("by_pairs", [True, False])
def test_crossed_equals_dense_with_many_visits(by_pairs, monkeypatch):
    if by_pairs:  # of couplings; designs as small as these use matrix products
        monkeypatch.setattr(planning, "PAIR", 0)
    data = small(5, subjects=6, visits=14)
    frame = model_frame(
        "y ~ x + (1 | item) + (1 | site)", data, weights="w", residual="ar1(time | subject)"
    )
    crossed, dense = (frame.design(structure) for structure in ("crossed", "dense"))
    rng = np.random.default_rng(1)
    at = 0.3 * rng.normal(size=len(crossed.parameter_names))
    omega, _ = crossed.units.omega(at, crossed.covariance)
    for exact in (True, False):
        for structure in (crossed.structure, dense.structure):
            monkeypatch.setattr(type(structure), "costly", not exact)
        left, right = (expand(omega, design, reml=True, exact=exact) for design in (crossed, dense))
        assert left.value == pytest.approx(right.value, rel=1e-12)
        for name in ("gradient", "hessian"):
            ours, theirs = getattr(left, name), getattr(right, name)
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * (1 + np.abs(theirs).max()))


def test_many_responses():
    data = small(3, subjects=20)
    noise = np.random.default_rng(0).normal(size=(len(data), 2))
    responses = pd.DataFrame(data["y"].to_numpy()[:, None] + noise, columns=["a", "b"])
    found = jaxreml.fit_many(
        "~ x + (1 | site)", data, responses, residual="ar1(time | subject)"
    ).criterion
    for name in responses:
        own = data.assign(y=responses[name])
        fit = jaxreml.fit("y ~ x + (1 | site)", own, residual="ar1(time | subject)")
        assert found[name] == pytest.approx(fit.criterion, abs=1e-8)


@pytest.mark.parametrize("structure", ["dense", "crossed"])
@pytest.mark.parametrize(
    ("random", "residual"), [model[:2] for model in (MODELS[0], MODELS[3], MODELS[5])]
)
def test_random_effects(random, residual, structure):
    fit = fitted(random, residual, structure, weights="w")
    assert fit.converged and not fit.is_singular
    np.testing.assert_allclose(
        gradient(lambda at: criterion(fit, at), fit.parameters), 0, atol=2e-5
    )
    *own, _ = parts(fit.frame, fit.residual.block, fit.parameters)
    V, X = covariance(fit, fit.parameters), fit.frame.X
    inverse = np.linalg.inv(V)
    vcov = np.linalg.inv(X.T @ inverse @ X)
    np.testing.assert_allclose(fit.vcov, vcov, rtol=1e-9)
    rest = inverse @ (fit.y - X @ (vcov @ X.T @ inverse @ fit.y))
    for term, part, grouping in zip(fit.frame.terms, own, fit.groupings, strict=True):
        rows = np.unique(term.codes, return_index=True)[1]
        np.testing.assert_allclose(grouping.modes[:, 0], part[rows] @ rest, rtol=1e-8, atol=1e-9)
        left = (part - part @ inverse @ part)[rows, rows]
        np.testing.assert_allclose(grouping.modes_vcov[:, 0, 0], left, rtol=1e-8)
    np.testing.assert_allclose(fit.fitted, fit.fixed_fitted + sum(own) @ rest, rtol=1e-8)


@pytest.mark.parametrize("structure", ["dense", "crossed"])
def test_standard_errors_and_degrees_of_freedom(structure):
    fit = fitted("(1 | site)", "ar1h(time | subject)", structure, subjects=25)
    assert not fit.is_singular
    expected = 2 * np.linalg.inv(hessian(lambda at: criterion(fit, at), fit.parameters))
    np.testing.assert_allclose(fit.parameters_vcov_array, expected, rtol=1e-3, atol=1e-6)
    vcov = fit.vcov.to_numpy()

    def of_vcov(at):
        inner = np.linalg.inv(covariance(fit, at))
        return np.linalg.inv(fit.frame.X.T @ inner @ fit.frame.X)[1, 1]

    moved = gradient(of_vcov, fit.parameters)
    degrees = 2 * vcov[1, 1] ** 2 / (moved @ expected @ moved)
    assert fit.coefficients()["df"].iloc[1] == pytest.approx(degrees, rel=1e-3)


@pytest.mark.parametrize("structure", ["dense", "crossed"])
def test_kenward_roger_by_definition(structure):
    fit = fitted("(1 | site)", "us(time | subject)", structure, subjects=25)
    own, X = fit.frame.residual, fit.frame.X
    same = own.codes[:, None] == own.codes
    pairs = [(own.places[:, None] == a) & (own.places == b) for a in range(3) for b in range(a + 1)]
    moves = [np.asarray((pair | pair.T) & same, float) for pair in pairs]
    site = fit.frame.terms[0].codes
    moves.append(np.asarray(site[:, None] == site, float))
    inverse = np.linalg.inv(covariance(fit, fit.parameters))
    half = inverse @ X
    phi = np.linalg.inv(X.T @ half)
    projector = inverse - half @ phi @ half.T
    moved = [projector @ move for move in moves]
    W = np.linalg.inv([[np.sum(left * right.T) / 2 for right in moved] for left in moved])
    first = [-half.T @ move @ half for move in moves]
    inner = sum(
        W[i, j] * (half.T @ left @ inverse @ right @ half - first[i] @ phi @ first[j])
        for i, left in enumerate(moves)
        for j, right in enumerate(moves)
    )
    np.testing.assert_allclose(fit.vcov_kenward_roger, phi + 2 * phi @ inner @ phi, rtol=1e-7)
    along = np.array([np.diagonal(phi @ slope @ phi) for slope in first]) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", W, along, along)
    np.testing.assert_allclose(fit.coefficients("kenward-roger")["df"], degrees, rtol=1e-7)
    vcov, slopes = np.asarray(fit.parameters_vcov_array), []
    for step in 1e-5 * np.eye(len(fit.parameters)):
        up, down = (covariance(fit, fit.parameters + sign * step) for sign in (1, -1))
        slopes.append(np.diagonal(phi @ half.T @ ((up - down) / 2e-5) @ half @ phi))
    along = np.array(slopes) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", vcov, along, along)
    found = fit.coefficients("kenward-roger-sas")["df"]
    np.testing.assert_allclose(found, degrees, rtol=1e-5)


@pytest.mark.parametrize(
    ("random", "residual", "names"),
    [
        ("(1 | subject)", "cs(time | subject)", "from the random effects on 'subject': log_var"),
        ("(1 | alone)", "us(time | subject)", "from the random effects on 'alone'"),
        ("(1 | item) + (1 | subject)", "toep(time | subject)", "on 'subject': .*lag 1.*lag 2"),
        ("(1 | row)", "diag(time | subject)", "on 'row'"),
        ("(1 | row) + (1 | item)", "diag(arm)", "on 'row'"),
    ],
)
def test_what_means_the_same_is_refused(random, residual, names):
    data = small(3, subjects=20)
    data["alone"] = data["subject"].str.replace("s", "z")
    with pytest.raises(jaxreml.DataError, match=names):
        jaxreml.fit(f"y ~ x + {random}", data, residual=residual)


def test_visits_that_no_subject_has_together():
    data = small(3, subjects=20)
    late = data["subject"].isin(data.loc[data["time"] == 2, "subject"])
    data = data[~(late & (data["time"] == 0))]
    with pytest.raises(jaxreml.DataError, match=r"do not determine .*z\[Residual, 0, 2\]"):
        jaxreml.fit("y ~ x + (1 | site)", data, residual="us(time | subject)")


def test_variances_by_level_without_random_effects():
    """Weighted least squares of each level's variance, by the definition."""
    fit = jaxreml.fit("y ~ x + time", small(3, subjects=20), "ML", residual="diag(item)")
    assert fit.converged and fit.ngroups == {} and "Residuals:\n diag(item)" in fit.summary()
    variances = np.diagonal(fit.residual_cov)
    own, X, y = fit.frame.residual.places, fit.frame.X, fit.y
    weights = 1 / variances[own]
    beta = np.linalg.solve(X.T @ (weights[:, None] * X), X.T @ (weights * y))
    np.testing.assert_allclose(fit.params, beta, rtol=1e-8)
    squares = (y - X @ beta) ** 2
    expected = [squares[own == k].mean() for k in range(len(variances))]  # the likelihood's
    np.testing.assert_allclose(variances, expected, rtol=1e-5)
    row = fit.table.iloc[[0]]
    found = fit.predict(row, interval="prediction")["std_error"].iloc[0]
    x = X[0]
    assert found**2 == pytest.approx(x @ fit.vcov @ x + variances[own[0]], rel=1e-8)
    smaller = jaxreml.fit("y ~ x + time + (1 | item)", small(3, subjects=20), "ML")
    larger = jaxreml.fit(smaller.formula, fit.table, "ML", residual="diag(item)")
    table = jaxreml.compare(smaller, larger)
    assert table["df"].iloc[1] == 4 and "no case" not in table["note"].iloc[1]


def test_bad_levels():
    data = small(3, subjects=30)
    for residual, match in (
        ("diag(many)", "'many' has 70 different values, and a .* for each is there for 2 to 60"),
        ("diag(one)", "'one' has 1 different values"),
        ("diag(rare)", "the rows with rare 'once', 1 of them, are fitted exactly"),
    ):
        with pytest.raises(jaxreml.DataError, match=match):
            own = data.assign(one=1, rare=np.where(data["row"] == 4, "once", "often"))
            own["many"] = own["row"] % 70
            jaxreml.fit("y ~ x", own, residual=residual)
    with pytest.raises(jaxreml.FormulaError, match=r"of the form 'diag\(group\)'"):
        jaxreml.fit("y ~ x", data, residual="diag(arm + item)")
    with pytest.raises(jaxreml.DataError, match="give cluster="):
        jaxreml.fit("y ~ x", data, residual="diag(arm)").robust()


# What follows from a fit


@pytest.mark.parametrize("structure", ["dense", "crossed"])
def test_predictions_know_subject_and_site(structure):
    fit = fitted("(1 | site) + (1 | item)", "ar1h(time | subject)", structure)
    data, own, X = fit.table, fit.frame.residual, fit.frame.X
    subject = next(s for s in own.subjects if 0 < (data["subject"] == s).sum() < 3)
    seen = data[data["subject"] == subject]
    other = next(t for t in own.visits if t not in set(seen["time"]))
    new = pd.DataFrame({"x": [0.5, 0.5], "subject": [subject, "nobody"], "time": [other] * 2})
    new["site"], new["item"] = seen["site"].iloc[0], data["item"].iloc[0]
    found = fit.predict(new, interval="prediction")
    V = covariance(fit, fit.parameters)
    inverse, matrix = np.linalg.inv(V), fit.residual_cov
    vcov = np.linalg.inv(X.T @ inverse @ X)
    rest = fit.y - X @ fit.params.to_numpy()
    for k, row in new.iterrows():
        shared = np.zeros(len(data))
        prior = matrix.loc[other, other]
        for name in ("site", "item"):
            variance = fit.variances[name].iloc[0]
            shared += variance * (data[name] == row[name]).to_numpy()
            prior += variance
        same = (data["subject"] == row["subject"]).to_numpy()
        shared[same] += matrix.loc[data["time"][same], other]
        weights = inverse @ shared
        x = np.array([1.0, row["x"]])
        shift = x - weights @ X
        variance = prior - weights @ shared + shift @ vcov @ shift
        expected = x @ fit.params.to_numpy() + weights @ rest
        assert found["prediction"].iloc[k] == pytest.approx(expected, rel=1e-8)
        assert found["std_error"].iloc[k] == pytest.approx(np.sqrt(variance), rel=1e-8)
    np.testing.assert_allclose(fit.predict(), fit.fittedvalues, rtol=1e-12)


def test_simulated_responses_and_residuals():
    fit = fitted("(1 | site) + (1 | item)", "ar1h(time | subject)", weights="w")
    draws = fit.simulate(6000, seed=1, re_form="~0").to_numpy() - fit.fixed_fitted[:, None]
    V = covariance(fit, fit.parameters)
    error = np.sqrt((np.outer(np.diagonal(V), np.diagonal(V)) + V**2) / draws.shape[1])
    assert (np.abs(draws @ draws.T / draws.shape[1] - V) / error).max() < 5
    *_, R = parts(fit.frame, fit.residual.block, fit.parameters)
    order = np.lexsort((fit.frame.residual.places, fit.frame.residual.codes))
    root = np.linalg.cholesky(R[np.ix_(order, order)])
    expected = np.linalg.solve(root, (fit.y - fit.fitted)[order])
    np.testing.assert_allclose(fit.residuals("normalized").to_numpy()[order], expected, rtol=1e-9)


def test_robust_by_definition():
    fit = fitted("(1 | site)", "ar1(time | subject)")
    V, X = covariance(fit, fit.parameters), fit.frame.X
    inverse = np.linalg.inv(V)
    vcov = np.linalg.inv(X.T @ inverse @ X)
    site, rest = fit.frame.terms[0].codes, fit.y - fit.fixed_fitted
    scores = np.array([X.T @ inverse @ (rest * (site == k)) for k in range(5)])
    np.testing.assert_allclose(fit.robust("CR0").vcov, vcov @ scores.T @ scores @ vcov, rtol=1e-8)
    with pytest.raises(jaxreml.DataError, match="'site' are in several clusters of 'subject'"):
        fit.robust(cluster="subject")


def test_saved_and_read(tmp_path):
    fit = fitted("(1 | site) + (1 | item)", "ar1h(time | subject)")
    fit.save(tmp_path / "fit.json")
    again = jaxreml.load(tmp_path / "fit.json")
    assert again.summary() == fit.summary()
    new = small(3, subjects=20).iloc[[2]].assign(time=2.0)
    pd.testing.assert_series_equal(again.predict(new), fit.predict(new))


@pytest.mark.long
@pytest.mark.parametrize("structure", ["dense", "crossed"])
def test_jax_agrees(structure):
    args = ("(1 | site) + (1 | item)", "ar1h(time | subject)", structure)
    ours, theirs = fitted(*args), fitted(*args, engine="jax")
    assert theirs.criterion == pytest.approx(ours.criterion, abs=1e-8)
    np.testing.assert_allclose(theirs.parameters, ours.parameters, atol=1e-6)
    np.testing.assert_allclose(theirs.fitted, ours.fitted, rtol=1e-6)
