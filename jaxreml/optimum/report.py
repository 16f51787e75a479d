"""`Estimate`: everything that follows from an optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, still
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Report
from jaxreml.model.design import Design
from jaxreml.model.objective import Expansion
from jaxreml.optimum import newton
from jaxreml.optimum.hessian import inertia
from jaxreml.optimum.search import Point, inner_hessian
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's


@record
@dataclass(frozen=True, repr=False)
class Estimate:
    """The optimum and what follows from it: a pytree of arrays, m variance parameters.

    Attributes:
        theta: (m,), relative Cholesky factors column by column, as lme4's.
        parameters: (m + 1,), log-variances and correlation coordinates in the order of
            ``design.parameter_names``; -inf for a variance of zero, +-inf for a correlation of
            +-1, NaN for a correlation that a zero variance leaves undefined.
        parameters_vcov: (m + 1, m + 1), asymptotic covariance 2 H^-1 of `parameters` given those
            on a boundary, whose rows are NaN; all NaN if the Hessian is not positive definite.
        log_variances: the log-variances among `parameters`, one per effect, the residual's last.
        log_variance_se: their standard errors.
        beta: (p,), fixed effects; NaN, as in what follows, for a column of a traced X that depends
            on those before it.
        vcov: (p, p), sigma2 (X' V0^-1 X)^-1, their covariance.
        vcov_slopes: (m + 1, p, p), derivatives of `vcov` in `parameters`, zero for those on a
            boundary: what Satterthwaite's degrees of freedom are made of.
        sigma: (), residual standard deviation.
        criterion: (), -2 log (restricted) likelihood at the optimum.
        hessian: (m + 1, m + 1), of the criterion in `parameters`; NaN as in `parameters_vcov`.
        n_iter: (), expansions of the criterion computed.
        gradient_norm: (), Euclidean norm of the gradient in the chart (scaled effects); without
            derivatives.
        inertia: (3,), negative, zero and positive eigenvalues of the Hessian in the chart
            (unstructured covariances: in theta).
        is_singular: (), whether a variance is zero or a correlation matrix has lost rank.
        status: (), a `Status`. Other than CONVERGED: do not use the numbers. The derivatives of
            all of them are zero there.

    Examples:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     found = jaxreml.estimate(design)
        >>> found
        <Estimate of 4 variance parameters and 2 fixed effects, criterion 1743.6283, ...
        >>> np.round(found.theta, 3), round(float(found.sigma), 2)
        (Array([0.967, 0.015, 0.231], dtype=float64), 25.59)
    """

    theta: Array
    parameters: Array
    parameters_vcov: Array
    log_variances: Array
    log_variance_se: Array
    beta: Array
    vcov: Array
    vcov_slopes: Array
    sigma: Array
    criterion: Array
    hessian: Array
    n_iter: Array
    gradient_norm: Array
    inertia: Array
    is_singular: Array
    status: Array

    @property
    def params(self) -> Array:
        """`parameters`, by its former name.

        Examples:
            >>> import jax
            >>> with jax.enable_x64(True):
            ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
            ...     found = jaxreml.estimate(design)
            >>> np.round(found.params, 2)
            Array([6.42, 3.56, 0.07, 6.48], dtype=float64)
        """
        return self.parameters

    def __repr__(self) -> str:
        """What it is, also of several designs, under `jit` and of a pytree of anything."""
        try:
            *several, parameters = np.shape(self.parameters)
            what = f"{parameters} variance parameters and {np.shape(self.beta)[-1]} fixed effects"
            of = f", of {' x '.join(map(str, several))} designs" if several else ""
        except (TypeError, ValueError, IndexError):
            return f"<Estimate of {type(self.parameters).__name__}>"
        try:
            status, criterion = np.asarray(self.status), np.asarray(self.criterion)
            if several:
                bad = int(np.sum(status != Status.CONVERGED))
                return f"<Estimate of {what}{of}, {bad} without an optimum>"
            ended = Status(int(status)).name.lower().replace("_", " ")
            return f"<Estimate of {what}, criterion {float(criterion):.4f}, {ended}>"
        except (TypeError, ValueError):  # traced: there are no numbers
            return f"<Estimate of {what}{of}, traced>"


def report(
    chart: Array, point: Point, trace: newton.Trace, design: Design, status: Array
) -> Estimate:
    """Everything that follows from the optimum; also for a batch on the last axis."""
    covariance, expansion = design.covariance, point.expansion
    xp = namespace(chart)
    chart = covariance.canonical(chart)
    of_x = _fixed_effects(expansion, design)
    inner = _variance_parameters(chart, expansion, of_x, design)
    users_chart, found = _in_users_units(chart, inner, expansion.log_sigma2, design)
    return _estimate(
        covariance.factors(users_chart),
        found,
        expansion,
        of_x,
        design,
        criterion=point.value,
        n_iter=trace.iterations,
        gradient_norm=xp.sqrt(xp.sum(still(point.gradient) ** 2, axis=0)),
        inertia=inertia(inner_hessian(chart, point, covariance)),
        status=status,
    )


def report_at(
    parameters: Array,
    bounds: Report,
    derivatives: tuple[Array, Array, Array],
    expansion: Expansion,
    design: Design,
    n_iter: Array,
    status: Array,
) -> Estimate:
    """The same at `parameters` (k + 1,) in the user's units, for a criterion with a penalty.

    Args:
        parameters: finite ones.
        bounds: which of them are free, and what is shown of the others.
        derivatives: Jacobian of (omega, log sigma2) in them, omega inside the design, and gradient
            and Hessian of the penalised criterion.
        expansion: of the criterion without the penalty.
        design: the data.
        n_iter, status: of the search.
    """
    xp, covariance = namespace(parameters), design.covariance
    jacobian, gradient, hessian = derivatives
    free = bounds.free
    of_x = _fixed_effects(expansion, design)
    shown = xp.where(free, parameters, bounds.shown)
    found = _curvature(free, shown, jacobian, hessian, expansion, of_x)
    both = free[:, None] & free
    return _estimate(
        covariance.factors_at(shown),
        found,
        expansion,
        of_x,
        design,
        criterion=expansion.value,
        n_iter=n_iter,
        gradient_norm=xp.sqrt(xp.sum(xp.where(free, still(gradient), 0.0) ** 2)),
        inertia=inertia(xp.where(both, hessian, linalg.eye_like(hessian))),
        status=status,
    )


def _estimate(
    factors: tuple[Array, ...],
    found: _Curvature,
    expansion: Expansion,
    of_x: _FixedEffects,
    design: Design,
    **given: Array,
) -> Estimate:
    """Of Cholesky factors and parameters in the user's units."""
    covariance, xp = design.covariance, namespace(found.shown)
    both = found.free[:, None] & found.free
    parameters_vcov = xp.where(both & found.regular, found.vcov, xp.nan)
    unknown = design.absent[:, None] | design.absent
    return Estimate(
        theta=natural.join_triangles(factors),
        parameters=found.shown,
        parameters_vcov=parameters_vcov,
        log_variances=found.shown[covariance.positions],
        log_variance_se=xp.sqrt(linalg.diagonal(parameters_vcov))[covariance.positions],
        beta=xp.where(design.absent, xp.nan, of_x.beta),
        vcov=xp.where(unknown, xp.nan, of_x.vcov),
        vcov_slopes=xp.where(unknown, xp.nan, found.vcov_slopes),
        sigma=xp.sqrt(xp.exp(expansion.log_sigma2)),
        hessian=xp.where(both, found.hessian, xp.nan),
        is_singular=~xp.all(found.free, axis=0),
        **given,
    )


class _FixedEffects(NamedTuple):
    """Coefficients (p,), a root (p, p) of their covariance over sigma2, and that covariance."""

    beta: Array
    root: Array
    vcov: Array


def _fixed_effects(expansion: Expansion, design: Design) -> _FixedEffects:
    """Undo the orthonormal basis and the least squares shift of y."""
    p, factor = design.p, expansion.gram_factor
    of_x = factor[:p, :p]
    identity = linalg.eye_like(of_x)
    triangle = linalg.transpose(design.basis) + design.absent * identity
    to_basis = linalg.solve_lower(triangle, identity)  # R^-T
    root = linalg.matmul(linalg.solve_lower(of_x, identity), to_basis)
    root = linalg.transpose(root)  # (L' R)^-1
    beta = design.beta_ols + linalg.matmul(root, factor[p, :p][:, None])[:, 0]
    vcov = namespace(root).exp(expansion.log_sigma2) * linalg.matmul(root, linalg.transpose(root))
    return _FixedEffects(beta, root, vcov)


class _Curvature(NamedTuple):
    """What the optimum's neighbourhood says of the variance parameters.

    Attributes:
        shown, free: as in `Report`.
        vcov: (k + 1, k + 1), 2 H^-1 of the free ones.
        hessian: (k + 1, k + 1), H.
        vcov_slopes: (k + 1, p, p), derivatives of the covariance of the fixed effects.
        regular: (), whether H is positive definite.
    """

    shown: Array
    free: Array
    vcov: Array
    hessian: Array
    vcov_slopes: Array
    regular: Array


def _variance_parameters(
    chart: Array, expansion: Expansion, of_x: _FixedEffects, design: Design
) -> _Curvature:
    """Parameters of scaled effects."""
    xp = namespace(chart)
    finite, free, shown = design.covariance.report(chart, expansion.log_sigma2)
    slopes = xp.concatenate([expansion.gradient, xp.zeros_like(expansion.gradient[:1])])
    jacobian, hessian = design.covariance.in_parameters(finite, slopes, expansion.joint_hessian)
    return _curvature(free, shown, jacobian, hessian, expansion, of_x)


def _curvature(
    free: Array,
    shown: Array,
    jacobian: Array,
    hessian: Array,
    expansion: Expansion,
    of_x: _FixedEffects,
) -> _Curvature:
    """Of the Jacobian of (omega, log sigma2) in parameters, and the Hessian in these."""
    xp, p = namespace(shown), len(of_x.vcov)
    across = linalg.transpose(of_x.root)
    sigma2 = xp.exp(expansion.log_sigma2)
    of_omega = [
        -sigma2 * linalg.matmul(of_x.root, linalg.matmul(slope, across))
        for slope in expansion.gram_slopes[:, :p, :p]
    ]
    of_all = xp.stack([*of_omega, of_x.vcov])
    vcov_slopes = xp.sum((jacobian * free)[:, :, None, None] * of_all[:, None], axis=0)
    both = free[:, None] & free
    identity = linalg.eye_like(hessian)
    # One more: a logarithm whose own entry is rounding error is not known, whatever its sign.
    unit = xp.sqrt(1 + xp.where(free, linalg.diagonal(hessian), 0.0))
    unit_hessian = xp.where(both, hessian / (unit[:, None] * unit), identity)
    unit_factor = linalg.cholesky(unit_hessian)
    # The pivot is NaN, and the comparison false, where the factorisation failed.
    regular = xp.min(linalg.diagonal(unit_factor), axis=0) ** 2 > linalg.negligible(
        linalg.FLAT, hessian.dtype
    )
    inverse = linalg.solve_lower(unit_factor, identity) / unit
    vcov = 2 * linalg.matmul(linalg.transpose(inverse), inverse)
    return _Curvature(shown, free, vcov, hessian, vcov_slopes, regular)


def _in_users_units(
    inner: Array, own: _Curvature, log_sigma2: Array, design: Design
) -> tuple[Array, _Curvature]:
    """A point of the chart and what is known of the parameters, for effects as the user has them.

    The gradient vanishes in what is free: derivatives change as tensors do.
    """
    covariance, units, xp = design.covariance, design.units, namespace(inner)
    chart = units.chart(inner, covariance)
    _, free, shown = covariance.report(chart, log_sigma2)
    theirs = own._replace(shown=shown, free=free)
    if not any(units.rotated):
        return chart, theirs
    out, back = units.jacobians(shown, own.shown, covariance)
    out = xp.where(free[:, None] & own.free, out, 0.0)
    back = xp.where(own.free[:, None] & free, back, 0.0)
    both = own.free[:, None] & own.free
    return chart, theirs._replace(
        vcov=_congruent(linalg.transpose(out), xp.where(both, own.vcov, 0.0)),
        hessian=_congruent(back, xp.where(both, own.hessian, 0.0)),
        vcov_slopes=xp.sum(back[:, :, None, None] * own.vcov_slopes[:, None], axis=0),
    )


def _congruent(matrix: Array, form: Array) -> Array:
    """matrix' form matrix."""
    return linalg.matmul(linalg.transpose(matrix), linalg.matmul(form, matrix))
