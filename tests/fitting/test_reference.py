"""Fits equal those by lme4, lmerTest and glmmTMB, quantity by quantity with a tolerance each."""

from __future__ import annotations

import numpy as np
import pytest
import references

import jaxreml

pytestmark = pytest.mark.optimised
# A criterion so flat that lme4's optimiser leaves the last digits of the estimates open.
FLAT = {"machines_s", "exam", "q4", "zero_slope", "corr_one", "nested_slash"}
SLOW = {("crossed_nested", "ML")}  # to compile; the REML fit is in the default run
CASES = [
    pytest.param(
        (name, method),
        id=f"{name}-{method}",
        marks=[pytest.mark.long] if (name, method) in SLOW else [],
    )
    for name in references.NAMES
    for method in ("REML", "ML")
]
_fits: dict[tuple[str, str], jaxreml.LMMResults] = {}


@pytest.fixture(params=CASES)
def case(request):
    name, method = request.param
    model = references.reference(name)
    if request.param not in _fits:
        weights = model.get("weights")
        _fits[request.param] = jaxreml.fit(
            model["formula"], references.data(name), method, weights=weights
        )
    return name, _fits[request.param], model["fits"][method]


def test_criterion_is_no_higher(case):
    _, fit, figures = case
    assert fit.converged
    assert fit.criterion == pytest.approx(figures["criterion"], abs=1e-6)
    assert fit.llf == pytest.approx(figures["logLik"], abs=1e-6)
    assert fit.aic == pytest.approx(figures["AIC"], abs=1e-6)
    assert fit.bic == pytest.approx(figures["BIC"], abs=1e-6)


def test_fixed_effects(case):
    name, fit, figures = case
    rel = 1e-4 if name in FLAT else 1e-5
    scale = max(map(abs, figures["fixef"].values()))
    np.testing.assert_allclose(
        fit.params, list(figures["fixef"].values()), rtol=rel, atol=1e-7 * scale
    )
    np.testing.assert_allclose(fit.bse, list(figures["se"].values()), rtol=rel)
    assert len(fit.aliased) == len(figures.get("dropped") or [])


def test_variance_components(case):
    name, fit, figures = case
    rel = 1e-4 if name in FLAT else 1e-5
    rows = figures["varcorr"]
    variances = [row for row in rows if row.get("var2") is None]
    assert list(fit.variance_components["group"]) == [
        row["grp"].removesuffix(".1")  # lme4 numbers the terms of (x || g)
        for row in variances
    ]
    scale = max(row["sdcor"] for row in variances)
    np.testing.assert_allclose(
        fit.variance_components["sd"],
        [row["sdcor"] for row in variances],
        rtol=rel,
        atol=1e-6 * scale,
    )
    expected = [row["sdcor"] for row in rows if row.get("var2") is not None]
    expected = [np.nan if value is None else value for value in expected]
    if name != "zero_slope":  # undefined: lme4 prints NaN or what rounding left
        np.testing.assert_allclose(fit.correlations["correlation"], expected, rtol=rel, atol=1e-5)
    assert fit.sigma == pytest.approx(figures["sigma"], rel=rel)
    assert fit.is_singular == figures["singular"]


def test_log_variance_standard_errors(case):
    _, fit, figures = case
    expected = figures.get("log_variance_glmmTMB")
    if not expected:
        pytest.skip("glmmTMB has no standard errors here")
    ours = fit.log_variance_se.to_numpy()
    keys = [(row["group"], str(row["term"])[-1]) for row in expected]
    mine = [(group, term.strip("]")[-1]) for group, term in fit.log_variance_se.index]
    by_key = {key: row["se"] for key, row in zip(keys, expected, strict=True)}
    assert set(keys) == set(mine)
    np.testing.assert_allclose(ours, [by_key[key] for key in mine], rtol=1e-3)


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_a_zero_variance_conditions_the_other_errors(method):
    """Covariances that rounding leaves of a zero variance are no correlation."""
    table = references.data("zero_slope")
    fit = jaxreml.fit("y ~ x + (x | g)", table, method)
    without = jaxreml.fit("y ~ x + (1 | g)", table, method)
    assert list(fit.theta[1:]) == [0, 0]
    assert "the variance of x of g is zero" in fit.message
    expected = without.log_variance_se.to_numpy()
    ours = fit.log_variance_se.to_numpy()
    np.testing.assert_allclose(ours, [expected[0], np.nan, expected[1]], rtol=1e-6)


def test_random_effects(case):
    _, fit, figures = case
    if "ranef" not in figures:
        pytest.skip("estimates only")
    assert list(fit.random_effects) == list(figures["ranef"])
    for group, rows in figures["ranef"].items():
        modes = fit.random_effects[group]
        assert [str(level) for level in modes.index] == [str(row["level"]) for row in rows]
        expected = np.array([[v for k, v in row.items() if k != "level"] for row in rows], float)
        scale = np.abs(expected).max(initial=1e-300)
        np.testing.assert_allclose(modes, expected, rtol=1e-4, atol=1e-4 * scale + 1e-10)
    np.testing.assert_allclose(fit.fittedvalues[:10], figures["fitted_head"], rtol=1e-5, atol=1e-6)


def test_conditional_variances(case):
    name, fit, figures = case
    if "condvar" not in figures:
        pytest.skip("estimates only")
    rel = 1e-4 if name in FLAT else 1e-5
    for group, expected in figures["condvar"].items():
        expected = np.asarray(expected)
        start = 0
        for grouping in fit.groupings:  # the terms of (x || g) are several
            if grouping.name == group:
                stop = start + len(grouping.effects)
                block = expected[start:stop, start:stop]
                atol = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(grouping.modes_vcov[0], block, rtol=rel, atol=atol)
                start = stop
        assert start == len(expected)


def test_satterthwaite(case):
    _, fit, figures = case
    table = figures.get("satterthwaite")
    if not table:
        pytest.skip("lmerTest's table is for REML fits that are not singular")
    np.testing.assert_allclose(fit.df_satterthwaite, [row["df"] for row in table], rtol=1e-4)
    np.testing.assert_allclose(
        fit.pvalues, [row["Pr(>|t|)"] for row in table], rtol=1e-3, atol=1e-30
    )


def test_theta_is_lme4s(case):
    name, fit, figures = case
    expected = np.atleast_1d(figures["theta"])
    np.testing.assert_allclose(fit.theta, expected, rtol=1e-4, atol=1e-5 * expected.max() + 1e-7)
    if name == "missing":
        assert fit.n_dropped == 7
        assert fit.nobs == figures["n_used"]
