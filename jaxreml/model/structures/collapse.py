r"""Levels with the same F collapsed into a few: a balanced design costs the same for any J.

Levels that share F share P = I + F Omega F', so their scores c_j may be rotated among each other:
sum_j c_j' P^-1 c_j stays the same. A rotation brings the scores of X, which all responses share,
to r of a class's n levels. What y has left in the other n - r enters through its cross-products S
(q, q) alone, and S = L L' makes q levels of the columns of L.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import record
from jaxreml.model.structures.base import Marginal
from jaxreml.model.structures.grouped import Grouped, Partition, equal_levels
from jaxreml.model.structures.parts import Parts
from jaxreml.model.structures.patterns import Patterns

Array = Any  # NumPy's or JAX's

NO_X = 1e-13  # length of a score of (orthonormal) X that is rounding error
MANY_EQUAL = 8  # levels with one F, per score of one, of which `fewer_levels` takes the products
MOST_PRODUCTS = 2**24  # numbers of them
MAX_ROTATION = 2 * 10**7  # entries of the rotation; above it levels stay as they are


@record
@dataclass(frozen=True)
class Collapse:
    """How J levels become G, r of them rotated and q for each of D classes.

    Attributes:
        factors: (q, q, G) and
        counts: (G,), as in `Grouped`.
        scores_x: (q, p, G), scores of X.
        rotation: (r, J), orthonormal rows, block by block of the classes.
        classes, classes_rotated: of the J levels and of the r, by the class that a level's
            remainder goes to, one of D, or the last for none.
    """

    factors: Array
    counts: Array
    scores_x: Array
    rotation: Array
    classes: Partition
    classes_rotated: Partition

    def scores(self, scores: Array) -> Array:
        """Scores of responses, (q, J, B) to (q, G, B)."""
        q, xp = scores.shape[0], namespace(scores, self.rotation)
        rotated = xp.matmul(self.rotation, scores)
        if self.classes.n_levels == 1:
            return rotated
        pairs = {
            (i, k): self.classes.sums(scores[i] * scores[k])[:-1]
            - self.classes_rotated.sums(rotated[i] * rotated[k])[:-1]
            for i in range(q)
            for k in range(i + 1)
        }
        columns = _root(pairs, q)  # q columns of (q, D, B)
        return xp.concatenate([rotated, *columns], axis=1)


def _root(pairs: dict[tuple[int, int], Array], q: int) -> list[Array]:
    """Columns of Cholesky factors of cross-products given by lower triangle.

    A pivot is at least its rounding error and an entry at most what the diagonal allows, so that a
    remainder that lies in fewer than q directions neither fails nor divides by noise.
    """
    factor: dict[tuple[int, int], Array] = {}
    xp = namespace(pairs[0, 0])
    zero = xp.zeros_like(pairs[0, 0])
    for k in range(q):
        pivot = pairs[k, k] - sum((factor[k, j] ** 2 for j in range(k)), zero)
        root = xp.sqrt(xp.maximum(pivot, 1e-15 * xp.abs(pairs[k, k])))
        factor[k, k] = root
        for i in range(k + 1, q):
            rest = pairs[i, k] - sum((factor[i, j] * factor[k, j] for j in range(k)), zero)
            most = xp.sqrt(xp.maximum(pairs[i, i], 0.0))
            entry = xp.clip(rest / xp.where(root > 0, root, 1.0), -most, most)
            factor[i, k] = xp.where(root > 0, entry, 0.0)
    return [xp.stack([factor.get((i, k), zero) for i in range(q)]) for k in range(q)]


def collapse(factors: np.ndarray, scores_x: np.ndarray) -> Collapse | None:
    """Plan the collapse of levels.

    Args:
        factors: (q, q, J).
        scores_x: (q, p, J).

    Returns:
        The plan, or None if it would save less than a third of the levels.
    """
    q, p, n_levels = scores_x.shape
    groups = _by_class(equal_levels(factors))
    rows: list[np.ndarray] = []  # of the rotation, dense over one class
    members: list[np.ndarray] = []
    collapsed: list[tuple[np.ndarray, int]] = []
    for levels in groups:
        basis = np.eye(levels.size)
        if levels.size > q:
            left, lengths, _ = np.linalg.svd(
                scores_x[:, :, levels].reshape(q * p, levels.size).T, full_matrices=False
            )
            within = left[:, lengths > NO_X]
            if levels.size - within.shape[1] > q:
                basis = within
                collapsed.append((levels, basis.shape[1]))
        rows.append(basis.T)
        members.append(levels)
    n_rotated = sum(len(block) for block in rows)
    total = n_rotated + q * len(collapsed)
    if 3 * total > 2 * n_levels or n_rotated * n_levels > MAX_ROTATION:
        return None
    rotation = np.zeros((n_rotated, n_levels))
    first = np.zeros(n_rotated, int)
    start = 0
    for block, levels in zip(rows, members, strict=True):
        rotation[start : start + len(block), levels] = block
        first[start : start + len(block)] = levels[0]
        start += len(block)
    home = np.full(n_levels, len(collapsed), np.int32)
    for k, (levels, _) in enumerate(collapsed):
        home[levels] = k
    # The q levels of a class's remainder come column by column: all first ones, all second ones.
    leaders = np.array([levels[0] for levels, _ in collapsed], int)
    spare = np.array([(levels.size - r) / q for levels, r in collapsed])
    return _plan(
        factors=np.concatenate([factors[:, :, first], *[factors[:, :, leaders]] * q], axis=2),
        counts=np.concatenate([np.ones(n_rotated), *[spare] * q]),
        scores_x=np.concatenate(
            [scores_x @ rotation.T, np.zeros((q, p, q * len(collapsed)))], axis=2
        ),
        rotation=rotation,
        classes=Partition(home, len(collapsed) + 1),
        classes_rotated=Partition(home[first], len(collapsed) + 1),
    )


def fewer_levels(structure: Grouped) -> Grouped | Parts:
    """The same criterion, of one response, whose cost does not grow with the number of levels: of
    levels with the same F, c'P^-1 c depends on the cross-products of their scores alone.

    Large classes become `Patterns`, and what is left stays levels. On the host.
    """
    factors, scores = np.asarray(structure.factors), np.asarray(structure.scores)
    q, k = scores.shape[:2]
    classes = sorted(_by_class(structure.classes[0]), key=len, reverse=True)
    used = [levels for levels in classes if factors[:, :, levels[0]].any()]
    numbers = q * k
    large = [levels for levels in used if len(levels) * MANY_EQUAL > numbers]
    large = large[: MOST_PRODUCTS // numbers**2]
    if not large:
        return structure
    patterns = Patterns(
        factors=factors[:, :, [levels[0] for levels in large]],
        counts=np.array([float(len(levels)) for levels in large]),
        products=np.stack([_products(scores, levels) for levels in large]),
        remainder=np.asarray(structure.remainder),
        sizes=structure.sizes,
    )
    rest = np.concatenate([levels[:0] for levels in used[:1]] + used[len(large) :])
    if not rest.size:
        return Parts((patterns,))
    levels = replace(_some(structure, rest), remainder=np.zeros_like(structure.remainder))
    return Parts((patterns, levels))


def _products(scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """S_ab of `Patterns`, (q, q, k, k), of one class."""
    q, k = scores.shape[:2]
    rows = scores[:, :, levels].reshape(q * k, -1)
    seen = np.flatnonzero(rows.any(axis=1))
    found = np.zeros((q * k, q * k))
    rows = rows[seen]
    found[np.ix_(seen, seen)] = rows @ rows.T
    return found.reshape(q, k, q, k).swapaxes(1, 2)


def conditional(
    structure: Grouped, omega: np.ndarray, column: np.ndarray, variances: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """What levels of few different F say of their effects. On the host.

    Args:
        structure: of one response, J levels.
        omega: (m,), which need not be semidefinite.
        column: (p + 1,), the combination of the columns [X y] that is explained.
        variances: whether to give them.

    Returns:
        Omega Z' V0^-1 [X y] column, (q, J), and Omega - Omega B Omega, (q, q, J), or None.
    """
    classes, first = structure.classes
    few = _some(structure, first)
    weights, inner = few.explained(omega)
    rest = np.einsum("akJ,k->aJ", structure.scores, column)
    modes = np.zeros_like(rest)
    for own, values in zip(weights.swapaxes(0, 1), rest, strict=True):
        modes += own[:, classes] * values
    return modes, few.posterior_by_omega(inner, omega)[:, :, classes] if variances else None


def marginal_by_classes(structure: Grouped, omega: np.ndarray) -> Marginal:
    """`Grouped.marginal`, the levels of a class of equal F all at once. On the host."""
    classes, first = structure.classes
    few = _some(structure, first)
    inverses, logs = few.whitening(omega)
    gram, k = structure.remainder, len(structure.remainder)
    for own, inverse in zip(_by_class(classes), np.moveaxis(inverses, 2, 0), strict=True):
        scores = structure.scores[:, :, own]
        white = (inverse @ scores.reshape(len(inverse), -1)).reshape(scores.shape)
        white = white.swapaxes(0, 1).reshape(k, -1)
        gram = gram + white @ white.T
    return Marginal(float(np.bincount(classes) @ logs), gram)


def _some(structure: Grouped, levels: np.ndarray) -> Grouped:
    return replace(  # pyright: ignore
        structure, factors=structure.factors[:, :, levels], scores=structure.scores[:, :, levels]
    )


def _by_class(classes: np.ndarray) -> list[np.ndarray]:
    """The levels of each class of `equal_levels`."""
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)


def _plan(**fields: Any) -> Collapse:
    return Collapse(**fields)
