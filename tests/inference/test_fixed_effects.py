"""Tests of fixed effects against lmerTest, pbkrtest and definitions with n x n matrices."""

from __future__ import annotations

import json
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from fits import fitted, fitted_to
from independent import directions, kenward_roger
from references import HERE, data, reference

import jaxreml
from jaxreml.data.hypotheses import hypotheses
from jaxreml.errors import ConvergenceWarning, DataError, FormulaError
from jaxreml.inference.fixed.wald import KenwardRoger, Satterthwaite
from jaxreml.model.kenward_roger import Adjustment
from jaxreml.model.satterthwaite import Spread

MODELS = ["cake_factor", "machines", "machines_s", "sleep_corr", "pastes", "crossed_nested"]


def column(rows, key):
    return np.array([row[key] for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_coefficients_match_lmertest_and_pbkrtest(name):
    theirs = reference(name)["fits"]["REML"]
    fit = fitted(name)
    np.testing.assert_allclose(
        fit.coefficients()["df"], column(theirs["satterthwaite"], "df"), rtol=1e-5
    )
    adjusted = fit.coefficients("kenward-roger")
    np.testing.assert_allclose(adjusted["df"], column(theirs["kenward_roger"], "df"), rtol=2e-6)
    np.testing.assert_allclose(
        adjusted["p_value"], column(theirs["kenward_roger"], "Pr(>|t|)"), rtol=1e-4
    )
    scale = np.sqrt(np.diagonal(theirs["vcov_kr"]))
    gap = (fit.vcov_kenward_roger.to_numpy() - theirs["vcov_kr"]) / np.outer(scale, scale)
    assert np.abs(gap).max() < 2e-6


@pytest.mark.parametrize("name", ["cake_factor", "machines", "orthodont", "unbalanced"])
def test_several_hypotheses_match_lmertest_and_pbkrtest(name):
    figures = json.loads((HERE / "inference" / f"{name}.json").read_text())
    fit = fitted_to("unbalanced", figures["formula"]) if name == "unbalanced" else fitted(name)
    for contest in figures["contests"]:
        for df in ("satterthwaite", "kenward_roger"):
            (theirs,) = contest[df]["joint"]
            ours = fit.test(contest["L"], df=df.replace("_", "-")).iloc[0]
            assert ours["num_df"] == theirs["NumDF"]
            assert ours["den_df"] == pytest.approx(theirs["DenDF"], rel=2e-5)
            assert ours["statistic"] == pytest.approx(theirs["F value"], rel=1e-5)
    test = figures["kr_drop"]["test"][0]  # by pbkrtest itself, with its scaling of F
    ours = fit.test(figures["kr_drop"]["L"], df="kenward-roger").iloc[0]
    assert ours["statistic"] == pytest.approx(test["stat"], rel=1e-5)
    assert ours["den_df"] == pytest.approx(test["ddf"], rel=2e-6)


def by_definition(fit):
    """Kenward and Roger's covariance with n x n matrices, in variances and covariances."""
    frame = fit.frame
    terms = [(term.codes, term.effects) for term in frame.terms]
    V = fit.sigma**2 * directions(terms, frame.weights, len(frame.y))[0]
    for (codes, Z), cov in zip(terms, fit.cov_re_arrays, strict=True):
        V = V + (codes[:, None] == codes) * (Z @ cov @ Z.T)
    return kenward_roger(frame.X, V, terms, frame.weights)[0]


@pytest.fixture(scope="module")
def weighted():
    rng = np.random.default_rng(3)
    g, h = rng.integers(0, 8, 90), rng.integers(0, 6, 90)
    x, w = rng.normal(size=90), rng.uniform(0.5, 2, 90)
    y = x + rng.normal(size=8)[g] * (1 + x) + rng.normal(size=6)[h] + rng.normal(size=90)
    return pd.DataFrame({"y": y, "x": x, "w": w, "g": g, "h": h})


@pytest.mark.parametrize("structure", ["crossed", "dense"])
def test_kenward_roger_by_definition(weighted, structure):
    fit = jaxreml.fit("y ~ x + (x | g) + (1 | h)", weighted, weights="w", structure=structure)
    np.testing.assert_allclose(fit.vcov_kenward_roger, by_definition(fit), rtol=1e-8, atol=1e-12)


def test_kenward_roger_by_definition_grouped_and_singular(weighted):
    noise = np.random.default_rng(5).normal(size=len(weighted))
    data = weighted.assign(
        y=noise - 0.9 * pd.Series(noise).groupby(weighted["h"]).transform("mean")
    )
    fit = jaxreml.fit("y ~ x + (1 | h)", data, weights="w")
    assert fit.is_singular and fit.structure == "grouped"
    np.testing.assert_allclose(fit.vcov_kenward_roger, by_definition(fit), rtol=1e-8, atol=1e-12)


def test_structures_agree(weighted):
    formula = "y ~ x + I(x**2) + (x | g)"
    L = np.eye(3)[1:]
    tables = []
    for structure in ("grouped", "crossed", "dense"):
        fit = jaxreml.fit(formula, weighted, structure=structure)
        tables.append(
            np.concatenate([fit.test(L, df=df) for df in ("satterthwaite", "kenward-roger")])
        )
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-6)
    np.testing.assert_allclose(tables[2], tables[0], rtol=1e-6)


def test_one_row_is_the_t_test_squared():
    fit = fitted("cake_factor")
    row = np.arange(len(fit.beta)) / 10
    for df in ("satterthwaite", "kenward-roger", "kenward-roger-linear", "residual", "inf"):
        single, joint = fit.test(row, df=df, joint=False).iloc[0], fit.test(row, df=df).iloc[0]
        assert joint["statistic"] == pytest.approx(single["statistic"] ** 2, rel=1e-10)
        assert joint["p_value"] == pytest.approx(single["p_value"], rel=1e-8)
        assert joint["den_df"] == pytest.approx(single["df"], rel=1e-10)


def test_hypotheses_do_not_depend_on_units():
    table = data("machines").assign(z=lambda d: np.arange(len(d)) % 7, huge=lambda d: d["z"] * 1e12)
    plain = jaxreml.fit("score ~ Machine + z + (1 | Worker)", table)
    scaled = jaxreml.fit("score ~ Machine + huge + (1 | Worker)", table)
    rows = np.array([[1.0, 0, 0, 1], [1, 0, 0, 2], [0, 0, 0, 1]])
    for df in ("kenward-roger", "inf"):
        found = scaled.test(rows * [1, 1, 1, 1e12], df=df)
        np.testing.assert_allclose(found, plain.test(rows, df=df), rtol=1e-6)
        assert found["num_df"][0] == 2
    with pytest.raises(ValueError, match="row 1 of the hypothesis contradicts"):
        scaled.test([[0, 0, 0, 1], [0, 0, 0, 1]], rhs=[1e-12, 5e-12])


def test_joint_tests_do_not_depend_on_the_rows_chosen():
    fit = fitted("cake_factor")
    L = np.eye(len(fit.beta))[3:8]
    turned = np.random.default_rng(0).normal(size=(5, 5)) @ L
    for df in ("satterthwaite", "kenward-roger"):
        first, second = fit.test(L, df=df), fit.test(np.vstack([turned, L[:2]]), df=df)
        np.testing.assert_allclose(first, second, rtol=1e-8)


def test_equations():
    fit = fitted("machines")
    by_name = fit.test("`Machine[T.B]` - `Machine[T.C]` = 2", joint=False)
    by_number = fit.test([0, 1, -1], rhs=2, joint=False)
    by_dict = fit.test({"Machine[T.B]": 1, "Machine[T.C]": -1}, rhs=2, joint=False)
    np.testing.assert_allclose(by_name, by_number)
    np.testing.assert_allclose(by_dict, by_number)
    assert by_name.index[0] == "`Machine[T.B]` - `Machine[T.C]` = 2"
    both = fit.test(["`Machine[T.B]`", "`Machine[T.C]` = 1"])
    np.testing.assert_allclose(both, fit.test([[0, 1, 0], [0, 0, 1]], rhs=[0, 1]))


@pytest.mark.parametrize(
    "text, row, value",
    [
        ("x = -3", [0, 1, 0], -3),
        ("x=-3", [0, 1, 0], -3),
        ("-x = 3", [0, -1, 0], 3),
        ("2*x = -6", [0, 2, 0], -6),
        ("x = - 3", [0, 1, 0], -3),
        ("x = +3", [0, 1, 0], 3),
        ("-3 = x", [0, -1, 0], 3),
        ("x * -2 == 1e1", [0, -2, 0], 10),
        ("x/-4 - -`a b` = -(1 - 3)", [0, -0.25, 1], 2),
        ("x - -3", [0, 1, 0], -3),
        ("(x + `(Intercept)`) * 2 = x", [2, 1, 0], 0),
    ],
)
def test_signs_and_numbers_in_equations(text, row, value):
    rows, values, labels = hypotheses(["(Intercept)", "x", "a b"], text)
    np.testing.assert_allclose(rows, [row])
    np.testing.assert_allclose(values, [value])
    assert labels == [text]
    both = hypotheses(["(Intercept)", "x", "a b"], [text, "x = -1, `a b` = 2"])
    np.testing.assert_allclose(both[0], [row, [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(both[1], [value, -1, 2])


@pytest.mark.parametrize("text", ["x =* 3", "x = ", "x = 1 = 2", "x * x = 1", "2 / x", "x = 3 4"])
def test_equations_that_are_none(text):
    with pytest.raises(FormulaError, match="not a hypothesis about") as caught:
        hypotheses(["(Intercept)", "x"], text)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "L, rhs, message",
    [
        ([1, 0], 0, "one per fixed effect"),
        ([[0, np.nan, 0]], 0, "not finite"),
        ([0, 0, 0], 0, "empty"),
        ([[0, 1, 0], [0, 2, 0]], [0, 1], "row 1 of the hypothesis contradicts"),
        ([0, 1, 0], [1, 2, 3], "rhs"),
        ([0, 1, 0], np.nan, "rhs has values that are not finite"),
        ([["a", "b", "c"]], 0, "L must be numbers"),
        ([1j, 0, 0], 0, "L must be numbers"),
        ({"(Intercept)": "one"}, 0, r"L\['\(Intercept\)'\] must be numbers"),
        (
            {"(Intercept)": [1, 2], "Machine[T.B]": [1, 2, 3]},
            0,
            "different numbers of coefficients",
        ),
    ],
)
def test_bad_hypotheses(L, rhs, message):
    with pytest.raises(ValueError, match=message):
        fitted("machines").test(L, rhs)


@pytest.mark.parametrize(
    "L, message",
    [({"Machine": 1}, "'Machine' is not a fixed effect"), ("Machine = 1", "backticks")],
)
def test_hypotheses_about_other_names(L, message):
    with pytest.raises(DataError, match=message):
        fitted("machines").test(L)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="defined for REML"):
        fitted("machines", "ML").coefficients("kenward-roger")
    with pytest.raises(ValueError, match="df must be one of"):
        fitted("machines").coefficients("kr")
    with pytest.warns(ConvergenceWarning):
        stopped = jaxreml.fit(
            reference("sleep_corr")["formula"], data("sleep_corr"), max_iterations=1
        )
    with pytest.raises(DataError, match="cannot test fixed effects: the fit has no optimum"):
        stopped.test([0, 1])
    for df in ("satterthwaite", "kenward-roger", "inf"):
        assert stopped.coefficients(df)[["df", "p_value"]].isna().all(axis=None)
    nothing = fitted("machines").test([0, 0, 0], df="kenward-roger", joint=False)
    assert nothing[["df", "statistic", "p_value"]].isna().all(axis=None)
    assert "NOT CONVERGED" in stopped.summary()


def test_tables_take_the_method():
    fit = fitted("sleep_corr")
    table = fit.tidy("fixed", conf_int=True, df="kenward-roger")
    np.testing.assert_allclose(table["df"], [17, 17])
    assert "Kenward-Roger" in fit.summary("kenward-roger")
    interval = fit.conf_int(df="kenward-roger")
    half = 2.109816 * fit.coefficients("kenward-roger")["std_error"]
    np.testing.assert_allclose((interval["upper"] - interval["lower"]) / 2, half, rtol=1e-6)
    np.testing.assert_array_equal(table[["conf_low", "conf_high"]], interval)


def test_joint_satterthwaite_is_fai_and_cornelius():
    # Two independent contrasts with 10 and 4 degrees of freedom: E = 10/8 + 4/2
    slopes = np.zeros((2, 2, 2))
    slopes[0, 0, 0] = slopes[1, 1, 1] = 1.0
    known = Spread(np.diag([2 / 10, 2 * 4 / 4]), np.zeros((2, 2)))
    method = Satterthwaite(np.diag([1.0, 2.0]), slopes, known)
    np.testing.assert_allclose(method.single(np.eye(2)), [10, 4])
    assert method.several(np.eye(2), 2)[0] == pytest.approx(2 * 3.25 / (3.25 - 2))


def test_without_correction_kenward_roger_is_a_chi_square():
    nothing = Adjustment(np.eye(2), np.eye(2), np.zeros((1, 2, 2)), np.ones((1, 1)), True)
    method = KenwardRoger(nothing)
    assert method.several(np.eye(2), 2) == (np.inf, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(method.single(np.eye(2))).all()


MANY = "~ Machine + (1 | Worker)"
CONTRASTS = {"B - C": "`Machine[T.B]` - `Machine[T.C]`", "mean": [1, 1 / 3, 1 / 3]}


@pytest.fixture(scope="module")
def responses():
    """Six, one with a missing value and one without any value on machine B."""
    machines = data("machines")
    values = machines["score"].to_numpy()[:, None]
    values = values + np.random.default_rng(0).normal(size=(len(machines), 6))
    values[3, 2] = np.nan
    values[machines["Machine"] == "B", 4] = np.nan
    return machines, values


@pytest.mark.parametrize(
    "df",
    [
        "satterthwaite",
        "kenward-roger",
        pytest.param("residual", marks=pytest.mark.long),
        pytest.param("inf", marks=pytest.mark.long),
    ],
)
def test_many_responses_are_tested_as_single_ones(responses, df):
    machines, values = responses
    results = jaxreml.fit_many(MANY, machines, values, df=df, contrasts=CONTRASTS)
    assert results.converged.all()
    for i in (0, 2, 5):
        fit = results.estimate(i)
        table = fit.coefficients(df)
        np.testing.assert_allclose(results.bse.iloc[i], table["std_error"], rtol=1e-8)
        np.testing.assert_allclose(results.df.iloc[i], table["df"], rtol=1e-7)
        own = fit.test([[0, 1, -1], [1, 1 / 3, 1 / 3]], df=df, joint=False)
        both = results.contrasts.iloc[i].unstack()[list(own.columns)]
        np.testing.assert_allclose(both, own, rtol=1e-6)
    # Without machine B its coefficient and the contrasts that need it do not exist
    gone = results.contrasts.iloc[4]
    assert gone.isna().all() and results.params.iloc[4].isna().tolist() == [False, True, False]


def test_adjusted_p_values_and_tables_of_contrasts(responses, tmp_path):
    machines, values = responses
    results = jaxreml.fit_many(MANY, machines, values, df="residual", contrasts=CONTRASTS)
    p_values = results.contrasts["B - C", "p_value"].dropna()
    ranks = p_values.rank()
    adjusted = [(p_values[ranks >= rank] * 5 / ranks[ranks >= rank]).min() for rank in ranks]
    np.testing.assert_allclose(results.contrasts["B - C", "p_adjusted"].dropna(), adjusted)
    long = results.tidy("contrasts").set_index(["response", "term"])
    np.testing.assert_allclose(
        long["p_adjusted"].unstack()["mean"], results.contrasts["mean", "p_adjusted"]
    )
    assert "contrast_se[B - C]" in results.to_frame()
    results.to_parquet(tmp_path / "fits.parquet")
    again = jaxreml.BatchResults.read_parquet(tmp_path / "fits.parquet")
    pd.testing.assert_frame_equal(again.contrasts, results.contrasts)
    with pytest.raises(DataError, match="df='residual'"):
        again.df_satterthwaite  # noqa: B018


def test_bad_contrasts_of_many_responses(responses):
    machines, values = responses
    with pytest.raises(FormulaError, match="one linear function"):
        jaxreml.fit_many(MANY, machines, values, contrasts={"both": np.eye(3)})
    with pytest.raises(FormulaError, match="without a right side"):
        jaxreml.fit_many(MANY, machines, values, contrasts={"b": "`Machine[T.B]` = 1"})
    with pytest.raises(ValueError, match="defined for REML"):
        jaxreml.fit_many(MANY, machines, values, "ML", df="kenward-roger")
    with pytest.raises(DataError, match="no contrasts were asked for"):
        jaxreml.fit_many(MANY, machines, values[:, :1]).contrasts  # noqa: B018


@cache
def nested_factor():
    """Effects of a two-level factor that differ between 18 groups, correlated."""
    rng = np.random.default_rng(3)
    g, i = np.repeat(np.arange(18), 8), np.tile(np.repeat([0, 1], 4), 18)
    b = rng.multivariate_normal([0, 0], [[1.6, 0.6], [0.6, 1.6]], 18)
    y = b[g, i] + 0.5 * i + rng.normal(size=144)
    frame = {"y": y, "g": g, "f": np.array(["A", "B"])[i], "x": rng.normal(size=144)}
    return pd.DataFrame(frame).sample(frac=0.8, random_state=1)


@pytest.mark.parametrize("df", ["satterthwaite", "kenward-roger"])
def test_a_variance_too_many_that_moves_nothing(df):
    frame = nested_factor()
    one_more, plain = (
        jaxreml.fit(f"y ~ f + x + {term}", frame) for term in ("(1 + f || g)", "(0 + f | g)")
    )
    assert one_more.criterion == pytest.approx(plain.criterion, abs=1e-8)
    np.testing.assert_allclose(one_more.coefficients(df), plain.coefficients(df), rtol=1e-5)
    L = np.eye(3)[1:]
    np.testing.assert_allclose(one_more.test(L, df=df), plain.test(L, df=df), rtol=1e-5)
    assert one_more.log_variance_se.isna().all()
    assert "flat in a combination" in one_more.message
    Y = frame[["y"]].to_numpy() + np.random.default_rng(0).normal(size=(len(frame), 2))
    many, expected = (
        jaxreml.fit_many(f"~ f + x + {term}", frame, Y, df=df)
        for term in ("(1 + f || g)", "(0 + f | g)")
    )
    np.testing.assert_allclose(many.df, expected.df, rtol=1e-5)


def test_a_variance_next_to_zero_has_the_degrees_of_freedom_of_one_that_is_not():
    """In a balanced design they do not depend on it until it is zero."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(20), 4)
    x, noise = rng.normal(size=20)[g], rng.normal(size=80)
    between = np.bincount(g, noise)[g] / 4
    within = noise - between
    X = np.column_stack([np.ones(80), x])
    between -= X @ np.linalg.lstsq(X, between)[0]
    equal = (within @ within / 60) / (between @ between / 18)  # mean squares, where it is zero
    for excess in (0.1, 1e-3, 1e-5):
        y = within + 0.3 * x + between * np.sqrt(equal * (1 + excess))
        fit = jaxreml.fit("y ~ x + (1 | g)", {"y": y, "x": x, "g": g})
        assert not fit.is_singular and fit.theta[0] ** 2 == pytest.approx(excess / 4, rel=1e-3)
        np.testing.assert_allclose(fit.df_satterthwaite, 18, rtol=1e-3)


def test_a_flat_variance_that_moves_the_fixed_effects():
    frame = nested_factor()
    half = np.where(frame["g"] < 9, "u", "v")  # a coefficient and a variance of two levels
    fit = jaxreml.fit("y ~ half + x + (1 | g) + (1 | half)", frame.assign(half=half))
    table = fit.coefficients()
    assert table.loc[["(Intercept)", "half[T.v]"], "df"].isna().all()
    assert table.loc["x", "df"] > 50  # orthogonal to what is not known
    with pytest.raises(DataError, match="cannot be told apart, and the covariance"):
        fit.coefficients("kenward-roger")
