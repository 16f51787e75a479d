"""Families of correlation matrices and the residuals' covariance: by finite differences and JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml.model.covariance import correlations, distances, jets
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.factor_analytic import FactorAnalytic
from jaxreml.model.covariance.natural import places
from jaxreml.model.covariance.residual import Residual
from jaxreml.model.covariance.structured import Structured

TIMES = (0.0, 1.0, 2.5, 3.0, 7.0)
FAMILIES = {
    "independent": correlations.Independent(5),
    "exchangeable": correlations.Exchangeable(5),
    "autoregressive": correlations.Autoregressive(5),
    "antedependent": correlations.Antedependent(5),
    "toeplitz": correlations.Toeplitz(5),
    "exponential": distances.Distance(5, TIMES),
    "matern3": distances.Distance(5, TIMES, "matern3"),
    "matern5": distances.Distance(5, tuple((t, t**0.5) for t in TIMES), "matern5"),
    "gaussian": distances.Distance(5, TIMES, "gaussian"),
    "unrestricted": correlations.Unrestricted(5),
}
COPIES = {
    "autoregressive copies": correlations.Copies(4, correlations.Autoregressive(2)),
    "unrestricted copies": correlations.Copies(6, correlations.Unrestricted(3)),
}
BLOCKS = [
    pytest.param(Residual(5, family, variances), id=f"{name}-{max(variances)}")
    for name, family in FAMILIES.items()
    for variances in ((0,) * 5, (0, 1, 2, 3, 4), (0, 0, 1, 1, 1))
]


def coordinates(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.4, size=count) + 0.3


def slopes(function, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    ways = step * np.eye(len(at))
    return np.stack([(function(at + h) - function(at - h)) / (2 * step) for h in ways], axis=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_members_are_correlation_matrices(name):
    family = FAMILIES[name]
    for seed in range(20):
        z = coordinates(family.count, seed)
        matrix = family.entries(z)[places(5)]
        np.testing.assert_allclose(np.diagonal(matrix), 1, rtol=1e-14)
        assert np.linalg.eigvalsh(matrix).min() > 0
        np.testing.assert_allclose(family.coordinates(matrix), z, rtol=1e-9, atol=1e-10)
    assert len(family.names(tuple("abcde"))) == family.count


@pytest.mark.parametrize("name", FAMILIES)
def test_starts_have_about_the_common_correlation(name):
    family = FAMILIES[name]
    matrix = family.entries(family.start(np.array(0.4)))[places(5)]
    assert np.linalg.eigvalsh(matrix).min() > 0
    if name in ("exchangeable", "toeplitz", "unrestricted"):
        np.testing.assert_allclose(matrix[np.tril_indices(5, -1)], 0.4, rtol=1e-12)
    for common in (-1.0, 1.0):
        assert np.isfinite(family.start(np.array(common))).all()


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_side_by_side(name):
    family = COPIES[name]
    q, count = family.each.size, family.each.count
    z = coordinates(family.count)
    matrix = family.entries(z)[places(2 * q)]
    for k in range(2):
        own = slice(k * q, (k + 1) * q)
        alone = family.each.entries(z[k * count : (k + 1) * count])[places(q)]
        np.testing.assert_allclose(matrix[own, own], alone, rtol=1e-14)
    assert not matrix[:q, q:].any()
    first, second = family.derivatives(z)
    np.testing.assert_allclose(first, slopes(family.entries, z), atol=1e-9)
    bend = slopes(lambda at: family.derivatives(at)[0].ravel(), z).reshape(second.shape)
    np.testing.assert_allclose(second, bend, atol=1e-8)
    np.testing.assert_allclose(family.coordinates(matrix), z, rtol=1e-9)
    labels = [f"{arm}: {visit}" for arm in "ab" for visit in range(q)]
    assert family.names(labels)[count].startswith("b: ")


def test_definitions_by_hand():
    z = coordinates(4)
    rho = np.tanh(z)
    matrix = FAMILIES["antedependent"].entries(z)[places(5)]
    assert matrix[3, 0] == pytest.approx(rho[0] * rho[1] * rho[2], rel=1e-14)
    lags = FAMILIES["autoregressive"].entries(z[:1])[places(5)]
    assert lags[4, 1] == pytest.approx(rho[0] ** 3, rel=1e-14)
    near = FAMILIES["gaussian"].entries(z[:1])[places(5)]
    assert near[4, 1] == pytest.approx(np.exp(-((6.0 / np.exp(z[0])) ** 2)), rel=1e-13)
    toeplitz = FAMILIES["toeplitz"].entries(z)[places(5)]
    for lag in range(1, 5):  # partial autocorrelations, by regression
        inner = toeplitz[:lag, :lag][1:, 1:]
        ends = toeplitz[1:lag, [0, lag]]
        whole = toeplitz[np.ix_([0, lag], [0, lag])]
        left = whole - ends.T @ np.linalg.solve(inner, ends) if lag > 1 else whole
        assert left[0, 1] / np.sqrt(left[0, 0] * left[1, 1]) == pytest.approx(rho[lag - 1])


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_are_slopes(name):
    family = FAMILIES[name]
    z = coordinates(family.count)
    first, second = family.derivatives(z)
    if not family.count:
        assert first.shape == (15, 0) and second.shape == (15, 0, 0)
        return
    np.testing.assert_allclose(first, slopes(family.entries, z), rtol=0, atol=1e-9)
    bend = slopes(lambda at: family.derivatives(at)[0].ravel(), z).reshape(second.shape)
    np.testing.assert_allclose(second, bend, rtol=0, atol=1e-8)


def test_derivatives_have_lanes():
    family = FAMILIES["toeplitz"]
    z = np.stack([coordinates(4, seed) for seed in range(3)], axis=1)
    first, second = family.derivatives(z)
    for lane in range(3):
        alone = family.derivatives(z[:, lane])
        np.testing.assert_allclose(first[..., lane], alone[0], rtol=1e-14)
        np.testing.assert_allclose(second[..., lane], alone[1], rtol=1e-14)


def test_jets_are_second_order_derivatives():
    at = np.array([0.4, 1.3])

    def function(x, y):
        return jets.exp(x * y) / (1.0 + x) - jets.tanh(y - 2.0 * x) * (y**3.0) + 1.0 / y

    found = function(*jets.variables(at))
    with jax.enable_x64(True):
        value = function(*jnp.asarray(at))
        gradient = jax.grad(lambda v: function(*v))(jnp.asarray(at))
        hessian = jax.hessian(lambda v: function(*v))(jnp.asarray(at))
    np.testing.assert_allclose(found.value, value, rtol=1e-14)
    np.testing.assert_allclose(found.first, gradient, rtol=1e-13)
    np.testing.assert_allclose(found.second, hessian, rtol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_residual_blocks(block):
    chart = coordinates(block.length)
    if not block.length:
        return
    weights = np.random.default_rng(1).normal(size=15)
    np.testing.assert_allclose(block.jacobian(chart), slopes(block.omega, chart), rtol=0, atol=1e-8)
    curved = slopes(lambda at: weights @ block.jacobian(at), chart)
    np.testing.assert_allclose(block.curvature(chart, weights), curved, rtol=0, atol=1e-6)
    # The factor is of I + Omega, and the chart its inverse.
    factor = block.factor(chart)
    np.testing.assert_allclose(factor @ factor.T, block.omega(chart)[places(5)] + np.eye(5))
    np.testing.assert_allclose(block.chart(factor), chart, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(block.omega_of_factor(factor), block.omega(chart), atol=1e-13)
    # In the parameters and log sigma2 together
    log_sigma2 = np.array(0.7)
    parameters = block.report(chart, log_sigma2).shown
    first, second = block.in_scale(parameters, log_sigma2, weights)
    joint = np.append(parameters, log_sigma2)
    expected = slopes(lambda at: block.natural(at[:-1], at[-1]), joint)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-8)
    bend = slopes(lambda at: weights @ block.in_scale(at[:-1], at[-1], weights)[0], joint)
    np.testing.assert_allclose(second, bend, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "block",
    [
        Residual(3, correlations.Toeplitz(3), (0, 1, 2)),
        Residual(3, correlations.Unrestricted(3), (0, 1, 2)),
    ],
)
def test_jax_has_the_same_numbers(block):
    chart, weights = coordinates(block.length), np.arange(6.0)
    with jax.enable_x64(True):
        there = jnp.asarray(chart)
        np.testing.assert_allclose(block.omega(there), block.omega(chart), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(block.jacobian(there), block.jacobian(chart), atol=1e-12)
        np.testing.assert_allclose(
            block.curvature(there, jnp.asarray(weights)),
            block.curvature(chart, weights),
            atol=1e-11,
        )


@pytest.mark.parametrize(
    "block",
    [
        Residual(5, FAMILIES["toeplitz"], (0, 0, 1, 1, 1)),
        Residual(4, COPIES["autoregressive copies"], (0, 1, 2, 3)),
        Residual(5, FAMILIES["gaussian"], (0,) * 5),
        Structured(5, FAMILIES["toeplitz"]),
        Structured(5, FAMILIES["exponential"], each=False),
        FactorAnalytic(4, 2),
    ],
    ids=lambda block: f"{type(block).__name__} {type(getattr(block, 'correlation', 0)).__name__}",
)
def test_second_derivatives_in_what_is_stated(block):
    """Written out, by JAX, and by the default, which random effects have: V there is theirs."""
    rng = np.random.default_rng(0)
    count = len(block.parameter_names("", tuple(map(str, range(block.size)))))
    parameters, log_sigma2 = coordinates(count, 2), 0.7
    root = rng.normal(size=(len(parameters) + 1,) * 2)
    spread = root @ root.T
    found = block.bend(parameters, np.array(log_sigma2), spread)
    alone = spread.copy()
    alone[-1] = alone[:, -1] = 0
    with jax.enable_x64(True):
        at = jnp.asarray(parameters), jnp.asarray(log_sigma2)
        if block.residual:  # of others it is the default
            np.testing.assert_allclose(block.bend(*at, jnp.asarray(spread)), found, rtol=1e-9)
        own = Block.bend(block, *at, jnp.asarray(alone))
    expected = block.bend(parameters, np.array(log_sigma2), alone)
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)
    lanes = block.bend(*(np.stack([own] * 2, -1) for own in (parameters, log_sigma2, spread)))
    np.testing.assert_allclose(lanes[:, 1], found, rtol=1e-12)
