"""What a figure shows, as arrays and words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def points(ax, k: int = 0) -> np.ndarray:
    """Places of the k-th collection of points, (n, 2)."""
    return np.asarray(ax.collections[k].get_offsets())


def texts(labels: Iterable) -> list[str]:
    """The words of text objects."""
    return [label.get_text() for label in labels]


def legend(of) -> list[str]:
    """The entries of a legend, or of the one that axes have."""
    return texts((of if hasattr(of, "get_texts") else of.get_legend()).get_texts())
