r"""log|I + Omega A| and R = (Omega^-1 + A)^-1 for a dense positive semidefinite A, any Omega.

Omega is block-diagonal (`Layout`) and may be singular. With Omega = Lambda Lambda' everything comes
from one Cholesky factorisation of S = I + Lambda' A Lambda. The derivatives are written out in
terms of R, so that they exist where Lambda's do not (a variance of zero) and cost a few products:

    d log|I + Omega A| = tr(B dOmega) + tr(R dA),   dR = W dOmega W' - R dA R,

with W = I - R A and B = A W = (I + A Omega)^-1 A.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxreml.backend.runtime import usual_promotion
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.factors import factor_semidefinite
from jaxreml.model.structures.layout import Layout

# Pivots of every Omega_k of at least this much make Omega^-1 safe to use, which saves products
# of the order of A.
REGULAR = 1e-3


class Solution(NamedTuple):
    """What `solve` returns.

    Attributes:
        logdet: log|I + Omega A|, ().
        inverse: R, (Q, Q).
        modes: R C, (Q, k).
        form: C'RC, (k, k).
    """

    logdet: Array
    inverse: Array
    modes: Array
    form: Array


def _roots(layout: Layout, omega: Array) -> tuple[Array, ...]:
    matrices = natural.symmetric_matrices(omega, layout.sizes)
    return tuple(factor_semidefinite(matrix, 0.0)[0] for matrix in matrices)


def _flip(matrices: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(matrix.T for matrix in matrices)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(layout: Layout, omega: Array, A: Array, C: Array) -> Solution:
    """Factorise and solve.

    Args:
        layout: of the Q effects.
        omega: (m,), lower triangles of Omega_k.
        A: (Q, Q), symmetric.
        C: (Q, k).
    """
    roots = _roots(layout, omega)
    identity = jnp.eye(len(A), dtype=A.dtype)
    across = _flip(roots)
    inside = identity + layout.times(layout.times(A, roots).T, roots)
    factor = linalg.cholesky(inside)
    half = linalg.solve_lower(factor, layout.times(C.T, roots).T)
    modes = layout.times(linalg.solve_lower(factor, half, transposed=True).T, across).T
    inverse = linalg.solve_lower(factor, linalg.solve_lower(factor, identity), transposed=True)
    inverse = layout.times(layout.times(inverse, across).T, across)
    logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    return Solution(logdet, inverse, modes, half.T @ half)


@solve.defjvp
@usual_promotion()
def _solve_jvp(layout, primals, tangents):
    omega, A, C = primals
    omega_dot, A_dot, C_dot = tangents
    solution = solve(layout, omega, A, C)
    R, modes = solution.inverse, solution.modes
    W, _ = complements(layout, omega, A, R)
    moved = natural.symmetric_matrices(omega_dot, layout.sizes)
    cross = C - A @ modes
    step = C_dot - A_dot @ modes
    moved_cross = layout.times(cross.T, moved).T
    return solution, Solution(
        layout.trace_blocks(inner_blocks(layout, omega, A, R)) @ omega_dot + jnp.sum(R * A_dot),
        layout.times(W, moved) @ W.T - R @ A_dot @ R,
        W @ moved_cross + R @ step,
        C_dot.T @ modes + modes.T @ step + cross.T @ moved_cross,
    )


def complements(layout: Layout, omega: Array, A: Array, R: Array) -> tuple[Array, Array]:
    """W = I - R A and B = A W, both (Q, Q): what is left of the identity, and of A."""
    inverses, regular = _inverses(layout, omega)
    identity = jnp.eye(len(A), dtype=A.dtype)

    def quick() -> tuple[Array, Array]:
        W = layout.times(R, inverses)
        return W, layout.times((identity - W).T, inverses).T

    def slow() -> tuple[Array, Array]:
        W = identity - R @ A
        B = A @ W
        return W, (B + B.T) / 2

    return linalg.cond(regular, quick, slow)


def inner_blocks(layout: Layout, omega: Array, A: Array, R: Array) -> list[Array]:
    """Diagonal blocks of B, per term (q, q, levels)."""
    inverses, regular = _inverses(layout, omega)

    def quick() -> list[Array]:
        found = []
        for block, inverse in zip(layout.blocks(R), inverses, strict=True):
            around = jnp.einsum("ab,bcj,cd->adj", inverse, block, inverse)
            found.append(inverse[:, :, None] - around)
        return found

    def slow() -> list[Array]:
        explained = layout.diagonal_blocks(A @ R, A)
        return [a - b for a, b in zip(layout.blocks(A), explained, strict=True)]

    return linalg.cond(regular, quick, slow)


def times_complement(layout: Layout, omega: Array, A: Array, product: Array, M: Array) -> Array:
    """M W for symmetric M, given `product` = M R."""
    inverses, regular = _inverses(layout, omega)
    return linalg.cond(regular, lambda: layout.times(product, inverses), lambda: M - product @ A)


def _inverses(layout: Layout, omega: Array) -> tuple[tuple[Array, ...], Array]:
    """Inverses of Omega_k, and whether all are safe to use."""
    pivots = [jnp.min(jnp.diagonal(root)) for root in _roots(layout, omega)]
    regular = jnp.min(jnp.stack(pivots)) ** 2 >= REGULAR
    matrices = natural.symmetric_matrices(omega, layout.sizes)
    eyes = [jnp.eye(q, dtype=omega.dtype) for q in layout.sizes]
    return tuple(
        linalg.inverse(jnp.where(regular, matrix, eye), True)[0]
        for matrix, eye in zip(matrices, eyes, strict=True)
    ), regular
