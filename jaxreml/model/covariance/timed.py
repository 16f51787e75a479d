"""Residuals at times of each subject's own: one variance, and correlations of the distance alone.

With as many times as rows there is no matrix of all times, and V is not linear in a few numbers.
So `omega` is the coordinate of the correlation itself, and the structures of it (`series`, `chain`)
add what second derivatives of V contribute. `theta` has the coordinate likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model.covariance.base import Block, Reading, Report
from jaxreml.model.covariance.correlations import Stationary

Array = Any  # NumPy's or JAX's


@dataclass(frozen=True)
class Timed(Block):
    """See above; of size 1, for the one number in omega.

    Attributes:
        correlation: of the distance.
    """

    correlation: Stationary

    written_out = True
    residual = True
    of_matrix = False
    linear = True  # is taken for it, so that Kenward and Roger's adjustment is to first order
    variances = (0,)
    homogeneous = True

    @property
    def length(self) -> int:
        return 1

    @property
    def log_variances(self) -> int:
        return 0

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        """As those of `Residual`: one variance."""
        return ("",)

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """The SD that all have, and the range or the correlation of neighbours."""
        return [Reading("", ()), self.correlation.reading]

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"z[Residual, {name}]" for name in self.correlation.names(effects))

    def relative(self, z: Array, times: np.ndarray, others: np.ndarray) -> Array:
        """Correlations (k, l) of residuals at two sets of times of one subject."""
        return self.correlation.of_distance(z, np.abs(times[:, None] - others))

    def omega(self, chart: Array) -> Array:
        return chart

    def omega_of_factor(self, factor: Array) -> Array:
        return factor[0]

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        return parameters

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        return Report(chart, namespace(chart).isfinite(chart), chart)

    def snap(self, chart: Array, zero: float) -> Array:
        return chart

    def factor(self, chart: Array) -> Array:
        return chart[None]

    def factor_of_omega(self, omega: Array) -> Array:
        return omega[None]

    def chart(self, factor: Array) -> Array:
        return factor[0]

    def start(self, omega: Array, least: float) -> Array:
        return omega

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return self.correlation.start(np.array(0.0))

    @property
    def faces(self) -> np.ndarray:
        return np.ones((0, 1))

    def jacobian(self, chart: Array) -> Array:
        return namespace(chart).ones_like(chart)[None]

    def curvature(self, chart: Array, gradient: Array) -> Array:
        return namespace(chart).zeros_like(chart)[None]

    def in_scale(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        none = np.zeros((2, 2, *parameters.shape[1:]), parameters.dtype)
        slope = none[:1].copy()
        slope[0, 0] = 1.0
        return slope, none

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        return np.ones((1, 1, *parameters.shape[1:]), parameters.dtype)
