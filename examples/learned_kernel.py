"""How far does a neighbour count? The length scales of a kernel, learned with the variances.

In the orchards of a valley the day of first bloom was recorded for some years. Orchards that lie
near to each other, along the valley and in altitude, bloom at nearly the same time. How near is
near, and is a hundred metres of altitude as far as one kilometre or as ten? A covariance of the
orchards that falls with distance has a length for each direction, and these are parameters of the
restricted likelihood like any other: the kernel is a function of them in JAX, `optimise` minimises
the criterion in lengths and variances together, and its Hessian gives their standard errors.

The criterion on a grid of lengths, by `jaxreml.fit`, shows the same optimum. Orchards without any
record are predicted, and compared with what a model of independent orchards says of them. The
valley is simulated, so that the truth is known.

Run: python examples/learned_kernel.py [PICTURE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxreml

SEED = 4
YEARS = 3
UNITS = ("km along the valley", "m of altitude")
SIZE = np.array([20.0, 800.0])  # of the valley, in these units
LENGTHS = np.array([6.0, 120.0])  # over which the correlation falls to 0.48
FIELD_SD, NOISE_SD = 5.0, 3.0  # days
FORMULA = "bloom ~ year + (1 | orchard)"


def main(path: str | Path | None = None, orchards: int = 130, grid: int = 13) -> dict[str, Any]:
    """Run the study; the picture goes to `path`, if there is one.

    Args:
        path: of the picture.
        orchards: with records, and half as many without.
        grid: lengths tried in each direction for the surface.
    """
    places, field, records, later = simulate(np.random.default_rng(SEED), orchards)
    print(f"{len(records)} records of {orchards} orchards; {len(places) - orchards} without any\n")
    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        learned = learn(places[:orchards], records)
    report(learned)
    models = {
        "independent orchards": None,
        "learned lengths": matern(places, learned["lengths"]),
        "true lengths": matern(places, LENGTHS),
    }
    fits, errors = {}, {}
    for name, kernel in models.items():
        known = None if kernel is None else {"orchard": kernel}
        fits[name] = jaxreml.fit(FORMULA, records, kernels=known)
        predicted = fits[name].predict(later, allow_new_levels=True)
        errors[name] = float(np.sqrt(np.mean((predicted - later["bloom"]) ** 2)))
    print(
        "\nErrors at orchards without records (root mean square, days; the noise alone is ", end=""
    )
    print(f"{NOISE_SD:g}):")
    for name, error in errors.items():
        print(f"    {name:<21} {error:.2f}    criterion {fits[name].criterion:8.2f}")
    gap = abs(fits["learned lengths"].criterion - learned["criterion"])
    print(f"The learned criterion and that of jaxreml.fit with this kernel differ by {gap:.0e}.")

    surface = profile(places[:orchards], records, grid)
    best = surface.stack().idxmin()
    print(
        f"\nOn a grid of {grid} x {grid} lengths the lowest is {surface.min().min():.2f},", end=" "
    )
    print(f"at {best[0]:.1f} km and {best[1]:.0f} m; at the learned lengths it is ", end="")
    print(f"{learned['criterion']:.2f}.")
    figures = {
        "learned": learned,
        "fits": fits,
        "errors": errors,
        "surface": surface,
        "places": places,
        "records": records,
        "gap": gap,
    }
    plot = None if path is None else draw(figures, field, orchards, Path(path))
    return {**figures, "plot": plot}


def simulate(
    rng: np.random.Generator, orchards: int
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Places of all orchards (L, 2), the field there and on a map, and records of those that have
    some and of the others."""
    places = rng.uniform(size=(orchards + orchards // 2, 2)) * SIZE
    everywhere = np.concatenate([places, cells()])
    root = np.linalg.cholesky(matern(everywhere, LENGTHS) + 1e-9 * np.eye(len(everywhere)))
    field = FIELD_SD * (root @ rng.normal(size=len(everywhere)))
    orchard, year = np.divmod(np.arange(len(places) * YEARS), YEARS)
    kept = (rng.uniform(size=orchard.size) < 0.7) | (year == orchard % YEARS)
    table = pd.DataFrame({"orchard": orchard, "year": year.astype(str)})
    table["bloom"] = 110 + np.array([0.0, -4.0, 2.0])[year] + field[orchard]
    table["bloom"] += NOISE_SD * rng.normal(size=orchard.size)
    known = orchard < orchards
    return places, field, table[known & kept], table[~known]


def cells(side: int = 24) -> np.ndarray:
    """Places of a map, row by row."""
    steps = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * SIZE


def matern(places: np.ndarray, lengths: np.ndarray) -> pd.DataFrame:
    """Matern correlations of places, labelled 0, 1, ..., with a length for each direction."""
    return jaxreml.kernels.matern(places / lengths, range=1.0, nu=1.5)


def learn(places: np.ndarray, records: pd.DataFrame) -> dict[str, Any]:
    """Lengths and variances together, by the restricted likelihood, at orchards with records."""
    codes = records["orchard"].to_numpy()
    y, X = records["bloom"].to_numpy(), pd.get_dummies(records["year"], dtype=float).to_numpy()
    squares = jnp.array(((places[:, None] - places) / SIZE) ** 2)

    def design(log_lengths: Any) -> jaxreml.Design:
        """At lengths in shares of the valley's size."""
        apart = jnp.sum(squares / jnp.exp(2 * log_lengths), axis=-1)
        u = jnp.sqrt(3 * jnp.maximum(apart, 1e-20))  # which has a derivative at zero
        term = jaxreml.Term(codes, name="orchard", kernel=(1 + u) * jnp.exp(-u))
        return jaxreml.Design.from_arrays(y, X, term)

    def loss(parameters: Any) -> Any:
        return jaxreml.reml_objective(parameters[2:], design(parameters[:2]))

    begin = jnp.full(2, jnp.log(0.3))
    begin = jnp.concatenate([begin, jaxreml.start(design(begin))])
    found = jaxreml.optimise(loss, begin)
    vcov = 2 * np.linalg.inv(jax.jit(jax.hessian(loss))(found.parameters))
    return {
        "lengths": np.exp(found.parameters[:2]) * SIZE,
        "vcov": vcov[:2, :2],  # of the logarithms
        "log_variances": np.asarray(found.parameters[2:]),
        "criterion": float(found.value),
        "steps": int(found.n_iter),
        "status": jaxreml.Status(int(found.status)),
    }


def report(learned: dict[str, Any]) -> None:
    se = np.sqrt(np.diagonal(learned["vcov"]))
    print(
        f"{learned['steps']} steps of L-BFGS, {learned['status'].name.lower()}. Lengths, with 95%"
    )
    print("intervals by the standard errors of their logarithms:")
    for name, length, error, truth in zip(UNITS, learned["lengths"], se, LENGTHS, strict=True):
        low, high = length * np.exp(np.array([-1.96, 1.96]) * error)
        print(f"    {length:6.1f} {name:<20} {low:6.1f} to {high:6.1f}    (truth {truth:g})")
    field, noise = np.exp(learned["log_variances"] / 2)
    print(f"Standard deviations: orchards {field:.1f} (truth {FIELD_SD:g}), ", end="")
    print(f"records {noise:.1f} (truth {NOISE_SD:g})")


def profile(places: np.ndarray, records: pd.DataFrame, grid: int) -> pd.DataFrame:
    """The criterion at lengths of a grid, the variances estimated anew at each by `fit`."""
    along, up = (length * np.geomspace(0.35, 3.5, grid) for length in LENGTHS)
    values = np.empty((grid, grid))
    for i, j in np.ndindex(grid, grid):
        kernel = {"orchard": matern(places, np.array([along[i], up[j]]))}
        values[i, j] = jaxreml.fit(FORMULA, records, kernels=kernel).criterion
    return pd.DataFrame(values, along, up)


def draw(figures: dict[str, Any], field: np.ndarray, orchards: int, path: Path) -> Path | None:
    """The field, what is said of it with and without a kernel, and the surface of the criterion."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("The picture needs matplotlib: pip install 'jaxreml[plots]'")
        return None
    places, learned, errors = (figures[name] for name in ("places", "learned", "errors"))
    everywhere = np.concatenate([places, cells()])
    kernel = {"orchard": matern(everywhere, learned["lengths"])}
    fit = jaxreml.fit(FORMULA, figures["records"], kernels=kernel)
    predicted = fit.random_effects["orchard"]["(Intercept)"].to_numpy()[len(places) :]
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    maps = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    side = round(len(predicted) ** 0.5)
    most = np.abs(field).max()
    names = (
        "The truth, and orchards with records\n(full) and without (hollow)",
        f"Predicted: wrong by {errors['learned lengths']:.1f} days without\n"
        f"records, by {errors['independent orchards']:.1f} if independent",
    )
    title: Any = {"loc": "left", "fontsize": 11}
    shown = field[len(places) :], predicted
    for ax, values, name in zip(maps[:2], shown, names, strict=True):
        image = ax.imshow(
            values.reshape(side, side), origin="lower", extent=(0, SIZE[0], 400, 400 + SIZE[1]),
            aspect="auto", cmap="RdBu", vmin=-most, vmax=most,
        )  # fmt: skip
        ax.set_title(name, **title)
        ax.set(xlabel="along the valley (km)", ylabel="altitude (m)")
    x, z = places[:, 0], 400 + places[:, 1]
    maps[0].plot(x[:orchards], z[:orchards], "o", color="0.15", markersize=3)
    maps[0].plot(x[orchards:], z[orchards:], "o", color="white", markeredgecolor="0.15", ms=4)
    figure.colorbar(image, ax=maps[:2], shrink=0.9, label="days of bloom from the mean")

    ax, surface = maps[2], figures["surface"]
    above = surface.to_numpy().T - learned["criterion"]
    levels = [0, 0.5, 1, 2, 4, 8, 16, 32, 64, 1000]
    ax.contourf(surface.index, surface.columns, above, levels, cmap="Greys", norm="symlog")
    lines = ax.contour(
        surface.index, surface.columns, above, levels[1:-1], colors="0.35", linewidths=0.7
    )
    ax.clabel(lines, fmt="%g", fontsize=8)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)]) * np.sqrt(5.991)  # 95%, two parameters
    ellipse = np.exp(np.linalg.cholesky(learned["vcov"]) @ circle) * learned["lengths"][:, None]
    ax.plot(*ellipse, color="#0072B2", label="95% by the Hessian")
    ax.plot(*learned["lengths"], "o", color="#0072B2", label="learned")
    ax.plot(*LENGTHS, "X", color="#D55E00", markersize=9, label="truth")
    ax.set(xscale="log", yscale="log", xlabel=f"length ({UNITS[0]})")
    ax.set(ylabel=f"length ({UNITS[1]})")
    ax.set_xticks([3, 6, 12, 20], ["3", "6", "12", "20"])
    ax.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    ax.minorticks_off()
    ax.set_title("Lengths: the criterion above its\nminimum, by jaxreml.fit on a grid", **title)
    ax.legend(frameon=True, fontsize=9, loc="upper left")
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
