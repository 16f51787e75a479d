"""Shares of variance: ICC, repeatability, heritability, R2, with the delta method's intervals.

The variance that a grouping factor contributes to a row is z' Sigma z; its mean over the rows is
tr(Sigma Z'Z) / n (Johnson 2014, Methods in Ecology and Evolution 5:944), which for a random
intercept is its variance. Fixed effects contribute the variance of X beta over the rows, divisor
n - 1, without offset (Nakagawa and Schielzeth 2013, Methods in Ecology and Evolution 4:133). The
residual's is sigma2, that of a row of weight one. R's performance and MuMIn have the same
definitions. Intervals are made on the logit scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxreml.backend.compilation import remembered
from jaxreml.backend.lazy import jnp
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.delta import Program, linearise, program, wald

Array = Any  # NumPy's or JAX's

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

FIXED = "Fixed effects"
Weights = Mapping[str, float]  # of the parts of a sum of variances


def icc(fit: FittedModel, group: str | None = None, conf_level: float = 0.95) -> pd.DataFrame:
    """Intraclass correlation: the share of the random effects in the variance around X beta.

    Args:
        fit: the fit.
        group: the grouping factor whose share it is; all together (performance's adjusted ICC) if
            left out.
        conf_level: of the interval.

    Returns:
        One row, as `delta.delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.
    """
    chosen = list(fit.ngroups) if group is None else [_factor(fit, group)]
    name = "icc" if group is None else f"icc[{group}]"
    around = dict.fromkeys([*fit.ngroups, RESIDUAL], 1.0)
    return _shares(fit, {name: (dict.fromkeys(chosen, 1.0), around)}, conf_level)


def variance_shares(
    fit: FittedModel, *, fixed: bool = False, conf_level: float = 0.95
) -> pd.DataFrame:
    """The share of each grouping factor and of the residual in the sum of their variances.

    Args:
        fit: the fit.
        fixed: whether the fixed effects are a part of the sum, with a row of their own.
        conf_level: of the intervals.

    Returns:
        A row per part, as `delta.delta`; the estimates sum to one.

    Raises:
        DataError: a fit without an optimum.
    """
    total = dict.fromkeys([*fit.ngroups, RESIDUAL, *[FIXED] * fixed], 1.0)
    return _shares(fit, {name: ({name: 1.0}, total) for name in total}, conf_level)


def repeatability(
    fit: FittedModel,
    group: str,
    *,
    measurements: float = 1,
    adjusted: bool = True,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Repeatability of a measurement, or of the mean of several, of one level of `group`.

    V_group / (V_group + V_other groups + sigma2 / measurements), plus the variance of the fixed
    effects below if not `adjusted` (Nakagawa and Schielzeth 2010, Biological Reviews 85:935).

    Args:
        fit: the fit.
        group: the grouping factor, such as the individual measured.
        measurements: over how many the mean is.
        adjusted: whether the fixed effects are controlled for.
        conf_level: of the interval.

    Returns:
        One row, as `delta.delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.
        ValueError: `measurements` below 1.
    """
    if not measurements >= 1:
        raise ValueError(f"measurements must be at least 1, not {measurements}")
    total = dict.fromkeys([*fit.ngroups, *[FIXED] * (not adjusted)], 1.0)
    total[RESIDUAL] = 1 / measurements
    name = f"repeatability[{_factor(fit, group)}]"
    return _shares(fit, {name: ({group: 1.0}, total)}, conf_level)


def heritability(
    fit: FittedModel,
    group: str,
    per: Mapping[str, float] | None = None,
    *,
    multiple: float = 1.0,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Heritability: multiple * V_group / (V_group + sum_k V_k / per[k]).

    On the basis of a plot, or of the mean of an entry of a trial over plots and environments
    (Falconer and Mackay 1996, Introduction to Quantitative Genetics, ch. 10; Holland, Nyquist and
    Cervantes-Martinez 2003, Plant Breeding Reviews 22:9).

    Args:
        fit: the fit.
        group: the grouping factor of the genotypes or families.
        per: the other parts of the phenotypic variance, grouping factors or "Residual", with the
            number of their values that a mean is over, such as
            ``{"line:site": 4, "Residual": 12}``. The residual counts once if it is not named;
            grouping factors that are not named (blocks, sites) do not count.
        multiple: additive variance over V_group: 4 for half-sib families, 2 for full sibs, 1 for
            lines or clones.
        conf_level: of the interval, made from the logit of the ratio.

    Returns:
        One row, as `delta.delta`.

    Raises:
        DataError: an unknown grouping factor; a fit without an optimum.
        ValueError: numbers in `per`, or a multiple, that are not positive.
    """
    per = {RESIDUAL: 1.0, **(per or {})}
    total = {_factor(fit, group): 1.0}
    for name, count in per.items():
        if name != RESIDUAL:
            _factor(fit, name)
        if name == group:
            raise ValueError(f"per has {group!r}, whose heritability it is")
        if not count > 0:
            raise ValueError(f"per[{name!r}] must be positive, not {count}")
        total[name] = 1 / count
    if not multiple > 0:
        raise ValueError(f"multiple must be positive, not {multiple}")
    frame = _shares(fit, {f"heritability[{group}]": ({group: 1.0}, total)}, conf_level)
    return frame.assign(**{name: multiple * frame[name] for name in frame.columns.drop("note")})


def r2(fit: FittedModel, conf_level: float = 0.95) -> pd.DataFrame:
    """R2 of the fixed effects (marginal) and of fixed and random effects (conditional).

    Nakagawa, Johnson and Schielzeth (2017), J. R. Soc. Interface 14:20170213; random slopes
    by Johnson (2014).

    Args:
        fit: the fit.
        conf_level: of the intervals.

    Returns:
        Rows marginal and conditional, as `delta.delta`.

    Raises:
        DataError: a fit without an optimum.
    """
    total = dict.fromkeys([*fit.ngroups, RESIDUAL, FIXED], 1.0)
    explained = dict.fromkeys([*fit.ngroups, FIXED], 1.0)
    rows = {"marginal": ({FIXED: 1.0}, total), "conditional": (explained, total)}
    return _shares(fit, rows, conf_level)


def _factor(fit: FittedModel, group: str) -> str:
    known = list(fit.ngroups)
    if group not in known:
        raise DataError(
            f"{group!r} is not a grouping factor of the model; it has {', '.join(map(repr, known))}"
        )
    return group


def _shares(
    fit: FittedModel, rows: Mapping[str, tuple[Weights, Weights]], conf_level: float
) -> pd.DataFrame:
    """Ratios of sums of variances, each row a numerator and a denominator."""
    frame = fit.frame
    squares = {}
    for name in fit.ngroups:
        columns = [term.effects for term in frame.terms if term.name == name]
        effects = np.concatenate(columns, axis=1)
        squares[name] = effects.T @ effects / len(effects)
    centred = frame.X - frame.X.mean(axis=0)
    parts = [*fit.ngroups, RESIDUAL, FIXED]
    above, below = (
        np.array([[weights.get(part, 0.0) for part in parts] for weights in side])
        for side in zip(*rows.values(), strict=True)
    )
    spread = centred.T @ centred / (len(centred) - 1)
    linear = linearise(fit, _program(fit.term_sizes), squares, spread, above, below)
    return wald(linear, list(rows), conf_level, "logit")


@remembered
def _program(groups: components.Groups) -> Program:
    return program(_ratios, groups)


def _ratios(
    beta: Array,
    named: components.Components,
    squares: Mapping[str, Array],
    spread: Array,
    above: Array,
    below: Array,
) -> Array:
    """(above @ parts) / (below @ parts), with the variances of the parts."""
    random = [jnp.sum(squares[name] * named[name]) for name in named if name != RESIDUAL]
    parts = jnp.stack([*random, named[RESIDUAL], beta @ spread @ beta])
    return (above @ parts) / (below @ parts)
