"""NumPy or JAX: functions of arrays take the library that their arguments are of.

Both speak the same language but for what stands here and in `model.linalg`: loops, conditions,
scattering, trees of arrays. JAX is imported only where an array of its own is met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

_HOST = (np.ndarray, np.generic, float, int, bool)


def on_host(*arrays: Any) -> bool:
    """Whether all of these are NumPy's, or numbers."""
    for array in arrays:  # noqa: SIM110, a generator takes twice as long
        if not isinstance(array, _HOST):
            return False
    return True


def namespace(*arrays: Any) -> Any:
    """`numpy` if all of these are its own, or numbers; else `jax.numpy`."""
    if on_host(*arrays):
        return np
    import jax.numpy as jnp

    return jnp


def chosen(which: Any, first: Any, second: Any) -> Any:
    """The first of two trees of the same form where `which` holds, the second elsewhere."""
    if isinstance(which, (bool, np.bool_)) or (isinstance(which, np.ndarray) and not which.ndim):
        return first if which else second
    if isinstance(which, np.ndarray):
        if which.all():
            return first
        return mapped(lambda a, b: np.where(which, a, b), first, second)
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda a, b: jnp.where(which, a, b), first, second)


def leaves(tree: Any) -> Iterator[Any]:
    """The arrays of a tree of records, (named) tuples and None."""
    if is_dataclass(tree):
        tree = tuple(getattr(tree, name) for name in _dynamic(type(tree)))
    if isinstance(tree, tuple):
        for part in tree:
            yield from leaves(part)
    elif tree is not None:
        yield tree


@lru_cache
def _dynamic(record: Any) -> tuple[str, ...]:
    return tuple(own.name for own in fields(record) if not own.metadata.get("static"))


def mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """A function of the leaves of trees of records, (named) tuples and None."""
    if first is None:
        return None
    if is_dataclass(first):
        parts = {
            name: mapped(function, *(getattr(tree, name) for tree in (first, *others)))
            for name in _dynamic(type(first))
        }
        return replace(first, **parts)  # pyright: ignore
    if not isinstance(first, tuple):
        return function(first, *others)
    parts = [mapped(function, *parts) for parts in zip(first, *others, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def among(tree: Any, places: np.ndarray) -> Any:
    """Some of the lanes of arrays; those of one lane, which all share, as they are."""

    def some(own: Any) -> Any:
        return own if own.shape[-1] == 1 else own[..., places]

    return mapped(some, tree)


def still(array: Any) -> Any:
    """Without derivatives."""
    if on_host(array):
        return array
    import jax

    return jax.lax.stop_gradient(array)


def still_unless(condition: Any, tree: Any) -> Any:
    """The same numbers, with derivatives of zero unless the condition (a scalar) holds.

    Nothing on the way between two of these matters where it does not hold, NaN neither: a zero
    times NaN is left out by both, forwards by the second and backwards by the first.
    """
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jax.lax.stop_gradient(leaf)), tree)


def sums_by(values: Any, index: Any, count: int) -> Any:
    """Sums of (..., k) over equal entries of `index`, (k,) integers: (..., count)."""
    *front, k = values.shape
    rows = values.reshape(math.prod(front), k)
    if on_host(values, index):
        index = index.astype(np.intp, copy=False)
        sums = [np.bincount(index, row, count) for row in rows]
        return np.array(sums, values.dtype).reshape(*front, count)
    from jax.ops import segment_sum

    if not front:
        return segment_sum(values, index, count)
    return segment_sum(rows.T, index, count).T.reshape(*front, count)
