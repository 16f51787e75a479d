"""Random effects with relative SDs, one for all or one for each, times a family of correlations.

Omega_ij = s_i s_j R_ij with R of `correlations`. The chart is the SDs, or, where correlated effects
have one each, their square roots, and the angles of R: without bounds, and a variance of zero and
a correlation at its limit are ordinary stationary points in it. An SD of one of several correlated
effects is not: Omega is linear in it, and below zero it would turn the signs of its correlations.
Parameters are log-variances and the coordinates z of R.

At a limit z is infinite, and so is the log-variance at an SD of zero. A coordinate of R that these
leave undetermined is NaN: that of all if fewer than two effects vary, say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance.base import FAR, LOG_ZERO, Block, Reading, Report
from jaxreml.model.covariance.correlations import Correlation
from jaxreml.model.covariance.factors import factor_semidefinite, rounding
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's


@dataclass(frozen=True)
class Structured(Block):
    """See above.

    Attributes:
        correlation: of the effects, of this size.
        each: whether every effect has a variance of its own.
    """

    correlation: Correlation
    each: bool = True

    written_out = True

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.patterns is not None

    @property
    def any_scale(self) -> bool:
        return self.each

    @property
    def length(self) -> int:
        return self.log_variances + self.correlation.count

    @property
    def log_variances(self) -> int:
        return self.size if self.each else 1

    @property
    def of_effects(self) -> np.ndarray:
        return np.arange(self.size) if self.each else np.zeros(self.size, int)

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        return effects if self.each else (_all(effects),)

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        names = [f"log_variance[{group}, {own}]" for own in self.variance_labels(effects)]
        kinds = self.correlation.names(effects)
        return (*names, *(f"z[{group}, {_all(effects)}, {kind}]" for kind in kinds))

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        labels = self.variance_labels(effects)
        sds = [Reading(label, (k,)) for k, label in enumerate(labels)]
        shift = self.log_variances
        return sds + [
            own._replace(parameter=own.parameter + shift) if own.parameter >= 0 else own
            for own in self.correlation.readings(effects)
        ]

    @property
    def _rooted(self) -> bool:
        """Whether the chart has square roots of SDs."""
        return self.each and self.correlation.count > 0

    def _sds(self, chart: Array) -> Array:
        """Those of all variances."""
        own = chart[: self.log_variances]
        return own * own if self._rooted else own

    def _of_sds(self, sds: Array) -> Array:
        """What the chart has of SDs, which are not negative."""
        return namespace(sds).sqrt(sds) if self._rooted else sds

    def parameter_of(self, place: int, entry: float) -> float:
        low, high = self.ends(place)
        if not low < entry < high:
            return -np.inf if entry <= low else np.inf
        own = place - self.log_variances
        t = self.correlation.angles(np.full(self.correlation.count, self.correlation.centre))
        t[own] = entry
        return float(self.correlation.of_angles(t)[own])

    def ends(self, place: int) -> tuple[float, float]:
        return self.correlation.ends

    def _parts(self, vector: Array) -> tuple[Array, Array]:
        """SDs of all effects, or what else there is one of for a variance, and the rest."""
        return vector[: self.log_variances][self.of_effects], vector[self.log_variances :]

    @cached_property
    def _pairs(self) -> np.ndarray:
        """How often the SD of each variance is a factor of each entry, (t, variances)."""
        found = np.zeros((self.size * (self.size + 1) // 2, self.log_variances))
        for effects in triangle(self.size):
            np.add.at(found, (np.arange(len(found)), self.of_effects[effects]), 1.0)
        return found

    def omega(self, chart: Array) -> Array:
        sds, t = self._sds(chart)[self.of_effects], chart[self.log_variances :]
        rows, columns = triangle(self.size)
        return sds[rows] * sds[columns] * self.correlation.entries_at(t)

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        xp = namespace(parameters)
        logs, z = self._parts(parameters)
        z = self._readable(parameters, z)
        rows, columns = triangle(self.size)
        scale = xp.exp((logs[rows] + logs[columns]) / 2 - log_sigma2)
        return scale * self.correlation.entries(z)

    def _readable(self, parameters: Array, z: Array) -> Array:
        """A coordinate of NaN that others on the boundary leave undefined is not read."""
        xp = namespace(parameters)
        boundary = xp.any(xp.isinf(parameters), axis=0)
        return xp.where(xp.isnan(z) & boundary, self.correlation.centre, z)

    def snap(self, chart: Array, zero: float) -> Array:
        xp, count = namespace(chart), self.log_variances
        sds = xp.abs(self._sds(chart))
        sds = xp.where(sds <= zero, 0.0, sds)
        largest = xp.max(sds, axis=0)
        share = zero / xp.clip(largest, zero, 1.0)  # an SD above 1 is as good as 1
        correlation = self.correlation
        t = correlation.snapped(correlation.folded(chart[count:]), share)
        return xp.concatenate([self._of_sds(sds), xp.where(largest > 0, t, 0.0)])

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        xp, count = namespace(chart), self.log_variances
        sds, t = self._sds(chart), chart[count:]
        positive = sds > 0
        logs = xp.where(positive, 2 * xp.log(xp.where(positive, sds, 1.0)), LOG_ZERO)
        logs = logs + log_sigma2
        shown = xp.where(positive, logs, -xp.inf)
        if not self.correlation.count:
            return Report(logs, positive, shown)
        family = self.correlation
        limit, defined = family.limits(t), self._determined(sds, t)
        inside = defined & (limit == 0)
        middle = family.angles(xp.zeros_like(t) + family.centre)
        z = xp.where(inside, family.of_angles(xp.where(inside, t, middle)), family.centre)
        outside = xp.where(defined, xp.copysign(xp.inf, limit), xp.nan)
        return Report(
            xp.concatenate([logs, z + xp.where(defined, limit, 0.0) * FAR]),
            xp.concatenate([positive, inside]),
            xp.concatenate([shown, xp.where(inside, z, outside)]),
        )

    def _determined(self, sds: Array, t: Array) -> Array:
        """Which coordinates of R an entry of Omega depends on, (c, ...)."""
        xp, vary = namespace(sds), (sds > 0)[self.of_effects]
        rows, columns = triangle(self.size)
        entries = (vary[rows] & vary[columns])[:, None]
        return xp.any(entries & self.correlation.depends(t), axis=0)

    def finite(self, parameters: Array, log_sigma2: Array) -> Array:
        xp, count = namespace(parameters), self.log_variances
        centre = self.correlation.centre
        z = xp.clip(parameters[count:], centre - FAR, centre + FAR)
        logs = xp.maximum(parameters[:count], log_sigma2 + LOG_ZERO)
        return xp.concatenate([logs, xp.where(xp.isnan(z), centre, z)])

    def factor(self, chart: Array) -> Array:
        sds, t = self._sds(chart)[self.of_effects], chart[self.log_variances :]
        matrix = self.correlation.entries_at(t)[places(self.size)]
        return sds[:, None] * factor_semidefinite(matrix, rounding(chart))[0]

    def boundary(
        self, effects: tuple[str, ...], factor: np.ndarray, parameters: np.ndarray
    ) -> list[str]:
        if not self.each and not np.any(factor):
            return [f"the variance of {_all(effects)} of {{group}} is zero"]
        found = super().boundary(effects, factor, parameters)
        at_limit = np.isinf(parameters[self.log_variances :]).any()
        if at_limit and not found:
            found.append("the range of {group} is zero: its effects are not correlated")
        return found

    def chart_at(self, factor: Array, parameters: Array, log_sigma2: Array) -> Array:
        """SDs by the factor, angles by the parameters."""
        xp, count = namespace(factor), self.log_variances
        sds = self._of_sds(xp.sqrt(xp.sum(factor * factor, axis=1))[:count])
        z = self._readable(parameters, parameters[count:])
        return self.snap(xp.concatenate([sds, self.correlation.angles(z)]), rounding(factor))

    def rescaled(self, chart: Array, units: Array) -> Array:
        count = self.log_variances
        own = self._of_sds(self._sds(chart) / units)
        return namespace(chart).concatenate([own, chart[count:]])

    def start(self, omega: Array, least: float) -> Array:
        """SDs by their estimates, and the mean of the correlations for all of them."""
        xp, matrix = namespace(omega), omega[places(self.size)]
        variances = linalg.diagonal(matrix)
        if not self.each:
            variances = xp.mean(variances, axis=0, keepdims=True)
        sds = xp.sqrt(xp.maximum(variances, least**2))
        if not self.correlation.count:
            return sds
        own = sds[self.of_effects]
        below = np.tril_indices(self.size, -1)
        common = xp.mean((matrix / (own[:, None] * own))[below], axis=0)
        z = self.correlation.start(xp.clip(common, -1.0, 1.0))
        return xp.concatenate([self._of_sds(sds), self.correlation.angles(z)])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        own = sds if self.each else np.sqrt(np.mean(sds**2, keepdims=True))
        if not self.correlation.count:
            return own
        z = self.correlation.start(np.array(0.0))
        return np.append(self._of_sds(own), self.correlation.angles(z))

    @property
    def faces(self) -> np.ndarray:
        zero = np.eye(self.length)[: self.log_variances]
        return 1.0 - zero

    def jacobian(self, chart: Array) -> Array:
        if not on_host(chart):
            return super().jacobian(chart)
        return self.slopes(chart, np.zeros((len(self._pairs), *chart.shape[1:])))[0]

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        if not on_host(chart):
            return super().slopes(chart, gradient)
        count, lanes = self.log_variances, chart.shape[1:]
        sds, t = self._sds(chart)[self.of_effects], chart[count:]
        rows, columns = triangle(self.size)
        first = np.zeros((len(rows), count, *lanes))
        each, of = np.arange(len(rows)), self.of_effects
        np.add.at(first, (each, of[rows]), sds[columns])
        np.add.at(first, (each, of[columns]), sds[rows])
        values = self.correlation.entries_at(t)
        weights = gradient * values
        bend = np.zeros((count, count, *lanes))
        np.add.at(bend, (of[rows], of[columns]), weights)
        np.add.at(bend, (of[columns], of[rows]), weights)
        if self._rooted:  # s = r^2
            along = np.sum(weights[:, None] * first, axis=0)
            slope = 2 * chart[:count]
            first, bend = first * slope, bend * slope[:, None] * slope
            bend[np.arange(count), np.arange(count)] += 2 * along
        derivatives = self.correlation.derivatives_at(t)
        return _of_product(sds[rows] * sds[columns], first, bend, values, *derivatives, gradient)

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """The logarithm of an entry is linear in the log-variances."""
        if not on_host(parameters):
            return super().derivatives(parameters, log_sigma2, gradient)
        logs, z = self._parts(parameters)
        rows, columns = triangle(self.size)
        scale = np.exp((logs[rows] + logs[columns]) / 2 - log_sigma2)
        linear = (self._pairs / 2).reshape(*self._pairs.shape, *[1] * (parameters.ndim - 1))
        first, values = scale[:, None] * linear, self.correlation.entries(z)
        weights = (gradient * values)[:, None] * first
        bend = np.tensordot(self._pairs.T / 2, weights, axes=1)
        return _of_product(scale, first, bend, values, *self.correlation.derivatives(z), gradient)

    @property
    def patterns(self) -> np.ndarray | None:
        rows, columns = triangle(self.size)
        kinds = self.correlation.kinds
        if self.each and self.correlation.count:
            kinds = np.arange(3) if self.size == 2 else None
        elif self.each:
            kinds = np.where(rows == columns, rows, -1)
        if kinds is None:
            return None
        return np.equal.outer(kinds, np.unique(kinds[kinds >= 0])).astype(float)

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        xp, known = namespace(parameters), self.patterns
        if known is not None:
            return xp.asarray(known, parameters.dtype)
        if not on_host(parameters):
            return super().directions(parameters, log_sigma2)
        finite = self.finite(parameters, log_sigma2)
        none = np.zeros((len(self._pairs), *parameters.shape[1:]))
        slope, _ = self.derivatives(finite, log_sigma2, none)
        return slope * np.isfinite(parameters)

    def stated(self, coordinates: Array) -> Array:
        return self.correlation.stated(coordinates)

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """An entry is exp of a sum of log-variances over sigma2, times one of R(z)."""
        if self.linear or not on_host(parameters):
            return super().bend(parameters, log_sigma2, spread)
        count, (logs, z) = self.log_variances, self._parts(parameters)
        rows, columns = triangle(self.size)
        scale = np.exp((logs[rows] + logs[columns]) / 2 - log_sigma2)
        values, (slope, curve) = self.correlation.entries(z), self.correlation.derivatives(z)
        half = self._pairs / 2
        own, mixed, rest = (
            spread[:count, :count],
            spread[:count, count:-1],
            spread[count:-1, count:-1],
        )
        of_logs = np.einsum("ab...,ta,tb->t...", own, half, half)
        of_logs = of_logs - np.tensordot(half, linalg.diagonal(own), axes=1)
        steps = 2 * np.tensordot(half, mixed, axes=1) + self.correlation.drift(z, rest)
        bent = np.einsum("tc...,tc...->t...", slope, steps)
        bent = bent + np.einsum("cd...,tcd...->t...", rest, curve)
        return scale * (values * of_logs + bent)


def _all(effects: tuple[str, ...]) -> str:
    """A label of all effects of a term."""
    return effects[0] if len(effects) == 1 else f"{effects[0]}..{effects[-1]}"


def _of_product(
    scale: np.ndarray,
    first: np.ndarray,
    bend: np.ndarray,
    values: np.ndarray,
    slope: np.ndarray,
    curve: np.ndarray,
    gradient: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of scale times values, which move with different numbers, on the host.

    Args:
        scale, first: (t, ...) and (t, a, ...), the scale and its derivatives.
        bend: (a, a, ...), second ones of gradient' (scale values).
        values, slope, curve: (t, ...), (t, c, ...) and (t, c, c, ...), of the values.
        gradient: (t, ...).

    Returns:
        (t, a + c, ...), and second ones of gradient' (scale values), (a + c, a + c, ...).
    """
    jacobian = np.concatenate([first * values[:, None], scale[:, None] * slope], axis=1)
    mixed = np.einsum("t...,ta...,tc...->ac...", gradient, first, slope)
    corner = np.einsum("t...,tcd...->cd...", gradient * scale, curve)
    upper = np.concatenate([bend, mixed], axis=1)
    lower = np.concatenate([np.swapaxes(mixed, 0, 1), corner], axis=1)
    return jacobian, np.concatenate([upper, lower])
