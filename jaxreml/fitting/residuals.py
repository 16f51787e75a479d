"""The covariance of a fit's residuals within subjects, as a fit keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.residual import ResidualTerm, covariance, labels_of
from jaxreml.model.covariance.residual import Residual


@dataclass(frozen=True)
class ResidualCovariance:
    """See above.

    Attributes:
        text: the argument ``residual`` of `jaxreml.fit`.
        family: its word, "us" for example.
        visit, subject: names of the columns.
        visits, subjects: their labels, in order.
        modes: (subjects, visits), what a subject's residuals say of those of its other visits:
            sigma2 (M - I) Z' V^-1 (y - X beta).
        seen: (subjects, visits), 1 for visits with a response.
    """

    text: str
    family: str
    visit: str
    subject: str
    visits: tuple[Any, ...]
    subjects: tuple[Any, ...]
    modes: np.ndarray
    seen: np.ndarray

    @staticmethod
    def of(term: ResidualTerm, modes: np.ndarray) -> ResidualCovariance:
        """That of a model frame, with `modes` of the design, whose levels may be more."""
        seen = np.zeros((len(term.subjects), len(term.visits)))
        seen[term.codes, term.places] = 1.0
        labels = term.text, term.family, term.visit, term.subject, term.visits, term.subjects
        return ResidualCovariance(*labels, np.asarray(modes)[: len(seen)], seen)

    @cached_property
    def block(self) -> Residual:
        """The map from parameters to the covariance."""
        return covariance(self.family, self.visits)

    @property
    def effects(self) -> tuple[str, ...]:
        """Labels as texts."""
        return labels_of(self.visits)

    def frame(self, matrix: np.ndarray) -> pd.DataFrame:
        """A (visits, visits) matrix with labels."""
        index = pd.Index(self.visits, name=self.visit)
        return pd.DataFrame(matrix, index, index.rename(None))
