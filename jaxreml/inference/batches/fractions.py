"""Shares of variance of many fits: the ratios of `inference.shares`, a row per response."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.fitting.row_variances import FIXED
from jaxreml.inference.parameters import ratios
from jaxreml.many.fitted import FittedBatch
from jaxreml.status import Status


def variance_fractions(results: FittedBatch) -> pd.DataFrame:
    """Fractions of the variance of each response, by variancePartition's definition.

    A grouping factor has its variance, fixed effects together the variance of X beta over the rows,
    divisor n, which is split between the terms in proportion to the variance of what each term adds
    (Hoffman and Schadt 2016, BMC Bioinformatics 17:483; ``calcVarPart`` of a fit by lmer).

    It differs in what that leaves to the coding: a factor of several columns is one term here,
    where calcVarPart has a fraction for each column; random slopes count with the values of their
    covariates (`inference.shares`), where it has the variance of a slope as such. The sum of the
    terms' fractions is `variance_shares` with ``fixed=True``, but for its divisor n - 1.

    Returns:
        A row per response, a column per grouping factor and per fixed term without the intercept,
        and Residual last; rows sum to one. A term called as a grouping factor is ``term (fixed)``.

    Raises:
        DataError: results of a version that kept no contributions.
    """
    model, fits = results.model, results.fits
    parts = _contributions(results)
    k, groups = len(model.grouping_factors), model.grouping_factors
    n = fits.nobs[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        terms, total = parts[:, k:-1], parts[:, -1:] * (n - 1) / n
        sums = terms.sum(axis=1, keepdims=True)
        split = np.where(sums > 0, terms / sums, 0.0) * total
        found = np.concatenate([parts[:, :k], split, fits.sigma[:, None] ** 2], axis=1)
        found /= found.sum(axis=1, keepdims=True)
    names = [f"{term} (fixed)" if term in groups else term for term in model.fixed_terms]
    return pd.DataFrame(found, results.responses, [*groups, *names, RESIDUAL])


def variance_shares(results: FittedBatch, *, fixed: bool = False) -> pd.DataFrame:
    """The estimates of `LMMResults.variance_shares` of each response, a column per part."""
    return _ratios(results, ratios.variance_shares(results.model.grouping_factors, fixed=fixed))


def icc(results: FittedBatch, group: str | None = None) -> pd.Series:
    """The estimates of `LMMResults.icc` of each response."""
    return _one(results, ratios.icc(results.model.grouping_factors, group))


def r2(results: FittedBatch) -> pd.DataFrame:
    """The estimates of `LMMResults.r2` of each response, columns marginal and conditional."""
    return _ratios(results, ratios.r2(results.model.grouping_factors))


def repeatability(
    results: FittedBatch, group: str, *, measurements: float = 1, adjusted: bool = True
) -> pd.Series:
    """The estimates of `LMMResults.repeatability` of each response."""
    groups = results.model.grouping_factors
    return _one(results, ratios.repeatability(groups, group, measurements, adjusted=adjusted))


def heritability(
    results: FittedBatch,
    group: str,
    per: Mapping[str, float] | None = None,
    *,
    multiple: float = 1.0,
) -> pd.Series:
    """The estimates of `LMMResults.heritability` of each response."""
    groups = results.model.grouping_factors
    return multiple * _one(results, ratios.heritability(groups, group, per, multiple))


def _one(results: FittedBatch, rows: ratios.Ratios) -> pd.Series:
    (name,) = rows
    return pd.Series(_ratios(results, rows)[name].to_numpy(), results.responses, name=name)


def _ratios(results: FittedBatch, rows: ratios.Ratios) -> pd.DataFrame:
    """Ratios of sums of variances, a column each."""
    groups = results.model.grouping_factors
    own = _contributions(results)[:, [*range(len(groups)), -1]]
    parts = np.concatenate([own, results.fits.sigma[:, None] ** 2], axis=1)
    above, below = ratios.matrices(rows, [*groups, FIXED, RESIDUAL])
    return pd.DataFrame(parts @ above.T / (parts @ below.T), results.responses, list(rows))


def _contributions(results: FittedBatch) -> np.ndarray:
    fits = results.fits
    good = fits.status == Status.CONVERGED
    if np.isnan(fits.contributions[good]).any():
        raise DataError(
            "these results were written by a version of jaxreml that kept no contributions to the "
            "variance of a row: fit again"
        )
    return fits.contributions
