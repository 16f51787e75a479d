"""Effect plots and plots of marginal means against predictions and pairwise tests."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from drawn import legend, points, texts
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import jaxreml
from jaxreml.errors import DataError
from jaxreml.inference.fixed.letters import display, letters
from jaxreml.results import plots
from jaxreml.results.plots.canvas import BLUE, PALETTE, VERMILLION


def fitted(name, formula):
    return jaxreml.fit(formula, jaxreml.datasets.load(name))


@pytest.fixture(scope="module")
def sleep():
    return fitted("sleepstudy", "Reaction ~ Days + (Days | Subject)")


@pytest.fixture(scope="module")
def growth():
    return fitted("orthodont", "distance ~ age * Sex + (age | Subject)")


@pytest.fixture(scope="module")
def machines():
    return fitted("machines", "score ~ Machine + (Machine | Worker)")


@pytest.fixture(scope="module")
def cake():
    return fitted("cake", "angle ~ recipe * temperature + (1 | recipe:replicate)")


def test_a_line_with_its_band(sleep, ax):
    frame = plots.effects_data(sleep, "Days", df="inf", conf_level=0.9)
    own = sleep.predict(frame, "~0", interval="confidence", conf_level=0.9)
    assert frame["Days"].iloc[[0, -1]].tolist() == [0, 9]
    columns = {"estimate": "prediction", "std_error": "std_error", "lower": "lower"}
    for name, same in columns.items():
        np.testing.assert_allclose(frame[name], own[same], rtol=1e-9)

    plots.effects(sleep, "Days", df="inf", conf_level=0.9, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), frame[["Days", "estimate"]])
    band = ax.collections[2].get_paths()[0].vertices
    assert {*frame["lower"], *frame["upper"]} <= {*band[:, 1]}
    np.testing.assert_array_equal(points(ax), sleep.table[["Days", "Reaction"]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Days", "Reaction")
    assert legend(ax.get_legend()) == ["mean, 90% band", "each Subject"]


def test_lines_of_groups_are_their_predictions(sleep, ax):
    frame = plots.effects_groups_data(sleep, "Days")
    assert len(frame) == 18 * 61
    own = sleep.predict(frame)
    np.testing.assert_allclose(frame["prediction"], own)
    plots.effects(sleep, "Days", points=False, ax=ax)
    drawn = ax.collections[0].get_segments()
    assert len(drawn) == 18
    np.testing.assert_allclose(np.concatenate(drawn), frame[["Days", "prediction"]])
    plots.effects(sleep, "Days", group=False, points=False, ax=(bare := Figure().subplots()))
    assert len(bare.collections) == 1  # the band


def test_groups_keep_their_own_values_of_other_variables(growth):
    """A girl's line is that of girls, at her own mean of another covariate."""
    frame = plots.effects_groups_data(growth, "age", by="Sex")
    sex = growth.table.drop_duplicates("Subject").set_index("Subject")["Sex"].astype(str)
    assert (
        len(frame) == 27 * 61 and (frame["Sex"].astype(str) == sex[frame["Subject"]].values).all()
    )
    own = growth.predict(frame)
    np.testing.assert_allclose(frame["prediction"], own)
    whole = plots.effects_groups_data(growth, "age")  # not by Sex: the same lines
    np.testing.assert_allclose(np.sort(whole["prediction"]), np.sort(frame["prediction"]))

    data = jaxreml.datasets.load("sleepstudy")
    data["z"] = np.random.default_rng(2).normal(size=180)
    fit = jaxreml.fit("Reaction ~ Days * z + (z | Subject)", data)
    frame = plots.effects_groups_data(fit, "Days", at={"Days": [2, 5]})
    for level, part in frame.groupby("Subject"):
        rows = data[data["Subject"] == level]
        means = [fit.predict(rows.assign(Days=day)).mean() for day in (2, 5)]
        np.testing.assert_allclose(part["prediction"], means)


def test_interactions_by_colour(growth, ax):
    frame = plots.effects_data(growth, "age", by="Sex")
    means = growth.emmeans("age", by="Sex", at={"age": [8, 14]}).table
    ends = frame[frame["age"].isin([8, 14])]
    np.testing.assert_allclose(ends[["estimate", "upper"]], means[["estimate", "upper"]])
    plots.effects(growth, "age", by="Sex", ax=ax)
    for line, sex, colour in zip(ax.lines, ("Male", "Female"), PALETTE, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), frame.loc[frame["Sex"] == sex, "estimate"])
        assert line.get_color() == colour
    assert legend(ax.get_legend()) == ["Sex = Male", "Sex = Female", "each Subject"]
    girls = growth.table[growth.table["Sex"] == "Female"]
    np.testing.assert_array_equal(points(ax, 1), girls[["age", "distance"]])
    assert to_hex(ax.collections[1].get_facecolor()[0]) == VERMILLION.lower()


def test_interactions_by_panels(growth):
    frame = plots.effects_data(growth, "age", facet="Sex")
    axes = plots.effects(growth, "age", facet="Sex")
    assert [own.get_title() for own in axes] == ["Sex = Male", "Sex = Female"]
    for own, sex, count in zip(axes, ("Male", "Female"), (16, 11), strict=True):
        part = frame[frame["Sex"] == sex]
        np.testing.assert_array_equal(own.lines[0].get_ydata(), part["estimate"])
        rows = growth.table[growth.table["Sex"] == sex]
        np.testing.assert_array_equal(points(own), rows[["age", "distance"]])
        assert len(own.collections[1].get_segments()) == count
    assert legend(axes[0].figure.legends[0]) == ["mean, 95% band", "each Subject"]
    assert [own.get_ylabel() for own in axes] == ["distance", ""]


def test_factors_have_points_with_intervals(machines, ax):
    frame = plots.effects_data(machines, "Machine")
    means = machines.emmeans("Machine").table
    pd.testing.assert_frame_equal(frame, means[list(frame)])
    plots.effects(machines, "Machine", group="Worker", ax=ax)
    bars = np.array(ax.collections[2].get_segments())
    np.testing.assert_array_equal(bars[:, :, 1], frame[["lower", "upper"]])
    np.testing.assert_array_equal(points(ax, 3)[:, 1], frame["estimate"])
    assert texts(ax.get_xticklabels()) == ["A", "B", "C"]
    rows = points(ax)
    np.testing.assert_array_equal(rows[:, 1], machines.y)
    codes = machines.table["Machine"].cat.codes
    assert (np.abs(rows[:, 0] - codes) <= 0.15).all()  # spread beside their level
    lines = np.array(ax.collections[1].get_segments())
    six = machines.table["Worker"].cat.categories.get_loc("6")
    own = machines.predict({"Machine": ["A", "B", "C"], "Worker": ["6"] * 3})
    np.testing.assert_allclose(lines[six][:, 1], own)


def test_two_factors_stand_beside_each_other(cake, ax):
    frame = plots.effects_data(cake, "temperature", by="recipe")
    plots.effects(cake, "temperature", by="recipe", points=False, ax=ax)
    for k, (recipe, shift) in enumerate(zip("ABC", (-0.25, 0, 0.25), strict=True)):
        drawn = points(ax, 2 * k + 1)
        np.testing.assert_allclose(drawn[:, 0], np.arange(6) + shift)
        own = frame.loc[frame["recipe"] == recipe, "estimate"]
        np.testing.assert_array_equal(drawn[:, 1], own)


def test_covariates_tell_lines_apart_at_three_values():
    data = jaxreml.datasets.load("sleepstudy")
    data["z"] = 40 + 7 * np.random.default_rng(2).normal(size=180)
    fit = jaxreml.fit("Reaction ~ Days * z + (1 | Subject)", data)
    frame = plots.effects_data(fit, "Days", by="z")
    mean, sd = data["z"].mean(), data["z"].std()
    values = frame["z"].unique()
    np.testing.assert_allclose(values, [mean - sd, mean, mean + sd], atol=0.006)
    part = frame[frame["z"] == values[2]]
    np.testing.assert_allclose(part["estimate"], fit.predict(part, "~0"))
    own = plots.effects(fit, "Days", by="z", ax=Figure().subplots())
    assert legend(own.get_legend())[1] == f"z = {values[1]:.4g}"
    np.testing.assert_array_equal(points(own), data[["Days", "Reaction"]])


def test_effects_say_what_is_wrong(growth, sleep):
    with pytest.raises(DataError, match=r"'Age' is not a variable of the fixed effects.*'age'"):
        plots.effects(growth, "Age")
    with pytest.raises(ValueError, match="must differ, not age, age"):
        plots.effects(growth, "age", by="age")
    with pytest.raises(DataError, match="no grouping factor 'Item': Subject"):
        plots.effects(growth, "age", by="Sex", group="Item")
    with pytest.raises(ValueError, match="no lines along 'Subject' itself"):
        plots.effects(jaxreml.fit("Reaction ~ Subject + (0 + Days | Subject)", sleep.table),
                      "Subject", group="Subject")  # fmt: skip
    data = jaxreml.datasets.load("sleepstudy")
    data["site"] = [f"site {k % 10}" for k in range(180)]
    fit = jaxreml.fit("Reaction ~ site + Days + (1 | Subject)", data)
    with pytest.raises(DataError, match=r"10 levels, more than colours.*facet='site'"):
        plots.effects(fit, "Days", by="site")
    some = plots.effects_data(fit, "Days", by="site", at={"site": ["site 3", "site 7"]})
    assert list(some["site"].unique()) == ["site 3", "site 7"]


def test_emmeans(machines, cake, ax):
    means = machines.emmeans("Machine")
    frame = plots.emmeans_data(means)
    np.testing.assert_array_equal(frame["estimate"], means.table["estimate"])
    assert list(frame["label"]) == ["A", "B", "C"] and set(frame["panel"]) == {""}
    plots.emmeans(means, ax=ax)
    assert texts(ax.get_yticklabels()) == ["C", "B", "A"]
    np.testing.assert_array_equal(points(ax, 1)[:, 0], frame["estimate"][::-1])
    ends = np.array(ax.collections[0].get_segments())[:, :, 0]
    np.testing.assert_array_equal(ends, frame[["lower", "upper"]][::-1])
    assert texts(ax.texts) == ["b", "b", "a"] and ax.get_ylabel() == "Machine"

    by_recipe = cake.emmeans("temperature", by="recipe")
    axes = plots.emmeans(by_recipe)
    assert [own.get_title(loc="left") for own in axes] == [f"recipe = {r}" for r in "ABC"]
    part = by_recipe.table[by_recipe.table["recipe"] == "B"]
    np.testing.assert_array_equal(points(axes[1], 1)[:, 0], part["estimate"][::-1])


def test_one_mean_has_no_letters(sleep, ax):
    means = sleep.emmeans("1")
    with pytest.raises(DataError, match="two means or more"):
        plots.emmeans(means)
    plots.emmeans(means, letters=False, ax=ax)
    assert texts(ax.get_yticklabels()) == ["overall"] and not ax.texts


def test_letters_are_those_of_the_pairwise_tests(cake):
    means = cake.emmeans("temperature", by="recipe")
    found = letters(means, adjust="none")
    pairs = means.contrast("pairwise", adjust="none")
    for recipe, rows in means.table.groupby("recipe", observed=True).groups.items():
        own = pairs.loc[pairs["recipe"] == recipe, "p_value"]
        for (i, j), p in zip(combinations(rows, 2), own, strict=True):
            assert bool(set(found[i]) & set(found[j])) == (p > 0.05)
        assert "a" in found[means.table.loc[rows, "estimate"].idxmin()]
    assert set(letters(means, 1e-12)) == {"a"}


def test_means_share_a_letter_if_and_only_if_they_do_not_differ():
    rng = np.random.default_rng(1)
    for k in range(2, 9):
        estimates = rng.normal(size=k)
        pairs = list(combinations(range(k), 2))
        for share in (0.0, 0.3, 0.6, 1.0):
            differ = [pair for pair in pairs if rng.uniform() < share]
            found = display(estimates, differ)
            assert all(found)
            for i, j in pairs:
                assert bool(set(found[i]) & set(found[j])) == ((i, j) not in differ)
    assert display(np.array([3.0, 1.0, 2.0]), [(0, 1)]) == ["b", "a", "ab"]
    assert display(np.array([1.0, np.nan, 2.0]), [(0, 2)]) == ["a", "", "b"]


def test_colours_are_of_one_palette():
    assert len(set(PALETTE)) == 8 and PALETTE[:2] == (BLUE, VERMILLION)
