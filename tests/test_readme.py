"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import jax


def test_python_blocks_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    names: dict = {}
    with jax.enable_x64(False):
        exec(blocks[0], names)
    assert abs(names["slope"]).max() < 1e-6
    assert abs(names["value"] - names["estimate"].criterion) < 1e-9
