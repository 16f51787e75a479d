"""What is done with a chunk of responses, lanes last: by NumPy, or in the compiled `programs`.

1. `Lanes.reduce` brings the responses to cross-products, and `search.start` gives each lane its
   start, which is the optimum itself where the design is balanced.
2. `climb` finds the optima, in the spectral form where there is one variance ratio, or where a
   limited number of steps leads.
3. `screening` looks on a grid of covariances, the same for all responses, for other optima.
4. `conclude` evaluates the criterion of the full design at the roots found, with its derivatives,
   and what follows from them: the certificate and every number of a fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.many.contributions import Parts, contributions
from jaxreml.many.lanes import Lanes
from jaxreml.model import linalg, satterthwaite
from jaxreml.model.design import Design
from jaxreml.model.kenward_roger import DIALECTS, adjust, single_degrees
from jaxreml.model.objective import expand
from jaxreml.model.residual_degrees import residual_degrees
from jaxreml.model.response import Response
from jaxreml.model.units import Units
from jaxreml.optimum import newton
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import conditional_modes
from jaxreml.optimum.report import Estimate, report
from jaxreml.optimum.search import expand_chart, outcome, search
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's
TOLERANCE = 1e-12  # of the Newton decrement, as in `estimate`


class Plan(NamedTuple):
    """What programs are compiled for, besides shapes.

    Attributes:
        reml: REML or ML.
        grouped: whether there is one grouping factor.
        in_lanes: whether lanes are one design with a trailing axis (`Lanes.batch`), or
            designs for `vmap`.
        df: degrees of freedom of tests, as in `fit_many`.
        exact: as in `Lanes.reduce`.
        careful: as in `newton.minimise`.
    """

    reml: bool
    grouped: bool
    in_lanes: bool
    df: str = "satterthwaite"
    exact: bool = False
    careful: bool = False


class Found(NamedTuple):
    """What the search hands on, responses on the last axis; `newton.Trace` without its point."""

    root: Array
    value: Array
    iterations: Array
    converged: Array
    stalled: Array
    radius: Array


def searched(lanes: Lanes, reduced: Response, plan: Plan) -> Design:
    """The design whose criterion is minimised."""
    if lanes.spectral is not None:
        return lanes.rotated(reduced, reml=plan.reml)
    return lanes.batch(reduced)


def climb(design: Design, root: Array, radius: Array, limit: Array, plan: Plan) -> Found:
    """The optima, or where at most `limit` expansions from `root` lead."""
    trace = search(design, root, plan.reml, TOLERANCE, limit, radius=radius, careful=plan.careful)
    return Found(trace.at, trace.point.value, *trace[2:])


def conclude(
    design: Design,
    searched: Design,
    found: Found,
    before: Array,
    contrasts: Array,
    residual: Any,
    parts: Parts,
    plan: Plan,
) -> Array:
    """Everything at the roots found, (1 + R, lanes): status, then the fields of `numbers.Table`.

    Args:
        design: in full.
        searched: the one whose criterion was minimised.
        found: by `climb`.
        before: expansions in earlier passes; the last one is the one here.
        contrasts: (k, p).
        residual: degrees of freedom of residuals.
        parts: of the rows.
        plan: see there.
    """
    found = found._replace(iterations=before + found.iterations + 1)
    trace = newton.Trace(found.root, None, *found[2:])
    point = expand_chart(found.root, design, reml=plan.reml)
    status = outcome(found.root, point, trace, design)
    estimate = report(found.root, point, trace, design, status)
    blank = design.blank() if plan.df.startswith("kenward-roger") else None
    tests = tests_of(estimate, contrasts, plan.df, residual, blank)
    like = (searched if plan.reml else design).blank()  # the one searched costs less
    return pack(estimate, found.value, tests, of_rows(estimate, like, parts))


class Tests(NamedTuple):
    """Estimates, standard errors and degrees of freedom, (p + k, ...), of fixed effects and then
    contrasts."""

    estimates: Array
    errors: Array
    degrees: Array


def tests_of(
    estimate: Estimate, contrasts: Array, df: str, residual: Any, blank: Design | None
) -> Tests:
    """Tests of the coefficients and of (k, p) `contrasts`.

    Args:
        estimate: of one response, or of many on the last axis.
        contrasts: linear functions of the coefficients.
        df: degrees of freedom, as in `fit_many`.
        residual: those of residuals, rows less coefficients.
        blank: for Kenward-Roger's, the design with any response that X and Z do not explain, with
            the axis of lanes if the estimate has it.
    """
    p, xp = contrasts.shape[1], namespace(contrasts, estimate.beta)
    rows = xp.concatenate([np.eye(p, dtype=contrasts.dtype), contrasts])
    if blank is not None:
        return _kenward_roger_tests(blank, estimate, rows, df)
    tests = satterthwaite_tests(estimate, rows)
    if df == "satterthwaite":
        return tests
    count = residual if df == "residual" else np.inf
    return tests._replace(degrees=xp.full_like(tests.degrees, count))


def satterthwaite_tests(estimate: Estimate, rows: Array) -> Tests:
    """Tests of (k, p) `rows`; parameters on the boundary are held there."""
    xp = namespace(rows, estimate.beta)
    variance = _forms(rows, estimate.vcov)
    slopes = _forms(rows, estimate.vcov_slopes.swapaxes(0, 1).swapaxes(1, 2)).swapaxes(0, 1)
    df = satterthwaite.degrees(variance, slopes, satterthwaite.spread(estimate.hessian))
    estimates = xp.tensordot(rows, estimate.beta, axes=1)
    return Tests(estimates, xp.sqrt(variance), df)


def _forms(rows: Array, matrices: Array) -> Array:
    """row' matrix row of (k, p) rows, (k, ...), for matrices (p, p, ...)."""
    p = rows.shape[1]
    flat = matrices.reshape(p * p, *matrices.shape[2:])
    squares = (rows[:, :, None] * rows[:, None]).reshape(len(rows), p * p)
    return namespace(squares, flat).tensordot(squares, flat, axes=1)


def _kenward_roger_tests(blank: Design, estimate: Estimate, rows: Array, df: str) -> Tests:
    xp = namespace(rows, estimate.beta)
    arrays = estimate.theta, estimate.parameters, blank, estimate.parameters_vcov
    adjustment = adjust(*arrays, DIALECTS[df])
    exist = adjustment.exists
    variance = xp.where(exist, _forms(rows, adjustment.vcov), np.nan)
    degrees = xp.where(exist, single_degrees(adjustment, rows), np.nan)
    return Tests(xp.tensordot(rows, estimate.beta, axes=1), xp.sqrt(variance), degrees)


class OfRows(NamedTuple):
    """What the rows make of a fit; see `Fits`."""

    residual_df: Array
    contributions: Array
    contributions_cov: Array


def of_rows(estimate: Estimate, design: Design, parts: Parts) -> OfRows:
    """Residual degrees of freedom and contributions to the variance of a row.

    Args:
        estimate: of one response, or of many on the last axis.
        design: theirs, or another with the same restricted likelihood, as `residual_degrees`.
        parts: of the rows.
    """
    if design.covariance.random.all():
        residual_df = residual_degrees(estimate.theta, design)
    else:  # there is no one residual variance
        residual_df = np.nan * estimate.sigma
    return OfRows(residual_df, *contributions(estimate, parts, design.covariance))


def pack(estimate: Estimate, value: Array, tests: Tests, rows: OfRows) -> Array:
    """Numbers and certified status of fits, (1 + R, lanes); `value` as the search found it."""
    xp = namespace(value)
    certified = is_certified(value, estimate.criterion, estimate.gradient_norm)
    converged = estimate.status == Status.CONVERGED
    status = xp.where(converged & ~certified, Status.NOT_CERTIFIED, estimate.status)
    p = len(estimate.beta)
    one = xp.ones_like(value)[None]
    return xp.concatenate(
        [
            status * one,
            *(array[:p] for array in tests[:3]),
            estimate.sigma * one,
            rows.residual_df * one,
            estimate.theta,
            estimate.parameters,
            xp.sqrt(linalg.diagonal(estimate.parameters_vcov)),
            estimate.criterion * one,
            estimate.gradient_norm * one,
            estimate.n_iter * one,
            estimate.is_singular * one,
            rows.contributions,
            rows.contributions_cov,
            *(array[p:] for array in tests[:3]),
        ]
    )


def objective_gradients(parameters: Array, design: Design, units: Units, *, reml: bool) -> Array:
    """The gradient (m + 1, ...) of the objective at (m + 1,) parameters, on NumPy; lanes last.
    `units` are the design's, which has lanes of them."""
    covariance = design.covariance
    lanes = [1] * design.residual_ss.ndim
    omega, log_sigma2 = units.omega(parameters, covariance)
    at = omega.reshape(-1, *lanes), log_sigma2.reshape(lanes)
    slopes = expand(at[0], design, reml=reml, log_sigma2=at[1]).joint_gradient
    zeros = np.zeros(omega.size + 1)
    jacobian, _ = covariance.in_parameters(parameters, zeros, np.diag(zeros))
    inside = units.of_omega(covariance)
    in_parameters = np.concatenate([inside.T @ slopes[:-1], slopes[-1:]])
    return jacobian.T @ in_parameters


def modes_of(lanes: Lanes, values: Array, shift: Array, root: Array) -> tuple[Array, ...]:
    """Conditional modes, per term (levels, effects, lanes): no level is collapsed here."""
    lanes = lanes.plain
    design = lanes.batch(lanes.reduce(values, shift, exact=True))
    modes = conditional_modes(design.covariance.omega(root), design)
    return lanes.basis.projector.of_levels(modes)
