"""Draws of a bootstrap, and batches, in xarray and ArviZ."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray

import jaxreml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

SLEEP = jaxreml.datasets.load("sleepstudy")


@pytest.fixture(scope="module")
def drawn():
    return jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP).bootstrap(nsim=200, seed=3)


def test_draws_are_variables(drawn):
    found = drawn.to_xarray()
    assert isinstance(found, xarray.Dataset)
    assert list(found.data_vars) == list(drawn.draws.columns)
    assert dict(found.sizes) == {"chain": 1, "draw": len(drawn.draws)}
    for name in drawn.draws:
        np.testing.assert_array_equal(found[name].values[0], drawn.draws[name])
        assert found[name].attrs["estimate"] == drawn.estimate[name]
    assert found.attrs["nsim"] == 200 and found.attrs["formula"] == drawn.fit.formula


def test_arviz_summarises_them(drawn):
    data = drawn.to_inference_data()
    summary = arviz.summary(data, var_names=["beta[Days]", "sigma"], kind="stats", hdi_prob=0.9)
    np.testing.assert_allclose(
        summary["mean"], drawn.draws[["beta[Days]", "sigma"]].mean(), rtol=1e-3
    )
    np.testing.assert_allclose(summary["sd"], drawn.draws[["beta[Days]", "sigma"]].std(), rtol=2e-2)
    interval = arviz.hdi(data, var_names=["beta[Days]"], hdi_prob=0.9)["beta[Days]"].values
    ordered = np.sort(drawn.draws["beta[Days]"])
    k = int(np.floor(0.9 * len(ordered)))
    widths = ordered[k:] - ordered[: len(ordered) - k]
    assert interval[1] - interval[0] == pytest.approx(widths.min(), rel=1e-6)


def test_a_users_statistic(drawn):
    of_user = drawn.fit.bootstrap(60, lambda beta, parts: {"ratio": beta[1] / beta[0]}, seed=3)
    assert list(of_user.to_xarray().data_vars) == ["ratio"]


def test_batches():
    values = SLEEP[["Reaction"]].to_numpy() + np.random.default_rng(0).normal(0, 30, (180, 5))
    batch = jaxreml.fit_many("~ Days + (1 | Subject)", SLEEP, values)
    found = batch.to_xarray()
    np.testing.assert_array_equal(found["beta"].sel(term="Days"), batch.params["Days"])
