"""Effects at times or places: ``ou(time | g)`` and ``exp(x1 + x2 | g)`` have one for each distinct
value, named by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.columns import is_amount, label
from jaxreml.data.encoding import encode
from jaxreml.data.formula import single_name
from jaxreml.errors import DataError, FormulaError

MOST = 100  # places: a covariance matrix of more is out of reach


@dataclass(frozen=True)
class PlacesEncoding:
    """How columns of effects at places are made of other rows, like `encoding.Encoding`.

    Attributes:
        text: the columns' names joined by +.
        what: what the columns are, for messages.
        columns: the names.
        places: their distinct values, a number or a tuple each, in order.
        context: not used.
    """

    text: str
    what: str
    columns: tuple[str, ...]
    places: tuple[Any, ...]
    context: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the effects, one for each place."""
        return tuple(
            ", ".join(f"{value:.10g}" for value in np.atleast_1d(place)) for place in self.places
        )

    @property
    def variables(self) -> list[str]:
        """Names of columns."""
        return list(self.columns)

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """Indicators of the places of other rows, (rows, places).

        Raises:
            DataError: a place that no row of the fit is at.
        """
        values = _values(self.columns, table, self.what)
        known = {tuple(np.atleast_1d(place)): k for k, place in enumerate(self.places)}
        found = np.zeros((len(table), len(self.places)))
        for row, value in enumerate(map(tuple, values.tolist())):
            if value not in known:
                at = ", ".join(
                    f"{name} {part:g}" for name, part in zip(self.columns, value, strict=True)
                )
                raise DataError(
                    f"{self.what}: {at} in row {label(table.index[row:])} is not among those of "
                    "the fit"
                )
            found[row, known[value]] = 1.0
        return found


def encode_places(
    text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> tuple[np.ndarray, PlacesEncoding]:
    """Indicators (n, places) of the distinct values of numeric columns, and their encoding.

    Raises:
        FormulaError: something else than names of columns joined by +.
        DataError: columns that are not numbers, one place, or too many.
    """
    parts = [part.strip() for part in re.sub(r"-\s*1\b", "", text).split("+")]
    names = [single_name(part) for part in parts if part not in ("0", "-1", "")]
    if not names or None in names or any(name not in table.columns for name in names):
        raise FormulaError(
            f"{what}, {text!r}: times or places are names of columns of numbers, joined by +"
        )
    columns = tuple(str(name) for name in names)
    values = _values(columns, table, what)
    distinct = np.unique(values, axis=0)
    if len(distinct) < 2:
        raise DataError(
            f"{what}: {' + '.join(columns)} has one value, and there is no distance to be had"
        )
    if len(distinct) > MOST:
        raise DataError(
            f"{what}: {' + '.join(columns)} has {len(distinct)} different values, and a covariance "
            f"of more than {MOST} is not there yet; round them to fewer"
        )
    places = (
        tuple(map(tuple, distinct.tolist())) if len(columns) > 1 else tuple(distinct[:, 0].tolist())
    )
    encoding = PlacesEncoding(" + ".join(columns), what, columns, places, context)
    return encoding.matrix(table), encoding


def encode_own(
    text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> tuple[np.ndarray, Any, tuple[Any, ...]]:
    """Effects of a covariance of the user's own, their encoding, and what is known of each.

    Names of columns of numbers are places, as for `encode_places`, and the name of a factor stands
    for its levels. Anything else is a formula for columns, of which nothing is known but the order.
    """
    parts = [part.strip() for part in text.split("+")]
    names = [single_name(part) for part in parts if part != "0"]
    if any(name is None or name not in table.columns for name in names) or not names:
        return *encode(text, table, context, what), ()
    if len(names) == 1 and not is_amount(pd.Series(table[names[0]])):
        levels = pd.Categorical(table[names[0]]).remove_unused_categories().categories
        return *encode(f"0 + `{names[0]}`", table, context, what), tuple(levels.tolist())
    if "0" not in parts and all(is_amount(pd.Series(table[name])) for name in names):
        effects, encoding = encode_places(text, table, context, what)
        return effects, encoding, encoding.places
    return *encode(text, table, context, what), ()


def _values(columns: tuple[str, ...], table: pd.DataFrame, what: str) -> np.ndarray:
    """(n, columns) numbers."""
    for name in columns:
        if not is_amount(pd.Series(table[name])):
            raise DataError(
                f"{what} are at distances and need numbers for {name!r}, and it has values such as "
                f"{table[name].tolist()[0]!r}"
            )
    return np.stack([table[name].to_numpy(float) for name in columns], axis=1)
