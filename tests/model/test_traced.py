"""Traced data that no error can refuse: statuses, and derivatives that other lanes do not spoil."""

from __future__ import annotations

from functools import partial
from typing import Any

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml import DataError, Design, Status, Term, estimate, ml_objective, reml_objective
from jaxreml.model import linalg, objective

GROUP = np.repeat(np.arange(8), 4)
N = GROUP.size
RNG = np.random.default_rng(5)
Z, FEATURE = RNG.normal(size=(2, N))
ONE = np.ones(N)
GOOD = [FEATURE + RNG.normal(size=N) + RNG.normal(size=8)[GROUP] for _ in range(3)]
WEIGHTS = RNG.uniform(0.5, 2, N)


def first(value: float, others: np.ndarray) -> np.ndarray:
    return np.concatenate([[value], others[1:]])


# Response, second column of X, weights, and what should become of them.
LANES = [
    (GOOD[0], FEATURE, WEIGHTS, Status.CONVERGED),
    (GOOD[1], FEATURE, ONE, Status.CONVERGED),
    (GOOD[0], 0 * ONE, WEIGHTS, Status.RANK_DEFICIENT),
    (GOOD[0], 1e200 * ONE, ONE, Status.RANK_DEFICIENT),
    (GOOD[0], 3 + 1e-12 * FEATURE, ONE, Status.RANK_DEFICIENT),
    (GOOD[0], first(1.0, 0 * ONE), first(1e-30, ONE), Status.CONVERGED),  # little weight, no less
    (GOOD[0], 2 + first(1.0, 0 * ONE), first(1e-30, ONE), Status.RANK_DEFICIENT),
    (3 * ONE, FEATURE, ONE, Status.CONSTANT),
    (0 * ONE, FEATURE, WEIGHTS, Status.CONSTANT),
    (2 + 3 * FEATURE, FEATURE, ONE, Status.PERFECT_FIT),
    (first(np.nan, GOOD[0]), FEATURE, ONE, Status.NOT_FINITE),
    (GOOD[0] * 1e200, FEATURE, ONE, Status.NOT_FINITE),
    (GOOD[0] * 1e-170, FEATURE, ONE, Status.UNDERFLOW),
    (GOOD[0], first(np.inf, FEATURE), ONE, Status.NOT_FINITE),
    (GOOD[0], FEATURE, first(0.0, ONE), Status.CONVERGED),  # left out
    (GOOD[0], FEATURE, ONE * (np.arange(N) < 2), Status.TOO_FEW_ROWS),
    (GOOD[0], FEATURE, first(-1.0, ONE), Status.BAD_WEIGHTS),
    (GOOD[0], FEATURE, first(np.nan, ONE), Status.BAD_WEIGHTS),
]
RIGHT = [k for k, lane in enumerate(LANES) if lane[3] == Status.CONVERGED]


def design_of(y, column, weights, shift=0.0) -> Design:
    X = jnp.column_stack([jnp.ones(N), column])
    return Design.from_arrays(y, X, [GROUP], weights=weights, offset=shift * Z**2 * (1 - 2 * Z))


@jax.jit
def fits(lanes, shift=0.0):
    return jax.vmap(lambda y, x, w: estimate(design_of(y, x, w, shift)))(*lanes)


def arrays_of(which) -> tuple[np.ndarray, ...]:
    return tuple(np.array([LANES[k][i] for k in which]) for i in range(3))


def masked(shift, lanes):
    found = fits(lanes, shift)
    terms = found.criterion + found.beta[:, 0] ** 2 + found.sigma
    return jnp.sum(jnp.where(found.status == Status.CONVERGED, terms, 0.0))


@pytest.fixture(scope="module")
def found():
    with jax.enable_x64(True):
        return jax.device_get(fits(arrays_of(range(len(LANES)))))


def test_every_lane_has_its_status(found):
    assert [Status(int(status)) for status in found.status] == [lane[3] for lane in LANES]


def test_dependent_columns_are_left_out(found):
    for k, (y, _, weights, status) in enumerate(LANES):
        if status == Status.RANK_DEFICIENT:
            alone = estimate(Design.from_arrays(y, ONE[:, None], [GROUP], weights=weights))
            assert found.criterion[k] == pytest.approx(float(alone.criterion), rel=1e-9)
            assert found.beta[k, 0] == pytest.approx(float(alone.beta[0]), rel=1e-7)
            assert np.isnan(found.beta[k, 1])
            assert found.vcov[k, 0, 0] == pytest.approx(float(alone.vcov[0, 0]), rel=1e-6)


def test_the_other_lanes_are_the_same_to_the_bit(found):
    wrong = [k for k in range(len(LANES)) if k not in RIGHT]
    lanes = arrays_of([0 if k in wrong else k for k in range(len(LANES))])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(fits(lanes)), strict=True):
        np.testing.assert_array_equal(one[RIGHT], np.asarray(other)[RIGHT])
    y, column, weights, _ = LANES[0]
    X = np.column_stack([ONE, column])
    concrete = estimate(Design.from_arrays(y, X, [GROUP], weights=weights))
    assert found.criterion[0] == pytest.approx(float(concrete.criterion), rel=1e-10)
    np.testing.assert_allclose(found.beta[0], concrete.beta, rtol=1e-6)


SECOND = pytest.param(jax.hessian, marks=pytest.mark.long)  # 30 s of compilation


@pytest.mark.parametrize("of", [jax.grad, jax.jacfwd, SECOND])
def test_masked_lanes_do_not_spoil_a_shared_derivative(of):
    derivative = jax.jit(of(masked))
    at = 0.0
    everything = arrays_of(range(len(LANES)))
    only = arrays_of([RIGHT[k % len(RIGHT)] for k in range(len(LANES))])  # the same shapes
    copies = np.bincount([k % len(RIGHT) for k in range(len(LANES))])
    each = [float(derivative(at, tuple(a[[k] * len(a)] for a in everything))) for k in RIGHT]
    each = np.array(each) / len(LANES)
    assert float(derivative(at, everything)) == pytest.approx(each.sum(), rel=1e-8)
    assert float(derivative(at, only)) == pytest.approx(each @ copies, rel=1e-8)
    if of is jax.grad:
        step = 1e-4
        lanes = arrays_of(RIGHT)
        expected = (masked(step, lanes) - masked(-step, lanes)) / (2 * step)
        assert float(each.sum()) == pytest.approx(float(expected), rel=1e-5)


def test_a_masked_lane_has_no_derivative_of_its_own():
    def loss(lanes):
        return masked(0.0, lanes)

    slopes = jax.jit(jax.grad(loss))(arrays_of(range(len(LANES))))
    for slope in slopes:
        wrong = np.delete(np.asarray(slope), RIGHT, axis=0)
        assert (wrong == 0).all()
        assert np.isfinite(slope).all()
    assert all(np.abs(slope[0]).max() > 0 for slope in slopes)


class TestObjectives:
    """The objectives of a traced X."""

    @pytest.mark.parametrize("objective", [ml_objective, reml_objective])
    def test_a_dead_unit_counts_as_left_out(self, objective):
        params = jnp.array([0.3, -0.1])

        def loss(X):
            return objective(params, Design.from_arrays(GOOD[0], X, [GROUP]))

        slope = jax.jit(jax.value_and_grad(loss))
        three = np.column_stack([ONE, 0 * ONE, FEATURE])
        value, gradient = slope(jnp.asarray(three))
        expected, without = slope(jnp.asarray(three[:, [0, 2]]))
        assert float(value) == pytest.approx(float(expected), rel=1e-12)
        np.testing.assert_allclose(gradient[:, [0, 2]], without, atol=1e-10)
        assert (np.asarray(gradient[:, 1]) == 0).all()
        hessian = jax.jit(jax.jacfwd(jax.grad(lambda t: loss(three + t * Z[:, None] ** 2))))
        assert np.isfinite(hessian(0.0))

    def test_values_that_cannot_be_used_give_nan(self):
        @jax.jit
        def both(y, weights):
            design = design_of(y, FEATURE, weights)
            return jax.value_and_grad(ml_objective)(jnp.zeros(2), design)

        for lane in (LANES[10], LANES[16]):
            value, gradient = both(lane[0], lane[2])
            assert np.isnan(value)
            assert np.isnan(gradient).all()

    @pytest.mark.parametrize("weighted", [False, True])
    def test_harvilles_form_does_not_depend_on_the_basis_of_x(self, weighted):
        weights = WEIGHTS if weighted else None
        params = jnp.array([0.3, -0.1])
        X = np.column_stack([ONE, FEATURE, Z])

        @partial(jax.jit, static_argnames="harville")
        def loss(X, harville=True):
            design = Design.from_arrays(GOOD[0], X, [GROUP], weights=weights)
            return reml_objective(params, design, harville=harville)

        value = float(loss(X))
        A = np.random.default_rng(1).normal(size=(3, 3))
        assert float(loss(X @ A)) == pytest.approx(value, rel=1e-11)
        assert float(loss(X * [1e3, 1e-6, 1])) == pytest.approx(value, rel=1e-11)
        plain = float(loss(X, harville=False))
        assert plain - value == pytest.approx(np.linalg.slogdet(X.T @ X)[1], rel=1e-10)
        # -2 log density of orthonormal contrasts
        K = np.linalg.qr(X, mode="complete")[0][:, 3:]
        terms = [(GROUP, ONE[:, None])]
        V = independent.marginal_covariance(np.asarray(params), terms, weights, N)
        contrasts, S = K.T @ GOOD[0], K.T @ V @ K
        density = (N - 3) * np.log(2 * np.pi) + np.linalg.slogdet(S)[1]
        density += contrasts @ np.linalg.solve(S, contrasts)
        assert value == pytest.approx(density, rel=1e-11)
        concrete = Design.from_arrays(GOOD[0], X, [GROUP], weights=weights)
        assert float(reml_objective(params, concrete, harville=True)) == pytest.approx(value)
        direction = np.random.default_rng(2).normal(size=X.shape)
        slope = np.asarray(jax.jit(jax.grad(loss))(X))
        expected = (loss(X + 1e-5 * direction) - loss(X - 1e-5 * direction)) / 2e-5
        assert np.sum(slope * direction) == pytest.approx(float(expected), rel=1e-6)
        np.testing.assert_allclose(X.T @ slope, 0, atol=1e-10)  # X A for A near I


def test_independent_columns_and_their_derivatives():
    rng = np.random.default_rng(0)
    X, direction = rng.normal(size=(2, 30, 5))
    X[:, 3] = X[:, 0] - 2 * X[:, 1]
    direction[:, 3] = 0.0
    kept = [0, 1, 2, 4]
    split = partial(linalg.independent_columns, tolerance=1e-10)
    basis, triangle = split(jnp.asarray(X))
    np.testing.assert_allclose(basis @ triangle, X * (np.arange(5) != 3), atol=1e-13)
    np.testing.assert_allclose(basis.T @ basis, np.diag([1, 1, 1, 0, 1]), atol=1e-14)

    def value(t, columns):
        basis, triangle = split((X + t * direction)[:, columns])
        return jnp.sum(jnp.sin(basis) ** 2 * np.arange(30)[:, None]) + jnp.sum(triangle**3)

    for function in (value, jax.grad(value)):
        slope = jax.grad(function)(0.0, np.arange(5))
        assert float(slope) == pytest.approx(float(jax.grad(function)(0.0, np.array(kept))))
        expected = (function(1e-5, np.array(kept)) - function(-1e-5, np.array(kept))) / 2e-5
        assert float(slope) == pytest.approx(float(expected), rel=1e-6)


def test_residuals_and_their_derivatives():
    """Against the normal equations, and a value that is not finite as a zero."""
    rng = np.random.default_rng(0)
    X, direction = rng.normal(size=(2, 30, 4))
    y = rng.normal(size=(30, 2)) + 5
    X[3, 2] = direction[3, 2] = 0.0
    broken = X.copy()
    broken[3, 2] = np.nan

    def of_normal_equations(t):
        moved = X + t * direction
        values = jnp.cos(t) * y
        return values - moved @ jnp.linalg.solve(moved.T @ moved, moved.T @ values)

    def ours(t):
        basis, _ = linalg.independent_columns(jnp.asarray(broken) + t * direction, 1e-10)
        values = jnp.cos(t) * y
        rest, shares = linalg.residual(basis, values)
        return rest + basis @ (basis.T @ values - shares)

    f, g = (lambda t, of=of: jnp.sum(jnp.sin(of(t)) ** 2) for of in (ours, of_normal_equations))
    for _ in range(3):
        assert float(f(0.1)) == pytest.approx(float(g(0.1)), rel=1e-10)
        f, g = jax.grad(f), jax.grad(g)


class TestTracedEffects:
    """Effects and weights of one factor stay grouped; derivatives exist where effects tie."""

    group = np.concatenate([np.repeat(np.arange(7), 5), [7, 8, 8, 9, 9, 9, 9]])
    n = group.size
    rng = np.random.default_rng(3)
    effects = np.column_stack([np.ones(n), rng.normal(size=n)])
    effects[group == 9, 1] = 0.0  # an effect that a level does not have
    effects[group == 3, 1] = 0.7  # two that are the same there; level 7 has fewer rows than effects
    y = effects @ rng.normal(size=2) + rng.normal(size=n) + rng.normal(size=10)[group]
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    arrays = (rng.uniform(0.5, 2, n), effects, y, X)
    along = (X[:, 1], effects[:, ::-1] - 0.3, X[:, 1] ** 2, X * effects)
    params = np.array([0.3, -0.4, 0.5, 0.2])

    def value(self, t, structure=None):
        moved = [a + t * d for a, d in zip(self.arrays, self.along, strict=True)]
        weights, effects, y, X = moved
        design = Design.from_arrays(
            y, X, [(self.group, effects)], weights=weights, structure=structure
        )
        return reml_objective(jnp.asarray(self.params) * (1 + t), design)

    def test_derivatives_equal_the_dense_structures_and_differences(self):
        value = jax.jit(self.value, static_argnames="structure")
        assert value(0.0) == pytest.approx(float(value(0.0, structure="dense")), rel=1e-13)
        expected = float((value(1e-5) - value(-1e-5)) / 2e-5)
        slope = jax.jit(jax.grad(self.value), static_argnames="structure")
        assert float(slope(0.0)) == pytest.approx(float(slope(0.0, structure="dense")), rel=1e-10)
        assert float(slope(0.0)) == pytest.approx(expected, rel=1e-6)
        for bend in (jax.jacfwd(jax.grad(self.value)), jax.grad(jax.grad(self.value))):
            second = float(jax.jit(bend)(0.0))
            assert second == pytest.approx(float((slope(1e-5) - slope(-1e-5)) / 2e-5), rel=1e-6)

    def test_gradient_through_the_fit(self):
        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def fitted(arrays):
            weights, effects, y, X = arrays
            fit = estimate(Design.from_arrays(y, X, [(self.group, effects)], weights=weights))
            return fit.criterion + fit.log_variances.sum() + fit.beta[1], fit.status

        def moved(t):
            return tuple(a + t * d for a, d in zip(self.arrays, self.along, strict=True))

        (_, status), slopes = fitted(self.arrays)
        assert int(status) == Status.CONVERGED
        slope = sum(np.sum(s * d) for s, d in zip(slopes, self.along, strict=True))
        expected = (fitted(moved(1e-4))[0][0] - fitted(moved(-1e-4))[0][0]) / 2e-4
        assert float(slope) == pytest.approx(float(expected), rel=1e-5)

    def test_many_rows_cost_no_square_of_them(self):
        n = 20_000
        y = np.random.default_rng(0).normal(size=n)

        def loss(weights):
            design = Design.from_arrays(y, np.ones((n, 1)), [np.arange(n) // 10], weights=weights)
            return reml_objective(jnp.zeros(2), design)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(n)).compile()
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 1000 * n


class TestTracedLevels:
    """Levels and rows that are known only when the program runs: one program for all of them."""

    levels = 9  # one has no row
    group = np.random.default_rng(4).integers(0, 8, 60)
    rng = np.random.default_rng(6)
    effects = np.column_stack([np.ones(60), rng.normal(size=60)])
    weights = rng.uniform(0.5, 2, 60) * (rng.uniform(size=60) < 0.8)
    y = rng.normal(size=60) + rng.normal(size=8)[group]
    params = np.array([0.3, -0.4, 0.5, 0.2])

    @partial(jax.jit, static_argnums=(0, 4))
    def value(self, codes, weights, y, structure=None):
        terms = [Term(codes, self.effects, n_levels=self.levels)]
        design = Design.from_arrays(y, self.effects, terms, weights=weights, structure=structure)
        return reml_objective(self.params, design)

    def kept(self, group, weights):
        """The same without the rows of weight zero."""
        own = weights > 0
        terms = [(group[own], self.effects[own])]
        design = Design.from_arrays(self.y[own], self.effects[own], terms, weights=weights[own])
        return float(reml_objective(self.params, design))

    @pytest.mark.parametrize("structure", [None, "dense"])
    def test_rows_of_weight_zero_and_any_levels(self, structure):
        for group, weights in (
            (self.group, self.weights),
            (7 - self.group[::-1], self.weights),
            (self.group, 1 + self.weights),
        ):
            value = float(self.value(group, weights, self.y, structure))
            assert value == pytest.approx(self.kept(group, weights), rel=1e-12)

    def test_derivatives_of_both_structures_and_differences(self):
        slopes = {}
        for structure in (None, "dense"):
            of = jax.jit(jax.grad(self.value, argnums=(1, 2)), static_argnums=3)
            slopes[structure] = of(self.group, self.weights, self.y, structure)
        for one, other in zip(slopes[None], slopes["dense"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        left_out = self.weights == 0
        assert all((np.asarray(slope)[left_out] == 0).all() for slope in slopes[None])
        along = np.cos(np.arange(60)) * self.weights
        ends = [
            float(self.value(self.group, self.weights + t * along, self.y + t * along))
            for t in (-1e-5, 1e-5)
        ]
        slope = sum(float(np.sum(own * along)) for own in slopes[None])
        assert slope == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6)

    def test_codes_outside_are_no_levels(self):
        for wrong in (-1, self.levels):
            codes = np.where(self.group == 3, wrong, self.group)
            assert np.isnan(self.value(codes, self.weights, self.y))
            with pytest.raises(DataError, match=f"code {wrong} in row"):
                Design.from_arrays(self.y, self.effects, Term(codes, n_levels=self.levels))
        with pytest.raises(DataError, match="must be integers"):
            Design.from_arrays(self.y, self.effects, Term(1.0 * self.group, n_levels=self.levels))
        with pytest.raises(DataError, match="give Term"):
            jax.jit(lambda g: Design.from_arrays(self.y, self.effects, [g]).n)(self.group)
        assert Status.BAD_LEVELS.sentence.startswith("a code of a grouping factor")


def test_nearly_equal_numbers_of_levels_share_a_program(monkeypatch):
    """11 and 12 levels: nothing is traced, and so compiled, for the second."""
    traced, inner = [], objective.neg2_loglik

    def counted(*arguments, **options):
        traced.append(1)
        return inner(*arguments, **options)

    monkeypatch.setattr(objective, "neg2_loglik", counted)
    compiled = []
    params = jnp.array([0.3, -0.1])
    for levels in (11, 12, 17):
        group = np.arange(60) % levels
        y = np.cos(np.arange(60.0)) + np.arange(levels)[group]
        design = Design.from_arrays(y, np.ones((60, 1)), [group])
        reml_objective(params, design)
        compiled.append(len(traced))
    assert compiled == [1, 1, 2]
