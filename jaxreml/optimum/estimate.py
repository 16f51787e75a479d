"""`estimate`: the optimum of a design's criterion, as a pure function of the design."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np

from jaxreml.arguments import is_reml
from jaxreml.backend.arrays import still_unless
from jaxreml.backend.lazy import deferred, jax
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model.design import Design, require_precision, with_spare_levels
from jaxreml.model.penalties import Penalty, penalty_of
from jaxreml.optimum import penalised
from jaxreml.optimum.hessian import solve_flat
from jaxreml.optimum.newton import Trace
from jaxreml.optimum.report import Estimate as Estimate
from jaxreml.optimum.report import report
from jaxreml.optimum.search import Point, expand_chart, found, outcome
from jaxreml.status import Status as Status

Array = Any  # NumPy's or JAX's


def estimate(
    design: Design,
    method: str = "REML",
    *,
    penalty: Any = None,
    max_iterations: int = 100,
    tolerance: float = 1e-12,
) -> Estimate:
    """Fit a design by REML or ML: from arrays to the optimum of the likelihood.

    The function is pure. It can be compiled by `jit`, mapped by `vmap` over stacked designs
    (`jaxreml.stack`), and differentiated to any order with respect to the design, by the implicit
    function theorem at the optimum. Derivatives are zero where `status` is not CONVERGED, so that
    such a lane of a `vmap`, masked by its status, adds nothing to a derivative in what lanes share.

    Fixed effects and residual variance are profiled out; the rest is a safeguarded Newton iteration
    with exact derivatives on square roots of the relative covariance matrices, which have no
    bounds: the criterion is even in each of their columns, and the Cholesky factor is taken at the
    end. As there can be several optima, it starts from moment estimates and from k + 2 other places
    for k effects in all, and takes the lowest; with more than 130,000 cross-products it compares
    the optimum with variances at zero only.

    Args:
        design: the data.
        method: "REML" or "ML".
        penalty: a density of the variance parameters, for their maximum a posteriori estimates:
            "wishart" or "gamma" (blme's defaults), a density of `jaxreml.penalties`, a dict of
            these by grouping factor, or a JAX function of all `parameters` to the logarithm of
            their density, up to a constant and without Jacobians. What the function refers to may
            be traced, and the estimate has derivatives in it. Standard errors are from the Hessian
            of the penalised criterion, ``criterion`` is without the penalty.
        max_iterations: evaluations of the criterion with its derivatives.
        tolerance: of the Newton decrement, how far the criterion may be above its minimum.

    Returns:
        The estimate. Look at `status` before using it: nothing is raised on numerical trouble.

    Raises:
        ValueError: another method; something else than a penalty.
        DataError: a penalty of a factor that the design does not have, or that does not fit its
            effects, or whose function does not give one number.
        PrecisionError: a float64 design with JAX set to float32.
        RuntimeError: in a process that was forked after JAX had run, as `fit`.

    Examples:
        The optimum of a design as a pytree of arrays:

        >>> import jax
        >>> import numpy as np
        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     found = jaxreml.estimate(design)
        >>> jaxreml.Status(int(found.status))
        <Status.CONVERGED: 0>
        >>> np.round(found.beta, 2), np.round(found.log_variances, 2)
        (Array([251.41,  10.47], dtype=float64), Array([6.42, 3.56, 6.48], dtype=float64))

        By how much the slope changes with each response, the variances estimated anew:

        >>> X = np.stack([np.ones(180), data["Days"]], axis=1)
        >>> terms = [jaxreml.Term(data["Subject"], effects=X)]
        >>> def slope(y):
        ...     return jaxreml.estimate(jaxreml.Design.from_arrays(y, X, terms)).beta[1]
        >>> with jax.enable_x64(True):
        ...     change = jax.grad(slope)(jax.numpy.array(data["Reaction"]))
        >>> np.round(change[:4], 4)
        Array([-0.003 , -0.0024, -0.0017, -0.001 ], dtype=float64)
    """
    reml = is_reml(method)
    density = penalty_of(penalty, design.covariance, design.names)
    require_precision(design)
    if design.dtype == "float32":
        tolerance = max(tolerance, 1e-5)
    design = with_spare_levels(design).without_names()
    return _estimate(design, reml, max_iterations, tolerance, density)


def estimate_on_host(
    design: Design,
    method: str = "REML",
    *,
    penalty: Penalty | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-12,
) -> tuple[Estimate, bool]:
    """`estimate` of a design of NumPy arrays by NumPy, without derivatives: nothing is compiled.

    Beside it, whether the optimum `is_proved` to be the lowest.
    """
    if penalty is not None:
        reml = is_reml(method)
        return penalised.estimate_on_host(design, penalty, reml, max_iterations, tolerance), False
    with np.errstate(all="ignore"):
        trace, proved = found(design.collapsed, is_reml(method), max_iterations, tolerance)
        status = outcome(trace.at, trace.point, trace, design)
        return report(trace.at, trace.point, trace, design, status), proved


def estimate_at(theta: np.ndarray, design: Design, *, reml: bool) -> Estimate:
    """What `report` says at an optimum that is known, by NumPy; (m, lanes) `theta` for a design of
    many responses."""
    with np.errstate(all="ignore"):
        chart = design.covariance.chart(design.scaled_factors(theta))
        point = expand_chart(chart, design, reml=reml)
        none = np.zeros(theta.shape[1:], int)
        trace = Trace(chart, point, none, none, none, none)
        return report(chart, point, trace, design, none)


@deferred(lambda: partial(jax.jit, static_argnums=(1, 2, 3, 4)))
def _estimate(
    design: Design, reml: bool, max_iterations: int, tolerance: float, penalty: Penalty | None
) -> Estimate:
    with usual_arithmetic():
        if penalty is not None:
            return penalised.estimate_traced(design, penalty, reml, max_iterations, tolerance)
        fixed = jax.lax.stop_gradient(design)
        trace = jax.lax.stop_gradient(found(fixed, reml, max_iterations, tolerance)[0])
        status = outcome(trace.at, trace.point, trace, fixed)
        is_optimum = status == Status.CONVERGED
        design = still_unless(is_optimum, design)
        chart, point = _differentiable()(reml, design, trace.at, trace.point)
        return still_unless(is_optimum, report(chart, point, trace, design, status))


@lru_cache
def _differentiable() -> Any:
    rule = jax.custom_jvp(_optimum, nondiff_argnums=(0,))
    rule.defjvp(_optimum_jvp)
    return rule


def _optimum(reml: bool, design: Design, chart: Array, point: Point) -> tuple[Array, Point]:
    """The optimum found, with the derivatives that it has as a function of the design.

    The gradient stays zero when the design changes, so d chart = -H^-1 d gradient, with flat
    directions left where they are: they do not move omega.
    """
    return chart, point


@deferred(usual_arithmetic)
def _optimum_jvp(reml, primals, tangents):
    chart, point = _differentiable()(reml, *primals)
    design, design_dot = primals[0], tangents[0]
    at = partial(expand_chart, reml=reml)
    _, gradient_dot = jax.jvp(lambda design: at(chart, design).gradient, (design,), (design_dot,))
    chart_dot = -solve_flat(at(chart, design).hessian, gradient_dot)
    _, point_dot = jax.jvp(at, (chart, design), (chart_dot, design_dot))
    return (chart, point), (chart_dot, point_dot)
