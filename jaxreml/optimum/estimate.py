"""`estimate`: the optimum of a design's criterion, as a pure function of the design."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.arguments import is_reml
from jaxreml.backend.runtime import usual_promotion
from jaxreml.model import linalg
from jaxreml.model.basis import perfect_share
from jaxreml.model.covariance import unstructured
from jaxreml.model.design import Design, require_precision
from jaxreml.model.objective import Expansion, degrees_of_freedom, expand, profiled
from jaxreml.optimum import newton
from jaxreml.optimum.rivals import best_of, is_cheap
from jaxreml.status import Status as Status

START = 0.1  # least relative SD to start from: zero is a stationary point
ZERO = 1e-4  # a relative SD below this, in units of scaled effects, is tried as exactly zero
LOG_ZERO = -100.0  # stands for log 0 in derivatives, which vanish there
FAR = 20.0  # stands for arctanh(+-1) likewise
NEARLY_PERFECT = 1e-10  # likewise, where the search did not converge


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """The optimum and what follows from it: a pytree of arrays, m variance parameters.

    Attributes:
        theta: (m,), relative Cholesky factors column by column, as lme4's.
        parameters: (m + 1,), log-variances and correlation coordinates in the order of
            ``design.parameter_names``; -inf for a variance of zero, +-inf for a correlation of
            +-1, NaN for a correlation that a zero variance leaves undefined.
        parameters_vcov: (m + 1, m + 1), asymptotic covariance 2 H^-1 of `parameters` given those
            on a boundary, whose rows are NaN; all NaN if the Hessian is not positive definite.
        log_variances: the log-variances among `parameters`, one per effect, the residual's last.
        log_variance_se: their standard errors.
        beta: (p,), fixed effects; NaN, as in what follows, for a column of a traced X that depends
            on those before it.
        vcov: (p, p), sigma2 (X' V0^-1 X)^-1, their covariance.
        vcov_slopes: (m + 1, p, p), derivatives of `vcov` in `parameters`, zero for those on a
            boundary: what Satterthwaite's degrees of freedom are made of.
        sigma: (), residual standard deviation.
        criterion: (), -2 log (restricted) likelihood at the optimum.
        hessian: (m + 1, m + 1), of the criterion in `parameters`; NaN as in `parameters_vcov`.
        iterations: (), expansions of the criterion computed.
        gradient_norm: (), Euclidean norm of the gradient in the root (scaled effects).
        inertia: (3,), negative, zero and positive eigenvalues of the Hessian in theta.
        is_singular: (), whether a variance is zero or a correlation matrix has lost rank.
        status: (), a `Status`. Other than CONVERGED: do not use the numbers. The derivatives of
            all of them are zero there.
    """

    theta: Array
    parameters: Array
    parameters_vcov: Array
    log_variances: Array
    log_variance_se: Array
    beta: Array
    vcov: Array
    vcov_slopes: Array
    sigma: Array
    criterion: Array
    hessian: Array
    iterations: Array
    gradient_norm: Array
    inertia: Array
    is_singular: Array
    status: Array

    @property
    def params(self) -> Array:
        """`parameters`, by its former name."""
        return self.parameters


def estimate(
    design: Design, method: str = "REML", *, max_iterations: int = 100, tolerance: float = 1e-12
) -> Estimate:
    """Fit a design by REML or ML.

    Pure: `jit`, `vmap` over stacked designs (`jaxreml.stack`), and derivatives to any order
    with respect to the design, by the implicit function theorem at the optimum; they are zero where
    `status` is not CONVERGED, so that such a lane of a `vmap`, masked by its status, adds nothing
    to a derivative in what lanes share. Fixed effects and
    residual variance are profiled out; the rest is a safeguarded Newton iteration with exact
    derivatives on square roots of the relative covariance matrices, which have no bounds: the
    criterion is even in each of their columns, and the Cholesky factor is taken at the end. As
    there can be several optima, it starts from moment estimates and from k + 2 other places for k
    effects in all (`rivals.starts`), and takes the lowest; with more than 130,000 cross-products it
    compares the optimum with variances at zero only.

    Args:
        design: the data.
        method: "REML" or "ML".
        max_iterations: evaluations of the criterion with its derivatives.
        tolerance: of the Newton decrement, how far the criterion may be above its minimum.

    Returns:
        The estimate. Look at `status` before using it: nothing is raised on numerical trouble.

    Raises:
        ValueError: another method.
        PrecisionError: a float64 design with JAX set to float32.
        RuntimeError: in a process that was forked after JAX had run, as `fit`.
    """
    reml = is_reml(method)
    require_precision(design)
    if design.dtype == "float32":
        tolerance = max(tolerance, 1e-5)
    return _estimate(design.without_names(), reml, max_iterations, tolerance)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _estimate(design: Design, reml: bool, max_iterations: int, tolerance: float) -> Estimate:
    with usual_promotion():
        fixed = jax.lax.stop_gradient(design)
        sizes = design.sizes
        trace = best_of(
            lambda root, limit: search(fixed, root, reml, tolerance, limit),
            lambda root: profiled(unstructured.omega_from_root(root, sizes), fixed, reml=reml),
            start_root(fixed, reml),
            sizes,
            max_iterations,
            cheap=is_cheap(design),
        )
        trace = jax.lax.stop_gradient(trace)
        status = outcome(trace.at, trace.point, trace, fixed)
        is_optimum = status == Status.CONVERGED
        design = _still_unless(is_optimum, design)
        root, point = _optimum(reml, design, trace.at, trace.point)
        return _still_unless(is_optimum, report(root, point, trace, design, status))


def _still_unless(condition: Array, tree: Any) -> Any:
    """The same numbers, with derivatives of zero unless the condition (a scalar) holds.

    Nothing on the way between two of these matters where it does not hold, NaN neither: a zero
    times NaN is left out by both, forwards by the second and backwards by the first.
    """
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jax.lax.stop_gradient(leaf)), tree)


class Point(NamedTuple):
    """The profiled criterion around one root (scaled effects).

    Attributes:
        value, gradient, hessian: in the root, of length r: (), (r,) and (r, r).
        expansion: the same in omega, and what it was made from.
    """

    value: Array
    gradient: Array
    hessian: Array
    expansion: Any


@partial(jax.jit, static_argnames="reml")  # traced once for all its uses in a program
def expand_root(root: Array, design: Design, *, reml: bool, exact: Array | bool = True) -> Point:
    """The profiled criterion with its derivatives in the root; `exact` as in `expand`."""
    omega = unstructured.omega_from_root(root, design.sizes)
    expansion = expand(omega, design, reml=reml, exact=exact)
    return Point(expansion.value, *_chain(root, design.sizes, expansion), expansion)


def _chain(root: Array, sizes: unstructured.Sizes, expansion: Expansion) -> tuple[Array, Array]:
    """Gradient and Hessian in the root, by the chain rule."""
    jacobian = unstructured.root_jacobian(root, sizes)
    curvature = unstructured.root_curvature(expansion.gradient, sizes)
    gradient = linalg.matmul(curvature, root[:, None])[:, 0]
    inner = linalg.matmul(expansion.hessian, jacobian)
    hessian = linalg.matmul(linalg.transpose(jacobian), inner) + curvature
    return gradient, (hessian + linalg.transpose(hessian)) / 2


def _triangles(root: Array, sizes: unstructured.Sizes, zero: float) -> tuple[Array, ...]:
    """Lower-triangular factors of a root's covariances, pivots of at most `zero` set to zero.

    In a row with a pivot of zero, rounding errors are zeros: they would pass for a correlation, or
    for what a correlation of +-1 leaves.
    """
    factors = []
    start = 0
    for q in sizes:
        square = root[start : start + q * q].reshape(q, q, *root.shape[1:])
        factor = unstructured.lower_factor(square, zero)
        error = _rounding(root) ** 2 * jnp.maximum(jnp.sum(square**2, axis=1), 1.0)
        kept = (linalg.diagonal(factor) > 0)[:, None] | (factor**2 > error[:, None])
        factors.append(jnp.where(kept, factor, 0.0))
        start += q * q
    return tuple(factors)


def _kept_triangles(root: Array, sizes: unstructured.Sizes) -> tuple[Array, ...]:
    """Lower-triangular factors; what is set to zero is rounding error of a pivot set to zero."""
    return _triangles(root, sizes, _rounding(root))


def _rounding(root: Array) -> float:
    """Relative SD that rounding leaves of zero."""
    return math.sqrt(50 * jnp.finfo(root.dtype).eps)


def start_root(design: Design, reml: bool) -> Array:
    """Roots to start from: the structure's moment estimates, or else `minimum_norm` ones.

    Variances that come out too small start from START squared.

    Returns:
        (r,), or (r, lanes) for a batch whose lanes share everything but the response.
    """
    relative = design.structure.start()
    if relative is None:
        relative = minimum_norm(design, reml)
    roots = []
    k = 0
    for q in design.sizes:
        rows, columns = unstructured.triangle(q)
        entry = {pair: relative[k + s] for s, pair in enumerate(zip(rows, columns, strict=True))}
        roots += _floored_root(entry, q)
        k += rows.size
    return jnp.stack(roots)


def minimum_norm(design: Design, reml: bool) -> Array:
    """Minimum norm quadratic estimates of omega (Rao 1971, J. Multivariate Analysis 1:445), which
    are the REML estimates where the design is balanced; (m,) or (m, lanes).

    With q_i = y'P V_i P y and T_ij = tr(P V_i P V_j) at Omega = I, V_0 = I: T s = q for
    s = (sigma2 omega, sigma2). Everything follows from the derivatives of the criterion, as V is
    linear: q_i = -d_i rss, T_ij = -d_ij (log|V| + log|M|), and what belongs to V_0 from
    V = V_0 + sum omega_i V_i.
    """
    sizes, p = design.sizes, design.p
    lanes = design.residual_ss.ndim
    at = np.concatenate([np.equal(*unstructured.triangle(q)) for q in sizes]).astype(design.dtype)
    omega = jnp.asarray(at.reshape(-1, *[1] * lanes))
    # T belongs to the design: one lane, without the response, whose part has no degrees of freedom.
    blank = design.blank()
    degrees = degrees_of_freedom(blank, reml=reml)
    expansion = expand(omega, replace(blank, n=blank.n - degrees), reml=reml)
    traces = -expansion.hessian.reshape(at.size, at.size)
    slope = expansion.gradient.reshape(-1)
    mixed = slope - traces @ at
    corner = jnp.reshape(degrees, ()) - at @ slope - at @ mixed
    traces = jnp.block([[traces, mixed[:, None]], [mixed[None], corner]])

    expansion = expand(omega, design, reml=reml)
    rss = expansion.gram_factor[p, p] ** 2
    forms = -expansion.gram_slopes[:, p, p] * rss
    forms = jnp.concatenate([forms, (rss - jnp.sum(omega * forms, axis=0))[None]])
    solution = newton.solve_flat(traces, forms)  # confounded terms share what is theirs
    sigma2 = jnp.maximum(solution[-1], 0.1 * rss / degrees)
    return solution[:-1] / sigma2


def _floored_root(entry: dict[tuple[int, int], Array], q: int) -> list[Array]:
    """Lower-triangular root of nearly a covariance matrix, row by row; pivots at least START."""
    factor: dict[tuple[int, int], Array] = {}
    zero = jnp.zeros_like(entry[0, 0])
    for k in range(q):
        pivot = entry[k, k] - sum((factor[k, j] ** 2 for j in range(k)), zero)
        factor[k, k] = jnp.sqrt(jnp.maximum(pivot, START**2))
        for i in range(k + 1, q):
            rest = entry[i, k] - sum((factor[i, j] * factor[k, j] for j in range(k)), zero)
            bound = jnp.sqrt(jnp.maximum(entry[i, i], START**2))
            factor[i, k] = jnp.clip(rest / factor[k, k], -bound, bound)
    return [factor.get((i, k), zero) for i in range(q) for k in range(q)]


def search(
    design: Design,
    start: Array,
    reml: bool,
    tolerance: float,
    max_iterations: int | Array,
    *,
    radius: Array | None = None,
    careful: bool = False,
) -> newton.Trace:
    """The optimum of the profiled criterion in the root; also for a batch on the last axis.

    A batch comes without the `Expansion`, which would be much to carry from step to step, and as
    `newton.minimise` says: not polished, and off saddle points only if `careful`.
    """
    lanes = start.ndim > 1
    sizes = design.sizes

    def at(root: Array, exact: Array | bool = True) -> Point:
        point = expand_root(root, design, reml=reml, exact=exact)
        return point._replace(expansion=()) if lanes else point

    return newton.minimise(
        at,
        start,
        partial(snap, sizes=sizes),
        tolerance=tolerance,
        max_iterations=max_iterations,
        flat=partial(unstructured.rotations, sizes=sizes),
        radius=radius,
        careful=careful,
        settled=partial(is_settled, sizes=sizes) if design.structure.costly else None,
    )


def snap(root: Array, sizes: unstructured.Sizes) -> Array:
    """The triangular root of the same covariances, variances next to zero at zero."""
    squares = [f.reshape(-1, *root.shape[1:]) for f in _triangles(root, sizes, ZERO)]
    return jnp.concatenate(squares)


def is_settled(root: Array, sizes: unstructured.Sizes) -> Array:
    """Whether no variance is next to zero without being zero."""
    pairs = zip(_triangles(root, sizes, ZERO), _kept_triangles(root, sizes), strict=True)
    return jnp.all(jnp.stack([jnp.all(zeroed == kept) for zeroed, kept in pairs]))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _optimum(reml: bool, design: Design, root: Array, point: Point) -> tuple[Array, Point]:
    """The optimum found, with the derivatives that it has as a function of the design.

    The gradient stays zero when the design changes, so d root = -H^-1 d gradient, with flat
    directions left where they are: rotations of the root, which do not move omega.
    """
    return root, point


@_optimum.defjvp
@usual_promotion()
def _optimum_jvp(reml, primals, tangents):
    root, point = _optimum(reml, *primals)
    design, design_dot = primals[0], tangents[0]
    at = partial(expand_root, reml=reml)
    _, gradient_dot = jax.jvp(lambda design: at(root, design).gradient, (design,), (design_dot,))
    root_dot = -newton.solve_flat(at(root, design).hessian, gradient_dot)
    _, point_dot = jax.jvp(at, (root, design), (root_dot, design_dot))
    return (root, point), (root_dot, point_dot)


def _congruent(matrix: Array, form: Array) -> Array:
    """matrix' form matrix."""
    return linalg.matmul(linalg.transpose(matrix), linalg.matmul(form, matrix))


def _hessian_theta(scaled: tuple[Array, ...], point: Point, sizes: unstructured.Sizes) -> Array:
    """The Hessian in theta, (m, m), at relative Cholesky factors of scaled effects."""
    root = unstructured.root_from_theta(unstructured.join_triangles(scaled), sizes)
    _, hessian = _chain(root, sizes, point.expansion)
    inside = unstructured.root_of_theta(sizes)
    return hessian[inside][:, inside]


def outcome(root: Array, point: Point, trace: newton.Trace, design: Design) -> Array:
    """The `Status` of what a search found; also for a batch on the last axis."""
    hessian = _hessian_theta(_kept_triangles(root, design.sizes), point, design.sizes)
    status = jnp.where(trace.converged, Status.CONVERGED, Status.MAX_ITERATIONS)
    status = jnp.where(trace.stalled, Status.STALLED, status)
    status = jnp.where(trace.converged & ~newton.is_convex(hessian), Status.SADDLE, status)
    status = jnp.where(jnp.isfinite(point.value), status, Status.NOT_FINITE)
    rss = point.expansion.gram_factor[design.p, design.p] ** 2
    residual_ss, total_ss = design.residual_ss, design.total_ss
    share = perfect_share(design.dtype)
    perfect = ~(rss > share * residual_ss) | ~(residual_ss > share * total_ss)
    # On the way there rounding may stop the search before.
    perfect = perfect | ((status != Status.CONVERGED) & (rss < NEARLY_PERFECT * residual_ss))
    status = jnp.where(perfect & jnp.isfinite(total_ss), Status.PERFECT_FIT, status)
    # Below the first of these a sum of squares has lost digits; with a total of more than the
    # second, that little is a perfect fit.
    number = jnp.finfo(design.dtype)
    least = float(number.tiny / number.eps)
    underflow = (residual_ss < least) & (total_ss < least / share)
    status = jnp.where(underflow, Status.UNDERFLOW, status)
    return jnp.where(design.trouble > 0, design.trouble, status).astype(jnp.int32)


def report(
    root: Array, point: Point, trace: newton.Trace, design: Design, status: Array
) -> Estimate:
    """Everything that follows from the optimum; also for a batch on the last axis."""
    sizes = design.sizes
    p = design.p
    value, gradient, _, expansion = point
    scaled = _kept_triangles(root, sizes)
    theta = unstructured.join_triangles(scaled)
    hessian_theta = _hessian_theta(scaled, point, sizes)
    sigma2 = jnp.exp(expansion.log_sigma2)

    # Fixed effects: undo the orthonormal basis and the least squares shift of y.
    factor = expansion.gram_factor
    of_x = factor[:p, :p]
    identity = linalg.eye_like(of_x)
    absent = design.absent
    triangle = linalg.transpose(design.basis) + absent * identity
    to_basis = linalg.solve_lower(triangle, identity)  # R^-T
    root_vcov = linalg.transpose(
        linalg.matmul(linalg.solve_lower(of_x, identity), to_basis)
    )  # (L' R)^-1
    beta = design.beta_ols + linalg.matmul(root_vcov, factor[p, :p][:, None])[:, 0]
    vcov = sigma2 * linalg.matmul(root_vcov, linalg.transpose(root_vcov))
    unknown = absent[:, None] | absent

    # Variance parameters, inside and then in the user's units of the effects.
    finite = unstructured.parameters_from_factors(
        scaled, expansion.log_sigma2, zero=LOG_ZERO, limit=FAR
    )
    free, inner = unstructured.boundary(scaled, finite)
    slopes = jnp.concatenate([expansion.gradient, jnp.zeros_like(expansion.gradient[:1])])
    jacobian, hessian = unstructured.hessian_in_parameters(
        finite, slopes, expansion.joint_hessian, sizes
    )
    of_omega = [
        -linalg.matmul(root_vcov, linalg.matmul(slope, linalg.transpose(root_vcov)))
        for slope in (expansion.gram_slopes[i, :p, :p] for i in range(len(theta)))
    ]
    of_all = jnp.stack([*(sigma2 * slope for slope in of_omega), vcov])
    vcov_slopes = jnp.sum((jacobian * free)[:, :, None, None] * of_all[:, None], axis=0)
    both = free[:, None] & free
    identity = linalg.eye_like(hessian)
    # One more: a logarithm whose own entry is rounding error is not known, whatever its sign
    unit = jnp.sqrt(1 + jnp.where(free, linalg.diagonal(hessian), 0.0))
    unit_hessian = jnp.where(both, hessian / (unit[:, None] * unit), identity)
    unit_factor = linalg.cholesky(unit_hessian)
    # The pivot is NaN, and the comparison false, where the factorisation failed.
    regular = jnp.min(linalg.diagonal(unit_factor), axis=0) ** 2 > linalg.FLAT
    inverse = linalg.solve_lower(unit_factor, identity) / unit
    parameters_vcov = 2 * linalg.matmul(linalg.transpose(inverse), inverse)
    factors = design.units.factors(scaled)
    finite = unstructured.parameters_from_factors(
        factors, expansion.log_sigma2, zero=LOG_ZERO, limit=FAR
    )
    theirs, shown = unstructured.boundary(factors, finite)
    if any(design.units.rotated):
        # The gradient vanishes in what is free: derivatives change as tensors do.
        out, back = design.units.jacobians(shown, inner)
        out = jnp.where(theirs[:, None] & free, out, 0.0)
        back = jnp.where(free[:, None] & theirs, back, 0.0)
        parameters_vcov = _congruent(linalg.transpose(out), jnp.where(both, parameters_vcov, 0.0))
        hessian = _congruent(back, jnp.where(both, hessian, 0.0))
        vcov_slopes = jnp.sum(back[:, :, None, None] * vcov_slopes[:, None], axis=0)
    free = theirs
    both = free[:, None] & free
    parameters_vcov = jnp.where(both & regular, parameters_vcov, jnp.nan)
    positions, _ = unstructured.positions(sizes)

    return Estimate(
        theta=unstructured.join_triangles(factors),
        parameters=shown,
        parameters_vcov=parameters_vcov,
        log_variances=shown[positions],
        log_variance_se=jnp.sqrt(linalg.diagonal(parameters_vcov))[positions],
        beta=jnp.where(absent, jnp.nan, beta),
        vcov=jnp.where(unknown, jnp.nan, vcov),
        vcov_slopes=jnp.where(unknown, jnp.nan, vcov_slopes),
        sigma=jnp.sqrt(sigma2),
        criterion=value,
        hessian=jnp.where(both, hessian, jnp.nan),
        iterations=trace.iterations,
        gradient_norm=jnp.sqrt(jnp.sum(gradient**2, axis=0)),
        inertia=newton.inertia(hessian_theta),
        is_singular=~jnp.all(free, axis=0),
        status=status,
    )
