"""The terms of the fixed-effects formula: which columns of X are whose, and X at other rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from formulaic.parser.types import Factor, Term

from jaxreml.data.encoding import Encoding
from jaxreml.data.evaluation import model_matrix, plain
from jaxreml.data.frame import ModelFrame, split_extras
from jaxreml.fitting.fitted import FittedModel


@dataclass(frozen=True)
class FixedTerms:
    """The fixed effects of a fit by terms.

    Attributes:
        frame: the model frame of the fit.
        table: the rows used, without weights and offset given as arguments.
    """

    frame: ModelFrame
    table: pd.DataFrame

    @property
    def encoding(self) -> Encoding:
        """How X is made, its aliased columns too."""
        return self.frame.fixed_encoding

    @property
    def spec(self) -> Any:
        """formulaic's `ModelSpec`."""
        return self.encoding.spec

    @cached_property
    def full(self) -> np.ndarray:
        """(n, P), X with its aliased columns."""
        return self.encoding.matrix(self.table)

    @property
    def names(self) -> list[str]:
        """The terms as formulaic writes them, without the intercept."""
        return list(self.columns)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Per term its columns among those kept."""
        return self.frame.fixed_terms

    def containing(self, name: str) -> list[str]:
        """Terms that contain another: all its variables, the same covariates, more factors."""
        terms = {plain(term): term for term in self.spec.terms if term.degree}
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
        text, context = self.encoding.text, self.encoding.context
        with np.errstate(all="ignore"):
            return model_matrix(None, text, table, context, ensure_full_rank=False)

    @property
    def variables(self) -> list[str]:
        """Columns of the table that the fixed effects and the offsets use, in order."""
        encodings = [self.encoding, *self.frame.offset_encodings]
        names = dict.fromkeys(name for encoding in encodings for name in encoding.variables)
        return [name for name in names if name in self.table.columns]

    @cached_property
    def variables_of_terms(self) -> dict[str, frozenset[str]]:
        """Per term, the intercept among them, the columns of the table that it uses."""
        columns = set(self.table.columns)
        of_factor = {
            factor.expr: {plain(name) for name in names} & columns
            for factor, names in self.spec.factor_variables.items()
        }
        return {
            plain(term): frozenset().union(*(of_factor.get(f.expr, ()) for f in term.factors))
            for term in self.spec.terms
        }

    @property
    def factors(self) -> set[str]:
        """Columns of the table that the formula uses as factors, numbers in C() among them."""
        found = set()
        for factor, names in self.spec.factor_variables.items():
            if _is_categorical(self.spec, factor.expr):
                found |= {plain(name) for name in names} & set(self.table.columns)
        return found


def fixed_terms(fit: FittedModel) -> FixedTerms:
    """The terms of a fit.

    Raises:
        DataError: a fit that did not converge.
    """
    fit.require_optimum("test fixed effects")
    return FixedTerms(fit.frame, split_extras(fit.table)[0])


def _is_categorical(spec: Any, expression: str) -> bool:
    kind, _ = spec.encoder_state.get(expression, (None, None))
    return kind is Factor.Kind.CATEGORICAL
