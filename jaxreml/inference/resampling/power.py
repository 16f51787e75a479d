"""`power`: how often tests of fixed effects find an effect, by simulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy
from scipy.special import stdtr

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.resampling.extension import extend
from jaxreml.inference.resampling.simulation import Population, check_count, of_fit
from jaxreml.many.one_by_one import refitter
from jaxreml.status import Status


def power(
    model: FittedModel | Population,
    effects: str | Iterable[str] | Mapping[str, Any],
    n: int | Iterable[int] | None = None,
    *,
    along: str | None = None,
    within: str | Sequence[str] | None = None,
    nsim: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Power of two-sided t tests of fixed effects, with Satterthwaite's degrees of freedom.

    For each sample size, responses are drawn from the model and the model is fitted to them. A
    response drawn with another value of a coefficient differs by a multiple of a column of X, which
    changes that estimate by the same amount and nothing else: all sizes of all effects share the
    draws.

    Args:
        model: a fit (a pilot study), or a `population` of given parameters.
        effects: coefficients and their sizes, ``{"Days": [5, 10]}``, one at a time while the
            others keep their values; or names, for the sizes that the model has.
        n: sample sizes: numbers of levels or rows of what `along` or `within` names; as the model
            if left out.
        along, within: as for `jaxreml.inference.extension.extend`: a grouping factor to have n
            levels (or a numeric column n values), or one whose levels are to have n rows.
        nsim: responses drawn for each sample size.
        alpha: level of the tests.
        seed: of the random numbers.
        conf_level: of the intervals.

    Returns:
        One row per sample size, effect and size: effect, size, n (NaN if not asked for), nobs,
        power (share of the refits with p < alpha), lower and upper (exact binomial interval),
        n_failed (refits without an optimum or degrees of freedom, left out), share_singular (of the
        others).

    Raises:
        DataError: a fit that did not converge, an effect that the model does not have, a sample
            size that cannot be made, or no refit that converged.
        ValueError: arguments out of range.

    Examples:
        How surely a study of 6 or of 12 people would find a slope of 5 ms a day:

        >>> table = jaxreml.power(fit, {"Days": 5}, [6, 12], along="Subject", nsim=200, seed=1)
        >>> table[["effect", "size", "n", "nobs"]]
          effect  size   n  nobs
        0   Days   5.0   6    60
        1   Days   5.0  12   120
        >>> bool(table["power"].is_monotonic_increasing)
        True
    """
    check_count(nsim, seed)
    check_conf_level(conf_level)
    check_conf_level(alpha, "alpha")
    people = model if isinstance(model, Population) else of_fit(model)
    wanted = _effects(effects, people)
    if n is None:
        if along is not None or within is not None:
            raise ValueError("along and within need n, the numbers of levels or rows")
        sizes = [None]
    else:
        sizes = [n] if isinstance(n, int | np.integer) else list(n)
    rows = []
    for size in sizes:
        sample = people if size is None else extend(people, size, along, within)
        rows += _curve(sample, wanted, nsim, alpha, seed, conf_level, size)
    return pd.DataFrame(rows)


def _effects(
    effects: str | Iterable[str] | Mapping[str, Any], people: Population
) -> list[tuple[str, float]]:
    """Coefficients and sizes, one pair per row of a curve."""
    names = people.frame.fixed_names
    if isinstance(effects, str):
        effects = [effects]
    if not isinstance(effects, Mapping):
        effects = dict.fromkeys(effects)
    pairs = []
    for name, sizes in effects.items():
        if name not in names:
            raise DataError(f"the model has no fixed effect {name!r}; it has {', '.join(names)}")
        if sizes is None:
            sizes = people.beta[names.index(name)]
        values = np.atleast_1d(np.asarray(sizes, float))
        if values.ndim != 1 or not np.all(np.isfinite(values)):
            raise ValueError(f"the sizes of {name!r} must be finite numbers, not {sizes!r}")
        pairs += [(name, float(value)) for value in values]
    if not pairs:
        raise ValueError("there are no effects to test")
    return pairs


def _curve(
    people: Population,
    effects: list[tuple[str, float]],
    nsim: int,
    alpha: float,
    seed: int,
    conf_level: float,
    size: int | None,
) -> list[dict[str, Any]]:
    """The rows of one sample size."""
    engine = refitter(people.frame, people.method, nsim, people.start)
    fits = [engine.fit(block) for block in people.blocks(nsim, seed)]
    beta, se, df, status, singular = (
        np.concatenate([getattr(part, field) for part in fits])
        for field in ("beta", "se", "df", "status", "is_singular")
    )
    rows = []
    for name, value in effects:
        k = people.frame.fixed_names.index(name)
        good = (status == Status.CONVERGED) & (df[:, k] > 0)
        if not good.any():
            raise DataError(f"none of the {nsim} refits gave a test of {name!r}")
        t = (beta[good, k] + value - people.beta[k]) / se[good, k]
        found = int(np.sum(2 * stdtr(df[good, k], -np.abs(t)) < alpha))
        total = int(good.sum())
        low, high = scipy.stats.binomtest(found, total).proportion_ci(conf_level, method="exact")
        rows.append(
            {
                "effect": name,
                "size": value,
                "n": np.nan if size is None else size,
                "nobs": len(people.frame.X),
                "power": found / total,
                "lower": float(low),
                "upper": float(high),
                "n_failed": nsim - total,
                "share_singular": float(singular[good].mean()),
            }
        )
    return rows
