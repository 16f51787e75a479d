"""`Design`: one data set and one model, reduced to the cross-products that its likelihood needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxreml.backend.runtime import require_own_threads
from jaxreml.errors import DataError, PrecisionError
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block, Covariance
from jaxreml.model.covariance.unstructured import Unstructured
from jaxreml.model.structures import Grouped, Structure
from jaxreml.model.structures.crossed.planning import CrossedBasis
from jaxreml.model.structures.dense import DenseBasis
from jaxreml.model.structures.grouped import GroupedBasis
from jaxreml.model.units import Units, orthonormal
from jaxreml.status import Status

ENABLE_X64 = 'jax.config.update("jax_enable_x64", True)'
MAX_DENSE_BYTES = 2 * 2**30
DEPENDENT = 1e-10  # a column of X of which no more than this share is outside the others' span
PERFECT = 1e-13  # residuals of no more than this share of the response are rounding error
ROUNDING = 100  # both are at least as many units of rounding: in single precision
CONFOUNDED = 1e-10  # squared distance of the residual's covariance from a term's, relative


@dataclass(frozen=True)
class Term:
    """One random term, (effects | group).

    Attributes:
        group: (n,) labels of the grouping factor's levels: any array with equality and order.
        effects: (n, q) columns of the random effects; a column of ones, the random intercept,
            if left out. May be traced by JAX.
        name: the grouping factor's name.
        effect_names: q names.
        covariance: of the effects: a `Block` made from their number.
    """

    group: Any
    effects: Any = None
    name: str = "group"
    effect_names: tuple[str, ...] | None = None
    covariance: Callable[[int], Block] = Unstructured


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Design:
    """One data set and one model: a pytree, an argument of every objective and of `estimate`.

    Make one with `Design.from_arrays` or `jaxreml.design`. It holds cross-products, not rows, so
    nothing that takes a design costs more for more rows. Designs of one shape (numbers of columns,
    levels and effects, and names) share one compilation, and can be stacked for `vmap`.

    Attributes:
        structure: the factorised random effects and the projections of X and y on them.
        basis: (p, p) upper triangular, with sqrt(w) X = U basis for orthonormal U. Zero in the rows
            and columns of those columns of a traced X that depend on others before them, which
            are then left out: so are the columns of U.
        beta_ols: (p,), weighted least squares coefficients; y enters everything as its residual
            from them, which changes no likelihood and loses no digits to a large mean.
        residual_ss: (), the weighted sum of squares of that residual.
        total_ss: (), the weighted sum of squares of y less its offset.
        log_weights: (), sum of the logarithms of the prior weights; NaN, as then the criterion is,
            where traced values are not finite or traced weights not positive.
        log_gram_x: (), log|X'X| without prior weights, which Harville's restricted likelihood takes
            off; columns left out do not count.
        units: of the effects inside `structure`.
        n: number of observations.
        trouble: (), the `Status` that no fit of these data can be better than: what is an error
            of concrete arrays and cannot be one of traced arrays. CONVERGED if there is none.
        p: number of fixed effects.
        names: per term the grouping factor's name and the effects' names.
        covariance: of the random effects.
        dtype: name of the floating type everything is in.
    """

    structure: Structure
    basis: Array
    beta_ols: Array
    residual_ss: Array
    total_ss: Array
    log_weights: Array
    log_gram_x: Array
    units: Units
    n: Array | int
    trouble: Array
    p: int = field(metadata={"static": True})
    names: tuple[tuple[str, tuple[str, ...]], ...] = field(metadata={"static": True})
    covariance: Covariance = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per random term."""
        return self.covariance.sizes

    @property
    def absent(self) -> Array:
        """(p,) booleans, which columns of X depend on those before them; none if X is concrete."""
        return linalg.diagonal(self.basis) == 0

    @property
    def rank(self) -> Array:
        """(), that of X."""
        return self.p - jnp.sum(self.absent, axis=0, dtype=self.dtype)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the entries of an objective's `parameters`, in order, the residual last.

        ``log_variance[g, x]`` is the log-variance of effect x of factor g; ``z[g, x1, x2]`` the
        inverse hyperbolic tangent of the (partial) correlation of x1 and x2.
        """
        return self.covariance.parameter_names(self.names)

    def scaled_factors(self, theta: Array) -> tuple[Array, ...]:
        """Relative Cholesky factors of scaled effects, (q_k, q_k), of those in the user's units."""
        own = natural.split_triangles(theta, self.sizes)
        return tuple(self.units.inner_factor(k, factor) for k, factor in enumerate(own))

    @staticmethod
    def from_arrays(
        y: Any,
        X: Any,
        terms: Term | Sequence[Term | tuple[Any, Any] | Any],
        *,
        weights: Any = None,
        offset: Any = None,
        structure: str | None = None,
        dtype: Any = None,
    ) -> Design:
        """Reduce arrays to a design.

        Any of y, X, the effects of a term, weights and offset may be traced by JAX (an output of
        a network under `jit` or `grad`, say); grouping factors may not. Traced values cannot be
        refused: `Estimate.status` says what is the matter with them, and objectives are NaN where
        values are not finite or weights not positive. Columns of a traced X that depend on those
        before them are left out (`reml_objective` says what the derivatives are), and REML as a
        loss for X has no minimum: see there.

        Args:
            y: (n,) response.
            X: (n, p) fixed-effects columns of full rank, the intercept included; p may be 0.
            terms: a list of random terms: `Term`, or a pair (group labels, (n, q) effects), or
                group labels alone for a random intercept. A single `Term` needs no list.
            weights: (n,) positive prior weights as in lme4: observation i has residual variance
                sigma2 / weights[i].
            offset: (n,) known part of the mean.
            structure: "grouped" (all terms on one factor), "crossed" (any factors) or "dense" (any,
                one large matrix); chosen if left out. Traced effects or weights of several factors
                need "dense", which is then chosen.
            dtype: "float32" to ask for single precision, which costs likelihoods most of their
                digits; float64 otherwise.

        Raises:
            DataError: shapes that differ, no random term, values that are not finite, weights
                that are not positive, X that is not of full rank, a term that can take the place of
                the residual (one row per level), a grouping factor with one level, missing labels
                or labels that have no order.
            PrecisionError: float32 arrays that were not asked for.
        """
        kind = _floating_type([y, X, weights, offset], dtype)
        y, X = _array(y, kind, "y"), _array(X, kind, "X")
        n = y.shape[0] if y.ndim == 1 else -1
        if n < 1:
            raise DataError(f"y must be a vector with at least one value, not of shape {y.shape}")
        if X.ndim != 2 or X.shape[0] != n:
            raise DataError(f"X must have shape ({n}, p) to match y, not {X.shape}")
        weights = None if weights is None else _row_vector(weights, kind, n, "weights")
        offset = None if offset is None else _row_vector(offset, kind, n, "offset")
        parsed = [_as_term(term, k, n, kind) for k, term in enumerate(_listed(terms))]
        if not parsed:
            raise DataError("at least one random term is needed; without one use least squares")
        root_weights, log_weights = _root_weights(weights, kind)
        bad_weights = _module(log_weights).isnan(log_weights)
        # Traced values that are not finite become zero: sums of NaN would make derivatives NaN
        # where these are masked. `trouble` tells, and the criterion through `log_weights`.
        given = [y, X, offset, *(columns for _, columns, *_ in parsed)]
        traced = [array for array in given if _is_traced(array)]
        infinite = np.zeros((), bool)
        for array in traced:
            infinite = infinite | ~jnp.all(jnp.isfinite(array))
        if traced:
            log_weights = jnp.where(infinite, jnp.nan, log_weights)
        y, X, offset, *weighted = (_finite(array) for array in given)
        if root_weights is not None:
            weighted = [columns * root_weights[:, None] for columns in weighted]
        for (codes, _, n_levels, name, own, _), columns in zip(parsed, weighted, strict=True):
            if _module(columns) is np and replaces_residual(codes, columns):
                raise DataError(instead_of_residual(name, n_levels, own, n))
        covariance = Covariance(tuple(block for *_, block in parsed))
        units = Units.of(weighted, n, covariance)
        effects = [
            (codes, units.rows(k, weighted[k]), n_levels)
            for k, (codes, _, n_levels, *_) in enumerate(parsed)
        ]
        names = tuple((name, effect_names) for *_, name, effect_names, _ in parsed)
        basis = structure_basis(effects, structure, n)

        response = y if offset is None else y - offset
        rows = X if root_weights is None else X * root_weights[:, None]
        constant = (response == response[0]).all()
        response = response if root_weights is None else response * root_weights
        triangle, columns, beta_ols = _orthogonalise(rows, response)
        reduced = basis.structure(columns, covariance.sizes)
        absent = triangle.diagonal() == 0
        if _module(triangle) is jnp:  # ones in the place of absent columns, as in `Combined`
            ones = jnp.diag(jnp.pad(absent.astype(kind), (0, 1)))
            reduced = replace(reduced, remainder=reduced.remainder + ones)
        residual_ss = columns[:, -1] @ columns[:, -1]
        total_ss = response @ response
        trouble = _first_of(
            {
                Status.BAD_WEIGHTS: bad_weights,
                Status.NOT_FINITE: infinite,
                Status.RANK_DEFICIENT: absent.any(),
                Status.CONSTANT: constant & ~(residual_ss > perfect_share(kind) * total_ss),
            }
        )
        return Design(
            structure=reduced,
            basis=triangle,
            beta_ols=beta_ols,
            residual_ss=residual_ss,
            total_ss=total_ss,
            log_weights=log_weights,
            log_gram_x=_log_gram(columns[:, :-1], triangle, root_weights),
            units=units,
            n=n,
            trouble=trouble,
            p=X.shape[1],
            names=names,
            covariance=covariance,
            dtype=kind.name,
        )

    def without_names(self) -> Design:
        """The same design under placeholder names, so that designs that differ only in names share
        one compilation."""
        return replace(self, names=placeholders(self.sizes))


def placeholders(sizes: tuple[int, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Design.names` of terms with so many effects each."""
    return tuple((f"g{k}", tuple(f"e{i}" for i in range(q))) for k, q in enumerate(sizes))


def dependent_share(dtype: Any) -> float:
    """Share of a column of X outside the span of the others that is rounding error."""
    return max(DEPENDENT, ROUNDING * float(np.finfo(dtype).eps))


def perfect_share(dtype: Any) -> float:
    """Share of a sum of squares that is rounding error."""
    return max(PERFECT, ROUNDING * float(np.finfo(dtype).eps)) ** 2


def require_precision(design: Design) -> None:
    """Refuse, at trace time, to run a float64 design in float32, or where JAX cannot run."""
    require_own_threads()
    if design.dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise PrecisionError(
            "likelihoods need float64 and JAX is set to float32. Run\n"
            f"    {ENABLE_X64}\n"
            "before making arrays, or work inside `with jax.enable_x64(True):`. To use float32 all "
            'the same, make the design with dtype="float32".'
        )


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)


def _module(value: Any) -> Any:
    return jnp if isinstance(value, Array) else np


def _floating_type(values: list[Any], asked: Any) -> np.dtype:
    if asked is not None:
        kind = np.dtype(asked)
        if kind.name not in ("float32", "float64"):
            raise PrecisionError(f"dtype must be float32 or float64, not {kind.name}")
        return kind
    single = any(getattr(value, "dtype", None) in (np.float32, np.float16) for value in values)
    if single and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise PrecisionError(
            "the arrays are float32 and JAX has float64 switched off, which likelihoods need. Run\n"
            f"    {ENABLE_X64}\n"
            'before making arrays, or ask for single precision with dtype="float32".'
        )
    return np.dtype("float64")


def _array(value: Any, kind: np.dtype, name: str) -> Any:
    """A NumPy array of finite values, or a traced array of the given type."""
    if _is_traced(value):
        return value.astype(kind)
    if np.ma.is_masked(value):
        raise DataError(f"{name} contains masked values; drop those rows first")
    try:
        array = np.asarray(value).astype(kind)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not numeric: {error}") from None
    if not np.all(np.isfinite(array)):
        raise DataError(f"{name} contains NaN or infinite values; drop those rows first")
    return array


def _finite(value: Any) -> Any:
    """Traced values with zeros in the place of those that are not finite; others as they are."""
    return jnp.where(jnp.isfinite(value), value, 0) if _is_traced(value) else value


def _first_of(conditions: dict[Status, Any]) -> Any:
    """The first status whose condition holds, CONVERGED if none does."""
    xp = jnp if any(isinstance(condition, Array) for condition in conditions.values()) else np
    codes = [np.int32(status) for status in conditions]
    return xp.select(list(conditions.values()), codes, np.int32(Status.CONVERGED))


def _row_vector(value: Any, kind: np.dtype, n: int, name: str) -> Any:
    array = _array(value, kind, name)
    if array.shape != (n,):
        raise DataError(f"{name} must have shape ({n},) to match y, not {array.shape}")
    return array


def _root_weights(weights: Any, kind: np.dtype) -> tuple[Any, Any]:
    """Their square roots and the sum of their logarithms, NaN if traced ones are not positive."""
    if weights is None:
        return None, np.zeros((), kind)
    if not _is_traced(weights):
        if np.any(weights <= 0):
            row = int(np.argmax(weights <= 0))
            raise DataError(
                f"weights must be positive; weight {row} is {weights[row]:g}. Drop rows of weight "
                "zero"
            )
        return np.sqrt(weights), np.sum(np.log(weights))
    good = jnp.isfinite(weights) & (weights > 0)
    weights = jnp.where(good, weights, 1)
    return jnp.sqrt(weights), jnp.where(jnp.all(good), jnp.sum(jnp.log(weights)), jnp.nan)


def _as_term(term: Any, k: int, n: int, kind: np.dtype) -> tuple[Any, ...]:
    """Codes, columns, number of levels, name, effect names and covariance of one random term."""
    if not isinstance(term, Term):
        pair = isinstance(term, tuple) and len(term) == 2
        term = Term(*term, name=f"g{k + 1}") if pair else Term(term, name=f"g{k + 1}")
    if _is_traced(term.group):
        raise DataError(f"the grouping factor {term.name} must be concrete: its levels set shapes")
    group = _labels(term.group)
    if group.shape != (n,):
        raise DataError(f"grouping factor {term.name} must have shape ({n},), not {group.shape}")
    levels, codes = _levels(group, term.name)
    columns = np.ones((n, 1), kind) if term.effects is None else term.effects
    columns = _array(columns, kind, f"the effects of {term.name}")
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] < 1:
        raise DataError(f"the effects of {term.name} must be ({n}, q), not {columns.shape}")
    q = columns.shape[1]
    names = term.effect_names
    if names is None:
        names = ("(Intercept)",) if term.effects is None else tuple(f"x{i + 1}" for i in range(q))
    if len(names) != q:
        raise DataError(f"{term.name} has {q} effects and {len(names)} effect names")
    if levels.size < 2:
        raise DataError(f"the grouping factor {term.name} has one level; two or more are needed")
    return codes, columns, int(levels.size), term.name, tuple(names), term.covariance(q)


def _listed(terms: Any) -> list[Any]:
    if isinstance(terms, Term):
        return [terms]
    if not isinstance(terms, (list, tuple)):
        raise DataError(
            f"terms must be a list of random terms, not {type(terms).__name__}: [labels] for one "
            "random intercept"
        )
    return list(terms)


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


def replaces_residual(codes: np.ndarray, columns: np.ndarray) -> bool:
    """Whether a term's covariance can be the residual's, so that they cannot be told apart.

    That is so if the identity is in the span of d V / d Omega_ab, which are the sums over levels of
    Z_j E_ab Z_j'. One row per level is, with a random intercept and equal weights; not with unequal
    ones, or with a covariate that varies. By least squares, of which the cross-products
    S_j = Z_j'Z_j are all that is needed.

    Args:
        codes: (n,) levels, 0, 1, ...
        columns: (n, q) effects, times the roots of the weights if there are any.
    """
    n, q = columns.shape
    codes = np.unique(codes, return_inverse=True)[1]
    n_levels = int(codes.max(initial=-1)) + 1
    if n_levels * q < n:  # V less the residual's has not the rank
        return False
    lengths = np.sqrt(np.mean(columns**2, axis=0))
    scaled = columns / np.where(lengths > 0, lengths, 1.0)
    inner = np.zeros((n_levels, q, q))
    np.add.at(inner, codes, scaled[:, :, None] * scaled[:, None])
    flat = inner.reshape(n_levels, q * q)
    products = (flat.T @ flat).reshape(q, q, q, q).transpose(3, 0, 1, 2).reshape(q * q, q * q)
    traces = flat.sum(axis=0)
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


def structure_basis(
    effects: list[tuple[np.ndarray, Any, int]], structure: str | None, n: int
) -> GroupedBasis | CrossedBasis | DenseBasis:
    """Choose and prepare the structure, or check the one that was asked for."""
    if structure not in (None, "grouped", "crossed", "dense"):
        raise DataError(f'structure must be "grouped", "crossed" or "dense", not {structure!r}')
    one_factor = all(np.array_equal(codes, effects[0][0]) for codes, *_ in effects[1:])
    traced = any(isinstance(columns, Array) for _, columns, _ in effects)
    if structure == "grouped" and not one_factor:
        raise DataError(
            'the grouped structure needs every random term on the same factor; use "crossed"'
        )
    if traced and structure == "crossed":
        raise DataError(
            'the crossed structure needs concrete effects and weights: use "dense", whose '
            "derivatives are right where columns tie"
        )
    if structure is None:
        structure = "grouped" if one_factor else "dense" if traced else "crossed"
    if structure == "grouped":
        xp = jnp if traced else np
        columns = xp.concatenate([columns for _, columns, _ in effects], axis=1)
        return GroupedBasis(effects[0][0], columns, effects[0][2])
    if structure == "crossed":
        return CrossedBasis(effects)
    total = sum(columns.shape[1] * n_levels for _, columns, n_levels in effects)
    order = n if traced else min(n, total)
    size = 8 * (3 * n * total + total * total + 4 * order * order)  # Z, Q and LAPACK's copy
    if size > MAX_DENSE_BYTES:
        raise DataError(
            f"{total} random effects and {n} rows would need about {size / 2**30:.1f} GiB in the "
            f"dense structure, whose limit is {MAX_DENSE_BYTES / 2**30:.0f} GiB. The other "
            "structures need less; the crossed one takes concrete effects and weights only"
        )
    return DenseBasis(effects)


def _orthogonalise(rows: Any, response: Any) -> tuple[Any, Any, Any]:
    """R of X = U R, [U, residual of y] and the least squares coefficients."""
    n, p = rows.shape
    if p >= n:
        raise DataError(f"X has {p} columns and only {n} rows")
    if _module(rows) is np:
        basis, triangle = orthonormal(rows)
        require_full_rank(triangle, rows)
    else:
        basis, triangle = linalg.independent_columns(rows, dependent_share(rows.dtype))
    yp = jnp if isinstance(response, Array) or _module(rows) is jnp else np
    projection = basis.T @ response
    residual = response - basis @ projection
    again: Any = basis.T @ residual  # a second pass takes out what rounding left of a large mean
    residual = residual - basis @ again
    coefficients = projection + again
    if yp is np:
        beta = np.linalg.solve(triangle, coefficients)
    else:
        whole = jnp.asarray(triangle) + jnp.diag(jnp.where(triangle.diagonal() == 0, 1.0, 0.0))
        beta = linalg.solve_upper(whole, jnp.asarray(coefficients)[:, None])[:, 0]
    return triangle, yp.concatenate([basis, residual[:, None]], axis=1), beta


def _log_gram(basis: Any, triangle: Any, root_weights: Any) -> Any:
    """log|X'X| of sqrt(w) X = U R, columns left out not counted."""
    xp = _module(basis)
    pivots = xp.abs(triangle.diagonal())
    absent = pivots == 0
    value = 2 * xp.sum(xp.log(xp.where(absent, 1.0, pivots)))
    if root_weights is None:
        return value
    plain = basis / root_weights[:, None]
    gram = plain.T @ plain + xp.diag(xp.where(absent, 1.0, 0.0))
    if xp is np:
        return value + np.linalg.slogdet(gram)[1]
    return value + 2 * jnp.sum(jnp.log(linalg.diagonal(linalg.cholesky(gram))))


def require_full_rank(triangle: np.ndarray, rows: np.ndarray) -> None:
    """Raise DataError naming the first column of X that depends on those before it."""
    lengths = np.linalg.norm(rows, axis=0)
    dependent = np.abs(np.diagonal(triangle)) <= dependent_share(rows.dtype) * lengths
    if np.any(dependent):
        raise DataError(
            f"column {int(np.argmax(dependent))} of X is a linear combination of those before "
            "it; drop it (jaxreml.design and jaxreml.fit do so and name it)"
        )


def with_spare_levels(design: Design) -> Design:
    """A grouped design with some levels more, without rows, which change nothing; others as is.

    Designs of nearly equal numbers of levels become of one shape, and share what is compiled.
    Numbers of levels become multiples of 4 up to 64, and one of eight per doubling above.
    """
    if not isinstance(design.structure, Grouped):
        return design
    n_levels = design.structure.factors.shape[-1]
    step = max(4, 1 << max(n_levels.bit_length() - 4, 0))
    return _with_levels(design, -(-n_levels // step) * step)


def _with_levels(design: Design, n_levels: int) -> Design:
    structure: Any = design.structure
    return replace(design, structure=structure.padded(n_levels))


def stack(designs: Iterable[Design]) -> Design:
    """Stack designs for `vmap`: ``jax.vmap(estimate)(stack(designs))``.

    They may differ in everything but shape: responses, X, effects, weights. Grouped designs may
    also differ in their numbers of rows, which none of their arrays has, and of levels: those of
    fewer get levels without rows, which change nothing. Without `stack`, a function of arrays that
    ends in ``estimate(Design.from_arrays(...))`` can itself be mapped with `vmap`, over effects and
    weights too, which of several factors need the "dense" structure.

    Args:
        designs: equal numbers of fixed effects, terms and effects; ungrouped ones of rows too. An
            iterator of them will do. Where their names differ the stack has placeholders.

    Raises:
        DataError: designs that differ in more than the number of levels and in names; none.
    """
    designs = list(designs)
    if not designs:
        raise DataError("there are no designs to stack")
    if not all(isinstance(design, Design) for design in designs):
        wrong = next(design for design in designs if not isinstance(design, Design))
        raise DataError(f"stack takes designs, not {type(wrong).__name__}: see jaxreml.design")
    for what, values in (
        ("numbers of fixed effects", [design.p for design in designs]),
        ("numbers of effects per term", [design.sizes for design in designs]),
        ("covariances", [design.covariance for design in designs]),
        ("structures", [type(design.structure).__name__.lower() for design in designs]),
        ("precisions", [design.dtype for design in designs]),
    ):
        if len(set(values)) > 1:
            other = next(value for value in values if value != values[0])
            raise DataError(
                f"designs with different {what} cannot be stacked: {values[0]} and {other}"
            )
    if len({design.names for design in designs}) > 1:
        designs = [design.without_names() for design in designs]
    if all(isinstance(design.structure, Grouped) for design in designs):
        most = max(design.structure.factors.shape[-1] for design in designs)  # type: ignore[attr-defined]
        designs = [_with_levels(design, most) for design in designs]
    if len({design.units.rotated for design in designs}) > 1:
        covariance = designs[0].covariance
        designs = [replace(design, units=design.units.general(covariance)) for design in designs]
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *designs)
    except ValueError as error:
        raise DataError(f"designs of different shapes cannot be stacked: {error}") from None
