"""Results of many fits as pyarrow tables and parquet files, and back.

A table has the columns of `batch_tables.to_frame`, and where modes were kept ``modes[g, x]`` per
random effect: lists with a number per level. The metadata of its schema hold, under the key
``jaxreml``, JSON with the labels of the model. Numbers round-trip exactly; equal results give
equal bytes, with the same versions of jaxreml and pyarrow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from jaxreml import __version__
from jaxreml.data.sources import import_parquet
from jaxreml.errors import DataError
from jaxreml.many.fitted import BatchModel, FittedBatch
from jaxreml.many.numbers import Fits
from jaxreml.results.batch_tables import field_columns, to_frame
from jaxreml.results.storage import check_version, decode_fields, encode
from jaxreml.status import Status

FORMAT = "jaxreml.BatchResults"
Batch = TypeVar("Batch", bound=FittedBatch)
VERSION = 3
# What earlier versions did not write; of `rank` see `_read`.
LATER = ("residual_df", "mean", "contributions", "contributions_cov")
ABSENT = {1: ("rank", *LATER), 2: LATER}
KEY = b"jaxreml"


def to_table(results: FittedBatch, *, adjusted: bool = True) -> Any:
    """Results as a pyarrow table; without adjusted p-values for a part of the responses.

    Raises:
        DataError: pyarrow is not installed, or names of responses that are neither all strings
            nor all integers.
    """
    import_parquet("a pyarrow table")
    import pyarrow as pa

    frame = to_frame(results, adjusted=adjusted)
    columns = {name: pa.array(frame[name].to_numpy()) for name in frame.columns[1:-1]}
    codes, sentences = results.message_codes
    message = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(sentences, pa.string()))
    columns = {"response": _names_to_arrow(results.responses), **columns, "message": message}
    columns |= _modes_to_arrow(results)
    model = {field.name: encode(getattr(results.model, field.name)) for field in fields(BatchModel)}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "jaxreml": __version__,
        "model": model,
    }
    return pa.table(columns, metadata={KEY: json.dumps(record, allow_nan=False)})


def from_table(table: Any, kind: type[Batch] = FittedBatch) -> Batch:
    """The results that `to_table` was given, but for `refit`, as one of class `kind`.

    Raises:
        DataError: a table that is not one, or of a later version of jaxreml.
    """
    return _read(table.schema, table.select, "the table", kind)


def write_parquet(results: FittedBatch, path: str | Path, *, overwrite: bool = False) -> None:
    """Write results to a parquet file.

    Raises:
        DataError: the file exists and `overwrite` is not given; it is a folder; its folder does
            not exist; names of responses that are neither all strings nor all integers; pyarrow is
            not installed.

    Examples:
        >>> results.to_parquet("genes.parquet", overwrite=True)
        >>> jaxreml.BatchResults.read_parquet("genes.parquet")
        <BatchResults '~ Days + (1 | Subject)', REML, 40 responses, 0 without an ...
    """
    path = check_new(path, overwrite)
    pq = import_parquet("to_parquet")
    table = to_table(results)
    write_whole(path, lambda temporary: pq.write_table(table, temporary))


def check_new(path: str | Path, overwrite: bool) -> Path:
    """The path of a file to write.

    Raises:
        DataError: the file exists and `overwrite` is not given; it is a folder; its folder does
            not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise DataError(f"{str(path)!r} exists; pass overwrite=True, or choose another name")
    if not path.parent.is_dir():
        raise DataError(f"there is no folder {str(path.parent)!r}")
    return path


def write_whole(path: Path, write: Callable[[Path], Any], temporary: Path | None = None) -> None:
    """Write a file under another name and rename it, so that it is whole or not there.

    Args:
        path: the file.
        write: writes what it shall hold to the path that it is called with.
        temporary: the other name, on the same file system; beside `path` if left out.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    temporary = temporary.with_name(f"{temporary.name}-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_parquet(path: str | Path, kind: type[Batch]) -> Batch:
    """Read results that `write_parquet` or a streaming `fit_many` wrote, as of class `kind`.

    Raises:
        DataError: a file that is not one, or of a later version of jaxreml.
        FileNotFoundError: there is no such file.
    """
    pq = import_parquet("read_parquet")
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(Path(path)) as file:
            return _read(file.schema_arrow, file.read, repr(str(path)), kind)
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None


def _read(schema: Any, read: Any, what: str, kind: type[Batch]) -> Batch:
    """Results from a table that has not been read yet.

    Args:
        schema: its schema.
        read: gives the columns of the names that it is called with.
        what: its name in messages.
        kind: the class of the results.
    """
    try:
        record = json.loads((schema.metadata or {}).get(KEY, b"null"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{what} does not hold results of fit_many")
    check_version(record, VERSION, what)
    model = BatchModel(**decode_fields(BatchModel, record.get("model"), what))
    whole = field_columns(model)
    absent = ABSENT.get(record["version"], ())
    columns = {field: names for field, names in whole.items() if field not in absent}
    modes = [_mode_names(group, effects) for group, effects in model.groups]
    kept = any(name in schema.names for names in modes for name in names)
    needed = ["response"]
    for names in [*columns.values(), *(modes if kept else [])]:
        needed += [names] if isinstance(names, str) else names
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise DataError(f"{what} is incomplete: no column {', '.join(map(repr, missing))}")
    table = read(needed)  # the other columns follow from these
    numbers = {
        field: _column(table, names) if isinstance(names, str) else _matrix(table, names)
        for field, names in columns.items()
    }
    for field in set(absent) - {"rank"}:
        width = () if isinstance(whole[field], str) else (len(whole[field]),)
        numbers[field] = np.full((len(numbers["status"]), *width), np.nan)
    if "rank" in absent:  # what could not be estimated had not been fitted
        rank = np.sum(~np.isnan(numbers["beta"]), axis=1)
        p = len(model.fixed_names)
        numbers["rank"] = np.where(numbers["status"] == Status.CONVERGED, rank, p)
    lists = (
        tuple(
            _modes_from_arrow(table, names, len(levels))
            for names, levels in zip(modes, model.levels, strict=True)
        )
        if kept
        else None
    )
    responses = pd.Index(table.column("response").to_pandas()).rename(None)
    return kind(model, responses, Fits(**numbers, modes=lists))


def _names_to_arrow(names: pd.Index) -> Any:
    import pyarrow as pa

    kind = pd.api.types.infer_dtype(names, skipna=False)
    if kind == "integer":
        return pa.array(names.to_numpy(np.int64))
    if kind not in ("string", "empty"):
        raise DataError(
            f"the names of the responses must be all strings or all integers, they are {kind}"
        )
    return pa.array(names.tolist(), pa.string())


def _mode_names(group: str, effects: tuple[str, ...]) -> list[str]:
    return [f"modes[{group}, {effect}]" for effect in effects]


def _modes_to_arrow(results: FittedBatch) -> dict[str, Any]:
    import pyarrow as pa

    columns = {}
    terms = zip(results.model.groups, results.fits.modes or (), strict=False)
    for (group, effects), modes in terms:
        for k, name in enumerate(_mode_names(group, effects)):
            values = pa.array(np.ascontiguousarray(modes[:, :, k]).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(values, modes.shape[1])
    return columns


def _modes_from_arrow(table: Any, names: list[str], levels: int) -> np.ndarray:
    """Modes of one term, (b, levels, effects)."""
    columns = [
        np.concatenate([np.zeros(0), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
        for column in map(table.column, names)
    ]
    return np.stack([column.reshape(len(table), levels) for column in columns], axis=2)


def _column(table: Any, name: str) -> np.ndarray:
    values = _numbers(table, name)
    return values if values.flags.writeable else values.copy()


def _matrix(table: Any, names: list[str]) -> np.ndarray:
    """Columns side by side, (b, len(names))."""
    matrix = np.empty((len(table), len(names)))
    for k, name in enumerate(names):
        matrix[:, k] = _numbers(table, name)
    return matrix


def _numbers(table: Any, name: str) -> np.ndarray:
    values = table.column(name).to_numpy()
    if values.dtype.kind not in "bif":
        kind = table.schema.field(name).type
        raise DataError(f"column {name!r} holds {kind}, not numbers")
    return values
