"""jaxreml: a differentiable likelihood engine for linear mixed models in JAX.

Three levels: `reml_objective` and `ml_objective` (pure scalars of parameters and a `Design`),
`estimate` (pure, from a `Design` to its optimum) and `fit` (a formula and a dataframe to labelled
results); `fit_many` fits one model to many responses.

The public names stand in ``__init__.pyi``. They are imported when they are first used: `import
jaxreml` itself does not import JAX.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.M)}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreml' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = (
        vars(home)[name]
        if name in vars(home)
        else importlib.import_module(f"{_HOMES[name]}.{name}")
    )
    if _HOMES[name].startswith(("jaxreml.model.", "jaxreml.optimum.")):  # under JAX
        importlib.import_module("jax")
        importlib.import_module("jaxreml.backend.lazy").make_records_known()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
