"""Grouping factors by their levels: which are nested, and which meet in a row. On the host."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.lazy import is_of_jax, jax, jnp
from jaxreml.model import groups
from jaxreml.model.covariance.unstructured import INDEX
from jaxreml.model.structures.base import Terms


@dataclass(frozen=True, eq=False)
class Factor:
    """One grouping factor with all its terms.

    Attributes:
        codes: (n,).
        columns: (n, q), the effects of all its terms.
        n_levels: J.
        terms: which terms they are.
        sizes: their numbers of effects.
    """

    codes: np.ndarray
    columns: np.ndarray
    n_levels: int
    terms: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def q(self) -> int:
        """Effects per level."""
        return self.columns.shape[1]

    @property
    def effects(self) -> int:
        """Random effects altogether."""
        return self.n_levels * self.q

    def by_term(self) -> list[np.ndarray]:
        """The columns of each term."""
        return np.split(self.columns, np.cumsum(self.sizes)[:-1], axis=1)

    def again(self, effects: Terms) -> Factor:
        """The same factor with other columns."""
        return replace(self, columns=_columns(effects, self.terms))

    def contains(self, finer: Factor) -> bool:
        """Whether every level of `finer` lies in one level of this factor."""
        return groups.contains(self.codes, finer.codes)

    def parents(self, finer: Factor) -> np.ndarray:
        """The level of this factor that contains each level of `finer`."""
        return groups.parents(self.codes, finer.codes, finer.n_levels).astype(INDEX)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of (n,) values by level, (J,)."""
        return np.bincount(self.codes, values, self.n_levels)


def factors_of(effects: Terms) -> list[Factor]:
    """Factors with their terms put together, most effects first."""
    found: list[list[int]] = []
    for k, (codes, *_) in enumerate(effects):
        same = [terms for terms in found if np.array_equal(codes, effects[terms[0]][0])]
        if same:
            same[0].append(k)
        else:
            found.append([k])
    factors = [
        Factor(
            effects[terms[0]][0],
            _columns(effects, terms),
            effects[terms[0]][2],
            tuple(terms),
            tuple(effects[k][1].shape[1] for k in terms),
        )
        for terms in found
    ]
    return sorted(factors, key=lambda factor: -factor.effects)


def _columns(effects: Terms, terms: Sequence[int]) -> np.ndarray:
    return np.concatenate([effects[k][1] for k in terms], axis=1)


class Tail:
    """The random effects of some factors: term by term, effect by effect.

    Attributes:
        factors: the factors.
        total: number of effects, Q.
        rows: (n, Q), their columns of Z.
        owners: per term (levels * q,), which effect of a term each of them is, counted over all.
    """

    def __init__(self, factors: list[Factor], n: int):
        self.factors = factors
        places, values, self.owners = [], [], []
        start = effects = 0
        for factor in factors:
            firsts = np.cumsum([0, *factor.sizes])
            for q, first in zip(factor.sizes, firsts, strict=False):
                places.append(start + factor.codes[:, None] + factor.n_levels * np.arange(q))
                values.append(factor.columns[:, first : first + q])
                self.owners.append(np.repeat(np.arange(effects, effects + q), factor.n_levels))
                start += factor.n_levels * q
                effects += q
        self.total = start
        if not factors:
            self.rows: Any = sp.csr_matrix((n, 0))
            return
        index = np.concatenate(places, axis=1)
        n, width = index.shape
        data = np.concatenate(values, axis=1).ravel()
        ends = np.arange(0, n * width + 1, width)
        self.rows = sp.csr_matrix((data, index.ravel(), ends), (n, self.total))

    def gram(self) -> np.ndarray:
        """Z'Z, (Q, Q)."""
        return (self.rows.T @ self.rows).toarray()

    def sums(self, columns: Any) -> Any:
        """Z' columns for (n, k), NumPy or traced."""
        if not is_of_jax(columns):
            return self.rows.T @ columns
        if not self.factors:
            return jnp.zeros((0, columns.shape[1]), columns.dtype)
        width = self.rows.indptr[1]
        places = self.rows.indices.reshape(-1, width)
        values = self.rows.data.reshape(-1, width)
        return sum(
            jax.ops.segment_sum(values[:, i, None] * columns, places[:, i], self.total)
            for i in range(width)
        )


class Meetings:
    """Which effects of the tail occur with which levels of a factor of the chain.

    Attributes:
        level, effect: (k,), sorted by level and then effect.
        ends: (J + 1,), where levels start and end.
        n_pairs: pairs of effects within a level.
    """

    def __init__(self, factor: Factor, tail: Tail):
        self._rows = tail.rows
        self._codes = factor.codes
        self._shape = (factor.n_levels, max(tail.total, 1))
        met = self._matrix(np.ones(factor.codes.size))
        counts = np.diff(met.indptr)
        self.ends = met.indptr.astype(np.int64)
        self.effect = met.indices.astype(INDEX)
        self.level = np.repeat(np.arange(factor.n_levels, dtype=INDEX), counts)
        self.n_pairs = int(np.sum(counts.astype(np.int64) * (counts + 1) // 2))

    def again(self, tail: Tail) -> Meetings:
        """The same where the tail has other columns."""
        found = copy(self)
        found._rows = tail.rows
        return found

    def _matrix(self, values: np.ndarray) -> Any:
        """Sums of values times the tail's columns; zeros are entries too."""
        if not self._rows.shape[1]:
            return sp.csr_matrix(self._shape)
        width = self._rows.indptr[1]
        data = self._rows.data * np.repeat(values, width)
        where = (np.repeat(self._codes, width), self._rows.indices)
        sums = sp.coo_matrix((data, where), self._shape).tocsr()
        sums.sum_duplicates()
        sums.sort_indices()
        return sums

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of (n,) values times the tail's columns where they meet, (k,)."""
        return self._matrix(values).data

    def places(self, parents: np.ndarray, finer: Meetings) -> np.ndarray:
        """Where the meetings of a finer factor, with these `parents`, are here."""
        here = self.level.astype(np.int64) * self._shape[1] + self.effect
        there = parents[finer.level].astype(np.int64) * self._shape[1] + finer.effect
        return np.searchsorted(here, there).astype(INDEX)

    def pairs(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (left, right) of meetings in one of `levels`, left <= right."""
        starts, counts = self.ends[levels], np.diff(self.ends)[levels]
        lefts, rights = [np.zeros(0, INDEX)], [np.zeros(0, INDEX)]
        for count in np.unique(counts[counts > 0]):
            right, left = np.tril_indices(count)
            base = starts[counts == count][:, None]
            lefts.append((base + left).ravel().astype(INDEX))
            rights.append((base + right).ravel().astype(INDEX))
        return np.concatenate(lefts), np.concatenate(rights)
