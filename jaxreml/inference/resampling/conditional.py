"""Fixed and random effects drawn from the normal distribution that they have given the response and
the variance parameters: exactly, in JAX.

With b0 and errors drawn from the model, y0 = Z b0 + errors: the estimates of (beta, b) from y - y0,
plus (0, b0), have the joint distribution of (beta, b) given y, beta with a flat prior (conditioning
by kriging; Matheron).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxreml.backend.lazy import jax, jnp
from jaxreml.model import linalg
from jaxreml.model.arrays import Effects, kernel_root
from jaxreml.model.basis import Basis, solve
from jaxreml.model.design import Design
from jaxreml.optimum.effects import effects_at, unexplained

Array = Any  # JAX's


def fixed_effects(key: Array, omega: Array, sigma: Array, design: Design) -> Array:
    """Fixed effects alone, (p,): from cross-products, whatever the number of rows.

    Args:
        key: of JAX's random numbers.
        omega: (m,), relative covariances inside the design.
        sigma: (), residual standard deviation.
        design: the data.
    """
    p = design.p
    gram = design.structure.marginal(omega).gram
    root = linalg.cholesky(gram[:p, :p])
    standard = jax.random.normal(key, (p, 1), gram.dtype)
    spread = sigma * linalg.solve_lower(root, standard, transposed=True)
    return design.beta_ols + solve(design.basis, spread - unexplained(gram, p)[:p])[:, 0]


def simulated(
    key: Array, terms: Sequence[Effects], factors: Sequence[Array], sigma: Array, roots: Any
) -> tuple[tuple[Array, ...], Array]:
    """Random effects per term, (levels, q), and Z b + errors, (n,), from the model.

    Args:
        key: of JAX's random numbers.
        terms: the random terms; one of residuals' covariances takes the place of the errors.
        factors: per term a root (q, q) of the covariance of a level's effects; of residuals that of
            a subject's visits.
        sigma: (), residual standard deviation.
        roots: (n,), square roots of the prior weights; None if all are 1.
    """
    keys = jax.random.split(key, len(terms) + 1)
    effects: list[Array] = []
    total, errors = 0.0, None
    for own, term, factor in zip(keys, terms, factors, strict=False):
        standard = jax.random.normal(own, (term.n_levels, len(factor)), factor.dtype)
        drawn = standard @ factor.T
        if term.kernel is not None:
            drawn = kernel_root(term.kernel) @ drawn
        rows = jnp.sum(term.columns * drawn[term.codes], axis=1)
        if term.covariance.residual:
            errors = rows
        else:
            effects.append(drawn)
            total = total + rows
    if errors is None:
        errors = sigma * jax.random.normal(keys[-1], (len(terms[0].codes),), factors[0].dtype)
    if roots is not None:  # zero in rows left out
        errors = jnp.where(roots > 0, errors / jnp.where(roots > 0, roots, 1), 0)
    return tuple(effects), total + errors


def all_effects(
    key: Array,
    omega: Array,
    factors: Sequence[Array],
    sigma: Array,
    y: Array,
    basis: Basis,
    terms: Sequence[Effects],
) -> tuple[Array, tuple[Array, ...]]:
    """Fixed effects (p,), and random effects (levels, q) of every term that has some.

    Args:
        key: of JAX's random numbers.
        omega: (m,), relative covariances inside the design.
        factors, sigma, terms: as for `simulated`.
        y: (n,), the response.
        basis: of the terms.
    """
    drawn, errors = simulated(key, terms, factors, sigma, basis.roots)
    beta, modes = effects_at(omega, Design.of(basis, basis.response(y - errors)))
    return beta, tuple(mode + own for mode, own in zip(modes, drawn, strict=False))
