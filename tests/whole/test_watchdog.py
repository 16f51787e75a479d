"""A test that hangs in compiled code fails, with its stack (`watchdog.py`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
import ctypes, sys, time
import pytest

def test_before():
    pass

@pytest.mark.limit(5)
def test_hangs():
    {sleep}(1000)

def test_after():
    pass
"""


@pytest.mark.parametrize(
    ("workers", "sleep"),
    [(0, "time.sleep"), (1, "ctypes.PyDLL(None).sleep")],  # which keeps Python's lock
)
def test_a_test_that_hangs_fails_with_its_stack(tmp_path, workers, sleep):
    (tmp_path / "test_of_c.py").write_text(HANGS.format(sleep=sleep))
    command = [sys.executable, "-m", "pytest", "-p", "watchdog", "-n", str(workers), "test_of_c.py"]
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    settings |= {"PYTHONPATH": str(Path(__file__).parents[1]), "JAXREML_TEST_LIMIT": "0.2"}
    run = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Timeout (0:00:01)!" in run.stderr
    assert re.search(r'test_of_c.py", line \d+ in test_hangs', run.stderr)
    if workers:  # the others run, in a new worker
        assert "crashed while running 'test_of_c.py::test_hangs'" in run.stdout
        assert "1 failed, 2 passed" in run.stdout
