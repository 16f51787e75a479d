"""The tables of benchmarks/README.md as frames, so that the page and they cannot differ."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

TEXT = (Path(__file__).resolve().parents[2] / "benchmarks" / "README.md").read_text()


def _cells(line: str) -> list[str]:
    inner = line.strip().strip("|")
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def table(heading: str, number: int = 0) -> pd.DataFrame:
    """A table of the section that a heading opens, by its place in it; indexed by its first
    column."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^\|.*\n)+", section + "\n", re.MULTILINE)
    header, _, *rows = blocks[number].splitlines()
    frame = pd.DataFrame([_cells(row) for row in rows], columns=_cells(header))
    return frame.set_index(frame.columns[0])


def numbers(text: str) -> list[float]:
    """The numbers of a cell."""
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
