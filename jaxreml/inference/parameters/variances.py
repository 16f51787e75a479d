"""The variance parameters that people read: SDs, correlations and what else describes a covariance.

Which these are is said by each block (`Block.readings`); everything here is the same for all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.backend.runtime import neutral
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.parameters.delta import FLAT, given, interior, on_boundary, propagate
from jaxreml.inference.parameters.linearised import Linearised, scale_of, wald
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.base import Reading
from jaxreml.model.covariance.joint import Covariance

if TYPE_CHECKING:
    from jaxreml.fitting.fitted import FittedModel

SCALES = ("log", "variance", "sd")
PREFIXES = {"sd": "sd_", "cor": "cor_", "parameter": ""}
OF_VARIANCES = {"sd": "var_", "cor": "cov_", "parameter": ""}


class Named(NamedTuple):
    """A number that people read of a fit.

    Attributes:
        name: as lme4 writes it, such as ``sd_x|g``, ``cor_x.(Intercept)|g`` and ``sigma``.
        group, term: its grouping factor, or "Residual", and what it is of.
        kind: "sd", "cor", "parameter" or "sigma".
        block: the place of its block in the covariance; -1 of the SD of independent residuals.
        reading: what it is to the block.
        effects: names of the effect or effects that it is of, in their order.
    """

    name: str
    group: str
    term: str
    kind: str
    block: int
    reading: Reading
    effects: tuple[str, ...] = ()


def named_readings(fit: FittedModel, scale: str = "sd") -> list[Named]:
    """What describes the covariances of a fit, block by block, the residuals' last."""
    prefixes = PREFIXES if scale == "sd" else OF_VARIANCES
    sigma = "sigma" if scale == "sd" else "sigma2"
    found = []
    for k, (block, (group, effects)) in enumerate(
        zip(fit.covariance.blocks, fit.labels, strict=True)
    ):
        for own in block.readings(effects):
            kind = ("parameter", "sd", "cor")[len(own.effects)]
            if block.residual and not own.label:
                found.append(Named(sigma, group, group, "sigma", k, own))
                continue
            name = f"{prefixes[kind]}{own.label}|{group}"
            name = name if own.label else f"{prefixes[kind].removesuffix('_')}|{group}"
            named = tuple(effects[place] for place in reversed(own.effects))
            found.append(Named(name, group, own.label or group, kind, k, own, named))
    if fit.residual is None:
        found.append(Named(sigma, RESIDUAL, RESIDUAL, "sigma", -1, Reading("", ())))
    return found


def variance_parameters(
    fit: FittedModel, scale: str = "sd", conf_level: float = 0.95
) -> pd.DataFrame:
    """All variance parameters with standard errors and Wald intervals.

    Args:
        fit: the fit.
        scale: what they are of.
            "sd" for SDs (intervals from the log scale) and correlations (from Fisher's z);
            "variance" for variances (from the log scale) and covariances; "log" for the
            coordinates of the objectives, `LMMResults.parameters`.
        conf_level: of the intervals.

    Returns:
        As `delta`; rows in the order and by the names of lme4's ``confint(fit, oldNames=FALSE)``,
        such as ``sd_x|g``, ``cor_x.(Intercept)|g`` and ``sigma``; by `parameter_names` for "log".
        Of a covariance with fewer parameters than it has entries, those that say all: one SD if
        all are equal, the correlation of two neighbours for "ar1", of the first with each
        other for "toep", and the range of "sp_exp" and "sp_gau".

    Raises:
        DataError: a fit without an optimum.
        ValueError: another scale.

    Examples:
        >>> fit.variance_parameters()[["estimate", "std_error", "lower", "upper"]].round(2)
                                      estimate  std_error  lower  upper
        sd_(Intercept)|Subject           24.74       5.84  15.58  39.28
        cor_Days.(Intercept)|Subject      0.07       0.33  -0.52   0.61
        sd_Days|Subject                   5.92       1.25   3.92   8.95
        sigma                            25.59       1.51  22.80  28.72
    """
    linear, names, transforms = _parameters(fit, scale)
    return wald(linear, names, conf_level, transforms)


def parameters_vcov(fit: FittedModel, scale: str = "log") -> pd.DataFrame:
    """Asymptotic covariance matrix of the variance parameters; see `variance_parameters`.

    Rows and columns of parameters on the boundary are NaN, the others given them.

    Examples:
        >>> fit.parameters_vcov("sd").round(1)
                                      sd_(Intercept)|Subject  ...  sigma
        sd_(Intercept)|Subject                          34.1  ...   -0.8
        cor_Days.(Intercept)|Subject                    -0.5  ...    0.0
        sd_Days|Subject                                  0.2  ...   -0.1
        sigma                                           -0.8  ...    2.3
        <BLANKLINE>
        [4 rows x 4 columns]
    """
    linear, names, _ = _parameters(fit, scale)
    index = pd.Index(names)
    return pd.DataFrame(linear.vcov, index, index)


def _parameters(fit: FittedModel, scale: str) -> tuple[Linearised, list[str], list[Any]]:
    """Variance parameters on a scale, their names and the transforms for their intervals."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if scale == "log":
        return _logarithmic(fit), list(fit.parameter_names), [None] * len(fit.parameters)
    known = named_readings(fit, scale)
    usual = {"sd": "log", "sigma": "log", "cor": "fisher" if scale == "sd" else None}
    transforms = [usual.get(own.kind, own.reading.transform) for own in known]
    return _linearised(fit, known, scale), [own.name for own in known], transforms


def _logarithmic(fit: FittedModel) -> Linearised:
    """`LMMResults.parameters` as they are."""
    fit.require_optimum("give standard errors")
    inside = np.isfinite(fit.parameters)
    known = np.isfinite(np.diagonal(fit.parameters_vcov_array))
    others = "" if inside.all() else given(fit)
    notes = [
        on_boundary(fit) if not free else others if has_error else FLAT
        for free, has_error in zip(inside, known, strict=True)
    ]
    return Linearised(fit.parameters, fit.parameters_vcov_array, notes)


def _linearised(fit: FittedModel, known: list[Named], scale: str) -> Linearised:
    """By derivatives that are written out, or those of the blocks."""
    fit.require_optimum("give standard errors")
    covariance, none = fit.covariance, np.zeros((len(known), len(fit.beta)))
    inside = np.isfinite(fit.parameters)
    places = Places.of(covariance, known)

    def slopes(parameters: np.ndarray) -> np.ndarray:
        return np.concatenate([none, places.slopes(covariance, parameters, scale)], axis=1)

    with derivatives(covariance), np.errstate(all="ignore"):
        slope = slopes(covariance.finite(fit.parameters))
        slope[:, len(fit.beta) :] *= inside
        within = slope if inside.all() else slopes(interior(fit))
    return propagate(fit, inside, estimates(fit, known, scale), slope, within)


def derivatives(covariance: Covariance) -> AbstractContextManager[Any]:
    """What derivatives of a covariance run under: blocks may take theirs from JAX."""
    if all(block.written_out for block in covariance.blocks):
        return np.errstate()
    return neutral()


def estimates(fit: FittedModel, known: list[Named], scale: str = "sd") -> np.ndarray:
    """What people read, at the estimates; SDs of exactly zero, correlations with them NaN."""
    squares = natural.omega_from_theta(fit.theta, fit.covariance.sizes)
    places = Places.of(fit.covariance, known)
    whole = fit.sigma**2 * np.append(squares, 1.0)
    return places.values(whole, fit.parameters, scale)


class Places(NamedTuple):
    """Where numbers that people read are among covariances (m,) with sigma2 after them.

    Attributes:
        entry, first, second: (k,), the covariance and the two variances.
        parameter: (k,), the parameter; -1 for others.
        transforms: of the parameters.
    """

    entry: np.ndarray
    first: np.ndarray
    second: np.ndarray
    parameter: np.ndarray
    transforms: list[Any]

    @staticmethod
    def of(covariance: Covariance, known: list[Named]) -> Places:
        """Those of numbers of a covariance."""
        sizes = covariance.sizes
        starts = np.cumsum([0, *(q * (q + 1) // 2 for q in sizes)])
        first = covariance.starts
        rows = []
        for own in known:
            effects = own.reading.effects
            place = own.reading.parameter
            if not effects:
                last = starts[-1]
                rows.append((last, last, last, first[own.block] + place if place >= 0 else -1))
                continue
            i, j = effects[0], effects[-1]
            at = starts[own.block] + natural.places(sizes[own.block])
            rows.append((at[i, j], at[i, i], at[j, j], -1))
        entry, first, second, parameter = np.array(rows, int).T
        return Places(entry, first, second, parameter, [own.reading.transform for own in known])

    def values(self, whole: np.ndarray, parameters: np.ndarray, scale: str = "sd") -> np.ndarray:
        """Of covariances with sigma2, (m + 1, ...)."""
        found = whole[self.entry]
        if scale == "sd":
            alone = (self.first == self.second).reshape(-1, *[1] * (whole.ndim - 1))
            with np.errstate(invalid="ignore", divide="ignore"):
                sds = np.sqrt(whole)
                correlations = found / (sds[self.first] * sds[self.second])
            found = np.where(alone, sds[self.entry], correlations)
        for k in np.flatnonzero(self.parameter >= 0):
            found[k] = scale_of(self.transforms[k]).inverse(parameters[self.parameter[k]])
        return found

    def slopes(
        self, covariance: Covariance, parameters: np.ndarray, scale: str = "sd"
    ) -> np.ndarray:
        """Derivatives in the parameters, at finite ones, (k, parameters)."""
        m = natural.count_theta(covariance.sizes)
        moved, _ = covariance.in_parameters(parameters, np.zeros(m + 1), np.zeros((m + 1, m + 1)))
        omega, log_sigma2 = covariance.natural(parameters)
        sigma2 = np.exp(np.asarray(log_sigma2))
        whole = sigma2 * np.append(covariance.whole(np.asarray(omega)), 1.0)
        slope = sigma2 * np.asarray(moved)
        slope[:-1] += whole[:-1, None] * np.asarray(moved)[-1]
        found = slope[self.entry]
        if scale == "sd":
            relative = slope / (2 * whole[:, None])
            sds = np.sqrt(whole)
            scales = sds[self.first] * sds[self.second]
            values = whole[self.entry] / scales
            mixed = relative[self.first] + relative[self.second]
            of_pairs = found / scales[:, None] - values[:, None] * mixed
            alone = (self.first == self.second)[:, None]
            found = np.where(alone, sds[self.entry, None] * relative[self.entry], of_pairs)
        for k in np.flatnonzero(self.parameter >= 0):
            place = self.parameter[k]
            transform = scale_of(self.transforms[k])
            value = transform.inverse(parameters[place])
            found[k] = 0.0
            found[k, place] = 1 / transform.slope(value)
        return found
