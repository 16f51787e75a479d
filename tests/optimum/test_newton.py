"""The search by itself: on functions with known minima, and its rules one by one."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxreml.optimum import hessian as hessian_rules
from jaxreml.optimum import newton

TOLERANCE = 1e-12


class Point(NamedTuple):
    """What `newton.minimise` asks of a function."""

    value: Array
    gradient: Array
    hessian: Array


def expanded(function):
    """The function with its derivatives; lanes on the last axis."""

    def one(at):
        return Point(function(at), jax.grad(function)(at), jax.hessian(function)(at))

    def expand(at):
        return one(at) if at.ndim == 1 else jax.vmap(one, in_axes=-1, out_axes=-1)(at)

    return expand


def same(at):
    return at


@lru_cache
def compiled(function, snap=same, **options):
    def minimise(at, limit, radius):
        return newton.minimise(
            expanded(function),
            at,
            snap,
            tolerance=TOLERANCE,
            max_iterations=limit,
            radius=radius,
            **options,
        )

    return jax.jit(minimise)


def search(function, start, limit=200, radius=None, **options):
    start = jnp.asarray(start, float)
    radius = jnp.ones(start.shape[1:]) if radius is None else radius
    return compiled(function, **options)(start, limit, radius)


def quadratic(at):
    return 3.0 + (at[0] - 1) ** 2 + 10 * (at[1] + 2) ** 2 + at[0] * at[1]


def rosenbrock(at):
    return (1 - at[0]) ** 2 + 100 * (at[1] - at[0] ** 2) ** 2


def bowl_with_an_edge(at):
    """A minimum near the edge of where the function is defined: at 0.01."""
    return at[0] / 0.01 - jnp.log(at[0]) + at[1] ** 2


def saddle(at):
    """A saddle point at zero, between minima of -1/4 at (+-1, 0)."""
    return at[0] ** 4 / 4 - at[0] ** 2 / 2 + at[1] ** 2


CASES = {
    "quadratic": (quadratic, [0.5, 0.5], np.linalg.solve([[2, 1], [1, 20]], [2, -40])),
    "quadratic from afar": (quadratic, [1e3, -1e3], np.linalg.solve([[2, 1], [1, 20]], [2, -40])),
    "rosenbrock": (rosenbrock, [-1.2, 1.0], [1, 1]),
    "edge": (bowl_with_an_edge, [3.0, 1.0], [0.01, 0]),
    "saddle": (saddle, [0.1, 1.0], [1, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_finds_the_minimum(name):
    function, start, minimum = CASES[name]
    trace = search(function, start)
    assert trace.converged and not trace.stalled
    np.testing.assert_allclose(trace.at, minimum, rtol=1e-6, atol=1e-7)
    assert trace.point.value <= function(jnp.asarray(minimum, float)) + TOLERANCE


def test_one_step_to_the_minimum_of_a_quadratic_and_one_to_polish():
    assert search(quadratic, [2.0, -2.1]).iterations == 3


@pytest.mark.parametrize("careful", [False, True])
def test_lanes_find_what_single_searches_find(careful):
    starts = np.array([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0], [1.0, 1.0], [0.3, 3.0]]).T
    together = search(rosenbrock, starts, careful=careful)
    assert together.converged.all()
    for k, start in enumerate(starts.T):
        alone = search(rosenbrock, start)
        np.testing.assert_allclose(together.at[:, k], alone.at, atol=1e-6)
        # Single searches look at where the last step leads.
        assert together.iterations[k] <= alone.iterations + 5


def test_leaves_a_saddle_point_by_an_eigenvector():
    at_the_saddle = search(saddle, [0.0, 0.0])
    assert at_the_saddle.converged
    np.testing.assert_allclose(np.abs(at_the_saddle.at), [1, 0], atol=1e-6)
    starts = np.array([[0.0, 0.0], [0.5, 1.0]]).T
    careful = search(saddle, starts, careful=True)
    assert careful.converged.all()
    np.testing.assert_allclose(np.abs(careful.at), [[1, 1], [0, 0]], atol=1e-6)
    quick = search(saddle, starts)
    assert quick.stalled.tolist() == [True, False]
    assert quick.converged.tolist() == [False, True]


def test_ends_where_there_is_no_number():
    outside = search(bowl_with_an_edge, [-1.0, 0.0])
    assert outside.stalled and not outside.converged and outside.iterations == 1
    limited = search(rosenbrock, [-1.2, 1.0], limit=3)
    assert limited.iterations == 3 and not limited.converged and not limited.stalled


def test_goes_on_from_where_another_search_stopped():
    first = search(rosenbrock, [-1.2, 1.0], limit=6)
    second = search(rosenbrock, first.at, radius=first.radius)
    whole = search(rosenbrock, [-1.2, 1.0])
    np.testing.assert_allclose(second.at, whole.at, atol=1e-9)
    assert first.iterations + second.iterations == whole.iterations + 1  # one point twice


def test_snaps_to_a_point_that_is_no_higher():
    to_the_edge = search(lambda at: at[0] ** 4 + at[1] ** 2, [0.5, 1.0], snap=jnp.round)
    assert to_the_edge.converged and to_the_edge.at.tolist() == [0.0, 0.0]
    too_high = search(quadratic, [0.9, -2.0], snap=lambda at: at + 1.0)
    assert too_high.converged
    np.testing.assert_allclose(too_high.at, CASES["quadratic"][2], rtol=1e-6)


def test_flat_directions_do_not_lead_astray():
    """x y is the same along (x, -y), where its second derivative is negative inside."""

    def valley(at):
        return (at[0] * at[1] - 1) ** 2

    trace = search(valley, [0.9, 0.3], flat=lambda at: (at * jnp.array([1.0, -1.0]))[None])
    assert trace.converged
    assert float(trace.at[0] * trace.at[1]) == pytest.approx(1, abs=1e-6)


def test_costly_expansions_are_exact_only_near_the_optimum():
    asked = []

    def expand(at, exact):
        jax.debug.callback(lambda flag: asked.append(bool(flag)), exact)
        point = expanded(rosenbrock)(at)
        return point._replace(hessian=jnp.where(exact, 1.0, 1.3) * point.hessian)

    trace = newton.minimise(
        expand,
        jnp.array([-1.2, 1.0]),
        lambda at: at,
        tolerance=TOLERANCE,
        max_iterations=100,
        settled=lambda at: jnp.array(False),
    )
    jax.effects_barrier()
    assert trace.converged
    assert asked == sorted(asked) and not asked[0] and asked[-1]
    assert sum(not exact for exact in asked) <= newton.PATIENCE + 1


class TestRules:
    def test_radius(self):
        def radius(gain, length=1.0, predicted=1.0, noise=0.0, accept=True):
            return float(newton.next_radius(2.0, length, gain, predicted, noise, jnp.array(accept)))

        assert radius(0.5) == 2.0  # as predicted more or less
        assert radius(0.05) == 0.25  # a quarter of the step
        assert radius(0.05, noise=2.0) == 2.0  # no more than rounding
        assert radius(0.9, length=2.0) == 6.0  # the radius was in the way
        assert radius(0.9, length=1.0) == 2.0
        assert radius(0.9, length=2.0, accept=False) == 0.5

    def test_cut(self):
        np.testing.assert_allclose(newton.cut(jnp.array([3.0, 4.0]), 1.0), [0.6, 0.8])
        np.testing.assert_allclose(newton.cut(jnp.array([3.0, 4.0]), 9.0), [3, 4])
        np.testing.assert_allclose(newton.cut(jnp.zeros(2), 1.0), [0, 0])

    def test_steps_are_newtons_where_the_function_is_convex(self):
        gradient, hessian = jnp.array([1.0, 2.0]), jnp.array([[4.0, 1.0], [1.0, 3.0]])
        expected = -np.linalg.solve(hessian, gradient)
        decrement = -float(gradient @ expected) / 2
        one = hessian_rules.eigen_step(gradient, hessian)
        lane = hessian_rules.shifted_step(gradient[:, None], hessian[..., None])
        np.testing.assert_allclose(one.newton, expected, rtol=1e-12)
        np.testing.assert_allclose(lane.newton[:, 0], expected, rtol=1e-7)
        assert float(one.decrement) == pytest.approx(decrement)
        assert float(lane.decrement[0]) == pytest.approx(decrement, rel=1e-7)
        assert not one.negative and not lane.negative[0]

    def test_steps_go_downhill_where_it_is_not(self):
        gradient, hessian = jnp.array([1.0, 2.0]), jnp.array([[-4.0, 1.0], [1.0, 3.0]])
        one = hessian_rules.eigen_step(gradient, hessian)
        lane = hessian_rules.shifted_step(gradient[:, None], hessian[..., None])
        assert one.negative and lane.negative[0]
        assert gradient @ one.newton < 0 and gradient @ lane.newton[:, 0] < 0
        assert float(one.escape @ hessian @ one.escape) < 0 and not lane.escape.any()

    def test_steepened(self):
        hessian = jnp.array([[3.0, 1.0], [1.0, -2.0]])
        made = hessian_rules.steepened(hessian, jnp.array([[0.0, 0.1]]))
        np.testing.assert_allclose(made, [[3, 1], [1, 2]])  # |H| is at most 4, a sum of a row
        np.testing.assert_allclose(hessian_rules.steepened(hessian, None), hessian)
        np.testing.assert_allclose(hessian_rules.steepened(hessian, jnp.zeros((1, 2))), hessian)

    def test_predicted_gain_is_that_of_the_quadratic_model(self):
        point = expanded(quadratic)(jnp.array([0.3, 0.7]))
        step = jnp.array([0.2, -1.0])
        expected = point.value - quadratic(jnp.array([0.5, -0.3]))
        assert float(newton.predicted_gain(point, step)) == pytest.approx(float(expected))

    def test_inertia_and_convexity(self):
        hessian = jnp.diag(jnp.array([1.0, 0.0, -1e-12, -2.0]))
        assert hessian_rules.inertia(hessian).tolist() == [1, 2, 1]
        assert not hessian_rules.is_convex(hessian) and hessian_rules.is_convex(hessian[:3, :3])
        lanes = jnp.stack([jnp.eye(2), -jnp.eye(2)], axis=-1)
        assert hessian_rules.is_convex(lanes).tolist() == [True, False]

    def test_solve_flat_leaves_flat_directions_out(self):
        hessian = jnp.array([[2.0, 2.0], [2.0, 2.0]])
        found = hessian_rules.solve_flat(hessian, jnp.array([[4.0], [4.0]]))
        np.testing.assert_allclose(found, [[1], [1]], rtol=1e-9)


def test_when_a_hessian_must_be_exact():
    least = 1e-12
    first = newton.needs_exact(np.float64(9.0), np.inf, least)
    assert not first  # there is no rate yet
    assert newton.needs_exact(np.float64(1e-5), np.float64(1.0), 1e-9)  # the next is the last
    assert not newton.needs_exact(np.float64(1e-2), np.float64(1.0), least)
    assert newton.needs_exact(np.float64(1e-4), np.float64(1e-3), least)  # slow, near the optimum
