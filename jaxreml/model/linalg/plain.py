"""Small matrices in plain operations of either library, the batch on the trailing axes."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host

Array = Any  # NumPy's or JAX's
FLAT = 1e-7  # A direction of a Hessian of unit diagonal is not identified below this pivot.
ROUNDING = 100  # units of rounding that a share which counts as none has at least
UNROLLED_ORDER = 8  # up to which recurrences are written out over the trailing axes
BATCHED_ORDER = 12  # from which on a product of each pair of matrices takes less on the host
PIVOTED_ORDER = 4  # likewise, with a search for pivots


def negligible(share: float, dtype: Any, units: float = ROUNDING) -> float:
    """A share that counts as none, of so many units of rounding at least: more in single
    precision."""
    return max(share, units * float(np.finfo(dtype).eps))


def transpose(matrix: Array) -> Array:
    """(i, j, ...) to (j, i, ...)."""
    return matrix.swapaxes(0, 1)


def matmul(left: Array, right: Array) -> Array:
    """Products of (i, k, ...) and (k, j, ...); the trailing axes broadcast."""
    if left.ndim == right.ndim == 2:
        return left @ right
    if left.shape[1] >= BATCHED_ORDER and left.ndim == right.ndim == 3 and on_host(left, right):
        product = np.moveaxis(left, 2, 0) @ np.moveaxis(right, 2, 0)
        return np.ascontiguousarray(np.moveaxis(product, 0, 2))
    if not 0 < left.shape[1] <= UNROLLED_ORDER**2:
        return namespace(left, right).einsum("ik...,kj...->ij...", left, right)
    products = [left[:, k, None] * right[None, k] for k in range(left.shape[1])]
    return reduce(add, products)


def row_products(left: Array, right: Array) -> Array:
    """Inner products of the rows of (a, k, ...) and (b, k, ...), (a, b, ...)."""
    if left.ndim == right.ndim == 2:
        return left @ right.T
    if on_host(left, right):  # no array of all products
        if left is right:
            pairs = {
                (i, j): _inner(left[i], left[j]) for i in range(len(left)) for j in range(i + 1)
            }
            return np.array(
                [[pairs[max(i, j), min(i, j)] for j in range(len(left))] for i in range(len(left))]
            )
        return np.array([[_inner(own, other) for other in right] for own in left])
    return (left[:, None] * right[None]).sum(axis=2)


def _inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.einsum("k...,k...->...", left, right)


def diagonal(matrix: Array) -> Array:
    """Diagonals of (k, k, ...), (k, ...)."""
    if matrix.ndim == 2:
        return matrix.diagonal()
    rows = [matrix[i, i] for i in range(matrix.shape[0])]
    return namespace(matrix).stack(rows) if rows else matrix.reshape(0, *matrix.shape[2:])


def eye_like(matrix: Array) -> Array:
    """The identity, (k, k, 1, ...), with as many axes as `matrix`, (k, k, ...)."""
    q = matrix.shape[0]
    identity = namespace(matrix).eye(q, dtype=matrix.dtype)
    return identity.reshape(q, q, *[1] * (matrix.ndim - 2))


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
    xp = namespace(matrix, sizes)
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


def residual(basis: Array, values: Array) -> tuple[Array, Array]:
    """As `linalg.residual`."""
    shares = transpose(transpose(values) @ basis)  # a transposed basis would be copied by JAX
    rest = values - basis @ shares
    again = transpose(transpose(rest) @ basis)
    return rest - basis @ again, shares + again


def border(matrix: Array, column: Array, corner: Array) -> Array:
    """The symmetric [matrix column; column' corner] of (k, k, ...), (k, ...) and (...)."""
    xp = namespace(matrix, column, corner)
    top = xp.concatenate([matrix, column[:, None]], axis=1)
    return xp.concatenate(
        [top, xp.concatenate([column, xp.reshape(corner, (1, *column.shape[1:]))])[None]]
    )


def lower(matrix: Array) -> Array:
    """(k, k, ...) with zeros above the diagonal."""
    triangle = np.tri(len(matrix), dtype=bool)
    triangle = triangle.reshape(*triangle.shape, *[1] * (matrix.ndim - 2))
    return namespace(matrix).where(triangle, matrix, 0.0)


def unrolled_cholesky(matrix: Array) -> Array:
    """Lower Cholesky factors, (k, k, ...); NaN where there is none."""
    xp = namespace(matrix)
    columns = []
    rest = matrix
    for k in range(matrix.shape[0]):
        column = rest[:, 0] / xp.sqrt(rest[:1, 0])
        below = column[1:]
        columns.append(xp.concatenate([xp.zeros_like(matrix[:k, 0]), column]))
        rest = rest[1:, 1:] - below[:, None] * below[None]
    return xp.stack(columns, axis=1)


def unrolled_solve(factor: Array, right: Array, transposed: bool) -> Array:
    """Solutions of lower-triangular systems, (k, k, ...) and (k, c, ...)."""
    if not right.size:
        return right
    if transposed:  # a lower triangle again, with rows and columns reversed
        return unrolled_solve(transpose(factor)[::-1, ::-1], right[::-1], False)[::-1]
    rows: list[Array] = []
    for i in range(len(factor)):
        rest = reduce(add, [-factor[i, j][None] * rows[j] for j in range(i)], right[i])
        rows.append(rest / factor[i, i][None])
    return namespace(factor, right).stack(rows)


def eliminate(matrix: Array) -> tuple[Array, Array]:
    """Inverses and log-determinants by Gauss and Jordan's elimination, the largest entry of a
    column for its pivot."""
    xp, k = namespace(matrix), len(matrix)
    identity = xp.broadcast_to(eye_like(matrix), matrix.shape)
    rows = list(xp.concatenate([matrix, identity], axis=1))
    logs = xp.zeros_like(matrix[0, 0])
    for i in range(k):
        for j in range(i + 1, k):
            swap = (xp.abs(rows[j][i]) > xp.abs(rows[i][i]))[None]
            rows[i], rows[j] = (
                xp.where(swap, rows[j], rows[i]),
                xp.where(swap, rows[i], rows[j]),
            )
        logs = logs + xp.log(xp.abs(rows[i][i]))
        rows[i] = rows[i] / rows[i][i][None]
        for j in range(k):
            if j != i:
                rows[j] = rows[j] - rows[j][i][None] * rows[i]
    return xp.stack(rows)[:, k:], logs


def block_diagonal(blocks: list[Array]) -> Array:
    """Matrices (., ., ...) one after the other along the diagonal."""
    if len(blocks) == 1:
        return blocks[0]
    xp = namespace(*blocks)
    width = sum(block.shape[1] for block in blocks)
    rows = []
    start = 0
    for block in blocks:
        height, own, *lanes = block.shape
        before = xp.zeros((height, start, *lanes), block.dtype)
        start += own
        after = xp.zeros((height, width - start, *lanes), block.dtype)
        rows.append(xp.concatenate([before, block, after], axis=1))
    return xp.concatenate(rows)
