"""The optimum of a criterion with a penalty: maximum a posteriori estimates of variance parameters.

The search moves `parameters`, log-variances and coordinates of correlations, and not square roots
as without a penalty: a density that keeps off the boundary is smooth there. Where one does not,
and small variances are better at zero, these are held there and the rest is sought again.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import mapped, namespace, on_host, still_unless
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Report
from jaxreml.model.design import Design
from jaxreml.model.objective import Expansion, expand, neg2_loglik
from jaxreml.model.penalties import OfParameters, Penalty
from jaxreml.optimum import newton, search
from jaxreml.optimum.certificate import STEP, slopes_by_differences
from jaxreml.optimum.hessian import solve_flat
from jaxreml.optimum.report import Estimate, report_at
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's
APART = 1.0  # relative SDs of the second place to start from
SLACK = 1e-9  # by how much more the criterion must be, relatively, for another place to be higher


class Point(NamedTuple):
    """The penalised criterion around `parameters` (k + 1,).

    Attributes:
        value, gradient, hessian: (), (k + 1,) and (k + 1, k + 1), zero for what is held.
        jacobian: of (omega, log sigma2), omega inside the design, (m + 1, k + 1).
        expansion: of the criterion without the penalty.
    """

    value: Array
    gradient: Array
    hessian: Array
    jacobian: Array
    expansion: Expansion


class Found(NamedTuple):
    """Where a search ended: its trace, and which parameters were free and what is shown of
    others."""

    trace: newton.Trace
    bounds: Report


def expand_at(
    parameters: Array, free: Array, design: Design, penalty: Penalty, *, reml: bool
) -> Point:
    """The penalised criterion at finite `parameters` with its derivatives."""
    covariance = design.covariance
    xp, kind = namespace(parameters), parameters.dtype
    inner, last = design.units.omega(parameters, covariance)
    outer = expand(inner, design, reml=reml, log_sigma2=last)
    units = design.units.of_omega(covariance)
    to_inner = linalg.border(units, xp.zeros_like(inner), xp.ones_like(last))
    gradient = to_inner.T @ outer.joint_gradient
    hessian = to_inner.T @ outer.joint_hessian @ to_inner
    jacobian, hessian = covariance.in_parameters(parameters, gradient, hessian)
    value, of_penalty, bend = penalty.expand(parameters, covariance)
    gradient, hessian = gradient @ jacobian + of_penalty, hessian + bend
    kept = xp.asarray(free, kind)
    return Point(
        outer.value + value,
        gradient * kept,
        hessian * kept[:, None] * kept,
        to_inner @ jacobian,
        outer,
    )


def criterion_at(parameters: Array, design: Design, penalty: Penalty, *, reml: bool) -> Array:
    """The penalised criterion, (), by values alone."""
    value = neg2_loglik(*design.units.omega(parameters, design.covariance), design, reml=reml)
    return value + penalty.value(parameters, design.covariance)


def found(
    design: Design, penalty: Penalty, reml: bool, max_iterations: int, tolerance: float
) -> Found:
    """The lowest optimum that searches from two places lead to, small variances tried at zero."""
    covariance = design.covariance
    chart = search.start(design, reml)
    xp = namespace(chart)
    apart = covariance.uncorrelated(np.full(sum(covariance.sizes), APART))
    starts = [
        search.parameters_of(own, design, reml) for own in (chart, xp.asarray(apart, chart.dtype))
    ]
    everywhere = xp.ones_like(starts[0], dtype=bool)

    def seek(bounds: Report) -> Found:
        start, free = bounds.finite, bounds.free

        def at(parameters: Array) -> Point:
            inside = xp.where(free, parameters, start)
            return expand_at(inside, free, design, penalty, reml=reml)

        trace = newton.minimise(
            at, start, lambda x: x, tolerance=tolerance, max_iterations=max_iterations
        )
        return Found(trace._replace(at=xp.where(free, trace.at, start)), bounds)

    def better(first: Found, second: Found) -> Found:
        """The second, unless it is higher."""
        before, after = first.trace.point.value, second.trace.point.value
        lower = after <= before + SLACK * (1 + abs(before))
        takes = lower | ~xp.isfinite(before)
        return mapped(lambda a, b: xp.where(takes, a, b), second, first)

    inside = [Report(start, everywhere, start) for start in starts]
    if on_host(chart):
        _require_finite(penalty, starts, covariance)
        best = better(*map(seek, inside))
        bounds = _at_zero(best.trace.at, design)
        return best if bounds.free.all() else better(best, seek(bounds))

    def again(best: Found, start: Array) -> tuple[Found, None]:
        """From a start, or from the best so far with small variances at zero: one program."""
        zero = _at_zero(best.trace.at, design)
        own = Report(start, everywhere, start)
        use = xp.isfinite(start[-1])
        return better(best, seek(mapped(lambda a, b: xp.where(use, a, b), own, zero))), None

    def blank(leaf: Any) -> Array:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.full(leaf.shape, jnp.nan if real else 0, leaf.dtype)

    unknown = jax.tree.map(blank, jax.eval_shape(seek, inside[0]))
    places = jnp.stack([*starts, jnp.full_like(starts[0], jnp.nan)])
    return jax.lax.scan(again, unknown, places)[0]


def _require_finite(penalty: Penalty, starts: list[Array], covariance: Any) -> None:
    """Refuse a density that is zero, or no number, wherever a search would start."""
    value: Any = np.nan
    for start in starts:
        value, *slopes = penalty.expand(start, covariance)
        if np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes):
            return
    shown = ", ".join(f"{entry:.3g}" for entry in starts[0])
    raise DataError(
        f"the penalty's log density is {-value / 2:g}, or its derivatives are not finite, where "
        f"the search starts, at parameters {shown}; it must be finite for all real numbers"
    )


def _at_zero(parameters: Array, design: Design) -> Report:
    """The parameters with small variances at zero."""
    covariance = design.covariance
    snapped = covariance.snap(search.chart_of(parameters, design), search.SMALL)
    snapped = design.units.chart(snapped, covariance)
    bounds = covariance.report(snapped, parameters[-1])
    xp = namespace(parameters)
    finite = xp.where(bounds.free, parameters, bounds.finite)
    return Report(finite, bounds.free, xp.where(bounds.free, parameters, bounds.shown))


def estimate_on_host(
    design: Design, penalty: Penalty, reml: bool, max_iterations: int, tolerance: float
) -> Estimate:
    """The penalised estimate by NumPy."""
    with np.errstate(all="ignore"):
        trace, bounds = found(design.collapsed, penalty, reml, max_iterations, tolerance)
        return _reported(trace.at, trace, bounds, design, penalty, reml, design.collapsed)


def estimate_traced(
    design: Design, penalty: Penalty, reml: bool, max_iterations: int, tolerance: float
) -> Estimate:
    """The same by JAX, with its derivatives in the design and in what a function of one's own
    refers to: under `jit`."""
    penalty, known = _converted(penalty, design)
    fixed, constants = jax.lax.stop_gradient((design, known))
    trace, bounds = jax.lax.stop_gradient(
        found(fixed, _with(penalty, constants), reml, max_iterations, tolerance)
    )
    status = _status(trace, fixed)
    is_optimum = status == Status.CONVERGED

    design, known = still_unless(is_optimum, (design, known))
    parameters = _differentiable()(reml, penalty, design, known, trace.at, bounds.free)
    own = _with(penalty, known)
    found_at = _reported(parameters, trace, bounds, design, own, reml, fixed)
    return still_unless(is_optimum, found_at)


def reported_at(trace: newton.Trace, design: Design, penalty: Penalty, *, reml: bool) -> Estimate:
    """The estimate at parameters that another search ended at, small variances at zero if the
    criterion is no higher there; derivatives of zero."""
    xp, parameters = namespace(trace.at), trace.at
    zero = _at_zero(parameters, design)
    before = criterion_at(parameters, design, penalty, reml=reml)
    lower = criterion_at(zero.finite, design, penalty, reml=reml) <= before
    here = Report(parameters, xp.ones_like(zero.free), parameters)
    bounds = mapped(lambda a, b: xp.where(lower, a, b), zero, here)
    point = expand_at(bounds.finite, bounds.free, design, penalty, reml=reml)
    trace = trace._replace(point=point)
    return _reported(bounds.finite, trace, bounds, design, penalty, reml, design)


def _reported(
    parameters: Array,
    trace: newton.Trace,
    bounds: Report,
    design: Design,
    penalty: Penalty,
    reml: bool,
    searched: Design,
) -> Estimate:
    point = expand_at(parameters, bounds.free, design, penalty, reml=reml)
    return report_at(
        parameters,
        bounds,
        (point.jacobian, point.gradient, point.hessian),
        point.expansion,
        design,
        trace.iterations,
        _status(trace, searched),
    )


def _status(trace: newton.Trace, design: Design) -> Array:
    return search.status_of(trace.point.hessian, trace.point, trace, design)


# Functions of one's own may refer to values that are traced: these become arguments.


def _converted(penalty: Penalty, design: Design) -> tuple[Penalty, tuple[Any, ...]]:
    if not isinstance(penalty, OfParameters):
        return penalty, ()
    count = design.covariance.starts[-1] + 1
    function, known = jax.closure_convert(penalty.function, jnp.zeros(count, design.dtype))
    return OfParameters(function), tuple(known)


def _with(penalty: Penalty, known: tuple[Any, ...]) -> Penalty:
    if not isinstance(penalty, OfParameters):
        return penalty
    function = penalty.function
    return OfParameters(lambda parameters: function(parameters, *known))


@lru_cache
def _differentiable() -> Any:
    rule = jax.custom_jvp(_optimum, nondiff_argnums=(0, 1))
    rule.defjvp(_optimum_jvp)
    return rule


def _optimum(
    reml: bool, penalty: Penalty, design: Design, known: Any, parameters: Array, free: Array
) -> Array:
    """The optimum found, with the derivatives that it has as a function of design and penalty: the
    gradient stays zero, d parameters = -H^-1 d gradient."""
    return parameters


def _optimum_jvp(reml: Any, penalty: Any, primals: Any, tangents: Any) -> Any:
    with usual_arithmetic():
        design, known, _, free = primals
        parameters = _differentiable()(reml, penalty, *primals)

        def at(design: Design, known: Any) -> Point:
            return expand_at(parameters, free, design, _with(penalty, known), reml=reml)

        _, moved = jax.jvp(
            lambda *changing: at(*changing).gradient, (design, known), tuple(tangents[:2])
        )
        return parameters, -solve_flat(at(design, known).hessian, moved)


def differences(
    theta: Array, design: Design, reml: bool, parameters: Array, penalty: Penalty
) -> tuple[Array, Array]:
    """The criterion without the penalty and the slopes of that with it, by NumPy and by values
    alone; at `Estimate.parameters`."""
    free = np.isfinite(parameters)
    finite, fewer = design.covariance.finite(parameters), design.collapsed

    def value(parameters: np.ndarray) -> float:
        return float(criterion_at(parameters, fewer, penalty, reml=reml))

    ways = np.eye(finite.size)[free]
    here, slopes = slopes_by_differences(value, finite, ways, STEP / np.sqrt(design.n))
    return here - float(penalty.value(finite, design.covariance)), slopes


def slopes(
    theta: Array, design: Design, reml: bool, parameters: Array, penalty: Penalty
) -> tuple[Array, Array]:
    """The same by reverse-mode autodiff, by JAX."""
    covariance = design.covariance
    finite = covariance.finite(parameters)
    objective = partial(criterion_at, design=design, penalty=penalty, reml=reml)
    value, gradient = jax.value_and_grad(objective)(finite)
    value = value - penalty.value(finite, covariance)
    return value, jnp.where(jnp.isfinite(parameters), gradient, 0.0)
