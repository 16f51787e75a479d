"""`MixedRegressor`: a linear mixed model as an estimator of scikit-learn.

For pipelines, cross-validation and whatever else takes an estimator. Needs
``pip install 'jaxreml[sklearn]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.api.fit import fit
from jaxreml.data.formula import RandomTerm, parse
from jaxreml.data.tables import as_typed, nearest, to_pandas
from jaxreml.errors import FormulaError
from jaxreml.results.results import LMMResults

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError:
    raise ImportError(
        "jaxreml.sklearn needs scikit-learn 1.6 or later: pip install 'jaxreml[sklearn]'"
    ) from None

GROUPS = "groups"  # the column that the argument of `fit` and `predict` becomes


class MixedRegressor(RegressorMixin, BaseEstimator):
    """A linear mixed model as an estimator of scikit-learn.

    Say what the model is by a formula, or by columns: without a formula, every column of X but the
    grouping one is a fixed effect, and there is a random intercept per group, with `slopes` if
    asked for. Groups are a column of X, or go beside X as the argument `groups` of `fit` and
    `predict`, in a formula under the name ``groups``.

    Args:
        formula: the right side of one of `jaxreml.fit`, such as ``"~ Days + (Days | Subject)"``,
            of the columns of X: by their names in a dataframe, by x0, x1, ... in an array.
        groups: without a formula, the column of X that is the grouping factor; None where groups
            are given to `fit`.
        slopes: without a formula, columns of X whose effects differ between groups.
        method: "REML" or "ML".
        engine: "numpy" or "jax"; chosen if left out.

    Attributes:
        results_: the `LMMResults`, with tests, intervals and diagnostics.
        coef_: fixed effects without the intercept, named by `coef_names_`.
        intercept_: the intercept, 0.0 for a formula without one.
        n_features_in_, feature_names_in_: of X, as in all estimators.

    Predictions use the random effects of groups that the fit has seen; others are predicted by the
    fixed effects, the mean over the population of groups. Rows of a dataframe with a missing value
    are dropped by `fit`, and predicted as NaN.

    Examples:
        >>> from jaxreml.sklearn import MixedRegressor
        >>> from sklearn.model_selection import GroupKFold, cross_val_score
        >>> X, y = data[["Days", "Subject"]], data["Reaction"]
        >>> model = MixedRegressor("~ Days + (Days | Subject)").fit(X, y)
        >>> model.coef_.round(3), round(model.intercept_, 2)
        (array([10.467]), 251.41)
        >>> model.predict(X.iloc[:2]).round(2)  # of a subject that the fit knows
        array([253.66, 273.33])
        >>> found = cross_val_score(model, X, y, groups=X["Subject"], cv=GroupKFold(3))
        >>> len(found)  # each of subjects that the fit does not know
        3
    """

    def __init__(
        self,
        formula: str | None = None,
        *,
        groups: str | None = None,
        slopes: Sequence[str] | None = None,
        method: str = "REML",
        engine: str | None = None,
    ):
        self.formula = formula
        self.groups = groups
        self.slopes = slopes
        self.method = method
        self.engine = engine

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> MixedRegressor:
        """Fit the model.

        Args:
            X: (n, k) a dataframe (pandas, polars, ...) or an array.
            y: (n,) responses.
            sample_weight: (n,) prior weights as in lme4: row i has the residual variance sigma2 /
                sample_weight[i]. A row of weight zero is left out; one of weight 2 is not the same
                as two rows.
            groups: (n,) the group of each row, where it is no column of X.

        Raises:
            ValueError: no groups, or groups of both kinds.
            FormulaError, DataError: as `jaxreml.fit`.

        Examples:
            >>> from jaxreml.sklearn import MixedRegressor
            >>> model = MixedRegressor(groups="Subject", slopes=["Days"])
            >>> model.fit(data[["Days", "Subject"]], data["Reaction"]).coef_.round(2).tolist()
            [10.47]
        """
        table = self._table(X, groups, reset=True)
        y = column_or_1d(y, warn=True)
        check_consistent_length(table, y)
        formula = self._right_side(list(table.columns), groups is not None)
        response = "y"
        while response in table.columns:
            response += "_"
        table[response] = y
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, table, dtype=np.float64)
            table, weights = table[weights != 0].reset_index(drop=True), weights[weights != 0]
        self._grouped_beside = groups is not None
        self.results_: LMMResults = fit(
            f"{response} {formula}", table, self.method, weights=weights, engine=self.engine
        )
        names = list(self.results_.fixed_names)
        params = dict(zip(names, self.results_.beta.tolist(), strict=True))
        self.intercept_ = params.pop("(Intercept)", 0.0)
        self.coef_names_ = np.array(list(params), object)
        self.coef_ = np.array(list(params.values()), float)
        return self

    def predict(self, X: Any, groups: Any = None, return_std: bool = False) -> Any:
        """Predictions, with the random effects of the groups that the fit has seen.

        Args:
            X: (m, k) as in `fit`.
            groups: (m,) the group of each row, where `fit` was given them; predictions for the
                population of groups if left out.
            return_std: also the standard deviation of a new observation, as scikit-learn's
                Bayesian regressors: residual, coefficients and random effects together.

        Returns:
            (m,) predictions, or a pair of them and their standard deviations.

        Examples:
            >>> from jaxreml.sklearn import MixedRegressor
            >>> model = MixedRegressor()
            >>> model = model.fit(data[["Days"]], data["Reaction"], groups=data["Subject"])
            >>> model.predict(pd.DataFrame({"Days": [3]}), groups=["someone new"]).round(1).tolist()
            [282.8]
        """
        check_is_fitted(self, "results_")
        if groups is not None and not self._grouped_beside:
            raise ValueError("groups are a column of X in this model; fit was not given them")
        table = self._table(X, groups, reset=False)
        without = self._grouped_beside and groups is None
        options: dict[str, Any] = {
            "re_form": self._without_groups() if without else None,
            "allow_new_levels": True,
        }
        if not return_std:
            return np.asarray(self.results_.predict(table, **options))
        if self.results_.weights is not None:
            options["weights"] = np.ones(len(table))
        found: Any = self.results_.predict(table, interval="prediction", **options)
        return np.asarray(found["prediction"]), np.asarray(found["std_error"])

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """R2 of the predictions, as of any regressor; arguments as for `predict`.

        Examples:
            >>> from jaxreml.sklearn import MixedRegressor
            >>> X, y = data[["Days", "Subject"]], data["Reaction"]
            >>> round(MixedRegressor("~ Days + (1 | Subject)").fit(X, y).score(X, y), 2)
            0.73
        """
        from sklearn.metrics import r2_score

        return float(r2_score(y, self.predict(X, groups=groups), sample_weight=sample_weight))

    def _table(self, X: Any, groups: Any, *, reset: bool) -> pd.DataFrame:
        """X as pandas, columns named, with the groups beside it; checked as scikit-learn does."""
        if hasattr(X, "columns") or hasattr(X, "column_names"):
            validate_data(self, X, skip_check_array=True, reset=reset)
            keys = list(X.columns if hasattr(X, "columns") else X.column_names)
            table = to_pandas(X, keys).set_axis([str(key) for key in keys], axis=1)
            table = table.reset_index(drop=True)
        else:
            objects = getattr(getattr(X, "dtype", None), "kind", "") == "O"
            mixed = objects and bool(self.formula or self.groups)
            values: Any = validate_data(
                self,
                X,
                reset=reset,
                dtype=None if mixed else "numeric",
                ensure_min_samples=2 if reset else 1,
            )
            names = [f"x{k}" for k in range(values.shape[1])]
            table = pd.DataFrame(values, columns=names).infer_objects()
        if groups is not None:
            if GROUPS in table.columns:
                raise ValueError(f"X has a column {GROUPS!r}: groups cannot be given beside it")
            if self.groups is not None:
                raise ValueError(f"the groups are the column {self.groups!r}: do not give others")
            groups = column_or_1d(groups)
            check_consistent_length(table, groups)
            table[GROUPS] = groups
        return table

    def _right_side(self, columns: list[str], beside: bool) -> str:
        """The formula, ~ and what follows."""
        if self.formula is None:
            return self._of_columns(columns, GROUPS if beside else self.groups)
        if self.groups is not None or self.slopes is not None:
            raise ValueError("give a formula, or groups and slopes; not both")
        text = self.formula.strip()
        if not text.startswith("~"):
            raise FormulaError(
                f"the formula {text!r} has a left side; the response is y: start it with ~"
            )
        if beside and not any(GROUPS in bar.factors for bar in parse(text).random):
            raise ValueError(
                f"groups are given, and the formula {text!r} has no random term on them, such as "
                f"(1 | {GROUPS})"
            )
        return text

    def _of_columns(self, columns: list[str], grouping: str | None) -> str:
        if grouping is None:
            raise ValueError(
                "a mixed model needs groups: pass them to fit (groups=...), name the column of X "
                'that has them, MixedRegressor(groups="..."), or give a formula'
            )
        slopes = list(self.slopes or ())
        for name in [grouping, *slopes]:
            if name not in columns:
                raise ValueError(f"X has no column {name!r}{nearest(name, columns)}")
        fixed = [as_typed(name) for name in columns if name != grouping]
        effects = [as_typed(name) for name in slopes]
        return (
            f"~ {' + '.join(['1', *fixed])} + ({' + '.join(['1', *effects])} | "
            f"{as_typed(grouping)})"
        )

    def _without_groups(self) -> str:
        """The random terms of the formula that are not on the groups given to `fit`."""
        bars = [bar for bar in parse(self.results_.formula).random if GROUPS not in bar.factors]
        return "~ " + " + ".join(map(_bar, bars)) if bars else "~0"


def _bar(bar: RandomTerm) -> str:
    return bar.text(":".join(as_typed(name) for name in bar.factors))
