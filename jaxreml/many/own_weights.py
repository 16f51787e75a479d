"""`WeightedFitter`: blocks of responses with weights of their own.

Responses with the same weights go together, as if these were the model's. The others go in lanes,
each with its own cross-products (`weighted`), or one by one: other designs than those of one
grouping factor, and what lanes cannot be trusted with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jaxreml.arguments import check_engine
from jaxreml.data.frame import ModelFrame
from jaxreml.many.engine import BatchFitter
from jaxreml.many.lanes import MOST_EFFECTS
from jaxreml.many.numbers import Fits, Table
from jaxreml.many.weighted import WeightedEngine, WeightedPasses
from jaxreml.model.design import Design
from jaxreml.status import Status

TOGETHER = 16  # responses of the same weights, from which on these are taken for the model's


class WeightedFitter:
    """As `BatchFitter`, for responses and their weights, on NumPy.

    Args:
        frame: a `covariate_frame` without weights.
        options: of `BatchFitter`.

    Raises:
        ValueError: ``engine="jax"``, or devices.
    """

    def __init__(self, frame: ModelFrame, method: str, **options: Any):
        check_engine(engine := options.pop("engine", None))
        if engine == "jax" or options.get("devices") is not None:
            raise ValueError(
                "weights of the responses' own are NumPy's: leave engine and devices out"
            )
        self.frame, self.options = frame, {"method": method, **options, "engine": "numpy"}
        self.plain = BatchFitter(frame, **self.options)
        self.method, self.df, self.structure = method, self.plain.df, self.plain.structure
        self.engine_name = self.plain.engine_name
        basis = self.plain.basis
        self.lanes = None
        if basis.kind == "grouped" and sum(basis.sizes) <= MOST_EFFECTS:
            inside = [basis.units.rows(k, term.effects) for k, term in enumerate(frame.terms)]
            effects = np.concatenate(inside, axis=1)
            self.lanes = WeightedEngine(frame, basis, effects, self.plain.options, self.plain.known)

    def fit(self, values: np.ndarray, weights: np.ndarray) -> Fits:
        """Fit each column of (n, b) `values`, NaN if missing, with that of `weights`; a weight of
        zero or NaN leaves the row out."""
        weights = np.where(np.isnan(values) | np.isnan(weights), 0.0, weights)
        values = np.where(weights > 0, values, np.nan)
        table = Table(self.frame, values.shape[1], self.plain.modes, self.contrasts)
        groups: dict[bytes, list[int]] = {}
        for column in range(values.shape[1]):
            groups.setdefault(weights[:, column].tobytes(), []).append(column)
        apart = []
        for same in groups.values():
            if self.lanes is None or len(same) >= TOGETHER:
                own = np.array(same)
                table.take(own, self._fitter(weights[:, own[0]]).table(values[:, own]))
            else:
                apart += same
        if apart:
            self._in_lanes(values, weights, np.sort(apart), table)
        return table.fits()

    @property
    def contrasts(self) -> int:
        """How many."""
        return len(self.plain.options.contrasts)

    def _fitter(self, weights: np.ndarray) -> BatchFitter:
        """Of a model with these weights; they do not count where there is no response."""
        own = np.where(weights > 0, weights, 1.0)
        return BatchFitter(replace(self.frame, weights=own), **self.options)

    def _in_lanes(
        self, values: np.ndarray, weights: np.ndarray, columns: np.ndarray, table: Table
    ) -> None:
        """The rows left out are those of weight zero, where values are NaN."""
        assert self.lanes is not None
        used = weights[:, columns] > 0
        count = used.sum(axis=0)
        table.n_missing[columns] = len(values) - count
        with np.errstate(invalid="ignore"):
            table.mean[columns] = np.where(used, values[:, columns], 0.0).sum(axis=0) / count
        table.status[columns] = Status.TOO_FEW_ROWS
        infinite = np.isinf(values[:, columns]).any(axis=0)
        highest = np.where(used, values[:, columns], -np.inf).max(axis=0)
        lowest = np.where(used, values[:, columns], np.inf).min(axis=0)
        table.status[columns[(highest == lowest) & (count > 0)]] = Status.CONSTANT
        table.status[columns[infinite]] = Status.INFINITE
        todo = columns[~infinite & (highest > lowest)]
        doubtful = todo[self._lacks(weights[:, todo])]

        def single(column: int) -> Design:
            fitter = self._fitter(weights[:, column])
            return fitter.design(values[:, column])

        todo = np.setdiff1d(todo, doubtful)
        if todo.size:
            passes = WeightedPasses(self.lanes, values, weights, table, single)
            passes.run(todo)
            passes.certify(todo)
        again = todo[table.status[todo] != Status.CONVERGED]
        for column in np.concatenate([doubtful, again]):
            own = self._fitter(weights[:, column]).table(values[:, [column]])
            table.take(np.array([column]), own)

    def _lacks(self, weights: np.ndarray) -> np.ndarray:
        """Which responses have too few rows or levels for lanes, booleans."""
        assert self.lanes is not None
        rows, q = self.lanes.rows, self.lanes.effects.shape[1]
        used = weights > 0
        count = used.sum(axis=0)
        levels = (rows.sums(used.astype(float)) > 0).sum(axis=0)
        few = (count <= self.frame.X.shape[1]) | (levels < 2) | (levels * q >= count)
        return few & (count < len(weights))


def fitter_for(frame: ModelFrame, method: str, *, weighted: bool, **options: Any) -> Any:
    """A `BatchFitter`, or a `WeightedFitter` if the responses have weights of their own."""
    return (WeightedFitter if weighted else BatchFitter)(frame, method, **options)
