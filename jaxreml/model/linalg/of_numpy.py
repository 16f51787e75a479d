"""What of `linalg` is NumPy's own: LAPACK's factorisations, NaN where there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg

from jaxreml.model.linalg.plain import (
    UNROLLED_ORDER,
    diagonal,
    eye_like,
    matmul,
    residual,
    transpose,
    unrolled_cholesky,
    unrolled_solve,
)

__all__ = ["residual"]
Array = np.ndarray
lapack: Any = scipy.linalg.lapack
PER_LANE = 4  # recurrences of an order over so many lanes each are quicker than LAPACK's calls
BLOCK = 128  # rows of a matrix that are transposed at a time, to stay in the cache


def _lanes_first(matrix: Array) -> Array:
    return np.moveaxis(matrix.reshape(*matrix.shape[:2], -1), -1, 0)


def _lanes_last(matrix: Array, lanes: tuple[int, ...]) -> Array:
    return np.moveaxis(matrix, 0, -1).reshape(*matrix.shape[1:], *lanes)


def _is_unrolled(order: int, lanes: tuple[int, ...]) -> bool:
    """Whether recurrences go over the lanes: not one matrix after the other, where these are
    many."""
    return order <= UNROLLED_ORDER or PER_LANE * order <= math.prod(lanes)


def cholesky(matrix: Array) -> Array:
    """As `linalg.cholesky`."""
    if not matrix.size:
        return matrix
    if matrix.ndim > 2 and _is_unrolled(len(matrix), matrix.shape[2:]):
        return unrolled_cholesky(matrix)
    if matrix.ndim > 2:
        each = [cholesky(own) for own in _lanes_first(matrix)]
        return _lanes_last(np.stack(each), matrix.shape[2:])
    # LAPACK's matrices are the transposes of NumPy's.
    factor, failed = lapack.dpotrf(matrix.T, lower=0, clean=1)
    return np.full_like(matrix, np.nan) if failed else factor.T


def solve_lower(factor: Array, right: Array, transposed: bool = False) -> Array:
    """As `linalg.solve_lower`."""
    k, lanes = len(factor), np.broadcast_shapes(factor.shape[2:], right.shape[2:])
    if not right.size:
        return np.broadcast_to(right, (*right.shape[:2], *lanes))
    if _is_unrolled(k, factor.shape[2:]):  # BLAS would wake its threads
        if right.ndim < factor.ndim:
            right = right.reshape(*right.shape, *[1] * (factor.ndim - right.ndim))
        return unrolled_solve(factor, right, transposed)
    if factor.size == k * k:  # the same in all lanes
        flat = right.reshape(k, -1)
        upper = factor.reshape(k, k).T
        solved, failed = lapack.dtrtrs(upper, flat, lower=0, trans=int(not transposed))
        return np.full_like(right, np.nan) if failed else solved.reshape(right.shape)
    full = (np.broadcast_to(own, (*own.shape[:2], *lanes)) for own in (factor, right))
    pairs = zip(*map(_lanes_first, full), strict=True)
    each = [solve_lower(left, own, transposed) for left, own in pairs]
    return _lanes_last(np.stack(each), lanes)


def inverse_of_factor(factor: Array) -> Array:
    """As `linalg.inverse_of_factor`."""
    if len(factor) <= UNROLLED_ORDER:
        half = solve_lower(factor, np.eye(len(factor)))
        return half.T @ half
    inverted, failed = lapack.dpotri(factor.T, lower=0)
    if failed:
        return np.full_like(factor, np.nan)
    inverted = inverted.T
    np.einsum("ii->i", inverted)[:] /= 2
    return mirrored(inverted)


def whitening(matrices: Array) -> tuple[Array, Array]:
    """As `linalg.whitening`."""
    try:
        factors = np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        return np.full_like(matrices, np.nan), np.asarray(np.nan)
    logs = np.log(np.einsum("bii->bi", factors))
    return np.linalg.inv(factors), np.asarray(2 * logs.sum())


def mirrored(triangle: Array) -> Array:
    """As `linalg.mirrored`, in place."""
    for start in range(0, len(triangle), BLOCK):
        stop = start + BLOCK
        corner = np.tril(triangle[start:stop, start:stop])
        triangle[start:stop, start:stop] = corner + corner.T
        triangle[start:stop, stop:] = triangle[stop:, start:stop].T
    return triangle


def plus_identity(matrix: Array) -> Array:
    """As `linalg.plus_identity`, in place."""
    np.einsum("ii->i", matrix)[:] += 1
    return matrix


def inverse(matrix: Array, definite: bool) -> tuple[Array, Array]:
    """As `linalg.inverse`."""
    if len(matrix) == 1:
        return 1 / matrix, np.log(matrix[0, 0])
    if definite:
        factor = cholesky(matrix)
        half = solve_lower(factor, np.broadcast_to(eye_like(factor), factor.shape))
        return matmul(transpose(half), half), 2 * np.sum(np.log(diagonal(factor)), axis=0)
    try:
        first = _lanes_first(matrix)
        inverted, logs = np.linalg.inv(first), np.linalg.slogdet(first)[1]
    except np.linalg.LinAlgError:
        return np.full_like(matrix, np.nan), np.full(matrix.shape[2:], np.nan)
    return _lanes_last(inverted, matrix.shape[2:]), logs.reshape(matrix.shape[2:])


def eigh(matrix: Array) -> tuple[Array, Array]:
    """As `linalg.eigh`."""
    if len(matrix) == 1:
        return matrix[0], np.ones_like(matrix)
    lanes = matrix.shape[2:]
    try:
        values, vectors = np.linalg.eigh(_lanes_first(matrix))
    except np.linalg.LinAlgError:
        return np.full_like(matrix[0], np.nan), np.full_like(matrix, np.nan)
    return values.T.reshape(-1, *lanes), _lanes_last(vectors, lanes)
