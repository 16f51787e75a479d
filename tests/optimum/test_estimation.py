"""`estimate`: optima, standard errors, boundaries, transformations, trouble."""

from __future__ import annotations

from typing import Any

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import Design, Status, estimate, reml_objective, stack
from jaxreml.model.linalg import FLAT
from jaxreml.optimum.estimate import estimate_on_host

vmap_against_a_loop = pytest.mark.optimised


def design_of(seed: int, **options) -> Design:
    y, X, codes, Z = independent.simulate(seed, **options)
    return Design.from_arrays(y, X, [(codes, Z)])


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_standard_errors_equal_a_numerical_hessian(method):
    y, X, codes, Z = independent.simulate(3)
    fit = estimate(Design.from_arrays(y, X, [(codes, Z)]), method)
    assert int(fit.status) == Status.CONVERGED

    def value(params):
        return independent.neg2_loglik(params, y, X, [(codes, Z)], reml=method == "REML")

    params = np.asarray(fit.parameters)
    assert float(fit.criterion) == pytest.approx(value(params), rel=1e-12)
    assert np.abs(independent.gradient(value, params)).max() < 1e-6
    hessian = independent.hessian(value, params)
    np.testing.assert_allclose(fit.hessian, hessian, atol=1e-5 * np.abs(hessian).max())
    expected = np.sqrt(np.diagonal(2 * np.linalg.inv(hessian)))
    np.testing.assert_allclose(fit.log_variance_se, expected[[0, 1, 3]], rtol=1e-5)
    V = independent.marginal_covariance(params, [(codes, Z)], None, len(y))
    M = X.T @ np.linalg.solve(V, X)
    np.testing.assert_allclose(fit.vcov, np.linalg.inv(M), rtol=1e-8)
    np.testing.assert_allclose(fit.beta, np.linalg.solve(M, X.T @ np.linalg.solve(V, y)), rtol=1e-8)


def test_derivatives_of_vcov_equal_finite_differences():
    y, X, codes, Z = independent.simulate(3)
    fit = estimate(Design.from_arrays(y, X, [(codes, Z)]))

    def vcov(params):
        V = independent.marginal_covariance(params, [(codes, Z)], None, len(y))
        return np.linalg.inv(X.T @ np.linalg.solve(V, X))

    slopes = independent.gradient(vcov, np.asarray(fit.parameters))
    np.testing.assert_allclose(fit.vcov_slopes, slopes, atol=1e-8)


@vmap_against_a_loop
@pytest.mark.parametrize("q", [1, 2])
def test_vmap_equals_loop(q):
    # n >= 120: jaxlib has miscompiled vmapped loops of this size (design notes, "Traps")
    designs = [design_of(seed, q=q) for seed in range(64)]
    together = jax.vmap(estimate)(stack(designs))
    for k, design in enumerate(designs):
        alone = estimate(design)
        mine = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        assert int(mine.status) == int(alone.status) == Status.CONVERGED
        assert float(mine.criterion) == pytest.approx(float(alone.criterion), abs=1e-8)
        np.testing.assert_allclose(mine.theta, alone.theta, atol=1e-6)
        np.testing.assert_allclose(mine.beta, alone.beta, atol=1e-6)
        np.testing.assert_allclose(mine.log_variance_se, alone.log_variance_se, rtol=1e-5)


@vmap_against_a_loop
def test_vmap_over_responses_alone():
    y, X, codes, Z = independent.simulate(1)
    responses = y + np.random.default_rng(0).normal(size=(4, y.size))
    fits = jax.vmap(lambda y: estimate(Design.from_arrays(y, X, [(codes, Z)])))(responses)
    for k, response in enumerate(responses):
        alone = estimate(Design.from_arrays(response, X, [(codes, Z)]))
        assert float(fits.criterion[k]) == pytest.approx(float(alone.criterion), abs=1e-8)


@vmap_against_a_loop
def test_vmap_over_everything():
    """Traced X, effects and weights: the dense structure."""
    rng = np.random.default_rng(0)
    _, X, codes, Z = independent.simulate(1)
    n = len(X)
    Xs = X + rng.normal(size=(3, *X.shape)) * (np.arange(X.shape[1]) > 0)
    Zs = Z + rng.normal(size=(3, *Z.shape))
    weights = rng.uniform(0.5, 2, (3, n))
    effects = rng.normal(size=(3, codes.max() + 1, Z.shape[1]))
    ys = np.sum(Zs * effects[:, codes], axis=2) + rng.normal(size=(3, n))

    def fit(y, X, Z, weights):
        return estimate(Design.from_arrays(y, X, [(codes, Z)], weights=weights))

    fits = jax.vmap(fit)(ys, Xs, Zs, weights)
    for k, arrays in enumerate(zip(ys, Xs, Zs, weights, strict=True)):
        alone = fit(*arrays)
        assert int(fits.status[k]) == int(alone.status) == Status.CONVERGED
        assert float(fits.criterion[k]) == pytest.approx(float(alone.criterion), abs=1e-8)
        np.testing.assert_allclose(fits.beta[k], alone.beta, atol=1e-6)


@vmap_against_a_loop
def test_designs_of_unequal_rows_levels_and_weights_are_padded():
    designs = [design_of(1, n_groups=9), design_of(2, n_groups=12)]
    y, X, codes, Z = independent.simulate(3, n_groups=12)
    rows, weights = slice(10, None), np.random.default_rng(0).uniform(0.5, 2, y.size - 10)
    terms = [(codes[rows], Z[rows])]
    designs.append(Design.from_arrays(y[rows], X[rows], terms, weights=weights))
    together = jax.vmap(estimate)(stack(designs))
    for k, design in enumerate(designs):
        alone = float(estimate(design).criterion)
        assert float(together.criterion[k]) == pytest.approx(alone, abs=1e-8)
    with pytest.raises(jaxreml.DataError, match="different numbers of fixed effects"):
        stack([design_of(1), design_of(1, p=3)])


def test_zero_variance_is_exactly_zero_and_conditions_the_other_errors():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(10), 5)
    y = rng.normal(size=50)
    y -= np.bincount(codes, y)[codes] / 5  # no variance between groups at all
    y += 0.01 * rng.normal(size=50)
    fit = estimate(Design.from_arrays(y, np.ones((50, 1)), [codes]))
    assert int(fit.status) == Status.CONVERGED
    assert bool(fit.is_singular)
    assert float(fit.theta[0]) == 0
    assert float(fit.log_variances[0]) == -np.inf
    assert np.isnan(fit.log_variance_se[0])
    assert float(fit.log_variance_se[1]) == pytest.approx(np.sqrt(2 / 49))  # sigma2 ~ chi2(49)


def test_correlation_close_to_one_is_not_taken_for_one():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(200), 20)
    x = rng.normal(size=codes.size)
    Z = np.column_stack([np.ones(codes.size), x])
    intercept, other = rng.normal(size=(2, 200))
    slope = 0.99999 * intercept + np.sqrt(1 - 0.99999**2) * other
    y = intercept[codes] + slope[codes] * x + 0.005 * rng.normal(size=codes.size)
    design = Design.from_arrays(y, Z, [(codes, Z)])
    fit = estimate(design)
    assert int(fit.status) == Status.CONVERGED
    assert not bool(fit.is_singular)
    assert 0.99997 < np.tanh(fit.parameters[2]) < 0.999999
    value = float(reml_objective(fit.parameters, design))
    assert value == pytest.approx(float(fit.criterion), abs=1e-6)
    assert np.isfinite(fit.log_variance_se).all()


def test_start_at_a_saddle_is_left():
    # The saddle at zero variance is where a first step could land; newton must not stay there.
    from jaxreml.optimum import newton
    from jaxreml.optimum.search import expand_chart

    design = design_of(5, q=1)
    at_zero = expand_chart(jnp.zeros(1), design, reml=True)
    assert float(at_zero.gradient[0]) == 0
    assert float(at_zero.hessian[0, 0]) < 0
    trace = newton.minimise(
        lambda root: expand_chart(root, design, reml=True),
        jnp.zeros(1),
        jnp.abs,
        tolerance=1e-12,
        max_iterations=50,
    )
    assert bool(trace.converged)
    assert float(trace.point.value) == pytest.approx(float(estimate(design).criterion), abs=1e-8)


def test_gradient_through_the_fit_equals_finite_differences():
    y, X, codes, Z = independent.simulate(2)

    @jax.jit
    def figures(y):
        fit = estimate(Design.from_arrays(y, X, [(codes, Z)]))
        return jnp.concatenate([fit.log_variances, fit.beta, fit.log_variance_se])

    jacobian = jax.jit(jax.jacrev(figures))(jnp.asarray(y))
    forward = jax.jit(jax.jacfwd(figures))(jnp.asarray(y))
    np.testing.assert_allclose(jacobian, forward, atol=1e-9)
    for i in (0, 50):
        h = 1e-4 * np.eye(y.size)[i]
        expected = (figures(y + h) - figures(y - h)) / 2e-4
        np.testing.assert_allclose(jacobian[:, i], expected, atol=1e-7)


def test_second_derivative_through_the_fit():
    y, X, codes, _ = independent.simulate(2, q=1)
    direction = np.random.default_rng(0).normal(size=y.size)

    def log_variance(t):
        return estimate(Design.from_arrays(y + t * direction, X, [codes])).log_variances[0]

    second = float(jax.jit(jax.grad(jax.grad(log_variance)))(0.0))
    slope = jax.jit(jax.grad(log_variance))
    expected = float((slope(1e-4) - slope(-1e-4)) / 2e-4)
    assert second == pytest.approx(expected, rel=1e-5)


def test_an_optimiser_of_the_users_own_reaches_the_same_optimum():
    from scipy.optimize import minimize

    design = design_of(3)
    value_and_grad = jax.jit(jax.value_and_grad(reml_objective))

    def flat(params):
        value, gradient = value_and_grad(params, design)
        return float(value), np.asarray(gradient)

    found = minimize(flat, np.zeros(4), jac=True, method="BFGS")
    assert found.fun == pytest.approx(float(estimate(design).criterion), abs=1e-6)


def test_large_mean_and_badly_scaled_columns_change_nothing():
    y, X, codes, Z = independent.simulate(3)
    plain = estimate(Design.from_arrays(y, X, [(codes, Z)]))
    scaled = Design.from_arrays(1e6 + 1e-3 * y, X * [1, 1e6], [(codes, Z * [1, 1e-5])])
    other = estimate(scaled)
    assert int(other.status) == Status.CONVERGED
    np.testing.assert_allclose(other.theta, np.asarray(plain.theta) * [1, 1e5, 1e5], rtol=1e-4)
    np.testing.assert_allclose(other.log_variance_se, plain.log_variance_se, rtol=1e-4)
    assert float(other.beta[1]) == pytest.approx(float(plain.beta[1]) * 1e-9, rel=1e-4)


def test_no_fixed_effects():
    y, _, codes, _ = independent.simulate(3, q=1)
    none = np.empty((y.size, 0))
    fit = estimate(Design.from_arrays(y, none, [codes]))
    value = independent.neg2_loglik(
        fit.parameters, y, none, [(codes, np.ones((y.size, 1)))], reml=True
    )
    assert float(fit.criterion) == pytest.approx(value, rel=1e-12)
    assert fit.beta.shape == (0,)


class TestTrouble:
    """Numerical trouble has a status with a sentence."""

    def test_every_status_has_a_sentence(self):
        assert all(status.sentence for status in Status)

    def test_iteration_limit(self):
        fit = estimate(design_of(3), max_iterations=2)
        assert int(fit.status) == Status.MAX_ITERATIONS

    @pytest.mark.parametrize("noise", [0.0, 1e-15])
    def test_perfect_fit(self, noise):
        rng = np.random.default_rng(0)
        codes = np.repeat(np.arange(6), 5)
        X = np.column_stack([np.ones(30), rng.normal(size=30)])
        y = X @ [1.0, 2.0] + noise * rng.normal(size=30)
        fit = estimate(Design.from_arrays(y, X, [codes]))
        assert int(fit.status) == Status.PERFECT_FIT

    @pytest.mark.parametrize(
        ("scale", "status"),
        [(1e-160, Status.UNDERFLOW), (1e-150, Status.UNDERFLOW), (1e-140, Status.CONVERGED)],
    )
    def test_squares_that_underflow(self, scale, status):
        y, X, codes, _ = independent.simulate(3, q=1)
        fit = estimate(Design.from_arrays(y * scale, X, [codes]))
        assert int(fit.status) == status

    def test_constant_response(self):
        codes = np.repeat(np.arange(6), 5)
        X = np.column_stack([np.ones(30), np.arange(30.0)])
        for value in (3.1, 0.0, 1e-170):
            fit = estimate(Design.from_arrays(np.full(30, value), X, [codes]))
            assert int(fit.status) == Status.CONSTANT
        with pytest.raises(jaxreml.DataError, match="constant"):
            jaxreml.fit("y ~ 1 + (1 | g)", {"y": np.ones(30), "g": codes})

    def test_response_constant_within_groups(self):
        codes = np.repeat(np.arange(6), 5)
        y = np.random.default_rng(0).normal(size=6)[codes]
        fit = estimate(Design.from_arrays(y, np.ones((30, 1)), [codes]))
        assert int(fit.status) == Status.PERFECT_FIT

    def test_confounded_variances_have_no_standard_errors(self):
        y, X, codes, _ = independent.simulate(3, q=1)
        fit = estimate(Design.from_arrays(y, X, [codes, codes], structure="dense"))
        alone = estimate(Design.from_arrays(y, X, [codes]))
        assert float(fit.criterion) == pytest.approx(float(alone.criterion), abs=1e-8)
        assert np.isnan(fit.log_variance_se).all()

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="REML"):
            estimate(design_of(3), "reml")


# Two rows a level with the same two columns of full rank: as many effects as rows.
SQUARE = np.column_stack([np.ones(6), np.tile([0.0, 1.0], 3)])
MISSING = "site contains missing values, the first in row 2; drop those rows first"


class TestFromArrays:
    """Bad arrays are refused with what is wrong."""

    y = np.arange(6.0) ** 2
    X = np.ones((6, 1))
    g = np.array([0, 0, 1, 1, 2, 2])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"y": [1.0, np.nan, 2, 3, 4, 5]}, "y contains NaN or infinite"),
            ({"y": list("abcdef")}, "y is not numeric"),
            ({"X": np.ones((5, 1))}, r"X must have shape \(6, p\)"),
            ({"X": np.ones((6, 2))}, "column 1 of X is a linear combination"),
            ({"X": np.eye(6)}, "6 columns and only 6 rows"),
            ({"terms": []}, "at least one random term"),
            ({"terms": [np.zeros(6)]}, "one level"),
            ({"terms": [np.arange(6)]}, "one row a level"),
            ({"terms": [(g, SQUARE)]}, "cannot be told apart"),
            ({"terms": [g[:5]]}, r"must have shape \(6,\)"),
            ({"terms": g}, "list of random terms, not ndarray"),
            ({"terms": [jaxreml.Term(np.where(g == 1, np.nan, g), name="site")]}, MISSING),
            ({"terms": [jaxreml.Term([*"aabb", None, "c"], name="site")]}, "site .* in row 4"),
            ({"terms": [[*"aabbc", np.nan]]}, "g1 contains missing values, the first in row 5"),
            ({"terms": [np.array(["2020", "2020", "NaT"] * 2, "M8[D]")]}, "in row 2"),
            ({"terms": [pd.Series([*"aabbc", pd.NA])]}, "in row 5"),
            ({"terms": [np.ma.array(g, mask=g == 2)]}, "in row 4"),
            ({"terms": [[1, 1, 2, 2, "c", "c"]]}, "cannot be put in order, of type int, str"),
            ({"y": np.ma.array(y, mask=y > 9)}, "y contains masked values"),
            ({"weights": np.zeros(6)}, "weights must be positive"),
            ({"weights": np.ones(5)}, r"weights must have shape \(6,\)"),
            ({"structure": "sparse"}, '"crossed" or "dense"'),
            ({"structure": "grouped", "terms": [g, g[::-1] % 2]}, "same factor"),
        ],
    )
    def test_refused(self, arguments, message):
        arguments = {"y": self.y, "X": self.X, "terms": [self.g], **arguments}
        with pytest.raises(jaxreml.DataError, match=message):
            Design.from_arrays(**arguments)

    def test_labels_are_told_apart_by_value(self):
        for group in (self.g, self.g.tolist(), [1.0, 1, True, 2, 3, 3], np.ma.array(self.g)):
            design = Design.from_arrays(self.y, self.X, jaxreml.Term(group))
            structure: Any = design.structure
            assert structure.factors.shape[-1] == 3


@pytest.mark.long
@pytest.mark.optimised
@pytest.mark.parametrize(("n", "n_groups", "q"), [(60, 8, 1), (60, 8, 2), (120, 10, 3)])
def test_no_start_finds_a_lower_criterion(n, n_groups, q):
    """300 designs, most of them singular: all converge, and L-BFGS from 3 starts does no better."""
    from scipy.optimize import minimize

    from jaxreml.optimum.search import expand_chart

    rng = np.random.default_rng(1)
    designs = []
    for seed in range(300):
        y, X, codes, Z = independent.simulate(seed, n, n_groups, q)
        shrink = rng.choice([0, 0.1, 1], q)
        y = y - np.sum(Z * (1 - shrink), axis=1) * rng.normal(size=n_groups)[codes]
        designs.append(Design.from_arrays(y, X, [(codes, Z)]))
    fits = jax.jit(jax.vmap(estimate))(stack(designs))
    assert (np.asarray(fits.status) == Status.CONVERGED).all()

    @jax.jit
    def value_and_gradient(root, design):
        point = expand_chart(root, design, reml=True)
        return point.value, point.gradient

    def flat(root, design):
        value, gradient = value_and_gradient(root, design)
        return float(value), np.asarray(gradient)

    for k in range(0, 300, 6):
        starts = [np.eye(q).ravel(), *rng.normal(size=(2, q * q))]
        best = min(
            minimize(flat, start, args=(designs[k],), jac=True, method="L-BFGS-B").fun
            for start in starts
        )
        assert float(fits.criterion[k]) <= best + 1e-6


def test_singular_fits_of_three_effects():
    """Singular is what has a pivot of zero, in any unit of the effects; the parameters that are
    free are as many as the matrices of that rank have, with standard errors given the others."""
    rng = np.random.default_rng(3)
    codes, q = np.repeat(np.arange(15), 8), 3
    Z = np.column_stack([np.ones(120), rng.normal(size=(120, 2))])
    unit = np.array([1.0, 3.3, 0.7])
    ranks = []
    for k in range(30):
        loadings = rng.normal(size=(q, 1 + k % 3)) * 0.6
        modes = rng.normal(size=(15, 1 + k % 3)) @ loadings.T
        y = np.sum(modes[codes] * Z, axis=1) + rng.normal(size=120)
        designs = (Design.from_arrays(y, own, [(codes, own)]) for own in (Z, Z * unit))
        (fit, _), (other, _) = (estimate_on_host(design) for design in designs)
        assert int(fit.status) == int(other.status) == Status.CONVERGED
        rank = int((fit.theta[np.array([0, 3, 5])] > 0).sum())
        assert bool(fit.is_singular) == bool(other.is_singular) == (rank < q)
        free = np.isfinite(np.asarray(fit.parameters[:-1]))
        assert free.sum() == q * rank - rank * (rank - 1) // 2
        assert np.isinf(fit.parameters[3:6]).sum() == q - rank
        errors = np.sqrt(np.diagonal(fit.parameters_vcov))
        if np.nanmin(np.diagonal(fit.hessian)) < FLAT:  # z of a correlation next to 1 is not known
            assert np.isnan(errors).all()
            continue
        np.testing.assert_array_equal(np.isfinite(errors[:-1]), free)
        np.testing.assert_allclose(errors, np.sqrt(np.diagonal(other.parameters_vcov)), rtol=1e-8)
        if rank not in ranks:  # one of each rank by an independent route
            free = np.append(free, True)
            params = np.nan_to_num(np.asarray(fit.parameters), posinf=20.0, neginf=-20.0)

            def value(some, params=params, free=free, y=y):
                moved = params.copy()
                moved[free] = some
                return independent.neg2_loglik(moved, y, Z, [(codes, Z)], reml=True)

            hessian = independent.hessian(value, params[free])
            expected = np.sqrt(np.diagonal(2 * np.linalg.inv(hessian)))
            np.testing.assert_allclose(errors[free], expected, rtol=1e-4)
        ranks.append(rank)
    assert set(ranks) >= {1, 2, 3}
