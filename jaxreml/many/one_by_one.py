"""Refits of a model with any covariances, one response after the other, by NumPy.

`BatchFitter` has unstructured covariances of random effects, and works on residuals of up to
four visits in batches. Here are all others: covariances of effects by words (``ar1(...)``) or of a
user's own, and of residuals of more visits, from the estimates that responses are drawn from.
Responses are complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.arguments import is_reml
from jaxreml.backend.threads import suited_blas
from jaxreml.data.frame import ModelFrame
from jaxreml.fitting.engines import suited_structure
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.many.engine import BatchFitter
from jaxreml.many.numbers import Fits
from jaxreml.many.singles import SinglesEngine
from jaxreml.many.steps import objective_gradients, satterthwaite_tests
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.design import Design
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import differences
from jaxreml.optimum.estimate import estimate_on_host
from jaxreml.optimum.report import Estimate, report
from jaxreml.optimum.search import outcome, search
from jaxreml.status import NO_FIT, Status

TOLERANCE = 1e-12  # of the Newton decrement, as in `estimate`
MAX_ITERATIONS = 100


def refitter(
    frame: ModelFrame,
    method: str,
    count: int | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> BatchFitter | OneByOne:
    """What fits a model to blocks of complete responses.

    Args:
        frame: the rows and terms.
        method: "REML" or "ML".
        count: how many responses there will be, if that is known.
        start: theta and parameters near those of the responses, such as of the fit that they are
            drawn from.
    """
    blocks = tuple(term.block(len(term.effect_names)) for term in frame.terms)
    own = None if frame.residual is None else ResidualCovariance.of_labels(frame.residual)
    in_batches = own is None or own.block.of_matrix
    if in_batches and blocks == unstructured(tuple(block.size for block in blocks)).blocks:
        fitter = BatchFitter(frame, method, count=count)
        if frame.residual is None or not isinstance(fitter.engine, SinglesEngine):
            return fitter
    return OneByOne(frame, method, start)


@dataclass(frozen=True)
class OneByOne:
    """See above; arguments as those of `refitter`."""

    frame: ModelFrame
    method: str
    start: tuple[np.ndarray, np.ndarray] | None = None

    @cached_property
    def _basis(self) -> Basis:
        return self.frame.basis(suited_structure(self.frame, None, "numpy"))

    @cached_property
    def _blank(self) -> Design:
        return Design.of(self._basis, self._basis.blank())

    def _design(self, y: np.ndarray) -> Design:
        return self._blank.with_response(self._basis.response(y))

    @cached_property
    def _chart(self) -> np.ndarray | None:
        """Where to begin, if that is known and nothing is on a boundary there: only residuals'
        covariances have none, and one optimum as a rule."""
        covariance = self._blank.covariance
        if self.start is None or covariance.random.any():
            return None
        theta, parameters = self.start
        return np.asarray(covariance.chart_at(self._blank.scaled_factors(theta), parameters))

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of `values`, (n, b); of `Fits`, what rows contribute is left out."""
        with np.errstate(all="ignore"), suited_blas(self._blank.numbers):
            found = [self._fitted(y) for y in values.T]
        rows = [self._numbers(*one) for one in found]
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        b, (n, p) = len(rows), self.frame.X.shape
        none = np.zeros((b, 0))
        return Fits(
            **columns,
            residual_df=np.full(b, np.nan),
            nobs=np.full(b, n),
            n_missing=np.zeros(b, int),
            rank=np.full(b, p),
            mean=values.mean(axis=0),
            **dict.fromkeys(
                ("contributions", "contributions_cov", "contrast", "contrast_se", "contrast_df"),
                none,
            ),
        )

    def _fitted(self, y: np.ndarray) -> tuple[Estimate, Status]:
        """The estimate of one response, and how it ended, certified by differences."""
        design = self._design(y).collapsed
        reml = is_reml(self.method)
        found = None
        if self._chart is not None:
            trace = search(design, self._chart, reml, TOLERANCE, MAX_ITERATIONS)
            status = outcome(trace.at, trace.point, trace, design)
            if status == Status.CONVERGED:
                found = report(trace.at, trace.point, trace, design, status)
        if found is None:
            found, _ = estimate_on_host(design, self.method)
        status = Status(int(found.status))
        if status == Status.CONVERGED:
            value, slopes = differences(found.theta, design, reml, found.parameters)
            if not is_certified(found.criterion, value, np.linalg.norm(slopes)):
                status = Status.NOT_CERTIFIED
        return found, status

    def _numbers(self, found: Estimate, status: Status) -> dict[str, Any]:
        """Fields of `Fits`, NaN without an optimum."""
        p = self.frame.X.shape[1]
        with np.errstate(all="ignore"):
            tests = satterthwaite_tests(found, np.eye(p))
            numbers: dict[str, Any] = {
                "beta": found.beta,
                "se": tests.errors,
                "df": tests.degrees,
                "sigma": found.sigma,
                "theta": found.theta,
                "parameters": found.parameters,
                "parameters_se": np.sqrt(np.diagonal(found.parameters_vcov)),
                "criterion": found.criterion,
                "gradient_norm": found.gradient_norm,
            }
        good = status == Status.CONVERGED
        if not good:
            numbers = {name: np.full_like(own, np.nan) for name, own in numbers.items()}
        return numbers | {
            "n_iter": int(found.n_iter) if status not in NO_FIT else 0,
            "is_singular": bool(found.is_singular) and good,
            "status": int(status),
        }

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients (b, k + 1) of the objective at `parameters` for (n, b) `values`."""
        units, reml = self._basis.units, is_reml(self.method)
        return np.stack(
            [objective_gradients(parameters, self._design(y), units, reml=reml) for y in values.T]
        )
