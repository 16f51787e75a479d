"""What `fit_many` finds, with labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import (
    RESIDUAL,
    Groups,
    correlation_labels,
    correlations_of,
    frames_by_group,
    unpack,
    variance_labels,
)
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.fitting.row_variances import FIXED
from jaxreml.many.numbers import Fits
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.status import Status


@dataclass(frozen=True)
class BatchModel:
    """What all responses of a batch share: the model and its labels.

    Attributes:
        formula, method, structure: as in `LMMResults`.
        fixed_names, aliased: columns of X, and those dropped because they depend on others.
        groups: per random term its grouping factor and its effects, in lme4's order.
        levels: per random term the labels of its levels.
        n_dropped: rows left out because of missing values in the data (not in a response).
        df: degrees of freedom of the tests, as in `LMMResults.test`.
        contrasts: names of the contrasts asked for.
        engine: "numpy" or "jax", as in `LMMResults`.
        fixed_terms: terms of the fixed effects, without the intercept.
        own: what the responses do not share: "weights", "offset", "covariate".
        library: that the data came in, as in `LMMResults`.
        residual: the covariance of residuals within subjects, without what a fit says of these;
            None if they are independent.
    """

    formula: str
    method: str
    structure: str
    fixed_names: tuple[str, ...]
    aliased: tuple[str, ...]
    groups: Groups
    levels: tuple[tuple[Any, ...], ...]
    n_dropped: int
    df: str = "satterthwaite"
    contrasts: tuple[str, ...] = ()
    engine: str = ""
    fixed_terms: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    library: str = "pandas"
    residual: ResidualCovariance | None = None

    @property
    def labels(self) -> Groups:
        """`groups`, and the residuals' covariance with its visits."""
        own = () if self.residual is None else ((RESIDUAL, self.residual.effects),)
        return (*self.groups, *own)

    def require_independent(self, purpose: str) -> None:
        """Raise DataError if residuals are correlated or of unequal variances by ``residual=``.

        Args:
            purpose: what needs it, after "cannot".
        """
        if self.residual is not None:
            raise DataError(
                f"cannot {purpose} of fits with residual={self.residual.text!r}: this is there "
                "for independent residuals only, so far"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per random term."""
        return tuple(len(effects) for _, effects in self.groups)

    @property
    def variance_labels(self) -> list[tuple[str, str]]:
        """Group and term of each variance, the residual's last."""
        found = variance_labels(self.groups)
        if self.residual is None or not self.residual.block.log_variances:
            return found
        names = self.residual.block.variance_labels(self.residual.effects)
        return found[:-1] + [(RESIDUAL, name) for name in names]

    @property
    def correlation_labels(self) -> list[tuple[str, str, str]]:
        """Group and the two terms of each correlation."""
        return correlation_labels(self.groups)

    @property
    def grouping_factors(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(group for group, _ in self.groups))

    @property
    def parts(self) -> list[str]:
        """Of `Fits.contributions`: grouping factors, fixed terms, all fixed effects together."""
        return [*self.grouping_factors, *self.fixed_terms, FIXED]

    @property
    def covariance(self) -> Covariance:
        """Of the random effects, and of the residuals within subjects."""
        own = () if self.residual is None else (self.residual.block,)
        return Covariance((*unstructured(self.sizes).blocks, *own))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of `Fits.parameters`, as `Design.parameter_names`."""
        return self.covariance.parameter_names(self.labels)


@dataclass(frozen=True, eq=False, repr=False)
class FittedBatch:
    """One model fitted to many responses.

    Every labelled property has the responses as its index. A response without an optimum has a
    `status` other than 0, its `message` says why, and its numbers are NaN. Coefficients and
    contrasts that the rows of a response say nothing about, because its missing values leave no row
    of a level for example, are NaN for it, and its message names them; the others have the meaning
    that they have for all responses.

    Attributes:
        model: what the responses share.
        responses: their names.
        fits: the numbers, NumPy arrays with the responses on the first axis.
        frame: the rows of the model; None of results that were read from a file.
    """

    model: BatchModel
    responses: pd.Index
    fits: Fits
    frame: ModelFrame | None = None

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def library(self) -> str:
        """That the data came in; frames that methods return are of it.

        Examples:
            >>> results.library
            'pandas'
        """
        return self.model.library

    # Fixed effects

    @property
    def params(self) -> pd.DataFrame:
        """Fixed-effects estimates, a column per coefficient.

        Examples:
            >>> results.params.round(2).head(2)
                   (Intercept)  Days
            gene1         0.48  0.18
            gene2        -0.12  0.20
        """
        return self._fixed(self.fits.beta)

    @property
    def bse(self) -> pd.DataFrame:
        """Standard errors of the fixed effects.

        Examples:
            >>> results.bse.round(3).head(2)
                   (Intercept)   Days
            gene1        0.327  0.029
            gene2        0.294  0.023
        """
        return self._fixed(self.fits.se)

    @property
    def tvalues(self) -> pd.DataFrame:
        """Estimates over standard errors.

        Examples:
            >>> results.tvalues["Days"].round(2).head(2).tolist()
            [6.29, 8.58]
        """
        return self._fixed(self.fits.beta / self.fits.se)

    @property
    def df(self) -> pd.DataFrame:
        """Degrees of freedom of the fixed effects, by the method that `fit_many` was asked for.

        Examples:
            >>> results.df["Days"].round(1).head(2).tolist()
            [161.0, 161.0]
        """
        return self._fixed(self.fits.df)

    @property
    def df_satterthwaite(self) -> pd.DataFrame:
        """Satterthwaite's degrees of freedom, as `LMMResults.df_satterthwaite`.

        Raises:
            DataError: `fit_many` was asked for others.

        Examples:
            >>> results.df_satterthwaite.equals(results.df)
            True
        """
        if self.model.df != "satterthwaite":
            raise DataError(f"the degrees of freedom are those of df={self.model.df!r}: use `df`")
        return self.df

    @cached_property
    def pvalues(self) -> pd.DataFrame:
        """Two-sided p-values of t tests with `df`.

        Examples:
            >>> results.pvalues["Days"].lt(0.05).sum().item()
            6
        """
        from scipy.special import stdtr

        return self._fixed(2 * stdtr(self.fits.df, -np.abs(self.fits.beta / self.fits.se)))

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """The contrasts that `fit_many` was asked for: a row per response, columns by contrast and
        estimate, std_error, df, statistic, p_value, p_adjusted (as `pvalues_adjusted`).

        Examples:
            >>> asked = {"a week": {"Days": 7}}
            >>> week = jaxreml.fit_many("~ Days + (1 | Subject)", data, genes, contrasts=asked)
            >>> week.contrasts["a week"][["estimate", "std_error", "df"]].round(2).head(2)
                   estimate  std_error     df
            gene1      1.27       0.20  161.0
            gene2      1.40       0.16  161.0
        """
        from scipy.special import stdtr

        fits = self.fits
        statistic = fits.contrast / fits.contrast_se
        p_value = 2 * stdtr(fits.contrast_df, -np.abs(statistic))
        named = {
            "estimate": fits.contrast,
            "std_error": fits.contrast_se,
            "df": fits.contrast_df,
            "statistic": statistic,
            "p_value": p_value,
            "p_adjusted": false_discovery_rates(p_value),
        }
        parts = {
            name: pd.DataFrame({key: part[:, k] for key, part in named.items()}, self.responses)
            for k, name in enumerate(self.model.contrasts)
        }
        if not parts:
            raise DataError("no contrasts were asked for: call fit_many(..., contrasts=...)")
        return pd.concat(parts, axis=1)

    @cached_property
    def pvalues_adjusted(self) -> pd.DataFrame:
        """`pvalues` adjusted over the responses for the false discovery rate, each coefficient by
        itself (Benjamini and Hochberg 1995); responses without one stay out.

        Examples:
            >>> results.pvalues_adjusted["Days"].lt(0.05).sum().item()
            5
        """
        return self._fixed(false_discovery_rates(self.pvalues.to_numpy()))

    # Variance parameters

    @cached_property
    def variances(self) -> pd.DataFrame:
        """Variances by group and term, the residual's last.

        Examples:
            >>> results.variances.round(2).head(2)
            group     Subject Residual
            term  (Intercept) Residual
            gene1        1.50     1.23
            gene2        1.27     0.81
        """
        diagonals = [np.diagonal(matrix, axis1=1, axis2=2) for matrix in self._covariances]
        residual = self.fits.sigma[:, None] ** 2
        own = self.model.residual
        if own is not None and own.block.log_variances:
            count = own.block.log_variances + 1
            residual = np.exp(self.fits.parameters[:, self._positions[-count:]])
        return self._by_effect(np.concatenate([*diagonals, residual], axis=1))

    @property
    def log_variances(self) -> pd.DataFrame:
        """Log-variances by group and term, the residual's last; -inf for a variance of zero.

        Examples:
            >>> results.log_variances.round(2).head(2)
            group     Subject Residual
            term  (Intercept) Residual
            gene1        0.41     0.21
            gene2        0.24    -0.21
        """
        return self._by_effect(self.fits.parameters[:, self._positions])

    @property
    def log_variance_se(self) -> pd.DataFrame:
        """Asymptotic standard errors of the log-variances; NaN on the boundary.

        Examples:
            >>> results.log_variance_se.round(2).head(2)
            group     Subject Residual
            term  (Intercept) Residual
            gene1        0.37     0.11
            gene2        0.36     0.11
        """
        return self._by_effect(self.fits.parameters_se[:, self._positions])

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """Correlations of the random effects, a column per group and pair of terms.

        Examples:
            >>> both = jaxreml.fit_many("~ Days + (Days | Subject)", data, data[["Reaction"]])
            >>> both.correlations.round(2)
            group        Subject
            term1    (Intercept)
            term2           Days
            Reaction        0.07
        """
        names = ["group", "term1", "term2"]
        columns = pd.MultiIndex.from_tuples(self.model.correlation_labels, names=names)
        values = correlations_of(self._covariances).reshape(len(self), len(columns))
        return pd.DataFrame(values, self.responses, columns)

    @property
    def sigma(self) -> pd.Series:
        """Residual standard deviations.

        Examples:
            >>> results.sigma.round(2).head(2).tolist()
            [1.11, 0.9]
        """
        return self._series(self.fits.sigma, "sigma")

    @property
    def residual_df(self) -> pd.Series:
        """Degrees of freedom of `sigma` squared, tr((I - H)'(I - H)) with H the hat matrix, random
        effects included: n - p where no variance between groups is found, less where there is.

        Examples:
            >>> results.residual_df.round(1).head(2).tolist()
            [161.1, 161.1]
        """
        self.model.require_independent("give degrees of freedom of the residual variance")
        return self._series(self.fits.residual_df, "residual_df")

    # Fit statistics

    @property
    def criterion(self) -> pd.Series:
        """-2 log (restricted) likelihood.

        Examples:
            >>> results.criterion.round(1).head(2).tolist()
            [598.1, 528.1]
        """
        return self._series(self.fits.criterion, "criterion")

    @property
    def llf(self) -> pd.Series:
        """Log-likelihood, restricted under REML.

        Examples:
            >>> results.llf.round(1).head(2).tolist()
            [-299.1, -264.0]
        """
        return self._series(-self.fits.criterion / 2, "llf")

    @property
    def dof(self) -> pd.Series:
        """Parameters counted by `aic` and `bic`: fixed effects, variance parameters, residual.

        Examples:
            >>> results.dof.head(2).tolist()
            [4, 4]
        """
        return self._series(self.fits.rank + self.fits.parameters.shape[1], "dof")

    @property
    def df_resid(self) -> pd.Series:
        """Observations less `dof`.

        Examples:
            >>> results.df_resid.head(2).tolist()
            [176, 176]
        """
        return (self.nobs - self.dof).rename("df_resid")

    @property
    def aic(self) -> pd.Series:
        """Akaike's criterion, as `LMMResults.aic`.

        Examples:
            >>> results.aic.round(1).head(2).tolist()
            [606.1, 536.1]
        """
        return (self.criterion + 2 * self.dof).rename("aic")

    @property
    def bic(self) -> pd.Series:
        """Schwarz's criterion, as `LMMResults.bic`.

        Examples:
            >>> results.bic.round(1).head(2).tolist()
            [618.9, 548.8]
        """
        with np.errstate(divide="ignore"):  # no rows
            return (self.criterion + np.log(self.nobs) * self.dof).rename("bic")

    # How it went

    @property
    def status(self) -> pd.Series:
        """`Status` codes, 0 for an optimum.

        Examples:
            >>> results.status.value_counts().to_dict()
            {0: 40}
        """
        return self._series(self.fits.status, "status")

    @property
    def converged(self) -> pd.Series:
        """Whether an optimum was found and certified.

        Examples:
            >>> results.converged.all().item()
            True
        """
        return self._series(self.fits.status == Status.CONVERGED, "converged")

    @property
    def message(self) -> pd.Series:
        """How each fit ended, in words, and what the rows of the response say nothing about.

        Examples:
            >>> results.message.iloc[0].split(":")[0]
            'converged'
        """
        codes, sentences = self.message_codes
        return self._series([sentences[code] for code in codes], "message")

    @property
    def messages(self) -> pd.Series:
        """`message`, by its former name."""
        return self.message

    @cached_property
    def message_codes(self) -> tuple[np.ndarray, list[str]]:
        """The messages as (b,) positions in a list of sentences that begins with those of
        `Status`."""
        codes = self.fits.status.astype(np.int32)
        sentences = [status.sentence for status in Status]  # a status code is its position
        unknown = np.isnan(np.concatenate([self.fits.beta, self.fits.contrast], axis=1))
        some = np.flatnonzero((codes == Status.CONVERGED) & unknown.any(axis=1))
        patterns, which = np.unique(unknown[some], axis=0, return_inverse=True)
        codes[some] = len(sentences) + which.reshape(-1)
        labels = [*self.model.fixed_names, *self.model.contrasts]
        for pattern in patterns:
            names = ", ".join(labels[k] for k in np.flatnonzero(pattern))
            sentences.append(
                f"{Status.CONVERGED.sentence}; not estimable from the rows where the response is "
                f"not missing: {names}"
            )
        return codes, sentences

    @property
    def is_singular(self) -> pd.Series:
        """Whether a variance is zero or a correlation +-1.

        Examples:
            >>> results.is_singular.sum().item()
            0
        """
        return self._series(self.fits.is_singular, "is_singular")

    @property
    def gradient_norm(self) -> pd.Series:
        """Norm of the gradient at the optimum, recomputed by a separately compiled program.

        Examples:
            >>> results.gradient_norm.lt(1e-6).all().item()
            True
        """
        return self._series(self.fits.gradient_norm, "gradient_norm")

    @property
    def n_iter(self) -> pd.Series:
        """Evaluations of the criterion with its derivatives.

        Examples:
            >>> results.n_iter.max().item() < 20
            True
        """
        return self._series(self.fits.n_iter, "n_iter")

    @property
    def nobs(self) -> pd.Series:
        """Rows used.

        Examples:
            >>> results.nobs.head(2).tolist()
            [180, 180]
        """
        return self._series(self.fits.nobs, "nobs")

    @property
    def mean(self) -> pd.Series:
        """Means of the responses over the rows used.

        Examples:
            >>> results.mean.round(2).head(2).tolist()
            [1.29, 0.79]
        """
        return self._series(self.fits.mean, "mean")

    @property
    def n_missing(self) -> pd.Series:
        """Rows left out because the response is missing there.

        Examples:
            >>> results.n_missing.sum().item()
            0
        """
        return self._series(self.fits.n_missing, "n_missing")

    @property
    def n_dropped(self) -> pd.Series:
        """Rows left out because of missing values, of the data or of the response.

        Examples:
            >>> results.n_dropped.sum().item()
            0
        """
        return self._series(self.fits.n_missing + self.model.n_dropped, "n_dropped")

    # Random effects

    @cached_property
    def random_effects(self) -> dict[str, pd.DataFrame]:
        """Conditional modes per grouping factor: a row per response and level, a column per effect;
        ``random_effects[group].loc[response]`` is `LMMResults.random_effects` of one.

        Raises:
            DataError: `fit_many` was not asked for them.

        Examples:
            >>> results.random_effects["Subject"].round(2).head(2)
                              (Intercept)
            response Subject
            gene1    308            -1.08
                     309             0.32
        """
        if self.fits.modes is None:
            raise DataError("the conditional modes were not kept: call fit_many(..., modes=True)")
        groups, responses = self.model.groups, self.responses.rename("response")
        levels = [
            pd.MultiIndex.from_product([responses, pd.Index(own, name=group)])
            for (group, _), own in zip(groups, self.model.levels, strict=True)
        ]
        values = [modes.reshape(-1, modes.shape[-1]) for modes in self.fits.modes]
        return frames_by_group(groups, levels, values)

    def position(self, i: int | str) -> int:
        """Position of a response given by position or name; DataError if there is none.

        Examples:
            >>> results.position("gene3")
            2
        """
        if isinstance(i, int | np.integer):
            if not -len(self) <= i < len(self):
                raise DataError(f"there is no response {i}: there are {len(self)}")
            return int(i) % len(self)
        places = np.flatnonzero(self.responses == i)
        if len(places) != 1:
            raise DataError(f"{len(places)} responses have the name {i!r}")
        return int(places[0])

    def _series(self, values: Any, name: str) -> pd.Series:
        return pd.Series(values, self.responses, name=name)

    def _fixed(self, values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(values, self.responses, list(self.model.fixed_names))

    def _by_effect(self, values: np.ndarray) -> pd.DataFrame:
        names = ["group", "term"]
        columns = pd.MultiIndex.from_tuples(self.model.variance_labels, names=names)
        return pd.DataFrame(values, self.responses, columns)

    @property
    def _positions(self) -> np.ndarray:
        """Of log-variances, in the order of `variances`: sigma2 is the first visit's."""
        found, own = self.model.covariance.positions, self.model.residual
        if own is None:
            return found
        k = len(found) - 1 - own.block.log_variances
        return np.concatenate([found[:k], found[-1:], found[k:-1]])

    @cached_property
    def _residual_covs(self) -> np.ndarray:
        """(responses, q, q), of residuals of a subject."""
        scaled = self.fits.theta * self.fits.sigma[:, None]
        factor = unpack(scaled, self.model.covariance.sizes)[-1]
        return factor @ factor.transpose(0, 2, 1)

    def residual_cov(self, i: Any) -> pd.DataFrame:
        """Covariance matrix of the residuals of one subject's visits, of one response.

        Args:
            i: the response's name or position.

        Raises:
            DataError: no such response; residuals are independent.

        Examples:
            >>> children = jaxreml.datasets.load("orthodont")
            >>> measured = children[["distance"]]
            >>> visits = jaxreml.fit_many("~ age", children, measured, residual="us(age | Subject)")
            >>> visits.residual_cov("distance").round(1).to_numpy().tolist()[0]
            [5.9, 3.3, 4.8, 4.0]
        """
        if self.model.residual is None:
            raise DataError("the residuals are independent: sigma is their standard deviation")
        return self.model.residual.frame(self._residual_covs[self.position(i)])

    @cached_property
    def _covariances(self) -> list[np.ndarray]:
        """Per term the covariance matrices of its effects, (responses, q, q)."""
        scaled = self.fits.theta * self.fits.sigma[:, None]
        factors = unpack(scaled, self.model.sizes)
        return [factor @ factor.transpose(0, 2, 1) for factor in factors]


def false_discovery_rates(p_values: np.ndarray, method: str = "bh") -> np.ndarray:
    """Adjusted p-values (b, k), column by column, NaN where there is none; by Benjamini and
    Hochberg, or by Benjamini and Yekutieli ("by")."""
    from scipy.stats import false_discovery_control

    adjusted = np.full_like(p_values, np.nan)
    for own, column in zip(adjusted.T, p_values.T, strict=True):
        known = np.flatnonzero(~np.isnan(column))
        if known.size:
            own[known] = false_discovery_control(column[known], method=method)
    return adjusted
