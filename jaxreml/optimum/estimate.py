"""`estimate`: the optimum of a design's criterion, as a pure function of the design."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.arguments import is_reml
from jaxreml.backend.runtime import usual_promotion
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Covariance
from jaxreml.model.design import Design, perfect_share, require_precision
from jaxreml.model.objective import Expansion, degrees_of_freedom, expand, profiled
from jaxreml.optimum import newton
from jaxreml.optimum.rivals import best_of, is_cheap
from jaxreml.status import Status as Status

START = 0.1  # least relative SD to start from: zero is a stationary point
ZERO = 1e-4  # a relative SD below this, in units of scaled effects, is tried as exactly zero
NEARLY_PERFECT = 1e-10  # likewise, where the search did not converge


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
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
        iterations: (), expansions of the criterion computed.
        gradient_norm: (), Euclidean norm of the gradient in the chart (scaled effects).
        inertia: (3,), negative, zero and positive eigenvalues of the Hessian in the chart
            (unstructured covariances: in theta).
        is_singular: (), whether a variance is zero or a correlation matrix has lost rank.
        status: (), a `Status`. Other than CONVERGED: do not use the numbers. The derivatives of
            all of them are zero there.
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
    iterations: Array
    gradient_norm: Array
    inertia: Array
    is_singular: Array
    status: Array

    @property
    def params(self) -> Array:
        """`parameters`, by its former name."""
        return self.parameters


def estimate(
    design: Design, method: str = "REML", *, max_iterations: int = 100, tolerance: float = 1e-12
) -> Estimate:
    """Fit a design by REML or ML.

    Pure: `jit`, `vmap` over stacked designs (`jaxreml.stack`), and derivatives to any order
    with respect to the design, by the implicit function theorem at the optimum; they are zero where
    `status` is not CONVERGED, so that such a lane of a `vmap`, masked by its status, adds nothing
    to a derivative in what lanes share. Fixed effects and
    residual variance are profiled out; the rest is a safeguarded Newton iteration with exact
    derivatives on square roots of the relative covariance matrices, which have no bounds: the
    criterion is even in each of their columns, and the Cholesky factor is taken at the end. As
    there can be several optima, it starts from moment estimates and from k + 2 other places for k
    effects in all (`rivals.starts`), and takes the lowest; with more than 130,000 cross-products it
    compares the optimum with variances at zero only.

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
        RuntimeError: in a process that was forked after JAX had run, as `fit`.
    """
    reml = is_reml(method)
    require_precision(design)
    if design.dtype == "float32":
        tolerance = max(tolerance, 1e-5)
    return _estimate(design.without_names(), reml, max_iterations, tolerance)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _estimate(design: Design, reml: bool, max_iterations: int, tolerance: float) -> Estimate:
    with usual_promotion():
        fixed = jax.lax.stop_gradient(design)
        trace = best_of(
            lambda chart, limit: search(fixed, chart, reml, tolerance, limit),
            lambda chart: profiled(fixed.covariance.omega(chart), fixed, reml=reml),
            start(fixed, reml),
            design.covariance,
            max_iterations,
            cheap=is_cheap(design),
        )
        trace = jax.lax.stop_gradient(trace)
        status = outcome(trace.at, trace.point, trace, fixed)
        is_optimum = status == Status.CONVERGED
        design = _still_unless(is_optimum, design)
        chart, point = _optimum(reml, design, trace.at, trace.point)
        return _still_unless(is_optimum, report(chart, point, trace, design, status))


def _still_unless(condition: Array, tree: Any) -> Any:
    """The same numbers, with derivatives of zero unless the condition (a scalar) holds.

    Nothing on the way between two of these matters where it does not hold, NaN neither: a zero
    times NaN is left out by both, forwards by the second and backwards by the first.
    """
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jax.lax.stop_gradient(leaf)), tree)


class Point(NamedTuple):
    """The profiled criterion around one point of the covariance's chart.

    Attributes:
        value, gradient, hessian: in the chart, of length r: (), (r,) and (r, r).
        expansion: the same in omega, and what it was made from.
    """

    value: Array
    gradient: Array
    hessian: Array
    expansion: Any


@partial(jax.jit, static_argnames="reml")  # traced once for all its uses in a program
def expand_chart(chart: Array, design: Design, *, reml: bool, exact: Array | bool = True) -> Point:
    """The profiled criterion with its derivatives in the chart; `exact` as in `expand`."""
    covariance = design.covariance
    expansion = expand(covariance.omega(chart), design, reml=reml, exact=exact)
    slopes = covariance.chain(chart, expansion.gradient, expansion.hessian)
    return Point(expansion.value, *slopes, expansion)


def start(design: Design, reml: bool) -> Array:
    """Where to start from: the structure's moment estimates, or else `minimum_norm` ones.

    Variances that come out too small start from START squared.

    Returns:
        (r,), or (r, lanes) for a batch whose lanes share everything but the response.
    """
    relative = design.structure.start()
    if relative is None:
        relative = minimum_norm(design, reml)
    return design.covariance.start(relative, START)


def minimum_norm(design: Design, reml: bool) -> Array:
    """Minimum norm quadratic estimates of omega (Rao 1971, J. Multivariate Analysis 1:445), which
    are the REML estimates where the design is balanced; (m,) or (m, lanes).

    With q_i = y'P V_i P y and T_ij = tr(P V_i P V_j) at Omega = I, V_0 = I: T s = q for
    s = (sigma2 omega, sigma2). Everything follows from the derivatives of the criterion, as V is
    linear: q_i = -d_i rss, T_ij = -d_ij (log|V| + log|M|), and what belongs to V_0 from
    V = V_0 + sum omega_i V_i.
    """
    sizes, p = design.sizes, design.p
    lanes = design.residual_ss.ndim
    at = np.concatenate([np.equal(*natural.triangle(q)) for q in sizes]).astype(design.dtype)
    omega = jnp.asarray(at.reshape(-1, *[1] * lanes))
    # T belongs to the design: one lane, without the response, whose part has no degrees of freedom.
    blank: Any = replace(design, structure=None)  # pyright: ignore
    if lanes:
        blank = jax.tree.map(lambda leaf: leaf[..., :1], blank)
    structure: Any = design.structure
    blank = replace(blank, structure=structure.without_response())
    degrees = degrees_of_freedom(blank, reml=reml)
    expansion = expand(omega, replace(blank, n=blank.n - degrees), reml=reml)
    traces = -expansion.hessian.reshape(at.size, at.size)
    slope = expansion.gradient.reshape(-1)
    mixed = slope - traces @ at
    corner = jnp.reshape(degrees, ()) - at @ slope - at @ mixed
    traces = jnp.block([[traces, mixed[:, None]], [mixed[None], corner]])

    expansion = expand(omega, design, reml=reml)
    rss = expansion.gram_factor[p, p] ** 2
    forms = -expansion.gram_slopes[:, p, p] * rss
    forms = jnp.concatenate([forms, (rss - jnp.sum(omega * forms, axis=0))[None]])
    solution = newton.solve_flat(traces, forms)  # confounded terms share what is theirs
    sigma2 = jnp.maximum(solution[-1], 0.1 * rss / degrees)
    return solution[:-1] / sigma2


def search(
    design: Design,
    start: Array,
    reml: bool,
    tolerance: float,
    max_iterations: int | Array,
    *,
    radius: Array | None = None,
    careful: bool = False,
) -> newton.Trace:
    """The optimum of the profiled criterion in the chart; also for a batch on the last axis.

    A batch comes without the `Expansion`, which would be much to carry from step to step, and as
    `newton.minimise` says: not polished, and off saddle points only if `careful`.
    """
    lanes = start.ndim > 1
    covariance = design.covariance

    def at(chart: Array, exact: Array | bool = True) -> Point:
        point = expand_chart(chart, design, reml=reml, exact=exact)
        return point._replace(expansion=()) if lanes else point

    return newton.minimise(
        at,
        start,
        partial(covariance.snap, zero=ZERO),
        tolerance=tolerance,
        max_iterations=max_iterations,
        flat=covariance.flat,
        radius=radius,
        careful=careful,
        settled=partial(is_settled, covariance) if design.structure.costly else None,
    )


def is_settled(covariance: Covariance, chart: Array) -> Array:
    """Whether no variance is next to zero without being zero."""
    return jnp.all(covariance.snap(chart, ZERO) == covariance.canonical(chart))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _optimum(reml: bool, design: Design, chart: Array, point: Point) -> tuple[Array, Point]:
    """The optimum found, with the derivatives that it has as a function of the design.

    The gradient stays zero when the design changes, so d chart = -H^-1 d gradient, with flat
    directions left where they are: they do not move omega.
    """
    return chart, point


@_optimum.defjvp
@usual_promotion()
def _optimum_jvp(reml, primals, tangents):
    chart, point = _optimum(reml, *primals)
    design, design_dot = primals[0], tangents[0]
    at = partial(expand_chart, reml=reml)
    _, gradient_dot = jax.jvp(lambda design: at(chart, design).gradient, (design,), (design_dot,))
    chart_dot = -newton.solve_flat(at(chart, design).hessian, gradient_dot)
    _, point_dot = jax.jvp(at, (chart, design), (chart_dot, design_dot))
    return (chart, point), (chart_dot, point_dot)


def _congruent(matrix: Array, form: Array) -> Array:
    """matrix' form matrix."""
    return linalg.matmul(linalg.transpose(matrix), linalg.matmul(form, matrix))


def _inner_hessian(canonical: Array, point: Point, covariance: Covariance) -> Array:
    """The Hessian in the places of the chart that suffice at a `canonical` point."""
    expansion, inside = point.expansion, covariance.inside
    _, hessian = covariance.chain(canonical, expansion.gradient, expansion.hessian)
    return hessian[inside][:, inside]


def outcome(chart: Array, point: Point, trace: newton.Trace, design: Design) -> Array:
    """The `Status` of what a search found; also for a batch on the last axis."""
    hessian = _inner_hessian(design.covariance.canonical(chart), point, design.covariance)
    status = jnp.where(trace.converged, Status.CONVERGED, Status.MAX_ITERATIONS)
    status = jnp.where(trace.stalled, Status.STALLED, status)
    status = jnp.where(trace.converged & ~newton.is_convex(hessian), Status.SADDLE, status)
    status = jnp.where(jnp.isfinite(point.value), status, Status.NOT_FINITE)
    rss = point.expansion.gram_factor[design.p, design.p] ** 2
    residual_ss, total_ss = design.residual_ss, design.total_ss
    share = perfect_share(design.dtype)
    perfect = ~(rss > share * residual_ss) | ~(residual_ss > share * total_ss)
    # On the way there rounding may stop the search before.
    perfect = perfect | ((status != Status.CONVERGED) & (rss < NEARLY_PERFECT * residual_ss))
    status = jnp.where(perfect & jnp.isfinite(total_ss), Status.PERFECT_FIT, status)
    # Below the first of these a sum of squares has lost digits; with a total of more than the
    # second, that little is a perfect fit.
    number = jnp.finfo(design.dtype)
    least = float(number.tiny / number.eps)
    underflow = (residual_ss < least) & (total_ss < least / share)
    status = jnp.where(underflow, Status.UNDERFLOW, status)
    return jnp.where(design.trouble > 0, design.trouble, status).astype(jnp.int32)


def report(
    chart: Array, point: Point, trace: newton.Trace, design: Design, status: Array
) -> Estimate:
    """Everything that follows from the optimum; also for a batch on the last axis."""
    covariance, expansion = design.covariance, point.expansion
    chart = covariance.canonical(chart)
    of_x = _fixed_effects(expansion, design)
    inner = _variance_parameters(chart, expansion, of_x, design)
    users_chart, found = _in_users_units(chart, inner, expansion.log_sigma2, design)
    both = found.free[:, None] & found.free
    parameters_vcov = jnp.where(both & found.regular, found.vcov, jnp.nan)
    unknown = design.absent[:, None] | design.absent
    return Estimate(
        theta=natural.join_triangles(covariance.factors(users_chart)),
        parameters=found.shown,
        parameters_vcov=parameters_vcov,
        log_variances=found.shown[covariance.positions],
        log_variance_se=jnp.sqrt(linalg.diagonal(parameters_vcov))[covariance.positions],
        beta=jnp.where(design.absent, jnp.nan, of_x.beta),
        vcov=jnp.where(unknown, jnp.nan, of_x.vcov),
        vcov_slopes=jnp.where(unknown, jnp.nan, found.vcov_slopes),
        sigma=jnp.sqrt(jnp.exp(expansion.log_sigma2)),
        criterion=point.value,
        hessian=jnp.where(both, found.hessian, jnp.nan),
        iterations=trace.iterations,
        gradient_norm=jnp.sqrt(jnp.sum(point.gradient**2, axis=0)),
        inertia=newton.inertia(_inner_hessian(chart, point, covariance)),
        is_singular=~jnp.all(found.free, axis=0),
        status=status,
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
    vcov = jnp.exp(expansion.log_sigma2) * linalg.matmul(root, linalg.transpose(root))
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
    p, sigma2 = design.p, jnp.exp(expansion.log_sigma2)
    finite, free, shown = design.covariance.report(chart, expansion.log_sigma2)
    slopes = jnp.concatenate([expansion.gradient, jnp.zeros_like(expansion.gradient[:1])])
    jacobian, hessian = design.covariance.in_parameters(finite, slopes, expansion.joint_hessian)
    across = linalg.transpose(of_x.root)
    of_omega = [
        -sigma2 * linalg.matmul(of_x.root, linalg.matmul(slope, across))
        for slope in expansion.gram_slopes[:, :p, :p]
    ]
    of_all = jnp.stack([*of_omega, of_x.vcov])
    vcov_slopes = jnp.sum((jacobian * free)[:, :, None, None] * of_all[:, None], axis=0)
    both = free[:, None] & free
    identity = linalg.eye_like(hessian)
    # One more: a logarithm whose own entry is rounding error is not known, whatever its sign.
    unit = jnp.sqrt(1 + jnp.where(free, linalg.diagonal(hessian), 0.0))
    unit_hessian = jnp.where(both, hessian / (unit[:, None] * unit), identity)
    unit_factor = linalg.cholesky(unit_hessian)
    # The pivot is NaN, and the comparison false, where the factorisation failed.
    regular = jnp.min(linalg.diagonal(unit_factor), axis=0) ** 2 > linalg.FLAT
    inverse = linalg.solve_lower(unit_factor, identity) / unit
    vcov = 2 * linalg.matmul(linalg.transpose(inverse), inverse)
    return _Curvature(shown, free, vcov, hessian, vcov_slopes, regular)


def _in_users_units(
    inner: Array, own: _Curvature, log_sigma2: Array, design: Design
) -> tuple[Array, _Curvature]:
    """A point of the chart and what is known of the parameters, for effects as the user has them.

    The gradient vanishes in what is free: derivatives change as tensors do.
    """
    covariance, units = design.covariance, design.units
    chart = units.chart(inner, covariance)
    _, free, shown = covariance.report(chart, log_sigma2)
    theirs = own._replace(shown=shown, free=free)
    if not any(units.rotated):
        return chart, theirs
    out, back = units.jacobians(shown, own.shown, covariance)
    out = jnp.where(free[:, None] & own.free, out, 0.0)
    back = jnp.where(own.free[:, None] & free, back, 0.0)
    both = own.free[:, None] & own.free
    return chart, theirs._replace(
        vcov=_congruent(linalg.transpose(out), jnp.where(both, own.vcov, 0.0)),
        hessian=_congruent(back, jnp.where(both, own.hessian, 0.0)),
        vcov_slopes=jnp.sum(back[:, :, None, None] * own.vcov_slopes[:, None], axis=0),
    )
