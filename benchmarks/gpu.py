"""Batches on the accelerator that JAX has, beside NumPy on the CPU; answers are compared first.

One pass of at most eight minutes for a machine that is lent: the studies of batched_fits.py, more
responses of them, and 10,000 responses of two crossed factors. Every study is fitted twice on the
device, with compiling and without; a sample of the responses is fitted by NumPy (crossed ones by
`fit`), and the criteria must agree to 1e-8. Studies are left out, and named, when the time is up.
Exits with 1 if an answer differs.

    python benchmarks/gpu.py [--quick] [--minutes 8] [--json FILE]

On a machine without one it runs on the CPU, where only `--quick` makes sense.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from common import header, machine, row, seconds
from studies import quiet, sleepstudy, unbalanced, voxels

import jaxreml

SAMPLE = 200  # responses of a batch that the CPU fits too
CROSSED_SAMPLE = 5
AGREE = 1e-8  # relative difference of criteria


class Case(NamedTuple):
    """What is fitted: a formula, data, how many responses (with `--quick`), and their maker."""

    name: str
    formula: str
    data: pd.DataFrame
    count: int
    quick: int
    simulate: Callable[[int], np.ndarray]
    options: dict[str, Any]


def cases() -> list[Case]:
    found = []
    for study, count, quick in (
        (sleepstudy(), 1_000_000, 500),
        (unbalanced(), 200_000, 300),
        (unbalanced(slopes=True), 20_000, 100),
        (voxels(), 500_000, 500),
    ):
        found.append(Case(study.name, study.formula, study.data, count, quick, study.simulate, {}))
    weighted = unbalanced()
    found.append(
        Case(
            "random intercept, Kenward-Roger",
            weighted.formula,
            weighted.data,
            50_000,
            100,
            weighted.simulate,
            {"df": "kenward-roger"},
        )
    )
    data, simulate = crossed()
    formula = "~ x + (1 | person) + (1 | item)"
    found.append(Case("two crossed factors", formula, data, 10_000, 20, simulate, {}))
    return found


def crossed(people: int = 40, items: int = 20) -> tuple[pd.DataFrame, Callable[[int], np.ndarray]]:
    """Every person meets every item; responses with both effects, some of them without."""
    rng = np.random.default_rng(3)
    person, item = (own.ravel() for own in np.indices((people, items)))
    data = pd.DataFrame(
        {"x": rng.normal(size=person.size), "person": person.astype(str), "item": item.astype(str)}
    )

    def simulate(count: int) -> np.ndarray:
        draws = np.random.default_rng(4)
        sds = draws.choice([0.0, 0.5, 1.0], (2, count))
        y = draws.standard_normal((person.size, count)) + data["x"].to_numpy()[:, None]
        y += (sds[0] * draws.standard_normal((people, count)))[person]
        return y + (sds[1] * draws.standard_normal((items, count)))[item]

    return data, simulate


def run(case: Case, quick: bool) -> dict[str, Any]:
    """Answers and times of one case."""
    count = case.quick if quick else case.count
    responses = case.simulate(count)

    def fit() -> Any:
        return jaxreml.fit_many(
            case.formula, case.data, responses, engine="jax", progress=False, **case.options
        )

    results: list[Any] = []
    first = seconds(lambda: results.append(fit()))
    again = seconds(fit)
    criterion = results[0].criterion.to_numpy()
    is_crossed = results[0].model.structure == "crossed"
    sample = np.linspace(0, count - 1, CROSSED_SAMPLE if is_crossed else SAMPLE).astype(int)
    sample = np.unique(sample)
    chosen = responses[:, sample]
    if is_crossed:
        singles = [
            jaxreml.fit(f"y {case.formula}", case.data.assign(y=column)).criterion
            for column in chosen.T
        ]
        known = np.array(singles)
    else:
        known = jaxreml.fit_many(
            case.formula, case.data, chosen, engine="numpy", **case.options
        ).criterion.to_numpy()
    both = np.isfinite(known) & np.isfinite(criterion[sample])
    difference = np.abs(known - criterion[sample])[both] / (1 + np.abs(known[both]))
    return {
        "study": case.name,
        "responses": count,
        "first_s": first,
        "again_s": again,
        "per_second": count / again,
        "not_converged": int((~results[0].converged).sum()),
        "compared": int(both.sum()),
        "difference": float(difference.max(initial=0.0)),
        "agree": bool(np.all(difference <= AGREE) and both.any()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few responses of each study")
    parser.add_argument("--minutes", type=float, default=8.0, help="time to stay within")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    device = jax.devices()[0]
    print(machine(("jaxreml", "jax", "jaxlib", "numpy"), None))
    print(f"device: {device.device_kind} ({device.platform}), {jax.device_count()} of them\n")
    header("study", "responses", "first, s", "again, s", "responses / s", "criteria differ by")
    found: list[dict[str, Any]] = []
    slowest = 0.0
    with quiet():
        for case in cases():
            left = options.minutes * 60 - (time.perf_counter() - started)
            if left < 1.5 * slowest:
                row(case.name, "left out: the time is up", "", "", "", "")
                continue
            slowest = max(slowest, seconds(lambda: found.append(run(case, options.quick))))  # noqa: B023
            own = found[-1]
            row(
                own["study"],
                f"{own['responses']:,}",
                f"{own['first_s']:.2f}",
                f"{own['again_s']:.3f}",
                f"{own['per_second']:,.0f}",
                f"{own['difference']:.1e}",
            )
            if options.json:
                record = {"device": device.device_kind, "studies": found}
                options.json.write_text(json.dumps(record, indent=1))
    return 0 if found and all(own["agree"] for own in found) else 1


if __name__ == "__main__":
    sys.exit(main())
