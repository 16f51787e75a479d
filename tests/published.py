"""Published analyses: figures that books, SAS and other programs printed, and ours beside them.

`reference/published/cases.json` has the figures with their sources, as they were printed, and the
models. Also read by the page docs/trust/accuracy.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from references import HERE

import jaxreml
from jaxreml import LMMResults, datasets

FOLDER = HERE / "published"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
NLME: dict[str, Any] = json.loads((FOLDER / "nlme.json").read_text())


def table(case: dict[str, Any]) -> pd.DataFrame:
    """The data of a case."""
    if "bundled" in case:
        frame = datasets.load(case["bundled"])
    elif "csv" in case:
        frame = pd.read_csv(FOLDER / case["csv"])
    else:
        frame = pd.DataFrame(case["rows"], columns=case["columns"])
    return frame.astype(dict.fromkeys(case["factors"], str))


def fitted(case: dict[str, Any]) -> LMMResults:
    """The fit of a case."""
    return jaxreml.fit(case["formula"], table(case), case.get("method", "REML"))


def _mean(column: str) -> Callable[[LMMResults, str], float]:
    """A column of the least squares means of 'factor,level'."""

    def of(fit: LMMResults, label: str) -> float:
        factor, level = label.split(",")
        with warnings.catch_warnings():  # SAS takes means in the presence of interactions too
            warnings.simplefilter("ignore")
            means = fit.emmeans(factor).table
        return means.loc[means[factor].astype(str) == level, column].iloc[0]

    return of


def _entry(fit: LMMResults, label: str) -> float:
    i, j = map(int, label.split(","))
    return fit.parameters_vcov("variance").iloc[i, j]


def _mode(fit: LMMResults, label: str) -> float:
    group, level = label.split(",")
    return fit.random_effects[group].loc[level].iloc[0]


def _anova(kind: str, column: str) -> Callable[[LMMResults, str], float]:
    return lambda fit, term: fit.anova(kind).loc[term, column]


def _coefficient(df: str, column: str) -> Callable[[LMMResults, str], float]:
    return lambda fit, name: fit.coefficients(df).loc[name, column]


OURS: dict[str, Callable[[LMMResults, str], Any]] = {
    "criterion": lambda fit, _: fit.criterion,
    "log likelihood": lambda fit, _: fit.llf,
    "fixed effect": lambda fit, name: fit.params[name],
    "standard error": lambda fit, name: fit.bse[name],
    "variance": lambda fit, group: fit.variances[group].iloc[0],
    "df, Satterthwaite": _coefficient("satterthwaite", "df"),
    "df, Kenward-Roger": _coefficient("kenward-roger", "df"),
    "standard error, Kenward-Roger": _coefficient("kenward-roger", "std_error"),
    "F, type II": _anova("II", "statistic"),
    "F, type III": _anova("III", "statistic"),
    "p of F, type III": _anova("III", "p_value"),
    "covariance of variances": _entry,
    "conditional mode": _mode,
    "least squares mean": _mean("estimate"),
    "t of it": _mean("statistic"),
    "lower limit of it": _mean("lower"),
    "upper limit of it": _mean("upper"),
}


def half_unit(printed: str | float) -> float:
    """Half a unit of the last digit of a printed figure; 0 for one at full precision."""
    if not isinstance(printed, str):
        return 0.0
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def comparisons(case: dict[str, Any], fit: LMMResults) -> Iterator[tuple[str, str, float, float]]:
    """The figures of a case: quantity, label, theirs, ours."""
    for quantity, label, printed in case["figures"]:
        yield quantity, label, printed, float(OURS[quantity](fit, label))
    if "nlme" in case:
        theirs = NLME[case["nlme"]]
        yield "log likelihood", "", theirs["logLik"], fit.llf
        both = {
            "standard deviation": (np.sort(theirs["sd"]), np.sort(fit.variance_components["sd"])),
            "fixed effect": (np.atleast_1d(theirs["fixef"]), fit.params.to_numpy()),
            "standard error": (np.atleast_1d(theirs["se"]), fit.bse.to_numpy()),
        }
        for quantity, (expected, found) in both.items():
            assert len(expected) == len(found)
            for k, pair in enumerate(zip(expected, found, strict=True)):
                yield quantity, str(k), *map(float, pair)


def compared(case: dict[str, Any]) -> pd.DataFrame:
    """Every figure of a case beside ours, with what they may differ by: half a unit of the last
    printed digit, or the precision that the source claims, whichever is larger."""
    rows = []
    for quantity, label, printed, ours in comparisons(case, fitted(case)):
        theirs = float(printed)
        allowed = max(half_unit(printed) * (1 + 1e-9), case.get("relative", 0.0) * abs(theirs))
        rows.append((quantity, label, printed, ours, abs(ours - theirs), allowed))
    return pd.DataFrame(
        rows, columns=["quantity", "label", "published", "ours", "deviation", "allowed"]
    )
