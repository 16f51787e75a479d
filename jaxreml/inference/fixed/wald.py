r"""Tests of fixed effects: t and F with approximate degrees of freedom.

The approximations, by the names of the argument `df`:

``"satterthwaite"``
    Giesbrecht and Burns (1985, Biometrics 41:477) for one degree of freedom, Fai and Cornelius
    (1996, J. Stat. Comput. Simul. 54:363) for several, as lmerTest. Parameters on the boundary are
    held there.
``"kenward-roger"``
    Kenward and Roger (1997, Biometrics 53:983), with an adjusted covariance of the estimates, by
    the expected information, as pbkrtest. REML only. Where V is not linear in variances and
    covariances (`jaxreml.model.kenward_roger`) with the term in its second derivatives in the
    parameters that SAS has.
``"kenward-roger-sas"``
    The same with the observed information in the place of the expected one, as SAS's ``ddfm=kr``
    and JMP.
``"kenward-roger-linear"``
    The latter without the term in second derivatives of V: SAS's ``ddfm=kr(firstorder)``, and
    "Kenward-Roger-Linear" of R's mmrm, which takes others than SAS's parameters with that term.
``"between-within"``
    Counted: of groups less effects between them, or of rows less groups less effects within them
    (`between_within`), as R's mmrm and nlme's lme.
``"residual"``
    n - p.
``"inf"``
    Normal and chi-square tests, as emmeans' "asymptotic".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from jaxreml.arguments import check_conf_level, check_df
from jaxreml.backend.compilation import evaluated
from jaxreml.data.hypotheses import hypotheses
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.adjustments import f_tail
from jaxreml.inference.fixed.between_within import BetweenWithin
from jaxreml.inference.likelihood.profile import Profile
from jaxreml.model import satterthwaite
from jaxreml.model.kenward_roger import (
    DIALECTS,
    Adjustment,
    adjust,
    joint_degrees,
    single_degrees,
)

NOT_ESTIMATED = 1e-10  # rows of L, relative to their lengths, that depend on others
CONTRADICTION = 1e-8  # right-hand sides that differ by more, relative to their terms
EQUAL = 1e-8  # degrees of freedom that differ by less, relatively, are one number
ADJUSTMENTS = {name: partial(adjust, dialect=own) for name, own in DIALECTS.items()}


class Approximation(Protocol):
    """Covariance of the fixed effects and degrees of freedom of tests of them."""

    @property
    def vcov(self) -> np.ndarray:
        """Covariance (p, p) of the fixed effects."""
        ...

    def single(self, rows: np.ndarray) -> np.ndarray:
        """Degrees of freedom (k,) of the t tests of (k, p) `rows`."""
        ...

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """Denominator degrees of freedom and the factor of F of the joint test of (k, p) `rows`,
        of which `rank` are linearly independent."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same degrees of freedom for every test."""

    vcov: np.ndarray
    df: float

    def single(self, rows: np.ndarray) -> np.ndarray:
        """See `Approximation`."""
        return np.full(len(rows), self.df)

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """See `Approximation`."""
        return self.df, 1.0


@dataclass(frozen=True)
class Satterthwaite:
    """From the derivatives of the covariance, and the covariance of the variance parameters.

    Attributes:
        vcov: (p, p).
        slopes: (m, p, p), derivatives of `vcov` in the variance parameters.
        spread: what is known of these.
    """

    vcov: np.ndarray
    slopes: np.ndarray
    spread: satterthwaite.Spread

    def single(self, rows: np.ndarray) -> np.ndarray:
        """See `Approximation`."""
        variance = np.einsum("kp,pq,kq->k", rows, self.vcov, rows)
        slopes = np.einsum("kp,mpq,kq->mk", rows, self.slopes, rows)
        with np.errstate(divide="ignore", invalid="ignore"):  # rows of zeros, parameters all at 0
            return satterthwaite.degrees(variance, slopes, self.spread)

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """See `Approximation`; depends on how the hypothesis is stated, as in lmerTest: on the
        eigenvectors of the covariance of all rows, dependent ones too."""
        vectors = np.linalg.svd(rows @ np.linalg.cholesky(self.vcov))[0][:, :rank]
        df = self.single(vectors.T @ rows)
        if np.ptp(df) < EQUAL * df.max():  # balanced: exact
            return float(df.mean()), 1.0
        if np.any(df <= 2):  # the expectation of an F ratio does not exist there
            return 2.0, 1.0
        expectation = np.sum(df / (df - 2))
        return float(2 * expectation / (expectation - len(df))), 1.0


@dataclass(frozen=True)
class KenwardRoger:
    """From the adjustment of a fit."""

    adjustment: Adjustment

    @property
    def vcov(self) -> np.ndarray:
        """See `Approximation`; adjusted."""
        return self.adjustment.vcov

    def single(self, rows: np.ndarray) -> np.ndarray:
        """See `Approximation`."""
        with np.errstate(divide="ignore", invalid="ignore"):  # nothing to adjust, rows of zeros
            return single_degrees(self.adjustment, rows)

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """See `Approximation`."""
        return joint_degrees(self.adjustment, rows, rank)


def kenward_roger(fit: FittedModel, df: str = "kenward-roger") -> KenwardRoger:
    """The Kenward-Roger adjustment of a fit by one of `DIALECTS`; `approximation` keeps it.

    Raises:
        DataError: variance parameters that cannot be told apart.
    """
    design = fit.design.without_names()
    arrays = fit.theta, fit.parameters, design, fit.parameters_vcov_array
    found = evaluated(ADJUSTMENTS[df], *arrays, on_host=design.written_out)
    if not found.exists:
        raise DataError(
            "Kenward-Roger's method needs the information of the variance parameters, "
            "which is singular here: they cannot be told apart, and the covariance of the fixed "
            "effects depends on them"
        )
    return KenwardRoger(found)


def approximation(fit: FittedModel, df: str) -> Approximation:
    """The approximation of that name for a fit, which keeps it.

    Raises:
        ValueError: another name, or one that is not for the fit's method.
        DataError: variance parameters that Kenward-Roger's method cannot tell apart; groups that
            "between-within" cannot count, as they are not nested.
    """
    check_df(df, fit.method)
    if fit.sandwich is not None:
        return fit.sandwich
    if df not in fit.approximations:
        fit.approximations[df] = _approximation(fit, df)
    return fit.approximations[df]


def _approximation(fit: FittedModel, df: str) -> Approximation:
    if df in ADJUSTMENTS:
        fit.require_likelihood("give Kenward-Roger's adjustment")
        return kenward_roger(fit, df)
    if df == "satterthwaite":
        known = satterthwaite.spread(np.asarray(fit.hessian))
        return Satterthwaite(fit.vcov_array, fit.vcov_slopes, known)
    if df == "between-within":
        return BetweenWithin.of(fit)
    degrees = float(fit.nobs - len(fit.beta)) if df == "residual" else np.inf
    return Fixed(fit.vcov_array, degrees)


def each(fit: FittedModel, L: Any, rhs: Any = 0.0, df: str = "satterthwaite") -> pd.DataFrame:
    """One t test per row of L.

    Args:
        fit: the fit.
        L: linear functions of the fixed effects, see `jaxreml.data.hypotheses.hypotheses`.
        rhs: (k,) or a scalar, what they are under the hypothesis.
        df: name of the approximation, see the module.

    Returns:
        Columns estimate, std_error, df, statistic, p_value; a row per row of L. Without an optimum
        df and p_value are NaN.
    """
    rows, values, labels = hypotheses(fit.fixed_names, L, rhs)
    columns = t_tests(fit.beta, approximation(fit, df), rows, values, known=fit.converged)
    return pd.DataFrame(columns, labels)


def t_tests(
    beta: np.ndarray,
    method: Approximation,
    rows: np.ndarray,
    values: np.ndarray,
    *,
    known: bool = True,
) -> dict[str, np.ndarray]:
    """The columns of `each`, (k,), of (k, p) rows of L and what they are under the hypothesis; df
    and p_value NaN unless the optimum is `known`."""
    estimate = rows @ beta
    error = np.sqrt(np.einsum("kp,pq,kq->k", rows, method.vcov, rows))
    degrees = method.single(rows) if known else np.full(len(rows), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = (estimate - values) / error
    return {
        "estimate": estimate,
        "std_error": error,
        "df": degrees,
        "statistic": statistic,
        "p_value": 2 * stdtr(degrees, -np.abs(statistic)),
    }


def joint_test(fit: FittedModel, L: Any, rhs: Any = 0.0, df: str = "satterthwaite") -> pd.DataFrame:
    """One F test of all rows of L together; arguments as for `each`.

    Rows that depend on others change neither the hypothesis nor the statistic, but Satterthwaite's
    degrees of freedom, as lmerTest's `contestMD`.

    Returns:
        Columns statistic, num_df, den_df, p_value; one row.

    Raises:
        ValueError: rows that contradict each other, or are all zero.
    """
    stated, values, _ = hypotheses(fit.fixed_names, L, rhs)
    rows, values = independent(stated, values, fit.bse.to_numpy())
    return pd.DataFrame([f_test(fit.beta, approximation(fit, df), stated, rows, values)])


def f_test(
    beta: np.ndarray,
    method: Approximation,
    stated: np.ndarray,
    rows: np.ndarray,
    values: np.ndarray,
) -> dict[str, float]:
    """The row of `joint_test`, of the rows of L as stated and of the independent ones among them
    with what they are under the hypothesis."""
    gap = rows @ beta - values
    q = len(rows)
    degrees, factor = method.several(stated, q)
    statistic = factor * float(gap @ np.linalg.solve(rows @ method.vcov @ rows.T, gap)) / q
    p_value = f_tail(statistic, q, degrees)
    return {"statistic": statistic, "num_df": q, "den_df": degrees, "p_value": p_value}


def independent(
    rows: np.ndarray, values: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of L that do not depend on those before them, with coefficients in `units`."""
    kept: list[int] = []
    scaled = rows * units
    for k, row in enumerate(scaled):
        share = np.linalg.lstsq(scaled[kept].T, row)[0] if kept else np.zeros(0)
        rest = row - scaled[kept].T @ share
        if np.linalg.norm(rest) > NOT_ESTIMATED * np.linalg.norm(row):
            kept.append(k)
            continue
        size = abs(values[k]) + np.abs(share) @ np.abs(values[kept])
        if abs(values[k] - share @ values[kept]) > CONTRADICTION * size:
            raise ValueError(f"row {k} of the hypothesis contradicts those before it")
    if not kept:
        raise ValueError("the hypothesis is empty: all coefficients are zero")
    return rows[kept], values[kept]


def test(
    fit: FittedModel, L: Any, rhs: Any = 0.0, df: str = "satterthwaite", *, joint: bool = True
) -> pd.DataFrame:
    """Test linear hypotheses L beta = rhs about the fixed effects.

    Args:
        fit: the fit.
        L: (k, p) or (p,) numbers; a dict from names of fixed effects to coefficients; or
            equations such as ``"Days = 10"``, see `jaxreml.data.hypotheses.hypotheses`.
        rhs: (k,) or a scalar.
        df: "satterthwaite", "kenward-roger", "kenward-roger-sas", "kenward-roger-linear",
            "between-within", "residual" or "inf"; see `jaxreml.inference.wald`.
        joint: all rows together, one F test; or each by itself, with t tests.

    Returns:
        Columns statistic, num_df, den_df, p_value; or estimate, std_error, df, statistic and
        p_value, a row per row of L.

    Raises:
        DataError: names that are not fixed effects, or a fit without an optimum.
        FormulaError: an equation that is none.
        ValueError: other hypotheses that are none, or another `df`.

    Examples:
        The hypothesis that a day costs 10 ms; that two machines are equal, and all three:

        >>> fit.test("Days = 10").round(3)
           statistic  num_df  den_df  p_value
        0      0.091       1    17.0    0.766
        >>> scores.fixed_names
        ('(Intercept)', 'Machine[T.B]', 'Machine[T.C]')
        >>> scores.test("`Machine[T.B]` = `Machine[T.C]`", joint=False)[["estimate", "df"]].round(2)
                                         estimate    df
        `Machine[T.B]` = `Machine[T.C]`     -5.95  46.0
        >>> scores.test(["`Machine[T.B]` = 0", "`Machine[T.C]` = 0"], df="kenward-roger").round(2)
           statistic  num_df  den_df  p_value
        0       87.8       2    46.0      0.0
    """
    fit.require_optimum("test fixed effects")
    return (joint_test if joint else each)(fit, L, rhs, df)


def coefficients(fit: FittedModel, df: str = "satterthwaite") -> pd.DataFrame:
    """The fixed effects with t tests of zero.

    Args:
        fit: the fit.
        df: degrees of freedom, as for `test`; Kenward-Roger's come with adjusted standard
            errors.

    Returns:
        Columns estimate, std_error, df, statistic, p_value.

    Examples:
        >>> fit.coefficients().round(2)[["estimate", "std_error", "df", "statistic"]]
                     estimate  std_error    df  statistic
        (Intercept)    251.41       6.82  17.0      36.84
        Days            10.47       1.55  17.0       6.77
        >>> fit.coefficients("kenward-roger")["df"].round(1).tolist()
        [17.0, 17.0]
    """
    table = each(fit, np.eye(len(fit.beta)), df=df)
    return table.set_index(pd.Index(fit.fixed_names))


def conf_int(
    fit: FittedModel, conf_level: float = 0.95, df: str = "satterthwaite", method: str = "wald"
) -> pd.DataFrame:
    """Confidence intervals.

    Args:
        fit: the fit.
        conf_level: the level.
        df: degrees of freedom of Wald intervals, as for `test`: by default those of the tests, so
            that an interval is without zero where the p-value is below 1 - conf_level; "inf" for
            normal quantiles, as lme4's and statsmodels'.
        method: "wald" for Wald intervals of the fixed effects; "profile" for profile likelihood
            intervals of all parameters, ML as lme4's (`profile` has more options).

    Returns:
        Columns ``lower`` and ``upper``; with "profile" those of `Profile.conf_int`.

    Examples:
        >>> fit.conf_int().round(2)
                      lower   upper
        (Intercept)  237.01  265.80
        Days           7.21   13.73
        >>> fit.conf_int(0.9, df="inf").loc["Days"].round(2).tolist()
        [7.92, 13.01]
        >>> fit.conf_int(method="profile")[["term", "lower", "upper"]].round(2).tail(2)
                            term   lower   upper
        parameter
        (Intercept)  (Intercept)  237.68  265.13
        Days                Days    7.36   13.58
    """
    check_conf_level(conf_level)
    if method == "profile":
        return Profile(fit).conf_int(conf_level)
    if method != "wald":
        raise ValueError(f'method must be "wald" or "profile", not {method!r}')
    table = coefficients(fit, df)
    half = stdtrit(table["df"], (1 + conf_level) / 2) * table["std_error"]
    return pd.DataFrame({"lower": table["estimate"] - half, "upper": table["estimate"] + half})


def df_satterthwaite(fit: FittedModel) -> pd.Series:
    """Satterthwaite's degrees of freedom of each fixed effect.

    2 v^2 / (g' A g), with v the variance of the coefficient, g its derivatives in the variance
    parameters and A their asymptotic covariance (Giesbrecht and Burns 1985, Biometrics
    41:477); parameters on the boundary are held there.

    Examples:
        >>> fit.df_satterthwaite.round(2).to_dict()
        {'(Intercept)': 17.0, 'Days': 17.0}
    """
    return pd.Series(coefficients(fit)["df"])


def pvalues(fit: FittedModel) -> pd.Series:
    """Two-sided p-values of t tests with Satterthwaite's degrees of freedom.

    Examples:
        >>> (fit.pvalues < 0.001).to_dict()
        {'(Intercept)': True, 'Days': True}
    """
    return pd.Series(coefficients(fit)["p_value"], name="pvalues")


def vcov_kenward_roger(fit: FittedModel) -> pd.DataFrame:
    """Kenward and Roger's adjusted covariance matrix of the fixed effects; REML only.

    Examples:
        >>> fit.vcov_kenward_roger.round(2)
                     (Intercept)  Days
        (Intercept)        46.57 -1.45
        Days               -1.45  2.39
    """
    names = pd.Index(fit.fixed_names)
    return pd.DataFrame(approximation(fit, "kenward-roger").vcov, names, names)
