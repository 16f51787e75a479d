"""Simulation, the parametric bootstrap, simulated likelihood-ratio tests and power."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import references
from scipy import stats

import jaxreml
from jaxreml import DataError, LMMResults, datasets
from jaxreml.fitting.fit import fit_frame
from jaxreml.inference.resampling import intervals
from jaxreml.inference.resampling.bootstrap import bootstrap
from jaxreml.inference.resampling.extension import extend
from jaxreml.inference.resampling.likelihood_ratio import bootstrap_lrt, null_distribution
from jaxreml.inference.resampling.simulation import of_fit, population
from jaxreml.many.engine import BatchFitter
from jaxreml.status import Status

SLEEP = "Reaction ~ Days + (Days | Subject)"
R = json.loads((references.HERE / "bootstrap.txt").read_text())


@pytest.fixture(scope="module")
def sleep():
    return jaxreml.fit(SLEEP, datasets.load("sleepstudy"))


@pytest.fixture(scope="module")
def boot(sleep):
    return sleep.bootstrap(4000, seed=3)


@pytest.fixture(scope="module")
def one_way():
    """A balanced one-way layout with weights and an offset that change nothing but the scale."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(12), 5)
    table = pd.DataFrame({"g": group, "o": 7.0, "w": 4.0})
    table["y"] = 3 + 2 * rng.normal(size=12)[group] + rng.normal(size=60) + table["o"]
    return jaxreml.fit("y ~ 1 + (1 | g)", table, weights="w", offset="o")


# Simulation


def test_simulated_moments(one_way):
    draws = one_way.simulate(20_000, seed=1)
    assert draws.index.equals(one_way.table.index) and draws.columns[0] == "sim_1"
    between = one_way.cov_re.iloc[0, 0]
    within = one_way.sigma**2 / 4  # weights of 4
    values = draws.to_numpy()
    np.testing.assert_allclose(values.mean(axis=1), one_way.fixed_fitted, atol=0.1)
    covariance = np.cov(values)
    groups = one_way.table["g"].to_numpy()
    expected = between * (groups[:, None] == groups) + within * np.eye(60)
    np.testing.assert_allclose(covariance, expected, atol=6 * expected.max() / math.sqrt(20_000))


def test_simulation_given_the_modes(sleep):
    values = sleep.simulate(4000, seed=1, re_form=None).to_numpy()
    error = sleep.sigma / math.sqrt(4000)
    assert np.abs(values.mean(axis=1) - sleep.fittedvalues).max() < 5 * error
    np.testing.assert_allclose(values.std(axis=1).mean(), sleep.sigma, rtol=0.01)
    with pytest.raises(ValueError, match="re_form"):
        sleep.simulate(re_form="~ (1 | Subject)")


def test_simulation_is_reproducible(sleep):
    few, many = sleep.simulate(3, seed=2), sleep.simulate(300, seed=2)
    pd.testing.assert_frame_equal(few, many.iloc[:, :3])
    assert not np.allclose(few, sleep.simulate(3, seed=4))
    assert len(np.unique(many.to_numpy())) == many.size
    blocks = np.concatenate(list(of_fit(sleep).blocks(300, 2)), axis=1)
    np.testing.assert_array_equal(blocks, many)
    for bad in ({"nsim": 0}, {"nsim": 1.5}, {"seed": -1}, {"seed": None}):
        with pytest.raises(ValueError, match=r"nsim must be an integer|seed must be an integer"):
            sleep.simulate(**bad)


def test_population_simulates_as_the_fit(sleep):
    data = datasets.load("sleepstudy")
    values = {"Subject": sleep.cov_re.to_numpy()}
    same = population(SLEEP, data.drop(columns="Reaction"), sleep.params, values, sleep.sigma)
    np.testing.assert_allclose(same.mean, sleep.fixed_fitted)
    root = same.factors[0]
    np.testing.assert_allclose(root @ root.T, sleep.cov_re)
    covariance = np.cov(same.simulate(4000, 1))
    assert covariance[9, 9] == pytest.approx(np.var(sleep.simulate(4000, 2).iloc[9]), rel=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": {"(Intercept)": 1}}, DataError, "beta has no value for Days"),
        ({"beta": {"(Intercept)": 1, "Days": 2, "day": 3}}, DataError, "the model does not have"),
        ({"variances": {"Subject": [1, 2, 3]}}, ValueError, "Subject has 2 random effects"),
        ({"variances": {"Subject": [[1, 2], [2, 1]]}}, ValueError, "not a covariance matrix"),
        ({"variances": {}}, DataError, "variances has no value for Subject"),
        ({"sigma": 0}, ValueError, "sigma must be positive"),
    ],
)
def test_population_names_what_is_wrong(change, error, message):
    given = {"beta": {"(Intercept)": 1, "Days": 2}, "variances": {"Subject": [1, 2]}, "sigma": 1}
    with pytest.raises(error, match=message):
        population(SLEEP, datasets.load("sleepstudy"), **(given | change))


# Refits

MODELS = {
    "sleepstudy": (SLEEP, "grouped", "REML"),
    "dyestuff": ("Yield ~ 0 + (1 | Batch)", "grouped", "REML"),
    "penicillin": ("diameter ~ 0 + (1 | plate) + (1 | sample)", "crossed", "ML"),
    "pastes": ("strength ~ 1 + (1 | batch/cask)", "crossed", "REML"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("dyestuff", "pastes") else ())
        for name in MODELS
    ],
)
def test_refits_are_fits(name):
    formula, structure, method = MODELS[name]
    data = datasets.load(name)
    n = len(data)
    extras = {"weights": np.linspace(1, 3, n), "offset": np.linspace(0, 20, n)}
    fit = jaxreml.fit(formula, data, method, **(extras if structure == "crossed" else {}))
    assert fit.structure == {"grouped": "grouped", "crossed": "dense"}[structure]
    people = of_fit(fit)
    values = next(people.blocks(150, 1))
    engine = BatchFitter(people.frame, method, structure=structure)
    fits = engine.fit(values)
    assert (fits.status == Status.CONVERGED).all()
    for k in (0, 70, 149):
        frame = replace(people.frame, y=values[:, k])
        one = fit_frame(frame, method, structure, kind=LMMResults)
        assert fits.criterion[k] == pytest.approx(one.criterion, abs=1e-8)
        np.testing.assert_allclose(fits.beta[k], one.beta, rtol=1e-7)
        np.testing.assert_allclose(fits.theta[k], one.theta, atol=1e-6)
        np.testing.assert_allclose(fits.df[k], one.df_satterthwaite, rtol=1e-5)
        gradient = engine.gradients(fit.parameters, values[:, k : k + 1])[0]
        objective = jaxreml.reml_objective if method == "REML" else jaxreml.ml_objective
        expected = jax.jit(jax.grad(objective))(fit.parameters, frame.design(structure))
        np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_a_crossed_refit_that_fails_has_no_numbers():
    fit = jaxreml.fit(MODELS["pastes"][0], datasets.load("pastes"))
    values = next(of_fit(fit).blocks(3, 1)).copy()
    values[:, 1] = 5.0
    fits = BatchFitter(fit.frame, structure="crossed").fit(values)
    assert list(fits.status == Status.CONVERGED) == [True, False, True]
    assert np.isnan(fits.beta[1]).all() and np.isfinite(fits.beta[[0, 2]]).all()


# Intervals


def test_intervals_are_those_of_boot_ci():
    k = np.arange(1, 1000)
    draws, errors = np.exp(np.sin(k)), (2 + np.cos(3 * k)) / 10
    estimate, acceleration = 1.2, R["draws"]["acceleration"]
    for level, expected in R["draws"]["limits"].items():
        level = float(level)
        found = {
            "percentile": intervals.percentile(draws, level),
            "basic": intervals.basic(draws, estimate, level),
            "studentized": intervals.studentized(draws, errors, estimate, 0.25, level),
            "bca": intervals.order_statistics(
                draws, intervals.bca_probabilities(draws, estimate, acceleration, level)
            ),
        }
        for method, limits in found.items():
            np.testing.assert_allclose(limits, expected[method], rtol=1e-9, err_msg=method)


def test_bca_limits_that_are_not_to_be_had_say_why():
    draws = jaxreml.fit("Yield ~ 1 + (1 | Batch)", datasets.load("dyestuff")).bootstrap(
        nsim=1999, seed=1
    )
    table = draws.conf_int(0.95, "bca")
    missing = table.loc["log_variance[Batch, (Intercept)]"]
    assert np.isnan(missing["upper"]) and "beyond the draws: about " in missing["reason"]
    assert int(missing["reason"].split()[-3].replace(",", "")) > 1999
    few = np.arange(100.0)
    tails = intervals.bca_probabilities(few, 50.0, 0.6, 0.95)
    assert tails[0] < 0.5 and np.isnan(tails[1])
    assert np.isnan(intervals.order_statistics(few, tails)).tolist() == [False, True]


def test_order_statistics_at_the_edges():
    draws = np.array([-np.inf, -np.inf, 1.0, 2.0, np.inf])
    limits = intervals.order_statistics(draws, np.array([1 / 6, 0.25, 0.4, 5 / 6, 0.1]))
    assert limits[0] == limits[1] == limits[2] == -np.inf
    assert limits[3] == np.inf and np.isnan(limits[4])


# Bootstrap


def test_agrees_with_bootmer(boot):
    """Both have Monte Carlo errors: relative sqrt(1 / 2n) of an SD of normal draws, each."""
    reference = R["sleepstudy"]
    mine = boot.to_frame().iloc[:6]
    for k in range(6):
        sd = reference["std_error"][k]
        of_mean = sd * math.sqrt(1 / 4000 + 1 / reference["n"])
        assert mine["bias"].iloc[k] == pytest.approx(reference["bias"][k], abs=4 * of_mean)
        assert mine["std_error"].iloc[k] == pytest.approx(sd, rel=4 * 1.2 / math.sqrt(4000))
    assert boot.n_failed == 0 and boot.failures.empty
    assert 0.005 < boot.share_singular < 0.04


def test_estimates_are_the_fits(boot, sleep):
    estimate = boot.estimate
    np.testing.assert_allclose(estimate.iloc[:2], sleep.params)
    assert estimate["sigma"] == pytest.approx(sleep.sigma)
    assert estimate["sd[Subject, Days]"] == pytest.approx(sleep.variance_components["sd"][1])
    name = "correlation[Subject, (Intercept), Days]"
    assert estimate[name] == pytest.approx(sleep.correlations["correlation"][0])
    np.testing.assert_allclose(estimate.iloc[-3:], sleep.log_variances)
    assert list(estimate.index[-3:]) == [
        "log_variance[Subject, (Intercept)]",
        "log_variance[Subject, Days]",
        "log_variance[Residual]",
    ]


def test_draws_are_refits_of_the_simulated_responses(boot, sleep):
    table = sleep.table.assign(Reaction=sleep.simulate(3, seed=3)["sim_3"])
    one = jaxreml.fit(SLEEP, table)
    again = bootstrap(one, 40)
    np.testing.assert_allclose(boot.draws.iloc[2], again.estimate, rtol=1e-6)
    np.testing.assert_allclose(boot.errors.iloc[2, :2], one.bse, rtol=1e-6)
    np.testing.assert_allclose(boot.errors.iloc[2, -3:], one.log_variance_se, rtol=1e-5)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca", "studentized"])
def test_intervals(boot, method):
    limits = boot.conf_int(method=method)
    assert (limits["reason"] == "").all()
    assert (limits["lower"] < boot.estimate).all() and (boot.estimate < limits["upper"]).all()
    wider = boot.conf_int(0.975, method)
    inner = limits[["lower", "upper"]]
    assert (wider["lower"] < inner["lower"]).all() and (wider["upper"] >= inner["upper"]).all()
    if method in ("percentile", "bca"):  # these follow transformations
        sd = inner.loc[["sd[Subject, Days]", "sigma"]].to_numpy()
        logs = inner.loc[["log_variance[Subject, Days]", "log_variance[Residual]"]].to_numpy()
        np.testing.assert_allclose(2 * np.log(sd), logs, atol=0.01)


def test_acceleration_of_a_chi_square(one_way):
    """The residual mean square of a balanced layout is chi-square, of skewness sqrt(8 / df)."""

    def variance(beta, components):
        return components["Residual"]

    boot = one_way.bootstrap(4000, variance)
    expected = math.sqrt(8 / 48) / 6
    assert boot.acceleration["statistic"] == pytest.approx(expected, abs=4 * 0.05 / 6)
    # the exact interval of a chi-square, which BCa reaches to second order
    exact = 48 * one_way.sigma**2 / stats.chi2.ppf([0.975, 0.025], 48)
    limits = boot.conf_int(method="bca").iloc[0]
    np.testing.assert_allclose([limits["lower"], limits["upper"]], exact, rtol=0.04)
    plain = boot.conf_int().iloc[0]
    assert abs(plain["upper"] / exact[1] - 1) > 0.08


def test_statistics_of_the_user(sleep, boot):
    def shares(beta, components):
        subject = components["Subject"]
        total = jnp.trace(subject) + components["Residual"]
        return {"icc": subject[0, 0] / total, "doubled": 2 * beta}

    own = sleep.bootstrap(400, shares, seed=3)
    assert list(own.draws.columns) == ["icc", "doubled[0]", "doubled[1]"]
    np.testing.assert_allclose(own.draws["doubled[1]"], 2 * boot.draws["beta[Days]"][:400])
    assert own.conf_int(method="bca").reason.eq("").all()
    with pytest.raises(ValueError, match="standard error"):
        own.conf_int(method="studentized")
    with pytest.raises(ValueError, match="number"):
        sleep.bootstrap(10, lambda beta, components: "no")
    with pytest.raises(DataError, match="index 2 is out of bounds"):
        sleep.bootstrap(10, lambda beta, components: beta[2])
    with pytest.raises(DataError, match=r"components has no 'subject'; .* 'Subject', 'Residual'"):
        sleep.bootstrap(10, lambda beta, components: components["subject"])


def test_boundary():
    fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", datasets.load("dyestuff2"))
    assert fit.is_singular
    boot = fit.bootstrap(1000)
    assert 0.3 < boot.share_singular < 0.8
    assert boot.std_error["sd[Batch, (Intercept)]"] > 0
    assert np.isnan(boot.std_error["log_variance[Batch, (Intercept)]"])
    percentile = boot.conf_int()
    assert percentile.loc["sd[Batch, (Intercept)]", "lower"] == 0
    assert percentile.loc["log_variance[Batch, (Intercept)]", "lower"] == -np.inf
    basic = boot.conf_int(method="basic")
    assert "boundary" in basic.loc["log_variance[Batch, (Intercept)]", "reason"]
    assert basic.loc["beta[(Intercept)]", "reason"] == ""
    studentized = boot.conf_int(method="studentized")
    assert "standard error" in studentized.loc["sd[Batch, (Intercept)]", "reason"]


def test_bootstrap_refuses(sleep, boot):
    with pytest.raises(ValueError, match="at least 39"):
        replace(boot, draws=boot.draws[:20]).conf_int()
    with pytest.raises(ValueError, match="percentile, basic"):
        boot.conf_int(method="normal")
    with pytest.raises(ValueError, match="level"):
        boot.conf_int(95)
    with pytest.raises(DataError, match="no optimum"):
        replace(sleep, status=Status.MAX_ITERATIONS).bootstrap()


# Likelihood-ratio tests


def test_null_distribution_agrees_with_pbmodcomp():
    data = datasets.load("orthodont")
    smaller = jaxreml.fit("distance ~ age + Sex + (1 | Subject)", data, "ML")
    larger = jaxreml.fit("distance ~ age * Sex + (1 | Subject)", data, "ML")
    null = bootstrap_lrt(larger, smaller, 4000, seed=1)
    reference = R["orthodont"]
    assert null.statistic == pytest.approx(reference["statistic"], abs=1e-4)
    assert null.p_value == pytest.approx(reference["p"], abs=4 * math.sqrt(2) * null.p_value_se)
    assert null.p_value > reference["chi2"]
    assert null.n_failed == 0 and null.draws.size == 4000
    assert null.draws.min() >= 0
    assert np.mean(null.draws) == pytest.approx(1, abs=0.2)


def test_null_distribution_of_a_variance(sleep, one_way):
    """REML fits with equal fixed effects; a slope's variance is zero in about half the draws."""
    data, larger = datasets.load("sleepstudy"), sleep
    smaller = jaxreml.fit("Reaction ~ Days + (1 | Subject)", data)
    null = null_distribution(smaller, larger, 1000)
    assert null.draws.min() >= 0
    assert null.share_singular[0] < 0.01 and 0.5 < null.share_singular[1] < 0.8
    # 1/2 chi2(1) + 1/2 chi2(2) to first order (Stram and Lee 1994), a little less in small samples
    assert np.mean(null.draws) == pytest.approx(1.3, abs=0.4)
    assert null.p_value == 1 / 1001
    with pytest.raises(ValueError, match="not nested"):
        null_distribution(larger, smaller, 10)
    with pytest.raises(ValueError, match="REML and one by ML"):
        null_distribution(smaller, jaxreml.fit(SLEEP, data, "ML"), 10)
    with pytest.raises(ValueError, match="different fixed effects"):
        null_distribution(jaxreml.fit("Reaction ~ 1 + (1 | Subject)", data), smaller, 10)
    with pytest.raises(DataError, match="different data"):
        null_distribution(smaller, one_way, 10)


# Power


@pytest.fixture(scope="module")
def trial():
    table = pd.DataFrame({"g": np.repeat(np.arange(8), 6), "arm": np.repeat(["a", "b"], 24)})
    beta = {"(Intercept)": 1.0, "arm[T.b]": 0.5}
    return population("y ~ arm + (1 | g)", table, beta, {"g": 2.25}, 1.0)


def test_power_is_that_of_the_noncentral_t(trial):
    """Group means of a balanced trial of two arms: an exact t test with J - 2 df."""
    effects = {"arm[T.b]": [0.0, 1.0, 2.0, 3.0]}
    curve = jaxreml.power(trial, effects, [14], along="g", nsim=4000, conf_level=0.9999)
    assert list(curve["nobs"]) == [84] * 4
    for row in curve.itertuples():
        se = math.sqrt(4 * (2.25 + 1 / 6) / row.n)
        limit = stats.t.ppf(0.975, row.n - 2)
        exact = stats.nct.sf(limit, row.n - 2, row.size / se)
        exact += stats.nct.cdf(-limit, row.n - 2, row.size / se)
        assert row.lower < exact < row.upper
        assert row.n_failed == 0 and row.share_singular < 0.01


def test_an_effect_shifts_its_estimate_only(trial):
    """Why all sizes of an effect share their draws."""
    moved = replace(trial, beta=trial.beta + np.array([0, 2.0]))
    engine = BatchFitter(trial.frame)
    first, second = (engine.fit(next(people.blocks(50, 1))) for people in (trial, moved))
    np.testing.assert_allclose(second.beta, first.beta + np.array([0, 2.0]), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(second.se, first.se, rtol=1e-8)
    curve = jaxreml.power(trial, ["arm[T.b]"], nsim=200, seed=1)
    direct = jaxreml.power(moved, {"arm[T.b]": 0.5}, nsim=200, seed=1)
    assert curve["size"][0] == 0.5 and np.isnan(curve["n"][0])
    assert curve["power"][0] == pytest.approx(direct["power"][0], abs=0.01)


def test_extending_along_a_factor(trial):
    fewer = extend(trial, 4, along="g")
    assert [int(x) for x in fewer.frame.X[::6, 1]] == [0, 1, 0, 1]  # arms stay balanced
    more = extend(trial, 19, along="g")
    term = more.frame.terms[0]
    assert len(term.levels) == 19 and np.bincount(term.codes).tolist() == [6] * 19
    assert more.frame.X[:, 1].mean() == pytest.approx(0.5, abs=0.03)
    assert "0.2" in term.levels
    assert more.simulate(2).shape == (114, 2)


def test_extending_nested_and_crossed_factors():
    pastes = of_fit(jaxreml.fit("strength ~ 1 + (1 | batch/cask)", datasets.load("pastes")))
    casks, batches = extend(pastes, 15, along="batch").frame.terms
    assert (len(casks.levels), len(batches.levels)) == (45, 15)
    for cask in range(45):
        assert np.unique(batches.codes[casks.codes == cask]).size == 1
    people = of_fit(jaxreml.fit(MODELS["penicillin"][0], datasets.load("penicillin")))
    plates, samples = extend(people, 10, along="sample").frame.terms
    assert (len(plates.levels), len(samples.levels)) == (24, 10)


def test_extending_rows(sleep):
    people = of_fit(sleep)
    for n in (4, 25):
        frame = extend(people, n, within="Subject").frame
        assert np.bincount(frame.terms[0].codes).tolist() == [n] * 18
        np.testing.assert_array_equal(frame.X[:n, 1], np.arange(n) % 10)
    cells = extend(people, 3, within=["Subject", "Days"]).frame
    assert len(cells.X) == 540


def test_extending_a_numeric_column(sleep):
    people = of_fit(sleep)
    frame = extend(people, 14, along="Days").frame
    assert np.unique(frame.X[:, 1]).tolist() == list(range(14)) and len(frame.X) == 252
    np.testing.assert_array_equal(frame.terms[0].effects, frame.X)
    data = datasets.load("sleepstudy")
    scaled = jaxreml.fit("Reaction ~ scale(Days) + (1 | Subject)", data)
    with pytest.raises(DataError, match="scale, center"):
        jaxreml.power(scaled, "scale(Days)", 14, along="Days")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effects": "day"}, DataError, "no fixed effect 'day'"),
        ({"effects": {}}, ValueError, "no effects"),
        ({"effects": {"Days": [1, np.nan]}}, ValueError, "finite"),
        ({"n": 5}, ValueError, "along= or within="),
        ({"along": "Subject"}, ValueError, "need n"),
        ({"n": 5, "along": "Sub"}, DataError, "neither a grouping factor"),
        ({"n": 1, "along": "Subject"}, ValueError, "at least 2"),
        ({"n": 1, "within": "Subject"}, DataError, "Days cannot be estimated"),
        ({"alpha": 5}, ValueError, "alpha"),
        ({"nsim": 0}, ValueError, "nsim must"),
    ],
)
def test_power_names_what_is_wrong(sleep, arguments, error, message):
    with pytest.raises(error, match=message):
        jaxreml.power(sleep, **({"effects": "Days"} | arguments))
