"""Numbers that people read of a covariance, held by solving for one of its coordinates.

A correlation of two visits is no coordinate of most families. Where h(y) is such a number and y the
coordinates, x is y but for one entry that holds h: y follows from x by Newton's method, and
derivatives in x from those in y by the rule of implicit functions. On the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.natural import places

Array = np.ndarray
MOST_STEPS = 60  # of the search for y
HALVINGS = 30  # of one of them
EXACT = 1e-13  # of h, beside rounding error
NEARLY = 100  # times as much, where no step comes nearer


class Eliminated(NamedTuple):
    """An SD or a correlation of the effects of a block.

    Attributes:
        place: in y the coordinate that is solved for, in x what is held: the logarithm of an SD,
            or (log(r - least) - log(1 - r)) / 2 of a correlation r.
        block: the covariance.
        start: where its chart begins in y; log sigma is the last of y.
        effects: as those of `Reading`.
        least: the least value of the correlation.
        hint: where to start the search for the coordinate.
        slopes: how h changes there with the coordinates of all that is held; () if unknown.
    """

    place: int
    block: Block
    start: int
    effects: tuple[int, ...]
    least: float
    hint: float
    slopes: tuple[float, ...] = ()


class Measure(NamedTuple):
    """h at y (k,), its gradient (k,) and its Hessian (k, k)."""

    value: float
    slope: np.ndarray
    bend: np.ndarray


def measure(y: np.ndarray, own: Eliminated) -> Measure:
    """What is held, as a function of all coordinates."""
    block, inside = own.block, slice(own.start, own.start + own.block.length)
    chart, entries, whole = y[inside], _entries(own), _variances(y, own)
    alone = len(own.effects) == 1
    value, first, second = _log_sd(whole) if alone else _log_odds(whole, own.least)
    gradient = np.zeros(block.size * (block.size + 1) // 2)
    np.add.at(gradient, entries, first)
    moved, bend = (np.asarray(part) for part in block.slopes(chart, gradient))
    slope, hessian = np.zeros(len(y)), np.zeros((len(y), len(y)))
    slope[inside] = gradient @ moved
    hessian[inside, inside] = bend + moved[entries].T @ second @ moved[entries]
    if alone and block.residual:
        value, slope[-1] = value + y[-1], 1.0
    return Measure(float(value), slope, hessian)


def _value(y: np.ndarray, own: Eliminated) -> float:
    """That of `measure`."""
    whole = _variances(y, own)
    if len(own.effects) > 1:
        return float(_log_odds(whole, own.least)[0])
    return float(np.log(whole[0]) / 2 + (y[-1] if own.block.residual else 0.0))


def _entries(own: Eliminated) -> np.ndarray:
    """Where the covariance and the two variances are in omega."""
    at, i, j = places(own.block.size), own.effects[0], own.effects[-1]
    return np.array([at[i, j], at[i, i], at[j, j]])


def _variances(y: np.ndarray, own: Eliminated) -> np.ndarray:
    """Covariance and variances at y; those of residuals are relative to sigma2."""
    chart = y[own.start : own.start + own.block.length]
    found = np.asarray(own.block.omega(chart))[_entries(own)]
    same = float(own.effects[0] == own.effects[-1])
    return found + np.array([same, 1.0, 1.0]) if own.block.residual else found


def _log_sd(whole: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    variance = whole[0]
    first, second = np.zeros(3), np.zeros((3, 3))
    first[0], second[0, 0] = 0.5 / variance, -0.5 / variance**2
    return np.log(variance) / 2, first, second


def _log_odds(whole: np.ndarray, least: float) -> tuple[Any, np.ndarray, np.ndarray]:
    covariance, *variances = whole
    scale = np.sqrt(variances[0] * variances[1])
    r, relative = covariance / scale, -0.5 / np.array(variances)
    slope = np.append(1 / scale, r * relative)
    bend = np.zeros((3, 3))
    bend[0, 1:] = bend[1:, 0] = relative / scale
    bend[1:, 1:] = r * np.outer(relative, relative) * [[3.0, 1.0], [1.0, 3.0]]
    one = (1 / (r - least) + 1 / (1 - r)) / 2
    two = (1 / (1 - r) ** 2 - 1 / (r - least) ** 2) / 2
    value = (np.log(r - least) - np.log(1 - r)) / 2
    return value, one * slope, one * bend + two * np.outer(slope, slope)


def correlation(log_odds: float, least: float) -> float:
    """The correlation that has these."""
    share = 1 / (1 + np.exp(-2 * np.abs(log_odds)))
    share = share if log_odds > 0 else 1 - share
    return float(least + (1 - least) * share)


def near(x: np.ndarray, held: tuple[Eliminated, ...]) -> tuple[Eliminated, ...]:
    """The same with hints from x."""
    y, at = solved(x, held), [own.place for own in held]
    if not np.isfinite(y).all():
        return held
    return tuple(
        own._replace(hint=float(y[own.place]), slopes=tuple(measure(y, own).slope[at].tolist()))
        for own in held
    )


def solved(x: np.ndarray, held: Sequence[Eliminated]) -> np.ndarray:
    """y at x; NaN in the places of coordinates that were not found.

    By Newton's method with derivatives that are updated as Broyden does (1965, Mathematics of
    Computation 19:577), in steps that bring what is held nearer.
    """
    if not held:
        return x
    at = [own.place for own in held]
    target, y = x[at], x.copy()
    y[at] = [own.hint for own in held]

    def misses(where: np.ndarray) -> np.ndarray:
        y[at] = where
        found = np.array([_value(y, own) for own in held]) - target
        return np.where(np.isnan(found), np.inf, found)

    def slopes(where: np.ndarray) -> np.ndarray:
        y[at] = where
        return np.array([measure(y, own).slope[at] for own in held])

    known = np.array([own.slopes for own in held]) if held[0].slopes else slopes(y[at])
    hints = np.array([own.hint for own in held])
    y[at] = _root(misses, slopes, hints, known, EXACT * (1 + float(np.max(np.abs(target)))))
    return y


def _root(
    misses: Callable[[Array], Array],
    slopes: Callable[[Array], Array],
    where: np.ndarray,
    known: np.ndarray,
    exact: float,
) -> np.ndarray:
    """Where all is missed by no more than `exact`, or nearly so; NaN if nowhere is found. The
    slopes are `known` at the start, or near it."""
    rest, fresh = misses(where), False
    for _ in range(MOST_STEPS):
        size = float(np.max(np.abs(rest)))
        if size <= exact:
            return where
        step = _step(known, rest)
        for _ in range(HALVINGS):
            moved = misses(where - step)
            if np.max(np.abs(moved)) < size:
                break
            step = step / 2
        else:
            if fresh:
                break
            known, fresh = slopes(where), True
            continue
        update = np.outer(moved - rest + known @ step, -step) / (step @ step)
        known, fresh = known + update, False
        where, rest = where - step, moved
    close = float(np.max(np.abs(rest))) <= NEARLY * exact
    return where if close else np.full(len(where), np.nan)


def _step(slopes: np.ndarray, rest: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(slopes, rest)
    except np.linalg.LinAlgError:
        return np.full(len(rest), np.nan)


def in_held(
    y: np.ndarray, slope: np.ndarray, hessian: np.ndarray, held: Sequence[Eliminated]
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (k,) and Hessian (k, k) in x of a function, from those in y."""
    if not held:
        return slope, hessian
    found, at = [measure(y, own) for own in held], [own.place for own in held]
    rows = -np.array([own.slope for own in found])
    across = -rows[:, at]
    rows[:, at] = np.eye(len(at))
    with np.errstate(all="ignore"):
        try:
            turned, weights = np.linalg.solve(across, rows), np.linalg.solve(across.T, slope[at])
        except np.linalg.LinAlgError:
            return slope * np.nan, hessian * np.nan
    moves = np.eye(len(y))
    moves[at] = turned
    bend = hessian - sum(weight * own.bend for weight, own in zip(weights, found, strict=True))
    return slope @ moves, moves.T @ bend @ moves


def choose_places(slopes: np.ndarray, taken: Sequence[int]) -> list[int]:
    """A coordinate to solve for, for each of several numbers with these gradients (j, k): none of
    those `taken`, and such that they determine each other."""
    rest, chosen = slopes.copy(), []
    rest[:, list(taken)] = 0.0
    for row in range(len(rest)):
        chosen.append(int(np.argmax(np.abs(rest[row]))))
        pivot = rest[row] / rest[row, chosen[-1]]
        rest[row + 1 :] -= rest[row + 1 :, chosen[-1:]] * pivot
    return chosen
