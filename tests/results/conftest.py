"""Figures of these tests are drawn in memory."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.figure import Figure

matplotlib.use("Agg")


@pytest.fixture
def ax():
    """Axes of a figure of their own."""
    return Figure().subplots()
