"""Standard errors of what describes the residuals' covariance within subjects."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.fitting.fitted import FittedModel
from jaxreml.model.covariance.correlations import Distance
from jaxreml.model.covariance.natural import places
from jaxreml.model.covariance.timed import Timed


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
    assert fit.residual is not None
    if isinstance(fit.residual.block, Timed):
        return _at_own_times(fit, conf_level)
    correlation = fit.residual_corr.to_numpy()
    residual = fit.residual
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


def _at_own_times(fit: FittedModel, conf_level: float) -> pd.DataFrame:
    """`residual_parameters` where subjects are at times of their own: the SD, and the range of
    `Distance` or the correlation of neighbours one apart."""
    assert fit.residual is not None
    quantile = float(ndtri((1 + conf_level) / 2))
    z, log = fit.parameters[-2:]
    of_z, of_log = np.sqrt(np.diagonal(np.asarray(fit.parameters_vcov_array))[-2:])
    ends = np.array([0.0, -quantile, quantile])
    sds = np.exp((log + ends * of_log) / 2)
    if isinstance(fit.residual.block.correlation, Distance):
        name, values = "range|Residual", np.exp(z + ends * of_z)
        error = values[0] * of_z
    else:
        name, values = "cor_neighbours|Residual", np.tanh(z + ends * of_z)
        error = (1 - values[0] ** 2) * of_z
    rows = [[sds[0], sds[0] * of_log / 2, *sds[1:]], [values[0], error, *values[1:]]]
    found = pd.DataFrame(
        rows, pd.Index(["sigma", name]), columns=["estimate", "std_error", "lower", "upper"]
    )
    flat = ~np.isfinite(found["std_error"])
    return found.assign(note=np.where(flat, "the criterion is flat there", ""))
