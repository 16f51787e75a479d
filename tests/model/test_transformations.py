"""JAX's other transformations, of an objective and of `estimate`, give what plain `jit` gives."""

from __future__ import annotations

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxreml import DataError, Design, Status, Term, estimate, reml_objective

RNG = np.random.default_rng(0)
N, LEVELS = 40, 6
CODES = np.concatenate([np.arange(LEVELS), RNG.integers(0, LEVELS, N - LEVELS)])
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
Y = X @ [1.0, 0.5] + RNG.normal(size=LEVELS)[CODES] + RNG.normal(size=N)
AT = np.array([0.2, -0.1])


def design(y, codes):
    return Design.from_arrays(y, X, Term(codes, n_levels=LEVELS))


def value(y, codes):
    return reml_objective(AT, design(y, codes))


def fitted(y, codes):
    found = estimate(design(y, codes))
    return {"parameters": found.parameters, "beta": found.beta, "status": found.status}


ARGUMENTS = Y, CODES
FUNCTIONS = {"objective": value, "estimate": fitted}


@pytest.fixture(scope="module")
def known():
    with jax.enable_x64(True):
        return {name: jax.jit(function)(Y, CODES) for name, function in FUNCTIONS.items()}


def assert_same(found, expected, **tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported_to_bytes_and_back(name, known):
    exported = export.export(jax.jit(FUNCTIONS[name]))(*ARGUMENTS)
    if importlib.util.find_spec("flatbuffers"):  # which `serialize` needs
        exported = export.deserialize(exported.serialize())
    assert_same(exported.call(*ARGUMENTS), known[name])


def test_an_exported_objective_of_a_designs_arrays():
    """A design is no type that can be exported by bytes; its leaves are arrays."""
    own = design(Y, CODES)
    leaves, form = jax.tree.flatten(own)

    def of_leaves(parameters, leaves):
        return reml_objective(parameters, jax.tree.unflatten(form, leaves))

    exported = export.export(jax.jit(of_leaves))(jnp.asarray(AT), leaves)
    if importlib.util.find_spec("flatbuffers"):
        exported = export.deserialize(exported.serialize())
    assert_same(exported.call(AT, leaves), reml_objective(AT, own))


@pytest.mark.parametrize(
    "name",
    ["objective", pytest.param("estimate", marks=pytest.mark.long)],  # two gradients of fits
)
def test_checkpoint_has_the_same_derivatives(name):
    def of(function):
        def scalar(y, codes):
            return jnp.sum(
                jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(function(y, codes))])
            )

        return jax.jit(jax.grad(scalar))

    function = FUNCTIONS[name]
    plain = of(function)(*ARGUMENTS)
    assert np.abs(plain).max() > 0
    assert_same(of(jax.checkpoint(function))(*ARGUMENTS), plain, rtol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_donated_arguments(name, known):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no result has their shapes, so that none is used
        found = jax.jit(FUNCTIONS[name], donate_argnums=0)(jnp.array(Y), ARGUMENTS[1])
    assert_same(found, known[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_debug_nans_finds_none_inside(name, known):
    """Where the result has none: those on the way are masked."""
    with jax.debug_nans(True), jax.debug_infs(True):
        assert_same(jax.jit(FUNCTIONS[name])(*ARGUMENTS), known[name])


def test_debug_nans_names_what_is_not_finite():
    """JAX runs the function again without `jit`, where the values are known."""
    broken = np.where(np.arange(N) == 0, np.nan, Y)
    with jax.debug_nans(True), pytest.raises(DataError, match="y contains NaN"):
        jax.jit(value)(broken, CODES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_disable_jit(name, known):
    with jax.disable_jit():
        assert_same(FUNCTIONS[name](*ARGUMENTS), known[name], rtol=1e-9)
    assert known["estimate"]["status"] == Status.CONVERGED
