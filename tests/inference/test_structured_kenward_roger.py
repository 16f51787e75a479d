"""Kenward and Roger's method for covariances of random effects that are not linear in their
parameters: by its formulas with n x n matrices, and derivatives of V by differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml


def data() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    found = pd.DataFrame(
        [(f"s{i:02d}", f"t{t}", k) for i in range(30) for t in range(4) for k in range(2)],
        columns=["subject", "C", "again"],
    )
    lag = np.abs(np.subtract.outer(range(4), range(4)))
    sds = np.array([1.0, 1.3, 1.7, 2.0])
    root = np.linalg.cholesky(0.6**lag * np.outer(sds, sds))
    found["x"] = rng.normal(size=len(found))
    found["y"] = (rng.normal(size=(30, 4)) @ root.T)[:, :, None].repeat(2, axis=2).ravel()
    slopes = rng.normal(size=30)[found["subject"].str[1:].astype(int)]
    found["y"] += (1 + slopes) * found["x"] + rng.normal(scale=0.7, size=len(found))
    return found[rng.random(len(found)) > 0.2].reset_index(drop=True)


def matrix(word: str, s: np.ndarray) -> np.ndarray:
    """Covariance of the four effects in variances, and correlations or a covariance."""
    lag = np.abs(np.subtract.outer(range(4), range(4)))
    if word == "ar1":
        return s[0] * s[1] ** lag
    rho = {
        "hetar1": lambda: s[4] ** lag,
        "cs": lambda: np.where(lag, s[4], 1.0),
        "toep": lambda: np.append(1.0, s[4:])[lag],
    }[word]()
    return np.sqrt(np.outer(s[:4], s[:4])) * rho


def differences(function, at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Slopes of an array, of fourth order, one parameter after the other."""

    def along(h: np.ndarray) -> np.ndarray:
        near, far = (function(at + k * h) - function(at - k * h) for k in (1, 2))
        return (8 * near - far) / (12 * step)

    return np.array([along(h) for h in step * np.eye(len(at))])


@pytest.mark.parametrize("word", ["ar1", "hetar1", "cs", "toep"])
@pytest.mark.parametrize("beside", ["", " + (0 + x | subject)"])
def test_by_definition(word, beside):
    if beside and word != "hetar1":
        return
    fit = jaxreml.fit(f"y ~ x * C + {word}(0 + C | subject){beside}", data())
    assert fit.converged and not fit.is_singular
    X, frame = fit.frame.X, fit.frame
    places = [len(term.effect_names) for term in frame.terms]
    own, covariance = places.index(4), fit.cov_re_arrays[places.index(4)]
    variances = np.diagonal(covariance)
    rho = covariance / np.sqrt(np.outer(variances, variances))
    first = variances[:1] if word == "ar1" else variances
    s = np.append(first, rho[0, 1:] if word == "toep" else rho[0, 1])
    np.testing.assert_allclose(matrix(word, s), covariance, rtol=1e-8)

    def expanded(term, inner: np.ndarray) -> np.ndarray:
        return (term.effects @ inner @ term.effects.T) * (term.codes[:, None] == term.codes)

    def slopes(at: np.ndarray) -> np.ndarray:
        return differences(lambda t: matrix(word, t), at)

    bends = differences(slopes, s)  # (parameters, parameters, 4, 4)
    moves = [expanded(frame.terms[own], slope) for slope in slopes(s)] + [np.eye(len(X))]
    V = expanded(frame.terms[own], covariance) + fit.sigma**2 * np.eye(len(X))
    if beside:
        other = 1 - own
        moves.append(expanded(frame.terms[other], np.eye(1)))
        V = V + expanded(frame.terms[other], fit.cov_re_arrays[other])
    inverse = np.linalg.inv(V)
    half = inverse @ X
    phi = np.linalg.inv(X.T @ half)
    projector = inverse - half @ phi @ half.T
    moved = [projector @ own for own in moves]
    W = np.linalg.inv([[np.sum(left * right.T) / 2 for right in moved] for left in moved])
    P = np.array([-half.T @ move @ half for move in moves])
    Q = [[half.T @ left @ inverse @ right @ half for right in moves] for left in moves]
    inner = np.einsum("ij,ijuv->uv", W, Q) - np.einsum("ij,iuv,vw,jwx->ux", W, P, phi, P)
    k = len(s)
    bent = np.einsum("kl,klij->ij", W[:k, :k], bends)
    inner = inner - half.T @ expanded(frame.terms[own], bent) @ half / 4
    expected = phi + 2 * phi @ inner @ phi
    np.testing.assert_allclose(fit.vcov_kenward_roger, expected, atol=1e-6 * np.abs(expected).max())
    along = np.array([np.diagonal(phi @ own @ phi) for own in P]) / np.diagonal(phi)
    degrees = 2 / np.einsum("ij,ik,jk->k", W, along, along)
    np.testing.assert_allclose(fit.coefficients("kenward-roger")["df"], degrees, rtol=1e-6)
