"""Crossed and nested factors beside lme4 and glmm, in one run on one machine.

InstEval (73,421 ratings, 2,972 students, 1,128 lecturers, 14 departments) in three models, a nested
model of a million rows and a crossed one of two million, whole processes with their peak memory,
and cost against size.

Run: python benchmarks/crossed_fits.py [--quick] [--large] [--sizes] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import for_r, have_r, header, machine, row, run_r, seconds, version

import jaxreml
from jaxreml import Design, Term, estimate
from jaxreml.backend.compilation import quick_compilation

MODELS = {
    "insteval": "y ~ service + (1 | s) + (1 | d) + (1 | dept)",
    "with slopes": "y ~ service + (1 | s) + (1 + service | d) + (1 | dept)",
    "with 28 fixed effects": "y ~ service*dept + (1 | s) + (1 | d)",
}
R_LIMIT = 900  # seconds for lme4 on the large data
HERE = Path(__file__).parent


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """A compiled program and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jax.jit(function, compiler_options=quick_compilation(jax.default_backend()))
    program = program.lower(*arguments).compile()
    return program, time.perf_counter() - start


def run_jaxreml(formula: str, data: Any, repeats: int) -> dict[str, float]:
    first = seconds(lambda: jaxreml.fit(formula, data))
    fit = jaxreml.fit(formula, data)
    whole = np.median([seconds(lambda: jaxreml.fit(formula, data)) for _ in range(repeats)])
    with jax.enable_x64(True):
        design = jax.device_put(jaxreml.design(formula, data).without_names())
        program, _ = compiled(estimate, design)
        times = [seconds(lambda: jax.block_until_ready(program(design))) for _ in range(repeats)]
    return {
        "criterion": fit.criterion,
        "first": first,
        "fit": float(whole),
        "estimate": float(np.median(times)),
        "n_iter": fit.n_iter,
    }


def run_glmm(formula: str, data: Any, repeats: int) -> dict[str, float]:
    import glmm

    fit = glmm.fit(data, formula, satterthwaite=False)
    times = [seconds(lambda: glmm.fit(data, formula, satterthwaite=False)) for _ in range(repeats)]
    return {"criterion": -2 * fit.loglik, "fit": float(np.median(times))}


def peak(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a whole process."""
    lean = [sys.executable, "-S", str(HERE / "peak.py"), *command]
    done = subprocess.run(lean, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found["status"]:
        raise SystemExit(f"{command[0]} failed")
    return found["s"], found["MiB"]


def whole_processes(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    formula = MODELS["insteval"]
    ours = [str(Path(sys.executable).with_name("jaxreml")), "fit", "insteval", formula]
    commands = {"jaxreml, cold cache": ours, "jaxreml, warm cache": ours}
    if have_r():
        call = "library(lme4); print(summary(lmer(" + formula + ", InstEval)))"
        commands["R, lme4"] = ["Rscript", "-e", call]
    if version("glmm"):
        csv = folder / "insteval.csv"
        code = (
            f"import pandas as pd; d = pd.read_csv({str(csv)!r}, dtype=dict.fromkeys("
            f"['s', 'd', 'dept', 'service'], 'str')); import glmm;"
            f"print(glmm.fit(d, {formula!r}).summary())"
        )
        commands["glmm"] = [sys.executable, "-c", code]
    found: dict[str, dict[str, list[float]]] = {name: {"s": [], "MiB": []} for name in commands}
    for k in range(repeats):
        for name, command in commands.items():
            cache = folder / (f"cold{k}" if "cold" in name else "cold0")
            taken, memory = peak(command, {**os.environ, "XDG_CACHE_HOME": str(cache)})
            found[name]["s"].append(taken)
            found[name]["MiB"].append(memory)
    return {
        name: {"s": float(np.median(values["s"])), "MiB": max(values["MiB"])}
        for name, values in found.items()
    }


def nested(n: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Ten rows a pupil, twenty pupils a class, ten classes a school."""
    rng = np.random.default_rng(1)
    pupil = np.repeat(np.arange(n // 10), 10)
    groups = {"pupil": pupil, "klass": pupil // 20, "school": pupil // 200}
    x = rng.normal(size=n)
    y = 0.2 * x + rng.normal(size=n)
    for sd, codes in zip((0.7, 0.4, 0.3), groups.values(), strict=True):
        y += sd * rng.normal(size=codes.max() + 1)[codes]
    return x, y, groups


def power_law(n: int, users: int, items: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """Users and items drawn with probabilities that fall as a power of their rank."""
    rng = np.random.default_rng(2)
    groups = {}
    for name, levels, exponent in (("user", users, 0.9), ("item", items, 0.8)):
        weight = 1 / (np.arange(levels) + 15.0) ** exponent
        drawn = rng.choice(levels, n, p=weight / weight.sum())
        groups[name] = np.unique(drawn, return_inverse=True)[1].reshape(n)
    x = rng.normal(size=n)
    y = 0.2 * x + rng.normal(size=n)
    for sd, codes in zip((0.6, 0.5), groups.values(), strict=True):
        y += sd * rng.normal(size=codes.max() + 1)[codes]
    return x, y, groups


def run_arrays(data: tuple[np.ndarray, np.ndarray, dict], repeats: int = 1) -> dict[str, float]:
    """Seconds to prepare, compile and estimate; median over repeats of the last."""
    x, y, groups = data
    X = np.column_stack([np.ones_like(x), x])
    with jax.enable_x64(True):
        start = time.perf_counter()
        design = Design.from_arrays(y, X, [Term(codes, name=g) for g, codes in groups.items()])
        prepare = time.perf_counter() - start
        design = jax.device_put(design.without_names())
        program, compile_time = compiled(estimate, design)
        found = jax.block_until_ready(program(design))
        times = [seconds(lambda: jax.block_until_ready(program(design))) for _ in range(repeats)]
    assert int(found.status) == 0
    return {
        "criterion": float(found.criterion),
        "work": work(design),
        "prepare": prepare,
        "compile": compile_time,
        "estimate": float(np.median(times)),
    }


LARGE = {
    "nested, 1,000,000 rows": (
        "nested(1_000_000)",
        "y ~ x + (1 | pupil) + (1 | klass) + (1 | school)",
    ),
    "crossed, 2,000,000 rows": (
        "power_law(2_000_000, 200_000, 3_000)",
        "y ~ x + (1 | user) + (1 | item)",
    ),
}


def run_large(folder: Path, with_r: bool) -> dict[str, dict[str, Any]]:
    """Each in a process of its own, for its peak memory."""
    results: dict[str, dict[str, Any]] = {}
    for name, (make, formula) in LARGE.items():
        out = folder / "large.json"
        code = (
            f"import sys, json; sys.path.insert(0, {str(HERE)!r}); import crossed_fits as c;"
            f"json.dump(c.run_arrays(c.{make}), open({str(out)!r}, 'w'))"
        )
        taken, memory = peak([sys.executable, "-c", code], dict(os.environ))
        results[name] = {**json.loads(out.read_text()), "process": taken, "MiB": memory}
        if with_r:
            x, y, groups = eval(make)
            import pandas as pd

            frame = pd.DataFrame({"x": x, "y": y, **groups})
            task = {
                **for_r(frame.astype(dict.fromkeys(groups, "category")), folder / "large.csv"),
                "models": {"one": formula},
                "n": 1,
            }
            (folder / "task.json").write_text(json.dumps(task))
            try:
                done = subprocess.run(
                    ["Rscript", str(HERE / "crossed_fits.R"), str(folder / "task.json")],
                    capture_output=True,
                    text=True,
                    timeout=R_LIMIT,
                )
                ok = done.returncode == 0
                results[name]["lme4"] = json.loads(done.stdout)["results"]["one"] if ok else None
            except subprocess.TimeoutExpired:
                results[name]["lme4"] = {"fit": f"> {R_LIMIT} s"}
    return results


def work(design: Design) -> float:
    """Operations per evaluation in theory, up to a factor: sums over couplings and over pairs of
    them, and the factorisation of the tail, whose operations take a 40th of the time."""
    structure = design.structure
    listed = [stage.pairs for stage in structure.stages if stage.pairs is not None]
    sums = [stage.level.size for stage in structure.stages]
    sums += [pairs.cells.shape[0] for pairs in listed]
    levels = [stage.n_levels for stage in structure.stages]
    return sum(sums) + 10 * sum(levels) + len(structure.rest) ** 3 / 40


def cost_against_size(path: Path) -> dict[str, list[list[float]]]:
    """Per size: seconds per fit and `work`; by rows, levels of the one factor and the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = {
        "rows": (
            lambda n: power_law(n, 5_000, 300),
            (50_000, 100_000, 200_000, 400_000, 800_000),
        ),
        "levels of the factor eliminated": (
            lambda users: power_law(10 * users, users, 300),
            (5_000, 10_000, 20_000, 40_000, 80_000),
        ),
        "levels of the other factor": (
            lambda items: power_law(200_000, 20_000, items),
            (200, 400, 800, 1600, 3200),
        ),
        "levels of the finest factor, nested": (
            lambda levels: nested(10 * levels),
            (5_000, 10_000, 20_000, 40_000, 80_000),
        ),
    }
    series = {}
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), constrained_layout=True)
    for axis, (name, (make, sizes)) in zip(axes.flat, tasks.items(), strict=True):
        found = [run_arrays(make(size), 3) for size in sizes]
        times = np.array([one["estimate"] for one in found])
        theory = np.array([one["work"] for one in found])
        axis.loglog(sizes, times, "o-", label="measured")
        axis.loglog(sizes, times[-1] * theory / theory[-1], "--", label="theory, scaled")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set(xlabel=name, ylabel="seconds per fit", ylim=(5e-3, 20))
        axis.legend(frameon=False)
        series[name] = [list(one) for one in zip(sizes, times, theory, strict=True)]
    figure.savefig(path, dpi=110)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, the first model only")
    parser.add_argument("--large", action="store_true", help="the simulated large data too")
    parser.add_argument("--no-large-r", action="store_true", help="without lme4 on the large data")
    parser.add_argument("--sizes", action="store_true", help="cost against size, with a plot")
    parser.add_argument("--json", type=Path, help="write raw figures there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    repeats = 1 if arguments.quick else 5
    models = dict(list(MODELS.items())[:1]) if arguments.quick else MODELS
    folder = Path(tempfile.mkdtemp())
    data = jaxreml.datasets.load("insteval")
    ours = {name: run_jaxreml(formula, data, repeats) for name, formula in models.items()}
    glmm = (
        {name: run_glmm(formula, data, repeats) for name, formula in models.items()}
        if version("glmm")
        else {}
    )
    factors = for_r(data, folder / "insteval.csv")
    task = {**factors, "models": models, "n": 1}
    r = run_r(Path(__file__).with_suffix(".R"), task, folder) if have_r() else None
    lme4 = r["results"] if r else {}
    names = ("jaxreml", "jax", "jaxlib", "glmm", "numpy")
    print(machine(names, r["version"] if r else None) + "\n")
    print("InstEval, REML: criterion above ours; seconds, in brackets how many times as long as "
          "`estimate` on prepared arrays\n")  # fmt: skip
    header("model", "iterations", "lme4 above", "glmm above", "estimate", "fit", "first fit",
           "lmer", "glmm")  # fmt: skip
    for name, mine in ours.items():
        base = mine["estimate"]
        gaps, times = [], []
        for peer in (lme4, glmm):
            found = peer.get(name)
            gaps.append(f"{found['criterion'] - mine['criterion']:+.1e}" if found else "-")
            times.append(f"{found['fit']:.2f} ({found['fit'] / base:.1f}x)" if found else "-")
        row(name, mine["n_iter"], *gaps, f"{base:.2f}", f"{mine['fit']:.2f}",
            f"{mine['first']:.2f}", *times)  # fmt: skip
    processes = whole_processes(folder, 1 if arguments.quick else 3)
    print("\nWhole process, InstEval, start to printed summary\n")
    header("process", "seconds", "ratio to R with lme4", "peak MiB")
    base = processes.get("R, lme4", {}).get("s", float("nan"))
    for name, values in processes.items():
        row(name, f"{values['s']:.2f}", f"{values['s'] / base:.2f}", f"{values['MiB']:.0f}")
    large = run_large(folder, have_r() and not arguments.no_large_r) if arguments.large else {}
    if large:
        print("\nSimulated, seconds\n")
        header("data", "prepare", "compile", "estimate", "peak MiB", "lmer", "lme4 above")
        for name, found in large.items():
            peer = found.get("lme4") or {}
            gap = peer.get("criterion")
            row(name, f"{found['prepare']:.2f}", f"{found['compile']:.2f}",
                f"{found['estimate']:.2f}", f"{found['MiB']:.0f}", peer.get("fit", "-"),
                f"{gap - found['criterion']:+.1e}" if gap is not None else "-")  # fmt: skip
    sizes = cost_against_size(HERE / "crossed_cost.png") if arguments.sizes else {}
    for name, points in sizes.items():
        print(f"\n{name}: " + ", ".join(f"{size:,.0f}: {taken:.3f} s" for size, taken, _ in points))
    if arguments.json:
        raw = {"jaxreml": ours, "lme4": lme4, "glmm": glmm, "processes": processes}
        arguments.json.write_text(json.dumps({**raw, "large": large, "sizes": sizes}, indent=1))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
