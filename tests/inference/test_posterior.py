"""Posterior draws against integration on a grid, which knows nothing of the sampler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxreml
from jaxreml import DataError
from jaxreml.inference.resampling.priors import log_prior

DYESTUFF = jaxreml.datasets.load("dyestuff")


@pytest.fixture(scope="module")
def fit():
    return jaxreml.fit("Yield ~ 1 + (1 | Batch)", DYESTUFF)


@pytest.fixture(scope="module")
def drawn(fit):
    return fit.posterior(draws=1500, warmup=500, chains=2, seed=4, random_effects=True)


@pytest.fixture(scope="module")
def grid(fit):
    """Weights on a grid of log-variances, with the dense normal distribution at each point: of y
    with the mean integrated out, of the mean, and of the effect of the first batch."""
    y = DYESTUFF["Yield"].to_numpy(float)
    same = np.equal.outer(*2 * [DYESTUFF["Batch"].to_numpy()]).astype(float)
    scale = 2.5 * y.std()
    logs = np.linspace(-1.0, 14.0, 90), np.linspace(6.0, 10.0, 60)
    points = np.stack(np.meshgrid(*logs, indexing="ij"), -1).reshape(-1, 2)
    found = []
    for between, within in points:
        V = np.exp(between) * same + np.exp(within) * np.eye(len(y))
        inverse = np.linalg.inv(V)
        precision = inverse.sum()
        mean = inverse.sum(axis=0) @ y / precision
        rest = inverse @ (y - mean)
        log = -(np.linalg.slogdet(V)[1] + np.log(precision) + (y - mean) @ rest) / 2
        for of in (between, within):
            log += stats.t.logpdf(np.exp(of / 2) / scale, 3) + of / 2
        found.append((log, mean, 1 / precision, np.exp(between) * same[0] @ rest))
    log, mean, variance, effect = np.array(found).T
    weights = np.exp(log - log.max())
    return points, weights / weights.sum(), mean, variance, effect


def test_draws_have_the_moments_of_the_grid(drawn, grid):
    points, weights, mean, variance, effect = grid
    names = "sd[Batch, (Intercept)]", "sigma", "beta[(Intercept)]"
    sizes = drawn.diagnostics["ess_bulk"]
    assert (drawn.diagnostics["r_hat"] < 1.02).all()
    sds = np.exp(points / 2)
    expected = [weights @ sds[:, 0], weights @ sds[:, 1], weights @ mean]
    spreads = [np.sqrt(weights @ sds[:, k] ** 2 - expected[k] ** 2) for k in range(2)] + [
        np.sqrt(weights @ (variance + mean**2) - expected[2] ** 2)
    ]
    for name, centre, spread in zip(names, expected, spreads, strict=True):
        draws = drawn.variables[name]
        assert draws.mean() == pytest.approx(centre, abs=5 * spread / np.sqrt(sizes[name]))
        assert draws.std() == pytest.approx(spread, rel=0.2)
    own = drawn.effects[0][..., 0, 0]
    assert own.mean() == pytest.approx(weights @ effect, abs=5 * own.std() / np.sqrt(own.size / 4))


def test_tail_probabilities_are_those_of_the_grid(drawn, grid):
    points, weights, *_ = grid
    sds = np.exp(points[:, 0] / 2)
    for limit in (20.0, 40.0, 80.0):
        share = weights[sds < limit].sum()
        found = (drawn.variables["sd[Batch, (Intercept)]"] < limit).mean()
        error = np.sqrt(share * (1 - share) / drawn.diagnostics["ess_tail"].min())
        assert found == pytest.approx(share, abs=5 * error + 0.01)


def test_effects_given_the_variances_have_the_covariance_of_henderson(fit):
    """Beta and modes of many draws at one point: their joint covariance by dense algebra."""
    from jaxreml.inference.resampling.posterior import _effects

    at = np.tile(fit.parameters, (1, 2000, 1))
    beta, effects, theta, sigma = _effects(fit, at, np.random.default_rng(0), wanted=True)
    np.testing.assert_allclose(theta[0, 0], fit.theta, rtol=1e-10)
    np.testing.assert_allclose(sigma[0], fit.sigma)
    joint = np.concatenate([beta[0], effects[0][0, :, :, 0]], axis=1)
    Z = np.eye(6)[np.unique(DYESTUFF["Batch"], return_inverse=True)[1]]
    W = np.column_stack([np.ones(len(Z)), Z])
    between, within = np.exp(fit.parameters)
    C = np.linalg.inv(W.T @ W / within + np.diag([0.0] + [1 / between] * 6))
    expected = C @ W.T @ DYESTUFF["Yield"] / within
    errors = np.sqrt(np.diagonal(C) / len(joint))
    assert (np.abs(joint.mean(axis=0) - expected) < 5 * errors).all()
    np.testing.assert_allclose(np.cov(joint.T), C, atol=0.15 * C.max())


def test_repeatable_and_in_arvizs_form(fit, drawn):
    arviz = pytest.importorskip("arviz")
    data = drawn.to_inference_data()
    assert data.posterior["effects[Batch]"].dims[2:] == ("Batch level", "Batch effect")
    table = drawn.summary(prob=0.9)
    assert list(table.columns[:5]) == ["mean", "sd", "median", "lower", "upper"]
    expected = arviz.summary(data, var_names=["sigma"], round_to="none")
    assert table.loc["sigma", "ess_bulk"] == pytest.approx(expected.loc["sigma", "ess_bulk"])
    assert "2 chains of 1500 draws" in repr(drawn)
    with pytest.raises(ValueError, match="prob"):
        drawn.summary(prob=1)


def test_default_densities_integrate_with_their_change_of_variables():
    """Of two effects: half-t SDs and a uniform correlation, in coordinates."""
    sleep = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", sleep)
    slope = 2.5 * sleep["Reaction"].std(ddof=0) / np.sqrt(np.mean(sleep["Days"] ** 2))
    with jax.enable_x64(True):
        density = log_prior(fit, None)
        twice = log_prior(fit, {"correlation": 2.0, "Subject, Days": lambda sd: -sd})
        at, moved = jnp.array([6.0, 3.0, 0.4, 6.0]), jnp.array([6.0, 5.0, -0.9, 6.0])
        change = float(density(moved) - density(at))
        other = float(twice(moved) - twice(at))
    sds = np.exp(np.array([3.0, 5.0]) / 2)
    of_z = -2 * np.log(np.cosh([0.4, -0.9]))
    expected = np.diff(stats.t.logpdf(sds / slope, 3) + np.log(sds) + of_z)[0]
    assert change == pytest.approx(expected)
    assert other == pytest.approx(np.diff(-sds + np.log(sds) + 2 * of_z)[0])


def test_priors_that_do_not_fit_are_refused(fit):
    for priors, error, match in (
        ({"batch": lambda sd: sd}, DataError, "has 'batch'; the model has Batch"),
        ({"Batch": 3.0}, ValueError, "must be a JAX function"),
        ({"correlation": -1.0}, ValueError, "positive number"),
        ([1, 2], ValueError, "must be a dict"),
        ({"Batch": lambda sd: jnp.log(-sd)}, DataError, "must be a finite number"),
    ):
        with pytest.raises(error, match=match):
            fit.posterior(priors)
    with pytest.raises(ValueError, match="draws must be"):
        fit.posterior(draws=0)
