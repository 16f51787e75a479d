"""`WeightedEngine`: responses with weights of their own, on NumPy.

Weights change the cross-products of X and Z from response to response: each lane of `Grouped` has
its own. They come from matrix products of the weights with products of columns that all share. X
enters as the orthonormal basis of its unweighted columns, y as what weighted least squares leave of
it, from rows, so that no digits are lost to a large mean.

A weight of zero leaves a row out for the response, and so does a missing value: lanes need not have
the same rows. What cross-products cannot be trusted with (too few levels or rows left, columns of X
that depend on each other in these rows, too few digits left) goes one by one, as `fit` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from jaxreml.data.frame import ModelFrame
from jaxreml.many.base import Known, Options
from jaxreml.many.contributions import Parts
from jaxreml.many.host import Block, Passes
from jaxreml.many.numbers import Table
from jaxreml.many.screening import grid, suspects
from jaxreml.many.steps import Found
from jaxreml.model import linalg
from jaxreml.model.basis import Basis
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.moments import by_level
from jaxreml.model.objective import profiled
from jaxreml.model.structures.grouped import Grouped, GroupedBasis
from jaxreml.model.units import Units
from jaxreml.optimum.effects import conditional_modes
from jaxreml.optimum.search import START
from jaxreml.status import Status

Array = np.ndarray
CLOSE = 1e-8  # share of a sum of squares below which half of its digits are gone


class WeightedEngine:
    """What responses with weights of their own have in common.

    Args:
        frame: all rows.
        basis: of all rows, without weights; `grouped`.
        effects: (n, q), Z inside (`Basis.units`).
        options, known: as of other engines.
    """

    def __init__(
        self, frame: ModelFrame, basis: Basis, effects: Array, options: Options, known: Known
    ):
        self.frame, self.basis, self.options, self.known = frame, basis, options, known
        projector: GroupedBasis = basis.projector
        self.rows = projector.rows
        q, U = effects.shape[1], basis.rows
        self.effects = effects
        lower = np.transpose(natural.triangle(basis.p))
        self.of_x = np.array([U[:, i] * U[:, k] for i, k in lower]).reshape(len(lower), len(U))
        pairs = [effects[:, i] * effects[:, k] for i, k in np.transpose(natural.triangle(q))]
        self.of_z = self._by_level(pairs)
        self.of_zx = self._by_level([z * u for z in effects.T for u in U.T])
        self.of_zy = self._by_level(list(effects.T))

    def _by_level(self, columns: list[Array]) -> Any:
        """Sums over levels of weights times columns (n,), as a sparse matrix (columns J, n)."""
        if not columns:
            return scipy.sparse.csr_matrix((0, len(self.rows.codes)))
        return scipy.sparse.vstack([self.rows.spread(own) for own in columns], format="csr")

    @property
    def numbers(self) -> int:
        """Per lane, of the larger arrays of a search: columns of X are worked on in turn."""
        return self.rows.n_levels * self.effects.shape[1] ** 2

    def design(self, y: Array, weights: Array) -> Design:
        """The designs of responses less their offset, (n, b), zero weights leaving rows out."""
        basis, p, b = self.basis, self.basis.p, y.shape[1]
        q, levels = self.effects.shape[1], self.rows.n_levels
        U = basis.rows
        xx = (self.of_x @ weights)[natural.places(p)] if p else np.zeros((0, 0, b))
        factor = linalg.cholesky(xx)

        def least_squares(values: Array) -> Array:
            half = linalg.solve_lower(factor, (U.T @ (weights * values))[:, None])
            return linalg.solve_lower(factor, half, transposed=True)[:, 0]

        coefficients = least_squares(y)
        residual = y - U @ coefficients
        again = least_squares(residual)  # takes out what rounding left of a large mean
        residual = residual - U @ again
        weighted = weights * residual
        residual_ss = np.einsum("nb,nb->b", weighted, residual)
        rest = linalg.border(xx, U.T @ weighted, residual_ss)

        used = weights > 0
        n = used.sum(axis=0)
        log_weights = np.log(np.where(used, weights, 1.0)).sum(axis=0)
        scale = np.exp(log_weights / n)  # of the effects' squares: theirs are then near one
        zz = (self.of_z @ weights).reshape(-1, levels, b)[natural.places(q)] / scale
        zx = (self.of_zx @ weights).reshape(q, p, levels, b)
        zy = (self.of_zy @ weighted).reshape(q, 1, levels, b)
        columns = np.concatenate([zx, zy], axis=1) / np.sqrt(scale)
        factors, scores, left, share = by_level(zz, columns, rest)
        sure = (left[p, p] > CLOSE * residual_ss) & (share > CLOSE)
        sure &= np.all(np.isfinite(factor), axis=(0, 1)) & (_least(factor) > CLOSE)
        units = basis.units
        matrices = tuple(own[..., None] * np.sqrt(scale) for own in units.matrices)
        return Design(
            structure=Grouped(factors, scores, left, basis.sizes),
            basis=basis.triangle[..., None],
            beta_ols=linalg.solve_upper(basis.triangle, coefficients + again),
            residual_ss=residual_ss,
            total_ss=np.einsum("nb,nb,nb->b", weights, y, y),
            log_weights=log_weights,
            log_gram_x=np.full(1, np.nan),
            units=Units(matrices, units.rotated),
            n=n.astype(float),
            trouble=np.where(sure, Status.CONVERGED, Status.ILL_CONDITIONED).astype(np.int32),
            p=p,
            names=basis.names,
            covariance=basis.covariance,
            dtype=basis.dtype,
        )


def _least(factor: Array) -> Array:
    """The least share of a column's square that those before it leave, of Cholesky factors."""
    if not len(factor):
        return np.ones(factor.shape[2:])
    squares = np.sum(factor**2, axis=1)
    return np.min(linalg.diagonal(factor) ** 2 / squares, axis=0)


class WeightedPasses(Passes):
    """Of responses with weights of their own.

    Args:
        engine: of the design.
        values, weights: (n, b), the block; weights are zero where a row is left out.
        table: for their numbers.
        single: the design of a column of the block, as `fit` has it.
    """

    def __init__(
        self,
        engine: WeightedEngine,
        values: Array,
        weights: Array,
        table: Table,
        single: Callable[[int], Design],
    ):
        covariance = engine.basis.covariance
        super().__init__(covariance, engine.options, engine.known, table, engine.numbers)
        self.engine, self.values, self.weights, self._single = engine, values, weights, single

    def prepared(self, columns: Array) -> Block:
        """As `Passes`: one design, searched as it is."""
        weights = self.weights[:, columns]
        y = self.values[:, columns]
        if self.engine.basis.offset is not None:
            y = y - self.engine.basis.offset[:, None]
        design = self.engine.design(np.where(weights > 0, y, 0.0), weights)
        values = self._on_grid(design) if sum(self.covariance.sizes) == 1 else None
        return Block(columns, design, design, design.n - design.p, values)

    def _on_grid(self, design: Design) -> Array:
        """The criterion on the `grid`, (G, lanes)."""
        omegas = self.covariance.omega(grid(self.covariance)[0].T).T
        reml = self.options.reml
        return np.stack([profiled(omega[:, None], design, reml=reml) for omega in omegas])

    def start(self, block: Block) -> Array:
        """As `Passes`: with one variance ratio the lowest point of a parabola, in log SD, through
        the lowest of the grid and its neighbours."""
        if block.detail is None:
            return super().start(block)
        values = np.where(np.isfinite(block.detail), block.detail, np.inf)
        lowest = np.argmin(values, axis=0)
        omega = self.covariance.omega(grid(self.covariance)[0].T)[0]
        lanes = np.arange(lowest.size)
        inside = np.clip(lowest, 2, len(values) - 2)  # below the first is zero, which has no log
        before, here, after = (values[inside + k, lanes] for k in (-1, 0, 1))
        shift = (before - after) / (2 * (before - 2 * here + after))
        shift = np.where((inside == lowest) & (np.abs(shift) < 1), shift, 0.0)
        relative = omega[lowest] * (omega[inside + 1] / omega[inside]) ** shift
        return self.covariance.start(relative[None], START)

    def suspects(self, block: Block, found: Found) -> Array:
        """As `Passes`: by a grid with one variance ratio; with more all may have."""
        if block.detail is None:
            return np.ones(block.columns.size, bool)
        return suspects(block.detail, found.root, found.value, self.covariance, _no_way)

    def parts(self, block: Block) -> Parts:
        """As `Passes`: lanes need not have the same rows."""
        used = self.weights[:, block.columns] > 0
        if used.all():
            return self.options.parts
        return Parts.of(self.engine.frame, self.known.coefficients, used)

    def modes(self, block: Block, root: Array) -> tuple[Array, ...]:
        """As `Passes`."""
        return conditional_modes(self.covariance.omega(root), block.full)

    def single(self, column: int) -> Design:
        """As `Passes`."""
        return self._single(column)


def _no_way(places: Array, omegas: Array) -> Array:
    raise AssertionError("one variance ratio has no ways between minima to look along")
