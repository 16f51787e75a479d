"""What a fit is: its numbers, and the labelled views of them that need no further inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from scipy.linalg import block_diag

from jaxreml.backend.lazy import make_records_known
from jaxreml.data.formula import parse
from jaxreml.data.frame import ModelFrame, model_frame, split_extras
from jaxreml.data.kernels import Kernels
from jaxreml.data.prototype import prototype
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import (
    RESIDUAL,
    Groups,
    Layout,
    correlation_labels,
    correlations_of,
    frames_by_group,
    unpack,
    variance_labels,
)
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.words import ANY, TermCovariance
from jaxreml.model.design import Design, with_spare_levels
from jaxreml.optimum.effects import Henderson, henderson
from jaxreml.status import Status

MOST_SHOWN = 2000  # visits whose covariance matrix is written out
ROWS = ("y", "fixed_fitted", "fitted", "weights", "offset", "table")  # fields of the rows


@dataclass(frozen=True)
class Grouping:
    """One random term of a fit.

    Attributes:
        name, levels, effects: labels of the grouping factor, its levels and the effects.
        modes: (levels, effects), conditional modes of the random effects.
        modes_vcov: (levels, effects, effects), their conditional covariances given the fixed
            effects and variance parameters, as lme4's ``condVar``.
        n_seen: how many of the levels have rows, where some are known by a kernel only.
        covariance: what the formula says of that of the effects.
    """

    name: str
    levels: tuple[Any, ...]
    effects: tuple[str, ...]
    modes: np.ndarray
    modes_vcov: np.ndarray
    n_seen: int | None = None
    covariance: TermCovariance = ANY


@dataclass(frozen=True, eq=False, repr=False)
class FittedModel:
    """A fitted linear mixed model: what `jaxreml.fit` keeps, and `save` writes.

    Attributes:
        formula, method: as given.
        structure: how the covariance was factorised.
        fixed_names, aliased: columns of X, and those dropped because they depend on others.
        groupings: random terms in lme4's order, most levels first.
        parameter_names: names of the variance parameters `parameters`.
        theta: (m,), lme4's relative Cholesky factor, column by column, term by term.
        parameters, parameters_vcov_array, hessian: those of `Estimate`, their asymptotic
            covariance and Hessian; NaN for parameters on the boundary, the others given them.
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
        optimality: how it is known that no other optimum is lower: "proved to be the lowest" (one
            variance ratio), "the lowest of 5 searches", or, with much data, "not lower with a
            variance at zero".
        engine: the library that worked on it, "numpy" or "jax".
        residual: the covariance of residuals within subjects; None if they are independent.
        made_from: its model frame and design; None of a fit that was loaded.
        sandwich: what tests are made from if not the model's covariance (`robust`), and
            `sandwich_note` which that is; neither is saved.
        kernels: known covariances of the levels of grouping factors, by their names; None without.
        residual_tried: covariances of residuals that were tried before, and why each was left.
        penalty: the density of the variance parameters in `penalty=`, in words; "" without. They
            are maximum a posteriori estimates then, and their covariance is that of the penalised
            criterion; `criterion` and what is made of it are without the penalty.
        penalty_value: -2 log of that density at the estimates, up to a constant.
        library: that the data came in, "pandas", "polars" or "pyarrow": frames that methods return
            are of it.
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
    parameters_vcov_array: np.ndarray
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
    optimality: str = ""
    engine: str = ""
    residual: ResidualCovariance | None = None
    kernels: Kernels | None = None
    residual_tried: tuple[tuple[str, str], ...] = ()
    made_from: tuple[ModelFrame, Design] | None = field(default=None, metadata={"saved": False})
    penalty: str = ""
    penalty_value: float = 0.0
    library: str = "pandas"
    sandwich: Any = field(default=None, metadata={"saved": False})
    sandwich_note: str = field(default="", metadata={"saved": False})

    @cached_property
    def frame(self) -> ModelFrame:
        """The rows used as arrays with labels; made again from `table` where the fit was loaded.

        Raises:
            DataError: the formula of a loaded fit uses functions of its `context`, which are not
                saved.
        """
        return self.made_from[0] if self.made_from else self.frame_of(self.formula)

    def frame_of(self, formula: str) -> ModelFrame:
        """The model frame of another formula, of columns that the fit uses, on the same rows."""
        table, extras = split_extras(self.table)
        text = None if self.residual is None else self.residual.text
        kernels = self._kernels_of(formula)
        found = model_frame(
            formula, table, **extras, context=self.context, residual=text, kernels=kernels
        )
        return replace(found, library=self.library)

    def _kernels_of(self, formula: str) -> Kernels | None:
        """Those of the fit's kernels whose grouping factors a formula has."""
        if self.kernels is None:
            return None
        names = {bar.name for bar in parse(formula, need_random=False).random}
        return {name: own for name, own in self.kernels.items() if name in names}

    @cached_property
    def design(self) -> Design:
        """The cross-products of `frame`, in the structure of the fit.

        A grouped design may have some levels more, without rows, which change nothing.
        """
        if self.made_from:
            make_records_known()
            return self.made_from[1]
        return with_spare_levels(self.frame.design(self.structure))

    @cached_property
    def approximations(self) -> dict[str, Any]:
        """What tests of the fixed effects are made from, by its name; `wald.approximation`."""
        return {}

    @cached_property
    def prototype(self) -> ModelFrame:
        """Some rows of `frame` with all levels, all that predictions for new rows need."""
        return prototype(self.frame)

    @property
    def has_rows(self) -> bool:
        """Whether the rows are there: not those of a fit saved with ``data=False``.

        Examples:
            >>> fit.has_rows
            True
        """
        return "table" in vars(self)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in ROWS:
                raise DataError(
                    "the fit was saved without its rows (data=False), which this needs: "
                    "save it with data=True"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Fixed effects

    @property
    def params(self) -> pd.Series:
        """Fixed-effects estimates.

        Examples:
            >>> fit.params.round(2).to_dict()
            {'(Intercept)': 251.41, 'Days': 10.47}
        """
        return pd.Series(self.beta, self._fixed_index, name="params")

    @property
    def bse(self) -> pd.Series:
        """Standard errors of the fixed effects.

        Examples:
            >>> fit.bse.round(2).to_dict()
            {'(Intercept)': 6.82, 'Days': 1.55}
        """
        return pd.Series(np.sqrt(np.diagonal(self.vcov_array)), self._fixed_index, name="bse")

    @property
    def tvalues(self) -> pd.Series:
        """Estimates over standard errors.

        Examples:
            >>> fit.tvalues.round(2).to_dict()
            {'(Intercept)': 36.84, 'Days': 6.77}
        """
        return (self.params / self.bse).rename("tvalues")

    @property
    def vcov(self) -> pd.DataFrame:
        """Covariance matrix of the fixed effects, sigma2 (X' V0^-1 X)^-1.

        Examples:
            >>> fit.vcov.round(2)
                         (Intercept)  Days
            (Intercept)        46.57 -1.45
            Days               -1.45  2.39
        """
        return pd.DataFrame(self.vcov_array, self._fixed_index, self._fixed_index)

    # Variance parameters

    @cached_property
    def variance_components(self) -> pd.DataFrame:
        """One row per random effect, the residual last: variance, SD, log-variance and its SE.

        A variance of zero has log-variance -inf and SE NaN; the other SEs are given it.

        Examples:
            >>> fit.variance_components.round(2)
                  group         term  variance     sd  log_variance  log_variance_se
            0   Subject  (Intercept)    612.09  24.74          6.42             0.47
            1   Subject         Days     35.07   5.92          3.56             0.42
            2  Residual     Residual    654.94  25.59          6.48             0.12
        """
        parts = [self._of_block(k) for k in range(len(self.groupings))]
        if self.residual is None or not self.residual.block.log_variances:
            last = [[(RESIDUAL, RESIDUAL)], [self.sigma**2], self.parameters[-1:]]
            parts.append((*last, np.sqrt(np.diagonal(self.parameters_vcov_array))[-1:]))
        else:
            parts.append(self._of_visits())
        labels, *columns = (np.concatenate(part) for part in zip(*parts, strict=True))
        variance, log, error = columns
        return pd.DataFrame(
            {
                "group": labels[:, 0],
                "term": labels[:, 1],
                "variance": variance,
                "sd": np.sqrt(variance),
                "log_variance": log,
                "log_variance_se": error,
            }
        )

    def _of_block(self, k: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, np.ndarray]:
        """Labels, variances, log-variances and their standard errors of a term."""
        block, (group, effects) = self.covariance.blocks[k], self.groups[k]
        labels, of = block.variance_labels(effects), list(block.of_effects)
        first = [of.index(j) for j in range(len(labels))]
        variance = np.diagonal(self.cov_re_arrays[k])[first]
        start, count = self.covariance.starts[k], block.log_variances
        own = slice(start, start + count)
        logs, error = self.parameters[own], np.sqrt(np.diagonal(self.parameters_vcov_array))[own]
        if count != len(labels) or not block.of_variances:  # they are no parameters
            with np.errstate(divide="ignore"):
                logs = np.log(variance)
            error = self._errors_of_logs(k)[first]
        return [(group, label) for label in labels], variance, logs, error

    def _errors_of_logs(self, k: int) -> np.ndarray:
        """Standard errors of the log-variances of a term's effects, where these are no parameters:
        by the delta method."""
        covariance, block = self.covariance, self.covariance.blocks[k]
        own = np.arange(covariance.starts[k], covariance.starts[k + 1])
        finite = covariance.finite(self.parameters)
        entries = natural.places(block.size).diagonal()
        none = np.zeros(block.size * (block.size + 1) // 2)
        slope, _ = block.in_scale(finite[own], finite[-1], none)
        omega = block.natural(finite[own], finite[-1])[entries]
        places = np.append(own, len(finite) - 1)
        free = np.isfinite(self.parameters[places])
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.asarray(slope)[entries] / np.asarray(omega)[:, None]
        slope[:, -1] += 1.0
        vcov = self.parameters_vcov_array[np.ix_(places, places)]
        vcov = np.where(free[:, None] & free, vcov, 0.0)
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.einsum("ai,ij,aj->a", slope, vcov, slope))

    def _of_visits(self) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, np.ndarray]:
        """The same of the residuals; sigma2, the last of the parameters, is the first visit's."""
        assert self.residual is not None
        block = self.residual.block
        start = self.covariance.starts[-2]
        places = np.append(len(self.parameters) - 1, np.arange(start, start + block.log_variances))
        names = block.variance_labels(self.residual.effects)
        error = np.sqrt(np.diagonal(self.parameters_vcov_array))[places]
        logs = self.parameters[places]
        return [(RESIDUAL, name) for name in names], np.exp(logs), logs, error

    @property
    def variances(self) -> pd.Series:
        """Variances by group and term, the residual's last.

        Examples:
            >>> fit.variances.round(1)
            group     term
            Subject   (Intercept)    612.1
                      Days            35.1
            Residual  Residual       654.9
            Name: variance, dtype: float64
        """
        return self._by_effect("variance")

    @property
    def log_variances(self) -> pd.Series:
        """Log-variances by group and term, the residual's last; -inf for a variance of zero.

        Examples:
            >>> fit.log_variances.round(2).tolist()
            [6.42, 3.56, 6.48]
        """
        return self._by_effect("log_variance")

    @property
    def log_variance_se(self) -> pd.Series:
        """Asymptotic standard errors of the log-variances; NaN on the boundary.

        Examples:
            >>> fit.log_variance_se.round(2).tolist()
            [0.47, 0.42, 0.12]
        """
        return self._by_effect("log_variance_se")

    @property
    def correlations(self) -> pd.DataFrame:
        """Correlations of random effects: columns group, term1, term2, correlation.

        Examples:
            >>> fit.correlations.round(2)
                 group        term1 term2  correlation
            0  Subject  (Intercept)  Days         0.07
        """
        frame = pd.DataFrame(correlation_labels(self.groups), columns=["group", "term1", "term2"])
        return frame.assign(correlation=correlations_of(self.cov_re_arrays))

    @property
    def residual_cov(self) -> pd.DataFrame:
        """Covariance matrix of the residuals of one subject's visits.

        Raises:
            DataError: residuals are independent.

        Examples:
            >>> children = jaxreml.datasets.load("orthodont")
            >>> visits = jaxreml.fit("distance ~ age", children, residual="us(age | Subject)")
            >>> visits.residual_cov.round(1).to_numpy().tolist()[0]
            [5.9, 3.3, 4.8, 4.0]
        """
        if self.residual is None:
            raise DataError("the residuals are independent: sigma is their standard deviation")
        count = len(self.residual.effects)
        if count > MOST_SHOWN:
            raise DataError(
                f"the residuals have {count:,} different visits, and their covariances make a "
                f"matrix of {count:,} x {count:,}; it is there for up to {MOST_SHOWN:,}. "
                "`variance_parameters` has what it is made of"
            )
        every = np.arange(count)
        return self.residual.frame(self.residual_between(every, every))

    def residual_between(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Covariances (k, l) of residuals of one subject at weight 1, between visits (k,) and (l,),
        as ``frame.residual.places`` counts them."""
        assert self.residual is not None
        return self.sigma**2 * self.residual.relative(self._factors[-1], rows, columns)

    @property
    def residual_corr(self) -> pd.DataFrame:
        """Correlation matrix of the residuals of one subject's visits; errors as `residual_cov`.

        Examples:
            >>> children = jaxreml.datasets.load("orthodont")
            >>> visits = jaxreml.fit("distance ~ age", children, residual="us(age | Subject)")
            >>> visits.residual_corr.round(2).to_numpy().tolist()[0]
            [1.0, 0.63, 0.71, 0.6]
        """
        matrix = self.residual_cov
        sds = np.sqrt(np.diagonal(matrix))
        return matrix / np.outer(sds, sds)

    @property
    def cov_re(self) -> pd.DataFrame:
        """Covariance matrix of the random effects of one level of every term, block-diagonal.

        Examples:
            >>> fit.cov_re.round(1)
            group                   Subject
            term                (Intercept)  Days
            group   term
            Subject (Intercept)       612.1   9.6
                    Days                9.6  35.1
        """
        labels = variance_labels(self.groups)[:-1]
        index = pd.MultiIndex.from_arrays(
            [[label[k] for label in labels] for k in range(2)], names=["group", "term"]
        )
        matrix = block_diag(*self.cov_re_arrays) if labels else np.zeros((0, 0))
        return pd.DataFrame(matrix, index, index)

    @property
    def random_effects(self) -> dict[str, pd.DataFrame]:
        """Conditional modes per grouping factor: a row per level, a column per effect.

        Examples:
            >>> fit.random_effects["Subject"].round(1).head(2)
                     (Intercept)  Days
            Subject
            308              2.3   9.2
            309            -40.4  -8.6
        """
        return self._by_level([grouping.modes for grouping in self.groupings])

    @property
    def random_effects_se(self) -> dict[str, pd.DataFrame]:
        """Conditional standard deviations of `random_effects`, laid out likewise.

        Given the fixed effects and variance parameters, as lme4's ``condVar`` and broom.mixed's
        ``std.error``.

        Examples:
            >>> fit.random_effects_se["Subject"].round(1).head(2)
                     (Intercept)  Days
            Subject
            308             12.1   2.3
            309             12.1   2.3
        """
        variances = [np.einsum("jaa->ja", grouping.modes_vcov) for grouping in self.groupings]
        return self._by_level([np.sqrt(part) for part in variances])

    def _by_level(self, values: list[np.ndarray]) -> dict[str, pd.DataFrame]:
        """Frames of (levels, effects) arrays, one per grouping factor."""
        levels = [pd.Index(grouping.levels, name=grouping.name) for grouping in self.groupings]
        return frames_by_group(self.groups, levels, values)

    # Fit statistics

    @property
    def llf(self) -> float:
        """Log-likelihood, restricted under REML.

        Examples:
            >>> round(fit.llf, 2)
            -871.81
        """
        return -self.criterion / 2

    @property
    def dof(self) -> int:
        """Parameters counted by `aic` and `bic`: fixed effects, variance parameters, residual.

        Examples:
            >>> fit.dof, fit.df_resid
            (6, 174)
        """
        return len(self.beta) + len(self.parameters)

    @property
    def df_resid(self) -> int:
        """Observations less `dof`.

        Examples:
            >>> fit.nobs - fit.dof == fit.df_resid
            True
        """
        return self.nobs - self.dof

    @property
    def aic(self) -> float:
        """Akaike's criterion, of the restricted likelihood under REML, as lme4's.

        Examples:
            >>> round(fit.aic, 1)
            1755.6
        """
        return self.criterion + 2 * self.dof

    @property
    def bic(self) -> float:
        """Schwarz's criterion with log(nobs), of the restricted likelihood under REML as lme4's.

        Examples:
            >>> round(fit.bic, 1)
            1774.8
        """
        return self.criterion + float(np.log(self.nobs)) * self.dof

    @cached_property
    def nobs(self) -> int:
        """Rows used.

        Examples:
            >>> fit.nobs
            180
        """
        return len(self.y)

    @property
    def ngroups(self) -> dict[str, int]:
        """Levels of each grouping factor that have rows, the subjects of ``residual=`` among them.

        Examples:
            >>> fit.ngroups
            {'Subject': 18}
        """
        found = {
            own.name: len(own.levels) if own.n_seen is None else own.n_seen
            for own in self.groupings
        }
        if self.residual is not None and self.residual.words.subject is not None:
            found.setdefault(self.residual.words.subject, len(self.residual.subjects))
        return found

    @property
    def converged(self) -> bool:
        """Whether an optimum was found and certified.

        Examples:
            >>> fit.converged
            True
        """
        return self.status == Status.CONVERGED

    @property
    def message(self) -> str:
        """How the fit ended, in words.

        Examples:
            >>> fit.message.split(":")[0]
            'converged'
        """
        sentence = Status(self.status).sentence
        if not self.converged:
            return sentence
        if self.optimality:
            sentence += f"; {self.optimality}"
        if self.is_singular:
            sentence += "; singular: " + "; ".join(self._boundary)
        if np.isnan(np.diagonal(self.parameters_vcov_array)[np.isfinite(self.parameters)]).any():
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

    def require_likelihood(self, purpose: str) -> None:
        """Raise DataError if the estimates are not those of the likelihood alone.

        Args:
            purpose: what needs it, after "cannot".
        """
        if self.penalty:
            raise DataError(
                f"cannot {purpose}: the fit has a penalty ({self.penalty}), and this is of the "
                "likelihood alone; fit without penalty="
            )

    @cached_property
    def residual_sds(self) -> np.ndarray:
        """(n,), standard deviations of the residuals at weight 1."""
        if self.residual is None or not self.residual.block.log_variances:
            return np.full(self.nobs, self.sigma)
        sds = np.sqrt(np.diagonal(self.residual_cov.to_numpy()))
        assert self.frame.residual is not None
        return sds[self.frame.residual.places]

    def require_independent(self, purpose: str) -> None:
        """Raise DataError if residuals are correlated or of unequal variances by ``residual=``.

        Args:
            purpose: what needs it, after "cannot".
        """
        if self.residual is not None:
            raise DataError(
                f"cannot {purpose} of a fit with residual={self.residual.text!r}: this is there "
                "for independent residuals only, so far"
            )

    def require_independent_levels(self, purpose: str) -> None:
        """Raise DataError if the levels of a grouping factor are correlated by ``kernels=``.

        Args:
            purpose: what needs it, after "cannot".
        """
        if self.kernels is not None:
            raise DataError(
                f"cannot {purpose} of a fit with kernels for {', '.join(map(repr, self.kernels))}: "
                "this is there for independent levels only"
            )

    # Rows

    @property
    def fittedvalues(self) -> pd.Series:
        """X beta + Z b + offset, in the labels of the rows used.

        Examples:
            >>> fit.fittedvalues.round(1).head(2).tolist()
            [253.7, 273.3]
        """
        return pd.Series(self.fitted, self.table.index, name="fittedvalues")

    @property
    def resid(self) -> pd.Series:
        """Response less fitted values.

        Examples:
            >>> fit.resid.round(1).head(2).tolist()
            [-4.1, -14.6]
        """
        return pd.Series(self.y - self.fitted, self.table.index, name="resid")

    @property
    def prior_weights(self) -> np.ndarray:
        """(n,), ones where the fit has none.

        Examples:
            >>> fit.prior_weights[:3].tolist()
            [1.0, 1.0, 1.0]
        """
        return np.ones(self.nobs) if self.weights is None else self.weights

    @cached_property
    def henderson(self) -> Henderson:
        """What the variances of x'beta + z'b are made of; see `effects.row_variances`."""
        return henderson(self.theta, self.design)

    def _by_effect(self, column: str) -> pd.Series:
        components = self.variance_components
        labels = [components["group"], components["term"]]
        index = pd.MultiIndex.from_arrays(labels, names=["group", "term"])
        return pd.Series(components[column].to_numpy(), index, name=column)

    @property
    def groups(self) -> Groups:
        """Per random term its grouping factor and its effects."""
        return tuple((grouping.name, grouping.effects) for grouping in self.groupings)

    @property
    def labels(self) -> Groups:
        """Per block of `covariance` its grouping factor, or `RESIDUAL`, and its effects."""
        own = () if self.residual is None else ((RESIDUAL, self.residual.effects),)
        return (*self.groups, *own)

    @cached_property
    def layout(self) -> Layout:
        """What `parameters` are of."""
        return Layout(tuple(name for name, _ in self.labels), self.covariance)

    @property
    def _fixed_index(self) -> pd.Index:
        return pd.Index(self.fixed_names)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(grouping.effects) for grouping in self.groupings)

    @cached_property
    def covariance(self) -> Covariance:
        """The map from `parameters` to the covariances of the terms, the residuals' last."""
        own = () if self.residual is None else (self.residual.block,)
        return Covariance((*self._blocks, *own))

    @cached_property
    def _blocks(self) -> tuple[Block, ...]:
        """The covariances of the terms."""
        return tuple(own.covariance.block(len(own.effects), self.context) for own in self.groupings)

    @cached_property
    def _factors(self) -> list[np.ndarray]:
        """Relative Cholesky factor of each term's effects, with exact zeros where singular, and of
        the residuals of a subject where they have one."""
        return unpack(self.theta, self.covariance.sizes)

    @cached_property
    def cov_re_arrays(self) -> list[np.ndarray]:
        """Covariance matrix of each term's effects."""
        factors = self._factors[: len(self.groupings)]
        return [self.sigma**2 * factor @ factor.T for factor in factors]

    @property
    def _boundary(self) -> list[str]:
        """What is on the boundary of the parameter space, in words."""
        found = []
        parts = zip(self.groupings, self._factors, self.covariance.blocks, strict=False)
        for k, (grouping, factor, block) in enumerate(parts):
            own = self.parameters[slice(*self.covariance.starts[k : k + 2])]
            words = block.boundary(grouping.effects, factor, own)
            found += [text.format(group=grouping.name) for text in words]
        return found


Fit = TypeVar("Fit", bound=FittedModel)
