r"""The coordinates in which everything that a structure computes is linear, and their layout.

A model has one covariance matrix per random term, ``Sigma_k`` of order ``sizes[k]``, and a
residual variance ``sigma2``.

=========  ======================================================================================
``omega``  lower triangles, column by column, of the relative covariance matrices ``Omega_k =
           Sigma_k / sigma2``; the marginal covariance ``V / sigma2 = I + Z Omega Z'`` is linear
           in them
``theta``  the same triangles of the relative Cholesky factors ``Lambda_k``, with ``Omega_k =
           Lambda_k Lambda_k'`` (lme4's theta)
=========  ======================================================================================

Whatever the `Covariance`, both have a number for every entry of every triangle, m in all. What
depends only on ``sizes`` is NumPy and computed once. Arrays may have one more axis at the end, the
lanes of a batch, except where a shape says otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model import linalg

Array = Any  # NumPy's or JAX's
Sizes = tuple[int, ...]
INDEX = np.int32  # of index arrays: int64 ones break eager JAX code run with x64 off


@lru_cache
def triangle(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a lower triangle of order `q`, column by column as lme4 orders theta."""
    columns, rows = np.triu_indices(q)
    return rows.astype(INDEX), columns.astype(INDEX)


@lru_cache
def places(q: int) -> np.ndarray:
    """Where a symmetric matrix has its entries in its lower `triangle`, (q, q)."""
    places = np.zeros((q, q), INDEX)
    rows, columns = triangle(q)
    places[rows, columns] = places[columns, rows] = np.arange(rows.size)
    return places


def count_theta(sizes: Sizes) -> int:
    """Number of entries of all triangles, m."""
    return sum(q * (q + 1) // 2 for q in sizes)


@lru_cache
def effects_of_omega(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Which two effects, counted over all terms, each entry of omega belongs to."""
    starts = np.cumsum((0, *sizes[:-1]))
    pairs = [np.array(triangle(q)) + start for q, start in zip(sizes, starts, strict=True)]
    rows, columns = np.concatenate(pairs, axis=1).astype(INDEX)
    return rows, columns


@lru_cache
def symmetric_basis(sizes: Sizes) -> np.ndarray:
    """d Omega / d omega_i, Omega block-diagonal over the terms: (m, q, q), q = sum(sizes)."""
    total = sum(sizes)
    basis = []
    start = 0
    for q in sizes:
        for row, column in zip(*triangle(q), strict=True):
            unit = np.zeros((total, total))
            unit[start + row, start + column] = unit[start + column, start + row] = 1.0
            basis.append(unit)
        start += q
    return np.array(basis).reshape(-1, total, total)


def split_triangles(vector: Array, sizes: Sizes) -> tuple[Array, ...]:
    """Cut a theta-like vector into one lower-triangular matrix per term, shapes (q_k, q_k, ...)."""
    matrices = []
    start = 0
    for q in sizes:
        matrix = vector[start + places(q)]
        matrices.append(linalg.lower(matrix) if q > 1 else matrix)
        start += q * (q + 1) // 2
    return tuple(matrices)


def join_triangles(matrices: tuple[Array, ...]) -> Array:
    """The inverse of `split_triangles`: only the lower triangles are read."""
    parts = [matrix[triangle(matrix.shape[0])] for matrix in matrices]
    return namespace(*parts).concatenate(parts) if parts else np.zeros(0)


def omega_from_factors(factors: tuple[Array, ...]) -> Array:
    """Relative covariances (m, ...) of relative Cholesky factors or other roots (q_k, q_k, ...)."""
    return join_triangles(
        tuple(linalg.matmul(factor, linalg.transpose(factor)) for factor in factors)
    )


def omega_from_theta(theta: Array, sizes: Sizes) -> Array:
    """Relative covariances of relative Cholesky factors, both as vectors of length m."""
    return omega_from_factors(split_triangles(theta, sizes))


def symmetric_matrices(omega: Array, sizes: Sizes) -> tuple[Array, ...]:
    """The relative covariance matrices Omega_k, shapes (q_k, q_k), of the vector `omega`."""
    starts = np.cumsum([0, *(q * (q + 1) // 2 for q in sizes)])
    return tuple(omega[start + places(q)] for start, q in zip(starts, sizes, strict=False))
