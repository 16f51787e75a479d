"""Coefficients of the usual families of contrasts between estimated means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.arguments import numbers
from jaxreml.errors import DataError
from jaxreml.inference.fixed.adjustments import ADJUSTMENTS

ABSENT = 0.01  # values of a polynomial of unit length that are zero
WHOLE = 0.05  # distance from an integer that is rounding


@dataclass(frozen=True)
class Contrasts:
    """A family of contrasts.

    Attributes:
        names: labels, m of them.
        coefficients: (m, k).
        adjust: the adjustment used where none is asked for.
        pairs: whether they are all the pairwise differences.
    """

    names: list[str]
    coefficients: np.ndarray
    adjust: str = "none"
    pairs: bool = False


def family(contrast: str | Mapping[str, Any], labels: Sequence[str]) -> Contrasts:
    """The contrasts of a family among k labelled means.

    Args:
        contrast: "pairwise" (each less every later one), "revpairwise" (each less every earlier
            one), "trt.vs.ctrl" and "trt.vs.ctrlk" (each less the first, the last), "consec" (each
            less the one before), "eff" (each less the mean of all), "poly" (orthogonal polynomials
            in the position, scaled to integers), all as emmeans names and defines them; or a dict
            from labels to k coefficients.
        labels: of the means.

    Raises:
        ValueError: another family, or coefficients that do not match.
        DataError: fewer than two means.
    """
    if isinstance(contrast, Mapping):
        return _custom(contrast, len(labels))
    if contrast not in FAMILIES:
        raise ValueError(
            f"contrast must be one of {', '.join(FAMILIES)} or a dict of coefficients, not "
            f"{contrast!r}" + ("; adjustments go to adjust=" if contrast in ADJUSTMENTS else "")
        )
    if len(labels) < 2:
        raise DataError(
            f"contrasts need two means or more and there is one ({labels[0]}); give values of "
            "covariates by at={...}"
        )
    return FAMILIES[contrast](list(labels))


def _custom(method: Mapping[str, Any], k: int) -> Contrasts:
    names = [str(name) for name in method]
    for name, values in method.items():
        if np.shape(values) != (k,):
            raise ValueError(f"the contrast {name!r} must have {k} coefficients, one per mean")
    if not names:
        raise ValueError("the dict of contrasts is empty")
    return Contrasts(
        names, np.array([numbers(v, f"the contrast {k!r}") for k, v in method.items()])
    )


def _differences(labels: list[str], of: list[tuple[int, int]], **options: Any) -> Contrasts:
    identity = np.eye(len(labels))
    names = [f"{labels[i]} - {labels[j]}" for i, j in of]
    return Contrasts(names, np.array([identity[i] - identity[j] for i, j in of]), **options)


def _pairwise(labels: list[str]) -> Contrasts:
    k = len(labels)
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    return _differences(labels, pairs, adjust="tukey", pairs=True)


def _reverse_pairwise(labels: list[str]) -> Contrasts:
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    return _differences(labels, pairs, adjust="tukey", pairs=True)


def _versus_first(labels: list[str]) -> Contrasts:
    return _differences(labels, [(i, 0) for i in range(1, len(labels))], adjust="dunnettx")


def _versus_last(labels: list[str]) -> Contrasts:
    last = len(labels) - 1
    return _differences(labels, [(i, last) for i in range(last)], adjust="dunnettx")


def _consecutive(labels: list[str]) -> Contrasts:
    return _differences(labels, [(i, i - 1) for i in range(1, len(labels))], adjust="mvt")


def _effects(labels: list[str]) -> Contrasts:
    k = len(labels)
    names = [f"{label} effect" for label in labels]
    return Contrasts(names, np.eye(k) - 1 / k, adjust="BH")


def _polynomials(labels: list[str]) -> Contrasts:
    k = len(labels)
    degree = min(6, k - 1)
    powers = np.vander(np.arange(k) - (k - 1) / 2, degree + 1, increasing=True)
    Q, R = np.linalg.qr(powers)
    columns = (Q * np.sign(np.diagonal(R)))[:, 1:].T
    names = ["linear", "quadratic", "cubic", "quartic", "degree 5", "degree 6"][:degree]
    return Contrasts(names, np.array([_integers(column) for column in columns]))


def _integers(column: np.ndarray) -> np.ndarray:
    """Integers in the ratios of a polynomial's values."""
    column = column / column[column > ABSENT].min()
    gap = np.abs(column - np.rint(column)).max()
    while gap > WHOLE:
        column = column / gap
        gap = np.abs(column - np.rint(column)).max()
    return np.rint(column)


FAMILIES: dict[str, Callable[[list[str]], Contrasts]] = {
    "pairwise": _pairwise,
    "revpairwise": _reverse_pairwise,
    "trt.vs.ctrl": _versus_first,
    "trt.vs.ctrlk": _versus_last,
    "consec": _consecutive,
    "eff": _effects,
    "poly": _polynomials,
}
