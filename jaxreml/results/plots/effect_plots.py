"""Effect plots: what the model predicts along a variable, with the data and the groups' own lines.

The predictions are those of `jaxreml.inference.means.emmeans` on the reference grid: averages over
the levels of the other factors, with the other covariates at their means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.results.plots.canvas import (
    BLUE,
    GREY,
    PALETTE,
    WIDTH,
    label_below,
    legend_above,
    one_or_all,
    panels,
    point_style,
)
from jaxreml.results.plots.effect_values import Effect
from jaxreml.results.plots.fixed_effects import joined

DODGE = 0.5  # of the distance of two levels, for points beside each other
JITTER = 0.3
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly


def effects_data(
    fit: FittedModel,
    variable: str,
    by: str | None = None,
    *,
    facet: str | None = None,
    at: Mapping[str, Any] | None = None,
    df: str = "satterthwaite",
    weights: str = "equal",
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Predicted means along a variable of the fixed effects, with confidence intervals.

    Args:
        fit: the fit.
        variable: a covariate, taken at 61 values over its range, or a factor.
        by: another variable, for each of whose levels there is a line; of a covariate, the mean
            and a standard deviation to each side (all its values, if there are at most 5).
        facet: one more, for each of whose levels there is a panel.
        at: values of variables, as for `LMMResults.emmeans`.
        df: degrees of freedom, as for `LMMResults.test`.
        weights: of the levels averaged over, as for `LMMResults.emmeans`.
        conf_level: of the intervals, each for one mean.

    Returns:
        A row per mean: its levels of `variable`, `by` and `facet` (and of what these are nested
        in), estimate, std_error, df, lower and upper.

    Raises:
        DataError: a name that is not a variable of the fixed effects.

    Examples:
        >>> ends = jaxreml.plots.effects_data(fit, "Days", at={"Days": [0, 9]})
        >>> ends[["Days", "estimate", "lower", "upper"]].round(1)
           Days  estimate  lower  upper
        0   0.0     251.4  237.0  265.8
        1   9.0     345.6  314.7  376.5
    """
    means = Effect(fit, variable, by, facet, dict(at or {})).means(df, weights, conf_level)
    columns = ["estimate", "std_error", "df", "lower", "upper"]
    return means.table.reindex(columns=[*means.factors, *columns])


def effects_groups_data(
    fit: FittedModel,
    variable: str,
    by: str | None = None,
    *,
    facet: str | None = None,
    group: str | None = None,
    at: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Predictions along a variable for each level of a grouping factor, its random effects
    included.

    A level's line is the average over its own rows, with the variable at one value in all of them:
    other variables are as they are in the level. Random effects of other factors are zero.

    Args:
        fit, variable, by, facet, at: as for `effects_data`.
        group: the grouping factor; if left out, the first with a random effect of the variable, or
            the first.

    Returns:
        A column by the name of the grouping factor, `by` and `facet` if they are factors (a level
        has lines where it has rows), `variable`, and prediction.

    Raises:
        DataError: also a name that is not a grouping factor.
        ValueError: the variable is the grouping factor.

    Examples:
        >>> lines = jaxreml.plots.effects_groups_data(fit, "Days", at={"Days": [0, 9]})
        >>> lines.head(2).round(1)
          Subject  Days  prediction
        0     308   0.0       253.7
        1     308   9.0       430.7
    """
    effect = Effect(fit, variable, by, facet, dict(at or {}))
    return effect.of_groups(effect.grouping if group is None else group)


def effects(
    fit: FittedModel,
    variable: str,
    by: str | None = None,
    *,
    facet: str | None = None,
    group: str | bool | None = None,
    points: bool = True,
    at: Mapping[str, Any] | None = None,
    df: str = "satterthwaite",
    weights: str = "equal",
    conf_level: float = 0.95,
    ax: Any = None,
) -> Any:
    """What the model predicts along a variable: `effects_data`, with the data.

    A covariate has a line with its confidence band, and thin lines for the levels of a grouping
    factor (`effects_groups_data`); a factor has points with intervals, and thin lines if `group`
    asks for them. Lines of `by` differ in colour, those of `facet` have panels of their own.

    Args:
        fit, variable, by, facet, at, df, weights, conf_level: as for `effects_data`.
        group: the grouping factor of the thin lines; False for none.
        points: whether to draw the responses of the rows, as they are: not adjusted for other
            variables.
        ax: the Axes to draw on, as many as `facet` has levels.

    Returns:
        The Axes, an array of them if there are several panels.

    Raises:
        DataError: as `effects_data`, and more levels of `by` than colours can tell apart.

    Examples:
        >>> axes = jaxreml.plots.effects(fit, "Days")
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('Days', 'Reaction')
    """
    effect = Effect(fit, variable, by, facet, dict(at or {}))
    frame = effects_data(
        fit, variable, by, facet=facet, at=at, df=df, weights=weights, conf_level=conf_level
    )
    colours = _colours(frame, by)
    if group is None:
        group = effect.grouping if effect.few_groups and effect.is_covariate(variable) else False
    lines = effect.of_groups(str(group)) if group else None
    facets = list(frame[facet].unique()) if facet else [None]
    columns = 2 if len(facets) in (2, 4) else min(len(facets), 3)
    rows = -(-len(facets) // columns)
    axes = panels(
        ax, len(facets), columns=columns, width=8.0 if len(facets) > 1 else WIDTH,
        height=4.5 if len(facets) == 1 else 2.9 * rows + 0.7, sharex=True, sharey=True,
    )  # fmt: skip
    for panel, own in zip(facets, axes, strict=True):
        canvas = _Panel(own, effect, colours, list(frame[variable].unique()))
        if points:
            canvas.points(effect.rows(panel))
        if lines is not None:
            canvas.lines(_part(lines, facet, panel))
        canvas.means(_part(frame, facet, panel))
        if facet:
            own.set_title(joined(pd.DataFrame({facet: [panel]}), named=True)[0], fontsize=10)
        own.set(xlabel=variable, ylabel=effect.response)
        own.label_outer()
    _explain(axes, effect, colours, conf_level, str(group) if group else None)
    return one_or_all(axes)


def _colours(frame: Any, by: str | None) -> dict[Any, str]:
    """Per level of `by` its colour."""
    if not by:
        return {None: BLUE}
    levels = list(frame[by].unique())
    if len(levels) > len(PALETTE):
        raise DataError(
            f"by={by!r} has {len(levels)} levels, more than colours can tell apart: use "
            f"facet={by!r}, or take some of them by at={{...}}"
        )
    return dict(zip(levels, PALETTE, strict=False))


def _part(frame: Any, name: str | None, level: Any) -> pd.DataFrame:
    """Rows of one level, all of them where the frame is not by it."""
    return frame[frame[name] == level] if name is not None and name in frame else frame


@dataclass(frozen=True)
class _Panel:
    """The Axes of one panel: where and in which colour things are."""

    ax: Any
    effect: Effect
    colours: dict[Any, str]
    levels: list[Any]

    @property
    def along(self) -> bool:
        return self.effect.is_covariate(self.effect.variable)

    def split(self, frame: Any, single: str = GREY) -> list[tuple[str, float, pd.DataFrame]]:
        """Per level of `by` its colour, its shift and its rows; all in one colour where rows are of
        no level."""
        by = self.effect.by
        if by is None or by not in frame:
            return [(single, 0.0, frame)]
        shifts = np.zeros(len(self.colours))
        if not self.along and len(shifts) > 1:
            shifts = DODGE * (np.arange(len(shifts)) / (len(shifts) - 1) - 0.5)
        pairs = zip(self.colours.items(), shifts, strict=True)
        return [(colour, shift, _part(frame, by, key)) for (key, colour), shift in pairs]

    def places(self, values: Any, shift: float) -> np.ndarray:
        """Horizontal places of values of the variable, NaN for levels that are not drawn."""
        if self.along:
            return values.to_numpy(float)
        known = {level: k + shift for k, level in enumerate(self.levels)}
        return np.array([known.get(value, np.nan) for value in values])

    def points(self, rows: Any) -> None:
        style = point_style(len(rows))
        for colour, shift, part in self.split(rows):
            x = self.places(part[self.effect.variable], shift)
            if not self.along:
                x = x + JITTER / len(self.colours) * (np.arange(len(x)) * GOLDEN % 1 - 0.5)
            alpha = style["alpha"] * 0.7
            self.ax.scatter(x, part["(response)"], color=colour, **style | {"alpha": alpha})

    def lines(self, frame: Any) -> None:
        from matplotlib.collections import LineCollection

        names = list(dict.fromkeys([frame.columns[0], *self.effect.cells]))
        count = frame[names[0]].nunique()
        alpha = float(np.clip(6 / np.sqrt(count) / 3, 0.12, 0.5))
        for colour, shift, part in self.split(frame):
            segments = [
                np.column_stack([self.places(own[self.effect.variable], shift), own["prediction"]])
                for _, own in part.groupby(names, observed=True, sort=False)
            ]
            self.ax.add_collection(
                LineCollection(segments, colors=colour, linewidths=0.7, alpha=alpha), autolim=True
            )
        self.ax.autoscale_view()

    def means(self, frame: Any) -> None:
        variable = self.effect.variable
        for colour, shift, part in self.split(frame, BLUE):
            x = self.places(part[variable], shift)
            low, high = part["lower"], part["upper"]
            if self.along:
                self.ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0, zorder=3)
                self.ax.plot(x, part["estimate"], color=colour, linewidth=2.2, zorder=4)
            else:
                self.ax.vlines(x, low, high, color=colour, linewidth=2.2, zorder=3)
                self.ax.scatter(
                    x, part["estimate"], s=36, color=colour, edgecolor="white", zorder=4
                )
        if not self.along:
            label_below(self.ax, joined(pd.DataFrame({variable: self.levels})))


def _explain(
    axes: np.ndarray, effect: Effect, colours: dict[Any, str], conf_level: float, group: str | None
) -> None:
    """A legend above the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    what = "band" if effect.is_covariate(effect.variable) else "interval"
    marker = None if what == "band" else "o"
    if effect.by:
        texts = joined(pd.DataFrame({effect.by: list(colours)}), named=True)
    else:
        texts = [f"mean, {conf_level:.0%} {what}"]
    handles: list[Any] = []
    for colour in colours.values():
        line = Line2D([], [], color=colour, linewidth=2.2, marker=marker)
        shade = Patch(facecolor=colour, alpha=0.22, linewidth=0)
        handles.append((shade, line) if what == "band" else line)
    if group:
        handles.append(Line2D([], [], color=GREY, linewidth=0.7))
        texts.append(f"each {group}")
    if len(axes) == 1:
        legend_above(axes[0], 4, handles=handles, labels=texts)
    else:
        axes[0].figure.legend(
            handles, texts, loc="outside upper right", ncols=4, fontsize=9, frameon=False
        )
