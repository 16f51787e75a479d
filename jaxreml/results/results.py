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
from jaxreml.results import storage, tables
from jaxreml.results.plots.residuals import diagnostics as plot


@dataclass(frozen=True, eq=False, repr=False)
class LMMResults(FittedModel):
    """A fitted linear mixed model.

    Its fields, plain values and arrays, are those of `FittedModel`, one to one with `save`; the
    labelled views are properties: fixed effects (`params`, `bse`, `tvalues`, `pvalues`, `vcov`,
    `conf_int`), random effects (`variance_components`, `correlations`, `cov_re`, `random_effects`),
    fit statistics (`llf`, `aic`, `bic`), rows (`fittedvalues`, `resid`) and how it ended
    (`converged`, `is_singular`, `message`). `tidy`, `glance` and `augment` give frames as
    broom.mixed does. Tests, intervals, comparisons, predictions and diagnostics are methods.
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

    # Tables, figures and files
    summary = tables.summary
    tidy = tables.tidy
    glance = tables.glance
    augment = tables.augment
    plot = plot
    save = storage.save

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<LMMResults {self.formula!r}, {self.method}, criterion {self.criterion:.4f}>"

    @classmethod
    def load(cls, path: str | Path) -> LMMResults:
        """Read a fit that `save` wrote; see `storage.read`."""
        return storage.read(path, cls)


def load(path: str | Path) -> LMMResults:
    """Read a fit that `LMMResults.save` wrote.

    Raises:
        DataError: a file that is not one, or of a later version.
    """
    return LMMResults.load(path)
