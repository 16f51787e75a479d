"""The delta method, and what is made with it: against R, closed forms and finite differences."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import references
from fits import fitted
from scipy.special import ndtri

import jaxreml
from jaxreml import ConvergenceWarning, DataError, LMMResults
from jaxreml.inference.parameters import components

FIGURES = json.loads((references.HERE / "inference" / "delta.json").read_text())
Q = ndtri(0.975)


@pytest.mark.parametrize(
    "name", ["sleep_corr", "sleep_unc", "machines_s", "weights_offset", "pastes"]
)
def test_figures_of_r(name):
    fit, figures = fitted(name), FIGURES[name]
    table = fit.variance_parameters()
    assert list(table.index.str.replace(r"[\[\]]", "", regex=True)) == figures["names"]
    if "glmmTMB" in figures:
        np.testing.assert_allclose(table["std_error"], figures["glmmTMB"]["se"], rtol=2e-5)
    r2, icc = fit.r2(), fit.icc().iloc[0]
    for expected in [figures["formula"], figures.get("performance", figures["formula"])]:
        estimates = [r2.loc["marginal", "estimate"], r2.loc["conditional", "estimate"]]
        estimates.append(icc["estimate"])
        wanted = [expected[key] for key in ("marginal", "conditional", "icc")]
        np.testing.assert_allclose(estimates, wanted, rtol=3e-5, atol=1e-12)
    assert (table["note"] == "").all()
    assert np.isfinite(table[["std_error", "lower", "upper"]]).all(axis=None)


def test_all_models_with_one_correlation_have_glmmTMBs_standard_errors():
    """tanh of Fisher's z; glmmTMB's coordinate is t = r / sqrt(1 - r^2)."""
    for name in ("orthodont", "sleep_corr"):
        *_, t = references.reference(name)["fits"]["REML"]["glmmTMB_sdr"]
        (row,) = (
            fitted(name).tidy("ran_pars", conf_int=True).query("term.str.startswith('cor')").iloc
        )
        assert row["std_error"] == pytest.approx(t["se"] / (1 + t["est"] ** 2) ** 1.5, rel=1e-4)
        z = np.arctanh(row["estimate"]) + np.array([-Q, Q]) * row["std_error"] / (
            1 - row["estimate"] ** 2
        )
        np.testing.assert_allclose(row[["conf_low", "conf_high"]].astype(float), np.tanh(z))


def test_covariance_is_that_of_a_finite_difference_hessian():
    fit = fitted("sleep_corr")

    @jax.jit
    def criterion(x):
        params = jnp.stack(
            [2 * jnp.log(x[0]), 2 * jnp.log(x[2]), jnp.arctanh(x[1]), 2 * jnp.log(x[3])]
        )
        return jaxreml.reml_objective(params, fit.design)

    at = fit.variance_parameters()["estimate"].to_numpy()
    steps = np.diag([0.02, 0.0015, 0.005, 0.01])
    hessian = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
            values = [a * b * criterion(at + a * steps[i] + b * steps[j]) for a, b in corners]
            hessian[i, j] = sum(values) / (4 * steps[i, i] * steps[j, j])
    expected = 2 * np.linalg.inv(hessian)
    ours = fit.parameters_vcov("sd")
    assert list(ours.index) == list(ours.columns) == FIGURES["sleep_corr"]["names"]
    scale = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    np.testing.assert_allclose(ours / scale, expected / scale, atol=2e-5)


def test_scales_of_the_variance_parameters():
    fit = fitted("machines_s")
    log = fit.parameters_vcov()
    assert tuple(log.index) == fit.parameter_names
    np.testing.assert_array_equal(log, fit.parameters_vcov_array)
    table = fit.variance_parameters("log")
    np.testing.assert_array_equal(table["estimate"], fit.parameters)
    np.testing.assert_allclose(
        table["upper"] - table["estimate"], Q * np.sqrt(np.diagonal(log)), rtol=1e-12
    )
    variances = fit.variance_parameters("variance")
    matrix = fit.cov_re.to_numpy()
    order = [(i, j) for j in range(3) for i in range(j, 3)]
    np.testing.assert_allclose(variances["estimate"].iloc[:-1], [matrix[at] for at in order])
    assert list(variances.index[[0, 1, 6]]) == [
        "var_Machine[A]|Worker", "cov_Machine[B].Machine[A]|Worker", "sigma2",
    ]  # fmt: skip
    row = variances.loc["var_Machine[C]|Worker"]
    log_se = fit.log_variance_se["Worker", "Machine[C]"]
    assert row["std_error"] == pytest.approx(row["estimate"] * log_se, rel=1e-12)
    assert row["lower"] == pytest.approx(row["estimate"] * np.exp(-Q * log_se), rel=1e-12)
    with pytest.raises(ValueError, match="scale must be one of log, variance, sd"):
        fit.variance_parameters("var")


def test_icc_of_a_balanced_one_way_layout():
    """The two mean squares are independent multiples of chi-squared variables."""
    fit = fitted("dyestuff")
    a, k = 6, 5
    within = fit.sigma**2
    between = within + k * fit.cov_re.to_numpy()[0, 0]
    total = between + (k - 1) * within
    slopes = k * np.array([within, -between]) / total**2
    variances = 2 * np.array([between**2 / (a - 1), within**2 / (a * (k - 1))])
    row = fit.icc().iloc[0]
    assert row["estimate"] == pytest.approx((between - within) / total, rel=1e-10)
    assert row["std_error"] == pytest.approx(math.sqrt(slopes**2 @ variances), rel=1e-6)
    x = row["estimate"]
    limits = np.log(x / (1 - x)) + np.array([-Q, Q]) * row["std_error"] / (x * (1 - x))
    np.testing.assert_allclose(row[["lower", "upper"]].astype(float), 1 / (1 + np.exp(-limits)))
    assert fit.icc("Batch").index[0] == "icc[Batch]"
    pd.testing.assert_series_equal(fit.icc("Batch").iloc[0], row, check_names=False)


def test_a_function_of_beta_and_components_has_the_standard_error_of_finite_differences():
    fit = fitted("sleep_corr")

    def at_day(beta, named):  # the mean at day 5 over the SD of the subjects there
        z = jnp.array([1.0, 5.0])
        return (beta @ z) / jnp.sqrt(z @ named["Subject"] @ z + named["Residual"])

    @jax.jit
    def plain(x):
        return at_day(x[:2], components.of_parameters(x[2:], fit.layout))

    at = np.concatenate([fit.beta, fit.parameters])
    steps = 1e-4 * np.diag(1 + np.abs(at))
    slope = np.array([(plain(at + s) - plain(at - s)) / (2 * s.sum()) for s in steps])
    expected = (
        slope[:2] @ fit.vcov_array @ slope[:2] + slope[2:] @ fit.parameters_vcov_array @ slope[2:]
    )
    with jax.enable_x64(False):
        row = fit.delta(at_day, transform="log").loc["at_day"]
    assert row["estimate"] == pytest.approx(float(plain(at)), rel=1e-12)
    assert row["std_error"] == pytest.approx(math.sqrt(expected), rel=1e-6)
    half = Q * row["std_error"] / row["estimate"]
    assert row["upper"] == pytest.approx(row["estimate"] * math.exp(half), rel=1e-9)


def test_names_transforms_and_levels():
    fit = fitted("sleep_corr")

    def both(beta, named):
        return [beta[1], named["Residual"]]

    assert list(fit.delta(both).index) == ["both[0]", "both[1]"]
    assert list(fit.delta(lambda beta, named: beta[0]).index) == ["g"]
    frame = fit.delta(both, names=("a", "b"), transform=[None, "log"], conf_level=0.9)
    assert frame.loc["a", "std_error"] == pytest.approx(fit.bse["Days"])
    interval = fit.conf_int(0.9, "inf").loc["Days"]
    np.testing.assert_allclose(frame.loc["a", ["lower", "upper"]].astype(float), interval)
    residual = fit.variance_parameters("variance", 0.9).loc["sigma2"]
    pd.testing.assert_series_equal(frame.loc["b"], residual, check_names=False)
    with pytest.raises(ValueError, match=r"3 names for 2 value\(s\)"):
        fit.delta(both, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 transforms for 2"):
        fit.delta(both, transform=["log"])
    with pytest.raises(ValueError, match='None, "log", "logit", "fisher", not \'probit\''):
        fit.delta(both, transform="probit")
    with pytest.raises(ValueError, match="conf_level"):
        fit.delta(both, conf_level=95)
    with pytest.raises(DataError, match=r"logit interval is for values between 0 and 1; both\[0\]"):
        fit.delta(both, transform="logit")


@pytest.mark.parametrize(
    ("g", "message"),
    [
        (lambda b, c: c["subject"], "no 'subject'; this model's are 'Subject', 'Residual'"),
        (lambda b, c: b[2], "index 2 is out of bounds"),  # JAX would give the last
        (lambda b, c: np.sqrt(c["Residual"]), "jax.numpy in place of numpy"),
        (lambda b, c: math.log(c["Residual"]), "jax.numpy in place of numpy and math"),
        (lambda b, c: b[0] if c["Residual"] > 1 else b[1], "no float.* or if"),
        (lambda b, c: c["Subject"], r"not float64 of shape \(2, 2\)"),
        (lambda b, c: c, "not a dict"),
        (lambda b, c: None, "scalar or a vector"),
        (lambda b, c: b[0] * 1j, "real scalar or vector"),
        (3.0, r"function g\(beta, components\), not 3.0"),
    ],
)
def test_functions_that_cannot_be_differentiated(g, message):
    with pytest.raises(ValueError, match=message) as caught:
        fitted("sleep_corr").delta(g)
    has_no_such_entry = "subject" in message or "index" in message
    assert isinstance(caught.value, DataError) == has_no_such_entry


def test_a_function_is_not_compiled_once_for_all():
    fit = fitted("sleep_corr")
    factor = 1.0

    def g(beta, named):
        return factor * beta[0]

    once = fit.delta(g)["estimate"].iloc[0]
    factor = 2.0
    assert fit.delta(g)["estimate"].iloc[0] == pytest.approx(2 * once)


# The boundary


def test_a_variance_of_zero():
    fit = fitted("dyestuff2")
    table = fit.variance_parameters()
    sd, sigma = table.iloc[0], table.iloc[1]
    reason = "the variance of (Intercept) of Batch is zero"
    assert sd["estimate"] == 0 and np.isnan(sd["std_error"])
    assert sd["note"] == f"no standard error on the boundary: {reason}"
    assert sigma["std_error"] == pytest.approx(fit.sigma / math.sqrt(2 * 29), rel=1e-9)
    assert sigma["note"] == f"standard error given that {reason}"
    assert np.isnan(fit.parameters_vcov("variance").iloc[0]).all()
    log = fit.variance_parameters("log")
    assert log["estimate"].iloc[0] == -np.inf and log["note"].iloc[0] == sd["note"]

    def several(beta, named):
        batch, residual = named["Batch"][0, 0], named["Residual"]
        return jnp.stack(
            [
                beta[0],
                3.0 + 0 * residual,
                batch / (batch + residual),
                jnp.log(batch),
                jnp.sqrt(batch) + jnp.sqrt(residual),
                1 / jnp.sqrt(batch) ** 0,
            ]
        )

    frame = fit.delta(several)
    np.testing.assert_allclose(frame["estimate"], [fit.beta[0], 3, 0, -np.inf, fit.sigma, 1])
    expected = [fit.bse.iloc[0], 0, np.nan, np.nan, sigma["std_error"], 0]
    np.testing.assert_allclose(frame["std_error"], expected, rtol=1e-9)
    assert list(frame["note"]) == [
        "", "", sd["note"], f"undefined: {reason}", sigma["note"], "",
    ]  # fmt: skip
    shares = fit.variance_shares()
    assert list(shares["estimate"]) == [0, 1] and shares["std_error"].isna().all()
    r2 = fit.r2()
    assert r2.loc["marginal", "note"] == "no logit interval at 0, the end of its range"
    assert r2.loc["conditional", "note"] == sd["note"]


def test_a_correlation_of_one():
    fit = fitted("corr_one")
    table = fit.variance_parameters()
    assert table.loc["cor_x.(Intercept)|g", "estimate"] == pytest.approx(1, abs=1e-12)
    assert np.isnan(table.loc["cor_x.(Intercept)|g", "std_error"])
    others = table.drop("cor_x.(Intercept)|g")
    assert np.isfinite(others["std_error"]).all()
    assert others["note"].str.contains("given that the correlation of the effects of g is").all()
    covariance = fit.parameters_vcov("sd")
    assert covariance["cor_x.(Intercept)|g"].isna().all()
    at = [0, 2, 3]
    assert np.isfinite(covariance.to_numpy()[np.ix_(at, at)]).all()
    tidy = fit.tidy("ran_pars", conf_int=True)
    assert (
        tidy.loc[tidy["term"].str.startswith("cor"), ["std_error", "conf_low"]]
        .isna()
        .all(axis=None)
    )


def test_a_flat_criterion_leaves_only_the_fixed_effects_standard_errors():
    fit = fitted("sleep_corr")
    flat = dataclasses.replace(
        fit, parameters_vcov_array=np.full_like(fit.parameters_vcov_array, np.nan)
    )
    frame = flat.delta(lambda beta, named: jnp.stack([beta[0], named["Residual"]]))
    assert frame["std_error"].iloc[0] == pytest.approx(fit.bse.iloc[0])
    assert np.isnan(frame["std_error"].iloc[1])
    assert "criterion is flat" in frame["note"].iloc[1]
    assert flat.variance_parameters("log")["note"].str.contains("criterion is flat").all()


def test_without_an_optimum_there_are_no_standard_errors():
    data = jaxreml.datasets.load("sleepstudy")
    with pytest.warns(ConvergenceWarning):
        fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data, max_iterations=1)
    for ask in (fit.variance_parameters, fit.parameters_vcov, fit.r2, fit.icc):
        with pytest.raises(DataError, match=r"cannot give standard errors: .*the iteration limit"):
            ask()
    assert fit.tidy("ran_pars", conf_int=True)["std_error"].isna().all()


def test_no_fixed_effects():
    data = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit("Reaction ~ 0 + (1 | Subject)", data)
    assert np.isfinite(fit.variance_parameters()["std_error"]).all()
    assert fit.r2().loc["marginal", "estimate"] == 0
    assert fit.r2().loc["conditional", "std_error"] == pytest.approx(fit.icc()["std_error"].iloc[0])


# Shares of the variance


def test_shares_are_ratios_of_the_components():
    fit = fitted("machines")
    worker, both, residual = 22.858450, 13.909456, 0.924630
    total = worker + both + residual
    shares = fit.variance_shares()
    assert list(shares.index) == ["Worker:Machine", "Worker", "Residual"]
    np.testing.assert_allclose(
        shares["estimate"], np.array([both, worker, residual]) / total, rtol=1e-5
    )
    with_fixed = fit.variance_shares(fixed=True)
    assert with_fixed["estimate"].sum() == pytest.approx(1)
    r2 = fit.r2()
    assert with_fixed.loc["Fixed effects", "estimate"] == pytest.approx(
        r2.loc["marginal", "estimate"]
    )
    assert with_fixed.loc["Residual", "std_error"] == pytest.approx(
        r2.loc["conditional", "std_error"]
    )

    one = fit.repeatability("Worker").iloc[0]
    np.testing.assert_allclose(one[:4].astype(float), shares.loc["Worker"].iloc[:4].astype(float))
    three = fit.repeatability("Worker", measurements=3).iloc[0]
    assert three["estimate"] == pytest.approx(worker / (worker + both + residual / 3), rel=1e-5)
    unadjusted = fit.repeatability("Worker", adjusted=False).iloc[0]
    np.testing.assert_allclose(
        unadjusted[:4].astype(float), with_fixed.loc["Worker"].iloc[:4].astype(float)
    )

    plot = fit.heritability("Worker").iloc[0]
    assert plot["estimate"] == pytest.approx(worker / (worker + residual), rel=1e-5)
    mean = fit.heritability("Worker", {"Worker:Machine": 3, "Residual": 9}).iloc[0]
    assert mean["estimate"] == pytest.approx(worker / (worker + both / 3 + residual / 9), rel=1e-5)
    scaled = fit.heritability("Worker", multiple=4)
    np.testing.assert_allclose(scaled.iloc[0, :4].astype(float), 4 * plot[:4].astype(float))

    with pytest.raises(
        DataError, match=r"'worker' is not a grouping factor.*it has 'Worker:M.*', 'Worker'"
    ):
        fit.icc("worker")
    with pytest.raises(DataError, match="'plot' is not a grouping factor"):
        fit.heritability("Worker", {"plot": 2})
    with pytest.raises(ValueError, match="measurements must be at least 1"):
        fit.repeatability("Worker", measurements=0)
    with pytest.raises(ValueError, match="must be positive"):
        fit.heritability("Worker", {"Residual": 0})
    with pytest.raises(ValueError, match="whose heritability it is"):
        fit.heritability("Worker", {"Worker": 2})


def test_structures_and_loaded_fits_agree(tmp_path):
    fit = fitted("pastes")
    dense = fitted("pastes", structure="dense")
    pd.testing.assert_frame_equal(fit.variance_shares(), dense.variance_shares(), rtol=1e-6)
    fit.save(tmp_path / "fit.json")
    loaded = LMMResults.load(tmp_path / "fit.json")
    pd.testing.assert_frame_equal(fit.r2(), loaded.r2())


def test_standard_errors_are_those_of_repeated_sampling():
    """Over simulated data the SD of the ICC is its standard error, to Monte Carlo error."""
    rng = np.random.default_rng(5)
    groups, per, count = 60, 8, 400
    g = np.repeat(np.arange(groups), per)
    responses = rng.normal(size=(count, groups))[:, g] + rng.normal(size=(count, g.size))
    results = jaxreml.fit_many("~ 1 + (1 | g)", {"g": g}, responses.T)
    variances = np.exp(results.log_variances.to_numpy())
    spread = np.std(variances[:, 0] / variances.sum(axis=1), ddof=1)
    fit = jaxreml.fit("y ~ 1 + (1 | g)", {"y": responses[0], "g": g})
    x, k = 0.5, per
    expected = (1 - x) * (1 + (k - 1) * x) * math.sqrt(2 / (k * (k - 1) * (groups - 1)))
    assert spread == pytest.approx(expected, rel=0.12)  # 3 Monte Carlo errors of 3.5%
    x = fit.icc()["estimate"].iloc[0]
    scale = (1 - x) * (1 + (k - 1) * x) / ((1 - 0.5) * (1 + (k - 1) * 0.5))
    assert fit.icc()["std_error"].iloc[0] == pytest.approx(expected * scale, rel=0.02)
