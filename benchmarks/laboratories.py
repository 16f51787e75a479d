"""Batches as laboratories run them: weights of every gene and sample, a SNP for every fit, voxels
from disk to disk, what follows a batch. lme4 does a few fits of the first two in a loop, in the
same run, and criteria are compared first.

Times are of the first call, in a process that has imported jaxreml and done nothing.

    python benchmarks/laboratories.py [--genes 20000] [--snps 50000] [--voxels 500000]
        [--reference 50] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import for_r, have_r, header, machine, row, run_r, seconds

import jaxreml

PARTS = ["genes", "dream", "snps", "voxels", "after"]
WORSE = 1e-6  # jaxreml's criterion may not exceed lme4's by more


def genes(count: int) -> dict[str, Any]:
    """200 samples of 50 donors, p = 6, a weight for every gene and sample."""
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(50), 4)
    n = codes.size
    table = {"donor": codes.astype(str), "age": rng.normal(size=50)[codes]}
    table |= {"sex": rng.integers(0, 2, 50)[codes], "time": np.tile(np.arange(4), 50)}
    table |= {name: rng.normal(size=n) for name in ("x", "z")}
    values = rng.normal(size=(n, count))
    values += rng.normal(size=(50, count))[codes] * rng.choice([0, 0.5, 1], count)
    return {
        "data": pd.DataFrame(table),
        "formula": "~ age + sex + time + x + z + (1 | donor)",
        "responses": values,
        "own": rng.lognormal(0, 0.5, (n, count)),
        "weights": True,
    }


def snps(count: int) -> dict[str, Any]:
    """2,000 people in 500 families, one phenotype, a SNP for every fit."""
    rng = np.random.default_rng(2)
    codes = np.repeat(np.arange(500), 4)
    n = codes.size
    data = pd.DataFrame({"family": codes.astype(str), "age": rng.normal(size=n)})
    return {
        "data": data,
        "formula": "~ age + X + (1 | family)",
        "responses": (rng.normal(size=n) + rng.normal(size=500)[codes])[:, None],
        "own": rng.binomial(2, rng.uniform(0.05, 0.5, count), (n, count)).astype(np.int8),
        "weights": False,
    }


def fitted(study: dict[str, Any]) -> Any:
    """All fits of a study."""
    own = {"weights": study["own"]} if study["weights"] else {"covariates": {"X": study["own"]}}
    return jaxreml.fit_many(study["formula"], study["data"], study["responses"], **own)


def by_lme4(study: dict[str, Any], few: int, *, tests: bool = False) -> dict[str, Any]:
    """The first few of them in a loop; with `tests` by lmerTest, as dream does it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"own": study["own"], "responses": study["responses"]}
        for key, matrix in files.items():
            pd.DataFrame(matrix[:, :few]).to_csv(folder / f"{key}.csv", index=False)
        task = for_r(study["data"], folder / "data.csv")
        task |= {key: str(folder / f"{key}.csv") for key in files}
        task |= {"formula": f"y {study['formula']}", "weights": study["weights"], "tests": tests}
        return run_r(Path(__file__).with_suffix(".R"), task, folder)


def compare(name: str, study: dict[str, Any], few: int) -> dict[str, Any]:
    """Time of jaxreml's fits and of lme4's first few, each."""
    count = study["own"].shape[1]
    found: list[Any] = []
    first = seconds(lambda: found.append(fitted(study)))
    again = seconds(lambda: fitted(study))
    results = found[0]
    mine = {"first": first / count, "again": again / count}
    mine["converged"] = float(results.converged.mean())
    peer = by_lme4(study, few) if have_r() else None
    ratio = "-"
    if peer:
        above = results.criterion.to_numpy()[:few] - np.array(peer["criterion"])
        if above.max() > WORSE:
            raise SystemExit(f"{name}: a criterion is {above.max():.1e} above lme4's")
        mine["lme4"] = peer["seconds"] / few
        ratio = f"{mine['lme4'] / mine['first']:.0f}"
    row(name, f"{1e6 * mine['first']:.0f}", f"{1e6 * mine['again']:.0f}", ratio)
    mine["version"] = peer and peer["version"]
    return mine


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dream(count: int) -> dict[str, Any]:
    """Weighted fits with Satterthwaite's t tests of so many genes: what dream does by lmerTest."""
    study = genes(count)
    found: list[Any] = []
    first = seconds(lambda: found.append(fitted(study)))
    results = found[0]
    again = seconds(lambda: fitted(study))
    mine, ratio, worst = {"first": first, "again": again}, "-", np.nan
    if have_r():
        peer = by_lme4(study, count, tests=True)
        t = results.tvalues.to_numpy()
        worst = float(np.abs(t - np.array(peer["t"])).max())
        mine |= {"lmerTest": peer["seconds"], "t": worst, "version": peer["version"]}
        ratio = f"{peer['seconds'] / first:.0f}, again {peer['seconds'] / again:.0f}"
    name = f"dream's steps, {count} genes; t differ by {worst:.1e}"
    row(name, f"{1e6 * first / count:.0f}", f"{1e6 * again / count:.0f}", ratio)
    return mine


def scores(study: dict[str, Any]) -> dict[str, Any]:
    """Score tests of the same SNPs."""
    formula, count = study["formula"].replace("X + ", ""), study["own"].shape[1]

    def work() -> None:
        jaxreml.score_tests(formula, study["data"], study["responses"], study["own"])

    first, again = seconds(work) / count, seconds(work) / count
    row("SNPs, score tests", f"{1e6 * first:.1f}", f"{1e6 * again:.1f}", "")
    return {"first": first, "again": again}


def voxels(count: int) -> dict[str, Any]:
    """300 scans of 100 people, from a memory map to parquet."""
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(100), 3)
    n = codes.size
    data = pd.DataFrame({"person": codes.astype(str), "age": rng.normal(size=n)})
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "voxels.npy"
        values = np.lib.format.open_memmap(file, "w+", np.float32, (n, count))
        for k in range(0, count, 20_000):
            part = values[:, k : k + 20_000]
            part[:] = rng.normal(size=part.shape) + rng.normal(size=(100, part.shape[1]))[codes]
        values.flush()
        del values
        before = peak_bytes()
        took = seconds(
            lambda: jaxreml.fit_many(
                "~ age + (1 | person)", data, file, output=Path(name) / "out.parquet"
            )
        )
        more = (peak_bytes() - before) / 2**30
    row(f"{count} voxels x {n} scans, disk to disk", f"{took:.1f} s", f"{more:.2f} GiB more", "")
    return {"seconds": took, "gib": more}


def afterwards(results: Any) -> dict[str, Any]:
    """Moderation, variance fractions and a top table."""
    coefficient = results.model.fixed_names[-1]

    def work() -> None:
        results.moderated(trend=True).top_table(coefficient, q_value=True)
        results.variance_fractions()

    took = seconds(work)
    row(f"moderation, fractions, top table of {len(results)}", f"{took:.2f} s", "", "")
    return {"seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--snps", type=int, default=50_000)
    parser.add_argument("--voxels", type=int, default=500_000)
    parser.add_argument("--reference", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.only or PARTS
    found: dict[str, Any] = {}
    header("", "us a fit, first call", "again", "lme4 / jaxreml")
    few = arguments.reference
    if "genes" in wanted:
        found["genes"] = compare("genes, own weights", genes(arguments.genes), few)
    if "dream" in wanted:
        found["dream"] = dream(500)
    if "snps" in wanted:
        study = snps(arguments.snps)
        found["snps"] = compare("SNPs, full refit", study, few)
        found["scores"] = scores(study)
    if "voxels" in wanted:
        found["voxels"] = voxels(arguments.voxels)
    if "after" in wanted:
        found["after"] = afterwards(fitted(genes(arguments.genes)))
    versions = [own["version"] for own in found.values() if "version" in own]
    print("\n" + machine(["numpy", "scipy", "jaxreml"], versions[0] if versions else None))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
