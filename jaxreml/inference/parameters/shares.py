"""Shares of variance: ICC, repeatability, heritability, R2, with the delta method's intervals.

What the parts of a model contribute is in `fitting.row_variances`; R's performance and MuMIn have
the same definitions. Intervals are made on the logit scale.

Where residuals of a subject have a covariance (`residual=`), the residual's part is the mean of
their variances over the rows, as that of random slopes is; `at` a visit, all means are over the
rows of that visit. Correlations of residuals are no part of a variance: what is of several
measurements is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.linalg import block_diag

from jaxreml.backend.compilation import remembered
from jaxreml.backend.lazy import jnp
from jaxreml.errors import DataError
from jaxreml.fitting import row_variances
from jaxreml.fitting.random_terms import RESIDUAL, Layout
from jaxreml.fitting.row_variances import FIXED, RowMoments
from jaxreml.inference.parameters import components, ratios
from jaxreml.inference.parameters.delta import Program, linearise, program
from jaxreml.inference.parameters.linearised import wald

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel


def icc(
    fit: FittedModel, group: str | None = None, conf_level: float = 0.95, *, at: Any = None
) -> pd.DataFrame:
    """Intraclass correlation: the share of the random effects in the variance around X beta.

    Args:
        fit: the fit.
        group: the grouping factor whose share it is; all together (performance's adjusted ICC) if
            left out.
        conf_level: of the interval.
        at: a visit of ``residual=``, whose rows it is of; all rows if left out.

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; no random effects; a visit that the fit does not
            have; a fit without an optimum.

    Examples:
        >>> scores.icc()[["estimate", "std_error", "lower", "upper"]].round(3)
             estimate  std_error  lower  upper
        icc     0.726      0.138  0.405  0.912
    """
    factors = _factors(fit)
    if not factors:
        raise DataError(
            "the fit has no random effects, whose share of the variance the intraclass correlation "
            "is; residual_corr has the correlations of a subject's visits"
        )
    return _shares(fit, ratios.icc(factors, group), conf_level, at)


def variance_shares(
    fit: FittedModel, *, fixed: bool = False, conf_level: float = 0.95, at: Any = None
) -> pd.DataFrame:
    """The share of each grouping factor and of the residual in the sum of their variances.

    Args:
        fit: the fit.
        fixed: whether the fixed effects are a part of the sum, with a row of their own.
        conf_level: of the intervals.
        at: as for `icc`.

    Returns:
        A row per part, as `delta`; the estimates sum to one.

    Raises:
        DataError: a fit without an optimum; a visit that it does not have.

    Examples:
        >>> scores.variance_shares(fixed=True)[["estimate", "std_error"]].round(3)
                       estimate  std_error
        Worker            0.381      0.158
        Residual          0.144      0.046
        Fixed effects     0.476      0.126
    """
    return _shares(fit, ratios.variance_shares(_factors(fit), fixed=fixed), conf_level, at)


def repeatability(
    fit: FittedModel,
    group: str,
    *,
    measurements: float = 1,
    adjusted: bool = True,
    conf_level: float = 0.95,
    at: Any = None,
) -> pd.DataFrame:
    """Repeatability of a measurement, or of the mean of several, of one level of `group`.

    V_group / (V_group + V_other groups + sigma2 / measurements), plus the variance of the fixed
    effects below if not `adjusted` (Nakagawa and Schielzeth 2010, Biological Reviews 85:935).

    Args:
        fit: the fit.
        group: the grouping factor, such as the individual measured.
        measurements: over how many the mean is.
        adjusted: whether the fixed effects are controlled for.
        conf_level: of the interval.
        at: as for `icc`.

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; a visit that the fit does not have; several
            measurements whose residuals are correlated; a fit without an optimum.
        ValueError: `measurements` below 1.

    Examples:
        >>> scores.repeatability("Worker", measurements=3)["estimate"].round(3).tolist()
        [0.888]
    """
    own = ratios.repeatability(_factors(fit), group, measurements, adjusted=adjusted)
    if measurements != 1:
        _require_uncorrelated(fit, "measurements")
    return _shares(fit, own, conf_level, at)


def heritability(
    fit: FittedModel,
    group: str,
    per: Mapping[str, float] | None = None,
    *,
    multiple: float = 1.0,
    conf_level: float = 0.95,
    at: Any = None,
) -> pd.DataFrame:
    """Heritability: multiple * V_group / (V_group + sum_k V_k / per[k]).

    On the basis of a plot, or of the mean of an entry of a trial over plots and environments
    (Falconer and Mackay 1996, Introduction to Quantitative Genetics, ch. 10; Holland, Nyquist and
    Cervantes-Martinez 2003, Plant Breeding Reviews 22:9).

    Args:
        fit: the fit.
        group: the grouping factor of the genotypes or families.
        per: the other parts of the phenotypic variance, grouping factors or "Residual", with the
            number of their values that a mean is over, such as
            ``{"line:site": 4, "Residual": 12}``. The residual counts once if it is not named;
            grouping factors that are not named (blocks, sites) do not count.
        multiple: additive variance over V_group: 4 for half-sib families, 2 for full sibs, 1 for
            lines or clones.
        conf_level: of the interval, made from the logit of the ratio.
        at: as for `icc`.

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; a visit that the fit does not have; a mean over
            residuals that are correlated; a fit without an optimum.
        ValueError: numbers in `per`, or a multiple, that are not positive.

    Examples:
        Of the mean of nine scores, with workers in the place of lines:

        >>> scores.heritability("Worker", {"Residual": 9})["estimate"].round(3).tolist()
        [0.96]
    """
    own = ratios.heritability(_factors(fit), group, per, multiple)
    if (per or {}).get(RESIDUAL, 1) != 1:
        _require_uncorrelated(fit, f"per[{RESIDUAL!r}]")
    frame = _shares(fit, own, conf_level, at)
    return frame.assign(**{name: multiple * frame[name] for name in frame.columns.drop("note")})


def r2(fit: FittedModel, conf_level: float = 0.95, *, at: Any = None) -> pd.DataFrame:
    """R2 of the fixed effects (marginal) and of fixed and random effects (conditional).

    Nakagawa, Johnson and Schielzeth (2017), J. R. Soc. Interface 14:20170213; random slopes
    by Johnson (2014).

    Args:
        fit: the fit.
        conf_level: of the intervals.
        at: as for `icc`.

    Returns:
        Rows marginal and conditional, as `delta`; without random effects they are the same.

    Raises:
        DataError: a fit without an optimum; a visit that it does not have.

    Examples:
        >>> fit.r2()[["estimate", "std_error"]].round(3)
                     estimate  std_error
        marginal        0.279      0.077
        conditional     0.799      0.044
    """
    return _shares(fit, ratios.r2(_factors(fit)), conf_level, at)


def _factors(fit: FittedModel) -> list[str]:
    """The grouping factors of random effects."""
    return list(dict.fromkeys(group for group, _ in fit.groups))


def _require_uncorrelated(fit: FittedModel, what: str) -> None:
    """Raise DataError if residuals of a subject are correlated."""
    if fit.residual is not None and fit.residual.block.correlation.correlated:
        raise DataError(
            f"{what} must be 1 with residual={fit.residual.text!r}: residuals of a subject are "
            "correlated, so that the variance of the mean of several is not theirs over their "
            "number, and it depends on which visits they are"
        )


def _shares(fit: FittedModel, rows: ratios.Ratios, conf_level: float, at: Any) -> pd.DataFrame:
    """Ratios of sums of variances, a row each."""
    moments = _moments(fit, at)
    above, below = ratios.matrices(rows, [*_factors(fit), RESIDUAL, FIXED])
    linear = linearise(fit, _program(fit.layout), *moments, above, below)
    return wald(linear, list(rows), conf_level, "logit")


def _moments(fit: FittedModel, at: Any = None) -> RowMoments:
    """Of all rows, or of those of a visit; with the shares of the visits in the rows."""
    frame, kept = fit.frame, slice(None)
    residual = frame.residual
    if at is not None:
        if residual is None:
            raise DataError(f"at={at!r} is for fits with residual=: this one has no visits")
        if at not in residual.visits:
            known = ", ".join(map(repr, residual.visits))
            raise DataError(f"{at!r} is not a visit of the fit; there are {known}")
        kept = residual.places % len(residual.visits) == residual.visits.index(at)
    moments = RowMoments.of(frame.X[kept], frame.terms, kept)
    if residual is not None and fit.residual is not None and fit.residual.block.of_matrix:
        counts = np.bincount(residual.places[kept], minlength=fit.residual.block.size)
        moments.squares[RESIDUAL] = np.diag(counts / counts.sum())
    return moments


def shares(fit: FittedModel, rows: ratios.Ratios) -> dict[str, float]:
    """Ratios of sums of variances without standard errors, which nothing is compiled for."""
    moments, names = _moments(fit), _factors(fit)
    parts = []
    for name in names:
        of_terms = zip(fit.groups, fit.cov_re_arrays, strict=True)
        covariance = block_diag(*(matrix for (group, _), matrix in of_terms if group == name))
        parts.append(row_variances.random_variance(moments.squares[name], covariance))
    residual = fit.sigma**2
    if RESIDUAL in moments.squares:
        matrix = fit.residual_cov.to_numpy()
        residual = row_variances.random_variance(moments.squares[RESIDUAL], matrix)
    parts += [residual, row_variances.fixed_variance(moments.spread, fit.beta)]
    above, below = ratios.matrices(rows, [*names, RESIDUAL, FIXED])
    with np.errstate(invalid="ignore"):
        values = (above @ parts) / (below @ parts)
    return dict(zip(rows, map(float, values), strict=True))


@remembered
def _program(layout: Layout) -> Program:
    return program(_ratios, layout)


def _ratios(
    beta: Array,
    named: components.Components,
    squares: Mapping[str, Array],
    spread: Array,
    above: Array,
    below: Array,
) -> Array:
    """(above @ parts) / (below @ parts), with the variances of the parts."""
    names = [name for name in named if name != RESIDUAL]
    random = [
        row_variances.random_variance(squares[name], named[name])
        for name in [*names, *[RESIDUAL] * (RESIDUAL in squares)]
    ]
    alone = [] if RESIDUAL in squares else [named[RESIDUAL]]
    parts = jnp.stack([*random, *alone, row_variances.fixed_variance(spread, beta)])
    return (above @ parts) / (below @ parts)
