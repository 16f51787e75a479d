"""Cholesky factors of semidefinite matrices: zeros that are exact, correlations that are free.

The correlation coordinates are inverse hyperbolic tangents of the canonical partial correlations
(Lewandowski, Kurowicka and Joe 2009, J. Multivariate Analysis 100:1989): for two effects, Fisher's
z of their correlation. They run row by row over the strict lower triangle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance.natural import triangle

Array = Any  # NumPy's or JAX's


def rounding(array: Array) -> float:
    """Relative SD that rounding leaves of zero."""
    return math.sqrt(50 * float(np.finfo(array.dtype).eps))


def factor_semidefinite(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """Lower Cholesky factor of a semidefinite matrix, with exact zeros where it is singular.

    Args:
        matrix: (q, q), positive semidefinite.
        tolerance: a pivot counts as zero if its root is at most this, or at most this fraction
            of the root of its diagonal entry.

    Returns:
        The factor, (q, q), diagonal not negative, with a zero column for each zero pivot, and
        the pivots that count as zero, (q,) booleans.
    """
    xp = namespace(matrix)
    q = matrix.shape[0]
    columns: list[list[Array]] = [[xp.zeros_like(matrix[0, 0])] * q for _ in range(q)]
    zero = []
    for k in range(q):
        pivot = matrix[k, k] - sum((columns[j][k] ** 2 for j in range(k)), 0.0)
        is_zero = pivot <= tolerance**2 * xp.maximum(matrix[k, k], 1.0)
        root = xp.sqrt(xp.where(is_zero, 1.0, pivot))
        columns[k][k] = xp.where(is_zero, 0.0, root)
        for i in range(k + 1, q):
            rest = matrix[i, k] - sum((columns[j][i] * columns[j][k] for j in range(k)), 0.0)
            columns[k][i] = xp.where(is_zero, 0.0, rest / root)
        zero.append(is_zero)
    return xp.stack([xp.stack(column) for column in columns], axis=1), xp.stack(zero)


def lower_factor(root: Array, tolerance: float, rank: Array | None = None) -> Array:
    """Lower Cholesky factor of L L' for a square root L, with exact zeros where it is singular.

    By orthogonalising the rows of L one after the other (twice, for rounding): L L' is not formed,
    so that a pivot of zero comes out as the rounding error of L and not as its root.

    Args:
        root: (q, q, ...), lanes last.
        tolerance: a pivot counts as zero if its root is at most this, or at most this fraction
            of the length of its row.
        rank: (...), of L if it is known. So many pivots are not zero, however small, unless there
            are others to choose from and their root is at most `tolerance` of the row's length.

    Returns:
        The factor, (q, q, ...), diagonal not negative, with a zero column for each zero pivot.
    """
    xp = namespace(root)
    q = root.shape[0]
    directions: list[Array] = []
    rows = []
    used: Array | int = 0
    for i in range(q):
        rest, entries = root[i], [xp.zeros_like(root[i, 0]) for _ in directions]
        least = xp.sum(rest**2, axis=0)
        least = tolerance**2 * (xp.maximum(least, 1.0) if rank is None else least)
        for _ in range(2 if directions else 0):
            parts = [xp.sum(rest * direction, axis=0) for direction in directions]
            entries = [entry + part for entry, part in zip(entries, parts, strict=True)]
            rest = rest - sum(part * d for part, d in zip(parts, directions, strict=True))
        pivot = xp.sum(rest**2, axis=0)
        is_zero = pivot <= least
        if rank is not None:
            is_zero = (is_zero & (rank - used < q - i)) | (used >= rank)
            used = used + ~is_zero
        length = xp.sqrt(xp.where(is_zero, 1.0, pivot))
        directions.append(xp.where(is_zero, 0.0, rest / length))
        entries.append(xp.where(is_zero, 0.0, length))
        rows.append(xp.stack([*entries, *[xp.zeros_like(length)] * (q - 1 - i)]))
    return xp.stack(rows)


def _tanh_and_sech(z: Array) -> tuple[Array, Array]:
    """Hyperbolic tangent and 1 / cosh(z), without an overflow, z = +-inf included."""
    if not on_host(z):
        from jaxreml.model.covariance import of_jax

        return of_jax.tanh(z), of_jax.sech(z)
    small = np.exp(-np.abs(z))
    return np.tanh(z), 2 * small / (1 + small * small)


def _factor_of(entries: list[list[Array]]) -> Array:
    """A lower triangle (q, q, ...) of its rows."""
    xp, q = namespace(entries[0][0]), len(entries)
    zero = xp.zeros_like(entries[0][0])
    return xp.stack([xp.stack([*row, *[zero] * (q - len(row))]) for row in entries])


def correlation_factor(z: Array, q: int) -> Array:
    """Cholesky factor of the correlation matrix with partial correlations tanh(z), row by row."""
    return _product_rows(list(map(_tanh_and_sech, z)), q, {})


def correlation_slopes(z: Array, q: int) -> tuple[Array, Array]:
    """Derivatives of `correlation_factor`, (q, q, c, ...) and (q, q, c, c, ...).

    An entry is a product of functions of one coordinate each, so a derivative puts theirs in the
    place of one or two.
    """
    xp, pairs = namespace(z), list(map(_tanh_and_sech, z))
    if on_host(z):
        return _slopes_by_row(pairs, z, q)
    count = range(len(z))
    first = [_product_rows(pairs, q, {k: 1}) for k in count]
    second: dict[tuple[int, int], Array] = {}
    for k in count:
        second[k, k] = _product_rows(pairs, q, {k: 2})
        for j in range(k):
            second[j, k] = second[k, j] = _product_rows(pairs, q, {j: 1, k: 1})
    rows = [xp.stack([second[k, j] for j in count], axis=2) for k in count]
    return xp.stack(first, axis=2), xp.stack(rows, axis=2)


def _slopes_by_row(
    pairs: list[tuple[np.ndarray, np.ndarray]], z: np.ndarray, q: int
) -> tuple[np.ndarray, np.ndarray]:
    """`correlation_slopes` on the host: a row moves with its own coordinates only."""
    count, lanes = len(z), z.shape[1:]
    first = np.zeros((q, q, count, *lanes), z.dtype)
    second = np.zeros((q, q, count, count, *lanes), z.dtype)
    place = 0
    for i in range(1, q):
        own = range(place, place + i)
        for k in own:
            first[i, : i + 1, k] = _product_row(pairs, own, {k: 1})
            second[i, : i + 1, k, k] = _product_row(pairs, own, {k: 2})
            for j in range(place, k):
                mixed = _product_row(pairs, own, {j: 1, k: 1})
                second[i, : i + 1, j, k] = second[i, : i + 1, k, j] = mixed
        place += i
    return first, second


def correlations(z: Array, q: int) -> Array:
    """The lower triangle (t, ...) of the correlation matrix at coordinates (c, ...)."""
    xp = namespace(z)
    if q == 1:
        return xp.ones((1, *z.shape[1:]), z.dtype)
    factor = correlation_factor(z, q)
    return linalg.matmul(factor, linalg.transpose(factor))[triangle(q)]


def correlation_derivatives(z: Array, q: int) -> tuple[Array, Array]:
    """First and second derivatives of `correlations`: (t, c, ...) and (t, c, c, ...)."""
    xp, lower = namespace(z), triangle(q)
    factor = correlation_factor(z, q)
    first, second = correlation_slopes(z, q)
    half = xp.einsum("iak...,ja...->ijk...", first, factor)
    slope = half + half.swapaxes(0, 1)
    half = xp.einsum("iakl...,ja...->ijkl...", second, factor)
    half = half + xp.einsum("iak...,jal...->ijkl...", first, first)
    bend = half + half.swapaxes(0, 1)
    return slope[lower], bend[lower]


def _product_rows(pairs: list[tuple[Array, Array]], q: int, orders: dict[int, int]) -> Array:
    """`correlation_factor` of the coordinates' tanh and sech, differentiated so many times in these
    coordinates.

    Each derivative is made of tanh and sech: finite everywhere, zero at +-inf, with all its digits
    where 1 - tanh^2 would have lost them.
    """
    ends = [i * (i + 1) // 2 for i in range(q)]
    own = [range(end - i, end) for i, end in enumerate(ends)]
    return _factor_of([_product_row(pairs, row, orders) for row in own])


def _product_row(
    pairs: list[tuple[Array, Array]], own: range, orders: dict[int, int]
) -> list[Array]:
    """A row of `_product_rows`, whose coordinates are `own`."""
    one = pairs[0][0]
    xp = namespace(one)
    rest = xp.ones_like(one) if set(orders) <= set(own) else xp.zeros_like(one)
    row = []
    for coordinate in own:
        tanh, small = pairs[coordinate]
        order = orders.get(coordinate, 0)
        later = any(other > coordinate for other in orders)
        entry = (tanh, small**2, -2 * small**2 * tanh)[order]
        # Coordinates behind this one do not move it.
        row.append(xp.zeros_like(rest) if later else entry * rest)
        rest = rest * (small, -small * tanh, small * (tanh**2 - small**2))[order]
    return [*row, rest]


def tails(row: Array, i: int) -> tuple[list[Array], list[Array]]:
    """What row i of a triangle has left behind each of its entries but the last, the root of the
    sum of squares, (i,) of them: ones where that is exactly zero, and whether it is not."""
    xp = namespace(row)
    squares = xp.zeros_like(row[0])
    tails, left = [], []
    for j in reversed(range(i)):
        squares = squares + row[j + 1] ** 2
        left.append(squares > 0)
        tails.append(xp.sqrt(xp.where(squares > 0, squares, 1.0)))
    return tails[::-1], left[::-1]


def correlation_coordinates(factor: Array, limit: float) -> Array:
    """Inverse of `correlation_factor` for rows of any length; a partial correlation of +-1
    becomes +-`limit`.

    A partial correlation is tanh z of sinh z = entry / what the row has left behind it, which
    loses no digits next to +-1.
    """
    xp = namespace(factor)
    coordinates = []
    for i in range(1, factor.shape[0]):
        for entry, tail, left in zip(factor[i], *tails(factor[i], i), strict=False):
            z = xp.arcsinh(entry / tail)
            coordinates.append(xp.where(left, z, xp.sign(entry) * limit))
    return xp.stack(coordinates) if coordinates else xp.zeros_like(factor[:0, 0])
