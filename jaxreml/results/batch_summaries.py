"""The results of a batch in short: its top responses, a summary in words, a file of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.inference.batches import discoveries
from jaxreml.many.fitted import FittedBatch, false_discovery_rates
from jaxreml.many.numbers import count_failures
from jaxreml.results.parquet import check_new, write_whole
from jaxreml.status import Status

ORDERS = ("p_value", "statistic", "estimate", "none")
RATE = 0.05  # of false discoveries, in the summary


def top_table(
    results: FittedBatch,
    coef: str,
    n: int | None = 10,
    sort_by: str = "p_value",
    adjust: str = "bh",
    *,
    q_value: bool = False,
) -> pd.DataFrame:
    """The responses that say most about a coefficient or contrast.

    Args:
        results: the fits, moderated or not.
        coef: name of a fixed effect or of a contrast.
        n: how many responses; all with a test if None.
        sort_by: "p_value", "statistic" or "estimate", the largest in size first, or "none" for the
            order of the responses.
        adjust: of the p-values over all responses, not only those shown: "bh", "by", "holm",
            "bonferroni" or "none"; see
            `jaxreml.inference.discoveries.adjusted`.
        q_value: whether to add Storey's q-values
            (`jaxreml.inference.discoveries.q_values`).

    Returns:
        A row per response, which the index names; columns mean (of the response), estimate,
        std_error, statistic, df, p_value, p_adjusted and, if asked for, q_value. Responses without
        a test are left out.

    Raises:
        DataError: no such coefficient or contrast, or one of each; no q-values.
        ValueError: another order or adjustment, or an `n` below 1.

    Examples:
        >>> results.top_table("Days", 3)[["estimate", "statistic", "p_adjusted"]].round(3)
               estimate  statistic  p_adjusted
        gene5     0.228      9.406         0.0
        gene2     0.200      8.576         0.0
        gene4     0.196      6.815         0.0
        >>> results.top_table("Days", 1, q_value=True)["q_value"].lt(0.05).tolist()
        [True]
    """
    if sort_by not in ORDERS:
        known = ", ".join(f'"{name}"' for name in ORDERS)
        raise ValueError(f"sort_by must be one of {known}, not {sort_by!r}")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, or None for all, not {n}")
    frame = tests_of(results, coef)
    p = frame["p_value"].to_numpy()
    frame["p_adjusted"] = discoveries.adjusted(p, adjust)
    if q_value:
        frame["q_value"] = discoveries.q_values(p)
    known = np.flatnonzero(~np.isnan(p))
    if sort_by != "none":
        # p-values may be 0 in doubles where statistics still differ.
        size = np.abs(frame["statistic" if sort_by == "p_value" else sort_by].to_numpy()[known])
        first = p[known] if sort_by == "p_value" else np.zeros(known.size)
        known = known[np.lexsort((-size, first))]
    return frame.iloc[known[:n]]


def tests_of(results: FittedBatch, coef: str) -> pd.DataFrame:
    """The tests of one coefficient or contrast: a row per response, columns mean, estimate,
    std_error, statistic, df, p_value.

    Raises:
        DataError: no such coefficient or contrast, or one of each.
    """
    model, fits = results.model, results.fits
    fixed, contrasts = list(model.fixed_names), list(model.contrasts)
    if coef in fixed and coef in contrasts:
        raise DataError(f"{coef!r} is a coefficient and a contrast: give the contrast another name")
    if coef in contrasts:
        k, own = contrasts.index(coef), (fits.contrast, fits.contrast_se, fits.contrast_df)
        p = results.contrasts[coef, "p_value"].to_numpy()
    elif coef in fixed:
        k, own = fixed.index(coef), (fits.beta, fits.se, fits.df)
        p = results.pvalues.to_numpy()[:, k]
    else:
        known = ", ".join(map(repr, [*fixed, *contrasts]))
        raise DataError(f"there is no coefficient or contrast {coef!r}: {known}")
    estimate, error, df = (values[:, k] for values in own)
    columns = {
        "mean": fits.mean,
        "estimate": estimate,
        "std_error": error,
        "statistic": estimate / error,
        "df": df,
        "p_value": p,
    }
    return pd.DataFrame(columns, results.responses)


def summary(results: FittedBatch) -> str:
    """What was fitted, how it went and what was found, in a few lines of text.

    Discoveries are counted at a false discovery rate of 5 %, each coefficient and contrast by
    itself, with the signs of their estimates.

    Examples:
        >>> print(results.summary())
        ~ Days + (1 | Subject), REML, structure 'grouped', engine 'numpy'
        40 responses, 40 with an optimum, 0 of them singular
        180 rows
        <BLANKLINE>
        Discoveries at a false discovery rate of 5%, df 'satterthwaite':
                     up  down  tests
        (Intercept)   0     0     40
        Days          5     0     40
    """
    model, fits = results.model, results.fits
    good = fits.status == Status.CONVERGED
    lines = [
        f"{model.formula}, {model.method}, structure {model.structure!r}"
        + (f", engine {model.engine!r}" if model.engine else ""),
        f"{len(results)} responses, {int(good.sum())} with an optimum, "
        f"{int(np.sum(fits.is_singular[good]))} of them singular",
    ]
    failures = sorted(count_failures(fits.status).items(), key=lambda item: -item[1])
    lines += [f"  {count} without: {sentence}" for sentence, count in failures]
    lines.append(rows_in_words(results))
    table = discoveries_of(results)
    if len(table):
        lines += ["", f"Discoveries at a false discovery rate of {RATE:.0%}, df {model.df!r}:"]
        lines.append(table.to_string())
    return "\n".join(lines)


def rows_in_words(results: FittedBatch) -> str:
    """How many rows were used and left out."""
    fits, dropped = results.fits, results.model.n_dropped
    if not len(results):
        return "no rows"
    low, high = int(fits.nobs.min()), int(fits.nobs.max())
    text = f"{high} rows" if low == high else f"{low} to {high} rows"
    if dropped:
        text += f"; {dropped} left out for missing values of the data"
    missing = int(np.sum(fits.n_missing > 0))
    return text + (f"; {missing} responses have missing values" if missing else "")


def discoveries_of(results: FittedBatch) -> pd.DataFrame:
    """Per coefficient and contrast how many are up and down, and of how many tests."""
    names = [*results.model.fixed_names, *results.model.contrasts]
    fits = results.fits
    estimates = np.concatenate([fits.beta, fits.contrast], axis=1)
    p = [results.pvalues.to_numpy()]
    p += [
        results.contrasts[name, "p_value"].to_numpy()[:, None] for name in results.model.contrasts
    ]
    p_values = np.concatenate(p, axis=1)
    with np.errstate(invalid="ignore"):
        found = false_discovery_rates(p_values) <= RATE
    columns = {
        "up": np.sum(found & (estimates > 0), axis=0),
        "down": np.sum(found & (estimates < 0), axis=0),
        "tests": np.sum(~np.isnan(p_values), axis=0),
    }
    return pd.DataFrame(columns, names)


def to_csv(results: Any, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the columns of `to_frame` as text, one row per response; compressed if the name ends
    in .gz. Numbers are written so that they are read back exactly.

    Raises:
        DataError: the file exists and `overwrite` is not given; it is a folder; its folder does
            not exist.

    Examples:
        >>> results.to_csv("genes.csv", overwrite=True)
        >>> pd.read_csv("genes.csv").shape
        (40, 40)
    """
    path = check_new(path, overwrite)
    frame = results.to_frame(output="pandas")
    compression = "gzip" if path.suffix == ".gz" else None
    write_whole(
        path, lambda temporary: frame.to_csv(temporary, index=False, compression=compression)
    )
