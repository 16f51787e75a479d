r"""Elimination of a chain of nested grouping factors, as functions of arrays.

The factors of a chain are nested: pupils in classes in schools. V_E = I + Z_E Omega_E Z_E' of their
terms is eliminated one factor after the other, the finest first. A level has couplings with its one
level of every later factor of the chain, with the columns X and y, and with those effects of the
factors outside the chain (the tail) that occur with it: nothing fills in. The cost is linear in the
number of levels, and for the tail in the pairs of its effects that meet in a level.

The first factor is taken through its within-level factorisation Z = Q F as in `grouped`, which
leaves sums of positive terms. For a later one, with A_j = Z_j' V^-1 Z_j of what was eliminated
before, K_j = Omega (I + A_j Omega)^-1 takes its part away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import namespace, on_host, sums_by
from jaxreml.backend.lazy import jnp, record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural

Array = Any  # NumPy's or JAX's

DENSE = 5 * 10**7  # most entries of a matrix of couplings
SUM = 8  # how many entries can be written in the time of one scattered sum, and
GEMM = 40  # multiplied in the time that one is written


@record
@dataclass(frozen=True)
class Weighted:
    """The tail's cross-products within the levels of the first factor, of constant values.

    Levels of one F share P = I + F Omega F', so their products are summed in advance (classes).
    Levels with many effects of the tail are kept as rows of a matrix instead.

    Attributes:
        cells: (k,), places in the lower triangle of (Q, Q), flattened.
        classes: (k,), of the products.
        values: (t, k), the products, one row per entry of a lower triangle of order q; halved on
            the diagonal.
        leaders: (C,), a level of each class.
        full: (h,), the levels kept as
        rows: (q, h, Q).
    """

    cells: Array
    classes: Array
    values: Array
    leaders: Array
    full: Array
    rows: Array

    @cached_property
    def _matrix(self) -> Any:
        """`values`, sparse on the host: by cells and, for each row in turn, classes."""
        t, count = self.values.shape
        columns = np.arange(t)[:, None] * len(self.leaders) + self.classes
        places = np.broadcast_to(self.cells, (t, count)).ravel(), columns.ravel()
        shape = self.rows.shape[2] ** 2, t * len(self.leaders)
        return sp.coo_matrix((self.values.ravel(), places), shape).tocsr()

    def _of_classes(self, shared: Array) -> Array:
        """Sum of S_j' W_j S_j, (Q, Q), of the levels with classes, for the lower triangles of the W
        of each class, (t, classes)."""
        total = self.rows.shape[2]
        if on_host(shared):
            lower = self._matrix @ shared.reshape(-1)
        else:
            pairs = zip(shared, self.values, strict=True)
            parts = sum(weight[self.classes] * own for weight, own in pairs)
            lower = sums_by(parts, self.cells, total * total)
        return linalg.mirrored(lower.reshape(total, total))

    def assemble(self, weights: Array) -> Array:
        """Sum of S_j' W_j S_j, (Q, Q), over levels j with couplings S_j and weights (q, q, J)."""
        q, _, total = self.rows.shape
        result = namespace(weights).zeros((total, total), weights.dtype)
        if self.cells.size:
            shared = weights[:, :, self.leaders][natural.triangle(q)]
            result = self._of_classes(shared)
        if self.full.size:
            scaled = linalg.matmul(weights[:, :, self.full, None], self.rows[:, None])
            result = result + self.rows.reshape(-1, total).T @ scaled.reshape(-1, total)
        return result

    def assemble_pair(self, u: Array, v: Array) -> Array:
        """The same for W_j = u_j v_j' + v_j u_j', of (q, J) each."""
        q, _, total = self.rows.shape
        xp = namespace(u, v)
        result = xp.zeros((total, total), u.dtype)
        if self.cells.size:
            rows, columns = natural.triangle(q)
            left, right = u[:, self.leaders], v[:, self.leaders]
            shared = left[rows] * right[columns] + right[rows] * left[columns]
            result = self._of_classes(shared)
        if self.full.size:
            left, right = (xp.einsum("ah,aht->ht", own[:, self.full], self.rows) for own in (u, v))
            product = left.T @ right
            result = result + product + product.T
        return result

    def around(self, R: Array, n_levels: int) -> Array:
        """S_j R S_j', (q, q, J), for symmetric R (Q, Q); the sum over levels of one class at one of
        them."""
        q, _, total = self.rows.shape
        found = namespace(R).zeros((q, q, n_levels), R.dtype)
        if self.cells.size:
            if on_host(R):
                halves = (self._matrix.T @ R.reshape(-1)).reshape(len(self.values), -1)
            else:
                inside = self.values * R.reshape(-1)[self.cells]
                halves = sums_by(inside, self.classes, len(self.leaders))
            own = halves[natural.places(q)]
            own = own * (1 + linalg.eye_like(own))
            found = found + sums_by(own, self.leaders, n_levels)
        if self.full.size:
            images = (self.rows.reshape(-1, total) @ R).reshape(self.rows.shape)
            own = (self.rows[:, None] * images[None]).sum(axis=3)
            found = found + sums_by(own, self.full, n_levels)
        return found


@record
@dataclass(frozen=True)
class Products:
    """Pairs of couplings within the levels of a later factor, where these change with Omega.

    Attributes:
        left, right: (k,), which two couplings to multiply, the right one not before the left in
            the tail.
        cells: (k,), as in `Weighted`.
        total: Q, static.
    """

    left: Array
    right: Array
    cells: Array
    total: int = field(metadata={"static": True})

    def assemble(self, weighted: Array, tail: Array) -> Array:
        """As in `Weighted`, for couplings S (r, k) and W_j S_j."""
        parts = self._halves * (weighted[:, self.left] * tail[:, self.right]).sum(axis=0)
        lower = sums_by(parts, self.cells, self.total**2).reshape(self.total, self.total)
        return linalg.mirrored(lower)

    def pulled(self, tail: Array, R: Array) -> Array:
        """As in `Stage`."""
        between = self._halves * R.reshape(-1)[self.cells]
        count = tail.shape[1]
        ahead = sums_by(between * tail[:, self.left], self.right, count)
        return ahead + sums_by(between * tail[:, self.right], self.left, count)

    @property
    def _halves(self) -> Array:
        return namespace(self.left).where(self.left == self.right, 0.5, 1.0)


@record
@dataclass(frozen=True)
class Stage:
    """One factor of the chain: J levels, q effects.

    Attributes:
        matrix: (q, q, J), F for the first factor; A_j as the first leaves it for a later one.
        chain: per later factor (q, q_k, J), couplings with the level that contains this one.
        tail: (q, k), couplings with the tail: Q'Z for the first factor, what it leaves of Z'Z for
            a later one.
        columns: (q, p + 1, J), couplings with X and y.
        up: per later factor (J,), the levels that contain these.
        level, effect: (k,), whose couplings `tail` has.
        tail_up: per later factor (k,), where these couplings go there.
        pairs: `Weighted` for the first factor; for a later one `Products`, or None where most
            effects of the tail occur with most levels.
        sizes: effects per term of this factor, static.
    """

    matrix: Array
    chain: tuple[Array, ...]
    tail: Array
    columns: Array
    up: tuple[Array, ...]
    level: Array
    effect: Array
    tail_up: tuple[Array, ...]
    pairs: Any
    sizes: tuple[int, ...] = field(metadata={"static": True})

    @property
    def n_levels(self) -> int:
        """J."""
        return self.matrix.shape[2]

    def omega(self, omega: Array) -> Array:
        """Omega, (q, q, 1)."""
        q = sum(self.sizes)
        basis = natural.symmetric_basis(self.sizes).reshape(-1, q * q)
        return (basis.T.astype(omega.dtype) @ omega).reshape(q, q, 1)

    def assemble(self, weights: Array, tail: Array, total: int) -> Array:
        """Sum of S_j' W_j S_j, (Q, Q), over levels j with couplings S (r, k), for the first factor
        its own, and symmetric weights (r, r, J)."""
        if isinstance(self.pairs, Weighted):
            return self.pairs.assemble(weights)
        weighted = per_coupling(weights, tail, self.level)
        if self.pairs is None:
            return self._dense(weighted, total).T @ self._dense(tail, total)
        return self.pairs.assemble(weighted, tail)

    def assemble_pair(
        self, weights: tuple[Array, Array], rows: tuple[Array, Array], total: int
    ) -> Array:
        """As `assemble`, for W_j = u_j v_j' + v_j u_j'.

        Args:
            weights: u and v, (q, J) each.
            rows: u_j'S_j and v_j'S_j of the couplings, (k,) each.
            total: Q.
        """
        if isinstance(self.pairs, Weighted):
            return self.pairs.assemble_pair(*weights)
        xp = namespace(*rows)
        left, right = xp.stack(rows), xp.stack(rows[::-1])
        if self.pairs is None:
            return self._dense(left, total).T @ self._dense(right, total)
        return self.pairs.assemble(left, right)

    def pulled(self, tail: Array, R: Array) -> Array:
        """S_j R of couplings (r, k) of a later factor, where they are, for symmetric R (Q, Q)."""
        if self.pairs is not None:
            return self.pairs.pulled(tail, R)
        images = self._dense(tail, len(R)) @ R
        return images.reshape(len(tail), self.n_levels, len(R))[:, self.level, self.effect]

    def to_tail(self, tail: Array, columns: Array, total: int) -> Array:
        """Sums over levels of couplings (q, k) times columns (q, u, J), (Q, u)."""
        if on_host(tail, columns) or self._is_dense(total, columns.shape[1]):
            pairs = zip(self._matrices(tail, total, columns), columns, strict=True)
            return sum(matrix.T @ own.T for matrix, own in pairs)  # pyright: ignore
        products = (tail[:, None] * columns[:, :, self.level]).sum(axis=0)
        return sums_by(products, self.effect, total).T

    def from_tail(self, values: Array, tail: Array) -> Array:
        """Sums over the tail of couplings (q, k) times values (Q, u), (q, u, J)."""
        xp = namespace(values, tail)
        if on_host(values, tail) or self._is_dense(*values.shape):
            matrices = self._matrices(tail, len(values), values)
            return xp.stack([(matrix @ values).T for matrix in matrices])
        own = values.T[:, self.effect]
        return xp.stack([sums_by(row * own, self.level, self.n_levels) for row in tail])

    def _is_dense(self, total: int, columns: int) -> bool:
        """Whether products of the couplings, filled up to a matrix, take less time than sums."""
        cells = self.n_levels * total
        return cells < DENSE and cells * (1 + columns / GEMM) < SUM * self.level.size * columns

    def _matrices(self, tail: Array, total: int, others: Array) -> Any:
        """Couplings (q, k) as q matrices (J, Q), sparse if they and `others` are on the host."""
        if on_host(tail, others):
            if tail is not self.tail:
                return self._sparse(tail, total)
            if total not in self._kept:
                self._kept[total] = self._sparse(tail, total)
            return self._kept[total]
        empty = jnp.zeros((len(tail), self.n_levels, total), tail.dtype)
        return empty.at[:, self.level, self.effect].set(tail, unique_indices=True)

    def _dense(self, tail: Array, total: int) -> Array:
        """Couplings (r, k) as a matrix, (r J, Q)."""
        matrices = self._matrices(tail, total, tail)
        if on_host(tail):
            return np.concatenate([matrix.toarray() for matrix in matrices])
        return matrices.reshape(-1, total)

    @cached_property
    def _kept(self) -> dict[int, list[Any]]:
        """`_sparse` of the couplings as they are, which every evaluation needs, by Q."""
        return {}

    def _sparse(self, tail: Array, total: int) -> list[Any]:
        shape = self.n_levels, total
        return [sp.csr_matrix((row, self.effect, self._ends), shape) for row in tail]

    @cached_property
    def _ends(self) -> np.ndarray:
        """(J + 1,), where the couplings of the levels start and end."""
        return np.searchsorted(self.level, np.arange(self.n_levels + 1)).astype(natural.INDEX)


class Couplings(NamedTuple):
    """Of one stage, as in `Stage`: what is left of them when it is eliminated, or what a stage
    before it takes away."""

    matrix: Array
    chain: tuple[Array, ...]
    tail: Array


class Eliminated(NamedTuple):
    """What elimination of the chain leaves, with V_E its covariance.

    Attributes:
        logdet: log|V_E|.
        A: (Q, Q), Z_D' V_E^-1 Z_D of the tail.
        couplings: per stage.
        weights: per stage (q, q, J), W: couplings G of a stage add G'W G to what is left of the
            others. P^-1 for the first one, -K for a later one.
        solved: per stage (q, q, J), U, which takes a stage's couplings to Z' V^-1: F' P^-1 or
            (I + A Omega)^-1.
    """

    logdet: Array
    A: Array
    couplings: tuple[Couplings, ...]
    weights: tuple[Array, ...]
    solved: tuple[Array, ...]


def eliminate(stages: tuple[Stage, ...], omegas: tuple[Array, ...], A: Array) -> Eliminated:
    """Eliminate the chain.

    Args:
        stages: finest factor first.
        omegas: per stage the lower triangles of its Omega, (m_k,).
        A: what the first factor's Q leaves of it, as in `Eliminated`.
    """
    state = [Couplings(stage.matrix, stage.chain, stage.tail) for stage in stages]
    all_weights, solved = [], []
    logdet: Any = 0.0
    for k, (stage, vector) in enumerate(zip(stages, omegas, strict=True)):
        matrix = state[k].matrix
        omega = stage.omega(vector)
        if k == 0:
            across = linalg.transpose(matrix)
            inner = linalg.matmul(linalg.matmul(matrix, omega), across)
            weights, log_determinants = linalg.inverse(inner + linalg.eye_like(inner), True)
            solved.append(linalg.matmul(across, weights))
        else:
            product = linalg.matmul(matrix, omega)
            inverse, log_determinants = linalg.inverse(product + linalg.eye_like(product), False)
            weights = -linalg.matmul(omega, inverse)
            weights = (weights + linalg.transpose(weights)) / 2
            solved.append(inverse)
        all_weights.append(weights)
        logdet = logdet + log_determinants.sum()
        A = add_passed(stages, k, weights, state[k].chain, state[k].tail, state, A)
    return Eliminated(logdet, A, tuple(state), tuple(all_weights), tuple(solved))


def add_passed(
    stages: tuple[Stage, ...],
    k: int,
    weights: Array,
    chain: tuple[Array, ...],
    tail: Array,
    state: list[Couplings],
    A: Array,
) -> Array:
    """Add G'W G of stage k to what is left of the later stages, in place, and of the tail.

    Args:
        stages, k: which stage.
        weights: W (r, r, J), symmetric.
        chain, tail: G, as in `Stage` but for r in the place of q.
        state: per stage, those before the k-th not looked at.
        A: as in `Eliminated`; returned with what is added.
    """
    stage = stages[k]
    weighted = per_coupling(weights, tail, stage.level) if chain else tail
    for i, (across, up) in enumerate(zip(chain, stage.up, strict=True)):
        later = k + 1 + i
        old, count = state[later], stages[later].n_levels
        left = linalg.matmul(linalg.transpose(across), weights)
        of_tail = (across[:, :, stage.level] * weighted[:, None]).sum(axis=0)
        state[later] = Couplings(
            old.matrix + sums_by(linalg.matmul(left, across), up, count),
            tuple(
                kept + sums_by(linalg.matmul(left, further), up, count)
                for kept, further in zip(old.chain, chain[i + 1 :], strict=True)
            ),
            old.tail + sums_by(of_tail, stage.tail_up[i], old.tail.shape[1]),
        )
    return A + stage.assemble(weights, tail, len(A)) if len(A) else A


def reduce(
    stages: tuple[Stage, ...], done: Eliminated, columns: tuple[Array, ...], C: Array
) -> tuple[tuple[Array, ...], Array]:
    """What elimination leaves of the couplings with columns such as X and y.

    Args:
        stages, done: the elimination.
        columns: per stage (q, u, J), as in `Stage`.
        C: (Q, u), what the first factor's Q leaves of Z_D' of the columns.

    Returns:
        `columns`, per stage when it is eliminated, and C, of which Z_D' V_E^-1 is left.
    """
    left = list(columns)
    for k, (stage, here) in enumerate(zip(stages, done.couplings, strict=True)):
        weighted = linalg.matmul(done.weights[k], left[k])
        for i, (across, up) in enumerate(zip(here.chain, stage.up, strict=True)):
            later = k + 1 + i
            passed = linalg.matmul(linalg.transpose(across), weighted)
            left[later] = left[later] + sums_by(passed, up, stages[later].n_levels)
        if len(C):
            C = C + stage.to_tail(here.tail, weighted, len(C))
    return tuple(left), C


def gram(done: Eliminated, columns: tuple[Array, ...], T: Array) -> Array:
    """[X y]' V_E^-1 [X y], (p + 1, p + 1), from `reduce`'s columns and what the first factor's Q
    leaves of [X y]'[X y]."""
    for weights, own in zip(done.weights, columns, strict=True):
        weighted = linalg.matmul(weights, own)
        T = T + sum(linalg.row_products(*pair) for pair in zip(weighted, own, strict=True))
    return T


def substitute(
    stages: tuple[Stage, ...],
    omegas: tuple[Array, ...],
    done: Eliminated,
    columns: tuple[Array, ...],
    modes: Array,
) -> tuple[Array, ...]:
    """Z' V^-1 of columns for the chain's effects, per stage (q, u, J), given the tail's modes.

    The way back of `reduce`, of whose `columns` every stage's are less what the modes of the later
    factors and of the tail explain.
    """
    crosses: list[Array] = []
    chain_modes: list[Array] = []
    for k in range(len(stages) - 1, -1, -1):
        stage, here, left = stages[k], done.couplings[k], columns[k]
        for across, up, explained in zip(here.chain, stage.up, chain_modes, strict=True):
            left = left - linalg.matmul(across, explained[:, :, up])
        if len(modes):
            left = left - stage.from_tail(modes, here.tail)
        cross = linalg.matmul(done.solved[k], left)
        crosses.insert(0, cross)
        chain_modes.insert(0, linalg.matmul(stage.omega(omegas[k]), cross))
    return tuple(crosses)


def per_coupling(weights: Array, tail: Array, level: Array) -> Array:
    """W_j s for each coupling s (r, k) of a level j, (s, k), W (s, r, J)."""
    return (weights[:, :, level] * tail[None]).sum(axis=1)
