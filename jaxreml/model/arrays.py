"""Arrays that people give: checked, converted, refused with the reason. NumPy or traced by JAX."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, still
from jaxreml.backend.lazy import jax, jnp
from jaxreml.errors import DataError, PrecisionError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.natural import places
from jaxreml.model.covariance.unstructured import Unstructured
from jaxreml.model.covariance.words import covariance_of

ENABLE_X64 = 'jax.config.update("jax_enable_x64", True)'
CONFOUNDED = 1e-10  # squared distance of the residual's covariance from a term's, relative


@dataclass(frozen=True)
class Term:
    """One random term, (effects | group).

    Attributes:
        group: (n,) labels of the grouping factor's levels: any array with equality and order. With
            `n_levels` the levels themselves, 0, 1, ..., which may be traced by JAX.
        effects: (n, q) columns of the random effects; a column of ones, the random intercept,
            if left out. May be traced by JAX.
        name: the grouping factor's name.
        effect_names: q names.
        covariance: of the effects: a word for it, such as "ar1", or a `Block` made from their
            number.
        kernel: (L, L), the known covariance of L levels, up to the factor that is estimated;
            `group` has places in it then, 0 to L - 1. Levels are independent if left out. May be
            traced by JAX: a function of parameters of its own, say.
        n_levels: how many levels there are, with rows or without, so that the shape of a design
            does not depend on which levels its rows have: those of a mini-batch, say.

    Examples:
        >>> X = np.stack([np.ones(180), data["Days"]], axis=1)
        >>> term = jaxreml.Term(data["Subject"], X, name="Subject", effect_names=("1", "Days"))
        >>> design = jaxreml.Design.from_arrays(data["Reaction"], X, term)
        >>> design.parameter_names
        ('log_variance[Subject, 1]', 'log_variance[Subject, Days]', 'z[Subject, 1, ...
    """

    group: Any
    effects: Any = None
    name: str = "group"
    effect_names: tuple[str, ...] | None = None
    covariance: Callable[[int], Block] | str = Unstructured
    kernel: Any = None
    n_levels: int | None = None


def is_traced(value: Any) -> bool:
    """Whether JAX knows the shape only."""
    return "jax" in sys.modules and isinstance(value, jax.core.Tracer)  # pyright: ignore


def floating_type(values: Sequence[Any], asked: Any, traced: bool = False) -> np.dtype:
    """The type of a design; refuses single precision that was not asked for.

    Args:
        values: its numbers.
        asked: the type asked for, or None.
        traced: whether JAX knows anything else of it by shape only.
    """
    try:
        kind = np.dtype("float64" if asked is None else asked)
    except TypeError:
        raise PrecisionError(f"dtype must be float32 or float64, not {asked!r}") from None
    if kind.name not in ("float32", "float64"):
        raise PrecisionError(f"dtype must be float32 or float64, not {kind.name}")
    traced = traced or any(map(is_traced, values))
    single = any(getattr(value, "dtype", None) in (np.float32, np.float16) for value in values)
    if kind == np.float64 and (traced or (single and asked is None)) and not _has_double():
        raise PrecisionError(
            "the arrays are float32 and JAX has float64 switched off, which likelihoods need. Run\n"
            f"    {ENABLE_X64}\n"
            'before making arrays, or ask for single precision with dtype="float32".'
        )
    return kind


def widest_type(traced: bool) -> np.dtype:
    """The type to reduce rows in, whatever that of the design: sums over rows lose the most digits.

    Float64, but for traced values where JAX has it switched off.
    """
    return np.dtype("float32" if traced and not _has_double() else "float64")


def _has_double() -> bool:
    """Whether JAX, which is imported if so, computes in float64."""
    return jax.config.jax_enable_x64  # type: ignore[attr-defined]


def read(value: Any, kind: np.dtype, name: str) -> Any:
    """A NumPy array of finite values, or a traced array of the given type."""
    if is_traced(value):
        return value.astype(kind)
    if np.ma.is_masked(value):
        raise DataError(f"{name} contains masked values; drop those rows first")
    try:
        array = np.asarray(value).astype(kind, copy=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not numeric: {error}") from None
    if not np.all(np.isfinite(array)):
        raise DataError(f"{name} contains NaN or infinite values; drop those rows first")
    return array


def finite(values: Sequence[Any]) -> tuple[list[Any], Any]:
    """Arrays with zeros in the place of traced values that are not finite, and whether any was.

    Sums of NaN would make derivatives NaN where these are masked.
    """
    infinite: Any = np.zeros((), bool)
    known = []
    for value in values:
        if is_traced(value):
            good = jnp.isfinite(value)
            infinite = infinite | ~jnp.all(good)
            value = jnp.where(good, value, 0)
        known.append(value)
    return known, infinite


def read_rows(y: Any, X: Any, kind: np.dtype) -> tuple[Any, Any]:
    """Response (n,) and columns (n, p) of the fixed effects."""
    y, X = read(y, kind, "y"), read(X, kind, "X")
    n = y.shape[0] if y.ndim == 1 else -1
    if n < 1:
        raise DataError(f"y must be a vector with at least one value, not of shape {y.shape}")
    if X.ndim != 2 or X.shape[0] != n:
        raise DataError(f"X must have shape ({n}, p) to match y, not {X.shape}")
    return y, X


def row_vector(value: Any, kind: np.dtype, n: int, name: str) -> Any:
    """An array (n,), or None."""
    if value is None:
        return None
    array = read(value, kind, name)
    if array.shape != (n,):
        raise DataError(f"{name} must have shape ({n},) to match y, not {array.shape}")
    return array


def root_weights(weights: Any, used: np.ndarray | None, kind: np.dtype) -> tuple[Any, Any]:
    """Their square roots and the sum of their logarithms, NaN if traced ones are negative. Traced
    weights of zero leave rows out: these have roots, and derivatives, of zero.

    Args:
        weights: (n,), or None: all are 1.
        used: (n,) booleans, the others count as of weight 0; None for all. Not of traced weights.
        kind: of the numbers.
    """
    if used is not None:
        weights = np.ones(used.size, kind) if weights is None else weights
        return np.sqrt(weights) * used, np.sum(np.log(weights[used]))
    if weights is None:
        return None, np.zeros((), kind)
    if not is_traced(weights):
        if np.any(weights <= 0):
            row = int(np.argmax(weights <= 0))
            raise DataError(
                f"weights must be positive; weight {row} is {weights[row]:g}. Drop rows of weight "
                "zero"
            )
        return np.sqrt(weights), np.sum(np.log(weights))
    good = jnp.isfinite(weights) & (weights >= 0)
    some = good & (weights > 0)
    weights = jnp.where(some, weights, 1)
    logs = jnp.where(jnp.all(good), jnp.sum(jnp.log(weights)), jnp.nan)
    return jnp.where(some, jnp.sqrt(weights), 0), logs


class Effects(NamedTuple):
    """A `Term` as numbers.

    Attributes:
        codes: (n,) levels, 0, 1, ..., NumPy or traced.
        columns: (n, q), NumPy or traced.
        n_levels: how many.
        name: the grouping factor's.
        effect_names: q names.
        covariance: of the effects.
        kernel: (n_levels, n_levels), as in `Term`, NumPy or traced, or None.
    """

    codes: Any
    columns: Any
    n_levels: int
    name: str
    effect_names: tuple[str, ...]
    covariance: Block
    kernel: Any = None

    @property
    def lengths(self) -> Any:
        """The columns times the standard deviations of their levels in a kernel that is not traced;
        of one that is, `scale` is all that is taken."""
        if self.kernel is None or is_traced(self.kernel):
            return self.columns
        return in_kernel(self.columns, self.codes, self.kernel)

    @property
    def scale(self) -> Any:
        """(), the root mean square of the levels' standard deviations in a traced kernel; else
        None."""
        if not is_traced(self.kernel):
            return None
        mean = jnp.mean(still(linalg.diagonal(self.kernel)))
        return jnp.sqrt(jnp.where(mean > 0, mean, 1.0))


def read_term(term: Term, n: int, kind: np.dtype) -> Effects:
    """A random term as numbers."""
    if term.kernel is None:
        kernel = None
    else:
        kernel = _kernel(term, kind)
        if term.n_levels not in (None, len(kernel)):
            raise DataError(
                f"the kernel of {term.name} is of {len(kernel)} levels and n_levels is "
                f"{term.n_levels}: leave n_levels out"
            )
        term = replace(term, n_levels=len(kernel))
    codes, n_levels = _codes(term, n)
    columns = np.ones((n, 1), kind) if term.effects is None else term.effects
    columns = read(columns, kind, f"the effects of {term.name}")
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] < 1:
        raise DataError(f"the effects of {term.name} must be ({n}, q), not {columns.shape}")
    q = columns.shape[1]
    names = term.effect_names
    if names is None:
        names = ("(Intercept)",) if term.effects is None else tuple(f"x{i + 1}" for i in range(q))
    if len(names) != q:
        raise DataError(f"{term.name} has {q} effects and {len(names)} effect names")
    covariance = term.covariance
    covariance = (
        covariance_of(covariance, {}, {}, q) if isinstance(covariance, str) else covariance(q)
    )
    if n_levels < 2 and isinstance(covariance, Unstructured):
        raise DataError(f"the grouping factor {term.name} has one level; two or more are needed")
    return Effects(codes, columns, n_levels, term.name, tuple(names), covariance, kernel)


def _kernel(term: Term, kind: np.dtype) -> Any:
    """A kernel (L, L)."""
    kernel = read(term.kernel, kind, f"the kernel of {term.name}")
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise DataError(f"the kernel of {term.name} must be square, not {kernel.shape}")
    return kernel


def in_kernel(columns: Any, codes: Any, kernel: np.ndarray) -> Any:
    """Columns (n, q) times the standard deviations of their levels in a kernel."""
    deviations = namespace(codes).asarray(np.sqrt(np.diagonal(kernel)))
    return columns * deviations[codes, None]


def kernel_root(kernel: Any) -> Any:
    """A square root of a kernel, NumPy or traced, which may be singular."""
    if not is_traced(kernel):
        with suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(kernel)
    values, vectors = linalg.eigh(kernel)
    xp = namespace(values)
    return vectors * xp.sqrt(xp.maximum(values, 0.0))


def _codes(term: Term, n: int) -> tuple[Any, int]:
    """The level of each row, and how many levels there are."""
    group = term.group if is_traced(term.group) else _labels(term.group)
    if group.shape != (n,):
        raise DataError(f"grouping factor {term.name} must have shape ({n},), not {group.shape}")
    if term.n_levels is None:
        if is_traced(group):
            raise DataError(
                f"the grouping factor {term.name} is traced by JAX, and the number of its levels "
                "sets shapes: give Term(..., n_levels=) with codes 0, 1, ... below it"
            )
        levels, codes = _levels(group, term.name)
        return codes, int(levels.size)
    if group.dtype.kind not in "iu":
        raise DataError(
            f"with n_levels the grouping factor {term.name} must be integers 0, 1, ... below it, "
            f"not of type {group.dtype}"
        )
    try:
        count = operator.index(term.n_levels)
    except TypeError:
        raise DataError(
            f"n_levels of {term.name} must be an integer that is known before the program runs, "
            f"not {term.n_levels!r}: it sets shapes"
        ) from None
    if count < 1:
        raise DataError(f"n_levels of {term.name} must be at least 1, not {count}")
    if not is_traced(group):
        wrong = (group < 0) | (group >= count)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"the grouping factor {term.name} has the code {group[row]} in row {row}, which is "
                f"none of 0 to {count - 1} (n_levels={count})"
            )
    return group, count


def listed_terms(terms: Any) -> list[Term]:
    """Random terms, at least one, in any form that `Design.from_arrays` takes."""
    if isinstance(terms, Term):
        return [terms]
    if not isinstance(terms, (list, tuple)):
        raise DataError(
            f"terms must be a list of random terms, not {type(terms).__name__}: [labels] for one "
            "random intercept"
        )
    found = []
    for k, term in enumerate(terms):
        if not isinstance(term, Term):
            pair = isinstance(term, tuple) and len(term) == 2
            term = Term(*term, name=f"g{k + 1}") if pair else Term(term, name=f"g{k + 1}")
        found.append(term)
    if not found:
        raise DataError("at least one random term is needed; without one use least squares")
    return found


def read_terms(terms: Sequence[Term], n: int, kind: np.dtype) -> list[Effects]:
    """Random terms as numbers."""
    return [read_term(term, n, kind) for term in terms]


def _labels(group: Any) -> np.ndarray:
    """An array of the labels: of objects, so that None and NaN stay what they are, or numbers."""
    if np.ma.is_masked(group):
        labels = np.array(group.data, object)
        labels[np.ma.getmaskarray(group)] = None
        return labels
    if isinstance(group, (list, tuple)):  # NumPy would make text of ["a", nan] and [1, "a"]
        labels = np.empty(len(group), object)
        labels[:] = group
        return labels
    return np.asarray(group)


def _levels(group: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The levels in order, and which of them each row has."""
    if group.dtype.kind in "fcmM":
        missing = np.isnat(group) if group.dtype.kind in "mM" else np.isnan(group)
    elif group.dtype.kind in "biuSU":
        missing = np.zeros(len(group), bool)
    else:
        group = group.astype(object)
        missing = np.array([_is_missing(label) for label in group], bool)
    if missing.any():
        raise DataError(
            f"the grouping factor {name} contains missing values, the first in row "
            f"{int(np.argmax(missing))}; drop those rows first"
        )
    try:
        levels, codes = np.unique(group, return_inverse=True)
    except TypeError:
        types = sorted({type(label).__name__ for label in group})
        raise DataError(
            f"the grouping factor {name} has labels that cannot be put in order, of type "
            f"{', '.join(types)}; make text of all of them"
        ) from None
    return levels, codes.reshape(len(group))


def _is_missing(label: Any) -> bool:
    """Whether a label is None, or NaN, NaT or NA, which are not equal to themselves."""
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas.NA says that it does not know
        return True


def replaces_residual(codes: np.ndarray, columns: np.ndarray, block: Block) -> bool:
    """Whether a term's covariance can be the residual's, so that they cannot be told apart.

    Of a covariance that is linear in parameters that is so if the identity is in the span of
    d V / d Omega_ab, which are the sums over levels of Z_j E_ab Z_j'. One row per level is, with a
    random intercept and equal weights; not with unequal ones, or with a covariate that varies. By
    least squares, of which the cross-products S_j = Z_j'Z_j are all that is needed.

    Args:
        codes: (n,) levels, 0, 1, ...
        columns: (n, q) effects, times the roots of the weights if there are any.
        block: the covariance.
    """
    n, q = columns.shape
    if not isinstance(block, Unstructured) and block.patterns is None:
        return False
    codes = np.unique(codes, return_inverse=True)[1]
    n_levels = int(codes.max(initial=-1)) + 1
    if n_levels * q < n:
        return False
    inner = np.zeros((n_levels, q, q))
    np.add.at(inner, codes, columns[:, :, None] * columns[:, None])
    return spans_identity(inner, n, block.patterns)


def spans_identity(inner: np.ndarray, n: int, patterns: np.ndarray | None = None) -> bool:
    """`replaces_residual` by the cross-products S_j, (levels, q, q), of n rows; `patterns` (m, d)
    of the covariance, None for any."""
    n_levels, q, _ = inner.shape
    if n_levels * q < n:  # V less the residual's has not the rank
        return False
    lengths = np.sqrt(np.diagonal(inner.sum(axis=0)) / n)
    lengths = np.where(lengths > 0, lengths, 1.0)
    flat = (inner / lengths / lengths[:, None]).reshape(n_levels, q * q)
    products = (flat.T @ flat).reshape(q, q, q, q).transpose(3, 0, 1, 2).reshape(q * q, q * q)
    traces = flat.sum(axis=0)
    if patterns is not None:  # of matrices, in the units of the columns
        whole = patterns[places(q).ravel()] * np.outer(lengths, lengths).ravel()[:, None]
        products, traces = whole.T @ products @ whole, whole.T @ traces
    share = np.linalg.lstsq(products, traces, rcond=CONFOUNDED)[0]
    return bool(n - traces @ share <= CONFOUNDED * n)


def instead_of_residual(name: str, n_levels: int, effects: Sequence[str], n: int) -> str:
    """What to say where a term `replaces_residual`."""
    if len(effects) == 1:
        each = ", one row a level" if n_levels >= n else ""
        return (
            f"the grouping factor {name!r} has {n_levels} levels in {n} rows{each}: the variance "
            f"of {effects[0]!r} and the residual variance cannot be told apart. Leave the term "
            "out, or give known weights that are not all equal"
        )
    return (
        f"the term on {name!r} has {n_levels * len(effects)} random effects ({n_levels} levels "
        f"times {len(effects)}: {', '.join(effects)}) in {n} rows, and their covariance can take "
        "the place of the residual variance: they cannot be told apart. Take effects out"
    )
