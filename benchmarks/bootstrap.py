"""Parametric bootstrap of sleepstudy beside lme4's bootMer, in one run on one machine.

Standard errors are compared first; then medians of repeats, compiled, with what is spent on
simulated responses, on refits and on the statistics and their table. bootMer refits fewer
responses, and its time is scaled up.

    python benchmarks/bootstrap.py [--n 10000] [--reference 1000] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import for_r, have_r, header, machine, row, run_r, seconds

import jaxreml
from jaxreml.inference.resampling.simulation import of_fit
from jaxreml.many.engine import BatchFitter

FORMULA = "Reaction ~ Days + (Days | Subject)"


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def run_jaxreml(data, n: int, repeats: int) -> dict:
    fit = jaxreml.fit(FORMULA, data)
    first = seconds(lambda: fit.bootstrap(n))
    made = fit.bootstrap(n, seed=1)
    people = of_fit(fit)
    engine = BatchFitter(people.frame, fit.method, structure=fit.structure)
    blocks = list(people.blocks(n, 1))

    def refit() -> None:
        for block in blocks:
            engine.fit(block)

    work = {
        "whole": lambda: fit.bootstrap(n),
        "responses": lambda: list(people.blocks(n, 1)),
        "refits": refit,
    }
    for call in work.values():
        call()
    times = {
        name: statistics.median(seconds(call) for _ in range(repeats))
        for name, call in work.items()
    }
    times["cpu"] = statistics.median(cpu_seconds(work["whole"]) for _ in range(repeats))
    errors = made.std_error.iloc[:6].tolist()
    return times | {"first": first, "std_error": errors, "n_failed": made.n_failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--reference", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = jaxreml.datasets.load("sleepstudy")
    n, peer = arguments.n, None
    mine = run_jaxreml(data, n, arguments.repeats)
    if have_r():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            task = for_r(data, folder / "data.csv") | {
                "formula": FORMULA,
                "n": arguments.reference,
                "repeats": min(arguments.repeats, 3),
            }
            peer = run_r(Path(__file__).with_suffix(".R"), task, folder)
        ratio = np.array(mine["std_error"]) / np.array(peer["std_error"])
        tolerance = 4 * 1.2 * np.sqrt(0.5 / n + 0.5 / arguments.reference)
        if np.any(np.abs(ratio - 1) > tolerance):
            raise SystemExit(f"standard errors differ: ratios {ratio.round(3)}")
        scale = n / arguments.reference
        peer |= {"wall": peer["wall"] * scale, "cpu": peer["cpu"] * scale}
    print(machine(["jax", "jaxlib", "numpy"], peer and peer["version"]))
    print(f"\n{FORMULA}: {n} parametric bootstrap draws\n")
    header("", "seconds", "us per draw", "bootMer / jaxreml")
    ratio = f"{peer['wall'] / mine['whole']:.0f}" if peer else "-"
    row("jaxreml, compiled", f"{mine['whole']:.3f}", f"{mine['whole'] / n * 1e6:.1f}", ratio)
    for name in ("responses", "refits"):
        row(f"- {name}", f"{mine[name]:.3f}", f"{mine[name] / n * 1e6:.1f}", "")
    rest = mine["whole"] - mine["responses"] - mine["refits"]
    row("- statistics and table", f"{rest:.3f}", f"{rest / n * 1e6:.1f}", "")
    ratio = f"{peer['cpu'] / mine['cpu']:.0f}" if peer else "-"
    row("jaxreml, processor time", f"{mine['cpu']:.3f}", f"{mine['cpu'] / n * 1e6:.1f}", ratio)
    ratio = f"{peer['wall'] / mine['first']:.0f}" if peer else "-"
    row("jaxreml, first call, with compilation", f"{mine['first']:.2f}", "", ratio)
    if peer:
        row("bootMer", f"{peer['wall']:.1f}", f"{peer['wall'] / n * 1e6:.0f}", "")
    if arguments.json:
        arguments.json.write_text(json.dumps({"jaxreml": mine, "lme4": peer}, indent=1))


if __name__ == "__main__":
    main()
