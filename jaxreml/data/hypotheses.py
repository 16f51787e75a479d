"""Linear hypotheses about fixed effects, in words or numbers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.arguments import numbers
from jaxreml.errors import DataError, FormulaError

_NAME = re.compile(r"`([^`]+)`|(?<![\w.])[^\W\d]\w*")


def hypotheses(
    fixed_names: Sequence[str], L: Any, rhs: Any = 0.0
) -> tuple[np.ndarray, np.ndarray, list[str] | pd.RangeIndex]:
    """Linear hypotheses L beta = rhs about the fixed effects.

    Args:
        fixed_names: names of the p fixed effects.
        L: (k, p) or (p,) numbers, columns in the order of `fixed_names`; a dict from names to
            coefficients; an equation such as ``"Days = -10"`` or
            ``"`Machine[T.B]` - `Machine[T.C]`"`` (= 0), or several with commas between them; or a
            list of equations.
        rhs: (k,) or a scalar; added to what stands right of the = in equations.

    Returns:
        L (k, p), rhs (k,) and labels of the rows.

    Raises:
        DataError: names that are not fixed effects.
        FormulaError: an equation that is none.
        ValueError: shapes that do not match, or values that are not finite numbers.
    """
    names = list(fixed_names)
    if isinstance(L, pd.DataFrame):
        L = {name: column.to_numpy() for name, column in L.items()}
    if isinstance(L, Mapping):
        unknown = [name for name in L if name not in names]
        if unknown:
            raise DataError(f"{unknown[0]!r} is not a fixed effect: {', '.join(names)}")
        columns = {name: numbers(value, f"L[{name!r}]") for name, value in L.items()}
        try:
            shape = np.broadcast_shapes((1,), *(column.shape for column in columns.values()))
        except ValueError:
            sizes = ", ".join(f"{column.size} for {name!r}" for name, column in columns.items())
            raise ValueError(f"L has different numbers of coefficients: {sizes}") from None
        rows = np.zeros((*shape, len(names)))
        for name, column in columns.items():
            rows[..., names.index(name)] = column
        values, labels = np.zeros(len(rows)), pd.RangeIndex(len(rows))
    elif isinstance(L, str) or (isinstance(L, list | tuple) and all(isinstance(x, str) for x in L)):
        texts = [L] if isinstance(L, str) else L
        forms = [form for text in texts for form in _equations(text, names)]
        rows = np.array([form[:-1] for form in forms]).reshape(-1, len(names))
        values = np.array([-form[-1] for form in forms])
        labels = list(texts)
        labels = labels if len(labels) == len(rows) else pd.RangeIndex(len(rows))
    else:
        rows: Any = np.atleast_2d(numbers(L, "L"))
        values, labels = np.zeros(len(rows)), pd.RangeIndex(len(rows))
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise ValueError(
            f"L must have {len(names)} columns, one per fixed effect ({', '.join(names)}), not "
            f"shape {rows.shape}"
        )
    given = numbers(rhs, "rhs")
    try:
        values = values + np.broadcast_to(given, values.shape)
    except ValueError:
        raise ValueError(f"rhs must be a number or {len(rows)} of them") from None
    return rows, values, labels


def _equations(text: str, names: list[str]) -> list[np.ndarray]:
    """Linear forms (p + 1,), the constant last, that the equations in a text say are zero."""
    what = f"{text!r} is not a hypothesis about {', '.join(names)}"

    def numbered(found: re.Match[str]) -> str:
        name = found[1] or found[0]
        if name not in names:
            raise DataError(
                f"{what}: {name!r} is none of them. Put names that are not plain words in backticks"
            )
        return f" _{names.index(name)} "

    forms = []
    for equation in _NAME.sub(numbered, text).split(","):
        sides = equation.replace("==", "=").split("=")
        if len(sides) > 2:
            raise FormulaError(f"{what}: an equation has one =; put commas between equations")
        try:
            parts = [_linear(ast.parse(side.strip(), mode="eval").body, names) for side in sides]
        except (SyntaxError, _NotLinear, ZeroDivisionError):
            raise FormulaError(
                f"{what}: it must be made of their names, numbers, + - * / and brackets, and be "
                "linear in them, as in '2 * x - z = -3'"
            ) from None
        forms.append(parts[0] - (parts[1] if len(parts) > 1 else 0.0))
    return forms


class _NotLinear(Exception):
    """An expression that is no linear form."""


def _linear(node: ast.expr, names: list[str]) -> np.ndarray:
    """The linear form (p + 1,) of an expression in the numbered names, the constant last."""
    form = np.zeros(len(names) + 1)
    match node:
        case ast.Name(id=name):
            form[int(name[1:])] = 1.0
            return form
        case ast.Constant(value=float() | int() as number) if not isinstance(number, bool):
            form[-1] = number
            return form
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_linear(inner, names)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _linear(inner, names)
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(_linear(left, names), op, _linear(right, names))
    raise _NotLinear


def _combined(left: np.ndarray, op: ast.operator, right: np.ndarray) -> np.ndarray:
    if isinstance(op, ast.Add | ast.Sub):
        return left + right if isinstance(op, ast.Add) else left - right
    if isinstance(op, ast.Mult) and not left[:-1].any():
        left, right = right, left
    if not isinstance(op, ast.Mult | ast.Div) or right[:-1].any():
        raise _NotLinear
    factor = float(right[-1])
    return left * factor if isinstance(op, ast.Mult) else left * (1 / factor)
