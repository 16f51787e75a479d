"""Elimination of nested factors against V written out."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml import Design
from jaxreml.model.covariance import natural
from jaxreml.model.structures import Crossed
from jaxreml.model.structures.crossed.elimination import eliminate, substitute

N = 40
FINE = np.random.default_rng(0).permutation(np.arange(N) % 12)
OTHER = np.random.default_rng(1).permutation(np.arange(N) % 5)
CASES = {  # codes and numbers of effects of the chain, finest first, and of the tail
    "nested": ([(FINE, 1), (FINE // 3, 1)], None),
    "chain and tail": ([(FINE, 2), (FINE // 2, 1), (FINE // 6, 1)], (OTHER, 2)),
}


def columns_of(codes: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Z of a term, (n, q J), effect by effect."""
    indicators = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    return np.hstack([indicators * effect[:, None] for effect in effects.T])


@pytest.mark.parametrize("name", CASES)
def test_chain_by_definition(name):
    chain, tail = CASES[name]
    rng = np.random.default_rng(2)
    terms = []
    for codes, q in [*chain, tail] if tail else chain:
        effects = rng.normal(size=(N, q))
        effects /= np.sqrt(np.mean(effects**2, axis=0))  # the unit inside a design
        terms.append((codes, effects))
    X, y = np.column_stack([np.ones(N), rng.normal(size=N)]), rng.normal(size=N)
    structure = Design.from_arrays(y, X, terms, structure="crossed").structure
    assert isinstance(structure, Crossed) and len(structure.stages) == len(chain)
    U, _ = np.linalg.qr(X)  # up to signs the basis inside a design
    columns = np.column_stack([U, y - U @ (U.T @ y)])

    Z = [columns_of(*term) for term in terms]
    omegas, V = [], np.eye(N)
    for (_, q), own in zip(chain, Z, strict=False):
        root = np.tril(rng.normal(size=(q, q)))
        omegas.append(natural.join_triangles((root @ root.T,)))
        V = V + own @ np.kron(root @ root.T, np.eye(own.shape[1] // q)) @ own.T
    inverse = np.linalg.inv(V)
    done = eliminate(
        structure.stages, tuple(omegas), structure.rest, structure.tail, structure.remainder
    )

    def same(ours, expected, signs=True):
        ours = np.asarray(ours)
        if not signs:
            ours, expected = abs(ours), abs(expected)
        np.testing.assert_allclose(ours, expected, atol=1e-10 * (1 + abs(expected).max()))

    same(done.logdet, np.linalg.slogdet(V)[1])
    same(done.T, columns.T @ inverse @ columns, signs=False)
    modes = np.zeros((0, 3))
    if tail:
        same(done.A, Z[-1].T @ inverse @ Z[-1])
        same(done.C, Z[-1].T @ inverse @ columns, signs=False)
        modes = rng.normal(size=(len(done.A), 3))
        modes[:, :2] = 0.0  # y's alone, whose sign is known
    left = inverse @ (columns[:, 2] - (Z[-1] @ modes[:, 2] if tail else 0.0))
    crosses = substitute(structure.stages, tuple(omegas), done, modes)
    for own, (_, q), cross in zip(Z, chain, crosses, strict=False):
        same(np.asarray(cross)[:, 2], (own.T @ left).reshape(q, -1))
