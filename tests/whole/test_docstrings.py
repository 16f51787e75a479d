"""Every public name has an example in its docstring, and every example prints what it says.

Examples are given what stands in docs/api/given.py, which the pages of the reference show: so they
are short, and nothing is fitted for each of them.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
from functools import cache
from pathlib import Path

import pytest

import jaxreml
from jaxreml.inference.fixed.means import MarginalMeans
from jaxreml.inference.likelihood.profile import Profile
from jaxreml.inference.resampling.bootstrap import Bootstrap
from jaxreml.inference.resampling.simulation import Population
from jaxreml.inference.rows.diagnostics import Influence
from jaxreml.inference.selection.deletion import Elimination
from jaxreml.typeset.table import Table

os.environ.setdefault("MPLBACKEND", "Agg")
GIVEN = Path(__file__).parents[2] / "docs" / "api" / "given.py"
CLASSES = [jaxreml.LMMResults, jaxreml.BatchResults, jaxreml.ModeratedResults,
           jaxreml.StreamedResults, MarginalMeans, Profile, Bootstrap, Population, Influence,
           Elimination, Table, jaxreml.Design, jaxreml.Estimate, jaxreml.Images, jaxreml.Voom,
           jaxreml.Status]  # fmt: skip
MODULES = [jaxreml.batches, jaxreml.plots, jaxreml.batch_plots, jaxreml.counts,
           jaxreml.covariance, jaxreml.datasets, jaxreml.kernels, jaxreml.penalties]  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Public in name only: what the rooms of the package use of each other's classes.
INTERNAL = {
    "FittedModel": {"frame", "frame_of", "design", "approximations", "prototype", "henderson",
                    "covariance", "layout", "residual_sds", "residual_between",
                    "require_independent", "require_likelihood",
                    "require_independent_levels",
                    "groups", "labels", "cov_re_arrays", "require_optimum"},
    "Wishart": {"check", "expand", "text", "value"},
    "Gamma": {"check", "expand", "text", "value"},
    "FittedBatch": {"messages", "message_codes"},
    "Design": {"sizes", "written_out", "numbers", "absent", "scaled_factors", "of", "among",
               "with_response", "blank", "combined", "without_names", "omega_of_theta",
               "collapsed", "first_order", "of_type"},
    "Population": {"blocks"},
    "Array": {"columns", "ids", "not_numeric", "read"},
    "Images": {"columns", "ids", "not_numeric", "read"},
}  # fmt: skip
FOR_THE_ROOMS = {"check_counts", "factors_of", "library_sizes", "log_cpm_of", "read_counts"}
NEEDS = {  # packages that are imported, or that `test` does not bring
    "jaxreml.results.annotated": "anndata",
    "jaxreml.sklearn": "sklearn",
    "jaxreml.marginaleffects": "marginaleffects",
    "jaxreml.maketables": "maketables",
    "jaxreml.numpyro": "numpyro",
}
OTHERS = ("sklearn", "marginaleffects", "numpyro")  # modules for other packages


def documented(thing: object) -> object:
    """What has the docstring of a member of a class."""
    if isinstance(thing, property):
        return thing.fget
    return getattr(thing, "func", getattr(thing, "__func__", thing))


def members(kind: type) -> dict[str, object]:
    """The public methods and properties of a class by their names, inherited ones included."""
    found = {}
    for owner in kind.__mro__:
        if owner.__module__.startswith("jaxreml"):
            hidden = INTERNAL.get(owner.__name__, set())
            for name, thing in vars(owner).items():
                own = documented(thing)
                if not name.startswith("_") and inspect.isfunction(own) and name not in hidden:
                    found.setdefault(f"{kind.__name__}.{name}", own)
    return found


def public() -> dict[str, object]:
    found = {}
    for name in jaxreml.__all__:
        thing = getattr(jaxreml, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            found[name] = thing
    for module in MODULES:
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", "").startswith(module.__name__)
            hidden = name.startswith("_") or name in FOR_THE_ROOMS
            if own and inspect.isfunction(thing) and not hidden:
                found[f"{module.__name__}.{name}"] = thing
    for kind in CLASSES:
        found |= {kind.__name__: kind, **members(kind)}
    return found


def of_others() -> dict[str, object]:
    """What `jaxreml.sklearn` and `jaxreml.marginaleffects` have of their own."""
    found = {}
    for module in OTHERS:
        home = importlib.import_module(f"jaxreml.{module}")
        for name, thing in vars(home).items():
            if getattr(thing, "__module__", "") == home.__name__ and not name.startswith("_"):
                found[f"{module}.{name}"] = thing
    return found | members(importlib.import_module("jaxreml.sklearn").MixedRegressor)


def modules_with_examples() -> list[str]:
    """By their text: nothing is imported before a test runs."""
    root = Path(jaxreml.__file__).parent
    names = (path for path in sorted(root.rglob("*.py")) if ">>>" in path.read_text())
    return [
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in names
    ]


@cache
def given() -> dict[str, object]:
    found: dict[str, object] = {"__name__": "__main__"}
    exec(compile(GIVEN.read_text(), str(GIVEN), "exec"), found)
    return found


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Files go to a folder of the example's own; figures and JAX's settings do not stay."""
    import jax
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    caching = ("jax_compilation_cache", "jax_persistent_cache")
    before = {name: value for name, value in jax.config.values.items() if name.startswith(caching)}
    yield
    plt.close("all")
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_print_what_they_say(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in doctest.DocTestFinder().find(importlib.import_module(name), name):
        test.globs |= given()
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).attempted
    assert not report, "".join(report)


def test_every_public_name_has_an_example():
    bare = [name for name, thing in public().items() if ">>>" not in (thing.__doc__ or "")]
    assert not bare


def named_in_the_reference() -> list[str]:
    """The full names that the directives ``{api}`` of docs/api write."""
    text = "".join(path.read_text() for path in sorted(GIVEN.parent.glob("*.md")))
    found = re.findall(r"^```{api} ?(\S*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [f"{owner}.{name}".lstrip(".") for owner, names in found for name in names.split()]


def resolved(name: str) -> object:
    """What a dotted name below jaxreml has its docstring in, before it was wrapped."""
    found = jaxreml
    for part in name.split("."):
        known = inspect.getattr_static(found, part, None) or getattr(found, part, None)
        found = known or importlib.import_module(f"{found.__name__}.{part}")
    own = documented(found)
    return own if inspect.isclass(own) else inspect.unwrap(own)


def test_the_reference_has_every_public_name_once():
    names = named_in_the_reference()
    assert len(set(names)) == len(names)
    written = {id(resolved(name)) for name in names}
    wanted = public() | of_others()
    missing = [
        name
        for name, thing in wanted.items()
        if id(thing if inspect.isclass(thing) else inspect.unwrap(thing)) not in written
    ]
    assert not missing


def test_what_is_for_other_packages_has_examples():
    for package in OTHERS:
        pytest.importorskip(package)
    bare = [name for name, thing in of_others().items() if ">>>" not in (thing.__doc__ or "")]
    assert not bare
