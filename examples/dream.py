"""Differential expression from counts with repeated samples: voom, mixed models, moderation.

Forty donors, half of them cases, gave three samples of a tissue each. Counts become log-CPM with a
precision weight for every gene and sample (`jaxreml.voom`), every gene gets a mixed model with a
random intercept per donor and its own weights (`fit_many(weights=)`), and the tests are moderated
over the genes (`moderated`): the steps of dream (Hoffman and Roussos 2021, Bioinformatics 37:192).
Beside it stand the two usual ways out: one correlation within donors for all genes, as limma's
duplicateCorrelation has it, and none at all. The study is simulated, so that discoveries can be
compared with the truth.

Run: python examples/dream.py [PLOT.png]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from scipy.stats import t as student

import jaxreml

SEED = 5
DONORS, SAMPLES, GENES = 40, 3, 2_000
CHANGED = 0.1  # share of genes with another mean in cases
FDR = 0.05
FORMULA = "~ group + age + (1 | donor)"
CASE = "group[T.case]"


def main(path: str | Path | None = None) -> dict[str, Any]:
    """Run the study; the plot goes to `path`, if there is one."""
    rng = np.random.default_rng(SEED)
    samples, codes = simulate_samples(rng)
    counts, changed = simulate_counts(rng, samples, codes)
    print(f"{GENES} genes in {len(samples)} samples of {DONORS} donors, {changed.sum()} changed\n")

    begun = time.perf_counter()
    voom = jaxreml.voom(counts, FORMULA, samples)
    results = jaxreml.fit_many(FORMULA, samples, voom.values, weights=voom.weights)
    moderated = results.moderated()
    took = time.perf_counter() - begun
    shares = results.variance_fractions()
    X = np.column_stack([np.ones(len(samples)), samples["group"] == "case", samples["age"]])
    consensus = consensus_correlation(shares)
    ways = {
        "mixed models": moderated.pvalues[CASE].to_numpy(),
        "one correlation": least_squares(voom.values, X, codes, consensus),
        "no correlation": least_squares(voom.values, X, codes, 0.0),
    }
    accuracy = {name: judged(name, p, changed) for name, p in ways.items()}
    print(
        f"\nOne correlation is {consensus:.2f}; donors have {shares['donor'].min():.2f} to "
        f"{shares['donor'].max():.2f} of a gene's variance. From counts to tests: {took:.1f} s\n"
    )
    table = moderated.top_table(CASE, 5)
    print(table.to_string(float_format="{:.3g}".format))
    plot = None if path is None else draw(moderated, results, Path(path))
    return {"results": results, "accuracy": accuracy, "table": table, "plot": plot}


def simulate_samples(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """A row per sample, and the donors as numbers."""
    codes = np.repeat(np.arange(DONORS), SAMPLES)
    table = {
        "donor": [f"d{code:02d}" for code in codes],
        "group": pd.Categorical(
            np.where(codes % 2, "case", "control"), categories=["control", "case"]
        ),
        "age": rng.normal(0, 1, DONORS)[codes],
    }
    return pd.DataFrame(table), codes


def simulate_counts(
    rng: np.random.Generator, samples: pd.DataFrame, codes: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray]:
    """Counts (samples, genes), and which genes have another mean in cases."""
    n = len(samples)
    changed = rng.uniform(size=GENES) < CHANGED
    between = rng.choice([0.05, 0.3, 0.6], GENES)  # SD between donors, log2
    effects = np.where(changed, rng.choice([-1, 1], GENES) * rng.uniform(0.3, 0.9, GENES), 0.0)
    case = (samples["group"] == "case").to_numpy(float)[:, None]
    mean = rng.uniform(2, 9, GENES) + effects * case
    mean = mean + between * rng.normal(size=(DONORS, GENES))[codes]
    mean = mean + rng.lognormal(-1.5, 0.4, GENES) * rng.normal(size=(n, GENES))
    depth = rng.lognormal(0, 0.3, n)[:, None]
    counts = pd.DataFrame(
        rng.poisson(depth * 2**mean), columns=[f"gene{k:04d}" for k in range(GENES)]
    )
    return counts, changed


def consensus_correlation(shares: pd.DataFrame) -> float:
    """The correlation within donors that all genes are given: a trimmed mean of Fisher's z."""
    rho = shares["donor"] / (shares["donor"] + shares["Residual"])
    z = np.sort(np.arctanh(np.clip(rho.dropna(), -0.99, 0.99)))
    cut = int(0.15 * z.size)
    return float(np.tanh(z[cut : z.size - cut].mean()))


def least_squares(values: pd.DataFrame, X: np.ndarray, codes: np.ndarray, rho: float) -> np.ndarray:
    """p-values of the group by generalised least squares with one correlation for all genes."""
    root = np.linalg.cholesky(rho * np.equal.outer(codes, codes) + (1 - rho) * np.eye(codes.size))
    y, x = (np.linalg.solve(root, part) for part in (values.to_numpy(), X))
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    df = len(y) - x.shape[1]
    variance = np.sum((y - x @ beta) ** 2, axis=0) / df
    return 2 * student.sf(np.abs(beta[1]) / np.sqrt(variance * inverse[1, 1]), df)


def judged(name: str, p: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    """Discoveries at a false discovery rate, against the truth."""
    found = false_discovery_control(p) <= FDR
    power = float(found[changed].mean())
    false = float((~changed[found]).mean()) if found.any() else 0.0
    size = float(np.mean(p[~changed] < 0.05))
    print(
        f"{name:>15}: {found.sum()} found, {100 * power:.0f}% of the changed ones, "
        f"{100 * false:.0f}% false; {100 * size:.1f}% of the others have p < 0.05"
    )
    return {"power": power, "false": false, "size": size}


def draw(moderated: Any, results: Any, path: Path) -> Path | None:
    """Discoveries, and where variance comes from."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        from jaxreml import batch_plots
    except ImportError:
        print("The plot needs matplotlib: pip install 'jaxreml[plots]'")
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    batch_plots.volcano(moderated, CASE, ax=axes[0])
    batch_plots.variance_fractions(results, ax=axes[1])
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
