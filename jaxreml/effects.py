"""Conditional modes of the random effects, and the certificate of an optimum."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from jaxreml import covariance
from jaxreml.designs import Design
from jaxreml.estimation import Estimate, is_reml
from jaxreml.objective import profiled


class Inspection(NamedTuple):
    """What a fit reports beyond its `Estimate`.

    Attributes:
        criterion: (), by the objective alone.
        gradient: (m,), of the objective in theta (scaled effects) by reverse-mode autodiff.
        modes: per term (levels, effects), conditional modes of the random effects given y,
            Omega Z' V0^-1 (y - X beta) (best linear unbiased predictors).
        posterior: what `conditional_variances` makes their variances from.
    """

    criterion: Array
    gradient: Array
    modes: tuple[Array, ...]
    posterior: Any


def inspect(estimate: Estimate, design: Design, method: str) -> Inspection:
    """Conditional modes at an estimate, and its criterion and gradient by another route.

    A program of its own, compiled apart from `estimate`: it computes derivatives by reverse-mode
    autodiff through `Structure.marginal` where `estimate` uses closed forms through
    `Structure.project`. An estimate whose gradient is not zero here was miscompiled.
    """
    return _inspect(estimate, design.without_names(), is_reml(method))


@partial(jax.jit, static_argnums=2)
def _inspect(estimate: Estimate, design: Design, reml: bool) -> Inspection:
    factors = _scaled_factors(estimate, design)
    value, gradient = criterion(estimate, design, reml)
    omega = covariance.omega_from_theta(covariance.join_triangles(factors), design.sizes)
    posterior = design.structure.posterior(omega, factors)
    return Inspection(value, gradient, conditional_modes(omega, design), posterior)


def criterion(estimate: Estimate, design: Design, reml: bool) -> tuple[Array, Array]:
    """The objective at an estimate and its gradient in theta, as in `Inspection`."""
    theta = covariance.join_triangles(_scaled_factors(estimate, design))

    def objective(theta: Array) -> Array:
        omega = covariance.omega_from_theta(theta, design.sizes)
        return profiled(omega, design, reml=reml)

    return jax.value_and_grad(objective)(theta)


def _scaled_factors(estimate: Estimate, design: Design) -> tuple[Array, ...]:
    """Relative Cholesky factors in scaled units."""
    factors = covariance.split_triangles(estimate.theta, design.sizes)
    return tuple(f * s[:, None] for f, s in zip(factors, design.scales, strict=True))


def conditional_variances(
    estimate: Estimate, inspection: Inspection, design: Design
) -> tuple[np.ndarray, ...]:
    """Per term (levels, effects, effects), Var(b | y) given the parameters. On the host."""
    relative = design.structure.variances(inspection.posterior)
    sigma2 = float(estimate.sigma) ** 2
    return tuple(
        sigma2 * variance / np.outer(scale, scale)
        for variance, scale in zip(relative, design.scales, strict=True)
    )


def conditional_modes(omega: Array, design: Design) -> tuple[Array, ...]:
    """Per term (levels, effects), Omega Z' V0^-1 (y - X beta) at relative covariances `omega`."""
    p = design.p
    projection = design.structure.project(omega)
    factor = jnp.linalg.cholesky(projection.gram)
    # In the orthonormal basis, on top of what `beta_ols` explains
    beta = solve_triangular(factor[:p, :p].T, factor[p, :p]) if p else factor[p, :p]
    residual = jnp.append(-beta, 1.0)[:, None]
    cross = design.structure.combine(projection.cross, residual)
    modes = design.structure.modes(omega, cross)
    return tuple(mode / scale for mode, scale in zip(modes, design.scales, strict=True))
