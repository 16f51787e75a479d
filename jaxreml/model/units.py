r"""`Units`: the coordinates of the random effects inside a design, and the way back to the user's.

The likelihood is the same for every basis of a term's columns, Z = Z_in T with T upper triangular,
and b_in = T b. A basis of unit root mean squares makes variances of predictors of any scale alike.
Where the columns are nearly dependent, as 1 and a date far from its origin are (mean over SD is 1e6
for Julian days), the basis is also orthonormal: the search, its derivatives and the inverse of the
Hessian see the centred predictor. The way back then loses as many digits as the user's own
coordinates do, once and not squared: Cholesky factors are changed, L = lower triangle of T^-1 L_in,
and covariance matrices L L' never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.lazy import jax, jnp, record
from jaxreml.backend.runtime import neutral
from jaxreml.model import linalg, tall
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.factors import lower_factor
from jaxreml.model.covariance.joint import Covariance

Array = Any  # NumPy's or JAX's
NEAR = 1e-2  # share of a column that those before it leave, below which the basis is orthonormal
DEPENDENT = 1e-10  # and above which it is, as for columns of X


@record
@dataclass(frozen=True)
class Units:
    """Bases of the terms' effects; may have the axis of lanes, of length 1, at the end.

    Attributes:
        matrices: per term T, (q_k, q_k), upper triangular with a positive diagonal.
        rotated: whether T is more than its diagonal, per term; static. Only where the covariance
            takes `any_basis`; T is the identity for those that do not.
    """

    matrices: tuple[Any, ...]
    rotated: tuple[bool, ...] = field(metadata={"static": True})

    @staticmethod
    def of(columns: list[Any], n: int, covariance: Covariance) -> Units:
        """The units of weighted columns (rows, q_k), `n` of which are not left out."""
        found = [
            _matrix(own, n, block.any_basis)
            if block.any_basis or block.any_scale
            else (np.eye(block.size, dtype=own.dtype), False)
            for block, own in zip(covariance.blocks, columns, strict=True)
        ]
        return Units(tuple(matrix for matrix, _ in found), tuple(turned for _, turned in found))

    def times(self, scales: Sequence[Any]) -> Units:
        """Those of columns longer by a factor () per term, or None."""
        pairs = zip(self.matrices, scales, strict=True)
        longer = (own if scale is None else own * scale for own, scale in pairs)
        return replace(self, matrices=tuple(longer))

    def general(self, covariance: Covariance) -> Units:
        """The same with every T counted as more than its diagonal that can be."""
        return Units(
            self.matrices, tuple(block.any_basis and block.size > 1 for block in covariance.blocks)
        )

    def rows(self, k: int, effects: Any) -> Any:
        """Rows of Z_in (n, q) of rows of Z, of term `k`."""
        matrix = _like(self.matrices[k], effects)
        if not self.rotated[k]:
            scale = _diagonal(matrix)
            one = on_host(scale) and bool(np.all(scale == 1))
            return effects if one else effects / scale
        found: list[Any] = []
        for i in range(len(matrix)):
            rest = effects[:, i]
            for j, column in enumerate(found):
                rest = rest - column * matrix[j, i]
            found.append(rest / matrix[i, i])
        return namespace(effects).stack(found, axis=1)

    def effects(self, k: int, inner: Any) -> Any:
        """b of b_in, (q, ...), of term `k`."""
        matrix = _like(self.matrices[k], inner)
        found: list[Any] = []
        for i in reversed(range(len(matrix))):
            rest = inner[i]
            if self.rotated[k]:
                for j, own in enumerate(reversed(found), i + 1):
                    rest = rest - matrix[i, j] * own
            found.append(rest / matrix[i, i])
        return namespace(inner).stack(found[::-1])

    def modes(self, k: int, inner: Any) -> Any:
        """Effects of term `k`, (levels, q, ...), of those inside."""
        return self.effects(k, inner.swapaxes(0, 1)).swapaxes(0, 1)

    def variances(self, k: int, inner: np.ndarray) -> np.ndarray:
        """Covariance matrices (levels, q, q) of those inside, of term `k`. On the host."""
        half = self.effects(k, np.moveaxis(np.asarray(inner), 1, 0))  # (q, levels, q)
        return np.moveaxis(self.effects(k, np.moveaxis(half, 2, 0)), 0, 2).swapaxes(0, 1)

    def factor(self, k: int, inner: Array) -> Array:
        """Cholesky factor (q, q, ...) of term `k` in the user's units, of one inside: zeros are
        exact where that has lost rank."""
        own = self.effects(k, inner)
        return _lower(own, inner) if self.rotated[k] else own

    def inner_factor(self, k: int, factor: Array) -> Array:
        """Cholesky factor inside of one in the user's units."""
        matrix = self.matrices[k]
        if self.rotated[k]:
            return _lower(linalg.matmul(matrix, factor), factor)
        return _diagonal(matrix)[:, None] * factor

    def chart(self, chart: Array, covariance: Covariance) -> Array:
        """A `canonical` point of the chart in the user's units, of one inside."""
        parts = []
        for k, (block, own) in enumerate(covariance.charts(chart)):
            if block.any_basis:
                own = block.chart(self.factor(k, block.factor(own)))
            elif block.any_scale:
                own = block.rescaled(own, _diagonal(_like(self.matrices[k], own)))
            parts.append(own)
        return namespace(chart).concatenate(parts)

    def omega(self, parameters: Array, covariance: Covariance) -> tuple[Array, Array]:
        """Relative covariances inside (m,) and residual log-variance at all `parameters`."""
        xp = namespace(parameters)
        omega, last = covariance.natural(parameters)
        own_parameters = covariance.own_parameters(parameters)
        parts = []
        for k, (block, part) in enumerate(covariance.parts(omega)):
            matrix = self.matrices[k]
            rows, columns = natural.triangle(block.size)
            if self.rotated[k]:
                root = linalg.matmul(matrix, block.factor_at(own_parameters[k][1], last))
                parts.append(natural.omega_from_factors((root,)))
            else:
                scale = _diagonal(matrix)
                parts.append(part * (scale[rows] * scale[columns]))
        return xp.concatenate(parts), last

    def of_omega(self, covariance: Covariance) -> Array:
        """The linear map (m, m, ...) from relative covariances in the user's units to those
        inside."""
        maps = []
        for matrix, block in zip(self.matrices, covariance.blocks, strict=True):
            rows, columns = natural.triangle(block.size)
            across, once = matrix[rows], np.where(rows == columns, 0.5, 1.0).astype(matrix.dtype)
            once = once.reshape(-1, *[1] * (matrix.ndim - 2))
            left, right = across[:, rows], matrix[columns][:, columns]
            crossed = across[:, columns] * matrix[columns][:, rows]
            maps.append((left * right + crossed) * once)
        return linalg.block_diagonal(maps)

    def jacobians(self, shown: Array, inner: Array, covariance: Covariance) -> tuple[Array, Array]:
        """Derivatives of `parameters` in those inside, (k + 1, k + 1), and the other way round.

        Args:
            shown: (k + 1,) `parameters` with those on the boundary as `Report.shown` has them.
            inner: the same inside.
            covariance: of the effects.
        """

        def both(shown: Array, inner: Array, matrices: Any) -> tuple[Array, Array]:
            own = Units(matrices, self.rotated)
            out = jax.jacfwd(lambda inner: own._changed(inner, own.factor, covariance))(inner)
            back = jax.jacfwd(lambda p: own._changed(p, own.inner_factor, covariance))(shown)
            return out, back

        function: Any = both
        matrices = self.matrices
        if shown.ndim > 1:
            matrices = tuple(own[..., 0] for own in matrices)
            function = jax.vmap(both, in_axes=(-1, -1, None), out_axes=-1)
        if not on_host(shown):
            return function(shown, inner, matrices)
        with neutral():
            out, back = function(shown, inner, matrices)
            return np.asarray(out), np.asarray(back)

    def _changed(self, parameters: Array, change: Any, covariance: Covariance) -> Array:
        """Finite parameters of the changed factors of what is rotated, the others as they are:
        the unit of an effect adds a constant to its log-variance."""
        xp = namespace(parameters)
        last = parameters[-1]
        parts = []
        for k, (block, own) in enumerate(covariance.own_parameters(parameters)):
            if self.rotated[k]:
                factor = change(k, block.factor_at(own, last))
                own = block.report(block.chart(factor), last).finite
            parts.append(own)
        return xp.concatenate([*parts, last[None]])


def orthonormal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U and an upper triangular R with rows = U R, on the host.

    Of nearly dependent columns, U spans those of `rows`, less the first ones' part in the last, to
    the last digits of the differences.
    """
    quick = tall.orthonormal(rows)
    if quick is not None:
        return quick
    matrix, rotated = _matrix(rows, len(rows))
    if not rotated:
        return np.linalg.qr(rows)
    basis, triangle = np.linalg.qr(Units((matrix,), (True,)).rows(0, rows))
    return basis, triangle @ matrix


def _like(matrix: Any, value: Any) -> Any:
    """A matrix as what it goes with: NumPy's on the host."""
    return matrix if not on_host(value) else np.asarray(matrix)


def _diagonal(matrix: Any) -> Any:
    return matrix[(np.arange(len(matrix)),) * 2]


def _matrix(columns: Any, n: int, any_basis: bool = True) -> tuple[Any, bool]:
    """T of weighted columns (rows, q), and whether it is more than its diagonal, which it may be if
    `any_basis`."""
    xp = namespace(columns)
    scale = xp.sqrt(xp.sum(columns * columns, axis=0) / n)
    scale = xp.where(scale > 0, scale, 1.0)
    if xp is not np:  # a unit, which the likelihood does not depend on
        return jnp.diag(jax.lax.stop_gradient(scale)), False
    if columns.shape[1] > 1 and any_basis:
        triangle = np.linalg.qr(columns / scale, mode="r") / np.sqrt(n)
        share = np.abs(np.diagonal(triangle))
        if len(share) == len(scale) and DEPENDENT < share.min() < NEAR:
            signs = np.where(np.diagonal(triangle) < 0, -1.0, 1.0)
            return (signs[:, None] * triangle * scale).astype(columns.dtype), True
    return np.diag(scale).astype(columns.dtype), False


def _lower(root: Array, like: Array) -> Array:
    """Lower Cholesky factor (q, q) of a root of the same rank as the factor `like`."""
    tolerance = 8 * float(np.finfo(root.dtype).eps)
    rank = (linalg.diagonal(like) > 0).sum(axis=0)
    return lower_factor(root, tolerance, rank)
