"""Every test runs in float64 unless it switches it off itself, as a user's script might."""

from __future__ import annotations

import os

import jaxlib
import pytest

# Most of the tests' time is compilation, and this halves it, as in `fit` and `fit_many` themselves
# (`jaxreml.cache.quick_compilation`). XLA_FLAGS= pytest runs with XLA's defaults.
if jaxlib.__version__.startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
