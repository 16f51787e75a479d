"""Threads: those that work on chunks of a batch, and BLAS's, which such chunks do without."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Numbers that are worked on up to which BLAS does without threads: some matrices of order 2,000.
# Two of them halve the time at best; on a busy machine a factorisation of order 1,142 took 25 times
# as long, and InstEval (4.8 million numbers, of that order) three times as much CPU.
SMALL = 2**23


@lru_cache
def _libraries() -> Any:
    import numpy as np  # noqa: F401, to be seen by the controller
    import scipy.linalg  # noqa: F401, which has a BLAS of its own
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def single_blas() -> AbstractContextManager[Any]:
    """BLAS without threads of its own, in this process.

    Waking them takes longer than small matrices do, and beside busy threads milliseconds.
    """
    return _libraries().limit(limits=1, user_api="blas")


def suited_blas(numbers: int) -> AbstractContextManager[Any]:
    """BLAS with threads for work on many numbers, without for few."""
    return single_blas() if numbers <= SMALL else nullcontext()
