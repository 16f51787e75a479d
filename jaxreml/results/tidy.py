"""What the tables of one fit and of many share: labels of rows, and columns of estimates.

Arrays have the terms on their last axis and, of many fits, the responses on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from jaxreml.fitting.random_terms import RESIDUAL, Groups
from jaxreml.inference.parameters.variances import Named

Labels = list[tuple[str, str | None, str]]  # effect, group, term
Part = tuple[Labels, dict[str, np.ndarray]]


def chosen(effects: str | Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The argument `effects` of `tidy`; ValueError unless all are known, and there are some."""
    wanted = (effects,) if isinstance(effects, str) else tuple(effects)
    unknown = [effect for effect in wanted if effect not in known]
    if unknown or not wanted:
        asked = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"effects must be among {', '.join(known)}, not {asked}")
    return wanted


def intervals(
    estimate: np.ndarray, std_error: np.ndarray, df: np.ndarray, conf_level: float
) -> dict[str, np.ndarray]:
    """Estimates with intervals by quantiles of t."""
    from scipy.special import stdtrit

    half = stdtrit(df, (1 + conf_level) / 2) * std_error
    return {
        "estimate": estimate,
        "std_error": std_error,
        "df": df,
        "conf_low": estimate - half,
        "conf_high": estimate + half,
    }


def ran_pars(
    groups: Groups,
    sd: np.ndarray,
    log_variance_se: np.ndarray,
    correlations: Sequence[np.ndarray],
    quantile: float,
) -> Part:
    """SDs with intervals from the log scale, the residual's last, each term's followed by its
    correlations: estimates, standard errors, lower and upper limits are given."""
    spread = log_variance_se / 2
    with np.errstate(over="ignore", invalid="ignore"):  # an SD next to zero has any upper limit
        low, high = sd * np.exp(-quantile * spread), sd * np.exp(quantile * spread)
    labels: Labels = []
    order: list[int] = []
    count = sd.shape[-1]
    sds, pairs = iter(range(count)), iter(range(count, count + correlations[0].shape[-1]))
    for group, effects in groups:
        for effect in effects:
            labels.append(("ran_pars", group, f"sd__{effect}"))
            order.append(next(sds))
        for first, second in combinations(effects, 2):
            labels.append(("ran_pars", group, f"cor__{first}.{second}"))
            order.append(next(pairs))
    labels.append(("ran_pars", RESIDUAL, "sd__Observation"))
    order.append(next(sds))
    names = ("estimate", "std_error", "conf_low", "conf_high")
    parts = zip((sd, sd * spread, low, high), correlations, strict=True)
    joined = (np.concatenate(part, axis=-1)[..., order] for part in parts)
    return labels, dict(zip(names, joined, strict=True))


def tidy_term(own: Named) -> str:
    """What `tidy` calls a variance parameter."""
    if own.kind == "sigma":
        return "sd__Observation"
    if own.kind == "cor":
        return f"cor__{'.'.join(own.effects)}"
    return f"sd__{own.term}" if own.kind == "sd" else own.reading.label


def statistics(fits: Any, method: str) -> dict[str, np.ndarray]:
    """The columns of `glance` by broom.mixed's names, of a `FittedModel` or a `FittedBatch`."""
    attributes = {
        "nobs": "nobs",
        "sigma": "sigma",
        "log_lik": "llf",
        "aic": "aic",
        "bic": "bic",
        "reml_crit" if method == "REML" else "deviance": "criterion",
        "df_residual": "df_resid",
        "converged": "converged",
        "is_singular": "is_singular",
        "n_dropped": "n_dropped",
    }
    return {column: np.atleast_1d(getattr(fits, name)) for column, name in attributes.items()}
