"""Where responses come from: arrays, memory maps, dataframes and files, as columns of float64.

None is modified, and only what is in memory already is ever whole in memory. A source has `names`,
`n` rows and their `labels` (None without), and says which of its columns are no numbers.
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

from jaxreml.backend.lazy import is_of_jax
from jaxreml.data.labels import arrow_index, from_arrow, ids_of, row_labels, shown
from jaxreml.data.tables import column_names, to_pandas
from jaxreml.errors import DataError

KINDS = (
    "a dataframe, an (n, B) array, the path of a .parquet or .npy file, or an iterable of "
    "(names, (n, b) array) pairs or dataframes"
)


class Array:
    """Columns of an array: NumPy's, a memory map, or anything that slices like one."""

    labels: pd.Index | None = None

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

    def not_numeric(self) -> list[tuple[Any, Any]]:
        """Columns that are not numbers, with their kinds: none."""
        return []

    def ids(self, name: str) -> pd.Series | None:
        """Values of the id column, which an array cannot have: DataError."""
        raise DataError(
            f"id={name!r} needs responses in a dataframe with that column, not an array"
        )


class Table:
    """Columns of a dataframe in memory; the one named `id` is no response, nor is an index."""

    def __init__(self, table: Any, id: str | None = None):
        self.labels = row_labels(table)
        if isinstance(table, Mapping):
            table = to_pandas(table, list(table))
        self.pandas = isinstance(table, pd.DataFrame)
        index = [] if self.pandas or not _is_arrow(table) else arrow_index(table.schema)[0]
        columns = column_names(table)
        own = [name != id and name not in index for name in columns]
        self._positions = np.flatnonzero(own)
        self.names = check_names([columns[k] for k in self._positions])
        self.table = table if self.pandas else nw.from_native(table, eager_only=True)
        self.n = len(table)

    def not_numeric(self) -> list[tuple[Any, Any]]:
        """Columns that are not numbers, with their kinds."""
        if not self.pandas:
            return _not_numeric(self.table, self.names)
        kinds = self.table.dtypes.iloc[self._positions]
        pairs = zip(self.names, kinds, strict=True)
        return [
            (name, kind)
            for name, kind in pairs
            if not _is_number(kind)
            # Objects may be numbers all the same, as in the data.
            and not (_is_object(kind) and _is_number(to_pandas(self.table, [name]).dtypes.iloc[0]))
        ]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start), a copy."""
        if not self.pandas:
            return _matrix(self.table, list(self.names[start:stop]))
        part = self.table.iloc[:, self._positions[start:stop]]
        if all(isinstance(kind, np.dtype) and not _is_object(kind) for kind in part.dtypes):
            return np.array(part, dtype=float, order="C")
        columns = [column.to_numpy(float, na_value=np.nan) for _, column in part.items()]
        return np.stack(columns, axis=1)

    def ids(self, name: str) -> pd.Series | None:
        """Values of the id column, or of the index of that name; None if there is neither."""
        return ids_of(self.table if self.pandas else self.table.to_native(), self.labels, name)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return column_names(self.table if self.pandas else self.table.to_native())


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
        index, count = arrow_index(schema)
        names = [name for name in schema.names if name != id and name not in index]
        self.names = check_names(matching(names, pattern))
        self.n = self.file.metadata.num_rows
        self.labels = from_arrow(self.file.read(columns=index), index) if index else count

    def not_numeric(self) -> list[tuple[Any, Any]]:
        """Columns that are not numbers, with their kinds."""
        empty = self.file.schema_arrow.empty_table().select(list(self.names))
        return _not_numeric(nw.from_native(empty, eager_only=True), self.names)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start)."""
        names = list(self.names[start:stop])
        # The file also gives columns of which a name is a prefix ("a.b" for "a"): select again.
        table = self.file.read(columns=names).select(names)
        return _matrix(nw.from_native(table, eager_only=True), names)

    def ids(self, name: str) -> pd.Series | None:
        """Values of the id column, or of the index of that name; None if there is neither."""
        if name in self.columns:
            return ids_of(self.file.read(columns=[name]).select([name]), None, name)
        found = self.labels is not None and name in self.labels.names
        return pd.Series(self.labels.get_level_values(name)) if found else None  # pyright: ignore

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return self.file.schema_arrow.names


Source = Array | Table | Parquet


def open_source(responses: Any, id: str | None) -> Source | None:
    """Responses that can be read in any order; None for a stream.

    Raises:
        DataError: not a kind of responses, or a file that cannot be read.
    """
    if isinstance(responses, Source):
        return responses
    _refuse_kind(responses, "responses are")
    responses = _plain(responses)
    if isinstance(responses, str | Path):
        return _open_file(Path(responses), id)
    if isinstance(responses, pd.Series):
        name = 0 if responses.name is None else responses.name
        return Table(responses.to_frame(name), id)
    if isinstance(responses, Mapping | pd.DataFrame) or _is_table(responses):
        return Table(responses, id)
    if hasattr(responses, "__array__"):
        return Array(np.asarray(responses) if is_of_jax(responses) else responses)
    if isinstance(responses, Iterable):
        return None
    raise DataError(f"responses must be {KINDS}, not {type(responses).__name__}")


def _refuse_kind(value: Any, what: str) -> None:
    """DataError with the remedy for what looks like responses and holds none as it is."""
    package = type(value).__module__.partition(".")[0]
    name = type(value).__name__
    if package == "scipy" and hasattr(value, "toarray"):
        raise DataError(
            f"{what} a SciPy sparse matrix: pass .toarray(), or blocks of columns made dense, "
            "((names[k : k + 500], matrix[:, k : k + 500].toarray()) for k in range(0, B, 500))"
        )
    if package in ("anndata", "mudata"):
        raise DataError(
            f"{what} an {name} object: pass adata.to_df(), or adata.to_df(layer) of a layer, with "
            "adata.obs as the data"
        )
    if isinstance(value, list | tuple) and value and all(_is_row(row) for row in value):
        raise DataError(
            f"{what} a {name} of {type(value[0]).__name__}s: pass np.array(responses, float), a "
            "row for each row of the data and a column per response"
        )


def _is_row(value: Any) -> bool:
    """Whether it is a list of numbers, or a number."""
    if isinstance(value, list | tuple):
        return all(isinstance(number, float | int | np.number | None) for number in value)
    return isinstance(value, float | int | np.number)


def _plain(responses: Any) -> Any:
    """An array of xarray with its labels as a dataframe; all else as it is."""
    package = type(responses).__module__.partition(".")[0]
    if package == "xarray" and hasattr(responses, "to_pandas"):
        if len(getattr(responses, "dims", ())) > 2:
            raise DataError(
                f"responses must have two dimensions, rows and responses, not {responses.dims}"
            )
        return responses.to_pandas()
    return responses


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
            f"response {shown(repeated[:1])}{more} occurs more than once; names must be unique: "
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
    values = piece[1] if isinstance(piece, tuple) and len(piece) == 2 else piece
    _refuse_kind(values, f"block {k} of the responses is")
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


def _is_arrow(table: Any) -> bool:
    return hasattr(table, "schema") and hasattr(table.schema, "pandas_metadata")


def _is_object(kind: Any) -> bool:
    return pd.api.types.is_object_dtype(kind)


def _is_number(kind: Any) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(kind) and not types.is_complex_dtype(kind))


def _not_numeric(table: nw.DataFrame, names: Iterable[Any]) -> list[tuple[Any, Any]]:
    kinds = table.schema
    return [
        (name, kinds[name])
        for name in names
        if not (kinds[name].is_numeric() or kinds[name] == nw.Boolean)
    ]


def refuse_not_numeric(bad: list[tuple[Any, Any]]) -> None:
    """DataError if there are columns in `bad`, (name, kind)."""
    if bad:
        listed = ", ".join(f"{name!r} ({kind})" for name, kind in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"responses that are not numeric: {listed}{more}; convert them, leave them out, or "
            "pass the name of the one that identifies rows as id="
        )


def _matrix(table: nw.DataFrame, names: list[Any]) -> np.ndarray:
    """Columns as float64, (n, b), missing values as NaN."""
    columns = [table[name].cast(nw.Float64).to_numpy() for name in names]
    return np.stack(columns, axis=1)


def _let_go(values: Any) -> None:
    """Take the pages read of a memory map out of this process; the file keeps them.

    Without this a map of 4 GB ends up as 4 GB of this process. A private map (mode "c") is left
    alone: its pages may be the only place of changes.
    """
    if isinstance(values, np.memmap) and getattr(values, "mode", "c") != "c":
        pages = getattr(values, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
