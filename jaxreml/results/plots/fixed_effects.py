"""Plots of fixed effects and of estimated marginal means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed import wald
from jaxreml.inference.fixed.letters import letters as compact_letters
from jaxreml.inference.fixed.means import MarginalMeans
from jaxreml.results.plots.canvas import (
    BLUE,
    FAINT,
    label_levels,
    levels_height,
    new_axes,
    one_or_all,
    panels,
)


def coefficients_data(
    fit: FittedModel,
    *,
    conf_level: float = 0.95,
    df: str = "satterthwaite",
    intercept: bool = False,
    standardise: bool = False,
) -> pd.DataFrame:
    """Fixed effects with t intervals: columns term, estimate, lower, upper.

    Args:
        fit: the fit.
        conf_level: of the intervals.
        df: degrees of freedom, as for `LMMResults.test`.
        intercept: whether the intercept is among them.
        standardise: per standard deviation of the column of X, so that effects of columns in
            different units can be compared.

    Examples:
        >>> jaxreml.plots.coefficients_data(fit).round(2)
           term  estimate  lower  upper
        0  Days     10.47   7.21  13.73
    """
    frame = wald.conf_int(fit, conf_level, df)
    frame.insert(0, "estimate", fit.params)
    if standardise:
        frame = frame.mul(fit.frame.X.std(axis=0), axis=0)
    if not intercept:
        frame = frame.drop(index="(Intercept)", errors="ignore")
    return frame.reset_index(names="term")


def coefficients(
    fit: FittedModel,
    *,
    conf_level: float = 0.95,
    df: str = "satterthwaite",
    intercept: bool = False,
    standardise: bool = False,
    ax: Any = None,
) -> Any:
    """A forest plot of the fixed effects; arguments as for `coefficients_data`.

    Examples:
        >>> axes = jaxreml.plots.coefficients(scores, df="kenward-roger")
        >>> axes.figure.savefig("coefficients.png", dpi=300)
    """
    frame = coefficients_data(
        fit, conf_level=conf_level, df=df, intercept=intercept, standardise=standardise
    )
    ax = new_axes(ax, height=levels_height(len(frame)))
    ax.axvline(0, **FAINT)
    _intervals(ax, frame[::-1], list(frame["term"][::-1]))
    per = " per SD of the column" if standardise else ""
    ax.set(xlabel=f"estimate{per}, with {conf_level:.0%} interval")
    return ax


def emmeans_data(
    means: MarginalMeans, *, level: float = 0.05, adjust: str | None = None, letters: bool = True
) -> pd.DataFrame:
    """Estimated marginal means with their intervals and a compact letter display.

    Args:
        means: of `LMMResults.emmeans` or `emtrends`.
        level: differences whose adjusted p-value is at most this are significant.
        adjust: of the p-values, see `MarginalMeans.contrast`; Tukey's if left out.
        letters: whether to compare the means; False where there is one only.

    Returns:
        A row per mean: panel (the levels of `by`; "" if there are none), label (its other levels),
        estimate, lower, upper, and letters: means of a panel that share one do not differ.

    Raises:
        DataError: letters of one mean.

    Examples:
        >>> frame = jaxreml.plots.emmeans_data(scores.emmeans("Machine"))
        >>> frame[["label", "estimate", "letters"]].round(2)
          label  estimate letters
        0     A     52.36       a
        1     B     60.32       b
        2     C     66.27       c
    """
    table, by = means.table, list(means.by)
    compared = [name for name in means.factors if name not in by]
    frame = pd.DataFrame(
        {
            "panel": joined(table[by], named=True),
            "label": joined(table[compared]),
            **{name: table[name] for name in ("estimate", "lower", "upper")},
        }
    )
    return frame.assign(letters=compact_letters(means, level, adjust)) if letters else frame


def emmeans(
    means: MarginalMeans,
    *,
    level: float = 0.05,
    adjust: str | None = None,
    letters: bool = True,
    ax: Any = None,
) -> Any:
    """Estimated marginal means with their intervals, a panel for each level of `by`.

    The letters beside them say which differ: means of a panel that share a letter do not differ
    significantly. Whether two intervals overlap does not say it. Arguments as for `emmeans_data`.

    Returns:
        The Axes, an array of them if there are several panels.

    Examples:
        >>> axes = jaxreml.plots.emmeans(scores.emmeans("Machine"))
        >>> axes.figure.savefig("machines.pdf")
    """
    frame = emmeans_data(means, level=level, adjust=adjust, letters=letters)
    parts = [part for _, part in frame.groupby("panel", sort=False)]
    rows = [len(part) for part in parts]
    height = sum(levels_height(count) for count in rows)
    ratios = {"height_ratios": [count + 1 for count in rows]}
    axes = panels(
        ax, len(parts), columns=1, height=min(height, 9.0), sharex=True, gridspec_kw=ratios
    )
    for part, own in zip(parts, axes, strict=True):
        _intervals(own, part[::-1], list(part["label"][::-1]))
        own.set_ylabel(", ".join(name for name in means.factors if name not in means.by))
        own.set_title(part["panel"].iloc[0], fontsize=10, loc="left")
        for place, text in enumerate(part["letters"][::-1] if letters else ()):
            own.text(1.02, place, text, transform=own.get_yaxis_transform(), va="center")
    word = f"\nmeans that share a letter do not differ at level {level:g}" if letters else ""
    axes[-1].set_xlabel(f"estimate, with {means.conf_level:.0%} interval{word}")
    return one_or_all(axes)


def _intervals(ax: Any, frame: Any, labels: list[str]) -> None:
    """Estimates with intervals, the first row lowest."""
    places = np.arange(len(frame))
    ax.hlines(places, frame["lower"], frame["upper"], color=BLUE, linewidth=1.8)
    ax.scatter(frame["estimate"], places, s=28, color=BLUE, zorder=3, linewidths=0)
    label_levels(ax, labels)


def joined(levels: Any, named: bool = False) -> list[str]:
    """Levels as one text per row, with the names of their factors if `named`."""
    columns = []
    for name in levels:
        texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in levels[name]]
        columns.append([f"{name} = {text}" for text in texts] if named else texts)
    return [", ".join(parts) for parts in zip(*columns, strict=True)] or [""] * len(levels)
