"""What follows from a fit: tests, intervals, comparisons, resampling.

Each module takes an `LMMResults`; its methods of the same names lead here. Modules are imported
when they are first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

_MODULES = tuple(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxreml.inference' has no attribute {name!r}")
    return importlib.import_module(f"jaxreml.inference.{name}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
