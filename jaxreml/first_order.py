r"""First-order influence: derivatives of the estimates in case weights, for the grouped structure.

With a weight c of each case, 1 for all of them, the criterion f(phi; c) has its optimum at
phi(c), so that d phi / dc = -H^-1 d2 f / dphi dc by the implicit function theorem; leaving the case
out changes phi by about H^-1 d psi / dphi, with psi = df / dc (Beckman, Nachtsheim and Cook 1987,
Technometrics 29:413). For whole levels of the grouping factor, which are independent, c weights
their part of the likelihood; for single rows it multiplies the prior weight, and the row counts c
times:

    level   psi = n log sigma2 + log|V0| + tr(Phi M) + r' V0^-1 r / sigma2   (of that level)
    row     psi = log sigma2 + h + w e^2 / sigma2

with M its part of X' V0^-1 X, r and e the marginal and conditional residuals, h the leverage.
Under ML the parts that come from log|X' V0^-1 X| are absent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import block_diag

from jaxreml import covariance, linalg
from jaxreml.cache import quick_compilation
from jaxreml.designs import Design
from jaxreml.effects import from_basis
from jaxreml.estimation import FAR, LOG_ZERO
from jaxreml.results import LMMResults


def changes(
    fit: LMMResults, codes: np.ndarray, count: int, of_rows: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First-order changes of the coefficients and variance parameters without each group.

    Args:
        fit: a fit of the grouped structure.
        codes: (n,), the groups, whole levels of the grouping factor; ignored for rows.
        count: number of groups.
        of_rows: every row is its own group.

    Returns:
        (count, p) and (count, m + 1); the latter NaN for parameters on the boundary, at which the
        others are given.

    Raises:
        ValueError: another structure, groups that divide levels, or a singular Hessian.
    """
    frame, design = fit.frame, fit.design
    if fit.structure != "grouped":
        raise ValueError(
            f"first-order influence is for the grouped structure, not the {fit.structure} one: "
            'groups of rows are not independent there. Use method="exact"'
        )
    levels = frame.terms[0].codes
    of_level = np.zeros(levels.max() + 1, int)
    if not of_rows:
        of_level[levels] = codes
        if not np.array_equal(of_level[levels], codes):
            raise ValueError(
                f"the groups divide levels of {frame.terms[0].name!r}, whose rows are not "
                "independent; first-order influence is of whole levels or single rows. Use "
                'method="exact"'
            )
    root = np.ones(fit.nobs) if fit.weights is None else np.sqrt(fit.weights)
    X = frame.X * root[:, None]
    y = (frame.y if frame.offset is None else frame.y - frame.offset) * root  # pyright: ignore
    Z = np.concatenate([term.effects for term in frame.terms], axis=1) * root[:, None]
    Z = Z / np.concatenate([np.asarray(scale) for scale in design.scales])
    columns = np.column_stack([from_basis(design, X), y - X @ np.asarray(design.beta_ols)])
    inside = np.isfinite(fit.parameters)
    vcov = fit.parameters_vcov[np.ix_(inside, inside)]
    if np.isnan(vcov).any():
        raise ValueError(
            "first-order influence needs the variance parameters' Hessian, which is singular: "
            f'{fit.message}. Use method="exact"'
        )
    finite = _finite(fit.parameters, design.sizes)
    with jax.enable_x64(True):
        program = _compiled(fit.method == "REML", of_rows, count)
        values = program(finite, design.without_names(), columns, Z, levels, of_level)
        slopes, own, of_beta = (np.asarray(value) for value in values)
    step = np.full((count, inside.size), np.nan)
    step[:, inside] = slopes[:, inside] @ (vcov / 2)
    return own + step[:, inside] @ of_beta[:, inside].T, step


def _finite(params: np.ndarray, sizes: covariance.Sizes) -> np.ndarray:
    """Parameters with finite numbers for those on the boundary."""
    of_variances, of_correlations = covariance.positions(sizes)
    params = params.copy()
    params[of_variances] = np.maximum(params[of_variances], params[-1] + LOG_ZERO)
    params[of_correlations] = np.nan_to_num(np.clip(params[of_correlations], -FAR, FAR))
    return params


@lru_cache
def _compiled(reml: bool, of_rows: bool, count: int) -> Any:
    """Per group the slopes of psi in the parameters, and the change of beta at given parameters;
    the slopes of beta."""

    def program(params: Array, *arrays: Any) -> tuple[Array, Array, Array]:
        def parts(params: Array) -> tuple[Array, Array, Array]:
            return _parts(params, *arrays, reml=reml, of_rows=of_rows, count=count)

        def slope(unit: Array) -> tuple[Array, Array]:
            _, (of_psi, _, of_beta) = jax.jvp(parts, (params,), (unit,))
            return of_psi, of_beta

        _, own, _ = parts(params)
        of_psi, of_beta = jax.lax.map(slope, jnp.eye(len(params), dtype=params.dtype))
        return of_psi.T, own, of_beta.T

    return jax.jit(program, compiler_options=quick_compilation(jax.default_backend()))


def _parts(
    params: Array,
    design: Design,
    columns: Array,
    Z: Array,
    levels: Array,
    cases: Array,
    *,
    reml: bool,
    of_rows: bool,
    count: int,
) -> tuple[Array, Array, Array]:
    """psi (count,), the change of beta (count, p) at given parameters, and beta (p,).

    Args:
        params: (m + 1,), finite.
        design: grouped.
        columns: (n, p + 1), the orthonormal basis of X and the residual of y, as in the design.
        Z: (n, q), scaled effects.
        levels: (n,) codes.
        cases: (J,), the group of each level; not used for rows.
        reml, of_rows, count: static.
    """
    p = design.p
    structure: Any = design.structure
    omega, log_sigma2 = covariance.omega_from_params(params, design.sizes)
    omega = omega * covariance.relative_scale(design.scales)
    projection = structure.project(omega)
    factor = jnp.linalg.cholesky(projection.gram)
    rss = factor[p, p] ** 2
    ratio = rss / jnp.exp(log_sigma2)
    to_beta = jnp.linalg.inv(factor[:p, :p].T @ design.basis) if p else factor[:p, :p]
    beta = design.beta_ols + to_beta @ factor[p, :p]

    # In columns of which [X y]' V0^-1 [X y] is the identity: [X y] and V0^-1 [X y]
    to_white = jnp.linalg.inv(factor).T
    loaded = Z @ block_diag(*covariance.symmetric_matrices(omega, design.sizes))
    cross = structure.combine(projection.cross, to_white)[:, :, levels]
    white = columns @ to_white
    solved = white - jnp.einsum("na,aun->nu", loaded, cross)
    of_x = solved[:, :p]
    if of_rows:
        inner = projection.inner[:, :, levels]
        psi = jnp.sum(loaded * Z, axis=1) - jnp.einsum("na,abn,nb->n", loaded, inner, loaded)
        psi = psi + log_sigma2 + ratio * solved[:, p] ** 2
        if reml:
            psi = psi + jnp.sum(of_x**2, axis=1)
        own = of_x * solved[:, p:]
    else:
        roots = linalg.diagonal(structure._cholesky(omega))
        logdet = 2 * jnp.sum(jnp.log(roots), axis=0)
        products = white * solved
        of_row = log_sigma2 + ratio * products[:, p]
        if reml:
            of_row = of_row + jnp.sum(products[:, :p], axis=1)
        of_level = logdet + jax.ops.segment_sum(of_row, levels, len(logdet))
        psi = jax.ops.segment_sum(of_level, cases, count)
        own = jax.ops.segment_sum(white[:, :p] * solved[:, p:], cases[levels], count)
    return psi, -(own @ to_beta.T) * jnp.sqrt(rss), beta
