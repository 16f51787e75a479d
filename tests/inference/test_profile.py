"""Profile likelihood: against lme4, against brute force, at boundaries, and its refusals."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.optimize
from fits import fitted
from scipy.stats import chi2, norm

import jaxreml
from jaxreml.errors import JaxremlError
from jaxreml.inference.likelihood import charts
from jaxreml.inference.likelihood.holding import pair, parameters
from jaxreml.model.objective import expand, neg2_loglik
from jaxreml.optimum import held as holding
from jaxreml.status import Status

# The reference is read off splines through points of a bobyqa search; ours are exact (see below).
LME4 = {"orthodont": 3e-3}  # of the profile of an SD that is flat there
PINNED = chi2.ppf(0.95, 1)


@functools.cache
def profiled(name: str, method: str = "ML", likelihood: str = "ML"):
    return fitted(name, method).profile(method=likelihood)


def r_name(name: str) -> str:
    """formulaic's name of a column as R names it."""
    return name.replace("[T.", "").replace("]", "")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dyestuff", "ML"),
        ("pastes", "ML"),
        ("penicillin", "ML"),
        ("sleep_corr", "ML"),
        ("sleep_int", "REML"),  # a REML fit has the intervals of the ML fit
        ("orthodont", "ML"),
    ],
)
def test_intervals_equal_lme4(name, method):
    interval = profiled(name, method).conf_int()
    expected = references.reference(name)["fits"][method]["profile_ci"]
    assert [r_name(label) for label in interval.index] == [row["parameter"] for row in expected]
    rel = LME4.get(name, 3e-4)
    for (label, own), row in zip(interval.iterrows(), expected, strict=True):
        if (name, label) == ("orthodont", "sigma"):  # lme4's profile breaks off
            continue
        assert own["lower"] == pytest.approx(row["lower"], rel=rel), label
        assert own["upper"] == pytest.approx(row["upper"], rel=rel), label


@functools.cache
def value_and_gradient(objective):
    """Compiled once for designs of a shape, whatever is held."""
    return jax.jit(jax.value_and_grad(objective))


def brute_force(fit, likelihood: str, label: str, value: float) -> float:
    """The criterion with one parameter held, minimised over the others by scipy."""
    objective = jaxreml.reml_objective if likelihood == "REML" else jaxreml.ml_objective
    names = fit.design.parameter_names
    if label.startswith("cor"):
        place = next(k for k, name in enumerate(names) if name.startswith("z["))
        held = np.arctanh(value)
    else:
        own = next(parameter for parameter in parameters(fit) if parameter.name == label)
        group, term = own.group, own.term
        entry = "Residual" if group == "Residual" else f"{group}, {term}"
        place, held = names.index(f"log_variance[{entry}]"), 2 * np.log(value)
    both = value_and_gradient(objective)
    others = np.delete(np.arange(len(names)), place)

    def function(free):
        params = np.insert(free, place, held)
        criterion, gradient = both(params, fit.design)
        return float(criterion), np.asarray(gradient)[others]

    start = np.where(np.isfinite(fit.parameters), fit.parameters, 0.0)[others]
    best = scipy.optimize.minimize(function, start, jac=True, options={"gtol": 1e-8})
    return best.fun


@pytest.mark.parametrize(("name", "likelihood"), [("sleep_corr", "REML"), ("orthodont", "ML")])
def test_limits_are_where_brute_force_has_the_quantile(name, likelihood):
    fit = fitted(name, likelihood)
    interval = profiled(name, likelihood, likelihood).conf_int()
    checked = 0
    for label, row in interval[interval["group"].notna()].iterrows():
        for limit in (row["lower"], row["upper"]):
            if limit not in (-1.0, 0.0, 1.0):
                rise = brute_force(fit, likelihood, label, limit) - fit.criterion
                assert rise == pytest.approx(PINNED, abs=1e-7), (label, limit)
                checked += 1
    assert checked >= 4


def test_fixed_effect_is_the_fit_with_that_column_as_offset():
    """ML limits of a coefficient, by `fit` without its column."""
    fit = fitted("sleep_corr", "ML")
    table = references.data("sleep_corr")
    for limit in profiled("sleep_corr").conf_int().loc["Days", ["lower", "upper"]]:
        held = jaxreml.fit(
            "Reaction ~ 1 + (Days | Subject)", table, "ML", offset=limit * table["Days"]
        )
        assert held.criterion - fit.criterion == pytest.approx(PINNED, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [("sleep_corr", "ML"), ("sleep_corr", "REML"), ("pastes", "ML")],
)
def test_frame_is_a_profile(name, likelihood):
    profile = profiled(name, "ML", likelihood)
    frame = profile.frame
    quantile = norm.ppf(0.995)
    for label, part in frame.groupby("parameter", sort=False):
        value, zeta = part["value"].to_numpy(), part["zeta"].to_numpy()
        assert (np.diff(value) > 0).all()
        assert (np.diff(zeta) > -1e-6).all(), label
        assert np.abs(zeta).max() == pytest.approx(quantile, abs=1e-4) or label.startswith("cor")
        np.testing.assert_allclose(part[label].dropna(), value[part[label].notna()], rtol=1e-9)
        rise = part["criterion"] - part["criterion"].min()
        np.testing.assert_allclose(zeta**2, rise, atol=1e-8)
    assert list(frame.columns[4:]) == list(profile.parameters)


def test_interval_of_any_level_is_where_the_profile_has_it():
    profile = profiled("sleep_corr")
    narrow, wide = profile.conf_int(0.5), profile.conf_int(0.999)
    assert (wide["lower"] < narrow["lower"]).all() and (narrow["upper"] < wide["upper"]).all()
    again = fitted("sleep_corr", "ML").profile("sigma", conf_level=0.999).conf_int(0.5)
    np.testing.assert_allclose(again[["lower", "upper"]], narrow.loc[["sigma"], ["lower", "upper"]])


def test_boundaries():
    interval = profiled("zero_slope").conf_int()
    assert tuple(interval.loc["cor_x.(Intercept)|g", ["lower", "upper"]]) == (-1, 1)
    assert np.isnan(interval.loc["cor_x.(Intercept)|g", "estimate"])
    slope = interval.loc["sd_x|g"]
    assert slope["estimate"] == slope["lower"] == 0 < slope["upper"]
    anything = profiled("orthodont").conf_int().loc["cor_age.(Intercept)|Subject"]
    assert (anything["lower"], anything["upper"]) == (-1, 1)
    single = jaxreml.fit("Yield ~ 1 + (1|Batch)", references.data("dyestuff2"), "ML")
    interval = single.profile().conf_int()
    assert interval.loc["sd_(Intercept)|Batch", "lower"] == 0
    upper = interval.loc["sd_(Intercept)|Batch", "upper"]
    rise = brute_force(single, "ML", "sd_(Intercept)|Batch", upper) - single.criterion
    assert rise == pytest.approx(PINNED, abs=1e-7)


def test_structures_agree():
    expected = profiled("dyestuff").conf_int()[["lower", "upper"]]
    own = fitted("dyestuff", "ML", structure="dense").profile().conf_int()[["lower", "upper"]]
    np.testing.assert_allclose(own, expected, rtol=1e-8)


def test_intervals_follow_the_units():
    """With weights and an offset; the response in other units, and the slope."""
    table = references.data("sleep_corr")
    rng = np.random.default_rng(0)
    table = table.assign(w=rng.uniform(0.5, 2, len(table)), o=rng.normal(size=len(table)))
    scaled = table.assign(
        Reaction=1000 * table["Reaction"], o=1000 * table["o"], Days=table["Days"] / 100
    )
    formula = "Reaction ~ Days + offset(o) + (Days | Subject)"
    own, other = (
        jaxreml.fit(formula, data, "ML", weights="w").profile().conf_int()[["lower", "upper"]]
        for data in (table, scaled)
    )
    units = {"Days": 1e5, "sd_Days|Subject": 1e5, "cor_Days.(Intercept)|Subject": 1.0}
    factors = np.array([units.get(label, 1e3) for label in own.index])
    np.testing.assert_allclose(other, own.to_numpy() * factors[:, None], rtol=1e-6)


def test_no_fixed_effects_and_a_wald_default():
    table = references.data("dyestuff")
    table["Yield"] -= table["Yield"].mean()
    fit = jaxreml.fit("Yield ~ 0 + (1 | Batch)", table, "ML")
    interval = fit.conf_int(method="profile")
    assert list(interval.index) == ["sd_(Intercept)|Batch", "sigma"]
    assert (interval["lower"] < interval["estimate"]).all()
    assert list(fitted("sleep_corr", "ML").conf_int().index) == ["(Intercept)", "Days"]


def test_the_lowest_of_several_optima_is_profiled():
    """Without its fixed effects this model has two optima where a correlation is held near 1. Which
    is met first depends on the order of the levels; the intervals do not."""
    table = references.data("machines_s")
    names = ["A", "B", "C"]
    turned = table.assign(
        Machine=table["Machine"].cat.rename_categories(dict(zip("ABC", "CAB", strict=True)))
    )
    turned["Machine"] = turned["Machine"].cat.reorder_categories(names)
    formula = "score ~ 1 + (0 + Machine | Worker)"
    own, other = (
        jaxreml.fit(formula, data, "ML").profile("theta_").conf_int()[["lower", "upper"]]
        for data in (table, turned)
    )
    assert len(own) == 7
    pairs = {"sd_A": "sd_C", "sd_B": "sd_A", "cor_B.A": "cor_C.A", "cor_C.A": "cor_C.B"}
    own.index = other.index = [
        label.replace("Machine[", "").replace("]", "").replace("|Worker", "") for label in own.index
    ]
    np.testing.assert_allclose(other.loc[list(pairs.values())], own.loc[list(pairs)], rtol=1e-7)


def test_correlations_held_keep_their_signs():
    """No search goes on at the correlation's mirror image, where an SD is negative."""
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(15), 6)
    x, z = rng.normal(size=(2, 90))
    b = rng.normal(size=(15, 3)) @ np.array([[1.0, 0.3, -0.3], [0.0, 0.8, 0.1], [0.0, 0.0, 0.5]])
    y = b[g, 0] + b[g, 1] * x + b[g, 2] * z + rng.normal(size=90)
    fit = jaxreml.fit("y ~ x + z + (x + z | g)", {"y": y, "x": x, "z": z, "g": g}, "ML")
    frame = fit.profile("theta_").frame
    labels = [label for label in frame.columns if label.startswith("cor_")]
    assert len(labels) == 3
    for label in labels:
        part = frame[frame["parameter"] == label].dropna(subset=label)
        assert len(part) > 8
        np.testing.assert_allclose(part[label], part["value"], atol=1e-9)
        assert (np.diff(part["zeta"]) > -1e-6).all()


def test_derivatives_in_coordinates_equal_autodiff():
    fit = fitted("sleep_corr", "ML")
    own = parameters(fit)
    held = next(parameter for parameter in own if parameter.kind == "cor")
    x = held.x(charts.estimates(fit), fit.beta) + 0.1
    covariance = fit.design.covariance

    def value(x):
        omega, log_sigma2 = holding._omega(x, held.axes, covariance)
        return neg2_loglik(omega, log_sigma2, fit.design, reml=False)

    program = jax.jit(holding.expansion, static_argnames="reml")
    point = program(jnp.asarray(x), held.axes, fit.design, reml=False)
    gradient = jax.jit(jax.grad(value))(x[:-1])
    np.testing.assert_allclose(point.gradient[:-1], gradient * held.axes.free[:-1], rtol=1e-9)
    hessian = jax.jit(jax.hessian(value))(x[:-1])
    np.testing.assert_allclose(point.full[:-1, :-1], hessian, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("reml", [True, False])
def test_expansion_at_a_given_variance_equals_autodiff(reml):
    design = fitted("dyestuff", "ML").design
    at = jnp.array([0.7, 7.9])

    def value(at):
        return neg2_loglik(at[:-1], at[-1], design, reml=reml)

    program = jax.jit(expand, static_argnames="reml")
    found = program(at[:-1], design, reml=reml, log_sigma2=at[-1])
    assert float(found.value) == pytest.approx(float(value(at)), rel=1e-13)
    np.testing.assert_allclose(found.joint_gradient, jax.jit(jax.grad(value))(at), rtol=1e-9)
    hessian = jax.jit(jax.hessian(value))(at)
    np.testing.assert_allclose(found.joint_hessian, hessian, rtol=1e-8, atol=1e-8)
    found = program(at[:-1], design, reml=reml)
    np.testing.assert_allclose(found.joint_gradient[:-1], found.gradient)
    assert float(found.joint_gradient[-1]) == 0


def test_refusals():
    fit = fitted("sleep_corr", "ML")
    with pytest.raises(ValueError, match=r"'sd_x' is not a parameter.*sd_Days\|Subject"):
        fit.profile("sd_x")
    with pytest.raises(ValueError, match="level must be between"):
        fit.profile(conf_level=95)
    with pytest.raises(ValueError, match='"REML" or "ML"'):
        fit.profile(method="profile")
    with pytest.raises(ValueError, match='"wald" or "profile"'):
        fit.conf_int(method="bootstrap")
    with pytest.raises(JaxremlError, match=r"cannot profile the likelihood: .*the iteration limit"):
        replace(fit, status=int(Status.MAX_ITERATIONS)).profile()
    higher = replace(fit, criterion=fit.criterion + 0.1)
    with pytest.raises(JaxremlError, match="not the optimum of the likelihood: the criterion is"):
        higher.profile()


def test_an_optimum_that_is_not_certified_gives_nan_and_the_reason(monkeypatch):
    profile = fitted("dyestuff", "ML").profile("sigma")
    searched = holding.optima

    def uncertified(*args, **options):
        found = searched(*args, **options)
        return found._replace(certified=np.zeros_like(found.certified))

    monkeypatch.setattr("jaxreml.inference.likelihood.search.optima", uncertified)
    with pytest.warns(jaxreml.ConvergenceWarning, match="no optimum was found with sigma held"):
        interval = profile.conf_int()
    assert interval[["lower", "upper"]].isna().all(axis=None)


def test_a_poor_neighbour_is_mended(monkeypatch):
    """An optimum that is only local shows as a fall of zeta, and is sought from its neighbours."""
    profile = fitted("dyestuff", "ML").profile("sigma")
    expected = profile.conf_int()
    track = next(iter(profile._searches[0].tracks.values()))
    points = track.sorted
    worse = points[-2]._replace(zeta=points[-1].zeta + 1, criterion=points[-1].criterion + 5)
    track.points[worse.at] = worse
    assert track.kinks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = profile.conf_int(0.9)
    assert not track.kinks
    assert (again["upper"] < expected["upper"]).all()


def both_held(fit, labels: list[str], values: list[float]) -> float:
    """The ML criterion with two SDs or correlations held, minimised by scipy."""
    names = fit.design.parameter_names
    held = {}
    for label, value in zip(labels, values, strict=True):
        if label.startswith("cor"):
            held[next(k for k, name in enumerate(names) if name.startswith("z["))] = np.arctanh(
                value
            )
        else:
            own = next(parameter for parameter in parameters(fit) if parameter.name == label)
            entry = "Residual" if label == "sigma" else f"{own.group}, {own.term}"
            held[names.index(f"log_variance[{entry}]")] = 2 * np.log(value)
    free = [k for k in range(len(names)) if k not in held]
    both = value_and_gradient(jaxreml.ml_objective)

    def function(x):
        params = np.array([held.get(k, 0.0) for k in range(len(names))])
        params[free] = x
        value, gradient = both(params, fit.design)
        return float(value), np.asarray(gradient)[free]

    start = fit.parameters[free]
    return scipy.optimize.minimize(function, start, jac=True, options={"gtol": 1e-8}).fun


@pytest.mark.parametrize(
    "labels",
    [
        ("sd_(Intercept)|Subject", "sd_Days|Subject"),
        ("cor_Days.(Intercept)|Subject", "sd_Days|Subject"),
        ("sd_(Intercept)|Subject", "cor_Days.(Intercept)|Subject"),
        ("sigma", "sd_(Intercept)|Subject"),
    ],
)
def test_contours_are_where_brute_force_has_the_quantile(labels):
    fit = fitted("sleep_corr", "ML")
    frame = profiled("sleep_corr").contour(*labels, conf_levels=(0.8,), points=8)
    for values in frame[list(labels)].to_numpy()[:-1:3]:
        rise = both_held(fit, list(labels), list(values)) - fit.criterion
        assert rise == pytest.approx(chi2.ppf(0.8, 2), abs=1e-6)
    assert frame.iloc[0].equals(frame.iloc[-1])


def test_contours_touch_the_profiles():
    """The farthest that a region reaches in one parameter is where its profile has its deviance."""
    profile = profiled("sleep_corr")
    level = chi2.cdf(chi2.ppf(0.8, 2), 1)  # of an interval with the region's deviance
    interval = profile.conf_int(level)
    for labels in (("(Intercept)", "sd_Days|Subject"), ("cor_Days.(Intercept)|Subject", "Days")):
        frame = profile.contour(*labels, conf_levels=(0.8,), points=200)
        for label in labels:
            low, high = interval.loc[label, ["lower", "upper"]]
            slack = 2e-3 * (high - low)
            assert low - 1e-6 < frame[label].min() < low + slack
            assert high - slack < frame[label].max() < high + 1e-6


def test_contours_end_at_bounds():
    """A region of two SDs that one of them leaves at zero has an edge there."""
    profile = profiled("pastes")
    labels = ["sd_(Intercept)|batch", "sigma"]
    edge = profile.contour(*labels, conf_levels=(0.9,), points=32)
    on_bound = edge["sd_(Intercept)|batch"] == 0
    assert 2 < on_bound.sum() < 30
    np.testing.assert_allclose(edge.loc[~on_bound, "deviance"], chi2.ppf(0.9, 2), atol=1e-6)
    assert (edge.loc[on_bound, "deviance"] < chi2.ppf(0.9, 2)).all()
    without = jaxreml.fit("strength ~ 1 + (1 | batch:cask)", references.data("pastes"), "ML")
    assert edge["deviance"].min() >= without.criterion - fitted("pastes", "ML").criterion - 1e-8


def test_contour_refusals():
    profile = profiled("sleep_corr")
    with pytest.raises(ValueError, match="'sigma' is given twice"):
        profile.contour("sigma", "sigma")
    with pytest.raises(ValueError, match="there is no profile of 'tau'"):
        profile.contour("tau", "sigma")
    with pytest.raises(ValueError, match="conf_levels must be between 0 and 1, not 95"):
        profile.contour("sigma", "Days", (95,))
    with pytest.raises(ValueError, match="at least 4 points"):
        profile.contour("sigma", "Days", points=3)
    machines = fitted("machines_s", "ML")
    _, one, other, *_ = parameters(machines)
    assert one.kind == other.kind == "cor"
    with pytest.raises(jaxreml.DataError, match="cannot be held together: of one term's effects"):
        pair(machines, one, other)


def test_a_step_too_far_is_bracketed():
    """From a singular fit the first point may be so far out that Newton's step goes below zero."""
    y = np.random.default_rng(152).normal(size=40)
    g = np.repeat(np.arange(8), [2, 2, 3, 4, 5, 6, 8, 10])
    fit = jaxreml.fit("y ~ 1 + (1 | g)", {"y": y, "g": g}, "ML")
    assert fit.is_singular
    label = "sd_(Intercept)|g"
    lower, upper = fit.profile(label).conf_int().loc[label, ["lower", "upper"]]
    assert lower == 0
    rise = brute_force(fit, "ML", label, upper) - fit.criterion
    assert rise == pytest.approx(PINNED, abs=1e-7)


def test_a_variance_of_zero_is_a_local_optimum():
    """Beyond a correlation of the wrong sign; the search along the profile stayed there."""
    rng = np.random.default_rng(35)
    g, x = np.repeat(np.arange(12), 5), np.tile(np.arange(5) - 2.0, 12)
    b = rng.multivariate_normal([0, 0], [[0.3, 0], [0, 0.2]], size=12)
    y = 1 + 0.3 * x + b[g, 0] + b[g, 1] * x + rng.normal(size=60)
    fit = jaxreml.fit("y ~ x + (x | g)", {"y": y, "x": x, "g": g}, "ML")
    label = "cor_x.(Intercept)|g"
    lower, upper = fit.profile(label).conf_int().loc[label, ["lower", "upper"]]
    assert upper == 1
    rise = brute_force(fit, "ML", label, lower) - fit.criterion
    assert rise == pytest.approx(PINNED, abs=1e-7)


@pytest.mark.long
def test_profiles_of_singular_fits_have_ends():
    """Small data sets, most of them singular: every limit is found."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        g, x = np.repeat(np.arange(12), 5), np.tile(np.arange(5) - 2.0, 12)
        spread = [[0.3 * (seed % 2), 0], [0, [0.0, 0.02, 0.2][seed % 3]]]
        b = rng.multivariate_normal([0, 0], spread, size=12)
        y = 1 + 0.3 * x + b[g, 0] + b[g, 1] * x + rng.normal(size=60)
        table = {"y": y, "x": x, "g": g}
        for method in ("ML", "REML"):
            fit = jaxreml.fit("y ~ x + (x | g)", table, method)
            interval = fit.profile(method=method).conf_int()
            assert np.isfinite(interval[["lower", "upper"]]).all(axis=None), (seed, method)


@pytest.mark.long
def test_profiles_of_three_effects_against_brute_force():
    """-0.94981379 and 0.15687044 by L-BFGS from 25 starts with the correlation held."""
    known = {
        3: ("cor_z.x|g", "lower", -0.94981379),
        5: ("cor_z.(Intercept)|g", "upper", 0.15687044),
    }
    for seed, (label, side, expected) in known.items():
        rng = np.random.default_rng(seed)
        g = np.repeat(np.arange(12), 6)
        x, z = rng.normal(size=(2, 72))
        root = np.array([[0.8, 0, 0], [0.2, 0.4, 0], [-0.1, 0.1, 0.3 * (seed % 3 > 0)]])
        b = rng.normal(size=(12, 3)) @ root.T
        y = 1 + 0.3 * x + b[g, 0] + b[g, 1] * x + b[g, 2] * z + rng.normal(size=72)
        fit = jaxreml.fit("y ~ x + z + (x + z | g)", {"y": y, "x": x, "z": z, "g": g}, "ML")
        found = fit.profile("theta_").conf_int().loc[label, side]
        assert found == pytest.approx(expected, abs=1e-7)
