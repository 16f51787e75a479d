"""The parameters that people read, each with coordinates in which it is an axis of its own.

Names and order are those of lme4's ``confint(fit, oldNames=FALSE)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.linalg

from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL, unpack
from jaxreml.model.covariance import natural
from jaxreml.optimum.held import Coordinates, triangle
from jaxreml.optimum.search import START

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

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
class Chart:
    """Coordinates of the variance parameters, in which some that people read are axes.

    Attributes:
        bases: per term (q, q), what each effect is in the inner ones of the design: those first
            that are axes, in the user's units, and then inner ones.
        polar: terms (their places) of which the second row of T is d (cos a, sin a).
        axes: the coordinates in numbers.
    """

    bases: tuple[np.ndarray, ...]
    polar: tuple[int, ...]
    axes: Coordinates

    def x(self, values: Values, floor: float = 0.0) -> np.ndarray:
        """Coordinates (m + 2,), with entries on diagonals of at least `floor`; the last is 0."""
        parts = []
        for k, (root, basis) in enumerate(zip(values.roots, self.bases, strict=True)):
            upper = np.linalg.qr((basis @ root).T, mode="r")
            lower = (np.where(np.diagonal(upper) < 0, -1.0, 1.0)[:, None] * upper).T
            np.fill_diagonal(lower, np.maximum(np.diagonal(lower), floor))
            if k in self.polar:
                length = np.hypot(lower[1, 0], lower[1, 1])
                defined = lower[0, 0] > 0 and length > 0
                angle = -math.atan2(lower[1, 1], lower[1, 0]) if defined else -math.pi / 2
                lower[1, :2] = math.sqrt(length), angle
                lower[0, 0] = math.sqrt(lower[0, 0])
            parts.append(lower[natural.triangle(len(root))])
        return np.concatenate([*parts, [values.log_sigma, 0.0]])

    def values(self, x: np.ndarray) -> Values:
        """The variance parameters at x (m + 2,)."""
        m = len(self.axes.polar)
        lowers = unpack(np.asarray(triangle(x[:m], self.axes)), tuple(map(len, self.bases)))
        roots = (np.linalg.solve(*pair) for pair in zip(self.bases, lowers, strict=True))
        return Values(tuple(roots), float(x[m]))


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter that can be held.

    Attributes:
        name: lme4's, such as ``sd_(Intercept)|g``, ``cor_x.(Intercept)|g``, ``sigma``.
        group, term: grouping factor and effect(s); None and the column's name for fixed effects.
        kind: "sd", "cor", "sigma" or "fixed".
        place: of an SD or correlation its term's place, of a fixed effect its column's; else -1.
        effects: of an SD or correlation, the effects' places in the term.
        chart: coordinates in which it is an axis, and held.
        axis: the entry of x that it is.
        scale, shift: the value is scale * x (SD), cos x, scale * exp(x) (sigma), shift + scale * x
            (fixed effects).
    """

    name: str
    group: str | None
    term: str
    kind: str
    place: int
    effects: tuple[int, ...]
    chart: Chart
    axis: int
    scale: float = 1.0
    shift: float = 0.0

    @property
    def axes(self) -> Coordinates:
        """Those of `chart` in numbers."""
        return self.chart.axes

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
        x = self.chart.x(values, floor)
        if self.kind == "fixed":
            x[-1] = (beta[self.place] - self.shift) / self.scale
        return x

    def values(self, x: np.ndarray) -> Values:
        """The variance parameters at x (m + 2,)."""
        return self.chart.values(x)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two parameters that can be held at once.

    Attributes:
        parameters: the two.
        chart: coordinates in which both are held.
        entries: where they are in x; fixed effects share the last one.
        shifts: (2, p), what the response gains per unit of each parameter's axis.
    """

    parameters: tuple[Parameter, Parameter]
    chart: Chart
    entries: tuple[int, ...]
    shifts: np.ndarray

    def held(self, x: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, Coordinates]:
        """x (m + 2,) with the parameters at `at` (2,) on their axes, and the coordinates there."""
        x = x.copy()
        roots = np.append(self.chart.axes.roots, [0.0, 0.0])
        for entry, value in zip(self.entries, at, strict=True):
            x[entry] = math.sqrt(value) if roots[entry] else value
        x[-1] = 1.0  # of the shift
        return x, self.chart.axes._replace(shift=at @ self.shifts)


def parameters(fit: FittedModel) -> list[Parameter]:
    """All parameters of a fit: SDs and correlations term by term, sigma, fixed effects."""
    builder = _Builder(fit)
    found = []
    for k, grouping in enumerate(fit.groupings):
        effects = grouping.effects
        for j in range(len(effects)):
            found.append(builder.sd(k, j))
            found += [builder.correlation(k, i, j) for i in range(j + 1, len(effects))]
    return [*found, builder.sigma(), *(builder.fixed(j) for j in range(len(fit.beta)))]


def estimates(fit: FittedModel) -> Values:
    """The variance parameters of a fit."""
    pairs = zip(fit.design.units.matrices, fit._factors, strict=True)
    return Values(tuple(np.asarray(matrix) @ factor for matrix, factor in pairs), 0.0)


def _of_inner(fit: FittedModel, k: int) -> np.ndarray:
    """What the effects of term `k` are in the inner ones of the design, (q, q)."""
    return np.asarray(fit.design.units.effects(k, np.eye(fit.design.sizes[k])))


def readings(values: Values, fit: FittedModel) -> list[float]:
    """SDs, correlations and sigma in the user's units, in the order of `parameters`."""
    found = []
    for k, inner in enumerate(values.roots):
        root = _of_inner(fit, k) @ inner
        sd = np.linalg.norm(root, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = root / sd[:, None]
        for j in range(len(root)):
            found.append(fit.sigma * sd[j])
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


def pair(fit: FittedModel, first: Parameter, second: Parameter) -> Pair:
    """Coordinates in which two parameters of a fit are held.

    Raises:
        DataError: a correlation with another, or with the SD of a third effect, of the same term.
    """
    builder = _Builder(fit)
    both = (first, second)
    orders: dict[int, tuple[int, ...]] = {}
    for parameter in sorted(both, key=lambda parameter: len(parameter.effects)):
        if parameter.effects:
            known = orders.get(parameter.place, ())
            orders[parameter.place] = tuple(dict.fromkeys([*known, *parameter.effects]))
    entries = []
    for own in both:
        entry = builder.entry(own.kind, own.place, own.effects, orders.get(own.place, ()))
        if entry is None:
            raise DataError(
                f"{first.name} and {second.name} cannot be held together: of one term's effects, "
                "two SDs can, and the SD and a correlation of one of them"
            )
        entries.append(entry)
    fixed = tuple(own.place for own in both if own.kind == "fixed")
    shifts = [
        builder.shift(own.place, fixed) if own.kind == "fixed" else np.zeros(fit.design.p)
        for own in both
    ]
    return Pair(both, builder.chart(orders, entries, fixed), tuple(entries), np.stack(shifts))


class _Builder:
    """Makes the parameters of a fit."""

    def __init__(self, fit: FittedModel):
        self.fit = fit
        self.basis = np.asarray(fit.design.basis)
        self.sizes = tuple(len(grouping.effects) for grouping in fit.groupings)
        self.starts = np.cumsum([0, *(q * (q + 1) // 2 for q in self.sizes)]).tolist()
        # Large variances first: below a small one a triangle's valley is curved.
        sds = [np.linalg.norm(root, axis=1) for root in estimates(fit).roots]
        self.by_size = [np.argsort(-sd, kind="stable").tolist() for sd in sds]

    def sd(self, k: int, j: int) -> Parameter:
        group, term = self.fit.groupings[k].name, self.fit.groupings[k].effects[j]
        scale = self.fit.sigma * float(np.linalg.norm(_of_inner(self.fit, k)[j]))
        return self._parameter(f"sd_{term}|{group}", group, term, "sd", k, (j,), scale)

    def correlation(self, k: int, i: int, j: int) -> Parameter:
        grouping = self.fit.groupings[k]
        group, term = grouping.name, f"{grouping.effects[i]}.{grouping.effects[j]}"
        return self._parameter(f"cor_{term}|{group}", group, term, "cor", k, (j, i))

    def sigma(self) -> Parameter:
        return self._parameter("sigma", RESIDUAL, RESIDUAL, "sigma", scale=self.fit.sigma)

    def fixed(self, j: int) -> Parameter:
        name, step = self.fit.fixed_names[j], float(self.fit.bse.iloc[j])
        shift = float(np.asarray(self.fit.design.beta_ols)[j])
        return self._parameter(name, None, name, "fixed", j, scale=step, shift=shift)

    def _parameter(
        self,
        name: str,
        group: str | None,
        term: str,
        kind: str,
        place: int = -1,
        effects: tuple[int, ...] = (),
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Parameter:
        axis = self.entry(kind, place, effects, effects)
        assert axis is not None
        orders = {place: effects} if effects else {}
        chart = self.chart(orders, (axis,), (place,) if kind == "fixed" else ())
        return Parameter(name, group, term, kind, place, effects, chart, axis, scale, shift)

    def entry(
        self, kind: str, place: int, effects: tuple[int, ...], first: tuple[int, ...]
    ) -> int | None:
        """Where a parameter is in x if the effects `first` of its term come first; None if
        nowhere."""
        if kind == "fixed":
            return self.starts[-1] + 1
        if kind == "sigma":
            return self.starts[-1]
        start = self.starts[place]
        if kind == "cor":
            return start + self.sizes[place] if set(first) == set(effects) else None
        return start + first.index(effects[0]) if effects[0] in first[:2] else None

    def chart(
        self, first: Mapping[int, tuple[int, ...]], held: Sequence[int], fixed: Sequence[int]
    ) -> Chart:
        """Coordinates with the effects `first` of some terms first, two of them in polar
        coordinates, and these entries of x and fixed effects held.

        With X = U R, X without the fixed effects' columns spans U Q for an orthonormal Q.
        """
        m, p = self.starts[-1], self.fit.design.p
        roots, turn = np.zeros(m), np.zeros((m, m))
        pivots = [np.equal(*natural.triangle(q)) for q in self.sizes]
        pivots = np.append(np.concatenate(pivots), [0.0, 0.0])
        polar = tuple(k for k, effects in first.items() if len(effects) > 1)
        for k in polar:
            radius, angle = self.starts[k] + 1, self.starts[k] + self.sizes[k]
            turn[radius, angle] = 1.0
            roots[[self.starts[k], radius]] = 1.0
            pivots[radius], pivots[angle] = 1.0, 0.0
        free = np.ones(m + 2)
        free[[*held, -1]] = 0.0
        columns, shift, absent = np.eye(p + 1), np.zeros(p), np.zeros(p + 1)
        if fixed:
            left = p - len(fixed)
            columns[:p, :p] = 0.0
            columns[:p, :left] = self._directions(fixed)[:, :left]
            absent[left:p] = 1.0
            shift = self.shift(fixed[0], fixed)
        bases = tuple(self._basis(k, first.get(k, ())) for k in range(len(self.sizes)))
        axes = Coordinates(
            order=_to_root(bases),
            roots=roots,
            polar=turn,
            pivots=pivots * free,
            free=free,
            columns=columns,
            shift=shift,
            absent=absent,
            log_unit=math.log(self.fit.sigma),
        )
        return Chart(bases, polar, axes)

    def shift(self, j: int, fixed: Sequence[int]) -> np.ndarray:
        """What the response gains per standard error of x_j in the directions that X without
        `fixed` leaves; the rest of x_j is in the span of the other columns."""
        left = self._directions(fixed)[:, self.fit.design.p - len(fixed) :]
        return -float(self.fit.bse.iloc[j]) * left @ (left.T @ self.basis[:, j])

    def _directions(self, fixed: Sequence[int]) -> np.ndarray:
        """Orthonormal (p, p), the last ones orthogonal to all columns but the `fixed`."""
        return np.linalg.qr(np.delete(self.basis, fixed, axis=1), mode="complete")[0]

    def _basis(self, k: int, first: tuple[int, ...]) -> np.ndarray:
        """The effects `first` of term `k` in their own units, then the inner ones that are not
        nearly combinations of them, (q, q)."""
        whole = np.eye(self.sizes[k])
        own = _of_inner(self.fit, k)[list(first)]
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        rest, replaced = own.copy(), []
        for i in range(len(rest)):
            replaced.append(int(np.argmax(np.abs(rest[i]))))
            pivot = rest[i] / rest[i, replaced[-1]]
            rest[i + 1 :] -= rest[i + 1 :, replaced[-1:]] * pivot
        left = [effect for effect in self.by_size[k] if effect not in replaced]
        return np.concatenate([own, whole[left]])


def _to_root(bases: tuple[np.ndarray, ...]) -> np.ndarray:
    """Entries of a root of inner effects from those of a triangle in other bases, (r, m)."""
    blocks = []
    for basis in bases:
        rows, columns = natural.triangle(len(basis))
        turned = np.kron(np.linalg.inv(basis), np.eye(len(basis)))
        blocks.append(turned[:, rows * len(basis) + columns])
    return np.asarray(scipy.linalg.block_diag(*blocks))
