"""The parameters that people read, each with coordinates in which it is an axis of its own.

Names and order are those of lme4's ``confint(fit, oldNames=FALSE)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxreml import covariance
from jaxreml.estimation import START
from jaxreml.inference.constrained import Coordinates, triangle
from jaxreml.results import RESIDUAL

if TYPE_CHECKING:
    from jaxreml.results import LMMResults

ROUNDING = 1e-6  # a relative SD below this changes no digit of the criterion


class Values(NamedTuple):
    """Variance parameters as matrices, relative to the fit's sigma and in scaled effects.

    Attributes:
        roots: per term (q, q), any square root of the covariance matrix.
        log_sigma: logarithm of the residual SD.
    """

    roots: tuple[np.ndarray, ...]
    log_sigma: float


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter that can be held.

    Attributes:
        name: lme4's, such as ``sd_(Intercept)|g``, ``cor_x.(Intercept)|g``, ``sigma``.
        group, term: grouping factor and effect(s); None and the column's name for fixed effects.
        kind: "sd", "cor", "sigma" or "fixed".
        orders: per term the order of its effects in the coordinates, the parameter's own first.
        place: of an SD or correlation its term's place, else -1.
        axes: coordinates in which it is held.
        axis: the entry of x that it is.
        scale, shift: the value is scale * x (SD), cos x, scale * exp(x) (sigma), shift + scale * x
            (fixed effects).
    """

    name: str
    group: str | None
    term: str
    kind: str
    orders: tuple[tuple[int, ...], ...]
    place: int
    axes: Coordinates
    axis: int
    scale: float = 1.0
    shift: float = 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the axis."""
        if self.kind == "sd":
            return 0.0, math.inf
        if self.kind == "cor":  # the cosine rises from -1 to 1 between
            return -math.pi, 0.0
        return -math.inf, math.inf

    def value(self, at: float) -> float:
        """The parameter in the user's units at a value of the axis."""
        if self.kind == "cor":
            return math.cos(at)
        return self.shift + self.scale * (math.exp(at) if self.kind == "sigma" else at)

    def x(self, values: Values, beta: np.ndarray, floor: float = 0.0) -> np.ndarray:
        """Coordinates (m + 2,), with entries on diagonals of at least `floor`."""
        parts = []
        for k, (root, order) in enumerate(zip(values.roots, self.orders, strict=True)):
            upper = np.linalg.qr(root[list(order)].T, mode="r")
            lower = (np.where(np.diagonal(upper) < 0, -1.0, 1.0)[:, None] * upper).T
            np.fill_diagonal(lower, np.maximum(np.diagonal(lower), floor))
            if k == self.place and self.kind == "cor":
                length = np.hypot(lower[1, 0], lower[1, 1])
                defined = lower[0, 0] > 0 and length > 0
                angle = (
                    -math.acos(np.clip(lower[1, 0] / length, -1, 1)) if defined else -math.pi / 2
                )
                lower[0, 0] = math.sqrt(lower[0, 0])
                lower[1, :2] = math.sqrt(length), angle
            parts.append(lower[covariance.triangle(len(root))])
        moved = 0.0
        if self.kind == "fixed":
            moved = (beta[-1 - self.place] - self.shift) / self.scale
        return np.concatenate([*parts, [values.log_sigma, moved]])

    def values(self, x: np.ndarray) -> Values:
        """The variance parameters at x (m + 2,)."""
        m = len(self.axes.radius)
        entries = triangle(x[:m], self.axes)
        roots = []
        start = 0
        for order in self.orders:
            q = len(order)
            rows, columns = covariance.triangle(q)
            lower = np.zeros((q, q))
            lower[rows, columns] = entries[start : start + rows.size]
            roots.append(lower[np.argsort(order)])
            start += rows.size
        return Values(tuple(roots), float(x[m]))


def parameters(fit: LMMResults) -> list[Parameter]:
    """All parameters of a fit: SDs and correlations term by term, sigma, fixed effects."""
    builder = _Builder(fit)
    found = []
    for k, grouping in enumerate(fit.groupings):
        effects = grouping.effects
        for j in range(len(effects)):
            found.append(builder.sd(k, j))
            found += [builder.correlation(k, i, j) for i in range(j + 1, len(effects))]
    return [*found, builder.sigma(), *(builder.fixed(j) for j in range(len(fit.beta)))]


def estimates(fit: LMMResults) -> Values:
    """The variance parameters of a fit."""
    factors = []
    start = 0
    for scale in fit.design.scales:
        q = len(scale)
        rows, columns = covariance.triangle(q)
        factor = np.zeros((q, q))
        factor[rows, columns] = fit.theta[start : start + rows.size]
        factors.append(factor * np.asarray(scale)[:, None])
        start += rows.size
    return Values(tuple(factors), 0.0)


def readings(values: Values, fit: LMMResults) -> list[float]:
    """SDs, correlations and sigma in the user's units, in the order of `parameters`."""
    found = []
    for root, scale in zip(values.roots, fit.design.scales, strict=True):
        sd = np.linalg.norm(root, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = root / sd[:, None]
        for j in range(len(root)):
            found.append(fit.sigma * sd[j] / float(scale[j]))
            found += [float(unit[i] @ unit[j]) for i in range(j + 1, len(root))]
    return [*found, fit.sigma * math.exp(values.log_sigma)]


def without_rounding(root: np.ndarray) -> np.ndarray:
    """A root (q, q) with zeros for effects whose SD is rounding error."""
    return np.where(np.linalg.norm(root, axis=1, keepdims=True) < ROUNDING, 0.0, root)


def other_values(values: Values, count: int) -> list[Values]:
    """Values with SDs of the same order and any correlations; the same at every call."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        roots = []
        for root in values.roots:
            directions = rng.normal(size=root.shape)
            sd = np.maximum(np.linalg.norm(root, axis=1, keepdims=True), START)
            sd = sd * np.exp(rng.normal(size=sd.shape) / 2)
            roots.append(sd * directions / np.linalg.norm(directions, axis=1, keepdims=True))
        found.append(values._replace(roots=tuple(roots)))
    return found


class _Builder:
    """Makes the parameters of a fit."""

    def __init__(self, fit: LMMResults):
        self.fit = fit
        self.sizes = tuple(len(grouping.effects) for grouping in fit.groupings)
        self.starts = np.cumsum([0, *(q * (q + 1) // 2 for q in self.sizes)])
        self.orders = tuple(tuple(range(q)) for q in self.sizes)

    def sd(self, k: int, j: int) -> Parameter:
        group, term = self.fit.groupings[k].name, self.fit.groupings[k].effects[j]
        scale = self.fit.sigma / float(self.fit.design.scales[k][j])
        orders, order = self._first(k, j)
        axis = self.starts[k]
        axes = self._axes(order=order, held=axis)
        return Parameter(f"sd_{term}|{group}", group, term, "sd", orders, k, axes, axis, scale)

    def correlation(self, k: int, i: int, j: int) -> Parameter:
        grouping = self.fit.groupings[k]
        group, term = grouping.name, f"{grouping.effects[i]}.{grouping.effects[j]}"
        orders, order = self._first(k, j, i)
        start, q = self.starts[k], self.sizes[k]
        axis = start + q
        axes = self._axes(order=order, held=axis, polar=(start, start + 1, axis))
        return Parameter(f"cor_{term}|{group}", group, term, "cor", orders, k, axes, axis)

    def sigma(self) -> Parameter:
        axis = int(self.starts[-1])
        axes = self._axes(held=axis)
        return Parameter(
            "sigma", RESIDUAL, RESIDUAL, "sigma", self.orders, -1, axes, axis, self.fit.sigma
        )

    def fixed(self, j: int) -> Parameter:
        """With X = U R, X without column j spans U Q for an orthonormal Q; x_j has c in the
        direction U q that this leaves, and y - b x_j what y has in it less b c."""
        design, p = self.fit.design, self.fit.design.p
        basis = np.asarray(design.basis)
        directions, _ = np.linalg.qr(np.delete(basis, j, axis=1), mode="complete")
        left = directions[:, -1]
        step = float(self.fit.bse.iloc[j])
        columns = np.zeros((p + 1, p + 1))
        columns[:p, : p - 1] = directions[:, :-1]
        columns[p, p] = 1.0
        axes = self._axes()._replace(
            columns=columns,
            shift=-step * (left @ basis[:, j]) * left,
            absent=np.eye(p + 1)[p - 1],
        )
        name, axis = self.fit.fixed_names[j], int(self.starts[-1]) + 1
        shift = float(np.asarray(design.beta_ols)[j])
        return Parameter(name, None, name, "fixed", self.orders, -1 - j, axes, axis, step, shift)

    def _first(self, k: int, *effects: int) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
        """Orders of effects with some first, and the permutation of omega's entries."""
        q = self.sizes[k]
        own = (*effects, *(e for e in range(q) if e not in effects))
        orders = (*self.orders[:k], own, *self.orders[k + 1 :])
        place = np.argsort(own)
        rows, columns = covariance.triangle(q)
        where = np.arange(self.starts[-1])
        inside = covariance.places(q)[place[rows], place[columns]]
        where[self.starts[k] : self.starts[k + 1]] = self.starts[k] + inside
        return orders, np.eye(where.size)[where]

    def _axes(
        self,
        *,
        order: np.ndarray | None = None,
        held: int | None = None,
        polar: tuple[int, int, int] | None = None,
    ) -> Coordinates:
        m, p = int(self.starts[-1]), self.fit.design.p
        first, radius, angle = np.zeros(m), np.zeros(m), np.zeros(m)
        on_diagonal = [np.equal(*covariance.triangle(q)) for q in self.sizes]
        pivots = np.append(np.concatenate(on_diagonal), [0.0, 0.0])
        if polar is not None:
            first[polar[0]], radius[polar[1]], angle[polar[2]] = 1.0, 1.0, 1.0
            pivots[polar[1]], pivots[polar[2]] = 1.0, 0.0
        free = np.ones(m + 2)
        free[-1] = 0.0
        if held is not None:
            free[held] = 0.0
        return Coordinates(
            order=np.eye(m) if order is None else order,
            first=first,
            radius=radius,
            angle=angle,
            pivots=pivots * free,
            free=free,
            columns=np.eye(p + 1),
            shift=np.zeros(p),
            absent=np.zeros(p + 1),
            log_unit=math.log(self.fit.sigma),
        )
