"""Relationship matrices from genotypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.kernels.known import labelled

EFFECTS = ("additive", "dominance")
BLOCK = 4096  # markers at a time


def from_genotypes(
    genotypes: Any, labels: Sequence[Any] | None = None, *, effect: str = "additive"
) -> pd.DataFrame:
    """Genomic relationship matrix of individuals: what GBLUP has for the covariance of their
    breeding values.

    The additive one is the first of VanRaden (2008, J. Dairy Science 91:4414), M M' / (2 sum
    p (1 - p)) with M the counts less twice the frequencies p of the allele counted. That of
    dominance deviations is of Vitezica, Varona and Legarra (2013, Genetics 195:1223), orthogonal to
    the first in Hardy-Weinberg proportions. Frequencies are those of these individuals. A missing
    genotype counts as the mean of its marker, and a marker without variation not at all.

    Args:
        genotypes: (individuals, markers), counts 0, 1 and 2 of an allele, NaN where missing; for
            additive effects any numbers in between too (imputed dosages). A frame with the
            individuals as its index, or an array.
        labels: of the individuals, as the data have them; those of the frame, or 0, 1, ..., if left
            out.
        effect: "additive" or "dominance".

    Returns:
        A frame with the labels on both sides, for ``kernels=``.

    Raises:
        DataError: other numbers, named; no marker that varies; labels of another number.
        ValueError: another effect.

    Examples:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from jaxreml import kernels
        >>> counts = pd.DataFrame([[0, 1, 2], [1, 1, 0], [2, 1, np.nan]], ["ann", "bob", "cy"])
        >>> kernels.from_genotypes(counts).round(2)
              ann   bob    cy
        ann  1.33 -0.67 -0.67
        bob -0.67  0.67  0.00
        cy  -0.67  0.00  0.67
    """
    if effect not in EFFECTS:
        raise ValueError(f'effect must be "additive" or "dominance", not {effect!r}')
    index = labelled("genotypes", genotypes, labels)
    values = genotypes if isinstance(genotypes, pd.DataFrame) else np.asarray(genotypes)
    if values.ndim != 2:
        raise DataError(f"genotypes must be individuals by markers, not of shape {values.shape}")
    n, markers = values.shape
    total, scale = np.zeros((n, n)), 0.0
    for start in range(0, markers, BLOCK):
        part = values[:, start : start + BLOCK] if isinstance(values, np.ndarray) else None
        if part is None:
            part = genotypes.iloc[:, start : start + BLOCK].to_numpy()
        counts = _checked(part, start, effect, index)
        columns, own = _columns(counts, effect)
        total += columns @ columns.T
        scale += own
    if not scale > 0:
        raise DataError("no marker varies between the individuals, so that none tells them apart")
    return pd.DataFrame(total / scale, index, index)


def _checked(part: np.ndarray, start: int, effect: str, index: pd.Index) -> np.ndarray:
    try:
        counts = part.astype(float)
    except (TypeError, ValueError):
        raise DataError("genotypes must be numbers, counts 0, 1, 2 of an allele") from None
    with np.errstate(invalid="ignore"):
        bad = (counts < 0) | (counts > 2)
        if effect == "dominance":
            bad |= ~np.isnan(counts) & (counts != np.round(counts))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        what = "0, 1 or 2" if effect == "dominance" else "from 0 to 2"
        raise DataError(
            f"genotypes must be {what}, or NaN where missing; individual {index[row]!r} has "
            f"{counts[row, column]:g} at marker {start + column}"
        )
    return counts


def _columns(counts: np.ndarray, effect: str) -> tuple[np.ndarray, float]:
    """Centred columns, zero where missing, and the sum of the variances that they have in
    Hardy-Weinberg proportions."""
    missing = np.isnan(counts)
    known = np.maximum((~missing).sum(axis=0), 1)
    p = np.where(missing, 0.0, counts).sum(axis=0) / (2 * known)
    heterozygosity = 2 * p * (1 - p)
    if effect == "additive":
        return np.where(missing, 0.0, counts - 2 * p), float(heterozygosity.sum())
    deviations = np.select(
        [counts == 2, counts == 1], [-2 * (1 - p) ** 2, heterozygosity], -2 * p**2
    )
    varies = heterozygosity > 0
    return np.where(missing | ~varies, 0.0, deviations), float((heterozygosity**2).sum())
