"""The engine of `fit_many` gives the numbers of `estimate`, whatever path it takes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import watchdog

import jaxreml
from jaxreml.data.frame import covariate_frame
from jaxreml.many.engine import BatchFitter
from jaxreml.many.host import HostEngine
from jaxreml.many.lanes import Lanes, fitting
from jaxreml.model.arrays import Effects
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.unstructured import Unstructured
from jaxreml.model.objective import profiled
from jaxreml.model.residual_degrees import residual_degrees
from jaxreml.model.structures.lanes import cross_products
from jaxreml.optimum.effects import inspect
from jaxreml.optimum.search import expand_chart
from jaxreml.status import Status

SLEEP = "~ Days + (Days | Subject)"


def table(seed: int = 0, n: int = 150, levels: int = 25) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(levels), rng.integers(0, levels, n - levels)])
    rng.shuffle(codes)
    data = pd.DataFrame({"g": codes, "h": rng.integers(0, 7, n), "x": rng.normal(size=n)})
    return data.assign(z=rng.normal(size=n), w=rng.uniform(0.5, 2, n), o=rng.normal(size=n) * 5)


def responses(data: pd.DataFrame, b: int, seed: int = 0, *, group: str, slope: str) -> np.ndarray:
    """Responses of all kinds: with and without variance of intercept and slope, means and units."""
    rng = np.random.default_rng(seed)
    codes = pd.factorize(data[group])[0]
    levels = codes.max() + 1
    x = data[slope].to_numpy(float)
    x = x / x.std()
    intercepts = rng.choice([0, 0.3, 2], b) * rng.normal(size=(levels, b))
    slopes = rng.choice([0, 0.3, 1], b) * rng.normal(size=(levels, b))
    noise = rng.normal(size=(len(data), b))
    mean = rng.normal(size=b) * 100 + x[:, None] * rng.normal(size=b)
    y = mean + intercepts[codes] + slopes[codes] * x[:, None] + noise
    return y * 10.0 ** rng.integers(-3, 4, b)


def one_by_one(formula: str, data: pd.DataFrame, values: np.ndarray, method: str, **extras):
    """What `estimate` says of each column, and its conditional modes."""
    for y in values.T:
        design = jaxreml.design(f"y {formula}", data.assign(y=y), **extras)
        estimate = jaxreml.estimate(design, method)
        modes = inspect(estimate, design, method).modes
        yield estimate, modes, residual_degrees(estimate.theta, design)


def assert_same(fits, singles) -> None:
    for i, (estimate, modes, residual_df) in enumerate(singles):
        assert fits.status[i] == estimate.status == Status.CONVERGED
        assert fits.is_singular[i] == estimate.is_singular
        assert fits.criterion[i] == pytest.approx(float(estimate.criterion), abs=1e-8)
        se = np.sqrt(np.diagonal(estimate.vcov))
        np.testing.assert_allclose(fits.beta[i], estimate.beta, atol=1e-6 * se.max())
        np.testing.assert_allclose(fits.se[i], se, rtol=1e-6)
        np.testing.assert_allclose(fits.sigma[i], estimate.sigma, rtol=1e-6)
        np.testing.assert_allclose(fits.residual_df[i], residual_df, rtol=1e-6)
        np.testing.assert_allclose(fits.theta[i], estimate.theta, atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(fits.parameters[i], estimate.parameters, atol=1e-5, rtol=1e-5)
        spread = np.sqrt(np.diagonal(estimate.parameters_vcov))
        np.testing.assert_allclose(fits.parameters_se[i], spread, rtol=1e-5)
        if fits.modes is not None:
            for own, other in zip(fits.modes, modes, strict=True):
                np.testing.assert_allclose(own[i], other, atol=1e-6 * (1e-9 + np.abs(other).max()))


CASES = {
    "collapsed": ("sleepstudy", SLEEP, {}, True),
    "spectral": ("table", "~ x + z + (1 | g)", {}, True),
    "spectral_weights": ("table", "~ x + (1 | g)", {"weights": "w", "offset": "o"}, True),
    "levels": ("table", "~ x + (x | g)", {}, True),
    "uncorrelated": ("table", "~ x + (x || g)", {"weights": "w"}, True),
    "dense": ("table", "~ x + (1 | g) + (1 | h)", {}, False),
    "crossed": ("table", "~ x + (1 | g) + (1 | h)", {}, False),
}
MORE = {("ML", case) for case in CASES if case not in ("collapsed", "spectral")}


def marks(case: str, method: str) -> list[pytest.MarkDecorator]:
    """Lanes against single fits are optimised; what NumPy fits has no program to optimise."""
    optimised = [] if CASES[case][-1] else [pytest.mark.optimised]
    return optimised + [pytest.mark.long] * ((method, case) in MORE)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(case, method, marks=marks(case, method), id=f"{case}-{method}")
        for case in CASES
        for method in ("REML", "ML")
    ],
)
def test_equals_estimate(case, method):
    name, formula, extras, on_host = CASES[case]
    data = table() if name == "table" else jaxreml.datasets.load(name)
    group, slope = ("Subject", "Days") if name == "sleepstudy" else ("g", "x")
    values = responses(data, 40, group=group, slope=slope)
    structure = "dense" if case == "dense" else None
    frame = covariate_frame(formula, data, **extras)
    fitter = BatchFitter(frame, method, modes=True, structure=structure)
    assert isinstance(fitter.engine, HostEngine) == on_host
    fits = fitter.fit(values)
    assert fits.is_singular.any() and not fits.is_singular.all()
    assert_same(fits, one_by_one(formula, data, values[:, :20], method, **extras))


def test_programs_of_lapack_calls_end():
    """Two at a time wait for each other's threads in jaxlib 0.10.2; here is work for ten."""
    data = table()
    values = responses(data, 320, group="g", slope="x")
    fitter = BatchFitter(
        covariate_frame(CASES["dense"][1], data), "REML", modes=True, structure="dense"
    )
    fits = fitter.fit(values)
    first = fitter.fit(values[:, :20])
    np.testing.assert_allclose(fits.criterion[:20], first.criterion, rtol=1e-12)
    assert (fits.status == Status.CONVERGED).all()


def test_satterthwaite_is_fits():
    data = jaxreml.datasets.load("sleepstudy")
    values = responses(data, 5, group="Subject", slope="Days")
    results = jaxreml.fit_many(SLEEP, data, values)
    for i in range(5):
        fit = jaxreml.fit(f"y {SLEEP}", data.assign(y=values[:, i]))
        np.testing.assert_allclose(
            results.df_satterthwaite.iloc[i], fit.df_satterthwaite, rtol=1e-5
        )
        np.testing.assert_allclose(results.pvalues.iloc[i], fit.pvalues, rtol=1e-5)
        np.testing.assert_allclose(
            results.variances.iloc[i], fit.variance_components["variance"], rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("reml", [True, False])
def test_collapsed_and_rotated_designs_have_the_same_criterion(reml):
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(30), rng.choice([2, 3, 5], 30))
    X = np.column_stack([np.ones(codes.size), rng.normal(size=(codes.size, 2))])
    values = jnp.asarray(rng.normal(size=(codes.size, 4)) * 10)
    basis = Basis.of(X, [Effects(codes, X[:, :1], 30, "g", ("e",), Unstructured(1))])
    shared = Lanes.of(basis, X, reml=reml)
    assert shared.collapse.counts.size < 30 and shared.spectral is not None
    whole = replace(
        shared, collapse=None, spectral=None, pairs=cross_products(basis.structure.scores)
    )
    plain = whole.batch(whole.reduce(values, exact=True))
    reduced = shared.reduce(values, exact=False)
    criterion = jax.jit(profiled, static_argnames="reml")  # op by op it is 350 programs
    for omega in (0.0, 0.3, 50.0, 1e8):
        at = jnp.full((1, 1), omega)
        expected = criterion(at, plain, reml=reml)
        np.testing.assert_allclose(
            criterion(at, shared.batch(reduced), reml=reml), expected, rtol=1e-12
        )
        rotated = shared.rotated(reduced, reml=reml)
        np.testing.assert_allclose(criterion(at, rotated, reml=reml), expected, rtol=1e-12)


def test_lanes_are_single_expansions():
    """Every derivative of a batch on the last axis is that of the designs one by one."""
    data = table()
    values = responses(data, 3, group="g", slope="x")
    frame = covariate_frame("~ z + (1 + x + z | g)", data)
    fitter = BatchFitter(frame)
    shared = fitter.engine.lanes
    design = shared.batch(shared.reduce(jnp.asarray(values), exact=False))
    roots = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)))
    expanded = jax.jit(expand_chart, static_argnames="reml")
    lanes = expanded(roots, design, reml=True)
    for i in range(3):
        single = jaxreml.design("y ~ z + (1 + x + z | g)", data.assign(y=values[:, i]))
        point = expanded(roots[:, i], single, reml=True)
        for lane, one in zip(jax.tree.leaves(lanes), jax.tree.leaves(point), strict=True):
            np.testing.assert_allclose(lane[..., i], one, rtol=1e-7, atol=1e-9 * np.abs(one).max())


@pytest.fixture(scope="module")
def sleep_batch():
    data = jaxreml.datasets.load("sleepstudy")
    return data, responses(data, 40, seed=1, group="Subject", slope="Days")


def test_missing_values_as_single_fits(sleep_batch):
    data, values = sleep_batch
    rng = np.random.default_rng(0)
    values = values.copy()
    values[:20, 0] = np.nan  # two whole subjects
    values[rng.random(180) < 0.1, 1] = np.nan
    # The same pattern; repeated over 32 lanes, 1 and 32 look like 32 columns in a row.
    values[np.isnan(values[:, 1]), 32] = np.nan
    values[3, 4:9] = np.nan
    results = jaxreml.fit_many(SLEEP, data, values)
    assert results.n_missing[0] == 20 and results.nobs[0] == 160
    assert (results.n_missing == np.isnan(values).sum(axis=0)).all()
    for i in (*range(10), 32):
        kept = ~np.isnan(values[:, i])
        fit = jaxreml.fit(f"y {SLEEP}", data.assign(y=values[:, i]))
        assert fit.nobs == kept.sum()
        assert results.criterion[i] == pytest.approx(fit.criterion, abs=1e-8)
        np.testing.assert_allclose(results.params.iloc[i], fit.params, rtol=1e-6)
        np.testing.assert_allclose(results.bse.iloc[i], fit.bse, rtol=1e-6)
        np.testing.assert_allclose(results.log_variance_se.iloc[i], fit.log_variance_se, rtol=1e-5)


def test_column_of_x_that_depends_on_others_where_a_response_is_missing(sleep_batch):
    data, values = sleep_batch
    data = data.assign(late=(data["Days"] > 7) & (data["Subject"] == "308"))
    formula = "~ Days + late + (Days | Subject)"
    values = values[:, :3].copy()
    values[data["late"], 1] = np.nan
    results = jaxreml.fit_many(formula, data, values)
    single = jaxreml.fit(f"y {formula}", data.assign(y=values[:, 1]))
    assert single.aliased == ("late",) and results.converged.all()
    assert np.isnan(results.params.loc[1, "late"])
    assert results.criterion[1] == pytest.approx(single.criterion, abs=1e-8)
    np.testing.assert_allclose(results.params.iloc[1, :2], single.params, rtol=1e-6)


def test_poisoned_responses_harm_no_others(sleep_batch):
    data, values = sleep_batch
    poisoned = values.copy()
    poisoned[:, 3] = 7.0
    poisoned[:, 10] = np.nan
    poisoned[5, 11] = np.inf
    poisoned[:, 20] = 2 + 3 * data["Days"]
    poisoned[:, 30] = data.groupby("Subject", observed=True)["Reaction"].transform("mean")
    poisoned[:, 31] = 0.0
    poisoned[5:, 32] = np.nan
    bad = {
        3: Status.CONSTANT, 10: Status.TOO_FEW_ROWS, 11: Status.INFINITE, 20: Status.PERFECT_FIT,
        30: Status.PERFECT_FIT, 31: Status.CONSTANT, 32: Status.TOO_FEW_ROWS,
    }  # fmt: skip
    fitter = BatchFitter(covariate_frame(SLEEP, data))
    clean, fits = fitter.fit(values), fitter.fit(poisoned)
    good = np.setdiff1d(np.arange(40), list(bad))
    for name in ("beta", "se", "df", "sigma", "theta", "parameters_se", "criterion", "status"):
        mine, other = getattr(fits, name)[good], getattr(clean, name)[good]
        np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-11, err_msg=name)
    for i, status in bad.items():
        assert fits.status[i] == status and Status(status).sentence
        assert np.isnan(fits.beta[i]).all() and np.isnan(fits.criterion[i])


def test_chunks_and_order_change_nothing(sleep_batch):
    data, values = sleep_batch
    shuffled = np.random.default_rng(0).permutation(180)
    a = BatchFitter(covariate_frame(SLEEP, data), lanes=7).fit(values)
    b = BatchFitter(covariate_frame(SLEEP, data.iloc[shuffled])).fit(values[shuffled])
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_allclose(a.criterion, b.criterion, atol=1e-9)
    np.testing.assert_allclose(a.beta, b.beta, rtol=1e-7)


def test_an_accelerators_larger_chunks_change_nothing(monkeypatch):
    data = table(n=60, levels=12)
    values = responses(data, 300, group="g", slope="x")
    frame = covariate_frame("~ x + (1 | g)", data)
    expected = BatchFitter(frame, engine="numpy").fit(values)
    monkeypatch.setattr("jaxreml.many.passes.working_bytes", lambda device: 2**21)
    asked = []
    monkeypatch.setattr(
        "jaxreml.many.passes.fitting", lambda *room: asked.append(fitting(*room)) or asked[-1]
    )
    found = BatchFitter(frame, engine="jax").fit(values)
    assert max(asked) > 256  # the most on a CPU
    np.testing.assert_array_equal(found.status, expected.status)
    good = found.status == Status.CONVERGED
    assert good.sum() > 290
    np.testing.assert_allclose(found.criterion[good], expected.criterion[good], rtol=1e-10)


def test_iteration_limit_is_a_status(sleep_batch):
    data, values = sleep_batch
    fits = BatchFitter(covariate_frame(SLEEP, data), max_iterations=1).fit(values)
    limited = fits.status == Status.MAX_ITERATIONS  # others start at the optimum
    assert limited.any() and (fits.status[~limited] == Status.CONVERGED).all()
    np.testing.assert_array_equal(np.isnan(fits.beta).all(axis=1), limited)


FOUR_DEVICES = """
import sys, numpy as np, jax, jaxreml
from jaxreml.many.engine import BatchFitter
from jaxreml.data.frame import covariate_frame
assert jax.local_device_count() == 4
data, values = jaxreml.datasets.load("sleepstudy"), np.load(sys.argv[1])
fits = BatchFitter(covariate_frame(sys.argv[2], data), engine="jax").fit(values)
np.savez(sys.argv[3], **{k: v for k, v in fits._asdict().items() if v is not None})

# Rows on the devices, and cross-products as exact sums over them.
jax.config.update("jax_enable_x64", True)
X = np.stack([np.ones(180), data["Days"]], axis=1)
codes = np.unique(data["Subject"], return_inverse=True)[1]
rows = jax.sharding.PartitionSpec("rows")

def criterion(parameters, y, X, codes):
    def all_rows(part):
        return jax.lax.psum(part, "rows")

    def by_level(part):
        return all_rows(jax.ops.segment_sum(part, codes, 18))

    zz, zy = by_level(X[:, :, None] * X[:, None]), by_level(X * y[:, None])
    of_x = all_rows(X.T @ X), all_rows(X.T @ y), all_rows(y @ y)
    return jaxreml.reml_objective(
        parameters, jaxreml.Design.from_moments(zz, zz, zy, *of_x, n=180)
    )

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
whole = jax.sharding.PartitionSpec()
shared = jax.shard_map(
    criterion, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=whole
)
at, y = jax.numpy.array([6.0, 3.0, 0.1, 6.0]), values[:, 0]
found = jax.jit(jax.value_and_grad(shared))(at, y, X, codes)
one = jaxreml.Design.from_arrays(y, X, [(codes, X)])
expected = jax.value_and_grad(jaxreml.reml_objective)(at, one)
np.testing.assert_allclose(found[0], expected[0], rtol=1e-11)
np.testing.assert_allclose(found[1], expected[1], atol=1e-8)
"""


def test_four_devices_give_the_numbers_of_one(sleep_batch, tmp_path):
    data, values = sleep_batch
    values = np.concatenate([values, np.full((180, 1), 3.0)], axis=1)
    np.save(tmp_path / "values.npy", values)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    files = [str(tmp_path / "values.npy"), SLEEP, str(tmp_path / "fits.npz")]
    path = os.pathsep.join(
        [str(Path(jaxreml.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    settings = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
    watchdog.run(FOUR_DEVICES, *files, check=True, env=settings)
    one = BatchFitter(covariate_frame(SLEEP, data), devices=jax.devices()[:1]).fit(values)
    four = np.load(tmp_path / "fits.npz")
    np.testing.assert_array_equal(four["status"], one.status)
    np.testing.assert_array_equal(four["is_singular"], one.is_singular)
    for name in ("beta", "se", "df", "sigma", "theta", "parameters", "criterion"):
        np.testing.assert_allclose(four[name], getattr(one, name), rtol=1e-10, atol=1e-10)
