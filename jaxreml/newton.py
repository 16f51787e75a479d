"""Safeguarded Newton iteration for a few parameters: one expansion of the function per step.

Steps are Newton steps in the eigenbasis of the Hessian with the eigenvalues' absolute values, so
they go downhill where the function is not convex, cut to a radius that follows how well the
quadratic model predicted the last step. Convergence is on the gradient alone, as half the squared
Newton step in the metric of the Hessian (the Newton decrement: how far the function still is above
its minimum), together with a Hessian without negative eigenvalues. A converged point is polished
by one full step and `snap`, which may move it to an exact boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

FLAT = 1e-10  # eigenvalues below this fraction of the largest count as zero
NEGATIVE = 1e-8  # ... and below minus this fraction as negative
ESCAPE = 0.3  # first step away from a saddle point, in units of the coordinates
ROUNDING = 1e-13  # relative change of the function that rounding alone can make


class Trace(NamedTuple):
    """Outcome of `minimise`.

    Attributes:
        at: (m,), the last accepted point.
        point: what `expand` returned there.
        iterations: expansions computed.
        converged: whether the decrement reached the tolerance where no eigenvalue is negative.
        stalled: whether the radius collapsed: no downhill step could be found.
    """

    at: Array
    point: Any
    iterations: Array
    converged: Array
    stalled: Array


class _State(NamedTuple):
    trace: Trace
    step: Array
    predicted: Array
    radius: Array
    polish: Array


def minimise(
    expand: Callable[[Array], Any],
    start: Array,
    snap: Callable[[Array], Array],
    *,
    tolerance: float,
    max_iterations: int,
) -> Trace:
    """Minimise a smooth function.

    Args:
        expand: a point (m,) to a NamedTuple with `value` (), `gradient` (m,) and `hessian` (m, m)
            among its fields. NaN means outside.
        start: (m,).
        snap: maps a converged point to the equivalent or nearby point to report. It is kept if
            the function there is no higher than the tolerance allows.
        tolerance: of the Newton decrement, in units of the function.
        max_iterations: expansions allowed.
    """
    false = jnp.zeros((), bool)
    shapes = jax.eval_shape(expand, start)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    one = jnp.ones((), start.dtype)
    initial = _State(
        Trace(start, nothing._replace(value=one * jnp.inf), jnp.zeros((), int), false, false),
        step=jnp.zeros_like(start),
        predicted=one,
        radius=one,
        polish=false,
    )

    def unfinished(state: _State) -> Array:
        trace = state.trace
        return ~(trace.converged | trace.stalled) & (trace.iterations < max_iterations)

    def advance(state: _State) -> _State:
        old = state.trace
        trial = old.at + state.step
        trial = jnp.where(state.polish, snap(trial), trial)
        new = expand(trial)
        noise = ROUNDING * jnp.abs(new.value) + tolerance
        # A rejected polish leaves the converged point as it is.
        gain = old.point.value - new.value
        accept = jnp.isfinite(new.value) & jnp.all(jnp.isfinite(new.hessian)) & (gain >= -noise)
        at, point = jax.tree.map(
            lambda tried, kept: jnp.where(accept, tried, kept), (trial, new), (old.at, old.point)
        )

        ratio = gain / state.predicted
        length = jnp.linalg.norm(state.step)
        poor = ~accept | ((ratio < 0.1) & (state.predicted > noise))
        radius = jnp.where(poor, length / 4, state.radius)
        radius = jnp.where(
            accept & (ratio > 0.7) & (length > 0.9 * state.radius), 3 * radius, radius
        )
        radius = jnp.where(jnp.isfinite(old.point.value), radius, state.radius)

        step, decrement, escape, negative = _step(point.gradient, point.hessian)
        near = decrement <= tolerance
        saddle = near & negative
        step = jnp.where(saddle, escape, step)
        step = step * jnp.minimum(1.0, radius / jnp.linalg.norm(step).clip(1e-300))
        predicted = -(point.gradient @ step + step @ point.hessian @ step / 2)
        converged = state.polish & ~(accept & saddle)
        stalled = ~converged & ~jnp.isfinite(point.value)
        stalled = stalled | (~converged & ~near & (radius < 1e-10))
        trace = Trace(at, point, old.iterations + 1, converged, stalled)
        return _State(trace, step, predicted, radius, near & ~negative)

    return jax.lax.while_loop(unfinished, advance, initial).trace


def _step(gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
    """Newton step, its decrement, a step along negative curvature, whether there is any."""
    values, vectors = jnp.linalg.eigh(hessian, symmetrize_input=False)
    size = jnp.max(jnp.abs(values))
    size = jnp.where(size > 0, size, 1.0)
    along = gradient @ vectors
    scaled = along / jnp.maximum(jnp.abs(values), FLAT * size)
    return (
        -vectors @ scaled,
        along @ scaled / 2,
        ESCAPE * vectors[:, 0],
        values[0] < -NEGATIVE * size,
    )


def inertia(hessian: Array) -> Array:
    """Numbers of negative, zero and positive eigenvalues, (3,) integers."""
    values = jnp.linalg.eigvalsh(hessian)
    size = jnp.max(jnp.abs(values))
    negative = values < -NEGATIVE * size
    positive = values > NEGATIVE * size
    return jnp.stack([negative.sum(), (~negative & ~positive).sum(), positive.sum()])


def solve_flat(hessian: Array, right: Array) -> Array:
    """Minimum-norm solution of ``hessian x = right``, flat directions left out."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(hessian))
    size = jnp.max(jnp.abs(values))
    flat = jnp.where(jnp.abs(values) <= FLAT * size, 1.0, 0.0)
    onto_flat = (vectors * flat) @ vectors.T
    return jnp.linalg.solve(hessian + size * onto_flat, right - onto_flat @ right)
