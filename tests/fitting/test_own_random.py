"""``own(time | g)`` with a covariance of the user's in `context`: all of a fit against the family
that it is."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError, FormulaError
from jaxreml.covariance import custom

TIMES = np.array([0.0, 1.0, 2.5, 4.0])
LEVELS = list("dcba")  # not in the order of the times


@functools.cache
def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    groups, repeats = 20, 2
    lags = np.abs(np.subtract.outer(TIMES, TIMES))
    effects = rng.multivariate_normal(np.zeros(4), 2 * np.exp(-lags / 3), size=groups)
    g = np.repeat(np.arange(groups), 4 * repeats)[:-5]
    k = np.tile(np.repeat(np.arange(4), repeats), groups)[:-5]
    x = rng.normal(size=g.size)
    y = 1 + 0.3 * x + effects[g, k] + rng.normal(size=g.size)
    return pd.DataFrame({"y": y, "x": x, "g": g, "t": TIMES[k], "f": np.array(LEVELS)[k]})


def nearness(at, range):
    return jnp.exp(-jnp.abs(at[:, None] - at) / range)


def scaled(at, variance, range):
    return variance * nearness(at, range)


def matern(at, variance, range):
    x = jnp.abs(at[:, None] - at) / range
    return variance * (1 + x) * jnp.exp(-x)


MATERN = custom(matern, {"variance": 1.0, "range": 1.0}, {"range": "log"})
NEAR = custom(nearness, {"range": 1.0}, {"range": "log"})
SCALED = custom(
    scaled,
    {"variance": 2.0, "range": 1.0},
    {"range": (0.0, np.inf)},
    data=pd.Series(TIMES, LEVELS),
)


@functools.cache
def fitted(term: str) -> jaxreml.LMMResults:
    context = {"near": NEAR, "scaled": SCALED, "matern": MATERN}
    return jaxreml.fit(f"y ~ x + {term}", table(), context=context)


@pytest.mark.parametrize(
    "term", ["near(t | g)", "scaled(f | g)", "scaled(0 + f | g)", "matern(t | g)"]
)
def test_equals_the_family(term):
    own, family = fitted(term), fitted("mat(t | g)" if term[:3] == "mat" else "ou(t | g)")
    assert own.converged and own.engine == "numpy"
    assert own.criterion == pytest.approx(family.criterion, abs=1e-8)
    np.testing.assert_allclose(own.parameters, family.parameters, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(own.parameters_vcov_array, family.parameters_vcov_array, rtol=1e-5)
    for df in ("satterthwaite", "kenward-roger", "kenward-roger-sas"):
        np.testing.assert_allclose(own.coefficients(df), family.coefficients(df), rtol=1e-5)
    rows = table().iloc[[0, 5, 9]]
    pair = [fit.predict(rows, interval="prediction") for fit in (own, family)]
    np.testing.assert_allclose(*pair, rtol=1e-6)
    pair = [fit.simulate(2, seed=1) for fit in (own, family)]
    if term == "near(t | g)":  # effects in the same order
        np.testing.assert_allclose(*pair, rtol=1e-6)
        first, second = (fit.random_effects["g"] for fit in (own, family))
        pd.testing.assert_frame_equal(first, second, rtol=1e-6)


def test_parameters_have_the_users_names_and_scales():
    table, other = (fitted(term).variance_parameters() for term in ("near(t | g)", "ou(t | g)"))
    assert list(table.index) == ["variance|g", "range|g", "sigma"]
    columns = ["estimate", "std_error", "lower", "upper"]
    wanted = other.loc[["range|g", "sigma"], columns].astype(float)
    np.testing.assert_allclose(table.loc[["range|g", "sigma"], columns], wanted, rtol=1e-5)
    sd, error = other.iloc[0][["estimate", "std_error"]].astype(float)
    variance = table.iloc[0]
    assert variance["estimate"] == pytest.approx(sd**2, rel=1e-6)
    assert variance["std_error"] == pytest.approx(2 * sd * error, rel=1e-5)


def test_summary_and_components():
    own, family = fitted("near(t | g)"), fitted("ou(t | g)")
    pd.testing.assert_frame_equal(own.variance_components, family.variance_components, rtol=1e-6)
    variance, length, _ = own.variance_parameters()["estimate"]
    assert f" g, near; variance {variance:.4g}, range {length:.4g}" in str(own.summary())


def test_what_else_follows():
    own, family = fitted("near(t | g)"), fitted("ou(t | g)")
    quarters = table()["g"] % 4
    first, second = (fit.influence(by=quarters) for fit in (own, family))
    np.testing.assert_allclose(first.params, second.params, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(first.parameters, second.parameters, rtol=1e-3, atol=1e-5)
    assert list(own.ranova().index) == ["<none>", "near(t | g)"]
    np.testing.assert_allclose(own.ranova().to_numpy(), family.ranova().to_numpy(), rtol=1e-5)
    wider = jaxreml.fit("y ~ x + (0 + f | g)", table())
    assert jaxreml.compare(own, wider, refit=False)["df"].iloc[1] == 8
    with pytest.raises(DataError, match="cannot fit many responses"):
        responses = table()[["y"]].to_numpy()
        jaxreml.fit_many("~ x + near(t | g)", table(), responses, context={"near": NEAR})


def test_profile_is_in_the_parameters():
    first, second = ["variance|g", "range|g"], ["sd_0..4|g", "range|g"]
    own = fitted("near(t | g)").profile(first).conf_int()
    family = fitted("ou(t | g)").profile(second).conf_int()
    ends = ["lower", "upper"]
    own, family = own[ends].to_numpy(float), family[ends].to_numpy(float)
    np.testing.assert_allclose(own[0], family[0] ** 2, rtol=1e-4)
    np.testing.assert_allclose(own[1:], family[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("term", ["near(t | g)", "scaled(f | g)"])
def test_saved_fits_need_the_function(tmp_path, data, term):
    own, path = fitted(term), tmp_path / "fit.json"
    own.save(path, data=data)
    with pytest.raises(DataError, match=r"not saved: give it as load\(path, context"):
        jaxreml.load(path)
    others = {
        "near": custom(lambda at, range: nearness(at, 2 * range), {"range": 1.0}, {"range": "log"}),
        "scaled": custom(scaled, {"variance": 2.0, "range": 1.0}, {"range": "log"}),
    }
    with pytest.raises(DataError, match="another one than that of the fit"):
        jaxreml.load(path, context=others)
    loaded = jaxreml.load(path, context={"near": NEAR, "scaled": SCALED})
    pd.testing.assert_frame_equal(loaded.variance_parameters(), own.variance_parameters())
    rows = table().iloc[[0, 5]]
    np.testing.assert_allclose(loaded.predict(rows), own.predict(rows))


def test_intercept_and_slope():
    """Columns of a formula: compound symmetry of the two is a member of any covariance."""

    def alike(at, variance, rho):
        return variance * jnp.where(jnp.eye(2) > 0, 1.0, rho)

    context = {"alike": custom(alike, {"variance": 1.0, "rho": 0.0}, {"rho": "tanh"})}
    own = jaxreml.fit("y ~ x + alike(1 + x | g)", table(), context=context)
    wider = jaxreml.fit("y ~ x + (1 + x | g)", table())
    assert own.random_effects["g"].columns.tolist() == ["(Intercept)", "x"]
    assert own.criterion > wider.criterion
    matrix = own.cov_re.to_numpy()
    assert matrix[0, 0] == pytest.approx(matrix[1, 1], rel=1e-12)


def test_one_level_against_its_definition():
    near = TIMES.searchsorted(table()["t"])
    data = table().assign(y=table()["y"] + np.array([2.0, 1.0, -2.0, 0.5])[near])
    mean = np.ones((len(data), 1))
    fit = jaxreml.fit("y ~ 1 + near(t | all)", data.assign(all="a"), context={"near": NEAR})
    variance, length, sigma = fit.variance_parameters()["estimate"]
    Z = np.eye(4)[near]
    V = variance * Z @ np.exp(-np.abs(np.subtract.outer(TIMES, TIMES)) / length) @ Z.T
    V += sigma**2 * np.eye(len(V))
    inverse = np.linalg.inv(V)
    M = (mean.T @ inverse @ mean)[0, 0]
    r = data["y"].to_numpy() - (mean.T @ inverse @ data["y"].to_numpy()) / M
    logs = np.linalg.slogdet(V)[1] + np.log(M)
    criterion = (len(V) - 1) * np.log(2 * np.pi) + logs + r @ inverse @ r
    assert fit.criterion == pytest.approx(criterion, abs=1e-7)


@pytest.mark.parametrize(
    ("term", "context", "error", "message"),
    [
        ("own(t | g)", {}, FormulaError, "'own' is no covariance of random effects"),
        ("ou(t | g)", {"ou": NEAR}, FormulaError, "call your own by another name"),
        ("near(t | g, hom=True)", {"near": NEAR}, FormulaError, "takes no options"),
        ("wrong(t | g)", {"wrong": custom(lambda at, range: jnp.eye(3) * range, {"range": 1.0},
         {"range": "log"})}, ValueError, r"shape \(4, 4\)"),
        ("other(f | g)", {"other": custom(nearness, {"range": 1.0}, {"range": "log"},
         data=pd.Series(TIMES, list("dcbx")))}, DataError, "no row 'a'"),
    ],
)  # fmt: skip
def test_bad_terms(term, context, error, message):
    with pytest.raises(error, match=message):
        jaxreml.fit(f"y ~ x + {term}", table(), context=context)
