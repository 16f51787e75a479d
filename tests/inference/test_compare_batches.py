"""Likelihood ratios response by response: `compare` of single fits is the oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.errors import DataError


@pytest.fixture(scope="module")
def study():
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(24), 3 + rng.poisson(2, 24))
    n = codes.size
    data = pd.DataFrame({"g": codes, "x": rng.normal(size=n), "z": rng.normal(size=n)})
    effects = rng.normal(size=(24, 12)) * rng.choice([0.0, 1.0], 12)
    y = pd.DataFrame(
        5 + data["x"].to_numpy()[:, None] * effects[codes] + rng.normal(size=(n, 12)),
        columns=[f"y{k}" for k in range(12)],
    )
    y.iloc[3, 2] = np.nan
    y["y5"] = 1.0
    return data, y


def pair(study, first, second, method, compared):
    data, y = study
    results = [jaxreml.fit_many(own, data, y, method) for own in (first, second)]
    table = jaxreml.compare(*results, method=compared)
    assert np.isnan(table.loc["y5", "p_value"])
    for name in ("y0", "y2", "y11"):
        used = data.assign(**{name: y[name]}).dropna()
        fits = [jaxreml.fit(f"{name} {own}", used, method) for own in (first, second)]
        single = jaxreml.compare(*fits, refit=False, method=compared).iloc[1]
        row = table.loc[name]
        assert row["df"] == single["df"]
        np.testing.assert_allclose(row["chisq"], single["chisq"], rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(row["p_value"], single["p_value"], rtol=1e-6)
    return table


def test_fixed_effects(study):
    table = pair(study, "~ x + z + (1 | g)", "~ x + (1 | g)", "ML", "chi2")
    assert (table["df"] == 1).all()
    assert table["p_adjusted"].min() >= table["p_value"].min()


@pytest.mark.parametrize("compared", ["chi2", "mixture"])
def test_random_effects(study, compared):
    pair(study, "~ x + (1 | g)", "~ x + (1 | g) + (0 + x | g)", "REML", compared)


def test_what_cannot_be_compared(study):
    data, y = study
    fits = {
        (formula, method): jaxreml.fit_many(formula, data, y, method)
        for formula in ("~ x + (1 | g)", "~ z + (1 | g)", "~ x + z + (1 | g)")
        for method in ("ML", "REML")
    }
    one, other, both = "~ x + (1 | g)", "~ z + (1 | g)", "~ x + z + (1 | g)"
    for arguments, error, message in [
        ((fits[one, "ML"], fits[other, "ML"]), ValueError, "as many parameters"),
        ((fits[one, "ML"], fits[both, "REML"]), ValueError, "fits by ML and REML"),
        ((fits[one, "REML"], fits[both, "REML"]), ValueError, 'fit both with method="ML"'),
        ((fits[one, "ML"],) * 3, ValueError, "two batches, not 3"),
    ]:
        with pytest.raises(error, match=message):
            jaxreml.compare(*arguments)
    slope = jaxreml.fit_many("~ z + (1 | g) + (0 + x | g)", data, y, "ML")
    with pytest.raises(DataError, match="not nested"):
        jaxreml.compare(fits[one, "ML"], slope)
    with pytest.raises(DataError, match="'y0' has other values"):
        jaxreml.compare(fits[one, "ML"], jaxreml.fit_many(both, data, y.assign(y0=y["y1"]), "ML"))
    with pytest.raises(DataError, match="other responses"):
        jaxreml.compare(fits[one, "ML"], jaxreml.fit_many(both, data, y.iloc[:, ::-1], "ML"))
    with pytest.raises(ValueError, match='"chi2" or "mixture"'):
        jaxreml.compare(fits[one, "ML"], fits[both, "ML"], method="bootstrap")
