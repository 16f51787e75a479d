"""`HostEngine`: the engine of `fit_many` for grouped designs on NumPy. Nothing is compiled.

A block is cut into chunks, worked on by as many threads as there are cores. Lanes leave a chunk's
search as they end, so that none waits for others. What the search cannot settle, saddle points
among them, goes on with the slower steps of `estimate`; responses that may have a lower optimum are
searched again from rival starts.

All optima are certified by their criterion and its derivatives in the full design, where the
search may use another form of it. Both are of one source, so some lanes are looked at by a third
way: differences of the criterion of the design as `fit` has it, level by level. Where that does not
agree all lanes are.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.backend.arrays import among
from jaxreml.backend.threads import cores, single_blas
from jaxreml.many import steps
from jaxreml.many.base import Known, Options
from jaxreml.many.lanes import DOUBTFUL, Lanes
from jaxreml.many.numbers import Table
from jaxreml.many.screening import Grid, grid_of, suspects
from jaxreml.many.steps import Found, Plan
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design
from jaxreml.model.objective import expand, profiled
from jaxreml.model.response import Response
from jaxreml.optimum.certificate import is_certified
from jaxreml.optimum.effects import differences
from jaxreml.optimum.rivals import starts
from jaxreml.optimum.search import start
from jaxreml.status import Status

Array = np.ndarray
CACHE_BYTES = 2**21  # of each of the larger arrays of a chunk
SAMPLE, LARGE = 4, 100  # responses looked at by a third way, of at least so many; of fewer, one
FEW, MANY = 64, 8192  # lanes of a chunk, at least and at most


class HostEngine:
    """`Engine` of grouped designs on NumPy."""

    def __init__(self, basis: Basis, X: Array, known: Known, options: Options):
        self.lanes, self.known, self.options = Lanes.of(basis, X, reml=options.reml), known, options

    @cached_property
    def grid(self) -> Grid | None:
        """To look for other optima with, where a response may have several."""
        return grid_of(self.lanes, reml=self.options.reml)

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
        self.first_row = 0 if kept is None else int(np.argmax(kept))

    def run(self, columns: Array) -> None:
        """Fit these columns and store their numbers in the table."""
        size = self.options.lanes or _chunk(self.lanes)
        chunks = [columns[k : k + size] for k in range(0, columns.size, size)]
        threads = min(cores(), len(chunks))
        with single_blas():
            if threads < 2:
                for chunk in chunks:
                    self._work(chunk)
                return
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self._work, chunks))

    def _work(self, columns: Array) -> None:
        """One chunk into the table."""
        with np.errstate(all="ignore"):
            values, shift = self._block(columns)
            reduced = self._reduced(values, shift)
            searched = steps.searched(self.lanes, reduced, self.plan)
            full = self.lanes.batch(reduced)
            limit, width = self.options.max_iterations, columns.size
            everyone = np.arange(width)

            def settle(
                places: Array, root: Array, radius: Array, before: Array, plan: Plan, rival: bool
            ) -> tuple[Found, Array]:
                """Search on, and store what is found; it, and statuses."""
                some = places if places.size < width else None
                own, whole = (
                    design if some is None else design.among(some) for design in (searched, full)
                )
                found = steps.climb(own, root, radius, limit, plan)
                residual = self.lanes.basis.n - self.lanes.p
                contrasts = self.options.contrasts
                packed = steps.conclude(whole, found, before, contrasts, residual, self.plan)
                modes = None
                if self.options.modes:
                    modes = steps.modes_of(
                        self.lanes, values[:, places], among(shift, places), found.root
                    )
                status = self.table.store(columns[places], packed, modes, *self.known, rival=rival)
                return found, status

            root = start(searched, self.options.reml)
            none = np.zeros(width, int)
            found, status = settle(everyone, root, np.ones(width), none, self.plan, False)
            rivals = [self._suspects(searched, reduced, found, status)]
            slow = np.flatnonzero(status != Status.CONVERGED)
            if slow.size:
                before = found.iterations[slow] - 1  # the last once more
                held = found.root[:, slow], found.radius[slow]
                found, status = settle(slow, *held, before, self.careful, False)
                some = self._suspects(searched.among(slow), among(reduced, slow), found, status)
                rivals.append(slow[some])
            suspect = np.concatenate([np.flatnonzero(rivals[0]), *rivals[1:]])
            for rival in starts(self.lanes.covariance) if suspect.size else ():
                root = np.repeat(rival[:, None], suspect.size, axis=1)
                none = np.zeros(suspect.size, int)
                settle(suspect, root, np.ones(suspect.size), none, self.careful, True)

    def _suspects(self, searched: Any, reduced: Response, found: Found, status: Array) -> Array:
        """Which lanes may have a lower optimum than the one found, booleans."""
        if self.grid is None:
            return np.zeros(status.size, bool)

        def along(places: Array, omegas: Array) -> Array:
            some = searched.among(places)
            return np.stack([profiled(omega, some, reml=self.options.reml) for omega in omegas])

        values, covariance = self.grid.values(reduced), self.lanes.covariance
        suspect = suspects(values, found.root, found.value, covariance, along)
        return suspect & (status == Status.CONVERGED)

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
        if DOUBTFUL * len(values) > 0.1:
            return self.lanes.reduce(values, shift, exact=True)
        reduced = self.lanes.reduce(values, shift, exact=False)
        doubtful = np.flatnonzero(reduced.trouble == Status.ILL_CONDITIONED)
        if doubtful.size:
            again = self.lanes.reduce(values[:, doubtful], shift[doubtful], exact=True)
            for whole, part in zip(reduced, again, strict=True):
                if whole is not None:
                    whole[..., doubtful] = part
        return reduced


def _chunk(lanes: Lanes) -> int:
    """How many lanes keep the larger arrays of a search in the cache."""
    levels = lanes.levels[0].shape[-1]
    numbers = max(levels * sum(lanes.sizes) ** 2, (lanes.p + 1) ** 2)
    return min(max(2 ** int(math.log2(max(CACHE_BYTES // (8 * numbers), 1))), FEW), MANY)
