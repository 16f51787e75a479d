"""`LMMResults`: what `fit` returns, float64 and labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd

from jaxreml import covariance
from jaxreml.designs import Design, with_spare_levels
from jaxreml.effects import Henderson, henderson
from jaxreml.errors import DataError
from jaxreml.estimation import Status
from jaxreml.frame import ModelFrame, model_frame
from jaxreml.hypotheses import check_conf_level

if TYPE_CHECKING:
    from jaxreml.diagnostics import Influence
    from jaxreml.inference.bootstrap import Bootstrap
    from jaxreml.inference.means import MarginalMeans
    from jaxreml.inference.profile import Profile
    from jaxreml.inference.tests import Approximation

RESIDUAL = "Residual"


@dataclass(frozen=True)
class Grouping:
    """One random term of a fit.

    Attributes:
        name, levels, effects: labels of the grouping factor, its levels and the effects.
        modes: (levels, effects), conditional modes of the random effects.
        variances: (levels, effects, effects), their conditional covariances given the fixed
            effects and variance parameters, as lme4's ``condVar``.
    """

    name: str
    levels: tuple[Any, ...]
    effects: tuple[str, ...]
    modes: np.ndarray
    variances: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class LMMResults:
    """A fitted linear mixed model.

    The fields are plain values and arrays, one to one with `save`; the labelled views are
    properties: fixed effects (`params`, `bse`, `tvalues`, `pvalues`, `vcov`, `conf_int`), random
    effects (`variance_components`, `correlations`, `cov_re`, `random_effects`), fit statistics
    (`llf`, `aic`, `bic`), rows (`fittedvalues`, `resid`) and how it ended (`converged`,
    `is_singular`, `message`). `tidy`, `glance` and `augment` give frames as broom.mixed does.

    Attributes:
        formula, method: as given.
        structure: how the covariance was factorised.
        fixed_names, aliased: columns of X, and those dropped because they depend on others.
        groupings: random terms in lme4's order, most levels first.
        parameter_names: names of the variance parameters `parameters`.
        theta: (m,), lme4's relative Cholesky factor, column by column, term by term.
        parameters, parameters_vcov, hessian: `Estimate.params` and its asymptotic covariance and
            Hessian; NaN for parameters on the boundary, the others given them.
        beta, vcov_array, vcov_slopes: fixed effects, their covariance, its derivatives.
        inertia: negative, zero and positive eigenvalues of the Hessian in theta.
        sigma: residual standard deviation.
        criterion: -2 log (restricted) likelihood.
        n_iter: evaluations of the criterion with its derivatives.
        gradient_norm: norm of the gradient in theta, by a separately compiled function.
        is_singular: whether a variance is zero or a correlation +-1.
        status: a `Status` code; `message` is its sentence.
        n_dropped: rows left out because of missing values.
        y, fitted, fixed_fitted: (n,), response, fitted values, and those without random effects.
        weights, offset: (n,) or None.
        table: the columns used, complete rows only.
        context: names the formula may use besides columns; not saved.
    """

    formula: str
    method: str
    structure: str
    fixed_names: tuple[str, ...]
    aliased: tuple[str, ...]
    groupings: tuple[Grouping, ...]
    parameter_names: tuple[str, ...]
    theta: np.ndarray
    parameters: np.ndarray
    parameters_vcov: np.ndarray
    beta: np.ndarray
    vcov_array: np.ndarray
    vcov_slopes: np.ndarray
    hessian: np.ndarray
    inertia: tuple[int, ...]
    sigma: float
    criterion: float
    n_iter: int
    gradient_norm: float
    is_singular: bool
    status: int
    n_dropped: int
    y: np.ndarray
    fixed_fitted: np.ndarray
    fitted: np.ndarray
    weights: np.ndarray | None
    offset: np.ndarray | None
    table: pd.DataFrame
    context: Mapping[str, Any] | None = field(default=None, metadata={"saved": False})

    @cached_property
    def frame(self) -> ModelFrame:
        """The rows used as arrays with labels; made again from `table` where the fit was loaded.

        Raises:
            DataError: the formula of a loaded fit uses functions of its `context`, which are not
                saved.
        """
        extras = {
            role: self.table[f"({role})"].to_numpy() if f"({role})" in self.table else None
            for role in ("weights", "offset")
        }
        table = self.table.drop(columns=["(weights)", "(offset)"], errors="ignore")
        return model_frame(self.formula, table, **extras, context=self.context)

    @cached_property
    def design(self) -> Design:
        """The cross-products of `frame`, in the structure of the fit.

        A grouped design may have some levels more, without rows, which change nothing.
        """
        with jax.enable_x64(True):
            return with_spare_levels(self.frame.design(self.structure))

    # Fixed effects

    @property
    def params(self) -> pd.Series:
        """Fixed-effects estimates."""
        return pd.Series(self.beta, self._fixed_index, name="params")

    @property
    def bse(self) -> pd.Series:
        """Standard errors of the fixed effects."""
        return pd.Series(np.sqrt(np.diagonal(self.vcov_array)), self._fixed_index, name="bse")

    @property
    def tvalues(self) -> pd.Series:
        """Estimates over standard errors."""
        return (self.params / self.bse).rename("tvalues")

    @property
    def vcov(self) -> pd.DataFrame:
        """Covariance matrix of the fixed effects, sigma2 (X' V0^-1 X)^-1."""
        return pd.DataFrame(self.vcov_array, self._fixed_index, self._fixed_index)

    def cov_params(self) -> pd.DataFrame:
        """`vcov`, by statsmodels' name."""
        return self.vcov

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

    # Variance parameters

    @cached_property
    def variance_components(self) -> pd.DataFrame:
        """One row per random effect, the residual last: variance, SD, log-variance and its SE.

        A variance of zero has log-variance -inf and SE NaN; the other SEs are given it.
        """
        rows = [
            (grouping.name, effect) for grouping in self.groupings for effect in grouping.effects
        ]
        variances = [np.diagonal(matrix) for matrix in self._covariances]
        positions, _ = covariance.positions(self._sizes)
        variance = np.concatenate([*variances, [self.sigma**2]])
        return pd.DataFrame(
            {
                "group": [group for group, _ in rows] + [RESIDUAL],
                "term": [term for _, term in rows] + [RESIDUAL],
                "variance": variance,
                "sd": np.sqrt(variance),
                "log_variance": self.parameters[positions],
                "log_variance_se": np.sqrt(np.diagonal(self.parameters_vcov))[positions],
            }
        )

    @property
    def log_variances(self) -> pd.Series:
        """Log-variances by group and term, the residual's last; -inf for a variance of zero."""
        return self._by_effect("log_variance")

    @property
    def log_variance_se(self) -> pd.Series:
        """Asymptotic standard errors of the log-variances; NaN on the boundary."""
        return self._by_effect("log_variance_se")

    @property
    def correlations(self) -> pd.DataFrame:
        """Correlations of random effects: columns group, term1, term2, correlation."""
        rows = []
        for grouping, matrix in zip(self.groupings, self._covariances, strict=True):
            sd = np.sqrt(np.diagonal(matrix))
            for j in range(len(sd)):
                for i in range(j + 1, len(sd)):
                    scale = sd[i] * sd[j]
                    value = matrix[i, j] / scale if scale > 0 else np.nan
                    rows.append((grouping.name, grouping.effects[j], grouping.effects[i], value))
        frame = pd.DataFrame(rows, columns=["group", "term1", "term2", "correlation"])
        return frame.astype({"correlation": float})

    @property
    def cov_re(self) -> pd.DataFrame:
        """Covariance matrix of the random effects of one level of every term, block-diagonal."""
        labels = [(g.name, effect) for g in self.groupings for effect in g.effects]
        index = pd.MultiIndex.from_tuples(labels, names=["group", "term"])
        matrix = np.zeros((len(labels), len(labels)))
        start = 0
        for block in self._covariances:
            stop = start + len(block)
            matrix[start:stop, start:stop] = block
            start = stop
        return pd.DataFrame(matrix, index, index)

    @property
    def random_effects(self) -> dict[str, pd.DataFrame]:
        """Conditional modes per grouping factor: a row per level, a column per effect."""
        return self._by_level([grouping.modes for grouping in self.groupings])

    @property
    def random_effects_se(self) -> dict[str, pd.DataFrame]:
        """Conditional standard deviations of `random_effects`, laid out likewise.

        Given the fixed effects and variance parameters, as lme4's ``condVar`` and broom.mixed's
        ``std.error``.
        """
        variances = [np.einsum("jaa->ja", grouping.variances) for grouping in self.groupings]
        return self._by_level([np.sqrt(part) for part in variances])

    def _by_level(self, values: list[np.ndarray]) -> dict[str, pd.DataFrame]:
        """Frames of (levels, effects) arrays, one per grouping factor."""
        frames: dict[str, list[pd.DataFrame]] = {}
        for grouping, part in zip(self.groupings, values, strict=True):
            index = pd.Index(grouping.levels, name=grouping.name)
            frame = pd.DataFrame(part, index, list(grouping.effects))
            frames.setdefault(grouping.name, []).append(frame)
        return {
            name: parts[0] if len(parts) == 1 else pd.concat(parts, axis=1)
            for name, parts in frames.items()
        }

    # Fit statistics

    @property
    def llf(self) -> float:
        """Log-likelihood, restricted under REML."""
        return -self.criterion / 2

    @property
    def df_model(self) -> int:
        """Parameters counted by `aic` and `bic`: fixed effects, variance parameters, residual."""
        return len(self.beta) + len(self.theta) + 1

    @property
    def df_resid(self) -> int:
        """Observations less `df_model`."""
        return self.nobs - self.df_model

    @property
    def aic(self) -> float:
        """Akaike's criterion, of the restricted likelihood under REML, as lme4's."""
        return self.criterion + 2 * self.df_model

    @property
    def bic(self) -> float:
        """Schwarz's criterion with log(nobs), of the restricted likelihood under REML as lme4's."""
        return self.criterion + float(np.log(self.nobs)) * self.df_model

    @property
    def nobs(self) -> int:
        """Rows used."""
        return len(self.y)

    @property
    def ngroups(self) -> dict[str, int]:
        """Levels of each grouping factor."""
        return {grouping.name: len(grouping.levels) for grouping in self.groupings}

    @property
    def converged(self) -> bool:
        """Whether an optimum was found and certified."""
        return self.status == Status.CONVERGED

    @property
    def message(self) -> str:
        """How the fit ended, in words."""
        sentence = Status(self.status).sentence
        if not self.converged:
            return sentence
        if self.is_singular:
            sentence += "; singular: " + "; ".join(self._boundary)
        if np.isnan(np.diagonal(self.parameters_vcov)[np.isfinite(self.parameters)]).any():
            sentence += (
                "; the variance parameters have no standard errors: the criterion is flat in a "
                "combination of them"
            )
        return sentence

    def require_optimum(self, purpose: str) -> None:
        """Raise DataError unless the fit has an optimum.

        Args:
            purpose: what needs it, after "cannot".
        """
        if not self.converged:
            raise DataError(f"cannot {purpose}: the fit has no optimum ({self.message})")

    # Rows

    @property
    def fittedvalues(self) -> pd.Series:
        """X beta + Z b + offset, in the labels of the rows used."""
        return pd.Series(self.fitted, self.table.index, name="fittedvalues")

    @property
    def resid(self) -> pd.Series:
        """Response less fitted values."""
        return pd.Series(self.y - self.fitted, self.table.index, name="resid")

    # Tables and files

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

    # Predictions and diagnostics

    @cached_property
    def henderson(self) -> Henderson:
        """What the variances of x'beta + z'b are made of; see `effects.row_variances`."""
        return henderson(self.theta, self.design)

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
                A row with a missing value in a column that is needed has NaN for its prediction.
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

    def save(self, path: str | Path) -> None:
        """Write the fit to a JSON file; `load` reads it back."""
        from jaxreml.storage import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> LMMResults:
        """Read a fit that `save` wrote."""
        from jaxreml.storage import load

        return load(path)

    def _by_effect(self, column: str) -> pd.Series:
        components = self.variance_components
        labels = [components["group"], components["term"]]
        index = pd.MultiIndex.from_arrays(labels, names=["group", "term"])
        return pd.Series(components[column].to_numpy(), index, name=column)

    @property
    def term_sizes(self) -> tuple[tuple[str, int], ...]:
        """Per random term its grouping factor and its number of effects."""
        return tuple((grouping.name, len(grouping.effects)) for grouping in self.groupings)

    @property
    def _fixed_index(self) -> pd.Index:
        return pd.Index(self.fixed_names)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(grouping.effects) for grouping in self.groupings)

    @cached_property
    def _covariances(self) -> list[np.ndarray]:
        """Covariance matrix of each term's effects."""
        matrices = []
        start = 0
        for q in self._sizes:
            factor = np.zeros((q, q))
            rows, columns = covariance.triangle(q)
            factor[rows, columns] = self.theta[start : start + rows.size]
            matrices.append(self.sigma**2 * factor @ factor.T)
            start += rows.size
        return matrices

    @property
    def _boundary(self) -> list[str]:
        """What is on the boundary of the parameter space, in words."""
        found = []
        for grouping, matrix in zip(self.groupings, self._covariances, strict=True):
            variances = np.diagonal(matrix)
            zero = [e for e, v in zip(grouping.effects, variances, strict=True) if v == 0]
            found += [f"the variance of {effect} of {grouping.name} is zero" for effect in zero]
            q = int((variances > 0).sum())
            if np.linalg.matrix_rank(matrix, tol=1e-8 * variances.max(initial=0.0)) < q:
                found.append(
                    f"the correlation of the effects of {grouping.name} is +-1"
                    if q == 2
                    else f"the correlation matrix of the effects of {grouping.name} has lost rank"
                )
        return found
