"""Regression tables: one model, or several side by side, as journals print them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.parameters import ratios
from jaxreml.inference.parameters.shares import shares
from jaxreml.inference.parameters.variances import named_readings
from jaxreml.results.tables import stars as stars_of
from jaxreml.results.tables import tests_in_words, tidy
from jaxreml.results.tidy import tidy_term
from jaxreml.typeset import numbers
from jaxreml.typeset.content import Column, Section, Spanner
from jaxreml.typeset.table import Table

COLUMNS = ("estimate", "std_error", "conf_int", "statistic", "df", "p_value")
OF_SEVERAL = ("estimate", "std_error")  # columns of each of several models
FIXED, RANDOM, MODEL = "Fixed effects", "Random effects", "Model"  # sections
PARTS = {"fixed": FIXED, "random": RANDOM, "model": MODEL}


class Options(NamedTuple):
    """What `model_table` is asked for; see there."""

    columns: list[str]
    sections: list[str]
    df: str
    conf_level: float
    digits: int | None
    stars: bool
    rename: Mapping[str, str]


class Key(NamedTuple):
    """What a row is about: models that have the same one share the row."""

    section: str
    group: str
    label: str


class Cell(NamedTuple):
    """The text of a number and its decimals."""

    text: str
    decimals: int


def model_table(
    *fits: Any,
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    parts: Sequence[str] = ("fixed", "random", "model"),
    df: str = "satterthwaite",
    conf_level: float = 0.95,
    digits: int | None = None,
    stars: bool = False,
    rename: Mapping[str, str] | None = None,
    caption: str = "",
    label: str = "",
    note: str = "",
) -> Table:
    r"""A regression table of one fit, or of several side by side, as journals print it.

    Fixed effects first; then the standard deviations and correlations of the random effects; then
    numbers of observations and groups, ICC, R2 and the likelihood. The note says by what methods.

    Args:
        fits: of `jaxreml.fit`, one after another or in a list.
        names: of the models, over their columns; "Model 1", ... if left out.
        columns: any of "estimate", "std_error", "conf_int", "statistic", "df", "p_value", in the
            order wanted; all for one fit, estimate and std_error for several.
        parts: any of "fixed", "random" and "model": the sections of the table.
        df: degrees of freedom of the fixed effects, as for `LMMResults.test`.
        conf_level: of the intervals; Wald's, of SDs from the log scale, of correlations from
            Fisher's z.
        digits: decimals of estimates; if left out two, or more in rows whose standard error would
            show fewer than two figures. p-values have three and are never 0.
        stars: whether estimates of fixed effects carry stars for p < .05, .01 and .001.
        rename: other texts for names: of terms, effects and grouping factors, such as
            ``{"(Intercept)": "Intercept", "Days": "Days without sleep"}``.
        caption: above the table.
        label: LaTeX's name of the table, such as "tab:sleep", for ``\ref``.
        note: a sentence to add to the note.

    Returns:
        The table, with `to_latex`, `to_html` and `to_markdown`; a notebook shows it.

    Raises:
        ValueError: no fits, something else than fits, other columns, names of another number.

    Examples:
        >>> line = jaxreml.fit("Reaction ~ Days + (1 | Subject)", data)
        >>> both = jaxreml.model_table(line, fit, names=["Line", "Lines"], columns=["estimate"])
        >>> both
        <Table of 14 rows and 3 columns: , Estimate, Estimate>
        >>> print(both.to_markdown())
        |                                           | Line: Estimate | Lines: Estimate |
        | ----------------------------------------- | -------------: | --------------: |
        | **Fixed effects**                         |                |                 |
        | (Intercept)                               |         251.41 |          251.41 |
        | Days                                      |          10.47 |           10.47 |
        | **Random effects**                        |                |                 |
        | Subject: SD of (Intercept)                |          37.12 |           24.74 |
        | Subject: SD of Days                       |                |            5.92 |
        | Subject: correlation of (Intercept), Days |                |            0.07 |
        ...
        >>> latex = both.to_latex()
    """
    models = _models(fits)
    check_conf_level(conf_level)
    usual = COLUMNS if len(models) == 1 else OF_SEVERAL
    wanted = _chosen("columns", columns or usual, COLUMNS)
    titles = [PARTS[part] for part in _chosen("parts", parts, tuple(PARTS))]
    options = Options(wanted, titles, df, conf_level, digits, stars, dict(rename or {}))
    return built(models, names, options).described(caption, label, note)


def built(models: list[FittedModel], names: Sequence[str] | None, options: Options) -> Table:
    """The table of `model_table`."""
    known = list(names) if names is not None else [f"Model {k + 1}" for k in range(len(models))]
    if len(known) != len(models):
        raise ValueError(f"{len(known)} names for {len(models)} fits")
    heads, spanners = [Column("", align="l")], []
    for name in known:
        start = len(heads)
        heads += [_head(column, options) for column in options.columns]
        if len(models) > 1 or names is not None:
            spanners.append(Spanner(str(name), start, len(heads)))
    rows = _rows([_cells(fit, options) for fit in models])
    sections = _sections(rows, options.columns)
    notes = _notes(models, known, options)
    return Table(tuple(heads), sections, tuple(spanners), notes=tuple(notes))


def _models(fits: tuple[Any, ...]) -> list[FittedModel]:
    found = list(fits[0]) if len(fits) == 1 and isinstance(fits[0], list | tuple) else list(fits)
    for fit in found:
        if not isinstance(fit, FittedModel):
            raise ValueError(f"model_table takes fits (LMMResults), not {type(fit).__name__}")
    if not found:
        raise ValueError("model_table takes one fit or more")
    return found


def _chosen(argument: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    wanted = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        asked = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"{argument} must be among {', '.join(known)}, not {asked}")
    return wanted


def _head(column: str, options: Options) -> Column:
    if column == "conf_int":
        return Column(f"{100 * options.conf_level:g}% CI")
    statistic = "z" if options.df == "inf" else "t"
    headers = {"std_error": "SE", "statistic": statistic, "df": "df", "p_value": "p"}
    return Column(headers.get(column, "Estimate"), symbol=column != "estimate")


def _cells(fit: FittedModel, options: Options) -> dict[Key, dict[str, Cell]]:
    """The rows of a fit by what they are about."""
    found = _estimates(fit, options)
    if MODEL in options.sections:
        found |= _statistics(fit, options.rename)
    return {key: cells for key, cells in found.items() if key.section in options.sections}


def _estimates(fit: FittedModel, options: Options) -> dict[Key, dict[str, Cell]]:
    """Per row of `tidy` its cells by column."""
    table = tidy(fit, conf_int=True, conf_level=options.conf_level, df=options.df)
    found = {}
    labels = _labels(fit, options.rename)
    for row in table.to_dict("records"):
        fixed = row["effect"] == "fixed"
        section, group = FIXED if fixed else RANDOM, row["group"] or ""
        decimals = options.digits
        if decimals is None:
            decimals = numbers.decimals_for(row["std_error"])
        estimate = numbers.number(row["estimate"], decimals)
        if options.stars and estimate:
            star = stars_of(row["p_value"], dots=False) if fixed else ""
            estimate += star.ljust(3, numbers.FIGURE)
        limits = row["conf_low"], row["conf_high"]
        found[Key(section, group, labels[section, group, row["term"]])] = {
            "estimate": Cell(estimate, decimals),
            "std_error": Cell(numbers.number(row["std_error"], decimals), decimals),
            "conf_int": Cell(numbers.interval(*limits, decimals), decimals),
            "statistic": Cell(numbers.number(row["statistic"], 2), 2),
            "df": Cell(numbers.number(row["df"], 1), 1),
            "p_value": Cell(numbers.p_value(row["p_value"]), 3),
        }
    return found


def _labels(fit: FittedModel, rename: Mapping[str, str]) -> dict[tuple[str, str, str], str]:
    """What rows of `tidy` are called in a table."""

    def text(name: str) -> str:
        return rename.get(name, name)

    found = {(FIXED, "", name): text(name) for name in fit.fixed_names}
    for own in named_readings(fit):
        key = RANDOM, own.group, tidy_term(own)
        effects = map(text, own.effects)
        group, of = text(own.group), own.group != RESIDUAL
        if own.kind == "sigma":
            found[key] = f"{group} SD"
        elif own.kind == "cor":
            pair = ", ".join(effects)
            found[key] = f"{group}: correlation of {pair}" if of else f"{group} correlation, {pair}"
        elif own.kind == "sd":
            found[key] = f"{group}: SD of {text(own.term)}" if of else f"{group} SD, {own.term}"
        else:
            found[key] = f"{group}: {own.term}" if of else f"{group} {own.term}"
    return found


def _statistics(fit: FittedModel, rename: Mapping[str, str]) -> dict[Key, dict[str, Cell]]:
    """What is said of the whole fit, in the first column."""
    found = {Key(MODEL, "1", "Observations"): Cell(str(fit.nobs), 0)}
    for name, count in fit.ngroups.items():
        found[Key(MODEL, "2", f"Groups: {rename.get(name, name)}")] = Cell(str(count), 0)
    others = _explained(fit)
    others |= {"Log-likelihood": fit.llf, "AIC": fit.aic, "BIC": fit.bic}
    for name, value in others.items():
        found[Key(MODEL, "3", name)] = Cell(numbers.number(value, 2), 2)
    return {key: {"": cell} for key, cell in found.items()}


def _explained(fit: FittedModel) -> dict[str, float]:
    """ICC and R2, where the fit has an optimum and its rows."""
    if not (fit.converged and fit.has_rows):
        return {}
    groups = list(dict.fromkeys(group for group, _ in fit.groups))
    asked = ratios.r2(groups) | (ratios.icc(groups, None) if groups else {})
    try:
        values = shares(fit, asked)
    except DataError:  # a loaded fit whose formula uses functions, which are not saved
        return {}
    marginal = {"Marginal R\N{SUPERSCRIPT TWO}": values["marginal"]}
    if not groups:
        return marginal
    conditional = {"Conditional R\N{SUPERSCRIPT TWO}": values["conditional"]}
    return {"ICC": values["icc"]} | marginal | conditional


def _rows(parts: list[dict[Key, dict[str, Cell]]]) -> dict[Key, list[dict[str, Cell]]]:
    """Per row the cells of each model: groups in the order in which they first occur, the
    residual's last."""
    keys = list(dict.fromkeys(key for part in parts for key in part))
    groups = list(dict.fromkeys((key.section, key.group) for key in keys))
    sections = (FIXED, RANDOM, MODEL)

    def place(key: Key) -> tuple[int, bool, Any]:
        own = key.group if key.section == MODEL else groups.index((key.section, key.group))
        return sections.index(key.section), key.group == RESIDUAL, own

    return {key: [part.get(key, {}) for part in parts] for key in sorted(keys, key=place)}


def _sections(rows: dict[Key, list[dict[str, Cell]]], wanted: list[str]) -> tuple[Section, ...]:
    """The rows by section; columns are padded as wholes."""
    nothing = Cell("", 0)
    count = len(next(iter(rows.values()), []))
    texts = []
    for k in range(count):
        for place, name in enumerate(wanted):
            column = [own[k].get(name) or own[k].get("", nothing) if place == 0
                      else own[k].get(name, nothing) for own in rows.values()]  # fmt: skip
            cells, decimals = zip(*column, strict=True)
            texts.append(numbers.padded(cells, decimals))
    found: dict[str, list[list[str]]] = {}
    for key, *cells in zip(rows, *texts, strict=True):
        found.setdefault(key.section, []).append([key.label, *cells])
    return tuple(Section(title * (len(found) > 1), own) for title, own in found.items())


def _notes(models: list[FittedModel], names: list[str], options: Options) -> list[str]:
    """By what methods, and what to beware of."""
    notes = []
    of_each: list[Callable[[FittedModel], str]] = [_fitted_by, _left_out, _ended]
    for say in of_each:
        said = [say(fit) for fit in models]
        if len(set(said)) == 1:
            notes += [said[0]] if said[0] else []
        else:
            notes += [f"{name}: {text}" for name, text in zip(names, said, strict=True) if text]
    if {"statistic", "df", "p_value"} & set(options.columns) or options.stars:
        notes.append(tests_in_words(options.df))
    if "conf_int" in options.columns:
        notes.append(
            f"{100 * options.conf_level:g}% confidence intervals are Wald intervals"
            + ", of SDs from the log scale, of correlations from Fisher's z"
            * (RANDOM in options.sections)
        )
    if options.stars:
        notes.append("* p < .05, ** p < .01, *** p < .001")
    if len(models) == 1:
        notes[0] = f"{models[0].formula}, {notes[0][0].lower()}{notes[0][1:]}"
    return notes


def _fitted_by(fit: FittedModel) -> str:
    return "Fitted by REML" if fit.method == "REML" else "Fitted by maximum likelihood"


def _left_out(fit: FittedModel) -> str:
    return f"{fit.n_dropped} rows with missing values left out" if fit.n_dropped else ""


def _ended(fit: FittedModel) -> str:
    if not fit.converged:
        return f"NOT CONVERGED: {fit.message}"
    return f"Singular: {'; '.join(fit._boundary)}" if fit.is_singular else ""
