"""`SharedDesign`: what many responses of one design share, and how a block of them is reduced.

The lanes of a batch are the last axis everywhere. Rows may be left out (missing values of a
response) without changing a shape: they become zeros, so that all patterns of missing values share
one compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from jaxreml.designs import Design, require_full_rank, structure_basis
from jaxreml.errors import DataError
from jaxreml.structures import Grouped
from jaxreml.structures.collapse import Collapse, collapse
from jaxreml.structures.dense import Dense
from jaxreml.structures.grouped import GroupedBasis
from jaxreml.structures.spectral import Spectral, spectral


class Reduced(NamedTuple):
    """What a block of B responses comes to, the responses on the last axis.

    Attributes:
        scores: (q, J, B) or (r, B), Q'y.
        remainder_xy, remainder_yy: (p, B) and (B,), cross-products of what Q leaves.
        beta_ols: (p, B).
        residual_ss, total_ss: (B,).
    """

    scores: Array
    remainder_xy: Array
    remainder_yy: Array
    beta_ols: Array
    residual_ss: Array
    total_ss: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedDesign:
    """A design without a response: a pytree of arrays.

    Attributes:
        roots: (n, 1) square roots of the prior weights, or None; 0 in rows left out.
        offset: (n, 1) or None.
        basis_rows: (n, p), orthonormal U of sqrt(w) X = U basis.
        directions: (n, q) or (n, r), Q of Z = Q F: within levels (`Grouped`) or whole (`Dense`).
        codes: (n,) levels of the rows, ascending; None for `Dense`.
        rest_rows: (n, p), what Q leaves of U.
        basis: (p, p), upper triangular.
        factors, scores_x, remainder_xx: F, Q'U and rest'rest.
        log_weights, n: ().
        scales: per term (q_k,).
        collapse, spectral: plans, or None.
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
    factors: Array
    scores_x: Array
    remainder_xx: Array
    log_weights: Array
    n: Array
    scales: tuple[Array, ...]
    collapse: Collapse | None
    spectral: Spectral | None
    sizes: tuple[int, ...] = field(metadata={"static": True})
    levels: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return self.basis.shape[0]

    def reduce(self, values: Array) -> Reduced:
        """Reduce responses (n, B), rows in the order of `codes`; zero in rows left out."""
        if self.offset is not None:
            values = values - self.offset
        if self.roots is not None:
            values = values * self.roots
        # Few passes over the rows: the residual of y on X is y - U a, and what Q leaves of that is
        # y - Q Q'y - (U - Q Q'U) a.
        beta = self.basis_rows.T @ values
        if self.codes is None:
            scores = self.directions.T @ values
            rest = values - self.directions @ scores
        else:
            scores = jnp.stack(
                [
                    jax.ops.segment_sum(
                        direction[:, None] * values,
                        self.codes,
                        self.levels[0],
                        indices_are_sorted=True,
                    )
                    for direction in self.directions.T
                ]
            )
            rest = values - sum(
                direction[:, None] * score[self.codes]
                for direction, score in zip(self.directions.T, scores, strict=True)
            )
        rest = rest - self.rest_rows @ beta
        scores = scores - self._of_x(beta)
        rest_xy = self.rest_rows.T @ rest
        rest_yy = jnp.sum(rest * rest, axis=0)
        # The residual's own coefficients: what rounding left of large ones.
        again = rest_xy + self._of_scores(scores)
        beta, scores = beta + again, scores - self._of_x(again)
        shift = self.remainder_xx @ again
        rest_yy = rest_yy + jnp.sum(again * (shift - 2 * rest_xy), axis=0)
        residual_ss = rest_yy + jnp.sum(scores * scores, axis=tuple(range(scores.ndim - 1)))
        if self.collapse is not None:
            scores = self.collapse.scores(scores)
        return Reduced(
            scores,
            rest_xy - shift,
            rest_yy,
            solve_triangular(self.basis, beta) if self.p else beta,
            residual_ss,
            jnp.sum(values * values, axis=0),
        )

    def _of_x(self, coefficients: Array) -> Array:
        """Scores of U coefficients, (p, B) to (q, J, B) or (r, B)."""
        spec = "rp,pB->rB" if self.codes is None else "qpJ,pB->qJB"
        return jnp.einsum(spec, self.scores_x, coefficients)

    def _of_scores(self, scores: Array) -> Array:
        """The transpose of `_of_x`."""
        spec = "rp,rB->pB" if self.codes is None else "qpJ,qJB->pB"
        return jnp.einsum(spec, self.scores_x, scores)

    def design(self, reduced: Reduced) -> Design:
        """The designs of a block, lanes last; what they share has one lane."""
        lanes = reduced.beta_ols.shape[1:]
        top = jnp.broadcast_to(self.remainder_xx[..., None], (self.p, self.p, *lanes))
        top = jnp.concatenate([top, reduced.remainder_xy[:, None]], axis=1)
        bottom = jnp.concatenate([reduced.remainder_xy, reduced.remainder_yy[None]])
        remainder = jnp.concatenate([top, bottom[None]])
        if self.codes is None:
            scores = _append(self.scores_x, reduced.scores, axis=1)
            structure: Any = Dense(
                self.factors[..., None], scores, remainder, self.sizes, self.levels
            )
        else:
            plan = self.collapse
            counts = jnp.ones(self.levels[0], self.dtype) if plan is None else plan.counts
            structure = Grouped(
                (self.factors if plan is None else plan.factors)[..., None],
                _append(self.scores_x if plan is None else plan.scores_x, reduced.scores, axis=1),
                counts[:, None],
                remainder,
                self.sizes,
            )
        names = tuple((f"g{k}", tuple(f"e{i}" for i in range(q))) for k, q in enumerate(self.sizes))
        return Design(
            structure=structure,
            basis=self.basis[..., None],
            beta_ols=reduced.beta_ols,
            residual_ss=reduced.residual_ss,
            total_ss=reduced.total_ss,
            log_weights=self.log_weights[None],
            scales=tuple(scale[:, None] for scale in self.scales),
            n=self.n[None],
            p=self.p,
            names=names,
            dtype=self.dtype,
        )

    def rotated(self, reduced: Reduced, *, reml: bool) -> Design:
        """The designs that have the same criterion without fixed effects; needs `spectral`."""
        assert self.spectral is not None
        design = self.design(reduced)
        scores, shift = self.spectral.scores(reduced.scores)
        across = jnp.sum(reduced.remainder_xy * shift, axis=0)
        within = jnp.sum(shift * (self.remainder_xx @ shift), axis=0)
        remainder = reduced.remainder_yy + 2 * across + within
        log_basis = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.basis))))
        return Design(
            structure=Grouped(
                self.spectral.factors[..., None],
                scores[:, None],
                self.spectral.counts[:, None],
                remainder[None, None],
                self.sizes,
            ),
            basis=jnp.zeros((0, 0, 1), self.dtype),
            beta_ols=reduced.beta_ols[:0],
            residual_ss=reduced.residual_ss,
            total_ss=reduced.total_ss,
            log_weights=design.log_weights - 2 * log_basis * reml,
            scales=design.scales,
            n=design.n - self.p if reml else design.n,
            p=0,
            names=design.names,
            dtype=self.dtype,
        )


def _append(shared: Array, own: Array, axis: int) -> Array:
    """Scores of X, the same in all lanes, and then those of y, along a new place on `axis`."""
    shared = jnp.broadcast_to(shared[..., None], (*shared.shape, own.shape[-1]))
    return jnp.concatenate([shared, jnp.expand_dims(own, axis)], axis=axis)


def share(
    X: np.ndarray,
    terms: list[tuple[np.ndarray, np.ndarray]],
    *,
    weights: np.ndarray | None,
    offset: np.ndarray | None,
    structure: str | None,
    reml: bool,
    kept: np.ndarray | None = None,
) -> tuple[SharedDesign, np.ndarray]:
    """Prepare a design for blocks of responses, on the host.

    Args:
        X: (n, p) of full rank.
        terms: per random term the codes (n,), 0..J-1 without gaps, and the effects (n, q).
        weights, offset: (n,) or None.
        structure: as in `Design.from_arrays`.
        reml: which criterion the spectral form is for.
        kept: (n,) booleans, the rows to use; None for all. Levels that no row kept has stay, empty;
            equal levels are not collapsed then, so that all patterns have the same shapes.

    Returns:
        The design, and the order (n,) in which `SharedDesign.reduce` takes the rows of a block.

    Raises:
        DataError: fewer rows than effects, one level only, or X not of full rank in these rows.
    """
    n = len(X)
    used = np.ones(n, bool) if kept is None else kept
    n_used = int(used.sum())
    _check_rows(used, X.shape[1], terms)
    roots = None if kept is None else used.astype(float)
    log_weights = 0.0
    if weights is not None:
        roots = np.sqrt(weights) * used
        log_weights = float(np.sum(np.log(weights[used])))
    effects = []
    scales = []
    for codes, columns in terms:
        columns = columns if roots is None else columns * roots[:, None]
        scale = np.sqrt(np.sum(columns * columns, axis=0) / n_used)
        scale = np.where(scale > 0, scale, 1.0)
        effects.append((codes, columns / scale, int(codes.max()) + 1))
        scales.append(scale)
    sizes = tuple(columns.shape[1] for _, columns in terms)
    basis = structure_basis(effects, structure, n)
    rows = X if roots is None else X * roots[:, None]
    basis_rows, triangle = np.linalg.qr(rows)
    require_full_rank(triangle, rows)

    plan = eigen = None
    grouped = isinstance(basis, GroupedBasis)
    if grouped:
        order, codes = basis.order, basis.codes.astype(np.int32)
    else:
        order, codes = np.arange(n), None
    basis_rows = basis_rows[order]
    # X as its own "response" gives its scores and what they leave.
    columns = np.zeros((n, X.shape[1]))
    columns[order] = basis_rows
    of_x: Any = basis.structure(columns, sizes)
    if grouped and kept is None:
        plan = collapse(basis.factors, of_x.scores)
        if sum(sizes) == 1:
            factors, scores = basis.factors, of_x.scores
            counts = np.ones(basis.n_levels)
            if plan is not None:
                factors, scores, counts = plan.factors, plan.scores_x, plan.counts
            eigen = spectral(factors, counts, scores, reml=reml)  # pyright: ignore
    directions: Any = basis.directions
    rest = basis_rows - _projected(directions, codes, of_x.scores)
    shared = SharedDesign(
        roots=None if roots is None else roots[order, None],  # pyright: ignore
        offset=None if offset is None else offset[order, None],  # pyright: ignore
        basis_rows=basis_rows,  # pyright: ignore
        directions=directions,
        codes=codes,  # pyright: ignore
        rest_rows=rest,  # pyright: ignore
        basis=triangle,  # pyright: ignore
        factors=of_x.factors,
        scores_x=of_x.scores,
        remainder_xx=of_x.remainder,
        log_weights=np.float64(log_weights),  # pyright: ignore
        n=np.float64(n_used),  # pyright: ignore
        scales=tuple(scales),  # pyright: ignore
        collapse=plan,
        spectral=eigen,
        sizes=sizes,
        levels=tuple(levels for *_, levels in effects),
        dtype="float64",
    )
    return shared, order


def _projected(directions: np.ndarray, codes: np.ndarray | None, scores: np.ndarray) -> np.ndarray:
    """Q scores, (n, p)."""
    if codes is None:
        return directions @ scores
    return np.einsum("nq,qpn->np", directions, scores[:, :, codes])


def _check_rows(used: np.ndarray, p: int, terms: list[tuple[np.ndarray, np.ndarray]]) -> None:
    n = int(used.sum())
    for codes, effects in terms:
        present = np.unique(codes[used]).size
        if present < 2 or present * effects.shape[1] >= n or not effects[used].any(axis=0).all():
            raise DataError(f"{present} levels with {effects.shape[1]} effects in {n} rows")
    if p >= n:
        raise DataError(f"{p} fixed effects in {n} rows")
