"""ANOVA tables, marginal means, contrasts and slopes against lmerTest's and emmeans' figures."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache

import fits
import numpy as np
import pandas as pd
import pytest
import references
from references import HERE, data

import jaxreml
from jaxreml import DataError, LMMResults
from jaxreml.inference.fixed import grid
from jaxreml.inference.fixed.adjustments import critical_values, p_values
from jaxreml.inference.fixed.anova import hypotheses
from jaxreml.inference.fixed.terms import fixed_terms
from jaxreml.status import Status

OTHERS = {"adjustments", "comparison", "delta", "deletion", "nesting"}  # figures of other tests
MODELS = sorted({path.stem for path in (HERE / "inference").glob("*.json")} - OTHERS)
TABLES = {"unbalanced": "unbalanced", "weighted": "unbalanced", "empty_cell": "empty",
          "machines_cells": "machines"}  # fmt: skip
DF = {"satterthwaite": "satterthwaite", "kenward_roger": "kenward-roger", "asymptotic": "inf"}


@cache
def figures(name: str) -> dict:
    return json.loads((HERE / "inference" / f"{name}.json").read_text())


def fitted(name: str) -> LMMResults:
    if name not in TABLES:
        return fits.fitted({"sleepstudy": "sleep_corr"}.get(name, name))
    model = figures(name)
    return fits.fitted_to(TABLES[name], model["formula"], weights=model.get("weights"))


@pytest.mark.parametrize("kind", ["I", "II", "III"])
@pytest.mark.parametrize("name", MODELS)
def test_anova_is_lmertests(name, kind):
    fit = fitted(name)
    for method, rows in figures(name)["anova"][kind].items():
        theirs = pd.DataFrame(rows).set_index("term")
        ours = fit.anova(kind, df=DF[method])
        assert list(ours.index) == list(theirs.index) or name == "orthodont"
        for column, other in {
            "sum_sq": "Sum Sq", "mean_sq": "Mean Sq", "num_df": "NumDF", "den_df": "DenDF",
            "statistic": "F value",
        }.items():  # fmt: skip
            np.testing.assert_allclose(ours[column], theirs[other], rtol=1e-5, err_msg=column)
        np.testing.assert_allclose(ours["p_value"], theirs["Pr(>F)"], rtol=1e-4)


OURS = {"conf_low": "lower", "conf_high": "upper"}  # broom's names in the files of R


def compare(ours: pd.DataFrame, theirs: pd.DataFrame, p_error: float = 1e-12) -> None:
    """Figures with the tolerances of the issue, p-values with an absolute error of R's."""
    for column in theirs:
        other = pd.to_numeric(theirs[column], errors="coerce")
        if column in ("estimate", "std_error"):
            scale = 1e-6 * ours["std_error"].max()
            np.testing.assert_allclose(ours[column], other, rtol=1e-6, atol=scale)
        elif column == "df":
            expected = other.where(theirs["estimate"].isna() | other.notna(), np.inf)
            np.testing.assert_allclose(ours["df"], expected, rtol=1e-5)
        elif column in ("conf_low", "conf_high", "statistic"):
            np.testing.assert_allclose(ours[OURS.get(column, column)], other, rtol=1e-5, atol=1e-5)
        elif column == "p_value":
            np.testing.assert_allclose(ours[column], other, rtol=1e-4, atol=p_error)
        elif column in ours:
            same = ours[column] == pd.to_numeric(theirs[column], errors="coerce")
            assert (same | (ours[column].astype(str) == theirs[column])).all()


@pytest.mark.parametrize("name", MODELS)
def test_means_slopes_and_contrasts_are_emmeans(name):
    fit = fitted(name)
    for case in figures(name)["means"] + figures(name)["trends"]:
        for method in DF.keys() & case.keys():
            options = {"by": case.get("by"), "at": case.get("at"), "df": DF[method]}
            if "var" in case:
                call, args = fit.emtrends, (case["specs"], case["var"])
            else:
                call, args = fit.emmeans, (case["specs"],)
                options["weights"] = case["weights"]
            theirs = case[method]
            means = call(*args, **options)
            compare(means.table, pd.DataFrame(theirs["means"]["rows"]))
            for adjust, columns in theirs["means"].get("adjusted", {}).items():
                adjusted = call(*args, **options, adjust=adjust).table
                compare(adjusted, pd.DataFrame(columns))
            for kind, table in theirs.get("contrasts", {}).items():
                rows = pd.DataFrame(table["rows"])
                if rows["contrast"][0] == "(nothing)":
                    with pytest.raises(DataError, match="two means"):
                        means.contrast(kind)
                    continue
                ours = means.contrast(kind, adjust="none")
                assert list(ours["contrast"]) == list(rows["contrast"])
                compare(ours, rows)
                for adjust, columns in table.get("adjusted", {}).items():
                    if adjust != "tukey" or len(ours) <= 3:  # slow: two integrals a row
                        adjusted = means.contrast(kind, adjust=adjust)
                        error = 1e-6 if adjust == "tukey" else 1e-12  # R's ptukey at few df
                        compare(adjusted, pd.DataFrame(columns), error)


@pytest.mark.parametrize("case", figures("adjustments"), ids=lambda case: case["specs"])
def test_adjustments_for_correlated_tests_are_emmeans(case):
    ddf = DF[case["ddf"].replace("-", "_")]
    means = fitted(case["model"]).emmeans(case["specs"], case["by"], df=ddf)
    for kind, theirs in case["contrasts"].items():
        plain = means.contrast(kind, adjust="none")
        for adjust, error in {"dunnettx": 1e-5, "mvt": 1e-3}.items():
            ours, rows = means.contrast(kind, adjust=adjust), theirs["rows"][adjust]
            assert ours["contrast"].tolist() == rows["contrast"]
            np.testing.assert_allclose(ours["p_value"], rows["p_value"], atol=error)
            for limit in OURS:  # in standard errors; R's root finder: 5e-4
                gap = (ours[OURS[limit]] - rows[limit]) / plain["std_error"]
                assert gap.abs().max() < (5e-4 if adjust == "dunnettx" else 5e-3)


# What R does not say


def test_type_three_does_not_depend_on_the_coding():
    table = references.table("unbalanced")
    plain = jaxreml.fit("y ~ a*b + a:x + x + (1|g)", table)
    text = "y ~ C(a, contr.sum)*C(b, contr.helmert) + C(a, contr.sum):x + x + (1|g)"
    coded = jaxreml.fit(text, table)
    expected = plain.anova(df="inf")
    np.testing.assert_allclose(coded.anova(df="inf")["statistic"], expected["statistic"], rtol=1e-5)
    relabelled = table.assign(a=table["a"].map({"a1": "z", "a2": "y", "a3": "x"}))
    other = jaxreml.fit("y ~ a*b + a:x + x + (1|g)", relabelled).anova(df="inf")
    np.testing.assert_allclose(other["statistic"], expected["statistic"], rtol=1e-5)


def test_type_three_of_sum_to_zero_coding_tests_the_coefficients():
    fit = jaxreml.fit("y ~ C(a, contr.sum)*C(b, contr.sum) + (1|g)", references.table("unbalanced"))
    terms = fixed_terms(fit)
    for name, L in hypotheses(terms, 3).items():
        expected = np.eye(len(fit.beta))[terms.columns[name]]
        np.testing.assert_allclose(L, expected, atol=1e-12)


def test_types_agree_where_they_must():
    fit = fitted("unbalanced")
    tables = {kind: fit.anova(kind, df="inf") for kind in (1, 2, 3)}
    for kind in (1, 3):  # nothing contains the last term, nothing comes after it
        pd.testing.assert_series_equal(
            tables[kind].loc["a:x"], tables[2].loc["a:x"], check_exact=False, rtol=1e-6
        )
    additive = jaxreml.fit("y ~ a + b + x + (1|g)", references.table("unbalanced"))
    pd.testing.assert_frame_equal(additive.anova("II"), additive.anova("III"), rtol=1e-6)


def test_containment():
    table = references.table("unbalanced").assign(l=lambda d: d["z"] == 1)
    fit = jaxreml.fit("y ~ a*b + a*x + a:l + l + poly(x, 2):a + (1|g)", table)
    terms = fixed_terms(fit)
    assert terms.containing("a") == ["a:b", "a:l"]
    assert terms.containing("l") == ["a:l"]
    assert terms.containing("x") == ["a:x"]
    assert terms.containing("a:b") == []


def test_a_term_without_columns_has_a_reason():
    table = references.table("unbalanced").assign(twice=lambda d: 2 * d["x"])
    found = jaxreml.fit("y ~ a + x + twice + (1|g)", table).anova()
    assert found["statistic"].isna().tolist() == [False, False, True]
    assert found["reason"].tolist() == ["", "", "every column depends on those of other terms"]
    assert "reason" not in fitted("unbalanced").anova()


def test_models_without_terms():
    table = references.table("unbalanced")
    intercept = jaxreml.fit("y ~ 1 + (1|g)", table)
    assert intercept.anova().empty
    (row,) = intercept.emmeans("1").table.to_dict("records")
    assert row["estimate"] == pytest.approx(intercept.params["(Intercept)"])
    nothing = jaxreml.fit("y ~ 0 + (1|g)", table)
    assert nothing.anova().empty
    with pytest.raises(DataError, match="no fixed effects"):
        nothing.emmeans("1")


def test_means_that_cannot_be_estimated_have_a_reason():
    means = fitted("empty_cell").emmeans("a", by="b", contrast="pairwise", adjust="holm")
    lost = means.table[means.table["reason"] != ""]
    assert lost[["a", "b"]].to_numpy().tolist() == [["a3", "b2"]]
    assert lost["estimate"].isna().all() and lost["p_value"].isna().all()
    assert means.contrasts["reason"].astype(bool).sum() == 2
    assert "reason" not in fitted("unbalanced").emmeans("a").table


def test_only_slopes_that_are_averaged_over_an_interaction_are_misleading():
    fit = fits.fitted_to("orthodont", "distance ~ age * Sex + (1 | Subject)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.emtrends("Sex", "age")  # the slope of each sex: as emmeans, without a note
        fit.emtrends("1", "age")  # nor has it one for the overall slope
    table = references.table("unbalanced").assign(c=lambda t: np.arange(len(t)) % 2)
    three = jaxreml.fit("y ~ x * a * C(c) + (1|g)", table)
    with pytest.warns(UserWarning, match="involvement in interactions: x:a:"):
        three.emtrends("a", "x")


def test_slopes_of_curves_are_derivatives():
    table = references.table("unbalanced")
    fit = jaxreml.fit("y ~ np.log(x + 10) * a + I(x**2) + (1|g)", table)
    at = 2.5
    slope = fit.emtrends("a", "x", at={"x": at}).table["estimate"]
    params = fit.params
    base = params["np.log(x + 10)"] + np.array([0.0, *params.filter(like=":a[T").to_numpy()])
    np.testing.assert_allclose(slope, base / (at + 10) + 2 * at * params["I(x ** 2)"], rtol=1e-7)


def test_offsets():
    table = references.table("unbalanced")
    inside = jaxreml.fit("y ~ a + x + offset(o) + (1|g)", table)
    outside = jaxreml.fit("y ~ a + x + (1|g)", table, offset="o")
    expected = outside.emmeans("a").table["estimate"]
    np.testing.assert_allclose(inside.emmeans("a").table["estimate"], expected, rtol=1e-9)
    none = inside.emmeans("a", at={"o": 0}, contrast="pairwise")
    np.testing.assert_allclose(none.table["estimate"] + table["o"].mean(), expected, rtol=1e-9)
    np.testing.assert_allclose(
        none.contrasts["estimate"], inside.contrast("a")["estimate"], rtol=1e-9
    )


def test_numbers_as_factors_and_booleans():
    table = references.table("unbalanced").assign(
        flag=lambda d: d["b"] == "b2", code=lambda d: d["a"].str[1].astype(int)
    )
    fit = jaxreml.fit("y ~ C(code)*flag + x + (1|g)", table)
    plain = jaxreml.fit("y ~ a*b + x + (1|g)", table)
    ours = fit.emmeans("code", by="flag", at={"code": [1, 3]}, contrast="pairwise")
    theirs = plain.emmeans("a", by="b", at={"a": ["a1", "a3"]}, contrast="pairwise")
    columns = ["estimate", "std_error", "df", "p_value"]
    np.testing.assert_allclose(ours.table[columns], theirs.table[columns], rtol=1e-5)
    np.testing.assert_allclose(ours.contrasts[columns], theirs.contrasts[columns], rtol=1e-5)
    assert ours.contrasts["contrast"].tolist() == ["code1 - code3"] * 2
    np.testing.assert_allclose(
        fit.anova()["statistic"], plain.anova()["statistic"], rtol=1e-5
    )  # a Boolean is a factor of two levels


def test_contrasts_of_ones_own():
    fit = fitted("cake_factor")
    ends = {"last - first": [-1, 0, 0, 0, 0, 1]}
    own = fit.contrast("temperature", ends, by="recipe", df="kenward-roger", conf_level=0.9)
    pairs = fit.contrast(
        "temperature", "trt.vs.ctrl", by="recipe", df="kenward-roger", conf_level=0.9, adjust="none"
    )
    pairs = pairs[pairs["contrast"] == "temperature225 - temperature175"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own.drop(columns="contrast"), pairs.drop(columns="contrast"))
    means = fit.emmeans("recipe", by="temperature")
    assert len(means.contrast("pairwise", by=(), adjust="none")) == 18 * 17 // 2
    assert means.contrast("trt.vs.ctrlk", adjust="none")["contrast"][0] == "A - C"
    assert "averaged over the levels of: recipe" in str(fit.emmeans("temperature"))


def test_without_an_adjustment_named_the_families_have_their_own():
    means = fitted("machines").emmeans("Machine")
    usual = {"pairwise": "tukey", "eff": "BH", "trt.vs.ctrl": "dunnettx", "consec": "mvt"}
    for kind, adjust in usual.items():
        expected = means.contrast(kind, adjust=adjust)
        pd.testing.assert_frame_equal(means.contrast(kind), expected)
    both = fitted("machines").emmeans("Machine", contrast="pairwise")
    pd.testing.assert_frame_equal(both.contrasts, means.contrast("pairwise"))
    pd.testing.assert_frame_equal(both.table, means.table)


def test_saved_fits_ml_and_singular_ones(tmp_path):
    fit = fitted("machines")
    fit.save(tmp_path / "fit.json")
    loaded = LMMResults.load(tmp_path / "fit.json")
    pd.testing.assert_frame_equal(loaded.anova(), fit.anova())
    pd.testing.assert_frame_equal(loaded.emmeans("Machine").table, fit.emmeans("Machine").table)
    ml = jaxreml.fit("score ~ Machine + (1|Worker)", data("machines"), "ML")
    assert ml.anova().loc["Machine", "den_df"] > 40
    with pytest.raises(ValueError, match="REML"):
        ml.emmeans("Machine", df="kenward-roger")
    singular = jaxreml.fit("Yield ~ 1 + (1|Batch)", data("dyestuff2"))
    table = singular.emmeans("1").table
    assert singular.is_singular and np.isfinite(table[["estimate", "df"]]).all(axis=None)


def test_what_is_estimable_does_not_depend_on_units():
    table = references.table("unbalanced")
    table = table[(table["a"] != "a3") | (table["b"] != "b2")].assign(big=lambda d: d["x"] + 1e7)
    means = jaxreml.fit("y ~ a*b + big + (1|g)", table).emmeans("a", by="b").table
    lost = means[means["reason"] != ""]  # emmeans 1.8.4 gives a figure for this one
    assert lost[["a", "b"]].to_numpy().tolist() == [["a3", "b2"]] and lost["estimate"].isna().all()


def test_what_the_model_makes_constant_is_not_tested():
    fit = jaxreml.fit("y ~ a + x*o + (1|g)", references.table("unbalanced"))
    at = {"x": [0.1, 0.2, 0.3, 0.4]}
    for df in DF.values():
        curved = fit.emmeans("x", at=at, df=df).contrast("poly").iloc[1:]
        slopes = fit.emtrends("x", "x", at=at, df=df, contrast="pairwise").contrasts
        for table in (curved, slopes):
            assert (table["estimate"] == 0).all() and (table["std_error"] == 0).all()
            assert table[["df", "statistic", "p_value"]].isna().all(axis=None)
            assert table["reason"].str.startswith("constant").all()


def test_slopes_of_offsets_count():
    table = references.table("unbalanced")
    inside = jaxreml.fit("y ~ a + x + offset(2 * x) + (1|g)", table).emtrends("1", "x").table
    plain = jaxreml.fit("y ~ a + x + (1|g)", table).emtrends("1", "x").table
    np.testing.assert_allclose(inside["estimate"], plain["estimate"], rtol=1e-6)


def test_refusals(monkeypatch):
    fit = fitted("unbalanced")
    stopped = replace(fit, status=int(Status.MAX_ITERATIONS))
    for call in (stopped.anova, lambda: stopped.emmeans("a")):
        with pytest.raises(DataError, match="no optimum"):
            call()
    for arguments, options, error, message in [
        (("A",), {}, DataError, "'A' is not a variable"),
        (("a",), {"by": "nope"}, DataError, "'nope' is not a variable"),
        (("a",), {"at": {"q": 1}}, DataError, "at: 'q' is not a variable"),
        (("a",), {"at": {"b": "b9"}}, DataError, "'b' has no level 'b9'; it has 'b1', 'b2'"),
        (("a",), {"at": {"x": "much"}}, ValueError, "'x' must be numbers"),
        (("a",), {"at": {"x": []}}, ValueError, "no values for 'x'"),
        (("a",), {"weights": "cells"}, ValueError, "proportional"),
        (("a",), {"conf_level": 95}, ValueError, "conf_level"),
        (("a",), {"df": "kr"}, ValueError, "df must be"),
        (("a",), {"adjust": "tukey"}, ValueError, "all pairwise differences"),
        (("a",), {"adjust": "fdr"}, ValueError, "adjust must be one of"),
        (("a",), {"contrast": "pair"}, ValueError, "must be one of pairwise"),
        (("a",), {"contrast": "tukey"}, ValueError, "adjustments go to adjust="),
        (("a",), {"contrast": {"d": [1, -1]}}, ValueError, "3 coefficients"),
        (("a",), {"contrast": {"d": [1, -1, np.nan]}}, ValueError, "'d' has values that are not"),
        (("a",), {"contrast": {"d": ["a", "b", "c"]}}, ValueError, "'d' must be numbers"),
        (("a",), {"at": ["x"]}, ValueError, "at must be a dict"),
        (("x",), {"contrast": "pairwise"}, DataError, "two means or more"),
    ]:
        with pytest.raises(error, match=message):
            fit.emmeans(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "LARGEST", 1000)
        with pytest.raises(DataError, match="fewer levels of 'x'"):
            fit.emmeans("a", at={"x": np.arange(1000.0)})
    with pytest.raises(DataError, match=r"'a' is not a covariate of the fixed effects; .*: x, z"):
        fit.emtrends("b", "a")
    with pytest.raises(ValueError, match="kind must be"):
        fit.anova("IV")
    rare = jaxreml.fit("y ~ np.log(x + 10) + a + (1|g)", references.table("unbalanced"))
    with pytest.raises(DataError, match="not finite"):
        rare.emmeans("a", at={"x": -10})


def test_adjustments():
    statistic, df = np.array([3.0, np.nan, 2.0, -1.0]), np.full(4, np.inf)
    plain = p_values(statistic, df, "none", 4)
    for adjust in ("bonferroni", "holm", "sidak", "BH"):
        adjusted = p_values(statistic, df, adjust, 4)
        assert np.isnan(adjusted[1]) and np.all(adjusted[[0, 2, 3]] >= plain[[0, 2, 3]])
    np.testing.assert_allclose(
        p_values(statistic, df, "holm", 4)[[0, 2, 3]], np.minimum(1, plain[[0, 2, 3]] * [4, 3, 2])
    )
    tiny = p_values(np.array([12.0, 12.0]), np.full(2, np.inf), "sidak", 2)
    np.testing.assert_allclose(tiny, 2 * 3.55296e-33, rtol=1e-4)
    two = p_values(np.array([2.5, -0.3]), np.array([5.0, 8.0]), "tukey", 2)  # plain t tests
    plain = p_values(np.array([2.5, -0.3]), np.array([5.0, 8.0]), "none", 2)
    np.testing.assert_allclose(two, plain, rtol=1e-8)
    pairs = np.array([[1.0, 0.5, -0.5], [0.5, 1.0, 0.5], [-0.5, 0.5, 1.0]])  # of three means
    for adjust in ("sidak", "bonferroni", "tukey", "dunnettx", "mvt"):
        t = critical_values(0.9, np.array([7.0] * 3), adjust, 3, 3, pairs)
        at_limit = p_values(t, np.array([7.0] * 3), adjust, 3, pairs)
        np.testing.assert_allclose(at_limit, 0.1, rtol=1e-6)  # p = 1 - level
    statistic, df = np.array([1.0, -2.5, 8.0]), np.array([4.0, 6.5, 20.0])
    by_range = p_values(statistic, df, "tukey", 3)
    np.testing.assert_allclose(p_values(statistic, df, "mvt", 3, pairs), by_range, rtol=1e-3)
    same = np.ones((3, 3))  # one test, three times; and one, beside others without an estimate
    plain = p_values(statistic, df, "none", 3)
    np.testing.assert_allclose(p_values(statistic, df, "mvt", 3, same), plain, rtol=1e-9)
    alone = np.diag([1.0, np.nan, np.nan])
    found = p_values(np.array([1.0, np.nan, np.nan]), df, "mvt", 3, alone)
    np.testing.assert_allclose(found, [plain[0], np.nan, np.nan], rtol=1e-9)


def test_tables_are_named_by_position_too():
    means = fitted("machines").emmeans("Machine", contrast="pairwise")
    for write in (means.to_html, means.to_markdown, means.to_latex):
        assert write("contrasts") == write(table="contrasts") != write()
    with pytest.raises(ValueError, match="contrasts"):
        means.to_html("means.html")
