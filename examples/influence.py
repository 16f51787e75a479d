"""Which observations make a variance what it is? One reverse pass through the fit, and deletions.

How much do people differ in how lack of sleep slows them (sleepstudy, Belenky et al. 2003)? The
estimate is a function of all 180 reaction times, and JAX differentiates it in all of them at once.
If every response is multiplied by c, a variance is by c^2. So half the sum of residuals times
derivatives of the log-variance is exactly 1, whatever the data are, and each row's part of it is
its share in the estimate. Shares can be negative: some rows make people look alike.

Beside them stands what deletion does, by fits without a person and without a row, and
`fit.influence(method="first-order")`, which does without the refits. The picture shows what each of
them is good for:

- A person's share s says nearly all: a sum of squares of 18 people loses one, and the change of its
  logarithm is log(1 - s) + log(17 / 16). First order, a straight line, falls short where one person
  says much (335). With fewer groups, whose mean moves too, both do: of the six batches of dyestuff
  one changes it by -0.85, of which its share says -0.57 and first order -0.46.
- A row's share does not tell what happens without the row. The slope of the person is then drawn
  from nine days, in which others weigh more; the derivative knows the weights of ten only. First
  order in the deletion itself knows this.

Run: python examples/influence.py [FIGURE.png]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxreml

FORMULA = "Reaction ~ Days + (Days | Subject)"
NAME = "log_variance[Subject, Days]"
BLUE, VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito's


def main(path: str | Path | None = None, rows: Sequence[int] | None = None) -> dict:
    """The figure goes to `path`, if there is one; `rows` are those to delete, all if None."""
    data = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit(FORMULA, data)
    slopes = derivatives(data)
    residuals = fit.residuals("marginal").to_numpy()
    data = data.assign(share=residuals * slopes / 2)
    people = data.groupby("Subject")["share"].sum().to_frame()
    people["by share"] = np.log(1 - people["share"]) + np.log(17 / 16)
    for column, method in (("first order", "first-order"), ("deleted", "exact")):
        people[column] = fit.influence(by="Subject", method=method).parameters[NAME]
    single = data.loc[list(data.index if rows is None else rows), ["Subject", "Days", "share"]]
    single["by share"] = np.log(1 - single["share"])
    single["first order"] = fit.influence(method="first-order").parameters[NAME]
    single["deleted"] = [deleted(fit, data.drop(index=row)) for row in single.index]
    report(people, single)
    plot = None if path is None else draw(data, people, single, Path(path))
    return {"fit": fit, "slopes": slopes, "people": people, "rows": single, "plot": plot}


def derivatives(data: pd.DataFrame) -> np.ndarray:
    """Of the log-variance of slopes in every response, (180,): one reverse pass."""
    X = np.column_stack([np.ones(len(data)), data["Days"]])
    subjects = jaxreml.Term(data["Subject"], X)

    def log_variance(y: jax.Array) -> jax.Array:
        return jaxreml.estimate(jaxreml.Design.from_arrays(y, X, [subjects])).log_variances[1]

    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        y = jnp.array(data["Reaction"].to_numpy(float))
        return np.asarray(jax.jit(jax.grad(log_variance))(y))


def deleted(fit: jaxreml.LMMResults, rest: pd.DataFrame) -> float:
    """What the log-variance changes by if only these rows are there."""
    place = fit.parameter_names.index(NAME)
    return float(jaxreml.fit(FORMULA, rest).parameters[place] - fit.parameters[place])


def report(people: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Print both tables where something happens."""
    print(f"Changes of {NAME} without a person; shares sum to {people['share'].sum():.6f}")
    largest = people["deleted"].abs().nlargest(6).index
    print(people.loc[largest].round(3).to_string())
    print("\nand without a row")
    largest = rows["deleted"].abs().nlargest(6).index
    print(rows.loc[largest].round(3).to_string(index=False))
    for what, table in (("people", people), ("rows", rows)):
        errors = table[["by share", "first order"]].sub(table["deleted"], axis=0).abs().max()
        print(f"\nLargest error among {what}: by share {errors['by share']:.3f}, first order "
              f"{errors['first order']:.3f}", end="")  # fmt: skip
    print()


def draw(data: pd.DataFrame, people: pd.DataFrame, rows: pd.DataFrame, path: Path) -> Path | None:
    """Shares of all rows, and predictions beside deletions; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    ax, *scatters = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    order = people["share"].sort_values(ascending=False).index
    table = data.pivot(index="Subject", columns="Days", values="share").loc[order]
    most = table.abs().to_numpy().max()
    image = ax.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    totals = [f"{name}  {people.loc[name, 'share']:+.2f}" for name in order]
    ax.set_yticks(range(len(order)), totals, fontsize=8)
    ax.set_xticks(range(0, 10, 3))
    ax.tick_params(length=0)
    ax.set(xlabel="day")
    ax.set_title("shares of people and rows\nin the variance of slopes", fontsize=10)
    figure.colorbar(image, ax=ax, shrink=0.7, ticks=[-0.1, 0, 0.1])

    texts = "without a person", "without a row"
    for ax, own, title in zip(scatters, (people, rows), texts, strict=True):
        ends = [own["deleted"].min(), own["deleted"].max()]
        ax.axline((0, 0), slope=1, color="0.7", lw=1, zorder=0)
        ways = (("first order", VERMILLION, "x"), ("by share", BLUE, "o"))
        for way, colour, marker in ways:
            ax.scatter(own["deleted"], own[way], s=20, marker=marker, color=colour, label=way,
                       linewidths=1.2 if marker == "x" else 0)  # fmt: skip
        room = 0.1 * (ends[1] - ends[0])
        ax.set(xlim=(ends[0] - room, ends[1] + room), xlabel="by refitting")
        ax.set_title(f"change of the log-variance\n{title}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    scatters[0].set_ylabel("predicted")
    scatters[0].legend(frameon=False, loc="upper left")
    first = people["deleted"].idxmin()
    scatters[0].annotate(first, (people.loc[first, "deleted"], people.loc[first, "first order"]),
                         xytext=(6, 4), textcoords="offset points", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
