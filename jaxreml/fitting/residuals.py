"""The covariance of a fit's residuals within subjects, as a fit keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.residual import ResidualTerm, Words, covariance, labels_of, words_of
from jaxreml.model.covariance.residual import Residual


@dataclass(frozen=True)
class ResidualCovariance:
    """See above.

    Attributes:
        text: the argument ``residual`` of `jaxreml.fit`.
        visits, arms, subjects: labels, in order; no arms where all subjects share one covariance.
        modes: (subjects, visits of all arms), what a subject's residuals say of those of its other
            visits: sigma2 (M - I) Z' V^-1 (y - X beta).
        seen: likewise, 1 for visits with a response.
        context: with the covariance, where it is the user's; not saved.
    """

    text: str
    visits: tuple[Any, ...]
    arms: tuple[Any, ...]
    subjects: tuple[Any, ...]
    modes: np.ndarray
    seen: np.ndarray
    context: Mapping[str, Any] | None = field(default=None, metadata={"saved": False})

    @staticmethod
    def of(term: ResidualTerm, modes: np.ndarray) -> ResidualCovariance:
        """That of a model frame, with `modes` of the design, whose levels may be more."""
        seen = np.zeros((len(term.subjects), modes.shape[1]))
        seen[term.codes, term.places] = 1.0
        labels = term.visits, term.arms, term.subjects
        own = None if term.words.own is None else {term.words.family: term.words.own}
        modes = np.asarray(modes)[: len(seen)]
        return ResidualCovariance(term.words.text, *labels, modes, seen, own)

    @cached_property
    def words(self) -> Words:
        """What the text says."""
        return words_of(self.text, self.context)

    @cached_property
    def block(self) -> Residual:
        """The map from parameters to the covariance."""
        return covariance(self.words, self.visits, self.arms)

    @property
    def effects(self) -> tuple[str, ...]:
        """Labels of the visits of all arms, as texts."""
        return labels_of(self.visits, self.arms)

    def frame(self, matrix: np.ndarray) -> pd.DataFrame:
        """A matrix of the visits of all arms, with labels."""
        visits = self.effects if self.arms else self.visits
        index = pd.Index(visits, name=self.words.visit)
        return pd.DataFrame(matrix, index, index.rename(None))
