"""Groups of rows within groups: what nesting is."""

from __future__ import annotations

import numpy as np


def parents(outer: np.ndarray, inner: np.ndarray, count: int) -> np.ndarray:
    """The group of `outer` that the first row of each group of `inner` is in, (count,).

    Args:
        outer, inner: (n,), codes of the groups.
        count: of groups of `inner`; 0 for those without rows.
    """
    found = np.zeros(count, outer.dtype)
    found[inner[::-1]] = outer[::-1]  # the first row is put there last
    return found


def crossing(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Which rows are in another group of `outer` than the first row of their group of `inner`,
    (n,) booleans."""
    return parents(outer, inner, int(inner.max(initial=-1)) + 1)[inner] != outer


def contains(outer: np.ndarray, inner: np.ndarray) -> bool:
    """Whether every group of `inner` lies in one group of `outer`."""
    return not crossing(outer, inner).any()
