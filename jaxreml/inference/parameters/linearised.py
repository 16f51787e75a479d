"""Standard errors as Wald intervals, on the scale that suits each number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit, ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError

ROUNDING = 1e-9  # by which a value may be outside its range


class Transform(NamedTuple):
    """The scale on which an interval is made: the map, its inverse, its derivative, its domain."""

    forward: Callable[[Any], Any]
    inverse: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    domain: tuple[float, float]


TRANSFORMS: dict[str | None, Transform] = {
    None: Transform(lambda x: x, lambda x: x, np.ones_like, (-np.inf, np.inf)),
    "log": Transform(np.log, np.exp, lambda x: 1 / x, (0.0, np.inf)),
    "logit": Transform(logit, expit, lambda x: 1 / (x * (1 - x)), (0.0, 1.0)),
    "fisher": Transform(np.arctanh, np.tanh, lambda x: 1 / (1 - x * x), (-1.0, 1.0)),
}


def scale_of(kind: Any) -> Transform:
    """That of a name, or of what a covariance's parameter has (`Reading.transform`).

    Raises:
        ValueError: another name.
    """
    if kind is None or isinstance(kind, str):
        if kind not in TRANSFORMS:
            known = ", ".join(f'"{other}"' for other in TRANSFORMS if other)
            raise ValueError(f"transform must be None, {known}, not {kind!r}")
        return TRANSFORMS[kind]
    slope = lambda x: 1 / kind.slope(kind.coordinate(x))  # noqa: E731
    return Transform(kind.coordinate, kind.value, slope, kind.domain)


class Linearised(NamedTuple):
    """Values of a function at a fit, and what the delta method says of them.

    Attributes:
        estimate: (k,) values.
        vcov: (k, k), rows NaN where there is no standard error.
        notes: per value why not, or what the standard error is conditional on; "" if nothing.
    """

    estimate: np.ndarray
    vcov: np.ndarray
    notes: list[str]


def wald(
    linear: Linearised,
    names: Sequence[str],
    conf_level: float,
    transform: Any = None,
) -> pd.DataFrame:
    """Standard errors and Wald intervals as a frame; arguments and errors as those of
    `delta`."""
    check_conf_level(conf_level)
    count = len(linear.estimate)
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} value(s)")
    chosen = [transform] * count if transform is None or isinstance(transform, str) else transform
    if len(chosen) != count:
        raise ValueError(f"{len(chosen)} transforms for {count} value(s)")
    quantile = ndtri((1 + conf_level) / 2)
    std_error = np.sqrt(np.diagonal(linear.vcov))
    limits = np.full((count, 2), np.nan)
    notes = list(linear.notes)
    for k, (name, kind) in enumerate(zip(names, chosen, strict=True)):
        value, scale = linear.estimate[k], scale_of(kind)
        low, high = scale.domain
        if value < low - ROUNDING or value > high + ROUNDING:
            raise DataError(
                f"the {kind} interval is for values between {low:g} and {high:g}; {name} is "
                f"{value:.6g}"
            )
        if not np.isfinite(std_error[k]):
            continue
        if kind is not None and not low < value < high:
            notes[k] = notes[k] or f"no {kind} interval at {value:g}, the end of its range"
            continue
        half = quantile * std_error[k] * scale.slope(value)
        limits[k] = scale.inverse(scale.forward(value) + np.array([-half, half]))
    return pd.DataFrame(
        {
            "estimate": linear.estimate,
            "std_error": std_error,
            "lower": limits[:, 0],
            "upper": limits[:, 1],
            "note": notes,
        },
        index=pd.Index(list(names)),
    )
