"""What a column is does not depend on the library or the storage type that it comes in."""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from jaxreml import DataError
from jaxreml.data.columns import column, like_fitted
from jaxreml.data.frame import model_frame

N = 24
RNG = np.random.default_rng(5)
Y = RNG.normal(size=N)
G = np.repeat(np.arange(6), 4)
INTEGERS = RNG.integers(1, 4, N)
LARGE = RNG.integers(60, 120, N)  # products and powers do not fit in eight bits
X = RNG.uniform(0, 4, N)
BOOLEANS = RNG.random(N) < 0.5
TEXTS = np.array(["lo", "mid", "up"])[INTEGERS - 1]
DIGITS = INTEGERS.astype(str)


def in_libraries(values: Any) -> dict[str, Any]:
    """A column in every library's own type."""
    items = values.tolist()
    return {
        "numpy": values,
        "list": items,
        "objects": np.array(items, object),
        "pandas": pd.Series(values),
        "pandas objects": pd.Series(items, dtype=object),
        "nullable": pd.Series(items).convert_dtypes(),
        "arrow-backed": pd.Series(pd.array(items, pd.ArrowDtype(pa.array(items).type))),
        "polars": pl.Series(items),
        "pyarrow": pa.array(items),
        "pyarrow chunked": pa.chunked_array([items[:5], items[5:]]),
    }


TYPES = {
    "digits": (DIGITS, "string", pd.ArrowDtype(pa.large_string()), "string[pyarrow]", "category"),
    "texts": (TEXTS, "string", pd.ArrowDtype(pa.string()), "string[pyarrow]", "category"),
    "integers": (LARGE, "int8", "uint8", "int16", "uint32", "UInt8", "Int64", "uint64"),
    "floats": (LARGE + 0.5, "float16", "float32", "Float32", pd.SparseDtype(float)),
    "Booleans": (BOOLEANS, "boolean", pd.ArrowDtype(pa.bool_()), pd.SparseDtype(bool)),
}
CASES = [
    pytest.param(kind, name, id=f"{kind} {name}")
    for kind, (values, *more) in TYPES.items()
    for name in [*in_libraries(values), *map(str, more)]
]


def as_stored(kind: str, name: str) -> Any:
    values, *more = TYPES[kind]
    stored = {str(dtype): pd.Series(values).astype(dtype) for dtype in more}
    return (in_libraries(values) | stored)[name]


def frame_of(formula: str, data: Any = None, **columns: Any) -> Any:
    data = {"y": Y, "g": G, "x": X} if data is None else data
    return model_frame(formula, {**data, **columns})


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_column_of_any_library_and_type(kind, name):
    plain = TYPES[kind][0]
    stored = as_stored(kind, name)
    if kind in ("digits", "texts"):
        formula = "y ~ x * v + C(v) + (1 | g)"
        expected = frame_of(formula, v=plain.astype(object))
        assert expected.fixed_names[:4] == (
            "(Intercept)",
            "x",
            f"v[T.{np.unique(plain)[1]}]",
            f"v[T.{np.unique(plain)[2]}]",
        )
    else:
        formula = "y ~ x:v + I(v^2) + I(v * v - v) + (0 + v:x | g)"
        expected = frame_of(formula, v=plain.astype(float))
    found = frame_of(formula, v=stored)
    np.testing.assert_array_equal(found.X, expected.X)
    np.testing.assert_array_equal(found.terms[0].effects, expected.terms[0].effects)
    assert (found.fixed_names, found.aliased) == (expected.fixed_names, expected.aliased)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_levels_of_a_grouping_factor(kind, name):
    plain = TYPES[kind][0]
    frame = frame_of("y ~ 1 + (1 | v)", v=as_stored(kind, name))
    (term,) = frame.terms
    wanted, codes = np.unique(plain, return_inverse=True)
    assert term.levels == tuple(wanted.tolist())
    assert [type(level) for level in term.levels] == [type(level) for level in wanted.tolist()]
    np.testing.assert_array_equal(term.codes, codes)


@pytest.mark.parametrize("kind", TYPES)
def test_missing_values_of_any_library(kind):
    items = TYPES[kind][0].tolist()
    items[3] = None
    hidden = np.arange(N) == 3
    stored = {
        "list": items,
        "objects": pd.Series(items, dtype=object),
        "nullable": pd.Series(items, dtype=object).convert_dtypes(),
        "arrow-backed": pd.Series(pd.array(items, pd.ArrowDtype(pa.array(items).type))),
        "polars": pl.Series(items, strict=False),
        "pyarrow": pa.array(items),
        "masked": np.ma.masked_array(TYPES[kind][0], hidden),
        "list of masked": [np.ma.masked if k == 3 else item for k, item in enumerate(items)],
    }
    kept = ~hidden
    whole = {"y": Y[kept], "g": G[kept], "x": X[kept], "v": TYPES[kind][0][kept]}
    for formula in ("y ~ x:v + C(v) + (1 | g)", "y ~ 1 + (1 | v)"):
        expected = frame_of(formula, whole)
        for name, values in stored.items():
            found = frame_of(formula, v=values)
            assert found.n_dropped == 1, name
            np.testing.assert_array_equal(found.X, expected.X, err_msg=name)
            assert found.terms[0].levels == expected.terms[0].levels, name
            assert found.fixed_names == expected.fixed_names, name


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint64", "bool"])
@pytest.mark.parametrize(
    "formula",
    [
        "a - b ~ x + (1 | g)",
        "a + b ~ x + (1 | g)",
        "y ~ offset(b - a) + (1 | g)",
        "y ~ poly(a, 2, raw=True) + (1 | g)",
        "y ~ log(a + 1) + sqrt(b) + np.exp(a / 50) + (1 | g)",
        "y ~ scale(a) + center(b):a + (1 | g)",
        "y ~ I(-a) + I(a * b * a) + (1 | g)",
        "y ~ I((a > b) + (a > 70) + (x > 2)) + (1 | g)",
        "y ~ user(a) + (1 | g)",
        "y ~ x + (0 + I(a^2) || g)",
    ],
)
def test_arithmetic_is_in_float64(formula, dtype):
    low, high = (0, 2) if dtype == "bool" else (60, 120)
    a, b = np.random.default_rng(1).integers(low, high, (2, N))
    user = {"user": lambda v: v + v + v}
    if dtype == "bool" and "user" in formula:
        pytest.skip("a function of the user's gets Booleans as they are")
    data = {"y": Y, "g": G, "x": X}
    found = model_frame(formula, {**data, "a": a.astype(dtype), "b": b.astype(dtype)}, context=user)
    wanted = model_frame(formula, {**data, "a": a * 1.0, "b": b * 1.0}, context=user)
    np.testing.assert_array_equal(found.X, wanted.X)
    np.testing.assert_array_equal(found.y, wanted.y)
    np.testing.assert_array_equal(found.terms[0].effects, wanted.terms[0].effects)
    if "offset" in formula:
        np.testing.assert_array_equal(found.offset, wanted.offset)


def test_booleans_keep_their_logic():
    frame = frame_of("y ~ I(~v & (x > 2)) + np.where(v, x, 0) + (1 | g)", v=BOOLEANS)
    np.testing.assert_array_equal(frame.X[:, 1], ~BOOLEANS & (X > 2))
    np.testing.assert_array_equal(frame.X[:, 2], np.where(BOOLEANS, X, 0))


@pytest.mark.parametrize(
    "items",
    [
        [decimal.Decimal(int(v)) / 4 for v in LARGE],
        [fractions.Fraction(int(v), 4) for v in LARGE],
        [int(v) // 4 if v % 4 == 0 else v / 4 for v in LARGE],
        [np.float32(v / 4) for v in LARGE],
        pl.Series([decimal.Decimal(int(v)) / 4 for v in LARGE]),
        pd.Series([decimal.Decimal(int(v)) / 4 for v in LARGE]).astype(
            pd.ArrowDtype(pa.decimal128(9, 3))
        ),
    ],
    ids=["Decimal", "Fraction", "mixed", "float32 objects", "polars Decimal", "Arrow decimal"],
)
def test_numbers_as_objects_are_numbers(items):
    frame = frame_of("y ~ v + (1 | g)", v=items)
    np.testing.assert_array_equal(frame.X[:, 1], LARGE / 4)


def test_weights_and_offset_are_columns_too():
    hidden = np.arange(N) == 2
    w = np.ma.masked_array(LARGE.astype("int8"), hidden)
    frame = model_frame("y ~ 1 + (1 | g)", {"y": Y, "g": G}, weights=w)
    np.testing.assert_array_equal(frame.weights, LARGE[~hidden])
    frame = model_frame(
        "y ~ 1 + (1 | g)",
        {"y": Y, "g": G, "w": [decimal.Decimal(int(v)) for v in LARGE]},
        weights="w",
        offset=pl.Series(LARGE.tolist()),
    )
    np.testing.assert_array_equal(frame.weights, LARGE)
    np.testing.assert_array_equal(frame.offset, LARGE)
    with pytest.raises(DataError, match="weights must be numeric"):
        model_frame("y ~ 1 + (1 | g)", {"y": Y, "g": G}, weights=list(TEXTS))


class TestRefused:
    """By the name of the column and the value, with what to do."""

    @pytest.mark.parametrize("mark", [".", "NA", "n/a", "", " ", "-", "NaN", "null"])
    def test_a_mark_among_numbers(self, mark):
        texts = (LARGE / 4).astype(str).astype(object)
        texts[7] = mark
        data = pd.DataFrame({"y": Y, "g": G, "v": texts}, index=[f"r{k}" for k in range(N)])
        for formula in (
            "y ~ v + (1 | g)",
            "y ~ log(v) + (1 | g)",
            "v ~ 1 + (1 | g)",
            "y ~ 1 + (v | g)",
            "y ~ offset(v) + (1 | g)",
            "y ~ 1 + (1 | v)",
        ):
            with pytest.raises(DataError, match="'v' is text because of the value"):
                model_frame(formula, data)
        with pytest.raises(DataError, match=re.escape(f"{mark!r} in row 'r7'")):
            model_frame("y ~ v + (1 | g)", data)

    def test_a_slip_among_many_numbers_unless_said_to_be_a_factor(self):
        texts = LARGE.astype(str).astype(object)
        texts[7] = "8O"
        with pytest.raises(DataError, match=r"'8O' in row 7.*or write C\(v\)"):
            frame_of("y ~ v + (1 | g)", v=texts)
        assert len(frame_of("y ~ 1 + (1 | v)", v=np.tile(texts[:12], 2)).terms[0].levels) > 5
        dose = np.array(["0", "5", "10", "placebo"])[np.arange(N) % 4]
        assert "v[T.placebo]" in frame_of("y ~ v + (1 | g)", v=dose).fixed_names

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1j] * N, "'v' has complex"),
            (np.full(N, 1j), "'v' has complex"),
            ([[1, 2]] * N, "'v' has nested values"),
            (pl.Series([[1, 2]] * N), "'v' has nested values"),
            (pa.array([{"a": 1}] * N), "'v' has nested values"),
            ([{"a": 1}] * N, "'v' has nested values"),
            ([1, 2, "x"] * 8, "'v' mixes numbers with other values, such as 'x' in row 2"),
            ([2**70, 1] * 12, "'v' has integers beyond 64 bits"),
            (np.zeros((N, 2)), "'v' must be one-dimensional"),
            (pd.date_range("2020-01-01", periods=N), "points in time.*dt.days"),
            (pd.Series(pd.date_range("2020", periods=N, tz="UTC")), "points in time"),
            ([dt.datetime(2020, 1, 1 + k) for k in range(N)], "points in time"),
            (pl.Series([dt.timedelta(k) for k in range(N)]), "spans of time.*total_seconds"),
        ],
    )
    def test_what_is_no_column(self, values, message):
        with pytest.raises(DataError, match=message):
            frame_of("y ~ x + v + (1 | g)", v=values)

    @pytest.mark.parametrize(
        "formula",
        [
            "y ~ x + day + (1 | g)",
            "y ~ x + I(day * 2) + (1 | g)",
            "day ~ x + (1 | g)",
            "y ~ offset(day) + (1 | g)",
            "y ~ x + scale(day):x + (1 | g)",
            "y ~ x + (day | g)",
        ],
    )
    def test_times_name_their_column(self, formula):
        days = pd.date_range("2020-01-01", periods=N)
        with pytest.raises(DataError, match=r"'day' has points in time.*dt.days"):
            frame_of(formula, day=days)

    def test_times_may_be_levels(self):
        days = pd.Timestamp("2020-01-01") + pd.to_timedelta(INTEGERS, unit="D")
        assert len(frame_of("y ~ 1 + (1 | v)", v=days).terms[0].levels) == 3
        assert len(frame_of("y ~ C(v) + (1 | g)", v=days).fixed_names) == 3

    def test_series_of_other_rows(self):
        shuffled = pd.Series(X, index=np.arange(N)[::-1])
        with pytest.raises(DataError, match="different row labels"):
            frame_of("y ~ x + (1 | g)", {"y": pd.Series(Y), "x": shuffled, "g": G})


NEW = {
    "Booleans": (BOOLEANS, [True, False], [1, 0], [1.0, 0.0], ["True"], [2]),
    "integers": (BOOLEANS.astype(int), [1, 0], [True, False], [1.0, 0.0], ["1"], None),
    "category of integers": (
        pd.Categorical(BOOLEANS.astype(int)),
        [1, 0],
        [True, False],
        [1.0, 0.0],
        ["1"],
        [2],
    ),
    "category of Booleans": (
        pd.Categorical(BOOLEANS),
        [True, False],
        [1, 0],
        [1.0, 0.0],
        ["True"],
        [2],
    ),
    "text": (
        np.where(BOOLEANS, "1", "0"),
        ["1", "0"],
        pd.Categorical(["1", "0"]),
        pd.Series(["1", "0"], dtype="string"),
        [1],
        ["2"],
    ),
}


@pytest.mark.parametrize("kind", NEW)
def test_new_rows_take_the_kind_of_the_fit(kind):
    fitted, first, *same, other, unseen = NEW[kind]
    fitted = column("v", fitted)
    expected = like_fitted("v", column("v", first), fitted)
    for values in same:
        found = like_fitted("v", column("v", values), fitted)
        assert found.tolist() == expected.tolist()
    for values in (other, unseen):
        if values is not None:
            with pytest.raises(DataError, match="'v'"):
                like_fitted("v", column("v", values), fitted)
