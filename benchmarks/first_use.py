"""The first minutes with jaxreml beside R: ten small models in a fresh process, one after another.

Each side starts, loads, fits each model once and makes its summary and its table of fixed effects
with Kenward and Roger's degrees of freedom (lmerTest and pbkrtest in R). Criteria are compared
first. No cache on disk is used. R with lmerTest, pbkrtest and jsonlite.

    python benchmarks/first_use.py [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import for_r, have_r, header, machine, row, run_r, seconds

MODELS = [
    ("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
    ("sleepstudy", "Reaction ~ Days + (Days || Subject)"),
    ("sleepstudy", "Reaction ~ Days + (1 | Subject)"),
    ("dyestuff", "Yield ~ 1 + (1 | Batch)"),
    ("pastes", "strength ~ 1 + (1 | batch/cask)"),
    ("penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)"),
    ("machines", "score ~ Machine + (1 | Worker/Machine)"),
    ("machines", "score ~ Machine + (Machine | Worker)"),
    ("cake", "angle ~ recipe * temp + (1 | recipe:replicate)"),
    ("orthodont", "distance ~ age * Sex + (age | Subject)"),
]


def child() -> None:
    """What is timed: prints seconds of imports, of each model's parts, and the criteria."""
    start = time.perf_counter()
    import jaxreml
    from jaxreml import datasets

    fit_function, loaded = jaxreml.fit, time.perf_counter() - start
    found = []
    for name, formula in MODELS:
        data = datasets.load(name)
        begin = time.perf_counter()
        fit = fit_function(formula, data)
        fitted = time.perf_counter() - begin
        fit.summary()
        fit.coefficients(df="kenward-roger")
        whole = time.perf_counter() - begin
        again = seconds(lambda data=data, formula=formula: fit_function(formula, data))
        found.append({"criterion": fit.criterion, "fit": fitted, "all": whole, "again": again})
    print(json.dumps({"import": loaded, "models": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return
    repeats = 1 if options.quick else options.repeats
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    ours, processes, theirs = [], [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--child"], capture_output=True, text=True, env=environment
        )
        processes.append(time.perf_counter() - begin)
        if done.returncode:
            raise SystemExit(done.stderr)
        ours.append(json.loads(done.stdout))
        if have_r():
            theirs.append(by_r())
    best, peer = min(ours, key=total_of), min(theirs, key=total_of) if theirs else None
    print(machine(["jaxreml", "numpy", "jax"], peer and peer["version"]))
    header("model", "first fit, ms", "fit again, ms", "with summary and KR, ms", "R likewise, ms")
    for k, ((name, formula), model) in enumerate(zip(MODELS, best["models"], strict=True)):
        other = ""
        if peer:
            own = peer["models"][k]
            assert abs(own["criterion"] - model["criterion"]) < 1e-4, (name, own, model)
            other = f"{own['fit'] * 1e3:.0f} / {own['again'] * 1e3:.0f} / {own['all'] * 1e3:.0f}"
        numbers = (f"{model[what] * 1e3:.0f}" for what in ("fit", "again", "all"))
        row(f"{name}: {formula}", *numbers, other)
    row("all ten", "", "", f"{total_of(best) * 1e3:.0f}", peer and f"{total_of(peer) * 1e3:.0f}")
    row("whole process", "", "", f"{min(processes):.2f} s", peer and f"{peer['process']:.2f} s")
    if options.json:
        options.json.write_text(json.dumps({"jaxreml": ours, "processes": processes, "R": theirs}))


def total_of(run: dict) -> float:
    return sum(model["all"] for model in run["models"])


def by_r() -> dict:
    """The same in a fresh R."""
    from jaxreml import datasets

    with tempfile.TemporaryDirectory() as folder:
        tables = {
            name: for_r(datasets.load(name), Path(folder) / f"{name}.csv") for name, _ in MODELS
        }
        models = [{"formula": formula, **tables[name]} for name, formula in MODELS]
        begin = time.perf_counter()
        found = run_r(Path(__file__).with_suffix(".R"), {"models": models}, Path(folder))
        return {**found, "process": time.perf_counter() - begin}


if __name__ == "__main__":
    main()
