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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import chosen, mapped, namespace, on_host
from jaxreml.model import linalg
from jaxreml.optimum.hessian import Step, eigen_step, shifted_step, steepened

ROUNDING = 1e-13  # Relative change of the function that rounding alone can make,
UNITS = 8  # and so many units of rounding at least: in single precision.
RESOLUTION = 1e-16  # A decrement below this fraction of the function is none.
UNRESOLVED = 1e-11  # Likewise where no downhill step is left: the function's own rounding error.
COLLAPSED = 1e-10  # Radius below which no downhill step is left, in units of the coordinates.
POOR, FAITHFUL = 0.1, 0.7  # Gains over predicted ones at which the radius shrinks and grows.
SHRINK, GROW = 1 / 4, 3.0  # Factors by which it does: of the step taken, of the radius before.
FULL = 0.9  # Fraction of the radius from which on a step counts as cut by it.
NEAR = 1e-3  # Decrement below which approximate Hessians must do better than SLOW.
SLOW = 0.03  # Fraction of the decrement that a step by an exact Hessian leaves at most.
PATIENCE = 12  # Expansions with approximate Hessians at most.
STAY = 0.9  # Share of the lanes that go on, above which those that have ended stay.


Array = Any  # NumPy's or JAX's


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
    """Between two expansions.

    Attributes:
        trace: so far.
        step: (m,), to be tried next.
        predicted: by how much the quadratic model says that it lowers the function.
        polish: whether it is the last one, to be followed by `snap`.
        decrement: at the last accepted point.
        exact: whether the next expansion must have an exact Hessian.
        is_exact: whether that at the last accepted point is.
    """

    trace: Trace
    step: Array
    predicted: Array
    polish: Array
    decrement: Array
    exact: Array
    is_exact: Array


class _Nothing(NamedTuple):
    """In the place of the first expansion, on the host."""

    value: Array


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
    among: Callable[[np.ndarray], Callable[..., Any]] | None = None,
    ends: Callable[[Array, Any], bool] | None = None,
    size: Array | float = 0.0,
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
        among: `expand` of some of the lanes, by their places: on the host those that have ended
            leave.
        ends: on the host and without lanes, whether to leave the search at an accepted point, as
            it is known where it leads.
        size: of the terms that the function is a sum of, (): rounding is relative to them too.
    """
    in_lanes = start.ndim > 1
    search = _Search(
        expand, snap, tolerance, max_iterations, flat, in_lanes, careful, settled, size
    )
    final = linalg.alike(search.begin(start, radius), start)
    if on_host(start):
        final = search.leaving(final, among) if among else search.to_the_end(final, ends)
    else:
        import jax

        final = jax.lax.while_loop(
            lambda state: search.is_unfinished(state.trace).any(), search.advance, final
        )
    return search.polished(final) if in_lanes else final.trace


@dataclass(frozen=True)
class _Search:
    """The arguments of `minimise`, and its loop in pieces."""

    expand: Callable[..., Any]
    snap: Callable[[Array], Array]
    tolerance: float
    max_iterations: int | Array
    flat: Callable[[Array], Array | None] | None
    in_lanes: bool
    careful: bool
    settled: Callable[[Array], Array] | None
    size: Array | float

    def noise(self, value: Array) -> Array:
        """By how much values of the function can differ by rounding, or the tolerance, alone."""
        share = linalg.negligible(ROUNDING, value.dtype, UNITS)
        return share * (abs(value) + self.size) + self.tolerance

    def expansion(self, at: Array, exact: Array | bool) -> Any:
        return self.expand(at) if self.settled is None else self.expand(at, exact)

    def begin(self, start: Array, radius: Array | None) -> _State:
        """Before the first expansion, which is at `start`."""
        xp = namespace(start)
        false = xp.zeros(start.shape[1:], bool)
        one = xp.ones(start.shape[1:], start.dtype)
        trace = Trace(
            start,
            self.nothing(start)._replace(value=one * np.inf),
            xp.zeros(start.shape[1:], int),
            converged=false,
            stalled=false,
            radius=one if radius is None else radius,
        )
        return _State(
            trace,
            step=xp.zeros_like(start),
            predicted=one,
            polish=false,
            decrement=one * xp.inf,
            exact=~false if self.settled is None else false,
            is_exact=false,
        )

    def nothing(self, start: Array) -> Any:
        """An expansion, to be replaced by the first; on the host without computing one."""
        if on_host(start):
            return _Nothing(np.inf)
        import jax

        shapes = jax.eval_shape(self.expansion, start, True)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def is_unfinished(self, trace: Trace) -> Array:
        return ~(trace.converged | trace.stalled) & (trace.iterations < self.max_iterations)

    def to_the_end(self, state: _State, ends: Callable[[Array, Any], bool] | None) -> _State:
        """The loop, on the host."""
        while np.any(self.is_unfinished(state.trace)):
            state = self.advance(state)
            if ends is not None and ends(state.trace.at, state.trace.point):
                break
        return state

    def leaving(self, state: _State, among: Callable[[np.ndarray], Callable[..., Any]]) -> _State:
        """The loop in lanes, on the host: those that have ended leave it."""
        search, places = self, np.arange(state.step.shape[1])
        whole = mapped(np.copy, state := search.advance(state))
        while places.size:
            going = np.flatnonzero(self.is_unfinished(state.trace))
            if going.size <= STAY * places.size:
                _put(whole, state, places)
                places = places[going]
                state = mapped(lambda own, going=going: own[..., going], state)
                size = self.size if np.size(self.size) == 1 else self.size[places]  # pyright: ignore
                search = replace(self, expand=among(places), size=size)
            if places.size:
                state = search.advance(state)
        return whole

    def propose(self, at: Array, point: Any) -> Step:
        """The step rule at a point."""
        rule = shifted_step if self.in_lanes and not self.careful else eigen_step
        hessian = point.hessian
        if self.flat is not None:
            hessian = steepened(hessian, self.flat(at))
        return rule(point.gradient, hessian)

    def advance(self, state: _State) -> _State:
        """Look at where the step leads, go there if it is no higher, and propose the next."""
        old = state.trace
        xp = namespace(old.at)
        trial = old.at + state.step
        if not self.in_lanes and (state.polish if on_host(trial) else True):
            trial = chosen(state.polish, self.snap(trial), trial)
        new = self.expansion(trial, state.exact)
        if isinstance(old.point, _Nothing):
            zeros = mapped(np.zeros_like, new)._replace(value=old.point.value)
            old = old._replace(point=zeros)
            state = state._replace(trace=old)
        noise = self.noise(new.value)
        gain = old.point.value - new.value
        # A rejected polish leaves the converged point as it is.
        accept = _is_finite(new) & (gain >= -noise)
        at, point = chosen(accept, (trial, new), (old.at, old.point))
        radius = next_radius(old.radius, norm(state.step), gain, state.predicted, noise, accept)
        radius = xp.where(xp.isfinite(old.point.value), radius, old.radius)
        proposed = self.propose(at, point)
        decrement = proposed.decrement

        is_exact = xp.where(accept, state.exact, state.is_exact)
        nothing_left = RESOLUTION * abs(point.value)
        least = self.tolerance
        if self.settled is not None:
            least = xp.maximum(least, nothing_left)
        near = decrement <= least
        saddle = near & proposed.negative
        good = near & ~proposed.negative & is_exact
        converged = good if self.in_lanes else state.polish & ~(accept & saddle)
        if self.settled is not None:
            converged = converged | (good & (decrement <= nothing_left) & self.settled(at))
        # Where rounding hides what is left to gain, there is no downhill step either.
        hidden = (radius < COLLAPSED) & (decrement <= UNRESOLVED * abs(point.value))
        converged = converged | (hidden & ~proposed.negative & is_exact)
        stalled = ~converged & ~xp.isfinite(point.value)
        stalled = stalled | (~converged & ~near & (radius < COLLAPSED))
        if self.in_lanes and not self.careful:
            stalled = stalled | saddle

        step = cut(xp.where(saddle, proposed.escape, proposed.newton), radius)
        exact = state.exact | needs_exact(decrement, state.decrement, least)
        moved = _State(
            Trace(at, point, old.iterations + 1, converged, stalled, radius),
            step,
            predicted_gain(point, step),
            polish=good & (not self.in_lanes),
            decrement=decrement,
            exact=exact | (old.iterations >= PATIENCE),
            is_exact=is_exact,
        )
        return chosen(self.is_unfinished(old), moved, state)

    def polished(self, final: _State) -> Trace:
        """The last step and `snap` for the lanes that have converged; see `minimise`."""
        trace, xp = final.trace, namespace(final.step)
        last = self.snap(trace.at + final.step)
        good = trace.converged
        if self.careful:
            value = trace.point.value
            highest = value + self.noise(value)
            good = good & (self.expansion(last, True).value <= highest)
        return trace._replace(at=xp.where(good, last, trace.at))


def _put(whole: Any, part: Any, places: np.ndarray) -> None:
    """Replace some of the lanes of a tree of arrays."""

    def put(into: np.ndarray, own: np.ndarray) -> None:
        into[..., places] = own

    mapped(put, whole, part)


# The rules of radius and end, for one function or for lanes on the last axis.


def norm(vector: Array) -> Array:
    """Euclidean length, ()."""
    return namespace(vector).sqrt((vector * vector).sum(axis=0))


def _is_finite(point: Any) -> Array:
    xp = namespace(point.value)
    return xp.isfinite(point.value) & xp.isfinite(point.hessian).all(axis=(0, 1))


def next_radius(
    radius: Array, length: Array, gain: Array, predicted: Array, noise: Array, accept: Array
) -> Array:
    """The radius after a step of a length whose gain was predicted.

    It shrinks if the step was not accepted or gained much less than predicted, unless that is no
    more than `noise`; it grows if the model was good as far as the radius went.
    """
    xp = namespace(radius)
    ratio = gain / predicted
    poor = ~accept | ((ratio < POOR) & (predicted > noise))
    shrunk = xp.where(poor, length * SHRINK, radius)
    grows = accept & (ratio > FAITHFUL) & (length > FULL * radius)
    return xp.where(grows, GROW * shrunk, shrunk)


def cut(step: Array, radius: Array) -> Array:
    """A step made no longer than the radius."""
    return step * namespace(step).minimum(1.0, radius / norm(step).clip(1e-300))


def predicted_gain(point: Any, step: Array) -> Array:
    """By how much the quadratic model at a point falls along a step."""
    curving = (point.hessian * step[:, None] * step[None]).sum(axis=(0, 1))
    return -((point.gradient * step).sum(axis=0) + curving / 2)


def needs_exact(decrement: Array, before: Array, least: Array | float) -> Array:
    """Whether an approximate Hessian is no longer good enough: another step at the rate of the
    last one would end the search, or the rate is slow near the optimum. After the first expansion,
    with an infinite decrement before it, there is none to go by."""
    xp = namespace(decrement)
    rate = xp.where(xp.isfinite(before), xp.minimum(decrement / before, 1.0), 1.0)
    return (decrement * rate <= least) | ((decrement < NEAR) & (rate > SLOW))
