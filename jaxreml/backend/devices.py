"""What computes: the devices of this process, or one sentence that says why there are none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

from jaxreml.errors import DataError

KINDS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def local_devices(devices: Any = None) -> list[Any]:
    """JAX devices to compute on.

    Args:
        devices: a kind ("cpu", "gpu", ...) for all of it that this process has; a device or
            several; JAX's choice if left out.

    Raises:
        DataError: JAX has no such devices here.
        ValueError: neither devices nor a kind of them.
    """
    import jax

    if isinstance(devices, str) and devices not in KINDS:
        raise ValueError(f"devices must be JAX devices or one of {', '.join(KINDS)}, not {devices}")
    if devices is None or isinstance(devices, str):
        try:
            return list(jax.local_devices(backend=devices))
        except (RuntimeError, AssertionError) as error:  # the latter where no platform asked for is
            raise _none(devices, str(error)) from None
    found = [devices] if not isinstance(devices, Iterable) else list(devices)
    if not found or not all(isinstance(device, jax.Device) for device in found):
        raise ValueError(f"devices must be JAX devices, such as jax.devices(), not {devices!r}")
    return found


def has_accelerator() -> bool:
    """Whether JAX works on something else than the CPU unless told. It is asked only where a plugin
    for other devices is installed."""
    asked = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if asked:
        return asked != "cpu"
    plugins = importlib.util.find_spec("jax_plugins")  # a namespace for what supports devices
    if plugins is None:
        return False
    import jax

    return jax.default_backend() != "cpu"


def working_bytes(device: Any) -> int | None:
    """Bytes that each of the larger arrays of a program may take on an accelerator, a thousand of
    which fill three quarters of its memory; None for a CPU, whose cache decides instead."""
    if device.platform == "cpu":
        return None
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", 2**33) * 3 // 4 // 1000


def _none(kind: str | None, reason: str) -> DataError:
    asked = (kind or os.environ.get("JAX_PLATFORMS") or "cpu").partition(",")[0]
    what = asked.upper() if asked in ("cpu", "tpu") else "GPU"
    set_to = "" if kind else f" (JAX_PLATFORMS={asked} asks for it)"
    said = f". JAX says: {' '.join(reason.split())}" if reason.strip() else ""
    return DataError(
        f"no {what} that JAX can use{set_to}: install JAX for it (pip install 'jax[cuda12]' for "
        f"NVIDIA's), or compute on the CPU (JAX_PLATFORMS=cpu){said}"
    )
