"""Coordinate maps are inverse to each other and have the derivatives they claim."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.correlations import Autoregressive, Exchangeable, Toeplitz
from jaxreml.model.covariance.distances import Distance
from jaxreml.model.covariance.factor_analytic import FactorAnalytic
from jaxreml.model.covariance.factors import factor_semidefinite, lower_factor
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.structured import Structured
from jaxreml.model.covariance.unstructured import Unstructured, unstructured

SIZES = [(1,), (2,), (3,), (1, 2), (4,)]
COVARIANCES = [
    *map(unstructured, SIZES),
    Covariance((Structured(4, Exchangeable(4), False),)),
    Covariance((Unstructured(2), Structured(3, Autoregressive(3)))),
    Covariance((Structured(3, Toeplitz(3)), FactorAnalytic(3, 2))),
    Covariance((Structured(3, Distance(3, (0.0, 1.0, 2.5), "matern3"), False),)),
    Covariance((Structured(3, Distance(3, (0.0, 1.0, 2.5), "gaussian"), False),)),
]


def random_theta(seed: int, sizes: tuple[int, ...]) -> np.ndarray:
    theta = np.random.default_rng(seed).normal(size=natural.count_theta(sizes))
    diagonal = np.concatenate([rows == columns for rows, columns in map(natural.triangle, sizes)])
    return np.where(diagonal, np.abs(theta) + 0.1, theta)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SIZES))
def test_round_trip(seed, sizes):
    theta = random_theta(seed, sizes)
    factors = natural.split_triangles(theta, sizes)
    np.testing.assert_array_equal(natural.join_triangles(factors), theta)
    covariance = unstructured(sizes)
    report = covariance.report(covariance.chart(factors), np.asarray(0.3))
    assert report.free.all()
    np.testing.assert_array_equal(report.shown, report.finite)
    omega, log_sigma2 = covariance.natural(report.finite)
    assert float(log_sigma2) == 0.3
    np.testing.assert_allclose(omega, natural.omega_from_theta(theta, sizes), rtol=1e-9, atol=1e-12)
    matrices = natural.symmetric_matrices(omega, sizes)
    for factor, matrix in zip(factors, matrices, strict=True):
        np.testing.assert_allclose(matrix, factor @ factor.T, atol=1e-9)
        again, zero = factor_semidefinite(matrix, 1e-8)
        assert not zero.any()
        np.testing.assert_allclose(again, factor, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_triangle_is_a_root(sizes):
    theta = random_theta(1, sizes)
    covariance = unstructured(sizes)
    chart = covariance.chart(natural.split_triangles(theta, sizes))
    np.testing.assert_array_equal(chart[covariance.inside], theta)
    expected = [factor @ factor.T for factor in natural.split_triangles(theta, sizes)]
    omega = covariance.omega(chart)
    np.testing.assert_allclose(omega, natural.join_triangles(tuple(expected)), atol=1e-12)
    np.testing.assert_allclose(omega, natural.omega_from_theta(theta, sizes))


def chart_of(covariance: Covariance, seed: int) -> np.ndarray:
    length = sum(block.length for block in covariance.blocks)
    return np.random.default_rng(seed).normal(size=length)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_chart_factor_and_parameters_are_one_covariance(covariance):
    for seed in range(5):
        chart = chart_of(covariance, seed)
        canonical = covariance.canonical(chart)
        omega = covariance.omega(chart)
        np.testing.assert_allclose(covariance.omega(canonical), omega, atol=1e-13)
        factors = covariance.factors(canonical)
        np.testing.assert_allclose(natural.omega_from_factors(factors), omega, atol=1e-13)
        report = covariance.report(canonical, np.asarray(0.4))
        again = covariance.chart_at(factors, report.shown)
        np.testing.assert_allclose(again, canonical, rtol=1e-9, atol=1e-12)
        assert report.free.all() and len(report.free) == covariance.positions[-1] + 1
        again, log_sigma2 = covariance.natural(report.shown)
        np.testing.assert_allclose(again, omega, atol=1e-12)
        assert float(log_sigma2) == 0.4


@partial(jax.jit, static_argnums=0)
def autodiff(covariance: Covariance, here, first, second):
    """Derivatives in the chart of a function with these two derivatives in omega, and omega's."""

    def value(chart):
        step = covariance.omega(chart) - covariance.omega(here)
        return first @ step + step @ second @ step / 2

    return jax.grad(value)(here), jax.hessian(value)(here), jax.jacfwd(covariance.omega)(here)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("lanes", [(), (2,)])
def test_derivatives_in_the_chart_equal_autodiff(covariance, lanes):
    """Those written out, and the generic ones with and without lanes."""
    rng = np.random.default_rng(2)
    chart = np.stack([chart_of(covariance, 0), chart_of(covariance, 1)], axis=-1)
    m = natural.count_theta(covariance.sizes)
    gradient, hessian = rng.normal(size=(m, 2)), rng.normal(size=(m, m, 2))
    hessian = hessian + hessian.swapaxes(0, 1)
    if not all(block.written_out for block in covariance.blocks):
        chart, gradient, hessian = map(jnp.asarray, (chart, gradient, hessian))
    if not lanes:
        chart, gradient, hessian = chart[:, 0], gradient[:, 0], hessian[..., 0]
    slope, bend = covariance.chain(chart, gradient, hessian)
    flat = covariance.flat(chart)
    for lane in np.ndindex(lanes):
        own = (chart[(..., *lane)], gradient[(..., *lane)], hessian[(..., *lane)])
        expected = autodiff(covariance, *own)
        np.testing.assert_allclose(slope[(..., *lane)], expected[0], atol=1e-12)
        np.testing.assert_allclose(bend[(..., *lane)], expected[1], atol=1e-12)
        if flat is not None:
            np.testing.assert_allclose(flat[(..., *lane)] @ expected[2].T, 0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["jacobian", "curvature", "derivatives"])
@pytest.mark.parametrize("q", [1, 2, 3])
def test_what_is_written_out_equals_the_generic_chain(q, name):
    block = Unstructured(q)
    rng = np.random.default_rng(q)
    m = q * (q + 1) // 2
    chart, parameters, gradient = (rng.normal(size=k) for k in (q * q, m, m))
    arguments = {
        "jacobian": (chart,),
        "curvature": (chart, gradient),
        "derivatives": (parameters, np.asarray(0.3), gradient),
    }[name]
    own = getattr(block, name)(*arguments)
    generic = jax.jit(partial(getattr(Block, name), block))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), own, generic)


def test_two_effects_have_fishers_z():
    for covariance, parameters in (
        (unstructured((2,)), [0.0, 0.0, 0.8, 0.0]),
        (Covariance((Structured(2, Exchangeable(2), False),)), [0.0, 0.8, 0.0]),
    ):
        omega, _ = covariance.natural(jnp.array(parameters))
        np.testing.assert_allclose(omega, [1, np.tanh(0.8), 1])


def derivatives(value):
    """First and second ones, in one program."""
    return jax.jit(lambda at: (jax.grad(value)(at), jax.hessian(value)(at)))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_hessian_in_parameters_equals_autodiff(covariance):
    rng = np.random.default_rng(0)
    m, k = natural.count_theta(covariance.sizes), covariance.positions[-1] + 1
    params = rng.normal(size=k) / 2
    A = rng.normal(size=(m + 1, m + 1))
    A = A + A.T

    def value(params):
        both = jnp.append(*covariance.natural(params))
        return jnp.sin(both).sum() + both @ A @ both

    both = np.append(*covariance.natural(params))
    gradient, hessian = np.cos(both) + 2 * A @ both, 2 * A - np.diag(np.sin(both))
    # The residual's gradient is zero at an optimum and is not read; its coordinate is linear.
    jacobian, found = covariance.in_parameters(params, gradient, hessian)
    slope, bend = derivatives(value)(params)
    np.testing.assert_allclose(found, bend, atol=1e-9)
    np.testing.assert_allclose(gradient @ jacobian, slope, atol=1e-10)


def test_semidefinite_factor_has_exact_zeros():
    factor, zero = factor_semidefinite(jnp.array([[1.0, 2.0], [2.0, 4.0]]), 1e-4)
    np.testing.assert_array_equal(factor, [[1, 0], [2, 0]])
    assert list(zero) == [False, True]
    factor, zero = factor_semidefinite(jnp.array([[0.0, 0.0], [0.0, 4.0]]), 1e-4)
    np.testing.assert_array_equal(factor, [[0, 0], [0, 2]])
    assert list(zero) == [True, False]


def test_lower_factor_of_a_root():
    """As numpy's Cholesky factor, without its loss of digits; zeros where rank is lost."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3, 5))
    factor = np.asarray(lower_factor(jnp.asarray(root), 1e-7))
    for lane in range(5):
        own = root[..., lane]
        np.testing.assert_allclose(factor[..., lane], np.linalg.cholesky(own @ own.T), atol=1e-13)
    near = np.array([[1.0, 0.0], [1.0, 1e-10]])
    np.testing.assert_array_equal(lower_factor(jnp.asarray(near), 0.0), near)
    lost = lower_factor(jnp.asarray(rng.normal(size=(3, 1)) * np.ones(3)), 1e-7)
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
    covariance = unstructured((2,))
    chart = covariance.chart(natural.split_triangles(jnp.array(theta), (2,)))
    _, inside, reported = covariance.report(chart, jnp.zeros(()))
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
        (factor,) = natural.split_triangles(np.array(theta), (3,))
        covariance = unstructured((3,))
        chart = covariance.chart((factor * unit[:, None],))
        with np.errstate(invalid="ignore"):
            _, inside, shown = covariance.report(chart, np.zeros(()))
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
        omega, log_sigma2 = unstructured(sizes).natural(params)
        return (weights[0] @ omega) ** 2 + jnp.sin(weights[1] @ omega) + log_sigma2**2

    @jax.jit
    def all_of(params):
        forwards = jax.jacfwd(value)(params)
        return value(params), jax.grad(value)(params), forwards, jax.hessian(value)(params)

    here, slope, forwards, curved = map(np.asarray, all_of(jnp.asarray(params)))
    there, expected, _, bend = map(np.asarray, all_of(jnp.asarray(inside)))
    assert here == pytest.approx(there, rel=1e-12)
    np.testing.assert_allclose(slope, expected, atol=1e-10)
    np.testing.assert_allclose(forwards, slope, atol=1e-12)
    assert (slope[~np.isfinite(params)] == 0).all()
    read = ~np.isnan(params)
    assert (curved[~read] == 0).all()
    np.testing.assert_allclose(curved[read][:, read], bend[read][:, read], atol=1e-10)


def test_coordinates_that_are_defined_are_read():
    for params in ([0.3, -0.2, np.nan, 0.1], [0.3, np.nan, 0.2, 0.1]):
        assert np.isnan(unstructured((2,)).natural(jnp.asarray(params))[0]).any()


def test_boundary_of_compound_symmetry():
    """A variance of zero, a correlation of one, and the least one, -1 / (q - 1)."""
    covariance = Covariance((Structured(4, Exchangeable(4), False),))
    for chart, free, shown in (
        ([0.0, 0.0], [0, 0, 1], [-np.inf, np.nan, 0]),
        ([1.0, np.pi / 2], [1, 0, 1], [0, np.inf, 0]),
        ([1.0, -np.pi / 2], [1, 0, 1], [0, -np.inf, 0]),
    ):
        report = covariance.report(jnp.asarray(chart), jnp.zeros(()))
        np.testing.assert_array_equal(report.free, np.array(free, bool))
        np.testing.assert_allclose(report.shown, shown, atol=1e-12)
        omega = covariance.omega(jnp.asarray(chart))
        np.testing.assert_allclose(covariance.natural(report.shown)[0], omega, atol=1e-12)
        slopes = jax.jacfwd(lambda p: covariance.natural(p)[0])(report.shown)
        assert np.isfinite(slopes).all()
        factors = covariance.factors(covariance.canonical(jnp.asarray(chart)))
        assert np.linalg.matrix_rank(factors[0]) == {0.0: 0, np.pi / 2: 1, -np.pi / 2: 3}[chart[1]]
        again = covariance.chart_at(factors, report.shown)
        np.testing.assert_allclose(again, chart, atol=1e-12)
