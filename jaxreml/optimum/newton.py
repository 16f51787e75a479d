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
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import chosen, namespace, on_host, still
from jaxreml.model import linalg

Array = Any  # NumPy's or JAX's
FLAT = 1e-10  # eigenvalues below this fraction of the largest count as zero
NEGATIVE = 1e-8  # ... and below minus this fraction as negative
ESCAPE = 0.3  # first step away from a saddle point, in units of the coordinates
ROUNDING = 1e-13  # relative change of the function that rounding alone can make
RESOLUTION = 1e-16  # a decrement below this fraction of the function is none
NEAR = 1e-3  # below this decrement, an approximate Hessian that leaves more than
SLOW = 0.03  # of it in one step is not worth it
PATIENCE = 12  # steps with approximate Hessians at most
LEAST_RADIUS = 1e-10  # below which there is no downhill step to be found
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
    rules = _Rules(expand, snap, tolerance, max_iterations, flat, careful, settled, start.ndim > 1)
    initial = rules.initial(start, radius)
    if on_host(start):
        state = initial
        while np.any(rules.unfinished(state.trace)):
            state = rules.advance(state)
    else:
        state = _loop(rules, linalg.alike(initial, start))
    return rules.ended(state) if start.ndim > 1 else state.trace


def _loop(rules: _Rules, initial: _State) -> _State:
    import jax
    import jax.numpy as jnp

    def unfinished(state: _State) -> Array:
        return jnp.any(rules.unfinished(state.trace))

    return jax.lax.while_loop(unfinished, rules.advance, initial)


@dataclass(frozen=True)
class _Rules:
    """How `minimise`, whose arguments these are, goes on from a state; `lanes` if there are."""

    expand: Callable[..., Any]
    snap: Callable[[Array], Array]
    tolerance: float
    max_iterations: int | Array
    flat: Callable[[Array], Array | None] | None
    careful: bool
    settled: Callable[[Array], Array] | None
    lanes: bool

    @property
    def costly(self) -> bool:
        """Whether the expansion is asked for approximate Hessians."""
        return self.settled is not None

    def at(self, point: Array, exact: Array | bool) -> Any:
        """The expansion at a point."""
        return self.expand(point, exact) if self.costly else self.expand(point)

    def nothing(self, start: Array) -> Any:
        """An expansion to begin with, of an infinite value."""
        if on_host(start):
            nothing = self.at(start, True)
        else:
            import jax
            import jax.numpy as jnp

            shapes = jax.eval_shape(self.at, start, True)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return nothing._replace(value=namespace(start).full(start.shape[1:], np.inf, start.dtype))

    def initial(self, start: Array, radius: Array | None) -> _State:
        """Where a search begins."""
        xp, lanes = namespace(start), start.shape[1:]
        false, one = xp.zeros(lanes, bool), xp.ones(lanes, start.dtype)
        trace = Trace(
            start,
            self.nothing(start),
            xp.zeros(lanes, int),
            converged=false,
            stalled=false,
            radius=one if radius is None else radius,
        )
        return _State(
            trace,
            step=xp.zeros_like(start),
            predicted=one,
            polish=false,
            decrement=one * np.inf,
            exact=false if self.costly else ~false,
            is_exact=false,
        )

    def unfinished(self, trace: Trace) -> Array:
        """Whether a search goes on."""
        return ~(trace.converged | trace.stalled) & (trace.iterations < self.max_iterations)

    def advance(self, state: _State) -> _State:
        """Try the step, accept it or not, and plan the next one."""
        old = state.trace
        xp = namespace(old.at)
        trial = old.at + state.step
        if not self.lanes:
            trial = chosen(state.polish, self.snap(trial), trial)
        new = self.at(trial, state.exact)
        noise = ROUNDING * abs(new.value) + self.tolerance
        # A rejected polish leaves the converged point as it is.
        gain = old.point.value - new.value
        finite = xp.isfinite(new.value) & xp.all(xp.isfinite(new.hessian), axis=(0, 1))
        accept = finite & (gain >= -noise)
        at, point = chosen(accept, (trial, new), (old.at, old.point))
        radius = self.next_radius(state, gain, noise, accept)
        is_exact = xp.where(accept, state.exact, state.is_exact)
        moved = self.plan(at, point, radius, is_exact, accept, state)
        return moved if on_host(accept) and not self.lanes else self.only_unfinished(moved, state)

    def next_radius(self, state: _State, gain: Array, noise: Array, accept: Array) -> Array:
        """The radius after a step that gained so much: by how well that was predicted."""
        old, xp = state.trace, namespace(gain)
        ratio = gain / state.predicted
        length = _norm(state.step)
        poor = ~accept | ((ratio < 0.1) & (state.predicted > noise))
        radius = xp.where(poor, length / 4, old.radius)
        radius = xp.where(accept & (ratio > 0.7) & (length > 0.9 * old.radius), 3 * radius, radius)
        return xp.where(xp.isfinite(old.point.value), radius, old.radius)

    def plan(
        self, at: Array, point: Any, radius: Array, is_exact: Array, accept: Array, state: _State
    ) -> _State:
        """The next step from `at`, or the end."""
        old, xp, tolerance = state.trace, namespace(at), self.tolerance
        hessian = point.hessian
        if self.flat is not None:
            hessian = _steepen(hessian, self.flat(at))
        step, decrement, escape, negative = self.rule(point.gradient, hessian)
        nothing_left = RESOLUTION * abs(point.value)
        least = xp.maximum(tolerance, nothing_left) if self.costly else tolerance
        near = decrement <= least
        saddle = near & negative
        step = xp.where(saddle, escape, step)
        step = step * xp.minimum(1.0, radius / _norm(step).clip(1e-300))
        curving = xp.sum(point.hessian * step[:, None] * step[None], axis=(0, 1))
        predicted = -(xp.sum(point.gradient * step, axis=0) + curving / 2)
        good = near & ~negative & is_exact
        converged = good if self.lanes else state.polish & ~(accept & saddle)
        rate = xp.minimum(decrement / state.decrement, 1.0)
        exact = state.exact | (decrement * rate <= least) | ((decrement < NEAR) & (rate > SLOW))
        exact = exact | (old.iterations >= PATIENCE)
        if self.settled is not None:
            converged = converged | (good & (decrement <= nothing_left) & self.settled(at))
        stalled = ~converged & ~xp.isfinite(point.value)
        stalled = stalled | (~converged & ~near & (radius < LEAST_RADIUS))
        if self.lanes and not self.careful:
            stalled = stalled | saddle
        trace = Trace(at, point, old.iterations + 1, converged, stalled, radius)
        return _State(trace, step, predicted, good & (not self.lanes), decrement, exact, is_exact)

    def rule(self, gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
        """The step rule."""
        if not self.lanes:
            return _step(gradient, hessian)
        if not self.careful:
            return _shifted_step(gradient, hessian)
        import jax

        return jax.vmap(_step, in_axes=-1, out_axes=-1)(gradient, hessian)

    def only_unfinished(self, moved: _State, state: _State) -> _State:
        """Lanes that have ended stay where they are."""
        return chosen(self.unfinished(state.trace), moved, state)

    def ended(self, state: _State) -> Trace:
        """Lanes take the last step and `snap`."""
        trace, xp = state.trace, namespace(state.step)
        last = self.snap(trace.at + state.step)
        good = trace.converged
        if self.careful:
            value = trace.point.value
            noise = ROUNDING * abs(value) + self.tolerance
            good = good & (self.at(last, True).value <= value + noise)
        return trace._replace(at=xp.where(good, last, trace.at))


def _norm(vector: Array) -> Array:
    return namespace(vector).sqrt((vector * vector).sum(axis=0))


def _step(gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
    """Newton step, its decrement, a step along negative curvature, whether there is any."""
    xp = namespace(hessian)
    values, vectors = linalg.eigh(hessian)
    size = xp.max(xp.abs(values))
    size = xp.where(size > 0, size, 1.0)
    along = gradient @ vectors
    scaled = along / xp.maximum(xp.abs(values), FLAT * size)
    return (
        -vectors @ scaled,
        along @ scaled / 2,
        ESCAPE * vectors[:, 0],
        values[0] < -NEGATIVE * size,
    )


def _steepen(hessian: Array, flat: Array | None) -> Array:
    """The Hessian made as steep along `flat` as anywhere."""
    xp = namespace(hessian)
    if flat is None:
        return hessian
    lengths = xp.sum(flat * flat, axis=1, keepdims=True)
    unit = flat * xp.sqrt(_size(hessian) / xp.where(lengths > 0, lengths, 1.0))
    return hessian + linalg.matmul(linalg.transpose(unit), unit)


def _shifted_step(gradient: Array, hessian: Array) -> tuple[Array, Array, Array, Array]:
    """`_step` for a batch on the trailing axis, without eigenvectors.

    The Newton step if H + SHIFT |H| is positive definite, and else that of H shifted by
    Gershgorin's bound on its eigenvalues. There is no escape.
    """
    xp = namespace(hessian)
    identity = linalg.eye_like(hessian)
    size = _size(hessian)
    rows = xp.sum(xp.abs(hessian), axis=1)
    factor = linalg.cholesky(hessian + SHIFT * size * identity)
    negative = xp.isnan(factor[-1, -1])
    centres = linalg.diagonal(hessian)
    lowest = xp.min(centres - (rows - xp.abs(centres)), axis=0)
    shift = xp.where(negative, xp.maximum(-lowest, 0.0) * 1.1 + SHIFT * size, SHIFT * size)
    factor = linalg.cholesky(hessian + shift * identity)
    half = linalg.solve_lower(factor, gradient[:, None])
    step = -linalg.solve_lower(_flip(factor), half[::-1])[::-1, 0]
    return step, xp.sum(half * half, axis=(0, 1)) / 2, xp.zeros_like(step), negative


def _size(hessian: Array) -> Array:
    """A bound on the eigenvalues of a batch, 1 for zero."""
    xp = namespace(hessian)
    size = xp.max(xp.sum(xp.abs(hessian), axis=1), axis=0)
    return xp.where(size > 0, size, 1.0)


def _flip(factor: Array) -> Array:
    """The transpose of a lower triangle with rows and columns reversed: lower again."""
    return linalg.transpose(factor)[::-1, ::-1]


def is_convex(hessian: Array) -> Array:
    """Whether no eigenvalue is negative, up to rounding; also for a batch."""
    if hessian.ndim == 2:
        return inertia(hessian)[0] == 0
    shifted = hessian + SHIFT * _size(hessian) * linalg.eye_like(hessian)
    return ~namespace(hessian).isnan(linalg.cholesky(shifted)[-1, -1])


def inertia(hessian: Array) -> Array:
    """Numbers of negative, zero and positive eigenvalues, (3, ...) integers."""
    xp = namespace(hessian)
    values, _ = linalg.eigh(hessian)
    size = xp.max(xp.abs(values), axis=0)
    negative = values < -NEGATIVE * size
    positive = values > NEGATIVE * size
    return xp.stack([kind.sum(axis=0) for kind in (negative, ~negative & ~positive, positive)])


def solve_flat(hessian: Array, right: Array) -> Array:
    """Minimum-norm solution of ``hessian x = right``, flat directions left out."""
    xp = namespace(hessian)
    values, vectors = linalg.eigh(still(hessian))
    size = xp.max(xp.abs(values))
    flat = xp.where(xp.abs(values) <= FLAT * size, 1.0, 0.0)
    onto_flat = (vectors * flat) @ vectors.T
    filled, _ = linalg.inverse(hessian + size * onto_flat, False)
    return filled @ (right - onto_flat @ right)
