"""Sandwich covariances of the fixed effects: against clubSandwich, and by their definition."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fits import fitted

import jaxreml

HERE = Path(__file__).parents[1] / "reference" / "residuals"
KINDS = ("CR0", "CR1", "CR2", "CR3")


@cache
def model(name: str) -> tuple[jaxreml.LMMResults, str]:
    if name == "uneven":
        data = pd.read_csv(HERE / "uneven.csv.gz")
        return jaxreml.fit("Reaction ~ Days + I(Days**2) + (Days | Subject)", data), "Subject"
    if name == "pastes":
        data = jaxreml.datasets.load("pastes")
        return jaxreml.fit("strength ~ cask + (1 | batch/cask)", data), "batch"
    fev = pd.read_csv(HERE / "fev.csv.gz")
    fit = jaxreml.fit("FEV1 ~ ARMCD + AVISIT", fev, residual="us(AVISIT | USUBJID)")
    return fit, "USUBJID"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["uneven", "pastes", "fev"])
def test_club_sandwich(name, kind):
    expected = json.loads((HERE / "robust.json").read_text())[name][kind]
    fit, cluster = model(name)
    found = fit.robust(kind, cluster)
    table = found.coefficients()
    np.testing.assert_allclose(table["std_error"], expected["se"], rtol=1e-4)
    np.testing.assert_allclose(table["df"], expected["df"], rtol=2e-3)
    np.testing.assert_allclose(table["estimate"], fit.params)
    p = len(fit.beta)
    joint = found.test(np.eye(p)[1:], joint=True).iloc[0]
    assert joint["statistic"] == pytest.approx(expected["F"], rel=2e-3)
    assert joint["num_df"] == expected["df_num"]
    assert joint["den_df"] == pytest.approx(expected["df_den"], rel=2e-3)
    np.testing.assert_allclose(found.bse, table["std_error"])
    np.testing.assert_allclose(fit.robust(kind).bse, found.bse)  # the same clusters, if left out


def test_unbiased_where_the_model_is_right():
    """The expectation of CR2 is the model's covariance, whatever the clusters' sizes."""
    fit, cluster = model("uneven")
    sandwich = fit.robust("CR2", cluster).sandwich
    total = np.zeros_like(fit.vcov_array)
    for own, part in zip(sandwich.clusters, sandwich.weights, strict=True):
        rest = own.V - own.X @ fit.vcov_array @ own.X.T
        total += part.T @ rest @ part
    np.testing.assert_allclose(total, fit.vcov_array, rtol=1e-10, atol=1e-12)


def test_everything_about_fixed_effects_follows():
    fit = fitted("sleep_corr")
    found = fit.robust()
    assert "CR2 robust standard errors, clustered by Subject" in found.summary()
    slope = found.test("Days = 0", joint=False).iloc[0]
    assert slope["std_error"] == pytest.approx(found.bse["Days"])
    means = found.emmeans("Days", at={"Days": [0, 9]}).table
    L = np.array([1.0, 9.0])
    assert means["std_error"].iloc[1] == pytest.approx(np.sqrt(L @ found.vcov @ L))
    low, high = found.conf_int().loc["Days"]
    assert (high - low) / 2 > 2 * found.bse["Days"]
    again = found.robust("CR0")  # of the model, not of the robust fit
    np.testing.assert_allclose(again.vcov, fit.robust("CR0").vcov, rtol=1e-12)
    np.testing.assert_allclose(fit.coefficients()["std_error"], fit.bse)  # left as it was


def test_bad_input(tmp_path):
    fit = fitted("sleep_corr")
    with pytest.raises(ValueError, match="kind must be one of CR0, CR1, CR2, CR3"):
        fit.robust("HC3")
    with pytest.raises(
        jaxreml.DataError, match="'day' is not a column that the fit uses; there are"
    ):
        fit.robust(cluster="day")
    with pytest.raises(
        jaxreml.DataError, match="levels of 'Subject' are in several clusters of 'Days'"
    ):
        fit.robust(cluster="Days")
    crossed = fitted("penicillin")
    with pytest.raises(jaxreml.DataError, match="several clusters"):
        crossed.robust()
    with pytest.raises(jaxreml.DataError, match="save the fit that they are of"):
        fit.robust().save(tmp_path / "fit.json")
