"""The few rows that stand for a model frame where only new rows are asked about.

What becomes of a new row depends on the levels and types of the columns and on the state of the
encodings, not on the rows of the fit. A prototype is a model frame of some of them in which every
level occurs: predictions look things up in it, and a fit saved without its rows keeps it, with the
columns shuffled and the state of transforms beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from formulaic.parser.types import Factor

from jaxreml.data.encoding import Encoding, encode
from jaxreml.data.estimability import RowSpace
from jaxreml.data.evaluation import plain
from jaxreml.data.formula import parse
from jaxreml.data.frame import EXTRAS, ModelFrame
from jaxreml.data.grouping import GroupingTerm
from jaxreml.data.places import PlacesEncoding
from jaxreml.data.transforms import R_NAMES
from jaxreml.errors import DataError

VALUES = 25  # of a covariate
AGREES = 1e-10  # relative: columns made again


def prototype(frame: ModelFrame) -> ModelFrame:
    """Rows of a model frame in which every level of every factor occurs."""
    places = [_first(term.codes) for term in frame.terms]
    places += [_places(frame, name) for name in _others(frame)]
    rows = np.unique(np.concatenate([*places, np.zeros(1, int)]))
    return _of_rows(frame, frame.table.iloc[rows], [term.codes[rows] for term in frame.terms])


def _of_rows(frame: ModelFrame, table: pd.DataFrame, codes: list[np.ndarray]) -> ModelFrame:
    """A model frame for looking things up: without columns of X and of effects."""
    k = len(table)
    terms = tuple(
        replace(term, codes=own, effects=np.zeros((k, len(term.effect_names))))
        for term, own in zip(frame.terms, codes, strict=True)
    )
    found = replace(
        frame,
        y=None,
        X=np.zeros((k, len(frame.fixed_names))),
        terms=terms,
        weights=None if frame.weights is None else np.ones(k),
        offset=None,
        table=table,
        rows=np.ones(k, bool),
    )
    vars(found)["row_space"] = frame.row_space  # of all rows
    return found


def _first(codes: np.ndarray) -> np.ndarray:
    return np.unique(codes, return_index=True)[1]


def _others(frame: ModelFrame) -> list[str]:
    """Columns of the table that make no grouping factor."""
    grouping = {name for term in frame.terms for name in term.factors}
    return [name for name in frame.table.columns if name not in grouping]


def _places(frame: ModelFrame, name: str) -> np.ndarray:
    """Rows of the values of a column: all levels of a factor, some values of a covariate."""
    column = pd.Series(frame.table[name])
    distinct, values = pd.factorize(column, sort=False)
    first = _first(distinct)
    if name in _factors(frame) or not pd.api.types.is_numeric_dtype(column.dtype):
        return first
    if pd.api.types.is_bool_dtype(column.dtype):
        return first
    ordered = first[np.argsort(np.asarray(values, float))]
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, VALUES).round().astype(int))]


def _encodings(frame: ModelFrame) -> list[Encoding | PlacesEncoding]:
    of_terms = [term.encoding for term in frame.terms]
    return [frame.fixed_encoding, *frame.offset_encodings, *of_terms]


def _factors(frame: ModelFrame) -> set[str]:
    """Columns that the formula uses as factors, numbers in C() among them."""
    found = set()
    for encoding in _encodings(frame):
        if isinstance(encoding, PlacesEncoding):  # all values are of use
            found |= set(encoding.columns)
            continue
        for factor, names in encoding.spec.factor_variables.items():
            kind, _ = encoding.spec.encoder_state.get(factor.expr, (None, None))
            if kind is Factor.Kind.CATEGORICAL:
                found |= {plain(name) for name in names}
    return found


def packed(frame: ModelFrame) -> dict[str, Any]:
    """What `unpacked` makes a prototype of, in plain values, arrays and a table.

    Only values of single columns are kept: those of columns that make no grouping factor are
    shuffled one by one, so that no row of the data is left; the response is left out.

    Raises:
        DataError: a formula whose columns cannot be made again from that, with functions of one's
            own or of several columns at a time.
    """
    firsts = [_first(term.codes) for term in frame.terms]
    levels = np.unique(np.concatenate([*firsts, np.zeros(1, int)]))
    encodings = _encodings(frame)
    used = {name for encoding in encodings for name in encoding.variables}
    if frame.residual is not None:
        used |= set(frame.residual.words.columns)
    places = {name: _places(frame, name) for name in _others(frame) if name in used}
    k = max([len(levels), *map(len, places.values())])
    random = np.random.default_rng(0)
    columns = {}
    for name in frame.table.columns:
        if name in places:
            rows = random.permutation(np.resize(places[name], k))
        elif name in _others(frame) and name not in used:
            continue
        else:
            rows = np.resize(levels, k)
        columns[name] = frame.table[name].iloc[rows].reset_index(drop=True)
    space = frame.row_space
    if EXTRAS["offset"] in frame.table:  # that there was one
        columns[EXTRAS["offset"]] = np.zeros(k)
    return {
        "table": pd.DataFrame(columns),
        "codes": tuple(term.codes[np.resize(levels, k)] for term in frame.terms),
        "factors": tuple(term.factors for term in frame.terms),
        "sources": tuple(term.source for term in frame.terms),
        "encodings": tuple((e.text, e.what, e.names, _state(e)) for e in encodings),
        "offsets": len(frame.offset_encodings),
        "weighted": frame.weights is not None,
        "row_space": None if space is None else space.parts,
    }


def _state(encoding: Encoding | PlacesEncoding) -> dict[str, Any]:
    """What an encoding is made of besides its text and the table."""
    if isinstance(encoding, PlacesEncoding):
        return {"columns": encoding.columns, "places": encoding.places}
    return encoding.spec.transform_state


def unpacked(
    record: Mapping[str, Any],
    formula: str,
    fixed_names: tuple[str, ...],
    aliased: tuple[str, ...],
    terms: list[tuple[str, tuple[Any, ...], tuple[str, ...]]],
    context: Mapping[str, Any] | None = None,
) -> ModelFrame:
    """The prototype that `packed` wrote.

    Args:
        record: from `packed`.
        formula, fixed_names, aliased: of the fit.
        terms: per random term its name, levels and effects.
        context: names that the formula uses besides columns.
    """
    table = record["table"]
    names = {**R_NAMES, **(context or {})}
    encodings = []
    for text, what, columns, state in record["encodings"]:
        if "places" in state:
            own = PlacesEncoding(text, what, state["columns"], state["places"], names)
            encodings.append(own)
            continue
        made = encode(text, table, names, what)[1]
        if made.names != tuple(columns):
            raise DataError(f"{what}, {text!r}: columns cannot be made again")
        encodings.append(replace(made, spec=made.spec.update(transform_state=state)))
    fixed, *rest = encodings
    offsets, of_terms = rest[: record["offsets"]], rest[record["offsets"] :]
    k = len(table)
    sources = record.get("sources", ("",) * len(terms))
    grouping = tuple(
        GroupingTerm(name, levels, codes.astype(int), np.zeros((k, len(effects))), effects,
                     tuple(factors), encoding, source=source)
        for (name, levels, effects), codes, factors, encoding, source in zip(
            terms, record["codes"], record["factors"], of_terms, sources, strict=True
        )
    )  # fmt: skip
    found = ModelFrame(
        formula=parse(formula, need_random=False),
        y=None,
        X=np.zeros((k, len(fixed_names))),
        fixed_names=fixed_names,
        aliased=aliased,
        terms=grouping,
        weights=np.ones(k) if record["weighted"] else None,
        offset=None,
        table=table,
        rows=np.ones(k, bool),
        fixed_encoding=fixed,
        offset_encodings=tuple(offsets),
    )
    space = record["row_space"]
    vars(found)["row_space"] = None if space is None else RowSpace.of_parts(*space)
    return found


def require_same(made: ModelFrame, frame: ModelFrame) -> None:
    """Raise DataError unless the columns of `frame` are those that `made` makes of its table."""
    for first, second in zip(_encodings(made), _encodings(frame), strict=True):
        ours, theirs = first.matrix(frame.table), second.matrix(frame.table)
        scale = np.maximum(np.abs(theirs).max(axis=0, initial=0.0), 1e-300)
        if np.any(np.abs(ours - theirs) > AGREES * scale):
            raise DataError(f"{second.what}, {second.text!r}: columns cannot be made again")
