"""Every test runs in float64 unless it switches it off itself, as a user's script might.

Most of the tests' time is compilation. Programs are therefore compiled without optimisation, in
half the time, but those of tests marked ``optimised``: these compare with R and with loops, and
would see a program that XLA's optimisation makes wrong. ``JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest``
compiles all of them as a user's are.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

import pytest

# A worker for each core: threads of BLAS would wait for each other, forty times as long as one of
# them takes for a matrix of order 200. Before NumPy and SciPy load it.
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import jaxlib  # noqa: E402

# This halves the time once more, as in `fit` and `fit_many` themselves
# (`jaxreml.backend.compilation.quick_compilation`), and code made in one piece instead of 32 takes
# a sixth less. XLA_FLAGS= pytest runs with XLA's defaults.
if jaxlib.__version__.startswith("0.10."):
    own = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", own)

UNOPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
ALL_OPTIMISED = os.environ.get(UNOPTIMISED) == "0"
optimising: bool | None = None

# What one worker has compiled the others and the examples load: a quarter of the time. The folder
# is the run's own; the first process makes and removes it, the others inherit its name.
SHARED = "JAX_COMPILATION_CACHE_DIR"
own_cache = None
if SHARED not in os.environ:
    own_cache = os.environ[SHARED] = tempfile.mkdtemp(prefix="jaxreml-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402  reads the settings above

from jaxreml.backend.compilation import forget_programs, spare_memory_maps  # noqa: E402

pytest_plugins = ("watchdog",)
SLOWEST = {"batch", "bootstrap", "crossed", "diagnostics", "estimation", "examples", "profile"}
SLOWEST |= {"fixed_effects", "many", "reference"}


def pytest_unconfigure():
    if own_cache:
        shutil.rmtree(own_cache, ignore_errors=True)


def is_optimised(item) -> bool:
    """Whether its programs are compiled as users' are."""
    return ALL_OPTIMISED or item.get_closest_marker("optimised") is not None


def pytest_collection_modifyitems(items):
    """The slowest files first: a worker runs a whole file, and all are to be busy to the end.
    Within a file those optimised last, as all programs are forgotten in between."""
    places = {path: place for place, path in enumerate(dict.fromkeys(i.path for i in items))}

    def turn(item):
        quick = item.path.stem.removeprefix("test_") not in SLOWEST
        return quick, places[item.path], is_optimised(item)

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures, which compile too."""
    global optimising
    wanted = is_optimised(item)
    if wanted != optimising:
        forget_programs()  # JAX would use those at hand, however they were compiled
        jax.config.update(UNOPTIMISED.lower(), not wanted)
        os.environ[UNOPTIMISED] = str(int(not wanted))  # for the processes it starts
        optimising = wanted


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def few_programs():
    """Tests compile programs of their own, so that what `fit` does is not enough."""
    yield
    spare_memory_maps()


@pytest.fixture
def command_line(tmp_path_factory, monkeypatch):
    """The compilation cache goes to a temporary folder; what commands set is undone afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    yield
    gc.enable()
    jax.config.update("jax_compilation_cache_dir", os.environ[SHARED])
