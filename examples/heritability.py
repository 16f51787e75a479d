"""How heritable are a thousand traits? One relationship matrix, decomposed once for all of them.

Six hundred calves of 30 bulls were genotyped, and a thousand traits of each were measured: fats in
milk, proteins in blood. Calves that share more of their genes are more alike in a heritable trait.
`kernels.from_genotypes` makes the matrix of their relationships, and `fit_many(kernels=...)` fits
the model y = mean + sex + genes + noise to every trait. `heritability` gives the share of the
variance that is due to genes, with a standard error and an interval for each. An estimate of zero
has neither: the likelihood falls from the boundary on, and has no curvature there to make one from.

The traits are simulated by small effects of all markers, so that the truth is known.

Run: python examples/heritability.py [PICTURE.png]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import jaxreml

SEED = 3
MARKERS, BULLS, COWS = 2_000, 30, 200
NONE = 0.15  # share of traits that are not heritable at all
MOST = 0.8  # heritability of the others is between 0 and this
BINS = np.array([-0.01, 0.0, 0.2, 0.4, 0.6, 0.8])  # of the true heritability
FORMULA = "~ sex + (1 | calf)"


def main(path: str | Path | None = None, calves: int = 600, traits: int = 1_000) -> dict[str, Any]:
    """Run the study; the picture goes to `path`, if there is one."""
    rng = np.random.default_rng(SEED)
    genotypes = simulate_genotypes(rng, calves)
    table, values, truth = simulate_traits(rng, genotypes, traits)
    kinship = jaxreml.kernels.from_genotypes(genotypes)
    kinship = kinship / np.diagonal(kinship).mean()  # heritability refers to a diagonal of 1

    begun = time.perf_counter()
    results = jaxreml.fit_many(FORMULA, table, values, kernels={"calf": kinship})
    took = time.perf_counter() - begun
    found = results.heritability("calf").assign(truth=truth)
    print(
        f"{traits} traits of {calves} calves: {took:.2f} s, {1e3 * took / traits:.2f} ms a trait\n"
    )
    print(found.head(5).to_string(float_format="{:.2f}".format))
    figures = summarise(found)
    single = jaxreml.fit(
        f"trait {FORMULA}", table.assign(trait=values["trait0"]), kernels={"calf": kinship}
    )
    gap = abs(single.criterion - results.criterion["trait0"])
    print(f"\nThe first trait fitted alone: criteria differ by {gap:.0e}")
    plot = None if path is None else draw(found, figures["bins"], Path(path))
    return {
        "results": results,
        "found": found,
        "kinship": kinship,
        "table": table,
        "values": values,
        "gap": gap,
        **figures,
        "plot": plot,
    }


def simulate_genotypes(rng: np.random.Generator, calves: int) -> pd.DataFrame:
    """Counts of an allele, (calves, markers): one allele of each parent, by chance."""
    frequencies = rng.uniform(0.1, 0.9, MARKERS)

    def gametes(parents: np.ndarray) -> np.ndarray:
        """An allele of each parent, which has two, to each of its calves."""
        alleles = rng.uniform(size=(2, parents.max() + 1, MARKERS)) < frequencies
        which = rng.integers(0, 2, (calves, MARKERS))
        return np.where(which, alleles[1, parents], alleles[0, parents])

    sire, dam = rng.integers(0, BULLS, calves), rng.integers(0, COWS, calves)
    names = pd.Index([f"calf{k:03d}" for k in range(calves)], name="calf")
    return pd.DataFrame(gametes(sire).astype(float) + gametes(dam), names)


def simulate_traits(
    rng: np.random.Generator, genotypes: pd.DataFrame, traits: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series]:
    """A table of the calves, their traits (calves, traits), and the heritability of each."""
    names = pd.Index([f"trait{k}" for k in range(traits)], name="trait")
    truth = np.where(rng.uniform(size=traits) < NONE, 0.0, rng.uniform(0, MOST, traits))
    table = pd.DataFrame({"calf": genotypes.index, "sex": rng.choice(["f", "m"], len(genotypes))})
    centred = genotypes.to_numpy() - genotypes.to_numpy().mean(axis=0)
    centred /= np.sqrt(np.mean(np.sum(centred**2, axis=1)))  # a mean variance of 1
    values = np.sqrt(truth) * (centred @ rng.normal(size=(MARKERS, traits)))
    values += np.sqrt(1 - truth) * rng.normal(size=values.shape)
    values += np.outer(table["sex"] == "m", rng.normal(size=traits))
    return table, pd.DataFrame(values, columns=names), pd.Series(truth, names)


def summarise(found: pd.DataFrame) -> dict[str, Any]:
    """Whether standard errors and intervals keep what they promise, and where there are none."""
    zero = found["estimate"] == 0
    inside = found[~zero]
    covered = (inside["lower"] <= inside["truth"]) & (inside["truth"] <= inside["upper"])
    positive = inside["truth"] > 0  # an interval on the logit scale never reaches zero
    error = found["estimate"] - found["truth"]
    bins = pd.cut(found["truth"], BINS, labels=["0", *(f"to {b:.1f}" for b in BINS[2:])])
    by_bin = pd.DataFrame(
        {
            "traits": bins.value_counts(sort=False),
            "mean": found["estimate"].groupby(bins, observed=False).mean(),
            "truth": found["truth"].groupby(bins, observed=False).mean(),
            "std_error": found["std_error"].groupby(bins, observed=False).mean(),
            "error": np.sqrt((error**2).groupby(bins, observed=False).mean()),
            "zero": zero.groupby(bins, observed=False).mean(),
        }
    )
    coverage = float(covered[positive].mean())
    there = found["truth"][zero]
    print(f"\nCorrelation with the truth {found['estimate'].corr(found['truth']):.2f}, ", end="")
    print(f"mean error {error.mean():+.3f}")
    print(f"Intervals of {positive.sum()} heritable traits: {coverage:.1%} hold the truth, of 95%")
    print(
        f"{zero.sum()} estimates are zero, without standard error or interval; of these traits\n"
        f"{(there == 0).sum()} are not heritable, and the most that one is in truth is "
        f"{there.max():.2f}\n\nBy the true heritability:\n"
        f"{by_bin.to_string(float_format='{:.3f}'.format)}"
    )
    return {"coverage": coverage, "n_zero": int(zero.sum()), "bins": by_bin, "bias": error.mean()}


def draw(found: pd.DataFrame, bins: pd.DataFrame, path: Path) -> Path | None:
    """Estimates against the truth, and standard errors against errors."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("The picture needs matplotlib: pip install 'jaxreml[plots]'")
        return None
    blue, vermillion = "#0072B2", "#D55E00"  # Okabe and Ito's
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    zero = found["estimate"] == 0
    inside = found[~zero].sort_values("truth")
    left.errorbar(
        inside["truth"], inside["estimate"], 1.96 * inside["std_error"],
        fmt="none", ecolor=blue, alpha=0.08, linewidth=1,
    )  # fmt: skip
    left.plot(inside["truth"], inside["estimate"], ".", color=blue, ms=4, label="with an SE")
    left.plot(
        found.loc[zero, "truth"], np.zeros(zero.sum()), "|", color=vermillion, ms=9,
        label="zero: no SE", clip_on=False,
    )  # fmt: skip
    left.plot([0, MOST], [0, MOST], color="0.2", linewidth=1)
    left.set(xlabel="true heritability", ylabel="estimate, and 1.96 standard errors")
    left.set_title(f"{len(found):,} traits, one decomposition", loc="left", fontsize=11)
    left.legend(frameon=False, loc="upper left", markerscale=1.3)
    places = np.arange(len(bins))
    right.bar(places - 0.2, bins["error"], 0.38, color="0.65", label="root mean square error")
    right.bar(places + 0.2, bins["std_error"], 0.38, color=blue, label="mean standard error")
    right.set_xticks(places, list(bins.index))
    right.set(xlabel="true heritability", ylim=(0, 1.35 * bins["error"].max()))
    right.set_title("How wrong estimates are, and say that they are", loc="left", fontsize=11)
    right.legend(frameon=False, loc="upper left")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
