"""Plots draw their frames, on the axes given; frames hold what the fit says."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxreml
from jaxreml.errors import DataError
from jaxreml.results import plots

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def fit():
    return jaxreml.fit("Reaction ~ Days + (Days | Subject)", jaxreml.datasets.load("sleepstudy"))


@pytest.fixture
def ax():
    return Figure().subplots()


def points(ax, k=0):
    return np.asarray(ax.collections[k].get_offsets())


def test_caterpillar(fit, ax):
    frame = plots.caterpillar_data(fit, "Subject", "Days", conf_level=0.9)
    assert frame["estimate"].is_monotonic_increasing and len(frame) == 18
    row = frame[frame["level"] == "335"].iloc[0]
    error = fit.random_effects_se["Subject"].loc["335", "Days"]
    assert row["estimate"] == fit.random_effects["Subject"].loc["335", "Days"]
    assert row["upper"] - row["lower"] == pytest.approx(2 * 1.6448536 * error)
    assert plots.caterpillar(fit, effect="Days", ax=ax) is ax
    drawn = points(ax, 1)
    np.testing.assert_array_equal(drawn[:, 0], frame["estimate"])
    assert [text.get_text() for text in ax.get_yticklabels()] == list(frame["level"])


def test_residuals(fit, ax):
    frame = plots.residuals_fitted_data(fit)
    np.testing.assert_allclose(frame["scaled_residual"] * fit.sigma, fit.resid)
    np.testing.assert_array_equal(points(plots.residuals_fitted(fit, ax=ax)), frame)


def test_quantiles(fit, ax):
    frame = plots.qq_residuals_data(fit)
    assert frame["quantile"].iloc[0] == pytest.approx(-frame["quantile"].iloc[-1])
    assert frame["scaled_residual"].is_monotonic_increasing
    np.testing.assert_array_equal(points(plots.qq_residuals(fit, ax=ax)), frame)
    modes = plots.qq_modes_data(fit)
    assert sorted(modes["mode"]) == sorted(fit.random_effects["Subject"]["(Intercept)"])
    line = plots.qq_modes(fit, ax=Figure().subplots()).lines[0]
    np.testing.assert_array_equal(line.get_ydata(), modes["mode"])


def test_coefficients(fit, ax):
    frame = plots.coefficients_data(fit, df="kenward-roger")
    assert list(frame["term"]) == ["Days"]
    interval = fit.conf_int(df="kenward-roger").loc["Days"]
    assert frame.iloc[0, 2:].tolist() == interval.tolist()
    scaled = plots.coefficients_data(fit, standardise=True)
    assert scaled["estimate"][0] == pytest.approx(fit.params["Days"] * np.arange(10).std())
    assert points(plots.coefficients(fit, ax=ax), 1)[0, 0] == frame["estimate"][0]


def test_shrinkage(fit, ax):
    frame = plots.shrinkage_data(fit).pivot(index="level", columns="effect")
    sleepstudy = jaxreml.datasets.load("sleepstudy")
    own = sleepstudy[sleepstudy["Subject"] == "335"]
    slope, intercept = np.polyfit(own["Days"], own["Reaction"], 1)
    assert frame["own"].loc["335", "Days"] == pytest.approx(slope - fit.params["Days"])
    assert frame["own"].loc["335", "(Intercept)"] == pytest.approx(
        intercept - fit.params["(Intercept)"]
    )
    np.testing.assert_array_equal(
        points(plots.shrinkage(fit, ax=ax), 1), frame["own"][["(Intercept)", "Days"]]
    )


def test_unknown_names(fit):
    with pytest.raises(DataError, match="no grouping factor 'Item': Subject"):
        plots.caterpillar(fit, "Item")
    with pytest.raises(DataError, match="no effect 'x'"):
        plots.qq_modes(fit, effect="x")
    with pytest.raises(DataError, match="no effect 'x'"):
        plots.shrinkage(fit, effects=("x", "Days"))


@pytest.fixture(scope="module")
def profile(fit):
    return fit.profile(conf_level=0.99)


def test_profile(fit, profile, ax):
    frame = plots.profile_zeta_data(profile, "sigma")
    assert frame["zeta"].is_monotonic_increasing
    assert points(plots.profile_zeta(profile, "sigma", ax=ax)).shape == frame.shape
    with pytest.raises(DataError, match="no profile of 'tau'"):
        plots.profile_zeta(profile, "tau")


def test_contours_have_their_deviance(fit, profile, ax):
    """The others are profiled out in fits with both of these held."""
    frame = plots.profile_contour_data(profile, "(Intercept)", "Days", (0.5, 0.9))
    by_ml = jaxreml.fit(fit.formula, fit.table, "ML")
    for level, deviance in ((0.5, 1.3862944), (0.9, 4.6051702)):
        part = frame[frame["conf_level"] == level]
        for k in (3, 20, 41, 58):
            intercept, slope = part.iloc[k][["(Intercept)", "Days"]]
            left = fit.table.assign(z=fit.y - intercept - slope * fit.table["Days"])
            held = jaxreml.fit("z ~ 0 + (Days | Subject)", left, "ML")
            assert held.criterion - by_ml.criterion == pytest.approx(deviance, rel=1e-6)
    assert len(plots.profile_contour(profile, "(Intercept)", "Days", ax=ax).lines) == 6
    with pytest.raises(ValueError, match="no profile of 'tau'"):
        plots.profile_contour(profile, "tau", "Days")


def test_bootstrap_density(fit, ax):
    bootstrap = fit.bootstrap(200, seed=1)
    frame = plots.bootstrap_density_data(bootstrap, "sigma")
    assert np.trapezoid(frame["density"], frame["value"]) == pytest.approx(1, abs=0.03)
    line = plots.bootstrap_density(bootstrap, "sigma", ax=ax).lines[1]
    assert line.get_xdata()[0] == fit.sigma
    with pytest.raises(DataError, match="no statistic 'tau'"):
        plots.bootstrap_density(bootstrap, "tau")
