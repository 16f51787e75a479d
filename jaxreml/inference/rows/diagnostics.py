"""Residuals, leverage, Cook's distance and influence on all parameters of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular

from jaxreml.data.estimability import RowSpace, independent_columns
from jaxreml.data.frame import ModelFrame
from jaxreml.data.residual import ResidualTerm
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.rows import influence_derivatives
from jaxreml.inference.rows.marginal import RowsLeftOut, rows_left_out
from jaxreml.inference.rows.without import fits_without
from jaxreml.many.engine import BatchFitter
from jaxreml.optimum.effects import row_variances, scaled_rows, whitened
from jaxreml.status import Status

BLOCK = 10**7  # values of the responses of refits at a time


def residuals(fit: FittedModel, kind: str = "response") -> pd.Series:
    """Residuals of the rows used, as lme4's residuals.merMod.

    Args:
        fit: the fit.
        kind: "response", y less fitted values; "pearson", these times the root of the prior
            weight; "scaled", Pearson ones over sigma, as in lme4's summary; "studentized", over
            their standard deviations, of independent residuals sigma sqrt(1 - leverage);
            "marginal", y - X beta - offset, random effects left in; "normalized", scaled ones, made
            uncorrelated within subjects where the fit has a covariance of residuals, as nlme's.

    Examples:
        >>> fit.residuals("scaled").round(2).head(3).tolist()
        [-0.16, -0.57, -1.65]
    """
    resid = fit.y - fit.fitted
    if kind == "marginal":
        resid = fit.y - fit.fixed_fitted
    elif kind in ("pearson", "scaled", "studentized"):
        resid = _pearson(fit)
        if kind != "pearson":
            resid = resid / fit.residual_sds
        if kind == "studentized" and fit.residual is not None:
            resid = _pearson(fit) / np.sqrt(_left_out(fit).spread * fit.prior_weights)
        elif kind == "studentized":
            with np.errstate(divide="ignore", invalid="ignore"):
                resid = resid / np.sqrt(1 - leverage(fit).to_numpy())
    elif kind == "normalized":
        resid = _uncorrelated(fit, _pearson(fit) / fit.sigma)
    elif kind != "response":
        kinds = '"response", "pearson", "scaled", "studentized", "normalized" or "marginal"'
        raise ValueError(f"kind must be {kinds}, not {kind!r}")
    return pd.Series(resid, fit.table.index, name=kind)


def _uncorrelated(fit: FittedModel, resid: np.ndarray) -> np.ndarray:
    """L^-1 of each subject's residuals over sigma, with L L' their relative covariance."""
    own = fit.frame.residual
    if own is None:
        return resid
    assert fit.residual is not None
    order = np.lexsort((own.places, own.codes))
    if fit.residual.is_chain:
        return _innovations(fit, resid, own, order)
    found = np.empty_like(resid)
    for rows in np.split(order, np.flatnonzero(np.diff(own.codes[order])) + 1):
        visits = own.places[rows]
        root = np.linalg.cholesky(fit.residual_between(visits, visits) / fit.sigma**2)
        found[rows] = solve_triangular(root, resid[rows], lower=True)
    return found


def _innovations(
    fit: FittedModel, resid: np.ndarray, own: ResidualTerm, order: np.ndarray
) -> np.ndarray:
    """`_uncorrelated` where each residual depends on the one before alone, at any number of
    times."""
    assert fit.residual is not None
    sorted_, codes = resid[order], own.codes[order]
    nearness = fit.residual.neighbours(fit.theta[-1], own.places[order])
    nearness = np.where(np.diff(codes, prepend=-1) == 0, nearness, 0.0)
    before = np.concatenate([[0.0], sorted_[:-1]])
    found = np.empty_like(resid)
    found[order] = (sorted_ - nearness * before) / np.sqrt(1 - nearness**2)
    return found


def leverage(fit: FittedModel) -> pd.Series:
    """Diagonal of the hat matrix of the penalised least squares, as lme4's hatvalues.merMod.

    Row i of sqrt(w) [X, Z] through the inverse of Henderson's equations: by how much the fitted
    value moves with its own y at given variance parameters, beta and the random effects both
    following. The sum is the effective number of parameters. Without any n x n matrix; with
    ``residual=``, through the covariance matrices of rows that depend on each other.

    Examples:
        >>> fit.leverage().round(3).head(2).tolist(), round(float(fit.leverage().sum()), 1)
        ([0.229, 0.17], 29.0)
    """
    if fit.residual is not None:
        return pd.Series(_left_out(fit).leverage, fit.table.index, name="leverage")
    values = row_variances(fit.henderson, fit.design, fit.frame.X, _rows(fit.frame))
    return pd.Series(values * fit.prior_weights, fit.table.index, name="leverage")


def cooks_distance(fit: FittedModel) -> pd.Series:
    """Cook's distance of each row as lme4's cooks.distance.merMod.

    (e / (1 - h))^2 h / (sigma2 p), with e the Pearson residual and h the leverage, random effects
    included. With ``residual=``, of the fixed effects: d' vcov^-1 d / p with d their change without
    the row, at the variance parameters of the fit.

    Raises:
        ValueError: a model without fixed effects.

    Examples:
        >>> fit.cooks_distance().nlargest(2).round(2).to_dict()
        {59: 4.33, 56: 2.12}
    """
    p = _number_of_fixed(fit)
    if fit.residual is not None:
        out = _left_out(fit)
        change = out.change * (out.score / out.precision)[:, None]
        model = fit.vcov_array if fit.sandwich is None else fit.sandwich.model
        values = np.einsum("ni,in->n", change, np.linalg.solve(model, change.T)) / p
        return pd.Series(values, fit.table.index, name="cooks")
    hat = leverage(fit).to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (_pearson(fit) / (1 - hat)) ** 2 * hat / (fit.sigma**2 * p)
    return pd.Series(np.where(np.isfinite(values), values, np.nan), fit.table.index, name="cooks")


def dfbetas(fit: FittedModel) -> pd.DataFrame:
    """Change of each coefficient without each row, over its standard error without it.

    At the variance parameters of the fit, and exact for them: with g = X' V0^-1 d of the row d,
    beta changes by -Phi g e / (1 - h) and Phi by Phi g g' Phi / (1 - h). `influence` lets the
    variance parameters change too. Signs as lme4's: without the row less with it.

    Returns:
        (n, p), a column per coefficient.

    Raises:
        ValueError: a model without fixed effects.

    Examples:
        >>> fit.dfbetas().abs().max().round(2).to_dict()
        {'(Intercept)': 0.18, 'Days': 0.27}
    """
    _number_of_fixed(fit)
    if fit.residual is not None:
        out = _left_out(fit)
        model = fit.vcov_array if fit.sandwich is None else fit.sandwich.model
        se = np.sqrt(np.diagonal(model) + out.change**2 / out.precision[:, None])
        change = -out.change * (out.score / out.precision)[:, None] / se
        return pd.DataFrame(change, fit.table.index, list(fit.fixed_names))
    change, hat = _row_changes(fit)
    with np.errstate(divide="ignore", invalid="ignore"):
        more = fit.sigma**2 * change**2 / (1 - hat)[:, None]
        change = -change * (_pearson(fit) / (1 - hat))[:, None]
    se = np.sqrt(np.diagonal(fit.vcov_array) + more)
    return pd.DataFrame(change / se, fit.table.index, list(fit.fixed_names))


def _left_out(fit: FittedModel) -> RowsLeftOut:
    """What the diagnostics of a fit with ``residual=`` are made of."""
    fit.require_independent_levels("give diagnostics of rows")
    return rows_left_out(fit)


def _row_changes(fit: FittedModel) -> tuple[np.ndarray, np.ndarray]:
    """Phi g of each row, (n, p), over sigma2, and the leverages, (n,)."""
    parts, design = fit.henderson, fit.design
    scaled = scaled_rows(design, _rows(fit.frame))
    white = whitened(parts, design, fit.frame.X, scaled)
    across = np.linalg.solve(parts.factor.T @ design.basis, white.T).T if design.p else white
    root = np.sqrt(fit.prior_weights)
    return across * root[:, None], leverage(fit).to_numpy()


@dataclass(frozen=True, repr=False)
class Influence:
    """What estimates change by when a group of rows is left out; one row per group.

    Attributes:
        params: change of each entry of `LMMResults.params`, without the group less with it; NaN
            for those that cannot be estimated without it.
        dfbetas: the same over the standard errors without the group, as lme4's.
        cooks_distance: change' vcov^-1 change / p with `vcov` of all rows (Cook's distance of a
            group as in influence.ME; lme4's has another factor, 1 - p / number of groups).
        parameters: change of each entry of `LMMResults.parameters`, log-variances and coordinates
            of correlations. Infinite or NaN where a variance is zero.
        refits: columns ``rows``, the number left out, ``converged``, ``is_singular`` and
            ``message``. Numbers of a refit that did not converge are NaN. For the first-order
            method only ``rows``.

    Examples:
        >>> found = fit.influence(by="Subject", method="first-order")
        >>> found.cooks_distance.nlargest(2).round(2).to_dict()
        {'309': 0.15, '335': 0.13}
        >>> found.dfbetas.shape, found.refits["rows"].unique().tolist()
        ((18, 2), [10])
    """

    params: pd.DataFrame
    dfbetas: pd.DataFrame
    cooks_distance: pd.Series
    parameters: pd.DataFrame
    refits: pd.DataFrame

    def __repr__(self) -> str:
        largest = self.cooks_distance.idxmax() if self.cooks_distance.notna().any() else "none"
        return (
            f"<Influence of {len(self.params)} groups of rows on {self.params.shape[1]} fixed "
            f"effects and {self.parameters.shape[1]} variance parameters; largest Cook's distance: "
            f"{largest!r}>"
        )


def influence(fit: FittedModel, by: Any = None, method: str = "exact") -> Influence:
    """Influence of groups of rows on the fixed effects and the variance parameters.

    Args:
        fit: the fit.
        by: what the groups are: a column that the model uses or a grouping factor, by name; (n,)
            labels of the rows used; every row its own group if left out.
        method: "exact" refits the model without each group, by one program for all of them or, with
            ``residual=``, one after the other. Columns
            such as ``poly(x, 2)`` stay those of all rows. "first-order" does without refits: one
            step of the variance parameters by the implicit function theorem, after which beta is
            that of the rows left, to first order in the step. It comes short where a group says
            much about a variance.

    Raises:
        DataError: a fit without an optimum; a name that the model does not have; a fit that has no
            derivative or is too large for the first-order method.
        ValueError: another method, or labels that are not those of the rows.

    Examples:
        >>> found = fit.influence(by="Subject", method="first-order")
        >>> found.cooks_distance.idxmax()
        '309'
        >>> found.params["Days"].round(2).head(3).to_dict()
        {'308': -0.66, '309': 0.48, '310': 0.26}
    """
    fit.require_optimum("measure influence")
    fit.require_likelihood("measure influence")
    codes, labels = _groups(fit, by)
    if method == "first-order":
        fit.require_independent_levels('take the first-order way (method="exact" refits)')
        beta, parameters = influence_derivatives.changes(fit, codes, len(labels), by is None)
        se = np.broadcast_to(fit.bse.to_numpy(), beta.shape)
        refits = {"rows": np.bincount(codes, minlength=len(labels))}
    elif method == "exact":
        refit = _refits if fit.residual is None else fits_without
        beta, se, parameters, refits = refit(fit, codes, len(labels))
        _blank_lost(fit, codes, beta, refits)
        beta, parameters = beta - fit.beta, _differences(parameters, fit.parameters)
    else:
        raise ValueError(f'method must be "exact" or "first-order", not {method!r}')
    p = len(fit.beta)
    cooks = np.full(len(labels), np.nan)
    if p:
        cooks = np.einsum("gi,ig->g", beta, np.linalg.solve(fit.vcov_array, beta.T)) / p
    names = list(fit.fixed_names)
    return Influence(
        pd.DataFrame(beta, labels, names),
        pd.DataFrame(beta / se, labels, names),
        pd.Series(cooks, labels, name="cooks"),
        pd.DataFrame(parameters, labels, list(fit.parameter_names)),
        pd.DataFrame(refits, labels),
    )


def _differences(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return new - old  # NaN where both are infinite


def _groups(fit: FittedModel, by: Any) -> tuple[np.ndarray, pd.Index]:
    """Group of each row, (n,), and the groups' labels."""
    n = fit.nobs
    if by is None:
        return np.arange(n), fit.table.index
    if isinstance(by, str):
        for term in fit.frame.terms:
            if term.is_of(by):
                seen, codes = np.unique(term.codes, return_inverse=True)
                return codes, pd.Index(term.levels, name=by)[seen]
        if by not in fit.table:
            have = [term.name for term in fit.frame.terms]
            have += [str(name) for name in fit.table.columns]
            raise DataError(
                f"{by!r} is no grouping factor or column of the model, which has "
                f"{', '.join(dict.fromkeys(have))}; give the labels of other groups as an array"
            )
        by = pd.Series(fit.table[by].to_numpy(), name=by)
    if np.ndim(by) != 1 or len(by) != n or pd.isna(pd.Series(by)).any():
        raise ValueError(f"by must have a label for each of the {n} rows used, or name a column")
    labels = pd.Series(by)
    codes, levels = pd.factorize(labels, sort=True)
    return codes, pd.Index(levels, name=labels.name)


def _refits(
    fit: FittedModel, codes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Coefficients, standard errors and variance parameters without each group, and statuses."""
    fitter = BatchFitter(fit.frame, fit.method, lanes=1, count=count)
    step = max(1, BLOCK // fit.nobs)
    blocks = []
    for start in range(0, count, step):
        out = codes[:, None] == np.arange(start, min(start + step, count))
        fits = fitter.fit(np.where(out, np.nan, fit.y[:, None]))
        blocks.append((fits.beta, fits.se, fits.parameters, fits.status, fits.is_singular))
    beta, se, parameters, status, singular = map(np.concatenate, zip(*blocks, strict=True))
    return (
        beta,
        se,
        parameters,
        {
            "rows": np.bincount(codes, minlength=count),
            "converged": status == Status.CONVERGED,
            "is_singular": singular.astype(bool),
            "message": [Status(int(code)).sentence for code in status],
        },
    )


def _blank_lost(
    fit: FittedModel, codes: np.ndarray, beta: np.ndarray, refits: dict[str, Any]
) -> None:
    """NaN for coefficients that cannot be estimated without a group.

    A refit drops only the last of columns that depend on each other; without the first level of a
    factor the intercept that it has left is another level's.
    """
    frame = fit.frame
    for k in np.flatnonzero(refits["converged"] & np.isnan(beta).any(axis=1)):
        columns = frame.X[codes != k]
        space = RowSpace(columns, independent_columns(columns))
        lost = ~space.contains(np.eye(len(frame.fixed_names)))
        beta[k, lost] = np.nan
        names = [name for name, out in zip(frame.fixed_names, lost, strict=True) if out]
        refits["message"][k] += f"; cannot be estimated without these rows: {', '.join(names)}"


def _rows(frame: ModelFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(term.codes, term.effects) for term in frame.terms]


def _pearson(fit: FittedModel) -> np.ndarray:
    return (fit.y - fit.fitted) * np.sqrt(fit.prior_weights)


def _number_of_fixed(fit: FittedModel) -> int:
    if not len(fit.beta):
        raise DataError("the model has no fixed effects for a row to have influence on")
    return len(fit.beta)
