"""`LMMResults`: what `fit` returns, and all that can be asked of it.

Each method hands over to the module that does it, imported when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxreml.fitted import FittedModel
from jaxreml.hypotheses import check_conf_level

if TYPE_CHECKING:
    from jaxreml.diagnostics import Influence
    from jaxreml.inference.bootstrap import Bootstrap
    from jaxreml.inference.deletion import Elimination
    from jaxreml.inference.means import MarginalMeans
    from jaxreml.inference.profile import Profile
    from jaxreml.inference.tests import Approximation


@dataclass(frozen=True, eq=False, repr=False)
class LMMResults(FittedModel):
    """A fitted linear mixed model.

    Its fields, plain values and arrays, are those of `FittedModel`, one to one with `save`; the
    labelled views are properties: fixed effects (`params`, `bse`, `tvalues`, `pvalues`, `vcov`,
    `conf_int`), random effects (`variance_components`, `correlations`, `cov_re`, `random_effects`),
    fit statistics (`llf`, `aic`, `bic`), rows (`fittedvalues`, `resid`) and how it ended
    (`converged`, `is_singular`, `message`). `tidy`, `glance` and `augment` give frames as
    broom.mixed does. Tests, intervals, comparisons, predictions and diagnostics are methods.
    """

    # Tests and intervals of the fixed effects

    @cached_property
    def df_satterthwaite(self) -> pd.Series:
        """Satterthwaite's degrees of freedom of each fixed effect.

        2 v^2 / (g' A g), with v the variance of the coefficient, g its derivatives in the variance
        parameters and A their asymptotic covariance (Giesbrecht and Burns 1985, Biometrics
        41:477); parameters on the boundary are held there.
        """
        return pd.Series(self.coefficients()["df"])

    @property
    def vcov_kenward_roger(self) -> pd.DataFrame:
        """Kenward and Roger's adjusted covariance matrix of the fixed effects; REML only."""
        vcov = self.approximation("kenward-roger").vcov
        return pd.DataFrame(vcov, self._fixed_index, self._fixed_index)

    def approximation(self, df: str) -> Approximation:
        """What the tests with degrees of freedom `df` are made from; see `inference.tests`."""
        from jaxreml.inference.tests import approximation

        df = "kenward-roger" if df == "kenward-roger-linear" else df
        if df not in self._approximations:
            self._approximations[df] = approximation(self, df)
        return self._approximations[df]

    @cached_property
    def _approximations(self) -> dict[str, Any]:
        return {}

    def test(
        self, L: Any, rhs: Any = 0.0, df: str = "satterthwaite", *, joint: bool = True
    ) -> pd.DataFrame:
        """Test linear hypotheses L beta = rhs about the fixed effects.

        Args:
            L: (k, p) or (p,) numbers; a dict from names of fixed effects to coefficients; or
                equations such as ``"Days = 10"``, see `jaxreml.hypotheses`.
            rhs: (k,) or a scalar.
            df: "satterthwaite", "kenward-roger", "kenward-roger-linear", "residual" or "inf"; see
                `inference.tests`.
            joint: all rows together, one F test; or each by itself, with t tests.

        Returns:
            Columns statistic, num_df, den_df, p_value; or estimate, std_error, df, statistic and
            p_value, a row per row of L.

        Raises:
            DataError: a hypothesis that is not one about this model, a fit without an optimum, or
                a method that does not serve it.
            ValueError: another `df`.
        """
        from jaxreml.inference import tests

        self.require_optimum("test fixed effects")
        return (tests.joint if joint else tests.each)(self, L, rhs, df)

    @cached_property
    def pvalues(self) -> pd.Series:
        """Two-sided p-values of t tests with Satterthwaite's degrees of freedom."""
        return pd.Series(self.coefficients()["p_value"], name="pvalues")

    def coefficients(self, df: str = "satterthwaite") -> pd.DataFrame:
        """The fixed effects with t tests of zero.

        Args:
            df: degrees of freedom, as for `test`; Kenward-Roger's come with adjusted standard
                errors.

        Returns:
            Columns estimate, std_error, df, statistic, p_value.
        """
        from jaxreml.inference.tests import each

        return each(self, np.eye(len(self.beta)), df=df).set_index(self._fixed_index)

    def conf_int(self, alpha: float = 0.05, df: str = "inf", method: str = "wald") -> pd.DataFrame:
        """Confidence intervals.

        Args:
            alpha: one minus the confidence level.
            df: of Wald intervals: "inf" for normal quantiles, as lme4 and statsmodels; t ones as
                for `test` else.
            method: "wald" for Wald intervals of the fixed effects; "profile" for profile likelihood
                intervals of all parameters, ML as lme4's (`profile` has more options).

        Returns:
            Columns ``lower`` and ``upper``; with "profile" those of `Profile.conf_int`.
        """
        from scipy.special import stdtrit

        check_conf_level(alpha, "alpha")
        if method == "profile":
            return self.profile().conf_int(1 - alpha)
        if method != "wald":
            raise ValueError(f'method must be "wald" or "profile", not {method!r}')
        table = self.coefficients(df)
        half = stdtrit(table["df"], 1 - alpha / 2) * table["std_error"]
        return pd.DataFrame({"lower": table["estimate"] - half, "upper": table["estimate"] + half})

    # Tables

    def summary(self, df: str = "satterthwaite") -> str:
        """The fit as text, in the layout of lmerTest's summary; `df` as for `test`."""
        from jaxreml.tables import summary

        return summary(self, df)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<LMMResults {self.formula!r}, {self.method}, criterion {self.criterion:.4f}>"

    def tidy(
        self,
        effects: str | tuple[str, ...] = ("fixed", "ran_pars"),
        conf_int: bool = False,
        conf_level: float = 0.95,
        df: str = "satterthwaite",
    ) -> pd.DataFrame:
        """Estimates as a long frame; see `tables.tidy`."""
        from jaxreml.tables import tidy

        return tidy(self, effects, conf_int=conf_int, conf_level=conf_level, df=df)

    def glance(self) -> pd.DataFrame:
        """One row of fit statistics; see `tables.glance`."""
        from jaxreml.tables import glance

        return glance(self)

    def augment(self) -> pd.DataFrame:
        """The columns used with fitted values and residuals; see `tables.augment`."""
        from jaxreml.tables import augment

        return augment(self)

    # Means and tables of tests

    def anova(self, type: str | int = "III", df: str = "satterthwaite") -> pd.DataFrame:
        """F tests of the terms of the fixed effects, of type "I", "II" or "III".

        As lmerTest's; see `inference.anova.anova`.

        Returns:
            Columns sum_sq, mean_sq, num_df, den_df, statistic, p_value; a row per term.
        """
        from jaxreml.inference.anova import anova

        return anova(self, type, df)

    def joint_tests(
        self,
        by: str | Sequence[str] | None = None,
        at: Mapping[str, Any] | None = None,
        df: str = "satterthwaite",
    ) -> pd.DataFrame:
        """F tests by contrasts of marginal means; see `inference.joint_tests.joint_tests`."""
        from jaxreml.inference.joint_tests import joint_tests

        return joint_tests(self, by, at, df)

    def drop1(
        self,
        scope: str | Sequence[str] | None = None,
        df: str = "satterthwaite",
        test: str = "F",
    ) -> pd.DataFrame:
        """Single term deletions of the fixed effects; see `inference.deletion.drop1`."""
        from jaxreml.inference.deletion import drop1

        return drop1(self, scope, df, test)

    def ranova(self, *, reduce_terms: bool = True) -> pd.DataFrame:
        """Likelihood-ratio tests of the random terms; see `inference.deletion.ranova`."""
        from jaxreml.inference.deletion import ranova

        return ranova(self, reduce_terms=reduce_terms)

    def step(self, df: str = "satterthwaite", **options: Any) -> Elimination:
        """Backward elimination of terms; `options` as for `inference.deletion.step`."""
        from jaxreml.inference.deletion import step

        return step(self, df, **options)

    def emmeans(
        self,
        specs: str | Sequence[str],
        by: str | Sequence[str] | None = None,
        at: Mapping[str, Any] | None = None,
        *,
        pairwise: bool = False,
        contrast: str | Mapping[str, Any] | None = None,
        adjust: str | None = None,
        df: str = "satterthwaite",
        weights: str = "equal",
        conf_level: float = 0.95,
    ) -> MarginalMeans:
        """Estimated marginal means of the levels of `specs`, within those of `by`.

        ``fit.emmeans("Machine", pairwise=True, adjust="holm")`` has ``table``, the means, and
        ``contrasts``. The reference grid is emmeans'; see `inference.means.emmeans`.
        """
        from jaxreml.inference.means import emmeans

        return emmeans(
            self, specs, by, at, pairwise=pairwise, contrast=contrast, adjust=adjust, df=df,
            weights=weights, conf_level=conf_level,
        )  # fmt: skip

    def contrasts(
        self,
        specs: str | Sequence[str],
        method: str | Mapping[str, Any] = "pairwise",
        by: str | Sequence[str] | None = None,
        at: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Contrasts between marginal means; `options` as for `emmeans`.

        `method` is "pairwise", "revpairwise", "trt.vs.ctrl", "trt.vs.ctrlk", "eff", "poly" or a
        dict from labels to coefficients; see `inference.contrasts.family`.
        """
        from jaxreml.inference.means import contrasts

        return contrasts(self, specs, method, by, at, **options)

    def emtrends(
        self,
        specs: str | Sequence[str],
        var: str,
        by: str | Sequence[str] | None = None,
        at: Mapping[str, Any] | None = None,
        *,
        pairwise: bool = False,
        contrast: str | Mapping[str, Any] | None = None,
        adjust: str | None = None,
        df: str = "satterthwaite",
        weights: str = "equal",
        conf_level: float = 0.95,
    ) -> MarginalMeans:
        """Slopes in the covariate `var` at the levels of `specs`; else as `emmeans`.

        See `inference.means.emtrends`.
        """
        from jaxreml.inference.means import emtrends

        return emtrends(
            self, specs, var, by, at, pairwise=pairwise, contrast=contrast, adjust=adjust, df=df,
            weights=weights, conf_level=conf_level,
        )  # fmt: skip

    # Functions of the parameters

    def delta(
        self,
        g: Callable[..., Any],
        *,
        conf_level: float = 0.95,
        names: str | Sequence[str] | None = None,
        transform: str | Sequence[str | None] | None = None,
    ) -> pd.DataFrame:
        """Estimate, standard error and interval of g(beta, components); see `delta.delta`."""
        from jaxreml.inference.delta import delta

        return delta(self, g, conf_level=conf_level, names=names, transform=transform)

    def variance_parameters(self, scale: str = "sd", conf_level: float = 0.95) -> pd.DataFrame:
        """SDs and correlations with intervals, in lme4's order; see `delta.variance_parameters`."""
        from jaxreml.inference.delta import variance_parameters

        return variance_parameters(self, scale, conf_level)

    def vcov_parameters(self, scale: str = "log") -> pd.DataFrame:
        """Covariance matrix of the variance parameters; see `delta.vcov_parameters`."""
        from jaxreml.inference.delta import vcov_parameters

        return vcov_parameters(self, scale)

    def icc(self, group: str | None = None, conf_level: float = 0.95) -> pd.DataFrame:
        """Intraclass correlation with its interval; see `shares.icc`."""
        from jaxreml.inference.shares import icc

        return icc(self, group, conf_level)

    def variance_shares(self, *, fixed: bool = False, conf_level: float = 0.95) -> pd.DataFrame:
        """Shares of the variance, by grouping factor; see `shares.variance_shares`."""
        from jaxreml.inference.shares import variance_shares

        return variance_shares(self, fixed=fixed, conf_level=conf_level)

    def repeatability(
        self,
        group: str,
        *,
        measurements: float = 1,
        adjusted: bool = True,
        conf_level: float = 0.95,
    ) -> pd.DataFrame:
        """Repeatability of measurements of a level of `group`; see `shares.repeatability`."""
        from jaxreml.inference.shares import repeatability

        return repeatability(
            self, group, measurements=measurements, adjusted=adjusted, conf_level=conf_level
        )

    def heritability(
        self,
        group: str,
        per: Mapping[str, float] | None = None,
        *,
        multiple: float = 1.0,
        conf_level: float = 0.95,
    ) -> pd.DataFrame:
        """Heritability on the basis of a plot or of an entry's mean; see `shares.heritability`."""
        from jaxreml.inference.shares import heritability

        return heritability(self, group, per, multiple=multiple, conf_level=conf_level)

    def r2(self, conf_level: float = 0.95) -> pd.DataFrame:
        """Nakagawa's marginal and conditional R2 with intervals; see `shares.r2`."""
        from jaxreml.inference.shares import r2

        return r2(self, conf_level)

    # Likelihood

    def profile(
        self,
        parameters: str | Sequence[str] | None = None,
        conf_level: float = 0.95,
        likelihood: str = "ML",
    ) -> Profile:
        """Profile likelihoods of SDs, correlations, sigma and fixed effects.

        Args:
            parameters: names as in ``profile().parameters``, lme4's: ``sd_(Intercept)|g``,
                ``cor_x.(Intercept)|g``, ``sigma``, fixed effects by their names; "theta_" and
                "beta_" for all variance parameters and all fixed effects. All if left out.
            conf_level: level of the intervals to cover, 0.99 at least.
            likelihood: "ML", for any fit as lme4 does, or "REML" to profile the variance parameters
                by the restricted likelihood. Fixed effects have no restricted likelihood: their
                profile is always ML.

        Returns:
            A `Profile`: ``conf_int(conf_level)`` and ``frame``.

        Raises:
            DataError: the fit has no optimum.
            JaxremlError: the profile finds a better one.
            ValueError: a parameter that the fit does not have, a level outside (0, 1).
        """
        from jaxreml.inference.profile import Profile

        return Profile(self, parameters, conf_level, likelihood)

    # Simulation

    def simulate(self, n: int = 1, seed: int = 0, re_form: str | None = "~0") -> pd.DataFrame:
        """Responses drawn from the fitted model, (rows, n); see `inference.simulation.simulate`."""
        from jaxreml.inference.simulation import simulate

        return simulate(self, n, seed, re_form)

    def bootstrap(
        self,
        n: int = 10_000,
        statistic: Any = None,
        seed: int = 0,
        type: str = "parametric",
    ) -> Bootstrap:
        """Parametric bootstrap of this fit; see `inference.bootstrap.bootstrap`."""
        from jaxreml.inference.bootstrap import bootstrap

        return bootstrap(self, n, statistic, seed, type)

    # Predictions

    def predict(
        self,
        newdata: Any = None,
        re_form: str | bool | None = None,
        allow_new_levels: bool = False,
        *,
        interval: str | None = None,
        conf_level: float = 0.95,
        offset: Any = None,
        weights: Any = None,
    ) -> pd.Series | pd.DataFrame:
        """Predictions, as lme4's predict.merMod, with standard errors if wanted.

        The columns of the model are made of `newdata` as they were for the fit: with its state of
        transforms such as ``poly(x, 2)`` and ``scale(x)``, its levels of factors and contrasts,
        and without aliased columns.

        Args:
            newdata: any table as for `fit`; the rows of the fit if left out. The response is not
                needed, nor are the grouping factors of random effects that `re_form` leaves out.
                A row with a missing value in a column that is needed has NaN for its prediction,
                and so has, with an EstimabilityWarning, one whose fixed effects the data do not
                determine, such as a combination of levels without data.
            re_form: which random effects to use: None for all, "~0" or False for none, or a
                formula with some of them, such as ``"~ (1 | school)"``.
            allow_new_levels: predict for levels of grouping factors that the fit has not seen,
                whose random effects are taken for zero. Refused by name otherwise.
            interval: None; "confidence" for x'beta + z'b, with the uncertainty of beta and of the
                random effects used, jointly (b of a new level has all of its variance Sigma);
                "prediction" for a new observation: with the residual variance, and the variance of
                the random effects not used, besides. Variance parameters are taken for known.
            conf_level: of the interval, by normal quantiles.
            offset: of the rows of newdata, a column name or values, where the fit was made with
                the argument `offset`. ``offset()`` of the formula is evaluated anyway.
            weights: likewise; wanted for prediction intervals only.

        Returns:
            Predictions in the row labels of newdata; with `interval`, a frame with the columns
            ``prediction``, ``se``, ``lower`` and ``upper``.

        Raises:
            DataError: a column that is missing or of another kind than in the fit, levels that the
                fit has not seen, named.
            FormulaError: a `re_form` that the fit has not.
            ValueError: other arguments than these; an offset or weights that are missing; intervals
                of a fit without an optimum.
        """
        from jaxreml.prediction import predict

        return predict(
            self,
            newdata,
            re_form,
            allow_new_levels,
            interval=interval,
            conf_level=conf_level,
            offset=offset,
            weights=weights,
        )

    # Diagnostics

    def residuals(self, kind: str = "response") -> pd.Series:
        """Residuals of the rows used; see `diagnostics.residuals`."""
        from jaxreml.diagnostics import residuals

        return residuals(self, kind)

    def leverage(self) -> pd.Series:
        """Diagonal of the hat matrix, random effects included; see `diagnostics.leverage`."""
        from jaxreml.diagnostics import leverage

        return leverage(self)

    def cooks_distance(self) -> pd.Series:
        """Cook's distance of each row, as lme4's; see `diagnostics.cooks_distance`."""
        from jaxreml.diagnostics import cooks_distance

        return cooks_distance(self)

    def dfbetas(self) -> pd.DataFrame:
        """Scaled change of each coefficient without each row; see `diagnostics.dfbetas`."""
        from jaxreml.diagnostics import dfbetas

        return dfbetas(self)

    def influence(self, by: Any = None, method: str = "exact") -> Influence:
        """What the estimates would be without each group of rows; see `diagnostics.influence`."""
        from jaxreml.diagnostics import influence

        return influence(self, by, method)

    # Files

    def save(self, path: str | Path, *, data: bool = True) -> None:
        """Write the fit to a JSON file; `load` reads it back.

        Args:
            path: of the file.
            data: with the rows of the fit. Without them the file is small and holds no row of the
                data; it can be loaded, shown and used for predictions of new rows, and refuses what
                needs the rows: intervals of predictions, residuals, refits.

        Raises:
            DataError: labels that cannot be written; without rows, a formula whose columns cannot
                be made again without them.
        """
        from jaxreml.storage import save

        save(self, path, data=data)

    @staticmethod
    def load(path: str | Path) -> LMMResults:
        """Read a fit that `save` wrote."""
        from jaxreml.storage import load

        return load(path)
