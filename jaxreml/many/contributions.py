"""What each part of a model contributes to the variance of a row, of many fits, and how sure it is:
see `fitting.row_variances`. Covariances are by the delta method, as `inference.delta` has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.data.frame import ModelFrame
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.fitting.row_variances import FIXED
from jaxreml.model import linalg
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.joint import Covariance
from jaxreml.optimum.report import Estimate

Array = Any  # NumPy's or JAX's


class Parts(NamedTuple):
    """The parts of a model in some of the rows; an axis of lanes, each with its own rows, may
    follow in `random`, `spread` and `within`.

    Attributes:
        random: (G, m), a row per grouping factor: its contribution is that times the covariances of
            the effects, `RowMoments.squares` in the order of these.
        terms: (T, p), 1 where a column of X is of a fixed term, else 0.
        spread: (p, p), the covariance matrix of the columns, `RowMoments.spread`.
        within: (p, p), the same with zeros between columns of different terms.
    """

    random: np.ndarray
    terms: np.ndarray
    spread: np.ndarray
    within: np.ndarray

    @staticmethod
    def of(
        frame: ModelFrame,
        coefficients: np.ndarray,
        kept: np.ndarray | None = None,
        x: np.ndarray | None = None,
    ) -> Parts:
        """Of these columns of X.

        Args:
            frame: all rows.
            coefficients: which columns of X.
            kept: (n,) booleans, the rows; (n, b) for lanes; None for all.
            x: (n, b), the last of the columns, where each lane has its own.
        """
        used = np.ones(len(frame.X)) if kept is None else np.asarray(kept, float)
        counts = used.sum(axis=0)
        factors = list(dict.fromkeys(term.name for term in frame.terms))
        random = []
        for term in frame.terms:
            first, second = natural.triangle(len(term.effect_names))
            twice = np.where(first == second, 1.0, 2.0)
            squares = (term.effects[:, first] * term.effects[:, second] * twice).T @ used / counts
            own = np.zeros((len(factors), *squares.shape))
            own[factors.index(term.name)] = squares
            random.append(own)
        if frame.residual is not None:  # whose covariances are not theirs
            size = frame.residual.term.effects.shape[1]
            random.append(np.zeros((len(factors), size * (size + 1) // 2, *counts.shape)))
        p = coefficients.size
        X = frame.X[:, coefficients if x is None else coefficients[:-1]]
        centred, shared = X - X.mean(axis=0), X.shape[1]
        means = centred.T @ used / counts
        squares = [(centred * column[:, None]).T @ used for column in centred.T]
        squares = np.reshape(squares, (shared, shared, *counts.shape))
        spread = (squares - counts * means[:, None] * means) / (counts - 1)
        if x is not None:
            spread = _bordered(spread, centred, used, counts, x)
        own = [np.isin(coefficients, columns) for columns in frame.fixed_terms.values()]
        terms = np.array(own, float).reshape(len(own), p)
        same = (terms.T @ terms).reshape(p, p, *[1] * (spread.ndim - 2))
        return Parts(np.concatenate(random, axis=1), terms, spread, spread * same)


def _bordered(
    spread: np.ndarray, centred: np.ndarray, used: np.ndarray, counts: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The covariance matrices (p, p, b) of columns and of one more, (n, b), which every lane has
    its own of."""
    weights = used if used.ndim == 2 else used[:, None]
    x = np.where(weights > 0, x, 0.0)
    x = (x - np.sum(weights * x, axis=0) / counts) * weights
    across, own = centred.T @ x / (counts - 1), np.einsum("nb,nb->b", x, x) / (counts - 1)
    if spread.ndim == 2:
        spread = np.broadcast_to(spread[..., None], (*spread.shape, x.shape[1]))
    return linalg.border(spread, across, own)


def _times(matrix: Array, vector: Array) -> Array:
    """(a, b) times (b, ...); the matrix may have the lanes of the vector."""
    xp = namespace(matrix, vector)
    if matrix.ndim == 2:
        return xp.tensordot(matrix, vector, axes=1)
    between = [1] * (vector.ndim - 2)
    matrix = matrix.reshape(*matrix.shape[:2], *between, *matrix.shape[2:])
    return xp.sum(matrix * vector, axis=1)


def contributions(estimate: Estimate, parts: Parts, covariance: Covariance) -> tuple[Array, Array]:
    """Contributions, and covariances of those of grouping factors and all fixed effects.

    Args:
        estimate: of one response, or of many on the last axis.
        parts: of their rows.
        covariance: of the effects.

    Returns:
        (G + T + 1, ...), per grouping factor, per fixed term and of all fixed effects; and
        (K, ...), the lower triangle of the covariance matrix of the contributions of the factors
        and of the residual's, row by row, and then the variance of that of all fixed effects, which
        is independent of them. Parameters on a boundary are held there.
    """
    xp, beta = namespace(estimate.theta, estimate.beta), estimate.beta
    sigma2 = estimate.sigma**2
    omega = natural.omega_from_theta(estimate.theta, covariance.sizes)
    of_random = sigma2 * _times(parts.random, omega)
    of_terms = _times(parts.terms, beta * _times(parts.within, beta))
    slope = _times(parts.spread, beta)
    of_fixed = xp.sum(beta * slope, axis=0)
    found = xp.concatenate([of_random, of_terms, of_fixed[None]])

    parameters = estimate.parameters
    finite = covariance.finite(parameters)
    none = xp.zeros((len(omega) + 1, *parameters.shape[1:]), omega.dtype)
    moved, _ = covariance.in_parameters(finite, none, none[:, None] * none)
    slopes = moved[:-1] + omega[:, None] * moved[-1]
    slopes = xp.concatenate([_times(parts.random, slopes), moved[-1:]])
    free = xp.isfinite(parameters)
    slopes = xp.where(free, sigma2 * slopes, 0.0)
    spread = xp.where(free[:, None] & free, estimate.parameters_vcov, 0.0)
    joint = linalg.matmul(slopes, linalg.matmul(spread, linalg.transpose(slopes)))
    of_all = 4 * xp.sum(slope * xp.sum(estimate.vcov * slope, axis=1), axis=0)
    return found, xp.concatenate([joint[_lower(len(slopes))], of_all[None]])


def unpacked(covariances: np.ndarray, factors: int) -> np.ndarray:
    """Covariance matrices (b, k, k) of the contributions of grouping factors, of all fixed effects
    and of the residual's, in this order, from those (b, K) packed."""
    matrix = np.zeros((len(covariances), factors + 2, factors + 2))
    rows, columns = (np.where(own == factors, factors + 1, own) for own in _lower(factors + 1))
    matrix[:, rows, columns] = matrix[:, columns, rows] = covariances[:, :-1]
    matrix[:, factors, factors] = covariances[:, -1]
    return matrix


def _lower(k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tril_indices(k)


def covariance_labels(factors: list[str]) -> list[str]:
    """What the packed covariances are of."""
    names = [*factors, RESIDUAL]
    pairs = [f"{names[i]}, {names[j]}" for i, j in zip(*_lower(len(names)), strict=True)]
    return [*pairs, FIXED]
