"""`LaneEngine`: the engine of `fit_many` for grouped and dense designs, on JAX.

A block is cut into chunks of a fixed number of lanes, worked on by as many threads as there are
cores, or spread over the devices. A chunk goes through the compiled `programs`. Its search stops
after as many steps as serve most lanes; the others are collected over all chunks and go on
together, so that none waits for the slowest of all. What cannot be certified, saddle points among
them, is tried again with the slower steps of `estimate`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreml.backend.compilation import quick_jit, remembered
from jaxreml.backend.devices import working_bytes
from jaxreml.backend.runtime import neutral
from jaxreml.backend.threads import cores
from jaxreml.many.base import Known, Options
from jaxreml.many.lanes import Lanes, fitting, power_of_two
from jaxreml.many.numbers import Table
from jaxreml.many.programs import programs
from jaxreml.many.screening import Grid, suspects
from jaxreml.many.steps import Plan
from jaxreml.model.basis import Basis
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.response import Response
from jaxreml.optimum.rivals import has_one_optimum, starts
from jaxreml.status import Status

CACHE_BYTES = 2**20  # of each of the larger arrays of a chunk, on a CPU
FEW, MANY = 32, 256  # lanes of a chunk, at least and at most, on a CPU;
FEW_APART, MANY_APART = 256, 2**14  # on an accelerator, whose launches cost more than numbers do
LOOK = 20  # steps of the first chunk of a pass
OF_A_PASS = 4  # what a response costs in another pass, besides its steps, in steps


class LaneEngine:
    """`Engine` of grouped and dense designs on JAX."""

    def __init__(self, basis: Basis, X: np.ndarray, known: Known, options: Options):
        self.lanes, self.known, self.options = Lanes.of(basis, X, reml=options.reml), known, options
        self.in_step = self.lanes.pairs is not None
        self.plan = Plan(options.reml, basis.kind != "dense", self.in_step, options.df)
        self.mesh = Mesh(np.array(options.devices), ("responses",))

    @cached_property
    def placed(self) -> Lanes:
        """The arrays, on all devices."""
        return jax.device_put(self.lanes, NamedSharding(self.mesh, PartitionSpec()))

    @cached_property
    def screens(self) -> bool:
        """Whether a response may have several optima."""
        return not has_one_optimum(self.lanes.basis.structure, self.lanes.covariance, self.lanes.p)

    @cached_property
    def grid(self) -> Grid | None:
        """To look for them."""
        return Grid(self.lanes, reml=self.options.reml) if self.in_step and self.screens else None

    def fit(
        self, values: np.ndarray, columns: np.ndarray, kept: np.ndarray | None, table: Table
    ) -> None:
        """As `Engine.fit`."""
        Passes(self, values, columns.size, kept, table).run(columns)

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """As `Engine.gradients`."""
        return np.asarray(_gradients(self.options.reml)(self.lanes.plain, parameters, values))


@remembered
def _gradients(reml: bool) -> Any:
    slope = jax.grad(reml_objective if reml else ml_objective)

    def of_all(lanes: Lanes, parameters: Array, values: Array) -> Array:
        each = jax.vmap(lambda own: slope(parameters, lanes.each(own)), in_axes=-1)
        return each(lanes.reduce(values, exact=True))

    return quick_jit(of_all)


class Passes:
    """The way of responses of a block that have the same rows through the programs.

    Args:
        engine: of these rows.
        values: (n, b), the block.
        count: how many responses of it.
        kept: (n,) booleans, the rows; None for all.
        table: for their numbers.
    """

    def __init__(
        self,
        engine: LaneEngine,
        values: np.ndarray,
        count: int,
        kept: np.ndarray | None,
        table: Table,
    ):
        self.engine, self.values, self.kept, self.table = engine, values, kept, table
        self.options, self.plan, self.shared = engine.options, engine.plan, engine.placed
        self.screens, self.grid = engine.screens, engine.grid
        self.shifts = bool(np.any(engine.lanes.constant))
        self.first_row = 0 if kept is None else int(np.argmax(kept))
        self.room = _Room.of(self.options.devices[0])
        most = self.room.lanes(engine.lanes.largest)
        few = count <= FEW or not engine.in_step
        shared = -(-count // len(self.options.devices))
        wanted = self.room.least if few else max(power_of_two(shared), self.room.usual)
        self.lanes = self.options.lanes or min(wanted, most)
        self.size = self.lanes * len(self.options.devices)  # of all devices
        self.suspects: list[_Part] = []  # responses that may have a lower optimum

    def run(self, columns: np.ndarray) -> None:
        """Fit these columns and store their numbers in the table."""
        limit = self.options.max_iterations
        exactly = self.plan._replace(exact=True)
        plan = exactly if self.engine.lanes.loses_digits else self.plan
        with ThreadPoolExecutor(_threads(self.options.devices)) as pool:
            left = self._pass([_Part.fresh(columns)], plan, pool)
            slow: list[_Part] = []
            while left:
                again, going = [], []
                for part in left:
                    trouble = np.asarray(part.reduced.trouble)  # pyright: ignore
                    sure = trouble != Status.ILL_CONDITIONED
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
        plan, limit = self.plan._replace(careful=True), self.options.max_iterations
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
        limit = self.options.max_iterations
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
        compiled = programs(self.engine.mesh, plan)
        padded = np.resize(np.arange(chunk.columns.size), self.size)  # repeats
        modes = None
        block: Any = None
        shift: Any = None
        if chunk.reduced is None or self.options.modes:
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
        of_rows = self.options.contrasts, self.options.parts
        packed = compiled.conclude(self.shared, reduced, found, before, *of_rows)
        looks = self.screens and not rival
        suspect = self._suspects(compiled, reduced, found) if looks else None
        if self.options.modes:
            modes = jax.device_get(compiled.modes(self.shared, block, shift, found.root))
        status = self.table.store(
            chunk.columns, np.asarray(packed), modes, *self.engine.known, rival=rival
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

    def _suspects(self, compiled: Any, reduced: Response, found: Any) -> np.ndarray:
        """Which responses of a chunk may have a lower optimum than the one found."""
        if self.grid is None:
            values = np.asarray(compiled.screen(self.shared, reduced))
        else:
            values = self.grid.values(reduced)

        def along(places: np.ndarray, omegas: np.ndarray) -> np.ndarray:
            first = np.argsort(places, kind="stable")
            turn = np.zeros(places.size, int)  # how often the place has been before
            turn[first] = np.arange(places.size) - np.searchsorted(places[first], places[first])
            criterion = np.empty((len(omegas), places.size))
            for k in range(turn.max() + 1):
                own = turn == k
                points = np.zeros((*omegas.shape[:2], self.size))
                points[..., places[own]] = omegas[..., own]
                found = compiled.along(self.shared, reduced, points)
                criterion[:, own] = np.asarray(found)[:, places[own]]
            return criterion

        return suspects(values, found.root, found.value, self.shared.covariance, along)

    def _block(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values less shifts, (groups, n, lanes), and these, (groups, lanes)."""
        groups = columns.reshape(-1, min(self.room.lanes(len(self.values)), self.lanes))
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


class _Room(NamedTuple):
    """How many lanes a device works on well: bytes of an array; lanes at least, as a rule (more
    only for as many responses) and at most."""

    size: int
    least: int
    usual: int
    most: int

    @classmethod
    def of(cls, device: Any) -> _Room:
        apart = working_bytes(device)
        if apart is None:
            return cls(CACHE_BYTES, FEW, MANY, MANY)
        return cls(apart, FEW_APART, FEW_APART, MANY_APART)

    def lanes(self, numbers: int) -> int:
        """Of so many numbers each."""
        return fitting(numbers, self.size, self.least, self.most)


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
    reduced: Response | None
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


def _cut(iterations: np.ndarray) -> int:
    """After how many steps to leave a chunk, by the steps that each lane of one has taken.

    Lanes in step cost as many steps as the slowest; those left cost a few more than that.
    """
    counts = np.bincount(iterations, minlength=2)
    beyond = 1 - np.cumsum(counts) / counts.sum()
    cost = np.arange(counts.size) + beyond * (counts.size - 1 + OF_A_PASS)
    cost[0] = np.inf
    return int(np.argmin(cost))


def _threads(devices: list[Any]) -> int:
    """One per core for one CPU device; for others two, so that one can copy."""
    if len(devices) == 1 and devices[0].platform == "cpu":
        return cores()
    return 2
