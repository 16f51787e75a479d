"""`Basis`: what X, Z, weights and rows say, before there is a response, and what one says on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxreml.backend.arrays import mapped, namespace
from jaxreml.backend.lazy import jnp, record
from jaxreml.errors import DataError
from jaxreml.model import linalg, traced_kernels
from jaxreml.model.arrays import (
    Effects,
    finite,
    instead_of_residual,
    is_traced,
    replaces_residual,
    root_weights,
)
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.timed import Timed
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Projector, Terms
from jaxreml.model.structures.crossed.planning import CrossedBasis
from jaxreml.model.structures.dense import DenseBasis
from jaxreml.model.structures.grouped import GroupedBasis
from jaxreml.model.structures.kernel import KernelBasis
from jaxreml.model.structures.linear import LinearBasis
from jaxreml.model.structures.series import SeriesBasis
from jaxreml.model.units import Units, orthonormal
from jaxreml.status import Status

MAX_DENSE_BYTES = 2 * 2**30
DEPENDENT = 1e-10  # a column of X of which no more than this share is outside the others' span
PERFECT = 1e-13  # residuals of no more than this share of the response are rounding error
KINDS = {"grouped": GroupedBasis, "crossed": CrossedBasis, "dense": DenseBasis}
OF_KERNELS = {"kernel": KernelBasis, "linear": LinearBasis}
OF_TIMES = ("series", "chain")  # structures of residuals at times of each subject's own


@record
@dataclass(frozen=True)
class Basis:
    """The rows of a model, prepared once for any number of responses.

    A pytree where its random terms are `grouped` or `dense`.

    Attributes:
        roots: (n,), square roots of the prior weights, 0 in rows left out; None if all are 1.
        offset: (n,), or None.
        rows: (n, p), orthonormal U of sqrt(w) X = U triangle.
        triangle: (p, p), as `Design.basis`.
        rest: (n, p), what the random effects leave of U.
        projector: what the random terms say. It, `rows` and `rest` are None where there are
            cross-products only (`Design.from_moments`).
        structure: of U alone.
        units, log_weights, log_gram_x, n: as in `Design`.
        trouble: likewise, without the response.
        names, covariance, dtype: likewise, static.
    """

    roots: Any
    offset: Any
    rows: Any
    triangle: Any
    rest: Any
    projector: Any
    structure: Any
    units: Units
    log_weights: Any
    log_gram_x: Any
    n: Any
    trouble: Any
    names: tuple[tuple[str, tuple[str, ...]], ...] = field(metadata={"static": True})
    covariance: Covariance = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @staticmethod
    def of(
        X: Any,
        terms: Sequence[Effects],
        *,
        weights: Any = None,
        offset: Any = None,
        structure: str | None = None,
        used: np.ndarray | None = None,
        like: Basis | None = None,
    ) -> Basis:
        """Prepare rows, NumPy or traced.

        Args:
            X: (n, p) of full rank, in the rows used if NumPy's.
            terms: at least one.
            weights, offset, structure: as in `Design.from_arrays`.
            used: (n,) booleans, the rows to use; None for all. Levels that no such row has stay,
                empty, so that all patterns have the same shapes. Not for traced arrays.
            like: the basis of all rows, where `used` is given: what follows from levels alone is
                taken from it.

        Raises:
            DataError: as `Design.from_arrays`.
        """
        n, kind = len(X), X.dtype
        terms, strange = _inside(terms)
        terms, *of_kernels = traced_kernels.symmetric(terms)
        (offset, *columns), infinite = finite([offset, *(own.columns for own in terms)])
        if is_traced(X):
            infinite = infinite | ~jnp.isfinite(X).all()
        roots, log_weights = root_weights(weights, used, kind)
        if roots is not None:  # which residuals' covariances are of the residuals divided by
            columns = [
                _weighted(columns, roots, own.covariance)
                for own, columns in zip(terms, columns, strict=True)
            ]
            if is_traced(roots) and not all(own.covariance.of_matrix for own in terms):
                # Neighbours in time do not follow traced weights: no row can be left out.
                log_weights = jnp.where((roots > 0).all(), log_weights, jnp.nan)
        n_used = n if used is None else int(used.sum())
        if is_traced(weights) and roots is not None:  # rows of weight zero are left out
            n_used = (roots > 0).sum(dtype=kind)
        _check_terms(terms, columns, used, n_used)
        covariance = Covariance(tuple(own.covariance for own in terms))
        lengths = [
            own._replace(columns=weighted).lengths
            for own, weighted in zip(terms, columns, strict=True)
        ]
        units = Units.of(lengths, n_used, covariance)
        effects = [
            (own.codes, units.rows(k, columns[k]), own.n_levels) for k, own in enumerate(terms)
        ]
        residual = next((k for k, own in enumerate(terms) if own.covariance.residual), None)
        if any(own.kernel is not None for own in terms):
            scales = [
                own.scale if own.covariance.any_basis or own.covariance.any_scale else None
                for own in terms
            ]
            projector = _of_kernels(effects, terms, scales, structure, n_used, residual is not None)
            units = units.times(scales)
        elif isinstance(law := terms[-1].covariance, Timed):
            projector = _series(effects, law, structure)
        else:
            planned = None if like is None else like.projector
            projector = _projector(effects, structure, n, planned, residual)

        if roots is not None:  # else zeros take their place column by column, without a copy
            X = finite([X])[0][0] * roots[:, None]
        rows, triangle = _orthonormal(X, n_used)
        scores, rest = projector.project(rows)
        products = projector.products(rows)
        remainder = rest.T @ rest
        absent = triangle.diagonal() == 0
        gram = (~absent * np.eye(len(triangle))).astype(kind)  # rows.T @ rows, whatever X is
        if namespace(triangle) is not np:  # ones in the place of absent columns, as in `combined`
            remainder = remainder + jnp.diag(absent.astype(kind))
        sizes = covariance.sizes
        return Basis(
            roots=roots,
            offset=offset,
            rows=rows,
            triangle=triangle,
            rest=rest,
            projector=projector,
            structure=projector.structure(
                scores, remainder, None if products is None else (products, gram), sizes
            ),
            units=units,
            log_weights=log_weights,
            log_gram_x=_log_gram(rows, triangle, roots),
            n=n_used,
            trouble=first_of(
                {
                    Status.BAD_WEIGHTS: namespace(log_weights).isnan(log_weights),
                    Status.BAD_LEVELS: strange,
                    Status.NOT_FINITE: infinite | of_kernels[0],
                    Status.BAD_KERNEL: of_kernels[1],
                    Status.TOO_FEW_ROWS: n_used <= len(triangle) - absent.sum(),
                    Status.RANK_DEFICIENT: absent.any(),
                }
            ),
            names=tuple((own.name, own.effect_names) for own in terms),
            covariance=covariance,
            dtype=kind.name,
        )

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return self.triangle.shape[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        return self.structure.sizes

    @property
    def kind(self) -> str:
        """Name of the structure."""
        kinds = {**KINDS, **OF_KERNELS}
        return next(name for name, of in kinds.items() if isinstance(self.projector, of))

    def response(self, y: Any) -> Response:
        """What a response (n,) says, or many (n, B), NumPy or traced; zero in rows left out."""
        if y.ndim == 1:
            return mapped(lambda leaf: leaf[..., 0], self.response(y[:, None]))
        infinite: Any = np.zeros(y.shape[1], bool)
        if is_traced(y):
            good = jnp.isfinite(y)
            y, infinite = jnp.where(good, y, 0), ~good.all(axis=0)
        y = y if self.offset is None else y - self.offset[:, None]
        constant = (y == y[0]).all(axis=0)
        values = y if self.roots is None else y * self.roots[:, None]
        residual, projection = linalg.residual(self.rows, values)
        scores, rest = self.projector.project(residual)
        products = self.projector.products(residual)
        xp = namespace(residual, rest)
        residual_ss = xp.sum(residual * residual, axis=0)
        total_ss = xp.sum(values * values, axis=0)
        if products is not None:
            nothing = np.zeros((self.p, y.shape[1]), y.dtype)  # rows.T @ residual, whatever y is
            products = _lanes_last(products), nothing, residual_ss
        return Response(
            scores=mapped(_lanes_last, scores),
            remainder_xy=self.rest.T @ rest,
            remainder_yy=xp.sum(rest * rest, axis=0),
            beta_ols=solve(self.triangle, projection),
            residual_ss=residual_ss,
            total_ss=total_ss,
            trouble=first_of(
                {
                    Status.NOT_FINITE: infinite,
                    Status.CONSTANT: constant
                    & ~(residual_ss > perfect_share(residual.dtype) * total_ss),
                }
            ),
            products=products,
        )

    def blank(self) -> Response:
        """One of length 1 that neither X nor Z explains."""
        return Response.blank(self.structure.silent(), self.p, dtype=self.dtype)


def first_of(conditions: dict[Status, Any]) -> Any:
    """The first status whose condition holds, CONVERGED if none does."""
    xp = namespace(*conditions.values())
    codes = [np.int32(status) for status in conditions]
    return xp.select(list(conditions.values()), codes, np.int32(Status.CONVERGED))


def dependent_share(dtype: Any) -> float:
    """Share of a column of X outside the span of the others that is rounding error."""
    return linalg.negligible(DEPENDENT, dtype)


def perfect_share(dtype: Any) -> float:
    """Share of a sum of squares that is rounding error."""
    return linalg.negligible(PERFECT, dtype) ** 2


def _inside(terms: Sequence[Effects]) -> tuple[list[Effects], Any]:
    """Terms with traced codes inside their range, and whether any was not. Codes that are the same
    array stay so."""
    found: dict[int, Any] = {}
    strange: Any = np.zeros((), bool)
    for own in terms:
        if is_traced(own.codes) and id(own.codes) not in found:
            found[id(own.codes)] = jnp.clip(own.codes, 0, own.n_levels - 1)
            strange = strange | (found[id(own.codes)] != own.codes).any()
    return [own._replace(codes=found.get(id(own.codes), own.codes)) for own in terms], strange


def _weighted(columns: Any, roots: Any, block: Block) -> Any:
    """Columns (n, q) of a term in the rows that are multiplied by `roots` of weights: visits, of
    residuals, are where they are if the row is not left out, and times are numbers."""
    if not block.of_matrix:
        return columns
    return columns * ((roots > 0) if block.residual else roots)[:, None]


def _check_terms(
    terms: Sequence[Effects], columns: list[Any], used: np.ndarray | None, n: int
) -> None:
    """Refuse weighted columns (rows, q) that can take the place of independent residuals."""
    if any(own.covariance.residual for own in terms):
        return
    for own, weighted in zip(terms, columns, strict=True):
        if namespace(weighted, own.codes) is not np:
            continue
        if own.kernel is not None:
            continue
        codes = own.codes
        if used is not None:
            codes, weighted = codes[used], weighted[used]
        if replaces_residual(codes, weighted, own.covariance):
            raise DataError(instead_of_residual(own.name, own.n_levels, own.effect_names, n))


def _projector(
    effects: Terms, structure: str | None, n: int, like: Any, residual: int | None
) -> Projector:
    """Choose and prepare the structure, or check the one that was asked for."""
    if structure not in (None, *KINDS):
        raise DataError(f'structure must be "grouped", "crossed" or "dense", not {structure!r}')
    one_factor = all(_same(codes, effects[0][0]) for codes, *_ in effects[1:])
    xp = namespace(*(part for own in effects for part in own[:2]))
    if structure == "grouped" and not one_factor:
        raise DataError(
            'the grouped structure needs every random term on the same factor; use "crossed"'
        )
    if xp is not np and structure == "crossed":
        raise DataError(
            'the crossed structure needs concrete levels, effects and weights: use "dense", whose '
            "derivatives are right where columns tie"
        )
    if structure is None:
        structure = "grouped" if one_factor else "dense" if xp is not np else "crossed"
    if structure == "grouped":
        parts = [columns for _, columns, _ in effects]
        columns = parts[0] if len(parts) == 1 else namespace(*parts).concatenate(parts, axis=1)
        return GroupedBasis.of(effects[0][0], columns, effects[0][2])
    if structure == "crossed":
        return CrossedBasis(effects, like, residual)
    total = sum(columns.shape[1] * n_levels for _, columns, n_levels in effects)
    order = n if xp is not np else min(n, total)
    size = 8 * (3 * n * total + total * total + 4 * order * order)  # Z, Q and LAPACK's copy
    if size > MAX_DENSE_BYTES:
        raise DataError(
            f"{total} random effects and {n} rows would need about {size / 2**30:.1f} GiB in the "
            f"dense structure, whose limit is {MAX_DENSE_BYTES / 2**30:.0f} GiB. The other "
            "structures need less; the crossed one takes concrete effects and weights only"
        )
    return DenseBasis.of(effects)


def _same(codes: Any, others: Any) -> bool:
    """Whether these are known to be the same levels."""
    return codes is others or (
        not (is_traced(codes) or is_traced(others)) and np.array_equal(codes, others)
    )


def _of_kernels(
    effects: Terms,
    terms: Sequence[Effects],
    scales: Sequence[Any],
    structure: str | None,
    n: int,
    residual: bool,
) -> Projector:
    """That of terms some of which have known covariances of their levels; `scales` is what effects
    are to be divided by besides, and `n` rows are used."""
    if structure not in (None, *OF_KERNELS):
        raise DataError(
            f'with kernels structure must be "kernel" (one term with one effect) or "linear" (any),'
            f" not {structure!r}"
        )
    if residual:
        raise DataError(
            "kernels and a covariance of residuals within subjects do not go together, so far: "
            "leave residual= out"
        )
    kernels = [own.kernel for own in terms]
    known = (own for own in kernels if own is not None)
    concrete = namespace(*(part for own in effects for part in own[:2]), *known) is np
    alone = len(terms) == 1 and effects[0][1].shape[1] == 1
    if structure == "kernel" and not (alone and concrete):
        raise DataError(
            'the structure "kernel" is of one term with one effect and no others, and of concrete '
            "levels, effects, weights and kernel, which it decomposes: leave structure out"
        )
    if alone and concrete and structure != "linear":
        codes, columns, _ = effects[0]
        return KernelBasis.of(codes, columns[:, 0], terms[0].kernel, terms[0].name)
    return LinearBasis.of(effects, kernels, scales, [own.name for own in terms], n)


def _series(effects: Terms, law: Timed, structure: str | None) -> SeriesBasis:
    """Of residuals at times of each subject's own, the last term's columns, and of random effects
    of the same subjects."""
    codes, times, _ = effects[-1]
    if structure not in (None, *OF_TIMES):
        raise DataError(
            f"residuals at times of each subject's own have a structure of their own; leave "
            f"structure={structure!r} out"
        )
    if not all(_same(own, codes) for own, *_ in effects[:-1]):
        raise DataError(
            "residuals at more times than a matrix of all of them may have go with random effects "
            "of the same subjects, and not with those of other factors"
        )
    columns = [own for _, own, _ in effects[:-1]] or [np.zeros((len(codes), 0))]
    joined = namespace(*columns).concatenate(columns, axis=1)
    return SeriesBasis.of(codes, joined, times[:, 0], law)


def _orthonormal(rows: Any, n: Any) -> tuple[Any, Any]:
    """U (n, p) and R (p, p) of X = U R."""
    p = rows.shape[1]
    most = len(rows) if is_traced(n) else n
    if p >= most:
        raise DataError(f"X has {p} columns and only {most} rows")
    if namespace(rows) is not np:
        return linalg.independent_columns(rows, dependent_share(rows.dtype))
    basis, triangle = orthonormal(rows)
    lengths = np.linalg.norm(rows, axis=0)
    dependent = np.abs(np.diagonal(triangle)) <= dependent_share(rows.dtype) * lengths
    if np.any(dependent):
        raise DataError(
            f"column {int(np.argmax(dependent))} of X is a linear combination of those before "
            "it; drop it (jaxreml.design and jaxreml.fit do so and name it)"
        )
    return basis, triangle


def _log_gram(basis: Any, triangle: Any, roots: Any) -> Any:
    """log|X'X| of sqrt(w) X = U R, columns left out not counted."""
    xp = namespace(basis)
    pivots = xp.abs(triangle.diagonal())
    absent = pivots == 0
    value = 2 * xp.sum(xp.log(xp.where(absent, 1.0, pivots)))
    if roots is None:
        return value
    plain = basis / xp.where(roots == 0, 1.0, roots)[:, None]
    gram = plain.T @ plain + xp.diag(xp.where(absent, 1.0, 0.0))
    if xp is np:
        return value + np.linalg.slogdet(gram)[1]
    return value + 2 * jnp.sum(jnp.log(linalg.diagonal(linalg.cholesky(gram))))


def solve(triangle: Any, right: Any) -> Any:
    """R^-1 (p, k) for R (p, p) with zeros in absent rows and columns."""
    if namespace(triangle, right) is np:
        return np.linalg.solve(triangle, right)
    absent = triangle.diagonal() == 0
    whole = jnp.asarray(triangle) + jnp.diag(jnp.where(absent, 1.0, 0.0))
    return linalg.solve_upper(whole, jnp.asarray(right))


def _lanes_last(columns: Any) -> Any:
    """(., k, ...) to (., ..., k)."""
    return namespace(columns).moveaxis(columns, 1, -1)
