"""Random terms as arrays and labels, and what makes a term impossible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from formulaic.errors import FormulaicError

from jaxreml.data.encoding import Encoding, encode
from jaxreml.data.estimability import independent_columns
from jaxreml.data.evaluation import summands
from jaxreml.data.formula import RandomTerm
from jaxreml.data.places import MOST, encode_own, encode_places
from jaxreml.errors import DataError, FormulaError
from jaxreml.model.arrays import in_kernel, instead_of_residual, kernel_root, replaces_residual
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.unstructured import Unstructured
from jaxreml.model.covariance.words import (
    ANY,
    FAMILIES,
    TermCovariance,
    check_word,
    is_timed,
    own_covariance,
)


@dataclass(frozen=True)
class GroupingTerm:
    """A random term as arrays and labels.

    Attributes:
        name: the grouping factor, as lme4 names it.
        levels: labels, J of them, in order.
        codes: (n,) integers 0..J-1.
        effects: (n, q) columns.
        effect_names: q names.
        factors: the columns whose combinations are the levels.
        encoding: how the effects are made.
        covariance: of the effects.
        kernel: (J, J), the known covariance of the levels up to a factor, all of them, with rows or
            without; None for independent levels.
        source: the grouping factor's name in the formula, where it has kernels; "" otherwise.
    """

    name: str
    levels: tuple[Any, ...]
    codes: np.ndarray
    effects: np.ndarray
    effect_names: tuple[str, ...]
    factors: tuple[str, ...]
    encoding: Encoding
    covariance: TermCovariance = ANY
    kernel: np.ndarray | None = None
    source: str = ""

    def is_of(self, name: str) -> bool:
        """Whether a formula has the term on a grouping factor of this name."""
        return name in (self.name, self.source)

    @property
    def seen(self) -> np.ndarray:
        """Which levels have rows; all, but for those that only a kernel has."""
        return np.unique(self.codes)

    @property
    def lengths(self) -> np.ndarray:
        """(n, q), the effects times the standard deviations of their levels in the kernel."""
        if self.kernel is None:
            return self.effects
        return in_kernel(self.effects, self.codes, self.kernel)

    def drawn(self, rng: np.random.Generator, count: int, factor: np.ndarray) -> np.ndarray:
        """Random effects of all rows, (count, levels, q), with covariance L L' of a level's effects
        for the `factor` L (q, q); zero for levels of a kernel without rows."""
        if self.kernel is None:
            return rng.standard_normal((count, len(self.levels), len(factor))) @ factor.T
        standard = rng.standard_normal((count, len(self.seen), len(factor))) @ factor.T
        effects = np.zeros((count, len(self.levels), len(factor)))
        effects[:, self.seen] = np.einsum("lj,bja->bla", self._root, standard, optimize=True)
        return effects

    @cached_property
    def _root(self) -> np.ndarray:
        """A square root of the kernel of the levels with rows."""
        assert self.kernel is not None
        return kernel_root(self.kernel[np.ix_(self.seen, self.seen)])

    def block(self, size: int) -> Block:
        """The map from parameters to the covariance of so many effects."""
        return self.covariance.block(size, self.encoding.context)


def grouping_terms(
    bar: RandomTerm, table: pd.DataFrame, context: Mapping[str, Any]
) -> list[GroupingTerm]:
    """One term for correlated effects, one for each summand of uncorrelated ones."""
    word, options = bar.word or "us", dict(bar.options)
    check_word(word, options, context)
    codes, levels = _grouping_factor(bar, table)
    try:
        texts = [bar.effects] if bar.correlated else summands(bar.effects)
    except FormulaicError as error:
        raise FormulaError(f"{bar.effects!r}: {error}") from error
    terms: list[GroupingTerm] = []
    encoding: Any  # that of places is like others
    what = f"the random effects on {bar.name}"
    encoding: Any
    for text in texts:
        if is_timed(word):
            effects, encoding = encode_places(text, table, context, what)
            places = encoding.places
        elif own_covariance(word, context) is not None:
            effects, encoding, places = encode_own(text, table, context, what)
        else:
            (effects, encoding), places = encode(text, table, context, what), ()
        names = encoding.names
        if not names:
            raise FormulaError(f"the term ({bar.effects} | {bar.name}) has no random effects")
        covariance = TermCovariance(word, bar.options, places)
        term = GroupingTerm(
            bar.name, levels, codes, effects, names, bar.factors, encoding, covariance
        )
        _check_covariance(bar, term)
        terms.append(term)
    return terms


def _check_covariance(bar: RandomTerm, term: GroupingTerm) -> None:
    """Refuse effects that a covariance does not go with."""
    word, names = term.covariance.word, term.effect_names
    text = bar.text(":".join(bar.factors))
    if word in FAMILIES and FAMILIES[word].ordered and "(Intercept)" in names and len(names) > 1:
        raise FormulaError(
            f"{text!r} has an intercept among its effects, {', '.join(names)}, and {word!r} is of "
            f"effects in an order; write {word}(0 + ...) for the levels of a factor"
        )
    if word != "us" and len(names) > MOST:
        raise DataError(
            f"{text!r} has {len(names)} effects, and a covariance by a word of more than {MOST} is "
            "not there yet"
        )
    try:
        block = term.block(len(names))
    except DataError as error:
        raise DataError(f"{text!r}: {error}") from None
    count, levels = len(block.parameter_names("", names)), len(term.levels)
    if word != "us" and (count > levels * len(names) or getattr(block, "rank", 0) > levels):
        raise DataError(
            f"{text!r} has {count} parameters of a covariance of {len(names)} effects, and "
            f"{bar.name!r} has {levels} levels: these are too few to estimate them"
        )


def _grouping_factor(bar: RandomTerm, table: pd.DataFrame) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Codes and level labels; combinations of several columns, in R's order, if there are more."""
    factors = [pd.Categorical(table[name]) for name in bar.factors]
    codes = combined_codes([np.asarray(factor.codes) for factor in factors])
    first = np.unique(codes, return_index=True)[1]
    if len(factors) == 1:
        return codes, tuple(factors[0].categories[factors[0].codes[first]].tolist())
    parts = [map(str, factor.categories[factor.codes[first]].tolist()) for factor in factors]
    return codes, tuple(":".join(label) for label in zip(*parts, strict=True))


def combined_codes(factors: list[np.ndarray]) -> np.ndarray:
    """Codes 0, 1, ... of the combinations of several factors that occur, the first varies slowest.

    Numbered anew after every factor, so that many factors do not exceed 64 bits.
    """
    codes = np.zeros(len(factors[0]), np.int64)
    for factor in factors:
        pairs = codes * (int(factor.max(initial=0)) + 1) + factor
        codes = np.unique(pairs, return_inverse=True)[1]
    return codes


def lme4_order(terms: list[GroupingTerm]) -> list[GroupingTerm]:
    """Most levels first; like lme4, rev(order(levels)) as soon as one term is out of order."""
    levels = [len(term.levels) for term in terms]
    if all(a >= b for a, b in pairwise(levels)):
        return terms
    order = sorted(range(len(terms)), key=levels.__getitem__)
    return [terms[k] for k in reversed(order)]


def require_plain(terms: Iterable[Any], purpose: str) -> None:
    """Raise DataError for a term with a word for its covariance, named.

    Args:
        terms: random terms, of a model frame or of a fit.
        purpose: what needs it, after "cannot".
    """
    for term in terms:
        if term.covariance.word != "us":
            raise DataError(
                f"cannot {purpose}: the term {term.covariance.word}(... | {term.name}) has a "
                "covariance by a word, and this is there for (x | g) and (x || g) so far"
            )


def check_terms(
    terms: list[GroupingTerm], n: int, weights: np.ndarray | None, *, independent: bool = True
) -> None:
    """Raise DataError for terms whose variances cannot be estimated from `n` rows, named.

    Args:
        terms: the random terms.
        n: rows.
        weights: prior weights, (n,), or None.
        independent: whether residuals are; a covariance of theirs may stand beside an effect for
            every row.
    """
    seen: set[tuple[str, str]] = set()
    for term in terms:
        n_levels, block = len(term.seen), term.block(len(term.effect_names))
        if n_levels < 2 and isinstance(block, Unstructured):
            only = term.levels[term.codes[0]]
            raise DataError(
                f"the grouping factor {term.name!r} has one level ({only!r}); its "
                "variance cannot be estimated. Leave the term out"
            )
        for k, effect in enumerate(term.effect_names):
            if not np.any(term.effects[:, k]):
                raise DataError(
                    f"the random effect {effect!r} of {term.name!r} is zero in all rows"
                )
            if (term.name, effect) in seen:
                raise DataError(
                    f"the random effect {effect!r} of {term.name!r} occurs in two terms; its "
                    "variance cannot be divided between them"
                )
            seen.add((term.name, effect))
        rows = term.effects if weights is None else term.effects * np.sqrt(weights)[:, None]
        beside = term.kernel is None and independent
        if beside and replaces_residual(term.codes, rows, block):
            raise DataError(instead_of_residual(term.name, n_levels, term.effect_names, n))
        dependent = _dependent(term.effects)
        if dependent is not None:
            effect = term.effect_names[dependent]
            before = ", ".join(term.effect_names[:dependent])
            what = "is constant" if np.ptp(term.effects[:, dependent]) == 0 else "depends on them"
            raise DataError(
                f"the random effect {effect!r} of {term.name!r} {what} and cannot be told apart "
                f"from {before}; take it out of the term"
            )
    for first, second in combinations([term for term in terms if term.kernel is None], 2):
        shared = set(first.effect_names) & set(second.effect_names)
        if first.name != second.name and shared and same_partition(first.codes, second.codes):
            raise DataError(
                f"the grouping factors {first.name!r} and {second.name!r} divide the rows alike; "
                f"the variance of {min(shared)!r} cannot be shared out between them. Leave one out"
            )


def _dependent(columns: np.ndarray) -> int | None:
    """The first column that is a linear combination of those before it."""
    found = np.setdiff1d(np.arange(columns.shape[1]), independent_columns(columns))
    return int(found[0]) if found.size else None


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two factors, by their codes, divide the rows alike."""
    return np.array_equal(pd.factorize(first)[0], pd.factorize(second)[0])
