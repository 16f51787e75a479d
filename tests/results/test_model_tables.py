"""Tables of fits, side by side and alone, and what notebooks show."""

# ruff: noqa: RUF001 (true minus signs and Greek letters are what is tested)

from __future__ import annotations

import copy
import inspect
import pydoc
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from fits import fitted, fitted_to

import jaxreml
from jaxreml.inference.parameters import ratios
from jaxreml.inference.parameters.shares import shares
from jaxreml.results.displays import FIRST


def rows_of(table):
    return {row[0]: [c.strip("\u2007\u2008") for c in row[1:]]
            for section in table.sections for row in section.rows}  # fmt: skip


def by_header(table, label):
    return dict(zip([c.header for c in table.columns][1:], rows_of(table)[label], strict=True))


def test_the_model_table_has_the_numbers_of_the_fit():
    fit = fitted("sleep_corr")
    made = jaxreml.model_table(fit, df="kenward-roger")
    row = by_header(made, "Days")
    (b, se, df, t, _), (low, high) = (
        frame.loc["Days"] for frame in (
            fit.coefficients("kenward-roger"), fit.conf_int(df="kenward-roger"))
    )  # fmt: skip
    assert row == {"Estimate": f"{b:.2f}", "SE": f"{se:.2f}", "95% CI": f"[{low:.2f}, {high:.2f}]",
                   "t": f"{t:.2f}", "df": f"{df:.1f}", "p": "< .001"}  # fmt: skip
    parameters = fit.variance_parameters()
    for label, name in (
        ("Subject: SD of Days", "sd_Days|Subject"), ("Residual SD", "sigma"),
        ("Subject: correlation of (Intercept), Days", "cor_Days.(Intercept)|Subject"),
    ):  # fmt: skip
        own, found = parameters.loc[name], by_header(made, label)
        assert found["Estimate"] == f"{own['estimate']:.2f}"
        assert found["SE"] == f"{own['std_error']:.2f}" and found["t"] == found["p"] == ""
        limits = f"[{own['lower']:.2f}, {own['upper']:.2f}]".replace("-", "−")
        assert found["95% CI"] == limits
    rows = rows_of(made)
    assert rows["Observations"][0] == "180" and rows["Groups: Subject"][0] == "18"
    assert rows_of(made)["Log-likelihood"][0] == f"−{-fit.llf:.2f}"
    assert made.notes[0] == "Reaction ~ Days + (Days | Subject), fitted by REML"
    assert "Kenward and Roger's" in made.notes[1]


@pytest.mark.parametrize("name", ["sleep_unc", "pastes"])
def test_icc_and_r2_are_those_of_the_delta_method(name):
    fit = fitted(name)
    groups = list(fit.ngroups)
    found = shares(fit, ratios.icc(groups, None) | ratios.r2(groups))
    whole = pd.concat([fit.icc(), fit.r2()])["estimate"]
    np.testing.assert_allclose(list(found.values()), whole, rtol=1e-10)


def test_models_side_by_side_share_rows():
    small = fitted_to("sleepstudy", "Reaction ~ Days + (1 | Subject)", "ML")
    large = fitted("sleep_corr")
    made = jaxreml.model_table([small, large], names=["ML", "REML"], stars=True)
    assert [(own.header, own.start, own.stop) for own in made.spanners] == [
        ("ML", 1, 3), ("REML", 3, 5)]  # fmt: skip
    rows = rows_of(made)
    assert rows["Days"] == ["10.47***", "0.80", "10.47***", "1.55"]
    assert rows["Subject: SD of Days"] == ["", "", "5.92", "1.25"]
    random = [row[0] for row in made.sections[1].rows]
    assert random[-1] == "Residual SD" and len(random) == 4
    assert made.notes[:2] == ("ML: Fitted by maximum likelihood", "REML: Fitted by REML")
    assert made.notes[-1] == "* p < .05, ** p < .01, *** p < .001"


def test_parts_columns_and_names_are_chosen():
    fit = fitted("sleep_corr")
    asked = {"columns": ["p_value", "estimate"], "parts": "fixed", "digits": 1, "df": "inf"}
    made = jaxreml.model_table(fit, **asked, rename={"Days": "Days_awake"}, note="Mine")
    assert [c.header for c in made.columns] == ["", "p", "Estimate"]
    assert rows_of(made) == {"(Intercept)": ["< .001", "251.4"], "Days_awake": ["< .001", "10.5"]}
    assert made.notes[-1] == "Mine" and r"Days\_awake" in made.to_latex()
    assert [c.header for c in jaxreml.model_table(fit, df="inf").columns][4] == "z"
    for arguments, message in (
        ({"columns": ["t"]}, "columns must be among"), ({"parts": []}, "parts must be among"),
        ({"names": ["a", "b"]}, "2 names for 1 fits"), ({"conf_level": 2}, "conf_level"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jaxreml.model_table(fit, **arguments)
    with pytest.raises(ValueError, match="one fit or more"):
        jaxreml.model_table()
    with pytest.raises(ValueError, match="takes fits"):
        jaxreml.model_table(fit, pd.DataFrame())


def test_the_other_tables_of_a_fit():
    fit = fitted("sleep_corr")
    random = fit.to_markdown("random_effects", note="More")
    assert "|   612.09 | 24.74 |" in random and "|        0.07 |" in random
    assert random.endswith("*Note.* 95% confidence intervals from the log scale. More.\n")
    assert "| 30031.01 |" in fit.to_markdown("anova", kind="I")
    assert fit.to_latex(caption="A & B", label="tab:a").count(r"\caption{A \& B}") == 1
    assert "Marginal R²" in fit.to_html() and "R$^2$" in fit.to_latex()
    with pytest.raises(ValueError, match='table must be one of "model"'):
        fit.to_latex("fixed")


def test_correlations_of_four_effects_are_a_triangle():
    fit = fitted("q4")
    rows = fit.to_markdown("random_effects").splitlines()[2:]
    cov = fit.cov_re_arrays[0]
    sd = np.sqrt(np.diagonal(cov))
    expected = [f"{value:.2f}".replace("-", "−") for value in (cov[3] / sd[3] / sd)[:3]]
    assert [cell.strip() for cell in rows[3].strip("|").split("|")][-3:] == expected
    assert [cell.strip() for cell in rows[0].strip("|").split("|")][-3:] == ["", "", ""]


def test_a_singular_fit_says_so_and_one_without_rows_has_no_r2(tmp_path):
    singular = fitted("dyestuff2")
    made = jaxreml.model_table(singular)
    assert by_header(made, "Batch: SD of (Intercept)") == {
        "Estimate": "0.00", "SE": "", "95% CI": "", "t": "", "df": "", "p": ""}  # fmt: skip
    assert any(note.startswith("Singular: ") for note in made.notes)
    path = tmp_path / "fit.json"
    singular.save(path, data=False)
    loaded = rows_of(jaxreml.model_table(jaxreml.load(path)))
    assert "ICC" in rows_of(made) and "ICC" not in loaded
    assert loaded == {k: v for k, v in rows_of(made).items() if k in loaded}


def test_a_fit_without_an_optimum_says_so():
    fit = replace(fitted("sleep_corr"), status=int(jaxreml.Status.MAX_ITERATIONS))
    text = fit.to_markdown()
    assert "NOT CONVERGED" in text and "Marginal" not in text


def test_an_effect_is_reported_in_words():
    fit = fitted("sleep_corr")
    assert fit.report("Days", df="inf", conf_level=None).startswith(
        "b = 10.47, SE = 1.55, z = 6.77"
    )
    curved = fitted_to("sleepstudy", "Reaction ~ Days + I(Days**2) + (1 | Subject)")
    name = curved.fixed_names[-1]
    row = curved.coefficients().loc[name]
    assert 0.001 < row["p_value"] < 0.999
    test = f"t({row['df']:.1f}) = {row['statistic']:.2f}, p = {row['p_value']:.3f}"
    assert curved.report(name).endswith(test.replace("p = 0.", "p = .").replace("-", "−"))
    with pytest.raises(jaxreml.DataError, match=r"no fixed effect 'Day'.*Days"):
        fit.report("Day")


def test_the_summary_has_intervals_when_asked_and_no_stars_when_not():
    fit = fitted("sleep_corr")
    lines = fit.summary("residual", conf_level=0.9, show_stars=False).splitlines()
    head = next(k for k, line in enumerate(lines) if "Std. Error  " in line and "t value" in line)
    low, high = fit.conf_int(0.9, "residual").loc["Days"]
    assert lines[head].split()[3:7] == ["5", "%", "95", "%"]
    found = lines[head + 2].split()
    np.testing.assert_allclose([float(x) for x in found[3:5]], [low, high], rtol=0, atol=5e-3)
    assert not any("*" in line for line in lines) and "***" in fit.summary()
    with pytest.raises(ValueError, match="conf_level"):
        fit.summary(conf_level=95)


def test_copies_have_the_same_tables():
    fit = fitted("sleep_corr")
    for other in (copy.copy(fit), copy.deepcopy(fit), replace(fit)):
        assert other.to_latex() == fit.to_latex() and repr(other) == repr(fit)


def test_means_profiles_and_bootstraps_are_tables():
    fit = fitted("sleep_corr")
    means = fit.emmeans("Days", at={"Days": [0, 9]}, contrast="pairwise", conf_level=0.9)
    root = ElementTree.fromstring(f"<div>{means._repr_html_()}</div>")
    assert len(root.findall("table")) == 2
    assert "90% CI" in means.to_markdown() and "tukey" in means.to_markdown(table="contrasts")
    with pytest.raises(ValueError, match='table must be "means"'):
        fit.emmeans("Days").to_latex(table="contrasts")
    profile = fit.profile("sigma")
    assert "sigma" in profile._repr_html_() and "sigma" in repr(profile)
    limits = profile.conf_int()
    low, high = limits.loc["sigma", ["lower", "upper"]]
    assert f"[{low:.2f}, {high:.2f}]" in profile.to_latex(caption="Profiles")
    drawn = fit.bootstrap(60, seed=1)
    assert "60 draws" in drawn._repr_html_() and "percentile" in drawn.to_markdown()


# Batches and other results


@pytest.fixture(scope="module")
def batch():
    data = jaxreml.datasets.load("sleepstudy")
    noise = np.random.default_rng(0).normal(scale=20, size=(len(data), 40))
    values = data["Reaction"].to_numpy()[:, None] + noise
    values[:, 1] = 1.0
    names = [f"<gene> & {k}" for k in range(40)]
    responses = pd.DataFrame(values, columns=names)
    return jaxreml.fit_many(
        "~ Days + (1 | Subject)", data, responses, contrasts={"a_week": {"Days": 7}}
    )


def test_a_batch_shows_its_head_and_its_discoveries(batch):
    root = ElementTree.fromstring(f"<div>{batch._repr_html_()}</div>")
    whole, head = root.findall("table")
    cells = [["".join(c.itertext()) for c in row] for row in whole.iter("tr")]
    assert [row[0] for row in cells[2:5]] == ["(Intercept)", "Days", "a_week"]
    assert cells[3][1] == f"{batch.params['Days'].median():.2f}" and cells[3][3:] == [
        "39",
        "0",
        "39",
    ]
    assert "1 without: the response is constant" in cells[5][0]
    shown = [["".join(c.itertext()) for c in row] for row in head.iter("tr")]
    assert len(shown) == 2 + FIRST + 1 and shown[2][0] == "<gene> & 0"
    first = batch.params.iloc[0], batch.bse.iloc[0]
    assert shown[2][2] == f"{first[0]['Days']:.2f} ({first[1]['Days']:.2f})"
    assert shown[2][3] == f"{np.sqrt(batch.variances.iloc[0, 0]):.2f}"
    assert shown[3][-1] == "constant" and "35 more" in shown[-1][0]
    assert copy.deepcopy(batch)._repr_html_() == batch._repr_html_()


def test_a_moderated_batch_is_shown(batch):
    assert "Residual variances moderated" in batch.moderated()._repr_html_()


def test_a_streamed_batch_is_shown(tmp_path):
    pytest.importorskip("pyarrow")
    data = jaxreml.datasets.load("sleepstudy")
    responses = data[["Reaction"]].to_numpy() * [[1.0, 2.0]]
    path = tmp_path / "out.parquet"
    found = jaxreml.fit_many("~ Days + (1 | Subject)", data, responses, output=path)
    assert str(path) in found._repr_html_() and "StreamedResults" in repr(found)


def test_representations_say_what_things_are():
    fit = fitted("sleep_corr")
    assert "18 groups of rows" in repr(fit.influence(by="Subject", method="first-order"))
    traced = jaxreml.Estimate(*[None] * 16)
    assert repr(traced) == "<Estimate of NoneType>"
    design = jaxreml.design("Reaction ~ Days + (Days | Subject)", fit.table)
    assert repr(design) == (
        "<Design of 180 rows, 2 fixed effects, ((Intercept), Days | Subject); grouped, float64>"
    )


@pytest.mark.parametrize("kind", [jaxreml.LMMResults, jaxreml.BatchResults,
                                  jaxreml.ModeratedResults, jaxreml.StreamedResults])  # fmt: skip
def test_help_begins_with_what_it_is_and_not_with_a_constructor(kind):
    lines = pydoc.render_doc(kind, renderer=pydoc.plaintext).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("class "))
    assert kind.__doc__.splitlines()[0] in lines[start + 1]
    assert not inspect.signature(kind).parameters
    assert "Not called directly" in kind.__init__.__doc__
