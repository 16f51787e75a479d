"""Empirical Bayes moderation of variances, in arrays.

The variances of many responses, each with d degrees of freedom, are scaled F around a prior
variance s0^2 that has d0: what is known of one is its own and the prior's together (Smyth 2004,
Stat. Appl. Genet. Mol. Biol. 3:3). The prior is found by the moments of log s^2, for a trend on a
natural cubic spline of a covariate; of outlying variances, robustly, each with fewer prior degrees
of freedom of its own (Phipson et al. 2016, Ann. Appl. Stat. 10:946). The estimators are those of
limma's `fitFDist`, `fitFDistRobustly` (3.54) and `squeezeVar`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaln, digamma, hyp2f1, polygamma

from jaxreml.errors import DataError

LEAST = 1e-5  # variances below this share of the median are taken for it, so that they have logs
LEAST_ROBUST = 1e-12  # the same where outliers do no harm
WINSOR = 0.05, 0.1  # tails of the logarithms of variances that are cut off, lower and upper
SPAN = 0.4  # of the local regression on the covariate
NODES = 128  # of the quadrature of winsorised moments
TINY = -700.0  # logarithm of the least probability that doubles hold


class Prior(NamedTuple):
    """The prior of variances: each (b,).

    Attributes:
        variance: s0^2.
        df: d0, infinite where the variances differ no more than chance has it; of outliers, less.
    """

    variance: np.ndarray
    df: np.ndarray


def squeeze(variances: np.ndarray, df: np.ndarray, prior: Prior) -> np.ndarray:
    """Posterior variances (b,), means of the variances and the prior's by degrees of freedom."""
    finite = np.isfinite(prior.df)
    weight = np.where(finite, prior.df, 0.0)
    posterior = (df * variances + weight * prior.variance) / (df + weight)
    return np.where(finite, posterior, prior.variance)


def fit_prior(
    variances: np.ndarray, df: np.ndarray, covariate: np.ndarray | None, *, robust: bool
) -> Prior:
    """The prior that (b,) variances with (b,) degrees of freedom speak for.

    Args:
        variances: not negative.
        df: positive.
        covariate: (b,) numbers with which the prior variance changes; None if it does not.
        robust: whether outlying variances have prior degrees of freedom of their own.

    Raises:
        DataError: fewer than two variances, or more than half are zero; `robust` with a covariate
            and statsmodels not installed.
    """
    if len(variances) < 2:
        raise DataError(f"moderation needs two or more variances; there are {len(variances)}")
    if not np.median(variances) > 0:
        raise DataError("more than half of the variances are zero: moderation has no scale")
    simple = _simple(variances, df, covariate)
    if not robust or len(variances) == 2:
        return simple
    return _robust(variances, df, covariate, simple)


def _simple(variances: np.ndarray, df: np.ndarray, covariate: np.ndarray | None) -> Prior:
    b = len(variances)
    raised = np.maximum(variances, LEAST * np.median(variances))
    logs = np.log(raised) - digamma(df / 2) + np.log(df / 2)
    basis = np.ones((b, 1)) if covariate is None else natural_spline(covariate)
    fitted = basis @ np.linalg.lstsq(basis, logs)[0]
    left = b - basis.shape[1]
    spread = np.sum((logs - fitted) ** 2) / left if left else 0.0
    spread -= np.mean(polygamma(1, df / 2))
    if spread > 0:
        prior_df = 2 * inverse_trigamma(float(spread))
        level = np.exp(fitted + digamma(prior_df / 2) - np.log(prior_df / 2))
    else:
        prior_df = np.inf
        constant = basis.shape[1] == 1
        level = np.full(b, np.mean(raised)) if constant else np.exp(fitted)
    return Prior(level, np.full(b, prior_df))


def natural_spline(values: np.ndarray) -> np.ndarray:
    """A basis (b, k) of natural cubic splines with knots at quantiles; k is 4 from 30 values on,
    less with fewer, or fewer different ones."""
    from scipy.interpolate import CubicSpline

    b = len(values)
    k = min(1 + sum(b >= least for least in (3, 6, 30)), np.unique(values).size)
    knots = np.unique(np.quantile(values, np.linspace(0, 1, k)))
    if len(knots) < 2:
        return np.ones((b, 1))
    return CubicSpline(knots, np.eye(len(knots)), bc_type="natural")(values)


def inverse_trigamma(value: float) -> float:
    """The x with trigamma(x) = `value`, positive; Newton's method from below on 1 / trigamma, which
    is convex."""
    if value > 1e7:
        return value**-0.5
    if value < 1e-6:
        return 1 / value
    x = 0.5 + 1 / value
    for _ in range(50):
        own = float(polygamma(1, x))
        step = own * (1 - own / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


# Robust


def _robust(
    variances: np.ndarray, df: np.ndarray, covariate: np.ndarray | None, simple: Prior
) -> Prior:
    b, prior_df = len(variances), float(simple.df[0])
    if all(tail < 1 / b for tail in WINSOR):
        return simple
    raised = np.maximum(variances, LEAST_ROBUST * np.median(variances))
    most = float(df.max())
    raised = _as_if(raised, df, most, simple)
    logs = np.log(raised)
    trend = _trend(logs, covariate)
    cut = logs - trend
    low, high = np.quantile(cut, [WINSOR[0], 1 - WINSOR[1]])
    cut = np.clip(cut, low, high)
    middle, spread = float(cut.mean()), float(cut.var(ddof=1))

    def excess(share: float) -> float:
        """Logarithm of the observed spread over that of F(most, d0), d0 / (1 + d0) = share."""
        return np.log(spread / _winsorised(most, _df_of(share))[1])

    if excess(1.0) <= 0:
        prior_df = np.inf
    elif np.isinf(prior_df):
        return simple
    else:
        prior_df = _df_of(_crossing(excess, prior_df / (1 + prior_df)))
    level = trend + middle - _winsorised(most, prior_df)[0]
    ratio = np.exp(logs - level)
    own = _own_degrees(ratio, most, prior_df)
    return Prior(np.exp(level), own)


def _crossing(excess: Any, least: float) -> float:
    from scipy.optimize import brentq

    if excess(least) >= 0:
        return least
    return float(brentq(excess, least, 1.0, xtol=1e-12))  # pyright: ignore


def _df_of(share: float) -> float:
    return np.inf if share == 1 else share / (1 - share)


def _as_if(variances: np.ndarray, df: np.ndarray, most: float, prior: Prior) -> np.ndarray:
    """Variances with `most` degrees of freedom that are as extreme as those given with fewer."""
    fewer = np.flatnonzero(df < most - 1e-14)
    if not fewer.size:
        return variances
    prior_df, level = float(prior.df[0]), prior.variance[fewer]
    ratio = variances[fewer] / level
    upper = _log_tail(ratio, df[fewer], prior_df)
    lower = _log_tail(ratio, df[fewer], prior_df, upper=False)
    up = upper < lower
    moved = np.empty_like(ratio)
    moved[up] = _distribution(most, prior_df).isf(np.exp(np.maximum(upper[up], TINY)))
    moved[~up] = _distribution(most, prior_df).ppf(np.exp(np.maximum(lower[~up], TINY)))
    found = variances.copy()
    found[fewer] = moved * level
    return found


def _trend(logs: np.ndarray, covariate: np.ndarray | None) -> np.ndarray:
    """A robust centre of logarithms, (b,): their trimmed mean, or a local regression (Cleveland's
    lowess) on the covariate."""
    if covariate is None:
        from scipy.stats import trim_mean

        return np.full(len(logs), trim_mean(logs, WINSOR[1]))
    try:
        from statsmodels.nonparametric.smoothers_lowess import lowess
    except ImportError:
        raise DataError(
            "robust moderation with a trend needs statsmodels: pip install 'jaxreml[counts]'"
        ) from None
    return lowess(
        logs, covariate, frac=SPAN, it=3, delta=0.01 * np.ptp(covariate), return_sorted=False
    )


def _distribution(df: float | np.ndarray, prior_df: float) -> Any:
    """F(df, prior_df), of chi-square over its degrees of freedom where `prior_df` is infinite."""
    from scipy import stats

    return stats.chi2(df, scale=1 / df) if np.isinf(prior_df) else stats.f(df, prior_df)


def _log_tail(
    ratio: np.ndarray, df: float | np.ndarray, prior_df: float, *, upper: bool = True
) -> np.ndarray:
    """Logarithm of the probability beyond F, or below."""
    law = _distribution(df, prior_df)
    found = law.logsf(ratio) if upper else law.logcdf(ratio)
    lost = found < TINY
    if upper and lost.any() and np.isfinite(prior_df):
        own = np.broadcast_to(df, ratio.shape)[lost]
        found[lost] = _log_far_tail(ratio[lost], own, prior_df)
    return found


def _log_far_tail(ratio: np.ndarray, df: np.ndarray, prior_df: float) -> np.ndarray:
    """`_log_tail` where the probability is less than doubles hold (DLMF 8.17.8)."""
    a, b = prior_df / 2, df / 2
    x = a / (a + b * ratio)
    series = np.log(hyp2f1(a + b, 1.0, a + 1, x))
    return a * np.log(x) + b * np.log1p(-x) - np.log(a) - betaln(a, b) + series


def _winsorised(df: float, prior_df: float) -> tuple[float, float]:
    """Mean and variance of log F(df, prior_df) with the tails cut off to their quantiles."""
    law = _distribution(df, prior_df)
    ends = law.ppf([WINSOR[0], 1 - WINSOR[1]])
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    low, high = ends / (1 + ends)
    share = low + (high - low) * (nodes + 1) / 2
    F = share / (1 - share)
    mass = (high - low) * weights / 2 * law.pdf(F) / (1 - share) ** 2
    of_ends, tails = np.log(ends), np.array(WINSOR)
    mean = float(mass @ np.log(F) + of_ends @ tails)
    return mean, float(mass @ (np.log(F) - mean) ** 2 + (of_ends - mean) ** 2 @ tails)


def _own_degrees(ratio: np.ndarray, df: float, prior_df: float) -> np.ndarray:
    """Prior degrees of freedom of each variance, fewer where it is an outlier: the largest of b
    ratios to the prior are compared with the order statistics that they should be."""
    from scipy.stats import rankdata

    b = len(ratio)
    tail = _log_tail(ratio, df, prior_df)
    expected = np.log(b - rankdata(ratio) + 0.5) - np.log(b)
    inlier = np.exp(np.minimum(tail - expected, 0.0))  # probability that it is none
    if not (inlier < 1).any():
        return np.full(b, prior_df)
    order = np.argsort(tail, kind="stable")  # the most outlying first
    if np.isinf(prior_df):
        own = np.where(inlier < 1, inlier * b * df, prior_df)
        own[order] = np.maximum.accumulate(own[order])
        return own
    outlier_df = _outlier_degrees(tail.min(), ratio.max(), df, prior_df)
    own = inlier * prior_df + (1 - inlier) * outlier_df
    ordered = own[order]
    means = np.cumsum(ordered) / np.arange(1, b + 1)
    first = int(np.argmin(means))
    ordered[: first + 1] = means[first]
    own[order] = np.maximum.accumulate(ordered)
    return own


def _outlier_degrees(least: float, largest: float, df: float, prior_df: float) -> float:
    """Prior degrees of freedom with which the largest ratio is about the median."""
    if np.isneginf(least):
        return 0.0
    found = np.log(0.5) / least * prior_df
    again = float(_log_tail(np.array([largest]), df, found)[0])
    return np.log(0.5) / again * found
