"""The engine of `fit_many`: one design, blocks of responses in, numbers out.

A block is cut into chunks of a fixed number of lanes, worked on by as many threads as there are
cores, or spread over the devices. A chunk goes through two programs, compiled apart:

1. `_search` reduces the responses to cross-products and finds the optimum: all lanes in step, from
   a start that is the optimum itself where the design is balanced, in the spectral form where there
   is one variance ratio. Lanes that have not converged after a few steps are left.
2. `_report` evaluates the criterion of the full design at the roots found, with its derivatives,
   and what follows from them: the certificate and every number of `Fits`.

What the first pass has left is collected over all chunks and goes through the same programs again
with more steps. What even that leaves goes through the search of `estimate`, whose steps know
saddle points.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreml import covariance, linalg, newton
from jaxreml.designs import Design
from jaxreml.errors import DataError
from jaxreml.estimation import Estimate, Status, expand_root, is_reml, report, search
from jaxreml.frame import ModelFrame, drop_aliased
from jaxreml.shared import Reduced, SharedDesign, share

FIRST_PASS = 8  # expansions before a lane is left for a pass with others of its kind
TOLERANCE = 1e-12  # of the Newton decrement, as in `estimate`
CERTIFIED = 1e-6  # gradient that rounding can leave, per unit of the criterion
AGREES = 1e-9  # difference of the two programs' criteria, likewise
MANY_LEVELS = 100  # above it, a lane's levels vectorise better than the lanes
CACHE_BYTES = 2**21  # of the responses of a chunk and their scores


class Fits(NamedTuple):
    """Numbers of many fits, NumPy arrays with the responses on the first axis.

    NaN (False for `is_singular`, 0 for `iterations`) where `status` is not CONVERGED.

    Attributes:
        beta, se, df: (b, p), fixed effects, standard errors, Satterthwaite's degrees of freedom.
        sigma: (b,), residual standard deviations.
        theta: (b, m), relative Cholesky factors as in `Estimate`.
        parameters, parameters_se: (b, m + 1), `Estimate.params` and their standard errors.
        criterion, gradient_norm: (b,).
        iterations, nobs, missing: (b,) integers; `missing` counts rows without a value.
        is_singular: (b,) booleans.
        status: (b,) `Status` codes.
        modes: per random term (b, levels, effects), or None.
    """

    beta: np.ndarray
    se: np.ndarray
    df: np.ndarray
    sigma: np.ndarray
    theta: np.ndarray
    parameters: np.ndarray
    parameters_se: np.ndarray
    criterion: np.ndarray
    gradient_norm: np.ndarray
    iterations: np.ndarray
    nobs: np.ndarray
    missing: np.ndarray
    is_singular: np.ndarray
    status: np.ndarray
    modes: tuple[np.ndarray, ...] | None = None


class BatchFitter:
    """Fits the model of `frame` (rows without a response) to blocks of responses.

    Args:
        frame: a `covariate_frame`.
        method: "REML" or "ML".
        structure: as in `fit`.
        modes: whether to keep conditional modes.
        max_iterations: as in `estimate`.
        batch_size: lanes of a chunk; chosen if left out.
        devices: JAX devices to spread chunks over; those of this process if left out.

    Raises:
        DataError: as `fit`.
    """

    def __init__(
        self,
        frame: ModelFrame,
        method: str = "REML",
        *,
        structure: str | None = None,
        modes: bool = False,
        max_iterations: int = 100,
        batch_size: int | None = None,
        devices: Any = None,
    ):
        self.frame, self.method, self.reml = frame, method, is_reml(method)
        self.modes, self.max_iterations = modes, max_iterations
        self.asked_structure, self.batch_size = structure, batch_size
        self.devices = list(jax.local_devices() if devices is None else devices)
        self.whole = self._share(None)
        self.structure = "dense" if self.whole[0].codes is None else "grouped"

    def _share(self, kept: np.ndarray | None) -> tuple[SharedDesign, np.ndarray, np.ndarray]:
        """The design in the rows `kept`, the order of its rows, which coefficients it has."""
        frame = self.frame
        columns = np.arange(frame.X.shape[1])
        if kept is not None:  # a column may depend on others in these rows only
            _, names, _ = drop_aliased(frame.X[kept], tuple(map(str, columns)))
            columns = np.array(names, int)
        shared, order = share(
            frame.X[:, columns],
            [(term.codes, term.effects) for term in frame.terms],
            weights=frame.weights,
            offset=frame.offset,
            structure=self.asked_structure,
            reml=self.reml,
            kept=kept,
        )
        return shared, order, columns

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of `values`, (n, b) float64 on the rows of the frame, NaN if missing."""
        with jax.enable_x64(True):
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
        table = _Table(self.frame, b, self.modes)
        table.status[missing == n] = Status.TOO_FEW_ROWS
        table.status[infinite] = Status.INFINITE
        todo = (missing < n) & ~infinite
        self._fit_pattern(values, np.flatnonzero(todo & (missing == 0)), None, table)
        for columns, kept in _patterns(values, np.flatnonzero(todo & (missing > 0))):
            self._fit_pattern(values, columns, kept, table)
        return table.fits(n - missing, missing)

    def _fit_pattern(
        self, values: np.ndarray, columns: np.ndarray, kept: np.ndarray | None, table: _Table
    ) -> None:
        """Fit the columns that have values in the rows `kept` and only there."""
        rows = slice(None) if kept is None else kept
        first = values[rows][0, columns] if kept is not None else values[0, columns]
        suspects = columns[first == values[rows][-1, columns]]
        constant = suspects[(values[rows][:, suspects] == values[rows][0, suspects]).all(axis=0)]
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
        limit = self.max_iterations
        if _in_lanes(design[0]):
            columns = self._run(design, values, kept, columns, table, True, min(limit, FIRST_PASS))
            columns = self._run(design, values, kept, columns, table, True, limit)
        self._run(design, values, kept, columns, table, False, limit)

    def _run(
        self,
        design: tuple[SharedDesign, np.ndarray, np.ndarray],
        values: np.ndarray,
        kept: np.ndarray | None,
        columns: np.ndarray,
        table: _Table,
        in_lanes: bool,
        limit: int,
    ) -> np.ndarray:
        """One pass over columns of one pattern; the columns that have not converged."""
        if not columns.size:
            return columns
        shared, order, coefficients = design
        mesh = Mesh(np.array(self.devices), ("responses",))
        lanes = _lanes(shared, in_lanes, columns.size, self.batch_size) * len(self.devices)
        plan = _Plan(self.reml, shared.codes is not None, in_lanes)
        find, conclude, modes_of = _programs(mesh, plan)
        shared = jax.device_put(shared, NamedSharding(mesh, PartitionSpec()))
        across = NamedSharding(mesh, PartitionSpec(None, "responses"))
        in_order = np.array_equal(order, np.arange(order.size))

        def work(chunk: np.ndarray) -> tuple[np.ndarray, Any]:
            padded = np.resize(chunk, lanes)  # repeats
            contiguous = padded[-1] - padded[0] == lanes - 1
            block = values[:, padded[0] : padded[-1] + 1] if contiguous else values[:, padded]
            block = block if in_order else block[order]
            if kept is not None:
                block = np.where(kept[order, None], block, 0.0)
            with jax.enable_x64(True):
                block = jax.device_put(np.ascontiguousarray(block), across)
                found = find(shared, block, limit)
                packed = np.asarray(conclude(shared, found))
                modes = None
                if self.modes:
                    modes = jax.device_get(modes_of(shared, block, found.root))
            return packed, modes

        chunks = [columns[i : i + lanes] for i in range(0, columns.size, lanes)]
        left = []
        with ThreadPoolExecutor(_threads(self.devices)) as pool:
            # The first chunk compiles, once for all threads.
            done = chain([work(chunks[0])], pool.map(work, chunks[1:]))
            for chunk, (packed, modes) in zip(chunks, done, strict=True):
                status = table.store(chunk, packed, modes, coefficients)
                left.append(chunk[status != Status.CONVERGED])
        return np.concatenate(left)


class _Table:
    """The numbers of a block while it is worked on: responses on the first axis.

    Attributes:
        status: (b,) `Status` codes.
        numbers: (b, R), the other fields of `Fits` side by side, in the order of `widths`.
        widths: columns of each field.
        modes: per random term (b, levels, effects), or None.
    """

    FIELDS = (
        "beta", "se", "df", "sigma", "theta", "parameters", "parameters_se", "criterion",
        "gradient_norm", "iterations", "is_singular",
    )  # fmt: skip

    def __init__(self, frame: ModelFrame, b: int, modes: bool):
        p = len(frame.fixed_names)
        m = covariance.count_theta(tuple(len(term.effect_names) for term in frame.terms))
        self.p = p
        self.widths = (p, p, p, 1, m, m + 1, m + 1, 1, 1, 1, 1)
        self.numbers = np.full((b, sum(self.widths)), np.nan)
        self.status = np.full(b, Status.NOT_FINITE.value)
        self.modes = None
        if modes:
            self.modes = tuple(
                np.full((b, len(term.levels), len(term.effect_names)), np.nan)
                for term in frame.terms
            )

    def store(
        self, columns: np.ndarray, packed: np.ndarray, modes: Any, coefficients: np.ndarray
    ) -> np.ndarray:
        """Take over a chunk's numbers, (1 + R, lanes), status first; its statuses."""
        packed = packed[:, : columns.size]
        status = packed[0].astype(int)
        good = status == Status.CONVERGED
        places = np.arange(self.numbers.shape[1])
        if coefficients.size < self.p:
            fixed = [coefficients + k * self.p for k in range(3)]
            places = np.concatenate([*fixed, places[3 * self.p :]])
        self.status[columns] = status
        self.numbers[columns[good, None], places] = packed[1:, good].T
        if modes is not None:
            for own, new in zip(self.modes, modes, strict=True):  # pyright: ignore
                own[columns[good]] = np.moveaxis(new[..., : columns.size], -1, 0)[good]
        return status

    def fits(self, nobs: np.ndarray, missing: np.ndarray) -> Fits:
        """The numbers by name."""
        parts = np.split(self.numbers, np.cumsum(self.widths)[:-1], axis=1)
        named = dict(zip(self.FIELDS, parts, strict=True))
        for name in ("sigma", "criterion", "gradient_norm", "iterations", "is_singular"):
            named[name] = named[name][:, 0]
        with np.errstate(invalid="ignore"):
            named["iterations"] = np.nan_to_num(named["iterations"]).astype(np.int32)
            named["is_singular"] = np.nan_to_num(named["is_singular"]).astype(bool)
        return Fits(
            **{name: np.ascontiguousarray(part) for name, part in named.items()},
            nobs=nobs,
            missing=missing,
            status=self.status.astype(np.int8),
            modes=self.modes,
        )


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


def _in_lanes(shared: SharedDesign) -> bool:
    """Whether lanes go in step on the last axis, which is faster while levels are few."""
    return shared.codes is not None and sum(shared.sizes) <= 4 and _levels(shared) <= MANY_LEVELS


def _levels(shared: SharedDesign) -> int:
    if shared.spectral is not None:
        return shared.spectral.factors.shape[-1]
    return shared.factors.shape[-1] if shared.collapse is None else shared.collapse.counts.shape[0]


def _lanes(shared: SharedDesign, in_lanes: bool, n_columns: int, asked: int | None) -> int:
    """Lanes of a chunk: so many that its arrays stay in the cache."""
    if asked is not None:
        return max(2, asked)
    q = sum(shared.sizes)
    arrays = shared.basis_rows.shape[0] + _levels(shared) * q * (q + shared.p + 1)
    most = CACHE_BYTES // (8 * arrays) if in_lanes else 32
    most = 2 ** int(math.log2(min(max(most, 32), 256)))
    return most if n_columns > 32 else 32


class _Plan(NamedTuple):
    """What a program is compiled for, besides shapes."""

    reml: bool
    grouped: bool
    in_lanes: bool


class Found(NamedTuple):
    """What the search hands on, responses on the last axis."""

    reduced: Reduced
    root: Array
    value: Array
    iterations: Array
    converged: Array
    stalled: Array


def _find(shared: SharedDesign, values: Array, limit: Array, *, plan: _Plan) -> Found:
    """Reduce a chunk, (n, lanes), and find its optima in at most `limit` expansions each."""
    reduced = shared.reduce(values)
    if shared.spectral is not None:
        design = shared.rotated(reduced, reml=plan.reml)
    else:
        design = shared.design(reduced)

    def optimum(design: Design) -> newton.Trace:
        return search(design, plan.reml, TOLERANCE, limit, keep_expansion=False)

    trace = optimum(design) if plan.in_lanes else _mapped(optimum, design, values.shape[1])
    value = trace.point.value
    return Found(reduced, trace.at, value, trace.iterations, trace.converged, trace.stalled)


def _conclude(shared: SharedDesign, found: Found, *, plan: _Plan) -> Array:
    """Everything at the roots found, (1 + R, lanes): status, then the fields of `_Table`."""

    def conclude(design: Design, found: Found) -> Array:
        trace = newton.Trace(found.root, None, found.iterations, found.converged, found.stalled)
        point = expand_root(found.root, design, reml=plan.reml)
        return _pack(report(found.root, point, trace, design), found.value)

    design = shared.design(found.reduced)
    found = found._replace(reduced=None)  # pyright: ignore
    if plan.in_lanes:
        return conclude(design, found)
    return _mapped(conclude, design, found.value.shape[0], found)


def _pack(estimate: Estimate, value: Array) -> Array:
    scale = 1 + jnp.abs(estimate.criterion)
    certified = (estimate.gradient_norm <= CERTIFIED * scale) & (
        jnp.abs(estimate.criterion - value) <= AGREES * scale
    )
    converged = estimate.status == Status.CONVERGED
    status = jnp.where(converged & ~certified, Status.NOT_CERTIFIED, estimate.status)
    # Satterthwaite's degrees of freedom, parameters on the boundary held there
    variance = linalg.diagonal(estimate.vcov)
    slopes = linalg.diagonal(jnp.moveaxis(estimate.vcov_slopes, 0, 2))
    slopes = jnp.moveaxis(slopes, 0, 1)
    free = jnp.isfinite(estimate.params)
    spread = jnp.where(free[:, None] & free, estimate.params_vcov, 0.0)
    of_variance = jnp.sum(slopes[:, None] * spread[:, :, None] * slopes[None], axis=(0, 1))
    one = jnp.ones_like(value)[None]
    return jnp.concatenate(
        [
            status * one,
            estimate.beta,
            jnp.sqrt(variance),
            2 * variance**2 / of_variance,
            estimate.sigma * one,
            estimate.theta,
            estimate.params,
            jnp.sqrt(linalg.diagonal(estimate.params_vcov)),
            estimate.criterion * one,
            estimate.gradient_norm * one,
            estimate.iterations * one,
            estimate.is_singular * one,
        ]
    )


def _modes_of(shared: SharedDesign, values: Array, root: Array, *, plan: _Plan) -> tuple:
    """Conditional modes, per term (levels, effects, lanes): no level is collapsed here."""
    shared = replace(shared, collapse=None, spectral=None)

    def modes(design: Design, root: Array) -> tuple[Array, ...]:
        omega = covariance.omega_from_root(root, design.sizes)
        projection = design.structure.project(omega)
        p = design.p
        factor = linalg.cholesky(projection.gram)
        # Of [X y] u with u = (-coefficients in the orthonormal basis, 1): y less the fixed effects
        lower, right = factor[:p, :p], factor[p, :p]
        upper = linalg.transpose(linalg.solve_lower(lower, linalg.eye_like(lower)))
        shift = linalg.matmul(upper, right[:, None])
        residual = jnp.concatenate([-shift, jnp.ones_like(factor[:1, :1])])
        cross = design.structure.combine(projection.cross, residual)
        return tuple(
            mode / scale
            for mode, scale in zip(design.structure.modes(omega, cross), design.scales, strict=True)
        )

    return _mapped(modes, shared.design(shared.reduce(values)), values.shape[1], root)


def _mapped(function: Any, design: Design, lanes: int, *rest: Any) -> Any:
    """`function` of one design (and more) for each lane; what lanes share is not repeated."""
    axes = jax.tree.map(lambda leaf: -1 if leaf.shape[-1] == lanes else None, design)
    design = jax.tree.map(lambda leaf: leaf if leaf.shape[-1] == lanes else leaf[..., 0], design)
    return jax.vmap(function, in_axes=(axes, *[-1] * len(rest)), out_axes=-1)(design, *rest)


@lru_cache
def _programs(mesh: Mesh, plan: _Plan) -> tuple[Any, Any, Any]:
    """Search, report and modes, jitted and spread over the devices of a mesh."""
    last: list[Any] = [PartitionSpec(*[None] * k, "responses") for k in range(3)]
    scores = last[2 if plan.grouped else 1]
    reduced = Reduced(scores, last[1], last[0], last[1], last[0], last[0])
    found = Found(reduced, last[1], *[last[0]] * 4)

    def spread(function: Any, batched: tuple, out: Any) -> Any:
        """Each device works on its own part of the last axis."""
        return jax.jit(
            jax.shard_map(
                partial(function, plan=plan),
                mesh=mesh,
                in_specs=(PartitionSpec(), *batched),
                out_specs=out,
                check_vma=False,
            )
        )

    return (
        spread(_find, (last[1], PartitionSpec()), found),
        spread(_conclude, (found,), last[1]),
        spread(_modes_of, (last[1], last[1]), last[2]),
    )
