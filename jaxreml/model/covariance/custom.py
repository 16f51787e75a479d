"""A user's own covariance: a JAX function of named parameters, with its derivatives compiled once.

The function has the parameters on the scales that people read. Here it is one of `variances` v and
of unconstrained coordinates z of the others, proportional to v: V is relative to the residual
variance, and v over sigma2 gives the covariance over sigma2. A function without variances is
multiplied by one. Its entries, and their first and second derivatives in (v, z), are one compiled
program, from NumPy arrays to NumPy arrays: what a search does beside it stays on NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.compilation import quick_jit, remembered
from jaxreml.backend.lazy import is_of_jax, jax
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.model.covariance.natural import triangle

Array = Any  # NumPy's or JAX's
VARIANCE = "variance"
ALIKE = 1e-12  # absolute, of variances and slopes of the order of one
WORDS = (VARIANCE, "log", "tanh", "logit", "identity")


@dataclass(frozen=True)
class Transform:
    """Between a parameter and its coordinate, which has no bounds.

    Attributes:
        word: one of WORDS, or "interval".
        lower, upper: of an interval, one of which may be infinite.
    """

    word: str
    lower: float = -math.inf
    upper: float = math.inf

    @staticmethod
    def of(given: Any, name: str) -> Transform:
        """What a user's word or pair of bounds says.

        Raises:
            ValueError: neither.
        """
        if isinstance(given, str) and given in WORDS:
            return Transform(given)
        try:
            lower, upper = (float(bound) for bound in given)
        except (TypeError, ValueError):
            raise ValueError(
                f"the transform of {name!r} must be one of {', '.join(map(repr, WORDS))}, or a "
                f"pair (lower, upper), not {given!r}"
            ) from None
        if not lower < upper:
            raise ValueError(f"the bounds of {name!r} must be (lower, upper), not {given!r}")
        word = "interval" if np.isfinite([lower, upper]).any() else "identity"
        return Transform(word, lower, upper)

    @property
    def domain(self) -> tuple[float, float]:
        """The open interval that the parameter is in."""
        if self.word in (VARIANCE, "log"):
            return 0.0, math.inf
        return {"tanh": (-1.0, 1.0), "logit": (0.0, 1.0)}.get(self.word, (self.lower, self.upper))

    def value(self, z: Array) -> Array:
        """The parameter at a coordinate."""
        xp, (lower, upper) = namespace(z), self.domain
        if self.word == "identity":
            return z
        if math.isinf(upper):
            return lower + xp.exp(z)
        if math.isinf(lower):
            return upper - xp.exp(-z)
        # Of [0, 1], logit's inverse; of others as many halves of their width from the middle.
        half = (upper - lower) / 2
        return (lower + half) + half * xp.tanh(z if self.word == "tanh" else z / 2)

    def slope(self, z: np.ndarray) -> np.ndarray:
        """The derivative of `value`."""
        lower, upper = self.domain
        if self.word == "identity":
            return np.ones_like(z)
        if math.isinf(upper) or math.isinf(lower):
            return np.exp(z if math.isinf(upper) else -z)
        scale = 1.0 if self.word == "tanh" else 0.5
        return scale * (upper - lower) / 2 * (1 - np.tanh(scale * z) ** 2)

    def bend(self, z: np.ndarray) -> np.ndarray:
        """The second derivative."""
        lower, upper = self.domain
        if self.word == "identity":
            return np.zeros_like(z)
        if math.isinf(upper) or math.isinf(lower):
            return self.slope(z) if math.isinf(upper) else -self.slope(z)
        scale = 1.0 if self.word == "tanh" else 0.5
        return -2 * scale * np.tanh(scale * z) * self.slope(z)

    def coordinate(self, value: Any) -> Any:
        """The inverse of `value`, inside the `domain`."""
        lower, upper = self.domain
        if self.word == "identity":
            return value
        if math.isinf(upper):
            return np.log(value - lower)
        if math.isinf(lower):
            return -np.log(upper - value)
        share = (value - lower) / (upper - lower)
        return np.arctanh(2 * share - 1) * (1.0 if self.word == "tanh" else 2.0)

    @property
    def reading(self) -> str | Transform | None:
        """As `Reading.transform` has it."""
        known = {VARIANCE: "log", "log": "log", "logit": "logit", "tanh": "fisher"}
        return self if self.word == "interval" else known.get(self.word)

    def label(self, name: str) -> str:
        """What the coordinate is called: that of tanh is z, as a correlation's is."""
        return name if self.word in ("tanh", "identity") else f"{self.word} {name}"


class Parameter(NamedTuple):
    """One of a function's arguments.

    Attributes:
        name: of the argument.
        start: (k,), or () for a number.
        transform: of all its entries.
    """

    name: str
    start: np.ndarray
    transform: Transform

    @property
    def labels(self) -> list[str]:
        """Of its entries."""
        if not self.start.ndim:
            return [self.name]
        return [f"{self.name}[{k}]" for k in range(self.start.size)]


class Derivatives(NamedTuple):
    """What the function is at (v, z), (c, ...).

    Attributes:
        matrix: (q, q, ...), as returned.
        first, second: derivatives of the lower triangle, (t, c, ...) and (t, c, c, ...).
    """

    matrix: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @property
    def value(self) -> np.ndarray:
        """The lower triangle, (t, ...)."""
        return self.matrix[triangle(len(self.matrix))]


class Known:
    """A tree of arrays that two of the same content are equal of."""

    def __init__(self, tree: Any):
        self.tree = tree
        self._key = _key(tree)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _key(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return "dict", tuple((name, _key(part)) for name, part in sorted(tree.items()))
    if isinstance(tree, (tuple, list)):
        return type(tree).__name__, tuple(_key(part) for part in tree)
    if is_of_jax(tree) and isinstance(tree, jax.core.Tracer):  # pyright: ignore
        raise DataError(
            "the data of a covariance of your own must be concrete, as they are compiled into the "
            "program, and these are traced by JAX. To differentiate in h of a known matrix K(h) of "
            'the effects, give it by these: Z L(h) with K = L L\' and the covariance "homdiag"'
        )
    array = np.asarray(tree)
    return array.shape, array.dtype.str, array.tobytes()


@dataclass(frozen=True)
class Function:
    """See above; of q effects.

    Attributes:
        function: from what is known of the effects, and the parameters by name, to (q, q).
        parameters: in the order of the user.
        size: q.
        at: what is known of the effects, the function's first argument.
    """

    function: Callable[..., Any]
    parameters: tuple[tuple[str, Known, Transform], ...]
    size: int
    at: Known

    @staticmethod
    def of(
        function: Callable[..., Any], parameters: Sequence[Parameter], size: int, at: Any
    ) -> Function:
        """From arrays."""
        kept = tuple((own.name, Known(own.start), own.transform) for own in parameters)
        return Function(function, kept, size, Known(at))

    @cached_property
    def _own(self) -> list[Parameter]:
        return [Parameter(name, start.tree, kind) for name, start, kind in self.parameters]

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @cached_property
    def implicit(self) -> bool:
        """Whether the function has no variance, and is multiplied by one."""
        return all(own.transform.word != VARIANCE for own in self._own)

    @cached_property
    def _entries(self) -> list[tuple[str, Transform, float]]:
        """Label, transform and start of each coordinate, variances first."""
        found = [(VARIANCE, Transform(VARIANCE), 1.0)] if self.implicit else []
        for variances in (True, False):
            for own in self._own:
                if (own.transform.word == VARIANCE) == variances:
                    starts = own.start.reshape(-1).tolist()
                    pairs = zip(own.labels, starts, strict=True)
                    found += [(label, own.transform, start) for label, start in pairs]
        return found

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The user's names of the parameters, variances first."""
        return tuple(label for label, _, _ in self._entries)

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """Of each."""
        return tuple(transform for _, transform, _ in self._entries)

    @cached_property
    def count(self) -> int:
        """c, of all parameters."""
        return len(self._entries)

    @cached_property
    def variances(self) -> int:
        """How many are variances."""
        return sum(transform.word == VARIANCE for transform in self.transforms)

    @cached_property
    def start(self) -> np.ndarray:
        """(c,), variances and coordinates to begin with."""
        rows = zip(self.transforms, self._entries, strict=True)
        return np.array(
            [
                value if kind.word == VARIANCE else kind.coordinate(value)
                for kind, (*_, value) in rows
            ]
        )

    @cached_property
    def units(self) -> np.ndarray:
        """How much of the mean variance of the effects each unit of a variance is, at the start."""
        k, same = self.variances, np.equal(*triangle(self.size))
        shares = self.derivatives(self.start).first[same, :k].mean(axis=0)
        return np.where(np.isfinite(shares) & (shares > 0), shares, 1.0)

    @cached_property
    def homogeneous(self) -> bool:
        """Whether all effects have one variance: with its derivatives, at the start."""
        same, found = np.equal(*triangle(self.size)), self.derivatives(self.start)
        parts = (part[same] for part in (found.value, found.first, found.second))
        return all(np.ptp(part, axis=0).max(initial=0.0) <= ALIKE for part in parts)

    @cached_property
    def start_variance(self) -> float:
        """The mean variance of the effects at the start."""
        same = np.equal(*triangle(self.size))
        return float(self.derivatives(self.start).value[same].mean())

    def stated(self, z: Array) -> Array:
        """The parameters that are no variances, (c, ...), of coordinates."""
        kinds = self.transforms[self.variances :]
        found = [kind.value(own) for kind, own in zip(kinds, z, strict=True)]
        return namespace(z).stack(found) if found else z

    def matrix(self, x: Array) -> Any:
        """(q, q) at variances and coordinates (c,), by JAX, of what the function returns."""
        import jax
        import jax.numpy as jnp

        k = self.variances
        parts = {True: x[1:k] if self.implicit else x[:k], False: x[k:]}
        taken = {True: 0, False: 0}
        values: dict[str, Any] = {}
        for own in self._own:
            of = own.transform.word == VARIANCE
            first, taken[of] = taken[of], taken[of] + own.start.size
            part = parts[of][first : taken[of]]
            part = part if of else own.transform.value(part)
            values[own.name] = part.reshape(own.start.shape)
        found = self.function(jax.tree.map(jnp.asarray, self.at.tree), **values)
        return x[0] * found if self.implicit else found

    def entries(self, x: Array) -> Array:
        """The lower triangle (t, ...) at variances and coordinates (c, ...)."""
        if on_host(x):
            return self.derivatives(x).value
        import jax

        def triangular(x: Array) -> Array:
            return self.matrix(x)[triangle(self.size)]

        for _ in range(x.ndim - 1):
            triangular = jax.vmap(triangular, in_axes=-1, out_axes=-1)
        return triangular(x)

    @cached_property
    def _last(self) -> dict[str, Any]:
        """What was computed last: a search asks for values and derivatives of one point in turn."""
        return {}

    def derivatives(self, x: np.ndarray) -> Derivatives:
        """At variances and coordinates (c, ...), on the host."""
        key = x.shape, x.tobytes()
        known, found = self._last.get("point", (None, None))
        if found is None or known != key:
            found = self._computed(x)
            self._last["point"] = key, found
        return found

    def _computed(self, x: np.ndarray) -> Derivatives:
        import jax

        lanes, c, t = x.shape[1:], self.count, len(triangle(self.size)[0])
        with jax.ensure_compile_time_eval(), neutral():
            found = _program(self, bool(lanes))(x.reshape(c, -1) if lanes else x)
            parts = [np.asarray(part) for part in found]
        shapes = (self.size, self.size), (t, c), (t, c, c)
        return Derivatives(
            *(part.reshape(*shape, *lanes) for part, shape in zip(parts, shapes, strict=True))
        )


@remembered
def _program(function: Function, lanes: bool) -> Any:
    """From (c,) or (c, lanes) to the parts of `Derivatives`, compiled."""
    import jax

    def entries(x: Array) -> tuple[Array, Array]:
        matrix = function.matrix(x)
        return matrix[triangle(function.size)], matrix

    def slopes(x: Array) -> tuple[Array, tuple[Array, Array]]:
        first, matrix = jax.jacfwd(entries, has_aux=True)(x)
        return first, (matrix, first)

    def both(x: Array) -> tuple[Array, Array, Array]:
        second, (matrix, first) = jax.jacfwd(slopes, has_aux=True)(x)
        return matrix, first, second

    return quick_jit(jax.vmap(both, in_axes=-1, out_axes=-1) if lanes else both)
