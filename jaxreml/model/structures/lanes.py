"""`Grouped` for many responses of one design, the lanes of a batch on the last axis.

What the responses share, the scores of X, is never repeated per response: its cross-products enter
as constants of matrix products with P^-1 and its derivatives, which hold all that depends on a
response's Omega. So a step of a batch is a few elementwise operations per level, which vectorise
over the lanes, and matrix products of the full width of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add, mul
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import among, namespace
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Marginal, Projection
from jaxreml.model.structures.grouped import Levels, pairing

Array = Any  # NumPy's or JAX's
Entries = dict[tuple[int, int], Any]  # of a triangle, each (J, B)


class Cross(NamedTuple):
    """D = F' P^-1 c, its part of X as a factor: c is shared.

    Attributes:
        left: F' P^-1, rows of entries (J, B).
        response: per effect (J, B), the column of y.
    """

    left: tuple[tuple[Array, ...], ...]
    response: tuple[Array, ...]


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

    @property
    def lanes(self) -> tuple[int, ...]:
        return (1,)

    def silent(self) -> np.ndarray:
        q, _, levels = self.scores_x.shape
        return np.zeros((q, levels, 1), self.scores_x.dtype)

    def marginal(self, omega: Array) -> Marginal:
        return self._marginal(omega)[0]

    def _marginal(self, omega: Array) -> tuple[Marginal, Entries, list[Array], Array, list[Array]]:
        """It; with P = L L' what derivatives are made of: the entries of L^-1, the columns of y of
        L^-1 c and of P^-1 c between them the lower triangle of P^-1, (t, J, B)."""
        factor, inverse = self._factorise(omega)
        q, xp = self._q, namespace(omega)
        pivots = reduce(mul, [factor[i, i] for i in range(q)])
        logdet = 2 * xp.sum(self.counts * xp.log(pivots), axis=0)
        half = [_sum(inverse[i, k] * self.scores_y[k] for k in range(i + 1)) for i in range(q)]
        weighted = [_sum(inverse[k, i] * half[k] for k in range(i, q)) for i in range(q)]
        precision = xp.stack(
            [_sum(inverse[k, i] * inverse[k, j] for k in range(i, q)) for i, j in _lower(q)]
        )
        squares = _sum(xp.sum(own * own, axis=0) for own in half)
        gram = self.remainder + self._products(precision, xp.stack(weighted), squares)
        return Marginal(logdet, gram), inverse, half, precision, weighted

    def _factorise(self, omega: Array) -> tuple[Entries, Entries]:
        """Lower triangles L and L^-1 of P = I + F Omega F', by entries."""
        q, xp = self._q, namespace(omega)
        basis, factors = natural.symmetric_basis(self.sizes), self.factors[..., 0]
        inside = xp.einsum("iaJ,mab,jbJ->ijJm", factors, basis.astype(factors.dtype), factors)
        packed = xp.tensordot(inside[tuple(np.transpose(_lower(q)))], omega, axes=1)
        rest = dict(zip(_lower(q), packed, strict=True))
        factor: Entries = {}
        inverse: Entries = {}
        for j in range(q):
            pivot = rest[j, j] + 1.0
            for k in range(j):
                pivot = pivot - factor[j, k] * factor[j, k]
            factor[j, j] = xp.sqrt(pivot)
            inverse[j, j] = 1 / factor[j, j]
            for i in range(j + 1, q):
                entry = rest[i, j]
                for k in range(j):
                    entry = entry - factor[i, k] * factor[j, k]
                factor[i, j] = entry * inverse[j, j]
        for i in range(q):
            for j in range(i):
                total = _sum(factor[i, k] * inverse[k, j] for k in range(j, i))
                inverse[i, j] = -total * inverse[i, i]
        return factor, inverse

    def project(self, omega: Array) -> Projection:
        (logdet, gram), inverse, _, precision, weighted = self._marginal(omega)
        q, F, places = self._q, self.factors, natural.places(self._q)
        effects = range(q)
        left = tuple(
            tuple(_sum(F[c, a] * precision[places[c, b]] for c in range(a + 1)) for b in effects)
            for a in effects
        )
        response = tuple(_sum(F[c, a] * weighted[c] for c in range(a + 1)) for a in effects)
        loadings = [
            [_sum(inverse[i, k] * F[k, a] for k in range(min(i, a) + 1)) for a in effects]
            for i in effects
        ]
        inner = [_sum(own[a] * own[b] for own in loadings) for a, b in _lower(q)]
        return Projection(logdet, gram, namespace(omega).stack(inner), Cross(left, response))

    def _products(self, left: Array, middle: Array, right: Array) -> Array:
        """Sums over levels [cx' left cx, cx' middle; ., right], (p + 1, p + 1, B).

        Args:
            left: (t, J, B or 1), the lower triangle of a symmetric (q, q).
            middle: (q, J, B).
            right: (B,).
        """
        lanes, xp = right.shape, namespace(right)
        packed = xp.tensordot(self.pairs, left, axes=((1, 2), (0, 1)))
        of_x = packed[natural.places(self._p)]
        of_x = xp.broadcast_to(of_x, (*of_x.shape[:2], *lanes))
        of_xy = xp.tensordot(self.scores_x, middle, axes=((0, 2), (0, 1)))
        return linalg.border(of_x, of_xy, right)

    def slope(self, projection: Projection) -> Array:
        xp = namespace(projection.inner)
        totals = xp.sum(projection.inner * self.counts, axis=1)
        rows, columns = natural.effects_of_omega(self.sizes)
        twice = np.where(rows == columns, 1.0, 2.0).astype(totals.dtype)[:, None]
        return totals[natural.places(self._q)[rows, columns]] * twice

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        inner = projection.inner
        right = self._outer(projection.cross, matrix, weights) - inner * self.counts / 2
        flat = linalg.row_products(inner, right)
        flat = flat.reshape(-1, *flat.shape[2:])
        xp, m = namespace(flat), natural.count_theta(self.sizes)
        half = xp.tensordot(pairing(self.sizes).astype(flat.dtype), flat, axes=1)
        half = half.reshape(m, m, *flat.shape[1:])
        return half + linalg.transpose(half)

    def _outer(self, cross: Cross, matrix: Array, weights: Array) -> Array:
        """D W D', the lower triangle (t, J, B), for W = matrix diag(weights) matrix'."""
        left, response = cross
        p, q, xp = self._p, self._q, namespace(matrix)
        total = linalg.matmul(matrix * weights, linalg.transpose(matrix))
        rows, columns = natural.triangle(p)
        twice = np.where(rows == columns, 1.0, 2.0)[:, None]
        packed = xp.tensordot(self.pairs, total[rows, columns] * twice, axes=((0,), (0,)))
        inside = [own if i == j else own / 2 for (i, j), own in zip(_lower(q), packed, strict=True)]
        of_xy = xp.tensordot(self.scores_x, total[:p, p], axes=((1,), (0,)))
        effects, places = range(q), natural.places(q)
        of_y = [
            _sum(left[a][j] * of_xy[j] for j in effects) + total[p, p] / 2 * response[a]
            for a in effects
        ]
        half = [
            [_sum(left[a][j] * inside[places[j, i]] for j in effects) for i in effects]
            for a in effects
        ]
        return xp.stack(
            [
                _sum(half[a][i] * left[b][i] for i in effects)
                + of_y[a] * response[b]
                + of_y[b] * response[a]
                for a, b in _lower(q)
            ]
        )

    def form(self, cross: Cross, matrix: Array) -> Array:
        left, response = cross
        xp, q = namespace(matrix), self._q
        forms = []
        for a, b in zip(*natural.effects_of_omega(self.sizes), strict=True):
            # E = e_a e_b' and, off the diagonal, its transpose
            inside = [left[a][i] * left[b][j] for i, j in _lower(q)]
            middle = [left[a][i] * response[b] for i in range(q)]
            right = xp.sum(response[a] * response[b], axis=0)
            if a != b:
                turned = zip(inside, _lower(q), strict=True)
                inside = [own + left[b][i] * left[a][j] for own, (i, j) in turned]
                middle = [own + left[b][i] * response[a] for i, own in enumerate(middle)]
                right = 2 * right
            products = self._products(xp.stack(inside), xp.stack(middle), right)
            inner = linalg.matmul(products, matrix)
            forms.append(linalg.matmul(linalg.transpose(matrix), inner))
        return xp.stack(forms)

    def combine(self, cross: Cross, matrix: Array) -> Array:
        """D @ matrix, (q, k, J, B), for (p + 1, k, B)."""
        left, response = cross
        p, xp = self._p, namespace(matrix)
        of_x = xp.tensordot(self.scores_x, matrix[:p], axes=((1,), (0,))).swapaxes(1, 2)
        of_y = matrix[p, :, None]
        return xp.stack(
            [
                _sum(entry * own for entry, own in zip(row, of_x, strict=True)) + column * of_y
                for row, column in zip(left, response, strict=True)
            ]
        )

    def spread(self, projection: Projection, matrix: Array) -> Array:
        whole = projection.inner[natural.places(self._q)]
        return super().spread(projection._replace(inner=whole), matrix)


def _lower(q: int) -> list[tuple[int, int]]:
    """The places of a lower triangle in the order of `natural.triangle`."""
    return list(zip(*map(np.ndarray.tolist, natural.triangle(q)), strict=True))


def _sum(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


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
