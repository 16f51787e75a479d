"""The tables of a fit in LaTeX, HTML and Markdown, and what notebooks show of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.data.tables import nearest
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.fixed.anova import anova
from jaxreml.inference.fixed.wald import coefficients, conf_int
from jaxreml.results.model_tables import model_table
from jaxreml.results.tables import tests_in_words, tidy
from jaxreml.typeset import numbers
from jaxreml.typeset.frames import frame_table
from jaxreml.typeset.table import Table


def _of_coefficients(fit: FittedModel, **options: Any) -> Table:
    return model_table(fit, parts="fixed", **options)


def _of_random_effects(
    fit: FittedModel,
    conf_level: float = 0.95,
    digits: int | None = None,
    rename: Mapping[str, str] | None = None,
    **texts: str,
) -> Table:
    """Variances, SDs with intervals and correlations, as lme4 lays them out; a list of SDs and
    correlations where residuals have a covariance."""
    if fit.residual is not None or not all(own.any_basis for own in fit.covariance.blocks):
        shown = ("estimate", "std_error", "conf_int")
        given = {"conf_level": conf_level, "digits": digits, "rename": rename or {}}
        return model_table(fit, parts="random", columns=shown, **given, **texts)  # pyright: ignore
    check_conf_level(conf_level)
    estimates = tidy(fit, "ran_pars", conf_int=True, conf_level=conf_level)
    sds = estimates.loc[estimates["term"].str.startswith("sd__").to_numpy()]
    components = fit.variance_components
    frame = pd.DataFrame(
        {
            "group": components["group"],
            "effect": components["term"].where(components["group"] != RESIDUAL, ""),
            "variance": components["variance"],
            "sd": components["sd"],
            "lower": sds["conf_low"].to_numpy(),
            "upper": sds["conf_high"].to_numpy(),
        }
    )
    most = max(len(effects) for _, effects in fit.groups)
    matrix = np.full((len(frame), most - 1), np.nan)
    pairs = iter(fit.correlations["correlation"])
    start = 0
    for _, effects in fit.groups:
        for second in range(len(effects)):
            for first in range(second + 1, len(effects)):
                matrix[start + first, second] = next(pairs)
        start += len(effects)
    for k in range(most - 1):
        frame["correlation" if most == 2 else f"Correlation {k + 1}"] = matrix[:, k]
    table = frame_table(
        frame,
        digits=digits,
        conf_level=conf_level,
        rename=rename,
        **texts,  # pyright: ignore
    )
    columns = tuple(own._replace(header="CI of SD" if own.header.endswith("CI") else own.header)
                    for own in table.columns)  # fmt: skip
    notes = (f"{100 * conf_level:g}% confidence intervals from the log scale", *table.notes)
    return Table(columns, table.sections, (), table.caption, table.label, notes)


def _of_anova(
    fit: FittedModel, kind: str | int = "III", df: str = "satterthwaite", **options: Any
) -> Table:
    table = frame_table(anova(fit, kind, df), **options)
    return table.described(note=f"Type {kind} tests. {tests_in_words(df)}")


TABLES: dict[str, Callable[..., Table]] = {
    "model": model_table,
    "coefficients": _of_coefficients,
    "random_effects": _of_random_effects,
    "anova": _of_anova,
}


def as_table(fit: FittedModel, table: str = "model", **options: Any) -> Table:
    """One of the tables of a fit; arguments as for `to_latex`."""
    if table not in TABLES:
        known = ", ".join(f'"{name}"' for name in TABLES)
        raise ValueError(f"table must be one of {known}, not {table!r}")
    return TABLES[table](fit, **options)


def to_latex(
    fit: FittedModel,
    table: str = "model",
    *,
    caption: str = "",
    label: str = "",
    note: str = "",
    digits: int | None = None,
    **options: Any,
) -> str:
    r"""A table of the fit in LaTeX, for the package booktabs (``\usepackage{booktabs}``).

    Args:
        fit: the fit.
        table: "model", a journal's regression table: fixed effects, random effects, and what is
            said of the whole fit; "coefficients", the fixed effects alone; "random_effects",
            variances, SDs with intervals and correlations; "anova", F tests of the terms.
        caption: above the table.
        label: LaTeX's name of the table, such as "tab:sleep", for ``\ref``.
        note: a sentence to add to the note below the table.
        digits: decimals of estimates; as many as their errors deserve, at least two, if left out.
        options: for "model" and "coefficients" columns, df, conf_level, stars and rename, as for
            `jaxreml.model_table`; for "random_effects" conf_level and rename; for "anova" kind, df
            and rename.

    Examples:
        >>> latex = fit.to_latex("coefficients", columns=["estimate", "std_error", "p_value"])
        >>> print(latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip())
        (Intercept) & 251.41 & 6.82 & $<$ .001 \\
        Days & 10.47 & 1.55 & $<$ .001 \\
    """
    texts = {"caption": caption, "label": label, "note": note}
    return as_table(fit, table, digits=digits, **texts, **options).to_latex()


def to_html(fit: FittedModel, table: str = "model", **options: Any) -> str:
    """A table of the fit as an HTML element; arguments as for `to_latex`.

    Examples:
        >>> fit.to_html("random_effects", caption="Variances").count("<tr>")
        2
    """
    return as_table(fit, table, **options).to_html()


def to_markdown(fit: FittedModel, table: str = "model", **options: Any) -> str:
    """A table of the fit as a pipe table of Markdown; arguments as for `to_latex`.

    Examples:
        >>> print(fit.to_markdown("anova"))
        |      |  Sum sq. | Mean sq. | *df1* | *df2* |   *F* |    *p* |
        | ---- | -------: | -------: | ----: | ----: | ----: | -----: |
        | Days | 30031.01 | 30031.01 |     1 |    17 | 45.85 | < .001 |
        <BLANKLINE>
        *Note.* Type III tests. Tests use Satterthwaite's degrees of freedom.
    """
    return as_table(fit, table, **options).to_markdown()


def repr_html(fit: FittedModel) -> str:
    """The model table, as notebooks show a fit."""
    return as_table(fit, caption=f"Linear mixed model of {fit.formula.split('~')[0].strip()}") \
        .to_html()  # fmt: skip


def report(
    fit: FittedModel, term: str, *, df: str = "satterthwaite", conf_level: float | None = 0.95
) -> str:
    """A fixed effect in the words of a paper, as the American Psychological Association asks.

    Args:
        fit: the fit.
        term: name of the fixed effect.
        df: degrees of freedom, as for `LMMResults.test`.
        conf_level: level of the interval; without it if None.

    Raises:
        DataError: there is no such fixed effect.
        ValueError: another `df`, or a level outside (0, 1).

    Examples:
        >>> fit.report("Days")
        'b = 10.47, SE = 1.55, 95% CI [7.21, 13.73], t(17.0) = 6.77, p < .001'
    """
    if term not in fit.fixed_names:
        hint = nearest(term, list(fit.fixed_names)).replace("The columns", "They")
        raise DataError(f"there is no fixed effect {term!r}{hint}")
    row = coefficients(fit, df).loc[term]
    decimals = numbers.decimals_for(row["std_error"])
    parts = [f"{name} = {numbers.number(row[column], decimals)}"
             for name, column in (("b", "estimate"), ("SE", "std_error"))]  # fmt: skip
    if conf_level is not None:
        limits = conf_int(fit, conf_level, df).loc[term]
        text = numbers.interval(limits["lower"], limits["upper"], decimals)
        parts.append(f"{100 * conf_level:g}% CI {text}")
    test = "z" if df == "inf" else f"t({numbers.number(row['df'], 1)})"
    p = numbers.p_value(row["p_value"])
    parts += [f"{test} = {numbers.number(row['statistic'], 2)}"]
    parts += [f"p {p if p.startswith(('<', '>')) else f'= {p}'}"]
    return ", ".join(parts)
