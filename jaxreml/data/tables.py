"""Any table that a user may have, as pandas columns of the kinds in `columns`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from jaxreml.data.columns import column
from jaxreml.errors import DataError


def nearest(name: str, columns: list[Any], quoted: bool = False) -> str:
    """A hint for an error message: the names most like `name`, and what there is.

    Args:
        name: what is not there.
        columns: what is.
        quoted: whether names are shown as formulas have them, in backticks where they need it.
    """
    texts = list(map(str, columns))
    shown = {text: as_typed(text) if quoted else text for text in texts}
    near = difflib.get_close_matches(name, texts, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(shown[text]) for text in near)}?" if near else "."
    listed = ", ".join(shown[text] for text in texts[:20]) + (", ..." if len(texts) > 20 else "")
    return f"{hint} The columns are: {listed}"


def as_typed(name: str) -> str:
    """A column's name as it is written in a formula."""
    return name if name.isidentifier() else f"`{name}`"


def column_names(data: Any) -> list[Any]:
    """Names of the columns, repeated ones repeatedly; DataError if `data` is no table."""
    if isinstance(data, Mapping):
        return list(data)
    if isinstance(data, pd.DataFrame):
        return list(data.columns)
    if _is_records(data):
        return list(data.dtype.names)
    try:
        return nw.from_native(data, eager_only=True).columns
    except TypeError:
        if isinstance(data, str | os.PathLike):
            raise DataError(
                f"data must be a table, not the name of a file, {os.fspath(data)!r}; read it "
                "first, for example with pandas.read_csv"
            ) from None
        if hasattr(data, "collect"):
            raise DataError("data is a lazy frame; call .collect() on it first") from None
        if hasattr(data, "obs"):
            raise DataError(
                "data is an AnnData object; pass its obs, the table of its rows"
            ) from None
        raise DataError(
            "data must be a dataframe (pandas, polars, pyarrow, ...), a dict of columns or a "
            f"NumPy array of records, not {type(data).__name__}"
        ) from None


def texts_of_names(data: Any) -> list[str]:
    """`column_names` as formulas have them: an integer name is its digits."""
    return [str(name) for name in column_names(data)]


def to_pandas(data: Any, names: list[Any]) -> pd.DataFrame:
    """The columns `names`, each as `columns.column` decides.

    Raises:
        DataError: columns that cannot be used; those of a dict that are not of one length, or are
            Series with different row labels.
    """
    keys = column_names(data)
    texts = list(map(str, keys))
    places = [keys.index(name) if name in keys else texts.index(str(name)) for name in names]
    if isinstance(data, pd.DataFrame):
        found = {name: column(name, data.iloc[:, k]) for name, k in zip(names, places, strict=True)}
        return pd.DataFrame(found, index=data.index)
    if isinstance(data, Mapping) or _is_records(data):
        return _from_columns({name: data[keys[k]] for name, k in zip(names, places, strict=True)})
    frame = nw.from_native(data, eager_only=True)
    return pd.DataFrame(
        {
            name: column(name, frame[keys[k]].to_native())
            for name, k in zip(names, places, strict=True)
        }
    )


def _from_columns(given: dict[Any, Any]) -> pd.DataFrame:
    """Columns of a dict, scalars repeated."""
    labels = [values.index for values in given.values() if isinstance(values, pd.Series)]
    if any(not index.equals(labels[0]) for index in labels):
        names = [name for name, values in given.items() if isinstance(values, pd.Series)]
        raise DataError(
            f"the Series {', '.join(map(str, names))} of the dict have different row labels; put "
            "them in one pandas.DataFrame, which matches rows, or reset their indexes"
        )
    scalars = {name for name, values in given.items() if _is_scalar(values)}
    found = {
        name: column(name, values).reset_index(drop=True)
        for name, values in given.items()
        if name not in scalars
    }
    if len({len(values) for values in found.values()}) > 1:
        sizes = ", ".join(f"{name}: {len(values)}" for name, values in found.items())
        raise DataError(f"columns of different lengths: {sizes}")
    n = len(next(iter(found.values()))) if found else 1
    for name in scalars:
        one = column(name, [given[name]])
        found[name] = one.take(np.zeros(n, int)).reset_index(drop=True)
    return pd.DataFrame({name: found[name] for name in given})


def _is_scalar(values: Any) -> bool:
    if isinstance(values, str | bytes) or values is None:
        return True
    return np.ndim(values) == 0 if hasattr(values, "ndim") else not hasattr(values, "__len__")


def _is_records(data: Any) -> bool:
    return isinstance(data, np.ndarray) and data.dtype.names is not None


def beside(role: str, value: Any, data: Any, n: int) -> np.ndarray:
    """Numbers that go with the rows of a table, (n,), NaN where missing.

    Args:
        role: the argument, for messages.
        value: a column's name, an array, or a pandas Series, which is matched with a pandas
            `data` by its row labels.
        data: the table.
        n: its rows.

    Raises:
        DataError: no such column, not numbers, another length, or other row labels.
    """
    if isinstance(value, str):
        names = texts_of_names(data)
        if value not in names:
            raise DataError(f"{role}={value!r} is not a column of the data{nearest(value, names)}")
        values = to_pandas(data, [value])[value]
    elif isinstance(value, np.ndarray | list | tuple) and np.shape(value) == ():
        raise DataError(f"{role} must be a column name or {n} values")
    elif _is_scalar(value):
        raise DataError(f"{role} must be a column name or {n} values, not {value!r}")
    else:
        values = column(role, value)
        if len(values) != n:
            raise DataError(f"{role} must be a column name or {n} values, not {len(values)}")
        if isinstance(value, pd.Series) and isinstance(data, pd.DataFrame):
            values = _in_order(role, values, data.index)
    if not pd.api.types.is_numeric_dtype(values.dtype):
        raise DataError(f"{role} must be numeric, not {values.dtype} (such as {values.iloc[0]!r})")
    return values.to_numpy(float, na_value=np.nan)


def _in_order(role: str, values: pd.Series, index: pd.Index) -> pd.Series:
    """A Series in the order of row labels that are also its own."""
    if values.index.equals(index):
        return values
    places = values.index.get_indexer(index) if values.index.is_unique else np.array([-1])
    if not index.is_unique or np.any(places < 0):
        raise DataError(
            f"{role} is a Series whose row labels are not those of the data: give it the same "
            f"index, or pass {role}.to_numpy() to match rows by their position"
        )
    return values.iloc[places]
