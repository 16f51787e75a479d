"""Known covariances of levels that are traced by JAX, which nothing can be refused of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreml.backend.arrays import still
from jaxreml.backend.lazy import jnp
from jaxreml.kernels.known import tolerance
from jaxreml.model import linalg
from jaxreml.model.arrays import Effects, finite, is_traced

Array = Any  # JAX's


def symmetric(terms: Sequence[Effects]) -> tuple[list[Effects], Any, Any]:
    """Terms with their traced kernels made finite and symmetric to the last digit; whether an entry
    of one was not finite; and whether one is no covariance.

    With symmetric kernels derivatives are those along symmetric changes, whichever triangle is
    read.
    """
    found: list[Effects] = []
    infinite: Any = np.zeros((), bool)
    strange: Any = np.zeros((), bool)
    for own in terms:
        if is_traced(own.kernel):
            (kernel,), bad = finite([own.kernel])
            infinite, strange = infinite | bad, strange | ~_is_covariance(still(kernel))
            own = own._replace(kernel=(kernel + kernel.T) / 2)
        found.append(own)
    return found, infinite, strange


def _is_covariance(kernel: Array) -> Array:
    """(), whether (L, L) is symmetric and positive semidefinite, as `require_covariance` has it."""
    share = tolerance(kernel.dtype)
    size = jnp.max(linalg.diagonal(kernel), initial=0.0)
    off = jnp.max(jnp.abs(kernel - kernel.T), initial=0.0)
    factor = linalg.cholesky(kernel + share * size * jnp.eye(len(kernel), dtype=kernel.dtype))
    largest = jnp.max(jnp.abs(kernel), initial=0.0)
    return (size > 0) & (off <= share * largest) & jnp.isfinite(factor).all()
