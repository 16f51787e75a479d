"""`SharedDesign`: what many responses of one design share, and how a block of them is reduced.

The lanes of a batch are the last axis everywhere. Rows may be left out (missing values of a
response) without changing a shape: they become zeros, so that all patterns of missing values share
one compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Covariance
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.design import (
    Design,
    placeholders,
    replaces_residual,
    require_full_rank,
    structure_basis,
)
from jaxreml.model.structures import Grouped
from jaxreml.model.structures.collapse import Collapse, collapse
from jaxreml.model.structures.dense import Dense, DenseBasis
from jaxreml.model.structures.grouped import GroupedBasis
from jaxreml.model.structures.lanes import GroupedBatch, cross_products
from jaxreml.model.structures.spectral import Spectral, spectral
from jaxreml.model.units import Units, orthonormal

# Share of the sum of squares, per row, that rounding leaves uncertain in what X and Z do not
# explain, so that the criterion would be off by 1e-9.
DOUBTFUL = 1e9 * np.finfo(float).eps
MOST_EFFECTS = 4  # and
MOST_PAIRS = 5 * 10**6  # of `SharedDesign.pairs`; above, responses go through `estimate` singly


class Reduced(NamedTuple):
    """What a block of B responses comes to, the responses on the last axis.

    Attributes:
        scores: (q, J, B) or (r, B), Q'y; those of collapsed levels where there are.
        remainder_xy, remainder_yy: (p, B) and (B,), cross-products of what Q leaves.
        beta_ols: (p, B).
        residual_ss, total_ss: (B,).
        doubtful: (B,) booleans, too much cancelled: to be reduced again with `exact`.
    """

    scores: Array
    remainder_xy: Array
    remainder_yy: Array
    beta_ols: Array
    residual_ss: Array
    total_ss: Array
    doubtful: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedDesign:
    """A design without a response: a pytree of arrays.

    Attributes:
        roots: (n, 1) square roots of the prior weights, or None; 0 in rows left out.
        offset: (n, 1) or None.
        basis_rows: (n, p), orthonormal U of sqrt(w) X = U basis.
        directions: (n, q) or (n, r), Q of Z = Q F: within levels (`Grouped`) or whole (`Dense`).
        codes: (n,) levels of the rows; None for `Dense`.
        rest_rows: (n, p), what Q leaves of U.
        basis: (p, p), upper triangular.
        constant: (p,), coefficients with which X makes 1 in every row, zeros if it does not.
        factors, scores_x, remainder_xx: F, Q'U and rest'rest.
        log_weights, n: ().
        units: as in `Design`.
        collapse, spectral: plans, or None.
        pairs: `cross_products` of the (collapsed) scores of X where batches are a `GroupedBatch`,
            else None.
        sizes, levels: effects and levels per term, static.
        dtype: static.
    """

    roots: Array | None
    offset: Array | None
    basis_rows: Array
    directions: Array
    codes: Array | None
    rest_rows: Array
    basis: Array
    constant: Array
    factors: Array
    scores_x: Array
    remainder_xx: Array
    log_weights: Array
    n: Array
    units: Units
    collapse: Collapse | None
    spectral: Spectral | None
    pairs: Array | None
    sizes: tuple[int, ...] = field(metadata={"static": True})
    levels: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @property
    def covariance(self) -> Covariance:
        """Of the random effects."""
        return unstructured(self.sizes)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return self.basis.shape[0]

    def reduce(self, values: Array, shift: Array | float = 0.0, *, exact: bool) -> Reduced:
        """Reduce responses y = values + shift.

        In one pass over the rows, sums of squares being differences of what X and Z explain from
        the whole; or `exact`, from residuals row by row, in several.

        Args:
            values: (n, B), zero in rows left out.
            shift: (B,), only if `constant` is not zero.
            exact: see above.
        """
        if self.offset is not None:
            values = values - self.offset
        if self.roots is not None:
            values = values * self.roots
        coefficients = self.basis_rows.T @ values
        total = jnp.sum(values * values, axis=0)
        scores = self._scores(values)
        if exact:
            # y - Q Q'y - (U - Q Q'U) U'y, and then once more for what rounding left
            rest = values - self._rows(scores) - self.rest_rows @ coefficients
            rest_xy = self.rest_rows.T @ rest
            scores = scores - self._of_x(coefficients)
            again = rest_xy + self._of_scores(scores)
            coefficients, scores = coefficients + again, scores - self._of_x(again)
            shrunk = self.remainder_xx @ again
            rest_yy = jnp.sum(rest * rest, axis=0)
            rest_yy = rest_yy + jnp.sum(again * (shrunk - 2 * rest_xy), axis=0)
            rest_xy = rest_xy - shrunk
            explained = jnp.sum(scores * scores, axis=tuple(range(scores.ndim - 1)))
            residual_ss = rest_yy + explained
            doubtful = jnp.zeros(total.shape, bool)
        else:
            scores = scores - self._of_x(coefficients)
            rest_xy = -self._of_scores(scores)  # as U'y - U'U U'y = 0
            residual_ss = total - jnp.sum(coefficients * coefficients, axis=0)
            explained = jnp.sum(scores * scores, axis=tuple(range(scores.ndim - 1)))
            rest_yy = residual_ss - explained
            doubtful = ~(rest_yy > DOUBTFUL * self.n * total)
        if self.collapse is not None:
            scores = self.collapse.scores(scores)
        of_shift = self.basis @ self.constant
        total = total + shift * (2 * (of_shift @ coefficients) + shift * jnp.sum(of_shift**2))
        beta = linalg.solve_upper(jnp.asarray(self.basis), coefficients)
        return Reduced(
            scores,
            rest_xy,
            rest_yy,
            beta + self.constant[:, None] * shift,
            residual_ss,
            total,
            doubtful,
        )

    def _scores(self, values: Array) -> Array:
        """Q'values, (q, J, B) or (r, B)."""
        if self.codes is None:
            return self.directions.T @ values
        return jnp.stack(
            [
                jax.ops.segment_sum(direction[:, None] * values, self.codes, self.levels[0])
                for direction in self.directions.T
            ]
        )

    def _rows(self, scores: Array) -> Array:
        """Q scores, (n, B)."""
        if self.codes is None:
            return self.directions @ scores
        pairs = zip(self.directions.T, scores, strict=True)
        return sum(
            (direction[:, None] * score[self.codes] for direction, score in pairs), jnp.zeros(())
        )

    def _of_x(self, coefficients: Array) -> Array:
        """Scores of U coefficients, (p, B) to (q, J, B) or (r, B)."""
        spec = "rp,pB->rB" if self.codes is None else "qpJ,pB->qJB"
        return jnp.einsum(spec, self.scores_x, coefficients)

    def _of_scores(self, scores: Array) -> Array:
        """The transpose of `_of_x`."""
        spec = "rp,rB->pB" if self.codes is None else "qpJ,qJB->pB"
        return jnp.einsum(spec, self.scores_x, scores)

    def batch(self, reduced: Reduced) -> Design:
        """The designs of a block in one, lanes last; what they share has one lane."""
        assert self.pairs is not None
        plan = self.collapse
        counts = jnp.ones(self.levels[0], self.dtype) if plan is None else plan.counts
        structure = GroupedBatch(
            (self.factors if plan is None else plan.factors)[..., None],
            counts[:, None],
            self.scores_x if plan is None else plan.scores_x,
            self.pairs,
            reduced.scores,
            self._remainder(reduced),
            self.sizes,
        )
        return self._design(structure, reduced)

    def each(self, reduced: Reduced) -> Design:
        """The design of one response, for `vmap` over the lanes; levels are not collapsed."""
        remainder = self._remainder(reduced)
        scores = jnp.concatenate([self.scores_x, reduced.scores[:, None]], axis=1)
        if self.codes is None:
            structure: Any = Dense(self.factors, scores, remainder, self.sizes, self.levels)
        else:
            structure = Grouped(self.factors, scores, remainder, self.sizes)
        return self._design(structure, reduced)

    def blank(self) -> Design:
        """The design with a response of length 1 that neither X nor Z explains."""
        none = jnp.zeros((), self.dtype)
        shape = self.scores_x.shape
        scores = jnp.zeros((shape[0], *shape[2:]), self.dtype)  # without the axis of X
        of_x, one = jnp.zeros(self.p, self.dtype), none + 1
        reduced = Reduced(scores, of_x, one, of_x, one, one, one < 0)
        return replace(self, collapse=None).each(reduced)

    def _remainder(self, reduced: Reduced) -> Array:
        lanes = reduced.remainder_yy.shape
        of_x = self.remainder_xx.reshape(self.p, self.p, *[1] * len(lanes))
        of_x = jnp.broadcast_to(of_x, (self.p, self.p, *lanes))
        return linalg.border(of_x, reduced.remainder_xy, reduced.remainder_yy)

    def _design(self, structure: Any, reduced: Reduced) -> Design:
        lanes = [1] * reduced.residual_ss.ndim

        def shared(array: Array) -> Array:
            return jnp.reshape(array, (*array.shape, *lanes))

        return Design(
            structure=structure,
            basis=shared(self.basis),
            beta_ols=reduced.beta_ols,
            residual_ss=reduced.residual_ss,
            total_ss=reduced.total_ss,
            log_weights=shared(self.log_weights),
            log_gram_x=shared(jnp.full_like(self.log_weights, jnp.nan)),  # nothing here asks for it
            units=self.units.with_lanes(len(lanes)),
            n=shared(self.n),
            trouble=shared(np.int32(0)),  # pyright: ignore
            p=self.p,
            names=placeholders(self.sizes),
            covariance=self.covariance,
            dtype=self.dtype,
        )

    def rotated(self, reduced: Reduced, *, reml: bool) -> Design:
        """The designs that have the same criterion without fixed effects; needs `spectral`."""
        assert self.spectral is not None
        whole = self.batch(reduced)
        scores, shift = self.spectral.scores(reduced.scores)
        across = jnp.sum(reduced.remainder_xy * shift, axis=0)
        within = jnp.sum(shift * (self.remainder_xx @ shift), axis=0)
        remainder = reduced.remainder_yy + 2 * across + within
        log_basis = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.basis))))
        levels = self.spectral.factors.shape[-1]
        return replace(
            whole,
            structure=GroupedBatch(
                self.spectral.factors[..., None],
                self.spectral.counts[:, None],
                jnp.zeros((1, 0, levels), self.dtype),
                jnp.zeros((0, 1, levels), self.dtype),
                scores,
                remainder[None, None],
                self.sizes,
            ),
            basis=jnp.zeros((0, 0, 1), self.dtype),
            beta_ols=reduced.beta_ols[:0],
            log_weights=whole.log_weights - 2 * log_basis * reml,
            n=whole.n - self.p if reml else whole.n,
            p=0,
        )


class Prepared(NamedTuple):
    """Rows of a model without a response, orthogonalised on the host.

    Attributes:
        X: (n, p), as given.
        used: (n,) booleans; the other rows are zero below.
        roots: (n,) of the weights, zero in rows not used; None if all are one.
        offset: (n,) or None.
        log_weights: sum over the rows used.
        units: of the effects.
        effects: per term codes (n,), columns (n, q) in these units, and number of levels.
        basis_rows, triangle: weighted X = `basis_rows` (n, p), orthonormal, times (p, p).
    """

    X: np.ndarray
    used: np.ndarray
    roots: np.ndarray | None
    offset: np.ndarray | None
    log_weights: float
    units: Units
    effects: list[tuple[np.ndarray, Any, int]]
    basis_rows: np.ndarray
    triangle: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        return tuple(columns.shape[1] for _, columns, _ in self.effects)

    @property
    def n_used(self) -> int:
        """Rows used."""
        return int(self.used.sum())


def prepare(
    X: np.ndarray,
    terms: list[tuple[np.ndarray, np.ndarray]],
    *,
    weights: np.ndarray | None,
    offset: np.ndarray | None,
    structure: str | None,
    kept: np.ndarray | None = None,
) -> tuple[Prepared, Any]:
    """Prepare a design for blocks of responses, on the host.

    Args:
        X: (n, p) of full rank.
        terms: per random term the codes (n,), 0..J-1 without gaps, and the effects (n, q).
        weights, offset: (n,) or None.
        structure: as in `Design.from_arrays`.
        kept: (n,) booleans, the rows to use; None for all. Levels that no row kept has stay, empty,
            so that all patterns have the same shapes.

    Returns:
        The rows, and the basis of the structure.

    Raises:
        DataError: fewer rows than effects, one level only, or X not of full rank in these rows.
    """
    n = len(X)
    used = np.ones(n, bool) if kept is None else kept
    _check_rows(used, X.shape[1], terms, weights)
    roots = None if kept is None else used.astype(float)
    log_weights = 0.0
    if weights is not None:
        roots = np.sqrt(weights) * used
        log_weights = float(np.sum(np.log(weights[used])))
    weighted = [columns for _, columns in terms]
    if roots is not None:
        weighted = [columns * roots[:, None] for columns in weighted]
    covariance = unstructured(tuple(columns.shape[1] for columns in weighted))
    units = Units.of(weighted, int(used.sum()), covariance)
    effects = [
        (codes, units.rows(k, weighted[k]), int(codes.max()) + 1)
        for k, (codes, _) in enumerate(terms)
    ]
    basis = structure_basis(effects, structure, n)
    rows = X if roots is None else X * roots[:, None]
    basis_rows, triangle = orthonormal(rows)
    require_full_rank(triangle, rows)
    prepared = Prepared(X, used, roots, offset, log_weights, units, effects, basis_rows, triangle)
    return prepared, basis


def share(prepared: Prepared, basis: GroupedBasis | DenseBasis, *, reml: bool) -> SharedDesign:
    """The design of prepared rows; `reml` says which criterion its spectral form is for.

    Equal levels are not collapsed where not all rows are used, so that all patterns have the same
    shapes.
    """
    X, used, roots, offset, log_weights, units, effects, basis_rows, triangle = prepared
    sizes, whole = prepared.sizes, bool(used.all())
    plan = eigen = pairs = None
    grouped = isinstance(basis, GroupedBasis)
    directions: Any = basis.directions
    codes = None
    if grouped:  # it sorts the rows by level
        codes = effects[0][0].astype(np.int32)
        directions = directions[np.argsort(basis.order)]
    of_x: Any = basis.structure(basis_rows, sizes)  # X as its own response
    q, p = sum(sizes), len(triangle)
    size = p * (p + 1) // 2 * (q * (q + 1) // 2) * effects[0][2]
    if grouped and q <= MOST_EFFECTS and size <= MOST_PAIRS:
        factors, scores, counts = basis.factors, of_x.scores, np.ones(basis.n_levels)
        plan = collapse(factors, scores) if whole else None
        if plan is not None:
            factors, scores, counts = plan.factors, plan.scores_x, plan.counts
        if q == 1 and whole:
            eigen = spectral(factors, counts, scores, reml=reml)  # pyright: ignore
        pairs = cross_products(scores)  # pyright: ignore
    rest = basis_rows - _projected(directions, codes, of_x.scores)
    return SharedDesign(
        roots=None if roots is None else roots[:, None],  # pyright: ignore
        offset=None if offset is None else offset[:, None],  # pyright: ignore
        basis_rows=basis_rows,  # pyright: ignore
        directions=directions,
        codes=codes,  # pyright: ignore
        rest_rows=rest,  # pyright: ignore
        basis=triangle,  # pyright: ignore
        constant=_constant(X[used]),  # pyright: ignore
        factors=of_x.factors,
        scores_x=of_x.scores,
        remainder_xx=of_x.remainder,
        log_weights=np.float64(log_weights),  # pyright: ignore
        n=np.float64(prepared.n_used),  # pyright: ignore
        units=units,
        collapse=plan,
        spectral=eigen,
        pairs=pairs,  # pyright: ignore
        sizes=sizes,
        levels=tuple(levels for *_, levels in effects),
        dtype="float64",
    )


def _projected(directions: np.ndarray, codes: np.ndarray | None, scores: np.ndarray) -> np.ndarray:
    """Q scores, (n, p)."""
    if codes is None:
        return directions @ scores
    return np.einsum("nq,qpn->np", directions, scores[:, :, codes])


def _constant(X: np.ndarray) -> np.ndarray:
    coefficients = np.linalg.lstsq(X, np.ones(len(X)))[0]
    exact = np.max(np.abs(X @ coefficients - 1), initial=0.0) < 1e-12
    return coefficients if exact else np.zeros(X.shape[1])


def _check_rows(
    used: np.ndarray,
    p: int,
    terms: list[tuple[np.ndarray, np.ndarray]],
    weights: np.ndarray | None,
) -> None:
    n = int(used.sum())
    for codes, effects in terms:
        present = np.unique(codes[used]).size
        rows = effects[used] if weights is None else effects[used] * np.sqrt(weights[used, None])
        if present < 2 or not rows.any(axis=0).all() or replaces_residual(codes[used], rows):
            raise DataError(f"{present} levels with {effects.shape[1]} effects in {n} rows")
    if p >= n:
        raise DataError(f"{p} fixed effects in {n} rows")
