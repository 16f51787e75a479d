r"""The interface between a covariance structure and everything above it.

With V0 = I + Z Omega Z' (V in units of the residual variance; prior weights already folded into the
rows), B = Z' V0^-1 Z and D = Z' V0^-1 [X y], every derivative that the likelihood needs is a
contraction with the constant matrices E_i = d Omega / d omega_i:

    d_i  logdet = tr(B E_i)             d_ij logdet = -tr(E_i B E_j B)
    d_i  gram   = -D' E_i D             d_ij gram   = D' E_i B E_j D + D' E_j B E_i D

because V0 is linear in omega. No structure forms V0 where it can avoid it: with the orthogonal
factorisation Z = Q F, V0 acts on the span of Q as P = I + F Omega F', so that

    logdet = log|P|,   gram = T + c' P^-1 c,   B = F' P^-1 F,   D = F' P^-1 c,

with c = Q'[X y] and T the cross-products of what Q leaves of [X y]. These are sums of positive
terms: nothing cancels, however large the variance ratio, and a singular Omega is nothing special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from jaxreml.backend.arrays import mapped, namespace
from jaxreml.model import linalg
from jaxreml.model.response import Response

Array = Any  # NumPy's or JAX's


class Marginal(NamedTuple):
    """What a likelihood needs of V0: log|V0|, (), and [X y]' V0^-1 [X y], (p + 1, p + 1)."""

    logdet: Array
    gram: Array


class Projection(NamedTuple):
    """`Marginal` with B = Z' V0^-1 Z and D = Z' V0^-1 [X y] in the structure's own layout."""

    logdet: Array
    gram: Array
    inner: Any
    cross: Any


# Some rows of Z: per term the levels, (k,) integers, and the scaled effects, (k, q).
Rows = Sequence[tuple[np.ndarray, np.ndarray]]
# Rows of Z of all terms: levels (n,), columns (n, q), NumPy or traced, and number of levels.
Terms = Sequence[tuple[np.ndarray, Any, int]]


class Explicit:
    """Derivatives of a structure that has B as an array: by contractions with it."""

    costly = False
    written_out = True

    def slope(self: Any, projection: Projection) -> Array:
        return self.trace(self.repeat(projection.inner))

    def curvature(self: Any, projection: Projection, matrix: Array, weights: Array) -> Array:
        counted = self.repeat(projection.inner)
        # d_ij = half + half', as pair_trace(B, B) is symmetric
        right = self.outer(projection.cross, matrix, weights) - counted / 2
        half = self.pair_trace(projection.inner, right)
        return half + linalg.transpose(half)

    def repeat(self, inner: Array) -> Array:
        """B with each part as often as it occurs in log|V0|, where equal parts are collapsed."""
        return inner

    def start(self) -> None:
        return None


class OfColumns:
    """A structure of the columns [X y], which its arrays have on their second axis."""

    remainder: Array

    @property
    def columns(self) -> Any:
        """The projections of [X y]: a tree of arrays (., p + 1, ...)."""
        raise NotImplementedError

    @property
    def evaluated(self) -> Any:
        """What an evaluation works with, a tree of arrays."""
        return self

    def with_columns(self: Any, columns: Any, remainder: Array) -> Any:
        """The structure of other columns: their projections and what these leave of their
        cross-products."""
        raise NotImplementedError

    def respond(self, p: int, response: Response) -> Any:
        """With this response after the first `p` columns."""

        def joined(whole: Any, own: Any) -> Any:
            return namespace(whole, own).concatenate([whole[:, :p], own[:, None]], axis=1)

        columns = mapped(joined, self.columns, response.scores)
        of_y = response.remainder_xy, response.remainder_yy
        return self.with_columns(columns, linalg.border(self.remainder[:p, :p], *of_y))

    @property
    def lanes(self) -> tuple[int, ...]:
        """Of all arrays, on a last axis; () for one data set."""
        return self.remainder.shape[2:]

    def silent(self) -> Any:
        """`Response.scores` of one that Z does not explain."""

        def none(whole: Any) -> Any:
            return np.zeros((whole.shape[0], *whole.shape[2:]), whole.dtype)

        return mapped(none, self.columns)

    def combined(self, matrix: Array, absent: Array) -> Any:
        """Of the columns [X y] C: nothing is projected anew.

        Args:
            matrix: C, (p + 1, p + 1), the response last. A column of zeros is absent.
            absent: (p + 1,), 1 for absent columns, 0 for the others: they get 1 on the diagonal of
                the gram matrix, which changes no determinant.
        """
        gram = matrix.T @ self.remainder @ matrix + namespace(absent).diag(absent)
        return self.with_columns(self.combine(self.columns, matrix), gram)

    def combine(self, cross: Any, matrix: Array) -> Any:
        """`cross` or `columns` times (p + 1, k)."""
        xp = namespace(matrix, *(cross if isinstance(cross, tuple) else [cross]))
        return mapped(lambda own: xp.einsum("au...,uv...->av...", own, matrix), cross)


class OfRows(OfColumns):
    """A structure of the rows of [X y] themselves, whose V is not linear in all of omega. On the
    host.

    Attributes:
        scores: (n, p + 1), [X y].
        linear: whether second derivatives leave out those of V.
    """

    scores: Array
    linear: bool

    costly = False
    written_out = True

    @property
    def columns(self) -> Array:
        return self.scores

    def with_columns(self: Any, columns: Array, remainder: Array) -> Any:
        return replace(self, scores=columns, remainder=remainder)

    def combined(self, matrix: Array, absent: Array) -> Any:
        gram = matrix.T @ self.remainder @ matrix + np.diag(absent)
        return self.with_columns(self.scores @ matrix, gram)

    @property
    def first_order(self: Any) -> Any:
        """As if V were linear in omega: for Kenward and Roger's information."""
        return replace(self, linear=True)


class Structure(Protocol):
    """A pytree of the cross-products of one data set: all that a likelihood needs.

    `omega` is always the vector of `covariance`, length m. Effects are in scaled units
    (`Design.units`).
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        ...

    def marginal(self, omega: Array) -> Marginal:
        """log|V0| and the gram matrix at `omega`."""
        ...

    def respond(self, p: int, response: Response) -> Self:
        """With this response after the first `p` columns."""
        ...

    @property
    def lanes(self) -> tuple[int, ...]:
        """What `silent` has of lanes: () without any, (1,) where they differ by the response
        only."""
        ...

    def silent(self) -> Any:
        """`Response.scores` of one that Z does not explain."""
        ...


class Differentiable(Structure, Protocol):
    """A structure with derivatives in closed form: what a search and standard errors need.

    `cross` is D in the structure's own layout, `inner` what it makes B from.
    """

    @property
    def costly(self) -> bool:
        """Whether `curvature` costs much more than `spread`."""
        ...

    @property
    def written_out(self) -> bool:
        """Whether it takes NumPy's arrays too: nothing is differentiated by JAX."""
        ...

    def project(self, omega: Array) -> Projection:
        """`marginal` with B and D."""
        ...

    def slope(self, projection: Projection) -> Array:
        """Derivatives of log|V0| in omega, tr(B E_i), (m,)."""
        ...

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        """Second derivatives in omega of log|V0| + tr(W gram), (m, m), for the constant
        W = matrix diag(weights) matrix', with (p + 1, p + 1) `matrix` and (p + 1,) `weights`."""
        ...

    def form(self, cross: Any, matrix: Array) -> Array:
        """matrix' D' E_i D matrix, shape (m, k, k), for `matrix` of shape (p + 1, k)."""
        ...


class Full(Differentiable, Protocol):
    """A structure of one data set, with its random effects: that of a `Design`."""

    @property
    def evaluated(self) -> Any:
        """As `OfColumns.evaluated`."""
        ...

    def spread(self, projection: Projection, matrix: Array) -> Array:
        """d_u'E_i B E_j d_v, (m, k, m, k), for the columns d of D matrix, `matrix` (p + 1, k)."""
        ...

    def start(self) -> Array | None:
        """omega (m,) to start a search from, by cheap moment estimates. None where
        `estimate.minimum_norm` costs little."""
        ...

    def combined(self, matrix: Array, absent: Array) -> Self:
        """As `OfColumns.combined`."""
        ...

    def combine(self, cross: Any, matrix: Array) -> Any:
        """D @ matrix, for `matrix` of shape (p + 1, k)."""
        ...

    def modes(self, omega: Array, cross: Any) -> tuple[Array, ...]:
        """Omega D for D of shape k = 1: per term (levels, effects), in scaled units."""
        ...

    def posterior(self, projection: Projection, factors: tuple[Array, ...]) -> Any:
        """What `variances` makes the conditional variances of the random effects from.

        Args:
            projection: at their covariances.
            factors: per term (q, q), relative Cholesky factors.
        """
        ...

    def posterior_by_omega(self, inner: Any, omega: Array) -> Any:
        """`posterior` at covariances of which the residuals' need not be semidefinite, with
        `Projection.inner`. On the host."""
        ...

    def variances(self, posterior: Any) -> tuple[np.ndarray, ...]:
        """Var(b | y) per term (levels, q, q), given the parameters, in units of the residual
        variance and scaled effects. On the host, not traceable."""
        ...

    def row_variances(self, posterior: Any, rows: Rows) -> np.ndarray:
        """Var(z b | y) of rows z, (k,), given the parameters and in the same units; the rows need
        not be those of the data. On the host."""
        ...


class Projector(Protocol):
    """What the random terms of a data set say, without X and y; `Grouped` and its like are what X
    and y come to on it."""

    def project(self, columns: Any) -> tuple[Any, Any]:
        """`OfColumns.columns` of (n, k) rows, NumPy or traced, and what these leave of them,
        (n, k)."""
        ...

    def products(self, columns: Any) -> Any:
        """Z'columns, (q, k, J), where Z is traced and has its derivatives by them; else None."""
        ...

    def structure(self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]) -> Any:
        """The structure of columns: what `project` and `products` give of them, and the
        cross-products of what is left."""
        ...
