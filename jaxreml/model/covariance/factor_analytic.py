"""Reduced rank: Omega = L L' with a loading of each of q effects on each of d factors.

The chart is L (q, d), row by row. L U for orthogonal U is the same Omega: the factors are turned so
that L is lower-trapezoidal, the first effect on the first factor only and so on, with a diagonal
that is not negative. Parameters are the loadings L sigma that are left, factor by factor: they have
any sign and no boundary. That Omega has rank d makes nothing singular; a factor without loadings
does, whose loadings are not determined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Block, Report
from jaxreml.model.covariance.natural import INDEX, places, triangle

Array = Any  # NumPy's or JAX's


@dataclass(frozen=True)
class FactorAnalytic(Block):
    """See above; r = q d, k = q d - d (d - 1) / 2.

    Attributes:
        rank: d.
    """

    rank: int = 2

    written_out = True

    @property
    def length(self) -> int:
        return self.size * self.rank

    @property
    def log_variances(self) -> int:
        return 0

    @property
    def inside(self) -> np.ndarray:
        columns, rows = np.nonzero(np.triu(np.ones((self.rank, self.size))))
        return (rows * self.rank + columns).astype(INDEX)

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        rows, columns = np.divmod(self.inside, self.rank)
        pairs = zip(rows, columns, strict=True)
        return tuple(f"loading[{group}, {effects[i]}, factor {k + 1}]" for i, k in pairs)

    def _square(self, chart: Array) -> Array:
        return chart.reshape(self.size, self.rank, *chart.shape[1:])

    def _whole(self, parameters: Array) -> Array:
        """The chart that has the parameters in the places `inside`."""
        xp = namespace(parameters)
        source = np.full(self.length, len(self.inside))
        source[self.inside] = np.arange(len(self.inside))
        return xp.concatenate([parameters, xp.zeros_like(parameters[:1])])[source]

    def omega(self, chart: Array) -> Array:
        square = self._square(chart)
        return linalg.matmul(square, linalg.transpose(square))[triangle(self.size)]

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        xp = namespace(parameters)
        known = xp.where(xp.isnan(parameters), 0.0, parameters)
        return xp.exp(-log_sigma2) * self.omega(self._whole(known))

    def snap(self, chart: Array, zero: float) -> Array:
        """Turned as above; factors whose loadings are all at most `zero` have none."""
        xp = namespace(chart)
        columns = [self._square(chart)[:, k] for k in range(self.rank)]
        for k in range(self.rank):
            for j in range(k + 1, self.rank):
                first, second = columns[k], columns[j]
                length = xp.sqrt(first[k] ** 2 + second[k] ** 2)
                some = length > 0
                cosine = xp.where(some, first[k] / xp.where(some, length, 1.0), 1.0)
                sine = xp.where(some, second[k] / xp.where(some, length, 1.0), 0.0)
                columns[k] = cosine * first + sine * second
                columns[j] = cosine * second - sine * first
            columns[k] = xp.where(columns[k][k] < 0, -1.0, 1.0) * columns[k]
            below = np.arange(self.size) >= k
            below = below.reshape(-1, *[1] * (chart.ndim - 1))
            columns[k] = xp.where(below, columns[k], 0.0)
            largest = xp.max(xp.abs(columns[k]), axis=0)
            columns[k] = xp.where(largest <= zero, 0.0, columns[k])
        return xp.stack(columns, axis=1).reshape(chart.shape)

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        xp = namespace(chart)
        loadings = (xp.exp(log_sigma2 / 2) * chart)[self.inside]
        some = xp.any(self._square(chart) != 0, axis=0)
        free = some[self.inside % self.rank]
        return Report(loadings, free, xp.where(free, loadings, xp.nan))

    def finite(self, parameters: Array, log_sigma2: Array) -> Array:
        xp = namespace(parameters)
        return xp.where(xp.isnan(parameters), 0.0, parameters)

    def boundary(
        self, effects: tuple[str, ...], factor: np.ndarray, parameters: np.ndarray
    ) -> list[str]:
        empty = np.flatnonzero(~np.any(factor[:, : self.rank] != 0, axis=0))
        return [f"factor {k + 1} of {{group}} has no loadings: its rank is lower" for k in empty]

    def factor(self, chart: Array) -> Array:
        xp, square = namespace(chart), self._square(chart)
        none = xp.zeros((self.size, self.size - self.rank, *chart.shape[1:]), chart.dtype)
        return xp.concatenate([square, none], axis=1)

    def chart(self, factor: Array) -> Array:
        return factor[:, : self.rank].reshape(self.length, *factor.shape[2:])

    def start(self, omega: Array, least: float) -> Array:
        """The first principal components."""
        xp = namespace(omega)
        values, vectors = linalg.eigh(omega[places(self.size)])
        sds = xp.sqrt(xp.maximum(values[-self.rank :], least**2))
        return (vectors[:, -self.rank :] * sds).reshape(self.length, *omega.shape[1:])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        loadings = np.zeros((self.size, self.rank))
        effects = np.arange(self.size)
        loadings[effects, effects % self.rank] = sds
        return loadings.ravel()

    @property
    def faces(self) -> np.ndarray:
        factors = np.tile(np.arange(self.rank), self.size)
        return np.array([factors != k for k in range(self.rank)], float)

    def flat(self, chart: Array) -> list[Array]:
        """Rotations, L A for skew A."""
        xp, square = namespace(chart), self._square(chart)
        found = []
        for j in range(self.rank):
            for k in range(j):
                columns = [xp.zeros_like(square[:, 0])] * self.rank
                columns[j], columns[k] = square[:, k], -square[:, j]
                found.append(xp.stack(columns, axis=1).reshape(chart.shape))
        return found

    def jacobian(self, chart: Array) -> Array:
        q, lanes, square = self.size, chart.shape[1:], self._square(chart)
        rows, columns = triangle(q)
        unit = np.eye(q, dtype=chart.dtype).reshape(q, q, 1, *[1] * len(lanes))
        block: Any = unit[rows] * square[columns][:, None] + unit[columns] * square[rows][:, None]
        return block.reshape(rows.size, self.length, *lanes)

    def curvature(self, chart: Array, gradient: Array) -> Array:
        q, d, lanes = self.size, self.rank, gradient.shape[1:]
        square = gradient[places(q)]
        square = square + linalg.eye_like(square) * square
        unit = np.eye(d, dtype=gradient.dtype).reshape(1, d, 1, d, *[1] * len(lanes))
        return (square[:, None, :, None] * unit).reshape(q * d, q * d, *lanes)

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        chart, own = self._whole(parameters), self.inside
        scale = namespace(parameters).exp(-log_sigma2)
        bend = self.curvature(chart, gradient)[own][:, own]
        return scale * self.jacobian(chart)[:, own], scale * bend

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """Covariances are sums of products of two loadings on a factor."""
        if not on_host(parameters):
            return super().bend(parameters, log_sigma2, spread)
        rows, columns = np.divmod(self.inside, self.rank)
        whole = np.zeros((self.size, self.size, *parameters.shape[1:]))
        first, second = np.nonzero(columns[:, None] == columns)
        np.add.at(whole, (rows[first], rows[second]), spread[first, second])
        whole = whole + np.swapaxes(whole, 0, 1)
        return np.exp(-log_sigma2) * whole[triangle(self.size)]

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        xp = namespace(parameters)
        free = xp.isfinite(parameters)
        finite = self.finite(parameters, log_sigma2)
        return xp.exp(-log_sigma2) * self.jacobian(self._whole(finite))[:, self.inside] * free
