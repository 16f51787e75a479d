"""Degrees of freedom that are counted: "between-within".

With groups nested in each other, m_1 of the coarsest, m_2, ... and the n rows last, a column of X
is estimated at the coarsest level within whose groups it is constant, and its coefficient has
m_i - (m_(i-1) + p_i) degrees of freedom for p_i columns of level i. m_0 is 1 with an intercept and
0 without one; the intercept itself is counted with the rows, and in no p_i. This is the rule of
Pinheiro and Bates (2000, Mixed-Effects Models in S and S-PLUS, section 2.4.2), which nlme and R's
mmrm have: for subjects and visits, number of subjects less the effects between them, and rows less
subjects less the effects within. SAS's DDFM=BW differs with unstructured covariances, where it
gives all effects those between subjects. A linear function of several coefficients has the smallest
of theirs, as in mmrm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.model.groups import contains

INVOLVED = 1e-10  # smallest coefficient of a linear function that counts, relative to the largest


@dataclass(frozen=True)
class BetweenWithin:
    """An `Approximation` for tests.

    Attributes:
        vcov: (p, p).
        degrees: (p,), of each coefficient; NaN where no group is left over.
    """

    vcov: np.ndarray
    degrees: np.ndarray

    @staticmethod
    def of(fit: FittedModel) -> BetweenWithin:
        """Of the grouping factors of a fit, the subjects of ``residual=`` among them.

        Raises:
            DataError: factors that are not nested in each other.
        """
        fit.require_independent_levels("count degrees of freedom between and within groups")
        return BetweenWithin(fit.vcov_array, counted(fit.frame.X, _nested_levels(fit)))

    def single(self, rows: np.ndarray) -> np.ndarray:
        """Degrees of freedom (k,) of the t tests of (k, p) `rows`."""
        size = np.abs(rows)
        involved = size > INVOLVED * size.max(axis=1, keepdims=True)
        return np.where(involved, self.degrees, np.inf).min(axis=1)

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """Denominator degrees of freedom, and 1, of the joint test of (k, p) `rows`."""
        return float(self.single(rows).min()), 1.0


def counted(X: np.ndarray, levels: list[np.ndarray]) -> np.ndarray:
    """Degrees of freedom (p,) of the coefficients of X (n, p), with the codes (n,) of `levels`, the
    coarsest first."""
    intercept = np.all(X[:1] == X, axis=0) & np.any(X != 0, axis=0)
    place = np.full(X.shape[1], len(levels))
    for k in reversed(range(len(levels))):
        first = np.unique(levels[k], return_index=True)[1]
        constant = np.all(X[first][levels[k]] == X, axis=0)
        place[constant] = k
    place[intercept] = len(levels)
    columns = np.bincount(place[~intercept], minlength=len(levels) + 1)
    groups = np.array([intercept.any(), *(own.max() + 1 for own in levels), len(X)], float)
    degrees = groups[1:] - groups[:-1] - columns
    return np.where(degrees > 0, degrees, np.nan)[place]


def _nested_levels(fit: FittedModel) -> list[np.ndarray]:
    """Codes of the different grouping factors, the coarsest first."""
    frame = fit.frame
    named = {term.name: term.codes for term in frame.terms}
    if frame.residual is not None and frame.residual.words.subject is not None:
        named[frame.residual.words.subject] = frame.residual.codes
    found: list[tuple[str, np.ndarray]] = []
    for name, codes in named.items():
        own = np.unique(codes, return_inverse=True)[1]
        if not any(contains(own, other) and contains(other, own) for _, other in found):
            found.append((name, own))
    found.sort(key=lambda pair: int(pair[1].max()))
    for (outer, above), (inner, below) in pairwise(found):
        if not contains(above, below):
            raise DataError(
                f'df="between-within" is for groups within groups, and levels of {inner!r} are in '
                f"several of {outer!r}; ask for another df"
            )
    return [codes for _, codes in found]
