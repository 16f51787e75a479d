"""Responses on the rows of a model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.data.labels import DataRows, is_count, match_ids, missing_ids, shown
from jaxreml.data.matrices import Array
from jaxreml.data.names import check_names, refuse_repeated
from jaxreml.data.sources import Source, open_piece, open_source, refuse_not_numeric
from jaxreml.data.tables import column_names
from jaxreml.errors import DataError


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
        id: name of a column of `data` and of the responses, or of their index, that says which
            rows belong together; by position if left out, and then what labels there are must not
            contradict it.
        layer: of an AnnData object.
        role: what they are called in messages: weights come in the same forms.

    Attributes:
        names: (B,), or None for a stream, which tells them as it goes.

    Raises:
        DataError: rows that do not match, repeated names, responses that are not numbers, or none.
    """

    def __init__(
        self,
        responses: Any,
        data: Any,
        rows: np.ndarray,
        id: str | None = None,
        layer: str | None = None,
        role: str = "responses",
    ):
        self._rows, self._id, self._role = rows, id, role
        self._data = DataRows(data)
        self.source = open_source(responses, id, layer)
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
        bad = source.not_numeric()
        self._refuse_transposed(source, source.names.difference([name for name, _ in bad], False))
        if self._id is not None:
            order = match_ids(*self._ids(source, self._id), self._id)
            refuse_not_numeric(bad)
            return order[self._rows]
        if source.n != n:
            raise DataError(
                f"the data have {n} rows and the {self._role} {source.n}; match them by an id "
                f"column (id=...){self._data.difference(source.labels)}"
            )
        self._data.check(source.labels)
        if not isinstance(source, Array):
            for name in source.names[source.names.isin(column_names(self._data.data))]:
                ids = source.ids(name)
                assert ids is not None
                self._data.check_column(name, ids)
        refuse_not_numeric(bad)
        return slice(None) if self._rows.all() else self._rows

    def _refuse_transposed(self, source: Source, names: pd.Index) -> None:
        """DataError for a table with a row per response; `names` are of its columns of numbers."""
        n = len(self._rows)
        place = self._data.holding(names)
        if place is not None:
            what = f"the names of the responses ({shown(names)}) are labels of rows: {place}"
        elif source.n != n and len(names) == n:
            what = f"the data have {n} rows and the responses {source.n}"
        else:
            return
        raise DataError(
            f"{what}. They have a row per response; transpose them (responses.T, with the names of "
            "the responses as the index before)"
        )

    def _ids(self, source: Source, id: str) -> tuple[pd.Series, pd.Series]:
        """The ids in the data and in the responses.

        The name is that of a column or of the index of both; or of one of them, and the other has
        an index of another name or of none.
        """
        ours, theirs = self._data.ids(id), source.ids(id)
        sides = (ours, self._data.labels), (theirs, source.labels)
        if ours is not None or theirs is not None:
            ours, theirs = (
                pd.Series(labels) if ids is None and _are_names(labels) else ids
                for ids, labels in sides
            )
        if ours is None:
            raise missing_ids(id, "data", column_names(self._data.data), self._data.labels)
        if theirs is None:
            raise missing_ids(id, "responses", list(source.columns), source.labels)  # pyright: ignore
        return ours, theirs


def _are_names(labels: pd.Index | None) -> bool:
    return labels is not None and not isinstance(labels, pd.MultiIndex) and not is_count(labels)


def _joined(names: list[Any], values: list[np.ndarray]) -> Block:
    return Block(pd.Index(names), partial(np.concatenate, values, axis=1))
