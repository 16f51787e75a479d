"""Plots draw their frames, on the axes given; frames hold what the fit says."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from drawn import legend, points, texts
from matplotlib.figure import Figure
from statsmodels.nonparametric.smoothers_lowess import lowess

import jaxreml
from jaxreml.errors import DataError
from jaxreml.results import plots
from jaxreml.results.plots import (
    canvas,
    likelihood,
)


@pytest.fixture(scope="module")
def fit():
    return jaxreml.fit("Reaction ~ Days + (Days | Subject)", jaxreml.datasets.load("sleepstudy"))


@pytest.fixture(scope="module")
def many():
    """A fit of 300 levels."""
    rng = np.random.default_rng(0)
    g, x = np.repeat(np.arange(300), 4), np.tile(np.arange(4.0), 300)
    y = rng.normal(size=300)[g] + 0.5 * rng.normal(size=300)[g] * x + rng.normal(size=1200)
    data = pd.DataFrame({"y": y, "x": x, "g": [f"S{k:03d}" for k in g]})
    return jaxreml.fit("y ~ x + (x | g)", data)


def test_caterpillar(fit, ax):
    frame = plots.caterpillar_data(fit, "Subject", "Days", conf_level=0.9)
    assert frame["estimate"].is_monotonic_increasing and len(frame) == 18
    row = frame[frame["level"] == "335"].iloc[0]
    error = fit.random_effects_se["Subject"].loc["335", "Days"]
    assert row["estimate"] == fit.random_effects["Subject"].loc["335", "Days"]
    assert row["upper"] - row["lower"] == pytest.approx(2 * 1.6448536 * error)
    assert plots.caterpillar(fit, effect="Days", conf_level=0.9, ax=ax) is ax
    np.testing.assert_array_equal(points(ax, 1)[:, 0], frame["estimate"])
    ends = np.array(ax.collections[0].get_segments())[:, :, 0]
    np.testing.assert_array_equal(ends, frame[["lower", "upper"]])
    assert texts(ax.get_yticklabels()) == list(frame["level"])
    assert ax.get_ylabel() == "Subject" and "90% interval" in ax.get_xlabel()


def test_caterpillar_has_a_panel_for_each_effect_and_one_order_of_levels(fit):
    axes = plots.caterpillar(fit, sort="Days")
    assert [own.get_xlabel().split("\n")[0] for own in axes] == ["(Intercept)", "Days"]
    modes = fit.random_effects["Subject"].sort_values("Days")
    for own, name in zip(axes, modes, strict=True):
        np.testing.assert_array_equal(points(own, 1)[:, 0], modes[name])
    assert texts(axes[0].get_yticklabels()) == list(modes.index)
    frame = plots.caterpillar_data(fit)
    assert len(frame) == 36 and frame["estimate"][:18].is_monotonic_increasing
    with pytest.raises(ValueError, match="there are 2 panels: ax must be 2 Axes, not 1"):
        plots.caterpillar(fit, ax=axes[0])


def test_caterpillar_of_many_levels_names_some_of_them(many):
    own = plots.caterpillar(many, effect="x")
    order = many.random_effects["g"]["x"].sort_values().index
    shown = texts(own.get_yticklabels())
    assert 20 < len(shown) < 60 and shown[0] == order[0] and shown[-1] == order[-1]
    assert shown == [order[round(place)] for place in own.get_yticks()]
    own.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in own.get_yticklabels()]
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_smoother_is_lowess():
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 10, 50)
    y = np.sin(x) + 0.3 * rng.normal(size=50)
    at, values = canvas.smooth(x, y)
    np.testing.assert_allclose(values, lowess(y, x, frac=2 / 3, it=0)[:, 1], atol=2e-3)
    np.testing.assert_array_equal(at, np.sort(x))
    at, values = canvas.smooth(np.arange(500.0), 3 - 2 * np.arange(500.0))  # a line is itself
    np.testing.assert_allclose(values, 3 - 2 * at)
    alike, means = canvas.smooth([0.0] * 90 + [1.0] * 10, [1.0, 3.0] * 50)
    np.testing.assert_allclose([*alike, means[0]], [0, 1, 2])
    assert not canvas.smooth([1.0, 1.0], [2.0, 3.0])[0].size


def test_residuals(fit, ax):
    frame = plots.residuals_fitted_data(fit)
    np.testing.assert_allclose(frame["scaled_residual"] * fit.sigma, fit.resid)
    np.testing.assert_array_equal(points(plots.residuals_fitted(fit, ax=ax)), frame)
    np.testing.assert_array_equal(ax.lines[0].get_xydata().T, canvas.smooth(*frame.to_numpy().T))
    assert ax.collections[0].get_sizes()[0] > 9  # square points

    scale = plots.scale_location_data(fit)
    root = np.sqrt(np.abs(fit.resid) / fit.sigma)
    np.testing.assert_allclose(scale["root_abs_residual"], root)
    own = plots.scale_location(fit, ax=Figure().subplots())
    np.testing.assert_array_equal(points(own), scale)


def test_quantiles(fit, ax):
    frame = plots.qq_residuals_data(fit)
    assert frame["quantile"].iloc[0] == pytest.approx(-frame["quantile"].iloc[-1])
    assert frame["scaled_residual"].is_monotonic_increasing
    np.testing.assert_array_equal(points(plots.qq_residuals(fit, ax=ax)), frame)
    modes = plots.qq_modes_data(fit)
    assert sorted(modes["mode"]) == sorted(fit.random_effects["Subject"]["(Intercept)"])
    own = plots.qq_modes(fit, ax=Figure().subplots())
    np.testing.assert_array_equal(own.lines[0].get_ydata(), modes["mode"])
    bars = np.array(own.collections[0].get_segments())[:, :, 1]
    np.testing.assert_allclose((bars[:, 1] - bars[:, 0]) / 2, modes["std_error"])
    assert legend(own) == ["quartile line", "mode ± standard error"]


def test_plot_draws_the_residual_panel(fit):
    axes = fit.plot(effect="Days")
    assert len({own.figure for own in axes}) == 1
    np.testing.assert_array_equal(points(axes[0]), plots.residuals_fitted_data(fit))
    np.testing.assert_array_equal(points(axes[1]), plots.scale_location_data(fit))
    np.testing.assert_array_equal(points(axes[2]), plots.qq_residuals_data(fit))
    modes = plots.qq_modes_data(fit, "Subject", "Days")
    np.testing.assert_array_equal(axes[3].lines[0].get_ydata(), modes["mode"])
    given = Figure().subplots(2, 2)
    assert list(fit.plot(ax=given)) == list(given.ravel())


def test_coefficients(fit, ax):
    frame = plots.coefficients_data(fit, df="kenward-roger")
    assert list(frame["term"]) == ["Days"]
    interval = fit.conf_int(df="kenward-roger").loc["Days"]
    assert frame.iloc[0, 2:].tolist() == interval.tolist()
    scaled = plots.coefficients_data(fit, standardise=True)
    assert scaled["estimate"][0] == pytest.approx(fit.params["Days"] * np.arange(10).std())
    plots.coefficients(fit, intercept=True, ax=ax)
    np.testing.assert_array_equal(points(ax, 1)[:, 0], fit.params[["Days", "(Intercept)"]])
    assert texts(ax.get_yticklabels()) == ["Days", "(Intercept)"]


def test_shrinkage(fit, ax):
    frame = plots.shrinkage_data(fit).pivot(index="level", columns="effect")
    sleepstudy = jaxreml.datasets.load("sleepstudy")
    own = sleepstudy[sleepstudy["Subject"] == "335"]
    slope, intercept = np.polyfit(own["Days"], own["Reaction"], 1)
    assert frame["own"].loc["335", "Days"] == pytest.approx(slope - fit.params["Days"])
    assert frame["own"].loc["335", "(Intercept)"] == pytest.approx(
        intercept - fit.params["(Intercept)"]
    )
    plots.shrinkage(fit, ax=ax)
    for k, kind in ((1, "own"), (2, "shrunk")):
        np.testing.assert_array_equal(points(ax, k), frame[kind][["(Intercept)", "Days"]])
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1  # over no data


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
    plots.profile_zeta(profile, "sigma", ax=ax)
    np.testing.assert_array_equal(points(ax, -1), frame[["value", "zeta"]])
    assert texts(ax.texts) == [text for text in ("50%", "80%", "95%", "99%") for _ in range(2)]
    drops = [line.get_segments()[0][0, 0] for line in ax.collections[:-1]]
    limits = [profile.conf_int(level).loc["sigma"] for level in (0.5, 0.8, 0.95, 0.99)]
    known = [row[side] for row in limits for side in ("lower", "upper")]
    np.testing.assert_allclose(drops, known, rtol=1e-5)
    with pytest.raises(DataError, match="no profile of 'tau'"):
        plots.profile_zeta(profile, "tau")


def test_the_wald_line_has_the_standard_error_for_its_slope(fit, profile, ax):
    """Of maximum likelihood; fixed effects and variances are independent in a balanced design."""
    by_ml = jaxreml.fit(fit.formula, fit.table, "ML")
    frame = plots.profile_zeta_data(profile, "Days")
    z = (frame["value"] - by_ml.params["Days"]) / by_ml.bse["Days"]
    np.testing.assert_allclose(frame["wald"], z, rtol=1e-3, atol=1e-6)
    plots.profile_zeta(profile, "Days", ax=ax)
    lines = {line.get_label(): line for line in ax.lines}
    line = lines["Wald: tangent at the estimate"]
    np.testing.assert_array_equal(line.get_xydata(), frame[["value", "wald"]])


def deviance_at(fit, intercept, slope):
    """The others are profiled out in fits with both of these held."""
    left = fit.table.assign(z=fit.y - intercept - slope * fit.table["Days"])
    held = jaxreml.fit("z ~ 0 + (Days | Subject)", left, "ML")
    return held.criterion - jaxreml.fit(fit.formula, fit.table, "ML").criterion


def test_contours_have_their_deviance(fit, profile, ax):
    frame = plots.profile_contour_data(profile, "(Intercept)", "Days", (0.5, 0.9))
    levels = {0.5: 1.3862944, 0.9: 4.6051702}
    for level, deviance in levels.items():
        part = frame[frame["conf_level"] == level]
        for k in (3, 41):
            found = deviance_at(fit, *part.iloc[k][["(Intercept)", "Days"]])
            assert found == pytest.approx(deviance, rel=1e-6)

    plots.profile_contour(profile, "(Intercept)", "Days", (0.5, 0.9), ax=ax)
    edges = [line.get_xydata() for line in ax.lines if line.get_label().startswith("_child")][:2]
    for edge, (level, deviance) in zip(edges, levels.items(), strict=True):
        own = frame.loc[frame["conf_level"] == level, ["(Intercept)", "Days"]].to_numpy()
        np.testing.assert_allclose(edge[::8], own, atol=1e-9)
        assert deviance_at(fit, *edge[8 * 41 + 4]) == pytest.approx(deviance, rel=1e-4)
        steps = np.diff(edge / np.ptp(edge, axis=0), axis=0)
        turns = np.diff(np.unwrap(np.arctan2(*steps.T)))
        assert np.abs(turns).max() < 0.05  # no corners
    assert texts(ax.texts) == ["50%", "90%"]
    with pytest.raises(ValueError, match="no profile of 'tau'"):
        plots.profile_contour(profile, "tau", "Days")


def test_edges_keep_their_corners_on_a_bound():
    """A half disc: its arc is smooth, its straight side on the bound y = 0 stays there."""
    angle = np.linspace(0, np.pi, 17)
    arc = np.column_stack([np.cos(angle), np.sin(angle)])
    side = np.column_stack([np.linspace(-0.8, 0.8, 9), np.zeros(9)])
    whole = np.concatenate([arc, side, arc[:1]])
    full = 1.3862944
    deviance = np.concatenate([np.full(17, full), np.full(9, 0.5 * full), [full]])
    edge = likelihood._edge(whole, deviance, 0.5)
    assert (edge[:, 1] >= -1e-12).all()
    for corner in ([1, 0], [-1, 0]):
        assert np.abs(edge - corner).sum(axis=1).min() < 1e-12
    above = edge[edge[:, 1] > 1e-9]
    assert len(above) > 100
    np.testing.assert_allclose(np.hypot(*above.T), 1, atol=1e-3)


def test_bootstrap_density(fit, ax):
    bootstrap = fit.bootstrap(200, seed=1)
    frame = plots.bootstrap_density_data(bootstrap, "sigma")
    assert np.trapezoid(frame["density"], frame["value"]) == pytest.approx(1, abs=0.03)
    line = plots.bootstrap_density(bootstrap, "sigma", ax=ax).lines[1]
    assert line.get_xdata()[0] == fit.sigma
    shaded = ax.collections[0].get_paths()[0].vertices[:, 0]
    interval = bootstrap.conf_int().loc["sigma"]
    np.testing.assert_allclose(
        [shaded.min(), shaded.max()], interval[["lower", "upper"]].astype(float)
    )
    assert legend(ax) == ["estimate", "95% percentile interval"]
    with pytest.raises(DataError, match="no statistic 'tau'"):
        plots.bootstrap_density(bootstrap, "tau")


def test_matplotlib_is_imported_when_something_is_drawn_and_jax_is_not():
    code = (
        "import sys, jaxreml; jaxreml.plots.effects, jaxreml.batch_plots;"
        "fit = jaxreml.fit('Reaction ~ Days + (Days | Subject)',"
        " jaxreml.datasets.load('sleepstudy'));"
        "jaxreml.plots.effects_data(fit, 'Days'), jaxreml.plots.effects_groups_data(fit, 'Days');"
        "assert 'matplotlib' not in sys.modules;"
        "jaxreml.plots.effects(fit, 'Days'), fit.plot(), jaxreml.plots.caterpillar(fit);"
        "assert 'matplotlib' in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# The residuals' covariance within subjects


@cache
def repeated(residual: str) -> jaxreml.LMMResults:
    data = jaxreml.datasets.load("orthodont")
    return jaxreml.fit("distance ~ age * Sex", data, residual=residual)


@pytest.mark.parametrize("subjects", ["Subject", "Sex/Subject"])
def test_correlations_of_visits(subjects, fit):
    independent, fit = fit, repeated(f"us(age | {subjects})")
    arms = fit.residual.arms
    axes = np.atleast_1d(plots.correlation(fit))
    assert len(axes) == max(len(arms), 1)
    matrix = fit.residual_corr.to_numpy()
    for k, axis in enumerate(axes):
        own = matrix[4 * k : 4 * k + 4, 4 * k : 4 * k + 4]
        drawn = np.asarray(axis.images[0].get_array().filled(np.nan))
        lower = np.tril_indices(3)
        np.testing.assert_allclose(drawn[lower], own[1:, :-1][lower])
        assert np.isnan(drawn[0, 2])
        texts = {text.get_text() for text in axis.texts}
        assert f"{own[1, 0]:.2f}" in texts and len(axis.texts) == 6
        assert [label.get_text() for label in axis.get_yticklabels()] == ["10", "12", "14"]
    frame = plots.correlation_data(fit)
    row = frame[(frame["visit1"] == 14) & (frame["visit2"] == 8)].iloc[0]
    assert row["correlation"] == pytest.approx(matrix[3, 0])
    with pytest.raises(DataError, match="independent"):
        plots.correlation(independent)


def test_semivariogram(fit):
    """By the definition, pair by pair; on average one of normalised residuals, nearly."""
    independent, fit = fit, repeated("ar1h(age | Subject)")
    frame = plots.semivariogram_data(fit).set_index("distance")
    table = fit.table.assign(scaled=fit.residuals("scaled"), white=fit.residuals("normalized"))
    matrix = fit.residual_corr
    for distance in (2.0, 6.0):
        found = {"scaled": [], "white": [], "model": []}
        for _, own in table.groupby("Subject"):
            for i, j in combinations(range(len(own)), 2):
                first, second = own.iloc[i], own.iloc[j]
                if abs(first["age"] - second["age"]) == distance:
                    for name in ("scaled", "white"):
                        found[name].append((first[name] - second[name]) ** 2 / 2)
                    found["model"].append(1 - matrix.loc[first["age"], second["age"]])
        row = frame.loc[distance]
        assert row["pairs"] == len(found["scaled"])
        assert row["semivariance"] == pytest.approx(np.mean(found["scaled"]))
        assert row["normalized"] == pytest.approx(np.mean(found["white"]))
        assert row["fitted"] == pytest.approx(np.mean(found["model"]))
    axis = plots.semivariogram(fit)
    np.testing.assert_allclose(axis.collections[0].get_offsets()[:, 1], frame["semivariance"])
    assert axis.get_xlabel() == "distance in age"
    two = plots.semivariogram(repeated("ar1(age | Sex/Subject)"))
    arms = repeated("ar1(age | Sex/Subject)").residual.arms
    assert [own.get_title(loc="left") for own in two] == [f"Sex {arm}" for arm in arms]
    with pytest.raises(DataError, match="independent"):
        plots.semivariogram(independent)


def test_semivariogram_of_times_of_their_own():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"s": np.repeat(np.arange(30), 5), "t": rng.uniform(0, 20, 150).round(3)})
    times, subjects = data["t"].to_numpy(), data["s"].to_numpy()
    near = np.exp(-np.abs(np.subtract.outer(times, times)) / 5)
    V = near * np.equal.outer(subjects, subjects) + 1e-9 * np.eye(150)
    data["y"] = np.linalg.cholesky(V) @ rng.normal(size=150)
    fit = jaxreml.fit("y ~ 1", data, residual="sp_exp(t | s)")
    frame = plots.semivariogram_data(fit)
    assert len(frame) == 15 and frame["pairs"].sum() == 30 * 10
    curve = 1 - np.exp(-frame["distance"] / np.exp(fit.parameters[0]))
    np.testing.assert_allclose(frame["fitted"], curve, atol=0.01)
    with pytest.raises(DataError, match="too large to be drawn"):
        plots.correlation(fit)
