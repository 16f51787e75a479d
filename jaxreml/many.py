"""`fit_many`: one formula, one table, many responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.batch import BatchFitter
from jaxreml.batch_results import BatchModel, BatchResults
from jaxreml.frame import covariate_frame


def fit_many(
    formula: str,
    data: Any,
    responses: Any,
    method: str = "REML",
    *,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    modes: bool = False,
    max_iterations: int = 100,
    batch_size: int | None = None,
    devices: Any = None,
) -> BatchResults:
    """Fit one linear mixed model to many responses."""
    frame = covariate_frame(formula, data, weights=weights, offset=offset, context=context)
    fitter = BatchFitter(
        frame,
        method,
        structure=structure,
        modes=modes,
        max_iterations=max_iterations,
        batch_size=batch_size,
        devices=devices,
    )
    names = responses.columns if isinstance(responses, pd.DataFrame) else pd.RangeIndex(responses.shape[1])
    values = np.asarray(responses, float)
    model = BatchModel(
        frame.formula.text,
        method,
        fitter.structure,
        frame.fixed_names,
        frame.aliased,
        tuple((term.name, term.effect_names) for term in frame.terms),
        tuple(term.levels for term in frame.terms),
        frame.n_dropped,
    )
    return BatchResults(model, pd.Index(names), fitter.fit(values[frame.rows]))
