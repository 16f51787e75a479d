"""Collapsed levels have the likelihood of the levels they stand for: V written out."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml.model.structures import collapse as module
from jaxreml.model.structures.collapse import collapse
from jaxreml.model.structures.grouped import GroupedBasis, equal_levels

LEVELS, ROWS, RESPONSES = 20, 5, 3


def balanced(seed: int, q: int):
    """Codes, effects (n, q) in two patterns, orthonormal X and responses (n, B)."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(LEVELS), ROWS)
    patterns = np.array([np.arange(ROWS), np.arange(ROWS) ** 1.5])
    x = patterns[np.arange(LEVELS) % 2].ravel()
    X = np.column_stack([np.ones(codes.size), x, rng.normal(size=LEVELS)[codes]])
    values = rng.normal(size=(codes.size, RESPONSES)) + 3 * rng.normal(size=LEVELS)[codes, None]
    return codes, np.vander(x, q, increasing=True), np.linalg.qr(X)[0], values


def planned(codes, Z, X, values):
    """The plan, what Q leaves of [X y], and the collapsed scores of y."""
    basis = GroupedBasis.of(codes, Z, LEVELS)
    scores, rest = basis.project(np.column_stack([X, values]))
    p = X.shape[1]
    plan = collapse(basis.factors, scores[:, :p])
    assert plan is not None
    return plan, rest.T @ rest, np.asarray(plan.scores(scores[:, p:].swapaxes(1, 2)))


def marginal(plan, scores, omega):
    """log|V0| and what the levels add to [X y]'V0^-1 [X y], by the plan."""
    F = np.moveaxis(np.asarray(plan.factors), 2, 0)
    P = np.eye(len(omega)) + F @ omega @ F.swapaxes(1, 2)
    columns = np.concatenate([np.asarray(plan.scores_x).swapaxes(1, 2), scores], axis=2)
    columns = columns.swapaxes(0, 1)  # (G, q, p + B)
    logdet = np.asarray(plan.counts) @ np.linalg.slogdet(P)[1]
    return logdet, np.einsum("gqu,gqv->uv", columns, np.linalg.solve(P, columns))


@pytest.mark.parametrize("q", [1, 2, 3])
def test_likelihood_is_that_of_all_levels(q):
    codes, Z, X, values = balanced(q, q)
    plan, remainder, scores = planned(codes, Z, X, values)
    assert plan.factors.shape[-1] <= 2 * LEVELS / 3
    rng = np.random.default_rng(0)
    for size in (0.0, 0.1, 100.0):
        root = size * rng.normal(size=(q, q))
        omega = root @ root.T
        V = np.eye(codes.size) + (Z @ omega @ Z.T) * (codes[:, None] == codes)
        columns = np.column_stack([X, values])
        expected = columns.T @ np.linalg.solve(V, columns)
        logdet, products = marginal(plan, scores, omega)
        np.testing.assert_allclose(logdet, np.linalg.slogdet(V)[1], rtol=1e-10, atol=1e-10)
        found = products + remainder
        p = X.shape[1]
        np.testing.assert_allclose(found[:p], expected[:p], atol=1e-10 * abs(expected).max())
        np.testing.assert_allclose(np.diagonal(found), np.diagonal(expected), rtol=1e-10)


def test_remainders_in_few_directions():
    """Responses without random effects, or with random intercepts alone, leave singular ones."""
    codes, Z, X, values = balanced(4, 2)
    none = X @ np.arange(3.0)
    intercepts = none + np.random.default_rng(1).normal(size=LEVELS)[codes]
    values = np.column_stack([none, intercepts, np.zeros(codes.size)])
    plan, remainder, scores = planned(codes, Z, X, values)
    omega = np.array([[2.0, 0.5], [0.5, 1.0]])
    V = np.eye(codes.size) + (Z @ omega @ Z.T) * (codes[:, None] == codes)
    found = np.diagonal(marginal(plan, scores, omega)[1] + remainder)[3:]
    expected = np.diagonal(values.T @ np.linalg.solve(V, values))
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_levels_that_differ_stay_as_they_are(monkeypatch):
    rng = np.random.default_rng(2)
    factors, scores = rng.uniform(1, 2, (1, 1, LEVELS)), rng.normal(size=(1, 2, LEVELS))
    assert collapse(factors, scores) is None
    equal = np.ones_like(factors)
    assert collapse(equal, scores) is not None
    monkeypatch.setattr(module, "MAX_ROTATION", LEVELS)
    assert collapse(equal, scores) is None


def test_equal_levels():
    factors = np.array([[[1.0, 2.0, 1.0, 1.0, 2.0]]]).repeat(2, axis=0).repeat(2, axis=1)
    factors[0, 1] *= 1e6  # each entry in its own unit
    factors[0, 1, 2] *= 1 + 1e-15
    factors[1, 0, 3] += 1e-6
    first, second, third, fourth, fifth = equal_levels(factors)
    assert first == third and second == fifth
    assert len({first, second, fourth}) == 3
