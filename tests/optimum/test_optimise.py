"""Optimisers of optax on a design, and on a loss that has parameters of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreml
from jaxreml import Design, Status, Term, estimate, ml_objective, optimise, reml_objective

RNG = np.random.default_rng(3)
N = 150
GROUP = RNG.integers(0, 12, N)
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
MODES, NOISE = RNG.normal(size=12), RNG.normal(size=N)
SPREADS = (0.0, 1.0, 40.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def designs():
    y = [100 + 1e3 * (X[:, 1] + s * MODES[GROUP] + 5 * NOISE) for s in SPREADS]
    return [Design.from_arrays(own, X, [GROUP]) for own in y]


@pytest.fixture(scope="module")
def estimates(designs):
    with jax.enable_x64(True):
        return [estimate(design) for design in designs]


def test_it_finds_what_estimate_finds(designs, estimates):
    for design, known in zip(designs, estimates, strict=True):
        found = optimise(design)
        assert int(found.status) == Status.CONVERGED
        assert bool(found.is_singular) == bool(known.is_singular)
        assert float(found.criterion) == pytest.approx(float(known.criterion), abs=1e-8)
        np.testing.assert_allclose(found.parameters, known.parameters, atol=1e-5)
        np.testing.assert_allclose(found.beta, known.beta, rtol=1e-6)
        np.testing.assert_allclose(found.log_variance_se, known.log_variance_se, rtol=1e-5)
    assert bool(estimates[0].is_singular)


def test_adam_finds_it_too(designs, estimates):
    found = optimise(designs[2], optimizer=optax.adam(0.05), max_steps=5000)
    assert int(found.status) == Status.CONVERGED
    np.testing.assert_allclose(found.parameters, estimates[2].parameters, atol=1e-6)
    too_short = optimise(designs[2], jnp.zeros(2), optimizer=optax.adam(0.05), max_steps=3)
    assert int(too_short.status) == Status.MAX_ITERATIONS


def test_vmap_equals_a_loop(designs):
    adam = optax.adam(0.05)

    def run(design):
        return optimise(design, optimizer=adam, max_steps=300, tolerance=1e-3)

    many = jax.jit(jax.vmap(run))(jaxreml.stack(designs))
    for k, design in enumerate(designs):
        alone = run(design)
        assert int(many.status[k]) == int(alone.status)
        assert int(many.n_iter[k]) == int(alone.n_iter)
        np.testing.assert_allclose(many.parameters[k], alone.parameters, atol=1e-9)
    assert len(set(many.n_iter.tolist())) > 1


def test_lbfgs_under_jit_and_vmap_finds_what_estimate_finds(designs, estimates):
    many = jax.jit(jax.vmap(optimise))(jaxreml.stack(designs))
    for k, known in enumerate(estimates):
        assert int(many.status[k]) == Status.CONVERGED
        np.testing.assert_allclose(many.parameters[k], known.parameters, atol=1e-5)
        np.testing.assert_allclose(many.log_variance_se[k], known.log_variance_se, rtol=1e-5)


def test_optimistix_and_a_loop_by_hand_find_it_too(designs, estimates):
    """The recipes of docs/guides/derivatives.md."""
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)

    @jax.jit
    def newton(at, design):
        gradient = jax.grad(reml_objective)
        slope, curvature = gradient(at, design), jax.jacfwd(gradient)(at, design)
        return at - jnp.linalg.solve(curvature, slope), jnp.abs(slope).max()

    design, known = designs[2], estimates[2]
    found = optimistix.minimise(reml_objective, solver, jaxreml.start(design), args=design)
    np.testing.assert_allclose(found.value, known.parameters, atol=1e-6)
    at, first = newton(jaxreml.start(design), design)
    for _ in range(6):
        at, largest = newton(at, design)
    assert largest < 1e-9 < 1e-3 < first
    np.testing.assert_allclose(at, known.parameters, atol=1e-8)


def test_start_is_in_the_datas_units(designs, estimates):
    for design, known in zip(designs, estimates, strict=True):
        found = jaxreml.start(design)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[-1], known.parameters[-1], atol=0.2)
    np.testing.assert_allclose(jaxreml.start(designs[2]), estimates[2].parameters, atol=0.3)
    scaled = 1e6 * np.repeat(MODES, 5) + 1e6 * NOISE[:60]  # balanced: the optimum itself
    balanced = Design.from_arrays(scaled, np.ones((60, 1)), [np.repeat(np.arange(12), 5)])
    np.testing.assert_allclose(jaxreml.start(balanced), estimate(balanced).parameters, rtol=1e-8)


def test_parameters_of_ones_own_beside_the_variances():
    """A mean that is not linear: the optimum is that of a grid over it, profiled."""
    y = np.exp(0.7 * X[:, 1]) + MODES[GROUP] + 0.3 * NOISE

    def loss(parameters):
        mean = jnp.exp(parameters["rate"] * X[:, 1])
        design = Design.from_arrays(y - mean, np.zeros((N, 0)), [GROUP])
        return ml_objective(parameters["variances"], design)

    found = optimise(loss, {"rate": 0.0, "variances": jnp.zeros(2)})
    assert int(found.status) == Status.CONVERGED
    rates = float(found.parameters["rate"]) + np.array([-1e-3, 0.0, 1e-3])
    profiled = []
    for rate in rates:
        own = Design.from_arrays(y - np.exp(rate * X[:, 1]), np.zeros((N, 0)), [GROUP])
        profiled.append(float(estimate(own, "ML").criterion))
    assert profiled[1] == pytest.approx(float(found.value), abs=1e-8)
    left, right = profiled[0] - profiled[1], profiled[2] - profiled[1]
    assert left + right > 0.01
    assert abs(right - left) / (2 * (left + right)) * 1e-3 < 1e-5  # the vertex of a parabola


def test_what_cannot_be_minimised_is_refused(designs):
    with pytest.raises(ValueError, match="needs parameters="):
        optimise(lambda p: p)
    with pytest.raises(ValueError, match="must give a scalar"):
        optimise(lambda p: p, jnp.zeros(3))
    with pytest.raises(ValueError, match="method"):
        optimise(designs[0], method="OLS")
    runaway = optimise(lambda p: jnp.log(p), 1.0, optimizer=optax.sgd(0.5))
    assert int(runaway.status) == Status.NOT_FINITE


class TestBatches:
    """Mini-batches of whole groups."""

    def test_each_group_comes_once_and_whole(self):
        codes = np.array(["b", "a", "b", "c", "c", "c", "d", "e"])
        passes = list(jaxreml.batches.groups(codes, 2, seed=1))
        assert {len(batch.rows) for batch in passes} == {4}
        assert [batch.scale for batch in passes] == [3, 3, 3]
        rows = np.concatenate([batch.rows[batch.weights > 0] for batch in passes])
        np.testing.assert_array_equal(np.sort(rows), np.arange(8))
        for batch in passes:
            own = batch.weights > 0
            pairs = set(zip(codes[batch.rows[own]], batch.codes[own], strict=True))
            assert len(pairs) == len({code for code, _ in pairs}) == len({k for _, k in pairs})
        again = list(jaxreml.batches.groups(codes, 2, seed=1))
        np.testing.assert_array_equal(passes[0].rows, again[0].rows)

    def test_every_group_is_equally_likely_in_a_batch_and_few_rows_are_padding(self):
        counts = np.array([40, 9, 9, 9, 5, 3, 3, 2, 1, 1, 1])  # four batches: hands of 4, 4 and 3
        codes, often = np.repeat(np.arange(11), counts), np.zeros((4, 11))
        for seed in range(2000):
            for k, batch in enumerate(jaxreml.batches.groups(codes, 3, seed=seed)):
                own = np.unique(codes[batch.rows[batch.weights > 0]])
                assert len(own) in (2, 3) and len(batch.rows) - batch.weights.sum() <= 40
                often[k, own] += 1
        np.testing.assert_allclose(often / 2000, 0.25, atol=0.04)  # four standard errors

    def test_a_pass_compiles_once_and_sums_to_the_criterion(self):
        at, y = jnp.array([0.3, -0.2, 0.4, 0.1]), MODES[GROUP] + NOISE
        count = 0

        @jax.jit
        def criterion(rows, codes, weights):
            nonlocal count
            count += 1
            own = jnp.asarray(X)[rows]
            term = Term(codes, own, n_levels=5)
            none = jnp.zeros((len(rows), 0))
            return ml_objective(
                at, Design.from_arrays(jnp.asarray(y)[rows], none, term, weights=weights)
            )

        passes = list(jaxreml.batches.groups(GROUP, 5, seed=0))
        parts = [float(criterion(b.rows, b.codes, b.weights)) for b in passes]
        whole = Design.from_arrays(y, np.zeros((N, 0)), [(GROUP, X)])
        assert sum(parts) == pytest.approx(float(ml_objective(at, whole)), rel=1e-12)
        assert count == 1

    def test_sizes_that_do_not_fit_are_refused(self):
        for size in (0, 4):
            with pytest.raises(ValueError, match="between 1 and 3"):
                jaxreml.batches.groups([1, 2, 3], size)
        with pytest.raises(jaxreml.DataError, match="no rows"):
            jaxreml.batches.groups([], 1)
