"""Correlations that are a function of the distance between two times or places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model import linalg
from jaxreml.model.covariance import jets
from jaxreml.model.covariance.base import Reading
from jaxreml.model.covariance.correlations import MOST, RIGHT, Stationary, by_sine, upper
from jaxreml.model.covariance.natural import triangle

Array = Any  # NumPy's or JAX's


class Shape(NamedTuple):
    """How correlations die away with x, distance over range.

    Attributes:
        power: b = x^power is what the formula is in; correlations are linear in it near zero.
        tail: of the sum in front of exp(-b): factors of b, b^2, ...
    """

    power: int
    tail: tuple[float, ...] = ()

    def value(self, b: Any) -> Any:
        """The correlation, of an array or a Jet."""
        front, power = 1.0, b
        for factor in self.tail:
            front = front + power * factor
            power = power * b
        return jets.exp(-b) * front


SHAPES = {
    "exponential": Shape(1),
    "gaussian": Shape(2),
    "matern3": Shape(1, (1.0,)),  # Matern's of smoothness 3/2 and 5/2
    "matern5": Shape(1, (1.0, 1 / 3)),
}


@dataclass(frozen=True)
class Distance(Stationary):
    """A function of the distance d between two times or places, over a range ("sp_exp", "sp_gau",
    "ou", "exp", "gau", "mat"): exp(-x), exp(-x^2), (1 + x) exp(-x) or (1 + x + x^2 / 3) exp(-x) of
    x = d / range. z is the logarithm of the range: at minus infinity there is no correlation, at
    infinity all are 1.

    Attributes:
        places: q of them, each a number or coordinates.
        shape: a key of `SHAPES`.
    """

    places: tuple[Any, ...] = ()
    shape: str = "exponential"

    @property
    def _own(self) -> Shape:
        return SHAPES[self.shape]

    reading = Reading("range", (), 0, "log")

    @property
    def markov(self) -> bool:
        return self.shape == "exponential"

    def of_distance(self, z: Any, distances: Any) -> Any:
        power = self._own.power
        return self._own.value(jets.exp(z * -float(power)) * distances**power)

    def with_correlation(self, common: float, distance: Array) -> Array:
        return self._z_of(np.float64(common), distance)[0]

    @property
    def _distances(self) -> np.ndarray:
        """(t,)."""
        points = np.array(self.places, float).reshape(self.size, -1)
        rows, columns = triangle(self.size)
        return np.linalg.norm(points[rows] - points[columns], axis=1)

    @property
    def nearest(self) -> float:
        """The smallest distance."""
        return float(np.min(self._distances[self._distances > 0]))

    @property
    def centre(self) -> float:
        return float(np.log(self.nearest))

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, RIGHT

    def names(self, effects: Sequence[str]) -> tuple[str, ...]:
        return ("log range",)

    @property
    def described(self) -> list[tuple[int, int]]:
        return []

    def readings(self, effects: Sequence[str]) -> list[Reading]:
        return [self.reading]

    def formula(self, u: Sequence[Any]) -> Any:
        """Of b at the smallest distance."""
        ratios = (self._distances / self.nearest) ** self._own.power
        lanes = u[0].value.ndim if isinstance(u[0], jets.Jet) else u[0].ndim
        return self._own.value(u[0][None] * ratios.reshape(-1, *[1] * lanes))

    def bounded(self, z: Sequence[Any]) -> list[Any]:
        power, centre = self._own.power, self.centre

        def nearness(z: Array) -> tuple[Array, Array, Array]:
            xp = namespace(z)
            b = xp.exp(power * (centre - xp.maximum(z, centre - 7.0)))
            return b, -power * b, power**2 * b

        return [jets.through(z[0], nearness)]

    def turned(self, t: Sequence[Any]) -> list[Any]:
        """b is zero at a right angle and infinite at none. Where correlations are linear in b it is
        like the square of what is left to a right angle, otherwise like that itself."""
        return [jets.through(t[0], _by_cotangent if self._own.tail else by_sine)]

    def folded(self, t: Array) -> Array:
        xp = namespace(t)
        return xp.arctan2(abs(xp.sin(t)), abs(xp.cos(t)))

    def snapped(self, t: Array, zero: Array) -> Array:
        xp = namespace(t)
        return xp.where(xp.sin(t) <= zero, 0.0, super().snapped(t, zero))

    def limits(self, t: Array) -> Array:
        xp = namespace(t)
        return xp.where(t >= RIGHT, 1.0, xp.where(t <= 0, -1.0, 0.0))

    def depends(self, t: Array) -> Array:
        apart = (self._distances > 0).reshape(-1, 1, *[1] * (t.ndim - 1))
        return namespace(t).zeros((apart.size, *t.shape), bool) | apart

    def of_angles(self, t: Array) -> Array:
        (b,) = self.turned(list(t))
        return self.centre - namespace(t).log(b)[None] / self._own.power

    def angles(self, z: Array) -> Array:
        xp = namespace(z)
        (b,) = self.bounded(list(z))
        half = xp.minimum(b, 700.0) / 2
        return (xp.arctan2(1.0, 2 * xp.sinh(half)) if self._own.tail else xp.arcsin(xp.exp(-half)))[
            None
        ]

    def coordinates(self, matrix: Array) -> Array:
        rows, columns = triangle(self.size)
        place = int(np.argmin(np.where(self._distances > 0, self._distances, np.inf)))
        return self._z_of(matrix[rows[place], columns[place]], self.nearest)

    def _z_of(self, rho: Array, distance: Array) -> Array:
        """The logarithm of the range with which the correlation at a distance is rho."""
        xp = namespace(rho)
        rho = xp.clip(rho, 1e-300, 1.0)
        low, b = rho * 0.0, -xp.log(rho)
        if self._own.tail:  # by halving: b is at least that of the exponential, and below its twice
            high = 2 * b + 10.0
            for _ in range(60):
                b = (low + high) / 2
                above = self._own.value(b) > rho
                low, high = xp.where(above, b, low), xp.where(above, high, b)
        return (namespace(distance).log(distance) - xp.log(b) / self._own.power)[None]

    def stated(self, z: Array) -> Array:
        """The range."""
        return namespace(z).exp(z)

    def drift(self, z: Array, spread: Array) -> Array:
        return -linalg.diagonal(spread)

    def start(self, common: Array) -> Array:
        """With that correlation at the mean distance."""
        mean = float(np.mean(self._distances[self._distances > 0]))
        return self._z_of(namespace(common).clip(common, 0.1, MOST), mean)


def _by_cotangent(t: Array) -> tuple[Array, Array, Array]:
    """2 arsinh |cot t / 2|, which is like -log sin^2 t where that is large."""
    xp = namespace(t)
    sine, cosine = upper(t)
    cotangent = cosine / sine
    sign = xp.where(cotangent < 0, -1.0, 1.0)
    c = sign * cotangent
    root = xp.sqrt(4 + c * c)
    bend = 2 * c * (7 + c * c) * (1 + c * c) / root**3
    return 2 * xp.arcsinh(c / 2), -2 * sign * (1 + c * c) / root, bend
