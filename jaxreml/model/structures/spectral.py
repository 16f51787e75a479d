r"""One variance ratio: the criterion in the eigenbasis of Z'RZ, without fixed effects.

With R = I - X(X'X)^-1X' and gamma = omega, the restricted likelihood is that of the error
contrasts, whose covariance is diagonal in the eigenvectors of R Z Z' R with eigenvalues lambda
(Patterson and Thompson 1971; Kang et al. 2008, Genetics 178:1709, eqs 2-5):

    REML  sum log(1 + gamma lambda) + (n - p) log(r0 + sum s^2 / (1 + gamma lambda)) + constants
    ML    log|I + gamma Z Z'|       +  n      log(r0 + sum s^2 / (1 + gamma lambda)) + constants

Both are the criterion of a `Grouped` design with q = 1 and p = 0, a "level" for each eigenvalue, so
nothing but this rotation is particular. What it is computed from are the levels of a `Grouped`
design, collapsed or not: those without scores of X are eigenvectors as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import record

Array = Any  # NumPy's or JAX's

NULL = 1e-13  # eigenvalues below this fraction of the largest, per level, are zero
MAX_ORDER = 2000  # of the eigenproblem


@record
@dataclass(frozen=True)
class Spectral:
    """The rotation of G levels, `mixed` of which have scores of X, into L.

    Attributes:
        factors, counts: (1, 1, L) and (L,), as in `Grouped`.
        mixed, plain: (a,) and (b,), which of the G levels have scores of X and which have not.
        rotation: (l, a), from the scores of mixed levels to those of eigenvectors.
        shift: (p, l), coefficients of X that go with them.
        silent: (L - l - b,) zeros, as many as there are levels in log|V| only (ML).
    """

    factors: Array
    counts: Array
    mixed: Array
    plain: Array
    rotation: Array
    shift: Array
    silent: Array

    def scores(self, scores: Array) -> tuple[Array, Array]:
        """Scores of responses, (1, G, B) to (1, L, B), and the shifts (p, B)."""
        rotated = self.rotation @ scores[0, self.mixed]
        parts = [rotated, scores[0, self.plain]]
        parts.append(np.zeros((self.silent.shape[0], scores.shape[2]), scores.dtype))
        return namespace(*parts).concatenate(parts)[None], self.shift @ rotated


def spectral(
    factors: np.ndarray, counts: np.ndarray, scores_x: np.ndarray, *, reml: bool
) -> Spectral | None:
    """Plan the rotation.

    Args:
        factors, counts, scores_x: (1, 1, G), (G,) and (1, p, G), as in `Grouped` and `Collapse`.
        reml: REML or ML.

    Returns:
        The plan, or None if the eigenproblem is too large.
    """
    f, cx = factors[0, 0], scores_x[0]
    is_mixed = np.any(cx != 0, axis=0) & (f > 0)
    mixed, plain = np.flatnonzero(is_mixed), np.flatnonzero(~is_mixed & (f > 0))
    if mixed.size > MAX_ORDER:
        return None
    f_mixed, cx = f[mixed], cx[:, mixed]
    values, vectors = np.linalg.eigh(f_mixed[:, None] * (np.eye(mixed.size) - cx.T @ cx) * f_mixed)
    kept = values > NULL * mixed.size * np.max(values, initial=0.0)
    values = values[kept]
    rotation = (f_mixed[:, None] * vectors[:, kept] / np.sqrt(values)).T
    of_values = np.ones(values.size) if reml else np.zeros(values.size)
    silent = np.zeros(0) if reml else f_mixed
    return Spectral(
        factors=np.concatenate([np.sqrt(values), f[plain], silent])[None, None],
        counts=np.concatenate([of_values, counts[plain], np.ones(silent.size)]),
        mixed=mixed.astype(np.int32),
        plain=plain.astype(np.int32),
        rotation=rotation,
        shift=cx @ rotation.T,
        silent=np.zeros(silent.size),
    )
