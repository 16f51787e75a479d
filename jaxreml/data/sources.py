"""Where responses come from: matrices, dataframes and files, as columns of float64.

None is modified, and only what is in memory already is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from jaxreml.backend.lazy import is_of_jax
from jaxreml.data.labels import arrow_index, from_arrow, ids_of, row_labels
from jaxreml.data.matrices import Array, annotated, is_anndata, is_sparse, matrix
from jaxreml.data.names import check_names, matching
from jaxreml.data.tables import column_names, to_pandas
from jaxreml.errors import DataError

KINDS = (
    "a dataframe, an (n, B) array or sparse matrix, an AnnData object, the path of a .parquet, "
    ".feather or .npy file or of a folder of these, or an iterable of (names, (n, b) array) pairs "
    "or dataframes"
)
ARROW = {".parquet": "parquet", ".feather": "feather", ".arrow": "ipc", ".ipc": "ipc"}


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

    def __init__(self, path: Any, id: str | None = None, pattern: str | None = None):
        import_parquet(f"reading {str(path)!r}")
        import pyarrow as pa

        self.path = str(path)
        try:
            self.schema, self.n = self._open(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path!r} cannot be read: {error}") from None
        # An index that pandas wrote as a column is no response.
        index, count = arrow_index(self.schema)
        names = [name for name in self.schema.names if name != id and name not in index]
        self.names = check_names(matching(names, pattern))
        self.labels = from_arrow(self._table(index), index) if index else count

    def _open(self, path: Any) -> tuple[Any, int]:
        """The schema and the number of rows."""
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path)
        return self.file.schema_arrow, self.file.metadata.num_rows

    def _table(self, names: list[Any]) -> Any:
        # The file also gives columns of which a name is a prefix ("a.b" for "a"): select again.
        return self.file.read(columns=names).select(names)

    def not_numeric(self) -> list[tuple[Any, Any]]:
        """Columns that are not numbers, with their kinds."""
        empty = self.schema.empty_table().select(list(self.names))
        return _not_numeric(nw.from_native(empty, eager_only=True), self.names)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start)."""
        names = list(self.names[start:stop])
        return _matrix(nw.from_native(self._table(names), eager_only=True), names)

    def ids(self, name: str) -> pd.Series | None:
        """Values of the id column, or of the index of that name; None if there is neither."""
        if name in self.columns:
            return ids_of(self._table([name]), None, name)
        found = self.labels is not None and name in self.labels.names
        return pd.Series(self.labels.get_level_values(name)) if found else None  # pyright: ignore

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return self.schema.names


class ArrowFiles(Parquet):
    """Columns of one table in several files, the rows of one after those of another, or of a data
    set of pyarrow.

    Args:
        files: paths of files of one kind, in order; or a `pyarrow.dataset.Dataset`.
        id, pattern: as of `Parquet`.
    """

    def _open(self, path: Any) -> tuple[Any, int]:
        import pyarrow.dataset as ds

        self.file = path
        if isinstance(path, list):
            self.path = str(path[0])
            self.file = ds.dataset(list(map(str, path)), format=ARROW[path[0].suffix])
        schema = self.file.schema.remove_metadata()
        for piece in self.file.get_fragments():
            own = piece.physical_schema
            # Of the first file only: what it says of an index, and that need not be true of all.
            if arrow_index(own)[0]:
                schema = self.file.schema
            if set(own.names) != set(schema.names):
                raise DataError(
                    f"{getattr(piece, 'path', 'a part')!r} has other columns than the first file: "
                    "files of a data set hold rows of one table. If they hold responses each, pass "
                    "an iterator of them, such as (pandas.read_parquet(path) for path in paths)"
                )
        return schema, self.file.count_rows()

    def _table(self, names: list[Any]) -> Any:
        return self.file.to_table(columns=names)


Source = Array | Table | Parquet


def open_source(responses: Any, id: str | None, layer: str | None = None) -> Source | None:
    """Responses that can be read in any order; None for a stream.

    Args:
        responses: see `fit_many`.
        id: a column that is no response.
        layer: of an AnnData object.

    Raises:
        DataError: not a kind of responses, a file that cannot be read, or no such layer.
        ValueError: a layer of something else.
    """
    if is_anndata(responses):
        return annotated(responses, layer)
    if layer is not None:
        raise ValueError(f"layer={layer!r} needs an AnnData object as responses")
    if isinstance(responses, Source):
        return responses
    if is_sparse(responses):
        return matrix(responses)
    _refuse_kind(responses, "responses are")
    responses = _plain(responses)
    if isinstance(responses, str | Path):
        return _open_path(Path(responses), id)
    if type(responses).__module__.startswith("pyarrow._dataset"):
        return ArrowFiles(responses, id)
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
    if package in ("anndata", "mudata"):
        raise DataError(
            f"{what} an {name} object: pass one AnnData object (of MuData one modality) as all "
            "responses, with its obs as the data"
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


def _open_path(path: Path, id: str | None) -> Source:
    if path.is_dir():
        return ArrowFiles(_files(path), id)
    if path.suffix not in (*ARROW, ".npy"):
        raise DataError(
            f"responses {str(path)!r}: only files ending in .parquet, .feather or .npy are read, "
            "and folders of the first two; load another into a dataframe first"
        )
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    if path.suffix != ".npy":
        return Parquet(path, id) if path.suffix == ".parquet" else ArrowFiles([path], id)
    try:
        return Array(np.load(path, mmap_mode="r"))
    except (ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None


def _files(folder: Path) -> list[Path]:
    """The files of a data set, in the order of their names."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in ARROW)
    kinds = {path.suffix for path in found}
    if len(kinds) != 1:
        which = "files of several kinds" if kinds else "no .parquet or .feather files"
        raise DataError(f"the folder {str(folder)!r} has {which}; a data set has files of one kind")
    return found


def open_piece(piece: Any, k: int, id: str | None) -> Array | Table:
    """Block number k of a stream."""
    values = piece[1] if isinstance(piece, tuple) and len(piece) == 2 else piece
    _refuse_kind(values, f"block {k} of the responses is")
    if isinstance(piece, tuple) and len(piece) == 2 and not isinstance(piece[0], str):
        names, values = piece
        if np.ndim(values) != 2 and not is_sparse(values):
            raise DataError(f"block {k} of the responses: an (n, b) array, not {np.shape(values)}")
        return matrix(values, list(names))
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
