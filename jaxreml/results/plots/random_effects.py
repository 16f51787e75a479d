"""Plots of the random effects: their conditional modes, and how far these are shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.results.plots.canvas import (
    BLUE,
    FAINT,
    GREY,
    ORANGE,
    TALLEST,
    VERMILLION,
    WIDTH,
    label_levels,
    legend_above,
    levels_height,
    new_axes,
    one_or_all,
    panels,
)

MANY = 60  # levels whose modes are drawn as points
UPPER_QUARTILE = ndtri(0.75)


def caterpillar_data(
    fit: FittedModel,
    group: str | None = None,
    effect: str | Sequence[str] | None = None,
    *,
    conf_level: float = 0.95,
    sort: str | None = None,
) -> pd.DataFrame:
    """Conditional modes of the random effects of a grouping factor, with normal intervals.

    Args:
        fit: the fit.
        group: grouping factor; the first if left out.
        effect: name of the effect, or several; all of the group if left out.
        conf_level: of the intervals, from the conditional variances.
        sort: the effect by whose modes the levels are in order, lowest first; the first of those
            asked for if left out.

    Returns:
        A row per effect and level: effect, level, estimate, std_error, lower, upper.

    Raises:
        DataError: no such group or effect.

    Examples:
        >>> frame = jaxreml.plots.caterpillar_data(fit, "Subject", "Days")
        >>> frame[["level", "estimate", "lower", "upper"]].round(1).head(2)
          level  estimate  lower  upper
        0   335     -10.8  -15.3   -6.2
        1   309      -8.6  -13.1   -4.1
    """
    group, effects = _chosen(fit, group, effect)
    modes, errors = fit.random_effects[group], fit.random_effects_se[group]
    _, (first,) = _chosen(fit, group, sort or effects[0])
    order = np.argsort(modes[first].to_numpy(), kind="stable")
    parts = []
    for name in effects:
        estimate, error = modes[name].to_numpy()[order], errors[name].to_numpy()[order]
        half = ndtri((1 + conf_level) / 2) * error
        columns = {"estimate": estimate, "std_error": error}
        columns |= {"lower": estimate - half, "upper": estimate + half}
        parts.append(pd.DataFrame({"effect": name, "level": modes.index[order], **columns}))
    return pd.concat(parts, ignore_index=True)


def caterpillar(
    fit: FittedModel,
    group: str | None = None,
    effect: str | Sequence[str] | None = None,
    *,
    conf_level: float = 0.95,
    sort: str | None = None,
    ax: Any = None,
) -> Any:
    """A caterpillar plot of `caterpillar_data`, a panel for each effect.

    Intervals are blue where all of them is positive and vermillion where all is negative. Levels
    are named as far as there is room: of more than about 50 every few, the first and the last among
    them.

    Args:
        fit, group, effect, conf_level, sort: as for `caterpillar_data`.
        ax: the Axes to draw on, as many as there are effects.

    Returns:
        The Axes, an array of them if there are several effects.

    Examples:
        >>> axes = jaxreml.plots.caterpillar(fit, "Subject", "Days")
        >>> axes.figure.savefig("subjects.png", dpi=300)
    """
    group, effects = _chosen(fit, group, effect)
    frame = caterpillar_data(fit, group, effects, conf_level=conf_level, sort=sort)
    count = len(frame) // len(effects)
    width = WIDTH if len(effects) < 3 else 3.0 * len(effects)
    height = levels_height(count)
    axes = panels(ax, len(effects), width=width, height=height, sharey=True)
    for name, own in zip(effects, axes, strict=True):
        _caterpillar(own, frame[frame["effect"] == name])
        own.set(xlabel=f"{name}\nmode, {conf_level:.0%} interval")
    label_levels(axes[0], list(frame["level"][:count]))
    axes[0].set_ylabel(group)
    return one_or_all(axes)


def _caterpillar(ax: Any, frame: Any) -> None:
    places = np.arange(len(frame))
    up, down = frame["lower"] > 0, frame["upper"] < 0
    colours = np.select([up, down], [BLUE, VERMILLION], GREY).tolist()
    few = len(frame) <= MANY
    width = 1.5 if few else max(0.5, 72 * 0.7 * TALLEST / len(frame) / 2)
    ax.axvline(0, **FAINT)
    ax.hlines(places, frame["lower"], frame["upper"], colors=colours, linewidth=width)
    ax.scatter(
        frame["estimate"], places, s=16 if few else 3, color=colours if few else "black", zorder=3,
        linewidths=0,
    )  # fmt: skip


def qq_modes_data(
    fit: FittedModel, group: str | None = None, effect: str | None = None
) -> pd.DataFrame:
    """Normal quantiles and conditional modes of one random effect.

    Args:
        fit: the fit.
        group: grouping factor; the first if left out.
        effect: name of the effect; the first of the group if left out.

    Returns:
        Columns level, quantile, mode, std_error, in the order of the modes.

    Examples:
        >>> jaxreml.plots.qq_modes_data(fit, effect="Days").round(2).head(2)
          level  quantile   mode  std_error
        0   335     -1.91 -10.75        2.3
        1   309     -1.38  -8.62        2.3
    """
    group, effect = _choose(fit, group, effect)
    frame = quantiles(pd.Series(fit.random_effects[group][effect]), "mode")
    errors = fit.random_effects_se[group][effect]
    return frame.assign(std_error=errors[frame.index]).reset_index(names="level")


def qq_modes(
    fit: FittedModel, group: str | None = None, effect: str | None = None, *, ax: Any = None
) -> Any:
    """Normal quantile plot of conditional modes, with a bar of one standard error to each side.

    The line goes through the quartiles: modes are shrunk, so that its slope is less than the
    standard deviation of the effect. Arguments as for `qq_modes_data`.

    Examples:
        >>> axes = jaxreml.plots.qq_modes(fit, effect="Days")
    """
    group, effect = _choose(fit, group, effect)
    frame = qq_modes_data(fit, group, effect)
    ax = new_axes(ax)
    few = len(frame) <= MANY
    ax.errorbar(
        frame["quantile"], frame["mode"], frame["std_error"], fmt="o", color=BLUE,
        markersize=4 if few else 2, elinewidth=0.8 if few else 0.4, ecolor=GREY if few else "0.8",
        label="mode ± standard error",
    )  # fmt: skip
    low, high = np.quantile(frame["mode"], [0.25, 0.75])
    slope = (high - low) / (2 * UPPER_QUARTILE)
    line = {"color": "black", "linewidth": 0.8, "linestyle": "--", "zorder": 3}
    ax.axline((0, (low + high) / 2), slope=slope, label="quartile line", **line)
    ax.set(xlabel="normal quantile", ylabel=f"{effect} of {group}")
    legend_above(ax)
    return ax


def shrinkage_data(fit: FittedModel, group: str | None = None) -> pd.DataFrame:
    """What each level's own data say of its effects, and what the model makes of it.

    A level's own estimates are least squares, in its rows, of what the fixed effects and the other
    random terms leave; NaN where its rows do not determine them.

    Args:
        fit: the fit.
        group: grouping factor; the first if left out. Of several terms on it, the first.

    Returns:
        Columns level, effect, own, shrunk.

    Examples:
        >>> jaxreml.plots.shrinkage_data(fit).round(1).head(2)
          level       effect   own  shrunk
        0   308  (Intercept)  -7.2     2.3
        1   308         Days  11.3     9.2
    """
    group, _ = _choose(fit, group, None)
    k = [grouping.name for grouping in fit.groupings].index(group)
    term, grouping = fit.frame.terms[k], fit.groupings[k]
    root = 1.0 if fit.weights is None else np.sqrt(fit.weights)
    left = fit.y - fit.fitted + np.sum(term.effects * grouping.modes[term.codes], axis=1)
    own: Any = np.full(grouping.modes.shape, np.nan)
    order = np.argsort(term.codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(term.codes))[:-1])
    weighted = term.effects * np.reshape(root, (-1, 1))
    for j, chosen in enumerate(rows):
        solution, _, rank, _ = np.linalg.lstsq(weighted[chosen], (left * root)[chosen])
        if rank == own.shape[1]:
            own[j] = solution
    count = len(grouping.effects)
    return pd.DataFrame(
        {
            "level": np.repeat(np.array(grouping.levels, object), count),
            "effect": list(grouping.effects) * len(grouping.levels),
            "own": own.ravel(),
            "shrunk": grouping.modes.ravel(),
        }
    )


def shrinkage(
    fit: FittedModel,
    group: str | None = None,
    effects: tuple[str, str] | None = None,
    *,
    ax: Any = None,
) -> Any:
    """Arrows from each level's own estimate to the shrunken one.

    Two effects are drawn against each other, the first two of the group if `effects` is left out;
    a single one against its own estimate, with the line of no shrinkage.

    Args:
        fit, group: as for `shrinkage_data`.
        effects: names of the two.
        ax: the Axes to draw on.

    Examples:
        >>> axes = jaxreml.plots.shrinkage(fit, "Subject")
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('(Intercept) of Subject', 'Days of Subject')
    """
    group, first = _choose(fit, group, None)
    frame = shrinkage_data(fit, group)
    wide = frame.pivot(index="level", columns="effect", values=["own", "shrunk"])
    names = list(dict.fromkeys(frame["effect"]))
    ax = new_axes(ax)
    size = 20 if len(wide) <= MANY else 8
    if len(names) == 1:
        ax.axline((0, 0), slope=1, label="no shrinkage", **FAINT)
        ax.scatter(wide["own", first], wide["shrunk", first], s=size, color=BLUE, linewidths=0)
        ax.set(xlabel=f"{first} of {group}, from its own data", ylabel="conditional mode")
        legend_above(ax)
        return ax
    x, y = effects or (names[0], names[1])
    for name in (x, y):
        if name not in names:
            raise DataError(f"{group!r} has no effect {name!r}: {', '.join(names)}")
    ax.quiver(
        wide["own", x], wide["own", y],
        wide["shrunk", x] - wide["own", x], wide["shrunk", y] - wide["own", y],
        angles="xy", scale_units="xy", scale=1, color="0.7", width=0.8 / 72, units="inches",
        headwidth=5, headlength=6, headaxislength=5,
    )  # fmt: skip
    drawn = (("own", ORANGE, "from its own data"), ("shrunk", BLUE, "conditional mode"))
    for kind, colour, label in drawn:
        ax.scatter(
            wide[kind, x], wide[kind, y], s=size, color=colour, linewidths=0, label=label, zorder=3
        )
    ax.set(xlabel=f"{x} of {group}", ylabel=f"{y} of {group}")
    legend_above(ax)
    return ax


def quantiles(values: pd.Series, name: str) -> pd.DataFrame:
    """Values in order beside their normal quantiles: columns quantile and `name`."""
    ordered = values.sort_values()
    n = len(ordered)
    quantile = ndtri((np.arange(n) + 0.5) / n)
    return pd.DataFrame({"quantile": quantile, name: ordered.to_numpy()}, ordered.index)


def _chosen(
    fit: FittedModel, group: str | None, effect: str | Sequence[str] | None
) -> tuple[str, list[str]]:
    """A grouping factor, the first where none is asked for, and some of its effects or all."""
    frames = fit.random_effects
    if not frames:
        raise DataError("the fit has no random effects to draw")
    group = str(next(iter(frames))) if group is None else group
    if group not in frames:
        raise DataError(f"there is no grouping factor {group!r}: {', '.join(frames)}")
    known = list(frames[group].columns)
    asked = known if effect is None else [effect] if isinstance(effect, str) else list(effect)
    for name in asked:
        if name not in known:
            raise DataError(f"{group!r} has no effect {name!r}: {', '.join(known)}")
    return group, asked


def _choose(fit: FittedModel, group: str | None, effect: str | None) -> tuple[str, str]:
    """A grouping factor and one of its effects, the first where none is asked for."""
    group, effects = _chosen(fit, group, effect)
    return group, effects[0]
