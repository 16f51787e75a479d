"""Matrices of responses: dense ones, whatever they are kept in, sparse ones, and AnnData's.

Columns are made dense float64 some at a time. A source of responses has `names`, `n` rows and their
`labels` (None without), and says which of its columns are no numbers.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.labels import ids_of, row_labels
from jaxreml.data.names import check_names
from jaxreml.data.tables import column_names, nearest
from jaxreml.errors import DataError


class Array:
    """Columns of an array: NumPy's, a memory map, or anything that slices like one, such as arrays
    of h5py and Zarr.

    Args:
        values: (n, B), or (n,).
        names: of the columns; their numbers if left out.
        rows: a table of what is known of the rows, for their labels and ids.
    """

    def __init__(self, values: Any, names: Any = None, rows: Any = None):
        if not hasattr(values, "ndim") or not hasattr(values, "dtype"):
            values = np.asarray(values)
        if values.ndim == 1:
            values = values.reshape(-1, 1)
        if values.ndim != 2:
            raise DataError(
                f"responses must be an (n, B) array, a column per response, not {values.shape}"
            )
        kind = np.dtype(values.dtype)
        if kind.kind not in "biuf":
            raise DataError(
                f"the responses are an array of dtype {kind}, which is not numeric; convert it, "
                "for example with .astype(float)"
            )
        self.values, self.n, self.rows = values, values.shape[0], rows
        self.labels = None if rows is None else row_labels(rows)
        self.names = pd.RangeIndex(values.shape[1]) if names is None else check_names(names)
        if len(self.names) != values.shape[1]:
            raise DataError(
                f"{len(self.names)} names for {values.shape[1]} responses: a block is a pair of "
                "names and an (n, b) array with a column per name"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start), a copy."""
        part = self.values[:, start:stop]
        if isinstance(part, np.ma.MaskedArray):
            return np.ma.filled(part.astype(float), np.nan)
        block = np.array(part, dtype=float, order="C")
        _let_go(self.values)
        return block

    def not_numeric(self) -> list[tuple[Any, Any]]:
        """Columns that are not numbers, with their kinds: none."""
        return []

    def ids(self, name: str) -> pd.Series | None:
        """Values of the id column, or of the index of that name; None if there is neither.

        Raises:
            DataError: nothing is known of the rows.
        """
        if self.rows is None:
            raise DataError(
                f"id={name!r} needs responses in a dataframe with that column, not an array"
            )
        return ids_of(self.rows, self.labels, name)

    @property
    def columns(self) -> list[str]:
        """Names of what is known of the rows."""
        return [] if self.rows is None else column_names(self.rows)


class Sparse(Array):
    """Columns of a SciPy sparse matrix, zero where none is stored; turned to columns once."""

    def __init__(self, values: Any, names: Any = None, rows: Any = None):
        if values.ndim != 2:
            raise DataError(
                f"responses must be an (n, B) array, a column per response, not {values.shape}"
            )
        super().__init__(values.tocsc(), names, rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop-1, (n, stop - start), dense."""
        return np.ascontiguousarray(self.values[:, start:stop].toarray(), float)


def is_sparse(value: Any) -> bool:
    """Whether it is a sparse matrix or array of SciPy."""
    module = sys.modules.get("scipy.sparse")  # there is none if it was never imported
    return module is not None and bool(module.issparse(value))


def matrix(values: Any, names: Any = None, rows: Any = None) -> Array:
    """Dense or sparse."""
    return (Sparse if is_sparse(values) else Array)(values, names, rows)


def is_anndata(value: Any) -> bool:
    """Whether it is an AnnData object."""
    return type(value).__module__.partition(".")[0] == "anndata" and hasattr(value, "obs_names")


def annotated(adata: Any, layer: str | None = None) -> Array:
    """The variables of an AnnData object, named by `var_names`, with `obs` for the rows.

    Args:
        adata: the object, in memory or backed by a file.
        layer: which of its layers; X if left out.

    Raises:
        DataError: no such layer, or no X; names that repeat; values that are not numbers.
    """
    names = list(adata.layers)
    if layer is not None and layer not in names:
        raise DataError(f"the AnnData object has no layer {layer!r}{_layers(layer, names)}")
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise DataError(f"the AnnData object has no X: name a layer{_layers('', names)}")
    if not adata.var_names.is_unique:
        raise DataError(
            "the names of the variables of the AnnData object repeat: call "
            "adata.var_names_make_unique()"
        )
    if hasattr(values, "to_memory"):  # a sparse matrix in a file, which is slow by columns
        values = values.to_memory()
    return matrix(values, list(adata.var_names), adata.obs)


def _layers(layer: str, names: list[str]) -> str:
    if not names:
        return "; it has no layers"
    return nearest(layer, names).replace("The columns are", "The layers are")


def _let_go(values: Any) -> None:
    """Take the pages read of a memory map out of this process; the file keeps them.

    Without this a map of 4 GB ends up as 4 GB of this process. A private map (mode "c") is left
    alone: its pages may be the only place of changes.
    """
    if isinstance(values, np.memmap) and getattr(values, "mode", "c") != "c":
        pages = getattr(values, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
