"""A population with more or fewer levels, or rows, from the rows that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.frame import (
    GroupingTerm,
    ModelFrame,
    covariate_frame,
    drop_aliased,
    split_extras,
)
from jaxreml.data.grouping import combined_codes
from jaxreml.data.residual import ResidualTerm
from jaxreml.errors import DataError
from jaxreml.inference.resampling.simulation import Population
from jaxreml.model.groups import contains


def extend(
    people: Population,
    n: int,
    along: str | None = None,
    within: str | Sequence[str] | None = None,
) -> Population:
    """The same model with another number of levels or rows, as ``simr::extend``.

    Args:
        people: the model.
        n: number of levels or rows.
        along: a grouping factor, to have n levels: its levels are taken in turn and repeated under
            new labels, with all their rows and with the levels of other factors nested in them;
            those that differ in a factor among the fixed effects alternate, so that its levels
            stay balanced. Or a numeric column, to have n values: its first n, continued in equal
            steps where there are fewer.
        within: a grouping factor, or columns whose combinations are looked at: every level gets n
            rows, its own repeated in turn.

    Raises:
        ValueError: not one of `along` and `within`, or n too small.
        DataError: a name that the model does not have; values that are not equally spaced, or
            that a transform such as ``scale`` depends on; fixed effects that cannot be estimated.
    """
    if (along is None) == (within is None):
        raise ValueError("n levels or rows of what? Give along= or within=, not both")
    if n != int(n) or n < (1 if along is None else 2):
        raise ValueError(f"n must be an integer of at least {1 if along is None else 2}, not {n!r}")
    frame = people.frame
    if frame.kernels:
        raise DataError(
            "a design with kernels cannot be extended: it does not say how new levels are related"
        )
    factors = list(_codes_of(frame))
    if within is not None:
        names = (within,) if isinstance(within, str) else tuple(within)
        what = f"{n} rows within each {' and '.join(names)}"
        extended = _taken(frame, _within(frame, names, n))
    elif along is not None and along in factors:
        what = f"{n} levels of {along}"
        extended = _along_factor(frame, along, n)
    else:
        what = f"{n} values of {along}"
        extended = _along_values(people, str(along), n)
    _, _, aliased = drop_aliased(extended.X, extended.fixed_names)
    if aliased or len(extended.X) <= extended.X.shape[1]:
        lost = f": {', '.join(aliased)} cannot be estimated" if aliased else ": too few rows"
        raise DataError(f"{what} are too few for the fixed effects{lost}")
    return replace(people, frame=extended)


def _within(frame: ModelFrame, names: tuple[str, ...], n: int) -> np.ndarray:
    """Rows to take so that every combination has n."""
    keys = [pd.factorize(_labels(frame, name))[0] for name in names]
    _, codes = np.unique(np.stack(keys), axis=1, return_inverse=True)
    return np.concatenate([np.resize(rows, n) for rows in _rows_of(codes.ravel())])


def _codes_of(frame: ModelFrame) -> dict[str, np.ndarray]:
    """The levels (n,) of grouping factors by name, the subjects of a residuals' covariance among
    them."""
    found = {term.name: term.codes for term in frame.terms}
    if frame.residual is not None and frame.residual.words.subject is not None:
        found.setdefault(frame.residual.words.subject, frame.residual.codes)
    return found


def _labels(frame: ModelFrame, name: str) -> np.ndarray:
    known = _codes_of(frame)
    if name in known:
        return known[name]
    if name not in frame.table:
        _unknown(frame, name)
    return frame.table[name].to_numpy()


def _unknown(frame: ModelFrame, name: str) -> None:
    factors = ", ".join(_codes_of(frame))
    columns = ", ".join(map(str, frame.table.columns)) or "none"
    raise DataError(
        f"{name!r} is neither a grouping factor of the model ({factors}) nor a column of its table "
        f"({columns})"
    )


def _rows_of(codes: np.ndarray) -> list[np.ndarray]:
    """The rows of each level, in order."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def _along_factor(frame: ModelFrame, name: str, n: int) -> ModelFrame:
    codes = _codes_of(frame)[name]
    order = _alternating(frame.X, codes)
    levels, copies = order[np.arange(n) % order.size], np.arange(n) // order.size
    of_level = _rows_of(codes)
    rows = np.concatenate([of_level[level] for level in levels])
    copy = np.repeat(copies, [of_level[level].size for level in levels])
    return _taken(frame, rows, copy, codes)


def _alternating(X: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The levels, those that differ in their dummy variables in turn."""
    dummies = [column for column in X.T if np.unique(column).size <= 2]
    counts = np.bincount(codes)
    means = np.array([np.bincount(codes, column) / counts for column in dummies])
    if not means.size:
        return np.arange(counts.size)
    _, kinds = np.unique(means.round(9), axis=1, return_inverse=True)
    kinds = kinds.ravel()
    seen = [count() for _ in range(kinds.max() + 1)]
    turns = [next(seen[kind]) for kind in kinds]
    return np.argsort(turns, kind="stable")


def _taken(
    frame: ModelFrame,
    rows: np.ndarray,
    copy: np.ndarray | None = None,
    along: np.ndarray | None = None,
) -> ModelFrame:
    """Some rows, repeatedly; factors nested in `along` have new levels in every copy of it."""

    def renewed(codes: np.ndarray, levels: tuple[Any, ...]) -> tuple[np.ndarray, tuple[Any, ...]]:
        """Codes of the rows and levels, with new ones in every copy."""
        taken = codes[rows]
        own = np.zeros_like(taken)
        if copy is not None and along is not None and contains(along, codes):
            own = copy
        _, first, fresh = np.unique(
            own * len(levels) + taken, return_index=True, return_inverse=True
        )
        labels = (f"{levels[taken[k]]}.{own[k] + 1}" if own[k] else levels[taken[k]] for k in first)
        return fresh.ravel(), tuple(labels)

    def regrouped(term: GroupingTerm) -> GroupingTerm:
        codes, levels = renewed(term.codes, term.levels)
        return replace(term, levels=levels, codes=codes, effects=term.effects[rows])

    def of_residuals(own: ResidualTerm) -> ResidualTerm:
        places, words = own.places[rows], own.words
        if words.subject is None:  # rows of any subjects that have each level once, in cells
            cells = combined_codes([*(term.codes for term in terms), np.zeros_like(places)])
            turn = pd.Series(cells).groupby([cells, places]).cumcount().to_numpy()
            codes = combined_codes([cells, turn])
            return replace(own, places=places, codes=codes, subjects=tuple(range(codes.max() + 1)))
        codes, subjects = renewed(own.codes, own.subjects)
        if len(np.unique(codes * (places.max() + 1) + places)) < len(codes):
            raise DataError(
                f"some {words.subject!r} would have the same {words.visit!r} twice, which "
                f"residual={words.text!r} does not allow: extend along={words.subject!r}"
            )
        return replace(own, places=places, codes=codes, subjects=subjects)

    terms = tuple(regrouped(term) for term in frame.terms)
    return replace(
        frame,
        y=None,
        X=frame.X[rows],
        terms=terms,
        residual=None if frame.residual is None else of_residuals(frame.residual),
        weights=None if frame.weights is None else frame.weights[rows],
        offset=None if frame.offset is None else frame.offset[rows],
        table=pd.DataFrame(index=pd.RangeIndex(rows.size)),  # its labels would not be the levels
        rows=np.ones(rows.size, bool),
    )


def _along_values(people: Population, name: str, n: int) -> ModelFrame:
    frame = people.frame
    if name not in frame.table:
        _unknown(frame, name)
    if frame.residual is not None:
        raise DataError(
            f"values of {name!r} cannot be added to a design with residual="
            f"{frame.residual.words.text!r}: extend along a grouping factor"
        )
    column = frame.table[name]
    if not pd.api.types.is_numeric_dtype(column.dtype):
        raise DataError(
            f"{name!r} is neither numeric nor a grouping factor: there is no telling what its "
            "further values are"
        )
    values, codes = np.unique(column.to_numpy(float), return_inverse=True)
    steps = np.diff(values)
    if n > values.size and (not steps.size or not np.allclose(steps, steps[0])):
        raise DataError(
            f"the values of {name!r} are not equally spaced: there is no telling what its further "
            "ones are. Give a table that has them to jaxreml.population"
        )
    of_value = _rows_of(codes.ravel())
    sources = np.arange(n) % values.size
    rows = np.concatenate([of_value[k] for k in sources])
    wanted = [values[k] if k < values.size else values[0] + k * steps[0] for k in range(n)]
    table = frame.table.iloc[rows].reset_index(drop=True)
    table[name] = np.repeat(wanted, [of_value[k].size for k in sources])
    table, extras = split_extras(table)
    parsed = frame.formula
    right = parsed.text[len(parsed.response) :]
    extended = covariate_frame(right, table, **extras, context=people.context)
    _require_same(frame, extended, rows, table[name].to_numpy() == column.to_numpy()[rows], name)
    return extended


def _require_same(
    frame: ModelFrame, extended: ModelFrame, rows: np.ndarray, kept: np.ndarray, name: str
) -> None:
    """Raise DataError if rows whose values are as before have other columns than before."""

    def columns(frame: ModelFrame) -> list[np.ndarray]:
        return [frame.X, *(term.effects for term in frame.terms)]

    def labels(frame: ModelFrame) -> list[tuple[str, ...]]:
        return [frame.fixed_names, *((term.name, *term.effect_names) for term in frame.terms)]

    if labels(frame) != labels(extended):
        raise DataError(f"with these values of {name!r} the model has other effects")
    for before, after in zip(columns(frame), columns(extended), strict=True):
        if not np.allclose(before[rows][kept], after[kept]):
            raise DataError(
                f"the formula transforms {name!r} by what all its values are (scale, center, poly, "
                "...): with other values its coefficients would mean something else. Give the "
                "larger table to jaxreml.population"
            )
