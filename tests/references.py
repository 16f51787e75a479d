"""The fits by R in `reference/`: figures and data."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxreml import datasets

HERE = Path(__file__).parent / "reference"
NAMES = sorted(path.stem for path in HERE.glob("*.json"))


def table(name: str) -> pd.DataFrame:
    """A data set of `inference/` or of the package, with the factors of the figures."""
    path = HERE / "inference" / f"{name}.csv.gz"
    if path.exists():
        return pd.read_csv(path)
    if name == "empty":  # a cell is
        frame = table("unbalanced")
        return frame[(frame["a"] != "a3") | (frame["b"] != "b2")]
    frame = datasets.load(name.lower())
    if name == "cake":
        frame["temperature"] = frame["temperature"].cat.as_unordered()
    if name == "Dyestuff2":  # of the comparisons
        frame["x"] = np.tile(np.arange(1.0, 6.0), 6)
    return frame


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


@functools.cache
def sequencing() -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Simulated counts, genes by samples; the samples; and what R makes of them."""
    folder = HERE / "counts"
    counts = pd.read_csv(folder / "counts.csv.gz", index_col=0)
    samples = pd.read_csv(folder / "samples.csv", index_col=0)
    return counts, samples, json.loads((folder / "voom.json").read_text())
