r"""Coordinate maps: several views of the same variance parameters.

A model has one covariance matrix per random term, ``Sigma_k`` of order ``sizes[k]``, and a
residual variance ``sigma2``. The views, each a differentiable map of the one before it:

===================  ==========================================================================
``theta``            lower triangles, column by column, of the relative Cholesky factors
                     ``Lambda_k``, with ``Sigma_k = sigma2 Lambda_k Lambda_k'`` (lme4's theta)
``root``             any square matrices ``L_k`` with ``Omega_k = L_k L_k'``, row by row: what the
                     optimiser moves. A triangle would be ill-conditioned where a leading
                     variance is nearly zero
``omega``            lower triangles, column by column, of the relative covariance matrices
                     ``Omega_k = Lambda_k Lambda_k'``; the marginal covariance
                     ``V / sigma2 = I + Z Omega Z'`` is linear in them
``parameters``           for each term its log-variances and then its correlation coordinates; the
                     residual log-variance last. Unconstrained
===================  ==========================================================================

The correlation coordinates are inverse hyperbolic tangents of the canonical partial correlations
(Lewandowski, Kurowicka and Joe 2009, J. Multivariate Analysis 100:1989): for two effects, Fisher's
z of their correlation. They run row by row over the strict lower triangle.

Everything that depends only on ``sizes`` is NumPy and computed once. Arrays may have one more axis
at the end, the lanes of a batch, except where a shape says otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.model import linalg

Sizes = tuple[int, ...]
INDEX = np.int32  # of index arrays: int64 ones break eager JAX code run with x64 off


@lru_cache
def triangle(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a lower triangle of order `q`, column by column as lme4 orders theta."""
    columns, rows = np.triu_indices(q)
    return rows.astype(INDEX), columns.astype(INDEX)


@lru_cache
def places(q: int) -> np.ndarray:
    """Where a symmetric matrix has its entries in its lower `triangle`, (q, q)."""
    places = np.zeros((q, q), INDEX)
    rows, columns = triangle(q)
    places[rows, columns] = places[columns, rows] = np.arange(rows.size)
    return places


def count_theta(sizes: Sizes) -> int:
    """Number of variance parameters, the residual's not counted."""
    return sum(q * (q + 1) // 2 for q in sizes)


@lru_cache
def positions(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Where `parameters` holds log-variances (the residual's last) and correlation coordinates."""
    log_variances: list[int] = []
    start = 0
    for q in sizes:
        log_variances += range(start, start + q)
        start += q * (q + 1) // 2
    log_variances.append(start)
    others = np.setdiff1d(np.arange(start), log_variances)
    return np.array(log_variances, INDEX), others.astype(INDEX)


@lru_cache
def effects_of_omega(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Which two effects, counted over all terms, each entry of omega belongs to."""
    starts = np.cumsum((0, *sizes[:-1]))
    pairs = [np.array(triangle(q)) + start for q, start in zip(sizes, starts, strict=True)]
    rows, columns = np.concatenate(pairs, axis=1).astype(INDEX)
    return rows, columns


@lru_cache
def symmetric_basis(sizes: Sizes) -> np.ndarray:
    """d Omega / d omega_i, Omega block-diagonal over the terms: (m, q, q), q = sum(sizes)."""
    total = sum(sizes)
    basis = []
    start = 0
    for q in sizes:
        for row, column in zip(*triangle(q), strict=True):
            unit = np.zeros((total, total))
            unit[start + row, start + column] = unit[start + column, start + row] = 1.0
            basis.append(unit)
        start += q
    return np.array(basis).reshape(-1, total, total)


@lru_cache
def root_of_theta(sizes: Sizes) -> np.ndarray:
    """Positions of theta in a root, (m,): a lower triangle is one of the roots."""
    positions = []
    start = 0
    for q in sizes:
        rows, columns = triangle(q)
        positions.append(start + rows * q + columns)
        start += q * q
    return np.concatenate(positions).astype(INDEX)


def split_triangles(vector: Array, sizes: Sizes) -> tuple[Array, ...]:
    """Cut a theta-like vector into one lower-triangular matrix per term, shapes (q_k, q_k)."""
    matrices = []
    start = 0
    for q in sizes:
        rows, columns = triangle(q)
        matrix = jnp.zeros((q, q), vector.dtype)
        matrices.append(matrix.at[rows, columns].set(vector[start : start + rows.size]))
        start += rows.size
    return tuple(matrices)


def join_triangles(matrices: tuple[Array, ...]) -> Array:
    """The inverse of `split_triangles`: only the lower triangles are read."""
    parts = [matrix[triangle(matrix.shape[0])] for matrix in matrices]
    return jnp.concatenate(parts) if parts else jnp.zeros(0)


def omega_from_root(root: Array, sizes: Sizes) -> Array:
    """Relative covariances L L' of square roots L, both as vectors: (r, ...) to (m, ...)."""
    parts = []
    start = 0
    for q in sizes:
        square = root[start : start + q * q].reshape(q, q, *root.shape[1:])
        parts.append(linalg.matmul(square, linalg.transpose(square))[triangle(q)])
        start += q * q
    return jnp.concatenate(parts)


def root_jacobian(root: Array, sizes: Sizes) -> Array:
    """d omega / d root, (m, r, ...)."""
    blocks = []
    start = 0
    for q in sizes:
        lanes = root.shape[1:]
        square = root[start : start + q * q].reshape(q, q, *lanes)
        rows, columns = triangle(q)
        unit = np.eye(q, dtype=root.dtype).reshape(q, q, 1, *[1] * len(lanes))
        block = unit[rows] * square[columns][:, None] + unit[columns] * square[rows][:, None]
        blocks.append(block.reshape(rows.size, q * q, *lanes))
        start += q * q
    return _block_diagonal(blocks)


def root_curvature(gradient: Array, sizes: Sizes) -> Array:
    """Second derivatives in the root, (r, r, ...), of gradient' omega for (m, ...) `gradient`.

    Times the root they are its first derivatives.
    """
    blocks = []
    start = 0
    for q in sizes:
        lanes = gradient.shape[1:]
        square = gradient[start + places(q)]
        square = square + linalg.eye_like(square) * square
        unit = np.eye(q, dtype=gradient.dtype).reshape(1, q, 1, q, *[1] * len(lanes))
        block = square[:, None, :, None] * unit
        blocks.append(block.reshape(q * q, q * q, *lanes))
        start += q * (q + 1) // 2
    return _block_diagonal(blocks)


def _block_diagonal(blocks: list[Array]) -> Array:
    if len(blocks) == 1:
        return blocks[0]
    width = sum(block.shape[1] for block in blocks)
    rows = []
    start = 0
    for block in blocks:
        stop = start + block.shape[1]
        pad = [(0, 0), (start, width - stop)] + [(0, 0)] * (block.ndim - 2)
        rows.append(jnp.pad(block, pad))
        start = stop
    return jnp.concatenate(rows)


def rotations(root: Array, sizes: Sizes) -> Array | None:
    """Directions in which a root rotates, L A for skew A, which do not move omega to first order.

    (r, ...) to (d, r, ...), or None where there are none.
    """
    parts = []
    start = 0
    for q in sizes:
        square = root[start : start + q * q].reshape(q, q, *root.shape[1:])
        for j in range(q):
            for k in range(j):
                turned = (
                    jnp.zeros_like(square).at[:, j].set(square[:, k]).at[:, k].set(-square[:, j])
                )
                parts.append(
                    jnp.zeros_like(root)
                    .at[start : start + q * q]
                    .set(turned.reshape(-1, *root.shape[1:]))
                )
        start += q * q
    return jnp.stack(parts) if parts else None


def root_from_theta(theta: Array, sizes: Sizes) -> Array:
    """The triangular root that `theta` is, (m, ...) to (r, ...)."""
    length = sum(q * q for q in sizes)
    return jnp.zeros((length, *theta.shape[1:]), theta.dtype).at[root_of_theta(sizes)].set(theta)


def omega_from_theta(theta: Array, sizes: Sizes) -> Array:
    """Relative covariances of relative Cholesky factors, both as vectors of length m."""
    return omega_from_root(root_from_theta(theta, sizes), sizes)


def symmetric_matrices(omega: Array, sizes: Sizes) -> tuple[Array, ...]:
    """The relative covariance matrices Omega_k, shapes (q_k, q_k), of the vector `omega`."""
    starts = np.cumsum([0, *(q * (q + 1) // 2 for q in sizes)])
    return tuple(omega[start + places(q)] for start, q in zip(starts, sizes, strict=False))


def factor_semidefinite(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """Lower Cholesky factor of a semidefinite matrix, with exact zeros where it is singular.

    Args:
        matrix: (q, q), positive semidefinite.
        tolerance: a pivot counts as zero if its root is at most this, or at most this fraction
            of the root of its diagonal entry.

    Returns:
        The factor, (q, q), diagonal not negative, with a zero column for each zero pivot, and
        the pivots that count as zero, (q,) booleans.
    """
    q = matrix.shape[0]
    columns: list[list[Array]] = [[jnp.zeros_like(matrix[0, 0])] * q for _ in range(q)]
    zero = []
    for k in range(q):
        pivot = matrix[k, k] - sum((columns[j][k] ** 2 for j in range(k)), 0.0)
        is_zero = pivot <= tolerance**2 * jnp.maximum(matrix[k, k], 1.0)
        root = jnp.sqrt(jnp.where(is_zero, 1.0, pivot))
        columns[k][k] = jnp.where(is_zero, 0.0, root)
        for i in range(k + 1, q):
            rest = matrix[i, k] - sum((columns[j][i] * columns[j][k] for j in range(k)), 0.0)
            columns[k][i] = jnp.where(is_zero, 0.0, rest / root)
        zero.append(is_zero)
    return jnp.stack([jnp.stack(column) for column in columns], axis=1), jnp.stack(zero)


def lower_factor(root: Array, tolerance: float, rank: Array | None = None) -> Array:
    """Lower Cholesky factor of L L' for a square root L, with exact zeros where it is singular.

    By orthogonalising the rows of L one after the other (twice, for rounding): L L' is not formed,
    so that a pivot of zero comes out as the rounding error of L and not as its root.

    Args:
        root: (q, q, ...), lanes last.
        tolerance: as in `factor_semidefinite`.
        rank: (...), of L if it is known. So many pivots are not zero, however small, unless there
            are others to choose from and their root is at most `tolerance` of the row's length.

    Returns:
        The factor, (q, q, ...), as `factor_semidefinite` gives it.
    """
    q = root.shape[0]
    directions: list[Array] = []
    rows = []
    used: Array | int = 0
    for i in range(q):
        rest, entries = root[i], [jnp.zeros_like(root[i, 0]) for _ in directions]
        least = jnp.sum(rest**2, axis=0)
        least = tolerance**2 * (jnp.maximum(least, 1.0) if rank is None else least)
        for _ in range(2 if directions else 0):
            parts = [jnp.sum(rest * direction, axis=0) for direction in directions]
            entries = [entry + part for entry, part in zip(entries, parts, strict=True)]
            rest = rest - sum(part * d for part, d in zip(parts, directions, strict=True))
        pivot = jnp.sum(rest**2, axis=0)
        is_zero = pivot <= least
        if rank is not None:
            is_zero = (is_zero & (rank - used < q - i)) | (used >= rank)
            used = used + ~is_zero
        length = jnp.sqrt(jnp.where(is_zero, 1.0, pivot))
        directions.append(jnp.where(is_zero, 0.0, rest / length))
        entries.append(jnp.where(is_zero, 0.0, length))
        rows.append(jnp.stack([*entries, *[jnp.zeros_like(length)] * (q - 1 - i)]))
    return jnp.stack(rows)


@jax.custom_jvp
def _tanh(z: Array) -> Array:
    return jnp.tanh(z)


@jax.custom_jvp
def _sech(z: Array) -> Array:
    """1 / cosh(z) without an overflow, z = +-inf included."""
    small = jnp.exp(-jnp.abs(z))
    return 2 * small / (1 + small * small)


# Each derivative by the other function: finite everywhere, zero at +-inf, and 1 - tanh^2 keeps
# its digits.
_tanh.defjvps(lambda dz, value, z: dz * _sech(z) ** 2)
_sech.defjvps(lambda dz, value, z: -dz * _sech(z) * _tanh(z))


def _correlation_factor(z: Array, q: int) -> Array:
    """Cholesky factor of the correlation matrix with partial correlations tanh(z), row by row."""
    rows: list[list[Array]] = []
    k = 0
    for i in range(q):
        rest = jnp.ones_like(z[0])
        row = []
        for _ in range(i):
            row.append(_tanh(z[k]) * rest)
            rest = rest * _sech(z[k])
            k += 1
        rows.append([*row, rest, *[jnp.zeros_like(z[0])] * (q - 1 - i)])
    return jnp.stack([jnp.stack(row) for row in rows])


def _tails(row: Array, i: int) -> tuple[list[Array], list[Array]]:
    """What row i of a triangle has left behind each of its entries but the last, the root of the
    sum of squares, (i,) of them: ones where that is exactly zero, and whether it is not."""
    squares = jnp.zeros_like(row[0])
    tails, left = [], []
    for j in reversed(range(i)):
        squares = squares + row[j + 1] ** 2
        left.append(squares > 0)
        tails.append(jnp.sqrt(jnp.where(squares > 0, squares, 1.0)))
    return tails[::-1], left[::-1]


def _correlation_coordinates(factor: Array, limit: float) -> Array:
    """Inverse of `_correlation_factor` for rows of any length; a partial correlation of +-1
    becomes +-`limit`.

    A partial correlation is tanh z of sinh z = entry / what the row has left behind it, which
    loses no digits next to +-1.
    """
    coordinates = []
    for i in range(1, factor.shape[0]):
        for entry, tail, left in zip(factor[i], *_tails(factor[i], i), strict=False):
            z = jnp.arcsinh(entry / tail)
            coordinates.append(jnp.where(left, z, jnp.sign(entry) * limit))
    return jnp.stack(coordinates) if coordinates else jnp.zeros_like(factor[:0, 0])


def _correlations(z: Array, sizes: Sizes) -> Array:
    """Correlations in the layout of omega, ones for variances, of all correlation coordinates."""
    parts = []
    start = 0
    for q in sizes:
        stop = start + q * (q - 1) // 2
        if q == 1:
            parts.append(jnp.ones((1, *z.shape[1:]), z.dtype))
            continue
        factor = _correlation_factor(z[start:stop], q)
        parts.append(linalg.matmul(factor, linalg.transpose(factor))[triangle(q)])
        start = stop
    return jnp.concatenate(parts)


def _scale_of_omega(log_variances: Array, sizes: Sizes) -> Array:
    """Geometric means of the two variances each entry of omega belongs to, over sigma2."""
    rows, columns = effects_of_omega(sizes)
    return jnp.exp((log_variances[rows] + log_variances[columns]) / 2 - log_variances[-1])


def omega_from_parameters(parameters: Array, sizes: Sizes) -> tuple[Array, Array]:
    """Relative covariances (m,) and the residual log-variance of `parameters` (m + 1,).

    `parameters` may be on the boundary, as `boundary` shows them: -inf for the log of a variance of
    zero, +-inf for the coordinate of a correlation of +-1. Their derivatives are the limits, zero.
    A coordinate of NaN that these leave undefined is not read.
    """
    of_variances, of_correlations = positions(sizes)
    log_variances, z = parameters[of_variances], parameters[of_correlations]
    if of_correlations.size:
        z = jnp.where(jnp.isnan(z) & _undefined(log_variances, z, sizes), 0.0, z)
    return _scale_of_omega(log_variances, sizes) * _correlations(z, sizes), parameters[-1]


def _undefined(log_variances: Array, z: Array, sizes: Sizes) -> Array:
    """Which correlation coordinates, booleans like `z`, others on the boundary leave undefined.

    That of effects i > j is where one of them has no variance, or none beside what it shares with
    the effects before it (j) or before j (i).
    """
    zero, limit = log_variances == -jnp.inf, jnp.isinf(z)
    none = jnp.zeros_like(zero[0])
    undefined = []
    first = start = 0
    for q in sizes:
        spent: list[Array] = []  # per effect
        for i in range(q):
            gone = zero[first + i]
            for j in range(i):
                undefined.append(gone | spent[j])
                gone = gone | limit[start + j]
            spent.append(gone)
            start += i
        first += q
    return jnp.stack([none | entry for entry in undefined])


def factors_from_parameters(parameters: Array, sizes: Sizes) -> tuple[Array, ...]:
    """Relative Cholesky factors (q_k, q_k) of `parameters` (m + 1,) as `boundary` shows them."""
    factors = []
    start = 0
    for q in sizes:
        log_variances = parameters[start : start + q] - parameters[-1]
        varies = log_variances > -jnp.inf
        sd = jnp.where(varies, jnp.exp(jnp.where(varies, log_variances, 0.0) / 2), 0.0)
        start += q
        rows = []
        for i in range(q):
            rest, row = sd[i], []
            for z in parameters[start : start + i]:
                finite = jnp.isfinite(z)
                inside = jnp.where(finite, z, 0.0)
                at_limit = jnp.isinf(z)
                row.append(rest * jnp.where(at_limit, jnp.sign(z), jnp.tanh(inside)))
                rest = rest * jnp.where(at_limit, 0.0, 1 / jnp.cosh(inside))
            start += i
            rows.append(jnp.stack([*row, rest, *[jnp.zeros_like(rest)] * (q - 1 - i)]))
        factors.append(jnp.stack(rows))
    return tuple(factors)


def parameters_from_factors(
    factors: tuple[Array, ...], log_sigma2: Array, *, zero: float, limit: float
) -> Array:
    """`parameters` of relative Cholesky factors.

    Args:
        factors: lower triangular (q_k, q_k), relative to the residual standard deviation.
        log_sigma2: residual log-variance.
        zero: the log-variance to report, relative to the residual's, for a variance of zero.
        limit: the correlation coordinate to report (with its sign) for a correlation of +-1.
    """
    parts = []
    for factor in factors:
        variances = jnp.sum(factor**2, axis=1)
        positive = variances > 0
        log_variances = jnp.where(positive, jnp.log(jnp.where(positive, variances, 1.0)), zero)
        parts += [log_variances + log_sigma2, _correlation_coordinates(factor, limit)]
    return jnp.concatenate([*parts, log_sigma2[None]])


def boundary(factors: tuple[Array, ...], parameters: Array) -> tuple[Array, Array]:
    """Which of `parameters` are inside the parameter space, and what to show for the others.

    That is read off the exact zeros of the factors: with all pivots positive everything is inside.
    A pivot of zero uses up its effect's variance at the last entry of its row that is not zero:
    that partial correlation is +-1 and those behind it are not identified.

    Args:
        factors: relative Cholesky factors as `factor_semidefinite` gives them, zeros exact.
        parameters: their `parameters_from_factors`.

    Returns:
        (m + 1,) booleans, and `parameters` with -inf for the log of a zero variance, +-inf for the
        coordinate of a correlation of +-1 and NaN for one that is not identified there.
    """
    free = []
    shown = []
    start = 0
    for factor in factors:
        q = factor.shape[0]
        positive = jnp.sum(factor**2, axis=1) > 0
        pivots = linalg.diagonal(factor) > 0
        variances = parameters[start : start + q]
        free.append(positive)
        shown.append(jnp.where(positive, variances, -jnp.inf))
        start += q
        for i in range(1, q):
            _, left = _tails(factor[i], i)
            for j in range(i):
                z = parameters[start]
                inside = positive[i] & pivots[j] & left[j]
                at_limit = pivots[j] & ~left[j] & (factor[i, j] != 0)
                free.append(inside[None])
                outside = jnp.where(at_limit, jnp.sign(z) * jnp.inf, jnp.nan)
                shown.append(jnp.where(inside, z, outside)[None])
                start += 1
    free.append(jnp.ones_like(parameters[-1:], bool))
    shown.append(parameters[-1:])
    return jnp.concatenate(free), jnp.concatenate(shown)


def hessian_in_parameters(
    parameters: Array, gradient: Array, hessian: Array, sizes: Sizes
) -> tuple[Array, Array]:
    """Chain rule: derivatives in (omega, log sigma2) to those in `parameters`, at these.

    Args:
        parameters: (m + 1,), where the derivatives were taken.
        gradient: (m + 1,), in omega and log sigma2; the last entry is not read.
        hessian: (m + 1, m + 1), likewise.
        sizes: effects per term.

    Returns:
        The Jacobian of (omega, log sigma2) in `parameters` and the Hessian in `parameters`, both
        (m + 1, m + 1).
    """
    of_variances, of_correlations = positions(sizes)
    z = parameters[of_correlations]
    scale = _scale_of_omega(parameters[of_variances], sizes)
    # omega = scale * correlations, and log(scale) is linear in the log-variances.
    rows, columns = effects_of_omega(sizes)
    m, v = rows.size, of_variances.size
    linear = np.zeros((m, v))
    np.add.at(linear, (np.arange(m), rows), 0.5)
    np.add.at(linear, (np.arange(m), columns), 0.5)
    linear[:, -1] = -1.0
    omega = scale * _correlations(z, sizes)
    jacobian = omega[:, None] * linear.reshape(m, v, *[1] * (parameters.ndim - 1)).astype(
        parameters.dtype
    )
    linear = jnp.asarray(linear, parameters.dtype)
    curvature = jnp.tensordot(linear.T, gradient[:m, None] * jacobian, axes=1)
    if of_correlations.size:
        slope, bend = _correlation_derivatives(z, sizes)
        by_z = scale[:, None] * slope
        mixed = jnp.tensordot(linear.T, gradient[:m, None] * by_z, axes=1)
        corner = jnp.sum((gradient[:m] * scale)[:, None, None] * bend, axis=0)
        curvature = jnp.concatenate(
            [
                jnp.concatenate([curvature, mixed], axis=1),
                jnp.concatenate([linalg.transpose(mixed), corner], axis=1),
            ]
        )
        jacobian = jnp.concatenate([jacobian, by_z], axis=1)
    order = np.argsort(np.concatenate([of_variances, of_correlations]))
    last = jnp.zeros_like(jacobian[:1]).at[0, order[-1]].set(1.0)
    jacobian = jnp.concatenate([jacobian, last])[:, order]
    inner = linalg.matmul(linalg.transpose(jacobian), linalg.matmul(hessian, jacobian))
    return jacobian, inner + curvature[order][:, order]


def _correlation_derivatives(z: Array, sizes: Sizes) -> tuple[Array, Array]:
    """First and second derivatives of `_correlations`: (m, z, ...) and (m, z, z, ...)."""

    def both(z: Array) -> tuple[Array, Array]:
        slope = jax.jacfwd(lambda z: _correlations(z, sizes))
        return slope(z), jax.jacfwd(slope)(z)

    for _ in range(z.ndim - 1):
        both = jax.vmap(both, in_axes=-1, out_axes=-1)
    return both(z)
