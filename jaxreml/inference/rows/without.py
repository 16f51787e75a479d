"""Fits of some of the rows of a model frame, one after the other."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from jaxreml.data.estimability import independent_columns
from jaxreml.data.frame import ModelFrame
from jaxreml.errors import ConvergenceWarning, DataError
from jaxreml.fitting.fit import fit_frame
from jaxreml.fitting.fitted import FittedModel


def of_rows(frame: ModelFrame, kept: np.ndarray) -> tuple[ModelFrame, np.ndarray]:
    """The frame of the rows `kept`, (n,) booleans, with the columns of X as they are, and which of
    them do not depend on others there."""

    def regrouped(codes: np.ndarray, levels: tuple[Any, ...]) -> tuple[tuple[Any, ...], np.ndarray]:
        there, own = np.unique(codes[kept], return_inverse=True)
        return tuple(levels[k] for k in there), own

    terms = []
    for term in frame.terms:
        levels, codes = regrouped(term.codes, term.levels)
        terms.append(replace(term, levels=levels, codes=codes, effects=term.effects[kept]))
    residual = frame.residual
    if residual is not None:
        subjects, codes = regrouped(residual.codes, residual.subjects)
        places = residual.places[kept]
        residual = replace(residual, subjects=subjects, codes=codes, places=places)
    X = frame.X[kept]
    columns = independent_columns(X)
    assert frame.y is not None
    own = replace(
        frame,
        y=frame.y[kept],
        X=X[:, columns],
        fixed_names=tuple(frame.fixed_names[k] for k in columns),
        terms=tuple(terms),
        residual=residual,
        weights=None if frame.weights is None else frame.weights[kept],
        offset=None if frame.offset is None else frame.offset[kept],
        table=frame.table[kept],
    )
    return own, columns


def fits_without(
    fit: FittedModel, codes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Coefficients, standard errors and variance parameters without each group of rows, (count, p),
    (count, p) and (count, k + 1), NaN where there are none; and how each refit ended."""
    p, k = len(fit.beta), len(fit.parameters)
    beta, se = np.full((count, p), np.nan), np.full((count, p), np.nan)
    parameters = np.full((count, k), np.nan)
    messages, converged = [""] * count, np.zeros(count, bool)
    singular = np.zeros(count, bool)
    for group in range(count):
        frame, columns = of_rows(fit.frame, codes != group)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = fit_frame(frame, fit.method, fit.structure, engine=fit.engine or None)
        except DataError as error:
            messages[group] = str(error)
            continue
        converged[group], singular[group] = found.converged, found.is_singular
        messages[group] = found.message
        if found.converged:
            beta[group, columns], se[group, columns] = found.beta, found.bse
            parameters[group] = found.parameters
    rows = np.bincount(codes, minlength=count)
    ended = {"rows": rows, "converged": converged, "is_singular": singular, "message": messages}
    return beta, se, parameters, ended
