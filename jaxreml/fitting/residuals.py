"""The covariance of a fit's residuals within subjects, as a fit keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.residual import (
    FAMILIES,
    ResidualTerm,
    Words,
    covariance,
    is_series,
    labels_of,
    places_in_time,
    words_of,
)
from jaxreml.model.covariance.residual import Residual
from jaxreml.model.covariance.timed import Timed


@dataclass(frozen=True)
class ResidualCovariance:
    """See above.

    Attributes:
        text: the argument ``residual`` of `jaxreml.fit`.
        visits, arms, subjects: labels, in order; no arms where all subjects share one covariance.
        modes: (subjects, visits of all arms), what a subject's residuals say of those of its other
            visits: sigma2 (M - I) Z' V^-1 (y - X beta). Where subjects are at times of their own,
            (rows, 1), V0^-1 (y - X beta).
        seen: as modes, 1 for visits with a response; empty where subjects are at their own.
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
        labels = term.visits, term.arms, term.subjects
        if is_series(term.words, term.visits):
            return ResidualCovariance(term.words.text, *labels, np.asarray(modes), np.zeros((0, 0)))
        seen = np.zeros((len(term.subjects), modes.shape[1]))
        seen[term.codes, term.places] = 1.0
        own = None if term.words.own is None else {term.words.family: term.words.own}
        modes = np.asarray(modes)[: len(seen)]
        return ResidualCovariance(term.words.text, *labels, modes, seen, own)

    @staticmethod
    def of_labels(term: ResidualTerm) -> ResidualCovariance:
        """That of a model frame without what a fit says of its subjects."""
        series = is_series(term.words, term.visits)
        size = 1 if series else len(labels_of(term.visits, term.arms))
        return ResidualCovariance.of(term, np.zeros((len(term.codes) if series else 0, size)))

    @property
    def of_unseen(self) -> ResidualCovariance:
        """The same without what is known of visits with a response, from which residuals follow."""
        return replace(self, modes=np.where(self.seen > 0, 0.0, self.modes))

    @cached_property
    def words(self) -> Words:
        """What the text says."""
        return words_of(self.text, self.context)

    @cached_property
    def block(self) -> Residual | Timed:
        """The map from parameters to the covariance."""
        return covariance(self.words, self.visits, self.arms)

    @cached_property
    def times(self) -> np.ndarray:
        """Where each visit is in time, of those that are a function of the distance."""
        return places_in_time(self.words.family, self.visits)

    def relative(self, factor: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """M, the covariances over sigma2, between visits, (k,) and (l,) of those of all arms, for
        what `Block.factor` is."""
        block = self.block
        if isinstance(block, Timed):
            return block.relative(factor[0, 0], self.times[rows], self.times[columns])
        return factor[rows] @ factor[columns].T

    @property
    def is_timed(self) -> bool:
        """Whether visits are numbers whose distances count."""
        return FAMILIES[self.words.family].timed

    @property
    def is_chain(self) -> bool:
        """Whether subjects are at times of their own and residuals depend on the one before
        alone."""
        block = self.block
        return isinstance(block, Timed) and block.correlation.markov

    def neighbours(self, z: float, visits: np.ndarray) -> np.ndarray:
        """Correlations (k,) of residuals at visits with those before them, the first's 0."""
        gaps = np.abs(np.diff(self.times[visits]))
        return np.append(0.0, self.block.correlation.of_distance(np.float64(z), gaps))  # pyright: ignore

    @property
    def effects(self) -> tuple[str, ...]:
        """Labels of the visits of all arms, as texts."""
        return labels_of(self.visits, self.arms)

    def frame(self, matrix: np.ndarray) -> pd.DataFrame:
        """A matrix of the visits of all arms, with labels."""
        visits = self.effects if self.arms else self.visits
        index = pd.Index(visits, name=self.words.visit)
        return pd.DataFrame(matrix, index, index.rename(None))
