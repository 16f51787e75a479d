"""`fit` and its results, as a user without float64 sees them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import ConvergenceWarning, DataError, LMMResults, estimate
from jaxreml.backend import compilation
from jaxreml.fitting import engines

SLEEP = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="module")
def fit() -> LMMResults:
    with jax.enable_x64(False):
        result = jaxreml.fit(SLEEP, jaxreml.datasets.load("sleepstudy"))
        assert not jax.config.jax_enable_x64
    return result


def test_labels(fit):
    assert list(fit.params.index) == ["(Intercept)", "Days"]
    assert fit.vcov.loc["Days", "Days"] == pytest.approx(fit.bse["Days"] ** 2)

    assert fit.tvalues["Days"] == pytest.approx(6.771485, abs=1e-5)
    components = fit.variance_components
    assert list(components.columns) == [
        "group", "term", "variance", "sd", "log_variance", "log_variance_se",
    ]  # fmt: skip
    assert list(components["group"]) == ["Subject", "Subject", "Residual"]
    assert fit.log_variances["Subject", "Days"] == pytest.approx(np.log(35.071662), abs=1e-6)
    assert fit.log_variance_se["Residual", "Residual"] == pytest.approx(0.117851, abs=1e-6)
    assert fit.cov_re.loc[("Subject", "(Intercept)"), ("Subject", "Days")] == pytest.approx(
        9.604335, abs=1e-4
    )
    assert fit.ngroups == {"Subject": 18}
    assert fit.nobs == 180
    assert fit.params.to_numpy().dtype == np.float64
    np.testing.assert_allclose(fit.fittedvalues + fit.resid, fit.y)


def test_confidence_intervals(fit):
    normal = fit.conf_int(df="inf")
    assert normal.loc["Days", "lower"] == pytest.approx(10.467286 - 1.959964 * 1.545789, abs=1e-5)
    t = fit.conf_int()
    assert t.loc["Days", "upper"] == pytest.approx(10.467286 + 2.109816 * 1.545789, abs=1e-5)
    with pytest.raises(ValueError, match="conf_level"):
        fit.conf_int(2)
    with pytest.raises(ValueError, match="satterthwaite"):
        fit.conf_int(df="kr")


def test_summary_has_lmertests_layout(fit):
    text = fit.summary()
    assert text == str(fit)
    for line in (
        "Linear mixed model fit by REML. t-tests use Satterthwaite's method",
        "Formula: Reaction ~ Days + (Days | Subject)",
        "Structure: grouped",
        "REML criterion at convergence: 1743.6",
        "Number of obs: 180, groups:  Subject, 18",
        "Days -0.138",
    ):
        assert line in text
    assert "6.771 3.26e-06 ***" in text


def test_tidy(fit):
    both = fit.tidy()
    assert list(both["effect"]) == ["fixed"] * 2 + ["ran_pars"] * 4
    assert list(both["term"])[2:] == [
        "sd__(Intercept)", "sd__Days", "cor__(Intercept).Days", "sd__Observation",
    ]  # fmt: skip
    fixed = fit.tidy("fixed", conf_int=True)
    assert list(fixed.columns) == [
        "effect", "group", "term", "estimate", "std_error", "statistic", "df", "p_value",
        "conf_low", "conf_high",
    ]  # fmt: skip
    values = fit.tidy("ran_vals")
    assert list(values.columns) == ["effect", "group", "level", "term", "estimate", "std_error"]
    assert len(values) == 36 and len(fit.tidy("ran_coefs")) == 36
    np.testing.assert_allclose(values["std_error"], fit.random_effects_se["Subject"].stack())
    interval = fit.tidy("ran_vals", conf_int=True, conf_level=0.9).iloc[0]
    half = 1.6448536 * interval["std_error"]
    assert interval["conf_high"] - interval["estimate"] == pytest.approx(half)
    modes, coefficients = values["estimate"], fit.tidy("ran_coefs")["estimate"]
    np.testing.assert_allclose(coefficients - modes, np.tile(fit.params, 18))
    with pytest.raises(ValueError, match="ran_pars"):
        fit.tidy("random")


def test_glance_and_augment(fit):
    row = fit.glance().iloc[0]
    assert (row["nobs"], row["aic"]) == (180, fit.aic)
    assert row["reml_crit"] == fit.criterion
    table = fit.augment()
    assert list(table.columns) == ["Reaction", "Days", "Subject", "fitted", "resid", "fixed"]
    np.testing.assert_allclose(table["Reaction"], table["fitted"] + table["resid"])


@pytest.mark.parametrize("kind", ["plain", "singular", "weights"])
def test_save_and_load_round_trip(fit, kind, tmp_path):
    if kind == "singular":
        fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", jaxreml.datasets.load("dyestuff2"))
    if kind == "weights":
        data = jaxreml.datasets.load("sleepstudy").set_index(pd.RangeIndex(5, 185))
        fit = jaxreml.fit(SLEEP, data, "ML", weights=np.linspace(1, 2, 180), offset="Days")
    path = tmp_path / "fit.json"
    fit.save(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = LMMResults.load(path)
    assert again.summary() == fit.summary()
    pd.testing.assert_frame_equal(again.augment(), fit.augment(), check_index_type=False)
    pd.testing.assert_frame_equal(again.variance_components, fit.variance_components, rtol=0)
    pd.testing.assert_frame_equal(again.tidy("ran_vals"), fit.tidy("ran_vals"), rtol=0)
    np.testing.assert_array_equal(again.hessian, fit.hessian)
    assert again.message == fit.message


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "other.json"
    for text, message in (
        ("{", "not a saved fit"),
        ("[1]", "not a saved fit of jaxreml"),
        ('{"format": "jaxreml.LMMResults"}', "incomplete: it does not say of which version"),
        ('{"format": "jaxreml.LMMResults", "version": 99}', "by a later version of jaxreml"),
        ('{"format": "jaxreml.LMMResults", "version": 1}', "incomplete: formula, method, struct"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            LMMResults.load(path)


def test_singular_fit_says_what_is_singular():
    fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", jaxreml.datasets.load("dyestuff2"))
    assert fit.converged
    assert fit.is_singular
    assert "the variance of (Intercept) of Batch is zero" in fit.message
    row = fit.variance_components.iloc[0]
    assert (row["variance"], row["log_variance"]) == (0, -np.inf)
    assert np.isnan(row["log_variance_se"])
    assert np.isfinite(fit.df_satterthwaite).all()


def test_no_optimum_warns_and_gives_no_standard_errors():
    data = jaxreml.datasets.load("sleepstudy")
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        fit = jaxreml.fit(SLEEP, data, max_iterations=1)
    assert not fit.converged
    assert fit.log_variance_se.isna().all()
    assert "NOT CONVERGED" in fit.summary()


def test_perfect_fit_is_an_error():
    data = jaxreml.datasets.load("sleepstudy")
    data["exact"] = 2 * data["Days"] + 1
    with pytest.raises(DataError, match="perfectly"):
        jaxreml.fit("exact ~ Days + (1 | Subject)", data)


@pytest.mark.parametrize("engine", ["numpy", "jax"])
def test_a_wrong_optimum_is_not_certified(monkeypatch, engine):
    function = {"numpy": "estimate_on_host", "jax": "estimate"}[engine]
    right = getattr(engines, function)

    def off(design, method, **options):
        found = right(design, method, **options)
        estimated, *proved = found if engine == "numpy" else [found]
        moved = dataclasses.replace(estimated, theta=estimated.theta * 1.01)
        return (moved, *proved) if proved else moved

    monkeypatch.setattr(engines, function, off)
    with pytest.warns(ConvergenceWarning, match="not zero"):
        fit = jaxreml.fit(SLEEP, jaxreml.datasets.load("sleepstudy"), engine=engine)
    assert not fit.converged


def test_fits_of_one_shape_share_a_compilation():
    """Numbers of rows and names do not matter, nor does a number of levels that is nearly equal."""
    data = jaxreml.datasets.load("sleepstudy")
    jaxreml.fit(SLEEP, data, engine="jax")
    programs = engines._compiled(estimate, "REML", max_iterations=100)
    before = programs._cache_size()
    assert before
    other = data.rename(columns={"Reaction": "y", "Days": "t", "Subject": "g"})
    jaxreml.fit("y ~ t + (t | g)", other.assign(y=other["y"][::-1].to_numpy()), engine="jax")
    fewer = jaxreml.fit(SLEEP, data[data["Subject"] != "308"], engine="jax")
    assert programs._cache_size() == before
    assert fewer.random_effects["Subject"].shape == (17, 2)
    jaxreml.fit(SLEEP, data[~data["Subject"].isin(["308", "309"])], engine="jax")
    assert programs._cache_size() == before + 1


def test_programs_are_forgotten_before_memory_maps_run_out(monkeypatch, tmp_path):
    data = jaxreml.datasets.load("sleepstudy")
    found = jaxreml.fit(SLEEP, data, engine="jax")
    assert engines._compiled.cache_info().currsize
    limit = tmp_path / "max_map_count"
    limit.write_text("10")
    monkeypatch.setattr(compilation, "MOST_MAPS", limit)
    monkeypatch.setattr(compilation, "CALLS", 1)
    compilation.spare_memory_maps()
    assert engines._compiled.cache_info().currsize == (0 if compilation.MAPS.exists() else 1)
    assert jaxreml.fit(SLEEP, data, engine="jax").criterion == found.criterion


def test_levels_without_rows_change_nothing():
    data = jaxreml.datasets.load("sleepstudy")
    exact, fit = jaxreml.design(SLEEP, data), jaxreml.fit(SLEEP, data)
    assert exact.structure.factors.shape[-1] == 18
    assert fit.design.structure.factors.shape[-1] == 20
    alone = estimate(exact)
    assert fit.criterion == pytest.approx(float(alone.criterion), abs=1e-10)
    np.testing.assert_allclose(fit.bse, np.sqrt(np.diagonal(alone.vcov)), rtol=1e-9)


def test_structure_can_be_forced(fit):
    dense = jaxreml.fit(SLEEP, jaxreml.datasets.load("sleepstudy"), structure="dense")
    assert (fit.structure, dense.structure) == ("grouped", "dense")
    assert dense.criterion == pytest.approx(fit.criterion, abs=1e-9)
    np.testing.assert_allclose(
        dense.random_effects["Subject"], fit.random_effects["Subject"], rtol=1e-6
    )


def test_unknown_method():
    with pytest.raises(ValueError, match="REML"):
        jaxreml.fit(SLEEP, jaxreml.datasets.load("sleepstudy"), "reml")
