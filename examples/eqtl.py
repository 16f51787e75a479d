"""Which variants change which genes? Pairs of genes and SNPs in windows, with repeated samples.

A hundred and twenty donors gave two or three samples of a tissue each. Samples of a donor share
a genotype and more, so a regression that takes them for independent finds far too much. Every pair
of a gene and a SNP near it gets a mixed model with a random intercept per donor:
`fit_many(covariates=..., pairs=...)` fits them side by side. The study is simulated, so that what
is found can be compared with the truth.

Run: python examples/eqtl.py [PLOT.png]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

import jaxreml

SEED = 11
DONORS, GENES, WINDOW = 120, 60, 80  # a window of SNPs beside each gene
FDR = 0.05
FORMULA = "~ age + batch + snp + (1 | donor)"


def main(path: str | Path | None = None) -> dict[str, Any]:
    """Run the study; the plot goes to `path`, if there is one."""
    rng = np.random.default_rng(SEED)
    samples, codes = simulate_samples(rng)
    genotypes = simulate_genotypes(rng, codes)
    expression, truth = simulate_expression(rng, samples, codes, genotypes)
    pairs = [(gene, snp) for gene in expression for snp in window(gene, genotypes)]
    print(
        f"{len(expression.columns)} genes, {genotypes.shape[1]} SNPs, {len(pairs)} pairs; "
        f"{len(samples)} samples of {DONORS} donors\n"
    )

    begun = time.perf_counter()
    results = jaxreml.fit_many(
        FORMULA, samples, expression, covariates={"snp": genotypes}, pairs=pairs
    )
    took = time.perf_counter() - begun
    naive = regressions(samples, expression, genotypes, pairs)
    null = np.array([gene not in truth.index for gene, _ in pairs])
    mixed = summarise("mixed models", results.pvalues["snp"], results, null, pairs, truth)
    plain = summarise("regressions", naive, results, null, pairs, truth)
    print(f"\n{1e6 * took / len(pairs):.0f} us a pair, {took:.1f} s in all\n")
    print(results.top_table("snp", 5).to_string(float_format="{:.3g}".format))
    single = results.estimate(0)
    gap = abs(single.criterion - results.criterion.iloc[0])
    print(f"\nThe first pair fitted alone: criteria differ by {gap:.1e}")
    plot = None if path is None else draw(results.pvalues["snp"][null], naive[null], Path(path))
    return {"results": results, "mixed": mixed, "plain": plain, "gap": gap, "plot": plot}


def simulate_samples(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """A row per sample, and the donors as numbers."""
    codes = np.repeat(np.arange(DONORS), rng.integers(2, 4, DONORS))
    n = codes.size
    table = {
        "donor": [f"d{code:03d}" for code in codes],
        "age": rng.normal(50, 12, DONORS)[codes],
        "batch": rng.choice(["a", "b", "c"], n),
    }
    return pd.DataFrame(table), codes


def simulate_genotypes(rng: np.random.Generator, codes: np.ndarray) -> pd.DataFrame:
    """Minor alleles, (samples, SNPs), neighbours in linkage disequilibrium."""
    count = GENES * WINDOW
    hidden = np.zeros((2, DONORS, count))
    hidden[:, :, 0] = rng.normal(size=(2, DONORS))
    for k in range(1, count):
        hidden[:, :, k] = 0.8 * hidden[:, :, k - 1] + 0.6 * rng.normal(size=(2, DONORS))
    cut = np.quantile(hidden, rng.uniform(0.5, 0.9, count), axis=(0, 1)).diagonal()
    alleles = (hidden > cut).sum(axis=0)
    return pd.DataFrame(alleles[codes], columns=[f"rs{k:04d}" for k in range(count)])


def window(gene: str, genotypes: pd.DataFrame) -> list[str]:
    """The SNPs near a gene."""
    k = int(gene.removeprefix("gene"))
    return list(genotypes.columns[k * WINDOW : (k + 1) * WINDOW])


def simulate_expression(
    rng: np.random.Generator, samples: pd.DataFrame, codes: np.ndarray, genotypes: pd.DataFrame
) -> tuple[pd.DataFrame, pd.Series]:
    """Expression (samples, genes), and for the genes that have one the SNP that changes them."""
    n = len(samples)
    columns, truth = {}, {}
    for k in range(GENES):
        name = f"gene{k}"
        share = rng.uniform(0.2, 0.8)  # of the variance is between donors
        y = np.sqrt(share) * rng.normal(size=DONORS)[codes]
        y += np.sqrt(1 - share) * rng.normal(size=n) + 0.01 * (samples["age"] - 50)
        if k % 3 == 0:
            snp = str(rng.choice(window(name, genotypes)[10:-10]))
            truth[name] = snp
            y += 0.6 * genotypes[snp].to_numpy()
        columns[name] = y
    return pd.DataFrame(columns), pd.Series(truth)


def regressions(
    samples: pd.DataFrame, expression: pd.DataFrame, genotypes: pd.DataFrame, pairs: list
) -> pd.Series:
    """p-values of regressions that take all samples for independent."""
    n = len(samples)
    batches = pd.get_dummies(samples["batch"], drop_first=True, dtype=float)
    covariates = np.column_stack([np.ones(n), samples["age"], batches])
    basis = np.linalg.qr(covariates)[0]

    def residuals(values: pd.DataFrame) -> np.ndarray:
        matrix = values.to_numpy(float)
        return matrix - basis @ (basis.T @ matrix)

    y, x = residuals(expression), residuals(genotypes)
    rows = [(expression.columns.get_loc(g), genotypes.columns.get_loc(s)) for g, s in pairs]
    first, second = np.transpose(rows)
    across = np.einsum("nk,nk->k", y[:, first], x[:, second])
    squares = np.sum(y**2, axis=0)[first] * np.sum(x**2, axis=0)[second]
    r, df = across / np.sqrt(squares), n - covariates.shape[1] - 1
    statistic = r * np.sqrt(df / (1 - r**2))
    return pd.Series(2 * student.sf(np.abs(statistic), df), [f"{g}:{s}" for g, s in pairs])


def summarise(
    name: str, p: pd.Series, results: Any, null: np.ndarray, pairs: list, truth: pd.Series
) -> dict[str, float]:
    """Calibration in genes without an effect, and genes found by their best SNP."""
    own = p[results.responses].to_numpy()
    size = float(np.mean(own[null] < 0.05))
    genes = pd.Series(own, [gene for gene, _ in pairs]).groupby(level=0, sort=False).min()
    best = np.minimum(genes * WINDOW, 1.0)  # Bonferroni within the window
    order = np.argsort(best.to_numpy())
    passed = best.iloc[order].to_numpy() <= FDR * np.arange(1, GENES + 1) / GENES
    found = best.index[order[: np.flatnonzero(passed).max(initial=-1) + 1]]
    power = float(np.mean(truth.index.isin(found)))
    false = float(np.mean(~found.isin(truth.index))) if len(found) else 0.0
    print(
        f"{name:>13}: {100 * size:.1f}% of the pairs without an effect have p < 0.05; "
        f"{len(found)} genes found, {100 * power:.0f}% of the true ones, {100 * false:.0f}% false"
    )
    return {"size": size, "power": power, "false": false}


def draw(mixed: pd.Series, naive: pd.Series, path: Path) -> Path | None:
    """Quantiles of p of pairs without an effect, both ways."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("The plot needs matplotlib: pip install 'jaxreml[plots]'")
        return None
    figure, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
    expected = -np.log10((np.arange(len(mixed)) + 0.5) / len(mixed))
    ways = {"regressions": (naive, "C1"), "mixed models": (mixed, "C0")}
    for name, (p, colour) in ways.items():
        ax.plot(expected, -np.log10(np.sort(p)), ".", ms=4, color=colour, label=name)
    ax.plot([0, expected[0]], [0, expected[0]], color="0.5", lw=1)
    ax.set(xlabel="expected -log10 p", ylabel="observed -log10 p")
    ax.set_title("Pairs without an effect", loc="left", fontsize=11)
    ax.legend(frameon=False, markerscale=2)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
