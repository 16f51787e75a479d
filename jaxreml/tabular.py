"""Any table that a user may have, as pandas columns of NumPy's types."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from jaxreml.errors import DataError


def nearest(name: str, columns: list[str]) -> str:
    """A hint for an error message: the names most like `name`, and what there is."""
    near = difflib.get_close_matches(name, map(str, columns), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    listed = ", ".join(map(str, columns[:20])) + (", ..." if len(columns) > 20 else "")
    return f"{hint} The columns are: {listed}"


def column_names(data: Any) -> list[str]:
    """Names of the columns, repeated ones repeatedly; DataError if `data` is no table."""
    if isinstance(data, Mapping):
        return list(data)
    if isinstance(data, pd.DataFrame):
        return list(data.columns)
    try:
        return nw.from_native(data, eager_only=True).columns
    except TypeError:
        if hasattr(data, "collect"):
            raise DataError("data is a lazy frame; call .collect() on it first") from None
        raise DataError(
            "data must be a dataframe (pandas, polars, pyarrow, ...) or a dict of columns, not "
            f"{type(data).__name__}"
        ) from None


def to_pandas(data: Any, names: list[str]) -> pd.DataFrame:
    """The columns `names`, categories and their order kept, missing values as NaN or None.

    Raises:
        DataError: columns of a dict that are not vectors of one length.
    """
    if isinstance(data, pd.DataFrame):
        columns = {name: _plain(data[name]) for name in names}  # pyright: ignore
        return pd.DataFrame(columns, index=data.index)
    if isinstance(data, Mapping):
        columns = {name: _from_values(name, data[name]) for name in names}
        if len({len(column) for column in columns.values()}) > 1:
            sizes = ", ".join(f"{name}: {len(column)}" for name, column in columns.items())
            raise DataError(f"columns of different lengths: {sizes}")
        return pd.DataFrame(columns)
    frame = nw.from_native(data, eager_only=True)
    return pd.DataFrame({name: _from_narwhals(frame[name]) for name in names})


def _from_values(name: str, values: Any) -> pd.Series:
    if not isinstance(values, pd.Series | pd.Categorical | list):
        values = np.asarray(values)
    if np.ndim(values) != 1:
        raise DataError(f"column {name!r} must be one-dimensional, not {np.shape(values)}")
    return _plain(pd.Series(values).reset_index(drop=True))


def _plain(column: pd.Series) -> pd.Series:
    """A pandas column in NumPy's types, missing values as NaN or None."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype | np.dtype):
        return column
    if pd.api.types.is_bool_dtype(kind) and not column.isna().any():
        return column.astype(bool)
    if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind):
        return pd.Series(column.to_numpy(float, na_value=np.nan), index=column.index)
    return column


def _from_narwhals(column: nw.Series) -> Any:
    if isinstance(column.dtype, nw.Categorical | nw.Enum):
        levels = column.cat.get_categories().to_list()
        return pd.Categorical(column.to_list(), categories=levels)
    if column.dtype.is_numeric():
        return column.cast(nw.Float64).to_numpy() if column.null_count() else column.to_numpy()
    return pd.Series(column.to_list())
