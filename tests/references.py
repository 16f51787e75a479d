"""The fits by R in `reference/`: figures and data."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd

from jaxreml import datasets

HERE = Path(__file__).parent / "reference"
NAMES = sorted(path.stem for path in HERE.glob("*.json"))


@functools.cache
def reference(name: str) -> dict[str, Any]:
    """Formula and figures of one model."""
    return json.loads((HERE / f"{name}.json").read_text())


def data(name: str) -> pd.DataFrame:
    """The data of one model."""
    path = HERE / f"{name}.csv.gz"
    if path.exists():
        return pd.read_csv(path, dtype={"Subject": str})
    frame = datasets.load(reference(name)["data"])
    if name == "cake_factor":  # ordered in R; an unordered factor in this model
        frame["temperature"] = frame["temperature"].cat.as_unordered()
    return frame
