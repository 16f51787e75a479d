"""A `Basis` is made once: what it says of many responses is what it says of each."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxreml import DataError, Status
from jaxreml.model.arrays import Effects
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.unstructured import Unstructured

RNG = np.random.default_rng(7)
N = 60
G, H = np.repeat(np.arange(12), 5), np.tile(np.arange(5), 12)
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
WEIGHTS, OFFSET = RNG.uniform(0.5, 2, N), RNG.normal(size=N)
Y = 1e4 + RNG.normal(size=(N, 3))
ONE = [Effects(G, X, 12, "g", ("a", "b"), Unstructured(2))]
TWO = [*ONE, Effects(H, X[:, :1], 5, "h", ("c",), Unstructured(1))]
CASES = [(ONE, "grouped"), (TWO, "dense"), (TWO, "crossed")]


def same(one, other) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-9)


@pytest.mark.parametrize(("terms", "kind"), CASES)
def test_many_responses_are_each(terms, kind):
    basis = Basis.of(X, terms, weights=WEIGHTS, offset=OFFSET, structure=kind)
    assert basis.kind == kind
    many = basis.response(Y)
    for k in range(3):
        same(jax.tree.map(lambda leaf, k=k: leaf[..., k], many), basis.response(Y[:, k]))
    weighted = np.sqrt(WEIGHTS)[:, None]
    beta = np.linalg.lstsq(X * weighted, (Y - OFFSET[:, None]) * weighted)[0]
    np.testing.assert_allclose(many.beta_ols, beta, rtol=1e-9)


@pytest.mark.parametrize(("terms", "kind"), CASES)
def test_rows_left_out_are_not_there(terms, kind):
    used = np.arange(N) % 7 > 0
    some = [own._replace(codes=own.codes[used], columns=own.columns[used]) for own in terms]
    whole = Basis.of(X, terms, weights=WEIGHTS, structure=kind)
    masked = Basis.of(X, terms, weights=WEIGHTS, structure=kind, used=used, like=whole)
    alone = Basis.of(X[used], some, weights=WEIGHTS[used], structure=kind)
    assert masked.n == alone.n and masked.log_weights == pytest.approx(alone.log_weights)
    assert masked.log_gram_x == pytest.approx(alone.log_gram_x)
    one, other = masked.response(np.where(used[:, None], Y, 0)), alone.response(Y[used])
    for name in ("beta_ols", "residual_ss", "total_ss"):
        same(getattr(one, name), getattr(other, name))
    same(masked.triangle.T @ masked.triangle, alone.triangle.T @ alone.triangle)


def test_a_pattern_of_missing_values_is_not_planned_again():
    """Equal levels are not put together there, so that all patterns share their programs."""
    whole = Basis.of(X[:, :1], TWO, structure="crossed")
    used = np.arange(N) != 3, np.arange(N) % 9 > 0
    some = [Basis.of(X[:, :1], TWO, structure="crossed", used=own, like=whole) for own in used]
    shapes = [jax.tree.map(np.shape, own.structure) for own in some]
    assert shapes[0] == shapes[1]
    assert some[0].projector.meetings[0].level is whole.projector.meetings[0].level


def test_what_is_wrong_with_rows_and_responses():
    basis = Basis.of(X, ONE)
    assert basis.response(np.full(N, 3.0)).trouble == Status.CONSTANT
    assert basis.response(Y).trouble.tolist() == [Status.CONVERGED] * 3
    with pytest.raises(DataError, match="column 2 of X"):
        Basis.of(np.column_stack([X, X[:, 1]]), ONE)
    with pytest.raises(DataError, match="60 levels in 60 rows"):
        Basis.of(X, [Effects(np.arange(N), X[:, :1], N, "id", ("a",), Unstructured(1))])
