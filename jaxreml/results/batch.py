"""`BatchResults`: what `fit_many` returns, one row per response."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxreml.data.outputs import in_library
from jaxreml.errors import DataError
from jaxreml.inference.batches import fractions, testing
from jaxreml.many.fitted import FittedBatch
from jaxreml.results import annotated, batch_rows, batch_summaries, batch_tables, displays, parquet
from jaxreml.results.made_by import made_by
from jaxreml.results.moderated import moderated
from jaxreml.results.results import LMMResults
from jaxreml.status import Status


@made_by("`jaxreml.fit_many`")
@dataclass(frozen=True, eq=False, repr=False)
class BatchResults(FittedBatch):
    """One model fitted to many responses, as `jaxreml.fit_many` returns it.

    What there is, by subject, each with a row per response:

    To look at: `summary`, `top_table`, `tidy`, `glance`, `to_frame`; `jaxreml.batch_plots` draws;
    notebooks show discoveries and the first responses.

    Fixed effects: `params`, `bse`, `tvalues`, `df`, `pvalues`, `pvalues_adjusted`, `contrasts`,
    `test`, `anova`, `moderated` (empirical Bayes).

    Variances: `variances`, `log_variances`, `log_variance_se`, `correlations`, `sigma`,
    `residual_df`, `variance_fractions`, `variance_shares`, `icc`, `r2`, `repeatability`,
    `heritability`; `random_effects` if they were asked for.

    Likelihood: `llf`, `criterion`, `aic`, `bic`, `dof`; `jaxreml.compare` for two batches.

    How each ended: `converged`, `status`, `message`, `is_singular`, `nobs`, `n_missing`, `n_iter`.

    One response: `estimate`, the fit with everything that `jaxreml.fit` reports.

    Rows: `fitted_values`, `fitted_blocks`, `residual_blocks`, `simulated_blocks`.

    Files and other libraries: `to_csv`, `to_parquet`, `read_parquet`, `to_xarray`, `to_anndata`.

    Attributes:
        model, responses, fits, frame: as in `jaxreml.many.fitted.FittedBatch`.
        refit: fits response number i alone; None if the values of the responses are not at hand.
        revisit: goes through the fits once more, for `test` and `anova`; likewise.
        values: gives responses start..stop-1 on the rows of the model, (n, b); likewise.

    A pickle has the results and the rows of the model, but not the responses: `refit`, `revisit`
    and `values` are None in it, as in results read from a file. Copies have all.

    Examples:
        >>> import jaxreml, numpy as np
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> both = data[["Reaction"]].to_numpy() * [[1.0, 2.0]]
        >>> results = jaxreml.fit_many("~ Days + (Days | Subject)", data, both)
        >>> results.params["Days"].round(2).tolist()
        [10.47, 20.93]
    """

    refit: Callable[[int], LMMResults] | None = None
    revisit: Callable[[np.ndarray], Iterator[tuple[np.ndarray, Any, Any]]] | None = None
    values: Callable[[int, int], np.ndarray] | None = None

    # Tests
    test = in_library(testing.test, "response", always=True)
    anova = in_library(testing.anova, "response", always=True)
    moderated = moderated
    top_table = in_library(batch_summaries.top_table)

    # Shares of variance
    variance_fractions = in_library(fractions.variance_fractions, "response", always=True)
    variance_shares = in_library(fractions.variance_shares, "response", always=True)
    icc = in_library(fractions.icc, "response", always=True)
    r2 = in_library(fractions.r2, "response", always=True)
    repeatability = in_library(fractions.repeatability, "response", always=True)
    heritability = in_library(fractions.heritability, "response", always=True)

    # Tables and files
    summary = batch_summaries.summary
    tidy = in_library(batch_tables.tidy)
    glance = in_library(batch_tables.glance)
    to_frame = in_library(batch_tables.to_frame)
    to_xarray = batch_tables.to_xarray
    to_csv = batch_summaries.to_csv
    to_parquet = parquet.write_parquet
    to_anndata = annotated.to_anndata
    _repr_html_ = displays.of_batch
    fitted_values = batch_rows.fitted_values
    fitted_blocks = batch_rows.fitted_blocks
    residual_blocks = batch_rows.residual_blocks
    simulated_blocks = batch_rows.simulated_blocks

    @classmethod
    def read_parquet(cls, path: str | Path) -> BatchResults:
        """Read results that `to_parquet` or a streaming `fit_many` wrote.

        Examples:
            >>> results.to_parquet("genes.parquet", overwrite=True)
            >>> jaxreml.BatchResults.read_parquet("genes.parquet").params.equals(results.params)
            True
        """
        return parquet.read_parquet(path, cls)

    def estimate(self, i: int | str) -> LMMResults:
        """The fit of one response alone, with everything that `fit` reports.

        It is `fit` of the rows where the response is not missing, coded from these rows: where they
        lack a level, a factor has fewer columns and perhaps another reference level, and functions
        such as ``poly`` or ``scale`` have other values. A warning says so where coefficients are
        not those of `params` then.

        Args:
            i: its position, or its name.

        Raises:
            DataError: no such response, or its values are not at hand (results read from a file
                or made from a stream).

        Examples:
            >>> results.estimate("gene1")
            <LMMResults 'gene1 ~ Days + (1 | Subject)', REML, criterion 598.1191>
            >>> results.estimate(0).conf_int().round(2)
                         lower  upper
            (Intercept)  -0.20   1.15
            Days          0.12   0.24
        """
        if self.refit is None:
            raise DataError(
                "the values of the responses are not at hand (a stream, or results read from a "
                "file or a pickle): use jaxreml.fit on the response itself"
            )
        return self.refit(self.position(i))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "refit": None, "revisit": None, "values": None}

    def __copy__(self) -> BatchResults:
        return self._with(dict(vars(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchResults:
        return self._with(copy.deepcopy(vars(self), memo))

    def _with(self, state: dict[str, Any]) -> BatchResults:
        found = type(self).__new__(type(self))
        vars(found).update(state)
        return found

    def __repr__(self) -> str:
        failed = int(np.sum(self.fits.status != Status.CONVERGED))
        return (
            f"<BatchResults {self.model.formula!r}, {self.model.method}, {len(self)} responses, "
            f"{failed} without an optimum, {int(np.nansum(self.fits.is_singular))} singular>"
        )
