"""The span that the random effects of several terms are worked on in: Z = Q F, Q'Q = I."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import record
from jaxreml.errors import DataError
from jaxreml.model.structures.base import Terms
from jaxreml.model.structures.grouped import GroupedBasis

Array = Any  # NumPy's or JAX's
MOST_NUMBERS = 2**28  # of Z as a dense matrix: 2 GB


class Part(NamedTuple):
    """F of one term.

    Attributes:
        seen: (J,), which of its levels have rows, or might have.
        codes, columns: (r,) places in `seen` and (r, q): a row of F has effects of one level only.
            None where it has those of several; then
        factors: (r, q, J), else None.
    """

    seen: np.ndarray
    codes: Any
    columns: Any
    factors: Any

    def over(self, scale: Any) -> Part:
        """With F divided by a number; None for 1."""
        if scale is None:
            return self
        if self.factors is not None:
            return self._replace(factors=self.factors / scale)
        return self._replace(columns=self.columns / scale)


@record
@dataclass(frozen=True)
class Span:
    """Q, in one of three forms: the identity; that of one grouping factor; a dense matrix.

    Attributes:
        levels, kept: the factorisation within levels, and which of its (q, J) directions are not
            zero, (r,); or None.
        directions: (n, r), or None.
    """

    levels: Any = None
    kept: Any = None
    directions: Any = None

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores Q'columns, (r, k), and what Q leaves, (n, k)."""
        xp = namespace(columns)
        if self.levels is not None:
            scores, rest = self.levels.project(columns)
            return _flat(xp.moveaxis(scores, 1, 2))[self.kept], rest
        if self.directions is None:
            return xp.asarray(columns), xp.zeros_like(columns)
        scores = self.directions.T @ columns
        return scores, columns - self.directions @ scores

    def scores(self, columns: Any) -> Any:
        """Q'columns, (r, k)."""
        if self.levels is not None:
            return _flat(self.levels.scores(columns))[self.kept]
        return columns if self.directions is None else self.directions.T @ columns


def _flat(scores: Any) -> Any:
    """(q, J, k) as (q J, k), where k may be zero."""
    q, levels, count = scores.shape
    return scores.reshape(q * levels, count)


def spanned(effects: Terms, most: int) -> tuple[Span, list[Part], int]:
    """Q, F of each term, and their order r.

    Rows of levels of one factor are worked on level by level, however many they are. Several
    factors take an orthogonal factorisation of a dense matrix, or the rows as they are if there
    are no more of them than random effects, or if levels or effects are traced.

    Args:
        effects: the columns of all terms.
        most: the largest r allowed.

    Raises:
        DataError: a larger one.
    """
    if namespace(*(part for own in effects for part in own[:2])) is not np:
        _allow(len(effects[0][0]), most)
        parts = [Part(np.arange(levels), codes, own, None) for codes, own, levels in effects]
        return Span(), parts, len(effects[0][0])
    found = [np.unique(codes, return_inverse=True) for codes, *_ in effects]
    sizes = [columns.shape[1] for _, columns, _ in effects]
    rows = len(effects[0][0])
    if all(codes is effects[0][0] or np.array_equal(codes, effects[0][0]) for codes, *_ in effects):
        seen, codes = found[0]
        whole = np.concatenate([columns for _, columns, _ in effects], axis=1)
        levels = GroupedBasis.of(codes, whole, len(seen))
        kept = np.flatnonzero(np.einsum("aaj->aj", levels.factors))
        if kept.size < rows:
            _allow(kept.size, most)
            effect, level = np.divmod(kept, len(seen))
            cut = np.cumsum(sizes)[:-1]
            parts = np.split(levels.factors[effect, :, level], cut, axis=1)
            return (
                Span(levels, kept),
                [Part(seen, level, part, None) for part in parts],
                kept.size,
            )
    counts = [len(seen) * q for (seen, _), q in zip(found, sizes, strict=True)]
    order = min(rows, sum(counts))
    _allow(order, most)
    if order == rows:
        pairs = zip(found, effects, strict=True)
        return Span(), [Part(*own, columns, None) for own, (_, columns, _) in pairs], order
    if rows * order > MOST_NUMBERS:
        raise DataError(
            f"kernels beside terms of other factors need a dense matrix of {rows} rows by {order} "
            f"random effects, which is more than {MOST_NUMBERS * 8 / 2**30:.0f} GiB"
        )
    blocks = []
    for (seen, codes), (_, columns, _), q in zip(found, effects, sizes, strict=True):
        block = np.zeros((rows, q, len(seen)))
        block[np.arange(rows)[:, None], np.arange(q), codes[:, None]] = columns
        blocks.append(block.reshape(rows, -1))
    directions, whole = np.linalg.qr(np.concatenate(blocks, axis=1))
    parts = np.split(whole, np.cumsum(counts)[:-1], axis=1)
    found_parts = [
        Part(seen, None, None, part.reshape(order, q, len(seen)))
        for (seen, _), part, q in zip(found, parts, sizes, strict=True)
    ]
    return Span(directions=directions), found_parts, order


def _allow(order: int, most: int) -> None:
    if order > most:
        raise DataError(
            "kernels beside other random effects, or random slopes, need matrices of the order of "
            f"the random effects, or of the rows if there are fewer: here {order}, and {most} is "
            "the limit. One kernel alone, with one effect, takes more"
        )
