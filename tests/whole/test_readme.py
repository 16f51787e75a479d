"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import jax


def test_python_blocks_run():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks:
            exec(block, names)
    assert abs(names["slope"]).max() < 1e-6
    assert abs(names["value"] - names["estimate"].criterion) < 1e-9
    assert names["results"].converged.all() and len(names["results"]) == 200
