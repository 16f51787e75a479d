"""Coordinate maps are inverse to each other and have the derivatives they claim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreml.model.covariance import unstructured

SIZES = [(1,), (2,), (3,), (1, 2), (4,)]


def random_theta(seed: int, sizes: tuple[int, ...]) -> np.ndarray:
    theta = np.random.default_rng(seed).normal(size=unstructured.count_theta(sizes))
    diagonal = np.concatenate(
        [rows == columns for rows, columns in map(unstructured.triangle, sizes)]
    )
    return np.where(diagonal, np.abs(theta) + 0.1, theta)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SIZES))
def test_round_trip(seed, sizes):
    theta = jnp.asarray(random_theta(seed, sizes))
    factors = unstructured.split_triangles(theta, sizes)
    np.testing.assert_array_equal(unstructured.join_triangles(factors), theta)
    params = unstructured.parameters_from_factors(
        factors, jnp.asarray(0.3), zero=-100.0, limit=20.0
    )
    omega, log_sigma2 = unstructured.omega_from_parameters(params, sizes)
    assert float(log_sigma2) == 0.3
    np.testing.assert_allclose(
        omega, unstructured.omega_from_theta(theta, sizes), rtol=1e-9, atol=1e-12
    )
    matrices = unstructured.symmetric_matrices(omega, sizes)
    for factor, matrix in zip(factors, matrices, strict=True):
        np.testing.assert_allclose(matrix, factor @ factor.T, atol=1e-9)
        again, zero = unstructured.factor_semidefinite(matrix, 1e-8)
        assert not zero.any()
        np.testing.assert_allclose(again, factor, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_triangle_is_a_root(sizes):
    theta = random_theta(1, sizes)
    root = unstructured.root_from_theta(jnp.asarray(theta), sizes)
    np.testing.assert_array_equal(root[unstructured.root_of_theta(sizes)], theta)
    omega = unstructured.omega_from_root(root, sizes)
    expected = [
        factor @ factor.T for factor in unstructured.split_triangles(jnp.asarray(theta), sizes)
    ]
    np.testing.assert_allclose(omega, unstructured.join_triangles(tuple(expected)), atol=1e-12)
    np.testing.assert_allclose(omega, unstructured.omega_from_theta(jnp.asarray(theta), sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_derivatives_in_the_root_equal_autodiff(sizes):
    rng = np.random.default_rng(2)
    root = jnp.asarray(rng.normal(size=sum(q * q for q in sizes)))
    gradient = jnp.asarray(rng.normal(size=unstructured.count_theta(sizes)))

    def of_root(root):
        return unstructured.omega_from_root(root, sizes)

    jacobian = jax.jacfwd(of_root)(root)
    np.testing.assert_allclose(unstructured.root_jacobian(root, sizes), jacobian, atol=1e-12)
    curvature = jax.hessian(lambda root: gradient @ of_root(root))(root)
    np.testing.assert_allclose(unstructured.root_curvature(gradient, sizes), curvature, atol=1e-12)
    flat = unstructured.rotations(root, sizes)
    if flat is not None:
        np.testing.assert_allclose(flat @ jacobian.T, 0.0, atol=1e-12)


def test_two_effects_have_fishers_z():
    omega, _ = unstructured.omega_from_parameters(jnp.array([0.0, 0.0, 0.8, 0.0]), (2,))
    assert float(omega[1]) == pytest.approx(np.tanh(0.8))


@pytest.mark.parametrize("sizes", SIZES)
def test_hessian_in_params_equals_autodiff(sizes):
    rng = np.random.default_rng(0)
    m = unstructured.count_theta(sizes)
    params = jnp.asarray(rng.normal(size=m + 1) / 2)
    A = rng.normal(size=(m + 1, m + 1))
    A = jnp.asarray(A + A.T)

    def value(both):
        return jnp.sin(both).sum() + both @ A @ both

    def in_params(params):
        omega, log_sigma2 = unstructured.omega_from_parameters(params, sizes)
        return value(jnp.append(omega, log_sigma2))

    both = jnp.append(*unstructured.omega_from_parameters(params, sizes))
    gradient, hessian = jax.grad(value)(both), jax.hessian(value)(both)
    # The residual's gradient is zero at an optimum and is not read; its coordinate is linear.
    in_closed_form = jax.jit(unstructured.hessian_in_parameters, static_argnums=3)
    jacobian, found = in_closed_form(params, gradient, hessian, sizes)
    np.testing.assert_allclose(found, jax.jit(jax.hessian(in_params))(params), atol=1e-9)
    expected = jax.jit(jax.grad(in_params))(params)
    np.testing.assert_allclose(gradient @ jacobian, expected, atol=1e-10)


def test_semidefinite_factor_has_exact_zeros():
    factor, zero = unstructured.factor_semidefinite(jnp.array([[1.0, 2.0], [2.0, 4.0]]), 1e-4)
    np.testing.assert_array_equal(factor, [[1, 0], [2, 0]])
    assert list(zero) == [False, True]
    factor, zero = unstructured.factor_semidefinite(jnp.array([[0.0, 0.0], [0.0, 4.0]]), 1e-4)
    np.testing.assert_array_equal(factor, [[0, 0], [0, 2]])
    assert list(zero) == [True, False]


def test_lower_factor_of_a_root():
    """As numpy's Cholesky factor, without its loss of digits; zeros where rank is lost."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3, 5))
    factor = np.asarray(unstructured.lower_factor(jnp.asarray(root), 1e-7))
    for lane in range(5):
        own = root[..., lane]
        np.testing.assert_allclose(factor[..., lane], np.linalg.cholesky(own @ own.T), atol=1e-13)
    near = np.array([[1.0, 0.0], [1.0, 1e-10]])
    np.testing.assert_array_equal(unstructured.lower_factor(jnp.asarray(near), 0.0), near)
    lost = unstructured.lower_factor(jnp.asarray(rng.normal(size=(3, 1)) * np.ones(3)), 1e-7)
    np.testing.assert_array_equal(np.asarray(lost) == 0, np.arange(3) > np.zeros((3, 1)))


@pytest.mark.parametrize(
    ("theta", "free", "shown"),
    [
        ([1.0, 0.5, 2.0], [1, 1, 1, 1], None),
        ([1.0, 0.5, 0.0], [1, 1, 0, 1], np.inf),
        ([1.0, -0.5, 0.0], [1, 1, 0, 1], -np.inf),
        ([1.0, 0.0, 0.0], [1, 0, 0, 1], np.nan),
        ([0.0, 0.0, 1.0], [0, 1, 0, 1], np.nan),
        ([0.0, 0.0, 0.0], [0, 0, 0, 1], np.nan),
    ],
)
def test_boundary(theta, free, shown):
    factors = unstructured.split_triangles(jnp.array(theta), (2,))
    params = unstructured.parameters_from_factors(factors, jnp.zeros(()), zero=-100.0, limit=20.0)
    inside, reported = unstructured.boundary(factors, params)
    np.testing.assert_array_equal(inside, np.array(free, bool))
    if shown is not None:
        np.testing.assert_array_equal(reported[2], shown)


@pytest.mark.parametrize(
    ("theta", "z"),
    [
        ([1.0, 0.5, 0.3, 2.0, -0.7, 0.0], [1, 1, -np.inf]),
        ([1.0, 0.5, 0.3, 2.0, 1e-6, 0.0], [1, 1, np.inf]),
        ([1.0, 0.5, 0.3, 2.0, 0.0, 0.0], [1, np.inf, np.nan]),
        ([1.0, 0.5, 0.3, 0.0, 0.0, 0.0], [np.inf, np.inf, np.nan]),
        ([1.0, 0.5, 0.3, 0.0, 0.0, 1e-6], [np.inf, 1, np.nan]),
        ([0.0, 0.0, 0.0, 2.0, 0.3, 0.0], [np.nan, np.nan, np.inf]),
        ([1.0, 0.5, 0.0, 2.0, 0.0, 0.0], [1, np.nan, np.nan]),
    ],
)
def test_boundary_of_three_effects(theta, z):
    """Read off the exact zeros, whatever rounding does to the rows' lengths."""
    rng = np.random.default_rng(0)
    for unit in rng.uniform(0.1, 10, size=(20, 3)):
        (factor,) = unstructured.split_triangles(jnp.array(theta), (3,))
        factors = (factor * unit[:, None],)
        params = unstructured.parameters_from_factors(
            factors, jnp.zeros(()), zero=-100.0, limit=20.0
        )
        inside, shown = unstructured.boundary(factors, params)
        np.testing.assert_array_equal(inside[3:6], np.isfinite(z))
        np.testing.assert_array_equal(np.where(np.isfinite(shown[3:6]), 1, shown[3:6]), z)
        np.testing.assert_array_equal(inside[:3], (np.asarray(factor) != 0).any(axis=1))


NOT_READ = np.nan


@pytest.mark.parametrize(
    ("sizes", "params", "inside"),
    [
        ((2,), [0.3, -0.2, np.inf, 0.1], [0.3, -0.2, 30.0, 0.1]),
        ((2,), [0.3, -0.2, -800.0, 0.1], [0.3, -0.2, -30.0, 0.1]),
        ((2,), [0.3, -np.inf, NOT_READ, 0.1], [0.3, -90.0, 0.0, 0.1]),
        ((2,), [-np.inf, -np.inf, NOT_READ, 0.1], [-90.0, -90.0, 0.0, 0.1]),
        # the first effect has no variance, the others a correlation of -1
        (
            (3,),
            [-np.inf, 0.3, 0.5, NOT_READ, NOT_READ, -np.inf, 0.1],
            [-90.0, 0.3, 0.5, 0.0, 0.0, -30.0, 0.1],
        ),
        # the second effect is the first; the third has what it shares with the first
        (
            (1, 3),
            [0.2, 0.4, 0.3, 0.5, np.inf, 0.7, NOT_READ, 0.1],
            [0.2, 0.4, 0.3, 0.5, 30.0, 0.7, 0.0, 0.1],
        ),
        # the third effect is the first: it has nothing left for the second
        (
            (3, 1),
            [0.4, 0.3, 0.5, 0.6, -np.inf, NOT_READ, -np.inf, 0.1],
            [0.4, 0.3, 0.5, 0.6, -30.0, 0.0, -90.0, 0.1],
        ),
    ],
)
def test_derivatives_on_the_boundary_are_limits(sizes, params, inside):
    m = len(params) - 1
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, m)))

    def value(params):
        omega, log_sigma2 = unstructured.omega_from_parameters(params, sizes)
        return (weights[0] @ omega) ** 2 + jnp.sin(weights[1] @ omega) + log_sigma2**2

    here, there = jnp.asarray(params), jnp.asarray(inside)
    assert float(value(here)) == pytest.approx(float(value(there)), rel=1e-12)
    slope = jax.grad(value)(here)
    np.testing.assert_allclose(slope, jax.grad(value)(there), atol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(value)(here), slope, atol=1e-12)
    assert (np.asarray(slope)[~np.isfinite(params)] == 0).all()
    bend = jax.jit(jax.hessian(value))
    read = ~np.isnan(params)
    curved = np.asarray(bend(here))
    assert (curved[~read] == 0).all()
    np.testing.assert_allclose(curved[read][:, read], bend(there)[read][:, read], atol=1e-10)


def test_coordinates_that_are_defined_are_read():
    for params in ([0.3, -0.2, np.nan, 0.1], [0.3, np.nan, 0.2, 0.1]):
        assert np.isnan(unstructured.omega_from_parameters(jnp.asarray(params), (2,))[0]).any()
