"""p-values and critical values of several tests at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
from scipy.special import chdtrc, fdtrc, ndtri, stdtr, stdtrit

ADJUSTMENTS = ("none", "tukey", "dunnettx", "mvt", "bonferroni", "holm", "sidak", "BH")
DIRECTIONS = 2**16  # quasi-random ones, for "mvt"
BINS = 2**11  # of directions with lengths so close that their mean serves
SINGULAR = 1e-10  # eigenvalues of a correlation matrix, relative to the largest, that are zero


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


def f_tail(F: Any, num_df: float, den_df: float) -> Any:
    """Probability beyond F; of a chi-square over its degrees of freedom where `den_df` is inf."""
    if np.isposinf(den_df):
        return chdtrc(num_df, num_df * F)
    return fdtrc(num_df, den_df, np.maximum(F, 0.0))


def p_values(
    statistic: np.ndarray,
    df: np.ndarray,
    adjust: str,
    means: int,
    correlation: np.ndarray | None = None,
) -> np.ndarray:
    """Two-sided p-values of one family of m t tests.

    Args:
        statistic: (m,), NaN where there is none; these count as tests, except for "mvt".
        df: (m,), inf for normal tests.
        adjust: "none", "bonferroni", "holm" (1979, Scand. J. Stat. 6:65), "sidak" (1967, JASA
            62:626), "BH" (Benjamini and Hochberg 1995, JRSS B 57:289), "tukey" (the studentized
            range of `means` means; p-values below 1e-12 may be 0), "dunnettx" (emmeans'
            approximation for comparisons with a control) or "mvt" (the joint distribution of t
            statistics so correlated).
        means: number of means that are compared.
        correlation: (m, m), of the estimates, NaN where there is none; for "mvt".

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
        return _sidak(p, m)
    if adjust == "tukey":
        return np.clip(
            scipy.stats.studentized_range.sf(np.sqrt(2) * np.abs(statistic), means, df), 0.0, 1.0
        )
    if adjust == "dunnettx":
        return _dunnett(np.abs(statistic), df, m)
    missing = np.isnan(p)
    if adjust == "mvt":
        lengths = _lengths(correlation)
        return np.array([_joint(abs(t), d, *lengths) for t, d in zip(statistic, df, strict=True)])
    filled = np.where(missing, 1.0, p)
    adjusted = scipy.stats.false_discovery_control(filled) if adjust == "BH" else holm(filled)
    return np.where(missing, np.nan, adjusted)


def _sidak(p: Any, m: int) -> Any:
    return -np.expm1(m * np.log1p(-p))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for the familywise error rate (Holm 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted


def _dunnett(t: Any, df: Any, m: int) -> Any:
    """Probabilities that one of m |t| is at least `t`, by emmeans' approximation to Dunnett's.

    The mean of the studentized range of so many means, a fraction, as have m pairs, and of m
    independent tests, with weights m - 1 and 1.
    """
    means = (1 + np.sqrt(1 + 8 * m)) / 2
    pairs = np.clip(scipy.stats.studentized_range.sf(np.sqrt(2) * t, means, df), 0.0, 1.0)
    return ((m - 1) * pairs + _sidak(2 * stdtr(df, -t), m)) / m


def _lengths(correlation: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Largest |a_i'u| over the rows of A, AA' = `correlation`, for directions u; the rank of A."""
    assert correlation is not None
    known = ~np.isnan(np.diagonal(correlation))
    if not known.any():
        return np.ones(1), 1
    values, vectors = np.linalg.eigh(correlation[np.ix_(known, known)])
    inside = values > SINGULAR * values.max()
    rank = int(inside.sum())
    points = scipy.stats.qmc.Sobol(rank, scramble=False).random(DIRECTIONS) + 0.5 / DIRECTIONS
    normal = ndtri(points)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    scores = normal @ (vectors[:, inside] * np.sqrt(values[inside])).T
    lengths = np.sort(np.abs(scores).max(axis=1))
    return lengths.reshape(BINS, -1).mean(axis=1), rank


def _joint(t: float, df: float, lengths: np.ndarray, rank: int) -> float:
    """Probability that the largest of correlated |t| is at least `t`.

    The vector of t statistics is A u r, with u uniform on the sphere and r^2 / rank distributed as
    F(rank, df): the mean over directions u of the probability that r takes the largest beyond `t`.
    Exact in r, and so as good in the tails; `scipy.stats.multivariate_t` does not serve singular
    correlations, such as those of pairwise differences.
    """
    squared = (t / lengths) ** 2
    beyond = f_tail(squared / rank, rank, df)
    return float(beyond.mean())


def critical_values(
    level: float,
    df: np.ndarray,
    adjust: str,
    tests: int,
    means: int,
    correlation: np.ndarray | None = None,
) -> np.ndarray:
    """Half-widths in standard errors of simultaneous intervals.

    For "holm" and "BH", which have no intervals of their own, Bonferroni's, as emmeans.

    Args:
        level: joint confidence level of the family.
        df: (m,), NaN where there is no interval.
        adjust, means, correlation: as for `p_values`.
        tests: size of the family.

    Returns:
        (m,).
    """
    if adjust == "none" or tests == 1:
        tail = (1 - level) / 2
    elif adjust == "tukey":
        return _by_df(lambda d: scipy.stats.studentized_range.ppf(level, means, d) / np.sqrt(2), df)
    elif adjust == "dunnettx":
        return _by_df(lambda d: _solved(lambda t: _dunnett(t, d, tests), level, d, tests), df)
    elif adjust == "mvt":
        lengths = _lengths(correlation)
        return _by_df(lambda d: _solved(lambda t: _joint(t, d, *lengths), level, d, tests), df)
    elif adjust == "sidak":
        tail = -np.expm1(np.log(level) / tests) / 2
    else:
        tail = (1 - level) / tests / 2
    return -stdtrit(df, np.full(df.shape, tail))


def _by_df(function: Callable[[float], float], df: np.ndarray) -> np.ndarray:
    """A slow function of the degrees of freedom, once for those that are nearly equal."""
    rounded = np.array([float(f"{value:.8g}") for value in df])
    values, places = np.unique(rounded, return_inverse=True)
    found = [np.nan if np.isnan(value) else float(function(value)) for value in values]
    return np.array(found)[places]


def _solved(p_value: Callable, level: float, df: float, tests: int) -> float:
    """The t whose p-value is 1 - level: beyond that of a single test, within Bonferroni's."""
    from scipy.optimize import brentq  # takes a third of a second to import

    single, bonferroni = -stdtrit(df, (1 - level) / np.array([2, 2 * tests]))
    within = single * 0.99, bonferroni * 1.01
    root: Any = brentq(lambda t: p_value(t) - (1 - level), *within, xtol=1e-8)
    return root
