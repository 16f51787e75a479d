"""Fitted values of many responses, against single fits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError, Status

FORMULA = "~ x + f + offset(o) + (x | g)"


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    n = 120
    table = pd.DataFrame(
        {
            "x": rng.normal(size=n),
            "f": rng.choice(["a", "b", "c"], n),
            "o": rng.normal(size=n),
            "g": rng.integers(0, 15, n).astype(str),
            "w": rng.uniform(0.5, 2, n),
        },
        [f"row {k}" for k in range(n)],
    )
    table.loc["row 7", "x"] = np.nan
    return table


@pytest.fixture(scope="module")
def responses(data):
    rng = np.random.default_rng(4)
    codes = data["g"].astype(int)
    values = rng.normal(size=(len(data), 6)) + rng.normal(size=(15, 6))[codes]
    values += (rng.normal(size=(15, 6))[codes]) * data[["x"]].fillna(0).to_numpy()
    table = pd.DataFrame(values, data.index, list("pqrstu"))
    table.loc[data["g"] == "3", "q"] = np.nan  # a level is missing
    table.loc[data["f"] == "c", "r"] = np.nan  # a coefficient is not estimable
    table["u"] = 1.0
    return table


@pytest.fixture(scope="module")
def results(data, responses):
    return jaxreml.fit_many(FORMULA, data, responses, weights="w", modes=True)


def single(data, responses, name):
    return jaxreml.fit(f"y {FORMULA}", data.assign(y=responses[name]), weights="w")


def test_they_are_those_of_single_fits(data, responses, results):
    fitted = results.fitted_values()
    assert fitted.index.equals(data.index.drop("row 7"))
    assert list(fitted.columns) == list("pqrstu")
    for name in "pqrst":
        alone = single(data, responses, name).fittedvalues
        np.testing.assert_allclose(fitted.loc[alone.index, name], alone, rtol=1e-5, atol=1e-6)


def test_rows_where_the_response_is_missing(data, responses, results):
    fitted = results.fitted_values()
    third = data.index[(data["g"] == "3")]
    fixed = results.fitted_values("q", random=False)["q"]
    np.testing.assert_allclose(fitted.loc[third, "q"], fixed[third])  # nothing is known of it
    third = fitted.index[data.loc[fitted.index, "f"] == "c"]
    assert fitted.loc[third, "r"].isna().all() and fitted["r"].drop(third).notna().all()
    assert results.status["u"] != Status.CONVERGED and fitted["u"].isna().all()


def test_without_random_effects(data, responses, results):
    alone = single(data, responses, "p")
    fixed = results.fitted_values(random=False)
    np.testing.assert_allclose(fixed["p"], alone.fixed_fitted, rtol=1e-6, atol=1e-7)
    plain = jaxreml.fit_many(FORMULA, data, responses, weights="w")
    pd.testing.assert_frame_equal(plain.fitted_values(random=False), fixed)


def test_some_responses(results):
    whole = results.fitted_values()
    for which, names in (("q", "q"), (2, "r"), (["t", "p"], "tp"), (slice(1, 4), "qrs")):
        pd.testing.assert_frame_equal(results.fitted_values(which), whole[list(names)])
    blocks = list(results.fitted_blocks(4))
    assert [list(names) for names, _ in blocks] == [list("pqrs"), list("tu")]
    np.testing.assert_array_equal(np.concatenate([v for _, v in blocks], axis=1), whole)
    assert len(list(results.fitted_blocks())) == 1


def test_what_is_not_at_hand(data, responses, results, tmp_path):
    with pytest.raises(DataError, match="0 responses have the name 'z'"):
        results.fitted_values(["z"])
    plain = jaxreml.fit_many(FORMULA, data, responses, weights="w")
    with pytest.raises(DataError, match=r"call fit_many.*modes=True"):
        plain.fitted_values()
    results.to_parquet(tmp_path / "fits.parquet")
    read = jaxreml.BatchResults.read_parquet(tmp_path / "fits.parquet")
    with pytest.raises(DataError, match="rows of the model are not at hand"):
        read.fitted_values()


def test_residuals_are_those_of_single_fits(results):
    names, residuals = zip(*results.residual_blocks(size=3), strict=True)
    assert [len(own) for own in names] == [3] * (len(results) // 3) + [len(results) % 3] * (
        len(results) % 3 > 0
    )
    residuals = np.concatenate(residuals, axis=1)
    for k in np.flatnonzero(results.converged & (results.n_missing == 0))[:3]:
        single = results.estimate(int(k))
        np.testing.assert_allclose(residuals[:, k], single.y - single.fitted, atol=1e-7)


def test_simulated_responses_have_the_model_and_the_null():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(30), 6)
    data = pd.DataFrame({"g": codes, "x": rng.normal(size=180), "w": rng.uniform(0.5, 2, 180)})
    effects = rng.normal(size=(2, 30))
    y = 5 + 2 * data["x"] + effects[0, codes] + effects[1, codes] * data["x"]
    y = (y + rng.normal(size=180) / np.sqrt(data["w"])).to_numpy()
    formula = "~ x + (x | g)"
    results = jaxreml.fit_many(formula, data, np.repeat(y[:, None], 300, axis=1), weights="w")
    drawn = np.concatenate([block for _, block in results.simulated_blocks(null="x", size=128)], 1)
    again = jaxreml.fit_many(formula, data, drawn, weights="w")
    assert abs(again.params["x"].mean()) < 4 * again.params["x"].std() / np.sqrt(300)
    assert abs(again.params["(Intercept)"].mean() - results.params["(Intercept)"].iloc[0]) < 0.1
    expected = results.variances.iloc[0]
    spread = again.variances.std() / np.sqrt(300)
    assert (np.abs(again.variances.mean() - expected) < 5 * spread).all()
    assert np.mean(again.pvalues["x"] < 0.05) < 0.09
    with pytest.raises(DataError, match="'z' is no fixed effect"):
        next(results.simulated_blocks(null="z"))
    whole = np.concatenate([block for _, block in results.simulated_blocks(seed=1)], axis=1)
    assert abs((whole.mean(axis=1) - y)[data["x"] > 1].mean()) < 1.5
