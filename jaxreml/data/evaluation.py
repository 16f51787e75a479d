"""How formulaic evaluates a formula's expressions here: names of any kind, arithmetic in float64.

formulaic computes in the types in which columns are stored, where small integers wrap round and
Booleans add by OR, and knows a column by its text, so that a column named ``1`` is the intercept.
Here numbers are float64 before they meet an operator or a function, and names in backticks are
marked by a character that no expression has (`mark`, `plain`).
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping
from typing import Any

import formulaic
import numpy as np
import pandas as pd
from formulaic.materializers.pandas import PandasMaterializer
from formulaic.parser.types import Factor
from formulaic.transforms import TRANSFORMS
from formulaic.utils.layered_mapping import LayeredMapping
from formulaic.utils.stateful_transforms import stateful_eval
from formulaic.utils.variables import Variable
from interface_meta import override

from jaxreml.data.columns import REMEDIES, require_no_stray
from jaxreml.data.formula import QUOTED
from jaxreml.data.transforms import R_NAMES
from jaxreml.errors import DataError

MARK = "\ue000"  # of Unicode's private use area
_LABELS = {"C", "factor", "hashed", "dummy", "lag"}  # take factors, whose levels keep their type
_OURS = {*TRANSFORMS, *R_NAMES} - _LABELS
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)


def mark(text: str) -> str:
    """A formula's text with the names in backticks marked, unless they are plain words."""

    def marked(found: re.Match[str]) -> str:
        name = found[0][1:-1]
        if found[0][0] != "`" or (name.isidentifier() and not keyword.iskeyword(name)):
            return found[0]
        return f"`{MARK}{name}`"

    return QUOTED.sub(marked, text)


def plain(text: Any) -> str:
    """A name that formulaic made of marked text, as the user knows it."""
    return str(text).replace(MARK, "")


def summands(effects: str) -> list[str]:
    """The terms of a right side, as right sides without intercept ("1" for the intercept).

    Raises:
        FormulaicError: the text does not parse.
    """
    found = []
    for term in formulaic.Formula(mark(effects)):  # pyright: ignore
        factors = [
            f"`{factor.expr}`" if factor.eval_method.value == "lookup" else factor.expr
            for factor in term.factors  # pyright: ignore
        ]
        text = plain(":".join(factors))
        found.append("1" if text == "1" else f"0 + {text}")
    return found


def model_matrix(
    spec: Any, text: str, table: pd.DataFrame, context: Mapping[str, Any], **options: Any
) -> Any:
    """formulaic's model matrix of complete rows.

    Args:
        spec: of a matrix made before, whose state it takes, or None.
        text: the right side, for a new one.
        table: columns of the kinds in `columns`.
        context: names that the text may use besides columns.
        options: of formulaic's `ModelSpec`.

    Raises:
        FormulaicError: the text does not parse, or cannot be evaluated.
        DataError: a column that cannot be used as it is here.
    """
    names = {name: str(name) for name in table.columns}
    marked = table.rename(columns={n: mark(f"`{s}`").strip("`") for n, s in names.items()})
    materializer = Materializer(marked, context=dict(context))
    try:
        if spec is not None:
            return materializer.get_model_matrix(spec)
        formula = formulaic.Formula(mark(text))  # pyright: ignore
        return materializer.get_model_matrix(formula, na_action="raise", output="numpy", **options)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        raise (error if cause is None else cause) from None


class Materializer(PandasMaterializer):
    """formulaic's for pandas, in float64."""

    REGISTER_NAME = None
    REGISTER_INPUTS = ()

    @override
    def _lookup(self, name: str) -> Any:
        values, variables = super()._lookup(name)
        if isinstance(values, pd.Series):
            require_no_stray(plain(name), values)
        return values, variables

    @override
    def _evaluate(self, expr: str, metadata: Any, spec: Any) -> Any:
        aliases: dict[str, str] = {}
        code = ast.parse(_with_identifiers(expr, aliases), mode="eval")
        helpers = {"__double__": double, "__wide__": wide}
        named = {alias: self.layered_context[name] for alias, name in aliases.items()}
        variables: set[Variable] = set()
        value = stateful_eval(
            ast.unparse(ast.fix_missing_locations(_Doubles().visit(code))),
            LayeredMapping({**helpers, **named}, self.layered_context),
            {expr: metadata},
            spec.transform_state,
            spec,
            variables=variables,
        )
        if isinstance(value, np.ndarray) and value.dtype.kind in "USO":
            value = pd.Series(value.astype(object))
        return value, {
            Variable(
                aliases.get(v, str(v)), roles=v.roles, source="data" if v in aliases else v.source
            )
            for v in variables
            if str(v) not in helpers
        }

    @override
    def _evaluate_factor(self, factor: Any, spec: Any, drop_rows: Any) -> Any:
        found = super()._evaluate_factor(factor, spec, drop_rows)
        kind = getattr(getattr(found.values, "dtype", None), "kind", "")
        if kind in REMEDIES and found.metadata.kind is Factor.Kind.NUMERICAL:
            raise DataError(f"{plain(factor.expr)!r} has {REMEDIES[kind]}")
        return found

    @override
    def _encode_numerical(
        self, values: Any, metadata: Any, encoder_state: Any, spec: Any, drop_rows: Any
    ) -> Any:
        return np.asarray(values, float)


class _Doubles(ast.NodeTransformer):
    """Numbers that meet an operator or a function are made float64."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, _ARITHMETIC):
            node.left, node.right = (
                _called("__double__", node.left),
                _called("__double__", node.right),
            )
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.USub | ast.UAdd):
            node.operand = _called("__double__", node.operand)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        root: Any = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        name = root.id if isinstance(root, ast.Name) else ""
        if name not in _LABELS:
            helper = "__double__" if name in _OURS else "__wide__"
            node.args = [_called(helper, argument) for argument in node.args]
            for word in node.keywords:
                word.value = _called(helper, word.value)
        return node


def _called(helper: str, node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Constant | ast.Starred):
        return node
    return ast.Call(ast.Name(helper, ast.Load()), [node], [])


def double(values: Any) -> Any:
    """Columns and arrays of numbers or Booleans as float64; anything else as it is."""
    kind = getattr(getattr(values, "dtype", None), "kind", "")
    numeric = kind in {"b", "i", "u", "f"} and np.ndim(values)
    return values.astype(float) if numeric else values


def wide(values: Any) -> Any:
    """`double`, but Booleans stay, which a user's function may want."""
    kind = getattr(getattr(values, "dtype", None), "kind", "")
    return values if kind == "b" else double(values)


def _with_identifiers(expr: str, aliases: dict[str, str]) -> str:
    """Python code with an identifier for every name in backticks, the same one every time: what
    transforms remember is kept by the text of their calls."""

    def identifier(found: re.Match[str]) -> str:
        if found[0][0] != "`":
            return found[0]
        name = found[0][1:-1]
        if name.isidentifier() and not keyword.iskeyword(name):
            return f" {name} "
        alias = "_" + name.encode().hex()
        aliases[alias] = name
        return f" {alias} "

    return QUOTED.sub(identifier, expr).strip()
