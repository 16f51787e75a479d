"""jaxreml: a differentiable likelihood engine for linear mixed models in JAX.

Three levels: `reml_objective` and `ml_objective` (pure scalars of parameters and a `Design`),
`estimate` (pure, from a `Design` to its optimum) and `fit` (a formula and a dataframe to labelled
results); `fit_many` fits one model to many responses.

Names are imported when they are first used: `import jaxreml` itself does not import JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxreml import datasets as datasets
    from jaxreml import hypotheses as hypotheses
    from jaxreml import inference as inference
    from jaxreml import plots as plots
    from jaxreml.batch_results import BatchResults as BatchResults
    from jaxreml.cache import enable_compilation_cache as enable_compilation_cache
    from jaxreml.designs import Design as Design
    from jaxreml.designs import Term as Term
    from jaxreml.designs import stack as stack
    from jaxreml.errors import ConvergenceWarning as ConvergenceWarning
    from jaxreml.errors import DataError as DataError
    from jaxreml.errors import EstimabilityWarning as EstimabilityWarning
    from jaxreml.errors import FormulaError as FormulaError
    from jaxreml.errors import JaxremlError as JaxremlError
    from jaxreml.errors import PrecisionError as PrecisionError
    from jaxreml.estimation import Estimate as Estimate
    from jaxreml.estimation import estimate as estimate
    from jaxreml.frame import design as design
    from jaxreml.inference.comparison import compare as compare
    from jaxreml.inference.power import power as power
    from jaxreml.inference.simulation import population as population
    from jaxreml.many import fit_many as fit_many
    from jaxreml.model import fit as fit
    from jaxreml.objective import ml_objective as ml_objective
    from jaxreml.objective import reml_objective as reml_objective
    from jaxreml.parts import StreamedResults as StreamedResults
    from jaxreml.results import LMMResults as LMMResults
    from jaxreml.status import Status as Status
    from jaxreml.storage import load as load

__version__ = "0.1.0"

_HOMES = {
    "BatchResults": "batch_results",
    "ConvergenceWarning": "errors",
    "DataError": "errors",
    "Design": "designs",
    "EstimabilityWarning": "errors",
    "Estimate": "estimation",
    "FormulaError": "errors",
    "JaxremlError": "errors",
    "LMMResults": "results",
    "PrecisionError": "errors",
    "Status": "status",
    "StreamedResults": "parts",
    "Term": "designs",
    "compare": "inference.comparison",
    "design": "frame",
    "enable_compilation_cache": "cache",
    "estimate": "estimation",
    "fit": "model",
    "fit_many": "many",
    "load": "storage",
    "ml_objective": "objective",
    "population": "inference.simulation",
    "power": "inference.power",
    "reml_objective": "objective",
    "stack": "designs",
}

_MODULES = ("datasets", "hypotheses", "inference", "plots")

__all__ = ["__version__", *_MODULES, *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxreml.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreml' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxreml.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
