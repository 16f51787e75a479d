"""Results of many fits into AnnData objects."""

from __future__ import annotations

from typing import Any

import pandas as pd

from jaxreml.errors import DataError
from jaxreml.many.fitted import FittedBatch
from jaxreml.results.batch_tables import to_frame


def to_anndata(results: FittedBatch, adata: Any, key: str = "jaxreml") -> None:
    """Put results into ``adata.varm[key]``, a frame with a row per variable and the columns of
    `to_frame`; and into ``adata.uns[key]`` what they share (formula, method, df, ...).

    Args:
        results: their responses are variables of `adata`, all or some.
        adata: an AnnData object, which is changed.
        key: in `varm` and `uns`.

    Variables that are no response have missing values.

    Raises:
        DataError: a response that is no variable.

    Examples:
        >>> import anndata
        >>> adata = anndata.AnnData(genes.rename(index=str))
        >>> results.to_anndata(adata)
        >>> adata.varm["jaxreml"]["beta[Days]"].round(2).head(2).tolist()
        [0.18, 0.2]
    """
    missing = results.responses[~results.responses.isin(adata.var_names)]
    if len(missing):
        raise DataError(
            f"{len(missing)} responses are no variables of the AnnData object, such as "
            f"{missing[0]!r}"
        )
    frame = to_frame(results).set_index("response")
    if len(frame) < adata.n_vars:  # some are missing, for which pandas has booleans of its own
        kinds = {name: "boolean" for name in frame if frame[name].dtype == bool}
        frame = frame.astype(kinds).reindex(pd.Index(adata.var_names))
    adata.varm[key] = frame.loc[adata.var_names]
    model = results.model
    adata.uns[key] = {
        "formula": model.formula,
        "method": model.method,
        "df": model.df,
        "fixed_effects": list(model.fixed_names),
        "n_dropped": model.n_dropped,
    }
