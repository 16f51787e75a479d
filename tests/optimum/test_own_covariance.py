"""A covariance by a word in `estimate`, under JAX: compound symmetry.

Its independent answer: with a correlation that is not negative, (0 + f | g) of compound symmetry is
the model (1 | g) + (1 | g:f), for which nothing of it is used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxreml import DataError, Design, Term, estimate, ml_objective, reml_objective, stack
from jaxreml.model import satterthwaite
from jaxreml.model.kenward_roger import adjust, single_degrees
from jaxreml.optimum.effects import criterion
from jaxreml.status import Status

GROUPS, KINDS, REPEATS = 12, 3, 3
g = np.repeat(np.arange(GROUPS), KINDS * REPEATS)[:-5]  # not balanced
f = np.tile(np.repeat(np.arange(KINDS), REPEATS), GROUPS)[:-5]
n = g.size
rng = np.random.default_rng(5)
h = rng.integers(0, 8, n)
X = np.column_stack([np.ones(n), f == 1, rng.normal(size=n)])
DUMMIES = np.eye(KINDS)[f]


def response(along: float, across: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(GROUPS, KINDS))
    mean = effects.mean(axis=1, keepdims=True)
    effects = across * (effects - mean) + along * mean
    others = rng.normal(size=8)[h]
    return 3 + X @ [1.0, 0.5, -0.2] + effects[g, f] + 0.7 * others + rng.normal(size=n)


def symmetric(y, structure: str) -> Design:
    own = Term(g, DUMMIES, "g", tuple("abc"), covariance="homcs")
    others = [] if structure == "grouped" else [Term(h, name="h")]
    return Design.from_arrays(y, X, [own, *others], structure=structure)


def nested(y, structure: str) -> Design:
    others = [] if structure == "grouped" else [Term(h, name="h")]
    terms = [Term(g, name="g"), Term(g * KINDS + f, name="g:f"), *others]
    return Design.from_arrays(y, X, terms, structure="dense")


def inference_of(found, design) -> list[np.ndarray]:
    """Satterthwaite's degrees of freedom, Kenward and Roger's covariance and degrees of freedom."""
    rows = jnp.eye(X.shape[1])
    variance = jnp.diagonal(found.vcov)
    slopes = jnp.diagonal(found.vcov_slopes, axis1=1, axis2=2)
    own = satterthwaite.degrees(variance, slopes, satterthwaite.spread(found.hessian))
    adjustment = jax.jit(adjust)(found.theta, found.parameters, design.without_names())
    assert adjustment.exists
    return [own, adjustment.vcov, single_degrees(adjustment, rows)]


@pytest.mark.parametrize("structure", ["grouped", "crossed", "dense"])
def test_equals_the_nested_model(structure):
    y = response(2.0, 0.8)
    designs = symmetric(y, structure), nested(y, structure)
    own, wanted = (estimate(design) for design in designs)
    assert own.status == wanted.status == Status.CONVERGED and not own.is_singular
    assert float(own.criterion) == pytest.approx(float(wanted.criterion), abs=1e-9)
    np.testing.assert_allclose(own.beta, wanted.beta, rtol=1e-7)
    np.testing.assert_allclose(own.vcov, wanted.vcov, rtol=1e-6)
    between, within, *_ = np.exp(wanted.log_variances)
    assert float(own.log_variances[0]) == pytest.approx(np.log(between + within), rel=1e-6)
    rho = between / (between + within)
    z = (np.log(1 + (KINDS - 1) * rho) - np.log(1 - rho)) / 2
    assert float(own.parameters[1]) == pytest.approx(z, rel=1e-6)
    assert designs[0].parameter_names[:2] == ("log_variance[g, a..c]", "z[g, a..c, correlation]")

    # The standard error of the logarithm of a sum of variances, by the delta method.
    share = np.zeros(len(wanted.parameters))
    share[:2] = between / (between + within), within / (between + within)
    se = np.sqrt(share @ wanted.parameters_vcov @ share)
    assert float(own.log_variance_se[0]) == pytest.approx(se, rel=1e-5)
    assert float(own.log_variance_se[-1]) == pytest.approx(float(wanted.log_variance_se[-1]), 1e-5)

    pairs = zip(*map(inference_of, (own, wanted), designs), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    value, gradient = criterion(own.theta, designs[0], True, own.parameters)
    assert float(value) == pytest.approx(float(own.criterion), abs=1e-9)
    assert float(jnp.linalg.norm(gradient)) < 1e-5


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_negative_correlation(method):
    """Where there is no nested model: against a search without derivatives of its own."""
    design = symmetric(response(0.4, 1.5), "grouped")
    objective = {"REML": reml_objective, "ML": ml_objective}[method]
    own = estimate(design, method)
    assert own.status == Status.CONVERGED and own.parameters[1] < 0
    start = np.zeros(3)
    found = minimize(
        lambda p: float(objective(jnp.asarray(p), design)),
        start,
        method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 1000},
    )
    assert float(own.criterion) == pytest.approx(found.fun, abs=1e-8)
    np.testing.assert_allclose(own.parameters, found.x, atol=2e-5)
    hessian = jax.hessian(objective)(own.parameters, design)
    np.testing.assert_allclose(own.hessian, hessian, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(own.parameters_vcov, 2 * np.linalg.inv(hessian), rtol=1e-6)


@pytest.mark.parametrize(
    ("along", "across", "z"), [(0.0, 2.0, -np.inf), (2.0, 0.0, np.inf), (0.0, 0.0, np.nan)]
)
def test_boundary(along, across, z):
    """Exact, without a standard error; the others are given it. Of responses simulated on the
    boundary, the first whose optimum is there too."""
    for seed in range(30):
        own = estimate(symmetric(response(along, across, seed), "grouped"))
        if own.is_singular and (np.isnan(z) == np.isneginf(own.parameters[0])):
            break
    assert own.status == Status.CONVERGED and own.is_singular
    np.testing.assert_equal(float(own.parameters[1]), z)
    assert np.isnan(own.parameters_vcov[1]).all()
    assert np.isfinite(own.log_variance_se[-1])


def test_batch_and_derivatives_through_the_fit():
    designs = [symmetric(response(1.5, 0.9, seed), "grouped") for seed in range(3)]
    together = jax.jit(jax.vmap(estimate))(stack(designs))
    for k, design in enumerate(designs):
        alone = estimate(design)
        np.testing.assert_allclose(together.parameters[k], alone.parameters, rtol=1e-7)
    y = jnp.asarray(response(1.5, 0.9))

    def variance(y):
        return estimate(symmetric(y, "grouped")).log_variances[0]

    slope = jax.jit(jax.grad(variance))(y)
    direction = np.random.default_rng(1).normal(size=n)
    step = 1e-4
    up, down = (variance(y + sign * step * direction) for sign in (1, -1))
    assert float(slope @ direction) == pytest.approx(float(up - down) / (2 * step), rel=1e-5)


def test_bad_input():
    with pytest.raises(DataError, match="two or more effects"):
        Design.from_arrays(response(1, 1), X, [Term(g, covariance="homcs")])
    one = symmetric(response(1, 1), "grouped")
    other = Design.from_arrays(response(1, 1), X, [Term(g, DUMMIES, "g", tuple("abc"))])
    with pytest.raises(DataError, match="different covariances"):
        stack([one, other])
