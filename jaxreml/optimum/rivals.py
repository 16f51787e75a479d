r"""Other optima: where to look for them, and when there can be none.

With unequal groups the criterion can have several minima; a search finds one. In 16,000 small
unbalanced designs with normal and heavy-tailed responses (one or two variances, one or two factors)
the search from moment estimates alone ended in 0.1 to 0.9% of them above the lowest of 20 random
starts, and the searches from `starts` beside it in none.

1. `best_of` searches from `starts` too, on the host until it is seen that a search leads to the
   optimum that is known (`Basin`). Where a search is expensive it compares the optimum with
   each variance at zero instead, and goes on from there if that is lower.
2. With one variance ratio, `is_global` proves that there is nothing lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import chosen, namespace, on_host
from jaxreml.backend.lazy import jax, jnp
from jaxreml.model import linalg
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.design import Design
from jaxreml.model.objective import degrees_of_freedom
from jaxreml.model.structures import Grouped
from jaxreml.optimum.newton import Trace

Array = Any  # NumPy's or JAX's
SMALL, LARGE, HUGE = 0.3, 10.0, 30.0  # relative SDs of scaled effects to start from
CHEAP = 2**17  # numbers in a structure up to which every rival start is searched from
NEAR = 0.5  # of the criterion: above an optimum by less, a search may be in its basin
AGREES = 0.2  # share of that by which the quadratic model may be off there
LOWER = 1.5e-8  # of a criterion: another is below it by more
SAME = 1e-9  # relative differences that are none
ROUNDS = 40  # of halving in `is_global`
MOST_RATIOS = 5000  # that it looks at
MOST_PRODUCTS = 10**5  # numbers, of the levels' cross-products, that it works with


@lru_cache
def starts(covariance: Covariance) -> np.ndarray:
    """Points of the chart to search from besides the moment estimates: at most (k + 2, r)
    for k > 1 effects, else (2, r).

    All relative SDs zero; all huge; and each one large with the others small, which are fewer
    points where effects share a variance. Residuals are not correlated there.
    """
    random = np.flatnonzero(covariance.random)
    k = sum(covariance.sizes)
    sds = [np.zeros(k)]
    if random.size:
        sds.append(np.full(k, HUGE))
    if random.size > 1:
        sds += [np.where(np.arange(k) == own, LARGE, SMALL) for own in random]
    points = np.array([covariance.uncorrelated(sd) for sd in sds])
    return points[np.sort(np.unique(points, axis=0, return_index=True)[1])]


def is_lower(value: Any, other: Any) -> Any:
    """Whether a criterion is below another by more than rounding."""
    xp = namespace(value, other)
    margin = linalg.negligible(LOWER, np.asarray(value).dtype if xp is np else value.dtype, 16)
    return value + margin * (1 + xp.abs(value)) < other


def best_of(
    search: Callable[..., Trace],
    criterion: Callable[[Array], Array],
    start: Array,
    covariance: Covariance,
    max_iterations: int,
    *,
    cheap: bool,
    proved: Callable[[Trace], bool],
) -> tuple[Trace, bool]:
    """The lowest optimum that searches from `start` and its rivals lead to, and if it is `proved`.

    The searches are one loop around one program, so that rivals cost no compilation.

    Args:
        search: from a root (r,), with at most so many expansions; on the host with `ends` as in
            `newton.minimise`.
        criterion: at a root.
        start: (r,), the first; a rival's optimum must be lower by more than rounding.
        covariance: of the chart.
        max_iterations: of each search.
        cheap: whether to search from all `starts`, or from the lowest of the `faces` of the optimum
            if it is below it.
        proved: whether there can be none lower than what a search found; asked on the host only.
    """
    points: Any = starts(covariance).astype(start.dtype)
    if on_host(start):
        return _best_in_turn(
            search, criterion, start, points, covariance, max_iterations, cheap, proved
        )
    rivals, limit = linalg.alike((jnp.asarray(points), jnp.asarray(max_iterations)), start)

    def following(k: Array, best: Trace) -> tuple[Array, Array]:
        if cheap:
            return rivals[jnp.minimum(k, len(rivals) - 1)], limit
        nearby = best.at * covariance.faces.astype(start.dtype)
        values = jax.lax.map(criterion, nearby)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        lowest = jnp.argmin(values)
        lower = best.converged & is_lower(values[lowest], best.point.value)
        return nearby[lowest], jnp.where(lower, limit, 0)

    def look(state: tuple[Trace, Array, Array], k: Array) -> tuple[Any, None]:
        best, root, limit = state
        found = search(root, limit)
        better = (k == 0) | (found.converged & is_lower(found.point.value, best.point.value))
        best = chosen(better, found, best)
        return (best, *following(k, best)), None

    shapes = jax.eval_shape(search, start, limit)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    rounds = 1 + (len(rivals) if cheap else 1)
    first = (linalg.alike(nothing, start), start, limit)
    (best, _, _), _ = jax.lax.scan(look, first, jnp.arange(rounds))
    return best, False


def _best_in_turn(
    search: Callable[..., Trace],
    criterion: Callable[[Array], Array],
    start: np.ndarray,
    points: Any,
    covariance: Covariance,
    max_iterations: int,
    cheap: bool,
    proved: Callable[[Trace], bool],
) -> tuple[Trace, bool]:
    """`best_of` on the host."""
    best = first = search(start, max_iterations)
    if best.converged and proved(best):
        return best, True
    if not cheap:
        nearby = best.at * covariance.faces
        values = np.array([criterion(point) for point in nearby])
        lowest = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
        lower = best.converged and is_lower(values[lowest], best.point.value)
        points = nearby[lowest : lowest + 1] if lower else points[:0]
    for point in points:
        ends = Basin.of(best, covariance).holds if best.converged else None
        found = search(point, max_iterations, ends=ends)
        if found.converged and is_lower(found.point.value, best.point.value):
            best = found
    return best, best is not first and proved(best)


class Basin(NamedTuple):
    """What is known of the criterion around an optimum.

    A search that comes near in value, by about what the quadratic model there says of the place,
    is on its way to the same optimum.

    Attributes:
        covariance: of the chart.
        omega: (m,), the optimum.
        value, gradient, hessian: of the criterion there, in omega. The gradient is not zero on the
            boundary.
    """

    covariance: Covariance
    omega: Array
    value: float
    gradient: Array
    hessian: Array

    @staticmethod
    def of(optimum: Trace, covariance: Covariance) -> Basin:
        """Of an optimum on the host."""
        around = optimum.point.expansion
        omega = covariance.omega(optimum.at)
        return Basin(covariance, omega, around.value, around.gradient, around.hessian)

    def holds(self, root: Array, point: Any) -> bool:
        """Whether a point of the chart is in it."""
        excess = point.value - self.value
        if not 0 <= excess < NEAR:
            return False
        away = self.covariance.omega(root) - self.omega
        foretold = self.gradient @ away + away @ self.hessian @ away / 2
        return bool(abs(foretold - excess) <= AGREES * excess)


def optimality(design: Design, proved: bool) -> str:
    """How it is known that an optimum is the lowest, in words; `proved` as `is_proved` says."""
    if proved:
        return "proved to be the lowest"
    if is_cheap(design):
        return f"the lowest of {1 + len(starts(design.covariance))} searches"
    return "not lower with a variance at zero"


def is_proved(design: Design, omega: np.ndarray, *, reml: bool) -> bool:
    """Whether there can be no optimum lower than that at `omega`, (m,), by `has_one_optimum` or
    `is_global`. On the host."""
    structure = design.structure
    if not isinstance(structure, Grouped):
        return False
    if has_one_optimum(structure, design.covariance, design.p):
        return True
    if design.covariance != unstructured((1,)):
        return False
    degrees = float(degrees_of_freedom(design, reml=reml))
    return is_global(structure, degrees, float(omega[0]), reml=reml)


def has_one_optimum(structure: Any, covariance: Covariance, p: int) -> bool:
    """Whether every response has one optimum. On the host.

    With q unrestricted effects on one factor, the same regular F in all levels, and the same scores
    A of X, which span them, the fixed effects are least squares whatever the covariance. The
    criterion is that of a Wishart matrix with covariance sigma2 (I + F Omega F') and a chi-squared
    one with sigma2: convex in their precisions K and k, as is the restriction K <= k I.

    Args:
        structure: a `Structure`, of X with or without a response.
        covariance: of the effects.
        p: number of fixed effects, whose columns come first.
    """
    sizes = covariance.sizes
    if not isinstance(structure, Grouped) or covariance != unstructured(sizes) or len(sizes) > 1:
        return False
    factors, scores = np.asarray(structure.factors), np.asarray(structure.scores)
    used = np.any(factors != 0, axis=(0, 1))  # levels with rows
    factors, scores = factors[:, :, used], scores[:, :p, used]
    size = np.abs(factors).max()
    equal = np.ptp(factors, axis=2).max() <= SAME * size
    regular = np.diagonal(factors).min() > SAME * size
    first = scores[:, :, 0]  # J A A' = I, as X is orthonormal: A spans, apart from the rest of X
    spans = np.abs(factors.shape[2] * first @ first.T - np.eye(len(first))).max() < 1e-9
    same = np.ptp(scores, axis=2).max(initial=0.0) <= SAME
    return bool(equal and regular and spans and same)


def is_cheap(design: Design) -> bool:
    """Whether `estimate` searches from all rival starts."""
    return design.numbers <= CHEAP and not design.structure.costly


def is_global(structure: Any, degrees: float, omega: float, *, reml: bool) -> bool:
    r"""Whether no variance ratio has a lower criterion than `omega`, proved by bounds.

    The profiled criterion in one ratio is A + degrees log D. A, the log-determinants, is concave,
    a sum of log(1 + omega lambda); log D, of the residual sum of squares, is convex, as D is a
    mixture of 1 / (1 + omega lambda), which is log-convex, over the eigenvalues lambda of Z'RZ. So
    between two ratios A is above its chord and log D above the continued chords of the intervals
    beside; where that is not enough, intervals are halved.

    Args:
        structure: a `Grouped` of one effect, on the host.
        degrees: of freedom of the residual variance.
        omega: the ratio found.
        reml: the criterion.
    """
    squares, same, counts = np.unique(
        np.asarray(structure.factors)[0, 0] ** 2, return_inverse=True, return_counts=True
    )
    scores = np.asarray(structure.scores)[0].T
    remainder = np.asarray(structure.remainder)
    k = len(remainder)
    if not remainder[-1, -1] > 0 or squares.size * k * k > MOST_PRODUCTS:
        return False
    products = np.zeros((squares.size, k, k))
    np.add.at(products, same, scores[:, :, None] * scores[:, None])
    unit = 1 / squares.max()

    def parts(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A and degrees log D."""
        spread = 1 + ratios[:, None] * squares
        gram = remainder + np.tensordot(1 / spread, products, axes=1)
        logs = 2 * np.log(np.diagonal(np.linalg.cholesky(gram), axis1=1, axis2=2))
        return np.log(spread) @ counts + reml * logs[:, :-1].sum(axis=1), degrees * logs[:, -1]

    least = np.linalg.lstsq(remainder[:-1, :-1], remainder[:-1, -1])[0]
    limit = remainder[-1, -1] - remainder[:-1, -1] @ least  # of D at infinity
    if not limit > 1e-10 * remainder[-1, -1]:
        return False
    ratios = np.concatenate([[0.0], unit * np.geomspace(1e-6, 1e12, 109), [omega]])
    ratios = np.unique(ratios)
    for _ in range(ROUNDS):
        try:
            concave, convex = parts(ratios)
        except np.linalg.LinAlgError:
            return False
        found = (concave + convex)[np.searchsorted(ratios, omega)]
        # Beyond the last ratio A grows and D has its limit.
        end = concave + degrees * math.log(limit)
        most = int(np.argmax(~is_lower(end, found)))
        if is_lower(end[most], found):
            return False
        lower = is_lower(_lower_bounds(ratios, concave, convex)[:most], found)
        if not lower.any():
            return True
        if is_lower(concave + convex, found).any() or ratios.size > MOST_RATIOS:
            return False
        left, right = ratios[:-1][:most][lower], ratios[1:][:most][lower]
        ratios = np.unique(np.concatenate([ratios, (left + right) / 2]))
    return False


def _lower_bounds(x: np.ndarray, concave: np.ndarray, convex: np.ndarray) -> np.ndarray:
    """Lower bounds of concave + convex between neighbours of x (k,), (k - 1,)."""
    slopes = np.diff(convex) / np.diff(x)
    rise = np.diff(concave) / np.diff(x)
    width = np.diff(x)
    left, right = concave[:-1] + convex[:-1], concave[1:] + convex[1:]
    # Bounds that start at the left and at the right end; where they cross, theirs is lowest.
    ahead = rise + np.append(np.nan, slopes[:-1])
    back = rise + np.append(slopes[1:], np.nan)
    inside = left + ahead * (right - left - back * width) / (ahead - back)
    lowest = np.where((ahead < 0) & (back > 0), inside, np.inf)
    lowest[0] = right[0] - back[0] * width[0]
    lowest[-1] = left[-1] + ahead[-1] * width[-1]
    return np.minimum(lowest, np.minimum(left, right))
