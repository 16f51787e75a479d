"""Results as text and as long frames, in the layouts of lmerTest and broom.mixed."""

from __future__ import annotations

import string
from functools import partial

import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.data.frame import split_extras
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.fixed import wald
from jaxreml.inference.parameters.variances import (
    estimates,
    named_readings,
    variance_parameters,
)
from jaxreml.model.covariance.timed import Timed
from jaxreml.results.tidy import chosen, intervals, statistics, tidy_term

ORDER = {"sd": 0, "sigma": 0, "cor": 1, "parameter": 2}  # of the rows of a term
MOST_SHOWN = 6  # correlations in a line of a summary
EFFECTS = ("fixed", "ran_pars", "ran_vals", "ran_coefs")
MOST_VISITS = 15  # shown, where a few parameters say all of them


def tidy(
    fit: FittedModel,
    effects: str | tuple[str, ...] = ("fixed", "ran_pars"),
    *,
    conf_int: bool = False,
    conf_level: float = 0.95,
    df: str = "satterthwaite",
) -> pd.DataFrame:
    """Estimates as a long frame, as broom.mixed's `tidy`.

    Args:
        fit: the fit.
        effects: any of "fixed", "ran_pars" (SDs ``sd__x``, correlations ``cor__x1.x2``, the
            residual SD ``sd__Observation``), "ran_vals" (conditional modes) and "ran_coefs"
            (coefficients per level: conditional mode plus fixed effect of the same name).
        conf_int: whether to add Wald intervals, ``conf_low`` and ``conf_high``: for fixed effects
            with the degrees of freedom of their tests, normal for conditional modes, from the log
            scale for SDs, from Fisher's z for correlations.
        conf_level: their level.
        df: degrees of freedom for fixed effects, as for `LMMResults.test`.

    Returns:
        Columns effect, group, level, term, estimate, std_error, statistic, df, p_value, those that
        apply to the effects asked for. Standard errors of SDs and correlations are the delta
        method's; those of conditional modes are `LMMResults.random_effects_se`.

        For a paper take `LMMResults.to_latex` or ``jaxreml.frame_table(fit.tidy()).to_latex()``:
        the frame's own ``to_latex``, pandas', leaves underscores as they are, which LaTeX refuses,
        and prints small p-values as 0.00.

    Raises:
        ValueError: another effect, or a level outside (0, 1).

    Examples:
        >>> fit.tidy()[["group", "term", "estimate"]].round(2)
              group                   term  estimate
        0      None            (Intercept)    251.41
        1      None                   Days     10.47
        2   Subject        sd__(Intercept)     24.74
        3   Subject               sd__Days      5.92
        4   Subject  cor__(Intercept).Days      0.07
        5  Residual        sd__Observation     25.59
        >>> fit.tidy("ran_vals")[["level", "term", "estimate"]].round(1).head(2)
          level         term  estimate
        0   308  (Intercept)       2.3
        1   308         Days       9.2
    """
    check_conf_level(conf_level)
    wanted = chosen(effects, EFFECTS)
    parts = {
        "fixed": partial(_tidy_fixed, df=df),
        "ran_pars": _tidy_ran_pars,
        "ran_vals": _tidy_modes,
        "ran_coefs": _tidy_coefficients,
    }
    if not fit.groupings:
        wanted = [effect for effect in wanted if effect not in ("ran_vals", "ran_coefs")]
    frames = [parts[effect](fit, conf_level) for effect in wanted]
    none = pd.DataFrame(columns=["effect", "group", "level", "term", "estimate", "std_error"])
    frame = pd.concat(frames, ignore_index=True) if frames else none
    order = ["effect", "group", "level", "term", "estimate", "std_error", "statistic", "df"]
    order += ["p_value"] + (["conf_low", "conf_high"] if conf_int else [])
    return frame.reindex(columns=[name for name in order if name in frame])


def _tidy_fixed(fit: FittedModel, conf_level: float, df: str) -> pd.DataFrame:
    table = wald.coefficients(fit, df).reset_index(names="term")
    table.insert(0, "effect", "fixed")
    table.insert(1, "group", None)
    columns = (table[name].to_numpy() for name in ("estimate", "std_error", "df"))
    return table.assign(**intervals(*columns, conf_level=conf_level))


def _tidy_ran_pars(fit: FittedModel, conf_level: float) -> pd.DataFrame:
    known = named_readings(fit)
    columns = ["estimate", "std_error", "lower", "upper"]
    if fit.converged:
        table = variance_parameters(fit, conf_level=conf_level)[columns]
    else:
        table = pd.DataFrame({"estimate": estimates(fit, known)}).reindex(columns=columns)
    blocks = [own.block if own.block >= 0 else len(known) for own in known]
    order = sorted(range(len(known)), key=lambda k: (blocks[k], ORDER[known[k].kind]))
    labels = [("ran_pars", known[k].group, tidy_term(known[k])) for k in order]
    table = table.iloc[order].rename(columns={"lower": "conf_low", "upper": "conf_high"})
    named = pd.DataFrame(labels, columns=["effect", "group", "term"])
    return pd.concat([named, table.reset_index(drop=True)], axis=1)


def _tidy_modes(fit: FittedModel, conf_level: float) -> pd.DataFrame:
    from scipy.special import ndtri

    frame = _by_level(fit.random_effects, "ran_vals")
    frame["std_error"] = _by_level(fit.random_effects_se, "ran_vals")["estimate"]
    half = ndtri((1 + conf_level) / 2) * frame["std_error"]
    return frame.assign(conf_low=frame["estimate"] - half, conf_high=frame["estimate"] + half)


def _tidy_coefficients(fit: FittedModel, _: float) -> pd.DataFrame:
    modes = fit.random_effects
    fixed = {name: fit.params.reindex(part.columns, fill_value=0.0) for name, part in modes.items()}
    return _by_level({name: part + fixed[name] for name, part in modes.items()}, "ran_coefs")


def _by_level(frames: dict[str, pd.DataFrame], effect: str) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "effect": effect,
                "group": name,
                "level": np.repeat(frame.index.to_numpy(), frame.shape[1]),
                "term": list(frame.columns) * len(frame),
                "estimate": frame.to_numpy().ravel(),
            }
        )
        for name, frame in frames.items()
    ]
    return pd.concat(parts, ignore_index=True)


def glance(fit: FittedModel) -> pd.DataFrame:
    """One row of fit statistics, as broom.mixed's `glance`, with how the fit ended.

    Examples:
        >>> fit.glance()[["nobs", "sigma", "log_lik", "aic"]].round(1)
           nobs  sigma  log_lik     aic
        0   180   25.6   -871.8  1755.6
    """
    return pd.DataFrame(statistics(fit, fit.method))


def augment(fit: FittedModel) -> pd.DataFrame:
    """The columns used with `fitted`, `resid`, `fixed` (fitted values without random effects), and
    `weights` and `offset` if there are any. A column of the data of that name gets a trailing
    underscore here.

    Examples:
        >>> fit.augment().round(1).head(2)
           Reaction  Days Subject  fitted  resid  fixed
        0     249.6   0.0     308   253.7   -4.1  251.4
        1     258.7   1.0     308   273.3  -14.6  261.9
    """
    added = {"fitted": fit.fitted, "resid": fit.y - fit.fitted, "fixed": fit.fixed_fitted}
    if fit.weights is not None:
        added["weights"] = fit.weights
    if fit.offset is not None:
        added["offset"] = fit.offset
    table, _ = split_extras(fit.table)
    return table.rename(columns={name: f"{name}_" for name in added}).assign(**added)


# Text


_METHODS = {
    "satterthwaite": "t-tests use Satterthwaite's method",
    "kenward-roger": "t-tests use Kenward-Roger's method",
    "kenward-roger-sas": "t-tests use Kenward-Roger's method (observed information)",
    "kenward-roger-linear": "t-tests use Kenward-Roger's method (observed information, linear)",
    "between-within": "t-tests use between-within degrees of freedom",
    "residual": "t-tests use the residual degrees of freedom",
    "inf": "Tests are normal",
}


def tests_in_words(df: str) -> str:
    """Of which degrees of freedom tests are, as a sentence for the note of a table."""
    return {
        "satterthwaite": "Tests use Satterthwaite's degrees of freedom",
        "between-within": "Tests use between-within degrees of freedom",
        "residual": "Tests use the residual degrees of freedom",
        "inf": "Tests are normal",
    }.get(df, "Tests use Kenward and Roger's degrees of freedom and standard errors")


def summary(
    fit: FittedModel,
    df: str = "satterthwaite",
    *,
    conf_level: float | None = None,
    show_stars: bool = True,
) -> str:
    """The fit as text, in the layout of lmerTest's summary.

    Args:
        fit: the fit.
        df: degrees of freedom of the fixed effects, as for `LMMResults.test`.
        conf_level: level of Wald intervals of the fixed effects; without them if left out.
        show_stars: whether p-values have stars.

    Raises:
        ValueError: another `df`, or a level outside (0, 1).

    Examples:
        >>> print(fit.summary(df="kenward-roger"))
        Linear mixed model fit by REML. t-tests use Kenward-Roger's method
        Formula: Reaction ~ Days + (Days | Subject)
        Structure: grouped (numpy)
        <BLANKLINE>
        REML criterion at convergence: 1743.6
        <BLANKLINE>
        Scaled residuals:
            Min      1Q Median     3Q    Max
        -3.9536 -0.4634 0.0231 0.4634 5.1793
        <BLANKLINE>
        Random effects:
         Groups   Name        Variance Std.Dev. Log-Var. Std.Error Corr
         Subject  (Intercept)   612.09   24.740    6.417    0.4718
                  Days           35.07    5.922    3.557    0.4215 0.07
        ...
    """
    if conf_level is not None:
        check_conf_level(conf_level)
    by = "REML" if fit.method == "REML" else "maximum likelihood"
    parts = [
        f"Linear mixed model fit by {by}. {_tests(fit, df)}\n"
        f"Formula: {fit.formula}\n"
        f"Structure: {fit.structure}" + (f" ({fit.engine})" if fit.engine else ""),
        _criterion(fit),
        *(["Scaled residuals:\n" + _scaled_residuals(fit)] if fit.has_rows else []),
        *(["Random effects:\n" + _random_effects(fit)] if fit.groupings else []),
        *([_residuals(fit)] if fit.residual else []),
        _counts(fit),
    ]
    if not fit.residual:  # as lme4 has it
        parts[-2:] = [parts[-2] + "\n" + parts[-1]]
    if fit.fixed_names:
        parts.append("Fixed effects:\n" + _fixed_effects(fit, df, conf_level, show_stars))
    if len(fit.fixed_names) > 1:
        parts.append("Correlation of Fixed Effects:\n" + _fixed_correlations(fit))
    notes = []
    if fit.aliased:
        notes.append(
            f"dropped {len(fit.aliased)} column(s) of X that depend on others: "
            f"{', '.join(fit.aliased)}"
        )
    notes += [f"residual={text!r} was tried and left: {why}" for text, why in fit.residual_tried]
    notes.append(fit.message if fit.converged else f"NOT CONVERGED: {fit.message}")
    return "\n\n".join(parts) + "\n\n" + "\n".join(notes) + "\n"


def _tests(fit: FittedModel, df: str) -> str:
    return f"t-tests use {fit.sandwich_note}" if fit.sandwich_note else _METHODS[df]


def _table(rows: list[list[str]], left: int) -> str:
    """Columns padded to their width, the first `left` of them to the left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)


def _digits(values: np.ndarray, significant: int = 4) -> list[str]:
    """Numbers of one column with the same decimals, `significant` digits for the smallest."""
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    if not finite.size:
        return [f"{value:.1f}" for value in values]
    smallest, largest = np.floor(np.log10([finite.min(), finite.max()]))
    if largest >= 6 or smallest < -5:
        return [f"{value:.{significant - 1}e}" for value in values]
    decimals = int(np.clip(significant - 1 - smallest, 0, 6 if largest < 2 else significant))
    return [f"{value:.{decimals}f}" for value in values]


def _criterion(fit: FittedModel) -> str:
    if fit.method == "REML":
        return f"REML criterion at convergence: {fit.criterion:.1f}"
    values = [fit.aic, fit.bic, fit.llf, fit.criterion, fit.df_resid]
    names = ["AIC", "BIC", "logLik", "deviance", "df.resid"]
    cells = [f"{value:.1f}" for value in values[:-1]] + [str(fit.df_resid)]
    return _table([names, cells], left=0)


def _scaled_residuals(fit: FittedModel) -> str:
    root = 1.0 if fit.weights is None else np.sqrt(fit.weights)
    scaled = (fit.y - fit.fitted) * root / fit.residual_sds
    cells = [f"{value:.4f}" for value in np.quantile(scaled, [0, 0.25, 0.5, 0.75, 1])]
    return _table([["Min", "1Q", "Median", "3Q", "Max"], cells], left=0)


def _random_effects(fit: FittedModel) -> str:
    components = fit.variance_components
    columns = [
        _digits(components[name].to_numpy())
        for name in ("variance", "sd", "log_variance", "log_variance_se")
    ]
    blocks = fit.covariance.blocks
    full = [block.any_basis for block in blocks]  # which show their correlations beside variances
    most = max((own.size for own, shows in zip(blocks, full, strict=True) if shows), default=1)
    rows = [
        [" Groups", "Name", "Variance", "Std.Dev.", "Log-Var.", "Std.Error"]
        + ["Corr"] * (most > 1)
        + [""] * (most - 2)
    ]
    k = 0
    for own, grouping in enumerate(fit.groupings):
        matrix = fit.cov_re_arrays[own]
        sd = np.sqrt(np.diagonal(matrix))
        for i, effect in enumerate(blocks[own].variance_labels(grouping.effects)):
            cells = [f" {grouping.name}" if i == 0 else "", effect]
            cells += [column[k] for column in columns]
            for j in range(most - 1):
                shown = full[own] and j < i and sd[i] * sd[j] > 0
                cells.append(f"{matrix[i, j] / (sd[i] * sd[j]):.2f}" if shown else "")
            rows.append(cells)
            k += 1
    if fit.residual is None:
        rows.append([" Residual", ""] + [column[k] for column in columns] + [""] * (most - 1))
    return "\n".join([_table(rows, left=2), *_structures(fit)])


def _structures(fit: FittedModel) -> list[str]:
    """A line for each term whose covariance has a word: what it means, and its correlations."""
    known = named_readings(fit)
    lines = []
    for k, grouping in enumerate(fit.groupings):
        if not grouping.covariance.text:
            continue
        own = [reading for reading in known if reading.block == k and reading.kind != "sd"]
        values = estimates(fit, own) if own else []
        shown = [
            f"{'corr ' if one.kind == 'cor' else ''}{one.reading.label} {value:.4g}"
            for one, value in zip(own[:MOST_SHOWN], values, strict=False)
        ]
        shown += ["..."] * (len(own) > MOST_SHOWN)
        what = f" {grouping.name}, {grouping.covariance.text}"
        lines.append(f"{what}; {', '.join(shown)}" if shown else what)
    return lines


def _residuals(fit: FittedModel) -> str:
    """Variances of the visits, and correlations of one subject's."""
    residual = fit.residual
    assert residual is not None
    names, of_visits = ["Variance", "Std.Dev."], range(len(residual.effects))
    if residual.words.own is None:
        components = fit.variance_components
        components = components.loc[(components["group"] == RESIDUAL).to_numpy()]
        values = [components[own] for own in ("variance", "sd", "log_variance", "log_variance_se")]
        names, of_visits = [*names, "Log-Var.", "Std.Error"], residual.block.variances
    else:  # variances are what the function makes of its parameters
        variances = np.diagonal(fit.residual_cov.to_numpy())
        values = [variances, np.sqrt(variances)]
    columns = [_digits(np.asarray(own)) for own in values]
    if isinstance(residual.block, Timed):
        lines = [_table([["", *names], [" Residual", *(own[0] for own in columns)]], left=1)]
        if fit.converged:
            found = variance_parameters(fit)
            value, error = _digits(found[["estimate", "std_error"]].to_numpy()[-1])
            name = residual.block.correlation.reading.label.capitalize()
            lines.append(f" {name} {value}, standard error {error}")
        return "\n".join([f" {residual.text}, {len(residual.visits):,} different times", *lines])
    correlation, q = fit.residual_corr.to_numpy(), len(residual.visits)
    shown = q - 1 if residual.block.correlation.correlated else 0
    header = [f" {residual.words.visit}", *names]
    rows = [header + ["Corr"] * (shown > 0) + [""] * max(shown - 1, 0)]
    for i, effect in enumerate(residual.effects):
        cells = [f" {effect}", *(column[of_visits[i]] for column in columns)]
        start = i - i % q  # of the visits of its arm
        own = [f"{correlation[i, start + j]:.2f}" if start + j < i else "" for j in range(shown)]
        rows.append(cells + own)
    parameters = _described(fit, RESIDUAL)
    if parameters and len(rows) > MOST_VISITS:  # they say all
        rows = [[f" {q} values of {residual.words.visit}: see residual_cov"]]
    of = "" if residual.words.subject is None else " of a subject"
    return f"Residuals{of}:\n {residual.text}\n" + parameters + _table(rows, left=1)


def _described(fit: FittedModel, group: str) -> str:
    """Parameters of a covariance that are no SDs or correlations, such as a range; "" for none."""
    known = [own for own in named_readings(fit) if own.group == group and own.kind == "parameter"]
    if not known or not fit.converged:
        return ""
    table = variance_parameters(fit).loc[[own.name for own in known]]
    columns = [_digits(table[name].to_numpy()) for name in ("estimate", "std_error")]
    rows = zip([f" {own.term}" for own in known], *columns, strict=True)
    return _table([[" Parameter", "Estimate", "Std.Error"], *map(list, rows)], left=1) + "\n\n"


def _counts(fit: FittedModel) -> str:
    groups = "; ".join(f"{name}, {levels}" for name, levels in fit.ngroups.items())
    text = f"Number of obs: {fit.nobs}" + (f", groups:  {groups}" if groups else "")
    if fit.kernels:
        known = [
            f"{own.name}, {len(own.levels)} levels"
            for own in fit.groupings
            if own.n_seen is not None
        ]
        text += f"\nKernels:  {'; '.join(known)}"
    if fit.penalty:
        text += f"\nPenalty:  {fit.penalty}; -2 log density {fit.penalty_value:.2f}"
    if fit.n_dropped:
        text += f"\n  ({fit.n_dropped} rows with missing values dropped)"
    return text


def _p_value(value: float) -> str:
    if not np.isfinite(value):
        return "NA"
    return "< 2e-16" if value < 2e-16 else f"{value:.3g}" if value >= 1e-4 else f"{value:.2e}"


def stars(value: float, *, dots: bool = True) -> str:
    """The stars of a p-value as R prints them, with or without a dot for those below 0.1."""
    for bound, marks in ((0.001, "***"), (0.01, "**"), (0.05, "*"), (0.1, "." * dots)):
        if value < bound:
            return marks
    return ""


def _fixed_effects(fit: FittedModel, df: str, conf_level: float | None, show_stars: bool) -> str:
    table = wald.coefficients(fit, df)
    p_values = table["p_value"].to_numpy()
    columns = [
        list(table.index),
        _digits(table["estimate"].to_numpy()),
        _digits(table["std_error"].to_numpy()),
        [f"{value:.2f}" for value in table["df"]],
        [f"{value:.3f}" for value in table["statistic"]],
        [_p_value(value) for value in p_values],
    ]
    header = ["", "Estimate", "Std. Error", "df", "t value", "Pr(>|t|)"]
    if conf_level is not None:
        limits = wald.conf_int(fit, conf_level, df).to_numpy().T
        columns[3:3] = map(_digits, limits)
        header[3:3] = [f"{50 * (1 + side * conf_level):g} %" for side in (-1, 1)]
    if show_stars:
        columns.append([stars(value).ljust(3) for value in p_values])
        header.append("")
    text = _table([header, *map(list, zip(*columns, strict=True))], left=1)
    if show_stars and np.any(p_values < 0.1):
        text += "\n---\nSignif. codes:  0 '***' 0.001 '**' 0.01 '*' 0.05 '.' 0.1 ' ' 1"
    return text


def _fixed_correlations(fit: FittedModel) -> str:
    names = list(fit.fixed_names)
    sd = fit.bse.to_numpy()
    matrix = fit.vcov_array / np.outer(sd, sd)
    short = abbreviated(names, 6)
    rows = [["", *short[:-1]]]
    for i in range(1, len(names)):
        cells = [f"{matrix[i, j]:.3f}" if j < i else "" for j in range(len(names) - 1)]
        rows.append([names[i], *cells])
    return _table(rows, left=1)


def abbreviated(names: list[str], length: int) -> list[str]:
    """Short names, as different as the names are; the rules of R's `abbreviate`.

    Lower case vowels go from the end, then other lower case letters, never the first of a word,
    until `length` characters are left or nothing more can go; names that come out alike keep more.
    """
    short = [_shortened(name, length) for name in names]
    for least in range(length + 1, max(map(len, names), default=0) + 1):
        alike = {text for text in short if short.count(text) > 1}
        if not alike:
            break
        pairs = zip(names, short, strict=True)
        short = [_shortened(name, least) if text in alike else text for name, text in pairs]
    return short


def _shortened(name: str, length: int) -> str:
    for droppable in ("aeiou", string.ascii_lowercase):
        for k in reversed(range(1, len(name))):
            if len(name) <= length:
                return name
            if name[k] in droppable and name[k - 1].isalnum():
                name = name[:k] + name[k + 1 :]
    return name
