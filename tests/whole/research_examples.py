"""Checks of the examples that differentiate through fits: what they find, by independent routes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

import jaxreml


def check_hyper_gradient(figures: dict, text: str) -> None:
    data, learned, slopes = (figures[k] for k in ("data", "learned", "slopes"))
    y, X = data["y"].to_numpy(), np.column_stack([np.ones(len(data)), data["x"]])
    patient, instrument = data["patient"].to_numpy(), data["instrument"].to_numpy()
    folds = np.arange(len(y)) % 4

    def held_out(precisions: np.ndarray, drift: float) -> float:
        """-2 log density of each quarter given the others, by kriging from fits on NumPy."""
        weights, total = np.exp(precisions[instrument] - drift * data["hours"].to_numpy()), 0.0
        for k in range(4):
            seen, out = folds != k, folds == k
            fit = jaxreml.fit("y ~ x + (1 | patient)", data[seen], weights=weights[seen])
            shared = fit.cov_re["patient"].iloc[0, 0] * (patient[:, None] == patient)
            V = shared + np.diag(fit.sigma**2 / weights)
            known, C = V[np.ix_(seen, seen)], V[np.ix_(out, seen)]
            solved = np.linalg.solve(known, np.column_stack([X[seen], y[seen], C.T]))
            information = X[seen].T @ solved[:, :2]
            beta = np.linalg.solve(information, X[seen].T @ solved[:, 2])
            rest = y[out] - X[out] @ beta - C @ (solved[:, 2] - solved[:, :2] @ beta)
            lever = X[out] - C @ solved[:, :2]
            spread = V[np.ix_(out, out)] - C @ solved[:, 3:]
            spread = spread + lever @ np.linalg.solve(information, lever.T)
            total -= 2 * multivariate_normal.logpdf(rest, cov=spread)
        return total / len(y)

    losses, none = figures["losses"], np.zeros(8)
    assert losses[0] == pytest.approx(held_out(none, 0.0), rel=1e-8)
    way = np.random.default_rng(0).normal(size=9) * 1e-3
    change = held_out(way[:8], way[8]) - held_out(-way[:8], -way[8])
    along = slopes["instrument"] @ way[:8] + slopes["drift"] * way[8]
    assert change / 2 == pytest.approx(along, rel=1e-4)
    # The residual variance takes up what all weights have in common.
    assert slopes["instrument"].sum() == pytest.approx(0, abs=1e-9)
    assert losses[-1] == pytest.approx(
        held_out(learned["instrument"], float(learned["drift"])), rel=1e-8
    )
    assert losses[-1] < figures["of_truth"] < losses[0]  # it is what was minimised
    assert abs(losses[-1] - losses[-5]) < 1e-5

    # On new patients: nobody is better than the truth, and who knows of the hours comes next.
    table, new = figures["table"], figures["new"]
    score = table["new patients"]
    assert score["true"] < score["learned"] < score["diag"] < score["equal"] - 0.3
    assert table.loc["learned", "SE"] < 0.6 * table.loc["equal", "SE"]
    assert f"{score['learned']:.3f}" in text
    way = figures["ways"]["diag"]
    X = np.column_stack([np.ones(len(new)), new["x"]])
    rest = (new["y"] - X @ way["fit"].params.to_numpy()).to_numpy().reshape(-1, 4)
    noise = way["sds"][new["instrument"]].reshape(-1, 4) ** 2
    tau2 = way["fit"].cov_re["patient"].iloc[0, 0]
    logs = [
        multivariate_normal.logpdf(own, cov=tau2 + np.diag(of))
        for own, of in zip(rest, noise, strict=True)
    ]
    assert score["diag"] == pytest.approx(-2 * np.mean(logs) / 4, rel=1e-10)


def check_influence(figures: dict, text: str) -> None:
    slopes, people, rows = (figures[k] for k in ("slopes", "people", "rows"))
    data, formula = jaxreml.datasets.load("sleepstudy"), "Reaction ~ Days + (Days | Subject)"

    def refitted(table: Any) -> float:
        found = jaxreml.fit(formula, table)
        return float(found.parameters[found.parameter_names.index("log_variance[Subject, Days]")])

    for row in (9, 57):
        step = np.where(np.arange(180) == row, 0.05, 0.0)
        ends = [refitted(data.assign(Reaction=data["Reaction"] + s * step)) for s in (1, -1)]
        assert (ends[0] - ends[1]) / 0.1 == pytest.approx(slopes[row], rel=1e-5)
    # What X explains changes nothing, and variances are homogeneous: Euler.
    X = np.column_stack([np.ones(180), data["Days"]])
    np.testing.assert_allclose(slopes @ X, 0, atol=1e-12)
    assert slopes @ data["Reaction"].to_numpy() == pytest.approx(2, rel=1e-8)
    assert people["share"].sum() == pytest.approx(1, rel=1e-8)

    at = refitted(data)
    assert people["deleted"].idxmin() == "335" and "335" in text
    without = refitted(data[data["Subject"] != "335"])
    assert people.loc["335", "deleted"] == pytest.approx(without - at, abs=1e-6)
    assert rows.loc[7, "deleted"] == pytest.approx(refitted(data.drop(index=7)) - at, abs=1e-8)
    errors = [
        own[["by share", "first order"]].sub(own["deleted"], axis=0).abs().max()
        for own in (people, rows)
    ]
    assert errors[0]["by share"] < 0.03 < errors[0]["first order"]  # of people shares say more
    assert errors[1]["first order"] < 0.02 < 0.1 < errors[1]["by share"]  # of rows they mislead


def check_experiment_design(figures: dict, text: str) -> None:
    (sleep, dye), days, money, groups = (figures[k] for k in ("pilots", "days", "money", "groups"))
    sigma2, G = sleep.sigma**2, sleep.cov_re["Subject"].to_numpy()
    for own in days.values():
        se = own["se"]
        assert own["best"].sum() == pytest.approx(8) and own["whole"].sum() == 8
        assert se["best"] <= se["whole"] * (1 + 1e-9) and se["whole"] < se["even"]
        assert 0 <= own["gap"] < 1e-6
    line, start, curve = days.values()
    np.testing.assert_allclose(line["best"], 4.0 * np.isin(np.arange(10), [0, 9]), atol=1e-4)
    of_ends = G[1, 1] + sigma2 / 81 * (1 / 4 + 1 / 4)
    assert line["se"]["best"] == pytest.approx(np.sqrt(of_ends / 30), rel=1e-6)

    # By V in full, of the best plan in whole numbers: one row for each measurement
    day = np.repeat(np.arange(10.0), curve["whole"])
    X = np.vander(day, 3, increasing=True)
    V = X[:, :2] @ G @ X[:, :2].T + sigma2 * np.eye(8)
    variance = np.linalg.inv(X.T @ np.linalg.solve(V, X))[2, 2] / 30
    assert curve["se"]["whole"] == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert curve["simulated"].std(ddof=1) == pytest.approx(np.sqrt(variance), rel=0.05)
    assert start["se"]["best"] < 0.8 * start["se"]["even"]

    # Half of the measurements at each end, and people by the roots of their prices: in closed form
    count = np.linspace(1, 20, 5000)
    roots = np.sqrt(4 + count) + np.sqrt(16 + count)
    variances = (G[1, 1] + 4 * sigma2 / 81 / count) * roots**2 / 1200
    total = money["measurements"].sum()
    assert total == pytest.approx(count[np.argmin(variances)], abs=0.02)
    assert money["se"] == pytest.approx(np.sqrt(variances.min()), rel=1e-6)
    assert money["people"] @ (np.array([4, 16]) + total) == pytest.approx(1200, rel=1e-6)
    ratio = np.sqrt((16 + total) / (4 + total))
    assert money["people"][0] / money["people"][1] == pytest.approx(ratio, rel=1e-3)
    assert money["se"] < money["even"]

    # Mean squares are independent: var = 2 MS^2 / df, of as many degrees of freedom as batches
    tau2, sigma2 = dye.variances.to_numpy()
    size = np.linspace(2, 25, 20_000)
    within = (sigma2 / size) ** 2 / (size - 1)
    ses = np.sqrt(2 * ((tau2 + sigma2 / size) ** 2 + within) * (10 + size) / 1000) / tau2
    assert groups["best"] == pytest.approx(size[np.argmin(ses)], abs=0.01)
    assert groups["se"] == pytest.approx(ses.min(), rel=1e-7)
    np.testing.assert_allclose(groups["ses"], np.interp(groups["sizes"], size, ses), rtol=1e-5)
    assert groups["whole"] == (62, 6)
    assert groups["simulated"].std(ddof=1) == pytest.approx(groups["se"], rel=0.05)
    assert f"{groups['best']:.2f} samples" in text
