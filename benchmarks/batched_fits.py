"""Many responses on one design: `fit_many` beside lme4 and glmm, in one run on one machine.

Answers are compared first (a sample of the responses, see studies.py), then times and ratios, then
the time to compile, in processes of their own. jaxreml is timed on all responses, from the matrix
in memory to the results with standard errors, design and rotation included, the first call left
out; it may use all cores, and each peer uses the one core that it can. Exits with 1 if jaxreml's
criterion is above the better peer's anywhere, or if dense algebra says that a peer is right.

    python benchmarks/batched_fits.py [--quick] [--no-peers] [--json FILE]
    python benchmarks/batched_fits.py --stream [--stream-responses N] [--folder FOLDER]

`--stream` runs the benchmark of streaming only: a memmap of 500 float64 rows (4 GB with a million
responses, so it does not fit in the memory allowed) to a parquet file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import header, machine, row, seconds
from studies import (
    Study,
    against_peers,
    ask_glmm,
    ask_lme4,
    glmm_calls,
    print_agreement,
    quiet,
    sleepstudy,
    unbalanced,
    voxels,
)

import jaxreml

PACKAGES = ("jaxreml", "jax", "jaxlib", "numpy", "glmm")
STUDIES = {  # study, responses, target
    "sleepstudy": (sleepstudy, 10_000, "<= 10 us; refit >= 1000 x, glmm >= 15 x"),
    "random intercept": (unbalanced, 20_000, "<= 10 us"),
    "random slope": (lambda: unbalanced(slopes=True), 2_000, "refit >= 100 x"),
}
COMPILE_TARGETS = "first call <= 5 s; with a warm cache <= 0.5 s"
STREAM_TARGETS = "peak memory <= 4 GB; time a small multiple of reading the data"
GB = 1e9


def fit_many(study: Study, responses: np.ndarray) -> jaxreml.BatchResults:
    return jaxreml.fit_many(study.formula, study.data, responses)


def time_jaxreml(study: Study, responses: np.ndarray, repeats: int) -> dict[str, Any]:
    first = seconds(lambda: fit_many(study, responses))
    times = [seconds(lambda: fit_many(study, responses)) for _ in range(repeats)]
    count = responses.shape[1]
    return {
        "responses": count,
        "first_s": first,
        "median_us": statistics.median(times) / count * 1e6,
        "best_us": min(times) / count * 1e6,
    }


def time_glmm(study: Study, responses: np.ndarray, repeats: int) -> dict[str, float]:
    times = {}
    with quiet():
        for name, call in (glmm_calls(study, responses) or {}).items():
            call(0)
            count = responses.shape[1]
            loops = [seconds(lambda: [call(i) for i in range(count)]) for _ in range(repeats)]  # noqa: B023
            times[name] = statistics.median(loops) / count * 1e6
    return times


def us(value: float | None, base: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} us" if base is None else f"{value:.3g} us ({value / base:.3g}x)"


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    """Run this script on a task in a fresh process; adds the peaks of its memory."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        for name, value in memory(status).items():
            peaks[name] = max(value, peaks.get(name, 0.0))
        time.sleep(0.05)
    output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"the process for {task['do']} failed with {child.returncode}")
    return {**peaks, **json.loads(output.splitlines()[-1])}


def memory(status: Path) -> dict[str, float]:
    """Memory figures in GB of a process: peak, anonymous, pages of mapped files; Linux only."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines)
    wanted = ("VmHWM", "RssAnon", "RssFile")
    return {k: int(v.split()[0]) * 1024 / GB for k, v in pairs if k in wanted}


def child(task: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does; see `compile_times` and `stream`."""
    if task["do"] == "compile":
        study = STUDIES[task["study"]][0]()
        responses = np.load(task["responses"])
        if task["cache"]:
            jaxreml.enable_compilation_cache(task["cache"])
        jax.block_until_ready(jax.device_put(np.zeros(1)))  # start the backend
        first, second = (seconds(lambda: fit_many(study, responses)) for _ in range(2))
        return {"first": first, "second": second, "compile": first - second}
    block = np.memmap(task["file"], task["dtype"], "r", shape=tuple(task["shape"]))
    if task["do"] == "read":
        total = [0.0]

        def sequential() -> None:
            total[0] = sum(float(line.sum()) for line in block)

        def by_column() -> None:
            step = 8192
            for start in range(0, block.shape[1], step):
                np.array(block[:, start : start + step])

        return {"sequential": seconds(sequential), "by_column": seconds(by_column)}
    study = voxels()
    before = memory(Path("/proc/self/status")).get("VmHWM")
    elapsed = seconds(
        lambda: jaxreml.fit_many(study.formula, study.data, block, output=task["output"])
    )
    peak = memory(Path("/proc/self/status")).get("VmHWM")
    return {"seconds": elapsed, "before": before, "VmHWM": peak}


def compile_times(matrices: dict[str, np.ndarray], repeats: int, folder: Path) -> dict[str, Any]:
    """First call minus second call in fresh processes: no cache, filling one, with that one."""
    results: dict[str, Any] = {}
    for name, responses in matrices.items():
        file = folder / "compile.npy"
        np.save(file, responses)
        runs: dict[str, list[dict]] = {"no cache": [], "filling a cache": [], "warm cache": []}
        for k in range(repeats):
            cache = str(folder / f"cache-{name.replace(' ', '-')}-{k}")
            for kind in runs:
                task = {
                    "do": "compile", "study": name, "responses": str(file),
                    "cache": None if kind == "no cache" else cache,
                }  # fmt: skip
                runs[kind].append(run_child(task))
        results[name] = {
            kind: {
                key: statistics.median(one[key] for one in values)
                for key in ("first", "second", "compile")
            }
            for kind, values in runs.items()
        }
    return results


def stream(responses: int, folder: Path, peers: bool) -> tuple[dict[str, Any], list[str]]:
    """A memmap of many responses to a parquet file, in a process of its own."""
    study = voxels()
    shape, dtype = (len(study.X), responses), np.dtype(float)
    size = shape[0] * responses * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < 1.5 * size + GB:
        raise SystemExit(f"{folder} has {free / GB:.1f} GB left; {1.5 * size / GB + 1:.1f} needed")
    file, output = folder / "responses.dat", folder / "fits.parquet"
    block = np.memmap(file, dtype, "w+", shape=shape)
    step = 10_000
    for k, start in enumerate(range(0, responses, step)):
        stop = min(start + step, responses)
        block[:, start:stop] = study.simulate(stop - start, seed=k)
    block.flush()
    task = {"file": str(file), "shape": shape, "dtype": dtype.name, "output": str(output)}
    reading = run_child({"do": "read", **task})
    figures = run_child({"do": "stream", **task})
    results = jaxreml.BatchResults.read_parquet(output)
    if len(results) != responses:
        raise SystemExit(f"{output} has {len(results)} responses, not {responses}")
    picked = np.unique(np.linspace(0, responses - 1, 50).astype(int))
    sample = np.array(block[:, picked])
    fits = results.fits
    chosen = type(fits)(*(None if part is None else part[picked] for part in fits))
    failed = int(np.sum(fits.status != 0))
    r = ask_lme4([(study, sample)], len(picked), 0, folder) if peers else None
    lme4 = r["results"][study.name] if r else None
    glmm = ask_glmm(study, sample) if peers else None
    agreement = against_peers(study, sample, chosen, lme4, glmm)
    print(machine(PACKAGES, r["version"] if r else None) + f"; {jax.devices()[0].device_kind}\n")
    failures = print_agreement({study.name: agreement})
    failures += [f"{failed} of {responses} responses without an optimum"] if failed else []
    total = figures["seconds"]
    print(f"\n{responses} responses x {shape[0]} rows, {size / GB:.2f} GB of {dtype.name}, from a "
          "memmap to parquet (pages cached where memory allows)\n")  # fmt: skip
    header("what", "figure")
    row("time, compile and set-up included", f"{total:.1f} s")
    row("per response", us(total / responses * 1e6))
    row("reading the data, in order", f"{reading['sequential']:.2f} s "
        f"({total / reading['sequential']:.1f}x)")  # fmt: skip
    row("reading the data, by 8,192 columns", f"{reading['by_column']:.2f} s "
        f"({total / reading['by_column']:.1f}x)")  # fmt: skip
    row("peak resident memory (pages of the memmap included)", f"{figures['VmHWM']:.2f} GB")
    row("before the fit, libraries loaded", f"{figures['before']:.2f} GB")
    row("peak anonymous memory (sampled)", f"{figures.get('RssAnon', float('nan')):.2f} GB")
    row("file written", f"{output.stat().st_size / GB:.3f} GB")
    print(f"\nTarget: {STREAM_TARGETS}")
    raw = {"responses": responses, "bytes": size, "reading": reading, "fitting": figures}
    return {**raw, "agreement": agreement}, failures


def fits(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Answers, times and compile times of the three studies."""
    quick, peers = arguments.quick, not arguments.no_peers
    compared, refits, repeats = (20, 20, 3) if quick else (200, 200, 5)
    studies, matrices = {}, {}
    for name, (make, count, _) in STUDIES.items():
        studies[name] = make()
        matrices[name] = studies[name].simulate(40 if quick else count)
    sets = [(studies[name], matrices[name]) for name in STUDIES]
    r = ask_lme4(sets, compared, refits, folder) if peers else None
    lme4 = r["results"] if r else {}
    ours, glmm, agreement = {}, {}, {}
    for name, study in studies.items():
        responses, sample = matrices[name], matrices[name][:, :refits]
        results = fit_many(study, responses).fits
        answers = ask_glmm(study, sample[:, :compared]) if peers else None
        agreement[name] = against_peers(study, sample, results, lme4.get(name), answers)
        failed = int(np.sum(results.status != 0))
        if failed:
            agreement[name]["failures"].append(f"{failed} responses without an optimum")
        ours[name] = {
            **time_jaxreml(study, responses, repeats),
            "singular": int(np.sum(results.is_singular)),
        }
        glmm[name] = time_glmm(study, sample, min(repeats, 3)) if peers else {}
    print(machine(PACKAGES, r["version"] if r else None) + f"; {jax.devices()[0].device_kind}\n")
    failures = print_agreement(agreement)

    print(f"\nTime per response, median of {repeats} calls after the first on all responses; "
          f"peers: mean of {refits} responses; in brackets the ratio to jaxreml\n")  # fmt: skip
    header("study", "rows", "responses", "singular", "jaxreml", "fastest", "refit", "lmer", "glmm",
           "glmm, native", "target")  # fmt: skip
    for name, (_, _, target) in STUDIES.items():
        mine, r_us, rust = ours[name], lme4.get(name, {}), glmm[name]
        base = mine["median_us"]
        row(
            name, len(studies[name].X), mine["responses"], mine["singular"], us(base),
            us(mine["best_us"]), us(r_us.get("refit_us"), base), us(r_us.get("lmer_us"), base),
            us(rust.get("glmm"), base), us(rust.get("glmm, native"), base), target,
        )  # fmt: skip
    compiled = compile_times(matrices, 1 if quick else 3, folder)
    print("\nCompile: first call minus second in a fresh process; in brackets the first call\n")
    header("study", "no cache", "filling a cache", "warm cache")
    for name, kinds in compiled.items():
        row(name, *(f"{v['compile']:.2f} s ({v['first']:.2f} s)" for v in kinds.values()))
    print(f"\nTarget: {COMPILE_TARGETS}")
    times = {
        name: {key: answer[key] for key in ("lmer_us", "refit_us")} for name, answer in lme4.items()
    }
    return {
        "jaxreml": ours, "lme4": times, "glmm": glmm, "agreement": agreement, "compile": compiled,
    }, failures  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few responses and repeats")
    parser.add_argument("--no-peers", action="store_true", help="time jaxreml only")
    parser.add_argument("--stream", action="store_true", help="only the benchmark of streaming")
    parser.add_argument("--stream-responses", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--folder", type=Path, help="where the files of the run may lie")
    parser.add_argument("--json", type=Path, help="write raw figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.stream:
            count = 2_000 if arguments.quick else arguments.stream_responses
            raw, failures = stream(count, Path(name), not arguments.no_peers)
        else:
            raw, failures = fits(arguments, Path(name))
    if arguments.json:
        arguments.json.write_text(json.dumps({**raw, "failures": failures}, indent=1))
    if failures:
        sys.exit("\n" + "\n".join(f"DISAGREES: {text}" for text in failures))
    reports = [raw["agreement"]] if arguments.stream else raw["agreement"].values()
    if any(report["peers"] for report in reports):
        print("\njaxreml is nowhere above the better peer.")


if __name__ == "__main__":
    main()
