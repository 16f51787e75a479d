"""Frames of results as tables: known columns get a journal's headings and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.typeset import numbers
from jaxreml.typeset.content import Column, Section, Spanner
from jaxreml.typeset.table import Table

Made = tuple[Column, list[str]]  # a column and its cells
LIMITS = (("lower", "upper"), ("conf_low", "conf_high"))
REMARKS = ("note", "reason", "message")
SCALE = ("estimate", "std_error", "bias", "sd")  # with as many decimals as the error deserves


def _two(values: Sequence[float], digits: int | None) -> list[str]:
    return numbers.column(values, 2 if digits is None else digits)


def _degrees(values: Sequence[float], _: int | None) -> list[str]:
    return numbers.degrees(values)


def _p_values(values: Sequence[float], _: int | None) -> list[str]:
    return [numbers.p_value(value) for value in values]


# By name: heading, whether it is a symbol, and how its numbers are written.
KNOWN: dict[str, tuple[str, bool, Callable[[Sequence[float], int | None], list[str]]]] = {
    "estimate": ("Estimate", False, numbers.column),
    "std_error": ("SE", True, numbers.column),
    "statistic": ("t", True, _two),
    "df": ("df", True, _degrees),
    "num_df": ("df1", True, _degrees),
    "den_df": ("df2", True, _degrees),
    "p_value": ("p", True, _p_values),
    "p_adjusted": ("Adjusted p", False, _p_values),
    "q_value": ("q", True, _p_values),
    "sum_sq": ("Sum sq.", False, _two),
    "mean_sq": ("Mean sq.", False, _two),
    "npar": ("Parameters", False, _degrees),
    "AIC": ("AIC", False, _two),
    "AICc": ("AICc", False, _two),
    "BIC": ("BIC", False, _two),
    "logLik": ("Log-likelihood", False, _two),
    "deviance": ("Deviance", False, _two),
    "chisq": ("\N{GREEK SMALL LETTER CHI}\N{SUPERSCRIPT TWO}", True, _two),
    "AIC_weight": ("AIC weight", False, _p_values),
    "AICc_weight": ("AICc weight", False, _p_values),
    "BIC_weight": ("BIC weight", False, _p_values),
    "variance": ("Variance", False, numbers.column),
    "sd": ("SD", True, numbers.column),
    "correlation": ("Correlation", False, _two),
    "bias": ("Bias", False, numbers.column),
    "group": ("Group", False, numbers.column),
    "term": ("Term", False, numbers.column),
    "effect": ("Effect", False, numbers.column),
    "level": ("Level", False, numbers.column),
    "parameter": ("Parameter", False, numbers.column),
    "contrast": ("Contrast", False, numbers.column),
    "formula": ("Formula", False, numbers.column),
    "response": ("Response", False, numbers.column),
    "mean": ("Mean", False, numbers.column),
}


def frame_table(
    frame: Any,
    *,
    digits: int | None = None,
    conf_level: float | None = None,
    rename: Mapping[str, str] | None = None,
    caption: str = "",
    label: str = "",
    note: str = "",
) -> Table:
    """A frame of results as a table for a paper or a notebook.

    For what methods return as plain frames: `anova`, `contrast`, `joint_tests`, `drop1`, `ranova`,
    `jaxreml.compare`, `tidy`, `top_table`, and any other frame. pandas' own ``to_latex`` leaves
    underscores unescaped and prints small p-values as 0.00; this does neither.

    Args:
        frame: of pandas, polars, pyarrow or another library that narwhals reads. A pandas index,
            unless it only counts, is the first column.
        digits: decimals of estimates, statistics and sums of squares; if left out two, or more in
            rows whose standard error would show fewer than two figures. p-values have three and
            are never 0, degrees of freedom one at most.
        conf_level: of the intervals in the frame, for their heading.
        rename: other texts for names: of columns, rows and levels.
        caption, label, note: of the table, as for `jaxreml.model_table`.

    Returns:
        The table, with `to_latex`, `to_html` and `to_markdown`. Lower and upper limits are one
        column. Columns without a value are left out; notes and reasons go below the table.

    Examples:
        >>> print(jaxreml.frame_table(fit.coefficients()).to_markdown())
        |             | Estimate | *SE* | *df* |   *t* |    *p* |
        | ----------- | -------: | ---: | ---: | ----: | -----: |
        | (Intercept) |   251.41 | 6.82 |   17 | 36.84 | < .001 |
        | Days        |    10.47 | 1.55 |   17 |  6.77 | < .001 |
        >>> latex = jaxreml.frame_table(fit.anova(), caption="F tests.").to_latex()
    """
    frame = _as_pandas(frame)
    if conf_level is not None:
        check_conf_level(conf_level)
    names = dict(rename or {})
    spanners: list[Spanner] = []
    if frame.columns.nlevels > 1:
        made = _index(frame, names)
        for key in dict.fromkeys(frame.columns.get_level_values(0)):
            part = _columns(frame.xs(key, axis=1), digits, conf_level, names)
            spanners.append(Spanner(_text(key, names), len(made), len(made) + len(part)))
            made += part
        notes: list[str] = []
    else:
        remarks = [name for name in REMARKS if name in frame]
        made = _index(frame, names)
        made += _columns(frame.drop(columns=remarks), digits, conf_level, names)
        notes = _remarks(frame, remarks, made)
    columns, cells = zip(*made, strict=True) if made else ((), ())
    rows = [list(row) for row in zip(*cells, strict=True)]
    own = (*notes, note) if note else tuple(notes)
    return Table(tuple(columns), (Section("", rows),), tuple(spanners), caption, label, own)


def _as_pandas(frame: Any) -> pd.DataFrame:
    """A frame of any library; ValueError for what is none."""
    if isinstance(frame, pd.DataFrame):
        return frame
    try:
        return nw.from_native(frame, eager_only=True).to_pandas()
    except TypeError:
        raise ValueError(f"frame_table takes a dataframe, not {type(frame).__name__}") from None


def _index(frame: pd.DataFrame, rename: Mapping[str, str]) -> list[Made]:
    """The index as columns, unless it only counts."""
    index = frame.index
    if isinstance(index, pd.RangeIndex) and index.name is None:
        return []
    made = []
    for k, name in enumerate(index.names):
        values = index.get_level_values(k)
        header = "" if name in (None, "term") else rename.get(str(name), _header(str(name)))
        made.append((Column(header, align="l"), [_text(value, rename) for value in values]))
    return made


def _columns(
    frame: pd.DataFrame,
    digits: int | None,
    conf_level: float | None,
    rename: Mapping[str, str],
) -> list[Made]:
    """The columns of a frame, those without a value left out."""
    frame = frame.loc[:, [_has_value(frame.iloc[:, k]) for k in range(frame.shape[1])]]
    decimals = _decimals(frame, digits)
    ends = {low: high for low, high in LIMITS if low in frame and high in frame}
    made: list[Made] = []
    for k, name in enumerate(map(str, frame.columns)):
        values = frame.iloc[:, k]
        if name in ends:
            limits = zip(values, frame[ends[name]], decimals, strict=True)
            cells = [numbers.interval(low, high, own) for low, high, own in limits]
            level = "" if conf_level is None else f"{100 * conf_level:g}% "
            made.append((Column(f"{level}CI"), numbers.padded(cells, decimals)))
        elif name not in ends.values():
            header = rename.get(name, _heading(name, frame))
            made.append(_column(name, header, values, decimals, digits, rename))
    return made


def _has_value(column: pd.Series) -> bool:
    return bool((column.notna() & (column.astype(object) != "")).any())


def _decimals(frame: pd.DataFrame, digits: int | None) -> list[int]:
    """Decimals of each row's estimate, its standard error and its interval."""
    if digits is not None:
        return [digits] * len(frame)
    error = np.full(len(frame), np.nan)
    for low, high in LIMITS:
        if low in frame and high in frame:
            error = (frame[high] - frame[low]).to_numpy(float) / 4
    if "std_error" in frame:
        own = frame["std_error"].to_numpy(float)
        error = np.where(np.isfinite(own), own, error)
    elif "estimate" in frame and not np.isfinite(error).any():
        error = np.abs(frame["estimate"].to_numpy(float))
    return [numbers.decimals_for(value) for value in error]


def _column(
    name: str,
    header: str,
    values: pd.Series,
    decimals: list[int],
    digits: int | None,
    rename: Mapping[str, str],
) -> Made:
    known = KNOWN.get("correlation" if name.startswith("Correlation ") else name)
    symbol = known is not None and known[1]
    if pd.api.types.is_bool_dtype(values.dtype):
        cells = ["yes" if value else "no" for value in values]
        return Column(header, align="l"), cells
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return Column(header, align="l"), [_text(value, rename) for value in values]
    array = values.to_numpy(float, na_value=np.nan)
    if name in SCALE:
        cells = [numbers.number(v, own) for v, own in zip(array, decimals, strict=True)]
        return Column(header, symbol), numbers.padded(cells, decimals)
    writer = known[2] if known is not None else numbers.column
    return Column(header, symbol), writer(array.tolist(), digits)


def _heading(name: str, frame: pd.DataFrame) -> str:
    if name == "statistic":
        if "num_df" in frame:
            return "F"
        if "df" not in frame:
            return "t"
        df = frame["df"].to_numpy(float)
        return "z" if np.isinf(df).any() and not np.isfinite(df).any() else "t"
    return _header(name)


def _header(name: str) -> str:
    return KNOWN[name][0] if name in KNOWN else name


def _text(value: Any, rename: Mapping[str, str]) -> str:
    """A label; numbers without needless decimals, nothing for what is missing."""
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return rename.get(text, text)


def _remarks(frame: pd.DataFrame, remarks: list[str], made: list[Made]) -> list[str]:
    """Notes of rows as sentences: each once, after the names of its rows unless all have it."""
    if not made:
        return []
    labels = made[0][1]
    found: dict[str, list[str]] = {}
    for name in remarks:
        for label, value in zip(labels, frame[name], strict=True):
            if isinstance(value, str) and value:
                found.setdefault(value, []).append(label)
    return [
        text if len(rows) == len(labels) else f"{', '.join(rows)}: {text}"
        for text, rows in found.items()
    ]
