"""The parametric bootstrap: responses drawn from a fit, refitted in batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.linearised import scale_of
from jaxreml.inference.resampling import intervals
from jaxreml.inference.resampling.likelihood_ratio import NullDistribution as NullDistribution
from jaxreml.inference.resampling.likelihood_ratio import null_distribution as null_distribution
from jaxreml.inference.resampling.simulation import check_count, of_fit
from jaxreml.inference.resampling.statistics import (
    TOGETHER,
    Statistic,
    default,
    evaluate,
    fits_of,
    slopes,
)
from jaxreml.many.numbers import Fits, count_failures, require_some
from jaxreml.many.one_by_one import refitter
from jaxreml.status import Status
from jaxreml.typeset.frames import frame_table
from jaxreml.typeset.table import Table, Tabulated

METHODS = ("percentile", "basic", "bca", "studentized")
SCORES = 10_000  # most draws that an acceleration is made from


@dataclass(frozen=True, eq=False, repr=False)
class Bootstrap(Tabulated):
    """Statistics of responses drawn from a fit.

    Attributes:
        fit: what they were drawn from.
        statistic: g(beta, components); None for the default statistics.
        estimate: (k,), statistics of the fit.
        draws: (nsim - n_failed, k), those of the refits that converged, in the order drawn. A
            log-variance is -inf where its variance is zero, a correlation NaN.
        errors: draws of their standard errors, of SDs on the log scale and of correlations on
            Fisher's z scale; None for a user's statistic.
        nsim: responses drawn.
        seed: as given.
        failures: how the refits without an optimum ended, with their numbers.
        share_singular: of the refits that converged, those with a variance of zero or a
            correlation of +-1.

    Examples:
        >>> draws.draws.shape, draws.n_failed, len(draws.estimate) == len(draws.std_error)
        ((200, 9), 0, True)
    """

    fit: FittedModel
    statistic: Statistic | None
    estimate: pd.Series
    draws: pd.DataFrame
    errors: pd.DataFrame | None
    nsim: int
    seed: int
    failures: pd.Series
    share_singular: float

    @property
    def n_failed(self) -> int:
        """Refits without an optimum, left out of `draws`.

        Examples:
            >>> draws.n_failed
            0
        """
        return self.nsim - len(self.draws)

    @property
    def bias(self) -> pd.Series:
        """Mean of the draws less the estimate; undefined draws (NaN) left out.

        Examples:
            >>> draws.bias[["beta[Days]", "sigma"]].round(1).tolist()
            [0.1, -0.1]
        """
        return (self.draws.mean() - self.estimate).rename("bias")

    @property
    def std_error(self) -> pd.Series:
        """Standard deviation of the draws, undefined ones (NaN) left out; NaN if some are
        infinite.

        Examples:
            >>> draws.std_error["beta[Days]"].round(1).item()
            1.5
        """
        with np.errstate(invalid="ignore"):
            return self.draws.std().rename("std_error")

    def to_frame(self) -> pd.DataFrame:
        """One row per statistic: estimate, bias, std_error and n_defined, the draws that
        define it.

        Examples:
            >>> draws.to_frame().loc[["beta[Days]", "sigma"]].round(0)
                        estimate  bias  std_error  n_defined
            beta[Days]      10.0   0.0        2.0        200
            sigma           26.0  -0.0        1.0        200
        """
        defined = self.draws.notna().sum().rename("n_defined")
        return pd.concat([self.estimate, self.bias, self.std_error, defined], axis=1)

    def to_xarray(self) -> Any:
        """The draws as an xarray Dataset: a variable per statistic, over ``chain`` (one) and
        ``draw``, as ArviZ has them; the fit's value is the variable's attribute ``estimate``.

        Raises:
            DataError: xarray is not installed.

        Examples:
            >>> days = draws.to_xarray()["beta[Days]"]
            >>> dict(days.sizes), round(days.attrs["estimate"], 2)
            ({'chain': 1, 'draw': 200}, 10.47)
        """
        try:
            import xarray
        except ImportError:
            raise DataError("to_xarray needs xarray: pip install 'jaxreml[xarray]'") from None
        dimensions, own = ("chain", "draw"), self.estimate.to_numpy(float)
        variables = {
            str(name): (
                dimensions,
                self.draws.iloc[:, [k]].to_numpy().T,
                {"estimate": float(own[k])},
            )
            for k, name in enumerate(self.draws.columns)
        }
        attributes = {
            "formula": self.fit.formula,
            "method": self.fit.method,
            "nsim": self.nsim,
            "seed": self.seed,
            "n_failed": self.n_failed,
        }
        coordinates = {"chain": [0], "draw": np.arange(len(self.draws))}
        return xarray.Dataset(variables, coordinates, attributes)

    def to_inference_data(self) -> Any:
        """The draws for ArviZ, in the group ``posterior``, where its summaries and plots look.

        They are a sampling distribution, not a posterior: what ArviZ calls an HDI is an interval of
        the draws, and diagnostics of chains say nothing about independent draws.

        Returns:
            An ``InferenceData``; an xarray ``DataTree`` with ArviZ 1, which works on these.

        Raises:
            DataError: ArviZ is not installed.

        Examples:
            >>> found = draws.to_inference_data()
            >>> found.posterior["sigma"].shape
            (1, 200)
        """
        try:
            import arviz
        except ImportError:
            raise DataError("to_inference_data needs ArviZ: pip install arviz") from None
        draws = self.to_xarray()
        if hasattr(arviz, "InferenceData"):
            return arviz.InferenceData(posterior=draws)
        import xarray

        return xarray.DataTree.from_dict({"posterior": draws})

    def conf_int(self, conf_level: float = 0.95, method: str = "percentile") -> pd.DataFrame:
        """Confidence intervals of all statistics.

        Args:
            conf_level: confidence level.
            method: "percentile"; "basic", reflected at the estimate; "bca", bias-corrected and
                accelerated (see `acceleration`); "studentized", from the draws of (statistic -
                estimate) / standard error, for SDs on the log scale and for correlations on
                Fisher's z scale (Davison and Hinkley 1997, ch. 5; Efron and Tibshirani 1993, An
                Introduction to the Bootstrap, ch. 12-14). A draw on the boundary has no standard
                error and counts as infinitely far from the estimate.

        Returns:
            Rows as `estimate`; columns lower, upper, and reason, why they are NaN or empty.

        Raises:
            ValueError: an unknown method, a level for which the draws are too few, "studentized"
                with a user's statistic.

        Examples:
            >>> limits = draws.conf_int(0.9, method="studentized")
            >>> limits.loc["sigma", ["lower", "upper"]].round(0).tolist()
            [23.0, 28.0]
        """
        if method not in METHODS:
            raise ValueError(f"method must be among {', '.join(METHODS)}, not {method!r}")
        check_conf_level(conf_level)
        if (len(self.draws) + 1) * (1 - conf_level) / 2 < 1:
            raise ValueError(
                f"{len(self.draws)} draws are too few for a level of {conf_level}: at least "
                f"{int(np.ceil(2 / (1 - conf_level) - 1 - 1e-9))} are needed"
            )
        if method == "studentized" and self.errors is None:
            raise ValueError(
                "studentized intervals need a standard error of the statistic in every draw, which "
                'a function g(beta, components) does not give; use "bca"'
            )
        rows = [self._interval(k, conf_level, method) for k in range(len(self.estimate))]
        return pd.DataFrame(rows, self.estimate.index, ["lower", "upper", "reason"])

    def _interval(self, k: int, conf_level: float, method: str) -> tuple[float, float, str]:
        estimate = float(self.estimate.iloc[k])
        draws = self.draws.iloc[:, k].to_numpy()
        defined = ~np.isnan(draws)
        draws = draws[defined]
        reason = ""
        if np.isnan(estimate):
            reason = "the statistic of the fit is not defined"
        elif draws.size < len(self.draws) / 2:
            reason = "the statistic is not defined in most draws"
        elif method != "percentile" and np.isinf(estimate):
            reason = "the estimate is on the boundary; only percentile intervals are defined there"
        if reason:
            return np.nan, np.nan, reason
        if method == "percentile":
            limits = intervals.percentile(draws, conf_level)
        elif method == "basic":
            limits = intervals.basic(draws, estimate, conf_level)
        elif method == "bca":
            acceleration = self.acceleration.iloc[k]
            if np.isnan(acceleration):
                return np.nan, np.nan, "the acceleration is not defined at this fit"
            tails = intervals.bca_probabilities(draws, estimate, acceleration, conf_level)
            limits = intervals.order_statistics(draws, tails)
            if np.isnan(limits).any():
                return np.nan, np.nan, _missing(tails)
        else:
            scale = scale_of(default(self.fit).scales[k])
            forward, backward = scale.forward, scale.inverse
            errors = self.errors.iloc[defined, k].to_numpy()  # pyright: ignore
            error = float(self._own_errors.iloc[k])
            if not np.isfinite(error):
                return np.nan, np.nan, "the estimate has no standard error"
            with np.errstate(divide="ignore"):
                limits = intervals.studentized(
                    forward(draws), errors, forward(estimate), error, conf_level
                )
            limits = backward(limits)
        if np.isnan(limits).any():
            return np.nan, np.nan, "the limits are beyond the draws: more are needed"
        return float(limits[0]), float(limits[1]), ""

    @cached_property
    def _own_errors(self) -> pd.Series:
        values = default(self.fit).errors(fits_of(self.fit), self.fit)[0]
        return pd.Series(values, self.estimate.index)

    @cached_property
    def acceleration(self) -> pd.Series:
        """Efron's acceleration of every statistic, for "bca" intervals.

        A sixth of the skewness of the score along the least favourable direction, at the fit, over
        responses drawn from it (Davison and Hinkley 1997, eq. 5.23; Efron 1987): of the
        statistic's derivatives times the inverse information times the score. The fixed effects'
        part of it is normal; that of the variance parameters is taken from up to 10,000 draws.
        Parameters on the boundary are held there.

        Examples:
            >>> draws.acceleration[["beta[Days]", "sigma"]].round(2).tolist()
            [0.0, 0.03]
        """
        fit, people = self.fit, of_fit(self.fit)
        params = components.finite(fit)
        free = np.isfinite(fit.parameters)
        spread = np.where(np.outer(free, free), fit.parameters_vcov_array, 0.0)
        engine = refitter(people.frame, fit.method)
        of_draws = [
            engine.gradients(params, block[:, start : start + TOGETHER])
            for block in people.blocks(min(self.nsim, SCORES), self.seed)
            for start in range(0, block.shape[1], TOGETHER)
        ]
        scores = -np.concatenate(of_draws) / 2
        of_beta, of_parameters = slopes(self.statistic or default(fit), fit)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = (scores - scores.mean(axis=0)) @ spread @ np.where(free, of_parameters, 0.0).T
            variance = np.mean(parts**2, axis=0)
            variance = variance + np.einsum("ki,ij,kj->k", of_beta, fit.vcov_array, of_beta)
            values = np.mean(parts**3, axis=0) / variance**1.5 / 6
        return pd.Series(values, self.estimate.index, name="acceleration")

    def as_table(
        self, conf_level: float = 0.95, method: str = "percentile", **options: Any
    ) -> Table:
        """Estimates, bias, standard errors and intervals as a table for a paper.

        Args:
            conf_level, method: of the intervals, as for `conf_int`.
            options: digits, rename, caption, label and note, as for `jaxreml.frame_table`.

        Examples:
            >>> table = draws.as_table(method="basic")
            >>> table
            <Table of 9 rows and 5 columns: , Estimate, Bias, SE, 95% CI>
        """
        limits = self.conf_int(conf_level, method)
        frame = pd.concat([self.to_frame().drop(columns="n_defined"), limits], axis=1)
        made = frame_table(frame, conf_level=conf_level, **options)
        return replace(made, notes=(f"{self._in_words()}; {method} intervals", *made.notes))

    def _in_words(self) -> str:
        left_out = f", {self.n_failed} left out for want of an optimum" if self.n_failed else ""
        return (
            f"Parametric bootstrap of {self.fit.formula}, {self.fit.method}, {self.nsim} draws"
            f"{left_out}, {self.share_singular:.1%} singular"
        )

    def _repr_html_(self) -> str:
        made = frame_table(self.to_frame().rename(columns={"n_defined": "Draws"}))
        return replace(made, notes=(self._in_words(), "Intervals by conf_int()")).to_html()

    def __repr__(self) -> str:
        return (
            f"<Bootstrap of {self.fit.formula!r}, {self.nsim} draws, {self.n_failed} failed, "
            f"{self.share_singular:.1%} singular>"
        )


def _missing(tails: np.ndarray) -> str:
    """Why quantiles at probabilities `tails` are not to be had."""
    extreme = min(float(np.min(tails)), 1 - float(np.max(tails)))
    if not extreme > 0:
        return "the bias and the acceleration are too strong for limits at this level"
    return f"the limits are quantiles beyond the draws: about {1 / extreme:,.0f} are needed"


def bootstrap(
    fit: FittedModel,
    nsim: int = 10_000,
    function: Statistic | None = None,
    seed: int = 0,
    *,
    n: int | None = None,
) -> Bootstrap:
    """Draw responses from a fit, with new random effects, and refit the model to each.

    Args:
        fit: a fit that converged.
        nsim: number of responses; they are those of ``fit.simulate(nsim, seed)``.
        function: a JAX function g(beta, components), mapped over the refits (`components`): a
            scalar, an array or a dict of them. All fixed effects, ``sigma``, SDs, correlations and
            log-variances if left out.
        seed: of the random numbers.
        n: `nsim`, by its former name.

    Returns:
        The draws; refits without an optimum are left out and counted.

    Raises:
        DataError: the fit did not converge, or no refit did; a statistic that asks for what the
            model does not have.
        ValueError: nsim or seed out of range, or a function that is no statistic.

    Examples:
        >>> draws = fit.bootstrap(nsim=500, seed=1)
        >>> draws
        <Bootstrap of 'Reaction ~ Days + (Days | Subject)', 500 draws, 0 failed, 2.8% ...
        >>> draws.conf_int(method="bca").loc[["beta[Days]", "sigma"], ["lower", "upper"]].round(0)
                    lower  upper
        beta[Days]    7.0   13.0
        sigma        23.0   29.0
    """
    nsim = nsim if n is None else n
    check_count(nsim, seed)
    people = of_fit(fit)
    statistic = function or default(fit)
    names, own = evaluate(statistic, fits_of(fit), fit.layout)
    if function is not None:
        components.require_entries(function, fit)
    fit.require_likelihood("bootstrap")
    engine = refitter(people.frame, fit.method, nsim, (fit.theta, fit.parameters))
    draws, errors, statuses, singular = [], [], [], 0
    for block in people.blocks(nsim, seed):
        fits = engine.fit(block)
        statuses.append(fits.status)
        good = _converged(fits)
        singular += int(good.is_singular.sum())
        draws.append(evaluate(statistic, good, fit.layout)[1])
        if function is None:
            errors.append(default(fit).errors(good, fit))
    status = np.concatenate(statuses)
    values = np.concatenate(draws)
    require_some(status)
    index = pd.Index(names)
    return Bootstrap(
        fit=fit,
        statistic=function,
        estimate=pd.Series(own[0], index, name="estimate"),
        draws=pd.DataFrame(values, columns=index),
        errors=pd.DataFrame(np.concatenate(errors), columns=index) if errors else None,
        nsim=nsim,
        seed=seed,
        failures=pd.Series(count_failures(status), name="refits", dtype=int),
        share_singular=singular / len(values),
    )


def _converged(fits: Fits) -> Fits:
    good = fits.status == Status.CONVERGED
    return Fits(*(None if part is None else part[good] for part in fits))  # pyright: ignore
