"""What notebooks show of many fits: how they went, discoveries, and the first responses."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreml.many.fitted import FittedBatch
from jaxreml.many.numbers import count_failures
from jaxreml.results.batch_summaries import RATE, discoveries_of, rows_in_words
from jaxreml.status import Status
from jaxreml.typeset import numbers
from jaxreml.typeset.content import Column, Section, Spanner
from jaxreml.typeset.table import Table

FIRST = 5  # responses shown
WIDTH = 6  # most coefficients and contrasts, and most SDs, of which columns are shown


def of_batch(results: FittedBatch, *remarks: str) -> str:
    """The batch as HTML: a table of its coefficients and one of its first responses."""
    found = _coefficients(results, remarks).to_html()
    return found + _head(results).to_html() if len(results) else found


def _coefficients(results: FittedBatch, remarks: tuple[str, ...]) -> Table:
    """Per coefficient and contrast the median estimate and error, and its discoveries."""
    model, fits = results.model, results.fits
    table = discoveries_of(results)
    good = fits.status == Status.CONVERGED
    rows = []
    for k, name in enumerate(table.index):
        of_fixed = k < len(model.fixed_names)
        at = k if of_fixed else k - len(model.fixed_names)
        pair = (fits.beta, fits.se) if of_fixed else (fits.contrast, fits.contrast_se)
        known = [own[:, at][np.isfinite(own[:, at])] for own in pair]
        medians = [float(np.median(own)) if own.size else np.nan for own in known]
        decimals = numbers.decimals_for(medians[1])
        cells = [numbers.number(value, decimals) for value in medians]
        counts = [f"{int(table.at[name, column]):,}" for column in ("up", "down", "tests")]
        rows.append([str(name), *cells, *counts])
    heads = [Column("", align="l"), *map(Column, ("Estimate", "SE", "Up", "Down", "Tests"))]
    spanners = (Spanner("Median", 1, 3), Spanner(f"Discoveries, FDR {RATE:.0%}", 3, 5))
    singular = int(np.sum(fits.is_singular[good]))
    notes = [f"{int(good.sum()):,} with an optimum, {singular:,} of them singular"]
    failures = sorted(count_failures(fits.status).items(), key=lambda item: -item[1])
    notes += [f"{count:,} without: {sentence}" for sentence, count in failures]
    notes += [rows_in_words(results), f"Tests with df {model.df!r}", *remarks]
    title = f"{len(results):,} responses, {model.formula}, {model.method}"
    return Table(tuple(heads), (Section("", rows),), spanners, title, "", tuple(notes))


def _head(results: FittedBatch) -> Table:
    """Estimates with their errors, and SDs, of the first responses."""
    model, fits = results.model, results.fits
    first = slice(FIRST)
    heads, columns = [Column("Response", align="l")], [list(map(str, results.responses[first]))]
    fixed = model.fixed_names[:WIDTH]
    for k, name in enumerate(fixed):
        heads.append(Column(name))
        errors = fits.se[first, k]
        decimals = [numbers.decimals_for(float(error)) for error in errors]
        pairs = zip(fits.beta[first, k], errors, decimals, strict=True)
        columns.append([_with_error(float(b), float(se), own) for b, se, own in pairs])
    labels = model.variance_labels
    shown = [*range(min(len(labels) - 1, WIDTH - 1)), len(labels) - 1]
    sds = np.sqrt(_variances(results))
    for k in shown:
        group, term = labels[k]
        heads.append(Column(group if group == term else f"{group}: {term}"))
        columns.append(numbers.column(sds[:, k].tolist()))
    heads.append(Column("Ended", align="l"))
    columns.append(
        [Status(int(code)).name.lower().replace("_", " ") for code in fits.status[first]]
    )
    estimates = 1 + len(fixed)
    spanners = [Spanner("Estimate (SE)", 1, estimates)] if fixed else []
    spanners.append(Spanner("SD", estimates, estimates + len(shown)))
    rows = [list(row) for row in zip(*columns, strict=True)]
    left = len(results) - len(rows)
    notes = [f"and {left:,} more"] if left else []
    hidden = len(model.fixed_names) - len(fixed) + len(labels) - len(shown)
    if hidden:
        notes.append(f"{hidden} columns are not shown: see to_frame()")
    return Table(tuple(heads), (Section("", rows),), tuple(spanners), "", "", tuple(notes))


def _variances(results: FittedBatch) -> np.ndarray:
    """Variances of the first responses, in the order of their labels."""
    log_variances = results.fits.parameters[:FIRST, results.model.covariance.positions]
    with np.errstate(invalid="ignore"):
        return np.exp(log_variances)


def _with_error(estimate: float, error: float, decimals: int) -> str:
    text = numbers.number(estimate, decimals)
    return f"{text} ({numbers.number(error, decimals)})" if text else ""


def of_stream(streamed: Any) -> str:
    """`StreamedResults` as HTML."""
    model = streamed.model
    rows = [
        ["File", str(streamed.path)],
        ["Model", f"{model.formula}, {model.method}"],
        ["Responses", f"{streamed.n_responses:,}"],
        ["Without an optimum", f"{streamed.n_failed:,}"],
    ]
    notes = []
    for sentence, count in streamed.failures.items():
        some = ", ".join(map(str, streamed.failed.get(sentence, [])))
        notes.append(f"{count:,}: {sentence}" + (f" ({some})" if some else ""))
    heads = (Column("", align="l"), Column("", align="l"))
    title = "Results of fit_many in a file, for read()"
    return Table(heads, (Section("", rows),), (), title, "", tuple(notes)).to_html()
