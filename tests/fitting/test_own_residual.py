"""``residual="own(visit | subject)"`` with a covariance of the user's in `context`: all of a fit
against the family that it is."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError, FormulaError
from jaxreml.covariance import custom

MODEL = "distance ~ age * Sex"


@functools.cache
def children() -> pd.DataFrame:
    data = jaxreml.datasets.load("orthodont")
    return data.drop(data.index[3::12])


def nearness(at, range):
    return jnp.exp(-jnp.abs(at[:, None] - at) / range)


def unequal(at, variances, rho):
    sds = jnp.sqrt(variances)
    return sds[:, None] * sds * rho ** (jnp.abs(at[:, None] - at) / 2)


NEAR = custom(nearness, {"range": 2.0}, {"range": (0.0, np.inf)})
UNEQUAL = custom(unequal, {"variances": np.ones(4), "rho": 0.3}, {"rho": "tanh"})


@functools.cache
def fitted(word: str, own: bool) -> jaxreml.LMMResults:
    if not own:
        return jaxreml.fit(MODEL, children(), residual=f"{word}(age | Subject)")
    context = {"own": {"sp_exp": NEAR, "ar1h": UNEQUAL}[word]}
    return jaxreml.fit(MODEL, children(), residual="own(age | Subject)", context=context)


@pytest.mark.parametrize("word", ["sp_exp", "ar1h"])
def test_equals_the_family(word):
    own, family = fitted(word, True), fitted(word, False)
    assert own.converged and own.engine == "numpy"
    assert own.criterion == pytest.approx(family.criterion, abs=1e-8)
    np.testing.assert_allclose(own.parameters, family.parameters, rtol=1e-6)
    np.testing.assert_allclose(own.parameters_vcov_array, family.parameters_vcov_array, rtol=1e-5)
    np.testing.assert_allclose(own.residual_cov, family.residual_cov, rtol=1e-6)
    for df in ("satterthwaite", "kenward-roger", "kenward-roger-sas"):
        np.testing.assert_allclose(own.coefficients(df), family.coefficients(df), rtol=1e-5)
    rows = children().iloc[:9]
    for form in (None, "~0"):
        pair = [fit.predict(rows, interval="prediction", re_form=form) for fit in (own, family)]
        np.testing.assert_allclose(*pair, rtol=1e-6)
    np.testing.assert_allclose(
        own.residuals("normalized"), family.residuals("normalized"), atol=1e-6
    )
    np.testing.assert_allclose(own.robust("CR2").bse, family.robust("CR2").bse, rtol=1e-6)
    pair = [fit.simulate(2, seed=1) for fit in (own, family)]
    np.testing.assert_allclose(*pair, rtol=1e-6)


def test_parameters_have_the_users_names_and_scales():
    own, family = fitted("sp_exp", True), fitted("sp_exp", False)
    table, other = own.variance_parameters(), family.variance_parameters()
    assert list(table.index) == ["variance|Residual", "range|Residual"]
    sigma = other.loc["sigma"]
    variance = table.loc["variance|Residual"]
    assert variance["estimate"] == pytest.approx(sigma["estimate"] ** 2, rel=1e-6)
    assert variance["std_error"] == pytest.approx(
        2 * sigma["estimate"] * sigma["std_error"], rel=1e-5
    )
    columns = ["estimate", "std_error", "lower", "upper"]
    np.testing.assert_allclose(
        table.loc["range|Residual", columns].astype(float),
        other.loc["range|Residual", columns].astype(float),
        rtol=1e-5,
    )
    text = str(own.summary())
    assert " variance     5.104    0.9475\n range        3.660    1.0153\n" in text
    assert "12     5.104    2.259 0.34 0.58" in text

    unequal = fitted("ar1h", True)
    names = [f"variances[{k}]|Residual" for k in range(4)]
    table = unequal.variance_parameters()
    assert list(table.index) == [*names, "rho|Residual"]
    visits = np.diagonal(fitted("ar1h", False).residual_cov)
    np.testing.assert_allclose(table["estimate"].iloc[:4], visits, rtol=1e-6)
    np.testing.assert_allclose(unequal.variance_components["variance"], visits, rtol=1e-6)
    lines = [line.split() for line in str(unequal.summary()).splitlines()]
    assert ["variances[3]", "4.0697", "1.31320"] in lines


def test_an_interval_has_intervals_inside_it():
    """A range between bounds: the same fit, and Wald intervals that keep to the bounds."""
    between = custom(nearness, {"range": 2.0}, {"range": (1.0, 6.0)})
    fit = jaxreml.fit(MODEL, children(), residual="own(age | Subject)", context={"own": between})
    wanted = fitted("sp_exp", False).variance_parameters().loc["range|Residual"]
    found = fit.variance_parameters().loc["range|Residual"]
    assert found["estimate"] == pytest.approx(wanted["estimate"], rel=1e-5)
    assert found["std_error"] == pytest.approx(wanted["std_error"], rel=1e-5)
    assert 1 < found["lower"] < found["estimate"] < found["upper"] < 6


def test_comparison():
    own = fitted("sp_exp", True)
    wider = jaxreml.fit(MODEL, children(), residual="us(age | Subject)")
    table = jaxreml.compare(own, wider, refit=False)
    assert table["df"].iloc[1] == 8
    table = jaxreml.compare(own, fitted("ar1h", False), refit=False)
    assert "own is no case of ar1h" in table["note"].iloc[1]


def test_saved_fits_need_the_function(tmp_path):
    own = fitted("sp_exp", True)
    own.save(tmp_path / "fit.json")
    with pytest.raises(DataError, match=r"not saved: give it as load\(path, context"):
        jaxreml.load(tmp_path / "fit.json")
    with pytest.raises(DataError, match="another one than that of the fit"):
        jaxreml.load(tmp_path / "fit.json", context={"own": UNEQUAL})
    other = custom(lambda at, range: nearness(at, 2 * range), {"range": 2.0}, {"range": "log"})
    with pytest.raises(DataError, match="another one than that of the fit"):
        jaxreml.load(tmp_path / "fit.json", context={"own": other})
    loaded = jaxreml.load(tmp_path / "fit.json", context={"own": NEAR})
    pd.testing.assert_frame_equal(loaded.variance_parameters(), own.variance_parameters())
    pd.testing.assert_frame_equal(loaded.coefficients(), own.coefficients())


def test_data_by_label():
    """What is known of the visits, in another order, with more of them."""
    table = children().assign(visit="v" + children()["age"].astype(int).astype(str))
    times = pd.Series({"v14": 14.0, "v8": 8.0, "v10": 10.0, "v12": 12.0, "v16": 16.0})
    own = custom(nearness, {"range": 2.0}, {"range": "log"}, data=times)
    fit = jaxreml.fit(MODEL, table, residual="own(visit | Subject)", context={"own": own})
    assert fit.criterion == pytest.approx(fitted("sp_exp", True).criterion, abs=1e-8)
    distances = pd.DataFrame(
        np.abs(np.subtract.outer(times.to_numpy(), times.to_numpy())), times.index, times.index
    )
    own = custom(lambda at, range: jnp.exp(-at / range), {"range": 2.0}, {"range": "log"},
                 data=distances)  # fmt: skip
    fit = jaxreml.fit(MODEL, table, residual="own(visit | Subject)", context={"own": own})
    assert fit.criterion == pytest.approx(fitted("sp_exp", True).criterion, abs=1e-8)
    own = custom(nearness, {"range": 2.0}, {"range": "log"}, data=times.drop("v12"))
    with pytest.raises(DataError, match="no row 'v12'"):
        jaxreml.fit(MODEL, table, residual="own(visit | Subject)", context={"own": own})


def test_one_subject_that_is_everybody():
    """A time series, against its definition."""
    rng = np.random.default_rng(0)
    n = 25
    y = np.convolve(rng.normal(size=n + 9), 0.8 ** np.arange(10), "valid")
    series = pd.DataFrame({"y": y, "t": np.arange(n), "all": 1})
    fit = jaxreml.fit("y ~ 1", series, residual="own(t | all)", context={"own": NEAR})
    _, length = fit.variance_parameters()["estimate"]
    V = fit.sigma**2 * np.exp(-np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / length)
    inverse = np.linalg.inv(V)
    r = y - inverse.sum(axis=0) @ y / inverse.sum()
    criterion = (n - 1) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + np.log(inverse.sum())
    assert fit.criterion == pytest.approx(criterion + r @ inverse @ r, abs=1e-8)
    assert "25 values of t: see residual_cov" in str(fit.summary())


@pytest.mark.parametrize(
    ("residual", "context", "message"),
    [
        ("own(age | Subject)", None, "jaxreml.covariance.custom makes one of your own"),
        ("own(age | Subject)", {"own": nearness}, "'own' is no residual covariance"),
        ("cs(age | Subject)", {"cs": NEAR}, "call your own by another name"),
        ("own(age | Sex/Subject)", {"own": NEAR}, "one for all subjects, so far"),
    ],
)
def test_bad_words(residual, context, message):
    with pytest.raises(FormulaError, match=message):
        jaxreml.fit(MODEL, children(), residual=residual, context=context)


def test_a_function_that_is_no_covariance():
    bad = custom(lambda at, variance: variance * jnp.eye(3), {"variance": 1.0})
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        jaxreml.fit(MODEL, children(), residual="bad(age | Subject)", context={"bad": bad})


@pytest.mark.parametrize("word", ["sp_exp", "ar1h"])
def test_many_responses(word):
    """In a batch: what `fit_many` makes of the family."""
    noise = np.random.default_rng(0).normal(size=(len(children()), 3))
    responses = children()[["distance"]].to_numpy() + noise * [0, 1, 2]
    own = {"sp_exp": NEAR, "ar1h": UNEQUAL}[word]
    given = "~ age * Sex", children(), responses
    found = jaxreml.fit_many(*given, residual="own(age | Subject)", context={"own": own})
    wanted = jaxreml.fit_many(*given, residual=f"{word}(age | Subject)")
    np.testing.assert_allclose(found.fits.parameters, wanted.fits.parameters, rtol=1e-6)
    np.testing.assert_allclose(found.fits.parameters_se, wanted.fits.parameters_se, rtol=1e-5)
    np.testing.assert_allclose(found.pvalues, wanted.pvalues, rtol=1e-5)
    np.testing.assert_allclose(found.variances, wanted.variances, rtol=1e-6)


def test_bootstrap_is_that_of_the_family():
    own, family = (fitted("sp_exp", own).bootstrap(39, seed=1).conf_int() for own in (True, False))
    rows = ["beta[age]", "range[Residual]"]
    ends = ["lower", "upper"]
    np.testing.assert_allclose(
        own.loc[rows, ends].astype(float), family.loc[rows, ends].astype(float), rtol=1e-4
    )
