"""Columns of a user's table to arrays with labels: the model frame.

Any eager dataframe that narwhals knows (pandas, polars, pyarrow, ...) and dicts of arrays come in.
Only the columns that the model uses are looked at. Everything that can be wrong with them is found
here, before any compute, and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import formulaic
import numpy as np
import pandas as pd
from formulaic.errors import FormulaicError
from formulaic.transforms import TRANSFORMS

from jaxreml.designs import Design, Term, instead_of_residual, replaces_residual
from jaxreml.encoding import Encoding, encode
from jaxreml.errors import DataError, FormulaError
from jaxreml.formula import ParsedFormula, RandomTerm, names_in, parse
from jaxreml.tabular import column_names, nearest, to_pandas

ALIASED = 1e-7  # R's tolerance for a column that depends on those before it
R_NAMES = {"factor": TRANSFORMS["C"], "sqrt": np.sqrt, "abs": np.abs}


@dataclass(frozen=True)
class GroupingTerm:
    """A random term as arrays and labels.

    Attributes:
        name: the grouping factor, as lme4 names it.
        levels: labels, J of them, in order.
        codes: (n,) integers 0..J-1.
        effects: (n, q) columns.
        effect_names: q names.
        factors: the columns whose combinations are the levels.
        encoding: how the effects are made.
    """

    name: str
    levels: tuple[Any, ...]
    codes: np.ndarray
    effects: np.ndarray
    effect_names: tuple[str, ...]
    factors: tuple[str, ...]
    encoding: Encoding


@dataclass(frozen=True)
class ModelFrame:
    """Rows that a model uses, as arrays with labels.

    Attributes:
        formula: its parts.
        y: (n,) response; None if the formula has no left side (`covariate_frame`).
        X: (n, p), aliased columns left out.
        fixed_names, aliased: names of the columns of X, and of those left out.
        terms: random terms in lme4's order, most levels first.
        weights, offset: (n,) or None.
        table: the columns used, complete rows only, in the user's row labels.
        rows: booleans, which rows of the user's table these are; the others have a missing value
            in a column used.
        fixed_encoding: how the columns of X, and those left out as aliased, are made.
        offset_encodings: how each ``offset()`` of the formula is made.
    """

    formula: ParsedFormula
    y: np.ndarray | None
    X: np.ndarray
    fixed_names: tuple[str, ...]
    aliased: tuple[str, ...]
    terms: tuple[GroupingTerm, ...]
    weights: np.ndarray | None
    offset: np.ndarray | None
    table: pd.DataFrame
    rows: np.ndarray
    fixed_encoding: Encoding
    offset_encodings: tuple[Encoding, ...]

    @property
    def n_dropped(self) -> int:
        """Rows left out because a column used has a missing value there."""
        return int(np.sum(~self.rows))

    def design(self, structure: str | None = None) -> Design:
        """The cross-products of this frame."""
        terms = [
            Term(term.codes, term.effects, term.name, term.effect_names) for term in self.terms
        ]
        return Design.from_arrays(
            self.y, self.X, terms, weights=self.weights, offset=self.offset, structure=structure
        )


def model_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    context: Mapping[str, Any] | None = None,
) -> ModelFrame:
    """Build the model frame of a formula.

    Args:
        formula: lme4's grammar; the left side is the response.
        data: dataframe (pandas, polars, pyarrow, anything narwhals reads) or dict of columns.
        weights: name of a column, or (n,) values: prior weights as in lme4.
        offset: name of a column, or (n,) values, added to any ``offset()`` of the formula.
        context: names that the formula may use besides columns, functions for example.

    Raises:
        FormulaError: a formula outside the grammar.
        DataError: data that the model cannot be fitted to; the message names the column, level or
            value and says what to do.
    """
    parsed = parse(formula)
    if not parsed.response:
        raise FormulaError(f"the formula {parsed.text!r} has no response left of the ~")
    return _model_frame(parsed, data, weights, offset, context)


def covariate_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    context: Mapping[str, Any] | None = None,
) -> ModelFrame:
    """The model frame of a formula without left side, for responses that come as a block.

    Arguments and errors as `model_frame`'s.

    Raises:
        FormulaError: also a formula with a left side.
    """
    parsed = parse(formula)
    if parsed.response:
        raise FormulaError(
            f"the formula {parsed.text!r} has a left side, {parsed.response!r}; the responses come "
            "as an argument of their own: start the formula with ~"
        )
    return _model_frame(parsed, data, weights, offset, context)


def _model_frame(
    parsed: ParsedFormula, data: Any, weights: Any, offset: Any, context: Mapping[str, Any] | None
) -> ModelFrame:
    context = {**R_NAMES, **(context or {})}
    table = _used_columns(parsed, data, context)
    extras = {"weights": weights, "offset": offset}
    for role, value in extras.items():
        if value is not None:
            table[f"({role})"] = extra_column(role, value, data, len(table))
    table, rows = _complete_rows(table)
    check_finite(table)
    n = len(table)

    y = _response(parsed, table, context) if parsed.response else None
    X, of_fixed = encode(parsed.fixed, table, context, "the fixed effects")
    X, fixed_names, aliased = drop_aliased(X, of_fixed.names)
    if X.shape[1] >= n:
        raise DataError(f"{X.shape[1]} fixed effects and only {n} observations")
    terms = [term for bar in parsed.random for term in grouping_terms(bar, table, context)]
    terms = _lme4_order(terms)
    offsets = [_evaluate(text, table, context, "offset") for text in parsed.offsets]
    total_offset = np.sum([values for values, _ in offsets], axis=0) if offsets else None
    if offset is not None:
        values = table["(offset)"].to_numpy(float)
        total_offset = values if total_offset is None else total_offset + values
    prior = None if weights is None else table["(weights)"].to_numpy(float)
    if prior is not None and np.any(prior <= 0):
        row = table.index[int(np.argmax(prior <= 0))]
        raise DataError(
            f"weights must be positive; row {row!r} has {prior.min():g}. Drop rows of weight zero"
        )
    _check_terms(terms, n, prior)
    return ModelFrame(
        formula=parsed,
        y=y,
        X=X,
        fixed_names=fixed_names,
        aliased=aliased,
        terms=tuple(terms),
        weights=prior,
        offset=total_offset,
        table=table,
        rows=rows,
        fixed_encoding=of_fixed,
        offset_encodings=tuple(encoding for _, encoding in offsets),
    )


def design(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> Design:
    """The `Design` of a formula and a table; arguments and errors as `fit`'s."""
    frame = model_frame(formula, data, weights=weights, offset=offset, context=context)
    return frame.design(structure)


def _used_columns(parsed: ParsedFormula, data: Any, context: Mapping[str, Any]) -> pd.DataFrame:
    """A copy of the columns that the formula names, as pandas."""
    expressions = [parsed.response] if parsed.response else []
    expressions += [parsed.fixed, *parsed.offsets]
    expressions += [bar.effects for bar in parsed.random]
    names = [name for expression in expressions for name in names_in(expression)]
    names += [factor for bar in parsed.random for factor in bar.factors]
    columns = column_names(data)
    repeated = sorted({name for name in names if columns.count(name) > 1})
    if repeated:
        raise DataError(f"column {repeated[0]!r} occurs more than once in the data; rename one")
    if any(re_dot == "." for re_dot in parsed.fixed.replace("+", " ").split()):
        raise FormulaError("'.' for all other columns is not supported: write the names out")
    wanted = []
    for name in dict.fromkeys(names):
        if name in columns:
            wanted.append(name)
        elif name not in context and name not in TRANSFORMS and name != "np":
            raise DataError(
                f"column {name!r} of the formula is not in the data{nearest(name, columns)}"
            )
    table = to_pandas(data, wanted)
    if not len(table):
        raise DataError("the data have no rows")
    return table


def extra_column(role: str, value: Any, data: Any, n: int) -> np.ndarray:
    """Values of the argument `weights` or `offset`: a column's name or an array."""
    if isinstance(value, str):
        columns = column_names(data)
        if value not in columns:
            raise DataError(
                f"{role}={value!r} is not a column of the data{nearest(value, columns)}"
            )
        value = to_pandas(data, [value])[value]
    try:
        values = np.asarray(value, float)
    except (TypeError, ValueError):
        raise DataError(f"{role} must be numeric") from None
    if values.shape != (n,):
        raise DataError(f"{role} must be a column name or {n} values, not {values.shape}")
    return values


def _complete_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Leave out rows with missing values, and then the levels that no row has."""
    missing = table.isna()
    complete = ~missing.any(axis=1).to_numpy()
    if not complete.any():
        empty = [str(name) for name, column in missing.items() if np.all(column)]
        which = f"; nothing but missing values in {', '.join(empty)}" if empty else ""
        raise DataError(f"all {len(table)} rows have a missing value in a column used{which}")
    table = table.loc[complete].copy()
    for name in table.columns:
        if isinstance(table[name].dtype, pd.CategoricalDtype):
            table[name] = table[name].cat.remove_unused_categories()
    return table, complete


def check_finite(table: pd.DataFrame) -> None:
    """Raise DataError naming the first column with an infinite value."""
    for name in table.columns:
        if pd.api.types.is_float_dtype(table[name].dtype):
            infinite = ~np.isfinite(table[name].to_numpy())
            if infinite.any():
                row = table.index[int(np.argmax(infinite))]
                raise DataError(
                    f"column {str(name)!r} has {int(infinite.sum())} infinite value(s), the first "
                    f"in row {row!r}; set them to NaN to drop the rows, or correct them"
                )


def _is_column(text: str, table: pd.DataFrame) -> str | None:
    name = text.strip().strip("`")
    return name if name in table.columns else None


def _response(parsed: ParsedFormula, table: pd.DataFrame, context: Mapping[str, Any]) -> np.ndarray:
    text = parsed.response
    name = _is_column(text, table)
    if name is not None and (
        not pd.api.types.is_numeric_dtype(table[name].dtype)
        or isinstance(table[name].dtype, pd.CategoricalDtype)
    ):
        example = table[name].iloc[0]
        raise DataError(
            f"the response {name!r} is not numeric (it has values such as {example!r}); convert "
            "it, for example with pandas.to_numeric"
        )
    y = (
        _evaluate(text, table, context, "response")[0]
        if name is None
        else table[name].to_numpy(float)
    )
    if not np.all(np.isfinite(y)):
        row = table.index[int(np.argmax(~np.isfinite(y)))]
        raise DataError(f"the response {text!r} is not finite in row {row!r}")
    if np.all(y == y[0]):
        raise DataError(f"the response {text!r} is constant ({y[0]:g}): there is nothing to fit")
    return y


def _evaluate(
    text: str, table: pd.DataFrame, context: Mapping[str, Any], role: str
) -> tuple[np.ndarray, Encoding]:
    """Values (n,) of one numeric expression, and how they are made."""
    name = _is_column(text, table)
    what = f"the {role} {text!r}"
    if name is not None:
        try:
            numeric = pd.DataFrame({name: table[name].to_numpy(float)}, table.index)
        except (TypeError, ValueError):
            raise DataError(f"the {role} {name!r} is not numeric") from None
        values, encoding = encode(f"0 + `{name}`", numeric, context, what)
    else:
        values, encoding = encode(f"0 + I({text})", table, context, what)
    if values.shape[1] != 1:
        raise DataError(f"{what} must be one numeric column, not {values.shape[1]}")
    return values[:, 0], encoding


def drop_aliased(
    X: np.ndarray, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Leave out columns that depend linearly on columns before them, as R does."""
    kept = np.arange(X.shape[1])
    lengths = np.linalg.norm(X, axis=0)
    while kept.size:
        diagonal = np.abs(np.diagonal(np.linalg.qr(X[:, kept], mode="r")))
        diagonal = np.pad(diagonal, (0, kept.size - diagonal.size))  # more columns than rows
        dependent = diagonal <= ALIASED * lengths[kept]
        if not dependent.any():
            break
        kept = np.delete(kept, int(np.argmax(dependent)))
    aliased = tuple(names[k] for k in range(len(names)) if k not in kept)
    return X[:, kept], tuple(names[k] for k in kept), aliased


def grouping_terms(
    bar: RandomTerm, table: pd.DataFrame, context: Mapping[str, Any]
) -> list[GroupingTerm]:
    """One term for correlated effects, one for each summand of uncorrelated ones."""
    codes, levels = _grouping_factor(bar, table)
    texts = [bar.effects] if bar.correlated else _summands(bar.effects)
    terms = []
    for text in texts:
        effects, encoding = encode(text, table, context, f"the random effects on {bar.name}")
        names = encoding.names
        if not names:
            raise FormulaError(f"the term ({bar.effects} | {bar.name}) has no random effects")
        terms.append(GroupingTerm(bar.name, levels, codes, effects, names, bar.factors, encoding))
    return terms


def _summands(effects: str) -> list[str]:
    """(1 + x || g) as the right sides "1" and "0 + x"; a factor stays one summand, as in lme4."""
    try:
        summands = [str(term) for term in formulaic.Formula(effects)]  # pyright: ignore
    except FormulaicError as error:
        raise FormulaError(f"{effects!r}: {error}") from error
    return ["1" if summand == "1" else f"0 + {summand}" for summand in summands]


def _grouping_factor(bar: RandomTerm, table: pd.DataFrame) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Codes and level labels; combinations of several columns, in R's order, if there are more."""
    factors = [pd.Categorical(table[name]) for name in bar.factors]
    codes = np.asarray(factors[0].codes, dtype=np.int64)
    for factor in factors[1:]:
        codes = codes * len(factor.categories) + factor.codes
    present, codes = np.unique(codes, return_inverse=True)
    if len(factors) == 1:
        return codes, tuple(factors[0].categories[present].tolist())
    parts = []
    for factor in reversed(factors):
        parts.append([str(factor.categories[k]) for k in present % len(factor.categories)])
        present = present // len(factor.categories)
    return codes, tuple(":".join(label) for label in zip(*reversed(parts), strict=True))


def _lme4_order(terms: list[GroupingTerm]) -> list[GroupingTerm]:
    """Most levels first; like lme4, rev(order(levels)) as soon as one term is out of order."""
    levels = [len(term.levels) for term in terms]
    if all(a >= b for a, b in pairwise(levels)):
        return terms
    order = sorted(range(len(terms)), key=levels.__getitem__)
    return [terms[k] for k in reversed(order)]


def _check_terms(terms: list[GroupingTerm], n: int, weights: np.ndarray | None) -> None:
    seen: set[tuple[str, str]] = set()
    for term in terms:
        n_levels = len(term.levels)
        if n_levels < 2:
            raise DataError(
                f"the grouping factor {term.name!r} has one level ({term.levels[0]!r}); its "
                "variance cannot be estimated. Leave the term out"
            )
        for k, effect in enumerate(term.effect_names):
            if not np.any(term.effects[:, k]):
                raise DataError(
                    f"the random effect {effect!r} of {term.name!r} is zero in all rows"
                )
            if (term.name, effect) in seen:
                raise DataError(
                    f"the random effect {effect!r} of {term.name!r} occurs in two terms; its "
                    "variance cannot be divided between them"
                )
            seen.add((term.name, effect))
        rows = term.effects if weights is None else term.effects * np.sqrt(weights)[:, None]
        if replaces_residual(term.codes, rows):
            raise DataError(instead_of_residual(term.name, n_levels, term.effect_names, n))
        dependent = _dependent(term.effects)
        if dependent is not None:
            effect = term.effect_names[dependent]
            before = ", ".join(term.effect_names[:dependent])
            what = "is constant" if np.ptp(term.effects[:, dependent]) == 0 else "depends on them"
            raise DataError(
                f"the random effect {effect!r} of {term.name!r} {what} and cannot be told apart "
                f"from {before}; take it out of the term"
            )
    for first, second in combinations(terms, 2):
        shared = set(first.effect_names) & set(second.effect_names)
        if first.name != second.name and shared and _same_partition(first, second):
            raise DataError(
                f"the grouping factors {first.name!r} and {second.name!r} divide the rows alike; "
                f"the variance of {min(shared)!r} cannot be shared out between them. Leave one out"
            )


def _dependent(columns: np.ndarray) -> int | None:
    """The first column that is a linear combination of those before it."""
    triangle = np.linalg.qr(columns / np.linalg.norm(columns, axis=0), mode="r")
    found = np.flatnonzero(np.abs(np.diagonal(triangle)) <= ALIASED)
    return int(found[0]) if found.size else None


def _same_partition(first: GroupingTerm, second: GroupingTerm) -> bool:
    if len(first.levels) != len(second.levels):
        return False
    return np.array_equal(pd.factorize(first.codes)[0], pd.factorize(second.codes)[0])
