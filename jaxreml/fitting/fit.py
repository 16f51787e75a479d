"""A model frame to a certified fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreml.arguments import check_engine, is_reml
from jaxreml.backend.threads import suited_blas
from jaxreml.data.frame import ModelFrame
from jaxreml.errors import ConvergenceWarning, DataError
from jaxreml.fitting.engines import engine_for, numbers_of, optimum, suited_structure
from jaxreml.fitting.fitted import Fit, FittedModel, Grouping
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.model.design import with_spare_levels
from jaxreml.model.penalties import penalty_of
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import conditional_variances
from jaxreml.optimum.identification import require_determined
from jaxreml.optimum.rivals import optimality
from jaxreml.status import NO_FIT, Status


def fit_frame(
    frame: ModelFrame,
    method: str,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
    kind: type[Fit] = FittedModel,
    engine: str | None = None,
    penalty: Any = None,
) -> Fit:
    """`fit` of a model frame with a response; as a fit of class `kind`."""
    check_engine(engine)
    structure = suited_structure(frame, structure, engine)
    # Not finite then, the status says so.
    with np.errstate(over="ignore", invalid="ignore"), suited_blas(numbers_of(frame)):
        design = with_spare_levels(frame.design(structure))
    if frame.residual is not None and frame.terms and design.written_out:
        words = frame.residual.words
        require_determined(design.collapsed, words.text, reml=is_reml(method))
    engine = engine_for(design, engine)
    density = penalty_of(penalty, design.covariance, design.names)
    bare = design.without_names()
    estimated, inspection, proved = optimum(bare, method, max_iterations, engine, density)
    status = Status(int(estimated.status))
    if status in NO_FIT:
        raise DataError(status.sentence)
    gradient_norm = float(np.linalg.norm(inspection.gradient))
    certified = is_certified(estimated.criterion, inspection.criterion, gradient_norm)
    if status == Status.CONVERGED and not certified:
        status = Status.NOT_CERTIFIED
    if status != Status.CONVERGED:
        warnings.warn(status.sentence, ConvergenceWarning, stacklevel=3)
    with suited_blas(design.numbers):
        variances = conditional_variances(estimated, inspection, design)
    known = optimality(design, proved) if density is None else "the lowest of 2 searches"
    fields = _fields(
        frame,
        design,
        method,
        estimated,
        (inspection.modes, variances),
        status,
        gradient_norm,
        context,
        known,
    )
    if density is not None:
        finite = design.covariance.finite(np.asarray(estimated.parameters))
        fields["penalty"] = density.text(design.covariance, design.names)
        fields["penalty_value"] = float(density.value(finite, design.covariance))
    return kind(**fields, engine=engine)


def _fields(
    frame: ModelFrame,
    design: Any,
    method: str,
    estimated: Any,
    effects: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]],
    status: Status,
    gradient_norm: float,
    context: Mapping[str, Any] | None,
    optimality: str,
) -> dict[str, Any]:
    """Those of `FittedModel`."""
    assert frame.y is not None  # `model_frame` has one
    fixed = frame.X @ estimated.beta
    fitted = fixed.copy()
    groupings = []
    for term, modes, variances in zip(frame.terms, *effects, strict=False):  # residuals last
        fitted += np.sum(term.effects * modes[term.codes], axis=1)
        names, own = term.effect_names, slice(len(term.levels))  # without a design's empty levels
        groupings.append(
            Grouping(
                term.name,
                term.levels,
                names,
                np.asarray(modes)[own],
                variances[own],
                None if term.kernel is None else len(term.seen),
                term.covariance,
            )
        )
    if frame.offset is not None:
        fixed, fitted = fixed + frame.offset, fitted + frame.offset
    converged = status == Status.CONVERGED
    blank = 1.0 if converged else np.nan
    return {
        "formula": frame.formula.text,
        "method": method,
        "structure": type(design.structure).__name__.lower(),
        "fixed_names": frame.fixed_names,
        "aliased": frame.aliased,
        "groupings": tuple(groupings),
        "kernels": frame.kernels or None,
        "residual": frame.residual and ResidualCovariance.of(frame.residual, effects[0][-1]),
        "parameter_names": design.parameter_names,
        "theta": estimated.theta,
        "parameters": estimated.parameters,
        "parameters_vcov_array": estimated.parameters_vcov * blank,
        "beta": estimated.beta,
        "vcov_array": estimated.vcov,
        "vcov_slopes": estimated.vcov_slopes,
        "hessian": estimated.hessian,
        "inertia": tuple(int(count) for count in estimated.inertia),
        "sigma": float(estimated.sigma),
        "criterion": float(estimated.criterion),
        "n_iter": int(estimated.n_iter),
        "gradient_norm": gradient_norm,
        "is_singular": bool(estimated.is_singular),
        "status": int(status),
        "n_dropped": frame.n_dropped,
        "y": frame.y,
        "fixed_fitted": fixed,
        "fitted": fitted,
        "weights": frame.weights,
        "offset": frame.offset,
        "table": frame.table,
        "context": context,
        "optimality": optimality,
        "made_from": (frame, design),
        "library": frame.library,
    }
