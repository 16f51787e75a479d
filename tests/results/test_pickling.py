"""Results are pickled, copied and sent between processes."""

from __future__ import annotations

import copy
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest

import jaxreml

SLEEP = jaxreml.datasets.load("sleepstudy")
FORMULA = "Reaction ~ Days + (Days | Subject)"
RESPONSES = SLEEP[["Reaction"]].to_numpy() + np.random.default_rng(0).normal(0, 30, (180, 6))


@pytest.fixture(scope="module")
def fit():
    return jaxreml.fit(FORMULA, SLEEP)


@pytest.fixture(scope="module")
def batch():
    return jaxreml.fit_many("~ Days + (1 | Subject)", SLEEP, RESPONSES, modes=True)


WAYS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(params=WAYS)
def again(request):
    return WAYS[request.param]


def test_fits(fit, again):
    assert fit.anova() is not None  # what the fit keeps for later goes with it
    other = again(fit)
    assert other is not fit and type(other) is jaxreml.LMMResults
    assert other.summary("kenward-roger") == fit.summary("kenward-roger")
    new = {"Days": [3], "Subject": ["308"]}
    pd.testing.assert_frame_equal(
        other.predict(new, interval="prediction"), fit.predict(new, interval="prediction")
    )


def test_fits_with_functions_and_splines(again):
    fit = jaxreml.fit("Reaction ~ exp10(Days / 9) + ns(Days, 3) + (1 | Subject)", SLEEP)
    np.testing.assert_array_equal(again(fit).predict(SLEEP), fit.predict(SLEEP))


def test_fits_by_jax_and_without_rows(fit, again, tmp_path):
    of_jax = jaxreml.fit(FORMULA, SLEEP, engine="jax")
    assert again(of_jax).summary() == of_jax.summary()
    fit.save(tmp_path / "fit.json", data=False)
    slim = jaxreml.load(tmp_path / "fit.json")
    new = {"Days": [3], "Subject": ["308"]}
    np.testing.assert_array_equal(again(slim).predict(new), slim.predict(new))
    with pytest.raises(jaxreml.DataError, match="without its rows"):
        _ = again(slim).y


def test_what_follows_from_a_fit(fit, again):
    drawn = fit.bootstrap(60, seed=1)
    pd.testing.assert_frame_equal(again(drawn).conf_int(), drawn.conf_int())
    profile = fit.profile()
    pd.testing.assert_frame_equal(again(profile).conf_int(), profile.conf_int())
    means = fit.emmeans("Days", at={"Days": [0, 5, 9]})
    pd.testing.assert_frame_equal(again(means).contrast(), means.contrast())
    influence = fit.influence(by="Subject", method="first-order")
    pd.testing.assert_frame_equal(again(influence).params, influence.params)
    assert again(fit.step()).fit.formula == fit.step().fit.formula


def test_batches_leave_the_responses_behind_in_a_pickle(batch):
    other = pickle.loads(pickle.dumps(batch))
    pd.testing.assert_frame_equal(other.to_frame(), batch.to_frame())
    pd.testing.assert_frame_equal(
        other.moderated().top_table("Days"), batch.moderated().top_table("Days")
    )
    pd.testing.assert_frame_equal(other.random_effects["Subject"], batch.random_effects["Subject"])
    with pytest.raises(jaxreml.DataError, match="pickle"):
        other.estimate(0)
    for way in (copy.copy, copy.deepcopy):
        assert way(batch).estimate(0).formula == batch.estimate(0).formula


def test_moderated_streamed_and_voom(batch, again, tmp_path):
    moderated = batch.moderated()
    pd.testing.assert_frame_equal(again(moderated).to_frame(), moderated.to_frame())
    streamed = jaxreml.fit_many(
        "~ Days + (1 | Subject)", SLEEP, RESPONSES, output=tmp_path / "fits.parquet"
    )
    pd.testing.assert_frame_equal(again(streamed).read().to_frame(), streamed.read().to_frame())
    counts = np.random.default_rng(0).poisson(50, (len(SLEEP), 30))
    voom = jaxreml.voom(counts, "~ Days + (1 | Subject)", SLEEP)
    np.testing.assert_array_equal(again(voom).weights, voom.weights)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_fits_in_parallel(fit, backend):
    responses = [SLEEP["Reaction"] * k for k in (1.0, 2.0, 3.0)]
    jobs = [joblib.delayed(jaxreml.fit)(FORMULA, SLEEP.assign(Reaction=y)) for y in responses]
    fits = joblib.Parallel(n_jobs=2, backend=backend)(jobs)
    for k, found in zip((1.0, 2.0, 3.0), fits, strict=True):
        np.testing.assert_allclose(found.beta, k * fit.beta, rtol=1e-7)
        np.testing.assert_allclose(found.df_satterthwaite, fit.df_satterthwaite, rtol=1e-5)
