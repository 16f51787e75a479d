"""The certificate of an optimum: one rule for single fits, lanes and optima with parameters held.

Criterion and gradient are computed again by another route. On JAX it is a program of its own,
compiled apart from the search, as XLA has miscompiled searches silently; on NumPy the gradient is
by differences of values alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

GRADIENT = 1e-6  # This much of a gradient, per unit of the criterion, can be left by rounding.
CRITERION = 1e-9  # The two programs' criteria may differ by this, per unit of the criterion.
STEP = 0.02  # Of differences, in units of a direction.


def is_certified(value: Any, again: Any, gradient_norm: Any) -> Any:
    """Whether what a search found is an optimum.

    Args:
        value: its criterion, a number or an array of NumPy's or JAX's.
        again: the criterion by the other program.
        gradient_norm: of the gradient by the other program.
    """
    scale = 1 + abs(again)
    return (abs(again - value) <= CRITERION * scale) & (gradient_norm <= GRADIENT * scale)


def slopes_by_differences(
    value: Callable[[np.ndarray], float], at: np.ndarray, directions: np.ndarray, near: float
) -> tuple[float, np.ndarray]:
    """Value of a function at a point, and slopes along (k, m) directions from four values each.

    Two of them are `near`. They show the direction's own unit, in which the function rises by half:
    the other two are STEP of it away, but twice as far as the first at least. The error of the
    slope is of the fourth order in these distances. Rounding leaves in it what it leaves of the
    function, over `near` at most.
    """
    here = value(at)
    slopes = []
    for way in directions:
        above, below = value(at + near * way), value(at - near * way)
        curving = (above + below - 2 * here) / near**2
        far = max(STEP / np.sqrt(max(curving, 1.0)), 2 * near)
        by_far = (value(at + far * way) - value(at - far * way)) / far
        by_near = (above - below) / near
        slopes.append((far**2 * by_near - near**2 * by_far) / (far**2 - near**2) / 2)
    return here, np.array(slopes)
