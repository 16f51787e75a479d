"""Tests of single terms by leaving them out, and backward elimination; as lmerTest's.

`drop1`, `ranova` and `step` of lmerTest (Kuznetsova, Brockhoff and Christensen 2017, J. Stat.
Softw. 82(13)). Likelihood-ratio tests of variances are by chi-squared with as many degrees of
freedom as parameters go, as there: conservative, for the variance is on its boundary
(`jaxreml.compare` has the mixture).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import chdtrc

from jaxreml.arguments import check_df
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.adjustments import f_tail
from jaxreml.inference.fixed.anova import COLUMNS, hypotheses, term_test
from jaxreml.inference.fixed.terms import fixed_terms
from jaxreml.inference.selection.reduction import Bar, LeastSquares, Model, model_of, refit

NONE = "<none>"
RATIO = ["npar", "logLik", "AIC", "chisq", "df", "p_value"]
ROUNDING = 1e-9  # of a difference of criteria, per unit of the criterion
OUTSIDE = 1e-8  # of a column's length outside the space of others


def drop1(
    fit: FittedModel,
    scope: str | Sequence[str] | None = None,
    df: str = "satterthwaite",
    test: str = "F",
) -> pd.DataFrame:
    """Single term deletions of the fixed effects.

    Args:
        fit: the fit.
        scope: terms to leave out; all that no other contains if left out.
        df: method for the denominator degrees of freedom of F tests, see `jaxreml.inference.wald`.
        test: "F" for F tests of a term's coefficients, as lmerTest's; "chi2" for likelihood ratios,
            of models fitted by ML.

    Returns:
        A row per term: sum_sq, mean_sq, num_df, den_df, statistic, p_value as in `anova`; or npar,
        logLik, AIC, chisq, df, p_value, with a row "<none>" for the whole model.

    Raises:
        ValueError: another method or test.
        DataError: a term that others contain or that the model does not have; a fit without an
            optimum.

    Examples:
        >>> scores.drop1()[["num_df", "den_df", "statistic"]].round(2)
                 num_df  den_df  statistic
        term
        Machine     2.0    46.0       87.8
        >>> scores.drop1(test="chi2")[["npar", "AIC", "chisq"]].round(1)
                 npar    AIC  chisq
        term
        <none>      5  303.7    NaN
        Machine     3  375.2   75.5
    """
    check_df(df, fit.method)
    if test not in ("F", "chi2"):
        raise ValueError(f'test must be "F" or "chi2", not {test!r}')
    fit.require_optimum("test fixed effects")
    model = model_of(fit)
    names = _scope(model, scope)
    if test == "F":
        rows = [term_test(fit, L, df) for L in _deletions(fit, model, names)]
        return _table(rows, names, COLUMNS)
    whole = fit if fit.method == "ML" else refit(fit, model, "ML")
    others = [refit(whole, model.without(name), "ML") for name in names]
    sizes = [(other.dof, other.criterion) for other in others]
    return _ratios((whole.dof, whole.criterion), dict(zip(names, sizes, strict=True)))


def _scope(model: Model, scope: str | Sequence[str] | None) -> list[str]:
    if scope is None:
        return model.droppable
    names = [scope] if isinstance(scope, str) else list(scope)
    for name in names:
        if name not in model.droppable:
            known = ", ".join(model.droppable) or "none"
            why = "other terms contain it" if name in model.fixed else "the model has no such term"
            raise DataError(f"{name!r} cannot be dropped: {why}; terms that can be are: {known}")
    return names


def _deletions(fit: FittedModel, model: Model, names: list[str]) -> list[np.ndarray]:
    """Per term L (k, p) of the hypothesis that it is not in the model.

    Its coefficients; where columns of X were left out, the part of the space of X that the smaller
    model does not have; the rows are lmerTest's, on which Satterthwaite's joint test depends.
    """
    if fit.aliased:
        return [_beyond(fit.frame_of(model.without(name).formula).X, fit.frame.X) for name in names]
    terms = fixed_terms(fit)
    if len(terms.columns) == 1:
        return list(hypotheses(terms, 1).values())
    texts = [text for text in model.fixed if text != "1"]
    own = dict(zip(texts, terms.columns.values(), strict=True))
    return [np.eye(len(fit.beta))[own[name]] for name in names]


def _beyond(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """L (k, p) of X beta = X_0 gamma for some gamma; columns in the units of X."""
    basis = np.linalg.qr(small)[0]
    rest = large - basis @ (basis.T @ large)
    lengths = np.linalg.norm(rest, axis=0)
    rest = rest[:, lengths > OUTSIDE * np.maximum(np.linalg.norm(large, axis=0), 1e-300)]
    Q, R = np.linalg.qr(large.T @ rest)
    sizes = np.abs(np.diagonal(R))
    return Q[:, : sizes.size][:, sizes > OUTSIDE * sizes.max(initial=0.0)].T


def ranova(fit: FittedModel, *, reduce_terms: bool = True) -> pd.DataFrame:
    """Likelihood-ratio tests of the random terms, one by one.

    By the criterion of the fit, REML or ML; the last random term is compared with least squares, or
    with the model that has the covariance of residuals alone (``residual=``).

    Args:
        fit: the fit.
        reduce_terms: take single effects out of terms, (x | g) to (1 | g); or whole terms.

    Returns:
        A row "<none>" for the fit, then one per deletion: npar, logLik, AIC, chisq, df, p_value.

    Raises:
        DataError: a model without an optimum, or without random effects.

    Examples:
        >>> fit.ranova()[["npar", "chisq", "df"]].round(2)
                                  npar  chisq   df
        term
        <none>                       6    NaN  NaN
        Days in (Days | Subject)     4  42.84  2.0
    """
    fit.require_optimum("test random effects")
    fit.require_likelihood("test random effects")
    if not fit.groupings:
        raise DataError(
            "the fit has no random effects to test; jaxreml.compare tests covariances of residuals"
        )
    return _ranova(fit, model_of(fit), reduce_terms)[0]


def _ranova(
    fit: FittedModel, model: Model, reduce_terms: bool
) -> tuple[pd.DataFrame, dict[str, tuple[Model, FittedModel | None]]]:
    """The table, and per row the model and its fit, None where least squares is left."""
    found: dict[str, tuple[Model, FittedModel | None]] = {}
    sizes = {}
    for k, bar in enumerate(model.bars):
        reductions: dict[str, Bar | None] = bar.reductions() if reduce_terms else {bar.label: None}
        for label, other in reductions.items():
            smaller = model.with_bar(k, other)
            alone = not smaller.bars and fit.residual is None
            refitted = None if alone else refit(fit, smaller, fit.method)
            found[label] = smaller, refitted
            sizes[label] = (
                (refitted.dof, refitted.criterion)
                if refitted is not None
                else (len(fit.beta) + 1, LeastSquares(fit.frame).criterion(fit.method))
            )
    return _ratios((fit.dof, fit.criterion), sizes), found


def _ratios(whole: tuple[int, float], others: dict[str, tuple[int, float]]) -> pd.DataFrame:
    """Likelihood ratios of smaller models, each (parameters, criterion), against the whole one."""
    npar, criterion = whole
    rows = [[npar, -criterion / 2, criterion + 2 * npar, np.nan, np.nan, np.nan]]
    for size, value in others.values():
        ratio, df = value - criterion, npar - size
        if abs(ratio) < ROUNDING * (1 + abs(criterion)):
            ratio = 0.0
        p_value = float(chdtrc(df, ratio)) if df > 0 and ratio >= 0 else np.nan
        rows.append([size, -value / 2, value + 2 * size, ratio, df, p_value])
    table = pd.DataFrame(rows, index=pd.Index([NONE, *others], name="term"), columns=RATIO)
    return table.astype({"npar": int})


def _table(rows: list[dict[str, float]], names: Sequence[str], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=pd.Index(names, name="term", dtype=object), columns=columns)


@dataclass(frozen=True, eq=False, repr=False)
class Elimination:
    """What `step` found.

    Attributes:
        random, fixed: the tests as `ranova` and `drop1` give them, with a first column
            ``eliminated``: 1, 2, ... for terms in the order in which they were left out, 0 for
            those of the model found, NaN for the model begun with.
        formula: of the model found.
        fit: the model found; None if no random effects are left and residuals are independent,
            which is least squares.

    Examples:
        >>> found = fit.step()
        >>> found.formula
        'Reaction ~ Days + (Days | Subject)'
        >>> found.random["eliminated"].tolist()
        [nan, 0.0]
    """

    random: pd.DataFrame
    fixed: pd.DataFrame
    formula: str
    fit: FittedModel | None

    def __str__(self) -> str:
        parts = [
            "Backward reduced random-effect table:\n" + self.random.to_string(),
            "Backward reduced fixed-effect table:\n" + self.fixed.to_string(),
            f"Model found:\n{self.formula}",
        ]
        if self.fit is None:
            parts.append("(no random effects are left: least squares)")
        return "\n\n".join(parts) + "\n"

    def __repr__(self) -> str:
        return str(self)


def step(
    fit: FittedModel,
    df: str = "satterthwaite",
    *,
    alpha_random: float = 0.1,
    alpha_fixed: float = 0.05,
    reduce_random: bool = True,
    reduce_fixed: bool = True,
    keep: str | Sequence[str] = (),
) -> Elimination:
    """Backward elimination: random effects by `ranova`, then fixed ones by `drop1`.

    In each round the term with the largest p-value above the level goes; no term goes before those
    that contain it. Tests after such a selection are too favourable.

    Args:
        fit: the model to begin with.
        df: for the F tests of the fixed effects, see `jaxreml.inference.wald`.
        alpha_random, alpha_fixed: levels.
        reduce_random, reduce_fixed: whether these are reduced at all.
        keep: terms of the fixed effects to keep.

    Raises:
        ValueError: another method, or levels outside [0, 1].
        DataError: terms to keep that the model does not have; a model without an optimum.

    Examples:
        >>> cakes = jaxreml.datasets.load("cake")
        >>> cake = jaxreml.fit("angle ~ recipe * temp + (1 | recipe:replicate)", cakes)
        >>> cake.step().formula
        'angle ~ temp + (1 | recipe:replicate)'
        >>> cake.step(reduce_random=False).fixed[["eliminated", "p_value"]].round(3)
                     eliminated  p_value
        term
        recipe:temp           1    0.959
        recipe                2    0.781
        temp                  0    0.000
    """
    check_df(df, fit.method)
    for name, level in (("alpha_random", alpha_random), ("alpha_fixed", alpha_fixed)):
        if not 0 <= level <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {level}")
    fit.require_optimum("eliminate terms")
    fit.require_likelihood("eliminate terms")
    model = model_of(fit)
    kept = [keep] if isinstance(keep, str) else list(keep)
    for name in kept:
        if name not in model.fixed:
            raise DataError(f"keep: the model has no term {name!r}; it has {_listed(model)}")
    random, model, current = _reduced_random(fit, model, alpha_random if reduce_random else 1.0)
    level = alpha_fixed if reduce_fixed else 1.0
    fixed, model, current = _reduced_fixed(fit, model, current, df, level, kept)
    formula = model.formula if current is None else current.formula
    return Elimination(random, fixed, formula, current)


def _listed(model: Model) -> str:
    return ", ".join(text for text in model.fixed if text != "1") or "none"


def _reduced_random(
    fit: FittedModel, model: Model, alpha: float
) -> tuple[pd.DataFrame, Model, FittedModel | None]:
    table, others = _ranova(fit, model, True)
    parts = [table.iloc[:1].assign(eliminated=np.nan)]
    current: FittedModel | None = fit
    while current is not None and np.any(table["p_value"].to_numpy() > alpha):
        label = str(table["p_value"].idxmax())
        parts.append(table.loc[[label]].assign(eliminated=float(len(parts))))
        model, current = others[label]
        if current is None:
            table = table.iloc[:0]
        else:
            table, others = _ranova(current, model, True)
    parts.append(table[table.index != NONE].assign(eliminated=0.0))
    return pd.concat(parts).reindex(columns=["eliminated", *RATIO]), model, current


def _reduced_fixed(
    fit: FittedModel,
    model: Model,
    current: FittedModel | None,
    df: str,
    alpha: float,
    keep: list[str],
) -> tuple[pd.DataFrame, Model, FittedModel | None]:
    parts: list[pd.DataFrame] = []
    while True:
        table = _least_squares_drop1(fit, model) if current is None else drop1(current, df=df)
        p_values = table["p_value"].drop(keep, errors="ignore")
        if not np.any(p_values.to_numpy() > alpha):
            break
        term = p_values.idxmax()
        parts.append(table.loc[[term]].assign(eliminated=len(parts) + 1))
        model = model.without(str(term))
        if current is not None:
            current = refit(current, model, current.method)
    parts.append(table.assign(eliminated=0))
    return pd.concat(parts).reindex(columns=["eliminated", *COLUMNS]), model, current


def _least_squares_drop1(fit: FittedModel, model: Model) -> pd.DataFrame:
    """F tests of single terms of a linear model, with its residual degrees of freedom."""
    bars = model_of(fit).bars[:1]  # a formula has to have one; X is the same

    def frame(model: Model) -> LeastSquares:
        return LeastSquares(fit.frame_of(replace(model, bars=bars).formula))

    whole = frame(model)
    rows = []
    for name in model.droppable:
        L = _beyond(frame(model.without(name)).frame.X, whole.frame.X)
        gap = L @ whole.beta
        F = float(gap @ np.linalg.solve(L @ whole.vcov @ L.T, gap)) / len(L)
        mean_sq = F * whole.sigma2
        p_value = float(f_tail(F, len(L), whole.df))
        numbers = [mean_sq * len(L), mean_sq, len(L), whole.df, F, p_value]
        rows.append(dict(zip(COLUMNS, numbers, strict=True)))
    return _table(rows, model.droppable, COLUMNS)
