"""Functions that formulas know by R's names, with R's values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from jaxreml import FormulaError
from jaxreml.data.encoding import encode
from jaxreml.data.frame import model_frame
from jaxreml.data.transforms import R_NAMES

X = np.array([1, 2, 3.5, 4, 6, 7.25, 9, 11, 12, 15])
SPLINES = {  # splines::ns of R 4: at rows 1, 4 (and 8) of X
    "ns(x, 3)": [
        [0, 0, 0],
        [-0.100332185971, 0.511953098347, -0.331263769518],
        [0.461844984185, 0.333574853610, 0.135316092940],
    ],
    "ns(x, df=1)": [[0], [0.171810798372], [0.572702661241]],
    "ns(x, 4, intercept=True)": [
        [-0.21538744758532, -0.22437560720990, 0.63573088709473, -0.41135527988482],
        [0.55563456574607, -0.00938143396479, 0.25425930099549, -0.16452072417355],
        [0.06722306959283, 0.47870391074677, 0.28580789501979, 0.16622412496937],
    ],
    "ns(x, knots=[3, 8], boundary=[2, 12])": [
        [0.1040531963429, -0.3381728881144, 0.2341196917715],
        [-0.0392308449403, 0.4830558016116, -0.3327138455601],
    ],
}


def matrix(text, x=X, **columns):
    return encode("0 + " + text, pd.DataFrame({"x": x, **columns}), R_NAMES, "the fixed effects")


@pytest.mark.parametrize("text", SPLINES)
def test_natural_splines(text):
    values, _ = matrix(text)
    wanted = SPLINES[text]
    np.testing.assert_allclose(values[[0, 3, 7][: len(wanted)]], wanted, atol=1e-11)


def test_natural_splines_of_new_rows_have_the_old_knots_and_are_linear_beyond():
    _, encoding = matrix("ns(x, 3)")
    found = encoding.matrix(pd.DataFrame({"x": [-1.0, 5.0, 20.0]}))
    wanted = [  # R's predict(ns(x, 3), c(-1, 5, 20))
        [0.1495076431391, -0.4236049888942, 0.2740973457551],
        [-0.0152922566033, 0.5628085798564, -0.3631007388376],
        [-1.0896860986547, 0.5874439461883, 1.5022421524664],
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-11)


def test_natural_splines_refuse_knots_on_the_boundary():
    with pytest.raises(FormulaError, match="knot on or beyond its boundary"):
        matrix("ns(x, 4)", np.array([0.0] * 6 + [1, 2, 3, 4]))


def test_dummy():
    f = np.array(list("abcabcabca"))
    one, encoding = matrix('dummy(f, "b")', f=f)
    np.testing.assert_array_equal(one[:, 0], f == "b")
    rest, _ = matrix("dummy(f)", f=f)
    np.testing.assert_array_equal(rest, np.stack([f == "b", f == "c"], 1))
    slope, _ = matrix('dummy(f, ["c", "a"]):x', f=pd.Categorical(f))
    np.testing.assert_array_equal(slope, np.stack([(f == "c") * X, (f == "a") * X], 1))
    new = encoding.matrix(pd.DataFrame({"x": [1.0, 1], "f": ["b", "a"]}))
    np.testing.assert_array_equal(new[:, 0], [1, 0])
    with pytest.raises(FormulaError, match="no level 'z'"):
        matrix('dummy(f, "z")', f=f)


def test_dummy_among_random_effects():
    g, f = np.repeat(np.arange(5), 4), np.tile(list("abab"), 5)
    data = {"y": np.arange(20.0) ** 1.5, "g": g, "f": f}
    first, second = model_frame('y ~ f + (0 + dummy(f, "a") + dummy(f, "b") || g)', data).terms
    np.testing.assert_array_equal(first.effects[:, 0] + second.effects[:, 0], np.ones(20))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("log1p(x) + expm1(x / 9)", [np.log1p(X), np.expm1(X / 9)]),
        (
            "sin(2 * pi * x / 12) + cos(2 * pi * x / 12)",
            [np.sin(2 * np.pi * X / 12), np.cos(2 * np.pi * X / 12)],
        ),
        ("tan(x) + atan(x) + ceiling(x / 2)", [np.tan(X), np.arctan(X), np.ceil(X / 2)]),
        ("exp10(x / 10) + ifelse(x > 3, x, 0)", [10 ** (X / 10), np.where(X > 3, X, 0)]),
    ],
)
def test_functions_by_name(text, wanted):
    np.testing.assert_allclose(matrix(text)[0], np.stack(wanted, 1), rtol=1e-14)


def test_a_column_goes_before_a_name():
    values, _ = matrix("I(pi * x)", pi=np.arange(10.0))
    np.testing.assert_array_equal(values[:, 0], np.arange(10.0) * X)
