"""A covariance that is a user's own function, from arrays: against the built-in families, nested
models, dense algebra and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml import Design, Term, datasets, estimate, stack
from jaxreml.covariance import custom
from jaxreml.model.covariance.correlations import Autoregressive
from jaxreml.model.covariance.custom import Transform
from jaxreml.model.covariance.natural import places
from jaxreml.model.covariance.own import Own
from jaxreml.model.covariance.residual import Residual
from jaxreml.optimum.effects import inspect_on_host
from jaxreml.optimum.estimate import estimate_on_host
from jaxreml.status import Status

GROUPS, KINDS, REPEATS = 12, 3, 3
g = np.repeat(np.arange(GROUPS), KINDS * REPEATS)[:-5]  # not balanced
f = np.tile(np.repeat(np.arange(KINDS), REPEATS), GROUPS)[:-5]
n = g.size
rng = np.random.default_rng(5)
X = np.column_stack([np.ones(n), f == 1, rng.normal(size=n)])
DUMMIES = np.eye(KINDS)[f]


def symmetric(at, variance, rho):
    return variance * ((1 - rho) * jnp.eye(len(at)) + rho)


def ar1(at, variance, rho):
    return variance * rho ** jnp.abs(at[:, None] - at)


def nearness(at, range):
    return jnp.exp(-jnp.abs(at[:, None] - at) / range)


def two(at, variance_shared, variance, range):
    return variance_shared + variance * nearness(at, range)


SYMMETRIC = custom(symmetric, {"variance": 1.0, "rho": 0.2}, {"rho": (-1 / (KINDS - 1), 1)})
AR1 = custom(ar1, {"variance": 1.0, "rho": 0.3}, {"rho": "tanh"})
TWO = custom(two, {"variance_shared": 1.0, "variance": 2.0, "range": 1.5}, {"range": "log"})


def response(along: float, across: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(GROUPS, KINDS))
    mean = effects.mean(axis=1, keepdims=True)
    effects = across * (effects - mean) + along * mean
    return 3 + X @ [1.0, 0.5, -0.2] + effects[g, f] + rng.normal(size=n)


def near_response(seed: int) -> np.ndarray:
    """Of effects that share something, and neighbours more."""
    rng = np.random.default_rng(seed)
    lags = np.abs(np.subtract.outer(np.arange(KINDS), np.arange(KINDS)))
    effects = rng.multivariate_normal(np.zeros(KINDS), 1 + 3 * np.exp(-lags), size=GROUPS)
    return 3 + X @ [1.0, 0.5, -0.2] + effects[g, f] + rng.normal(size=n)


def design_of(y, covariance) -> Design:
    return Design.from_arrays(y, X, [Term(g, DUMMIES, "g", covariance=covariance)])


def dense_criterion(parameters: np.ndarray, y: np.ndarray, covariance) -> float:
    """By its definition; parameters as those of a design."""
    block = covariance(KINDS)
    omega = block.natural(parameters[:-1], parameters[-1])[places(KINDS)]
    V = np.exp(parameters[-1]) * (DUMMIES @ omega @ DUMMIES.T * np.equal.outer(g, g) + np.eye(n))
    inverse = np.linalg.inv(V)
    M = X.T @ inverse @ X
    r = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
    logs = np.linalg.slogdet(V)[1] + np.linalg.slogdet(M)[1]
    return float((n - X.shape[1]) * np.log(2 * np.pi) + logs + r @ inverse @ r)


def slopes(function, at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    ways = step * np.eye(len(at))
    return np.stack([(function(at + h) - function(at - h)) / (2 * step) for h in ways], axis=-1)


def test_symmetric_equals_the_nested_model():
    y = response(2.0, 0.8)
    design = design_of(y, SYMMETRIC)
    own, _ = estimate_on_host(design)
    nested = Design.from_arrays(y, X, [Term(g, name="g"), Term(g * KINDS + f, name="g:f")])
    wanted, _ = estimate_on_host(nested)
    assert own.status == Status.CONVERGED and not own.is_singular
    assert own.criterion == pytest.approx(float(wanted.criterion), abs=1e-8)
    np.testing.assert_allclose(own.beta, wanted.beta, rtol=1e-7)
    np.testing.assert_allclose(own.vcov, wanted.vcov, rtol=1e-6)
    between, within, _ = np.exp(wanted.log_variances)
    assert own.log_variances[0] == pytest.approx(np.log(between + within), rel=1e-6)
    share = np.array([between, within, 0]) / (between + within)
    se = np.sqrt(share @ wanted.parameters_vcov @ share)
    assert own.log_variance_se[0] == pytest.approx(se, rel=1e-5)
    rho = SYMMETRIC(KINDS).function.transforms[1].value(own.parameters[1])
    assert rho == pytest.approx(between / (between + within), rel=1e-6)
    looked = inspect_on_host(own, design, "REML")
    assert looked.criterion == pytest.approx(own.criterion, abs=1e-9)
    assert np.linalg.norm(looked.gradient) < 1e-5
    levels = [modes[:GROUPS] for modes in looked.modes]
    of_nested = inspect_on_host(wanted, nested, "REML").modes
    # What nothing was seen of is no level of g:f.
    seen = np.unique(g * KINDS + f)
    both = of_nested[0][seen // KINDS, 0] + of_nested[1][:, 0]
    np.testing.assert_allclose(levels[0].ravel()[seen], both, rtol=1e-6, atol=1e-8)


def test_optimum_and_standard_errors_are_those_of_dense_algebra():
    y = near_response(3)
    own, _ = estimate_on_host(design_of(y, TWO))
    assert own.status == Status.CONVERGED and np.isfinite(own.parameters).all()
    at = np.asarray(own.parameters)

    def criterion(p):
        return np.array(dense_criterion(p, y, TWO))

    assert criterion(at) == pytest.approx(float(own.criterion), abs=1e-8)
    for way in np.random.default_rng(0).normal(size=(3, len(at))):
        ends = [float(criterion(at + h * way)) for h in (1e-3, -1e-3)]
        assert abs(ends[0] - ends[1]) / 2e-3 < 1e-4
        bend = (sum(ends) - 2 * float(own.criterion)) / 1e-6
        assert bend == pytest.approx(way @ own.hessian @ way, rel=1e-4)
    np.testing.assert_allclose(own.parameters_vcov @ own.hessian, 2 * np.eye(len(at)), atol=1e-8)


def test_a_function_without_variance_is_multiplied_by_one():
    y = near_response(3)
    powers = custom(lambda at, rho: ar1(at, 1.0, rho), {"rho": 0.3}, {"rho": "tanh"})
    design = design_of(y, powers)
    assert design.parameter_names[:2] == ("log_variance[g]", "z[g, rho]")
    first, second = (estimate_on_host(design_of(y, own))[0] for own in (powers, AR1))
    np.testing.assert_allclose(first.parameters, second.parameters, rtol=1e-7)


def test_data_of_the_effects():
    y = near_response(3)
    times = np.array([0.0, 2.0, 4.0])
    far = custom(nearness, {"range": 1.0}, {"range": "log"}, data=times)
    near = custom(nearness, {"range": 1.0}, {"range": "log"})
    first, second = (estimate_on_host(design_of(y, own))[0] for own in (far, near))
    assert float(first.criterion) == pytest.approx(float(second.criterion), abs=1e-8)
    assert first.parameters[1] == pytest.approx(second.parameters[1] + np.log(2), abs=1e-6)
    assert near(KINDS) == custom(nearness, {"range": 1.0}, {"range": "log"})(KINDS)
    assert near(KINDS) != far(KINDS)


def test_boundary():
    """Exact zeros without standard errors, and what they leave unknown; the others are given
    them."""
    found, _ = estimate_on_host(design_of(response(0.0, 0.0, seed=2), TWO))
    assert found.status == Status.CONVERGED and found.is_singular
    assert np.isneginf(found.parameters[:2]).all() and np.isnan(found.parameters[2])
    assert np.isnan(found.parameters_vcov[:3]).all() and np.isfinite(found.log_variance_se[-1])
    found, _ = estimate_on_host(design_of(near_response(8), TWO))
    assert found.status == Status.CONVERGED and np.isneginf(found.parameters[0])
    alone = custom(nearness, {"range": 1.5}, {"range": "log"})
    wanted, _ = estimate_on_host(design_of(near_response(8), alone))
    np.testing.assert_allclose(found.parameters[1:], wanted.parameters, rtol=1e-6)
    vcov = np.asarray(found.parameters_vcov)[1:, 1:]
    np.testing.assert_allclose(vcov, wanted.parameters_vcov, rtol=1e-5)


def test_derivatives_of_the_block():
    block = TWO(KINDS)
    chart = np.array([0.7, 1.1, 0.4])
    gradient = np.random.default_rng(0).normal(size=6)
    first, second = block.slopes(chart, gradient)
    np.testing.assert_allclose(first, slopes(block.omega, chart), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(
        second, slopes(lambda c: gradient @ block.jacobian(c), chart), rtol=1e-6, atol=1e-8
    )
    report = block.report(chart, np.array(0.3))
    np.testing.assert_allclose(
        block.natural(report.shown, np.array(0.3)), block.omega(chart), rtol=1e-12
    )
    factor = block.factor(chart)
    np.testing.assert_allclose((factor @ factor.T)[np.tril_indices(3)], _lower(block, chart))
    np.testing.assert_allclose(block.chart_at(factor, report.shown, np.array(0.3)), chart)
    first, second = block.derivatives(report.finite, np.array(0.3), gradient)

    def natural(p):
        return block.natural(p, np.array(0.3))

    np.testing.assert_allclose(first, slopes(natural, report.finite), rtol=1e-6, atol=1e-8)
    bend = slopes(lambda p: gradient @ slopes(natural, p), report.finite)
    np.testing.assert_allclose(second, bend, rtol=1e-4, atol=1e-6)
    directions = block.directions(report.finite, np.array(0.3))
    np.testing.assert_allclose(directions, first, rtol=1e-12)
    # Second derivatives in the user's parameters, of which these are the logarithms
    stated, root = np.exp(report.finite), np.random.default_rng(1).normal(size=(4, 4))
    spread = root @ root.T
    weights = spread[:3, :3] * stated[:, None] * stated

    def curved(s):
        return slopes(lambda s: block.natural(np.log(s), np.array(0.3)), s)

    expected = np.einsum("tij,ij->t", slopes(curved, stated), weights)
    found = np.asarray(block.bend(report.finite, np.array(0.3), spread))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    lanes = np.stack([chart, chart + 0.1], axis=1)
    np.testing.assert_allclose(block.omega(lanes)[:, 0], block.omega(chart), rtol=1e-12)
    np.testing.assert_allclose(block.jacobian(lanes)[..., 0], block.jacobian(chart), rtol=1e-12)


def _lower(block: Own, chart: np.ndarray) -> np.ndarray:
    return block.omega(chart)[places(block.size)][np.tril_indices(block.size)]


@pytest.mark.parametrize(
    "given", ["log", "tanh", "logit", "identity", (1.0, 4.0), (2.0, np.inf), (-np.inf, 1.0)]
)
def test_transforms(given):
    kind = Transform.of(given, "x")
    z = np.array([-2.0, -0.1, 0.0, 1.3])
    values = kind.value(z)
    assert np.all((values > kind.domain[0]) & (values < kind.domain[1]))
    np.testing.assert_allclose(kind.coordinate(values), z, rtol=1e-10, atol=1e-12)
    steps = (kind.value(z + 1e-5) - kind.value(z - 1e-5)) / 2e-5
    np.testing.assert_allclose(kind.slope(z), steps, rtol=1e-7)
    steps = (kind.slope(z + 1e-5) - kind.slope(z - 1e-5)) / 2e-5
    np.testing.assert_allclose(kind.bend(z), steps, rtol=1e-7, atol=1e-9)


def test_search_leaves_out_what_is_no_covariance():
    """A parameter without bounds, though the matrix has some: the optimum is inside all the
    same."""
    free = custom(symmetric, {"variance": 1.0, "rho": 0.2}, {"rho": "identity"})
    y = response(0.6, 1.5)
    first, second = (estimate_on_host(design_of(y, own))[0] for own in (free, SYMMETRIC))
    assert first.status == Status.CONVERGED
    assert float(first.criterion) == pytest.approx(float(second.criterion), abs=1e-8)


EYE = jnp.eye(4)
BAD = {
    "shape": (lambda at, variance: variance * jnp.eye(3), r"shape \(4, 4\).*\(3, 3\)"),
    "symmetric": (lambda at, variance: variance * EYE.at[0, 1].set(0.5), "not symmetric.*0.5"),
    "definite": (lambda at, variance: variance * (EYE - 0.5), "not positive semidefinite.*-1 to 1"),
    "finite": (lambda at, variance: variance * EYE / at, "inf in row 0, column 0"),
    "proportional": (lambda at, variance: variance * EYE + 1, "proportional to its variances"),
    "arguments": (lambda at, v: v * EYE, "fn.at, variance.*unexpected keyword"),
    "NumPy": (lambda at, variance: np.exp(variance) * EYE, "jax.numpy"),
    "conditions": (lambda at, variance: EYE if variance > 0 else 0, "conditions"),
    "complex": (lambda at, variance: variance * EYE * 1j, "real numbers, not complex"),
    "integers": (lambda at, variance: jnp.ones((4, 4), int), "real numbers, not int"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_functions(what):
    function, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        custom(function, {"variance": 1.0})(4)


@pytest.mark.parametrize(
    ("function", "start", "message"),
    [
        (lambda at, r: EYE + 0 * jnp.sqrt(r), 0.0, "derivatives.*not finite.*r = 0"),
        (lambda at, r: EYE * (1 + jax.lax.stop_gradient(r * r) + r), 1.0, "first deriv.*'r'"),
        (lambda at, r: EYE, 1.0, "does not depend on 'r'"),
    ],
    ids=["not finite", "stopped", "unused"],
)
def test_bad_derivatives(function, start, message):
    with pytest.raises(ValueError, match=message):
        custom(function, {"r": start}, {"r": "identity"})(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"rho": 0.3},), "say what 'rho' is"),
        (({"rho": 1.3}, {"rho": "tanh"}), "starts at 1.3.*between -1 and 1"),
        (({"rho": 0.3}, {"r": "tanh"}), "no parameter of 'nearness'"),
        (({"rho": 0.3}, {"rho": "tan"}), "transform of 'rho'.*not 'tan'"),
        (({"rho": 0.3}, {"rho": (1, 0)}), "bounds of 'rho'"),
        (({},), "dict of names and starts"),
        (({"variance": "a"},), "must be a number, not 'a'"),
        (({"variance": np.ones((2, 2))},), "number or a vector"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        custom(nearness, *arguments)


@pytest.mark.long
def test_under_jax():
    """The same estimate compiled, in a batch, and with derivatives through the fit."""
    responses = [near_response(seed) for seed in (3, 4, 6)]
    together = jax.jit(jax.vmap(estimate))(stack([design_of(y, TWO) for y in responses]))
    for k, y in enumerate(responses):
        alone, _ = estimate_on_host(design_of(y, TWO))
        np.testing.assert_allclose(together.parameters[k], alone.parameters, rtol=1e-6)
        np.testing.assert_allclose(
            together.parameters_vcov[k], alone.parameters_vcov, rtol=1e-5, equal_nan=True
        )

    def coordinates(y):
        return estimate(design_of(y, AR1)).parameters

    y, way = jnp.asarray(responses[0]), np.random.default_rng(1).normal(size=n)
    slope = jax.jit(jax.jacrev(coordinates))(y)
    up, down = (estimate_on_host(design_of(y + h * way, AR1))[0].parameters for h in (1e-4, -1e-4))
    np.testing.assert_allclose(slope @ way, (up - down) / 2e-4, rtol=1e-5)


def visits_design(covariance) -> Design:
    """Of orthodont's rows, the last visit of every third child missing."""
    data = datasets.load("orthodont")
    data = data.drop(data.index[3::12])
    age, male = data["age"].to_numpy(), (data["Sex"] == "Male").to_numpy(float)
    columns = np.column_stack([np.ones(len(data)), age, male])
    visits = np.eye(4)[((age - 8) / 2).astype(int)]
    term = Term(data["Subject"].astype(str), visits, "Residual", tuple("abcd"), covariance)
    return Design.from_arrays(data["distance"], columns, [term])


def unequal(at, variances, rho):
    sds = jnp.sqrt(variances)
    return sds[:, None] * sds * rho ** jnp.abs(at[:, None] - at)


@pytest.mark.parametrize("each", [False, True])
def test_of_residuals_equals_the_family(each):
    starts = {"variances": np.ones(4) if each else np.ones(1), "rho": 0.3}
    own = custom(unequal, starts, {"rho": "tanh"})
    family = Residual(4, Autoregressive(4), (0, 1, 2, 3) if each else (0,) * 4)
    designs = [visits_design(covariance) for covariance in (own.residual, lambda size: family)]
    first, second = (estimate_on_host(design)[0] for design in designs)
    assert first.status == Status.CONVERGED
    assert float(first.criterion) == pytest.approx(float(second.criterion), abs=1e-8)
    np.testing.assert_allclose(first.parameters, second.parameters, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(first.parameters_vcov, second.parameters_vcov, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(first.vcov_slopes, second.vcov_slopes, rtol=1e-5, atol=1e-8)
    if each:
        assert designs[0].parameter_names[0] == "log_variance[Residual, variances[1]]"
        assert designs[0].parameter_names[-1] == "log_variance[Residual, variances[0]]"


def test_derivatives_of_the_block_of_residuals():
    block = custom(unequal, {"variances": np.ones(4), "rho": 0.3}, {"rho": "tanh"}).residual(4)
    chart = np.array([0.2, -0.3, 0.1, 0.5])
    gradient = np.random.default_rng(0).normal(size=10)
    first, second = block.slopes(chart, gradient)
    np.testing.assert_allclose(first, slopes(block.omega, chart), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        second, slopes(lambda c: gradient @ block.jacobian(c), chart), rtol=1e-6, atol=1e-7
    )


def test_residuals_need_a_definite_matrix():
    with pytest.raises(ValueError, match="not positive definite"):
        custom(lambda at, variance: variance * jnp.ones((4, 4)), {"variance": 1.0}).residual(4)
