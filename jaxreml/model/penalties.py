"""Penalties of variance parameters: what keeps estimates off the boundary, or says what is known.

A penalised fit minimises -2 log (restricted) likelihood - 2 log density(parameters). The density is
taken as it stands: no Jacobian of the coordinates that a search moves in is added, so that a
density of standard deviations has its mode where people expect it (blme does likewise).

`Wishart` and `Gamma` are functions of a term's covariance matrix with their derivatives written
out, so that NumPy fits with them; a function of one's own is differentiated by JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.lazy import jax
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.natural import places, triangle

Array = Any  # NumPy's or JAX's
Derivatives = tuple[Array, Array, Array]  # value (), gradient (k,) and Hessian (k, k)
Terms = Sequence[tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Wishart:
    """A Wishart density of the covariance matrix of a term's effects.

    With `df` = q + 1 + c for q effects and an infinite scale it is proportional to
    \\|Sigma\\|^(c / 2). The default, c = 1.5, is blme's: it moves estimates from zero by about a
    standard error and large ones hardly (Chung, Gelman, Rabe-Hesketh, Liu and Dorie 2015, J. Educ.
    Behav. Stat. 40:136).

    Attributes:
        df: degrees of freedom, above q + 1; q + 2.5 if left out.
        scale: of the density: a number, or a (q, q) positive definite matrix as nested tuples.
            Infinite by default: no pull from above.
        common_scale: whether the matrix is that relative to the residual variance (blme's default),
            or in the units of the response.

    Examples:
        >>> sleep = "Reaction ~ Days + (Days | Subject)"
        >>> penalised = jaxreml.fit(sleep, data, penalty=jaxreml.penalties.Wishart(df=5))
        >>> penalised.converged, round(penalised.penalty_value, 3)
        (True, 5.007)
    """

    df: float | None = None
    scale: Any = np.inf
    common_scale: bool = True

    def text(self, block: Block) -> str:
        """What it is, in words."""
        df = block.size + 2.5 if self.df is None else self.df
        scale = "" if np.ndim(self.scale) == 0 and np.isinf(self.scale) else f", scale={self.scale}"
        return f"Wishart(df={df:g}{scale}) of the {_matrix(self)}"

    def check(self, block: Block, name: str) -> None:
        """Refuse what is no density of this covariance.

        Raises:
            DataError: see `df` and `scale`.
        """
        q = block.size
        if self.df is not None and not self.df > q + 1:
            raise DataError(
                f"the Wishart penalty of {name} has {self.df:g} degrees of freedom: with "
                f"{q} {'effect' if q == 1 else 'effects'} more than {q + 1} keep it off the "
                "boundary"
            )
        scale = np.asarray(self.scale, float)
        if scale.shape not in ((), (q, q)):
            raise DataError(
                f"the scale of the Wishart penalty of {name} must be a number or {q} x {q}, not "
                f"{scale.shape}"
            )
        matrix = scale * np.eye(q) if scale.ndim == 0 and np.isfinite(scale) else scale
        bad = not scale > 0 if scale.ndim == 0 else not np.array_equal(matrix, matrix.T)
        if bad or (matrix.ndim and np.linalg.eigvalsh(matrix)[0] <= 0):
            raise DataError(f"the scale of the Wishart penalty of {name} is not positive definite")

    def _parts(self, q: int) -> tuple[float, np.ndarray | None]:
        """The coefficient of log|Sigma|, and the inverse of the scale."""
        df = q + 2.5 if self.df is None else self.df
        scale = np.asarray(self.scale, float)
        if scale.ndim == 0 and np.isinf(scale):
            return q + 1 - df, None
        return q + 1 - df, np.linalg.inv(scale * np.eye(q) if scale.ndim == 0 else scale)

    def value(self, entries: Array) -> Array:
        """-2 log density of a lower `triangle` (m,), up to a constant; infinite where the matrix is
        singular."""
        xp, q = namespace(entries), _order(entries)
        coefficient, inverse = self._parts(q)
        matrix = entries[places(q)]
        pivots = linalg.diagonal(linalg.cholesky(matrix))
        found = coefficient * 2 * xp.sum(xp.log(pivots))
        found = xp.where(xp.isnan(found), xp.inf, found)
        if inverse is None:
            return found
        return found + xp.sum(inverse.astype(entries.dtype) * matrix)

    def expand(self, entries: Array) -> Derivatives:
        """`value` with its gradient (m,) and Hessian (m, m)."""
        xp, q = namespace(entries), _order(entries)
        coefficient, scale = self._parts(q)
        inverse, _ = linalg.inverse(entries[places(q)], True)
        rows, columns = triangle(q)
        basis = np.zeros((rows.size, q, q), entries.dtype)
        each = np.arange(rows.size)
        basis[each, rows, columns] = basis[each, columns, rows] = 1.0
        turned = xp.stack([inverse @ own for own in basis])
        gradient = coefficient * xp.einsum("aii->a", turned)
        if scale is not None:
            gradient = gradient + np.einsum("ij,aji->a", scale, basis).astype(entries.dtype)
        hessian = -coefficient * xp.einsum("aij,bji->ab", turned, turned)
        return self.value(entries), gradient, hessian


@dataclass(frozen=True)
class Gamma:
    """A gamma density of the standard deviation, or the variance, of a term with one effect.

    Attributes:
        shape: above 1: then the density vanishes at zero.
        rate: zero by default: no pull from above.
        on: "sd" or "variance".
        common_scale: as in `Wishart`.

    Examples:
        blme's default for a random intercept, sd^1.5:

        >>> one = "Reaction ~ Days + (1 | Subject)"
        >>> penalised = jaxreml.fit(one, data, penalty=jaxreml.penalties.Gamma())
        >>> float(penalised.log_variances.iloc[0] > jaxreml.fit(one, data).log_variances.iloc[0])
        1.0
    """

    shape: float = 2.5
    rate: float = 0.0
    on: str = "sd"
    common_scale: bool = True

    def text(self, block: Block) -> str:
        """What it is, in words."""
        to = " relative to sigma" if self.common_scale else ""
        return f"gamma(shape={self.shape:g}, rate={self.rate:g}) of the {self.on}{to}"

    def check(self, block: Block, name: str) -> None:
        """Refuse what is no density of this covariance.

        Raises:
            DataError: several effects; see the attributes.
        """
        if block.size > 1:
            raise DataError(
                f"a gamma penalty is of one variance and {name} has {block.size} effects: use "
                '"wishart"'
            )
        if self.on not in ("sd", "variance"):
            raise DataError(f'a gamma penalty is on "sd" or "variance", not {self.on!r}')
        if not (self.shape > 1 and np.isfinite(self.shape) and self.rate >= 0):
            raise DataError(
                f"the gamma penalty of {name} has shape {self.shape:g} and rate {self.rate:g}: the "
                "shape must be above 1, to keep off the boundary, and the rate not negative"
            )

    @property
    def _power(self) -> float:
        return 0.5 if self.on == "sd" else 1.0

    def value(self, entries: Array) -> Array:
        """-2 log density of a variance (1,), up to a constant."""
        xp, power = namespace(entries), self._power
        variance = entries[0]
        found = 2 * self.rate * variance**power if self.rate else 0.0
        return found - 2 * (self.shape - 1) * power * xp.log(variance)

    def expand(self, entries: Array) -> Derivatives:
        """`value` with its derivative (1,) and second one (1, 1)."""
        power = self._power
        slope = -2 * (self.shape - 1) * power / entries
        bend = -slope / entries
        if self.rate:
            slope = slope + 2 * self.rate * power * entries ** (power - 1)
            bend = bend + 2 * self.rate * power * (power - 1) * entries ** (power - 2)
        return self.value(entries), slope, bend[:, None]


NAMED: dict[str, Any] = {"wishart": Wishart(), "gamma": Gamma()}


@dataclass(frozen=True)
class ByTerm:
    """Densities of the covariance matrices of terms; static under `jit`.

    Attributes:
        terms: per block of the covariance, or None.
    """

    terms: tuple[Wishart | Gamma | None, ...]

    def text(self, covariance: Covariance, terms: Terms) -> str:
        """What it is, in words."""
        triples = zip(terms, covariance.blocks, self.terms, strict=True)
        return "; ".join(f"{name}: {own.text(block)}" for (name, _), block, own in triples if own)

    def value(self, parameters: Array, covariance: Covariance) -> Array:
        """-2 log density at all `parameters` (k + 1,), ()."""
        xp, total = namespace(parameters), 0.0
        omega, last = covariance.natural(parameters)
        for (_, own), term in zip(covariance.parts(omega), self.terms, strict=True):
            if term is not None:
                total = total + term.value(own if term.common_scale else own * xp.exp(last))
        return total

    def expand(self, parameters: Array, covariance: Covariance) -> Derivatives:
        """`value` with its gradient (k + 1,) and Hessian (k + 1, k + 1)."""
        xp, last = namespace(parameters), parameters[-1]
        value: Any = 0.0
        gradient, hessian = xp.zeros_like(parameters), parameters[:, None] * 0.0 * parameters
        parts = covariance.own_parameters(parameters)
        for (block, own), start, term in zip(parts, covariance.starts, self.terms, strict=False):
            if term is None:
                continue
            found = _of_block(term, block, own, last)
            rows = np.append(np.arange(start, start + own.size), parameters.size - 1)
            place = np.eye(parameters.size, dtype=parameters.dtype)[:, rows]
            value = value + found[0]
            gradient = gradient + place @ found[1]
            hessian = hessian + place @ found[2] @ place.T
        return value, gradient, hessian


def _matrix(term: Wishart) -> str:
    return f"covariance matrix{' relative to sigma^2' if term.common_scale else ''}"


def _of_block(term: Any, block: Block, parameters: Array, last: Array) -> Derivatives:
    """Value and derivatives in a block's parameters and the residual log-variance, the last."""
    xp, omega = namespace(parameters), block.natural(parameters, last)
    scale = 1.0 if term.common_scale else xp.exp(last)
    value, gradient, hessian = term.expand(omega * scale)
    slope, bend = block.in_scale(parameters, last, gradient * scale)
    slope = slope * scale
    if not term.common_scale:  # in the units of the response, which sigma2 does not change
        slope = slope * (np.arange(slope.shape[1]) < len(parameters))
        bend = linalg.border(bend[:-1, :-1], xp.zeros_like(parameters), xp.zeros_like(last))
    return value, gradient @ slope, slope.T @ hessian @ slope + bend


@dataclass(frozen=True)
class OfParameters:
    """The logarithm of a density by a JAX function of all parameters; static under `jit`."""

    function: Callable[[Any], Any]

    def text(self, covariance: Covariance, terms: Terms) -> str:
        """What it is, in words."""
        return f"{getattr(self.function, '__name__', 'a function')} of all parameters"

    def value(self, parameters: Array, covariance: Covariance) -> Array:
        """-2 log density at all `parameters` (k + 1,), ()."""
        if on_host(parameters):
            with neutral():
                return np.asarray(_compiled(self.function)[0](parameters))
        return -2 * self.function(parameters)

    def expand(self, parameters: Array, covariance: Covariance) -> Derivatives:
        """`value` with its gradient (k + 1,) and Hessian (k + 1, k + 1)."""
        if on_host(parameters):
            with neutral():
                value, gradient, hessian = _compiled(self.function)[1](parameters)
                return np.asarray(value), np.asarray(gradient), np.asarray(hessian)
        return _expanded(self.function, parameters)


def _expanded(function: Callable[[Any], Any], parameters: Array) -> Derivatives:
    def own(parameters: Array) -> Array:
        return -2 * function(parameters)

    value, gradient = jax.value_and_grad(own)(parameters)
    return value, gradient, jax.hessian(own)(parameters)


@lru_cache(maxsize=64)
def _compiled(function: Callable[[Any], Any]) -> tuple[Any, Any]:
    return (
        jax.jit(lambda parameters: -2 * function(parameters)),
        jax.jit(lambda parameters: _expanded(function, parameters)),
    )


Penalty = ByTerm | OfParameters


def penalty_of(given: Any, covariance: Covariance, terms: Terms) -> Penalty | None:
    """What `penalty=` says of a model.

    Args:
        given: None, "wishart", "gamma", `Wishart` or `Gamma`, a dict of these by grouping factor,
            or a JAX function of all parameters to the logarithm of their density.
        covariance: of the model.
        terms: a grouping factor's name and effects' names each.

    Raises:
        DataError: a factor that the model does not have; a density that does not fit its term; a
            function that does not give a scalar.
        ValueError: something else.
    """
    if given is None or isinstance(given, Penalty):
        return given
    if callable(given):
        _check_scalar(given, covariance)
        return OfParameters(given)
    names = [group for group, _ in terms]
    random = [not block.residual and block.of_matrix for block in covariance.blocks]
    if isinstance(given, Mapping):
        known = sorted({name for name, own in zip(names, random, strict=True) if own})
        for name in given:
            if name not in known:
                raise DataError(
                    f"penalty has {name!r}; the random terms are of {', '.join(known) or 'nothing'}"
                )
        chosen = [_density(given.get(name)) for name in names]
    else:
        chosen = [_density(given)] * len(names)
    if not any(random):
        raise DataError("the model has no random effects for the penalty to be of")
    found = []
    for name, block, own, is_random in zip(names, covariance.blocks, chosen, random, strict=True):
        if own is not None and is_random:
            own.check(block, name)
        found.append(own if is_random else None)
    return ByTerm(tuple(found))


def _density(given: Any) -> Wishart | Gamma | None:
    if given is None or isinstance(given, Wishart | Gamma):
        return given
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]
    raise ValueError(
        'penalty must be "wishart", "gamma", jaxreml.penalties.Wishart(...) or Gamma(...), a dict '
        f"of these by grouping factor, or a JAX function of all parameters; got {given!r}"
    )


def _check_scalar(function: Callable[[Any], Any], covariance: Covariance) -> None:
    length = covariance.starts[-1] + 1
    kind = "float64" if jax.config.jax_enable_x64 else "float32"  # type: ignore[attr-defined]
    found = jax.eval_shape(function, jax.ShapeDtypeStruct((length,), kind))
    if getattr(found, "shape", None) != ():
        raise DataError(
            f"the penalty must give one number, the logarithm of a density, for {length} "
            f"parameters; it gives {found}"
        )


def _order(entries: Array) -> int:
    """q of a lower triangle with q (q + 1) / 2 entries."""
    return int((np.sqrt(8 * len(entries) + 1) - 1) / 2)
