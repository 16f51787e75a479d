"""Directives of the reference: what docstrings say, as people call it.

``{api}`` takes names of jaxreml, or of one of its classes or modules if that is its argument, and
writes the docstring of each. ``{public-names}`` is a table of all public names.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import jaxreml

# Classes whose constructors people call; other objects are made by functions.
CALLED = {"Images", "Term", "MixedRegressor", "ModelJaxreml"}
OWNER = re.compile(r"^(\s+)(?:fit|results)(?:, )?(.*?): (.*)$")


def resolved(name: str) -> Any:
    """The object that a dotted name below jaxreml means, without calling properties."""
    found: Any = jaxreml
    for part in name.split("."):
        known = inspect.getattr_static(found, part, None) or getattr(found, part, None)
        found = known or importlib.import_module(f"{found.__name__}.{part}")
    return found


def directive_of(name: str) -> str:
    """The directive of autodoc for a name."""
    found = resolved(name)
    if inspect.isclass(found):
        return "autoexception" if issubclass(found, Exception) else "autoclass"
    if isinstance(found, property) or hasattr(found, "func"):
        return "autoproperty"
    owner = name.rpartition(".")[0]
    return "automethod" if owner and inspect.isclass(resolved(owner)) else "autofunction"


def names_in(owner: str, text: str) -> list[str]:
    """The full names below jaxreml that a directive ``{api} owner`` with this content writes."""
    return [f"{owner}.{name}" if owner else name for name in text.split()]


class _Nested(SphinxDirective):
    """A directive that is written as reStructuredText in a page of Markdown."""

    optional_arguments = 1
    has_content = True

    def parsed(self, text: str) -> list[nodes.Node]:
        lines = ["````{eval-rst}", *text.splitlines(), "````"]
        place = nodes.container()
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), 0, place)
        return place.children


class Api(_Nested):
    """``{api} Owner`` with names: their signatures and docstrings."""

    def run(self) -> list[nodes.Node]:
        """What autodoc makes of each."""
        owner = self.arguments[0] if self.arguments else ""
        names = names_in(owner, "\n".join(self.content))
        return self.parsed("\n".join(f".. {directive_of(n)}:: jaxreml.{n}\n" for n in names))


class PublicNames(_Nested):
    """``{public-names}``: a line for each of ``jaxreml.__all__``."""

    def run(self) -> list[nodes.Node]:
        """A table of autosummary."""
        names = sorted((n for n in jaxreml.__all__ if n != "__version__"), key=str.lower)
        rows = "".join(f"   ~jaxreml.{name}\n" for name in names)
        return self.parsed(f".. autosummary::\n   :nosignatures:\n\n{rows}")


def without_owner(lines: list[str]) -> list[str]:
    """A docstring whose Args do not have the fit that a method belongs to."""
    kept: list[str] = []
    skipped = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skipped is not None and line.strip() and indent > skipped:
            continue
        skipped = None
        found = OWNER.match(line)
        if not found:
            kept.append(line)
        elif found[2]:
            kept.append(f"{found[1]}{found[2]}: {found[3]}")
        else:
            skipped = indent
    empty = r"Args:\n(?=\n|\Z|\S)"
    return re.sub(empty, "", "\n".join(kept)).split("\n")


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: methods are called on what is their first argument."""
    if what == "method":
        lines[:] = without_owner(lines)


def on_property(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon, which takes what stands before a colon for the type of a property."""
    if what == "property":
        text = inspect.getdoc(obj) or inspect.getdoc(obj.func)
        read = GoogleDocstring(text or "", app.config, app, "method", name, obj, options)
        lines[:] = str(read).splitlines()


def on_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str | None, str | None]:
    """Classes that people do not call have no signature; nothing says what it returns twice."""
    hidden = what == "class" and name.rpartition(".")[2] not in CALLED
    return ("" if hidden else signature), None


def on_missing(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """A name that is not found where it stands: a public one, or the end of one that is there."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    known = env.domaindata["py"]["objects"]
    elsewhere = node.get("py:module") or node.get("py:class")
    if "." in target or target[0].isupper():
        ends = [name for name in known if name.endswith(f".{target}")]
    elif elsewhere and target.islower() and "_" not in target:  # more often an argument
        ends = []
    else:
        ends = [f"jaxreml.{target}"] if f"jaxreml.{target}" in known else []
    if len({known[name].node_id for name in ends}) != 1:  # names may have second ones
        return None
    found = known[ends[0]]
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, shown, ends[0])


def _returned(self: Any, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """What stands under Returns, as it is: napoleon takes words before a colon for a type."""
    lines = self._dedent(self._consume_to_next_section())
    return [("", "", lines)] if lines else []


GoogleDocstring._consume_returns_section = _returned


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("api", Api)
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    app.connect("autodoc-process-docstring", on_property, priority=600)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("missing-reference", on_missing)
    return {"parallel_read_safe": True}
