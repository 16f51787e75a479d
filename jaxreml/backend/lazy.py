"""JAX, imported when it is first used: what NumPy fits does without it.

Modules take `jax` and `jnp` from here, and make their records known by `record`. Those that need
JAX while they are imported themselves, for its decorators, are imported where JAX works.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
else:

    class _Lazy:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            module = importlib.import_module(self._name)
            make_records_known()
            return getattr(module, attribute)

    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
_waiting: list[Callable[[], Any]] = []


def is_of_jax(value: Any) -> bool:
    """Whether it is an array of JAX's, concrete or traced."""
    return "jax" in sys.modules and isinstance(value, jax.Array)


def when_imported(function: Callable[[], Any]) -> None:
    """Call a function before JAX is first used here."""
    _waiting.append(function)


def record(cls: Class) -> Class:
    """Class decorator: a dataclass whose fields, but for static ones, are leaves for JAX.

    JAX knows it from when it is first used here, or from when the first instance is made with JAX
    imported.
    """
    when_imported(lambda: jax.tree_util.register_dataclass(cls))
    initialise: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(initialise)
    def with_registration(self: Any, *args: Any, **named: Any) -> None:
        make_records_known()
        initialise(self, *args, **named)

    cls.__init__ = with_registration  # type: ignore[misc]
    return cls


def make_records_known() -> None:
    """Make all records known to JAX, if that has been imported."""
    while _waiting and "jax" in sys.modules:
        _waiting.pop()()


def deferred(decorator: Callable[[], Callable[[Function], Any]]) -> Callable[[Function], Function]:
    """A decorator of JAX's, made and applied when the function is first called."""

    def decorate(function: Function) -> Function:
        @functools.lru_cache
        def decorated() -> Any:
            return decorator()(function)

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return decorated()(*args, **named)

        return call  # type: ignore[return-value]

    return decorate
