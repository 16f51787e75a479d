"""Simulated studies for batched_fits.py and agreement.py, and what peers say about them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import for_r, have_r, header, row, run_r, version
from scipy.linalg import block_diag, cho_factor, cho_solve

import jaxreml

ABOVE = 1e-6  # jaxreml's criterion may not exceed the better peer's by more
BEHIND = 1e-4  # a peer's criterion this far above jaxreml's is checked by dense algebra
PATIENCE = 50  # at most so many of them per study
LOOSE = 1e-2  # of a standard error: criteria within 1e-6 leave theta uncertain by about 1e-3


@dataclass(frozen=True)
class Study:
    """One design, and the truth that responses are drawn around.

    Attributes:
        name, formula: the formula has no left side.
        data: its columns.
        X, codes, effects: fixed effects, grouping factor's codes, random effects, made by hand.
        beta, sds, sigma: fixed effects, typical random-effect SDs, residual SD.
    """

    name: str
    formula: str
    data: pd.DataFrame
    X: np.ndarray
    codes: np.ndarray
    effects: np.ndarray
    beta: np.ndarray
    sds: np.ndarray
    sigma: float

    def simulate(self, count: int, seed: int = 0) -> np.ndarray:
        """(n, count) responses; in 40% of them the truth lies on the boundary.

        Random-effect SDs are log-normal around `sds`, correlations uniform. With one random
        effect, 40% of the responses have a variance of zero. With two, 15% have the first at zero,
        15% the second, 5% both and 5% a correlation of +-1. SDs near zero and small samples make
        some of the others singular too, and some of these not.
        """
        rng = np.random.default_rng(seed)
        q, levels = self.effects.shape[1], int(self.codes.max()) + 1
        sds = self.sds[:, None] * rng.lognormal(0, 0.5, (q, count))
        correlation = rng.uniform(-0.95, 0.95, count)
        draw = rng.uniform(size=count)
        if q == 1:
            sds[0, draw < 0.4] = 0
        else:
            sds[0, draw < 0.2] = 0
            sds[1, (draw > 0.15) & (draw < 0.35)] = 0
            perfect = (draw > 0.35) & (draw < 0.4)
            correlation[perfect] = np.sign(correlation[perfect])
        z = rng.standard_normal((q, levels, count))
        if q == 2:
            z[1] = correlation * z[0] + np.sqrt(1 - correlation**2) * z[1]
        y = self.sigma * rng.standard_normal((len(self.X), count))
        for k in range(q):
            y += self.effects[:, k, None] * (sds[k] * z[k])[self.codes]
        y += self.X @ (self.beta[:, None] * rng.lognormal(0, 0.2, (len(self.beta), count)))
        return y

    def dense(self, y: np.ndarray, theta: np.ndarray) -> float:
        """REML criterion at theta by dense algebra of the n x n covariance, nothing of jaxreml."""
        (n, p), q = self.X.shape, self.effects.shape[1]
        factor = np.zeros((q, q))
        factor.T[np.triu_indices(q)] = theta  # lower triangle, column by column
        order = np.argsort(self.codes, kind="stable")
        inside = np.split(
            self.effects[order] @ factor, np.flatnonzero(np.diff(self.codes[order])) + 1
        )
        V = np.eye(n) + block_diag(*(half @ half.T for half in inside))
        X, y = self.X[order], y[order]
        whole = cho_factor(V, lower=True)
        information = X.T @ cho_solve(whole, X)
        r = y - X @ np.linalg.solve(information, X.T @ cho_solve(whole, y))
        variance = r @ cho_solve(whole, r) / (n - p)
        return float(
            2 * np.log(np.diagonal(whole[0])).sum()
            + np.linalg.slogdet(information)[1]
            + (n - p) * (1 + np.log(2 * np.pi * variance))
        )


def sleepstudy() -> Study:
    data = jaxreml.datasets.load("sleepstudy")[["Days", "Subject"]]
    X = np.column_stack([np.ones(len(data)), data["Days"]])
    codes = data["Subject"].cat.codes.to_numpy(np.int64)
    truth = np.array([251.4, 10.47]), np.array([24.7, 5.9]), 25.6
    return Study("sleepstudy", "~ Days + (Days | Subject)", data, X, codes, X, *truth)


def unbalanced(slopes: bool = False, groups: int = 200, seed: int = 1) -> Study:
    """Groups of 1 to about 12 rows, five on average; six fixed effects."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), 1 + rng.poisson(4, groups))
    n = len(codes)
    x, w, v = rng.standard_normal((3, n))
    z = rng.standard_normal(groups)[codes]
    arm = rng.integers(0, 2, n)
    data = pd.DataFrame(
        {
            "x": x, "w": w, "v": v, "z": z,
            "arm": pd.Categorical(np.array(["a", "b"])[arm]),
            "g": pd.Categorical([f"g{code:03d}" for code in codes]),
        }
    )  # fmt: skip
    X = np.column_stack([np.ones(n), x, w, v, z, arm])
    beta = np.array([5.0, 1.0, -0.5, 0.2, 0.7, 0.3])
    name = "random slope" if slopes else "random intercept"
    formula = f"~ x + w + v + z + arm + {'(x | g)' if slopes else '(1 | g)'}"
    effects = X[:, : 1 + slopes]
    sds = np.array([0.5, 0.4])[: 1 + slopes]
    return Study(name, formula, data, X, codes, effects, beta, sds, 1.0)


def voxels(groups: int = 50, rows: int = 10, seed: int = 2) -> Study:
    """The design of the streaming benchmark: 500 rows, balanced groups, three fixed effects."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), rows)
    x, z = rng.standard_normal(len(codes)), rng.standard_normal(groups)[codes]
    data = pd.DataFrame({"x": x, "z": z, "g": pd.Categorical([f"g{code:02d}" for code in codes])})
    X = np.column_stack([np.ones(len(codes)), x, z])
    truth = np.array([100.0, 1.0, 2.0]), np.array([0.5]), 1.0
    return Study("voxels", "~ x + z + (1 | g)", data, X, codes, X[:, :1], *truth)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ask_lme4(
    sets: list[tuple[Study, np.ndarray]], fits: int, refits: int, folder: Path
) -> dict[str, Any] | None:
    """Fresh lmer fits of the first responses of each set, and times; None without R.

    "tight" is minqa's bobyqa run to 1e-9 from the default fit: lme4's default optimiser stops 1e-6
    to 1e-5 early and has no tolerance that changes it. Beta and SEs come from there.
    """
    if not have_r():
        return None
    models = []
    for k, (study, responses) in enumerate(sets):
        file = folder / f"responses{k}.bin"
        responses[:, : max(fits, refits)].T.astype(float).tofile(file)
        table = for_r(study.data, folder / f"data{k}.csv")
        models.append(
            {
                "name": study.name, "formula": study.formula, "responses": str(file),
                "fits": min(fits, responses.shape[1]), "refits": min(refits, responses.shape[1]),
                **table,
            }
        )  # fmt: skip
    return run_r(Path(__file__).with_name("batched_fits.R"), {"models": models}, folder)


def glmm_calls(study: Study, responses: np.ndarray) -> dict[str, Callable[[int], Any]] | None:
    """Two ways to fit response i with glmm; None without it.

    "glmm" is `glmm.fit` on a dict of columns (twice as fast as a dataframe), without degrees of
    freedom. It has no refit, so "glmm, native" calls the compiled function underneath, columns
    converted once and only the response replaced: private, but the fastest that it can do.
    """
    if not version("glmm"):
        return None
    import glmm

    formula = f"y {study.formula}"
    columns = {name: study.data[name] for name in study.data}
    plain = {
        name: column if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy(float)
        for name, column in columns.items()
    }
    by_response = np.ascontiguousarray(responses.T, float)
    calls = {
        "glmm": lambda i: glmm.fit({**plain, "y": by_response[i]}, formula, satterthwaite=False)
    }
    try:
        link = glmm._check_call(formula, "gaussian", None)
        table = {**plain, "y": by_response[0]}
        numeric, factors, _, _ = glmm._prepare_columns(table, [formula], None, None, [])

        def native(i: int) -> dict[str, Any]:
            numeric["y"] = by_response[i].tobytes()
            return glmm._native.fit(
                formula, numeric, factors, "gaussian", link, "hessian", 1, None, None, None, None,
                False, None, "Wald",
            )  # fmt: skip

        native(0)
        calls["glmm, native"] = native
    except (AttributeError, TypeError) as error:  # private functions of another version
        print(f"glmm's private functions are not as in 0.6.2 ({error}); its public one is timed")
    return calls


def ask_glmm(study: Study, responses: np.ndarray) -> dict[str, np.ndarray] | None:
    """Criterion, beta and standard errors of every response; NaN where glmm did not converge."""
    calls = glmm_calls(study, responses)
    if calls is None:
        return None
    found: dict[str, list[Any]] = {"criterion": [], "beta": [], "se": []}
    with quiet():
        for i in range(responses.shape[1]):
            fit = calls["glmm"](i)
            found["criterion"].append(-2 * fit.loglik if fit.converged else np.nan)
            found["beta"].append(fit.beta)
            found["se"].append(fit.se)
    return {name: np.array(values, float) for name, values in found.items()}


def against_peers(
    study: Study, responses: np.ndarray, ours: Any, lme4: dict | None, glmm: dict | None
) -> dict[str, Any]:
    """How `ours` (`Fits`) compares with peers on the responses that peers have fitted.

    A peer that is above jaxreml by more than `BEHIND` has stopped early if the criterion at
    jaxreml's theta, recomputed by dense algebra, is what jaxreml says; otherwise jaxreml is wrong,
    and that fails.
    """
    peers = {}
    if lme4:
        peers["lmer"] = np.array(lme4["default"], float)
        peers["lmer, tight"] = np.array(lme4["tight"], float)
    if glmm:
        peers["glmm"] = glmm["criterion"]
    count = min([len(values) for values in peers.values()] or [0])
    criterion, failures = ours.criterion[:count], []
    report: dict[str, Any] = {
        "responses": count,
        "singular": int(np.sum(ours.is_singular[:count])),
        "without an optimum": int(np.sum(ours.status[:count] != 0)),
        "peers": {},
    }
    if not count:
        return {**report, "failures": []}
    if report["without an optimum"]:
        codes = np.unique(ours.status[:count][ours.status[:count] != 0]).tolist()
        failures.append(f"{report['without an optimum']} without an optimum, status {codes}")
    table = np.stack([values[:count] for values in peers.values()])
    best = np.nanmin(table, axis=0)
    above = ~(criterion <= best + ABOVE)  # NaN counts
    report["above"] = int(above.sum())
    report["worst above"] = float(np.nanmax(criterion - best, initial=-np.inf))
    if above.any():
        worst = np.flatnonzero(above)[
            np.argsort(-np.nan_to_num((criterion - best)[above], nan=1e9))
        ]
        failures.append(
            f"{report['above']} responses above the better peer by more than {ABOVE:g}, "
            f"responses {worst[:10].tolist()}"
        )
    for name, values in peers.items():
        gap = values[:count] - criterion
        report["peers"][name] = {
            "highest": float(np.nanmax(gap)),
            "lowest": float(np.nanmin(gap)),
            "behind": int(np.nansum(gap > ABOVE)),
            "far behind": int(np.nansum(gap > BEHIND)),
            "failed": int(np.isnan(values[:count]).sum()),
        }
    gap = np.nanmax(table, axis=0) - criterion
    suspects = np.flatnonzero(gap > BEHIND)
    suspects = suspects[np.argsort(-gap[suspects])][:PATIENCE]
    off = [abs(study.dense(responses[:, i], ours.theta[i]) - criterion[i]) for i in suspects]
    report["dense checks"], report["dense off by"] = len(off), float(max(off, default=0))
    if report["dense off by"] > ABOVE:
        failures.append(
            f"the criterion differs from dense algebra by {report['dense off by']:.1e} at "
            "jaxreml's own theta: the peers are right"
        )
    estimates = {"lmer, tight": lme4, "glmm": glmm}
    for name, peer in estimates.items():
        if not peer:
            continue
        # Where the criteria agree, so that both are at the same point of a smooth function.
        same = np.abs(peers[name][:count] - criterion) < ABOVE
        beta, se = (np.array(peer[key], float)[:count][same] for key in ("beta", "se"))
        mine, mine_se = ours.beta[:count][same], ours.se[:count][same]
        report["peers"][name]["compared"] = int(same.sum())
        if not same.any():
            failures.append(f"no criterion of {name} agrees with jaxreml's")
            continue
        for key, distance in (
            ("beta", np.abs(beta - mine) / mine_se),
            ("se", np.abs(se / mine_se - 1)),
        ):
            worst = float(np.nanmax(distance, initial=0))
            report["peers"][name][key] = worst
            if not worst < LOOSE:
                failures.append(f"{key} of {name} differs by {worst:.1e} (limit {LOOSE:g})")
    return {**report, "failures": failures}


def print_agreement(studies: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of `against_peers`, and what failed."""
    if not any(report["peers"] for report in studies.values()):
        print("No peer was asked: the answers are not compared")
        return [
            f"{name}: {text}" for name, report in studies.items() for text in report["failures"]
        ]
    print("jaxreml against the better peer, response by response (REML criterion)\n")
    header("study", "responses", "singular", f"above by > {ABOVE:g}", "worst above",
           "without an optimum", "dense checks", "dense off by")  # fmt: skip
    for name, report in studies.items():
        if report["responses"]:
            row(name, report["responses"], report["singular"], report["above"],
                f"{report['worst above']:.1e}", report["without an optimum"],
                report["dense checks"], f"{report['dense off by']:.1e}")  # fmt: skip
    print("\nEach peer against jaxreml: criterion above (+) or below (-) jaxreml's; beta in units "
          f"of its SE and SE relative, where the criteria agree within {ABOVE:g}\n")  # fmt: skip
    header("study", "peer", "failed", f"> {ABOVE:g} above", f"> {BEHIND:g} above", "highest",
           "lowest", "beta", "SE")  # fmt: skip
    failures = []
    for name, report in studies.items():
        failures += [f"{name}: {text}" for text in report["failures"]]
        for peer, figures in report["peers"].items():
            distances = [f"{figures[k]:.1e}" if k in figures else "-" for k in ("beta", "se")]
            row(name, peer, figures["failed"], figures["behind"], figures["far behind"],
                f"{figures['highest']:+.1e}", f"{figures['lowest']:+.1e}", *distances)  # fmt: skip
    return failures
