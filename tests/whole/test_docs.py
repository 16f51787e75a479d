"""Pages that promise to be complete are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxreml
from jaxreml import errors

PAGES = Path(__file__).parents[2] / "docs"


def headings(page: str) -> set[str]:
    """The headings of a page."""
    return set(re.findall(r"^#+ (.+)$", (PAGES / page).read_text(), re.MULTILINE))


def exceptions() -> list[str]:
    """Public errors and warnings."""
    public = [name for name in jaxreml.__all__ if hasattr(errors, name)]
    assert "DataError" in public
    return public


@pytest.mark.parametrize("name", [*(status.name for status in jaxreml.Status), *exceptions()])
def test_troubleshooting_has_it(name):
    assert name in headings("trust/troubleshooting.md")


def test_every_exception_is_public():
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert own == set(exceptions())
