"""`OwnFitter`: blocks of responses with weights, rows or a covariate of their own.

They go in lanes, each with its own cross-products (`own_designs`), or one by one: other designs
than those of one grouping factor, and what lanes cannot be trusted with. Responses with the same
weights, if that is all they have, go together, as if these were the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from jaxreml.arguments import check_engine
from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.many.base import Known
from jaxreml.many.engine import TOGETHER, BatchFitter
from jaxreml.many.host import HostEngine
from jaxreml.many.lanes import MOST_EFFECTS
from jaxreml.many.numbers import Fits, Table
from jaxreml.many.own_designs import OwnDesigns, OwnPasses
from jaxreml.optimum.report import Estimate
from jaxreml.status import Status


class _Block(NamedTuple):
    """Responses, weights and covariates, (n, b); where a weight is zero values are NaN."""

    values: np.ndarray
    weights: np.ndarray
    x: np.ndarray | None


class OwnFitter:
    """As `BatchFitter`, for responses with weights or a covariate of their own, on NumPy.

    Args:
        frame: a `covariate_frame`; its weights are those of all responses without their own.
        method: "REML" or "ML".
        covariate: the column of X, by name, that every response has its own of; None for none.
        options: of `BatchFitter`.

    Raises:
        ValueError: ``engine="jax"``, or devices.
    """

    def __init__(
        self, frame: ModelFrame, method: str, *, covariate: str | None = None, **options: Any
    ):
        check_engine(engine := options.pop("engine", None))
        if engine == "jax" or options.get("devices") is not None:
            raise ValueError(
                "weights and covariates of the responses' own are NumPy's: leave engine and "
                "devices out"
            )
        self.frame, self.options = frame, {"method": method, **options, "engine": "numpy"}
        places = np.arange(len(frame.fixed_names))
        self.place = None
        plain = replace(frame, weights=None)
        if covariate is not None:
            self.place = frame.fixed_names.index(covariate)
            others = np.delete(places, self.place)
            plain = replace(
                plain,
                X=frame.X[:, others],
                fixed_names=tuple(np.delete(frame.fixed_names, self.place)),
            )
            places = np.append(others, self.place)
        contrasts = options.get("contrasts")
        if contrasts is None:
            contrasts = np.zeros((0, places.size))
        self.contrasts = len(contrasts)
        shared = {**self.options, "contrasts": None}
        fitter = BatchFitter(plain, **shared)
        self.method, self.df, self.structure = method, fitter.df, fitter.structure
        self.engine_name, self.modes = fitter.engine_name, fitter.modes
        basis = fitter.basis
        self.lanes = None
        if basis.kind == "grouped" and sum(basis.sizes) <= MOST_EFFECTS:
            inside = [basis.units.rows(k, term.effects) for k, term in enumerate(frame.terms)]
            known = Known(places, np.ones(places.size + self.contrasts, bool))
            own = fitter.options._replace(contrasts=contrasts[:, places])
            effects = np.concatenate(inside, axis=1)
            self.lanes = OwnDesigns(frame, basis, effects, own, known, self._shared)

    def fit(
        self, values: np.ndarray, weights: np.ndarray | None = None, x: np.ndarray | None = None
    ) -> Fits:
        """Fit each column of (n, b) `values` with its weights and covariate. A value, weight or
        covariate that is NaN leaves the row out, and so does a weight of zero."""
        table = Table(self.frame, values.shape[1], self.modes, self.contrasts)
        whole = np.zeros(values.shape[1], bool)
        if self.lanes is not None and weights is None and x is not None:
            whole = _is_whole(values) & _is_whole(x)
            shared = np.broadcast_to(self._shared[:, None], values.shape)
            columns = np.flatnonzero(whole)
            table.mean[columns] = values[:, columns].mean(axis=0)
            self._search(self.lanes, _Block(values, shared, x), columns, table, alike=True)
        rest = np.flatnonzero(~whole)
        if rest.size:
            parts: Any = (None if own is None else own[:, rest] for own in (values, weights, x))
            table.take(rest, self.table(*parts))
        return table.fits()

    def table(
        self, values: np.ndarray, weights: np.ndarray | None = None, x: np.ndarray | None = None
    ) -> Table:
        """`fit` to a `Table`, of responses that may lack rows."""
        block = self._block(values, weights, x)
        table = Table(self.frame, values.shape[1], self.modes, self.contrasts)
        apart: list[int] = []
        for same in self._by_weights(block):
            if len(same) >= TOGETHER:
                own = np.array(same)
                table.take(own, self._fitter(block, same[0]).table(block.values[:, own]))
            else:
                apart += same
        if apart and self.lanes is not None:
            self._in_lanes(self.lanes, block, np.sort(apart), table)
        elif apart:
            self._alone(block, np.array(apart), table)
        return table

    @property
    def _shared(self) -> np.ndarray:
        """Weights of responses without their own, (n,)."""
        return np.ones(len(self.frame.X)) if self.frame.weights is None else self.frame.weights

    def estimates(
        self,
        values: np.ndarray,
        theta: np.ndarray,
        weights: np.ndarray | None = None,
        x: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, Known, Estimate]]:
        """As `BatchFitter.estimates`, of responses that have all coefficients."""
        block = self._block(values, weights, x)
        columns = np.flatnonzero(np.isfinite(theta).all(axis=1))
        if self.lanes is not None:
            nothing: Any = None  # is stored, or looked at by itself
            passes = OwnPasses(self.lanes, *block, False, nothing, single=nothing)
            for own, estimate in passes.estimates(columns, theta):
                yield own, self.lanes.known, estimate
            return
        for column in columns:
            own, fitter = np.array([column]), self._fitter(block, int(column))
            for _, known, estimate in fitter.estimates(block.values[:, own], theta[own]):
                yield own, known, estimate

    def _block(
        self, values: np.ndarray, weights: np.ndarray | None, x: np.ndarray | None
    ) -> _Block:
        if weights is None:
            weights = np.broadcast_to(self._shared[:, None], values.shape)
        missing = np.isnan(values) | np.isnan(weights)
        if x is not None:
            missing |= np.isnan(x)
        weights = np.where(missing, 0.0, weights)
        return _Block(np.where(weights > 0, values, np.nan), weights, x)

    def _by_weights(self, block: _Block) -> list[list[int]]:
        """Columns that have the same weights and no covariate, together."""
        columns = range(block.values.shape[1])
        if block.x is not None:
            return [[column] for column in columns]
        groups: dict[bytes, list[int]] = {}
        for column in columns:
            groups.setdefault(block.weights[:, column].tobytes(), []).append(column)
        return list(groups.values())

    def _fitter(self, block: _Block, column: int) -> BatchFitter:
        """Of the model of one column. What it has where there is no response does not count.

        Raises:
            DataError: its covariate depends on the other columns of X.
        """
        own = block.weights[:, column]
        frame = replace(self.frame, weights=np.where(own > 0, own, 1.0))
        if block.x is not None:
            X = frame.X.copy()
            X[:, self.place] = np.where(own > 0, block.x[:, column], 0.0)
            frame = replace(frame, X=X)
        return BatchFitter(frame, **self.options)

    def _in_lanes(
        self, lanes: OwnDesigns, block: _Block, columns: np.ndarray, table: Table
    ) -> None:
        values, used = block.values[:, columns], block.weights[:, columns] > 0
        count = used.sum(axis=0)
        table.n_missing[columns] = len(values) - count
        with np.errstate(invalid="ignore"):
            table.mean[columns] = np.where(used, values, 0.0).sum(axis=0) / count
        table.status[columns] = Status.TOO_FEW_ROWS
        infinite = np.isinf(values).any(axis=0)
        if block.x is not None:
            infinite |= np.isinf(block.x[:, columns]).any(axis=0)
        highest = np.where(used, values, -np.inf).max(axis=0, initial=-np.inf)
        lowest = np.where(used, values, np.inf).min(axis=0, initial=np.inf)
        table.status[columns[(highest == lowest) & (count > 0)]] = Status.CONSTANT
        table.status[columns[infinite]] = Status.INFINITE
        some = ~infinite & (highest > lowest)
        few = self._lacks(lanes, used)
        self._search(lanes, block, columns[some & ~few], table, alike=False)
        self._alone(block, columns[some & few], table)

    def _search(
        self, lanes: OwnDesigns, block: _Block, columns: np.ndarray, table: Table, *, alike: bool
    ) -> None:
        """In lanes, and alone what these do not settle; `alike` as in `OwnPasses`."""
        if not columns.size:
            return
        passes = OwnPasses(
            lanes,
            *block,
            alike,
            table,
            single=lambda column: self._fitter(block, column).design(block.values[:, column]),
        )
        passes.run(columns)
        passes.certify(columns)
        settled = table.status[columns] == Status.CONVERGED
        settled |= table.status[columns] == Status.RANK_DEFICIENT
        self._alone(block, columns[~settled], table)

    def _alone(self, block: _Block, columns: np.ndarray, table: Table) -> None:
        for column in columns:
            own = np.array([column])
            try:
                fitter = self._fitter(block, column)
            except DataError:
                table.status[own] = Status.RANK_DEFICIENT
                continue
            table.take(own, fitter.table(block.values[:, own]))

    def _lacks(self, lanes: OwnDesigns, used: np.ndarray) -> np.ndarray:
        """Which responses have too few of the rows or levels for lanes, booleans."""
        count, q = used.sum(axis=0), lanes.effects.shape[1]
        levels = (lanes.rows.sums(used.astype(float)) > 0).sum(axis=0)
        few = (count <= self.frame.X.shape[1]) | (levels < 2) | (levels * q >= count)
        return few & (count < len(used))


def _is_whole(values: np.ndarray) -> np.ndarray:
    """Which columns (n, b) have only finite numbers, and not one number only."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.isfinite(values.sum(axis=0))
    suspects = np.flatnonzero(found & (values[0] == values[-1]))
    found[suspects] = (values[:, suspects] != values[0, suspects]).any(axis=0)
    return found


def fitter_for(
    frame: ModelFrame, method: str, *, own: bool, covariate: str | None = None, **options: Any
) -> Any:
    """A `BatchFitter`, or an `OwnFitter` if the responses have weights or covariates of their
    own. On NumPy, without weights, the first has the second for responses that lack rows few others
    lack."""
    if own or covariate is not None:
        options.pop("count", None)
        return OwnFitter(frame, method, covariate=covariate, **options)
    fitter = BatchFitter(frame, method, **options)
    apart = frame.weights is None and not frame.kernels and frame.residual is None
    if isinstance(fitter.engine, HostEngine) and apart:
        options.pop("count", None)
        fitter.own_rows = cache(lambda: OwnFitter(frame, method, **options))
    return fitter
