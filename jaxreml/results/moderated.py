"""`ModeratedResults`: the tests of a batch with moderated residual variances."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.outputs import in_library
from jaxreml.errors import DataError
from jaxreml.inference.batches import moderation
from jaxreml.many.fitted import FittedBatch
from jaxreml.results import batch_summaries, batch_tables, displays
from jaxreml.results.made_by import made_by
from jaxreml.status import Status


@made_by("`BatchResults.moderated`")
@dataclass(frozen=True, eq=False, repr=False)
class ModeratedResults(FittedBatch):
    """Moderated tests of many responses, as `BatchResults.moderated` makes them.

    `bse`, `tvalues`, `df`, `pvalues`, `pvalues_adjusted` and `contrasts` are moderated; all else is
    that of the fits.

    Attributes:
        model, responses, fits: as in `FittedBatch`; standard errors and degrees of freedom of
            coefficients and contrasts are moderated.
        prior_df: prior degrees of freedom of each response; infinite where residual variances
            differ no more than chance has it.
        prior_variance: the residual variance that each is drawn towards.
        posterior_variance: the moderated residual variance.
        trend: the covariate of the prior variance, or None.

    Examples:
        >>> moderated = results.moderated()
        >>> moderated
        <ModeratedResults '~ Days + (1 | Subject)', REML, 40 responses, 10.07 prior ...
        >>> results.bse["Days"].round(4).head(3).tolist()
        [0.0288, 0.0234, 0.0281]
        >>> moderated.bse["Days"].round(4).head(3).tolist()
        [0.0286, 0.0236, 0.028]
    """

    _: KW_ONLY
    prior_df: pd.Series
    prior_variance: pd.Series
    posterior_variance: pd.Series
    trend: pd.Series | None = None

    top_table = in_library(batch_summaries.top_table)
    tidy = in_library(batch_tables.tidy)
    to_csv = batch_summaries.to_csv

    def _repr_html_(self) -> str:
        return displays.of_batch(self, self._prior())

    @in_library
    def to_frame(self) -> pd.DataFrame:
        """The columns of `BatchResults.to_frame`, and prior_df, prior_variance and
        posterior_variance after residual_df.

        Examples:
            >>> list(moderated.to_frame().columns)[:4]
            ['response', 'nobs', 'n_missing', 'rank']
        """
        frame = batch_tables.to_frame(self)
        place = list(frame.columns).index("residual_df")
        for k, name in enumerate(("prior_df", "prior_variance", "posterior_variance"), 1):
            frame.insert(place + k, name, getattr(self, name).to_numpy())
        return frame

    def summary(self) -> str:
        """`BatchResults.summary`, with what was moderated.

        Examples:
            >>> print(moderated.summary())
            ~ Days + (1 | Subject), REML, structure 'grouped', engine 'numpy'
            40 responses, 40 with an optimum, 0 of them singular
            180 rows
            <BLANKLINE>
            Discoveries at a false discovery rate of 5%, df 'satterthwaite':
                         up  down  tests
            (Intercept)   0     0     40
            Days          5     0     40
            <BLANKLINE>
            Residual variances moderated: prior df 10.07, prior variance 1.039
        """
        return f"{batch_summaries.summary(self)}\n\n{self._prior()}"

    def _prior(self) -> str:
        prior = f"prior df {_range(self.prior_df)}, prior variance {_range(self.prior_variance)}"
        trend = "" if self.trend is None else ", with a trend"
        return f"Residual variances moderated: {prior}{trend}"

    def __repr__(self) -> str:
        known = self.prior_df.dropna()
        df = f"{known.median():.4g}" if len(known) else "no"
        return (
            f"<ModeratedResults {self.model.formula!r}, {self.model.method}, {len(self)} "
            f"responses, {df} prior degrees of freedom>"
        )


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"


def moderated(results: FittedBatch, *, trend: Any = None, robust: bool = False) -> ModeratedResults:
    """Empirical Bayes moderated tests (Smyth 2004), for mixed models as `dream` has them.

    The residual variance of each response, with `residual_df` degrees of freedom, is drawn towards
    a prior that all responses together speak for: posterior_variance is the mean of the two by
    their degrees of freedom. Standard errors change by the root of posterior over residual
    variance, and the prior's degrees of freedom are added to those of each test (Satterthwaite's,
    or what `fit_many` was asked for), without limma's bound by the sum over the responses. Variance
    ratios stay as estimated: the variances of random effects are moderated in proportion. What
    limma's `eBayes` makes of the same variances and degrees of freedom: its `fitFDist` and
    `fitFDistRobustly` up to version 3.60, where degrees of freedom that differ do not weigh in.

    Args:
        results: the fits.
        trend: a covariate with which the prior variance changes, on a natural spline: True for the
            means of the responses, or a number for each, an array in the order of `responses` or a
            Series labelled with them. None for one prior variance.
        robust: whether responses of outlying variance are moderated less (Phipson 2016). With a
            trend it needs ``pip install 'jaxreml[counts]'``.

    Returns:
        The moderated tests. Responses without an optimum stay out and are NaN.

    Raises:
        DataError: fewer than two responses with an optimum; a trend that lacks a response or has
            values that are not finite; results of a version that kept no `residual_df` or `mean`;
            statsmodels is not installed.
        ValueError: a trend of another length.

    Examples:
        >>> moderated = results.moderated()
        >>> moderated.top_table("Days", 3)[["estimate", "df", "p_value", "p_adjusted"]].round(3)
               estimate       df  p_value  p_adjusted
        gene5     0.228  171.075      0.0         0.0
        gene2     0.200  171.075      0.0         0.0
        gene4     0.196  171.075      0.0         0.0
        >>> trended = results.moderated(trend=True, robust=True)
    """
    results.model.require_independent("moderate the residual variances")
    fits = results.fits
    good = np.flatnonzero(fits.status == Status.CONVERGED)
    if np.isnan(fits.residual_df[good]).any():
        raise DataError(
            "these results were written by a version of jaxreml that kept no residual_df: fit again"
        )
    variances, df = fits.sigma[good] ** 2, fits.residual_df[good]
    covariate = _covariate(results, trend, good)
    own = None if covariate is None else covariate[good]
    prior = moderation.fit_prior(variances, df, own, robust=robust)
    posterior = moderation.squeeze(variances, df, prior)

    def whole(values: np.ndarray) -> np.ndarray:
        found = np.full(len(results), np.nan)
        found[good] = values
        return found

    prior_df, factor = whole(prior.df), whole(np.sqrt(posterior / variances))
    changed = fits._replace(
        se=fits.se * factor[:, None],
        df=fits.df + prior_df[:, None],
        contrast_se=fits.contrast_se * factor[:, None],
        contrast_df=fits.contrast_df + prior_df[:, None],
    )

    def series(values: np.ndarray, name: str) -> pd.Series:
        return pd.Series(values, results.responses, name=name)

    held: dict[str, Any] = {own.name: getattr(results, own.name) for own in fields(FittedBatch)}
    held["fits"] = changed
    return ModeratedResults(
        **held,
        prior_df=series(prior_df, "prior_df"),
        prior_variance=series(whole(prior.variance), "prior_variance"),
        posterior_variance=series(whole(posterior), "posterior_variance"),
        trend=None if covariate is None else series(covariate, "trend"),
    )


def _covariate(results: FittedBatch, trend: Any, good: np.ndarray) -> np.ndarray | None:
    """The covariate of all responses, (B,), finite for those with an optimum."""
    if trend is None or trend is False:
        return None
    if trend is True:
        values = results.fits.mean
    elif isinstance(trend, pd.Series) and not isinstance(trend.index, pd.RangeIndex):
        values = trend.reindex(results.responses).to_numpy(float)
    else:
        values = np.asarray(trend, float)
    if values.shape != (len(results),):
        raise ValueError(
            f"trend has shape {values.shape}; give a number for each of {len(results)} responses"
        )
    lost = good[~np.isfinite(values[good])]
    if lost.size:
        raise DataError(
            f"trend has no finite value for {lost.size} responses with an optimum, the first "
            f"{results.responses[lost[0]]!r}"
        )
    return values
