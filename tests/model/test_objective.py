"""The objectives: values and derivatives against NumPy, invariances, compilation, bad arguments."""

from __future__ import annotations

import dataclasses

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreml
from jaxreml import Design, Term, ml_objective, reml_objective
from jaxreml.model.objective import expand, neg2_loglik, profiled

OBJECTIVES = {True: reml_objective, False: ml_objective}
PARAMS = np.array([0.3, -0.4, 0.6, 0.1])


@pytest.fixture(scope="module")
def arrays():
    return independent.simulate(3)


def design_of(arrays, **options) -> Design:
    y, X, codes, Z = arrays
    return Design.from_arrays(y, X, [Term(codes, Z, "g", ("(Intercept)", "x"))], **options)


@pytest.mark.parametrize("structure", ["grouped", "dense"])
@pytest.mark.parametrize("reml", [True, False])
def test_value_gradient_hessian_equal_numpy(arrays, structure, reml):
    y, X, codes, Z = arrays
    weights = np.random.default_rng(0).uniform(0.5, 2, y.size)
    design = design_of(arrays, structure=structure, weights=weights)

    def numpy_value(params):
        return independent.neg2_loglik(params, y, X, [(codes, Z)], reml=reml, weights=weights)

    objective = OBJECTIVES[reml]
    assert float(objective(PARAMS, design)) == pytest.approx(numpy_value(PARAMS), rel=1e-12)
    gradient = jax.jit(jax.grad(objective))(PARAMS, design)
    np.testing.assert_allclose(gradient, independent.gradient(numpy_value, PARAMS), atol=1e-6)
    hessian = jax.jit(jax.hessian(objective))(PARAMS, design)
    expected = independent.hessian(numpy_value, PARAMS)
    np.testing.assert_allclose(hessian, expected, atol=1e-5 * np.abs(expected).max())


def test_several_factors_equal_numpy():
    y, X, codes, Z = independent.simulate(4, q=1)
    other = np.random.default_rng(5).integers(0, 7, y.size)
    design = Design.from_arrays(y, X, [(codes, Z), other])
    params = np.array([0.2, -0.5, 0.3])
    terms = [(codes, Z), (other, np.ones((y.size, 1)))]
    expected = independent.neg2_loglik(params, y, X, terms, reml=True)
    assert float(reml_objective(params, design)) == pytest.approx(expected, rel=1e-12)
    names = design.parameter_names
    assert names == (
        "log_variance[g1, x1]",
        "log_variance[g2, (Intercept)]",
        "log_variance[Residual]",
    )


@pytest.mark.parametrize("structure", ["grouped", "dense"])
@pytest.mark.parametrize("reml", [True, False])
def test_closed_form_derivatives_equal_autodiff(arrays, structure, reml):
    design = design_of(arrays, structure=structure)
    omega = jnp.array([0.7, 0.2, 0.5])
    expansion = jax.jit(expand, static_argnames="reml")(omega, design, reml=reml)

    def value(omega):
        return profiled(omega, design, reml=reml)

    def joint(both):
        return neg2_loglik(both[:-1], both[-1], design, reml=reml)

    both = jnp.append(omega, expansion.log_sigma2)
    gradient, hessian = jax.jit(lambda omega: (jax.grad(value)(omega), jax.hessian(value)(omega)))(
        omega
    )
    np.testing.assert_allclose(expansion.value, value(omega), rtol=1e-13)
    np.testing.assert_allclose(expansion.gradient, gradient, atol=1e-9)
    np.testing.assert_allclose(expansion.hessian, hessian, atol=1e-8)
    joint_hessian = jax.jit(jax.hessian(joint))(both)
    np.testing.assert_allclose(expansion.joint_hessian, joint_hessian, atol=1e-8)


_jitted = jax.jit(reml_objective)


@pytest.fixture
def value():
    return lambda arrays, params=PARAMS: float(_jitted(params, design_of(arrays)))


class TestInvariances:
    """What must not change the likelihood, or must change it by a known constant."""

    def test_row_order(self, arrays, value):
        order = np.random.default_rng(0).permutation(len(arrays[0]))
        shuffled = tuple(array[order] for array in arrays)
        assert value(shuffled) == pytest.approx(value(arrays), rel=1e-13)

    def test_level_names(self, arrays, value):
        y, X, codes, Z = arrays
        names = np.array([f"level {17 * k % 12:02d}" for k in range(12)])
        assert value((y, X, names[codes], Z)) == pytest.approx(value(arrays), rel=1e-13)

    def test_rescaled_response(self, arrays, value):
        y, X, codes, Z = arrays
        params = PARAMS + 2 * np.log(100.0) * np.array([1, 1, 0, 1])
        shift = 2 * (len(y) - X.shape[1]) * np.log(100.0)
        rescaled = value((100 * y, X, codes, Z), params)
        assert rescaled == pytest.approx(value(arrays) + shift, rel=1e-13)

    def test_shifted_response(self, arrays, value):
        y, X, codes, Z = arrays
        assert value((y + 1e6, X, codes, Z)) == pytest.approx(value(arrays), rel=1e-9)

    def test_recombined_fixed_effects(self, arrays, value):
        y, X, codes, Z = arrays
        A = np.array([[2.0, 1.0], [0.5, -3.0]])
        shift = 2 * np.log(abs(np.linalg.det(A)))  # of log|X'V^-1X|
        assert value((y, X @ A, codes, Z)) == pytest.approx(value(arrays) + shift, rel=1e-13)

    def test_rescaled_effect(self, arrays, value):
        y, X, codes, Z = arrays
        params = PARAMS - 2 * np.log(1000.0) * np.array([0, 1, 0, 0])
        rescaled = value((y, X, codes, Z * [1, 1000]), params)
        assert rescaled == pytest.approx(value(arrays), rel=1e-12)


def test_jit_vmap_and_eager_agree(arrays):
    design = design_of(arrays)
    batch = PARAMS + np.random.default_rng(0).normal(size=(5, 4)) / 3
    together = jax.jit(jax.vmap(reml_objective, (0, None)))(batch, design)
    apart = [float(reml_objective(params, design)) for params in batch]
    np.testing.assert_allclose(together, apart, rtol=1e-13)


def test_data_sets_of_one_shape_share_one_compilation(arrays):
    traces = []

    @jax.jit
    def objective(params, design):
        traces.append(1)
        return reml_objective(params, design)

    first = objective(PARAMS, design_of(arrays))
    second = objective(PARAMS, design_of(independent.simulate(9)))
    assert len(traces) == 1
    assert first != second


def test_zero_variance_is_a_value_like_any_other(arrays):
    y, X, codes, _ = arrays
    design = Design.from_arrays(y, X, [codes])
    at_zero = float(reml_objective(np.array([-np.inf, 0.2]), design))
    assert at_zero == pytest.approx(float(reml_objective(np.array([-60.0, 0.2]), design)))


def test_extreme_variance_ratio_keeps_its_digits(arrays):
    y, X, codes, Z = arrays
    design = design_of(arrays)
    for log_ratio in (-20.0, 20.0):
        params = np.array([log_ratio, log_ratio, 0.3, 0.0])
        expected = independent.neg2_loglik(params, y, X, [(codes, Z)], reml=True)
        assert float(reml_objective(params, design)) == pytest.approx(expected, rel=1e-7)


def test_wrong_number_of_params_names_them(arrays):
    with pytest.raises(ValueError, match=r"shape \(4,\).*log_variance\[g, x\].*got shape \(3,\)"):
        reml_objective(np.zeros(3), design_of(arrays))


def test_float32_is_refused_with_the_line_to_run(arrays):
    y, X, codes, _ = arrays
    design = design_of(arrays)
    with jax.enable_x64(False):
        with pytest.raises(jaxreml.PrecisionError, match="jax_enable_x64"):
            reml_objective(PARAMS, design)
        with pytest.raises(jaxreml.PrecisionError, match="jax_enable_x64"):
            jax.jit(reml_objective)(PARAMS, design)
        with pytest.raises(jaxreml.PrecisionError, match="jax_enable_x64"):
            Design.from_arrays(jnp.asarray(y), X, [codes])
        single = Design.from_arrays(y, X, [codes], dtype="float32")
        value = reml_objective(np.zeros(2, np.float32), single)
        assert value.dtype == np.float32
    double = Design.from_arrays(y, X, [codes])
    assert float(value) == pytest.approx(float(reml_objective(np.zeros(2), double)), rel=1e-4)


def test_designs_hold_cross_products_only(arrays):
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(design_of(arrays))]
    assert max(sizes) < len(arrays[0])
    assert dataclasses.is_dataclass(design_of(arrays))
