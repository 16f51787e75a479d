r"""Pedigrees: the relationship matrix A of Henderson, and its sparse inverse.

With every animal after its parents, breeding values are a = T m, where row i of T^-1 has 1 for the
animal and -1/2 for each known parent, and the Mendelian samplings m are independent with variances
D (Henderson 1976, Biometrics 32:69; Quaas 1976, Biometrics 32:949):

    d_i = 1 - (1 + F_s) / 4 - (1 + F_d) / 4, a term for each known parent,

so that A = T D T' and A^-1 = T'^-1 D^-1 T^-1, which has entries for an animal, its parents and its
mates only. Coefficients of inbreeding F are those of Meuwissen and Luo (1992, Genetics Selection
Evolution 24:305): F_i + 1 = sum_j T_ij^2 d_j over the ancestors of i, traced back one by one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.kernels.known import MOST_LEVELS, Inverse, Kernel


@dataclass(frozen=True, eq=False, repr=False)
class Pedigree:
    """Animals and their parents; ``kernels=`` takes it as it is.

    Attributes:
        labels: of the animals, parents before their offspring.
        sires, dams: (L,) places of the parents in `labels`, -1 for unknown ones.
        sampling: (L,), variances of the Mendelian samplings, in units of the additive variance.
        inbreeding: coefficients of inbreeding, by animal.

    Examples:
        >>> tree
        <Pedigree of 3 animals, 1 of them founders, largest inbreeding 0.25>
        >>> tree.inbreeding.to_dict()
        {'bull': 0.0, 'cow': 0.0, 'calf': 0.25}
    """

    labels: tuple[Any, ...]
    sires: np.ndarray
    dams: np.ndarray
    sampling: np.ndarray
    inbreeding: pd.Series

    def __repr__(self) -> str:
        founders = int(np.sum((self.sires < 0) & (self.dams < 0)))
        return (
            f"<Pedigree of {len(self.labels)} animals, {founders} of them founders, largest "
            f"inbreeding {self.inbreeding.max():.3g}>"
        )

    @property
    def inverse(self) -> Inverse:
        """A^-1, sparse, with its labels.

        Examples:
            >>> tree.inverse.matrix.toarray().round(2)
            array([[ 1.83, -0.17, -1.  ],
                   [-0.17,  1.83, -1.  ],
                   [-1.  , -1.  ,  2.  ]])
        """
        from scipy import sparse

        weights = sparse.diags_array(1 / self.sampling)
        own = self._own_parts()
        return Inverse(sparse.csc_matrix(own.T @ weights @ own), self.labels)

    def relationship(self, labels: Iterable[Any] | None = None) -> pd.DataFrame:
        """A, of all animals or of some: twice the coefficients of coancestry, 1 + F on the
        diagonal.

        Raises:
            DataError: animals that the pedigree does not have, or more than 10,000.

        Examples:
            >>> tree.relationship(["calf", "bull"])
                  calf  bull
            calf  1.25  0.75
            bull  0.75  1.00
        """
        from scipy.sparse.linalg import spsolve_triangular

        index = pd.Index(self.labels, tupleize_cols=False)
        wanted = index if labels is None else pd.Index(list(labels), tupleize_cols=False)
        places = index.get_indexer(wanted)
        if np.any(places < 0):
            raise DataError(f"the pedigree has no animal {wanted[int(np.argmax(places < 0))]!r}")
        if len(wanted) > MOST_LEVELS:
            raise DataError(
                f"the relationship of {len(wanted)} animals is a dense matrix; {MOST_LEVELS} are "
                "the most. Take that of the animals that have records, by relationship(labels)"
            )
        right = np.zeros((len(index), len(wanted)))
        right[places, np.arange(len(wanted))] = 1.0
        upper = self._own_parts().T.tocsr()
        rows = spsolve_triangular(upper, right, lower=False, overwrite_b=True)  # T'
        rows *= np.sqrt(self.sampling)[:, None]
        return pd.DataFrame(rows.T @ rows, wanted, wanted)

    def kernel(self) -> Kernel:
        """A of all animals, for ``kernels=``; errors as `relationship`.

        Examples:
            >>> kernels.pedigree(["calf"], ["bull"], ["cow"]).kernel()
            <Kernel of 3 levels, 'bull', 'cow', 'calf'>
        """
        return Kernel(self.relationship().to_numpy(), self.labels)

    def _own_parts(self) -> Any:
        """T^-1, sparse: lower triangular."""
        from scipy import sparse

        n = len(self.labels)
        rows, columns, values = [np.arange(n)], [np.arange(n)], [np.ones(n)]
        for parents in (self.sires, self.dams):
            known = np.flatnonzero(parents >= 0)
            rows.append(known)
            columns.append(parents[known])
            values.append(np.full(known.size, -0.5))
        parts = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix(parts, shape=(n, n))


def pedigree(animal: Any, sire: Any, dam: Any, *, unknown: Iterable[Any] = ()) -> Pedigree:
    """A pedigree from columns: an animal and its parents in each row, in any order.

    Parents without a row of their own are founders. Without inbreeding a founder's variance is 1,
    which is what the additive variance refers to.

    Args:
        animal, sire, dam: labels, columns of a table. A missing label is an unknown parent.
        unknown: labels that mean an unknown parent, such as 0, besides.

    Raises:
        DataError: an animal that has two rows, is its own ancestor or both a sire and a dam of one
            animal, named.

    Examples:
        >>> from jaxreml import kernels
        >>> tree = kernels.pedigree(["calf", "cow"], ["bull", "bull"], ["cow", None])
        >>> tree.relationship()
              bull   cow  calf
        bull  1.00  0.50  0.75
        cow   0.50  1.00  0.75
        calf  0.75  0.75  1.25
    """
    animals, sires, dams = (_labels(column, tuple(unknown)) for column in (animal, sire, dam))
    if not len(animals) == len(sires) == len(dams):
        raise DataError(
            f"animal, sire and dam must be of one length, not {len(animals)}, {len(sires)} and "
            f"{len(dams)}"
        )
    parents: dict[Any, tuple[Any, Any]] = {}
    for own, father, mother in zip(animals, sires, dams, strict=True):
        if own is None:
            raise DataError("the pedigree has a row without an animal")
        if own in parents:
            raise DataError(f"the animal {own!r} has more than one row in the pedigree")
        if father is not None and father == mother:
            raise DataError(f"{father!r} is both the sire and the dam of {own!r}")
        parents[own] = father, mother
    founders = [p for both in parents.values() for p in both if p is not None]
    for own in founders:
        parents.setdefault(own, (None, None))
    order = _parents_first(parents)
    place = {own: k for k, own in enumerate(order)}
    of_sire, of_dam = (
        np.array([place.get(parents[own][side], -1) for own in order]) for side in range(2)
    )
    inbreeding, sampling = _inbreeding(of_sire, of_dam)
    index = pd.Index(order, tupleize_cols=False)
    return Pedigree(
        tuple(order), of_sire, of_dam, sampling, pd.Series(inbreeding, index, name="inbreeding")
    )


def _labels(column: Any, unknown: tuple[Any, ...]) -> list[Any]:
    """Labels of a column, None for unknown ones."""
    series = pd.Series(column, dtype=object) if isinstance(column, list | tuple) else column
    series = pd.Series(series).astype(object)
    missing = series.isna() | series.isin(list(unknown))
    return [None if gone else own for own, gone in zip(series.tolist(), missing, strict=True)]


def _parents_first(parents: dict[Any, tuple[Any, Any]]) -> list[Any]:
    """The animals in an order in which parents come before their offspring."""
    offspring: dict[Any, list[Any]] = {own: [] for own in parents}
    waits = {}
    for own, both in parents.items():
        known = [p for p in both if p is not None]
        waits[own] = len(known)
        for parent in known:
            offspring[parent].append(own)
    ready = [own for own, count in waits.items() if not count]
    for own in ready:  # grows
        for child in offspring[own]:
            waits[child] -= 1
            if not waits[child]:
                ready.append(child)
    if len(ready) < len(parents):
        loop = next(own for own, count in waits.items() if count)
        seen: list[Any] = []
        while loop not in seen:
            seen.append(loop)
            loop = next(p for p in parents[loop] if p is not None and waits[p])
        raise DataError(f"the animal {loop!r} is its own ancestor in the pedigree")
    return ready


def _inbreeding(sires: np.ndarray, dams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of inbreeding, and variances of Mendelian samplings, (L,), of animals after
    their parents."""
    n = len(sires)
    inbreeding, sampling = np.zeros(n), np.ones(n)
    father, mother = sires.tolist(), dams.tolist()
    full_sibs: dict[tuple[int, int], float] = {}
    for i in range(n):
        s, d = father[i], mother[i]
        sampling[i] = 1.0 - sum((1 + inbreeding[p]) / 4 for p in (s, d) if p >= 0)
        if s < 0 or d < 0:
            continue
        pair = min(s, d), max(s, d)
        if pair not in full_sibs:
            full_sibs[pair] = _diagonal(i, father, mother, sampling) - 1
        inbreeding[i] = full_sibs[pair]
    return inbreeding, sampling


def _diagonal(i: int, father: list[int], mother: list[int], sampling: np.ndarray) -> float:
    """sum_j T_ij^2 d_j, from the youngest ancestor to the oldest."""
    share = {i: 1.0}
    queue = [-i]
    total = 0.0
    while queue:
        j = -heapq.heappop(queue)
        own = share.pop(j)
        total += own**2 * sampling[j]
        for parent in (father[j], mother[j]):
            if parent >= 0:
                if parent not in share:
                    share[parent] = 0.0
                    heapq.heappush(queue, -parent)
                share[parent] += own / 2
    return total
