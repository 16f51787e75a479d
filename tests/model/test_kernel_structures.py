"""The structures of kernels under JAX: values and derivatives of the objective, against dense
algebra and NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from independent import gradient, neg2_loglik

import jaxreml


@pytest.mark.parametrize("structure", ["kernel", "linear"])
def test_objective(structure):
    rng = np.random.default_rng(7)
    n, levels = 24, 14
    G = rng.normal(size=(levels, 9))
    K, codes = G @ G.T / 9, rng.integers(0, 12, n)  # singular; levels 12 and 13 have no rows
    X, weights = np.column_stack([np.ones(n), rng.normal(size=n)]), rng.uniform(0.5, 2, n)
    y = X @ [1, 2] + rng.normal(size=n) + (G @ rng.normal(size=9))[codes]
    term = jaxreml.Term(codes, name="g", kernel=K)
    with jax.enable_x64(True):
        design = jaxreml.Design.from_arrays(y, X, [term], weights=weights, structure=structure)
        assert structure in repr(design)
        at = np.array([0.4, -0.3])
        value, slope = jax.value_and_grad(jaxreml.reml_objective)(at, design)

    def dense(at):
        return neg2_loglik(at, y, X, [(codes, np.ones((n, 1)), K)], reml=True, weights=weights)

    assert float(value) == pytest.approx(dense(at), abs=1e-9)
    np.testing.assert_allclose(slope, gradient(dense, at), rtol=1e-7)


@pytest.mark.parametrize(
    ("kernel", "group", "message"),
    [
        (np.eye(3), np.array(["a", "b", "c", "a"]), "must be integers"),
        (np.eye(3), np.array([0, 1, 3, 0]), "none of 0 to 2"),
        (np.ones((2, 3)), np.array([0, 1, 1, 0]), "square"),
    ],
)
def test_bad_terms(kernel, group, message):
    term = jaxreml.Term(group, kernel=kernel)
    with pytest.raises(jaxreml.DataError, match=message):
        jaxreml.Design.from_arrays(np.arange(4.0), np.ones((4, 1)), [term], dtype="float64")


def test_sizes_are_bounded(monkeypatch):
    rng = np.random.default_rng(1)
    codes = np.arange(40) // 2
    effects = np.stack([np.ones(40), rng.normal(size=40)], axis=1)
    terms = [jaxreml.Term(codes, effects, kernel=np.eye(20))]
    monkeypatch.setattr("jaxreml.model.structures.linear.MOST_ROWS", 30)
    with pytest.raises(jaxreml.DataError, match="here 40, and 30 is the limit"):
        jaxreml.Design.from_arrays(rng.normal(size=40), np.ones((40, 1)), terms, dtype="float64")
    monkeypatch.setattr("jaxreml.model.structures.kernel.MOST_LEVELS", 10)
    with pytest.raises(jaxreml.DataError, match=r"20 levels of 'group' have rows.* 10 at most"):
        jaxreml.Design.from_arrays(
            rng.normal(size=40), np.ones((40, 1)), [jaxreml.Term(codes, kernel=np.eye(20))],
            dtype="float64",
        )  # fmt: skip
