"""A structure in several parts, of rows that are independent of those of the other parts.

Log-determinants, gram matrices and all their derivatives add up; the parts have the same random
terms, and so the same omega.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxreml.backend.lazy import record
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Marginal, Projection

Array = Any  # NumPy's or JAX's


@record
@dataclass(frozen=True)
class Parts:
    """See above; one part at least. `Projection.inner` and `cross` are tuples of theirs.

    Attributes:
        parts: structures, the first of which has what no part's random effects explain.
    """

    parts: tuple[Any, ...]

    costly = False

    @property
    def evaluated(self) -> Parts:
        """As `OfColumns.evaluated`."""
        return self

    @property
    def written_out(self) -> bool:
        return all(part.written_out for part in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.parts[0].sizes

    @property
    def lanes(self) -> tuple[int, ...]:
        return self.parts[0].lanes

    def marginal(self, omega: Array) -> Marginal:
        found = [part.marginal(omega) for part in self.parts]
        return Marginal(_sum(own.logdet for own in found), _sum(own.gram for own in found))

    def project(self, omega: Array) -> Projection:
        found = [part.project(omega) for part in self.parts]
        return Projection(
            _sum(own.logdet for own in found),
            _sum(own.gram for own in found),
            tuple(own.inner for own in found),
            tuple(own.cross for own in found),
        )

    def _each(self, projection: Projection, of: Callable[[Any, Projection], Array]) -> Array:
        pairs = zip(self.parts, projection.inner, projection.cross, strict=True)
        return _sum(
            of(part, projection._replace(inner=inner, cross=cross)) for part, inner, cross in pairs
        )

    def slope(self, projection: Projection) -> Array:
        return self._each(projection, lambda part, own: part.slope(own))

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        return self._each(projection, lambda part, own: part.curvature(own, matrix, weights))

    def spread(self, projection: Projection, matrix: Array) -> Array:
        return self._each(projection, lambda part, own: part.spread(own, matrix))

    def form(self, cross: Any, matrix: Array) -> Array:
        pairs = zip(self.parts, cross, strict=True)
        return _sum(part.form(own, matrix) for part, own in pairs)

    def combined(self, matrix: Array, absent: Array) -> Parts:
        """As `OfColumns.combined`: absent columns are the first part's."""
        first, *others = self.parts
        parts = [first.combined(matrix, absent)]
        return replace(
            self, parts=(*parts, *(part.combined(matrix, 0 * absent) for part in others))
        )

    def start(self) -> None:
        return None

    def silent(self) -> Any:
        return tuple(part.silent() for part in self.parts)

    def respond(self, p: int, response: Response) -> Parts:
        """Scores are those of the parts; what they leave is the first one's."""
        scores = response.scores
        rest = {"remainder_xy": response.remainder_xy, "remainder_yy": response.remainder_yy}
        parts = []
        for part, own in zip(self.parts, scores, strict=True):
            parts.append(part.respond(p, response._replace(scores=own, **rest)))
            rest = {name: np.zeros_like(value) for name, value in rest.items()}
        return replace(self, parts=tuple(parts))


def _sum(values: Any) -> Any:
    first, *others = values
    for other in others:
        first = first + other
    return first
