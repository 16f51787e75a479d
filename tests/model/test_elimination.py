"""Elimination of nested factors, with and without a tail, against V written out."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml import Design
from jaxreml.model.covariance import natural
from jaxreml.model.structures import Crossed

N = 40
FINE = np.random.default_rng(0).permutation(np.arange(N) % 12)
OTHER = np.random.default_rng(1).permutation(np.arange(N) % 5)
CASES = {  # codes and numbers of effects, the chain's finest first; how many are the chain's
    "nested": ([(FINE, 1), (FINE // 3, 1)], 2),
    "chain and tail": ([(FINE, 2), (FINE // 2, 1), (FINE // 6, 1), (OTHER, 2)], 3),
}


def columns_of(codes: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Z of a term, (n, q J), effect by effect."""
    indicators = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    return np.hstack([indicators * effect[:, None] for effect in effects.T])


@pytest.mark.parametrize("name", CASES)
def test_projection_by_definition(name):
    groups, chain = CASES[name]
    rng = np.random.default_rng(2)
    terms, triangles = [], []
    for codes, q in groups:
        effects = rng.normal(size=(N, q))
        effects /= np.sqrt(np.mean(effects**2, axis=0))  # the unit inside a design
        terms.append((codes, effects))
        root = np.tril(rng.normal(size=(q, q)))
        triangles.append(natural.join_triangles((root @ root.T,)))
    X, y = np.column_stack([np.ones(N), rng.normal(size=N)]), rng.normal(size=N)
    structure = Design.from_arrays(y, X, terms, structure="crossed").structure
    assert isinstance(structure, Crossed) and len(structure.stages) == chain
    omega = np.concatenate(triangles)
    found = structure.project(omega)

    basis = np.linalg.qr(X)[0]  # up to signs that of the design; y's column is known
    columns = np.column_stack([basis, y - basis @ (basis.T @ y)])
    V, directions = np.eye(N), []
    Z = [columns_of(*term) for term in terms]
    for own, triangle, (_, q) in zip(Z, triangles, groups, strict=True):
        for value, unit in zip(triangle, natural.symmetric_basis((q,)), strict=True):
            directions.append(own @ np.kron(unit, np.eye(own.shape[1] // q)) @ own.T)
            V = V + value * directions[-1]
    inverse = np.linalg.inv(V)

    def same(ours, expected):
        expected = np.asarray(expected)
        atol = 1e-10 * (1 + abs(expected).max())
        np.testing.assert_allclose(np.asarray(ours), expected, atol=atol)

    same(found.logdet, np.linalg.slogdet(V)[1])
    same(abs(np.asarray(found.gram)), abs(columns.T @ inverse @ columns))
    same(structure.slope(found), [np.sum(inverse * own) for own in directions])
    for own, (_, q), cross in zip(Z[:chain], groups, found.cross, strict=False):
        same(np.asarray(cross)[:, 2], (own.T @ inverse @ columns[:, 2]).reshape(q, -1))
    if chain < len(Z):
        same(np.asarray(found.cross[-1])[:, 2], Z[-1].T @ inverse @ columns[:, 2])
