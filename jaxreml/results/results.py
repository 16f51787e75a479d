"""`LMMResults`: what `fit` returns, and all that can be asked of it.

Its methods are functions of the rooms below, whose first argument is the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.fixed import wald
from jaxreml.inference.fixed.anova import anova
from jaxreml.inference.fixed.joint_tests import joint_tests
from jaxreml.inference.fixed.means import contrast, emmeans, emtrends
from jaxreml.inference.likelihood.profile import profile
from jaxreml.inference.parameters import shares
from jaxreml.inference.parameters.delta import delta, parameters_vcov, variance_parameters
from jaxreml.inference.resampling.bootstrap import bootstrap
from jaxreml.inference.resampling.simulation import simulate
from jaxreml.inference.rows import diagnostics
from jaxreml.inference.rows.prediction import predict
from jaxreml.inference.selection.deletion import drop1, ranova, step
from jaxreml.results import fit_tables, storage, tables
from jaxreml.results.made_by import made_by


@made_by("`jaxreml.fit`")
@dataclass(frozen=True, eq=False, repr=False)
class LMMResults(FittedModel):
    """A fitted linear mixed model, as `jaxreml.fit` returns it and `jaxreml.load` reads it.

    What there is, by subject; `help(LMMResults.predict)` and so on say more.

    To look at: `summary` (``print(fit)``), `tidy`, `glance` and `augment` (frames as broom.mixed
    makes them), `to_latex`, `to_html` and `to_markdown` (tables for papers), `report` (a
    sentence); notebooks show the model table.

    Fixed effects: `params`, `bse`, `tvalues`, `pvalues`, `vcov`, `coefficients`, `conf_int`,
    `test`, `anova`, `joint_tests`, `emmeans`, `contrast`, `emtrends`, `df_satterthwaite`,
    `vcov_kenward_roger`.

    Random effects and variances: `random_effects`, `random_effects_se`, `variance_components`,
    `variances`, `log_variances`, `log_variance_se`, `correlations`, `cov_re`,
    `variance_parameters`, `parameters_vcov`, `icc`, `r2`, `variance_shares`, `repeatability`,
    `heritability`, `delta` for any function of the parameters.

    Likelihood: `llf`, `criterion`, `aic`, `bic`, `dof`, `profile`; `jaxreml.compare` for several
    fits; `drop1`, `ranova` and `step` leave terms out.

    Simulation: `simulate`, `bootstrap`; `jaxreml.power`.

    Rows: `predict`, `fittedvalues`, `resid`, `residuals`, `leverage`, `cooks_distance`, `dfbetas`,
    `influence`, `nobs`, `ngroups`, `n_dropped`. `jaxreml.plots` draws them.

    How it ended: `converged`, `is_singular`, `message`, `status`, `n_iter`, `gradient_norm`.

    Files: `save` and `load`; it can also be pickled and copied.

    Its fields, plain values and arrays, are those of `jaxreml.fitting.fitted.FittedModel`.

    Examples:
        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
        >>> fit
        <LMMResults 'Reaction ~ Days + (Days | Subject)', REML, criterion 1743.6283>
        >>> fit.params.round(2).to_dict()
        {'(Intercept)': 251.41, 'Days': 10.47}
    """

    # Fixed effects
    coefficients = wald.coefficients
    test = wald.test
    conf_int = wald.conf_int
    anova = anova
    joint_tests = joint_tests
    emmeans = emmeans
    contrast = contrasts = contrast  # the second by its former name
    emtrends = emtrends
    df_satterthwaite = property(wald.df_satterthwaite)
    pvalues = property(wald.pvalues)
    vcov_kenward_roger = property(wald.vcov_kenward_roger)

    # Models with a term less
    drop1 = drop1
    ranova = ranova
    step = step

    # Variance parameters and functions of all parameters
    delta = delta
    variance_parameters = variance_parameters
    parameters_vcov = parameters_vcov
    icc = shares.icc
    variance_shares = shares.variance_shares
    repeatability = shares.repeatability
    heritability = shares.heritability
    r2 = shares.r2

    # Likelihood and simulation
    profile = profile
    simulate = simulate
    bootstrap = bootstrap

    # Rows
    predict = predict
    residuals = diagnostics.residuals
    leverage = diagnostics.leverage
    cooks_distance = diagnostics.cooks_distance
    dfbetas = diagnostics.dfbetas
    influence = diagnostics.influence

    # Tables and files
    summary = tables.summary
    tidy = tables.tidy
    glance = tables.glance
    augment = tables.augment
    to_latex = fit_tables.to_latex
    to_html = fit_tables.to_html
    to_markdown = fit_tables.to_markdown
    report = fit_tables.report
    _repr_html_ = fit_tables.repr_html
    save = storage.save

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<LMMResults {self.formula!r}, {self.method}, criterion {self.criterion:.4f}>"

    @classmethod
    def load(cls, path: str | Path) -> LMMResults:
        """Read a fit that `save` wrote; see `storage.read`.

        Examples:
            >>> fit.save("sleep.json", data=False)
            >>> jaxreml.LMMResults.load("sleep.json").has_rows
            False
        """
        return storage.read(path, cls)


def load(path: str | Path) -> LMMResults:
    """Read a fit that `LMMResults.save` wrote.

    Raises:
        DataError: a file that is not one, or of a later version.

    Examples:
        >>> fit.save("sleep.json")
        >>> jaxreml.load("sleep.json").params.equals(fit.params)
        True
    """
    return LMMResults.load(path)
