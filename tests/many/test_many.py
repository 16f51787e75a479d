"""`fit_many`: kinds of responses, ids, bad input, missing values, single fits, progress."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from decimal import Decimal

import jax
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import watchdog

import jaxreml
from jaxreml import DataError, FormulaError, Status, fit_many
from jaxreml.backend.devices import local_devices
from jaxreml.data.frame import covariate_frame
from jaxreml.data.responses import Responses

FORMULA = "~ Days + (1 | Subject)"
COUNT = 24


@pytest.fixture(scope="module")
def data():
    """sleepstudy with a row id that is not the position."""
    table = jaxreml.datasets.load("sleepstudy")
    return table.assign(row=[f"r{k}" for k in np.random.default_rng(1).permutation(len(table))])


@pytest.fixture(scope="module")
def table(data):
    """24 responses, (180, 24), with names."""
    noise = np.random.default_rng(2).normal(size=(len(data), COUNT))
    values = data["Reaction"].to_numpy()[:, None] + 30 * noise
    return pd.DataFrame(values, columns=[f"gene_{k}" for k in range(COUNT)])


@pytest.fixture(scope="module")
def expected(data, table):
    """Its fits."""
    with jax.enable_x64(True):
        return fit_many(FORMULA, data, table)


def blocks(table, width=7):
    """An iterator of pairs."""
    for start in range(0, table.shape[1], width):
        part = table.iloc[:, start : start + width]
        yield list(part.columns), part.to_numpy()


def parquet(table, folder):
    """A parquet file, in row groups, whose names are prefixes of others."""
    path = folder / "responses.parquet"
    names = {f"gene_{k}": "gene_1" + ".x" * (k - 1) for k in range(1, 4)}
    table = table.rename(columns=names).set_axis(pd.Index(list(range(len(table)))), axis=0)
    table.to_parquet(path, row_group_size=50, index=True)
    return path


def npy(table, folder, order="C"):
    path = folder / f"{order}.npy"
    np.save(path, np.asarray(table.to_numpy(), order=order))
    return path


KINDS = {
    "pandas": lambda table, folder: table,
    "nullable": lambda table, folder: table.convert_dtypes(),
    "polars": lambda table, folder: pl.from_pandas(table),
    "pyarrow": lambda table, folder: pa.Table.from_pandas(table, preserve_index=False),
    "dict": lambda table, folder: dict(table.items()),
    "array": lambda table, folder: table.to_numpy(),
    "fortran": lambda table, folder: np.asfortranarray(table.to_numpy()),
    "jax": lambda table, folder: jax.numpy.asarray(table.to_numpy()),
    "masked": lambda table, folder: np.ma.MaskedArray(table.to_numpy()),
    "memmap": lambda table, folder: np.load(npy(table, folder), mmap_mode="r"),
    "memmap view": lambda table, folder: np.load(npy(table, folder, "F"), mmap_mode="r")[:, :],
    "npy": npy,
    "parquet": parquet,
    "pairs": lambda table, folder: blocks(table),
    "pairs of one": lambda table, folder: list(blocks(table, 1)),
    "frames": lambda table, folder: (table.iloc[:, k : k + 9] for k in range(0, COUNT, 9)),
    "polars frames": lambda table, folder: iter([pl.from_pandas(table)]),
}


def same_numbers(found, expected):
    for name in expected.fits._fields:
        left, right = getattr(found.fits, name), getattr(expected.fits, name)
        if right is None:
            assert left is None
        elif name in ("status", "is_singular", "nobs", "n_missing"):
            np.testing.assert_array_equal(left, right, err_msg=name)
        elif name not in ("gradient_norm", "n_iter"):
            np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 5])
def test_every_kind_gives_the_same_values(data, table, tmp_path, kind, size):
    """What the engine gets, bit for bit, in blocks of the size asked for."""
    rows = np.arange(len(data)) % 10 != 3
    source = Responses(KINDS[kind](table, tmp_path), data, rows)
    found = list(source.blocks(size or 100))
    assert [len(block.names) for block in found] == ([COUNT] if size is None else [5] * 4 + [4])
    values = np.concatenate([block.read() for block in found], axis=1)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, table.to_numpy()[rows])
    names = [name for block in found for name in block.names]
    unnamed = kind in ("array", "fortran", "jax", "masked", "memmap", "memmap view", "npy")
    if kind != "parquet":
        assert names == (list(range(COUNT)) if unnamed else list(table.columns))


@pytest.mark.parametrize("kind", ["memmap", "parquet", "pairs"])
def test_every_kind_gives_the_same_fits(data, table, tmp_path, expected, kind):
    found = fit_many(FORMULA, data, KINDS[kind](table, tmp_path), batch_size=9)
    same_numbers(found, expected)
    assert expected.converged.all()
    assert len(found) == len(expected) == COUNT


def test_agrees_with_single_fits_and_gives_them(data, table, expected):
    for k in (0, 11):
        alone = jaxreml.fit(f"y {FORMULA}", data.assign(y=table.iloc[:, k]))
        np.testing.assert_allclose(expected.params.iloc[k], alone.params, rtol=1e-7)
        view = expected.estimate(f"gene_{k}")
        assert view.formula == f"gene_{k} {FORMULA}"
        assert view.criterion == alone.criterion
        np.testing.assert_array_equal(view.fitted, alone.fitted)


def test_single_fit_of_a_memory_map_with_everything(data, table, tmp_path):
    """Missing covariates, missing values, weights, an offset, ML, a context and awkward names."""
    covariates = data.assign(w=np.linspace(1, 2, len(data)), shift=np.arange(len(data)) / 9.0)
    covariates.loc[4, "Days"] = np.nan
    values = table.to_numpy()[:, :2].copy()
    values[[7, 20], 1] = np.nan
    np.save(tmp_path / "values.npy", values)
    formula = "~ double(Days) + offset(shift) + (1 | Subject)"
    options = {"weights": "w", "offset": np.ones(len(data)), "context": {"double": lambda x: 2 * x}}
    many = fit_many(formula, covariates, tmp_path / "values.npy", "ML", **options)
    assert many.nobs.tolist() == [179, 177]
    assert many.n_missing.tolist() == [0, 2]
    view = many.estimate(1)
    alone = jaxreml.fit(f"y {formula}", covariates.assign(y=values[:, 1]), "ML", **options)
    assert view.criterion == alone.criterion
    assert (view.n_dropped, view.method) == (alone.n_dropped, "ML") == (3, "ML")


def test_names_that_a_formula_cannot_have(data, table):
    named = table.iloc[:, :4].set_axis(["Days", "a b", "class", "Sub"], axis=1)
    results = fit_many(FORMULA, data, named)
    for k in range(4):
        assert results.estimate(k).formula == f"response {FORMULA}"
    assert results.responses.tolist() == ["Days", "a b", "class", "Sub"]


def test_one_response(data, table):
    for vector in (table["gene_3"], table["gene_3"].to_numpy()):
        source = Responses(vector, data, np.ones(len(data), bool))
        (block,) = source.blocks(10)
        np.testing.assert_array_equal(block.read()[:, 0], table["gene_3"])
    assert source.names.tolist() == [0]


def test_missing_values_and_booleans(data):
    n = len(data)
    some = [None, *range(n - 1)]
    frame = pd.DataFrame(
        {
            "nullable": pd.array(some, "Int64"),
            "arrow": pd.array(some, "float64[pyarrow]"),
            "flag": np.arange(n) % 2 == 0,
            "maybe": pd.array([None, *[True] * (n - 1)], "boolean"),
        }
    )
    polars = pl.DataFrame({"nullable": some, "flag": frame["flag"].to_list(), "float": some})
    arrow = pa.table({"nullable": some, "flag": pa.array([None, *[True] * (n - 1)])})
    masked = np.ma.MaskedArray(np.ones((n, 2), int), mask=np.arange(n)[:, None] == [0, 0])
    for responses in (frame, polars, arrow, masked):
        (block,) = Responses(responses, data, np.ones(n, bool)).blocks(10)
        values = block.read()
        flags = [k for k, name in enumerate(block.names) if name == "flag" and responses is frame]
        assert np.isnan(values[0]).sum() == values.shape[1] - (
            1 if responses is frame or responses is polars else 0
        )
        assert np.isfinite(values[1:]).all()
        for k in flags:
            assert set(values[:, k]) == {0.0, 1.0}


def test_nothing_is_modified(data, table):
    before = data.copy(), table.copy()
    array = table.to_numpy(copy=True)
    array[3, 2] = np.nan
    kept = array.copy()
    fit_many(FORMULA, data, array[:, :3])
    fit_many(FORMULA, data, table.iloc[:, :2])
    np.testing.assert_array_equal(array, kept)
    pd.testing.assert_frame_equal(data, before[0])
    pd.testing.assert_frame_equal(table, before[1])


def test_a_private_memory_map_keeps_its_changes(data, table, tmp_path):
    """Pages read are let go; those of a private map hold changes that exist nowhere else."""
    for mode in ("c", "r+"):
        values = np.load(npy(table, tmp_path), mmap_mode=mode)
        values[0, 0] = -1.0
        source = Responses(values, data, np.ones(len(data), bool))
        for _ in range(2):
            assert next(source.blocks(5)).read()[0, 0] == -1.0


def test_ids_match_rows_in_any_order(data, table, tmp_path):
    order = np.random.default_rng(3).permutation(len(data))
    shuffled = table.assign(row=data["row"]).iloc[order]
    shuffled = shuffled[["gene_0", "row", *table.columns[1:]]]
    shuffled.to_parquet(tmp_path / "shuffled.parquet")
    covariates = data.copy()
    covariates.loc[17, "Days"] = np.nan
    rows = covariate_frame(FORMULA, covariates).rows
    stream = (shuffled[["row", *names]] for names, _ in blocks(table))
    for responses in (shuffled, pl.from_pandas(shuffled), tmp_path / "shuffled.parquet", stream):
        source = Responses(responses, covariates, rows, "row")
        (block,) = source.blocks(100)
        assert list(block.names) == list(table.columns)
        np.testing.assert_array_equal(block.read(), table.to_numpy()[rows])


def ids(table, **changes):
    changed = table.assign(row=[f"r{k}" for k in range(len(table))])
    for row, value in changes.items():
        changed.loc[int(row.removeprefix("_")), "row"] = value
    return changed


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (lambda t: ids(t, _3="r5"), "'r5' occurs more than once in column 'row' of the responses"),
        (lambda t: ids(t, _3=None), "1 rows of the responses have no 'row'"),
        (lambda t: ids(t, _3="x"), r"1 only in the data \('r3'\) and 1 only in the resp.*\('x'\)"),
        (lambda t: ids(t)[:-20], r"20 only in the data \('r\d+', 'r\d+', 'r\d+', \.\.\.\); keep"),
        (lambda t: t, "id='row' is not a column of the responses"),
        (lambda t: t.to_numpy(), "needs responses in a dataframe"),
        (lambda t: blocks(t), "needs responses in a dataframe"),
        (lambda t: ids(t)[["row"]], "no columns but the id"),
    ],
)
def test_bad_ids(data, table, responses, message):
    with pytest.raises(DataError, match=message):
        fit_many(FORMULA, data, responses(table), id="row")


def test_bad_ids_in_the_data(data, table):
    with pytest.raises(DataError, match="'r1' occurs more than once in column 'row' of the data"):
        fit_many(FORMULA, data.replace({"row": {"r2": "r1"}}), ids(table), id="row")
    with pytest.raises(DataError, match="did you mean 'row'"):
        fit_many(FORMULA, data, ids(table), id="rows")


def stream(*pieces):
    return iter(pieces)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (lambda t: t[:-1], "the data have 180 rows and the responses 179; match them by an id"),
        (lambda t: t.to_numpy().T, "responses 24. They have a row per response; transpose"),
        (lambda t: t.assign(sex="m", site="x"), r"not numeric: 'sex' \((str|object)\), 'site'"),
        (lambda t: t.assign(when=pd.Timestamp("2024-01-01")), "not numeric: 'when'"),
        (lambda t: t.assign(kind=pd.Categorical(["a"] * 180)), "not numeric: 'kind'"),
        (lambda t: t.assign(wave=1j), r"'wave' \(complex128\)"),
        (lambda t: pl.from_pandas(t.assign(sex="m")), r"not numeric: 'sex' \(String\)"),
        (lambda t: t.to_numpy().astype(str), "dtype <U32, which is not numeric"),
        (lambda t: t.to_numpy().astype(object), "dtype object, which is not numeric"),
        (lambda t: t.set_axis(["a", "a", *t.columns[2:]], axis=1), "'a' occurs more than once"),
        (lambda t: t.set_axis([0, "a", *t.columns[2:]], axis=1), "all strings or all integers"),
        (lambda t: t.set_axis([("a", k) for k in range(24)], axis=1), "all strings or all int"),
        (lambda t: t.iloc[:, :0], "there are no responses"),
        (lambda t: t.to_numpy()[:, :0], "there are no responses"),
        (lambda t: np.zeros((2, 3, 4)), r"\(n, B\) array.*not \(2, 3, 4\)"),
        (lambda t: 7, "responses must be a dataframe.*not int"),
        (lambda t: pl.from_pandas(t).lazy(), "lazy frame; call .collect"),
        (lambda t: "genes.csv", r"only files ending in .parquet, .feather or .npy"),
        (lambda t: "nowhere.npy", "there is no file 'nowhere.npy'"),
        (lambda t: stream(), "the iterator gave none"),
        (lambda t: stream((["a"], t.to_numpy())), "1 names for 24 responses"),
        (lambda t: stream((["a"], t["gene_0"].to_numpy())), "block 0 of the responses"),
        (lambda t: stream(t[["gene_0"]], t[["gene_0"]]), "'gene_0' occurs more than once"),
        (lambda t: stream(t, ([1], np.zeros((180, 1)))), "all strings or all integers"),
        (lambda t: stream(t, (["a"], np.zeros((9, 1)))), "180 rows and the responses 9"),
        (lambda t: t.to_numpy().tolist(), "list of lists: pass np.array\\(responses, float\\)"),
        (lambda t: t["gene_0"].tolist(), "list of floats"),
        (lambda t: t.iloc[::-1], "same row labels in different orders"),
    ],
)
def test_bad_responses(data, table, responses, message):
    with pytest.raises(DataError, match=message):
        fit_many(FORMULA, data, responses(table))


def test_bad_files(data, tmp_path):
    for name in ("empty.npy", "text.npy", "empty.parquet", "text.parquet"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"not a table at all")
        with pytest.raises(DataError, match=f"{name}' cannot be read"):
            fit_many(FORMULA, data, tmp_path / name)


def test_bad_arguments(data, table):
    with pytest.raises(FormulaError, match="has a left side"):
        fit_many(f"Reaction {FORMULA}", data, table)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        fit_many(FORMULA, data, table, batch_size=0)
    with pytest.raises(TypeError, match=r"fit_many has no argument 'REML': write method="):
        fit_many(FORMULA, data, table, REML=False)
    with pytest.raises(ValueError, match="REML"):
        fit_many(FORMULA, data, table, "MLE")


def test_progress_is_for_terminals(data, table, capfd):
    part = table.iloc[:, :4]
    fit_many(FORMULA, data, part)
    assert capfd.readouterr().err == ""
    fit_many(FORMULA, data, part.assign(flat=1.0), progress=True, batch_size=3)
    shown = capfd.readouterr().err
    assert "5/5" in shown
    assert "responses/s, 1 failed" in shown


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_on_a_terminal():
    code = textwrap.dedent("""
        import numpy as np
        from jaxreml.api.blocks import progress_of_fits
        with progress_of_fits(8, None) as advance:
            advance(np.array([0, 0, 5]))
    """)
    outer, inner = os.openpty()
    process = watchdog.run(code, stderr=inner, stdout=subprocess.PIPE)
    os.close(inner)
    shown = os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert process.returncode == 0
    assert process.stdout == b""
    assert "3/8" in shown
    assert "1 failed" in shown


@pytest.mark.parametrize("formula", ["~ x + (1 | g) + (1 | h)", "~ x + (1 | g / k)"])
def test_crossed_and_nested_factors_are_single_fits(formula):
    """With all options; `test_batch.test_equals_estimate` has the program optimised."""
    rng = np.random.default_rng(5)
    n = 240
    table = {"x": rng.normal(size=n), "g": np.arange(n) % 20, "h": rng.integers(0, 8, n)}
    data = pd.DataFrame(table | {"k": np.arange(n) // 20 % 4, "w": rng.uniform(0.5, 2, n)})
    values = rng.normal(size=(n, 70)) + rng.normal(size=(8, 70))[data["h"]]
    values += rng.choice([0.0, 1.0], 70) * rng.normal(size=(20, 70))[data["g"]]
    values[:3, 1] = values[:3, 2] = values[5:9, 3] = np.nan
    values[:, 4] = 1.0
    options = {"weights": "w", "df": "kenward-roger", "contrasts": {"sum": [1, 1]}, "modes": True}
    results = jaxreml.fit_many(formula, data, values, **options)
    assert results.model.structure == "crossed"
    assert results.is_singular.any() and results.status[4] == jaxreml.Status.CONSTANT
    for i in (0, 2, 69):
        single = results.estimate(i)
        test = single.test([1, 1], df="kenward-roger", joint=False)
        np.testing.assert_allclose(results.criterion[i], single.criterion, rtol=1e-11)
        assert results.nobs[i] == single.nobs and results.is_singular[i] == single.is_singular
        for ours, theirs in (
            (results.params, single.params),
            (results.df, single.coefficients("kenward-roger")["df"]),
        ):
            np.testing.assert_allclose(ours.iloc[i], theirs, rtol=1e-6)
        np.testing.assert_allclose(results.fits.contrast[i], test["estimate"], rtol=1e-6)
        np.testing.assert_allclose(results.fits.contrast_se[i], test["std_error"], rtol=1e-6)
        for name, modes in single.random_effects.items():
            np.testing.assert_allclose(
                results.random_effects[name].loc[results.responses[i]], modes, atol=1e-8
            )


@pytest.mark.long
def test_crossed_factors_with_thousands_of_levels():
    data = jaxreml.datasets.load("insteval")
    values = np.column_stack([data["y"], np.random.default_rng(0).permutation(data["y"])])
    results = jaxreml.fit_many("~ service + (1 | s) + (1 | d) + (1 | dept:service)", data, values)
    single = jaxreml.fit("y ~ service + (1 | s) + (1 | d) + (1 | dept:service)", data)
    np.testing.assert_allclose(results.criterion[0], single.criterion, atol=1e-6)


def test_devices_are_a_kind_or_devices(data, table):
    """One sentence where there are none of the kind, in Python as on the command line."""
    few = table.iloc[:, :2]
    with pytest.raises(DataError, match=r"no GPU that JAX can use: install.* JAX says: "):
        fit_many(FORMULA, data, few, devices="gpu")
    for devices in ("quantum", [], 7, [7]):
        with pytest.raises(ValueError, match="devices must be JAX devices"):
            fit_many(FORMULA, data, few, devices=devices)
    assert local_devices("cpu") == local_devices(jax.devices()) == local_devices(None)
    assert local_devices(jax.devices()[0]) == [jax.devices()[0]]


def test_no_device_of_the_platform_asked_for():
    """JAX_PLATFORMS is read when JAX starts; its AssertionError has no words."""
    code = """
import jaxreml.backend.devices as d
try: d.local_devices()
except d.DataError as e: print(e)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith("no GPU that JAX can use (JAX_PLATFORMS=cuda asks for it): ")


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_units_of_the_response(data, table, method):
    """Any unit gives the same tests, or a status that says to rescale; never another result."""
    y = table["gene_0"].to_numpy()
    powers = [0, -300, -160, -150, -137, -100, -80, 80, 100, 150, 160, 300]
    values = np.column_stack([y * 10.0**k for k in powers])
    results = fit_many(FORMULA, data, values, method)
    few = np.abs(powers) <= 100
    sentences = [Status.UNDERFLOW.sentence, Status.NOT_FINITE.sentence]
    assert set(results.message[~results.converged]) == set(sentences)
    assert results.converged[few].all() and not results.converged[[1, 2, 3, 10, 11]].any()
    for i in np.flatnonzero(results.converged):
        np.testing.assert_allclose(results.tvalues.iloc[i], results.tvalues.iloc[0], rtol=1e-8)
        np.testing.assert_allclose(results.pvalues.iloc[i], results.pvalues.iloc[0], rtol=1e-6)
    for i in np.flatnonzero(few):
        alone = results.estimate(i).coefficients()
        np.testing.assert_allclose(alone["p_value"], results.pvalues.iloc[0], rtol=1e-6)
    for i in (2, 10):
        with pytest.raises(DataError, match="rescale"):
            results.estimate(i)


def test_numbers_of_any_type_or_a_refusal_by_name(data):
    """Integers, Booleans and decimals are numbers; words and dates are named."""
    n = len(data)
    counts = np.arange(n)
    decimals = [Decimal(int(k)) / 4 for k in counts]
    frame = pd.DataFrame(
        {
            "int8": (counts % 100).astype(np.int8),
            "uint64": counts.astype(np.uint64),
            "half": counts.astype(np.float16),
            "objects": counts.astype(object),
            "sparse": pd.arrays.SparseArray(counts.astype(float)),
            "arrow": pd.array(decimals, pd.ArrowDtype(pa.decimal128(12, 2))),
        }
    )
    expected = frame.astype(float)
    typed = (frame, pl.DataFrame({"d": decimals}), pa.table({"d": decimals}))
    for responses in typed:
        (block,) = Responses(responses, data, np.ones(n, bool)).blocks(10)
        reference = expected if responses is frame else expected[["arrow"]]
        np.testing.assert_array_equal(block.read(), reference)
    for name, column in {
        "word": ["a"] * n,
        "stray": [*map(str, counts[1:]), "."],
        "day": pd.date_range("2024-01-01", periods=n),
        "span": pd.to_timedelta(counts, "D"),
    }.items():
        for responses in (pd.DataFrame({name: column}), pl.DataFrame({name: column})):
            with pytest.raises(DataError, match=name):
                Responses(responses, data, np.ones(n, bool))
