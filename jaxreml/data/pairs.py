"""Pairs of responses and covariates: one response with many, each with its own, or any list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.companions import Companions, Measured
from jaxreml.data.frame import ModelFrame, covariate_frame
from jaxreml.data.labels import shown
from jaxreml.data.responses import Responses
from jaxreml.data.tables import column_names, texts_of_names, to_pandas
from jaxreml.errors import DataError, FormulaError

SPARSE = 4  # columns read for each one wanted, at most; with more they are read one by one


def paired_frame(formula: str, data: Any, covariate: str, **options: Any) -> ModelFrame:
    """`covariate_frame` with numbers for a covariate that every response has its own of.

    Raises:
        FormulaError: other columns of X, or random effects, depend on it, or no column does.
        DataError: the data have a column of that name; and as `covariate_frame`.
    """
    if covariate in texts_of_names(data):
        raise DataError(
            f"the covariate {covariate!r} is a column of the data too: rename one of the two"
        )
    rng = np.random.default_rng([20261127, 19])  # unlike the user's own draws, such as of seed 0
    n = len(to_pandas(data, column_names(data)[:1]))
    frames = [
        covariate_frame(formula, data, columns={covariate: rng.normal(size=n)}, **options)
        for _ in range(2)
    ]
    first, second = frames
    names = [name for name in first.fixed_names if name != covariate]
    alone = len(names) == len(first.fixed_names) - 1 and first.fixed_names == second.fixed_names
    if alone:
        others = [first.fixed_names.index(name) for name in names]
        alone = np.array_equal(first.X[:, others], second.X[:, others]) and all(
            np.array_equal(a.effects, b.effects)
            for a, b in zip(first.terms, second.terms, strict=True)
        )
    if not alone:
        raise FormulaError(
            f"the covariate {covariate!r} must be a term of the formula by itself, as in "
            f"'~ age + {covariate} + (1 | donor)': no functions of it, interactions or random "
            "slopes"
        )
    return first


class Pairs:
    """Responses with a covariate each, as `Companions` of so many responses as there are pairs.

    Args:
        responses: with their weights, if they have any of their own.
        covariates: a column each, on the same rows.
        pairs: "all", "matched" (the k-th response with the k-th covariate), or a list of pairs of
            names or of positions; None with one response, which goes with all covariates.

    Attributes:
        names: those of the covariates with one response, else ``response:covariate``; None where
            the covariates are a stream, for one response.

    Raises:
        DataError: names that are none of theirs; streams where columns are needed in any order.
        ValueError: several responses without `pairs`.
    """

    def __init__(self, responses: Companions, covariates: Responses, pairs: Any = None):
        self.responses, self.covariates = responses, covariates
        self.weighted, self.names = responses.weighted, None
        if responses.names is None:
            raise DataError("responses with covariates must be known by name, not a stream")
        self.single = len(responses.names) == 1
        if covariates.names is None:
            if not self.single or pairs is not None:
                raise DataError(
                    "a stream of covariates goes with one response, and all of them with it"
                )
            return
        self.left, self.right = _positions(responses.names, covariates.names, pairs)
        self.names = covariates.names[self.right]
        if not self.single:
            first, second = responses.names[self.left], self.names
            self.names = pd.Index([f"{a}:{b}" for a, b in zip(first, second, strict=True)])
        if not self.names.is_unique:
            raise DataError(f"the pair {shown(self.names[self.names.duplicated()][:1])} repeats")

    def read(self, start: int, stop: int) -> Measured:
        """Pairs start..stop-1; not of a stream."""
        left: Any = taken(lambda *ends: tuple(self.responses.read(*ends)), self.left[start:stop])
        (x,) = taken(lambda *ends: (self.covariates.read(*ends),), self.right[start:stop])
        return Measured(*left)._replace(x=x)

    def blocks(self, size: int) -> Iterator[tuple[pd.Index, Callable[[], Measured]]]:
        """As `Companions.blocks`."""
        if self.names is not None:
            for start in range(0, len(self.names), size):
                stop = min(start + size, len(self.names))
                yield self.names[start:stop], partial(self.read, start, stop)
            return
        own = self.responses.read(0, 1)
        for block in self.covariates.blocks(size):
            yield block.names, partial(_with, own, block.read)


def _with(own: Any, read: Callable[[], np.ndarray]) -> Measured:
    """One response with each of a block of covariates."""
    x = read()
    repeated: Any = (None if part is None else np.broadcast_to(part, x.shape) for part in own)
    return Measured(*repeated)._replace(x=x)


def taken(
    read: Callable[[int, int], tuple[Any, ...]], places: np.ndarray
) -> tuple[np.ndarray | None, ...]:
    """Columns at `places`, which may repeat, of matrices that are read by ranges of columns."""
    wanted, back = np.unique(places, return_inverse=True)
    if not wanted.size:
        return read(0, 0)
    first, last = wanted[0], wanted[-1] + 1
    if np.array_equal(places, np.arange(first, last)):
        return read(first, last)
    if last - first <= SPARSE * wanted.size:
        back, parts = places - first, [read(first, last)]
    else:
        parts = [read(k, k + 1) for k in wanted]
    joined = (None if own[0] is None else np.hstack(own) for own in zip(*parts, strict=True))
    return tuple(None if own is None else own[:, back] for own in joined)


def _positions(
    responses: pd.Index, covariates: pd.Index, pairs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the responses and of the covariates of all pairs."""
    b, c = len(responses), len(covariates)
    if pairs is None and b > 1:
        raise ValueError(
            f'{b} responses and {c} covariates: say which go together, pairs="all", '
            '"matched" or a list of pairs'
        )
    if pairs is None or (isinstance(pairs, str) and pairs == "all"):
        return np.repeat(np.arange(b), c), np.tile(np.arange(c), b)
    if isinstance(pairs, str):
        if pairs != "matched":
            raise ValueError(f'pairs must be "all", "matched" or a list of pairs, not {pairs!r}')
        if b != c:
            raise DataError(f'pairs="matched" with {b} responses and {c} covariates')
        return np.arange(b), np.arange(b)
    table = np.asarray(pairs) if not isinstance(pairs, pd.DataFrame) else pairs.to_numpy()
    if table.ndim != 2 or table.shape[1] != 2:
        raise DataError(f"pairs must be a list of pairs, or of shape (k, 2), not {table.shape}")
    return (
        _found(responses, table[:, 0], "responses"),
        _found(covariates, table[:, 1], "covariates"),
    )


def _found(names: pd.Index, wanted: Sequence[Any] | np.ndarray, role: str) -> np.ndarray:
    """Positions of names, or of positions, among names."""
    labels: Any = pd.Index(wanted)
    if pd.api.types.is_integer_dtype(labels) and not pd.api.types.is_integer_dtype(names):
        outside = labels[(labels < 0) | (labels >= len(names))]
        if len(outside):
            raise DataError(f"pairs: there is no position {outside[0]} among {len(names)} {role}")
        return labels.to_numpy()
    places = names.get_indexer(labels)
    if np.any(places < 0):
        unknown = [label for label, place in zip(labels, places, strict=True) if place < 0]
        raise DataError(f"pairs: {shown(unknown)} is none of the {role}")
    return places
