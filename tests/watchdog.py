"""A test that takes longer than its limit ends with the stacks of all threads.

Also where it is stuck in compiled code, with Python's lock or without: the clock is a thread of
faulthandler's, in C. (pytest-timeout needs the lock, and pytest's own `faulthandler_timeout` knows
one limit for all tests.) The process ends; pytest-xdist reports the test as failed and goes on in
another one.
"""

from __future__ import annotations

import faulthandler
import os

import pytest

LIMIT = 300.0  # seconds: 20 times what all but a few tests take on two cores
LONG_LIMIT = 3600.0  # of a battery marked `long`
FACTOR = "JAXREML_TEST_LIMIT"  # JAXREML_TEST_LIMIT=10 pytest: ten times that, on a slow machine
terminal = pytest.StashKey[int]()


def pytest_configure(config):
    config.addinivalue_line("markers", "limit(seconds): what the test may take at most")
    config.stash[terminal] = os.dup(2)  # tests have theirs captured


def pytest_unconfigure(config):
    os.close(config.stash[terminal])


def limit(item) -> float:
    """Seconds the test may take."""
    mark = item.get_closest_marker("limit")
    usual = LONG_LIMIT if item.get_closest_marker("long") else LIMIT
    return (mark.args[0] if mark else usual) * float(os.environ.get(FACTOR, 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """The watch over one test and its fixtures."""
    faulthandler.dump_traceback_later(limit(item), exit=True, file=item.config.stash[terminal])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
