"""What a mixed model does, in one picture: lines of subjects that lend each other strength.

Eighteen people slept three hours a night; every day their reaction times were measured (sleepstudy,
Belenky et al. 2003). Here six of them keep their first three days only, as if they had left the
study; what they did later is drawn in hollow points. A line of least squares through each subject's
own points follows its noise, wildly where there are three of them. The mixed model takes each
subject for one of a population whose intercepts and slopes it estimates, and draws each line
towards the mean: little where there are ten days, much where there are three.

Run: python examples/shrinkage.py [FIGURE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import jaxreml

SHORT = ["308", "309", "330", "335", "352", "372"]  # subjects with three days left
SHOWN = ["330", "352", "308", "337", "349", "351"]  # three of these, and three with all days
DAYS = np.array([0.0, 9.0])
BLUE, VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito's


def main(path: str | Path = "shrinkage.png") -> dict:
    data = jaxreml.datasets.load("sleepstudy")
    left_out = data["Subject"].isin(SHORT) & (data["Days"] >= 3)
    fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data[~left_out])
    lines = subject_lines(fit)
    short = lines.index.isin(SHORT)
    spread = lines.groupby(short)[["own_slope", "mixed_slope"]].std()
    print("Standard deviations of the subjects' slopes (ms per day):")
    print(spread.rename(index={False: "ten days", True: "three days"}).round(1).to_string())
    later = data[left_out]
    of_row = lines.loc[later["Subject"].astype(str)].set_axis(later.index)
    figures = {}
    for kind in ("own", "mixed"):
        predicted = of_row[f"{kind}_intercept"] + of_row[f"{kind}_slope"] * later["Days"]
        figures[kind] = float(np.sqrt(np.mean((later["Reaction"] - predicted) ** 2)))
    print("\nErrors of predictions for the days left out (root mean square, ms):")
    print(f"own data alone {figures['own']:.0f}, mixed model {figures['mixed']:.0f}")
    plot = draw(fit, lines, later, path)
    return {"fit": fit, "lines": lines, "spread": spread, "errors": figures, "plot": plot}


def subject_lines(fit: jaxreml.LMMResults) -> pd.DataFrame:
    """Intercepts and slopes of every subject, from its own points and from the mixed model."""
    mixed = fit.random_effects["Subject"] + fit.params
    rows = {}
    for subject, part in fit.table.groupby("Subject", observed=True):
        slope, intercept = np.polyfit(part["Days"], part["Reaction"], 1)
        rows[subject] = (intercept, slope, *mixed.loc[subject])
    columns = ["own_intercept", "own_slope", "mixed_intercept", "mixed_slope"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("Subject")


def draw(
    fit: jaxreml.LMMResults, lines: pd.DataFrame, later: pd.DataFrame, path: str | Path
) -> Path | None:
    """Six subjects with their points and lines; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    for ax, subject in zip(panels, SHOWN, strict=True):
        own_intercept, own_slope, intercept, slope = lines.loc[subject]
        part = fit.table[fit.table["Subject"] == subject]
        mean = fit.params.to_numpy()
        drawn = [
            ax.plot(DAYS, mean[0] + mean[1] * DAYS, color="0.6", linewidth=1.4, linestyle=":")[0],
            ax.plot(DAYS, own_intercept + own_slope * DAYS, color=VERMILLION, linewidth=1.4,
                    linestyle="--")[0],
            ax.plot(DAYS, intercept + slope * DAYS, color=BLUE, linewidth=2.4)[0],
            ax.scatter(part["Days"], part["Reaction"], s=22, color="0.25", zorder=3, linewidths=0),
            ax.scatter(*later.loc[later["Subject"] == subject, ["Days", "Reaction"]].to_numpy().T,
                       s=22, facecolor="white", edgecolor="0.5", linewidths=0.9, zorder=3),
        ]  # fmt: skip
        ax.set_title(f"subject {subject}: {len(part)} days", fontsize=10)
        ax.set(ylim=(150, 480), xlim=(-0.4, 9.4))
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("days of sleep restriction", fontsize=10)
    figure.supylabel("reaction time (ms)", fontsize=10)
    names = [
        "mean of the population",
        "subject's own data alone",
        "mixed model",
        "data",
        "left out",
    ]
    figure.legend(drawn, names, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    with Image.open(path) as image:  # a tenth of the colours, a third of the bytes
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
    return Path(path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
