"""The likelihood once more, in plain NumPy with V explicit: what jaxreml is tested against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def covariance_matrix(variances: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Covariance matrix of effects from variances and the partial correlations tanh z.

    The rows of the correlations' Cholesky factor are unit vectors in spherical coordinates.
    """
    sd = np.sqrt(variances)
    factor = np.zeros((sd.size, sd.size))
    start = 0
    for i in range(sd.size):
        partial = np.tanh(z[start : start + i])
        left = np.cumprod(np.append(1.0, np.sqrt(1 - partial**2)))
        factor[i, : i + 1] = np.append(partial, 1.0) * left
        start += i
    return sd[:, None] * (factor @ factor.T) * sd


def marginal_covariance(params, terms, weights, n) -> np.ndarray:
    """V of `params` as jaxreml orders them; terms are (codes, Z), or (codes, Z, K) with the
    covariance K of the levels."""
    params = np.asarray(params, float)
    V = np.exp(params[-1]) * np.diag(1 / (np.ones(n) if weights is None else weights))
    start = 0
    for codes, Z, *kernel in terms:
        q = Z.shape[1]
        related = kernel[0][np.ix_(codes, codes)] if kernel else codes[:, None] == codes
        stop = start + q * (q + 1) // 2
        sigma = covariance_matrix(np.exp(params[start : start + q]), params[start + q : stop])
        V += (Z @ sigma @ Z.T) * related
        start = stop
    return V


def neg2_loglik(params, y, X, terms, *, reml: bool, weights=None) -> float:
    """-2 log (restricted) likelihood, constants included."""
    return criterion_at(marginal_covariance(params, terms, weights, len(X)), X, y, reml=reml)


def criterion_at(V: np.ndarray, X: np.ndarray, y: np.ndarray, *, reml: bool) -> float:
    """The same for the covariance matrix of all rows, (n, n)."""
    n, p = X.shape
    inverse = np.linalg.inv(V)
    M = X.T @ inverse @ X
    residual = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
    value = np.linalg.slogdet(V)[1] + residual @ inverse @ residual
    if reml:
        return (n - p) * np.log(2 * np.pi) + value + np.linalg.slogdet(M)[1]
    return n * np.log(2 * np.pi) + value


def gradient(function: Callable, at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences of fourth order."""
    at = np.asarray(at, float)
    units = step * np.eye(at.size)
    return np.array(
        [
            (
                8 * (function(at + h) - function(at - h))
                - function(at + 2 * h)
                + function(at - 2 * h)
            )
            / (12 * step)
            for h in units
        ]
    )


def hessian(function: Callable, at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Central differences of fourth order, twice."""
    rows = [
        gradient(lambda x, i=i: gradient_entry(function, x, i, step), at, step)
        for i in range(len(at))
    ]
    matrix = np.array(rows)
    return (matrix + matrix.T) / 2


def gradient_entry(function: Callable, at: np.ndarray, i: int, step: float) -> float:
    """One entry of `gradient`."""
    h = np.zeros(len(at))
    h[i] = step
    return (
        8 * (function(at + h) - function(at - h)) - function(at + 2 * h) + function(at - 2 * h)
    ) / (12 * step)


def simulate(seed: int, n: int = 150, n_groups: int = 12, q: int = 2, p: int = 2):
    """A random unbalanced design with a positive definite optimum nearly always: y, X, codes, Z."""
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, n - n_groups)])
    rng.shuffle(codes)
    X = np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))])
    Z = np.column_stack([np.ones(n), rng.normal(size=(n, q - 1))])
    root = np.tril(rng.normal(size=(q, q)) * 0.3) + np.diag(rng.uniform(0.7, 1.5, q))
    b = rng.normal(size=(n_groups, q)) @ root.T
    y = X @ rng.normal(size=p) + np.sum(Z * b[codes], axis=1) + rng.normal(size=n)
    return y, X, codes, Z


def directions(terms, weights, n) -> list[np.ndarray]:
    """Derivatives of V in the residual variance and the entries of the terms' covariances."""
    found = [np.diag(1 / (np.ones(n) if weights is None else weights))]
    for codes, Z in terms:
        same = codes[:, None] == codes
        for b, a in zip(*np.triu_indices(Z.shape[1]), strict=True):
            outer = np.outer(Z[:, a], Z[:, b])
            found.append(same * (outer if a == b else outer + outer.T))
    return found


def kenward_roger(X: np.ndarray, V: np.ndarray, terms, weights):
    """Kenward and Roger (1997, Biometrics 53:983), in variances and covariances.

    The adjusted covariance; and the degrees of freedom of t tests, a function of rows of L.
    """
    moves = directions(terms, weights, len(X))
    inverse = np.linalg.inv(V)
    phi = np.linalg.inv(X.T @ inverse @ X)
    P = inverse - inverse @ X @ phi @ X.T @ inverse
    moved = [P @ D for D in moves]
    information = np.array([[np.sum(A * B.T) / 2 for B in moved] for A in moved])
    W = np.linalg.inv(information)
    left = [X.T @ inverse @ D @ inverse for D in moves]
    first = [own @ X for own in left]  # -P_i
    total = np.zeros_like(phi)
    for i, j in np.ndindex(W.shape):
        total += W[i, j] * (left[i] @ moves[j] @ inverse @ X - first[i] @ phi @ first[j])

    def degrees(row: np.ndarray) -> float:
        theta = np.outer(row, row) / (row @ phi @ row)
        parts = [np.trace(theta @ phi @ own @ phi) for own in first]
        return 2 / (parts @ W @ parts)

    return phi + 2 * phi @ total @ phi, degrees
