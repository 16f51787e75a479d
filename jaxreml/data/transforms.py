"""Names that formulas know besides formulaic's, with R's meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from formulaic.materializers.types import FactorValues
from formulaic.transforms import TRANSFORMS
from formulaic.utils.stateful_transforms import stateful_transform
from scipy.linalg import qr


@stateful_transform
def ns(
    x: Any,
    df: int | None = None,
    knots: Any = None,
    intercept: bool = False,
    boundary: Any = None,
    _state: dict[str, Any] = {},  # noqa: B006  (given by the decorator)
) -> FactorValues:
    """Natural cubic splines, R's ``splines::ns``: linear beyond the boundary knots.

    Args:
        x: (n,) numbers.
        df: columns; df - 1 interior knots (one less with intercept) at quantiles of x.
        knots: the interior knots instead.
        intercept: whether the constant is in their span.
        boundary: the two boundary knots, the range of x if left out.

    Returns:
        (n, df) columns. Knots and boundary are those of the first call.

    Source: Hastie (1992), Generalized additive models, in Statistical Models in S, ch. 7; the
    null space of the second derivatives at the boundary by Householder QR, as in R.
    """
    x = np.asarray(x, float)
    if "knots" not in _state:
        ends = (
            [float(x.min()), float(x.max())] if boundary is None else sorted(map(float, boundary))
        )
        if knots is None:
            count = (1 + bool(intercept) if df is None else df) - 1 - bool(intercept)
            if count < 0:
                raise ValueError(f"ns needs df of at least {1 + bool(intercept)}, not {df}")
            inside = x[(x >= ends[0]) & (x <= ends[1])]
            knots = np.quantile(inside, np.linspace(0, 1, count + 2)[1:-1])
        inner = np.sort(np.atleast_1d(np.asarray(knots, float)))
        if len(ends) != 2 or np.any((inner <= ends[0]) | (inner >= ends[1])):
            raise ValueError(
                f"ns has a knot on or beyond its boundary {ends} ({inner.tolist()}): many equal "
                "values of x; give knots= between them, or a smaller df"
            )
        _state["knots"] = [ends[0]] * 4 + inner.tolist() + [ends[1]] * 4
    t = np.array(_state["knots"])
    low, high = t[0], t[-1]
    from scipy.interpolate import BSpline  # takes half a second to import

    splines = BSpline(t, np.eye(len(t) - 4), 3)
    basis = splines(np.clip(x, low, high))
    slopes = splines.derivative()
    for end, beyond in ((low, x < low), (high, x > high)):
        basis[beyond] += (x[beyond] - end)[:, None] * slopes(end)
    skip = 0 if intercept else 1
    curvature = splines.derivative(2)([low, high])[:, skip:]
    rotation: Any = qr(curvature.T)[0]
    values = basis[:, skip:] @ rotation[:, 2:]
    return FactorValues(
        {k + 1: values[:, k] for k in range(values.shape[1])},
        kind="numerical",
        spans_intercept=False,
        format="{name}[{field}]",
        encoded=False,
    )


@stateful_transform
def dummy(
    f: Any,
    levels: Any = None,
    _state: dict[str, Any] = {},  # noqa: B006  (given by the decorator)
) -> Any:
    """Indicator columns of some levels of a factor, as numbers: lme4's ``dummy``.

    Args:
        f: (n,) a factor.
        levels: a level or a list of them; all but the first if left out.

    Returns:
        (n,) for one level, a column per level for several.
    """
    column = pd.Series(f)
    if "levels" not in _state:
        known = pd.Categorical(column).categories.tolist()
        asked = known[1:] if levels is None else levels
        asked = [asked] if isinstance(asked, str) or np.ndim(asked) == 0 else list(asked)
        for level in asked:
            if level not in known:
                raise ValueError(f"dummy: there is no level {level!r}; there are {known[:8]}")
        _state["levels"] = asked
    asked = _state["levels"]
    columns = {level: (column == level).to_numpy(float) for level in asked}
    if len(asked) == 1:
        return columns[asked[0]]
    return FactorValues(columns, kind="numerical", format="{name}[{field}]", encoded=False)


def exp10(x: Any) -> Any:
    """Ten to the power of x; a function with a name, so that fits can be pickled."""
    return 10.0**x


R_NAMES: dict[str, Any] = {
    "factor": TRANSFORMS["C"],
    "dummy": dummy,
    "ns": ns,
    "ifelse": np.where,
    "pi": np.pi,
    "exp10": exp10,
    "ceiling": np.ceil,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
}
R_NAMES |= {
    name: getattr(np, name)
    for name in (
        *("sqrt", "abs", "sign", "floor", "trunc", "log1p", "expm1"),
        *("sin", "cos", "tan", "sinh", "cosh", "tanh"),
    )
}
