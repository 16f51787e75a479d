"""Kenward and Roger's adjusted covariance of the fixed effects, in arrays.

Kenward and Roger (1997, Biometrics 53:983) in the coordinates in which V is linear: with P_i and
Q_ij the first and halves of the second derivatives of X'V^-1 X in variances and covariances, W the
inverse of the expected information in them and Phi the covariance of the estimates, the adjusted
one is Phi + 2 Phi [sum W_ij (Q_ij - P_i Phi P_j)] Phi. No n x n matrix occurs.

Where variances cannot be told apart the information is singular. In a flat direction d that leaves
X'V^-1 alone, Q_dd = 0, all P_d and Q_dj are zero and any generalised inverse gives the same
adjustment; in others there is none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxreml.model import linalg
from jaxreml.model.covariance import unstructured
from jaxreml.model.design import Design
from jaxreml.model.objective import degrees_of_freedom, expand

SINGULAR = 1e-12  # pivots of the information, relative to the size of V_i, that are zero
UNMOVED = 1e-10  # squared change along a flat direction, relative, that is rounding error


class Adjustment(NamedTuple):
    """The adjusted covariance, and what degrees of freedom are made from.

    Attributes:
        vcov: (p, p), adjusted.
        root: (p, p), K, with K K' the covariance that is not adjusted, over sigma2.
        slopes: (m + 1, p, p), K'P_i K in units of sigma2.
        spread: (m + 1, m + 1), W in the same.
        exists: (), false where the adjustment depends on parameters that cannot be told apart.
    """

    vcov: Array
    root: Array
    slopes: Array
    spread: Array
    exists: Array


def adjust(theta: Array, sigma2: Array, design: Design) -> Adjustment:
    """The adjustment of a REML fit.

    V_0 = V / sigma2 = I + sum omega_i V_i is linear in its directions V_0 and V_i, and the
    adjustment is the same for every basis of them. tr(P V_i P V_j) are minus the second derivatives
    of log|V_0| + log|M|; what belongs to V_0 follows from V_0^-1 V_0 = I.

    Args:
        theta: (m,), relative Cholesky factors.
        sigma2: (), residual variance.
        design: the data; the response does not matter.
    """
    p = design.p
    triangles = unstructured.join_triangles(design.scaled_factors(theta))
    omega = unstructured.omega_from_theta(triangles, design.sizes)
    degrees = degrees_of_freedom(design, reml=True)
    # Without the part of y, which counts as often as there are degrees of freedom
    found = expand(omega, replace(design, n=design.n - degrees), reml=True)

    identity = jnp.eye(p, dtype=omega.dtype)
    slopes = jnp.concatenate([-identity[None], found.gram_slopes[:, :p, :p]])
    corner, side = jnp.reshape(degrees, (1, 1)), found.gradient[:, None]
    information = jnp.block([[corner, side.T], [side, -found.hessian]]) / 2
    triangle = found.gram_factor[:p, :p]
    to_unit = linalg.solve_lower(triangle, identity).T
    projection = design.structure.project(omega)
    within = design.structure.spread(projection, jnp.pad(to_unit, [(0, 1), (0, 0)]))

    # The squared size of V_i in the metric of V is that outside the space of X and that inside
    inside = jnp.concatenate([jnp.full(1, p, omega.dtype), jnp.einsum("iuiu->i", within)])
    sizes = jnp.diagonal(information) + inside
    spread, flat = linalg.flat_inverse(information, sizes, SINGULAR)

    def second(weights: Array) -> Array:
        """Sum of weights_ij Q_ij: directions V_i among themselves, then those with V_0."""
        inner = jnp.einsum("ij,iujv->uv", weights[1:, 1:], within)
        mixed = jnp.einsum("j,juv->uv", weights[0, 1:] + weights[1:, 0], slopes[1:])
        return inner - mixed + weights[0, 0] * identity

    along = jax.vmap(lambda direction: jnp.trace(second(jnp.outer(direction, direction))))(flat.T)
    bounds = (jnp.abs(flat.T) @ jnp.sqrt(sizes)) ** 2
    exists = jnp.all(along <= UNMOVED * bounds)  # false where NaN
    first = jnp.einsum("ij,iuw,jwv->uv", spread, slopes, slopes)
    root = linalg.solve_upper(jnp.asarray(design.basis), to_unit)
    vcov = sigma2 * root @ (identity + 2 * (second(spread) - first)) @ root.T
    return Adjustment((vcov + vcov.T) / 2, root, slopes, spread, exists)


def single_degrees(adjustment: Adjustment, rows: Array) -> Array:
    """Denominator degrees of freedom (k,) of the t tests of (k, p) `rows`."""
    half = rows @ adjustment.root
    half = half / jnp.linalg.norm(half, axis=1, keepdims=True)
    inner = jnp.einsum("kp,mpq,kq->mk", half, adjustment.slopes, half)
    return 2 / jnp.einsum("mn,mk,nk->k", adjustment.spread, inner, inner)
