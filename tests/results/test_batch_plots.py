"""Plots of many fits draw their frames, on the axes given; frames hold what the results say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawn import legend, points, texts
from matplotlib.figure import Figure

import jaxreml
from jaxreml import DataError, batch_plots
from jaxreml.inference.batches import discoveries

B = 300


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(8)
    data = pd.DataFrame({"g": np.arange(80) % 10, "x": rng.normal(size=80)})
    effects = np.where(np.arange(B) < 60, 1.0, 0.0) * np.where(np.arange(B) % 4, 1.0, -1.0)
    values = rng.normal(size=(80, B)) * np.sqrt(6 / rng.chisquare(6, B)) + rng.uniform(0, 9, B)
    values += 0.5 * rng.normal(size=(10, B))[data["g"]] + data["x"].to_numpy()[:, None] * effects
    values[:, 70] = 3.0
    responses = pd.DataFrame(values, columns=[f"gene{k}" for k in range(B)])
    return jaxreml.fit_many("~ x + (1 | g)", data, responses)


def names(ax) -> list[str]:
    """Labels that stand somewhere."""
    return list(filter(None, texts(ax.texts)))


def test_volcano(results, ax):
    frame = batch_plots.volcano_data(results, "x")
    assert len(frame) == B - 1 and "gene70" not in frame.index
    np.testing.assert_allclose(10 ** -frame["neg_log10_p"], results.pvalues["x"].dropna())
    assert frame["discovery"].equals((results.pvalues_adjusted["x"] <= 0.05).drop("gene70"))
    assert batch_plots.volcano(results, "x", labels=5, ax=ax) is ax
    drawn = [points(ax, k) for k in range(3)]
    up = frame["discovery"] & (frame["estimate"] > 0)
    down = frame["discovery"] & (frame["estimate"] < 0)
    pairs = ["estimate", "neg_log10_p"]
    for own, chosen in zip(drawn, (~frame["discovery"], up, down), strict=True):
        np.testing.assert_array_equal(own, frame.loc[chosen, pairs])
    assert legend(ax) == [f"{up.sum()} up", f"{down.sum()} down"]
    surest = frame["neg_log10_p"].nlargest(5).index
    assert set(names(ax)) <= set(surest) and surest[0] in names(ax)


def test_labels_do_not_overlap(results, ax):
    batch_plots.volcano(results, "x", labels=30, ax=ax)
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len(boxes) > 5
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:k])


def test_a_volcano_without_discoveries(results, ax):
    batch_plots.volcano(results, "x", level=1e-300, ax=ax)
    assert names(ax) == []
    with pytest.raises(DataError, match="no coefficient or contrast 'y'"):
        batch_plots.volcano(results, "y")


def test_mean_difference(results, ax):
    frame = batch_plots.mean_difference_data(results, "x")
    np.testing.assert_array_equal(frame["mean"], results.mean.drop("gene70"))
    given = batch_plots.mean_difference_data(results, "x", np.arange(B))
    assert given["mean"]["gene71"] == 71
    batch_plots.mean_difference(results, "x", ax=ax)
    quiet = frame[~frame["discovery"]]
    np.testing.assert_array_equal(points(ax, 0), quiet[["mean", "estimate"]])
    with pytest.raises(ValueError, match=f"a number for each of {B} responses"):
        batch_plots.mean_difference_data(results, "x", np.ones(3))


def test_p_histogram(results, ax):
    frame = batch_plots.p_histogram_data(results, "x", bins=10)
    assert frame["count"].sum() == B - 1
    assert frame["count"][0] == (results.pvalues["x"] < 0.1).sum()
    batch_plots.p_histogram(results, "x", bins=10, ax=ax)
    assert [bar.get_height() for bar in ax.patches] == frame["count"].tolist()
    share = discoveries.null_share(results.pvalues["x"].to_numpy())
    assert ax.lines[0].get_ydata()[0] == pytest.approx(share * (B - 1) / 10)


def test_qq_p(results, ax):
    frame = batch_plots.qq_p_data(results, "x")
    assert frame["observed"].is_monotonic_decreasing and frame["expected"].is_monotonic_decreasing
    assert ((frame["lower"] < frame["expected"]) & (frame["expected"] < frame["upper"])).all()
    # The least of m uniform numbers is below u with probability 1 - (1 - u)^m.
    least = 1 - 0.975 ** (1 / (B - 1))
    assert frame["upper"].iloc[0] == pytest.approx(-np.log10(least))
    batch_plots.qq_p(results, "x", ax=ax)
    np.testing.assert_array_equal(points(ax, 1), frame[["expected", "observed"]])
    inflation = discoveries.inflation(results.pvalues["x"].to_numpy())
    assert names(ax) == [rf"$\lambda$ = {inflation:.3f}"]


def test_variance_fractions(results, ax):
    frame = batch_plots.variance_fractions_data(results)
    assert list(frame)[-1] == "Residual" and len(frame) == B - 1
    assert frame.iloc[:, :-1].median().is_monotonic_decreasing
    batch_plots.variance_fractions(results, ax=ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(frame)
    np.testing.assert_allclose(points(ax, -1)[:, 1], frame.median())


@pytest.mark.parametrize("trend", [None, True])
def test_moderation(results, ax, trend):
    moderated = results.moderated(trend=trend)
    frame = batch_plots.moderation_data(moderated)
    assert frame["covariate"].is_monotonic_increasing and len(frame) == B - 1
    np.testing.assert_array_equal(frame["residual_sd"], results.sigma[frame.index])
    between = np.sort(frame[["residual_sd", "prior_sd"]], axis=1)
    posterior = frame["posterior_sd"].to_numpy()
    assert ((between[:, 0] <= posterior) & (posterior <= between[:, 1])).all()
    batch_plots.moderation(moderated, ax=ax)
    np.testing.assert_array_equal(points(ax, 1), frame[["covariate", "posterior_sd"]])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), frame["prior_sd"])
    assert ax.get_xlabel() == "mean of the response"
    given = batch_plots.moderation(moderated, np.arange(B), ax=Figure().subplots())
    assert given.get_xlabel() == "covariate"
