"""`fit_many` with ``kernels=``: as `fit`, response by response."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

import jaxreml

N, LEVELS = 50, 40


@cache
def herd() -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Rows, the covariance of the animals, some of which have no rows, and responses."""
    rng = np.random.default_rng(5)
    G = rng.normal(size=(LEVELS, 60))
    names = [f"a{i:02d}" for i in range(LEVELS)]
    K = pd.DataFrame(G @ G.T / 60, names, names)
    codes = np.concatenate([np.arange(35), rng.integers(0, 35, N - 35)])
    data = pd.DataFrame({"x": rng.normal(size=N), "animal": np.array(names)[codes]})
    b = np.linalg.cholesky(K.to_numpy()) @ rng.normal(size=(LEVELS, 12))
    values = b[codes] * rng.uniform(0, 2, 12) + rng.normal(size=(N, 12)) + data[["x"]].to_numpy()
    return data, K, values


def batch(formula="~ x + (1 | animal)", values=None, kernels=None, **options) -> Any:
    data, K, own = herd()
    values = own if values is None else values
    kernels = {"animal": K} if kernels is None else kernels
    return jaxreml.fit_many(formula, data, values, kernels=kernels, **options)


def alone(y, formula="y ~ x + (1 | animal)", kernels=None, **options):
    data, K, _ = herd()
    return jaxreml.fit(
        formula, data.assign(y=y), kernels={"animal": K} if kernels is None else kernels, **options
    )


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_as_fit(method):
    values = herd()[2]
    results = batch(method=method, modes=True)
    assert results.model.structure == "kernel" and results.converged.all()
    for k in (0, 5, 11):
        fit = alone(values[:, k], method=method)
        assert results.criterion.iloc[k] == pytest.approx(fit.criterion, abs=1e-7)
        np.testing.assert_allclose(results.variances.iloc[k], fit.variances, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(results.params.iloc[k], fit.params, rtol=1e-6)
        np.testing.assert_allclose(results.bse.iloc[k], fit.bse, rtol=1e-6)
        np.testing.assert_allclose(
            results.log_variance_se.iloc[k], fit.log_variance_se, rtol=1e-4, equal_nan=True
        )
        modes = results.random_effects["animal"].loc[results.responses[k]]
        assert len(modes) == LEVELS
        np.testing.assert_allclose(modes, fit.random_effects["animal"], atol=1e-6)
    again = results.estimate(5)
    assert again.criterion == pytest.approx(results.criterion.iloc[5], abs=1e-8)


def test_missing_values():
    """Patterns of rows, each decomposed by itself."""
    values = herd()[2].copy()
    values[:4, 2:5] = np.nan
    values[10, 7] = np.nan
    results = batch(values=values, df="kenward-roger")
    for k in (1, 3, 7):
        fit = alone(values[:, k])
        assert results.criterion.iloc[k] == pytest.approx(fit.criterion, abs=1e-7)
        np.testing.assert_allclose(results.params.iloc[k], fit.params, rtol=1e-6)
        df = fit.coefficients("kenward-roger")["df"]
        np.testing.assert_allclose(results.df.iloc[k], df, rtol=1e-5)


def test_too_many_patterns(monkeypatch):
    monkeypatch.setattr("jaxreml.many.engine.MOST_WORK", 3 * 35**3)
    values = herd()[2].copy()
    values[np.arange(12), np.arange(12)] = np.nan
    with pytest.raises(jaxreml.DataError, match=r"12 different.*order 35, and about 3"):
        batch(values=values)


def test_several_kernels_one_by_one():
    _, K, values = herd()
    kernels = {"animal": {"additive": K, "permanent": None}}
    results = batch(values=values[:, :3], kernels=kernels)
    assert results.model.structure == "linear" and results.model.engine == "numpy"
    fit = alone(values[:, 1], kernels=kernels)
    assert results.criterion.iloc[1] == pytest.approx(fit.criterion, abs=1e-7)
    names = ["animal (additive)", "animal (permanent)", "Residual"]
    assert results.variances.columns.get_level_values(0).tolist() == names
    with pytest.raises(ValueError, match="share weights"):
        batch(weights=np.ones_like(values))


def test_simulated_responses_have_the_covariance_of_the_kernel():
    fit = alone(herd()[2][:, 0])
    drawn = fit.simulate(4000, seed=1).to_numpy()
    term = fit.frame.terms[0]
    assert term.kernel is not None
    V = fit.variances.iloc[0] * term.kernel[np.ix_(term.codes, term.codes)]
    V = V + fit.sigma**2 * np.eye(N)
    centred = drawn - (fit.frame.X @ fit.beta)[:, None]
    # Wishart: (V_ii V_jj + V_ij^2) / draws
    errors = np.sqrt((np.outer(np.diagonal(V), np.diagonal(V)) + V**2) / 4000)
    z = (centred @ centred.T / 4000 - V) / errors
    assert np.abs(z).max() < 5 and 0.8 < z.std() < 1.2
    refits = fit.bootstrap(nsim=39, seed=1)
    assert refits.conf_int().loc["beta[x]", "lower"] < fit.params["x"]
