"""Labels of every type come back from a saved fit as they were, or are refused."""

from __future__ import annotations

import datetime as dt
import decimal
import json

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError
from jaxreml.results.storage import decode, encode

DAYS = pd.to_datetime(
    ["2020-01-01", "2020-03-29 01:30", "2020-10-25 02:30:00.000000001"], format="ISO8601"
)
LABELS = {
    "intervals": pd.cut([1, 2, 3], [0, 1, 2, 3]).categories.tolist(),
    "real intervals": [pd.Interval(0.1, 0.25, closed="both"), pd.Interval(0.25, np.inf)],
    "intervals of time": pd.interval_range(
        pd.Timestamp("2020-01-01"), periods=3, freq="D"
    ).tolist(),
    "timestamps": DAYS.tolist(),
    "with a time zone": DAYS.tz_localize("UTC").tz_convert("Europe/Vienna").tolist(),
    "datetimes": DAYS.floor("s").to_pydatetime().tolist(),
    "dates": [dt.date(2020, 1, 1), dt.date(1999, 12, 31)],
    "times": [dt.time(3, 4, 5, 6)],
    "spans": [*pd.to_timedelta([1, 90061_000_000_001], unit="ns").tolist(), dt.timedelta(-1, 5)],
    "periods": pd.period_range("2020-01", periods=3, freq="M").tolist()
    + pd.period_range("2020", periods=2, freq="Y-JUN").tolist(),
    "bytes": [b"a", b"\xff\x00"],
    "numbers and Booleans": [1, -(2**63), 0.1, float("inf"), True, False, None, "text"],
    "NumPy's": [np.int64(3), np.bool_(True), np.str_("a"), np.datetime64("2020-01-01", "ns")],
    "tuples": [("a", 1), ("b", dt.date(2020, 1, 1))],
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind):
    for label in LABELS[kind]:
        again = decode(json.loads(json.dumps(encode(label), allow_nan=False)))
        assert again == label
        if kind != "NumPy's":
            assert type(again) is type(label)


@pytest.mark.parametrize(
    "index",
    [
        pd.RangeIndex(3, name="row"),
        pd.Index(["a", "b", "a"], name=("x", 1)),
        pd.Index([1.5, 2.0, 3.0]),
        DAYS,
        DAYS.tz_localize("UTC"),
        pd.period_range("2020-01", periods=3, freq="M"),
        pd.interval_range(0, 3),
        pd.CategoricalIndex(["u", "v", "u"], ordered=True),
        pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["s", "t"]),
        pd.MultiIndex.from_arrays([DAYS, [True, False, True]]),
    ],
    ids=lambda index: type(index).__name__,
)
@pytest.mark.parametrize("kind", ["intervals", "timestamps", "dates", "periods", "bytes"])
def test_tables(index, kind):
    labels = LABELS[kind][:3]
    labels = [*labels, labels[0]][:3]
    table = pd.DataFrame(
        {
            "objects": pd.Series(labels, dtype=object).to_numpy(),
            "category": pd.Categorical(labels, ordered=True),
            "whole": np.array([1, 2**62, 3]),
            "unsigned": np.array([1, 2**64 - 1, 3], "uint64"),
            "flag": [True, False, True],
            "text": ["1", "", "None"],
            "when": DAYS,
        },
        index=index,
    )
    pd.testing.assert_frame_equal(
        decode(json.loads(json.dumps(encode(table), allow_nan=False))), table, check_freq=False
    )


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(DataError, match=r"Decimal\('1'\).*cannot be saved, Decimal.*astype\(str\)"):
        encode(decimal.Decimal(1))


def test_a_loaded_fit_predicts(tmp_path):
    rng = np.random.default_rng(1)
    g, k = np.repeat(np.arange(12), 10), np.arange(120) % 3
    y = rng.normal(size=12)[g] + k + rng.normal(size=120)
    data = pd.DataFrame({"y": y, "g": g, "k": pd.cut(k, [-1, 0, 1, 2])})
    data["t"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(g, unit="D")
    data = data.set_index(["g", "t"], drop=False)
    fit = jaxreml.fit("y ~ k + (1 | t)", data)
    fit.save(tmp_path / "fit.json")
    loaded = jaxreml.LMMResults.load(tmp_path / "fit.json")
    pd.testing.assert_series_equal(loaded.predict(data), fit.predict(data))
    pd.testing.assert_frame_equal(loaded.random_effects["t"], fit.random_effects["t"])
    pd.testing.assert_frame_equal(loaded.table, fit.table)
    pd.testing.assert_series_equal(loaded.resid, fit.resid)


# Without rows


@pytest.fixture(scope="module")
def sleep() -> pd.DataFrame:
    frame = jaxreml.datasets.load("sleepstudy")
    random = np.random.default_rng(0)
    frame["f"], frame["k"] = np.tile(list("abc"), 60), np.tile([1, 2, 5], 60)
    frame["c"] = pd.Categorical(np.tile(list("yx"), 90), categories=["y", "x"])
    frame["item"], frame["z"] = np.tile(np.arange(12), 15), random.normal(size=180)
    frame["a b"], frame["w"] = random.uniform(1, 3, size=(2, 180))
    return frame


@pytest.mark.parametrize(
    ("formula", "options", "given"),
    [
        ("Reaction ~ Days + (Days | Subject)", {}, {}),
        ("Reaction ~ poly(Days, 2) * C(k) + scale(z):f + bs(z, df=4) + (Days || Subject)", {}, {}),
        (
            "Reaction ~ log(`a b`) + k + I(2 * k) + offset(z) + (1 | Subject:c) + (1 | item)",
            {"weights": "w", "offset": "w"},
            {"offset": "w"},
        ),
    ],
)
def test_a_fit_without_its_rows_predicts(sleep, tmp_path, formula, options, given):
    fit = jaxreml.fit(formula, sleep, **options)
    fit.save(tmp_path / "slim.json", data=False)
    slim = jaxreml.load(tmp_path / "slim.json")
    new = sleep.sample(20, random_state=1).drop(columns="Reaction")
    for re_form in (None, "~0"):
        expected = fit.predict(new, re_form=re_form, **given)
        pd.testing.assert_series_equal(slim.predict(new, re_form=re_form, **given), expected)
    with pytest.raises(DataError, match="nobody"):
        slim.predict(new.assign(Subject="nobody"), **given)
    assert (slim.nobs, slim.aic, slim.message) == (fit.nobs, fit.aic, fit.message)
    pd.testing.assert_frame_equal(slim.coefficients(), fit.coefficients())
    assert "Scaled residuals" not in slim.summary()
    for needs_rows in (
        lambda: slim.resid,
        lambda: slim.predict(),
        lambda: slim.predict(new, interval="confidence", **given),
        lambda: slim.save(tmp_path / "other.json"),
        lambda: slim.anova(),
        lambda: slim.coefficients("kenward-roger"),
    ):
        with pytest.raises(DataError, match=r"saved without its rows \(data=False\), which this"):
            needs_rows()
    slim.save(tmp_path / "again.json", data=False)
    again = jaxreml.load(tmp_path / "again.json").predict(new, **given)
    pd.testing.assert_series_equal(again, slim.predict(new, **given))


def test_no_row_is_left_in_a_file_without_rows(sleep, tmp_path):
    fit = jaxreml.fit("Reaction ~ Days + z + (1 | Subject)", sleep)
    fit.save(tmp_path / "slim.json", data=False)
    kept = jaxreml.load(tmp_path / "slim.json").prototype.table
    assert set(kept) == {"Days", "z", "Subject"}
    together = kept.merge(sleep[["Days", "z", "Subject"]])
    assert len(together) <= 2  # by chance


def test_what_cannot_be_made_again_without_rows(sleep, tmp_path):
    fit = jaxreml.fit("Reaction ~ half(Days) + (1 | Subject)", sleep, context={"half": np.sqrt})
    with pytest.raises(DataError, match=r"cannot be saved without its rows.*half\(Days\)"):
        fit.save(tmp_path / "slim.json", data=False)
