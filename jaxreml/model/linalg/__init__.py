"""Small matrices with the batch on the trailing axes: the only place that calls LAPACK.

A matrix that is not positive definite gives NaN, never an altered factor. NumPy's arrays are taken
by NumPy and LAPACK (`of_numpy`), JAX's by JAX (`of_jax`, which says why it never makes a batch of
LAPACK calls); what both do alike is in `plain`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model.linalg import of_numpy
from jaxreml.model.linalg.plain import (
    FLAT,
    block_diagonal,
    border,
    diagonal,
    eye_like,
    flat_inverse,
    lower,
    matmul,
    negligible,
    row_products,
    transpose,
)

__all__ = [
    "FLAT",
    "alike",
    "block_diagonal",
    "border",
    "cholesky",
    "cond",
    "conditional_variance",
    "diagonal",
    "eigh",
    "eye_like",
    "flat_inverse",
    "independent_columns",
    "inverse",
    "inverse_of_factor",
    "lower",
    "matmul",
    "mirrored",
    "negligible",
    "plus_identity",
    "qr",
    "residual",
    "row_products",
    "solve_lower",
    "solve_upper",
    "transpose",
    "whitening",
]
Array = Any  # NumPy's or JAX's


def _of(*arrays: Any) -> Any:
    if on_host(*arrays):
        return of_numpy
    from jaxreml.model.linalg import of_jax

    return of_jax


def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factors, (k, k, ...) to (k, k, ...). The upper triangle is not read."""
    return _of(matrix).cholesky(matrix)


def solve_lower(factor: Array, right: Array, transposed: bool = False) -> Array:
    """Solve ``factor x = right``, or ``factor' x = right`` if `transposed`, for lower-triangular
    (k, k, ...) and right (k, c, ...). The upper triangle is not read."""
    return _of(factor, right).solve_lower(factor, right, transposed)


def solve_upper(factor: Array, right: Array) -> Array:
    """Solve ``factor x = right`` for upper-triangular (k, k, ...) and right (k, c, ...)."""
    return solve_lower(transpose(factor), right, transposed=True)


def inverse(matrix: Array, definite: bool) -> tuple[Array, Array]:
    """Inverses of (k, k, ...) and the logarithms of their positive determinants, (...).

    Symmetric positive `definite`, by Cholesky factors, or not, by elimination with pivots.
    """
    return _of(matrix).inverse(matrix, definite)


def whitening(matrices: Array) -> tuple[Array, Array]:
    """L^-1 of matrices V = L L', the batch on the first axis, (B, k, k), and the sum of log|V|."""
    return _of(matrices).whitening(matrices)


def inverse_of_factor(factor: Array) -> Array:
    """(L L')^-1 for lower-triangular L, (k, k)."""
    return _of(factor).inverse_of_factor(factor)


def mirrored(triangle: Array) -> Array:
    """L + L' for lower-triangular L, (k, k), which may be overwritten."""
    return _of(triangle).mirrored(triangle)


def plus_identity(matrix: Array) -> Array:
    """M + I of (k, k), which may be overwritten."""
    return _of(matrix).plus_identity(matrix)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (k, ...), increasing, and eigenvectors (k, k, ...), the columns, of symmetric
    (k, k, ...)."""
    return _of(matrix).eigh(matrix)


def qr(matrix: Array) -> tuple[Array, Array]:
    """Q (n, p, ...) and R (p, p, ...) of (n, p, ...), p <= n; JAX's."""
    from jaxreml.model.linalg import of_jax

    return of_jax.qr(matrix)


def independent_columns(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """U R = X for X (n, p) of JAX, as `of_jax.independent_columns`."""
    from jaxreml.model.linalg import of_jax

    return of_jax.independent_columns(matrix, tolerance)


def residual(basis: Array, values: Array) -> tuple[Array, Array]:
    """What orthonormal U (n, p) leaves of (n, k), and the coefficients (p, k) of what it takes. Two
    passes, as the first leaves rounding of a large mean."""
    return _of(basis, values).residual(basis, values)


def alike(tree: Any, like: Array) -> Any:
    """`tree`, of the type that what depends on `like` has inside `jax.shard_map`."""
    return tree if on_host(like) else _of(like).alike(tree, like)


def cond(which: Any, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """The result of the first function where `which` holds, of the second elsewhere."""
    if on_host(which):
        return first() if which else second()
    return _of(which).cond(which, first, second)


def conditional_variance(factors: Array, root: Array) -> Array:
    """L (I + L'F'F L)^-1 L', (q, q, ...), for F (r, q, ...) and L (q, q)."""
    root = root.reshape(*root.shape, *[1] * (factors.ndim - 2))
    loadings = matmul(factors, root)
    inner = matmul(transpose(loadings), loadings)
    factor = cholesky(inner + eye_like(inner))
    across = namespace(root).broadcast_to(transpose(root), factor.shape)
    half = solve_lower(factor, across)
    return matmul(transpose(half), half)
