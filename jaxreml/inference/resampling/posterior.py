"""Bayesian posteriors: variance parameters by NUTS on the integrated likelihood, the rest exactly.

With a flat prior of the fixed effects, the restricted likelihood is the likelihood with fixed and
random effects integrated out. So a sampler moves the few variance parameters only, on a smooth
density without funnels, and fixed and random effects are drawn from the normal distribution that
they have given these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.resampling.priors import log_prior
from jaxreml.inference.resampling.statistics import default
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.objective import reml_objective
from jaxreml.optimum.effects import conditional_modes, unexplained

Array = Any  # NumPy's or JAX's

JITTER = 0.5  # standard deviation of starts around the estimate, in coordinates
LEAST = 0.1  # relative SD that a chain starts from where a variance is estimated as zero
SHOWN = ("beta", "sigma", "sd", "correlation")  # kinds of variables in a summary


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Draws from the posterior distribution of a model; `posterior` has an example.

    Attributes:
        fit: of the model, by likelihood.
        parameters: (chains, draws, k), of `fit.parameter_names`.
        variables: by name (chains, draws), what `Bootstrap` has: fixed effects, sigma, SDs,
            correlations and log-variances.
        effects: per random term (chains, draws, levels, effects), or None if not asked for.
        divergent: (chains, draws) booleans, where the sampler's integration failed.
        gradients: (chains, draws), how many each draw took.
        seed: as given.
    """

    fit: FittedModel
    parameters: np.ndarray
    variables: dict[str, np.ndarray]
    effects: tuple[np.ndarray, ...] | None
    divergent: np.ndarray
    gradients: np.ndarray = field(repr=False)
    seed: int

    @property
    def draws(self) -> pd.DataFrame:
        """All draws of all variables, chain after chain: index chain and draw."""
        chains, draws = self.divergent.shape
        index = pd.MultiIndex.from_product([range(chains), range(draws)], names=["chain", "draw"])
        columns = {name: values.reshape(-1) for name, values in self.variables.items()}
        return pd.DataFrame(columns, index)

    def to_inference_data(self) -> Any:
        """The draws for ArviZ: groups ``posterior`` and ``sample_stats``. Random effects, if they
        were asked for, are variables over their level and effect.

        Returns:
            An ``InferenceData``.

        Raises:
            DataError: ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError:
            raise DataError("to_inference_data needs ArviZ: pip install 'jaxreml[bayes]'") from None
        found: dict[str, Any] = dict(self.variables)
        coordinates, dimensions = {}, {}
        for k, own in enumerate(self.effects or ()):
            grouping = self.fit.groupings[k]
            before = sum(other.name == grouping.name for other in self.fit.groupings[:k])
            group = f"{grouping.name} {before + 1}" if before else grouping.name
            name, labels = f"effects[{group}]", (f"{group} level", f"{group} effect")
            found[name], dimensions[name] = own, list(labels)
            coordinates |= dict(zip(labels, (grouping.levels, grouping.effects), strict=True))
        sample_stats = {"diverging": self.divergent, "n_steps": self.gradients}
        return arviz.from_dict(
            posterior=found,
            sample_stats=sample_stats,
            coords=coordinates,
            dims=dimensions,
            attrs={"formula": self.fit.formula, "seed": self.seed},
        )

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """ArviZ's effective sample sizes and R-hat by variable.

        Raises:
            DataError: ArviZ is not installed.
        """
        import arviz

        data = self.to_inference_data().posterior[list(self.variables)]
        found = {
            "ess_bulk": arviz.ess(data, method="bulk"),
            "ess_tail": arviz.ess(data, method="tail"),
            "r_hat": arviz.rhat(data),
        }
        return pd.DataFrame(
            {
                label: {name: float(values[name]) for name in self.variables}
                for label, values in found.items()
            }
        )

    def summary(self, prob: float = 0.95) -> pd.DataFrame:
        """Mean, SD, median and an interval of equal tails, with effective sample sizes and R-hat.

        Trust draws whose R-hat is below 1.01 and whose effective sizes are some hundreds.

        Args:
            prob: of the interval.

        Raises:
            ValueError: a probability outside (0, 1).
            DataError: ArviZ is not installed.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must be between 0 and 1, not {prob}")
        names = [name for name in self.variables if name.partition("[")[0] in SHOWN]
        draws = self.draws[names]
        tail = (1 - prob) / 2
        columns = {
            "mean": draws.mean(),
            "sd": draws.std(),
            "median": draws.median(),
            "lower": draws.quantile(tail),
            "upper": draws.quantile(1 - tail),
        }
        return pd.concat([pd.DataFrame(columns), self.diagnostics.loc[names]], axis=1)

    def __repr__(self) -> str:
        chains, draws = self.divergent.shape
        worst = ""
        try:
            found = self.diagnostics
            worst = (
                f"; R-hat at most {found['r_hat'].max():.3f}, effective draws at least "
                f"{found[['ess_bulk', 'ess_tail']].min().min():.0f}"
            )
        except (ImportError, DataError):
            pass
        return (
            f"<Posterior of {self.fit.formula!r}: {chains} chains of {draws} draws, "
            f"{int(self.divergent.sum())} divergent{worst}>"
        )


def posterior(
    fit: FittedModel,
    priors: Any = None,
    *,
    draws: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    seed: int = 0,
    random_effects: bool = False,
) -> Posterior:
    """Draw from the Bayesian posterior of the model.

    The fixed effects have a flat prior, so that the restricted likelihood is the likelihood of the
    variance parameters with all effects integrated out. The No-U-Turn sampler of blackjax draws
    these (Hoffman and Gelman 2014, J. Machine Learning Research 15:1593), and effects are drawn
    from the normal distribution that they have given them.

    Args:
        fit: of the model; its estimates are where chains start from, and its method does not
            matter.
        priors: a dict of densities by name. ``"Subject, Days"`` is for the standard deviation of
            one random effect, ``"Subject"`` for all of a grouping factor, ``"Residual"`` for the
            residual one: JAX functions of the SD to the logarithm of its density, for example
            ``lambda sd: jax.scipy.stats.expon.logpdf(sd, scale=20)``. ``"correlation"`` is a
            number, the eta of an LKJ prior of the correlation matrices. What is left out is
            half-t with 3 degrees of freedom and a scale of 2.5 SDs of the response, divided by the
            root mean square of the effect's column; for correlations eta is 1, every correlation
            matrix alike. Or one function of all `parameters` (log-variances and coordinates of
            correlations, as `parameter_names` has them) to the logarithm of their density.
        draws: kept of each chain.
        warmup: before them, in which steps and scales are tuned.
        chains: independent ones, for R-hat.
        seed: of all random numbers.
        random_effects: whether to draw the random effects too.

    Raises:
        DataError: names that the model does not have; a fit with ``residual=`` or ``kernels=``, so
            far; blackjax is not installed; a prior that is not finite at the start.
        ValueError: priors of another kind, numbers of draws below 1.

    Examples:
        >>> small = jaxreml.fit("Reaction ~ Days + (1 | Subject)", data)
        >>> drawn = small.posterior(draws=200, warmup=200, chains=2, random_effects=True)
        >>> drawn.summary().loc["beta[Days]", ["mean", "sd"]].round(0).tolist()
        [10.0, 1.0]
        >>> drawn.draws["sd[Subject, (Intercept)]"].shape, drawn.effects[0].shape
        ((400,), (2, 200, 18, 1))
        >>> drawn.to_inference_data().posterior["sigma"].shape
        (2, 200)
    """
    fit.require_likelihood("draw from the posterior")
    fit.require_independent("draw from the posterior")
    fit.require_independent_levels("draw from the posterior")
    for what, count in (("draws", draws), ("warmup", warmup), ("chains", chains)):
        if not (isinstance(count, (int, np.integer)) and count >= 1):
            raise ValueError(f"{what} must be a number of at least 1, not {count!r}")
    prior = log_prior(fit, priors)
    rng = np.random.default_rng(seed)
    start = _start(fit)
    with neutral():
        _require_finite(prior, start)
        chain = _sampler(prior, fit, draws, warmup)
        runs = []
        for _ in range(chains):  # one by one: side by side they wait for the longest of each draw
            own = jax.random.PRNGKey(int(rng.integers(2**31)))
            away = start + JITTER * rng.standard_normal(start.size) * _spreads(fit)
            runs.append(jax.device_get(chain(own, jnp.asarray(away))))
    parameters, divergent, gradients = (np.stack(parts) for parts in zip(*runs, strict=True))
    beta, effects, theta, sigma = _effects(fit, parameters, rng, random_effects)
    statistics = default(fit)
    last_first = (np.moveaxis(own, -1, 0) for own in (beta, theta, parameters))
    of_beta, of_theta, of_parameters = last_first
    values = statistics.values(of_beta, of_theta, sigma, of_parameters)
    named = dict(zip(statistics.names, values, strict=True))
    return Posterior(fit, parameters, named, effects, divergent, gradients, seed)


def _start(fit: FittedModel) -> np.ndarray:
    """The estimates, away from the boundary."""
    parameters = np.array(fit.parameters)
    logs, others = fit.covariance.positions, fit.covariance.others
    scales = np.concatenate([np.mean(term.effects**2, axis=0) for term in fit.frame.terms])
    least = parameters[-1] + 2 * np.log(LEAST) - np.log(scales)
    parameters[logs[:-1]] = np.maximum(parameters[logs[:-1]], least)
    parameters[others] = np.clip(np.nan_to_num(parameters[others], nan=0.0), -2.0, 2.0)
    return parameters


def _spreads(fit: FittedModel) -> np.ndarray:
    """Standard errors, where they exist and are not large: what chains start apart by."""
    errors = np.sqrt(np.diagonal(fit.parameters_vcov_array))
    return np.where(np.isfinite(errors), np.minimum(errors, 1.0), 1.0)


def _require_finite(prior: Any, start: np.ndarray) -> None:
    value = prior(jnp.asarray(start))
    if np.shape(value) != () or not np.isfinite(value):
        raise DataError(
            f"the logarithm of the prior density is {value} where chains start, at parameters "
            f"{np.round(start, 3).tolist()}: it must be a finite number"
        )


def _sampler(prior: Any, fit: FittedModel, draws: int, warmup: int) -> Any:
    """From a key and a start (k,) to the draws (draws, k) of a chain, which of them diverged, and
    how many gradients each took; compiled."""
    try:
        import blackjax as package
    except ImportError:
        raise DataError("posterior needs blackjax: pip install 'jaxreml[bayes]'") from None
    blackjax: Any = package
    design = jax.tree.map(jnp.asarray, fit.design.without_names())

    @jax.jit
    def chain(key: Array, start: Array) -> Any:
        def density(parameters: Array) -> Array:
            return prior(parameters) - reml_objective(parameters, design) / 2

        of_warmup, of_draws = jax.random.split(key)
        tuning = blackjax.window_adaptation(blackjax.nuts, density)
        (state, tuned), _ = tuning.run(of_warmup, start, num_steps=warmup)
        step = blackjax.nuts(density, **tuned).step

        def advance(state: Any, key: Array) -> Any:
            about: Any
            state, about = step(key, state)
            return state, (state.position, about.is_divergent, about.num_integration_steps)

        return jax.lax.scan(advance, state, jax.random.split(of_draws, draws))[1]

    return chain


def _effects(
    fit: FittedModel, parameters: np.ndarray, rng: np.random.Generator, wanted: bool
) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None, np.ndarray, np.ndarray]:
    """Fixed and random effects drawn given the parameters (..., k), with theta and sigma.

    With b0 and errors drawn from the model, y0 = Z b0 + errors: the estimates of (beta, b) from
    y - y0, plus (0, b0), have their joint distribution given y (conditioning by kriging, Matheron).
    """
    frame, covariance = fit.frame, fit.covariance
    flat = parameters.reshape(-1, parameters.shape[-1])
    count, n = len(flat), len(frame.X)
    omegas, logs = covariance.natural(flat.T)
    thetas = np.empty((count, len(omegas)))
    beta = np.empty((count, frame.X.shape[1]))
    effects = [np.empty((count, len(t.levels), t.effects.shape[1])) for t in frame.terms]
    basis, root = frame.basis(fit.structure), 1 / np.sqrt(fit.prior_weights)
    for place in range(count):
        factors = covariance.factors(covariance.chart_of_omega(omegas[:, place]))
        thetas[place] = natural.join_triangles(factors)
        sigma = np.exp(logs[place] / 2)
        own = [
            sigma * term.drawn(rng, 1, factor)[0]
            for term, factor in zip(frame.terms, factors, strict=True)
        ]
        y = fit.y - sigma * rng.standard_normal(n) * root
        for term, b in zip(frame.terms, own, strict=True):
            y -= np.sum(term.effects * b[term.codes], axis=1)
        design = Design.of(basis, basis.response(y))
        inner, _ = design.units.omega(flat[place], covariance)
        beta[place] = _fixed_effects(inner, design)
        if wanted:
            modes = conditional_modes(inner, design)
            for kept, mode, b in zip(effects, modes, own, strict=True):
                kept[place] = mode + b
    shape = parameters.shape[:-1]
    given = tuple(own.reshape(*shape, *own.shape[1:]) for own in effects) if wanted else None
    sigmas = np.exp(logs / 2).reshape(shape)
    return beta.reshape(*shape, -1), given, thetas.reshape(*shape, -1), sigmas


def _fixed_effects(omega: np.ndarray, design: Design) -> np.ndarray:
    """Generalised least squares at relative covariances, (p,)."""
    rest = unexplained(design.structure.marginal(omega).gram, design.p)
    return design.beta_ols - np.linalg.solve(design.basis, rest[: design.p, 0])
