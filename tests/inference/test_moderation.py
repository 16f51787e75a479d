"""Moderated variances against limma's, residual degrees of freedom by hand."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import references

import jaxreml
from jaxreml import BatchResults, DataError, ModeratedResults, Status
from jaxreml.inference.batches import moderation
from jaxreml.many.fitted import BatchModel
from jaxreml.many.numbers import Fits

LIMMA = references.reference("batches/moderation")


def numbers(values) -> np.ndarray:
    return np.array([np.inf if value == "Inf" else value for value in values], float)


@pytest.mark.parametrize("kind", ["simple", "robust"])
@pytest.mark.parametrize("name", list(LIMMA["squeezed"]))
def test_prior_and_posterior_are_those_of_limma(name, kind):
    case = LIMMA["squeezed"][name]
    variances, df = numbers(case["variance"]), numbers(case["df"])
    covariate = numbers(case["covariate"]) if case["covariate"] else None
    prior = moderation.fit_prior(variances, df, covariate, robust=kind == "robust")
    # R's search for robust degrees of freedom ends at 1e-8.
    tolerance = 1e-12 if kind == "simple" else 1e-7
    expected = case[kind]
    posterior = moderation.squeeze(variances, df, prior)
    np.testing.assert_allclose(prior.df, numbers(expected["df_prior"]), tolerance, 1e-12)
    np.testing.assert_allclose(prior.variance, numbers(expected["variance_prior"]), tolerance)
    np.testing.assert_allclose(posterior, numbers(expected["variance_post"]), tolerance)


@pytest.mark.parametrize("x", [1e-5, 0.3, 1.0, 40.0, 1e5, 3e8])
def test_inverse_of_trigamma(x):
    from scipy.special import polygamma

    tolerance = 1e-6 if x in (1e-5, 3e8) else 1e-12  # its limits are used there
    found = moderation.inverse_trigamma(float(polygamma(1, x)))
    assert found == pytest.approx(x, rel=max(tolerance, 1e-12))


def test_few_and_zero_variances():
    two = np.array([1.0, 3.0])
    prior = moderation.fit_prior(two, np.array([5.0, 5.0]), np.array([0.0, 1.0]), robust=True)
    same = moderation.fit_prior(two, np.array([5.0, 5.0]), None, robust=False)
    np.testing.assert_array_equal(prior, same)  # too few for a trend, or for outliers
    for values, message in (([1.0], "two or more"), ([0.0, 0.0, 1.0], "half of the variances")):
        with pytest.raises(DataError, match=message):
            moderation.fit_prior(np.array(values), np.ones(len(values)), None, robust=False)


def test_a_linear_model_is_moderated_as_by_ebayes():
    own = {name: np.array(values) for name, values in LIMMA["linear"].items()}
    b = len(own["t"])
    column = {name: own[name][:, None] for name in ("estimate", "se", "df")}
    unused = {name: np.zeros((b, 1)) for name in Fits._fields if name != "modes"}
    tests = column["estimate"], column["se"], column["df"]
    names = ("beta", "se", "df", "contrast", "contrast_se", "contrast_df")
    known = dict(zip(names, [*tests, *tests], strict=True))
    known |= {"sigma": own["sigma"], "residual_df": own["df"], "status": np.zeros(b, int)}
    fits = Fits(**(unused | known))
    model = BatchModel("~ x", "REML", "grouped", ("x",), (), (), (), 0, "residual", ("again",))
    found = BatchResults(model, pd.RangeIndex(b), fits).moderated()
    np.testing.assert_allclose(found.prior_df, own["df_prior"], rtol=1e-10)
    np.testing.assert_allclose(found.tvalues["x"], own["t"], rtol=1e-10)
    np.testing.assert_allclose(found.pvalues["x"], own["p"], rtol=1e-10)
    np.testing.assert_allclose(found.df["x"], own["df_total"], rtol=1e-10)
    np.testing.assert_array_equal(found.contrasts["again", "p_value"], found.pvalues["x"])


# Fits


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    levels = rng.permutation(np.arange(60) % 9)
    return pd.DataFrame(
        {"g": levels, "x": rng.normal(size=60), "w": rng.uniform(0.5, 2, 60), "a": [*"abc"] * 20}
    )


@pytest.fixture(scope="module")
def responses(data):
    rng = np.random.default_rng(5)
    between = rng.normal(size=(9, 30))[data["g"]]
    values = between + rng.normal(size=(60, 30)) * np.sqrt(8 / rng.chisquare(8, 30)) + 5
    values[:, 3] = 1.0
    values[::7, 4] = np.nan
    return pd.DataFrame(values, columns=[f"gene{k}" for k in range(30)])


def trace(results, data, i, used, weights):
    """tr((I - H)'(I - H)) with n x n matrices."""
    groups, a = (pd.get_dummies(data[name]).to_numpy(float)[used] for name in ("g", "a"))
    theta, x = results.fits.theta[i], data["x"].to_numpy()[used, None]
    effects = np.append(np.ones_like(x), x, axis=1) if len(theta) == 3 else np.ones_like(x)
    factor = np.array([[theta[0], 0], theta[1:]]) if len(theta) == 3 else theta[:, None]
    Z = np.concatenate([groups * row[:, None] for row in (effects @ factor).T], axis=1)
    X = np.concatenate([np.ones_like(x), x, a[:, 1:]], axis=1)
    X, Z = (matrix * np.sqrt(weights)[used, None] for matrix in (X, Z))
    inverse = np.linalg.inv(np.eye(len(x)) + Z @ Z.T)
    P = inverse - inverse @ X @ np.linalg.solve(X.T @ inverse @ X, X.T @ inverse)
    return np.trace(P @ P)


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("term", ["(1 | g)", "(x | g)"])
def test_residual_degrees_of_freedom(data, responses, term, method, weights):
    values = responses.iloc[:, :6]
    results = jaxreml.fit_many(f"~ x + a + {term}", data, values, method, weights=weights)
    own = np.ones(60) if weights is None else data["w"].to_numpy()
    for i in (0, 1, 4):
        used = values.notna().to_numpy()[:, i]
        expected = trace(results, data, i, used, own)
        assert results.residual_df.iloc[i] == pytest.approx(expected, rel=1e-9)
        assert results.mean.iloc[i] == pytest.approx(values.iloc[:, i].mean())
    assert np.isnan(results.residual_df["gene3"]) and results.mean["gene3"] == 1.0


def test_moderated_tests(data, responses):
    contrasts = {"b - c": {"a[T.b]": 1, "a[T.c]": -1}}
    results = jaxreml.fit_many("~ x + a + (1 | g)", data, responses, contrasts=contrasts)
    found = results.moderated()
    assert isinstance(found, ModeratedResults) and found.trend is None
    good = results.converged
    s2, df, d0 = results.sigma**2, results.residual_df, found.prior_df["gene0"]
    assert np.isfinite(d0) and (found.prior_df[good] == d0).all()
    posterior = (df * s2 + d0 * found.prior_variance) / (df + d0)
    np.testing.assert_allclose(found.posterior_variance, posterior, rtol=1e-12)
    se = results.bse.mul(np.sqrt(posterior / s2), axis=0)
    np.testing.assert_allclose(found.bse, se, rtol=1e-12)
    np.testing.assert_allclose(found.tvalues, results.params / se, rtol=1e-12)
    np.testing.assert_allclose(found.df, results.df + d0, rtol=1e-12)
    for name in ("pvalues", "pvalues_adjusted"):
        frame = getattr(found, name)
        assert frame.loc["gene3"].isna().all() and frame[good].notna().all(axis=None)
    contrast, before = found.contrasts["b - c"], results.contrasts["b - c"]
    np.testing.assert_allclose(contrast["df"], before["df"] + d0)
    np.testing.assert_allclose(contrast["std_error"], before["std_error"] * np.sqrt(posterior / s2))
    frame = found.to_frame()
    np.testing.assert_array_equal(frame["posterior_variance"], found.posterior_variance)
    np.testing.assert_array_equal(frame["t[x]"], found.tvalues["x"])
    assert found.tidy("fixed")["df"][0] == found.df.iloc[0, 0]
    assert "prior degrees of freedom" in str(found)


def test_trends(data, responses):
    results = jaxreml.fit_many("~ x + (1 | g)", data, responses)
    found = results.moderated(trend=True)
    pd.testing.assert_series_equal(found.trend, results.mean, check_names=False)
    turned = results.moderated(trend=results.mean[::-1])
    pd.testing.assert_series_equal(found.prior_variance, turned.prior_variance)
    again = results.moderated(trend=results.mean.to_numpy())
    pd.testing.assert_series_equal(found.prior_variance, again.prior_variance)
    assert found.prior_variance.nunique() == 29
    with pytest.raises(ValueError, match="a number for each of 30 responses"):
        results.moderated(trend=np.ones(3))
    with pytest.raises(DataError, match="1 responses with an optimum, the first 'gene7'"):
        results.moderated(trend=results.mean.drop("gene7"))


def test_what_cannot_be_moderated(data, responses, monkeypatch):
    results = jaxreml.fit_many("~ x + (1 | g)", data, responses)
    unknown = results.fits._replace(residual_df=np.full(30, np.nan))
    with pytest.raises(DataError, match="fit again"):
        replace(results, fits=unknown).moderated()
    failed = results.fits._replace(status=np.full(30, Status.CONSTANT.value))
    with pytest.raises(DataError, match="two or more"):
        replace(results, fits=failed).moderated()
    monkeypatch.setitem(sys.modules, "statsmodels.nonparametric.smoothers_lowess", None)
    with pytest.raises(DataError, match=r"pip install 'jaxreml\[counts\]'"):
        results.moderated(trend=True, robust=True)
    assert results.moderated(robust=True).prior_df.notna().sum() == 29
