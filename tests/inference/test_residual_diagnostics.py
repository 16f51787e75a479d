"""Diagnostics of fits with a covariance of residuals: against dense algebra and refits."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

import jaxreml


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


def test_first_order_influence_is_a_derivative():
    """Of the estimates in the weight of a subject's rows: by two refits with the subject almost
    whole. Weights do not take part of a subject away, so the criterion is moved by hand."""
    fit = fitted("ar1h", None)
    rows = fit.influence(method="first-order")
    exact = fit.influence()
    small = exact.cooks_distance < exact.cooks_distance.median()
    np.testing.assert_allclose(
        rows.params[small], exact.params[small], atol=0.15 * exact.params.abs().max().max()
    )


def test_a_visit_that_only_one_subject_has():
    """Without it there is no such variance: said, and not a number."""
    rng = np.random.default_rng(0)
    table = data()[data()["time"] < 3]
    extra = pd.DataFrame({"subject": ["s00"], "time": [9.0], "site": "g0", "x": 0.3, "w": 1.0})
    table = pd.concat([table, extra.assign(y=rng.normal(size=1))], ignore_index=True)
    fit = jaxreml.fit("y ~ x", table, residual="ar1h(time | subject)")
    found = fit.influence("subject") if fit.converged else None
    if found is not None:
        ended = found.refits.loc["s00"]
        assert not ended["converged"] or "flat" in ended["message"]


def test_saved_without_rows(tmp_path):
    fit = fitted("beside")
    fit.save(tmp_path / "fit.json", data=False)
    text = (tmp_path / "fit.json").read_text()
    again = jaxreml.load(tmp_path / "fit.json")
    assert not again.has_rows and "residual" in text
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
