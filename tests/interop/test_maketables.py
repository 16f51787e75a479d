"""Fits in tables of maketables, beside fits of another package."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.formula.api as smf
import watchdog
from maketables import ETable

import jaxreml
import jaxreml.maketables

SLEEP = jaxreml.datasets.load("sleepstudy")


@pytest.fixture(scope="module")
def fits():
    return [
        jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP),
        jaxreml.fit("Reaction ~ Days + (1 | Subject)", SLEEP, "ML"),
    ]


def rows(table):
    """The cells of a table by its last labels."""
    return {
        row[0][-1] if isinstance(row[0], tuple) else row[0]: list(row[1:])
        for row in table.df.itertuples()
    }


def test_coefficients_tests_and_intervals(fits):
    table = ETable([fits[0]], coef_fmt="b:.4f \n se:.4f \n p:.6f \n ci95l:.3f")
    cells = rows(table)
    own, low = fits[0].coefficients(), fits[0].conf_int()["lower"]
    for shown, name in (("Days", "Days"), ("Intercept", "(Intercept)")):
        estimate, error, _, _, p_value = own.loc[name]
        numbers = [float(text.strip().rstrip("*")) for text in cells[shown][0].split("\n")]
        expected = [estimate, error, p_value, low[name]]
        np.testing.assert_allclose(numbers, expected, rtol=1e-3, atol=1e-3)


def test_what_mixed_models_have_besides(fits):
    cells = rows(ETable(fits))
    assert cells["Groups: Subject"] == ["18", "18"]
    assert cells["Observations"] == ["180", "180"]
    assert cells["SD Days | Subject"][1] == "-"
    sd = fits[0].variance_components["sd"]
    assert float(cells["SD (Intercept) | Subject"][0]) == pytest.approx(sd[0], rel=1e-2)
    assert float(cells["SD Residual"][0]) == pytest.approx(sd[2], rel=1e-2)
    correlation = fits[0].correlations["correlation"][0]
    assert float(cells["Corr. (Intercept), Days | Subject"][0]) == pytest.approx(
        correlation, abs=0.01
    )
    assert cells["S.E. type"][0].startswith("REML")


def test_beside_statsmodels_and_in_all_formats(fits):
    least_squares = smf.ols("Reaction ~ Days", SLEEP).fit()
    table = ETable([least_squares, *fits], caption="Reaction times")
    cells = rows(table)
    assert len(cells["Days"]) == 3 and cells["Days"][0].split()[0].startswith("10.4")
    assert "Reaction" in table.make("tex") and "Subject" in table.make("tex")
    assert "SD Residual" in table.make("gt").as_raw_html()


def test_statistics_by_name(fits):
    restricted, full = fits
    assert restricted.__maketables_stat__("deviance") is None
    assert full.__maketables_stat__("deviance") == full.criterion
    assert full.__maketables_stat__("aic") == full.aic
    assert full.__maketables_stat__("fvalue") is None


def test_without_the_import_tables_have_the_coefficients():
    code = (
        "import jaxreml, maketables\n"
        "data = jaxreml.datasets.load('sleepstudy')\n"
        "fit = jaxreml.fit('Reaction ~ Days + (1 | Subject)', data)\n"
        "table = maketables.ETable([fit]).df\n"
        "assert '10.467***' in table.iloc[1, 0], table\n"
        "assert 'jax' not in __import__('sys').modules"
    )
    watchdog.run(code, check=True)
