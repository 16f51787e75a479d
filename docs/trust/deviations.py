"""Deviations of jaxreml from the reference figures in tests/reference, quantity by quantity.

The page `accuracy.md` runs it while the site is built. A `Comparison` yields the model and the
deviations of one array of figures, on the scale that `measure` names.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import jaxreml

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import references

Deviations = Iterator[tuple[str, np.ndarray]]
METHODS = ("REML", "ML")


@dataclass(frozen=True)
class Comparison:
    """One quantity.

    Attributes:
        group: "estimates", "tests" or "others".
        quantity: what is compared.
        oracle: the program that made the other figures.
        measure: what a deviation is.
        tolerance: the largest that is allowed.
        deviations: per model, of all its figures.
    """

    group: str
    quantity: str
    oracle: str
    measure: str
    tolerance: float
    deviations: Callable[[], Deviations]


@functools.cache
def fitted(name: str, method: str = "REML") -> jaxreml.LMMResults:
    """The fit of a model of `tests/reference/README.md`."""
    model = references.reference(name)
    data, weights = references.data(name), model.get("weights")
    return jaxreml.fit(model["formula"], data, method, weights=weights)


@functools.cache
def fitted_to_table(name: str) -> jaxreml.LMMResults:
    """The fit of a model of `tests/reference/inference`."""
    figures = references.reference(f"inference/{name}")
    tables = {"empty_cell": "empty", "weighted": "unbalanced", "machines_cells": "machines"}
    if name in ("cake", "cake_factor", "machines", "machines_s", "orthodont"):
        return fitted(name)
    if name == "sleepstudy":
        return fitted("sleep_corr")
    table = references.table(tables.get(name, name))
    return jaxreml.fit(figures["formula"], table, weights=figures.get("weights"))


def figures_of(name: str, method: str) -> dict:
    """R's figures of a fit."""
    return references.reference(name)["fits"][method]


def all_fits() -> Iterator[tuple[str, jaxreml.LMMResults, dict]]:
    """Every model, by REML and by ML (InstEval by REML only), with R's figures."""
    for name in references.NAMES:
        for method in METHODS[:1] if name == "insteval" else METHODS:  # seconds a fit
            yield f"{name}, {method}", fitted(name, method), figures_of(name, method)


def relative(ours: object, theirs: object) -> np.ndarray:
    """Relative deviations of numbers away from zero."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    return np.abs(ours - theirs) / np.abs(theirs)


# Fits


def criteria() -> Deviations:
    """How far a criterion is from lme4's."""
    for model, fit, theirs in all_fits():
        yield model, np.abs([fit.criterion - theirs["criterion"]])


def criteria_above() -> Deviations:
    """How far a criterion is above lme4's: where lme4 found a better optimum."""
    for model, fit, theirs in all_fits():
        yield model, np.maximum([fit.criterion - theirs["criterion"]], 0.0)


def fixed_effects() -> Deviations:
    """Estimates, in standard errors."""
    for model, fit, theirs in all_fits():
        gap = fit.params.to_numpy() - list(theirs["fixef"].values())
        yield model, np.abs(gap / fit.bse.to_numpy())


def standard_errors() -> Deviations:
    """Standard errors of the fixed effects."""
    for model, fit, theirs in all_fits():
        yield model, relative(fit.bse, list(theirs["se"].values()))


def deviations_of_sds() -> Deviations:
    """SDs of the random effects and the residual, relative to the largest of the model."""
    for model, fit, theirs in all_fits():
        rows = [row["sdcor"] for row in theirs["varcorr"] if row.get("var2") is None]
        yield model, np.abs(fit.variance_components["sd"] - rows) / max(rows)


def correlations() -> Deviations:
    """Correlations of random effects, where they are defined."""
    for model, fit, theirs in all_fits():
        rows = [row["sdcor"] for row in theirs["varcorr"] if row.get("var2") is not None]
        if rows and not model.startswith("zero_slope"):
            yield model, np.abs(fit.correlations["correlation"].to_numpy() - np.array(rows, float))


def log_variance_errors() -> Deviations:
    """Standard errors of log-variances, by glmmTMB's Hessian at lme4's optimum."""
    for model, fit, theirs in all_fits():
        rows = theirs.get("log_variance_glmmTMB")
        if rows:
            expected = {(row["group"], str(row["term"])[-1]): row["se"] for row in rows}
            own = [(group, term.strip("]")[-1]) for group, term in fit.log_variance_se.index]
            yield model, relative(fit.log_variance_se, [expected[key] for key in own])


def modes() -> Deviations:
    """Conditional modes, in units of the largest of their term."""
    for model, fit, theirs in all_fits():
        for group, rows in theirs.get("ranef", {}).items():
            rows = [[v for k, v in row.items() if k != "level"] for row in rows]
            expected = np.array(rows, float)
            scale = max(np.abs(expected).max(), 1e-3 * fit.sigma)
            yield model, np.abs(fit.random_effects[group].to_numpy() - expected).ravel() / scale


# Tests


def satterthwaite() -> Deviations:
    """Degrees of freedom of the coefficients."""
    for model, fit, theirs in all_fits():
        rows = theirs.get("satterthwaite")
        if rows:
            yield model, relative(fit.coefficients()["df"], [row["df"] for row in rows])


def kenward_roger(column: str, key: str) -> Callable[[], Deviations]:
    """A column of the coefficients by Kenward and Roger."""

    def of() -> Deviations:
        for name in references.NAMES:
            rows = figures_of(name, "REML").get("kenward_roger")
            if rows:
                table = fitted(name).coefficients("kenward-roger")
                yield name, relative(table[column], [row[key] for row in rows])

    return of


TABLES = ["cake", "cake_factor", "machines", "machines_cells", "machines_s", "orthodont",
          "sleepstudy", "unbalanced", "empty_cell", "weighted"]  # fmt: skip
DF = {"satterthwaite": "satterthwaite", "kenward_roger": "kenward-roger", "asymptotic": "inf"}


@functools.cache
def _anovas() -> list[tuple[str, pd.DataFrame, list[dict]]]:
    found = []
    for name in TABLES:
        for kind, methods in references.reference(f"inference/{name}")["anova"].items():
            for method, rows in methods.items():
                ours = fitted_to_table(name).anova(kind, df=DF[method])
                order = [row["term"] for row in rows]
                ours = ours.loc[order] if set(order) == set(ours.index) else ours
                found.append((f"{name}, {kind}", ours, rows))
    return found


def f_tests(column: str, key: str) -> Callable[[], Deviations]:
    """A column of the tables of types I, II and III."""

    def of() -> Deviations:
        for model, ours, rows in _anovas():
            yield model, relative(ours[column], [row[key] for row in rows])

    return of


@functools.cache
def _means() -> list[tuple[str, pd.DataFrame, list[dict]]]:
    """Means, slopes and contrasts of them, ours and emmeans'."""
    found = []
    for name in TABLES:
        figures, fit = references.reference(f"inference/{name}"), fitted_to_table(name)
        for case in figures["means"] + figures["trends"]:
            for method in DF.keys() & case.keys():
                options = {"by": case.get("by"), "at": case.get("at"), "df": DF[method]}
                if "var" in case:
                    means = fit.emtrends(case["specs"], case["var"], **options)
                else:
                    means = fit.emmeans(case["specs"], weights=case["weights"], **options)
                found.append((name, means.table, case[method]["means"]["rows"]))
                for kind, rows in case[method].get("contrasts", {}).items():
                    if rows["rows"][0]["contrast"] != "(nothing)":
                        ours = means.contrast(kind, adjust="none")
                        found.append((name, ours, rows["rows"]))
    return found


def marginal_means(column: str) -> Callable[[], Deviations]:
    """A column of them; estimates and errors in standard errors."""

    def of() -> Deviations:
        for name, ours, rows in _means():
            theirs = pd.DataFrame(rows)
            if column in theirs:
                there = pd.to_numeric(theirs[column], errors="coerce").to_numpy()
                known = np.isfinite(there)
                gap = np.abs(ours[column].to_numpy() - there)[known]
                yield name, gap / (there if column == "df" else ours["std_error"].to_numpy())[known]

    return of


# Intervals, predictions, diagnostics

PROFILED = ["dyestuff", "pastes", "penicillin", "sleep_corr", "sleep_int", "orthodont"]


def profiles() -> Deviations:
    """Ends of 95% profile intervals."""
    for name in PROFILED:
        ours = fitted(name, "ML").profile(method="ML").conf_int()
        for (label, own), row in zip(
            ours.iterrows(), figures_of(name, "ML")["profile_ci"], strict=True
        ):
            if (name, label) != ("orthodont", "sigma"):  # lme4's profile breaks off
                theirs = [row["lower"], row["upper"]]
                yield f"{name}, {label}", relative([own["lower"], own["upper"]], theirs)


def predictions() -> Deviations:
    """Predictions for new rows, with random effects and without."""
    for name, figures in references.reference("predictions/predictions")["predict"].items():
        new = pd.DataFrame(figures["newdata"])
        if "replicate" in new:
            new["replicate"] = new["replicate"].astype(str)
        found = fitted(name).predict(new, allow_new_levels=True)
        yield name, relative(found, figures["all"])


def prediction_errors() -> Deviations:
    """Standard errors of conditional means."""
    for name, figures in references.reference("predictions/predictions")["se"].items():
        ours = fitted(name).predict(interval="confidence")["std_error"][:12]
        yield name, relative(ours, figures["joint"])


def hats() -> Deviations:
    """Leverages."""
    for model, fit, theirs in all_fits():
        if "hat_head" in theirs:
            yield model, np.abs(fit.leverage()[:10].to_numpy() - theirs["hat_head"])


def cooks() -> Deviations:
    """Cook's distances."""
    for model, fit, theirs in all_fits():
        if "cooks_head" in theirs:
            expected = np.array(theirs["cooks_head"], float)
            yield model, np.abs(fit.cooks_distance()[:10].to_numpy() - expected) / expected.max()


# Batches


@functools.cache
def _batch() -> tuple[pd.DataFrame, np.ndarray, jaxreml.BatchResults]:
    data = jaxreml.datasets.load("sleepstudy")
    rng = np.random.default_rng(1)
    values = data["Reaction"].to_numpy()[:, None] + rng.normal(scale=30, size=(len(data), 15))
    values[rng.random(values.shape) < 0.02] = np.nan
    formula = "~ Days + (Days | Subject)"
    return data, values, jaxreml.fit_many(formula, data, values, df="kenward-roger")


def batches() -> Deviations:
    """Responses of one `fit_many`, with missing values, beside a `fit` of each."""
    data, values, results = _batch()
    for i in range(values.shape[1]):
        fit = jaxreml.fit("y ~ Days + (Days | Subject)", data.assign(y=values[:, i]))
        ours = results.params.iloc[i].to_numpy()
        gaps = [np.abs(ours - fit.params.to_numpy()) / fit.bse.to_numpy()]
        gaps.append(relative(results.bse.iloc[i], fit.coefficients("kenward-roger")["std_error"]))
        gaps.append(relative(results.df.iloc[i], fit.coefficients("kenward-roger")["df"]))
        yield f"response {i}", np.concatenate(gaps)


def moderation() -> Deviations:
    """Prior variances and degrees of freedom, and posterior variances."""
    from jaxreml.inference.batches import moderation as ours

    def numbers(values: list) -> np.ndarray:
        return np.array([np.inf if value == "Inf" else value for value in values], float)

    for name, case in references.reference("batches/moderation")["squeezed"].items():
        variances, df = numbers(case["variance"]), numbers(case["df"])
        covariate = numbers(case["covariate"]) if case["covariate"] else None
        for kind in ("simple", "robust"):
            prior = ours.fit_prior(variances, df, covariate, robust=kind == "robust")
            posterior = ours.squeeze(variances, df, prior)
            yield f"{name}, {kind}", relative(posterior, numbers(case[kind]["variance_post"]))


def voom() -> Deviations:
    """Weights of counts, from a linear and from a mixed model's trend."""
    genes, samples, figures = references.sequencing()
    for kind, formula in {"fixed": "", "mixed": " + (1 | donor)"}.items():
        found = jaxreml.voom(genes, f"~ treatment + age{formula}", samples)
        yield kind, relative(found.weights, np.array(figures[kind]["weights"]).T).ravel()


COMPARISONS = [
    Comparison(*row)  # type: ignore[arg-type]
    for row in [
        ("estimates", "REML and ML criteria", "lme4", "absolute", 1e-6, criteria),
        ("estimates", "the same, where ours is higher", "lme4", "absolute", 1e-7, criteria_above),
        ("estimates", "fixed effects", "lme4", "standard errors", 1e-5, fixed_effects),
        ("estimates", "standard errors of fixed effects", "lme4", "relative", 1e-5,
         standard_errors),
        ("estimates", "SDs of random effects and residual", "lme4", "of the largest", 1e-5,
         deviations_of_sds),
        ("estimates", "correlations", "lme4", "absolute", 1e-5, correlations),
        ("estimates", "conditional modes", "lme4", "of the largest", 1e-5, modes),
        ("estimates", "standard errors of log-variances", "glmmTMB", "relative", 1e-4,
         log_variance_errors),
        ("tests", "df by Satterthwaite", "lmerTest", "relative", 1e-4, satterthwaite),
        ("tests", "df by Kenward-Roger", "pbkrtest", "relative", 1e-5, kenward_roger("df", "df")),
        ("tests", "standard errors by Kenward-Roger", "pbkrtest", "relative", 1e-5,
         kenward_roger("std_error", "Std. Error")),
        ("tests", "F of types I, II, III", "lmerTest", "relative", 1e-5,
         f_tests("statistic", "F value")),
        ("tests", "df of F tests, both methods", "lmerTest", "relative", 1e-5,
         f_tests("den_df", "DenDF")),
        ("tests", "marginal means, slopes, contrasts", "emmeans", "standard errors", 1e-6,
         marginal_means("estimate")),
        ("tests", "standard errors of marginal means", "emmeans", "relative", 1e-5,
         marginal_means("std_error")),
        ("tests", "df of marginal means, both methods", "emmeans", "relative", 1e-5,
         marginal_means("df")),
        ("others", "profile intervals", "lme4", "relative", 3e-3, profiles),
        ("others", "predictions for new rows", "lme4", "relative", 1e-6, predictions),
        ("others", "standard errors of conditional means", "glmmTMB", "relative", 1e-5,
         prediction_errors),
        ("others", "leverages", "lme4", "absolute", 1e-6, hats),
        ("others", "Cook's distances", "lme4", "of the largest", 1e-5, cooks),
        ("others", "fit_many, with Kenward-Roger", "single fits", "relative", 1e-8, batches),
        ("others", "moderated variances", "limma", "relative", 1e-7, moderation),
        ("others", "weights of voom", "limma, lme4", "relative", 1e-6, voom),
    ]
]  # fmt: skip


def measured(comparison: Comparison) -> dict[str, object]:
    """A row of the page's table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [(model, values[np.isfinite(values)]) for model, values in comparison.deviations()]
    found = [(model, values) for model, values in found if values.size]
    worst, where = max((float(values.max()), model) for model, values in found)
    return {
        "quantity": comparison.quantity,
        "oracle": comparison.oracle,
        "figures": sum(values.size for _, values in found),
        "deviation": comparison.measure,
        "tolerance": comparison.tolerance,
        "median": float(np.median(np.concatenate([values for _, values in found]))),
        "worst": worst,
        "where": where,
    }


def table(group: str) -> pd.DataFrame:
    """The comparisons of a group."""
    rows = [measured(comparison) for comparison in COMPARISONS if comparison.group == group]
    return pd.DataFrame(rows).set_index("quantity")


def distances() -> pd.DataFrame:
    """How far lme4 ended above our criterion, and what this distance says of its estimates.

    Near a minimum -2 log likelihood grows by d' A^-1 d with A the covariance of the variance
    parameters, so that a fit e above it is sqrt(e) standard errors away.
    """
    rows = []
    for model, fit, theirs in all_fits():
        known = fit.log_variance_se.to_numpy()
        variances = [row["vcov"] for row in theirs["varcorr"] if row.get("var2") is None]
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.abs(fit.log_variances - np.log(np.array(variances, float))) / known
        rows.append(
            {
                "model": model,
                "lme4's criterion less ours": theirs["criterion"] - fit.criterion,
                "its root": np.sqrt(max(theirs["criterion"] - fit.criterion, 0.0)),
                "log-variances apart, in standard errors": np.nanmax(gap),
            }
        )
    return pd.DataFrame(rows).set_index("model")
