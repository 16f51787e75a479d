"""Comparison of fits to the same data: likelihood-ratio tests and information criteria.

The rules are those of lme4's ``anova``: models in the order of their numbers of parameters, each
tested against the one before it, by ML unless asked otherwise. Where lme4 trusts its caller, the
data and the nesting of the models are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import chdtrc

from jaxreml.errors import DataError
from jaxreml.fitting.fit import fit_frame
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.batches.comparison import compare_batches
from jaxreml.inference.likelihood import nesting
from jaxreml.inference.likelihood.ratio import mixture, ratio
from jaxreml.inference.resampling.likelihood_ratio import null_distribution
from jaxreml.many.fitted import FittedBatch


@dataclass(frozen=True)
class Pair:
    """Two fits to the same data by the same criterion, the smaller nested in the larger.

    Attributes:
        small, large: the fits.
        statistic: difference of the criteria, at least zero.
        df: difference of the numbers of parameters.
        step: what the larger has beyond the smaller.
    """

    small: FittedModel
    large: FittedModel
    statistic: float
    df: int
    step: nesting.Step


def compare(
    *fits: Any,
    refit: bool = True,
    method: str = "chi2",
    names: Sequence[str] | None = None,
    nsim: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare fits to the same data.

    Two results of `fit_many` are compared response by response, see
    `jaxreml.inference.batches.comparison.compare_batches`: nothing is fitted again.

    Args:
        fits: two or more.
        refit: whether fits by REML are made again by ML first, as lme4 does. If not, fits by REML
            are compared by their restricted likelihoods, which needs the same fixed effects in
            all; where their columns differ and the space does not, log|X'X| makes up for it.
        method: the distribution of the statistic under the smaller model. "chi2": chi-squared
            with as many degrees of freedom as parameters differ; conservative where a variance is
            tested, for it is on its boundary then. "mixture": for one random effect more, with
            its covariances (and fixed effects) df parameters, half chi-squared with df - 1 and
            half with df (Self and Liang 1987, JASA 82:605, cases 5 and 6; Stram and Lee 1994,
            Biometrics 50:1171). "bootstrap": simulated, see
            `jaxreml.inference.likelihood_ratio.null_distribution`.
        names: of the fits, for the rows; "fit 1", ... in the order given if left out.
        nsim, seed: responses drawn for "bootstrap", and of the random numbers.

    Returns:
        A row per fit, in the order of their numbers of parameters: formula, npar, AIC, AICc, BIC,
        logLik, deviance (-2 logLik); chisq, df and p_value of the test against the row before;
        AIC_weight, AICc_weight, BIC_weight, exp(-difference / 2) over their sum (Burnham and
        Anderson 2002, Model Selection and Multimodel Inference, sec. 2.9); and note: refitted,
        or why there is no test.

    Raises:
        DataError: fits to different rows, responses or weights; fits without an optimum.
        ValueError: fewer than two fits, something else than fits, another method; fits by REML that
            must not be compared so.

    Examples:
        >>> smaller = jaxreml.fit("Reaction ~ Days + (1 | Subject)", data)
        >>> table = jaxreml.compare(smaller, fit, names=["intercepts", "slopes"])
        >>> table[["npar", "AIC", "chisq", "df"]].round(1)
                    npar     AIC  chisq   df
        intercepts     4  1802.1    NaN  NaN
        slopes         6  1763.9   42.1  2.0
        >>> jaxreml.compare(smaller, fit, method="mixture", refit=False)["chisq"].round(1).tolist()
        [nan, 42.8]
    """
    if fits and all(isinstance(fit, FittedBatch) for fit in fits):
        if len(fits) != 2:
            raise ValueError(f"compare takes two batches, not {len(fits)}")
        return compare_batches(*fits, method)
    _check(fits, names)
    tests = TESTS | {"bootstrap": partial(_bootstrap, nsim=nsim, seed=seed)}
    if method not in tests:
        known = ", ".join(f'"{name}"' for name in tests)
        raise ValueError(f"method must be one of {known}, not {method!r}")
    labels = [f"fit {k + 1}" for k in range(len(fits))] if names is None else list(names)
    _require_same_data(fits, labels)
    fitted = _commensurable(fits, labels, refit)
    order = sorted(range(len(fits)), key=lambda k: fitted[k].dof)
    criteria = _criteria([fitted[k] for k in order])
    table = _information([fitted[k] for k in order], criteria)
    table.insert(0, "formula", [fits[k].formula for k in order])
    notes = [["refitted by ML"] if fitted[k] is not fits[k] else [] for k in order]
    for k, (small, large) in enumerate(pairwise(order), start=1):
        pair, obstacle = _pair(fitted[small], fitted[large], criteria[k - 1], criteria[k])
        if pair is None:
            notes[k].append(f"no test against {labels[small]}: {obstacle}")
            continue
        p_value, note = tests[method](pair)
        table.loc[k, ["chisq", "df", "p_value"]] = pair.statistic, pair.df, p_value
        notes[k] += [note] if note else []
    table["note"] = ["; ".join(parts) for parts in notes]
    return table.set_index(pd.Index([labels[k] for k in order]))


def _check(fits: Sequence[Any], names: Sequence[str] | None) -> None:
    for k, fit in enumerate(fits):
        if not isinstance(fit, FittedModel):
            raise ValueError(f"compare takes fits (LMMResults); argument {k + 1} is {fit!r}")
    if len(fits) < 2:
        raise ValueError("compare takes two or more fits")
    if names is not None and len(names) != len(fits):
        raise ValueError(f"{len(names)} names for {len(fits)} fits")


def _require_same_data(fits: Sequence[FittedModel], labels: Sequence[str]) -> None:
    """DataError naming what differs unless all are fits to the same rows."""
    first = fits[0]
    for fit, label in zip(fits[1:], labels[1:], strict=True):
        both = f"{labels[0]} and {label}"
        if fit.nobs != first.nobs:
            raise DataError(
                f"{both} are fits to different rows, {first.nobs} and {fit.nobs} "
                f"({first.n_dropped} and {fit.n_dropped} dropped for missing values); fit both to "
                "the rows that are complete for both"
            )
        if not np.array_equal(fit.y, first.y):
            row = int(np.argmax(fit.y != first.y))
            raise DataError(
                f"{both} have different responses, {first.y[row]:g} and {fit.y[row]:g} in row "
                f"{row}; likelihoods of different responses or rows cannot be compared"
            )
        if not np.array_equal(fit.prior_weights, first.prior_weights):
            raise DataError(f"{both} have different weights")


def _commensurable(
    fits: Sequence[FittedModel], labels: Sequence[str], refit: bool
) -> list[FittedModel]:
    """The fits by one criterion: all by ML, or all by REML with the same fixed effects."""
    by_reml = [fit.method == "REML" for fit in fits]
    for label, fit in zip(labels, fits, strict=True):
        fit.require_likelihood(f"compare {label}")
    if refit:
        fits = [
            fit_frame(fit.frame, "ML", fit.structure, fit.context, kind=type(fit)) if reml else fit
            for fit, reml in zip(fits, by_reml, strict=True)
        ]
    elif all(by_reml):
        for label, fit in zip(labels[1:], fits[1:], strict=True):
            if not nesting.same_mean(fits[0].frame, fit.frame):
                raise ValueError(
                    f"{labels[0]} and {label} have different fixed effects, and restricted "
                    "likelihoods can only be compared between models with the same; use refit=True "
                    "to compare them by ML"
                )
    elif any(by_reml):
        kinds = ", ".join(f"{label}: {fit.method}" for label, fit in zip(labels, fits, strict=True))
        raise ValueError(
            f"fits by REML and by ML cannot be compared ({kinds}); use refit=True to compare all "
            "by ML"
        )
    for label, fit in zip(labels, fits, strict=True):
        fit.require_optimum(f"compare {label}, {fit.formula!r} by {fit.method}")
    return list(fits)


def _criteria(fits: Sequence[FittedModel]) -> list[float]:
    """-2 log-likelihoods; restricted ones as if X had the columns of the first fit."""
    if fits[0].method == "ML":
        return [fit.criterion for fit in fits]
    scales = [2 * np.sum(np.log(np.abs(np.diagonal(fit.design.basis)))) for fit in fits]
    return [fit.criterion - scale + scales[0] for fit, scale in zip(fits, scales, strict=True)]


def _information(fits: Sequence[FittedModel], criteria: Sequence[float]) -> pd.DataFrame:
    """Numbers of parameters, log-likelihoods and information criteria."""
    npar = np.array([fit.dof for fit in fits])
    n = fits[0].nobs
    deviance = np.array(criteria)
    aic = deviance + 2 * npar
    rest = np.where(n - npar - 1 > 0, n - npar - 1, np.nan)
    table = pd.DataFrame(
        {
            "npar": npar,
            "AIC": aic,
            "AICc": aic + 2 * npar * (npar + 1) / rest,
            "BIC": deviance + np.log(n) * npar,
            "logLik": -deviance / 2,
            "deviance": deviance,
            "chisq": np.nan,
            "df": np.nan,
            "p_value": np.nan,
        }
    )
    for name in ("AIC", "AICc", "BIC"):
        values = table[name].to_numpy()
        relative = np.exp((values.min() - values) / 2)
        table[f"{name}_weight"] = relative / relative.sum()
    return table


def _pair(
    small: FittedModel, large: FittedModel, upper: float, lower: float
) -> tuple[Pair | None, str]:
    """The pair to test, or None and the reason."""
    df = large.dof - small.dof
    if df == 0:
        return None, "as many parameters"
    frames = small.frame, large.frame
    obstacle = (
        nesting.mean_obstacle(*frames)
        or nesting.random_obstacle(*frames)
        or nesting.residual_obstacle(*frames)
    )
    if obstacle:
        return None, f"not nested, {obstacle}"
    statistic = float(ratio(upper, lower))
    if np.isnan(statistic):
        return None, "the larger model has the smaller likelihood, so its optimum is a local one"
    return Pair(small, large, statistic, df, nesting.step(small.frame, large.frame)), ""


# Distributions of the statistic under the smaller model: each gives a p-value and a note


def _chi2(pair: Pair) -> tuple[float, str]:
    note = ""
    if pair.step.on_boundary:
        note = "a variance is tested on its boundary: conservative"
        note += ', see method="mixture"' if pair.step.one_effect else ""
    return float(chdtrc(pair.df, pair.statistic)), note


def _mixture(pair: Pair) -> tuple[float, str]:
    if not pair.step.on_boundary:
        return np.nan, 'no p-value: no variance is tested on its boundary; use method="chi2"'
    if not pair.step.one_effect:
        return np.nan, "no p-value: the mixture is for one random effect more, with its covariances"
    if pair.small.is_singular:
        boundary = "; ".join(pair.small._boundary)
        return np.nan, f"no p-value: the smaller model is itself on the boundary, as {boundary}"
    return float(mixture(pair.statistic, pair.df)), ""


def _bootstrap(pair: Pair, nsim: int, seed: int) -> tuple[float, str]:
    null = null_distribution(pair.small, pair.large, nsim, seed)
    note = f"{null.draws.size} draws, Monte Carlo error of p {null.p_value_se:.2g}"
    if null.n_failed:
        note += f"; {null.n_failed} refits without an optimum left out"
    return null.p_value, note


TESTS: dict[str, Callable[[Pair], tuple[float, str]]] = {"chi2": _chi2, "mixture": _mixture}
