"""Score tests at the null: generalised least squares by dense algebra is the oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

import jaxreml
from jaxreml.errors import DataError


@pytest.fixture(scope="module")
def study():
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(25), 2 + rng.poisson(2, 25))
    n = codes.size
    data = pd.DataFrame({"g": codes, "age": rng.normal(size=n), "w": rng.uniform(0.5, 2, n)})
    data["t"] = rng.normal(size=n)
    y = pd.DataFrame(
        3 + rng.normal(size=(25, 2))[codes] + rng.normal(size=(n, 2)), columns=["a", "b"]
    )
    x = pd.DataFrame(rng.integers(0, 3, (n, 6)).astype(float), columns=[f"s{k}" for k in range(6)])
    return data, y, x


def dense(fit, x):
    """Estimate, standard error and p at the variance ratio of a fit, from V = I / w + Z S Z'."""
    frame = fit.frame
    weights = np.ones(fit.nobs) if fit.weights is None else fit.weights
    V = np.diag(1 / weights)
    (term,) = frame.terms
    Z = term.effects @ relative(fit, len(term.effect_names))
    V = V + (Z @ Z.T) * np.equal.outer(term.codes, term.codes)
    X = np.column_stack([frame.X, x])
    inverse = np.linalg.inv(V)
    gram = np.linalg.inv(X.T @ inverse @ X)
    y = fit.y if fit.offset is None else fit.y - fit.offset
    beta = gram @ X.T @ inverse @ y
    rest = y - X @ beta
    df = len(y) - X.shape[1]
    error = np.sqrt(gram[-1, -1] * (rest @ inverse @ rest) / df)
    return beta[-1], error, df, 2 * student.sf(abs(beta[-1] / error), df)


def relative(fit, q):
    """The relative Cholesky factor of a fit with one term of q effects."""
    factor = np.zeros((q, q))
    factor.T[np.triu_indices(q)] = fit.theta
    return factor


@pytest.mark.parametrize(
    ("formula", "weighted"), [("~ age + (1 | g)", False), ("~ age + offset(t) + (t | g)", True)]
)
def test_one_response(study, formula, weighted):
    data, y, x = study
    own = y["a"].copy()
    own.iloc[[2, 9]] = np.nan
    x = x.assign(s4=1.0)
    x.iloc[5, 1] = np.nan
    found = jaxreml.score_tests(formula, data, own.to_frame(), x, weights="w" if weighted else None)
    used = own.notna().to_numpy()
    fit = jaxreml.fit(f"y {formula}", data.assign(y=own)[used], weights="w" if weighted else None)
    assert found.loc["s4"].drop("n_missing").isna().all()
    assert found["n_missing"].tolist() == [0, 1, 0, 0, 0, 0]
    for name in ("s0", "s1", "s5"):
        values = x.loc[used, name].fillna(x.loc[used, name].mean()).to_numpy()
        estimate, error, df, p_value = dense(fit, values)
        row = found.loc[name]
        np.testing.assert_allclose(
            row[["estimate", "std_error", "df", "p_value"]].astype(float),
            [estimate, error, df, p_value],
            rtol=1e-6,
        )


def test_pairs_and_streams(study):
    data, y, x = study
    formula = "~ age + (1 | g)"
    each = [jaxreml.score_tests(formula, data, y[[name]], x) for name in "ab"]
    every = jaxreml.score_tests(formula, data, y, x, pairs="all")
    assert every.index.tolist() == [f"{name}:s{k}" for name in "ab" for k in range(6)]
    np.testing.assert_allclose(every, pd.concat(each), rtol=1e-10)
    some = jaxreml.score_tests(formula, data, y, x, pairs=[("b", "s3"), ("a", "s1")])
    np.testing.assert_allclose(some.loc["b:s3"], each[1].loc["s3"], rtol=1e-10)
    blocks = (([f"s{k}"], x[[f"s{k}"]].to_numpy()) for k in range(6))
    streamed = jaxreml.score_tests(formula, data, y[["a"]], blocks)
    np.testing.assert_allclose(streamed, each[0], rtol=1e-10)
    full = jaxreml.fit_many("~ age + X + (1 | g)", data, y[["a"]], covariates={"X": x})
    assert np.corrcoef(np.log(full.pvalues["X"]), np.log(each[0]["p_value"]))[0, 1] > 0.99


def test_refusals(study):
    data, y, x = study
    crossed = data.assign(h=np.arange(len(data)) % 5)
    with pytest.raises(DataError, match="one grouping factor"):
        jaxreml.score_tests("~ age + (1 | g) + (1 | h)", crossed, y[["a"]], x)
    constant = jaxreml.score_tests("~ age + (1 | g)", data, y[["a"]].assign(a=1.0), x)
    assert constant["p_value"].isna().all()
