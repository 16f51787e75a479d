"""Tests of fixed effects after a batch: those of single fits are the oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.errors import DataError

FORMULA = "~ f * x + z + (1 | g)"


@pytest.fixture(scope="module")
def study():
    rng = np.random.default_rng(5)
    codes = np.repeat(np.arange(20), 3 + rng.poisson(2, 20))
    n = codes.size
    data = pd.DataFrame(
        {
            "g": codes,
            "h": np.arange(n) % 4,
            "f": rng.choice(["a", "b", "c"], n),
            "x": rng.normal(size=n),
            "z": rng.normal(size=n),
        }
    )
    effects = rng.normal(size=(20, 8)) * rng.choice([0.0, 1.0], 8)
    y = pd.DataFrame(
        5 + effects[codes] + rng.normal(size=(n, 8)), columns=[f"y{k}" for k in range(8)]
    )
    y.iloc[2:5, 3] = np.nan
    y["y4"] = 1.0
    return data, y


def agree(results, names, L, df=None, rhs=0.0):
    joint = results.test(L, rhs, df)
    each = results.test(L, rhs, df, joint=False)
    terms = None if results.frame is None else results.anova(df=df)
    for name in names:
        single = results.estimate(name)
        own = df or results.model.df
        wanted = single.test(L, rhs, df=own).iloc[0]
        for column in ("statistic", "num_df", "den_df", "p_value"):
            np.testing.assert_allclose(joint.loc[name, column], wanted[column], rtol=1e-5)
        for label, row in single.test(L, rhs, df=own, joint=False).iterrows():
            for column in row.index:
                np.testing.assert_allclose(
                    each.loc[name, (label, column)], row[column], rtol=1e-5, atol=1e-9
                )
        if terms is not None:
            for term, row in single.anova(df=own).iterrows():
                for column in ("statistic", "num_df", "den_df", "p_value"):
                    np.testing.assert_allclose(
                        terms.loc[name, (term, column)], row[column], rtol=1e-5, atol=1e-12
                    )
    return joint


@pytest.mark.parametrize(
    ("formula", "method", "df"),
    [
        (FORMULA, "REML", None),
        ("~ x + f + (x | g)", "ML", "residual"),
        ("~ f + x + (1 | g) + (1 | h)", "REML", "satterthwaite"),
    ],
)
def test_after_a_batch(study, formula, method, df):
    data, y = study
    results = jaxreml.fit_many(formula, data, y, method)
    joint = agree(results, ["y0", "y3", "y7"], ["`f[T.b]` = `f[T.c]`", "x = 0.2"], df)
    assert joint.loc["y4"].isna().all()
    assert joint["p_adjusted"].min() >= joint["p_value"].min()


def test_of_jax_and_in_blocks(study):
    data, y = study
    results = jaxreml.fit_many("~ f + x + (1 | g)", data, y, engine="jax", batch_size=3)
    agree(results, ["y1", "y3", "y6"], np.eye(4)[1:3])


def test_of_own_weights_and_covariates(study):
    data, y = study
    weights = np.random.default_rng(2).uniform(0.5, 2, y.shape)
    weights[4, 0] = 0
    results = jaxreml.fit_many("~ f + x + (1 | g)", data, y, weights=weights)
    agree(results, ["y0", "y3"], ["`f[T.b]` = 0", "`f[T.c]` = 0"])
    snps = np.random.default_rng(3).normal(size=(len(data), 5))
    snps[3, 1] = np.nan
    results = jaxreml.fit_many("~ f + snp + x + (1 | g)", data, y[["y0"]], covariates={"snp": snps})
    agree(results, [0, 1, 4], ["snp = 0", "x = `f[T.b]`"])
    with pytest.raises(DataError, match="a covariate of each fit's own"):
        results.anova()


def test_refusals(study, tmp_path):
    data, y = study
    results = jaxreml.fit_many("~ x + (1 | g)", data, y, df="kenward-roger")
    with pytest.raises(ValueError, match="ask fit_many for contrasts"):
        results.test("x = 0")
    assert results.test("x = 0", df="inf")["den_df"].iloc[0] == np.inf
    with pytest.raises(DataError, match="q"):
        results.test("q = 0", df="inf")
    with pytest.raises(ValueError, match="kind must be"):
        results.anova("IV", df="inf")
    results.to_parquet(tmp_path / "r.parquet")
    read = jaxreml.BatchResults.read_parquet(tmp_path / "r.parquet")
    with pytest.raises(DataError, match="not at hand"):
        read.test("x = 0", df="inf")
