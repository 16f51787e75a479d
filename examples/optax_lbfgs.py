"""jaxreml in research code: an optimiser of your own, derivatives through a fit, vmap over fits.

Run: python examples/optax_lbfgs.py [FIGURE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreml

FORMULA = "Reaction ~ Days + (Days | Subject)"
ROW = 9  # the response to differentiate by: the first subject's last day
BLUE, VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito's


def main(path: str | Path | None = None) -> dict:
    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        data = jaxreml.datasets.load("sleepstudy")
        design = jaxreml.design(FORMULA, data)
        estimate = jaxreml.estimate(design)
        own = minimise(design, data["Reaction"].to_numpy(), estimate)
        through = differentiate(data)
        batch = many(data, estimate)
    figures = {**own, **through, **batch}
    figures["plot"] = None if path is None else draw(figures, estimate, Path(path))
    return figures


def minimise(design: jaxreml.Design, y: np.ndarray, estimate: jaxreml.Estimate) -> dict:
    """-2 log restricted likelihood under optax.lbfgs, beside the optimum by `estimate`."""
    solver = optax.lbfgs()

    def objective(params):
        return jaxreml.reml_objective(params, design)

    value_and_grad = optax.value_and_grad_from_state(objective)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
        # the line search leaves value and gradient at the new point in the state
        reached = [optax.tree_utils.tree_get(state, key) for key in ("value", "grad")]
        return params, state, reached[0], jnp.linalg.norm(reached[1])

    # Log-variances start at the response's, correlations at zero.
    names = design.parameter_names
    start = [np.log(y.var()) if name.startswith("log_variance") else 0.0 for name in names]
    params = jnp.array(start)
    state, norm, steps, way = solver.init(params), np.inf, 0, [float(objective(params))]
    while not norm <= 1e-6:  # NaN goes on to the limit below
        if steps == 200:
            raise RuntimeError(f"L-BFGS has not converged: gradient norm {norm:.1e}")
        params, state, criterion, norm = step(params, state)
        way.append(float(criterion))
        steps += 1

    params = np.asarray(params)
    print(f"optax.lbfgs, {steps} steps, gradient norm {norm:.1e}\n")
    print(f"{'':38s}{'optax':>12s}{'estimate':>12s}")
    for name, mine, theirs in zip(names, params, estimate.parameters, strict=True):
        print(f"{name:38s}{mine:12.6f}{theirs:12.6f}")
    print(f"{'criterion':38s}{criterion:12.6f}{estimate.criterion:12.6f}")
    return {
        "names": names,
        "params_optax": params,
        "params_estimate": np.asarray(estimate.parameters),
        "criterion_optax": float(criterion),
        "way": np.array(way),
        "criterion_estimate": float(estimate.criterion),
        "status": int(estimate.status),
    }


def matrix(data) -> np.ndarray:
    return np.column_stack([np.ones(len(data)), data["Days"]])


def design_of(y, data) -> jaxreml.Design:
    """The same model from arrays; y may be traced by JAX."""
    X = matrix(data)
    subjects = jaxreml.Term(data["Subject"], X, "Subject", ("(Intercept)", "Days"))
    return jaxreml.Design.from_arrays(y, X, [subjects])


def differentiate(data) -> dict:
    """How one response moves the estimated variance between subjects' slopes."""

    def log_variance_of_days(y):
        return jaxreml.estimate(design_of(y, data)).log_variances[1]

    y = data["Reaction"].to_numpy(float)
    gradient = jax.grad(log_variance_of_days)(y)  # all 180 derivatives, by one reverse pass
    nudge = np.zeros_like(y)
    nudge[ROW] = 0.01  # milliseconds
    difference = log_variance_of_days(y + nudge) - log_variance_of_days(y - nudge)
    difference = float(difference) / 0.02
    print(f"\nd log-variance of Days / d Reaction[{ROW}], per ms")
    print(f"  jax.grad through the fit {gradient[ROW]:.9f}, finite difference {difference:.9f}")
    top = int(np.argmax(np.abs(gradient)))
    row = data.iloc[top]
    print(f"  most influential row: {top} (subject {row['Subject']}, day {row['Days']:g})")
    return {
        "y": y,
        "gradient": np.asarray(gradient),
        "derivative": float(gradient[ROW]),
        "difference": difference,
    }


def many(data, estimate: jaxreml.Estimate) -> dict:
    """A small parametric bootstrap: eight responses from the fitted model, refitted by vmap."""
    rng = np.random.default_rng(0)
    X = matrix(data)
    levels, subject = np.unique(data["Subject"], return_inverse=True)
    factor = np.zeros((2, 2))
    factor.T[np.triu_indices(2)] = estimate.theta  # lme4's Lambda, column by column
    modes = rng.standard_normal((8, levels.size, 2)) @ factor.T
    noise = rng.standard_normal((8, len(data)))
    sigma = float(estimate.sigma)
    responses = X @ np.asarray(estimate.beta)
    responses = responses + sigma * (np.sum(X * modes[:, subject], axis=-1) + noise)

    def refit(y):
        return jaxreml.estimate(design_of(y, data))

    batch = jax.jit(jax.vmap(refit))(responses)
    loop = np.array([refit(y).log_variances for y in responses])
    print("\nvmap over eight simulated responses: log-variances of (Intercept), Days, Residual")
    for row, status, singular in zip(
        batch.log_variances, batch.status, batch.is_singular, strict=True
    ):
        note = jaxreml.Status(int(status)).name.lower() + (", singular" if singular else "")
        print(f"  {row[0]:9.4f}{row[1]:9.4f}{row[2]:9.4f}   {note}")
    return {
        "statuses": np.asarray(batch.status),
        "log_variances_vmap": np.asarray(batch.log_variances),
        "log_variances_loop": loop,
    }


def draw(figures: dict, estimate: jaxreml.Estimate, path: Path) -> Path | None:
    """The optimiser's way down, and the refits of `vmap`; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    above = np.maximum(figures["way"] - figures["criterion_estimate"], 1e-13)
    left.semilogy(above, ".-", color=BLUE, ms=8)
    left.set(xlabel="steps of optax.lbfgs", ylabel="above the optimum of estimate")
    left.set_xticks(range(0, len(above), 5))
    left.set_title("-2 log restricted likelihood", fontsize=10)
    sds = np.exp(figures["log_variances_vmap"] / 2)
    right.plot(*sds[:, :2].T, "o", color=BLUE, label="simulated and refitted by vmap")
    at = np.exp(np.asarray(estimate.log_variances) / 2)
    right.plot(*at[:2], "*", color=VERMILLION, ms=14, label="estimate, which they are drawn from")
    right.set(
        xlabel="intercepts (ms)", ylabel="slopes (ms per day)", ylim=(0, 1.4 * sds[:, 1].max())
    )
    right.set_title("standard deviations between subjects", fontsize=10)
    right.legend(frameon=False, loc="upper left")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
