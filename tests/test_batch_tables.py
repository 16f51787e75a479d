"""Frames, xarray and parquet of many fits: every number where its label says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import BatchResults, DataError, Status

FORMULA = "~ Days + (Days | Subject)"
NAMES = ["plain", "weird name, with [brackets]", "gap", "flat", "singular"]


@pytest.fixture(scope="module")
def data():
    return jaxreml.datasets.load("sleepstudy")


@pytest.fixture(scope="module")
def responses(data):
    rng = np.random.default_rng(4)
    values = data["Reaction"].to_numpy()[:, None] + rng.normal(scale=10, size=(180, 5))
    values[7, 2] = np.nan
    values[:, 3] = 2.5
    values[:, 4] = rng.normal(size=180)  # nothing varies between subjects
    return pd.DataFrame(values, columns=NAMES)


@pytest.fixture(scope="module")
def results(data, responses):
    results = jaxreml.fit_many(FORMULA, data, responses, modes=True)
    assert list(results.is_singular) == [False, False, False, False, True]
    assert list(results.status) == [0, 0, 0, Status.CONSTANT, 0]
    return results


@pytest.fixture(scope="module")
def singles(results):
    return {i: results.estimate(i) for i in (0, 2, 4)}


def test_tidy_is_that_of_single_fits(results, singles):
    together = results.tidy(conf_int=True)
    assert together["response"].drop_duplicates().tolist() == NAMES
    assert len(together) == 5 * (2 + 4)  # two coefficients, two SDs, a correlation, the residual
    for i, fit in singles.items():
        own = together[together["response"] == NAMES[i]].reset_index(drop=True)
        single = fit.tidy(("fixed", "ran_pars"), conf_int=True).reset_index(drop=True)
        assert own["term"].tolist() == single["term"].tolist()
        assert own["group"].fillna("").tolist() == single["group"].fillna("").tolist()
        for name in single.columns.drop(["effect", "group", "term"]):
            np.testing.assert_allclose(
                own[name].to_numpy(float), single[name].to_numpy(float), rtol=1e-6, atol=1e-9
            )
    failed = together[together["response"] == "flat"]
    assert failed["estimate"].isna().all() and failed["std_error"].isna().all()
    fixed = together[together["effect"] == "fixed"]
    assert results.tidy("fixed")["estimate"].equals(fixed["estimate"].reset_index(drop=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"effects": "ran_vals"}, "not 'ran_vals'"), ({"conf_level": 1.0}, "between 0 and 1")],
)
def test_tidy_refuses(results, options, message):
    with pytest.raises(ValueError, match=message):
        results.tidy(**options)


def test_glance_is_that_of_single_fits(results, singles):
    glance = results.glance()
    assert glance["response"].tolist() == NAMES
    for i, fit in singles.items():
        single = fit.glance().iloc[0]
        for name in ("nobs", "sigma", "log_lik", "aic", "bic", "reml_crit", "df_residual"):
            assert glance[name][i] == pytest.approx(single[name], rel=1e-9)
        assert glance["n_dropped"][i] == single["n_dropped"]
    assert glance["n_missing"].tolist() == [0, 0, 1, 0, 0]
    assert glance["message"][3] == Status.CONSTANT.sentence
    assert np.isnan(glance["log_lik"][3])


def test_frame_and_xarray_hold_every_number_by_name(results, singles):
    frame, cube = results.to_frame(), results.to_xarray()
    assert list(cube["response"].values) == NAMES
    for i, fit in singles.items():
        for term in ("(Intercept)", "Days"):
            expected = fit.params[term], fit.bse[term], fit.pvalues[term]
            wide = [frame[f"{name}[{term}]"][i] for name in ("beta", "se", "p")]
            long = [float(cube[name].sel(term=term)[i]) for name in ("beta", "se", "p")]
            np.testing.assert_allclose(wide, expected, rtol=1e-6)
            np.testing.assert_array_equal(long, wide)
        variances = fit.variance_components["variance"].to_numpy()
        labels = ["Subject, (Intercept)", "Subject, Days", "Residual"]
        wide = [frame[f"variance[{label}]"][i] for label in labels]
        np.testing.assert_allclose(wide, variances, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(cube["variance"].sel(component=labels)[i], wide)
        theta = [frame[name][i] for name in frame.columns if name.startswith("theta[")]
        np.testing.assert_allclose(theta, fit.theta, rtol=1e-5, atol=1e-7)
        modes = cube["modes_Subject"][i].to_pandas()
        expected = fit.random_effects["Subject"]
        np.testing.assert_allclose(modes, expected, atol=1e-6 * np.abs(expected).to_numpy().max())
        assert list(modes.index) == list(expected.index)
    assert cube["modes_Subject"].dims == ("response", "level_Subject", "effect_Subject")
    assert cube.attrs["method"] == "REML"


def test_parquet_gives_back_the_same(results, tmp_path):
    path = tmp_path / "fits.parquet"
    results.to_parquet(path)
    again = BatchResults.read_parquet(path)
    pd.testing.assert_frame_equal(again.to_frame(), results.to_frame())
    pd.testing.assert_frame_equal(again.tidy(), results.tidy())
    np.testing.assert_array_equal(again.fits.modes[0], results.fits.modes[0])
    assert pd.read_parquet(path)["beta[Days]"].tolist()[:3] == list(results.params["Days"][:3])
    with pytest.raises(DataError, match="exists"):
        results.to_parquet(path)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with pytest.raises(DataError, match="does not hold results of fit_many"):
        BatchResults.read_parquet(other)
