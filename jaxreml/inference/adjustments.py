"""p-values and critical values of several tests at a time."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import false_discovery_control, studentized_range

ADJUSTMENTS = ("none", "tukey", "bonferroni", "holm", "sidak", "BH")


def check_adjustment(adjust: str, pairs: bool) -> None:
    """Raise unless `adjust` is an adjustment for such a family.

    Raises:
        ValueError: another name, or Tukey's for tests that are not all pairwise differences.
    """
    if adjust not in ADJUSTMENTS:
        raise ValueError(f"adjust must be one of {', '.join(ADJUSTMENTS)}, not {adjust!r}")
    if adjust == "tukey" and not pairs:
        raise ValueError(
            "Tukey's adjustment is for all pairwise differences; for other tests use adjust="
            "'sidak', 'holm' or 'bonferroni'"
        )


def p_values(statistic: np.ndarray, df: np.ndarray, adjust: str, means: int) -> np.ndarray:
    """Two-sided p-values of one family of m t tests.

    Args:
        statistic: (m,), NaN where there is none; these count as tests.
        df: (m,), inf for normal tests.
        adjust: "none", "bonferroni", "holm" (1979, Scand. J. Stat. 6:65), "sidak" (1967, JASA
            62:626), "BH" (Benjamini and Hochberg 1995, JRSS B 57:289) or "tukey" (the studentized
            range of `means` means; p-values below 1e-12 may be 0).
        means: number of means that are compared.

    Returns:
        (m,).
    """
    p = 2 * stdtr(df, -np.abs(statistic))
    m = len(p)
    if adjust == "none" or m == 1:
        return p
    if adjust == "bonferroni":
        return np.minimum(1.0, m * p)
    if adjust == "sidak":
        return -np.expm1(m * np.log1p(-p))
    if adjust == "tukey":
        return np.clip(studentized_range.sf(np.sqrt(2) * np.abs(statistic), means, df), 0.0, 1.0)
    missing = np.isnan(p)
    filled = np.where(missing, 1.0, p)
    adjusted = false_discovery_control(filled) if adjust == "BH" else _holm(filled)
    return np.where(missing, np.nan, adjusted)


def _holm(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted


def critical_values(
    level: float, df: np.ndarray, adjust: str, tests: int, means: int
) -> np.ndarray:
    """Half-widths in standard errors of simultaneous intervals.

    For "holm" and "BH", which have no intervals of their own, Bonferroni's, as emmeans.

    Args:
        level: joint confidence level of the family.
        df: (m,), NaN where there is no interval.
        adjust, means: as for `p_values`.
        tests: size of the family.

    Returns:
        (m,).
    """
    if adjust == "none" or tests == 1:
        tail = (1 - level) / 2
    elif adjust == "tukey":
        rounded = np.array([float(f"{value:.8g}") for value in df])
        values, places = np.unique(rounded, return_inverse=True)
        return (studentized_range.ppf(level, means, values) / np.sqrt(2))[places]
    elif adjust == "sidak":
        tail = -np.expm1(np.log(level) / tests) / 2
    else:
        tail = (1 - level) / tests / 2
    return -stdtrit(df, np.full(df.shape, tail))
