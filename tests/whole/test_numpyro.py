"""`jaxreml.numpyro`: densities and draws against the dense normal distribution."""

from __future__ import annotations

import builtins
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxreml
from jaxreml import DataError
from jaxreml.inference.resampling.priors import log_prior

numpyro = pytest.importorskip("numpyro")
import numpyro.distributions as dist  # noqa: E402
from numpyro.infer import MCMC, NUTS  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from jaxreml.numpyro import MixedNormal, draw_effects, variances  # noqa: E402

SLEEP = jaxreml.datasets.load("sleepstudy")[:60].assign(w=np.tile([1.0, 2.0], 30))
Y, DAYS = SLEEP["Reaction"].to_numpy(), SLEEP["Days"].to_numpy(float)
SUBJECTS = np.repeat(np.arange(6), 10)
X = np.column_stack([np.ones(60), DAYS])
KIN = 0.4 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
TERM = jaxreml.Term(SUBJECTS, X, "Subject", ("(Intercept)", "Days"))
OTHER = jaxreml.Term(np.tile(np.arange(10), 6), name="Day")
OWN = jaxreml.Term(SUBJECTS, X, "Subject", covariance="homcs")
CHOLESKY = "cholesky[Subject, (Intercept), Days]"
L = np.array([[25.0, 0.0], [2.0, 5.0]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def dense(factors=(L, 4.0), sigma=22.0, weights=None, kernel=None):
    """V of the two terms."""
    between = (np.eye(6) if kernel is None else kernel)[np.ix_(SUBJECTS, SUBJECTS)]
    V = between * (X @ factors[0] @ factors[0].T @ X.T)
    if len(factors) > 1:
        V = V + factors[1] ** 2 * np.equal.outer(OTHER.group, OTHER.group)
    return V + sigma**2 * np.diag(1 / (np.ones(60) if weights is None else weights))


CASES = {
    "grouped": ([TERM], [L], {}),
    "weighted": ([TERM], [L], {"weights": SLEEP["w"].to_numpy()}),
    "crossed": ([TERM, OTHER], [L, 4.0], {}),
    "dense": ([TERM, OTHER], [L, 4.0], {"structure": "dense"}),
    "kernel": ([jaxreml.Term(SUBJECTS, X, "Subject", kernel=KIN)], [L], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_density_is_that_of_the_dense_normal(case):
    terms, factors, options = CASES[case]
    V = dense(factors, weights=options.get("weights"), kernel=terms[0].kernel)
    loc = 250 + 8 * np.sqrt(DAYS)
    expected = stats.multivariate_normal(loc, V).logpdf(Y)
    own = MixedNormal(loc, terms, factors, 22.0, **options)
    assert own.event_shape == (60,) and own.batch_shape == ()
    found = jax.jit(lambda: own.log_prob(Y))()
    assert float(found) == pytest.approx(expected, rel=1e-12)
    # with a flat prior of the coefficients: integrated over them, by the precision of these
    inverse = np.linalg.inv(V)
    gram = X.T @ inverse @ X
    beta = np.linalg.solve(gram, X.T @ inverse @ (Y - loc))
    at_mode = stats.multivariate_normal(loc + X @ beta, V).logpdf(Y)
    expected = at_mode + np.log(2 * np.pi) - np.linalg.slogdet(gram)[1] / 2
    flat = MixedNormal(loc, terms, factors, 22.0, X=X, **options)
    found = jax.jit(lambda: flat.log_prob(Y))()
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_gradients_are_those_of_differences():
    """In the mean, the columns of random effects, factors, sigma and a kernel, all sampled."""
    lags = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))

    def density(p):
        columns = jnp.column_stack([jnp.ones(60), DAYS ** p["power"]])
        term = jaxreml.Term(SUBJECTS, columns, "Subject", kernel=p["share"] ** lags)
        return MixedNormal(250 + p["slope"] * DAYS, term, p["L"], p["sigma"]).log_prob(Y)

    p = {"share": 0.4, "power": 0.9, "slope": 10.0, "L": jnp.array(L), "sigma": 22.0}
    p = jax.tree.map(jnp.asarray, p)
    both = jax.jit(jax.value_and_grad(density))
    slopes = both(p)[1]
    alone = [(name, ()) for name in ("share", "power", "slope", "sigma")]
    for name, where in (*alone, ("L", (1, 0)), ("L", (0, 0))):
        h = 1e-4
        up, down = (both(p | {name: p[name].at[where].add(step)})[0] for step in (h, -h))
        assert float(slopes[name][where]) == pytest.approx(float(up - down) / (2 * h), rel=1e-6)


def test_batches_and_plates_are_a_loop():
    sigmas = np.array([15.0, 22.0, 40.0])
    ys = np.stack([Y, Y[::-1], Y + DAYS])
    one = jax.jit(lambda y, sigma: MixedNormal(260.0, TERM, L, sigma).log_prob(y))
    own = MixedNormal(260.0, TERM, L, sigmas)
    assert own.batch_shape == (3,)
    alone = [one(y, s) for s, y in zip(sigmas, ys, strict=True)]
    np.testing.assert_allclose(jax.jit(own.log_prob)(ys), alone, rtol=1e-12)
    drawn = jax.jit(lambda key: own.sample(key, (2,)))(jax.random.key(0))
    assert drawn.shape == (2, 3, 60)

    def model():
        with numpyro.plate("studies", 3):
            numpyro.sample("y", MixedNormal(260.0, TERM, L, 22.0), obs=ys)

    value = jax.jit(lambda: log_density(model, (), {}, {})[0])()
    assert float(value) == pytest.approx(float(sum(one(y, 22.0) for y in ys)), rel=1e-12)


@pytest.mark.parametrize("case", ["weighted", "kernel"])
def test_draws_have_the_covariance_of_the_dense_normal(case):
    terms, factors, options = CASES[case]
    V = dense(factors, weights=options.get("weights"), kernel=terms[0].kernel)
    own = MixedNormal(250.0, terms, factors, 22.0, **options)
    drawn = np.asarray(jax.jit(lambda key: own.sample(key, (4000,)))(jax.random.PRNGKey(1)))
    scale = np.sqrt(np.diagonal(V))
    assert (np.abs(drawn.mean(axis=0) - 250) < 5 * scale / np.sqrt(4000)).all()
    np.testing.assert_allclose(
        np.cov(drawn.T / scale[:, None]), V / np.outer(scale, scale), atol=0.1
    )
    # effects given a response: mean and covariance of the conditional normal distribution
    keys = jax.random.split(jax.random.key(2), 4000)
    effects = jax.jit(jax.vmap(lambda key: own.effects(key, Y)))(keys)
    assert effects.beta.shape == (4000, 0)
    between = L @ L.T
    kernel = np.eye(6) if case == "weighted" else KIN
    cross = kernel[:, SUBJECTS][:, None] * (between @ X.T)  # (level, effect, row)
    cross = cross.reshape(12, 60)
    inverse = np.linalg.inv(V)
    mean, found = cross @ inverse @ (Y - 250), np.asarray(effects.random[0]).reshape(4000, 12)
    C = np.kron(kernel, between) - cross @ inverse @ cross.T
    sds = np.sqrt(np.diagonal(C))
    assert (np.abs(found.mean(axis=0) - mean) < 5 * sds / np.sqrt(4000)).all()
    np.testing.assert_allclose(np.cov(found.T / sds[:, None]), C / np.outer(sds, sds), atol=0.1)


def model(y, priors=None):
    factors, sigma = variances(TERM, np.std(Y), priors)
    numpyro.sample("y", MixedNormal(0.0, TERM, factors, sigma, X=X), obs=y)


def test_model_has_the_density_of_fit_posterior():
    """Up to a constant, in the coordinates of the sampler: at points, not by draws."""
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP)
    priors = {"Subject, Days": dist.HalfNormal(10.0), "Residual": dist.Exponential(0.05)}

    def restricted(at):
        return jaxreml.reml_objective(at, fit.design)

    def both(at, given):
        r = jnp.tanh(at[2])
        sites = {
            "sd[Subject, (Intercept)]": jnp.exp(at[0] / 2),
            "sd[Subject, Days]": jnp.exp(at[1] / 2),
            "sigma": jnp.exp(at[3] / 2),
            CHOLESKY: jnp.array([[1, 0], [r, jnp.sqrt(1 - r**2)]]),
        }
        value, _ = log_density(model, (Y, given), {}, sites)
        jacobian = jnp.sum(at[jnp.array([0, 1, 3])]) / 2 + jnp.log(1 - r**2)
        return value + jacobian, log_prior(fit, given)(at) - restricted(at) / 2

    for given in (None, priors | {"correlation": 3.0}):
        of = jax.jit(lambda at, given=given: both(at, given))
        points = jnp.array([[6.0, 3.0, 0.4, 6.0], [5.0, 4.0, -0.9, 6.5]])
        (found, expected), (moved, other) = (of(at) for at in points)
        assert float(moved - found) == pytest.approx(float(other - expected), rel=1e-9)


def sampled(draws, warmup):
    mcmc = MCMC(NUTS(model), num_warmup=warmup, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    return mcmc.get_samples()


def compare(samples, drawn, names):
    """Means within Monte Carlo error, of as many effective draws as a third of them."""
    for name in names:
        own, other = samples[name], drawn.variables[name]
        error = np.sqrt(np.var(own) / (len(own) / 3) + np.var(other) / (other.size / 3))
        assert float(np.mean(own)) == pytest.approx(float(np.mean(other)), abs=4 * error)


def test_effects_of_posterior_draws():
    """At one point many times: their moments are those of the fit there."""
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP)
    sds, root = fit.cov_re_arrays[0].diagonal() ** 0.5, np.linalg.cholesky(fit.cov_re_arrays[0])
    samples = {
        "sd[Subject, (Intercept)]": np.full(800, sds[0]),
        "sd[Subject, Days]": np.full(800, sds[1]),
        "sigma": np.full(800, fit.sigma),
        CHOLESKY: np.tile(root / sds[:, None], (800, 1, 1)),
    }
    drawn = draw_effects(model, samples, jax.random.key(1), Y)["y"]
    assert drawn.beta.shape == (800, 2) and drawn.random[0].shape == (800, 6, 2)
    error = np.sqrt(800)
    assert (np.abs(drawn.beta.mean(axis=0) - fit.beta) < 5 * fit.bse / error).all()
    np.testing.assert_allclose(drawn.beta.std(axis=0), fit.bse, rtol=0.12)
    spread = np.std(drawn.random[0], axis=0)  # that of b - b_hat, fixed effects not known
    off = np.abs(drawn.random[0].mean(axis=0) - fit.groupings[0].modes)
    assert (off < 5 * spread / error).all()
    assert (spread > 0.9 * fit.random_effects_se["Subject"].to_numpy()).all()
    with pytest.raises(DataError, match="no observed site"):
        draw_effects(lambda y: None, samples, jax.random.key(0), Y)


@pytest.mark.long
def test_nuts_agrees_with_fit_posterior():
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP)
    drawn = fit.posterior(draws=4000, chains=2, seed=3)
    names = ["sigma", "sd[Subject, (Intercept)]", "sd[Subject, Days]"]
    compare(sampled(8000, 1000), drawn, [*names, "correlation[Subject, (Intercept), Days]"])


def test_what_does_not_fit_is_refused():
    for arguments, options, error, match in (
        ((0.0, TERM, [L, 4.0], 2.0), {}, ValueError, "2 factors for 1 terms, Subject"),
        ((0.0, TERM, 3.0, 2.0), {}, ValueError, r"Subject must have shape \(..., 2, 2\)"),
        ((Y[:3], TERM, L, 2.0), {}, ValueError, r"shape \(..., 60\), not \(3,\)"),
        ((0.0, TERM, L, 2.0), {"X": X[:5]}, DataError, r"X must have shape \(60, p\)"),
        ((0.0, TERM, L, 2.0), {"weights": -Y}, DataError, "weights must be positive"),
        ((0.0, [], [], 2.0), {}, DataError, "at least one random term"),
        (
            (0.0, jaxreml.Term(SUBJECTS, X, "g", covariance="homcs"), L, 2.0),
            {},
            DataError,
            "say all",
        ),
    ):
        with pytest.raises(error, match=match):
            MixedNormal(*arguments, **options)
    with pytest.raises(ValueError, match="flat prior"):
        MixedNormal(0.0, TERM, L, 2.0, X=X).sample(jax.random.key(0))
    with numpyro.handlers.seed(rng_seed=0):
        with pytest.raises(
            DataError, match="has 'days'; the model has Residual, Subject, Subject, "
        ):
            variances(TERM, 1.0, {"days": dist.HalfNormal()})
        with pytest.raises(ValueError, match="must be a distribution of numpyro's of one number"):
            variances(TERM, 1.0, {"Subject": lambda sd: -sd})
    with jax.enable_x64(False), pytest.raises(jaxreml.PrecisionError, match="need float64"):
        MixedNormal(0.0, TERM, L, 2.0).log_prob(Y)


def test_without_numpyro(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **named):
        if name.split(".")[0] == "numpyro":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "jaxreml.numpyro")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'jaxreml\[bayes\]'"):
        importlib.import_module("jaxreml.numpyro")
