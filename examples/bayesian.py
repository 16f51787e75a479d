"""How much do groups differ, when there are few of them? REML, intervals and a posterior.

Twelve students in three schools (the data of ``schools.py``), and eighteen subjects who were kept
from sleep (sleepstudy, Belenky et al. 2003). REML gives one number for how much schools differ, or
subjects' slopes. Wald's interval takes its logarithm for normal: with eighteen subjects that is
nearly so, but of three schools it promises that they differ. The profile likelihood says that they
may as well not differ at all. The posterior weighs all sizes, and shows what the data leave to the
prior: with three schools one that knows what schools are like halves the upper end, with eighteen
subjects it hardly counts.

The No-U-Turn sampler moves log-variances and a correlation only: fixed and random effects are
integrated out. For another prior nothing is sampled anew: the draws are weighted by what it has in
the place of the first.

Run: python examples/bayesian.py [FIGURE.png]   (needs pip install 'jaxreml[bayes,plots]')
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import jaxreml

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's
WIDE, INFORMED = "posterior, wide prior", "posterior, informed prior"
DRAWS, CHAINS = 1000, 4


class Study(NamedTuple):
    """One of the two, and the standard deviation that is in question.

    Attributes:
        title, label: of its panel and of the axis.
        formula, data: of the model.
        prior: the key of `priors` for the standard deviation.
        informed: the mean of an exponential prior that is narrower than the default.
        limit: of the axis.
    """

    title: str
    label: str
    formula: str
    data: Any
    prior: str
    informed: float
    limit: float


def schools() -> dict:
    """The data of ``schools.py``."""
    path = Path(__file__).with_name("schools.py")
    spec = importlib.util.spec_from_file_location("schools", path)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore
    spec.loader.exec_module(module)  # pyright: ignore
    scores = module.simulate(np.random.default_rng(module.SEED), 1)[0]
    return {"score": scores.ravel(), "school": np.repeat(list("ABC"), module.N)}


def main(path: str | Path = "bayesian.png") -> dict:
    studies = [
        Study("three schools", "SD between schools (points)", "score ~ 1 + (1 | school)",
              schools(), "school, (Intercept)", 5.0, 40.0),
        Study("eighteen subjects", "SD of slopes between subjects (ms per day)",
              "Reaction ~ Days + (Days | Subject)", jaxreml.datasets.load("sleepstudy"),
              "Subject, Days", 5.0, 14.0),
    ]  # fmt: skip
    found = [analyse(study) for study in studies]
    for study, own in zip(studies, found, strict=True):
        print(f"\n{study.title}: {study.label}, REML estimate {own['estimate']:.2f}")
        print(own["intervals"].round(2).to_string())
        print(f"R-hat at most {own['r_hat']:.3f}, {own['divergent']} draws divergent;")
        print(f"under the informed prior {len(own['draws'])} draws are worth {own['worth']:.0f}")
    few = found[0]["draws"]
    print(f"\nProbability that the SD between schools is below 2 points: {(few < 2).mean():.2f}")
    return {"studies": found, "plot": draw(studies, found, path)}


def analyse(study: Study) -> dict:
    """Estimate, intervals of four kinds, draws, and their weights under the informed prior."""
    fit = jaxreml.fit(study.formula, study.data)
    group, effect = study.prior.split(", ")
    name = f"sd_{effect}|{group}"
    wald, profile = fit.variance_parameters(), fit.profile().conf_int()
    posterior = fit.posterior(draws=DRAWS, chains=CHAINS, seed=1)
    draws = posterior.variables[f"sd[{study.prior}]"].ravel()
    weights = np.exp(informed(study).logpdf(draws) - default(fit).logpdf(draws))
    weights /= weights.sum()
    order = np.argsort(draws)
    places = np.searchsorted(np.cumsum(weights[order]), [0.025, 0.975])
    ends = {
        "Wald": wald.loc[name, ["lower", "upper"]],
        "profile likelihood": profile.loc[name, ["lower", "upper"]],
        WIDE: np.quantile(draws, [0.025, 0.975]),
        INFORMED: draws[order][places],
    }
    intervals = pd.DataFrame.from_dict(
        {label: np.asarray(pair, float) for label, pair in ends.items()},
        orient="index",
        columns=["lower", "upper"],
    )
    return {
        "fit": fit,
        "estimate": wald.loc[name, "estimate"],
        "intervals": intervals,
        "draws": draws,
        "weights": weights,
        "worth": 1 / np.sum(weights**2),  # draws without weights that say as much
        "r_hat": posterior.diagnostics["r_hat"].max(),
        "divergent": int(posterior.divergent.sum()),
    }


def default(fit: jaxreml.LMMResults) -> Any:
    """The default prior of the standard deviation: half-t, its scale by that of the response."""
    column = fit.frame.terms[0].effects[:, -1]
    return stats.t(3, scale=2.5 * np.std(fit.y) / np.sqrt(np.mean(column**2)))


def informed(study: Study) -> Any:
    """The informed prior."""
    return stats.expon(scale=study.informed)


def draw(studies: list[Study], found: list[dict], path: str | Path) -> Path | None:
    """Densities above, intervals below; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    colours = {WIDE: BLUE, INFORMED: GREEN, "profile likelihood": VERMILLION, "Wald": "0.45"}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", height_ratios=[2.6, 1])
    for column, (study, own) in enumerate(zip(studies, found, strict=True)):
        above, below = panels[:, column]
        edges = np.linspace(0, study.limit, 41)
        for label, weights in ((WIDE, None), (INFORMED, own["weights"])):
            heights = np.histogram(own["draws"], edges, weights=weights)[0]
            heights = heights / (len(own["draws"]) if weights is None else 1)
            if weights is None:
                above.stairs(heights, edges, fill=True, color=colours[label], alpha=0.25)
            above.stairs(heights, edges, color=colours[label], linewidth=1.6)
        for ax in (above, below):
            ax.axvline(own["estimate"], color="0.2", linewidth=1.2, linestyle=":")
        above.set_title(study.title, fontsize=11)
        above.set(yticks=[], ylim=(0, None), xlim=(0, study.limit))
        for place, label in enumerate(colours):
            lower, upper = own["intervals"].loc[label]
            lower = 0.0 if np.isnan(lower) else lower
            shown = study.limit if np.isnan(upper) else min(upper, study.limit)
            below.plot([lower, shown], [-place] * 2, color=colours[label], linewidth=4,
                       solid_capstyle="butt")  # fmt: skip
            if not upper <= study.limit:
                text = "without end" if not np.isfinite(upper) else f"to {upper:.0f}"
                below.annotate(text, (study.limit, -place), (-3, 5), textcoords="offset points",
                               ha="right", fontsize=8, color=colours[label])  # fmt: skip
        below.set(ylim=(-3.6, 0.6), xlabel=study.label)
        below.set_yticks([0, -1, -2, -3], list(colours))
        for ax in (above, below):
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(axis="y", length=0)
        if column:
            below.set_yticklabels([])
    first = panels[0, 0]
    height, top = first.get_ylim()[1], found[0]["estimate"]
    first.annotate("REML estimate", (top, 0.93 * height), (5, 0), textcoords="offset points",
                   fontsize=9, color="0.2")  # fmt: skip
    figure.savefig(path, dpi=130)
    with Image.open(path) as image:  # a tenth of the colours, a third of the bytes
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
    return Path(path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
