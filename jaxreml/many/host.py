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

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from jaxreml.backend.arrays import among
from jaxreml.backend.threads import cores, single_blas
from jaxreml.many import steps
from jaxreml.many.base import Known, Options
from jaxreml.many.lanes import Lanes, fitting
from jaxreml.many.numbers import Table
from jaxreml.many.screening import Grid, suspects
from jaxreml.many.steps import Found, Plan
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design
from jaxreml.model.objective import expand, profiled
from jaxreml.model.response import Response
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import differences
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
        if has_one_optimum(lanes.basis.structure, lanes.covariance, lanes.p):
            return None
        return Grid(lanes, reml=self.options.reml)

    def fit(self, values: Array, columns: Array, kept: Array | None, table: Table) -> None:
        """As `Engine.fit`."""
        passes = _Passes(self, values, kept, table)
        passes.run(columns)
        converged = columns[table.status[columns] == Status.CONVERGED]
        count = SAMPLE if converged.size >= LARGE else 1
        sample = converged[np.linspace(0, converged.size - 1, count).astype(int)[: converged.size]]
        if not all(map(passes.is_certified, sample)):
            for column in converged:
                if not passes.is_certified(column):
                    table.blank(column, Status.NOT_CERTIFIED)

    def gradients(self, parameters: Array, values: Array) -> Array:
        """As `Engine.gradients`."""
        lanes, covariance = self.lanes, self.lanes.covariance
        design = lanes.batch(lanes.reduce(values, exact=True))
        omega, log_sigma2 = lanes.basis.units.omega(parameters, covariance)
        at = omega[:, None], log_sigma2[None]
        found = expand(at[0], design, reml=self.options.reml, log_sigma2=at[1])
        slopes = np.zeros(omega.size + 1)
        jacobian, _ = covariance.in_parameters(parameters, slopes, np.diag(slopes))
        inside = lanes.basis.units.of_omega(covariance)
        return (
            np.concatenate(
                [found.joint_gradient[:-1].T @ inside, found.joint_gradient[-1:].T], axis=1
            )
            @ jacobian
        )


class _Slow(NamedTuple):
    """Responses whose search has not ended: their columns in the block, where it is, the radius of
    the next step and expansions so far; lanes last."""

    columns: Array
    root: Array
    radius: Array
    before: Array


class _Block(NamedTuple):
    """A chunk of responses: values less shifts, (n, lanes), what they say, and their designs, the
    one that is searched and the full one."""

    columns: Array
    values: Array
    shift: Array
    reduced: Response
    searched: Design
    full: Design


class _Passes:
    """The way of responses of a block that have the same rows.

    Args:
        engine: of these rows.
        values: (n, b), the block.
        kept: (n,) booleans, the rows; None for all.
        table: for their numbers.
    """

    def __init__(self, engine: HostEngine, values: Array, kept: Array | None, table: Table):
        self.lanes, self.grid, self.known = engine.lanes, engine.grid, engine.known
        self.options, self.values, self.kept, self.table = engine.options, values, kept, table
        self.plan = Plan(engine.options.reml, grouped=True, in_lanes=True, df=engine.options.df)
        self.careful = self.plan._replace(careful=True)
        self.suspects: list[Array] = []  # columns that may have a lower optimum
        self.first_row = 0 if kept is None else int(np.argmax(kept))

    def run(self, columns: Array) -> None:
        """Fit these columns and store their numbers in the table."""
        with single_blas(), ThreadPoolExecutor(cores()) as pool:
            ends = list(pool.map(self._first, self._chunks(columns)))
            slow = _Slow(*(np.concatenate(own, axis=-1) for own in zip(*ends, strict=True)))
            places = self._chunks(np.arange(slow.columns.size))
            list(pool.map(lambda own: self._go_on(among(slow, own)), places))
            suspects = np.concatenate(self.suspects) if self.suspects else columns[:0]
            for rival in starts(self.lanes.covariance) if suspects.size else ():
                list(pool.map(partial(self._rival, rival), self._chunks(suspects)))

    def _chunks(self, places: Array) -> list[Array]:
        """These places, as many at a time as stay in the cache."""
        size = self.options.lanes or fitting(self.lanes.largest, CACHE_BYTES, FEW, MANY)
        return [places[k : k + size] for k in range(0, max(places.size, 1), size)]

    def _first(self, columns: Array) -> _Slow:
        """A chunk from the start; what has not converged after `LOOK` steps."""
        with np.errstate(all="ignore"):
            block = self._prepared(columns)
            root = start(block.searched, self.options.reml)
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
            block = self._prepared(slow.columns)
            limit = self.options.max_iterations
            self._settle(block, slow.root, slow.radius, slow.before, limit, self.careful)

    def _rival(self, start: Array, columns: Array) -> None:
        """From another start; what is found counts where it is lower."""
        with np.errstate(all="ignore"):
            block = self._prepared(columns)
            root = np.repeat(start[:, None], columns.size, axis=1)
            ones, none = np.ones(columns.size), np.zeros(columns.size, int)
            limit = self.options.max_iterations
            self._settle(block, root, ones, none, limit, self.careful, rival=True)

    def _prepared(self, columns: Array) -> _Block:
        values, shift = self._block(columns)
        reduced = self._reduced(values, shift)
        searched = steps.searched(self.lanes, reduced, self.plan)
        return _Block(columns, values, shift, reduced, searched, self.lanes.batch(reduced))

    def _settle(
        self,
        block: _Block,
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
        residual, contrasts = self.lanes.basis.n - self.lanes.p, self.options.contrasts
        designs = block.full, block.searched
        of_rows = contrasts, residual, self.options.parts
        packed = steps.conclude(*designs, found, before, *of_rows, self.plan)
        modes = None
        if self.options.modes:
            modes = steps.modes_of(self.lanes, block.values, block.shift, found.root)
        status = self.table.store(block.columns, packed, modes, *self.known, rival=rival)
        if self.grid is not None and not rival:
            suspect = self._suspects(block, found) & (status == Status.CONVERGED)
            self.suspects.append(block.columns[suspect])
        return found, status

    def _suspects(self, block: _Block, found: Found) -> Array:
        """Which lanes may have a lower optimum than the one found, booleans."""

        def along(places: Array, omegas: Array) -> Array:
            some = block.searched.among(places)
            return np.stack([profiled(omega, some, reml=self.options.reml) for omega in omegas])

        assert self.grid is not None
        values, covariance = self.grid.values(block.reduced), self.lanes.covariance
        return suspects(values, found.root, found.value, covariance, along)

    def is_certified(self, column: int) -> bool:
        """Whether differences of the criterion of the design as `fit` has it say so of an optimum
        in the table."""
        with np.errstate(all="ignore"):
            values, shift = self._block(np.array([column]))
            basis = self.lanes.basis
            design = Design.of(basis, basis.response(values[:, 0] + shift[0]))
            own = self.table.of(column)
            value, gradient = differences(own["theta"], design, self.options.reml)
            return bool(is_certified(own["criterion"][0], value, np.linalg.norm(gradient)))

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
