"""Several processes that fit one batch, started by the user with `jax.distributed.initialize`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from jaxreml.backend.arrays import leaves
from jaxreml.backend.lazy import jax
from jaxreml.errors import JaxremlError
from jaxreml.many.numbers import Fits


class Crew(NamedTuple):
    """Number of this process, and how many there are."""

    index: int
    count: int

    @staticmethod
    def present() -> Crew:
        """Those that `jax.distributed.initialize` has brought together, or this one alone."""
        if "jax" not in sys.modules or not jax.distributed.is_initialized():
            return Crew(0, 1)
        return Crew(jax.process_index(), jax.process_count())

    def owns(self, block: int) -> bool:
        """Whether this process fits a block."""
        return block % self.count == self.index

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work after which all processes wait for each other; if it fails in one, it does in all.

        Raises:
            JaxremlError: it failed in another process.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.count > 1:
            from jax.experimental import multihost_utils

            fine = multihost_utils.process_allgather(np.array(error is None))
            if error is None and not np.all(fine):
                failed = ", ".join(map(str, np.flatnonzero(~np.asarray(fine))))
                raise JaxremlError(f"process {failed} failed; its own message says why")
        if error is not None:
            raise error


def widths(fits: Fits) -> list[int]:
    """Numbers per response of each array."""
    return [int(np.prod(array.shape[1:])) for array in leaves(fits)]


def gather(fits: Fits, sizes: list[int], crew: Crew) -> Fits:
    """The results of all processes, in the order of the responses.

    Args:
        fits: of the blocks of this process.
        sizes: responses in each block of all processes.
    """
    from jax.experimental import multihost_utils

    arrays, structure = jax.tree.flatten(fits)
    rows = [
        array.reshape(len(array), width) for array, width in zip(arrays, widths(fits), strict=True)
    ]
    flat = np.concatenate(rows, axis=1, dtype=float)
    owner = np.repeat(np.arange(len(sizes)) % crew.count, sizes)
    shares = np.bincount(owner, minlength=crew.count)
    padded = np.zeros((shares.max(), flat.shape[1]))
    padded[: len(flat)] = flat
    # As bits: exact, NaN included, whatever the user's jax_enable_x64.
    everyone = np.asarray(multihost_utils.process_allgather(padded.view(np.uint32)))
    everyone = np.ascontiguousarray(everyone).view(float)
    gathered = np.empty((len(owner), flat.shape[1]))
    for k, share in enumerate(shares):
        gathered[owner == k] = everyone[k, :share]
    columns = np.split(gathered, np.cumsum(widths(fits))[:-1], axis=1)
    restored = [
        column.reshape(len(owner), *array.shape[1:]).astype(array.dtype)
        for column, array in zip(columns, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)
