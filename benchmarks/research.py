"""Derivatives through fits, what they cost beside the fit, and the memory of gradients.

Sleepstudy: gradient, Jacobian and Hessian of estimates in the responses, a thousand gradients at a
time, and an optimiser of optax in the place of `estimate`. Compiled programs take turns; times are
the fastest of many calls, as other work on the machine only adds to them. Derivatives are compared
with differences of refits first. Memory: the gradient of the REML objective of a million rows, the
design made inside, each in a process of its own: arguments, results and temporaries as XLA has
allotted them, and what the process grew by at its peak.

    python benchmarks/research.py [--quick] [--json FILE]
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

import jax
import jax.numpy as jnp
import numpy as np
from common import header, machine, row, seconds

import jaxreml

jax.config.update("jax_enable_x64", True)
AGREE = 1e-5  # of derivatives with differences, relative to the largest entry
MIB = 2**20
LONG = 0.02  # seconds from which on a call is made once a round
GRADIENT, JACOBIAN, MEMORY = 2.0, 5.0, 3.0  # targets: times the fit, times the data
ARGUMENTS = {
    "the parameters": (0,),
    "the parameters, y and X": (0, 1, 2),
    "the parameters, y, X and Z": (0, 1, 2, 3),
}


# Times.


def study() -> tuple[Callable[[Any], Any], Any]:
    """`estimate` of sleepstudy as a function of the responses, and these."""
    data = jaxreml.datasets.load("sleepstudy")
    X = np.column_stack([np.ones(len(data)), data["Days"]])
    terms = [jaxreml.Term(data["Subject"], X)]

    def fit(y: Any) -> Any:
        return jaxreml.estimate(jaxreml.Design.from_arrays(y, X, terms))

    return fit, jnp.array(data["Reaction"].to_numpy(float))


def works(fit: Callable[[Any], Any], y: Any, many: int) -> dict[str, tuple[Any, Any]]:
    """Functions and their arguments, by what they do."""

    def one(y: Any) -> Any:
        return fit(y).log_variances[1]

    def by_optax(y: Any, X: Any, codes: Any) -> Any:
        term = jaxreml.Term(codes, X, n_levels=18)
        return jaxreml.optimise(jaxreml.Design.from_arrays(y, X, term))

    X = jnp.stack([jnp.ones(180), jnp.arange(180) % 10.0], axis=1)
    draws = y + jnp.array(np.random.default_rng(1).normal(size=(many, y.size))) * 10
    hessian = jax.jacfwd(jax.grad(one))
    return {
        "fit": (fit, (y,)),
        "gradient of a log-variance in y": (jax.grad(one), (y,)),
        "Jacobian of the variance parameters in y": (jax.jacrev(lambda y: fit(y).parameters), (y,)),
        "the same, forward mode": (jax.jacfwd(lambda y: fit(y).parameters), (y,)),
        "Hessian of a log-variance in y": (hessian, (y,)),
        "Hessian times a vector": (lambda y, v: jax.jvp(jax.grad(one), (y,), (v,))[1], (y, y)),
        f"{many:,} fits": (jax.vmap(fit), (draws,)),
        f"{many:,} gradients": (jax.vmap(jax.grad(one)), (draws,)),
        "optimise, L-BFGS": (by_optax, (y, X, jnp.arange(180) // 10)),
    }


def compiled(function: Any, arguments: Any) -> tuple[float, Any]:
    """Seconds to trace and compile, and the program."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return time.perf_counter() - start, program


def difference(function: Callable[[Any], Any], y: Any, direction: Any, h: float) -> Any:
    """Central difference of a function, of the fourth order."""
    near, far = (
        (function(y + k * h * direction) - function(y - k * h * direction)) / (2 * k * h)
        for k in (1, 2)
    )
    return (4 * near - far) / 3


def apart(value: Any, other: Any) -> float:
    """Largest difference relative to the largest entry."""
    return float(jnp.abs(value - other).max() / jnp.abs(other).max())


def compared(programs: dict[str, Any], arguments: dict[str, Any], y: Any) -> dict[str, float]:
    """How far each program's result is from differences of refits, or from the loop."""
    fit, gradient, jacobian, forward, hessian, product, fits, gradients, optax = programs
    run = {name: program(*arguments[name]) for name, program in programs.items()}
    v = jnp.array(np.random.default_rng(0).normal(size=y.size))
    refits = difference(lambda y: programs[fit](y).parameters, y, v, 0.05)
    bends = difference(programs[gradient], y, v, 0.05)
    draws = arguments[fits][0][:3]
    each = [programs[fit](own) for own in draws]
    return {
        gradient: apart(run[gradient] @ v, refits[1]),
        jacobian: apart(run[jacobian] @ v, refits),
        forward: apart(run[forward], run[jacobian]),
        hessian: apart(run[hessian] @ v, bends),
        product: apart(run[product], run[hessian] @ y),
        fits: apart(run[fits].parameters[:3], jnp.stack([own.parameters for own in each])),
        gradients: apart(run[gradients][:3], jnp.stack([programs[gradient](a) for a in draws])),
        optax: apart(run[optax].parameters, run[fit].parameters),
    }


def times(quick: bool) -> list[dict[str, Any]]:
    fit, y = study()
    own = works(fit, y, 100 if quick else 1000)
    taken, programs, arguments = {}, {}, {}
    for name, (function, given) in own.items():
        taken[name], programs[name] = compiled(function, given)
        arguments[name] = given
    differ = compared(programs, arguments, y)
    best = dict.fromkeys(own, float("inf"))
    for _ in range(5 if quick else 25):
        for name, program in programs.items():
            for _ in range(5 if best[name] < LONG else 1):
                now = seconds(lambda p=program, n=name: jax.block_until_ready(p(*arguments[n])))
                best[name] = min(best[name], now)
    return [
        {
            "work": name,
            "ms": 1e3 * best[name],
            "times_the_fit": best[name] / best["fit"],
            "compile_s": taken[name],
            "apart": differ.get(name, 0.0),
        }
        for name in own
    ]


# Memory.


def rows_of(n: int, groups: int) -> tuple[Any, ...]:
    """Parameters, y, X, Z and codes: three fixed effects, two random ones."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, groups, n).astype(np.int32)
    X = np.column_stack([np.ones(n), rng.normal(size=(n, 2))])
    y = rng.normal(size=n) + rng.normal(size=groups)[codes]
    at = np.array([0.1, -1.0, 0.2, 0.3])
    return tuple(jnp.array(own) for own in (at, y, X, X[:, :2], codes))


def status(field: str) -> float:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def memory_of(what: str, n: int, groups: int) -> dict[str, Any]:
    """Of one gradient, in this process, which should be a fresh one on Linux."""

    def objective(at: Any, y: Any, X: Any, Z: Any, codes: Any) -> Any:
        term = jaxreml.Term(codes, Z, n_levels=groups)
        return jaxreml.reml_objective(at, jaxreml.Design.from_arrays(y, X, term))

    given = rows_of(n, groups)
    data = sum(own.nbytes for own in given[1:])
    places = ARGUMENTS[what]
    taken, program = compiled(jax.value_and_grad(objective, places), given)
    plan = program.memory_analysis()
    allotted = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    ) / data
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    _, gradient = jax.block_until_ready(program(*given))
    grown = (status("VmHWM") - before) / data
    took = min(seconds(lambda: jax.block_until_ready(program(*given))) for _ in range(3))

    rng = np.random.default_rng(1)
    moves = [jnp.array(rng.normal(size=given[k].shape)) for k in places]
    along = sum(jnp.sum(own * move) for own, move in zip(gradient, moves, strict=True))

    def value(step: float) -> Any:
        moved = list(given)
        for k, move in zip(places, moves, strict=True):
            moved[k] = given[k] + step * move
        return program(*moved)[0]

    return {
        "data_MiB": data / MIB,
        "allotted": allotted,
        "peak": 1 + grown,
        "s": took,
        "compile_s": taken,
        "apart": abs(float(along / difference(value, 0.0, 1.0, 1e-4)) - 1),
    }


def memory(quick: bool) -> list[dict[str, Any]]:
    """Of each gradient, in processes of their own."""
    n, groups = (100_000, 5_000) if quick else (1_000_000, 50_000)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.json"
        for what in ARGUMENTS:
            task = ["--memory", what, str(n), str(groups), "--json", str(file)]
            subprocess.run([sys.executable, __file__, *task], check=True)
            found.append({"gradient_in": what, "rows": n, **json.loads(file.read_text())})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and rows")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        what, n, groups = options.memory
        options.json.write_text(json.dumps(memory_of(what, int(n), int(groups))))
        return 0
    print(machine(("jaxreml", "numpy", "jax", "jaxlib"), None) + "\n")
    targets = dict(zip(["gradient of", "Jacobian of"], [GRADIENT, JACOBIAN], strict=True))
    header("work", "ms", "times the fit", "target", "to compile, s", "apart")
    timed = times(options.quick)
    for own in timed:
        own["target"] = next((t for k, t in targets.items() if own["work"].startswith(k)), None)
        ratio = "" if own["work"] == "fit" else f"{own['times_the_fit']:.2f}"
        differ = "" if own["work"] == "fit" else f"{own['apart']:.0e}"
        ends = ratio, own["target"] or "", f"{own['compile_s']:.1f}", differ
        row(own["work"], f"{own['ms']:.3g}", *ends)
    print()
    header("gradient in", "rows", "allotted / data", "peak / data", "target", "s", "apart")
    kept = memory(options.quick)
    for own in kept:
        sizes = f"{own['allotted']:.2f}", f"{own['peak']:.2f}", MEMORY
        ends = f"{own['s']:.2f}", f"{own['apart']:.0e}"
        row(own["gradient_in"], f"{own['rows']:,}", *sizes, *ends)
    if options.json:
        options.json.write_text(json.dumps({"times": timed, "memory": kept}, indent=1))
    return 0 if all(own["apart"] < AGREE for own in [*timed, *kept]) else 1


if __name__ == "__main__":
    sys.exit(main())
