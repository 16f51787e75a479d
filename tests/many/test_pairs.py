"""A covariate of each fit's own, and pairs of responses and covariates: single fits are the
oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.errors import DataError, FormulaError
from jaxreml.status import Status

DONORS, FORMULA = 40, "~ age + X + (1 | donor)"


@pytest.fixture(scope="module")
def study():
    """Donors with four rows, genotypes of donors, and three responses."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(DONORS), 4)
    n = codes.size
    data = pd.DataFrame(
        {
            "donor": [f"d{code:02d}" for code in codes],
            "age": rng.normal(size=DONORS)[codes],
            "t": rng.normal(size=n),
            "w": rng.uniform(0.5, 2, n),
        }
    )
    genotypes = rng.integers(0, 3, (DONORS, 30))[codes].astype(float)
    x = pd.DataFrame(genotypes, columns=[f"snp{k}" for k in range(30)])
    effects = rng.normal(size=(DONORS, 3)) * [1.0, 0.3, 0.0]
    y = pd.DataFrame(20 + effects[codes] + rng.normal(size=(n, 3)), columns=list("abc"))
    return data, y, x


def alone(formula, data, y, x, **options):
    used = ~(y.isna() | x.isna())
    table = data.assign(y=y, X=x)[used.to_numpy()]
    if "weights" in options:
        options["weights"] = options["weights"][used.to_numpy()]
    return jaxreml.fit(f"y {formula}", table, **options)


def assert_same(results, k, single, df="satterthwaite"):
    np.testing.assert_allclose(results.criterion.iloc[k], single.criterion, rtol=1e-11)
    table = single.coefficients(df)
    for ours, theirs in (
        (results.params, single.params),
        (results.bse, table["std_error"]),
        (results.df, table["df"]),
    ):
        np.testing.assert_allclose(ours.iloc[k], theirs, rtol=1e-6, atol=1e-10)
    assert results.nobs.iloc[k] == single.nobs


@pytest.mark.parametrize(
    ("formula", "shared", "df"),
    [
        (FORMULA, False, "kenward-roger"),
        ("~ X + age + t + (t | donor)", True, "satterthwaite"),
    ],
)
def test_one_response_with_many(study, formula, shared, df):
    data, y, x = study
    x = x.copy()
    x.iloc[5, 3] = np.nan
    x["snp7"], x["snp8"] = 2.0, 1 - data["age"]
    x.iloc[2, 9] = np.inf
    options = {"weights": data["w"].to_numpy()} if shared else {}
    results = jaxreml.fit_many(
        formula, data, y[["a"]], covariates={"X": x}, df=df, contrasts={"X": {"X": 2}}, **options
    )
    assert results.responses.tolist() == x.columns.tolist()
    wanted = dict.fromkeys((7, 8), Status.RANK_DEFICIENT) | {9: Status.INFINITE}
    assert results.status.tolist() == [wanted.get(k, 0) for k in range(30)]
    for k in (0, 3, 29):
        single = alone(formula, data, y["a"], x.iloc[:, k], **options)
        assert_same(results, k, single, df)
        np.testing.assert_allclose(
            results.contrasts["X", "estimate"].iloc[k], 2 * single.params["X"], rtol=1e-6
        )
    again = results.estimate("snp3")
    np.testing.assert_allclose(again.criterion, results.criterion.iloc[3], rtol=1e-11)


def test_pairs(study):
    data, y, x = study
    pairs = [("a", "snp1"), ("c", "snp25"), ("a", "snp2")]
    results = jaxreml.fit_many(FORMULA, data, y, covariates={"X": x}, pairs=pairs)
    assert results.responses.tolist() == ["a:snp1", "c:snp25", "a:snp2"]
    for k, (response, snp) in enumerate(pairs):
        assert_same(results, k, alone(FORMULA, data, y[response], x[snp]))
    by_place = jaxreml.fit_many(
        FORMULA, data, y, covariates={"X": x}, pairs=np.array([[0, 1], [2, 25], [0, 2]])
    )
    np.testing.assert_array_equal(by_place.criterion, results.criterion)
    matched = jaxreml.fit_many(
        FORMULA, data, y, covariates={"X": x.iloc[:, :3].to_numpy()}, pairs="matched"
    )
    assert_same(matched, 1, alone(FORMULA, data, y["b"], x["snp1"]))
    every = jaxreml.fit_many(FORMULA, data, y, covariates={"X": x}, pairs="all", batch_size=17)
    assert len(every) == 90 and every.converged.all()
    assert_same(every, 65, alone(FORMULA, data, y["c"], x["snp5"]))
    own = np.random.default_rng(4).uniform(0.5, 2, y.shape)
    weighted = jaxreml.fit_many(FORMULA, data, y, covariates={"X": x}, pairs=pairs, weights=own)
    assert_same(weighted, 1, alone(FORMULA, data, y["c"], x["snp25"], weights=own[:, 2]))


def test_streams_and_files(study, tmp_path):
    data, y, x = study
    plain = jaxreml.fit_many(FORMULA, data, y[["a"]], covariates={"X": x})
    blocks = (
        (x.columns[k : k + 8].tolist(), x.iloc[:, k : k + 8].to_numpy()) for k in range(0, 30, 8)
    )
    streamed = jaxreml.fit_many(FORMULA, data, y[["a"]], covariates={"X": blocks})
    np.testing.assert_allclose(streamed.criterion, plain.criterion, rtol=1e-13)
    np.save(tmp_path / "x.npy", x.to_numpy().astype(np.int8))
    out = tmp_path / "o.parquet"
    jaxreml.fit_many(
        FORMULA, data, y["a"].to_numpy(), covariates={"X": tmp_path / "x.npy"}, output=out
    )
    read = jaxreml.BatchResults.read_parquet(out)
    np.testing.assert_allclose(read.criterion, plain.criterion, rtol=1e-13)


def test_crossed_factors_go_one_by_one(study):
    data, y, x = study
    data = data.assign(batch=np.arange(len(data)) % 6)
    formula = "~ age + X + (1 | donor) + (1 | batch)"
    results = jaxreml.fit_many(formula, data, y[["a"]], covariates={"X": x.iloc[:, :2]})
    assert_same(results, 1, alone(formula, data, y["a"], x["snp1"]))


@pytest.mark.long
def test_500_random_pairs(study):
    data, y, _ = study
    rng = np.random.default_rng(8)
    x = pd.DataFrame(rng.normal(size=(len(data), 500)))
    x = x.mask(rng.uniform(size=x.shape) < 0.002)
    results = jaxreml.fit_many(FORMULA, data, y[["b"]], covariates={"X": x})
    for k in range(500):
        single = alone(FORMULA, data, y["b"], x[k])
        assert abs(results.criterion.iloc[k] - single.criterion) < 1e-8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"formula": "~ age * X + (1 | donor)"}, FormulaError, "a term of the formula by itself"),
        ({"formula": "~ age + (1 | donor)"}, FormulaError, "a term of the formula by itself"),
        ({"formula": "~ age + X + (X | donor)"}, FormulaError, "or random slopes"),
        ({"responses": "abc"}, ValueError, "3 responses and 30 covariates: say which go together"),
        ({"responses": "abc", "pairs": "some"}, ValueError, 'must be "all", "matched" or a list'),
        ({"responses": "abc", "pairs": "matched"}, DataError, "with 3 responses and 30 covariates"),
        ({"pairs": [("a", "snp99")]}, DataError, "'snp99' is none of the covariates"),
        ({"pairs": [("z", "snp9")]}, DataError, "'z' is none of the responses"),
        ({"pairs": [(0, 30)]}, DataError, "no position 30 among 30 covariates"),
        ({"pairs": [("a", "snp1")] * 2}, DataError, "the pair 'snp1' repeats"),
        ({"pairs": ["a"]}, DataError, "a list of pairs"),
        ({"column": "X"}, DataError, "'X' is a column of the data too"),
        ({"rows": 3}, DataError, "160 rows and the covariates 3"),
    ],
)
def test_what_does_not_fit(study, change, error, message):
    data, y, x = study
    if "column" in change:
        data = data.assign(X=1.0)
    with pytest.raises(error, match=message):
        jaxreml.fit_many(
            change.get("formula", FORMULA),
            data,
            y[list(change.get("responses", "a"))],
            covariates={"X": x.iloc[: change.get("rows")]},
            pairs=change.get("pairs"),
        )


def test_pairs_need_covariates(study):
    data, y, x = study
    with pytest.raises(ValueError, match="give covariates="):
        jaxreml.fit_many("~ age + (1 | donor)", data, y, pairs="all")
    with pytest.raises(ValueError, match="one name with its matrix"):
        jaxreml.fit_many(FORMULA, data, y, covariates={"X": x, "Z": x})
