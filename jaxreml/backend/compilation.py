"""Compiled programs: keeping them on disk, making them quickly, forgetting them in time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
CALLS = 8  # of `spare_memory_maps`, of which one looks

_Maker = TypeVar("_Maker", bound=Callable[..., Any])
_remembered: list[Callable[[], None]] = []
_calls = 0


def enable_compilation_cache(path: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that later processes do not compile them again.

    Sets JAX's compilation cache options for this process; nothing in jaxreml does so unasked but
    its command line.

    Args:
        path: folder; ``$XDG_CACHE_HOME/jaxreml`` (``~/.cache/jaxreml``) if left out.

    Returns:
        The folder.

    Examples:
        >>> jaxreml.enable_compilation_cache("programs").name
        'programs'
    """
    import jax

    if path is None:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxreml"
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@lru_cache
def quick_compilation(platform: str) -> dict[str, bool] | None:
    """`compiler_options` of `jax.jit` for programs of hundreds of small operations.

    On a CPU, XLA's older way to emit fused loops: half the time to compile, and code as fast. On a
    GPU, matrix products by cuBLAS: those by cuBLASLt fail where XLA records them into a command
    buffer (jaxlib 0.11.2, "the requested functionality is not supported"). None elsewhere, and
    where this version of XLA has no such option.
    """
    import jax

    options = {
        "cpu": {"xla_cpu_use_fusion_emitters": False},
        "gpu": {"xla_gpu_enable_cublaslt": False},
    }.get(platform)
    if options is None:
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:
        return None
    return options


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` of a function of arrays, by `quick_compilation` for the default device.

    Args:
        function: of arrays.
        options: of `jax.jit`.

    Raises:
        RuntimeError: as `require_own_threads`.
    """
    import jax

    from jaxreml.backend.runtime import require_own_threads

    require_own_threads()
    compiler_options = quick_compilation(jax.default_backend())
    return jax.jit(function, compiler_options=compiler_options, **options)


def remembered(maker: _Maker) -> _Maker:
    """`lru_cache` of a function that makes compiled programs, which `forget_programs` empties."""
    cached: Any = lru_cache(maker)
    _remembered.append(cached.cache_clear)
    return cached


@remembered
def _jitted(function: Callable[..., Any]) -> Any:
    return quick_jit(function)


def evaluated(function: Callable[..., Any], *arrays: Any, on_host: bool) -> Any:
    """A function of arrays, its results on the host: by NumPy, or compiled once for each function.

    Raises:
        RuntimeError: where JAX is needed, as `require_own_threads`.
    """
    import numpy as np

    if on_host:
        with np.errstate(all="ignore"):
            return function(*arrays)
    import jax

    from jaxreml.backend.runtime import neutral

    with neutral():
        return jax.device_get(_jitted(function)(*arrays))


def forget_programs() -> None:
    """Free all compiled programs, jaxreml's and JAX's: those still needed compile again."""
    import jax

    for clear in _remembered:
        clear()
    jax.clear_caches()
    gc.collect()


def spare_memory_maps() -> None:
    """Forget the programs before they use up the process's memory maps.

    A program compiled for a CPU holds hundreds of them. Linux allows a process 65,530, and XLA
    crashes beyond: after the fits of some hundred shapes of data. Looked at in every eighth call.
    """
    global _calls
    _calls += 1
    if _calls % CALLS or not MAPS.exists() or not MOST_MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > int(MOST_MAPS.read_text()) // 2:
        forget_programs()
