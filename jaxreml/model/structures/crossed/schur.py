r"""log|I + Omega A| and R = (Omega^-1 + A)^-1 for a dense positive semidefinite A, any Omega.

Omega is block-diagonal (`Layout`) and may be singular. With Omega = Lambda Lambda' everything comes
from one Cholesky factorisation of S = I + Lambda' A Lambda. The derivatives (`of_jax`) are products
with R:

    d log|I + Omega A| = tr(B dOmega) + tr(R dA),   dR = W dOmega W' - R dA R,

with W = I - R A and B = A W = (I + A Omega)^-1 A.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.factors import factor_semidefinite
from jaxreml.model.structures.layout import Layout

Array = Any  # NumPy's or JAX's
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


def solve(layout: Layout, omega: Array, A: Array, C: Array) -> Solution:
    """Factorise and solve.

    Args:
        layout: of the Q effects.
        omega: (m,), lower triangles of Omega_k.
        A: (Q, Q), symmetric.
        C: (Q, k).
    """
    roots, factor, half, logdet = _factorise(layout, omega, A, C)
    modes = linalg.solve_lower(factor, half, transposed=True)
    inverse = linalg.inverse_of_factor(factor)
    if roots is not None:
        across = tuple(root.T for root in roots)
        modes = layout.times(modes.T, across).T
        inverse = layout.times(layout.times(inverse, across).T, across)
    return Solution(logdet, inverse, modes, half.T @ half)


def reduce(layout: Layout, omega: Array, A: Array, C: Array) -> tuple[Array, Array]:
    """`Solution.logdet` and `form` alone."""
    _, _, half, logdet = _factorise(layout, omega, A, C)
    return logdet, half.T @ half


def _factorise(
    layout: Layout, omega: Array, A: Array, C: Array
) -> tuple[tuple[Array, ...] | None, Array, Array, Array]:
    """Lambda_k, the Cholesky factor L of S, L^-1 Lambda'C and the log-determinant.

    On the host with Omega^-1 + A in the place of S and the identity in that of Lambda, which is
    None then, where that is safe: passes over A take longer there than they do compiled.
    """
    if on_host(omega, A, C):
        inverses, regular = _inverses(layout, omega)
        if regular:
            factor = linalg.cholesky(layout.plus(A, inverses))
            logdet = _logdet(factor)
            matrices = natural.symmetric_matrices(omega, layout.sizes)
            for matrix, count in zip(matrices, layout.levels, strict=True):
                logdet = logdet + count * _logdet(linalg.cholesky(matrix))
            return None, factor, linalg.solve_lower(factor, C), logdet
    roots = _roots(layout, omega)
    inside = layout.times(layout.times(A, roots).T, roots)
    factor = linalg.cholesky(linalg.plus_identity(inside))
    half = linalg.solve_lower(factor, layout.times(C.T, roots).T)
    return roots, factor, half, _logdet(factor)


def _logdet(factor: Array) -> Array:
    xp = namespace(factor)
    return 2 * xp.sum(xp.log(xp.diagonal(factor)))


def complements(layout: Layout, omega: Array, A: Array, R: Array) -> tuple[Array, Array]:
    """W = I - R A and B = A W, both (Q, Q): what is left of the identity, and of A."""
    inverses, regular = _inverses(layout, omega)
    identity = namespace(A).eye(len(A), dtype=A.dtype)

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
            around = namespace(block, inverse).einsum("ab,bcj,cd->adj", inverse, block, inverse)
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
    xp = namespace(omega)
    pivots = [xp.min(xp.diagonal(root)) for root in _roots(layout, omega)]
    regular = xp.min(xp.stack(pivots)) ** 2 >= REGULAR
    matrices = natural.symmetric_matrices(omega, layout.sizes)
    eyes = [xp.eye(q, dtype=omega.dtype) for q in layout.sizes]
    return tuple(
        linalg.inverse(xp.where(regular, matrix, eye), True)[0]
        for matrix, eye in zip(matrices, eyes, strict=True)
    ), regular
