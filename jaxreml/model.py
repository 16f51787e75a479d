"""`fit`: a formula and a table to labelled results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxreml.cache import quick_compilation, remembered, spare_memory_maps
from jaxreml.designs import with_spare_levels
from jaxreml.effects import conditional_variances, inspect
from jaxreml.errors import ConvergenceWarning, DataError
from jaxreml.estimation import CERTIFIED, estimate, is_reml
from jaxreml.fitted import Grouping
from jaxreml.frame import ModelFrame, model_frame
from jaxreml.results import LMMResults
from jaxreml.rivals import optimality
from jaxreml.runtime import neutral
from jaxreml.status import NO_FIT, Status


def fit(
    formula: str,
    data: Any,
    method: str = "REML",
    *,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
    **others: Any,
) -> LMMResults:
    """Fit a linear mixed model.

    Computes in float64 whatever JAX's settings, and changes none of them. In processes of
    `multiprocessing`, start them by ``get_context("spawn")``, or by joblib's default backend: JAX
    does not work in one that is forked (Linux's default before Python 3.14) after it has run.

    Args:
        formula: lme4's grammar, such as ``"y ~ x + (x | g)"``: random terms ``(1 | g)``,
            ``(x | g)``, ``(x || g)``, ``(0 + x | g)``, ``(1 | a/b)``, ``(1 | a:b)``; ``offset(z)``;
            fixed effects in formulaic's grammar.
        data: dataframe (pandas, polars, pyarrow, anything narwhals reads) or dict of columns.
            Rows with a missing value in a column that the model uses are dropped and counted,
            before columns such as ``poly(x, 2)`` are computed (R computes these first).
        method: "REML" or "ML".
        weights: column name or (n,) values: observation i has residual variance
            sigma2 / weights[i], as in lme4.
        offset: column name or (n,) values, a known part of the mean.
        structure: how to factorise the covariance, "grouped", "crossed" or "dense"; chosen if
            left out.
        context: names the formula may use besides columns, functions for example.
        max_iterations: evaluations of the criterion with its derivatives.
        others: none; those of lme4 and statsmodels are refused with what to write instead.

    Returns:
        The fit. Without an optimum it comes with ``converged`` False, a `message` and a
        ConvergenceWarning.

    Raises:
        FormulaError: a formula outside the grammar.
        DataError: data that the model cannot be fitted to, named.
        RuntimeError: in a process that was forked after JAX had run.
        TypeError: an argument that `fit` does not have.
    """
    refuse_arguments("fit", others)
    is_reml(method)
    frame = model_frame(formula, data, weights=weights, offset=offset, context=context)
    return fit_frame(frame, method, structure, context, max_iterations)


_RANDOM = 'random effects are terms of the formula, such as "y ~ x + (1 | group)"'
_GAUSSIAN = "responses are Gaussian here; for others use glmmTMB or lme4's glmer in R, or bambi"
_ELSEWHERE = {
    "REML": 'write method="REML" or method="ML"',
    "reml": 'write method="REML" or method="ML"',
    "groups": _RANDOM,
    "re_formula": _RANDOM + ' or "(x | group)" for slopes',
    "vc_formula": _RANDOM + ", several for several variance components",
    "exog_re": _RANDOM,
    "random": _RANDOM,
    "cluster": _RANDOM + "; standard errors that are robust to clusters are not offered",
    "family": _GAUSSIAN,
    "link": _GAUSSIAN,
    "subset": "give the rows wanted as data, such as data[data.x > 0]",
    "na_action": "rows with a missing value in a column used are dropped and counted",
    "missing": "rows with a missing value in a column used are dropped and counted",
    "contrasts": "write them in the formula, such as C(f, contr.sum)",
    "control": "the optimiser has one setting, max_iterations",
    "optimizer": "the optimiser has one setting, max_iterations",
    "maxiter": "write max_iterations",
    "start": "starting values are not needed",
}


def refuse_arguments(function: str, others: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that a function does not have, with those to use instead."""
    for name in others:
        hint = _ELSEWHERE.get(name)
        raise TypeError(f"{function} has no argument {name!r}{f': {hint}' if hint else ''}")


def fit_frame(
    frame: ModelFrame,
    method: str,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
) -> LMMResults:
    """`fit` of a model frame with a response."""
    with neutral():
        spare_memory_maps()
        with np.errstate(over="ignore", invalid="ignore"):  # not finite then, the status says so
            design = with_spare_levels(frame.design(structure))
        bare = design.without_names()
        estimated = _compiled(estimate, method, max_iterations=max_iterations)(bare)
        inspection = _compiled(inspect, method)(estimated, bare)
        estimated, inspection = jax.device_get((estimated, inspection))
    status = Status(int(estimated.status))
    if status in NO_FIT:
        raise DataError(status.sentence)
    gradient_norm = float(np.linalg.norm(inspection.gradient))
    scale = 1 + abs(float(estimated.criterion))
    agrees = abs(float(inspection.criterion - estimated.criterion)) <= 1e-9 * scale
    if status == Status.CONVERGED and not (agrees and gradient_norm <= CERTIFIED * scale):
        status = Status.NOT_CERTIFIED
    if status != Status.CONVERGED:
        warnings.warn(status.sentence, ConvergenceWarning, stacklevel=3)
    variances = conditional_variances(estimated, inspection, design)
    effects = list(zip(inspection.modes, variances, strict=True))
    with neutral():
        certainty = optimality(design, inspection.omega, reml=is_reml(method))
    results = _results(
        frame, design, method, estimated, effects, status, gradient_norm, context, certainty
    )
    vars(results).update(frame=frame, design=design)  # cached, as they are at hand
    return results


@remembered
def _compiled(function: Callable[..., Any], method: str, **options: Any) -> Callable[..., Any]:
    """`function` of arrays, jitted so that it compiles quickly."""
    return jax.jit(
        lambda *arrays: function(*arrays, method, **options),
        compiler_options=quick_compilation(jax.default_backend()),
    )


def _results(
    frame: ModelFrame,
    design: Any,
    method: str,
    estimated: Any,
    effects: list[tuple[np.ndarray, np.ndarray]],
    status: Status,
    gradient_norm: float,
    context: Mapping[str, Any] | None,
    optimality: str,
) -> LMMResults:
    assert frame.y is not None  # `model_frame` has one
    fixed = frame.X @ estimated.beta
    fitted = fixed.copy()
    groupings = []
    for term, (modes, variances) in zip(frame.terms, effects, strict=True):
        fitted += np.sum(term.effects * modes[term.codes], axis=1)
        names, own = term.effect_names, slice(len(term.levels))  # without a design's empty levels
        groupings.append(
            Grouping(term.name, term.levels, names, np.asarray(modes)[own], variances[own])
        )
    if frame.offset is not None:
        fixed, fitted = fixed + frame.offset, fitted + frame.offset
    converged = status == Status.CONVERGED
    blank = 1.0 if converged else np.nan
    return LMMResults(
        formula=frame.formula.text,
        method=method,
        structure=type(design.structure).__name__.lower(),
        fixed_names=frame.fixed_names,
        aliased=frame.aliased,
        groupings=tuple(groupings),
        parameter_names=design.parameter_names,
        theta=estimated.theta,
        parameters=estimated.params,
        parameters_vcov=estimated.params_vcov * blank,
        beta=estimated.beta,
        vcov_array=estimated.vcov,
        vcov_slopes=estimated.vcov_slopes,
        hessian=estimated.hessian,
        inertia=tuple(int(count) for count in estimated.inertia),
        sigma=float(estimated.sigma),
        criterion=float(estimated.criterion),
        n_iter=int(estimated.iterations),
        gradient_norm=gradient_norm,
        is_singular=bool(estimated.is_singular),
        status=int(status),
        n_dropped=frame.n_dropped,
        y=frame.y,
        fixed_fitted=fixed,
        fitted=fitted,
        weights=frame.weights,
        offset=frame.offset,
        table=frame.table,
        context=context,
        optimality=optimality,
    )
