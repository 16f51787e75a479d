"""Small triangular factorisations over a trailing batch axis.

LAPACK is called once per matrix of a batch, which for matrices of order 1 to 4 costs more than
the arithmetic. Up to that order the recurrences are written out over the batch axis, which XLA
fuses and vectorises; above it LAPACK wins and unrolled code would compile slowly.

A matrix that is not positive definite gives NaN, never an altered factor.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular

UNROLLED_ORDER = 4


def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factors of a batch, (q, q, J) to (q, q, J)."""
    q = matrix.shape[0]
    if q > UNROLLED_ORDER:
        return jnp.moveaxis(jnp.linalg.cholesky(jnp.moveaxis(matrix, -1, 0)), 0, -1)
    zero = jnp.zeros_like(matrix[0, 0])
    factor = [[zero] * q for _ in range(q)]
    for k in range(q):
        factor[k][k] = jnp.sqrt(matrix[k, k] - sum((factor[k][j] ** 2 for j in range(k)), zero))
        for i in range(k + 1, q):
            rest = matrix[i, k] - sum((factor[i][j] * factor[k][j] for j in range(k)), zero)
            factor[i][k] = rest / factor[k][k]
    return jnp.stack([jnp.stack(row) for row in factor])


def solve_lower(factor: Array, right: Array) -> Array:
    """Solve ``factor x = right`` for lower-triangular factors, (q, q, J) and (q, k, J)."""
    q = factor.shape[0]
    if q > UNROLLED_ORDER:
        solution = solve_triangular(
            jnp.moveaxis(factor, -1, 0), jnp.moveaxis(right, -1, 0), lower=True
        )
        return jnp.moveaxis(solution, 0, -1)
    rows: list[Array] = []
    for i in range(q):
        rest = right[i] - sum((factor[i, j] * rows[j] for j in range(i)), jnp.zeros_like(right[i]))
        rows.append(rest / factor[i, i])
    return jnp.stack(rows)
