"""Known covariances of levels (`kernels=`): many traits of genotyped individuals, several kernels.

One genomic relationship matrix and many traits, beside glimix-core where an interpreter that has it
is named, and three kernels (additive, dominance, space) beside plain REML: dense algebra with an
exact gradient under SciPy's L-BFGS-B. Answers are compared first. Times are of one call from
a dataframe, kernels made before, in seconds of the processor: run it with OPENBLAS_NUM_THREADS=1 to
have those of one core, whatever else the machine does.

    python benchmarks/kernels.py [--quick] [--glimix PYTHON] [--json FILE]
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
import scipy.linalg
from common import header, machine, row
from scipy.optimize import minimize

import jaxreml
from jaxreml import kernels

AGREE = 1e-6  # relative, of criteria against plain REML
FLAT = 1e-5  # derivatives of plain REML in log-variances, at our estimates
SAME = 1e-3  # of shares of variance against glimix-core, whose search is on a scale of its own


def processor(call: Callable[[], object]) -> float:
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def population(n: int, traits: int, seed: int = 1) -> dict[str, Any]:
    """Individuals with genotypes and places, three kernels, many traits, and one with all three."""
    rng = np.random.default_rng(seed)
    counts = rng.binomial(2, rng.uniform(0.1, 0.5, 2 * n), size=(n, 2 * n))
    known = {
        "additive": kernels.from_genotypes(counts),
        "dominance": kernels.from_genotypes(counts, effect="dominance"),
        "space": kernels.matern(rng.uniform(size=(n, 2)), range=0.1),
    }
    roots = [np.linalg.cholesky(K.to_numpy() + 1e-8 * np.eye(n)) for K in known.values()]
    x = rng.normal(size=n)
    many = roots[0] @ rng.normal(size=(n, traits)) * rng.uniform(0, 1.5, traits)
    many += rng.normal(size=(n, traits)) + 0.3 * x[:, None]
    one = sum(root @ rng.normal(size=n) for root in roots) + rng.normal(size=n) + x
    data = pd.DataFrame({"x": x, "id": np.arange(n), "y": one})
    return {"data": data, "kernels": known, "traits": many}


def plain(
    logs: np.ndarray, y: np.ndarray, X: np.ndarray, matrices: list[np.ndarray]
) -> tuple[float, np.ndarray]:
    """The REML criterion at log-variances, the residual's last, and its gradient."""
    n, p = X.shape
    whole = [*matrices, np.eye(n)]
    V = sum(np.exp(t) * K for t, K in zip(logs, whole, strict=True))
    factor = scipy.linalg.cho_factor(V, lower=True)
    inverse = scipy.linalg.cho_solve(factor, np.eye(n))
    across = inverse @ X
    M = X.T @ across
    P = inverse - across @ np.linalg.solve(M, across.T)
    moved = P @ y
    value = 2 * np.log(np.diagonal(factor[0])).sum() + np.linalg.slogdet(M)[1] + y @ moved
    slopes = [np.sum(P * K) - moved @ K @ moved for K in whole]
    return value + (n - p) * np.log(2 * np.pi), np.exp(logs) * np.array(slopes)


def plain_reml(y: np.ndarray, X: np.ndarray, matrices: list[np.ndarray]) -> tuple[float, int]:
    """The lowest criterion and how many evaluations it took, from equal variances."""
    start = np.full(len(matrices) + 1, np.log(np.var(y) / (len(matrices) + 1)))
    options = {"ftol": 1e-13}
    found = minimize(plain, start, (y, X, matrices), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), int(found.nfev)


GLIMIX = """
import sys, time, json
import numpy as np
from glimix_core.lmm import LMM
from numpy_sugar.linalg import economic_qs
data = np.load(sys.argv[1])
start = time.process_time()
QS = economic_qs(data["K"])
shares = []
for y in data["Y"].T:
    lmm = LMM(y, data["X"], QS, restricted=True)
    lmm.fit(verbose=False)
    shares.append(lmm.v0 / (lmm.v0 + lmm.v1))
print(json.dumps({"seconds": time.process_time() - start, "shares": shares}))
"""


def of_glimix(python: str, study: dict[str, Any], traits: int) -> dict[str, Any]:
    """Seconds and shares of the kernel in the variance of the first traits, by glimix-core."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.npz"
        X = np.column_stack([np.ones(len(study["data"])), study["data"]["x"]])
        K = study["kernels"]["additive"].to_numpy()
        np.savez(path, K=K, X=X, Y=study["traits"][:, :traits])
        done = subprocess.run([python, "-c", GLIMIX, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"glimix-core failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def many_traits(study: dict[str, Any], glimix: str | None, compared: int) -> dict[str, Any]:
    data, own = study["data"], study["traits"]
    known = {"id": study["kernels"]["additive"]}
    found: list[Any] = []
    took = processor(
        lambda: found.append(
            jaxreml.fit_many("~ x + (1 | id)", data, own, kernels=known, progress=False)
        )
    )
    results = found[0]
    X = np.column_stack([np.ones(len(data)), data["x"]])
    K = study["kernels"]["additive"].to_numpy()
    differ = slope = 0.0
    inside = np.flatnonzero(~results.is_singular)[:compared]
    for k in inside:  # the criterion at what was found, and that it is stationary there
        value, gradient = plain(results.log_variances.iloc[k].to_numpy(), own[:, k], X, [K])
        differ = max(differ, abs(value / results.criterion.iloc[k] - 1))
        slope = max(slope, np.abs(gradient).max())
    report = {
        "study": f"one kernel, {own.shape[1]:,} traits",
        "n": len(data),
        "jaxreml_s": took,
        "per_trait_ms": 1e3 * took / own.shape[1],
        "differ": differ,
        "agree": bool(results.converged.all() and differ < AGREE and slope < FLAT),
    }
    if glimix is not None:
        count = min(own.shape[1], 5)
        other = of_glimix(glimix, study, count)
        shares = results.variances.iloc[:count].to_numpy()
        apart = np.abs(shares[:, 0] / shares.sum(axis=1) - other["shares"]).max()
        report |= {"glimix_s": other["seconds"], "glimix_traits": count, "shares_differ": apart}
        report["agree"] &= bool(apart < SAME)
    return report


def three_kernels(study: dict[str, Any]) -> dict[str, Any]:
    data, found = study["data"], []
    known = {"id": study["kernels"]}
    took = processor(lambda: found.append(jaxreml.fit("y ~ x + (1 | id)", data, kernels=known)))
    fit: Any = found[0]
    X = np.column_stack([np.ones(len(data)), data["x"]])
    matrices = [K.to_numpy() for K in study["kernels"].values()]
    peers: list[Any] = []
    other = processor(lambda: peers.append(plain_reml(data["y"].to_numpy(), X, matrices)))
    differ = abs(peers[0][0] / fit.criterion - 1)
    return {
        "study": "three kernels",
        "n": len(data),
        "jaxreml_s": took,
        "iterations": fit.n_iter,
        "plain_s": other,
        "plain_evaluations": peers[0][1],
        "differ": differ,
        "agree": bool(fit.converged and differ < AGREE),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small studies")
    parser.add_argument("--glimix", help="a Python interpreter that has glimix-core")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args(arguments)
    print(machine(("jaxreml", "numpy", "scipy"), None) + "\n")
    n, traits = (150, 20) if options.quick else (2000, 1000)
    small = population(60, 3)
    jaxreml.fit_many("~ x + (1 | id)", small["data"], small["traits"],
                     kernels={"id": small["kernels"]["space"]})  # fmt: skip
    study = population(n, traits)
    header("study", "n", "jaxreml, CPU s", "of each", "peer, CPU s", "criteria differ by")
    many = many_traits(study, options.glimix, compared=2)
    peer = f"glimix-core, {many['glimix_traits']} traits: {many['glimix_s']:.1f}" if (
        "glimix_s" in many) else ""  # fmt: skip
    each = f"{many['per_trait_ms']:.2f} ms a trait"
    row(many["study"], n, f"{many['jaxreml_s']:.2f}", each, peer, f"{many['differ']:.0e}")
    three = three_kernels(study)
    each = f"{three['iterations']} iterations"
    peer = f"plain REML, {three['plain_evaluations']} evaluations: {three['plain_s']:.1f}"
    row(three["study"], n, f"{three['jaxreml_s']:.2f}", each, peer, f"{three['differ']:.0e}")
    if options.json:
        options.json.write_text(json.dumps([many, three], indent=1))
    return 0 if many["agree"] and three["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
