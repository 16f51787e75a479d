"""`fit_many` on NumPy: it agrees with JAX and with single fits, and its certificate catches
faults."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml.backend import devices
from jaxreml.data.frame import covariate_frame
from jaxreml.many.engine import BatchFitter
from jaxreml.many.host import HostEngine
from jaxreml.many.singles import SinglesEngine
from jaxreml.model.structures import lanes
from jaxreml.status import Status

EXACT = ("status", "rank", "nobs", "n_missing", "is_singular")


def study(groups: int = 24, seed: int = 0) -> pd.DataFrame:
    """Groups of 2 to about 12 rows with a covariate, one between groups, and weights."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), 2 + rng.poisson(4, groups))
    x = rng.normal(size=codes.size)
    return pd.DataFrame(
        {
            "g": [f"g{code:02d}" for code in codes],
            "x": x,
            "z": rng.normal(size=groups)[codes],
            "w": rng.uniform(0.5, 2, codes.size),
        }
    )


def simulate(data: pd.DataFrame, count: int, seed: int = 1) -> np.ndarray:
    """Responses, half of them with a variance at zero; heavy-tailed."""
    rng = np.random.default_rng(seed)
    codes = pd.factorize(data["g"])[0]
    x = data["x"].to_numpy()[:, None]
    sds = rng.choice([0.0, 0.5, 1.0], (2, count))
    effects = rng.normal(size=(2, codes.max() + 1, count)) * sds[:, None]
    noise = rng.standard_t(4, size=(len(data), count))
    return 100 + x + effects[0, codes] + effects[1, codes] * x + noise


@pytest.mark.parametrize(
    ("formula", "method", "df", "weighted"),
    [
        ("~ x + z + (1 | g)", "REML", "kenward-roger", False),
        ("~ x + z + (x | g)", "ML", "satterthwaite", True),
        ("~ x + (1 | g) + (0 + x | g)", "REML", "residual", False),
    ],
)
def test_engines_agree(formula, method, df, weighted):
    data = study()
    values = simulate(data, 120)
    values[3:9, 5] = values[3:9, 6] = np.nan
    values[0, 7] = np.inf
    values[:, 8] = 4.0
    values[:, 9] = 100 + 2 * data["x"]
    frame = covariate_frame(formula, data, weights=data["w"] if weighted else None)
    contrasts = np.eye(len(frame.fixed_names))[1:] - np.eye(len(frame.fixed_names))[:1]
    options = {"df": df, "contrasts": contrasts, "modes": True, "lanes": 40}
    ours, theirs = (
        BatchFitter(frame, method, engine=engine, **options).fit(values)
        for engine in ("numpy", "jax")
    )
    assert set(np.delete(ours.status, [7, 8, 9])) == {Status.CONVERGED}
    assert 0 < ours.is_singular.sum() < 110
    for what in EXACT:
        mine, other = getattr(ours, what), getattr(theirs, what)
        np.testing.assert_array_equal(mine[np.r_[:7, 10:120]], other[np.r_[:7, 10:120]], what)
    np.testing.assert_array_equal(ours.status, theirs.status)
    np.testing.assert_allclose(ours.criterion, theirs.criterion, rtol=1e-11)
    for what in ours._fields:
        if what in (*EXACT, "n_iter", "criterion", "gradient_norm", "modes"):
            continue
        mine, other = getattr(ours, what), getattr(theirs, what)
        np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(other), err_msg=what)
        finite = np.isfinite(mine)
        np.testing.assert_allclose(mine[finite], other[finite], rtol=1e-7, atol=1e-7, err_msg=what)
    for mine, other in zip(ours.modes, theirs.modes, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("formula", ["~ x + z + (1 | g)", "~ x + (x | g)", "~ x + (x || g)"])
def test_they_are_single_fits(formula):
    data = study(seed=3)
    values = simulate(data, 40, seed=4)
    found = jaxreml.fit_many(formula, data, values, df="kenward-roger")
    for i in range(0, 40, 4):
        single = jaxreml.fit(f"y {formula}", data.assign(y=values[:, i]))
        assert found.criterion.iloc[i] == pytest.approx(single.criterion, rel=1e-10)
        tests = single.coefficients("kenward-roger")
        np.testing.assert_allclose(found.params.iloc[i], single.params, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.df.iloc[i], tests["df"], rtol=1e-5)


def test_gradients_are_those_of_the_objective():
    data = study()
    values = simulate(data, 5)
    # A date far from its origin, whose effects are rotated inside
    data["day"] = 2.45e6 + 10 * data["x"]
    for formula in ("~ x + (x | g)", "~ x + (1 | g)", "~ x + (day | g)"):
        frame = covariate_frame(formula, data)
        ours, theirs = (BatchFitter(frame, engine=engine) for engine in ("numpy", "jax"))
        parameters = np.array([0.3, -1.0, 0.4, 0.1] if "1" not in formula else [0.3, 0.1])
        if "day" in formula:
            parameters[:3] = 0.3, -12.0, -0.5
        np.testing.assert_allclose(
            ours.gradients(parameters, values),
            theirs.gradients(parameters, values),
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_engine_is_named_and_chosen(monkeypatch):
    data = study().assign(h=lambda own: np.arange(len(own)) % 5)
    one, two = covariate_frame("~ x + (1 | g)", data), covariate_frame("~ (1 | g) + (1 | h)", data)
    assert isinstance(BatchFitter(one).engine, HostEngine)
    assert BatchFitter(one, devices="cpu").engine_name == "jax"
    with pytest.raises(ValueError, match="devices are JAX's"):
        BatchFitter(one, devices="cpu", engine="numpy")
    assert isinstance(BatchFitter(two, engine="numpy").engine, SinglesEngine)
    assert [BatchFitter(two, count=count).engine_name for count in (32, 33, None)] == [
        "numpy",
        "jax",
        "jax",
    ]
    with pytest.raises(ValueError, match='engine must be "numpy" or "jax"'):
        BatchFitter(one, engine="cuda")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert devices.has_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not devices.has_accelerator()


@pytest.mark.parametrize("structure", [None, "crossed"])
def test_few_responses_of_crossed_factors_go_one_by_one(structure):
    data = study().assign(h=lambda own: np.arange(len(own)) % 5)
    values = simulate(data, 6)
    values[3:9, 1] = np.nan
    values[:, 2] = 4.0
    values[0, 3] = np.inf
    frame = covariate_frame("~ x + z + (1 | g) + (1 | h)", data, weights=data["w"])
    options = {"df": "kenward-roger", "contrasts": np.eye(3)[:1], "modes": True}
    fitter = BatchFitter(frame, structure=structure, count=6, **options)
    assert fitter.structure == (structure or "dense") and fitter.engine_name == "numpy"
    ours = fitter.fit(values)
    theirs = BatchFitter(frame, structure=structure, engine="jax", **options).fit(values)
    assert ours.status[2:4].tolist() == [Status.CONSTANT, Status.INFINITE]
    for what in EXACT:
        np.testing.assert_array_equal(getattr(ours, what), getattr(theirs, what), what)
    np.testing.assert_allclose(ours.criterion, theirs.criterion, rtol=1e-12)
    for what in ("beta", "se", "df", "theta", "parameters_se", "contrast_se", "contrast_df"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        np.testing.assert_allclose(mine, other, rtol=1e-7, atol=1e-9, err_msg=what)
    for mine, other in zip(ours.modes, theirs.modes, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-8)
    at = np.array([0.1, -0.5, 0.2])
    few = values[:, [0, 4]]
    slopes = fitter.gradients(at, few)
    theirs = BatchFitter(frame, structure="crossed", engine="jax").gradients(at, few)
    np.testing.assert_allclose(slopes, theirs, rtol=1e-9)


def wrong_slope(monkeypatch):
    """A sign in the derivative of log|V|, everywhere in the batch."""
    slope = lanes.GroupedBatch.slope
    monkeypatch.setattr(
        lanes.GroupedBatch,
        "slope",
        lambda self, p: slope(self, p) * np.array([1, -1, 1.0]).reshape(3, 1),
    )


def another_criterion(monkeypatch):
    """A little more of the gram matrix than there is."""
    products = lanes.GroupedBatch._products
    monkeypatch.setattr(
        lanes.GroupedBatch, "_products", lambda self, *parts: products(self, *parts) * 1.001
    )


@pytest.mark.parametrize("fault", [wrong_slope, another_criterion])
def test_the_certificate_catches(fault, monkeypatch):
    data = study()
    values = simulate(data, 150)
    right = jaxreml.fit_many("~ x + (x | g)", data, values)
    fault(monkeypatch)
    found = jaxreml.fit_many("~ x + (x | g)", data, values)
    # Where a variance is zero the optimum may be the same.
    kept = found.converged
    assert kept.mean() < 0.5
    np.testing.assert_allclose(found.criterion[kept], right.criterion[kept], rtol=1e-9)
