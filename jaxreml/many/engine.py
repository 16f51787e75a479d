"""`BatchFitter`, on which `fit_many` stands: one model, blocks of responses in, numbers out.

Responses with the same rows missing go together, through the engine of the design's structure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from jaxreml.arguments import check_df, check_engine, is_reml
from jaxreml.backend.compilation import spare_memory_maps
from jaxreml.backend.devices import has_accelerator, local_devices
from jaxreml.backend.runtime import neutral, require_own_threads
from jaxreml.data.estimability import RowSpace
from jaxreml.data.frame import ModelFrame, drop_aliased
from jaxreml.errors import DataError
from jaxreml.many.base import Engine, Known, Options
from jaxreml.many.contributions import Parts
from jaxreml.many.host import HostEngine
from jaxreml.many.lanes import Lanes
from jaxreml.many.numbers import Fits, Table
from jaxreml.model.arrays import Effects
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.design import placeholders
from jaxreml.status import Status


class BatchFitter:
    """Fits the model of `frame` (rows without a response) to blocks of responses.

    Args:
        frame: a `covariate_frame`.
        method: "REML" or "ML".
        structure: as in `fit`.
        modes: whether to keep conditional modes.
        df: degrees of freedom, as in `LMMResults.test`.
        contrasts: (k, p), more linear functions of the fixed effects to give.
        max_iterations: as in `estimate`.
        lanes: responses in a chunk, for each device; chosen by the size of caches if left out.
        devices: as in `local_devices`, to spread chunks over; NumPy does without.
        engine: "numpy" or "jax"; chosen if left out: NumPy for grouped designs on the CPU.

    Raises:
        DataError: as `fit`, and `local_devices`.
        ValueError: another engine, or one that cannot.
    """

    def __init__(
        self,
        frame: ModelFrame,
        method: str = "REML",
        *,
        structure: str | None = None,
        modes: bool = False,
        df: str = "satterthwaite",
        contrasts: np.ndarray | None = None,
        max_iterations: int = 100,
        lanes: int | None = None,
        devices: Any = None,
        engine: str | None = None,
    ):
        check_df(df, method)
        self.frame, self.method, self.df = frame, method, df
        self.modes, self.asked_structure = modes, structure
        p = frame.X.shape[1]
        self.options = Options(
            reml=is_reml(method),
            df=df,
            contrasts=np.zeros((0, p)) if contrasts is None else np.asarray(contrasts, float),
            max_iterations=max_iterations,
            modes=modes,
            lanes=lanes,
            devices=[],
            parts=Parts.of(frame, np.arange(p)),
        )
        self.basis = self._basis(np.arange(p))
        self.structure = self.basis.kind
        self.engine_name = _engine_for(self.basis, devices, engine)
        if self.engine_name == "jax":
            require_own_threads()
            spare_memory_maps()
            self.options = self.options._replace(devices=local_devices(devices))
        estimable = np.ones(p + len(self.options.contrasts), bool)
        self.engine = self._engine(self.basis, frame.X, Known(np.arange(p), estimable))

    def _basis(self, coefficients: np.ndarray, kept: np.ndarray | None = None) -> Basis:
        """Of these columns of X in the rows `kept`; None for all."""
        frame = self.frame
        covariance = unstructured(tuple(len(term.effect_names) for term in frame.terms))
        own = zip(placeholders(covariance.sizes), covariance.blocks, strict=True)
        terms = [
            Effects(term.codes, term.effects, len(term.levels), *names, block)
            for term, (names, block) in zip(frame.terms, own, strict=True)
        ]
        if kept is not None:
            _check_rows(kept, terms)
        return Basis.of(
            frame.X[:, coefficients],
            terms,
            weights=frame.weights,
            offset=frame.offset,
            structure=self.asked_structure,
            used=kept,
            like=None if kept is None else self.basis,
        )

    def _engine(
        self, basis: Basis, X: np.ndarray, known: Known, parts: Parts | None = None
    ) -> Engine:
        options = self.options._replace(
            contrasts=self.options.contrasts[:, known.coefficients],
            parts=parts or self.options.parts,
        )
        return _kind(basis.kind, self.engine_name)(basis, X, known, options)

    def _in_rows(self, kept: np.ndarray) -> Engine:
        """The engine of the rows `kept`."""
        X = self.frame.X[kept]
        p = X.shape[1]
        # A column may depend on others in these rows only.
        coefficients = np.array(drop_aliased(X, tuple(map(str, range(p))))[1], int)
        estimable = np.ones(p + len(self.options.contrasts), bool)
        if coefficients.size < p:
            of_all = np.concatenate([np.eye(p), self.options.contrasts])
            estimable = RowSpace(X, coefficients).contains(of_all)
        basis = self._basis(coefficients, kept)
        known = Known(coefficients, estimable)
        parts = Parts.of(self.frame, coefficients, kept)
        return self._engine(basis, X[:, coefficients], known, parts)

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of `values`, (n, b) float64 on the rows of the frame, NaN if missing."""
        with self._settings():
            return self._fit(values)

    def _fit(self, values: np.ndarray) -> Fits:
        n, b = values.shape
        with np.errstate(invalid="ignore", over="ignore"):
            total = values.sum(axis=0)
            doubtful = np.flatnonzero(~np.isfinite(total))
            some = values[:, doubtful]
            total[doubtful] = np.nansum(some, axis=0)
        missing = np.zeros(b, int)
        missing[doubtful] = np.isnan(some).sum(axis=0)
        infinite = np.zeros(b, bool)
        infinite[doubtful] = np.isinf(some).any(axis=0)
        table = Table(self.frame, b, self.modes, len(self.options.contrasts))
        with np.errstate(invalid="ignore"):
            table.mean = total / (n - missing)
        table.status[missing == n] = Status.TOO_FEW_ROWS
        table.status[infinite] = Status.INFINITE
        todo = (missing < n) & ~infinite
        self._fit_pattern(values, np.flatnonzero(todo & (missing == 0)), None, table)
        for columns, kept in _patterns(values, np.flatnonzero(todo & (missing > 0))):
            self._fit_pattern(values, columns, kept, table)
        return table.fits(n - missing, missing)

    def _fit_pattern(
        self, values: np.ndarray, columns: np.ndarray, kept: np.ndarray | None, table: Table
    ) -> None:
        """Fit the columns that have values in the rows `kept` and only there."""
        rows = np.arange(len(values)) if kept is None else np.flatnonzero(kept)
        suspects = columns[values[rows[0], columns] == values[rows[-1], columns]]
        same = values[np.ix_(rows, suspects)] == values[rows[0], suspects]
        constant = suspects[same.all(axis=0)]
        table.status[constant] = Status.CONSTANT
        columns = np.setdiff1d(columns, constant)
        if not columns.size:
            return
        engine = self.engine
        if kept is not None:
            try:
                engine = self._in_rows(kept)
            except DataError:
                table.status[columns] = Status.TOO_FEW_ROWS
                return
        engine.fit(values, columns, kept, table)

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients (b, m + 1) of the objective at `parameters` for complete (n, b) `values`."""
        with self._settings():
            return self.engine.gradients(parameters, values)

    def _settings(self) -> AbstractContextManager[Any]:
        return neutral() if self.engine_name == "jax" else nullcontext()


def _kind(structure: str, engine: str) -> Any:
    if engine == "numpy":
        return HostEngine
    if structure == "crossed":
        from jaxreml.many.crossed import CrossedEngine

        return CrossedEngine
    from jaxreml.many.passes import LaneEngine

    return LaneEngine


def _engine_for(basis: Basis, devices: Any, asked: str | None) -> str:
    check_engine(asked)
    able = Lanes.in_step(basis)
    if asked == "numpy":
        if devices is not None:
            raise ValueError('devices are JAX\'s: leave them out with engine="numpy"')
        if not able:
            raise ValueError(
                'engine="numpy" fits many responses with one grouping factor and up to four '
                "effects only: leave engine out"
            )
        return "numpy"
    on_cpu = devices is None and not has_accelerator()
    return "numpy" if asked is None and able and on_cpu else "jax"


def _patterns(values: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns that have the same rows missing, and the rows that they have."""
    groups: dict[bytes, list[int]] = {}
    for column in columns:
        groups.setdefault(np.packbits(np.isnan(values[:, column])).tobytes(), []).append(column)
    for same in groups.values():
        yield np.array(same), ~np.isnan(values[:, same[0]])


def _check_rows(kept: np.ndarray, terms: list[Effects]) -> None:
    """Refuse rows in which a term has one level, or an effect is zero."""
    for term in terms:
        present = np.unique(term.codes[kept]).size
        if present < 2 or not term.columns[kept].any(axis=0).all():
            raise DataError(f"{present} levels of {term.name} in {int(kept.sum())} rows")
