"""Families of correlation matrices of q effects in order: of visits, times or places.

A family has c unconstrained coordinates, zero for no correlation unless it says otherwise, and a
formula for the matrix; derivatives follow from the formula (`jets`). A new one is a class here and
a word in `data/residual.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model.covariance import factors as cholesky
from jaxreml.model.covariance import jets
from jaxreml.model.covariance.base import FAR, Reading
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's
MOST = 0.95  # of a correlation to start a search from


@dataclass(frozen=True)
class Correlation(ABC):
    """See above.

    Attributes:
        size: q.
    """

    size: int

    # Whether covariance matrices with free variances and these correlations are all there are.
    linear = False

    @property
    @abstractmethod
    def count(self) -> int:
        """c, coordinates."""

    @abstractmethod
    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        """What each coordinate is of, c texts."""

    @abstractmethod
    def formula(self, z: Sequence[Any]) -> Any:
        """Entries (t, ...) of the lower `triangle` at coordinates, arrays (...) or Jets."""

    @abstractmethod
    def coordinates(self, matrix: Array) -> Array:
        """Those (c, ...) of a member (q, q, ...)."""

    @abstractmethod
    def start(self, common: Array) -> Array:
        """Coordinates (c, ...) of correlations near a common one (...), below MOST in size."""

    @property
    def together(self) -> np.ndarray:
        """(q, q) booleans, which effects may be correlated."""
        return np.ones((self.size, self.size), bool)

    @property
    def described(self) -> list[tuple[int, int]]:
        """Rows and columns of the correlations that say all."""
        return [(1, 0)]

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        """The same with labels, or parameters in their place; places of parameters as in z."""
        return [Reading(f"{effects[i]}.{effects[j]}", (i, j)) for i, j in self.described]

    def entries(self, z: Array) -> Array:
        """The formula at (c, ...)."""
        return self.formula(list(z)) if self.count else self._ones(z)

    def derivatives(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second derivatives of `entries`, (t, c, ...) and (t, c, c, ...). On the
        host."""
        t = self.size * (self.size + 1) // 2
        if not self.count:
            none = np.zeros((t, 0, *z.shape[1:]), z.dtype)
            return none, none[:, None][:, :0]
        found = self.formula(jets.variables(z))
        return np.moveaxis(found.first, 1, 0), np.moveaxis(found.second, 2, 0)

    def _ones(self, z: Array) -> Array:
        """The identity's entries."""
        same = np.equal(*triangle(self.size)).astype(z.dtype)
        same = same.reshape(-1, *[1] * (z.ndim - 1))
        return namespace(z).zeros((same.size, *z.shape[1:]), z.dtype) + same

    @property
    def _lags(self) -> np.ndarray:
        """Row less column of each entry."""
        rows, columns = triangle(self.size)
        return rows - columns


@dataclass(frozen=True)
class Independent(Correlation):
    """No correlation: "diag"."""

    @property
    def count(self) -> int:
        return 0

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return ()

    @property
    def described(self) -> list[tuple[int, int]]:
        return []

    def formula(self, z: Sequence[Any]) -> Any:
        raise NotImplementedError

    def coordinates(self, matrix: Array) -> Array:
        return matrix[0, :0]

    def start(self, common: Array) -> Array:
        return namespace(common).zeros((0, *common.shape), common.dtype)


class _OneCoordinate(Correlation):
    """Of one correlation."""

    @property
    def count(self) -> int:
        return 1

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return ("correlation",)


class Stationary(_OneCoordinate):
    """Of the distance alone: effects may then be at any places, each subject's at its own
    (`covariance.timed`)."""

    # Whether on a line what lies before an effect tells no more of it than the nearest does.
    markov = True

    # What describes it at any places.
    reading = Reading("correlation", (), 0, "fisher")

    @abstractmethod
    def of_distance(self, z: Any, distances: Any) -> Any:
        """Correlations at distances, an array or a Jet as z is."""

    @abstractmethod
    def with_correlation(self, common: float, distance: float) -> float:
        """The coordinate with which there is this positive correlation at a distance."""


@dataclass(frozen=True)
class Exchangeable(_OneCoordinate):
    """Equal correlations rho ("cs"), z = (log(1 + (q - 1) rho) - log(1 - rho)) / 2."""

    def formula(self, z: Sequence[Any]) -> Any:
        # With e the smaller of exp(2 z) and exp(-2 z) nothing overflows; z is never that far.
        square = jets.exp(z[0] * 2.0)
        rho = (square - 1.0) / (square + (self.size - 1.0))
        one = rho * 0.0 + 1.0
        return jets.stack([one if lag == 0 else rho for lag in self._lags])

    def coordinates(self, matrix: Array) -> Array:
        xp, rho = namespace(matrix), matrix[1, 0]
        return (xp.log1p((self.size - 1) * rho) - xp.log1p(-rho))[None] / 2

    def start(self, common: Array) -> Array:
        xp = namespace(common)
        rho = xp.clip(common, -0.5 / (self.size - 1), MOST)
        return (xp.log1p((self.size - 1) * rho) - xp.log1p(-rho))[None] / 2


@dataclass(frozen=True)
class Autoregressive(Stationary):
    """rho^|i - j| ("ar1"), z Fisher's of rho: neighbours are one apart."""

    def of_distance(self, z: Any, distances: Any) -> Any:
        return jets.tanh(z) ** distances

    def with_correlation(self, common: float, distance: float) -> float:
        return float(np.arctanh(min(common ** (1 / distance), MOST)))

    def formula(self, z: Sequence[Any]) -> Any:
        rho = jets.tanh(z[0])
        powers = [rho * 0.0 + 1.0]
        for _ in range(self.size - 1):
            powers.append(powers[-1] * rho)
        return jets.stack([powers[lag] for lag in self._lags])

    def coordinates(self, matrix: Array) -> Array:
        return namespace(matrix).arctanh(matrix[1, 0])[None]

    def start(self, common: Array) -> Array:
        return _fisher(common)[None]


@dataclass(frozen=True)
class Antedependent(Correlation):
    """Products of the correlations of neighbours between two effects ("ad"); z are Fisher's."""

    @property
    def count(self) -> int:
        return self.size - 1

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{first}, {second}" for first, second in pairwise(effects))

    @property
    def described(self) -> list[tuple[int, int]]:
        return [(k + 1, k) for k in range(self.count)]

    def formula(self, z: Sequence[Any]) -> Any:
        own = [jets.tanh(part) for part in z]
        one = own[0] * 0.0 + 1.0
        found = []
        for column in range(self.size):
            product = one
            found.append(product)
            for part in own[column:]:
                product = product * part
                found.append(product)
        return jets.stack(found)

    def coordinates(self, matrix: Array) -> Array:
        below = np.arange(1, self.size)
        return namespace(matrix).arctanh(matrix[below, below - 1])

    def start(self, common: Array) -> Array:
        return _repeated(_fisher(common), self.count)


@dataclass(frozen=True)
class Toeplitz(Correlation):
    """One correlation for each distance ("toep"); z are Fisher's of the partial autocorrelations,
    which may be any numbers between -1 and 1 (Barndorff-Nielsen and Schou 1973, J. Multivariate
    Analysis 3:408)."""

    @property
    def count(self) -> int:
        return self.size - 1

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"lag {lag}" for lag in range(1, self.size))

    @property
    def described(self) -> list[tuple[int, int]]:
        return [(lag, 0) for lag in range(1, self.size)]

    def formula(self, z: Sequence[Any]) -> Any:
        partial = [jets.tanh(part) for part in z]
        lags = [partial[0] * 0.0 + 1.0]
        weights: list[Any] = []  # of the regression on those before
        left: Any = lags[0]  # what it leaves of the variance
        for own in partial:
            explained = sum(
                (weight * lags[-1 - k] for k, weight in enumerate(weights)), lags[0] * 0.0
            )
            lags.append(own * left + explained)
            back = weights[::-1]
            weights = [weight - own * other for weight, other in zip(weights, back, strict=True)]
            weights.append(own)
            left = left * (1.0 - own * own)
        return jets.stack([lags[lag] for lag in self._lags])

    def coordinates(self, matrix: Array) -> Array:
        """By Durbin's recursion."""
        xp, lags = namespace(matrix), [matrix[k, 0] for k in range(self.size)]
        found, weights, left = [], [], lags[0]
        for k in range(1, self.size):
            explained = sum((w * lags[k - 1 - i] for i, w in enumerate(weights)), lags[0] * 0.0)
            own = (lags[k] - explained) / left
            back = weights[::-1]
            weights = [w - own * other for w, other in zip(weights, back, strict=True)] + [own]
            left = left * (1.0 - own * own)
            found.append(xp.arctanh(own))
        return xp.stack(found)

    def start(self, common: Array) -> Array:
        xp = namespace(common)
        rho = xp.clip(common, -0.5 / self.size, MOST)
        # Partial autocorrelations of equal correlations
        return xp.stack([xp.arctanh(rho / (1 + k * rho)) for k in range(self.count)])


@dataclass(frozen=True)
class Distance(Stationary):
    """exp(-d / range) or, squared, exp(-(d / range)^2), of the distance d between two times
    ("sp_exp", "sp_gau"); z is the logarithm of the range, minus infinity without correlation.

    Attributes:
        times: q, in order.
        squared: which.
    """

    times: tuple[float, ...] = ()
    squared: bool = False

    reading = Reading("range", (), 0, "log")

    @property
    def markov(self) -> bool:
        return not self.squared

    def of_distance(self, z: Any, distances: Any) -> Any:
        nearness = jets.exp(-z)
        if self.squared:
            return jets.exp(nearness * nearness * -(distances**2))
        return jets.exp(nearness * -distances)

    def with_correlation(self, common: float, distance: float) -> float:
        share = -np.log(common)
        return float(np.log(distance / (np.sqrt(share) if self.squared else share)))

    @property
    def _distances(self) -> np.ndarray:
        rows, columns = triangle(self.size)
        times = np.array(self.times)
        return times[rows] - times[columns]

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return ("log range",)

    @property
    def described(self) -> list[tuple[int, int]]:
        return []

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        return [self.reading]

    def formula(self, z: Sequence[Any]) -> Any:
        distances = self._distances
        nearness = jets.exp(-z[0])
        exponents = nearness * nearness if self.squared else nearness
        amounts = distances**2 if self.squared else distances
        return jets.stack([jets.exp(exponents * -amount) for amount in amounts])

    def coordinates(self, matrix: Array) -> Array:
        xp, nearest = namespace(matrix), int(np.argmin(np.diff(self.times)))
        distance = self.times[nearest + 1] - self.times[nearest]
        share = -xp.log(matrix[nearest + 1, nearest])
        return xp.log(distance / (xp.sqrt(share) if self.squared else share))[None]

    def start(self, common: Array) -> Array:
        """With that correlation at the mean distance."""
        xp = namespace(common)
        share = -xp.log(xp.clip(common, 0.1, MOST))
        mean = float(np.mean(self._distances[self._distances > 0]))
        return xp.log(mean / (xp.sqrt(share) if self.squared else share))[None]


@dataclass(frozen=True)
class Unrestricted(Correlation):
    """Any correlations ("us"); z are those of `factors`."""

    linear = True

    @property
    def count(self) -> int:
        return self.size * (self.size - 1) // 2

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        pairs = [(j, i) for i in range(len(effects)) for j in range(i)]
        return tuple(f"{effects[j]}, {effects[i]}" for j, i in pairs)

    @property
    def described(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.size) for j in range(i)]

    def formula(self, z: Sequence[Any]) -> Any:
        raise NotImplementedError

    def entries(self, z: Array) -> Array:
        return cholesky.correlations(z, self.size)

    def derivatives(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cholesky.correlation_derivatives(z, self.size)

    def coordinates(self, matrix: Array) -> Array:
        factor, _ = cholesky.factor_semidefinite(matrix, 0.0)
        return cholesky.correlation_coordinates(factor, FAR)

    def start(self, common: Array) -> Array:
        xp = namespace(common)
        rho = xp.clip(common, -0.5 / self.size, MOST)
        places = [j for i in range(1, self.size) for j in range(i)]
        return xp.stack([xp.arctanh(rho / (1 + j * rho)) for j in places])


@dataclass(frozen=True)
class Copies(Correlation):
    """The same family once for each of several groups of effects, one after the other.

    Attributes:
        each: of one group, of size q over their number.
    """

    each: Correlation

    @property
    def _starts(self) -> range:
        return range(0, self.size, self.each.size)

    @property
    def count(self) -> int:
        return self.each.count * len(self._starts)

    @property
    def together(self) -> np.ndarray:
        group = np.arange(self.size) // self.each.size
        return group[:, None] == group

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        found: list[str] = []
        for start in self._starts:
            own = effects[start : start + self.each.size]
            group = own[0].rpartition(": ")[0]
            short = [name.rpartition(": ")[2] for name in own]
            found += [f"{group}: {name}" for name in self.each.names(short)]
        return tuple(found)

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        found: list[Reading] = []
        for k, start in enumerate(self._starts):
            own = effects[start : start + self.each.size]
            group = own[0].rpartition(": ")[0]
            for reading in self.each.readings(own):
                places = tuple(start + place for place in reading.effects)
                if reading.parameter >= 0:
                    place = k * self.each.count + reading.parameter
                    label = f"{group}: {reading.label}"
                    reading = reading._replace(label=label, parameter=place)
                found.append(reading._replace(effects=places))
        return found

    @property
    def _entries(self) -> list[np.ndarray]:
        """Where each group's entries are among all."""
        rows, columns = triangle(self.each.size)
        return [places(self.size)[start + rows, start + columns] for start in self._starts]

    def formula(self, z: Sequence[Any]) -> Any:
        raise NotImplementedError

    def entries(self, z: Array) -> Array:
        xp, count = namespace(z), self.each.count
        found = [
            self.each.entries(z[k * count : (k + 1) * count]) for k in range(len(self._starts))
        ]
        order = np.concatenate(self._entries)
        t = self.size * (self.size + 1) // 2
        whole = xp.concatenate([*found, xp.zeros((1, *z.shape[1:]), z.dtype)])
        source = np.full(t, len(order))
        source[order] = np.arange(len(order))
        return whole[source]

    def derivatives(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t, count, lanes = self.size * (self.size + 1) // 2, self.each.count, z.shape[1:]
        first = np.zeros((t, self.count, *lanes), z.dtype)
        second = np.zeros((t, self.count, self.count, *lanes), z.dtype)
        for k, entries in enumerate(self._entries):
            own = np.arange(k * count, (k + 1) * count)
            slope, bend = self.each.derivatives(z[own])
            first[entries[:, None], own] = slope
            second[entries[:, None, None], own[:, None], own] = bend
        return first, second

    def coordinates(self, matrix: Array) -> Array:
        q = self.each.size
        return namespace(matrix).concatenate(
            [self.each.coordinates(matrix[s : s + q, s : s + q]) for s in self._starts]
        )

    def start(self, common: Array) -> Array:
        return namespace(common).concatenate([self.each.start(common)] * len(self._starts))


def _fisher(common: Array) -> Array:
    xp = namespace(common)
    return xp.arctanh(xp.clip(common, -MOST, MOST))


def _repeated(value: Array, count: int) -> Array:
    return namespace(value).stack([value] * count)
