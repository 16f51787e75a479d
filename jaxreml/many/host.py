"""`HostEngine`: the engine of `fit_many` for grouped designs on NumPy. Nothing is compiled.

A block is cut into chunks, worked on by as many threads as there are cores. Lanes leave a chunk's
search as they end. What has not ended after some steps, and what the search cannot settle, saddle
points among them, is collected over all chunks and goes on with the slower steps of `estimate`;
responses that may have a lower optimum are searched again from rival starts.

All optima are certified by their criterion and its derivatives in the full design, where the
search may use another form of it. Both are of one source, so some lanes are looked at by a third
way: differences of the criterion of the design as `fit` has it, level by level. Where that does not
agree all lanes are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import among
from jaxreml.backend.threads import cores, single_blas
from jaxreml.many import steps
from jaxreml.many.base import Known, Options
from jaxreml.many.contributions import Parts
from jaxreml.many.lanes import Lanes, fitting
from jaxreml.many.numbers import Table
from jaxreml.many.screening import Grid, suspects
from jaxreml.many.steps import Found, Plan
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.design import Design
from jaxreml.model.objective import profiled
from jaxreml.model.response import Response
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import differences
from jaxreml.optimum.estimate import estimate_at
from jaxreml.optimum.report import Estimate
from jaxreml.optimum.rivals import has_one_optimum, starts
from jaxreml.optimum.search import start
from jaxreml.status import Status

Array = np.ndarray
CACHE_BYTES = 2**21  # of each of the larger arrays of a chunk
SAMPLE, LARGE = 4, 100  # responses looked at by a third way, of at least so many; of fewer, one
LOOK = 12  # steps of a chunk, after which stragglers leave it
FEW, MANY = 64, 8192  # lanes of a chunk, at least and at most


class HostEngine:
    """`Engine` of grouped designs on NumPy."""

    def __init__(self, basis: Basis, X: Array, known: Known, options: Options):
        self.lanes, self.known, self.options = Lanes.of(basis, X, reml=options.reml), known, options

    @cached_property
    def grid(self) -> Grid | None:
        """To look for other optima with, where a response may have several."""
        lanes = self.lanes
        if not lanes.covariance.random.all():  # of residuals there is one
            return None
        if has_one_optimum(lanes.basis.structure, lanes.covariance, lanes.p):
            return None
        return Grid(lanes, reml=self.options.reml)

    def fit(self, values: Array, columns: Array, kept: Array | None, table: Table) -> None:
        """As `Engine.fit`."""
        passes = _SharedPasses(self, values, kept, table)
        passes.run(columns)
        passes.certify(columns)

    def estimates(
        self, values: Array, columns: Array, kept: Array | None, theta: Array
    ) -> Iterator[tuple[Array, Estimate]]:
        """As `Passes.estimates`, of columns of (n, b) values with optima (b, m)."""
        nothing: Any = None  # is stored
        yield from _SharedPasses(self, values, kept, nothing).estimates(columns, theta)

    def gradients(self, parameters: Array, values: Array) -> Array:
        """As `Engine.gradients`."""
        lanes, reml = self.lanes, self.options.reml
        design = lanes.batch(lanes.reduce(values, exact=True))
        return steps.objective_gradients(parameters, design, lanes.basis.units, reml=reml).T


class _Slow(NamedTuple):
    """Responses whose search has not ended: their columns in the block, where it is, the radius of
    the next step and expansions so far; lanes last."""

    columns: Array
    root: Array
    radius: Array
    before: Array


class Block(NamedTuple):
    """A chunk of responses: their columns, the designs that are searched and the full ones, lanes
    last, degrees of freedom of their residuals, and what the passes need besides."""

    columns: Array
    searched: Design
    full: Design
    residual: Any
    detail: Any


class Passes:
    """The way of responses of a block through the search and into the table.

    What the responses have in common, and how they become designs, is said by classes of it.

    Args:
        covariance: of the random effects.
        options, known: as of the engine.
        table: for the numbers.
        numbers: per lane, of the larger arrays of a search.
    """

    def __init__(
        self, covariance: Covariance, options: Options, known: Known, table: Table, numbers: int
    ):
        self.covariance, self.options, self.known, self.table = covariance, options, known, table
        self.plan = Plan(options.reml, grouped=True, in_lanes=True, df=options.df)
        self.careful = self.plan._replace(careful=True)
        self.size = options.lanes or fitting(numbers, CACHE_BYTES, FEW, MANY)
        self.found_suspect: list[Array] = []  # columns that may have a lower optimum

    def prepared(self, columns: Array) -> Block:
        """The designs of a chunk."""
        raise NotImplementedError

    def start(self, block: Block) -> Array:
        """Roots (r, lanes) to search from."""
        return start(block.searched, self.options.reml)

    def suspects(self, block: Block, found: Found) -> Array:
        """Which lanes may have a lower optimum than the one found, booleans."""
        raise NotImplementedError

    def parts(self, block: Block) -> Parts:
        """What adds to the variance of the rows of a chunk."""
        return self.options.parts

    def modes(self, block: Block, root: Array) -> tuple[Array, ...]:
        """Conditional modes, per term (levels, effects, lanes)."""
        raise NotImplementedError

    def single(self, column: int) -> Design:
        """The design of one response, as `fit` has it."""
        raise NotImplementedError

    def run(self, columns: Array) -> None:
        """Fit these columns and store their numbers in the table."""
        with single_blas(), ThreadPoolExecutor(cores()) as pool:
            ends = list(pool.map(self._first, self._chunks(columns)))
            slow = _Slow(*(np.concatenate(own, axis=-1) for own in zip(*ends, strict=True)))
            places = self._chunks(np.arange(slow.columns.size))
            list(pool.map(lambda own: self._go_on(among(slow, own)), places))
            suspects = np.concatenate(self.found_suspect) if self.found_suspect else columns[:0]
            for rival in starts(self.covariance) if suspects.size else ():
                list(pool.map(partial(self._rival, rival), self._chunks(suspects)))

    def estimates(self, columns: Array, theta: Array) -> Iterator[tuple[Array, Estimate]]:
        """What `report` says of columns at optima that are known, (b, m) of the block: some columns
        at a time, with estimates, lanes last."""
        for chunk in self._chunks(columns) if columns.size else ():
            with single_blas(), np.errstate(all="ignore"):
                design = self.prepared(chunk).full
                yield chunk, estimate_at(theta[chunk].T, design, reml=self.options.reml)

    def certify(self, columns: Array) -> None:
        """Look at a sample of the optima by a third way, and at all where that does not agree."""
        converged = columns[self.table.status[columns] == Status.CONVERGED]
        count = SAMPLE if converged.size >= LARGE else 1
        sample = converged[np.linspace(0, converged.size - 1, count).astype(int)[: converged.size]]
        if not all(map(self._is_certified, sample)):
            for column in converged:
                if not self._is_certified(column):
                    self.table.blank(column, Status.NOT_CERTIFIED)

    def _chunks(self, places: Array) -> list[Array]:
        """These places, as many at a time as stay in the cache."""
        return [places[k : k + self.size] for k in range(0, max(places.size, 1), self.size)]

    def _first(self, columns: Array) -> _Slow:
        """A chunk from the start; what has not converged after `LOOK` steps."""
        with np.errstate(all="ignore"):
            block = self.prepared(columns)
            root = self.start(block)
            none = np.zeros(columns.size, int)
            limit = min(LOOK, self.options.max_iterations)
            found, status = self._settle(block, root, np.ones(columns.size), none, limit, self.plan)
            left = np.flatnonzero(status != Status.CONVERGED)
            own = _Slow(columns, found.root, found.radius, found.iterations - 1)  # last once more
            return _Slow(*(part[..., left] for part in own))

    def _go_on(self, slow: _Slow) -> None:
        """By the slower steps, from where the search was left."""
        if not slow.columns.size:
            return
        with np.errstate(all="ignore"):
            block = self.prepared(slow.columns)
            limit = self.options.max_iterations
            self._settle(block, slow.root, slow.radius, slow.before, limit, self.careful)

    def _rival(self, start: Array, columns: Array) -> None:
        """From another start; what is found counts where it is lower."""
        with np.errstate(all="ignore"):
            block = self.prepared(columns)
            root = np.repeat(start[:, None], columns.size, axis=1)
            ones, none = np.ones(columns.size), np.zeros(columns.size, int)
            limit = self.options.max_iterations
            self._settle(block, root, ones, none, limit, self.careful, rival=True)

    def _settle(
        self,
        block: Block,
        root: Array,
        radius: Array,
        before: Array,
        limit: int,
        plan: Plan,
        *,
        rival: bool = False,
    ) -> tuple[Found, Array]:
        """Search on and store what is found; it, and statuses. Others than rivals are screened."""
        found = steps.climb(block.searched, root, radius, limit, plan)
        designs = block.full, block.searched
        of_rows = self.options.contrasts, block.residual, self.parts(block)
        packed = steps.conclude(*designs, found, before, *of_rows, self.plan)
        modes = self.modes(block, found.root) if self.options.modes else None
        status = self.table.store(block.columns, packed, modes, *self.known, rival=rival)
        if not rival:
            suspect = self.suspects(block, found) & (status == Status.CONVERGED)
            self.found_suspect.append(block.columns[suspect])
        return found, status

    def _is_certified(self, column: int) -> bool:
        """Whether differences of the criterion of the design as `fit` has it say so of an optimum
        in the table."""
        with np.errstate(all="ignore"):
            own = self.table.of(column)
            design, reml = self.single(column), self.options.reml
            value, gradient = differences(own["theta"], design, reml, own["parameters"])
            return bool(is_certified(own["criterion"][0], value, np.linalg.norm(gradient)))


class _SharedPasses(Passes):
    """Of responses of one design, in the same rows.

    Args:
        engine: of these rows.
        values: (n, b), the block.
        kept: (n,) booleans, the rows; None for all.
        table: for their numbers.
    """

    def __init__(self, engine: HostEngine, values: Array, kept: Array | None, table: Table):
        lanes = engine.lanes
        super().__init__(lanes.covariance, engine.options, engine.known, table, lanes.largest)
        self.lanes, self.grid, self.values, self.kept = lanes, engine.grid, values, kept
        self.first_row = 0 if kept is None else int(np.argmax(kept))

    def prepared(self, columns: Array) -> Block:
        values, shift = self._block(columns)
        reduced = self._reduced(values, shift)
        searched = steps.searched(self.lanes, reduced, self.plan)
        residual = self.lanes.basis.n - self.lanes.p
        full = self.lanes.batch(reduced)
        return Block(columns, searched, full, residual, (values, shift, reduced))

    def suspects(self, block: Block, found: Found) -> Array:
        if self.grid is None:
            return np.zeros(block.columns.size, bool)

        def along(places: Array, omegas: Array) -> Array:
            some = block.searched.among(places)
            return np.stack([profiled(omega, some, reml=self.options.reml) for omega in omegas])

        values = self.grid.values(block.detail[2])
        return suspects(values, found.root, found.value, self.covariance, along)

    def modes(self, block: Block, root: Array) -> tuple[Array, ...]:
        values, shift, _ = block.detail
        return steps.modes_of(self.lanes, values, shift, root)

    def single(self, column: int) -> Design:
        values, shift = self._block(np.array([column]))
        basis = self.lanes.basis
        return Design.of(basis, basis.response(values[:, 0] + shift[0]))

    def _block(self, columns: Array) -> tuple[Array, Array]:
        """Values less shifts, (n, lanes), and these."""
        contiguous = bool((np.diff(columns) == 1).all())
        where = slice(columns[0], columns[-1] + 1) if contiguous else columns
        values = np.asarray(self.values[:, where])
        shift = values[self.first_row] * bool(np.any(self.lanes.constant))
        values = values - shift
        if self.kept is not None:
            values[~self.kept] = 0.0
        return values, shift

    def _reduced(self, values: Array, shift: Array) -> Response:
        """In one pass, and again, from residuals, where that leaves too few digits."""
        if self.lanes.loses_digits:
            return self.lanes.reduce(values, shift, exact=True)
        reduced = self.lanes.reduce(values, shift, exact=False)
        doubtful = np.flatnonzero(reduced.trouble == Status.ILL_CONDITIONED)
        if doubtful.size:
            again = self.lanes.reduce(values[:, doubtful], shift[doubtful], exact=True)
            for whole, part in zip(reduced, again, strict=True):
                if whole is not None:
                    whole[..., doubtful] = part
        return reduced
