"""One grouping factor: V0 is block-diagonal over its levels.

Every random term is on the same factor, with q effects altogether. All arrays have the levels on
their last axis, which is the one that vectorises. A level without rows (padding, to stack designs
of unequal numbers of levels for `vmap`) has F = 0 and c = 0 and contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import block_diag

from jaxreml import covariance, linalg
from jaxreml.structures.base import Explicit, Marginal, Projection, Rows, blank_response

# A column whose part outside the span of the columns before it, within a level, is shorter than
# this fraction of itself is collinear there: the square of it is below rounding error.
COLLINEAR = 1e-10


class Levels(Explicit):
    """What `Grouped` and `GroupedBatch` have in common; lanes may follow the levels' axis."""

    factors: Array
    sizes: tuple[int, ...]

    @property
    def _basis(self) -> Array:
        """The matrices E_i, flattened: (m, q * q)."""
        basis = covariance.symmetric_basis(self.sizes)
        return jnp.asarray(basis.reshape(len(basis), -1), self.factors.dtype)

    def _omega(self, omega: Array) -> Array:
        """Omega, (q, q, 1), the same for all levels."""
        q = sum(self.sizes)
        flat = jnp.tensordot(self._basis.T, omega, axes=1)
        return flat.reshape(q, q, 1, *omega.shape[1:])

    def _cholesky(self, omega: Array) -> Array:
        """Factors of P = I + F Omega F', (q, q, J)."""
        scaled = linalg.matmul(self.factors, self._omega(omega))
        inner = linalg.matmul(scaled, linalg.transpose(self.factors))
        return linalg.cholesky(inner + linalg.eye_like(inner))

    def trace(self, inner: Array) -> Array:
        total = jnp.sum(inner, axis=2)
        return jnp.tensordot(self._basis, total.reshape(-1, *total.shape[2:]), axes=1)

    def pair_trace(self, left: Array, right: Array) -> Array:
        lower = covariance.triangle(sum(self.sizes))
        products = linalg.row_products(left[lower], right[lower])
        flat = products.reshape(-1, *products.shape[2:])
        traces = jnp.tensordot(jnp.asarray(pairing(self.sizes), flat.dtype), flat, axes=1)
        m = covariance.count_theta(self.sizes)
        return traces.reshape(m, m, *flat.shape[1:])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped(Levels):
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

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        factor = self._cholesky(omega)
        logs = sum(jnp.log(factor[i, i]) for i in range(len(factor)))
        return factor, 2 * jnp.sum(logs)

    def _gram(self, scores: Array) -> Array:
        """The remainder plus the cross-products of scores (q, p + 1, J)."""
        return self.remainder + sum(
            linalg.row_products(scores[i], scores[i]) for i in range(len(scores))
        )

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        return Marginal(logdet, self._gram(linalg.solve_lower(factor, self.scores)))

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        loadings = linalg.solve_lower(factor, self.factors)
        scores = linalg.solve_lower(factor, self.scores)
        across = linalg.transpose(loadings)
        inner, cross = linalg.matmul(across, loadings), linalg.matmul(across, scores)
        return Projection(logdet, self._gram(scores), inner, cross)

    def combine(self, cross: Array, matrix: Array) -> Array:
        return jnp.einsum("auJ,uv->avJ", cross, matrix)

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        cross = self.combine(cross, matrix)
        weighted = cross * weights[:, None]
        return jnp.sum(weighted[:, None] * cross[None], axis=2)

    def form(self, cross: Array, matrix: Array) -> Array:
        cross = self.combine(cross, matrix)
        forms = []
        for a, b in zip(*covariance.effects_of_omega(self.sizes), strict=True):
            product = linalg.row_products(cross[a], cross[b])
            forms.append(product if a == b else product + linalg.transpose(product))
        return jnp.stack(forms)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        chosen = self.combine(projection.cross, matrix)
        basis = jnp.asarray(covariance.symmetric_basis(self.sizes), chosen.dtype)
        moved = jnp.einsum("iab,bkJ->aikJ", basis, chosen)
        flat = moved.reshape(len(moved), -1, moved.shape[-1])
        images = linalg.matmul(projection.inner, flat).reshape(moved.shape)
        return jnp.einsum("aikJ,ajlJ->ikjl", moved, images)

    def padded(self, n_levels: int) -> Grouped:
        """With levels without rows, up to `n_levels`; on the host."""
        pad = [(0, 0), (0, 0), (0, n_levels - self.factors.shape[-1])]
        factors, scores = (np.pad(part, pad) for part in (self.factors, self.scores))
        return replace(self, factors=factors, scores=scores)  # pyright: ignore

    def without_response(self) -> Grouped:
        scores, remainder = blank_response(self.scores, self.remainder)
        return replace(self, scores=scores, remainder=remainder)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        modes = linalg.matmul(self._omega(omega), cross)[:, 0]
        parts = jnp.split(modes, np.cumsum(self.sizes)[:-1])
        return tuple(jnp.swapaxes(part, 0, 1) for part in parts)

    def posterior(self, omega: Array, factors: tuple[Array, ...]) -> Array:
        return linalg.conditional_variance(self.factors, block_diag(*factors))

    def variances(self, posterior: Array) -> tuple[np.ndarray, ...]:
        whole = np.asarray(posterior)
        ends = np.cumsum((0, *self.sizes))
        return tuple(np.moveaxis(whole[a:b, a:b], 2, 0) for a, b in pairwise(ends))

    def row_variances(self, posterior: Array, rows: Rows) -> np.ndarray:
        whole = np.asarray(posterior)
        owners = [(codes, column) for codes, effects in rows for column in np.asarray(effects).T]
        total = np.zeros(len(rows[0][0]))
        for a, (codes, left) in enumerate(owners):
            for b, (others, right) in enumerate(owners):
                total += left * whole[a, b, codes] * right * (codes == others)
        return total


@lru_cache
def pairing(sizes: tuple[int, ...]) -> np.ndarray:
    """tr(E_i L E_j R) for symmetric L and R as a linear map of the products of the entries of
    their lower triangles: (m m, t t), t = q (q + 1) / 2."""
    q = sum(sizes)
    place = covariance.places(q)
    basis = covariance.symmetric_basis(sizes)
    m, t = len(basis), q * (q + 1) // 2
    traces = np.zeros((m, m, t, t))
    for i, j in np.ndindex(m, m):
        for a, b in np.argwhere(basis[i]):
            for c, d in np.argwhere(basis[j]):
                traces[i, j, place[b, c], place[d, a]] += 1
    return traces.reshape(m * m, t * t)


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

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores Q'columns, (q, k, J), and what Q leaves, (n, k) in `order`, NumPy or traced."""
        traced = isinstance(columns, Array)
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
        return (jnp if traced else np).stack(scores), rest

    def structure(self, columns: Any, sizes: tuple[int, ...]) -> Grouped:
        """Project [X y], (n, p + 1), NumPy or traced."""
        scores, rest = self.project(columns)
        return Grouped(cast(Array, self.factors), scores, rest.T @ rest, sizes)
