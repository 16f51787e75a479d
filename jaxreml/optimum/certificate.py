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
NEAR = 1e-3  # A distance that shows how fast the criterion rises in a coordinate.
STEP = 0.02  # Of differences, in units of a coordinate.


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
    value: Callable[[np.ndarray], float],
    at: np.ndarray,
    directions: np.ndarray,
    rises: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Value of a function at a point, and slopes along (k, m) directions from four values each.

    Their error is of the fourth order in the step, STEP in the direction's own unit: where the
    function has risen by STEP squared over two. Rounding leaves of a slope, in that unit, what it
    leaves of the function over STEP.

    Args:
        value: the function.
        at: (m,).
        directions: (k, m).
        rises: (k,), second derivatives along them; from two more values each if left out.
    """
    here = value(at)
    slopes = []
    for k, way in enumerate(directions):
        if rises is None:
            rise = (value(at + NEAR * way) + value(at - NEAR * way) - 2 * here) / NEAR**2
        else:
            rise = rises[k]
        step = STEP / np.sqrt(max(rise, 1.0))
        near, far = (value(at + k * step * way) - value(at - k * step * way) for k in (1, 2))
        slopes.append((8 * near - far) / (12 * step))
    return here, np.array(slopes)
