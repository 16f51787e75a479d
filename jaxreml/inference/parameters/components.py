"""The arguments of a user's function g(beta, components) of a fit.

`beta` is the vector of the fixed effects, (p,), in the order of `LMMResults.fixed_names`.
`components` maps the name of each grouping factor to the covariance matrix of its random effects,
(q, q), all its terms in one block-diagonal matrix in the order of `LMMResults.cov_re`, and
"Residual" to the residual variance, a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import jax, jnp, when_imported
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Covariance
from jaxreml.model.covariance.unstructured import unstructured

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

Components = dict[str, Any]
Function = Callable[[Array, Components], Array]
Groups = tuple[tuple[str, int], ...]  # per term the grouping factor and the number of effects


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

    groups = fit.term_sizes

    def at(beta: Array, theta: Array, sigma: Array) -> Any:
        return g(beta, of_theta(theta, sigma, groups))

    with neutral():
        arrays = [jnp.asarray(part) for part in (fit.beta, fit.theta, fit.sigma)]
        error, _ = checkify.checkify(at, errors=checkify.index_checks)(*arrays)
        message = error.get()
    if message:
        raise DataError(
            f"the function asks for an entry that beta or components does not have: {message}"
        )


def covariance_of(groups: Groups) -> Covariance:
    """That of terms on these factors."""
    return unstructured(tuple(q for _, q in groups))


def of_theta(theta: Array, sigma: Array, groups: Groups) -> Components:
    """Components at relative Cholesky factors (m, ...) and residual standard deviations."""
    factors = natural.split_triangles(theta, covariance_of(groups).sizes)
    squares = [linalg.matmul(factor, linalg.transpose(factor)) for factor in factors]
    return _named([sigma**2 * square for square in squares], sigma**2, groups)


def of_parameters(parameters: Array, groups: Groups) -> Components:
    """Components at `Estimate.parameters` (m + 1,), which `inside` has made finite."""
    covariance = covariance_of(groups)
    omega, log_sigma2 = covariance.natural(parameters)
    sigma2 = namespace(parameters).exp(log_sigma2)
    matrices = natural.symmetric_matrices(omega, covariance.sizes)
    return _named([sigma2 * matrix for matrix in matrices], sigma2, groups)


def inside(parameters: Array, groups: Groups) -> Array:
    """Finite numbers for `parameters` on the boundary, where nothing changes with them."""
    return covariance_of(groups).finite(parameters)


def finite(fit: FittedModel) -> np.ndarray:
    """The parameters (m + 1,) of a fit as `inside` makes them."""
    return inside(fit.parameters, fit.term_sizes)


def _named(matrices: list[Array], sigma2: Array, groups: Groups) -> Components:
    of_factor: dict[str, list[Array]] = {}
    for (name, _), matrix in zip(groups, matrices, strict=True):
        of_factor.setdefault(name, []).append(matrix)
    named = {name: linalg.block_diagonal(parts) for name, parts in of_factor.items()}
    return _Named({**named, RESIDUAL: sigma2})
