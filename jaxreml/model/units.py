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

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.model import linalg
from jaxreml.model.covariance import unstructured

NEAR = 1e-2  # share of a column that those before it leave, below which the basis is orthonormal
DEPENDENT = 1e-10  # and above which it is, as for columns of X


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """Bases of the terms' effects; may have the axis of lanes, of length 1, at the end.

    Attributes:
        matrices: per term T, (q_k, q_k), upper triangular with a positive diagonal.
        rotated: whether T is more than its diagonal, per term; static.
    """

    matrices: tuple[Any, ...]
    rotated: tuple[bool, ...] = field(metadata={"static": True})

    @staticmethod
    def of(columns: list[Any], n: int) -> Units:
        """The units of weighted columns (rows, q_k), `n` of which are not left out."""
        found = [_matrix(own, n) for own in columns]
        return Units(tuple(matrix for matrix, _ in found), tuple(turned for _, turned in found))

    def with_lanes(self, lanes: int) -> Units:
        """The same with `lanes` axes of length 1 at the end."""
        shaped = [jnp.reshape(own, (*own.shape, *[1] * lanes)) for own in self.matrices]
        return Units(tuple(shaped), self.rotated)

    def general(self) -> Units:
        """The same with every T counted as more than its diagonal."""
        return Units(self.matrices, tuple(own.shape[-1] > 1 for own in self.matrices))

    def rows(self, k: int, effects: Any) -> Any:
        """Rows of Z_in (n, q) of rows of Z, of term `k`."""
        matrix = _like(self.matrices[k], effects)
        if not self.rotated[k]:
            return effects / _diagonal(matrix)
        found: list[Any] = []
        for i in range(len(matrix)):
            rest = effects[:, i]
            for j, column in enumerate(found):
                rest = rest - column * matrix[j, i]
            found.append(rest / matrix[i, i])
        return _module(effects).stack(found, axis=1)

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
        return _module(inner).stack(found[::-1])

    def modes(self, k: int, inner: Any) -> Any:
        """Effects of term `k`, (levels, q), of those inside."""
        return self.effects(k, inner.T).T

    def variances(self, k: int, inner: np.ndarray) -> np.ndarray:
        """Covariance matrices (levels, q, q) of those inside, of term `k`. On the host."""
        half = self.effects(k, np.moveaxis(np.asarray(inner), 1, 0))  # (q, levels, q)
        return np.moveaxis(self.effects(k, np.moveaxis(half, 2, 0)), 0, 2).swapaxes(0, 1)

    def factors(self, inner: tuple[Array, ...]) -> tuple[Array, ...]:
        """Cholesky factors in the user's units, zeros exact where those inside have lost rank."""
        found = []
        for k, factor in enumerate(inner):
            own = self.effects(k, factor)
            found.append(_lower(own, factor) if self.rotated[k] else own)
        return tuple(found)

    def inner_factors(self, factors: tuple[Array, ...]) -> tuple[Array, ...]:
        """Cholesky factors inside of those in the user's units."""
        found = []
        for factor, matrix, turned in zip(factors, self.matrices, self.rotated, strict=True):
            if turned:
                found.append(_lower(linalg.matmul(matrix, factor), factor))
            else:
                found.append(_diagonal(matrix)[:, None] * factor)
        return tuple(found)

    def omega(self, parameters: Array) -> tuple[Array, Array]:
        """Relative covariances inside (m,) and residual log-variance at `parameters` (m + 1,)."""
        sizes = tuple(len(own) for own in self.matrices)
        omega, log_sigma2 = unstructured.omega_from_parameters(parameters, sizes)
        factors = (
            unstructured.factors_from_parameters(parameters, sizes) if any(self.rotated) else ()
        )
        parts = []
        start = 0
        for k, (q, matrix) in enumerate(zip(sizes, self.matrices, strict=True)):
            rows, columns = unstructured.triangle(q)
            if self.rotated[k]:
                root = linalg.matmul(matrix, factors[k])
                parts.append(linalg.matmul(root, linalg.transpose(root))[rows, columns])
            else:
                scale = _diagonal(matrix)
                part = omega[start : start + rows.size]
                parts.append(part * (scale[rows] * scale[columns]))
            start += rows.size
        return jnp.concatenate(parts), log_sigma2

    def jacobians(self, shown: Array, inner: Array) -> tuple[Array, Array]:
        """Derivatives of `parameters` in those inside, (m + 1, m + 1), and the other way round.

        Args:
            shown: (m + 1,) `parameters` with those on the boundary as `boundary` has them.
            inner: the same inside.
        """

        def both(shown: Array, inner: Array, matrices: Any) -> tuple[Array, Array]:
            own = Units(matrices, self.rotated)
            out = jax.jacfwd(lambda inner: own._changed(inner, own.factors))(inner)
            back = jax.jacfwd(lambda shown: own._changed(shown, own.inner_factors))(shown)
            return out, back

        if shown.ndim == 1:
            return both(shown, inner, self.matrices)
        matrices = tuple(own[..., 0] for own in self.matrices)
        mapped = jax.vmap(lambda a, b: both(a, b, matrices), in_axes=-1, out_axes=-1)
        return mapped(shown, inner)

    def _changed(self, parameters: Array, change: Any) -> Array:
        """Finite parameters of the changed factors."""
        sizes = tuple(len(own) for own in self.matrices)
        factors = change(unstructured.factors_from_parameters(parameters, sizes))
        return unstructured.parameters_from_factors(factors, parameters[-1], zero=0.0, limit=0.0)


def orthonormal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U and an upper triangular R with rows = U R, on the host.

    Of nearly dependent columns, U spans those of `rows`, less the first ones' part in the last, to
    the last digits of the differences.
    """
    units = Units.of([rows], len(rows))
    basis, triangle = np.linalg.qr(units.rows(0, rows) if units.rotated[0] else rows)
    return basis, triangle @ units.matrices[0] if units.rotated[0] else triangle


def _module(value: Any) -> Any:
    return jnp if isinstance(value, Array) else np


def _like(matrix: Any, value: Any) -> Any:
    """A matrix as what it goes with: NumPy's on the host."""
    return matrix if isinstance(value, Array) else np.asarray(matrix)


def _diagonal(matrix: Any) -> Any:
    return matrix[(np.arange(len(matrix)),) * 2]


def _matrix(columns: Any, n: int) -> tuple[Any, bool]:
    """T of weighted columns (rows, q), and whether it is more than its diagonal."""
    xp = _module(columns)
    scale = xp.sqrt(xp.sum(columns * columns, axis=0) / n)
    scale = xp.where(scale > 0, scale, 1.0)
    if xp is jnp:  # a unit, which the likelihood does not depend on
        return jnp.diag(jax.lax.stop_gradient(scale)), False
    if columns.shape[1] > 1:
        triangle = np.linalg.qr(columns / scale, mode="r") / np.sqrt(n)
        share = np.abs(np.diagonal(triangle))
        if len(share) == len(scale) and DEPENDENT < share.min() < NEAR:
            signs = np.where(np.diagonal(triangle) < 0, -1.0, 1.0)
            return (signs[:, None] * triangle * scale).astype(columns.dtype), True
    return np.diag(scale).astype(columns.dtype), False


def _lower(root: Array, like: Array) -> Array:
    """Lower Cholesky factor (q, q) of a root of the same rank as the factor `like`."""
    tolerance = 8 * float(jnp.finfo(root.dtype).eps)
    rank = jnp.sum(linalg.diagonal(like) > 0, axis=0)
    return unstructured.lower_factor(root, tolerance, rank)
