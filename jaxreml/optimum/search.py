"""The search for the optimum of the profiled criterion, and what it ended in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.model import linalg
from jaxreml.model.basis import perfect_share
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.design import Design
from jaxreml.model.objective import degrees_of_freedom, expand, log_pivots, profiled
from jaxreml.optimum import newton
from jaxreml.optimum.hessian import is_convex, solve_flat
from jaxreml.optimum.rivals import best_of, is_cheap, is_proved
from jaxreml.status import Status as Status

Array = Any  # NumPy's or JAX's
START = 0.1  # least relative SD to start from: zero is a stationary point
SMALL = 0.01  # likewise, where another search than `search` ended
ZERO = 1e-4  # a relative SD below this, in units of scaled effects, is tried as exactly zero
NEARLY_PERFECT = 1e-10  # share of the residual sum of squares, where the search did not converge


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


def found(
    design: Design, reml: bool, max_iterations: int, tolerance: float
) -> tuple[newton.Trace, bool]:
    """The lowest optimum of a design that searches lead to, and on the host if it `is_proved`."""
    return best_of(
        lambda chart, limit, **ends: search(design, chart, reml, tolerance, limit, **ends),
        lambda chart: profiled(design.covariance.omega(chart), design, reml=reml),
        start(design, reml),
        design.covariance,
        max_iterations,
        cheap=is_cheap(design),
        proved=lambda trace: is_proved(design, design.covariance.omega(trace.at), reml=reml),
    )


def expand_chart(chart: Array, design: Design, *, reml: bool, exact: Array | bool = True) -> Point:
    """The profiled criterion with its derivatives in the chart; `exact` as in `expand`."""
    if on_host(chart):
        return _expand_chart(chart, design, reml=reml, exact=exact)
    return _traced_once()(chart, design, reml=reml, exact=exact)


def _expand_chart(chart: Array, design: Design, *, reml: bool, exact: Array | bool) -> Point:
    covariance = design.covariance
    expansion = expand(covariance.omega(chart), design, reml=reml, exact=exact)
    slopes = covariance.chain(chart, expansion.gradient, expansion.hessian)
    return Point(expansion.value, *slopes, expansion)


@lru_cache
def _traced_once() -> Any:
    """For all its uses in a program."""
    import jax

    return jax.jit(_expand_chart, static_argnames="reml")


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


def parameters_of(chart: Array, design: Design, reml: bool) -> Array:
    """Finite parameters (k + 1,) in the user's units of a point of the chart, with the residual
    variance that is best there."""
    covariance = design.covariance
    xp, chart = namespace(chart), covariance.canonical(chart)
    pivot = log_pivots(design.structure.marginal(covariance.omega(chart)))[-1]
    log_sigma2 = 2 * pivot - xp.log(degrees_of_freedom(design, reml=reml))
    return covariance.report(design.units.chart(chart, covariance), log_sigma2).finite


def chart_of(parameters: Array, design: Design) -> Array:
    """The point of the chart (r,) of finite parameters in the user's units."""
    covariance = design.covariance
    theta = natural.join_triangles(covariance.factors_at(parameters))
    return covariance.chart_at(design.scaled_factors(theta), parameters)


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
    xp = namespace(design.residual_ss)
    omega = xp.asarray(at.reshape(-1, *[1] * lanes))
    # T belongs to the design, without the response, whose part has no degrees of freedom: one lane
    # where lanes have one design.
    blank = design.blank()
    own = [] if blank.structure.lanes == (1,) else list(blank.structure.lanes)
    degrees = degrees_of_freedom(blank, reml=reml)
    expansion = expand(omega, replace(blank, n=blank.n - degrees), reml=reml)
    traces = -expansion.hessian.reshape(at.size, at.size, *own)
    slope = expansion.gradient.reshape(at.size, *own)
    mixed = slope - xp.tensordot(at, traces, axes=1)
    corner = xp.reshape(degrees, own) - at @ slope - at @ mixed
    traces = linalg.border(traces, mixed, corner)

    # Without second derivatives, which are not looked at
    expansion = expand(omega, design, reml=reml, exact=False)
    rss = expansion.gram_factor[p, p] ** 2
    forms = -expansion.gram_slopes[:, p, p] * rss
    forms = xp.concatenate([forms, (rss - xp.sum(omega * forms, axis=0))[None]])
    solution = solve_flat(traces, forms)  # confounded terms share what is theirs
    sigma2 = xp.maximum(solution[-1], 0.1 * rss / degrees)
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
    ends: Callable[[Array, Point], bool] | None = None,
) -> newton.Trace:
    """The optimum of the profiled criterion in the chart; also for a batch on the last axis.

    A batch comes without the `Expansion`, which would be much to carry from step to step, and as
    `newton.minimise` says: not polished, and off saddle points only if `careful`.
    """
    lanes = start.ndim > 1
    covariance = design.covariance

    def on(design: Design) -> Any:
        def at(chart: Array, exact: Array | bool = True) -> Point:
            point = expand_chart(chart, design, reml=reml, exact=exact)
            return point._replace(expansion=()) if lanes else point

        return at

    return newton.minimise(
        on(design),
        start,
        partial(covariance.snap, zero=ZERO),
        tolerance=tolerance,
        max_iterations=max_iterations,
        flat=covariance.flat,
        radius=radius,
        careful=careful,
        settled=partial(is_settled, covariance) if design.structure.costly else None,
        among=(lambda places: on(design.among(places))) if lanes else None,
        ends=ends,
        size=design.n,
    )


def is_settled(covariance: Covariance, chart: Array) -> Array:
    """Whether no variance is next to zero without being zero."""
    return namespace(chart).all(covariance.snap(chart, ZERO) == covariance.canonical(chart))


def inner_hessian(canonical: Array, point: Point, covariance: Covariance) -> Array:
    """The Hessian in the places of the chart that suffice at a `canonical` point."""
    expansion, inside = point.expansion, covariance.inside
    _, hessian = covariance.chain(canonical, expansion.gradient, expansion.hessian)
    return hessian[inside][:, inside]


def outcome(chart: Array, point: Point, trace: newton.Trace, design: Design) -> Array:
    """The `Status` of what a search found; also for a batch on the last axis."""
    hessian = inner_hessian(design.covariance.canonical(chart), point, design.covariance)
    return status_of(hessian, point, trace, design)


def status_of(hessian: Array, point: Any, trace: newton.Trace, design: Design) -> Array:
    """The `Status` of a search by the Hessian where it ended and a `point` there."""
    xp = namespace(hessian)
    status = xp.where(trace.converged, Status.CONVERGED, Status.MAX_ITERATIONS)
    status = xp.where(trace.stalled, Status.STALLED, status)
    status = xp.where(trace.converged & ~is_convex(hessian), Status.SADDLE, status)
    status = xp.where(xp.isfinite(point.value), status, Status.NOT_FINITE)
    rss = point.expansion.gram_factor[design.p, design.p] ** 2
    residual_ss, total_ss = design.residual_ss, design.total_ss
    share = perfect_share(design.dtype)
    perfect = ~(rss > share * residual_ss) | ~(residual_ss > share * total_ss)
    # On the way there rounding may stop the search before.
    perfect = perfect | ((status != Status.CONVERGED) & (rss < NEARLY_PERFECT * residual_ss))
    status = xp.where(perfect & xp.isfinite(total_ss), Status.PERFECT_FIT, status)
    # Below the first of these a sum of squares has lost digits; with a total of more than the
    # second, that little is a perfect fit.
    number = np.finfo(design.dtype)
    least = float(number.tiny / number.eps)
    underflow = (residual_ss < least) & (total_ss < least / share)
    status = xp.where(underflow, Status.UNDERFLOW, status)
    return xp.where(design.trouble > 0, design.trouble, status).astype(np.int32)
