"""A test that takes longer than its limit ends with the stacks of all threads.

Also where it is stuck in compiled code, with Python's lock or without: the clock is a thread of
faulthandler's, in C. (pytest-timeout needs the lock, and pytest's own `faulthandler_timeout` knows
one limit for all tests.) The process ends; pytest-xdist reports the test as failed and goes on in
another one.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys

import pytest

LIMIT = 300.0  # seconds: 20 times what all but a few tests take on two cores
LONG_LIMIT = 3600.0  # of a battery marked `long`
FACTOR = "JAXREML_TEST_LIMIT"  # JAXREML_TEST_LIMIT=10 pytest: ten times that, on a slow machine
CHILD = "import faulthandler; faulthandler.dump_traceback_later({seconds}, exit=True)\n"
terminal = pytest.StashKey[int]()


def pytest_configure(config):
    config.addinivalue_line("markers", "limit(seconds): what the test may take at most")
    config.stash[terminal] = os.dup(2)  # tests have theirs captured


def pytest_unconfigure(config):
    os.close(config.stash[terminal])


def factor() -> float:
    """What the environment multiplies all limits by."""
    return float(os.environ.get(FACTOR, 1))


def limit(item) -> float:
    """Seconds the test may take."""
    mark = item.get_closest_marker("limit")
    usual = LONG_LIMIT if item.get_closest_marker("long") else LIMIT
    return (mark.args[0] if mark else usual) * factor()


def command(code: str, *arguments) -> list[str]:
    """A new Python under watch: it ends with its own stacks before the test that waits for it."""
    watched = CHILD.format(seconds=0.8 * LIMIT * factor()) + code
    return [sys.executable, "-c", watched, *map(str, arguments)]


def run(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` of `command`."""
    return subprocess.run(command(code, *arguments), **options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """The watch over one test and its fixtures."""
    faulthandler.dump_traceback_later(limit(item), exit=True, file=item.config.stash[terminal])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
