"""Every test runs in float64 unless it switches it off itself, as a user's script might."""

from __future__ import annotations

import gc
import os

import jaxlib
import pytest

# Most of the tests' time is compilation, and this halves it, as in `fit` and `fit_many` themselves
# (`jaxreml.cache.quick_compilation`). XLA_FLAGS= pytest runs with XLA's defaults.
if jaxlib.__version__.startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax

from jaxreml.cache import spare_memory_maps


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
    jax.config.update("jax_compilation_cache_dir", None)
