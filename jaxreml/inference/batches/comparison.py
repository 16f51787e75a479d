"""Likelihood-ratio tests of two models fitted to the same responses, response by response.

The rules are those of `inference.likelihood.comparison`, and so lme4's ``anova``; but nothing is
fitted again: fits by REML must have the same fixed effects.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import chdtrc

from jaxreml.errors import DataError
from jaxreml.inference.batches.discoveries import adjusted
from jaxreml.inference.likelihood import nesting
from jaxreml.inference.likelihood.ratio import mixture, ratio
from jaxreml.many.fitted import FittedBatch
from jaxreml.status import Status

MEANS = 1e-8  # relative difference of the means of a response that is none


def compare_batches(first: FittedBatch, second: FittedBatch, method: str = "chi2") -> pd.DataFrame:
    """Compare two models fitted to the same responses by `fit_many`.

    Args:
        first, second: in any order; the one with more parameters is the larger.
        method: "chi2", or "mixture" where the larger has one random effect more, as `compare`.

    Returns:
        A row per response: criterion of the smaller and of the larger model, ``criterion_small``
        and ``criterion_large``; chisq, df, p_value; p_adjusted (Benjamini and Hochberg 1995). NaN
        where one of the two has no optimum, where they have not the same rows, where fixed effects
        of theirs are not estimable, and where the larger has the smaller likelihood.

    Raises:
        DataError: other responses; models that are not nested; results without their frame (read
            from a file).
        ValueError: another method; different methods, or REML with different fixed effects; as many
            parameters.
    """
    if method not in ("chi2", "mixture"):
        raise ValueError(f'method must be "chi2" or "mixture" for batches, not {method!r}')
    _require_same_responses(first, second)
    dofs = [
        own.fits.parameters.shape[1] - 1 + len(own.model.fixed_names) for own in (first, second)
    ]
    if dofs[0] == dofs[1]:
        raise ValueError("the models have as many parameters: neither is nested in the other")
    small, large = (first, second) if dofs[0] < dofs[1] else (second, first)
    df = abs(dofs[1] - dofs[0])
    if small.frame is None or large.frame is None:
        raise DataError(
            "the model's columns are not at hand (results read from a file, or with a covariate of "
            "each fit's own): compare what fit_many returned"
        )
    obstacle = nesting.mean_obstacle(small.frame, large.frame)
    obstacle = obstacle or nesting.random_obstacle(small.frame, large.frame)
    obstacle = obstacle or nesting.residual_obstacle(small.frame, large.frame)
    if obstacle:
        raise DataError(f"the models are not nested: {obstacle}")
    reml = small.model.method == "REML"
    if reml and not nesting.same_mean(small.frame, large.frame):
        raise ValueError(
            "restricted likelihoods of models with different fixed effects cannot be compared: fit "
            'both with method="ML"'
        )
    step = nesting.step(small.frame, large.frame)
    if method == "mixture" and not (step.on_boundary and step.one_effect):
        raise ValueError('the mixture is for one random effect more: use method="chi2"')

    upper, lower = (own.criterion.to_numpy().copy() for own in (small, large))
    upper += _log_gram(small, large) if reml else 0.0
    good = (small.status == Status.CONVERGED) & (large.status == Status.CONVERGED)
    good &= (small.nobs == large.nobs) & _all_estimable(small) & _all_estimable(large)
    with np.errstate(invalid="ignore"):
        statistic = np.where(good, ratio(upper, lower), np.nan)
    if method == "mixture":
        p_value = np.where(small.fits.is_singular, np.nan, mixture(statistic, df))
    else:
        p_value = chdtrc(df, statistic)
    columns = {
        "criterion_small": upper,
        "criterion_large": lower,
        "chisq": statistic,
        "df": np.full(len(small), df),
        "p_value": p_value,
        "p_adjusted": adjusted(p_value, "bh"),
    }
    return pd.DataFrame(columns, small.responses)


def _log_gram(small: FittedBatch, large: FittedBatch) -> float:
    """What to add to the restricted criteria of the smaller model where the same fixed effects have
    other columns: the difference of log|X'X|."""
    assert small.frame is not None and large.frame is not None
    pair = [np.linalg.slogdet(own.frame.X.T @ own.frame.X)[1] for own in (small, large)]  # pyright: ignore
    return float(pair[1] - pair[0])


def _all_estimable(results: FittedBatch) -> np.ndarray:
    return results.fits.rank == len(results.model.fixed_names)


def _require_same_responses(first: FittedBatch, second: FittedBatch) -> None:
    if first.model.method != second.model.method:
        raise ValueError(f"fits by {first.model.method} and {second.model.method}: fit both by ML")
    if not first.responses.equals(second.responses):
        raise DataError("the two batches have other responses, or in another order")
    same = first.fits.nobs == second.fits.nobs
    means = np.stack([first.fits.mean, second.fits.mean])
    with np.errstate(invalid="ignore"):
        apart = np.abs(means[0] - means[1]) > MEANS * np.abs(means).max(axis=0)
    if np.any(apart & same):
        name = first.responses[int(np.argmax(apart & same))]
        raise DataError(f"response {name!r} has other values, or other rows, in the two batches")
