"""What follows from fits with a covariance of residuals, against definitions and other routes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import jaxreml
from jaxreml import DataError

CHILDREN = jaxreml.datasets.load("orthodont")
ON = "(age | Subject)"


@cache
def fitted(residual: str, random: str = "", method: str = "REML") -> jaxreml.LMMResults:
    """Of the children's distances, the last ages of some of them missing."""
    data = CHILDREN.drop(CHILDREN.index[3::16])
    return jaxreml.fit(f"distance ~ age * Sex{random}", data, method, residual=residual)


def readings(fit: jaxreml.LMMResults, parameters: np.ndarray) -> np.ndarray:
    """SDs, correlations and ranges in the order of their table, from the covariance matrices."""
    covariance = fit.covariance
    omega, log_sigma2 = covariance.natural(parameters)
    parts = covariance.parts(np.exp(log_sigma2) * covariance.whole(omega))
    values = {}
    for (block, own), (group, effects) in zip(parts, fit.labels, strict=True):
        matrix = np.zeros((block.size, block.size))
        rows, columns = (np.array(part) for part in zip(*_triangle(block.size), strict=True))
        matrix[rows, columns] = matrix[columns, rows] = own
        sds = np.sqrt(np.diagonal(matrix))
        for i, one in enumerate(effects):
            values[f"sd_{one}|{group}"] = sds[i]
            values["sigma"] = sds[0]
            if group == "Residual":
                arm = one.partition(": ")[0]
                values[f"sd_{arm}|{group}"] = sds[i]
            for j, two in enumerate(effects):
                values[f"cor_{one}.{two}|{group}"] = matrix[i, j] / (sds[i] * sds[j])
        if group == "Residual" and fit.residual.words.family == "sp_exp":
            lag = float(effects[1]) - float(effects[0])
            values["range|Residual"] = -lag / np.log(matrix[1, 0] / (sds[0] * sds[1]))
    return np.array([values[name] for name in fit.variance_parameters().index])


def _triangle(q: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(q) for i in range(j, q)]


@pytest.mark.parametrize(
    "model",
    [
        (f"us{ON}",),
        ("ar1(age | Sex/Subject)",),
        (f"toeph{ON}",),
        (f"sp_exp{ON}",),
        (f"ar1h{ON}", " + (1 | Subject)"),
    ],
)
def test_variance_parameters_by_differences(model):
    fit = fitted(*model)
    table, at = fit.variance_parameters(), fit.parameters
    np.testing.assert_allclose(table["estimate"], readings(fit, at), rtol=1e-9)
    steps = 1e-5 * np.eye(len(at))
    slope = np.array([readings(fit, at + s) - readings(fit, at - s) for s in steps]).T / 2e-5
    expected = slope @ fit.parameters_vcov_array @ slope.T
    np.testing.assert_allclose(fit.parameters_vcov("sd"), expected, rtol=1e-6, atol=1e-8)
    for name, row in table.iterrows():
        forward = np.arctanh if str(name).startswith("cor") else np.log
        low, middle, high = forward(row[["lower", "estimate", "upper"]].to_numpy(float))
        assert high - middle == pytest.approx(middle - low)
    assert sorted(fit.tidy("ran_pars")["estimate"]) == sorted(table["estimate"])


def test_functions_of_the_parameters():
    fit = fitted(f"us{ON}")
    frame = fit.delta(
        lambda beta, parts: [parts["Residual"][1, 0], beta[1] / parts["Residual"][3, 3] ** 0.5]
    )
    covariances = fit.variance_parameters("variance")
    own = covariances.loc["cov_10.8|Residual", ["estimate", "std_error", "lower", "upper"]]
    np.testing.assert_allclose(frame.iloc[0, :4].astype(float), own.astype(float), rtol=1e-9)
    sd = fit.variance_parameters().loc["sd_14|Residual"]
    value = fit.params["age"] / sd["estimate"]
    error = value * np.hypot(fit.bse["age"] / fit.params["age"], sd["std_error"] / sd["estimate"])
    np.testing.assert_allclose(frame.iloc[1, :2].astype(float), [value, error], rtol=1e-9)


def test_shares_of_variance():
    fit = fitted(f"ar1h{ON}", " + (1 | Subject)")
    variances = fit.residual_sds**2
    random = float(fit.cov_re.iloc[0, 0])
    mean = fit.frame.X @ fit.beta
    assert fit.icc()["estimate"].iloc[0] == pytest.approx(random / (random + variances.mean()))
    late = (fit.table["age"] == 14).to_numpy()
    total = random + variances[late][0]
    repeatability = fit.repeatability("Subject", at=14)["estimate"].iloc[0]
    assert repeatability == pytest.approx(random / total)
    r2 = fit.r2(at=14)["estimate"]
    total += mean[late].var(ddof=1)
    assert r2["marginal"] == pytest.approx(mean[late].var(ddof=1) / total)
    assert r2["conditional"] == pytest.approx(1 - variances[late][0] / total)
    shares = fit.variance_shares(fixed=True)
    assert shares["estimate"].sum() == pytest.approx(1)
    whole = random + variances.mean() + mean.var(ddof=1)
    (line,) = (own for own in fit.to_markdown().splitlines() if "ICC" in own)
    assert f"{random / (random + variances.mean()):.2f}" in line
    assert shares.loc["Residual", "estimate"] == pytest.approx(variances.mean() / whole)

    with pytest.raises(DataError, match="residuals of a subject are correlated"):
        fit.repeatability("Subject", measurements=2)
    with pytest.raises(DataError, match="residuals of a subject are correlated"):
        fit.heritability("Subject", {"Residual": 2})
    with pytest.raises(DataError, match=r"9 is not a visit of the fit; there are 8\.0, 10\.0"):
        fit.icc(at=9)
    with pytest.raises(DataError, match="no random effects, whose share"):
        fitted(f"us{ON}").icc()
    alone = jaxreml.fit("distance ~ age + (1 | Subject)", CHILDREN)
    with pytest.raises(DataError, match="is for fits with residual="):
        alone.icc(at=8)
    equal = fitted(f"us{ON}").r2()["estimate"]
    assert equal["marginal"] == equal["conditional"]
