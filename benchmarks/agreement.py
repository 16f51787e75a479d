"""Does `fit_many` say what lmer, glmm and jaxreml's own single fits say, response by response?

Three checks; exits with 1 if one fails:

- random responses, a third of them singular, against fresh lmer fits (default and tight) and glmm:
  the criterion is never above the better of them by more than 1e-6, and beta and standard errors
  agree; where a peer is above jaxreml, dense algebra decides;
- responses with random missing values against `jaxreml.fit` on the rows that are left;
- a batch with 1% poisoned responses leaves the others as they are, bit for bit.

    python benchmarks/agreement.py [--quick] [--responses 2000] [--missing 500] [--batch 1000]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import header, machine, row
from studies import (
    Study,
    against_peers,
    ask_glmm,
    ask_lme4,
    print_agreement,
    quiet,
    sleepstudy,
    unbalanced,
)

import jaxreml
from jaxreml.status import Status

# Batched against single fits: criterion absolute, beta in units of its SE, the rest relative. An
# optimum is known to the square root of the criterion's precision.
LIMITS = {
    "criterion": 1e-8,
    "beta": 1e-5,
    "se": 1e-5,
    "df": 1e-3,
    "log-variances": 1e-4,
    "log-variance SEs": 1e-4,
}
PATTERNS = 20  # of missing rows that a third of the responses share


def random_responses(
    studies: list[Study], count: int, seed: int, folder: Path
) -> tuple[dict[str, Any], list[str], str | None]:
    sets = [(study, study.simulate(count, seed)) for study in studies]
    ours = [jaxreml.fit_many(study.formula, study.data, y).fits for study, y in sets]
    r = ask_lme4(sets, count, 0, folder)
    reports = {}
    for (study, y), fits in zip(sets, ours, strict=True):
        lme4 = r["results"][study.name] if r else None
        reports[study.name] = against_peers(study, y, fits, lme4, ask_glmm(study, y))
    failures = print_agreement(reports)
    if not any(report["peers"] for report in reports.values()):
        failures.append("no peer is installed: nothing to compare with")
    return reports, failures, r["version"] if r else None


def with_holes(y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to a fifth of the rows missing at random; a third of the responses share some patterns.

    How many rows is one of four numbers, because `jaxreml.fit` compiles anew for each.
    """
    n, count = y.shape

    def pattern() -> np.ndarray:
        holes = np.zeros(n, bool)
        holes[rng.choice(n, rng.choice([1, n // 30, n // 10, n // 5]), replace=False)] = True
        return holes

    common = [pattern() for _ in range(PATTERNS)]
    shared = rng.uniform(size=count) < 1 / 3
    chosen = [common[rng.integers(PATTERNS)] if share else pattern() for share in shared]
    return np.where(np.column_stack(chosen), np.nan, y)


def missing_values(study: Study, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Batched fits against single fits of the same rows."""
    rng = np.random.default_rng(seed)
    y = with_holes(study.simulate(count, seed), rng)
    results = jaxreml.fit_many(study.formula, study.data, y)
    log_variances, log_variance_se = (
        np.asarray(results.log_variances), np.asarray(results.log_variance_se)
    )  # fmt: skip
    fits, failures = results.fits, []
    distances: dict[str, list[float]] = {name: [] for name in LIMITS}
    statuses = singular = 0
    for i in range(count):
        table = study.data.assign(y=y[:, i])
        with quiet():
            single = jaxreml.fit(f"y {study.formula}", table)
        kept = int(np.isfinite(y[:, i]).sum())
        if fits.nobs[i] != kept or fits.n_missing[i] != len(y) - kept:
            failures.append(f"response {i}: {fits.nobs[i]} rows used, not {kept}")
        if single.status != fits.status[i]:
            statuses += 1
            continue
        if single.status != Status.CONVERGED:
            continue
        singular += bool(single.is_singular) != bool(fits.is_singular[i])
        se, alone = np.asarray(single.bse), single.variance_components
        pairs = {
            "criterion": (fits.criterion[i], single.criterion, 1),
            "beta": (fits.beta[i], np.asarray(single.params), se),
            "se": (fits.se[i], se, se),
            "df": (fits.df[i], np.asarray(single.df_satterthwaite), None),
            "log-variances": (log_variances[i], alone["log_variance"].to_numpy(), 1),
            "log-variance SEs": (log_variance_se[i], alone["log_variance_se"].to_numpy(), None),
        }
        for name, (batched, value, scale) in pairs.items():
            distances[name].append(distance(batched, value, scale))
    patterns = len(np.unique(np.isnan(y), axis=1).T)
    report: dict[str, Any] = {
        "responses": count, "patterns": patterns, "other status": statuses,
        "other singular": singular,
        "worst": {name: max(values, default=np.inf) for name, values in distances.items()},
        "median": {name: float(np.median(values)) for name, values in distances.items()},
    }  # fmt: skip
    for name, limit in LIMITS.items():
        over = int(np.sum(~(np.array(distances[name]) <= limit)))
        report["worst"][name] = float(report["worst"][name])
        if over:
            failures.append(
                f"{name} of {over} responses with missing values differs from single fits, by up "
                f"to {report['worst'][name]:.1e} (limit {limit:g})"
            )
    if statuses or singular:
        failures.append(f"{statuses} other statuses, {singular} other singular flags")
    return report, [f"{study.name}: {text}" for text in failures]


def distance(a: Any, b: Any, scale: Any) -> float:
    """Largest difference over `scale` (None: relative to b); NaN, -inf must be in equal places."""
    a, b = np.atleast_1d(np.asarray(a, float)), np.atleast_1d(np.asarray(b, float))
    known = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~known], b[~known], equal_nan=True):
        return np.inf
    scale = np.abs(b) if scale is None else np.broadcast_to(scale, b.shape)
    return float(np.max(np.abs(a[known] - b[known]) / scale[known], initial=0))


def poison(study: Study, y: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The same block with other values in some columns."""
    y = y.copy()
    perfect = study.X @ study.beta
    infinite = y[:, 0].copy()
    infinite[len(y) // 2] = np.inf
    kinds = {
        "constant": np.full(len(y), 3.7),
        "zero": np.zeros(len(y)),
        "all NaN": np.full(len(y), np.nan),
        "infinite": infinite,
        "perfect fit": perfect,
        "huge": np.where(np.arange(len(y)) % 2, 1e308, -1e308),
        "two rows": np.where(np.arange(len(y)) < 2, y[:, 0], np.nan),
    }
    names = [list(kinds)[k % len(kinds)] for k in range(len(places))]
    for place, name in zip(places, names, strict=True):
        y[:, place] = kinds[name]
    return y, names


def poisoned(study: Study, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """One batch with and without 1% of poisoned responses."""
    rng = np.random.default_rng(seed)
    y = study.simulate(count, seed)
    places = np.sort(rng.choice(count, max(count // 100, 7), replace=False))
    bad, names = poison(study, y, places)
    others = np.setdiff1d(np.arange(count), places)
    clean, dirty, short = (
        jaxreml.fit_many(study.formula, study.data, block).fits
        for block in (y, bad, y[:, others])
    )  # fmt: skip
    fields = [f for f in clean._fields if getattr(clean, f) is not None and f != "modes"]
    changed = [
        f for f in fields
        if getattr(clean, f)[others].tobytes() != getattr(dirty, f)[others].tobytes()
    ]  # fmt: skip
    failures = [f"{', '.join(changed)} of healthy responses changed"] if changed else []
    seen: dict[str, list[str]] = {}
    for place, name in zip(places, names, strict=True):
        status = Status(int(dirty.status[place]))
        seen.setdefault(name, []).append(status.name)
        if status == Status.CONVERGED or np.isfinite(dirty.criterion[place]):
            failures.append(f"the response that is {name} ends as {status.name}")
        if np.isfinite(dirty.beta[place]).any() or np.isfinite(dirty.se[place]).any():
            failures.append(f"the response that is {name} has numbers")
    gap = np.abs(short.criterion - dirty.criterion[others])
    report = {
        "responses": count,
        "poisoned": len(places),
        "changed": changed,
        "statuses": {name: sorted(set(values)) for name, values in seen.items()},
        "against a run without them": float(np.nanmax(gap, initial=0)),
    }
    if not np.all((gap <= LIMITS["criterion"]) | (short.status != 0)):
        failures.append(f"the criterion without them is {np.nanmax(gap):.1e} away")
    return report, [f"{study.name}: {text}" for text in failures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="30, 20 and 100 responses")
    parser.add_argument("--responses", type=int, default=2000, metavar="N", help="per study")
    parser.add_argument("--missing", type=int, default=500, metavar="N", help="per study")
    parser.add_argument("--batch", type=int, default=1000, metavar="N", help="poisoned, per study")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write raw figures there")
    arguments = parser.parse_args()
    sizes = arguments.responses, arguments.missing, arguments.batch
    random, missing, batch = (30, 20, 100) if arguments.quick else sizes
    seed = arguments.seed
    studies = [sleepstudy(), unbalanced(), unbalanced(slopes=True)]
    raw: dict[str, Any] = {}
    failures: list[str] = []
    lme4 = None
    if random:
        with tempfile.TemporaryDirectory() as name:
            raw["peers"], found, lme4 = random_responses(studies, random, seed, Path(name))
        failures += found

    raw["missing"], raw["poisoned"] = {}, {}
    if missing:
        print(
            "\nMissing values: the largest distance between batched and single fits (medians in "
            "brackets); criterion and log-variances absolute, beta in units of its SE\n"
        )
        header("study", "responses", "patterns", "other status", "other singular", *LIMITS)
        row("limit", "", "", 0, 0, *(f"{limit:g}" for limit in LIMITS.values()))
        for study in studies:
            raw["missing"][study.name], found = missing_values(study, missing, seed + 1)
            failures += found
            r = raw["missing"][study.name]
            row(study.name, r["responses"], r["patterns"], r["other status"], r["other singular"],
                *(f"{r['worst'][k]:.1e} ({r['median'][k]:.0e})" for k in LIMITS))  # fmt: skip
    if batch:
        print("\nPoisoned responses: what changes in the others\n")
        header("study", "responses", "poisoned", "changed bits in", "against a run without them",
               "statuses")  # fmt: skip
        for study in studies:
            raw["poisoned"][study.name], found = poisoned(study, batch, seed + 2)
            failures += found
            r = raw["poisoned"][study.name]
            ends = "; ".join(f"{k}: {', '.join(v)}" for k, v in r["statuses"].items())
            row(study.name, r["responses"], r["poisoned"], ", ".join(r["changed"]) or "nothing",
                f"{r['against a run without them']:.0e}", ends)  # fmt: skip
    packages = ("jaxreml", "jax", "jaxlib", "numpy", "glmm")
    print("\n" + machine(packages, lme4) + f"; {jax.devices()[0].device_kind}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**raw, "failures": failures}, indent=1))
    if failures:
        sys.exit("\n" + "\n".join(f"DISAGREES: {text}" for text in failures))
    print("\nAll agree.")


if __name__ == "__main__":
    main()
