"""Many responses with a covariance of residuals within subjects: each as `fit` has it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.many.engine import BatchFitter
from jaxreml.many.host import HostEngine


def trial(
    visits: int = 4, responses: int = 5, subjects: int = 25
) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(visits)
    data = pd.DataFrame(
        [(f"s{i:02d}", float(t)) for i in range(subjects) for t in range(visits)],
        columns=["subject", "time"],
    )
    data["x"], data["w"] = rng.normal(size=len(data)), rng.uniform(0.5, 2, len(data))
    data = data[rng.random(len(data)) > 0.15].reset_index(drop=True)
    shared = rng.normal(size=(subjects, responses))[pd.Categorical(data["subject"]).codes]
    noise = rng.normal(size=(len(data), responses)) * (1 + data[["time"]].to_numpy() / 3)
    values = shared + noise
    values[[3, 10], 1] = np.nan
    return data, values


@pytest.mark.parametrize(
    ("family", "random", "weights", "visits", "df"),
    [
        ("us", "", None, 4, "satterthwaite"),
        ("ar1h", "", None, 4, "kenward-roger"),
        ("cs", "", "w", 4, "kenward-roger-sas"),
        ("ar1", " + (1 | subject)", None, 3, "satterthwaite"),
        ("toep", "", None, 6, "kenward-roger"),
    ],
)
def test_each_is_a_fit(family, random, weights, visits, df):
    data, values = trial(visits)
    residual = f"{family}(time | subject)"
    options = {"residual": residual, "weights": weights}
    found = jaxreml.fit_many(
        f"~ x{random}", data, values, df=df, contrasts={"c": "2 * x"}, **options
    )
    for k in (0, 1, 4):
        own = data.assign(y=values[:, k]).dropna()
        fit = jaxreml.fit(f"y ~ x{random}", own, **options)
        table, fits = fit.coefficients(df), found.fits
        assert fits.status[k] == 0 and fits.n_missing[k] == len(data) - len(own)
        assert fits.criterion[k] == pytest.approx(fit.criterion, rel=1e-11)
        for left, right in (
            (fits.beta[k], fit.beta),
            (fits.se[k], table["std_error"]),
            (fits.df[k], table["df"]),
            (fits.theta[k], fit.theta),
            (fits.parameters[k], fit.parameters),
            (fits.parameters_se[k], np.sqrt(np.diagonal(fit.parameters_vcov_array))),
            (found.variances.iloc[k], fit.variances),
            (found.log_variances.iloc[k], fit.log_variances),
            (found.log_variance_se.iloc[k], fit.log_variance_se),
            (found.residual_cov(k), fit.residual_cov),
        ):
            np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-10)
        assert list(found.variances.columns) == list(fit.variances.index)
        assert found.model.parameter_names == fit.parameter_names
        assert found.dof.iloc[k] == fit.dof and found.aic.iloc[k] == pytest.approx(fit.aic)
        if df == "satterthwaite":
            assert fits.contrast_df[k, 0] == pytest.approx(table["df"]["x"], rel=1e-8)
            assert fits.contrast_se[k, 0] == pytest.approx(2 * table["std_error"]["x"])
    again = found.estimate(0)
    assert again.residual is not None and again.criterion == pytest.approx(found.fits.criterion[0])
    assert "z[Residual" in " ".join(found.to_frame().columns)
    assert residual.split("(")[0] in found.model.residual.text and found.summary()


def test_few_visits_go_side_by_side():
    data, values = trial()
    frame = jaxreml.data.frame.covariate_frame("~ x", data, residual="us(time | subject)")
    assert isinstance(BatchFitter(frame).engine, HostEngine)
    larger = jaxreml.fit_many("~ x", data, values, "ML", residual="us(time | subject)")
    smaller = jaxreml.fit_many("~ x", data, values, "ML", residual="ar1(time | subject)")
    table = jaxreml.compare(smaller, larger)
    assert (table["df"] == 8).all() and (table["chisq"] > 0).all()


def test_what_is_not_there_says_so():
    data, values = trial()
    options = {"residual": "cs(time | subject)"}
    found = jaxreml.fit_many("~ x", data, values, **options)
    for ask in (
        lambda: found.moderated(),
        lambda: found.variance_fractions,
        lambda: found.residual_df,
        lambda: next(iter(found.simulated_blocks())),
    ):
        with pytest.raises(jaxreml.DataError, match="so far"):
            own = ask()
            if callable(own):
                own()
    with pytest.raises(ValueError, match="results stay in memory"):
        jaxreml.fit_many("~ x", data, values, output="/tmp/never.parquet", **options)
    with pytest.raises(ValueError, match="no weights= of the responses' own"):
        jaxreml.fit_many("~ x", data, values, weights=np.ones_like(values), **options)
    with pytest.raises(ValueError, match="are NumPy's"):
        jaxreml.fit_many("~ x", data, values, engine="jax", **options)
    plain = jaxreml.fit_many("~ x + (1 | subject)", data, values)
    with pytest.raises(jaxreml.DataError, match="residuals are independent"):
        plain.residual_cov(0)
