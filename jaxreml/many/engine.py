"""`BatchFitter`, on which `fit_many` stands: one model, blocks of responses in, numbers out.

Responses with the same rows missing go together, through the engine of the design's structure.
Where few share their rows, those of many patterns may go side by side (`BatchFitter.own_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from jaxreml.arguments import check_df, check_engine, is_reml
from jaxreml.backend.arrays import mapped
from jaxreml.backend.compilation import spare_memory_maps
from jaxreml.backend.devices import has_accelerator, local_devices
from jaxreml.backend.runtime import neutral, require_own_threads
from jaxreml.data.estimability import RowSpace
from jaxreml.data.frame import ModelFrame, drop_aliased
from jaxreml.errors import DataError
from jaxreml.fitting.engines import suited_structure
from jaxreml.many.base import Engine, Known, Options
from jaxreml.many.contributions import Parts
from jaxreml.many.host import HostEngine
from jaxreml.many.lanes import Lanes
from jaxreml.many.numbers import Fits, Table
from jaxreml.many.singles import SinglesEngine
from jaxreml.model.arrays import Effects
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design, placeholders
from jaxreml.optimum.estimate import estimate_at
from jaxreml.optimum.report import Estimate
from jaxreml.status import Status

# Responses that are fitted one after the other, where programs for many had to be compiled.
FEW = 32
# Responses with the same rows, or weights, from which on these get an engine of their own.
TOGETHER = 16
MOST_WORK = 10**12  # order^3 of all decompositions of kernels: some minutes to half an hour


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
        engine: "numpy" or "jax"; chosen if left out: NumPy on the CPU, for grouped designs, and for
            others where there are `FEW` responses at most.
        count: how many responses there will be, if that is known.

    Attributes:
        own_rows: gives what works on responses side by side that lack rows of their own each
            (`OwnFitter`, whose `table` and `estimates` it uses); None where nothing does.

    Raises:
        DataError: as `fit`, and `local_devices`.
        ValueError: another engine, or devices with "numpy".
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
        count: int | None = None,
    ):
        check_df(df, method)
        if df == "between-within":
            raise ValueError('df="between-within" is of single fits, not of batches')
        self.own_rows: Callable[[], Any] | None = None
        self.frame, self.method, self.df = frame, method, df
        self.modes, self.asked_structure = modes, structure
        self.decomposed = 0
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
        blocks = self.basis.covariance.blocks
        words = not all(block.any_basis or block.residual for block in blocks)
        in_step = Lanes.in_step(self.basis) and not words
        engine = "numpy" if words and engine is None and devices is None else engine
        # JAX would hold a matrix for each; and has no batches of residuals within subjects.
        apart = self.basis.kind == "linear" or frame.residual is not None
        few = 1 if apart else count
        self.engine_name = _engine_for(in_step, few, devices, engine)
        if self.engine_name == "numpy" and not in_step:
            self.asked_structure = suited_structure(frame, structure, engine)
            self.basis = self._basis(np.arange(p))
        self.structure = self.basis.kind
        if self.structure == "linear" and self.engine_name == "jax":
            raise ValueError(
                "many responses of several kernels, or of kernels beside other terms, are NumPy's: "
                "leave engine and devices out"
            )
        if frame.residual is not None and self.engine_name == "jax":
            raise ValueError(
                "many responses with a covariance of residuals within subjects are NumPy's: leave "
                "engine and devices out"
            )
        if self.engine_name == "jax":
            require_own_threads()
            spare_memory_maps()
            self.options = self.options._replace(devices=local_devices(devices))
        estimable = np.ones(p + len(self.options.contrasts), bool)
        self.known = Known(np.arange(p), estimable)
        self.engine = self._engine(self.basis, frame.X, self.known)

    def _basis(self, coefficients: np.ndarray, kept: np.ndarray | None = None) -> Basis:
        """Of these columns of X in the rows `kept`; None for all."""
        frame = self.frame
        sizes = tuple(len(term.effect_names) for term in frame.terms)
        terms = [
            Effects(term.codes, term.effects, len(term.levels), *names, term.block(q), term.kernel)
            for term, names, q in zip(frame.terms, placeholders(sizes), sizes, strict=True)
        ]
        if frame.residual is not None:
            last = frame.residual.term
            q, block = last.effects.shape[1], frame.residual.block
            named = placeholders((*sizes, q))[-1]
            levels = len(frame.residual.subjects)
            terms.append(Effects(last.group, last.effects, levels, *named, block))
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
        return _kind(basis, self.engine_name)(basis, X, known, options)

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
            return self.table(values).fits()

    def table(self, values: np.ndarray) -> Table:
        """`fit` to a `Table`."""
        n, b = values.shape
        with np.errstate(invalid="ignore", over="ignore"):
            total = values.sum(axis=0)
            doubtful = np.flatnonzero(~np.isfinite(total))
            some = values[:, doubtful]
            total[doubtful] = np.nansum(some, axis=0)
        table = Table(self.frame, b, self.modes, len(self.options.contrasts))
        missing = table.n_missing
        missing[doubtful] = np.isnan(some).sum(axis=0)
        with np.errstate(invalid="ignore"):
            table.mean = total / (n - missing)
        infinite = np.zeros(b, bool)
        infinite[doubtful] = np.isinf(some).any(axis=0)
        table.status[missing == n] = Status.TOO_FEW_ROWS
        table.status[infinite] = Status.INFINITE
        todo = (missing < n) & ~infinite
        self._fit_pattern(values, np.flatnonzero(todo & (missing == 0)), None, table)
        patterns, apart = self._patterns(values, np.flatnonzero(todo & (missing > 0)))
        self._allow(len(patterns))
        for columns, kept in patterns:
            self._fit_pattern(values, columns, kept, table)
        if apart.size and self.own_rows is not None:
            table.take(apart, self.own_rows().table(values[:, apart]))
        return table

    def _patterns(
        self, values: np.ndarray, columns: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """`_patterns` of columns that lack rows, and those that go side by side instead."""
        patterns = list(_patterns(values, columns))
        least = 0 if self.own_rows is None else TOGETHER
        apart = [own for own, _ in patterns if own.size < least]
        together = [pattern for pattern in patterns if pattern[0].size >= least]
        return together, np.sort(np.concatenate(apart)) if apart else columns[:0]

    def _allow(self, patterns: int) -> None:
        """Refuse more decompositions of kernels, one for each pattern of missing values, than can
        be waited for."""
        order = max((len(t.seen) for t in self.frame.terms if t.kernel is not None), default=0)
        self.decomposed += patterns
        if self.decomposed * order**3 > MOST_WORK:
            raise DataError(
                f"the responses lack values in {self.decomposed} different sets of rows or more. "
                f"Each needs a decomposition of the kernel, of order {order}, and about "
                f"{int(MOST_WORK / order**3)} are what can be waited for. Leave out rows or "
                "responses with many missing values, or impute these"
            )

    def basis_in(self, kept: np.ndarray) -> Basis:
        """The basis of the rows `kept`, (n,) booleans, in which no column of X may depend on
        others."""
        return self.basis if kept.all() else self._basis(np.arange(self.frame.X.shape[1]), kept)

    def design(self, y: np.ndarray) -> Design:
        """The design of one response, (n,), NaN if missing, as `fit` has it."""
        kept = ~np.isnan(y)
        basis = self.basis_in(kept)
        return Design.of(basis, basis.response(np.where(kept, y, 0.0)))

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

    def estimates(
        self, values: np.ndarray, theta: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Known, Estimate]]:
        """What `report` says at known optima, by NumPy: nothing is searched.

        Args:
            values: (n, b), as for `fit`.
            theta: (b, m), `Fits.theta`; responses without any are left out, as those that lack a
                coefficient should be.

        Yields:
            Some columns, what their rows say of the fixed effects, and estimates, lanes last.
        """
        optimal, lacking = np.isfinite(theta).all(axis=1), np.isnan(values).any(axis=0)
        whole = np.flatnonzero(optimal & ~lacking)
        patterns, apart = self._patterns(values, np.flatnonzero(optimal & lacking))
        if apart.size and self.own_rows is not None:
            for own, known, estimate in self.own_rows().estimates(values[:, apart], theta[apart]):
                yield apart[own], known, estimate
        for columns, kept in [(whole, None), *patterns]:
            engine: Any = self.engine if kept is None else self._in_rows(kept)
            if isinstance(engine, HostEngine):
                found = engine.estimates(values, columns, kept, theta)
            else:
                basis = engine.lanes.basis if hasattr(engine, "grid") else engine.basis
                found = _one_by_one(basis, values, columns, kept, theta, self.options.reml)
            for own, estimate in found:
                yield own, engine.known, estimate

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients (b, m + 1) of the objective at `parameters` for complete (n, b) `values`."""
        with self._settings():
            return self.engine.gradients(parameters, values)

    def _settings(self) -> AbstractContextManager[Any]:
        return neutral() if self.engine_name == "jax" else nullcontext()


def _one_by_one(
    basis: Basis,
    values: np.ndarray,
    columns: np.ndarray,
    kept: np.ndarray | None,
    theta: np.ndarray,
    reml: bool,
) -> Iterator[tuple[np.ndarray, Estimate]]:
    """`HostEngine.estimates` of any design."""
    for column in columns:
        y = values[:, column] if kept is None else np.where(kept, values[:, column], 0.0)
        design = Design.of(basis, basis.response(y))
        estimate = estimate_at(theta[column], design, reml=reml)
        yield np.array([column]), mapped(lambda leaf: np.asarray(leaf)[..., None], estimate)


def _kind(basis: Basis, engine: str) -> Any:
    if engine == "numpy":
        plain = all(
            block.any_basis or (block.residual and block.written_out)
            for block in basis.covariance.blocks
        )
        return HostEngine if plain and Lanes.in_step(basis) else SinglesEngine
    if basis.kind == "crossed":
        from jaxreml.many.crossed import CrossedEngine

        return CrossedEngine
    from jaxreml.many.passes import LaneEngine

    return LaneEngine


def _engine_for(in_step: bool, count: int | None, devices: Any, asked: str | None) -> str:
    check_engine(asked)
    if asked == "numpy" and devices is not None:
        raise ValueError('devices are JAX\'s: leave them out with engine="numpy"')
    if asked is not None:
        return asked
    on_cpu = devices is None and not has_accelerator()
    return "numpy" if on_cpu and (in_step or (count or FEW + 1) <= FEW) else "jax"


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
