"""Columns that depend on others, and which functions of the fixed effects the data determine.

With columns of X that depend on others, coefficients are those of one choice of columns, and only
functions in the row space are the same for every choice (Searle 1971, Linear Models, ch. 5.4).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreml.model import tall

ALIASED = 1e-7  # R's tolerance for a column that depends on those before it
ESTIMABLE = 1e-8  # emmeans' tolerance, of the squared length outside the row space of X


def independent_columns(X: np.ndarray) -> np.ndarray:
    """Which columns do not depend linearly on columns before them, as R chooses them."""
    kept = np.arange(X.shape[1])
    if tall.triangle(X) is not None:
        return kept
    lengths = np.linalg.norm(X, axis=0)
    while kept.size:
        diagonal = np.abs(np.diagonal(np.linalg.qr(X[:, kept], mode="r")))
        diagonal = np.pad(diagonal, (0, kept.size - diagonal.size))  # more columns than rows
        dependent = diagonal <= ALIASED * lengths[kept]
        if not dependent.any():
            break
        kept = np.delete(kept, int(np.argmax(dependent)))
    return kept


class RowSpace:
    """The row space of a model matrix.

    Args:
        full: (n, P), X with its aliased columns.
        kept: (p,), the columns that have coefficients; the others depend on them.
    """

    def __init__(self, full: np.ndarray, kept: np.ndarray):
        p = full.shape[1]
        lengths = np.linalg.norm(full, axis=0)
        self._lengths = np.where(lengths > 0, lengths, 1.0)  # units of columns change nothing then
        dropped = np.setdiff1d(np.arange(p), kept)
        vectors = np.zeros((p, dropped.size))
        vectors[dropped, np.arange(dropped.size)] = 1.0
        scaled: Any = full / self._lengths
        if dropped.size:
            vectors[kept] = -np.linalg.lstsq(scaled[:, kept], scaled[:, dropped])[0]
        self._null_space = np.linalg.qr(vectors)[0]  # what `scaled` takes to zero, (P, d)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What `of_parts` makes it of again."""
        return self._lengths, self._null_space

    @property
    def null_space(self) -> np.ndarray:
        """(P, d), orthonormal combinations of the columns that are zero."""
        return np.linalg.qr(self._null_space / self._lengths[:, None])[0]

    @classmethod
    def of_parts(cls, lengths: np.ndarray, null_space: np.ndarray) -> RowSpace:
        """From the `parts` of another."""
        made = cls.__new__(cls)
        made._lengths, made._null_space = lengths, null_space
        return made

    def contains(self, L: np.ndarray) -> np.ndarray:
        """Which rows of (m, P) `L` are in it, booleans."""
        L = L / self._lengths
        outside = L @ self._null_space
        squared = np.einsum("mp,mp->m", L, L)
        return np.einsum("md,md->m", outside, outside) <= ESTIMABLE * np.maximum(squared, 1e-300)
