"""Orthogonal factors by products alone, against Householder's."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml.model import tall


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e100])
def test_factors(scale):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 5)) @ np.diag([1, 1e4, 1e-3, 1, 7]) * scale
    X[:, 3] += 20 * X[:, 0]
    rows, triangle = tall.orthonormal(X)
    np.testing.assert_allclose(rows.T @ rows, np.eye(5), atol=1e-14)
    np.testing.assert_allclose(rows @ triangle, X, rtol=1e-10, atol=1e-12 * np.abs(X).max())
    expected = np.linalg.qr(X, mode="r")
    np.testing.assert_allclose(triangle, np.sign(np.diag(expected))[:, None] * expected, rtol=1e-9)


def test_others_are_refused():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 3))
    assert tall.triangle(X[:100]) is None  # not tall
    assert tall.triangle(np.column_stack([X, X[:, 0] + 1e-4 * X[:, 1]])) is None
    assert tall.triangle(np.column_stack([X, np.zeros(600)])) is None
    assert tall.triangle(X[:, :0]) is None
