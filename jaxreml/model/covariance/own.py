"""A user's own covariance in a model: of the effects of a term, and of residuals.

Of effects, the chart is the relative SDs that its variances have, and the coordinates of the other
parameters: it is even in the former, so that a variance of zero is an ordinary point. Parameters
are log-variances and the same coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import LOG_ZERO, Block, Reading, Report
from jaxreml.model.covariance.correlations import Correlation
from jaxreml.model.covariance.custom import Function, Parameter
from jaxreml.model.covariance.custom_checks import check_function
from jaxreml.model.covariance.factors import factor_semidefinite
from jaxreml.model.covariance.natural import places
from jaxreml.model.covariance.residual import Residual

Array = Any  # NumPy's or JAX's
SEMIDEFINITE = 1e-8  # of the mean variance, by how much an eigenvalue may be negative
NO_INVERSE = "this is not there for a covariance of your own, so far: fit the responses one by one"
ZERO_PIVOT = 1e-7  # relative root of a pivot that is none
VANISHED = 1e-30  # a relative variance below stands for zero


@dataclass(frozen=True)
class Own(Block):
    """See above.

    Attributes:
        function: of this size.
    """

    function: Function

    written_out = True
    of_variances = False

    @property
    def length(self) -> int:
        return self.function.count

    @property
    def log_variances(self) -> int:
        return self.function.variances

    @property
    def of_effects(self) -> np.ndarray:
        """One for all where the function has one variance for them."""
        return np.zeros(self.size, int) if self.function.homogeneous else np.arange(self.size)

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        if self.size == 1 or not self.function.homogeneous:
            return effects
        return (f"{effects[0]}..{effects[-1]}",)

    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        k, own = self.log_variances, self.function
        names = [f"log_variance[{group}, {label}]" for label in own.labels[:k]]
        if own.implicit:
            names[0] = f"log_variance[{group}]"
        others = zip(own.labels[k:], own.transforms[k:], strict=True)
        return (*names, *(f"z[{group}, {kind.label(label)}]" for label, kind in others))

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """The user's parameters."""
        return _readings(self.function, range(self.length))

    def parameter_of(self, place: int, entry: float) -> float:
        if place >= self.log_variances:
            return entry
        with np.errstate(divide="ignore"):
            return float(2 * np.log(np.abs(entry)) - np.log(self.function.units[place]))

    def ends(self, place: int) -> tuple[float, float]:
        return (0.0 if place < self.log_variances else -np.inf), np.inf

    def _units(self, like: Array) -> np.ndarray:
        """Of the SDs in the chart: (variances, ...)."""
        units = np.sqrt(self.function.units).astype(like.dtype)
        return units.reshape(-1, *[1] * (like.ndim - 1))

    def _at_chart(self, chart: Array) -> Array:
        """Relative variances and coordinates."""
        xp, k = namespace(chart), self.log_variances
        return xp.concatenate([(chart[:k] / self._units(chart)) ** 2, chart[k:]])

    def _at_parameters(self, parameters: Array, log_sigma2: Array) -> Array:
        """Likewise; a coordinate of NaN is not read, and any number will do."""
        xp, k = namespace(parameters), self.log_variances
        start = self.function.start[k:].astype(parameters.dtype)
        start = start.reshape(-1, *[1] * (parameters.ndim - 1))
        z = parameters[k:]
        z = xp.where(xp.isnan(z), start, z)
        return xp.concatenate([xp.exp(parameters[:k] - log_sigma2), z])

    def omega(self, chart: Array) -> Array:
        """NaN, outside of the parameter space, where the function is no covariance."""
        return _semidefinite(self.function.entries(self._at_chart(chart)), self.size)

    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        return self.function.entries(self._at_parameters(parameters, log_sigma2))

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        """Coordinates are not identified where variances of zero have taken all that they move."""
        xp, k = namespace(chart), self.log_variances
        sds, z = chart[:k] / self._units(chart), chart[k:]
        inside = sds > 0
        logs = xp.where(inside, 2 * xp.log(xp.where(inside, sds, 1.0)), LOG_ZERO) + log_sigma2
        moved = xp.any(xp.abs(self.jacobian(chart)[:, k:]) > 0, axis=0)
        moved = moved | xp.all(inside, axis=0)
        shown = [xp.where(inside, logs, -xp.inf), xp.where(moved, z, xp.nan)]
        return Report(
            xp.concatenate([logs, z]), xp.concatenate([inside, moved]), xp.concatenate(shown)
        )

    def finite(self, parameters: Array, log_sigma2: Array) -> Array:
        xp, k = namespace(parameters), self.log_variances
        start = self.function.start[k:].astype(parameters.dtype)
        start = start.reshape(-1, *[1] * (parameters.ndim - 1))
        logs, z = xp.maximum(parameters[:k], log_sigma2 + LOG_ZERO), parameters[k:]
        return xp.concatenate([logs, xp.where(xp.isnan(z), start, z)])

    def snap(self, chart: Array, zero: float) -> Array:
        xp, k = namespace(chart), self.log_variances
        sds = xp.abs(chart[:k])
        sds = xp.where(sds <= zero, 0.0, sds)
        start = self.function.start[k:].astype(chart.dtype).reshape(-1, *[1] * (chart.ndim - 1))
        return xp.concatenate([sds, xp.where(xp.any(sds > 0, axis=0), chart[k:], start)])

    def factor(self, chart: Array) -> Array:
        matrix = self.function.entries(self._at_chart(chart))[places(self.size)]
        if on_host(matrix) and matrix.ndim == 2:  # LAPACK is quicker where it can
            found = linalg.cholesky(matrix)
            if np.all(np.diagonal(found) > ZERO_PIVOT * np.sqrt(np.diagonal(matrix))):
                return found
        return factor_semidefinite(matrix, ZERO_PIVOT)[0]

    def chart(self, factor: Array) -> Array:
        raise DataError(NO_INVERSE)

    def chart_at(self, factor: Array, parameters: Array, log_sigma2: Array) -> Array:
        """By the parameters: a function has no inverse that is known."""
        xp, k = namespace(parameters), self.log_variances
        at = self._at_parameters(parameters, log_sigma2)
        return xp.concatenate([xp.sqrt(at[:k]) * self._units(parameters), at[k:]])

    def start(self, omega: Array, least: float) -> Array:
        """The user's, but for the mean variance."""
        mean = linalg.diagonal(omega[places(self.size)]).mean(axis=0)
        return self._scaled(namespace(omega).maximum(mean, least**2))

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return self._scaled(np.mean(sds**2))

    def _scaled(self, mean: Array) -> Array:
        """The start with this mean variance (...)."""
        xp, k, own = namespace(mean), self.log_variances, self.function
        shape = (-1, *[1] * np.ndim(mean))
        share = np.sqrt(own.start[:k] / own.start_variance).reshape(shape)
        sds = xp.sqrt(mean) * share * np.sqrt(own.units).reshape(shape)
        others = xp.broadcast_to(own.start[k:].reshape(shape), (own.count - k, *sds.shape[1:]))
        return xp.concatenate([sds, others])

    @property
    def faces(self) -> np.ndarray:
        k = self.log_variances
        return np.array([np.arange(self.length) != place for place in range(k)], float)

    def jacobian(self, chart: Array) -> Array:
        if not on_host(chart):
            return super().jacobian(chart)
        first = self.function.derivatives(self._at_chart(chart)).first
        return first * self._slopes(chart)

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        if not on_host(chart):
            return super().slopes(chart, gradient)
        slopes, k = self._slopes(chart), self.log_variances
        bends = np.zeros_like(chart)
        bends[:k] = 2 / self._units(chart) ** 2
        return self._chain(self._at_chart(chart), slopes, bends, gradient)

    def _slopes(self, chart: np.ndarray) -> np.ndarray:
        """How each number of `_at_chart` changes with its own in the chart."""
        k = self.log_variances
        slopes = np.ones_like(chart)
        slopes[:k] = 2 * chart[:k] / self._units(chart) ** 2
        return slopes

    def _chain(
        self, at: np.ndarray, slopes: np.ndarray, bends: np.ndarray, gradient: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives in coordinates of which each moves its own variance or coordinate."""
        _, first, second = self.function.derivatives(at)
        inner = np.sum(gradient[:, None, None] * second, axis=0)
        along = np.sum(gradient[:, None] * first, axis=0) * bends
        whole = inner * slopes[:, None] * slopes[None]
        return first * slopes, whole + linalg.eye_like(whole) * along

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        if not on_host(parameters):
            return super().derivatives(parameters, log_sigma2, gradient)
        at, k = self._at_parameters(parameters, log_sigma2), self.log_variances
        slopes, bends = np.ones_like(at), np.zeros_like(at)
        slopes[:k] = bends[:k] = at[:k]
        return self._chain(at, slopes, bends, gradient)

    def _steps(self, at: np.ndarray) -> np.ndarray:
        """How `_at_parameters` moves with each parameter; with the variance itself at zero."""
        steps, k = np.ones_like(at), self.log_variances
        steps[:k] = np.where(at[:k] > VANISHED, at[:k], 1.0)
        return steps

    def directions(self, parameters: Array, log_sigma2: Array) -> Array:
        if not on_host(parameters):
            return super().directions(parameters, log_sigma2)
        at = self._at_parameters(parameters, log_sigma2)
        first = self.function.derivatives(at).first * self._steps(at)
        return np.where(np.isnan(parameters), 0.0, first)

    def stated(self, coordinates: Array) -> Array:
        """The user's parameters."""
        return self.function.stated(coordinates)

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """In the variances, and in the others by what their transforms bend."""
        if not on_host(parameters):
            return super().bend(parameters, log_sigma2, spread)
        at, k = self._at_parameters(parameters, log_sigma2), self.log_variances
        _, first, second = self.function.derivatives(at)
        steps, weights = self._steps(at), spread[:-1, :-1]
        found = np.einsum("tij...,ij...->t...", second, weights * steps[:, None] * steps)
        for place, kind in enumerate(self.function.transforms[k:], k):
            ratio = kind.bend(at[place]) / kind.slope(at[place])
            found = found - first[:, place] * ratio * weights[place, place]
        return found


def _readings(function: Function, places: Iterable[int]) -> list[Reading]:
    """A function's parameters, at these places among those of a block."""
    named = zip(function.labels, places, function.transforms, strict=True)
    return [Reading(label, (), place, kind.reading) for label, place, kind in named]


def _semidefinite(entries: Array, q: int) -> Array:
    """Entries (t, ...) of a matrix, NaN where it has negative eigenvalues."""
    xp, matrix = namespace(entries), entries[places(q)]
    if not on_host(entries):
        import jax

        matrix = jax.lax.stop_gradient(matrix)
    more = SEMIDEFINITE * (linalg.diagonal(matrix).mean(axis=0) + np.finfo(entries.dtype).tiny)
    pivots = linalg.diagonal(linalg.cholesky(matrix + more * linalg.eye_like(matrix)))
    return xp.where(xp.all(xp.isfinite(pivots), axis=0), entries, xp.nan)


@dataclass(frozen=True)
class OwnCorrelation(Correlation):
    """What a function says of residuals where the ratios of its variances are those of its start.

    Attributes:
        function: of this size.
    """

    function: Function

    @property
    def count(self) -> int:
        return self.function.count - self.function.variances

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        own, k = self.function, self.function.variances
        pairs = zip(own.labels[k:], own.transforms[k:], strict=True)
        return tuple(kind.label(label) for label, kind in pairs)

    @property
    def correlated(self) -> bool:
        return True

    @property
    def described(self) -> list[tuple[int, int]]:
        return [(i, 0) for i in range(1, self.size)]

    def formula(self, z: Sequence[Any]) -> Any:
        return self.entries(namespace(*z).stack(z))

    def entries(self, z: Array) -> Array:
        xp, own, k = namespace(z), self.function, self.function.variances
        ratios = (own.start[:k] / own.start[0]).astype(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        return own.entries(xp.concatenate([xp.broadcast_to(ratios, (k, *z.shape[1:])), z]))

    def stated(self, z: Array) -> Array:
        """The user's parameters."""
        return self.function.stated(z)

    def drift(self, z: Array, spread: Array) -> Array:
        if not on_host(z):
            return super().drift(z, spread)
        kinds = self.function.transforms[self.function.variances :]
        ratios = [kind.bend(own) / kind.slope(own) for kind, own in zip(kinds, z, strict=True)]
        return -np.array(ratios).reshape(z.shape) * linalg.diagonal(spread)

    def coordinates(self, matrix: Array) -> Array:
        """There is no inverse that is known: see `Residual.chart_at`."""
        raise DataError(NO_INVERSE)

    def start(self, common: Array) -> Array:
        """The user's, whatever the correlation."""
        start, shape = self.function.start[self.function.variances :], np.shape(common)
        start = start.reshape(-1, *[1] * len(shape)).astype(common.dtype)
        return namespace(common).broadcast_to(start, (self.count, *shape))


@dataclass(frozen=True)
class OwnResidual(Residual):
    """That of the residuals, of which sigma2 is the function's first variance. The chart has half
    the logarithms of the others' ratios to it."""

    @property
    def function(self) -> Function:
        """The user's."""
        assert isinstance(self.correlation, OwnCorrelation)
        return self.correlation.function

    @property
    def log_variances(self) -> int:
        return self.function.variances - 1

    @property
    def homogeneous(self) -> bool:
        return False  # what the function says of others is not known

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        return self.function.labels[: self.function.variances] if self.log_variances else ("",)

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """The user's parameters: the first variance is sigma2, behind all parameters."""
        return _readings(self.function, [self.length, *range(self.length)])

    def parameter_of(self, place: int, entry: float) -> float:
        """That of sigma2 from log sigma."""
        return 2 * entry if place == self.length else entry

    def _at(self, chart: Array) -> Array:
        """Variances over the first, and coordinates."""
        xp, k = namespace(chart), self.log_variances
        return xp.concatenate([xp.ones_like(chart[:1]), xp.exp(2 * chart[:k]), chart[k:]])

    def _relative(self, chart: Array) -> Array:
        """NaN, outside of the parameter space, where the function is no covariance."""
        if not self.length:
            return self.function.entries(np.ones((1, *chart.shape[1:]), chart.dtype))
        return _semidefinite(self.function.entries(self._at(chart)), self.size)

    def _derivatives(self, chart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at, k = self._at(chart), self.log_variances
        _, first, second = self.function.derivatives(at)
        slopes, bends = np.ones_like(chart), np.zeros_like(chart)
        slopes[:k], bends[:k] = 2 * at[1 : k + 1], 4 * at[1 : k + 1]
        first, second = first[:, 1:], second[:, 1:, 1:]
        whole = second * slopes[:, None] * slopes[None]
        return first * slopes, whole + linalg.eye_like(whole[0]) * (first * bends)[:, :, None]

    def start(self, omega: Array, least: float) -> Array:
        """The user's: sigma2 is found for it."""
        return self._start(omega[0])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        return self._start(np.array(0.0))

    def _start(self, like: Array) -> Array:
        xp, own, k = namespace(like), self.function, self.function.variances
        logs = np.log(own.start[1:k] / own.start[0]) / 2
        logs = logs.astype(like.dtype).reshape(-1, *[1] * like.ndim)
        logs = xp.broadcast_to(logs, (k - 1, *like.shape))
        return xp.concatenate([logs, self.correlation.start(like)])


@dataclass(frozen=True, eq=False)
class Custom:
    """What `jaxreml.covariance.custom` makes: a `Block` of a term for a number of effects.

    Attributes:
        function, parameters: as given.
        data: what is known of the effects; of pandas by their labels; None for these, where they
            are numbers, or else 0, 1, ...
    """

    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    data: Any = None

    def __call__(self, size: int) -> Own:
        """The covariance of so many effects.

        Raises:
            ValueError: the function is no covariance at its start, as `check_function` says.
        """
        return self.term(size)

    def term(self, size: int, labels: Sequence[Any] | None = None) -> Own:
        """The same of effects with labels: places, or levels of a factor."""
        return _checked(self._bound(size, labels))

    def residual(self, size: int, labels: Sequence[Any] | None = None) -> OwnResidual:
        """That of the residuals of so many visits; errors as for a term."""
        return _checked_residual(self._bound(size, labels))

    def _bound(self, size: int, labels: Sequence[Any] | None) -> Function:
        return Function.of(self.function, self.parameters, size, self._known(size, labels))

    def _known(self, size: int, labels: Sequence[Any] | None) -> Any:
        """The function's first argument."""
        data: Any = self.data
        if data is None:
            places = np.asarray(np.arange(size) if labels is None else labels)
            return (places if places.dtype.kind in "iuf" else np.arange(size)).astype(float)
        if labels is None or not hasattr(data, "reindex"):
            return data.to_numpy() if hasattr(data, "reindex") else data
        missing = [label for label in labels if label not in data.index]
        if missing:
            raise DataError(
                f"the data of a covariance of your own have no row {missing[0]!r}, which is one of "
                "its effects: the labels of their rows are to be those of the effects"
            )
        square = data.ndim == 2 and all(label in data.columns for label in labels)
        wanted = list(labels)
        return (data.loc[wanted, wanted] if square else data.loc[wanted]).to_numpy()


@lru_cache(256)
def _checked(function: Function) -> Own:
    check_function(function, definite=False)
    return Own(function.size, function)


@lru_cache(256)
def _checked_residual(function: Function) -> OwnResidual:
    check_function(function, definite=True)
    q = function.size
    return OwnResidual(q, OwnCorrelation(q, function), (0,) * q)
