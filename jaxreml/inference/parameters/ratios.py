"""Ratios of sums of variances, as weights of the parts of a model: what ICC, repeatability,
heritability and R2 are, of one fit or of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.fitting.row_variances import FIXED

Weights = Mapping[str, float]  # of the parts of a sum
Ratios = dict[str, tuple[Weights, Weights]]  # by name a numerator and a denominator
Groups = Sequence[str]  # the grouping factors of a model


def icc(groups: Groups, group: str | None) -> Ratios:
    """As `shares.icc`; DataError for an unknown factor."""
    if group is not None:
        _require_factor(groups, group)
    name, chosen = ("icc", groups) if group is None else (f"icc[{group}]", [group])
    return {name: (dict.fromkeys(chosen, 1.0), dict.fromkeys([*groups, RESIDUAL], 1.0))}


def variance_shares(groups: Groups, *, fixed: bool) -> Ratios:
    """As `shares.variance_shares`."""
    total = dict.fromkeys([*groups, RESIDUAL, *[FIXED] * fixed], 1.0)
    return {name: ({name: 1.0}, total) for name in total}


def r2(groups: Groups) -> Ratios:
    """As `shares.r2`."""
    total = dict.fromkeys([*groups, RESIDUAL, FIXED], 1.0)
    explained = dict.fromkeys([*groups, FIXED], 1.0)
    return {"marginal": ({FIXED: 1.0}, total), "conditional": (explained, total)}


def repeatability(groups: Groups, group: str, measurements: float, *, adjusted: bool) -> Ratios:
    """As `shares.repeatability`, with its errors."""
    if not measurements >= 1:
        raise ValueError(f"measurements must be at least 1, not {measurements}")
    _require_factor(groups, group)
    total = dict.fromkeys([*groups, *[FIXED] * (not adjusted)], 1.0)
    total[RESIDUAL] = 1 / measurements
    return {f"repeatability[{group}]": ({group: 1.0}, total)}


def heritability(
    groups: Groups, group: str, per: Mapping[str, float] | None, multiple: float
) -> Ratios:
    """As `shares.heritability` before it is multiplied, with its errors."""
    _require_factor(groups, group)
    total = {group: 1.0}
    for name, count in {RESIDUAL: 1.0, **(per or {})}.items():
        if name != RESIDUAL:
            _require_factor(groups, name)
        if name == group:
            raise ValueError(f"per has {group!r}, whose heritability it is")
        if not count > 0:
            raise ValueError(f"per[{name!r}] must be positive, not {count}")
        total[name] = 1 / count
    if not multiple > 0:
        raise ValueError(f"multiple must be positive, not {multiple}")
    return {f"heritability[{group}]": ({group: 1.0}, total)}


def matrices(ratios: Ratios, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the parts in numerators and in denominators, (k, parts) each."""
    above, below = (
        np.array([[weights.get(part, 0.0) for part in parts] for weights in side])
        for side in zip(*ratios.values(), strict=True)
    )
    return above, below


def _require_factor(groups: Groups, group: str) -> None:
    if group not in groups:
        known = ", ".join(map(repr, groups))
        raise DataError(f"{group!r} is not a grouping factor of the model; it has {known}")
