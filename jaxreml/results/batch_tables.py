"""Results of many fits as frames: long as `tables`, wide with a row per response, and xarray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxreml.arguments import check_conf_level
from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL, fisher_columns, theta_labels
from jaxreml.many.contributions import covariance_labels
from jaxreml.many.fitted import BatchModel, FittedBatch
from jaxreml.many.numbers import Fits
from jaxreml.results.tidy import Labels, Part, chosen, intervals, ran_pars, statistics

EFFECTS = ("fixed", "ran_pars", "contrasts")


# Long


def tidy(
    results: FittedBatch,
    effects: str | tuple[str, ...] = EFFECTS[:2],
    *,
    conf_int: bool = False,
    conf_level: float = 0.95,
) -> pd.DataFrame:
    """Estimates as a long frame, one row per response and term.

    For each response the rows of `LMMResults.tidy`, by the same conventions. Coefficients and
    contrasts that its rows say nothing about have rows of NaN, as all terms of responses without
    an optimum have.

    Args:
        results: B responses.
        effects: any of "fixed" and "ran_pars" (SDs ``sd__x``, correlations ``cor__x1.x2``, the
            residual SD ``sd__Observation``) and "contrasts", those that `fit_many` was asked for.
        conf_int: whether to add Wald intervals, ``conf_low`` and ``conf_high``: for fixed effects
            and contrasts with the degrees of freedom of their tests, from the log scale for SDs,
            from Fisher's z for correlations.
        conf_level: their level.

    Returns:
        Columns response, effect, group, term, estimate, std_error and, for fixed effects and
        contrasts, statistic, df, p_value and p_adjusted (Benjamini and Hochberg's, over the
        responses, term by term); B times the number of terms rows. Correlations have standard
        errors where one of the two is the first effect of its term; the others depend on several
        coordinates, whose covariances a batch does not keep.

    Raises:
        ValueError: other `effects`, or a level that is not between 0 and 1.

    Examples:
        >>> results.tidy()[["response", "group", "term", "estimate"]].round(2).head(4)
          response     group             term  estimate
        0    gene1       NaN      (Intercept)      0.48
        1    gene1       NaN             Days      0.18
        2    gene1   Subject  sd__(Intercept)      1.23
        3    gene1  Residual  sd__Observation      1.11
    """
    wanted = chosen(effects, EFFECTS)
    check_conf_level(conf_level)
    parts = {"fixed": _tidy_fixed, "ran_pars": _tidy_ran_pars, "contrasts": _tidy_contrasts}
    labels, values = zip(*(parts[effect](results, conf_level) for effect in wanted), strict=True)
    rows = [row for part in labels for row in part]
    columns: dict[str, Any] = {"response": results.responses.repeat(len(rows))}
    for k, name in enumerate(("effect", "group", "term")):
        columns[name] = np.tile(np.array([row[k] for row in rows], object), len(results))
    names = ["estimate", "std_error"]
    names += ["statistic", "df", "p_value", "p_adjusted"] * (wanted != ("ran_pars",))
    names += ["conf_low", "conf_high"] * conf_int
    for name in names:
        matrices = [
            part.get(name, np.full((len(results), len(own)), np.nan))
            for own, part in zip(labels, values, strict=True)
        ]
        columns[name] = np.concatenate(matrices, axis=1).ravel()
    return pd.DataFrame(columns)


def _tidy_fixed(results: FittedBatch, conf_level: float) -> Part:
    fits = results.fits
    labels: Labels = [("fixed", None, name) for name in results.model.fixed_names]
    return labels, {
        "statistic": results.tvalues.to_numpy(),
        "p_value": results.pvalues.to_numpy(),
        "p_adjusted": results.pvalues_adjusted.to_numpy(),
        **intervals(fits.beta, fits.se, fits.df, conf_level),
    }


def _tidy_contrasts(results: FittedBatch, conf_level: float) -> Part:
    fits = results.fits
    table = results.contrasts.swaplevel(axis=1)
    names = ("statistic", "p_value", "p_adjusted")
    labels: Labels = [("contrast", None, name) for name in results.model.contrasts]
    return labels, {
        **{name: table[name].to_numpy() for name in names},
        **intervals(fits.contrast, fits.contrast_se, table["df"].to_numpy(), conf_level),
    }


def _tidy_ran_pars(results: FittedBatch, conf_level: float) -> Part:
    from scipy.special import ndtri

    quantile = ndtri((1 + conf_level) / 2)
    z, z_se = _fisher(results)
    limits = np.tanh(z - quantile * z_se), np.tanh(z + quantile * z_se)
    return ran_pars(
        results.model.groups,
        np.sqrt(results.variances.to_numpy()),
        results.log_variance_se.to_numpy(),
        (results.correlations.to_numpy(), z_se / np.cosh(z) ** 2, *limits),
        quantile,
    )


def _fisher(results: FittedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's z of each correlation with its standard error; NaN where it is no coordinate."""
    fits, sizes = results.fits, results.model.sizes
    z_se = fisher_columns(fits.parameters_se, sizes)
    return np.where(np.isfinite(z_se), fisher_columns(fits.parameters, sizes), np.nan), z_se


def glance(results: FittedBatch) -> pd.DataFrame:
    """One row of fit statistics per response, as `LMMResults.glance`, and how it ended.

    Columns response, nobs, sigma, log_lik, aic, bic, reml_crit or deviance, df_residual,
    converged, is_singular, n_dropped (rows of the data and of the response), n_missing (those of
    the response), status, message.

    Examples:
        >>> results.glance()[["response", "nobs", "sigma", "log_lik"]].round(2).head(2)
          response  nobs  sigma  log_lik
        0    gene1   180   1.11  -299.06
        1    gene2   180   0.90  -264.03
    """
    return pd.DataFrame(
        {
            "response": results.responses,
            **statistics(results, results.model.method),
            "n_missing": results.fits.n_missing,
            "status": results.fits.status,
            "message": _messages(results),
        }
    )


def _messages(results: FittedBatch) -> pd.Categorical:
    codes = pd.Categorical.from_codes(*results.message_codes)  # pyright: ignore
    return codes.remove_unused_categories()


# Wide


def field_columns(model: BatchModel) -> dict[str, str | list[str]]:
    """Columns of `to_frame` that hold each field of `Fits`: a name, or one per entry."""

    labels = dict.fromkeys(("beta", "se", "df"), model.fixed_names)
    labels |= dict.fromkeys(("contrast", "contrast_se", "contrast_df"), model.contrasts)
    several = {field: [f"{field}[{name}]" for name in names] for field, names in labels.items()}
    several |= {
        "theta": [f"theta[{', '.join(label)}]" for label in theta_labels(model.labels)],
        "parameters": list(model.parameter_names),
        "parameters_se": [name.replace("[", "_se[", 1) for name in model.parameter_names],
    }
    several["contributions"] = [
        *(f"random_variance[{name}]" for name in model.grouping_factors),
        *(f"fixed_variance[{name}]" for name in model.fixed_terms),
        "fixed_variance",
    ]
    covariances = covariance_labels(model.grouping_factors)
    several["contributions_cov"] = [f"variance_cov[{label}]" for label in covariances]
    return {field: several.get(field, field) for field in Fits._fields if field != "modes"}


def p_value_columns(model: BatchModel) -> list[tuple[list[str], list[str]]]:
    """Columns of p-values, and after them those of the same adjusted over the responses: of fixed
    effects and of contrasts."""
    return [
        ([f"{p}[{name}]" for name in names], [f"{p}_adjusted[{name}]" for name in names])
        for p, names in (("p", model.fixed_names), ("contrast_p", model.contrasts))
    ]


def to_frame(results: FittedBatch, *, adjusted: bool = True) -> pd.DataFrame:
    """Everything but the modes as a wide frame, one row per response.

    Columns: response, nobs, n_missing, rank (fixed effects fitted), mean; per fixed effect
    ``beta[x]``, ``se[x]``, ``t[x]``, ``df[x]``, ``p[x]`` and, unless `adjusted` is false,
    ``p_adjusted[x]`` (Benjamini and Hochberg's, over the responses); per contrast ``contrast[c]``
    and likewise ``contrast_se[c]``, ``contrast_t[c]``, ``contrast_df[c]``, ``contrast_p[c]``,
    ``contrast_p_adjusted[c]``; sigma; residual_df; ``variance[g, x]`` with ``variance[Residual]``;
    ``correlation[g, x1, x2]``; what parts add to the variance of a row, ``random_variance[g]``,
    ``fixed_variance[term]`` and, all fixed effects together, ``fixed_variance``, with covariances
    ``variance_cov[g1, g2]`` between factors and the residual, and ``variance_cov[Fixed effects]``;
    the variance parameters ``log_variance[g, x]`` and ``z[g, x1, x2]``, as
    `Design.parameter_names`, with standard errors ``log_variance_se[g, x]`` and
    ``z_se[g, x1, x2]``; ``theta[g, x]`` and ``theta[g, x1, x2]``, lme4's relative Cholesky factor;
    criterion, gradient_norm, n_iter, is_singular, converged, status, message.

    Raises:
        DataError: names of columns of the data with commas give two columns one name.

    Examples:
        >>> results.to_frame()[["response", "beta[Days]", "se[Days]", "p[Days]"]].round(3).head(2)
          response  beta[Days]  se[Days]  p[Days]
        0    gene1       0.181     0.029      0.0
        1    gene2       0.200     0.023      0.0
    """
    model, fits = results.model, results.fits
    columns = field_columns(model)
    frame: dict[str, Any] = {"response": results.responses}

    def add(names: str | list[str], values: np.ndarray) -> None:
        pairs = [(names, values)] if isinstance(names, str) else zip(names, values.T, strict=True)
        for name, column in pairs:
            if name in frame:
                raise DataError(f"two columns would be {name!r}: rename a column of the data")
            frame[name] = column

    def add_field(*fields: str) -> None:
        for field in fields:
            add(columns[field], getattr(fits, field))

    add_field("nobs", "n_missing", "rank", "mean", "beta", "se")
    add([f"t[{name}]" for name in model.fixed_names], results.tvalues.to_numpy())
    add_field("df")
    (p, p_adjusted), (contrast_p, contrast_p_adjusted) = p_value_columns(model)
    add(p, results.pvalues.to_numpy())
    if adjusted:
        add(p_adjusted, results.pvalues_adjusted.to_numpy())
    add_field("contrast", "contrast_se")
    if model.contrasts:
        tests = results.contrasts.swaplevel(axis=1)
        add([f"contrast_t[{name}]" for name in model.contrasts], tests["statistic"].to_numpy())
        add_field("contrast_df")
        add(contrast_p, tests["p_value"].to_numpy())
        if adjusted:
            add(contrast_p_adjusted, tests["p_adjusted"].to_numpy())
    add_field("sigma", "residual_df")
    add([f"variance[{label}]" for label in _variance_labels(model)], results.variances.to_numpy())
    correlations = [f"correlation[{pair}]" for pair in _pairs(model)]
    add(correlations, results.correlations.to_numpy())
    add_field("contributions", "contributions_cov", "parameters", "parameters_se", "theta")
    add_field("criterion", "gradient_norm", "n_iter", "is_singular")
    frame["converged"] = results.converged.to_numpy()
    add_field("status")
    frame["message"] = _messages(results)
    return pd.DataFrame(frame)


def _variance_labels(model: BatchModel) -> list[str]:
    own = model.variance_labels
    if own[-1] == (RESIDUAL, RESIDUAL):
        return [", ".join(label) for label in own[:-1]] + [RESIDUAL]
    return [", ".join(label) for label in own]


def _pairs(model: BatchModel) -> list[str]:
    return [", ".join(label) for label in model.correlation_labels]


# xarray


def to_xarray(results: FittedBatch) -> Any:
    """Everything as an xarray Dataset.

    Dimensions: ``response``; ``term``, the fixed effects; ``component``, the variances, labelled
    ``g, x`` (``Residual`` last), with coordinates ``component_group`` and ``component_term``;
    ``part``, what adds to the variance of a row, labelled as `BatchModel.parts`;
    ``pair``, the correlations, labelled ``g, x1, x2``; ``factor``, the entries of theta;
    ``contrast`` where there are any.
    Conditional modes, where kept, are ``modes_g`` per grouping factor g, with dimensions
    ``response``, ``level_g`` and ``effect_g``.

    Raises:
        DataError: xarray is not installed.

    Examples:
        >>> table = results.to_xarray()
        >>> list(table.sizes)
        ['response', 'term', 'component', 'pair', 'factor', 'part', 'level_Subject', ...
        >>> table["beta"].sel(response="gene1", term="Days").round(2).item()
        0.18
    """
    try:
        import xarray
    except ImportError:
        raise DataError("to_xarray needs xarray: pip install 'jaxreml[xarray]'") from None
    from jaxreml import __version__

    model = results.model
    variables = _variables(results)
    coordinates: dict[str, Any] = {
        "response": results.responses.to_numpy(),
        "term": list(model.fixed_names),
        "component": _variance_labels(model),
        "component_group": ("component", [group for group, _ in model.variance_labels]),
        "component_term": ("component", [term for _, term in model.variance_labels]),
        "pair": np.array(_pairs(model), str),  # text too where there are none
        "factor": [", ".join(label) for label in theta_labels(model.labels)],
        "part": model.parts,
    }
    if model.contrasts:
        coordinates["contrast"] = list(model.contrasts)
    for group, levels, effects, modes in _modes(results):
        dimensions = ("response", f"level_{group}", f"effect_{group}")
        variables[f"modes_{group}"] = (dimensions, modes)
        coordinates[f"level_{group}"] = list(levels)
        coordinates[f"effect_{group}"] = effects
    attributes = {"formula": model.formula, "method": model.method, "structure": model.structure}
    attributes["jaxreml"] = __version__
    return xarray.Dataset(variables, coordinates, attributes)


def _variables(results: FittedBatch) -> dict[str, Any]:
    """Dimensions and values of everything but the modes."""
    model, fits = results.model, results.fits
    # z has an order of its own.
    z = [model.parameter_names.index(f"z[{pair}]") for pair in _pairs(model)]
    by_dimensions = {
        ("response", "term"): {
            "beta": fits.beta,
            "se": fits.se,
            "t": results.tvalues.to_numpy(),
            "df": fits.df,
            "p": results.pvalues.to_numpy(),
        },
        ("response", "component"): {
            "variance": results.variances.to_numpy(),
            "log_variance": results.log_variances.to_numpy(),
            "log_variance_se": results.log_variance_se.to_numpy(),
        },
        ("response", "pair"): {
            "correlation": results.correlations.to_numpy(),
            "z": fits.parameters[:, z],
            "z_se": fits.parameters_se[:, z],
        },
        ("response", "factor"): {"theta": fits.theta},
        ("response", "part"): {"contribution": fits.contributions},
        ("response",): {
            "sigma": fits.sigma,
            "residual_df": fits.residual_df,
            "mean": fits.mean,
            "criterion": fits.criterion,
            "gradient_norm": fits.gradient_norm,
            "n_iter": fits.n_iter,
            "nobs": fits.nobs,
            "n_missing": fits.n_missing,
            "rank": fits.rank,
            "is_singular": fits.is_singular,
            "converged": results.converged.to_numpy(),
            "status": fits.status,
        },
    }
    if model.contrasts:
        by_dimensions["response", "contrast"] = {
            "contrast_estimate": fits.contrast,
            "contrast_se": fits.contrast_se,
            "contrast_df": fits.contrast_df,
        }
    return {
        name: (dimensions, values)
        for dimensions, named in by_dimensions.items()
        for name, values in named.items()
    }


def _modes(results: FittedBatch) -> list[tuple[str, tuple[Any, ...], list[str], np.ndarray]]:
    """Per grouping factor its levels, effects and modes (b, levels, effects), if kept."""
    model, modes = results.model, results.fits.modes
    if modes is None:
        return []
    names = [group for group, _ in model.groups]
    found = []
    for group in dict.fromkeys(names):
        terms = [k for k, name in enumerate(names) if name == group]
        effects = [effect for k in terms for effect in model.groups[k][1]]
        joined = np.concatenate([modes[k] for k in terms], axis=2)
        found.append((group, model.levels[terms[0]], effects, joined))
    return found
