"""Kenward and Roger's adjusted covariance of the fixed effects and degrees of freedom, in arrays.

Kenward and Roger (1997, Biometrics 53:983) in the coordinates in which V is linear: with P_i and
Q_ij the first and halves of the second derivatives of X'V^-1 X in variances and covariances, W the
inverse of the expected information in them and Phi the covariance of the estimates, the adjusted
one is Phi + 2 Phi [sum W_ij (Q_ij - P_i Phi P_j - R_ij / 4)] Phi. R_ij, of second derivatives of V,
is zero in coordinates in which V is linear. For covariances that are not linear in what SAS and
others state, variances and correlations, it is not, and it depends on what is stated: the rest does
not. No n x n matrix occurs.

Where variances cannot be told apart the information is singular. In a flat direction d that leaves
X'V^-1 alone, Q_dd = 0, all P_d and Q_dj are zero and any generalised inverse gives the same
adjustment; in others there is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.information import of_relative

Array = Any  # NumPy's or JAX's
SINGULAR = 1e-12  # pivots of the information, relative to the size of V_i, that are zero
UNMOVED = 1e-10  # squared change along a flat direction, relative, that is rounding error
NONE = 1e-14  # pbkrtest: 0 / 0 is 1 there
VANISHING = 1e-10  # pbkrtest: factors of the scale this small are zero
NEAR_TWO = 1e-2  # pbkrtest: denominator degrees of freedom this near to 2 leave F unscaled


class Adjustment(NamedTuple):
    """The adjusted covariance, and what degrees of freedom are made from.

    Attributes:
        vcov: (p, p), adjusted.
        root: (p, p), K, with K K' the covariance that is not adjusted, over sigma2.
        slopes: (d + 1, p, p), K'P_i K in units of sigma2, in d directions of the random effects'
            covariance and the residual's.
        spread: (d + 1, d + 1), W in the same.
        exists: (), false where the adjustment depends on parameters that cannot be told apart.
    """

    vcov: Array
    root: Array
    slopes: Array
    spread: Array
    exists: Array


class Dialect(NamedTuple):
    """What a name of the argument `df` means.

    Attributes:
        observed: W is from the observed information, as SAS, JMP and R's mmrm have it, and not from
            the expected one, as Kenward and Roger's paper and pbkrtest.
        curved: with R_ij; without it is SAS's ``firstorder``.
    """

    observed: bool
    curved: bool


DIALECTS = {
    "kenward-roger": Dialect(observed=False, curved=True),
    "kenward-roger-sas": Dialect(observed=True, curved=True),
    "kenward-roger-linear": Dialect(observed=True, curved=False),
}


def adjust(
    theta: Array,
    parameters: Array,
    design: Design,
    vcov: Array | None = None,
    dialect: Dialect = DIALECTS["kenward-roger"],
) -> Adjustment:
    """The adjustment of a REML fit.

    V_0 = V / sigma2 = I + sum omega_i V_i is linear in its directions V_0 and V_i, and the
    adjustment but for R is the same for every basis of them. tr(P V_i P V_j) are minus the second
    derivatives of log|V_0| + log|M|; what belongs to V_0 follows from V_0^-1 V_0 = I. A covariance
    that is not free in all directions has fewer: combinations of the V_i.

    Args:
        theta: (m,), relative Cholesky factors; the axis of lanes may follow, as it does in the
            result and in `design`.
        parameters: (k + 1,), as in `Estimate`.
        design: the data; the response does not matter.
        vcov: (k + 1, k + 1), `Estimate.parameters_vcov`, where the information is the observed one.
        dialect: of `DIALECTS`.
    """
    xp, p = namespace(theta, design.residual_ss), design.p
    lanes = theta.shape[1:]
    # V is not linear in the omega of some structures: to first order they have one where it is.
    design = (design.collapsed if on_host(theta) else design).first_order
    omega = design.omega_of_theta(theta)
    found, information = of_relative(omega, design, reml=True)
    information = information / 2

    triangle = found.gram_factor[:p, :p]
    identity = linalg.eye_like(triangle)
    to_unit = linalg.transpose(linalg.solve_lower(triangle, identity))
    projection = design.structure.project(omega)
    none = np.zeros((1, p, *lanes), omega.dtype)
    within = design.structure.spread(projection, xp.concatenate([to_unit, none]))
    # In directions V_i, and V_0 last: P_i, information, and tr(Q_ij)
    own_first = found.gram_slopes[:, :p, :p]
    first = xp.concatenate([own_first, -xp.broadcast_to(identity, own_first[:1].shape)])
    mixed = -xp.einsum("iuu...->i...", own_first)
    traces = xp.einsum("iuju...->ij...", within)
    inside = linalg.border(traces, mixed, xp.full(lanes, p, omega.dtype))

    if dialect.observed:
        free, counts = _observed(parameters, design)
    else:
        free, counts = _directions(parameters, omega, design)
    across = linalg.transpose(free)
    slopes = xp.einsum("di...,iuv...->duv...", across, first)
    inside = linalg.matmul(across, linalg.matmul(inside, free))
    if not dialect.observed:
        information = linalg.matmul(across, linalg.matmul(information, free))
        # The squared size of a direction in the metric of V is that outside the space of X and
        # inside.
        sizes = linalg.diagonal(information + inside)
        sizes = xp.where(sizes > 0, sizes, 1.0)
        spread, flat = linalg.flat_inverse(information, sizes, SINGULAR)
        along = xp.sum(flat * linalg.matmul(inside, flat), axis=0)  # tr(Q_dd)
        bounds = xp.sum(xp.abs(flat) * xp.sqrt(sizes)[:, None], axis=0) ** 2
        exists = xp.all(along <= UNMOVED * bounds, axis=0)  # false where NaN
    else:
        known = xp.isfinite(parameters)
        spread = xp.where(known[:, None] & known, vcov, 0.0)
        exists = xp.all(xp.isfinite(spread), axis=(0, 1))

    # Sum of the spread times Q_ij
    weights = linalg.matmul(free, linalg.matmul(spread, across))
    among = xp.einsum("ij...,iujv...->uv...", weights[:-1, :-1], within)
    mixed = xp.einsum("j...,juv...->uv...", weights[-1, :-1] + weights[:-1, -1], own_first)
    second = among - mixed + weights[-1, -1] * identity

    squares = xp.einsum("ij...,iuw...,jwv...->uv...", spread, slopes, slopes)
    inner = second - squares
    if dialect.curved:
        finite = design.covariance.finite(parameters)
        bend = design.covariance.bend(finite, spread, counts)
        if bend is not None:  # R is minus the combination of P_i
            bend = _inside(bend[:, None], design)[:, 0]
            inner = inner + xp.einsum("i...,iuv...->uv...", bend, own_first) / 4
    root = linalg.solve_upper(design.basis, to_unit)
    vcov = identity + 2 * inner
    adjusted = linalg.matmul(root, linalg.matmul(vcov, linalg.transpose(root)))
    adjusted = xp.exp(parameters[-1]) * adjusted
    adjusted = (adjusted + linalg.transpose(adjusted)) / 2
    return Adjustment(adjusted, root, slopes, spread, exists)


def _observed(parameters: Array, design: Design) -> tuple[Array, list[int]]:
    """`_directions` in the parameters themselves, (m + 1, k + 1): derivatives of omega in scaled
    units and of log sigma2, zero for those on the boundary."""
    covariance, xp = design.covariance, namespace(parameters)
    m, lanes = natural.count_theta(design.sizes), parameters.shape[1:]
    none = np.zeros((m + 1, *lanes)), np.zeros((m + 1, m + 1, *lanes))
    found, _ = covariance.in_parameters(covariance.finite(parameters), *none)
    found = found * xp.isfinite(parameters)
    inner = linalg.matmul(design.units.of_omega(covariance), found[:-1])
    counts = [len(own) for _, own in covariance.own_parameters(parameters)]
    return xp.concatenate([inner, found[-1:]]), counts


def _directions(parameters: Array, omega: Array, design: Design) -> tuple[Array, list[int]]:
    """(m + 1, d + 1) combinations of the V_i and V_0: derivatives in what the covariance is free
    in, and in log sigma2, which for random effects is I. And how many are of each block."""
    xp, lanes = namespace(omega), omega.shape[1:]
    own, counts = design.covariance.directions(parameters)
    if own is None:
        own = xp.eye(len(omega), dtype=omega.dtype).reshape(
            len(omega), len(omega), *[1] * len(lanes)
        )
    else:
        own = _inside(own, design)
    own = xp.broadcast_to(own, (*own.shape[:2], *lanes))
    row = np.append(np.zeros(own.shape[1]), 1.0).reshape(1, -1, *[1] * len(lanes))
    row = xp.broadcast_to(xp.asarray(row, omega.dtype), (*row.shape[:2], *lanes))
    of_scale = design.covariance.of_scale(parameters, omega)
    return xp.concatenate([xp.concatenate([own, of_scale[:, None]], axis=1), row]), counts


def _inside(tangents: Array, design: Design) -> Array:
    """Relative covariances (m, d, ...) in the user's units in those of the design: terms whose
    covariance has no member for other units have the same."""
    blocks = design.covariance.blocks
    if not any(block.any_scale for block in blocks):
        return tangents
    return linalg.matmul(design.units.of_omega(design.covariance), tangents)


def single_degrees(adjustment: Adjustment, rows: Array) -> Array:
    """Denominator degrees of freedom (k, ...) of the t tests of (k, p) `rows`."""
    xp = namespace(rows, adjustment.root)
    half = xp.tensordot(rows, adjustment.root, axes=1)
    half = half / xp.sqrt(xp.sum(half**2, axis=1, keepdims=True))
    inner = xp.einsum("kp...,mpq...,kq...->mk...", half, adjustment.slopes, half)
    return 2 / xp.einsum("mn...,mk...,nk...->k...", adjustment.spread, inner, inner)


def joint_degrees(adjustment: Adjustment, rows: np.ndarray, q: int) -> tuple[float, float]:
    """Denominator degrees of freedom and the factor of F of the joint test of (k, p) `rows`, of
    which `q` are linearly independent; on the host.

    The formulae of pbkrtest (Halekoh and Hojsgaard 2014, J. Stat. Softw. 59(9), section 4.2).
    """
    half = np.linalg.svd((rows @ adjustment.root).T)[0][:, :q]  # its projection is Theta Phi
    inner = np.einsum("pa,mpq,qb->mab", half, adjustment.slopes, half)
    traces = np.einsum("maa->m", inner)
    a1 = float(traces @ adjustment.spread @ traces)
    a2 = float(np.einsum("mn,mab,nba->", adjustment.spread, inner, inner))
    if not (np.isfinite(a1) and a2 > 0):
        return (np.inf, 1.0) if a2 == 0 else (np.nan, np.nan)
    if q == 1:
        return 2 / a2, 1.0  # what the rest comes to
    b = (a1 + 6 * a2) / (2 * q)
    g = ((q + 1) * a1 - (q + 4) * a2) / ((q + 2) * a2)
    scale = 3 * q + 2 * (1 - g)
    c1, c2, c3 = g / scale, (q - g) / scale, (q + 2 - g) / scale
    v0, v1, v2 = (
        np.where(abs(v) < VANISHING, 0.0, v) for v in (1 + c1 * b, 1 - c2 * b, 1 - c3 * b)
    )
    rest = 1 - a2 / q
    ratio = 1.0 if max(abs(rest), abs(v1)) < NONE else rest / v1
    with np.errstate(divide="ignore"):
        rho = ratio**2 * v0 / v2 / q
    df = 4 + (q + 2) / (q * rho - 1)
    factor = 1.0 if abs(df - 2) < NEAR_TWO else df * (1 - a2 / q) / (df - 2)
    return float(df), float(factor)
