"""Plots of fits; they need ``pip install 'jaxreml[plots]'``.

Every function draws on `ax`, or on a new figure, and returns the Axes. What it draws is the frame
that the function of the same name with ``_data`` gives, to be drawn by other means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError

if TYPE_CHECKING:
    from jaxreml.inference.likelihood.profile import Profile
    from jaxreml.inference.resampling.bootstrap import Bootstrap
    from jaxreml.results.results import LMMResults

FAINT = {"color": "0.6", "linewidth": 0.8, "linestyle": ":"}
MANY = 60  # levels that can be labelled
UPPER_QUARTILE = 0.6744897501960817  # of the normal distribution


def caterpillar_data(
    fit: LMMResults,
    group: str | None = None,
    effect: str | None = None,
    *,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Conditional modes of one random effect with normal intervals, lowest first.

    Args:
        fit: the fit.
        group: grouping factor; the first if left out.
        effect: name of the effect; the first of the group if left out.
        conf_level: of the intervals, from the conditional variances.

    Returns:
        Columns level, estimate, std_error, lower, upper.

    Raises:
        DataError: no such group or effect.
    """
    from scipy.special import ndtri

    group, effect = _choose(fit, group, effect)
    modes, errors = fit.random_effects[group][effect], fit.random_effects_se[group][effect]
    half = ndtri((1 + conf_level) / 2) * errors
    frame = pd.DataFrame(
        {"estimate": modes, "std_error": errors, "lower": modes - half, "upper": modes + half}
    )
    return frame.sort_values("estimate").reset_index(names="level")


def caterpillar(
    fit: LMMResults,
    group: str | None = None,
    effect: str | None = None,
    *,
    conf_level: float = 0.95,
    ax: Any = None,
) -> Any:
    """A caterpillar plot of `caterpillar_data`: blue where all of the interval is positive, red
    where it is negative. Levels are labelled where there are at most 60."""
    group, effect = _choose(fit, group, effect)
    frame = caterpillar_data(fit, group, effect, conf_level=conf_level)
    few = len(frame) <= MANY
    ax = new_axes(ax, height=max(3.0, 0.22 * len(frame)) if few else 7.0)
    places = np.arange(len(frame))
    colours = np.where(frame["lower"] > 0, "C0", np.where(frame["upper"] < 0, "C3", "0.5"))
    ax.hlines(
        places, frame["lower"], frame["upper"], colors=list(colours), linewidth=1.5 if few else 0.6
    )
    if few:
        ax.scatter(frame["estimate"], places, s=14, color="black", zorder=3)
        ax.set_yticks(places, [str(name) for name in frame["level"]])
    else:
        ax.plot(frame["estimate"], places, color="black", linewidth=1)
        ax.set_yticks([])
    ax.axvline(0, **FAINT)
    ax.set(xlabel=f"{effect}, with {conf_level:.0%} interval", ylabel=group)
    ax.margins(y=0.01)
    return ax


def residuals_fitted_data(fit: LMMResults) -> pd.DataFrame:
    """Columns fitted and scaled_residual, (y - fitted) sqrt(weight) / sigma; a row per row used."""
    return pd.DataFrame(
        {"fitted": fit.fittedvalues, "scaled_residual": _scaled(fit)}, fit.table.index
    )


def residuals_fitted(fit: LMMResults, *, ax: Any = None) -> Any:
    """Scaled residuals against fitted values."""
    frame = residuals_fitted_data(fit)
    ax = new_axes(ax)
    size = float(np.clip(4000 / len(frame), 1, 16))
    ax.scatter(frame["fitted"], frame["scaled_residual"], s=size, alpha=0.6, linewidths=0)
    ax.axhline(0, **FAINT)
    ax.set(xlabel="fitted value", ylabel="scaled residual")
    return ax


def qq_residuals_data(fit: LMMResults) -> pd.DataFrame:
    """Columns quantile (normal) and scaled_residual, in order."""
    return _quantiles(pd.Series(_scaled(fit), fit.table.index), "scaled_residual")


def qq_residuals(fit: LMMResults, *, ax: Any = None) -> Any:
    """Normal quantile plot of the scaled residuals, with the line they should follow."""
    frame = qq_residuals_data(fit)
    ax = new_axes(ax)
    ax.scatter(frame["quantile"], frame["scaled_residual"], s=8, alpha=0.7, linewidths=0)
    ax.axline((0, 0), slope=1, **FAINT)
    ax.set(xlabel="normal quantile", ylabel="scaled residual")
    return ax


def qq_modes_data(
    fit: LMMResults, group: str | None = None, effect: str | None = None
) -> pd.DataFrame:
    """Normal quantiles and conditional modes of one random effect; arguments as for
    `caterpillar_data`. Columns level, quantile, mode, std_error."""
    group, effect = _choose(fit, group, effect)
    frame = _quantiles(pd.Series(fit.random_effects[group][effect]), "mode")
    errors = fit.random_effects_se[group][effect]
    return frame.assign(std_error=errors[frame.index]).reset_index(names="level")


def qq_modes(
    fit: LMMResults, group: str | None = None, effect: str | None = None, *, ax: Any = None
) -> Any:
    """Normal quantile plot of conditional modes with their standard errors.

    The line goes through the quartiles: modes are shrunk, so that its slope is less than the
    standard deviation of the effect.
    """
    group, effect = _choose(fit, group, effect)
    frame = qq_modes_data(fit, group, effect)
    ax = new_axes(ax)
    ax.errorbar(
        frame["quantile"], frame["mode"], frame["std_error"], fmt="o", markersize=3, elinewidth=0.6
    )
    low, high = np.quantile(frame["mode"], [0.25, 0.75])
    slope = (high - low) / (2 * UPPER_QUARTILE)
    ax.axline((0, (low + high) / 2), slope=slope, **FAINT)
    ax.set(xlabel="normal quantile", ylabel=f"mode of {effect} of {group}")
    return ax


def coefficients_data(
    fit: LMMResults,
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
    """
    frame = fit.conf_int(conf_level, df, output="pandas")
    frame.insert(0, "estimate", fit.params)
    if standardise:
        frame = frame.mul(fit.frame.X.std(axis=0), axis=0)
    if not intercept:
        frame = frame.drop(index="(Intercept)", errors="ignore")
    return frame.reset_index(names="term")


def coefficients(
    fit: LMMResults,
    *,
    conf_level: float = 0.95,
    df: str = "satterthwaite",
    intercept: bool = False,
    standardise: bool = False,
    ax: Any = None,
) -> Any:
    """A forest plot of the fixed effects; arguments as for `coefficients_data`."""
    frame = coefficients_data(
        fit, conf_level=conf_level, df=df, intercept=intercept, standardise=standardise
    )
    ax = new_axes(ax, height=max(2.0, 0.35 * len(frame) + 1))
    places = np.arange(len(frame))[::-1]
    ax.hlines(places, frame["lower"], frame["upper"], color="C0", linewidth=1.5)
    ax.scatter(frame["estimate"], places, s=20, color="C0", zorder=3)
    ax.set_yticks(places, list(frame["term"]))
    ax.axvline(0, **FAINT)
    per = " per SD of the column" if standardise else ""
    ax.set(xlabel=f"estimate{per}, with {conf_level:.0%} interval")
    ax.margins(y=0.1)
    return ax


def shrinkage_data(fit: LMMResults, group: str | None = None) -> pd.DataFrame:
    """What each level's own data say of its effects, and what the model makes of it.

    A level's own estimates are least squares, in its rows, of what the fixed effects and the other
    random terms leave; NaN where its rows do not determine them.

    Args:
        fit: the fit.
        group: grouping factor; the first if left out. Of several terms on it, the first.

    Returns:
        Columns level, effect, own, shrunk.
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
    fit: LMMResults,
    group: str | None = None,
    effects: tuple[str, str] | None = None,
    *,
    ax: Any = None,
) -> Any:
    """Arrows from each level's own estimate to the shrunken one.

    Two effects are drawn against each other, the first two of the group if `effects` is left out;
    a single one against its own estimate, with the line of no shrinkage.
    """
    group, first = _choose(fit, group, None)
    frame = shrinkage_data(fit, group)
    wide = frame.pivot(index="level", columns="effect", values=["own", "shrunk"])
    names = list(dict.fromkeys(frame["effect"]))
    ax = new_axes(ax)
    if len(names) == 1:
        ax.scatter(wide["own", first], wide["shrunk", first], s=14)
        ax.axline((0, 0), slope=1, **FAINT)
        ax.set(xlabel=f"{first} of {group}, its own data", ylabel="conditional mode")
        return ax
    x, y = effects or (names[0], names[1])
    for name in (x, y):
        if name not in names:
            raise DataError(f"{group!r} has no effect {name!r}: {', '.join(names)}")
    ax.quiver(
        wide["own", x], wide["own", y],
        wide["shrunk", x] - wide["own", x], wide["shrunk", y] - wide["own", y],
        angles="xy", scale_units="xy", scale=1, width=0.003, color="0.5",
    )  # fmt: skip
    ax.scatter(wide["own", x], wide["own", y], s=14, color="C1", label="its own data")
    ax.scatter(wide["shrunk", x], wide["shrunk", y], s=14, color="C0", label="conditional mode")
    ax.set(xlabel=f"{x} of {group}", ylabel=f"{y} of {group}")
    ax.legend(frameon=False)
    return ax


def profile_zeta_data(profile: Profile, parameter: str | None = None) -> pd.DataFrame:
    """The profile of one parameter, the first if left out: columns value and zeta."""
    frame = profile.frame
    chosen = frame["parameter"] == _parameter(profile, parameter)
    return frame.loc[chosen, ["value", "zeta"]].reset_index(drop=True)


def profile_zeta(profile: Profile, parameter: str | None = None, *, ax: Any = None) -> Any:
    """Signed root of the deviance against a parameter, with the ends of 50, 80, 90, 95 and 99%
    intervals. Where it is straight, Wald intervals are right."""
    from scipy.special import ndtri

    name = _parameter(profile, parameter)
    frame = profile_zeta_data(profile, name)
    ax = new_axes(ax)
    values = np.linspace(frame["value"].iloc[0], frame["value"].iloc[-1], 200)
    ax.plot(values, _interpolated(frame["value"], frame["zeta"])(values))
    ax.scatter(frame["value"], frame["zeta"], s=8)
    for level in (0.5, 0.8, 0.9, 0.95, 0.99):
        for zeta in ndtri([(1 - level) / 2, (1 + level) / 2]):
            if frame["zeta"].iloc[0] <= zeta <= frame["zeta"].iloc[-1]:
                at = float(_interpolated(frame["zeta"], frame["value"])(zeta))
                ax.vlines(at, 0, zeta, color="0.6", linewidth=0.8)
    ax.axhline(0, **FAINT)
    ax.set(xlabel=name, ylabel="zeta")
    return ax


def profile_contour_data(
    profile: Profile,
    first: str,
    second: str,
    conf_levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95),
) -> pd.DataFrame:
    """The edges of joint likelihood regions of two parameters: `Profile.contour`."""
    return profile.contour(first, second, conf_levels)


def profile_contour(
    profile: Profile,
    first: str,
    second: str,
    conf_levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95),
    *,
    ax: Any = None,
) -> Any:
    """Joint likelihood regions of two parameters, with the traces of their profiles: where the
    profile of one has the other. See `Profile.contour`."""
    frame = profile_contour_data(profile, first, second, conf_levels)
    ax = new_axes(ax)
    for level, part in frame.groupby("conf_level"):
        ax.plot(part[first], part[second], color="C0", linewidth=1)
        top = part.loc[part[second].idxmax()]
        ax.annotate(f"{level:.0%}", (top[first], top[second]), fontsize=7, ha="center")
    whole = profile.frame
    for name in (first, second):
        trace = whole[whole["parameter"] == name]
        ax.plot(trace[first], trace[second], **FAINT)
    ax.set(xlabel=first, ylabel=second)
    return ax


def bootstrap_density_data(bootstrap: Bootstrap, statistic: str | None = None) -> pd.DataFrame:
    """Kernel density estimate of the finite draws of one statistic, the first if left out.

    Returns:
        Columns value and density, 200 rows.
    """
    from scipy.stats import gaussian_kde

    draws = _draws(bootstrap, statistic)
    values = np.linspace(draws.min(), draws.max(), 200)
    return pd.DataFrame({"value": values, "density": gaussian_kde(draws)(values)})


def bootstrap_density(
    bootstrap: Bootstrap,
    statistic: str | None = None,
    *,
    conf_level: float = 0.95,
    method: str = "percentile",
    ax: Any = None,
) -> Any:
    """Density of the draws of one statistic, with the estimate and an interval of `method`."""
    name = _statistic(bootstrap, statistic)
    frame = bootstrap_density_data(bootstrap, name)
    ax = new_axes(ax)
    ax.plot(frame["value"], frame["density"])
    ax.axvline(bootstrap.estimate[name], color="black", linewidth=1)
    interval = bootstrap.conf_int(conf_level, method).loc[name]
    if np.isfinite([interval["lower"], interval["upper"]]).all():
        inside = frame[frame["value"].between(interval["lower"], interval["upper"])]
        ax.fill_between(inside["value"], inside["density"], alpha=0.3)
    lost = len(bootstrap.draws) - len(_draws(bootstrap, name))
    note = f" ({lost} draws are not finite)" if lost else ""
    ax.set(
        xlabel=f"{name}, {conf_level:.0%} {method} interval{note}", ylabel="density", ylim=(0, None)
    )
    return ax


def _parameter(profile: Profile, name: str | None) -> str:
    name = profile.parameters[0] if name is None else name
    if name not in profile.parameters:
        raise DataError(f"there is no profile of {name!r}: {', '.join(profile.parameters)}")
    return name


def _interpolated(x: Any, y: Any) -> Any:
    """A cubic spline through points in the order of x, ties left out."""
    from scipy.interpolate import CubicSpline

    values, places = np.unique(np.asarray(x, float), return_index=True)
    return CubicSpline(values, np.asarray(y, float)[places])


def _statistic(bootstrap: Bootstrap, name: str | None) -> str:
    known = [str(label) for label in bootstrap.estimate.index]
    name = known[0] if name is None else name
    if name not in known:
        raise DataError(f"there is no statistic {name!r}: {', '.join(known)}")
    return name


def _draws(bootstrap: Bootstrap, statistic: str | None) -> np.ndarray:
    draws = bootstrap.draws[_statistic(bootstrap, statistic)].to_numpy()
    draws = draws[np.isfinite(draws)]
    if np.ptp(draws) == 0 if draws.size else True:
        raise DataError("the draws do not vary: there is no density to draw")
    return draws


def _choose(fit: LMMResults, group: str | None, effect: str | None) -> tuple[str, str]:
    """A grouping factor and one of its effects, the first where none is asked for."""
    frames = fit.random_effects
    group = str(next(iter(frames))) if group is None else group
    if group not in frames:
        raise DataError(f"there is no grouping factor {group!r}: {', '.join(frames)}")
    effects = list(frames[group].columns)
    effect = str(effects[0]) if effect is None else effect
    if effect not in effects:
        raise DataError(f"{group!r} has no effect {effect!r}: {', '.join(effects)}")
    return group, effect


def _scaled(fit: LMMResults) -> np.ndarray:
    root = 1.0 if fit.weights is None else np.sqrt(fit.weights)
    return (fit.y - fit.fitted) * root / fit.sigma


def _quantiles(values: pd.Series, name: str) -> pd.DataFrame:
    from scipy.special import ndtri

    ordered = values.sort_values()
    n = len(ordered)
    quantile = ndtri((np.arange(n) + 0.5) / n)
    return pd.DataFrame({"quantile": quantile, name: ordered.to_numpy()}, ordered.index)


def new_axes(ax: Any, height: float = 4.5) -> Any:
    """`ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise DataError("plots need matplotlib: pip install 'jaxreml[plots]'") from None
    return plt.subplots(figsize=(6.5, height), layout="constrained")[1]
