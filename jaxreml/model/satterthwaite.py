"""Satterthwaite's degrees of freedom, of one fit (NumPy) or in lanes (JAX).

2 v^2 / (g' A g) with v the variance of a linear function of the fixed effects, g its derivatives in
the variance parameters and A their asymptotic covariance (Giesbrecht and Burns 1985, Biometrics
41:477). Where the criterion is flat in a combination of the parameters A does not exist; but if v
does not change along it either, as in (1 + f || g) with a factor f, whose random intercept is part
of f's effects, any generalised inverse of the Hessian gives the degrees of freedom of the model
without the superfluous parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreml.backend.arrays import namespace
from jaxreml.model.linalg import FLAT, flat_inverse

NOISE = 1e-5  # entries of the Hessian below FLAT times this are rounding error
UNMOVED = 1e-5  # relative change per unit of a flat direction that is rounding error


class Spread(NamedTuple):
    """What is known of m variance parameters.

    Attributes:
        vcov: (m, m, ...), a generalised inverse of half the Hessian.
        flat: (m, m, ...), directions in which the criterion is flat; columns of zeros besides.
    """

    vcov: Any
    flat: Any


def spread(hessian: Any) -> Spread:
    """From the criterion's Hessian (m, m, ...); rows of NaN, on the boundary, are held there."""
    xp = namespace(hessian)
    sizes = xp.stack([hessian[i, i] for i in range(len(hessian))])
    free = xp.isfinite(sizes)
    both = free[:, None] & free
    eye = xp.eye(len(hessian), dtype=hessian.dtype)
    eye = eye.reshape(*eye.shape, *[1] * (hessian.ndim - 2))
    # The logarithm of a variance that is next to zero has a tiny entry, of which digits are left.
    sizes = NOISE + xp.where(free, xp.abs(sizes), 0.0)
    inverse, flat = flat_inverse(xp.where(both, hessian, eye), sizes, FLAT)
    return Spread(xp.where(both, 2 * inverse, 0.0), flat)


def degrees(variance: Any, slopes: Any, known: Spread) -> Any:
    """Degrees of freedom, (k, ...), of functions with `variance` (k, ...).

    NaN for those whose variance changes in a flat direction.

    Args:
        variance: (k, ...).
        slopes: (m, k, ...), its derivatives in the variance parameters, zero on the boundary.
        known: of these parameters.
    """
    xp = namespace(variance, slopes)
    slopes = slopes / variance  # relative, so that no fourth power of the response's unit arises
    spread = xp.sum(slopes[:, None] * known.vcov[:, :, None] * slopes[None], axis=(0, 1))
    moved = xp.sum(slopes[:, None] * known.flat[:, :, None], axis=0)
    moves = xp.any(xp.abs(moved) > UNMOVED, axis=0)
    return xp.where(moves, xp.nan, 2 / spread)
