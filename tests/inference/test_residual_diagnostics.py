"""Diagnostics of fits with a covariance of residuals: against dense algebra and refits."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from independent import gradient

import jaxreml
from jaxreml.inference.rows.without import of_rows


def data() -> pd.DataFrame:
    """Visits missing here and there; weights; a group that several subjects share."""
    rng = np.random.default_rng(3)
    found = pd.DataFrame(
        [(f"s{i:02d}", float(t), f"g{i % 5}") for i in range(15) for t in range(4)],
        columns=["subject", "time", "site"],
    )
    shared = rng.normal(size=15)[np.repeat(np.arange(15), 4)]
    found["x"], found["w"] = rng.normal(size=60), rng.uniform(0.5, 2, 60)
    found["y"] = found["x"] + shared + rng.normal(size=60)
    found["y"] += 2 * rng.normal(size=5)[np.arange(60) // 4 % 5]
    return found[rng.random(60) > 0.15].reset_index(drop=True)


CASES = {
    "ar1h": ("y ~ x", "ar1h(time | subject)"),
    "beside": ("y ~ x + (1 | subject)", "ar1(time | subject)"),
    "nested": ("y ~ x + (1 | site)", "cs(time | subject)"),
}


@cache
def fitted(name: str, weights: str | None = "w") -> jaxreml.LMMResults:
    formula, residual = CASES[name]
    return jaxreml.fit(formula, data(), residual=residual, weights=weights)


def dense(fit) -> tuple[np.ndarray, np.ndarray]:
    """V and the residuals' part, n x n."""
    own, root = fit.frame.residual, np.sqrt(fit.prior_weights)
    R = fit.residual_cov.to_numpy()[np.ix_(own.places, own.places)]
    R = R * (own.codes[:, None] == own.codes) / root[:, None] / root
    V = R.copy()
    for term, block in zip(fit.frame.terms, fit.cov_re_arrays, strict=True):
        shared = term.effects @ block @ term.effects.T
        V += shared * (term.codes[:, None] == term.codes)
    return V, R


@pytest.mark.parametrize("name", CASES)
def test_leverage_and_studentized_residuals(name):
    """The hat matrix column by column: fitted values of y with one response moved."""
    fit = fitted(name)
    V, R = dense(fit)
    X, inverse = fit.frame.X, np.linalg.inv(V)
    to_beta = np.linalg.solve(X.T @ inverse @ X, X.T @ inverse)
    hat = X @ to_beta + (V - R) @ inverse @ (np.eye(len(V)) - X @ to_beta)
    np.testing.assert_allclose(hat @ fit.y, fit.fitted, rtol=1e-8)
    np.testing.assert_allclose(fit.leverage(), np.diagonal(hat), rtol=1e-8, atol=1e-12)
    rest = np.eye(len(V)) - hat
    spread = rest @ V @ rest.T
    expected = (fit.y - fit.fitted) / np.sqrt(np.diagonal(spread))
    np.testing.assert_allclose(fit.residuals("studentized"), expected, rtol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_deletion_of_rows_at_the_same_covariance(name):
    fit = fitted(name)
    V, _ = dense(fit)
    found, cooks = fit.dfbetas(), fit.cooks_distance()
    information = np.linalg.inv(fit.vcov)
    for row in (0, 7, 20, len(V) - 1):
        kept = np.arange(len(V)) != row
        X, inverse = fit.frame.X[kept], np.linalg.inv(V[np.ix_(kept, kept)])
        vcov = np.linalg.inv(X.T @ inverse @ X)
        change = vcov @ X.T @ inverse @ fit.y[kept] - fit.beta
        expected = change / np.sqrt(np.diagonal(vcov))
        np.testing.assert_allclose(found.iloc[row], expected, rtol=1e-6, atol=1e-10)
        assert cooks.iloc[row] == pytest.approx(change @ information @ change / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["ar1h", "nested"])
def test_influence_of_subjects(name):
    """Refits of the table without the rows."""
    fit = fitted(name)
    found = fit.influence("subject")
    assert found.params.index.tolist() == list(fit.frame.residual.subjects)
    formula, residual = CASES[name]
    for subject in ("s00", "s09"):
        rest = data()[data()["subject"] != subject]
        alone = jaxreml.fit(formula, rest, residual=residual, weights="w")
        change = alone.params - fit.params
        np.testing.assert_allclose(found.params.loc[subject], change, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(found.dfbetas.loc[subject], change / alone.bse, rtol=1e-5)
        moved = alone.parameters - fit.parameters
        np.testing.assert_allclose(found.parameters.loc[subject], moved, rtol=1e-4, atol=1e-6)
    assert found.refits["converged"].all()
    assert found.refits.loc["s00", "rows"] == (data()["subject"] == "s00").sum()
    first = fit.influence("subject", method="first-order")
    for wanted, near in ((found.params, first.params), (found.parameters, first.parameters)):
        assert np.corrcoef(wanted.to_numpy().ravel(), near.to_numpy().ravel())[0, 1] > 0.9


@pytest.mark.parametrize("by", ["subject", None])
def test_first_order_influence_is_a_derivative(by):
    """Of the optimum, by the implicit function theorem, with the slopes of the criteria with and
    without the rows by differences."""
    fit = fitted("ar1h")
    own, block = fit.frame.residual, fit.residual.block

    def criterion(parameters: np.ndarray, kept: np.ndarray) -> float:
        k = block.log_variances
        sds = np.exp(np.append(parameters[-1], parameters[:k]) / 2)
        matrix = np.zeros((4, 4))
        lower = np.triu_indices(4)
        matrix[lower[1], lower[0]] = block.correlation.entries(parameters[k:-1])
        matrix = np.outer(sds, sds) * (matrix + matrix.T - np.eye(4))
        visits, root = own.places[kept], np.sqrt(fit.prior_weights[kept])
        V = matrix[np.ix_(visits, visits)] * (own.codes[kept][:, None] == own.codes[kept])
        V, X, y = V / root[:, None] / root, fit.frame.X[kept], fit.y[kept]
        inverse = np.linalg.inv(V)
        M = X.T @ inverse @ X
        rest = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
        return np.linalg.slogdet(V)[1] + np.linalg.slogdet(M)[1] + rest @ inverse @ rest

    found = fit.influence(by, method="first-order")
    codes = own.codes if by else np.arange(fit.nobs)
    for group in (0, 7):
        kept = codes != group
        slope = gradient(lambda at, kept=kept: -criterion(at, kept), fit.parameters)
        step = fit.parameters_vcov_array @ slope / 2
        np.testing.assert_allclose(found.parameters.iloc[group], step, rtol=1e-3, atol=1e-5)


def test_a_visit_that_only_one_subject_has():
    """Without it there is no such variance: said, and not a number."""
    table = data()
    extra = pd.DataFrame({"subject": ["s00", "s00"], "time": [8.0, 9.0], "x": [0.3, 0.1]})
    table = pd.concat([table, extra.assign(y=[0.3, 1.2])], ignore_index=True)
    fit = jaxreml.fit("y ~ x", table, residual="ar1(time | subject)")
    without, columns = of_rows(fit.frame, fit.frame.residual.codes != 0)
    assert columns.tolist() == [0, 1] and len(without.residual.subjects) == 14
    assert without.residual.visits == fit.frame.residual.visits
    found = fit.influence("subject")
    assert found.refits["converged"].all() and found.params.notna().all().all()


def test_times_of_their_own(tmp_path):
    """More than 60 times: the same figures through rows, and what is refused."""
    rng = np.random.default_rng(1)
    table = data().assign(time=lambda d: d["time"] + rng.uniform(0, 0.5, len(d)).round(4))
    table = pd.concat([table, table.assign(subject=table["subject"] + "b", time=table["time"] + 9)])
    fit = jaxreml.fit("y ~ x", table.reset_index(drop=True), residual="sp_exp(time | subject)")
    assert fit.structure == "chain"
    times, codes = fit.table["time"].to_numpy(), fit.frame.residual.codes
    near = np.exp(-np.abs(np.subtract.outer(times, times)) / np.exp(fit.parameters[0]))
    V = fit.sigma**2 * near * (codes[:, None] == codes)
    X, inverse = fit.frame.X, np.linalg.inv(V)
    hat = X @ np.linalg.solve(X.T @ inverse @ X, X.T @ inverse)
    np.testing.assert_allclose(fit.leverage(), np.diagonal(hat), rtol=1e-7)
    with pytest.raises(jaxreml.DataError, match="times of their own"):
        fit.influence("subject", method="first-order")
    with pytest.raises(jaxreml.DataError, match="predicts from its rows"):
        fit.save(tmp_path / "fit.json", data=False)


@pytest.mark.parametrize("name", ["beside", "ar1h"])
def test_saved_without_rows(name, tmp_path):
    fit = fitted(name)
    fit.save(tmp_path / "fit.json", data=False)
    text = (tmp_path / "fit.json").read_text()
    again = jaxreml.load(tmp_path / "fit.json")
    assert not again.has_rows and str(fit.y[0]) not in text
    assert (again.residual.modes[again.residual.seen > 0] == 0).all()
    pd.testing.assert_frame_equal(again.residual_cov, fit.residual_cov)
    assert again.summary().splitlines()[-8:] == fit.summary().splitlines()[-8:]
    subject = next(s for s in fit.frame.residual.subjects if (data()["subject"] == s).sum() < 4)
    seen = set(data().loc[data()["subject"] == subject, "time"])
    missing = next(t for t in (0.0, 1.0, 2.0, 3.0) if t not in seen)
    new = pd.DataFrame({"x": [0.5] * 3, "subject": [subject, subject, "nobody"]})
    new = new.assign(time=[missing, min(seen), missing], w=1.0)
    options = {"allow_new_levels": True}
    pd.testing.assert_series_equal(again.predict(new, **options), fit.predict(new, **options))
    for ask in (again.leverage, again.influence, again.cooks_distance):
        with pytest.raises(jaxreml.DataError, match="saved without its rows"):
            ask()
