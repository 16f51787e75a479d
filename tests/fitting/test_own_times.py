"""Residuals at times of each subject's own: against nlme and the same model in dense algebra."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from independent import gradient

import jaxreml
from jaxreml.model.structures.chain import Chain
from jaxreml.model.structures.series import Series

HERE = Path(__file__).parents[1] / "reference" / "residuals"
RANDOM = " + (1 | subject)"


@cache
def rows() -> pd.DataFrame:
    data = pd.read_csv(HERE / "own_times.csv.gz")
    return data.assign(w=np.random.default_rng(0).uniform(0.5, 2, len(data)))


@cache
def fitted(family: str, random: str = "", **options) -> jaxreml.LMMResults:
    return jaxreml.fit(f"y ~ x + t{random}", rows(), residual=f"{family}(t | subject)", **options)


# nlme


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("sp_exp", "sp_exp", {}),
        ("sp_gau", "sp_gau", {}),
        ("sp_exp_ml", "sp_exp", {"method": "ML"}),
        ("sp_exp_random", "sp_exp", {"random": RANDOM}),
        ("sp_gau_random", "sp_gau", {"random": RANDOM}),
    ],
)
def test_nlme(name, family, options):
    recorded = json.loads((HERE / "own_times.json").read_text())
    expected, fit = recorded[name], fitted(family, **options)
    assert fit.converged
    assert fit.criterion == pytest.approx(expected["criterion"], abs=1e-5)
    np.testing.assert_allclose(fit.params, expected["beta"], rtol=1e-4)
    inflation = np.sqrt(fit.nobs / (fit.nobs - len(fit.beta))) if fit.method == "ML" else 1.0
    np.testing.assert_allclose(fit.bse * inflation, expected["se"], rtol=1e-3)
    assert fit.sigma == pytest.approx(expected["sigma"], rel=1e-3)
    found = fit.variance_parameters().loc["range|Residual", "estimate"]
    assert found == pytest.approx(expected["range"], rel=1e-3)
    if "random" in options:
        assert fit.variances["subject"].iloc[0] == pytest.approx(expected["random"], rel=2e-3)
    # gls has its rows in the order of the data, lme's are sorted likewise
    own = rows().assign(resid=fit.residuals("normalized")).sort_values(["subject", "t"])
    np.testing.assert_allclose(own["resid"], expected["normalized"], atol=2e-3)
    if name == "sp_exp":  # nlme's continuous-time AR(1) is the same model
        phi = recorded["car1"]
        assert fit.criterion == pytest.approx(phi["criterion"], abs=1e-5)
        assert np.exp(-1 / found) == pytest.approx(phi["range"], rel=1e-3)


# Dense algebra


def correlation(family: str, z: float, times: np.ndarray) -> np.ndarray:
    distances = np.abs(times[:, None] - times)
    if family == "ar1":
        return np.tanh(z) ** distances
    return np.exp(-((distances * np.exp(-z)) ** (2 if family == "sp_gau" else 1)))


def whereabouts(family: str, data: pd.DataFrame) -> np.ndarray:
    """Times, or places among all times."""
    return data["t"].to_numpy() if family != "ar1" else data["t"].rank(method="dense").to_numpy()


def dense(family: str, parameters: np.ndarray, data: pd.DataFrame) -> np.ndarray:
    """V of fits with weights."""
    same = data["subject"].to_numpy(object)[:, None] == data["subject"].to_numpy(object)
    matrix = correlation(family, parameters[-2], whereabouts(family, data))
    root = np.sqrt(data["w"].to_numpy())
    V = np.exp(parameters[-1]) * matrix * same / root[:, None] / root
    return V + np.exp(parameters[0]) * same if len(parameters) > 2 else V


def model(data: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    X = np.column_stack([np.ones(len(data)), data["x"], data["t"]])
    return X, data["y"].to_numpy()


def criterion(family: str, parameters: np.ndarray, data: pd.DataFrame) -> float:
    X, y = model(data)
    V = dense(family, parameters, data)
    inverse = np.linalg.inv(V)
    M = X.T @ inverse @ X
    rest = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
    value = np.linalg.slogdet(V)[1] + np.linalg.slogdet(M)[1] + rest @ inverse @ rest
    return value + (len(y) - 3) * np.log(2 * np.pi)


@pytest.mark.parametrize("family", ["sp_exp", "sp_gau", "ar1"])
@pytest.mark.parametrize("random", ["", RANDOM])
def test_dense_algebra(family, random):
    data, fit = rows(), fitted(family, random, weights="w")
    assert fit.converged
    assert isinstance(fit.design.structure, Series if random or family == "sp_gau" else Chain)
    at, m = fit.parameters, len(fit.parameters)
    assert fit.criterion == pytest.approx(criterion(family, at, data), rel=1e-11)
    free = np.isfinite(at)
    at = np.where(free, at, -20.0)  # a variance of zero

    def value(inside):
        whole = at.copy()
        whole[free] = inside
        return criterion(family, whole, data)

    slope = gradient(value, at[free])
    np.testing.assert_allclose(slope, 0, atol=2e-5)
    own = range(int(free.sum()))
    hessian = np.array(
        [gradient(lambda b, k=k: gradient(value, b)[k], at[free], 1e-3) for k in own]
    )
    expected = 2 * np.linalg.inv((hessian + hessian.T) / 2)
    vcov = np.asarray(fit.parameters_vcov_array)[np.ix_(free, free)]
    np.testing.assert_allclose(np.diagonal(vcov), np.diagonal(expected), rtol=2e-4)
    X, y = model(data)
    V = dense(family, at, data)
    inverse = np.linalg.inv(V)
    phi = np.linalg.inv(X.T @ inverse @ X)
    np.testing.assert_allclose(fit.vcov, phi, rtol=1e-8)
    # Kenward and Roger's adjustment to first order, by definition
    moved = []
    for k in np.flatnonzero(free):
        step = 1e-5 * np.eye(m)[k]
        moved.append((dense(family, at + step, data) - dense(family, at - step, data)) / 2e-5)
    half = inverse @ X
    projector = inverse - half @ phi @ half.T
    information = [[np.sum((projector @ i) * (projector @ j).T) / 2 for j in moved] for i in moved]
    W = np.linalg.inv(information)
    first = [-half.T @ i @ half for i in moved]
    inner = sum(
        W[i, j] * (half.T @ moved[i] @ inverse @ moved[j] @ half - first[i] @ phi @ first[j])
        for i in own
        for j in own
    )
    np.testing.assert_allclose(fit.vcov_kenward_roger, phi + 2 * phi @ inner @ phi, rtol=1e-6)
    along = np.array([np.diagonal(phi @ slope @ phi) for slope in first]) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", W, along, along)
    np.testing.assert_allclose(fit.coefficients("kenward-roger")["df"], degrees, rtol=1e-6)
    degrees = 2 / np.einsum("ij,ik,jk->k", expected, along, along)
    np.testing.assert_allclose(fit.coefficients()["df"], degrees, rtol=1e-3)
    # Normalised residuals are of V without random effects
    beta, alone = np.asarray(fit.params), dense(family, at[-2:], data)
    rest = y - X @ beta
    if not random:
        found = np.asarray(fit.residuals("normalized"))
        assert found @ found == pytest.approx(rest @ np.linalg.solve(alone, rest), rel=1e-8)
    # Predictions of known subjects, at times between and at a row's own, and of a new subject
    new = pd.DataFrame(
        {
            "subject": ["s03", "s03", "s01", "s99"],
            "t": [data["t"].iloc[5] if family == "ar1" else 2.71828, 0.0, 5.0, 1.0],
            "x": [0.3, -0.2, 0.1, 0.4],
        }
    )
    mine = data[data["subject"] == "s03"]
    new.loc[1, "t"] = mine["t"].iloc[0]
    weights = np.array([0.7, 1.3, 1.0, 1.0])
    options = {"allow_new_levels": True} if random else {}
    found = fit.predict(new, interval="prediction", weights=weights, **options)
    both = pd.concat([data, new.assign(w=weights, y=0.0)], ignore_index=True)
    if family == "ar1":  # times that are not known say nothing
        both.loc[len(data) + 2 :, "subject"] = ["new", "new"]
        at_known = both["t"].isin(data["t"])
        both.loc[~at_known, "t"] = data["t"].iloc[0]
        both["t"] = both["t"].where(at_known, data["t"].iloc[0])
    whole = dense(family, at, both)
    n = len(data)
    cross, corner = whole[n:, :n], np.diagonal(whole[n:, n:])
    near = cross @ inverse
    new_X = np.column_stack([np.ones(4), new["x"], new["t"]])
    if family == "ar1":
        cross = cross[:2]
        near, corner, new_X, found = near[:2], corner[:2], new_X[:2], found.iloc[:2]
    mean = new_X @ beta + near @ rest
    variance = corner - np.sum(near * cross, axis=1)
    left = new_X - near @ X
    variance += np.sum(left @ phi * left, axis=1)
    keep = np.ones(len(mean), bool)
    keep[1] = False  # a time with a response: its residual is not predicted
    np.testing.assert_allclose(found["prediction"][keep], mean[keep], rtol=1e-8)
    np.testing.assert_allclose(found["std_error"][keep] ** 2, variance[keep], rtol=1e-7)
    population = fit.predict(new, re_form="~0")
    if not random:
        assert found["prediction"].iloc[1] == pytest.approx(population.iloc[1])


def test_a_chain_is_a_series():
    """The structure of neighbours against that of whole matrices, all that a fit asks of it."""
    fit = fitted("sp_exp", weights="w")
    chain = fit.design.structure
    counts = np.bincount(np.cumsum(chain.first) - 1)
    shapes = tuple((1, int(count)) for count in counts)
    series = Series(
        chain.scores,
        chain.times,
        np.zeros((len(chain.times), 0)),
        chain.order,
        np.arange(len(counts)),
        chain.remainder,
        chain.sizes,
        shapes,
        chain.law,
    )
    rng, k = np.random.default_rng(0), chain.scores.shape[1]
    matrix, weights = rng.normal(size=(k, 2)), rng.normal(size=2)
    for z in (-1.0, 0.3, 2.0):
        omega = np.array([z])
        for linear in (False, True):
            asked = [replace(own, linear=linear) for own in (chain, series)]
            found = [own.project(omega) for own in asked]
            for left, right in zip(
                *(
                    (
                        *own.marginal(omega),
                        *at[:2],
                        own.slope(at),
                        own.form(at.cross, matrix),
                        own.curvature(at, matrix, weights),
                        own.spread(at, matrix),
                        own.modes(omega, own.combine(at.cross, matrix[:, :1]))[-1],
                    )
                    for own, at in zip(asked, found, strict=True)
                ),
                strict=True,
            ):
                np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)


def test_a_long_series():
    """Of one subject and thousands of equally spaced rows; AR(1) with a correlation that is known
    to be estimated well from so many."""
    rng, n = np.random.default_rng(1), 6000
    e = np.zeros(n)
    for k in range(1, n):
        e[k] = -0.6 * e[k - 1] + rng.normal()
    data = pd.DataFrame(
        {"y": e + 1, "t": np.arange(n), "who": np.where(np.arange(n) < n - 50, 1, 2)}
    )
    fit = jaxreml.fit("y ~ 1", data, residual="ar1(t | who)")
    assert fit.converged and fit.structure == "chain"
    found = fit.variance_parameters().loc["correlation|Residual"]
    assert found["estimate"] == pytest.approx(-0.6, abs=4 * found["std_error"])
    assert found["std_error"] == pytest.approx(0.8 / np.sqrt(n), rel=0.05)
    normal = fit.residuals("normalized")
    assert abs(np.corrcoef(normal[1:], normal[:-1])[0, 1]) < 0.04
    with pytest.raises(jaxreml.DataError, match="6,000 different visits"):
        _ = fit.residual_cov
    with pytest.raises(jaxreml.DataError, match="who 1 has 5,950; it may be 2,000"):
        fit.predict(data.iloc[:1].assign(t=-1.0), interval="prediction")
    with pytest.raises(jaxreml.DataError, match="5,950 rows, and with random effects beside it"):
        jaxreml.fit("y ~ 1 + (1 | who)", data, residual="sp_exp(t | who)")
    with pytest.raises(jaxreml.DataError, match="there are functions of the distance"):
        jaxreml.fit("y ~ 1", data, residual="us(t | who)")
    with pytest.raises(jaxreml.DataError, match="not one of each 'arm'"):
        jaxreml.fit("y ~ 1", data.assign(arm=1), residual="ar1(t | arm/who)")


def test_what_follows(tmp_path):
    fit = fitted("sp_exp", RANDOM)
    text = fit.summary()
    assert "different times" in text and "Range" in text
    assert "range" in fit.to_markdown(parts=("fixed", "random"))
    assert fit.residual_cov.shape == (rows()["t"].nunique(),) * 2
    robust = fit.robust("CR0")
    assert (robust.bse > 0).all()
    fit.save(tmp_path / "fit.json")
    again = jaxreml.load(tmp_path / "fit.json")
    pd.testing.assert_frame_equal(again.coefficients(), fit.coefficients())
    new = rows().iloc[[3, 4]].assign(t=[3.3, 4.4])
    pd.testing.assert_series_equal(again.predict(new), fit.predict(new))
    pd.testing.assert_frame_equal(again.variance_parameters(), fit.variance_parameters())
    with pytest.raises(ValueError, match="residuals are predicted too"):
        fit.predict(new, interval="confidence")
    with pytest.raises(jaxreml.DataError, match="structure of their own"):
        fitted("sp_gau", structure="dense")
