"""Top tables, q-values, summaries and text files of a batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import references

import jaxreml
from jaxreml import BatchResults, DataError, Status
from jaxreml.inference.batches import discoveries
from jaxreml.many.fitted import BatchModel
from jaxreml.results import batch_summaries

R = references.reference("batches/moderation")["q_values"]


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(8)
    data = pd.DataFrame({"g": np.arange(80) % 10, "x": rng.normal(size=80)})
    effects = np.where(np.arange(200) < 40, 1.0, 0.0) * np.where(np.arange(200) % 4, 1.0, -1.0)
    values = rng.normal(size=(80, 200)) + 0.5 * rng.normal(size=(10, 200))[data["g"]]
    values += data["x"].to_numpy()[:, None] * effects
    values[:, 50] = 3.0
    values[:5, 51] = np.nan
    names = [f"gene{k}" for k in range(200)]
    return jaxreml.fit_many(
        "~ x + (1 | g)", data, pd.DataFrame(values, columns=names), contrasts={"twice": {"x": 2}}
    )


def test_top_table_is_sorted_and_adjusted_over_all(results):
    table = results.top_table("x", 7)
    assert len(table) == 7 and table["p_value"].is_monotonic_increasing
    p = results.pvalues["x"]
    assert list(table.index) == list(p.sort_values().index[:7])
    for column, frame in (
        ("estimate", results.params), ("std_error", results.bse), ("df", results.df),
        ("statistic", results.tvalues), ("p_value", results.pvalues),
        ("p_adjusted", results.pvalues_adjusted),
    ):  # fmt: skip
        np.testing.assert_array_equal(table[column], frame.loc[table.index, "x"], err_msg=column)
    np.testing.assert_array_equal(table["mean"], results.mean[table.index])
    contrast = results.top_table("twice", 7)
    np.testing.assert_allclose(contrast["estimate"], 2 * table["estimate"])
    np.testing.assert_allclose(contrast["p_adjusted"], table["p_adjusted"], rtol=1e-9)


def test_orders_and_lengths(results):
    everything = results.top_table("x", None, "none")
    assert list(everything.index) == [name for name in results.responses if name != "gene50"]
    by_size = results.top_table("x", None, "estimate")["estimate"].abs()
    assert by_size.is_monotonic_decreasing and len(by_size) == 199
    by_t = results.top_table("x", 3, "statistic")["statistic"].abs()
    assert by_t.iloc[0] == results.tvalues["x"].abs().max()


def test_adjustments(results):
    p = results.pvalues["x"].dropna().sort_values()
    table = results.top_table("x", None, adjust="bonferroni")
    np.testing.assert_allclose(table["p_adjusted"], np.minimum(1, 199 * p))
    holm = np.minimum(1, np.maximum.accumulate(p.to_numpy() * np.arange(199, 0, -1)))
    np.testing.assert_allclose(results.top_table("x", None, adjust="holm")["p_adjusted"], holm)
    by = results.top_table("x", None, adjust="by")["p_adjusted"]
    bh = results.top_table("x", None)["p_adjusted"]
    np.testing.assert_allclose(by, np.minimum(1, bh * np.sum(1 / np.arange(1, 200))))
    assert results.top_table("x", adjust="none")["p_adjusted"].equals(
        results.top_table("x")["p_value"].rename("p_adjusted")
    )


def test_q_values_are_those_of_the_qvalue_package(results):
    p = np.array([np.nan if value in ("NA", None) else value for value in R["p"]], float)
    assert np.isnan(p[-1]) and np.isnan(discoveries.q_values(p)[-1])
    expected = R["bootstrap"]
    assert discoveries.null_share(p) == pytest.approx(expected["pi0"], rel=1e-12)
    np.testing.assert_allclose(discoveries.q_values(p)[:-1], expected["q"][:-1], rtol=1e-12)
    np.testing.assert_allclose(discoveries.adjusted(p, "bh")[:-1], R["adjusted"][:-1], rtol=1e-12)
    table = results.top_table("x", q_value=True)
    share = discoveries.null_share(results.pvalues["x"].to_numpy())
    assert 0.4 < share <= 1
    np.testing.assert_allclose(table["q_value"], share * table["p_adjusted"])


def test_inflation_of_null_and_of_doubled_statistics():
    p = (np.arange(999) + 0.5) / 999
    assert discoveries.inflation(p) == pytest.approx(1)
    from scipy.stats import chi2

    assert discoveries.inflation(chi2.sf(1.3 * chi2.isf(p, 1), 1)) == pytest.approx(1.3)
    assert np.isnan(discoveries.inflation(np.full(3, np.nan)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"coef": "y"},
            DataError,
            r"no coefficient or contrast 'y': '\(Intercept\)', 'x', 'twice'",
        ),
        ({"coef": "x", "n": 0}, ValueError, "at least 1, or None"),
        ({"coef": "x", "sort_by": "size"}, ValueError, "not 'size'"),
        ({"coef": "x", "adjust": "fdr"}, ValueError, '"bh", "by".* not \'fdr\''),
    ],
)
def test_what_top_table_refuses(results, options, error, message):
    with pytest.raises(error, match=message):
        results.top_table(**options)


def test_names_of_both_kinds_are_refused(results):
    model = BatchModel(**(vars(results.model) | {"contrasts": ("x",)}))
    both = BatchResults(model, results.responses, results.fits)
    with pytest.raises(DataError, match="give the contrast another name"):
        batch_summaries.tests_of(both, "x")


def test_q_values_that_there_are_none_of():
    with pytest.raises(DataError, match="no p-values"):
        discoveries.q_values(np.full(3, np.nan))
    with pytest.raises(DataError, match="no p-value is large"):
        discoveries.q_values(np.full(30, 1e-9))


def test_summary_says_what_was_fitted_and_found(results):
    text = results.summary()
    assert "~ x + (1 | g), REML, structure 'grouped', engine 'numpy'" in text
    singular = int(results.is_singular.sum())
    assert f"200 responses, 199 with an optimum, {singular} of them singular" in text
    assert f"  1 without: {Status.CONSTANT.sentence}" in text
    assert "75 to 80 rows; 1 responses have missing values" in text
    found = results.pvalues_adjusted["x"] <= 0.05
    up = int((found & (results.params["x"] > 0)).sum())
    row = next(line.split() for line in text.splitlines() if line.startswith("x "))
    assert row == ["x", str(up), str(int(found.sum()) - up), "199"]
    moderated = results.moderated()
    assert f"prior df {moderated.prior_df['gene0']:.4g}, prior variance" in moderated.summary()
    parts = {name: part[:0] for name, part in results.fits._asdict().items() if name != "modes"}
    few = BatchResults(results.model, results.responses[:0], results.fits._replace(**parts))
    assert "0 responses" in few.summary()


@pytest.mark.parametrize("name", ["fits.csv", "fits.csv.gz"])
def test_csv_holds_the_frame(results, tmp_path, name):
    path = tmp_path / name
    results.to_csv(path)
    found = pd.read_csv(path)
    frame = results.to_frame()
    assert list(found) == list(frame)
    np.testing.assert_array_equal(found["beta[x]"], frame["beta[x]"])
    assert found["message"].tolist() == frame["message"].tolist()
    with pytest.raises(DataError, match="exists; pass overwrite=True"):
        results.to_csv(path)
    results.moderated().to_csv(path, overwrite=True)
    assert "prior_df" in pd.read_csv(path) and list(tmp_path.iterdir()) == [path]
