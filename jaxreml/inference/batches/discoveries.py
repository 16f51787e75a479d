"""p-values of many responses: adjusted, q-values, and genomic inflation. Arrays, NaN where there is
no p-value; these do not count as tests."""

from __future__ import annotations

import numpy as np

from jaxreml.errors import DataError
from jaxreml.inference.fixed.adjustments import holm
from jaxreml.many.fitted import false_discovery_rates

ADJUSTMENTS = ("bh", "by", "holm", "bonferroni", "none")
LAMBDAS = np.arange(1, 20) * 0.05  # beyond which p-values are looked at for the null's share


def adjusted(p_values: np.ndarray, adjust: str) -> np.ndarray:
    """p-values (b,) adjusted for their number.

    Args:
        p_values: of one coefficient or contrast.
        adjust: the false discovery rate, by Benjamini and Hochberg ("bh", 1995) or under any
            dependence by Benjamini and Yekutieli ("by", 2001); the familywise error rate by "holm"
            (1979) or "bonferroni"; or "none".

    Raises:
        ValueError: another `adjust`.
    """
    if adjust not in ADJUSTMENTS:
        names = ", ".join(f'"{name}"' for name in ADJUSTMENTS)
        raise ValueError(f"adjust must be one of {names}, not {adjust!r}")
    if adjust in ("bh", "by"):
        return false_discovery_rates(p_values[:, None], adjust)[:, 0]
    found = p_values.copy()
    known = ~np.isnan(p_values)
    p = p_values[known]
    if adjust == "bonferroni":
        found[known] = np.minimum(1.0, len(p) * p)
    elif adjust == "holm":
        found[known] = holm(p)
    return found


def null_share(p_values: np.ndarray) -> float:
    """The share of true null hypotheses, pi0, by the p-values beyond lambda.

    Of the lambdas 0.05, 0.1, ..., 0.95 the one of least mean squared error, by its formula in place
    of a bootstrap (Storey, Taylor and Siegmund 2004, JRSS B 66:187; Robinson 2016; qvalue's
    ``pi0.method="bootstrap"``).

    Raises:
        DataError: no p-values, or none beyond 0.05.
    """
    p = p_values[~np.isnan(p_values)]
    m = p.size
    if not m:
        raise DataError("there are no p-values to estimate the share of true null hypotheses from")
    beyond = m - np.searchsorted(np.sort(p), LAMBDAS)
    shares = beyond / (m * (1 - LAMBDAS))
    least = np.quantile(shares, 0.1)
    variance = beyond / (m * (1 - LAMBDAS)) ** 2 * (1 - beyond / m)
    best = variance + (shares - least) ** 2
    share = min(float(shares[best == best.min()].min()), 1.0)
    if not share > 0:
        raise DataError("no p-value is large: the share of true null hypotheses is not estimable")
    return share


def q_values(p_values: np.ndarray) -> np.ndarray:
    """Storey's q-values (b,): the false discovery rate if all p-values this small are discoveries,
    pi0 being estimated (`null_share`) where Benjamini and Hochberg take 1.

    Raises:
        DataError: as `null_share`.
    """
    return null_share(p_values) * adjusted(p_values, "bh")


def inflation(p_values: np.ndarray) -> float:
    """Genomic inflation, the median chi-square of one degree of freedom over that of the null
    (Devlin and Roeder 1999, Biometrics 55:997); NaN without p-values."""
    from scipy.special import chdtri

    p = p_values[~np.isnan(p_values)]
    return float(np.median(chdtri(1, p)) / chdtri(1, 0.5)) if p.size else np.nan
