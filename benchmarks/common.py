"""What the benchmark scripts share: versions, medians, tables, and the way to R."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(packages: Iterable[str], lme4: str | None) -> str:
    """One line: the machine and the versions."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}; "
        + "; ".join(f"{name} {version(name)}" for name in packages)
        + f"; lme4 {lme4}"
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ms(call: Callable[[], object], repeats: int, inner: int = 5) -> float:
    """Median over repeats of the mean of a few calls, after one call to warm up."""
    call()
    times = [seconds(lambda: [call() for _ in range(inner)]) / inner for _ in range(repeats)]
    return statistics.median(times) * 1e3


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def have_r() -> bool:
    return shutil.which("Rscript") is not None


def for_r(data: pd.DataFrame, csv: Path) -> dict[str, Any]:
    """Write a table; returns what the R scripts need to read it with the same factors."""
    data.to_csv(csv, index=False)
    factors = {
        column: [str(level) for level in data[column].cat.categories]
        for column in data.select_dtypes("category")
    }
    return {"csv": str(csv), "factors": factors}


def run_r(script: Path, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an R script on a task in JSON; its standard output is JSON too."""
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    done = subprocess.run(["Rscript", str(script), str(file)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr}")
    return json.loads(done.stdout)
