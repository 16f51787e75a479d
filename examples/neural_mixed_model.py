"""A network with random effects: does the mixed model's likelihood predict better, and where?

Rows come in groups (patients, shops, sensors) of 2 to 60. The mean is a smooth function of eight
features that a network learns; every group has an intercept and a slope of its own around it. Four
ways to train the same network, on the same batches:

- no groups: squared errors, as if rows were independent;
- dummies: a free intercept and slope for each group, beside the network;
- embedding: a vector for each group, learned, among the inputs of the network;
- random effects: minus twice the log-likelihood of the mixed model, whose variances are learned
  with the network; afterwards the effects of the groups are predicted given their rows.

Each keeps the epoch that was best on one row of every group that was left out for it. Errors are
of the mean (the noise, of variance 1, comes on top), on further rows of the same groups and on
groups that are new, over several simulated data sets of each kind. In the last kind ("confounded")
groups with higher intercepts also have higher values of a feature that does nothing.

Run: pip install equinox; python examples/neural_mixed_model.py [FIGURE.png] (a minute)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import jaxreml

FEATURES = 8
WIDTH = 64
GROUPS = 200
SIZE = 25  # groups in a batch
SHARES = (0.0, 0.1, 0.3, 0.5, 0.8)  # of the variance that features leave, between groups
CONFOUNDED = "0.5, confounded"
BINS = (2, 4, 8, 16, 32, 61)  # numbers of rows in a group
METHODS = ("no groups", "dummies", "embedding", "random effects")
COLOURS = ("#999999", "#D55E00", "#E69F00", "#0072B2")  # Okabe and Ito's


class Rows(NamedTuple):
    """Some rows of one data set."""

    x: Any  # (n, FEATURES), float32
    y: Any
    mean: Any  # of y given the group's effects


class Data(NamedTuple):
    """One data set: rows of known groups, and of new ones."""

    train: Rows
    stop: Rows  # one of each group
    test: Rows  # five of each group
    new: Rows  # five of each of as many new groups; their mean has no effects


def main(
    path: str | Path = "neural_mixed_model.png",
    seeds: int = 8,
    shares: tuple[float, ...] = SHARES,
    epochs: int = 40,
    methods: tuple[str, ...] = METHODS,
) -> dict:
    counts = rows_of_groups()
    kinds = [(share, 0.0) for share in shares] + [(0.5, 1.0)]
    labels = [*(f"{share:g}" for share in shares), CONFOUNDED]
    with jax.enable_x64(True):  # likelihoods need float64; the network stays in float32
        sets = [simulate(counts, *kind, seed) for kind in kinds for seed in range(seeds)]
        keys = jax.random.split(jax.random.key(0), len(sets))
        found = {}
        for method in methods:
            run = jax.jit(trainer(method, counts, epochs))  # compiled once
            found[method] = [jax.device_get(run(*own)) for own in zip(sets, keys, strict=True)]
        errors = {method: [own[1] for own in runs] for method, runs in found.items()}
        table = tabulate(errors, labels, seeds, counts)
        print("Errors of predictions beyond the noise (root mean squares)")
        for where, rows in (("known", "further rows of known groups"), ("new", "new groups")):
            own = averages(table, where, "share").round(3).to_string()
            print(f"\n{rows}, by share of variance between groups\n{own}")
        half = table[table["share"] == "0.5"]
        sizes = averages(half, "by size", "rows")
        print(f"\nknown groups by their rows, share 0.5\n{sizes.round(3).to_string()}")
        chosen = labels.index("0.5") * seeds
        trained, _ = found["random effects"][chosen]
        codes = np.repeat(np.arange(GROUPS), counts)
        variances = by_reml(trained, sets[chosen].train, codes)
    print(f"\nLog-variances in one data set, share 0.5:\n{variances.round(2).to_string()}")
    plot = draw(table, path)
    return {"table": table, "variances": variances, "counts": counts, "plot": plot}


def rows_of_groups() -> np.ndarray:
    """Rows of every group, the same in all data sets: 2 to 60, small ones more often."""
    return np.round(np.geomspace(2, 60, GROUPS)).astype(int)


def mean_function(x: np.ndarray) -> np.ndarray:
    return (
        np.sin(2 * x[..., 1]) + x[..., 2] * x[..., 3] + np.maximum(x[..., 4], 0) + 0.5 * x[..., 0]
    )


def simulate(counts: np.ndarray, share: float, confounding: float, seed: int) -> Data:
    """A data set whose groups have `share` of the variance that the features leave."""
    rng = np.random.default_rng(seed)
    sd = np.sqrt(share / (1 - share) / 2)  # of intercepts and of slopes; the noise has 1

    def rows(codes: np.ndarray, modes: np.ndarray, shift: np.ndarray, new: bool = False) -> Rows:
        x = rng.normal(size=(len(codes), FEATURES))
        x[:, 5] += shift[codes]
        mean = mean_function(x)
        whole = mean + (effects_of(x) * modes[codes]).sum(axis=1)
        y = whole + rng.normal(size=len(codes))
        return Rows(x.astype(np.float32), y, mean if new else whole)

    known, unknown = (sd * rng.normal(size=(GROUPS, 2)) for _ in range(2))
    shifts = [confounding * modes[:, 0] / max(sd, 1e-9) for modes in (known, unknown)]
    groups = np.arange(GROUPS)
    each, five = np.repeat(groups, counts), np.repeat(groups, 5)
    return Data(
        rows(each, known, shifts[0]),
        rows(groups, known, shifts[0]),
        rows(five, known, shifts[0]),
        rows(five, unknown, shifts[1], new=True),
    )


def effects_of(x: Any) -> Any:
    """Columns of the random intercept and slope."""
    return (jnp if isinstance(x, jax.Array) else np).stack([x[..., 0] * 0 + 1, x[..., 0]], axis=-1)


def trainer(method: str, counts: np.ndarray, epochs: int) -> Callable[[Data, Any], Any]:
    """A function of data and a key to the parameters and the errors of one trained network."""
    codes, groups = np.repeat(np.arange(GROUPS), counts), np.arange(GROUPS)
    five = np.repeat(groups, 5)
    passes = [list(jaxreml.batches.groups(codes, SIZE, seed)) for seed in range(epochs)]
    batches = jax.tree.map(lambda *own: np.stack(own), *[own for each in passes for own in each])
    batches = jax.tree.map(lambda own: own.reshape(epochs, -1, *own.shape[1:]), batches)
    steps = batches.scale.size

    def kinds(p: Any) -> dict:
        of_groups = "network" if method == "embedding" else "groups"
        return {name: "network" if name == "network" else of_groups for name in p}

    optimiser = optax.multi_transform(  # embeddings are better with the network's smaller steps
        {
            "network": optax.adam(optax.cosine_decay_schedule(5e-3, steps)),
            "groups": optax.adam(optax.cosine_decay_schedule(5e-2, steps)),
        },
        kinds,
    )

    def network_and_more(key: Any) -> tuple[dict, Any]:
        inputs = FEATURES + 4 * (method == "embedding")
        network = eqx.nn.MLP(inputs, "scalar", WIDTH, 2, jax.nn.gelu, key=key, dtype=jnp.float32)
        weights, static = eqx.partition(network, eqx.is_inexact_array)
        more = {
            "no groups": {},
            "dummies": {"own": jnp.zeros((GROUPS, 2))},
            "embedding": {"own": 0.1 * jax.random.normal(key, (GROUPS, 4), jnp.float32)},
            "random effects": {"variances": jnp.zeros(4)},
        }
        return {"network": weights, **more[method]}, static

    def train(data: Data, key: Any) -> tuple[Any, Any]:
        begin, static = network_and_more(key)

        def outputs(p: Any, x: Any, own: Any) -> Any:
            """Predictions with given effects, or embeddings, of each row's group."""
            if method == "embedding":
                x = jnp.concatenate([x, own], axis=1)
            found = jax.vmap(eqx.combine(p["network"], static))(x)
            if method in ("dummies", "random effects"):
                found = found + jnp.sum(effects_of(x) * own, axis=1)
            return found

        def loss(p: Any, batch: Any) -> Any:
            x, y = data.train.x[batch.rows], data.train.y[batch.rows]
            if method == "random effects":
                residual = y - outputs(p, x, 0.0)
                return jaxreml.ml_objective(
                    p["variances"], design(residual, x, batch.codes, SIZE, batch.weights)
                )
            own = p["own"][codes_of[batch.rows]] if "own" in p else None
            return jnp.sum(batch.weights * (y - outputs(p, x, own)) ** 2)

        def own_effects(p: Any) -> Any:
            """What is known of each group, (GROUPS, .)."""
            if method == "random effects":
                residual = data.train.y - outputs(p, data.train.x, 0.0)
                whole = design(residual, data.train.x, codes, GROUPS)
                return jaxreml.effects(p["variances"], whole).random[0]
            return p.get("own", jnp.zeros((GROUPS, 0)))

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            p, state = carry
            updates, state = optimiser.update(jax.grad(loss)(p, batch), state)
            return (optax.apply_updates(p, updates), state), None

        def epoch(carry: Any, batches: Any) -> tuple[Any, None]:
            (p, state), best, least = carry
            (p, state), _ = jax.lax.scan(step, (p, state), batches)
            left_out = jnp.mean((data.stop.y - outputs(p, data.stop.x, own_effects(p))) ** 2)
            best = jax.tree.map(lambda new, old: jnp.where(left_out < least, new, old), p, best)
            return ((p, state), best, jnp.minimum(least, left_out)), None

        start = (begin, optimiser.init(begin)), begin, jnp.array(jnp.inf)
        (_, p, _), _ = jax.lax.scan(epoch, start, jax.tree.map(jnp.asarray, batches))
        own = own_effects(p)
        unknown = own.mean(axis=0) if method in ("dummies", "embedding") else 0 * own[0]
        new = outputs(p, data.new.x, jnp.broadcast_to(unknown, (len(five), len(unknown))))
        known = outputs(p, data.test.x, own[five])
        squares = (known - data.test.mean) ** 2, (new - data.new.mean) ** 2
        return p, [own.reshape(GROUPS, 5).mean(axis=1) for own in squares]

    codes_of = jnp.asarray(codes)
    return train


def design(residual: Any, x: Any, codes: Any, levels: int, weights: Any = None) -> jaxreml.Design:
    """The mixed model of what a network leaves: its mean is zero."""
    term = jaxreml.Term(codes, effects_of(x), "group", ("1", "x0"), n_levels=levels)
    none = jnp.zeros((residual.size, 0))
    return jaxreml.Design.from_arrays(residual, none, term, weights=weights)


def by_reml(p: Any, train: Rows, codes: np.ndarray) -> pd.DataFrame:
    """Log-variances by REML given the features of the trained network's last layer, with standard
    errors, beside those learned with the network."""
    *hidden, _ = p["network"].layers
    features = jnp.asarray(train.x)
    for layer in hidden:
        features = jax.nn.gelu(features @ layer.weight.T + layer.bias)

    frame = pd.DataFrame(np.asarray(features, float)).add_prefix("h")
    frame = frame.assign(y=train.y, x0=train.x[:, 0], group=codes)
    columns = " + ".join(f"h{k}" for k in range(WIDTH))
    found = jaxreml.fit(f"y ~ {columns} + (x0 | group)", frame)
    assert found.converged
    table = {
        "true": [*np.log([0.5, 0.5]), 0.0],
        "with the network": p["variances"][[0, 1, 3]],
        "REML": found.log_variances,
        "SE": found.log_variance_se,
    }
    return pd.DataFrame(table)


def tabulate(errors: dict, labels: list[str], seeds: int, counts: np.ndarray) -> pd.DataFrame:
    """Root mean squares of every method on every data set: all known groups, new ones, and known
    ones by their numbers of rows."""
    found = []
    for method, of_sets in errors.items():
        for k, (of_known, of_new) in enumerate(of_sets):
            at = {"method": method, "share": labels[k // seeds], "seed": k % seeds}
            found.append({**at, "where": "known", "error": np.sqrt(of_known.mean())})
            found.append({**at, "where": "new", "error": np.sqrt(of_new.mean())})
            for low, high in pairwise(BINS):
                own = of_known[(counts >= low) & (counts < high)]
                name = f"{low}-{high - 1}"
                error = np.sqrt(own.mean())
                found.append({**at, "where": "by size", "rows": name, "error": error})
    return pd.DataFrame(found)


def averages(table: pd.DataFrame, where: str, by: str, of: str = "mean") -> pd.DataFrame:
    own = table[table["where"] == where].groupby([by, "method"], sort=False)["error"]
    return own.agg(of).unstack(sort=False)


def draw(table: pd.DataFrame, path: str | Path) -> Path | None:
    """Errors by share, on known and on new groups, and by size; bars are two standard errors."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    plain = table[table["share"] != CONFOUNDED]
    panels = (
        (plain, "known", "share", "known groups", "share of variance between groups"),
        (table[table["share"] == "0.5"], "by size", "rows", "known groups, share 0.5",
         "rows of the group"),
        (plain, "new", "share", "new groups", "share of variance between groups"),
    )  # fmt: skip
    for ax, (own, where, by, title, label) in zip(axes, panels, strict=True):
        mean, se = (averages(own, where, by, of) for of in ("mean", "sem"))
        at = mean.index.astype(float) if by == "share" else np.arange(len(mean))
        for k, method in enumerate(mean):
            colour = COLOURS[METHODS.index(method)]
            places = at + 0.012 * (k - 1.5) * np.ptp(at)
            ax.errorbar(
                places, mean[method], 2 * se[method].fillna(0), color=colour, label=method,
                marker="o", markersize=4, linewidth=2.2 if method == METHODS[-1] else 1.4,
                elinewidth=1, capsize=2,
            )  # fmt: skip
        ax.set_xticks(at, mean.index)
        ax.set(title=title, xlabel=label, ylim=(0, None))
        ax.title.set_fontsize(10.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error of predictions (noise: 1)")
    others = averages(plain, "known", "share").drop(columns="no groups")
    axes[0].set_ylim(0, 1.1 * others.to_numpy().max())  # without groups errors go up to 2
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)  # fmt: skip
    figure.savefig(path, dpi=120)
    return Path(path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
