"""Degrees of freedom of the residual variance: of the chi-square that it is like.

With fitted values H y, H the hat matrix of the penalised least squares (random effects included),
the residuals are (I - H) y = P0 y, P0 free of X. RSS / sigma2 is approximately chi-square with
tr((I - H)'(I - H)) = tr(P0 P0) degrees of freedom, n - p without random effects; those of `dream`
(Hoffman and Roussos 2021, Bioinformatics 37:192; `rdf.merMod` of variancePartition).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model.design import Design
from jaxreml.model.objective import degrees_of_freedom, expand

Array = Any  # NumPy's or JAX's


def residual_degrees(theta: Array, design: Design) -> Array:
    """tr(P0 P0), at given variance parameters; the response does not matter.

    With P0 (I + G) P0 = P0 and G = sum omega_i V_i it is (n - p) - 2 tr(P0 G) + tr(P0 G P0 G), in
    which the traces are derivatives of log|V0| + log|X' V0^-1 X|, the second ones negative.

    Args:
        theta: (m,), relative Cholesky factors; the axis of lanes may follow, as in `design`.
        design: the data, or others with the same restricted likelihood.
    """
    xp = namespace(theta, design.residual_ss)
    omega = design.omega_of_theta(theta)
    degrees = degrees_of_freedom(design, reml=True)
    # Without the part of y, which counts as often as sigma2 goes into its residual sum of squares
    none = xp.full(omega.shape[1:], np.inf)
    found = expand(omega, design, reml=True, log_sigma2=none)
    first = xp.sum(omega * found.gradient, axis=0)
    second = xp.sum(omega * xp.sum(found.hessian * omega, axis=1), axis=0)
    return degrees - 2 * first - second
