"""Compilation: JAX's persistent cache in one call, and options that make it quicker."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path


def enable_compilation_cache(path: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that later processes do not compile them again.

    Sets JAX's compilation cache options for this process; nothing in jaxreml does so unasked but
    its command line.

    Args:
        path: folder; ``$XDG_CACHE_HOME/jaxreml`` (``~/.cache/jaxreml``) if left out.

    Returns:
        The folder.
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

    On a CPU, XLA's older way to emit fused loops: half the time to compile, and code as fast. None
    elsewhere, and where this version of XLA has no such option.
    """
    import jax

    if platform != "cpu":
        return None
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:
        return None
    return options
