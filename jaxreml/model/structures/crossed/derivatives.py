r"""Derivatives of log|V_E| and of A = Z_D' V_E^-1 Z_D in the Omega of a chain of factors, and the
conditional variances that they are made of, written out.

The elimination of a stage adds G'W G to what is left of the later ones, where W is -K with
K = Omega (I + A Omega)^-1 (or P^-1 for the first stage) and G are its couplings. Let the effects of
the later stages and of the tail have covariance C given y, of which only what couplings meet is
needed. Then w = G b has variance N = G C G', and the effects of the stage K + K N K: so C is
carried from the tail, where it is R, to the first stage. With U = (I + A Omega)^-1 (or F' P^-1) and
Q = U A (or U F), the diagonal blocks of B = Z' V0^-1 Z are Q - U N U'.

The second derivatives of f = log|V_E| + tr(R A) are, with R held, in d Omega = E_i of the stage,
and in a parameter x of an earlier stage, which moves A and G of this one,

    d_ij f = tr(E_i Q E_j (2 U N U' - Q))
    d_ix f = tr(E_i U (A_x - G C H_x' - H_x C G') U')        H_x = G_x - A_x K G
    d_xy f = -tr(K A_x K A_y) - 2 tr(K H_x C H_y')           summed over the stages after x and y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreml.backend.arrays import mapped, namespace, sums_by
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.crossed.elimination import (
    Couplings,
    Eliminated,
    Stage,
    add_passed,
    per_coupling,
)
from jaxreml.model.structures.grouped import sum_pairs

Array = Any  # NumPy's or JAX's


class Given(NamedTuple):
    """Covariances of a stage's effects given y, in units of the residual variance.

    Attributes:
        own: (q, q, J).
        with_tail: (q, k), with the tail where there are couplings.
        between: per later stage (q, q_i, J), with the level that contains this one.
    """

    own: Array
    with_tail: Array
    between: tuple[Array, ...]


def explained(
    stage: Stage, chain: tuple[Array, ...], tail: Array, later: list[Given], pulled: Array
) -> tuple[Array, list[Array], Array]:
    """Of w = G b for r rows of couplings G of each level.

    Args:
        stage: whose levels.
        chain, tail: G, as in `Stage` with r in the place of q.
        later: the stages after it.
        pulled: (r, k), G_D R where there are couplings with the tail.

    Returns:
        Its covariances with the tail, (r, k), and with the later stages, (r, q_i, J) each, and its
        variance N, (r, r, J).
    """
    met = list(zip(chain, stage.up, stage.tail_up, later, strict=True))
    for across, _, places, other in met:
        of_tail = other.with_tail[:, places]
        pulled = pulled + (across[:, :, stage.level] * of_tail[None]).sum(axis=1)
    variance = _by_level(stage, pulled, tail)
    joints = []
    for i, (across, _, places, other) in enumerate(met):
        joint = _by_level(stage, tail, other.with_tail[:, places])
        for j, (coupled, up, _, another) in enumerate(met):
            if j == i:
                pair = other.own[:, :, up]
            elif j < i:
                pair = another.between[i - j - 1][:, :, up]
            else:
                pair = linalg.transpose(other.between[j - i - 1][:, :, stage.up[i]])
            joint = joint + linalg.matmul(coupled, pair)
        joints.append(joint)
        variance = variance + linalg.matmul(joint, linalg.transpose(across))
    return pulled, joints, variance


def _by_level(stage: Stage, left: Array, right: Array) -> Array:
    """Sums over the couplings of each level of left (r, k) times right (s, k), (r, s, J)."""
    return sums_by(left[:, None] * right[None], stage.level, stage.n_levels)


def given(
    stage: Stage, here: Couplings, gain: Array, own: Array, later: list[Given], pulled: Array
) -> Given:
    """Of a stage, by those after it. As b = -gain w + e, with e of variance `own` and independent
    of w; `pulled` as in `explained`."""
    pulled, joints, variance = explained(stage, here.chain, here.tail, later, pulled)
    own = own + linalg.matmul(linalg.matmul(gain, variance), linalg.transpose(gain))
    with_tail = -per_coupling(gain, pulled, stage.level)
    return Given(own, with_tail, tuple(-linalg.matmul(gain, joint) for joint in joints))


def given_later(stages: tuple[Stage, ...], done: Eliminated, R: Array) -> list[Given]:
    """Of the stages after the first."""
    found: list[Given] = []
    for k in range(len(stages) - 1, 0, -1):
        here, gain = done.couplings[k], -done.weights[k]
        pulled = stages[k].pulled(here.tail, R)
        found.insert(0, given(stages[k], here, gain, gain, found, pulled))
    return found


def own_blocks(
    stages: tuple[Stage, ...], done: Eliminated, R: Array, later: list[Given]
) -> list[tuple[Array, Array]]:
    """Per stage Q and U N U', (q, q, J) both; of the first stage, the sum of U N U' over levels of
    one F may stand at one of them."""
    found = []
    for k, (stage, here) in enumerate(zip(stages, done.couplings, strict=True)):
        U, tail = done.solved[k], here.tail
        inner = linalg.matmul(U, here.matrix)
        variance = namespace(inner).zeros_like(inner)
        if k == 0 and len(R):
            variance = stage.pairs.around(R, stage.n_levels)
        if k or here.chain:
            pulled = stage.pulled(tail, R) if k else namespace(tail).zeros_like(tail)
            variance = variance + explained(stage, here.chain, tail, later[k:], pulled)[2]
        around = linalg.matmul(linalg.matmul(U, variance), linalg.transpose(U))
        found.append((inner, around))
    return found


class Moved(NamedTuple):
    """Derivatives in a parameter of the chain.

    Attributes:
        stage: whose parameter.
        state: of what is left of the stages; those up to `stage` do not count.
        A: of A, (Q, Q).
    """

    stage: int
    state: list[Couplings]
    A: Array


def moved(stages: tuple[Stage, ...], done: Eliminated) -> list[Moved]:
    """Derivatives in all parameters of the chain in turn.

    What a stage passes on changes by G'W_x G with W_x = -U'E U, where E = e_a e_b' + e_b e_a': by
    products of the rows a and b of U G.
    """
    found = []
    for k, stage in enumerate(stages):
        here, U = done.couplings[k], done.solved[k]
        rows = [_row(stage, here, U[a]) for a in range(len(U))]
        for a, b in zip(*natural.effects_of_omega(stage.sizes), strict=True):
            later = mapped(_zeros, done.couplings[k + 1 :])
            state = [*done.couplings[: k + 1], *later]
            half = 0.5 if a == b else 1.0
            A = _add_pair(stages, k, rows[a], rows[b], half, state, _zeros(done.A))
            for j in range(k + 1, len(stages)):
                A = _add_moved(stages, j, done, state, A)
            found.append(Moved(k, state, A))
    return found


class _Row(NamedTuple):
    """A row u'G of couplings of a stage's levels, for u (q, J).

    Attributes:
        weights: u.
        chain: per later stage (q_i, J).
        tail: (k,).
    """

    weights: Array
    chain: tuple[Array, ...]
    tail: Array


def _row(stage: Stage, here: Couplings, weights: Array) -> _Row:
    chain = tuple((weights[:, None] * across).sum(axis=0) for across in here.chain)
    return _Row(weights, chain, (weights[:, stage.level] * here.tail).sum(axis=0))


def _add_pair(
    stages: tuple[Stage, ...],
    k: int,
    first: _Row,
    second: _Row,
    half: float,
    state: list[Couplings],
    A: Array,
) -> Array:
    """Take away half (g'h + h'g) of two rows of stage k, as `add_passed` adds."""
    stage = stages[k]

    def outer(left: Array, right: Array, other: Array, another: Array) -> Array:
        return -half * (left[:, None] * another[None] + right[:, None] * other[None])

    for i, up in enumerate(stage.up):
        later, g, h = k + 1 + i, first.chain[i], second.chain[i]
        old, count = state[later], stages[later].n_levels
        of_tail = g[:, stage.level] * second.tail + h[:, stage.level] * first.tail
        further = zip(old.chain, first.chain[i + 1 :], second.chain[i + 1 :], strict=True)
        state[later] = Couplings(
            old.matrix + sums_by(outer(g, h, g, h), up, count),
            tuple(kept + sums_by(outer(g, h, a, b), up, count) for kept, a, b in further),
            old.tail + sums_by(-half * of_tail, stage.tail_up[i], old.tail.shape[1]),
        )
    if not len(A):
        return A
    pair = first.weights, second.weights
    return A - half * stage.assemble_pair(pair, (first.tail, second.tail), len(A))


def _add_moved(
    stages: tuple[Stage, ...], k: int, done: Eliminated, state: list[Couplings], A: Array
) -> Array:
    """Derivatives of what stage k adds to the later ones, from those of its couplings: as
    (G_x; G)' (0 W; W W_x) (G_x; G)."""
    here, W, dot = done.couplings[k], done.weights[k], state[k]
    xp = namespace(W)
    moved_weights = linalg.matmul(linalg.matmul(W, dot.matrix), W)
    top = xp.concatenate([xp.zeros_like(W), W], axis=1)
    weights = xp.concatenate([top, xp.concatenate([W, moved_weights], axis=1)])
    pairs = zip(dot.chain, here.chain, strict=True)
    chain = tuple(xp.concatenate(pair) for pair in pairs)
    tail = xp.concatenate([dot.tail, here.tail])
    return add_passed(stages, k, weights, chain, tail, state, A)


def _zeros(array: Array) -> Array:
    return namespace(array).zeros_like(array)


def second(
    stages: tuple[Stage, ...],
    done: Eliminated,
    R: Array,
    later: list[Given],
    blocks: list[tuple[Array, Array]],
    moves: list[Moved],
) -> Array:
    """Second derivatives of log|V_E| + tr(R A) for constant R in the parameters of the chain.

    Args:
        stages, done: the elimination.
        R: (Q, Q), symmetric.
        later, blocks, moves: `given_later`, `own_blocks` and `moved`.
    """
    xp = namespace(done.logdet)
    total: Any = 0.0
    for k, (stage, (inner, around)) in enumerate(zip(stages, blocks, strict=True)):
        basis = natural.symmetric_basis(stage.sizes).astype(inner.dtype)
        m, q = basis.shape[:2]
        flat = basis.reshape(m, q * q)
        own = pair_trace(stage.sizes, inner, 2 * around - inner)
        before = [one.state[k] for one in moves if one.stage < k]
        if before:
            mixed, early = _of_earlier(stage, k, done, R, later[k:], before)
            across = mixed.reshape(len(before), q * q) @ flat.T
            own = xp.concatenate(
                [
                    xp.concatenate([early, across], axis=1),
                    xp.concatenate([across.T, own], axis=1),
                ]
            )
        spare = len(moves) - len(own)
        total = total + xp.pad(own, [(0, spare), (0, spare)])
    return (total + total.T) / 2


def _of_earlier(
    stage: Stage, k: int, done: Eliminated, R: Array, later: list[Given], dots: list[Couplings]
) -> tuple[Array, Array]:
    """U (A_x - G C H_x' - H_x C G') U' summed over the levels, (x, q, q), and the derivatives in
    the parameters of earlier stages, (x, x)."""
    here, W, U = done.couplings[k], done.weights[k], done.solved[k]
    xp, count, q = namespace(W), len(dots), len(W)
    chains, tails = [here.chain], [here.tail]
    for dot in dots:
        gain = linalg.matmul(dot.matrix, W)
        pairs = zip(dot.chain, here.chain, strict=True)
        chains.append(tuple(a + linalg.matmul(gain, b) for a, b in pairs))
        tails.append(dot.tail + per_coupling(gain, here.tail, stage.level))
    chain = tuple(xp.concatenate(parts) for parts in zip(*chains, strict=True))
    tail = xp.concatenate(tails)
    *_, variance = explained(stage, chain, tail, later, stage.pulled(tail, R))
    variance = variance.reshape(1 + count, q, 1 + count, q, -1)
    mixed, scaled = [], []
    for x, dot in enumerate(dots, 1):
        joint = variance[0, :, x]
        inside = dot.matrix - joint - linalg.transpose(joint)
        mixed.append(linalg.matmul(linalg.matmul(U, inside), linalg.transpose(U)).sum(axis=2))
        scaled.append(linalg.matmul(W, dot.matrix))
    early = [
        [
            2 * (W * variance[x, :, y]).sum() - (left * linalg.transpose(right)).sum()
            for y, right in enumerate(scaled, 1)
        ]
        for x, left in enumerate(scaled, 1)
    ]
    return xp.stack(mixed), xp.stack([xp.stack(row) for row in early])


def trace(stage: Stage, block: Array) -> Array:
    """tr(M E_i) for the sum M of blocks (q, q, J), (m_k,)."""
    basis = natural.symmetric_basis(stage.sizes).astype(block.dtype)
    return basis.reshape(len(basis), -1) @ block.sum(axis=2).reshape(-1)


def pair_trace(sizes: natural.Sizes, left: Array, right: Array) -> Array:
    """Sums over levels of tr(E_i left E_j right), (m, m), for symmetric (q, q, J)."""
    lower = natural.triangle(len(left))
    return sum_pairs(left[lower] @ right[lower].T, sizes)
