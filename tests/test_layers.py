"""Imports go down the layers of the architecture only, and importing jaxreml sets no JAX flag."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import watchdog

import jaxreml

PACKAGE = Path(jaxreml.__file__).parent
# From the top down; a module may import what stands below it.
LAYERS = [
    {"cli"},
    {"cli_tables"},
    {"plots"},
    {"inference", "diagnostics", "prediction"},
    {"many"},
    {"first_order", "model", "parts", "processes"},
    {"batch_storage"},
    {"storage"},
    {"batch_tables", "tables"},
    {"batch_results"},
    {"results"},
    {"fitted"},
    {"batch", "responses"},
    {"programs"},
    {"screening"},
    {"effects"},
    {"satterthwaite"},
    {"estimation", "kenward_roger"},
    {"rivals"},
    {"newton", "objective", "prototype"},
    {"frame", "shared", "sources"},
    {"grouping"},
    {"encoding", "labels"},
    {"evaluation"},
    {"designs", "estimability", "formula", "hypotheses", "tabular", "transforms"},
    {"columns"},
    {"structures", "units"},
    {"covariance"},
    {"linalg"},
    {"devices"},
    {"cache", "datasets", "errors", "runtime", "status"},
]
HEIGHT = {name: -k for k, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Modules of jaxreml that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "jaxreml" else {node.module}
    return {name.split(".")[1] for name in found if name.startswith("jaxreml.")}


def test_imports_go_down():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name == "__init__":
            continue
        for other in imports(path) - {name}:
            assert HEIGHT[other] < HEIGHT[name], f"{path.name} imports {other}"


def test_import_is_cheap_and_sets_no_flag():
    code = (
        "import sys, jaxreml; jaxreml.inference;"
        "assert 'jax' not in sys.modules and 'pandas' not in sys.modules;"
        "jaxreml.fit; jaxreml.estimate; import jax;"
        "assert not jax.config.jax_enable_x64 and jax.config.jax_compilation_cache_dir is None"
    )
    settings = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    watchdog.run(code, check=True, env=settings)


def test_public_names_resolve():
    assert all(getattr(jaxreml, name) is not None for name in jaxreml.__all__)
    assert set(jaxreml.__all__) <= set(dir(jaxreml))


def test_modules_of_inference_are_reached_without_an_import():
    code = "import jaxreml; jaxreml.inference.adjustments.p_values; jaxreml.hypotheses.DF_METHODS"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "anova" in dir(jaxreml.inference)
    with pytest.raises(AttributeError, match=r"jaxreml\.inference.*'nothing'"):
        _ = jaxreml.inference.nothing
