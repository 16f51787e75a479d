"""Parameters of random terms: their labels, and theta as matrices.

Of one fit or of many: arrays have the fits on leading axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxreml.data.formula import RESIDUAL as RESIDUAL
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.joint import Covariance

Groups = tuple[tuple[str, tuple[str, ...]], ...]  # per term its grouping factor and its effects


class Layout(NamedTuple):
    """What the variance parameters of a fit are of, without labels that data have: hashable, for
    compiled programs.

    Attributes:
        names: per block of the covariance its grouping factor, `RESIDUAL` for the residuals'.
        covariance: the map from parameters to covariance matrices.
    """

    names: tuple[str, ...]
    covariance: Covariance


def unpack(theta: np.ndarray, sizes: natural.Sizes) -> list[np.ndarray]:
    """Per term the lower triangles (..., q, q) that theta (..., m) holds column by column."""
    factors = natural.split_triangles(np.moveaxis(theta, -1, 0), sizes)
    return [np.ascontiguousarray(np.moveaxis(own, (0, 1), (-2, -1))) for own in factors]


def correlations_of(matrices: list[np.ndarray]) -> np.ndarray:
    """Correlations (..., k) of each term's covariance matrices (..., q, q), in the order of
    `correlation_labels`; NaN where a variance is zero."""
    if not matrices:
        return np.zeros(0)
    parts = []
    for matrix in matrices:
        first, second = np.triu_indices(matrix.shape[-1], 1)
        sd = np.sqrt(np.einsum("...aa->...a", matrix))
        scale = sd[..., second] * sd[..., first]
        unknown = np.full(scale.shape, np.nan)
        parts.append(np.divide(matrix[..., second, first], scale, out=unknown, where=scale > 0))
    return np.concatenate(parts, axis=-1)


def variance_labels(groups: Groups) -> list[tuple[str, str]]:
    """Group and term of each variance, the residual's last."""
    labels = [(group, effect) for group, effects in groups for effect in effects]
    return [*labels, (RESIDUAL, RESIDUAL)]


def correlation_labels(groups: Groups) -> list[tuple[str, str, str]]:
    """Group and the two terms of each correlation."""
    return [(group, *pair) for group, effects in groups for pair in combinations(effects, 2)]


def frames_by_group(
    groups: Groups, indices: Iterable[pd.Index], values: Iterable[np.ndarray]
) -> dict[str, pd.DataFrame]:
    """Per grouping factor a frame with a column per effect, of all its terms, given per term the
    index (k,) and the values (k, q)."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for (group, effects), index, part in zip(groups, indices, values, strict=True):
        frames.setdefault(group, []).append(pd.DataFrame(part, index, list(effects)))
    return {
        group: parts[0] if len(parts) == 1 else pd.concat(parts, axis=1)
        for group, parts in frames.items()
    }


def theta_labels(groups: Groups) -> list[tuple[str, ...]]:
    """Group and effects of each entry of theta, in its order: one effect on the diagonal."""
    return [
        (group, effects[j]) if i == j else (group, effects[j], effects[i])
        for group, effects in groups
        for i, j in zip(*natural.triangle(len(effects)), strict=True)
    ]


def fisher_columns(values: np.ndarray, sizes: natural.Sizes) -> np.ndarray:
    """What of (b, m + 1) `Estimate.parameters`, or their errors, belongs to Fisher's z of each
    correlation, in the order of `correlation_labels`; NaN for those that depend on several.

    Coordinates run row by row, and tanh of a row's first is its correlation with the first effect;
    those after it are of partial correlations.
    """
    places: list[int] = []
    start = 0
    for q in sizes:
        firsts = [start + q + i * (i - 1) // 2 for i in range(q)]
        places += [firsts[i] if j == 0 else -1 for j, i in combinations(range(q), 2)]
        start += q * (q + 1) // 2
    unknown = np.full((len(values), 1), np.nan)
    return np.concatenate([values, unknown], axis=1)[:, places]
