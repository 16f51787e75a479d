"""Designs made inside `vmap` and `scan` from other rows and levels each time, against a loop; and
from cross-products of which all are traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_moments import rows, sums

from jaxreml import Design, Status, Term, batches, estimate, ml_objective, optimise, reml_objective
from jaxreml.model import objective
from jaxreml.model.design import with_spare_levels

RNG = np.random.default_rng(8)
N, LEVELS, COUNT = 128, 9, 3
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
CODES = RNG.integers(0, LEVELS, (COUNT, N))
WEIGHTS = RNG.uniform(0.5, 2, (COUNT, N)) * (RNG.uniform(size=(COUNT, N)) < 0.9)
Y = np.array([RNG.normal(size=LEVELS)[own] for own in CODES]) + RNG.normal(size=(COUNT, N))
AT = np.array([0.2, -0.1])


def design(codes, y, weights, structure=None):
    term = Term(codes, n_levels=LEVELS)
    return Design.from_arrays(y, X, term, weights=weights, structure=structure)


@pytest.mark.optimised
@pytest.mark.parametrize("structure", [None, "dense"])
def test_mapped_and_scanned_as_a_loop(structure):
    """Codes, response and weights traced, some of them zero: rows that are left out."""
    both = jax.value_and_grad(
        lambda y, codes, weights: reml_objective(AT, design(codes, y, weights, structure))
    )
    alone = []
    for codes, y, weights in zip(CODES, Y, WEIGHTS, strict=True):
        own = weights > 0
        kept = Design.from_arrays(y[own], X[own], [codes[own]], weights=weights[own])
        alone.append(float(reml_objective(AT, kept)))

    @jax.jit
    def mapped_and_scanned(data):
        return jax.vmap(both)(*data), jax.lax.scan(lambda _, own: (_, both(*own)), 0, data)[1]

    mapped, scanned = mapped_and_scanned((Y, CODES, WEIGHTS))
    np.testing.assert_allclose(mapped[0], alone, rtol=1e-11)
    np.testing.assert_allclose(scanned[0], alone, rtol=1e-11)
    np.testing.assert_allclose(mapped[1], scanned[1], rtol=1e-9, atol=1e-12)
    assert (np.asarray(mapped[1])[WEIGHTS == 0] == 0).all()


@pytest.mark.optimised
def test_fits_of_other_rows_and_levels_mapped_as_a_loop():
    many = jax.jit(jax.vmap(lambda *data: estimate(design(*data))))(CODES, Y, WEIGHTS)
    for k in range(COUNT):
        own = WEIGHTS[k] > 0
        kept = (Y[k][own], X[own], [CODES[k][own]])
        alone = estimate(Design.from_arrays(*kept, weights=WEIGHTS[k][own]))
        assert int(many.status[k]) == int(alone.status) == Status.CONVERGED
        assert float(many.criterion[k]) == pytest.approx(float(alone.criterion), abs=1e-9)
        np.testing.assert_allclose(many.parameters[k], alone.parameters, rtol=1e-6)
        np.testing.assert_allclose(many.beta[k], alone.beta, rtol=1e-8)


def test_training_over_mini_batches_in_one_program():
    """Gradient steps in a scan over an epoch are those of a loop, and lower the loss."""
    y, group = Y[0], CODES[0]
    epoch = list(batches.groups(group, 3, seed=0))
    stacked = jax.tree.map(lambda *own: np.stack(own), *epoch)

    def step(parameters, batch):
        def loss(own):
            mean = own["slope"] * jnp.asarray(X[:, 1])[batch.rows]
            term = Term(batch.codes, n_levels=3)
            rest = jnp.asarray(y)[batch.rows] - mean
            none = jnp.zeros((rest.size, 0))
            made = Design.from_arrays(rest, none, term, weights=batch.weights)
            return batch.scale * ml_objective(own["variances"], made)

        value, slope = jax.value_and_grad(loss)(parameters)
        return jax.tree.map(lambda p, s: p - 1e-3 * s, parameters, slope), value

    start = {"slope": jnp.array(0.5), "variances": jnp.array([0.5, 0.5])}
    alone, values = start, []
    compiled = jax.jit(step)
    for batch in epoch:
        alone, value = compiled(alone, batch)
        values.append(float(value))
    found, losses = jax.jit(lambda p: jax.lax.scan(step, p, stacked))(start)
    np.testing.assert_allclose(losses, values, rtol=1e-11)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    again = compiled(found, epoch[0])[1]
    assert float(again) < values[0]


def test_moments_of_which_all_are_traced():
    """The number of rows too: a loader that pads, or a database of many studies."""
    given = sums(*rows(2))
    expected = float(reml_objective(jnp.zeros(3), Design.from_moments(*given, names=NAMES)))

    @jax.jit
    def both(n, *arrays):
        made = Design.from_moments(*arrays, n, names=NAMES)
        return reml_objective(jnp.zeros(3), made), made.trouble

    *arrays, n = given
    for count in (n, float(n)):
        value, trouble = both(count, *arrays)
        assert float(value) == pytest.approx(expected, rel=1e-12) and trouble == Status.CONVERGED
    assert both(3, *arrays)[1] == Status.TOO_FEW_ROWS


NAMES = [("g", ("a",)), ("g", ("b",))]


def test_one_program_for_designs_of_other_rows(monkeypatch):
    """`estimate`, an objective with its gradient and `optimise` are traced once."""
    traced, inner = [], objective.log_pivots

    def counted(*arguments):
        traced.append(1)
        return inner(*arguments)

    monkeypatch.setattr(objective, "log_pivots", counted)
    slope = jax.jit(jax.value_and_grad(reml_objective))
    counts = []
    for levels, size in ((13, 70), (14, 90), (16, 100)):
        group = np.arange(size) % levels
        y = np.cos(np.arange(float(size))) + np.sin(np.arange(levels))[group]
        own = Design.from_arrays(y, np.ones((size, 1)), [group])
        before = len(traced)
        estimate(own), optimise(own)
        slope(AT, with_spare_levels(own))
        counts.append(len(traced) - before)
    assert counts[0] > 0 and counts[1:] == [0, 0]
