"""Covariances of residuals (`fit(..., residual=)`) beside nlme's gls and lme and glmmTMB.

Studies like the FEV and BCVA trials of R's mmrm: subjects with visits, some of them missing, an
unstructured covariance of the visits, Satterthwaite's degrees of freedom with ours; AR(1)
residuals beside a random intercept; residuals beside random effects of other factors; times of
each subject's own; and many responses, where a peer does the first of them in a loop. Criteria are
compared first. Times are of one call from a dataframe, ours in this process after a fit of another
shape, R's in a process of its own.

    python benchmarks/residuals.py [--quick] [--cpu] [--json FILE]

With ``--cpu`` times are of the processors (all threads), which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import have_r, header, machine, row
from common import seconds as wall_seconds

import jaxreml

CPU = False  # whether times are of processors


def seconds(call: Callable[[], object]) -> float:
    """What a call takes."""
    if not CPU:
        return wall_seconds(call)
    start = time.process_time()
    call()
    return time.process_time() - start


AGREE = 1e-5  # of criteria, what R's optimisers leave


def trial(subjects: int, visits: int, patterns: int | None = None, seed: int = 1) -> pd.DataFrame:
    """A parallel-group trial; visits missing at random, or in one of so many patterns."""
    rng = np.random.default_rng(seed)
    times = np.arange(visits)
    sds = 5 + 0.3 * times
    matrix = np.exp(-np.abs(times[:, None] - times) / 6) * np.outer(sds, sds)
    arm, base = rng.integers(0, 2, subjects), rng.normal(75, 10, subjects)
    race = rng.integers(0, 3, subjects)
    y = rng.normal(size=(subjects, visits)) @ np.linalg.cholesky(matrix).T
    y += 0.5 * times * arm[:, None] + 0.1 * base[:, None]
    if patterns is None:
        kept = rng.random((subjects, visits)) > 0.1
    else:
        shapes = rng.random((patterns, visits)) > 0.15
        shapes[:, 0] = True
        kept = shapes[rng.integers(0, patterns, subjects)]
    i, j = np.nonzero(kept)
    return pd.DataFrame(
        {
            "chg": y[i, j],
            "subject": [f"s{k:06d}" for k in i],
            "visit": pd.Categorical.from_codes(j, [f"v{k:02d}" for k in range(visits)]),
            "arm": np.array(["a", "b"])[arm[i]],
            "base": base[i],
            "race": np.array(["x", "y", "z"])[race[i]],
        }
    )


def own_times(subjects: int, rows: int, spaced: bool = False, seed: int = 2) -> pd.DataFrame:
    """Subjects at times of their own, or equally spaced ones, correlated by the distance."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 4 * rows, (subjects, rows)), axis=1)
    if spaced:
        times = np.broadcast_to(np.arange(float(rows)), times.shape)
    y = np.empty((subjects, rows))
    y[:, 0] = rng.normal(size=subjects)
    for k in range(1, rows):
        near = np.exp(-(times[:, k] - times[:, k - 1]) / 5)
        y[:, k] = near * y[:, k - 1] + np.sqrt(1 - near**2) * rng.normal(size=subjects)
    x, who = rng.normal(size=y.shape), np.repeat(np.arange(subjects), rows)
    y += 0.2 * x + rng.normal(size=(subjects, 1))
    return pd.DataFrame(
        {
            "chg": y.ravel(),
            "subject": [f"s{k:06d}" for k in who],
            "visit": times.ravel().round(6),
            "x": x.ravel(),
        }
    )


def studies(quick: bool) -> list[dict[str, Any]]:
    """What is fitted, and by whom besides."""
    large = 2_000 if quick else 100_000
    whole = "chg ~ arm * visit + base + race"
    small = {"formula": whole, "model": "us", "residual": "us(visit | subject)"}
    return [
        {"name": "us, 200 x 4", "data": trial(200, 4), "peers": ["gls", "glmmTMB"], **small},
        {
            "name": "us, 1,000 x 10, 23 fixed effects",
            "data": trial(200 if quick else 1_000, 10),
            "peers": [] if quick else ["gls", "glmmTMB"],
            **small,
        },
        {
            "name": "us, 1,000 x 10, 50 patterns",
            "data": trial(200 if quick else 1_000, 10, 50),
            "peers": [],
            **small,
        },
        {
            "name": f"us, {large:,} x 10, 50 patterns",
            "data": trial(large, 10, 50),
            "peers": [],
            **small,
        },
        {
            "name": "ar1 and random intercept, n = 2,000",
            "data": trial(225, 10),
            "formula": "chg ~ arm + base",
            "model": "ar1",
            "residual": "ar1(visit | subject)",
            "peers": ["lme", "glmmTMB"],
        },
        *_beside(quick),
        *_of_own_times(quick),
    ]


def _beside(quick: bool) -> list[dict[str, Any]]:
    """Beside random effects of other factors: sites that contain subjects, items across them."""
    us = {"formula": "chg ~ arm * visit", "model": "us", "residual": "us(visit | subject)"}
    ar1 = {"formula": "chg ~ x", "model": "ar1", "residual": "ar1(visit | subject)"}
    items = " + (1 | item) + (1 | subject)"
    count = 200 if quick else 2_000
    return [
        {
            "name": f"us and 50 sites, {count:,} x 4",
            "data": in_sites(count, 50),
            "beside": " + (1 | site)",
            "peers": ["lme", "glmmTMB"],
            **us,
        },
        {
            "name": "us and 200 sites, 20,000 x 4",
            "data": in_sites(count if quick else 20_000, 200),
            "beside": " + (1 | site)",
            "peers": [],
            **us,
        },
        *(
            {
                "name": f"ar1, subjects and {levels} items, {subjects:,} x {trials}",
                "data": with_items(subjects, trials, levels),
                "beside": items,
                "peers": ["glmmTMB"],
                **ar1,
            }
            for subjects, trials, levels in ((count, 4, 200), (20 if quick else 60, 40, 40))
        ),
    ]


def in_sites(subjects: int, sites: int) -> pd.DataFrame:
    """A trial whose subjects are in so many sites."""
    data, rng = trial(subjects, 4), np.random.default_rng(4)
    site = rng.integers(0, sites, subjects)[data["subject"].str[1:].astype(int)]
    chg = data["chg"] + 2 * rng.normal(size=sites)[site]
    return data.assign(site=[f"c{k:03d}" for k in site], chg=chg)


def with_items(subjects: int, trials: int, items: int) -> pd.DataFrame:
    """Subjects who meet items in an order of their own, correlated from one to the next."""
    data, rng = own_times(subjects, trials, spaced=True), np.random.default_rng(5)
    item = np.concatenate([rng.permutation(items)[:trials] for _ in range(subjects)])
    visit = pd.Categorical.from_codes(
        data["visit"].astype(int), [f"v{k:02d}" for k in range(trials)]
    )
    chg = data["chg"] + rng.normal(size=items)[item]
    return data.assign(item=[f"i{k:03d}" for k in item], visit=visit, chg=chg)


def _of_own_times(quick: bool) -> list[dict[str, Any]]:
    few, long = (20, 500) if quick else (500, 5_000)
    at = {"formula": "chg ~ x", "peers": ["gls"]}
    exponential = {**at, "residual": "sp_exp(visit | subject)", "model": "corExp"}
    gaussian = {**at, "residual": "sp_gau(visit | subject)", "model": "corGaus"}
    large = own_times(few, 200)
    return [
        {"name": f"sp_exp, {few} x 20 own times", "data": own_times(few, 20), **exponential},
        {"name": f"sp_exp, {few} x 200 own times", "data": large, **exponential, "peers": []},
        {"name": f"sp_gau, {few} x 20 own times", "data": own_times(few, 20), **gaussian},
        {
            "name": f"sp_exp and random intercept, {few} x 20 own times",
            "data": own_times(few, 20),
            **exponential,
            "random": True,
            "peers": ["lme"],
        },
        {
            "name": f"ar1, 2 series of {long:,}",
            "data": own_times(2, long, spaced=True),
            **at,
            "residual": "ar1(visit | subject)",
            "model": "corAR1",
        },
    ]


def many(quick: bool) -> dict[str, Any]:
    """`fit_many` of simulated responses of one trial, and single fits of some of them."""
    count, single = (20, 4) if quick else (500, 20)
    data = trial(200, 4, 8)
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(200, count))[data["subject"].str[1:].astype(int)]
    values = shared + rng.normal(size=(len(data), count))
    options = {"residual": "us(visit | subject)"}
    fits: list[Any] = []

    def at_once() -> None:
        fits.append(jaxreml.fit_many("~ arm * visit", data, values, **options))

    together = seconds(at_once)
    alone: list[Any] = []

    def one_by_one() -> None:
        for k in range(single):
            own = data.assign(chg=values[:, k])
            alone.append(jaxreml.fit("chg ~ arm * visit", own, **options))

    took = seconds(one_by_one) / single
    apart = max(
        abs(fit.criterion - fits[0].fits.criterion[k]) / (1 + abs(fit.criterion))
        for k, fit in enumerate(alone[:single])
    )
    return {"responses": count, "each_s": together / count, "single_s": took, "apart": apart}


def of_r(study: dict[str, Any], limit: float) -> dict[str, Any]:
    """Times and criteria of the peers, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.csv"
        study["data"].to_csv(path, index=False)
        for peer in study["peers"] if have_r() else ():
            task = {name: study[name] for name in ("formula", "model")}
            task |= {"random": study.get("random", False), "beside": study.get("beside", "")}
            task |= {"cpu": CPU}
            task |= {"csv": str(path), "peers": [peer]}
            script = Path(__file__).with_suffix(".R")
            command = ["Rscript", str(script), json.dumps(task)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                found[peer] = {"seconds": limit, "criterion": None}
                continue
            if done.returncode:
                raise SystemExit(f"{script.name} failed:\n{done.stderr}")
            found |= json.loads(done.stdout)["results"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small studies")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--limit", type=float, default=900, help="seconds that R may take a study")
    parser.add_argument("--cpu", action="store_true", help="times of processors")
    options = parser.parse_args(arguments)
    global CPU
    CPU = options.cpu
    print(machine(("jaxreml", "numpy"), None) + "\n")
    jaxreml.fit("chg ~ arm", trial(30, 3), residual="cs(visit | subject)").coefficients()
    header("study", "rows", "jaxreml, s", "peers, s (times ours)", "criteria differ by")
    found, agree = [], True
    for study in studies(options.quick):
        random = study["model"] == "ar1" or study.get("random", False)
        formula = study["formula"] + study.get("beside", " + (1 | subject)" if random else "")
        fits: list[Any] = []

        def ours(study: dict = study, formula: str = formula, fits: list = fits) -> None:
            fits.append(jaxreml.fit(formula, study["data"], residual=study["residual"]))
            fits[-1].coefficients()

        took = seconds(ours)
        peers = of_r(study, options.limit)
        differences = {
            name: (peer["criterion"] - fits[0].criterion) / (1 + abs(fits[0].criterion))
            for name, peer in peers.items()
            if peer["criterion"] is not None
        }
        agree &= fits[0].converged and all(abs(value) < AGREE for value in differences.values())
        cells = [
            f"{name} {'' if peer['criterion'] else '> '}{peer['seconds']:.2f} "
            f"({peer['seconds'] / took:.1f})"
            for name, peer in peers.items()
        ]
        apart = [f"{name} {value:.0e}" for name, value in differences.items()]
        row(study["name"], len(study["data"]), f"{took:.2f}", ", ".join(cells), ", ".join(apart))
        found.append({"study": study["name"], "jaxreml_s": took, "peers": peers})
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    batch = many(options.quick)
    agree &= batch["apart"] < AGREE
    print(
        f"\nfit_many, {batch['responses']} responses of 200 x 4 visits, us: "
        f"{1e3 * batch['each_s']:.2f} ms each; fit: {1e3 * batch['single_s']:.1f} ms; criteria "
        f"differ by {batch['apart']:.0e}"
    )
    if options.json:
        options.json.write_text(json.dumps([*found, batch], indent=1))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
