"""Tests of fixed effects of many fits, after the fits: nothing is searched again.

The responses are read once more, and at the optima that are known the covariance of the fixed
effects and its derivatives are evaluated, some responses at a time. What follows from these is
`inference.fixed.wald`'s, response by response.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.arguments import check_df
from jaxreml.data.frame import split_extras
from jaxreml.data.hypotheses import hypotheses
from jaxreml.errors import DataError
from jaxreml.inference.batches.discoveries import adjusted
from jaxreml.inference.fixed import anova as tables
from jaxreml.inference.fixed.terms import FixedTerms
from jaxreml.inference.fixed.wald import Fixed, Satterthwaite, f_test, independent, t_tests
from jaxreml.model import satterthwaite
from jaxreml.status import Status

METHODS = ("satterthwaite", "residual", "inf")
SINGLE = ("estimate", "std_error", "df", "statistic", "p_value")
JOINT = ("statistic", "num_df", "den_df", "p_value")


class _Known(NamedTuple):
    """Of one response: its place, its fixed effects (p,), and their approximation."""

    place: int
    beta: np.ndarray
    method: Any


def test(
    results: Any, L: Any, rhs: Any = 0.0, df: str | None = None, *, joint: bool = True
) -> pd.DataFrame:
    """Test linear hypotheses L beta = rhs about the fixed effects of every response.

    Args:
        results: of `fit_many`, with the responses at hand.
        L, rhs, joint: as for `LMMResults.test`.
        df: "satterthwaite", "residual" or "inf"; that of `fit_many` if left out. For
            Kenward-Roger's ask `fit_many` for contrasts, or use ``estimate(i).test``.

    Returns:
        A row per response: columns statistic, num_df, den_df, p_value of an F test; or, not
        `joint`, by row of L and estimate, std_error, df, statistic and p_value. p_adjusted beside
        p_value (Benjamini and Hochberg 1995, over the responses). NaN without an optimum, and where
        the rows of a response do not determine all fixed effects.

    Raises:
        DataError: the values of the responses are not at hand; names that are not fixed effects.
        FormulaError: an equation that is none.
        ValueError: other hypotheses that are none, or another `df`.

    Examples:
        >>> results.test("Days = 0.2").round(2).head(2)
               statistic  num_df  den_df  p_value  p_adjusted
        gene1       0.44     1.0   161.0     0.51        0.55
        gene2       0.00     1.0   161.0     0.99        0.99
        >>> results.test({"Days": 7}, joint=False)[0].round(2).head(2)
               estimate  std_error     df  statistic  p_value  p_adjusted
        gene1      1.27       0.20  161.0       6.29      0.0         0.0
        gene2      1.40       0.16  161.0       8.58      0.0         0.0
    """
    names = results.model.fixed_names
    stated, values, labels = hypotheses(names, L, rhs)
    df = _method(results, df)
    if joint:
        units = np.nanmedian(results.fits.se, axis=0)
        rows, own = independent(stated, values, np.where(units > 0, units, 1.0))
        found = np.full((len(results), len(JOINT)), np.nan)
        for known in _each(results, df):
            row = f_test(known.beta, known.method, stated, rows, own)
            found[known.place] = tuple(row.values())
        return _table(found, JOINT, results.responses)
    whole = np.full((len(results), len(stated), len(SINGLE)), np.nan)
    for known in _each(results, df):
        columns = t_tests(known.beta, known.method, stated, values)
        whole[known.place] = np.stack(list(columns.values()), axis=1)
    parts = [_table(whole[:, k], SINGLE, results.responses) for k in range(len(stated))]
    return pd.concat(dict(zip(labels, parts, strict=True)), axis=1)


def anova(results: Any, kind: str | int = "III", df: str | None = None) -> pd.DataFrame:
    """F tests of the terms of the fixed effects, for every response.

    Args:
        results, df: as for `test`.
        kind: the type of the tests, as for `LMMResults.anova`, from all rows of the data.

    Returns:
        A row per response, by term and statistic, num_df, den_df, p_value, p_adjusted.

    Raises:
        ValueError: another kind or method.
        DataError: as `test`; results with a covariate of each fit's own.

    Examples:
        >>> results.anova()["Days"].round(2).head(2)
               statistic  num_df  den_df  p_value  p_adjusted
        gene1      39.54     1.0   161.0      0.0         0.0
        gene2      73.55     1.0   161.0      0.0         0.0
    """
    number = tables.TYPES.get(str(kind))
    if number is None:
        raise ValueError(f'kind must be "I", "II", "III" or 1, 2, 3, not {kind!r}')
    if results.frame is None:
        raise DataError(
            "the model's columns are not at hand (results read from a file, or with a covariate of "
            "each fit's own): use test"
        )
    df = _method(results, df)
    frame = results.frame
    terms = FixedTerms(frame, split_extras(frame.table)[0])
    stated = {name: L for name, L in tables.hypotheses(terms, number).items() if len(L)}
    found = {name: np.full((len(results), len(JOINT)), np.nan) for name in stated}
    for known in _each(results, df):
        for name, L in stated.items():
            row = f_test(known.beta, known.method, L, L, np.zeros(len(L)))
            found[name][known.place] = tuple(row.values())
    parts = {name: _table(own, JOINT, results.responses) for name, own in found.items()}
    return pd.concat(parts, axis=1)


def _method(results: Any, df: str | None) -> str:
    method = results.model.df if df is None else df
    check_df(method, results.model.method)
    if method not in METHODS:
        raise ValueError(
            f"df={method!r} is not for tests after the fits: ask fit_many for contrasts, or use "
            "estimate(i).test; here df is " + ", ".join(map(repr, METHODS))
        )
    return method


def _each(results: Any, df: str) -> Iterator[_Known]:
    """The responses that have an optimum and all fixed effects."""
    if results.revisit is None:
        raise DataError(
            "the values of the responses are not at hand (a stream, or results read "
            "from a file or pickle): ask fit_many for contrasts"
        )
    fits, p = results.fits, len(results.model.fixed_names)
    good = (fits.status == Status.CONVERGED) & (fits.rank == p)
    theta = np.where(good[:, None], fits.theta, np.nan)
    for places, known, estimate in results.revisit(theta):
        order = np.argsort(known.coefficients)
        beta, vcov = estimate.beta[order], estimate.vcov[np.ix_(order, order)]
        slopes = estimate.vcov_slopes[:, order][:, :, order]
        spread = satterthwaite.spread(estimate.hessian) if df == "satterthwaite" else None
        for k, place in enumerate(places):
            method: Any
            if spread is not None:
                own = satterthwaite.Spread(*(part[..., k] for part in spread))
                method = Satterthwaite(vcov[..., k], slopes[..., k], own)
            else:
                residual = float(fits.nobs[place] - p)
                method = Fixed(vcov[..., k], residual if df == "residual" else np.inf)
            yield _Known(int(place), beta[..., k], method)


def _table(values: np.ndarray, names: tuple[str, ...], responses: pd.Index) -> pd.DataFrame:
    table = pd.DataFrame(values, responses, list(names))
    return table.assign(p_adjusted=adjusted(table["p_value"].to_numpy(), "bh"))
