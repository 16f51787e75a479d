"""Penalised fits: blme's, the mode of a density by brute force, derivatives, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from references import HERE

import jaxreml
from jaxreml.errors import DataError
from jaxreml.penalties import Gamma, Wishart

BLME = json.loads((HERE / "penalties" / "blme.json").read_text())["fits"]
PENALTIES = {
    "gamma by default": "gamma",
    "gamma by default, ML": "gamma",
    "Wishart of one effect": "wishart",
    "Wishart of two effects": "wishart",
    "Wishart with a scale": Wishart(df=5, scale=((2.0, 0.1), (0.1, 0.5))),
    "gamma of the SD": Gamma(shape=2, rate=0.5),
    "gamma of the variance": Gamma(shape=2, rate=0.5, on="variance"),
    "gamma in the response's units": Gamma(shape=3, rate=0.1, common_scale=False),
    "one of two factors": {"batch": "gamma"},
    "both of two factors": "wishart",
}
SLEEP = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="module")
def sleepstudy():
    return jaxreml.datasets.load("sleepstudy")


@pytest.fixture(scope="module")
def penalised(sleepstudy):
    return jaxreml.fit(SLEEP, sleepstudy, penalty="wishart")


def total(fit):
    return fit.criterion + fit.penalty_value


@pytest.mark.parametrize("case", BLME, ids=lambda case: case["name"])
def test_blme(case):
    data = jaxreml.datasets.load(case["data"])
    fit = jaxreml.fit(case["formula"], data, case["method"], penalty=PENALTIES[case["name"]])
    assert fit.converged
    assert not fit.is_singular
    np.testing.assert_allclose(fit.criterion, case["criterion"], rtol=2e-7)
    np.testing.assert_allclose(fit.params, np.atleast_1d(case["beta"]), rtol=1e-6)
    np.testing.assert_allclose(fit.bse, np.atleast_1d(case["se"]), rtol=1e-5)
    variances = [v for v, second in zip(case["vcov"], case["second"], strict=True) if not second]
    np.testing.assert_allclose(fit.variances, variances, rtol=1e-4)
    if not isinstance(PENALTIES[case["name"]], Wishart | Gamma):  # without constants
        assert fit.penalty_value == pytest.approx(case["prior_deviance"], abs=1e-4)


@pytest.mark.parametrize(
    ("penalty", "method"),
    [
        ("wishart", "ML"),
        (Wishart(df=6, scale=30.0, common_scale=False), "REML"),
        (lambda p: -jnp.sum((p - 4) ** 2), "REML"),
    ],
    ids=["relative", "absolute", "function"],
)
def test_is_the_mode(sleepstudy, penalty, method):
    """The objective with the penalty has its minimum at the estimates: gradient zero, Hessian as
    reported, standard errors from its inverse."""
    fit = jaxreml.fit(SLEEP, sleepstudy, method, penalty=penalty)
    assert fit.converged
    with jax.enable_x64(True):
        design = jaxreml.design(SLEEP, sleepstudy)
        objective = jaxreml.reml_objective if method == "REML" else jaxreml.ml_objective

        def own(parameters):
            return objective(parameters, design, penalty=penalty)

        @jax.jit
        def derivatives(parameters):
            gradient = jax.grad(own)
            return own(parameters), gradient(parameters), jax.jacfwd(gradient)(parameters)

        value, slope, hessian = derivatives(jnp.array(fit.parameters))
    assert float(value) == pytest.approx(total(fit), rel=1e-10)
    assert np.abs(slope).max() < 1e-6
    np.testing.assert_allclose(fit.hessian, hessian, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fit.parameters_vcov(), 2 * np.linalg.inv(hessian), rtol=1e-5)
    # SEs of fixed effects are at the variances given; their degrees of freedom are of these SEs
    assert (fit.df_satterthwaite > 1).all()


def test_other_covariances():
    """Densities of matrices with fewer parameters, by a search without derivatives."""
    machines = jaxreml.datasets.load("machines")
    for word in ("ar1", "homcs", "diag"):
        formula = f"score ~ Machine + {word}(0 + Machine | Worker)"
        fit = jaxreml.fit(formula, machines, penalty=Wishart(df=6, scale=3.0))
        with jax.enable_x64(True):
            design = jaxreml.design(formula, machines)
            value = jax.jit(
                lambda p, design=design: jaxreml.reml_objective(
                    p, design, penalty=Wishart(df=6, scale=3.0)
                )
            )
            found = scipy.optimize.minimize(
                lambda p, value=value: float(value(jnp.array(p))),
                fit.parameters + 0.3,
                method="Nelder-Mead",
                options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 4000, "maxfev": 4000},
            )
        assert fit.converged
        assert total(fit) == pytest.approx(found.fun, abs=1e-6)
        np.testing.assert_allclose(fit.parameters, found.x, atol=1e-3)


def test_boundary():
    """What does not keep off the boundary leaves variances at zero, and those that do move."""
    data = jaxreml.datasets.load("dyestuff2")
    formula = "Yield ~ 1 + (1 | Batch)"
    plain = jaxreml.fit(formula, data)
    assert plain.is_singular
    of_residual = jaxreml.fit(formula, data, penalty=lambda p: -((p[1] - 2) ** 2))
    assert of_residual.is_singular
    assert of_residual.converged
    assert of_residual.parameters[0] == -np.inf
    # one parameter: n - 1 degrees of freedom and the sum of squares
    n, rss = len(data), plain.sigma**2 * (len(data) - 1)
    best = scipy.optimize.brentq(lambda s: n - 1 - rss * np.exp(-s) + 4 * (s - 2), 0, 6)
    assert of_residual.parameters[1] == pytest.approx(best, abs=1e-8)
    curvature = rss * np.exp(-best) + 4
    assert of_residual.log_variance_se.iloc[-1] == pytest.approx(np.sqrt(2 / curvature), rel=1e-6)
    assert not jaxreml.fit(formula, data, penalty="gamma").is_singular


def test_engines_agree_and_derivatives(sleepstudy, penalised):
    """By JAX as by NumPy; derivatives in the response and in what a function refers to."""
    y = sleepstudy["Reaction"].to_numpy()
    X = np.column_stack([np.ones(180), sleepstudy["Days"]])
    subject = sleepstudy["Subject"]

    def estimate(y, centre):
        design = jaxreml.Design.from_arrays(y, X, [(subject, X)])

        def density(p):
            return -((p[0] - centre) ** 2) - 0.75 * p[1]

        found = jaxreml.estimate(design, penalty=density)
        return jnp.concatenate([found.parameters, found.beta, found.log_variance_se])

    with jax.enable_x64(True):

        @jax.jit
        def both(y, centre, way):  # forward mode in the centre, reverse mode in the response
            found, back = jax.vjp(lambda y: estimate(y, centre), y)
            _, in_centre = jax.jvp(lambda c: estimate(y, c), (centre,), (1.0,))
            return found, jax.vmap(back)(jnp.eye(len(found)))[0] @ way, in_centre

        way = np.random.default_rng(1).normal(size=180)
        centre = jnp.array(6.0)
        found, in_y, in_centre = both(jnp.array(y), centre, jnp.array(way))

    def by_numpy(y, centre):
        table = sleepstudy.assign(Reaction=y)
        fit = jaxreml.fit(SLEEP, table, penalty=lambda p: -((p[0] - centre) ** 2) - 0.75 * p[1])
        return np.concatenate([fit.parameters, fit.params, fit.log_variance_se])

    np.testing.assert_allclose(found, by_numpy(y, 6.0), rtol=1e-7, atol=1e-9)
    h = 1e-3
    rise = (by_numpy(y + h * way, 6.0) - by_numpy(y - h * way, 6.0)) / (2 * h)
    np.testing.assert_allclose(in_y, rise, rtol=1e-5, atol=1e-7)
    by_centre = (by_numpy(y, 6.0 + h) - by_numpy(y, 6.0 - h)) / (2 * h)
    np.testing.assert_allclose(in_centre, by_centre, rtol=1e-5, atol=1e-7)

    with jax.enable_x64(True):
        design = jaxreml.design(SLEEP, sleepstudy)
        by_lbfgs = jaxreml.optimise(design, penalty="wishart")
    np.testing.assert_allclose(by_lbfgs.parameters, penalised.parameters, atol=1e-5)
    np.testing.assert_allclose(by_lbfgs.criterion, penalised.criterion, rtol=1e-8)
    np.testing.assert_allclose(by_lbfgs.log_variance_se, penalised.log_variance_se, rtol=1e-5)


def test_reported(penalised, tmp_path):
    text = penalised.summary()
    assert "Penalty:  Subject: Wishart(df=4.5) of the covariance matrix" in text
    assert penalised.llf == pytest.approx(-penalised.criterion / 2)
    penalised.save(tmp_path / "fit.json")
    assert jaxreml.load(tmp_path / "fit.json").summary() == text


def test_refusals_of_what_needs_the_likelihood(penalised):
    for call in (
        penalised.profile,
        penalised.ranova,
        penalised.step,
        penalised.influence,
        lambda: penalised.bootstrap(nsim=10),
        lambda: penalised.summary(df="kenward-roger"),
        lambda: penalised.conf_int(method="profile"),
        lambda: jaxreml.compare(penalised, penalised),
        penalised.posterior,
    ):
        with pytest.raises(DataError, match="the fit has a penalty"):
            call()


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        ("gamma", "Subject has 2 effects"),
        ({"subject": "wishart"}, "penalty has 'subject'; the random terms are of Subject"),
        (Wishart(df=3), "more than 3 keep it off"),
        (Wishart(scale=((1, 2), (2, 1))), "not positive definite"),
        (Wishart(scale=((1, 2, 3),)), "a number or 2 x 2"),
        (lambda p: p, "must give one number"),
        (lambda p: jnp.log(p[0] - 1e3), "where the search starts, at parameters 6.42"),
    ],
)
def test_wrong_penalties(sleepstudy, penalty, message):
    with pytest.raises(DataError, match=message):
        jaxreml.fit(SLEEP, sleepstudy, penalty=penalty)


def test_no_penalty_at_all(sleepstudy):
    with pytest.raises(ValueError, match="got 'normal'"):
        jaxreml.fit(SLEEP, sleepstudy, penalty="normal")
    with pytest.raises(DataError, match="shape 1"):
        jaxreml.fit("Reaction ~ 1 + (1 | Subject)", sleepstudy, penalty=Gamma(shape=1))
    with pytest.raises(ValueError, match="penalty is for a design"):
        jaxreml.optimise(lambda p: p @ p, jnp.ones(2), penalty="wishart")


@pytest.mark.long
@pytest.mark.optimised
def test_mapped(sleepstudy):
    """`vmap` against one after the other, strengths of the penalty of their own."""
    X = np.column_stack([np.ones(180), sleepstudy["Days"]])
    terms = [(sleepstudy["Subject"], X)]
    fit = jaxreml.fit(SLEEP, sleepstudy)
    responses = fit.simulate(6, seed=3).to_numpy().T
    strengths = np.linspace(0.2, 3, 6)

    def estimate(y, strength):
        design = jaxreml.Design.from_arrays(y, X, terms)
        return jaxreml.estimate(design, penalty=lambda p: strength * (p[0] - p[1] / 2))

    with jax.enable_x64(True):
        many = jax.jit(jax.vmap(estimate))(jnp.array(responses), jnp.array(strengths))
    for k, (y, strength) in enumerate(zip(responses, strengths, strict=True)):
        alone = jaxreml.fit(
            SLEEP,
            sleepstudy.assign(Reaction=y),
            penalty=lambda p, strength=strength: strength * (p[0] - p[1] / 2),
        )
        assert alone.converged == (many.status[k] == 0)
        np.testing.assert_allclose(many.parameters[k], alone.parameters, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(many.criterion[k], alone.criterion, rtol=1e-9)
