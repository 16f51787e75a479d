"""The formula grammar, and what is refused with a reason."""

from __future__ import annotations

import pytest

from jaxreml import FormulaError
from jaxreml.data.formula import names_in, parse


@pytest.mark.parametrize(
    ("formula", "fixed", "random"),
    [
        ("y ~ x + (x | g)", "x", [("x", ("g",), "g", True)]),
        ("y ~ (1 | g)", "1", [("1", ("g",), "g", True)]),
        ("y ~ -1 + x + (0 + x || g)", "- 1 + x", [("0 + x", ("g",), "g", False)]),
        ("y ~ x*z - x:z + (1|a:b)", "x*z - x:z", [("1", ("a", "b"), "a:b", True)]),
        (
            "y ~ x + (1 | a/b/c)",
            "x",
            [
                ("1", ("a",), "a", True),
                ("1", ("b", "a"), "b:a", True),
                ("1", ("c", "b", "a"), "c:(b:a)", True),
            ],
        ),
        ("y ~ (1 | `my g`) + `my x`", "`my x`", [("1", ("my g",), "my g", True)]),
        ("y ~ (z + (1 | g)) + x", "z + x", [("1", ("g",), "g", True)]),
        ("y ~ I(a | b) + C(f, contr.sum) + (1|factor(g))", "I(a | b) + C(f, contr.sum)", None),
    ],
)
def test_parts(formula, fixed, random):
    parsed = parse(formula)
    assert parsed.response == "y"
    assert parsed.fixed == fixed
    if random is not None:
        found = [(t.effects, t.factors, t.name, t.correlated) for t in parsed.random]
        assert found == random


def test_powers_are_those_of_r():
    """Of integers, I(x^2) would be x XOR 2 in Python."""
    parsed = parse("log(y)^2 ~ I(x^2) + (u + v)^2 + f('^') + `a^b` + (0 + I(x^2) | g)")
    assert parsed.response == "log(y)**2"
    assert parsed.fixed == "I(x**2) + (u + v)**2 + f('^') + `a^b`"
    assert parsed.random[0].effects == "0 + I(x**2)"


def test_offsets():
    parsed = parse("y ~ offset(log(t)) + x + offset(z) + (1 | g)")
    assert parsed.fixed == "x"
    assert parsed.offsets == ("log(t)", "z")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ x | g", "outside brackets"),
        ("y ~ x + (1 | (g | h))", "nested bars"),
        ("y ~ x + (1 || g | h)", "nested bars"),
        ("y ~ x * (1 | g)", "not multiplied"),
        ("y ~ (1 | g):x", "not multiplied"),
        ("y ~ (1 | g)^2", "not multiplied"),
        ("y ~ a * (x + (1 | g))", "not multiplied"),
        ("y ~ x - (1 | g)", "cannot be subtracted"),
        ("y ~ x - offset(z) + (1 | g)", "cannot be subtracted"),
        ("y ~ x", "no random term"),
        ("y + x", "exactly one ~"),
        ("y ~ x ~ (1 | g)", "exactly one ~"),
        ("y ~ x + (1 | g", "never closed"),
        ("y ~ x + 1 | g)", "closes no bracket"),
        ("y ~ x + + (1 | g)", "a term is missing"),
        ("y ~ x + (1 | g) +", "a term is missing"),
        ("y ~ ( | g)", "needs effects"),
        ("y ~ (1 | )", "needs effects"),
        ("y ~ (1 | g + h)", "not a column name"),
        ("y ~ (1 | g$h)", "not a column name"),
        ("y | x ~ (1 | g)", "left side"),
        ("y ~ x (1 | g)", "is a . missing before the brackets"),
        (3, "must be a string, not int; it comes first"),
    ],
)
def test_refused(formula, message):
    with pytest.raises(FormulaError, match=message):
        parse(formula)


def test_names_are_columns_not_functions_or_strings():
    text = "bs(x, df=4) * np.log(z) + C(f, levels=['a', 'b']) + `my x` + (u == v) + 2"
    assert names_in(text) == ["x", "z", "f", "my x", "u", "v"]


def test_words_for_covariances():
    parsed = parse("y ~ x + ar1(0 + f | a/b) + cs(x|g, hom = TRUE) + us(1 | h) + (1 | k)")
    assert parsed.fixed == "x"
    found = [(own.word, own.name, own.effects, own.options) for own in parsed.random]
    assert found == [
        ("ar1", "a", "0 + f", ()),
        ("ar1", "b:a", "0 + f", ()),
        ("cs", "g", "x", (("hom", True),)),
        ("us", "h", "1", ()),
        ("", "k", "1", ()),
    ]
    assert parsed.random[2].text("g") == "cs(x | g, hom=True)"
    # A bar inside a function's brackets is Python's.
    assert parse("y ~ I(a | b) + poly(c | d, 2) + (1 | g)").fixed == "I(a | b) + poly(c | d, 2)"
    assert parse("y ~ x", need_random=False).fixed == "x"


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("cs(x | g, hom)", "is not an option such as hom=True"),
        ("cs(x | g, hom=maybe)", "is not an option"),
        ("cs(x || g)", "goes with one bar"),
        ("cs(x | g | h)", "nested bars"),
        ("cs(x | g + h)", "not a column name"),
        ("cs( | g)", "needs effects"),
    ],
)
def test_words_for_covariances_refused(term, message):
    with pytest.raises(FormulaError, match=message):
        parse(f"y ~ x + {term}")
    with pytest.raises(FormulaError, match="cannot be subtracted"):
        parse("y ~ x - cs(x | g)")
