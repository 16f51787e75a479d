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
from scipy.special import expit, logit, ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.backend.compilation import quick_jit
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.residuals import residual_parameters
from jaxreml.model.covariance import natural

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

NEGLIGIBLE = 1e-9  # a derivative this much smaller than inside the parameter space is zero
SCALES = ("log", "variance", "sd")
FLAT = (
    "the variance parameters have no standard errors: the criterion is flat in a combination of "
    "them"
)
NO_DERIVATIVE = (
    "g must be a function that JAX can differentiate: jax.numpy in place of numpy and math, no "
    "float(), int() or if on what depends on its arguments"
)


class Transform(NamedTuple):
    """The scale on which an interval is made: the map, its inverse, its derivative, its domain."""

    forward: Callable[[Any], Any]
    inverse: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    domain: tuple[float, float]


TRANSFORMS: dict[str | None, Transform] = {
    None: Transform(lambda x: x, lambda x: x, np.ones_like, (-np.inf, np.inf)),
    "log": Transform(np.log, np.exp, lambda x: 1 / x, (0.0, np.inf)),
    "logit": Transform(logit, expit, lambda x: 1 / (x * (1 - x)), (0.0, 1.0)),
    "fisher": Transform(np.arctanh, np.tanh, lambda x: 1 / (1 - x * x), (-1.0, 1.0)),
}


class Linearised(NamedTuple):
    """Values of a function at a fit, and what the delta method says of them.

    Attributes:
        estimate: (k,) values.
        vcov: (k, k), rows NaN where there is no standard error.
        notes: per value why not, or what the standard error is conditional on; "" if nothing.
    """

    estimate: np.ndarray
    vcov: np.ndarray
    notes: list[str]


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
    fit.require_independent("take a function of the parameters")
    if not callable(function):
        raise ValueError(f"function must be a JAX function g(beta, components), not {function!r}")
    linear = linearise(fit, program(function, fit.term_sizes))
    components.require_entries(function, fit)
    label = getattr(function, "__name__", "g")
    label = "g" if label == "<lambda>" else label
    scalar = len(linear.estimate) == 1
    if names is None:
        names = [label] if scalar else [f"{label}[{k}]" for k in range(len(linear.estimate))]
    return wald(linear, [names] if isinstance(names, str) else names, conf_level, transform)


def program(g: Callable[..., Any], groups: components.Groups) -> Program:
    """Compile a function g(beta, components, *data) of models with terms `groups`."""

    def values(beta: Array, theta: Array, sigma: Array, *data: Any) -> Array:
        return _vector(g(beta, components.of_theta(theta, sigma, groups), *data))

    def at_parameters(beta: Array, params: Array, *data: Any) -> tuple[Array, Array]:
        inside = components.inside(params, groups)
        value = _vector(g(beta, components.of_parameters(inside, groups), *data))
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
            interior = slopes
            if not inside.all():
                interior, _ = program.slopes(fit.beta, _interior(fit), *data)
                values = program.values(fit.beta, fit.theta, fit.sigma, *data)
        except jax.errors.JAXTypeError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{NO_DERIVATIVE}. JAX says: {first}") from error
    slope, within = (np.concatenate([*map(np.asarray, own)], axis=1) for own in (slopes, interior))
    return _propagate(fit, inside, np.asarray(values), slope, within)


def _on_boundary(fit: FittedModel) -> str:
    return f"no standard error on the boundary: {'; '.join(fit._boundary)}"


def _given(fit: FittedModel) -> str:
    return f"standard error given that {'; '.join(fit._boundary)}"


def _interior(fit: FittedModel) -> np.ndarray:
    """The parameters with those on the boundary moved well inside."""
    covariance = components.covariance_of(fit.term_sizes)
    of_variances, of_correlations = covariance.positions, covariance.others
    moved = fit.parameters.copy()
    log_variances, z = moved[of_variances], moved[of_correlations]
    moved[of_variances] = np.where(np.isfinite(log_variances), log_variances, moved[-1])
    moved[of_correlations] = np.where(np.isnan(z), 0.5, np.where(np.isinf(z), np.sign(z), z))
    return moved


def _propagate(
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
            note = _on_boundary(fit)
        else:
            missing = False
            if not inside.all() and (at_edge[k] or by_variance[k]):
                note = _given(fit)
        if missing:
            joint[k] = joint[:, k] = np.nan
        notes.append(note)
    return Linearised(estimate, joint, notes)


def wald(
    linear: Linearised,
    names: Sequence[str],
    conf_level: float,
    transform: str | Sequence[str | None] | None = None,
) -> pd.DataFrame:
    """Standard errors and Wald intervals as a frame; arguments and errors as `delta`'s."""
    check_conf_level(conf_level)
    count = len(linear.estimate)
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} value(s)")
    chosen = [transform] * count if transform is None or isinstance(transform, str) else transform
    if len(chosen) != count:
        raise ValueError(f"{len(chosen)} transforms for {count} value(s)")
    quantile = ndtri((1 + conf_level) / 2)
    std_error = np.sqrt(np.diagonal(linear.vcov))
    limits = np.full((count, 2), np.nan)
    notes = list(linear.notes)
    for k, (name, kind) in enumerate(zip(names, chosen, strict=True)):
        if kind not in TRANSFORMS:
            known = ", ".join(f'"{other}"' for other in TRANSFORMS if other)
            raise ValueError(f"transform must be None, {known}, not {kind!r}")
        value = linear.estimate[k]
        scale = TRANSFORMS[kind]
        low, high = scale.domain
        if value < low - NEGLIGIBLE or value > high + NEGLIGIBLE:
            raise DataError(
                f"the {kind} interval is for values between {low:g} and {high:g}; {name} is "
                f"{value:.6g}"
            )
        if not np.isfinite(std_error[k]):
            continue
        if kind is not None and not low < value < high:
            notes[k] = notes[k] or f"no {kind} interval at {value:g}, the end of its range"
            continue
        half = quantile * std_error[k] * scale.slope(value)
        limits[k] = scale.inverse(scale.forward(value) + np.array([-half, half]))
    return pd.DataFrame(
        {
            "estimate": linear.estimate,
            "std_error": std_error,
            "lower": limits[:, 0],
            "upper": limits[:, 1],
            "note": notes,
        },
        index=pd.Index(list(names)),
    )


# The variance parameters themselves


def variance_parameters(
    fit: FittedModel, scale: str = "sd", conf_level: float = 0.95
) -> pd.DataFrame:
    """All variance parameters with standard errors and Wald intervals.

    Args:
        fit: the fit.
        scale: what they are of; where residuals have a covariance, "sd" or "log".
            "sd" for SDs (intervals from the log scale) and correlations (from Fisher's z);
            "variance" for variances (from the log scale) and covariances; "log" for the
            coordinates of the objectives, `LMMResults.parameters`.
        conf_level: of the intervals.

    Returns:
        As `delta`; rows in the order and by the names of lme4's ``confint(fit, oldNames=FALSE)``,
        such as ``sd_x|g``, ``cor_x.(Intercept)|g`` and ``sigma``; by `parameter_names` for "log".

    Raises:
        DataError: a fit without an optimum.
        ValueError: another scale.

    Examples:
        >>> fit.variance_parameters()[["estimate", "std_error", "lower", "upper"]].round(2)
                                      estimate  std_error  lower  upper
        sd_(Intercept)|Subject           24.74       5.84  15.58  39.28
        cor_Days.(Intercept)|Subject      0.07       0.33  -0.52   0.61
        sd_Days|Subject                   5.92       1.25   3.92   8.95
        sigma                            25.59       1.51  22.80  28.72
    """
    if fit.residual is not None and scale != "log":
        return _with_residuals(fit, scale, conf_level)
    linear, names, transforms = _parameters(fit, scale)
    return wald(linear, names, conf_level, transforms)


def _with_residuals(fit: FittedModel, scale: str, conf_level: float) -> pd.DataFrame:
    """Of the random effects and of the residuals of a subject."""
    if scale != "sd":
        raise ValueError(f'scale must be "sd" or "log" where residuals have one, not {scale!r}')
    own = residual_parameters(fit, conf_level)
    if not fit.groupings:
        return own
    return pd.concat([variance_parameters(fit.random_part, scale, conf_level).iloc[:-1], own])


def parameters_vcov(fit: FittedModel, scale: str = "log") -> pd.DataFrame:
    """Asymptotic covariance matrix of the variance parameters; see `variance_parameters`.

    Rows and columns of parameters on the boundary are NaN, the others given them.

    Examples:
        >>> fit.parameters_vcov("sd").round(1)
                                      sd_(Intercept)|Subject  ...  sigma
        sd_(Intercept)|Subject                          34.1  ...   -0.8
        cor_Days.(Intercept)|Subject                    -0.5  ...    0.0
        sd_Days|Subject                                  0.2  ...   -0.1
        sigma                                           -0.8  ...    2.3
        <BLANKLINE>
        [4 rows x 4 columns]
    """
    if scale != "log":
        fit.require_independent("give the covariance of SDs and correlations")
    linear, names, _ = _parameters(fit, scale)
    index = pd.Index(names)
    return pd.DataFrame(linear.vcov, index, index)


def _parameters(fit: FittedModel, scale: str) -> tuple[Linearised, list[str], list[str | None]]:
    """Variance parameters on a scale, their names and the transforms for their intervals."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if scale == "log":
        return _logarithmic(fit), list(fit.parameter_names), [None] * len(fit.parameters)
    linear = linearise(fit, _parameter_program(scale, fit.term_sizes))
    names: list[str] = []
    transforms: list[str | None] = []
    one, two = ("sd", "cor") if scale == "sd" else ("var", "cov")
    for grouping in fit.groupings:
        effects = grouping.effects
        for row, column in zip(*natural.triangle(len(effects)), strict=True):
            first, second = effects[column], effects[row]
            if row == column:
                names.append(f"{one}_{first}|{grouping.name}")
                transforms.append("log")
            else:
                names.append(f"{two}_{second}.{first}|{grouping.name}")
                transforms.append("fisher" if scale == "sd" else None)
    return linear, [*names, "sigma" if scale == "sd" else "sigma2"], [*transforms, "log"]


def _logarithmic(fit: FittedModel) -> Linearised:
    """`LMMResults.parameters` as they are."""
    fit.require_optimum("give standard errors")
    inside = np.isfinite(fit.parameters)
    known = np.isfinite(np.diagonal(fit.parameters_vcov_array))
    given = "" if inside.all() else _given(fit)
    notes = [
        _on_boundary(fit) if not free else given if has_error else FLAT
        for free, has_error in zip(inside, known, strict=True)
    ]
    return Linearised(fit.parameters, fit.parameters_vcov_array, notes)


def _parameter_program(scale: str, groups: components.Groups) -> Program:
    """That of `_entries`, with derivatives written out."""
    covariance = components.covariance_of(groups)
    m = natural.count_theta(covariance.sizes)
    first, second = natural.effects_of_omega(covariance.sizes)
    diagonal = np.flatnonzero(first == second)  # of the effects, in their order

    def values(beta: Array, theta: Array, sigma: Array) -> Array:
        return _entries(scale, groups, beta, components.of_theta(theta, sigma, groups))

    def slopes(beta: Array, params: Array) -> tuple[tuple[Array, Array], Array]:
        inside = components.inside(params, groups)
        found = _entries(scale, groups, beta, components.of_parameters(inside, groups))
        moved, _ = covariance.in_parameters(inside, np.zeros(m + 1), np.zeros((m + 1, m + 1)))
        omega, log_sigma2 = covariance.natural(inside)
        sigma2 = np.exp(log_sigma2)
        slope = sigma2 * moved
        slope[:-1] += sigma2 * omega[:, None] * moved[-1]
        if scale == "sd":
            with np.errstate(invalid="ignore", divide="ignore"):
                relative = slope[diagonal] / (2 * sigma2 * omega[diagonal, None])
            sds = np.sqrt(sigma2 * omega[diagonal])
            of_pair = slope[:-1] / (sds[first] * sds[second])[:, None]
            mixed = relative[first] + relative[second]
            slope[:-1] = of_pair - found[:-1, None] * mixed
            slope[diagonal] = sds[:, None] * relative
            slope[-1] /= 2 * found[-1]
        slope = slope * np.isfinite(params)
        return (np.zeros((m + 1, len(beta))), slope), found

    return Program(values, slopes, lambda: np.errstate(all="ignore"))


def _entries(
    scale: str, groups: components.Groups, beta: Array, named: components.Components
) -> Array:
    """Variances and covariances, or SDs and correlations, in the order of `covariance.triangle`."""
    values = []
    starts: dict[str, int] = {}
    for name, q in groups:
        start = starts.get(name, 0)
        starts[name] = start + q
        matrix = named[name][start : start + q, start : start + q]
        if scale == "sd":
            sd = np.sqrt(np.diagonal(matrix))
            matrix = np.where(np.eye(q, dtype=bool), np.diag(sd), matrix / np.outer(sd, sd))
        values.append(matrix[natural.triangle(q)])
    residual = named[RESIDUAL]
    last = np.sqrt(residual) if scale == "sd" else residual
    return np.append(np.concatenate(values), last)
