"""`OwnDesigns`: responses with weights or a covariate of their own, on NumPy.

They change the cross-products of X and Z from response to response: each lane of `Grouped` has its
own. They come from matrix products of the weights with products of columns that all share. X enters
as the orthonormal basis of its unweighted columns, a covariate as what these leave of it, y as what
weighted least squares leave of it, from rows, so that no digits are lost to a large mean.

A weight of zero leaves a row out for the response, and so does a missing value: lanes need not have
the same rows. What cross-products cannot be trusted with (too few levels or rows left, columns of X
that depend on each other in these rows, too few digits left) goes one by one, as `fit` does it.

Where responses have all rows and the same weights, levels of equal F are taken together: their
scores enter the criterion by their cross-products alone, which a few levels have too.
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
from jaxreml.model.moments import by_level, semidefinite_root
from jaxreml.model.objective import profiled
from jaxreml.model.structures.grouped import Grouped, GroupedBasis, equal_levels
from jaxreml.model.units import Units
from jaxreml.optimum.effects import conditional_modes
from jaxreml.optimum.search import START
from jaxreml.status import Status

Array = np.ndarray
DEPENDENT = 1e-10  # share of a covariate that the others leave which is rounding error
CLOSE = 1e-8  # share of a sum of squares below which half of its digits are gone


class OwnDesigns:
    """What responses with weights or a covariate of their own have in common.

    Args:
        frame: all rows.
        basis: of these, without weights and covariate; `grouped`.
        effects: (n, q), Z inside (`Basis.units`).
        options, known: as of other engines.
        weights: (n,), those of responses without their own.
    """

    def __init__(
        self,
        frame: ModelFrame,
        basis: Basis,
        effects: Array,
        options: Options,
        known: Known,
        weights: Array,
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
        self.of_z_alone = self._by_level(list(effects.T))
        self.classes = self._classes(weights)

    def _by_level(self, columns: list[Array]) -> Any:
        """Sums over levels of weights times columns (n,), as a sparse matrix (columns J, n)."""
        if not columns:
            return scipy.sparse.csr_matrix((0, len(self.rows.codes)))
        return scipy.sparse.vstack([self.rows.spread(own) for own in columns], format="csr")

    def _classes(self, weights: Array) -> list[Array] | None:
        """Levels of equal F under shared weights, if that makes a third of the levels or less."""
        q, levels = self.effects.shape[1], self.rows.n_levels
        zz = (self.of_z @ weights).reshape(-1, levels)[natural.places(q)]
        classes = equal_levels(semidefinite_root(zz)[0])
        if 3 * q * (self.basis.p + 2) * (classes.max() + 1) > levels:
            return None
        return [np.flatnonzero(classes == own) for own in range(classes.max() + 1)]

    @property
    def numbers(self) -> int:
        """Per lane, of the larger arrays: columns of X are worked on in turn."""
        return max(self.rows.n_levels * self.effects.shape[1] ** 2, len(self.effects) // 2)

    def design(
        self, y: Array, weights: Array, x: Array | None = None, *, alike: bool = False
    ) -> Design:
        """The designs of responses less their offset, (n, b), zero weights leaving rows out, and of
        a covariate each, which is the last column of X then.

        Levels are taken together by `classes` where the responses are `alike`, in weights and rows.
        """
        basis, shared = self.basis, self.basis.p
        b, w = (y if x is None else x).shape[1], weights.shape[1]
        q, levels = self.effects.shape[1], self.rows.n_levels
        U, triangle = basis.rows, basis.triangle[..., None]
        xx = (self.of_x @ weights)[natural.places(shared)] if shared else np.zeros((0, 0, w))
        zx = (self.of_zx @ weights).reshape(q, shared, levels, w)
        own, known = None, np.ones(b, bool)
        if x is not None:
            own, triangle, known = self._beside(x)
            weighted = weights * own
            xx = np.broadcast_to(xx, (*xx.shape[:2], b))
            xx = linalg.border(xx, U.T @ weighted, np.einsum("nb,nb->b", weighted, own))
            zx = np.broadcast_to(zx, (*zx.shape[:3], b))
            zx = np.concatenate([zx, self._of_levels(weighted)], axis=1)
        p, factor = len(xx), linalg.cholesky(xx)

        def products(values: Array) -> Array:
            weighted = weights * values
            found = U.T @ weighted
            if own is None:
                return found
            found = np.broadcast_to(found, (len(found), b))
            return np.concatenate([found, np.einsum("nb,nb->b", weighted, own)[None]])

        def less(values: Array) -> tuple[Array, Array]:
            """Weighted least squares coefficients, and what they leave."""
            half = linalg.solve_lower(factor, products(values)[:, None])
            found = linalg.solve_lower(factor, half, transposed=True)[:, 0]
            left = values - U @ found[:shared]
            return found, left if own is None else left - own * found[-1]

        coefficients, residual = less(y)
        again, residual = less(residual)  # takes out what rounding left of a large mean
        weighted = weights * residual
        residual_ss = np.einsum("nb,nb->b", weighted, residual)
        rest = linalg.border(xx, products(residual), residual_ss)

        used = weights > 0
        n = used.sum(axis=0)
        log_weights = np.log(np.where(used, weights, 1.0)).sum(axis=0)
        scale = np.exp(log_weights / n)  # of the effects' squares: theirs are then near one
        zz = (self.of_z @ weights).reshape(-1, levels, w)[natural.places(q)] / scale
        columns = np.concatenate([zx, self._of_levels(weighted)], axis=1) / np.sqrt(scale)
        factors, scores, left, share = by_level(zz, columns, rest)
        sure = (left[p, p] > CLOSE * residual_ss) & (share > CLOSE)
        sure &= np.all(np.isfinite(factor), axis=(0, 1)) & (_least(factor) > CLOSE)
        trouble = np.where(sure, Status.CONVERGED, Status.ILL_CONDITIONED)
        counts = None
        if alike and self.classes is not None:
            factors, scores, counts = _together(self.classes, factors, scores)
        units = basis.units
        matrices = tuple(own[..., None] * np.sqrt(scale) for own in units.matrices)
        return Design(
            structure=Grouped(factors, scores, left, basis.sizes, counts=counts),
            basis=triangle,
            beta_ols=linalg.solve_upper(triangle, (coefficients + again)[:, None])[:, 0],
            residual_ss=residual_ss,
            total_ss=np.broadcast_to(np.einsum("nb,nb,nb->b", weights, y, y), (b,)),
            log_weights=log_weights,
            log_gram_x=np.full(1, np.nan),
            units=Units(matrices, units.rotated),
            n=n.astype(float),
            trouble=np.where(known, trouble, Status.RANK_DEFICIENT).astype(np.int32),
            p=p,
            names=basis.names,
            covariance=basis.covariance,
            dtype=basis.dtype,
        )

    def _of_levels(self, weighted: Array) -> Array:
        """Z'C of weighted columns (n, b), level by level: (q, 1, J, b)."""
        q, levels = self.effects.shape[1], self.rows.n_levels
        return (self.of_z_alone @ weighted).reshape(q, 1, levels, -1)

    def _beside(self, x: Array) -> tuple[Array, Array, Array]:
        """What the other columns of X leave of covariates, of unit length, (n, b); the triangle of
        both, (p, p, b); and whether it is more than rounding error."""
        U = self.basis.rows
        share = U.T @ x
        left = x - U @ share
        more = U.T @ left
        left = left - U @ more
        length = np.sqrt(np.einsum("nb,nb->b", left, left))
        known = length > DEPENDENT * np.sqrt(np.einsum("nb,nb->b", x, x))
        length = np.where(known, length, 1.0)
        corner = np.concatenate([np.zeros_like(share), length[None]])
        columns = np.concatenate([share + more, length[None]])
        top = np.broadcast_to(
            self.basis.triangle[..., None], (*self.basis.triangle.shape, x.shape[1])
        )
        whole = np.concatenate([top, corner[None, :-1]])
        return left / length, np.concatenate([whole, columns[:, None]], axis=1), known


def _together(classes: list[Array], factors: Array, scores: Array) -> tuple[Array, Array, Array]:
    """F, scores and `Grouped.counts` of q k levels for each class, of scores (q, k, J, b)."""
    q, k, _, b = scores.shape
    new_factors, new_scores, counts = [], [], []
    for levels in classes:
        flat = np.ascontiguousarray(scores[:, :, levels].reshape(q * k, levels.size, b))
        root = semidefinite_root(linalg.row_products(flat, flat))[0]
        new_scores.append(root.swapaxes(0, 1).reshape(q, k, q * k, b))
        new_factors.append(np.repeat(factors[:, :, levels[:1]], q * k, axis=2))
        counts += [levels.size / (q * k)] * (q * k)
    return (
        np.concatenate(new_factors, axis=2),
        np.concatenate(new_scores, axis=2),
        np.array(counts)[:, None],
    )


def _least(factor: Array) -> Array:
    """The least share of a column's square that those before it leave, of Cholesky factors."""
    if not len(factor):
        return np.ones(factor.shape[2:])
    squares = np.sum(factor**2, axis=1)
    return np.min(linalg.diagonal(factor) ** 2 / squares, axis=0)


class OwnPasses(Passes):
    """Of responses with weights or a covariate of their own.

    Args:
        engine: of the design.
        values, weights, x: (n, b), the block; weights are zero where a row is left out; `x` None
            without covariates.
        alike: whether responses have the same weights, and all rows.
        table: for their numbers.
        single: the design of a column of the block, as `fit` has it.
    """

    def __init__(
        self,
        engine: OwnDesigns,
        values: Array,
        weights: Array,
        x: Array | None,
        alike: bool,
        table: Table,
        single: Callable[[int], Design],
    ):
        covariance = engine.basis.covariance
        super().__init__(covariance, engine.options, engine.known, table, engine.numbers)
        self.engine, self._single = engine, single
        self.values, self.weights, self.x, self.alike = values, weights, x, alike

    def prepared(self, columns: Array) -> Block:
        """As `Passes`: one design, searched as it is."""
        design = self._design(columns, alike=self.alike)
        values = self._on_grid(design) if sum(self.covariance.sizes) == 1 else None
        return Block(columns, design, design, design.n - design.p, values)

    def _design(self, columns: Array, *, alike: bool) -> Design:
        lane = columns[:1]  # what all lanes share has one
        weights = self.weights[:, lane if alike else columns]
        one = alike and self.values.strides[1] == 0
        y = self.values[:, lane if one else columns]
        if self.engine.basis.offset is not None:
            y = y - self.engine.basis.offset[:, None]
        x = None if self.x is None else self.x[:, columns]
        if alike:
            return self.engine.design(y, weights, x, alike=True)
        used = weights > 0
        x = None if x is None else np.where(used, x, 0.0)
        return self.engine.design(np.where(used, y, 0.0), weights, x)

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
        """As `Passes`: lanes need not have the same rows and columns."""
        used = None
        if not self.alike:
            used = self.weights[:, block.columns] > 0
            used = None if used.all() else used
        if used is None and self.x is None:
            return self.options.parts
        x = None if self.x is None else self.x[:, block.columns]
        return Parts.of(self.engine.frame, self.known.coefficients, used, x)

    def modes(self, block: Block, root: Array) -> tuple[Array, ...]:
        """As `Passes`: all levels have their own."""
        design = self._design(block.columns, alike=False) if self.alike else block.full
        return conditional_modes(self.covariance.omega(root), design)

    def single(self, column: int) -> Design:
        """As `Passes`."""
        return self._single(column)


def _no_way(places: Array, omegas: Array) -> Array:
    raise AssertionError("one variance ratio has no ways between minima to look along")
