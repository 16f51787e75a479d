"""The engine of `fit_many`: one design, blocks of responses in, numbers out.

A block is cut into chunks of a fixed number of lanes, worked on by as many threads as there are
cores, or spread over the devices. A chunk goes through the compiled `programs`. Its search stops
after as many steps as serve most lanes; the others are collected over all chunks and go on
together, so that none waits for the slowest of all. What cannot be certified, saddle points among
them, is tried again with the slower steps of `estimate`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreml.arguments import check_df, is_reml
from jaxreml.backend.compilation import quick_jit, remembered, spare_memory_maps
from jaxreml.backend.devices import local_devices
from jaxreml.backend.runtime import neutral, require_own_threads
from jaxreml.data.estimability import RowSpace
from jaxreml.data.frame import ModelFrame, drop_aliased
from jaxreml.errors import DataError
from jaxreml.many.crossed import CrossedRows
from jaxreml.many.numbers import Fits, Table
from jaxreml.many.programs import Plan, programs
from jaxreml.many.screening import Grid, has_one_optimum, path, rises, screened
from jaxreml.many.shared import DOUBTFUL, Reduced, SharedDesign, prepare, share
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.structures.crossed.planning import CrossedBasis
from jaxreml.optimum.rivals import starts
from jaxreml.status import Status

CACHE_BYTES = 2**20  # of each of the larger arrays of a chunk
FEW, MANY = 32, 256  # lanes of a chunk, at least and at most
LOOK = 20  # steps of the first chunk of a pass
OF_A_PASS = 4  # what a response costs in another pass, besides its steps, in steps


class Rows(NamedTuple):
    """The design in some of the rows.

    Attributes:
        shared: the design.
        coefficients: which columns of X it has, so many as their rank in these rows.
        estimable: (p + k,) booleans, which coefficients and contrasts the rows say anything about:
            one whose row is in the row space of X. Another would be a comparison with what is not
            in the rows, such as a level of a factor, under its name.
    """

    shared: SharedDesign | CrossedRows
    coefficients: np.ndarray
    estimable: np.ndarray


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
        devices: as in `local_devices`, to spread chunks over.

    Raises:
        DataError: as `fit`, and `local_devices`.
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
    ):
        require_own_threads()
        spare_memory_maps()
        self.frame, self.method, self.reml = frame, method, is_reml(method)
        self.modes, self.max_iterations = modes, max_iterations
        check_df(df, method)
        self.df = df
        p = frame.X.shape[1]
        self.contrasts = np.zeros((0, p)) if contrasts is None else np.asarray(contrasts, float)
        self.asked_structure, self.lanes = structure, lanes
        self.devices = local_devices(devices)
        self.whole = self._share(None)
        shared = self.whole.shared
        self.structure = (
            "crossed"
            if isinstance(shared, CrossedRows)
            else ("dense" if shared.codes is None else "grouped")
        )

    def _share(self, kept: np.ndarray | None) -> Rows:
        """The design in the rows `kept`; None for all."""
        frame = self.frame
        p = frame.X.shape[1]
        columns = np.arange(p)
        estimable = np.ones(p + len(self.contrasts), bool)
        if kept is not None:  # a column may depend on others in these rows only
            X = frame.X[kept]
            _, names, _ = drop_aliased(X, tuple(map(str, columns)))
            columns = np.array(names, int)
            if columns.size < p:
                estimable = RowSpace(X, columns).contains(
                    np.concatenate([np.eye(p), self.contrasts])
                )
        prepared, basis = prepare(
            frame.X[:, columns],
            [(term.codes, term.effects) for term in frame.terms],
            weights=frame.weights,
            offset=frame.offset,
            structure=self.asked_structure,
            kept=kept,
        )
        if isinstance(basis, CrossedBasis):
            shared = CrossedRows.of(prepared, basis, self.lanes)
        else:
            shared = share(prepared, basis, reml=self.reml)
        return Rows(shared, columns, estimable)

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of `values`, (n, b) float64 on the rows of the frame, NaN if missing."""
        with neutral():
            return self._fit(values)

    def _fit(self, values: np.ndarray) -> Fits:
        n, b = values.shape
        with np.errstate(invalid="ignore", over="ignore"):
            doubtful = np.flatnonzero(~np.isfinite(values.sum(axis=0)))
        some = values[:, doubtful]
        missing = np.zeros(b, int)
        missing[doubtful] = np.isnan(some).sum(axis=0)
        infinite = np.zeros(b, bool)
        infinite[doubtful] = np.isinf(some).any(axis=0)
        table = Table(self.frame, b, self.modes, len(self.contrasts))
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
        design = self.whole
        if kept is not None:
            try:
                design = self._share(kept)
            except DataError:
                table.status[columns] = Status.TOO_FEW_ROWS
                return
        if not isinstance(design.shared, CrossedRows):
            _Pattern(self, design, values, kept, table).run(columns)
            return
        design.shared.fit(
            values,
            columns,
            table,
            self.contrasts[:, design.coefficients],
            self.devices,
            reml=self.reml,
            df=self.df,
            max_iterations=self.max_iterations,
            modes=self.modes,
            known=(design.coefficients, design.estimable),
        )

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients (b, m + 1) of the objective at `parameters` for complete (n, b) `values`."""
        shared = self.whole.shared
        if isinstance(shared, CrossedRows):
            return shared.gradients(parameters, values, reml=self.reml)
        shared = replace(shared, collapse=None, spectral=None)
        with neutral():
            return np.asarray(_gradients(self.reml)(shared, parameters, values))


@remembered
def _gradients(reml: bool) -> Any:
    slope = jax.grad(reml_objective if reml else ml_objective)

    def of_all(shared: SharedDesign, parameters: Array, values: Array) -> Array:
        each = jax.vmap(lambda own: slope(parameters, shared.each(own)), in_axes=-1)
        return each(shared.reduce(values, exact=True))

    return quick_jit(of_all)


class _Part(NamedTuple):
    """Responses on their way through the programs.

    Attributes:
        columns: (b,), their columns in the block.
        reduced, root, radius: what is known of them and where their search is, the responses last;
            None to begin with.
        iterations: (b,), expansions so far.
        hopeless: (b,) booleans, whether more steps of the same kind would not help.
    """

    columns: np.ndarray
    reduced: Reduced | None
    root: Any
    radius: Any
    iterations: np.ndarray
    hopeless: np.ndarray

    @classmethod
    def fresh(cls, columns: np.ndarray) -> _Part:
        """Nothing known yet."""
        b = columns.size
        return cls(columns, None, None, None, np.zeros(b, int), np.zeros(b, bool))

    def take(self, which: np.ndarray) -> _Part:
        """Some of the responses, by booleans (b,)."""
        places = np.flatnonzero(which)
        return jax.tree.map(lambda leaf: np.take(np.asarray(leaf), places, axis=-1), self)

    def restarted(self, start: np.ndarray) -> _Part:
        """The same responses at another root, (r,)."""
        b = self.columns.size
        return self._replace(
            root=np.repeat(start[:, None], b, axis=1),
            radius=np.ones(b),
            iterations=np.ones(b, int),
            hopeless=np.zeros(b, bool),
        )


class _Pattern:
    """The responses of a block that have the same rows."""

    def __init__(
        self,
        fitter: BatchFitter,
        design: Rows,
        values: np.ndarray,
        kept: np.ndarray | None,
        table: Table,
    ):
        self.fitter, self.values, self.kept, self.table = fitter, values, kept, table
        shared, self.design = design.shared, design
        assert isinstance(shared, SharedDesign)
        self.mesh = Mesh(np.array(fitter.devices), ("responses",))
        self.shared = jax.device_put(shared, NamedSharding(self.mesh, PartitionSpec()))
        self.shifts = bool(np.any(shared.constant))
        self.first_row = 0 if kept is None else int(np.argmax(kept))
        self.contrasts = fitter.contrasts[:, design.coefficients]
        in_lanes = shared.pairs is not None
        self.plan = Plan(fitter.reml, shared.codes is not None, in_lanes, fitter.df)
        self.screens = not has_one_optimum(shared)
        self.grid = Grid(shared, reml=fitter.reml) if in_lanes and self.screens else None
        self.lanes = self.size = 0  # of a device, and of all
        self.suspects: list[_Part] = []  # responses that may have a lower optimum

    def run(self, columns: np.ndarray) -> None:
        """Fit these columns and store their numbers in the table."""
        limit = self.fitter.max_iterations
        few = columns.size <= FEW or not self.plan.in_lanes
        self.lanes = self.fitter.lanes or (FEW if few else _lanes(_largest(self.shared)))
        self.size = self.lanes * len(self.fitter.devices)
        exactly = self.plan._replace(exact=True)
        plan = exactly if DOUBTFUL * len(self.values) > 0.1 else self.plan
        with ThreadPoolExecutor(_threads(self.fitter.devices)) as pool:
            left = self._pass([_Part.fresh(columns)], plan, pool)
            slow: list[_Part] = []
            while left:
                again, going = [], []
                for part in left:
                    sure = ~np.asarray(part.reduced.doubtful)  # pyright: ignore
                    again.append(_Part.fresh(part.columns[~sure]))
                    ended = part.hopeless | (part.iterations >= limit)
                    slow.append(part.take(sure & ended))
                    going.append(part.take(sure & ~ended))
                left = self._pass(going, self.plan, pool)
                left += self._pass(again, exactly, pool)
            if self.plan.in_lanes:
                self._pass(slow, self.plan._replace(careful=True), pool)
            self._search_again(pool)

    def _search_again(self, pool: ThreadPoolExecutor) -> None:
        """Search from rival starts for the responses that may have a lower optimum.

        With the slower steps, as zero is a saddle point of many of them.
        """
        plan, limit = self.plan._replace(careful=True), self.fitter.max_iterations
        for start in starts(self.shared.covariance) if self.suspects else ():
            parts = [part.restarted(start) for part in self.suspects]
            chunks = self._chunks(parts)
            list(pool.map(lambda chunk: self._work(chunk, limit, plan, rival=True), chunks))

    def _pass(self, parts: list[_Part], plan: Plan, pool: ThreadPoolExecutor) -> list[_Part]:
        """Take responses through the programs, in chunks; those that have not converged.

        The first chunk goes alone. It shows after how many steps to leave the others.
        """
        chunks = self._chunks(parts)
        if not chunks:
            return []
        limit = self.fitter.max_iterations
        cut = limit if plan.careful or len(chunks) == 1 else min(limit, LOOK)
        first, iterations = self._work(chunks[0], cut, plan)
        if len(chunks) > 1 and not plan.careful:
            cut = min(_cut(iterations), limit)
        rest = pool.map(lambda chunk: self._work(chunk, cut, plan)[0], chunks[1:])
        return [part for part in (first, *rest) if part.columns.size]

    def _chunks(self, parts: list[_Part]) -> list[_Part]:
        """The same responses, as many at a time as there are lanes."""
        parts = [part for part in parts if part.columns.size]
        if not parts:
            return []
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)
        places = np.arange(whole.columns.size) // self.size
        return [whole.take(places == k) for k in range(places[-1] + 1)]

    @neutral()  # in threads of its own
    def _work(
        self, chunk: _Part, limit: int, plan: Plan, *, rival: bool = False
    ) -> tuple[_Part, np.ndarray]:
        """One chunk through the programs and into the table; what has not converged, and steps.

        The optima of a `rival` search enter the table where they are lower. Others are screened.
        """
        compiled = programs(self.mesh, plan)
        padded = np.resize(np.arange(chunk.columns.size), self.size)  # repeats
        modes = None
        block: Any = None
        shift: Any = None
        if chunk.reduced is None or self.fitter.modes:
            block, shift = self._block(chunk.columns[padded])
        if chunk.reduced is None:
            reduced, root, radius = compiled.begin(self.shared, block, shift)
            before = np.zeros(self.size, np.int32)
        else:
            held = chunk.reduced, chunk.root, chunk.radius
            held = jax.tree.map(lambda leaf: leaf[..., padded], held)
            reduced, root, radius = jax.device_put(held, compiled.held)
            before = chunk.iterations[padded].astype(np.int32) - 1  # the last once more
        found = compiled.climb(self.shared, reduced, root, radius, np.int32(limit))
        packed = compiled.conclude(self.shared, reduced, found, before, self.contrasts)
        looks = self.screens and not rival
        suspect = self._suspects(compiled, reduced, found) if looks else None
        if self.fitter.modes:
            modes = jax.device_get(compiled.modes(self.shared, block, shift, found.root))
        status = self.table.store(
            chunk.columns, np.asarray(packed), modes, *self.design[1:], rival=rival
        )
        width = chunk.columns.size
        iterations = np.asarray(found.iterations)[:width]
        after = _Part(
            chunk.columns,
            reduced,
            found.root,
            found.radius,
            before[:width] + iterations,
            hopeless=iterations < limit,
        )
        if suspect is not None:
            suspect = suspect[:width] & (status == Status.CONVERGED)
            if suspect.any():
                self.suspects.append(after.take(suspect))
        return after.take(status != Status.CONVERGED), iterations

    def _suspects(self, compiled: Any, reduced: Reduced, found: Any) -> np.ndarray:
        """Which responses of a chunk may have a lower optimum than the one found."""
        covariance = self.shared.covariance
        if self.grid is None:
            values = np.asarray(compiled.screen(self.shared, reduced))
        else:
            values = self.grid.values(reduced)
        lower, several, minima = screened(values, np.asarray(found.value), covariance)
        if several.any() and max(covariance.sizes) > 1:
            omega = np.asarray(covariance.omega(found.root))
            ways = path(minima, omega, covariance)
            points = ways.reshape(-1, *ways.shape[2:])
            along = np.asarray(compiled.along(self.shared, reduced, points))
            several &= rises(along.reshape(*ways.shape[:2], -1))
        return lower | several

    def _block(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values less shifts, (groups, n, lanes), and these, (groups, lanes)."""
        groups = columns.reshape(-1, min(_lanes(len(self.values)), self.lanes))
        shifts = self.values[self.first_row, groups] * self.shifts
        block = np.empty((len(groups), len(self.values), groups.shape[1]))
        for group, shift, out in zip(groups, shifts, block, strict=True):
            contiguous = bool((np.diff(group) == 1).all())
            where = slice(group[0], group[-1] + 1) if contiguous else group
            with np.errstate(over="ignore"):  # not finite then, which the status says
                np.subtract(self.values[:, where], shift, out=out)
        if self.kept is not None:
            block[:, ~self.kept] = 0.0
        return block, shifts


def _cut(iterations: np.ndarray) -> int:
    """After how many steps to leave a chunk, by the steps that each lane of one has taken.

    Lanes in step cost as many steps as the slowest; those left cost a few more than that.
    """
    counts = np.bincount(iterations, minlength=2)
    beyond = 1 - np.cumsum(counts) / counts.sum()
    cost = np.arange(counts.size) + beyond * (counts.size - 1 + OF_A_PASS)
    cost[0] = np.inf
    return int(np.argmin(cost))


def _patterns(values: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns that have the same rows missing, and the rows that they have."""
    groups: dict[bytes, list[int]] = {}
    for column in columns:
        groups.setdefault(np.packbits(np.isnan(values[:, column])).tobytes(), []).append(column)
    for same in groups.values():
        yield np.array(same), ~np.isnan(values[:, same[0]])


def _threads(devices: list[Any]) -> int:
    """One per core for one CPU device; for others two, so that one can copy."""
    if len(devices) == 1 and devices[0].platform == "cpu":
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    return 2


def _lanes(numbers: int) -> int:
    """How many lanes of so many numbers each stay in the cache."""
    most = max(CACHE_BYTES // (8 * numbers), 1)
    return min(max(2 ** int(math.log2(most)), FEW), MANY)


def _largest(shared: SharedDesign) -> int:
    """Numbers per lane of the larger arrays of a search."""
    levels = shared.pairs.shape[-1]  # pyright: ignore
    return max(levels * sum(shared.sizes) ** 2, (shared.p + 1) ** 2)
