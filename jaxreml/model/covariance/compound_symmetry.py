"""Compound symmetry: equal variances and equal correlations of a term's effects.

Omega has two eigenvalues, a^2 along (1, ..., 1) and b^2 across, and the chart is (a, b): without
bounds, even in both, zero where Omega is singular. Parameters are the logarithm of the variance and
z = log(a / b), which is (log(1 + (q - 1) rho) - log(1 - rho)) / 2: Fisher's z for two effects, and
zero without a correlation for any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.lazy import jnp
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import FAR, LOG_ZERO, Block, Reading, Report
from jaxreml.model.covariance.factors import lower_factor
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's


@dataclass(frozen=True)
class CompoundSymmetry(Block):
    """See above; r = k = 2. For two effects or more, in the units they are given in."""

    linear = True

    def __post_init__(self) -> None:
        if self.size < 2:
            raise DataError("compound symmetry needs two or more effects of a term")

    @property
    def length(self) -> int:
        return 2

    @property
    def log_variances(self) -> int:
        return 1

    @property
    def faces(self) -> np.ndarray:
        return np.array([[0.0, 1.0], [1.0, 0.0]])

    @property
    def _patterns(self) -> np.ndarray:  # omega per unit of a^2 and b^2
        same = np.equal(*triangle(self.size))
        return np.stack([np.full(same.size, 1 / self.size), same - 1 / self.size], axis=1)

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        pair = Reading(f"{effects[1]}.{effects[0]}", (1, 0), least=-1 / (self.size - 1))
        return [Reading("", (0,)), pair]

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        return f"log_variance[{group}]", f"z[{group}]"

    def omega(self, chart: Array) -> Array:
        return jnp.tensordot(self._patterns.astype(chart.dtype), chart**2, axes=1)

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        others, (log_variance, z) = self.size - 1, parameters
        z = jnp.where(log_variance == -jnp.inf, 0.0, z)  # not read
        ratio = jnp.exp(jnp.where(z > 0, -2 * z, 2 * z))  # of the smaller to the larger eigenvalue
        a, b = jnp.where(z > 0, 1.0, ratio), jnp.where(z > 0, ratio, 1.0)
        unit = self.size * jnp.exp(log_variance - log_sigma2) / (a + others * b)
        patterns = self._patterns.astype(parameters.dtype)
        return jnp.tensordot(patterns, jnp.stack([a * unit, b * unit]), axes=1)

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        positive, one = chart > 0, jnp.where(chart > 0, chart, 1.0)
        any_left, both = positive[0] | positive[1], positive[0] & positive[1]
        variance = (chart[0] ** 2 + (self.size - 1) * chart[1] ** 2) / self.size
        variance = jnp.where(any_left, variance, 1.0)
        log = jnp.where(any_left, jnp.log(variance), LOG_ZERO) + log_sigma2
        sign = jnp.where(positive[0], 1.0, -1.0)
        z = jnp.where(both, jnp.log(one[0] / one[1]), jnp.where(any_left, sign * FAR, 0.0))
        limit = jnp.where(any_left, sign * jnp.inf, jnp.nan)
        shown = jnp.stack([jnp.where(any_left, log, -jnp.inf), jnp.where(both, z, limit)])
        return Report(jnp.stack([log, z]), jnp.stack([any_left, both]), shown)

    def snap(self, chart: Array, zero: float) -> Array:
        return jnp.where(jnp.abs(chart) <= zero, 0.0, jnp.abs(chart))

    def factor(self, chart: Array) -> Array:
        patterns = self._patterns[places(self.size)].astype(chart.dtype)
        return lower_factor(jnp.tensordot(patterns, chart, axes=1), 1e-12)

    def chart(self, factor: Array) -> Array:
        first, second = factor[0, 0], factor[1, 0]
        squares = first * jnp.stack([first + (self.size - 1) * second, first - second])
        return jnp.sqrt(jnp.where(squares > 1e-14 * first**2, squares, 0.0))

    def start(self, omega: Array, least: float) -> Array:
        matrix, q = omega[places(self.size)], self.size
        along, trace = jnp.sum(matrix, axis=(0, 1)) / q, jnp.sum(linalg.diagonal(matrix), axis=0)
        squares = jnp.stack([along, (trace - along) / (q - 1)])
        return jnp.sqrt(jnp.maximum(squares, least**2))

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return np.full(2, np.sqrt(np.mean(sds**2)))

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        """The patterns, in which V is linear."""
        return jnp.asarray(self._patterns, parameters.dtype)
