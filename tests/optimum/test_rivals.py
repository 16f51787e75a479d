"""Criteria with several minima: the lowest is found, from every entry point, and known to be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import Design, Term, estimate
from jaxreml.data.frame import covariate_frame
from jaxreml.many.engine import BatchFitter
from jaxreml.many.lanes import Lanes
from jaxreml.many.screening import Grid, grid, screened
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.objective import profiled
from jaxreml.optimum.estimate import estimate_on_host
from jaxreml.optimum.rivals import Basin, has_one_optimum, is_global, starts
from jaxreml.optimum.search import expand_chart, search

# A group of twenty and five of one: an inner minimum lies above the one at variance zero.
UNEQUAL = np.repeat(range(6), [1, 1, 1, 1, 1, 20])
INNER = np.array(
    [
        -2.0,
        1.3,
        -1.1,
        -1.0,
        1.6,
        -0.1,
        -1.3,
        1.5,
        -0.6,
        0.6,
        -1.3,
        0.8,
        0.4,
        0.8,
        -0.8,
        -1.3,
        -0.2,
        0.4,
        0.3,
        -1.2,
        0,
        -1.4,
        -0.7,
        -1.4,
        0.4,
    ]
)
AT_ZERO = INNER.size * (np.log(2 * np.pi * INNER.var()) + 1)  # ML of the mean alone


@pytest.fixture(scope="module")
def unequal():
    with jax.enable_x64(True):
        return Design.from_arrays(INNER, np.ones((INNER.size, 1)), [UNEQUAL])


def test_the_data_have_two_minima(unequal):
    ratios = np.linspace(0, 2, 41)[:, None]
    values = np.array([float(profiled(ratio, unequal, reml=False)) for ratio in ratios])
    assert values[0] == pytest.approx(AT_ZERO)
    assert values[1] > values[0]
    minima = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
    assert minima.sum() == 1
    assert values[1:-1][minima] > AT_ZERO + 0.5


def test_estimate_and_fit_take_the_lower_one(unequal):
    assert float(estimate(unequal, "ML").criterion) == pytest.approx(AT_ZERO, abs=1e-9)
    fit = jaxreml.fit("y ~ 1 + (1 | g)", pd.DataFrame({"y": INNER, "g": UNEQUAL}), "ML")
    assert fit.criterion == pytest.approx(AT_ZERO, abs=1e-9)
    assert fit.is_singular
    assert fit.optimality == "proved to be the lowest"
    assert "proved to be the lowest" in fit.message


def test_fit_many_takes_the_lower_one():
    noise = np.random.default_rng(0).normal(size=(INNER.size, 20))
    data = pd.DataFrame({"g": UNEQUAL})
    results = jaxreml.fit_many("~ 1 + (1 | g)", data, np.column_stack([INNER, noise]), "ML")
    assert results.criterion.iloc[0] == pytest.approx(AT_ZERO, abs=1e-9)
    assert results.is_singular.iloc[0]
    for k, response in enumerate(noise.T[:3], start=1):
        alone = estimate(Design.from_arrays(response, np.ones((response.size, 1)), [UNEQUAL]), "ML")
        assert results.criterion.iloc[k] == pytest.approx(float(alone.criterion), abs=1e-9)


def test_the_proof_refuses_a_local_minimum(unequal):
    local = search(unequal, jnp.array([0.7]), False, 1e-12, 100)
    ratio = float(local.at[0]) ** 2
    assert bool(local.converged)
    assert ratio > 0.1
    n = INNER.size
    assert not is_global(unequal.structure, n, ratio, reml=False)
    assert is_global(unequal.structure, n, 0.0, reml=False)
    assert not is_global(unequal.structure, n, 0.01, reml=False)


def test_rival_starts():
    assert starts(unstructured((1,))).shape == (2, 1)
    assert starts(unstructured((2, 1))).shape == (5, 5)
    np.testing.assert_array_equal(
        np.array([1.0, 2, 3, 4, 5]) * unstructured((2, 1)).faces,
        [[0, 0, 0, 0, 0], [0, 0, 3, 4, 5], [1, 2, 0, 0, 5], [1, 2, 3, 4, 0]],
    )


def test_a_basin_holds_what_leads_to_its_optimum_only(unequal):
    """Of the optimum at zero neither the inner one, a little above it, nor what is far away."""
    design = unequal.without_names()

    def around(root):
        root = np.atleast_1d(root)
        return root, expand_chart(root, design, reml=False)

    with np.errstate(all="ignore"):
        inner = search(design, np.ones(1), False, 1e-12, 100)
        at_zero = search(design, np.zeros(1), False, 1e-12, 100)
    assert inner.point.value - at_zero.point.value > 1e-3
    basin = Basin.of(at_zero, design.covariance)
    assert basin.holds(*around(0.05))
    assert not basin.holds(*around(inner.at))
    assert not basin.holds(*around(30.0))
    assert not Basin.of(inner, design.covariance).holds(*around(0.0))  # below it
    assert Basin.of(inner, design.covariance).holds(*around(inner.at * 1.05))


def unbalanced(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, list[Term]]:
    """A small design with groups of very different sizes, response normal or heavy-tailed."""
    rng = np.random.default_rng(seed)
    n, J, H = 48, 8, 6

    def groups(J: int) -> np.ndarray:
        share = rng.lognormal(0, 1.3, J)
        return np.repeat(np.arange(J), 1 + rng.multinomial(n - J, share / share.sum()))

    g, h, x = groups(J), rng.permutation(groups(H)), rng.normal(size=n)
    y = [rng.normal(size=n), rng.standard_t(2, n), rng.standard_cauchy(n)][seed % 3]
    X = np.column_stack([np.ones(n), x])
    terms = {
        "one": [Term(g)],
        "slope": [Term(g, X)],
        "two": [Term(g), Term(h)],
    }
    return y, X, terms[kind]


def gaps_above(kind: str, method: str, seeds: range) -> np.ndarray:
    """How far `estimate`, on JAX and on NumPy, ends above the lowest of twenty random starts."""
    reml = method == "REML"
    rng = np.random.default_rng(1)

    @jax.jit
    def twenty(design: Design, roots: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(root: jax.Array) -> tuple[jax.Array, jax.Array]:
            trace = search(design, root, reml, 1e-12, 200)
            return trace.point.value, trace.converged

        return jax.lax.map(one, roots)

    gaps = []
    for seed in seeds:
        y, X, terms = unbalanced(kind, seed)
        # One shape for all: `dense` for two factors, as `crossed` has the pattern of levels in it.
        structure = "dense" if kind == "two" else None
        design = Design.from_arrays(y, X, terms, structure=structure).without_names()
        squares = [
            np.tril(rng.normal(size=(20, q, q))) * np.exp(rng.uniform(-4, 2.5, (20, q, 1)))
            for q in design.sizes
        ]
        roots = np.concatenate([square.reshape(20, -1) for square in squares], axis=1)
        values, converged = twenty(design, jnp.asarray(roots))
        lowest = np.where(converged, values, np.inf).min()
        found = estimate(design, method), estimate_on_host(design, method)[0]
        gaps += [float(own.criterion) - lowest for own in found]
    return np.array(gaps)


@pytest.mark.parametrize(("kind", "method"), [("one", "ML"), ("slope", "REML")])
def test_nowhere_above_the_best_of_twenty_starts(kind, method):
    assert gaps_above(kind, method, range(150)).max() < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("kind", ["one", "slope", "two"])
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_nowhere_above_the_best_of_twenty_starts_at_length(kind, method):
    above = gaps_above(kind, method, range(1000, 3000)) > 1e-6
    # Cauchy responses with correlated slopes have optima at relative SDs of 50, next to a
    # correlation of -1: three of the 2,000 designs.
    assert above.mean() <= (0.0015 if kind == "slope" else 0)


@pytest.mark.parametrize("formula", ["~ x + (1 | g)", "~ x + (x | g)", "~ x + (x || g)"])
def test_the_grid_of_a_batch_has_the_criterion(formula):
    y, X, terms = unbalanced("one", 5)
    frame = covariate_frame(formula, pd.DataFrame({"x": X[:, 1], "g": terms[0].group}))
    basis = BatchFitter(frame).basis
    for reml in (True, False):
        shared = Lanes.of(basis, frame.X, reml=reml)
        reduced = shared.reduce(jnp.asarray(y[:, None]), exact=True)
        values = Grid(shared, reml=reml).values(reduced)
        roots, shape = grid(shared.covariance)
        assert len(values) == len(roots) == np.prod(shape)
        design = shared.batch(reduced)
        for k in range(1, len(roots), 37):
            omega = shared.covariance.omega(jnp.asarray(roots[k]))
            wanted = profiled(omega[:, None], design, reml=reml)
            np.testing.assert_allclose(values[k], wanted, rtol=1e-11)


def test_screening_sees_lower_points_and_several_minima():
    covariance = unstructured((1,))
    points = len(grid(covariance)[0])
    values = np.linspace(5.0, 9.0, points)[:, None] * np.ones(3)
    values[6, 1] = 5.5  # another minimum
    found = np.array([5.0, 5.0, 5.1])  # the third is above the lowest point
    seen = screened(values, found, covariance)
    assert seen.several.tolist() == [False, True, False]
    assert seen.lower.tolist() == [False, False, True]
    assert seen.minima[:2, 1].tolist() == [0, 6]


def test_balanced_designs_need_no_screening():
    data = jaxreml.datasets.load("sleepstudy")

    def unique(formula: str, rows: slice = slice(None)) -> bool:
        basis = BatchFitter(covariate_frame(formula, data[rows])).basis
        return has_one_optimum(basis.structure, basis.covariance, basis.p)

    assert unique("~ Days + (Days | Subject)")
    assert unique("~ Days + (1 | Subject)")
    assert not unique("~ Days + (1 | Subject)", slice(3, None))
    assert not unique("~ 1 + (Days | Subject)")
    assert not unique("~ Days + (Days || Subject)")
