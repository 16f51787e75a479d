"""Frames of results in the library that the data came in."""

from __future__ import annotations

import datetime as dt
import inspect

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import jaxreml
from jaxreml.data.outputs import converted, library_of

MACHINES = jaxreml.datasets.load("machines").astype({"Worker": str, "Machine": str})
FORMULA = "score ~ Machine + (1 | Worker)"
LIBRARIES = {
    "pandas": (lambda table: table, pd.DataFrame),
    "polars": (pl.from_pandas, pl.DataFrame),
    "pyarrow": (lambda table: pa.Table.from_pandas(table, preserve_index=False), pa.Table),
}
FRAMES = {
    "coefficients": (lambda fit, **o: fit.coefficients(**o), "term"),
    "conf_int": (lambda fit, **o: fit.conf_int(**o), "parameter"),
    "test": (lambda fit, **o: fit.test("`Machine[T.B]`", joint=False, **o), "hypothesis"),
    "joint test": (lambda fit, **o: fit.test("`Machine[T.B]`", **o), None),
    "anova": (lambda fit, **o: fit.anova(**o), "term"),
    "joint_tests": (lambda fit, **o: fit.joint_tests(**o), None),
    "drop1": (lambda fit, **o: fit.drop1(**o), "term"),
    "ranova": (lambda fit, **o: fit.ranova(**o), "term"),
    "variance_parameters": (lambda fit, **o: fit.variance_parameters(**o), "parameter"),
    "icc": (lambda fit, **o: fit.icc(**o), "function"),
    "r2": (lambda fit, **o: fit.r2(**o), "function"),
    "variance_shares": (lambda fit, **o: fit.variance_shares(**o), "part"),
    "tidy": (lambda fit, **o: fit.tidy(("fixed", "ran_pars", "ran_vals"), **o), None),
    "tidy fixed": (lambda fit, **o: fit.tidy("fixed", **o), None),
    "glance": (lambda fit, **o: fit.glance(**o), None),
    "augment": (lambda fit, **o: fit.augment(**o), None),
    "predict": (lambda fit, **o: fit.predict(interval="confidence", **o), None),
    "contrast": (lambda fit, **o: fit.contrast("Machine", **o), None),
    "emmeans": (lambda fit, **o: fit.emmeans("Machine").to_frame(**o), None),
    "dfbetas": (lambda fit, **o: fit.dfbetas(**o), None),
    "simulate": (lambda fit, **o: fit.simulate(2, **o), None),
}


@pytest.fixture(scope="module")
def fits():
    return {name: jaxreml.fit(FORMULA, make(MACHINES)) for name, (make, _) in LIBRARIES.items()}


@pytest.fixture(scope="module")
def batches():
    values = np.random.default_rng(0).normal(size=(54, 4))
    return {
        name: jaxreml.fit_many("~ Machine + (1 | Worker)", make(MACHINES), values)
        for name, (make, _) in LIBRARIES.items()
    }


def as_pandas(frame):
    frame = frame.to_pandas() if not isinstance(frame, pd.DataFrame) else frame
    return frame.astype({name: object for name in frame if not is_number(frame[name])})


def is_number(values):
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def same(found, expected, index):
    """The frame has pandas' columns, with its row labels as the first one."""
    if index is not None:
        expected = expected.rename_axis(index).reset_index()
    found, expected = as_pandas(found), as_pandas(expected)
    assert list(found.columns) == [str(name) for name in expected.columns]
    for name in expected.columns:
        if is_number(expected[name]):
            np.testing.assert_allclose(
                found[name].to_numpy(float), expected[name].to_numpy(float), rtol=1e-8, atol=1e-9
            )
        else:
            ours = [None if pd.isna(value) else value for value in found[name]]
            assert ours == [None if pd.isna(value) else value for value in expected[name]]


@pytest.mark.parametrize("name", FRAMES)
class TestFits:
    def test_frames_are_of_the_library_of_the_data(self, fits, name):
        method, index = FRAMES[name]
        expected = method(fits["pandas"])
        assert type(expected) is pd.DataFrame
        for library in ("polars", "pyarrow"):
            found = method(fits[library])
            assert type(found) is LIBRARIES[library][1]
            same(found, expected, index)

    def test_another_library_is_asked_for(self, fits, name):
        method, index = FRAMES[name]
        expected = method(fits["pandas"], output="pandas")
        for library, (_, kind) in LIBRARIES.items():
            found = method(fits["pandas"], output=library)
            assert type(found) is kind
            if library != "pandas":
                same(found, expected, index)
            pd.testing.assert_frame_equal(
                method(fits[library], output="pandas"), expected, rtol=1e-8, atol=1e-9
            )


def test_series_of_rows(fits):
    for method in ("predict", "residuals", "leverage", "cooks_distance"):
        expected = getattr(fits["pandas"], method)()
        assert isinstance(expected, pd.Series)
        found = getattr(fits["polars"], method)()
        assert isinstance(found, pl.Series) and found.name == (expected.name or "values")
        np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-8)
        assert isinstance(getattr(fits["pyarrow"], method)(), pa.ChunkedArray)


def test_predictions_become_a_column():
    data = pl.from_pandas(MACHINES)
    fit = jaxreml.fit(FORMULA, data)
    added = data.with_columns(fit.predict(data))
    np.testing.assert_allclose(added["prediction"], fit.fitted)
    missing = data.with_columns(
        Machine=pl.when(pl.int_range(54) < 2).then(None).otherwise("Machine")
    )
    assert fit.predict(missing).null_count() == 2


def test_what_is_labelled_stays_pandas(fits):
    fit = fits["polars"]
    assert isinstance(fit.params, pd.Series) and isinstance(fit.vcov, pd.DataFrame)
    assert isinstance(fit.emmeans("Machine").table, pd.DataFrame)
    assert isinstance(fit.random_effects["Worker"], pd.DataFrame)


def test_it_is_remembered(fits, tmp_path):
    fits["polars"].save(tmp_path / "fit.json")
    assert isinstance(jaxreml.load(tmp_path / "fit.json").tidy(), pl.DataFrame)
    fits["polars"].save(tmp_path / "slim.json", data=False)
    assert isinstance(jaxreml.load(tmp_path / "slim.json").tidy(), pl.DataFrame)
    assert isinstance(fits["polars"].step().fit.tidy(), pl.DataFrame)


def test_help_says_so():
    for method in (jaxreml.LMMResults.tidy, jaxreml.BatchResults.top_table):
        assert "output" in inspect.signature(method).parameters
        assert "\n    output: " in (method.__doc__ or "")
    assert "conf_level" in inspect.signature(jaxreml.LMMResults.tidy).parameters


def test_polars_from_start_to_end():
    """Enums in their order, categoricals, nulls, dates, Booleans and small integers."""
    n = len(MACHINES)
    data = pl.from_pandas(MACHINES).with_columns(
        Machine=pl.col("Machine").cast(pl.String).cast(pl.Enum(["C", "A", "B"])),
        Worker=pl.col("Worker").cast(pl.String).cast(pl.Categorical),
        day=pl.lit(dt.date(2024, 1, 1)) + pl.duration(days=pl.int_range(n) % 5),
        small=(pl.int_range(n) % 7).cast(pl.Int8),
        flag=pl.int_range(n) % 3 == 0,
        score=pl.when(pl.int_range(n) == 4).then(None).otherwise(pl.col("score")),
    )
    fit = jaxreml.fit("score ~ Machine + small + flag + C(day) + (1 | Worker)", data)
    assert fit.n_dropped == 1 and list(fit.fixed_names)[1] == "Machine[T.A]"
    rows = fit.augment()
    assert rows.height == n - 1 and not rows.null_count().to_numpy().any()
    assert rows["Machine"].dtype == pl.Enum(["C", "A", "B"])
    assert isinstance(rows["Worker"].dtype, pl.Enum)
    assert rows["day"].dtype == pl.Date and rows["flag"].dtype == pl.Boolean
    assert rows["small"].dtype.is_integer()
    kept = data.filter(pl.col("score").is_not_null())
    assert rows["day"].to_list() == kept["day"].to_list()
    again = jaxreml.fit(fit.formula, rows)
    np.testing.assert_allclose(again.beta, fit.beta)
    assert fit.tidy("ran_vals")["std_error"].dtype == pl.Float64
    assert fit.tidy("fixed")["group"].dtype == pl.String  # of nulls alone
    intervals = fit.predict(data.drop("score"), interval="prediction")
    assert intervals.shape == (n, 4)


BATCH_FRAMES = {
    "tidy": (lambda batch: batch.tidy(), False),
    "glance": (lambda batch: batch.glance(), False),
    "to_frame": (lambda batch: batch.to_frame(), False),
    "top_table": (lambda batch: batch.top_table("Machine[T.B]"), False),
    "test": (lambda batch: batch.test("`Machine[T.B]`"), True),
    "anova": (lambda batch: batch.anova(), True),
    "variance_fractions": (lambda batch: batch.variance_fractions(), True),
    "icc": (lambda batch: batch.icc(), True),
    "r2": (lambda batch: batch.r2(), True),
    "moderated": (lambda batch: batch.moderated().to_frame(), False),
    "moderated table": (lambda batch: batch.moderated().top_table("Machine[T.B]"), False),
}


class TestBatches:
    @pytest.mark.parametrize("name", BATCH_FRAMES)
    def test_frames(self, batches, name):
        method, labelled = BATCH_FRAMES[name]
        expected = method(batches["pandas"])
        if expected.columns.nlevels == 2:
            expected = expected.set_axis([f"{b}[{a}]" for a, b in expected.columns], axis=1)
        for library in ("polars", "pyarrow"):
            found = method(batches[library])
            assert type(found) is LIBRARIES[library][1]
            same(found, expected, "response" if labelled else None)

    def test_it_is_remembered_in_files_and_by_single_fits(self, batches, tmp_path):
        batch = batches["polars"]
        batch.to_parquet(tmp_path / "fits.parquet")
        read = jaxreml.BatchResults.read_parquet(tmp_path / "fits.parquet")
        assert isinstance(read.tidy(), pl.DataFrame)
        assert isinstance(batch.estimate(0).tidy(), pl.DataFrame)
        batch.to_csv(tmp_path / "fits.csv")
        assert len(pd.read_csv(tmp_path / "fits.csv")) == 4


def test_libraries():
    assert library_of({"x": [1]}) == library_of(np.zeros(3)) == "pandas"
    with pytest.raises(ValueError, match="output must be one of pandas, polars, pyarrow"):
        converted(pd.DataFrame({"a": [1]}), "dask")
    mixed = pd.DataFrame({"level": ["a", 1, None]})
    for library in ("polars", "pyarrow"):
        assert as_pandas(converted(mixed, library))["level"].tolist()[:2] == ["a", "1"]
