r"""Analysis of variance tables of the fixed effects.

Each type says which hypothesis L beta = 0 belongs to a term; the F tests are
`wald.joint_test`'s. The definitions are SAS's (The GLM Procedure, "The Four Types of
Estimable Functions"), as in lmerTest (Kuznetsova, Brockhoff and Christensen 2017, J. Stat. Softw.
82(13)). A term contains another if it has all its variables, the same covariates and more factors.

Type I
    A term is tested after those before it: the rows of the Cholesky factor R of X'X = R'R that
    belong to its columns.
Type II
    A term is tested after all that do not contain it: as type I with the columns of the others
    first, then its own, then those of the terms that contain it.
Type III
    With F the overparameterised model matrix (a column for every level) and F = XE, rows of E are
    estimable functions. Those of a term are made orthogonal to those of the terms that contain it,
    which makes them the same whatever contrasts code the factors.

Two rules of lmerTest are not followed: there, `a` is not contained in `a:b` if `b` is not in the
model, and columns such as ``poly(x, 2)`` count as factors.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular

from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.terms import FixedTerms, fixed_terms
from jaxreml.inference.fixed.wald import approximation, joint_test

COLUMNS = ["sum_sq", "mean_sq", "num_df", "den_df", "statistic", "p_value"]
TYPES = {"I": 1, "II": 2, "III": 3, "1": 1, "2": 2, "3": 3}


def anova(fit: FittedModel, kind: str | int = "III", df: str = "satterthwaite") -> pd.DataFrame:
    """The table of a fit, a row per term of the fixed-effects formula.

    Args:
        fit: the fit.
        kind: the type of the tests, "I", "II", "III" or 1, 2, 3.
        df: method for the denominator degrees of freedom, see `jaxreml.inference.wald`.

    Returns:
        Columns sum_sq, mean_sq (F times the residual variance; with Kenward-Roger's method F before
        its scaling, as lmerTest prints it), num_df, den_df, statistic, p_value. A term without a
        column of its own has NaN, and there is a column ``reason`` then.

    Raises:
        ValueError: another kind or method.
        DataError: a fit that did not converge.

    Examples:
        >>> scores.anova().round(2)
                  sum_sq  mean_sq  num_df  den_df  statistic  p_value
        term
        Machine  1755.26   877.63     2.0    46.0       87.8      0.0
        >>> scores.anova("II", df="kenward-roger")["den_df"].round(1).to_dict()
        {'Machine': 46.0}
    """
    number = TYPES.get(str(kind))
    if number is None:
        raise ValueError(f'kind must be "I", "II", "III" or 1, 2, 3, not {kind!r}')
    terms = fixed_terms(fit)
    tests = hypotheses(terms, number)
    rows = []
    for L in tests.values():
        rows.append(term_test(fit, L, df) if len(L) else dict.fromkeys(COLUMNS, np.nan))
    table = pd.DataFrame(rows, index=pd.Index(list(tests), name="term"), columns=COLUMNS)
    empty = [not len(L) for L in tests.values()]
    if any(empty):
        why = "every column depends on those of other terms"
        table["reason"] = np.where(empty, why, "")
    return table


def hypotheses(terms: FixedTerms, kind: int) -> dict[str, np.ndarray]:
    """Per term the (k, p) matrix L of its hypothesis of type 1, 2 or 3.

    Of the rows that state a hypothesis, lmerTest's are taken, as the degrees of freedom of
    Satterthwaite's joint test depend on them: unit triangular ones for types I and II, and for all
    types if there is one term; those of the identity for terms that no others contain.
    """
    X = terms.full[:, terms.frame.kept]
    columns = terms.columns
    if kind == 1 or len(columns) == 1:
        triangle = _unit_triangle(X)
        return {name: triangle[own] for name, own in columns.items()}
    if kind == 2:
        return {name: _marginal(X, terms, name) for name in columns}
    scale = np.linalg.norm(X, axis=0)
    Q, R = np.linalg.qr(X / scale)
    E = solve_triangular(R, Q.T @ np.asarray(terms.overparameterised)) / scale[:, None]
    return {name: _type3(E, terms, name) for name in columns}


def _unit_triangle(X: np.ndarray) -> np.ndarray:
    """The triangular factor of X'X with a unit diagonal."""
    scale = np.linalg.norm(X, axis=0)
    triangle = np.linalg.qr(X / scale, mode="r") * scale
    return triangle / np.diagonal(triangle)[:, None]


def _marginal(X: np.ndarray, terms: FixedTerms, name: str) -> np.ndarray:
    """Rows of the triangular factor of a term whose columns come after those not containing it."""
    own = terms.columns[name]
    after = _columns_of(terms, terms.containing(name))
    if not after.size:
        return np.eye(X.shape[1])[own]
    before = np.setdiff1d(np.arange(X.shape[1]), np.concatenate([own, after]))
    order = np.concatenate([before, own, after])
    L = np.zeros((own.size, X.shape[1]))
    L[:, order] = _unit_triangle(X[:, order])[before.size : before.size + own.size]
    return L


def _type3(E: np.ndarray, terms: FixedTerms, name: str) -> np.ndarray:
    """(1 - E_C E_C^+) applied to the estimable functions of a term, C those that contain it."""
    own = terms.columns[name]
    after = _columns_of(terms, terms.containing(name))
    L = np.eye(len(E))[own]
    share = np.linalg.lstsq(E[after].T, E[own].T)[0] if after.size and own.size else None
    if share is not None:
        L[:, after] -= share.T
    return L


def _columns_of(terms: FixedTerms, names: list[str]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=int), *(terms.columns[name] for name in names)])


def term_test(fit: FittedModel, L: np.ndarray, df: str) -> dict[str, float]:
    """A row of the table, COLUMNS, for the (k, p) hypothesis of a term."""
    test = joint_test(fit, L, df=df).iloc[0]
    gap = L @ fit.beta
    vcov = approximation(fit, df).vcov
    sum_sq = float(gap @ np.linalg.solve(L @ vcov @ L.T, gap)) * fit.sigma**2
    return {"sum_sq": sum_sq, "mean_sq": sum_sq / len(L), **test}
