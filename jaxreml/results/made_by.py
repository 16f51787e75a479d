"""Classes that functions make, and people do not: what `help` says of how one is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)


def made_by(what: str) -> Callable[[Kind], Kind]:
    """Show no constructor of a dataclass to readers of `help` and of the documentation.

    It works as before, for `dataclasses.replace`, copies and files; only its signature, of a field
    after the other, is not shown.

    Args:
        what: makes objects of the class, in words.
    """

    def decorate(kind: Kind) -> Kind:
        own: Any = kind.__init__
        own.__signature__ = inspect.Signature(
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        )
        own.__doc__ = f"Not called directly: {what} makes one."
        return kind

    return decorate
