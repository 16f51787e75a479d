"""What follows from fits with a covariance of residuals, against definitions and other routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import chi2

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


# Profiles: the criterion of the matrix of all rows, by another parametrisation and optimiser


def matrix_of_visits(family: str, at: np.ndarray) -> np.ndarray:
    """(4, 4), from SDs or the one, and correlations as they are."""
    ages = np.array([8.0, 10.0, 12.0, 14.0])
    lags = np.abs(ages[:, None] - ages)
    if family == "us":
        root = np.zeros((4, 4))
        root[np.tril_indices(4)] = at
        return root @ root.T
    if family == "toeph":
        correlations = np.append(1.0, at[4:7])[(lags / 2).astype(int)]
        return correlations * np.outer(at[:4], at[:4])
    if family == "sp_exp":
        return at[0] ** 2 * np.exp(-lags / at[1])
    return np.outer(at[:4], at[:4]) * at[4] ** (lags / 2)  # ar1h


def dense_criterion(fit: jaxreml.LMMResults, matrix: np.ndarray, random: float) -> float:
    own, X = fit.frame.residual, fit.frame.X
    assert own is not None
    same = own.codes[:, None] == own.codes
    V = np.where(same, matrix[own.places[:, None], own.places] + random, 0.0)
    try:
        root = np.linalg.cholesky(V)
    except np.linalg.LinAlgError:
        return 1e6
    half = np.linalg.solve(root, np.column_stack([X, fit.y]))
    gram = half.T @ half
    rss = gram[-1, -1] - gram[:-1, -1] @ np.linalg.solve(gram[:-1, :-1], gram[:-1, -1])
    value = 2 * np.log(np.diagonal(root)).sum() + rss
    if fit.method == "REML":
        value += np.linalg.slogdet(gram[:-1, :-1])[1] - X.shape[1] * np.log(2 * np.pi)
    return float(value + len(V) * np.log(2 * np.pi))


def correlation(i: int, j: int) -> Callable[[np.ndarray], float]:
    return lambda matrix: float(matrix[i, j] / np.sqrt(matrix[i, i] * matrix[j, j]))


@pytest.mark.parametrize(
    ("family", "random", "method", "name", "reading"),
    [
        pytest.param(
            *("us", "", "REML", "cor_14.10|Residual", correlation(3, 1)), marks=pytest.mark.long
        ),
        pytest.param(
            *("toeph", "", "ML", "cor_12.8|Residual", correlation(2, 0)), marks=pytest.mark.long
        ),
        ("sp_exp", "", "REML", "range|Residual", lambda m: -2 / np.log(correlation(1, 0)(m))),
        ("ar1h", " + (1 | Subject)", "ML", "sd_12|Residual", lambda m: float(m[2, 2] ** 0.5)),
    ],
)
def test_profiles_are_the_lowest_criterion_with_a_number_held(
    family, random, method, name, reading
):
    fit = fitted(f"{family}{ON}", random, method)
    interval = fit.profile(name, method=method).conf_int().loc[name]
    sds, cor = fit.variance_parameters()["estimate"], fit.residual_corr.to_numpy()
    start = {
        "us": np.linalg.cholesky(fit.residual_cov.to_numpy())[np.tril_indices(4)],
        "toeph": np.append(fit.residual_sds.max() * np.ones(4), cor[0, 1:]),
        "sp_exp": sds.to_numpy(),
        "ar1h": np.append(sds.iloc[1:], sds.iloc[0]),
    }[family]

    def objective(at: np.ndarray) -> float:
        return dense_criterion(fit, matrix_of_visits(family, at), at[-1] ** 2 * bool(random))

    for limit in interval[["lower", "upper"]]:
        held = {
            "type": "eq",
            "fun": lambda at, limit=limit: reading(matrix_of_visits(family, at)) - limit,
        }
        options = {"maxiter": 300, "ftol": 1e-10}
        best = minimize(objective, start, method="SLSQP", constraints=held, options=options)
        assert abs(held["fun"](best.x)) < 1e-6
        assert best.fun - fit.criterion == pytest.approx(chi2.ppf(0.95, 1), abs=2e-4), limit


def test_profile_of_a_fixed_effect_is_the_fit_with_an_offset():
    fit = fitted(f"csh{ON}", method="ML")
    interval = fit.profile("age").conf_int().loc["age"]
    table = fit.table.assign(female=(fit.table["Sex"] == "Female") * 1.0)
    for limit in interval[["lower", "upper"]]:
        held = jaxreml.fit(
            "distance ~ Sex + female:age",
            table,
            "ML",
            offset=limit * table["age"],
            residual=f"csh{ON}",
        )
        assert held.criterion - fit.criterion == pytest.approx(chi2.ppf(0.95, 1), abs=1e-7)


def test_points_and_regions_of_a_profile():
    fit = fitted(f"ar1{ON}", method="ML")
    names = ["sigma", "cor_10.8|Residual"]
    profile = fit.profile(names)
    frame = profile.frame
    for name in names:
        own = frame[frame["parameter"] == name]
        assert own["value"].to_numpy() == pytest.approx(own[name].to_numpy(), rel=1e-9)
        np.testing.assert_allclose(own["criterion"] - fit.criterion, own["zeta"] ** 2, atol=1e-8)
        assert (np.diff(own["zeta"]) > 0).all() and abs(own["zeta"].iloc[0]) > 2.5
    edge = profile.contour(*names, [0.8], points=4)
    np.testing.assert_allclose(edge["deviance"], chi2.ppf(0.8, 2), atol=1e-5)
    for _, row in edge.iloc[:3].iterrows():
        matrix = matrix_of_visits("ar1h", np.append(np.full(4, row["sigma"]), row[names[1]]))
        rise = dense_criterion(fit, matrix, 0.0) - fit.criterion
        assert rise == pytest.approx(row["deviance"], abs=1e-5)
    wide = fitted(f"csh{ON}", method="ML").profile(["cor_10.8|Residual", "sd_10|Residual"])
    edge = wide.contour("cor_10.8|Residual", "sd_10|Residual", [0.5], points=4)
    np.testing.assert_allclose(edge["deviance"], chi2.ppf(0.5, 2), atol=1e-5)


def test_no_random_effects_are_no_rows():
    fit = fitted("us(age | Subject)")
    assert fit.tidy("ran_vals").empty
    assert set(fit.tidy(("fixed", "ran_vals"))["effect"]) == {"fixed"}
