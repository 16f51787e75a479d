"""What all plots share: colours, axes, panels, points, legends, labels and a smoother.

The colours are those of Okabe and Ito (2008, Color Universal Design), which readers with any of the
usual forms of colour blindness can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreml.errors import DataError

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#000000", YELLOW)
GREY = "0.55"

FAINT = {"color": "0.6", "linewidth": 0.8, "linestyle": ":"}
WIDTH = 6.5  # of a figure, inches
TICK = 0.15  # inches that a label of a level needs
SLANTING = 0.2  # inches that a slanting one needs
LETTERS = 10  # per inch
FULL = 25  # levels whose figure grows by a line for each
TALLEST = 8.0
SPAN = 2 / 3  # of the points, that a smoother looks at
PLACES = 60  # at which a smoother is computed


def new_axes(ax: Any, height: float = 4.5) -> Any:
    """`ax`, or the axes of a new figure."""
    return panels(ax, 1, height=height)[0]


def panels(
    ax: Any,
    count: int,
    *,
    columns: int | None = None,
    width: float = WIDTH,
    height: float = 4.5,
    **options: Any,
) -> np.ndarray:
    """Axes for so many panels: those given, or those of a new figure.

    Args:
        ax: None, an Axes, or as many Axes as there are panels.
        count: of panels.
        columns: of panels side by side; all if None.
        width, height: of a new figure, inches.
        options: of ``plt.subplots``, sharex and others.

    Raises:
        DataError: matplotlib is not installed.
        ValueError: another number of Axes.
    """
    if ax is not None:
        given = np.array(ax, object).ravel()
        if len(given) != count:
            raise ValueError(f"there are {count} panels: ax must be {count} Axes, not {len(given)}")
        return given
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise DataError("plots need matplotlib: pip install 'jaxreml[plots]'") from None
    columns = columns or count
    figure, axes = plt.subplots(
        math.ceil(count / columns),
        columns,
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        **options,
    )
    for unused in axes.ravel()[count:]:
        figure.delaxes(unused)
    for own in axes.ravel()[:count]:
        own.spines[["top", "right"]].set_visible(False)
    return axes.ravel()[:count]


def one_or_all(axes: np.ndarray) -> Any:
    """What a plot returns: its Axes, or an array of them if there are several panels."""
    return axes[0] if len(axes) == 1 else axes


def levels_height(count: int) -> float:
    """Height of a figure with a line for each of so many levels."""
    return float(np.clip(0.22 * min(count, FULL) + 0.11 * max(count - FULL, 0) + 1.0, 1.8, TALLEST))


def label_levels(ax: Any, labels: Sequence[Any]) -> None:
    """Names of levels on the vertical axis: of all, or of as many as there is room for, the first
    and the last among them."""
    count = len(labels)
    inches = ax.get_window_extent().height / ax.figure.dpi
    shown = _thinned(count, int(inches / TICK))
    size = 8 if count > FULL / 2 else None
    ax.set_yticks(shown, [str(labels[k]) for k in shown], fontsize=size)
    ax.set_ylim(-0.7, count - 0.3)
    if count > FULL / 2:
        ax.tick_params("y", length=2)


def label_below(ax: Any, labels: Sequence[str]) -> None:
    """Names of levels on the horizontal axis: upright if there is room, else slanting, and of as
    many as there is room for."""
    count = len(labels)
    inches = ax.get_window_extent().width / ax.figure.dpi
    shown = _thinned(count, int(inches / SLANTING))
    ax.set_xticks(shown, [labels[k] for k in shown])
    ax.set_xlim(-0.6, count - 0.4)
    if max(map(len, labels)) * len(shown) > LETTERS * inches:
        ax.tick_params("x", rotation=35)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _thinned(count: int, room: int) -> list[int]:
    """As many of so many places as there is room for, the first and the last among them."""
    if count <= room:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, max(room, 2)).tolist()})


def point_size(count: int) -> float:
    """Area of the points of a plot that has so many, in square points."""
    return float(np.clip(60000 / max(count, 1), 4, 18))


def point_style(count: int) -> dict[str, Any]:
    """How so many points are drawn: lighter where they lie over each other, and as pixels in vector
    files where they would be a burden."""
    alpha = float(np.clip(60 / math.sqrt(max(count, 1)) * 0.25, 0.08, 0.65))
    return {"s": point_size(count), "alpha": alpha, "linewidths": 0, "rasterized": count > 5000}


def legend_above(ax: Any, columns: int = 3, **options: Any) -> None:
    """A legend above the axes, where it is over no point; in full colour."""
    legend = ax.legend(
        frameon=False, fontsize=9, ncols=columns, loc="lower right", bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2, handletextpad=0.5, columnspacing=1.2, **options,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set(alpha=1, sizes=[24])


def smooth(x: Any, y: Any, places: int = PLACES) -> tuple[np.ndarray, np.ndarray]:
    """Local straight lines through points, with tricube weights of the nearest two thirds.

    That is lowess (Cleveland 1979, JASA 74:829) without its iterations against outliers.

    Returns:
        Values of x in order, and the lines' values there; none where x does not vary.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if not len(x) or np.ptp(x) == 0:
        return np.zeros(0), np.zeros(0)
    at = np.unique(x)
    if len(at) > places:
        at = np.linspace(x.min(), x.max(), places)
    nearest = max(2, int(SPAN * len(x) + 1e-10))
    values = np.empty(len(at))
    for k, place in enumerate(at):
        apart = x - place
        reach = np.partition(np.abs(apart), nearest - 1)[nearest - 1]
        share = np.abs(apart) / reach if reach > 0 else (apart != 0).astype(float)
        weight = np.clip(1 - share**3, 0, None) ** 3
        total = weight.sum()
        middle, level = weight @ apart / total, weight @ y / total
        spread = weight @ (apart - middle) ** 2
        slope = weight @ ((apart - middle) * (y - level)) / spread if spread > 0 else 0.0
        values[k] = level - slope * middle
    return at, values
