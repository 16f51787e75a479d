"""Small matrices with the batch on the trailing axes.

LAPACK is called once per matrix of a batch, which for small matrices costs more than the
arithmetic. Up to a certain order the recurrences are written out over the trailing axes, which XLA
fuses and vectorises; above it LAPACK wins and unrolled code would compile slowly. A matrix without
trailing axes goes to LAPACK.

A matrix that is not positive definite gives NaN, never an altered factor.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

UNROLLED_ORDER = 8


def _unroll(matrix: Array) -> bool:
    return matrix.ndim > 2 and matrix.shape[0] <= UNROLLED_ORDER


def transpose(matrix: Array) -> Array:
    """(i, j, ...) to (j, i, ...)."""
    return jnp.swapaxes(matrix, 0, 1)


def matmul(left: Array, right: Array) -> Array:
    """Products of (i, k, ...) and (k, j, ...); the trailing axes broadcast."""
    if left.ndim == right.ndim == 2:
        return left @ right
    if not 0 < left.shape[1] <= UNROLLED_ORDER**2:
        return jnp.einsum("ik...,kj...->ij...", left, right)
    products = [left[:, k, None] * right[None, k] for k in range(left.shape[1])]
    return reduce(add, products)


def row_products(left: Array, right: Array) -> Array:
    """Inner products of the rows of (a, k, ...) and (b, k, ...), (a, b, ...)."""
    if left.ndim == right.ndim == 2:
        return left @ right.T
    return jnp.sum(left[:, None] * right[None], axis=2)


def diagonal(matrix: Array) -> Array:
    """Diagonals of (k, k, ...), (k, ...)."""
    if matrix.ndim == 2:
        return jnp.diagonal(matrix)
    rows = [matrix[i, i] for i in range(matrix.shape[0])]
    return jnp.stack(rows) if rows else jnp.zeros((0, *matrix.shape[2:]), matrix.dtype)


def eye_like(matrix: Array) -> Array:
    """The identity, (k, k, 1, ...), with as many axes as `matrix`, (k, k, ...)."""
    q = matrix.shape[0]
    return jnp.eye(q, dtype=matrix.dtype).reshape(q, q, *[1] * (matrix.ndim - 2))


def flat_inverse(matrix: Any, sizes: Any, tolerance: float) -> tuple[Any, Any]:
    """A generalised inverse of semidefinite (k, k, ...), and the directions it leaves out.

    By symmetric sweeps (Goodnight 1979, Am. Stat. 33:149): what depends on the coordinates before
    it is held at zero, which makes no difference to functions that are constant in the flat
    directions. NumPy arrays or JAX's.

    Args:
        matrix: (k, k, ...).
        sizes: (k, ...), positive: how large diagonal entries are where nothing is flat.
        tolerance: pivots of at most this, per unit of `sizes`, are zero.

    Returns:
        The inverse, zero in the coordinates held, and the flat directions, (k, k, ...): a column
        for each coordinate held, its largest entry +-1, zeros for the others. NaN where a pivot is
        negative or NaN.
    """
    xp: Any = np if isinstance(matrix, np.ndarray) else jnp
    unit = 1 / xp.sqrt(sizes)
    swept = matrix * unit[:, None] * unit
    eye = xp.eye(len(matrix), dtype=matrix.dtype)
    eye = eye.reshape(*eye.shape, *[1] * (matrix.ndim - 2))
    held = []
    broken = False
    for k in range(len(matrix)):
        pivot = swept[k, k]
        is_flat = ~(pivot > tolerance)
        broken = broken | ~(pivot >= -tolerance)
        safe = xp.where(is_flat, 1.0, pivot)
        column = swept[:, k]
        rest = swept - column[:, None] * column[None] / safe
        column = (column * (1 - eye[k]) - eye[k] / 2) / safe
        rest = rest + eye[k][:, None] * column[None] + column[:, None] * eye[k][None]
        swept = xp.where(is_flat, swept, rest)
        held.append(is_flat)
    flat = xp.stack(held)
    inverse = xp.where(flat[:, None] | flat, 0.0, -swept)
    directions = xp.where(flat, eye - xp.where(flat[:, None], 0.0, swept), 0.0)
    inverse = inverse * unit[:, None] * unit
    directions = directions * unit[:, None]
    largest = xp.max(xp.abs(directions), axis=0)
    directions = directions / xp.where(largest > 0, largest, 1.0)
    return xp.where(broken, xp.nan, inverse), xp.where(broken, xp.nan, directions)


def border(matrix: Array, column: Array, corner: Array) -> Array:
    """The symmetric [matrix column; column' corner] of (k, k, ...), (k, ...) and (...)."""
    top = jnp.concatenate([matrix, column[:, None]], axis=1)
    return jnp.concatenate([top, jnp.concatenate([column, corner[None]])[None]])


def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factors, (k, k, ...) to (k, k, ...)."""
    if not _unroll(matrix):
        return _to_back(jnp.linalg.cholesky(_to_front(matrix)))
    columns = []
    rest = matrix
    for k in range(matrix.shape[0]):
        column = rest[:, 0] / jnp.sqrt(rest[0, 0])
        below = column[1:]
        columns.append(jnp.concatenate([jnp.zeros_like(matrix[:k, 0]), column]))
        rest = rest[1:, 1:] - below[:, None] * below[None]
    return jnp.stack(columns, axis=1)


def solve_lower(factor: Array, right: Array) -> Array:
    """Solve ``factor x = right`` for lower-triangular (k, k, ...) and right (k, c, ...)."""
    if not _unroll(factor):
        shape = jnp.broadcast_shapes(factor.shape[2:], right.shape[2:])
        factor = jnp.broadcast_to(factor, (*factor.shape[:2], *shape))
        right = jnp.broadcast_to(right, (*right.shape[:2], *shape))
        return _to_back(solve_triangular(_to_front(factor), _to_front(right), lower=True))
    rows: list[Array] = []
    for i in range(factor.shape[0]):
        rest = reduce(add, [-factor[i, j] * rows[j] for j in range(i)], right[i])
        rows.append(rest / factor[i, i])
    return jnp.stack(rows) if rows else right


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse(matrix: Array, definite: bool) -> tuple[Array, Array]:
    """Inverses of (k, k, ...) and the logarithms of their positive determinants, (...).

    Symmetric positive `definite`, by Cholesky factors, or not, by LU ones with pivots. The
    derivatives are written out, which keeps programs that differentiate twice small.
    """
    if len(matrix) == 1:
        return 1 / matrix, jnp.log(matrix[0, 0])
    if definite:
        factor = cholesky(matrix)
        half = solve_lower(factor, jnp.broadcast_to(eye_like(factor), factor.shape))
        logs = jnp.sum(jnp.log(diagonal(factor)), axis=0)
        return matmul(transpose(half), half), 2 * logs
    front = _to_front(matrix)
    return _to_back(jnp.linalg.inv(front)), jnp.linalg.slogdet(front)[1]


@inverse.defjvp
def _inverse_jvp(definite, primals, tangents):
    inverted, logs = inverse(primals[0], definite)
    moved = matmul(inverted, tangents[0])
    return (inverted, logs), (-matmul(moved, inverted), jnp.sum(diagonal(moved), axis=0))


def conditional_variance(factors: Array, root: Array) -> Array:
    """L (I + L'F'F L)^-1 L', (q, q, ...), for F (r, q, ...) and L (q, q)."""
    root = root.reshape(*root.shape, *[1] * (factors.ndim - 2))
    loadings = matmul(factors, root)
    inner = matmul(transpose(loadings), loadings)
    factor = cholesky(inner + eye_like(inner))
    half = solve_lower(factor, jnp.broadcast_to(transpose(root), factor.shape))
    return matmul(transpose(half), half)


def _to_front(matrix: Array) -> Array:
    return jnp.moveaxis(matrix, (0, 1), (-2, -1))


def _to_back(matrix: Array) -> Array:
    return jnp.moveaxis(matrix, (-2, -1), (0, 1))
