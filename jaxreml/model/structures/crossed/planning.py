"""Preparation of the crossed structure on the host: what is eliminated, and the arrays for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import mapped
from jaxreml.backend.lazy import is_of_jax, jax, jnp
from jaxreml.errors import DataError
from jaxreml.model.covariance.unstructured import INDEX, triangle
from jaxreml.model.structures.base import Terms
from jaxreml.model.structures.crossed.crossed import Crossed, Moments
from jaxreml.model.structures.crossed.elimination import DENSE, Products, Stage, Weighted
from jaxreml.model.structures.crossed.meetings import Factor, Meetings, Tail, factors_of
from jaxreml.model.structures.grouped import GroupedBasis, equal_levels

PAIR = 300  # multiplications of a matrix product that take as long as one pair of couplings
MOST_PAIRS = 5 * 10**7  # in a later factor of the chain; above, it goes to the tail
CHUNK = 10**7  # pairs listed at a time
MOST_COUNTED = 10**4  # effects of the tail up to which equal pairs of equal levels are summed
MEMORY_SHARE = 0.8  # of the machine's memory that one evaluation may take
NOISE = 1e-13  # share of a cross-product that rounding leaves where nothing is left of it


class CrossedBasis:
    """What does not depend on X and y.

    Args:
        effects: one (codes (n,), columns (n, q), levels) per term, concrete, columns scaled.
        residual: which term is the covariance of residuals, whose factor is eliminated first: every
            other one may have levels beyond a subject's, and V needs I + Omega of them to be
            definite. None where residuals are independent.
        like: a basis of the same levels, with other columns. What follows from levels alone is
            taken from it, and equal levels are not put together: all that are like it have the
            same shapes.

    Raises:
        DataError: one evaluation would not fit into memory.
    """

    def __init__(
        self, effects: Terms, like: CrossedBasis | None = None, residual: int | None = None
    ):
        n = effects[0][0].size
        if like is None:
            factors = factors_of(effects)
            factors.sort(key=lambda factor: residual not in factor.terms)
            self._choose_chain(factors, n)
        else:
            self.chain = [factor.again(effects) for factor in like.chain]
            self.tail = Tail([factor.again(effects) for factor in like.tail.factors], n)
            self.meetings = [meetings.again(self.tail) for meetings in like.meetings]
        first = self.chain[0]
        self.first = GroupedBasis.of(first.codes, first.columns, first.n_levels)
        classes = equal_levels(self.first.factors) if like is None else np.arange(first.n_levels)
        self.plan = _choose(classes, self.meetings[0], self.tail.total)
        self._check_memory()
        self.stages = self._couple()
        self.moments = self._moments() if residual is None else None

    def _choose_chain(self, factors: list[Factor], n: int) -> None:
        """Chain, tail and where they meet."""
        chain = factors[:1]
        for factor in factors[1:]:
            if factor.contains(chain[-1]):
                chain.append(factor)
        while True:
            self.chain = chain
            self.tail = Tail([factor for factor in factors if factor not in chain], n)
            self.meetings = [Meetings(factor, self.tail) for factor in chain]
            crowded = [k for k, m in enumerate(self.meetings) if k and m.n_pairs > MOST_PAIRS]
            if not crowded:
                break
            chain = chain[: crowded[0]]

    def _check_memory(self) -> None:
        total, light = self.tail.total, int(self.plan.light.sum())
        m = sum(q * (q + 1) // 2 for q in self.chain[0].sizes)
        pairs = light + sum(meetings.n_pairs for meetings in self.meetings[1:])
        couplings = sum(meetings.level.size for meetings in self.meetings)
        full = int(self.plan.full.size) * self.chain[0].q * total
        size = 8 * (total**2 * (8 + 3 * m) + pairs * (4 + 2 * m) + couplings * 20 + 3 * full)
        limit = MEMORY_SHARE * _memory()
        if size > limit:
            raise DataError(
                f"the model would need about {size / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB "
                "may be used. Besides the largest grouping factor and those that it is nested in, "
                f"there are {total} random effects, which need dense matrices of that order, and "
                f"{pairs} pairs of them meet in a level. Fewer levels, or effects per level, of "
                "these factors would help, or leaving one of them out"
            )

    def _couple(self) -> tuple[Stage, ...]:
        """All stages, without X and y."""
        first, *later = self.chain
        directions = self.first.directions.T
        of_chain = [
            np.array([[first.sums(d * column) for column in factor.columns.T] for d in directions])
            for factor in later
        ]
        of_tail = np.array([self.meetings[0].sums(d) for d in directions])
        pairs, explained = _weighted(self.plan, self.meetings[0], of_tail, self.tail.total)
        self.rest = _cleaned(self.tail.gram(), explained)
        start = self._stage(0, self.first.factors, of_chain, of_tail, pairs)
        return (start, *(self._later_stage(k, of_chain, of_tail) for k in range(1, 1 + len(later))))

    def _later_stage(self, k: int, of_chain: list[np.ndarray], of_tail: np.ndarray) -> Stage:
        """The k-th stage: cross-products less what the first factor explains of them.

        Args:
            k: from 1.
            of_chain, of_tail: scores Q'Z of the later stages' effects and of the tail's.
        """
        first, factor = self.chain[0], self.chain[k]
        up = factor.parents(first)
        own = of_chain[k - 1]
        matrix, *chain = (
            _cleaned(_products(factor, other), _by_parent(own, scores, up, factor))
            for other, scores in zip(self.chain[k:], of_chain[k - 1 :], strict=True)
        )
        meetings = self.meetings[k]
        places = meetings.places(up, self.meetings[0])
        whole = np.array([meetings.sums(column) for column in factor.columns.T])
        products = np.einsum("abk,ak->bk", own[:, :, self.meetings[0].level], of_tail)
        explained = [np.bincount(places, row, whole.shape[1]) for row in products]
        tail = _cleaned(whole, np.reshape(explained, whole.shape))
        pairs = _products_of(meetings, self.tail.total)
        return self._stage(k, matrix, chain, tail, pairs)

    def _stage(
        self, k: int, matrix: np.ndarray, chain: list[np.ndarray], tail: np.ndarray, pairs: Any
    ) -> Stage:
        factor, meetings = self.chain[k], self.meetings[k]
        ups = [other.parents(factor) for other in self.chain[k + 1 :]]
        containing = zip(self.meetings[k + 1 :], ups, strict=True)
        fields: Any = {
            "matrix": matrix,
            "chain": tuple(chain),
            "tail": tail,
            "columns": np.zeros((factor.q, 0, factor.n_levels)),
            "up": tuple(ups),
            "level": meetings.level,
            "effect": meetings.effect,
            "tail_up": tuple(other.places(up, meetings) for other, up in containing),
            "pairs": pairs,
            "sizes": factor.sizes,
        }
        return Stage(**fields)

    def _moments(self) -> Moments:
        factors = [*self.chain, *self.tail.factors]
        bases, turned = [], []
        for factor in factors:
            own = [_orthogonal(columns) for columns in factor.by_term()]
            bases += own
            columns = np.concatenate(
                [c @ basis for c, basis in zip(factor.by_term(), own, strict=True)], axis=1
            )
            turned.append(replace(factor, columns=columns))
        n = self.tail.rows.shape[0]
        every = Tail(turned, n)
        squares = np.asarray(every.rows.power(2).sum(axis=0)).ravel()
        shrinkage = 1 / (1 + squares)
        owners = np.concatenate(every.owners)
        v = owners.max() + 1
        indicator = sp.csr_matrix((np.ones(owners.size), (np.arange(owners.size), owners)))
        weighted = indicator.T @ sp.diags(shrinkage**2)
        expected = np.zeros((v + 1, v + 1))
        expected[:v, :v] = (weighted @ (every.rows.T @ every.rows).power(2) @ indicator).toarray()
        expected[:v, v] = weighted @ squares
        expected[v, :v] = indicator.T @ squares / n
        expected[v, v] = 1.0
        # Effects of equal squares, such as 1 and -1, share what is theirs.
        unit = 1 / np.sqrt(np.diagonal(expected))
        inverse = np.linalg.pinv(expected * unit[:, None] * unit, rcond=1e-8) * unit[:, None] * unit
        ends = np.cumsum([len(part) for part in every.owners])[:-1]
        by_term = [
            part.reshape(len(basis), -1)
            for part, basis in zip(np.split(shrinkage, ends), bases, strict=True)
        ]
        fields: Any = (tuple(bases), tuple(by_term), inverse, np.array(float(n)))
        return Moments(*fields)

    def project(self, columns: Any) -> tuple[tuple[Any, ...], Any]:
        """`Crossed.columns` of (n, k) rows, NumPy or traced, and what the first factor leaves of
        them, (n, k)."""
        scores, rest = self.first.project(columns)
        later = [_sums(own.columns, own.codes, own.n_levels, rest) for own in self.chain[1:]]
        return (scores, *later, self.tail.sums(rest)), rest

    def products(self, columns: Any) -> None:
        """There are no traced effects here."""

    def structure(
        self, scores: tuple[Any, ...], remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Crossed:
        """The structure of columns."""
        pairs = zip(self.stages, scores[:-1], strict=True)
        stages = tuple(replace(stage, columns=part) for stage, part in pairs)
        order = [k for factor in (*self.chain, *self.tail.factors) for k in factor.terms]
        fields: Any = (stages, self.rest, scores[-1], remainder, self.moments)
        fields = mapped(partial(_to_type, kind=remainder.dtype), fields)
        levels = tuple(factor.n_levels for factor in self.tail.factors for _ in factor.terms)
        return Crossed(*fields, sizes=sizes, order=tuple(order), levels=levels)


@dataclass(frozen=True)
class _Plan:
    """How the first factor's part of the tail's cross-products is summed.

    Attributes:
        classes: (J,), levels of one F.
        full: levels kept as rows; the others as pairs.
        light: (C,), pairs of each class, 0 for one whose levels are kept as rows.
    """

    classes: np.ndarray
    full: np.ndarray
    light: np.ndarray


def _choose(classes: np.ndarray, meetings: Meetings, total: int) -> _Plan:
    """Whether pairs or rows are cheaper for each class of levels, (J,)."""
    counts = np.diff(meetings.ends)
    levels = np.bincount(classes)
    pairs = np.bincount(classes, counts * (counts + 1.0) / 2)
    by_rows = levels * 2.0 * total**2 < PAIR * np.minimum(pairs, total * (total + 1) / 2)
    full = np.flatnonzero(by_rows[classes] & (counts > 0)).astype(INDEX)
    return _Plan(classes, full, np.where(by_rows, 0, pairs))


def _weighted(
    plan: _Plan, meetings: Meetings, values: np.ndarray, total: int
) -> tuple[Weighted, np.ndarray]:
    """The first factor's products, and their sum for P = I, (Q, Q)."""
    q = len(values)
    is_full = np.zeros(plan.classes.size, bool)
    is_full[plan.full] = True
    levels = np.flatnonzero(~is_full & (np.diff(meetings.ends) > 0))
    levels = levels[np.argsort(plan.classes[levels], kind="stable")]
    sizes = np.diff(meetings.ends)[levels]
    chunks = np.cumsum(sizes * (sizes + 1) // 2) // CHUNK
    parts = [
        _collapsed(plan, meetings, values, total, levels[chunks == chunk])
        for chunk in range(int(chunks.max(initial=-1)) + 1)
    ]
    n_values = q * (q + 1) // 2
    cells = np.concatenate([np.zeros(0, np.int64), *(cell for cell, *_ in parts)])
    classes = np.concatenate([np.zeros(0, INDEX), *(k for _, k, _ in parts)])
    products = np.concatenate([np.zeros((n_values, 0)), *(v for *_, v in parts)], axis=1)
    used, classes = _numbered(classes, plan.light.size)
    leaders = np.zeros(plan.light.size, INDEX)
    leaders[plan.classes[::-1]] = np.arange(plan.classes.size - 1, -1, -1)
    rows = np.zeros((q, plan.full.size, total))
    place = np.cumsum(is_full) - 1
    in_rows = is_full[meetings.level]
    rows[:, place[meetings.level[in_rows]], meetings.effect[in_rows]] = values[:, in_rows]
    on_diagonal = np.equal(*triangle(q))
    flat = np.bincount(cells, products[on_diagonal].sum(axis=0), total * total)
    explained = flat.astype(float).reshape(total, total)
    explained = explained + explained.T
    for row in rows:
        explained += row.T @ row
    kind = INDEX if total**2 < 2**31 else np.int64
    fields: Any = (cells.astype(kind), classes.astype(INDEX), products)
    fields += (leaders[used], plan.full, rows)
    return Weighted(*fields), explained


def _collapsed(
    plan: _Plan, meetings: Meetings, values: np.ndarray, total: int, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, classes and products of some levels; those of one cell and class summed."""
    left, right = meetings.pairs(levels)
    classes = plan.classes[meetings.level[left]]
    half = np.where(left == right, 0.5, 1.0)
    products = np.array(
        [
            half * values[a][left] * values[b][right]
            if a == b
            else half * (values[a][left] * values[b][right] + values[b][left] * values[a][right])
            for a, b in zip(*triangle(len(values)), strict=True)
        ]
    )
    cells = meetings.effect[right].astype(np.int64) * total + meetings.effect[left]
    used, local = _numbered(classes, plan.light.size)
    if used.size == levels.size or total > MOST_COUNTED:
        return cells, classes.astype(INDEX), products
    sums = []
    for row in products:
        matrix = sp.coo_matrix((row, (cells, local)), (total * total, used.size)).tocsr()
        matrix.sum_duplicates()
        sums.append(matrix)
    matrix = sums[0]
    cells = np.repeat(np.arange(total * total), np.diff(matrix.indptr))
    return cells, used[matrix.indices].astype(INDEX), np.array([s.data for s in sums])


def _numbered(classes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` classes occur, and where each of (k,) is among them."""
    occurs = np.bincount(classes, minlength=count) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[classes]


def _products_of(meetings: Meetings, total: int) -> Products | None:
    """Which couplings of a later factor are multiplied; None if matrix products are cheaper."""
    levels = meetings.ends.size - 1
    if levels * 2.0 * total**2 < PAIR * meetings.n_pairs and levels * total < DENSE:
        return None
    left, right = meetings.pairs(np.arange(levels))
    cells = meetings.effect[right].astype(np.int64) * total + meetings.effect[left]
    order = np.argsort(cells, kind="stable")
    kind = INDEX if total**2 < 2**31 else np.int64
    fields: Any = (left[order], right[order], cells[order].astype(kind))
    return Products(*fields, total=total)


def _orthogonal(columns: np.ndarray) -> np.ndarray:
    """A basis (q, q) in which columns (n, q) are orthogonal: each less what the earlier explain."""
    triangle = np.linalg.qr(columns, mode="r") / np.sqrt(len(columns))
    lengths = np.linalg.norm(triangle, axis=0)
    small = np.abs(np.diagonal(triangle)) < 1e-6 * lengths
    triangle[small, small] = 1e-6 * lengths[small]  # any direction will do
    return np.linalg.inv(triangle)


def _to_type(array: Any, kind: Any) -> Any:
    """Floating arrays in the type of X and y, indices as they are."""
    is_float = np.issubdtype(array.dtype, np.floating)
    return array.astype(kind) if is_float and array.dtype != kind else array


def _products(factor: Factor, other: Factor) -> np.ndarray:
    """Z_j'Z_k by level of `factor`, (q, q_k, J)."""
    return np.array(
        [[factor.sums(left * right) for right in other.columns.T] for left in factor.columns.T]
    )


def _by_parent(left: np.ndarray, right: np.ndarray, up: np.ndarray, factor: Factor) -> np.ndarray:
    """Sums of left'right, (a, i, J) and (a, j, J), over the levels in each level of `factor`."""
    products = np.einsum("aiJ,ajJ->ijJ", left, right)
    return np.array(
        [[np.bincount(up, entry, factor.n_levels) for entry in row] for row in products]
    )


def _cleaned(whole: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """whole - explained, exactly zero where that is rounding error."""
    rest = whole - explained
    return np.where(np.abs(rest) <= NOISE * np.abs(whole), 0.0, rest)


def _sums(columns: np.ndarray, codes: np.ndarray, n_levels: int, rows: Any) -> Any:
    """Sums of columns times rows by level, (q, k, J), NumPy or traced."""
    if is_of_jax(rows):
        return jnp.stack(
            [jax.ops.segment_sum(c[:, None] * rows, codes, n_levels).T for c in columns.T]
        )
    return np.array([[np.bincount(codes, c * row, n_levels) for row in rows.T] for c in columns.T])


def _memory() -> float:
    """Bytes of memory of this machine; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")
