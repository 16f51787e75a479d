"""What ``kernels=`` takes: a matrix with labels, or a sparse inverse with labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError

ROUNDING = 1e-8  # what is none of a difference of two entries, or of a negative eigenvalue, both
# relative to the largest variance
MOST_LEVELS = 10_000  # of a dense covariance: 800 MB
BLOCK = 2**24  # numbers of columns that are solved for at a time


@dataclass(frozen=True, eq=False, repr=False)
class Kernel:
    """A covariance matrix of the levels of a grouping factor, up to the factor that is estimated.

    Data frames with labels need none of this: give them as they are.

    Attributes:
        matrix: (L, L), symmetric and positive semidefinite.
        labels: L labels of the levels, as the data have them.

    Examples:
        >>> import numpy as np
        >>> from jaxreml import kernels
        >>> kernels.Kernel(np.array([[1.0, 0.5], [0.5, 1.0]]), ["mother", "child"])
        <Kernel of 2 levels, 'mother', 'child'>
    """

    matrix: np.ndarray
    labels: Sequence[Any] = field(default=())

    def __repr__(self) -> str:
        return f"<Kernel of {_levels(self.labels)}>"

    def covariance(self) -> pd.DataFrame:
        """The matrix with its labels.

        Examples:
            >>> kernels.Kernel(np.eye(2), ["a", "b"]).covariance().loc["a", "b"].item()
            0.0
        """
        labels = _index(self.labels)
        return pd.DataFrame(self.matrix, labels, labels)


@dataclass(frozen=True, eq=False, repr=False)
class Inverse:
    """A covariance matrix of levels given by its inverse: pedigrees and neighbourhoods have sparse
    ones.

    Attributes:
        matrix: (L, L), SciPy's sparse or NumPy's, symmetric and positive definite.
        labels: L labels of the levels, as the data have them.

    Examples:
        >>> import numpy as np
        >>> from jaxreml import kernels
        >>> inverse = kernels.Inverse(np.array([[2.0, -1.0], [-1.0, 2.0]]), ["a", "b"])
        >>> inverse
        <Inverse of 2 levels, 'a', 'b'>
        >>> inverse.covariance().round(3)
               a      b
        a  0.667  0.333
        b  0.333  0.667
    """

    matrix: Any
    labels: Sequence[Any] = field(default=())

    def __repr__(self) -> str:
        return f"<Inverse of {_levels(self.labels)}>"

    def covariance(self, labels: Iterable[Any] | None = None) -> pd.DataFrame:
        """The covariance matrix, of all levels or of some.

        Args:
            labels: of the levels wanted; all if left out. A large pedigree of which few animals
                have records is better given to `jaxreml.fit` as their covariance.

        Raises:
            DataError: a matrix that is not positive definite, labels that it does not have, more
                than 10,000 levels.

        Examples:
            >>> inverse = kernels.Inverse(np.array([[2.0, -1.0], [-1.0, 2.0]]), ["a", "b"])
            >>> inverse.covariance(["b"]).round(3)
                   b
            b  0.667
        """
        index = _index(self.labels)
        if len(index) != self.matrix.shape[0]:
            raise DataError(
                f"the inverse has {self.matrix.shape[0]} rows and {len(index)} labels: give one "
                "label for each"
            )
        wanted = index if labels is None else pd.Index(list(labels), tupleize_cols=False)
        places = index.get_indexer(wanted)
        if np.any(places < 0):
            raise DataError(f"the inverse has no level {wanted[np.argmax(places < 0)]!r}")
        if len(wanted) > MOST_LEVELS:
            raise DataError(
                f"the covariance of {len(wanted)} levels is a dense matrix; {MOST_LEVELS} are the "
                "most. Take that of the levels that have records, by covariance(labels)"
            )
        return pd.DataFrame(self._columns(places), wanted, wanted)

    def _columns(self, places: np.ndarray) -> np.ndarray:
        """Rows and columns of the covariance."""
        solve, n = self._solver, self.matrix.shape[0]
        found = np.empty((len(places),) * 2)
        step = max(1, BLOCK // n)
        for start in range(0, len(places), step):
            own = places[start : start + step]
            right = np.zeros((n, len(own)))
            right[own, np.arange(len(own))] = 1.0
            found[:, start : start + step] = solve(right)[places]
        return (found + found.T) / 2

    @cached_property
    def _solver(self) -> Any:
        """(n, k) right sides to solutions."""
        from scipy import sparse
        from scipy.sparse.linalg import splu

        matrix = sparse.csc_matrix(self.matrix, dtype=float)
        off = abs(matrix - matrix.T)
        size = abs(matrix).max()
        if off.nnz and off.max() > ROUNDING * size:
            raise DataError("the inverse of a covariance must be symmetric, and this is not")
        options = {"SymmetricMode": True}
        try:
            factor = splu(
                matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options
            )
        except RuntimeError:
            raise DataError(_SINGULAR) from None
        pivots = factor.U.diagonal()
        if not np.all(pivots > 1e-12 * size):
            raise DataError(_SINGULAR)
        return factor.solve


_SINGULAR = (
    "the inverse of a covariance must be positive definite, and this is not. An intrinsic "
    "autoregression has no inverse: jaxreml.kernels.icar makes its covariance"
)


def _levels(labels: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, list(labels)[:3]))
    return f"{len(labels)} levels, {shown}{', ...' if len(labels) > 3 else ''}"


def _index(labels: Sequence[Any]) -> pd.Index:
    return pd.Index(list(labels), tupleize_cols=False)


def checked(name: str, frame: pd.DataFrame) -> tuple[tuple[Any, ...], np.ndarray]:
    """Labels and matrix (L, L) of a labelled covariance, rows and columns in the same order.

    Args:
        name: what it is called in messages.
        frame: with labels on both sides.

    Raises:
        DataError: no square matrix, labels that are missing, repeated or not those of the other
            side, entries that are not finite, a matrix that is not symmetric or not positive
            semidefinite.
    """
    rows, columns = frame.index, frame.columns
    if frame.shape[0] != frame.shape[1]:
        raise DataError(
            f"{name} is not square: it has {frame.shape[0]} rows, {frame.shape[1]} columns"
        )
    for side, labels in (("row", rows), ("column", columns)):
        if labels.hasnans:
            raise DataError(f"{name} has a missing {side} label")
        if labels.has_duplicates:
            twice = labels[labels.duplicated()][0]
            raise DataError(f"{name} has the {side} label {twice!r} more than once")
    places = columns.get_indexer(rows)
    if np.any(places < 0):
        raise DataError(
            f"{name} has the row label {rows[int(np.argmax(places < 0))]!r}, which is no label of "
            "its columns"
        )
    try:
        matrix = frame.to_numpy(float)
    except (TypeError, ValueError):
        raise DataError(f"{name} has entries that are no numbers") from None
    if not np.array_equal(places, np.arange(len(places))):
        matrix = matrix[:, places]
    require_covariance(name, matrix, rows)
    return tuple(rows.tolist()), np.ascontiguousarray(matrix)


def tolerance(dtype: Any) -> float:
    """`ROUNDING`, or what is rounding in single precision."""
    return max(ROUNDING, 100 * float(np.finfo(dtype).eps))


def require_covariance(name: str, matrix: np.ndarray, labels: Any) -> None:
    """Raise DataError unless a matrix is finite, symmetric and positive semidefinite."""
    share = tolerance(matrix.dtype)
    if not np.all(np.isfinite(matrix)):
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise DataError(
            f"{name} has the entry {matrix[row, column]} at {labels[row]!r}, {labels[column]!r}"
        )
    size = max(float(np.diagonal(matrix).max(initial=0.0)), 0.0)
    off = np.abs(matrix - matrix.T)
    if off.max(initial=0.0) > share * max(size, float(np.abs(matrix).max(initial=0.0))):
        row, column = np.unravel_index(np.argmax(off), off.shape)
        first, second = labels[int(row)], labels[int(column)]
        raise DataError(
            f"{name} is not symmetric: {matrix[row, column]:g} at {first!r}, {second!r} and "
            f"{matrix[column, row]:g} at {second!r}, {first!r}"
        )
    if size == 0:
        raise DataError(f"{name} has no variance above zero on its diagonal")
    if _is_definite(matrix, share * size):
        return
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if smallest < -share * size:
        raise DataError(
            f"{name} is not positive semidefinite: its smallest eigenvalue is {smallest:.3g}, and "
            f"no less than {-share * size:.3g} ({share:.0e} of the largest variance) counts as "
            "rounding. A covariance matrix is needed; jaxreml.kernels.matern makes one of "
            "distances"
        )


def _is_definite(matrix: np.ndarray, shift: float) -> bool:
    """Whether a Cholesky factorisation of the matrix and a little more says that it is."""
    shifted = matrix.copy()
    np.einsum("ii->i", shifted)[:] += shift
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def labelled(what: str, table: Any, labels: Sequence[Any] | None) -> pd.Index:
    """Labels of the rows of a table: those given, or its index, or 0, 1, ...

    Raises:
        DataError: labels of another number, missing or repeated ones.
    """
    count = np.shape(table)[0] if np.ndim(table) else len(table)
    if labels is not None:
        index = _index(labels)
    elif isinstance(table, pd.DataFrame | pd.Series):
        index = table.index
    else:
        index = pd.RangeIndex(count)
    if len(index) != count:
        raise DataError(f"{what} has {count} rows and {len(index)} labels: give one for each")
    if index.hasnans:
        raise DataError(f"{what} has a missing label")
    if index.has_duplicates:
        raise DataError(f"{what} has the label {index[index.duplicated()][0]!r} more than once")
    return index
