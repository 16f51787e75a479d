"""Fits with a covariance of residuals: against nlme, SAS and the same model in dense algebra."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from independent import criterion_at, gradient
from matplotlib.figure import Figure

import jaxreml
from jaxreml.backend.arrays import leaves
from jaxreml.data.frame import model_frame
from jaxreml.fitting.sequence import failure
from jaxreml.model.covariance.words import FAMILIES, RESIDUALS, SYNONYMS
from jaxreml.model.structures import grouped
from jaxreml.model.structures.collapse import marginal_by_classes
from jaxreml.optimum.effects import conditional_modes

HERE = Path(__file__).parents[1] / "reference" / "residuals"
ON = "(AVISIT | USUBJID)"


@cache
def fev() -> pd.DataFrame:
    data = pd.read_csv(HERE / "fev.csv.gz")
    data["V"] = data["AVISIT"].str[3:].astype(float)
    return data


@cache
def recorded(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


@cache
def fitted(residual: str, formula: str = "FEV1 ~ ARMCD + AVISIT", method: str = "REML", **options):
    return jaxreml.fit(formula, fev(), method, residual=residual, **options)


def small(seed: int = 0, subjects: int = 12, visits: int = 4) -> pd.DataFrame:
    """Visits missing here and there, and a covariate that varies within subjects."""
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        [(f"s{i:02d}", float(t)) for i in range(subjects) for t in range(visits)],
        columns=["subject", "time"],
    )
    shared = rng.normal(size=subjects)[np.repeat(np.arange(subjects), visits)]
    data["x"], data["w"] = rng.normal(size=len(data)), rng.uniform(0.5, 2, len(data))
    data["y"] = data["x"] + shared + rng.normal(size=len(data)) * (1 + data["time"] / 3)
    return data[rng.random(len(data)) > 0.15].reset_index(drop=True)


# References


@pytest.mark.parametrize(
    ("name", "residual", "options"),
    [
        ("us", "us", {}),
        ("cs", "cs", {}),
        ("csh", "csh", {}),
        ("ar1", "ar1", {}),
        ("ar1h", "ar1h", {}),
        ("diag", "diag", {}),
        ("us_ml", "us", {"method": "ML"}),
        ("ar1_ml", "ar1", {"method": "ML"}),
        ("ar1_weights", "ar1", {"weights": "WEIGHT"}),
        ("ar1_random", "ar1", {"formula": "FEV1 ~ ARMCD + AVISIT + (1 | USUBJID)"}),
        ("sp_exp", "sp_exp", {}),
        ("sp_gau", "sp_gau", {}),
    ],
)
def test_nlme(name, residual, options):
    expected = recorded("nlme")[name]
    visit = "V" if residual.startswith("sp") else "AVISIT"
    fit = fitted(f"{residual}({visit} | USUBJID)", **options)
    assert fit.converged and not fit.is_singular
    assert fit.criterion == pytest.approx(expected["criterion"], abs=1e-5)
    np.testing.assert_allclose(fit.params, expected["beta"], rtol=1e-4)
    # nlme's errors by ML carry the root of n / (n - p).
    inflation = np.sqrt(fit.nobs / (fit.nobs - len(fit.beta))) if fit.method == "ML" else 1.0
    np.testing.assert_allclose(fit.bse * inflation, expected["se"], rtol=1e-3)
    if expected.get("covariance") and "weights" not in options:
        np.testing.assert_allclose(fit.residual_cov, expected["covariance"], rtol=2e-3, atol=1e-3)
    if expected.get("random"):
        assert fit.variances["USUBJID"].iloc[0] == pytest.approx(expected["random"], rel=1e-3)
    # nlme takes the symmetric square root of compound symmetry, and Cholesky's of the others.
    if expected.get("normalized") and name not in ("cs", "csh"):
        rows = fit.table.assign(resid=fit.residuals("normalized"))
        found = rows.sort_values(["USUBJID", visit])["resid"]
        np.testing.assert_allclose(found.iloc[:20], expected["normalized"], atol=2e-3)


def test_sas_unstructured():
    expected = recorded("sas")["fev_us"]
    data = fev().assign(SEX=pd.Categorical(fev()["SEX"], ["Male", "Female"]))
    fit = jaxreml.fit("FEV1 ~ ARMCD * AVISIT + RACE + SEX", data, residual=f"us{ON}")
    assert fit.criterion == pytest.approx(expected["minus2_loglik"], abs=0.05)
    table = fit.coefficients()
    fixed = np.array(list(expected["fixed"].values()))
    theirs = fixed[[0, 1, 2, 3, 4, 8, 9, 10, 5, 6, 7]]  # interactions last
    np.testing.assert_allclose(table["estimate"], theirs, atol=6e-4)
    for k, (error, degrees) in enumerate(
        zip(expected["fixed_se"].values(), expected["df_satterthwaite"].values(), strict=True)
    ):
        assert table["std_error"].iloc[k] == pytest.approx(error, abs=2e-4)
        assert table["df"].iloc[k] == pytest.approx(degrees, abs=0.6)
    # SAS's printed matrix has the visits in another order, so compare what does not depend on it.
    printed = sorted(value for row in expected["cov"]["UN"] for value in row)
    ours = sorted(fit.residual_cov.to_numpy()[np.tril_indices(4)])
    np.testing.assert_allclose(ours, printed, atol=6e-3)
    tests = fit.anova(3)
    for name, row in expected["type3"].items():
        found = tests.loc[name]
        assert found["statistic"] == pytest.approx(row["F"], rel=2e-3, abs=6e-3), name
        assert found["den_df"] == pytest.approx(row["df"][1], abs=1.0), name
    means = fit.emmeans("ARMCD", by="AVISIT").table
    for label, (mean, error, degrees) in expected["lsmeans"].items():
        visit, arm = label.split()
        row = means[(means["AVISIT"] == visit) & (means["ARMCD"] == arm)].iloc[0]
        assert row["estimate"] == pytest.approx(mean, abs=6e-4)
        assert row["std_error"] == pytest.approx(error, abs=6e-4)
        assert row["df"] == pytest.approx(degrees, abs=0.6)


def test_sas_autoregressive():
    expected = recorded("sas")["fev_ar1"]
    fit = jaxreml.fit("FEV1 ~ 1", fev(), residual=f"ar1{ON}")
    assert fit.criterion == pytest.approx(expected["minus2_loglik"], abs=0.05)
    assert fit.residual_corr.iloc[1, 0] == pytest.approx(expected["cov"]["AR(1)"], abs=6e-5)
    assert fit.sigma**2 == pytest.approx(expected["cov"]["Residual"], abs=1e-3)
    assert fit.coefficients()["df"].iloc[0] == pytest.approx(188, abs=0.6)


def test_kenward_roger_in_both_dialects():
    expected = recorded("sas")["fev_cs"]
    fit = jaxreml.fit("FEV1 ~ ARMCD", fev(), residual=f"cs{ON}")
    found = fit.coefficients("kenward-roger-sas").loc["ARMCD[T.TRT]", "df"]
    assert found == pytest.approx(expected["observed"], abs=2e-4)
    found = fit.coefficients("kenward-roger").loc["ARMCD[T.TRT]", "df"]
    assert found == pytest.approx(expected["expected"], abs=6e-5)
    # The same model with a random intercept
    random = jaxreml.fit("FEV1 ~ ARMCD + (1 | USUBJID)", fev())
    assert fit.criterion == pytest.approx(random.criterion, abs=1e-8)
    for df in ("satterthwaite", "kenward-roger", "kenward-roger-sas"):
        columns = ["std_error", "df"]
        ours, theirs = fit.coefficients(df)[columns], random.coefficients(df)[columns]
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, err_msg=df)


def test_kenward_roger_of_sas_at_full_precision():
    expected = recorded("sas")["pastry"]
    fit = jaxreml.fit(expected["formula"], pd.read_csv(HERE / "pastry.csv.gz"))
    found = fit.coefficients("kenward-roger-sas")[["estimate", "std_error", "df"]]
    table = np.array(list(expected["kenward_roger"].values()))
    order = [0, 1, 2, 3, 7, 8, 9, 4, 5, 6]  # squares first
    np.testing.assert_allclose(found, table[order], rtol=1e-7)
    variances = fit.parameters_vcov("variance")
    np.testing.assert_allclose(variances, expected["asycov"], rtol=1e-6)
    batch = jaxreml.fit_many(
        expected["formula"].partition("~")[2].join(["~", ""]),
        pd.read_csv(HERE / "pastry.csv.gz"),
        pd.read_csv(HERE / "pastry.csv.gz")[["LEI"]],
        df="kenward-roger-sas",
    )
    np.testing.assert_allclose(batch.df.to_numpy()[0], table[order][:, 2], rtol=1e-7)


# Dense algebra


def dense(fit, parameters: np.ndarray) -> np.ndarray:
    """V of a fit at other parameters, from the definition."""
    own, block = fit.frame.residual, fit.residual.block
    count = len(block.parameter_names("", fit.residual.effects))
    sigma2 = np.exp(parameters[-1])
    mine = parameters[len(parameters) - 1 - count : -1]
    logs, z = mine[: block.log_variances], mine[block.log_variances :]
    sds = np.sqrt(np.append(sigma2, np.exp(logs)))[list(block.variances)]
    rows, columns = np.triu_indices(block.size)
    matrix = np.zeros((block.size, block.size))
    matrix[rows, columns] = matrix[columns, rows] = block.correlation.entries(z)
    matrix = sds[:, None] * matrix * sds
    V = matrix[np.ix_(own.places, own.places)] * (own.codes[:, None] == own.codes)
    root = np.sqrt(fit.prior_weights)
    V = V / root[:, None] / root
    for term, value in zip(fit.frame.terms, np.exp(parameters), strict=False):
        shared = (term.effects @ term.effects.T) * (term.codes[:, None] == term.codes)
        V = V + value * shared  # of random intercepts
    return V


def criterion(fit, parameters: np.ndarray) -> float:
    V = dense(fit, parameters)
    return criterion_at(V, fit.frame.X, fit.y, reml=fit.method == "REML")


@pytest.mark.parametrize("family", [w for w in RESIDUALS if w not in SYNONYMS])
@pytest.mark.parametrize("random", ["", " + (1 | subject)"])
def test_dense_algebra(family, random):
    if random and family not in ("diag", "ar1", "ar1h", "ad"):
        return  # these and a random intercept cannot be told apart, or nearly so
    visit = "time" if FAMILIES[family].timed else "C"
    data = small(3, subjects=25).assign(C=lambda d: "t" + d["time"].astype(int).astype(str))
    fit = jaxreml.fit(f"y ~ x{random}", data, residual=f"{family}({visit} | subject)", weights="w")
    assert fit.converged
    assert fit.criterion == pytest.approx(criterion(fit, fit.parameters), rel=1e-11)
    if fit.is_singular:
        return
    slope = gradient(lambda at: criterion(fit, at), fit.parameters)
    np.testing.assert_allclose(slope, 0, atol=2e-5)
    # Standard errors by a numerical Hessian
    hessian = np.array(
        [
            gradient(
                lambda at, k=k: gradient(lambda b: criterion(fit, b), at)[k], fit.parameters, 1e-3
            )
            for k in range(len(fit.parameters))
        ]
    )
    expected = 2 * np.linalg.inv((hessian + hessian.T) / 2)
    np.testing.assert_allclose(
        np.sqrt(np.diagonal(fit.parameters_vcov_array)), np.sqrt(np.diagonal(expected)), rtol=1e-4
    )
    V = dense(fit, fit.parameters)
    inverse = np.linalg.inv(V)
    vcov = np.linalg.inv(fit.frame.X.T @ inverse @ fit.frame.X)
    np.testing.assert_allclose(fit.vcov, vcov, rtol=1e-8)

    def of_vcov(at):
        inner = np.linalg.inv(dense(fit, at))
        return np.linalg.inv(fit.frame.X.T @ inner @ fit.frame.X)[1, 1]

    moved = gradient(of_vcov, fit.parameters)
    degrees = 2 * vcov[1, 1] ** 2 / (moved @ expected @ moved)
    assert fit.coefficients()["df"].iloc[1] == pytest.approx(degrees, rel=1e-3)


def stated_covariance(family: str, s: np.ndarray) -> np.ndarray:
    """Covariance matrix of four visits in the parameters that SAS's PROC MIXED has."""
    lag = np.abs(np.subtract.outer(range(4), range(4)))
    each = family in ("csh", "ar1h", "adh", "toeph")
    variances, rho = (s[:4], s[4:]) if each else (np.repeat(s[:1], 4), s[1:])
    if family in ("us", "diag"):
        matrix = np.zeros((4, 4))
        rows, columns = np.triu_indices(4) if family == "us" else (np.arange(4),) * 2
        matrix[rows, columns] = matrix[columns, rows] = s
        return matrix
    if family in ("cs", "toep"):  # a variance, and covariances
        return np.append(s, [s[-1]] * 2)[lag] if family == "cs" else s[lag]
    correlation = {
        "csh": lambda: np.where(lag, rho[0], 1.0),
        "ar1": lambda: rho[0] ** lag,
        "ar1h": lambda: rho[0] ** lag,
        "ad": lambda: np.array(
            [[np.prod(rho[min(i, j) : max(i, j)]) for i in range(4)] for j in range(4)]
        ),
        "toeph": lambda: np.append(1.0, rho)[lag],
        "sp_exp": lambda: np.exp(-lag / rho[0]),
        "sp_gau": lambda: np.exp(-((lag / rho[0]) ** 2)),
    }[family.removesuffix("h") if family == "adh" else family]()
    return np.sqrt(np.outer(variances, variances)) * correlation


def stated(family: str, matrix: np.ndarray) -> np.ndarray:
    """Those parameters of a covariance matrix."""
    rows, columns = np.triu_indices(4)
    variances = np.diagonal(matrix)
    rho = matrix / np.sqrt(np.outer(variances, variances))
    first = variances if family in ("csh", "ar1h", "adh", "toeph", "diag") else variances[:1]
    rest = {
        "us": matrix[rows, columns],
        "cs": matrix[0, 1:2],
        "toep": matrix[0, 1:],
        "toeph": rho[0, 1:],
        "ad": rho[np.arange(3), np.arange(1, 4)],
        "adh": rho[np.arange(3), np.arange(1, 4)],
        "diag": np.zeros(0),
    }.get(family, rho[0, 1:2])
    if family.startswith("sp"):
        rest = -1 / np.log(rest)
        rest = np.sqrt(rest) if family == "sp_gau" else rest
    return rest if family == "us" else np.append(first, rest)


@pytest.mark.parametrize("family", [w for w in RESIDUALS if w not in SYNONYMS])
@pytest.mark.parametrize("random", ["", " + (1 | subject)"])
def test_kenward_roger_by_definition(family, random):
    """Their formulas with n x n matrices, and derivatives of V by differences."""
    if random and family not in ("diag", "ar1h"):
        return  # these and a random intercept cannot be told apart, or nearly so
    data = small(3, subjects=25).assign(C=lambda d: "t" + d["time"].astype(int).astype(str))
    visit = "time" if FAMILIES[family].timed else "C"
    fit = jaxreml.fit(f"y ~ x * C{random}", data, residual=f"{family}({visit} | subject)")
    own, X = fit.frame.residual, fit.frame.X
    same = own.codes[:, None] == own.codes

    def expanded(matrix: np.ndarray) -> np.ndarray:
        return matrix[np.ix_(own.places, own.places)] * same

    s = stated(family, fit.residual_cov.to_numpy())
    np.testing.assert_allclose(stated_covariance(family, s), fit.residual_cov, rtol=1e-10)
    ways = np.eye(len(s))

    def slope(at: np.ndarray, i: int, step: float = 2e-3) -> np.ndarray:
        h = step * s[i] * ways[i]
        near, far = (
            stated_covariance(family, at + k * h) - stated_covariance(family, at - k * h)
            for k in (1, 2)
        )
        return (8 * near - far) / (12 * step * s[i])

    def bend(i: int, j: int, step: float = 2e-3) -> np.ndarray:
        h = step * s[j] * ways[j]
        near, far = (slope(s + k * h, i) - slope(s - k * h, i) for k in (1, 2))
        return (8 * near - far) / (12 * step * s[j])

    first = [expanded(slope(s, i)) for i in range(len(s))]
    if random:
        first.append(same * 1.0)
    inverse = np.linalg.inv(dense(fit, fit.parameters))
    half = inverse @ X
    phi = np.linalg.inv(X.T @ half)
    projector = inverse - half @ phi @ half.T
    moved = [projector @ pair for pair in first]
    W = np.linalg.inv([[np.sum(left * right.T) / 2 for right in moved] for left in moved])
    P = np.array([-half.T @ own @ half for own in first])
    moved = [inverse @ own @ half for own in first]
    Q = [[half.T @ left @ right for right in moved] for left in first]
    inner = np.einsum("ij,ijuv->uv", W, Q) - np.einsum("ij,iuv,vw,jwx->ux", W, P, phi, P)
    bends = sum(W[i, j] * bend(i, j) for i in range(len(s)) for j in range(len(s)))
    curved = half.T @ expanded(bends) @ half / 4
    expected = phi + 2 * phi @ (inner - curved) @ phi
    scale = np.abs(expected).max()
    np.testing.assert_allclose(fit.vcov_kenward_roger, expected, atol=1e-7 * scale)
    along = np.array([np.diagonal(phi @ own @ phi) for own in P]) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", W, along, along)
    np.testing.assert_allclose(fit.coefficients("kenward-roger")["df"], degrees, rtol=1e-7)
    if family in ("us", "cs", "toep", "diag"):
        np.testing.assert_allclose(curved, 0, atol=1e-7 * np.abs(inner).max())
    if family in ("us", "ar1", "toeph", "sp_gau") and not random:
        of_observed_information(fit, s, slope, bend, expanded)


def of_observed_information(fit, s, slope, bend, expanded) -> None:
    """The same with the covariance of the parameters that a numerical Hessian gives."""
    X, y, family = fit.frame.X, fit.y, fit.residual.words.family

    def gradient(at: np.ndarray) -> np.ndarray:
        """Of the criterion in SAS's parameters: tr(P V_i) - y'P V_i P y."""
        inverse = np.linalg.inv(expanded(stated_covariance(family, at)))
        half = inverse @ X
        projector = inverse - half @ np.linalg.solve(X.T @ half, half.T)
        left = projector @ y
        slopes = [expanded(slope(at, i)) for i in range(len(s))]
        return np.array([np.sum(projector * own) - left @ own @ left for own in slopes])

    steps = 1e-3 * np.diag(s)
    near, far = (
        np.array([gradient(s + k * h) - gradient(s - k * h) for h in steps]) for k in (1, 2)
    )
    hessian = (8 * near - far) / (12 * 1e-3 * s[:, None])
    W = 2 * np.linalg.inv((hessian + hessian.T) / 2)
    inverse = np.linalg.inv(expanded(stated_covariance(family, s)))
    half = inverse @ X
    phi = np.linalg.inv(X.T @ half)
    first = [expanded(slope(s, i)) for i in range(len(s))]
    P = np.array([-half.T @ own @ half for own in first])
    moved = [inverse @ own @ half for own in first]
    Q = [[half.T @ left @ right for right in moved] for left in first]
    inner = np.einsum("ij,ijuv->uv", W, Q) - np.einsum("ij,iuv,vw,jwx->ux", W, P, phi, P)
    bends = sum(W[i, j] * bend(i, j) for i in range(len(s)) for j in range(len(s)))
    curved = half.T @ expanded(bends) @ half / 4
    along = np.array([np.diagonal(phi @ own @ phi) for own in P]) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", W, along, along)
    for df, total in (("kenward-roger-sas", inner - curved), ("kenward-roger-linear", inner)):
        expected = np.sqrt(np.diagonal(phi + 2 * phi @ total @ phi))
        found = fit.coefficients(df)
        np.testing.assert_allclose(found["std_error"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["df"], degrees, rtol=1e-6)


@pytest.mark.parametrize("family", recorded("sas")["fev_kenward_roger"]["figures"])
def test_kenward_roger_of_sas(family):
    """SAS stops its search earlier, which its figures show: at 1e-8 of the criterion."""
    error, degrees, linear = recorded("sas")["fev_kenward_roger"]["figures"][family]
    found = {
        df: fitted(f"{family}{ON}", "FEV1 ~ ARMCD").coefficients(df).iloc[1]
        for df in ("kenward-roger-sas", "kenward-roger-linear")
    }
    near = 5e-4 if family in ("us", "csh", "adh", "toep", "ar1h") else 5e-6
    for row, expected in zip(found.values(), (error, linear), strict=True):
        assert row["std_error"] == pytest.approx(expected, rel=near)
        assert row["df"] == pytest.approx(degrees, rel=near)
    # What the second derivatives of V do hardly depends on where the search stops.
    ratio = found["kenward-roger-sas"]["std_error"] / found["kenward-roger-linear"]["std_error"]
    assert ratio == pytest.approx(error / linear, abs=2e-7)


@pytest.mark.parametrize("random", ["", " + (1 | subject)"])
def test_subjects_with_the_same_visits_make_few_levels(random):
    data = small(1, subjects=150, visits=3)
    data["y"] += np.random.default_rng(0).normal(size=len(data))
    family = "ar1" if random else "us"
    fit = jaxreml.fit(f"y ~ x{random}", data, residual=f"{family}(time | subject)")
    whole, fewer = fit.design, fit.design.collapsed
    patterns, levels = fewer.structure.parts
    assert len(patterns.counts) and patterns.counts.min() > 1
    assert patterns.counts.sum() + levels.factors.shape[2] == 150 - _without_rows(fit)
    omega = whole.omega_of_theta(fit.theta) * 1.1
    p, rng = whole.p, np.random.default_rng(1)
    matrix, weights = rng.normal(size=(p + 1, 2)), rng.normal(size=2)
    marginals, projections, rest = [], [], []
    for structure in (whole.structure, fewer.structure):
        marginals.append(structure.marginal(omega))
        found = structure.project(omega)
        projections.append(found[:2])
        rest.append(
            [
                structure.slope(found),
                structure.form(found.cross, matrix),
                structure.curvature(found, matrix, weights),
                structure.spread(found, matrix),
            ]
        )
    marginals.append(marginal_by_classes(whole.structure, omega))
    for one in (*marginals[1:], *projections):
        for left, right in zip(one, marginals[0], strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)
    for left, right in zip(*rest, strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-10, atol=1e-10)
    assert fit.criterion == pytest.approx(criterion(fit, fit.parameters), rel=1e-11)
    # What the subjects say, level by level
    modes = conditional_modes(whole.omega_of_theta(fit.theta), whole)
    np.testing.assert_allclose(fit.residual.modes, modes[-1], rtol=1e-9, atol=1e-9)
    if random:
        np.testing.assert_allclose(fit.groupings[0].modes, modes[0], rtol=1e-9, atol=1e-9)


def _without_rows(fit) -> int:
    return int(150 - len(np.unique(fit.frame.residual.codes)))


def test_visits_are_factorised_without_arithmetic(monkeypatch):
    data = small(2, subjects=20)
    designs = []
    for _ in range(2):
        frame = fitted_frame(data)
        designs.append(frame.design())
        monkeypatch.setattr(grouped, "_places", lambda *arguments: None)
    for left, right in zip(leaves(designs[0]), leaves(designs[1]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-13)


def fitted_frame(data):
    return model_frame("y ~ x + C(time)", data, weights="w", residual="us(time | subject)")


# What follows from a fit


@cache
def followed() -> jaxreml.LMMResults:
    return jaxreml.fit("y ~ x", small(3, subjects=25), residual="ar1h(time | subject)")


def test_predictions_know_the_subject():
    fit = followed()
    data, own = fit.table, fit.frame.residual
    subject = next(s for s in own.subjects if 1 < (data["subject"] == s).sum() < 4)
    rows = np.flatnonzero(data["subject"] == subject)
    other = next(t for t in own.visits if t not in set(data["time"].iloc[rows]))
    new = pd.DataFrame({"x": [0.5] * 3, "subject": [subject, subject, "nobody"]})
    new["time"] = [other, data["time"].iloc[rows[0]], other]
    found = fit.predict(new, interval="prediction")

    matrix = fit.residual_cov
    seen = data["time"].iloc[rows]
    weights = np.linalg.solve(matrix.loc[seen, seen], matrix.loc[seen, other])
    x = np.array([1.0, 0.5])
    marginal = x @ fit.params.to_numpy()
    rest = fit.y[rows] - fit.frame.X[rows] @ fit.params.to_numpy()
    shift = x - weights @ fit.frame.X[rows]
    variance = matrix.loc[other, other] - weights @ matrix.loc[seen, other]
    variance += shift @ fit.vcov.to_numpy() @ shift
    assert found["prediction"].iloc[0] == pytest.approx(marginal + weights @ rest, rel=1e-10)
    assert found["std_error"].iloc[0] == pytest.approx(np.sqrt(variance), rel=1e-8)
    # A visit that has been, and a subject that is not known, have the mean and their own variance.
    for k, visit in ((1, new["time"].iloc[1]), (2, other)):
        expected = np.sqrt(x @ fit.vcov.to_numpy() @ x + matrix.loc[visit, visit])
        assert found["prediction"].iloc[k] == pytest.approx(marginal, rel=1e-12)
        assert found["std_error"].iloc[k] == pytest.approx(expected, rel=1e-9)
    alone = fit.predict(new[["x"]])
    np.testing.assert_allclose(alone, marginal, rtol=1e-12)
    np.testing.assert_allclose(fit.predict(new, re_form="~0"), marginal, rtol=1e-12)
    np.testing.assert_allclose(fit.predict(), fit.fittedvalues, rtol=1e-12)


@pytest.mark.parametrize("family", ["us", "ar1", "ar1h", "cs"])
def test_a_covariance_for_each_arm_is_two_fits(family):
    """With all fixed effects by arm, by ML, the arms share nothing."""
    data = small(5, subjects=40, visits=3)
    data["arm"] = np.where(data["subject"] < "s20", "a", "b")
    whole = jaxreml.fit(
        "y ~ arm * (x + time)", data, "ML", residual=f"{family}(time | arm/subject)"
    )
    parts = [
        jaxreml.fit("y ~ x + time", own, "ML", residual=f"{family}(time | subject)")
        for _, own in data.groupby("arm")
    ]
    assert whole.criterion == pytest.approx(sum(part.criterion for part in parts), abs=1e-8)
    matrix = whole.residual_cov.to_numpy()
    for k, part in enumerate(parts):
        own = slice(3 * k, 3 * k + 3)
        np.testing.assert_allclose(matrix[own, own], part.residual_cov, rtol=1e-5)
        errors = part.variance_parameters()["std_error"].to_numpy()
        table = whole.variance_parameters()["std_error"].to_numpy()
        assert np.isin(errors.round(4), table.round(4)).all()
    assert not matrix[:3, 3:].any()
    shared = jaxreml.fit("y ~ arm * (x + time)", data, "ML", residual=f"{family}(time | subject)")
    table = jaxreml.compare(shared, whole)
    assert table["df"].iloc[1] == len(shared.parameters)
    assert "is no case" not in table["note"].iloc[1] and np.isfinite(table["p_value"].iloc[1])
    new = data.iloc[[1]].assign(time=[0.0])
    both = [fit.predict(new, interval="prediction").to_numpy() for fit in (whole, parts[0])]
    np.testing.assert_allclose(*both, rtol=1e-5)
    assert "a: 0" in whole.summary() and "b: 2" in whole.summary()
    with pytest.raises(jaxreml.DataError, match="is in two of 'arm'"):
        crossed = data.assign(arm=np.where(data["time"] > 1, "a", "b"))
        jaxreml.fit("y ~ x", crossed, residual="us(time | arm/subject)")


def test_residuals_are_made_uncorrelated():
    fit = followed()
    V = dense(fit, fit.parameters)
    order = np.lexsort((fit.frame.residual.places, fit.frame.residual.codes))
    root = np.linalg.cholesky(V[np.ix_(order, order)])
    expected = np.linalg.solve(root, (fit.y - fit.fitted)[order])
    np.testing.assert_allclose(fit.residuals("normalized").to_numpy()[order], expected, rtol=1e-9)
    scaled = (fit.y - fit.fitted) / np.sqrt(np.diagonal(V))
    np.testing.assert_allclose(fit.residuals("scaled"), scaled, rtol=1e-10)


def test_simulated_responses_have_the_covariance():
    fit = followed()
    draws = fit.simulate(4000, seed=1).to_numpy() - fit.fitted[:, None]
    V = dense(fit, fit.parameters)
    error = np.sqrt((np.outer(np.diagonal(V), np.diagonal(V)) + V**2) / draws.shape[1])
    assert (np.abs(draws @ draws.T / draws.shape[1] - V) / error).max() < 5


def test_tables():
    fit = fitted(f"us{ON}")
    assert "us(AVISIT | USUBJID)" in fit.summary() and "VIS4" in fit.summary()
    components = fit.variance_components
    assert components["term"].tolist() == ["VIS1", "VIS2", "VIS3", "VIS4"]
    np.testing.assert_allclose(components["variance"], np.diagonal(fit.residual_cov))
    np.testing.assert_allclose(np.exp(components["log_variance"]), components["variance"])
    table = fit.variance_parameters()
    assert len(table) == 10 and (table["std_error"] > 0).all()
    z = np.arctanh(
        table.loc["cor_VIS2.VIS1|Residual", ["lower", "estimate", "upper"]].astype(float)
    )
    assert z.iloc[1] - z.iloc[0] == pytest.approx(z.iloc[2] - z.iloc[1])
    log = fit.variance_parameters("log")
    at = "z[Residual, VIS1, VIS2]"
    slope = 1 - np.tanh(log.loc[at, "estimate"]) ** 2
    assert table.loc["cor_VIS2.VIS1|Residual", "std_error"] == pytest.approx(
        slope * log.loc[at, "std_error"]
    )
    tidy = fit.tidy(conf_int=True)
    assert (tidy["group"] == "Residual").sum() == 10
    both = fitted(f"ar1{ON}", "FEV1 ~ ARMCD + AVISIT + (1 | USUBJID)")
    names = both.variance_parameters().index.tolist()
    assert names == ["sd_(Intercept)|USUBJID", "sigma", "cor_VIS2.VIS1|Residual"]
    assert list(both.random_effects) == ["USUBJID"] and both.dof == 5 + 3
    assert fit.random_effects == {} and fit.dof == 5 + 10


@pytest.mark.parametrize("random", ["", " + (1 | USUBJID)"])
def test_tables_for_papers_and_plots(random):
    family = "ar1h" if random else "us"
    fit = fitted(f"{family}{ON}", f"FEV1 ~ ARMCD + AVISIT{random}")
    text = fit.to_markdown()
    sds = fit.variance_parameters()
    for visit in ("VIS1", "VIS4"):
        (line,) = (own for own in text.splitlines() if f"Residual SD, {visit}" in own)
        assert f"{sds.loc[f'sd_{visit}|Residual', 'estimate']:.2f}" in line
    (line,) = (own for own in text.splitlines() if "correlation, VIS1, VIS2" in own)
    shown = line.split("|")[2].strip()  # with as many decimals as its error deserves
    expected = sds.loc["cor_VIS2.VIS1|Residual", "estimate"]
    assert len(shown) >= 4 and shown == f"{expected:.{len(shown) - 2}f}"
    assert "Groups: USUBJID" in text and "197" in text
    alone = fit.to_latex("random_effects", conf_level=0.9)
    assert "Residual SD, VIS4" in alone and "90\\% CI" in alone and "ARMCD[T" not in alone
    assert "Residual SD, VIS1" in fit._repr_html_() and "ARMCD" in fit.to_markdown("coefficients")
    axes = fit.plot(ax=Figure().subplots(2, 2).ravel())
    assert axes[3].get_visible() == bool(random)
    jaxreml.plots.effects(fit, "AVISIT", ax=Figure().subplots())
    if not random:
        with pytest.raises(jaxreml.DataError, match="no random effects to draw"):
            jaxreml.plots.caterpillar(fit)


def test_saved_and_read(tmp_path):
    fit = followed()
    fit.save(tmp_path / "fit.json")
    again = jaxreml.load(tmp_path / "fit.json")
    pd.testing.assert_frame_equal(again.residual_cov, fit.residual_cov)
    pd.testing.assert_frame_equal(again.coefficients(), fit.coefficients())
    new = pd.DataFrame({"x": [0.1], "subject": ["s01"], "time": [3.0]})
    pd.testing.assert_series_equal(again.predict(new), fit.predict(new))
    assert again.summary() == fit.summary()


def test_compared():
    table = jaxreml.compare(fitted(f"ar1{ON}"), fitted(f"ar1h{ON}"), fitted(f"us{ON}"), refit=False)
    assert table["df"].tolist()[1:] == [3, 5] and (table["p_value"].iloc[1:] < 0.05).all()
    assert table["chisq"].iloc[1] == pytest.approx(
        fitted(f"ar1{ON}").criterion - fitted(f"ar1h{ON}").criterion
    )
    other = jaxreml.compare(fitted(f"cs{ON}"), fitted(f"ar1h{ON}"), refit=False)
    assert "cs is no case of ar1h" in other["note"].iloc[1]
    plain = jaxreml.fit("FEV1 ~ ARMCD + AVISIT + (1 | USUBJID)", fev())
    mixed = jaxreml.compare(plain, fitted(f"ar1{ON}", plain.formula), refit=False)
    assert mixed["df"].iloc[1] == 1 and mixed["p_value"].iloc[1] < 0.5


def few() -> pd.DataFrame:
    """Five subjects at four visits: too few for any covariance matrix."""
    return small(2, subjects=5)


def test_covariances_in_turn(tmp_path):
    words = [f"{word}(time | subject)" for word in ("us", "toeph", "ar1", "cs")]
    fit = jaxreml.fit("y ~ x * time", few(), residual=words)
    alone = []
    for text in words:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jaxreml.ConvergenceWarning)
            try:
                alone.append(failure(jaxreml.fit("y ~ x * time", few(), residual=text)))
            except jaxreml.DataError as error:
                alone.append(str(error))
    place = alone.index(None)
    assert place > 0 and fit.residual.text == words[place]
    assert fit.residual_tried == tuple(zip(words[:place], alone[:place], strict=True))
    assert f"residual={words[0]!r} was tried and left: {alone[0]}" in fit.summary()
    fit.save(tmp_path / "fit.json")
    assert jaxreml.load(tmp_path / "fit.json").residual_tried == fit.residual_tried
    first = jaxreml.fit("y ~ x", small(3, subjects=25), residual=["ar1(time | subject)"])
    assert first.residual_tried == () and "tried" not in first.summary()


def test_none_of_the_covariances():
    words = [f"{word}(time | subject)" for word in ("us", "toeph")]
    with pytest.warns(jaxreml.ConvergenceWarning, match="none of us"):
        fit = jaxreml.fit("y ~ x * time", few(), residual=words, max_iterations=1)
    assert not fit.converged and fit.residual_tried[0][0] == words[0]
    with pytest.raises(ValueError, match="nothing to try"):
        jaxreml.fit("y ~ x", few(), residual=[])
    with pytest.raises(jaxreml.FormulaError, match="'un' is no"):
        jaxreml.fit("y ~ x", few(), residual=[words[0], "un(time | subject)"])


def test_bad_input():
    data = small()

    def fit(residual, own=data, **options):
        return jaxreml.fit("y ~ x", own, residual=residual, **options)

    for text in ("us", "us(time)", "us time | subject", 3, "us(time + x | subject)"):
        with pytest.raises(jaxreml.FormulaError, match="of the form"):
            fit(text)
    with pytest.raises(jaxreml.FormulaError, match="'un' is no residual covariance; there are us"):
        fit("un(time | subject)")
    with pytest.raises(jaxreml.FormulaError, match="'ou' is a word for random effects"):
        fit("ou(time | subject)")
    same = fit("homcs(time | subject)"), fit("cs(time | subject)")
    assert same[0].criterion == same[1].criterion and same[0].dof == same[1].dof
    with pytest.raises(jaxreml.FormulaError, match="same column"):
        fit("us(time | time)")
    with pytest.raises(
        jaxreml.DataError, match=r"'subjects' of the formula is not in the data.*subject"
    ):
        fit("us(time | subjects)")
    twice = pd.concat([data, data.iloc[[5]]], ignore_index=True)
    with pytest.raises(jaxreml.DataError, match=r"has time .* twice, the second in row"):
        fit("us(time | subject)", twice)
    with pytest.raises(jaxreml.DataError, match="needs numbers for 'word'"):
        fit("sp_exp(word | subject)", data.assign(word=data["time"].astype(str) + "h"))
    with pytest.raises(jaxreml.DataError, match="'time' has one value"):
        fit("us(time | subject)", data[data["time"] == 1])
    single = data.drop_duplicates("subject")
    with pytest.raises(jaxreml.DataError, match="no 'subject' has two visits"):
        fit("cs(time | subject)", single.assign(time=range(len(single))))
    many = pd.DataFrame({"y": np.random.default_rng(0).normal(size=300), "x": 1.0})
    many = many.assign(x=many["y"].round(), time=np.arange(300.0), subject=np.repeat(range(10), 30))
    with pytest.raises(jaxreml.DataError, match="300 different values"):
        fit("toep(time | subject)", many)
