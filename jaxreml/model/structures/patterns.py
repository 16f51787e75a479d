"""Classes of levels with the same F, by the cross-products of their scores: none costs more for
more levels.

Levels of a class share P = I + F Omega F', so that all that a likelihood needs of their scores c_j
is S = sum_j c_j c_j', a matrix of (effect, column) pairs:

    gram = T + sum over classes, effects a and b of (P^-1)_ab S_ab        S_ab is (p + 1, p + 1)

and D_j = F' P^-1 c_j occurs in derivatives as sum_j D_j D_j' = (F' P^-1 x I) S (P^-1 F x I).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Marginal, Projection
from jaxreml.model.structures.grouped import Levels

Array = np.ndarray


@record
@dataclass(frozen=True)
class Patterns(Levels):
    """See above; C classes, on the host.

    Attributes:
        factors: (q, q, C), F.
        counts: (C,), levels of each class.
        products: (C, q, q, p + 1, p + 1), S_ab.
        remainder: (p + 1, p + 1), as in `Grouped`.
        sizes: effects per term, static; they sum to q.
    """

    factors: Array
    counts: Array
    products: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})

    lanes = ()

    def repeat(self, inner: Array) -> Array:
        return inner * self.counts

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        factor = self._cholesky(self._omega(omega))
        return factor, 2 * np.sum(self.counts * np.log(linalg.diagonal(factor)))

    def _gram(self, inverse: Array) -> Array:
        """Of L^-1, (q, q, C), P = L L'."""
        precision = linalg.matmul(linalg.transpose(inverse), inverse)
        flat = np.moveaxis(precision, 2, 0).reshape(1, -1)
        k = len(self.remainder)
        return self.remainder + (flat @ self.products.reshape(-1, k * k)).reshape(k, k)

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        return Marginal(logdet, self._gram(_inverse(factor)))

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        inverse = _inverse(factor)
        loadings = linalg.matmul(inverse, self.factors)
        across = linalg.transpose(loadings)
        half = np.moveaxis(linalg.matmul(across, inverse), 2, 0)  # F' P^-1 of each class
        count, q, _, k, _ = self.products.shape
        cross = half @ self.products.reshape(count, q, -1)
        cross = half[:, None] @ cross.reshape(count, q, q, k * k)
        inner = linalg.matmul(across, loadings)
        return Projection(logdet, self._gram(inverse), inner, cross.reshape(self.products.shape))

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        """D W D' for W = matrix diag(weights) matrix', (q, q, C)."""
        flat = ((matrix * weights) @ matrix.T).reshape(-1)
        count, q = cross.shape[:2]
        return np.moveaxis((cross.reshape(-1, flat.size) @ flat).reshape(count, q, q), 0, 2)

    def form(self, cross: Array, matrix: Array) -> Array:
        total = cross.sum(axis=0)
        rows, columns = natural.effects_of_omega(self.sizes)
        moved = total[rows, columns]
        both = moved + np.where((rows == columns)[:, None, None], 0.0, moved.swapaxes(1, 2))
        return matrix.T @ both @ matrix

    def spread(self, projection: Projection, matrix: Array) -> Array:
        cross = matrix.T @ projection.cross @ matrix  # (C, q, q, k, k)
        basis, k = natural.symmetric_basis(self.sizes), matrix.shape[1]
        m = len(basis)
        found = np.zeros((m, k, m, k))
        inner = np.moveaxis(projection.inner, 2, 0)
        for j, right in enumerate(basis):
            # Sum over classes of E_i B E_j, whose entries (a, b) meet D_a and D_b.
            both = np.einsum("cabuv,cdb->aduv", cross, inner @ right)
            found[:, :, j] = np.einsum("iad,aduv->iuv", basis, both)
        return found

    def combined(self, matrix: Array, absent: Array) -> Patterns:
        """As `OfColumns.combined`."""
        gram = matrix.T @ self.remainder @ matrix + np.diag(absent)
        return replace(self, products=matrix.T @ self.products @ matrix, remainder=gram)

    def silent(self) -> Array:
        """Cross-products of a response with all columns, (C, q, q, p + 1)."""
        return np.zeros(self.products.shape[:4], self.products.dtype)

    def respond(self, p: int, response: Response) -> Patterns:
        """With scores as `silent` has them: [X y]'s with y's."""
        products = self.products.copy()
        products[..., : p + 1, p] = response.scores
        products[..., p, : p + 1] = response.scores.swapaxes(1, 2)
        of_y = response.remainder_xy, response.remainder_yy
        return replace(
            self, products=products, remainder=linalg.border(self.remainder[:p, :p], *of_y)
        )


def _inverse(factor: Array) -> Array:
    return linalg.solve_lower(factor, np.broadcast_to(linalg.eye_like(factor), factor.shape))
