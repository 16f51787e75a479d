"""Frozen dataclasses of arrays that JAX takes for trees, without importing JAX for them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
_waiting: list[type] = []


def record(cls: Class) -> Class:
    """Class decorator: a dataclass whose fields, but for static ones, are leaves for JAX.

    It is made known to JAX when the first of its instances is made with JAX imported, at the
    latest: before any program can be given one.
    """
    _waiting.append(cls)
    initialise: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(initialise)
    def with_registration(self: Any, *args: Any, **named: Any) -> None:
        if _waiting and "jax" in sys.modules:
            register_records()
        initialise(self, *args, **named)

    cls.__init__ = with_registration  # type: ignore[misc]
    return cls


def leaves(tree: Any) -> Iterator[Any]:
    """The arrays of a record or tuple of such, those of JAX's trees."""
    if is_dataclass(tree):
        own = [getattr(tree, f.name) for f in fields(tree) if not f.metadata.get("static")]
    elif isinstance(tree, tuple):
        own = list(tree)
    else:
        own = []
        if tree is not None:
            yield tree
    for part in own:
        yield from leaves(part)


def register_records() -> None:
    """Make all records known to JAX."""
    import jax

    while _waiting:
        jax.tree_util.register_dataclass(_waiting.pop())
