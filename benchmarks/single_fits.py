"""Single fits beside lme4, glmm and statsmodels, in one run on one machine.

Answers are compared first; then medians of repeats, and ratios peer / jaxreml. Run with
``pip install '.[bench]'`` and R with lme4 and jsonlite on the path; peers that are missing are
left out and named.

    python benchmarks/single_fits.py [--quick] [--json FILE]
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
import warnings
from pathlib import Path

import jax
from common import for_r, have_r, header, machine, median_ms, row, run_r, version

import jaxreml
from jaxreml.status import Status

MODELS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "dyestuff": "Yield ~ 1 + (1 | Batch)",
    "orthodont": "distance ~ age * Sex + (age | Subject)",
    "cake": "angle ~ recipe * temp + (1 | recipe:replicate)",
    "pastes": "strength ~ 1 + (1 | batch/cask)",
    "penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
}
STATSMODELS = {  # what MixedLM's own grammar can say
    "sleepstudy": ("Reaction ~ Days", "Subject", "~ Days"),
    "dyestuff": ("Yield ~ 1", "Batch", None),
    "orthodont": ("distance ~ age * Sex", "Subject", "~ age"),
}
SLEEP = MODELS["sleepstudy"]


def run_jaxreml(name: str, data, repeats: int) -> dict[str, float]:
    formula = MODELS[name]
    start = time.perf_counter()
    fit = jaxreml.fit(formula, data)
    compiled = time.perf_counter() - start
    with jax.enable_x64(True):
        design = jax.tree.map(jax.numpy.asarray, jaxreml.design(formula, data))
        assert int(jaxreml.estimate(design).status) == Status.CONVERGED
        prepared = median_ms(
            lambda: jaxreml.estimate(design).criterion.block_until_ready(), repeats, 50
        )
    return {
        "criterion": fit.criterion,
        "first": compiled * 1e3,
        "prepared": prepared,
        "fit": median_ms(lambda: jaxreml.fit(formula, data), repeats),
    }


def run_lme4(tables: dict, repeats: int, folder: Path) -> dict:
    models = [
        {"name": name, "formula": MODELS[name], **for_r(data, folder / f"{name}.csv")}
        for name, data in tables.items()
    ]
    task = {"models": models, "n": repeats}
    return run_r(Path(__file__).with_suffix(".R"), task, folder)


def run_glmm(name: str, data, repeats: int) -> dict[str, float]:
    import glmm

    def call(satterthwaite: bool):
        return glmm.fit(data, MODELS[name], satterthwaite=satterthwaite)

    return {
        "criterion": -2 * call(False).loglik,
        "fit": median_ms(lambda: call(False), repeats),
        "fit with df": median_ms(lambda: call(True), repeats),
    }


def run_statsmodels(name: str, data, repeats: int) -> dict[str, float]:
    import statsmodels.formula.api as smf

    fixed, group, effects = STATSMODELS[name]

    def call():
        model = smf.mixedlm(fixed, data, groups=data[group].astype(str), re_formula=effects)
        return model.fit(reml=True)

    return {"sigma2": float(call().scale), "fit": median_ms(call, max(repeats // 4, 2), 1)}


def whole_processes(repeats: int, folder: Path) -> dict[str, list[float]]:
    """Seconds from start to printed summary, the contestants taking turns."""
    executable = Path(sys.executable).with_name("jaxreml")
    csv = folder / "sleepstudy.csv"
    read = f"import pandas as pd; d = pd.read_csv({str(csv)!r}, dtype={{'Subject': str}});"
    r_fit = "print(summary(lmer(Reaction ~ Days + (Days | Subject), sleepstudy)))"
    ours = [str(executable), "fit", "sleepstudy", SLEEP]
    contestants = {
        "jaxreml, warm cache": ours,
        "jaxreml, cold cache": ours,
        "R, lme4": ["Rscript", "-e", f"library(lme4); {r_fit}"],
        "R, lmerTest": ["Rscript", "-e", f"library(lmerTest); {r_fit}"],
        "glmm": [
            sys.executable,
            "-c",
            f"{read} import glmm; print(glmm.fit(d, {SLEEP!r}).summary())",
        ],
        "statsmodels": [
            sys.executable,
            "-c",
            f"{read} import statsmodels.formula.api as smf;"
            "print(smf.mixedlm('Reaction ~ Days', d, groups=d['Subject'], re_formula='~ Days')"
            ".fit().summary())",
        ],
    }
    warm = folder / "warm"
    subprocess.run(
        ours, env={**os.environ, "XDG_CACHE_HOME": str(warm)}, check=True, capture_output=True
    )
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(repeats):
        for name, command in contestants.items():
            cache = folder / f"cold{k}" if "cold" in name else warm
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode == 0:
                times[name].append(time.perf_counter() - start)
    return {name: values for name, values in times.items() if values}


def ms(value: float | None, base: float | None = None) -> str:
    if value is None:
        return "-"
    text = f"{value:.3g} ms"
    return text if base is None else f"{text} ({value / base:.3g}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, help="write raw figures there")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else 21
    warnings.simplefilter("ignore")
    tables = {name: jaxreml.datasets.load(name) for name in MODELS}
    folder = Path(tempfile.mkdtemp())
    ours = {name: run_jaxreml(name, data, repeats) for name, data in tables.items()}
    r = run_lme4(tables, repeats, folder) if have_r() else None
    lme4 = r["results"] if r else {}
    glmm = (
        {name: run_glmm(name, data, repeats) for name, data in tables.items()}
        if version("glmm")
        else {}
    )
    stats = (
        {name: run_statsmodels(name, tables[name], repeats) for name in STATSMODELS}
        if version("statsmodels")
        else {}
    )
    names = ("jaxreml", "jax", "jaxlib", "glmm", "statsmodels", "numpy")
    print(machine(names, r["version"] if r else None) + "\n")

    print("Criterion above jaxreml's (REML, -2 log-likelihood); a peer off by 1e-4 is marked !\n")
    header("model", "jaxreml", "lme4", "glmm")
    for name in MODELS:
        base = ours[name]["criterion"]
        gaps = [
            peer[name]["criterion"] - base if name in peer else float("nan")
            for peer in (lme4, glmm)
        ]
        cells = [f"{gap:+.1e}{' !' if abs(gap) > 1e-4 else ''}" for gap in gaps]
        row(name, f"{base:.6f}", *cells)
    print("\nOne fit, compiled and warm; in brackets the ratio to jaxreml's `fit` beside it "
          "(prepared arrays: `estimate`, with standard errors of the log-variances)\n")  # fmt: skip
    header(
        "model", "estimate", "fit", "first fit", "lmer", "refit", "glmm", "glmm with df", "MixedLM"
    )
    for name in MODELS:
        mine = ours[name]
        base = mine["fit"]
        a, b, c = lme4.get(name, {}), glmm.get(name, {}), stats.get(name, {})
        row(
            name, ms(mine["prepared"]), ms(base), ms(mine["first"]),
            ms(a.get("fit"), base), ms(a.get("refit"), base),
            ms(b.get("fit"), base), ms(b.get("fit with df"), base), ms(c.get("fit"), base),
        )  # fmt: skip
    prepared, peer = ours["sleepstudy"]["prepared"], glmm.get("sleepstudy", {}).get("fit")
    print(f"\nTarget: sleepstudy, prepared arrays <= 0.3 ms: {ms(prepared)}"
          + (f"; glmm takes {peer / prepared:.1f} x as long" if peer else ""))  # fmt: skip
    if lme4:
        ratio = ours["sleepstudy"]["fit"] / lme4["sleepstudy"]["fit"]
        print(f"Target: fit() from a dataframe <= lmer: {ratio:.2f} x lmer")

    processes = whole_processes(5 if arguments.quick else 15, folder)
    print("\nWhole process, sleepstudy, start to printed summary\n")
    header("process", "median", "fastest", "ratio to R with lme4")
    base = statistics.median(processes["R, lme4"]) if "R, lme4" in processes else float("nan")
    for name, values in processes.items():
        middle = statistics.median(values)
        row(name, f"{middle:.2f} s", f"{min(values):.2f} s", f"{middle / base:.2f}")
    print("\nTargets: warm <= 1.5, cold <= 3")
    if arguments.json:
        raw = {"jaxreml": ours, "lme4": lme4, "glmm": glmm, "statsmodels": stats}
        arguments.json.write_text(json.dumps({**raw, "processes": processes}, indent=1))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
