"""Residuals, leverage, Cook's distance and influence against lme4 and dense computations."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from fits import fitted
from references import reference

import jaxreml
from jaxreml import DataError, LMMResults
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.unstructured import unstructured

FIGURES = json.loads((references.HERE / "predictions" / "predictions.json").read_text())[
    "influence"
]


@functools.cache
def small(method: str) -> LMMResults:
    rng = np.random.default_rng(4)
    g = np.repeat(np.arange(8), [3, 4, 5, 6, 6, 7, 8, 9])
    table = {"x": rng.normal(size=48), "w": rng.uniform(0.5, 2, 48), "g": g}
    b = rng.normal(size=(8, 2))
    table["y"] = 1 + b[g, 0] + (2 + b[g, 1]) * table["x"] + rng.normal(size=48)
    with jax.enable_x64(True):
        return jaxreml.fit("y ~ x + offset(w) + (x | g)", table, method, weights="w")


def marginal_covariance(fit: LMMResults) -> np.ndarray:
    """V0, dense."""
    weights = np.ones(fit.nobs) if fit.weights is None else fit.weights
    V = np.diag(1 / weights)
    relative, start = fit.cov_re.to_numpy() / fit.sigma**2, 0
    for term in fit.frame.terms:
        stop = start + len(term.effect_names)
        same = term.codes[:, None] == term.codes
        V += (term.effects @ relative[start:stop, start:stop] @ term.effects.T) * same
        start = stop
    return V


class TestRows:
    @pytest.mark.parametrize(
        ("name", "method"),
        [
            ("sleep_corr", "REML"),
            ("sleep_corr", "ML"),
            ("weights_offset", "REML"),
            ("zero_slope", "REML"),
            ("machines", "REML"),
        ],
    )
    def test_lme4(self, name, method):
        figures = reference(name)["fits"][method]
        fit = fitted(name, method)
        np.testing.assert_allclose(fit.leverage()[:10], figures["hat_head"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(fit.cooks_distance()[:10], figures["cooks_head"], rtol=1e-5)

    def test_structures_agree(self):
        for other in (fitted("sleep_corr", structure=s) for s in ("crossed", "dense")):
            fit = fitted("sleep_corr")
            np.testing.assert_allclose(other.leverage(), fit.leverage(), rtol=1e-6)
            np.testing.assert_allclose(other.dfbetas(), fit.dfbetas(), rtol=1e-5, atol=1e-8)

    def test_residuals(self):
        fit = fitted("weights_offset")
        root = np.sqrt(fit.weights)
        np.testing.assert_allclose(fit.residuals(), fit.resid)
        np.testing.assert_allclose(fit.residuals("pearson"), fit.resid * root)
        np.testing.assert_allclose(fit.residuals("scaled"), fit.resid * root / fit.sigma)
        leave = np.sqrt(1 - fit.leverage())
        np.testing.assert_allclose(
            fit.residuals("studentized"), fit.resid * root / fit.sigma / leave
        )
        marginal = fit.y - fit.frame.X @ fit.beta - fit.offset
        np.testing.assert_allclose(fit.residuals("marginal"), marginal, atol=1e-12)
        with pytest.raises(ValueError, match="deviance"):
            fit.residuals("deviance")

    def test_dfbetas(self):
        """Least squares without one row, in the covariance of the fit."""
        fit = fitted("weights_offset")
        V, X, y = marginal_covariance(fit), fit.frame.X, fit.y - fit.offset
        found = fit.dfbetas()
        for k in (0, 57, 199):
            kept = np.arange(fit.nobs) != k
            inverse = np.linalg.inv(V[np.ix_(kept, kept)])
            phi = np.linalg.inv(X[kept].T @ inverse @ X[kept])
            beta = phi @ X[kept].T @ inverse @ y[kept]
            scaled = (beta - fit.beta) / (fit.sigma * np.sqrt(np.diagonal(phi)))
            np.testing.assert_allclose(found.iloc[k], scaled, rtol=1e-7)


class TestExactInfluence:
    @pytest.mark.parametrize("name", list(FIGURES))
    def test_lme4(self, name):
        figures = FIGURES[name]
        fit = fitted(name)
        found = fit.influence(figures["by"])
        assert found.refits["converged"].all()
        assert found.refits["rows"].sum() == fit.nobs
        order = [list(map(str, found.params.index)).index(k) for k in figures["levels"]]
        scale = fit.bse.to_numpy()
        change = found.params.to_numpy()[order]
        np.testing.assert_allclose(change / scale, figures["change"] / scale, atol=1e-5)
        np.testing.assert_allclose(found.dfbetas.to_numpy()[order], figures["dfbetas"], atol=1e-5)
        cooks = np.sum(change @ np.linalg.inv(fit.vcov_array) * change, axis=1) / len(scale)
        np.testing.assert_allclose(found.cooks_distance.to_numpy()[order], cooks)
        positions = unstructured(tuple(len(g.effects) for g in fit.groupings)).positions
        after = (fit.parameters + found.parameters.to_numpy()[order])[:, positions]
        np.testing.assert_allclose(after, np.log(figures["variances"]), atol=2e-4)

    def test_rows_and_other_groups(self):
        fit = fitted("sleep_corr")
        rows = fit.influence()
        assert len(rows.params) == 180
        other = jaxreml.fit(fit.formula, fit.table.drop(index=7))
        np.testing.assert_allclose(rows.params.loc[7], other.beta - fit.beta, atol=1e-7)
        np.testing.assert_allclose(
            rows.parameters.loc[7], other.parameters - fit.parameters, atol=1e-6
        )
        labels = np.where(fit.table["Days"] < 5, "early", "late")
        halves = fit.influence(labels)
        assert list(halves.params.index) == ["early", "late"]
        late = jaxreml.fit(fit.formula, fit.table[labels == "late"])
        np.testing.assert_allclose(halves.params.loc["early"], late.beta - fit.beta, rtol=1e-6)
        with pytest.raises(DataError, match=r"'nothing' is no .* Subject, Reaction, Days"):
            fit.influence("nothing")
        with pytest.raises(ValueError, match="180 rows"):
            fit.influence(np.ones(3))
        with pytest.raises(ValueError, match="exact"):
            fit.influence(method="quick")

    def test_crossed_fits_are_those_of_the_dense_structure(self):
        batch = fitted("machines").influence("Worker")
        single = fitted("machines", structure="dense").influence("Worker")
        np.testing.assert_allclose(single.params, batch.params, atol=1e-6)
        np.testing.assert_allclose(single.parameters, batch.parameters, atol=1e-5)
        np.testing.assert_allclose(single.dfbetas, batch.dfbetas, atol=1e-6)
        assert list(single.refits["message"]) == list(batch.refits["message"])

    def test_refits_that_cannot_be_made(self):
        fit = fitted("sleep_corr")
        labels = np.where(fit.table["Subject"].astype(str) == "308", "one", "others")
        found = fit.influence(labels)
        assert list(found.refits["converged"]) == [True, False]
        assert found.params.loc["others"].isna().all()
        assert "too few" in found.refits["message"]["others"]

    def test_coefficients_that_other_levels_would_stand_in_for(self):
        """Without a factor's first level a refit's intercept is that of another level."""
        found = fitted("machines").influence("Machine")
        assert found.refits["converged"].all()
        assert found.params.loc["A"].isna().all() and found.dfbetas.loc["A"].isna().all()
        assert list(found.params.loc["C"].isna()) == [False, False, True]
        assert "rows: Machine[T.C]" in found.refits["message"]["C"]


@functools.cache
def derivatives(fit: LMMResults) -> tuple[np.ndarray, np.ndarray, Callable]:
    """Of a criterion with V written out: its Hessian, d beta / d params, and the criterion's
    gradient and beta without some rows. Three programs for a fit."""
    frame, p = fit.frame, len(fit.beta)
    weights = np.ones(fit.nobs) if fit.weights is None else fit.weights
    y = fit.y if fit.offset is None else fit.y - fit.offset
    sizes = tuple(len(term.effect_names) for term in frame.terms)
    same = [term.codes[:, None] == term.codes for term in frame.terms]

    def solution(params, keep):
        """The criterion of some rows and beta; the others become independent of them."""
        omega, log_sigma2 = unstructured(sizes).natural(params)
        V = jnp.diag(1 / jnp.asarray(weights))
        matrices = natural.symmetric_matrices(omega, sizes)
        for term, matrix, here in zip(frame.terms, matrices, same, strict=True):
            V += (term.effects @ matrix @ term.effects.T) * here
        V = jnp.where(keep[:, None] & keep, V, jnp.eye(fit.nobs))
        X, rest = frame.X * keep[:, None], y * keep
        information = X.T @ jnp.linalg.solve(V, X)
        beta = jnp.linalg.solve(information, X.T @ jnp.linalg.solve(V, rest))
        rest = rest - X @ beta
        value = keep.sum() * log_sigma2 + jnp.linalg.slogdet(V)[1]
        value += rest @ jnp.linalg.solve(V, rest) / jnp.exp(log_sigma2)
        if fit.method == "REML":
            value += jnp.linalg.slogdet(information)[1] - p * log_sigma2
        return value, beta

    at, every = jnp.asarray(fit.parameters), np.ones(fit.nobs, bool)
    hessian = jax.jit(jax.hessian(lambda params: solution(params, every)[0]))(at)
    by_params = jax.jit(jax.jacfwd(lambda params: solution(params, every)[1]))(at)
    slope_and_beta = jax.jit(jax.grad(solution, has_aux=True))
    return np.asarray(hessian), np.asarray(by_params), lambda keep: slope_and_beta(at, keep)


class TestFirstOrder:
    """Against a criterion with V written out, by automatic differentiation."""

    def expected(self, fit: LMMResults, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hessian, by_params, without = derivatives(fit)
        found = []
        for k in range(codes.max() + 1):
            slope, beta = without(codes != k)
            step = -np.linalg.solve(hessian, slope)
            found.append((beta - fit.beta + by_params @ step, step))
        of_beta, of_params = map(np.array, zip(*found, strict=True))
        return of_beta, of_params

    def check(self, fit: LMMResults, by: object, codes: np.ndarray) -> None:
        beta, params = self.expected(fit, codes)
        found = fit.influence(by, "first-order")
        np.testing.assert_allclose(found.params, beta, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.parameters, params, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("groups", "method"),
        [
            ("rows", "REML"),
            pytest.param("rows", "ML", marks=pytest.mark.long),
            pytest.param("levels", "REML", marks=pytest.mark.long),
            ("levels", "ML"),
            ("pairs of levels", "REML"),
            pytest.param("pairs of levels", "ML", marks=pytest.mark.long),
            pytest.param("parts of levels", "REML", marks=pytest.mark.long),
            ("parts of levels", "ML"),
        ],
    )
    def test_one_factor(self, method, groups):
        fit = small(method)
        levels = fit.table["g"].to_numpy()
        codes = {
            "rows": np.arange(fit.nobs),
            "levels": levels,
            "pairs of levels": levels // 2,
            "parts of levels": np.arange(fit.nobs) % 5,
        }[groups]
        self.check(fit, None if groups == "rows" else codes, codes)

    @pytest.mark.parametrize(
        ("method", "by"),
        [("REML", "Worker"), pytest.param("ML", "Worker", marks=pytest.mark.long), ("REML", None)],
    )
    def test_crossed_factors(self, method, by):
        fit = fitted("machines", method)
        assert fit.structure == "dense"
        codes = np.arange(fit.nobs)
        self.check(fit, by, codes if by is None else fit.frame.terms[-1].codes)

    def test_follows_the_exact_one(self):
        for name, by in (("sleep_corr", "Subject"), ("penicillin", "plate")):
            exact, first = fitted(name).influence(by), fitted(name).influence(by, "first-order")
            for kind in ("params", "parameters"):
                for column, values in getattr(exact, kind).items():
                    assert np.corrcoef(values, getattr(first, kind)[column])[0, 1] > 0.99

    def test_boundary_and_refusals(self, monkeypatch):
        found = fitted("corr_one").influence("g", "first-order")
        assert found.parameters.iloc[:, 2].isna().all()  # the correlation
        assert found.parameters.iloc[:, [0, 1, 3]].notna().all(axis=None)
        assert found.params.notna().all(axis=None)
        halves = fitted("machines").influence("Machine", "first-order")
        assert halves.params.isna().all(axis=None)  # no Machine without its rows
        assert halves.parameters.isna().all(axis=None)
        flat = replace(fitted("corr_one"), parameters_vcov_array=np.full((4, 4), np.nan))
        with pytest.raises(ValueError, match="singular"):
            flat.influence("g", "first-order")
        monkeypatch.setattr("jaxreml.inference.rows.influence_derivatives.MAX_DENSE_BYTES", 1000)
        with pytest.raises(ValueError, match="random effects of crossed factors needs"):
            fitted("machines").influence("Worker", "first-order")
