"""What maketables asks of a fit, so that its `ETable` shows it beside fits of other packages.

The package's plug-in format is a set of attributes, and needs no import of it: coefficients with
tests by Satterthwaite's method, and below them the numbers of rows and groups, the standard
deviations and correlations of the random effects, and fit statistics.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy.special import stdtrit

from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.fixed.wald import coefficients

STATISTICS = {"ll": "llf", "aic": "aic", "bic": "bic", "df_resid": "df_resid", "rmse": "sigma"}


def coef_table(fit: FittedModel) -> pd.DataFrame:
    """A row per fixed effect: b, se, t, p, df and the limits of 90 and 95 percent intervals."""
    table = coefficients(fit)
    found = pd.DataFrame(
        {
            "b": table["estimate"],
            "se": table["std_error"],
            "t": table["statistic"],
            "p": table["p_value"],
            "df": table["df"],
        }
    )
    for level in (90, 95):
        half = stdtrit(found["df"], (1 + level / 100) / 2) * found["se"]
        found[f"ci{level}l"], found[f"ci{level}u"] = found["b"] - half, found["b"] + half
    names = ["Intercept" if name == "(Intercept)" else name for name in found.index]
    return found.set_axis(pd.Index(names, name="Coefficient"))


def depvar(fit: FittedModel) -> str:
    """The response, as the formula has it."""
    return fit.formula.partition("~")[0].strip()


def stat(fit: FittedModel, key: str) -> Any:
    """A statistic by maketables' name, or by the label of its row; None if there is none."""
    if key == "N":
        return fit.nobs
    if key in STATISTICS:
        return float(getattr(fit, STATISTICS[key]))
    if key == "deviance":
        return fit.criterion if fit.method == "ML" else None
    return _own_rows(fit).get(key)


def default_stat_keys(fit: FittedModel) -> list[str]:
    """The rows below the coefficients: groups and variance components have labels for keys."""
    return ["N", *_own_rows(fit), "ll", "aic", "bic", "se_type"]


def vcov_info(fit: FittedModel) -> dict[str, str]:
    """Standard errors are the model's, by its method."""
    return {"vcov_type": f"{fit.method}, df by Satterthwaite"}


def _own_rows(fit: FittedModel) -> dict[str, Any]:
    """What mixed models have besides, by the labels of rows."""
    rows: dict[str, Any] = {f"Groups: {name}": size for name, size in fit.ngroups.items()}
    for group, term, sd in fit.variance_components[["group", "term", "sd"]].itertuples(index=False):
        label = f"SD {RESIDUAL}" if group == RESIDUAL else f"SD {term} | {group}"
        rows[label] = float(sd)
    for group, first, second, value in fit.correlations.itertuples(index=False):
        rows[f"Corr. {first}, {second} | {group}"] = float(value)
    return rows
