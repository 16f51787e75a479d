"""Shares of variance of many fits: the ratios of `inference.shares`, a row per response."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.special import ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.fitting.row_variances import FIXED
from jaxreml.inference.parameters import ratios
from jaxreml.inference.parameters.linearised import TRANSFORMS
from jaxreml.many.contributions import unpacked
from jaxreml.many.fitted import FittedBatch
from jaxreml.status import Status

NOTHING = 1e-18  # a variance of a ratio this small is rounding error


def variance_fractions(results: FittedBatch) -> pd.DataFrame:
    """Fractions of the variance of each response, by variancePartition's definition.

    A grouping factor has its variance, fixed effects together the variance of X beta over the rows,
    divisor n, which is split between the terms in proportion to the variance of what each term adds
    (Hoffman and Schadt 2016, BMC Bioinformatics 17:483; ``calcVarPart`` of a fit by lmer).

    It differs in what that leaves to the coding: a factor of several columns is one term here,
    where calcVarPart has a fraction for each column; random slopes count with the values of their
    covariates, where it has the variance of a slope as such. The sum of the
    terms' fractions is that of `variance_shares` with ``fixed=True``, but for its divisor n - 1.

    Returns:
        A row per response, a column per grouping factor and per fixed term without the intercept,
        and Residual last; rows sum to one. A term called as a grouping factor is ``term (fixed)``.

    Raises:
        DataError: results of a version that kept no contributions.

    Examples:
        >>> results.variance_fractions().round(2).head(2)
               Subject  Days  Residual
        gene1     0.50  0.09      0.41
        gene2     0.53  0.14      0.34
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


def variance_shares(
    results: FittedBatch, *, fixed: bool = False, conf_level: float = 0.95
) -> pd.DataFrame:
    """`LMMResults.variance_shares` of each response: columns by part, and estimate, std_error,
    lower and upper.

    Examples:
        >>> results.variance_shares()["Subject"].round(2).head(2)
               estimate  std_error  lower  upper
        gene1      0.55       0.10   0.36   0.72
        gene2      0.61       0.09   0.43   0.77
    """
    rows = ratios.variance_shares(results.model.grouping_factors, fixed=fixed)
    return _ratios(results, rows, conf_level)


def icc(
    results: FittedBatch, group: str | None = None, *, conf_level: float = 0.95
) -> pd.DataFrame:
    """`LMMResults.icc` of each response: columns estimate, std_error, lower and upper.

    Examples:
        >>> results.icc().round(2).head(2)
               estimate  std_error  lower  upper
        gene1      0.55       0.10   0.36   0.72
        gene2      0.61       0.09   0.43   0.77
    """
    return _one(results, ratios.icc(results.model.grouping_factors, group), conf_level)


def r2(results: FittedBatch, *, conf_level: float = 0.95) -> pd.DataFrame:
    """`LMMResults.r2` of each response: columns by marginal and conditional, and estimate,
    std_error, lower and upper.

    Examples:
        >>> results.r2()["marginal"].round(2).head(2)
               estimate  std_error  lower  upper
        gene1      0.09       0.03   0.04   0.17
        gene2      0.14       0.04   0.08   0.23
    """
    return _ratios(results, ratios.r2(results.model.grouping_factors), conf_level)


def repeatability(
    results: FittedBatch,
    group: str,
    *,
    measurements: float = 1,
    adjusted: bool = True,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """`LMMResults.repeatability` of each response: columns as `icc`.

    Examples:
        >>> results.repeatability("Subject", measurements=10).round(2).head(2)
               estimate  std_error  lower  upper
        gene1      0.92       0.03   0.85   0.96
        gene2      0.94       0.02   0.88   0.97
    """
    groups = results.model.grouping_factors
    rows = ratios.repeatability(groups, group, measurements, adjusted=adjusted)
    return _one(results, rows, conf_level)


def heritability(
    results: FittedBatch,
    group: str,
    per: Mapping[str, float] | None = None,
    *,
    multiple: float = 1.0,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """`LMMResults.heritability` of each response: columns as `icc`.

    Examples:
        >>> results.heritability("Subject", {"Residual": 10}).round(2).head(2)
               estimate  std_error  lower  upper
        gene1      0.92       0.03   0.85   0.96
        gene2      0.94       0.02   0.88   0.97
    """
    rows = ratios.heritability(results.model.grouping_factors, group, per, multiple)
    return multiple * _one(results, rows, conf_level)


def _one(results: FittedBatch, rows: ratios.Ratios, conf_level: float) -> pd.DataFrame:
    (name,) = rows
    return pd.DataFrame(dict(_ratios(results, rows, conf_level)[name].items()))


def _ratios(results: FittedBatch, rows: ratios.Ratios, conf_level: float) -> pd.DataFrame:
    """Ratios of sums of variances with standard errors by the delta method, and intervals made on
    the logit scale. NaN on the boundary: where what a ratio is of is held there."""
    check_conf_level(conf_level)
    groups = results.model.grouping_factors
    k = len(groups)
    fits = results.fits
    own = _contributions(results)[:, [*range(k), -1]]
    parts = np.concatenate([own, fits.sigma[:, None] ** 2], axis=1)
    above, below = ratios.matrices(rows, [*groups, FIXED, RESIDUAL])
    whole = parts @ below.T
    estimate = parts @ above.T / whole
    slope = (above - estimate[:, :, None] * below) / whole[:, :, None]  # (b, ratios, parts)
    covariances = unpacked(fits.contributions_cov, k)
    variance = np.einsum("brp,bpq,brq->br", slope, covariances, slope)
    held = (variance <= NOTHING) & fits.is_singular[:, None]
    error = np.sqrt(np.where(held, np.nan, np.maximum(variance, 0.0)))
    scale = TRANSFORMS["logit"]
    with np.errstate(divide="ignore", invalid="ignore"):
        half = ndtri((1 + conf_level) / 2) * error * scale.slope(estimate)
        limits = [scale.inverse(scale.forward(estimate) + sign * half) for sign in (-1, 1)]
    names = ("estimate", "std_error", "lower", "upper")
    values = np.stack([estimate, error, *limits], axis=2).reshape(len(results), -1)
    columns = pd.MultiIndex.from_product([list(rows), names])
    return pd.DataFrame(values, results.responses, columns)


def _contributions(results: FittedBatch) -> np.ndarray:
    results.model.require_independent("share out the variance of a row")
    fits = results.fits
    good = fits.status == Status.CONVERGED
    if np.isnan(fits.contributions[good]).any():
        raise DataError(
            "these results were written by a version of jaxreml that kept no contributions to the "
            "variance of a row: fit again"
        )
    return fits.contributions
