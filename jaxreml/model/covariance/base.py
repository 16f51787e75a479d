"""`Block`, the covariance of one random term.

A covariance is a map from a few parameters to `omega` (see `natural`), with derivatives. It has two
charts, as what is good to read is not good to move in:

chart        what the optimiser moves, r numbers: without bounds, smooth where a variance vanishes,
             so that the boundary of the parameter space is a set of ordinary stationary points
parameters   what people read and standard errors are for, k numbers: logarithms of variances,
             unconstrained coordinates of correlations. Minus infinity at a variance of zero

A new covariance is a frozen dataclass that derives from `Block`, in a file of its own:
`factor_analytic` is one. Derivatives are by autodiff unless it writes them out. Arrays may have
one more axis at the end, the lanes of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.runtime import neutral
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.factors import factor_semidefinite, rounding

Array = Any  # NumPy's or JAX's
LOG_ZERO = -100.0  # stands for log 0 in derivatives, which vanish there
FAR = 20.0  # stands for an infinite coordinate of a correlation likewise


class Report(NamedTuple):
    """Parameters at a point of the chart.

    Attributes:
        finite: (k, ...), with LOG_ZERO and FAR in the place of infinities.
        free: (k, ...), booleans, which are inside the parameter space.
        shown: (k, ...), with -inf for the logarithm of a variance of zero, +-inf for the coordinate
            of a correlation at a limit and NaN for one that is not identified there.
    """

    finite: Array
    free: Array
    shown: Array


class Reading(NamedTuple):
    """A number that people read of a covariance: the SD of an effect, the correlation of two, or
    one of the parameters.

    Attributes:
        label: what it is of; "" for an SD that all effects share.
        effects: places of the effect or of the two, the later first; none for a parameter.
        parameter: its place among the block's parameters, and in its chart (see
            `Block.parameter_of`); -1 for others.
        transform: how the parameter was made from what people read: "log", "logit", "fisher"
            (arctanh) or None; or an object with `coordinate`, `value`, `slope` and `domain`
            (`custom.Transform`).
        least: the least value that the correlation can have.
    """

    label: str
    effects: tuple[int, ...]
    parameter: int = -1
    transform: Any = None
    least: float = -1.0


@dataclass(frozen=True)
class Block(ABC):
    """Covariance of the effects of one random term, relative to the residual variance.

    Attributes:
        size: q, number of effects; omega has q (q + 1) / 2 numbers.
    """

    size: int

    # Whether there is a member of the family for every basis of the effects: then they may be
    # scaled and made orthogonal inside a design, and the chart is a square root of Omega.
    any_basis = False
    # Whether there is one for every scale of each effect at least, see `rescaled`.
    any_scale = False
    # Whether its log-variances are those of the effects, by `of_effects`.
    of_variances = True
    # Whether it writes out all derivatives, for NumPy's arrays too; by JAX otherwise.
    written_out = False
    # Whether covariances are linear in the parameters that SAS has for them, variances and
    # covariances: then Kenward and Roger's adjustment has no term in second derivatives of V.
    linear = False
    # Whether it is that of the residuals, I + Omega times sigma2 (`residual`): then Omega need not
    # be semidefinite, and `factor` and `chart` are of I + Omega.
    residual = False

    # Whether omega are covariances of the effects: not where it is a coordinate (`timed`).
    of_matrix = True

    @property
    @abstractmethod
    def length(self) -> int:
        """r, numbers in the chart."""

    @property
    @abstractmethod
    def log_variances(self) -> int:
        """How many parameters, the first, are log-variances."""

    @abstractmethod
    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        """k names."""

    @abstractmethod
    def omega(self, chart: Array) -> Array:
        """Relative covariances at a point of the chart, (r, ...) to (q (q + 1) / 2, ...)."""

    @abstractmethod
    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        """The same at `parameters` (k, ...), and their limits on the boundary, as `Report.shown`
        has it, with derivatives of zero there."""

    @abstractmethod
    def report(self, chart: Array, log_sigma2: Array) -> Report:
        """Parameters at a point of the chart on which `snap` has been."""

    @abstractmethod
    def snap(self, chart: Array, zero: float) -> Array:
        """A point with the same covariance, relative SDs of at most `zero` at exactly zero."""

    @abstractmethod
    def factor(self, chart: Array) -> Array:
        """Lower Cholesky factor (q, q, ...) of a point on which `snap` has been, zeros exact."""

    def chart(self, factor: Array) -> Array:
        """The inverse of `factor`. A block that has none writes `chart_at`."""
        raise NotImplementedError

    def chart_at(self, factor: Array, parameters: Array, log_sigma2: Array) -> Array:
        """The point of the chart of an estimate, given its `factor` and its parameters as
        `Report.shown` has them. Where variances vanish the factor says more exactly which."""
        return self.chart(factor)

    @abstractmethod
    def start(self, omega: Array, least: float) -> Array:
        """A point near moment estimates of omega, relative SDs of at least `least`."""

    @abstractmethod
    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        """A point (r,) near uncorrelated effects with these relative SDs, (q,)."""

    @property
    @abstractmethod
    def faces(self) -> np.ndarray:
        """Factors (faces, r) that take a point of the chart to where variances are zero."""

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """What describes the covariance of effects of these names: their SDs and correlations in
        the order of `triangle`, unless fewer say all."""
        pairs = zip(*natural.triangle(self.size), strict=True)
        return [
            Reading(effects[i], (i,)) if i == j else Reading(f"{effects[i]}.{effects[j]}", (i, j))
            for i, j in pairs
        ]

    def parameter_of(self, place: int, entry: float) -> float:
        """A parameter that `readings` has, at this entry of the chart: of no others. Infinite at an
        end (`ends`)."""
        return entry

    def ends(self, place: int) -> tuple[float, float]:
        """Between which entries of the chart that parameter has all its values, in their order."""
        return -np.inf, np.inf

    def omega_of_factor(self, factor: Array) -> Array:
        """Relative covariances of what `factor` gives, (q, q, ...) to (q (q + 1) / 2, ...)."""
        return natural.omega_from_factors((factor,))

    def factor_of_omega(self, omega: Array) -> Array:
        """The inverse of `omega_of_factor` for one data set; near a singular point with half of the
        digits."""
        matrix = omega[natural.places(self.size)]
        return factor_semidefinite(matrix, rounding(matrix))[0]

    def factor_at(self, parameters: Array, log_sigma2: Array) -> Array:
        """Lower Cholesky factor (q, q) at `parameters` as `natural` takes them. It is needed
        where `any_basis` only."""
        raise NotImplementedError

    def rescaled(self, chart: Array, units: Array) -> Array:
        """The point of the chart for effects multiplied by `units` (q,), which divide their SDs. It
        is needed where `any_scale` only."""
        raise NotImplementedError

    @property
    def of_effects(self) -> np.ndarray:
        """(q,), which of the log-variances each effect has."""
        return np.arange(self.size)

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        """What each log-variance is of."""
        return effects

    @property
    def patterns(self) -> np.ndarray | None:
        """(m, d), those that omega is any combination of, if it is linear in some parameters."""
        return None

    def finite(self, parameters: Array, log_sigma2: Array) -> Array:
        """Finite numbers for `parameters` (k, ...) on the boundary, as `Report.shown` has them,
        where nothing changes with them."""
        xp, count = namespace(parameters), self.log_variances
        correlations = xp.nan_to_num(xp.clip(parameters[count:], -FAR, FAR))
        variances = xp.maximum(parameters[:count], log_sigma2 + LOG_ZERO)
        return xp.concatenate([variances, correlations])

    def boundary(
        self, effects: tuple[str, ...], factor: np.ndarray, parameters: np.ndarray
    ) -> list[str]:
        """What is on the boundary of the parameter space, in words, "{group}" in the place of the
        grouping factor.

        Args:
            effects: their names.
            factor: as `factor` gives it.
            parameters: as `Report.shown` has them.
        """
        positive = np.any(factor != 0, axis=1)
        zero = [effect for effect, varies in zip(effects, positive, strict=True) if not varies]
        found = [f"the variance of {effect} of {{group}} is zero" for effect in zero]
        if np.count_nonzero(np.diagonal(factor)) < np.count_nonzero(positive):
            found.append(
                "the correlation of the effects of {group} is +-1"
                if positive.sum() == 2
                else "the correlation matrix of the effects of {group} has lost rank"
            )
        return found

    def last_name(self, effects: tuple[str, ...]) -> str:
        """What sigma2 is the variance of, where the block is the residuals'."""
        return "Residual"

    @property
    def inside(self) -> np.ndarray:
        """Places in the chart that suffice for a point on which `snap` has been."""
        return np.arange(self.length)

    def flat(self, chart: Array) -> list[Array]:
        """Directions (r, ...) in the chart that do not move omega to first order."""
        return []

    def jacobian(self, chart: Array) -> Array:
        """d omega / d chart, (q (q + 1) / 2, r, ...)."""
        import jax

        return over_lanes(jax.jacfwd(self.omega), chart)

    def curvature(self, chart: Array, gradient: Array) -> Array:
        """Second derivatives in the chart, (r, r, ...), of gradient' omega. A block that writes
        derivatives out says here or in `slopes` what they are."""
        if self.written_out and on_host(chart):
            return self.slopes(chart, gradient)[1]
        import jax

        def bend(chart: Array, gradient: Array) -> Array:
            return jax.hessian(lambda chart: gradient @ self.omega(chart))(chart)

        return over_lanes(bend, chart, gradient)

    def second(self, chart: Array) -> Array:
        """Second derivatives of omega in the chart, (q (q + 1) / 2, r, r, ...)."""
        import jax

        return over_lanes(jax.jacfwd(jax.jacfwd(self.omega)), chart)

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        """`jacobian` and `curvature` together, which a search asks for."""
        return self.jacobian(chart), self.curvature(chart, gradient)

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """d omega / d parameters, (q (q + 1) / 2, k, ...), and second derivatives of
        gradient' omega in the parameters, (k, k, ...), at finite ones."""
        import jax

        def both(parameters: Array, log_sigma2: Array, gradient: Array) -> tuple[Array, Array]:
            def at(parameters: Array) -> Array:
                return self.natural(parameters, log_sigma2)

            return jax.jacfwd(at)(parameters), jax.hessian(lambda p: gradient @ at(p))(parameters)

        return over_lanes(both, parameters, log_sigma2, gradient)

    def in_scale(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """`derivatives` in the parameters and log sigma2, the last: (q (q + 1) / 2, k + 1, ...) and
        (k + 1, k + 1, ...). Relative covariances are inversely proportional to sigma2."""
        xp, omega = namespace(parameters), self.natural(parameters, log_sigma2)
        slope, bend = self.derivatives(parameters, log_sigma2, gradient)
        mixed = -xp.sum(gradient[:, None] * slope, axis=0)
        slope = xp.concatenate([slope, -omega[:, None]], axis=1)
        return slope, linalg.border(bend, mixed, xp.sum(gradient * omega, axis=0))

    def directions(self, parameters: Array, log_sigma2: Array) -> Array | None:
        """Tangents of omega that Kenward and Roger's adjustment is in, as columns; None for all.

        Those in the parameters, in order, unless it is `linear`. Zero on the boundary.
        """
        import jax

        return jax.jacfwd(lambda p: self.natural(p, log_sigma2))(parameters)

    def stated(self, coordinates: Array) -> Array:
        """The parameters after the log-variances as SAS and others state them, (c, ...): second
        derivatives of V in Kenward and Roger's adjustment are in these and in variances."""
        return coordinates

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """Sums of second derivatives of the covariance, over sigma2, in its `stated` parameters.

        Args:
            parameters, log_sigma2: (k, ...) and (...), finite.
            spread: (k + 1, k + 1, ...), the weights of the sum, given as the covariance of the
                parameters and log sigma2.

        Returns:
            (q (q + 1) / 2, ...); None for zeros, where it is `linear`.
        """
        if self.linear:
            return None
        if on_host(parameters):
            with neutral():
                return np.asarray(self._bend(parameters, log_sigma2, spread))
        return self._bend(parameters, log_sigma2, spread)

    def _bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array:
        import jax
        import jax.numpy as jnp

        def own(parameters: Array, log_sigma2: Array, spread: Array) -> Array:
            def at(parameters: Array) -> Array:
                return self.natural(parameters, log_sigma2)

            count, spread = self.log_variances, spread[:-1, :-1]
            slope, curve = jax.jacfwd(at)(parameters), jax.jacfwd(jax.jacfwd(at))(parameters)
            z, stated = parameters[count:], self.stated
            first, second = jax.jacfwd(stated)(z), jax.jacfwd(jax.jacfwd(stated))(z)
            moves = [-linalg.diagonal(spread)[:count], drift(first, second, spread[count:, count:])]
            return jnp.einsum("ij,tij->t", spread, curve) + slope @ jnp.concatenate(moves)

        return over_lanes(own, parameters, log_sigma2, spread)


def drift(first: Array, second: Array, spread: Array) -> Array:
    """Sums (c, ...) of the second derivatives of coordinates in what is stated instead.

    Args:
        first, second: (c, c, ...) and (c, c, c, ...), derivatives of what is stated in the
            coordinates. Those of an exponential would be the diagonal of `spread`, less.
        spread: (c, c, ...), weights, given as the covariance of the coordinates.
    """
    if not len(first):
        return spread[:, :0].sum(axis=1)
    xp = namespace(first, second, spread)
    bent = xp.einsum("ij...,aij...->a...", spread, second)
    return -linalg.matmul(linalg.inverse(first, definite=False)[0], bent[:, None])[:, 0]


def over_lanes(function: Callable[..., Any], *arrays: Array) -> Any:
    """A function of arrays without lanes, mapped over them where there are."""
    import jax

    for _ in range(arrays[0].ndim - 1):
        function = jax.vmap(function, in_axes=-1, out_axes=-1)
    return function(*arrays)
