"""`fit`: a formula and a table to labelled results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxreml.arguments import is_reml, refuse_arguments
from jaxreml.data.frame import model_frame
from jaxreml.fitting.fit import fit_frame
from jaxreml.fitting.sequence import fit_in_turn
from jaxreml.results.results import LMMResults


def fit(
    formula: str,
    data: Any,
    method: str = "REML",
    *,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
    engine: str | None = None,
    residual: str | Sequence[str] | None = None,
    kernels: Mapping[str, Any] | None = None,
    penalty: Any = None,
    **others: Any,
) -> LMMResults:
    """Fit a linear mixed model to a table by a formula, as lme4's ``lmer``.

    Fixed effects are the same for all rows; random effects differ between the levels of a grouping
    factor. ``"y ~ x + (x | g)"`` is a line in x whose intercept and slope vary from one level of g
    to the next.

    Args:
        formula: lme4's grammar, such as ``"y ~ x + (x | g)"``: random terms ``(1 | g)``,
            ``(x | g)``, ``(x || g)``, ``(0 + x | g)``, ``(1 | a/b)``, ``(1 | a:b)``; with a word
            for their covariance as in glmmTMB and lme4 2.0, ``ar1(0 + f | g)``, ``cs``, ``toep``,
            ``diag``, ``ou(time | g)``, ``rr(0 + f | g, d=2)`` and others; ``offset(z)``; fixed
            effects in formulaic's grammar.
        data: dataframe (pandas, polars, pyarrow, anything narwhals reads) or dict of columns.
            Rows with a missing value in a column that the model uses are dropped and counted,
            before columns such as ``poly(x, 2)`` are computed (R computes these first).
        method: "REML" or "ML".
        weights: column name or (n,) values: observation i has residual variance
            sigma2 / weights[i], as in lme4.
        offset: column name or (n,) values, a known part of the mean.
        structure: how to factorise the covariance, "grouped", "crossed" or "dense"; chosen if
            left out.
        context: names the formula may use besides columns: functions, and covariances of your own
            (`jaxreml.covariance.custom`), for `residual` too.
        max_iterations: evaluations of the criterion with its derivatives.
        engine: "numpy" (nothing is compiled) or "jax"; NumPy if left out.
        residual: a covariance of the residuals within subjects, as ``"us(visit | subject)"``:
            "us", "diag", "cs", "csh", "ar1", "ar1h", "ad", "adh", "toep" or "toeph" of visits,
            levels of a factor or numbers; "sp_exp" or "sp_gau" of times;
            ``"us(visit | arm/subject)"`` for one of each arm; ``"diag(group)"`` for a variance by
            level of a column. Beside any random effects, or none; what means the same as they do
            is refused. With `weights`, it is that of the residuals times the roots of these.
            A list of such texts is tried in turn, until one has a certified optimum with a positive
            definite Hessian: ``fit.residual_tried`` and the summary say which were left, and why.
        kernels: known covariances K of the levels of grouping factors, up to a factor, such as
            ``{"animal": A}`` for ``(1 | animal)``: b ~ N(0, sigma2_a A). A frame with labels, which
            may have levels that the data lack (these are predicted), an array in the order of the
            sorted levels, or what `jaxreml.kernels` makes. Several of one factor by name:
            ``{"animal": {"additive": A, "dominance": D, "permanent": None}}``, None for
            independent levels.
        penalty: a density of the variance parameters, for maximum a posteriori estimates that stay
            off the boundary: "wishart" or "gamma" (blme's defaults), a density of
            `jaxreml.penalties`, a dict of these by grouping factor (``{"Subject": "wishart"}``), or
            a JAX function of all `parameters` to the logarithm of their density (up to a constant,
            no Jacobians). Standard errors are from the Hessian of the penalised criterion; what
            compares likelihoods or refits is refused.
        others: none; those of lme4 and statsmodels are refused with what to write instead.

    Returns:
        The fit. Without an optimum it comes with ``converged`` False, a `message` and a
        ConvergenceWarning.

    Raises:
        FormulaError: a formula outside the grammar.
        DataError: data that the model cannot be fitted to, named; a penalty that does not fit the
            model, or is not finite where the search starts.
        RuntimeError: in a process that was forked after JAX had run.
        ValueError: another method, engine or penalty, or an engine that has no such structure.
        TypeError: an argument that `fit` does not have.

    Computes in float64 whatever JAX's settings, and changes none of them. In processes of
    `multiprocessing`, start them by ``get_context("spawn")``, or by joblib's default backend: JAX
    does not work in one that is forked (Linux's default before Python 3.14) after it has run.

    Examples:
        Reaction times of 18 people over ten days with little sleep; each person has a line with an
        intercept and a slope of their own:

        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
        >>> fit.params.round(2).to_dict()
        {'(Intercept)': 251.41, 'Days': 10.47}
        >>> fit.coefficients().loc["Days", ["std_error", "df"]].round(2).to_dict()
        {'std_error': 1.55, 'df': 17.0}
        >>> fit.variances.round(1).to_list()
        [612.1, 35.1, 654.9]

        ``print(fit)`` shows the summary, and `LMMResults` lists what else there is: tests,
        marginal means, intervals, predictions, tables for papers.
    """
    refuse_arguments("fit", others)
    is_reml(method)
    made = partial(
        model_frame,
        formula,
        data,
        weights=weights,
        offset=offset,
        context=context,
        kernels=kernels,
    )
    options = method, structure, context, max_iterations, LMMResults, engine, penalty
    if not isinstance(residual, (list, tuple)):
        alone: Any = residual  # another type is refused by name
        return fit_frame(made(residual=alone), *options)
    texts = list(dict.fromkeys(residual))
    if not texts:
        raise ValueError("residual=[] has nothing to try; None is for independent residuals")
    frames = {text: made(residual=text) for text in texts}
    return fit_in_turn(frames, lambda frame: fit_frame(frame, *options))
