"""How JAX is run: under which settings, and in which processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jaxreml.backend.lazy import jax

_is_dead_copy = False  # of a process whose threads ran JAX


def _after_fork() -> None:
    global _is_dead_copy
    if "jax" in sys.modules:
        from jax._src import xla_bridge

        _is_dead_copy = xla_bridge.backends_are_initialized()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def require_own_threads() -> None:
    """Raise RuntimeError in a process forked from one that had used JAX.

    JAX's threads are not copied: a program started here would wait for them for ever.
    """
    if _is_dead_copy:
        raise RuntimeError(
            "this process was forked from one in which JAX had run (a fit, say), and JAX does not "
            "work in such a copy: it would wait for ever. Start processes with "
            'multiprocessing.get_context("spawn") (or "forkserver"), with '
            "concurrent.futures.ProcessPoolExecutor(mp_context=...) of it, or with joblib's "
            'default backend "loky"; or fork before the first fit'
        )


@contextmanager
def neutral() -> Iterator[None]:
    """Float64, and none of JAX's settings by which users check programs of their own.

    For what runs on the host from arrays to arrays. Some NaN are no errors here: rejected steps,
    what a boundary leaves undefined.

    Raises:
        RuntimeError: as `require_own_threads`.
    """
    require_own_threads()
    with (
        jax.enable_x64(True),
        usual_arithmetic(),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.disable_jit(False),
        jax.check_tracer_leaks(False),
        jax.no_tracing(False),
        jax.transfer_guard("allow"),
    ):
        yield


@contextmanager
def usual_arithmetic() -> Iterator[None]:
    """NumPy's, whatever JAX is set to, in what is traced inside: ranks and types promote as there,
    and products of float32 keep its digits, of which accelerators leave out half or more. Without
    warnings of what is not finite, where `jax.disable_jit` has NumPy do it."""
    with (
        np.errstate(all="ignore"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("float32"),
    ):
        yield
