"""Plots of likelihood profiles and of joint regions of two parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import chdtri, ndtri

from jaxreml.errors import DataError
from jaxreml.inference.likelihood.profile import Profile
from jaxreml.results.plots.canvas import BLUE, GREY, VERMILLION, legend_above, new_axes

LEVELS = (0.5, 0.8, 0.95, 0.99)
CONTOURS = (0.5, 0.8, 0.9, 0.95)
BETWEEN = 8  # points drawn for each of an edge's own
EDGE = 1e-4  # of a deviance, by which a point that is on a bound falls short


def profile_zeta_data(profile: Profile, parameter: str | None = None) -> pd.DataFrame:
    """The profile of one parameter, the first if left out.

    Returns:
        Columns value, zeta and wald, the tangent of zeta at the estimate: what zeta would be if
        Wald intervals were right.

    Raises:
        DataError: no such parameter.

    Examples:
        >>> jaxreml.plots.profile_zeta_data(fit.profile("sigma")).head(2).round(2)
           value  zeta  wald
        0  22.15 -2.58 -2.28
        1  22.55 -2.24 -2.02
    """
    whole = profile.frame
    chosen = whole["parameter"] == _parameter(profile, parameter)
    frame = whole.loc[chosen, ["value", "zeta"]].reset_index(drop=True)
    estimate = float(_interpolated(frame["zeta"], frame["value"])(0.0))
    slope = float(_interpolated(frame["value"], frame["zeta"])(estimate, 1))
    return frame.assign(wald=slope * (frame["value"] - estimate))


def profile_zeta(profile: Profile, parameter: str | None = None, *, ax: Any = None) -> Any:
    """Signed root of the deviance against a parameter, with the ends of 50, 80, 95 and 99%
    intervals. Where it follows the line, Wald intervals are right.

    Args:
        profile: of `LMMResults.profile`.
        parameter: its name; the first if left out.
        ax: the Axes to draw on.

    Examples:
        >>> axes = jaxreml.plots.profile_zeta(fit.profile("sigma"))
    """
    name = _parameter(profile, parameter)
    frame = profile_zeta_data(profile, name)
    ax = new_axes(ax)
    ends = frame["zeta"].iloc[[0, -1]]
    values = np.linspace(frame["value"].iloc[0], frame["value"].iloc[-1], 200)
    at = _interpolated(frame["zeta"], frame["value"])
    for level in LEVELS:
        for zeta in ndtri([(1 - level) / 2, (1 + level) / 2]):
            ax.axhline(zeta, color="0.9", linewidth=0.8, zorder=0)
            ax.text(
                1.01, zeta, f"{level:.0%}", transform=ax.get_yaxis_transform(), fontsize=8,
                color="0.35", va="center",
            )  # fmt: skip
            if ends.iloc[0] - EDGE <= zeta <= ends.iloc[1] + EDGE:
                ax.vlines(float(at(zeta)), 0, zeta, color=GREY, linewidth=0.8)
    ax.axhline(0, color="0.6", linewidth=0.8)
    wald = {"color": VERMILLION, "linewidth": 1.2, "linestyle": "--"}
    ax.plot(frame["value"], frame["wald"], label="Wald: tangent at the estimate", **wald)
    ax.plot(values, _interpolated(frame["value"], frame["zeta"])(values), color=BLUE,
            linewidth=1.8, label="profile")  # fmt: skip
    ax.scatter(frame["value"], frame["zeta"], s=10, color=BLUE, linewidths=0)
    ax.set(xlabel=name, ylabel=r"$\zeta$, signed root of the deviance")
    limit = 1.08 * ndtri((1 + max(LEVELS)) / 2)
    ax.set_ylim(-limit, limit)
    legend_above(ax)
    return ax


def profile_contour_data(
    profile: Profile, first: str, second: str, conf_levels: tuple[float, ...] = CONTOURS
) -> pd.DataFrame:
    """The edges of joint likelihood regions of two parameters: `Profile.contour`.

    Examples:
        >>> profile = fit.profile(["(Intercept)", "Days"])
        >>> edges = jaxreml.plots.profile_contour_data(profile, "(Intercept)", "Days", (0.95,))
        >>> list(edges.columns)
        ['conf_level', '(Intercept)', 'Days', 'deviance']
    """
    return profile.contour(first, second, conf_levels)


def profile_contour(
    profile: Profile,
    first: str,
    second: str,
    conf_levels: tuple[float, ...] = CONTOURS,
    *,
    ax: Any = None,
) -> Any:
    """Joint likelihood regions of two parameters, with the traces of their profiles: where the
    profile of one has the other. See `Profile.contour`.

    The edges are drawn as smooth curves through the points of `profile_contour_data`, with the
    corners that they have where a parameter is at its bound.

    Examples:
        >>> profile = fit.profile(["(Intercept)", "Days"])
        >>> axes = jaxreml.plots.profile_contour(profile, "(Intercept)", "Days", (0.5, 0.95))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('(Intercept)', 'Days')
    """
    frame = profile_contour_data(profile, first, second, conf_levels)
    ax = new_axes(ax)
    whole = profile.frame
    for name, style in ((first, "--"), (second, ":")):
        trace = whole[whole["parameter"] == name]
        ax.plot(trace[first], trace[second], color=GREY, linewidth=1, linestyle=style,
                label=f"profile of {name}")  # fmt: skip
    for k, level in enumerate(sorted(conf_levels)):
        part: Any = frame[frame["conf_level"] == level]
        edge = _edge(part[[first, second]].to_numpy(), part["deviance"].to_numpy(), level)
        ax.plot(*edge.T, color=BLUE, linewidth=1.4, alpha=1 - 0.6 * k / len(conf_levels))
        top = part.loc[part[second].idxmax()]
        ax.annotate(
            f"{level:.0%}", (top[first], top[second]), fontsize=8, ha="center", va="center",
            color="0.25", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    centre = whole.loc[whole.loc[whole["parameter"] == first, "zeta"].abs().idxmin()]
    ax.plot(centre[first], centre[second], "+", color="black", markersize=8)
    ax.set(xlabel=first, ylabel=second)
    legend_above(ax)
    return ax


def _edge(points: np.ndarray, deviance: np.ndarray, level: float) -> np.ndarray:
    """A closed edge with more points between: cubic splines where it is smooth, straight along the
    bounds of parameters, where the deviance is smaller than on the edge of the region."""
    free = deviance > chdtri(2, 1 - level) * (1 - EDGE)
    if free.all():
        return _spline(points, periodic=True)
    if not free.any():
        return points
    points, free = points[:-1], free[:-1]
    turn = int(np.argmin(free))  # begin where it is on a bound or not found
    points, free = np.roll(points, -turn, axis=0), np.roll(free, -turn)
    points, free = np.append(points, points[:1], axis=0), np.append(free, free[:1])
    parts = []
    for run in np.split(np.arange(len(free)), np.flatnonzero(np.diff(free)) + 1):
        smooth = free[run[0]] and len(run) > 3
        parts.append(_spline(points[run]) if smooth else points[run])
    return np.concatenate(parts)


def _spline(points: np.ndarray, periodic: bool = False) -> np.ndarray:
    """A curve through points in turn, by the lengths of the straight lines between them over the
    extent of each coordinate."""
    from scipy.interpolate import CubicSpline  # takes half a second to import

    steps = np.linalg.norm(np.diff(points, axis=0) / np.ptp(points, axis=0), axis=1)
    along = np.append(0.0, np.cumsum(steps))
    if periodic:
        points = np.append(points[:-1], points[:1], axis=0)
    curve = CubicSpline(along, points, bc_type="periodic" if periodic else "not-a-knot")
    return curve(
        np.interp(np.arange(0, len(along) - 1 + 1e-9, 1 / BETWEEN), range(len(along)), along)
    )


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
