"""The likelihood-ratio statistic of nested models, and its mixture: of one pair, or of many."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import chdtrc

ROUNDING = 1e-10  # of a difference of criteria, per unit of the criterion


def ratio(upper: Any, lower: Any) -> Any:
    """Differences of the criteria of smaller and larger models: rounding error as zero, and NaN
    where the larger has the smaller likelihood, so that its optimum is a local one."""
    least = ROUNDING * (1 + np.abs(upper))
    difference = upper - lower
    difference = np.where(difference < -least, np.nan, difference)
    return np.where(difference < least, 0.0, difference)[()]


def mixture(statistic: Any, df: int) -> Any:
    """p-values for one random effect more, with its covariances (and fixed effects) `df`
    parameters: half chi-squared with df - 1, which is zero for none, and half with df (Self and
    Liang 1987, JASA 82:605, cases 5 and 6)."""
    at_zero = np.where(np.isnan(statistic), np.nan, np.asarray(statistic) <= 0)
    fewer = chdtrc(df - 1, statistic) if df > 1 else at_zero
    return (fewer + chdtrc(df, statistic)) / 2
