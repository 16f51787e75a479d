"""Columns of any name: the same model as under a plain one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError, FormulaError
from jaxreml.data.frame import model_frame

RNG = np.random.default_rng(3)
N = 60
DATA = pd.DataFrame(
    {
        "y": RNG.normal(size=N),
        "x": RNG.uniform(1, 2, N),
        "z": RNG.normal(size=N),
        "f": np.tile(["u", "v", "w"], N // 3),
        "g": np.repeat(np.arange(12), 5),
        "h": np.arange(N) % 5,
    }
)
NAMES = [
    *[
        "1",
        "0",
        "-1",
        "1.5",
        "a b",
        "a  b",
        "a\tb\nc",
        "x-z",
        "x:z",
        "log(x)",
        "I(x)",
        "a|b",
        "a~b",
    ],
    *["class", "True", "it's", 'say "x"', "Intercept", "age.group", "é è", "%", "a[b]", "{x}"],
    *["(x | g)", "x_", "C(f)", "a_b", "\\d", "offset(x)", "Residual", 1, 2.5, ("p", "q")],
]
FORMULAS = [
    "y ~ {0} + z + (1 | g)",
    "y ~ {0} * z + f:{0} + x + (1 | g)",
    "y ~ log({0}) + I({0} ^ 2) + scale({0}) + poly({0}, 2) + (1 | g)",
    "{0} ~ z + (1 | g)",
    "log({0}) - z ~ x + (1 | g)",
    "y ~ z + offset({0}) + offset(2 * {0}) + ({0} | g)",
    "y ~ x + (1 + {0} || g)",
    "y ~ x + (0 + {0} + z:{0} || g)",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name(name):
    data = DATA.assign(plain=DATA["x"] + 0.5 * DATA["z"] ** 2).copy()
    renamed = data.rename(columns={"plain": name})
    if isinstance(name, tuple):
        renamed.columns = pd.Index(list(renamed.columns), tupleize_cols=False)
    for formula in FORMULAS:
        wanted = model_frame(formula.format("plain"), data)
        found = model_frame(formula.format(f"`{name}`"), renamed)
        np.testing.assert_array_equal(found.y, wanted.y)
        np.testing.assert_array_equal(found.X, wanted.X)
        np.testing.assert_array_equal(found.offset, wanted.offset)
        assert [len(names) for names in (found.fixed_names, found.aliased)] == [
            len(names) for names in (wanted.fixed_names, wanted.aliased)
        ]
        assert len(found.terms) == len(wanted.terms)
        for ours, theirs in zip(found.terms, wanted.terms, strict=True):
            np.testing.assert_array_equal(ours.effects, theirs.effects)
        new = renamed.iloc[::7]
        again = found.fixed_encoding.matrix(found.table.iloc[::7])
        np.testing.assert_allclose(
            again, wanted.fixed_encoding.matrix(wanted.table.iloc[::7]), rtol=1e-13
        )
        assert len(new) == len(again)
    assert str(name) in model_frame(FORMULAS[0].format(f"`{name}`"), renamed).fixed_names


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name_of_a_grouping_factor(name):
    renamed = DATA.rename(columns={"g": name})
    if isinstance(name, tuple):
        renamed.columns = pd.Index(list(renamed.columns), tupleize_cols=False)
    for formula in ("y ~ x + (1 | {0})", "y ~ x + (1 | f:{0})", "y ~ x + (1 | {0}/f)"):
        wanted = model_frame(formula.format("g"), DATA)
        found = model_frame(formula.format(f"`{name}`"), renamed)
        for ours, theirs in zip(found.terms, wanted.terms, strict=True):
            assert ours.levels == theirs.levels
            np.testing.assert_array_equal(ours.codes, theirs.codes)


def test_names_that_look_alike_are_not_confused():
    data = DATA.assign(**{"a b": DATA["x"] ** 2, "a-b": DATA["z"] ** 2, "a_b": 1 / DATA["x"]})
    frame = model_frame(
        "y ~ scale(`a b`) + scale(`a-b`) + scale(a_b) + I(`a b` * `a-b`) + (1 | g)", data
    )
    assert frame.X.shape[1] == 5
    new = frame.fixed_encoding.matrix(frame.table.iloc[:9])
    np.testing.assert_allclose(new, frame.X[:9], rtol=1e-13)  # with the means of all rows
    data = DATA.assign(**{"log(x)": DATA["z"] ** 2})
    frame_of_both = model_frame("y ~ `log(x)` + (1 | g)", data)
    np.testing.assert_array_equal(frame_of_both.X[:, 1], DATA["z"] ** 2)
    with pytest.raises(
        FormulaError, match=r"two columns in the fixed effects are called 'log\(x\)'"
    ):
        model_frame("y ~ `log(x)` + log(x) + (1 | g)", data)


def test_a_grouping_factor_called_residual():
    data = DATA.assign(y=DATA["y"] + np.sin(DATA["g"] * 3.0))
    plain = jaxreml.fit("y ~ x + (1 | g)", data)
    fit = jaxreml.fit("y ~ x + (1 | Residual)", data.rename(columns={"g": "Residual"}))
    assert fit.criterion == plain.criterion
    assert list(fit.variance_components["group"]) == ["`Residual`", "Residual"]
    for ours, theirs in ((fit.icc(), plain.icc()), (fit.r2(), plain.r2())):
        np.testing.assert_array_equal(ours["estimate"], theirs["estimate"])
    assert len(fit.tidy()) == len(plain.tidy())
    assert len(fit.variance_parameters()) == len(plain.variance_parameters())
    new = {"x": 1.5, "Residual": [3, 4]}
    want = plain.predict({"x": [1.5, 1.5], "g": [3, 4]}, re_form="~ (1 | g)")
    assert fit.predict(new, re_form="~ (1 | Residual)").tolist() == want.tolist()
    with pytest.raises(DataError, match=r"no column 'Residual'.*re_form"):
        fit.predict({"x": [1.5]})


def test_blanks_inside_quotes_are_kept():
    data = DATA.assign(f=DATA["f"].map({"u": "a  b", "v": "a b", "w": "c"}))
    frame = model_frame("y   ~  C(f, Treatment('a  b'))\n + (1 | g)", data)
    assert not any("T.a  b]" in name for name in frame.fixed_names)


def test_many_factors_do_not_exceed_64_bits():
    many = pd.DataFrame({f"f{k}": np.arange(512) // 2 for k in range(9)})
    many["f0"] = np.arange(512) % 256
    many = pd.concat([many, many], ignore_index=True)
    names = [f"f{k}" for k in range(9)]
    for order in (names, names[::-1]):
        data = many.assign(y=np.sin(np.arange(1024)))
        (term,) = model_frame(f"y ~ 1 + (1 | {':'.join(order)})", data).terms
        labels = many[order].astype(str).agg(":".join, axis=1)
        assert len(term.levels) == 512
        assert [term.levels[code] for code in term.codes] == labels.tolist()


def test_names_that_need_backticks_say_so():
    data = DATA.rename(columns={"x": "age.group", "g": "the group"})
    for formula in (
        "y ~ age.group + (1 | h)",
        "y ~ log(age.group) + (1 | h)",
        "y ~ z + (age.group | h)",
        "age.group ~ z + (1 | h)",
    ):
        with pytest.raises(
            FormulaError, match=r"'age.group' has a dot and needs backticks: write `age"
        ):
            model_frame(formula, data)
    with pytest.raises(DataError, match=r"did you mean '`age.group`'.*`the group`"):
        model_frame("y ~ age_group + (1 | h)", data)
    with pytest.raises(DataError, match=r"'age.grp'.*did you mean '`age.group`'"):
        model_frame("y ~ age.grp + (1 | h)", data)
    with pytest.raises(FormulaError, match=r"backticks.*\(1 \| `age.group`\)"):
        model_frame("y ~ z + (1 | age.group)", data)
    for name in ("(weights)", "(offset)"):
        with pytest.raises(FormulaError, match="rename"):
            model_frame(f"y ~ `{name}` + (1 | g)", DATA.rename(columns={"x": name}))
    with pytest.raises(DataError, match="'1' occurs more than once"):
        model_frame("y ~ `1` + (1 | g)", DATA.rename(columns={"x": "1", "z": 1}))
    with pytest.raises(DataError, match="column 'log' of the formula"):
        model_frame("y ~ x + (1 | log)", DATA)


def test_messages_have_plain_row_labels():
    with pytest.raises(DataError, match="in row 3;"):
        model_frame("y ~ x + (1 | g)", DATA.assign(x=DATA["x"].where(DATA.index != 3, np.inf)))
    with pytest.raises(DataError, match="row 4 has -1"):
        model_frame("y ~ x + (1 | g)", DATA, weights=np.where(DATA.index == 4, -1, 1))
    with pytest.raises(DataError, match=r"not finite in row 5$"):
        model_frame("y ~ log(x) + (1 | g)", DATA.assign(x=DATA["x"].where(DATA.index != 5, 0)))


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("REML", 'method="ML"'),
        ("groups", r"\(1 \| group\)"),
        ("family", "Gaussian"),
        ("re_formula", r"\(x \| group\)"),
        ("cluster", "robust"),
        ("nonsense", "no argument 'nonsense'$"),
    ],
)
def test_arguments_of_other_libraries(argument, remedy):
    with pytest.raises(TypeError, match=remedy):
        jaxreml.fit("y ~ x + (1 | g)", DATA, **{argument: None})


class TestTables:
    def test_records(self):
        expected = model_frame("y ~ x + f + (1 | g)", DATA)
        for records in (DATA.to_records(), np.array(DATA.to_records(index=False))):
            found = model_frame("y ~ x + f + (1 | g)", records)
            np.testing.assert_array_equal(found.X, expected.X)

    def test_scalars_are_repeated(self):
        data = {name: DATA[name].to_numpy() for name in "yxg"} | {"z": 2.5, "f": "u"}
        frame = model_frame("y ~ x + offset(z) + (1 | g)", data)
        np.testing.assert_array_equal(frame.offset, np.full(N, 2.5))

    def test_a_series_beside_a_frame_is_matched_by_its_labels(self):
        data = DATA.set_axis([f"r{k}" for k in range(N)])
        w = pd.Series(np.arange(1.0, N + 1), data.index)
        for given in (w, w.sample(frac=1, random_state=1)):
            frame = model_frame("y ~ x + (1 | g)", data, weights=given, offset=given)
            np.testing.assert_array_equal(frame.weights, w)
            np.testing.assert_array_equal(frame.offset, w)
        with pytest.raises(DataError, match=r"row labels are not those.*weights\.to_numpy"):
            model_frame("y ~ x + (1 | g)", data, weights=w.reset_index(drop=True))
        with pytest.raises(DataError, match="60 values, not 59"):
            model_frame("y ~ x + (1 | g)", data, offset=w.iloc[:-1])
