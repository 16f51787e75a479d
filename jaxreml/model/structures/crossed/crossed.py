r"""Several grouping factors: a chain eliminated level by level, the rest dense.

The largest factor, and those that it is nested in, go to the chain (`elimination`), which leaves
the cross-products A = Z_D' V_E^-1 Z_D, C = Z_D' V_E^-1 [X y] and T of the other factors' effects,
the tail. They enter through one Cholesky factorisation (`schur`):

    log|V0| = log|V_E| + log|I + Omega_D A|,   gram = T - C'RC,   R = (Omega_D^-1 + A)^-1.

Memory and cost do not depend on the number of rows. `planning` prepares the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import Array

from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.base import Marginal, OfColumns, Projection, Rows
from jaxreml.model.structures.crossed import schur
from jaxreml.model.structures.crossed.elimination import (
    Eliminated,
    Stage,
    collect,
    eliminate,
    substitute,
)
from jaxreml.model.structures.crossed.posterior import Posterior, row_variances, variances
from jaxreml.model.structures.layout import Layout


class Inner(NamedTuple):
    """What the derivatives are made of.

    Attributes:
        omegas: of the stages, and the tail's.
        done: the elimination at them.
        inverse: R, (Q, Q).
        modes: R C, (Q, p + 1).
    """

    omegas: tuple[tuple[Array, ...], Array]
    done: Eliminated
    inverse: Array
    modes: Array


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Crossed(OfColumns):
    """Cross-products of any number of grouping factors, nested or crossed.

    Attributes:
        stages: the chain, finest factor first.
        rest: (Q, Q), what the first factor leaves of Z_D'Z_D.
        tail: (Q, p + 1), likewise of Z_D'[X y].
        remainder: (p + 1, p + 1), likewise of [X y]'[X y].
        moments: for `start`.
        sizes: effects per term, static, in the order of the terms.
        order: the terms in the order of the stages and then the tail, static.
        levels: levels per term of the tail, static.
    """

    stages: tuple[Stage, ...]
    rest: Array
    tail: Array
    remainder: Array
    moments: Moments
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
        *parts, tail = jnp.split(inside, np.cumsum(counts))
        return tuple(parts), tail

    def _outside(self, array: Array, *axes: int) -> Array:
        """Parameters along `axes` from the order of the stages and tail to that of omega."""
        back = np.argsort(self._positions)
        for axis in axes:
            array = jnp.take(array, back, axis=axis)
        return array

    def _eliminate(self, omegas: tuple[Array, ...]) -> Eliminated:
        return eliminate(self.stages, omegas, self.rest, self.tail, self.remainder)

    def marginal(self, omega: Array) -> Marginal:
        chain, tail = self._split(omega)
        done = self._eliminate(chain)
        if not self.levels:
            return Marginal(done.logdet, done.T)
        solution = schur.solve(self.layout, tail, done.A, done.C)
        return Marginal(done.logdet + solution.logdet, done.T - solution.form)

    def project(self, omega: Array) -> Projection:
        chain, tail = self._split(omega)
        done = self._eliminate(chain)
        logdet, gram = done.logdet, done.T
        inverse, modes, cross = self.rest, self.tail, self.tail
        if self.levels:
            solution = schur.solve(self.layout, tail, done.A, done.C)
            logdet, gram = logdet + solution.logdet, gram - solution.form
            inverse, modes = solution.inverse, solution.modes
            cross = done.C - done.A @ modes
        crosses = substitute(self.stages, chain, done, modes)
        inner: Any = Inner((chain, tail), done, inverse, modes)
        return Projection(logdet, gram, inner, (*crosses, cross))  # pyright: ignore

    @property
    def written_out(self) -> bool:
        return False

    @property
    def costly(self) -> bool:
        return bool(self.levels)

    def slope(self, projection: Projection) -> Array:
        (chain, tail), done, R, _ = projection.inner

        def direct(chain: tuple[Array, ...]) -> Array:
            eliminated = self._eliminate(chain)
            return (
                eliminated.logdet + jnp.sum(R * eliminated.A) if self.levels else eliminated.logdet
            )

        slopes = list(jax.grad(direct)(chain))
        if self.levels:
            blocks = schur.inner_blocks(self.layout, tail, done.A, R)
            slopes.append(self.layout.trace_blocks(blocks))
        return self._outside(jnp.concatenate(slopes), 0)

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        (chain, tail), done, R, modes = projection.inner
        weight = (matrix * weights) @ matrix.T
        layout = self.layout
        half = modes @ weight

        def direct(chain: tuple[Array, ...]) -> Array:
            """Has all second derivatives in the chain but for those through R."""
            eliminated = self._eliminate(chain)
            value = eliminated.logdet + jnp.sum(weight * eliminated.T)
            if self.levels:
                value = value + jnp.sum((R + half @ modes.T) * eliminated.A)
                value = value - 2 * jnp.sum(half * eliminated.C)
            return value

        def left(chain: tuple[Array, ...]) -> tuple[Array, Array]:
            """What the tail sees of the chain."""
            eliminated = self._eliminate(chain)
            return eliminated.A, eliminated.C

        flat = jnp.concatenate(chain)
        parts = np.cumsum([omega.size for omega in chain])[:-1]
        units = linalg.alike(jnp.eye(flat.size, dtype=flat.dtype), flat)

        def derivatives(function: Any) -> Any:
            """Derivatives in the parameters of the chain, on the first axis."""
            _, push = jax.linearize(lambda flat: function(tuple(jnp.split(flat, parts))), flat)
            return jax.vmap(push)(units)

        block = jnp.concatenate(derivatives(jax.grad(direct)), axis=1)
        if not self.levels:
            return self._outside(block, 0, 1)

        W, B = schur.complements(layout, tail, done.A, R)
        cross = projection.cross[-1]
        products, steps, mixed = [], [], []
        for A_dot, C_dot in zip(*derivatives(left), strict=True):
            step = C_dot - A_dot @ modes
            product = A_dot @ R
            through = schur.times_complement(layout, tail, done.A, product, A_dot)
            by_tail = layout.trace_blocks(layout.diagonal_blocks(W.T, through))
            moved = layout.form(W.T @ step, cross)
            mixed.append(by_tail - 2 * jnp.einsum("muv,uv->m", moved, weight))
            products.append(product)
            steps.append(step)
        solved = [R @ step for step in steps]
        through_R = [
            [
                jnp.sum(product * other.T) + 2 * jnp.sum(weight * (step.T @ solution))
                for other, solution in zip(products, solved, strict=True)
            ]
            for product, step in zip(products, steps, strict=True)
        ]
        block = block - jnp.array(through_R)
        corner = layout.pair_trace(B, (cross @ weight) @ cross.T - B / 2)
        across = jnp.stack(mixed)
        whole = jnp.block([[block, across], [across.T, corner + corner.T]])
        return self._outside((whole + whole.T) / 2, 0, 1)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        (chain, _), done, R, _ = projection.inner
        k = matrix.shape[1]
        vectors = self._moved(self.combine(projection.cross, matrix))
        # B v = Z' V0^-1 Z v: the columns of Z v take the place of X and y.
        other = self._of_effects(vectors)
        eliminated = other._eliminate(chain)
        modes, tail = R, R
        if self.levels:
            modes = R @ eliminated.C
            tail = eliminated.C - done.A @ modes
        images = (*substitute(self.stages, chain, eliminated, modes), tail)
        m = natural.count_theta(self.sizes)
        spread = jnp.zeros((m * k, m * k), matrix.dtype)
        for left, right in zip(vectors[:-1], images[:-1], strict=True):
            spread = spread + jnp.einsum("aiJ,ajJ->ij", left, right)
        if self.levels:
            spread = spread + vectors[-1].T @ tail
        spread = ((spread + spread.T) / 2).reshape(m, k, m, k)
        return self._outside(spread, 0, 2)

    def _moved(self, vectors: tuple[Array, ...]) -> tuple[Array, ...]:
        """E_j v for each parameter j and each of k vectors: per stage (q, m k, J), and (Q, m k)."""
        total = natural.count_theta(self.sizes)
        moved = []
        start = 0
        for stage, part in zip(self.stages, vectors, strict=False):
            basis = jnp.asarray(natural.symmetric_basis(stage.sizes), part.dtype)
            own = jnp.einsum("jab,bkJ->ajkJ", basis, part)
            after = total - start - len(basis)
            own = jnp.pad(own, [(0, 0), (start, after), (0, 0), (0, 0)])
            moved.append(own.reshape(len(own), -1, stage.n_levels))
            start += len(basis)
        tail = vectors[-1]
        if self.levels:
            tail = jnp.pad(self.layout.moved(tail), [(0, 0), (start, 0), (0, 0)])
        return (*moved, tail.reshape(len(tail), total * vectors[-1].shape[1]))

    def _of_effects(self, vectors: tuple[Array, ...]) -> Crossed:
        """This structure with the columns of Z v, k of them, in the place of X and y."""
        *of_chain, of_tail = vectors
        k = of_chain[0].shape[1]
        columns = [linalg.matmul(self.stages[0].matrix, of_chain[0])]
        for stage, vector in zip(self.stages[1:], of_chain[1:], strict=True):
            columns.append(linalg.matmul(stage.matrix, vector))
        tail = self.rest @ of_tail if self.levels else jnp.zeros((0, k), self.rest.dtype)
        for i, stage in enumerate(self.stages):
            for j, (across, up) in enumerate(zip(stage.chain, stage.up, strict=True)):
                later = i + 1 + j
                columns[i] = columns[i] + linalg.matmul(across, of_chain[later][:, :, up])
                if i:  # what the first factor leaves is symmetric
                    back = linalg.matmul(linalg.transpose(across), of_chain[i])
                    count = self.stages[later].n_levels
                    columns[later] = columns[later] + collect(back, up, count)
            if self.levels:
                columns[i] = columns[i] + stage.from_tail(of_tail)
                if i:
                    tail = tail + stage.to_tail(stage.tail, of_chain[i], len(tail))
        return self.with_columns((*columns, tail), jnp.zeros((k, k), self.remainder.dtype))

    def start(self) -> Array:
        """Moment estimates of omega, (m,).

        The effects of a term, in a basis in which its columns of Z are orthogonal and the effects
        taken for uncorrelated, have sums of squares of Z'y / (1 + Z'Z); their expectations are
        linear in the variances.
        """
        zeros = [np.zeros(natural.count_theta(stage.sizes)) for stage in self.stages]
        done = self._eliminate(tuple(jnp.asarray(zero, self.remainder.dtype) for zero in zeros))
        sums: list[Array] = []
        for k, (stage, couplings) in enumerate(zip(self.stages, done.couplings, strict=True)):
            whole = couplings.columns[:, -1]
            if k == 0:
                whole = jnp.einsum("abJ,aJ->bJ", stage.matrix, whole)
            sums += jnp.split(whole, np.cumsum(stage.sizes)[:-1])
        if self.levels:
            sums += self.layout.split(done.C[:, -1])
        moments = self.moments
        terms = zip(sums, moments.bases, moments.shrinkage, strict=True)
        forms = [
            jnp.sum((basis.T @ part * shrinkage) ** 2, axis=1) for part, basis, shrinkage in terms
        ]
        mean = done.T[-1, -1] / moments.n
        solution = moments.inverse @ jnp.concatenate([*forms, mean[None]])
        relative = jnp.maximum(solution[:-1], 0.0) / jnp.maximum(solution[-1], 0.1 * mean)
        omegas = []
        first = 0
        for basis in moments.bases:
            q = len(basis)
            matrix = (basis * relative[first : first + q]) @ basis.T
            omegas.append(matrix[natural.triangle(q)])
            first += q
        return self._outside(jnp.concatenate(omegas), 0)

    def _forms(self, cross: tuple[Array, ...], matrix: Array) -> Array:
        """matrix' D' E_i D matrix in the order of the stages and the tail."""
        forms = []
        for stage, part in zip(self.stages, cross, strict=False):
            part = jnp.einsum("auJ,uv->avJ", part, matrix)
            q, k, _ = part.shape
            products = jnp.einsum("auJ,bvJ->abuv", part, part).reshape(q * q, k * k)
            basis = natural.symmetric_basis(stage.sizes).reshape(-1, q * q)
            forms.append((jnp.asarray(basis, part.dtype) @ products).reshape(-1, k, k))
        if self.levels:
            tail = cross[-1] @ matrix
            forms.append(self.layout.form(tail, tail))
        return jnp.concatenate(forms)

    def form(self, cross: tuple[Array, ...], matrix: Array) -> Array:
        return self._outside(self._forms(cross, matrix), 0)

    def modes(self, omega: Array, cross: tuple[Array, ...]) -> tuple[Array, ...]:
        chain, tail = self._split(omega)
        found: list[Array] = []
        for stage, vector, part in zip(self.stages, chain, cross, strict=False):
            whole = linalg.matmul(stage.omega(vector), part)[:, 0]
            pieces = jnp.split(whole, np.cumsum(stage.sizes)[:-1])
            found += [piece.T for piece in pieces]
        if self.levels:
            found += self.layout.modes(tail, cross[-1][:, 0])
        return tuple(found[self.order.index(k)] for k in range(len(self.order)))

    def posterior(self, omega: Array, factors: tuple[Array, ...]) -> Posterior:
        chain, tail = self._split(omega)
        done = self._eliminate(chain)
        gains, own = [], []
        first = 0
        for k, (stage, vector) in enumerate(zip(self.stages, chain, strict=True)):
            omega_k = stage.omega(vector)
            terms = self.order[first : first + len(stage.sizes)]
            first += len(stage.sizes)
            gain = linalg.matmul(omega_k, done.solved[k])
            gains.append(gain)
            if k == 0:
                roots = jax.scipy.linalg.block_diag(*(factors[term] for term in terms))
                own.append(linalg.conditional_variance(stage.matrix, roots))
            else:
                own.append((gain + linalg.transpose(gain)) / 2)
        R = self.rest
        if self.levels:
            R = schur.solve(self.layout, tail, done.A, done.C).inverse
        chains = tuple(couplings.chain for couplings in done.couplings)
        tails = tuple(couplings.tail for couplings in done.couplings)
        return Posterior(tuple(gains), tuple(own), chains, tails, R)

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
