"""Users' JAX settings, `shard_map` and forked processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys

import independent
import jax
import jax.monitoring
import numpy as np
import pandas as pd
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxreml
from jaxreml import Design, estimate, ml_objective, reml_objective, stack
from jaxreml.backend.compilation import forget_programs
from jaxreml.backend.runtime import neutral, require_own_threads

CHECKS = [
    lambda: jax.debug_nans(True),
    lambda: jax.debug_infs(True),
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.transfer_guard("disallow"),
    lambda: jax.disable_jit(True),
    lambda: jax.no_tracing(True),
]


@contextlib.contextmanager
def all_checks():
    with contextlib.ExitStack() as stacked:
        for check in CHECKS:
            stacked.enter_context(check())
        yield


@pytest.fixture(scope="module")
def data():
    """A response that is best fitted without the groups, so that NaN occur on the way."""
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"g": np.repeat(np.arange(10), 4), "x": rng.normal(size=40)})
    noise = rng.normal(size=(10, 4))
    frame["y"] = (noise - 0.9 * noise.mean(axis=1, keepdims=True)).ravel()
    return frame


def test_settings_for_users_own_programs_change_nothing(data):
    rng = np.random.default_rng(0)
    responses = np.column_stack([data["y"], rng.normal(size=(40, 2)), np.ones(40)])
    forget_programs()
    with all_checks():
        fit = jaxreml.fit("y ~ x + (1 | g)", data)
        tests = fit.coefficients("kenward-roger")
        found = jaxreml.fit_many("~ x + (1 | g)", data, responses)
    plain = jaxreml.fit("y ~ x + (1 | g)", data)
    many = jaxreml.fit_many("~ x + (1 | g)", data, responses)
    assert fit.is_singular and fit.criterion == plain.criterion
    pd.testing.assert_frame_equal(tests, plain.coefficients("kenward-roger"))
    np.testing.assert_array_equal(found.params, many.params)
    np.testing.assert_array_equal(found.status, many.status)


def design_of(structure: str) -> Design:
    y, X, codes, Z = independent.simulate(0)
    terms = [(codes, Z)] if structure == "grouped" else [(codes, Z), np.arange(y.size) % 7]
    return Design.from_arrays(y, X, terms, structure=structure)


@pytest.mark.parametrize("structure", ["grouped", "dense", "crossed"])
def test_shard_map_traces_with_its_checks(structure):
    design = design_of(structure)
    designs = stack([design, design])
    params = np.zeros((2, len(design.parameter_names)))
    mesh, each = Mesh(np.array(jax.devices()[:1]), ("i",)), PartitionSpec("i")

    def lower(function, specs, *arguments):
        spread = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=each)
        return jax.jit(spread).lower(*arguments)

    lower(jax.vmap(estimate), each, designs)
    hessian = jax.vmap(jax.hessian(reml_objective), (0, None))
    lower(hessian, (each, PartitionSpec()), params, design)


def test_shard_map_gives_what_vmap_gives():
    designs = stack([design_of("grouped")] * 2)
    mesh, each = Mesh(np.array(jax.devices()[:1]), ("i",)), PartitionSpec("i")
    spread = jax.shard_map(jax.vmap(estimate), mesh=mesh, in_specs=each, out_specs=each)
    found, expected = jax.jit(spread)(designs), jax.jit(jax.vmap(estimate))(designs)
    np.testing.assert_allclose(found.beta, expected.beta, rtol=1e-10)
    np.testing.assert_array_equal(found.status, expected.status)


def test_objectives_are_compiled_once():
    compiled = []

    def listen(event: str, _: float, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    design = design_of("grouped")
    params = np.array([0.3, -0.4, 0.6, 0.1])
    forget_programs()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ml_objective(params, design)
        assert len(compiled) <= 2
        ml_objective(params + 1, design_of("grouped"))
        assert len(compiled) <= 2
        jax.grad(ml_objective)(params, design)
        assert len(compiled) <= 8
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def entries(arguments) -> list[str]:
    """What each entry that runs JAX says in this process."""
    fit, data, design = arguments
    calls = [
        lambda: jaxreml.fit("y ~ x + (1 | g)", data, engine="jax"),
        lambda: jaxreml.fit_many("~ x + (1 | g)", data, data[["y"]].to_numpy(), engine="jax"),
        lambda: estimate(design),
        lambda: reml_objective(np.zeros(4), design),
        lambda: fit.bootstrap(40, lambda beta, parts: beta[0], seed=1),
        lambda: fit.delta(lambda beta, parts: beta[0]),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_a_forked_copy_of_a_process_that_used_jax(data):
    """Fits by NumPy go on in it, with Kenward-Roger; all that runs JAX says so."""
    jax.block_until_ready(jax.numpy.ones(2))
    fit = jaxreml.fit("y ~ x + (1 | g)", data)
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()

    def work() -> None:
        refit = jaxreml.fit("y ~ x + (1 | g)", data)
        assert refit.coefficients("kenward-roger").equals(fit.coefficients("kenward-roger"))
        refit.conf_int(method="profile"), refit.bootstrap(20)
        its.send(entries((fit, data, design_of("grouped"))))

    child = context.Process(target=work)
    child.start()
    try:
        assert mine.poll(120), "the child hangs"
        said = mine.recv()
    finally:
        child.kill()
        child.join()
    assert all('get_context("spawn")' in sentence for sentence in said), said
    require_own_threads()  # the parent goes on


def test_a_process_forked_before_jax_is_used_works():
    code = (
        "import os; from jaxreml.backend.runtime import neutral\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    with neutral():\n"
        "        import jax.numpy as jnp; os._exit(0 if float(jnp.ones(2).sum()) == 2 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_neutral_settings_end_with_the_block():
    with neutral():
        assert jax.config.jax_enable_x64 and not jax.config.jax_debug_nans
    with jax.enable_x64(False), jax.debug_nans(True):
        with neutral():
            assert jax.config.jax_enable_x64
        assert not jax.config.jax_enable_x64 and jax.config.jax_debug_nans
