"""Compact letter displays: letters that say which means do not differ.

Two means share a letter if and only if their difference is not significant. The letters are found
by inserting and absorbing (Piepho 2004, J. Comput. Graph. Stat. 13:456): all means begin with one
letter; every pair that differs splits the letters that both have.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd

from jaxreml.inference.fixed.means import MarginalMeans

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(means: MarginalMeans, level: float = 0.05, adjust: str | None = None) -> pd.Series:
    """The compact letter display of means, within the levels of their `by`.

    Args:
        means: of `LMMResults.emmeans` or `emtrends`.
        level: differences whose adjusted p-value is at most this are significant.
        adjust: of the p-values, see `MarginalMeans.contrast`; Tukey's if left out.

    Returns:
        A text per row of ``means.table``; "a" is of the lowest means. Empty for a mean that the
        data cannot estimate.

    Raises:
        DataError: there is one mean only.

    Example:
        >>> import jaxreml
        >>> machines = jaxreml.datasets.load("machines")
        >>> fit = jaxreml.fit("score ~ Machine + (Machine | Worker)", machines)
        >>> jaxreml.inference.letters.letters(fit.emmeans("Machine")).tolist()
        ['a', 'b', 'b']
    """
    table, pairs = means.table, means.contrast("pairwise", adjust=adjust)
    by = list(means.by)
    found = pd.Series("", table.index, dtype=object, name="letters")
    p_values = iter(pairs["p_value"])
    groups = table.groupby(by, sort=False, observed=True) if by else [((), table)]
    for _, part in groups:
        of_pairs = zip(combinations(range(len(part)), 2), p_values, strict=False)
        differ = [pair for pair, p in of_pairs if p <= level]
        found[part.index] = display(part["estimate"].to_numpy(), differ)
    return found


def display(estimates: np.ndarray, differ: Iterable[tuple[int, int]]) -> list[str]:
    """Letters of k means, of which these pairs differ; in the order of the estimates.

    Args:
        estimates: (k,), NaN where there is none.
        differ: pairs of their positions.
    """
    sets = [frozenset(np.flatnonzero(~np.isnan(estimates)).tolist())]
    for i, j in differ:
        split = []
        for own in sets:
            split += [own - {i}, own - {j}] if i in own and j in own else [own]
        distinct = list(dict.fromkeys(split))
        sets = [own for own in distinct if not any(own < other for other in distinct)]
    rank = np.argsort(np.argsort(estimates))
    sets.sort(key=lambda own: sorted(rank[list(own)]))
    names = [ALPHABET[k] if k < len(ALPHABET) else f"({k + 1})" for k in range(len(sets))]
    return [
        "".join(name for name, own in zip(names, sets, strict=True) if k in own)
        for k in range(len(estimates))
    ]
