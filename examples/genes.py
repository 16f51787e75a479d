"""Which genes respond to a treatment? From a matrix of expression to a table of discoveries.

Sixty donors gave four to six samples each, some treated and some not. Samples of one donor are
alike, so each gene gets a mixed model with a random intercept per donor, and two thousand genes
share one design: `fit_many` fits them all in one call. The study is simulated, so that what is
found can be compared with the truth.

Run: python examples/genes.py [PLOT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, kstest

import jaxreml

SEED = 7
GENES, DONORS = 2_000, 60
RESPOND = 0.1  # share of genes with an effect of treatment
NO_DONOR = 0.3  # share of genes whose expression does not vary between donors
FDR = 0.05  # false discovery rate to control

FORMULA = "~ treatment + age + sex + batch + (1 | donor)"
TREATMENT = "treatment[T.treated]"


def main(path: str | Path | None = None) -> dict:
    """Run the study; the plot goes to `path`, if there is one."""
    rng = np.random.default_rng(SEED)
    samples = simulate_samples(rng)
    expression, truth = simulate_expression(rng, samples)
    spoil(rng, expression)
    print(
        f"{expression.shape[1]} genes in {len(samples)} samples of {DONORS} donors "
        f"({samples['donor'].value_counts().min()} to {samples['donor'].value_counts().max()} "
        f"each), {int(expression.isna().sum().sum())} values missing\n"
    )

    results = jaxreml.fit_many(FORMULA, samples, expression)
    report_failures(results)
    discoveries, accuracy = discover(results, truth)
    donor = donor_shares(results, truth)
    agreement = compare_with_single_fits(results, samples, expression)
    plot = None if path is None else draw(results, discoveries, donor["share"], Path(path))
    return {
        "results": results,
        "truth": truth,
        "discoveries": discoveries,
        **accuracy,
        "donor": donor,
        "agreement": agreement,
        "plot": plot,
    }


def simulate_samples(rng: np.random.Generator) -> pd.DataFrame:
    """Covariates, a row per sample: treatment varies within donors, age and sex between them."""
    counts = rng.integers(4, 7, DONORS)
    donor = np.repeat(np.arange(DONORS), counts)
    first = rng.integers(0, 2, DONORS)  # so that odd counts favour neither arm
    treated = (np.concatenate([np.arange(k) for k in counts]) + first[donor]) % 2
    return pd.DataFrame(
        {
            "donor": [f"donor_{k:02d}" for k in donor],
            "treatment": np.where(treated, "treated", "control"),
            "age": rng.uniform(20, 75, DONORS).round()[donor],
            "sex": rng.choice(["female", "male"], DONORS)[donor],
            "batch": rng.choice(["A", "B", "C"], len(donor)),
        }
    )


def simulate_expression(
    rng: np.random.Generator, samples: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Log2 expression, a column per gene, and what it was made of, a row per gene."""
    names = pd.Index([f"gene_{k:04d}" for k in range(GENES)], name="gene")
    responds = rng.permutation(GENES) < RESPOND * GENES
    fold_change = rng.choice([-1, 1], GENES) * rng.uniform(0.2, 1, GENES)
    donor_sd = 0.5 * rng.lognormal(0, 0.5, GENES)
    truth = pd.DataFrame(
        {
            "mean": rng.normal(7, 2, GENES),
            "treatment": np.where(responds, fold_change, 0.0),
            "age": rng.normal(0, 0.005, GENES),
            "sex": rng.normal(0, 0.1, GENES),
            "donor_sd": np.where(rng.uniform(size=GENES) < NO_DONOR, 0.0, donor_sd),
            "noise_sd": 0.5 * rng.lognormal(0, 0.3, GENES),
        },
        names,
    )
    covariates = np.column_stack(
        [
            np.ones(len(samples)),
            samples["treatment"] == "treated",
            samples["age"],
            samples["sex"] == "male",
        ]
    )
    donors = pd.factorize(samples["donor"])[0]
    batches = pd.factorize(samples["batch"])[0]
    values = covariates @ truth[["mean", "treatment", "age", "sex"]].to_numpy().T
    values += rng.normal(0, 0.3, (batches.max() + 1, GENES))[batches]
    values += (truth["donor_sd"].to_numpy() * rng.normal(size=(DONORS, GENES)))[donors]
    values += truth["noise_sd"].to_numpy() * rng.normal(size=values.shape)
    return pd.DataFrame(values, samples.index, names), truth


def spoil(rng: np.random.Generator, expression: pd.DataFrame) -> None:
    """What real matrices have: values that are missing, a gene never seen, one never measured."""
    chosen = rng.choice(GENES, 5, replace=False)
    for gene in chosen[:3]:
        expression.iloc[rng.choice(len(expression), 15, replace=False), gene] = np.nan
    expression.iloc[:, chosen[3]] = 0.0
    expression.iloc[:, chosen[4]] = np.nan


def report_failures(results: jaxreml.BatchResults) -> None:
    """A gene that cannot be fitted has a status and NaN, and does the others no harm."""
    failed = ~results.converged
    print(f"{len(results) - failed.sum()} genes fitted, {failed.sum()} not:")
    for gene, message in results.message[failed].items():
        print(f"    {gene}: {message}")
    incomplete = results.n_missing[results.converged & (results.n_missing > 0)]
    print("    with missing values, fitted on the rest: ", end="")
    print(", ".join(f"{gene} ({count} missing)" for gene, count in incomplete.items()))


def discover(
    results: jaxreml.BatchResults, truth: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Test treatment in each gene, correct for testing many, and compare with the truth."""
    table = pd.DataFrame(
        {
            "log2_fold_change": results.params[TREATMENT],
            "std_error": results.bse[TREATMENT],
            "df": results.df_satterthwaite[TREATMENT],
            "p_value": results.pvalues[TREATMENT],
        }
    )[results.converged]
    table["q_value"] = false_discovery_control(table["p_value"], method="bh")
    table["discovery"] = table["q_value"] <= FDR
    table["true_effect"] = truth["treatment"]  # by gene

    found, real = table["discovery"], table["true_effect"] != 0
    accuracy = {
        "n_found": int(found.sum()),
        "false_discovery_proportion": float((found & ~real).sum() / max(found.sum(), 1)),
        "power": float((found & real).sum() / real.sum()),
        "coverage": float(
            (
                abs(table["log2_fold_change"] - table["true_effect"]) <= 1.96 * table["std_error"]
            ).mean()
        ),
        "null_uniform": float(kstest(table.loc[~real, "p_value"], "uniform").pvalue),
    }
    columns = ["log2_fold_change", "std_error", "df", "p_value", "q_value", "true_effect"]
    print(f"""
Treatment: {accuracy["n_found"]} discoveries at a false discovery rate of {FDR:.0%}
    {int((found & real).sum())} of the {int(real.sum())} genes that respond are among them:\
 power {accuracy["power"]:.1%}
    {int((found & ~real).sum())} do not respond: false discovery proportion\
 {accuracy["false_discovery_proportion"]:.1%}
    95% intervals cover the true effect in {accuracy["coverage"]:.1%} of all genes
    p-values of genes that do not respond: uniform, by Kolmogorov-Smirnov\
 p = {accuracy["null_uniform"]:.2f}

The ten surest:
{table.sort_values("p_value")[columns].head(10).to_string(float_format="{:.3g}".format)}""")
    return table, accuracy


def donor_shares(results: jaxreml.BatchResults, truth: pd.DataFrame) -> dict[str, Any]:
    """Share of the variance, beyond the covariates, that is between donors."""
    variances = results.variances
    share = (variances[("donor", "(Intercept)")] / variances.sum(axis=1))[results.converged]
    variance = truth[["donor_sd", "noise_sd"]] ** 2
    true_share = (variance["donor_sd"] / variance.sum(axis=1))[share.index]
    varies = true_share > 0
    singular = results.is_singular[share.index]
    donor = {
        "share": share,
        "true_share": true_share,
        "correlation": float(share.corr(true_share)),
        "bias": float((share - true_share)[varies].mean()),
        "singular_without": float(singular[~varies].mean()),
        "singular_with": float(singular[varies].mean()),
    }
    quartiles = share[varies].quantile([0.25, 0.5, 0.75])
    print(f"""
Donors explain {quartiles[0.5]:.0%} of the variance (quartiles {quartiles[0.25]:.0%} to\
 {quartiles[0.75]:.0%}) in the {int(varies.sum())} genes that vary
between donors; mean error of the share {donor["bias"]:+.3f}. The estimate is zero (singular) in
{donor["singular_without"]:.0%} of the genes that do not vary between donors and in\
 {donor["singular_with"]:.0%} of those that do.""")
    return donor


def compare_with_single_fits(
    results: jaxreml.BatchResults, samples: pd.DataFrame, expression: pd.DataFrame
) -> dict[str, float]:
    """Largest relative difference from `jaxreml.fit` in three genes of different kinds."""
    fitted = results.converged
    genes = {
        "complete": fitted & (results.n_missing == 0) & ~results.is_singular,
        "missing values": fitted & (results.n_missing > 0),
        "singular": fitted & results.is_singular,
    }
    differences = {}
    for kind, mask in genes.items():
        gene = mask.idxmax()  # the first
        single = jaxreml.fit(f"gene {FORMULA}", samples.assign(gene=expression[gene]))
        alone = [single.params, single.bse, single.variance_components["variance"]]
        batch = [results.params.loc[gene], results.bse.loc[gene], results.variances.loc[gene]]
        alone, batch = np.concatenate(alone), np.concatenate(batch)
        differences[kind] = float(np.max(np.abs(batch - alone) / np.maximum(np.abs(alone), 1e-3)))
    print("\nLargest relative difference from jaxreml.fit, of estimates, SEs and variances:")
    for kind, difference in differences.items():
        print(f"    {kind}: {difference:.0e}")
    return differences


def draw(
    results: jaxreml.BatchResults, discoveries: pd.DataFrame, share: pd.Series, path: Path
) -> Path | None:
    """Significance against size of effect, and the donors' shares; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    volcano, histogram = figure.subplots(1, 2)
    for found, colour, label in ((False, "0.6", "not discovered"), (True, "C3", "discovered")):
        part = discoveries[discoveries["discovery"] == found]
        evidence = -np.log10(part["p_value"])
        volcano.plot(part["log2_fold_change"], evidence, ".", color=colour, ms=4, label=label)
    volcano.set(xlabel="log2 fold change, treated / control", ylabel="-log10 p")
    volcano.legend(title=f"FDR {FDR:.0%}", frameon=False)
    histogram.hist(share, bins=40, color="C0")
    histogram.set(xlabel="share of variance between donors", ylabel="genes")
    figure.suptitle(f"{results.model.formula}, {len(discoveries)} genes")
    figure.savefig(path, dpi=150)
    print(f"\nPlot: {path}")
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
