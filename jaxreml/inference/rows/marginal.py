"""V of rows whose responses are independent of all others', and what follows from leaving one out.

For a cluster of rows with covariance V, of which R is the residuals' and the rest the random
effects', P = V^-1 - V^-1 X M X'V^-1 with M the covariance of the fixed effects has all that
diagnostics need: conditional residuals are R P y, with covariance R P R, the hat matrix of the
fitted values is I - R P, and without row i the fixed effects change by
- M X'V^-1 e_i (P y)_i / P_ii, at the same variance parameters, and exactly so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel

MOST_ROWS = 3000  # of a cluster, whose covariance matrix is made


def covariances(fit: FittedModel, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V of rows (k,) of a fit, and the residuals' part of it, (k, k).

    Raises:
        DataError: too many rows.
    """
    if len(rows) > MOST_ROWS:
        raise DataError(
            f"{len(rows)} rows depend on each other, and their covariance matrix is made for up to "
            f"{MOST_ROWS} rows"
        )
    own, root = fit.frame.residual, np.sqrt(fit.prior_weights[rows])
    if own is None:
        R = fit.sigma**2 * np.diag(1 / root**2)
    else:
        visits = own.places[rows]
        same = own.codes[rows][:, None] == own.codes[rows]
        R = fit.residual_between(visits, visits) * same / root[:, None] / root
    V = R
    for term, block in zip(fit.frame.terms, fit.cov_re_arrays, strict=True):
        Z, levels = term.effects[rows], term.codes[rows]
        V = V + (Z @ block @ Z.T) * (levels[:, None] == levels)
    return V, R


def clusters(fit: FittedModel) -> Iterator[np.ndarray]:
    """The smallest sets of rows that share no random effect and no correlation with others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    frame, n = fit.frame, fit.nobs
    factors = [term.codes for term in frame.terms]
    if frame.residual is not None:
        factors.append(frame.residual.codes)
    total, ends = n, []
    for codes in factors:
        ends.append(total + codes)
        total += int(codes.max()) + 1
    columns = np.concatenate([*ends, np.zeros(0, int)])
    rows = np.tile(np.arange(n), len(factors))
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), (total, total))
    codes = connected_components(graph, directed=False)[1][:n]
    order = np.argsort(codes, kind="stable")
    return iter(np.split(order, np.flatnonzero(np.diff(codes[order])) + 1))


class RowsLeftOut(NamedTuple):
    """See above; of all rows.

    Attributes:
        leverage: (n,), diagonal of the hat matrix.
        spread: (n,), variances of the conditional residuals.
        change: (n, p), M X'V^-1 e_i.
        precision, score: (n,), P_ii and (P y)_i.
    """

    leverage: np.ndarray
    spread: np.ndarray
    change: np.ndarray
    precision: np.ndarray
    score: np.ndarray


def rows_left_out(fit: FittedModel) -> RowsLeftOut:
    """Of a fit without kernels.

    Raises:
        DataError: too many rows that depend on each other.
    """
    n, X = fit.nobs, fit.frame.X
    model = fit.vcov_array if fit.sandwich is None else fit.sandwich.model
    resid = fit.y - fit.fixed_fitted
    found = RowsLeftOut(*(np.zeros((n, X.shape[1]) if k == 2 else n) for k in range(5)))
    for rows in clusters(fit):
        V, R = covariances(fit, rows)
        half = np.linalg.inv(np.linalg.cholesky(V))
        inverse = half.T @ half
        solved = inverse @ X[rows]
        change = solved @ model
        P = inverse - change @ solved.T
        within = R @ P
        found.leverage[rows] = 1 - np.diagonal(within)
        found.spread[rows] = np.sum(within * R, axis=1)
        found.change[rows] = change
        found.precision[rows] = np.diagonal(P)
        found.score[rows] = inverse @ resid[rows]  # X'V^-1 of these is zero
    return found
