"""Which row is which: labels of rows, and whether two tables whose rows are matched agree on them.

Labels are pandas' index, also where arrow or a dict of series carries it, and the values of columns
that identify rows. Rows that are matched by position must not contradict what the labels say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.tables import column_names, nearest, to_pandas
from jaxreml.errors import DataError

MOST = 0.5  # share of labels found among the values of a column from which on it holds them


def row_labels(table: Any) -> pd.Index | None:
    """The labels of the rows of a table, None if it has none.

    Raises:
        DataError: a dict of series with different labels.
    """
    if isinstance(table, pd.DataFrame | pd.Series):
        return table.index
    if isinstance(table, Mapping):
        series = {name: value for name, value in table.items() if isinstance(value, pd.Series)}
        labels = None
        for name, value in series.items():
            if labels is not None and not labels.equals(value.index):
                first = next(iter(series))
                raise DataError(
                    f"the series {first!r} and {name!r} have different row labels; bring them in "
                    "one order, for example by making a dataframe of them"
                )
            labels = value.index
        return labels
    if hasattr(table, "schema") and hasattr(table.schema, "pandas_metadata"):
        names, count = arrow_index(table.schema)
        return count if not names else from_arrow(table.select(names), names)
    return None


def arrow_index(schema: Any) -> tuple[list[str], pd.RangeIndex | None]:
    """Columns that hold pandas' index in an arrow schema; the index itself where it is a range."""
    entries = (schema.pandas_metadata or {}).get("index_columns", [])
    ranges = [entry for entry in entries if isinstance(entry, dict)]
    names = [entry for entry in entries if isinstance(entry, str) and entry in schema.names]
    if names or not ranges:
        return names, None
    return [], pd.RangeIndex(ranges[0]["start"], ranges[0]["stop"], ranges[0]["step"])


def from_arrow(table: Any, names: list[str]) -> pd.Index:
    """pandas' index from the arrow columns that hold it."""
    columns = [table.column(name).to_pylist() for name in names]
    titles = [None if name.startswith("__index_level_") else name for name in names]
    if len(columns) == 1:
        return pd.Index(columns[0], name=titles[0])
    return pd.MultiIndex.from_arrays(columns, names=titles)


def is_count(labels: pd.Index) -> bool:
    """Whether labels only count the rows from 0, as pandas does where nobody gave any."""
    if isinstance(labels, pd.MultiIndex) or not pd.api.types.is_integer_dtype(labels.dtype):
        return False
    return bool(np.array_equal(labels.to_numpy(), np.arange(len(labels))))


def shown(values: Sequence[Any] | pd.Index | pd.Series, most: int = 3) -> str:
    """Some values for a message, as Python writes them."""
    some = pd.Index(values[:most]).tolist()
    return ", ".join(map(repr, some)) + (", ..." if len(values) > most else "")


class DataRows:
    """The rows of the data, by everything that may identify them.

    Args:
        data: a table.

    Attributes:
        labels: `row_labels`.
    """

    def __init__(self, data: Any):
        self.data = data
        self.labels = row_labels(data)

    @cached_property
    def columns(self) -> dict[str, pd.Index]:
        """Text of the columns of words and whole numbers; they may hold labels."""
        names = column_names(self.data)
        found = {}
        for name in names:
            if names.count(name) == 1:
                with suppress(DataError):  # a column that no model could use may well be unused
                    column = to_pandas(self.data, [name]).iloc[:, 0]
                    if _may_identify(column):
                        found[name] = _text(column)
        return found

    def ids(self, name: str) -> pd.Series | None:
        """The column of that name, or the labels if that is their name; None if neither is.

        Raises:
            DataError: several columns have that name.
        """
        return ids_of(self.data, self.labels, name)

    def check(self, theirs: pd.Index | None) -> None:
        """See that rows matched by position are the same rows, as far as labels tell.

        Args:
            theirs: labels of the responses, as many as rows of the data.

        Raises:
            DataError: they are in another order, or other rows, by the labels of the data or by a
                column of it.
        """
        if theirs is None or (self.labels is not None and self.labels.equals(theirs)):
            return
        ours = self.labels
        if ours is not None and sorted(_text(ours)) == sorted(_text(theirs)):
            raise DataError(
                "the data and the responses have the same row labels in different orders, and "
                "without id rows are matched by position; bring them in one order (for example "
                "responses.loc[data.index]), or reset the index of one"
            )
        held = {} if is_count(theirs) else self._holders(theirs)
        if any(same for _, same in held.values()):
            return
        for name, (unique, _) in held.items():
            remedy = f'pass id="{name}"' if unique else "bring the rows in one order"
            raise DataError(
                f"the row labels of the responses ({shown(theirs)}) are values of the column "
                f"{name!r} of the data, where other rows have them, and without id rows are "
                f"matched by position: {remedy}"
            )
        if ours is None:
            return
        whole = [pd.api.types.is_integer_dtype(labels.dtype) for labels in (ours, theirs)]
        if (is_count(ours) or is_count(theirs)) and not all(whole):
            return  # one of the two has no labels
        differ = ", ".join(_differences(ours, theirs)) or "they repeat"
        raise DataError(
            f"row labels differ: {differ}; keep the same rows in both, in one order. If they are "
            "the same rows, reset the index of both; if a column says which they are, pass "
            'id="that column"'
        )

    def difference(self, theirs: pd.Index | None) -> str:
        """The row labels that only the data or only the responses have, for a message; or none."""
        if theirs is None or self.labels is None or is_count(theirs) or is_count(self.labels):
            return ""
        return ", ".join(["; by row labels", *_differences(self.labels, theirs)])

    def _holders(self, labels: pd.Index) -> dict[str, tuple[bool, bool]]:
        """Columns that hold such labels: whether they identify rows, and have them in this order.

        Whole numbers are many things besides labels: only a column of exactly these counts.
        """
        text = _text(labels)
        exactly = pd.api.types.is_integer_dtype(labels.dtype)
        found = {}
        for name, column in self.columns.items():
            unique = column.is_unique and text.is_unique
            if len(column) == len(text) and column.equals(text):
                found[name] = (unique, True)
            elif unique and not exactly:
                if text.isin(column).mean() >= MOST:
                    found[name] = (True, False)
            elif sorted(column) == sorted(text):
                found[name] = (unique, False)
        return found

    def holding(self, names: pd.Index) -> str | None:
        """Where the data have most of `names` as the labels of rows, in words."""
        if len(names) < 2 or pd.api.types.is_integer_dtype(names.dtype):
            return None
        text = _text(names)
        places = {f"the column {name!r}": column for name, column in self.columns.items()}
        if self.labels is not None and not is_count(self.labels):
            places = {"the row labels": _text(self.labels), **places}
        for place, values in places.items():
            if values.is_unique and text.isin(values).mean() > MOST:
                return f"{place} of the data"
        return None

    def check_column(self, name: str, theirs: pd.Series) -> None:
        """See that a column that both tables have does not say that other rows are matched.

        Raises:
            DataError: it identifies rows, and has the same values in other rows.
        """
        column = self.columns.get(name)
        if column is None or not column.is_unique or not _may_identify(theirs):
            return
        text = _text(theirs)
        if not column.equals(text) and text.is_unique and text.isin(column).mean() >= MOST:
            raise DataError(
                f"the column {name!r} of the data and of the responses has the same values in "
                f'other rows, and without id rows are matched by position: pass id="{name}"'
            )


def ids_of(table: Any, labels: pd.Index | None, name: str) -> pd.Series | None:
    """The column `name` of a table, or its labels if that is their name; None if neither is.

    Raises:
        DataError: several columns have that name.
    """
    columns = column_names(table)
    if columns.count(name) > 1:
        raise DataError(f"column {name!r} occurs more than once; rename one")
    if name in columns:
        return to_pandas(table, [name]).iloc[:, 0].reset_index(drop=True)
    if labels is not None and name in labels.names:
        return pd.Series(labels.get_level_values(name))
    return None


def match_ids(ours: pd.Series, theirs: pd.Series, id: str) -> np.ndarray:
    """For each row of the data, the row of the responses with the same id.

    Raises:
        DataError: ids that are missing, occur twice or are in one of the two only.
    """
    for where, ids in (("data", ours), ("responses", theirs)):
        if ids.isna().any():
            raise DataError(
                f"{int(ids.isna().sum())} rows of the {where} have no {id!r}; fill it in, or drop "
                "the rows"
            )
        repeated = ids.loc[ids.duplicated()]
        if len(repeated):
            raise DataError(
                f"the id {shown(repeated[:1])} occurs more than once in column {id!r} "
                f"of the {where}; ids must be unique there"
            )
    left, right = pd.Index(ours.tolist()), pd.Index(theirs.tolist())
    if _is_text(left) != _is_text(right):  # numbers in one table, the same as words in the other
        left, right = _text(left), _text(right)
    order = right.get_indexer(left)
    differ = " and ".join(_differences(left, right))
    if differ:
        raise DataError(f"the ids in {id!r} do not match: {differ}; keep the same rows in both")
    return order


def missing_ids(id: str, where: str, columns: list[str], labels: pd.Index | None) -> DataError:
    """The error where there are no ids of that name."""
    names = [str(name) for name in (labels.names if labels is not None else []) if name is not None]
    index = f"; the index is {', '.join(map(repr, names))}" if names else ""
    return DataError(f"id={id!r} is not a column of the {where}{nearest(id, columns)}{index}")


def _differences(ours: pd.Index, theirs: pd.Index) -> list[str]:
    """What is in one of the two only, in words."""
    left, right = ours[~ours.isin(theirs)], theirs[~theirs.isin(ours)]
    return [
        f"{len(labels)} only in the {where} ({shown(labels)})"
        for where, labels in (("data", left), ("responses", right))
        if len(labels)
    ]


def _may_identify(column: pd.Series) -> bool:
    """Whether a column has words or whole numbers."""
    types = pd.api.types
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype) or types.is_integer_dtype(kind):
        return True
    return types.is_string_dtype(kind) or (types.is_object_dtype(kind) and _is_text(column))


def _is_text(values: pd.Index | pd.Series) -> bool:
    return pd.api.types.infer_dtype(values, skipna=True) == "string"


def _text(values: pd.Index | pd.Series) -> pd.Index:
    return pd.Index([str(value) for value in values.tolist()], dtype=object)
