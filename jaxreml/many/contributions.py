"""What each part of a model contributes to the variance of a row, for many fits: see
`fitting.row_variances`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxreml.data.frame import ModelFrame
from jaxreml.fitting.row_variances import RowMoments, fixed_variance, random_variance
from jaxreml.model.covariance import natural


class Parts(NamedTuple):
    """The parts of a model in some of the rows.

    Attributes:
        moments: of these rows.
        groups: per random term its grouping factor and its number of effects.
        terms: per fixed term, but for the intercept, its places among the columns of X that the
            rows have.
    """

    moments: RowMoments
    groups: tuple[tuple[str, int], ...]
    terms: tuple[np.ndarray, ...]

    @staticmethod
    def of(frame: ModelFrame, coefficients: np.ndarray, kept: np.ndarray | None = None) -> Parts:
        """Of the rows `kept`, None for all, and these columns of X."""
        rows = slice(None) if kept is None else kept
        X = frame.X[rows][:, coefficients]
        groups = tuple((term.name, len(term.effect_names)) for term in frame.terms)
        columns = frame.fixed_terms.values()
        terms = tuple(np.flatnonzero(np.isin(coefficients, own)) for own in columns)
        return Parts(RowMoments.of(X, frame.terms, rows), groups, terms)

    def contributions(self, beta: np.ndarray, theta: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """Per grouping factor, per fixed term and of all fixed effects, (C, lanes).

        Args:
            beta: (columns, lanes).
            theta: (m, lanes), relative Cholesky factors.
            sigma: (lanes,).
        """
        squares, spread = self.moments
        found = {name: np.zeros(sigma.shape) for name in squares}
        starts = dict.fromkeys(squares, 0)
        factors = natural.split_triangles(theta, tuple(q for _, q in self.groups))
        for (name, q), factor in zip(self.groups, factors, strict=True):
            own = slice(starts[name], starts[name] + q)
            starts[name] += q
            covariance = sigma**2 * np.einsum("ac...,bc...->ab...", factor, factor)
            found[name] = found[name] + random_variance(squares[name][own, own], covariance)
        terms = [fixed_variance(spread[np.ix_(own, own)], beta[own]) for own in self.terms]
        return np.stack([*found.values(), *terms, fixed_variance(spread, beta)])
