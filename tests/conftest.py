"""Every test runs in float64 unless it switches it off itself, as a user's script might."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
