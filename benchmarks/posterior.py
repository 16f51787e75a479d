"""Draws from a posterior with the random effects integrated out, and with them sampled.

sleepstudy with random slopes, 4 chains of 1,000 draws after 1,000 of warm-up, the same priors:
``fit.posterior`` (blackjax, chains one after the other), `jaxreml.numpyro.MixedNormal` in numpyro,
and numpyro with the 36 random effects sampled, centred and not, in float32 and float64, chains one
after the other and vectorised: of these the best counts. Each runs in a process of its own; a first
run has the compilation, imports left out. A second run compiles nothing in `fit.posterior`, while
numpyro makes much of its program anew for every run and chain: that ratio is not one of samplers
alone. Effective draws are ArviZ's (bulk), of the three SDs and the correlation. Means are compared
first.

Run: python benchmarks/posterior.py [--quick] [--cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import header, machine, row

NAMES = ("sd[Subject, (Intercept)]", "sd[Subject, Days]", "sigma",
         "correlation[Subject, (Intercept), Days]")  # fmt: skip
TARGET_SECONDS, TARGET_RATIO = 30, 5
FORMULA = "Reaction ~ Days + (Days | Subject)"
MIXED = "fit.posterior", "MixedNormal in numpyro"


def peers() -> list[str]:
    kinds = ("centred", "non-centred"), ("float32", "float64"), ("sequential", "vectorized")
    return [f"effects sampled, {', '.join(kind)}" for kind in itertools.product(*kinds)]


def run_side(side: str, draws: int, chains: int, clock: Any) -> dict[str, Any]:
    """Both runs of one side, in this process."""
    import jax

    if "float32" not in side:
        jax.config.update("jax_enable_x64", True)
    call = of_fit(draws, chains) if side == MIXED[0] else of_numpyro(side, draws, chains)
    seconds, found = [], {}
    for seed in (1, 2):
        if seed == 2 and "vectorized" in side:  # which numpyro 0.22 cannot run again
            seconds.append(np.nan)
            continue
        begun = clock()
        found = call(seed)
        seconds.append(clock() - begun)
    import arviz

    data = arviz.convert_to_dataset({name: found[name] for name in NAMES})
    sizes = arviz.ess(data, method="bulk")
    return {
        "side": side,
        "first": seconds[0],
        "second": seconds[1],
        "ess": {name: float(sizes[name]) for name in NAMES},
        "mean": {name: float(np.mean(found[name])) for name in NAMES},
        "sd": {name: float(np.std(found[name])) for name in NAMES},
        "r_hat": max(float(own) for own in arviz.rhat(data).values()),
        "divergent": int(np.sum(found["divergent"])),
        "gradients": float(np.mean(found["gradients"])),
    }


def of_fit(draws: int, chains: int) -> Any:
    import blackjax  # noqa: F401

    import jaxreml

    data = jaxreml.datasets.load("sleepstudy")

    def call(seed: int) -> dict[str, np.ndarray]:
        posterior = jaxreml.fit(FORMULA, data).posterior(
            draws=draws, warmup=draws, chains=chains, seed=seed
        )
        about = {"divergent": posterior.divergent, "gradients": posterior.gradients}
        return posterior.variables | about

    return call


def of_numpyro(side: str, draws: int, chains: int) -> Any:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    import jaxreml
    from jaxreml.numpyro import MixedNormal, variances

    data = jaxreml.datasets.load("sleepstudy")
    kind = jnp.float32 if "float32" in side else jnp.float64
    X = np.column_stack([np.ones(len(data)), data["Days"]])
    term = jaxreml.Term(data["Subject"], X, "Subject", ("(Intercept)", "Days"))
    codes = np.unique(data["Subject"], return_inverse=True)[1]
    reaction = data["Reaction"].to_numpy()

    def integrated(y: Any) -> None:
        factors, sigma = variances(term, reaction.std())
        numpyro.sample("y", MixedNormal(0.0, term, factors, sigma, X=X), obs=y)

    def sampled(y: Any) -> None:
        factors, sigma = variances(term, reaction.std())
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        with numpyro.plate("subjects", 18):
            if "non-centred" in side:
                standard = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
                b = standard @ factors[0].T
            else:
                law = dist.MultivariateNormal(jnp.zeros(2), scale_tril=factors[0])
                b = numpyro.sample("b", law)
        mean = jnp.sum(jnp.asarray(X, kind) * (beta + b[codes]), axis=1)
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    mixed = side == MIXED[1]
    mcmc = MCMC(
        NUTS(integrated if mixed else sampled),
        num_warmup=draws,
        num_samples=draws,
        num_chains=chains,
        chain_method="sequential" if mixed else side.rpartition(", ")[2],
        progress_bar=False,
    )

    def call(seed: int) -> dict[str, np.ndarray]:
        mcmc.run(jax.random.PRNGKey(seed), reaction if mixed else jnp.asarray(reaction, kind),
                 extra_fields=("diverging", "num_steps"))  # fmt: skip
        found = jax.device_get(mcmc.get_samples(group_by_chain=True))
        about = jax.device_get(mcmc.get_extra_fields(group_by_chain=True))
        return found | {"divergent": about["diverging"], "gradients": about["num_steps"]}

    return call


def in_process(side: str, draws: int, chains: int, cpu: bool) -> dict[str, Any]:
    arguments = ["--side", side, "--draws", str(draws), "--chains", str(chains)]
    arguments += ["--cpu"] * cpu
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(found: list[dict[str, Any]]) -> float:
    """The largest difference of means from those of `fit.posterior`, in Monte Carlo errors."""
    first, worst = found[0], 0.0
    for own in found[1:]:
        for name in NAMES:
            error = np.hypot(*(a["sd"][name] / np.sqrt(a["ess"][name]) for a in (own, first)))
            worst = max(worst, abs(own["mean"][name] - first["mean"][name]) / error)
    return worst


def rates(own: dict[str, Any]) -> dict[str, float]:
    """Effective draws per second."""
    sizes = {"min": min(own["ess"].values()), "median": float(np.median([*own["ess"].values()]))}
    return {
        f"{which} {when}": size / own[key]
        for which, size in sizes.items()
        for when, key in (("with compiling", "first"), ("second run", "second"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer draws and sides")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--cpu", action="store_true", help="times of processors")
    parser.add_argument("--side", help="run this one and print JSON")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=4)
    options = parser.parse_args()
    if options.side:
        clock = time.process_time if options.cpu else time.perf_counter
        print(json.dumps(run_side(options.side, options.draws, options.chains, clock)))
        return
    draws = 200 if options.quick else options.draws
    others = [side for side in peers() if "64, seq" in side] if options.quick else peers()
    sides = [*MIXED, *others]
    found = [in_process(side, draws, options.chains, options.cpu) for side in sides]
    print(machine(("jax", "jaxlib", "numpyro", "blackjax", "arviz"), None), end="\n\n")
    worst = compare(found)
    print(f"Means differ from those of fit.posterior by at most {worst:.1f} Monte Carlo errors.\n")
    header("side", "s, first run", "s, second", "ESS min", "median", "ESS/s first, min", "median",
           "ESS/s second, min", "median", "R-hat", "divergent", "gradients a draw")  # fmt: skip
    for own in found:
        sizes, rate = list(own["ess"].values()), rates(own)
        row(own["side"], f"{own['first']:.1f}", f"{own['second']:.1f}", f"{min(sizes):.0f}",
            f"{np.median(sizes):.0f}", *(f"{rate[key]:.0f}" for key in (
                "min with compiling", "median with compiling", "min second run",
                "median second run")),
            f"{own['r_hat']:.3f}", own["divergent"], f"{own['gradients']:.0f}")  # fmt: skip
    print(f"\nfit.posterior, compilation included: {found[0]['first']:.1f} s "
          f"(target {TARGET_SECONDS} s)")  # fmt: skip
    ratios = {}
    for key in rates(found[0]):
        best = max(found[2:], key=lambda own: np.nan_to_num(rates(own)[key]))
        ratios[key] = rates(found[0])[key] / rates(best)[key]
        print(f"effective draws per second, {key}: {ratios[key]:.1f} times the best with effects "
              f"sampled ({best['side']}); target {TARGET_RATIO}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"sides": found, "ratios": ratios}, indent=1))
    if worst > 5:
        raise SystemExit("the posteriors do not agree")


if __name__ == "__main__":
    main()
