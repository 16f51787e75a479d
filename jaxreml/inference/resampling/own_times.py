"""Residuals drawn at times of each subject's own, of which there is no one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from jaxreml.data.residual import ResidualTerm
from jaxreml.fitting.residuals import ResidualCovariance


@dataclass(frozen=True)
class OwnTimes:
    """What makes such residuals of independent ones.

    Attributes:
        law: the covariance of a fit.
        factor: its coordinate, as `ResidualCovariance.relative` takes it.
    """

    law: ResidualCovariance
    factor: np.ndarray

    def correlated(self, standard: np.ndarray, term: ResidualTerm) -> np.ndarray:
        """Residuals over sigma, (b, n), of independent ones with variance one."""
        found = np.empty_like(standard)
        order = np.lexsort((term.places, term.codes))
        codes = term.codes[order]
        first = np.diff(codes, prepend=-1) != 0
        if self.law.is_chain:  # each is r times the one before, and what is new
            r = self.law.neighbours(float(self.factor[0, 0]), term.places[order])
            r = np.where(first, 0.0, r)
            bands = np.stack([np.ones(len(r)), np.append(-r[1:], 0.0)])
            new = standard[:, order] * np.sqrt(1 - r**2)
            found[:, order] = scipy.linalg.solve_banded((1, 0), bands, new.T).T
            return found
        roots: dict[bytes, np.ndarray] = {}
        for rows in np.split(order, np.flatnonzero(first)[1:]):
            places = term.places[rows]
            if (key := places.tobytes()) not in roots:
                matrix = self.law.relative(self.factor, places, places)
                values, vectors = np.linalg.eigh(matrix)
                roots[key] = vectors * np.sqrt(np.maximum(values, 0.0))
            found[:, rows] = standard[:, rows] @ roots[key].T
        return found
