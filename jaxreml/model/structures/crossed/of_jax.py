"""`schur.solve` for JAX, with its derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model.covariance import natural
from jaxreml.model.structures.crossed import schur


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(layout, omega, A, C):
    """As `schur.solve`.

    The derivatives are written out in terms of R, so that they exist where Lambda's do not (a
    variance of zero) and cost a few products.
    """
    return schur.solve(layout, omega, A, C)


@solve.defjvp
@usual_arithmetic()
def _solve_jvp(layout, primals, tangents):
    omega, A, C = primals
    omega_dot, A_dot, C_dot = tangents
    solution = solve(layout, omega, A, C)
    R, modes = solution.inverse, solution.modes
    W, _ = schur.complements(layout, omega, A, R)
    moved = natural.symmetric_matrices(omega_dot, layout.sizes)
    cross = C - A @ modes
    step = C_dot - A_dot @ modes
    moved_cross = layout.times(cross.T, moved).T
    blocks = schur.inner_blocks(layout, omega, A, R)
    return solution, schur.Solution(
        layout.trace_blocks(blocks) @ omega_dot + jnp.sum(R * A_dot),
        layout.times(W, moved) @ W.T - R @ A_dot @ R,
        W @ moved_cross + R @ step,
        C_dot.T @ modes + modes.T @ step + cross.T @ moved_cross,
    )
