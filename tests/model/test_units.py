"""Units of the effects: predictors far from their origin, in every entry point."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import Design, estimate, reml_objective, stack
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.units import Units, orthonormal

ORIGINS = [(2000.0, 1.0), (2459000.0, 1.0), (1.6e9, 86400.0)]  # years, Julian days, Unix seconds


def data() -> pd.DataFrame:
    rng = np.random.default_rng(14)
    g, t = np.repeat(np.arange(30), 10), np.tile(np.arange(10.0), 30)
    b = rng.multivariate_normal([0, 0], [[1, 0.2], [0.2, 0.3]], 30)
    y = 5 + 0.7 * t + b[g, 0] + b[g, 1] * t + rng.normal(size=300)
    return pd.DataFrame({"y": y, "t": t, "g": g, "twice": 2 * y + rng.normal(size=300)})


@cache
def fit(origin: float, unit: float) -> jaxreml.LMMResults:
    frame = data()
    return jaxreml.fit("y ~ t + (t | g)", frame.assign(t=origin + unit * frame["t"]))


def moved(fitted: jaxreml.LMMResults, origin: float, unit: float):
    """Parameters of a fit in t for t* = origin + unit t, and their covariance, with NumPy; in more
    digits than double precision where there are some, as differences of far origins lose many."""
    shift = np.array([[1.0, -origin / unit], [0.0, 1 / unit]], np.longdouble)

    def change(params):
        sd = np.exp(params[:2] / 2)
        slope = sd[1] * np.array([np.tanh(params[2]), 1 / np.cosh(params[2])])
        root = shift @ np.array([[sd[0], 0.0], slope])
        sine = np.abs(root[0, 0] * root[1, 1] - root[0, 1] * root[1, 0])
        own = np.log(np.sum(root**2, axis=1))
        return np.array([*own, np.arcsinh(root[0] @ root[1] / sine), params[3]])

    at = np.asarray(fitted.parameters, np.longdouble)
    step = np.longdouble(1e-3)
    jacobian = np.array(
        [
            (8 * (change(at + h) - change(at - h)) - change(at + 2 * h) + change(at - 2 * h))
            / (12 * step)
            for h in step * np.eye(4)
        ]
    ).T
    return change(at), jacobian @ fitted.parameters_vcov_array @ jacobian.T


@pytest.mark.parametrize(("origin", "unit"), ORIGINS)
def test_far_origin(origin, unit):
    """As the centred fit, transformed."""
    near, far = fit(0.0, 1.0), fit(origin, unit)
    assert far.converged and not far.is_singular
    assert far.criterion == pytest.approx(near.criterion + 2 * np.log(unit), abs=1e-8)
    params, vcov = moved(near, origin, unit)
    np.testing.assert_allclose(far.parameters, params, atol=1e-8)
    errors = np.sqrt(np.diagonal(far.parameters_vcov_array))
    np.testing.assert_allclose(errors, np.sqrt(np.diagonal(vcov)), rtol=1e-7)
    np.testing.assert_allclose(far.fitted, near.fitted, atol=1e-7)
    assert far.beta[1] * unit == pytest.approx(near.beta[1], rel=1e-8)
    assert far.bse.iloc[1] * unit == pytest.approx(near.bse.iloc[1], rel=1e-8)
    new = data()[:3]
    there = new.assign(t=origin + unit * new["t"])
    expected = near.predict(new, interval="prediction")
    np.testing.assert_allclose(far.predict(there, interval="prediction"), expected, atol=1e-7)
    slopes = far.random_effects["g"]["t"] * unit
    np.testing.assert_allclose(slopes, near.random_effects["g"]["t"], atol=1e-7)


def test_far_origin_of_many_responses():
    origin, unit = 2459000.0, 1.0
    frame = data()
    fits = [
        jaxreml.fit_many("~ t + (t | g)", own, frame[["y", "twice"]])
        for own in (frame, frame.assign(t=origin + unit * frame["t"]))
    ]
    near, far = (many.fits for many in fits)
    assert (far.status == 0).all() and not far.is_singular.any()
    np.testing.assert_allclose(far.criterion, near.criterion, atol=1e-8)
    alone = fit(origin, unit)
    np.testing.assert_allclose(far.parameters[0], alone.parameters, atol=1e-7)
    np.testing.assert_allclose(
        far.parameters_se[0], np.sqrt(np.diagonal(alone.parameters_vcov_array)), rtol=1e-6
    )


def test_profile_far_from_the_origin():
    table = fit(2000.0, 1.0).profile(["sd_t|g"]).conf_int()
    expected = fit(0.0, 1.0).profile(["sd_t|g"]).conf_int()
    np.testing.assert_allclose(table[["lower", "upper"]], expected[["lower", "upper"]], rtol=1e-5)


def arrays(origin: float):
    frame = data()
    X = np.column_stack([np.ones(300), origin + frame["t"]])
    return Design.from_arrays(frame["y"].to_numpy(), X, [(frame["g"].to_numpy(), X)])


def test_objective_and_derivatives_far_from_the_origin():
    """The objective in the user's parameters is least at the estimate and curved as it says."""
    design = arrays(2000.0)
    found = estimate(design)
    value, slope = jax.value_and_grad(reml_objective)(found.parameters, design)
    assert float(value) == pytest.approx(float(found.criterion), abs=1e-8)
    steps = np.asarray(jnp.sqrt(jnp.diagonal(found.parameters_vcov)))
    assert np.abs(slope * steps).max() < 1e-5


def test_stack_of_near_and_far_origins():
    designs = [arrays(0.0), arrays(2000.0)]
    assert [design.units.rotated for design in designs] == [(False,), (True,)]
    together = jax.vmap(estimate)(stack(designs))
    for k, design in enumerate(designs):
        alone = estimate(design)
        np.testing.assert_allclose(together.parameters[k], alone.parameters, atol=1e-8)
        error = np.diagonal(together.parameters_vcov[k]) / np.diagonal(alone.parameters_vcov) - 1
        assert np.abs(error).max() < 1e-6


def test_rank_is_kept():
    """Factors of less than full rank have their exact zeros in the user's units too."""
    far = 1e6 + np.arange(10.0)
    units = Units.of([np.column_stack([np.ones(10), far])], 10, unstructured((2,)))
    assert units.rotated == (True,)
    for inner in ([[1.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.7]], [[1.0, 0.0], [0.0, 0.0]]):
        factor = units.factor(0, jnp.array(inner))
        assert factor[1, 1] == 0 and factor[0, 0] > 0
        back = units.inner_factor(0, factor)
        np.testing.assert_allclose(back @ back.T, np.array(inner) @ np.transpose(inner), atol=1e-9)


def test_ordinary_columns_keep_their_scales():
    rng = np.random.default_rng(0)
    columns = np.column_stack([np.ones(20), rng.normal(5, 2, 20)])
    units = Units.of([columns], 20, unstructured((2,)))
    assert units.rotated == (False,)
    scale = np.sqrt(np.mean(columns**2, axis=0))
    np.testing.assert_array_equal(units.rows(0, columns), columns / scale)


def test_orthonormal_columns_of_a_far_origin():
    far = np.column_stack([np.ones(50), 1e6 + np.arange(50.0)])
    near = np.column_stack([np.ones(50), np.arange(50.0)])
    basis, triangle = orthonormal(far)
    np.testing.assert_allclose(basis @ triangle, far, rtol=1e-12)
    np.testing.assert_allclose(np.abs(basis), np.abs(np.linalg.qr(near)[0]), atol=1e-13)
