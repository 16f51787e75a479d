"""`Block`, the covariance of one random term, and `Covariance`, that of all of them.

A covariance is a map from a few parameters to `omega` (see `natural`), with derivatives. It has two
charts, as what is good to read is not good to move in:

chart        what the optimiser moves, r numbers: without bounds, smooth where a variance vanishes,
             so that the boundary of the parameter space is a set of ordinary stationary points
parameters   what people read and standard errors are for, k numbers: logarithms of variances,
             unconstrained coordinates of correlations. Minus infinity at a variance of zero

A new covariance is a frozen dataclass that derives from `Block`, in a file of its own:
`factor_analytic` is one. Derivatives are by autodiff unless it writes them out. Arrays may have
one more axis at the end, the lanes of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.runtime import neutral
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.factors import factor_semidefinite, rounding

Array = Any  # NumPy's or JAX's
LOG_ZERO = -100.0  # stands for log 0 in derivatives, which vanish there
FAR = 20.0  # stands for an infinite coordinate of a correlation likewise


class Report(NamedTuple):
    """Parameters at a point of the chart.

    Attributes:
        finite: (k, ...), with LOG_ZERO and FAR in the place of infinities.
        free: (k, ...), booleans, which are inside the parameter space.
        shown: (k, ...), with -inf for the logarithm of a variance of zero, +-inf for the coordinate
            of a correlation at a limit and NaN for one that is not identified there.
    """

    finite: Array
    free: Array
    shown: Array


class Reading(NamedTuple):
    """A number that people read of a covariance: the SD of an effect, the correlation of two, or
    one of the parameters.

    Attributes:
        label: what it is of; "" for an SD that all effects share.
        effects: places of the effect or of the two, the later first; none for a parameter.
        parameter: its place among the block's parameters, and in its chart (see
            `Block.parameter_of`); -1 for others.
        transform: how the parameter was made from what people read: "log", "logit", "fisher"
            (arctanh) or None; or an object with `coordinate`, `value`, `slope` and `domain`
            (`custom.Transform`).
        least: the least value that the correlation can have.
    """

    label: str
    effects: tuple[int, ...]
    parameter: int = -1
    transform: Any = None
    least: float = -1.0


@dataclass(frozen=True)
class Block(ABC):
    """Covariance of the effects of one random term, relative to the residual variance.

    Attributes:
        size: q, number of effects; omega has q (q + 1) / 2 numbers.
    """

    size: int

    # Whether there is a member of the family for every basis of the effects: then they may be
    # scaled and made orthogonal inside a design, and the chart is a square root of Omega.
    any_basis = False
    # Whether there is one for every scale of each effect at least, see `rescaled`.
    any_scale = False
    # Whether its log-variances are those of the effects, by `of_effects`.
    of_variances = True
    # Whether it writes out all derivatives, for NumPy's arrays too; by JAX otherwise.
    written_out = False
    # Whether covariances are linear in the parameters that SAS has for them, variances and
    # covariances: then Kenward and Roger's adjustment has no term in second derivatives of V.
    linear = False
    # Whether it is that of the residuals, I + Omega times sigma2 (`residual`): then Omega need not
    # be semidefinite, and `factor` and `chart` are of I + Omega.
    residual = False

    # Whether omega are covariances of the effects: not where it is a coordinate (`timed`).
    of_matrix = True

    @property
    @abstractmethod
    def length(self) -> int:
        """r, numbers in the chart."""

    @property
    @abstractmethod
    def log_variances(self) -> int:
        """How many parameters, the first, are log-variances."""

    @abstractmethod
    def parameter_names(self, group: str, effects: tuple[str, ...]) -> tuple[str, ...]:
        """k names."""

    @abstractmethod
    def omega(self, chart: Array) -> Array:
        """Relative covariances at a point of the chart, (r, ...) to (q (q + 1) / 2, ...)."""

    @abstractmethod
    def natural(self, parameters: Array, log_sigma2: Array) -> Array:
        """The same at `parameters` (k, ...), and their limits on the boundary, as `Report.shown`
        has it, with derivatives of zero there."""

    @abstractmethod
    def report(self, chart: Array, log_sigma2: Array) -> Report:
        """Parameters at a point of the chart on which `snap` has been."""

    @abstractmethod
    def snap(self, chart: Array, zero: float) -> Array:
        """A point with the same covariance, relative SDs of at most `zero` at exactly zero."""

    @abstractmethod
    def factor(self, chart: Array) -> Array:
        """Lower Cholesky factor (q, q, ...) of a point on which `snap` has been, zeros exact."""

    def chart(self, factor: Array) -> Array:
        """The inverse of `factor`. A block that has none writes `chart_at`."""
        raise NotImplementedError

    def chart_at(self, factor: Array, parameters: Array, log_sigma2: Array) -> Array:
        """The point of the chart of an estimate, given its `factor` and its parameters as
        `Report.shown` has them. Where variances vanish the factor says more exactly which."""
        return self.chart(factor)

    @abstractmethod
    def start(self, omega: Array, least: float) -> Array:
        """A point near moment estimates of omega, relative SDs of at least `least`."""

    @abstractmethod
    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        """A point (r,) near uncorrelated effects with these relative SDs, (q,)."""

    @property
    @abstractmethod
    def faces(self) -> np.ndarray:
        """Factors (faces, r) that take a point of the chart to where variances are zero."""

    def readings(self, effects: tuple[str, ...]) -> list[Reading]:
        """What describes the covariance of effects of these names: their SDs and correlations in
        the order of `triangle`, unless fewer say all."""
        pairs = zip(*natural.triangle(self.size), strict=True)
        return [
            Reading(effects[i], (i,)) if i == j else Reading(f"{effects[i]}.{effects[j]}", (i, j))
            for i, j in pairs
        ]

    def parameter_of(self, place: int, entry: float) -> float:
        """A parameter that `readings` has, at this entry of the chart: of no others. Infinite at an
        end (`ends`)."""
        return entry

    def ends(self, place: int) -> tuple[float, float]:
        """Between which entries of the chart that parameter has all its values, in their order."""
        return -np.inf, np.inf

    def omega_of_factor(self, factor: Array) -> Array:
        """Relative covariances of what `factor` gives, (q, q, ...) to (q (q + 1) / 2, ...)."""
        return natural.omega_from_factors((factor,))

    def factor_of_omega(self, omega: Array) -> Array:
        """The inverse of `omega_of_factor` for one data set; near a singular point with half of the
        digits."""
        matrix = omega[natural.places(self.size)]
        return factor_semidefinite(matrix, rounding(matrix))[0]

    def factor_at(self, parameters: Array, log_sigma2: Array) -> Array:
        """Lower Cholesky factor (q, q) at `parameters` as `natural` takes them. It is needed
        where `any_basis` only."""
        raise NotImplementedError

    def rescaled(self, chart: Array, units: Array) -> Array:
        """The point of the chart for effects multiplied by `units` (q,), which divide their SDs. It
        is needed where `any_scale` only."""
        raise NotImplementedError

    @property
    def of_effects(self) -> np.ndarray:
        """(q,), which of the log-variances each effect has."""
        return np.arange(self.size)

    def variance_labels(self, effects: tuple[str, ...]) -> tuple[str, ...]:
        """What each log-variance is of."""
        return effects

    @property
    def patterns(self) -> np.ndarray | None:
        """(m, d), those that omega is any combination of, if it is linear in some parameters."""
        return None

    def finite(self, parameters: Array, log_sigma2: Array) -> Array:
        """Finite numbers for `parameters` (k, ...) on the boundary, as `Report.shown` has them,
        where nothing changes with them."""
        xp, count = namespace(parameters), self.log_variances
        correlations = xp.nan_to_num(xp.clip(parameters[count:], -FAR, FAR))
        variances = xp.maximum(parameters[:count], log_sigma2 + LOG_ZERO)
        return xp.concatenate([variances, correlations])

    def boundary(
        self, effects: tuple[str, ...], factor: np.ndarray, parameters: np.ndarray
    ) -> list[str]:
        """What is on the boundary of the parameter space, in words, "{group}" in the place of the
        grouping factor.

        Args:
            effects: their names.
            factor: as `factor` gives it.
            parameters: as `Report.shown` has them.
        """
        positive = np.any(factor != 0, axis=1)
        zero = [effect for effect, varies in zip(effects, positive, strict=True) if not varies]
        found = [f"the variance of {effect} of {{group}} is zero" for effect in zero]
        if np.count_nonzero(np.diagonal(factor)) < np.count_nonzero(positive):
            found.append(
                "the correlation of the effects of {group} is +-1"
                if positive.sum() == 2
                else "the correlation matrix of the effects of {group} has lost rank"
            )
        return found

    def last_name(self, effects: tuple[str, ...]) -> str:
        """What sigma2 is the variance of, where the block is the residuals'."""
        return "Residual"

    @property
    def inside(self) -> np.ndarray:
        """Places in the chart that suffice for a point on which `snap` has been."""
        return np.arange(self.length)

    def flat(self, chart: Array) -> list[Array]:
        """Directions (r, ...) in the chart that do not move omega to first order."""
        return []

    def jacobian(self, chart: Array) -> Array:
        """d omega / d chart, (q (q + 1) / 2, r, ...)."""
        import jax

        return over_lanes(jax.jacfwd(self.omega), chart)

    def curvature(self, chart: Array, gradient: Array) -> Array:
        """Second derivatives in the chart, (r, r, ...), of gradient' omega."""
        import jax

        def bend(chart: Array, gradient: Array) -> Array:
            return jax.hessian(lambda chart: gradient @ self.omega(chart))(chart)

        return over_lanes(bend, chart, gradient)

    def second(self, chart: Array) -> Array:
        """Second derivatives of omega in the chart, (q (q + 1) / 2, r, r, ...)."""
        import jax

        return over_lanes(jax.jacfwd(jax.jacfwd(self.omega)), chart)

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        """`jacobian` and `curvature` together, which a search asks for."""
        return self.jacobian(chart), self.curvature(chart, gradient)

    def derivatives(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """d omega / d parameters, (q (q + 1) / 2, k, ...), and second derivatives of
        gradient' omega in the parameters, (k, k, ...), at finite ones."""
        import jax

        def both(parameters: Array, log_sigma2: Array, gradient: Array) -> tuple[Array, Array]:
            def at(parameters: Array) -> Array:
                return self.natural(parameters, log_sigma2)

            return jax.jacfwd(at)(parameters), jax.hessian(lambda p: gradient @ at(p))(parameters)

        return over_lanes(both, parameters, log_sigma2, gradient)

    def in_scale(
        self, parameters: Array, log_sigma2: Array, gradient: Array
    ) -> tuple[Array, Array]:
        """`derivatives` in the parameters and log sigma2, the last: (q (q + 1) / 2, k + 1, ...) and
        (k + 1, k + 1, ...). Relative covariances are inversely proportional to sigma2."""
        xp, omega = namespace(parameters), self.natural(parameters, log_sigma2)
        slope, bend = self.derivatives(parameters, log_sigma2, gradient)
        mixed = -xp.sum(gradient[:, None] * slope, axis=0)
        slope = xp.concatenate([slope, -omega[:, None]], axis=1)
        return slope, linalg.border(bend, mixed, xp.sum(gradient * omega, axis=0))

    def directions(self, parameters: Array, log_sigma2: Array) -> Array | None:
        """Tangents of omega that Kenward and Roger's adjustment is in, as columns; None for all.

        Those in the parameters, in order, unless it is `linear`. Zero on the boundary.
        """
        import jax

        return jax.jacfwd(lambda p: self.natural(p, log_sigma2))(parameters)

    def stated(self, coordinates: Array) -> Array:
        """The parameters after the log-variances as SAS and others state them, (c, ...): second
        derivatives of V in Kenward and Roger's adjustment are in these and in variances."""
        return coordinates

    def bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array | None:
        """Sums of second derivatives of the covariance, over sigma2, in its `stated` parameters.

        Args:
            parameters, log_sigma2: (k, ...) and (...), finite.
            spread: (k + 1, k + 1, ...), the weights of the sum, given as the covariance of the
                parameters and log sigma2.

        Returns:
            (q (q + 1) / 2, ...); None for zeros, where it is `linear`.
        """
        if self.linear:
            return None
        if on_host(parameters):
            with neutral():
                return np.asarray(self._bend(parameters, log_sigma2, spread))
        return self._bend(parameters, log_sigma2, spread)

    def _bend(self, parameters: Array, log_sigma2: Array, spread: Array) -> Array:
        import jax
        import jax.numpy as jnp

        def own(parameters: Array, log_sigma2: Array, spread: Array) -> Array:
            def at(parameters: Array) -> Array:
                return self.natural(parameters, log_sigma2)

            count, spread = self.log_variances, spread[:-1, :-1]
            slope, curve = jax.jacfwd(at)(parameters), jax.jacfwd(jax.jacfwd(at))(parameters)
            z, stated = parameters[count:], self.stated
            first, second = jax.jacfwd(stated)(z), jax.jacfwd(jax.jacfwd(stated))(z)
            moves = [-linalg.diagonal(spread)[:count], drift(first, second, spread[count:, count:])]
            return jnp.einsum("ij,tij->t", spread, curve) + slope @ jnp.concatenate(moves)

        return over_lanes(own, parameters, log_sigma2, spread)


def drift(first: Array, second: Array, spread: Array) -> Array:
    """Sums (c, ...) of the second derivatives of coordinates in what is stated instead.

    Args:
        first, second: (c, c, ...) and (c, c, c, ...), derivatives of what is stated in the
            coordinates. Those of an exponential would be the diagonal of `spread`, less.
        spread: (c, c, ...), weights, given as the covariance of the coordinates.
    """
    if not len(first):
        return spread[:, :0].sum(axis=1)
    xp = namespace(first, second, spread)
    bent = xp.einsum("ij...,aij...->a...", spread, second)
    return -linalg.matmul(linalg.inverse(first, definite=False)[0], bent[:, None])[:, 0]


def over_lanes(function: Callable[..., Any], *arrays: Array) -> Any:
    """A function of arrays without lanes, mapped over them where there are."""
    import jax

    for _ in range(arrays[0].ndim - 1):
        function = jax.vmap(function, in_axes=-1, out_axes=-1)
    return function(*arrays)


@dataclass(frozen=True)
class Covariance:
    """Blocks side by side, and the residual variance: static under `jit`.

    Charts, omega and parameters are those of the blocks, one after the other; the residual
    log-variance is the last parameter.
    """

    blocks: tuple[Block, ...]

    @cached_property
    def sizes(self) -> natural.Sizes:
        """Effects per term."""
        return tuple(block.size for block in self.blocks)

    @cached_property
    def random(self) -> np.ndarray:
        """(q,) booleans, which effects of all terms are random effects: not the residuals' ones."""
        return np.repeat([not block.residual for block in self.blocks], self.sizes)

    @cached_property
    def positions(self) -> np.ndarray:
        """Where `parameters` has log-variances, the residual's last."""
        found = []
        start = 0
        for block, width in zip(self.blocks, self._widths, strict=True):
            found += range(start, start + block.log_variances)
            start += width
        return np.array([*found, start], natural.INDEX)

    @cached_property
    def others(self) -> np.ndarray:
        """Where `parameters` has the rest, coordinates of correlations."""
        return np.setdiff1d(np.arange(self.positions[-1]), self.positions).astype(natural.INDEX)

    @cached_property
    def inside(self) -> np.ndarray:
        """Places in the chart that suffice for a point on which `snap` has been."""
        starts = np.cumsum([0, *(block.length for block in self.blocks)])
        pairs = zip(starts, self.blocks, strict=False)
        return np.concatenate([start + block.inside for start, block in pairs]).astype(
            natural.INDEX
        )

    @cached_property
    def _widths(self) -> list[int]:
        """Parameters per block."""
        names = [tuple(map(str, range(q))) for q in self.sizes]
        pairs = zip(self.blocks, names, strict=True)
        return [len(block.parameter_names("", own)) for block, own in pairs]

    @property
    def starts(self) -> list[int]:
        """Where each block's parameters begin; then where sigma2's is."""
        return np.cumsum([0, *self._widths]).tolist()

    def parameter_names(self, terms: Any) -> tuple[str, ...]:
        """Names of all parameters, for terms that are each a factor's name and effects' names."""
        names: list[str] = []
        for block, (group, effects) in zip(self.blocks, terms, strict=True):
            names += block.parameter_names(group, effects)
        last = "Residual"
        for block, (_, effects) in zip(self.blocks, terms, strict=True):
            if block.residual:
                last = block.last_name(effects)
        return (*names, f"log_variance[{last}]")

    def charts(self, chart: Array) -> list[tuple[Block, Array]]:
        """The blocks with what each has of the chart."""
        return self._cut(chart, [block.length for block in self.blocks])

    def parts(self, omega: Array) -> list[tuple[Block, Array]]:
        """The blocks with what each has of omega."""
        return self._cut(omega, [q * (q + 1) // 2 for q in self.sizes])

    def own_parameters(self, parameters: Array) -> list[tuple[Block, Array]]:
        """The blocks with what each has of the parameters."""
        return self._cut(parameters, self._widths)

    def _cut(self, vector: Array, lengths: list[int]) -> list[tuple[Block, Array]]:
        found = []
        start = 0
        for block, length in zip(self.blocks, lengths, strict=True):
            found.append((block, vector[start : start + length]))
            start += length
        return found

    def omega(self, chart: Array) -> Array:
        """(r, ...) to (m, ...)."""
        return _joined([block.omega(own) for block, own in self.charts(chart)])

    def whole(self, omega: Array) -> Array:
        """Covariances relative to sigma2, (m, ...): omega, and I + Omega of the residuals."""
        added = [
            np.equal(*natural.triangle(block.size)) * float(block.residual) for block in self.blocks
        ]
        ones = np.concatenate(added).astype(omega.dtype)
        return omega + ones.reshape(-1, *[1] * (omega.ndim - 1))

    def slopes(self, chart: Array, gradient: Array) -> tuple[Array, Array]:
        """Derivatives of omega in the chart, (m, r, ...), and second ones of gradient' omega,
        (r, r, ...)."""
        slopes, bends = [], []
        pairs = zip(self.charts(chart), self.parts(gradient), strict=True)
        for (block, own), (_, slope) in pairs:
            first, second = block.slopes(own, slope)
            slopes.append(first)
            bends.append(second)
        return linalg.block_diagonal(slopes), linalg.block_diagonal(bends)

    def chain(self, chart: Array, gradient: Array, hessian: Array) -> tuple[Array, Array]:
        """Gradient (r, ...) and Hessian (r, r, ...) in the chart of those in omega."""
        jacobian, bend = self.slopes(chart, gradient)
        across = linalg.transpose(jacobian)
        inner = linalg.matmul(across, linalg.matmul(hessian, jacobian)) + bend
        first = linalg.matmul(across, gradient[:, None])[:, 0]
        return first, (inner + linalg.transpose(inner)) / 2

    def flat(self, chart: Array) -> Array | None:
        """Directions in the chart that do not move omega to first order, (d, r, ...), or None."""
        found = []
        start = 0
        xp = namespace(chart)
        for block, own in self.charts(chart):
            before, after = chart[:start], chart[start + block.length :]
            for direction in block.flat(own):
                parts = [xp.zeros_like(before), direction, xp.zeros_like(after)]
                found.append(xp.concatenate(parts))
            start += block.length
        return xp.stack(found) if found else None

    def snap(self, chart: Array, zero: float) -> Array:
        """As that of blocks."""
        return _joined([block.snap(own, zero) for block, own in self.charts(chart)])

    def canonical(self, chart: Array) -> Array:
        """The point with the same covariance whose zeros are exact, up to rounding error."""
        return self.snap(chart, rounding(chart))

    def factors(self, chart: Array) -> tuple[Array, ...]:
        """Lower Cholesky factors (q_k, q_k, ...) at a `canonical` point."""
        return tuple(block.factor(own) for block, own in self.charts(chart))

    def omega_of_factors(self, factors: tuple[Array, ...]) -> Array:
        """Relative covariances (m, ...) of what `factors` gives."""
        pairs = zip(self.blocks, factors, strict=True)
        return _joined([block.omega_of_factor(factor) for block, factor in pairs])

    def chart_of_omega(self, omega: Array) -> Array:
        """A point (r,) of the chart with relative covariances (m,)."""
        parts = self.parts(omega)
        return _joined([block.chart(block.factor_of_omega(own)) for block, own in parts])

    def chart(self, factors: tuple[Array, ...]) -> Array:
        """The inverse of `factors`."""
        pairs = zip(self.blocks, factors, strict=True)
        return _joined([block.chart(factor) for block, factor in pairs])

    def chart_at(self, factors: tuple[Array, ...], parameters: Array) -> Array:
        """The same where the parameters are known, too: those of an estimate."""
        last = parameters[-1]
        pairs = zip(self.own_parameters(parameters), factors, strict=True)
        return _joined([block.chart_at(factor, own, last) for (block, own), factor in pairs])

    def start(self, omega: Array, least: float) -> Array:
        """A point of the chart near moment estimates (m, ...)."""
        return _joined([block.start(own, least) for block, own in self.parts(omega)])

    def uncorrelated(self, sds: np.ndarray) -> np.ndarray:
        """As that of blocks, of relative SDs of all effects."""
        each = np.split(sds, np.cumsum(self.sizes)[:-1])
        pairs = zip(self.blocks, each, strict=True)
        return np.concatenate([block.uncorrelated(own) for block, own in pairs])

    @cached_property
    def faces(self) -> np.ndarray:
        """Factors of the chart (faces, r): one block's, and all variances at zero first."""
        length = sum(block.length for block in self.blocks)
        found = [np.concatenate([np.full(own.length, float(own.residual)) for own in self.blocks])]
        start = 0
        for block in self.blocks:
            for face in block.faces:
                mask = np.ones(length)
                mask[start : start + block.length] = face
                found.append(mask)
            start += block.length
        return np.array(found)

    def natural(self, parameters: Array) -> tuple[Array, Array]:
        """Relative covariances (m, ...) and the residual log-variance at all parameters."""
        last = parameters[-1]
        pairs = self.own_parameters(parameters)
        return _joined([block.natural(own, last) for block, own in pairs]), last

    def report(self, chart: Array, log_sigma2: Array) -> Report:
        """All parameters at a `canonical` point of the chart."""
        last = log_sigma2[None]
        residual = Report(last, namespace(last).ones_like(last, dtype=bool), last)
        each = [block.report(own, log_sigma2) for block, own in self.charts(chart)]
        return Report(*(_joined(list(parts)) for parts in zip(*each, residual, strict=True)))

    def finite(self, parameters: Array) -> Array:
        """Finite numbers for `parameters` (k + 1, ...) on the boundary, as `Report.shown` has them,
        where nothing changes with them."""
        last = parameters[-1]
        own = [block.finite(part, last) for block, part in self.own_parameters(parameters)]
        return _joined([*own, last[None]])

    def in_parameters(
        self, parameters: Array, gradient: Array, hessian: Array
    ) -> tuple[Array, Array]:
        """Chain rule: derivatives in (omega, log sigma2) to those in `parameters`, at these.

        Args:
            parameters: (k + 1, ...), finite, where the derivatives were taken.
            gradient: (m + 1, ...), in omega and log sigma2; the last entry is not read.
            hessian: (m + 1, m + 1, ...), likewise.

        Returns:
            The Jacobian of (omega, log sigma2) in `parameters`, (m + 1, k + 1, ...), and the
            Hessian in `parameters`, (k + 1, k + 1, ...).
        """
        last, xp = parameters[-1], namespace(parameters)
        gradient = gradient[:-1]
        pairs = zip(self.own_parameters(parameters), self.parts(gradient), strict=True)
        found = [block.in_scale(own, last, slope) for (block, own), (_, slope) in pairs]
        inner = linalg.block_diagonal([slope[:, :-1] for slope, _ in found])
        of_scale = _joined([slope[:, -1] for slope, _ in found])
        curvature = linalg.border(
            linalg.block_diagonal([bend[:-1, :-1] for _, bend in found]),
            _joined([bend[:-1, -1] for _, bend in found]),
            sum(bend[-1, -1] for _, bend in found),
        )
        jacobian = xp.concatenate([inner, of_scale[:, None]], axis=1)
        unit = xp.concatenate([xp.zeros_like(inner[:1]), xp.ones_like(jacobian[:1, :1])], axis=1)
        jacobian = xp.concatenate([jacobian, unit])
        across = linalg.transpose(jacobian)
        return jacobian, linalg.matmul(across, linalg.matmul(hessian, jacobian)) + curvature

    def of_scale(self, parameters: Array, omega: Array) -> Array:
        """How omega (m, ...) changes with log sigma2 where `parameters` stay."""
        pairs = zip(self.own_parameters(parameters), self.parts(omega), strict=True)
        return _joined(
            [
                block.in_scale(own, parameters[-1], part)[0][:, -1] if block.residual else -part
                for (block, own), (_, part) in pairs
            ]
        )

    def directions(self, parameters: Array) -> tuple[Array | None, list[int]]:
        """Tangents of omega as columns, (m, d), and how many each block has; None if they are those
        of all its entries."""
        pairs = self.own_parameters(parameters)
        found = [block.directions(own, parameters[-1]) for block, own in pairs]
        counts = [q * (q + 1) // 2 for q in self.sizes]
        if all(own is None for own in found):
            return None, counts
        tangents = [
            np.eye(count, dtype=parameters.dtype) if own is None else own
            for own, count in zip(found, counts, strict=True)
        ]
        return linalg.block_diagonal(tangents), [own.shape[1] for own in tangents]

    def bend(self, parameters: Array, spread: Array, counts: list[int]) -> Array | None:
        """`Block.bend` of all blocks, (m, ...).

        Args:
            parameters: (k + 1, ...), finite.
            spread: weights of directions, of which the blocks have so many, one after the other,
                and log sigma2 the last. Those of a block that is not linear are its parameters.
            counts: these numbers.
        """
        found, start, scale = [], 0, sum(counts)
        for (block, own), count in zip(self.own_parameters(parameters), counts, strict=True):
            places = np.append(np.arange(start, start + count), scale)
            weights = None if block.linear else spread[places[:, None], places]
            found.append(None if block.linear else block.bend(own, parameters[-1], weights))
            start += count
        if all(own is None for own in found):
            return None
        like = next(own for own in found if own is not None)
        xp, sizes = namespace(like), [q * (q + 1) // 2 for q in self.sizes]
        return _joined(
            [
                xp.zeros((size, *like.shape[1:]), like.dtype) if own is None else own
                for own, size in zip(found, sizes, strict=True)
            ]
        )


def _joined(parts: list[Array]) -> Array:
    """One after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else namespace(*parts).concatenate(parts)
