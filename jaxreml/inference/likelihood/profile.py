r"""Profile likelihood: intervals of SDs, correlations, the residual SD and fixed effects.

The profile of a parameter is the criterion (-2 log-likelihood) minimised over all others at each
value v of it, and its signed root is zeta(v) = sign(v - estimate) sqrt(criterion(v) - minimum),
which is standard normal to a good approximation (Bates et al. 2015, J. Stat. Softw. 67(1),
section 5.1). An interval of level c ends where |zeta| is the normal quantile of (1 + c) / 2. That
point is found by Newton's method on zeta itself, whose slope is the criterion's own derivative in
the parameter held over 2 zeta; nothing is interpolated.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from jaxreml.arguments import check_conf_level, is_reml
from jaxreml.errors import ConvergenceWarning, DataError
from jaxreml.inference.likelihood.charts import Parameter, readings
from jaxreml.inference.likelihood.holding import pair
from jaxreml.inference.likelihood.holding import parameters as known_parameters
from jaxreml.inference.likelihood.search import EXACT, MENDINGS, Limit, Search
from jaxreml.typeset.content import Column, Section
from jaxreml.typeset.frames import frame_table
from jaxreml.typeset.table import Table, Tabulated

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

RANGE_LEVEL = 0.99  # a profile covers the intervals of this level at least, as lme4's


class Profile(Tabulated):
    """Profile likelihoods of parameters of a fit; `LMMResults.profile` makes one.

    Attributes:
        parameters: names of the parameters profiled, lme4's.
        method: the criterion of variance parameters, "ML" or "REML"; that of fixed effects is
            ML.
        conf_level: level of the intervals that `frame` covers.

    Examples:
        >>> profile = fit.profile("sigma")
        >>> profile.parameters, profile.method, profile.conf_level
        (('sigma',), 'ML', 0.99)
    """

    def __init__(
        self,
        fit: FittedModel,
        parameters: str | Sequence[str] | None = None,
        conf_level: float = 0.95,
        method: str = "ML",
    ):
        reml = is_reml(method)
        check_conf_level(conf_level)
        fit.require_optimum("profile the likelihood")
        fit.require_likelihood("profile the likelihood")
        self._fit = fit
        self._known = known_parameters(fit)
        self._chosen = _choose(self._known, parameters)
        self.parameters = tuple(own.name for own in self._chosen)
        self.method = method
        self.conf_level = max(conf_level, RANGE_LEVEL)
        by_reml = [own for own in self._chosen if reml and own.kind != "fixed"]
        by_ml = [own for own in self._chosen if own not in by_reml]
        self._searches = [
            Search(fit, self._known, part, of)
            for part, of in ((by_reml, True), (by_ml, False))
            if part
        ]

    def conf_int(self, conf_level: float = 0.95) -> pd.DataFrame:
        """Profile likelihood intervals.

        The lower limit of an SD is 0, and a limit of a correlation -1 or 1, where zeta does not
        reach the quantile before.

        Args:
            conf_level: confidence level.

        Returns:
            A row per parameter, by lme4's names and in its order; columns group (None for fixed
            effects), term, estimate (of the likelihood profiled), lower and upper. NaN, with a
            ConvergenceWarning that says why, where a limit was not found.

        Examples:
            >>> fit.profile("sigma").conf_int(0.9)[["estimate", "lower", "upper"]].round(2)
                       estimate  lower  upper
            parameter
            sigma         25.59   23.3  28.29
        """
        check_conf_level(conf_level)
        limits = self._limits(conf_level)
        estimated = dict(zip(self._known, self._searches[-1].estimates, strict=True))
        for search in self._searches:
            of_search = dict(zip(self._known, search.estimates, strict=True))
            estimated |= {own: of_search[own] for own in search.tracks}
        rows = []
        for own in self._chosen:
            ends = [limits[own, side] for side in (-1, 1)]
            values = [own.value(end.at) for end in ends]
            rows.append((own.group, own.term, estimated[own], *values))
        index = pd.Index(self.parameters, name="parameter")
        return pd.DataFrame(rows, index, ["group", "term", "estimate", "lower", "upper"])

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The points of all profiles, computed when first asked for.

        Returns:
            Columns parameter, value, zeta and criterion (its minimum with the parameter held), and
            one for each parameter of the fit with its value there. Rows of one parameter are
            sorted by value; they reach from one end of the interval of level `conf_level` to the
            other.

        Examples:
            >>> points = fit.profile("sigma").frame
            >>> points[["value", "zeta"]].iloc[[0, -1]].round(2)
                value  zeta
            0   22.15 -2.58
            18  30.03  2.58
        """
        quantile = _quantile(self.conf_level)
        self._limits(self.conf_level, points=True)
        rows = []
        for own in self._chosen:
            search = next(search for search in self._searches if own in search.tracks)
            for point in search.tracks[own].sorted:
                if abs(point.zeta) <= quantile + 2 * EXACT:
                    others = readings(own.values(point.x), self._fit)
                    row = own.name, own.value(point.at), point.zeta, point.criterion
                    rows.append((*row, *others, *point.beta))
        names = [own.name for own in self._known]
        return pd.DataFrame(rows, columns=["parameter", "value", "zeta", "criterion", *names])

    def contour(
        self,
        first: str,
        second: str,
        conf_levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
        points: int = 64,
    ) -> pd.DataFrame:
        """The edges of joint likelihood regions of two parameters, exact at every point.

        Where a parameter reaches its bound inside the region (an SD 0, a correlation +-1), the edge
        goes along the bound, with a smaller deviance.

        Args:
            first, second: names of two of `parameters`.
            conf_levels: of the regions, by chi-squared with two degrees of freedom.
            points: of each edge, to which some are added at its corners on a bound.

        Returns:
            Columns conf_level, one for each parameter, and deviance; the points of an edge in turn,
            the first again at its end. NaN, with a ConvergenceWarning, where one was not found.

        Raises:
            DataError: another name; two correlations of one term, or a correlation and the SD of a
                third effect, which cannot be held together.
            ValueError: the same parameter twice, another level, or fewer than 4 points.

        Examples:
            >>> profile = fit.profile(["(Intercept)", "Days"])
            >>> edges = profile.contour("(Intercept)", "Days", [0.95], points=8)
            >>> edges.round(2).head(3)
               conf_level  (Intercept)   Days  deviance
            0        0.95       269.09   9.92      5.99
            1        0.95       263.91  12.88      5.99
            2        0.95       251.41  14.43      5.99
        """
        from jaxreml.inference.likelihood.contours import contour

        for level in conf_levels:
            check_conf_level(level, "conf_levels")
        if points < 4:
            raise ValueError(f"an edge needs at least 4 points, not {points}")
        if first == second:
            raise ValueError(f"{first!r} is given twice: a region is of two parameters")
        one, other = (self._parameter(name) for name in (first, second))
        held = pair(self._fit, one, other)
        reml = is_reml(self.method) and "fixed" not in (one.kind, other.kind)
        search = Search(self._fit, self._known, [one, other], reml)
        return contour(self._fit, search, held, conf_levels, points)

    def _parameter(self, name: str) -> Parameter:
        for own in self._chosen:
            if own.name == name:
                return own
        known = ", ".join(self.parameters)
        raise DataError(f"there is no profile of {name!r}: {known}")

    def _limits(self, level: float, points: bool = False) -> dict[tuple[Parameter, int], Limit]:
        """Of each parameter, side -1 and 1; and the points between."""
        quantile = _quantile(level)
        found = {}
        for search in self._searches:
            for _ in range(MENDINGS):
                limits = search.reach((-quantile, quantile))
                if not points or not search.spread(limits):
                    break
            for own, track in search.tracks.items():
                sides = {side: limits[own, side * quantile] for side in (-1, 1)}
                reasons = [limit.reason for limit in sides.values() if limit.reason]
                if track.kinks:
                    reasons.append(
                        f"zeta of {own.name} is not monotone: the likelihood has several optima"
                    )
                for reason in reasons:
                    warnings.warn(reason, ConvergenceWarning, stacklevel=3)
                found |= {(own, side): limit for side, limit in sides.items()}
        return found

    def as_table(self, conf_level: float = 0.95, **options: Any) -> Table:
        """The intervals as a table for a paper.

        Args:
            conf_level: their level.
            options: digits, rename, caption, label and note, as for `jaxreml.frame_table`.

        Examples:
            >>> table = fit.profile("sigma").as_table()
            >>> print(table.to_markdown())
            | Parameter | Estimate |         95% CI |
            | --------- | -------: | -------------: |
            | sigma     |    25.59 | [22.90, 28.86] |
            <BLANKLINE>
            *Note.* Profile likelihood intervals by maximum likelihood.
        """
        frame = self.conf_int(conf_level).drop(columns=["group", "term"])
        made = frame_table(frame, conf_level=conf_level, **options)
        by = "maximum likelihood" if self.method == "ML" else "REML, of fixed effects by ML"
        return replace(made, notes=(f"Profile likelihood intervals by {by}", *made.notes))

    def _repr_html_(self) -> str:
        """The parameters; their intervals take searches, which showing an object should not."""
        rows = [[own.name, own.group or "", own.term] for own in self._chosen]
        heads = tuple(Column(name, align="l") for name in ("Parameter", "Group", "Term"))
        notes = ("Intervals by conf_int() or as_table(), points by frame, regions by contour()",)
        title = f"Profile likelihoods of {self._fit.formula}, {self.method}"
        return Table(heads, (Section("", rows),), (), title, "", notes).to_html()

    def __repr__(self) -> str:
        names = ", ".join(self.parameters)
        return f"<Profile of {self._fit.formula!r}, {self.method}: {names}>"


def _quantile(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def _choose(known: list[Parameter], names: str | Sequence[str] | None) -> list[Parameter]:
    """Parameters by name, in lme4's order."""
    if names is None:
        return known
    wanted = [names] if isinstance(names, str) else list(names)
    fixed = {"theta_": False, "beta_": True}
    all_names = [own.name for own in known]
    for name in wanted:
        if name not in fixed and name not in all_names:
            raise DataError(
                f"{name!r} is not a parameter of the fit; there are {', '.join(all_names)}, and "
                "'theta_' and 'beta_' for all variance parameters and all fixed effects"
            )
    if not wanted:
        raise ValueError(f"no parameters to profile; the fit has {', '.join(all_names)}")
    kept = {fixed[name] for name in wanted if name in fixed}
    return [own for own in known if own.name in wanted or (own.kind == "fixed") in kept]


def profile(
    fit: FittedModel,
    parameters: str | Sequence[str] | None = None,
    conf_level: float = 0.95,
    method: str = "ML",
) -> Profile:
    """Profile likelihoods of SDs, correlations, sigma and fixed effects.

    Args:
        fit: the fit.
        parameters: names as in ``profile().parameters``, lme4's: ``sd_(Intercept)|g``,
            ``cor_x.(Intercept)|g``, ``sigma``, fixed effects by their names; ``"theta_"`` and
            ``"beta_"`` for all variance parameters and all fixed effects. All if left out.
        conf_level: level of the intervals to cover, 0.99 at least.
        method: "ML", for any fit as lme4 does, or "REML" to profile the variance parameters
            by the restricted likelihood. Fixed effects have no restricted likelihood: their
            profile is always ML.

    Returns:
        A `Profile`: ``conf_int(conf_level)`` and ``frame``.

    Raises:
        DataError: the fit has no optimum, or does not have a parameter.
        JaxremlError: the profile finds a better one.
        ValueError: no parameters, another method, a level outside (0, 1).

    Examples:
        >>> profile = fit.profile(["sd_Days|Subject", "sigma"])
        >>> profile
        <Profile of 'Reaction ~ Days + (Days | Subject)', ML: sd_Days|Subject, sigma>
        >>> profile.conf_int()[["term", "lower", "upper"]].round(2)
                             term  lower  upper
        parameter
        sd_Days|Subject      Days    3.8   8.75
        sigma            Residual   22.9  28.86
    """
    return Profile(fit, parameters, conf_level, method)
