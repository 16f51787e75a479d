"""Satterthwaite's and Kenward-Roger's tests beside lmerTest and pbkrtest, in one run.

Tables of all coefficients, and what degrees of freedom add to a batch. Compiled: each call has been
made once before on the same shapes.

Run: python benchmarks/degrees_of_freedom.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import for_r, have_r, header, machine, row, run_r, seconds

import jaxreml
from jaxreml.data.frame import covariate_frame
from jaxreml.many.engine import BatchFitter

SLEEP = "Reaction ~ Days + (Days | Subject)"
HERE = Path(__file__).parent


def simulated(n: int) -> pd.DataFrame:
    """Groups of ten with a random slope."""
    rng = np.random.default_rng(n)
    g, x = np.repeat(np.arange(n // 10), 10), rng.normal(size=n)
    y = x + rng.normal(size=n // 10)[g] + 0.5 * rng.normal(size=n // 10)[g] * x
    return pd.DataFrame({"y": y + rng.normal(size=n), "x": x, "g": pd.Categorical(g.astype(str))})


def models(quick: bool) -> dict[str, tuple[str, pd.DataFrame, list[str], list[str]]]:
    """Formula, data, our work and R's."""
    load = jaxreml.datasets.load
    exam = pd.read_csv(HERE.parent / "tests/reference/exam.csv.gz", dtype={"school": "category"})
    exam["sex"] = exam["sex"].astype("category")
    found = {
        "sleepstudy": (SLEEP, load("sleepstudy"), ["satterthwaite", "kr"], None),
        "cake": ("angle ~ recipe*temp + (1 | recipe:replicate)", load("cake"), ["kr"], None),
        "machines": (
            "score ~ Machine + (1 | Worker) + (1 | Worker:Machine)", load("machines"), ["kr"], None,
        ),
        "exam": (
            "normexam ~ standLRT + sex + (standLRT | school)", exam, ["satterthwaite"], None,
        ),
        "n = 3,000": ("y ~ x + (x | g)", simulated(3000), ["kr"], ["kr vcov"]),
        "n = 20,000": ("y ~ x + (x | g)", simulated(20_000), ["kr"], []),
        "insteval": (
            "y ~ service + (1 | s) + (1 | d) + (1 | dept)",
            load("insteval"),
            ["satterthwaite", "kr"],
            ["satterthwaite"],
        ),
    }  # fmt: skip
    if quick:
        found = {name: found[name] for name in ("sleepstudy", "cake", "machines")}
    return {name: (f, d, w, w if r is None else r) for name, (f, d, w, r) in found.items()}


def ours(formula: str, data: pd.DataFrame, work: list[str], repeats: int) -> dict[str, float]:
    """Seconds; the first call of each, which compiles, is given too."""
    calls: dict[str, Any] = {
        "satterthwaite": lambda fit: fit.coefficients(),
        "kr": lambda fit: fit.coefficients("kenward-roger"),
    }
    found: dict[str, float] = {}
    fits = [jaxreml.fit(formula, data) for _ in range(repeats + 1)]  # they cache what they gave
    times = [seconds(lambda: jaxreml.fit(formula, data)) for _ in range(3)]
    found["fit"] = statistics.median(times)
    for name in work:
        call = calls[name]
        found[f"{name}, first"] = seconds(lambda call=call: call(fits[0]))
        found[name] = statistics.median([seconds(lambda f=f, c=call: c(f)) for f in fits[1:]])
    return found


def batched(n: int) -> dict[str, float]:
    """Seconds for `n` responses on the design of sleepstudy, by degrees of freedom."""
    data = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit(SLEEP, data)
    values = fit.simulate(n, seed=2).to_numpy()
    frame = covariate_frame(SLEEP.replace("Reaction", ""), data)
    found = {}
    for df in ("inf", "satterthwaite", "kenward-roger"):
        fitter = BatchFitter(frame, df=df)
        fitter.fit(values)
        found[df] = statistics.median([seconds(lambda f=fitter: f.fit(values)) for _ in range(3)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, fewer repeats")
    parser.add_argument("--json", type=Path, help="write raw figures there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    repeats = 2 if arguments.quick else 5
    folder = Path(tempfile.mkdtemp())
    tasks = models(arguments.quick)
    mine = {name: ours(f, data, work, repeats) for name, (f, data, work, _) in tasks.items()}
    r: dict[str, Any] = {"version": None}
    if have_r():
        task = {
            "models": {
                name: {**for_r(data, folder / f"{k}.csv"), "formula": f, "work": work}
                for k, (name, (f, data, _, work)) in enumerate(tasks.items())
            },
        }
        r = run_r(Path(__file__).with_suffix(".R"), task, folder)
    print(machine(("jaxreml", "jax", "jaxlib", "numpy"), r["version"]) + "\n")
    header("model", "work", "fit", "first call", "jaxreml", "R", "ratio")
    for name, times in mine.items():
        for work in tasks[name][2]:
            taken = times[work]
            peer = r.get(name, {}).get(work)
            cells = [f"{peer:.3g} s", f"{peer / taken:.0f}x"] if peer is not None else ["-", "-"]
            row(name, work, f"{times['fit']:.3g} s", f"{times[f'{work}, first']:.3g} s",
                f"{taken:.3g} s", *cells)  # fmt: skip
    many = batched(2_000 if arguments.quick else 20_000)
    print("\nMany responses on the design of sleepstudy, seconds\n")
    header("degrees of freedom", "seconds", "ratio to none")
    for name, taken in many.items():
        row(name, f"{taken:.2f}", f"{taken / many['inf']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"jaxreml": mine, "R": r, "batched": many}, indent=1))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
