"""Any random terms: one Cholesky factorisation over all random effects.

Z is held as a matrix. Of order r = min(n, Q) for n rows and Q random effects, so it serves several
grouping factors while min(n, Q) is at most a few thousand, and every other structure is tested
against it. The random effects of a term are ordered level by level.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from jaxreml import covariance
from jaxreml.structures.base import Marginal, Projection, blank_response


@lru_cache
def _basis(q: int) -> np.ndarray:
    return covariance.symmetric_basis((q,)).reshape(-1, q * q)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
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

    def _split(self, array: Array, axis: int = 0) -> list[Array]:
        """Cut the axis of all random effects into one (levels, effects) pair of axes per term."""
        counts = [q * j for q, j in zip(self.sizes, self.levels, strict=True)]
        parts = jnp.split(array, np.cumsum(counts)[:-1], axis=axis)
        return [
            part.reshape(*part.shape[:axis], j, q, *part.shape[axis + 1 :])
            for part, q, j in zip(parts, self.sizes, self.levels, strict=True)
        ]

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        matrices = covariance.symmetric_matrices(omega, self.sizes)
        inner = jnp.eye(self.factors.shape[0], dtype=omega.dtype)
        for factor, matrix in zip(self._split(self.factors, axis=1), matrices, strict=True):
            scaled = jnp.einsum("rja,ab->rjb", factor, matrix)
            inner = inner + jnp.einsum("rjb,sjb->rs", scaled, factor)
        factor = jnp.linalg.cholesky(inner)
        return factor, 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        scores = solve_triangular(factor, self.scores, lower=True)
        return Marginal(logdet, self.remainder + scores.T @ scores)

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        loadings = solve_triangular(factor, self.factors, lower=True)
        scores = solve_triangular(factor, self.scores, lower=True)
        gram = self.remainder + scores.T @ scores
        return Projection(logdet, gram, loadings.T @ loadings, loadings.T @ scores)

    def repeat(self, inner: Array) -> Array:
        return inner

    def combine(self, cross: Array, matrix: Array) -> Array:
        return cross @ matrix

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        cross = cross @ matrix
        return (cross * weights) @ cross.T

    def trace(self, inner: Array) -> Array:
        traces = []
        for k, block in enumerate(self._split(inner)):
            q = self.sizes[k]
            square = self._split(block, axis=2)[k]
            traces.append(_basis(q) @ jnp.einsum("jajb->ab", square).reshape(q * q))
        return jnp.concatenate(traces)

    def pair_trace(self, left: Array, right: Array) -> Array:
        lefts = [self._split(block, axis=2) for block in self._split(left)]
        rights = [self._split(block, axis=2) for block in self._split(right)]
        rows = []
        for k, q in enumerate(self.sizes):
            row = []
            for j, s in enumerate(self.sizes):
                products = jnp.einsum("ibjc,jdia->abcd", lefts[k][j], rights[j][k])
                row.append(_basis(q) @ products.reshape(q * q, s * s) @ _basis(s).T)
            rows.append(jnp.concatenate(row, axis=1))
        return jnp.concatenate(rows)

    def form(self, cross: Array, matrix: Array) -> Array:
        cross = cross @ matrix
        k = cross.shape[1]
        forms = []
        for part, q in zip(self._split(cross), self.sizes, strict=True):
            products = jnp.einsum("jau,jbv->abuv", part, part).reshape(q * q, k * k)
            forms.append((_basis(q) @ products).reshape(-1, k, k))
        return jnp.concatenate(forms)

    def without_response(self) -> Dense:
        scores, remainder = blank_response(self.scores, self.remainder)
        return replace(self, scores=scores, remainder=remainder)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        matrices = covariance.symmetric_matrices(omega, self.sizes)
        parts = self._split(cross[:, 0])
        return tuple(part @ matrix for part, matrix in zip(parts, matrices, strict=True))


class DenseBasis:
    """The orthogonal factorisation Z = Q F of all random effects.

    Args:
        effects: one (codes (n,), columns (n, q), levels) per term. Traced columns are taken as
            they are (F = Z, Q = I): a QR factorisation has no derivative where Z loses rank.
    """

    def __init__(self, effects: list[tuple[np.ndarray, Any, int]]):
        n = effects[0][0].size
        traced = any(isinstance(columns, Array) for _, columns, _ in effects)
        blocks = []
        for codes, columns, n_levels in effects:
            q = columns.shape[1]
            where = (np.arange(n)[:, None], codes[:, None] * q + np.arange(q))
            if traced:
                blocks.append(jnp.zeros((n, n_levels * q), columns.dtype).at[where].set(columns))
            else:
                block = np.zeros((n, n_levels * q), columns.dtype)
                block[where] = columns
                blocks.append(block)
        self.levels = tuple(n_levels for _, _, n_levels in effects)
        if traced:
            self.directions: Any = None
            self.factors: Any = jnp.concatenate(blocks, axis=1)
        else:
            self.directions, self.factors = np.linalg.qr(np.concatenate(blocks, axis=1))

    def structure(self, columns: Any, sizes: tuple[int, ...]) -> Dense:
        """Project [X y], (n, p + 1), NumPy or traced."""
        if self.directions is None:
            remainder = jnp.zeros((columns.shape[1],) * 2, self.factors.dtype)
            return Dense(self.factors, jnp.asarray(columns), remainder, sizes, self.levels)
        scores = self.directions.T @ columns
        rest = columns - self.directions @ scores
        return Dense(self.factors, scores, rest.T @ rest, sizes, self.levels)
