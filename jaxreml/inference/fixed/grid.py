"""The reference grid: at which values of its variables a fit's predictions are averaged.

All levels of the factors, and every covariate at its mean over the rows used. Factors are text,
categories, Booleans, what ``C()`` makes a factor, and covariates of at most two values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.tables import nearest
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.nested import Nesting, find_nesting, with_outer
from jaxreml.inference.fixed.terms import FixedTerms, fixed_terms

TWO_VALUES = 2  # covariates of no more distinct values are taken as factors, as in emmeans
LARGEST = 50_000_000  # entries of the grid's model matrix
OVERALL = "1"


@dataclass(frozen=True, eq=False)
class ReferenceGrid:
    """Values of the variables at which predictions are averaged.

    Attributes:
        terms: of the fit.
        levels: per variable its values, the first varies fastest over the grid.
        counted: the factors whose combinations of levels are counted in the data.
        constant: added to all predictions: the mean of an offset given as an argument.
        nesting: factors nested in others, see `jaxreml.inference.nested`.
    """

    terms: FixedTerms
    levels: dict[str, list[Any]]
    counted: tuple[str, ...]
    constant: float
    nesting: Nesting

    @cached_property
    def table(self) -> pd.DataFrame:
        """The grid, in the types of the data's columns."""
        columns = {}
        for name, place in zip(self.levels, self.places, strict=True):
            values = [self.levels[name][k] for k in place]
            dtype = self.terms.table[name].dtype
            keep = isinstance(dtype, pd.CategoricalDtype) or not is_numeric(dtype)
            columns[name] = pd.Series(values, dtype=dtype if keep else None)
        return pd.DataFrame(columns, index=range(self.size))

    @property
    def size(self) -> int:
        """Rows of the grid."""
        return int(np.prod([len(values) for values in self.levels.values()], dtype=float))

    @cached_property
    def places(self) -> list[np.ndarray]:
        """Per variable the position of its value in each row of the grid."""
        shape = tuple(len(values) for values in self.levels.values())
        if not shape:
            return []
        return [np.asarray(k) for k in np.unravel_index(np.arange(self.size), shape, order="F")]

    @cached_property
    def frequencies(self) -> np.ndarray:
        """How many of the data's rows are in the cell of each row of the grid."""
        names = list(self.counted)
        if not names:
            return np.ones(self.size)
        found = Counter(self.terms.table[names].itertuples(index=False, name=None))
        cells = self.table[names].itertuples(index=False, name=None)
        return np.array([float(found[cell]) for cell in cells])

    @cached_property
    def exists(self) -> np.ndarray:
        """Which rows of the grid have levels of nested factors that there are, booleans."""
        found = np.ones(self.size, bool)
        for name in self.nesting:
            found &= self._count_by([name, *self.nesting[name]], self.frequencies) > 0
        return found

    def _cells(self, names: Sequence[str]) -> np.ndarray:
        """The number of each row's combination of the levels of `names`, the first fastest."""
        sizes = [len(values) for values in self.levels.values()]
        kept = [list(self.levels).index(name) for name in names]
        return _positions([self.places[k] for k in kept], [sizes[k] for k in kept])

    def _count_by(self, names: Sequence[str], counts: np.ndarray) -> np.ndarray:
        """Sums of `counts` over the rows with the same levels of `names`, per row of the grid."""
        cells = np.broadcast_to(self._cells(names), self.size)
        return np.bincount(cells, counts)[cells]

    def _shares(self, names: Sequence[str], weights: str) -> np.ndarray:
        """What a row of the grid counts in averages over the variables not in `names`."""
        others = [name for name in self.levels if name not in names]
        if weights == "proportional":
            share = self._count_by(with_outer(others, self.nesting), self.frequencies)
            if not share.any():
                raise DataError(
                    "no rows have these levels, so weights='proportional' has nothing to go by: "
                    "use weights='equal'"
                )
            return share * self.exists
        share = self.exists.astype(float)
        for name in others:
            if name in self.nesting:  # one over its levels within those that it is nested in
                outer = self.nesting[name]
                distinct = self.exists / np.maximum(self._count_by([name, *outer], self.exists), 1)
                share *= 1 / np.maximum(self._count_by(outer, distinct), 1.0)
        return share

    def averaging(self, names: Sequence[str], weights: str) -> tuple[np.ndarray, np.ndarray]:
        """Averages over the variables not in `names`.

        Returns:
            Weights (means, rows of the grid), and which means there are (all but combinations of
            nested levels that do not occur), booleans.
        """
        cell = self._cells(names)
        means = int(np.prod([len(self.levels[name]) for name in names], dtype=float))
        matrix = np.zeros((means, self.size))
        matrix[cell, np.arange(self.size)] = self._shares(names, weights)
        total = matrix.sum(axis=1)
        exists = np.ones(means, bool)
        if self.nesting:
            exists = np.bincount(np.broadcast_to(cell, self.size), self.exists) > 0
        with np.errstate(invalid="ignore"):
            return matrix[exists] / total[exists, None], exists

    def labels(self, names: Sequence[str]) -> pd.DataFrame:
        """A row per combination of the levels of `names`, the first varies fastest."""
        if not names:
            return pd.DataFrame({OVERALL: ["overall"]})
        shape = [len(self.levels[name]) for name in names]
        places = np.unravel_index(np.arange(int(np.prod(shape))), shape, order="F")
        return pd.DataFrame(
            {n: [self.levels[n][i] for i in k] for n, k in zip(names, places, strict=True)}
        )


def _positions(places: list[np.ndarray], sizes: list[int]) -> np.ndarray:
    if not places:
        return np.zeros(1, dtype=int)
    return np.ravel_multi_index(places, sizes, order="F")


def is_numeric(dtype: Any) -> bool:
    """Whether a column of this type can be a covariate."""
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)


def reference_grid(fit: FittedModel, at: Mapping[str, Any] | None = None) -> ReferenceGrid:
    """The reference grid of a fit.

    Args:
        fit: the fit.
        at: per variable the values to take instead: levels of a factor, any numbers for a
            covariate.

    Raises:
        DataError: no such variable or level, or a grid too large.
    """
    if not len(fit.beta):
        raise DataError("the model has no fixed effects, so there are no means to estimate")
    terms = fixed_terms(fit)
    if not isinstance(at, Mapping | None):
        raise ValueError(f"at must be a dict from variables to values, not {at!r}")
    at = dict(at or {})
    for name in at:
        if name not in terms.variables:
            raise DataError(
                f"at: {name!r} is not a variable of the fixed effects"
                f"{nearest(name, terms.variables)}"
            )
    levels, counted = {}, []
    for name in terms.variables:
        column = pd.Series(terms.table[name])
        found = _distinct(column)
        factor = name in terms.factors or not is_numeric(column.dtype)
        if name in at:
            levels[name] = _chosen(name, at[name], found if factor else None)
        elif factor or len(found) <= TWO_VALUES:
            levels[name] = found
        else:
            levels[name] = [float(np.mean(column.to_numpy(float)))]
        if factor or (name not in at and len(found) <= TWO_VALUES):
            counted.append(name)
    given = fit.table["(offset)"] if "(offset)" in fit.table else np.zeros(1)
    several = [name for name in counted if len(levels[name]) > 1]
    chosen = np.ones(len(terms.table), bool)
    for name in several:
        chosen &= pd.Series(terms.table[name]).isin(levels[name]).to_numpy(bool)
    cells = terms.table.reindex(columns=several).loc[chosen].drop_duplicates()
    nesting = find_nesting(cells, set(terms.variables_of_terms.values()))
    grid = ReferenceGrid(terms, levels, tuple(counted), float(np.mean(given)), nesting)
    if grid.size * terms.full.shape[1] > LARGEST:
        most = max(levels, key=lambda name: len(levels[name]))
        raise DataError(
            f"the reference grid has {grid.size} rows; take fewer levels of {most!r} by at={{...}}"
        )
    return grid


def _distinct(column: pd.Series) -> list[Any]:
    """Levels in their order."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.remove_unused_categories().cat.categories.tolist()
    return sorted(column.unique().tolist())


def _chosen(name: str, values: Any, levels: list[Any] | None) -> list[Any]:
    """Values given by `at`, which must be among the levels of a factor."""
    scalar = isinstance(values, str) or np.ndim(values) == 0
    chosen = [values] if scalar else list(values)
    chosen = [value.item() if isinstance(value, np.generic) else value for value in chosen]
    if not chosen:
        raise ValueError(f"at: no values for {name!r}")
    if levels is None:
        try:
            return [float(value) for value in chosen]
        except (TypeError, ValueError):
            raise ValueError(
                f"at: the values of {name!r} must be numbers, not {values!r}"
            ) from None
    for value in chosen:
        if value not in levels:
            shown = ", ".join(map(repr, levels[:10])) + (", ..." if len(levels) > 10 else "")
            raise DataError(f"at: {name!r} has no level {value!r}; it has {shown}")
    return chosen
