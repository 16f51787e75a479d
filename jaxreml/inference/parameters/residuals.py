"""Standard errors of what describes the residuals' covariance within subjects."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.fitting.fitted import FittedModel
from jaxreml.model.covariance.natural import places


def residual_parameters(fit: FittedModel, conf_level: float = 0.95) -> pd.DataFrame:
    """SDs of the visits, or the one that they share, and the correlations that the family is
    described by: all pairs for "us" and "cs" (one of them), neighbours for "ad", distances from the
    first visit for "toep", neighbours' one for "ar1" and for spatial ones.

    Standard errors are by the delta method; intervals from the log scale for SDs, from Fisher's z
    for correlations.

    Returns:
        Rows estimate, std_error, lower, upper and note as `LMMResults.variance_parameters` has
        them.

    Raises:
        DataError: residuals are independent, or the fit has no optimum.
    """
    check_conf_level(conf_level)
    fit.require_optimum("give standard errors")
    correlation = fit.residual_corr.to_numpy()
    residual = fit.residual
    assert residual is not None
    block, effects = residual.block, residual.effects
    count, quantile = len(block.parameter_names("", effects)), ndtri((1 + conf_level) / 2)
    own = np.arange(len(fit.parameters) - count - 1, len(fit.parameters) - 1)
    logs = np.append(len(fit.parameters) - 1, own[: block.log_variances])
    vcov = np.asarray(fit.parameters_vcov_array)

    sd = np.exp(fit.parameters[logs] / 2)
    spread = np.sqrt(np.diagonal(vcov)[logs]) / 2
    labels = block.variance_labels(effects)
    names = [f"sd_{label}|Residual" for label in labels] if len(labels) > 1 else ["sigma"]
    rows = [(sd, sd * spread, sd * np.exp(-quantile * spread), sd * np.exp(quantile * spread))]

    pairs = block.correlation.described
    if pairs:
        z = own[block.log_variances :]
        slopes, _ = block.correlation.derivatives(fit.parameters[z])
        entries = places(len(effects))[tuple(np.transpose(pairs))]
        chosen = slopes[entries]
        value = np.array([correlation[i, j] for i, j in pairs])
        error = np.sqrt(np.einsum("kc,cd,kd->k", chosen, vcov[np.ix_(z, z)], chosen))
        with np.errstate(divide="ignore", invalid="ignore"):
            half = quantile * error / (1 - value**2)
        middle = np.arctanh(value)
        rows.append((value, error, np.tanh(middle - half), np.tanh(middle + half)))
        names += [f"cor_{effects[i]}.{effects[j]}|Residual" for i, j in pairs]
    columns = ("estimate", "std_error", "lower", "upper")
    table = {name: np.concatenate(parts) for name, *parts in zip(columns, *rows, strict=True)}
    note = np.where(np.isfinite(table["std_error"]), "", "the criterion is flat there")
    return pd.DataFrame({**table, "note": note}, index=pd.Index(names))
