"""Blocks of responses through a fitter, into memory or into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.backend.arrays import mapped
from jaxreml.backend.progress import progress_bar
from jaxreml.data.companions import Companions
from jaxreml.data.frame import ModelFrame
from jaxreml.data.pairs import Pairs
from jaxreml.data.sources import import_parquet
from jaxreml.many.fitted import BatchModel
from jaxreml.many.numbers import Fits
from jaxreml.many.processes import Crew, gather, widths
from jaxreml.results.batch import BatchResults
from jaxreml.results.streamed import Parts, StreamedResults, first_failed, frequent_failures
from jaxreml.status import Status

BLOCK_BYTES = 64 << 20  # of values or results of one block, whichever is more

Advance = Callable[[np.ndarray], None]


class Job(NamedTuple):
    """What is fitted to what, by whom.

    Attributes:
        fitter: a `BatchFitter` or a `OwnFitter`.
        responses, model: to fit, and what they share.
        template: the results of no responses.
        crew: the processes at work.
    """

    fitter: Any
    responses: Companions | Pairs
    model: BatchModel
    template: Fits
    crew: Crew


def fit_in_memory(job: Job, size: int, advance: Advance) -> tuple[pd.Index, Fits]:
    """Names and numbers of all responses, fitted `size` at a time."""
    names, pieces = [], [job.template]
    with job.crew.together():
        for k, (own, read) in enumerate(job.responses.blocks(size)):
            names.append(own)
            if job.crew.owns(k):
                pieces.append(job.fitter.fit(**read().arguments))
                advance(pieces[-1].status)
    fits = mapped(lambda *arrays: np.concatenate(arrays), *pieces)
    if job.crew.count > 1:
        fits = gather(fits, [len(block) for block in names], job.crew)
    known = job.responses.names
    return names[0].append(names[1:]) if known is None else known, fits


def fit_to_file(
    job: Job, size: int, parts: Parts, overwrite: bool, advance: Advance
) -> StreamedResults:
    """Fit all responses, `size` at a time, into `parts` and these into one file."""
    first = job.crew.index == 0
    with job.crew.together():
        if not overwrite:
            parts.check()
        elif first:
            parts.discard()
        if first:
            parts.start()
    count = 0
    with job.crew.together(), ThreadPoolExecutor(1) as writer:
        written: list[Future] = []  # a block is written while the next is fitted
        for k, (names, read) in enumerate(job.responses.blocks(size)):
            count += 1
            if not job.crew.owns(k):
                continue
            given = read().arguments
            arrays = tuple(given.values())
            status = parts.status(k, names, *arrays)
            if status is None:
                fits = job.fitter.fit(**given)
                status = fits.status
                results = BatchResults(job.model, names, fits)
                _wait_for(written)
                written = [writer.submit(parts.write, k, results, *arrays)]
            advance(status)
        _wait_for(written)
    with job.crew.together():
        if first:
            parts.assemble(count, job.model)
    pq = import_parquet("output to parquet")
    table = pq.read_table(parts.output, columns=["response", "status"])
    names, status = (table.column(name).to_numpy() for name in table.column_names)
    failures = frequent_failures(status), first_failed(names, status)
    return StreamedResults(parts.output, job.model, len(status), *failures)


def _wait_for(futures: list[Future]) -> None:
    """Raise what they raised."""
    for future in futures:
        future.result()


def block_size(frame: ModelFrame, template: Fits, responses: Companions | Pairs, crew: Crew) -> int:
    """Responses at a time: of bounded size, and every process gets some."""
    numbers = max(len(frame.X) * (1 + responses.weighted), sum(widths(template)))
    size = max(1, BLOCK_BYTES // (8 * numbers))
    names = responses.names
    return size if names is None else max(1, min(size, -(-len(names) // crew.count)))


@contextmanager
def progress_of_fits(total: int | None, wanted: bool | None) -> Iterator[Advance]:
    """A bar on stderr with responses/s and failures; gives what is to be called with status codes.

    Args:
        total: number of responses, if it is known.
        wanted: whether to show it; None for only on a terminal.
    """
    text = "{task.fields[rate]:.0f} responses/s, {task.fields[failed]} failed"
    with progress_bar(total, wanted, text, failed=0) as advance:
        yield lambda status: advance(len(status), failed=int(np.sum(status != Status.CONVERGED)))
