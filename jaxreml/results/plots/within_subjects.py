"""Plots of the residuals' covariance within subjects: its correlations, and how they die away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.rows.diagnostics import residuals
from jaxreml.results.plots.canvas import (
    BLUE,
    FAINT,
    GREEN,
    VERMILLION,
    WIDTH,
    legend_above,
    one_or_all,
    panels,
)

MOST_VISITS = 60  # of a matrix that is drawn
MOST_PAIRS = 10**6  # of rows of one subject, beyond which some are taken at random
BINS = 15  # of distances that are all different
SMALL = 8  # visits of matrices that go side by side
DARK = 0.68  # correlations whose colour needs white numbers
CELL = 0.55  # inches that a number of two decimals needs; shorter ones need less
SMALLEST = 4.5  # points, of numbers that can be read


def correlation_data(fit: FittedModel) -> pd.DataFrame:
    """Columns arm ("" where all share one covariance), visit1, visit2 and correlation; a row for
    each pair of visits, the later first.

    Raises:
        DataError: residuals are independent, or have too many different visits to be drawn.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> visits = jaxreml.fit("distance ~ age", children, residual="us(age | Subject)")
        >>> jaxreml.plots.correlation_data(visits).round(2).head(2)
          arm  visit1  visit2  correlation
        0        10.0     8.0         0.63
        1        12.0     8.0         0.71
    """
    own = fit.residual
    if own is None:
        raise DataError("the residuals are independent: there are no correlations to draw")
    labels, count = list(own.visits), len(own.visits)
    if count > MOST_VISITS:
        raise DataError(
            f"a matrix of {count} visits is too large to be drawn; `semivariogram` shows how "
            "correlations depend on the distance"
        )
    matrix = fit.residual_corr.to_numpy()
    columns, rows = np.triu_indices(count, 1)
    parts = []
    for k, arm in enumerate(own.arms or ("",)):
        values = matrix[k * count + rows, k * count + columns]
        first, second = ([labels[place] for place in places] for places in (rows, columns))
        parts.append(
            pd.DataFrame({"arm": arm, "visit1": first, "visit2": second, "correlation": values})
        )
    return pd.concat(parts, ignore_index=True)


def correlation(fit: FittedModel, *, ax: Any = None) -> Any:
    """The correlation matrix of the residuals of a subject's visits, as a map with its numbers.

    Args:
        fit: the fit, with ``residual=``.
        ax: Axes to draw on: as many as there are arms with a covariance of their own.

    Raises:
        DataError: as `correlation_data`.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> visits = jaxreml.fit("distance ~ age", children, residual="us(age | Subject)")
        >>> axes = jaxreml.plots.correlation(visits)
    """
    frame = correlation_data(fit)
    own = fit.residual
    assert own is not None
    arms, count = own.arms or ("",), len(own.visits)
    labels = [f"{visit:g}" if isinstance(visit, float) else str(visit) for visit in own.visits]
    columns = min(len(arms), 2 if count <= SMALL else 1)
    side = WIDTH / 2 if columns == 2 else min(WIDTH, 1.6 + 0.75 * count, 5.5 + len(arms) % 2)
    rows = -(-len(arms) // columns)
    size = {"width": side * columns + 0.7, "height": side * 0.92 * rows}
    axes = panels(ax, len(arms), columns=columns, **size)
    image = None
    for axis, arm in zip(axes, arms, strict=True):
        matrix = np.full((count, count), np.nan)
        values = frame.loc[frame["arm"] == arm, "correlation"].to_numpy()
        matrix.T[np.triu_indices(count, 1)] = values
        shown = matrix[1:, :-1]
        image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1)
        _label_cells(axis, shown, count - 1)
        slanting = max(map(len, labels)) * count > 45
        axis.set_xticks(range(count - 1), labels[:-1], rotation=90 if slanting else 0)
        axis.set_yticks(range(count - 1), labels[1:])
        axis.tick_params(length=0, labelsize=8 if count > 8 else None)
        axis.spines[:].set_visible(False)
        axis.set(xlabel=own.words.visit, ylabel=own.words.visit)
        if arm != "":
            axis.set_title(f"{own.words.arm} {arm}", fontsize=10)
    if ax is None:
        bar = axes[0].figure.colorbar(image, ax=list(axes), shrink=0.6, aspect=25, pad=0.02)
        bar.set_label("correlation")
        bar.outline.set_visible(False)
    return one_or_all(axes)


def _label_cells(axis: Any, matrix: np.ndarray, count: int) -> None:
    """Numbers in the cells, as large as fit into them; none where they would be unreadable."""
    box = axis.get_window_extent()
    inches = min(box.width, box.height) / axis.figure.dpi / count
    size = min(10.0, 10.0 * inches / CELL * 1.25)
    if size < SMALLEST:
        return
    for i, j in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
        value = matrix[i, j]
        text = f"{value:.2f}" if size > 7 else f"{value:.2f}".replace("0.", ".", 1)
        colour = "white" if abs(value) > DARK else "black"
        axis.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)


def semivariogram_data(fit: FittedModel) -> pd.DataFrame:
    """Half the mean squared differences of the residuals of two visits of a subject.

    Residuals are scaled by their standard deviations, so that under the model the mean is one less
    their correlation, but for what estimating the fixed effects takes.

    Returns:
        Columns arm ("" where all share one covariance), distance (in time, or in the order of the
        visits), pairs (their number), semivariance, fitted (one less the correlations of the model,
        averaged over the same pairs) and normalized (of residuals that the model makes
        uncorrelated: about 1 at all distances). Many different distances are put together.

    Raises:
        DataError: residuals are independent.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> visits = jaxreml.fit("distance ~ age", children, residual="ar1(age | Subject)")
        >>> jaxreml.plots.semivariogram_data(visits).drop(columns="arm").round(2)
           distance  pairs  semivariance  fitted  normalized
        0       2.0     81          0.30    0.30        1.26
        1       4.0     54          0.27    0.51        0.53
        2       6.0     27          0.40    0.66        0.71
    """
    own, rows = fit.residual, fit.frame.residual
    if own is None or rows is None or own.words.subject is None:
        raise DataError("the residuals are independent: there is no semivariogram to draw")
    at = _places_in_time(fit)
    order = np.lexsort((at, rows.codes))
    first, second = _pairs(rows.codes[order])
    first, second = order[first], order[second]
    squares = {
        name: (value[first] - value[second]) ** 2 / 2
        for name, value in (
            ("semivariance", residuals(fit, "scaled").to_numpy()),
            ("normalized", residuals(fit, "normalized").to_numpy()),
        )
    }
    distance = np.abs(at[second] - at[first])
    pairs = pd.DataFrame(
        {
            "arm": rows.places[first] // len(own.visits) if own.arms else 0,
            "distance": distance,
            "semivariance": squares["semivariance"],
            "fitted": 1 - _correlations(fit, rows.places[first], rows.places[second], distance),
            "normalized": squares["normalized"],
        }
    )
    values = np.unique(distance)
    if len(values) > BINS:
        edges = np.unique(np.quantile(distance, np.linspace(0, 1, BINS + 1)))
        pairs["bin"] = np.clip(np.searchsorted(edges, distance, "right"), 1, len(edges) - 1)
    else:
        pairs["bin"] = distance
    found: pd.DataFrame = pairs.groupby(["arm", "bin"]).mean()  # pyright: ignore
    found.insert(1, "pairs", pairs.groupby(["arm", "bin"]).size())
    found = found.reset_index().drop(columns="bin")
    arms = own.arms or ("",)
    return found.assign(arm=[arms[int(k)] for k in found["arm"]])


def _places_in_time(fit: FittedModel) -> np.ndarray:
    """(n,), times of the rows where visits are numbers, else their order."""
    own, rows = fit.residual, fit.frame.residual
    assert own is not None and rows is not None
    visits = rows.places % len(own.visits)
    numbers = pd.Series(list(own.visits))
    if pd.api.types.is_numeric_dtype(numbers) and not pd.api.types.is_bool_dtype(numbers):
        return numbers.to_numpy(float)[visits]
    return visits.astype(float)


def _pairs(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of rows with the same of sorted codes, or `MOST_PAIRS` of them at random."""
    count = np.bincount(codes)
    parts = []
    for lag in range(1, int(count.max())):
        start = np.flatnonzero(codes[lag:] == codes[:-lag])
        parts.append(np.stack([start, start + lag]))
    first, second = np.concatenate([*parts, np.zeros((2, 0), int)], axis=1)
    if len(first) > MOST_PAIRS:
        some = np.random.default_rng(0).choice(len(first), MOST_PAIRS, replace=False)
        first, second = first[some], second[some]
    return first, second


def _correlations(
    fit: FittedModel, first: np.ndarray, second: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    """Of the model, of pairs of visits."""
    own = fit.residual
    assert own is not None
    if own.seen.size:
        return fit.residual_corr.to_numpy()[first, second]
    values, places = np.unique(distance, return_inverse=True)
    (z,) = fit.covariance.own_parameters(fit.parameters)[-1][1][-1:]
    block: Any = own.block
    return block.relative(z, np.zeros(1), values)[0][places]


def semivariogram(fit: FittedModel, *, ax: Any = None) -> Any:
    """Half the mean squared differences of residuals of a subject, by their distance in time or in
    the order of visits, with those of the fitted covariance.

    Filled points are of scaled residuals: they should follow the line. Hollow ones are of residuals
    that the fitted covariance makes uncorrelated: they should be near 1 at all distances. Large
    points are of many pairs.

    Args:
        fit: the fit, with ``residual=``.
        ax: Axes to draw on: as many as there are arms with a covariance of their own.

    Raises:
        DataError: residuals are independent.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> visits = jaxreml.fit("distance ~ age", children, residual="us(age | Subject)")
        >>> axes = jaxreml.plots.semivariogram(visits)
    """
    frame = semivariogram_data(fit)
    own = fit.residual
    assert own is not None
    arms = own.arms or ("",)
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    height = 4.0 if len(arms) == 1 else 3.2 * rows
    axes = panels(ax, len(arms), columns=columns, height=height, sharey=True)
    in_time = bool((frame["distance"] % 1).any()) or pd.api.types.is_numeric_dtype(
        pd.Series(list(own.visits))
    )
    top = 1.15 * max(1.0, frame[["semivariance", "fitted", "normalized"]].max().max())
    for axis, arm in zip(axes, arms, strict=True):
        part = frame[frame["arm"] == arm]
        size = 12 + 60 * np.sqrt(part["pairs"] / part["pairs"].max())
        axis.axhline(1, **FAINT)
        axis.plot(part["distance"], part["fitted"], color=VERMILLION, linewidth=1.8, label="fitted")
        axis.scatter(
            part["distance"], part["semivariance"], size, color=BLUE, label="scaled residuals",
            zorder=3,
        )  # fmt: skip
        axis.scatter(
            part["distance"], part["normalized"], size, facecolors="none", edgecolors=GREEN,
            linewidths=1.2, label="normalized residuals", zorder=2,
        )  # fmt: skip
        axis.set(xlabel="distance in " + own.words.visit if in_time else "visits apart")
        axis.set_ylim(0, top)
        axis.set_xlim(0, 1.06 * frame["distance"].max())
        distances = np.asarray(part["distance"])
        if len(distances) <= 10 and np.allclose(distances, distances.round()):
            axis.set_xticks(distances)
        elif not in_time:
            axis.xaxis.get_major_locator().set_params(integer=True)
        if arm != "":
            axis.set_title(f"{own.words.arm} {arm}", fontsize=10, loc="left")
    axes[0].set_ylabel("semivariance")
    if ax is None and len(axes) > 1:
        options = {"loc": "outside upper right", "ncols": 3, "frameon": False, "fontsize": 9}
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), **options)
    else:
        legend_above(axes[0])
    return one_or_all(axes)
