"""Model matrices by formulaic, and how to make the same columns of other rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import formulaic
import numpy as np
import pandas as pd
from formulaic.errors import DataMismatchWarning, FormulaicError

from jaxreml.errors import DataError, FormulaError
from jaxreml.formula import names_in


@dataclass(frozen=True)
class Encoding:
    """How columns of a model matrix are made, as fitted to the rows of a model.

    The state of transforms (`poly`, `scale`, `center`, `bs`), the levels of factors and their
    contrasts are those of the rows that it was made from.

    Attributes:
        text: a formulaic right side.
        what: what the columns are, for messages.
        names: of all columns, those left out as aliased too.
        spec: formulaic's `ModelSpec`.
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataMismatchWarning)
            try:
                values = _model_matrix(self.spec, self.text, table, self.context, self.what)
            except DataMismatchWarning as warning:
                raise DataError(f"{self.what}: {self._unseen(table) or warning}") from None
        values = np.asarray(values, float).reshape(len(table), len(self.names))
        require_finite(values, self.names, table, self.what)
        return values

    def _unseen(self, table: pd.DataFrame) -> str:
        """Which column has a level that a factor has not, in words."""
        for factor, variables in self.spec.factor_variables.items():
            _, state = self.spec.encoder_state.get(str(factor), (None, {}))
            known = state.get("categories")
            columns = [str(name) for name in variables if str(name) in table]
            if known is None or len(columns) != 1:
                continue
            unknown = table[columns[0]][~table[columns[0]].isin(list(known))]
            if len(unknown):
                return unseen_level(columns[0], unknown.tolist()[0], list(known))
        return ""


def unseen_level(column: str, level: Any, known: list[Any]) -> str:
    """A sentence for a level that the fit has not."""
    listed = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    return f"column {column!r} has the level {level!r}, which the fit has not seen ({listed})"


def encode(
    text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> tuple[np.ndarray, Encoding]:
    """The model matrix of a formulaic right side, (n, columns), and its encoding."""
    with np.errstate(all="ignore"):  # what is not finite is refused by name below
        matrix = _model_matrix(None, text, table, context, what)
    spec = matrix.model_spec
    names = spec.column_names
    values = np.asarray(matrix, float).reshape(len(table), len(names))
    names = tuple("(Intercept)" if name == "Intercept" else str(name) for name in names)
    require_finite(values, names, table, what)
    return values, Encoding(text, what, names, spec, context)


def _model_matrix(
    spec: Any, text: str, table: pd.DataFrame, context: Mapping[str, Any], what: str
) -> Any:
    try:
        with np.errstate(all="ignore"):
            if spec is not None:
                return spec.get_model_matrix(table, context=context)
            return formulaic.Formula(text).get_model_matrix(  # pyright: ignore
                table, na_action="raise", output="numpy", context=context
            )
    except DataMismatchWarning:
        raise
    except FormulaicError as error:
        raise (FormulaError if spec is None else DataError)(f"{what}, {text!r}: {error}") from error
    except Exception as error:  # whatever a user's function may raise
        raise DataError(f"{what}, {text!r}, cannot be computed: {error}") from error


def require_finite(
    values: np.ndarray, names: tuple[str, ...], table: pd.DataFrame, what: str
) -> None:
    """Raise DataError naming the first column, and its row, with a value that is not finite."""
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any():
        k = int(np.argmax(bad))
        row = table.index[int(np.argmax(~np.isfinite(values[:, k])))]
        raise DataError(f"{names[k]!r} in {what} is not finite in row {row!r}")
