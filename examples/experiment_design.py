"""Optimal experiments by gradients: on which days, for which money, in how many groups?

A study is planned from a pilot. `jaxreml.expected_information` says what a plan will tell before
there is a response, and JAX differentiates it in the plan: in how often each day is measured, in
how many people each arm has, in the size of groups. Any optimiser does the rest.

1. Days. Two arms of 60 people, eight measurements each, on days 0 to 9: when? It depends on the
   question. Each answer is compared with the best of all 24,310 ways to do it.
2. Money. One arm is dearer: how many people in each, and how often is each of them measured?
3. Groups. How many batches, and how many samples of each, for the standard error of the variance
   between batches?

Numbers of measurements may be fractions here, which a study rounds. Two plans are then simulated
and fitted 2,000 times each, to see whether the standard errors come true.

Run: python examples/experiment_design.py [FIGURE.png]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.optimize import minimize

import jaxreml

DAYS = np.arange(10.0)
PEOPLE, MEASUREMENTS = 60, 8
# Of the difference between arms in the coefficients of 1, day and day^2: which of them there are,
# and what of them is asked for
QUESTIONS = {
    "slopes of straight lines": ([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
    "slopes of curves on day 0": ([1.0, 1.0, 1.0], [0.0, 1.0, 0.0]),
    "curvatures": ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0]),
}
BUDGET, PRICES = 1200.0, np.array([4.0, 16.0])  # of a person by arm; a measurement costs 1
STOCK, BATCH = 1000.0, 10.0  # a budget, and the price of a batch; a sample costs 1
NSIM = 2000
BLUE, VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito's


def main(path: str | Path | None = None) -> dict:
    sleep = jaxreml.fit("Reaction ~ Days + (Days | Subject)", jaxreml.datasets.load("sleepstudy"))
    dye = jaxreml.fit("Yield ~ 1 + (1 | Batch)", jaxreml.datasets.load("dyestuff"))
    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        days = {question: plan_days(sleep, question) for question in QUESTIONS}
        money = plan_money(sleep)
        groups = plan_groups(dye)
    days["curvatures"]["simulated"] = simulate_days(sleep, days["curvatures"]["whole"])
    groups["simulated"] = simulate_groups(dye, *groups["whole"])
    for what, own, se in (
        (
            "estimated differences of curvatures",
            days["curvatures"],
            days["curvatures"]["se"]["whole"],
        ),
        ("estimated log-variances of batches", groups, groups["se"]),
    ):
        spread = own["simulated"].std(ddof=1)
        print(f"\n{NSIM} simulated studies: SD of {what} {spread:.3f}, expected {se:.3f}")
    plot = None if path is None else draw(days, groups, Path(path))
    return {"pilots": (sleep, dye), "days": days, "money": money, "groups": groups, "plot": plot}


def log_variance(plan: dict, question: tuple, parameters: jax.Array) -> jax.Array:
    """Of a difference between two arms.

    Args:
        plan: "measurements" of each person on each day, (10,), and "people" in each arm, (2,).
        question: as in `QUESTIONS`.
        parameters: the pilot's.
    """
    exists, contrast = question
    X = np.tile(np.vander(DAYS, 3, increasing=True), (2, 1))  # two people: information is a sum
    person = jaxreml.Term(np.repeat([0, 1], len(DAYS)), X[:, :2])
    # The mean of k measurements of a day is a row of weight k.
    weights = jnp.tile(plan["measurements"], 2)
    design = jaxreml.Design.from_arrays(np.zeros(len(X)), X, person, weights=weights)
    of_one = jaxreml.expected_information(parameters, design).beta / 2
    # A coefficient that is known to be zero has no row in the information of the others.
    of_one = jnp.where(jnp.outer(exists, exists) > 0, of_one, jnp.eye(3))
    return jnp.log(contrast @ jnp.linalg.solve(of_one, contrast) * jnp.sum(1 / plan["people"]))


value_and_slopes = jax.jit(jax.value_and_grad(log_variance))


def plan_days(pilot: jaxreml.LMMResults, question: str) -> dict[str, Any]:
    """The best days for a question, by its gradient, and by trying all there are."""
    exists, contrast = map(np.array, QUESTIONS[question])
    people = np.full(2, float(PEOPLE))
    even = np.full(len(DAYS), MEASUREMENTS / len(DAYS))

    def loss(measurements: np.ndarray) -> tuple[float, np.ndarray]:
        plan = {"measurements": measurements, "people": people}
        value, slopes = value_and_slopes(plan, (exists, contrast), pilot.parameters)
        return float(value), np.asarray(slopes["measurements"])

    total = {"type": "eq", "fun": lambda m: m.sum() - MEASUREMENTS, "jac": np.ones_like}
    bounds = [(1e-9, MEASUREMENTS)] * len(DAYS)
    found = minimize(
        loss, even, jac=True, bounds=bounds, constraints=total, method="SLSQP", tol=1e-12
    )
    whole, variance = best_of_all(pilot, contrast[exists > 0])
    ses = np.exp([loss(even)[0] / 2, found.fun / 2]).tolist()
    se = dict(zip(["even", "best", "whole"], [*ses, np.sqrt(variance)], strict=True))
    print(f"{question}: measurements on days 0 to 9, and the standard error of the difference")
    for name, plan in (("even", even), ("best", found.x), ("whole", whole)):
        print(f"  {name:>5}: {' '.join(f'{m:4.1f}' for m in plan)}   {se[name]:.3f}")
    # The variance is convex in the measurements: no plan lowers it by more than this share.
    slopes = loss(found.x)[1]
    gap = float(slopes @ found.x - MEASUREMENTS * slopes.min())
    return {"best": found.x, "whole": whole, "se": se, "gap": gap}


def best_of_all(pilot: jaxreml.LMMResults, contrast: np.ndarray) -> tuple[np.ndarray, float]:
    """The best whole numbers of measurements and its variance, by plain algebra on all plans W:
    X'V^-1 X = X'WX - X'WZ (G^-1 + Z'WZ)^-1 Z'WX."""
    slots = MEASUREMENTS + len(DAYS) - 1
    bars = np.array(list(itertools.combinations(range(slots), len(DAYS) - 1)))
    plans = np.diff(bars, axis=1, prepend=-1, append=slots) - 1
    plans = plans[(plans > 0).sum(axis=1) >= len(contrast)]  # fewer days determine no curve
    X = np.vander(DAYS, len(contrast), increasing=True)
    products = np.einsum("kd,da,db->kab", plans, X, X, optimize=True) / pilot.sigma**2
    inner = np.linalg.inv(pilot.cov_re["Subject"]) + products[:, :2, :2]
    across = products[:, :, :2]
    M = products - across @ np.linalg.solve(inner, across.transpose(0, 2, 1))
    variances = np.linalg.solve(M, contrast[:, None])[:, :, 0] @ contrast * 2 / PEOPLE
    best = int(np.argmin(variances))
    return plans[best], float(variances[best])


def plan_money(pilot: jaxreml.LMMResults) -> dict[str, Any]:
    """People by arm and their measurements for the difference of two slopes, within a budget."""
    exists, contrast = map(np.array, QUESTIONS["slopes of straight lines"])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        plan = {"people": x[:2], "measurements": x[2:]}
        value, slopes = value_and_slopes(plan, (exists, contrast), pilot.parameters)
        return float(value), np.concatenate([slopes["people"], slopes["measurements"]])

    def left(x: np.ndarray) -> float:
        return BUDGET - x[:2] @ (PRICES + x[2:].sum())

    begin = np.concatenate([np.full(2, BUDGET / (PRICES.sum() + 16)), np.full(10, 0.8)])
    bounds = [(1.0, None)] * 2 + [(1e-9, None)] * 10
    within = {"type": "ineq", "fun": left}
    found = minimize(
        loss, begin, jac=True, bounds=bounds, constraints=within, method="SLSQP", tol=1e-12
    )
    se = float(np.exp(found.fun / 2))
    print(f"\nmoney: {found.x[0]:.1f} and {found.x[1]:.1f} people, measured {found.x[2]:.2f} times "
          f"on day 0 and {found.x[-1]:.2f} times on day 9; standard error {se:.3f}")  # fmt: skip
    even = float(np.exp(loss(begin)[0] / 2))
    print(f"  the same number in both arms, 8 measurements on all days: {even:.3f}")
    return {"people": found.x[:2], "measurements": found.x[2:], "se": se, "even": even}


def plan_groups(pilot: jaxreml.LMMResults) -> dict[str, Any]:
    """Batches and samples of each, for the standard error of the log-variance of batches.

    The cross-products of a batch are its number of samples, which need not be whole there.
    """

    def log_se(log_samples: jax.Array) -> jax.Array:
        samples, ones = jnp.exp(log_samples), jnp.ones(2)  # two batches: information is a sum
        squares = samples * ones[:, None, None]
        design = jaxreml.Design.from_moments(
            zz=squares, zx=squares, zy=jnp.zeros((2, 1)), xx=2 * samples[None, None],
            xy=jnp.zeros(1), yy=0.0, n=2 * samples
        )  # fmt: skip
        of_two = jaxreml.expected_information(pilot.parameters, design, "ML").parameters
        batches = STOCK / (BATCH + samples)
        return jnp.log(jnp.linalg.inv(of_two * batches / 2)[0, 0]) / 2

    both = jax.jit(jax.value_and_grad(log_se))

    def loss(x: np.ndarray) -> tuple[float, float]:
        value, slope = both(x[0])
        return float(value), float(slope)

    found = minimize(loss, np.log([5.0]), jac=True, tol=1e-9)
    best = float(np.exp(found.x[0]))
    sizes = np.arange(2, 26)
    ses = np.exp([loss(np.log([k]))[0] for k in sizes.astype(float)])
    samples = int(sizes[np.argmin(ses)])
    batches = int(STOCK // (BATCH + samples))
    se = float(np.exp(found.fun))
    print(f"\ngroups: {STOCK / (BATCH + best):.1f} batches of {best:.2f} samples, standard error "
          f"of their log-variance {se:.3f}; in whole numbers {batches} of {samples}")  # fmt: skip
    return {"best": best, "se": se, "sizes": sizes, "ses": ses, "whole": (batches, samples)}


def simulate_days(pilot: jaxreml.LMMResults, measurements: np.ndarray) -> np.ndarray:
    """Estimated differences of curvatures by `NSIM` studies of a plan."""
    day = np.repeat(DAYS, measurements)
    plan = pd.DataFrame(
        {
            "day": np.tile(day, 2 * PEOPLE),
            "arm": np.repeat([0.0, 1.0], PEOPLE * len(day)),
            "person": np.repeat(np.arange(2 * PEOPLE), len(day)),
        }
    )
    formula = "~ arm * (day + I(day**2)) + (day | person)"
    names = ["(Intercept)", "arm", "day", "I(day ** 2)", "arm:day", "arm:I(day ** 2)"]
    variances = {"person": pilot.cov_re["Subject"].to_numpy()}
    study = jaxreml.population(formula, plan, dict.fromkeys(names, 0.0), variances, pilot.sigma)
    fits = jaxreml.fit_many(formula, plan, study.simulate(NSIM, seed=1))
    return fits.params[names[-1]].to_numpy()


def simulate_groups(pilot: jaxreml.LMMResults, batches: int, samples: int) -> np.ndarray:
    """Estimated log-variances of batches by `NSIM` studies of a plan."""
    plan = pd.DataFrame({"batch": np.repeat(np.arange(batches), samples)})
    variances = {"batch": pilot.variance_components.loc[0, "variance"]}
    study = jaxreml.population(
        "~ 1 + (1 | batch)", plan, {"(Intercept)": 0.0}, variances, pilot.sigma
    )
    fits = jaxreml.fit_many("~ 1 + (1 | batch)", plan, study.simulate(NSIM, seed=2))
    return fits.log_variances.iloc[:, 0].to_numpy()


def draw(days: dict, groups: dict, path: Path) -> Path | None:
    """Plans of days, the cost of group sizes, and what simulation says; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplot_mosaic([["a"] * 2 + ["b"] * 2 + ["c"] * 2, ["d"] * 3 + ["e"] * 3])
    for ax, question in zip((axes[key] for key in "abc"), QUESTIONS, strict=True):
        own = days[question]
        ax.bar(DAYS, own["best"], color=BLUE, label="by gradients")
        there = own["whole"] > 0
        ax.plot(DAYS[there], own["whole"][there], "o", color=VERMILLION, mfc="white", mew=1.6,
                label="best of all 24,310 in whole numbers")  # fmt: skip
        ax.axhline(MEASUREMENTS / len(DAYS), color="0.4", lw=1, ls=":", label="even")
        se = own["se"]
        digits = 2 if se["best"] > 1 else 3
        ax.set_title(f"{question}\nSE {se['even']:.{digits}f} when even, "
                     f"{se['best']:.{digits}f} at best", fontsize=9.5)  # fmt: skip
        ax.set(xticks=DAYS[::3], ylim=(0, 4.6), xlabel="day")
    axes["a"].set_ylabel("measurements of a person")
    figure.legend(*axes["a"].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False)  # fmt: skip

    ax, samples = axes["d"], groups["whole"][1]
    ax.plot(groups["sizes"], groups["ses"], color="0.25", lw=1.6)
    ax.plot(groups["best"], groups["se"], "o", color=BLUE, ms=8)
    text = f"by gradients: {groups['best']:.1f} samples of {groups['whole'][0]} batches"
    ax.text(8, 0.212, text, fontsize=9, color=BLUE)
    ax.plot(samples, groups["simulated"].std(ddof=1), "x", color=VERMILLION, ms=8, mew=2)
    ax.text(8, 0.204, f"SD of {NSIM:,} simulated studies", fontsize=9, color=VERMILLION)
    ax.set(xlabel="samples of a batch, for the same money", ylim=(0.2, 0.29),
           ylabel="SE of a log-variance")  # fmt: skip
    ax.set_title("variance between batches", fontsize=9.5)

    ax, own = axes["e"], days["curvatures"]
    ax.hist(own["simulated"], bins=40, density=True, color="0.8")
    for name, colour, style in (("even", "0.4", ":"), ("best", BLUE, "-")):
        sd = own["se"][name]
        grid = np.linspace(-0.7, 0.7, 200)
        density = np.exp(-((grid / sd) ** 2) / 2) / sd / np.sqrt(2 * np.pi)
        ax.plot(grid, density, color=colour, ls=style, lw=1.8)
    ax.set(yticks=[], xlabel="estimated difference of curvatures (true: 0)")
    ax.set_title(f"{NSIM:,} simulated studies, and what was expected", fontsize=9.5)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
