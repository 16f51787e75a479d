"""marginaleffects against the engine's own marginal means, slopes and tests."""

from __future__ import annotations

import marginaleffects
import numpy as np
import pandas as pd
import polars as pl
import pytest
import watchdog
from marginaleffects import datagrid
from scipy.special import ndtr

import jaxreml
from jaxreml import marginaleffects as ours
from jaxreml.marginaleffects import ModelJaxreml

ORTHODONT = jaxreml.datasets.load("orthodont").iloc[4:99].drop(index=[20, 31, 57])  # unbalanced
MACHINES = jaxreml.datasets.load("machines").iloc[2:]
POLARS_2 = int(pl.__version__.split(".")[0]) >= 2
with_factors = pytest.mark.skipif(
    POLARS_2, reason="marginaleffects 0.6.0 calls methods of factors that polars 2 has not"
)
METHODS = ("satterthwaite", "kenward-roger", "residual", "inf")
COLUMNS = ["estimate", "std_error", "df", "statistic", "p_value"]


@pytest.fixture(scope="module")
def growth():
    return jaxreml.fit("distance ~ age * Sex + (1 | Subject)", ORTHODONT)


@pytest.fixture(scope="module")
def machines():
    return jaxreml.fit("score ~ Machine + (1 | Worker)", MACHINES)


def agree(found, expected, rtol=1e-5):
    """Rows of the package and of a pandas table with our columns."""
    found = found.data if hasattr(found, "data") else found
    own = found.select([*COLUMNS, "conf_low", "conf_high"]).to_numpy()
    columns = [*COLUMNS, "lower", "upper"]
    np.testing.assert_allclose(own, expected[columns].to_numpy(float), rtol=rtol, atol=1e-12)


def in_order(table, name, found):
    """The rows of a pandas table in the order of the package's."""
    return table.set_index(name).loc[found[name].to_list()]


@pytest.mark.parametrize("df", METHODS)
class TestTests:
    @with_factors
    def test_slopes_are_emtrends(self, growth, df):
        found = ours.avg_slopes(growth, variables="age", by="Sex", df=df).data
        agree(found, in_order(growth.emtrends("Sex", "age", df=df).table, "Sex", found))

    @with_factors
    def test_predictions_are_emmeans(self, growth, df):
        at = {"age": [9, 13]}
        table = growth.emmeans(["Sex", "age"], at=at, df=df).table
        grid = table[["Sex", "age"]].assign(age=table["age"].astype(float))
        for newdata in (grid, pl.from_pandas(grid)):
            agree(ours.predictions(growth, newdata=newdata, df=df), table)

    @with_factors
    def test_comparisons_are_contrasts(self, machines, df):
        found = ours.avg_comparisons(machines, variables={"Machine": "revpairwise"}, df=df).data
        expected = machines.emmeans("Machine", df=df).contrast("pairwise", adjust="none")
        texts = [text.replace("mean(", "").replace(")", "") for text in found["contrast"]]
        assert sorted(texts) == sorted(expected["contrast"])
        agree(found, expected.set_index("contrast").loc[texts])

    def test_hypotheses_are_tests(self, machines, df):
        agree_columns = ["estimate", "std_error", "df", "statistic", "p_value"]
        found = ours.hypotheses(machines, df=df).data
        expected = machines.coefficients(df)
        assert found["term"].to_list() == list(expected.index)
        np.testing.assert_allclose(
            found.select(agree_columns).to_numpy(), expected[agree_columns], rtol=1e-6
        )
        found = ours.hypotheses(machines, hypothesis="b2 - b1 = 0", df=df).data
        expected = machines.test("`Machine[T.C]` - `Machine[T.B]`", df=df, joint=False)
        np.testing.assert_allclose(
            found.select(agree_columns).to_numpy(), expected[agree_columns], rtol=1e-6
        )


@with_factors
def test_every_row_has_its_own_degrees_of_freedom(growth):
    found = ours.predictions(growth, newdata=ORTHODONT.iloc[:10]).data
    assert found["df"].n_unique() > 1
    expected = growth.emmeans(["Sex", "age"], at={"age": [8, 10, 12, 14]}).table
    rows = found.to_pandas().merge(expected, on=["Sex", "age"], suffixes=("", "_own"))
    assert len(rows) == 10
    np.testing.assert_allclose(rows["df"], rows["df_own"], rtol=1e-6)


def test_nonlinear_functions_have_the_delta_methods_error(growth):
    found = ours.hypotheses(growth, hypothesis="b1 / b0 = 0").data
    b, V = growth.beta, growth.vcov_array
    slope = np.zeros(len(b))
    slope[0], slope[1] = -b[1] / b[0] ** 2, 1 / b[0]
    np.testing.assert_allclose(found["estimate"][0], b[1] / b[0], rtol=1e-12)
    np.testing.assert_allclose(found["std_error"][0], np.sqrt(slope @ V @ slope), rtol=1e-5)
    ratio = ours.avg_comparisons(growth, variables="age", comparison="ratio").data
    assert 1 < ratio["estimate"][0] < 1.1 and ratio["std_error"][0] > 0


@with_factors
def test_options_of_the_package(growth):
    plain = ours.avg_slopes(growth, variables="age", conf_level=0.9).data
    changed = ours.avg_slopes(growth, variables="age", conf_level=0.9, transform=np.exp).data
    np.testing.assert_allclose(changed["conf_low"], np.exp(plain["conf_low"]))
    assert changed["p_value"][0] == plain["p_value"][0]
    assert "std_error" not in ours.avg_slopes(growth, variables="age", vcov=False).data.columns
    null = ours.avg_slopes(growth, variables="age", hypothesis=0.5).data
    np.testing.assert_allclose(
        null["statistic"], (null["estimate"] - 0.5) / null["std_error"], rtol=1e-12
    )
    twice = ours.avg_slopes(growth, variables="age", vcov=4 * growth.vcov_array, df="inf").data
    np.testing.assert_allclose(twice["std_error"], 2 * plain["std_error"], rtol=1e-6)
    text = str(ours.avg_slopes(growth, variables="age"))
    assert "P(>|t|)" in text and "Df" in text


@with_factors
def test_the_package_takes_the_model_itself(growth):
    model = ModelJaxreml(growth, df="kenward-roger")
    marginaleffects.set_autodiff(False)
    found = marginaleffects.avg_slopes(model, variables="age", by="Sex", eps_vcov=1e-2).data
    marginaleffects.set_autodiff(None)
    adjusted = in_order(growth.emtrends("Sex", "age", df="kenward-roger").table, "Sex", found)
    np.testing.assert_allclose(found["std_error"], adjusted["std_error"], rtol=1e-5)
    normal = 2 * ndtr(-np.abs(adjusted["statistic"]))
    np.testing.assert_allclose(found["p_value"], normal, rtol=1e-3, atol=1e-15)
    grid = datagrid(model, age=[8, 14])
    assert ours.predictions(growth, newdata=grid).data.height == 2
    assert marginaleffects.datagrid(model, Sex=["Male", "Female"]).height == 2


def test_offsets_and_transformed_columns():
    data = ORTHODONT.assign(known=np.arange(len(ORTHODONT)) / 50)
    fit = jaxreml.fit("distance ~ poly(age, 2) + offset(known) + (1 | Subject)", data)
    columns = data[["age", "known"]]
    found = ours.predictions(fit, newdata=columns.iloc[:7])
    np.testing.assert_allclose(found.data["estimate"], fit.predict(data.iloc[:7], "~0"), rtol=1e-10)
    slope = ours.slopes(fit, variables="age", newdata=columns.iloc[:1]).data
    ahead, behind = (
        fit.predict(data.iloc[:1].assign(age=data["age"].iloc[0] + step), "~0").iloc[0]
        for step in (0.05, -0.05)
    )
    np.testing.assert_allclose(slope["estimate"][0], (ahead - behind) / 0.1, rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"df": "welch"}, "df must be one of"),
        ({"vcov": np.eye(4)}, 'df="inf"'),
        ({"equivalence": [-1.0, 1.0]}, "equivalence tests are normal"),
    ],
)
def test_what_it_refuses(growth, options, message):
    with pytest.raises(ValueError, match=message):
        ours.avg_slopes(growth, variables="age", **options)


@with_factors
def test_joint_tests_and_offsets_beside_are_refused(growth):
    with pytest.raises(ValueError, match=r"fit\.test"):
        ours.hypotheses(growth, joint=True)
    fit = jaxreml.fit("distance ~ age + (1 | Subject)", ORTHODONT, offset=np.ones(len(ORTHODONT)))
    with pytest.raises(jaxreml.DataError, match="offset"):
        ours.predictions(fit)
    with pytest.raises(Exception, match="Neuter"):  # polars' own error, or ours
        ours.predictions(growth, newdata=pd.DataFrame({"age": [8.0], "Sex": ["Neuter"]}))


@pytest.mark.parametrize("df", METHODS)
def test_covariates_need_no_factors(df):
    """With any polars."""
    data = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
    agree(ours.avg_slopes(fit, variables="Days", df=df), fit.emtrends("1", "Days", df=df).table)
    at = fit.emmeans("Days", at={"Days": [2, 7]}, df=df).table
    agree(ours.predictions(fit, newdata=pl.DataFrame({"Days": [2.0, 7.0]}), df=df), at)


@pytest.mark.skipif(not POLARS_2, reason="polars 1 does what marginaleffects asks of it")
def test_what_polars_2_lacks_is_said(machines):
    with pytest.raises(jaxreml.DataError, match="polars<2"):
        ours.avg_comparisons(machines, variables="Machine")


def test_jax_is_left_as_it_is():
    code = (
        "import jax, jaxreml\n"
        "from jaxreml.marginaleffects import avg_slopes\n"
        "data = jaxreml.datasets.load('sleepstudy')\n"
        "avg_slopes(jaxreml.fit('Reaction ~ Days + (1 | Subject)', data), variables='Days')\n"
        "assert not jax.config.jax_enable_x64"
    )
    watchdog.run(code, check=True)
