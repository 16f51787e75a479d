"""Predictions: the encodings of the fit, lme4's figures, and variances by the dense equations."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
import references
from fits import fitted
from references import data, reference

import jaxreml
from jaxreml import DataError, FormulaError, LMMResults
from jaxreml.optimum.effects import row_variances

FIGURES = json.loads((references.HERE / "predictions" / "predictions.json").read_text())


def henderson(fit: LMMResults) -> np.ndarray:
    """sigma2 times the inverse of the coefficients of the mixed model equations, dense."""
    frame = fit.frame
    Z = dense_rows(fit, [(term.codes, term.effects) for term in frame.terms])
    weights = np.ones(fit.nobs) if fit.weights is None else fit.weights
    root = np.sqrt(weights)[:, None]
    start = 0
    relative = fit.cov_re.to_numpy() / fit.sigma**2
    blocks = []
    for term in frame.terms:
        stop = start + len(term.effect_names)
        blocks.append(np.kron(np.eye(len(term.levels)), relative[start:stop, start:stop]))
        start = stop
    omega = np.zeros((Z.shape[1],) * 2)
    start = 0
    for block in blocks:
        omega[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    p = frame.X.shape[1]
    # Var(b_hat - b) through V, so that a singular Omega is nothing special
    XZ = np.column_stack([frame.X, Z]) * root
    X, Z = XZ[:, :p], XZ[:, p:]
    inverse = np.linalg.inv(np.eye(fit.nobs) + Z @ omega @ Z.T)
    phi = np.linalg.inv(X.T @ inverse @ X)
    shift = omega @ Z.T @ inverse @ X
    K = omega - omega @ Z.T @ inverse @ Z @ omega
    return fit.sigma**2 * np.block(
        [[phi, -phi @ shift.T], [-shift @ phi, K + shift @ phi @ shift.T]]
    )


def dense_rows(fit: LMMResults, rows) -> np.ndarray:
    """Rows of Z, level by level within a term."""
    parts = []
    for (codes, effects), term in zip(rows, fit.frame.terms, strict=True):
        k, q = effects.shape
        part = np.zeros((k, len(term.levels), q))
        part[np.arange(k), codes] = effects
        parts.append(part.reshape(k, -1))
    return np.concatenate(parts, axis=1)


class TestVariances:
    @pytest.mark.parametrize(
        ("name", "structure"),
        [
            ("sleep_corr", None),
            ("sleep_unc", None),
            ("weights_offset", None),
            ("zero_slope", None),
            ("crossed_nested", None),
            ("penicillin", "dense"),
            ("nested_slash", None),
            ("penicillin", None),
        ],
    )
    def test_rows_not_in_the_data(self, name, structure):
        """Any levels together, pupils in other schools than their own too."""
        fit = fitted(name, structure=structure)
        rng = np.random.default_rng(1)
        k = 60
        rows = [
            (rng.integers(0, len(term.levels), k), rng.normal(size=(k, len(term.effect_names))))
            for term in fit.frame.terms
        ]
        X = rng.normal(size=(k, len(fit.beta)))
        whole = np.column_stack([X, dense_rows(fit, rows)])
        expected = np.sum(whole @ henderson(fit) * whole, axis=1)
        found = fit.sigma**2 * row_variances(fit.henderson, fit.design, X, rows)
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_blocks_of_rows(self, monkeypatch):
        fit = fitted("crossed_nested")
        expected = fit.leverage()
        figures = reference("crossed_nested")["fits"]["REML"]
        np.testing.assert_allclose(expected[:10], figures["hat_head"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(fit.cooks_distance()[:10], figures["cooks_head"], rtol=1e-5)
        monkeypatch.setattr("jaxreml.model.structures.crossed.posterior.ROW_ENTRIES", 500)
        np.testing.assert_allclose(fit.leverage(), expected, rtol=1e-12)

    @pytest.mark.parametrize("name", ["sleep_corr", "penicillin"])
    def test_glmmtmb(self, name):
        figures = FIGURES["se"][name]
        fit = fitted(name)
        se = fit.predict(interval="confidence")["std_error"][:12]
        np.testing.assert_allclose(se, figures["joint"], rtol=1e-5)
        none = fit.predict(re_form="~0", interval="confidence")["std_error"][:12]
        np.testing.assert_allclose(none, figures["fixed"], rtol=1e-5)
        # predict(se.fit = TRUE) adds the uncertainty of the variance parameters
        assert (se < np.array(figures["reported"])).all()
        assert (se > 0.8 * np.array(figures["reported"])).all()

    def test_new_level_and_left_out_effects(self):
        fit = fitted("sleep_corr")
        new = pd.DataFrame({"Days": [0.0, 2.5, 12.0], "Subject": ["a", "a", "b"]})
        x = np.column_stack([np.ones(3), new["Days"]])
        own = np.sum(x @ fit.vcov_array * x, axis=1)
        between = np.sum(x @ fit.cov_re.to_numpy() * x, axis=1)
        known = {"allow_new_levels": True}
        se = fit.predict(new, interval="confidence", **known)["std_error"]
        np.testing.assert_allclose(se**2, own + between)
        whole = fit.predict(new, interval="prediction", **known)
        np.testing.assert_allclose(whole["std_error"] ** 2, own + between + fit.sigma**2)
        without = fit.predict(new[["Days"]], "~0", interval="prediction")
        pd.testing.assert_frame_equal(without, whole)
        half = whole["upper"] - whole["prediction"]
        np.testing.assert_allclose(half, 1.959963984540054 * whole["std_error"])
        np.testing.assert_allclose(whole["prediction"] - whole["lower"], half)
        one = fit.predict(new, "~ (1 | Subject)", interval="confidence", **known)
        np.testing.assert_allclose(one["std_error"] ** 2, own + fit.cov_re.iloc[0, 0])
        with pytest.raises(ValueError, match="whole terms"):
            fit.predict(new, "~ (1 | Subject)", interval="prediction", **known)

    def test_intervals_cover(self):
        """Conditional means and new observations of data drawn from a fitted model."""
        fit = fitted("sleep_corr")
        rng = np.random.default_rng(5)
        frame, hits, runs = fit.frame, np.zeros(2), 40
        root = np.linalg.cholesky(fit.cov_re.to_numpy())
        term = frame.terms[0]
        for _ in range(runs):
            b = rng.normal(size=(len(term.levels), 2)) @ root.T
            mean = frame.X @ fit.beta + np.sum(term.effects * b[term.codes], axis=1)
            y, again = mean + fit.sigma * rng.normal(size=(2, fit.nobs))
            other = jaxreml.fit(fit.formula, fit.table.assign(Reaction=y))
            for k, (kind, target) in enumerate((("confidence", mean), ("prediction", again))):
                bounds = other.predict(interval=kind)
                hits[k] += ((bounds["lower"] < target) & (target < bounds["upper"])).mean()
        assert (np.abs(hits / runs - 0.95) < 0.025).all()


class TestLme4:
    @pytest.mark.parametrize("name", list(FIGURES["predict"]))
    def test_newdata(self, name):
        figures = FIGURES["predict"][name]
        fit, new = fitted(name), pd.DataFrame(figures["newdata"])
        if "replicate" in new:
            with pytest.raises(DataError, match=r"'replicate' of newdata is numeric.*'1'"):
                fit.predict(new, allow_new_levels=True)
            new["replicate"] = new["replicate"].astype(str)
        found = fit.predict(new, allow_new_levels=True)
        np.testing.assert_allclose(found, figures["all"], rtol=1e-6)
        fixed = new.drop(columns=[c for c in ("Subject", "batch", "cask", "replicate") if c in new])
        if fixed.shape[1]:
            np.testing.assert_allclose(fit.predict(fixed, "~0"), figures["none"], rtol=1e-7)
        if "batch" in figures:
            batch = fit.predict(new, "~ (1 | batch)", allow_new_levels=True)
            np.testing.assert_allclose(batch, figures["batch"], rtol=1e-6)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 180
    table = pd.DataFrame(
        {
            "x": rng.normal(3, 2, n),
            "f": rng.choice(["a", "b", "c"], n),
            "k": rng.choice([10, 20, 30], n),
            "o": rng.normal(size=n),
            "g": np.repeat(np.arange(15), 12),
            "h": np.tile(["u", "v", "w"], 60),
        }
    )
    table["double"] = 2 * table["x"]
    table["y"] = table["x"] + rng.normal(size=15)[table["g"]] + rng.normal(size=n)
    return table


@pytest.fixture(scope="module")
def fit(table) -> LMMResults:
    formula = (
        "y ~ poly(x, 2) + double + C(k) * center(o) + bs(o, df=4) + f + offset(log(x ** 2)) "
        "+ (1 + scale(x) | g:h) + (1 | g)"
    )
    with jax.enable_x64(True):
        return jaxreml.fit(formula, table)


class TestEncodings:
    def test_some_rows_in_another_order(self, fit, table, tmp_path):
        assert fit.aliased
        part = table.sample(9, random_state=1).drop(columns="y")
        expected = fit.fittedvalues[part.index]
        np.testing.assert_allclose(fit.predict(part), expected)
        assert list(fit.predict(part).index) == list(part.index)
        np.testing.assert_allclose(fit.predict(pl.from_pandas(part)), expected)
        np.testing.assert_allclose(fit.predict(part.to_dict("list")), expected)
        np.testing.assert_allclose(fit.predict(part.astype({"g": float})), expected)
        np.testing.assert_allclose(fit.predict(part.astype({"f": "category"})), expected)
        np.testing.assert_allclose(fit.predict(), fit.fitted)
        np.testing.assert_allclose(fit.predict(re_form="~0"), fit.fixed_fitted)
        whole = fit.predict(part, interval="prediction")
        pd.testing.assert_frame_equal(whole, fit.predict(interval="prediction").loc[part.index])
        fit.save(tmp_path / "fit.json")
        loaded = LMMResults.load(tmp_path / "fit.json")
        pd.testing.assert_frame_equal(loaded.predict(part, interval="prediction"), whole)

    def test_terms_add_up(self, fit):
        of_term = [
            fit.predict(re_form=f"~ ({e} | {g})") for e, g in (("scale(x)", "g:h"), (1, "g"))
        ]
        total = sum(part - fit.fixed_fitted for part in of_term)
        np.testing.assert_allclose(total + fit.fixed_fitted, fit.fitted)
        one = fit.predict(re_form="~ (1 | g)", interval="prediction")
        given = fit.predict(re_form="~ (1 | g)", interval="confidence")
        z, sigma = fit.frame.terms[0].effects, fit.cov_re.to_numpy()[:2, :2]
        more = one["std_error"] ** 2 - given["std_error"] ** 2
        np.testing.assert_allclose(more, np.sum(z @ sigma * z, axis=1) + fit.sigma**2)

    def test_missing_values(self, fit, table):
        part = table[:4].copy()
        part.loc[0, "x"] = np.nan
        part["h"] = part["h"].astype(object)
        part.loc[2, "h"] = None
        found = fit.predict(part)
        np.testing.assert_allclose(found[[1, 3]], fit.fitted[[1, 3]])
        assert found[[0, 2]].isna().all()
        assert not fit.predict(part, "~0").isna()[2]
        assert fit.predict(part[:1]).isna().all()
        assert fit.predict(part[:1], interval="confidence").isna().all(axis=None)
        assert fit.predict(table[:0]).empty

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"f": "z"}, "'f' has the level 'z', which the fit has not seen"),
            ({"f": 1.0}, "'f' has the level 1.0"),
            ({"k": 11}, "'k' has the level 11.*10"),
            ({"g": 99}, r"'99:u' of 'g:h' in row 0 .* allow_new_levels"),
            ({"x": "1"}, "'x' of newdata is not numeric.*'1'"),
            ({"x": np.inf}, "'x' has 4 infinite"),
            ({"g": "0"}, "'g' of newdata is not numeric .*'0'"),
            ({"x": 0.0}, "not finite in row 0"),
            ({"o": 99.0}, "bs"),
            ({"f": None}, None),
        ],
    )
    def test_refused_values(self, fit, table, change, message):
        part = table[:4].assign(**change)
        if message is None:
            assert fit.predict(part).isna().all()
            return
        with pytest.raises(DataError, match=message):
            fit.predict(part)

    def test_refused_arguments(self, fit, table):
        for re_form, message in (
            ("~ (1 | f)", "'f'; the fit has random effects on 'g:h', 'g'"),
            ("~ (o | g)", "the effect 'o' of 'g'"),
            ("~ x + (1 | g)", "random terms only"),
            ("1 | g", "~"),
            (3, "not 3"),
        ):
            with pytest.raises(FormulaError, match=message):
                fit.predict(table, re_form)
        with pytest.raises(DataError, match=r"no column 'double'.*did you mean"):
            fit.predict(table.rename(columns={"double": "doubles"}))
        with pytest.raises(ValueError, match="interval"):
            fit.predict(table, interval="normal")
        with pytest.raises(ValueError, match="level"):
            fit.predict(table, conf_level=95)
        with pytest.raises(ValueError, match="newdata"):
            fit.predict(weights=np.ones(180))


def test_weights_and_offset():
    table = data("weights_offset")
    with jax.enable_x64(True):
        fit = jaxreml.fit("y ~ x + (x | g)", table, weights="w", offset="o")
    np.testing.assert_allclose(fit.fitted, fitted("weights_offset").fitted)
    new = table[:5]
    np.testing.assert_allclose(fit.predict(new, offset="o"), fit.fitted[:5])
    with pytest.raises(ValueError, match="offset of the new rows"):
        fit.predict(new)
    with pytest.raises(ValueError, match="prior weights"):
        fit.predict(new, offset="o", interval="prediction")
    ones = fit.predict(new, offset="o", interval="prediction", weights=np.ones(5))["std_error"]
    confidence = fit.predict(new, offset="o", interval="confidence")["std_error"]
    np.testing.assert_allclose(ones**2 - confidence**2, fit.sigma**2)
    own = fit.predict(interval="prediction")["std_error"][:5]
    np.testing.assert_allclose(own**2 - confidence**2, fit.sigma**2 / table["w"][:5])
    with pytest.raises(DataError, match="weights must be positive"):
        fit.predict(new, offset="o", weights=np.zeros(5))


def test_no_fixed_effects():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"g": np.repeat(np.arange(10), 5)})
    table["y"] = rng.normal(size=10)[table["g"]] + rng.normal(size=50)
    with jax.enable_x64(True):
        fit = jaxreml.fit("y ~ 0 + (1 | g)", table)
    ratio = float(fit.theta[0]) ** 2
    se = fit.predict(table[:1], interval="confidence")["std_error"]
    assert se[0] ** 2 == pytest.approx(fit.sigma**2 * ratio / (1 + 5 * ratio))
    with pytest.raises(ValueError, match="no fixed effects"):
        fit.cooks_distance()


CODINGS = (
    "y ~ f * k + x + (1 | g)",
    "y ~ C(k, Treatment('r')) * C(f, Treatment('c')) + x + (1 | g)",
)


@pytest.fixture(scope="module")
def gappy():
    rng = np.random.default_rng(11)
    n = 120
    f, k = rng.choice(list("abc"), n), rng.choice(list("pqr"), n)
    data = pd.DataFrame({"f": f, "k": k, "g": rng.integers(0, 12, n), "x": rng.normal(size=n)})
    data = data[~((data.f == "c") & (data.k == "r"))].reset_index(drop=True)
    data["y"] = rng.normal(size=12)[data.g] + rng.normal(size=len(data))
    return data


@pytest.fixture(scope="module")
def codings(gappy):
    return [jaxreml.fit(formula, gappy) for formula in CODINGS]


class TestNotEstimable:
    """What the data do not determine is NaN, and nothing depends on the coding."""

    @pytest.mark.parametrize("interval", [None, "confidence", "prediction"])
    @pytest.mark.parametrize("re_form", [None, "~0"])
    def test_a_cell_without_data(self, codings, interval, re_form):
        new = pd.DataFrame(
            {"f": ["c", "c", "a", None], "k": ["r", "p", "r", "r"], "x": 0.5, "g": 1},
            index=["empty", "one", "two", "missing"],
        )
        found = []
        for fit in codings:
            with pytest.warns(jaxreml.EstimabilityWarning, match=r"1 row.*'empty'.*depend on"):
                values = fit.predict(new, re_form=re_form, interval=interval)
            found.append(pd.DataFrame(values))
            assert found[-1].loc["empty"].isna().all()
            assert found[-1].loc[["one", "two"]].notna().all(axis=None)
        np.testing.assert_allclose(*found, rtol=1e-8)

    def test_rows_of_the_fit_have_no_warning(self, codings, gappy):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = codings[0].predict(gappy)
        np.testing.assert_allclose(again, codings[0].fitted, rtol=1e-10)

    def test_a_column_that_depends_on_others(self, gappy):
        fit = jaxreml.fit("y ~ f + x + z + (1 | g)", gappy.assign(z=3 * gappy["x"] + 1))
        new = {"f": ["a", "a"], "g": [1, 1], "x": [0.5, 0.5], "z": [2.5, 2.0]}
        with pytest.warns(jaxreml.EstimabilityWarning, match="1 row.*: z"):
            values = fit.predict(new)
        assert np.isfinite(values[0]) and np.isnan(values[1])

    def test_emmeans_agrees(self, codings):
        table = codings[0].emmeans(["f", "k"]).table
        assert table["estimate"].isna().sum() == 1
        with pytest.warns(jaxreml.EstimabilityWarning):
            values = codings[0].predict(
                table[["f", "k"]].assign(x=codings[0].table["x"].mean()), re_form="~0"
            )
        np.testing.assert_allclose(values, table["estimate"], rtol=1e-9)
