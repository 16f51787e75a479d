"""`voom`, against limma's and, with random effects, against its steps on fits by lme4."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import references

import jaxreml
from jaxreml import DataError, Status, voom

GENES, SAMPLES, FIGURES = references.sequencing()
FIXED, MIXED = "~ treatment + age", "~ treatment + age + (1 | donor)"


@pytest.fixture(scope="module")
def mixed():
    return voom(GENES, MIXED, SAMPLES)


def check(found, figures, rtol):
    weights = np.array(figures["weights"]).T
    np.testing.assert_allclose(found.weights, weights, rtol=rtol)
    if "x" in figures:
        np.testing.assert_allclose(found.trend["mean_log_count"], figures["x"], rtol=rtol)
        np.testing.assert_allclose(found.trend["sqrt_sd"], figures["y"], rtol=rtol)
        line = found.trend.sort_values("mean_log_count")["fitted"]
        np.testing.assert_allclose(line, figures["line_y"], rtol=rtol)


def test_without_random_effects_it_is_limma_s():
    found = voom(GENES, FIXED, SAMPLES)
    np.testing.assert_allclose(found.values.T, FIGURES["E"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.lib_size * found.norm_factors, FIGURES["lib_size"], rtol=1e-12)
    check(found, FIGURES["fixed"], 1e-8)
    check(voom(GENES, FIXED, SAMPLES, span=0.8, normalisation=None), FIGURES["wide"], 1e-8)


def test_with_random_effects_it_is_limma_s_steps_on_lme4_s_fits(mixed):
    check(mixed, FIGURES["mixed"], 1e-6)
    assert (mixed.status == Status.CONVERGED).all()
    assert "90 genes in 12 samples, 88 in the trend" in repr(mixed)


def test_labels(mixed):
    for frame in (mixed.values, mixed.weights):
        assert frame.index.equals(SAMPLES.index) and list(frame.columns) == list(GENES.index)
    assert mixed.lib_size.index.equals(SAMPLES.index)
    seen = GENES.index[GENES.sum(axis=1) > 0]
    assert mixed.trend.index.equals(seen) and mixed.status.index.equals(GENES.index)


def test_values_go_on_to_fit_many(mixed):
    results = jaxreml.fit_many(MIXED, SAMPLES, mixed.values)
    assert results.converged.all() and list(results.responses) == list(GENES.index)


def given(kind):
    """The same counts in other ways: counts, data, options."""
    data = SAMPLES.reset_index()
    shuffled = GENES.T.iloc[::-1]
    return {
        "genes in columns": (GENES.T, SAMPLES, {}),
        "samples named by a column": (GENES, data, {}),
        "an array": (GENES.to_numpy().T, SAMPLES, {}),
        "an array, genes in rows": (GENES.to_numpy(), SAMPLES, {"genes_in": "rows"}),
        "in another order": (shuffled, data, {"id": "sample"}),
        "genes in rows in another order": (shuffled.T, data, {"id": "sample"}),
        "known sizes": (GENES, SAMPLES.assign(size=GENES.sum()), {"lib_size": "size"}),
        "known factors": (GENES, SAMPLES, {"normalisation": FIGURES["tmm"]}),
        "factors by sample": (
            GENES,
            SAMPLES,
            {"normalisation": jaxreml.counts.normalisation_factors(shuffled)},
        ),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "genes in columns",
        "samples named by a column",
        "an array",
        "an array, genes in rows",
        "in another order",
        "genes in rows in another order",
        "known sizes",
        "known factors",
        "factors by sample",
    ],
)
def test_ways_to_give_counts(kind):
    expected = voom(GENES, FIXED, SAMPLES)
    counts, data, options = given(kind)
    found = voom(counts, FIXED, data, **options)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-10)


def test_offsets_and_functions_of_the_formula():
    # Values less the offset are fitted; what is fitted to them comes with it again.
    plain = voom(GENES, "~ 1 + age", SAMPLES)
    moved = voom(GENES, "~ 1 + age + offset(twice(age))", SAMPLES, context={"twice": np.exp2})
    np.testing.assert_allclose(moved.trend["sqrt_sd"] > plain.trend["sqrt_sd"], True)
    exact = voom(GENES, "~ 1 + age + offset(3 * age)", SAMPLES)
    np.testing.assert_allclose(exact.weights, plain.weights, rtol=1e-8)


def test_a_gene_without_an_optimum():
    # Two genes make up every library, one of them with the same count in all: its values are
    # constant where sizes are known to be equal.
    counts = GENES.T.assign(same=7)
    found = voom(counts, MIXED, SAMPLES, lib_size=np.full(12, 1e5), normalisation=None)
    assert found.status["same"] == Status.CONSTANT and "same" not in found.trend.index
    assert (found.status.drop(["same", "g17", "g60"]) == Status.CONVERGED).all()
    assert np.ptp(found.weights["same"]) < 1e-9 and np.isfinite(found.weights).all(axis=None)


@pytest.mark.parametrize(
    "change, options, said",
    [
        (lambda c, d: (c - 1, d), {}, "gene 'g15' in sample 's01' is -1"),
        (lambda c, d: (c * (c.columns != "s05"), d), {}, "sample 's05' has no counts at all"),
        (
            lambda c, d: (c, d.assign(age=d["age"].where(d.index != "s02"))),
            {},
            "1 samples have a missing value .*: 's02'; leave",
        ),
        (lambda c, d: (c[c.columns[::-1]], d), {}, "same row labels in different orders"),
        (lambda c, d: (c.iloc[:, 1:], d), {}, "the data have 12 rows and the responses 11"),
        (lambda c, d: (c.to_numpy(), d), {}, "They have a row per response; transpose them"),
        (lambda c, d: (c.assign(length=100), d), {}, "1 only in the responses .'length'"),
        (lambda c, d: (iter([c.T]), d), {}, "not an iterable"),
        (lambda c, d: (c * 0 + (c.index == "g03")[:, None], d), {}, "there are 1"),
        (lambda c, d: (c, d), {"genes_in": "samples"}, 'genes_in must be "rows", "columns"'),
        (lambda c, d: (c, d), {"span": 50}, "span is a share"),
        (lambda c, d: (c, d), {"normalisation": "TMM"}, "'tmm', 'upperquartile', None or a factor"),
        (lambda c, d: (c, d), {"normalisation": -np.ones(12)}, "factors must be positive"),
        (lambda c, d: (c, d.drop(columns="age")), {}, "column 'age' of the formula is not in"),
    ],
)
def test_bad_input_is_named(change, options, said):
    counts, data = change(GENES, SAMPLES)
    with pytest.raises(ValueError, match=said):
        voom(counts, FIXED, data, **options)


def test_without_statsmodels(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.nonparametric.smoothers_lowess", None)
    with pytest.raises(DataError, match=r"voom needs statsmodels: pip install 'jaxreml\[counts\]'"):
        voom(GENES, FIXED, SAMPLES)


def test_counts_are_left_as_they_are():
    before = GENES.copy()
    voom(GENES, FIXED, SAMPLES)
    pd.testing.assert_frame_equal(GENES, before)
