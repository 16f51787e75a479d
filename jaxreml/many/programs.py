"""The compiled programs of `fit_many`: what is done with a chunk of responses, lanes last.

1. `begin` reduces the responses to cross-products and gives each lane its start, which is the
   optimum itself where the design is balanced.
2. `climb` finds the optima, all lanes in step, in the spectral form where there is one variance
   ratio, or where a limited number of steps leads.
3. `screen` looks on a grid of covariances, the same for all responses, for other optima.
4. `conclude` evaluates the criterion of the full design at the roots found, with its derivatives,
   and what follows from them: the certificate and every number of a fit.

They are compiled apart, so that the certificate is not the search's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreml.backend.compilation import quick_compilation, remembered
from jaxreml.many.lanes import Lanes
from jaxreml.many.screening import grid
from jaxreml.model import linalg, satterthwaite
from jaxreml.model.design import Design
from jaxreml.model.kenward_roger import adjust, single_degrees
from jaxreml.model.objective import profiled
from jaxreml.model.response import Response
from jaxreml.optimum import newton
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import conditional_modes
from jaxreml.optimum.report import Estimate, report
from jaxreml.optimum.search import expand_chart, outcome, search, start
from jaxreml.status import Status

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


def _begin(
    lanes: Lanes, values: Array, shift: Array, *, plan: Plan
) -> tuple[Response, Array, Array]:
    """Reduce a chunk, (groups, n, lanes), and find where to start.

    The rows of one group at a time fit into the cache; all that follows takes them together.
    """
    groups = jax.lax.map(lambda group: lanes.reduce(*group, exact=plan.exact), (values, shift))
    reduced = jax.tree.map(_merge, groups)
    if plan.in_lanes:
        root = start(_searched(lanes, reduced, plan), plan.reml)
    else:
        root = _per_lane(lambda reduced: start(lanes.each(reduced), plan.reml))(reduced)
    return reduced, root, jnp.ones_like(reduced.residual_ss)


def _merge(groups: Array) -> Array:
    """(groups, ..., lanes) to (..., groups * lanes)."""
    moved = jnp.moveaxis(groups, 0, -2)
    return moved.reshape(*moved.shape[:-2], moved.shape[-2] * moved.shape[-1])


def _searched(lanes: Lanes, reduced: Response, plan: Plan) -> Design:
    """The design whose criterion is minimised."""
    if lanes.spectral is not None:
        return lanes.rotated(reduced, reml=plan.reml)
    return lanes.batch(reduced)


def _climb(
    lanes: Lanes, reduced: Response, root: Array, radius: Array, limit: Array, *, plan: Plan
) -> Found:
    """The optima, or where at most `limit` expansions from `root` lead."""

    def climb(design: Design, root: Array, radius: Array) -> Found:
        trace = search(
            design, root, plan.reml, TOLERANCE, limit, radius=radius, careful=plan.careful
        )
        return Found(trace.at, trace.point.value, *trace[2:])

    if plan.in_lanes:
        return climb(_searched(lanes, reduced, plan), root, radius)
    each = _per_lane(lambda reduced, *state: climb(lanes.each(reduced), *state))
    return each(reduced, root, radius)


def _screen(lanes: Lanes, reduced: Response, *, plan: Plan) -> Array:
    """The criterion on the `screening.grid`, (G, lanes); not for lanes in step."""
    omegas = lanes.covariance.omega(jnp.asarray(grid(lanes.covariance)[0].T))

    def at(omega: Array) -> Array:
        return _per_lane(lambda own: profiled(omega, lanes.each(own), reml=plan.reml))(reduced)

    return jax.lax.map(at, omegas.T)


def _along(lanes: Lanes, reduced: Response, omegas: Array, *, plan: Plan) -> Array:
    """The criterion at points (k, m, lanes) of each response, (k, lanes)."""
    if plan.in_lanes:
        design = _searched(lanes, reduced, plan)
        return jax.lax.map(lambda omega: profiled(omega, design, reml=plan.reml), omegas)

    def at(omega: Array) -> Array:
        each = _per_lane(
            lambda own, own_omega: profiled(own_omega, lanes.each(own), reml=plan.reml)
        )
        return each(reduced, omega)

    return jax.lax.map(at, omegas)


def _conclude(
    lanes: Lanes,
    reduced: Response,
    found: Found,
    before: Array,
    contrasts: Array,
    *,
    plan: Plan,
) -> Array:
    """Everything at the roots found, (1 + R, lanes): status, then the fields of `numbers.Table`.

    `before` are expansions in earlier passes; the last one is the one here. `contrasts` are (k, p).
    """

    def conclude(design: Design, found: Found, before: Array) -> Array:
        found = found._replace(iterations=before + found.iterations + 1)
        trace = newton.Trace(found.root, None, *found[2:])
        point = expand_chart(found.root, design, reml=plan.reml)
        status = outcome(found.root, point, trace, design)
        estimate = report(found.root, point, trace, design, status)
        blank = lanes.blank() if plan.df.startswith("kenward-roger") else None
        residual = lanes.basis.n - lanes.p
        tests = tests_of(estimate, contrasts, plan.df, residual, blank)
        return pack(estimate, found.value, tests)

    if plan.in_lanes:
        return conclude(lanes.batch(reduced), found, before)
    each = _per_lane(lambda reduced, *rest: conclude(lanes.each(reduced), *rest))
    return each(reduced, found, before)


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
        blank: for Kenward-Roger's, the design with any response that X and Z do not explain.
    """
    p = contrasts.shape[1]
    rows = jnp.concatenate([jnp.eye(p, dtype=contrasts.dtype), contrasts])
    if blank is not None:
        return _kenward_roger_tests(blank, estimate, rows)
    tests = satterthwaite_tests(estimate, rows)
    if df == "satterthwaite":
        return tests
    count = residual if df == "residual" else jnp.inf
    return tests._replace(degrees=jnp.full_like(tests.degrees, count))


def satterthwaite_tests(estimate: Estimate, rows: Array) -> Tests:
    """Tests of (k, p) `rows`; parameters on the boundary are held there."""
    variance = jnp.einsum("kp,pq...,kq->k...", rows, estimate.vcov, rows)
    slopes = jnp.einsum("kp,mpq...,kq->mk...", rows, estimate.vcov_slopes, rows)
    df = satterthwaite.degrees(variance, slopes, satterthwaite.spread(estimate.hessian))
    estimates = jnp.tensordot(rows, estimate.beta, axes=1)
    return Tests(estimates, jnp.sqrt(variance), df)


def _kenward_roger_tests(blank: Design, estimate: Estimate, rows: Array) -> Tests:
    def adjusted(theta: Array, parameters: Array) -> tuple[Array, Array, Array]:
        adjustment = adjust(theta, parameters, blank)
        variance = jnp.einsum("kp,pq,kq->k", rows, adjustment.vcov, rows)
        return variance, single_degrees(adjustment, rows), adjustment.exists

    if estimate.theta.ndim == 2:
        adjusted = _per_lane(adjusted)
    variance, degrees, exist = adjusted(estimate.theta, estimate.parameters)
    variance, degrees = (jnp.where(exist, array, jnp.nan) for array in (variance, degrees))
    return Tests(jnp.tensordot(rows, estimate.beta, axes=1), jnp.sqrt(variance), degrees)


def _per_lane(function: Any) -> Any:
    return jax.vmap(function, in_axes=-1, out_axes=-1)


def pack(estimate: Estimate, value: Array, tests: Tests) -> Array:
    """Numbers and certified status of fits, (1 + R, lanes); `value` as the search found it."""
    certified = is_certified(value, estimate.criterion, estimate.gradient_norm)
    converged = estimate.status == Status.CONVERGED
    status = jnp.where(converged & ~certified, Status.NOT_CERTIFIED, estimate.status)
    p = len(estimate.beta)
    one = jnp.ones_like(value)[None]
    return jnp.concatenate(
        [
            status * one,
            *(array[:p] for array in tests[:3]),
            estimate.sigma * one,
            estimate.theta,
            estimate.parameters,
            jnp.sqrt(linalg.diagonal(estimate.parameters_vcov)),
            estimate.criterion * one,
            estimate.gradient_norm * one,
            estimate.n_iter * one,
            estimate.is_singular * one,
            *(array[p:] for array in tests[:3]),
        ]
    )


def _modes_of(
    lanes: Lanes, values: Array, shift: Array, root: Array, *, plan: Plan
) -> tuple[Array, ...]:
    """Conditional modes, per term (levels, effects, lanes): no level is collapsed here."""

    def modes(reduced: Response, root: Array) -> tuple[Array, ...]:
        design = lanes.each(reduced)
        return conditional_modes(design.covariance.omega(root), design)

    lanes = lanes.plain()
    reduced = lanes.reduce(_merge(values), _merge(shift), exact=True)
    return _per_lane(modes)(reduced, root)


class Programs:
    """The programs of a plan, jitted and spread over the devices of a mesh."""

    def __init__(self, mesh: Mesh, plan: Plan):
        last: list[Any] = [PartitionSpec(*[None] * k, "responses") for k in range(3)]
        scores = last[2 if plan.grouped else 1]
        reduced = Response(scores, last[1], last[0], last[1], last[0], last[0], last[0])
        found = Found(last[1], *[last[0]] * 5)
        first, everywhere = PartitionSpec("responses"), PartitionSpec()
        options = quick_compilation(mesh.devices.flat[0].platform)

        def spread(function: Any, batched: tuple, out: Any) -> Any:
            """Each device works on its own part of the last axis."""
            return jax.jit(
                jax.shard_map(
                    partial(function, plan=plan),
                    mesh=mesh,
                    in_specs=(everywhere, *batched),
                    out_specs=out,
                    check_vma=False,
                ),
                compiler_options=options,
            )

        known = reduced, last[1], last[0]
        self.held = jax.tree.map(lambda spec: NamedSharding(mesh, spec), known)
        self.begin = spread(_begin, (first, first), known)
        self.climb = spread(_climb, (*known, everywhere), found)
        self.screen = spread(_screen, (reduced,), last[1])
        self.along = spread(_along, (reduced, last[2]), last[1])
        self.conclude = spread(_conclude, (reduced, found, last[0], everywhere), last[1])
        self.modes = spread(_modes_of, (first, first, last[1]), last[2])


programs = remembered(Programs)
