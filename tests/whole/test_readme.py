"""The README's Python runs as it stands, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks:
            exec(block, names)
    plt.close("all")
    assert abs(names["slope"]).max() < 1e-6
    assert abs(names["value"] - names["estimate"].criterion) < 1e-9
    assert names["results"].converged.all() and len(names["results"]) == 200
    said = re.search(r'fit.report\("Days"\)  # (.*)', TEXT)
    assert said and repr(names["fit"].report("Days")) == said[1]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_links_lead_somewhere(link):
    path, _, anchor = link.partition("#")
    if not path.startswith("http"):
        assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path / "README.md").read_text(), re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]
