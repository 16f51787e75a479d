"""Weights that are learned: the gradient of a held-out loss through the fits inside it.

Eight instruments of unknown precision measure patients, four of them each, and all of them get
worse with the hours since they were calibrated. A mixed model with the right weights would trust
each measurement as it deserves. Here a function with nine parameters gives the weights (a
log-precision for each instrument, and a slope in the hours), and what judges it is how well
measurements are predicted that the fit has not seen:

- inside, the model is fitted to three quarters of every patient's measurements by REML;
- outside, the loss is -2 log density of the other quarter given these, fixed and random effects
  integrated out: the difference of two restricted likelihoods, at the parameters fitted without it;
- so for each of four quarters, and JAX differentiates the sum in the nine parameters, through the
  fits, for an optimiser of optax.

Equal weights, the true ones, and the model's own way, `residual="diag(instrument | patient)"`,
which estimates a variance for each instrument by the likelihood but knows nothing of the hours, are
compared with it on new patients. The data are simulated, so that the truth is known.

Where the likelihood can say it all (`jaxreml.covariance.custom` makes a covariance from any
function), it uses the data better than a held-out loss. The way that is shown here also takes any
other loss, and a network in the place of the nine parameters.

Run: python examples/hyper_gradient.py [FIGURE.png]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import jaxreml

SEED, PATIENTS, NEW, EACH, FOLDS, STEPS = 2, 120, 1000, 4, 4, 60
SDS = np.exp(np.linspace(np.log(0.3), np.log(3), 8))  # of the instruments, just calibrated
DRIFT = 1.5  # of the log-variance, over a day
FORMULA = "y ~ x + (1 | patient)"
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's


def main(path: str | Path | None = None) -> dict:
    rng = np.random.default_rng(SEED)
    data, new = simulate(rng, PATIENTS), simulate(rng, NEW)
    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        step, start = learner(data)
        learned, losses, slopes = learn(step, start)
        truth = {"instrument": -2 * np.log(SDS), "drift": np.array(DRIFT)}
        of_truth = float(step(truth, optimiser.init(truth))[2])
    names = {"equal": start, "learned": learned, "true": truth}
    ways = {name: weighted(data, new, parameters) for name, parameters in names.items()}
    ways["diag"] = own_way(data, new)
    table = pd.DataFrame({name: way["row"] for name, way in ways.items()}).T
    print(f"held-out loss per measurement: {losses[0]:.3f} at equal weights, {losses[-1]:.3f} "
          f"learned in {STEPS} steps, {of_truth:.3f} at the true weights")  # fmt: skip
    print(f"variance grows e-fold {learned['drift']:.2f} times a day (true {DRIFT})\n")
    print(table.round(3).to_string())
    figures = {"data": data, "new": new, "ways": ways, "table": table, "losses": losses,
               "of_truth": of_truth, "learned": learned, "slopes": slopes}  # fmt: skip
    figures["plot"] = None if path is None else draw(figures, Path(path))
    return figures


def simulate(rng: np.random.Generator, patients: int) -> pd.DataFrame:
    """Four measurements of each patient by different instruments."""
    n = EACH * patients
    data = pd.DataFrame(
        {
            "patient": np.repeat(np.arange(patients), EACH),
            "instrument": np.argsort(rng.random((patients, len(SDS))))[:, :EACH].ravel(),
            "x": rng.normal(size=n),
            "hours": rng.uniform(0, 1, n),  # as a share of a day
        }
    )
    sd = SDS[data["instrument"]] * np.exp(DRIFT * data["hours"] / 2)
    people = rng.normal(size=patients)[data["patient"]]
    data["y"] = 1 + 0.5 * data["x"] + people + sd * rng.normal(size=n)
    return data


def log_weights(parameters: dict, data: pd.DataFrame) -> Any:
    """Of every row, NumPy or JAX."""
    return parameters["instrument"][data["instrument"].to_numpy()] - parameters["drift"] * (
        data["hours"].to_numpy()
    )


optimiser = optax.adam(0.2, b1=0.7)


def learner(data: pd.DataFrame) -> tuple[Callable, dict]:
    """A compiled step of the optimiser, and where to start it."""
    X = np.column_stack([np.ones(len(data)), data["x"]])
    patients = jaxreml.Term(data["patient"].to_numpy(), name="patient")

    def design(weights: jax.Array) -> jaxreml.Design:
        return jaxreml.Design.from_arrays(data["y"].to_numpy(), X, patients, weights=weights)

    def of_fold(kept: jax.Array, weights: jax.Array) -> jax.Array:
        seen = design(weights * kept)  # rows of weight zero are left out
        fitted = jaxreml.estimate(seen).parameters
        whole = jaxreml.reml_objective(fitted, design(weights))
        return whole - jaxreml.reml_objective(fitted, seen)

    folds = np.arange(len(data)) % FOLDS
    kept = jnp.array([folds != k for k in range(FOLDS)], float)

    def loss(parameters: dict) -> jax.Array:
        weights = jnp.exp(log_weights(parameters, data))
        return jnp.sum(jax.lax.map(lambda rows: of_fold(rows, weights), kept)) / len(data)

    @jax.jit
    def step(parameters: dict, state: Any) -> tuple[dict, Any, jax.Array, dict]:
        value, slopes = jax.value_and_grad(loss)(parameters)
        updates, state = optimiser.update(slopes, state)
        return optax.apply_updates(parameters, updates), state, value, slopes

    return step, {"instrument": np.zeros(len(SDS)), "drift": np.array(0.0)}


def learn(step: Callable, parameters: dict) -> tuple[dict, list[float], dict]:
    """The parameters learned, the losses on the way, and the gradient where it began."""
    state, losses, slopes = optimiser.init(parameters), [], []
    for _ in range(STEPS):
        before = parameters
        parameters, state, value, slope = step(parameters, state)
        losses.append(float(value))
        slopes.append(slope)
    return jax.device_get(before), losses, jax.device_get(slopes[0])


def weighted(data: pd.DataFrame, new: pd.DataFrame, parameters: dict) -> dict[str, Any]:
    """The model with the weights that these parameters give, and how it does on new patients."""
    logs = [np.asarray(log_weights(parameters, rows)) for rows in (data, new)]
    fit = jaxreml.fit(FORMULA, data, weights=np.exp(logs[0]))
    noise = fit.sigma**2 * np.exp(-logs[1])
    return summary(fit, noise, new)


def own_way(data: pd.DataFrame, new: pd.DataFrame) -> dict[str, Any]:
    """The same for a model that estimates a variance for each instrument."""
    fit = jaxreml.fit(FORMULA, data, residual="diag(instrument | patient)")
    return summary(fit, np.diagonal(fit.residual_cov)[new["instrument"]], new)


def summary(fit: jaxreml.LMMResults, noise: np.ndarray, new: pd.DataFrame) -> dict[str, Any]:
    """The slope, and -2 log density of a new measurement, those of a patient being correlated."""
    X = np.column_stack([np.ones(len(new)), new["x"]]).reshape(-1, EACH, 2)
    rest = new["y"].to_numpy().reshape(-1, EACH) - X @ fit.params.to_numpy()
    tau2 = float(fit.cov_re["patient"].iloc[0, 0])
    V = tau2 + noise.reshape(-1, EACH, 1) * np.eye(EACH)
    squares = np.einsum("ji,ji->j", rest, np.linalg.solve(V, rest[:, :, None])[:, :, 0])
    score = np.mean(np.linalg.slogdet(V)[1] + squares) / EACH + np.log(2 * np.pi)
    sds = np.sqrt(pd.Series(noise).groupby(new["instrument"].to_numpy()).mean())
    row = {"slope": fit.params["x"], "SE": fit.bse["x"], "new patients": score}
    return {"fit": fit, "row": row, "sds": sds.to_numpy()}


def draw(figures: dict, path: Path) -> Path | None:
    """The loss on its way, what is learned, and how it does; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(figures["losses"], color=BLUE, lw=2)
    left.axhline(figures["of_truth"], color="0.4", ls=":", lw=1.4)
    left.text(
        STEPS, figures["of_truth"] + 0.03, "true weights", ha="right", fontsize=9, color="0.3"
    )
    left.set(xlabel="steps of Adam")
    left.set_title("held-out loss of a measurement", fontsize=10)

    ways = figures["ways"]
    truth = SDS * np.sqrt((np.exp(DRIFT) - 1) / DRIFT)
    middle.plot([0.3, 6], [0.3, 6], color="0.7", lw=1)
    for name, colour, marker in (("learned", BLUE, "o"), ("diag", VERMILLION, "x")):
        middle.plot(truth, ways[name]["sds"], marker, color=colour, label=name, mew=1.6)
    middle.axhline(ways["equal"]["sds"][0], color=GREEN, ls="--", lw=1.4, label="equal weights")
    ticks = [0.5, 1, 2, 4]
    middle.set(xscale="log", yscale="log", xlabel="true", ylabel="estimated")
    for axis in (middle.xaxis, middle.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    middle.legend(frameon=False, fontsize=9)
    middle.set_title("SD of the instruments' noise", fontsize=10)

    scores = figures["table"]["new patients"]
    shown = {"equal": GREEN, "diag": VERMILLION, "learned": BLUE}
    excess = [scores[name] - scores["true"] for name in shown]
    bars = right.bar(list(shown), excess, color=list(shown.values()), width=0.6)
    right.bar_label(bars, fmt="%.3f", fontsize=9)
    right.set_title("new patients: loss above\nthat of the true weights", fontsize=10)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
