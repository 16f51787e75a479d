r"""Several random terms, some with known covariances of their levels: one dense matrix of the rows.

V0 = I + sum_i omega_i D_i with known symmetric matrices: D_i is Z_a K Z_a' for the variance of an
effect a, Z_a K Z_b' + Z_b K Z_a' for the covariance of two, and K is the identity for an ordinary
term. Where there are fewer random effects than rows, everything is projected on the span of Z
first: the order r is the smaller of the two numbers. An evaluation is one Cholesky factorisation
and one inverse, r^3. Second derivatives cost two thirds of that for every D_i more; on the way to
the optimum average information takes their place (Gilmour, Thompson and Cullis 1995, Biometrics
51:1440).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxreml.backend.arrays import leaves, namespace, on_host, still
from jaxreml.backend.lazy import jnp, record
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.structures.base import Marginal, OfColumns, Projection, Rows, Terms
from jaxreml.model.structures.grouped import Partition
from jaxreml.model.structures.spans import Span, spanned

Array = Any  # NumPy's or JAX's
MOST_ROWS = 5000  # order of the matrices: each of them is 200 MB there
SAME = 1e-9  # squared sine of the angle between D_i and the span of those before that is none
ROW_ENTRIES = 10**7  # of rows by r at a time


@record
@dataclass(frozen=True)
class Loadings:
    """One random term in the span that the structure works in: Z = Q F.

    Attributes:
        kernel: (L, L), or None for independent levels.
        seen: (J,), which of the L levels have rows.
        factors: (r, q, J), F; None where each of its rows has effects of one level only: then
        rows, columns: (r,) by the J levels, and (r, q), what F is made of; else None.
        n_levels: L, static.
    """

    kernel: Any
    seen: Any
    factors: Any
    rows: Any
    columns: Any
    n_levels: int = field(metadata={"static": True})

    def across(self, vectors: Array) -> Array:
        """K F' v of all L levels, (q, L, k), for (r, k) vectors."""
        if self.factors is not None:
            xp = namespace(self.factors, vectors)
            own = xp.einsum("raj,rk->ajk", self.factors, vectors)
        else:
            parts = [self.rows.sums(column[:, None] * vectors) for column in self.columns.T]
            own = namespace(*parts).stack(parts)
        if self.kernel is None:
            return own
        return namespace(own).einsum("lj,ajk->alk", self.kernel[:, self.seen], own)

    def matrix(self, codes: np.ndarray) -> np.ndarray:
        """Rows (k, q, r) of K F' for some of the L levels. On the host."""
        kernel = None if self.kernel is None else np.asarray(self.kernel)
        if self.factors is not None:
            factors = np.asarray(self.factors)
            if kernel is None:
                return factors[:, :, codes].transpose(2, 1, 0)
            return np.einsum("lj,raj->lar", kernel[np.ix_(codes, self.seen)], factors)
        places = np.asarray(self.seen)[self.rows.codes]
        if kernel is None:
            own = (places == codes[:, None]).astype(float)
        else:
            own = kernel[np.ix_(codes, places)]
        return own[:, None] * np.asarray(self.columns).T

    def diagonal(self) -> Array:
        """(L,), the diagonal of K."""
        if self.kernel is None:
            return np.ones(self.n_levels)
        return linalg.diagonal(self.kernel)

    def matrices(self) -> Iterator[Array]:
        """D_i, (r, r) each."""
        q = (self.factors if self.factors is not None else self.columns).shape[1]
        for a, b in zip(*natural.triangle(q), strict=True):
            half = self._product(a, b)
            yield half if a == b else half + half.T

    def _product(self, a: int, b: int) -> Array:
        """F_a K F_b'."""
        if self.factors is not None:
            left, right = self.factors[:, a], self.factors[:, b]
            if self.kernel is None:
                return left @ right.T
            return left @ (self.kernel[np.ix_(self.seen, self.seen)] @ right.T)
        codes, columns = self.rows.codes, self.columns
        xp = namespace(codes, columns, *([] if self.kernel is None else [self.kernel]))
        if self.kernel is None:
            same = xp.asarray(codes[:, None] == codes).astype(columns.dtype)
        else:
            places = xp.asarray(self.seen)[codes]
            same = xp.asarray(self.kernel)[places[:, None], places]
        same *= columns[:, a, None]  # in place on the host
        same *= columns[:, b]
        return same


@record
@dataclass(frozen=True)
class Linear(OfColumns):
    """Cross-products in a span of order r, and the matrices that V0 is linear in.

    The projection's `inner` is P^-1 and its `cross` P^-1 c, P = I + sum omega_i D_i.

    Attributes:
        matrices: (m, r, r), D_i.
        traces: (m + 1, m + 1), tr(D_i D_j), the identity of all rows last.
        scores: (r, p + 1), Q'[X y].
        remainder: (p + 1, p + 1), cross-products of [X y] minus its projection on Q.
        terms: `Loadings` per term.
        sizes: effects per term, static.
    """

    matrices: Array
    traces: Array
    scores: Array
    remainder: Array
    terms: tuple[Loadings, ...]
    sizes: tuple[int, ...] = field(metadata={"static": True})

    costly = True
    written_out = True

    @property
    def evaluated(self) -> Any:
        return self.matrices, self.scores, self.remainder

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        xp = namespace(omega, self.matrices)
        inner = xp.tensordot(omega, self.matrices, axes=1)
        factor = linalg.cholesky(linalg.plus_identity(inner))
        return factor, 2 * xp.sum(xp.log(xp.diagonal(factor)))

    def marginal(self, omega: Array) -> Marginal:
        factor, logdet = self._factorise(omega)
        half = linalg.solve_lower(factor, self.scores)
        return Marginal(logdet, self.remainder + half.T @ half)

    def project(self, omega: Array) -> Projection:
        factor, logdet = self._factorise(omega)
        half = linalg.solve_lower(factor, self.scores)
        cross = linalg.solve_lower(factor, half, transposed=True)
        gram = self.remainder + half.T @ half
        return Projection(logdet, gram, linalg.inverse_of_factor(factor), cross)

    def slope(self, projection: Projection) -> Array:
        return self.matrices.reshape(len(self.matrices), -1) @ projection.inner.reshape(-1)

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        inner, xp = projection.inner, namespace(projection.inner)
        moved = [own @ inner for own in self.matrices]
        m = len(moved)
        traces = [[xp.sum(moved[i] * moved[j].T) for j in range(i + 1)] for i in range(m)]
        lower = [[traces[max(i, j)][min(i, j)] for j in range(m)] for i in range(m)]
        images = self._images(projection.cross @ matrix)  # (m, r, k)
        flat = (images * xp.sqrt(weights)).transpose(1, 0, 2)  # weights are not negative
        flat = flat.reshape(len(inner), -1)
        forms = (flat.T @ (inner @ flat)).reshape(m, len(weights), m, len(weights))
        return 2 * xp.einsum("ivjv->ij", forms) - xp.asarray(lower)

    def _images(self, vectors: Array) -> Array:
        """D_i v, (m, r, k)."""
        return namespace(self.matrices, vectors).stack([own @ vectors for own in self.matrices])

    def form(self, cross: Array, matrix: Array) -> Array:
        solved = cross @ matrix
        return namespace(solved).einsum("ru,irv->iuv", solved, self._images(solved))

    def spread(self, projection: Projection, matrix: Array) -> Array:
        images = self._images(projection.cross @ matrix).transpose(1, 0, 2)
        flat = images.reshape(len(images), -1)
        forms = flat.T @ (projection.inner @ flat)
        return forms.reshape(*images.shape[1:], *images.shape[1:])

    def start(self) -> Array:
        """Moment estimates that take the residuals of least squares for the errors (Haseman and
        Elston 1972, Behavior Genetics 2:3), or equal shares where they have no residual variance.
        """
        xp = namespace(self.scores, self.traces)
        y, m = self.scores[:, -1], len(self.matrices)
        forms = self._images(y[:, None])[:, :, 0] @ y
        total = y @ y + self.remainder[-1, -1]
        # Traced matrices may be those of the residuals, which cannot be refused.
        inverse, _ = linalg.flat_inverse(self.traces, linalg.diagonal(self.traces), SAME)
        found = inverse @ xp.concatenate([forms, total[None]])
        sigma2 = xp.where(found[-1] > 0, found[-1], 1.0)
        variances = natural.effects_of_omega(self.sizes)
        equal = xp.asarray(np.equal(*variances) / m)
        return xp.where(found[-1] > 0, found[:-1] / sigma2, equal)

    @property
    def columns(self) -> Array:
        return self.scores

    def with_columns(self, columns: Array, remainder: Array) -> Linear:
        return replace(self, scores=columns, remainder=remainder)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        matrices = natural.symmetric_matrices(omega, self.sizes)
        parts = [own.across(cross)[:, :, 0] for own in self.terms]
        return tuple(part.T @ matrix for part, matrix in zip(parts, matrices, strict=True))

    def posterior(
        self, projection: Projection, factors: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """P^-1, and per term Omega."""
        return projection.inner, tuple(factor @ factor.T for factor in factors)

    def variances(self, posterior: Any) -> tuple[np.ndarray, ...]:
        inner, matrices = np.asarray(posterior[0]), [np.asarray(own) for own in posterior[1]]
        found = []
        for own, matrix in zip(self.terms, matrices, strict=True):
            parts = [np.zeros((0, *matrix.shape))]
            step = max(1, ROW_ENTRIES // (len(inner) * len(matrix)))
            diagonal = np.asarray(own.diagonal())
            for start in range(0, own.n_levels, step):
                codes = np.arange(start, min(start + step, own.n_levels))
                rows = own.matrix(codes)
                moved = (rows.reshape(-1, len(inner)) @ inner).reshape(rows.shape)
                known = np.einsum("lar,lbr->lab", moved, rows)
                parts.append(diagonal[codes, None, None] * matrix - matrix @ known @ matrix)
            whole = np.concatenate(parts)
            np.einsum("laa->la", whole)[:] = np.maximum(np.einsum("laa->la", whole), 0.0)
            found.append(whole)
        return tuple(found)

    def row_variances(self, posterior: Any, rows: Rows) -> np.ndarray:
        inner, matrices = np.asarray(posterior[0]), [np.asarray(own) for own in posterior[1]]
        count = len(rows[0][0])
        found = np.empty(count)
        step = max(1, ROW_ENTRIES // (len(inner) * max(self.sizes)))
        for start in range(0, count, step):
            part = slice(start, start + step)
            prior, along = 0.0, 0.0
            for own, matrix, (codes, effects) in zip(self.terms, matrices, rows, strict=True):
                here, moved = codes[part], np.asarray(effects)[part] @ matrix
                variances = np.asarray(own.diagonal())[here]
                prior = prior + variances * np.sum(moved * np.asarray(effects)[part], axis=1)
                along = along + np.einsum("ka,kar->kr", moved, own.matrix(here))
            found[part] = prior - np.sum((along @ inner) * along, axis=1)
        return np.maximum(found, 0.0)


@record
@dataclass(frozen=True)
class LinearBasis:
    """The random terms in the span that they are worked on in.

    Attributes:
        span: Q.
        matrices, traces, terms: as in `Linear`.
    """

    span: Span
    matrices: Any
    traces: Any
    terms: tuple[Loadings, ...]

    @staticmethod
    def of(
        effects: Terms,
        kernels: Sequence[Any],
        scales: Sequence[Any],
        names: Sequence[str],
        n: Any,
    ) -> LinearBasis:
        """Make the matrices.

        Args:
            effects: the columns of all terms, scaled, NumPy or traced.
            kernels: per term (L, L), NumPy or traced, or None.
            scales: per term (), what its effects are to be divided by, or None: a traced number
                that would make them traced.
            names: of the grouping factors.
            n: how many of the rows are not left out.

        Raises:
            DataError: matrices that are too large, or that cannot be told apart if they are not
                traced.
        """
        span, parts, order = spanned(effects, MOST_ROWS)
        parts = [part.over(scale) for part, scale in zip(parts, scales, strict=True)]
        terms = tuple(
            Loadings(
                kernel,
                part.seen,
                part.factors,
                None if part.codes is None else Partition(part.codes, len(part.seen)),
                part.columns,
                n_levels,
            )
            for part, kernel, (_, _, n_levels) in zip(parts, kernels, effects, strict=True)
        )
        sizes = [columns.shape[1] * (columns.shape[1] + 1) // 2 for _, columns, _ in effects]
        matrices = _stacked(terms, sum(sizes), order)
        traces = _traces(still(matrices), n)
        if on_host(traces):
            _require_distinct(traces, [*map(str, np.repeat(names, sizes)), "the residual"])
        return LinearBasis(span, matrices, traces, terms)

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores Q'columns, (r, k), and what Q leaves, (n, k)."""
        return self.span.project(columns)

    def scores(self, columns: Any) -> Any:
        """Q'columns, (r, k)."""
        return self.span.scores(columns)

    def products(self, columns: Any) -> None:
        """All derivatives are those of `matrices`."""

    def structure(
        self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Linear:
        """The structure of columns."""
        return Linear(self.matrices, self.traces, scores, remainder, self.terms, sizes)


def _stacked(terms: Sequence[Loadings], count: int, order: int) -> Array:
    """D_i of all terms, (count, order, order)."""
    found = (matrix for own in terms for matrix in own.matrices())
    if not on_host(*leaves(tuple(terms))):
        return jnp.stack(list(found))
    matrices = np.empty((count, order, order))
    for place, matrix in enumerate(found):  # one at a time, as they are large
        matrices[place] = matrix
    return matrices


def _traces(matrices: Array, n: Any) -> Array:
    """tr(D_i D_j), with the identity of n rows last."""
    flat = matrices.reshape(len(matrices), -1)
    xp = namespace(matrices, n)
    traces = xp.einsum("irr->i", matrices)
    return linalg.border(flat @ flat.T, traces, xp.asarray(n, matrices.dtype))


def _require_distinct(traces: np.ndarray, names: list[str]) -> None:
    """Refuse a matrix that is a combination of the others, the identity among them, by names."""
    lengths = np.sqrt(np.diagonal(traces))
    correlations = traces / lengths / lengths[:, None]
    values, vectors = np.linalg.eigh(correlations)
    if values[0] > SAME:
        return
    share = np.abs(vectors[:, 0])
    parts = dict.fromkeys(names[k] for k in np.flatnonzero(share > 0.1 * share.max()))
    raise DataError(
        f"the covariances of {' and '.join(parts)} cannot be told apart in these rows: they mean "
        "the same. Leave one of them out"
    )
