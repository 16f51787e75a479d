r"""First-order influence: what leaving a group of rows out does to the estimates, without a refit.

With f the criterion of all rows and f_g that of the rows without the group g, profiled over beta,
the optimum of (1 - t) f + t f_g moves by phi'(0) = H^-1 d psi / d phi, psi = f - f_g, by the
implicit function theorem. beta without the group is exact at the variance parameters of the fit, to
which comes what their change does to beta. With P = V0^-1 - V0^-1 X (X'V0^-1 X)^-1 X'V0^-1, rows
weighted, and parts of the group's n_g rows:

    psi = n_g log sigma2 - log|P_gg| + (Py)_g' P_gg^-1 (Py)_g / sigma2

and log|(V0^-1)_gg| instead under ML (case deletion: Christensen, Pearson and Johnson 1992,
Technometrics 34:38; Haslett and Dillane 2004, JRSS B 66:131). Two ways to it: for whole levels of a
single grouping factor, or single rows, in one pass over the rows; for any other groups, and with
crossed factors, through the inverse of I + Omega Z'Z.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.compilation import quick_jit, remembered
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.parameters import components
from jaxreml.model import linalg
from jaxreml.model.basis import MAX_DENSE_BYTES
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.structures.layout import Layout
from jaxreml.optimum.effects import from_basis, scaled_rows, whitened

Array = Any  # NumPy's or JAX's

LEFT = 1e-10  # share of a coefficient's information, or of a row, that a group must leave
BLOCK = 10**7  # numbers of rows by random effects at a time


def changes(
    fit: FittedModel, codes: np.ndarray, count: int, of_rows: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First-order changes of the coefficients and variance parameters without each group.

    Args:
        fit: a fit.
        codes: (n,), the groups.
        count: number of groups.
        of_rows: every row is its own group.

    Returns:
        (count, p) and (count, m + 1). NaN for parameters on the boundary, at which the others are
        given, and for a group without which a coefficient cannot be estimated.

    Raises:
        DataError: a singular Hessian, or too many random effects of crossed factors.
    """
    if fit.residual is not None and not fit.residual.seen.size:
        raise DataError(
            "first-order influence is not there where subjects are at times of their own. Use "
            'method="exact"'
        )
    inside = np.isfinite(fit.parameters)
    vcov = fit.parameters_vcov_array[np.ix_(inside, inside)]
    if np.isnan(vcov).any():
        raise DataError(
            "first-order influence needs the variance parameters' Hessian, which is singular: "
            f'{fit.message}. Use method="exact"'
        )
    of_level = None
    if fit.structure == "grouped":
        levels = _terms(fit)[0][0]
        of_level = np.zeros(fit.design.structure.factors.shape[-1], int)  # pyright: ignore
        of_level[levels] = codes
    root = np.ones(fit.nobs) if fit.weights is None else np.sqrt(fit.weights)
    with neutral():
        finite = components.finite(fit)
        whole = of_level is not None and np.array_equal(of_level[levels], codes)
        if of_level is not None and (of_rows or whole):
            values = _of_levels(fit, finite, root, of_level, count, of_rows)
        else:
            values = _of_any(fit, finite, root, codes, count)
        slopes, own, of_beta = (np.asarray(value) for value in values)
    step = np.full((count, inside.size), np.nan)
    step[:, inside] = slopes[:, inside] @ (vcov / 2)
    return own + step[:, inside] @ of_beta[:, inside].T, step


def _terms(fit: FittedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    """Levels and effects of the rows of all terms, the residuals' last, before prior weights."""
    frame = fit.frame
    found = [(term.codes, term.effects) for term in frame.terms]
    if frame.residual is not None:
        # That of the residuals times the roots of the weights, which all rows are multiplied by
        effects = np.asarray(frame.residual.term.effects)
        found.append((frame.residual.codes, effects / np.sqrt(fit.prior_weights)[:, None]))
    return found


# Any groups of any structure, on the host


class _Whole(NamedTuple):
    """What groups of rows are taken out of: n rows, Q random effects, covariances relative.

    Attributes:
        layout: of the random effects.
        reml: whether the fit is.
        Z: (n, Q), sparse.
        inverse: (Q, Q), Z V0^-1 of a row is its row of Z times this.
        given: (Q, Q), Var(b | y).
        U: (n, p), V0^-1 X A with A A' = Phi; `of_z` is U'Z.
        residual: (n,), P y; `scores` is Z'P y.
        jacobian: (m, m + 1), of the relative covariances in the parameters.
        to_beta: (p, p), from the coefficients that A goes with.
        sigma2: residual variance.
    """

    layout: Layout
    reml: bool
    Z: Any
    inverse: np.ndarray
    given: np.ndarray
    U: np.ndarray
    of_z: np.ndarray
    residual: np.ndarray
    scores: np.ndarray
    jacobian: np.ndarray
    to_beta: np.ndarray
    sigma2: float


def _of_any(
    fit: FittedModel, parameters: np.ndarray, root: np.ndarray, codes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_of_levels`, groups of the same number of rows together."""
    whole = _whole(fit, parameters, root)
    layout, p = whole.layout, len(whole.to_beta)
    moved = layout.form(jnp.asarray(whole.of_z.T), jnp.asarray(whole.scores[:, None]))[..., 0]
    of_beta = -whole.to_beta @ np.asarray(moved).T @ whole.jacobian
    slopes, own = np.full((count, len(parameters)), np.nan), np.full((count, p), np.nan)
    order = np.argsort(codes, kind="stable")
    per_group = np.bincount(codes, minlength=count)
    first = np.cumsum(per_group) - per_group
    for k in np.unique(per_group):
        groups = np.flatnonzero(per_group == k)
        step = max(1, BLOCK // (k * layout.total))
        for start in range(0, groups.size, step):
            block = groups[start : start + step]
            here = order[first[block][:, None] + np.arange(k)]
            slopes[block], own[block] = _of_block(whole, here)
    return slopes, own, of_beta


def _whole(fit: FittedModel, parameters: np.ndarray, root: np.ndarray) -> _Whole:
    frame, design, parts = fit.frame, fit.design, fit.henderson
    terms = _terms(fit)
    layout = Layout(design.sizes, tuple(int(codes.max()) + 1 for codes, _ in terms))
    size = 4 * 8 * layout.total**2
    if size > MAX_DENSE_BYTES:
        raise DataError(
            f"first-order influence of {layout.total} random effects of crossed factors needs "
            f"about {size / 2**30:.1f} GiB, and {MAX_DENSE_BYTES / 2**30:.0f} GiB is the limit. "
            'Use method="exact"'
        )
    rows = scaled_rows(design, terms)
    Z = layout.sparse([(levels, effects * root[:, None]) for levels, effects in rows])

    def scaled(parameters: Any) -> Any:
        return design.units.omega(parameters, design.covariance)[0]

    omega, jacobian = scaled(parameters), np.asarray(jax.jacfwd(scaled)(parameters))
    matrices = natural.symmetric_matrices(omega, design.sizes)
    products = np.asarray(layout.times(jnp.asarray((Z.T @ Z).toarray()), matrices))
    inverse = np.linalg.inv(np.eye(layout.total) + products.T)
    given = np.asarray(layout.times(jnp.asarray(inverse), matrices))
    residual = (fit.y - fit.fixed_fitted) * root
    residual = residual - Z @ (given @ (Z.T @ residual))
    U = whitened(parts, design, frame.X, rows) * root[:, None]
    return _Whole(
        layout,
        fit.method == "REML",
        Z,
        inverse,
        given=given,
        U=U,
        of_z=np.asarray((Z.T @ U).T),
        residual=residual,
        scores=Z.T @ residual,
        jacobian=jacobian,
        to_beta=np.linalg.inv(parts.factor.T @ design.basis) if design.p else np.zeros((0, 0)),
        sigma2=fit.sigma**2,
    )


def _of_block(whole: _Whole, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes (B, m + 1) and changes of beta (B, p) for B groups of k rows, (B, k); NaN where a
    group leaves too little."""
    shape = (*here.shape, whole.layout.total)
    k = here.shape[1]
    z = whole.Z[here.ravel()]
    of_v = (z @ whole.inverse).reshape(shape)  # V0^-1 Z of these rows
    dense = z.toarray().reshape(shape)
    V = np.eye(k) - (z @ whole.given).reshape(shape) @ dense.transpose(0, 2, 1)
    u, e = whole.U[here], whole.residual[here][..., None]
    P, of_p = V - u @ u.transpose(0, 2, 1), of_v - u @ whole.of_z
    P_left, solved = _solve(P, np.concatenate([e, of_p], axis=2))
    deleted, of_log = solved[..., :1], solved[..., 1:]
    if not whole.reml:
        _, of_log = _solve(V, of_v)
    quadratic = np.sum(e * deleted, axis=(1, 2))
    pulled = of_p.transpose(0, 2, 1) @ deleted
    in_omega = _contract(whole.layout, of_p if whole.reml else of_v, of_log)
    pulled = pulled.transpose(0, 2, 1)
    in_omega += _contract(whole.layout, pulled, pulled - 2 * whole.scores) / whole.sigma2
    slopes = in_omega @ whole.jacobian
    slopes[:, -1] += k - quadratic / whole.sigma2
    own = -(u.transpose(0, 2, 1) @ deleted)[..., 0] @ whole.to_beta.T
    slopes[~P_left] = own[~P_left] = np.nan
    return slopes, own


def _solve(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solutions of symmetric systems (B, k, k) with eigenvalues from 0 to 1, and which of them are
    regular, (B,)."""
    values, vectors = np.linalg.eigh(matrix)
    left = values[:, 0] > LEFT
    values = np.where(left[:, None], values, 1.0)
    return left, vectors @ ((vectors.transpose(0, 2, 1) @ right) / values[..., None])


def _contract(layout: Layout, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """tr(left E_i right') for (B, k, Q) arrays, (B, m)."""
    found, start = [], 0
    right = np.broadcast_to(right, left.shape)
    for q, levels in zip(layout.sizes, layout.levels, strict=True):
        stop = start + q * levels
        parts = [x[..., start:stop].reshape(*x.shape[:2], q, levels) for x in (left, right)]
        products = np.einsum("bkaj,bkcj->bac", *parts, optimize=True)
        found.append(np.einsum("iac,bac->bi", natural.symmetric_basis((q,)), products))
        start = stop
    return np.concatenate(found, axis=1)


# Whole levels or single rows of one grouping factor, in one program


def _of_levels(
    fit: FittedModel,
    parameters: np.ndarray,
    root: np.ndarray,
    of_level: np.ndarray,
    count: int,
    of_rows: bool,
) -> tuple[Array, Array, Array]:
    """Per group the slopes of psi (count, m + 1) and the change of beta at given parameters,
    (count, p); the slopes of beta, (p, m + 1)."""
    frame, design = fit.frame, fit.design
    terms = _terms(fit)
    levels = terms[0][0]
    X = frame.X * root[:, None]
    y = (frame.y if frame.offset is None else frame.y - frame.offset) * root  # pyright: ignore
    rows = scaled_rows(design, terms)
    Z = np.concatenate([effects for _, effects in rows], axis=1) * root[:, None]
    columns = np.column_stack([from_basis(design, X), y - X @ np.asarray(design.beta_ols)])
    program = _compiled(fit.method == "REML", of_rows, count)
    return program(parameters, design.without_names(), columns, Z, levels, of_level)


@remembered
def _compiled(reml: bool, of_rows: bool, count: int) -> Any:
    """`_of_levels` as a program."""

    def program(parameters: Array, *arrays: Any) -> tuple[Array, Array, Array]:
        def parts(parameters: Array) -> tuple[Array, Array, Array]:
            return _parts(parameters, *arrays, reml=reml, of_rows=of_rows, count=count)

        def slope(unit: Array) -> tuple[Array, Array]:
            _, (of_psi, _, of_beta) = jax.jvp(parts, (parameters,), (unit,))
            return of_psi, of_beta

        _, own, _ = parts(parameters)
        of_psi, of_beta = jax.lax.map(slope, jnp.eye(len(parameters), dtype=parameters.dtype))
        return of_psi.T, own, of_beta.T

    return quick_jit(program)


def _parts(
    parameters: Array,
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
        parameters: (m + 1,), finite.
        design: grouped.
        columns: (n, p + 1), the orthonormal basis of X and the residual of y, as in the design.
        Z: (n, q), scaled effects.
        levels: (n,) codes.
        cases: (J,), the group of each level; not used for rows.
        reml, of_rows, count: static.
    """
    p = design.p
    structure: Any = design.structure
    omega, log_sigma2 = design.units.omega(parameters, design.covariance)
    projection = structure.project(omega)
    factor = linalg.cholesky(projection.gram)
    rss = factor[p, p] ** 2
    ratio = rss / jnp.exp(log_sigma2)
    to_white = linalg.solve_lower(factor, jnp.eye(p + 1)).T
    to_beta = linalg.solve_upper(jnp.asarray(design.basis), to_white[:p, :p])
    beta = design.beta_ols + to_beta @ factor[p, :p]

    # In columns of which [X y]' V0^-1 [X y] is the identity: [X y] and V0^-1 [X y]
    loaded = Z @ linalg.block_diagonal(list(natural.symmetric_matrices(omega, design.sizes)))
    cross = structure.combine(projection.cross, to_white)[:, :, levels]
    white = columns @ to_white
    solved = white - jnp.einsum("na,aun->nu", loaded, cross)
    if of_rows:
        inner = projection.inner[:, :, levels]
        taken = jnp.sum(loaded * Z, axis=1) - jnp.einsum("na,abn,nb->n", loaded, inner, loaded)
        of_v = 1 - taken
        of_p = of_v - jnp.sum(solved[:, :p] ** 2, axis=1)
        of_p = jnp.where(of_p > LEFT, of_p, jnp.nan)
        deleted = solved[:, p] / of_p
        psi = log_sigma2 - jnp.log(of_p if reml else of_v) + ratio * solved[:, p] * deleted
        own = solved[:, :p] * deleted[:, None]
    else:
        roots = linalg.diagonal(structure._cholesky(structure._omega(omega)))
        logdet = 2 * jnp.sum(jnp.log(roots), axis=0)
        products = white[:, :, None] * solved[:, None]
        taken = jax.ops.segment_sum(products, cases[levels], count)
        taken = jnp.moveaxis(taken, 0, -1)
        left = linalg.eye_like(taken) - (taken + linalg.transpose(taken)) / 2
        of_x = linalg.cholesky(left[:p, :p])
        pivots = linalg.diagonal(of_x)
        of_x = jnp.where(jnp.all(pivots**2 > LEFT, axis=0), of_x, jnp.nan)
        half = linalg.solve_lower(of_x, left[:p, p:])
        remaining = left[p, p] - jnp.sum(half**2, axis=(0, 1))
        rows = jax.ops.segment_sum(jnp.ones(len(levels)), cases[levels], count)
        psi = rows * log_sigma2 + jax.ops.segment_sum(logdet, cases, count)
        psi = psi + ratio * (1 - remaining)
        if reml:
            psi = psi - 2 * jnp.sum(jnp.log(linalg.diagonal(of_x)), axis=0)
        own = -linalg.solve_lower(of_x, half, transposed=True)[:, 0].T
    return psi, -(own @ to_beta.T) * jnp.sqrt(rss), beta
