"""Columns of a user's table to arrays with labels: the model frame.

Any eager dataframe that narwhals knows (pandas, polars, pyarrow, ...) and dicts of arrays come in.
Only the columns that the model uses are looked at. Everything that can be wrong with them is found
here, before any compute, and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from formulaic.transforms import TRANSFORMS

from jaxreml.data.columns import (
    complete_rows,
    is_amount,
    label,
    require_amounts_possible,
    require_no_stray,
)
from jaxreml.data.encoding import Encoding, encode
from jaxreml.data.estimability import RowSpace, independent_columns
from jaxreml.data.evaluation import plain
from jaxreml.data.formula import (
    ParsedFormula,
    dotted_names,
    names_in,
    parse,
    single_name,
)
from jaxreml.data.grouping import GroupingTerm, check_terms, grouping_terms, lme4_order
from jaxreml.data.kernels import Kernels, read_kernels, with_kernels
from jaxreml.data.outputs import library_of
from jaxreml.data.residual import ResidualTerm, refuse_perfect, residual_term, words_of
from jaxreml.data.tables import as_typed, beside, nearest, texts_of_names, to_pandas
from jaxreml.data.transforms import R_NAMES
from jaxreml.errors import DataError, FormulaError
from jaxreml.model.arrays import Term, floating_type, is_traced, read_terms, row_vector
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design

EXTRAS = {"weights": "(weights)", "offset": "(offset)"}  # columns of a model frame's table


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
        residual: the covariance of the residuals within subjects; None if they are independent.
        library: that the user's table is of, as `outputs.library_of` says.
        kernels: the known covariances of levels, by grouping factor.
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
    residual: ResidualTerm | None = None
    library: str = "pandas"
    kernels: Kernels = field(default_factory=dict)

    @property
    def n_dropped(self) -> int:
        """Rows left out because a column used has a missing value there."""
        return int(np.sum(~self.rows))

    @cached_property
    def kept(self) -> np.ndarray:
        """(p,), the columns of `fixed_encoding` that have coefficients."""
        names = self.fixed_encoding.names
        return np.array([names.index(name) for name in self.fixed_names], int)

    @cached_property
    def fixed_terms(self) -> dict[str, np.ndarray]:
        """Per term of the fixed effects, but for the intercept, its columns of X: none if all are
        aliased."""
        spec = self.fixed_encoding.spec
        return {
            plain(term): np.flatnonzero((self.kept >= place.start) & (self.kept < place.stop))
            for term, place in spec.term_slices.items()
            if term.degree
        }

    @cached_property
    def row_space(self) -> RowSpace | None:
        """Of X with its aliased columns, for estimability; None if no column is aliased."""
        if not self.aliased:
            return None
        return RowSpace(self.fixed_encoding.matrix(self.table), self.kept)

    def estimable(self, L: np.ndarray) -> np.ndarray:
        """Which rows of (m, P) `L`, in the columns of `fixed_encoding`, are in the row space."""
        return np.ones(len(L), bool) if self.row_space is None else self.row_space.contains(L)

    def offsets(self, table: pd.DataFrame) -> np.ndarray:
        """(m,), the sum of the formula's offsets at the values in `table`."""
        return sum((own.matrix(table)[:, 0] for own in self.offset_encodings), np.zeros(len(table)))

    @property
    def random_terms(self) -> list[Term]:
        """The terms of a design, that of the residuals' covariance last."""
        terms = [
            Term(
                term.codes,
                term.effects,
                term.name,
                term.effect_names,
                term.block,
                term.kernel,
            )
            for term in self.terms
        ]
        return terms if self.residual is None else [*terms, self.residual.term]

    def basis(self, structure: str | None = None) -> Basis:
        """What this frame says without its response, prepared for many."""
        return Basis.of(
            self.X,
            read_terms(self.random_terms, len(self.X), np.dtype(float)),
            weights=self.weights,
            offset=self.offset,
            structure=structure,
        )

    def design(self, structure: str | None = None) -> Design:
        """The cross-products of this frame."""
        return Design.from_arrays(
            self.y,
            self.X,
            self.random_terms,
            weights=self.weights,
            offset=self.offset,
            structure=structure,
        )


def model_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    context: Mapping[str, Any] | None = None,
    residual: str | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> ModelFrame:
    """Build the model frame of a formula.

    Args:
        formula: lme4's grammar; the left side is the response.
        data: dataframe (pandas, polars, pyarrow, anything narwhals reads) or dict of columns.
        weights: name of a column, or (n,) values: prior weights as in lme4.
        offset: name of a column, or (n,) values, added to any ``offset()`` of the formula.
        context: names that the formula may use besides columns, functions for example.
        residual: the residuals' covariance, as in `jaxreml.fit`.
        kernels: known covariances of levels, likewise.

    Raises:
        FormulaError: a formula outside the grammar.
        DataError: data that the model cannot be fitted to; the message names the column, level or
            value and says what to do.
    """
    parsed = parse(formula, need_random=residual is None)
    if not parsed.response:
        raise FormulaError(f"the formula {parsed.text!r} has no response left of the ~")
    return _model_frame(parsed, data, weights, offset, context, residual=residual, kernels=kernels)


def covariate_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    context: Mapping[str, Any] | None = None,
    need_random: bool | None = None,
    residual: str | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> ModelFrame:
    """The model frame of a formula without left side, for responses that come as a block.

    Arguments and errors as `model_frame`'s; `need_random` as `parse`'s, true if left out but for
    a covariance of residuals; `columns` (n,) are taken for columns of the data.

    Raises:
        FormulaError: also a formula with a left side.
    """
    parsed = parse(formula, need_random=residual is None if need_random is None else need_random)
    if parsed.response:
        raise FormulaError(
            f"the formula {parsed.text!r} has a left side, {parsed.response!r}; the responses come "
            "as an argument of their own: start the formula with ~"
        )
    return _model_frame(
        parsed, data, weights, offset, context, columns, residual=residual, kernels=kernels
    )


def with_response(
    frame: ModelFrame,
    name: str,
    y: np.ndarray,
    context: Mapping[str, Any] | None = None,
    *,
    weights: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
) -> ModelFrame:
    """A frame without a response, coded anew from the rows where a response is not missing.

    Args:
        frame: of n rows.
        name: what the response is called, which stands nowhere in the formula.
        y: (n,), NaN where it is missing.
        context: that of the formula.
        weights, offset: of the response's own, (n,): in the place of the frame's weights, and
            beside its offset.
        columns: more values of its own, (n,), in the place of those of the frame.
    """
    table, extras = split_extras(frame.table)
    if weights is not None:
        extras["weights"] = weights
    if offset is not None:
        extras["offset"] = offset + (0.0 if extras["offset"] is None else extras["offset"])
    parsed = replace(frame.formula, text=f"{name} {frame.formula.text}", response=name)
    table = table.assign(**{name: y}, **(columns or {}))
    residual = None if frame.residual is None else frame.residual.words.text
    found = _model_frame(
        parsed, table, context=context, kernels=frame.kernels, residual=residual, **extras
    )
    return replace(found, library=frame.library)


def split_extras(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of a frame as its columns of data, and its weights and offset if there are any."""
    extras = {
        role: table[name].to_numpy() if name in table else None for role, name in EXTRAS.items()
    }
    return table.drop(columns=list(EXTRAS.values()), errors="ignore"), extras


def _model_frame(
    parsed: ParsedFormula,
    data: Any,
    weights: Any,
    offset: Any,
    context: Mapping[str, Any] | None,
    columns: Mapping[str, np.ndarray] | None = None,
    residual: str | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> ModelFrame:
    context = {**R_NAMES, **(context or {})}
    beside_formula = words_of(residual, context).columns if residual is not None else ()
    table = _used_columns(parsed, data, {**context, **(columns or {})}, beside_formula)
    table = table.assign(**(columns or {}))
    for role, value in {"weights": weights, "offset": offset}.items():
        if value is not None:
            table[EXTRAS[role]] = beside(role, value, data, len(table))
    table, rows = _complete_rows(table)
    check_finite(table)
    n = len(table)

    y = _response(parsed, table, context) if parsed.response else None
    X, of_fixed = encode(parsed.fixed, table, context, "the fixed effects")
    X, fixed_names, aliased = drop_aliased(X, of_fixed.names)
    if X.shape[1] >= n:
        raise DataError(f"{X.shape[1]} fixed effects and only {n} observations")
    terms = [term for bar in parsed.random for term in grouping_terms(bar, table, context)]
    known = read_kernels(kernels, terms)
    terms = lme4_order(with_kernels(terms, known))
    offsets = [_evaluate(text, table, context, "offset") for text in parsed.offsets]
    total_offset = np.sum([values for values, _ in offsets], axis=0) if offsets else None
    if offset is not None:
        values = table["(offset)"].to_numpy(float)
        total_offset = values if total_offset is None else total_offset + values
    prior = None if weights is None else table["(weights)"].to_numpy(float)
    if prior is not None and np.any(prior <= 0):
        row = int(np.argmax(prior <= 0))
        raise DataError(
            f"weights must be positive; row {label(table.index[row:])} has {prior[row]:g}. Drop "
            "rows of weight zero"
        )
    check_terms(terms, n, prior, independent=residual is None)
    of_residuals = None
    if residual is not None:
        of_residuals = residual_term(residual, table, [term.codes for term in terms], context)
        if not terms:
            refuse_perfect(of_residuals, X)
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
        residual=of_residuals,
        library=library_of(data),
        kernels=known,
    )


def design(
    formula: str,
    data: Any,
    *,
    response: Any = None,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    residual: str | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> Design:
    """The `Design` of a formula and a table; arguments and errors as `fit`'s.

    Args:
        formula: as `fit`'s; with a `response` it starts with ~.
        data: a dataframe, or a dict of columns.
        response: a value for each row of the data, in the place of the formula's left side. It may
            be traced by JAX, so that estimates can be differentiated in it, for every model.
        weights, offset: as `fit`'s, or traced values.
        structure, context, residual, kernels: as `fit`'s.

    Examples:
        >>> design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        >>> design.parameter_names
        ('log_variance[Subject, (Intercept)]', 'log_variance[Subject, Days]', ...
        >>> design.n, design.p
        (180, 2)

        How the residual SD changes with the first response:

        >>> import jax
        >>> def sigma(y):
        ...     model = jaxreml.design("~ Days + (1 | Subject)", data, response=y)
        ...     return jaxreml.estimate(model).sigma
        >>> with jax.enable_x64(True):
        ...     slope = jax.grad(sigma)(jax.numpy.array(data["Reaction"]))
        >>> round(float(slope[0]), 4)
        -0.0091
    """
    of_rows = {"weights": weights, "offset": offset}
    traced = {role: value for role, value in of_rows.items() if is_traced(value)}
    of_rows |= dict.fromkeys(traced)
    given: Any = {"context": context, "residual": residual, "kernels": kernels, **of_rows}
    kind = floating_type([response, weights, offset], None)
    build = model_frame if response is None else covariate_frame
    frame = build(formula, data, **given)

    def used(value: Any, name: str) -> Any:
        return row_vector(value, kind, len(frame.rows), name)[frame.rows]

    traced = {role: used(value, role) for role, value in traced.items()}
    if "offset" in traced and frame.offset is not None:
        traced["offset"] = traced["offset"] + frame.offset
    frame = replace(frame, **traced)
    if response is None:
        return frame.design(structure)
    basis = frame.basis(structure)
    return Design.of(basis, basis.response(used(response, "response")))


def _used_columns(
    parsed: ParsedFormula, data: Any, context: Mapping[str, Any], others: tuple[str, ...]
) -> pd.DataFrame:
    """A copy of the columns that the formula names, and of others, as pandas."""
    expressions = [parsed.response] if parsed.response else []
    expressions += [parsed.fixed, *parsed.offsets]
    expressions += [bar.effects for bar in parsed.random]
    columns = texts_of_names(data)
    if any(re_dot == "." for re_dot in parsed.fixed.replace("+", " ").split()):
        raise FormulaError("'.' for all other columns is not supported: write the names out")
    for expression in expressions:
        _require_backticks(expression, columns, context)
    names = {name: True for expression in expressions for name in names_in(expression)}
    names |= {factor: False for bar in parsed.random for factor in bar.factors}
    names |= dict.fromkeys(others, False)
    wanted = []
    for name, may_be_function in names.items():
        if name in EXTRAS.values():
            raise FormulaError(
                f"{name!r} is the name of the argument's values in the results; rename the column"
            )
        if columns.count(name) > 1:
            raise DataError(f"column {name!r} occurs more than once in the data; rename one")
        if name in columns:
            wanted.append(name)
        elif not may_be_function or (name not in context and name not in TRANSFORMS):
            raise DataError(
                f"column {as_typed(name)!r} of the formula is not in the data"
                f"{nearest(name, columns, quoted=True)}"
            )
    table = to_pandas(data, wanted)
    if not len(table):
        raise DataError("the data have no rows")
    return table


def _require_backticks(expression: str, columns: list[str], context: Mapping[str, Any]) -> None:
    """Refuse a name with dots, which would be an attribute in Python, unless of a module."""
    for name in dotted_names(expression):
        root = name.split(".")[0]
        if name in columns:
            raise FormulaError(f"{name!r} has a dot and needs backticks: write `{name}`")
        if root not in context and root not in TRANSFORMS:
            raise DataError(
                f"column {name!r} of the formula is not in the data"
                f"{nearest(name, columns, quoted=True)}"
            )


def _complete_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Leave out rows with missing values, and then the levels that no row has."""
    given = table
    table, complete = complete_rows(table)
    if not complete.any():
        missing = given.isna()
        empty = [str(name) for name, column in missing.items() if np.all(column)]
        which = f"; nothing but missing values in {', '.join(empty)}" if empty else ""
        raise DataError(f"all {len(missing)} rows have a missing value in a column used{which}")
    for name in table.columns:
        require_no_stray(str(name), pd.Series(table[name]), as_factor=True)
        if isinstance(table[name].dtype, pd.CategoricalDtype):
            table[name] = table[name].cat.remove_unused_categories()
    return table, complete


def check_finite(table: pd.DataFrame) -> None:
    """Raise DataError naming the first column with an infinite value."""
    for name in table.columns:
        if pd.api.types.is_float_dtype(table[name].dtype):
            infinite = ~np.isfinite(table[name].to_numpy())
            if infinite.any():
                raise DataError(
                    f"column {str(name)!r} has {int(infinite.sum())} infinite value(s), the first "
                    f"in row {label(table.index[infinite])}; set them to NaN to drop the rows, or "
                    "correct them"
                )


def _is_column(text: str, table: pd.DataFrame) -> str | None:
    name = single_name(text)
    return name if name in table.columns else None


def _response(parsed: ParsedFormula, table: pd.DataFrame, context: Mapping[str, Any]) -> np.ndarray:
    text = parsed.response
    name = _is_column(text, table)
    if name is not None and not is_amount(pd.Series(table[name])):
        require_amounts_possible(name, pd.Series(table[name]))
        example = table[name].tolist()[0]
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
        row = label(table.index[~np.isfinite(y)])
        raise DataError(f"the response {text!r} is not finite in row {row}")
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
        if not is_amount(pd.Series(table[name])):
            require_amounts_possible(name, pd.Series(table[name]))
            raise DataError(f"the {role} {name!r} is not numeric")
        values, encoding = encode(f"0 + `{name}`", table, context, what)
    else:
        values, encoding = encode(f"0 + I({text})", table, context, what)
    if values.shape[1] != 1:
        raise DataError(f"{what} must be one numeric column, not {values.shape[1]}")
    return values[:, 0], encoding


def drop_aliased(
    X: np.ndarray, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Leave out columns that depend linearly on columns before them, as R does."""
    kept = independent_columns(X)
    if kept.size == X.shape[1]:
        return X, names, ()
    aliased = tuple(names[k] for k in range(len(names)) if k not in kept)
    return X[:, kept], tuple(names[k] for k in kept), aliased
