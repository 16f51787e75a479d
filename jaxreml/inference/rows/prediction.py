r"""Predictions of a fit for its own rows and for new ones, with their standard errors.

With b split into the effects that a prediction uses, b_1 with rows z_1, and the others, b_2, the
prediction of a row (x, z) is x'beta_hat + z_1'b_hat_1 + offset. Two intervals go with it:

- ``"confidence"``, for x'beta + z_1'b_1, the mean given these random effects. Its variance is that
  of x'(beta_hat - beta) + z_1'(b_hat_1 - b_1), by the inverse of Henderson's mixed model equations:
  beta_hat and b_hat jointly. A level that the fit has not seen has b_hat = 0 and adds z Sigma z'.
- ``"prediction"``, for a new observation there: it adds sigma2 / weight, and z_2'Sigma_2 z_2 for
  the random effects that are left out, those of levels drawn anew.

Where columns of X depend on others, rows outside the row space of X, such as a combination of
levels without data, are NaN, with an EstimabilityWarning: what their mean is would depend on which
columns were left out. R's ``predict.lm(rankdeficient = "NA")``.

With ``residual=`` the residuals that a subject has shown say something of those of its other
visits: the prediction for such a visit, where all random effects are used, has their conditional
mean, and its intervals the conditional variance; others have the mean and the variance of the
visit.

Both intervals take the variance parameters for known, as lme4 and merTools do; normal quantiles.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

from jaxreml.arguments import check_conf_level
from jaxreml.data.columns import codes_of, complete_rows, label, like_fitted, require_same_kind
from jaxreml.data.formula import parse
from jaxreml.data.frame import EXTRAS, ModelFrame, check_finite
from jaxreml.data.grouping import GroupingTerm, combined_codes, grouping_terms
from jaxreml.data.kernels import codes_in_kernel
from jaxreml.data.tables import beside, nearest, texts_of_names, to_pandas
from jaxreml.errors import DataError, EstimabilityWarning, FormulaError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.rows.own_times import at_times
from jaxreml.model.covariance.timed import Timed
from jaxreml.optimum.effects import row_variances

Mask = tuple[np.ndarray, ...]  # per term (q,) booleans, which effects


class Rows(NamedTuple):
    """Rows to predict for, k complete ones.

    Attributes:
        index: labels of all rows asked for.
        complete: which of them are complete, booleans.
        estimable: (k,) booleans, for which complete rows the data determine x'beta.
        X: (k, p), as in the fit.
        effects: per term (k, q).
        codes: per term (k,), levels of the fit; -1 for a level that it has not seen.
        offset, weights: (k,).
        subjects, visits: (k,), of the residuals' covariance; -1 for those not seen. Times, NaN for
            those not known, where subjects are at their own.
    """

    index: pd.Index
    complete: np.ndarray
    estimable: np.ndarray
    X: np.ndarray
    effects: list[np.ndarray]
    codes: list[np.ndarray]
    offset: np.ndarray
    weights: np.ndarray
    subjects: np.ndarray
    visits: np.ndarray


def predict(
    fit: FittedModel,
    newdata: Any = None,
    re_form: str | bool | None = None,
    allow_new_levels: bool = False,
    *,
    interval: str | None = None,
    conf_level: float = 0.95,
    offset: Any = None,
    weights: Any = None,
) -> pd.Series | pd.DataFrame:
    """Predictions, as lme4's predict.merMod, with standard errors if wanted.

    The columns of the model are made of `newdata` as they were for the fit: with its state of
    transforms such as ``poly(x, 2)`` and ``scale(x)``, its levels of factors and contrasts,
    and without aliased columns.

    Args:
        fit: the fit.
        newdata: any table as for `fit`; the rows of the fit if left out. The response is not
            needed, nor are the grouping factors of random effects that `re_form` leaves out.
            A row with a missing value in a column that is needed has NaN for its prediction,
            and so has, with an EstimabilityWarning, one whose fixed effects the data do not
            determine, such as a combination of levels without data.
        re_form: which random effects to use: None for all, and with ``residual=`` what a known
            subject's residuals say of a visit that it lacks; "~0" or False for none, or a
            formula with some of them, such as ``"~ (1 | school)"``.
        allow_new_levels: predict for levels of grouping factors that the fit has not seen,
            whose random effects are taken for zero. Refused by name otherwise.
        interval: None; "confidence" for x'beta + z'b, with the uncertainty of beta and of the
            random effects used, jointly (b of a new level has all of its variance Sigma);
            "prediction" for a new observation: with the residual variance, and the variance of
            the random effects not used, besides. Variance parameters are taken for known.
        conf_level: of the interval, by normal quantiles.
        offset: of the rows of newdata, a column name or values, where the fit was made with
            the argument `offset`. ``offset()`` of the formula is evaluated anyway.
        weights: likewise; wanted for prediction intervals only.

    Returns:
        Predictions in the row labels of newdata; with `interval`, a frame with the columns
        ``prediction``, ``std_error``, ``lower`` and ``upper``.

    Raises:
        DataError: a column that is missing or of another kind than in the fit, levels that the
            fit has not seen, named.
        FormulaError: a `re_form` that the fit has not.
        ValueError: other arguments than these; an offset or weights that are missing; intervals
            of a fit without an optimum.

    Examples:
        >>> new = {"Days": [3, 12], "Subject": ["308", "someone new"]}
        >>> fit.predict(new, allow_new_levels=True).round(1).tolist()
        [312.7, 377.0]
        >>> fit.predict(new, allow_new_levels=True, interval="prediction").round(0)
           prediction  std_error  lower  upper
        0       313.0       27.0  260.0  365.0
        1       377.0       83.0  214.0  540.0
        >>> fit.predict({"Days": [3]}, re_form="~0").round(1).tolist()
        [282.8]
    """
    if interval not in (None, "confidence", "prediction"):
        raise ValueError(f'interval must be None, "confidence" or "prediction", not {interval!r}')
    check_conf_level(conf_level)
    if interval:
        fit.require_optimum("give standard errors")
    frame = fit.frame if newdata is None else fit.prototype
    used = included_effects(frame, re_form)
    with_left_out = interval == "prediction"
    if newdata is None:
        if offset is not None or weights is not None:
            raise ValueError("offset and weights belong to newdata, which is not given")
        rows = _own_rows(fit)
    else:
        rows = _new_rows(fit, newdata, used, with_left_out, offset, weights)
    if not allow_new_levels:
        _require_known(frame, rows, used, newdata)

    _warn_not_estimable(frame, rows)
    mean = np.where(rows.estimable, rows.X @ fit.beta + rows.offset, np.nan)
    own = []  # the part of each row of Z whose effects have modes
    variance = np.zeros(len(mean))
    for grouping, block, keep, effects, codes in zip(
        fit.groupings, fit.cov_re_arrays, used, rows.effects, rows.codes, strict=True
    ):
        known = codes >= 0
        chosen = effects * keep
        variance += np.where(known, 0.0, _quadratic(chosen, block))
        if with_left_out and not keep.all():
            if keep.any():
                raise ValueError(
                    f"re_form keeps some effects of the term on {grouping.name!r} and leaves out "
                    "others, which are correlated with them: a prediction interval needs whole "
                    "terms"
                )
            variance += _quadratic(effects, block)
        here, places = chosen * known[:, None], np.where(known, codes, 0)
        mean += np.sum(here * grouping.modes[places], axis=1)
        own.append((places, here))
    if fit.residual is not None and isinstance(fit.residual.block, Timed):
        return _at_own_times(fit, rows, mean, variance, own, re_form is None, interval, conf_level)
    beyond = np.zeros(len(mean))  # the variance of an observation over sigma2 / weight, less 1
    if fit.residual is not None:
        places, here, beyond = _of_other_visits(fit, rows, re_form is None)
        mean += np.sum(here * fit.residual.modes[places], axis=1)
        own.append((places, here))
    if interval is None:
        return _series(rows, mean, "prediction")
    sigma2 = fit.sigma**2
    variance += sigma2 * row_variances(fit.henderson, fit.design, rows.X, own)
    if interval == "prediction":
        variance += sigma2 * (1 + beyond) / rows.weights
    return _intervals(rows, mean, variance, conf_level)


def _intervals(
    rows: Rows, mean: np.ndarray, variance: np.ndarray, conf_level: float
) -> pd.DataFrame:
    se = np.sqrt(np.where(rows.estimable, variance, np.nan))
    half = ndtri((1 + conf_level) / 2) * se
    columns = {"prediction": mean, "std_error": se, "lower": mean - half, "upper": mean + half}
    return pd.DataFrame({name: _series(rows, values, name) for name, values in columns.items()})


def _at_own_times(
    fit: FittedModel,
    rows: Rows,
    mean: np.ndarray,
    variance: np.ndarray,
    chosen: list[tuple[np.ndarray, np.ndarray]],
    wanted: bool,
    interval: str | None,
    conf_level: float,
) -> pd.Series | pd.DataFrame:
    """`predict` where subjects are at times of their own, from the mean given their effects."""
    found = at_times(fit, rows, chosen, wanted, interval is not None)
    mean = mean + found.mean
    if found.variance is None:
        return _series(rows, mean, "prediction")
    if interval == "confidence" and found.other.any():
        raise ValueError(
            'interval="confidence" is of means, and some rows are at times without a response of '
            'subjects that have others, where residuals are predicted too: ask for "prediction", '
            'or for re_form="~0"'
        )
    of_rows = found.variance
    if interval == "prediction":
        of_rows = of_rows + ~found.other / rows.weights
    return _intervals(rows, mean, variance + fit.sigma**2 * of_rows, conf_level)


def _of_other_visits(
    fit: FittedModel, rows: Rows, wanted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of each row in the design's last term, as levels (k,) and effects (k, q), nonzero
    for visits without a response of subjects that have others; and for the other rows what their
    visit's variance over sigma2 is beyond 1, (k,)."""
    residual = fit.residual
    assert residual is not None
    places, visits = np.maximum(rows.subjects, 0), np.maximum(rows.visits, 0)
    known = (rows.subjects >= 0) & (rows.visits >= 0)
    other = known & (residual.seen[places, visits] == 0) & wanted
    here = np.zeros((len(places), len(residual.effects)))
    here[np.arange(len(here)), visits] = other / np.sqrt(rows.weights)
    ratios = np.diagonal(fit.residual_cov.to_numpy()) / fit.sigma**2
    unknown = 0.0 if residual.block.homogeneous else np.nan
    beyond = np.where(other, 0.0, np.where(rows.visits >= 0, ratios[visits] - 1, unknown))
    return places, here, beyond


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """z M z' of each row, (k,)."""
    return np.sum(rows @ matrix * rows, axis=1)


def _series(rows: Rows, values: np.ndarray, name: str) -> pd.Series:
    """Values of complete rows among all, NaN for the others."""
    whole = np.full(len(rows.index), np.nan)
    whole[rows.complete] = values
    return pd.Series(whole, rows.index, name=name)


def included_effects(frame: ModelFrame, re_form: str | bool | None) -> Mask:
    """Which random effects a prediction uses.

    Args:
        frame: of the fit.
        re_form: None for all, ``"~0"`` or False for none, or a formula such as
            ``"~ (1 | school)"`` with some of the fit's random terms or of their effects.

    Raises:
        FormulaError: another formula.
    """
    if re_form is None:
        return tuple(np.ones(len(term.effect_names), bool) for term in frame.terms)
    used = tuple(np.zeros(len(term.effect_names), bool) for term in frame.terms)
    if re_form is False or (isinstance(re_form, str) and re_form.replace(" ", "") == "~0"):
        return used
    if not isinstance(re_form, str):
        raise FormulaError(f're_form must be None, "~0" or a formula text, not {re_form!r}')
    parsed = parse(re_form)
    if parsed.response or parsed.offsets or parsed.fixed not in ("0", "1"):
        raise FormulaError(f"re_form has random terms only, as in '~ (1 | g)', not {re_form!r}")
    context = frame.fixed_encoding.context
    for bar in parsed.random:
        here = [k for k, term in enumerate(frame.terms) if term.is_of(bar.name)]
        if not here:
            have = ", ".join(dict.fromkeys(repr(term.name) for term in frame.terms))
            raise FormulaError(
                f"re_form has a term on {bar.name!r}; the fit has random effects on {have}"
            )
        have = {name: [] for k in here for name in frame.terms[k].effect_names}
        for k in here:
            for name in frame.terms[k].effect_names:
                have[name].append(k)
        for asked in grouping_terms(bar, frame.table, context):
            for name in asked.effect_names:
                if name not in have:
                    raise FormulaError(
                        f"re_form has the effect {name!r} of {bar.name!r}; the fit has "
                        f"{', '.join(map(repr, have))}"
                    )
                for k in have[name]:
                    used[k][frame.terms[k].effect_names.index(name)] = True
    return used


def _own_rows(fit: FittedModel) -> Rows:
    frame = fit.frame
    n = len(frame.X)
    return Rows(
        fit.table.index,
        np.ones(n, bool),
        np.ones(n, bool),
        frame.X,
        [term.effects for term in frame.terms],
        [term.codes for term in frame.terms],
        np.zeros(n) if frame.offset is None else frame.offset,
        np.ones(n) if frame.weights is None else frame.weights,
        np.zeros(n, int) if frame.residual is None else frame.residual.codes,
        np.zeros(n, int) if frame.residual is None else _whereabouts(fit, frame.residual.places),
    )


def _whereabouts(fit: FittedModel, visits: np.ndarray) -> np.ndarray:
    """Visits, -1 for those not known, as `Rows` has them."""
    assert fit.residual is not None
    if not isinstance(fit.residual.block, Timed):
        return visits
    return np.where(visits >= 0, fit.residual.times[visits], np.nan)


def _new_rows(
    fit: FittedModel, newdata: Any, used: Mask, with_left_out: bool, offset: Any, weights: Any
) -> Rows:
    """Rows of a new table, in the encodings of the fit."""
    frame = fit.prototype
    _require_extras(frame, with_left_out, offset, weights)
    needed = [with_left_out or bool(keep.any()) for keep in used]
    encodings = [frame.fixed_encoding, *frame.offset_encodings]
    encodings += [t.encoding for t, need in zip(frame.terms, needed, strict=True) if need]
    used_terms = zip(frame.terms, used, strict=True)
    factors = [name for term, keep in used_terms if keep.any() for name in term.factors]
    encoded = [name for encoding in encodings for name in encoding.variables]
    if fit.residual is not None:  # known ones are of use, and others do no harm
        present = set(texts_of_names(newdata))
        factors += [name for name in fit.residual.words.columns if name in present]
    table = _columns(frame, newdata, encoded, factors, {"offset": offset, "weights": weights})
    index = table.index
    table, complete = complete_rows(table)
    check_finite(table)
    for name in table.columns if len(table) else ():
        if name in encoded:
            table[name] = like_fitted(name, pd.Series(table[name]), pd.Series(frame.table[name]))
    k = len(table)
    X = np.zeros((k, len(frame.fixed_names)))
    estimable = np.ones(k, bool)
    effects = [np.zeros((k, len(term.effect_names))) for term in frame.terms]
    codes = [np.zeros(k, int) for _ in frame.terms]
    total_offset, prior = _extras(table)
    subjects, visits = np.full(k, -1), np.full(k, -1)
    if fit.residual is not None and k:
        subjects, visits = _subjects_and_visits(fit, table)
    if k:
        full = frame.fixed_encoding.matrix(table)
        X = full[:, frame.kept]
        estimable = frame.estimable(full)
        total_offset = total_offset + frame.offsets(table)
        for i, (term, keep, need) in enumerate(zip(frame.terms, used, needed, strict=True)):
            if need:
                effects[i] = term.encoding.matrix(table)
            if keep.any():
                codes[i] = _codes(term, frame.table, table)
    return Rows(
        index, complete, estimable, X, effects, codes, total_offset, prior, subjects, visits
    )


def _subjects_and_visits(fit: FittedModel, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """As `Rows` has them, of the columns that are there."""
    residual = fit.residual
    assert residual is not None

    def codes(name: str | None, labels: tuple[Any, ...]) -> np.ndarray:
        if name is None or name not in table:
            return np.full(len(table), -1)
        return codes_of(pd.Series(table[name]), list(labels))

    words = residual.words
    if isinstance(residual.block, Timed) and residual.is_timed and words.visit in table:
        times = pd.Series(table[words.visit]).to_numpy(float)
        return codes(words.subject, residual.subjects), times
    subjects, visits = codes(words.subject, residual.subjects), codes(words.visit, residual.visits)
    visits = _whereabouts(fit, visits)
    if words.arm is None:
        return subjects, visits
    arms = codes(words.arm, residual.arms)
    known = (arms >= 0) & (visits >= 0)
    return subjects, np.where(known, arms * len(residual.visits) + visits, -1)


def _require_extras(frame: ModelFrame, with_left_out: bool, offset: Any, weights: Any) -> None:
    """ValueError unless the new rows have the offset and the weights that they need."""
    if offset is None and EXTRAS["offset"] in frame.table:
        raise ValueError(
            "the fit was made with offset=...; give the offset of the new rows too (zeros for none)"
        )
    if with_left_out and weights is None and frame.weights is not None:
        raise ValueError(
            "the fit has prior weights; a prediction interval needs those of the new rows: "
            "weights=... (ones for observations of variance sigma2)"
        )


def _columns(
    frame: ModelFrame,
    newdata: Any,
    encoded: list[str],
    factors: list[str],
    extras: dict[str, Any],
) -> pd.DataFrame:
    """The columns of a new table that the formula uses, and what stands beside it."""
    columns = texts_of_names(newdata)
    names = [name for name in dict.fromkeys([*encoded, *factors]) if name in frame.table]
    for name in names:
        if name not in columns:
            hint = nearest(name, columns)
            if name in factors:
                hint += '. re_form="~0" predicts without random effects'
            raise DataError(f"newdata has no column {name!r}{hint}")
        if columns.count(name) > 1:
            raise DataError(f"column {name!r} occurs more than once in newdata; rename one")
    table = to_pandas(newdata, names)
    if not names:  # nothing but an intercept
        table = pd.DataFrame(index=_labels(newdata))
    for role, value in extras.items():
        if value is not None:
            table[EXTRAS[role]] = beside(role, value, newdata, len(table))
    return table


def _extras(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Offset and weights of the rows of a new table: zeros and ones if not given."""
    offset, prior = (
        table[EXTRAS[role]].to_numpy(float) if EXTRAS[role] in table else np.full(len(table), other)
        for role, other in (("offset", 0.0), ("weights", 1.0))
    )
    if np.any(prior <= 0):
        row = int(np.argmax(prior <= 0))
        raise DataError(
            f"weights must be positive; row {label(table.index[row:])} has {prior[row]:g}"
        )
    return offset, prior


def _labels(newdata: Any) -> pd.Index:
    """Row labels of a table of which no column is used."""
    names = texts_of_names(newdata)
    if not names:
        raise DataError("newdata has no columns, so that it does not say how many rows there are")
    return to_pandas(newdata, names[:1]).index


def _codes(term: GroupingTerm, fitted: pd.DataFrame, table: pd.DataFrame) -> np.ndarray:
    """Levels of a grouping factor, -1 for those that neither the fit nor a kernel knows."""
    if term.source:
        return codes_in_kernel(term, table)
    old, new = [], []
    for name in term.factors:
        levels = pd.Categorical(fitted[name]).categories
        values = pd.Series(table[name])
        require_same_kind(name, values, pd.Series(levels))
        old.append(codes_of(pd.Series(fitted[name]), levels.tolist()))
        new.append(codes_of(values, levels.tolist()))
    combined = combined_codes([np.concatenate(pair) + 1 for pair in zip(old, new, strict=True)])
    of_level = np.full(int(combined.max()) + 1, -1)
    of_level[combined[: len(fitted)]] = term.codes
    return of_level[combined[len(fitted) :]]


def _warn_not_estimable(frame: ModelFrame, rows: Rows) -> None:
    """Say which rows are NaN because their combination of the fixed effects is not determined."""
    found = np.flatnonzero(rows.complete)[~rows.estimable]
    if found.size:
        shown = ", ".join(map(repr, rows.index[found[:5]].tolist()))
        warnings.warn(
            f"{found.size} row(s) of newdata are NaN ({shown}{', ...' if found.size > 5 else ''}): "
            "the data do not determine their fixed effects, as these columns of X depend on others "
            f"in the data but not there: {', '.join(frame.aliased)}",
            EstimabilityWarning,
            stacklevel=4,
        )


def _require_known(frame: ModelFrame, rows: Rows, used: Mask, newdata: Any) -> None:
    """Refuse levels that the fit has not seen."""
    for term, keep, codes in zip(frame.terms, used, rows.codes, strict=True):
        unknown = codes < 0
        if not keep.any() or not unknown.any():
            continue
        row = int(np.flatnonzero(rows.complete)[np.argmax(unknown)])
        values = to_pandas(newdata, list(term.factors)).iloc[row].tolist()
        level = values[0] if len(values) == 1 else ":".join(map(str, values))
        raise DataError(
            f"the level {level!r} of {term.name!r} in row {label(rows.index[row:])} of newdata is "
            f"not in the fit ({int(unknown.sum())} such row(s)); its levels are such as "
            f"{term.levels[0]!r}. "
            're_form="~0" predicts without random effects, allow_new_levels=True for new levels'
        )
