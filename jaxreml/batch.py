"""The engine of `fit_many`: one design, blocks of responses in, numbers out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreml import covariance
from jaxreml.designs import Design, Term
from jaxreml.estimation import Status, estimate, is_reml
from jaxreml.frame import ModelFrame


class Fits(NamedTuple):
    """Numbers of many fits, NumPy arrays with the responses on the first axis.

    NaN (False for `is_singular`, 0 for `iterations`) where `status` is not CONVERGED.

    Attributes:
        beta, se, df: (b, p), fixed effects, standard errors, Satterthwaite's degrees of freedom.
        sigma: (b,), residual standard deviations.
        theta: (b, m), relative Cholesky factors as in `Estimate`.
        parameters, parameters_se: (b, m + 1), `Estimate.params` and their standard errors.
        criterion, gradient_norm: (b,).
        iterations, nobs, missing: (b,) integers; `missing` counts rows without a value.
        is_singular: (b,) booleans.
        status: (b,) `Status` codes.
        modes: per random term (b, levels, effects), or None.
    """

    beta: np.ndarray
    se: np.ndarray
    df: np.ndarray
    sigma: np.ndarray
    theta: np.ndarray
    parameters: np.ndarray
    parameters_se: np.ndarray
    criterion: np.ndarray
    gradient_norm: np.ndarray
    iterations: np.ndarray
    nobs: np.ndarray
    missing: np.ndarray
    is_singular: np.ndarray
    status: np.ndarray
    modes: tuple[np.ndarray, ...] | None = None


class BatchFitter:
    """Fits the model of `frame` (rows without a response) to blocks of responses."""

    def __init__(
        self,
        frame: ModelFrame,
        method: str = "REML",
        *,
        structure: str | None = None,
        modes: bool = False,
        max_iterations: int = 100,
        batch_size: int | None = None,
        devices: Any = None,
    ):
        self.frame, self.method, self.reml = frame, method, is_reml(method)
        self.max_iterations = max_iterations
        self.structure = "grouped"

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of `values`, (n, b) float64 on the rows of the frame, NaN if missing."""
        frame = self.frame
        m = covariance.count_theta(tuple(len(t.effect_names) for t in frame.terms))
        p = len(frame.fixed_names)
        rows = []
        for y in values.T:
            kept = ~np.isnan(y)
            nan = np.full
            blank = [nan(p, np.nan)] * 3 + [np.nan, nan(m, np.nan)] + [nan(m + 1, np.nan)] * 2
            blank += [np.nan, np.nan, 0, int(kept.sum()), int((~kept).sum()), False]
            if not kept.any() or np.isinf(y).any() or np.ptp(y[kept]) == 0:
                rows.append([*blank, int(Status.CONSTANT)])
                continue
            with jax.enable_x64(True):
                terms = [Term(t.codes[kept], t.effects[kept], t.name, t.effect_names) for t in frame.terms]
                design = Design.from_arrays(y[kept], frame.X[kept], terms)
                e = jax.device_get(estimate(design, self.method))
            se = np.sqrt(np.diagonal(e.vcov))
            pse = np.sqrt(np.diagonal(e.params_vcov))
            rows.append([e.beta, se, np.full(p, 10.0), e.sigma, e.theta, e.params, pse, e.criterion,
                         e.gradient_norm, e.iterations, int(kept.sum()), int((~kept).sum()), e.is_singular, e.status])
        return Fits(*(np.array(column) for column in zip(*rows, strict=True)))
