"""`estimate`: the optimum of a design's criterion, as a pure function of the design."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from jaxreml import covariance, newton
from jaxreml.designs import Design, require_precision
from jaxreml.objective import Expansion, expand

ZERO = 1e-4  # a relative SD below this, in units of scaled effects, is tried as exactly zero
LOG_ZERO = -100.0  # stands for log 0 in derivatives, which vanish there
FAR = 20.0  # stands for arctanh(+-1) likewise
FLAT = 1e-10  # of a Hessian with unit diagonal: below it a direction is not identified
PERFECT = 1e-26  # share of the sum of squares below which the residuals are rounding error


class Status(IntEnum):
    """How an optimisation ended; `sentence` says it in words."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    SADDLE = 3
    NOT_FINITE = 4
    PERFECT_FIT = 5
    NOT_CERTIFIED = 6
    CONSTANT = 7
    INFINITE = 8
    TOO_FEW_ROWS = 9

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "converged: the gradient is zero and the Hessian has no negative eigenvalue",
    Status.MAX_ITERATIONS: "the iteration limit was reached before the gradient vanished; raise "
    "max_iterations, or rescale or simplify the model",
    Status.STALLED: "no downhill step could be found although the gradient is not zero: the model "
    "may be badly scaled or nearly unidentified",
    Status.SADDLE: "the gradient is zero but the Hessian has a negative eigenvalue: this is a "
    "saddle point, not a minimum",
    Status.NOT_FINITE: "the criterion or its derivatives are not finite: the covariance matrix is "
    "not positive definite in floating point",
    Status.PERFECT_FIT: "the model fits the response perfectly: the residual variance is zero and "
    "the likelihood has no maximum",
    Status.NOT_CERTIFIED: "the separately compiled gradient at the reported optimum is not zero: "
    "the result is not trusted; please report it",
    Status.CONSTANT: "the response is constant: there is nothing to fit",
    Status.INFINITE: "the response has an infinite value; set it to NaN to leave its row out, or "
    "correct it",
    Status.TOO_FEW_ROWS: "the rows where the response is not missing are too few for the model: no "
    "more than the fixed or the random effects, or all in one level",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """The optimum and what follows from it: a pytree of arrays, m variance parameters.

    Attributes:
        theta: (m,), relative Cholesky factors column by column, as lme4's.
        params: (m + 1,), log-variances and correlation coordinates in the order of
            ``design.parameter_names``; -inf for a variance of zero, +-inf for a correlation of
            +-1, NaN for a correlation that a zero variance leaves undefined.
        params_vcov: (m + 1, m + 1), asymptotic covariance 2 H^-1 of `params` given the parameters
            on a boundary, whose rows are NaN; all NaN if the Hessian is not positive definite.
        log_variances: the log-variances among `params`, one per effect, the residual's last.
        log_variance_se: their standard errors.
        beta: (p,), fixed effects.
        vcov: (p, p), sigma2 (X' V0^-1 X)^-1, their covariance.
        vcov_slopes: (m + 1, p, p), derivatives of `vcov` in `params`, zero for those on a
            boundary: what Satterthwaite's degrees of freedom are made of.
        sigma: (), residual standard deviation.
        criterion: (), -2 log (restricted) likelihood at the optimum.
        hessian: (m + 1, m + 1), of the criterion in `params`; NaN as in `params_vcov`.
        iterations: (), expansions of the criterion computed.
        gradient_norm: (), Euclidean norm of the gradient in the root (scaled effects).
        inertia: (3,), negative, zero and positive eigenvalues of the Hessian in theta.
        is_singular: (), whether a variance is zero or a correlation matrix has lost rank.
        status: (), a `Status`. Other than CONVERGED: do not use the numbers.
    """

    theta: Array
    params: Array
    params_vcov: Array
    log_variances: Array
    log_variance_se: Array
    beta: Array
    vcov: Array
    vcov_slopes: Array
    sigma: Array
    criterion: Array
    hessian: Array
    iterations: Array
    gradient_norm: Array
    inertia: Array
    is_singular: Array
    status: Array


def is_reml(method: str) -> bool:
    """Whether `method` is "REML"; ValueError unless it is "REML" or "ML"."""
    if method not in ("REML", "ML"):
        raise ValueError(f'method must be "REML" or "ML", not {method!r}')
    return method == "REML"


def estimate(
    design: Design, method: str = "REML", *, max_iterations: int = 100, tolerance: float = 1e-12
) -> Estimate:
    """Fit a design by REML or ML.

    Pure: `jit`, `vmap` over stacked designs (`jaxreml.design.stack`), and derivatives to any order
    with respect to the design, by the implicit function theorem at the optimum. Fixed effects and
    residual variance are profiled out; the rest is a safeguarded Newton iteration with exact
    derivatives on square roots of the relative covariance matrices, which have no bounds: the
    criterion is even in each of their columns, and the Cholesky factor is taken at the end.

    Args:
        design: the data.
        method: "REML" or "ML".
        max_iterations: evaluations of the criterion with its derivatives.
        tolerance: of the Newton decrement, how far the criterion may be above its minimum.

    Returns:
        The estimate. Look at `status` before using it: nothing is raised on numerical trouble.

    Raises:
        ValueError: another method.
        PrecisionError: a float64 design with JAX set to float32.
    """
    reml = is_reml(method)
    require_precision(design)
    if design.dtype == "float32":
        tolerance = max(tolerance, 1e-5)
    return _estimate(design.without_names(), reml, max_iterations, tolerance)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _estimate(design: Design, reml: bool, max_iterations: int, tolerance: float) -> Estimate:
    trace = _search(jax.lax.stop_gradient(design), reml, tolerance, max_iterations)
    trace = jax.lax.stop_gradient(trace)
    root, point = _optimum(reml, design, trace.at, trace.point)
    return _report(root, point, trace, design)


class Point(NamedTuple):
    """The profiled criterion around one root (scaled effects).

    Attributes:
        value, gradient, hessian: in the root, of length r: (), (r,) and (r, r).
        expansion: the same in omega, and what it was made from.
    """

    value: Array
    gradient: Array
    hessian: Array
    expansion: Expansion


def expand_root(root: Array, design: Design, *, reml: bool) -> Point:
    """The profiled criterion with its derivatives in the root."""
    products = covariance.root_tensor(design.sizes)
    omega = jnp.einsum("ist,s,t->i", products.astype(root.dtype), root, root)
    expansion = expand(omega, design, reml=reml)
    return Point(expansion.value, *_chain(root, products, expansion), expansion)


def _chain(at: Array, products: np.ndarray, expansion: Expansion) -> tuple[Array, Array]:
    """Gradient and Hessian in coordinates that omega is quadratic in, by the chain rule."""
    tensor = jnp.asarray(products, at.dtype)
    half_jacobian = tensor @ at
    gradient = 2 * expansion.gradient @ half_jacobian
    curvature = 2 * jnp.tensordot(expansion.gradient, tensor, axes=1)
    hessian = 4 * half_jacobian.T @ expansion.hessian @ half_jacobian + curvature
    return gradient, (hessian + hessian.T) / 2


def _triangles(root: Array, sizes: covariance.Sizes, zero: float) -> tuple[Array, ...]:
    """Lower-triangular factors of a root's covariances, pivots of at most `zero` set to zero."""
    factors = []
    start = 0
    for q in sizes:
        square = root[start : start + q * q].reshape(q, q)
        factors.append(covariance.factor_semidefinite(square @ square.T, zero)[0])
        start += q * q
    return tuple(factors)


def _search(design: Design, reml: bool, tolerance: float, max_iterations: int) -> newton.Trace:
    sizes = design.sizes

    def snap(root: Array) -> Array:
        return jnp.concatenate([factor.ravel() for factor in _triangles(root, sizes, ZERO)])

    return newton.minimise(
        partial(expand_root, design=design, reml=reml),
        jnp.asarray(np.concatenate([np.eye(q).ravel() for q in sizes]), design.dtype),
        snap,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _optimum(reml: bool, design: Design, root: Array, point: Point) -> tuple[Array, Point]:
    """The optimum found, with the derivatives that it has as a function of the design.

    The gradient stays zero when the design changes, so d root = -H^-1 d gradient, with flat
    directions left where they are: rotations of the root, which do not move omega.
    """
    return root, point


@_optimum.defjvp
def _optimum_jvp(reml, primals, tangents):
    root, point = _optimum(reml, *primals)
    design, design_dot = primals[0], tangents[0]
    at = partial(expand_root, reml=reml)
    _, gradient_dot = jax.jvp(lambda design: at(root, design).gradient, (design,), (design_dot,))
    root_dot = -newton.solve_flat(at(root, design).hessian, gradient_dot)
    _, point_dot = jax.jvp(at, (root, design), (root_dot, design_dot))
    return (root, point), (root_dot, point_dot)


def _report(root: Array, point: Point, trace: newton.Trace, design: Design) -> Estimate:
    sizes = design.sizes
    p = design.p
    value, gradient, _, expansion = point
    # A pivot that the search set to zero comes back as rounding error; any other is kept.
    scaled = _triangles(root, sizes, math.sqrt(50 * jnp.finfo(root.dtype).eps))
    theta = covariance.join_triangles(scaled)
    _, hessian_theta = _chain(theta, covariance.theta_tensor(sizes), expansion)
    inertia = newton.inertia(hessian_theta)
    sigma2 = jnp.exp(expansion.log_sigma2)

    # Fixed effects: undo the orthonormal basis and the least squares shift of y.
    factor = expansion.gram_factor
    upper = factor[:p, :p].T @ design.basis
    beta = design.beta_ols + solve_triangular(
        design.basis, solve_triangular(factor[:p, :p], factor[p, :p], lower=True, trans=1)
    )
    root_vcov = solve_triangular(upper, jnp.eye(p, dtype=factor.dtype)) if p else upper
    vcov = sigma2 * root_vcov @ root_vcov.T

    # Variance parameters, in the user's units of the effects.
    factors = tuple(f / s[:, None] for f, s in zip(scaled, design.scales, strict=True))
    finite = covariance.params_from_factors(factors, expansion.log_sigma2, zero=LOG_ZERO, limit=FAR)
    free, shown = covariance.boundary(factors, finite, FAR)
    per_unit = jnp.append(covariance.relative_scale(design.scales), 1.0)
    slopes = jnp.append(expansion.gradient, 0.0) * per_unit
    curves = expansion.joint_hessian * per_unit[:, None] * per_unit
    jacobian, hessian = covariance.hessian_in_params(finite, slopes, curves, sizes)
    of_omega = -(root_vcov @ expansion.gram_slopes[:, :p, :p] @ root_vcov.T)
    of_all = sigma2 * jnp.concatenate([of_omega, (root_vcov @ root_vcov.T)[None]])
    vcov_slopes = jnp.einsum("is,iuv->suv", jacobian * per_unit[:, None] * free, of_all)
    both = free[:, None] & free
    identity = jnp.eye(free.size, dtype=hessian.dtype)
    unit = jnp.sqrt(jnp.where(free, jnp.diagonal(hessian), 1.0))
    root = jnp.linalg.cholesky(jnp.where(both, hessian / (unit[:, None] * unit), identity))
    regular = jnp.min(jnp.diagonal(root)) ** 2 > FLAT  # false where Cholesky gave NaN
    root = solve_triangular(root, identity, lower=True) / unit
    params_vcov = jnp.where(both & regular, 2 * root.T @ root, jnp.nan)
    positions, _ = covariance.positions(sizes)

    rss = factor[p, p] ** 2
    status = jnp.where(trace.converged, Status.CONVERGED, Status.MAX_ITERATIONS)
    status = jnp.where(trace.stalled, Status.STALLED, status)
    status = jnp.where(trace.converged & (inertia[0] > 0), Status.SADDLE, status)
    status = jnp.where(jnp.isfinite(value), status, Status.NOT_FINITE)
    perfect = ~(rss > PERFECT * design.residual_ss) | ~(
        design.residual_ss > PERFECT * design.total_ss
    )
    status = jnp.where(perfect, Status.PERFECT_FIT, status)
    return Estimate(
        theta=covariance.join_triangles(factors),
        params=shown,
        params_vcov=params_vcov,
        log_variances=shown[positions],
        log_variance_se=jnp.sqrt(jnp.diagonal(params_vcov))[positions],
        beta=beta,
        vcov=vcov,
        vcov_slopes=vcov_slopes,
        sigma=jnp.sqrt(sigma2),
        criterion=value,
        hessian=jnp.where(both, hessian, jnp.nan),
        iterations=trace.iterations,
        gradient_norm=jnp.linalg.norm(gradient),
        inertia=inertia,
        is_singular=~jnp.all(free),
        status=status.astype(jnp.int32),
    )
