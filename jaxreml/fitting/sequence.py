"""Covariances of residuals tried in turn, until one can be estimated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxreml.data.frame import ModelFrame
from jaxreml.errors import ConvergenceWarning, DataError
from jaxreml.fitting.fitted import Fit


def fit_in_turn(frames: Mapping[str, ModelFrame], fitted: Callable[[ModelFrame], Fit]) -> Fit:
    """The fit of the first of `frames`, by the argument ``residual`` of each, that has no
    `failure`; it says which were left before and why (`FittedModel.residual_tried`).

    If all fail it is the last that there is, with a ConvergenceWarning.

    Raises:
        DataError: none could be fitted; that of the first.
    """
    tried: list[tuple[str, str]] = []
    last: Fit | None = None
    first_error: DataError | None = None
    for text, frame in frames.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = fitted(frame)
        except DataError as error:
            first_error = first_error or error
            tried.append((text, str(error)))
            continue
        why = failure(found)
        if why is None:
            return replace(found, residual_tried=tuple(tried))
        tried.append((text, why))
        last = found
    if last is None:
        assert first_error is not None
        raise first_error
    kept = tuple(own for own in tried if own[0] != (last.residual and last.residual.text))
    sentence = f"none of {', '.join(frames)} could be estimated; this is the last of them"
    warnings.warn(sentence, ConvergenceWarning, stacklevel=3)
    return replace(last, residual_tried=kept)


def failure(fit: Any) -> str | None:
    """Why a fit does not count as one, in words: it has no certified optimum, or the Hessian in the
    variance parameters is not positive definite there, or a parameter of the residuals is at the
    end of its range. None for one that counts.

    Random effects beside the residuals may have a variance of zero.
    """
    if not fit.converged:
        return fit.message
    if np.isnan(np.diagonal(fit.parameters_vcov_array)[np.isfinite(fit.parameters)]).any():
        return (
            "the Hessian in the variance parameters is not positive definite: the criterion is "
            "flat in a combination of them"
        )
    own = [name.split("[")[1].startswith("Residual") for name in fit.parameter_names]
    if not np.isfinite(fit.parameters[own]).all():
        return "a parameter of the residuals' covariance is at the end of its range"
    return None
