"""marginaleffects for fits: its functions, with the degrees of freedom of mixed models.

``avg_slopes``, ``predictions``, ``comparisons``, ``hypotheses`` and the rest have the names and
arguments that they have in the package (Arel-Bundock, Greifer and Heiss 2024), and `df` besides,
as all tests of fixed effects here: every row has its own degrees of freedom, by the gradient of its
estimate. Predictions are those of the fixed effects, the mean over the population of groups.

The package itself knows one number of degrees of freedom for all rows. `ModelJaxreml` makes a fit a
model of its own, for all else that it does, with normal tests. Needs
``pip install 'jaxreml[marginaleffects]'``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from jaxreml.data.columns import like_fitted
from jaxreml.data.frame import EXTRAS, split_extras
from jaxreml.data.outputs import converted
from jaxreml.data.tables import to_pandas
from jaxreml.errors import DataError
from jaxreml.inference.fixed.wald import approximation
from jaxreml.results.results import LMMResults

SWITCH = "jax_enable_x64"
before = getattr(jax.config, SWITCH)
try:
    import marginaleffects as package
    import polars as pl
    from marginaleffects import comparisons as _loaded  # noqa: F401
    from marginaleffects.classes.model import ModelAbstract, ModelVault
    from marginaleffects.sanitize import sanitize_hypothesis_null
    from marginaleffects.transform import get_transform
except ImportError:
    raise ImportError(
        "jaxreml.marginaleffects needs marginaleffects 0.6 or later: "
        "pip install 'jaxreml[marginaleffects]'"
    ) from None
finally:  # it switches float64 on for the whole process when its functions are loaded
    jax.config.update(SWITCH, before)
package: Any = package

STEP = 1e-3  # of a coefficient, in standard errors, for derivatives of estimates
HEADINGS = {"statistic": "t", "df": "Df", "p_value": "P(>|t|)"}


class ModelJaxreml(ModelAbstract):
    """A fit as a model of marginaleffects.

    Args:
        fit: the fit.
        df: whose covariance of the fixed effects: "kenward-roger" for the adjusted one; all others
            have the same. Tests by the package's own functions are t tests with "residual", normal
            ones otherwise.
        standardised: whether coefficients are in units of their standard errors, in which the
            package's derivatives by differences are exact to more digits.

    Raises:
        DataError: a fit without an optimum or its rows, or with the argument `offset`, for which
            new rows have no value.

    Example:
        >>> import jaxreml, marginaleffects
        >>> from jaxreml.marginaleffects import ModelJaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
        >>> grid = marginaleffects.datagrid(ModelJaxreml(fit), Days=[0, 9])
        >>> grid.shape[0]
        2
    """

    def __init__(self, fit: LMMResults, df: str = "inf", standardised: bool = False):
        fit.require_optimum("take marginal effects")
        if EXTRAS["offset"] in fit.table:
            raise DataError(
                "the fit was made with offset=...; write offset(column) in the formula, so that it "
                "is known for other rows too"
            )
        table, _ = split_extras(fit.table)
        kinds = {name: "category" for name in table if table[name].dtype == object}
        encodings = [fit.frame.fixed_encoding, *fit.frame.offset_encodings]
        self.columns = [
            name
            for name in dict.fromkeys(n for encoding in encodings for n in encoding.variables)
            if name in table
        ]
        self.approximation = approximation(fit, df)
        self.units = fit.bse.to_numpy() if standardised else np.ones(len(fit.beta))
        self.df_resid = float(fit.nobs - len(fit.beta)) if df == "residual" else np.inf
        vault = ModelVault(
            coef=fit.beta / self.units,
            coefnames=np.array(fit.fixed_names),
            formula=self.matrices,  # pyright: ignore
            modeldata=converted(table.astype(kinds), "polars"),
            variable_names=[fit.frame.formula.response, *self.columns],
            package="jaxreml",
        )
        super().__init__(fit, vault)

    def validation(self) -> None:
        """What the package looks at before it works; not for categories in X, made elsewhere."""
        self.validate_coef()
        self.validate_response_name()
        data: Any = self.get_modeldata()
        self.vault.variables_type = {name: _kind(values) for name, values in data.to_dict().items()}

    def matrices(self, newdata: Any) -> tuple[None, np.ndarray]:
        """No response, and X with the offset as a further column where the model has one.

        Raises:
            DataError: columns or levels that the fit has not, named.
        """
        frame = self.model.prototype
        table = to_pandas(newdata, self.columns)
        for name in self.columns:
            table[name] = like_fitted(name, pd.Series(table[name]), pd.Series(frame.table[name]))
        if not self.columns:
            table = pd.DataFrame(index=range(len(newdata)))
        full = frame.fixed_encoding.matrix(table)
        X = np.where(frame.estimable(full)[:, None], full[:, frame.kept], np.nan)
        return None, np.column_stack([X, frame.offsets(table)]) if frame.offset_encodings else X

    def get_exog(self, newdata: Any) -> np.ndarray:
        """X of other rows, and the offset."""
        return self.matrices(newdata)[1]

    def get_predict(self, params: np.ndarray, newdata: Any) -> Any:
        """Predictions from what `get_exog` made."""
        p = len(self.units)
        values = newdata[:, :p] @ (np.asarray(params) * self.units) + newdata[:, p:].sum(axis=1)
        rows = pl.Series("rowid", range(len(values)), dtype=pl.Int32)
        return pl.DataFrame([rows, pl.Series("estimate", values)])

    def get_vcov(self, vcov: Any = True) -> np.ndarray | None:
        """The covariance of the coefficients, by the approximation chosen.

        Args:
            vcov: True; False for none; or the `df` whose covariance it is.
        """
        if vcov is False or vcov is None:
            return None
        chosen = approximation(self.model, vcov) if isinstance(vcov, str) else self.approximation
        return chosen.vcov / np.outer(self.units, self.units)

    def get_df(self) -> float:
        """Of joint tests by the package: n - p, or infinite."""
        return self.df_resid


def _kind(values: Any) -> str:
    """What the package calls a column."""
    if values.dtype == pl.Boolean:
        return "boolean"
    if not values.dtype.is_numeric():
        return "character" if isinstance(values.dtype, pl.Enum | pl.String) else "unknown"
    if set(values.unique().to_list()) <= {0, 1}:
        return "binary"
    return "numeric" if values.dtype.is_float() else "integer"


def _called(name: str, fit: LMMResults, df: str, options: dict[str, Any]) -> Any:
    """A function of the package for a fit, with t tests of every row by `df`.

    Raises:
        ValueError: options that the degrees of freedom do not go with.
    """
    if options.get("joint"):
        raise ValueError("joint tests have degrees of freedom of their own: use fit.test(L, df=df)")
    if options.get("equivalence") is not None:
        raise ValueError(
            "equivalence tests are normal: call marginaleffects with ModelJaxreml(fit)"
        )
    transform, level = options.pop("transform", None), options.get("conf_level", 0.95)
    own = not isinstance(options.get("vcov", True), bool)
    if own and df not in ("residual", "inf"):
        raise ValueError('a covariance of your own goes with df="inf" or "residual"')
    model = ModelJaxreml(fit, df, standardised=name != "hypotheses")
    if own:
        options["vcov"] = np.asarray(options["vcov"], float) / np.outer(model.units, model.units)
    if callable(options.get("newdata")):
        options["newdata"] = options["newdata"](model)
    if name != "hypotheses":
        options.setdefault("eps_vcov", STEP)
    before = package.get_autodiff()
    try:
        if before is None:  # its use of JAX would switch float64 on for the whole process
            package.set_autodiff(False)
        found = getattr(package, name)(model, **options)
    except AttributeError as error:
        if "get_categories" not in str(error):
            raise
        raise DataError(
            "marginaleffects up to 0.6.0 cannot work with factors under polars 2: "
            "pip install 'polars<2'"
        ) from None
    finally:
        package.set_autodiff(before)
    data = found.data
    if found.jacobian is not None:
        rows = found.jacobian / model.units
        degrees = model.approximation.single(rows)
        data = _with_tests(data, degrees, options.get("hypothesis"), level)
    else:
        rows = None
    return package.MarginaleffectsResult(
        get_transform(data, transform),
        by=found.by,
        conf_level=level,
        jacobian=rows,
        newdata=SimpleNamespace(datagrid_explicit=list(found.datagrid_explicit)),
        mapping=_headings(found),
    )


def _with_tests(data: Any, df: np.ndarray, hypothesis: Any, level: float) -> Any:
    """The rows with t tests and intervals of these degrees of freedom."""
    estimate, error = data["estimate"].to_numpy(), data["std_error"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = (estimate - sanitize_hypothesis_null(hypothesis)) / error
        p_value = 2 * stdtr(df, -np.abs(statistic))
        surprise = -np.log2(p_value)
    half = stdtrit(df, (1 + level) / 2) * error
    columns = {
        "statistic": statistic,
        "df": df,
        "p_value": p_value,
        "s_value": surprise,
        "conf_low": estimate - half,
        "conf_high": estimate + half,
    }
    names = [name for name in data.columns if name not in columns]
    place = names.index("std_error") + 1
    found = data.with_columns([pl.Series(name, values) for name, values in columns.items()])
    return found.select([*names[:place], *columns, *names[place:]])


def _headings(found: Any) -> dict[str, str]:
    """What columns are called in print, in their order."""
    headings = {}
    for name, heading in found._meta.mapping.items():
        headings[name] = HEADINGS.get(name, heading)
        if name == "statistic":
            headings["df"] = HEADINGS["df"]
    return headings


def predictions(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Predictions of the fixed effects, as ``marginaleffects.predictions``.

    Args:
        fit: the fit.
        df: degrees of freedom, as for `LMMResults.test`.
        options: those of the package: newdata, variables, by, hypothesis, conf_level, transform...

    Returns:
        The package's result, a polars frame in `data`, with a column ``df``.

    Examples:
        >>> from jaxreml.marginaleffects import predictions
        >>> found = predictions(fit, newdata=data[["Days"]][:3], df="kenward-roger").data
        >>> found["estimate"].round(1).to_list(), found["df"].round(1).to_list()
        ([251.4, 261.9, 272.3], [17.0, 17.0, 17.0])
    """
    return _called("predictions", fit, df, options)


def avg_predictions(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Averages of `predictions`, as ``marginaleffects.avg_predictions``.

    Examples:
        >>> from jaxreml.marginaleffects import avg_predictions
        >>> avg_predictions(scores, by="Machine").data["estimate"].round(1).to_list()
        [52.4, 60.3, 66.3]
    """
    return _called("avg_predictions", fit, df, options)


def comparisons(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Predictions compared at other values, as ``marginaleffects.comparisons``.

    Examples:
        >>> from jaxreml.marginaleffects import comparisons
        >>> found = comparisons(fit, variables={"Days": 7}, newdata=data[["Days"]][:1]).data
        >>> found["estimate"].round(1).to_list()
        [73.3]
    """
    return _called("comparisons", fit, df, options)


def avg_comparisons(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Averages of `comparisons`, as ``marginaleffects.avg_comparisons``.

    Examples:
        >>> from jaxreml.marginaleffects import avg_comparisons
        >>> avg_comparisons(fit, variables={"Days": 7}).data["estimate"].round(1).to_list()
        [73.3]
    """
    return _called("avg_comparisons", fit, df, options)


def slopes(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Slopes of the predictions, as ``marginaleffects.slopes``.

    Examples:
        >>> from jaxreml.marginaleffects import slopes
        >>> found = slopes(fit, variables="Days", newdata=data[["Days"]][:2]).data
        >>> found["estimate"].round(2).to_list()
        [10.47, 10.47]
    """
    return _called("slopes", fit, df, options)


def avg_slopes(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Averages of `slopes`, as ``marginaleffects.avg_slopes``.

    Examples:
        >>> from jaxreml.marginaleffects import avg_slopes
        >>> found = avg_slopes(fit, variables="Days").data
        >>> [round(value, 3) for value in found.select("estimate", "std_error", "df").row(0)]
        [10.467, 1.546, 17.0]
    """
    return _called("avg_slopes", fit, df, options)


def hypotheses(fit: LMMResults, *, df: str = "satterthwaite", **options: Any) -> Any:
    """Functions of the coefficients, as ``marginaleffects.hypotheses``; nonlinear ones too.

    Coefficients are b0, b1, ... in the order of `LMMResults.params`.

    Examples:
        >>> from jaxreml.marginaleffects import hypotheses
        >>> found = hypotheses(scores, hypothesis="b1 / b2 = 1").data
        >>> found["estimate"].round(2).to_list(), found["df"].round(0).to_list()
        ([-0.43], [46.0])
    """
    return _called("hypotheses", fit, df, options)
