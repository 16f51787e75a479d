"""Structures agree with each other and with V written out, on random designs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxreml import Design, Term
from jaxreml.model.covariance import natural
from jaxreml.model.objective import expand, reml_objective

# Few shapes, so that few programs are compiled; the values inside vary.
SHAPES = [(40, 6, 1), (40, 6, 2), (60, 5, 3), (60, 5, 4)]


def random_design(seed: int, n: int, n_groups: int, q: int, structure: str) -> Design:
    """Unbalanced; some levels have fewer rows than effects, some columns tie within a level."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(n_groups, size=n, p=rng.dirichlet(np.full(n_groups, 0.7)))
    codes[:n_groups] = np.arange(n_groups)
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    Z = np.column_stack(
        [np.ones(n), rng.integers(0, 3, size=(n, q - 1)) * 10.0 ** rng.uniform(-2, 3)]
    )
    y = rng.normal(size=n) + 3 * rng.normal(size=n_groups)[codes]
    split = rng.integers(1, q) if q > 1 and rng.random() < 0.4 else q
    terms = [Term(codes, Z[:, :split])]
    if split < q:
        terms.append(Term(codes, Z[:, split:]))
    weights = rng.uniform(0.2, 3, n) if rng.random() < 0.5 else None
    return Design.from_arrays(y, X, terms, weights=weights, structure=structure)


def random_omega(seed: int, sizes: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=natural.count_theta(sizes)) * 10 ** rng.uniform(-2, 2)
    theta[rng.random(theta.size) < 0.2] = 0  # singular ones too
    return natural.omega_from_theta(theta, sizes)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31), st.sampled_from(SHAPES), st.booleans())
def test_dense_equals_grouped(seed, shape, reml):
    compare_dense_with_grouped(seed, shape, reml)


@pytest.mark.long
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31), st.sampled_from(SHAPES), st.booleans())
def test_dense_equals_grouped_on_2000_designs(seed, shape, reml):
    compare_dense_with_grouped(seed, shape, reml)


def compare_dense_with_grouped(seed, shape, reml):
    grouped = random_design(seed, *shape, "grouped")
    dense = random_design(seed, *shape, "dense")
    omega = random_omega(seed, grouped.sizes)
    left, right = (expand(omega, design, reml=reml) for design in (grouped, dense))
    assert isinstance(left.value, np.floating) and isinstance(right.value, np.floating)
    np.testing.assert_allclose(left.value, right.value, rtol=1e-10)
    np.testing.assert_allclose(left.log_sigma2, right.log_sigma2, atol=1e-10)
    for name in ("gradient", "hessian", "joint_hessian"):
        a, b = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(a, b, atol=1e-10 * (1 + np.abs(b).max()), err_msg=name)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31), st.sampled_from(SHAPES[:2]))
def test_marginal_equals_explicit_covariance(seed, shape):
    n, n_groups, q = shape
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, n - n_groups)])
    X, Z, y = rng.normal(size=(n, 2)), rng.normal(size=(n, q)), rng.normal(size=n)
    design = Design.from_arrays(y, X, [(codes, Z)])
    omega = random_omega(seed, (q,))
    (matrix,) = natural.symmetric_matrices(omega, (q,))
    V = np.eye(n) + (Z @ np.asarray(matrix) @ Z.T) * (codes[:, None] == codes)
    scale = np.diagonal(design.units.matrices[0])
    rows, columns = natural.triangle(q)
    scaled = omega * (scale[rows] * scale[columns])
    marginal = design.structure.marginal(scaled)
    logdet = np.linalg.slogdet(V)[1]
    assert float(marginal.logdet) == pytest.approx(logdet, rel=1e-9, abs=1e-9)
    residual = y - X @ np.asarray(design.beta_ols)
    expected = residual @ np.linalg.solve(V, residual)
    assert float(marginal.gram[-1, -1]) == pytest.approx(expected, rel=1e-7)


def test_traced_effects_take_the_dense_structure_with_right_derivatives():
    rng = np.random.default_rng(1)
    n, codes = 30, np.arange(30) % 5
    X, x, y = np.ones((n, 1)), rng.normal(size=n), rng.normal(size=n)
    params = jnp.array([0.2, -0.3, 0.4, 0.1])

    def value(slope):  # at slope 0 the second effect is zero in every row
        Z = jnp.column_stack([jnp.ones(n), slope * x])
        return reml_objective(params, Design.from_arrays(y, X, [(codes, Z)]))

    for slope in (0.0, 1.3):
        step = 1e-5
        expected = (value(slope + step) - value(slope - step)) / (2 * step)
        assert float(jax.grad(value)(slope)) == pytest.approx(float(expected), rel=1e-6)


def test_derivatives_in_response_and_fixed_effects_equal_finite_differences():
    rng = np.random.default_rng(2)
    n, codes = 30, np.arange(30) % 5
    X, y = np.column_stack([np.ones(n), rng.normal(size=n)]), rng.normal(size=n)
    params = jnp.array([0.2, 0.1])

    def value(y, X):
        return reml_objective(params, Design.from_arrays(y, X, [codes]))

    by_y, by_X = jax.grad(value, (0, 1))(jnp.asarray(y), jnp.asarray(X))
    step = 1e-5
    for i in (0, 7):
        h = step * np.eye(n)[i]
        expected = (value(y + h, X) - value(y - h, X)) / (2 * step)
        assert float(by_y[i]) == pytest.approx(float(expected), rel=1e-6)
        H = np.column_stack([np.zeros(n), h])
        expected = (value(y, X + H) - value(y, X - H)) / (2 * step)
        assert float(by_X[i, 1]) == pytest.approx(float(expected), rel=1e-6)
