"""Formulas with a term less, and the models that they state, on the rows of a fit."""

from __future__ import annotations

import keyword
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import formulaic
import numpy as np
from formulaic.parser.types import Factor, Term

from jaxreml.data.evaluation import mark, plain
from jaxreml.data.formula import RandomTerm
from jaxreml.data.frame import ModelFrame
from jaxreml.fitting.fit import fit_frame
from jaxreml.fitting.fitted import FittedModel


@dataclass(frozen=True)
class Bar:
    """A random term in words.

    Attributes:
        effects: its formulaic right side.
        group: the grouping factor, as the fit names it.
        factor: the same as text of a formula.
        covariance: a random term with the word and the options for its covariance, if it has one.
    """

    effects: str
    group: str
    factor: str
    covariance: RandomTerm | None = None

    @property
    def label(self) -> str:
        """As lmerTest writes it."""
        return self._on(self.group)

    @property
    def text(self) -> str:
        """In a formula."""
        return self._on(self.factor)

    def _on(self, factor: str) -> str:
        if self.covariance is not None:
            return self.covariance.text(factor)
        return f"({self.effects} | {factor})"

    def reductions(self) -> dict[str, Bar | None]:
        """Per label the term without one of its marginal effects; without any, no term at all.

        lmerTest's rule: what is left of (x | g), and of (0 + x | g), is (1 | g). A term with a word
        for its covariance is dropped as a whole.
        """
        if self.covariance is not None:
            return {self.label: None}
        terms = terms_of(self.effects)
        slopes = [text for text in terms if text != "1"]
        if not slopes:
            return {self.label: None}
        kept = {}
        for name in marginal(self.effects):
            left = [text for text in slopes if text != name]
            effects = " + ".join(["1" if "1" in terms else "0", *left]) if left else "1"
            kept[f"{name} in {self.label}"] = replace(self, effects=effects)
        return kept


@dataclass(frozen=True)
class Model:
    """A model's formula in parts.

    Attributes:
        response: text of the left side.
        fixed: texts of the terms of the fixed effects, "1" for the intercept.
        offsets: texts inside ``offset()``.
        bars: the random terms, in the order written; ``||`` taken apart.
    """

    response: str
    fixed: tuple[str, ...]
    offsets: tuple[str, ...]
    bars: tuple[Bar, ...]

    @property
    def formula(self) -> str:
        """The formula."""
        fixed = [text for text in self.fixed if text != "1"]
        if "1" not in self.fixed:
            fixed = ["0", *fixed]
        parts = fixed or ["1"]
        parts += [f"offset({text})" for text in self.offsets]
        parts += [bar.text for bar in self.bars]
        return f"{self.response} ~ {' + '.join(parts)}"

    @property
    def droppable(self) -> list[str]:
        """Terms of the fixed effects that no other contains."""
        return marginal(" + ".join(self.fixed))

    def without(self, term: str) -> Model:
        """Without a term of the fixed effects."""
        return replace(self, fixed=tuple(text for text in self.fixed if text != term))

    def with_bar(self, k: int, bar: Bar | None) -> Model:
        """With another random term in place of the k-th, or none; equal ones once."""
        bars = [*self.bars[:k], *([] if bar is None else [bar]), *self.bars[k + 1 :]]
        return replace(self, bars=tuple(dict.fromkeys(bars)))


def model_of(fit: FittedModel) -> Model:
    """The formula of a fit in parts."""
    frame = fit.frame
    parsed = frame.formula
    left = list(frame.terms)
    bars = []
    for written in parsed.random:
        own = [term for term in left if term.is_of(written.name)]
        if written.word:
            said = (written.word, written.options)
            own = [term for term in own if term.covariance[:2] == said][:1]
        elif written.correlated:
            own = [term for term in own if term.encoding.text == written.effects][:1]
        else:  # in the order written, the intercept first
            order = list(terms_of(written.effects))
            own.sort(key=lambda term: order.index(next(iter(terms_of(term.encoding.text)))))
        left = [term for term in left if not any(term is other for other in own)]
        factor = ":".join(map(_quoted, written.factors))
        for term in own:
            effects = written.effects if written.correlated else _alone(term.encoding.text)
            bars.append(Bar(effects, written.name, factor, written if written.word else None))
    return Model(parsed.response, tuple(terms_of(parsed.fixed)), parsed.offsets, tuple(bars))


def _alone(text: str) -> str:
    """A summand of ``||`` as lme4 writes it."""
    (term,) = terms_of(text)
    return term if term == "1" else f"0 + {term}"


def terms_of(text: str) -> dict[str, frozenset[str]]:
    """Per term of a right side, as text, its factors; "1" for the intercept."""
    formula: Any = formulaic.Formula(mark(text))  # pyright: ignore
    return {_text(term): frozenset(plain(factor) for factor in term.factors) for term in formula}


def marginal(text: str) -> list[str]:
    """Terms of a right side, not the intercept, that no other contains; R's `drop.scope`."""
    terms = {name: factors for name, factors in terms_of(text).items() if name != "1"}
    return [name for name, own in terms.items() if not any(own < other for other in terms.values())]


def _text(term: Term) -> str:
    if not term.degree:
        return "1"
    lookup = Factor.EvalMethod.LOOKUP
    return ":".join(
        _quoted(plain(factor)) if factor.eval_method is lookup else plain(factor)
        for factor in term.factors
    )


def _quoted(name: str) -> str:
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"`{name}`"


def refit(fit: FittedModel, model: Model, method: str) -> FittedModel:
    """A model with random terms on the rows of a fit.

    Raises:
        DataError: it has no optimum.
    """
    found = fit_frame(fit.frame_of(model.formula), method, context=fit.context, kind=type(fit))
    found.require_optimum(f"fit {model.formula}")
    return found


@dataclass(frozen=True)
class LeastSquares:
    """A linear model without random effects, for what is left when the last one is gone.

    Attributes:
        frame: rows, and X.
    """

    frame: ModelFrame

    @cached_property
    def _solved(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """beta, the triangle R of X = U R, the residual sum of squares, the sum of log weights."""
        frame = self.frame
        assert frame.y is not None
        weights = np.ones(len(frame.y)) if frame.weights is None else frame.weights
        y = frame.y if frame.offset is None else frame.y - frame.offset
        U, R = np.linalg.qr(frame.X * np.sqrt(weights)[:, None])
        y = y * np.sqrt(weights)
        beta = np.linalg.solve(R, U.T @ y)
        rest = y - U @ (U.T @ y)
        return beta, R, float(rest @ rest), float(np.sum(np.log(weights)))

    @property
    def beta(self) -> np.ndarray:
        """(p,), the coefficients."""
        return self._solved[0]

    @property
    def df(self) -> int:
        """Residual degrees of freedom."""
        return len(self.frame.X) - len(self.beta)

    @property
    def sigma2(self) -> float:
        """Residual variance."""
        return self._solved[2] / self.df

    @property
    def vcov(self) -> np.ndarray:
        """(p, p), covariance of the coefficients."""
        inverse = np.linalg.inv(self._solved[1])
        return self.sigma2 * inverse @ inverse.T

    def criterion(self, method: str) -> float:
        """-2 log (restricted) likelihood: what a mixed model's is with all variances at zero."""
        _, R, rss, log_weights = self._solved
        reml = method == "REML"
        degrees = self.df if reml else len(self.frame.X)
        value = degrees * (1 + np.log(2 * np.pi * rss / degrees)) - log_weights
        return float(value + (2 * np.sum(np.log(np.abs(np.diagonal(R)))) if reml else 0.0))
