"""Cholesky factors of semidefinite matrices: zeros that are exact, correlations that are free.

The correlation coordinates are inverse hyperbolic tangents of the canonical partial correlations
(Lewandowski, Kurowicka and Joe 2009, J. Multivariate Analysis 100:1989): for two effects, Fisher's
z of their correlation. They run row by row over the strict lower triangle.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def rounding(array: Array) -> float:
    """Relative SD that rounding leaves of zero."""
    return math.sqrt(50 * jnp.finfo(array.dtype).eps)


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
    q = matrix.shape[0]
    columns: list[list[Array]] = [[jnp.zeros_like(matrix[0, 0])] * q for _ in range(q)]
    zero = []
    for k in range(q):
        pivot = matrix[k, k] - sum((columns[j][k] ** 2 for j in range(k)), 0.0)
        is_zero = pivot <= tolerance**2 * jnp.maximum(matrix[k, k], 1.0)
        root = jnp.sqrt(jnp.where(is_zero, 1.0, pivot))
        columns[k][k] = jnp.where(is_zero, 0.0, root)
        for i in range(k + 1, q):
            rest = matrix[i, k] - sum((columns[j][i] * columns[j][k] for j in range(k)), 0.0)
            columns[k][i] = jnp.where(is_zero, 0.0, rest / root)
        zero.append(is_zero)
    return jnp.stack([jnp.stack(column) for column in columns], axis=1), jnp.stack(zero)


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
    q = root.shape[0]
    directions: list[Array] = []
    rows = []
    used: Array | int = 0
    for i in range(q):
        rest, entries = root[i], [jnp.zeros_like(root[i, 0]) for _ in directions]
        least = jnp.sum(rest**2, axis=0)
        least = tolerance**2 * (jnp.maximum(least, 1.0) if rank is None else least)
        for _ in range(2 if directions else 0):
            parts = [jnp.sum(rest * direction, axis=0) for direction in directions]
            entries = [entry + part for entry, part in zip(entries, parts, strict=True)]
            rest = rest - sum(part * d for part, d in zip(parts, directions, strict=True))
        pivot = jnp.sum(rest**2, axis=0)
        is_zero = pivot <= least
        if rank is not None:
            is_zero = (is_zero & (rank - used < q - i)) | (used >= rank)
            used = used + ~is_zero
        length = jnp.sqrt(jnp.where(is_zero, 1.0, pivot))
        directions.append(jnp.where(is_zero, 0.0, rest / length))
        entries.append(jnp.where(is_zero, 0.0, length))
        rows.append(jnp.stack([*entries, *[jnp.zeros_like(length)] * (q - 1 - i)]))
    return jnp.stack(rows)


@jax.custom_jvp
def _tanh(z: Array) -> Array:
    return jnp.tanh(z)


@jax.custom_jvp
def _sech(z: Array) -> Array:
    """1 / cosh(z) without an overflow, z = +-inf included."""
    small = jnp.exp(-jnp.abs(z))
    return 2 * small / (1 + small * small)


# Each derivative by the other function: finite everywhere, zero at +-inf, and 1 - tanh^2 keeps
# its digits.
_tanh.defjvps(lambda dz, value, z: dz * _sech(z) ** 2)
_sech.defjvps(lambda dz, value, z: -dz * _sech(z) * _tanh(z))


def correlation_factor(z: Array, q: int) -> Array:
    """Cholesky factor of the correlation matrix with partial correlations tanh(z), row by row."""
    rows: list[list[Array]] = []
    k = 0
    for i in range(q):
        rest = jnp.ones_like(z[0])
        row = []
        for _ in range(i):
            row.append(_tanh(z[k]) * rest)
            rest = rest * _sech(z[k])
            k += 1
        rows.append([*row, rest, *[jnp.zeros_like(z[0])] * (q - 1 - i)])
    return jnp.stack([jnp.stack(row) for row in rows])


def tails(row: Array, i: int) -> tuple[list[Array], list[Array]]:
    """What row i of a triangle has left behind each of its entries but the last, the root of the
    sum of squares, (i,) of them: ones where that is exactly zero, and whether it is not."""
    squares = jnp.zeros_like(row[0])
    tails, left = [], []
    for j in reversed(range(i)):
        squares = squares + row[j + 1] ** 2
        left.append(squares > 0)
        tails.append(jnp.sqrt(jnp.where(squares > 0, squares, 1.0)))
    return tails[::-1], left[::-1]


def correlation_coordinates(factor: Array, limit: float) -> Array:
    """Inverse of `correlation_factor` for rows of any length; a partial correlation of +-1
    becomes +-`limit`.

    A partial correlation is tanh z of sinh z = entry / what the row has left behind it, which
    loses no digits next to +-1.
    """
    coordinates = []
    for i in range(1, factor.shape[0]):
        for entry, tail, left in zip(factor[i], *tails(factor[i], i), strict=False):
            z = jnp.arcsinh(entry / tail)
            coordinates.append(jnp.where(left, z, jnp.sign(entry) * limit))
    return jnp.stack(coordinates) if coordinates else jnp.zeros_like(factor[:0, 0])
