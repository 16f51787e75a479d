"""Families of correlation matrices of q effects in order: of visits, times or places.

A family is a formula for the matrix in c bounded numbers u; derivatives follow from the formula
(`jets`). These have two unconstrained coordinates, which are zero for no correlation unless the
family says otherwise:

z   what people read and standard errors are for, u = tanh z: infinite at the limits of u
t   an angle, u = sin t, which a search moves where limits are ordinary estimates: there it is at a
    right angle, a stationary point. So t is the Gudermannian of z

A new family is a class here, or in `distances` if it is a function of the distance, and a word in
`words`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model.covariance import factors as cholesky
from jaxreml.model.covariance import jets
from jaxreml.model.covariance.base import FAR, Reading, drift, over_lanes
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's
MOST = 0.95  # of a correlation to start a search from
RIGHT = np.pi / 2  # a right angle
TINY = 1e-8  # a sine that is as good as none


@dataclass(frozen=True)
class Correlation(ABC):
    """See above.

    Attributes:
        size: q.
    """

    size: int

    # Whether covariance matrices with free variances and these correlations are all there are.
    linear = False
    # Whether covariance matrices are linear in variances and covariances where each effect has a
    # variance of its own.
    linear_each = False

    @property
    @abstractmethod
    def count(self) -> int:
        """c, coordinates."""

    @abstractmethod
    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        """What each coordinate is of, c texts."""

    @abstractmethod
    def formula(self, u: Sequence[Any]) -> Any:
        """Entries (t, ...) of the lower `triangle` at bounded numbers, arrays (...) or Jets."""

    @abstractmethod
    def coordinates(self, matrix: Array) -> Array:
        """Those (c, ...) of a member (q, q, ...)."""

    @abstractmethod
    def start(self, common: Array) -> Array:
        """Coordinates (c, ...) of correlations near a common one (...), below MOST in size."""

    def bounded(self, z: Sequence[Any]) -> list[Any]:
        """The numbers u of coordinates z, arrays (...) or Jets."""
        return [jets.tanh(part) for part in z]

    def turned(self, t: Sequence[Any]) -> list[Any]:
        """The numbers u of angles t, likewise."""
        return [jets.sin(part) for part in t]

    def folded(self, t: Array) -> Array:
        """Angles (c, ...) with the same matrix, no larger than a right angle."""
        xp = namespace(t)
        return xp.arctan2(xp.sin(t), abs(xp.cos(t)))  # has a derivative at the limits, too

    def snapped(self, t: Array, zero: Array) -> Array:
        """`folded` angles, at a limit where what is left to it is at most `zero`."""
        xp = namespace(t)
        return xp.where(xp.cos(t) <= zero, xp.copysign(RIGHT, t), t)

    def limits(self, t: Array) -> Array:
        """Of `snapped` angles (c, ...): +-1 for a limit, which z is at infinity of, else 0."""
        xp = namespace(t)
        return xp.where(xp.abs(t) >= RIGHT, xp.sign(t), 0.0)

    def of_angles(self, t: Array) -> Array:
        """z (c, ...) of angles that are at no limit."""
        return namespace(t).arcsinh(namespace(t).tan(t))

    def angles(self, z: Array) -> Array:
        """t (c, ...) of z."""
        return namespace(z).arcsin(namespace(z).tanh(z))

    @property
    def ends(self) -> tuple[float, float]:
        """Of `folded` angles, between which z is finite."""
        return -RIGHT, RIGHT

    @property
    def centre(self) -> float:
        """Of z: far from it, the matrix is at a limit."""
        return 0.0

    @property
    def kinds(self) -> np.ndarray | None:
        """(t,), which entries are equal in all members, by numbers, and below zero for those that
        are zero, if with one variance for all any numbers in their places are a member; else
        None."""
        return None

    @property
    def correlated(self) -> bool:
        """Whether there is any correlation."""
        return self.count > 0

    @property
    def together(self) -> np.ndarray:
        """(q, q) booleans, which effects may be correlated."""
        return np.ones((self.size, self.size), bool)

    @property
    def described(self) -> list[tuple[int, int]]:
        """Rows and columns of the correlations that say all."""
        return [(1, 0)]

    @property
    def linear_shared(self) -> bool:
        """The same where all effects that may be correlated share a variance."""
        return self.kinds is not None

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        """The same with labels, or parameters in their place; places of parameters as in z."""
        return [Reading(f"{effects[i]}.{effects[j]}", (i, j)) for i, j in self.described]

    def entries(self, z: Array) -> Array:
        """The lower triangle (t, ...) at z (c, ...)."""
        return self.formula(self.bounded(list(z))) if self.count else self._ones(z)

    def entries_at(self, t: Array) -> Array:
        """The same at angles."""
        return self.formula(self.turned(list(t))) if self.count else self._ones(t)

    def derivatives(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second derivatives of `entries`, (t, c, ...) and (t, c, c, ...). On the
        host."""
        return self._differentiated(z, self.bounded)

    def derivatives_at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of `entries_at`."""
        return self._differentiated(t, self.turned)

    def depends(self, t: Array) -> Array:
        """Which entries depend on which coordinate at `snapped` angles, (t, c, ...) booleans: what
        others at their limits leave of it."""
        xp = namespace(t)
        u = xp.stack(self.turned(list(t)))
        if on_host(t):
            slopes = np.moveaxis(self.formula(jets.variables(u)).first, 1, 0)
        else:
            import jax

            slopes = over_lanes(jax.jacfwd(lambda u: self.formula(list(u))), u)
        return xp.abs(slopes) > TINY

    def _differentiated(
        self, at: np.ndarray, to_bounded: Callable[[list[Any]], list[Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        t = self.size * (self.size + 1) // 2
        if not self.count:
            none = np.zeros((t, 0, *at.shape[1:]), at.dtype)
            return none, none[:, None][:, :0]
        found = self.formula(to_bounded(jets.variables(at)))
        return np.moveaxis(found.first, 1, 0), np.moveaxis(found.second, 2, 0)

    def stated(self, z: Array) -> Array:
        """Parameters (c, ...) as SAS states them: the correlations that are `described`."""
        return self.entries(z)[self._described]

    def drift(self, z: Array, spread: Array) -> Array:
        """Of the coordinates in the `stated` parameters, as `base.drift`, for a `spread`
        (c, c, ...)."""
        if on_host(z, spread):
            first, second = self.derivatives(z)
            return drift(first[self._described], second[self._described], spread)
        import jax

        slope = jax.jacfwd(self.stated)
        return drift(slope(z), jax.jacfwd(slope)(z), spread)

    @property
    def _described(self) -> np.ndarray:
        """Where `entries` has what is `described`."""
        return np.array([places(self.size)[pair] for pair in self.described], int)

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

    linear_each = True

    @property
    def count(self) -> int:
        return 0

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return ()

    @property
    def described(self) -> list[tuple[int, int]]:
        return []

    def formula(self, u: Sequence[Any]) -> Any:
        raise NotImplementedError

    @property
    def kinds(self) -> np.ndarray:
        return np.where(self._lags == 0, 0, -1)

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
    def with_correlation(self, common: float, distance: Array) -> Array:
        """The coordinate with which there is this positive correlation at a distance."""


@dataclass(frozen=True)
class Exchangeable(_OneCoordinate):
    """Equal correlations rho ("cs"), z = (log(1 + (q - 1) rho) - log(1 - rho)) / 2: at its limits
    rho is 1 and -1 / (q - 1)."""

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        return [own._replace(least=-1 / (self.size - 1)) for own in super().readings(effects)]

    @property
    def kinds(self) -> np.ndarray:
        return np.minimum(self._lags, 1)

    def formula(self, u: Sequence[Any]) -> Any:
        rho = u[0] * 2.0 / (u[0] * (2.0 - self.size) + float(self.size))
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

    def with_correlation(self, common: float, distance: Array) -> Array:
        xp = namespace(distance)
        return xp.arctanh(xp.minimum(common ** (1 / distance), MOST))

    def formula(self, u: Sequence[Any]) -> Any:
        powers = [u[0] * 0.0 + 1.0]
        for _ in range(self.size - 1):
            powers.append(powers[-1] * u[0])
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

    def formula(self, u: Sequence[Any]) -> Any:
        one = u[0] * 0.0 + 1.0
        found = []
        for column in range(self.size):
            product = one
            found.append(product)
            for part in u[column:]:
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

    @property
    def kinds(self) -> np.ndarray:
        return self._lags

    def formula(self, u: Sequence[Any]) -> Any:
        lags = [u[0] * 0.0 + 1.0]
        weights: list[Any] = []  # of the regression on those before
        left: Any = lags[0]  # what it leaves of the variance
        for own in u:
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
class Unrestricted(Correlation):
    """Any correlations ("us"); z are those of `factors`."""

    linear = linear_each = True

    @property
    def count(self) -> int:
        return self.size * (self.size - 1) // 2

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        pairs = [(j, i) for i in range(len(effects)) for j in range(i)]
        return tuple(f"{effects[j]}, {effects[i]}" for j, i in pairs)

    @property
    def described(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.size) for j in range(i)]

    def formula(self, u: Sequence[Any]) -> Any:
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
    def linear_shared(self) -> bool:
        return self.each.linear_shared

    @property
    def linear_each(self) -> bool:
        return self.each.linear_each

    def stated(self, z: Array) -> Array:
        return namespace(z).concatenate([self.each.stated(own) for own in self._cut(z)])

    def drift(self, z: Array, spread: Array) -> Array:
        count, found = self.each.count, []
        for k, own in enumerate(self._cut(z)):
            places = slice(k * count, (k + 1) * count)
            found.append(self.each.drift(own, spread[places, places]))
        return namespace(z).concatenate(found)

    def _cut(self, z: Array) -> list[Array]:
        """Coordinates of each group."""
        count = self.each.count
        return [z[k * count : (k + 1) * count] for k in range(len(self._starts))]

    @property
    def _starts(self) -> range:
        return range(0, self.size, self.each.size)

    @property
    def count(self) -> int:
        return self.each.count * len(self._starts)

    @property
    def correlated(self) -> bool:
        """Whether there is any correlation."""
        return self.count > 0

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

    def formula(self, u: Sequence[Any]) -> Any:
        raise NotImplementedError

    def entries(self, z: Array) -> Array:
        xp = namespace(z)
        found = [self.each.entries(own) for own in self._cut(z)]
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


def upper(t: Array) -> tuple[Array, Array]:
    """Sine, at least TINY, and cosine of t, turned by half a circle where it is below."""
    xp, sine = namespace(t), namespace(t).sin(t)
    return xp.maximum(xp.abs(sine), TINY), xp.where(sine < 0, -1.0, 1.0) * xp.cos(t)


def by_sine(t: Array) -> tuple[Array, Array, Array]:
    """-log sin^2 t, with its derivatives."""
    xp = namespace(t)
    sine, cosine = upper(t)
    return -2 * xp.log(sine), -2 * cosine / sine, 2 / sine**2


def _fisher(common: Array) -> Array:
    xp = namespace(common)
    return xp.arctanh(xp.clip(common, -MOST, MOST))


def _repeated(value: Array, count: int) -> Array:
    return namespace(value).stack([value] * count)
