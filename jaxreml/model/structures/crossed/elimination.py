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

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxreml.model import linalg
from jaxreml.model.covariance import natural

DENSE = 5 * 10**7  # most entries of a matrix of couplings
SUM = 8  # how many entries can be written in the time of one scattered sum, and
GEMM = 40  # multiplied in the time that one is written


@jax.tree_util.register_dataclass
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

    def assemble(self, weights: Array, weighted: Array, tail: Array) -> Array:
        """Sum of S_j' W_j S_j, (Q, Q), over levels j with couplings S_j and weights (q, q, J)."""
        q, _, total = self.rows.shape
        result = jnp.zeros((total, total), weights.dtype)
        if self.cells.size:
            shared = weights[:, :, self.leaders][natural.triangle(q)]
            parts = sum(w[self.classes] * v for w, v in zip(shared, self.values, strict=True))
            lower = jax.ops.segment_sum(parts, self.cells, total * total).reshape(total, total)
            result = lower + lower.T
        if self.full.size:
            own = weights[:, :, self.full]
            scaled = jnp.einsum("abh,bhQ->ahQ", own, self.rows)
            result = result + self.rows.reshape(-1, total).T @ scaled.reshape(-1, total)
        return result


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Products:
    """The same within the levels of a later factor, where the couplings change with Omega.

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

    def assemble(self, weights: Array, weighted: Array, tail: Array) -> Array:
        """As in `Weighted`; `weighted` is W_j S_j, (q, couplings)."""
        half = jnp.where(self.left == self.right, 0.5, 1.0)
        parts = half * jnp.sum(weighted[:, self.left] * tail[:, self.right], axis=0)
        lower = jax.ops.segment_sum(parts, self.cells, self.total**2)
        lower = lower.reshape(self.total, self.total)
        return lower + lower.T


@jax.tree_util.register_dataclass
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
        pairs: `Weighted` for the first factor, `Products` for a later one.
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
        return (jnp.asarray(basis.T, omega.dtype) @ omega).reshape(q, q, 1)

    def to_tail(self, tail: Array, columns: Array, total: int) -> Array:
        """Sums over levels of couplings (q, k) times columns (q, u, J), (Q, u)."""
        if self._is_dense(total, columns.shape[1]):
            matrices = self._matrices(tail, total)
            return jnp.einsum("aJQ,auJ->Qu", matrices, columns)
        products = jnp.einsum("ak,auk->ku", tail, columns[:, :, self.level])
        return jax.ops.segment_sum(products, self.effect, total)

    def from_tail(self, values: Array, tail: Array | None = None) -> Array:
        """Sums over the tail of couplings (q, k), the own ones if left out, times values (Q, u),
        (q, u, J)."""
        tail = self.tail if tail is None else tail
        if self._is_dense(*values.shape):
            return jnp.einsum("aJQ,Qu->auJ", self._matrices(tail, len(values)), values)
        own = values[self.effect]
        rows = [
            jax.ops.segment_sum(row[:, None] * own, self.level, self.n_levels).T for row in tail
        ]
        return jnp.stack(rows)

    def _is_dense(self, total: int, columns: int) -> bool:
        """Whether products of the couplings, filled up to a matrix, take less time than sums."""
        cells = self.n_levels * total
        return cells < DENSE and cells * (1 + columns / GEMM) < SUM * self.level.size * columns

    def _matrices(self, tail: Array, total: int) -> Array:
        """Couplings (q, k) as matrices, (q, J, Q)."""
        empty = jnp.zeros((len(tail), self.n_levels, total), tail.dtype)
        return empty.at[:, self.level, self.effect].set(tail, unique_indices=True)


class Couplings(NamedTuple):
    """Of one stage at the time when it is eliminated; as in `Stage`, later ones changed."""

    matrix: Array
    chain: tuple[Array, ...]
    tail: Array
    columns: Array


class Eliminated(NamedTuple):
    """What elimination of the chain leaves, with V_E its covariance.

    Attributes:
        logdet: log|V_E|.
        A: (Q, Q), Z_D' V_E^-1 Z_D of the tail.
        C: (Q, p + 1), Z_D' V_E^-1 [X y].
        T: (p + 1, p + 1), [X y]' V_E^-1 [X y].
        couplings: per stage.
        solved: per stage (q, q, J), what takes a stage's couplings to Z' V^-1: F' P^-1 or
            (I + A Omega)^-1.
    """

    logdet: Array
    A: Array
    C: Array
    T: Array
    couplings: tuple[Couplings, ...]
    solved: tuple[Array, ...]


def eliminate(
    stages: tuple[Stage, ...], omegas: tuple[Array, ...], A: Array, C: Array, T: Array
) -> Eliminated:
    """Eliminate the chain.

    Args:
        stages: finest factor first.
        omegas: per stage the lower triangles of its Omega, (m_k,).
        A, C, T: what the first factor's Q leaves of the cross-products, as in `Eliminated`.
    """
    state = [Couplings(s.matrix, s.chain, s.tail, s.columns) for s in stages]
    solved = []
    logdet = jnp.zeros((), T.dtype)
    for k, (stage, vector) in enumerate(zip(stages, omegas, strict=True)):
        here = state[k]
        omega = stage.omega(vector)
        if k == 0:
            inner = linalg.matmul(linalg.matmul(here.matrix, omega), linalg.transpose(here.matrix))
            weights, log_determinants = linalg.inverse(inner + linalg.eye_like(inner), True)
            solved.append(linalg.matmul(linalg.transpose(here.matrix), weights))
        else:
            product = linalg.matmul(here.matrix, omega)
            inverse, log_determinants = linalg.inverse(product + linalg.eye_like(product), False)
            weights = -linalg.matmul(omega, inverse)
            weights = (weights + linalg.transpose(weights)) / 2
            solved.append(inverse)
        logdet = logdet + jnp.sum(log_determinants)
        weighted = _per_coupling(weights, here.tail, stage.level)
        weighted_columns = linalg.matmul(weights, here.columns)
        for i, (across, up) in enumerate(zip(here.chain, stage.up, strict=True)):
            later = k + 1 + i
            count = stages[later].n_levels
            left = linalg.matmul(linalg.transpose(across), weights)
            old = state[later]
            state[later] = Couplings(
                old.matrix + collect(linalg.matmul(left, across), up, count),
                tuple(
                    kept + collect(linalg.matmul(left, further), up, count)
                    for kept, further in zip(old.chain, here.chain[i + 1 :], strict=True)
                ),
                old.tail
                + collect(
                    jnp.sum(across[:, :, stage.level] * weighted[:, None], axis=0),
                    stage.tail_up[i],
                    old.tail.shape[1],
                ),
                old.columns + collect(linalg.matmul(left, here.columns), up, count),
            )
        if len(A):
            A = A + stage.pairs.assemble(weights, weighted, here.tail)
            C = C + stage.to_tail(weighted, here.columns, len(A))
        T = T + jnp.einsum("auJ,avJ->uv", weighted_columns, here.columns)
    return Eliminated(logdet, A, C, T, tuple(state), tuple(solved))


def substitute(
    stages: tuple[Stage, ...], omegas: tuple[Array, ...], done: Eliminated, modes: Array
) -> tuple[Array, ...]:
    """Z' V^-1 [X y] of the chain's effects, per stage (q, p + 1, J), given the tail's modes.

    The way back of the elimination: every stage's couplings less what the modes of the later
    factors and of the tail explain.
    """
    crosses: list[Array] = []
    chain_modes: list[Array] = []
    for k in range(len(stages) - 1, -1, -1):
        stage, here = stages[k], done.couplings[k]
        left = here.columns
        for across, up, explained in zip(here.chain, stage.up, chain_modes, strict=True):
            left = left - linalg.matmul(across, explained[:, :, up])
        if len(modes):
            left = left - stage.from_tail(modes, here.tail)
        cross = linalg.matmul(done.solved[k], left)
        crosses.insert(0, cross)
        chain_modes.insert(0, linalg.matmul(stage.omega(omegas[k]), cross))
    return tuple(crosses)


def _per_coupling(weights: Array, tail: Array, level: Array) -> Array:
    """W_j s for each coupling s of a level j, (q, k)."""
    return jnp.sum(weights[:, :, level] * tail[None], axis=1)


def collect(values: Array, index: Array, count: int) -> Array:
    """Sums of (..., J) over the levels of each of `count` parents, (..., count)."""
    *front, length = values.shape
    flat = values.reshape(math.prod(front), length).T
    return jax.ops.segment_sum(flat, index, count).T.reshape(*front, count)
