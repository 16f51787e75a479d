"""Parameters that can be held, each with coordinates in which it is an axis: see `charts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from jaxreml.errors import DataError
from jaxreml.inference.likelihood.charts import (
    ROUNDING,
    Chart,
    Pair,
    Parameter,
    estimates,
    log_unit,
    of_inner,
    width,
)
from jaxreml.inference.parameters.variances import Named, named_readings
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Reading
from jaxreml.optimum.eliminated import Eliminated, choose_places, measure
from jaxreml.optimum.held import Coordinates

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

LEAST_LOG = -12.0  # of an SD over sigma, that stands for zero
MOST_ODDS = 9.0  # logarithms of odds that stand for a correlation at its limit


def parameters(fit: FittedModel) -> list[Parameter]:
    """All parameters of a fit: SDs and correlations term by term, sigma, fixed effects."""
    builder = _Builder(fit)
    variances = [builder.variance(own) for own in named_readings(fit)]
    return [*variances, *(builder.fixed(j) for j in range(len(fit.beta)))]


def free_chart(fit: FittedModel) -> Chart:
    """Coordinates in which nothing is held."""
    return _Builder(fit).chart({}, (), ())


def pair(fit: FittedModel, first: Parameter, second: Parameter) -> Pair:
    """Coordinates in which two parameters of a fit are held.

    Raises:
        DataError: a correlation with another, or with the SD of a third effect, of the same term;
            two numbers of residuals that one coordinate would have to hold.
    """
    builder = _Builder(fit)
    both = (first, second)
    orders: dict[int, tuple[int, ...]] = {}
    in_triangles = [own for own in both if own.kind in ("sd", "cor")]
    for parameter in sorted(in_triangles, key=lambda parameter: len(parameter.effects)):
        known = orders.get(parameter.place, ())
        orders[parameter.place] = tuple(dict.fromkeys([*known, *parameter.effects]))
    solved_for = [own for own in both if own.kind in ("log", "odds")]
    direct = [own.axis for own in both if own.kind in ("sigma", "coordinate")]
    eliminated = builder.eliminated([(own.place, own.reading) for own in solved_for], direct)
    places = dict(zip(map(id, solved_for), eliminated, strict=True))
    entries = []
    for own in both:
        entry = own.axis
        if id(own) in places:
            entry = places[id(own)].place
        elif own.kind in ("sd", "cor"):
            entry = builder.entry(own.place, own.effects, orders[own.place])
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
    chart = builder.chart(orders, entries, fixed, eliminated)
    return Pair(both, chart, tuple(entries), np.stack(shifts))


class _Builder:
    """Makes the parameters of a fit."""

    def __init__(self, fit: FittedModel):
        self.fit = fit
        self.basis = np.asarray(fit.design.basis)
        self.blocks = fit.covariance.blocks
        self.starts = np.cumsum([0, *map(width, self.blocks)]).tolist()
        self.known = estimates(fit)
        # Large variances first: below a small one a triangle's valley is curved.
        self.by_size = [
            np.argsort(-np.linalg.norm(part, axis=1), kind="stable").tolist()
            if block.any_basis
            else []
            for block, part in zip(self.blocks, self.known.parts, strict=True)
        ]

    @cached_property
    def y(self) -> np.ndarray:
        """The estimates where nothing is held, (m + 1,), off the boundary."""
        return self.chart({}, (), ()).x(self.known, ROUNDING)[:-1]

    def variance(self, own: Named) -> Parameter:
        """An SD, a correlation, sigma or a coordinate."""
        names, reading, k = (own.name, own.group, own.term), own.reading, own.block
        if own.kind == "sigma":
            return self._parameter(*names, "sigma", k, reading, self.starts[-1], self.fit.sigma)
        if own.kind == "parameter":
            block, place = self.blocks[k], reading.parameter
            if block.residual and place < block.log_variances:
                raise DataError(
                    f"{own.name} cannot be held: a covariance of residuals of your own has "
                    "profiles if it has one variance, so far"
                )
            axis, unit = self.starts[k] + place, log_unit(self.fit, block, place)
            ends = block.ends(place)
            return self._parameter(*names, "coordinate", k, reading, axis, shift=unit, bounds=ends)
        if not self.blocks[k].any_basis:
            return self._solved_for(names, own)
        effects = reading.effects[::-1]
        axis = self.entry(k, effects, effects)
        if own.kind == "cor":  # the cosine rises from -1 to 1 between
            return self._parameter(*names, "cor", k, reading, axis, bounds=(-math.pi, 0.0))
        scale = self.fit.sigma * float(np.linalg.norm(of_inner(self.fit, k)[effects[0]]))
        return self._parameter(*names, "sd", k, reading, axis, scale, bounds=(0.0, math.inf))

    def fixed(self, j: int) -> Parameter:
        """A coefficient."""
        name, step = self.fit.fixed_names[j], float(self.fit.bse.iloc[j])
        shift = float(np.asarray(self.fit.design.beta_ols)[j])
        axis, none = self.starts[-1] + 1, Reading(name, ())
        return self._parameter(name, None, name, "fixed", j, none, axis, step, shift)

    def _solved_for(self, names: tuple[str, str, str], own: Named) -> Parameter:
        held = self.eliminated([(own.block, own.reading)], ())
        block, kind, scale = self.blocks[own.block], "odds", 1.0
        bounds = -MOST_ODDS, MOST_ODDS
        if own.kind == "sd":
            kind, bounds, scale = "log", (LEAST_LOG, math.inf), self.fit.sigma
            if block.any_scale:
                place = own.reading.effects[0]
                scale /= float(np.asarray(self.fit.design.units.matrices[own.block])[place, place])
        if block.residual:
            bounds = -math.inf, math.inf
        axis = held[0].place
        return self._parameter(
            *names, kind, own.block, own.reading, axis, scale, bounds=bounds, held=held
        )

    def _parameter(
        self,
        name: str,
        group: str | None,
        term: str,
        kind: str,
        place: int,
        reading: Reading,
        axis: int | None,
        scale: float = 1.0,
        shift: float = 0.0,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        held: tuple[Eliminated, ...] = (),
    ) -> Parameter:
        assert axis is not None
        orders = {place: reading.effects[::-1]} if kind in ("sd", "cor") else {}
        chart = self.chart(orders, (axis,), (place,) if kind == "fixed" else (), held)
        return Parameter(name, group, term, kind, place, reading, chart, axis, scale, shift, bounds)

    def eliminated(
        self, wanted: Sequence[tuple[int, Reading]], taken: Sequence[int]
    ) -> tuple[Eliminated, ...]:
        """What holds numbers of blocks, each by the coordinate that moves it most; `taken` are
        entries of x that are held themselves."""
        found = [
            Eliminated(-1, self.blocks[k], self.starts[k], own.effects, own.least, 0.0)
            for k, own in wanted
        ]
        slopes = [measure(self.y, own).slope for own in found]
        chosen = choose_places(np.array(slopes), taken) if slopes else []
        return tuple(
            own._replace(place=place, hint=float(self.y[place]))
            for own, place in zip(found, chosen, strict=True)
        )

    def entry(self, k: int, effects: tuple[int, ...], first: tuple[int, ...]) -> int | None:
        """Where an SD or a correlation of block `k` is in x if the effects `first` come first; None
        if nowhere."""
        if len(effects) > 1:
            return self.starts[k] + self.blocks[k].size if set(first) == set(effects) else None
        alone = next(iter(effects))
        return self.starts[k] + first.index(alone) if alone in first[:2] else None

    def chart(
        self,
        first: Mapping[int, tuple[int, ...]],
        held: Sequence[int],
        fixed: Sequence[int],
        eliminated: tuple[Eliminated, ...] = (),
    ) -> Chart:
        """Coordinates with the effects `first` of some terms first, two of them in polar
        coordinates, and these entries of x and fixed effects held.

        With X = U R, X without the fixed effects' columns spans U Q for an orthonormal Q.
        """
        m, p = self.starts[-1], self.fit.design.p
        roots, turn = np.zeros(m), np.zeros((m, m))
        pivots = [
            np.equal(*natural.triangle(block.size)) if block.any_basis else np.zeros(block.length)
            for block in self.blocks
        ]
        pivots = np.append(np.concatenate(pivots), [0.0, 0.0])
        polar = tuple(k for k, effects in first.items() if len(effects) > 1)
        for k in polar:
            radius, angle = self.starts[k] + 1, self.starts[k] + self.blocks[k].size
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
        bases = tuple(
            self._basis(k, first.get(k, ())) if block.any_basis else None
            for k, block in enumerate(self.blocks)
        )
        axes = Coordinates(
            order=self._to_charts(bases),
            roots=roots,
            polar=turn,
            pivots=pivots * free,
            free=free,
            columns=columns,
            shift=shift,
            absent=absent,
            log_unit=math.log(self.fit.sigma),
            scaled=self._scaled,
            eliminated=eliminated,
        )
        return Chart(self.blocks, bases, polar, axes)

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
        whole = np.eye(self.blocks[k].size)
        own = of_inner(self.fit, k)[list(first)]
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        rest, replaced = own.copy(), []
        for i in range(len(rest)):
            replaced.append(int(np.argmax(np.abs(rest[i]))))
            pivot = rest[i] / rest[i, replaced[-1]]
            rest[i + 1 :] -= rest[i + 1 :, replaced[-1:]] * pivot
        left = [effect for effect in self.by_size[k] if effect not in replaced]
        return np.concatenate([own, whole[left]])

    def _to_charts(self, bases: Sequence[np.ndarray | None]) -> np.ndarray:
        """Entries of the charts of all blocks from coordinates, (r, m): of a root of inner effects
        from those of a triangle in other bases."""
        blocks = []
        for block, basis in zip(self.blocks, bases, strict=True):
            if basis is None:
                blocks.append(np.eye(block.length))
                continue
            rows, columns = natural.triangle(len(basis))
            turned = np.kron(np.linalg.inv(basis), np.eye(len(basis)))
            blocks.append(turned[:, rows * len(basis) + columns])
        return np.asarray(scipy.linalg.block_diag(*blocks))

    @property
    def _scaled(self) -> np.ndarray:
        """See `Coordinates`."""
        counts = [block.size * (block.size + 1) // 2 for block in self.blocks]
        return np.repeat([float(not block.residual) for block in self.blocks], counts)
