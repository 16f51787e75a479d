"""`voom`: counts to log counts per million with precision weights, for `fit_many`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from jaxreml.api.fit_many import fit_many
from jaxreml.data.counts import (
    METHODS,
    Counts,
    check_counts,
    factors_of,
    library_sizes,
    log_cpm_of,
)
from jaxreml.data.frame import ModelFrame, covariate_frame
from jaxreml.data.labels import DataRows, shown
from jaxreml.data.matrices import Array
from jaxreml.data.responses import Responses
from jaxreml.data.tables import beside
from jaxreml.errors import DataError
from jaxreml.status import Status


@dataclass(frozen=True, repr=False)
class Voom:
    """Counts made ready for linear mixed models.

    Attributes:
        values: log2 counts per million, samples by genes: responses of `fit_many`.
        weights: their precisions, a frame of the same shape and labels.
        lib_size, norm_factors: per sample, the size of its library and the factor to multiply it
            by, after which sizes compare.
        trend: per gene that it was made from: ``mean_log_count``, its mean log2 count, of a library
            of average size; ``sqrt_sd``, the square root of its residual standard deviation; and
            ``fitted``, the trend at that place.
        status: per gene, how the fit of the model to its unweighted values ended, a `Status` code.
            Genes without an optimum are no part of the trend, and their weights are the trend at
            fitted values by least squares, without random effects.

    Examples:
        >>> found = jaxreml.voom(counts, "~ Days + (1 | Subject)", data)
        >>> found.values.shape, found.weights.shape
        ((180, 40), (180, 40))
        >>> found.trend.round(2).head(2)
               mean_log_count  sqrt_sd  fitted
        gene1            5.64     1.02    0.99
        gene2            5.14     0.95    1.04
    """

    values: pd.DataFrame
    weights: pd.DataFrame
    lib_size: pd.Series
    norm_factors: pd.Series
    trend: pd.DataFrame
    status: pd.Series

    def __repr__(self) -> str:
        n, genes = self.values.shape
        return f"<Voom of {genes} genes in {n} samples, {len(self.trend)} in the trend>"


def voom(
    counts: Any,
    formula: str,
    data: Any,
    *,
    normalisation: Any = "tmm",
    lib_size: Any = None,
    span: float = 0.5,
    genes_in: Literal["rows", "columns"] | None = None,
    id: str | None = None,
    layer: str | None = None,
    context: Mapping[str, Any] | None = None,
    engine: Literal["numpy", "jax"] | None = None,
    devices: Any = None,
    progress: bool | None = None,
) -> Voom:
    """Log counts per million and a precision weight for each, by their mean-variance trend.

    As limma's ``voom`` (Law, Chen, Shi and Smyth 2014, Genome Biology 15:R29) with the mixed model
    in place of least squares, as ``voomWithDreamWeights`` of variancePartition (Hoffman and Roussos
    2021, Bioinformatics 37:192): the model is fitted to unweighted log counts per million, the
    square roots of the residual standard deviations are smoothed by lowess against mean log
    counts, and the weight of each count is the trend at its fitted value (conditional modes
    included) to the power -4. For a formula without random terms this is limma's.

    Args:
        counts: counts of reads, samples by genes: what `fit_many` takes as responses (but no stream
            of blocks), or genes by samples (see `genes_in`). Leave out genes with hardly any counts
            before (`jaxreml.counts.filter_by_expression`); of a gene without any, weights mean
            little, and it is no part of the trend.
        formula: as for `fit_many`; it may have no random term.
        data: the covariates, a row per sample, complete in the columns that the formula uses.
        normalisation: "tmm" or "upperquartile" (`jaxreml.counts.normalisation_factors`), None for
            none, or (n,) factors.
        lib_size: sizes of the libraries, (n,) or the name of a column of the data; the sums of the
            counts if left out.
        span: share of the genes that lowess smooths over.
        genes_in: "columns" or "rows" of `counts`. If left out, labels tell: genes are in rows where
            the columns of a pandas frame are labels of samples, those of the rows of the data or
            the values of one of its columns; in columns otherwise.
        id: name of a column of `data` by which samples are matched, as for `fit_many`.
        layer: of an AnnData object, the layer with the counts; its X if left out.
        context: names the formula may use besides columns.
        engine, devices, progress: as for `fit_many`.

    Returns:
        The record: ``fit_many(formula, data, found.values, weights=found.weights)`` goes on.

    Raises:
        DataError: what are no counts, named; samples that do not match the data, have no counts or
            lack a covariate; fewer than two genes to make a trend of; a trend that is not positive;
            statsmodels is not installed.
        FormulaError: as `fit_many`.
        ValueError: another `genes_in`; a `span` that is no share; another `normalisation`.

    Examples:
        >>> found = jaxreml.voom(counts, "~ Days + (1 | Subject)", data)
        >>> model = "~ Days + (1 | Subject)"
        >>> weighted = jaxreml.fit_many(model, data, found.values, weights=found.weights)
        >>> weighted.moderated().top_table("Days", 2)[["mean", "estimate", "p_adjusted"]].round(3)
                 mean  estimate  p_adjusted
        gene5  14.847     0.184         0.0
        gene2  14.506     0.161         0.0
    """
    if genes_in not in (None, "rows", "columns"):
        raise ValueError(f'genes_in must be "rows", "columns" or None, not {genes_in!r}')
    if not 0 < span <= 1:
        raise ValueError(f"span is a share of the genes, above 0 and up to 1, not {span}")
    lowess = _import_lowess()
    frame = covariate_frame(formula, data, context=context, need_random=False)
    if not frame.rows.all():
        labels = DataRows(data).labels
        labels = pd.RangeIndex(len(frame.rows)) if labels is None else labels
        raise DataError(
            f"{frame.n_dropped} samples have a missing value in a column that the formula uses: "
            f"{shown(labels[~frame.rows])}; leave them out, of the counts and of the data"
        )
    samples = frame.table.index
    own = _read(counts, data, samples, genes_in, id, layer)
    sizes = library_sizes(
        own, None if lib_size is None else beside("lib_size", lib_size, data, len(samples))
    )
    factors = _factors(own, sizes, normalisation, data)
    effective = sizes * factors
    values = log_cpm_of(own.values, effective)

    fitted, sd = _least_squares(frame, values)
    status = np.full(len(own.genes), Status.CONVERGED.value)
    if frame.terms:
        results = fit_many(
            formula,
            data,
            Array(values, own.genes),
            modes=True,
            df="residual",
            context=context,
            engine=engine,
            devices=devices,
            progress=progress,
        )
        status, sd = results.fits.status, results.fits.sigma
        good = results.converged.to_numpy()
        fitted[:, good] = results.fitted_values(np.flatnonzero(good)).to_numpy()

    per_million = np.log2(effective + 1) - np.log2(1e6)  # what log counts are more than log CPM
    seen = own.values.any(axis=0) & np.isfinite(sd)
    if seen.sum() < 2:
        raise DataError(
            f"a trend needs two genes at least that have counts and a fit; there are {seen.sum()}"
        )
    trend = pd.DataFrame(
        {
            "mean_log_count": values[:, seen].mean(axis=0) + per_million.mean(),
            "sqrt_sd": np.sqrt(sd[seen]),
        },
        own.genes[seen],
    )
    x, y = (trend[name].to_numpy() for name in trend)
    trend["fitted"] = lowess(y, x, frac=span, it=3, delta=0.01 * np.ptp(x), return_sorted=False)
    weights = _weights(trend, fitted + per_million[:, None])
    return Voom(
        values=pd.DataFrame(values, samples, own.genes),
        weights=pd.DataFrame(weights, samples, own.genes),
        lib_size=pd.Series(sizes, samples, name="lib_size"),
        norm_factors=pd.Series(factors, samples, name="norm_factor"),
        trend=trend,
        status=pd.Series(status, own.genes, name="status"),
    )


def _import_lowess() -> Any:
    try:
        from statsmodels.nonparametric.smoothers_lowess import lowess
    except ImportError:
        raise DataError("voom needs statsmodels: pip install 'jaxreml[counts]'") from None
    return lowess


def _read(
    counts: Any,
    data: Any,
    samples: pd.Index,
    genes_in: str | None,
    id: str | None,
    layer: str | None,
) -> Counts:
    """Checked counts on the rows of the data."""
    if genes_in is None and isinstance(counts, pd.DataFrame):
        genes_in = "rows" if DataRows(data).holding(counts.columns) else None
    if genes_in == "rows":
        if not hasattr(counts, "T"):
            raise DataError(
                f"counts with genes in rows must be a pandas frame or an array, not "
                f"{type(counts).__name__}: convert them, the names of the genes as the index"
            )
        counts = counts.T
    responses = Responses(counts, data, np.ones(len(samples), bool), id, layer)
    if responses.names is None:
        raise DataError("counts must be one table or array, samples by genes, not an iterable")
    values = responses.read(0, len(responses.names))
    return check_counts(Counts(values, samples, responses.names))


def _factors(counts: Counts, sizes: np.ndarray, normalisation: Any, data: Any) -> np.ndarray:
    if normalisation is None or isinstance(normalisation, str):
        if normalisation not in (None, *METHODS):
            names = ", ".join(map(repr, METHODS))
            raise ValueError(
                f"normalisation must be {names}, None or a factor per sample, not {normalisation!r}"
            )
        return factors_of(counts, sizes, normalisation)
    factors = beside("normalisation", normalisation, data, len(sizes))
    if not np.all((factors > 0) & np.isfinite(factors)):
        raise DataError("normalisation factors must be positive")
    return factors


def _least_squares(frame: ModelFrame, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fitted values (n, B) and residual standard deviations (B,) without the random effects."""
    n, p = frame.X.shape
    offset = 0.0 if frame.offset is None else frame.offset[:, None]
    beta = np.linalg.lstsq(frame.X, values - offset, rcond=None)[0]
    fitted = frame.X @ beta + offset
    return fitted, np.linalg.norm(values - fitted, axis=0) / np.sqrt(n - p)


def _weights(trend: pd.DataFrame, log_counts: np.ndarray) -> np.ndarray:
    """The trend at the log counts, interpolated and constant beyond its ends, to the power -4.

    Raises:
        DataError: a trend that is not positive.
    """
    ordered = trend.drop_duplicates("mean_log_count").sort_values("mean_log_count")
    x, y = ordered["mean_log_count"].to_numpy(), ordered["fitted"].to_numpy()
    if not np.all(y > 0):
        raise DataError(
            "the trend of standard deviations falls to zero; give a wider span, or leave out the "
            "genes with hardly any counts"
        )
    return np.interp(log_counts.ravel(), x, y).reshape(log_counts.shape) ** -4
