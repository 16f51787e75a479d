"""A user's own covariance against the built-in one that it is: AR(1) written by hand.

Of residuals (`residual=`) and of random effects, from a dataframe to the fit with Satterthwaite's
degrees of freedom. The first fit of a function compiles it, once for each number of effects; the
times compared are of fits after it, the fastest of several in turns. Criteria are compared first.

    python benchmarks/own_covariance.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from common import header, machine, row

import jaxreml

AGREE = 1e-8  # of criteria
TARGET = 3.0  # times the built-in


def ar1(at: Any, variance: Any, rho: Any) -> Any:
    return variance * rho ** jnp.abs(at[:, None] - at)


OWN = jaxreml.covariance.custom(ar1, {"variance": 1.0, "rho": 0.3}, {"rho": "tanh"})


def table(subjects: int, visits: int, repeats: int = 1, seed: int = 1) -> pd.DataFrame:
    """Subjects with correlated visits, a tenth of the rows missing."""
    rng = np.random.default_rng(seed)
    lags = np.abs(np.subtract.outer(np.arange(visits), np.arange(visits)))
    effects = rng.normal(size=(subjects, visits)) @ np.linalg.cholesky(2 * 0.7**lags).T
    subject = np.repeat(np.arange(subjects), visits * repeats)
    visit = np.tile(np.repeat(np.arange(visits), repeats), subjects)
    kept = rng.random(subject.size) > 0.1
    subject, visit = subject[kept], visit[kept]
    x = rng.normal(size=subject.size)
    noise = rng.normal(size=subject.size) if repeats > 1 else 0.0
    return pd.DataFrame(
        {
            "y": 1 + 0.5 * x + effects[subject, visit] + noise,
            "x": x,
            "subject": subject,
            "visit": visit,
            "v": pd.Categorical.from_codes(visit, [f"v{k:02d}" for k in range(visits)]),
        }
    )


def studies(quick: bool) -> list[dict[str, Any]]:
    """What is fitted: formula and residual with the word, and the data."""
    of_residuals = {"formula": "y ~ x", "residual": "{}(visit | subject)"}
    of_effects = {"formula": "y ~ x + {}(0 + v | subject)", "residual": None}
    sizes = [(40, 4), (30, 10)] if quick else [(200, 4), (225, 10), (1_000, 10), (2_000, 20)]
    found = []
    for subjects, visits in sizes:
        size = f"{subjects:,} x {visits}"
        found.append(
            {"name": f"residuals, {size}", "data": table(subjects, visits), **of_residuals}
        )
    for subjects, visits in sizes[:1] if quick else sizes[:3]:
        size = f"{subjects:,} x {visits} x 3"
        found.append(
            {"name": f"random effects, {size}", "data": table(subjects, visits, 3), **of_effects}
        )
    return found


def fitted(study: dict[str, Any], word: str) -> tuple[float, jaxreml.LMMResults]:
    """Seconds and the fit."""
    start = time.perf_counter()
    residual = study["residual"] and study["residual"].format(word)
    formula = study["formula"].format(word)
    context = {"own": OWN} if word == "own" else None
    fit = jaxreml.fit(formula, study["data"], residual=residual, context=context)
    fit.coefficients()
    return time.perf_counter() - start, fit


def compared(study: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times and agreement of one study."""
    fitted(study, "ar1")
    first, _ = fitted(study, "own")
    pairs = [(fitted(study, "ar1"), fitted(study, "own")) for _ in range(repeats)]
    builtin, own = (min(pair[k][0] for pair in pairs) for k in (0, 1))
    (_, theirs), (_, ours) = pairs[0]
    apart = abs(ours.criterion - theirs.criterion) / (1 + abs(theirs.criterion))
    rows = len(study["data"])
    return {
        "study": study["name"],
        "rows": rows,
        "builtin_s": builtin,
        "own_s": own,
        "first_s": first,
        "apart": apart,
        "converged": ours.converged and theirs.converged,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small studies")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args(arguments)
    print(machine(("jaxreml", "numpy", "jax"), None) + "\n")
    header(
        "study", "rows", "built-in, s", "own, s", "own / built-in", "first fit of own, s", "apart"
    )
    found = []
    for study in studies(options.quick):
        own = compared(study, 2 if options.quick else 5)
        found.append(own)
        ratio = own["own_s"] / own["builtin_s"]
        times = f"{own['builtin_s']:.3f}", f"{own['own_s']:.3f}", f"{ratio:.2f}"
        row(own["study"], own["rows"], *times, f"{own['first_s']:.2f}", f"{own['apart']:.0e}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    good = all(own["converged"] and own["apart"] < AGREE for own in found)
    worst = max(own["own_s"] / own["builtin_s"] for own in found)
    print(f"\nat most {worst:.2f} times the built-in; the target is {TARGET:g}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
