"""Rows of the data and of responses: what labels and ids say about which belong together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxreml import DataError, fit_many
from jaxreml.data.responses import Responses

N, B = 8, 3
NAMES = [f"s{k}" for k in range(N)]
GENES = ["tp53", "brca1", "myc"]


@pytest.fixture
def data():
    """Covariates with a column of labels, a factor and a number; rows only counted."""
    return pd.DataFrame({"sample": NAMES, "arm": list("abababab"), "x": np.arange(N) * 1.5})


@pytest.fixture
def table():
    """Responses labelled by sample."""
    values = np.arange(N * B, dtype=float).reshape(N, B)
    return pd.DataFrame(values, index=NAMES, columns=GENES)


def read(responses, data, id=None, rows=None):
    rows = np.ones(len(data), bool) if rows is None else rows
    blocks = list(Responses(responses, data, rows, id).blocks(100))
    return np.concatenate([block.read() for block in blocks], axis=1)


def saved(table, folder):
    table.to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


# Kinds of tables that carry labels
KINDS = {
    "pandas": lambda table, folder: table,
    "arrow": lambda table, folder: pa.Table.from_pandas(table),
    "parquet": saved,
    "dict of series": lambda table, folder: dict(table.items()),
    "frames": lambda table, folder: iter([table.iloc[:, :2], table.iloc[:, 2:]]),
    "xarray": lambda table, folder: pytest.importorskip("xarray").DataArray(table),
}
REMEDY = 'pass id="sample"'


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_differ(data, table, tmp_path, kind):
    """Every table with labels: the same order passes, any other is refused with the remedy."""

    def make(table):
        return KINDS[kind](table, tmp_path)

    labelled = data.set_index("sample")
    np.testing.assert_array_equal(read(make(table), labelled), table)
    np.testing.assert_array_equal(read(make(table), data), table)  # as the column has them
    with pytest.raises(DataError, match="the same row labels in different orders"):
        read(make(table[::-1]), labelled)
    with pytest.raises(DataError, match=f"values of the column 'sample' of the data.*{REMEDY}"):
        read(make(table[::-1]), data)
    message = r"row labels differ: 1 only in the data \('s7'\), 1 only in the responses \('s0'\)"
    with pytest.raises(DataError, match=message):
        read(make(table[:-1]), labelled[1:])
    message = r"8 rows and the responses 7.*by row labels, 1 only in the data \('s7'\)$"
    with pytest.raises(DataError, match=message):
        read(make(table[:-1]), labelled)
    with pytest.raises(DataError, match=REMEDY):  # most of the labels are in the column
        read(make(table[:-1]), data[1:])
    # What the message says works, whatever the index is called.
    for order in (slice(None), slice(None, None, -1)):
        np.testing.assert_array_equal(read(make(table[order]), data, "sample"), table)
        np.testing.assert_array_equal(read(make(table[order]), labelled, "sample"), table)
    other = make(table[::-1].rename_axis("specimen"))
    np.testing.assert_array_equal(read(other, data, "sample"), table)
    with pytest.raises(DataError, match=r"the ids.*1 only in the data \('s7'\); keep the same"):
        read(make(table[:-1]), data, "sample")


def test_ids_are_found_in_indexes_by_their_names(data, table):
    """A column here and an index there, levels of a MultiIndex, words and numbers."""
    shuffled = table.iloc[[3, 1, 0, 2, 7, 6, 5, 4]]
    levels = pd.MultiIndex.from_arrays([list("xyxyxyxy"), shuffled.index], names=["who", "sample"])
    column = shuffled.rename_axis("sample").reset_index()
    for ours in (data, data.set_index("sample"), pl.from_pandas(data)):
        for theirs in (shuffled.rename_axis("sample"), shuffled.set_axis(levels), column):
            np.testing.assert_array_equal(read(theirs, ours, "sample"), table)
    numbers = data.assign(sample=np.arange(N) + 100)
    words = shuffled.set_axis([str(int(name[1:]) + 100) for name in shuffled.index])
    np.testing.assert_array_equal(read(words, numbers, "sample"), table)
    with pytest.raises(DataError, match="id='smaple' is not a column of the data; did you mean"):
        read(shuffled, data, "smaple")
    with pytest.raises(DataError, match=r"'sample' is not a column of the responses.*are: tp53"):
        read(table.reset_index(drop=True), data, "sample")
    with pytest.raises(DataError, match="the index is 'specimen'"):
        read(table.reset_index(drop=True).rename_axis("specimen"), data, "sample")


def test_whole_numbers_as_labels(data, table):
    """Labels left by dropping rows differ; counts of rows and coincidences do not count."""
    kept = data[["x", "arm"]]
    plain = table.reset_index(drop=True)
    for ours, theirs in ((kept[:-1], plain[1:]), (kept[1:], plain[:-1]), (kept[::2], plain[:4])):
        with pytest.raises(DataError, match=r"row labels differ: \d only in the data \(\d"):
            read(theirs, ours)
    np.testing.assert_array_equal(read(plain[::2], kept[::2]), table[::2])
    codes = data.assign(code=[11, 14, 13, 12, 18, 15, 16, 17])
    coded = plain.set_axis(pd.Index([14, 11, 13, 12, 18, 15, 16, 17]))
    with pytest.raises(DataError, match=r"values of the column 'code'.*id=.code"):
        read(coded, codes.set_axis(pd.Index(NAMES)))
    ordered = coded.iloc[[1, 0, *range(2, N)]]
    np.testing.assert_array_equal(read(ordered, codes), ordered)
    np.testing.assert_array_equal(read(coded, codes, "code"), ordered)
    # One of the two only counts its rows
    np.testing.assert_array_equal(read(plain, data.set_index("sample")), table)
    np.testing.assert_array_equal(read(table, data[["x", "arm"]]), table)
    np.testing.assert_array_equal(read(table.to_numpy(), data.set_index("sample")[::-1]), table)


def test_labels_that_repeat(data, table):
    """A factor as index: in the order of its column, or refused."""
    by_arm = table.set_axis(data["arm"])
    np.testing.assert_array_equal(read(by_arm, data), table)
    with pytest.raises(DataError, match=r"'arm' of the data.*: bring the rows in one order"):
        read(by_arm.sort_index(), data)
    with pytest.raises(DataError, match="'a' occurs more than once in column 'arm' of the data"):
        read(by_arm, data, "arm")


def test_columns_of_both_tables(data, table, tmp_path):
    """An id that is a number would be fitted as a response, and the rows be others."""
    data["subject"] = np.arange(N) + 10
    theirs = table.reset_index(drop=True).assign(subject=data["subject"])
    assert read(theirs, data).shape == (N, B + 1)
    shuffled = theirs.iloc[::-1].reset_index(drop=True)
    pq.write_table(pa.table(shuffled), tmp_path / "shuffled.parquet")
    for responses in (shuffled, pl.from_pandas(shuffled), tmp_path / "shuffled.parquet"):
        with pytest.raises(DataError, match=r"'subject' of the data and.*id=.subject"):
            read(responses, data)
        np.testing.assert_array_equal(read(responses, data, "subject"), table)
    named = shuffled.assign(subject=shuffled["subject"].map("p{}".format))
    with pytest.raises(DataError, match='id="subject"'):
        read(named, data.assign(subject=data["subject"].map("p{}".format)))
    # A response that is also a column of the data is none.
    assert read(theirs.assign(x=-data["x"]), data).shape == (N, B + 2)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "parquet", "frames", "xarray", "polars"])
def test_a_row_per_response(data, table, tmp_path, kind):
    """Genes in rows: by their labels, or by the shape."""
    square = pd.concat([table.add_suffix(k) for k in ("", "_2", "_3")], axis=1).iloc[:, :N]
    kinds = {**KINDS, "polars": lambda table, folder: pl.from_pandas(table)}
    for turned in (table.T, square.T):
        for ours in (data, data.set_index("sample"), data[["x"]].set_axis(pd.Index(NAMES))):
            with pytest.raises(DataError, match=r"labels of rows: the .* transpose them"):
                read(kinds[kind](turned, tmp_path), ours)
        if kind in ("frames", "xarray"):
            continue  # a part of the columns, or an array of objects
        responses = kinds[kind](turned.rename_axis("gene").reset_index(), tmp_path)
        for id in (None, "sample"):
            with pytest.raises(DataError, match=r"labels of rows: the .* transpose them"):
                read(responses, data, id)
    for turned in (table.T, table.T.rename_axis("gene").reset_index()):
        if kind in ("frames", "xarray"):
            break
        with pytest.raises(DataError, match=r"8 rows and the responses 3.*transpose them"):
            read(kinds[kind](turned, tmp_path), data[["x"]])


def test_series_of_a_dict_that_differ(data, table):
    columns = dict(table.items())
    columns["myc"] = columns["myc"][::-1]
    with pytest.raises(DataError, match="series 'tp53' and 'myc' have different row labels"):
        read(columns, data)


def test_unused_columns_may_hold_anything(data, table):
    """They are looked at for labels only; what cannot be labels is passed over."""
    odd = data.assign(mixed=[1, "a", None, 2.5, (3,), [4], {5}, "b"], wave=1j, sample=NAMES)
    np.testing.assert_array_equal(read(table, odd), table)
    with pytest.raises(DataError, match=REMEDY):
        read(table[::-1], odd)


def test_missing_covariates_and_ids(data, table):
    """Rows that the model leaves out, with rows in another order."""
    rows = np.arange(N) != 2
    found = read(table[::-1], data, "sample", rows)
    np.testing.assert_array_equal(found, table.to_numpy()[rows])
    np.testing.assert_array_equal(read(table, data, None, rows), table.to_numpy()[rows])


def test_messages_show_plain_values(data, table):
    """No np.int64(0)."""
    numbers = data.assign(code=[1, 1, 2, 3, 4, 5, 6, 7])
    theirs = table.assign(code=np.arange(N))
    with pytest.raises(DataError) as repeated:
        read(theirs, numbers, "code")
    with pytest.raises(DataError) as differ:
        read(theirs, numbers.assign(code=np.arange(N) + 1), "code")
    with pytest.raises(DataError) as names:
        read(np.zeros((N, 2)), data).shape and read(
            iter([(np.array([4, 4]), np.zeros((N, 2)))]), data
        )
    for error in (repeated, differ, names):
        assert "np." not in str(error.value)
    assert "the id 1 occurs more than once" in str(repeated.value)
    assert "response 4 occurs more than once" in str(names.value)


def test_fit_many_refuses_before_any_compute(data, table):
    with pytest.raises(DataError, match=REMEDY):
        fit_many("~ x + (1 | arm)", data, table[::-1])
