"""Joint tests of the terms of a model by contrasts of marginal means, as emmeans' `joint_tests`.

A set of variables is tested by all its interaction contrasts: differences of consecutive levels in
each, averaged over the others with equal weights. Covariates count by their values one below and
one above the mean. With factors coded to sum to zero these are type III tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import null_space

from jaxreml.data.tables import nearest
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.adjustments import f_tail
from jaxreml.inference.fixed.grid import ReferenceGrid, reference_grid
from jaxreml.inference.fixed.nested import with_outer
from jaxreml.inference.fixed.terms import FixedTerms
from jaxreml.inference.fixed.wald import approximation

ZERO = 1e-7  # of a contrast's coefficients, as in emmeans
COLUMNS = ["num_df", "den_df", "statistic", "p_value"]
NOT_ALL = "some of its contrasts are not estimable"
CONFOUNDED = "(confounded)"


def joint_tests(
    fit: FittedModel,
    by: str | Sequence[str] | None = None,
    at: Mapping[str, Any] | None = None,
    df: str = "satterthwaite",
) -> pd.DataFrame:
    """F tests of the variables of the fixed effects and of their interactions.

    Args:
        fit: the fit.
        by: variables within whose levels the others are tested.
        at: values of variables, see `jaxreml.inference.grid.reference_grid`; covariates are at the
            mean -1 and +1.
        df: method for the denominator degrees of freedom, see `jaxreml.inference.wald`; of a joint
            test emmeans takes the smallest among its orthogonal rows.

    Returns:
        Columns term, those of `by`, num_df, den_df, statistic, p_value; a row per set of variables
        that are together in a term and per level of `by`. Where contrasts are not estimable those
        that are are tested, and there is a column ``reason``; what differs between the cells of the
        grid beyond all the tests is "(confounded)".

    Raises:
        ValueError: another method.
        DataError: names or levels that are not the model's, no factors, a fit without an optimum.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> growth = jaxreml.fit("distance ~ age * Sex + (age | Subject)", children)
        >>> growth.joint_tests()[["term", "num_df", "den_df", "statistic"]].round(2)
              term  num_df  den_df  statistic
        0      age       1    25.0      88.00
        1      Sex       1    25.0       9.29
        2  age:Sex       1    25.0       5.12
    """
    within = (by,) if isinstance(by, str) else tuple(by or ())
    grid = _grid(fit, at)
    for name in within:
        if name not in grid.levels:
            raise DataError(
                f"by={name!r} is not a variable of the fixed effects"
                f"{nearest(name, list(grid.levels))}"
            )
    factors = [name for name, v in grid.levels.items() if len(v) > 1 and name not in within]
    if not factors:
        raise DataError("the model has no variables of several values to test")
    X = grid.terms.encoding.matrix(grid.table)
    found: list[dict[str, Any]] = []
    tested: dict[tuple[Any, ...], list[np.ndarray]] = {}
    for names in _sets(grid, factors):
        for key, L in _contrasts(grid, X, names, within).items():
            row = _test(fit, grid.terms, L, df)
            tested.setdefault(key, []).append(row.pop("rows"))
            found.append({"term": ":".join(names), **dict(zip(within, key, strict=True)), **row})
    if not grid.nesting:
        for key, L in _cells(grid, X, within).items():
            row = _beyond(fit, grid.terms, L, np.concatenate(tested[key]), df)
            found.append({"term": CONFOUNDED, **dict(zip(within, key, strict=True)), **row})
    found = [row for row in found if row["num_df"] > 0]
    notes = ["reason"] if any(row["reason"] for row in found) else []
    return pd.DataFrame(found).reindex(columns=["term", *within, *COLUMNS, *notes])


def _grid(fit: FittedModel, at: Mapping[str, Any] | None) -> ReferenceGrid:
    """The reference grid with covariates below and above their means."""
    grid = reference_grid(fit, at)
    given = at or {}
    around = {
        name: [values[0] - 1, values[0] + 1]
        for name, values in grid.levels.items()
        if len(values) == 1 and name not in given and name not in grid.counted
    }
    return reference_grid(fit, {**given, **around}) if around else grid


def _sets(grid: ReferenceGrid, factors: list[str]) -> Iterator[tuple[str, ...]]:
    """Sets of variables that a term has together, small ones first."""
    together = [set(used) for used in grid.terms.variables_of_terms.values()]
    together += [{name, *outer} for name, outer in grid.nesting.items()]
    for size in range(1, len(factors) + 1):
        for names in combinations(factors, size):
            if set(with_outer(names, grid.nesting)) != set(names):
                continue  # a nested factor goes with those that it is nested in
            if any(set(names) <= used for used in together):
                yield names


def _contrasts(
    grid: ReferenceGrid, X: np.ndarray, names: tuple[str, ...], within: tuple[str, ...]
) -> dict[tuple[Any, ...], np.ndarray]:
    """Per level of `within` the interaction contrasts (k, P) of the means of `names`."""
    average, exists = grid.averaging([*names, *within], "equal")
    means = average @ X
    labels = grid.labels([*names, *within]).loc[exists].reset_index(drop=True)
    outer = [f for name in names if name in grid.nesting for f in grid.nesting[name]]
    compared = [name for name in names if name not in outer]
    found: dict[tuple[Any, ...], list[np.ndarray]] = {}
    for key, rows in _groups(labels, [*within, *dict.fromkeys(outer)]).items():
        # The first name varies fastest, so that its axis is the last
        shape = [len(set(labels[name].to_numpy()[rows])) for name in reversed(compared)]
        part = means[rows].reshape(*shape, X.shape[1])
        for axis in range(len(compared)):
            part = np.diff(part, axis=axis)
        found.setdefault(key[: len(within)], []).append(part.reshape(-1, X.shape[1]))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _cells(
    grid: ReferenceGrid, X: np.ndarray, within: tuple[str, ...]
) -> dict[tuple[Any, ...], np.ndarray]:
    """Per level of `within` the differences (k, P) of consecutive cells of the grid."""
    return {key: np.diff(X[rows], axis=0) for key, rows in _groups(grid.table, within).items()}


def _groups(labels: pd.DataFrame, names: Sequence[str]) -> dict[tuple[Any, ...], np.ndarray]:
    """Rows of each combination of the levels of `names`, in their order."""
    if not names:
        return {(): np.arange(len(labels))}
    found: dict[tuple[Any, ...], list[int]] = {}
    columns = [labels[name].tolist() for name in names]
    for row, key in enumerate(zip(*columns, strict=True)):
        found.setdefault(key, []).append(row)
    return {key: np.array(rows) for key, rows in found.items()}


def _test(fit: FittedModel, terms: FixedTerms, L: np.ndarray, df: str) -> dict[str, Any]:
    """The joint test of what is estimable of (k, P) `L`; "rows" are orthonormal ones, (r, P)."""
    rows = np.where(np.abs(L) < ZERO, 0.0, L)
    rows = rows[rows.any(axis=1)]
    reason = ""
    space = terms.frame.row_space
    if space is not None and not space.contains(rows).all():
        reason = NOT_ALL
        rows = null_space((rows @ space.null_space).T).T @ rows
    rows = _orthonormal(rows)
    q = len(rows)
    result = dict.fromkeys(COLUMNS, np.nan) | {"num_df": q, "reason": reason, "rows": rows}
    if not q:
        return result
    kept = rows[:, terms.frame.kept]
    method = approximation(fit, df)
    estimate = kept @ fit.beta
    F = float(estimate @ np.linalg.solve(kept @ method.vcov @ kept.T, estimate)) / q
    degrees = float(np.min(method.single(kept)))
    return result | {"den_df": degrees, "statistic": F, "p_value": float(f_tail(F, q, degrees))}


def _beyond(
    fit: FittedModel, terms: FixedTerms, L: np.ndarray, tested: np.ndarray, df: str
) -> dict[str, Any]:
    """What a joint test of `L` has beyond that of `tested`."""
    whole, part = (_test(fit, terms, rows, df) for rows in (L, tested))
    q = whole["num_df"] - part["num_df"]
    if q <= 0:
        return {"num_df": 0}
    both = [test["num_df"] * test["statistic"] for test in (whole, part) if test["num_df"]]
    F = (both[0] - sum(both[1:])) / q
    degrees = whole["den_df"]
    p_value = float(f_tail(F, q, degrees))
    return {"num_df": q, "den_df": degrees, "statistic": F, "p_value": p_value, "reason": ""}


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows of the same span, from the first that do not depend on those before."""
    kept = np.zeros((0, rows.shape[1]))
    for row in rows:
        rest = row - kept.T @ (kept @ row)
        rest = rest - kept.T @ (kept @ rest)
        length = np.linalg.norm(rest)
        if length > ZERO * np.linalg.norm(row):
            kept = np.concatenate([kept, rest[None] / length])
    return kept
