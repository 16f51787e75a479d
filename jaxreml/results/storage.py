"""Fits to JSON files and back, without pickle.

Numbers round-trip exactly; NaN is written as null and infinities as strings, so that the file is
JSON to any reader.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.kernels import KnownKernel
from jaxreml.data.prototype import packed, require_same, unpacked
from jaxreml.errors import DataError, FormulaError
from jaxreml.fitting.fitted import ROWS, Fit, FittedModel, Grouping
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.own import Own, OwnResidual
from jaxreml.model.covariance.words import TermCovariance

FORMAT = "jaxreml.LMMResults"
VERSION = 2  # since 2 with labels that are no text or numbers, such as dates


def save(fit: FittedModel, path: str | Path, *, data: bool = True) -> None:
    """Write the fit to a JSON file; `load` reads it back.

    Args:
        fit: the fit.
        path: of the file.
        data: with the rows of the fit. Without them the file is small and holds no row of the
            data; it can be loaded, shown and used for predictions of new rows, and refuses what
            needs the rows: intervals of predictions, residuals, refits.

    Raises:
        DataError: labels of a type that cannot be written, named; a formula whose columns cannot be
            made again without the rows.

    Examples:
        >>> fit.save("sleep.json")
        >>> jaxreml.load("sleep.json")
        <LMMResults 'Reaction ~ Days + (Days | Subject)', REML, criterion 1743.6283>
    """
    if fit.sandwich is not None:
        raise DataError("robust standard errors are not saved: save the fit that they are of")
    if not data and fit.residual is not None and not fit.residual.seen.size:
        raise DataError(
            "a fit of subjects at times of their own predicts from its rows: save it with them"
        )
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for name in saved_fields(FittedModel):
        if data or name not in (*ROWS, "kernels"):
            record[name] = encode(getattr(fit, name))
    if not data and fit.residual is not None:
        record["residual"] = encode(fit.residual.of_unseen)
    if not data:
        frame = fit.frame if fit.has_rows else fit.prototype
        record |= {"nobs": fit.nobs, "prototype": encode(packed(frame))}
        try:
            require_same(_slim(record, str(path), FittedModel, None).prototype, frame)
        except (DataError, FormulaError) as error:
            raise DataError(
                f"the fit cannot be saved without its rows, data=False: {error}; save it with them"
            ) from None
    Path(path).write_text(json.dumps(record, allow_nan=False), encoding="utf-8")


def read(path: str | Path, kind: type[Fit], context: Mapping[str, Any] | None = None) -> Fit:
    """Read a fit that `save` wrote, as one of class `kind`, with the `context` of its formula.

    Raises:
        DataError: a file that is not one, or of a later version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a saved fit: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{path} is not a saved fit of jaxreml")
    check_version(record, VERSION, str(path))
    if "prototype" in record:
        fit = _slim(record, str(path), kind, context)
    else:
        fit = kind(**decode_fields(kind, record, str(path)))
    return with_context(fit, context)


def with_context(fit: Fit, context: Mapping[str, Any] | None) -> Fit:
    """A fit that was loaded with the names that its formula may use, which are not saved.

    Raises:
        DataError: a covariance of the user's own is not among them, or is not that of the fit.
    """
    vars(fit)["context"] = context
    if fit.residual is not None:
        vars(fit)["residual"] = replace(fit.residual, context=context)
    try:
        covariance = fit.covariance
    except FormulaError as error:
        raise DataError(
            f"the fit has a covariance that is not saved: give it as load(path, context={{...}}), "
            f"by the name that it had; {error}"
        ) from None
    if any(isinstance(block, Own | OwnResidual) for block in covariance.blocks):
        same = covariance.parameter_names(fit.labels) == tuple(fit.parameter_names)
        if same:
            factors = natural.split_triangles(fit.theta, covariance.sizes)
            found, _ = covariance.natural(covariance.finite(fit.parameters))
            same = np.allclose(found, covariance.omega_of_factors(factors), rtol=1e-5, atol=1e-8)
        if not same:
            raise DataError(
                "the covariance in context is another one than that of the fit: it has other "
                "parameters, or other values at the estimates"
            )
    return fit


def _slim(
    record: dict[str, Any], what: str, kind: type[Fit], context: Mapping[str, Any] | None
) -> Fit:
    """A fit without its rows."""
    fit = kind.__new__(kind)
    own = decode_fields(kind, record, what, without=ROWS)
    vars(fit).update(own, context=None, nobs=record["nobs"])
    terms = [(grouping.name, grouping.levels, grouping.effects) for grouping in fit.groupings]
    vars(fit)["prototype"] = unpacked(
        decode(record["prototype"]), fit.formula, fit.fixed_names, fit.aliased, terms, context
    )
    return fit


def check_version(record: dict[str, Any], latest: int, what: str) -> None:
    """DataError unless a record's version is one that can be read; `what` names the file."""
    version = record.get("version")
    if not isinstance(version, int):
        raise DataError(f"{what} is incomplete: it does not say of which version it is")
    if version > latest:
        raise DataError(f"{what} was written by a later version of jaxreml; upgrade to read it")


def saved_fields(kind: type) -> list[str]:
    """Names of the fields of a dataclass that are written."""
    return [field.name for field in fields(kind) if field.metadata.get("saved", True)]


def decode_fields(
    kind: type, record: Any, what: str, without: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of a dataclass from a record of encoded ones; DataError names what is missing.

    Fields with defaults may be: they came later than the record; those in `without` are left out.
    """
    optional = [field.name for field in fields(kind) if field.default is not MISSING]
    optional += without
    known = record if isinstance(record, dict) else {}
    names = [name for name in saved_fields(kind) if name in known or name not in optional]
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(f"{what} is incomplete: {', '.join(missing)} missing")
    return {name: decode(record[name]) for name in names}


def encode_number(value: float) -> float | str | None:
    """A float that JSON can hold: NaN as null, infinities as strings."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def encode(value: Any) -> Any:
    """A value as plain JSON that `decode` reads: scalars, arrays, tuples, frames of them."""
    if value is None or value is pd.NA or isinstance(value, str | bool | int):
        return None if value is pd.NA else value
    if isinstance(value, float):
        return {"float": encode_number(value)}
    if isinstance(value, np.generic) and not isinstance(value, np.datetime64 | np.timedelta64):
        return encode(value.item())
    if isinstance(value, np.ndarray):
        flat = [encode_number(float(x)) for x in value.ravel()]
        return {"array": flat, "shape": list(value.shape)}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return {"list": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, Grouping):
        return {"grouping": [encode(getattr(value, f.name)) for f in fields(value)]}
    if isinstance(value, KnownKernel):
        return {"kernel": [encode(value.part), encode(value.labels), _packed(value.matrix)]}
    if isinstance(value, ResidualCovariance):
        return {"residual": [encode(getattr(value, f)) for f in saved_fields(ResidualCovariance)]}
    if isinstance(value, pd.DataFrame):
        columns = [[str(name), _encode_column(column)] for name, column in value.items()]
        return {"frame": columns, "index": _encode_index(value.index)}
    for kind, (types, parts, _) in LABELS.items():
        if isinstance(value, types):
            return {kind: [encode(part) for part in parts(value)]}
    raise DataError(
        f"the label {value!r} is of a type that cannot be saved, {type(value).__name__}; make the "
        "column text with .astype(str)"
    )


def _utc(value: pd.Timestamp | np.datetime64) -> tuple[str, str | None]:
    stamp: Any = pd.Timestamp(value)
    if stamp.tz is None:
        return stamp.isoformat(), None
    return stamp.tz_convert("UTC").tz_localize(None).isoformat(), str(stamp.tz)


def _stamp(text: str, zone: str | None) -> Any:
    stamp = pd.Timestamp(text)
    return stamp if zone is None else stamp.tz_localize("UTC").tz_convert(zone)


# Labels that JSON has no type for: by name their types, their parts, and the label of these.
LABELS: dict[str, tuple[Any, Callable[[Any], tuple], Callable[..., Any]]] = {
    "nat": (type(pd.NaT), lambda value: (), lambda: pd.NaT),
    "timestamp": (pd.Timestamp | np.datetime64, _utc, _stamp),
    "datetime": (dt.datetime, lambda value: (value.isoformat(),), dt.datetime.fromisoformat),
    "date": (dt.date, lambda value: (value.isoformat(),), dt.date.fromisoformat),
    "time": (dt.time, lambda value: (value.isoformat(),), dt.time.fromisoformat),
    "nanoseconds": (
        pd.Timedelta | np.timedelta64,
        lambda value: (pd.Timedelta(value).value,),
        lambda value: pd.Timedelta(value, "ns"),
    ),
    "timedelta": (
        dt.timedelta,
        lambda value: (value.days, value.seconds, value.microseconds),
        dt.timedelta,
    ),
    "period": (
        pd.Period,
        lambda value: (value.ordinal, value.freqstr),
        lambda ordinal, freq: pd.Period(ordinal=ordinal, freq=freq),
    ),
    "interval": (
        pd.Interval,
        lambda value: (value.left, value.right, value.closed),
        pd.Interval,
    ),
    "bytes": (bytes, lambda value: (value.hex(),), bytes.fromhex),
}


def decode(value: Any) -> Any:
    """The value that `encode` was given."""
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if kind == "float":
        return _decode_number(content)
    if kind == "array":
        return np.array([_decode_number(x) for x in content]).reshape(rest[0][1])
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "list":
        return [decode(item) for item in content]
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "grouping":
        *parts, covariance = (
            [*map(decode, content)] if len(content) > 6 else [*map(decode, content), ()]
        )
        return Grouping(*parts, covariance=TermCovariance(*covariance))
    if kind == "kernel":
        return KnownKernel(decode(content[0]), decode(content[1]), _unpacked(content[2]))
    if kind == "residual":
        return ResidualCovariance(*(decode(item) for item in content))
    if kind in LABELS:
        return LABELS[kind][2](*(decode(part) for part in content))
    frame = pd.DataFrame({name: _decode_column(column) for name, column in content})
    return frame.set_axis(_decode_index(rest[0][1]))


def _packed(matrix: np.ndarray | None) -> dict[str, Any] | None:
    """A symmetric matrix: its lower triangle, row by row, in the bytes of little-endian doubles,
    as text in base 64."""
    if matrix is None:
        return None
    values = matrix[np.tril_indices(len(matrix))].astype("<f8")
    return {"order": len(matrix), "base64": base64.b64encode(values.tobytes()).decode("ascii")}


def _unpacked(record: dict[str, Any] | None) -> np.ndarray | None:
    if record is None:
        return None
    rows, columns = np.tril_indices(record["order"])
    matrix = np.empty((record["order"],) * 2)
    values = np.frombuffer(base64.b64decode(record["base64"]), "<f8")
    matrix[rows, columns] = matrix[columns, rows] = values
    return matrix


def _decode_number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _encode_column(column: pd.Series) -> dict[str, Any]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return {
            "codes": [int(code) for code in column.cat.codes],
            "categories": [encode(x) for x in column.cat.categories],
            "ordered": bool(column.cat.ordered),
            "objects": column.cat.categories.dtype == object,
        }
    return {"values": [encode(x) for x in column.tolist()], "dtype": str(column.dtype)}


def _decode_column(column: dict[str, Any]) -> Any:
    if "codes" in column:
        kind = object if column.get("objects") else None
        categories = pd.Index([decode(x) for x in column["categories"]], kind, tupleize_cols=False)
        return pd.Categorical.from_codes(column["codes"], categories, ordered=column["ordered"])
    return pd.Series([decode(x) for x in column["values"]], dtype=column.get("dtype"))


def _encode_index(index: pd.Index) -> dict[str, Any]:
    if isinstance(index, pd.RangeIndex):
        parts: Any = [index.start, index.stop, index.step]
        return {"range": parts, "names": [encode(index.name)]}
    levels = [index.get_level_values(k).to_series() for k in range(index.nlevels)]
    return {
        "levels": [_encode_column(level) for level in levels],
        "names": [encode(name) for name in index.names],
    }


def _decode_index(record: dict[str, Any]) -> pd.Index:
    if "range" in record:
        return pd.RangeIndex(*record["range"], name=decode(record["names"][0]))
    if "levels" not in record:  # version 1
        return pd.Index(_decode_column(record), tupleize_cols=False)
    levels = [pd.Index(_decode_column(level), tupleize_cols=False) for level in record["levels"]]
    names = [decode(name) for name in record["names"]]
    if len(levels) == 1:
        return levels[0].rename(names[0])
    return pd.MultiIndex.from_arrays(levels, names=names)


def json_ready(value: Any) -> Any:
    """Nested dicts and lists with NumPy values and NaN made plain JSON."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return encode_number(value) if isinstance(value, float) else value
