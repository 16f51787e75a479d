"""log|I + Omega A| and (Omega^-1 + A)^-1 by dense algebra, singular Omega and A included."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml.model.covariance import natural
from jaxreml.model.structures.crossed import schur
from jaxreml.model.structures.layout import Layout

LAYOUT = Layout((2, 1), (3, 4))  # 10 effects: two of each of 3 levels, one of each of 4


def of_all_levels(omega: np.ndarray) -> np.ndarray:
    """Omega of all effects, (Q, Q): term by term, effect by effect."""
    blocks = natural.symmetric_matrices(omega, LAYOUT.sizes)
    whole = np.zeros((LAYOUT.total, LAYOUT.total))
    start = 0
    for block, levels in zip(blocks, LAYOUT.levels, strict=True):
        wide = np.kron(block, np.eye(levels))
        whole[start : start + len(wide), start : start + len(wide)] = wide
        start += len(wide)
    return whole


@pytest.mark.parametrize("theta", [(1.5, 0.4, 0.8, 1.2), (1.5, 0.4, 0.0, 0.0), (0.01, 0, 1e-3, 9)])
@pytest.mark.parametrize("rank", [10, 3])
def test_solution_and_what_derivatives_are_made_of(theta, rank):
    rng = np.random.default_rng(rank)
    half = rng.normal(size=(LAYOUT.total, rank))
    A, C = half @ half.T, rng.normal(size=(LAYOUT.total, 2))
    omega = np.asarray(natural.omega_from_theta(np.array(theta), LAYOUT.sizes), float)
    whole = of_all_levels(omega)
    inner = np.eye(LAYOUT.total) + whole @ A
    R = np.linalg.solve(inner, whole)
    found = schur.solve(LAYOUT, omega, A, C)

    def same(ours, expected):
        atol = 1e-11 * (1 + np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-9, atol=atol)

    same(found.logdet, np.linalg.slogdet(inner)[1])
    same(found.inverse, R)
    same(found.modes, R @ C)
    same(found.form, C.T @ R @ C)

    W = np.eye(LAYOUT.total) - R @ A
    ours = schur.complements(LAYOUT, omega, A, found.inverse)
    same(ours[0], W)
    same(ours[1], A @ W)
    M = A @ A
    same(schur.times_complement(LAYOUT, omega, A, M @ found.inverse, M), M @ W)
    blocks = schur.inner_blocks(LAYOUT, omega, A, found.inverse)
    for block, expected in zip(blocks, LAYOUT.blocks(A @ W), strict=True):
        same(block, expected)
