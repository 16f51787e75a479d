"""Weights and offsets of the responses' own, in step with the responses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.data.columns import label
from jaxreml.data.labels import shown
from jaxreml.data.responses import Block, Responses
from jaxreml.data.tables import texts_of_names
from jaxreml.errors import DataError


def of_each(value: Any, data: Any) -> bool:
    """Whether an argument has a column for each response: a matrix, table, file or iterator."""
    if isinstance(value, str):
        return value.endswith((".parquet", ".npy")) and value not in texts_of_names(data)
    return (
        isinstance(value, Path | Iterator)
        or len(getattr(value, "shape", ())) == 2
        or hasattr(value, "column_names")  # pyarrow's
    )


class Measured(NamedTuple):
    """What is known of b responses in n rows, (n, b) each, NaN where it is missing.

    Attributes:
        values: the responses.
        weights, offset: their own; None where they have none.
        x: a covariate of each; likewise.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    offset: np.ndarray | None = None
    x: np.ndarray | None = None

    @property
    def arguments(self) -> dict[str, np.ndarray]:
        """What a fitter takes: responses less their offset, and weights and covariates if there
        are any."""
        y = self.values if self.offset is None else self.values - self.offset
        given = {"values": y, "weights": self.weights, "x": self.x}
        return {name: own for name, own in given.items() if own is not None}


class Companions:
    """Responses with weights and offsets of their own.

    Args:
        responses: on the rows of a model.
        table: of these rows, for labels.
        weights, offset: likewise, or None; a column for each response, under its name or in its
            place.

    Raises:
        DataError: other names, or another number of them.
    """

    def __init__(
        self,
        responses: Responses,
        table: pd.DataFrame,
        weights: Responses | None = None,
        offset: Responses | None = None,
    ):
        self.responses, self.table, self.names = responses, table, responses.names
        given = {"weights": weights, "offset": offset}
        self.own = {role: own for role, own in given.items() if own is not None}
        for role, own in self.own.items():
            if self.names is not None and own.names is not None:
                _check_names(role, self.names, own.names)

    @property
    def weighted(self) -> bool:
        """Whether there are weights."""
        return "weights" in self.own

    def read(self, start: int, stop: int) -> Measured:
        """Responses start..stop-1; not of a stream.

        Raises:
            DataError: weights that are negative, infinite or all zero for a response.
        """
        own = {role: source.read(start, stop) for role, source in self.own.items()}
        assert self.names is not None
        return self._measured(self.names[start:stop], self.responses.read(start, stop), own)

    def blocks(self, size: int) -> Iterator[tuple[pd.Index, Any]]:
        """Names and what reads them, `size` responses at a time, the last ones fewer.

        Raises:
            DataError: as `read`; a stream that ends before another.
        """
        streams = [source.blocks(size) for source in self.own.values()]
        for block in self.responses.blocks(size):
            yield block.names, partial(self._read, block, [next(own, None) for own in streams])
        for role, own in zip(self.own, streams, strict=True):
            if next(own, None) is not None:
                raise DataError(f"there are more {role} than responses")

    def _read(self, block: Block, others: list[Block | None]) -> Measured:
        own = {}
        for role, other in zip(self.own, others, strict=True):
            if other is None or len(other.names) != len(block.names):
                raise DataError(f"{role} end before the responses do")
            _check_names(role, block.names, other.names)
            own[role] = other.read()
        return self._measured(block.names, block.read(), own)

    def _measured(
        self, names: pd.Index, values: np.ndarray, own: dict[str, np.ndarray]
    ) -> Measured:
        if "weights" in own:
            self._check_weights(names, own["weights"])
        return Measured(values, **own)

    def _check_weights(self, names: pd.Index, weights: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            bad = (weights < 0) | np.isinf(weights)
        if bad.any():
            row, k = np.argwhere(bad)[0]
            raise DataError(
                f"weights must be positive, or zero to leave a row out; that of response "
                f"{names[k]!r} in row {label(self.table.index[row:])} is {weights[row, k]:g}"
            )
        empty = np.flatnonzero(~(weights > 0).any(axis=0))
        if empty.size and len(weights):
            raise DataError(f"all weights of response {names[empty[0]]!r} are zero or missing")


def _check_names(role: str, names: pd.Index, others: pd.Index) -> None:
    if len(names) != len(others):
        raise DataError(
            f"{role} have {len(others)} columns and there are {len(names)} responses: they need "
            "one for each"
        )
    by_position = pd.api.types.is_integer_dtype(names) or pd.api.types.is_integer_dtype(others)
    if by_position or names.equals(others):
        return
    different = np.flatnonzero(np.asarray(names) != np.asarray(others))
    raise DataError(
        f"the columns of {role} have other names than the responses: "
        f"{shown(others[different[:1]])} in the place of {shown(names[different[:1]])}. Bring them "
        "into the same order, or pass an array to match them by position"
    )
