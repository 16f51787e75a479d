"""Likelihood-ratio tests whose null distribution is simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.likelihood.ratio import ROUNDING
from jaxreml.inference.resampling.simulation import check_count, of_fit
from jaxreml.many.numbers import require_some
from jaxreml.many.one_by_one import refitter
from jaxreml.status import Status

LOWER = 1e-6  # per unit: by how much a larger model's criterion may be higher, as optima are found
OUTSIDE = 1e-8  # share of columns outside the span of others that is rounding


@dataclass(frozen=True, eq=False, repr=False)
class NullDistribution:
    """Likelihood-ratio statistics of responses drawn from the smaller of two models.

    Attributes:
        statistic: of the data.
        draws: (nsim - n_failed,), of the responses for which both models have an optimum.
        nsim: responses drawn.
        n_failed: those left out.
        share_singular: of the draws, refits of the (smaller, larger) model on the boundary.
    """

    statistic: float
    draws: np.ndarray
    nsim: int
    n_failed: int
    share_singular: tuple[float, float]

    @property
    def p_value(self) -> float:
        """(1 + draws at least as large as the statistic) / (1 + draws)."""
        return float(1 + np.sum(self.draws >= self.statistic)) / (1 + self.draws.size)

    @property
    def p_value_se(self) -> float:
        """Monte Carlo standard error of `p_value`."""
        p = self.p_value
        return float(np.sqrt(p * (1 - p) / (1 + self.draws.size)))

    def __repr__(self) -> str:
        return (
            f"<NullDistribution of a likelihood ratio of {self.statistic:.4g}, {self.draws.size} "
            f"draws, p = {self.p_value:.3g}>"
        )


def null_distribution(
    smaller: FittedModel, larger: FittedModel, nsim: int = 1000, seed: int = 0
) -> NullDistribution:
    """The distribution of a likelihood-ratio statistic if the smaller model holds.

    Responses are drawn from the smaller fit and both models are fitted to each, as
    ``pbkrtest::PBmodcomp`` (Halekoh and Hojsgaard 2014, J. Stat. Softw. 59(9)). No asymptotics:
    right for variances on the boundary too.

    Args:
        smaller, larger: fits of nested models to the same rows by the same method, ML unless they
            have the same fixed effects.
        nsim: responses to draw.
        seed: of the random numbers.

    Raises:
        DataError: a fit did not converge, different rows or responses, or no refit of both
            converged.
        ValueError: methods that differ, REML with different fixed effects; nsim or seed out of
            range.
    """
    check_count(nsim, seed)
    for fit in (smaller, larger):
        fit.require_optimum("compare")
        fit.require_likelihood("compare")
    _require_comparable(smaller, larger)
    people = of_fit(smaller)
    engines = [
        refitter(fit.frame, fit.method, nsim, (fit.theta, fit.parameters))
        for fit in (smaller, larger)
    ]
    draws, statuses = [], []
    singular = np.zeros(2)
    for block in people.blocks(nsim, seed):
        pair = [engine.fit(block) for engine in engines]
        status = np.where(pair[0].status == Status.CONVERGED, pair[1].status, pair[0].status)
        good = status == Status.CONVERGED
        singular += [fits.is_singular[good].sum() for fits in pair]
        draws.append(pair[0].criterion[good] - pair[1].criterion[good])
        statuses.append(status)
    status = np.concatenate(statuses)
    require_some(status)
    values = _cleaned(np.concatenate(draws), smaller.criterion)
    small, large = singular / values.size
    return NullDistribution(
        statistic=float(_cleaned(smaller.criterion - larger.criterion, smaller.criterion)),
        draws=values,
        nsim=nsim,
        n_failed=nsim - values.size,
        share_singular=(float(small), float(large)),
    )


def _cleaned(statistics: np.ndarray | float, criterion: float) -> np.ndarray:
    """Rounding error around zero, where a variance of the larger model is zero, as zero."""
    noise = ROUNDING * (1 + abs(criterion))
    return np.where(np.abs(statistics) < noise, 0.0, statistics)


def _require_comparable(smaller: FittedModel, larger: FittedModel) -> None:
    same_rows = smaller.nobs == larger.nobs and np.array_equal(smaller.y, larger.y)
    if not same_rows:
        raise DataError(
            f"the fits are of different data ({smaller.nobs} and {larger.nobs} rows, or other "
            "responses): fit both to the same rows"
        )
    for name in ("weights", "offset"):
        first, second = getattr(smaller, name), getattr(larger, name)
        if (first is None) != (second is None) or not np.array_equal(
            np.zeros(0) if first is None else first, np.zeros(0) if second is None else second
        ):
            raise DataError(f"the fits have different {name}")
    if smaller.method != larger.method:
        raise ValueError("one fit is by REML and one by ML: fit both by the same method")
    if smaller.method == "REML" and not _same_span(smaller.frame.X, larger.frame.X):
        raise ValueError(
            "restricted likelihoods of different fixed effects cannot be compared: fit both models "
            'with method="ML"'
        )
    if larger.criterion > smaller.criterion + LOWER * (1 + abs(smaller.criterion)):
        raise ValueError(
            f"the likelihood of {larger.formula!r} is lower than that of {smaller.formula!r}: the "
            "models are not nested in this order"
        )


def _same_span(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape:
        return False
    basis = np.linalg.qr(first)[0]
    rest = second - basis @ (basis.T @ second)
    return bool(np.linalg.norm(rest) <= OUTSIDE * np.linalg.norm(second))


def bootstrap_lrt(
    fit0: FittedModel, fit1: FittedModel, nsim: int = 1000, seed: int = 0
) -> NullDistribution:
    """Bootstrap likelihood-ratio test of two nested fits in either order; `null_distribution`."""
    smaller, larger = sorted((fit0, fit1), key=lambda fit: fit.dof)
    return null_distribution(smaller, larger, nsim, seed)
