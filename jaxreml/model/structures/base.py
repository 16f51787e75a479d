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
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.model import linalg


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


class Explicit:
    """Derivatives of a structure that has B as an array: by contractions with it."""

    costly = False

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


class Structure(Protocol):
    """A pytree of the cross-products of one data set, with these contractions.

    `omega` is always the vector of `covariance`, length m. Effects are in scaled units
    (`Design.units`). `cross` is D in the structure's own layout, `inner` what it makes B from.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        ...

    @property
    def costly(self) -> bool:
        """Whether `curvature` costs much more than `spread`."""
        ...

    def marginal(self, omega: Array) -> Marginal:
        """log|V0| and the gram matrix at `omega`."""
        ...

    def project(self, omega: Array) -> Projection:
        """The same with B and D."""
        ...

    def slope(self, projection: Projection) -> Array:
        """Derivatives of log|V0| in omega, tr(B E_i), (m,)."""
        ...

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        """Second derivatives in omega of log|V0| + tr(W gram), (m, m), for the constant
        W = matrix diag(weights) matrix', with (p + 1, p + 1) `matrix` and (p + 1,) `weights`."""
        ...

    def spread(self, projection: Projection, matrix: Array) -> Array:
        """d_u'E_i B E_j d_v, (m, k, m, k), for the columns d of D matrix, `matrix` (p + 1, k)."""
        ...

    def combine(self, cross: Any, matrix: Array) -> Any:
        """D @ matrix, for `matrix` of shape (p + 1, k)."""
        ...

    def form(self, cross: Any, matrix: Array) -> Array:
        """matrix' D' E_i D matrix, shape (m, k, k), for `matrix` of shape (p + 1, k)."""
        ...

    def start(self) -> Array | None:
        """omega (m,) to start a search from, by cheap moment estimates. None where
        `estimation.minimum_norm` costs little; it needs `without_response()`, the same structure
        with a response of length 1 that neither X nor Z explains, in one lane."""
        ...

    def modes(self, omega: Array, cross: Any) -> tuple[Array, ...]:
        """Omega D for D of shape k = 1: per term (levels, effects), in scaled units."""
        ...

    def posterior(self, omega: Array, factors: tuple[Array, ...]) -> Any:
        """What `variances` makes the conditional variances of the random effects from.

        Args:
            omega: (m,).
            factors: per term (q, q), relative Cholesky factors that have it.
        """
        ...

    def variances(self, posterior: Any) -> tuple[np.ndarray, ...]:
        """Var(b | y) per term (levels, q, q), given the parameters, in units of the residual
        variance and scaled effects. On the host, not traceable."""
        ...

    def row_variances(self, posterior: Any, rows: Rows) -> np.ndarray:
        """Var(z b | y) of rows z, (k,), given the parameters and in the same units; the rows need
        not be those of the data. On the host."""
        ...


def blank_response(scores: Array, remainder: Array) -> tuple[Array, Array]:
    """Scores (., p + 1, ...) and remainder (p + 1, p + 1) of a structure's `without_response`."""
    p = len(remainder) - 1
    scores, remainder = jnp.asarray(scores), jnp.asarray(remainder)
    return (
        scores.at[:, p].set(0.0),
        remainder.at[p].set(0.0).at[:, p].set(0.0).at[p, p].set(1.0),
    )
