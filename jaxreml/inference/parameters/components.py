"""The arguments of a user's function g(beta, components) of a fit.

`beta` is the vector of the fixed effects, (p,), in the order of `LMMResults.fixed_names`.
`components` maps the name of each grouping factor to the covariance matrix of its random effects,
(q, q), all its terms in one block-diagonal matrix in the order of `LMMResults.cov_re`, and
"Residual" to the residual variance, a scalar; of a fit with `residual=` to the covariance matrix of
the residuals of a subject, in the order of `LMMResults.residual_cov`, unless subjects have times of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import jax, jnp, when_imported
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL, Layout
from jaxreml.model import linalg
from jaxreml.model.covariance import natural

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

Components = dict[str, Any]
Function = Callable[[Array, Components], Array]


class _Named(dict):
    """Components that say which they are when asked for another."""

    def __missing__(self, key: Any) -> Any:
        known = ", ".join(map(repr, self))
        raise DataError(f"components has no {key!r}; this model's are {known}")


when_imported(
    lambda: jax.tree_util.register_pytree_node(
        _Named,
        lambda named: (tuple(named.values()), tuple(named)),
        lambda keys, values: _Named(zip(keys, values, strict=True)),
    )
)


def require_entries(g: Function, fit: FittedModel) -> None:
    """Raise DataError if g asks for entries that there are none of: JAX would give it others."""
    from jax.experimental import checkify

    layout = fit.layout

    def at(beta: Array, theta: Array, sigma: Array) -> Any:
        return g(beta, of_theta(theta, sigma, layout))

    with neutral():
        arrays = [jnp.asarray(part) for part in (fit.beta, fit.theta, fit.sigma)]
        error, _ = checkify.checkify(at, errors=checkify.index_checks)(*arrays)
        message = error.get()
    if message:
        raise DataError(
            f"the function asks for an entry that beta or components does not have: {message}"
        )


def of_theta(theta: Array, sigma: Array, layout: Layout) -> Components:
    """Components at relative Cholesky factors (m, ...) and residual standard deviations."""
    factors = natural.split_triangles(theta, layout.covariance.sizes)
    squares = [linalg.matmul(factor, linalg.transpose(factor)) for factor in factors]
    return _named([sigma**2 * square for square in squares], sigma**2, layout)


def of_parameters(parameters: Array, layout: Layout) -> Components:
    """Components at `Estimate.parameters` (k + 1,), finite ones."""
    covariance = layout.covariance
    omega, log_sigma2 = covariance.natural(parameters)
    sigma2 = namespace(parameters).exp(log_sigma2)
    matrices = natural.symmetric_matrices(covariance.whole(omega), covariance.sizes)
    return _named([sigma2 * matrix for matrix in matrices], sigma2, layout)


def finite(fit: FittedModel) -> np.ndarray:
    """The parameters (k + 1,) of a fit, with finite numbers for those on the boundary, where
    nothing changes with them."""
    return fit.covariance.finite(fit.parameters)


def _named(matrices: list[Array], sigma2: Array, layout: Layout) -> Components:
    of_factor: dict[str, list[Array]] = {}
    for name, block, matrix in zip(layout.names, layout.covariance.blocks, matrices, strict=True):
        if block.of_matrix:
            of_factor.setdefault(name, []).append(matrix)
    named = {name: linalg.block_diagonal(parts) for name, parts in of_factor.items()}
    named.setdefault(RESIDUAL, sigma2)
    return _Named(named)
