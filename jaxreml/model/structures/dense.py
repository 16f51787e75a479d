"""Any random terms: one Cholesky factorisation over all random effects.

Z is held as a matrix. Of order r = min(n, Q) for n rows and Q random effects, so it serves several
grouping factors while min(n, Q) is at most a few thousand, and every other structure is tested
against it. The random effects of a term are ordered effect by effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.lazy import jnp, record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.base import (
    Explicit,
    Marginal,
    OfColumns,
    Projection,
    Rows,
    Terms,
)
from jaxreml.model.structures.layout import Layout

Array = Any  # NumPy's or JAX's

ROW_ENTRIES = 10**7  # of rows by random effects at a time


@record
@dataclass(frozen=True)
class Dense(OfColumns, Explicit):
    """Cross-products of any random terms, Q random effects altogether.

    Attributes:
        factors: (r, Q), F of Z = Q F.
        scores: (r, p + 1), Q'[X y].
        remainder: (p + 1, p + 1), cross-products of [X y] minus its projection on Q.
        sizes: effects per term, static.
        levels: levels per term, static; the sum of sizes times levels is Q.
    """

    factors: Array
    scores: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})
    levels: tuple[int, ...] = field(metadata={"static": True})

    @property
    def layout(self) -> Layout:
        return Layout(self.sizes, self.levels)

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        matrices = natural.symmetric_matrices(omega, self.sizes)
        xp = namespace(omega, self.factors)
        inner = xp.eye(self.factors.shape[0], dtype=omega.dtype)
        for factor, matrix in zip(self.layout.split(self.factors, axis=1), matrices, strict=True):
            scaled = xp.einsum("raj,ab->rbj", factor, matrix).reshape(len(inner), -1)
            inner = inner + scaled @ factor.reshape(len(inner), -1).T
        factor = linalg.cholesky(inner)
        return factor, 2 * xp.sum(xp.log(xp.diagonal(factor)))

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        scores = linalg.solve_lower(factor, self.scores)
        return Marginal(logdet, self.remainder + scores.T @ scores)

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        both = namespace(factor).concatenate([self.factors, self.scores], axis=1)
        solved = linalg.solve_lower(factor, both)
        loadings, scores = solved[:, : self.layout.total], solved[:, self.layout.total :]
        gram = self.remainder + scores.T @ scores
        return Projection(logdet, gram, loadings.T @ loadings, loadings.T @ scores)

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        cross = cross @ matrix
        return (cross * weights) @ cross.T

    def trace(self, inner: Array) -> Array:
        return self.layout.trace(inner)

    def pair_trace(self, left: Array, right: Array) -> Array:
        return self.layout.pair_trace(left, right)

    def form(self, cross: Array, matrix: Array) -> Array:
        cross = cross @ matrix
        return self.layout.form(cross, cross)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        moved = self.layout.moved(projection.cross @ matrix)
        flat = moved.reshape(len(moved), -1)
        return (flat.T @ projection.inner @ flat).reshape(*moved.shape[1:], *moved.shape[1:])

    @property
    def columns(self) -> Array:
        return self.scores

    def with_columns(self, columns: Array, remainder: Array) -> Dense:
        return replace(self, scores=columns, remainder=remainder)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        return self.layout.modes(omega, cross[:, 0])

    def posterior(self, projection: Projection, factors: tuple[Array, ...]) -> Array:
        """(Q, Q), Var(b | y)."""
        loadings = self.layout.times(self.factors, factors)
        inner = loadings.T @ loadings + np.eye(loadings.shape[1], dtype=loadings.dtype)
        across = tuple(factor.T for factor in factors)
        identity = np.eye(len(inner), dtype=inner.dtype)
        half = self.layout.times(linalg.solve_lower(linalg.cholesky(inner), identity), across)
        return half.T @ half

    def posterior_by_omega(self, inner: Array, omega: Array) -> Array:
        matrices = tuple(natural.symmetric_matrices(omega, self.sizes))
        explained = self.layout.times(self.layout.times(inner, matrices).T, matrices)
        return self.layout.plus(-np.asarray(explained), matrices)

    def variances(self, posterior: Array) -> tuple[np.ndarray, ...]:
        blocks = self.layout.blocks(np.asarray(posterior))
        return tuple(np.moveaxis(block, 2, 0) for block in blocks)

    def row_variances(self, posterior: Array, rows: Rows) -> np.ndarray:
        whole, sparse = np.asarray(posterior), self.layout.sparse(rows)
        step = max(1, ROW_ENTRIES // len(whole))
        parts = [np.zeros(0)]
        for start in range(0, sparse.shape[0], step):
            some = sparse[start : start + step]
            parts.append(np.asarray(some.multiply(some @ whole).sum(axis=1)).ravel())
        return np.concatenate(parts)


@record
@dataclass(frozen=True)
class DenseBasis:
    """The orthogonal factorisation Z = Q F of all random effects.

    Attributes:
        directions: (n, r), Q. None if effects are traced: they are taken as they are (F = Z,
            Q = I), as a QR factorisation has no derivative where Z loses rank.
        factors: (r, Q), F.
        levels: levels per term, static.
    """

    directions: Any
    factors: Any
    levels: tuple[int, ...] = field(metadata={"static": True})

    @staticmethod
    def of(effects: Terms) -> DenseBasis:
        """Factorise the columns of all terms, scaled."""
        n = effects[0][0].size
        traced = not on_host(*(part for own in effects for part in own[:2]))
        blocks = []
        for codes, columns, n_levels in effects:
            q = columns.shape[1]
            where = (np.arange(n)[:, None], codes[:, None] + n_levels * np.arange(q))
            if traced:
                blocks.append(jnp.zeros((n, n_levels * q), columns.dtype).at[where].set(columns))
            else:
                block = np.zeros((n, n_levels * q), columns.dtype)
                block[where] = columns
                blocks.append(block)
        levels = tuple(n_levels for _, _, n_levels in effects)
        if traced:
            return DenseBasis(None, jnp.concatenate(blocks, axis=1), levels)
        return DenseBasis(*np.linalg.qr(np.concatenate(blocks, axis=1)), levels)

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores Q'columns, (r, k), and what Q leaves, (n, k), NumPy or traced."""
        if self.directions is None:
            columns = jnp.asarray(columns)
            return columns, jnp.zeros_like(columns)
        scores = self.directions.T @ columns
        return scores, columns - self.directions @ scores

    def scores(self, columns: Any) -> Any:
        """Q'columns, (r, k)."""
        return self.directions.T @ columns

    def products(self, columns: Any) -> None:
        """All derivatives are those of `factors`."""

    def structure(
        self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Dense:
        """The structure of columns."""
        return Dense(self.factors, scores, remainder, sizes, self.levels)
