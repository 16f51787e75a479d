"""``residual="us(visit | subject)"``: a covariance of the residuals, from its words to arrays."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.data.columns import is_amount, label
from jaxreml.data.formula import RESIDUAL, single_name
from jaxreml.errors import DataError, FormulaError
from jaxreml.model.arrays import Term
from jaxreml.model.covariance import correlations
from jaxreml.model.covariance.correlations import Correlation
from jaxreml.model.covariance.residual import Residual

MOST_VISITS = 60  # a covariance matrix of more is out of reach


class Family(NamedTuple):
    """A word for a covariance.

    Attributes:
        correlation: made from the number of visits and their times.
        each: whether every visit has a variance of its own.
        timed: whether visits are numbers, whose distances count.
    """

    correlation: Callable[[int, tuple[float, ...]], Correlation]
    each: bool
    timed: bool = False


def _plain(kind: Callable[[int], Correlation]) -> Callable[[int, tuple[float, ...]], Correlation]:
    return lambda size, times: kind(size)


FAMILIES = {
    "us": Family(_plain(correlations.Unrestricted), True),
    "diag": Family(_plain(correlations.Independent), True),
    "cs": Family(_plain(correlations.Exchangeable), False),
    "csh": Family(_plain(correlations.Exchangeable), True),
    "ar1": Family(_plain(correlations.Autoregressive), False),
    "ar1h": Family(_plain(correlations.Autoregressive), True),
    "ad": Family(_plain(correlations.Antedependent), False),
    "adh": Family(_plain(correlations.Antedependent), True),
    "toep": Family(_plain(correlations.Toeplitz), False),
    "toeph": Family(_plain(correlations.Toeplitz), True),
    "sp_exp": Family(lambda size, times: correlations.Distance(size, times), False, True),
    "sp_gau": Family(lambda size, times: correlations.Distance(size, times, True), False, True),
}


@dataclass(frozen=True)
class ResidualTerm:
    """The residuals' covariance of a model frame.

    Attributes:
        text: as given.
        family: a word of `FAMILIES`.
        visit, subject: names of the columns.
        visits: labels of the visits, in order.
        places: (n,), the visit of each row.
        subjects: labels, in order.
        codes: (n,), the subject of each row.
    """

    text: str
    family: str
    visit: str
    subject: str
    visits: tuple[Any, ...]
    places: np.ndarray
    subjects: tuple[Any, ...]
    codes: np.ndarray

    def covariance(self, size: int) -> Residual:
        """Of the visits."""
        return covariance(self.family, self.visits)

    @property
    def term(self) -> Term:
        """What stands for it in a design."""
        effects = np.zeros((len(self.codes), len(self.visits)))
        effects[np.arange(len(effects)), self.places] = 1.0
        return Term(self.codes, effects, RESIDUAL, labels_of(self.visits), self.covariance)


def labels_of(visits: tuple[Any, ...]) -> tuple[str, ...]:
    """Labels as texts; numbers as short as they can be."""
    return tuple(f"{visit:g}" if isinstance(visit, float) else str(visit) for visit in visits)


def covariance(family: str, visits: tuple[Any, ...]) -> Residual:
    """Of visits with these labels."""
    own = FAMILIES[family]
    times = tuple(map(float, visits)) if own.timed else ()
    size = len(visits)
    return Residual(size, own.correlation(size, times), own.each)


def names_of(text: str) -> tuple[str, str, str]:
    """Family, visit and subject of ``us(visit | subject)``.

    Raises:
        FormulaError: another form, or a family that is not known.
    """
    form = "residual must be of the form 'us(visit | subject)'"
    if not isinstance(text, str):
        raise FormulaError(f"{form}, not {type(text).__name__}")
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\|(.*)\)\s*", text, re.DOTALL)
    if found is None:
        raise FormulaError(f"{form}, not {text!r}")
    family = found[1]
    if family not in FAMILIES:
        raise FormulaError(f"{family!r} is no residual covariance; there are {', '.join(FAMILIES)}")
    visit, subject = (single_name(part) for part in found.groups()[1:])
    if visit is None or subject is None:
        raise FormulaError(
            f"{form} with a column name on each side of the bar, not {text!r}; copies for each arm "
            "(arm/subject) are not there yet"
        )
    if visit == subject:
        raise FormulaError(f"{text!r} has the same column for visits and subjects")
    return family, visit, subject


def residual_term(text: str, table: pd.DataFrame) -> ResidualTerm:
    """The term of complete rows.

    Raises:
        DataError: a subject with the same visit twice, times that are not numbers, fewer than two
            visits or subjects, too many visits, nothing to estimate a correlation from: named.
    """
    family, visit, subject = names_of(text)
    own = FAMILIES[family]
    column = pd.Series(table[visit])
    if own.timed and not is_amount(column):
        raise DataError(
            f"residual={text!r} needs numbers for {visit!r}, and it has values such as "
            f"{column.tolist()[0]!r}"
        )
    visits, subjects = pd.Categorical(table[visit]), pd.Categorical(table[subject])
    visits, subjects = visits.remove_unused_categories(), subjects.remove_unused_categories()
    for name, found, what in ((visit, visits, "visits"), (subject, subjects, "subjects")):
        if len(found.categories) < 2:
            raise DataError(
                f"residual={text!r}: {name!r} has one value, and {what} are two or more"
            )
    if len(visits.categories) > MOST_VISITS:
        raise DataError(
            f"residual={text!r}: {visit!r} has {len(visits.categories)} different values, and a "
            f"covariance of more than {MOST_VISITS} is not there yet; round times to fewer"
        )
    places, codes = np.asarray(visits.codes), np.asarray(subjects.codes)
    _refuse_repeats(text, visit, subject, table, codes.astype(np.int64) * 10**6 + places)
    if own.correlation(2, (0.0, 1.0)).count and np.bincount(codes).max() < 2:
        raise DataError(
            f"residual={text!r}: no {subject!r} has two visits, so nothing is known of their "
            "correlation"
        )
    return ResidualTerm(
        text,
        family,
        visit,
        subject,
        tuple(visits.categories.tolist()),
        places.astype(np.int64),
        tuple(subjects.categories.tolist()),
        codes.astype(np.int64),
    )


def _refuse_repeats(
    text: str, visit: str, subject: str, table: pd.DataFrame, pairs: np.ndarray
) -> None:
    repeated = pd.Series(pairs).duplicated().to_numpy()
    if repeated.any():
        row = int(np.argmax(repeated))
        raise DataError(
            f"residual={text!r}: {subject} {table[subject].iloc[row]!r} has {visit} "
            f"{table[visit].iloc[row]!r} twice, the second in row {label(table.index[row:])}; each "
            "subject has each visit once"
        )
