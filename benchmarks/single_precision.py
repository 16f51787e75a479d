"""What single precision costs: float32 beside float64, for values and gradients of the criterion,
and estimates with their standard errors.

Each design is made twice from the same rows: outside of a program (by `from_arrays` of NumPy arrays
with `dtype="float32"`, which reduces rows in float64) and inside one (rows traced by JAX with
float64 switched off, as a network's outputs are). No times. Errors are in units in which they
matter: of the criterion, where 1 is a standard error; of gradients, by which the optimum moves, and
of estimates in standard errors of float64. Exits with 1 if a fit claims an optimum that is more
than 0.01 standard errors from that of float64.

    python benchmarks/single_precision.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import header, machine, row

import jaxreml
from jaxreml import Design, Estimate, Status, Term, reml_objective

CLAIM = 0.01  # of a standard error: how far from the optimum a fit that converged may be


class Study(NamedTuple):
    """A data set: response, X, per term codes with columns, and the structure."""

    name: str
    y: np.ndarray
    X: np.ndarray
    terms: list[tuple[np.ndarray, np.ndarray]]
    structure: str | None = None

    def design(self, dtype: str, y: Any = None, X: Any = None, columns: Any = None) -> Design:
        """From the given arrays, or its own."""
        columns = [own for _, own in self.terms] if columns is None else columns
        terms = [
            Term(codes, own, name=f"g{k}")
            for k, ((codes, _), own) in enumerate(zip(self.terms, columns, strict=True))
        ]
        y, X = self.y if y is None else y, self.X if X is None else X
        return Design.from_arrays(y, X, terms, structure=self.structure, dtype=dtype)


def simulated(n: int, levels: int, q: int, seed: int) -> tuple[np.ndarray, ...]:
    """Response, X with an intercept and three columns, codes of groups of unequal sizes, and the
    columns of the effects. The residual SD is 1, those of the effects 0.5."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(1.0, size=levels) + 0.05
    more = rng.choice(levels, n - levels, p=share / share.sum())
    codes = np.concatenate([np.arange(levels), more])
    X = np.column_stack([np.ones(n), rng.normal(size=(n, 3))])
    Z = X[:, :q]
    effects = rng.normal(size=(levels, q))[codes] / 2
    return X @ [1.0, 0.5, -0.3, 0.2] + (Z * effects).sum(axis=1) + rng.normal(size=n), X, codes, Z


def studies(quick: bool) -> list[Study]:
    """What is compared; smaller if `quick`."""
    data = jaxreml.datasets.load("sleepstudy")
    days = np.column_stack([np.ones(180), data["Days"]])
    subjects = data["Subject"].cat.codes.to_numpy()
    found = [
        Study("sleepstudy, slopes", data["Reaction"].to_numpy(float), days, [(subjects, days)])
    ]
    n, levels = (2_000, 100) if quick else (100_000, 1_000)
    y, X, codes, Z = simulated(n, levels, 1, 2)
    later = X * np.array([1.0, 5, 1, 1]) + np.array([0.0, 2015, 0, 0])
    size = f"{n:,} rows"
    found += [
        Study(f"{size}, {levels:,} groups", y, X, [(codes, Z)]),
        Study("the same, a column of years, 2015 ± 5", y, later, [(codes, Z)]),
        Study("the same, mean of 10³ residual SDs", y + 1e3, X, [(codes, Z)]),
        Study("the same, mean of 10⁵ residual SDs", y + 1e5, X, [(codes, Z)]),
    ]
    y, X, codes, Z = simulated(n, n // 5, 2, 3)
    found.append(Study(f"{size}, {n // 5:,} groups, slopes", y, X, [(codes, Z)]))
    if not quick:
        far = Z + np.array([0.0, 5.0])
        found.append(Study("the same, covariate of the slopes 5 ± 1", y, X, [(codes, far)]))
    rng = np.random.default_rng(5)
    y, X, codes, Z = simulated(400, 20, 1, 4)
    other = rng.integers(0, 15, 400)
    y = y + rng.normal(size=15)[other] / 2
    found.append(Study("400 rows, dense, 20 + 15", y, X, [(codes, Z), (other, Z)], "dense"))
    if not quick:
        y, X, codes, Z = simulated(20_000, 500, 1, 7)
        other = rng.integers(0, 60, 20_000)
        y = y + rng.normal(size=60)[other] / 2
        found.append(Study("20,000 rows, crossed, 500 + 60", y, X, [(codes, Z), (other, Z)]))
    return found


class Reference(NamedTuple):
    """What float64 says: the estimate, standard errors of parameters and of fixed effects, a point a
    standard error away, and value and gradient of the criterion at both."""

    parameters: np.ndarray
    beta: np.ndarray
    se: np.ndarray
    beta_se: np.ndarray
    away: np.ndarray
    values: list[float]
    gradients: list[np.ndarray]


def roots(matrix: Any) -> np.ndarray:
    return np.sqrt(np.diagonal(np.asarray(matrix, float)))


def reference(study: Study) -> Reference:
    with jax.enable_x64(True):
        design = study.design("float64")
        found = jaxreml.estimate(design)
        assert int(found.status) == Status.CONVERGED
        at, se = np.asarray(found.parameters), roots(found.parameters_vcov)
        away = at + se * np.cos(np.arange(at.size))
        both = jax.jit(jax.value_and_grad(reml_objective))
        values, gradients = zip(*(both(point, design) for point in (at, away)), strict=True)
    beta = np.asarray(found.beta), se, roots(found.vcov)
    return Reference(
        at, *beta, away, [float(v) for v in values], [np.asarray(g) for g in gradients]
    )


def compared(
    study: Study, known: Reference, both: Callable[[Any], Any], fitted: Callable[[], Estimate]
) -> dict[str, Any]:
    """Errors of single precision, by a function to value and gradient and one to the estimate."""
    points = [np.asarray(point, np.float32) for point in (known.parameters, known.away)]
    values, gradients = zip(*(both(point) for point in points), strict=True)
    errors = [float(own) - other for own, other in zip(values, known.values, strict=True)]
    # Newton's step of an error of the gradient, in standard errors: SE^2 / 2 times it, over SE.
    steps = [
        np.abs((np.asarray(own, float) - other) * known.se / 2).max()
        for own, other in zip(gradients, known.gradients, strict=True)
    ]
    found = fitted()
    return {
        "study": study.name,
        "rows": len(study.y),
        "value": max(map(abs, errors)),
        "difference": abs(errors[1] - errors[0]),
        "gradient": max(steps),
        "status": Status(int(found.status)).name,
        "parameters": np.abs(
            (np.asarray(found.parameters, float) - known.parameters) / known.se
        ).max(),
        "beta": np.abs((np.asarray(found.beta, float) - known.beta) / known.beta_se).max(),
        "se": np.abs(roots(found.parameters_vcov) / known.se - 1).max(),
    }


def measured(study: Study) -> list[dict[str, Any]]:
    """Of a design made outside of a program, and inside where the structure allows it."""
    known = reference(study)
    with jax.enable_x64(False):
        outside = study.design("float32")
        objective = jax.jit(jax.value_and_grad(reml_objective))
        found = [
            compared(
                study, known, lambda at: objective(at, outside), lambda: jaxreml.estimate(outside)
            )
            | {"way": "NumPy"}
        ]
        if study.structure is None and len(study.terms) > 1:
            return found
        rows = study.y, study.X, [own for _, own in study.terms]
        rows = jax.tree.map(lambda own: np.asarray(own, np.float32), rows)
        inside = jax.jit(
            lambda at, rows: jax.value_and_grad(reml_objective)(at, study.design("float32", *rows))
        )
        fit = jax.jit(lambda rows: jaxreml.estimate(study.design("float32", *rows)))
        found.append(
            compared(study, known, lambda at: inside(at, rows), lambda: fit(rows))
            | {"way": "traced"}
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small designs")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args(arguments)
    print(machine(("jaxreml", "numpy", "jax"), None) + f"; {jax.devices()[0].device_kind}\n")
    header(
        "design", "rows reduced by", "criterion", "difference of two", "gradient, SE", "status",
        "parameters, SE", "beta, SE", "standard errors, relative",
    )  # fmt: skip
    found = []
    for study in studies(options.quick):
        for own in measured(study):
            found.append(own)
            names = ("gradient", "parameters", "beta", "se")
            gradient, *rest = (f"{own[name]:.0e}" for name in names)
            values = (f"{own[name]:.1g}" for name in ("value", "difference"))
            status = own["status"].lower().replace("_", " ")
            row(own["study"], own["way"], *values, gradient, status, *rest)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=float))
    wrong = [own for own in found if own["status"] == "CONVERGED" and not own["parameters"] < CLAIM]
    print(f"\n{len(wrong)} of {len(found)} fits claim an optimum more than {CLAIM} SE from it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
