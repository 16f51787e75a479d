"""Subjects with residuals at times of their own: V0 is one matrix for each subject.

V_j = R_j + Z_j Omega Z_j' with R_j correlations of the distances of its times, a function of one
coordinate, the last of omega. Subjects with equally many rows are factorised at once, and no array
is larger than the rows of a subject squared, times some subjects. V is linear in the random
effects' covariances and not in the coordinate, so that beside the contractions of `base` there are
tr(V^-1 V_zz) and D'V_zz D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.lazy import record
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance import jets, natural
from jaxreml.model.covariance.timed import Timed
from jaxreml.model.structures.base import Marginal, OfRows, Projection
from jaxreml.model.structures.chain import Chain, best_coordinate

Array = Any  # NumPy's or JAX's
MOST_ROWS = 2000  # of a subject whose matrix is written out
TOGETHER = 2**20  # numbers of the matrices that are worked on at a time


class Cross(NamedTuple):
    """D = V0^-1 [X y] and what it meets; rows in the order of the structure.

    Attributes:
        weighted: (n, k), D.
        moved: (n, k), V_z D.
        effects: (J, q, k), Z'D of each subject.
    """

    weighted: Array
    moved: Array
    effects: Array


class Inner(NamedTuple):
    """What derivatives are made of besides.

    Attributes:
        slope, second: (m,) and (m, m), derivatives of log|V0|.
        effects: (n, q), L^-1 Z, V = L L'.
        moved: (n, k), L^-1 V_z D.
        bent: (n, k), V_zz D.
        products: (J, q, q), Z'V^-1 Z.
    """

    slope: Array
    second: Array
    effects: Array
    moved: Array
    bent: Array
    products: Array


class Piece(NamedTuple):
    """Subjects with equally many rows: where their rows and they themselves are in the order, and
    how many of how many rows."""

    rows: slice
    subjects: slice
    shape: tuple[int, int]


@record
@dataclass(frozen=True)
class Series(OfRows):
    """See above; J subjects.

    Attributes:
        scores: (n, p + 1), [X y], subjects of equally many rows one after the other.
        times: (n,).
        effects: (n, q), Z of all random terms.
        order: (n,), the row of the data that each is.
        levels: (J,), the level that each subject is.
        remainder: (p + 1, p + 1), zeros.
        sizes: effects per term, the last 1 for the coordinate; static.
        shapes: (subjects, rows) one after the other; static.
        law: of the distances, static.
        linear: whether second derivatives leave out those of V; static.
    """

    scores: Array
    times: Array
    effects: Array
    order: Array
    levels: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})
    shapes: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    law: Timed = field(metadata={"static": True})
    linear: bool = field(default=False, metadata={"static": True})

    @property
    def _random(self) -> tuple[int, ...]:
        return self.sizes[:-1]

    @property
    def _basis(self) -> Array:
        """The matrices E_i of the random effects, (m - 1, q, q)."""
        if not self._random:
            return np.zeros((0, 0, 0))
        return natural.symmetric_basis(self._random)

    def _pieces(self) -> Iterator[Piece]:
        row = subject = 0
        for count, length in self.shapes:
            rows = slice(row, row := row + count * length)
            yield Piece(rows, slice(subject, subject := subject + count), (count, length))

    def _factorised(self, piece: Piece, omega: Array) -> tuple[Any, Array, Array]:
        """R as a Jet (..., B, n, n) of the coordinate, L^-1, and log|V| of all of them."""
        xp = namespace(omega, self.times, self.effects)
        times = self.times[piece.rows].reshape(piece.shape)
        distances = abs(times[:, :, None] - times[:, None])
        one = xp.ones(distances.shape, times.dtype)
        z = jets.Jet(omega[-1] * one, one[None], xp.zeros((1, 1, *one.shape), times.dtype))
        found = self.law.correlation.of_distance(z, distances)
        V = found.value
        if self._random:
            Z = self.effects[piece.rows].reshape(*piece.shape, -1)
            V = V + Z @ xp.tensordot(omega[:-1], self._basis, axes=1) @ Z.swapaxes(1, 2)
        return found, *linalg.whitening(V)

    def marginal(self, omega: Array) -> Marginal:
        logdet, gram = 0.0, self.remainder
        for piece in self._pieces():
            _, inverse, log = self._factorised(piece, omega)
            white = inverse @ self.scores[piece.rows].reshape(*piece.shape, -1)
            white = white.reshape(-1, white.shape[2])
            logdet, gram = logdet + log, gram + white.T @ white
        return Marginal(logdet, gram)

    def project(self, omega: Array) -> Projection:
        pieces = [self._of_piece(piece, omega) for piece in self._pieces()]
        total = [sum(own[1:], own[0]) for own in zip(*(sums for sums, _ in pieces), strict=True)]
        xp = namespace(*total)
        columns = zip(*(own for _, own in pieces), strict=True)
        D, moved, of_effects, *others = (xp.concatenate(own) for own in columns)
        logdet, gram, slope, second = total
        inner = Inner(slope, second, *others)
        return Projection(logdet, self.remainder + gram, inner, Cross(D, moved, of_effects))

    def _of_piece(self, piece: Piece, omega: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """What a piece adds to log|V0|, to the gram matrix and to the derivatives of log|V0|; and
        its part of what `Cross` and `Inner` have, in their order."""
        law, inverse, logdet = self._factorised(piece, omega)
        xp, kind = namespace(inverse), inverse.dtype

        def of(columns: Array) -> Array:
            return columns[piece.rows].reshape(*piece.shape, columns.shape[1])

        def flat(columns: Array) -> Array:
            return columns.reshape(columns.shape[0] * columns.shape[1], columns.shape[2])

        first, twice = law.first[0], law.second[0, 0]
        across = inverse.swapaxes(1, 2)
        white = inverse @ of(self.scores)
        D, rows = across @ white, flat(white)
        moving = first @ D
        precision = across @ inverse
        both = precision @ first  # V^-1 V_z
        own = -xp.einsum("bij,bji->", both, both)
        if not self.linear:
            own = own + xp.einsum("bij,bij->", precision, twice)
        slope, second = xp.einsum("bii->", both)[None], own[None, None]
        q = sum(self._random)
        Z = of(self.effects) if q else xp.zeros((*piece.shape, 0), kind)
        whitened = inverse @ Z
        products = whitened.swapaxes(1, 2) @ whitened
        of_effects = Z.swapaxes(1, 2) @ D
        if q:
            basis = self._basis
            meeting = both @ (across @ whitened)  # V^-1 V_z V^-1 Z
            mixed = xp.einsum("bna,bnc->ac", Z, meeting)
            crossing = -xp.einsum("iac,ac->i", basis, mixed)
            turned = xp.einsum("iab,jbc->ijac", basis, products)  # E_i B
            corner = -xp.einsum("xjac,yjca->xy", turned, turned)
            slope = xp.append(xp.einsum("iab,jab->i", basis, products), slope)
            second = linalg.border(corner, crossing, own)
        columns = (D, moving, whitened, inverse @ moving, twice @ D)
        D, moved, whitened, white_moved, bent = (flat(own) for own in columns)
        return (logdet, rows.T @ rows, slope, second), (
            D,
            moved,
            of_effects,
            whitened,
            white_moved,
            bent,
            products,
        )

    def slope(self, projection: Projection) -> Array:
        return projection.inner.slope

    def form(self, cross: Cross, matrix: Array) -> Array:
        cross = self.combine(cross, matrix)
        found = []
        for a, b in (
            zip(*natural.effects_of_omega(self._random), strict=True) if self._random else ()
        ):
            product = cross.effects[:, a].T @ cross.effects[:, b]
            found.append(product if a == b else product + product.T)
        last = cross.weighted.T @ cross.moved
        return namespace(last).stack([*found, last])

    def combine(self, cross: Cross, matrix: Array) -> Cross:
        return Cross(*(own @ matrix for own in cross))

    def spread(self, projection: Projection, matrix: Array) -> Array:
        """By the products of L^-1 V_i D."""
        inner, k = projection.inner, matrix.shape[1]
        xp = namespace(inner.moved, matrix)
        parts = [(inner.moved @ matrix)[:, None]]
        if self._random:
            # Z E_i C, each row with its subject's
            columns = xp.einsum("iab,jbk->jaik", self._basis, projection.cross.effects @ matrix)
            subjects = np.repeat(np.arange(len(self.levels)), self._lengths)
            of_rows = xp.einsum("na,naik->nik", inner.effects, columns[subjects])
            parts.insert(0, of_rows)
        flat = xp.concatenate(parts, axis=1)
        m = flat.shape[1]
        flat = flat.reshape(len(flat), -1)
        return (flat.T @ flat).reshape(m, k, m, k)

    @property
    def _lengths(self) -> Array:
        """(J,), rows of each subject."""
        return np.concatenate([np.full(count, length) for count, length in self.shapes])

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        xp, spread = namespace(matrix, weights), self.spread(projection, matrix)
        found = projection.inner.second + 2 * xp.einsum("ikjk,k->ij", spread, weights)
        if self.linear:
            return found
        D = projection.cross.weighted @ matrix
        bent = xp.einsum("nk,nk,k->", D, projection.inner.bent @ matrix, weights)
        last = np.arange(len(found)) == len(found) - 1
        return found - bent * (last[:, None] & last)

    def start(self) -> Array:
        """The coordinate with the lowest criterion by maximum likelihood of some, the random
        effects' relative variances being small."""
        variances = [0.1 * np.equal(*natural.triangle(q)) for q in self._random]
        others = np.concatenate([np.zeros(0), *variances]).astype(self.scores.dtype)
        return best_coordinate(self, namespace(self.scores).asarray(others), self._gaps())

    def _gaps(self) -> Array:
        xp, found = namespace(self.times), [np.zeros(0)]
        for rows, _, shape in self._pieces():
            found.append(xp.diff(self.times[rows].reshape(shape), axis=1).ravel())
        return xp.concatenate(found)

    def modes(self, omega: Array, cross: Cross) -> tuple[Array, ...]:
        """Those of random effects; last, V0^-1 of what is explained, of each row, (n, 1)."""
        found, start = [], 0
        matrices = natural.symmetric_matrices(omega[:-1], self._random)
        for matrix in matrices:
            own = slice(start, start := start + len(matrix))
            values = np.zeros((len(self.levels), len(matrix)))
            values[self.levels] = cross.effects[:, own, 0] @ matrix
            found.append(values)
        rows = np.empty((len(self.order), 1))
        rows[self.order] = cross.weighted
        return (*found, rows)

    def posterior_by_omega(self, inner: Inner, omega: Array) -> Array | None:
        """Omega - Omega B Omega of the random effects, (J, q, q); None without any."""
        if not self._random:
            return None
        matrix = np.tensordot(omega[:-1], self._basis, axes=1)
        found = np.empty_like(inner.products)
        found[self.levels] = matrix - matrix @ inner.products @ matrix
        return found

    def variances(self, posterior: Array) -> tuple[Array, ...]:
        ends = np.cumsum((0, *self._random))
        return tuple(posterior[:, a:b, a:b] for a, b in pairwise(ends))


@record
@dataclass(frozen=True)
class SeriesBasis:
    """Rows of subjects in the order of `Series`.

    Attributes:
        order: (n,), rows.
        levels: (J,), of the subjects in order.
        times: (n,), in order.
        effects: (n, q), in order.
        shapes, law: as in `Series`, static.
    """

    order: Any
    levels: Any
    times: Any
    effects: Any
    shapes: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    law: Timed = field(metadata={"static": True})

    @staticmethod
    def of(codes: Array, effects: Array, times: Array, law: Timed) -> SeriesBasis:
        """Of levels (n,), columns of random effects (n, q) and times (n,).

        Raises:
            DataError: a subject with more rows than a matrix may have; traced levels or times.
        """
        if not on_host(codes, times):
            raise DataError(
                "residuals at times of each subject's own need concrete subjects and times, which "
                "say what the neighbours are; the response, X, weights, offset and the effects of "
                "random terms may be traced"
            )
        counts = np.bincount(codes)
        order = np.lexsort((times, codes, counts[codes]))
        levels = np.flatnonzero(counts)
        levels = levels[np.argsort(counts[levels], kind="stable")]
        longest = int(counts.max())
        if longest > MOST_ROWS and not (law.correlation.markov and not effects.shape[1]):
            what = "random effects beside it" if law.correlation.markov else "this correlation"
            raise DataError(
                f"a subject has {longest:,} rows, and with {what} its covariance is a matrix of "
                f"{longest:,} x {longest:,}; there may be {MOST_ROWS:,}. Without random effects, "
                "sp_exp and ar1 take any number"
            )
        shapes: list[tuple[int, int]] = []
        for length, count in zip(*np.unique(counts[levels], return_counts=True), strict=True):
            most = max(TOGETHER // int(length) ** 2, 1)
            whole, rest = divmod(int(count), most)
            shapes += [(most, int(length))] * whole + [(rest, int(length))] * (rest > 0)
        return SeriesBasis(order, levels, times[order], effects[order], tuple(shapes), law)

    def project(self, columns: Any) -> tuple[Any, Any]:
        """All of (n, k) columns, in order, and nothing of what is left."""
        return columns[self.order], namespace(columns).zeros(columns.shape, columns.dtype)

    def scores(self, columns: Any) -> Any:
        return columns[self.order]

    def products(self, columns: Any) -> None:
        """All derivatives are those of the scores and effects."""

    def structure(
        self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Series | Chain:
        """A chain where nothing but neighbours matter."""
        if self.law.correlation.markov and len(sizes) == 1:
            lengths = np.concatenate([np.full(count, length) for count, length in self.shapes])
            first = np.zeros(len(self.order), bool)
            first[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = True
            return Chain(scores, self.times, first, self.order, remainder, sizes, self.law)
        return Series(
            scores,
            self.times,
            self.effects,
            self.order,
            self.levels,
            remainder,
            sizes,
            self.shapes,
            self.law,
        )
