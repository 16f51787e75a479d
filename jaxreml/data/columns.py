"""What a column is: a factor, numbers, Booleans or dates, with its missing values, or a refusal.

`column` alone decides it, for every library and storage type, and leaves one of these in pandas:

- numbers: int64, uint64 or float64; Int64 or UInt64 where some are missing,
- Booleans: bool, or boolean where some are missing,
- text and other labels (dates, intervals, bytes): object, None where missing,
- categories, in their order,
- points and spans of time: datetime64 and timedelta64.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Number
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd
from pandas._libs.parsers import STR_NA_VALUES

from jaxreml.errors import DataError

MISSING = {*(text.lower() for text in STR_NA_VALUES), ".", "-", "--", "?", "*", "missing"}
MOST = 0.9  # share of numbers from which the rest of a text column is taken for mistakes
MANY = 10  # distinct numbers from which such a column is no factor
NULLABLE = {"Int64": np.int64, "UInt64": np.uint64, "boolean": bool}  # and without missing values
NESTED = (list, dict, set, tuple, np.ndarray, pd.Series)
REMEDIES = {
    "M": "points in time, which have no unit as numbers: make it days since a date, such as "
    "(when - when.min()).dt.days in pandas, or a factor by C()",
    "m": "spans of time, which have no unit as numbers: convert them, for example with "
    ".dt.total_seconds()",
    "c": "complex numbers: use their real and imaginary parts, or modulus, as columns",
}


def column(name: Any, values: Any) -> pd.Series:
    """A column as one of the kinds above, in its row labels if it is a pandas Series.

    Args:
        name: for messages.
        values: (n,) of any library: pandas, NumPy (masks are missing values), polars, pyarrow,
            a list.

    Raises:
        DataError: not a vector, or values that are no kind of column (nested, complex, numbers
            mixed with text), named.
    """
    if isinstance(values, pd.Categorical | pd.Index | pd.api.extensions.ExtensionArray):
        values = pd.Series(values, copy=False).reset_index(drop=True)
    if isinstance(values, pd.Series):
        return _from_pandas(name, values)
    if isinstance(values, list | tuple | range):
        items = [None if item is np.ma.masked else item for item in values]
        return _from_objects(name, pd.Series(items, dtype=object))
    if type(values).__module__ == "pyarrow.lib" and not hasattr(values, "num_chunks"):
        import pyarrow as pa

        values = pa.chunked_array([values])
    series = nw.from_native(values, series_only=True, pass_through=True)
    if isinstance(series, nw.Series):
        return _from_narwhals(name, series)
    return _from_array(
        name, values if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    )


def _from_array(name: Any, values: np.ndarray) -> pd.Series:
    if values.ndim != 1:
        raise DataError(f"column {str(name)!r} must be one-dimensional, not {values.shape}")
    mask: np.ndarray = np.ma.getmaskarray(values)
    values = np.asarray(values)
    kind = values.dtype.kind
    if kind == "V" and values.dtype.names is None:
        values, kind = values.astype(float), "f"  # bfloat16 and its like, registered by JAX
    if kind == "c":
        raise _refused(name, REMEDIES["c"])
    if kind == "V":
        raise _refused(name, "records: take their fields as columns")
    hidden = mask.any()
    if kind == "f":
        numbers = values.astype(float)
        return pd.Series(np.where(mask, np.nan, numbers) if hidden else numbers)
    if kind in "mM":
        times = pd.Series(values)
        return times.mask(mask) if hidden else times
    if kind == "b" and not hidden:
        return pd.Series(values.astype(bool))
    if kind in "iu" and not hidden:
        return pd.Series(values.astype(np.int64 if kind == "i" or values.itemsize < 8 else "u8"))
    objects = values.astype(object)
    if hidden:
        objects[mask] = None
    return _from_objects(name, pd.Series(objects, dtype=object))


def _from_pandas(name: Any, values: pd.Series) -> pd.Series:
    kind = values.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return _category(name, values)
    if isinstance(kind, pd.SparseDtype):
        values, kind = values.sparse.to_dense(), kind.subtype
    if isinstance(kind, pd.ArrowDtype):
        import pyarrow as pa

        stored = pa.chunked_array(values.array.__arrow_array__())  # pyright: ignore
        found = _from_narwhals(name, nw.from_native(stored, series_only=True))
    elif isinstance(kind, np.dtype) and kind.kind != "O":
        found = _from_array(name, values.to_numpy())
    elif isinstance(kind, pd.DatetimeTZDtype):
        return values
    elif pd.api.types.is_bool_dtype(kind):
        return values.astype("boolean" if values.isna().any() else bool)
    elif pd.api.types.is_integer_dtype(kind):
        return _integers(values, str(kind).startswith("U"))
    elif pd.api.types.is_float_dtype(kind):
        return pd.Series(values.to_numpy(float, na_value=np.nan), values.index)
    else:
        found = _from_objects(name, pd.Series(values.astype(object)))
    return found.set_axis(values.index)


def _integers(values: pd.Series, unsigned: bool) -> pd.Series:
    wide = pd.Series(values.astype("UInt64" if unsigned else "Int64"))
    return wide if wide.isna().any() else wide.astype("uint64" if unsigned else "int64")


def _category(name: Any, values: pd.Series) -> pd.Series:
    """Categories of NumPy's types, text as objects."""
    kind: Any = values.dtype
    stored = kind.categories.dtype
    if not len(kind.categories) or isinstance(stored, pd.IntervalDtype | pd.PeriodDtype):
        return values
    levels = column(name, pd.Series(kind.categories))
    if levels.dtype == stored:
        return values
    plain = pd.CategoricalDtype(pd.Index(levels, dtype=levels.dtype), kind.ordered)
    return pd.Series(pd.Categorical.from_codes(values.cat.codes, dtype=plain), values.index)


def _from_narwhals(name: Any, values: nw.Series) -> pd.Series:
    kind = values.dtype
    if isinstance(kind, nw.List | nw.Array | nw.Struct):
        raise _refused(name, f"nested values ({kind}): make a column of each part")
    if isinstance(kind, nw.Categorical | nw.Enum):
        levels = values.cat.get_categories().to_list()
        return _category(name, pd.Series(pd.Categorical(values.to_list(), categories=levels)))
    if kind.is_integer() and not isinstance(kind, nw.Int128 | nw.UInt128):
        if not values.null_count():
            return _from_array(name, np.asarray(values.to_numpy()))
        unsigned = isinstance(kind, nw.UInt64)
        return _integers(
            pd.Series(pd.array(values.to_list(), "UInt64" if unsigned else "Int64")), unsigned
        )
    if kind.is_float() or kind.is_decimal():
        return pd.Series(np.array(values.cast(nw.Float64).to_numpy(), float))
    return _from_objects(name, pd.Series(values.to_list(), dtype=object))


def _from_objects(name: Any, values: pd.Series) -> pd.Series:
    """Python objects by what they are."""
    missing = values.isna()
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind in ("string", "date", "time", "bytes", "interval", "period"):
        return values.where(~missing, None) if missing.any() else values
    if kind == "boolean":
        return values.astype("boolean" if missing.any() else bool)
    if kind in ("datetime", "datetime64", "timedelta", "timedelta64"):
        return values.infer_objects()
    present = pd.Series(values[~missing])
    for item in present:
        if isinstance(item, NESTED):
            raise _refused(name, f"nested values, such as {item!r}: make a column of each part")
        if isinstance(item, complex | np.complexfloating):
            raise _refused(name, REMEDIES["c"])
    numeric = np.array([isinstance(item, Number | np.bool_) for item in present], bool)
    if numeric.all():
        return _from_numbers(name, values, present)
    if numeric.any():
        other = pd.Series(present[~numeric])
        raise DataError(
            f"column {str(name)!r} mixes numbers with other values, such as {other.iloc[0]!r} in "
            f"row {label(other.index)}: make it numbers with pandas.to_numeric, mark what is "
            "missing as missing (None), or make it text with .astype(str) for a factor"
        )
    return values.where(~missing, None) if missing.any() else values


def _from_numbers(name: Any, values: pd.Series, present: pd.Series) -> pd.Series:
    """Integers, floats, Decimals, Fractions and Booleans in any mixture."""
    whole = [isinstance(item, int | np.integer | np.bool_) for item in present]
    if len(present) and all(whole):
        integers = [int(item) for item in present]
        for unsigned, low, high in ((False, -(2**63), 2**63), (True, 0, 2**64)):
            if low <= min(integers) and max(integers) < high:
                found = pd.Series(pd.NA, values.index, dtype="UInt64" if unsigned else "Int64")
                kind = np.uint64 if unsigned else np.int64
                found[values.notna()] = np.array(integers, kind)
                return _integers(found, unsigned)
        raise DataError(
            f"column {str(name)!r} has integers beyond 64 bits, such as {max(integers, key=abs)}: "
            "make them text with .astype(str) if they are labels, floats if they are amounts"
        )
    found = np.full(len(values), np.nan)
    found[values.notna().to_numpy()] = [
        float(item.real) if isinstance(item, Fraction) else float(item) for item in present
    ]
    return pd.Series(found, values.index)


def _refused(name: Any, what: str) -> DataError:
    return DataError(f"column {str(name)!r} has {what}")


def label(index: pd.Index) -> str:
    """The first of some row labels, as Python writes it."""
    return repr(index[:1].tolist()[0])


# Rows and other tables


def complete_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows without missing values, in NumPy's types, and which they are, (n,) booleans."""
    complete = np.asarray(~table.isna().to_numpy(bool).any(axis=1))
    table = table.copy() if complete.all() else table.loc[complete].copy()
    for name, values in table.items():
        if str(values.dtype) in NULLABLE:
            table[name] = values.astype(NULLABLE[str(values.dtype)])
    return table, complete


def is_factor(values: pd.Series) -> bool:
    """Whether a column is a factor by its type: text, other labels or categories."""
    return pd.api.types.is_object_dtype(values.dtype) or isinstance(
        values.dtype, pd.CategoricalDtype
    )


def is_amount(values: pd.Series) -> bool:
    """Whether a column is numbers or Booleans."""
    return not is_factor(values) and pd.api.types.is_numeric_dtype(values.dtype)


def codes_of(values: pd.Series, levels: list[Any]) -> np.ndarray:
    """Positions of values among levels, (n,), -1 for those that are none; 1, 1.0 and True are
    one level, as in Python."""
    places = {level: k for k, level in enumerate(levels)}
    codes, distinct = pd.factorize(values)
    found = np.array([places.get(level, -1) for level in distinct.tolist()] + [-1], int)
    return found[codes]


def like_fitted(name: str, values: pd.Series, fitted: pd.Series) -> pd.Series:
    """A column of new rows as the kind that it was in the fit; both without missing values.

    Raises:
        DataError: another kind, or a level that the fit has not seen, named.
    """
    if is_factor(fitted):
        levels = pd.Categorical(fitted).categories.tolist()
        codes = codes_of(values, levels)
        unseen = codes < 0
        if unseen.any():
            raise DataError(unseen_level(name, values[unseen].tolist()[0], levels))
        if isinstance(fitted.dtype, pd.CategoricalDtype):
            same = pd.Categorical.from_codes(codes, dtype=fitted.dtype)
        else:
            same = np.empty(len(codes), object)
            same[:] = [levels[code] for code in codes]
        return pd.Series(same, values.index)
    require_same_kind(name, values, fitted)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = column(name, pd.Series(values.tolist(), values.index, dtype=object))
    if fitted.dtype != bool:
        return values.astype(np.int64) if values.dtype == bool else values
    other = ~values.isin([0, 1])
    if other.any():
        raise DataError(
            f"column {name!r} of newdata has the value {values[other].tolist()[0]!r}; in the fit "
            "it is Boolean"
        )
    return values.astype(bool)


def require_same_kind(name: str, values: pd.Series, fitted: pd.Series) -> None:
    """Raise DataError where numbers stand for a factor, or the other way round."""
    amounts = _holds_amounts(values)
    if amounts != _holds_amounts(fitted):
        raise DataError(
            f"column {name!r} of newdata is {'' if amounts else 'not '}numeric (it has values such "
            f"as {values.tolist()[0]!r}), other than in the fit (such as {fitted.tolist()[0]!r})"
        )


def _holds_amounts(values: pd.Series) -> bool:
    kind: Any = values.dtype
    if isinstance(kind, pd.CategoricalDtype):
        kind = kind.categories.dtype
    return pd.api.types.is_numeric_dtype(kind)


def unseen_level(name: str, level: Any, known: list[Any]) -> str:
    """A sentence for a level that the fit has not."""
    listed = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    return f"column {name!r} has the level {level!r}, which the fit has not seen ({listed})"


def require_no_stray(name: str, values: pd.Series, as_factor: bool = False) -> None:
    """Refuse text that is numbers but for a few values, which would be a factor of numbers.

    Args:
        name: of the column.
        values: without missing ones.
        as_factor: whether the column is said to be a factor, a grouping one for example. Then only
            marks of missing values, such as ".", are strays.

    Raises:
        DataError: names the column, the value and its row.
    """
    if not pd.api.types.is_object_dtype(values.dtype):
        return
    distinct = pd.Series(values.unique())
    if pd.api.types.infer_dtype(distinct, skipna=False) != "string":
        return
    numeric = pd.Series(pd.to_numeric(distinct, errors="coerce")).notna()
    if not numeric.any() or numeric.all():
        return
    others = pd.Series(distinct[~numeric])
    rows = values.isin(others)
    marks = all(text.strip().lower() in MISSING for text in others)
    mostly = rows.mean() <= 1 - MOST and numeric.sum() > MANY
    if not (marks and rows.mean() < 0.5) and not (mostly and not as_factor):
        return
    stray = others.iloc[0]
    raise DataError(
        f"column {name!r} is text because of the value {stray!r} in row "
        f"{label(pd.Series(values[rows]).index)}; its other values are numbers. If it stands for a "
        f"missing value, read the file with na_values=[{stray!r}] or use "
        "pandas.to_numeric(column, errors='coerce'); otherwise correct it"
        + ("" if as_factor or marks else f", or write C({name}) for a factor")
    )


def require_amounts_possible(name: str, values: pd.Series) -> None:
    """Say why a column that ought to be numbers is none, if that is known.

    Raises:
        DataError: points or spans of time; text because of a few values.
    """
    kind = getattr(values.dtype, "kind", "")
    if kind in REMEDIES:
        raise _refused(name, REMEDIES[kind])
    require_no_stray(name, values)
