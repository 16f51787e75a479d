"""Imports go down the layers of the architecture only, and importing jaxreml sets no JAX flag."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import watchdog

import jaxreml

PACKAGE = Path(jaxreml.__file__).parent
# The rooms from the top down: a file may import those of its own room and of the rooms below.
ROOMS = [
    {"cli", "maketables", "marginaleffects", "numpyro", "sklearn"},
    {"api"},
    {"results"},
    {"inference"},
    {"many"},
    {"covariance", "fitting", "frame", "penalties"},
    {"data", "optimum"},
    {"model"},
    {"typeset"},
    {"arguments", "backend", "batches", "datasets", "kernels"},
    {"errors", "status"},
]
HEIGHT = {room: -k for k, level in enumerate(ROOMS) for room in level}


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted names, without its own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports in the text of a file, which few of the packages tried here change."""
    kinds = ast.Import, ast.ImportFrom
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere: at its top, in functions, for type checkers."""
    found = set()
    for node in statements(path.read_text()):
        if isinstance(node, ast.Import):
            names = {(alias.name, "") for alias in node.names}
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            names = {(node.module or "", alias.name) for alias in node.names}
        for module, name in names:
            if module.split(".")[0] == "jaxreml" and name != "__version__":
                both = f"{module}.{name}".removeprefix("jaxreml").strip(".")
                found.add(both if both in known else module.removeprefix("jaxreml").strip("."))
    return found


def faults(package: Path) -> list[str]:
    """Imports that go up, and circles."""
    known = modules(package)
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    found = []
    for name, others in graph.items():
        room = name.split(".")[0]
        for other in others:
            above = other.split(".")[0]
            if not room or above == room:
                continue
            if room == "cli" and not above:
                continue  # the command line uses the public names
            if not above or HEIGHT[above] >= HEIGHT[room]:
                found.append(f"{name} imports {other or 'the public names'}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def test_imports_go_down():
    assert not faults(PACKAGE)


@pytest.mark.parametrize(
    "file, line, fault",
    [
        (
            "model/units.py",
            "from jaxreml.optimum import newton",
            "model.units imports optimum.newton",
        ),
        (
            "model/units.py",
            "def f():\n    import jaxreml.cli.commands",
            "model.units imports cli.commands",
        ),
        (
            "data/formula.py",
            "if 0:\n    from jaxreml import fit",
            "data.formula imports the public",
        ),
        ("data/formula.py", "from jaxreml.data import frame", "a circle: "),
        ("data/formula.py", "from jaxreml.optimum import newton", "formula imports optimum.newton"),
    ],
)
def test_a_fault_is_found(tmp_path, file, line, fault):
    copy = shutil.copytree(PACKAGE, tmp_path / "jaxreml", ignore=shutil.ignore_patterns("*.xz"))
    path = copy / file
    path.write_text(path.read_text() + line + "\n")
    assert any(fault in found for found in faults(copy))


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
    code = "import jaxreml; jaxreml.inference.adjustments.p_values; jaxreml.inference.wald.test"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "anova" in dir(jaxreml.inference)
    with pytest.raises(AttributeError, match=r"jaxreml\.inference.*'nothing'"):
        _ = jaxreml.inference.nothing
