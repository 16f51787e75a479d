"""The parameters that people read, each with coordinates in which it is an axis of its own.

Names and order are those of lme4's ``confint(fit, oldNames=FALSE)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxreml.fitting.random_terms import unpack
from jaxreml.inference.parameters.linearised import scale_of
from jaxreml.inference.parameters.variances import Places, named_readings
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block, Reading
from jaxreml.optimum.eliminated import correlation, measure, solved
from jaxreml.optimum.held import Coordinates, triangle
from jaxreml.optimum.search import START

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

ROUNDING = 1e-6  # a relative SD below this changes no digit of the criterion
RESTARTS = 4  # other starts, for each effect of the largest term beyond the first


class Values(NamedTuple):
    """Variance parameters, relative to the fit's sigma and in scaled effects.

    Attributes:
        parts: per block any square root (q, q) of the covariance matrix, if all square roots are
            members (`Block.any_basis`); else its chart.
        log_sigma: logarithm of the residual SD.
    """

    parts: tuple[np.ndarray, ...]
    log_sigma: float


@dataclass(frozen=True, eq=False)
class Chart:
    """Coordinates of the variance parameters, in which some that people read are axes.

    Attributes:
        blocks: of the covariance.
        bases: per block (q, q), what each effect is in the inner ones of the design: those first
            that are axes, in the user's units, and then inner ones; None where the block's own
            chart is taken.
        polar: blocks (their places) of which the second row of T is d (cos a, sin a).
        axes: the coordinates in numbers.
    """

    blocks: tuple[Block, ...]
    bases: tuple[np.ndarray | None, ...]
    polar: tuple[int, ...]
    axes: Coordinates

    def x(self, values: Values, floor: float = 0.0) -> np.ndarray:
        """Coordinates (m + 2,), with SDs of at least about `floor`; the last is 0."""
        parts = []
        for k, (part, basis) in enumerate(zip(values.parts, self.bases, strict=True)):
            if basis is None:
                least = max(floor, ROUNDING if self.axes.eliminated else 0.0)
                parts.append(_lifted(self.blocks[k], part, least))
            else:
                parts.append(self._triangle(k, basis @ part, floor))
        x = np.concatenate([*parts, [values.log_sigma, 0.0]])
        held = self.axes.eliminated
        x[[own.place for own in held]] = [measure(x[:-1], own).value for own in held]
        return x

    def _triangle(self, k: int, root: np.ndarray, floor: float) -> np.ndarray:
        upper = np.linalg.qr(root.T, mode="r")
        lower = (np.where(np.diagonal(upper) < 0, -1.0, 1.0)[:, None] * upper).T
        np.fill_diagonal(lower, np.maximum(np.diagonal(lower), floor))
        if k in self.polar:
            length = np.hypot(lower[1, 0], lower[1, 1])
            defined = lower[0, 0] > 0 and length > 0
            angle = -math.atan2(lower[1, 1], lower[1, 0]) if defined else -math.pi / 2
            lower[1, :2] = math.sqrt(length), angle
            lower[0, 0] = math.sqrt(lower[0, 0])
        return lower[natural.triangle(len(root))]

    def values(self, x: np.ndarray) -> Values:
        """The variance parameters at x (m + 2,)."""
        y = solved(x[:-1], self.axes.eliminated)
        entries = np.asarray(triangle(y[:-1], self.axes))
        parts, start = [], 0
        for block, basis in zip(self.blocks, self.bases, strict=True):
            count = width(block)
            own = entries[start : start + count]
            start += count
            if basis is not None:
                (lower,) = unpack(own, (block.size,))
                own = np.linalg.solve(basis, lower)
            parts.append(own)
        return Values(tuple(parts), float(y[-1]))


def width(block: Block) -> int:
    """Numbers that a block has among the coordinates."""
    return block.size * (block.size + 1) // 2 if block.any_basis else block.length


def _lifted(block: Block, chart: np.ndarray, floor: float) -> np.ndarray:
    """A chart with SDs of random effects of at least about `floor`."""
    if block.residual or not floor or np.array_equal(block.snap(chart, floor), chart):
        return chart
    return np.asarray(block.start(block.omega(chart), floor))


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter that can be held.

    Attributes:
        name: lme4's, such as ``sd_(Intercept)|g``, ``cor_x.(Intercept)|g``, ``sigma``.
        group, term: grouping factor and effect(s); None and the column's name for fixed effects.
        kind: "sd", "cor", "sigma", "fixed"; of a block with a chart of its own "log", the logarithm
            of an SD, "odds", those of a correlation, or "coordinate", an entry of the chart.
        place: the place of its block, of a fixed effect its column's; else -1.
        reading: what it is to the block.
        chart: coordinates in which it is an axis, and held.
        axis: the entry of x that it is.
        scale, shift: the value is scale * x (SD), cos x, scale * exp(x) (sigma, logarithms),
            shift + scale * x (fixed effects); of shift + parameter (coordinates).
        bounds: of the axis.
    """

    name: str
    group: str | None
    term: str
    kind: str
    place: int
    reading: Reading
    chart: Chart
    axis: int
    scale: float = 1.0
    shift: float = 0.0
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def effects(self) -> tuple[int, ...]:
        """The places of an SD's or a correlation's effects in the term, the earlier first."""
        return self.reading.effects[::-1]

    @property
    def axes(self) -> Coordinates:
        """Those of `chart` in numbers."""
        return self.chart.axes

    def value(self, at: float) -> float:
        """The parameter in the user's units at a value of the axis."""
        if self.kind == "cor":
            return math.cos(at)
        if self.kind == "odds":
            return correlation(at, self.reading.least)
        if self.kind == "coordinate":
            parameter = self.chart.blocks[self.place].parameter_of(self.reading.parameter, at)
            return float(scale_of(self.reading.transform).inverse(self.shift + parameter))
        if self.kind == "log" and at == self.bounds[0]:
            return 0.0
        logarithm = self.kind in ("sigma", "log")
        return self.shift + self.scale * (math.exp(at) if logarithm else at)

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


def estimates(fit: FittedModel) -> Values:
    """The variance parameters of a fit."""
    parts, last = [], fit.parameters[-1]
    pairs = zip(fit.covariance.own_parameters(fit.parameters), fit._factors, strict=True)
    for k, ((block, parameters), factor) in enumerate(pairs):
        if block.any_basis:
            parts.append(np.asarray(fit.design.units.matrices[k]) @ factor)
        else:
            chart = np.asarray(block.chart_at(factor, parameters, last))
            parts.append(in_units(fit, k, block, chart, inner=True))
    return Values(tuple(parts), 0.0)


def in_units(
    fit: FittedModel, k: int, block: Block, chart: np.ndarray, *, inner: bool = False
) -> np.ndarray:
    """A block's own chart in the user's units, of one in the inner units of the design; or the
    other way."""
    if not block.any_scale:
        return chart
    units = np.diagonal(np.asarray(fit.design.units.matrices[k]))
    return np.asarray(block.rescaled(chart, 1 / units if inner else units))


def log_unit(fit: FittedModel, block: Block, place: int) -> float:
    """What a parameter of a block is more than in a chart relative to the fit's sigma: log sigma2
    of a log-variance, behind all others that of the residuals' own."""
    is_variance = place < block.log_variances or place >= block.length
    return 2 * math.log(fit.sigma) if is_variance else 0.0


def of_inner(fit: FittedModel, k: int) -> np.ndarray:
    """What the effects of term `k` are in the inner ones of the design, (q, q)."""
    return np.asarray(fit.design.units.effects(k, np.eye(fit.design.sizes[k])))


def readings(values: Values, fit: FittedModel) -> list[float]:
    """SDs, correlations and what else people read, in their order (`named_readings`)."""
    known, covariance = named_readings(fit), fit.covariance
    sigma2 = math.exp(2 * values.log_sigma)
    parts, coordinates = [], np.full(covariance.starts[-1] + 1, np.nan)
    for k, (block, part) in enumerate(zip(covariance.blocks, values.parts, strict=True)):
        if block.any_basis:
            root = of_inner(fit, k) @ part
            parts.append((root @ root.T)[natural.triangle(block.size)])
            continue
        chart = in_units(fit, k, block, part)
        own = np.asarray(block.omega(chart))
        if block.residual:
            own = sigma2 * (own + np.equal(*natural.triangle(block.size)))
        parts.append(own)
        for named in known:
            if named.block == k and (place := named.reading.parameter) >= 0:
                at = chart[place] if place < block.length else values.log_sigma
                entry = block.parameter_of(place, float(at)) + log_unit(fit, block, place)
                coordinates[covariance.starts[k] + place] = entry
    whole = fit.sigma**2 * np.concatenate([*parts, [sigma2]])
    return Places.of(covariance, known).values(whole, coordinates).tolist()


def without_rounding(values: Values, blocks: Sequence[Block]) -> Values:
    """The same with zeros for effects whose SD is rounding error."""
    parts = [
        np.where(np.linalg.norm(part, axis=1, keepdims=True) < ROUNDING, 0.0, part)
        if block.any_basis
        else np.asarray(block.snap(part, ROUNDING))
        for block, part in zip(blocks, values.parts, strict=True)
    ]
    return values._replace(parts=tuple(parts))


def other_values(values: Values, blocks: Sequence[Block]) -> list[Values]:
    """Values with SDs of the same order and any correlations of random effects, to start from as
    well; the same at every call."""
    rng = np.random.default_rng(0)
    most = max((block.size for block in blocks if block.any_basis), default=1)
    found = []
    for _ in range(RESTARTS * (most - 1)):
        parts = []
        for block, part in zip(blocks, values.parts, strict=True):
            if block.any_basis:
                directions = rng.normal(size=part.shape)
                sd = np.maximum(np.linalg.norm(part, axis=1, keepdims=True), START)
                sd = sd * np.exp(rng.normal(size=sd.shape) / 2)
                part = sd * directions / np.linalg.norm(directions, axis=1, keepdims=True)
            parts.append(part)
        found.append(values._replace(parts=tuple(parts)))
    return found
