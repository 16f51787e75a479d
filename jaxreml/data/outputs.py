"""Frames of results in the library that the data came in.

Everything is computed with pandas inside; what a method returns is turned into a frame of polars or
pyarrow at the end. What is not defined, NaN in pandas, is null there.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import narwhals.stable.v2 as nw
import pandas as pd

from jaxreml.errors import DataError

LIBRARIES = ("pandas", "polars", "pyarrow")


def library_of(data: Any) -> str:
    """The library of results for a user's table: "polars" or "pyarrow" if it is theirs, "pandas"
    for everything else."""
    if isinstance(data, nw.DataFrame):
        data = data.to_native()
    name = type(data).__module__.partition(".")[0]
    return name if name in LIBRARIES else "pandas"


def converted(value: Any, library: str, index: str | None = None, always: bool = False) -> Any:
    """A pandas frame or series in another library; anything else as it is.

    Args:
        value: what a method returns.
        library: one of `LIBRARIES`.
        index: the name of the column that the row labels become, unless they have one; None to
            leave them out.
        always: whether labels that only count rows are a column too.

    Columns under two headings, such as ("Days", "estimate"), become ``estimate[Days]``.

    Raises:
        ValueError: another library.
        DataError: it is not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"output must be one of {', '.join(LIBRARIES)}, not {library!r}")
    if library == "pandas" or not isinstance(value, pd.DataFrame | pd.Series):
        return value
    if index is not None and (always or not isinstance(value.index, pd.RangeIndex)):
        if isinstance(value, pd.DataFrame) and value.columns.nlevels == 2:
            value = value.set_axis([f"{what}[{of}]" for of, what in value.columns], axis=1)
        names = [name or index for name in value.index.names]
        value = value.rename_axis(names).reset_index()
    try:
        if isinstance(value, pd.Series):
            frame = _table(value.to_frame(value.name or "values"), library)
            return frame[0] if library == "pyarrow" else frame.to_series()
        return _table(value, library)
    except ImportError:
        raise DataError(f"output={library!r} needs {library}: pip install {library}") from None


def _table(frame: pd.DataFrame, library: str) -> Any:
    columns = {str(name): _of_one_kind(values) for name, values in frame.items()}
    if library == "polars":
        import polars as pl

        return pl.DataFrame([_polars_column(name, values) for name, values in columns.items()])
    import pyarrow as pa

    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    return table.replace_schema_metadata(None)


def _of_one_kind(values: pd.Series) -> pd.Series:
    """Labels of several kinds, or none at all, as text: columns have one type elsewhere."""
    if values.dtype != object:
        return values
    kinds = {type(item) for item in values[values.notna()]}
    return values if len(kinds) == 1 else values.astype("string")


def _polars_column(name: str, values: pd.Series) -> Any:
    import polars as pl

    kind = values.dtype
    if pd.api.types.is_numeric_dtype(kind) and not values.isna().any():
        return pl.Series(name, values.to_numpy())
    items = values.astype(object).where(values.notna(), None).tolist()
    if isinstance(kind, pd.CategoricalDtype):
        levels = kind.categories.tolist()
        if all(isinstance(level, str) for level in levels):
            return pl.Series(name, items, pl.Enum(levels))
    kinds = {
        "is_bool_dtype": pl.Boolean,
        "is_integer_dtype": pl.Int64,
        "is_float_dtype": pl.Float64,
    }
    known = [dtype for check, dtype in kinds.items() if getattr(pd.api.types, check)(kind)]
    text = [pl.String] if isinstance(kind, pd.StringDtype) else []
    return pl.Series(name, items, next(iter([*known, *text]), None))


def in_library(
    function: Callable[..., Any], index: str | None = None, always: bool = False
) -> Callable[..., Any]:
    """A method whose frames come in the library of the data, or in that of ``output=``.

    Args:
        function: of a fit or a batch, which has a `library`, to a pandas frame or series.
        index, always: as for `converted`.
    """

    @functools.wraps(function)
    def method(self: Any, *args: Any, output: str | None = None, **options: Any) -> Any:
        library = self.library if output is None else output
        return converted(function(self, *args, **options), library, index, always)

    own = inspect.signature(function)
    added = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(own.parameters.values())
    place = next(
        (k for k, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD),
        len(parameters),
    )
    parameters.insert(place, added)
    method.__signature__ = own.replace(parameters=parameters)  # pyright: ignore
    method.__doc__ = _with_output(inspect.cleandoc(function.__doc__ or ""))
    return method


def _with_output(docstring: str) -> str:
    """A docstring that has the argument ``output`` as the last of its Args."""
    head, *sections = re.split(r"\n\n(?=(?:Returns|Yields|Raises|Examples?):\n)", docstring)
    if "\nArgs:\n" not in head:
        head += "\n\nArgs:"
    entry = (
        '    output: "pandas", "polars" or "pyarrow" for a frame of this library; that which the\n'
        "        data came in if left out."
    )
    return "\n\n".join([f"{head}\n{entry}", *sections])
