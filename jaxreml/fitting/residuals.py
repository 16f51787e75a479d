"""The covariance of a fit's residuals within subjects, as a fit keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.residual import ResidualTerm, covariance
from jaxreml.model.covariance.residual import Residual


@dataclass(frozen=True)
class ResidualCovariance:
    """See above.

    Attributes:
        text: the argument ``residual`` of `jaxreml.fit`.
        family: its word, "us" for example.
        visit, subject: names of the columns.
        visits: labels of the visits, in order.
        subjects: how many.
    """

    text: str
    family: str
    visit: str
    subject: str
    visits: tuple[Any, ...]
    subjects: int

    @staticmethod
    def of(term: ResidualTerm) -> ResidualCovariance:
        """That of a model frame."""
        return ResidualCovariance(
            term.text, term.family, term.visit, term.subject, term.visits, len(term.subjects)
        )

    @cached_property
    def block(self) -> Residual:
        """The map from parameters to the covariance."""
        return covariance(self.family, self.visits)

    @property
    def effects(self) -> tuple[str, ...]:
        """Labels as texts."""
        return tuple(map(str, self.visits))

    def frame(self, matrix: np.ndarray) -> pd.DataFrame:
        """A (visits, visits) matrix with labels."""
        index = pd.Index(self.visits, name=self.visit)
        return pd.DataFrame(matrix, index, index.rename(None))
