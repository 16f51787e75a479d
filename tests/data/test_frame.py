"""Tables of every kind come in; bad ones are refused by name before any compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import jaxreml
from jaxreml import DataError, Design, FormulaError
from jaxreml.data.frame import model_frame


@pytest.fixture
def sleep() -> pd.DataFrame:
    return jaxreml.datasets.load("sleepstudy")


SLEEP = "Reaction ~ Days + (Days | Subject)"


class TestContainers:
    def same(self, data, expected, formula=SLEEP):
        frame = model_frame(formula, data)
        np.testing.assert_array_equal(frame.y, expected.y)
        np.testing.assert_array_equal(frame.X, expected.X)
        np.testing.assert_array_equal(frame.terms[0].codes, expected.terms[0].codes)
        assert [str(x) for x in frame.terms[0].levels] == list(expected.terms[0].levels)

    def test_kinds(self, sleep):
        expected = model_frame(SLEEP, sleep)
        self.same(pl.from_pandas(sleep), expected)
        self.same(pa.Table.from_pandas(sleep), expected)
        self.same({name: sleep[name] for name in sleep}, expected)
        self.same({name: sleep[name].to_numpy() for name in sleep}, expected)
        self.same({name: sleep[name].tolist() for name in sleep}, expected)
        self.same(sleep.convert_dtypes(), expected)
        self.same(sleep.assign(Subject=sleep["Subject"].astype(int)), expected)

    def test_polars_enum_keeps_its_order(self, sleep):
        levels = list(reversed(sleep["Subject"].cat.categories))
        data = pl.from_pandas(sleep.astype({"Subject": str}))
        data = data.with_columns(pl.col("Subject").cast(pl.Enum(levels)))
        assert model_frame(SLEEP, data).terms[0].levels == tuple(levels)

    def test_lazy_frame_and_other_types(self, sleep):
        with pytest.raises(DataError, match="collect"):
            model_frame(SLEEP, pl.from_pandas(sleep).lazy())
        with pytest.raises(DataError, match="not list"):
            model_frame(SLEEP, [1, 2])


class TestRows:
    def test_incomplete_rows_are_dropped_and_counted(self, sleep):
        sleep.loc[3, "Days"] = np.nan
        sleep.loc[5, "Reaction"] = np.nan
        sleep.loc[7, "Subject"] = None
        sleep["unused"] = np.nan
        frame = model_frame(SLEEP, sleep)
        assert frame.n_dropped == 3
        assert list(frame.table.index[:5]) == [0, 1, 2, 4, 6]
        fit = jaxreml.fit(SLEEP, sleep)
        assert fit.n_dropped == 3
        assert "3 rows with missing values dropped" in fit.summary()

    def test_levels_without_rows_disappear(self, sleep):
        sleep.loc[sleep["Subject"] == "308", "Reaction"] = np.nan
        frame = model_frame(SLEEP, sleep)
        assert len(frame.terms[0].levels) == 17
        data = sleep.assign(f=pd.Categorical(["a", "b"] * 90, categories=["a", "b", "c"]))
        names = model_frame("Reaction ~ f + (1 | Subject)", data).fixed_names
        assert names == ("(Intercept)", "f[T.b]")

    def test_transform_state_comes_from_complete_rows(self, sleep):
        whole = model_frame("Reaction ~ center(Days) + (1 | Subject)", sleep[10:])
        sleep.loc[:9, "Reaction"] = np.nan
        part = model_frame("Reaction ~ center(Days) + (1 | Subject)", sleep)
        np.testing.assert_array_equal(part.X, whole.X)

    def test_row_labels_are_kept(self, sleep):
        sleep.index = [f"row {k}" for k in range(180)]
        fit = jaxreml.fit(SLEEP, sleep.drop(index="row 4"))
        assert list(fit.resid.index[3:5]) == ["row 3", "row 5"]


class TestTerms:
    def test_lme4_order_and_names(self):
        pastes = jaxreml.datasets.load("pastes")
        frame = model_frame("strength ~ 1 + (1 | batch/cask)", pastes)
        assert [term.name for term in frame.terms] == ["cask:batch", "batch"]
        assert frame.terms[0].levels[:2] == ("a:A", "a:B")

    def test_double_bar_splits_summands_but_not_factors(self, sleep):
        sleep["f"] = np.tile(["a", "b"], 90)
        frame = model_frame("Reaction ~ 1 + (Days + f || Subject)", sleep)
        effects = [term.effect_names for term in frame.terms]
        assert effects == [("(Intercept)",), ("Days",), ("f[a]", "f[b]")]

    def test_expressions(self, sleep):
        sleep["w"] = np.linspace(1, 2, 180)
        frame = model_frame(
            "log(Reaction) ~ poly(Days, 2) + bs(Days, df=4) + offset(Days / 10) + (1 | Subject)",
            sleep,
            weights="w",
            offset=np.ones(180),
        )
        np.testing.assert_allclose(frame.y, np.log(sleep["Reaction"]))
        np.testing.assert_allclose(frame.offset, sleep["Days"] / 10 + 1)
        np.testing.assert_allclose(frame.weights, sleep["w"])

    def test_context(self, sleep):
        frame = model_frame(
            "Reaction ~ half(Days) + (1 | Subject)", sleep, context={"half": lambda x: x / 2}
        )
        np.testing.assert_allclose(frame.X[:, 1], sleep["Days"] / 2)

    def test_aliased_columns_are_dropped_and_named(self, sleep):
        sleep["twice"] = 2 * sleep["Days"] + 1
        fit = jaxreml.fit("Reaction ~ Days + twice + (1 | Subject)", sleep)
        assert fit.aliased == ("twice",)
        assert "twice" in fit.summary()
        assert list(fit.params.index) == ["(Intercept)", "Days"]

    def test_names_with_spaces(self, sleep):
        data = sleep.rename(columns={"Days": "days awake", "Subject": "the subject"})
        fit = jaxreml.fit("Reaction ~ `days awake` + (`days awake` | `the subject`)", data)
        assert fit.criterion == pytest.approx(1743.628272, abs=1e-6)


class TestRefused:
    """Each a clear error that names the column, level or value."""

    def test_model_too_large_for_the_dense_structure(self):
        data = jaxreml.datasets.load("insteval")
        with pytest.raises(DataError, match=r"4114 random effects.*73421 rows.*GiB"):
            jaxreml.fit("y ~ service + (1 | s) + (1 | d) + (1 | dept)", data, structure="dense")

    @pytest.mark.parametrize(
        ("change", "formula", "message"),
        [
            ({}, "Reacton ~ Days + (1 | Subject)", "'Reacton'.*did you mean 'Reaction'"),
            ({}, "Reaction ~ Dais + (1 | Subject)", "'Dais'.*did you mean 'Days'"),
            ({}, "Reaction ~ Days + (1 | Subjects)", "'Subjects'.*did you mean 'Subject'"),
            ({}, "Reaction ~ poly(Dais, 2) + (1 | Subject)", "'Dais'"),
            ({"s": "x"}, "s ~ Days + (1 | Subject)", "'s' is not numeric"),
            ({"c": 3.0}, "c ~ Days + (1 | Subject)", "'c' is constant"),
            ({"g": "one"}, "Reaction ~ Days + (1 | g)", "'g' has one level"),
            ({"g": range(180)}, "Reaction ~ Days + (1 | g)", "'g' has 180 levels in 180 rows"),
            (
                {"g": np.arange(180) // 2},
                "Reaction ~ Days + (I(Days % 2) | g)",
                "180 random effects.*90 levels.*Days",
            ),
            ({"e": np.nan}, "Reaction ~ e + (1 | Subject)", "all 180 rows.*in e"),
            ({"z": 0.0}, "Reaction ~ Days + (0 + z | Subject)", "'z'.*is zero in all rows"),
            ({}, "Reaction ~ log(Days) + (1 | Subject)", "not finite in row 0"),
            ({}, "Reaction ~ (1 | Subject) + (Days | Subject)", "occurs in two terms"),
            (
                {"g": np.arange(180)[::-1] // 10},
                "Reaction ~ (1 | Subject) + (1 | g)",
                "divide the rows alike",
            ),
        ],
    )
    def test_data(self, sleep, change, formula, message):
        with pytest.raises(DataError, match=message):
            model_frame(formula, sleep.assign(**change))

    @pytest.mark.parametrize("column", ["Reaction", "Days"])
    def test_infinite_values(self, sleep, column):
        sleep.loc[17, column] = -np.inf
        with pytest.raises(DataError, match=f"'{column}' has 1 infinite.*row 17"):
            model_frame(SLEEP, sleep)

    def test_no_rows(self, sleep):
        with pytest.raises(DataError, match="no rows"):
            model_frame(SLEEP, sleep[:0])

    def test_duplicate_columns(self, sleep):
        data = pd.concat([sleep, sleep[["Days"]]], axis=1)
        with pytest.raises(DataError, match="'Days' occurs more than once"):
            model_frame(SLEEP, data)

    def test_columns_of_unequal_length(self):
        data = {"y": [1.0, 2, 3], "g": ["a", "b"]}
        with pytest.raises(DataError, match="different lengths: y: 3, g: 2"):
            model_frame("y ~ (1 | g)", data)

    def test_formula_that_formulaic_refuses(self, sleep):
        with pytest.raises(FormulaError, match="fixed effects"):
            model_frame("Reaction ~ Days ** + (1 | Subject)", sleep)

    def test_unknown_function(self, sleep):
        with pytest.raises(jaxreml.JaxremlError, match="nosuch"):
            model_frame("Reaction ~ nosuch(Days) + (1 | Subject)", sleep)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ("wt", "'wt' is not a column"),
            (np.ones(3), "180 values"),
            (["a"] * 180, "must be numeric"),
            (np.zeros(180), "weights must be positive"),
        ],
    )
    def test_weights(self, sleep, weights, message):
        with pytest.raises(DataError, match=message):
            model_frame(SLEEP, sleep, weights=weights)


def test_random_effects_that_depend_on_others_are_refused():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    data = {"y": rng.normal(size=60), "x": x, "k": np.full(60, 2.0), "z": 1 + 3 * x, "g": x > 0}
    with pytest.raises(DataError, match=r"'k' of 'g' is constant .* from \(Intercept\)"):
        model_frame("y ~ x + (1 + k | g)", data)
    with pytest.raises(DataError, match=r"'z' of 'g' depends on them .* from \(Intercept\), x"):
        model_frame("y ~ x + (x + z | g)", data)
    assert len(model_frame("y ~ x + (0 + k | g)", data).terms) == 1


# A term and the residual


def meta_analysis() -> dict:
    """Twelve estimates with known weights, one a study."""
    return {
        "y": [0.12, 0.55, -0.31, 0.84, 0.20, 1.30, -0.75, 0.41, 0.95, -0.10, 0.33, 0.60],
        "w": [4.0, 25, 2, 60, 9, 1, 3, 40, 5, 80, 12, 7],
        "g": np.arange(12),
        "pair": np.repeat(np.arange(6), 2),
        "s": np.tile([1.0, -1.0], 6),
        "half": np.tile([1.0, 3.0], 6),
        "x": np.linspace(0, 1, 12) ** 2,
    }


@pytest.mark.parametrize(
    ("formula", "weights", "message"),
    [
        ("y ~ 1 + (1 | g)", None, "12 levels in 12 rows, one row a level"),
        ("y ~ 1 + (1 | g)", np.full(12, 3.0), "known weights that are not all equal"),
        ("y ~ 1 + (0 + s | g)", None, "one row a level"),
        ("y ~ 1 + (s | pair)", None, "take the place of the residual"),
        ("y ~ 1 + (0 + C(s) | pair)", "half", "take the place of the residual"),
        ("y ~ 1 + (x + s | pair)", None, r"18 random effects \(6 levels times 3"),
    ],
)
def test_a_term_that_is_the_residual_is_refused(formula, weights, message):
    frame = meta_analysis()
    with pytest.raises(DataError, match=message):
        model_frame(formula, frame, weights=weights)


def test_arrays_of_a_term_that_is_the_residual():
    frame = meta_analysis()
    arrays = np.array(frame["y"]), np.ones((12, 1)), [frame["g"]]
    with pytest.raises(DataError, match="one row a level"):
        Design.from_arrays(*arrays, weights=np.full(12, 2.0))
    assert Design.from_arrays(*arrays, weights=np.array(frame["w"])).n == 12


@pytest.mark.parametrize(
    ("formula", "weights"),
    [("y ~ 1 + (1 | g)", "w"), ("y ~ 1 + (0 + x | g)", None), ("y ~ 1 + (x | pair)", None),
     ("y ~ 1 + (s | pair)", "w")],
)  # fmt: skip
def test_as_many_effects_as_rows_are_taken_where_they_are_identified(formula, weights):
    assert model_frame(formula, meta_analysis(), weights=weights).design().n == 12


def test_one_row_per_level_with_weights():
    frame = meta_analysis()
    fit = jaxreml.fit("y ~ 1 + (1 | g)", frame, weights="w")
    # lme4 1.1-31 with its checks off
    assert fit.criterion == pytest.approx(17.894503, abs=1e-6)
    np.testing.assert_allclose(fit.variance_components["sd"], [0.31679, 0.92785], atol=1e-5)
    np.testing.assert_allclose([*fit.params, *fit.bse], [0.36332, 0.12796], atol=1e-5)
    Y = np.array(frame["y"])[:, None] + np.array([0.0, 1.0])
    Y[2, 1] = np.nan
    many = jaxreml.fit_many("~ 1 + (1 | g)", frame, Y, weights="w")
    assert many.estimate(0).criterion == pytest.approx(fit.criterion)
    assert list(many.status) == [0, 0]


def test_a_file_is_read_before():
    for name in ("study.csv", Path("study.csv")):
        with pytest.raises(DataError, match=r"not the name of a file, 'study.csv'; read it"):
            model_frame("y ~ 1 + (1 | g)", name)
