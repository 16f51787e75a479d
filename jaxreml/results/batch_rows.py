"""What many fits say about the rows of their data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import unpack
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
        DataError: no such response; results read from a file, or made without ``modes=True``;
            offsets or covariates of the responses' own.

    Examples:
        >>> results.fitted_values(["gene1", "gene2"]).round(2).head(2)
           gene1  gene2
        0  -0.61    0.2
        1  -0.43    0.4
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

    Examples:
        >>> for names, values in results.fitted_blocks(size=30):
        ...     print(len(names), values.shape)
        30 (180, 30)
        10 (180, 10)
    """
    size = size or max(1, BLOCK_BYTES // (8 * len(_frame(results).X)))
    for start in range(0, len(results), size):
        places = np.arange(start, min(start + size, len(results)))
        yield results.responses[places], _fitted(results, places, random)


def residual_blocks(
    results: Any, size: int | None = None, *, random: bool = True
) -> Iterator[tuple[pd.Index, np.ndarray]]:
    """Responses less their fitted values, some responses at a time; arguments as `fitted_blocks`.

    Yields:
        Names and (n, size) residuals, NaN where a response is missing.

    Raises:
        DataError: as `fitted_values`; the values of the responses are not at hand.

    Examples:
        >>> for names, values in results.residual_blocks(size=30, random=False):
        ...     print(len(names), values.std().round(1))
        30 1.5
        10 1.5
    """
    if results.values is None:
        raise DataError(
            "the values of the responses are not at hand (a stream, or results read "
            "from a file or pickle): take fitted_blocks from the responses"
        )
    start = 0
    for names, fitted in fitted_blocks(results, size, random=random):
        yield names, results.values(start, start := start + len(names)) - fitted


def simulated_blocks(
    results: FittedBatch,
    *,
    null: str | list[str] | None = None,
    seed: int = 0,
    size: int | None = None,
) -> Iterator[tuple[pd.Index, np.ndarray]]:
    """New responses drawn from the fits, one for each, some at a time: what `fit_many` takes.

    Args:
        results: of `fit_many`.
        null: fixed effects that are zero in the draws, to see p-values where nothing is to be
            found; none if left out.
        seed: of the random numbers.
        size: as for `fitted_blocks`.

    Yields:
        Names and (n, size) values, on the rows of the model; NaN for responses without an optimum
        or without some coefficient.

    Raises:
        DataError: results read from a file; a name that is no fixed effect; weights, offsets or
            covariates of the responses' own.

    Examples:
        How often p-values are below 0.05 where there is nothing to be found:

        >>> nothing = results.simulated_blocks(null="Days")
        >>> null = jaxreml.fit_many("~ Days + (1 | Subject)", data, nothing)
        >>> (null.pvalues["Days"] < 0.05).mean().round(3).item()
        0.0
    """
    results.model.require_independent("draw new responses")
    frame, names = _frame(results, ("weights", "offset")), list(results.model.fixed_names)
    wanted = [null] if isinstance(null, str) else list(null or [])
    for name in wanted:
        if name not in names:
            raise DataError(f"{name!r} is no fixed effect; they are {', '.join(map(repr, names))}")
    kept = ~np.isin(names, wanted)
    root_weights = 1.0 if frame.weights is None else np.sqrt(frame.weights)[:, None]
    size = size or max(1, BLOCK_BYTES // (8 * len(frame.X)))
    rng = np.random.default_rng(seed)
    for start in range(0, len(results), size):
        places = np.arange(start, min(start + size, len(results)))
        fits, b = results.fits, len(places)
        sigma = np.where(fits.status[places] == Status.CONVERGED, fits.sigma[places], np.nan)
        values = frame.X[:, kept] @ fits.beta[places][:, kept].T
        if frame.offset is not None:
            values += frame.offset[:, None]
        factors = unpack(fits.theta[places], results.model.sizes)
        for term, factor in zip(frame.terms, factors, strict=True):
            if term.kernel is None:
                draws = rng.standard_normal((b, factor.shape[1], len(term.levels)))
            else:
                draws = term.drawn(rng, b, np.eye(factor.shape[1])).swapaxes(1, 2)
            effects = sigma[:, None, None] * (factor @ draws)
            for k, column in enumerate(term.effects.T):
                values += column[:, None] * effects[:, k].T[term.codes]
        values += sigma * rng.standard_normal(values.shape) / root_weights
        yield results.responses[places], values


def _frame(results: FittedBatch, refused: tuple[str, ...] = ("offset",)) -> ModelFrame:
    """The frame of results whose responses share what is `refused`."""
    apart = [own for own in results.model.own if own in (*refused, "covariate")]
    if apart:
        raise DataError(
            f"each response has {apart[0]} of its own, which the results do not keep: use "
            "estimate(i), which does"
        )
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
