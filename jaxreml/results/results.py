"""`LMMResults`: what `fit` returns, and all that can be asked of it.

Its methods are functions of the rooms below, whose first argument is the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxreml.data.outputs import in_library
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed import wald
from jaxreml.inference.fixed.anova import anova
from jaxreml.inference.fixed.joint_tests import joint_tests
from jaxreml.inference.fixed.means import contrast, emmeans, emtrends
from jaxreml.inference.fixed.robust import robust
from jaxreml.inference.likelihood.profile import profile
from jaxreml.inference.parameters import shares
from jaxreml.inference.parameters.delta import delta
from jaxreml.inference.parameters.variances import parameters_vcov, variance_parameters
from jaxreml.inference.resampling.bootstrap import bootstrap
from jaxreml.inference.resampling.posterior import posterior
from jaxreml.inference.resampling.simulation import simulate
from jaxreml.inference.rows import diagnostics
from jaxreml.inference.rows.prediction import predict
from jaxreml.inference.selection.deletion import drop1, ranova, step
from jaxreml.results import fit_tables, maketables, storage, tables
from jaxreml.results.made_by import made_by
from jaxreml.results.plots.residuals import diagnostics as plot


@made_by("`jaxreml.fit`")
@dataclass(frozen=True, eq=False, repr=False)
class LMMResults(FittedModel):
    """A fitted linear mixed model, as `jaxreml.fit` returns it and `jaxreml.load` reads it.

    What there is, by subject; ``help(LMMResults.predict)`` and so on say more.

    To look at: `summary` (``print(fit)``), `tidy`, `glance` and `augment` (frames as broom.mixed
    makes them), `to_latex`, `to_html` and `to_markdown` (tables for papers), `report` (a
    sentence); notebooks show the model table.

    Fixed effects: `params`, `bse`, `tvalues`, `pvalues`, `vcov`, `coefficients`, `conf_int`,
    `test`, `robust`, `anova`, `joint_tests`, `emmeans`, `contrast`, `emtrends`, `df_satterthwaite`,
    `vcov_kenward_roger`.

    Random effects and variances: `random_effects`, `random_effects_se`, `variance_components`,
    `variances`, `log_variances`, `log_variance_se`, `correlations`, `cov_re`,
    `variance_parameters`, `parameters_vcov`, `icc`, `r2`, `variance_shares`, `repeatability`,
    `heritability`, `delta` for any function of the parameters.

    Likelihood: `llf`, `criterion`, `aic`, `bic`, `dof`, `profile`; `jaxreml.compare` for several
    fits; `drop1`, `ranova` and `step` leave terms out.

    Simulation: `simulate`, `bootstrap`; `jaxreml.power`. Bayes: `posterior`.

    Rows: `predict`, `fittedvalues`, `resid`, `residuals`, `leverage`, `cooks_distance`, `dfbetas`,
    `influence`, `nobs`, `ngroups`, `n_dropped`. `plot` and `jaxreml.plots` draw them.

    How it ended: `converged`, `is_singular`, `message`, `status`, `n_iter`, `gradient_norm`.

    Files: `save` and `load`; it can also be pickled and copied.

    Its fields, plain values and arrays, are those of `jaxreml.fitting.fitted.FittedModel`.

    Properties are pandas, labelled. Methods return frames of the library that the data came in
    (`library`: pandas, polars or pyarrow), and of another with ``output="polars"`` for example.

    Examples:
        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
        >>> fit
        <LMMResults 'Reaction ~ Days + (Days | Subject)', REML, criterion 1743.6283>
        >>> fit.params.round(2).to_dict()
        {'(Intercept)': 251.41, 'Days': 10.47}
        >>> fit.random_effects["Subject"].round(1).head(2)
                 (Intercept)  Days
        Subject
        308              2.3   9.2
        309            -40.4  -8.6
        >>> fit.report("Days")
        'b = 10.47, SE = 1.55, 95% CI [7.21, 13.73], t(17.0) = 6.77, p < .001'
        >>> fit.predict({"Days": [12], "Subject": ["308"]}).round(1).tolist()
        [489.7]

        ``print(fit)`` shows the summary of lmerTest, and ``fit.plot()`` draws the residuals.
    """

    # Fixed effects
    robust = robust
    coefficients = in_library(wald.coefficients, "term")
    test = in_library(wald.test, "hypothesis")
    conf_int = in_library(wald.conf_int, "parameter")
    anova = in_library(anova, "term")
    joint_tests = in_library(joint_tests)
    emmeans = emmeans
    contrast = contrasts = in_library(contrast)  # the second by its former name
    emtrends = emtrends
    df_satterthwaite = property(wald.df_satterthwaite)
    pvalues = property(wald.pvalues)
    vcov_kenward_roger = property(wald.vcov_kenward_roger)

    # Models with a term less
    drop1 = in_library(drop1, "term")
    ranova = in_library(ranova, "term")
    step = step

    # Variance parameters and functions of all parameters
    delta = in_library(delta, "function")
    variance_parameters = in_library(variance_parameters, "parameter")
    parameters_vcov = in_library(parameters_vcov, "parameter")
    icc = in_library(shares.icc, "function")
    variance_shares = in_library(shares.variance_shares, "part")
    repeatability = in_library(shares.repeatability, "function")
    heritability = in_library(shares.heritability, "function")
    r2 = in_library(shares.r2, "function")

    # Likelihood and simulation
    profile = profile
    simulate = in_library(simulate)
    bootstrap = bootstrap
    posterior = posterior

    # Rows
    predict = in_library(predict)
    residuals = in_library(diagnostics.residuals)
    leverage = in_library(diagnostics.leverage)
    cooks_distance = in_library(diagnostics.cooks_distance)
    dfbetas = in_library(diagnostics.dfbetas)
    influence = diagnostics.influence

    # Tables, figures and files
    summary = tables.summary
    tidy = in_library(tables.tidy)
    glance = in_library(tables.glance)
    augment = in_library(tables.augment)
    to_latex = fit_tables.to_latex
    to_html = fit_tables.to_html
    to_markdown = fit_tables.to_markdown
    report = fit_tables.report
    _repr_html_ = fit_tables.repr_html
    plot = plot
    save = storage.save

    # maketables' plug-in format
    __maketables_coef_table__ = property(maketables.coef_table)
    __maketables_depvar__ = property(maketables.depvar)
    __maketables_stat__ = maketables.stat
    __maketables_default_stat_keys__ = property(maketables.default_stat_keys)
    __maketables_vcov_info__ = property(maketables.vcov_info)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<LMMResults {self.formula!r}, {self.method}, criterion {self.criterion:.4f}>"

    @classmethod
    def load(cls, path: str | Path, *, context: Mapping[str, Any] | None = None) -> LMMResults:
        """Read a fit that `save` wrote; the same as `jaxreml.load`.

        Examples:
            >>> fit.save("sleep.json", data=False)
            >>> jaxreml.LMMResults.load("sleep.json").has_rows
            False
        """
        return storage.read(path, cls, context)


def load(path: str | Path, *, context: Mapping[str, Any] | None = None) -> LMMResults:
    """Read a fit that `LMMResults.save` wrote.

    Args:
        path: of the file.
        context: that of the fit: names that its formula uses besides columns, such as functions,
            which are not saved. A covariance of your own must be there.

    Raises:
        DataError: a file that is not one, or of a later version; a covariance of your own that is
            not in the context, or another one.

    Examples:
        >>> fit.save("sleep.json")
        >>> jaxreml.load("sleep.json").params.equals(fit.params)
        True
    """
    return LMMResults.load(path, context=context)
