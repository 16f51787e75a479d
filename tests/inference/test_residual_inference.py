"""What follows from fits with a covariance of residuals, against definitions and other routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import chi2

import jaxreml
from jaxreml import DataError
from jaxreml.inference.parameters.variances import Places
from jaxreml.inference.resampling.extension import extend
from jaxreml.inference.resampling.likelihood_ratio import null_distribution
from jaxreml.inference.resampling.own_times import OwnTimes
from jaxreml.inference.resampling.simulation import of_fit
from jaxreml.inference.resampling.statistics import default, fits_of
from jaxreml.many.one_by_one import refitter

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
        if group == "Residual" and fit.residual and fit.residual.words.family == "sp_exp":
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
        pytest.param(
            *("ar1h", " + (1 | Subject)", "ML", "sd_12|Residual", lambda m: float(m[2, 2] ** 0.5)),
            marks=pytest.mark.long,
        ),
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
        zeta = np.asarray(own["zeta"])
        np.testing.assert_allclose(own["value"], own[name], rtol=1e-9)
        np.testing.assert_allclose(own["criterion"] - fit.criterion, zeta**2, atol=1e-8)
        assert (np.diff(zeta) > 0).all() and abs(zeta[0]) > 2.5
    edge = profile.contour(names[0], names[1], [0.8], points=4)
    np.testing.assert_allclose(edge["deviance"], chi2.ppf(0.8, 2), atol=1e-5)
    for _, row in edge.iloc[:3].iterrows():
        matrix = matrix_of_visits("ar1h", np.append(np.full(4, row["sigma"]), row[names[1]]))
        rise = dense_criterion(fit, matrix, 0.0) - fit.criterion
        assert rise == pytest.approx(row["deviance"], abs=1e-5)


@pytest.mark.long
def test_region_of_two_numbers_that_are_solved_for():
    wide = fitted(f"csh{ON}", method="ML").profile(["cor_10.8|Residual", "sd_10|Residual"])
    edge = wide.contour("cor_10.8|Residual", "sd_10|Residual", [0.5], points=4)
    np.testing.assert_allclose(edge["deviance"], chi2.ppf(0.5, 2), atol=1e-5)


def test_no_random_effects_are_no_rows():
    fit = fitted("us(age | Subject)")
    assert fit.tidy("ran_vals").empty
    assert set(fit.tidy(("fixed", "ran_vals"))["effect"]) == {"fixed"}


# The bootstrap, and what else simulates


def test_bootstrap():
    fit = fitted(f"ar1{ON}")
    drawn = fit.bootstrap(120, seed=4)
    again = fit.bootstrap(5, seed=4)
    np.testing.assert_allclose(again.draws, drawn.draws.iloc[:5], rtol=1e-9)
    assert drawn.n_failed == 0
    for k, y in enumerate(fit.simulate(2, seed=4).to_numpy().T):
        table = fit.table.assign(distance=y)
        one = jaxreml.fit(fit.formula, table, residual=f"ar1{ON}")
        correlation = one.residual_corr.to_numpy()[1, 0]
        values = [*one.params, one.sigma, correlation, 2 * np.log(one.sigma)]
        np.testing.assert_allclose(drawn.draws.iloc[k], values, rtol=1e-6)
    np.testing.assert_allclose(drawn.std_error["beta[age]"], fit.bse["age"], rtol=0.25)
    limits = fit.variance_parameters(conf_level=0.9)
    both = (("sigma", "sigma"), ("correlation[Residual, 8, 10]", "cor_10.8|Residual"))
    for name, own in both:
        row = limits.loc[own]
        np.testing.assert_allclose(drawn.std_error[name], row["std_error"], rtol=0.25)
        for way in ("percentile", "studentized"):
            found = drawn.conf_int(0.9, way).loc[name]
            ends = (np.array(part[["lower", "upper"]], float) for part in (found, row))
            assert np.all(np.abs(np.subtract(*ends)) < 0.6 * row["std_error"])


def test_bootstrap_one_by_one():
    """Of what batches do not have: five effects of a subject, and a covariance by a word."""
    beside = fitted(f"ar1h{ON}", " + (1 | Subject)", "ML")
    word = jaxreml.fit("distance ~ age + diag(age | Subject)", beside.table, "ML")
    for fit in (beside, word):
        drawn = fit.bootstrap(2, seed=4)
        y = fit.simulate(1, seed=4)["sim_1"].to_numpy()
        text = fit.residual and fit.residual.text
        one = jaxreml.fit(fit.formula, fit.table.assign(distance=y), "ML", residual=text)
        values = default(one).values(one.beta, one.theta, np.asarray(one.sigma), one.parameters)
        np.testing.assert_allclose(drawn.draws.iloc[0], values, rtol=1e-5, atol=1e-8)
        fitter = refitter(fit.frame, "ML")
        gradient = fitter.gradients(fit.parameters, fit.y[:, None])
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_default_statistics():
    fit = fitted("toeph(age | Sex/Subject)", method="ML")
    own = default(fit)
    values = own.values(fit.beta, fit.theta, np.asarray(fit.sigma), fit.parameters)
    named = dict(zip(own.names, values, strict=True))
    table = fit.variance_parameters()
    at = "cor_Female: 14.Female: 8|Residual"
    assert named["correlation[Residual, Female: 8, Female: 14]"] == pytest.approx(
        table.loc[at, "estimate"]
    )
    errors = own.errors(fits_of(fit), fit)[0]
    relative = table["std_error"] / table["estimate"]
    place = own.names.index("sd[Residual, Male: 12]")
    assert errors[place] == pytest.approx(relative["sd_Male: 12|Residual"])
    assert np.isnan(errors[own.names.index("correlation[Residual, Female: 8, Female: 14]")])
    _, slopes = own.slopes(fit)
    step = 1e-6 * np.eye(len(fit.parameters))
    omega, last = fit.covariance.natural(fit.parameters + step[2])
    whole = np.exp(last) * np.append(fit.covariance.whole(omega), 1.0)
    moved = Places.of(fit.covariance, list(own.known)).values(whole, fit.parameters + step[2])
    expected = (moved - table["estimate"].to_numpy()) / 1e-6
    sds = [name.startswith("sd[") for name in own.names]
    np.testing.assert_allclose(slopes[sds, 2], expected[: sum(sds)], atol=1e-5)


def test_ratios_of_likelihoods():
    both = fitted(f"ar1{ON}", " + (1 | Subject)")
    alone = fitted(f"ar1{ON}")
    table = both.ranova()
    assert table["chisq"].iloc[1] == pytest.approx(alone.criterion - both.criterion, abs=1e-7)
    assert table["df"].iloc[1] == 1 and table["npar"].tolist() == [both.dof, alone.dof]
    with pytest.raises(DataError, match="no random effects to test"):
        alone.ranova()
    found = both.step(alpha_random=0.0, reduce_fixed=False)
    assert found.fit is not None and found.fit.groupings == ()
    assert found.fit.residual is not None and found.fit.residual.text == f"ar1{ON}"
    assert found.fit.criterion == pytest.approx(alone.criterion, abs=1e-7)
    dropped = fitted(f"csh{ON}", method="ML").drop1(test="chi2")
    smaller = jaxreml.fit("distance ~ age + Sex", alone.table, "ML", residual=f"csh{ON}")
    assert dropped["logLik"].loc["age:Sex"] == pytest.approx(smaller.llf)
    sleep = jaxreml.datasets.load("sleepstudy")
    words = jaxreml.fit("Reaction ~ Days + cs(Days | Subject)", sleep, "ML")
    label = "cs(Days | Subject)"
    assert words.ranova().index.tolist() == ["<none>", label]
    assert words.step().formula == words.formula


def test_simulated_null_distribution():
    small, large = fitted(f"cs{ON}"), fitted(f"toep{ON}")
    null = null_distribution(small, large, nsim=20, seed=3)
    assert null.n_failed == 0 and (null.draws >= 0).all() and null.draws.size == 20
    y = small.simulate(1, seed=3)["sim_1"].to_numpy()
    table = small.table.assign(distance=y)
    first, second = (
        jaxreml.fit(small.formula, table, residual=f"{word}{ON}").criterion
        for word in ("cs", "toep")
    )
    assert null.draws[0] == pytest.approx(first - second, abs=1e-7)
    compared = jaxreml.compare(small, large, refit=False, method="bootstrap", nsim=20, seed=3)
    assert compared["p_value"].iloc[1] == pytest.approx(null.p_value)


def test_power_of_a_longer_trial():
    fit = fitted(f"csh{ON}")
    people = extend(of_fit(fit), 40, "Subject")
    own = people.frame.residual
    assert own is not None and len(own.subjects) == 40 and own.codes.max() == 39
    rows = [own.places[own.codes == code] for code in range(40)]
    assert all(len(set(places)) == len(places) for places in rows)
    table = jaxreml.power(fit, {"age": [0.0, 0.7]}, [40], along="Subject", nsim=25, seed=1)
    power = table["power"].tolist()
    assert power[0] < 0.3 and power[1] == 1.0
    assert set(table["nobs"]) == {len(people.frame.X)}
    with pytest.raises(DataError, match="same 'age' twice"):
        extend(of_fit(fit), 6, within="Subject")
    with pytest.raises(DataError, match="cannot be added to a design with residual="):
        extend(of_fit(fit), 6, "age")
    levels = extend(of_fit(fitted("diag(Sex)", " + (1 | Subject)")), 6, within="Subject").frame
    assert levels.residual is not None
    pairs = np.stack([levels.residual.codes, levels.residual.places])
    assert np.unique(pairs, axis=1).shape == pairs.shape


@pytest.mark.parametrize("family", ["sp_exp", "sp_gau"])
def test_times_of_each_subject(family):
    """More than 60, so that there is no matrix of all of them."""
    rng = np.random.default_rng(2)
    data = pd.DataFrame({"subject": np.repeat(np.arange(12), 6), "time": rng.uniform(0, 9, 72)})
    data["y"] = rng.normal(size=72) + rng.normal(size=12)[data["subject"]] * 0.5
    fit = jaxreml.fit("y ~ time", data, "ML", residual=f"{family}(time | subject)")
    people, own = of_fit(fit), fit.frame.residual
    assert isinstance(people.residual, OwnTimes) and own is not None
    root = people.residual.correlated(np.eye(72), own)
    assert fit.residual is not None
    every = fit.residual.relative(people.residual.factor, own.places, own.places)
    expected = np.where(own.codes[:, None] == own.codes, every, 0.0)
    np.testing.assert_allclose(root.T @ root, expected, atol=1e-9)

    variance = fit.residual_sds**2
    np.testing.assert_allclose(variance, fit.sigma**2)
    explained = np.var(fit.frame.X @ fit.beta, ddof=1)
    assert fit.r2()["estimate"].iloc[0] == pytest.approx(explained / (explained + fit.sigma**2))
    limit = fit.profile("time").conf_int()["lower"].iloc[0]
    held = jaxreml.fit("y ~ 1", data, "ML", offset=limit * data["time"], residual=fit.residual.text)
    assert held.criterion - fit.criterion == pytest.approx(chi2.ppf(0.95, 1), abs=1e-6)
    drawn = fit.bootstrap(1, seed=3)
    y = fit.simulate(1, seed=3)["sim_1"]
    one = jaxreml.fit("y ~ time", data.assign(y=y), "ML", residual=fit.residual.text)
    np.testing.assert_allclose(drawn.draws.iloc[0, :3], [*one.params, one.sigma], rtol=1e-5)
