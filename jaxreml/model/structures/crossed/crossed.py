r"""Several grouping factors: a chain eliminated level by level, the rest dense.

The largest factor, and those that it is nested in, go to the chain (`elimination`), which leaves
the cross-products A = Z_D' V_E^-1 Z_D, C = Z_D' V_E^-1 [X y] and T of the other factors' effects,
the tail. They enter through one Cholesky factorisation (`schur`):

    log|V0| = log|V_E| + log|I + Omega_D A|,   gram = T - C'RC,   R = (Omega_D^-1 + A)^-1.

Memory and cost do not depend on the number of rows. `planning` prepares the arrays; derivatives of
log|V0| are made of those in `derivatives` and of products with R, those of the gram matrix of
images B v, by elimination with the columns of Z v in the place of X and y.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import namespace, on_host, sums_by
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.base import Marginal, OfColumns, Projection, Rows
from jaxreml.model.structures.crossed import derivatives, forms, schur
from jaxreml.model.structures.crossed.elimination import (
    Eliminated,
    Stage,
    eliminate,
    gram,
    reduce,
    substitute,
)
from jaxreml.model.structures.crossed.posterior import Posterior, row_variances, variances
from jaxreml.model.structures.layout import Layout

Array = Any  # NumPy's or JAX's
LIGHT = 10**5  # numbers of the tail up to which calls cost more than what they do with them


class Inner(NamedTuple):
    """What the derivatives are made of.

    Attributes:
        omegas: of the stages, and the tail's.
        done: the elimination at them.
        inverse: R, (Q, Q).
    """

    omegas: tuple[tuple[Array, ...], Array]
    done: Eliminated
    inverse: Array


class Moments(NamedTuple):
    """What moment estimates need; see `Crossed.start`.

    Attributes:
        bases: per term (q, q), in the order of the stages and the tail: Z times these has
            orthogonal columns.
        shrinkage: per term (q, J), 1 / (1 + Z'Z) in these bases.
        inverse: (v + 1, v + 1), of the expectations of the v sums of squares and of the mean
            square, in the relative variances and sigma2.
        n: rows.
    """

    bases: tuple[Array, ...]
    shrinkage: tuple[Array, ...]
    inverse: Array
    n: Array


@record
@dataclass(frozen=True)
class Crossed(OfColumns):
    """Cross-products of any number of grouping factors, nested or crossed.

    Attributes:
        stages: the chain, finest factor first.
        rest: (Q, Q), what the first factor leaves of Z_D'Z_D.
        tail: (Q, p + 1), likewise of Z_D'[X y].
        remainder: (p + 1, p + 1), likewise of [X y]'[X y].
        moments: for `start`; None where residuals have a covariance.
        sizes: effects per term, static, in the order of the terms.
        order: the terms in the order of the stages and then the tail, static.
        levels: levels per term of the tail, static.
    """

    stages: tuple[Stage, ...]
    rest: Array
    tail: Array
    remainder: Array
    moments: Moments | None
    sizes: tuple[int, ...] = field(metadata={"static": True})
    order: tuple[int, ...] = field(metadata={"static": True})
    levels: tuple[int, ...] = field(metadata={"static": True})

    @property
    def layout(self) -> Layout:
        """Of the tail."""
        tail = self.order[len(self.order) - len(self.levels) :]
        return Layout(tuple(self.sizes[k] for k in tail), self.levels)

    @property
    def columns(self) -> tuple[Array, ...]:
        return (*(stage.columns for stage in self.stages), self.tail)

    def with_columns(self, columns: tuple[Array, ...], remainder: Array) -> Crossed:
        *of_chain, tail = columns
        pairs = zip(self.stages, of_chain, strict=True)
        stages = tuple(replace(stage, columns=own) for stage, own in pairs)
        return replace(self, stages=stages, tail=tail, remainder=remainder)

    @cached_property
    def _positions(self) -> np.ndarray:
        """Where omega has the entries of the terms in `order`, (m,)."""
        return _gathered([q * (q + 1) // 2 for q in self.sizes], self.order)

    def _split(self, omega: Array) -> tuple[tuple[Array, ...], Array]:
        """Omega of the stages and of the tail."""
        inside = omega[self._positions]
        counts = [natural.count_theta(stage.sizes) for stage in self.stages]
        parts = [inside[slice(*ends)] for ends in pairwise(accumulate([0, *counts]))]
        return tuple(parts), inside[sum(counts) :]

    def _outside(self, array: Array, *axes: int) -> Array:
        """Parameters along `axes` from the order of the stages and tail to that of omega."""
        back = np.argsort(self._positions)
        for axis in axes:
            array = array[(slice(None),) * axis + (back,)]
        return array

    def _solve(self, omega: Array, A: Array, C: Array) -> schur.Solution:
        if on_host(omega, A, C):
            return schur.solve(self.layout, omega, A, C)
        from jaxreml.model.structures.crossed import of_jax

        return of_jax.solve(self.layout, omega, A, C)

    def _reduced(self, done: Eliminated) -> tuple[tuple[Array, ...], Array, Array]:
        """Of X and y: the columns of the stages and of the tail, and the gram matrix."""
        *of_chain, tail = self.columns
        columns, C = reduce(self.stages, done, tuple(of_chain), tail)
        return columns, C, gram(done, columns, self.remainder)

    def marginal(self, omega: Array) -> Marginal:
        chain, tail = self._split(omega)
        done = eliminate(self.stages, chain, self.rest)
        _, C, form = self._reduced(done)
        if not self.levels:
            return Marginal(done.logdet, form)
        if on_host(omega, C):
            logdet, explained = schur.reduce(self.layout, tail, done.A, C)
        else:  # which leaves out what it does not need
            logdet, _, _, explained = self._solve(tail, done.A, C)
        return Marginal(done.logdet + logdet, form - explained)

    def project(self, omega: Array) -> Projection:
        chain, tail = self._split(omega)
        done = eliminate(self.stages, chain, self.rest)
        columns, C, form = self._reduced(done)
        logdet, inverse, modes, cross = done.logdet, self.rest, C, C
        if self.levels:
            solution = self._solve(tail, done.A, C)
            logdet, form = logdet + solution.logdet, form - solution.form
            inverse, modes = solution.inverse, solution.modes
            cross = C - done.A @ modes
        crosses = substitute(self.stages, chain, done, columns, modes)
        inner: Any = Inner((chain, tail), done, inverse)
        return Projection(logdet, form, inner, (*crosses, cross))

    @property
    def costly(self) -> bool:
        couplings = sum(stage.level.shape[0] for stage in self.stages)
        each = natural.count_theta(self.stages[0].sizes) if self.moments is None else 1
        return (len(self.rest) ** 2 + couplings) * each > LIGHT

    @property
    def written_out(self) -> bool:
        return True

    def slope(self, projection: Projection) -> Array:
        (_, tail), done, R = projection.inner
        later = derivatives.given_later(self.stages, done, R)
        blocks = derivatives.own_blocks(self.stages, done, R, later)
        slopes = [
            derivatives.trace(stage, inner - around)
            for stage, (inner, around) in zip(self.stages, blocks, strict=True)
        ]
        if self.levels:
            of_tail = schur.inner_blocks(self.layout, tail, done.A, R)
            slopes.append(self.layout.trace_blocks(of_tail))
        return self._outside(namespace(*slopes).concatenate(slopes), 0)

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        vectors = self.combine(projection.cross, matrix)
        of_gram = forms.curvature(self, projection, vectors, weights)
        return self._of_logdet(projection) + self._outside(of_gram, 0, 1)

    def _of_logdet(self, projection: Projection) -> Array:
        """Second derivatives of log|V0|, (m, m)."""
        (_, tail), done, R = projection.inner
        stages, layout = self.stages, self.layout
        later = derivatives.given_later(stages, done, R)
        blocks = derivatives.own_blocks(stages, done, R, later)
        moves = derivatives.moved(stages, done)
        block = derivatives.second(stages, done, R, later, blocks, moves)
        if not self.levels:
            return self._outside(block, 0, 1)
        W, B = schur.complements(layout, tail, done.A, R)
        xp, Q = namespace(B), len(B)
        moved = xp.concatenate([move.A for move in moves])
        product = moved @ R
        through = schur.times_complement(layout, tail, done.A, product, moved)
        across = xp.stack(
            [
                layout.trace_blocks(layout.diagonal_blocks(W.T, own))
                for own in through.reshape(-1, Q, Q)
            ]
        )
        products = product.reshape(-1, Q, Q)
        turned = products.swapaxes(1, 2).reshape(len(products), -1)
        block = block - product.reshape(len(products), -1) @ turned.T
        corner = -layout.pair_trace(B, B)
        whole = xp.concatenate(
            [
                xp.concatenate([block, across], axis=1),
                xp.concatenate([across.T, corner], axis=1),
            ]
        )
        return self._outside((whole + whole.T) / 2, 0, 1)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        vectors = self.combine(projection.cross, matrix)
        return self._outside(forms.spread(self, projection, vectors), 0, 2)

    def of_effects(self, vectors: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        """`columns` of Z v for k vectors v, in the place of X and y: of the stages and the tail."""
        *of_chain, of_tail = vectors
        columns = [
            linalg.matmul(stage.matrix, vector)
            for stage, vector in zip(self.stages, of_chain, strict=True)
        ]
        tail = self.rest @ of_tail
        for i, stage in enumerate(self.stages):
            for j, (across, up) in enumerate(zip(stage.chain, stage.up, strict=True)):
                later = i + 1 + j
                columns[i] = columns[i] + linalg.matmul(across, of_chain[later][:, :, up])
                if i:  # what the first factor leaves is symmetric
                    back = linalg.matmul(linalg.transpose(across), of_chain[i])
                    count = self.stages[later].n_levels
                    columns[later] = columns[later] + sums_by(back, up, count)
            if self.levels:
                columns[i] = columns[i] + stage.from_tail(of_tail, stage.tail)
                if i:
                    tail = tail + stage.to_tail(stage.tail, of_chain[i], len(tail))
        return tuple(columns), tail

    def start(self) -> Array | None:
        """Moment estimates of omega, (m,).

        The effects of a term, in a basis in which its columns of Z are orthogonal and the effects
        taken for uncorrelated, have sums of squares of Z'y / (1 + Z'Z); their expectations are
        linear in the variances. None where residuals have a covariance: these would not tell it
        from the residual variance.
        """
        if self.moments is None:
            return None
        xp = namespace(self.remainder)
        zeros = [natural.count_theta(stage.sizes) * [0.0] for stage in self.stages]
        kind = self.remainder.dtype
        nothing = tuple(xp.asarray(zero, dtype=kind) for zero in zeros)
        columns, C, form = self._reduced(eliminate(self.stages, nothing, self.rest))
        sums: list[Array] = []
        for k, (stage, own) in enumerate(zip(self.stages, columns, strict=True)):
            whole = own[:, -1]
            if k == 0:
                whole = linalg.matmul(linalg.transpose(stage.matrix), own[:, -1:])[:, 0]
            sums += xp.split(whole, np.cumsum(stage.sizes)[:-1])
        if self.levels:
            sums += self.layout.split(C[:, -1])
        moments = self.moments
        terms = zip(sums, moments.bases, moments.shrinkage, strict=True)
        forms = [
            xp.sum((basis.T @ part * shrinkage) ** 2, axis=1) for part, basis, shrinkage in terms
        ]
        mean = form[-1, -1] / moments.n
        solution = moments.inverse @ xp.concatenate([*forms, mean[None]])
        relative = xp.maximum(solution[:-1], 0.0) / xp.maximum(solution[-1], 0.1 * mean)
        omegas = []
        first = 0
        for basis in moments.bases:
            q = len(basis)
            matrix = (basis * relative[first : first + q]) @ basis.T
            omegas.append(matrix[natural.triangle(q)])
            first += q
        return self._outside(xp.concatenate(omegas), 0)

    def form(self, cross: tuple[Array, ...], matrix: Array) -> Array:
        forms = []
        *of_chain, tail = self.combine(cross, matrix)
        for stage, part in zip(self.stages, of_chain, strict=True):
            q, k, _ = part.shape
            flat = part.reshape(q * k, -1)
            products = (flat @ flat.T).reshape(q, k, q, k).transpose(0, 2, 1, 3).reshape(q * q, -1)
            basis = natural.symmetric_basis(stage.sizes).reshape(-1, q * q).astype(part.dtype)
            forms.append((basis @ products).reshape(-1, k, k))
        if self.levels:
            forms.append(self.layout.form(tail, tail))
        return self._outside(namespace(*forms).concatenate(forms), 0)

    def modes(self, omega: Array, cross: tuple[Array, ...]) -> tuple[Array, ...]:
        chain, tail = self._split(omega)
        found: list[Array] = []
        for stage, vector, part in zip(self.stages, chain, cross, strict=False):
            whole = linalg.matmul(stage.omega(vector), part)[:, 0]
            pieces = namespace(whole).split(whole, np.cumsum(stage.sizes)[:-1])
            found += [piece.T for piece in pieces]
        if self.levels:
            found += self.layout.modes(tail, cross[-1][:, 0])
        return tuple(found[self.order.index(k)] for k in range(len(self.order)))

    def posterior(self, projection: Projection, factors: tuple[Array, ...]) -> Posterior:
        first = self.stages[0]
        roots = linalg.block_diagonal([factors[term] for term in self.order[: len(first.sizes)]])
        return self._posterior(projection.inner, linalg.conditional_variance(first.matrix, roots))

    def posterior_by_omega(self, inner: Any, omega: Array) -> Posterior:
        """That of the first factor, which has the residuals, is Omega - Omega F'P^-1 F Omega."""
        (chain, _), done, _ = inner
        first = self.stages[0]
        prior = first.omega(chain[0])
        own = linalg.matmul(done.solved[0], first.matrix)
        return self._posterior(inner, prior - linalg.matmul(linalg.matmul(prior, own), prior))

    def _posterior(self, inner: Any, own: Array) -> Posterior:
        """Given the conditional variances of the first factor's effects, (q, q, J)."""
        (chain, _), done, R = inner
        gain = linalg.matmul(self.stages[0].omega(chain[0]), done.solved[0])
        gains = tuple(-weights for weights in done.weights[1:])
        return Posterior((gain, *gains), (own, *gains), done.couplings, R)

    def variances(self, posterior: Posterior) -> tuple[np.ndarray, ...]:
        found: list[np.ndarray] = []
        for stage, whole in zip(self.stages, variances(self.stages, posterior), strict=True):
            start = 0
            for q in stage.sizes:
                found.append(np.moveaxis(whole[start : start + q, start : start + q], 2, 0))
                start += q
        start = 0
        for q, n_levels in zip(self.layout.sizes, self.levels, strict=True):
            stop = start + q * n_levels
            block = np.asarray(posterior.inverse)[start:stop, start:stop]
            found.append(np.einsum("ajbj->jab", block.reshape(q, n_levels, q, n_levels)))
            start = stop
        return tuple(found[self.order.index(k)] for k in range(len(self.order)))

    def row_variances(self, posterior: Posterior, rows: Rows) -> np.ndarray:
        inside = [rows[k] for k in self.order]
        of_stages = []
        for stage in self.stages:
            own, inside = inside[: len(stage.sizes)], inside[len(stage.sizes) :]
            layout = Layout(stage.sizes, (stage.n_levels,) * len(own))
            of_stages.append(layout.sparse(own))
        of_tail = self.layout.sparse(inside) if self.levels else sp.csr_matrix((len(rows[0][0]), 0))
        return row_variances(self.stages, posterior, of_stages, of_tail)


def _gathered(counts: list[int], order: tuple[int, ...]) -> np.ndarray:
    """Places of the entries of the terms in `order` among those of all terms in turn."""
    starts = np.cumsum([0, *counts])
    places = [np.arange(starts[k], starts[k + 1]) for k in order]
    return np.concatenate(places).astype(natural.INDEX)
