"""`jaxreml.effects`: the solution of Henderson's equations, what `fit` reports, its derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from independent import covariance_matrix
from scipy.linalg import block_diag

import jaxreml
from jaxreml import Design, Term

RNG = np.random.default_rng(8)
N = 60
GROUP, OTHER = RNG.integers(0, 9, N), RNG.integers(0, 5, N)
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
Z = np.column_stack([np.ones(N), 3 + 100 * RNG.normal(size=N)])
Y = 1e4 + RNG.normal(size=9)[GROUP] + RNG.normal(size=5)[OTHER] + RNG.normal(size=N)
WEIGHTS = RNG.uniform(0.5, 2, N)
KERNEL = 0.5 * np.eye(9) + 0.5
ONE = np.ones((N, 1))
# Terms, parameters, structure, and (codes, effects, K) of each
SLOPES = [Term(GROUP, Z, n_levels=10)], [0.3, -8.0, 0.4, 0.2], [(GROUP, Z, np.eye(10))]
CROSSED = (
    [Term(GROUP), Term(OTHER)],
    [0.3, -0.5, 0.2],
    [(GROUP, ONE, np.eye(9)), (OTHER, ONE, np.eye(5))],
)
OF_KERNEL = [Term(GROUP, kernel=KERNEL)], [0.3, 0.2], [(GROUP, ONE, KERNEL)]
DESIGNS = {
    "grouped": (*SLOPES, None),
    "dense": (*CROSSED, "dense"),
    "crossed": (*CROSSED, None),
    "kernel": (*OF_KERNEL, None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def henderson(parameters, y, X, terms) -> tuple[np.ndarray, list[np.ndarray]]:
    """The mixed model equations in full, prior weights `WEIGHTS`."""
    R = np.exp(-parameters[-1]) * WEIGHTS
    columns, inverses, start = [X], [], 0
    for codes, effects, K in terms:
        q, levels = effects.shape[1], len(K)
        stop = start + q * (q + 1) // 2
        G = covariance_matrix(np.exp(parameters[start : start + q]), parameters[start + q : stop])
        columns += [(codes == level)[:, None] * effects for level in range(levels)]
        inverses.append(np.linalg.inv(np.kron(K, G)))
        start = stop
    W = np.hstack(columns)
    p = X.shape[1]
    left = W.T @ (R[:, None] * W) + block_diag(np.zeros((p, p)), *inverses)
    found = np.linalg.solve(left, W.T @ (R * y))
    sizes = [own.shape[1] * len(K) for _, own, K in terms]
    parts = np.split(found[p:], np.cumsum(sizes)[:-1])
    return found[:p], [
        part.reshape(len(own[2]), -1) for part, own in zip(parts, terms, strict=True)
    ]


@pytest.mark.parametrize("kind", DESIGNS)
def test_they_solve_hendersons_equations(kind):
    terms, parameters, plain, structure = DESIGNS[kind]
    design = Design.from_arrays(Y, X, terms, weights=WEIGHTS, structure=structure)
    assert type(design.structure).__name__.lower() == kind
    found = jaxreml.effects(np.array(parameters), design)
    beta, random = henderson(np.array(parameters), Y, X, plain)
    np.testing.assert_allclose(found.fixed, beta, rtol=1e-9)
    for own, expected in zip(found.random, random, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-8 * np.abs(expected).max())


FITS = {
    "slopes": ("Reaction ~ Days + (Days | Subject)", None),
    "singular": ("Reaction ~ Days + (Days | Subject) + (1 | none)", None),
    "residuals": ("Reaction ~ Days + (1 | Subject)", "ar1(Days | Subject)"),
}


@pytest.mark.parametrize("kind", FITS)
def test_they_are_those_of_a_fit(kind):
    data = jaxreml.datasets.load("sleepstudy")
    data["none"] = np.arange(180) % 7
    formula, residual = FITS[kind]
    fit = jaxreml.fit(formula, data, residual=residual)
    assert fit.is_singular == (kind == "singular")
    found = jaxreml.effects(fit.parameters, fit.design)
    np.testing.assert_allclose(found.fixed, fit.params, rtol=1e-9)
    reported = fit.random_effects
    for own, expected in zip(found.random, reported.values(), strict=True):
        np.testing.assert_allclose(own[: len(expected)], expected, atol=1e-6)


def summary(own: dict) -> jax.Array:
    term = Term(own["codes"], own["effects"], n_levels=9)
    design = Design.from_arrays(own["y"], own["X"], term, weights=own["weights"])
    beta, (modes,) = jaxreml.effects(own["parameters"], design)
    return jnp.sum(jnp.sin(modes * jnp.array([1.0, 50.0]))) + beta[0] / 1e3 + beta[1] ** 2


AT = {
    "codes": GROUP,
    "effects": Z,
    "y": Y,
    "X": X,
    "weights": WEIGHTS,
    "parameters": np.array([0.3, -8.0, 0.4, 0.2]),
}


def test_derivatives_equal_differences_and_vmap_a_loop():
    inexact = {name: value for name, value in AT.items() if name != "codes"}
    of = jax.jit(jax.vmap(jax.value_and_grad(lambda own: summary({"codes": GROUP, **own}))))
    way = {name: RNG.normal(size=np.shape(value)) for name, value in inexact.items()}
    way["X"][:, 0] = 0.0
    step = {"effects": 1e-3, "y": 1e-3, "X": 1e-5, "weights": 1e-5, "parameters": 1e-5}

    def moved(name: str, by: float) -> dict:
        return {**inexact, name: inexact[name] + by * step[name] * way[name]}

    lanes = [moved(name, by) for name in way for by in (-1.0, 1.0)] + [inexact]
    values, slopes = of(jax.tree.map(lambda *own: jnp.stack(own), *lanes))
    for k, name in enumerate(way):
        difference = (values[2 * k + 1] - values[2 * k]) / (2 * step[name])
        derivative = np.sum(np.asarray(slopes[name][-1]) * way[name])
        assert abs(derivative) > 1e-4
        assert float(difference) == pytest.approx(derivative, rel=1e-5), name
    design = Design.from_arrays(Y, X, Term(GROUP, Z), weights=WEIGHTS)
    beta, (modes,) = jaxreml.effects(AT["parameters"], design)
    alone = np.sum(np.sin(np.asarray(modes) * [1, 50])) + beta[0] / 1e3 + beta[1] ** 2
    assert float(values[-1]) == pytest.approx(float(alone), rel=1e-10)


def test_trouble_is_nan_or_named():
    run = jax.jit(lambda y, codes: jaxreml.effects(
        jnp.array([0.3, 0.2]), Design.from_arrays(y, X, Term(codes, n_levels=9))
    ))  # fmt: skip
    for y, codes in ((np.append(np.nan, Y[1:]), GROUP), (Y, np.append(9, GROUP[1:]))):
        found = run(y, codes)
        assert np.isnan(found.fixed).all() and np.isnan(found.random[0]).all()
    assert np.isfinite(run(Y, GROUP).random[0]).all()
    with pytest.raises(ValueError, match=r"must have shape \(2,\)"):
        jaxreml.effects(np.zeros(3), Design.from_arrays(Y, X, [GROUP]))
