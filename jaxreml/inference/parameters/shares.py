"""Shares of variance: ICC, repeatability, heritability, R2, with the delta method's intervals.

What the parts of a model contribute is in `fitting.row_variances`; R's performance and MuMIn have
the same definitions. Intervals are made on the logit scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.linalg import block_diag

from jaxreml.backend.compilation import remembered
from jaxreml.backend.lazy import jnp
from jaxreml.fitting import row_variances
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.fitting.row_variances import FIXED, RowMoments
from jaxreml.inference.parameters import components, ratios
from jaxreml.inference.parameters.delta import Program, linearise, program, wald

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel


def icc(fit: FittedModel, group: str | None = None, conf_level: float = 0.95) -> pd.DataFrame:
    """Intraclass correlation: the share of the random effects in the variance around X beta.

    Args:
        fit: the fit.
        group: the grouping factor whose share it is; all together (performance's adjusted ICC) if
            left out.
        conf_level: of the interval.

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.

    Examples:
        >>> scores.icc()[["estimate", "std_error", "lower", "upper"]].round(3)
             estimate  std_error  lower  upper
        icc     0.726      0.138  0.405  0.912
    """
    return _shares(fit, ratios.icc(list(fit.ngroups), group), conf_level)


def variance_shares(
    fit: FittedModel, *, fixed: bool = False, conf_level: float = 0.95
) -> pd.DataFrame:
    """The share of each grouping factor and of the residual in the sum of their variances.

    Args:
        fit: the fit.
        fixed: whether the fixed effects are a part of the sum, with a row of their own.
        conf_level: of the intervals.

    Returns:
        A row per part, as `delta`; the estimates sum to one.

    Raises:
        DataError: a fit without an optimum.

    Examples:
        >>> scores.variance_shares(fixed=True)[["estimate", "std_error"]].round(3)
                       estimate  std_error
        Worker            0.381      0.158
        Residual          0.144      0.046
        Fixed effects     0.476      0.126
    """
    return _shares(fit, ratios.variance_shares(list(fit.ngroups), fixed=fixed), conf_level)


def repeatability(
    fit: FittedModel,
    group: str,
    *,
    measurements: float = 1,
    adjusted: bool = True,
    conf_level: float = 0.95,
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

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.
        ValueError: `measurements` below 1.

    Examples:
        >>> scores.repeatability("Worker", measurements=3)["estimate"].round(3).tolist()
        [0.888]
    """
    own = ratios.repeatability(list(fit.ngroups), group, measurements, adjusted=adjusted)
    return _shares(fit, own, conf_level)


def heritability(
    fit: FittedModel,
    group: str,
    per: Mapping[str, float] | None = None,
    *,
    multiple: float = 1.0,
    conf_level: float = 0.95,
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

    Returns:
        One row, as `delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.
        ValueError: numbers in `per`, or a multiple, that are not positive.

    Examples:
        Of the mean of nine scores, with workers in the place of lines:

        >>> scores.heritability("Worker", {"Residual": 9})["estimate"].round(3).tolist()
        [0.96]
    """
    own = ratios.heritability(list(fit.ngroups), group, per, multiple)
    frame = _shares(fit, own, conf_level)
    return frame.assign(**{name: multiple * frame[name] for name in frame.columns.drop("note")})


def r2(fit: FittedModel, conf_level: float = 0.95) -> pd.DataFrame:
    """R2 of the fixed effects (marginal) and of fixed and random effects (conditional).

    Nakagawa, Johnson and Schielzeth (2017), J. R. Soc. Interface 14:20170213; random slopes
    by Johnson (2014).

    Args:
        fit: the fit.
        conf_level: of the intervals.

    Returns:
        Rows marginal and conditional, as `delta`.

    Raises:
        DataError: a fit without an optimum.

    Examples:
        >>> fit.r2()[["estimate", "std_error"]].round(3)
                     estimate  std_error
        marginal        0.279      0.077
        conditional     0.799      0.044
    """
    return _shares(fit, ratios.r2(list(fit.ngroups)), conf_level)


def _shares(fit: FittedModel, rows: ratios.Ratios, conf_level: float) -> pd.DataFrame:
    fit.require_independent("give shares of variance")
    """Ratios of sums of variances, a row each."""
    frame = fit.frame
    moments = RowMoments.of(frame.X, frame.terms)
    above, below = ratios.matrices(rows, [*fit.ngroups, RESIDUAL, FIXED])
    linear = linearise(fit, _program(fit.term_sizes), *moments, above, below)
    return wald(linear, list(rows), conf_level, "logit")


def shares(fit: FittedModel, rows: ratios.Ratios) -> dict[str, float]:
    """Ratios of sums of variances without standard errors, which nothing is compiled for."""
    frame = fit.frame
    moments = RowMoments.of(frame.X, frame.terms)
    parts = []
    for name, squares in moments.squares.items():
        of_terms = zip(fit.groups, fit.cov_re_arrays, strict=True)
        covariance = block_diag(*(matrix for (group, _), matrix in of_terms if group == name))
        parts.append(row_variances.random_variance(squares, covariance))
    parts += [fit.sigma**2, row_variances.fixed_variance(moments.spread, fit.beta)]
    above, below = ratios.matrices(rows, [*moments.squares, RESIDUAL, FIXED])
    with np.errstate(invalid="ignore"):
        values = (above @ parts) / (below @ parts)
    return dict(zip(rows, map(float, values), strict=True))


@remembered
def _program(groups: components.Groups) -> Program:
    return program(_ratios, groups)


def _ratios(
    beta: Array,
    named: components.Components,
    squares: Mapping[str, Array],
    spread: Array,
    above: Array,
    below: Array,
) -> Array:
    """(above @ parts) / (below @ parts), with the variances of the parts."""
    random = [
        row_variances.random_variance(squares[name], named[name])
        for name in named
        if name != RESIDUAL
    ]
    fixed = row_variances.fixed_variance(spread, beta)
    parts = jnp.stack([*random, named[RESIDUAL], fixed])
    return (above @ parts) / (below @ parts)
