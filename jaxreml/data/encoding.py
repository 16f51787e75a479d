"""Model matrices by formulaic, and how to make the same columns of other rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from formulaic.errors import DataMismatchWarning, FormulaicError
from formulaic.parser.types import Factor

from jaxreml.data import evaluation
from jaxreml.data.columns import label, require_amounts_possible, unseen_level
from jaxreml.data.evaluation import plain
from jaxreml.data.formula import names_in
from jaxreml.errors import DataError, FormulaError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of formulaic's messages, for terminals


@dataclass(frozen=True)
class Encoding:
    """How columns of a model matrix are made, as fitted to the rows of a model.

    The state of transforms (`poly`, `scale`, `center`, `bs`), the levels of factors and their
    contrasts are those of the rows that it was made from.

    Attributes:
        text: a formulaic right side.
        what: what the columns are, for messages.
        names: of all columns, those left out as aliased too.
        spec: formulaic's `ModelSpec`, in which names are marked (`evaluation.plain`).
        context: names that the text may use besides columns.
    """

    text: str
    what: str
    names: tuple[str, ...]
    spec: Any
    context: Mapping[str, Any]

    @property
    def variables(self) -> list[str]:
        """Names in the text, columns among them."""
        return names_in(self.text)

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """The columns for other rows, complete ones, (rows, columns).

        Raises:
            DataError: levels of a factor that the encoding has not seen, named; values that cannot
                be computed or are not finite.
        """
        values = self._products(table)
        if values is not None:
            require_finite(values, self.names, table, self.what)
            return values
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataMismatchWarning)
            try:
                values = _model_matrix(self.spec, self.text, table, self.context, self.what)
            except DataMismatchWarning as warning:
                raise DataError(f"{self.what}: {self._unseen(table) or warning}") from None
        values = np.asarray(values, float).reshape(len(table), len(self.names))
        require_finite(values, self.names, table, self.what)
        return values

    @cached_property
    def _factors(self) -> list[list[str]] | None:
        """Per column the covariates that it is the product of, if each is a column of the data."""
        found = []
        for term in self.spec.terms:
            factors = term.factors if term.degree else []
            for factor in factors:
                kind, _ = self.spec.encoder_state.get(factor.expr, (None, None))
                if factor.eval_method.value != "lookup" or kind is not Factor.Kind.NUMERICAL:
                    return None
            found.append([plain(factor.expr) for factor in factors])
        return found if len(found) == len(self.names) else None

    def _products(self, table: pd.DataFrame) -> np.ndarray | None:
        """The columns where all are products of numeric ones, which needs no formulaic."""
        if self._factors is None:
            return None
        for name in {name for names in self._factors for name in names}:
            kind = table[name].dtype if name in table else None
            if not isinstance(kind, np.dtype) or kind.kind not in "fiu":
                return None
        values = np.ones((len(table), len(self.names)))
        for k, names in enumerate(self._factors):
            for name in names:
                values[:, k] *= table[name].to_numpy(float)
        return values

    def _unseen(self, table: pd.DataFrame) -> str:
        """Which column has a level that a factor has not, in words."""
        for factor, variables in self.spec.factor_variables.items():
            _, state = self.spec.encoder_state.get(str(factor), (None, {}))
            known = state.get("categories")
            columns = [plain(name) for name in variables if plain(name) in table]
            if known is None or len(columns) != 1:
                continue
            unknown = table[columns[0]][~table[columns[0]].isin(list(known))]
            if len(unknown):
                return unseen_level(columns[0], unknown.tolist()[0], list(known))
        return ""


def encode(
    text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> tuple[np.ndarray, Encoding]:
    """The model matrix of a formulaic right side, (n, columns), and its encoding."""
    with np.errstate(all="ignore"):  # what is not finite is refused by name below
        matrix = _model_matrix(None, text, table, context, what)
    spec = matrix.model_spec
    names = tuple(
        plain(name) if term.degree else "(Intercept)"
        for term, _, columns in spec.structure
        for name in columns
    )
    repeated = [name for k, name in enumerate(names) if name in names[:k]]
    if repeated:
        raise FormulaError(
            f"two columns in {what} are called {repeated[0]!r}; rename the column of the data that "
            "has a name like that"
        )
    values = np.asarray(matrix, float).reshape(len(table), len(names))
    require_finite(values, names, table, what)
    return values, Encoding(text, what, names, spec, context)


def _model_matrix(
    spec: Any, text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> Any:
    try:
        with np.errstate(all="ignore"):
            return evaluation.model_matrix(spec, text, table, context)
    except DataMismatchWarning:
        raise
    except DataError as error:
        raise DataError(f"{what}, {text!r}: {error}") from None
    except FormulaicError as error:
        _name_cause(text, table)
        message = _COLOURS.sub("", str(error))
        raise (FormulaError if spec is None else DataError)(
            f"{what}, {text!r}: {message}"
        ) from error
    except Exception as error:  # whatever a user's function may raise
        _name_cause(text, table)
        raise DataError(f"{what}, {text!r}, cannot be computed: {error}") from error


def _name_cause(text: str, table: pd.DataFrame) -> None:
    """Raise DataError if a column of an expression that failed cannot be computed with."""
    for name in names_in(text):
        if name in table:
            require_amounts_possible(name, pd.Series(table[name]))


def require_finite(
    values: np.ndarray, names: tuple[str, ...], table: pd.DataFrame, what: str
) -> None:
    """Raise DataError naming the first column, and its row, with a value that is not finite."""
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any():
        k = int(np.argmax(bad))
        row = label(table.index[~np.isfinite(values[:, k])])
        raise DataError(f"{names[k]!r} in {what} is not finite in row {row}")
