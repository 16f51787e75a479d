"""Arguments that functions of all rooms take, checked in one way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DF_METHODS = (
    "satterthwaite",
    "kenward-roger",
    "kenward-roger-sas",
    "kenward-roger-linear",
    "between-within",
    "residual",
    "inf",
)
_RANDOM = 'random effects are terms of the formula, such as "y ~ x + (1 | group)"'
_GAUSSIAN = "responses are Gaussian here; for others use glmmTMB or lme4's glmer in R, or bambi"
_ELSEWHERE = {
    "REML": 'write method="REML" or method="ML"',
    "reml": 'write method="REML" or method="ML"',
    "groups": _RANDOM,
    "re_formula": _RANDOM + ' or "(x | group)" for slopes',
    "vc_formula": _RANDOM + ", several for several variance components",
    "exog_re": _RANDOM,
    "random": _RANDOM,
    "cluster": _RANDOM + "; standard errors that are robust to clusters are not offered",
    "family": _GAUSSIAN,
    "link": _GAUSSIAN,
    "subset": "give the rows wanted as data, such as data[data.x > 0]",
    "na_action": "rows with a missing value in a column used are dropped and counted",
    "missing": "rows with a missing value in a column used are dropped and counted",
    "contrasts": "write them in the formula, such as C(f, contr.sum)",
    "control": "the optimiser has one setting, max_iterations",
    "optimizer": "the optimiser has one setting, max_iterations",
    "maxiter": "write max_iterations",
    "start": "starting values are not needed",
}


def refuse_arguments(function: str, others: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that a function does not have, with those to use instead."""
    for name in others:
        hint = _ELSEWHERE.get(name)
        raise TypeError(f"{function} has no argument {name!r}{f': {hint}' if hint else ''}")


def is_reml(method: str) -> bool:
    """Whether `method` is "REML"; ValueError unless it is "REML" or "ML"."""
    if method not in ("REML", "ML"):
        raise ValueError(f'method must be "REML" or "ML", not {method!r}')
    return method == "REML"


def check_conf_level(conf_level: float, name: str = "conf_level") -> None:
    """Raise ValueError unless between 0 and 1."""
    if not 0 < conf_level < 1:
        raise ValueError(f"{name} must be between 0 and 1, not {conf_level}")


def check_df(df: str, method: str) -> None:
    """Raise unless tests with degrees of freedom `df` serve fits by `method`.

    Raises:
        ValueError: another name than DF_METHODS, or Kenward-Roger's method for a fit by ML.
    """
    if df not in DF_METHODS:
        raise ValueError(f"df must be one of {', '.join(DF_METHODS)}, not {df!r}")
    if df.startswith("kenward-roger") and method != "REML":
        raise ValueError(
            "Kenward-Roger's method is defined for REML: fit with method='REML', or use "
            "df='satterthwaite'"
        )


def numbers(values: Any, what: str) -> np.ndarray:
    """An array of finite floats.

    Raises:
        ValueError: something else, with the name `what`.
    """
    try:
        array = np.asarray(values)
        array = array.astype(float, casting="same_kind" if array.dtype.kind == "c" else "unsafe")
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be numbers, not {values!r}") from None
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{what} has values that are not finite")
    return array


def check_engine(engine: str | None) -> None:
    """Raise ValueError for an engine that there is none of."""
    if engine not in (None, "numpy", "jax"):
        raise ValueError(f'engine must be "numpy" or "jax", not {engine!r}')
