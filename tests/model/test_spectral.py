"""The criterion in the eigenbasis of Z'RZ is that of V written out."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml.model.structures.collapse import collapse
from jaxreml.model.structures.grouped import GroupedBasis
from jaxreml.model.structures.spectral import MAX_ORDER, spectral

LEVELS = 12


def one_way(balanced: bool):
    """Codes, effects (n, 1), orthonormal X and responses (n, B), orthogonal to X."""
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(LEVELS), 4 if balanced else rng.integers(1, 6, LEVELS))
    Z = np.ones((codes.size, 1)) if balanced else rng.uniform(0.5, 2, (codes.size, 1))
    X = np.column_stack([np.ones(codes.size), rng.normal(size=LEVELS)[codes]])
    if not balanced:
        X = np.column_stack([X, rng.normal(size=codes.size)])
    X = np.linalg.qr(X)[0]
    values = rng.normal(size=(codes.size, 3)) + 2 * rng.normal(size=LEVELS)[codes, None]
    return codes, Z, X, values - X @ (X.T @ values)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_criterion_is_that_of_v(balanced, reml):
    codes, Z, X, values = one_way(balanced)
    p = X.shape[1]
    basis = GroupedBasis.of(codes, Z, LEVELS)
    scores, rest = basis.project(np.column_stack([X, values]))
    remainder = rest.T @ rest
    factors, counts, scores_x = basis.factors, np.ones(LEVELS), scores[:, :p]
    of_y = scores[:, p:].swapaxes(1, 2)
    if balanced:  # levels that stand for several, without scores of X
        plan = collapse(factors, scores_x)
        assert plan is not None
        factors, counts, scores_x = (
            np.asarray(part) for part in (plan.factors, plan.counts, plan.scores_x)
        )
        of_y = np.asarray(plan.scores(of_y))
    found = spectral(factors, counts, scores_x, reml=reml)
    assert found is not None
    rotated, shift = (np.asarray(part) for part in found.scores(of_y))
    f, repeats = np.asarray(found.factors)[0, 0], np.asarray(found.counts)
    across = np.einsum("pb,pb->b", remainder[:p, p:], shift)
    within = np.einsum("pb,pq,qb->b", shift, remainder[:p, :p], shift)
    left = np.diagonal(remainder)[p:] + 2 * across + within
    for gamma in (0.0, 0.3, 50.0, 1e4):
        V = np.eye(codes.size) + gamma * (Z @ Z.T) * (codes[:, None] == codes)
        inverse = np.linalg.inv(V)
        M = X.T @ inverse @ X
        P = inverse - inverse @ X @ np.linalg.solve(M, X.T @ inverse)
        logdet = np.linalg.slogdet(V)[1] + reml * np.linalg.slogdet(M)[1]
        shrunk = 1 + gamma * f**2
        np.testing.assert_allclose(repeats @ np.log(shrunk), logdet, rtol=1e-9, atol=1e-10)
        squares = left + np.sum(rotated[0] ** 2 / shrunk[:, None], axis=0)
        np.testing.assert_allclose(squares, np.diagonal(values.T @ P @ values), rtol=1e-9)


def test_too_many_levels_are_left_as_they_are():
    counts = np.ones(MAX_ORDER + 1)
    assert spectral(counts[None, None], counts, counts[None, None], reml=True) is None
