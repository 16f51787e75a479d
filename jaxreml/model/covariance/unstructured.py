"""Any covariance matrix of a term's effects: what ``(x | g)`` is.

The chart is any square root L of Omega = L L', row by row: a triangle would be ill-conditioned
where a leading variance is nearly zero. Parameters are the log-variances and the correlation
coordinates of `factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model import linalg
from jaxreml.model.covariance import factors as cholesky
from jaxreml.model.covariance.base import FAR, LOG_ZERO, Block, Report
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.natural import INDEX, Sizes, places, triangle

Array = Any  # NumPy's or JAX's


@lru_cache
def unstructured(sizes: Sizes) -> Covariance:
    """Unstructured covariances of terms with so many effects each."""
    return Covariance(tuple(Unstructured(q) for q in sizes))


@lru_cache
def _pairs(q: int) -> np.ndarray:
    """How omega's logarithm changes with the log-variances where correlations stay, (m, q)."""
    linear = np.zeros((q * (q + 1) // 2, q))
    entries = np.arange(len(linear))
    for effects in triangle(q):
        np.add.at(linear, (entries, effects), 0.5)
    return linear


@dataclass(frozen=True)
class Unstructured(Block):
    """See above; r = q squared, k = m = q (q + 1) / 2."""

    any_basis = True
    written_out = True
    linear = True

    @property
    def length(self) -> int:
        return self.size**2

    @property
    def log_variances(self) -> int:
        return self.size

    @property
    def inside(self) -> np.ndarray:
        rows, columns = triangle(self.size)  # a lower triangle is one of the roots
        return (rows * self.size + columns).astype(INDEX)

    def parameter_names(self, group: str, effects: Sequence[str]) -> tuple[str, ...]:
        names = [f"log_variance[{group}, {effect}]" for effect in effects]
        pairs = [(j, i) for i in range(len(effects)) for j in range(i)]
        names += [f"z[{group}, {effects[j]}, {effects[i]}]" for j, i in pairs]
        return tuple(names)

    def _square(self, chart: Array) -> Array:
        return chart.reshape(self.size, self.size, *chart.shape[1:])

    def omega(self, chart: Array) -> Array:
        square = self._square(chart)
        return linalg.matmul(square, linalg.transpose(square))[triangle(self.size)]

    def jacobian(self, chart: Array) -> Array:
        q, lanes = self.size, chart.shape[1:]
        square = self._square(chart)
        rows, columns = triangle(q)
        unit = np.eye(q, dtype=chart.dtype).reshape(q, q, 1, *[1] * len(lanes))
        block: Any = unit[rows] * square[columns][:, None] + unit[columns] * square[rows][:, None]
        return block.reshape(rows.size, q * q, *lanes)

    def curvature(self, chart: Array, gradient: Array) -> Array:
        q, lanes = self.size, gradient.shape[1:]
        square = gradient[places(q)]
        square = square + linalg.eye_like(square) * square
        unit = np.eye(q, dtype=gradient.dtype).reshape(1, q, 1, q, *[1] * len(lanes))
        return (square[:, None, :, None] * unit).reshape(q * q, q * q, *lanes)

    def flat(self, chart: Array) -> list[Array]:
        """Rotations, L A for skew A."""
        square = self._square(chart)
        found = []
        for j in range(self.size):
            for k in range(j):
                columns = [namespace(chart).zeros_like(square[:, 0])] * self.size
                columns[j], columns[k] = square[:, k], -square[:, j]
                turned = namespace(chart).stack(columns, axis=1)
                found.append(turned.reshape(chart.shape))
        return found

    def snap(self, chart: Array, zero: float) -> Array:
        """The triangular root, pivots of at most `zero` set to zero.

        In a row with a pivot of zero, rounding errors are zeros: they would pass for a correlation,
        or for what a correlation of +-1 leaves.
        """
        xp = namespace(chart)
        square = self._square(chart)
        factor = cholesky.lower_factor(square, zero)
        error = cholesky.rounding(chart) ** 2 * xp.maximum(xp.sum(square**2, axis=1), 1.0)
        kept = (linalg.diagonal(factor) > 0)[:, None] | (factor**2 > error[:, None])
        return self.chart(xp.where(kept, factor, 0.0))

    def factor(self, chart: Array) -> Array:
        return self._square(chart)

    def chart(self, factor: Array) -> Array:
        return factor.reshape(self.length, *factor.shape[2:])

    def start(self, omega: Array, least: float) -> Array:
        """The Cholesky factor with pivots of at least `least` and bounded correlations."""
        xp = namespace(omega)
        matrix, q = omega[places(self.size)], self.size
        zero = xp.zeros_like(matrix[0, 0])
        factor: dict[tuple[int, int], Array] = {}
        for k in range(q):
            pivot = matrix[k, k] - sum((factor[k, j] ** 2 for j in range(k)), zero)
            factor[k, k] = xp.sqrt(xp.maximum(pivot, least**2))
            for i in range(k + 1, q):
                rest = matrix[i, k] - sum((factor[i, j] * factor[k, j] for j in range(k)), zero)
                bound = xp.sqrt(xp.maximum(matrix[i, i], least**2))
                factor[i, k] = xp.clip(rest / factor[k, k], -bound, bound)
        return xp.stack([factor.get((i, k), zero) for i in range(q) for k in range(q)])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return np.diag(sds).ravel()

    @property
    def faces(self) -> np.ndarray:
        rows = np.repeat(np.arange(self.size), self.size)
        return np.array([rows != row for row in range(self.size)], float)

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        """With all pivots positive everything is inside.

        A pivot of zero uses up its effect's variance at the last entry of its row that is not zero:
        that partial correlation is +-1 and those behind it are not identified.
        """
        xp = namespace(chart)
        factor, q = self._square(chart), self.size
        variances = xp.sum(factor**2, axis=1)
        positive = variances > 0
        logs = xp.where(positive, xp.log(xp.where(positive, variances, 1.0)), LOG_ZERO)
        logs = logs + log_sigma2
        z = cholesky.correlation_coordinates(factor, FAR)
        free, shown = [positive], [xp.where(positive, logs, -xp.inf)]
        pivots = linalg.diagonal(factor) > 0
        place = 0
        for i in range(1, q):
            _, left = cholesky.tails(factor[i], i)
            for j in range(i):
                inside = positive[i] & pivots[j] & left[j]
                at_limit = pivots[j] & ~left[j] & (factor[i, j] != 0)
                outside = xp.where(at_limit, xp.sign(z[place]) * xp.inf, xp.nan)
                free.append(inside[None])
                shown.append(xp.where(inside, z[place], outside)[None])
                place += 1
        return Report(xp.concatenate([logs, z]), xp.concatenate(free), xp.concatenate(shown))

    def factor_at(self, parameters: Array, log_sigma2: Array) -> Array:
        """Relative Cholesky factor (q, q) at `parameters` as `Report.shown` has them."""
        xp = namespace(parameters)
        log_variances = parameters[: self.size] - log_sigma2
        varies = log_variances > -xp.inf
        sd = xp.where(varies, xp.exp(xp.where(varies, log_variances, 0.0) / 2), 0.0)
        start, rows = self.size, []
        for i in range(self.size):
            rest, row = sd[i], []
            for z in parameters[start : start + i]:
                finite = xp.isfinite(z)
                inside = xp.where(finite, z, 0.0)
                at_limit = xp.isinf(z)
                row.append(rest * xp.where(at_limit, xp.sign(z), xp.tanh(inside)))
                rest = rest * xp.where(at_limit, 0.0, 1 / xp.cosh(inside))
            start += i
            rows.append(xp.stack([*row, rest, *[xp.zeros_like(rest)] * (self.size - 1 - i)]))
        return xp.stack(rows)

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        """A coordinate of NaN that others on the boundary leave undefined is not read."""
        xp = namespace(parameters)
        log_variances, z = parameters[: self.size], parameters[self.size :]
        if self.size > 1:
            undefined = self._undefined(log_variances, z)
            z = xp.where(xp.isnan(z) & undefined, 0.0, z)
        return self._scale(log_variances, log_sigma2) * cholesky.correlations(z, self.size)

    def _undefined(self, log_variances: Array, z: Array) -> Array:
        """Which correlation coordinates, booleans like `z`, others leave undefined.

        That of effects i > j is where one of them has no variance, or none beside what it shares
        with the effects before it (j) or before j (i).
        """
        xp = namespace(z)
        zero, limit = log_variances == -xp.inf, xp.isinf(z)
        none = xp.zeros_like(zero[0])
        undefined: list[Array] = []
        spent: list[Array] = []  # per effect
        for i in range(self.size):
            gone = zero[i]
            for j in range(i):
                at_limit = limit[len(undefined)]
                undefined.append(none | gone | spent[j])
                gone = gone | at_limit
            spent.append(gone)
        return xp.stack(undefined)

    def _scale(self, log_variances: Array, log_sigma2: Array) -> Array:
        """Geometric means of the two variances each entry of omega belongs to, over sigma2."""
        xp = namespace(log_variances)
        rows, columns = triangle(self.size)
        return xp.exp((log_variances[rows] + log_variances[columns]) / 2 - log_sigma2)

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """As omega = scale * correlations, and log(scale) is linear in the log-variances."""
        xp, z = namespace(parameters), parameters[self.size :]
        scale = self._scale(parameters[: self.size], log_sigma2)
        linear = _pairs(self.size).astype(parameters.dtype)
        omega = scale * cholesky.correlations(z, self.size)
        jacobian = omega[:, None] * linear.reshape(*linear.shape, *[1] * (parameters.ndim - 1))
        curvature = xp.tensordot(linear.T, gradient[:, None] * jacobian, axes=1)
        if self.size == 1:
            return jacobian, curvature
        slope, bend = cholesky.correlation_derivatives(z, self.size)
        by_z = scale[:, None] * slope
        mixed = xp.tensordot(linear.T, gradient[:, None] * by_z, axes=1)
        corner = xp.sum((gradient * scale)[:, None, None] * bend, axis=0)
        curvature = xp.concatenate(
            [
                xp.concatenate([curvature, mixed], axis=1),
                xp.concatenate([linalg.transpose(mixed), corner], axis=1),
            ]
        )
        return xp.concatenate([jacobian, by_z], axis=1), curvature

    def directions(self, parameters: Array, log_sigma2: Array) -> None:
        """All: V is linear in variances and covariances."""
