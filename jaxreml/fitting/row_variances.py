"""The variance that the parts of a model contribute to a row, over the rows of the data.

A grouping factor contributes z' Sigma z; its mean over the rows is tr(Sigma Z'Z) / n (Johnson 2014,
Methods in Ecology and Evolution 5:944), which for a random intercept is its variance. Fixed effects
contribute the variance of X beta over the rows, divisor n - 1, without offset (Nakagawa and
Schielzeth 2013, Methods in Ecology and Evolution 4:133). The residual's is sigma2, that of a row of
weight one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.data.grouping import GroupingTerm

Array = Any  # NumPy's or JAX's

FIXED = "Fixed effects"  # the name of their part, all together


class RowMoments(NamedTuple):
    """Moments of the rows.

    Attributes:
        squares: per grouping factor (q, q), the mean of z z', all its effects in one.
        spread: (p, p), the covariance matrix of the columns of X, divisor n - 1.
    """

    squares: dict[str, np.ndarray]
    spread: np.ndarray

    @staticmethod
    def of(X: np.ndarray, terms: Sequence[GroupingTerm], kept: Any = slice(None)) -> RowMoments:
        """Of X, (rows used, p), and of the rows `kept` of random terms."""
        squares = {}
        for name in dict.fromkeys(term.name for term in terms):
            effects = [term.effects[kept] for term in terms if term.name == name]
            columns = np.concatenate(effects, axis=1)
            squares[name] = columns.T @ columns / len(columns)
        centred = X - X.mean(axis=0)
        return RowMoments(squares, centred.T @ centred / (len(centred) - 1))


def random_variance(squares: Array, covariance: Array) -> Array:
    """tr(Sigma Z'Z) / n, for Sigma (q, q); an axis of lanes may follow."""
    xp = namespace(squares, covariance)
    return xp.einsum("ab,ab...->...", squares, covariance)


def fixed_variance(spread: Array, beta: Array) -> Array:
    """The variance of X beta, for beta (p,); an axis of lanes may follow."""
    xp = namespace(spread, beta)
    return xp.sum(beta * xp.tensordot(spread, beta, axes=1), axis=0)
