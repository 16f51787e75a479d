"""All random effects of several terms in one vector: term by term, effect by effect."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import add
from typing import Any

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model.covariance import natural


def _basis(q: int, kind: Any) -> np.ndarray:
    return natural.symmetric_basis((q,)).reshape(-1, q * q).astype(kind)


Array = Any  # NumPy's or JAX's


def _combined(columns: list[list[tuple[np.ndarray, float]]], found: np.ndarray) -> np.ndarray:
    """Linear combinations (., J) side by side, each written where it stays."""
    start = 0
    for column in columns:
        place = found[:, start : start + column[0][0].shape[1]]
        start += place.shape[1]
        used = [pair for pair in column if pair[1] != 0] or column[:1]
        np.multiply(*used[0], out=place)
        for part, factor in used[1:]:
            place += part * factor
    return found


@dataclass(frozen=True)
class Layout:
    """Effects per term and levels per term; Q effects altogether."""

    sizes: tuple[int, ...]
    levels: tuple[int, ...]

    @property
    def total(self) -> int:
        """Q."""
        return sum(q * j for q, j in zip(self.sizes, self.levels, strict=True))

    def split(self, array: Array, axis: int = 0) -> list[Array]:
        """Cut the axis of all random effects into one (effects, levels) pair of axes per term."""
        counts = [q * j for q, j in zip(self.sizes, self.levels, strict=True)]
        ends = list(accumulate(counts, initial=0))
        before = (slice(None),) * axis
        parts = [array[(*before, slice(*places))] for places in pairwise(ends)]
        return [
            part.reshape(*part.shape[:axis], q, j, *part.shape[axis + 1 :])
            for part, q, j in zip(parts, self.sizes, self.levels, strict=True)
        ]

    def times(self, array: Array, matrices: tuple[Array, ...]) -> Array:
        """array @ M for (., Q) and M block-diagonal, one (q, q) matrix per term for its levels."""
        parts = self.split(array, axis=1)
        columns = [
            [(part[:, a], matrix[a, b]) for a in range(q)]
            for part, matrix, q in zip(parts, matrices, self.sizes, strict=True)
            for b in range(q)
        ]
        if on_host(array, *matrices):
            return _combined(columns, np.empty(array.shape, array.dtype))
        xp = namespace(array, *matrices)
        sums = [reduce(add, [part * factor for part, factor in column]) for column in columns]
        return xp.concatenate(sums, axis=1)

    def plus(self, array: np.ndarray, matrices: tuple[np.ndarray, ...]) -> np.ndarray:
        """array + M for NumPy's (Q, Q), M as in `times`."""
        found = array.copy()
        start = 0
        for matrix, q, n_levels in zip(matrices, self.sizes, self.levels, strict=True):
            stop = start + q * n_levels
            block = found[start:stop, start:stop].reshape(q, n_levels, q, n_levels)
            np.einsum("ajbj->abj", block)[:] += matrix[:, :, None]
            start = stop
        return found

    def diagonal_blocks(self, left: Array, right: Array) -> list[Array]:
        """Diagonal blocks of left @ right for (Q, k) and (k, Q): per term (q, q, levels)."""
        return [
            namespace(part, other).einsum("ajk,bjk->abj", part, other)
            for part, other in zip(self.split(left), self.split(right.T), strict=True)
        ]

    def blocks(self, matrix: Array) -> list[Array]:
        """Diagonal blocks of (Q, Q), per term (q, q, levels)."""
        found = []
        for k, rows in enumerate(self.split(matrix)):
            found.append(namespace(rows).einsum("ajbj->abj", self.split(rows, axis=2)[k]))
        return found

    def trace(self, matrix: Array) -> Array:
        """tr(M E_i) for (Q, Q) M, shape (m,)."""
        return self.trace_blocks(self.blocks(matrix))

    def trace_blocks(self, blocks: list[Array]) -> Array:
        """The same from the diagonal blocks, per term (q, q, levels)."""
        traces = [
            _basis(q, block.dtype) @ block.sum(axis=2).reshape(q * q)
            for block, q in zip(blocks, self.sizes, strict=True)
        ]
        return namespace(*traces).concatenate(traces)

    def pair_trace(self, left: Array, right: Array) -> Array:
        """tr(E_i left E_j right) for (Q, Q) matrices, shape (m, m)."""
        xp = namespace(left, right)
        lefts = [self.split(block, axis=2) for block in self.split(left)]
        rights = [self.split(block, axis=2) for block in self.split(right)]
        rows = []
        for k, q in enumerate(self.sizes):
            row = []
            for j, s in enumerate(self.sizes):
                products = xp.einsum("bicj,djai->abcd", lefts[k][j], rights[j][k])
                row.append(
                    _basis(q, left.dtype) @ products.reshape(q * q, s * s) @ _basis(s, left.dtype).T
                )
            rows.append(xp.concatenate(row, axis=1))
        return xp.concatenate(rows)

    def form(self, left: Array, right: Array) -> Array:
        """left' E_i right for (Q, k) and (Q, l), shape (m, k, l)."""
        forms = []
        parts = zip(self.split(left), self.split(right), self.sizes, strict=True)
        for part, other, q in parts:
            columns = part.shape[-1], other.shape[-1]
            products = namespace(part, other).einsum("aju,bjv->abuv", part, other)
            products = products.reshape(q * q, -1)
            forms.append((_basis(q, part.dtype) @ products).reshape(-1, *columns))
        return namespace(*forms).concatenate(forms)

    def moved(self, vectors: Array) -> Array:
        """E_i v for the columns v of (Q, k), (Q, m, k)."""
        m = natural.count_theta(self.sizes)
        columns = []
        start = 0
        for part, q in zip(self.split(vectors), self.sizes, strict=True):
            basis = _basis(q, part.dtype).reshape(-1, q, q)
            xp = namespace(part)
            own = xp.einsum("iab,bjk->ajik", basis, part)
            own = own.reshape(-1, *own.shape[2:])
            after = m - start - len(basis)
            none = [xp.zeros((len(own), k, own.shape[2]), own.dtype) for k in (start, after)]
            columns.append(xp.concatenate([none[0], own, none[1]], axis=1))
            start += len(basis)
        return namespace(*columns).concatenate(columns)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        """Omega D for D (Q,): per term (levels, effects)."""
        matrices = natural.symmetric_matrices(omega, self.sizes)
        parts = self.split(cross)
        return tuple(part.T @ matrix for part, matrix in zip(parts, matrices, strict=True))

    def sparse(self, rows: Any) -> Any:
        """Rows of Z as a sparse matrix (k, Q), from per term (codes (k,), effects (k, q))."""
        places, values = [], []
        start = 0
        for (codes, effects), n_levels in zip(rows, self.levels, strict=True):
            q = effects.shape[1]
            places.append(start + codes[:, None] + n_levels * np.arange(q))
            values.append(effects)
            start += n_levels * q
        place, value = np.concatenate(places, axis=1), np.concatenate(values, axis=1)
        k, width = place.shape
        ends = np.arange(0, k * width + 1, width)
        return sp.csr_matrix((value.ravel(), place.ravel(), ends), (k, self.total))
