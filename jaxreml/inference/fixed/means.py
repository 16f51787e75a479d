"""Estimated marginal means, their contrasts and slopes, as emmeans defines them.

A marginal mean is the average of the fixed effects' predictions over the cells of the reference
grid (`grid`) that the other factors make (Searle, Speed and Milliken 1980, Am. Stat. 34:216).
Factors nested in others are found as emmeans does (`nested`): their means belong to their levels
within those of the others, averages are over the levels that there are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.data.outputs import converted
from jaxreml.data.tables import nearest
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed.adjustments import check_adjustment, critical_values, p_values
from jaxreml.inference.fixed.contrasts import Contrasts, family
from jaxreml.inference.fixed.grid import OVERALL, ReferenceGrid, is_numeric, reference_grid
from jaxreml.inference.fixed.nested import described, with_outer
from jaxreml.inference.fixed.terms import FixedTerms
from jaxreml.inference.fixed.wald import approximation, each
from jaxreml.typeset.frames import frame_table
from jaxreml.typeset.table import Table, Tabulated

STEP = 1e-4  # of a covariate's range, for slopes of curves
ROUNDING = 1e-13
WEIGHTS = ("equal", "proportional")


@dataclass(frozen=True, eq=False, repr=False)
class MarginalMeans(Tabulated):
    """Marginal means, or slopes, and contrasts between them.

    Attributes:
        table: a row per mean: its levels, then estimate, std_error, df, lower, upper,
            statistic, p_value (of the hypothesis that it is zero). What the data cannot estimate
            is NaN, what the model makes constant (such as the difference of two slopes of a
            straight line) is not tested, and there is a column ``reason`` then.
        contrasts: the contrasts asked for, laid out likewise, or None.
        averaged_over: factors averaged over.
        notes, contrast_notes: how the means and the contrasts were made, and of what to beware, as
            emmeans prints it.

    Examples:
        >>> means = scores.emmeans("Machine")
        >>> means.table["estimate"].round(1).tolist()
        [52.4, 60.3, 66.3]
        >>> means.averaged_over, means.contrasts
        ((), None)
        >>> means.notes
        ('Degrees-of-freedom method: satterthwaite', 'Confidence level used: 0.95')
    """

    table: pd.DataFrame
    contrasts: pd.DataFrame | None
    averaged_over: tuple[str, ...]
    notes: tuple[str, ...]
    contrast_notes: tuple[str, ...]
    _functions: Functions

    @property
    def factors(self) -> tuple[str, ...]:
        """The columns of `table` whose levels the means have.

        Examples:
            >>> scores.emmeans("Machine").factors
            ('Machine',)
        """
        return tuple(self._functions.labels)

    @property
    def by(self) -> tuple[str, ...]:
        """Those of `factors` within whose levels means are compared.

        Examples:
            >>> children = jaxreml.datasets.load("orthodont")
            >>> growth = jaxreml.fit("distance ~ age * Sex + (age | Subject)", children)
            >>> growth.emmeans("Sex", by="age", at={"age": [8, 14]}).by
            ('age',)
        """
        return self._functions.by

    @property
    def conf_level(self) -> float:
        """Confidence level of the intervals.

        Examples:
            >>> scores.emmeans("Machine", conf_level=0.9).conf_level
            0.9
        """
        return self._functions.conf_level

    def contrast(
        self,
        contrast: str | Mapping[str, Any] = "pairwise",
        *,
        by: str | Sequence[str] | None = None,
        adjust: str | None = None,
    ) -> pd.DataFrame:
        """Contrasts between the means.

        Args:
            contrast: their family, see `jaxreml.inference.contrasts.family`.
            by: compare within the levels of these; those of the means if None, () for none.
            adjust: "none", "tukey", "dunnettx", "mvt", "bonferroni", "holm", "sidak" or "BH" (see
                `jaxreml.inference.adjustments.p_values`), within each level of `by`; None for
                emmeans' usual one: "tukey" for pairwise contrasts, "dunnettx" for those with a
                control, "mvt" for "consec", "BH" for "eff", "none" for others.

        Returns:
            A row per contrast: contrast, the levels of `by`, and the columns of `table`; the
            interval is simultaneous (Bonferroni's for "holm" and "BH").

        Examples:
            >>> means = scores.emmeans("Machine")
            >>> means.contrast("consec")[["contrast", "estimate", "p_value"]].round(2)
              contrast  estimate  p_value
            0    B - A      7.97      0.0
            1    C - B      5.95      0.0
            >>> means.contrast(adjust="holm")["p_value"].lt(0.05).tolist()
            [True, True, True]
        """
        return self._functions.contrasted(contrast, _names(by, self._functions.by), adjust)[0]

    def as_table(self, table: str = "means", **options: Any) -> Table:
        """The means or their contrasts as a table for a paper, with their notes below.

        Args:
            table: "means", or "contrasts" where some were asked for.
            options: digits, rename, caption, label and note, as for `jaxreml.frame_table`.

        Raises:
            ValueError: another table, or contrasts where there are none.

        Examples:
            >>> table = fit.emmeans("Days", at={"Days": [0, 9]}).as_table()
            >>> print(table.to_markdown())
            | Days | Estimate |  *SE* | *df* |           95% CI |   *t* |    *p* |
            | ---: | -------: | ----: | ---: | ---------------: | ----: | -----: |
            |    0 |   251.41 |  6.82 |   17 | [237.01, 265.80] | 36.84 | < .001 |
            |    9 |   345.61 | 14.63 |   17 | [314.75, 376.47] | 23.63 | < .001 |
            <BLANKLINE>
            *Note.* Degrees-of-freedom method: satterthwaite.
        """
        frames = {
            "means": (self.table, self.notes),
            "contrasts": (self.contrasts, self.contrast_notes),
        }
        frame, notes = frames.get(table, (None, ()))
        if frame is None:
            known = '"means"' if self.contrasts is None else '"means" or "contrasts"'
            raise ValueError(f"table must be {known}, not {table!r}")
        made = frame_table(frame, conf_level=self._functions.conf_level, **options)
        shown = [note for note in notes if not note.startswith("Confidence level used")]
        return replace(made, notes=(*shown, *made.notes))

    def _repr_html_(self) -> str:
        tables = ["means"] if self.contrasts is None else ["means", "contrasts"]
        return "".join(self.as_table(table).to_html() for table in tables)

    def to_frame(self, contrasts: bool = False, *, output: str | None = None) -> Any:
        """The means, or the contrasts asked for, in the library that the data came in.

        Args:
            contrasts: these instead of the means.
            output: "pandas", "polars" or "pyarrow" for another library.

        Raises:
            ValueError: contrasts that were not asked for.

        Examples:
            >>> means = scores.emmeans("Machine", contrast="pairwise")
            >>> means.to_frame(contrasts=True)[["contrast", "estimate"]].round(0)
              contrast  estimate
            0    A - B      -8.0
            1    A - C     -14.0
            2    B - C      -6.0
            >>> type(means.to_frame(output="polars")).__module__.split(".")[0]
            'polars'
        """
        frame = self.contrasts if contrasts else self.table
        if frame is None:
            raise ValueError('no contrasts were asked for: emmeans(..., contrast="pairwise")')
        return converted(frame, self._functions.fit.library if output is None else output)

    def __str__(self) -> str:
        parts = ["\n".join([self.table.to_string(index=False), "", *self.notes])]
        if self.contrasts is not None:
            text = self.contrasts.to_string(index=False)
            parts.append("\n".join([text, "", *self.contrast_notes]))
        return "\n\n".join(parts) + "\n"

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, eq=False)
class Functions:
    """Labelled linear functions L beta + offset of the fixed effects.

    Attributes:
        fit, terms, df, conf_level: of what, and how they are tested.
        labels: a row per function.
        by: columns of `labels` within whose levels functions are compared.
        L: (k, P), columns of X, the aliased ones too.
        offset: (k,).
        noise: rounding error of L, relative; smaller differences of its rows are taken for zero.
        nested: whether factors of the labels are nested in others.
    """

    fit: FittedModel
    terms: FixedTerms
    df: str
    conf_level: float
    labels: pd.DataFrame
    by: tuple[str, ...]
    L: np.ndarray
    offset: np.ndarray
    noise: float = ROUNDING
    nested: bool = False

    def tabulated(
        self, adjust: str, kind: Contrasts | None = None, sizes: Mapping[Any, int] | None = None
    ) -> pd.DataFrame:
        """Labels, estimates, tests and intervals; p-values are adjusted within `by`, where `sizes`
        says how many means are compared."""
        check_adjustment(adjust, kind is not None and kind.pairs)
        estimable = self.terms.frame.estimable(self.L)
        constant = estimable & ~self.L[:, self.terms.frame.kept].any(axis=1)
        table = self._tests(estimable & ~constant)
        table.loc[constant, "estimate"] = self.offset[constant]
        table.loc[constant, "std_error"] = 0.0
        low, high = np.empty((2, len(table)))
        p_value = np.empty(len(table))
        groups = self.groups()
        for key, rows in groups.items():
            part, means = table.iloc[rows], (sizes or {}).get(key, 0)
            df = part["df"].to_numpy()
            related = self._correlation(rows, part["std_error"]) if adjust == "mvt" else None
            p_value[rows] = p_values(part["statistic"].to_numpy(), df, adjust, means, related)
            half = part["std_error"] * critical_values(
                self.conf_level, df, adjust, len(rows), means, related
            )
            low[rows] = part["estimate"] - half
            high[rows] = part["estimate"] + half
        table.insert(3, "lower", low)
        table.insert(4, "upper", high)
        table["p_value"] = p_value
        if constant.any() or not estimable.all():
            table["reason"] = np.where(constant, "constant: no coefficient is part of it", "")
            table.loc[~estimable, "reason"] = "not estimable: outside the row space of X"
        return pd.concat([self.labels, table], axis=1)

    def _tests(self, tested: np.ndarray) -> pd.DataFrame:
        columns = ["estimate", "std_error", "df", "statistic", "p_value"]
        table = pd.DataFrame(np.nan, index=range(len(self.L)), columns=columns)
        if tested.any():
            L = self.L[tested][:, self.terms.frame.kept]
            offset = self.offset[tested]
            found = each(self.fit, L, rhs=-offset, df=self.df)[columns]
            found["estimate"] += offset
            table.loc[tested] = found.to_numpy()
        return table

    def _correlation(self, rows: np.ndarray, std_error: pd.Series) -> np.ndarray:
        """Correlations of the estimates of some functions, NaN where there is none."""
        L = self.L[rows][:, self.terms.frame.kept]
        scale = std_error.where(std_error > 0).to_numpy()
        return L @ approximation(self.fit, self.df).vcov @ L.T / np.outer(scale, scale)

    def groups(self) -> dict[Any, np.ndarray]:
        """Rows of each combination of the levels of `by`, in the order of the rows."""
        if not self.by:
            return {(): np.arange(len(self.labels))}
        found: dict[Any, list[int]] = {}
        for row, key in enumerate(self.labels[list(self.by)].itertuples(index=False, name=None)):
            found.setdefault(key, []).append(row)
        return {key: np.array(rows) for key, rows in found.items()}

    def contrasted(
        self, contrast: str | Mapping[str, Any], by: tuple[str, ...], adjust: str | None
    ) -> tuple[pd.DataFrame, str]:
        """The table of a family of contrasts within the levels of `by`, and how it is adjusted."""
        for name in by:
            if name not in self.labels:
                raise DataError(f"by={name!r} is not among the means' {', '.join(self.labels)}")
        compared = [name for name in self.labels if name not in by]
        if not compared:
            raise ValueError("by takes all the factors of the means: there is nothing to compare")
        within = replace(self, by=by)
        names: list[str] = []
        parts, keys = [], []
        kind, sizes = None, {}
        for key, rows in within.groups().items():
            if len(rows) < 2 and self.nested:
                continue  # the only level within what it is nested in
            texts = _texts(self.labels.loc[rows, compared])
            kind = family(contrast, texts)
            sizes[key] = len(rows)
            names += kind.names
            keys += [key] * len(kind.names)
            parts.append((kind.coefficients, rows))
        if kind is None:
            raise DataError("there is one mean within each level of by: nothing to compare")
        L, offset = (
            np.concatenate(
                [_combined(weights, values[rows], self.noise) for weights, rows in parts]
            )
            for values in (self.L, self.offset)
        )
        labels = pd.DataFrame({"contrast": names})
        for k, name in enumerate(by):
            labels[name] = [key[k] for key in keys]
        result = replace(self, labels=labels, by=by, L=L, offset=offset)
        adjust = adjust or kind.adjust
        tests = {len(rows) for rows in result.groups().values()}
        families = set(sizes.values()) if adjust == "tukey" else tests
        return result.tabulated(adjust, kind, sizes), _adjustment(adjust, families)


def _combined(weights: np.ndarray, values: np.ndarray, noise: float) -> np.ndarray:
    """`weights` @ `values`, zero where it is no more than rounding errors."""
    product = weights @ values
    return np.where(np.abs(product) <= noise * (np.abs(weights) @ np.abs(values)), 0.0, product)


def _texts(labels: pd.DataFrame) -> list[str]:
    """Levels as text: numbers after their factor's name, several factors one after another."""
    columns = []
    for name in labels:
        texts = [f"{v:.15g}" if isinstance(v, float) else str(v) for v in labels[name]]
        if all(_is_number(text) for text in texts):
            texts = [f"{name}{text}" for text in texts]
        columns.append(texts)
    joined = [" ".join(parts) for parts in zip(*columns, strict=True)]
    return [f"({text})" if re.search(r"[-+*/]", text) else text for text in joined]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Options(NamedTuple):
    """What `emmeans` and `emtrends` are asked for, besides the grid."""

    contrast: str | Mapping[str, Any] | None = None
    adjust: str | None = None
    df: str = "satterthwaite"
    weights: str = "equal"
    conf_level: float = 0.95

    def checked(self) -> Options:
        """These; ValueError for a weighting or a level that is none."""
        if self.weights not in WEIGHTS:
            raise ValueError(f'weights must be "equal" or "proportional", not {self.weights!r}')
        check_conf_level(self.conf_level)
        return self


def emmeans(
    fit: FittedModel,
    specs: str | Sequence[str],
    by: str | Sequence[str] | None = None,
    at: Mapping[str, Any] | None = None,
    *,
    contrast: str | Mapping[str, Any] | None = None,
    adjust: str | None = None,
    df: str = "satterthwaite",
    weights: str = "equal",
    conf_level: float = 0.95,
) -> MarginalMeans:
    """Estimated marginal means of a fit, with the figures of R's emmeans.

    Args:
        fit: the fit.
        specs: variables to whose levels the means belong; "1" for the overall mean.
        by: further ones, within whose levels means are compared.
        at: values of variables, see `jaxreml.inference.grid.reference_grid`.
        contrast: also these contrasts, such as "pairwise", see `MarginalMeans.contrast`.
        adjust: for the p-values and intervals of the contrasts, see there; without contrasts for
            those of the means, None for none.
        df: method for the degrees of freedom, see `jaxreml.inference.wald`; "inf" is emmeans'
            "asymptotic".
        weights: of the cells averaged over: "equal", or "proportional" to their numbers of rows.
        conf_level: confidence level.

    Returns:
        A `MarginalMeans`: means in ``table``, contrasts in ``contrasts`` if they were asked for.

    Raises:
        ValueError: an unknown method, adjustment or weighting, or a level outside (0, 1).
        DataError: names or levels that are not the model's; a fit that did not converge.

    Examples:
        >>> scores.emmeans("Machine").table[["Machine", "estimate", "lower", "upper"]].round(1)
          Machine  estimate  lower  upper
        0       A      52.4   46.9   57.8
        1       B      60.3   54.8   65.8
        2       C      66.3   60.8   71.8
        >>> pairs = scores.emmeans("Machine", contrast="pairwise").contrasts
        >>> pairs[["contrast", "estimate", "std_error", "p_value"]].round(3)
          contrast  estimate  std_error  p_value
        0    A - B    -7.967      1.054      0.0
        1    A - C   -13.917      1.054      0.0
        2    B - C    -5.950      1.054      0.0
        >>> fit.emmeans("Days", at={"Days": [0, 9]}).table["estimate"].round(1).tolist()
        [251.4, 345.6]
    """
    options = Options(contrast, adjust, df, weights, conf_level).checked()
    grid = reference_grid(fit, at)
    L, offset = (
        grid.terms.encoding.matrix(grid.table),
        grid.terms.frame.offsets(grid.table) + grid.constant,
    )
    return _summarised(fit, grid, L, offset, specs, by, options)


def emtrends(
    fit: FittedModel,
    specs: str | Sequence[str],
    var: str,
    by: str | Sequence[str] | None = None,
    at: Mapping[str, Any] | None = None,
    **options: Any,
) -> MarginalMeans:
    """Slopes of the predictions in a covariate at the levels of factors.

    The derivative at the values of the reference grid, offsets included, by central differences (of
    1e-4 of the covariate's range): that of a straight line or parabola is exact, where emmeans'
    forward differences are so for straight lines only.

    Args:
        fit, specs, by, at: as for `emmeans`.
        var: the covariate.
        options: contrast, adjust, df, weights and conf_level, as for `emmeans`.

    Raises:
        DataError: also a variable that is not a covariate of the fixed effects.

    Examples:
        >>> children = jaxreml.datasets.load("orthodont")
        >>> growth = jaxreml.fit("distance ~ age * Sex + (age | Subject)", children)
        >>> growth.emtrends("Sex", "age").table[["Sex", "estimate", "std_error"]].round(3)
              Sex  estimate  std_error
        0    Male     0.784      0.086
        1  Female     0.480      0.104
    """
    asked = Options(**options).checked()
    grid = reference_grid(fit, at)
    if var not in grid.levels or var in grid.terms.factors or not is_numeric(grid.table[var].dtype):
        covariates = [n for n in grid.levels if is_numeric(grid.table[n].dtype)]
        covariates = [n for n in covariates if n not in grid.terms.factors]
        raise DataError(
            f"var={var!r} is not a covariate of the fixed effects; these are: "
            f"{', '.join(covariates) or 'none'}"
        )
    values = grid.terms.table[var].to_numpy(float)
    extent = np.ptp(values) or np.abs(values).max() or 1.0
    step = 2.0 ** np.round(np.log2(STEP * extent))  # x + step is exact for most x
    noise = max(ROUNDING, 4 * np.finfo(float).eps * np.abs(values).max() / step)
    ahead, behind = (
        grid.table.assign(**{var: grid.table[var].astype(float) + sign * step}) for sign in (1, -1)
    )
    L, offset = (
        (function(ahead) - function(behind)) / (2 * step)
        for function in (grid.terms.encoding.matrix, grid.terms.frame.offsets)
    )
    return _summarised(fit, grid, L, offset, specs, by, asked, noise, var)


def contrast(
    fit: FittedModel,
    specs: str | Sequence[str],
    contrast: str | Mapping[str, Any] = "pairwise",
    by: str | Sequence[str] | None = None,
    at: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Contrasts between marginal means: those of ``emmeans(..., contrast=contrast)`` alone.

    Args:
        fit, specs, by, at: as for `emmeans`.
        contrast: their family, as for `MarginalMeans.contrast`, or weights of the means by the
            contrast's name.
        options: adjust, df, weights and conf_level, as for `emmeans`.

    Returns:
        A row per contrast: contrast, the levels of `by`, estimate, std_error, df, lower, upper,
        statistic, p_value.

    Raises:
        DataError, ValueError: as for `emmeans`.

    Examples:
        >>> scores.contrast("Machine", "trt.vs.ctrl")[["contrast", "estimate", "df"]].round(2)
          contrast  estimate    df
        0    B - A      7.97  46.0
        1    C - A     13.92  46.0
        >>> scores.contrast("Machine", {"A or B": [0.5, 0.5, 0]})["estimate"].round(1).tolist()
        [56.3]
    """
    found = emmeans(fit, specs, by, at, contrast=contrast, **options).contrasts
    assert found is not None
    return found


def _summarised(
    fit: FittedModel,
    grid: ReferenceGrid,
    L: np.ndarray,
    offset: np.ndarray,
    specs: str | Sequence[str],
    by: str | Sequence[str] | None,
    options: Options,
    noise: float = ROUNDING,
    trend: str | None = None,
) -> MarginalMeans:
    """Average the functions of the grid's rows over the variables not named, and compare.

    Where they are slopes in a covariate, `trend` is its name.
    """
    contrast, adjust, df, weights, conf_level = options
    within = _names(by, ())
    names = [name for name in _names(specs, ()) if name != OVERALL]
    names = list(dict.fromkeys([*(name for name in names if name not in within), *within]))
    for name in names:
        if name not in grid.levels:
            raise DataError(
                f"{name!r} is not a variable of the fixed effects{nearest(name, list(grid.levels))}"
            )
    within = tuple(with_outer(within, grid.nesting))
    asked, names = names, with_outer(names, grid.nesting)
    average, exists = grid.averaging(names, weights)
    labels = grid.labels(names).loc[exists].reset_index(drop=True)
    averages = _combined(average, L, noise)
    nested = any(name in grid.nesting for name in names)
    functions = Functions(
        fit, grid.terms, df, conf_level, labels, within, averages, average @ offset, noise, nested
    )
    of_means = "none" if contrast is not None else adjust or "none"
    table = functions.tabulated(of_means)
    over = tuple(n for n, v in grid.levels.items() if n not in names and len(v) > 1)
    before, after = _notes(grid, [*asked, trend] if asked and trend else asked, over, df)
    families = {len(rows) for rows in functions.groups().values()}
    level = f"Confidence level used: {conf_level:g}"
    notes = tuple(filter(None, [*before, *after, level, _adjustment(of_means, families)]))
    if contrast is None:
        return MarginalMeans(table, None, over, notes, (), functions)
    compared, how = functions.contrasted(contrast, within, adjust)
    contrast_notes = tuple(filter(None, [*before, *after, level, how]))
    return MarginalMeans(table, compared, over, notes, contrast_notes, functions)


def _notes(
    grid: ReferenceGrid, names: list[str], over: tuple[str, ...], df: str
) -> tuple[list[str], list[str]]:
    """What to beware of, and how means of `names` are made, or slopes with the covariate in them.

    As emmeans, warns of means of variables that interact with others, whose effects are averaged.
    """
    before, after = [], []
    terms = grid.terms.variables_of_terms
    involved = [name for name, used in terms.items() if names and set(names) < used]
    if involved and not grid.nesting:
        note = f"Results may be misleading due to involvement in interactions: {involved[0]}"
        warnings.warn(note, stacklevel=4)
        before.append(f"NOTE: {note}")
    if grid.nesting:
        before.append(f"A nesting structure was found: {described(grid.nesting)}")
    if over:
        after.append(f"Results are averaged over the levels of: {', '.join(over)}")
    after.append(f"Degrees-of-freedom method: {'asymptotic' if df == 'inf' else df}")
    return before, after


def _adjustment(adjust: str, families: set[int]) -> str:
    """How p-values and intervals are adjusted, in emmeans' words; "" where they are not."""
    if adjust == "none" or max(families) < 2:
        return ""
    size = "" if len(families) > 1 else f"{next(iter(families))} "
    what = f"comparing a family of {size}estimates" if adjust == "tukey" else f"{size}tests"
    return f"P value and confidence level adjustment: {adjust} method for {what}"


def _names(value: str | Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return default
    return (value,) if isinstance(value, str) else tuple(value)
