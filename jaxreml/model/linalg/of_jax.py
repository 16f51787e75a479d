"""What of `linalg` is JAX's own: factorisations, their derivatives, conditions.

jaxlib (0.10.2) hands LAPACK calls for a batch of matrices to the threads that run programs, and
waits for them in one of these: when all wait, they wait for ever. A call for one matrix is made
where it stands. So no call here has a batch on a CPU: up to a certain order the recurrences are
written out over the trailing axes, which XLA fuses and vectorises; above it, where that would
compile slowly, matrices go to LAPACK one at a time, which takes no longer than their batch. `vmap`
of a function without trailing axes does the same.

A matrix that is not positive definite gives NaN, never an altered factor. Derivatives are written
out in terms of these functions, so that all this holds for them as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import solve_triangular

from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model.linalg.plain import (
    PIVOTED_ORDER,
    UNROLLED_ORDER,
    diagonal,
    eliminate,
    eye_like,
    lower,
    matmul,
    transpose,
    unrolled_cholesky,
    unrolled_solve,
)
from jaxreml.model.linalg.plain import residual as plain_residual


def alike(tree: Any, like: Array) -> Any:
    """`tree`, of the type that what depends on `like` has inside `jax.shard_map`: there constants
    are the same on all devices, and loops and solutions must not change their type."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    never = jnp.any(like < like)
    return jax.tree.map(lambda leaf: jnp.where(never, leaf, leaf), tree)


def cond(which: Any, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`jax.lax.cond`. Inside `jax.shard_map` both are computed, as `vmap` does: JAX (0.10.2) cannot
    map there what has constants inside."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.lax.cond(which, first, second)
    return jax.tree.map(partial(jnp.where, which), first(), second())


@jax.custom_jvp
def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factors, (k, k, ...) to (k, k, ...). The upper triangle is not read."""
    if not matrix.size:
        return matrix
    if matrix.ndim == 2 or len(matrix) > UNROLLED_ORDER:
        return _each(_cholesky, matrix)
    return unrolled_cholesky(matrix)


@cholesky.defjvp
@usual_arithmetic()
def _cholesky_jvp(primals, tangents):
    """dL = L P, with P the lower triangle of L^-1 dA L^-T, its diagonal halved."""
    factor = cholesky(*primals)
    below = lower(tangents[0])
    moved = below + transpose(below) - below * eye_like(below)
    inside = solve_lower(factor, transpose(solve_lower(factor, moved)))
    return factor, matmul(factor, lower(inside) - inside * eye_like(inside) / 2)


def solve_lower(factor: Array, right: Array, transposed: bool = False) -> Array:
    """Solve ``factor x = right``, or ``factor' x = right`` if `transposed`, for lower-triangular
    (k, k, ...) and right (k, c, ...). The upper triangle is not read."""
    lanes = jnp.broadcast_shapes(factor.shape[2:], right.shape[2:])
    right = jnp.broadcast_to(right, (*right.shape[:2], *lanes))
    if factor.ndim > 2 and len(factor) <= UNROLLED_ORDER:
        return unrolled_solve(factor, right, transposed)

    def product(x: Array) -> Array:
        triangle = lower(factor)
        return matmul(transpose(triangle) if transposed else triangle, x)

    return jax.lax.custom_linear_solve(
        product,
        alike(right, factor),
        lambda _, right: _substitute(factor, right, transposed),
        lambda _, right: _substitute(factor, right, not transposed),
    )


def inverse_of_factor(factor: Array) -> Array:
    """As `linalg.inverse_of_factor`."""
    half = solve_lower(factor, jnp.eye(len(factor), dtype=factor.dtype))
    return solve_lower(factor, half, transposed=True)


def whitening(matrices: Array) -> tuple[Array, Array]:
    """As `linalg.whitening`."""
    factors = cholesky(jnp.moveaxis(matrices, 0, -1))
    identity = jnp.broadcast_to(eye_like(factors), factors.shape)
    inverse = solve_lower(factors, identity)
    return jnp.moveaxis(inverse, -1, 0), 2 * jnp.sum(jnp.log(diagonal(factors)))


def mirrored(triangle: Array) -> Array:
    """As `linalg.mirrored`."""
    return triangle + triangle.T


def plus_identity(matrix: Array) -> Array:
    """As `linalg.plus_identity`."""
    return matrix + jnp.eye(len(matrix), dtype=matrix.dtype)


def _substitute(factor: Array, right: Array, transposed: bool) -> Array:
    """`solve_lower` for right with all lanes, without derivatives."""
    k = len(factor)
    if right.size and factor.size == k * k:  # the same in all lanes
        solved = _SOLVE[transposed](factor.reshape(k, k), right.reshape(k, -1))
        return solved.reshape(right.shape)
    if k > UNROLLED_ORDER:
        return _each(_SOLVE[transposed], factor, right)
    return unrolled_solve(factor, right, transposed)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse(matrix: Array, definite: bool) -> tuple[Array, Array]:
    """Inverses of (k, k, ...) and the logarithms of their positive determinants, (...).

    Symmetric positive `definite`, by Cholesky factors, or not, by elimination with pivots. The
    derivatives are written out, which keeps programs that differentiate twice small.
    """
    if len(matrix) == 1:
        return 1 / matrix, jnp.log(matrix[0, 0])
    if definite:
        factor = cholesky(matrix)
        half = solve_lower(factor, jnp.broadcast_to(eye_like(factor), factor.shape))
        logs = jnp.sum(jnp.log(diagonal(factor)), axis=0)
        return matmul(transpose(half), half), 2 * logs
    if matrix.ndim == 2 or len(matrix) > PIVOTED_ORDER:
        return _each(_inverse, matrix)
    return eliminate(matrix)


@inverse.defjvp
@usual_arithmetic()
def _inverse_jvp(definite, primals, tangents):
    inverted, logs = inverse(primals[0], definite)
    moved = matmul(inverted, tangents[0])
    return (inverted, logs), (-matmul(moved, inverted), jnp.sum(diagonal(moved), axis=0))


@jax.custom_jvp
def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (k, ...), increasing, and eigenvectors (k, k, ...), the columns, of symmetric
    (k, k, ...)."""
    if len(matrix) == 1:
        return matrix[0], jnp.ones_like(matrix)
    return _each(_eigh, matrix)


@eigh.defjvp
@usual_arithmetic()
def _eigh_jvp(primals, tangents):
    values, vectors = eigh(*primals)
    inside = matmul(transpose(vectors), matmul(tangents[0], vectors))
    identity = eye_like(inside)
    turns = (1 - identity) * inside / (values[None] - values[:, None] + identity)
    return (values, vectors), (diagonal(inside), matmul(vectors, turns))


@jax.custom_jvp
def qr(matrix: Array) -> tuple[Array, Array]:
    """Q (n, p, ...) and R (p, p, ...) of (n, p, ...), p <= n."""
    return _each(_qr, matrix)


@qr.defjvp
@usual_arithmetic()
def _qr_jvp(primals, tangents):
    """With M = dA R^-1 and the skew S that has the part of Q'M below its diagonal,
    dQ = M + Q (S - Q'M) and dR = (Q'M - S) R (Walter, Lehmann and Lamour 2012, Optim. Methods
    Softw. 27:829)."""
    basis, triangle = qr(*primals)
    moved = transpose(solve_lower(transpose(triangle), transpose(tangents[0])))
    inside = matmul(transpose(basis), moved)
    below = lower(inside) * (1 - eye_like(inside))
    rest = inside - below + transpose(below)
    return (basis, triangle), (moved - matmul(basis, rest), matmul(rest, triangle))


def _one_at_a_time(lanes: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of matrices one that never gets a batch: `vmap` calls `lanes`, the same
    function of matrices with trailing axes, instead."""

    def decorate(function: Callable[..., Any]) -> Any:
        single = custom_vmap(function)

        def rule(size: int, mapped: list[bool], *arrays: Array) -> tuple[Any, Any]:
            pairs = zip(arrays, mapped, strict=True)
            last = [jnp.moveaxis(a, 0, -1) if is_mapped else a[..., None] for a, is_mapped in pairs]
            found = jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), lanes(*last))
            return found, jax.tree.map(lambda _: True, found)

        single.def_vmap(rule)
        return single

    return decorate


def _each(function: Any, *matrices: Array) -> Any:
    """A function of `_one_at_a_time` for all lanes of its arguments."""
    lanes = jnp.broadcast_shapes(*(matrix.shape[2:] for matrix in matrices))
    if not lanes:
        return function(*matrices)
    full = [jnp.broadcast_to(matrix, (*matrix.shape[:2], *lanes)) for matrix in matrices]
    first = [jnp.moveaxis(matrix.reshape(*matrix.shape[:2], -1), -1, 0) for matrix in full]
    found = jax.lax.platform_dependent(
        *first,
        cpu=lambda *first: jax.lax.map(lambda own: function(*own), first),
        default=jax.vmap(function.fun),
    )
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1).reshape(*a.shape[1:], *lanes), found)


@_one_at_a_time(lambda matrix: cholesky(matrix))
def _cholesky(matrix: Array) -> Array:
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@_one_at_a_time(lambda factor, right: _substitute(factor, right, False))
def _solve(factor: Array, right: Array) -> Array:
    return solve_triangular(factor, right, lower=True)


@_one_at_a_time(lambda factor, right: _substitute(factor, right, True))
def _solve_transposed(factor: Array, right: Array) -> Array:
    return solve_triangular(factor, right, lower=True, trans=1)


_SOLVE = {False: _solve, True: _solve_transposed}


@_one_at_a_time(lambda matrix: inverse(matrix, False))
def _inverse(matrix: Array) -> tuple[Array, Array]:
    return jnp.linalg.inv(matrix), jnp.linalg.slogdet(matrix)[1]


@_one_at_a_time(lambda matrix: eigh(matrix))
def _eigh(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@_one_at_a_time(lambda matrix: qr(matrix))
def _qr(matrix: Array) -> tuple[Array, Array]:
    basis, triangle = jnp.linalg.qr(matrix)
    return basis, triangle


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def independent_columns(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """U R = X with orthonormal U (n, p) for X (n, p), zeros in both for columns that are dependent.

    A column counts as dependent if no more than `tolerance` of its length is outside the span of
    those before it. It is left out, of the derivatives too: those of U and R are what they are
    without it, and zero in it, where they do not exist. Values that are not finite count as zeros.

    By Gram-Schmidt, as LAPACK's QR factorisation puts an arbitrary direction in the place of a
    dependent column; twice is enough (Kahan, in Parlett 1980).
    """
    matrix = jnp.asarray(matrix)  # eager derivatives come with NumPy arrays

    def add_column(k: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, triangle = found
        rest = matrix[:, k]
        rest = jnp.where(jnp.isfinite(rest), rest, 0.0)
        size = jnp.max(jnp.abs(rest))
        size = jnp.where(size > 0, size, 1.0)
        rest = rest / size
        length = jnp.linalg.norm(rest)
        shares = rest @ basis  # basis.T would be a copy
        rest = rest - basis @ shares
        again = rest @ basis
        rest = rest - basis @ again
        pivot = jnp.linalg.norm(rest)
        kept = pivot > tolerance * length
        unit = jnp.where(kept, rest / jnp.where(kept, pivot, 1.0), 0.0)
        column = jnp.where(kept, (shares + again).at[k].set(pivot), 0.0)
        return basis.at[:, k].set(unit), triangle.at[:, k].set(column * size)

    p = matrix.shape[1]
    nothing = jnp.zeros_like(matrix), jnp.zeros((p, p), matrix.dtype)
    return jax.lax.fori_loop(0, p, add_column, nothing) if p else nothing


@independent_columns.defjvp
@usual_arithmetic()
def _independent_columns_jvp(tolerance, primals, tangents):
    basis, triangle = independent_columns(primals[0], tolerance)
    dependent = diagonal(triangle) == 0
    whole = triangle + jnp.diag(jnp.where(dependent, 1.0, 0.0))
    moved = jnp.where(dependent | ~jnp.isfinite(primals[0]), 0.0, tangents[0])
    moved = transpose(solve_lower(transpose(whole), transpose(moved)))  # dX R^-1
    within = basis.T @ moved
    turned = jnp.tril(within, -1)
    turned = turned - turned.T
    outside = moved - basis @ within
    return (basis, triangle), (basis @ turned + outside, (within - turned) @ triangle)


@jax.custom_jvp
def residual(basis: Array, values: Array) -> tuple[Array, Array]:
    """As `linalg.residual`. The derivatives, which hold for an orthonormal U only, are written out:
    they need no rows but U and what is left."""
    return plain_residual(basis, values)


@residual.defjvp
@usual_arithmetic()
def _residual_jvp(primals, tangents):
    basis, moved = primals[0], tangents[0]
    rest, shares = residual(*primals)
    own = tangents[1] - moved @ shares
    of_shares = basis.T @ own + moved.T @ rest
    return (rest, shares), (own - basis @ of_shares, of_shares)
