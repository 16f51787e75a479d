"""`start` and `optimise`: an optimiser of optax on the objective of a design, or on a loss that the
objective is a part of."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.arguments import is_reml
from jaxreml.backend.lazy import deferred, jax, jnp
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model.design import Design, require_precision, with_spare_levels
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.penalties import Penalty, penalty_of
from jaxreml.optimum import penalised, search
from jaxreml.optimum.newton import Trace
from jaxreml.optimum.report import Estimate, report
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's


class Optimum(NamedTuple):
    """Where `optimise` ended on a function of one's own: a pytree.

    Attributes:
        parameters: a pytree as the one that it started from.
        value: of the function there, ().
        gradient_norm: (), the largest entry of the gradient in size.
        n_iter: (), steps taken.
        status: (), a `Status`: CONVERGED, MAX_ITERATIONS, STALLED (a step that changed nothing), or
            NOT_FINITE.

    Examples:
        >>> import jax.numpy as jnp
        >>> found = jaxreml.optimise(lambda p: jnp.sum((p["a"] - 3) ** 2), {"a": jnp.zeros(2)})
        >>> np.round(found.parameters["a"], 3).tolist(), int(found.status)
        ([3.0, 3.0], 0)
    """

    parameters: Any
    value: Array
    gradient_norm: Array
    n_iter: Array
    status: Array


def start(design: Design, method: str = "REML") -> Array:
    """Variance parameters to start an optimiser from: by cheap moment estimates.

    Optimisers that start from zeros run off on data that are not scaled, as a residual variance of
    1 may be a million times too small. `estimate` starts from the same place, among others.

    Args:
        design: the data.
        method: "REML" or "ML".

    Returns:
        (k + 1,), as an objective's `parameters`, all finite: variances that come out at zero start
        from a relative SD of 0.1.

    Raises:
        ValueError: another method.
        PrecisionError: a float64 design with JAX set to float32.

    Examples:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     np.round(jaxreml.start(design), 2)
        Array([6.42, 3.56, 0.07, 6.48], dtype=float64)
    """
    reml = is_reml(method)
    require_precision(design)
    return _start(with_spare_levels(design).without_names(), reml)


@deferred(lambda: partial(jax.jit, static_argnums=1))
def _start(design: Design, reml: bool) -> Array:
    with usual_arithmetic():
        return search.parameters_of(search.start(design, reml), design, reml)


def optimise(
    objective: Design | Callable[[Any], Array],
    parameters: Any = None,
    *,
    optimizer: Any = None,
    method: str = "REML",
    penalty: Any = None,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Estimate | Optimum:
    """Minimise by any optimiser of optax, until the gradient vanishes.

    With a design it minimises `reml_objective` or `ml_objective` from `start`, and gives back an
    `Estimate` as `estimate` does, made at the point reached: standard errors, singularity and all.
    It is one search from one place, where `estimate` compares several, and needs more steps.

    With a function it minimises that function of a pytree: variance parameters, and beside them
    what else a model has. Both can be compiled by `jit` and mapped by `vmap`; the same `optimizer`
    and function objects compile once.

    Args:
        objective: a design, or a function of `parameters` to a scalar that JAX can differentiate.
        parameters: a pytree of arrays to start from; may be left out with a design.
        optimizer: of optax; ``optax.lbfgs()`` if left out. Line searches get the value, the
            gradient and the function.
        method: "REML" or "ML", with a design.
        penalty: a density of the parameters of a design, as in `estimate`.
        max_steps: of the optimiser.
        tolerance: largest entry of the gradient at which it ends. Objectives are minus twice a log
            likelihood, so that 1e-6 is far less than one standard error whatever the data.

    Returns:
        `Estimate` of a design, `Optimum` of a function. Look at `status`: nothing is raised on
        numerical trouble.

    Raises:
        ValueError: no `parameters` to a function, or a function whose value is not a scalar; a
            `penalty` beside one, which it can add itself; another method.
        DataError: a penalty that does not fit the design.
        PrecisionError: a float64 design with JAX set to float32.

    Examples:
        >>> import jax
        >>> import optax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     found = jaxreml.optimise(design)
        ...     by_adam = jaxreml.optimise(design, optimizer=optax.adam(0.05), max_steps=5000)
        >>> np.round(found.log_variances, 3), np.round(by_adam.log_variances, 3)
        (Array([6.417, 3.557, 6.485], dtype=float64), Array([6.417, 3.557, 6.485], ...
    """
    optimizer = _default() if optimizer is None else optimizer
    if isinstance(objective, Design):
        reml = is_reml(method)
        require_precision(objective)
        density = penalty_of(penalty, objective.covariance, objective.names)
        design = with_spare_levels(objective).without_names()
        given = start(design, method) if parameters is None else jnp.asarray(parameters)
        return _of_design(given, design, optimizer, reml, max_steps, tolerance, density)
    if penalty is not None:
        raise ValueError("penalty is for a design: add it to the function itself")
    if parameters is None:
        raise ValueError("a function needs parameters= to start from: a pytree of arrays")
    given = jax.tree.map(jnp.asarray, parameters)
    value = jax.eval_shape(objective, given)
    if getattr(value, "shape", None) != ():
        raise ValueError(f"the function must give a scalar, not {value}")
    return _of_function(given, objective, optimizer, max_steps, tolerance)


@lru_cache
def _default() -> Any:
    import optax

    return optax.lbfgs()


@deferred(lambda: partial(jax.jit, static_argnums=(1, 2, 3, 4)))
def _of_function(
    parameters: Any, function: Any, optimizer: Any, max_steps: int, tolerance: float
) -> Optimum:
    return _minimised(function, parameters, optimizer, max_steps, tolerance)


@deferred(lambda: partial(jax.jit, static_argnums=(2, 3, 4, 5, 6)))
def _of_design(
    parameters: Array,
    design: Design,
    optimizer: Any,
    reml: bool,
    max_steps: int,
    tolerance: float,
    penalty: Penalty | None,
) -> Estimate:
    fixed = jax.lax.stop_gradient(design)
    objective = reml_objective if reml else ml_objective

    def function(parameters: Array) -> Array:
        return objective(parameters, fixed, penalty=penalty)

    parameters = jax.lax.stop_gradient(parameters.astype(design.dtype))
    found = _minimised(function, parameters, optimizer, max_steps, tolerance)
    with usual_arithmetic():
        ended = found.status == Status.CONVERGED
        stuck = found.status == Status.STALLED
        trace = Trace(
            found.parameters, None, found.n_iter, ended, stuck, jnp.zeros_like(found.value)
        )
        if penalty is not None:
            return penalised.reported_at(trace, fixed, penalty, reml=reml)
        chart = _at_zero(search.chart_of(found.parameters, design), fixed, reml)
        point = search.expand_chart(chart, fixed, reml=reml)
        trace = trace._replace(at=chart, point=point)
        return report(chart, point, trace, fixed, search.outcome(chart, point, trace, fixed))


def _at_zero(chart: Array, design: Design, reml: bool) -> Array:
    """The point with small variances at zero where the criterion is no higher there: an optimiser
    of log-variances ends on the way to minus infinity."""
    snapped = design.covariance.snap(chart, search.SMALL)
    before = search.expand_chart(chart, design, reml=reml).value
    after = search.expand_chart(snapped, design, reml=reml).value
    return jnp.where(after <= before, snapped, chart)


def _minimised(
    function: Callable[[Any], Array],
    parameters: Any,
    optimizer: Any,
    max_steps: int,
    tolerance: float,
) -> Optimum:
    import optax

    optimizer = optax.with_extra_args_support(optimizer)
    both = jax.value_and_grad(function)

    def norm(gradient: Any) -> Array:
        parts = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(gradient)]
        return jnp.max(jnp.stack(parts))

    def is_unfinished(state: Any) -> Array:
        _, _, value, gradient, steps, moved = state
        going = moved & jnp.isfinite(value) & ~(norm(gradient) <= tolerance)
        return going & (steps < max_steps)

    def step(state: Any) -> Any:
        parameters, inner, value, gradient, steps, _ = state
        updates, inner = optimizer.update(
            gradient, inner, parameters, value=value, grad=gradient, value_fn=function
        )
        after = optax.apply_updates(parameters, updates)
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(parameters), strict=True)
        moved = jnp.any(jnp.stack([jnp.any(a != b) for a, b in pairs]))
        return after, inner, *both(after), steps + 1, moved

    value, gradient = both(parameters)
    first = parameters, optimizer.init(parameters), value, gradient, jnp.zeros((), int), True
    first = jax.tree.map(jnp.asarray, first)
    parameters, _, value, gradient, steps, moved = jax.lax.while_loop(is_unfinished, step, first)
    reached = norm(gradient)
    status = jnp.where(moved, Status.MAX_ITERATIONS, Status.STALLED)
    status = jnp.where(reached <= tolerance, Status.CONVERGED, status)
    status = jnp.where(jnp.isfinite(value), status, Status.NOT_FINITE)
    return Optimum(parameters, value, reached, steps, status.astype(np.int32))
