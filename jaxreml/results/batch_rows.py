"""What many fits say about the rows of their data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.many.fitted import FittedBatch
from jaxreml.status import Status

BLOCK_BYTES = 64 << 20  # of the values of one block


def fitted_values(
    results: FittedBatch, responses: Any = None, *, random: bool = True
) -> pd.DataFrame:
    """Fitted values X beta + Z b of the rows of the model, with the offset.

    Args:
        results: of `fit_many`, with ``modes=True`` for the random effects b, their conditional
            modes.
        responses: which: names, positions, or a slice of positions; all if left out, which takes
            n numbers for each (`fitted_blocks` gives them a part at a time).
        random: whether with the random effects; X beta alone needs no modes.

    Returns:
        A frame with a row per row of the model, in the labels of the data, and a column per
        response, as responses are given to `fit_many`. Rows where a response is missing have their
        fitted value too. NaN for responses without an optimum, and in rows that need a coefficient
        that is not estimable for the response.

    Raises:
        DataError: no such response; results read from a file, or made without ``modes=True``.
    """
    if isinstance(responses, slice):
        places = np.arange(len(results))[responses]
    elif responses is None:
        places = np.arange(len(results))
    else:
        given = [responses] if np.ndim(responses) == 0 else responses
        places = np.array([results.position(one) for one in given], int)
    values = _fitted(results, places, random)
    return pd.DataFrame(values, _frame(results).table.index, results.responses[places])


def fitted_blocks(
    results: FittedBatch, size: int | None = None, *, random: bool = True
) -> Iterator[tuple[pd.Index, np.ndarray]]:
    """`fitted_values`, some responses at a time.

    Args:
        results, random: as there.
        size: how many responses at a time; such as take 64 MiB if left out.

    Yields:
        Their names and (n, size) values, which `fit_many` takes as responses too.
    """
    size = size or max(1, BLOCK_BYTES // (8 * len(_frame(results).X)))
    for start in range(0, len(results), size):
        places = np.arange(start, min(start + size, len(results)))
        yield results.responses[places], _fitted(results, places, random)


def _frame(results: FittedBatch) -> ModelFrame:
    if results.frame is None:
        raise DataError(
            "the rows of the model are not at hand: results that were read from a file do not have "
            "them. Use those that fit_many returned"
        )
    return results.frame


def _fitted(results: FittedBatch, places: np.ndarray, random: bool) -> np.ndarray:
    """(n, len(places))."""
    frame, fits = _frame(results), results.fits
    beta = fits.beta[places].T
    unknown = np.isnan(beta)
    values = frame.X @ np.where(unknown, 0.0, beta)
    values[((frame.X != 0).astype(float) @ unknown) > 0] = np.nan
    values[:, fits.status[places] != Status.CONVERGED] = np.nan
    if frame.offset is not None:
        values += frame.offset[:, None]
    if not random:
        return values
    if fits.modes is None:
        raise DataError(
            "fitted values with random effects need the conditional modes: call "
            "fit_many(..., modes=True), or pass random=False for X beta"
        )
    for term, modes in zip(frame.terms, fits.modes, strict=True):
        for k, effect in enumerate(term.effects.T):
            values += effect[:, None] * modes[places, :, k].T[term.codes]
    return values
