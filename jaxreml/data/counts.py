"""Counts of sequencing reads, a row per sample and a column per gene: library sizes, factors that
make them comparable, and log counts per million."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.data.labels import shown
from jaxreml.data.sources import open_source, refuse_not_numeric
from jaxreml.data.tables import beside
from jaxreml.errors import DataError

METHODS = ("tmm", "upperquartile")
PSEUDOCOUNT = 0.5  # added to counts, and twice to library sizes, before their logarithms


class Counts(NamedTuple):
    """Checked counts: (n, B) `values`, the labels of the `samples` and of the `genes`."""

    values: np.ndarray
    samples: pd.Index
    genes: pd.Index


def normalisation_factors(counts: Any, method: str = "tmm", *, lib_size: Any = None) -> pd.Series:
    """Factors that make library sizes comparable, as edgeR's `calcNormFactors`; their product is 1.

    Args:
        counts: samples by genes, as the responses of `fit_many`.
        method: "tmm", trimmed mean of M values, in which a sample's log ratios to a reference
            sample are averaged without the most extreme in ratio (30% at either end) and in
            abundance (5%), by precision (Robinson and Oshlack 2010, Genome Biology 11:R25);
            or "upperquartile", the upper quartile of the genes seen in any sample (Bullard et al.
            2010, BMC Bioinformatics 11:94).
        lib_size: (n,) library sizes, a Series by its row labels; the sums of the counts if left
            out.

    Returns:
        A factor per sample. Effective library sizes are library sizes times these.

    Raises:
        DataError: what are no counts, named; a sample without any; an upper quartile of zero.
        ValueError: another method.

    Examples:
        >>> factors = jaxreml.counts.normalisation_factors(counts)
        >>> factors.round(2).head(3).tolist(), factors.prod().round(6).item()
        ([0.93, 0.91, 1.17], 1.0)
    """
    own = read_counts(counts)
    sizes = library_sizes(own, lib_size)
    return pd.Series(factors_of(own, sizes, method), own.samples, name="norm_factor")


def log_cpm(counts: Any, lib_size: Any = None) -> pd.DataFrame:
    """Log2 counts per million, ``log2((count + 0.5) / (lib_size + 1) * 1e6)`` as in voom (Law et
    al. 2014, Genome Biology 15:R29).

    Args:
        counts: samples by genes, as the responses of `fit_many`.
        lib_size: (n,) library sizes, such as the sums of the counts, which they are if left out,
            times `normalisation_factors`.

    Returns:
        Samples by genes.

    Raises:
        DataError: what are no counts, named; a sample without any.

    Examples:
        >>> sizes = counts.sum(axis=1) * jaxreml.counts.normalisation_factors(counts)
        >>> jaxreml.counts.log_cpm(counts, sizes).iloc[:2, :3].round(2)
           gene1  gene2  gene3
        0  13.39  14.11  14.73
        1  11.75  15.26  15.32
    """
    own = read_counts(counts)
    sizes = library_sizes(own, lib_size)
    return pd.DataFrame(log_cpm_of(own.values, sizes), own.samples, own.genes)


def filter_by_expression(
    counts: Any,
    group: Any = None,
    *,
    lib_size: Any = None,
    min_count: float = 10,
    min_total_count: float = 15,
    large_n: float = 10,
    min_prop: float = 0.7,
) -> pd.Series:
    """Genes with enough counts to be worth a test, as edgeR's `filterByExpr`.

    A gene is kept that has at least `min_count` counts, in a library of median size, in as many
    samples as the smallest group has (beyond `large_n` samples, a share `min_prop` of those more),
    and at least `min_total_count` in all.

    Args:
        counts: samples by genes, as the responses of `fit_many`.
        group: (n,) labels of the groups to compare; all samples are one group if left out.
        lib_size: (n,) library sizes; the sums of the counts if left out.
        min_count, min_total_count, large_n, min_prop: see above.

    Returns:
        A boolean per gene: ``counts.loc[:, kept]`` are those to go on with.

    Raises:
        DataError: what are no counts, named; a sample without any; groups of another number.

    Examples:
        >>> kept = jaxreml.counts.filter_by_expression(counts, group=data["Days"] > 4)
        >>> len(kept), kept.sum().item()
        (40, 40)
    """
    own = read_counts(counts)
    sizes = library_sizes(own, lib_size)
    smallest = float(len(sizes))
    if group is not None:
        if len(group) != len(sizes):
            raise DataError(f"group must have a label per sample, {len(sizes)}, not {len(group)}")
        smallest = float(pd.Series(np.asarray(group)).value_counts().min())
    if smallest > large_n:
        smallest = large_n + (smallest - large_n) * min_prop
    enough = own.values / sizes[:, None] >= min_count / np.median(sizes)
    kept = (enough.sum(axis=0) >= smallest - 1e-14) & (own.values.sum(axis=0) >= min_total_count)
    return pd.Series(kept, own.genes, name="kept")


def read_counts(counts: Any) -> Counts:
    """Counts with their labels, checked.

    Raises:
        DataError: as `check_counts`, or no table or array.
    """
    source = open_source(counts, None)
    if source is None:
        raise DataError("counts must be one table or array, samples by genes, not an iterable")
    refuse_not_numeric(source.not_numeric())
    values = source.read(0, len(source.names))
    samples = pd.RangeIndex(source.n) if source.labels is None else source.labels
    return check_counts(Counts(values, samples, source.names))


def check_counts(counts: Counts) -> Counts:
    """The same counts.

    Raises:
        DataError: a value that is no count, with its gene and sample.
    """
    values, samples, genes = counts
    bad = ~(values >= 0) | (values != np.floor(values)) | np.isinf(values)
    if not bad.any():
        return counts
    row, column = np.argwhere(bad)[0]
    value = values[row, column]
    place = f"gene {shown(genes[[column]])} in sample {shown(samples[[row]])}"
    if np.isnan(value):
        raise DataError(
            f"the count of {place} is missing; counts must be complete: leave the gene or the "
            "sample out"
        )
    remedy = "counts are not negative: are these logarithms, or adjusted for something already?"
    if value >= 0:
        remedy = "counts are whole numbers: round estimated counts, and pass no CPM, TPM or FPKM"
    raise DataError(f"the count of {place} is {value:g}, one of {bad.sum()} such values; {remedy}")


def library_sizes(counts: Counts, lib_size: Any = None) -> np.ndarray:
    """(n,), as given or the sums of the counts.

    Raises:
        DataError: a sample without counts; sizes of another number, with other row labels, or not
            positive.
    """
    sums = counts.values.sum(axis=1)
    if not sums.all():
        empty = counts.samples[sums == 0]
        raise DataError(
            f"sample {shown(empty)} has no counts at all: leave it out, of the counts and of the "
            "data"
        )
    if lib_size is None:
        return sums
    sizes = beside("lib_size", lib_size, pd.DataFrame(index=counts.samples), len(sums))
    if not np.all((sizes > 0) & np.isfinite(sizes)):
        raise DataError("lib_size must be positive")
    return sizes


def log_cpm_of(values: np.ndarray, lib_size: np.ndarray) -> np.ndarray:
    """Log2 counts per million of (n, B) counts."""
    scale = 1e6 / (lib_size + 2 * PSEUDOCOUNT)
    return np.log2((values + PSEUDOCOUNT) * scale[:, None])


def factors_of(counts: Counts, lib_size: np.ndarray, method: str | None) -> np.ndarray:
    """`normalisation_factors` (n,); ones for the method None."""
    if method is None:
        return np.ones_like(lib_size)
    if method not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    values = counts.values[:, counts.values.any(axis=0)]
    quartiles = np.quantile(values, 0.75, axis=1)
    if method == "tmm":
        factors = _tmm(values, lib_size, quartiles / lib_size)
    elif quartiles.all():
        factors = quartiles / lib_size
    else:
        raise DataError(
            f"the upper quartile of sample {shown(counts.samples[quartiles == 0])} is zero: leave "
            "out genes that few samples have (filter_by_expression), or normalise by tmm"
        )
    return factors / np.exp(np.log(factors).mean())


def _tmm(values: np.ndarray, lib_size: np.ndarray, quartiles: np.ndarray) -> np.ndarray:
    """Trimmed means of M values; the reference has the most average upper quartile."""
    reference = np.argmin(abs(quartiles - quartiles.mean()))
    if np.median(quartiles) < 1e-20:  # most are zero and say nothing
        reference = np.argmax(np.sqrt(values).sum(axis=1))
    theirs, size = values[reference], lib_size[reference]
    pairs = zip(values, lib_size, strict=True)
    return np.array([_trimmed(own, own_size, theirs, size) for own, own_size in pairs])


def _trimmed(
    own: np.ndarray, own_size: float, reference: np.ndarray, reference_size: float
) -> float:
    """The factor of one sample, beside a reference."""
    from scipy.stats import rankdata

    both = (own > 0) & (reference > 0)
    own, reference = own[both], reference[both]
    shares = own / own_size, reference / reference_size
    # As edgeR writes it: rounding decides which of equal ratios tie, and so where the cut falls.
    ratio, abundance = np.log2(shares[0] / shares[1]), (np.log2(shares[0]) + np.log2(shares[1])) / 2
    if np.max(abs(ratio), initial=0) < 1e-6:
        return 1.0
    kept = np.ones(ratio.size, bool)
    for values, share in ((ratio, 0.3), (abundance, 0.05)):
        ranks, cut = rankdata(values), np.floor(values.size * share)
        kept &= (ranks >= cut + 1) & (ranks <= values.size - cut)
    if not kept.any():
        return 1.0
    # By the delta method, of binomial counts.
    variance = (1 / own - 1 / own_size) + (1 / reference - 1 / reference_size)
    return float(2 ** np.average(ratio[kept], weights=1 / variance[kept]))
