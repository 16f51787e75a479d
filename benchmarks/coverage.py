"""Do 95% intervals cover? Simulated data sets from known parameters, on three designs.

Wald, profile and bootstrap intervals of the log-variances, and t intervals of the fixed effects
with each kind of degrees of freedom. Coverage is given over the data sets where an interval exists,
with the share of those where it does not, and its Monte Carlo standard error.

Run: python benchmarks/coverage.py [--sets 2000] [--slow 2000] [--draws 999]
         [--only DESIGN] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from common import header, machine, row
from scipy.special import ndtri, stdtrit

import jaxreml
from jaxreml.data.frame import covariate_frame

LEVEL = 0.95
DF = ("satterthwaite", "kenward-roger", "residual", "inf")


class Truth(NamedTuple):
    """A design and the parameters that responses are drawn from.

    Attributes:
        formula: without its left side.
        table: covariates.
        beta: (p,).
        groups: per term its codes, its columns and the covariance of its effects.
        sigma: residual standard deviation.
    """

    formula: str
    table: pd.DataFrame
    beta: np.ndarray
    covariances: tuple[np.ndarray, ...]
    sigma: float

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Responses, (rows, n)."""
        frame = covariate_frame(self.formula, self.table)
        y = (frame.X @ self.beta)[:, None] + self.sigma * rng.normal(size=(len(self.table), n))
        for term, matrix in zip(frame.terms, self.covariances, strict=True):
            root = np.linalg.cholesky(matrix)
            effects = rng.normal(size=(len(term.levels), n, len(matrix))) @ root.T
            y += np.einsum("rq,rnq->rn", term.effects, effects[term.codes])
        return y

    @property
    def log_variances(self) -> np.ndarray:
        """True log-variances, the residual's last."""
        variances = [np.diagonal(matrix) for matrix in self.covariances]
        return np.log(np.concatenate([*variances, [self.sigma**2]]))


def designs() -> dict[str, Truth]:
    sleep = jaxreml.datasets.load("sleepstudy")[["Days", "Subject"]]
    rng = np.random.default_rng(0)
    sizes = np.array([2, 2, 3, 4, 5, 6, 8, 10])
    g = np.repeat(np.arange(8), sizes)
    between = np.repeat(np.arange(8) % 2, sizes).astype(float)
    uneven = pd.DataFrame({"g": g, "treated": between, "x": rng.normal(size=g.size)})
    subject, item = np.divmod(np.arange(120), 8)  # 15 subjects by 8 items
    crossed = pd.DataFrame({"subject": subject, "item": item, "x": (item % 2).astype(float)})
    return {
        "18 subjects x 10 days, random slopes": Truth(
            "~ Days + (Days | Subject)", sleep, np.array([250.0, 10.0]),
            (np.array([[600.0, 10.0], [10.0, 35.0]]),), 25.0,
        ),
        "8 uneven groups of 2 to 10, treatment between": Truth(
            "~ treated + x + (1 | g)", uneven, np.array([1.0, 0.5, 0.3]),
            (np.array([[0.5]]),), 1.0,
        ),
        "15 subjects x 8 items, crossed": Truth(
            "~ x + (1 | subject) + (1 | item)", crossed, np.array([1.0, 0.5]),
            (np.array([[0.5]]), np.array([[0.3]])), 1.0,
        ),
    }  # fmt: skip


def covered(lower: Any, upper: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Per column the share of existing intervals that hold the truth, and how many exist."""
    lower, upper = np.asarray(lower, float), np.asarray(upper, float)
    exist = ~(np.isnan(lower) | np.isnan(upper))
    inside = exist & (lower <= truth) & (truth <= upper)
    count = exist.sum(axis=0)
    return inside.sum(axis=0) / np.maximum(count, 1), count


def fast(truth: Truth, values: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wald intervals of all parameters; those of fixed effects by each df."""
    found = {}
    adjusted = jaxreml.fit_many(truth.formula, truth.table, values, df="kenward-roger")
    plain = jaxreml.fit_many(truth.formula, truth.table, values)
    residual = plain.nobs.to_numpy()[:, None] - len(truth.beta)
    for name, results, df in (
        ("satterthwaite", plain, plain.df.to_numpy()),
        ("kenward-roger", adjusted, adjusted.df.to_numpy()),
        ("residual", plain, residual),
        ("inf", plain, np.inf),
    ):
        at, half = results.fits.beta, stdtrit(df, (1 + LEVEL) / 2) * results.fits.se
        found[f"beta, {name}"] = covered(at - half, at + half, truth.beta)
    at, error = plain.log_variances.to_numpy(), plain.log_variance_se.to_numpy()
    half = ndtri((1 + LEVEL) / 2) * error
    found["log-variances, Wald"] = covered(at - half, at + half, truth.log_variances)
    return found


def slow(truth: Truth, values: np.ndarray, draws: int) -> dict[str, Any]:
    """Profile and bootstrap intervals of the log-variances, data set by data set."""
    limits: dict[str, list[np.ndarray]] = {}
    n_variances = len(truth.log_variances)
    started = time.perf_counter()
    for k, y in enumerate(values.T):
        fit = jaxreml.fit(f"y {truth.formula}", truth.table.assign(y=y))
        if not fit.converged:
            continue
        intervals = {
            "profile, ML": profile_limits(fit, "ML"),
            "profile, REML": profile_limits(fit, "REML"),
        }
        boot = fit.bootstrap(nsim=draws, seed=k)
        for method in ("percentile", "basic", "bca", "studentized"):
            intervals[f"bootstrap, {method}"] = bootstrap_limits(boot, method)
        for name, pair in intervals.items():
            assert pair.shape == (n_variances, 2), (name, pair.shape)
            limits.setdefault(name, []).append(pair)
        if k % 100 == 99:
            print(f"  {k + 1} of {values.shape[1]}, {time.perf_counter() - started:.0f} s")
    found = {}
    for name, pairs in limits.items():
        both = np.array(pairs)
        found[f"log-variances, {name}"] = covered(both[..., 0], both[..., 1], truth.log_variances)
    return found


def profile_limits(fit: jaxreml.LMMResults, likelihood: str) -> np.ndarray:
    """Of the log-variances, from those of the SDs; (v, 2)."""
    table = fit.profile("theta_", method=likelihood).conf_int(LEVEL)
    sd = table[table.index.str.startswith("sd_") | (table.index == "sigma")]
    with np.errstate(divide="ignore"):
        return 2 * np.log(sd[["lower", "upper"]].to_numpy(float))


def bootstrap_limits(boot: Any, method: str) -> np.ndarray:
    """Of the log-variances, (v, 2)."""
    table = boot.conf_int(LEVEL, method)
    chosen = table[table.index.str.startswith("log_variance[")]
    return chosen[["lower", "upper"]].to_numpy(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="data sets for Wald intervals")
    parser.add_argument("--slow", type=int, default=2000, help="for profile and bootstrap ones")
    parser.add_argument("--draws", type=int, default=999, help="bootstrap draws per data set")
    parser.add_argument("--only", type=int, help="one design, by its number from 0")
    parser.add_argument("--json", type=Path, help="write raw figures there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine(("jaxreml", "jax", "numpy"), None) + "\n")
    raw = {}
    chosen = list(designs().items())
    for name, truth in chosen if arguments.only is None else [chosen[arguments.only]]:
        values = truth.draw(max(arguments.sets, arguments.slow), np.random.default_rng(1))
        found = fast(truth, values[:, : arguments.sets])
        if arguments.slow:
            found |= slow(truth, values[:, : arguments.slow], arguments.draws)
        print(f"\n{name}: {arguments.sets} data sets ({arguments.slow} for profile, bootstrap)\n")
        header("interval", "coverage, %, per parameter", "Monte Carlo error", "none, %")
        for kind, (share, count) in found.items():
            total = arguments.slow if kind.split(", ")[-1] not in (*DF, "Wald") else arguments.sets
            error = np.sqrt(share * (1 - share) / np.maximum(count, 1))
            row(kind, *(", ".join(f"{100 * x:.1f}" for x in part)
                        for part in (share, error, 1 - count / total)))  # fmt: skip
            raw.setdefault(name, {})[kind] = [share.tolist(), count.tolist()]
    if arguments.json:
        arguments.json.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
