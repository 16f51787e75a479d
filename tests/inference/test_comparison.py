"""Comparison of fits: lme4's figures, distributions on the boundary, nesting, refusals."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import references
from fits import fitted_to
from scipy.stats import chi2

import jaxreml
from jaxreml import ConvergenceWarning, DataError, LMMResults
from jaxreml.data.frame import model_frame
from jaxreml.inference.likelihood import nesting
from jaxreml.inference.likelihood.comparison import TESTS, Pair

CHAINS = json.loads((references.HERE / "inference" / "comparison.json").read_text())
SLEEP = "Reaction ~ Days + "


def fitted(formula: str, dataset: str = "sleepstudy", method: str = "ML") -> LMMResults:
    return fitted_to(dataset, formula, method)


@pytest.mark.parametrize("name", CHAINS)
def test_figures_of_anova(name):
    chain = CHAINS[name]
    # lme4's refit=TRUE is by ML: these are fits by ML from the start, or by REML not refitted
    method = "ML" if chain["refit"] else "REML"
    formulas = chain["formulas"]
    fits = [fitted(formula, chain["data"], method) for formula in formulas]
    table = jaxreml.compare(*fits[::-1], refit=chain["refit"])
    assert list(table["formula"]) == [formula.replace("^", "**") for formula in formulas]
    assert list(table.index) == [f"fit {k}" for k in range(len(fits), 0, -1)]
    expected = pd.DataFrame(chain["table"]).rename(
        columns={"Chisq": "chisq", "Df": "df", "Pr(>Chisq)": "p_value"}
    )
    for column in expected.columns.drop("model"):
        np.testing.assert_allclose(
            table[column], expected[column].astype(float), rtol=1e-6, atol=1e-6, err_msg=column
        )
    assert not table["note"].str.contains("no test").any()


def test_fits_by_reml_are_refitted_by_ml():
    fits = [
        fitted(f"{right} + (1 | Batch)", "Dyestuff2", "REML")
        for right in ("Yield ~ 1", "Yield ~ x")
    ]
    table = jaxreml.compare(*fits, names=("null", "x"))
    assert list(table.index) == ["null", "x"]
    assert list(table["note"]) == ["refitted by ML"] * 2
    row = CHAINS["dyestuff2"]["table"][1]
    assert table.loc["x", "p_value"] == pytest.approx(row["Pr(>Chisq)"], rel=1e-6)
    with pytest.raises(ValueError, match="fit 1 and fit 2 have different fixed effects"):
        jaxreml.compare(*fits, refit=False)
    with pytest.raises(ValueError, match=r"by REML and by ML cannot.*fit 1: REML, fit 2: ML"):
        jaxreml.compare(fits[0], fitted("Yield ~ x + (1 | Batch)", "Dyestuff2"), refit=False)


def test_restricted_likelihoods_do_not_depend_on_the_columns_of_x():
    small, large = (
        fitted(SLEEP + term, method="REML") for term in ("(1 | Subject)", "(Days | Subject)")
    )
    other = fitted("Reaction ~ 0 + I(Days + 3) + I(50 * Days) + (1 | Subject)", method="REML")
    assert abs(other.criterion - small.criterion) > 1
    expected = jaxreml.compare(small, large, refit=False)
    table = jaxreml.compare(other, large, refit=False)
    columns = ["chisq", "df", "p_value", "AIC_weight"]
    np.testing.assert_allclose(table[columns], expected[columns], rtol=1e-7)


# The mixture


def mixture(*fits):
    return jaxreml.compare(*fits, method="mixture")


def test_mixtures_of_chi_squared():
    one, two, full = (
        fitted(SLEEP + term) for term in ("(1 | Subject)", "(Days || Subject)", "(Days | Subject)")
    )
    row = mixture(one, two).iloc[1]  # a variance
    assert row["p_value"] == pytest.approx(chi2.sf(row["chisq"], 1) / 2)
    row = mixture(one, full).iloc[1]  # a variance with a covariance (Stram and Lee's case 2)
    expected = (chi2.sf(row["chisq"], 1) + chi2.sf(row["chisq"], 2)) / 2
    assert (row["df"], row["p_value"]) == (2, pytest.approx(expected))
    null = fitted("Reaction ~ 1 + (1 | Subject)")  # and a fixed effect
    row = mixture(null, full).iloc[1]
    expected = (chi2.sf(row["chisq"], 2) + chi2.sf(row["chisq"], 3)) / 2
    assert (row["df"], row["p_value"]) == (3, pytest.approx(expected))


def test_where_the_mixture_does_not_apply():
    one, two, full = (
        fitted(SLEEP + term) for term in ("(1 | Subject)", "(Days || Subject)", "(Days | Subject)")
    )
    table = mixture(one, two, full)
    assert np.isfinite(table["p_value"].iloc[1]) and np.isnan(table["p_value"].iloc[2])
    assert "no variance is tested on its boundary" in table["note"].iloc[2]
    intercept = fitted("Reaction ~ 1 + (Days | Subject)")
    assert "no variance is tested" in mixture(intercept, full)["note"].iloc[1]
    two_more = Pair(one, full, 1.0, 2, nesting.Step(on_boundary=True, one_effect=False))
    p_value, note = TESTS["mixture"](two_more)
    assert np.isnan(p_value) and "one random effect more" in note
    p_value, note = TESTS["chi2"](two_more)
    assert p_value == pytest.approx(chi2.sf(1.0, 2)) and note.endswith(": conservative")


def test_a_variance_estimated_at_zero_has_p_value_one():
    frame = references.table("sleepstudy")
    frame["half"] = np.random.default_rng(0).permutation(np.tile(["a", "b", "c"], 60))
    small = jaxreml.fit(SLEEP + "(1 | Subject)", frame, "ML")
    large = jaxreml.fit(SLEEP + "(1 | Subject) + (1 | half)", frame, "ML")
    assert large.is_singular
    row = mixture(small, large).iloc[1]
    assert (row["chisq"], row["p_value"]) == (0, 1)
    step = nesting.Step(on_boundary=True, one_effect=True)
    p_value, note = TESTS["mixture"](Pair(large, small, 1.0, 1, step))
    assert np.isnan(p_value)
    assert "itself on the boundary, as the variance of (Intercept) of half is zero" in note


# Nesting

NESTED = [
    ("sleepstudy", "Reaction ~ 1 + (1 | Subject)", "Reaction ~ Days + (1 | Subject)", False, False),
    ("sleepstudy", SLEEP + "(1 | Subject)", SLEEP + "(Days | Subject)", True, True),
    ("sleepstudy", SLEEP + "(Days || Subject)", SLEEP + "(Days | Subject)", False, False),
    ("sleepstudy", SLEEP + "(0 + Days | Subject)", SLEEP + "(Days | Subject)", True, True),
    ("sleepstudy", SLEEP + "(0 + I(Days - 2) | Subject)", SLEEP + "(Days | Subject)", True, True),
    ("sleepstudy", SLEEP + "(1 | Subject)", SLEEP + "(Days + I(Days**2) | Subject)", True, False),
    ("sleepstudy", SLEEP + "(Days | Subject)", SLEEP + "(Days | Subject) + (1 | Days)", True, True),
    ("sleepstudy", "Reaction ~ Days + offset(3 * Days) + (1 | Subject)", SLEEP + "(Days | Subject)",
     True, True),
    ("machines", "score ~ Machine + (1 | Worker) + (1 | Worker:Machine)",
     "score ~ Machine + (0 + Machine | Worker)", False, False),
    ("machines", "score ~ Machine + (1 | Worker:Machine)",
     "score ~ Machine + (Machine | Worker)", False, False),
    ("machines", "score ~ Machine + (1 | Worker)", "score ~ Machine + (1 | Worker/Machine)",
     True, True),
    ("pastes", "strength ~ 1 + (1 | sample)", "strength ~ 1 + (1 | batch/cask)", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "small", "large", "on_boundary", "one_effect"), NESTED)
def test_nested_models(dataset, small, large, on_boundary, one_effect):
    first, second = (model_frame(formula, references.table(dataset)) for formula in (small, large))
    assert nesting.mean_obstacle(first, second) == ""
    assert nesting.random_obstacle(first, second) == ""
    assert nesting.step(first, second) == (on_boundary, one_effect)
    backwards = nesting.mean_obstacle(second, first) or nesting.random_obstacle(second, first)
    assert backwards != ""


def crossed_covariates() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"g": np.repeat(np.arange(8), 6), "f": np.tile(list("uuuvvv"), 8)})
    frame["s"] = np.where(frame["g"] % 2, "p", "q")
    frame[["y", "a", "b", "c"]] = rng.normal(size=(48, 4))
    for column, level in (("s", "p"), ("s", "q"), ("f", "u"), ("f", "v")):
        frame[level] = (frame[column] == level).astype(float)
    return frame


@pytest.mark.parametrize(
    ("small", "large", "on_boundary", "one_effect"),
    [
        ("(b + c || g)", "(a + b + c || g)", True, True),
        ("(0 + a + b + c || g)", "(a + b + c || g)", True, True),
        ("(1 | g)", "(a + b || g)", True, False),
        ("(a || g) + (1 | f)", "(a + b || g) + (1 | f)", True, True),
        ("(a || g)", "(a | g)", False, False),
        # A variance for each kind of level
        ("(1 | g)", "(0 + p + q || g)", False, False),
        ("(1 | g:f)", "(0 + u + v || g)", False, False),
        ("(a | g)", "(0 + p + p:a | g) + (0 + q + q:a | g)", False, False),
        ("(1 | g)", "(0 + p | g) + (0 + q | g) + (0 + a | g)", True, False),
    ],
)
def test_nested_models_with_several_terms_on_a_factor(small, large, on_boundary, one_effect):
    frame = crossed_covariates()
    first, second = (model_frame(f"y ~ 1 + {terms}", frame) for terms in (small, large))
    assert nesting.random_obstacle(first, second) == ""
    assert nesting.step(first, second) == (on_boundary, one_effect)
    assert nesting.random_obstacle(second, first) != ""


def test_a_piece_missing_is_not_nested():
    frame = crossed_covariates()
    for small, large in (
        ("(1 | g)", "(0 + p | g) + (0 + a | g)"),
        ("(1 | g)", "(0 + u + v || g)"),  # effects of one level are not independent
        ("(a | g)", "(0 + p | g) + (0 + q | g)"),
    ):
        first, second = (model_frame(f"y ~ 1 + {terms}", frame) for terms in (small, large))
        assert "is a case of none" in nesting.random_obstacle(first, second)


@pytest.mark.parametrize(
    ("dataset", "small", "large", "reason"),
    [
        ("sleepstudy", "Reaction ~ I(Days**2) + (1 | Subject)", SLEEP + "(1 | Subject)",
         r"I\(Days \*\* 2\) are not among"),
        ("sleepstudy", SLEEP + "(1 | Subject)", SLEEP + "(0 + Days | Subject)",
         r"\(\(Intercept\) \| Subject\) is a case of none"),
        ("sleepstudy", SLEEP + "(Days | Subject)", SLEEP + "(Days || Subject)",
         r"\(\(Intercept\) \+ Days \| Subject\) is a case of none"),
        ("sleepstudy", SLEEP + "(1 | Subject)", SLEEP + "(1 | Days)", "Subject"),
        ("sleepstudy", "Reaction ~ Days + offset(Days**2) + (1 | Subject)", SLEEP + "(1 | Subject)",
         "offset is not that"),
        ("machines", "score ~ 1 + (1 | Worker)", "score ~ 1 + (1 | Worker:Machine)", "Worker"),
        ("machines", "score ~ 1 + (1 | Worker:Machine)", "score ~ 1 + (1 | Worker)", "Machine"),
        ("machines", "score ~ 1 + (Machine | Worker)",
         "score ~ 1 + (1 | Worker) + (1 | Worker:Machine)", "Worker"),
    ],
)  # fmt: skip
def test_models_that_are_not_nested(dataset, small, large, reason):
    first, second = (model_frame(formula, references.table(dataset)) for formula in (small, large))
    obstacle = nesting.mean_obstacle(first, second) or nesting.random_obstacle(first, second)
    assert re.search(reason, obstacle)


def test_models_that_are_not_nested_have_information_criteria_only():
    first = fitted("Reaction ~ 1 + (Days | Subject)")
    second = fitted(SLEEP + "(1 | Subject)")
    table = jaxreml.compare(first, second, names=["slopes", "trend"])
    assert list(table.index) == ["trend", "slopes"]
    row = table.loc["slopes"]
    assert row[["chisq", "df", "p_value"]].isna().all()
    assert row["note"] == (
        "no test against trend: not nested, its fixed effects Days are not among the larger model's"
    )
    np.testing.assert_allclose(table["AIC"], [second.aic, first.aic])
    assert table["AIC_weight"].sum() == pytest.approx(1)
    same = jaxreml.compare(second, second)
    assert same["note"].iloc[1] == "no test against fit 1: as many parameters"


# Refusals


def test_different_data_are_refused():
    first = fitted(SLEEP + "(1 | Subject)")
    frame = references.table("sleepstudy")
    frame.loc[4, "Reaction"] = np.nan
    fewer = jaxreml.fit(SLEEP + "(1 | Subject)", frame, "ML")
    with pytest.raises(DataError, match=r"different rows, 180 and 179 \(0 and 1 dropped"):
        jaxreml.compare(first, fewer)
    log = jaxreml.fit(
        "np.log(Reaction) ~ Days + (1 | Subject)", references.table("sleepstudy"), "ML"
    )
    with pytest.raises(DataError, match=r"fit 1 and log have different responses, 249.56 and 5\.5"):
        jaxreml.compare(first, log, names=["fit 1", "log"])
    weights = np.linspace(1, 2, 180)
    weighted = jaxreml.fit(
        SLEEP + "(1 | Subject)", references.table("sleepstudy"), "ML", weights=weights
    )
    with pytest.raises(DataError, match="different weights"):
        jaxreml.compare(first, weighted)


def test_arguments():
    fit = fitted(SLEEP + "(1 | Subject)")
    with pytest.raises(ValueError, match="two or more"):
        jaxreml.compare(fit)
    with pytest.raises(ValueError, match="argument 2 is 'ML'"):
        jaxreml.compare(fit, "ML")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 names for 2 fits"):
        jaxreml.compare(fit, fit, names=["a"])
    with pytest.raises(ValueError, match='one of "chi2", "mixture", "bootstrap", not \'lrt\''):
        jaxreml.compare(fit, fit, method="lrt")
    with pytest.warns(ConvergenceWarning):
        stopped = jaxreml.fit(
            SLEEP + "(1 | Subject)", references.table("sleepstudy"), "ML", max_iterations=1
        )
    with pytest.raises(DataError, match=r"compare fit 2, .*has no optimum .the iteration limit"):
        jaxreml.compare(fit, stopped)


def test_loaded_fits_compare_alike(tmp_path):
    fits = [fitted(SLEEP + term) for term in ("(1 | Subject)", "(Days | Subject)")]
    for k, fit in enumerate(fits):
        fit.save(tmp_path / f"{k}.json")
    loaded = [LMMResults.load(tmp_path / f"{k}.json") for k in range(2)]
    pd.testing.assert_frame_equal(jaxreml.compare(*fits), jaxreml.compare(*loaded))


def test_bootstrap_of_a_variance_on_its_boundary():
    """The simulated null has the mixture's p-value, half of chi2's, within Monte Carlo error."""
    table = jaxreml.datasets.load("sleepstudy")
    one = jaxreml.fit("Reaction ~ Days + (1 | Subject)", table, "ML")
    two = jaxreml.fit("Reaction ~ Days + (1 | Subject) + (0 + x | Subject)",
                      table.assign(x=np.tile([1.0, -1.0, 0.5, 0.0, 2.0], 36)), "ML")  # fmt: skip
    simulated = jaxreml.compare(one, two, method="bootstrap", nsim=2000, seed=3).iloc[1]
    mixture = jaxreml.compare(one, two, method="mixture").iloc[1]
    assert simulated["chisq"] == pytest.approx(mixture["chisq"])
    assert abs(simulated["p_value"] - mixture["p_value"]) < 0.06
    assert "Monte Carlo error" in simulated["note"]
