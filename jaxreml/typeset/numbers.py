"""How numbers look in a table: as text that is aligned when it is set flush right.

Minus signs are true ones. Numbers with fewer decimals than others of their column are padded with
spaces of the width of a figure, so that points stand under each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIGURE, POINT = "\N{FIGURE SPACE}", "\N{PUNCTUATION SPACE}"
MINUS = "\N{MINUS SIGN}"
MOST = 6  # decimals of a number that is not in powers of ten


def number(value: float, decimals: int) -> str:
    """A number with that many decimals; nothing for NaN; in powers of ten where the most decimals
    that numbers have would show zero.

    Examples:
        >>> number(10.467, 2), number(-0.001, 2), number(float("nan"), 2), number(2e-9, 6)
        ('10.47', '0.00', '', '2.0e−9')
    """
    if np.isnan(value):
        return ""
    sign = MINUS if value < 0 else ""
    if np.isinf(value):
        return f"{sign}\N{INFINITY}"
    text = f"{abs(value):.{decimals}f}"
    zero = float(text) == 0
    if (zero and value != 0 and decimals >= MOST) or abs(value) >= 1e9:
        mantissa, power = f"{abs(value):.1e}".split("e")
        return f"{sign}{mantissa}e{int(power)}".replace("-", MINUS)
    return text if zero else sign + text


def decimals_for(error: float, least: int = 2) -> int:
    """Decimals that show two figures of a standard error, at least `least` of them.

    A number of a thousand and more with its error needs none.

    Examples:
        >>> decimals_for(1.55), decimals_for(0.0032), decimals_for(4200.0)
        (2, 4, 0)
    """
    if not np.isfinite(error) or error <= 0:
        return least
    needed = 1 - int(np.floor(np.log10(error)))
    return 0 if needed <= -2 else min(max(needed, least), MOST)


def padded(texts: Sequence[str], decimals: Sequence[int]) -> list[str]:
    """Texts whose last number has those decimals, padded to have their points aligned."""
    most = max((own for own, text in zip(decimals, texts, strict=True) if text), default=0)
    found = []
    for text, own in zip(texts, decimals, strict=True):
        missing = POINT * (own == 0 and most > 0) + FIGURE * (most - own)
        found.append(text + missing if text and "e" not in text else text)
    return found


def p_value(value: float) -> str:
    """A p-value as journals want it: three decimals, and never zero.

    Examples:
        >>> p_value(0.0234), p_value(3e-6), p_value(1.0)
        ('.023', '< .001', '> .999')
    """
    if np.isnan(value):
        return ""
    if value < 0.001:
        return "< .001"
    if value > 0.999:
        return "> .999"
    return f"{value:.3f}".removeprefix("0")


def column(values: Sequence[float], digits: int | None = None) -> list[str]:
    """Numbers of one column by themselves, with `digits` decimals.

    If left out, whole numbers have none, others two, or more where the smallest would show fewer
    than two figures.

    Examples:
        >>> column([1.0, 12.0]), column([0.5, 10.25])
        (['1', '12'], ['0.50', '10.25'])
    """
    known = np.abs([value for value in values if np.isfinite(value)])
    if digits is None:
        whole = known.size == 0 or np.all(known == np.round(known))
        sizes = known[known > 0]
        digits = 0 if whole else decimals_for(float(sizes.min()))
        if not whole and digits == 0:
            digits = 1
    return [number(float(value), digits) for value in values]


def degrees(values: Sequence[float]) -> list[str]:
    """Degrees of freedom, with one decimal where one of them is not whole."""
    known = np.array([value for value in values if np.isfinite(value)])
    whole = bool(np.all(np.abs(known - np.round(known)) < 1e-6))
    return [number(float(value), 0 if whole else 1) for value in values]


def interval(low: float, high: float, decimals: int) -> str:
    """An interval in brackets; nothing where an end is not known."""
    if np.isnan(low) or np.isnan(high):
        return ""
    return f"[{number(low, decimals)}, {number(high, decimals)}]"
