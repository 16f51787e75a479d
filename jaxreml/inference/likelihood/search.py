"""The search along profiles: optima with a parameter held, outwards from the estimates.

With a parameter held far from its estimate the others often have several optima: a correlation held
near 1 lets those of its two effects with a third have either sign. What is followed outwards from
the estimates may then not be the lowest, so the ends are sought again from other starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxreml.arguments import is_reml
from jaxreml.backend.lazy import jax
from jaxreml.backend.runtime import neutral
from jaxreml.errors import JaxremlError
from jaxreml.inference.likelihood.charts import (
    Parameter,
    estimates,
    other_values,
    readings,
    without_rounding,
)
from jaxreml.inference.likelihood.holding import free_chart
from jaxreml.optimum.held import Optimum, on_host_only, optima
from jaxreml.optimum.search import START

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

POINTS = 8  # of a profile on each side of the estimate, besides those of the search
EXACT = 1e-6  # distance of zeta from a target within which one more Newton step is exact
ROUNDS = 40  # of the search for targets
BISECT = 6  # rounds from which on every other one halves the bracket
FARTHEST = 4.0  # a round goes at most so many times as far from the estimate as those before
FAILURES = 4  # optima not found, after which a target is given up
LOWER = 1e-9  # per unit of the criterion: the fit was not the optimum
KINK = 1e-5  # by how much zeta may fall
MENDINGS = 5  # times that a search goes on after a lower optimum was found
FLAT = 1e-8  # eigenvalues below this fraction of the largest count as zero in tangents


class Point(NamedTuple):
    """One point of a profile.

    Attributes:
        at: value on the parameter's axis.
        zeta, slope: and the derivative of zeta there.
        x, tangent: the optimum (m + 2,), and its derivative in `at`.
        beta, criterion: fixed effects (p,) and the criterion there.
    """

    at: float
    zeta: float
    slope: float
    x: np.ndarray
    tangent: np.ndarray
    beta: np.ndarray
    criterion: float


_Target = tuple[Parameter, float]  # and value of zeta


class Limit(NamedTuple):
    """Where zeta reaches a target, on the axis; NaN with a reason where that was not found."""

    at: float
    reason: str = ""


class Track:
    """What is known of the profile of one parameter.

    Args:
        parameter: the parameter.
        start: coordinates of the estimates, (m + 2,).
        others: coordinates to start from as well, to find other optima.

    Attributes:
        points: by their place on the axis.
        checked: those sought from all starts.
    """

    def __init__(self, parameter: Parameter, start: np.ndarray, others: list[np.ndarray]):
        self.parameter = parameter
        self.start = start
        self.others = others
        self.points: dict[float, Point] = {}
        self.checked: set[float] = set()

    @property
    def centre(self) -> float:
        """The estimate, on the axis."""
        return float(self.start[self.parameter.axis])

    @property
    def sorted(self) -> list[Point]:
        """The points by their place on the axis."""
        return [self.points[at] for at in sorted(self.points)]

    def nearest(self, at: float) -> Point:
        """The point nearest to a place on the axis."""
        return min(self.points.values(), key=lambda point: abs(point.at - at))

    def forget(self) -> None:
        """Drop the points that may be other optima than the lowest."""
        kept = {*self.checked, self.centre}
        self.points = {at: point for at, point in self.points.items() if at in kept}

    def x(self, at: float) -> np.ndarray:
        """Where to start the search for the optimum at `at`."""
        if not self.points:
            x = self.start.copy()
        else:
            near = self.nearest(at)
            step = near.tangent * (at - near.at)
            x = near.x + step / max(1.0, float(np.linalg.norm(step)))
        x[self.parameter.axis] = at
        return x

    @property
    def kinks(self) -> list[tuple[Point, Point]]:
        """Neighbours between which zeta falls."""
        pairs = pairwise(self.sorted)
        return [(one, other) for one, other in pairs if other.zeta < one.zeta - KINK]

    def bracket(self, target: float) -> tuple[float, float]:
        """The nearest places on both sides of a value of zeta, the bounds where none is known."""
        low, high = self.parameter.bounds
        known = self.points.values()
        left = max([point.at for point in known if point.zeta < target], default=low)
        return left, min([point.at for point in known if point.zeta > target], default=high)

    def propose(self, target: float, turn: int) -> float | Limit:
        """Where to look next for a value of zeta, or where it is."""
        low, high = self.parameter.bounds
        bound = low if target < 0 else high
        if bound in self.points and abs(self.points[bound].zeta) <= abs(target):
            return Limit(bound)
        known = self.points.values()
        near = min(known, key=lambda point: abs(point.zeta - target))
        newton = near.at + (target - near.zeta) / near.slope if near.slope > 0 else math.nan
        if abs(near.zeta - target) <= EXACT and math.isfinite(newton):
            return Limit(newton)
        left, right = self.bracket(target)
        past = not (newton < high if target > 0 else newton > low)  # or unknown
        if past and math.isfinite(bound) and bound not in self.points:
            newton = bound
        elif math.isfinite(right - left) and (
            not left < newton < right or (turn >= BISECT and turn % 2)
        ):
            newton = (left + right) / 2
        reached = max(abs(point.at - self.centre) for point in known)
        farthest = FARTHEST * max(reached, 1.0, abs(self.centre) / 2)
        outward = math.copysign(farthest, target)
        if not math.isfinite(newton):
            return self.centre + outward / FARTHEST
        return self.centre + min(max(newton - self.centre, -farthest), farthest)


class Search:
    """Profiles of some parameters of a fit by one criterion.

    Args:
        fit: the fit.
        known: all its parameters.
        chosen: those to profile.
        reml: the criterion.

    Attributes:
        design: without names, on the device where JAX works.
        minimum, values, estimates: criterion, variance parameters and all parameters at the
            estimates, these in the user's units in the order of `known`.
        elsewhere: variance parameters to start from as well.
        several: whether the criterion may have several optima, as random effects make them.
        tracks: the profiles.

    Raises:
        JaxremlError: the optimum of the criterion is not found, or is not the one that the fit has.
    """

    def __init__(
        self, fit: FittedModel, known: list[Parameter], chosen: list[Parameter], reml: bool
    ):
        self.reml = reml
        self.name = "restricted likelihood" if reml else "likelihood"
        self.design = fit.design.without_names()
        if on_host_only(self.design):
            self.design = self.design.collapsed
        elif not self.design.written_out or fit.engine == "jax":
            with neutral():
                self.design = jax.device_put(self.design)
        chart, blocks = free_chart(fit), fit.covariance.blocks
        start = chart.x(estimates(fit), floor=START)
        best = optima(start[None], [chart.axes], self.design, reml=reml)
        if not best.certified[0]:
            raise JaxremlError(f"the optimum of the {self.name} was not found")
        self.minimum = float(best.value[0])
        if reml == is_reml(fit.method):
            self.require_optimum(self.minimum, "an optimum from another start", fit.criterion)
        values = without_rounding(chart.values(best.x[0]), blocks)
        self.known, self.values = known, values
        self.estimates = [*readings(values, fit), *best.beta[0]]
        self.elsewhere = other_values(values, blocks)
        self.several = bool(fit.covariance.random.any())
        self.tracks = {}
        for own in chosen:
            start, *others = [own.x(each, best.beta[0]) for each in (values, *self.elsewhere)]
            self.tracks[own] = Track(own, start, others)
        self._solve([(track, track.centre) for track in self.tracks.values()])
        for parameter, track in self.tracks.items():
            if not track.points:
                raise JaxremlError(
                    f"the optimum of the {self.name} is not certified with {parameter.name} held"
                )

    def require_optimum(self, found: float, where: str, known: float | None = None) -> None:
        """Raise JaxremlError if `found`, a value of the criterion, is below the minimum `known`."""
        minimum = self.minimum if known is None else known
        if found < minimum - LOWER * (1 + abs(minimum)):
            raise JaxremlError(
                f"the estimates are not the optimum of the {self.name}: the criterion is "
                f"{minimum:.6f} there and {found:.6f} at {where}. The likelihood has several "
                "optima, and a profile from one that is not the lowest means nothing; simplify the "
                "model"
            )

    def _solve(self, asked: list[tuple[Track, float]]) -> None:
        """Add these points to their tracks, where the optimum is found.

        It is sought from the nearest point known and, where that one fails or where effects are
        correlated, from the estimates: with a correlation held at the wrong sign, a variance of
        zero is a local optimum, which would lead to the next.
        """
        again = [(track, at, track.start.copy()) for track, at in asked]
        near = [(track, at, track.x(at)) for track, at in asked]
        self._add(near + again if self.elsewhere else near)
        self._add([(track, at, x) for track, at, x in again if at not in track.points])

    def _add(self, asked: list[tuple[Track, float, np.ndarray]]) -> None:
        """Seek optima from these starts; those found that are lower than what is known."""
        if not asked:
            return
        starts = np.array([x for *_, x in asked])
        for start, (track, at, _) in zip(starts, asked, strict=True):
            start[track.parameter.axis] = at
        axes = [track.parameter.axes for track, *_ in asked]
        found = optima(starts, axes, self.design, reml=self.reml)
        for k in np.flatnonzero(found.certified):
            track, at, _ = asked[k]
            point = self._point(track, at, Optimum(*(leaf[k] for leaf in found)))
            if at not in track.points or point.criterion < track.points[at].criterion:
                track.points[at] = point

    def _point(self, track: Track, at: float, found: Optimum) -> Point:
        parameter, criterion = track.parameter, float(found.value)
        where = f"{parameter.name} = {parameter.value(at):g}"
        self.require_optimum(criterion, where)
        free, axis = parameter.axes.free > 0, parameter.axis
        tangent = np.zeros(len(found.x))
        if parameter.kind != "fixed":
            inside = found.hessian[np.ix_(free, free)]
            tangent[free] = -np.linalg.lstsq(inside, found.hessian[free, axis], rcond=FLAT)[0]
        zeta = math.copysign(math.sqrt(max(criterion - self.minimum, 0.0)), at - track.centre)
        if at == track.centre:
            zeta, slope = 0.0, 1.0  # the axis of a fixed effect is in units of its standard error
            if parameter.kind != "fixed":
                curvature = float(found.hessian[axis, axis] + found.hessian[axis] @ tangent)
                slope = math.sqrt(max(curvature, 0.0) / 2)
        else:
            slope = float(found.gradient[axis]) / (2 * zeta) if zeta else 0.0
        return Point(at, zeta, slope, found.x, tangent, found.beta, criterion)

    def reach(self, targets: Iterable[float]) -> dict[_Target, Limit]:
        """Where zeta of each parameter has each of `targets`: all are sought together."""
        wanted = [(own, target) for own in self.tracks for target in targets]
        for _ in range(MENDINGS):
            limits = self._reach(wanted)
            ends = []
            for (own, target), limit in limits.items():
                track = self.tracks[own]
                if math.isnan(limit.at):  # zeta jumps to a local optimum between these
                    ends += [(track, at) for at in track.bracket(target) if at in track.points]
                elif limit.at not in own.bounds:
                    ends.append((track, track.nearest(limit.at).at))
            if not self._check(ends):
                return limits
        reason = "lower optima were found again and again from other starts"
        return {(own, z): Limit(math.nan, f"{own.name}: {reason}") for own, z in wanted}

    def _reach(self, wanted: list[_Target]) -> dict[_Target, Limit]:
        failures = dict.fromkeys(wanted, 0)
        limits: dict[_Target, Limit] = {}
        for turn in range(ROUNDS):
            asked = {}
            for (own, target), failed in failures.items():
                if (own, target) in limits:
                    continue
                track = self.tracks[own]
                proposal = track.propose(target, turn)
                if isinstance(proposal, Limit):
                    limits[own, target] = proposal
                elif failed == FAILURES:
                    value = own.value(proposal)
                    reason = f"no optimum was found with {own.name} held near {value:.4g}"
                    limits[own, target] = Limit(math.nan, reason)
                else:
                    near = track.nearest(proposal).at
                    asked[own, target] = track, near + (proposal - near) / 2**failed
            if not asked:
                break
            self._solve(list(asked.values()))
            for target, (track, at) in asked.items():
                failures[target] += at not in track.points
        for own, target in wanted:
            reason = f"zeta of {own.name} was not brought to {target:.3g} in {ROUNDS} rounds"
            limits.setdefault((own, target), Limit(math.nan, reason))
        return limits

    def _check(self, points: list[tuple[Track, float]]) -> bool:
        """Seek these optima again from other starts, once, and those where zeta falls from their
        neighbours; whether a lower one was found."""
        asked = []
        for track, at in points:
            if at not in track.checked and at != track.centre:
                track.checked.add(at)
                asked += [(track, at, x.copy()) for x in (track.start, *track.others)]
        for track in self.tracks.values():
            for one, other in track.kinks:
                asked += [(track, one.at, other.x.copy()), (track, other.at, one.x.copy())]
        before = [track.points[at].criterion for track, at, _ in asked]
        self._add(asked)
        improved = {
            track
            for (track, at, _), old in zip(asked, before, strict=True)
            if track.points[at].criterion < old - LOWER * (1 + abs(old))
        }
        for track in improved:
            track.forget()
        return bool(improved)

    def spread(self, limits: dict[_Target, Limit]) -> bool:
        """Points between the estimates and `limits`, about equally far apart in zeta.

        Returns:
            Whether a lower optimum was found, so that `limits` may have moved.
        """
        asked = []
        for (own, target), limit in limits.items():
            track = self.tracks[own]
            if not math.isfinite(limit.at) or limit.at == track.centre:
                continue
            points = track.sorted
            last = track.points[limit.at].zeta if limit.at in own.bounds else target
            places = np.interp(
                last * np.arange(1, POINTS) / POINTS,
                [point.zeta for point in points],
                [point.at for point in points],
            )
            asked += [(track, float(place)) for place in places]
        self._solve(asked)
        every = [(track, at) for track in self.tracks.values() for at in track.points]
        return self._check(every)
