"""The delta method: functions of a fit's parameters, with standard errors and Wald intervals.

The estimates of the fixed effects and of the variance parameters are asymptotically normal and
independent (Miller 1977, Annals of Statistics 5:746), so that a differentiable function g of both
has asymptotic covariance J_b vcov J_b' + J_v A J_v': J are its derivatives, exact by JAX, vcov and
A the two covariance matrices. Variance parameters on the boundary of their space are held there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.backend.compilation import quick_jit
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.fitting.random_terms import Layout
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.linearised import Linearised, wald

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

NEGLIGIBLE = 1e-9  # a derivative this much smaller than inside the parameter space is zero
FLAT = (
    "the variance parameters have no standard errors: the criterion is flat in a combination of "
    "them"
)
NO_DERIVATIVE = (
    "g must be a function that JAX can differentiate: jax.numpy in place of numpy and math, no "
    "float(), int() or if on what depends on its arguments"
)


class Program(NamedTuple):
    """A function of the parameters, compiled or with derivatives that are written out.

    Attributes:
        values: its values at (beta, theta, sigma), where variances may be zero.
        slopes: its derivatives in (beta, params), and its values there.
        settings: to run it under.
    """

    values: Callable[..., Any]
    slopes: Callable[..., Any]
    settings: Callable[[], AbstractContextManager[Any]] = neutral


def delta(
    fit: FittedModel,
    function: components.Function,
    *,
    conf_level: float = 0.95,
    names: str | Sequence[str] | None = None,
    transform: str | Sequence[str | None] | None = None,
) -> pd.DataFrame:
    """Estimate, standard error and Wald interval of a function of the parameters.

    Args:
        fit: the fit.
        function: a JAX function g(beta, components) with a scalar or a vector as its value; see
            `jaxreml.inference.components`.
        conf_level: of the intervals.
        names: of the values.
        transform: the scale on which the interval is made, to be transformed back: None, "log",
            "logit" or "fisher" (inverse hyperbolic tangent); or a sequence, one for each value.

    Returns:
        A row per value: estimate, std_error, lower, upper, and note, which says what a
        standard error is conditional on, or why there is none.

    Raises:
        DataError: a fit without an optimum; a g that asks for components, or entries of them or of
            beta, that the model does not have; a value outside the range of its transform.
        ValueError: a g that JAX cannot differentiate or that returns something else; names or
            transforms of another number than the values; another transform.

    Examples:
        The effect of a day in residual standard deviations (JAX compiles the function):

        >>> standardised = fit.delta(lambda beta, parts: beta[1] / parts["Residual"] ** 0.5)
        >>> standardised[["estimate", "std_error", "lower", "upper"]].round(3)
           estimate  std_error  lower  upper
        g     0.409      0.065  0.282  0.536
    """
    if not callable(function):
        raise ValueError(f"function must be a JAX function g(beta, components), not {function!r}")
    linear = linearise(fit, program(function, fit.layout))
    components.require_entries(function, fit)
    label = getattr(function, "__name__", "g")
    label = "g" if label == "<lambda>" else label
    scalar = len(linear.estimate) == 1
    if names is None:
        names = [label] if scalar else [f"{label}[{k}]" for k in range(len(linear.estimate))]
    return wald(linear, [names] if isinstance(names, str) else names, conf_level, transform)


def program(g: Callable[..., Any], layout: Layout) -> Program:
    """Compile a function g(beta, components, *data) of models with such parameters."""

    def values(beta: Array, theta: Array, sigma: Array, *data: Any) -> Array:
        return _vector(g(beta, components.of_theta(theta, sigma, layout), *data))

    def at_parameters(beta: Array, params: Array, *data: Any) -> tuple[Array, Array]:
        inside = layout.covariance.finite(params)
        value = _vector(g(beta, components.of_parameters(inside, layout), *data))
        return value, value

    slopes = jax.jacfwd(at_parameters, argnums=(0, 1), has_aux=True)
    return Program(quick_jit(values), quick_jit(slopes))


def _vector(value: Any) -> Array:
    if isinstance(value, dict):
        raise ValueError("g must return a scalar or a vector, not a dict")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"g must return a scalar or a vector: {error}") from None
    if array.ndim > 1 or jnp.iscomplexobj(array):
        raise ValueError(
            f"g must return a real scalar or vector, not {array.dtype} of shape {array.shape}"
        )
    return array.reshape(-1).astype(jnp.float64)


def linearise(fit: FittedModel, program: Program, *data: Any) -> Linearised:
    """Values of a program's function at a fit with their covariance matrix.

    Raises:
        DataError, ValueError: as `delta`.
    """
    fit.require_optimum("give standard errors")
    inside = np.isfinite(fit.parameters)
    with program.settings():
        try:
            slopes, values = program.slopes(fit.beta, fit.parameters, *data)
            within = slopes
            if not inside.all():
                within, _ = program.slopes(fit.beta, interior(fit), *data)
                values = program.values(fit.beta, fit.theta, fit.sigma, *data)
        except jax.errors.JAXTypeError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{NO_DERIVATIVE}. JAX says: {first}") from error
    both = (np.concatenate([*map(np.asarray, own)], axis=1) for own in (slopes, within))
    return propagate(fit, inside, np.asarray(values), *both)


def on_boundary(fit: FittedModel) -> str:
    """Why a parameter on the boundary has no standard error."""
    return f"no standard error on the boundary: {'; '.join(fit._boundary)}"


def given(fit: FittedModel) -> str:
    """What standard errors beside it are conditional on."""
    return f"standard error given that {'; '.join(fit._boundary)}"


def interior(fit: FittedModel) -> np.ndarray:
    """The parameters with those on the boundary moved well inside."""
    of_variances, of_correlations = fit.covariance.positions, fit.covariance.others
    moved = fit.parameters.copy()
    log_variances, z = moved[of_variances], moved[of_correlations]
    moved[of_variances] = np.where(np.isfinite(log_variances), log_variances, moved[-1])
    moved[of_correlations] = np.where(np.isnan(z), 0.5, np.where(np.isinf(z), np.sign(z), z))
    return moved


def propagate(
    fit: FittedModel,
    inside: np.ndarray,
    estimate: np.ndarray,
    slope: np.ndarray,
    interior: np.ndarray,
) -> Linearised:
    """Covariance and notes from derivatives (k, p + m + 1) at the estimates and well inside."""
    p = len(fit.beta)
    free = np.concatenate([np.ones(p, bool), inside])
    size = np.max(np.abs(interior), axis=1, initial=0.0, keepdims=True)
    depends = ~(np.abs(interior) <= NEGLIGIBLE * size)
    at_edge = depends[:, ~free].any(axis=1)
    if not inside.all():  # derivatives vanish with the variance that is zero, but for rounding
        slope = np.where(np.abs(slope) <= NEGLIGIBLE * size, 0.0, slope)
    slope = np.where(free, slope, 0.0)
    varies = (slope != 0).any(axis=1)
    by_variance = (slope[:, p:] != 0).any(axis=1)

    spread = np.zeros((len(free), len(free)))
    spread[:p, :p] = fit.vcov_array
    known = np.isfinite(fit.parameters_vcov_array[np.ix_(inside, inside)]).all()
    spread[p:, p:] = np.where(np.outer(inside, inside) & known, fit.parameters_vcov_array, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        joint = slope @ spread @ slope.T

    boundary = "; ".join(fit._boundary)
    notes = []
    for k, value in enumerate(estimate):
        note = ""
        missing = True
        if not np.isfinite(value):
            note = f"undefined: {boundary}" if at_edge[k] else "not finite at the estimates"
        elif not np.isfinite(slope[k]).all():
            note = "its derivative at the estimates is not finite"
        elif by_variance[k] and not known:
            note = FLAT
        elif at_edge[k] and not varies[k]:
            note = on_boundary(fit)
        else:
            missing = False
            if not inside.all() and (at_edge[k] or by_variance[k]):
                note = given(fit)
        if missing:
            joint[k] = joint[:, k] = np.nan
        notes.append(note)
    return Linearised(estimate, joint, notes)
