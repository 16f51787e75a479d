"""Weights and offsets of the responses' own: single fits are the oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.data.frame import covariate_frame
from jaxreml.errors import DataError
from jaxreml.many.engine import BatchFitter
from jaxreml.many.own_fitter import OwnFitter, fitter_for
from jaxreml.model.structures.grouped import Grouped
from jaxreml.status import Status

GROUPS = 20


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(GROUPS), 4 + rng.poisson(2, GROUPS))
    n = codes.size
    return pd.DataFrame(
        {
            "g": [f"g{code:02d}" for code in codes],
            "h": np.arange(n) % 5,
            "x": rng.normal(size=n),
            "z": rng.normal(size=GROUPS)[codes],
            "t": 3 + rng.normal(size=n),
        }
    )


def draw(data: pd.DataFrame, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Responses, a third of them without variance between groups, and weights of any scale."""
    rng = np.random.default_rng(seed)
    codes = pd.factorize(data["g"])[0]
    n = len(data)
    effects = rng.normal(size=(GROUPS, count)) * rng.choice([0.0, 0.7, 2.0], count)
    weights = rng.lognormal(0, 0.8, (n, count))
    values = 50 + effects[codes] + rng.normal(size=(n, count)) / np.sqrt(weights)
    return values, weights * rng.lognormal(0, 3, count)


def alone(formula, data, y, weights, method, **options):
    used = ~np.isnan(y) & (weights > 0)
    return jaxreml.fit(
        f"y {formula}", data.assign(y=y)[used], method, weights=weights[used], **options
    )


@pytest.mark.parametrize(
    ("formula", "method", "df"),
    [
        ("~ x + z + (1 | g)", "REML", "kenward-roger"),
        ("~ x + z + (t | g)", "ML", "satterthwaite"),
        ("~ x + (1 | g) + (0 + t | g)", "REML", "satterthwaite"),
        ("~ 0 + (1 | g)", "REML", "residual"),
    ],
)
def test_lanes_are_single_fits(data, formula, method, df):
    values, weights = draw(data, 30)
    weights[3, 5] = 0
    weights[data["g"] == "g02", 6] = 0
    values[4:9, 7] = weights[10, 8] = np.nan
    values[:, 9] = 4.0
    values[0, 10] = np.inf
    p = covariate_frame(formula, data).X.shape[1]
    values = values if p else values - 50  # no mean to take it up
    contrasts = np.ones((1, p))
    fitter = OwnFitter(
        covariate_frame(formula, data), method, df=df, contrasts=contrasts, modes=True
    )
    fits = fitter.fit(values, weights)
    assert fits.status[9:11].tolist() == [Status.CONSTANT, Status.INFINITE]
    assert np.delete(fits.status, [9, 10]).max() == 0 < fits.is_singular.sum()
    assert fits.n_missing[4:9].tolist() == [0, 1, sum(data["g"] == "g02"), 5, 1]
    for k in (0, 1, 2, 5, 6, 7, 8, 20, 29):
        single = alone(formula, data, values[:, k], weights[:, k], method)
        np.testing.assert_allclose(fits.criterion[k], single.criterion, rtol=1e-11)
        assert (fits.nobs[k], fits.is_singular[k]) == (single.nobs, single.is_singular)
        table = single.coefficients(df)
        for ours, theirs in (
            (fits.beta, single.beta),
            (fits.se, table["std_error"]),
            (fits.df, table["df"]),
            (fits.sigma, single.sigma),
            (fits.parameters_se, np.sqrt(np.diag(single.parameters_vcov_array))),
        ):
            np.testing.assert_allclose(ours[k], theirs, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(fits.theta[k], single.theta, rtol=1e-5, atol=1e-7)
        if p:
            test = single.test(contrasts[0], df=df, joint=False)
            np.testing.assert_allclose(fits.contrast_df[k], test["df"], rtol=1e-6)
        (modes,) = fits.modes[:1]
        present = single.groupings[0].levels
        places = [sorted(set(data["g"])).index(level) for level in present]
        np.testing.assert_allclose(modes[k][places], single.groupings[0].modes, atol=1e-6)


@pytest.mark.parametrize("formula", ["~ x + z + (t | g)", "~ x + (1 | g) + (1 | h)"])
def test_weights_of_the_model_are_those_of_every_response(data, formula):
    """Beside covariates of the fits' own, in lanes and one by one; of twelve decades."""
    rng = np.random.default_rng(11)
    weights = 10.0 ** rng.uniform(-6, 6, len(data))
    covariates = rng.normal(size=(len(data), 4))
    covariates[2, 3] = np.nan  # rows of its own: not with the others
    y = draw(data, 1)[0]
    own, same = (
        jaxreml.fit_many(f"{formula} + s", data, y, covariates={"s": covariates}, weights=w)
        for w in (weights, weights[:, None])
    )
    assert own.converged.all()
    for k in range(4):
        used = ~np.isnan(covariates[:, k])
        table = data.assign(y=y[:, 0], s=covariates[:, k], w=weights)[used]
        single = jaxreml.fit(f"y {formula} + s", table, weights="w")
        for found in (own, same):
            np.testing.assert_allclose(found.criterion.iloc[k], single.criterion, rtol=1e-10)
            np.testing.assert_allclose(found.params.iloc[k], single.params, rtol=1e-6)
            np.testing.assert_allclose(found.bse.iloc[k], single.bse, rtol=1e-6)
            np.testing.assert_allclose(
                found.log_variance_se.iloc[k], single.log_variance_se, rtol=1e-5
            )


@pytest.mark.long
def test_500_random_responses(data):
    for formula in ("~ x + z + (1 | g)", "~ x + (t | g)"):
        values, weights = draw(data, 500, seed=5)
        weights[np.random.default_rng(6).uniform(size=weights.shape) < 0.05] = 0
        fits = OwnFitter(covariate_frame(formula, data), "REML").fit(values, weights)
        for k in range(500):
            single = alone(formula, data, values[:, k], weights[:, k], "REML")
            assert abs(fits.criterion[k] - single.criterion) < 1e-8


def test_what_lanes_cannot_do_goes_alone(data):
    """Rows without a level of a factor of X, of one group, and hardly any; crossed factors."""
    data = data.assign(f=np.where(data["x"] > 0, "a", "b"))
    values, weights = draw(data, 4)
    weights[data["f"] == "a", 0] = 0
    weights[data["g"] != "g03", 1] = 0
    weights[5:, 2] = 0
    fits = OwnFitter(covariate_frame("~ f + (1 | g)", data), "REML").fit(values, weights)
    assert fits.status.tolist() == [0, Status.TOO_FEW_ROWS, Status.TOO_FEW_ROWS, 0]
    assert fits.rank[0] == 1 and np.isnan(fits.beta[0]).all()
    single = alone("~ 1 + (1 | g)", data, values[:, 0], weights[:, 0], "REML")
    np.testing.assert_allclose(fits.sigma[0], single.sigma, rtol=1e-8)
    crossed = OwnFitter(covariate_frame("~ x + (1 | g) + (1 | h)", data), "ML")
    fits = crossed.fit(values[:, 3:], weights[:, 3:])
    single = alone("~ x + (1 | g) + (1 | h)", data, values[:, 3], weights[:, 3], "ML")
    np.testing.assert_allclose(fits.criterion[0], single.criterion, rtol=1e-11)


@pytest.mark.parametrize(
    ("formula", "method", "df"),
    [
        ("~ f + x + (1 | g)", "REML", "kenward-roger"),
        ("~ f + x + (t | g)", "ML", "satterthwaite"),
    ],
)
def test_rows_of_their_own_are_as_engines_of_their_own(data, formula, method, df):
    """Values missing here and there: of every pattern by itself, and of all side by side."""
    data = data.assign(f=np.where(data["x"] > 0, "a", "b"))
    values, _ = draw(data, 40)
    values[np.random.default_rng(2).uniform(size=values.shape) < 0.1] = np.nan
    values[data["f"] == "b", 0] = np.nan
    values[data["g"] != "g03", 1] = np.nan
    values[:, 2] = np.nan
    values[~np.isnan(values[:, 3]), 3] = 4.0
    values[0, 4] = np.inf
    values[:, 5:25] = np.where(np.isnan(values[:, 5:6]), np.nan, draw(data, 20)[0])
    values[:, 25] = draw(data, 1)[0][:, 0]
    frame = covariate_frame(formula, data)
    options = {"df": df, "contrasts": np.array([[0, 1.0, -1.0]]), "modes": True}
    fitter = fitter_for(frame, method, own=False, **options)
    ours = fitter.fit(values)
    theirs = BatchFitter(frame, method, engine="numpy", **options).fit(values)
    assert sorted(set(ours.status)) == sorted(
        {Status.CONVERGED, Status.TOO_FEW_ROWS, Status.CONSTANT, Status.INFINITE}
    )
    for name in ("status", "rank", "n_missing", "nobs", "is_singular"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
    assert ours.rank[0] == 2 and np.isnan(ours.beta[0]).tolist() == [False, True, False]
    for name in ("criterion", "beta", "se", "df", "contrast", "contrast_se", "mean", "sigma"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), 1e-6, 1e-9)
    np.testing.assert_allclose(ours.modes[0], theirs.modes[0], atol=1e-6)
    whole = (ours.status == Status.CONVERGED) & (ours.rank == 3)
    again = {}
    for places, known, estimate in fitter.estimates(
        values, np.where(whole[:, None], ours.theta, np.nan)
    ):
        again |= zip(places, estimate.beta[np.argsort(known.coefficients)].T, strict=True)
    assert sorted(again) == np.flatnonzero(whole).tolist()
    for place, beta in again.items():
        np.testing.assert_allclose(beta, ours.beta[place], 1e-9)


def test_fit_many_takes_them_in_every_form(data, tmp_path):
    formula = "~ x + z + (1 | g)"
    values, weights = draw(data, 24)
    values[4:9, 7] = np.nan
    offset = np.random.default_rng(3).normal(size=values.shape)
    names = [f"gene{k}" for k in range(24)]
    table, own = (pd.DataFrame(part, columns=names) for part in (values, weights))
    results = jaxreml.fit_many(formula, data, table, weights=own, offset=offset)
    assert results.model.engine == "numpy" and results.converged.all()
    for k in (0, 7):
        single = results.estimate(k)
        np.testing.assert_allclose(results.criterion.iloc[k], single.criterion, rtol=1e-11)
        np.testing.assert_allclose(results.params.iloc[k], single.params, rtol=1e-7)
        by_hand = alone(formula, data, (values - offset)[:, k], weights[:, k], "REML")
        np.testing.assert_allclose(single.criterion, by_hand.criterion, rtol=1e-11)

    table.to_parquet(tmp_path / "y.parquet")
    own.to_parquet(tmp_path / "w.parquet")
    files = tmp_path / "y.parquet", tmp_path / "w.parquet"
    plain = jaxreml.fit_many(formula, data, table, weights=own)
    streamed = jaxreml.fit_many(
        formula, data, files[0], weights=files[1], output=tmp_path / "o.parquet", batch_size=7
    )
    read = jaxreml.BatchResults.read_parquet(streamed.path)
    np.testing.assert_allclose(read.criterion, plain.criterion, rtol=1e-12)
    assert read.model.own == ("weights",) and results.model.own == ("weights", "offset")
    with pytest.raises(DataError, match="offset of its own"):
        results.fitted_values(random=False)
    with pytest.raises(DataError, match="weights of its own"):
        next(plain.simulated_blocks())

    def blocks(matrix):
        return ((names[k : k + 9], matrix[:, k : k + 9]) for k in range(0, 24, 9))

    again = jaxreml.fit_many(formula, data, blocks(values), weights=blocks(weights))
    np.testing.assert_allclose(again.criterion, plain.criterion, rtol=1e-12)
    same = np.repeat(weights[:, :1], 24, axis=1)
    shared = jaxreml.fit_many(formula, data, table, weights=same)
    once = jaxreml.fit_many(formula, data, table, weights=weights[:, 0])
    np.testing.assert_allclose(shared.criterion, once.criterion, rtol=1e-11)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.iloc[:, :2], "weights have 2 columns and there are 3 responses"),
        (lambda w: w[w.columns[::-1]], "other names than the responses: 'c' in the place of 'a'"),
        (lambda w: w.assign(b=-1.0), "that of response 'b' in row 0 is -1"),
        (lambda w: w.assign(b=0.0), "all weights of response 'b' are zero or missing"),
        (lambda w: w.iloc[:-1], r"the data have \d+ rows and the weights \d+"),
        (lambda w: w.assign(b="x"), "not numeric"),
        (lambda w: iter([(["a"], w[["a"]].to_numpy())]), "weights end before the responses do"),
    ],
)
def test_weights_that_do_not_fit(data, spoil, message):
    values, weights = draw(data, 3)
    table, own = (pd.DataFrame(part, columns=list("abc")) for part in (values, weights))
    with pytest.raises(DataError, match=message):
        jaxreml.fit_many("~ x + (1 | g)", data, table, weights=spoil(own))


def test_weights_of_their_own_are_numpys(data):
    values, weights = draw(data, 2)
    with pytest.raises(ValueError, match="leave engine and devices out"):
        jaxreml.fit_many("~ x + (1 | g)", data, values, weights=weights, engine="jax")


def test_the_certificate_sees_a_wrong_slope(data, monkeypatch):
    slope = Grouped.slope

    def wrong(self, projection):
        return -slope(self, projection) if self.lanes else slope(self, projection)

    monkeypatch.setattr(Grouped, "slope", wrong)
    values, weights = draw(data, 3)
    fits = OwnFitter(covariate_frame("~ x + (1 | g)", data), "REML").fit(values, weights)
    single = alone("~ x + (1 | g)", data, values[:, 2], weights[:, 2], "REML")
    # What lanes do not find goes alone, where the slope is right.
    assert not fits.status.any()
    np.testing.assert_allclose(fits.criterion[2], single.criterion, rtol=1e-11)
