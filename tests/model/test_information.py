"""Expected information: by definition with n x n matrices, for every structure; derivatives."""

from __future__ import annotations

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreml
from jaxreml import Design, Term, expected_information

RNG = np.random.default_rng(8)
N = 40
FIRST, SECOND = RNG.integers(0, 6, N), RNG.integers(0, 5, N)
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
WEIGHTS = RNG.uniform(0.5, 2, N)
SLOPES = np.array([0.4, -0.8, 0.5, 0.3])  # log-variances, z, residual


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def by_definition(parameters, terms, weights, *, reml):
    """X'V^-1 X, and tr(P V_i P V_j) / 2 with V_i by differences."""
    n = len(X)

    def V(at):
        return independent.marginal_covariance(at, terms, weights, n)

    slopes = independent.gradient(V, parameters)
    middle = np.linalg.inv(V(parameters))
    beta = X.T @ middle @ X
    if reml:
        middle = middle - middle @ X @ np.linalg.solve(beta, X.T @ middle)
    parts = middle @ slopes
    return beta, np.einsum("aij,bji->ab", parts, parts) / 2


@pytest.mark.parametrize(
    ("structure", "method"),
    [("grouped", "REML"), ("grouped", "ML"), ("crossed", "REML"), ("dense", "ML")],
)
def test_it_is_what_the_definition_says(structure, method):
    terms, parameters = [(FIRST, X)], SLOPES
    if structure == "crossed":
        terms = [(FIRST, np.ones((N, 1))), (SECOND, np.ones((N, 1)))]
        parameters = np.array([0.4, -0.8, 0.3])
    beta, own = by_definition(parameters, terms, WEIGHTS, reml=method == "REML")
    for y in (np.zeros(N), RNG.normal(size=N)):  # the response does not matter
        design = Design.from_arrays(y, X, terms, weights=WEIGHTS, structure=structure)
        found = expected_information(parameters, design, method)
        np.testing.assert_allclose(found.beta, beta, rtol=1e-10)
        np.testing.assert_allclose(found.parameters, own, rtol=1e-7, atol=1e-9)


def test_of_a_boundary_nothing_is_said():
    design = Design.from_arrays(np.zeros(N), X, [(FIRST, X)])
    alone = Design.from_arrays(np.zeros(N), X, [FIRST])
    found = expected_information(np.array([0.4, -np.inf, np.nan, 0.3]), design)
    known = expected_information(np.array([0.4, 0.3]), alone)
    np.testing.assert_allclose(found.beta, known.beta, rtol=1e-10)
    places = np.ix_([0, 3], [0, 3])
    np.testing.assert_allclose(np.asarray(found.parameters)[places], known.parameters, rtol=1e-10)
    assert not np.asarray(found.parameters)[1:3].any()


def test_derivatives_in_the_plan():
    """In times of measurement, weights and sizes of groups: differences agree."""

    def of_rows(plan):
        columns = jnp.column_stack([jnp.ones(N), plan["times"]])
        term = Term(FIRST, columns)
        design = Design.from_arrays(np.zeros(N), columns, term, weights=plan["weights"])
        found = expected_information(SLOPES, design)
        return jnp.linalg.inv(found.beta)[1, 1] + jnp.linalg.inv(found.parameters)[1, 1]

    plan = {"times": jnp.array(X[:, 1]), "weights": jnp.array(WEIGHTS)}
    value_and_grad = jax.jit(jax.value_and_grad(of_rows))
    slopes = value_and_grad(plan)[1]
    for name in plan:
        step = np.zeros(N)
        step[[3, 20]] = 1e-4, -2e-4
        ends = [value_and_grad({**plan, name: plan[name] + s * step})[0] for s in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2, slopes[name] @ step, rtol=1e-6)

    def of_sizes(size):
        """8 groups of so many rows each, any positive number, by maximum likelihood."""
        ones, none = jnp.ones(8), jnp.zeros(())
        parts = size * ones[:, None, None], size * ones[:, None, None], 0 * ones[:, None]
        xx = jnp.reshape(8 * size, (1, 1))
        design = Design.from_moments(*parts, xx, jnp.zeros(1), none, 8 * size)
        return expected_information(jnp.array([0.4, 0.3]), design, "ML").parameters

    known, slope = jax.jit(of_sizes)(4.0), jax.jit(jax.jacfwd(of_sizes))(4.0)
    tau2, sigma2, k = np.exp(0.4), np.exp(0.3), 4.0
    each = np.array([tau2, sigma2])

    def closed(k):
        level = sigma2 + k * tau2
        inner = np.array([[k**2, k], [k, 1 + (k - 1) * (level / sigma2) ** 2]]) / level**2
        return 8 / 2 * inner * each[:, None] * each

    np.testing.assert_allclose(known, closed(k), rtol=1e-10)
    np.testing.assert_allclose(slope, (closed(k + 1e-5) - closed(k - 1e-5)) / 2e-5, rtol=1e-7)


def test_what_it_is_not_given_right_is_refused():
    design = Design.from_arrays(np.zeros(N), X, [FIRST])
    with pytest.raises(ValueError, match="shape"):
        jaxreml.expected_information(np.zeros(3), design)
    with pytest.raises(ValueError, match="method"):
        jaxreml.expected_information(np.zeros(2), design, "OLS")
