r"""Quadratic forms d'E_i B E_j d of images E_j d of effects, B = Z'V0^-1 Z, with the first factor
kept out of what grows with the parameters times the columns.

The first factor has most levels, and with a covariance of residuals most parameters. With G its
couplings with all others, U = F'P^-1, and r_j = (U G)'E_j d summed over the levels, the forms of
two of its parameters are

    d'E_i F'P^-1 F E_j d - r_i' C r_j,

with C the covariance of the other effects given y: what the elimination of the others makes of r_j
in the place of columns of X and y. r_j is made from the sums over levels of products of (U G)_a and
d_b, of which there are q^2 and not one for each parameter. Forms with a parameter of another
factor are products of E_i d there and B E_j d.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import namespace, on_host, sums_by
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.crossed import derivatives
from jaxreml.model.structures.crossed.elimination import (
    Eliminated,
    per_coupling,
    reduce,
    substitute,
)

Array = Any  # NumPy's or JAX's


class Moved(NamedTuple):
    """Of k columns d; parts of the other factors are per later stage (q, ., J), and the tail's
    (Q, .), parameter by parameter of k columns.

    Attributes:
        first: d of the first factor, (q, k, J).
        inner: F'P^-1 F, (q, q, J).
        own: r_j of the first factor's parameters.
        others: E_i d of the parameters of the others.
        modes: C r_j of the first's.
        images: B E_j d of all parameters.
    """

    first: Array
    inner: Array
    own: list[Array]
    others: list[Array]
    modes: list[Array]
    images: list[Array]


def curvature(structure: Any, projection: Any, vectors: Any, weights: Array) -> Array:
    """Sum over u of 2 weights_u d_u'E_i B E_j d_u, (m, m), in the order of the stages.

    Args:
        structure: a `Crossed`.
        projection: its projection.
        vectors: d, per stage (q, k, J), and the tail's (Q, k).
        weights: (k,).
    """
    moved = _moved(structure, projection, vectors)
    weighted = moved.first * weights[:, None]
    outer = (weighted[:, None] * moved.first[None]).sum(axis=2)
    local = derivatives.pair_trace(structure.stages[0].sizes, moved.inner, outer)
    k = weights.size

    def total(lefts: list[Array], rights: list[Array]) -> Array:
        pairs = zip(lefts, rights, strict=True)
        return sum(_by_parameter(left, right, weights, k) for left, right in pairs)

    found = _joined(local, total, moved)
    return found + found.T


def spread(structure: Any, projection: Any, vectors: Any) -> Array:
    """d_u'E_i B E_j d_v, (m, k, m, k), in the order of the stages; as `curvature`."""
    moved = _moved(structure, projection, vectors)
    (a, b), half = _pairs(structure, moved.first)
    q, k, _ = moved.first.shape
    m, xp = len(half), namespace(moved.first)
    flat = moved.first.reshape(q * k, -1)
    products = xp.stack([xp.stack([(flat * own) @ flat.T for own in row]) for row in moved.inner])
    products = products.reshape(q, q, q, k, q, k)
    # E_i = e_a e_b' + e_b e_a', and E_j likewise
    local: Any = sum(
        products[second[:, None], third, first[:, None], :, fourth]
        for first, second in ((a, b), (b, a))
        for third, fourth in ((a, b), (b, a))
    )
    local = (half[:, None] * half)[:, :, None, None] * local  # (m, m, k, k)
    local = local.swapaxes(1, 2)

    def total(lefts: list[Array], rights: list[Array]) -> Array:
        return sum(_inner(left, right) for left, right in zip(lefts, rights, strict=True))

    found = _joined(local.reshape(m * k, m * k), total, moved)
    found = (found + found.T) / 2
    return found.reshape(len(found) // k, k, len(found) // k, k)


def _joined(local: Array, total: Any, moved: Moved) -> Array:
    """The forms of all parameters from `local`, those of the first factor's by themselves."""
    if not moved.own:
        return local
    xp = namespace(local)
    corner = local - total(moved.own, moved.modes)
    rows = total(moved.others, moved.images)
    across = rows[:, : len(corner)]
    top = xp.concatenate([(corner + corner.T) / 2, across.T], axis=1)
    return xp.concatenate([top, rows])


def _pairs(structure: Any, like: Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Which effects a and b of the first factor each of its parameters is of, and 1/2 where they
    are the same: E = half (e_a e_b' + e_b e_a')."""
    pairs = natural.effects_of_omega(structure.stages[0].sizes)
    return pairs, np.where(pairs[0] == pairs[1], 0.5, 1.0).astype(like.dtype)


def _moved(structure: Any, projection: Any, vectors: Any) -> Moved:
    (chain, _), done, R = projection.inner
    (first, *later), (vector, *others) = structure.stages, vectors
    inner = linalg.matmul(done.solved[0], first.matrix)
    if not later and not structure.levels:
        return Moved(vector, inner, [], [], [], [])
    xp, k = namespace(inner), vector.shape[1]
    own = _of_first(structure, done, vector)
    moved = _of_others(structure, others, k)
    width = moved[0].shape[1]
    # B v = Z'V0^-1 Z v: the columns of Z v take the place of X and y.
    nothing = xp.zeros((len(vector), width, first.n_levels), vector.dtype)
    (x, *columns), C = structure.of_effects((nothing, *moved))
    here, weighted = done.couplings[0], linalg.matmul(done.weights[0], x)
    for i, (across, up) in enumerate(zip(here.chain, first.up, strict=True)):
        passed = linalg.matmul(linalg.transpose(across), weighted)
        columns[i] = columns[i] + sums_by(passed, up, later[i].n_levels)
    if len(C):
        C = C + first.to_tail(here.tail, weighted, len(C))
    columns = [xp.concatenate(pair, axis=1) for pair in zip(own[:-1], columns, strict=True)]
    C = xp.concatenate([own[-1], C], axis=1)
    rest = Eliminated(done.logdet, done.A, *(part[1:] for part in done[2:]))
    left, C = reduce(tuple(later), rest, tuple(columns), C)
    of_tail, image = C, C
    if structure.levels:
        of_tail = R @ C
        image = C - done.A @ of_tail
    images = substitute(tuple(later), chain[1:], rest, left, of_tail)
    count = own[-1].shape[1]
    modes = [
        linalg.matmul(stage.omega(omega), part[:, :count])
        for stage, omega, part in zip(later, chain[1:], images, strict=True)
    ]
    return Moved(vector, inner, own, moved, [*modes, of_tail[:, :count]], [*images, image])


def _of_first(structure: Any, done: Eliminated, vector: Array) -> list[Array]:
    """`Moved.own`."""
    first, xp = structure.stages[0], namespace(vector)
    U, here = done.solved[0], done.couplings[0]
    (a, b), half = _pairs(structure, vector)
    q, k, _ = vector.shape

    def moved(sums: Array) -> Array:
        """(U G)'E d of the sums over products (q, s, q, k, L), (s, m k, L)."""
        found = sums[a, :, b] + sums[b, :, a]
        found = found * half.reshape(-1, *[1] * (found.ndim - 1))
        return found.swapaxes(0, 1).reshape(found.shape[1], -1, found.shape[3])

    flat = vector.reshape(q * k, -1)
    found = []
    for across, up, stage in zip(here.chain, first.up, structure.stages[1:], strict=True):
        gain = linalg.matmul(U, across)  # (q, s, J)
        sums = [[_summed(own, flat, up, stage.n_levels) for own in row] for row in gain]
        sums = xp.stack([xp.stack(row) for row in sums]).reshape(*gain.shape[:2], q, k, -1)
        found.append(moved(sums))
    total = structure.layout.total
    if not total:
        return [*found, xp.zeros((0, len(half) * k), vector.dtype)]
    gain = per_coupling(U, here.tail, first.level)
    sums = [first.to_tail(row[None], flat[None], total) for row in gain]
    sums = xp.stack(sums).reshape(q, total, q, k, 1)
    return [*found, moved(sums)[:, :, 0]]


def _summed(weights: Array, columns: Array, up: Array, count: int) -> Array:
    """Sums over the levels in each of `count` others of weights (J,) times columns (k, J),
    (k, count)."""
    if not on_host(weights, columns):
        return sums_by(weights * columns, up, count)
    here = np.arange(len(weights))
    return (sp.csr_matrix((weights, (up, here)), (count, len(here))) @ columns.T).T


def _of_others(structure: Any, vectors: list[Array], k: int) -> list[Array]:
    """`Moved.others`."""
    later, tail = structure.stages[1:], vectors[-1]
    counts = [natural.count_theta(stage.sizes) for stage in later]
    m = sum(counts) + natural.count_theta(structure.layout.sizes)
    xp, found, start = namespace(tail), [], 0
    for stage, part, count in zip(later, vectors, counts, strict=False):
        basis = natural.symmetric_basis(stage.sizes).astype(part.dtype)
        own = xp.einsum("jab,bkJ->ajkJ", basis, part)
        own = _among(own, start, m)
        found.append(own.reshape(len(own), -1, stage.n_levels))
        start += count
    if structure.levels:
        tail = _among(structure.layout.moved(tail), start, m)
    return [*found, tail.reshape(len(tail), m * k)]


def _among(own: Array, start: int, m: int) -> Array:
    """(q, j, ...) as parameters from `start` on among m, zero at the others."""
    xp, after = namespace(own), m - start - own.shape[1]
    before = xp.zeros((len(own), start, *own.shape[2:]), own.dtype)
    return xp.concatenate(
        [before, own, xp.zeros((len(own), after, *own.shape[2:]), own.dtype)], axis=1
    )


def _inner(left: Array, right: Array) -> Array:
    """Inner products of (q, i, J) and (q, j, J), or (Q, i) and (Q, j), over effects: (i, j)."""
    if left.ndim == 2:
        return left.T @ right
    return sum(linalg.row_products(*pair) for pair in zip(left, right, strict=True))  # pyright: ignore


def _by_parameter(left: Array, right: Array, weights: Array, k: int) -> Array:
    """The same of parameters' k columns each, weighted and summed over these."""
    xp = namespace(left)
    left, right = (
        part.reshape(len(part), part.shape[1] // k, k, *part.shape[2:]) for part in (left, right)
    )
    left = left * weights.reshape(-1, *[1] * (left.ndim - 3))
    if left.ndim == 3:
        return sum(left[:, :, u].T @ right[:, :, u] for u in range(k))
    pairs = zip(left, right, strict=True)
    parts = [a.reshape(len(a), -1) @ b.reshape(len(b), -1).T for a, b in pairs]
    return sum(parts, xp.zeros((left.shape[1], right.shape[1]), left.dtype))
