"""Responses on the rows of a model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.sources import (
    Array,
    Source,
    check_names,
    id_column,
    open_piece,
    open_source,
    refuse_repeated,
)


class Block(NamedTuple):
    """Responses side by side.

    Attributes:
        names: (b,).
        read: returns their values, (rows, b) float64, NaN where missing.
    """

    names: pd.Index
    read: Callable[[], np.ndarray]


class Responses:
    """Responses on the rows of a model.

    Args:
        responses: see `fit_many`.
        data: the table of the model, all its rows.
        rows: booleans, which of them the model uses.
        id: name of a column of `data` and of the responses that says which rows belong together;
            by position if left out.

    Attributes:
        names: (B,), or None for a stream, which tells them as it goes.

    Raises:
        DataError: rows that do not match, repeated names, responses that are not numbers, or none.
    """

    def __init__(self, responses: Any, data: Any, rows: np.ndarray, id: str | None = None):
        self._rows, self._id = rows, id
        self._data_ids = None if id is None else id_column(data, id)
        self._data_index = data.index if isinstance(data, pd.DataFrame) else None
        self.source = open_source(responses, id)
        self.names = None
        if self.source is None:
            self._stream = iter(responses)
        else:
            self.names = self.source.names
            self._kept = self._align(self.source)
            if not len(self.names):
                raise DataError(
                    "there are no responses: no columns" + (" but the id" if id else "")
                )

    def blocks(self, size: int) -> Iterator[Block]:
        """Blocks of `size` responses, the last one smaller.

        Raises:
            DataError: what is wrong with a block of a stream.
        """
        if self.source is None:
            yield from self._stream_blocks(size)
        else:
            for start in range(0, len(self.source.names), size):
                stop = min(start + size, len(self.source.names))
                yield Block(self.source.names[start:stop], partial(self.read, start, stop))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values of responses start..stop-1 on the rows of the model; not for a stream."""
        assert self.source is not None
        return self.source.read(start, stop)[self._kept]

    def _stream_blocks(self, size: int) -> Iterator[Block]:
        seen: set[Any] = set()
        first, names, values, held = [], [], [], 0
        for k, piece in enumerate(self._stream):
            source = open_piece(piece, k, self._id)
            kept = self._align(source)
            refuse_repeated([name for name in source.names if name in seen])
            check_names([*first, *source.names])  # of one kind in all blocks
            first = first or list(source.names[:1])
            seen.update(source.names)
            start, width = 0, len(source.names)
            while start < width:
                stop = min(start + size - held, width)
                names.extend(source.names[start:stop])
                values.append(source.read(start, stop)[kept])
                held, start = held + stop - start, stop
                if held == size:
                    yield _joined(names, values)
                    names, values, held = [], [], 0
        if not seen:
            raise DataError("there are no responses: the iterator gave none")
        if held:
            yield _joined(names, values)

    def _align(self, source: Source) -> np.ndarray | slice:
        """What to take of the rows of the responses: those of the model, in its order."""
        n = len(self._rows)
        if self._id is not None and self._data_ids is not None:
            order = _match(self._data_ids, source.ids(self._id), self._id)
            return order[self._rows]
        if source.n != n:
            turned = isinstance(source, Array) and source.values.shape[1] == n
            hint = "; transpose them" if turned else "; match them by an id column (id=...)"
            raise DataError(f"the data have {n} rows and the responses {source.n}{hint}")
        theirs = getattr(source, "index", None)
        if self._data_index is not None and theirs is not None:
            _refuse_shuffled(self._data_index, theirs)
        return slice(None) if self._rows.all() else self._rows


def _joined(names: list[Any], values: list[np.ndarray]) -> Block:
    return Block(pd.Index(names), partial(np.concatenate, values, axis=1))


def _match(ours: pd.Series, theirs: pd.Series, id: str) -> np.ndarray:
    """For each row of the data, the row of the responses with the same id."""
    for where, ids in (("data", ours), ("responses", theirs)):
        if ids.isna().any():
            raise DataError(
                f"{int(ids.isna().sum())} rows of the {where} have no {id!r}; fill it in, or drop "
                "the rows"
            )
        repeated = ids.loc[ids.duplicated()]
        if len(repeated):
            raise DataError(
                f"the id {repeated.iloc[0]!r} occurs more than once in column {id!r} "
                f"of the {where}; ids must be unique there"
            )
    left, right = pd.Index(ours.tolist()), pd.Index(theirs.tolist())
    order = right.get_indexer(left)
    complaints = []
    for where, ids in (("data", left[order < 0]), ("responses", right[~right.isin(left)])):
        if len(ids):
            some = ", ".join(map(repr, ids[:3].tolist())) + (", ..." if len(ids) > 3 else "")
            complaints.append(f"{len(ids)} only in the {where} ({some})")
    if complaints:
        raise DataError(
            f"the ids in {id!r} do not match: {' and '.join(complaints)}; keep the same "
            "rows in both"
        )
    return order


def _refuse_shuffled(ours: pd.Index, theirs: pd.Index) -> None:
    """The same row labels in another order: rows matched by position would be the wrong ones."""
    if len(ours) == len(theirs) and not ours.equals(theirs) and ours.is_unique:
        position = theirs.get_indexer(ours) if theirs.is_unique else np.array([-1])
        if np.all(position >= 0):
            raise DataError(
                "the data and the responses have the same row labels in different orders, and "
                "without id rows are matched by position; bring them in one order (for example "
                "responses.loc[data.index]), or reset the index of one"
            )
