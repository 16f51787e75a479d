"""Profile likelihood intervals of all parameters beside lme4's `confint(method = "profile")`.

Intervals are compared first; then medians of repeats on a fit that is at hand, and the ratio. The
first call, with what it compiles, is shown apart. Needs R with lme4 and jsonlite.

    python benchmarks/profile_intervals.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from common import for_r, have_r, header, machine, median_ms, row, run_r, seconds

import jaxreml

MODELS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "pastes": "strength ~ 1 + (1 | batch/cask)",
    "penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
    "orthodont": "distance ~ age + Sex + (1 | Subject)",
}
REPEATS = 5


def main() -> None:
    if not have_r():
        raise SystemExit("R with lme4 is needed")
    tables = {name: jaxreml.datasets.load(name) for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        models = [
            {"name": name, "formula": MODELS[name], **for_r(data, Path(folder) / f"{name}.csv")}
            for name, data in tables.items()
        ]
        task = {"models": models, "n": REPEATS}
        peer = run_r(Path(__file__).with_suffix(".R"), task, Path(folder))
    print(machine(["jax", "jaxlib", "numpy"], peer["lme4"]))
    header("model", "largest relative difference", "lme4, ms", "jaxreml, ms", "ratio", "first, s")
    for theirs in peer["results"]:
        name = theirs["name"]
        fit = jaxreml.fit(MODELS[name], tables[name], "ML")
        first = seconds(lambda: fit.conf_int(method="profile"))  # noqa: B023
        ms = median_ms(lambda: fit.conf_int(method="profile"), REPEATS)  # noqa: B023
        own = fit.conf_int(method="profile")[["lower", "upper"]].to_numpy()
        other = np.column_stack([theirs["lower"], theirs["upper"]]).astype(float)
        apart = np.abs(own - other) / np.maximum(np.abs(other), 1e-12)
        apart = np.where(own == other, 0.0, apart)
        cells = f"{theirs['ms']:.0f}", f"{ms:.1f}", f"{theirs['ms'] / ms:.0f}", f"{first:.1f}"
        row(name, f"{np.nanmax(apart):.0e}", *cells)


if __name__ == "__main__":
    main()
