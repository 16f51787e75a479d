"""What follows from a fit: tests, intervals, comparisons, resampling.

Each module takes a fit; its methods of the same names lead here. ``jaxreml.inference.means`` is
``jaxreml.inference.fixed.means``: modules are found in their folders, and imported when they are
first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
_HOMES = {
    module.name: f"{__name__}.{folder.name}.{module.name}"
    for folder in pkgutil.iter_modules([str(_HERE)])
    for module in pkgutil.iter_modules([str(_HERE / folder.name)])
}


def __getattr__(name: str) -> ModuleType:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreml.inference' has no attribute {name!r}")
    return importlib.import_module(_HOMES[name])


def __dir__() -> list[str]:
    return sorted(_HOMES)
