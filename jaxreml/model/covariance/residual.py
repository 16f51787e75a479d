"""The covariance of residuals within a subject: V = sigma2 M, M over its visits.

Visits are the effects of a term on the subjects, and M = I + Omega: so V0 = I + Z Omega Z' as for
random effects, but for Omega, which is no covariance matrix. sigma2 is the first variance, which
all visits have or the first of them. The chart is made of logarithms of relative SDs and the
coordinates of a family of `correlations`: nothing is on a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block, Reading, Report
from jaxreml.model.covariance.correlations import Correlation
from jaxreml.model.covariance.factors import factor_semidefinite
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's
LEAST, LARGEST = 0.05, 20.0  # ratios of variances to start from


@dataclass(frozen=True)
class Residual(Block):
    """See above.

    Attributes:
        correlation: of the visits, of this size.
        variances: q, which variance each visit has, of 0, 1, ...; the first has 0.
    """

    correlation: Correlation
    variances: tuple[int, ...]

    written_out = True
    residual = True

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        own = self.correlation
        if not own.count or self.log_variances == self.size - 1:
            return own.linear_each
        of = np.array(self.variances)
        return own.linear_shared and bool((of[:, None] == of)[own.together].all())

    @property
    def length(self) -> int:
        return self.log_variances + self.correlation.count

    @property
    def log_variances(self) -> int:
        return max(self.variances)

    @property
    def homogeneous(self) -> bool:
        """Whether all visits have one variance, those that were not seen, too."""
        return not self.log_variances

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        """What each variance is of: a visit, or what labels like "arm: visit" share; "" for one
        that all have."""
        found = []
        for k in range(self.log_variances + 1):
            own = [effect for effect, of in zip(effects, self.variances, strict=True) if of == k]
            found.append(own[0] if len(own) == 1 else own[0].rpartition(": ")[0])
        return tuple(found) if len(found) > 1 else ("",)

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        names = [f"log_variance[Residual, {label}]" for label in self.variance_labels(effects)[1:]]
        return (*names, *(f"z[Residual, {name}]" for name in self.correlation.names(effects)))

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """The variances once each, and what describes the correlations."""
        labels = self.variance_labels(effects)
        sds = [Reading(label, (self.variances.index(k),)) for k, label in enumerate(labels)]
        others = self.correlation.readings(effects)
        shift = self.log_variances
        return sds + [
            own._replace(parameter=own.parameter + shift) if own.parameter >= 0 else own
            for own in others
        ]

    def last_name(self, effects: tuple[str, ...]) -> str:
        label = self.variance_labels(effects)[0]
        return f"Residual, {label}" if label else "Residual"

    def _scale(self, chart: Array) -> Array:
        """Products of the relative SDs of the two visits of each entry."""
        xp = namespace(chart)
        logs = xp.concatenate([xp.zeros_like(chart[:1]), chart[: self.log_variances]])
        logs = logs[np.array(self.variances)]
        rows, columns = triangle(self.size)
        return xp.exp(logs[rows] + logs[columns])

    def _relative(self, chart: Array) -> Array:
        """M's entries (t, ...)."""
        found = self.correlation.entries(chart[self.log_variances :])
        return self._scale(chart) * found if self.log_variances else found

    def _identity(self, like: Array) -> Array:
        same = np.equal(*triangle(self.size)).astype(like.dtype)
        return same.reshape(-1, *[1] * (like.ndim - 1))

    def omega(self, chart: Array) -> Array:
        found = self._relative(chart)
        return found - self._identity(found)

    def omega_of_factor(self, factor: Array) -> Array:
        found = natural.omega_from_factors((factor,))
        return found - self._identity(found)

    def factor_of_omega(self, omega: Array) -> Array:
        return super().factor_of_omega(omega + self._identity(omega))

    def _chart_at(self, parameters: Array, log_sigma2: Array) -> Array:
        logs, z = parameters[: self.log_variances], parameters[self.log_variances :]
        return namespace(parameters).concatenate([(logs - log_sigma2) / 2, z])

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        return self.omega(self._chart_at(parameters, log_sigma2))

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        xp, count = namespace(chart), self.log_variances
        found = xp.concatenate([2 * chart[:count] + log_sigma2, chart[count:]])
        return Report(found, xp.isfinite(found), found)

    def snap(self, chart: Array, zero: float) -> Array:
        return chart

    def factor(self, chart: Array) -> Array:
        matrix = self._relative(chart)[places(self.size)]
        return factor_semidefinite(matrix, 0.0)[0]

    def chart(self, factor: Array) -> Array:
        xp = namespace(factor)
        matrix = linalg.matmul(factor, linalg.transpose(factor))
        variances = linalg.diagonal(matrix)
        sds = xp.sqrt(variances)
        z = self.correlation.coordinates(matrix / (sds[:, None] * sds))
        return xp.concatenate([xp.log(variances[self._first] / variances[:1]) / 2, z])

    def chart_at(self, factor: Array, parameters: Array, log_sigma2: Array) -> Array:
        """By the parameters, none of which is on a boundary."""
        return self._chart_at(parameters, log_sigma2)

    @property
    def _first(self) -> np.ndarray:
        """The first visit of each variance but the first."""
        return np.array([self.variances.index(k + 1) for k in range(self.log_variances)], int)

    def start(self, omega: Array, least: float) -> Array:
        """Variances by their estimates, and the mean of the correlations for all of them."""
        xp = namespace(omega)
        matrix = (omega + self._identity(omega))[places(self.size)]
        variances = linalg.diagonal(matrix)
        largest = xp.max(variances, axis=0)
        variances = xp.maximum(variances, xp.where(largest > 0, largest, 1.0) * LEAST)
        sds = xp.sqrt(variances)
        rows, columns = np.tril_indices(self.size, -1)
        together = self.correlation.together[rows, columns]
        common = xp.mean((matrix / (sds[:, None] * sds))[rows[together], columns[together]], axis=0)
        ratios = xp.clip(variances / variances[:1], LEAST, LARGEST)
        logs = xp.log(ratios[self._first]) / 2
        return xp.concatenate([logs, self.correlation.start(xp.clip(common, -1.0, 1.0))])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros(self.log_variances), self.correlation.start(np.array(0.0))])

    @property
    def faces(self) -> np.ndarray:
        return np.ones((0, self.length))

    def jacobian(self, chart: Array) -> Array:
        if not on_host(chart):
            return super().jacobian(chart)
        return self._derivatives(chart)[0]

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        if not on_host(chart):
            return super().slopes(chart, gradient)
        first, second = self._derivatives(chart)
        return first, np.sum(gradient[:, None, None] * second, axis=0)

    def _derivatives(self, chart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second derivatives of M, (t, r, ...) and (t, r, r, ...): the logarithm of an
        entry is linear in the logarithms of the SDs."""
        count, lanes = self.log_variances, chart.shape[1:]
        slope, bend = self.correlation.derivatives(chart[count:])
        if not count:
            return slope, bend
        scale = self._scale(chart)[:, None]
        whole = scale[:, 0] * self.correlation.entries(chart[count:])
        linear = np.zeros((len(whole), count + 1))
        for effects in triangle(self.size):
            np.add.at(linear, (np.arange(len(whole)), np.array(self.variances)[effects]), 1.0)
        linear = linear[:, 1:].reshape(len(whole), count, *[1] * len(lanes))
        by_logs, by_z = whole[:, None] * linear, scale * slope
        corner = by_logs[:, :, None] * linear[:, None]
        mixed = linear[:, :, None] * by_z[:, None]
        upper = np.concatenate([corner, mixed], axis=2)
        lower = np.concatenate([np.swapaxes(mixed, 1, 2), scale[:, :, None] * bend], axis=2)
        return np.concatenate([by_logs, by_z], axis=1), np.concatenate([upper, lower], axis=1)

    def in_scale(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """By the chart, whose logarithms are (log-variance - log sigma2) / 2."""
        chart = self._chart_at(parameters, log_sigma2)
        moves = self._moves(chart)
        slope, bend = self.slopes(chart, gradient)
        bend = linalg.matmul(linalg.transpose(moves), linalg.matmul(bend, moves))
        return linalg.matmul(slope, moves), bend

    def _moves(self, chart: Array) -> Array:
        """How the chart changes with the parameters and log sigma2, (r, k + 1, ...)."""
        count = self.log_variances
        moves = np.zeros((self.length, self.length + 1), chart.dtype)
        moves[:count, :count] = np.eye(count) / 2
        moves[count:, count:-1] = np.eye(self.length - count)
        moves[:count, -1] = -0.5
        return moves.reshape(*moves.shape, *[1] * (chart.ndim - 1))

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        """Without one for the first variance, which is sigma2."""
        if self.log_variances == self.size - 1 and self.correlation.linear:
            t = self.size * (self.size + 1) // 2
            found = np.eye(t, dtype=parameters.dtype)[:, 1:]
            return found.reshape(*found.shape, *[1] * (parameters.ndim - 1))
        chart = self._chart_at(parameters, log_sigma2)
        return linalg.matmul(self.jacobian(chart), self._moves(chart)[:, :-1])

    def stated(self, coordinates: Array) -> Array:
        return self.correlation.stated(coordinates)

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """Of sigma2 M: with x the chart, l log sigma2 and W the spread, the sum of W_xx M_xx,
        2 W_xl M_x and W_ll M, and what the second derivatives of logarithms and coordinates in
        variances and correlations add to M_x; what they add to M takes W_ll M away."""
        if self.linear:
            return None
        xp, count = namespace(parameters, spread), self.log_variances
        chart = self._chart_at(parameters, log_sigma2)
        moves = self._moves(chart)
        if on_host(chart):
            first, second = self._derivatives(chart)
        else:
            first, second = super().jacobian(chart), self.second(chart)
        steps = -linalg.diagonal(spread)
        z = slice(count, len(parameters))
        own = self.correlation.drift(parameters[z], spread[z, z])
        steps = xp.concatenate([steps[:count], own, steps[-1:]]) + 2 * spread[:, -1]
        inner = linalg.matmul(moves, linalg.matmul(spread, linalg.transpose(moves)))
        bent = xp.einsum("ij...,tij...->t...", inner, second)
        return bent + linalg.matmul(first, linalg.matmul(moves, steps[:, None]))[:, 0]
