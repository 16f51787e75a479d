"""`Grouped` for many responses of one design, the lanes of a batch on the last axis.

What the responses share, the scores of X, is never repeated per response: its cross-products enter
as constants of matrix products with P^-1 and its derivatives, which hold all that depends on a
response's Omega. So a step of a batch is a few elementwise operations per level, which vectorise
over the lanes, and matrix products of the full width of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import among, namespace
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Marginal, Projection
from jaxreml.model.structures.grouped import Levels

Array = Any  # NumPy's or JAX's


class Cross(NamedTuple):
    """D = F' P^-1 c, its part of X as a factor: c is shared.

    Attributes:
        left: (q, q, J, B), F' P^-1.
        response: (q, J, B), the column of y.
    """

    left: Array
    response: Array


@record
@dataclass(frozen=True)
class GroupedBatch(Levels):
    """Cross-products of one grouping factor with J levels and B responses.

    `omega` and results have the B lanes on a last axis; lanes may also be 1.

    Attributes:
        factors: (q, q, J, 1), as in `Grouped`.
        counts: (J, 1), how many levels with this F an entry stands for in log|V0| and its
            derivatives: 1, or another number where levels were collapsed (`Collapse`).
        scores_x: (q, p, J), Q'X.
        pairs: (p(p + 1)/2, q(q + 1)/2, J), `cross_products` of them.
        scores_y: (q, J, B), Q'y.
        remainder: (p + 1, p + 1, B), as in `Grouped`.
        sizes: effects per term, static; they sum to q.
    """

    factors: Array
    counts: Array
    scores_x: Array
    pairs: Array
    scores_y: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})

    @property
    def _q(self) -> int:
        return sum(self.sizes)

    @property
    def _p(self) -> int:
        return self.scores_x.shape[1]

    def respond(self, p: int, response: Response) -> GroupedBatch:
        of_y = response.remainder_xy, response.remainder_yy
        of_x = self.remainder[:p, :p, :1]
        xp = namespace(of_x, response.remainder_yy)
        of_x = xp.broadcast_to(of_x, (p, p, *np.shape(response.remainder_yy)))
        return replace(self, scores_y=response.scores, remainder=linalg.border(of_x, *of_y))

    def among(self, places: np.ndarray) -> GroupedBatch:
        """Some of the lanes, on the host."""
        scores, remainder = among((self.scores_y, self.remainder), places)
        return replace(self, scores_y=scores, remainder=remainder)

    def silent(self) -> np.ndarray:
        q, _, levels = self.scores_x.shape
        return np.zeros((q, levels, 1), self.scores_x.dtype)

    def marginal(self, omega: Array) -> Marginal:
        return self._marginal(omega)[0]

    def _marginal(self, omega: Array) -> tuple[Marginal, Array, Array]:
        """It, L^-1 and L^-1 of the column of y, P = L L'."""
        factor = self._cholesky(self._omega(omega))
        pivots, xp = linalg.diagonal(factor), namespace(factor)
        logdet = 2 * xp.sum(self.counts * xp.log(xp.prod(pivots, axis=0)), axis=0)

        inverse = linalg.solve_lower(factor, linalg.eye_like(factor))
        half = linalg.matmul(inverse, self.scores_y[:, None])
        weighted = linalg.matmul(linalg.transpose(inverse), half)[:, 0]
        precision = linalg.matmul(linalg.transpose(inverse), inverse)
        gram = self.remainder + self._products(
            precision, weighted, xp.sum(half * half, axis=(0, 1, 2))
        )
        return Marginal(logdet, gram), inverse, half

    def project(self, omega: Array) -> Projection:
        (logdet, gram), inverse, half = self._marginal(omega)
        across = linalg.transpose(linalg.matmul(inverse, self.factors))
        cross: Any = Cross(linalg.matmul(across, inverse), linalg.matmul(across, half)[:, 0])
        return Projection(logdet, gram, linalg.matmul(across, linalg.transpose(across)), cross)

    def _products(self, left: Array, middle: Array, right: Array) -> Array:
        """Sums over levels [cx' left cx, cx' middle; ., right], (p + 1, p + 1, B).

        Args:
            left: (q, q, J, B or 1), symmetric.
            middle: (q, J, B).
            right: (B,).
        """
        lower = left[natural.triangle(self._q)]
        lanes, xp = right.shape, namespace(right)
        packed = xp.tensordot(self.pairs, lower, axes=((1, 2), (0, 1)))
        of_x = packed[natural.places(self._p)]
        of_x = xp.broadcast_to(of_x, (*of_x.shape[:2], *lanes))
        of_xy = xp.tensordot(self.scores_x, middle, axes=((0, 2), (0, 1)))
        return linalg.border(of_x, of_xy, right)

    def repeat(self, inner: Array) -> Array:
        return inner * self.counts

    def form(self, cross: Any, matrix: Array) -> Array:
        left, response = cross
        xp = namespace(response)
        forms = []
        for a, b in zip(*natural.effects_of_omega(self.sizes), strict=True):
            # E = e_a e_b' and, off the diagonal, its transpose
            inside = left[a][:, None] * left[b]
            middle = left[a] * response[b]
            right = xp.sum(response[a] * response[b], axis=0)
            if a == b:
                products = self._products(inside, middle, right)
            else:
                middle = middle + left[b] * response[a]
                inside = inside + linalg.transpose(inside)
                products = self._products(inside, middle, 2 * right)
            inner = linalg.matmul(products, matrix)
            forms.append(linalg.matmul(linalg.transpose(matrix), inner))
        return xp.stack(forms)

    def combine(self, cross: Any, matrix: Array) -> Array:
        """D @ matrix, (q, k, J, B), for (p + 1, k, B)."""
        left, response = cross
        p, xp = self._p, namespace(response)
        of_x = xp.tensordot(self.scores_x, matrix[:p], axes=((1,), (0,))).swapaxes(1, 2)
        return linalg.matmul(left, of_x) + response[:, None] * matrix[p, :, None]

    def outer(self, cross: Any, matrix: Array, weights: Array) -> Array:
        left, response = cross
        p, q, xp = self._p, self._q, namespace(response)
        total = linalg.matmul(matrix * weights, linalg.transpose(matrix))
        rows, columns = natural.triangle(p)
        twice = np.where(rows == columns, 1.0, 2.0)[:, None]
        pairs = xp.moveaxis(self.pairs, 0, 2)
        packed = xp.tensordot(pairs, total[rows, columns] * twice, axes=1)
        halves = np.where(np.equal(*natural.triangle(q)), 1.0, 0.5)
        inside = (packed * halves[:, None, None])[natural.places(q)]
        of_y = xp.tensordot(self.scores_x, total[:p, p], axes=((1,), (0,)))
        of_y = linalg.matmul(left, of_y[:, None])[:, 0] + total[p, p] / 2 * response
        across = of_y[:, None] * response
        of_x = linalg.matmul(linalg.matmul(left, inside), linalg.transpose(left))
        return of_x + across + linalg.transpose(across)


def cross_products(scores_x: Array) -> Array:
    """What cx' S cx, (p, p), is a linear map of: (p(p + 1)/2, q(q + 1)/2, J) for scores (q, p, J).

    Of the result and of the symmetric S, the lower `covariance.triangle`.
    """
    q, p, _ = scores_x.shape
    rows, columns = natural.triangle(q)
    u, v = natural.triangle(p)
    first, second = (scores_x.swapaxes(0, 1)[own] for own in (u, v))
    twice = (rows != columns)[:, None]
    return first[:, rows] * second[:, columns] + twice * first[:, columns] * second[:, rows]
