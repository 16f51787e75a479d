r"""Optima of the criterion with parameters held at values that people read: SDs, correlations,
the residual SD, fixed effects.

`Coordinates` give each such parameter an axis of its own, so that holding it is leaving its axis
out. With the effects of a term reordered, the absolute covariance matrix of the term is T T' for
a triangular T whose first row is the SD of the first effect; of a correlation's two effects, put
first, the second row of T is d (cos a, sin a), and the correlation is cos a; the two SDs, of which
a sign would be the correlation's, have square roots for coordinates. All others are free, and none
has bounds: the criterion is even in diagonal entries and square roots, so that a zero variance is
an ordinary stationary point, and so is a correlation of +-1. A fixed effect moves the response
(`Design.combined`). So one program serves every parameter and every value: they differ in numbers
only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.compilation import quick_compilation, remembered
from jaxreml.backend.lazy import jax
from jaxreml.backend.runtime import neutral
from jaxreml.backend.threads import suited_blas
from jaxreml.model import linalg
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.design import Design
from jaxreml.model.objective import expand, neg2_loglik
from jaxreml.optimum import newton
from jaxreml.optimum.certificate import STEP, is_certified, slopes_by_differences
from jaxreml.optimum.eliminated import Eliminated, in_held, near, solved
from jaxreml.optimum.search import ZERO

Array = Any  # NumPy's or JAX's
TOLERANCE = 1e-12  # of the Newton decrement, as in `estimate`
MAX_ITERATIONS = 100
LANES = 32  # optima sought together
FEW = 64  # optima up to which NumPy takes less time than compiling does: about half a second
ALONE = 2**16  # numbers in a structure from which on they are sought one by one


class Coordinates(NamedTuple):
    """Axes of the parameters x of one optimum, (m + 2,): per block the entries of T, column by
    column, or its chart if it has no T; log sigma; and the distance that held fixed effects are
    from least squares.

    All arrays are of floats.

    Attributes:
        order: (r, m), to the entries of a root of Omega from those of T: of the effects in another
            order, or another basis.
        roots: (m,), 1 where x has the square root of an entry, 0 elsewhere.
        polar: (m, m), 1 in the row of d and the column of a where x has these, 0 elsewhere.
        pivots: (m + 2,), 1 for entries on the diagonal of T that are free.
        free: (m + 2,), 1 for what is optimised, 0 for what is held.
        columns: (p + 1, p + 1), combinations of [X y] for the columns of X that are free and y.
        shift: (p,), the combination of X that the response gains per unit of the last entry of x.
        absent: (p + 1,), 1 for columns that there are none of.
        log_unit: (), logarithm of the residual SD to which T and sigma are relative.
        scaled: entries of Omega, 1 for those that are relative to sigma, 0 for the residuals' own.
        eliminated: what is held by solving for an entry of x (`eliminated`); on the host only.
    """

    order: Any
    roots: Any
    polar: Any
    pivots: Any
    free: Any
    columns: Any
    shift: Any
    absent: Any
    log_unit: Any
    scaled: Any
    eliminated: tuple[Eliminated, ...] = ()


class Optimum(NamedTuple):
    """An optimum found; arrays with as many on the first axis as were sought.

    Attributes:
        x: (m + 2,).
        value: (), the criterion.
        gradient: (m + 2,), of the criterion in x, what is held included.
        hessian: (m + 2, m + 2), without the last entry of x.
        beta: (p,), all fixed effects.
        certified: (), whether the search ended and the gradient by another route agrees.
    """

    x: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    beta: np.ndarray
    certified: np.ndarray


class Point(NamedTuple):
    """The criterion around x.

    Attributes:
        value, gradient, hessian: (), (m + 2,) and (m + 2, m + 2), zero for what is held.
        slope, full: gradient and Hessian with what is held, but for the last entry of x.
    """

    value: Array
    gradient: Array
    hessian: Array
    slope: Array
    full: Array


class _Triangle(NamedTuple):
    """T and what its derivatives are made of; see `triangle`.

    Attributes:
        entries, slopes, bends: (m,), entries of T or of d, and two derivatives in their own x.
        angles: (m,), ones for those that are angles.
        turns: (m,), angles that entries are turned by, zero for most.
        radii: (m,), the d of angles, zero for other entries.
    """

    entries: Any
    slopes: Any
    bends: Any
    angles: Any
    turns: Any
    radii: Any


def _parts(x: Any, axes: Coordinates) -> _Triangle:
    roots, polar = axes.roots, axes.polar
    entries = x * (1 - roots + roots * x)
    angles, turns = polar.sum(axis=0), polar @ x
    return _Triangle(
        entries, 1 - roots + 2 * roots * x, 2 * roots, angles, turns, polar.T @ entries
    )


def triangle(x: Any, axes: Coordinates) -> Any:
    """Entries of T, (m,), at x (m,); NumPy or JAX."""
    xp, own = namespace(x), _parts(x, axes)
    return own.entries * (1 - own.angles) * xp.cos(own.turns) + own.radii * xp.sin(x)


def triangle_slopes(x: Any, axes: Coordinates, weights: Any) -> tuple[Any, Any]:
    """Derivatives of `triangle`, (m, m), and second ones of weights'T, (m, m)."""
    xp, own, polar = namespace(x), _parts(x, axes), axes.polar
    sin, cos = xp.sin(own.turns), xp.cos(own.turns)
    kept = 1 - own.angles
    first = xp.diag(own.slopes * kept * cos + own.radii * xp.cos(x))
    first = first - (own.entries * kept * sin)[:, None] * polar
    first = first + xp.sin(x)[:, None] * polar.T * own.slopes
    alone = weights * (own.bends * kept * cos - own.radii * xp.sin(x))
    alone = alone + own.bends * (polar @ (weights * xp.sin(x)))
    across = -(weights * own.slopes * kept * sin)[:, None] * polar
    across = across + (weights * xp.cos(x))[:, None] * polar.T * own.slopes
    turned = polar.T @ ((weights * own.entries * kept * cos)[:, None] * polar)
    return first, xp.diag(alone) + across + across.T - turned


def _omega(x: Array, axes: Coordinates, covariance: Covariance) -> tuple[Array, Array]:
    """Relative covariances and residual log-variance at x (m + 1,)."""
    entries = triangle(x[:-1], axes)
    absolute = _like(x, covariance.omega(axes.order @ entries))
    scale = namespace(x).exp(-2 * x[-1] * axes.scaled)
    return absolute * scale, 2 * (x[-1] + axes.log_unit)


def _omega_slopes(
    x: Array, axes: Coordinates, covariance: Covariance, gradient: Array
) -> tuple[Array, Array]:
    """Derivatives of `_omega` in x, (m + 1, m + 1), and second ones, (m + 1, m + 1), of
    gradient'(omega, log sigma2) for `gradient` (m + 1,)."""
    xp, order = namespace(x), axes.order
    entries, scale = triangle(x[:-1], axes), xp.exp(-2 * x[-1] * axes.scaled)
    of_omega = gradient[:-1] * scale
    of_chart, bend = (_like(x, own) for own in covariance.slopes(order @ entries, of_omega))
    weights = (of_omega @ of_chart) @ order
    first, inner = triangle_slopes(x[:-1], axes, weights)
    inner = inner + first.T @ (order.T @ bend @ order) @ first
    jacobian = of_chart @ order @ first
    falls = -2 * axes.scaled
    omega = _like(x, covariance.omega(order @ entries))
    mixed = (falls * of_omega) @ jacobian
    bends = linalg.border(inner, mixed, (falls**2 * of_omega) @ omega)
    last = xp.asarray(np.append(np.zeros(len(entries)), 2.0)[None], x.dtype)
    whole = xp.concatenate([scale[:, None] * jacobian, (falls * scale * omega)[:, None]], axis=1)
    return xp.concatenate([whole, last]), bends


def _like(x: Array, found: Array) -> Array:
    """A NumPy array where x is one: blocks may have their derivatives from JAX."""
    return np.asarray(found) if on_host(x) else found


def _combined(shift: Array, axes: Coordinates, design: Design) -> Design:
    return design.combined(_columns(shift, axes), axes.absent)


def _columns(shift: Array, axes: Coordinates) -> Array:
    """The columns of `_combined`."""
    place = np.eye(len(axes.columns))
    return axes.columns + (place[:, :-1] @ (shift * axes.shift))[:, None] * place[-1]


def expansion(x: Array, axes: Coordinates, design: Design, *, reml: bool) -> Point:
    """The criterion at x (m + 2,) with its derivatives, the response of `design` moved."""
    covariance, xp = design.covariance, namespace(x)
    inner = solved(x[:-1], axes.eliminated)
    omega, log_sigma2 = _omega(inner, axes, covariance)
    outer = expand(omega, design, reml=reml, log_sigma2=log_sigma2)
    jacobian, bend = _omega_slopes(inner, axes, covariance, outer.joint_gradient)
    free, none = axes.free, xp.zeros_like(x[:1])
    inside = jacobian.T @ outer.joint_hessian @ jacobian + bend
    first, inside = in_held(inner, outer.joint_gradient @ jacobian, inside, axes.eliminated)
    slope = xp.concatenate([first, none])
    full = linalg.border(inside, xp.zeros_like(inner), none[0])
    return Point(outer.value, slope * free, full * free[:, None] * free, slope, full)


def _climb(x: Array, axes: Coordinates, design: Design, *, reml: bool) -> newton.Trace:
    """The optimum from x (m + 2,)."""
    start, xp = x, namespace(x)
    held = _combined(x[-1], axes, design)

    def at(x: Array) -> Array:
        """Rounding must not move what is held."""
        return xp.where(axes.free > 0, x, start)

    def snap(x: Array) -> Array:
        return xp.where((axes.pivots > 0) & (xp.abs(x) < ZERO), 0.0, x)

    trace = newton.minimise(
        lambda x: expansion(at(x), axes, held, reml=reml),
        start,
        snap,
        tolerance=TOLERANCE,
        max_iterations=MAX_ITERATIONS,
    )
    return trace._replace(at=at(trace.at))


def _criterion(
    x: Array, axes: Coordinates, design: Design, *, reml: bool, held: Design | None = None
) -> Array:
    """At x; `held` is the design that no x moves, if it is known."""
    if held is None:
        held = _combined(x[-1], axes, design)
    inner = solved(x[:-1], axes.eliminated)
    return neg2_loglik(*_omega(inner, axes, design.covariance), held, reml=reml)


def _look(x: Array, axes: Coordinates, design: Design, *, reml: bool) -> tuple[Array, Array, Array]:
    """Criterion, its gradient by reverse-mode autodiff and the fixed effects at x."""
    criterion = partial(_criterion, axes=axes, design=design, reml=reml)
    return *jax.value_and_grad(criterion)(x), _fixed_effects(x, axes, design)


def _fixed_effects(x: Array, axes: Coordinates, design: Design) -> Array:
    xp, p = namespace(x), design.p
    held = _combined(x[-1], axes, design)
    omega, _ = _omega(solved(x[:-1], axes.eliminated), axes, design.covariance)
    factor = linalg.cholesky(held.structure.marginal(omega).gram)
    slopes = -linalg.solve_lower(factor[:p, :p], factor[p, :p, None], transposed=True)
    moved = (_columns(x[-1], axes) @ xp.append(slopes, 1.0))[:p, None]
    return design.beta_ols - linalg.solve_upper(xp.asarray(design.basis), moved)[:, 0]


@remembered
def _programs(
    structure: Any, shapes: tuple[tuple[tuple[int, ...], str], ...], reml: bool, together: bool
) -> tuple[Any, Any]:
    """The search and the certificate, compiled at the same time.

    Args:
        structure: the tree of x, axes and design.
        shapes: of its leaves, with their types.
        reml: the criterion.
        together: whether x and axes have lanes.
    """
    leaves = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in shapes]
    arguments = jax.tree.unflatten(structure, leaves)
    options = quick_compilation(jax.default_backend())

    def lower(function: Any) -> Any:
        program = partial(function, reml=reml)
        if together:
            program = jax.vmap(program, in_axes=(0, 0, None))
        return jax.jit(program, compiler_options=options).lower(*arguments)

    traced = [lower(function) for function in (_climb, _look)]
    with ThreadPoolExecutor(len(traced)) as pool:
        climb, look = pool.map(lambda program: program.compile(), traced)
    return climb, look


def on_host_only(design: Design) -> bool:
    """Whether optima of a design are sought by NumPy only: what `eliminated` does."""
    return not all(block.any_basis for block in design.covariance.blocks)


def optima(
    starts: np.ndarray,
    axes: list[Coordinates],
    design: Design,
    *,
    reml: bool,
    more: bool = False,
) -> Optimum:
    """The optima nearest to `starts`, (b, m + 2), each in axes of its own.

    On NumPy one by one, up to `FEW` and unless `more` follow, and always where blocks have charts
    of their own; on JAX `LANES` at a time, in step, and in large structures one by one too.
    `design` is one `without_names`, on the host or the device.
    """
    large = design.numbers >= ALONE
    alone = large or on_host_only(design) or not (more or len(starts) > FEW)
    if on_host(design.residual_ss) and alone:
        pairs = zip(starts, axes, strict=True)
        settings = np.errstate() if design.written_out else neutral()
        with settings, suited_blas(design.numbers):
            found = [_alone(start, own, design, reml) for start, own in pairs]
    else:
        size = 1 if large else LANES
        with neutral():
            design = jax.device_put(design)
        chunks = [slice(k, k + size) for k in range(0, len(starts), size)]
        found = [_chunk(starts[own], axes[own], design, reml, size) for own in chunks]
    return Optimum(*map(np.concatenate, zip(*found, strict=True)))


def _alone(start: np.ndarray, axes: Coordinates, design: Design, reml: bool) -> Optimum:
    """One, on the host. The certificate has differences of the criterion along
    two ways: all coordinates together, and with signs in turns."""
    moves = bool(axes.shift.any())
    held = None if moves else _combined(start[-1], axes, design)
    with np.errstate(all="ignore"):
        axes = axes._replace(eliminated=near(start[:-1], axes.eliminated))
        trace = _climb(start, axes, design, reml=reml)
        x, point = trace.at, trace.point
        axes = axes._replace(eliminated=near(x[:-1], axes.eliminated))
        criterion = partial(_criterion, axes=axes, design=design, reml=reml, held=held)
        scale = axes.free / np.sqrt(1 + np.abs(point.hessian.diagonal()))
        ways = scale * np.array([np.ones(x.size), (-1.0) ** np.arange(x.size)])
        value, slopes = slopes_by_differences(criterion, x, ways, STEP / 2)
        gradient = point.slope
        if moves:
            gradient[-1:] = slopes_by_differences(criterion, x, np.eye(x.size)[-1:], STEP / 2)[1]
        beta = _fixed_effects(x, axes, design)
        certified = trace.converged & is_certified(point.value, value, np.linalg.norm(slopes))
    found = (x, value, gradient, point.full, beta, certified)
    return Optimum(*(np.asarray(own)[None] for own in found))


def _chunk(
    starts: np.ndarray, axes: list[Coordinates], design: Design, reml: bool, size: int
) -> Optimum:
    """Optima of at most `size` lanes."""
    count = len(starts)
    padded = np.resize(np.arange(count), size)  # repeats
    x = starts[padded]
    lanes = jax.tree.map(lambda *leaves: np.stack(leaves), *[axes[k] for k in padded])
    together = size > 1
    if not together:
        x, lanes = jax.tree.map(lambda leaf: leaf[0], (x, lanes))
    with neutral():
        leaves, structure = jax.tree.flatten((x, lanes, design))
        shapes = tuple((np.shape(leaf), leaf.dtype.name) for leaf in leaves)
        climb, look = _programs(structure, shapes, reml, together)
        trace = climb(x, lanes, design)
        looked = look(trace.at, lanes, design)
        result = jax.device_get((trace.at, trace.point, trace.converged, looked))
    if not together:
        result = jax.tree.map(lambda leaf: np.asarray(leaf)[None], result)
    x, point, converged, (value, gradient, beta) = jax.tree.map(lambda leaf: leaf[:count], result)
    norm = np.linalg.norm(gradient * np.array([own.free for own in axes]), axis=1)
    with np.errstate(invalid="ignore"):
        certified = converged & is_certified(point.value, value, norm)
    return Optimum(x, value, gradient, point.full, beta, certified)
