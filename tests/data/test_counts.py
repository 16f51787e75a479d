"""Normalisation, log counts per million and filtering of counts, against edgeR and limma."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import references

from jaxreml import DataError, counts

GENES, SAMPLES, FIGURES = references.sequencing()


@pytest.fixture
def table():
    """Samples by genes."""
    return GENES.T


@pytest.mark.parametrize("method", ["tmm", "upperquartile"])
def test_factors_are_edger_s(table, method):
    found = counts.normalisation_factors(table, method)
    np.testing.assert_allclose(found, FIGURES[method], rtol=1e-12)
    assert list(found.index) == list(table.index)
    assert found.prod() == pytest.approx(1)


def test_factors_of_what_differs_in_nothing_but_depth(table):
    same = np.outer([1, 2, 5], table.iloc[0])
    np.testing.assert_allclose(counts.normalisation_factors(same), 1, rtol=1e-12)


def test_factors_where_most_genes_are_not_seen():
    # Most upper quartiles are zero: the reference is the sample with most in it.
    few = np.zeros((3, 40), int)
    few[0, :3], few[1, :3], few[2] = [10, 20, 30], [20, 10, 60], np.arange(1, 41)
    found = counts.normalisation_factors(few)
    np.testing.assert_allclose(found, FIGURES["tmm_few"], rtol=1e-12)
    with pytest.raises(DataError, match="upper quartile of sample 0, 1 is zero: leave out"):
        counts.normalisation_factors(few, "upperquartile")


def test_log_cpm_are_voom_s(table):
    found = counts.log_cpm(table, table.sum(axis=1) * FIGURES["tmm"])
    np.testing.assert_allclose(found.T, FIGURES["E"], rtol=0, atol=1e-10)
    assert found.index.equals(table.index) and found.columns.equals(table.columns)
    shuffled = (table.sum(axis=1) * FIGURES["tmm"]).iloc[::-1]
    pd.testing.assert_frame_equal(counts.log_cpm(table, shuffled), found)
    by_sums = counts.log_cpm(table.to_numpy())
    assert by_sums.loc[0, 16] == pytest.approx(np.log2(0.5e6 / (table.iloc[0].sum() + 1)))


@pytest.mark.parametrize(
    "case, options",
    [
        ("one_group", {}),
        ("by_treatment", {"group": SAMPLES["treatment"]}),
        (
            "strict",
            {"group": SAMPLES["treatment"].tolist(), "min_count": 30, "min_total_count": 500},
        ),
    ],
)
def test_filter_is_edger_s(table, case, options):
    kept = counts.filter_by_expression(table, **options)
    assert list(table.columns[kept]) == FIGURES["filtered"][case]


def broken(table, row, column, value):
    table = table.astype(float)
    table.iloc[row, column] = value
    return table


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: broken(t, 2, 5, -1), "count of gene 'g06' in sample 's03' is -1.*not negative"),
        (lambda t: broken(t, 2, 5, 1.5), "gene 'g06' in sample 's03' is 1.5.*whole numbers: round"),
        (lambda t: broken(t, 2, 5, np.inf), "gene 'g06' in sample 's03' is inf"),
        (lambda t: broken(t, 11, 0, np.nan), "gene 'g01' in sample 's12' is missing"),
        (lambda t: t * (t.index != "s04")[:, None], "sample 's04' has no counts at all"),
        (lambda t: iter([t]), "not an iterable"),
        (lambda t: t.assign(sample="a"), "not numeric: 'sample'"),
    ],
)
def test_what_are_no_counts_is_named(table, change, said):
    with pytest.raises(DataError, match=said):
        counts.normalisation_factors(change(table))


def test_arguments_are_checked(table):
    with pytest.raises(ValueError, match="one of tmm, upperquartile, not 'TMM'"):
        counts.normalisation_factors(table, "TMM")
    with pytest.raises(DataError, match="lib_size must be positive"):
        counts.log_cpm(table, np.arange(12))
    with pytest.raises(DataError, match=r"lib_size must be .* 12 values, not 2"):
        counts.log_cpm(table, [1e6, 1e6])
    with pytest.raises(DataError, match="a label per sample, 12, not 2"):
        counts.filter_by_expression(table, ["a", "b"])


def test_counts_are_left_as_they_are(table):
    before = table.copy()
    counts.log_cpm(table), counts.normalisation_factors(table)
    pd.testing.assert_frame_equal(table, before)
