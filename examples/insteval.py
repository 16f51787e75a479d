"""Which lecturers are rated best? 73,421 ratings by students, ranked with their uncertainty.

Students at ETH Zurich rated lectures from 1 to 5 (`InstEval` of lme4). A lecturer's mean rating
depends on who rated: some students are kinder than others, and service lectures, given to students
of other departments, are rated lower. The model

    y ~ service + (1 | s) + (1 | d) + (1 | dept)

takes that into account: students s and lecturers d are crossed, 2,972 with 1,128. A lecturer's
conditional mode is shrunk towards the mean, the more so the fewer ratings there are, and comes with
a conditional standard deviation. From these follow a table of ranks with their uncertainty and a
caterpillar plot.

Run: python examples/insteval.py [lecturers.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr

import jaxreml

DRAWS = 2000  # from the conditional distribution of the effects, for the ranks
SEED = 1


def main(path: str | Path | None = None) -> dict:
    """Fit, rank and, if there is a `path`, plot."""
    ratings = jaxreml.datasets.load("insteval")
    fit = jaxreml.fit("y ~ service + (1 | s) + (1 | d) + (1 | dept)", ratings)
    print(fit.summary())

    variances = fit.variance_components.set_index("group")["variance"]
    shares = variances / variances.sum()
    print("Share of the variance of a rating:")
    print(shares.map("{:.1%}".format).to_string(), "\n")

    lecturers = rank(fit, ratings)
    print(f"{len(lecturers)} lecturers by effect, in points of the rating, against the average:\n")
    shown = pd.concat([lecturers.head(10), lecturers.tail(3)])
    print(shown.round(2).to_string())
    apart = (lecturers["lower"] > 0).sum(), (lecturers["upper"] < 0).sum()
    print(f"\n95% intervals above the average: {apart[0]}; below it: {apart[1]}")
    many = lecturers["n_ratings"] >= 100
    deviation = lecturers["mean_rating"] - ratings["y"].mean()
    shrunk = [
        np.sum(lecturers["effect"][group] * deviation[group]) / np.sum(deviation[group] ** 2)
        for group in (lecturers["n_ratings"] < 20, many)
    ]
    print(
        "Of a lecturer's distance from the mean rating, the effect keeps "
        f"{shrunk[0]:.0%} with fewer than 20 ratings and {shrunk[1]:.0%} with 100 or more"
    )
    plot = None if path is None else draw(lecturers, path)
    return {
        "fit": fit,
        "lecturers": lecturers,
        "shares": shares,
        "apart": apart,
        "shrunk": shrunk,
        "plot": plot,
    }


def rank(fit: jaxreml.LMMResults, ratings: pd.DataFrame) -> pd.DataFrame:
    """One row per lecturer, best first: the effect, its interval and what is known of the rank.

    The effects are treated as independent given the data; with dozens of ratings each, from
    different students, they nearly are.
    """
    effect = fit.random_effects["d"]["(Intercept)"]
    se = fit.random_effects_se["d"]["(Intercept)"]
    rng = np.random.default_rng(SEED)
    draws = effect.to_numpy() + se.to_numpy() * rng.normal(size=(DRAWS, len(effect)))
    ranks = 1 + np.argsort(np.argsort(-draws, axis=1), axis=1)
    table = pd.DataFrame(
        {
            "effect": effect,
            "se": se,
            "lower": effect - 1.96 * se,
            "upper": effect + 1.96 * se,
            "rank_lower": np.quantile(ranks, 0.025, axis=0),
            "rank_upper": np.quantile(ranks, 0.975, axis=0),
            "above_average": ndtr(effect / se),
            "n_ratings": ratings["d"].value_counts().reindex(effect.index),
            "mean_rating": ratings.groupby("d", observed=True)["y"].mean().reindex(effect.index),
        }
    )
    table = table.sort_values("effect", ascending=False)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table.rename_axis("lecturer")


def draw(lecturers: pd.DataFrame, path: str | Path) -> Path | None:
    """A caterpillar plot: all effects with their intervals, worst to best; None without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    ordered = lecturers.sort_values("effect")
    places = np.arange(len(ordered))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = np.where(ordered["lower"] > 0, "C0", np.where(ordered["upper"] < 0, "C3", "0.7"))
    axes.vlines(places, ordered["lower"], ordered["upper"], colors=list(colours), linewidth=0.6)
    axes.plot(places, ordered["effect"], color="black", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.5, linestyle=":")
    axes.set(
        xlabel="lecturers, worst to best",
        ylabel="effect on the rating, with 95% interval",
        xlim=(-10, len(ordered) + 10),
    )
    axes.margins(x=0)
    figure.savefig(path, dpi=150)
    print(f"\nPlot: {path}")
    return Path(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lecturers.png")
