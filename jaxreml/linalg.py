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

import jax
import jax.numpy as jnp
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


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def independent_columns(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """U R = X with orthonormal U (n, p) for X (n, p), zeros in both for columns that are dependent.

    A column counts as dependent if no more than `tolerance` of its length is outside the span of
    those before it. It is left out, of the derivatives too: those of U and R are what they are
    without it, and zero in it, where they do not exist.

    By Gram-Schmidt, as LAPACK's QR factorisation puts an arbitrary direction in the place of a
    dependent column; twice is enough (Kahan, in Parlett 1980).
    """
    matrix = jnp.asarray(matrix)  # eager derivatives come with NumPy arrays
    size = jnp.max(jnp.abs(matrix), axis=0, initial=0.0)
    size = jnp.where(size > 0, size, 1.0)

    def add_column(k: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, triangle = found
        rest = matrix[:, k] / size[k]
        length = jnp.linalg.norm(rest)
        shares = basis.T @ rest
        rest = rest - basis @ shares
        again = basis.T @ rest
        rest = rest - basis @ again
        pivot = jnp.linalg.norm(rest)
        kept = pivot > tolerance * length
        unit = jnp.where(kept, rest / jnp.where(kept, pivot, 1.0), 0.0)
        column = jnp.where(kept, (shares + again).at[k].set(pivot), 0.0)
        return basis.at[:, k].set(unit), triangle.at[:, k].set(column * size[k])

    p = matrix.shape[1]
    nothing = jnp.zeros_like(matrix), jnp.zeros((p, p), matrix.dtype)
    return jax.lax.fori_loop(0, p, add_column, nothing) if p else nothing


@independent_columns.defjvp
def _independent_columns_jvp(tolerance, primals, tangents):
    basis, triangle = independent_columns(primals[0], tolerance)
    dependent = diagonal(triangle) == 0
    whole = triangle + jnp.diag(jnp.where(dependent, 1.0, 0.0))
    moved = jnp.where(dependent, 0.0, tangents[0])
    moved = transpose(solve_lower(transpose(whole), transpose(moved)))  # dX R^-1
    within = basis.T @ moved
    turned = jnp.tril(within, -1)
    turned = turned - turned.T
    outside = moved - basis @ within
    return (basis, triangle), (basis @ turned + outside, (within - turned) @ triangle)
