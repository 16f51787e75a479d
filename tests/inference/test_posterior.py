"""Posterior draws against integration on a grid, which knows nothing of the sampler."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import jaxreml
from jaxreml import DataError
from jaxreml.inference.resampling.priors import log_prior

DYESTUFF = jaxreml.datasets.load("dyestuff")
CHILDREN = jaxreml.datasets.load("orthodont")[:64].assign(w=np.tile([1.0, 2.0], 32))
KIN = 0.3 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))


@pytest.fixture(scope="module")
def fit():
    return jaxreml.fit("Yield ~ 1 + (1 | Batch)", DYESTUFF)


@pytest.fixture(scope="module")
def drawn(fit):
    shown = io.StringIO()
    with redirect_stderr(shown):
        found = fit.posterior(
            draws=1500, warmup=500, chains=2, seed=4, random_effects=True, progress=True
        )
    assert "4000/4000" in shown.getvalue()
    return found


@pytest.fixture(scope="module")
def grid():
    same = np.equal.outer(*2 * [DYESTUFF["Batch"].to_numpy()]).astype(float)
    return on_grid(lambda at: np.exp(at[0]) * same + np.exp(at[1]) * np.eye(len(same)), same)


def on_grid(covariance, same):
    """Weights on a grid of log-variances, with the dense normal distribution at each point: of y
    with the mean integrated out, of the mean, and of the effect of the first batch, whose
    covariances with the rows are a row of `same`."""
    y = DYESTUFF["Yield"].to_numpy(float)
    scale = 2.5 * y.std()
    logs = np.linspace(-1.0, 14.0, 90), np.linspace(6.0, 10.0, 60)
    points = np.stack(np.meshgrid(*logs, indexing="ij"), -1).reshape(-1, 2)
    found = []
    for at in points:
        V = covariance(at)
        inverse = np.linalg.inv(V)
        precision = inverse.sum()
        mean = inverse.sum(axis=0) @ y / precision
        rest = inverse @ (y - mean)
        log = -(np.linalg.slogdet(V)[1] + np.log(precision) + (y - mean) @ rest) / 2
        for of in at:
            log += stats.t.logpdf(np.exp(of / 2) / scale, 3) + of / 2
        found.append((log, mean, 1 / precision, np.exp(at[0]) * same[0] @ rest))
    log, mean, variance, effect = np.array(found).T
    weights = np.exp(log - log.max())
    return points, weights / weights.sum(), mean, variance, effect


def test_draws_have_the_moments_of_the_grid(drawn, grid):
    require_moments(drawn, grid)


def require_moments(drawn, grid):
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


def drawn_at(fit, count=2000):
    """Fixed and random effects drawn at the estimates, by both routes."""
    from jaxreml.inference.resampling import posterior

    at = np.tile(fit.parameters, (1, count, 1))
    with jax.enable_x64(True):
        beta, effects = posterior._with_effects(jax.random.PRNGKey(0), fit, at)
        design = jax.tree.map(jnp.asarray, fit.design.without_names())
        omega, log_sigma2 = design.units.omega(fit.parameters, design.covariance)
        keys = jax.random.split(jax.random.PRNGKey(1), count)
        draw = jax.jit(jax.vmap(posterior.fixed_effects, (0, None, None, None)))
        alone = draw(keys, omega, np.exp(log_sigma2 / 2), design)
    return np.asarray(beta[0]), [np.asarray(own[0]) for own in effects], np.asarray(alone)


@pytest.mark.parametrize("model", ["independent", "kernel", "residual"])
def test_effects_given_the_variances_have_the_covariance_of_henderson(fit, model):
    """Beta and modes of many draws at one point: their joint covariance by dense algebra."""
    if model == "residual":
        fit = jaxreml.fit(
            "distance ~ age + (1 | Subject)", CHILDREN, residual="ar1(age | Subject)", weights="w"
        )
    elif model == "kernel":
        kernel = pd.DataFrame(KIN, list("ABCDEF"), list("ABCDEF"))
        fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", DYESTUFF, kernels={"Batch": kernel})
    beta, effects, alone = drawn_at(fit)
    joint = np.concatenate([beta, effects[0][:, :, 0]], axis=1)
    term, p = fit.frame.terms[0], beta.shape[1]
    Z = np.eye(len(term.levels))[term.codes]
    R = np.eye(len(Z))
    if model == "residual":
        z = fit.parameters[1]
        lag = np.abs(np.subtract.outer(*2 * [CHILDREN["age"].to_numpy() / 2]))
        R = np.tanh(z) ** lag * (Z @ Z.T) / np.sqrt(np.outer(CHILDREN["w"], CHILDREN["w"]))
    between, within = np.exp(fit.parameters[[0, -1]])
    G = between * (KIN if model == "kernel" else np.eye(len(term.levels)))
    W, inverse = np.column_stack([fit.frame.X, Z]), np.linalg.inv(within * R)
    prior = np.zeros((W.shape[1],) * 2)
    prior[p:, p:] = np.linalg.inv(G)
    C = np.linalg.inv(W.T @ inverse @ W + prior)
    expected = C @ W.T @ inverse @ fit.y
    errors = np.sqrt(np.diagonal(C) / len(joint))
    assert (np.abs(joint.mean(axis=0) - expected) < 5 * errors).all()
    sds = np.sqrt(np.diagonal(C))
    np.testing.assert_allclose(
        np.cov(joint.T) / np.outer(sds, sds), C / np.outer(sds, sds), atol=0.13
    )
    assert (np.abs(alone.mean(axis=0) - expected[:p]) < 5 * errors[:p]).all()
    spread = C[:p, :p] / np.outer(sds[:p], sds[:p])
    np.testing.assert_allclose(np.cov(alone.T) / np.outer(sds[:p], sds[:p]), spread, atol=0.13)


def test_cholesky_factors_of_all_draws_are_those_of_each():
    from jaxreml.inference.resampling.posterior import _factors

    fit = jaxreml.fit("distance ~ age + (age | Subject)", CHILDREN)
    many = fit.parameters + np.random.default_rng(0).normal(size=(5, 4))
    factors = _factors(fit, many)[0]
    for k, at in enumerate(many):
        alone = fit.covariance.blocks[0].factor_at(at[:-1], at[-1])
        np.testing.assert_allclose(factors[..., k], alone, rtol=1e-10, atol=1e-12)


def test_densities_of_other_covariances_are_those_of_dense_algebra():
    """Kernels and residual covariances: the log density that the sampler moves on, up to a
    constant, against the normal distribution of the contrasts of y. Correlations are uniform."""
    from jaxreml.inference.resampling.posterior import _density

    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        for word in ("cs", "ar1h", "us"):
            fit = jaxreml.fit("distance ~ age", CHILDREN, residual=f"{word}(age | Subject)")
            prior = log_prior(fit, {"Residual": lambda sd: -sd})
            density = jax.jit(_density(fit.design.without_names(), prior))
            points = fit.parameters + 0.3 * rng.standard_normal((3, len(fit.parameters)))
            found = [float(density(at)) for at in points]
            expected = [of_visits(word, at) for at in points]
            np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-7)


def of_visits(word, parameters):
    """By dense algebra: visits' SDs exponential, correlations uniform in their range."""
    z, logs = parameters[3:-1], np.append(parameters[-1], parameters[:3])
    if word == "cs":  # one variance; z is half of the logit between -1 / 3 and 1
        z, logs = parameters[:1], parameters[-1:]
        rho = (np.exp(2 * z[0]) - 1) / (np.exp(2 * z[0]) + 3)
        R = rho + (1 - rho) * np.eye(4)
        log_prior = np.log((1 - rho) * (1 + 3 * rho))
    elif word == "ar1h":
        R = np.tanh(z[0]) ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        log_prior = -2 * np.log(np.cosh(z[0]))
    else:  # LKJ's density with eta 1, by its definition
        R = of_partial(z)
        below = np.tril_indices(4, -1)
        steps = 1e-5 * np.eye(len(z))
        slopes = [(of_partial(z + h) - of_partial(z - h))[below] / 2e-5 for h in steps]
        log_prior = np.linalg.slogdet(slopes)[1]
    sds = np.exp(logs / 2) * np.ones(4)
    V = np.kron(np.eye(16), sds[:, None] * R * sds)
    X = np.column_stack([np.ones(64), CHILDREN["age"]])
    inverse = np.linalg.inv(V)
    gram, y = X.T @ inverse @ X, CHILDREN["distance"].to_numpy()
    rest = y - X @ np.linalg.solve(gram, X.T @ inverse @ y)
    value = np.linalg.slogdet(V)[1] + np.linalg.slogdet(gram)[1] + rest @ inverse @ rest
    return log_prior + np.sum(logs / 2 - np.exp(logs / 2)) - value / 2


def of_partial(z):
    """The correlation matrix of four visits from partial correlations tanh z, row by row."""
    L, partial = np.zeros((4, 4)), iter(np.tanh(z))
    for i in range(4):
        rest = 1.0
        for j in range(i):
            L[i, j] = next(partial) * np.sqrt(rest)
            rest -= L[i, j] ** 2
        L[i, i] = np.sqrt(rest)
    return L @ L.T


@pytest.mark.long
def test_draws_with_a_kernel_have_the_moments_of_the_grid():
    kernel = pd.DataFrame(KIN, list("ABCDEF"), list("ABCDEF"))
    fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", DYESTUFF, kernels={"Batch": kernel})
    codes = np.unique(DYESTUFF["Batch"], return_inverse=True)[1]
    same = KIN[np.ix_(codes, codes)]
    grid = on_grid(lambda at: np.exp(at[0]) * same + np.exp(at[1]) * np.eye(30), same)
    drawn = fit.posterior(draws=1500, warmup=500, chains=2, seed=4, random_effects=True)
    require_moments(drawn, grid)


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
    ranges = jaxreml.fit("distance ~ age", CHILDREN, residual="sp_exp(age | Subject)")
    with pytest.raises(DataError, match=r"needs densities of 'z\[Residual, log range\]'"):
        log_prior(ranges, None)
    log_prior(ranges, {"z[Residual, log range]": lambda z: -z * z})


def test_no_sampler_installed(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(DataError, match=r"needs blackjax: pip install 'jaxreml\[bayes\]'"):
        fit.posterior()
