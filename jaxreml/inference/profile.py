r"""Profile likelihood: intervals of SDs, correlations, the residual SD and fixed effects.

The profile of a parameter is the criterion (-2 log-likelihood) minimised over all others at each
value v of it, and its signed root is zeta(v) = sign(v - estimate) sqrt(criterion(v) - minimum),
which is standard normal to a good approximation (Bates et al. 2015, J. Stat. Softw. 67(1),
section 5.1). An interval of level c ends where |zeta| is the normal quantile of (1 + c) / 2. That
point is found by Newton's method on zeta itself, whose slope is the criterion's own derivative in
the parameter held over 2 zeta; nothing is interpolated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import pandas as pd

from jaxreml.errors import ConvergenceWarning, JaxremlError
from jaxreml.estimation import START, is_reml
from jaxreml.inference.axes import Parameter, estimates, parameters, readings
from jaxreml.inference.constrained import optima

if TYPE_CHECKING:
    from jaxreml.results import LMMResults

RANGE_LEVEL = 0.99  # a profile covers the intervals of this level at least, as lme4's
POINTS = 8  # of a profile on each side of the estimate, besides those of the search
EXACT = 1e-6  # distance of zeta from a target within which one more Newton step is exact
ROUNDS = 40  # of the search for targets
BISECT = 6  # rounds from which on every other one halves the bracket
FARTHEST = 4.0  # a round goes at most so many times as far from the estimate as those before
FAILURES = 4  # optima not found, after which a target is given up
LOWER = 1e-9  # per unit of the criterion: the fit was not the optimum
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


_Target = tuple[str, float]  # name of a parameter, value of zeta


class Limit(NamedTuple):
    """Where zeta reaches a target, on the axis; NaN with a reason where that was not found."""

    at: float
    reason: str = ""


class Track:
    """What is known of the profile of one parameter."""

    def __init__(self, parameter: Parameter, start: np.ndarray):
        self.parameter = parameter
        self.start = start
        self.points: dict[float, Point] = {}

    @property
    def centre(self) -> float:
        """The estimate, on the axis."""
        return float(self.start[self.parameter.axis])

    @property
    def sorted(self) -> list[Point]:
        """The points by their place on the axis."""
        return [self.points[at] for at in sorted(self.points)]

    def x(self, at: float) -> np.ndarray:
        """Where to start the search for the optimum at `at`."""
        if not self.points:
            x = self.start.copy()
        else:
            near = min(self.points.values(), key=lambda point: abs(point.at - at))
            step = near.tangent * (at - near.at)
            x = near.x + step / max(1.0, float(np.linalg.norm(step)))
        x[self.parameter.axis] = at
        return x

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
        left = max([point.at for point in known if point.zeta < target], default=low)
        right = min([point.at for point in known if point.zeta > target], default=high)
        if bound not in self.points and not low < newton < high:
            newton = bound if math.isfinite(bound) else math.nan
        elif math.isfinite(left) and math.isfinite(right):
            if not left < newton < right or (turn >= BISECT and turn % 2):
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
        chosen: the parameters.
        reml: the criterion.

    Raises:
        JaxremlError: its optimum is not found, or it is not what the fit has.
    """

    def __init__(self, fit: LMMResults, chosen: Sequence[Parameter], reml: bool):
        self.fit, self.reml = fit, reml
        self.tracks: dict[str, Track] = {}
        with jax.enable_x64(True):
            self.design = jax.device_put(fit.design.without_names())
        sigma = next(p for p in parameters(fit) if p.kind == "sigma")
        free = sigma.axes.free.copy()
        free[sigma.axis] = 1.0
        axes = sigma.axes._replace(free=free)
        start = sigma.x(estimates(fit), fit.beta, floor=START)
        found = optima(start[None], [axes], self.design, reml=reml)
        if not found.certified[0]:
            raise JaxremlError(f"the optimum of the {self._name} was not found")
        self.minimum = float(found.value[0])
        self.values = sigma.values(found.x[0])
        self.beta = found.beta[0]
        if reml == is_reml(fit.method):
            self._require_optimum(fit.criterion, self.minimum, "another start")
        self.tracks = {p.name: Track(p, p.x(self.values, self.beta)) for p in chosen}
        tracks = list(self.tracks.values())
        self._solve([(track, track.centre) for track in tracks])
        lost = [track.parameter.name for track in tracks if not track.points]
        if lost:
            raise JaxremlError(f"the optimum of the {self._name} is not certified for {lost[0]}")

    @property
    def _name(self) -> str:
        return "restricted likelihood" if self.reml else "likelihood"

    def _require_optimum(self, criterion: float, found: float, where: str) -> None:
        if found < criterion - LOWER * (1 + abs(criterion)):
            raise JaxremlError(
                f"the fit is not the optimum of the {self._name}: the criterion is "
                f"{criterion:.6f} there and {found:.6f} at {where}. The likelihood has several "
                "optima; profiles from one that is not the lowest mean nothing. Simplify the model"
            )

    def _solve(self, asked: list[tuple[Track, float]]) -> None:
        """Add these points to the tracks, those whose optimum is found."""
        for again in (False, True):  # the second time from the estimates
            asked = [(track, at) for track, at in asked if at not in track.points]
            if not asked:
                return
            starts = []
            for track, at in asked:
                x = track.start.copy() if again else track.x(at)
                x[track.parameter.axis] = at
                starts.append(x)
            axes = [track.parameter.axes for track, _ in asked]
            found = optima(np.array(starts), axes, self.design, reml=self.reml)
            for k in np.flatnonzero(found.certified):
                track, at = asked[k]
                one = [leaf[k] for leaf in found[:5]]
                track.points[at] = self._point(track, at, *one)

    def _point(
        self,
        track: Track,
        at: float,
        x: np.ndarray,
        criterion: np.ndarray,
        gradient: np.ndarray,
        hessian: np.ndarray,
        beta: np.ndarray,
    ) -> Point:
        parameter = track.parameter
        where = f"{parameter.name} = {parameter.value(at):g}"
        self._require_optimum(self.minimum, float(criterion), where)
        free, axis = parameter.axes.free > 0, parameter.axis
        tangent = np.zeros(len(x))
        if parameter.kind != "fixed":
            inside = hessian[np.ix_(free, free)]
            tangent[free] = -np.linalg.lstsq(inside, hessian[free, axis], rcond=FLAT)[0]
        if at == track.centre:
            curvature = hessian[axis, axis] + hessian[axis] @ tangent
            # The axis of a fixed effect is in units of its standard error.
            slope = math.sqrt(max(curvature, 0.0) / 2) if parameter.kind != "fixed" else 1.0
            return Point(at, 0.0, slope, x, tangent, beta, float(criterion))
        rise = math.sqrt(max(float(criterion) - self.minimum, 0.0))
        zeta = math.copysign(rise, at - track.centre)
        slope = float(gradient[axis]) / (2 * zeta) if zeta else 0.0
        return Point(at, zeta, slope, x, tangent, beta, float(criterion))

    def reach(self, names: Iterable[str], targets: Iterable[float]) -> dict[_Target, Limit]:
        """Where zeta of each of `names` has each of `targets`: all are sought together."""
        failures = {(name, target): 0 for name in names for target in targets}
        limits: dict[_Target, Limit] = {}
        for turn in range(ROUNDS):
            asked = {}
            for (name, target), failed in failures.items():
                if (name, target) in limits:
                    continue
                track = self.tracks[name]
                proposal = track.propose(target, turn)
                if isinstance(proposal, Limit):
                    limits[name, target] = proposal
                elif failed == FAILURES:
                    value = track.parameter.value(proposal)
                    reason = f"no optimum was found with {name} held near {value:.4g}"
                    limits[name, target] = Limit(math.nan, reason)
                else:
                    near = min(track.points, key=lambda at: abs(at - proposal))
                    asked[name, target] = track, near + (proposal - near) / 2**failed
            if not asked:
                break
            self._solve(list(asked.values()))
            for wanted, (track, at) in asked.items():
                failures[wanted] += at not in track.points
        for name, target in failures:
            reason = f"zeta of {name} does not reach {target:.3g}"
            limits.setdefault((name, target), Limit(math.nan, reason))
        return limits

    def spread(self, limits: dict[_Target, Limit]) -> None:
        """Points between the estimates and `limits`, about equally far apart in zeta."""
        asked = []
        for (name, target), limit in limits.items():
            track = self.tracks[name]
            points = track.sorted
            zeta, at = [point.zeta for point in points], [point.at for point in points]
            ends = track.parameter.bounds
            last = track.points[limit.at].zeta if limit.at in ends else target
            if math.isfinite(limit.at) and limit.at != track.centre:
                places = np.interp(last * np.arange(1, POINTS) / POINTS, zeta, at)
                asked += [(track, float(place)) for place in places]
        self._solve(asked)


class Profile:
    """Profile likelihoods of parameters of a fit; made by `LMMResults.profile`.

    Attributes:
        parameters: names of the parameters profiled.
        likelihood: the criterion of variance parameters, "ML" or "REML"; that of fixed effects is
            ML.
        conf_level: level of the intervals that the points cover, 0.99 or more.
    """

    def __init__(self, fit: LMMResults, names: Sequence[str] | None, level: float, likelihood: str):
        reml = is_reml(likelihood)
        _check_level(level)
        if not fit.converged:
            raise JaxremlError(f"the fit has no optimum to profile from: {fit.message}")
        self._fit = fit
        self._all = parameters(fit)
        chosen = _choose(self._all, names)
        self.parameters = tuple(parameter.name for parameter in chosen)
        self.likelihood = likelihood
        self.conf_level = max(level, RANGE_LEVEL)
        self._chosen = chosen
        by_reml = [p for p in chosen if reml and p.kind != "fixed"]
        by_ml = [p for p in chosen if p not in by_reml]
        self._searches = [
            Search(fit, part, of) for part, of in ((by_reml, True), (by_ml, False)) if part
        ]

    def conf_int(self, level: float = 0.95) -> pd.DataFrame:
        """Profile likelihood intervals.

        The lower limit of an SD is 0, and a limit of a correlation -1 or 1, where the profile does
        not reach the quantile before.

        Args:
            level: confidence level.

        Returns:
            A row per parameter, by lme4's names, in its order; columns group (None for fixed
            effects), term, estimate (of the likelihood profiled), lower, upper. NaN, with a
            ConvergenceWarning that says why, where a limit was not found.
        """
        _check_level(level)
        limits = self._limits(level)
        rows = {}
        for parameter in self._chosen:
            ends = [limits[parameter.name, side] for side in (-1, 1)]
            for reason in [end.reason for end in ends if end.reason]:
                warnings.warn(reason, ConvergenceWarning, stacklevel=2)
            estimate = self._track(parameter.name).centre
            rows[parameter.name] = (
                parameter.group,
                parameter.term,
                *(parameter.value(at) for at in (estimate, ends[0].at, ends[1].at)),
            )
        columns = ["group", "term", "estimate", "lower", "upper"]
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return frame.rename_axis("parameter")

    def _limits(self, level: float) -> dict[tuple[str, int], Limit]:
        """Of each parameter, side -1 and 1."""
        from scipy.special import ndtri

        quantile = float(ndtri((1 + level) / 2))
        found = {}
        for search in self._searches:
            reached = search.reach(search.tracks, (-quantile, quantile))
            found |= {(name, int(math.copysign(1, z))): limit for (name, z), limit in reached.items()}
        return found

    def _track(self, name: str) -> Track:
        return next(search.tracks[name] for search in self._searches if name in search.tracks)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level must be between 0 and 1, not {level}")


def _choose(known: list[Parameter], names: Sequence[str] | None) -> list[Parameter]:
    return known
