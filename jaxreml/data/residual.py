"""``residual="us(visit | subject)"``: a covariance of the residuals, from its words to arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.columns import is_amount, label
from jaxreml.data.formula import RESIDUAL, single_name
from jaxreml.data.grouping import combined_codes, same_partition
from jaxreml.errors import DataError, FormulaError
from jaxreml.model.arrays import Term
from jaxreml.model.covariance import correlations
from jaxreml.model.covariance.own import Custom
from jaxreml.model.covariance.residual import Residual
from jaxreml.model.covariance.timed import Timed
from jaxreml.model.covariance.words import FAMILIES, RESIDUALS, own_covariance
from jaxreml.model.groups import crossing

# A covariance matrix of more is out of reach; where it is a function of the distance, it is not
# needed.
MOST_VISITS = 60


@dataclass(frozen=True)
class Words:
    """An argument ``residual``.

    Attributes:
        text: as given.
        family: a word of `FAMILIES`, or of the user's.
        visit, subject, arm: names of the columns; no arm where all share one covariance, and no
            subject in ``diag(group)``, where residuals are independent.
        own: the covariance, if the word is the user's.
    """

    text: str
    family: str
    visit: str
    subject: str | None
    arm: str | None = None
    own: Custom | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns."""
        return tuple(name for name in (self.visit, self.subject, self.arm) if name is not None)


@dataclass(frozen=True)
class ResidualTerm:
    """The residuals' covariance of a model frame.

    Attributes:
        words: what it says.
        visits, arms, subjects: labels, in order; no arms where all subjects share one covariance.
        places: (n,), the visit of each row; with arms, that among the visits of all arms.
        codes: (n,), the subject of each row.
    """

    words: Words
    visits: tuple[Any, ...]
    arms: tuple[Any, ...]
    subjects: tuple[Any, ...]
    places: np.ndarray
    codes: np.ndarray

    @property
    def block(self) -> Residual | Timed:
        """The map from parameters to the covariance."""
        return covariance(self.words, self.visits, self.arms)

    @property
    def term(self) -> Term:
        """What stands for it in a design."""
        if is_series(self.words, self.visits):
            times = places_in_time(self.words.family, self.visits)[self.places, None]
            label = (self.words.visit,)
            return Term(self.codes, times, RESIDUAL, label, lambda size: self.block)
        labels = labels_of(self.visits, self.arms)
        effects = np.zeros((len(self.codes), len(labels)))
        effects[np.arange(len(effects)), self.places] = 1.0

        return Term(self.codes, effects, RESIDUAL, labels, lambda size: self.block)


def labels_of(visits: tuple[Any, ...], arms: tuple[Any, ...]) -> tuple[str, ...]:
    """Labels as texts, of the visits of all arms; numbers as short as they can be."""
    short = [f"{visit:g}" if isinstance(visit, float) else str(visit) for visit in visits]
    return tuple(f"{arm}: {visit}" for arm in arms for visit in short) if arms else tuple(short)


def is_series(words: Words, visits: tuple[Any, ...]) -> bool:
    """Whether there is no matrix of so many visits: each subject is at its own."""
    if len(visits) <= MOST_VISITS or words.own is not None:
        return False
    return _is_stationary(words.family)


def _is_stationary(family: str) -> bool:
    """Whether a word is of a function of the distance alone."""
    return isinstance(FAMILIES[family].correlation(2, (0.0, 1.0)), correlations.Stationary)


def places_in_time(family: str, visits: tuple[Any, ...]) -> np.ndarray:
    """Where each visit is: its time, or its place among the visits, neighbours one apart."""
    return np.array(visits, float) if FAMILIES[family].timed else np.arange(float(len(visits)))


def covariance(words: Words, visits: tuple[Any, ...], arms: tuple[Any, ...]) -> Residual | Timed:
    """Of visits with these labels; with arms, once for each."""
    if words.own is not None:
        return words.own.residual(len(visits), visits)
    family = words.family
    if is_series(words, visits):
        law: Any = FAMILIES[family].correlation(2, (0.0, 1.0))
        return Timed(1, law)
    own, size, count = FAMILIES[family], len(visits), max(len(arms), 1)
    correlation = own.correlation(size, tuple(map(float, visits)) if own.timed else ())
    if arms:
        correlation = correlations.Copies(size * count, correlation)
    variances = np.arange(size * count) if own.residual else np.repeat(np.arange(count), size)
    return Residual(size * count, correlation, tuple(variances.tolist()))


def words_of(text: str, context: Mapping[str, Any] | None = None) -> Words:
    """What ``us(visit | subject)``, ``us(visit | arm/subject)`` or ``diag(group)`` says, or a word
    of the user's for a covariance in the `context`.

    Raises:
        FormulaError: another form, or a family that is not known.
    """
    form = "residual must be of the form 'us(visit | subject)'"
    if not isinstance(text, str):
        raise FormulaError(f"{form}, not {type(text).__name__}")
    by_level = re.fullmatch(r"\s*diag\s*\(([^|]*)\)\s*", text)
    if by_level is not None:
        group = single_name(by_level[1])
        if group is None:
            raise FormulaError(f"residual must be of the form 'diag(group)', not {text!r}")
        return Words(text, "diag", group, None)
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\|(.*)\)\s*", text, re.DOTALL)
    if found is None:
        raise FormulaError(f"{form}, not {text!r}")
    family = found[1]
    own = own_covariance(family, context)
    if own is None and family not in RESIDUALS:
        hint = ""
        if family in FAMILIES:
            hint = f"; {family!r} is a word for random effects, in the formula"
        raise FormulaError(
            f"{family!r} is no residual covariance; there are {', '.join(RESIDUALS)}{hint}, and "
            "jaxreml.covariance.custom makes one of your own, given in context"
        )
    arm, _, last = found[3].rpartition("/")
    names = [single_name(part) for part in ([found[2], last, arm] if arm else [found[2], last])]
    if None in names:
        raise FormulaError(
            f"{form}, or 'us(visit | arm/subject)' for a covariance of each arm, with column "
            f"names in these places, not {text!r}"
        )
    if len(set(names)) < len(names):
        raise FormulaError(f"{text!r} has the same column in two places")
    if own is None:
        return Words(text, family, *names)  # pyright: ignore
    if arm:
        raise FormulaError(
            f"{text!r}: a covariance of your own is one for all subjects, so far; copies for each "
            f"{arm.strip()} are there for {', '.join(RESIDUALS)}"
        )
    return Words(text, family, *names, own=own)  # pyright: ignore


def residual_term(
    text: str,
    table: pd.DataFrame,
    factors: Sequence[np.ndarray] = (),
    context: Mapping[str, Any] | None = None,
) -> ResidualTerm:
    """The term of complete rows.

    Args:
        text: the argument ``residual``.
        table: with its columns.
        factors: codes (n,) of the grouping factors of random effects.
        context: with covariances of the user's own.

    Raises:
        DataError: a subject with the same visit twice, times that are not numbers, fewer than two
            visits or subjects, too many visits, nothing to estimate a correlation from: named.
    """
    words = words_of(text, context)
    if words.subject is None:
        return _by_level(words, table, factors)
    visit, subject, own = words.visit, words.subject, FAMILIES.get(words.family)
    column = pd.Series(table[visit])
    if own is not None and own.timed and not is_amount(column):
        raise DataError(
            f"residual={text!r} needs numbers for {visit!r}, and it has values such as "
            f"{column.tolist()[0]!r}"
        )
    visits, subjects = pd.Categorical(table[visit]), pd.Categorical(table[subject])
    visits, subjects = visits.remove_unused_categories(), subjects.remove_unused_categories()
    for name, found, what in ((visit, visits, "visits"), (subject, subjects, "subjects")):
        # One subject tells the parameters of a covariance if these are few.
        if len(found.categories) < (1 if own is None and what == "subjects" else 2):
            raise DataError(
                f"residual={text!r}: {name!r} has one value, and {what} are two or more"
            )
    levels = len(visits.categories)
    if levels > MOST_VISITS and not is_series(words, tuple(range(levels))):
        distance = filter(_is_stationary, RESIDUALS)
        raise DataError(
            f"residual={text!r}: {visit!r} has {levels:,} different values, and "
            f"{words.family!r} has a matrix of all of them, which may be {MOST_VISITS}. Of more, "
            f"there are functions of the distance ({', '.join(distance)}); or round to fewer"
        )
    if levels > MOST_VISITS and words.arm is not None:
        raise DataError(
            f"residual={text!r}: with {levels:,} different values of {visit!r} there is one "
            f"covariance for all subjects, and not one of each {words.arm!r}, so far"
        )
    places, codes = np.asarray(visits.codes), np.asarray(subjects.codes)
    _refuse_repeats(text, visit, subject, table, codes.astype(np.int64) * 10**6 + places)
    correlated = own is None or own.correlation(2, (0.0, 1.0)).count
    if correlated and np.bincount(codes).max() < 2:
        raise DataError(
            f"residual={text!r}: no {subject!r} has two visits, so nothing is known of their "
            "correlation"
        )
    places, codes, arms = places.astype(np.int64), codes.astype(np.int64), ()
    if words.arm is not None:
        of_arm = pd.Categorical(table[words.arm]).remove_unused_categories()
        arms = tuple(of_arm.categories.tolist())
        _refuse_two_arms(words, table, codes, np.asarray(of_arm.codes))
        places = places + len(visits.categories) * np.asarray(of_arm.codes, np.int64)
    names = np.asarray(subjects.categories, object)
    for other in factors:
        if same_partition(other, codes):  # one factor of the design, not two
            first = np.unique(other, return_index=True)[1]
            codes, names = other, names[codes[first]]
            break
    labels = tuple(visits.categories.tolist()), arms, tuple(names.tolist())
    return ResidualTerm(words, *labels, places, codes)


def _by_level(words: Words, table: pd.DataFrame, factors: Sequence[np.ndarray]) -> ResidualTerm:
    """``diag(group)``: independent rows, with a variance for each level of a column.

    A diagonal covariance is the same whatever rows make a subject, as long as none has a level
    twice. These are taken within the cells of the grouping factors, so that all stay nested.
    """
    levels = pd.Categorical(table[words.visit]).remove_unused_categories()
    count = len(levels.categories)
    if not 1 < count <= MOST_VISITS:
        raise DataError(
            f"residual={words.text!r}: {words.visit!r} has {count} different values, and a "
            f"variance for each is there for 2 to {MOST_VISITS}"
        )
    places = np.asarray(levels.codes, np.int64)
    cells = combined_codes([*factors, np.zeros(len(places), np.int64)])
    turn = pd.Series(cells).groupby([cells, places]).cumcount().to_numpy()
    codes = combined_codes([cells, turn])
    subjects = tuple(range(int(codes.max()) + 1))
    return ResidualTerm(words, tuple(levels.categories.tolist()), (), subjects, places, codes)


def refuse_perfect(term: ResidualTerm, X: np.ndarray) -> None:
    """Raise DataError if rows with a variance of their own are fitted exactly by X (n, p): beside
    no random effects the likelihood has no bound as that variance goes to zero."""
    if term.words.family != "diag":
        return
    labels = labels_of(term.visits, term.arms)
    for k, count in enumerate(np.bincount(term.places, minlength=len(labels))):
        rows = X[term.places == k] if count <= X.shape[1] else X[:0]
        if len(rows) and np.linalg.matrix_rank(rows) == count:
            raise DataError(
                f"residual={term.words.text!r}: the rows with {term.words.visit} {labels[k]!r}, "
                f"{count} of them, are fitted exactly by the fixed effects, so that nothing is "
                "left to estimate their variance from; put the level together with another"
            )


def _refuse_two_arms(
    words: Words, table: pd.DataFrame, codes: np.ndarray, arms: np.ndarray
) -> None:
    other = crossing(arms, codes)
    if other.any():
        row = int(np.argmax(other))
        raise DataError(
            f"residual={words.text!r}: {words.subject} {table[words.subject].iloc[row]!r} is in "
            f"two of {words.arm!r}; each subject has one covariance"
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
