"""Float32 where it was asked for: how near to float64 it stays, and that no fit claims an optimum that
it has not found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml import (
    Design,
    PrecisionError,
    Status,
    Term,
    estimate,
    ml_objective,
    reml_objective,
    stack,
)

CLAIM = 0.01  # of a standard error, as benchmarks/single_precision.py has it


def rows(seed: int, n: int = 60, levels: int = 8, spread: float = 1.0):
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(levels), rng.choice(levels - 2, n - levels)])
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    y = X @ [3.0, 1.0] + spread * rng.normal(size=levels)[codes] + rng.normal(size=n)
    return y, X, codes


def roots(matrix):
    return np.sqrt(np.diagonal(np.asarray(matrix, float), axis1=-2, axis2=-1))


@pytest.mark.optimised
def test_fits_in_float32_are_those_in_float64():
    """In all units, with and without variance of the groups."""
    spreads = [0.0, 0.05, 0.3, 1.0, 10.0] * 8
    designs: dict[str, list[Design]] = {"float32": [], "float64": []}
    for k, spread in enumerate(spreads):
        y, X, codes = rows(k, spread=spread)
        scale = 10.0 ** (k % 13 - 6) * (0.242 if k % 2 else 1.0)  # 0.242: the criterion is near 0
        for dtype, made in designs.items():
            made.append(Design.from_arrays(scale * y, X, [codes], dtype=dtype))
    fit = jax.jit(jax.vmap(estimate))
    single, double = (fit(stack(made)) for made in designs.values())
    assert single.beta.dtype == np.float32
    assert (np.asarray(single.status) == Status.CONVERGED).all()
    assert (np.asarray(double.status) == Status.CONVERGED).all()
    np.testing.assert_array_equal(single.is_singular, double.is_singular)
    free = ~np.asarray(double.is_singular)
    assert 0 < free.sum() < free.size
    se = roots(double.parameters_vcov)
    apart = (np.asarray(single.parameters, float) - double.parameters)[free] / se[free]
    assert np.abs(apart).max() < CLAIM / 50
    of_beta = (np.asarray(single.beta, float) - double.beta) / roots(double.vcov)
    assert np.abs(of_beta).max() < CLAIM / 50
    np.testing.assert_allclose(roots(single.parameters_vcov)[free], se[free], rtol=5e-3)


def test_rows_are_reduced_in_float64_where_that_can_be():
    """A mean of 1,000 SDs and a column of years leave no digits of squares in float32."""
    y, X, codes = rows(0)
    late = X * [1, 5] + [0, 2015]
    double = Design.from_arrays(y + 1e3, late, [codes])
    single = Design.from_arrays(y + 1e3, late, [codes], dtype="float32")

    def traced(y):
        return Design.from_arrays(y, late, [codes], dtype="float32")

    for made in (single, jax.jit(traced)(y + 1e3)):
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(double), strict=True):
            one, other = np.asarray(one), np.asarray(other)
            assert one.dtype == (np.float32 if other.dtype == np.float64 else other.dtype)
            size = max(np.abs(other).max(), 1.0)
            np.testing.assert_allclose(one, other, rtol=3e-7, atol=3e-7 * size)


def test_traced_rows_with_float64_switched_off():
    """Rows of a network's last layer: the loss to rounding, its gradient to 1e-5 SE, in levels in
    which effects tie too."""
    y, X, codes = rows(1)
    effects = np.column_stack([np.ones(60), np.where(codes < 3, 0.7, X[:, 1])])
    at = np.array([0.2, -0.5, 0.3, 0.1])

    def loss(at, y, X, effects, dtype):
        made = Design.from_arrays(y, X, Term(codes, effects), dtype=dtype)
        return ml_objective(at, made)

    slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=4)
    value, (of_at, of_y) = slopes(at, y, X, effects, "float64")
    with jax.enable_x64(False):
        arrays = [np.asarray(own, np.float32) for own in (at, y, X, effects)]
        single, (in_at, in_y) = slopes(*arrays, "float32")
    assert single.dtype == in_y.dtype == np.float32
    assert float(single) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(in_at, of_at, atol=1e-4)
    np.testing.assert_allclose(in_y, of_y, atol=1e-5)


@pytest.mark.parametrize("structure", [None, "dense"])
def test_products_keep_the_digits_of_float32(structure):
    """In derivatives too, which are traced outside: an H100 rounds factors to 10 bits otherwise,
    and `estimate` claimed optima more than 0.01 SE away."""
    y, X, codes = rows(2)

    def loss(at, y, X, weights):
        terms = Term(codes, X, n_levels=8)
        made = Design.from_arrays(
            y, X, terms, weights=weights, structure=structure, dtype="float32"
        )
        return reml_objective(at, made) + estimate(made).sigma

    with jax.enable_x64(False), jax.default_matmul_precision("bfloat16"):
        slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        text = slopes.lower(np.zeros(4, np.float32), y, X, np.ones(60)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20
    assert all("[HIGHEST, HIGHEST]" in line for line in products)


def test_what_single_precision_hides_is_told():
    """A response of which residuals are rounding error claims no optimum."""
    y, X, codes = rows(3)
    found = estimate(Design.from_arrays(y + 1e6, X, [codes], dtype="float32"))
    assert int(found.status) == Status.PERFECT_FIT
    sums = jnp.zeros((3, 1, 1)) + 20.0
    far = Design.from_moments(
        sums, sums, 1e4 * sums[:, 0], 60 * jnp.ones((1, 1)), jnp.ones(1) * 6e5, 6.00006e9, 60,
        dtype="float32",
    )  # fmt: skip
    assert int(far.trouble) in (Status.CONVERGED, Status.ILL_CONDITIONED)


class TestRefused:
    """Before any compute, with the line to run."""

    y, X, codes = rows(4)

    def made(self, **given):
        arrays = {"y": self.y, "X": self.X, "terms": [self.codes]} | given
        return Design.from_arrays(**arrays)

    @pytest.mark.parametrize("asked", ["float16", "int32", "no such type"])
    def test_other_types(self, asked):
        with pytest.raises(PrecisionError, match=f"float32 or float64, not '?{asked}"):
            self.made(dtype=asked)

    @pytest.mark.parametrize("asked", [None, "float64"])
    def test_traced_values_with_float64_switched_off(self, asked):
        with jax.enable_x64(False):
            for value in (self.y, self.y.astype(int)):
                with pytest.raises(PrecisionError, match="jax_enable_x64"):
                    jax.jit(lambda y: self.made(y=y, dtype=asked).n)(value)
            with pytest.raises(PrecisionError, match="jax_enable_x64"):
                jax.jit(lambda Z: self.made(terms=[(self.codes, Z)], dtype=asked).n)(self.X)

    def test_labels_in_single_precision_are_labels(self):
        with jax.enable_x64(False):
            assert self.made(terms=[self.codes.astype(np.float32)]).dtype == "float64"
