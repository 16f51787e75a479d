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

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array


class Marginal(NamedTuple):
    """What a likelihood needs of V0: log|V0|, (), and [X y]' V0^-1 [X y], (p + 1, p + 1)."""

    logdet: Array
    gram: Array


class Projection(NamedTuple):
    """`Marginal` with B = Z' V0^-1 Z and D = Z' V0^-1 [X y] in the structure's own layout."""

    logdet: Array
    gram: Array
    inner: Array
    cross: Array


class Structure(Protocol):
    """A pytree of the cross-products of one data set, with these contractions.

    `omega` is always the vector of `covariance`, length m. Effects are in scaled units
    (`Design.scales`). `cross` is D in the structure's own layout, `inner` what has that of B.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        ...

    def marginal(self, omega: Array) -> Marginal:
        """log|V0| and the gram matrix at `omega`."""
        ...

    def project(self, omega: Array) -> Projection:
        """The same with B and D."""
        ...

    def repeat(self, inner: Array) -> Array:
        """`inner` with each part as often as it occurs in log|V0| (structures that collapse equal
        parts); elsewhere `inner` itself."""
        ...

    def combine(self, cross: Array, matrix: Array) -> Array:
        """D @ matrix, for `matrix` of shape (p + 1, k)."""
        ...

    def outer(self, cross: Array, matrix: Array, weights: Array) -> Array:
        """D matrix diag(weights) matrix' D' in the layout of B, for `pair_trace`."""
        ...

    def trace(self, inner: Array) -> Array:
        """tr(B E_i), shape (m,)."""
        ...

    def pair_trace(self, left: Array, right: Array) -> Array:
        """tr(E_i left E_j right), shape (m, m)."""
        ...

    def form(self, cross: Array, matrix: Array) -> Array:
        """matrix' D' E_i D matrix, shape (m, k, k), for `matrix` of shape (p + 1, k)."""
        ...

    def without_response(self) -> Any:
        """The same with a response of length 1 that neither X nor Z explains; one lane."""
        ...

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        """Omega D for D of shape k = 1: per term (levels, effects), in scaled units."""
        ...


def blank_response(scores: Array, remainder: Array) -> tuple[Array, Array]:
    """Scores (., p + 1, ...) and remainder (p + 1, p + 1) of `Structure.without_response`."""
    p = len(remainder) - 1
    scores, remainder = jnp.asarray(scores), jnp.asarray(remainder)
    return (
        scores.at[:, p].set(0.0),
        remainder.at[p].set(0.0).at[:, p].set(0.0).at[p, p].set(1.0),
    )
