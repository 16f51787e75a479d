"""The `steps` of `fit_many` as compiled programs, apart, so that the certificate is not the
search's own.

Where a design has lanes (`Lanes.batch`) it is one with a trailing axis, else there is one for each
lane, by `vmap`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreml.backend.compilation import quick_compilation, remembered
from jaxreml.many import steps
from jaxreml.many.contributions import Parts
from jaxreml.many.lanes import Lanes
from jaxreml.many.screening import grid
from jaxreml.many.steps import Found, Plan
from jaxreml.model.design import Design
from jaxreml.model.objective import profiled
from jaxreml.model.response import Response
from jaxreml.optimum.effects import conditional_modes
from jaxreml.optimum.search import start


def _per_lane(function: Any) -> Any:
    return jax.vmap(function, in_axes=-1, out_axes=-1)


def _of_designs(
    function: Any, lanes: Lanes, reduced: Response, *arrays: Any, plan: Plan, searched: bool = False
) -> Any:
    """A function of a design and of arrays with the lanes last."""
    if plan.in_lanes:
        whole = steps.searched(lanes, reduced, plan) if searched else lanes.batch(reduced)
        return function(whole, *arrays)
    return _per_lane(lambda own, *rest: function(lanes.each(own), *rest))(reduced, *arrays)


def _begin(
    lanes: Lanes, values: Array, shift: Array, *, plan: Plan
) -> tuple[Response, Array, Array]:
    """Reduce a chunk, (groups, n, lanes), and find where to start.

    The rows of one group at a time fit into the cache; all that follows takes them together.
    """
    groups = jax.lax.map(lambda group: lanes.reduce(*group, exact=plan.exact), (values, shift))
    reduced = jax.tree.map(_merge, groups)

    def begin(design: Design) -> Array:
        return start(design, plan.reml)

    root = _of_designs(begin, lanes, reduced, plan=plan, searched=True)
    return reduced, root, jnp.ones_like(reduced.residual_ss)


def _merge(groups: Array) -> Array:
    """(groups, ..., lanes) to (..., groups * lanes)."""
    moved = jnp.moveaxis(groups, 0, -2)
    return moved.reshape(*moved.shape[:-2], moved.shape[-2] * moved.shape[-1])


def _climb(
    lanes: Lanes, reduced: Response, root: Array, radius: Array, limit: Array, *, plan: Plan
) -> Found:
    def climb(design: Design, root: Array, radius: Array) -> Found:
        return steps.climb(design, root, radius, limit, plan)

    return _of_designs(climb, lanes, reduced, root, radius, plan=plan, searched=True)


def _screen(lanes: Lanes, reduced: Response, *, plan: Plan) -> Array:
    """The criterion on the `screening.grid`, (G, lanes); not for lanes in step."""
    omegas = lanes.covariance.omega(jnp.asarray(grid(lanes.covariance)[0].T))

    def at(omega: Array) -> Array:
        return _per_lane(lambda own: profiled(omega, lanes.each(own), reml=plan.reml))(reduced)

    return jax.lax.map(at, omegas.T)


def _along(lanes: Lanes, reduced: Response, omegas: Array, *, plan: Plan) -> Array:
    """The criterion at points (k, m, lanes) of each response, (k, lanes)."""

    def criterion(design: Design, omega: Array) -> Array:
        return profiled(omega, design, reml=plan.reml)

    def at(omega: Array) -> Array:
        return _of_designs(criterion, lanes, reduced, omega, plan=plan, searched=True)

    return jax.lax.map(at, omegas)


def _conclude(
    lanes: Lanes,
    reduced: Response,
    found: Found,
    before: Array,
    contrasts: Array,
    parts: Parts,
    *,
    plan: Plan,
) -> Array:
    residual = lanes.basis.n - lanes.p

    def conclude(design: Design, found: Found, before: Array) -> Array:
        searched = steps.searched(lanes, reduced, plan) if plan.in_lanes else design
        return steps.conclude(design, searched, found, before, contrasts, residual, parts, plan)

    return _of_designs(conclude, lanes, reduced, found, before, plan=plan)


def _modes_of(
    lanes: Lanes, values: Array, shift: Array, root: Array, *, plan: Plan
) -> tuple[Array, ...]:
    values, shift = _merge(values), _merge(shift)
    if plan.in_lanes:
        return steps.modes_of(lanes, values, shift, root)

    def modes(own: Response, root: Array) -> tuple[Array, ...]:
        design = lanes.each(own)
        return conditional_modes(design.covariance.omega(root), design)

    return _per_lane(modes)(lanes.reduce(values, shift, exact=True), root)


class Programs:
    """The programs of a plan, jitted and spread over the devices of a mesh."""

    def __init__(self, mesh: Mesh, plan: Plan):
        last: list[Any] = [PartitionSpec(*[None] * k, "responses") for k in range(3)]
        scores = last[2 if plan.grouped else 1]
        reduced = Response(scores, last[1], last[0], last[1], last[0], last[0], last[0])
        found = Found(last[1], *[last[0]] * 5)
        first, everywhere = PartitionSpec("responses"), PartitionSpec()
        options = quick_compilation(mesh.devices.flat[0].platform)

        def spread(function: Any, batched: tuple, out: Any) -> Any:
            """Each device works on its own part of the last axis."""
            return jax.jit(
                jax.shard_map(
                    partial(function, plan=plan),
                    mesh=mesh,
                    in_specs=(everywhere, *batched),
                    out_specs=out,
                    check_vma=False,
                ),
                compiler_options=options,
            )

        known = reduced, last[1], last[0]
        self.held = jax.tree.map(lambda spec: NamedSharding(mesh, spec), known)
        self.begin = spread(_begin, (first, first), known)
        self.climb = spread(_climb, (*known, everywhere), found)
        self.screen = spread(_screen, (reduced,), last[1])
        self.along = spread(_along, (reduced, last[2]), last[1])
        self.conclude = spread(
            _conclude, (reduced, found, last[0], everywhere, everywhere), last[1]
        )
        self.modes = spread(_modes_of, (first, first, last[1]), last[2])


programs = remembered(Programs)
