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

from jaxreml.model import linalg

FLAT = 1e-10  # eigenvalues below this fraction of the largest count as zero
NEGATIVE = 1e-8  # ... and below minus this fraction as negative
ESCAPE = 0.3  # first step away from a saddle point, in units of the coordinates
ROUNDING = 1e-13  # relative change of the function that rounding alone can make
RESOLUTION = 1e-16  # a decrement below this fraction of the function is none
NEAR = 1e-3  # below this decrement, an approximate Hessian that leaves more than
SLOW = 0.03  # of it in one step is not worth it
PATIENCE = 12  # steps with approximate Hessians at most
SHIFT = 1e-8  # as NEGATIVE, for the Cholesky factorisation of a batch


class Trace(NamedTuple):
    """Outcome of `minimise`.

    Attributes:
        at: (m,), the last accepted point.
        point: what `expand` returned there.
        iterations: expansions computed.
        converged: whether the decrement reached the tolerance where no eigenvalue is negative.
        stalled: whether the radius collapsed: no downhill step could be found.
        radius: of the next step, to go on from here.
    """

    at: Array
    point: Any
    iterations: Array
    converged: Array
    stalled: Array
    radius: Array


class _State(NamedTuple):
    trace: Trace
    step: Array
    predicted: Array
    polish: Array
    decrement: Array  # of the last step
    exact: Array  # what is asked of the next expansion
    is_exact: Array  # what the point has


def minimise(
    expand: Callable[..., Any],
    start: Array,
    snap: Callable[[Array], Array],
    *,
    tolerance: float,
    max_iterations: int | Array,
    flat: Callable[[Array], Array | None] | None = None,
    radius: Array | None = None,
    careful: bool = False,
    settled: Callable[[Array], Array] | None = None,
) -> Trace:
    """Minimise a smooth function, or as many as there are lanes: one more axis at the end.

    Lanes move on their own; those that have ended wait for the slowest. Unless `careful`, their
    steps come from a Cholesky factorisation instead of eigenvectors, which finds no way off a
    saddle point: there they stall. They take the last step and `snap` without a look at where it
    leads (`point` stays the one before), as their caller certifies what comes out; if `careful`,
    where the function is no higher.

    Args:
        expand: a point (m,) to a NamedTuple with `value` (), `gradient` (m,) and `hessian` (m, m)
            among its fields. NaN means outside.
        start: (m,).
        snap: maps a converged point to the equivalent or nearby point to report. It is kept if
            the function there is no higher than the tolerance allows.
        tolerance: of the Newton decrement, in units of the function.
        max_iterations: expansions allowed.
        flat: directions at a point, (d, m), in which the function does not change to first order.
            Its second derivative there vanishes at the optimum only and may be negative elsewhere,
            which is no reason to leave Newton's step: steps keep out of them.
        radius: of the first step, (), to go on where another search stopped; 1 if left out.
        careful: see above; without lanes it changes nothing.
        settled: given for a costly `expand`, which then takes a second argument: whether the
            Hessian must be exact. Approximate ones lead to the neighbourhood of the optimum. A
            converged point whose decrement is rounding error is not polished if `settled` there:
            if `snap` would not change it.
    """
    lanes = start.shape[1:]
    false = jnp.zeros(lanes, bool)
    costly = settled is not None

    def expansion(point: Array, exact: Array | bool) -> Any:
        return expand(point, exact) if costly else expand(point)

    shapes = jax.eval_shape(expansion, start, True)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    one = jnp.ones(lanes, start.dtype)
    initial = _State(
        Trace(
            start,
            nothing._replace(value=one * jnp.inf),
            jnp.zeros(lanes, int),
            converged=false,
            stalled=false,
            radius=one if radius is None else radius,
        ),
        step=jnp.zeros_like(start),
        predicted=one,
        polish=false,
        decrement=one * jnp.inf,
        exact=false if costly else ~false,
        is_exact=false,
    )

    rule = _step
    if lanes:
        rule = jax.vmap(_step, in_axes=-1, out_axes=-1) if careful else _shifted_step

    def unfinished(trace: Trace) -> Array:
        return ~(trace.converged | trace.stalled) & (trace.iterations < max_iterations)

    def advance(state: _State) -> _State:
        old = state.trace
        trial = old.at + state.step
        if not lanes:
            trial = jnp.where(state.polish, snap(trial), trial)
        new = expansion(trial, state.exact)
        noise = ROUNDING * jnp.abs(new.value) + tolerance
        # A rejected polish leaves the converged point as it is.
        gain = old.point.value - new.value
        finite = jnp.isfinite(new.value) & jnp.all(jnp.isfinite(new.hessian), axis=(0, 1))
        accept = finite & (gain >= -noise)
        at, point = jax.tree.map(
            lambda tried, kept: jnp.where(accept, tried, kept), (trial, new), (old.at, old.point)
        )

        ratio = gain / state.predicted
        length = _norm(state.step)
        poor = ~accept | ((ratio < 0.1) & (state.predicted > noise))
        radius = jnp.where(poor, length / 4, old.radius)
        radius = jnp.where(accept & (ratio > 0.7) & (length > 0.9 * old.radius), 3 * radius, radius)
        radius = jnp.where(jnp.isfinite(old.point.value), radius, old.radius)

        hessian = point.hessian if flat is None else _steepen(point.hessian, flat(at))
        step, decrement, escape, negative = rule(point.gradient, hessian)
        is_exact = jnp.where(accept, state.exact, state.is_exact)
        nothing_left = RESOLUTION * jnp.abs(point.value)
        least = jnp.maximum(tolerance, nothing_left) if costly else tolerance
        near = decrement <= least
        saddle = near & negative
        step = jnp.where(saddle, escape, step)
        step = step * jnp.minimum(1.0, radius / _norm(step).clip(1e-300))
        curving = jnp.sum(point.hessian * step[:, None] * step[None], axis=(0, 1))
        predicted = -(jnp.sum(point.gradient * step, axis=0) + curving / 2)
        good = near & ~negative & is_exact
        converged = good if lanes else state.polish & ~(accept & saddle)
        rate = jnp.minimum(decrement / state.decrement, 1.0)
        exact = state.exact | (decrement * rate <= least) | ((decrement < NEAR) & (rate > SLOW))
        exact = exact | (old.iterations >= PATIENCE)
        if settled is not None:
            converged = converged | (good & (decrement <= nothing_left) & settled(at))
        stalled = ~converged & ~jnp.isfinite(point.value)
        stalled = stalled | (~converged & ~near & (radius < 1e-10))
        if lanes and not careful:
            stalled = stalled | saddle
        trace = Trace(at, point, old.iterations + 1, converged, stalled, radius)
        moved = _State(trace, step, predicted, good & (not lanes), decrement, exact, is_exact)
        going = unfinished(old)
        return jax.tree.map(lambda new, old: jnp.where(going, new, old), moved, state)

    def any_unfinished(state: _State) -> Array:
        return jnp.any(unfinished(state.trace))

    final = jax.lax.while_loop(any_unfinished, advance, linalg.alike(initial, start))
    trace = final.trace
    if lanes:
        last = snap(trace.at + final.step)
        good = trace.converged
        if careful:
            value = trace.point.value
            good = good & (
                expansion(last, True).value <= value + ROUNDING * jnp.abs(value) + tolerance
            )
        trace = trace._replace(at=jnp.where(good, last, trace.at))
    return trace


def _norm(vector: Array) -> Array:
    return jnp.sqrt(jnp.sum(vector * vector, axis=0))


def _step(gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
    """Newton step, its decrement, a step along negative curvature, whether there is any."""
    values, vectors = linalg.eigh(hessian)
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


def _steepen(hessian: Array, flat: Array | None) -> Array:
    """The Hessian made as steep along `flat` as anywhere."""
    if flat is None:
        return hessian
    lengths = jnp.sum(flat * flat, axis=1, keepdims=True)
    unit = flat * jnp.sqrt(_size(hessian) / jnp.where(lengths > 0, lengths, 1.0))
    return hessian + linalg.matmul(linalg.transpose(unit), unit)


def _shifted_step(gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
    """`_step` for a batch on the trailing axis, without eigenvectors.

    The Newton step if H + SHIFT |H| is positive definite, and else that of H shifted by
    Gershgorin's bound on its eigenvalues. There is no escape.
    """
    identity = linalg.eye_like(hessian)
    size = _size(hessian)
    rows = jnp.sum(jnp.abs(hessian), axis=1)
    factor = linalg.cholesky(hessian + SHIFT * size * identity)
    negative = jnp.isnan(factor[-1, -1])
    centres = linalg.diagonal(hessian)
    lowest = jnp.min(centres - (rows - jnp.abs(centres)), axis=0)
    shift = jnp.where(negative, jnp.maximum(-lowest, 0.0) * 1.1 + SHIFT * size, SHIFT * size)
    factor = linalg.cholesky(hessian + shift * identity)
    half = linalg.solve_lower(factor, gradient[:, None])
    step = -linalg.solve_lower(_flip(factor), half[::-1])[::-1, 0]
    return step, jnp.sum(half * half, axis=(0, 1)) / 2, jnp.zeros_like(step), negative


def _size(hessian: Array) -> Array:
    """A bound on the eigenvalues of a batch, 1 for zero."""
    size = jnp.max(jnp.sum(jnp.abs(hessian), axis=1), axis=0)
    return jnp.where(size > 0, size, 1.0)


def _flip(factor: Array) -> Array:
    """The transpose of a lower triangle with rows and columns reversed: lower again."""
    return linalg.transpose(factor)[::-1, ::-1]


def is_convex(hessian: Array) -> Array:
    """Whether no eigenvalue is negative, up to rounding; also for a batch."""
    if hessian.ndim == 2:
        return inertia(hessian)[0] == 0
    shifted = hessian + SHIFT * _size(hessian) * linalg.eye_like(hessian)
    return ~jnp.isnan(linalg.cholesky(shifted)[-1, -1])


def inertia(hessian: Array) -> Array:
    """Numbers of negative, zero and positive eigenvalues, (3, ...) integers."""
    values, _ = linalg.eigh(hessian)
    size = jnp.max(jnp.abs(values), axis=0)
    negative = values < -NEGATIVE * size
    positive = values > NEGATIVE * size
    return jnp.stack([kind.sum(axis=0) for kind in (negative, ~negative & ~positive, positive)])


def solve_flat(hessian: Array, right: Array) -> Array:
    """Minimum-norm solution of ``hessian x = right``, flat directions left out."""
    values, vectors = linalg.eigh(jax.lax.stop_gradient(hessian))
    size = jnp.max(jnp.abs(values))
    flat = jnp.where(jnp.abs(values) <= FLAT * size, 1.0, 0.0)
    onto_flat = (vectors * flat) @ vectors.T
    filled, _ = linalg.inverse(hessian + size * onto_flat, False)
    return filled @ (right - onto_flat @ right)
