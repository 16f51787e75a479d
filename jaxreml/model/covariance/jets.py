"""Values with first and second derivatives: what a formula is, differentiated, without JAX.

A formula made of sums, products, quotients, `exp`, `tanh` and constant powers gives its value on
arrays, JAX's too, and its derivatives on `variables`, which the forward rules carry along
(Griewank and Walther 2008, Evaluating Derivatives, chapter 3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace

Array = Any  # NumPy's or JAX's


class Jet:
    """A value (...), its slopes (c, ...) in c variables, and its second derivatives (c, c, ...)."""

    __array_ufunc__ = None  # a NumPy array on the left leaves the operation to it

    def __init__(self, value: Array, first: Array, second: Array):
        self.value, self.first, self.second = value, first, second

    def __getitem__(self, places: Any) -> Jet:
        return Jet(self.value[places], self.first[:, places], self.second[:, :, places])

    def _through(self, value: Array, slope: Array, bend: Array) -> Jet:
        """A function of this with such derivatives."""
        outer = self.first[:, None] * self.first[None]
        return Jet(value, slope * self.first, slope * self.second + bend * outer)

    def __neg__(self) -> Jet:
        return Jet(-self.value, -self.first, -self.second)

    def __add__(self, other: Any) -> Jet:
        if not isinstance(other, Jet):
            value = self.value + other
            return Jet(value, self.first + 0 * value, self.second + 0 * value)
        return Jet(self.value + other.value, self.first + other.first, self.second + other.second)

    def __sub__(self, other: Any) -> Jet:
        return self + -other

    def __rsub__(self, other: Any) -> Jet:
        return -self + other

    def __mul__(self, other: Any) -> Jet:
        if not isinstance(other, Jet):
            return Jet(self.value * other, self.first * other, self.second * other)
        mixed = self.first[:, None] * other.first[None]
        second = self.second * other.value + self.value * other.second
        return Jet(
            self.value * other.value,
            self.first * other.value + self.value * other.first,
            second + mixed + mixed.swapaxes(0, 1),
        )

    def __truediv__(self, other: Any) -> Jet:
        return self * (other**-1.0)

    def __rtruediv__(self, other: Any) -> Jet:
        return self**-1.0 * other

    def __pow__(self, power: Any) -> Jet:
        """By constants, numbers or an array that goes with the value."""
        xp = namespace(self.value, power)
        power = xp.asarray(power, float)
        below = xp.where(power == 0, 0.0, power * self.value ** xp.where(power == 0, 1, power - 1))
        lowest = power * (power - 1)
        bend = xp.where(
            lowest == 0, 0.0, lowest * self.value ** xp.where(lowest == 0, 1, power - 2)
        )
        return self._through(self.value**power, below, bend)

    __radd__, __rmul__ = __add__, __mul__


def variables(values: np.ndarray) -> list[Jet]:
    """Independent variables at `values` (c, ...)."""
    count = len(values)
    lanes = values.shape[1:]
    second = np.zeros((count, count, *lanes), values.dtype)
    unit = np.eye(count, dtype=values.dtype).reshape(count, count, *[1] * len(lanes))
    unit = np.broadcast_to(unit, (count, count, *lanes))
    return [Jet(values[k], unit[k], second) for k in range(count)]


def exp(argument: Any) -> Any:
    """Of a Jet or an array."""
    if not isinstance(argument, Jet):
        return namespace(argument).exp(argument)
    value = namespace(argument.value).exp(argument.value)
    return argument._through(value, value, value)


def tanh(argument: Any) -> Any:
    """Of a Jet or an array."""
    if not isinstance(argument, Jet):
        return namespace(argument).tanh(argument)
    value = namespace(argument.value).tanh(argument.value)
    slope = 1 - value**2
    return argument._through(value, slope, -2 * value * slope)


def sin(argument: Any) -> Any:
    """Of a Jet or an array."""
    if not isinstance(argument, Jet):
        return namespace(argument).sin(argument)
    xp = namespace(argument.value)
    value = xp.sin(argument.value)
    return argument._through(value, xp.cos(argument.value), -value)


def through(argument: Any, function: Any) -> Any:
    """A function of one variable that gives its value, slope and second derivative, of a Jet or
    an array."""
    if not isinstance(argument, Jet):
        return function(argument)[0]
    return argument._through(*function(argument.value))


def stack(parts: list[Any]) -> Any:
    """Jets or arrays (...) as one, (k, ...)."""
    jet = next((part for part in parts if isinstance(part, Jet)), None)
    if jet is None:
        return namespace(*parts).stack(parts)
    own = [part if isinstance(part, Jet) else jet * 0.0 + part for part in parts]
    xp = namespace(jet.value)
    return Jet(
        xp.stack([part.value for part in own]),
        xp.stack([part.first for part in own], axis=1),
        xp.stack([part.second for part in own], axis=2),
    )
