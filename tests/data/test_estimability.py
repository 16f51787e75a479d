"""`fit_many`: what the rows of a response say nothing about has no estimate, the rest has one."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import FormulaError, fit, fit_many
from jaxreml.data.estimability import RowSpace
from jaxreml.data.frame import covariate_frame
from jaxreml.inference.fixed.wald import each

FORMULA = "~ arm + (1 | g)"
CONTRASTS = {
    "b-a": {"arm[T.b]": 1},
    "b-c": "`arm[T.b]` - `arm[T.c]`",
    "mean of b": [1, 1, 0],
    "mean": [1, 1 / 3, 1 / 3],
}


@pytest.fixture(scope="module")
def data():
    """Three arms within each of 12 groups."""
    k = np.arange(72) % 6
    arm = np.where(k < 2, "a", np.where(k < 4, "b", "c"))
    return pd.DataFrame({"g": np.repeat(np.arange(12), 6), "arm": arm})


@pytest.fixture(scope="module")
def values(data):
    """All rows; all of the reference level missing; all of another; one row of each left out."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=72) + 2.0 * (data["arm"] == "b") + rng.normal(size=12)[data["g"]]
    patterns = [data["arm"] == "", data["arm"] == "a", data["arm"] == "c", data.index < 3]
    return np.column_stack([np.where(pattern, np.nan, y) for pattern in patterns])


@pytest.fixture(scope="module")
def results(data, values):
    with jax.enable_x64(True):
        return fit_many(FORMULA, data, values, contrasts=CONTRASTS)


def test_row_space_is_that_of_ranks():
    """A row is in it if it does not raise the rank, whatever the units of the columns."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        rank = int(rng.integers(1, 5))
        X = rng.integers(-2, 3, size=(9, rank)) @ rng.integers(-2, 3, size=(rank, 5))
        units = 10.0 ** rng.integers(-6, 7, size=5)
        kept: list[int] = []
        for k in range(5):
            if np.linalg.matrix_rank(X[:, [*kept, k]]) > len(kept):
                kept.append(k)
        L = np.vstack([np.eye(5), X[:3], X[:2] + np.eye(5)[4], np.zeros(5)])
        expected = [np.linalg.matrix_rank(np.vstack([X, row])) == len(kept) for row in L]
        found = RowSpace(X * units, np.array(kept, int)).contains(L * units)
        assert found.tolist() == expected


def test_a_level_without_rows_lends_its_name_to_no_other_comparison(data, values, results):
    """Without the reference level the coefficients have no estimate, and the others' contrast has;
    `fit` codes these rows by their own levels and gives the same numbers."""
    assert results.converged.all()
    known = results.params.notna().to_numpy()
    assert known.tolist() == [[True] * 3, [False] * 3, [True, True, False], [True] * 3]
    for table in (results.bse, results.tvalues, results.df, results.pvalues):
        np.testing.assert_array_equal(table.notna(), known)
    estimable = results.contrasts.xs("estimate", axis=1, level=1).notna()
    assert estimable.loc[1].tolist() == [False, True, True, False]
    assert estimable.loc[2].tolist() == [True, False, True, False]
    alone = fit(f"y {FORMULA}", data.assign(y=values[:, 1]))
    with pytest.warns(UserWarning, match=r"\(Intercept\), arm\[T.c\], are not those of"):
        assert results.estimate(1).params.to_dict() == alone.params.to_dict()
    found = results.contrasts["b-c"].loc[1]
    assert found["estimate"] == pytest.approx(-alone.params["arm[T.c]"], rel=1e-8)
    assert results.contrasts["mean of b"].loc[1, "estimate"] == pytest.approx(alone.params.iloc[0])
    row = results.contrasts["b-a"].loc[2]
    assert row["estimate"] == results.params.loc[2, "arm[T.b]"]


def test_what_is_not_estimable_is_said_and_not_counted(data, values, results, tmp_path):
    message = results.message[1]
    assert message.startswith("converged")
    assert message.endswith("not missing: (Intercept), arm[T.b], arm[T.c], b-a, mean")
    assert results.message[2].endswith(": arm[T.c], b-c, mean")
    assert "estimable" not in results.message[0] + results.message[3]
    assert results.fits.rank.tolist() == [3, 2, 2, 3]
    glance = results.glance()
    assert glance["message"].tolist() == results.message.tolist()
    for i in (1, 2):
        single = fit(f"y {FORMULA}", data.assign(y=values[:, i]))
        for name in ("aic", "bic", "df_residual", "nobs"):
            assert glance.loc[i, name] == pytest.approx(single.glance()[name].item())
    tidy = results.tidy(("fixed", "contrasts", "ran_pars"), conf_int=True)
    some = tidy[(tidy["response"] == 1) & (tidy["effect"] != "ran_pars")]
    columns = ["estimate", "std_error", "statistic", "df", "p_value", "p_adjusted", "conf_low"]
    expected = ~some["term"].isin(["b-c", "mean of b"])
    for name in columns:
        np.testing.assert_array_equal(some[name].isna(), expected, err_msg=name)
    # Adjusted over the responses that have one
    adjusted = results.pvalues_adjusted["arm[T.c]"]
    assert adjusted.isna().tolist() == [False, True, True, False]
    assert adjusted.max() <= 2 * results.pvalues["arm[T.c]"].max()
    # Streamed, in blocks of two, and read again
    streamed = fit_many(
        FORMULA, data, values, contrasts=CONTRASTS, batch_size=2, output=tmp_path / "out.parquet"
    )
    again = streamed.read()
    written = pd.read_parquet(streamed.path)
    frame = results.to_frame()
    assert written.columns.tolist() == frame.columns.tolist()
    for name in ("p_adjusted[arm[T.b]]", "contrast_p_adjusted[b-c]"):  # over both blocks
        np.testing.assert_allclose(written[name], frame[name], rtol=1e-6)
    of_contrast = results.contrasts["b-c"]["p_adjusted"]
    np.testing.assert_array_equal(frame["contrast_p_adjusted[b-c]"], of_contrast)
    assert again.message.tolist() == results.message.tolist()
    assert pd.read_parquet(streamed.path)["message"].tolist() == results.message.tolist()
    for name in ("beta", "se", "df", "contrast", "contrast_se", "contrast_df", "rank"):
        np.testing.assert_allclose(getattr(again.fits, name), getattr(results.fits, name), 1e-6)


@pytest.mark.parametrize("df", ["satterthwaite", "kenward-roger", "residual", "inf"])
def test_degrees_of_freedom_of_what_is_left(data, values, results, df):
    if df != "satterthwaite":
        results = fit_many(FORMULA, data, values, contrasts=CONTRASTS, df=df)
    for i, hypothesis in ((1, "`arm[T.c]` = 0"), (2, "`arm[T.b]` = 0")):
        single = fit(f"y {FORMULA}", data.assign(y=values[:, i]))
        expected = each(single, hypothesis, df=df).iloc[0]
        name, sign = (("b-c", -1), ("b-a", 1))[i - 1]
        found = results.contrasts[name].loc[i]
        assert sign * found["estimate"] == pytest.approx(expected["estimate"], rel=1e-6)
        for column in ("std_error", "df", "p_value"):
            assert found[column] == pytest.approx(expected[column], rel=1e-5), column
    assert results.contrasts["b-a"].loc[1].isna().all()
    assert results.pvalues.loc[1].isna().all()


def test_columns_aliased_in_all_rows(data):
    """An empty cell of a * b drops a column for all; a response lacks another cell. Estimable
    coefficients are those of a generalised inverse of its own rows."""
    rng = np.random.default_rng(5)
    data = data.assign(sex=np.where(np.arange(72) % 2, "f", "m"))
    data = data[~((data["arm"] == "c") & (data["sex"] == "f"))].reset_index(drop=True)
    formula = "~ arm * sex + (1 | g)"
    y = rng.normal(size=len(data)) + rng.normal(size=12)[data["g"]]
    gone = (data["arm"] == "b") & (data["sex"] == "m")
    values = np.column_stack(
        [y, np.where(gone, np.nan, y), np.where(data["arm"] == "a", np.nan, y)]
    )
    results = fit_many(formula, data, values, contrasts={"c in m": [0, 0, 1, 0, 0]})
    frame = covariate_frame(formula, data)
    assert len(results.model.aliased) == 1
    Z = np.eye(12)[data["g"]]
    for i in range(3):
        kept = ~np.isnan(values[:, i])
        X, rank = frame.X[kept], np.linalg.matrix_rank(frame.X[kept])
        V = np.eye(kept.sum()) + results.fits.theta[i, 0] ** 2 * Z[kept] @ Z[kept].T
        inverse = np.linalg.inv(V)
        beta = np.linalg.pinv(X.T @ inverse @ X) @ X.T @ inverse @ values[kept, i]
        rows = np.vstack([np.eye(5), [0, 0, 1, 0, 0]])
        within = np.array([np.linalg.matrix_rank(np.vstack([X, row])) == rank for row in rows])
        found = np.append(results.params.iloc[i], results.contrasts["c in m"]["estimate"].iloc[i])
        np.testing.assert_allclose(found, np.where(within, rows @ beta, np.nan), rtol=1e-7)
        assert results.fits.rank[i] == rank
    assert results.params.notna().sum(axis=1).tolist() == [5, 4, 0]


def test_functions_of_the_data_keep_their_meaning(data, values):
    """`scale` is of all rows for all responses; a single fit takes its own, and says so."""
    data = data.assign(x=np.sin(np.arange(72)))
    results = fit_many("~ scale(x) + (1 | g)", data, values[:, [0, 3]])
    fixed = (data["x"] - data["x"].mean()) / data["x"].std()
    single = fit("y ~ x + (1 | g)", data.assign(y=values[:, 3], x=fixed))
    np.testing.assert_allclose(results.params.iloc[1], single.params, rtol=1e-6)
    with pytest.warns(UserWarning, match="functions of the data have other values"):
        results.estimate(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.estimate(0)


def test_contrasts_of_nothing_are_refused(data, values):
    with pytest.raises(FormulaError, match="'none' has no coefficient other than zero"):
        fit_many(FORMULA, data, values, contrasts={"none": [0, 0, 0]})


def test_no_fixed_effects(data, values, tmp_path):
    """A model without X: nothing to test, and everything else as ever."""
    results = fit_many("~ 0 + (1 | g)", data, values)
    single = fit("y ~ 0 + (1 | g)", data.assign(y=values[:, 1]))
    assert results.criterion[1] == pytest.approx(single.criterion)
    assert results.params.shape == results.pvalues_adjusted.shape == (4, 0)
    assert len(results.tidy(conf_int=True)) == 8
    assert results.glance()["df_residual"].tolist() == [70, 46, 46, 67]
    assert all(message == results.message[0] for message in results.message)
    results.to_parquet(tmp_path / "none.parquet")
    again = jaxreml.BatchResults.read_parquet(tmp_path / "none.parquet")
    assert again.params.shape == (4, 0)
    assert results.to_xarray().sizes["term"] == 0
