"""What follows from fits with ``kernels=``. A kernel that is the identity gives the ordinary model,
by other code: so everything must come out the same."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import kernels

MODEL = "Reaction ~ Days + (1 | Subject)"


@cache
def plain() -> jaxreml.LMMResults:
    return jaxreml.fit(MODEL, jaxreml.datasets.load("sleepstudy"))


@cache
def known() -> jaxreml.LMMResults:
    """The identity, with two subjects more."""
    data = jaxreml.datasets.load("sleepstudy")
    labels = [*data["Subject"].unique(), "x", "y"]
    K = pd.DataFrame(np.eye(20), labels, labels)
    return jaxreml.fit(MODEL, data, kernels={"Subject": K})


@cache
def relatives() -> jaxreml.LMMResults:
    """Two kernels, of subjects who are said to be brothers, and of independent ones."""
    data = jaxreml.datasets.load("sleepstudy")
    labels = list(data["Subject"].unique())
    tree = kernels.pedigree(labels, [f"father {k // 3}" for k in range(18)], [None] * 18)
    return jaxreml.fit(MODEL, data, kernels={"Subject": {"family": tree, "own": None}})


def test_intervals():
    for name in ("conf_int", "variance_parameters", "icc", "variance_shares", "r2"):
        ours, theirs = getattr(known(), name)(), getattr(plain(), name)()
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)
    ours, theirs = (fit.conf_int(method="profile") for fit in (known(), plain()))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    pd.testing.assert_frame_equal(known().ranova(), plain().ranova(), rtol=1e-6)
    pd.testing.assert_frame_equal(known().drop1(), plain().drop1(), rtol=1e-5)
    pd.testing.assert_frame_equal(known().anova(), plain().anova(), rtol=1e-5)


def test_draws():
    ours, theirs = (fit.simulate(2, seed=3) for fit in (known(), plain()))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)
    ours, theirs = (fit.bootstrap(nsim=39, seed=3).draws for fit in (known(), plain()))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-3)


def test_influence():
    pd.testing.assert_series_equal(known().cooks_distance(), plain().cooks_distance(), rtol=1e-5)
    ours, theirs = (fit.influence(by="Subject").params for fit in (known(), plain()))
    assert ours.index.tolist() == theirs.index.tolist()
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    for refused in (
        lambda: known().influence(method="first-order"),
        known().robust,
        lambda: jaxreml.power(known(), "Days", n=[20], along="Subject"),
    ):
        with pytest.raises(jaxreml.DataError, match="kernels"):
            refused()


def test_comparison():
    """A kernel is a case of itself only, and an ordinary term of none."""
    data = jaxreml.datasets.load("sleepstudy")
    slopes = jaxreml.fit(
        "Reaction ~ Days + (Days | Subject)", data, kernels={"Subject": np.eye(18)}
    )
    own = jaxreml.compare(known(), slopes, refit=False)
    ordinary = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
    theirs = jaxreml.compare(plain(), ordinary, refit=False)
    columns = ["npar", "chisq", "df", "p_value"]
    np.testing.assert_allclose(
        own[columns].to_numpy(float), theirs[columns].to_numpy(float), rtol=1e-5
    )
    mixed = jaxreml.compare(plain(), slopes, refit=False)
    assert np.isnan(mixed["p_value"].iloc[1]) and "case of none" in mixed["note"].iloc[1]
    table = relatives().ranova()
    assert table.index.tolist() == ["<none>", "(1 | Subject)"] and table["df"].iloc[1] == 2


def test_heritability():
    fit = relatives()
    parts = fit.variances.to_numpy()
    found = fit.heritability("Subject (family)", {"Subject (own)": 1})
    assert found["estimate"].item() == pytest.approx(parts[0] / parts.sum(), rel=1e-9)
    pd.testing.assert_frame_equal(
        fit.predict(fit.table.head(3), re_form="~ (1 | Subject)").to_frame(),
        fit.fittedvalues.head(3).rename("prediction").to_frame(),
    )
    planned = jaxreml.population(
        "~ Days + (1 | Subject)",
        fit.table,
        {"(Intercept)": 250, "Days": 10},
        {"Subject": 600},
        25,
        kernels={"Subject": np.ones((18, 18))},
    )
    drawn = planned.simulate(400, seed=1).to_numpy() - planned.mean[:, None]
    means = drawn.mean(axis=0)  # all subjects share one effect
    assert 500 < means.var() < 720 and 20 < (drawn - means).std() < 30


@pytest.mark.parametrize("name", ["known", "relatives"])
def test_files(name, tmp_path):
    fit = {"known": known, "relatives": relatives}[name]()
    path = tmp_path / "fit.json"
    fit.save(path)
    again = jaxreml.load(path)
    assert str(again) == str(fit)
    new = {"Days": [1, 2], "Subject": ["308", "309"]}
    pd.testing.assert_frame_equal(
        again.predict(new, interval="prediction"), fit.predict(new, interval="prediction")
    )
    pd.testing.assert_frame_equal(again.simulate(1, seed=1), fit.simulate(1, seed=1))
    fit.save(path, data=False)
    rowless = jaxreml.load(path)
    if name == "known":
        new["Subject"] = ["308", "x"]  # a level without rows
    pd.testing.assert_series_equal(rowless.predict(new), fit.predict(new))
    with pytest.raises(jaxreml.DataError, match="nobody"):
        rowless.predict({"Days": [1], "Subject": ["nobody"]})
