"""One grouping factor: V0 is block-diagonal over its levels.

Every random term is on the same factor, with q effects altogether. All arrays have the levels on
their last axis, which is the one that vectorises. A level without rows (padding, to stack designs
of unequal numbers of levels for `vmap`) has F = 0 and c = 0 and contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import among, namespace, on_host, still
from jaxreml.backend.lazy import deferred, jax, jnp, record
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.response import Response
from jaxreml.model.structures.base import Explicit, Marginal, OfColumns, Projection, Rows

Array = Any  # NumPy's or JAX's

# A column whose part outside the span of the columns before it, within a level, is shorter than
# this fraction of itself is collinear there: the square of it is below rounding error.
COLLINEAR = 1e-10
SAME = 1e-11  # entries of F that differ by less, relative to the largest, count as equal
FEW_EFFECTS = 4  # up to which traces of pairs are one linear map


class Levels(Explicit):
    """What `Grouped` and `GroupedBatch` have in common; lanes may follow the levels' axis."""

    factors: Array
    sizes: tuple[int, ...]

    @property
    def _basis(self) -> Any:
        """The matrices E_i, flattened: (m, q * q)."""
        basis = natural.symmetric_basis(self.sizes)
        return basis.reshape(len(basis), -1).astype(self.factors.dtype)

    def _omega(self, omega: Array) -> Array:
        """Omega, (q, q, 1), the same for all levels."""
        q = sum(self.sizes)
        flat = namespace(omega).tensordot(self._basis.T, omega, axes=1)
        return flat.reshape(q, q, 1, *omega.shape[1:])

    def _cholesky(self, omega: Array) -> Array:
        """Factors of P = I + F Omega F', (q, q, J), for Omega (q, q, 1)."""
        xp = namespace(omega)
        if omega.ndim == 3 and xp is np:  # one product for all levels
            scaled = np.tensordot(omega[:, :, 0], self.factors, (0, 1)).swapaxes(0, 1)
        else:
            scaled = linalg.matmul(self.factors, omega)
        inner = linalg.matmul(scaled, linalg.transpose(self.factors))
        return linalg.cholesky(inner + linalg.eye_like(inner))

    def trace(self, inner: Array) -> Array:
        total = inner.sum(axis=2)
        return namespace(inner).tensordot(self._basis, total.reshape(-1, *total.shape[2:]), axes=1)

    def pair_trace(self, left: Array, right: Array) -> Array:
        lower = natural.triangle(sum(self.sizes))
        products = linalg.row_products(left[lower], right[lower])
        if sum(self.sizes) > FEW_EFFECTS:
            return sum_pairs(products, self.sizes)
        flat = products.reshape(-1, *products.shape[2:])
        traces = namespace(flat).tensordot(pairing(self.sizes).astype(flat.dtype), flat, axes=1)
        m = natural.count_theta(self.sizes)
        return traces.reshape(m, m, *flat.shape[1:])

    def spread(self: Any, projection: Projection, matrix: Array) -> Array:
        chosen = self.combine(projection.cross, matrix)
        xp, basis = namespace(chosen), natural.symmetric_basis(self.sizes).astype(chosen.dtype)
        moved = xp.einsum("iab,bkJ...->aikJ...", basis, chosen)
        flat = moved.reshape(len(moved), -1, *moved.shape[3:])
        images = linalg.matmul(projection.inner, flat).reshape(moved.shape)
        return xp.einsum("aikJ...,ajlJ...->ikjl...", moved, images)

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        modes = linalg.matmul(self._omega(omega), cross)[:, 0]
        parts = namespace(modes).split(modes, np.cumsum(self.sizes)[:-1])
        return tuple(part.swapaxes(0, 1) for part in parts)

    def posterior_by_omega(self, inner: Array, omega: Array) -> Array:
        """Omega - Omega B Omega."""
        matrix = self._omega(omega)
        return matrix - linalg.matmul(linalg.matmul(matrix, inner), matrix)


class Products(NamedTuple):
    """Cross-products of traced effects with what they meet: all that the criterion depends on.

    Attributes:
        effects: (q, q, J), Z'Z.
        columns: (q, p + 1, J), Z'[X y].
        rest: (p + 1, p + 1), [X y]'[X y].
    """

    effects: Array
    columns: Array
    rest: Array


@lru_cache
def _differentiable() -> Any:
    rule = jax.custom_jvp(_projection)
    rule.defjvp(_projection_jvp)
    return rule


def _projection(
    omega: Array, factors: Array, scores: Array, remainder: Array, products: Products
) -> Projection:
    """`Grouped.project` for effects that are traced; `omega` is Omega, (q, q, 1).

    Values come from Z = Q F, where nothing cancels. Q and F have no derivatives where effects tie
    within a level, though the criterion has: so derivatives are taken in `products`, which alone
    it depends on.
    """
    return Grouped(factors, scores, remainder, (len(omega),))._of_matrix(omega)


@deferred(usual_arithmetic)
def _projection_jvp(primals, tangents):
    """With B and D the projection's, A and C the products and M = (I + A Omega)^-1 = I - B Omega:
    B = M A, D = M C, log|V| = log|I + A Omega| and gram = [X y]'[X y] - C'Omega D."""
    found = _differentiable()(*primals)
    omega, omega_dot = primals[0], tangents[0]
    dot = tangents[4]
    inner, cross = found.inner, found.cross
    modes = linalg.matmul(omega, cross)
    kept = linalg.eye_like(inner) - linalg.matmul(inner, omega)
    moved = linalg.matmul(inner, omega_dot)
    of_modes = linalg.matmul(dot.effects, modes)

    def total(left: Array, right: Array) -> Array:
        """Sum of left'right over the levels."""
        return jnp.einsum("aiJ,ajJ->ij", left, right)

    traces = linalg.matmul(omega, linalg.matmul(kept, dot.effects)) + moved
    mixed = total(modes, dot.columns)
    gram = dot.rest - mixed - mixed.T + total(modes, of_modes)
    return found, Projection(
        jnp.sum(linalg.diagonal(traces)),
        gram - total(cross, linalg.matmul(omega_dot, cross)),
        linalg.matmul(linalg.matmul(kept, dot.effects), linalg.transpose(kept))
        - linalg.matmul(moved, inner),
        linalg.matmul(kept, dot.columns - of_modes) - linalg.matmul(moved, cross),
    )


@record
@dataclass(frozen=True)
class Grouped(OfColumns, Levels):
    """Cross-products of one grouping factor with J levels; of many data sets with the lanes of all
    arrays on a last axis.

    Attributes:
        factors: (q, q, J), F of each level's Z = Q F, upper triangular.
        scores: (q, p + 1, J), Q'[X y].
        remainder: (p + 1, p + 1), cross-products of [X y] minus its projection on Q.
        sizes: effects per term, static; they sum to q.
        products: given if effects are traced; the other arrays have no derivatives then.
        counts: (J,), how many levels with this F each stands for in log|V0|, as in `GroupedBatch`;
            None for one each.
    """

    factors: Array
    scores: Array
    remainder: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})
    products: Products | None = None
    counts: Array | None = None

    @cached_property
    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """The class of each level, (J,), of those that have the same F, and the first level of each
        class, (C,). On the host."""
        classes = equal_levels(np.asarray(self.factors))
        return classes, np.unique(classes, return_index=True)[1]

    def repeat(self, inner: Array) -> Array:
        return inner if self.counts is None else inner * self.counts

    def _factorise(self, omega: Array) -> tuple[Array, Array]:
        factor = self._cholesky(omega)
        xp = namespace(factor)
        logs = self.repeat(sum(xp.log(factor[i, i]) for i in range(len(factor))))
        return factor, 2 * xp.sum(logs, axis=0)

    def _gram(self, scores: Array) -> Array:
        """The remainder plus the cross-products of scores (q, p + 1, J)."""
        return self.remainder + sum(linalg.row_products(own, own) for own in scores)

    def marginal(self, omega: Array) -> Marginal:
        if self.products is not None:
            return Marginal(*self.project(omega)[:2])
        factor, logdet = self._factorise(self._omega(omega))
        return Marginal(logdet, self._gram(linalg.solve_lower(factor, self.scores)))

    def project(self, omega: Array) -> Projection:
        matrix = self._omega(omega)
        if self.products is None:
            return self._of_matrix(matrix)
        return _differentiable()(matrix, self.factors, self.scores, self.remainder, self.products)

    def _of_matrix(self, omega: Array) -> Projection:
        """`project` at Omega, (q, q, 1)."""
        factor, logdet = self._factorise(omega)
        loadings = linalg.solve_lower(factor, self.factors)
        scores = linalg.solve_lower(factor, self.scores)
        across = linalg.transpose(loadings)
        inner, cross = linalg.matmul(across, loadings), linalg.matmul(across, scores)
        return Projection(logdet, self._gram(scores), inner, cross)

    def whitening(self, omega: Array) -> tuple[Array, Array]:
        """L^-1, (q, q, J), of P = L L', and the logarithms of the determinants of P, (J,)."""
        factor = self._cholesky(self._omega(omega))
        xp = namespace(factor)
        identity = xp.broadcast_to(linalg.eye_like(factor), factor.shape)
        logs = 2 * xp.sum(xp.log(linalg.diagonal(factor)), axis=0)
        return linalg.solve_lower(factor, identity), logs

    def explained(self, omega: Array) -> tuple[Array, Array]:
        """Omega F' P^-1, which takes scores to modes, and B, (q, q, J) each."""
        matrix, inverse = self._omega(omega), self.whitening(omega)[0]
        loadings = linalg.matmul(inverse, self.factors)
        across = linalg.transpose(loadings)
        weights = linalg.matmul(matrix, linalg.matmul(across, inverse))
        return weights, linalg.matmul(across, loadings)

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        cross = self.combine(cross, matrix)
        weighted = cross * weights[:, None]
        return (weighted[:, None] * cross[None]).sum(axis=2)

    def form(self, cross: Array, matrix: Array) -> Array:
        cross = self.combine(cross, matrix)
        forms = []
        for a, b in zip(*natural.effects_of_omega(self.sizes), strict=True):
            left, right = cross[a], cross[b]
            product = linalg.row_products(left, left if a == b else right)
            forms.append(product if a == b else product + linalg.transpose(product))
        return namespace(cross).stack(forms)

    def padded(self, n_levels: int) -> Grouped:
        """With levels without rows, up to `n_levels`; on the host."""
        pad = [(0, 0), (0, 0), (0, n_levels - self.factors.shape[-1])]
        factors, scores = (np.pad(part, pad) for part in (self.factors, self.scores))
        return replace(self, factors=factors, scores=scores)  # pyright: ignore

    def among(self, places: np.ndarray) -> Grouped:
        """Some of the lanes, on the host."""
        factors, scores, remainder = among((self.factors, self.scores, self.remainder), places)
        return replace(self, factors=factors, scores=scores, remainder=remainder)  # pyright: ignore

    @property
    def columns(self) -> Array:
        return self.scores

    def with_columns(self, columns: Array, remainder: Array) -> Grouped:
        return replace(self, scores=columns, remainder=remainder, products=None)

    def respond(self, p: int, response: Response) -> Grouped:
        found = super().respond(p, response)
        if self.products is None or response.products is None:
            return found
        of_effects, of_x, rest = response.products
        effects, columns, products = self.products
        columns = jnp.concatenate([columns[:, :p], of_effects[:, None]], axis=1)
        rest = linalg.border(products[:p, :p], of_x, rest)
        return replace(found, products=Products(effects, columns, rest))

    def posterior(self, projection: Projection, factors: tuple[Array, ...]) -> Array:
        return linalg.conditional_variance(self.factors, linalg.block_diagonal(list(factors)))

    def variances(self, posterior: Array) -> tuple[np.ndarray, ...]:
        whole = np.asarray(posterior)
        ends = np.cumsum((0, *self.sizes))
        return tuple(np.moveaxis(whole[a:b, a:b], 2, 0) for a, b in pairwise(ends))

    def row_variances(self, posterior: Array, rows: Rows) -> np.ndarray:
        whole = np.asarray(posterior)
        owners = [(codes, column) for codes, effects in rows for column in np.asarray(effects).T]
        total = np.zeros(len(rows[0][0]))
        for a, (codes, left) in enumerate(owners):
            for b, (others, right) in enumerate(owners):
                total += left * whole[a, b, codes] * right * (codes == others)
        return total


def equal_levels(factors: np.ndarray) -> np.ndarray:
    """Classes (J,) of levels that have the same F, of (q, q, J)."""
    q, _, n_levels = factors.shape
    largest = np.abs(factors).max(axis=2, keepdims=True)
    rounded = np.round(factors / np.where(largest > 0, largest, 1.0) / SAME)
    flat = rounded.reshape(q * q, n_levels)
    flat = flat[np.any(flat != flat[:, :1], axis=1)]  # the others tell no levels apart
    # By sums of odd multiples modulo 2^64, which differ where levels do, but for an accident.
    odd = np.random.default_rng(0).integers(2**63, size=(len(flat), 1), dtype=np.uint64) * 2 + 1
    marks = (flat.astype(np.int64).astype(np.uint64) * odd.astype(np.uint64)).sum(axis=0)
    _, first, classes = np.unique(marks, return_index=True, return_inverse=True)
    if not (flat == flat[:, first[classes]]).all():
        classes = np.unique(flat.T, axis=0, return_inverse=True)[1]
    return classes.ravel()


def sum_pairs(products: Array, sizes: tuple[int, ...]) -> Array:
    """tr(E_i L E_j R), (m, m, ...), of the products (t, t, ...) of the entries of their lower
    triangles, t = q (q + 1) / 2: `pairing` for many effects. With E_i = e_a e_b' + e_b e_a' and
    E_j = e_c e_d' + e_d e_c' it is L_bc R_da + L_ac R_db + L_bd R_ca + L_ad R_cb."""
    place = natural.places(sum(sizes))
    rows, columns = natural.effects_of_omega(sizes)
    a, b, c, d = rows[:, None], columns[:, None], rows, columns
    once = np.where(rows == columns, 0.5, 1.0)
    once = (once[:, None] * once).reshape(len(rows), len(rows), *[1] * (products.ndim - 2))
    quarters = (
        products[place[first], place[second]]
        for first, second in (
            ((b, c), (d, a)),
            ((a, c), (d, b)),
            ((b, d), (c, a)),
            ((a, d), (c, b)),
        )
    )
    return once.astype(products.dtype) * sum(quarters)


@lru_cache
def pairing(sizes: tuple[int, ...]) -> np.ndarray:
    """tr(E_i L E_j R) for symmetric L and R as a linear map of the products of the entries of
    their lower triangles: (m m, t t), t = q (q + 1) / 2."""
    q = sum(sizes)
    place = natural.places(q)
    basis = natural.symmetric_basis(sizes)
    m, t = len(basis), q * (q + 1) // 2
    traces = np.zeros((m, m, t, t))
    for i, j in np.ndindex(m, m):
        for a, b in np.argwhere(basis[i]):
            for c, d in np.argwhere(basis[j]):
                traces[i, j, place[b, c], place[d, a]] += 1
    return traces.reshape(m * m, t * t)


@record
@dataclass(frozen=True)
class Partition:
    """Rows by the levels of a factor.

    Attributes:
        codes: (n,) integers 0..J-1.
        n_levels: J, static.
    """

    codes: Any
    n_levels: int = field(metadata={"static": True})

    @cached_property
    def _by_level(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order of the levels, and where levels start and end."""
        ends = np.append(0, np.cumsum(np.bincount(self.codes, minlength=self.n_levels)))
        return np.argsort(self.codes, kind="stable"), ends

    def spread(self, values: np.ndarray) -> Any:
        """(n,) numbers of the rows as a sparse matrix (J, n), each in the row of its level."""
        import scipy.sparse

        order, ends = self._by_level
        return scipy.sparse.csr_matrix((values[order], order, ends), (self.n_levels, len(order)))

    @cached_property
    def _indicators(self) -> Any:
        return self.spread(np.ones(len(self.codes)))

    def sums(self, values: Any) -> Any:
        """Sums over the rows of each level, (n, ...) to (J, ...), NumPy or traced."""
        if not on_host(values, self.codes):
            return jax.ops.segment_sum(values, self.codes, self.n_levels)
        if values.ndim == 1:
            sums = np.bincount(self.codes, values, self.n_levels)
        else:
            sums = self._indicators @ values
        return sums.astype(values.dtype, copy=False)


@record
@dataclass(frozen=True)
class GroupedBasis:
    """The within-level orthogonal factorisation Z = Q F.

    Attributes:
        rows: by level.
        directions: (n, q), Q.
        factors: (q, q, J), F.
        effects: (n, q), Z where it is traced: Q and F have no derivatives then,
            `Grouped.products` has.
    """

    rows: Partition
    directions: Any
    factors: Any
    effects: Any = None

    @staticmethod
    def of(codes: Any, effects: Any, n_levels: int) -> GroupedBasis:
        """Factorise columns (n, q), scaled, in levels 0..J-1 of the rows; both NumPy or traced."""
        traced = not on_host(effects)
        by_level = Partition(codes.astype(natural.INDEX), n_levels)
        places = _places(by_level, effects) if on_host(effects, codes) else None
        if places is not None:
            return Visits.at(by_level, effects, places)
        xp = namespace(effects, codes)
        collinear = linalg.negligible(COLLINEAR, effects.dtype)
        directions: list[Any] = []
        entries: dict[tuple[int, int], Any] = {}
        for k, column in enumerate(still(effects).T):
            length = xp.sqrt(by_level.sums(column * column))
            for _ in range(2):  # orthogonalising twice is enough (Kahan, in Parlett 1980)
                for i, direction in enumerate(directions):
                    share = by_level.sums(direction * column)
                    column = column - direction * share[codes]
                    entries[i, k] = entries.get((i, k), 0.0) + share
            rest = xp.sqrt(by_level.sums(column * column))
            rest = xp.where(rest <= collinear * length, 0.0, rest)
            entries[k, k] = rest
            inverse = xp.where(rest > 0, 1 / xp.where(rest > 0, rest, 1.0), 0.0)
            directions.append(column * inverse[codes])
        none = xp.zeros_like(entries[0, 0])
        places = range(len(directions))
        factors = xp.stack([xp.stack([entries.get((i, k), none) for k in places]) for i in places])
        stacked = xp.stack(directions, axis=1)
        return GroupedBasis(by_level, stacked, factors, effects if traced else None)

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores Q'columns, (q, k, J), and what Q leaves, (n, k), NumPy or traced."""
        rest = columns if self.effects is None else still(columns)
        scores = []
        for direction in self.directions.T:
            score = self.rows.sums(direction[:, None] * rest)
            rest = rest - direction[:, None] * score[self.rows.codes]
            scores.append(score.T)
        return namespace(*scores).stack(scores), rest

    @cached_property
    def _transposed(self) -> Any:
        """Q', (J, n) for each direction, sparse. On the host."""
        return [self.rows.spread(direction) for direction in self.directions.T]

    def scores(self, columns: Any) -> Any:
        """Q'columns with the columns last, (q, J, k): all that one pass over them gives."""
        if on_host(columns):
            return np.stack([own @ columns for own in self._transposed])
        return jnp.stack([self.rows.sums(own[:, None] * columns) for own in self.directions.T])

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Q scores, (n, k), of (q, J, k) on the host."""
        pairs = zip(self.directions.T, scores, strict=True)
        return sum(own[:, None] * part[self.rows.codes] for own, part in pairs)  # pyright: ignore

    def products(self, columns: Any) -> Any:
        """Z'columns, (q, k, J), if Z is traced."""
        if self.effects is None:
            return None
        sums = [self.rows.sums(effect[:, None] * columns).T for effect in self.effects.T]
        return jnp.stack(sums)

    def of_levels(self, modes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Effects of the user's levels of those of the structure's."""
        return modes

    def structure(
        self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Grouped:
        """The structure of columns."""
        shadow = None
        if products is not None:
            of_columns, rest = products
            shadow = Products(self.products(self.effects), of_columns, rest)
        return Grouped(self.factors, scores, remainder, sizes, shadow)


@record
@dataclass(frozen=True)
class Visits(GroupedBasis):
    """The factorisation where each row is one effect's alone, and each effect of a level has one
    row at most, as visits of subjects are: Q is Z, and the scores are the rows in another order.

    Attributes:
        places: (n,), the effect of each row; q of rows that are left out.
    """

    places: Any = None

    @staticmethod
    def at(rows: Partition, effects: np.ndarray, places: np.ndarray) -> Visits:
        """Of effects (n, q) that are 1 at `places` and 0 elsewhere."""
        q = effects.shape[1]
        factors = np.zeros((q, q, rows.n_levels), effects.dtype)
        seen = np.bincount(places * rows.n_levels + rows.codes, minlength=(q + 1) * rows.n_levels)
        factors[np.arange(q), np.arange(q)] = seen.reshape(q + 1, -1)[:q]
        return Visits(rows, effects, factors, None, places)

    def project(self, columns: Any) -> tuple[Any, Any]:
        if not on_host(columns):
            return super().project(columns)
        q, k, levels = len(self.factors), columns.shape[1], self.rows.n_levels
        scores = np.zeros((q + 1, k, levels), columns.dtype)
        cells, flat = self.places * (k * levels) + self.rows.codes, scores.reshape(-1)
        for j in range(k):
            flat[cells + j * levels] = columns[:, j]
        rest = np.zeros(columns.shape, columns.dtype)
        left_out = self.places == q
        rest[left_out] = columns[left_out]
        return scores[:-1], rest


def _places(rows: Partition, effects: np.ndarray) -> np.ndarray | None:
    """`Visits.places`, or None where the effects are not like that."""
    q = effects.shape[1]
    places, own = np.full(len(effects), q), np.flatnonzero(effects)
    at, of = np.divmod(own, q)
    if own.size > len(effects) or q == 1:
        return None
    places[at] = of
    alone = places[at] == of
    if not (alone.all() and (np.diff(at) > 0).all() and (effects[at, of] == 1).all()):
        return None
    cells = places[at] * rows.n_levels + rows.codes[at]
    return places if np.bincount(cells).max(initial=0) <= 1 else None
