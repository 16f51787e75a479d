"""Joint likelihood regions of two parameters: where the criterion with both held has a deviance.

The region of a level is where -2 log likelihood, minimised over all other parameters, is above its
minimum by no more than the quantile of chi-squared with two degrees of freedom. Its edge is sought
on rays from the estimates, each point to rounding error; nothing is interpolated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jaxreml.errors import ConvergenceWarning
from jaxreml.inference.likelihood.charts import Pair, Parameter, readings
from jaxreml.inference.likelihood.search import LOWER, MENDINGS, Search
from jaxreml.optimum.held import optima
from jaxreml.optimum.search import START

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

EDGE = 1e-7  # of the root of the deviance
STEEPEST = 0.95  # correlation to which rays are spread; beyond, they would all be one
CORNER = 5  # halvings of the angle at a corner
BOUND = 1e-9  # distance on an axis from a bound that is rounding error
DOUBLINGS = 20  # of the distance, to get out of a region


def contour(
    fit: FittedModel,
    search: Search,
    held: Pair,
    conf_levels: Sequence[float],
    points: int,
) -> pd.DataFrame:
    """`Profile.contour`, from a search that has tracks of both parameters."""
    from scipy.special import chdtri

    directions = _directions(fit, search, held, points)
    parts = []
    for level in conf_levels:
        values, deviance = _edge(search, held, directions, math.sqrt(chdtri(2, 1 - level)))
        lost = int(np.isnan(deviance).sum())
        if lost:
            warnings.warn(
                f"{lost} of {deviance.size} points of the region of {level} were not found: no "
                "optimum with both parameters held there",
                ConvergenceWarning,
                stacklevel=3,
            )
        closed = np.append(np.arange(deviance.size), 0)
        columns = {own.name: values[closed, k] for k, own in enumerate(held.parameters)}
        parts.append(pd.DataFrame({"conf_level": level, **columns, "deviance": deviance[closed]}))
    return pd.concat(parts, ignore_index=True)


def _edge(
    search: Search, held: Pair, directions: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values (r, 2) and deviances (r,), with more rays to where the edge meets a bound."""
    values, deviance, ended = _Rays(search, held, directions).edge(radius)
    for _ in range(CORNER):
        turns = np.flatnonzero(ended != np.roll(ended, -1))
        if not turns.size:
            break
        between = (directions[turns] + np.roll(directions, -1, axis=0)[turns]) / 2
        added = between, *_Rays(search, held, between).edge(radius)
        directions, values, deviance, ended = (
            np.insert(known, turns + 1, new, axis=0)
            for known, new in zip((directions, values, deviance, ended), added, strict=True)
        )
    return values, deviance


def _directions(fit: FittedModel, search: Search, held: Pair, points: int) -> np.ndarray:
    """Steps (points, 2) on the axes that a quadratic criterion would find equally far."""
    limits = search.reach((-1.0, 1.0))
    reach, width = np.ones(2), np.ones(2)
    for k, own in enumerate(held.parameters):
        ends = np.array([limits[own, side].at for side in (-1.0, 1.0)])
        reach[k] = np.nanmax(np.abs(ends - search.tracks[own].centre), initial=0.0) or 1.0
        values = [own.value(at) for at in ends]
        width[k] = abs(values[1] - values[0]) / 2
    first, second = held.parameters
    ends = [search.tracks[first].nearest(limits[first, side].at) for side in (-1.0, 1.0)]
    names = [own.name for own in search.known]
    on_the_way = [
        [*readings(first.values(point.x), fit), *point.beta][names.index(second.name)]
        for point in ends
    ]
    slope = np.nan_to_num((on_the_way[1] - on_the_way[0]) / (2 * width[1]))
    share = float(np.clip(slope, -STEEPEST, STEEPEST))
    angle = np.arange(points) * 2 * np.pi / points
    across = share * np.cos(angle) + math.sqrt(1 - share**2) * np.sin(angle)
    return np.column_stack([np.cos(angle), across]).round(12) * reach


class _Rays:
    """Rays from the estimates, with the optimum last found on each.

    Args:
        search: of the criterion.
        held: the two parameters.
        directions: (r, 2), on their axes.
    """

    def __init__(self, search: Search, held: Pair, directions: np.ndarray):
        self.search, self.held, self.directions = search, held, directions
        self.centre = np.array([search.tracks[own].centre for own in held.parameters])
        self.farthest = _farthest(self.centre, directions, held.parameters)
        self.start, *self.others = [
            held.chart.x(each, START) for each in (search.values, *search.elsewhere)
        ]
        self.x = np.tile(self.start, (len(directions), 1))

    def edge(self, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the root of the deviance is `radius`, or a parameter ends before.

        Returns:
            Values (r, 2) in the user's units and deviances (r,), NaN where they were not found;
            whether a parameter ended, (r,).
        """
        which = np.arange(len(self.directions))
        distance = np.full(which.size, np.nan)
        for _ in range(MENDINGS):
            distance[which] = self._distances(radius, which)
            which = self._mended(distance)
            if not which.size:
                break
        roots = self._roots(distance, np.arange(len(distance)))
        at = self._at(np.nan_to_num(distance), np.arange(len(distance)))
        values = np.array([[own.value(a) for own, a in zip(self.held.parameters, row, strict=True)]
                           for row in at])  # fmt: skip
        values[np.isnan(roots)] = np.nan
        return values, roots**2, distance == self.farthest

    def _distances(self, radius: float, which: np.ndarray) -> np.ndarray:
        """How far along these rays the edge is."""
        from scipy.optimize.elementwise import find_root

        def beyond(distance: np.ndarray, which: np.ndarray) -> np.ndarray:
            return self._roots(distance, which) - radius

        farthest = self.farthest[which]
        inner, outer = np.zeros(which.size), np.minimum(radius, farthest)
        crossed = np.zeros(which.size, bool)
        left = np.arange(which.size)
        for _ in range(DOUBLINGS):
            root = beyond(outer[left], which[left])
            crossed[left] = root >= 0
            outer[left[np.isnan(root)]] = np.nan
            left = left[(root < 0) & (outer[left] < farthest[left])]
            if not left.size:
                break
            inner[left] = outer[left]
            outer[left] = np.minimum(2 * outer[left], farthest[left])
        outer[left] = np.nan  # no end in sight
        if crossed.any():
            bracket, rays = (inner[crossed], outer[crossed]), (which[crossed],)
            found = find_root(beyond, bracket, args=rays, tolerances={"fatol": EDGE})
            outer[crossed] = np.where(found.success, found.x, np.nan)
        return outer

    def _roots(self, distance: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Root of the deviance at distances on rays `which`; NaN where no optimum was found.

        Optima are sought from the last one on the ray and from the estimates: far out, the last may
        be a local one that is still there nearer by.
        """
        root = np.where(np.isnan(distance), np.nan, 0.0)
        moved = distance > 0
        if moved.any():
            rays, at = which[moved], distance[moved]
            starts = [self.x[rays]]
            if self.search.several:
                starts.append(np.tile(self.start, (rays.size, 1)))
            count = len(starts)
            value, x = self._optima(
                np.tile(at, count), np.tile(rays, count), np.concatenate(starts)
            )
            value, x = value.reshape(count, -1), x.reshape(count, rays.size, -1)
            best = np.argmin(np.where(np.isnan(value), np.inf, value), axis=0)
            value, x = value[best, range(rays.size)], x[best, range(rays.size)]
            found = ~np.isnan(value)
            self.x[rays[found]] = x[found]
            root[moved] = np.sqrt(np.maximum(value - self.search.minimum, 0.0))
        return root

    def _at(self, distance: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Values on the axes, (k, 2)."""
        at = self.centre + distance[:, None] * self.directions[which]
        for k, own in enumerate(self.held.parameters):
            for bound in own.bounds:
                at[np.abs(at[:, k] - bound) < BOUND, k] = bound
        return at

    def _optima(
        self, distance: np.ndarray, which: np.ndarray, starts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Criterion and coordinates of the optima at these distances, from `starts`."""
        at = self._at(distance, which)
        lanes = [self.held.held(x, where) for x, where in zip(starts, at, strict=True)]
        found = optima(
            np.array([x for x, _ in lanes]),
            [axes for _, axes in lanes],
            self.search.design,
            reml=self.search.reml,
            more=True,
        )
        value = np.where(found.certified, found.value, np.nan)
        if found.certified.any():
            where = " and ".join(own.name for own in self.held.parameters)
            self.search.require_optimum(float(np.nanmin(value)), f"other values of {where}")
        return value, found.x

    def _mended(self, distance: np.ndarray) -> np.ndarray:
        """Rays on which a lower optimum is found at the edge from the neighbours' or other starts,
        to go on from there."""
        known = np.flatnonzero(distance > 0)
        if not known.size or not self.search.several:
            return known[:0]
        here, _ = self._optima(distance[known], known, self.x[known])
        better = np.zeros(known.size, bool)
        starts = [self.x[(known + step) % len(self.x)] for step in (-1, 1)]
        starts += [np.tile(other, (known.size, 1)) for other in self.others]
        for start in starts:
            value, x = self._optima(distance[known], known, start)
            lower = value < here - LOWER * (1 + np.abs(here))
            self.x[known[lower]] = x[lower]
            here = np.where(lower, value, here)
            better |= lower
        return known[better]


def _farthest(
    centre: np.ndarray, directions: np.ndarray, parameters: tuple[Parameter, Parameter]
) -> np.ndarray:
    """Distances (r,) at which rays leave the space of the parameters."""
    bounds = np.array([own.bounds for own in parameters])
    ahead = np.where(directions > 0, bounds[:, 1], bounds[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = np.where(directions == 0, np.inf, (ahead - centre) / directions)
    return np.maximum(distances.min(axis=1), 0.0)
