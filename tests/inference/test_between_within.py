"""Degrees of freedom that are counted: against nlme's, mmrm's and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.inference.fixed.between_within import counted
from jaxreml.model.groups import contains, crossing

HERE = Path(__file__).parents[1] / "reference" / "residuals"
BW = "between-within"


def test_nlme():
    """lme's fixDF$X, by tests/reference/make_residuals.R."""
    oxide = jaxreml.datasets.load("oxide")
    oxide = oxide.assign(x=oxide["Site"].astype(float), w=oxide["Wafer"].astype(float))
    fit = jaxreml.fit("Thickness ~ Source + x + w + (1 | Lot/Wafer)", oxide)
    assert fit.coefficients(BW)["df"].tolist() == [47, 6, 47, 15]
    children = jaxreml.datasets.load("orthodont")
    fit = jaxreml.fit("distance ~ age * Sex + (1 | Subject)", children)
    assert fit.coefficients(BW)["df"].tolist() == [79, 79, 25, 79]


def test_mmrm():
    """The example of mmrm's vignette "Between-Within", and its tests of several coefficients."""
    data = pd.read_csv(HERE / "fev.csv.gz")
    fit = jaxreml.fit("FEV1 ~ RACE + SEX + ARMCD * AVISIT", data, residual="us(AVISIT | USUBJID)")
    table = fit.coefficients(BW)
    between = [name in ("ARMCD[T.TRT]",) or name[:3] in ("RAC", "SEX") for name in table.index]
    assert table["df"].tolist() == [192 if own else 334 for own in between]
    race, visit = (
        [name for name in table.index if name.startswith(word) and ":" not in name]
        for word in ("RACE", "AVISIT")
    )
    for names, degrees, statistic in ((race, 192, 36.91), (visit[:2], 334, 80.96)):
        test = fit.test([f"`{name}` = 0" for name in names], df=BW).iloc[0]
        assert test["den_df"] == degrees
        assert test["statistic"] == pytest.approx(statistic, rel=1e-3)
    both = [f"`{own}` + `{other}` = 0" for own, other in zip(race, visit, strict=False)]
    test = fit.test(both, df=BW).iloc[0]
    assert test["den_df"] == 192 and test["statistic"] == pytest.approx(117.65, rel=1e-3)
    np.testing.assert_allclose(table["std_error"], fit.bse)
    means = fit.emmeans("ARMCD", by="AVISIT", df=BW).table
    assert set(means["df"]) == {192.0}
    assert set(fit.coefficients("residual")["df"]) == {537.0 - 11}
    assert "between-within" in fit.summary(df=BW)


def test_by_hand():
    """Four groups of three rows: m_1 = 4, m_2 = 12."""
    codes = np.repeat(np.arange(4), 3)
    rng = np.random.default_rng(0)
    group, row = rng.normal(size=4)[codes], rng.normal(size=12)
    with_intercept = np.column_stack([np.ones(12), group, row])
    assert counted(with_intercept, [codes]).tolist() == [7, 2, 7]
    assert counted(with_intercept[:, 1:], [codes]).tolist() == [3, 7]
    many = np.column_stack([np.ones(12), np.eye(4)[codes][:, 1:]])
    np.testing.assert_equal(counted(many, [codes]), [8, np.nan, np.nan, np.nan])


def test_nesting():
    inner, outer = np.array([0, 0, 1, 2, 2]), np.array([1, 1, 1, 0, 0])
    assert contains(outer, inner) and not contains(inner, outer)
    assert crossing(inner, outer).tolist() == [False, False, True, False, False]


def test_what_cannot_be_counted():
    data = jaxreml.datasets.load("penicillin")
    fit = jaxreml.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", data)
    with pytest.raises(jaxreml.DataError, match="levels of 'plate' are in several of 'sample'"):
        fit.coefficients(BW)
    with pytest.raises(ValueError, match="of single fits"):
        jaxreml.fit_many("~ 1 + (1 | plate)", data, data[["diameter"]], df=BW)
