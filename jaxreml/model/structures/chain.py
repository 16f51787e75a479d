r"""Subjects whose residuals depend on the one before alone: V0^-1 has neighbours only.

With r the correlation of a row with the one before it in time, and w = 1 / (1 - r^2), w = 1 and
r = 0 for the first row of a subject,

    log|V0| = -sum log w,    x'V0^-1 y = sum w (x_i - r x_{i-1})(y_i - r y_{i-1}),

so that everything is a sum over the rows with three weights, w, w r and w r^2, functions of the
coordinate with two derivatives. Any number of rows, of one subject or of many: n (p + 1)^2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import jets
from jaxreml.model.covariance.timed import Timed
from jaxreml.model.structures.base import Marginal, OfRows, Projection

Array = Any  # NumPy's or JAX's
FEW_GAPS = 64  # distances between neighbours up to which their cross-products are summed once


class Cross(NamedTuple):
    """Derivatives of the gram matrix, (k, k) each, and D, (n, k)."""

    slope: Array
    bend: Array
    weighted: Array


class Inner(NamedTuple):
    """Derivatives of log|V0|, and what V0^-1 and its derivative are made of: its diagonal and what
    is beside it, (n,)."""

    slope: Array
    bend: Array
    bands: Array
    bands_slope: Array


@record
@dataclass(frozen=True)
class Chain(OfRows):
    """See above.

    Attributes:
        scores: (n, p + 1), [X y], by subjects and times.
        times: (n,).
        first: (n,) booleans, the first row of a subject.
        order: (n,), the row of the data that each is.
        remainder: (p + 1, p + 1), zeros.
        sizes: (1,), static.
        law: of the distances, static.
        linear: whether second derivatives leave out those of V; static.
    """

    scores: Array
    times: Array
    first: Array
    order: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})
    law: Timed = field(metadata={"static": True})
    linear: bool = field(default=False, metadata={"static": True})

    @cached_property
    def gaps(self) -> Array:
        """(n,), times less those before; infinity for the first of a subject."""
        xp = namespace(self.times, self.first)
        return xp.where(self.first, np.inf, xp.diff(self.times, prepend=-np.inf))

    @cached_property
    def _classes(self) -> tuple[Array, Array | None, Array]:
        """Distances that occur but for infinity, which rows have each (infinity: the last), and how
        many. Traced, every row has its own, of which those of first rows count as none."""
        if not on_host(self.gaps):
            return self._apart, None, (~self.first).astype(self.scores.dtype)
        gaps, places = np.unique(self.gaps, return_inverse=True)
        kept = gaps[np.isfinite(gaps)]
        return kept, places, np.bincount(places, minlength=len(kept) + 1)[: len(kept)]

    @property
    def _apart(self) -> Array:
        """The gaps, with some number for first rows."""
        return namespace(self.gaps).where(self.first, 1.0, self.gaps)

    @cached_property
    def _products(self) -> Array | None:
        """Per distance sums of x x', x x_' + x_ x_' and x_ x_', (g, 3, k, k), where it has few; of
        first rows, last, x x' alone."""
        gaps, places, _ = self._classes
        if places is None or len(gaps) > FEW_GAPS:
            return None
        found = []
        for g in range(len(gaps)):
            rows = np.flatnonzero(places == g)
            found.append(_three(self.scores[rows], self.scores[rows - 1], np.ones((3, len(rows)))))
        first = self.scores[self.first]
        found.append(_three(first, first, np.array([[1.0], [0.0], [0.0]])))
        return np.array(found)

    def _weights(self, z: Array) -> tuple[Any, Any, Any]:
        """Jets of r, 1 - r^2 and [w, -w r, w r^2] at the distances that occur."""
        gaps = self._classes[0]
        xp = namespace(z, gaps)
        one = xp.ones(gaps.shape, gaps.dtype)
        at = jets.Jet(z * one, one[None], xp.zeros((1, 1, *one.shape), gaps.dtype))
        r = self.law.correlation.of_distance(at, gaps)
        left = 1.0 - r * r
        w = left**-1.0
        return r, left, jets.stack([w, -w * r, w * r * r])

    def _with_first(self, weights: Array, alone: float) -> Array:
        """(3, g) weights, and at the end those of the first row of a subject, whose first is
        `alone`."""
        xp = namespace(weights)
        last = xp.asarray([[alone], [0.0], [0.0]], weights.dtype)
        return xp.concatenate([weights, last], axis=1)

    def _of_rows(self, weights: Array, alone: float) -> Array:
        """The same for each row, (3, n)."""
        whole, (_, places, _) = self._with_first(weights, alone), self._classes
        if places is not None:
            return whole[:, places]
        return namespace(weights).where(self.first, whole[:, -1:], weights)

    def _gram(self, weights: Array, alone: float) -> Array:
        if self._products is not None:
            return np.tensordot(self._with_first(weights, alone).T, self._products, axes=2)
        before = namespace(self.scores).roll(self.scores, 1, axis=0)
        return _three(self.scores, before, self._of_rows(weights, alone)).sum(axis=0)

    def marginal(self, omega: Array) -> Marginal:
        _, left, weights = self._weights(omega[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            logdet = self._classes[2] @ namespace(omega).log(left.value)
        return Marginal(logdet, self.remainder + self._gram(weights.value, 1.0))

    def project(self, omega: Array) -> Projection:
        logdet, gram = self.marginal(omega)
        r, left, weights = self._weights(omega[0])
        counts = self._classes[2]
        along = left.first[0] / left.value
        w = weights.value[0]
        if self.linear:
            # tr(V^-1 V_z V^-1 V_z) by the innovations' scales and weights
            squares = (w * r.first[0]) ** 2
            bend = -(counts @ (4 * r.value**2 * squares + 2 * squares / w))
        else:
            bend = counts @ (left.second[0, 0] / left.value - along**2)
        cross = Cross(
            self._gram(weights.first[0], 0.0),
            self._gram(weights.second[0, 0], 0.0),
            self._times(bands := self._bands(weights.value, 1.0), self.scores),
        )
        inner = Inner(counts @ along, bend, bands, self._bands(weights.first[0], 0.0))
        return Projection(logdet, gram, inner, cross)

    def _bands(self, weights: Array, alone: float) -> Array:
        """Diagonal and lower diagonal of a matrix like V0^-1, (2, n), of (3, g) weights; `alone` is
        that of the first row of a subject."""
        own, beside, before = self._of_rows(weights, alone)
        xp = namespace(weights)
        diagonal = own + xp.append(before[1:], 0.0)
        return xp.stack([diagonal, xp.append(beside[1:], 0.0)])

    def _times(self, bands: Array, columns: Array) -> Array:
        """The matrix of `_bands` times (n, k)."""
        xp, lower = namespace(bands, columns), bands[1][:-1, None]
        none = xp.zeros_like(columns[:1])
        below = xp.concatenate([none, lower * columns[:-1]])
        above = xp.concatenate([lower * columns[1:], none])
        return bands[0][:, None] * columns + below + above

    def slope(self, projection: Projection) -> Array:
        return namespace(projection.inner.slope).reshape(projection.inner.slope, (1,))

    def form(self, cross: Cross, matrix: Array) -> Array:
        return -(matrix.T @ cross.slope @ matrix)[None]

    def combine(self, cross: Cross, matrix: Array) -> Cross:
        across = matrix.T
        slope, bend, weighted = cross
        return Cross(across @ slope @ matrix, across @ bend @ matrix, weighted @ matrix)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        """D'V_z V^-1 V_z D = (Q_z x)' V (Q_z x) for Q = V^-1: by a banded solution. On the host."""
        inner = projection.inner
        moved = self._times(inner.bands_slope, self.scores @ matrix)
        solved = scipy.linalg.solveh_banded(inner.bands, moved, lower=True)
        return (moved.T @ solved)[None, :, None]

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        inner, xp = projection.inner, namespace(matrix, weights)
        if self.linear:
            spread = self.spread(projection, matrix)[0, :, 0]
            return np.array([[inner.bend + 2 * np.diagonal(spread) @ weights]])
        bend = xp.einsum("ak,ab,bk,k->", matrix, projection.cross.bend, matrix, weights)
        return xp.reshape(inner.bend + bend, (1, 1))

    def start(self) -> Array:
        none = namespace(self.scores).zeros(0, self.scores.dtype)
        return best_coordinate(self, none, self.gaps)

    def modes(self, omega: Array, cross: Cross) -> tuple[Array, ...]:
        """V0^-1 of what is explained, of each row, (n, 1)."""
        rows = np.empty((len(self.order), 1))
        rows[self.order] = cross.weighted
        return (rows,)

    def posterior_by_omega(self, inner: Inner, omega: Array) -> None:
        """There are no random effects."""


def _three(rows: Array, before: Array, weights: Array) -> Array:
    """Weighted sums of x x', x x_' + x_ x' and x_ x_', (3, k, k)."""
    own, beside, other = weights[:, :, None]
    mixed = rows.T @ (beside * before)
    parts = [rows.T @ (own * rows), mixed + mixed.T, before.T @ (other * before)]
    return namespace(rows, weights).stack(parts)


def best_coordinate(structure: Any, others: Array, gaps: Array) -> Array:
    """omega with the coordinate whose criterion, -2 log likelihood with sigma2 profiled out, is
    lowest of some: correlations at the usual distance between neighbours from 0.1 to 0.95.

    Args:
        structure: of the rows.
        others: what omega has before the coordinate.
        gaps: distances between neighbours; infinite ones do not count.
    """
    usual = _median(gaps)
    xp = namespace(others, usual, structure.scores)
    values, places = [], []
    for common in (0.1, 0.4, 0.7, 0.9, 0.95):
        z = structure.law.correlation.with_correlation(common, usual)
        omega = xp.append(others, z)
        logdet, gram = structure.marginal(omega)
        values.append(logdet + 2 * len(structure.scores) * xp.log(linalg.cholesky(gram)[-1, -1]))
        places.append(omega)
    values = xp.stack(values)
    return xp.stack(places)[xp.argmin(xp.where(xp.isfinite(values), values, np.inf))]


def _median(gaps: Array) -> Array:
    """Of finite ones; 1 on the host if there are none."""
    if not on_host(gaps):
        xp = namespace(gaps)
        return xp.nanmedian(xp.where(xp.isfinite(gaps), gaps, np.nan))
    gaps = gaps[np.isfinite(gaps)]
    return np.median(gaps) if gaps.size else np.float64(1.0)
