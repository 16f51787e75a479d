"""Shares of variance of many responses: by hand, and as those of single fits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError
from jaxreml.data.frame import covariate_frame
from jaxreml.fitting.row_variances import RowMoments
from jaxreml.many.contributions import Parts, contributions
from jaxreml.model.covariance.unstructured import unstructured


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(2)
    return pd.DataFrame(
        {
            "g": np.arange(90) % 15,
            "h": rng.integers(0, 3, 90),
            "x": rng.normal(size=90),
            "z": rng.normal(size=90) + np.arange(90) % 2,
            "a": np.array([*"abc"])[np.arange(90) % 3],
            "w": rng.uniform(0.5, 2, 90),
        }
    )


@pytest.fixture(scope="module")
def values(data):
    rng = np.random.default_rng(4)
    y = rng.normal(size=(90, 5)) + rng.normal(size=(15, 5))[data["g"]]
    y += data[["x", "z"]].to_numpy() @ rng.normal(size=(2, 5))
    y[::8, 1] = np.nan
    y[:, 2] = 7.0
    y[(data["a"] == "a").to_numpy(), 3] = np.nan  # the reference level
    return y


def test_fractions_by_hand(data, values):
    """calcVarPart of variancePartition, for a fit by lmer with random intercepts."""
    results = jaxreml.fit_many("~ x + z + (1 | g)", data, values)
    fractions = results.variance_fractions()
    assert list(fractions) == ["g", "x", "z", "Residual"]
    for i in (0, 1, 4):
        rows = ~np.isnan(values[:, i])
        beta = results.params.loc[i, ["x", "z"]].to_numpy()
        effects = data.loc[rows, ["x", "z"]].to_numpy() * beta
        of_each = effects.var(axis=0)  # var() * (N - 1) / N
        of_all = effects.sum(axis=1).var()
        components = [results.variances.loc[i, ("g", "(Intercept)")]]
        components += [*(of_each / of_each.sum() * of_all), results.sigma[i] ** 2]
        np.testing.assert_allclose(fractions.loc[i], components / np.sum(components), rtol=1e-12)
    assert fractions.loc[2].isna().all()
    np.testing.assert_allclose(fractions.drop(2).sum(axis=1), 1)


@pytest.mark.parametrize(
    ("formula", "weights"),
    [("~ x + a + (z | g)", None), ("~ x + z + (z || g)", "w"), ("~ 1 + (1 | g)", None)],
)
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_shares_are_those_of_single_fits(data, values, formula, weights, method):
    rng = np.random.default_rng(6)
    noise = pd.Series(rng.normal(size=90))
    noise -= noise.groupby(data["g"]).transform("mean")  # no variance between groups
    values = np.column_stack([values[:, :2], noise])
    results = jaxreml.fit_many(formula, data, values, method, weights=weights)
    assert results.is_singular[2]
    for i in range(3):
        fit = jaxreml.fit(f"y {formula}", data.assign(y=values[:, i]), method, weights=weights)

        def same(found, single):
            columns = ["estimate", "std_error", "lower", "upper"]
            found = np.asarray(found, float).reshape(-1, 4)
            np.testing.assert_allclose(found, single[columns], rtol=1e-5, atol=1e-9)

        varied = bool(results.model.fixed_terms)  # else the share of fixed effects is nothing
        for fixed in (False, True)[: 1 + varied]:
            shares = fit.variance_shares(fixed=fixed)
            own = results.variance_shares(fixed=fixed)
            assert list(own.columns.levels[0][own.columns.codes[0][::4]]) == list(shares.index)
            same(own.loc[i], shares)
        same(results.icc().loc[i], fit.icc())
        same(results.icc("g", conf_level=0.8).loc[i], fit.icc("g", conf_level=0.8))
        same(results.r2().loc[i].iloc[0 if varied else 4 :], fit.r2().iloc[0 if varied else 1 :])
        options = {"measurements": 3, "adjusted": False}
        same(results.repeatability("g", **options).loc[i], fit.repeatability("g", **options))
        options = {"per": {"Residual": 4}, "multiple": 2}
        same(results.heritability("g", **options).loc[i], fit.heritability("g", **options))
        fixed = results.variance_fractions().loc[i].drop(["g", "Residual"]).sum()
        n = fit.nobs
        share = fit.variance_shares(fixed=True)["estimate"]["Fixed effects"]
        odds = share / (1 - share) * (n - 1) / n  # divisor n
        assert fixed == pytest.approx(odds / (1 + odds), rel=1e-5)


def test_rows_that_lack_a_level(data, values):
    """The variance of X beta is known where the coefficients of a factor are not."""
    results = jaxreml.fit_many("~ x + a + (1 | g)", data, values[:, [0, 3]])
    assert results.params.loc[1].isna().any()
    kept = data.assign(y=values[:, 3]).dropna()
    fit = jaxreml.fit("y ~ x + a + (1 | g)", kept)
    share = fit.variance_shares(fixed=True)[["estimate", "std_error"]]
    own = results.variance_shares(fixed=True).loc[1].unstack()
    np.testing.assert_allclose(own.loc[share.index, share.columns], share, rtol=1e-5)
    assert results.variance_fractions().loc[1].notna().all()


def test_names_and_what_is_refused(data, values):
    numbered = jaxreml.fit_many("~ x + g + (1 | g)", data, values[:, :1])
    assert list(numbered.variance_fractions()) == ["g", "x", "g (fixed)", "Residual"]
    assert "fixed_variance[g]" in numbered.to_frame()
    with pytest.raises(DataError, match="'h' is not a grouping factor of the model; it has 'g'"):
        numbered.icc("h")
    with pytest.raises(ValueError, match="at least 1"):
        numbered.repeatability("g", measurements=0)
    unknown = numbered.fits._replace(contributions=numbered.fits.contributions * np.nan)
    with pytest.raises(DataError, match="fit again"):
        replace(numbered, fits=unknown).variance_fractions()


def test_lanes_may_have_rows_of_their_own(data):
    frame = covariate_frame("~ x + a + (z | g) + (1 | g:h)", data)
    rng = np.random.default_rng(1)
    used = rng.uniform(size=(90, 3)) < 0.8
    columns = np.arange(frame.X.shape[1])
    together = Parts.of(frame, columns, used)
    b, m, sizes = 3, 4, (1, 2)
    theta = rng.uniform(size=(m, b))
    covariance = unstructured(sizes)
    vcov, spread = (np.einsum("ikb,jkb->ijb", *[rng.normal(size=(k, k, b))] * 2) for k in (4, 5))
    lanes = {"theta": theta, "sigma": rng.uniform(size=b), "beta": rng.normal(size=(4, b))}
    lanes |= {"parameters": rng.normal(size=(5, b)), "vcov": vcov, "parameters_vcov": spread}
    found = contributions(SimpleNamespace(**lanes), together, covariance)
    for k in range(b):
        alone = SimpleNamespace(**{name: own[..., k] for name, own in lanes.items()})
        expected = contributions(alone, Parts.of(frame, columns, used[:, k]), covariance)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[:, k], other, rtol=1e-12)
    moments = RowMoments.of(frame.X[used[:, 0]], frame.terms, used[:, 0])
    np.testing.assert_allclose(together.spread[..., 0], moments.spread, atol=1e-14)
    squares = moments.squares["g"]
    np.testing.assert_allclose(
        together.random[1, 1:, 0], [squares[0, 0], 2 * squares[1, 0], squares[1, 1]]
    )
