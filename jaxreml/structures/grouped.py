"""One grouping factor: V0 is block-diagonal over its levels.

Every random term is on the same factor, with q effects altogether. All arrays have the levels on
their last axis, which is the one that vectorises. A level without rows (padding, to stack designs
of unequal numbers of levels for `vmap`) has F = 0 and c = 0 and contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml import covariance
from jaxreml.linalg import cholesky, solve_lower
from jaxreml.structures.base import Marginal, Projection

# A column whose part outside the span of the columns before it, within a level, is shorter than
# this fraction of itself is collinear there: the square of it is below rounding error.
COLLINEAR = 1e-10


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped:
    """Cross-products of one grouping factor with J levels.

    Attributes:
        factors: (q, q, J), F of each level's Z = Q F, upper triangular.
        scores: (q, p + 1, J), Q'[X y].
        remainder: (p + 1, p + 1), cross-products of [X y] minus its projection on Q.
        sizes: effects per term, static; they sum to q.
    """

    factors: Array
    scores: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})

    @property
    def _basis(self) -> Array:
        """The matrices E_i, flattened: (m, q * q)."""
        basis = covariance.symmetric_basis(self.sizes)
        return jnp.asarray(basis.reshape(len(basis), -1), self.factors.dtype)

    def _omega(self, omega: Array) -> Array:
        q = sum(self.sizes)
        return (omega @ self._basis).reshape(q, q)

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        q = sum(self.sizes)
        scaled = jnp.einsum("iaJ,ab->ibJ", self.factors, self._omega(omega))
        inner = jnp.sum(scaled[:, None] * self.factors[None], axis=2)
        factor = cholesky(inner + jnp.eye(q, dtype=inner.dtype)[..., None])
        diagonal = jnp.stack([factor[i, i] for i in range(q)])
        return factor, 2 * jnp.sum(jnp.log(diagonal))

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        scores = solve_lower(factor, self.scores)
        return Marginal(logdet, self.remainder + jnp.einsum("iuJ,ivJ->uv", scores, scores))

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        q = sum(self.sizes)
        solved = solve_lower(factor, jnp.concatenate([self.factors, self.scores], axis=1))
        loadings, scores = solved[:, :q], solved[:, q:]
        gram = self.remainder + jnp.einsum("iuJ,ivJ->uv", scores, scores)
        inner = jnp.sum(loadings[:, :, None] * loadings[:, None], axis=0)
        cross = jnp.sum(loadings[:, :, None] * scores[:, None], axis=0)
        return Projection(logdet, gram, inner, cross)

    def combine(self, cross: Array, matrix: Array) -> Array:
        return jnp.einsum("auJ,uv->avJ", cross, matrix)

    def outer(self, cross: Array) -> Array:
        return jnp.sum(cross[:, None] * cross[None], axis=2)

    def trace(self, inner: Array) -> Array:
        return self._basis @ jnp.sum(inner, axis=-1).ravel()

    def pair_trace(self, left: Array, right: Array) -> Array:
        q = sum(self.sizes)
        products = right.reshape(q * q, -1) @ left.reshape(q * q, -1).T
        products = products.reshape(q, q, q, q).transpose(1, 2, 3, 0)  # d a b c -> a b c d
        return self._basis @ products.reshape(q * q, q * q) @ self._basis.T

    def form(self, cross: Array) -> Array:
        q, k = cross.shape[:2]
        flat = cross.reshape(q * k, -1)
        products = (flat @ flat.T).reshape(q, k, q, k).transpose(0, 2, 1, 3)
        return (self._basis @ products.reshape(q * q, k * k)).reshape(-1, k, k)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        modes = jnp.einsum("ab,bJ->Ja", self._omega(omega), cross[:, 0])
        return tuple(jnp.split(modes, np.cumsum(self.sizes)[:-1], axis=1))


class GroupedBasis:
    """The within-level orthogonal factorisation Z = Q F, on the host.

    Args:
        codes: (n,) integers 0..J-1.
        effects: (n, q), concrete, columns scaled.
        n_levels: J.
    """

    def __init__(self, codes: np.ndarray, effects: np.ndarray, n_levels: int):
        self.order = np.argsort(codes, kind="stable")
        self.codes = codes[self.order]
        self.n_levels = n_levels
        self.starts = np.searchsorted(self.codes, np.arange(n_levels))
        self.empty = np.bincount(codes, minlength=n_levels) == 0
        effects = effects[self.order]
        q = effects.shape[1]
        self.factors = np.zeros((q, q, n_levels), effects.dtype)
        self.directions = np.zeros_like(effects)
        for k in range(q):
            column = effects[:, k].copy()
            length = np.sqrt(self._sum(column * column))
            for _ in range(2):  # orthogonalising twice is enough (Kahan, in Parlett 1980)
                for i in range(k):
                    share = self._sum(self.directions[:, i] * column)
                    column -= self.directions[:, i] * share[self.codes]
                    self.factors[i, k] += share
            rest = np.sqrt(self._sum(column * column))
            rest = np.where(rest <= COLLINEAR * length, 0.0, rest)
            self.factors[k, k] = rest
            inverse = np.divide(1.0, rest, out=np.zeros_like(rest), where=rest > 0)
            self.directions[:, k] = column * inverse[self.codes]

    def _sum(self, values: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat(values, np.minimum(self.starts, len(values) - 1), axis=0)
        sums[self.empty] = 0
        return sums

    def structure(self, columns: Any, sizes: tuple[int, ...]) -> Grouped:
        """Project [X y], (n, p + 1), NumPy or traced."""
        traced = isinstance(columns, Array)
        xp = jnp if traced else np
        rest = columns[self.order]
        scores = []
        for i in range(self.directions.shape[1]):
            direction = self.directions[:, i : i + 1]
            if traced:
                score = jax.ops.segment_sum(
                    direction * rest, self.codes, self.n_levels, indices_are_sorted=True
                )
            else:
                score = self._sum(direction * rest)
            rest = rest - direction * score[self.codes]
            scores.append(score.T)
        return Grouped(
            cast(Array, self.factors), cast(Array, xp.stack(scores)), rest.T @ rest, sizes
        )
