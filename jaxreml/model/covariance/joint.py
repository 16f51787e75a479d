"""`Covariance`: the blocks of all terms side by side, and the residual variance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block, Report
from jaxreml.model.covariance.factors import rounding

Array = Any  # NumPy's or JAX's


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

    def factors_at(self, parameters: Array) -> tuple[Array, ...]:
        """Lower Cholesky factors (q_k, q_k) at all parameters (k + 1,), of one data set."""
        omega, last = self.natural(parameters)
        pairs = zip(self.parts(omega), self.own_parameters(parameters), strict=True)
        return tuple(
            block.factor_at(own, last) if block.any_basis else block.factor_of_omega(part)
            for (block, part), (_, own) in pairs
        )

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
