"""Where responses come from: arrays, memory maps, dataframes and files, as columns of float64.

None is modified, and only what is in memory already is ever whole in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.tabular import column_names, nearest, to_pandas

KINDS = (
    "a dataframe, an (n, B) array, the path of a .parquet or .npy file, or an iterable of "
    "(names, (n, b) array) pairs or dataframes"
)


class Array:
    """Columns of an array: NumPy's, a memory map, or anything that slices like one."""

    def __init__(self, values: Any, names: Any = None):
        if not hasattr(values, "ndim") or not hasattr(values, "dtype"):
            values = np.asarray(values)
        if values.ndim == 1:
            values = values.reshape(-1, 1)
        if values.ndim != 2:
            raise DataError(
                f"responses must be an (n, B) array, a column per response, not {values.shape}"
            )
        kind = np.dtype(values.dtype)
        if kind.kind not in "biuf":
            raise DataError(
                f"the responses are an array of dtype {kind}, which is not numeric; convert it, "
                "for example with .astype(float)"
            )
        self.values, self.n = values, values.shape[0]
        self.names = pd.RangeIndex(values.shape[1]) if names is None else check_names(names)
        if len(self.names) != values.shape[1]:
            raise DataError(
                f"{len(self.names)} names for {values.shape[1]} responses: a block is a pair of "
                "names and an (n, b) array with a column per name"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start), a copy."""
        part = self.values[:, start:stop]
        if isinstance(part, np.ma.MaskedArray):
            return np.ma.filled(part.astype(float), np.nan)
        block = np.array(part, dtype=float, order="C")
        _let_go(self.values)
        return block

    def ids(self, name: str) -> pd.Series:
        """Values of the id column, which an array cannot have: DataError."""
        raise DataError(
            f"id={name!r} needs responses in a dataframe with that column, not an array"
        )


class Table:
    """Columns of a dataframe in memory; the one named `id` is no response."""

    def __init__(self, table: Any, id: str | None = None):
        if isinstance(table, Mapping):
            table = to_pandas(table, list(table))
        columns = column_names(table)
        self.names = check_names([name for name in columns if name != id])
        self.pandas = isinstance(table, pd.DataFrame)
        self.table = table if self.pandas else nw.from_native(table, eager_only=True)
        if self.pandas:
            kinds = zip(columns, table.dtypes, strict=True)
            bad = [(name, kind) for name, kind in kinds if name != id and not _is_number(kind)]
        else:
            bad = _not_numeric(self.table, id)
        _refuse(bad)
        self.n = len(table)
        self.index = table.index if isinstance(table, pd.DataFrame) else None
        self._positions = np.flatnonzero([name != id for name in columns])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start), a copy."""
        if not self.pandas:
            return _matrix(self.table, list(self.names[start:stop]))
        part = self.table.iloc[:, self._positions[start:stop]]
        if all(isinstance(kind, np.dtype) for kind in part.dtypes):
            return np.array(part, dtype=float, order="C")
        columns = [column.to_numpy(float, na_value=np.nan) for _, column in part.items()]
        return np.stack(columns, axis=1)

    def ids(self, name: str) -> pd.Series:
        """Values of the id column."""
        return id_column(self.table if self.pandas else self.table.to_native(), name)


class Parquet:
    """Columns of a parquet file, read when they are needed.

    Args:
        path: the file.
        id: a column that is no response.
        pattern: a glob for the columns wanted; all but `id` if left out.
    """

    def __init__(self, path: str | Path, id: str | None = None, pattern: str | None = None):
        pq = import_parquet(f"reading {str(path)!r}")
        import pyarrow as pa

        self.path = str(path)
        try:
            self.file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path!r} cannot be read: {error}") from None
        schema = self.file.schema_arrow
        # An index that pandas wrote as a column is no response.
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        names = [name for name in schema.names if name != id and name not in index]
        self.names = check_names(matching(names, pattern))
        empty = schema.empty_table().select(list(self.names))
        _refuse(_not_numeric(nw.from_native(empty, eager_only=True), id))
        self.n = self.file.metadata.num_rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start)."""
        names = list(self.names[start:stop])
        # The file also gives columns of which a name is a prefix ("a.b" for "a"): select again.
        table = self.file.read(columns=names).select(names)
        return _matrix(nw.from_native(table, eager_only=True), names)

    def ids(self, name: str) -> pd.Series:
        """Values of the id column."""
        names = self.file.schema_arrow.names
        if name not in names:
            raise DataError(f"id={name!r} is not a column of {self.path!r}{nearest(name, names)}")
        return id_column(self.file.read(columns=[name]).select([name]), name)


Source = Array | Table | Parquet


def open_source(responses: Any, id: str | None) -> Source | None:
    """Responses that can be read in any order; None for a stream.

    Raises:
        DataError: not a kind of responses, or a file that cannot be read.
    """
    if isinstance(responses, Source):
        return responses
    if isinstance(responses, str | Path):
        return _open_file(Path(responses), id)
    if isinstance(responses, pd.Series):
        name = 0 if responses.name is None else responses.name
        return Table(responses.to_frame(name), id)
    if isinstance(responses, Mapping | pd.DataFrame) or _is_table(responses):
        return Table(responses, id)
    if hasattr(responses, "__array__"):
        import jax

        return Array(np.asarray(responses) if isinstance(responses, jax.Array) else responses)
    if isinstance(responses, Iterable):
        return None
    raise DataError(f"responses must be {KINDS}, not {type(responses).__name__}")


def import_parquet(what: str) -> Any:
    """pyarrow's parquet module; DataError that says how to install it."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{what} needs pyarrow: pip install 'jaxreml[arrow]'") from None
    return pq


def check_names(names: Any) -> pd.Index:
    """Names of responses as an index.

    Raises:
        DataError: a name that repeats; names that are neither all strings nor all integers.
    """
    index = names if isinstance(names, pd.RangeIndex) else pd.Index(names, tupleize_cols=False)
    kind = pd.api.types.infer_dtype(index, skipna=False)
    if kind not in ("string", "integer", "empty"):
        example = next((k for k in index if not isinstance(k, str)), index[0])
        raise DataError(
            f"the names of the responses must be all strings or all integers (one is {example!r}, "
            f"they are {kind}); rename the columns"
        )
    if not index.is_unique:
        refuse_repeated(list(index[index.duplicated()]))
    return index


def matching(names: list[str], pattern: str | None) -> list[str]:
    """The names that match a glob, all if it is None; DataError if none does."""
    found = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if names and not found:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise DataError(f"no response matches the pattern {pattern!r}; the columns are: {listed}")
    return found


def refuse_repeated(repeated: list[Any]) -> None:
    """DataError if there are names in `repeated`, those that occur more than once."""
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise DataError(
            f"response {repeated[0]!r}{more} occurs more than once; names must be unique: "
            "rename or drop the columns"
        )


def _open_file(path: Path, id: str | None) -> Source:
    if path.suffix not in (".parquet", ".npy"):
        raise DataError(
            f"responses {str(path)!r}: only files ending in .parquet or .npy are read; load "
            "another into a dataframe first"
        )
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    if path.suffix == ".parquet":
        return Parquet(path, id)
    try:
        return Array(np.load(path, mmap_mode="r"))
    except (ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None


def open_piece(piece: Any, k: int, id: str | None) -> Array | Table:
    """Block number k of a stream."""
    if isinstance(piece, tuple) and len(piece) == 2 and not isinstance(piece[0], str):
        names, values = piece
        if np.ndim(values) != 2:
            raise DataError(f"block {k} of the responses: an (n, b) array, not {np.shape(values)}")
        return Array(values, list(names))
    if isinstance(piece, pd.DataFrame) or _is_table(piece):
        return Table(piece, id)
    raise DataError(
        f"block {k} of the responses is of type {type(piece).__name__}: blocks must be pairs "
        "(names, (n, b) array) or dataframes; an array as a whole must be a NumPy array"
    )


def _is_table(value: Any) -> bool:
    frame = nw.from_native(value, pass_through=True)
    if isinstance(frame, nw.LazyFrame):
        raise DataError("responses is a lazy frame; call .collect() on it first")
    return isinstance(frame, nw.DataFrame)


def _is_number(kind: Any) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(kind) and not types.is_complex_dtype(kind))


def _not_numeric(table: nw.DataFrame, id: str | None) -> list[tuple[str, Any]]:
    return [
        (name, kind)
        for name, kind in table.schema.items()
        if name != id and not (kind.is_numeric() or kind == nw.Boolean)
    ]


def _refuse(bad: list[tuple[Any, Any]]) -> None:
    if bad:
        listed = ", ".join(f"{name!r} ({kind})" for name, kind in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"responses that are not numeric: {listed}{more}; convert them, leave them out, or "
            "name the one that identifies rows as id"
        )


def _matrix(table: nw.DataFrame, names: list[Any]) -> np.ndarray:
    """Columns as float64, (n, b), missing values as NaN."""
    columns = [table[name].cast(nw.Float64).to_numpy() for name in names]
    return np.stack(columns, axis=1)


def id_column(table: Any, name: str) -> pd.Series:
    """The column `name`; DataError if there is none, or several."""
    columns = column_names(table)
    if name not in columns:
        raise DataError(f"id={name!r} is not a column of the table{nearest(name, columns)}")
    if columns.count(name) > 1:
        raise DataError(f"column {name!r} occurs more than once; rename one")
    return to_pandas(table, [name]).iloc[:, 0]


def _let_go(values: Any) -> None:
    """Take the pages read of a memory map out of this process; the file keeps them.

    Without this a map of 4 GB ends up as 4 GB of this process. A private map (mode "c") is left
    alone: its pages may be the only place of changes.
    """
    if isinstance(values, np.memmap) and getattr(values, "mode", "c") != "c":
        pages = getattr(values, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
