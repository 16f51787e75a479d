"""drop1, ranova, step, joint tests and nested factors against lmerTest's and emmeans' figures."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from fits import fitted_to
from references import HERE, table

import jaxreml
from jaxreml import DataError
from jaxreml.inference.fixed.nested import find_nesting
from jaxreml.inference.selection.reduction import model_of
from jaxreml.results.tables import abbreviated

DELETION = json.loads((HERE / "inference" / "deletion.json").read_text())
NESTING = json.loads((HERE / "inference" / "nesting.json").read_text())
RATIO = {"npar": "npar", "logLik": "logLik", "AIC": "AIC", "chisq": "LRT", "df": "Df",
         "p_value": "Pr(>Chisq)"}  # fmt: skip
F = {"sum_sq": "Sum Sq", "mean_sq": "Mean Sq", "num_df": "NumDF", "den_df": "DenDF",
     "statistic": "F value", "p_value": "Pr(>F)"}  # fmt: skip


def same(ours: pd.DataFrame, rows: list, columns: dict[str, str], rtol: float = 2e-4) -> None:
    """A table with R's figures; their optimum is not quite one, which the tolerance covers."""
    theirs = pd.DataFrame(rows)
    if not len(theirs):
        assert not len(ours)
        return
    # R makes repeated labels distinct by numbers, and has cask:batch before batch
    labels = sorted(
        (term.replace("^", " ** ").rstrip("123"), k) for k, term in enumerate(theirs["term"])
    )
    own = sorted((term.rstrip("123"), k) for k, term in enumerate(ours.index))
    assert [label for label, _ in own] == [label for label, _ in labels]
    ours, theirs = ours.iloc[[k for _, k in own]], theirs.iloc[[k for _, k in labels]]
    for column, other in columns.items():
        if other in theirs:
            expected = pd.to_numeric(theirs[other]).to_numpy(float)
            scale = 1e-5 if column in ("chisq", "logLik", "AIC") else 1e-12
            np.testing.assert_allclose(
                ours[column].to_numpy(float), expected, rtol=rtol, atol=scale, err_msg=column
            )


CASES = [f"{case['data']}: {case['formula']}" for case in DELETION]


@pytest.mark.parametrize("case", DELETION, ids=CASES)
def test_drop1_is_lmertests(case):
    fit = fitted_to(case["data"], case["formula"])
    same(fit.drop1(), case["F"], F)
    same(fit.drop1(df="kenward-roger"), case["kenward_roger"], F)


@pytest.mark.parametrize("case", DELETION, ids=CASES)
def test_ranova_is_lmertests(case):
    fit = fitted_to(case["data"], case["formula"])
    same(fit.ranova(), case["ranova"], RATIO)
    same(fit.ranova(reduce_terms=False), case["whole"], RATIO)


@pytest.mark.parametrize(
    "case", [c for c in DELETION if c["chi2"] and c["F"]], ids=lambda c: c["formula"]
)
def test_likelihood_ratios_of_fixed_effects_are_lme4s(case):
    fit = fitted_to(case["data"], case["formula"])
    ours, theirs = fit.drop1(test="chi2"), pd.DataFrame(case["chi2"])
    assert list(ours.index) == [term.replace("^", " ** ") for term in theirs["term"]]
    np.testing.assert_allclose(ours["AIC"], theirs["AIC"], rtol=1e-6)
    if "LRT" in theirs:
        np.testing.assert_allclose(ours["chisq"], theirs["LRT"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours["p_value"], theirs["Pr(Chi)"], rtol=1e-3)
        np.testing.assert_allclose(ours["df"].iloc[1:], theirs["npar"].iloc[1:])


@pytest.mark.parametrize("case", [c for c in DELETION if c["step"]], ids=lambda c: c["formula"])
def test_step_is_lmertests(case):
    found = fitted_to(case["data"], case["formula"]).step()
    expected = case["step"]
    same(found.random, expected["random"], {"eliminated": "Eliminated", **RATIO})
    least_squares = "|" not in expected["formula"]
    columns = {} if least_squares else {"eliminated": "Eliminated", **F}
    same(found.fixed, expected["fixed"], columns)
    assert (found.fit is None) == least_squares
    if found.fit is not None:
        assert found.fit.formula == found.formula
    assert found.formula in str(found)


def test_a_formula_taken_apart_is_the_same_model():
    frame = table("sleepstudy").rename(columns={"Days": "days awake"})
    frame["z"] = np.linspace(0, 1, 180) ** 2
    fit = jaxreml.fit(
        "np.log(Reaction) ~ `days awake` * z + offset(z / 10) + (`days awake` | Subject)"
        " + (0 + z || Subject)",
        frame, weights=1 + frame["z"],
    )  # fmt: skip
    model = model_of(fit)
    assert [bar.label for bar in model.bars] == ["(`days awake` | Subject)", "(0 + z | Subject)"]
    assert model.droppable == ["`days awake`:z"]
    again = fit.frame_of(model.formula)
    np.testing.assert_allclose(again.X, fit.frame.X)
    np.testing.assert_allclose(again.offset, fit.frame.offset)
    np.testing.assert_allclose(again.weights, fit.frame.weights)
    for ours, theirs in zip(again.terms, fit.frame.terms, strict=True):
        np.testing.assert_allclose(ours.effects, theirs.effects)


def test_scope_and_arguments():
    fit = fitted_to("orthodont", "distance ~ age * Sex + (age | Subject)")
    with pytest.raises(DataError, match="'age' cannot be dropped: other terms contain it"):
        fit.drop1("age")
    with pytest.raises(DataError, match="no such term; terms that can be are: age:Sex"):
        fit.drop1(["height"])
    with pytest.raises(ValueError, match="test must be"):
        fit.drop1(test="t")
    with pytest.raises(ValueError, match="alpha_random must be between"):
        fit.step(alpha_random=2)
    with pytest.raises(DataError, match="keep: the model has no term 'height'"):
        fit.step(keep="height")
    kept = fit.step(reduce_random=False, reduce_fixed=False)
    assert kept.fit is fit
    assert (kept.fixed["eliminated"] == 0).all()


# Joint tests


@pytest.mark.parametrize(
    "case", NESTING["joint"], ids=lambda case: f"{case['formula']} by {case['by']} {case['ddf']}"
)
def test_joint_tests_are_emmeans(case):
    formula = case["formula"].replace("country/region", "country + country:region")
    df = {"asymptotic": "inf"}.get(case["ddf"], case["ddf"])
    ours = fitted_to(case["data"], formula).joint_tests(case["by"], df=df)
    theirs = pd.DataFrame(case["table"])
    if case["by"]:  # emmeans has each level's rows together
        ours = ours.sort_values(case["by"], kind="stable")
        theirs = theirs.sort_values(case["by"], kind="stable")
        assert list(ours[case["by"]]) == list(theirs[case["by"]])
    ours, theirs = ours.sort_values("term"), theirs.sort_values("term")
    assert list(ours["term"]) == list(theirs["term"])
    assert list(ours["num_df"]) == list(theirs["num_df"])
    den_df = pd.to_numeric(theirs["den_df"], errors="coerce").fillna(np.inf)
    np.testing.assert_allclose(ours["den_df"], den_df, atol=0.011)  # rounded by emmeans
    np.testing.assert_allclose(ours["statistic"], theirs["statistic"], atol=0.0011)
    np.testing.assert_allclose(ours["p_value"], theirs["p_value"], rtol=3e-3, atol=1e-12)
    assert ("reason" in ours) == ("note" in theirs)


def test_joint_tests_refuse():
    fit = fitted_to("machines", "score ~ Machine + (1 | Worker)")
    with pytest.raises(DataError, match=r"by='machine' is not a variable.*'Machine'"):
        fit.joint_tests("machine")
    with pytest.raises(DataError, match="no variables of several values"):
        fit.joint_tests("Machine")


# Nested factors


@pytest.mark.parametrize(
    "case", NESTING["means"], ids=lambda c: f"{c['formula']} {c['specs']} {c['by']} {c['weights']}"
)
def test_means_of_nested_factors_are_emmeans(case):
    formula = case["formula"].replace("country/region", "country + country:region")
    fit = fitted_to("nested", formula)
    specs, by = case["specs"], (case["by"] or [None])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        means = fit.emmeans(specs, by, weights=case["weights"])
    assert "%in%" in str(means)
    contrasts = means.contrast("pairwise")
    for ours, theirs in ((means.table, case["means"]), (contrasts, case["contrasts"])):
        theirs = pd.DataFrame(theirs)
        labels = [name for name in theirs if name not in ("estimate", "std_error", "df", "p_value")]
        order = [name for name in labels if name in ours]
        assert order == labels
        ours, theirs = ours.sort_values(order), theirs.sort_values(order)
        assert (ours[order].to_numpy(str) == theirs[order].to_numpy(str)).all()
        # by a nested factor R's p-values are adjusted over all its levels, not within them
        figures = ["estimate", "std_error", "df", *([] if by else ["p_value"])]
        for name in figures:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_which_factors_are_nested():
    cells = table("nested")[["state", "country", "region", "t"]].drop_duplicates()
    effects = {frozenset(), frozenset({"country"}), frozenset({"state"}), frozenset({"t"})}
    main = effects | {frozenset({"region"})}
    assert find_nesting(cells, main) == {"state": ("country",)}
    within = effects | {frozenset({"state", "region"})}
    assert find_nesting(cells, within) == {"state": ("country",), "region": ("country", "state")}
    alike = pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert find_nesting(alike, {frozenset({"a"}), frozenset({"b"})}) == {"a": ("b",)}


# What is printed


def test_notes_of_means():
    fit = fitted_to("cake", "angle ~ recipe * temperature + (1 | recipe:replicate)")
    with pytest.warns(UserWarning, match="misleading due to involvement in interactions: recipe:t"):
        means = fit.emmeans("recipe", contrast="pairwise", df="kenward-roger", conf_level=0.9)
    text = str(means)
    for line in (
        "NOTE: Results may be misleading due to involvement in interactions: recipe:temperature",
        "Results are averaged over the levels of: temperature",
        "Degrees-of-freedom method: kenward-roger",
        "Confidence level used: 0.9",
        "adjustment: tukey method for comparing a family of 3 estimates",
    ):
        assert line in text
    assert "tukey" not in "".join(means.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both = fit.emmeans(["recipe", "temperature"], df="inf")
    assert both.notes == ("Degrees-of-freedom method: asymptotic", "Confidence level used: 0.95")
    adjusted = fit.emmeans("temperature", by="recipe", contrast="consec", adjust="holm")
    assert adjusted.contrast_notes[-1].endswith("holm method for 5 tests")


def test_short_names_are_distinct():
    names = ["(Intercept)", "recipe[T.B]", "recipe[T.C]", "temperature[T.185]",
             "temperature[T.195]", "recipe[T.B]:temperature[T.185]", "measurement_one",
             "measurement_two"]  # fmt: skip
    assert abbreviated(names, 6) == [
        "(Intr)", "r[T.B]", "r[T.C]", "t[T.185]", "t[T.195]", "r[T.B]:t[T.185]", "msrm_o", "msrm_t"
    ]  # fmt: skip
    assert len(set(abbreviated([f"x{k:03d}_long" for k in range(200)], 6))) == 200
    fit = fitted_to("cake", "angle ~ recipe * temperature + (1 | recipe:replicate)")
    header = fit.summary().split("Correlation of Fixed Effects:\n")[1].splitlines()[0].split()
    assert len(set(header)) == len(header) == 17


def test_a_fit_is_loaded_from_the_top(tmp_path):
    fit = fitted_to("machines", "score ~ Machine + (1 | Worker)")
    fit.save(tmp_path / "fit.json")
    assert jaxreml.load(tmp_path / "fit.json").params.equals(fit.params)
