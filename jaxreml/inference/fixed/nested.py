"""Factors nested in others, as emmeans finds them, for the reference grid.

A factor is nested in others if each of its levels occurs with one level of theirs only, or if the
model has it in their interactions but has no effects of it by itself: `a` in ``y ~ b + a:b``. Means
of a nested factor belong to its levels within those of the others; averages over it are over the
levels that there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

Nesting = dict[str, tuple[str, ...]]  # per nested factor those that it is nested in


def find_nesting(cells: pd.DataFrame, terms: Collection[frozenset[str]]) -> Nesting:
    """Which factors are nested in which; the rules of emmeans' `ref_grid`.

    Args:
        cells: the combinations of the factors' levels in the data, a column per factor with two
            levels or more.
        terms: per term of the model, the intercept among them, its variables.
    """
    found: dict[str, list[str]] = {}
    names = list(cells)
    for name in names:
        others = [other for other in names if other != name and name not in found.get(other, ())]
        levels = cells.groupby(name, observed=True, sort=False)
        outer = [other for other in others if int(np.max(levels[other].nunique())) == 1]
        if outer:
            found[name] = outer
    for name in names:
        if frozenset({name}) in terms:
            continue
        own = [frozenset(term & set(names)) for term in terms if name in term]
        coded = [term for term in own if term - {name} in terms] or own
        outer = [{f for f in term - {name} if term - {f} not in terms} for term in coded]
        for least in [s for s in outer if s and not any(other < s for other in outer if other)]:
            here = found.setdefault(name, [])
            here += [f for f in names if f in least and f not in here]
    whole: Nesting = {}
    for name, outer in found.items():
        above = [f for other in outer for f in found.get(other, ())]
        whole[name] = tuple(dict.fromkeys([*above, *outer]))
    return {name: outer for name, outer in whole.items() if name not in outer}


def with_outer(names: Sequence[str], nesting: Nesting) -> list[str]:
    """Names with those that nested ones among them are nested in, the nested ones first."""
    inner = [name for name in names if name in nesting]
    outer = [other for name in inner for other in nesting[name]]
    return list(dict.fromkeys([*inner, *outer, *names]))


def described(nesting: Mapping[str, Sequence[str]]) -> str:
    """The nesting in R's words, ``a %in% b``."""
    texts = [
        f"{name} %in% {outer[0] if len(outer) == 1 else '(' + '*'.join(outer) + ')'}"
        for name, outer in nesting.items()
    ]
    return ", ".join(texts)
