"""What an effect plot shows: predictions along a variable, of the mean and of groups' levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.tables import nearest
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.grid import TWO_VALUES, is_numeric, reference_grid
from jaxreml.inference.fixed.means import MarginalMeans, emmeans
from jaxreml.inference.fixed.terms import FixedTerms, fixed_terms

STEPS = 61  # values of a covariate along which a line is drawn
FEW = 5  # distinct values of a covariate that are all taken where it tells lines apart
MOST = 500  # levels of a grouping factor that have lines unasked


@dataclass(frozen=True)
class Effect:
    """What an effect plot is of; see `effects_data`."""

    fit: FittedModel
    variable: str
    by: str | None
    facet: str | None
    at: dict[str, Any]

    def __post_init__(self):
        names = self.names
        if len(set(names)) < len(names):
            raise ValueError(f"variable, by and facet must differ, not {', '.join(names)}")
        known = self.terms.variables
        for name in names:
            if name not in known:
                raise DataError(
                    f"{name!r} is not a variable of the fixed effects{nearest(name, known)}"
                )

    @property
    def names(self) -> list[str]:
        """The variables asked for, in order."""
        return [name for name in (self.variable, self.by, self.facet) if name]

    @property
    def response(self) -> str:
        """The left side of the formula."""
        return str(self.fit.frame.formula.response)

    @cached_property
    def terms(self) -> FixedTerms:
        """Of the fit."""
        return fixed_terms(self.fit)

    def column(self, name: str) -> pd.Series:
        """A variable in the rows used."""
        return pd.Series(self.terms.table[name])

    def is_covariate(self, name: str) -> bool:
        """Whether a variable is one along which there are lines; one of two values is not."""
        column = self.column(name)
        several = column.nunique() > TWO_VALUES
        return several and is_numeric(column.dtype) and name not in self.terms.factors

    @cached_property
    def values(self) -> dict[str, Any]:
        """Per variable its values, those of `at` and of covariates asked for."""
        found = dict(self.at)
        for name in self.names:
            if name not in found and self.is_covariate(name):
                column = self.column(name).astype(float)
                found[name] = _along(column) if name == self.variable else _few(column)
        return found

    def means(self, df: str, weights: str, conf_level: float) -> MarginalMeans:
        """The means of the variables' combinations; see `emmeans`."""
        return emmeans(
            self.fit, self.names, at=self.values, df=df, weights=weights, conf_level=conf_level
        )

    @cached_property
    def grouping(self) -> str:
        """The first grouping factor with a random effect of the variable, or the first; "" of a fit
        without random effects."""
        terms = self.fit.frame.terms
        own = [term.name for term in terms if self.variable in term.encoding.variables]
        return [*own, *(term.name for term in terms), ""][0]

    @property
    def few_groups(self) -> bool:
        """Whether there are levels of `grouping`, and not too many for a line each."""
        return bool(self.grouping) and self.fit.ngroups[self.grouping] <= MOST

    @property
    def cells(self) -> list[str]:
        """Those of `by` and `facet` that are factors: rows are of one of their levels."""
        return [name for name in self.names[1:] if not self.is_covariate(name)]

    def of_groups(self, group: str) -> pd.DataFrame:
        """`effects_groups_data`."""
        frame = self.fit.frame
        chosen = [k for k, term in enumerate(frame.terms) if term.name == group]
        if not chosen:
            known = ", ".join(dict.fromkeys(term.name for term in frame.terms))
            raise DataError(f"there is no grouping factor {group!r}: {known}")
        if group == self.variable:
            raise ValueError(f"the levels of {group!r} have no lines along {group!r} itself")
        first = frame.terms[chosen[0]]
        labels = pd.DataFrame({group: first.codes})
        for name in self.cells:
            if name != group:
                labels[name] = self.column(name).to_numpy()
        cells = labels.groupby([*labels], observed=True, sort=True)
        cell, rows = cells.ngroup().to_numpy(), cells.size().to_numpy()
        keys = labels.drop_duplicates().sort_values([*labels]).reset_index(drop=True)
        parts = []
        for value in reference_grid(self.fit, self.values).levels[self.variable]:
            mean = self._predicted(value, chosen)
            average = np.bincount(cell, mean) / rows
            parts.append(keys.assign(**{self.variable: value, "prediction": average}))
        found = pd.concat(parts, ignore_index=True)
        found = found.sort_values([*keys], kind="stable", ignore_index=True)
        return found.assign(**{group: np.array(first.levels, object)[found[group]]})

    def _predicted(self, value: Any, terms: Sequence[int]) -> np.ndarray:
        """Predictions for the rows with the variable at a value, with the effects of some terms."""
        frame, own = self.fit.frame, self.column(self.variable)
        dtype = float if self.is_covariate(self.variable) else own.dtype
        column = pd.Series([value] * len(own), own.index, dtype=dtype)
        table = self.fit.table.assign(**{self.variable: column})
        full = frame.fixed_encoding.matrix(table)
        given = self.fit.table["(offset)"].to_numpy() if "(offset)" in self.fit.table else 0.0
        mean = full[:, frame.kept] @ self.fit.beta + frame.offsets(table) + given
        mean[~frame.estimable(full)] = np.nan
        for k in terms:
            term = frame.terms[k]
            modes = self.fit.groupings[k].modes[term.codes]
            mean += np.sum(term.encoding.matrix(table) * modes, axis=1)
        return mean

    def rows(self, panel: Any) -> pd.DataFrame:
        """The rows of a panel: the variable, `cells` and the response."""
        columns = {name: self.column(name).to_numpy() for name in [self.variable, *self.cells]}
        whole: Any = pd.DataFrame(columns | {"(response)": self.fit.y})
        if self.facet in self.cells:
            return whole[whole[self.facet] == panel]
        return whole


def _along(column: pd.Series) -> list[float]:
    return np.linspace(column.min(), column.max(), STEPS).tolist()


def _few(column: pd.Series) -> list[float]:
    distinct = np.unique(column)
    if len(distinct) <= FEW:
        return distinct.tolist()
    values = column.to_numpy(float)
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    digits = 2 - math.floor(math.log10(sd))  # as many as the labels of lines need
    return [round(value, digits) for value in (mean - sd, mean, mean + sd)]
