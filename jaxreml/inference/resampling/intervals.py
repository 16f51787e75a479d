"""Bootstrap confidence limits of one statistic, as functions of its draws.

Quantiles are order statistics, interpolated on the normal scale (Davison and Hinkley 1997,
Bootstrap Methods and their Application, eq. 5.8), as in R's ``boot::boot.ci``.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri

WHOLE = 1e-9  # distance of a place among the draws from an integer, per draw, that is rounding


def order_statistics(draws: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles at (R + 1) probability; NaN where that is below the first, above the last or NaN.

    Args:
        draws: (R,), infinite values allowed.
        probabilities: (k,).
    """
    ordered = np.sort(draws)
    count = ordered.size
    place = (count + 1) * np.asarray(probabilities, float)
    whole = np.round(place)
    place = np.where(np.abs(place - whole) < WHOLE * (count + 1), whole, place)
    low = np.floor(place)
    inside = (place >= 1) & (place <= count)
    below = np.clip(np.where(inside, low, 1), 1, max(count, 1)).astype(int)
    above = np.minimum(below + 1, count)
    if not count:
        return np.full(place.shape, np.nan)
    at, before, after = (ndtri(p / (count + 1)) for p in (place, below, below + 1))
    share = np.clip((at - before) / (after - before), 0.0, 1.0)
    first, second = ordered[below - 1], ordered[above - 1]
    exact = (share == 0) | (first == second)
    with np.errstate(invalid="ignore"):
        between = (1 - share) * first + share * second
    return np.where(inside, np.where(exact, first, between), np.nan)


def percentile(draws: np.ndarray, level: float) -> np.ndarray:
    """Quantiles of the draws (Davison and Hinkley 1997, eq. 5.18)."""
    return order_statistics(draws, _tails(level))


def basic(draws: np.ndarray, estimate: float, level: float) -> np.ndarray:
    """Quantiles reflected at the estimate (eq. 5.6)."""
    return 2 * estimate - order_statistics(draws, _tails(level))[::-1]


def studentized(
    draws: np.ndarray, errors: np.ndarray, estimate: float, error: float, level: float
) -> np.ndarray:
    """Quantiles of (draw - estimate) / its standard error (eq. 5.7).

    A draw without a standard error, on the boundary of the parameter space, counts as infinitely
    far from the estimate, on its side.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = draws - estimate
        ratios = np.where(np.isfinite(errors), distance / errors, np.sign(distance) * np.inf)
        return estimate - error * order_statistics(ratios, _tails(level))[::-1]


def bca_probabilities(
    draws: np.ndarray, estimate: float, acceleration: float, level: float
) -> np.ndarray:
    """Of which quantiles are the bias-corrected and accelerated limits (Efron 1987, J. Am. Stat.
    Assoc. 82:171; Davison and Hinkley 1997, eq. 5.21). Draws equal to the estimate count half
    below it. NaN where the acceleration is too strong for the level."""
    below = (np.sum(draws < estimate) + np.sum(draws <= estimate)) / (2 * draws.size)
    bias = ndtri(below)
    moved = bias + ndtri(_tails(level))
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = 1 - acceleration * moved
        return np.where(kept > 0, ndtr(bias + moved / kept), np.nan)


def _tails(level: float) -> np.ndarray:
    return np.array([(1 - level) / 2, (1 + level) / 2])
