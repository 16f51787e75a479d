"""The terms of the fixed-effects formula: which columns of X are whose, and X at other rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import formulaic
import numpy as np
import pandas as pd
from formulaic.parser.types import Factor, Term

from jaxreml.errors import DataError
from jaxreml.formula import names_in
from jaxreml.frame import R_NAMES
from jaxreml.results import LMMResults

ESTIMABLE = 1e-8  # emmeans' tolerance, of the squared length outside the row space of X


@dataclass(frozen=True)
class FixedTerms:
    """The fixed effects of a fit by terms.

    Attributes:
        parsed: the parts of the formula.
        table: the rows used, without weights and offset given as arguments.
        context: what the formula may name besides columns.
        full: (n, P), X with its aliased columns.
        kept: (p,), those of its columns that have coefficients.
    """

    parsed: Any
    table: pd.DataFrame
    context: Mapping[str, Any]
    full: np.ndarray
    kept: np.ndarray
    spec: Any

    @property
    def names(self) -> list[str]:
        """The terms as formulaic writes them, without the intercept."""
        return [str(term) for term in self.spec.terms if term.degree]

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Per term its columns among those kept."""
        slices = {str(term): place for term, place in self.spec.term_slices.items()}
        found = {}
        for name in self.names:
            place = slices[name]
            found[name] = np.flatnonzero((self.kept >= place.start) & (self.kept < place.stop))
        return found

    def containing(self, name: str) -> list[str]:
        """Terms that contain another: all its variables, the same covariates, more factors."""
        terms = {str(term): term for term in self.spec.terms if term.degree}
        inner, inner_covariates = self._variables(terms[name])
        found = []
        for other, term in terms.items():
            outer, covariates = self._variables(term)
            if inner < outer and inner_covariates == covariates:
                found.append(other)
        return found

    def _variables(self, term: Term) -> tuple[set[str], set[str]]:
        """Factors and covariates of a term, and the covariates alone."""
        spec = self.overparameterised.model_spec
        names = {factor.expr for factor in term.factors}
        return names, {name for name in names if not _is_categorical(spec, name)}

    @cached_property
    def overparameterised(self) -> Any:
        """The model matrix with a column per level of every factor, Booleans too."""
        table = self.table.copy()
        for name in table.select_dtypes("bool"):
            table[name] = pd.Categorical(table[name])
        return _matrix(self.parsed.fixed, table, self.context, ensure_full_rank=False)

    def rows(self, table: pd.DataFrame) -> np.ndarray:
        """Rows (m, P) of X, aliased columns too, at the values in `table`.

        Raises:
            DataError: values at which the formula cannot be computed.
        """
        return _values(self.spec, table, self.context, "the fixed effects")

    def offsets(self, table: pd.DataFrame) -> np.ndarray:
        """(m,), the sum of the formula's offsets at the values in `table`."""
        total = np.zeros(len(table))
        for text in self.parsed.offsets:
            spec = _matrix(f"0 + I({text})", self.table, self.context).model_spec
            total += _values(spec, table, self.context, f"the offset {text!r}")[:, 0]
        return total

    @property
    def variables(self) -> list[str]:
        """Columns of the table that the fixed effects and the offsets use, in order."""
        texts = [self.parsed.fixed, *self.parsed.offsets]
        names = dict.fromkeys(name for text in texts for name in names_in(text))
        return [name for name in names if name in self.table.columns]

    @property
    def factors(self) -> set[str]:
        """Columns of the table that the formula uses as factors, numbers in C() among them."""
        found = set()
        for factor, names in self.spec.factor_variables.items():
            if _is_categorical(self.spec, factor.expr):
                found |= {str(name) for name in names} & set(self.table.columns)
        return found

    def estimable(self, L: np.ndarray) -> np.ndarray:
        """Which rows of (m, P) `L` are in the row space of X, booleans."""
        squared = np.einsum("mp,mp->m", L, L)
        outside = L @ self._null_space
        return np.einsum("md,md->m", outside, outside) <= ESTIMABLE * np.maximum(squared, 1e-300)

    @cached_property
    def _null_space(self) -> np.ndarray:
        """Orthonormal basis (P, d) of the coefficient vectors that X takes to zero."""
        p = self.full.shape[1]
        dropped = np.setdiff1d(np.arange(p), self.kept)
        vectors = np.zeros((p, dropped.size))
        vectors[dropped, np.arange(dropped.size)] = 1.0
        kept: Any = self.full[:, self.kept]
        vectors[self.kept] = -np.linalg.lstsq(kept, self.full[:, dropped])[0]
        return np.linalg.qr(vectors)[0]


def fixed_terms(fit: LMMResults) -> FixedTerms:
    """The terms of a fit.

    Raises:
        DataError: a fit that did not converge.
    """
    if not fit.converged:
        raise DataError(
            f"the fit did not converge ({fit.message}), so tests of its fixed effects would mean "
            "nothing"
        )
    context = {**R_NAMES, **(fit.context or {})}
    table = fit.table.drop(columns=["(weights)", "(offset)"], errors="ignore")
    parsed = fit.frame.formula
    matrix = _matrix(parsed.fixed, table, context)
    names = ["(Intercept)" if n == "Intercept" else str(n) for n in matrix.model_spec.column_names]
    full = np.asarray(matrix, float).reshape(len(table), len(names))
    kept = np.array([names.index(name) for name in fit.fixed_names], dtype=int)
    return FixedTerms(parsed, table, context, full, kept, matrix.model_spec)


def _is_categorical(spec: Any, expression: str) -> bool:
    kind, _ = spec.encoder_state.get(expression, (None, None))
    return kind is Factor.Kind.CATEGORICAL


def _matrix(text: str, table: pd.DataFrame, context: Mapping[str, Any], **options: Any) -> Any:
    """formulaic's matrix of a right side at the rows used, with its `model_spec`."""
    with np.errstate(all="ignore"):
        return formulaic.Formula(text).get_model_matrix(  # pyright: ignore
            table, na_action="raise", output="numpy", context=context, **options
        )


def _values(spec: Any, table: pd.DataFrame, context: Mapping[str, Any], what: str) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):
            matrix = spec.get_model_matrix(
                table, na_action="raise", output="numpy", context=context
            )
    except Exception as error:  # whatever a user's function may raise
        raise DataError(f"{what} cannot be computed at these values: {error}") from error
    names = spec.column_names
    values = np.asarray(matrix, float).reshape(len(table), len(names))
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any():
        raise DataError(f"{names[int(np.argmax(bad))]!r} of {what} is not finite at these values")
    return values
