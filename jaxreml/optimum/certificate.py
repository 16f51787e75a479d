"""The certificate of an optimum: one rule for single fits, lanes and optima with parameters held.

Criterion and gradient are computed again by a program of its own, compiled apart from the search:
XLA has miscompiled searches silently.
"""

from __future__ import annotations

from typing import Any

GRADIENT = 1e-6  # This much of a gradient, per unit of the criterion, can be left by rounding.
CRITERION = 1e-9  # The two programs' criteria may differ by this, per unit of the criterion.


def is_certified(value: Any, again: Any, gradient_norm: Any) -> Any:
    """Whether what a search found is an optimum.

    Args:
        value: its criterion, a number or an array of NumPy's or JAX's.
        again: the criterion by the other program.
        gradient_norm: of the gradient by the other program.
    """
    scale = 1 + abs(again)
    return (abs(again - value) <= CRITERION * scale) & (gradient_norm <= GRADIENT * scale)
