"""Plots of residuals, and the panel of them that `LMMResults.plot` draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.rows.diagnostics import residuals
from jaxreml.results.plots.canvas import (
    BLUE,
    FAINT,
    VERMILLION,
    new_axes,
    panels,
    point_style,
    smooth,
)
from jaxreml.results.plots.random_effects import qq_modes, quantiles


def residuals_fitted_data(fit: FittedModel) -> pd.DataFrame:
    """Columns fitted and scaled_residual, (y - fitted) sqrt(weight) / sigma; a row per row used.

    Examples:
        >>> jaxreml.plots.residuals_fitted_data(fit).round(2).head(2)
           fitted  scaled_residual
        0  253.66            -0.16
        1  273.33            -0.57
    """
    scaled = residuals(fit, "scaled").to_numpy()
    return pd.DataFrame({"fitted": fit.fittedvalues, "scaled_residual": scaled}, fit.table.index)


def residuals_fitted(fit: FittedModel, *, ax: Any = None) -> Any:
    """Scaled residuals against fitted values, with a smoother: it is level where the model's mean
    is right.

    Examples:
        >>> axes = jaxreml.plots.residuals_fitted(fit)
    """
    frame = residuals_fitted_data(fit)
    ax = new_axes(ax)
    _cloud(ax, frame["fitted"], frame["scaled_residual"])
    ax.axhline(0, **FAINT)
    ax.set(xlabel="fitted value", ylabel="scaled residual")
    return ax


def scale_location_data(fit: FittedModel) -> pd.DataFrame:
    """Columns fitted and root_abs_residual, the root of absolute scaled residuals; a row per row
    used.

    Examples:
        >>> jaxreml.plots.scale_location_data(fit).round(2).head(2)
           fitted  root_abs_residual
        0  253.66               0.40
        1  273.33               0.76
    """
    frame = residuals_fitted_data(fit)
    root = np.sqrt(np.abs(frame.pop("scaled_residual")))
    return frame.assign(root_abs_residual=root)


def scale_location(fit: FittedModel, *, ax: Any = None) -> Any:
    """Square roots of absolute scaled residuals against fitted values, with a smoother: it is level
    where the residual variance is the same for all.

    Examples:
        >>> axes = jaxreml.plots.scale_location(fit)
    """
    frame = scale_location_data(fit)
    ax = new_axes(ax)
    _cloud(ax, frame["fitted"], frame["root_abs_residual"])
    ax.set(xlabel="fitted value", ylabel=r"$\sqrt{|\mathrm{scaled\ residual}|}$")
    ax.set_ylim(bottom=0)
    return ax


def qq_residuals_data(fit: FittedModel) -> pd.DataFrame:
    """Columns quantile (normal) and scaled_residual, in order.

    Examples:
        >>> jaxreml.plots.qq_residuals_data(fit).round(2).head(2)
            quantile  scaled_residual
        7      -2.77            -3.95
        59     -2.39            -3.84
    """
    return quantiles(residuals(fit, "scaled"), "scaled_residual")


def qq_residuals(fit: FittedModel, *, ax: Any = None) -> Any:
    """Normal quantile plot of the scaled residuals, with the line they should follow.

    Examples:
        >>> axes = jaxreml.plots.qq_residuals(fit)
    """
    frame = qq_residuals_data(fit)
    ax = new_axes(ax)
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
    ax.scatter(frame["quantile"], frame["scaled_residual"], color=BLUE, **point_style(len(frame)))
    ax.set(xlabel="normal quantile", ylabel="scaled residual")
    return ax


def diagnostics(
    fit: FittedModel, group: str | None = None, effect: str | None = None, *, ax: Any = None
) -> Any:
    """The residual plots in one figure; `LMMResults.plot` is this function.

    Residuals against fitted values (is the mean right?), their absolute values likewise (is the
    variance the same for all?), and normal quantile plots of the residuals and of the conditional
    modes of a random effect.

    Args:
        fit: the fit.
        group, effect: whose modes, as for `qq_modes`.
        ax: four Axes to draw on.

    Returns:
        An array of the four Axes: residuals_fitted, scale_location, qq_residuals, qq_modes; the
        last is hidden where the fit has no random effects.

    Examples:
        >>> axes = fit.plot(effect="Days")
        >>> [own.get_ylabel() for own in axes[[0, 3]]]
        ['scaled residual', 'Days of Subject']
    """
    axes = panels(ax, 4, columns=2, width=8.0, height=6.5)
    residuals_fitted(fit, ax=axes[0])
    scale_location(fit, ax=axes[1])
    qq_residuals(fit, ax=axes[2])
    if fit.groupings:
        qq_modes(fit, group, effect, ax=axes[3])
    else:
        axes[3].set_visible(False)
    return axes


def _cloud(ax: Any, x: Any, y: Any) -> None:
    """Points and a smoother through them."""
    ax.scatter(x, y, color=BLUE, **point_style(len(x)))
    ax.plot(*smooth(x, y), color=VERMILLION, linewidth=1.8)
