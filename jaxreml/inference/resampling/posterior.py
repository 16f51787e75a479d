"""Bayesian posteriors: variance parameters by NUTS on the integrated likelihood, the rest exactly.

With a flat prior of the fixed effects, the restricted likelihood is the likelihood with fixed and
random effects integrated out. So a sampler moves the few variance parameters only, on a smooth
density without funnels, and fixed and random effects are drawn from the normal distribution that
they have given these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.backend.compilation import quick_jit, spare_memory_maps
from jaxreml.backend.lazy import deferred, jax, jnp
from jaxreml.backend.progress import progress_bar
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.resampling.conditional import all_effects, fixed_effects
from jaxreml.inference.resampling.priors import log_prior, log_variance_scales
from jaxreml.inference.resampling.statistics import default
from jaxreml.model.arrays import read_terms
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.objective import reml_objective
from jaxreml.model.structures.base import OfRows

Array = Any  # NumPy's or JAX's

JITTER = 0.5  # standard deviation of starts around the estimate, in coordinates
LEAST = 0.1  # relative SD that a chain starts from where a variance is estimated as zero
FAR = 2.0  # a coordinate that it starts from where that is estimated at its limit
BLOCKS = 10  # that the draws of a chain are made in, for the progress bar
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
    progress: bool | None = None,
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
            number, the eta of an LKJ prior of the correlation matrices. A distribution of numpyro's
            takes the place of a function. What is left out is half-t with 3 degrees of freedom and
            a scale of 2.5 SDs of the response, divided by the root mean square of the effect's
            column; for correlations eta is 1, every correlation matrix alike, and the one or few
            that describe other families are uniform. Parameters of another kind, ranges and those
            of a covariance of one's own, have no default: they go by their name in
            `parameter_names`, with a function of them. Or one function of all `parameters`
            (log-variances and coordinates of correlations, as `parameter_names` has them) to the
            logarithm of their density.
        draws: kept of each chain.
        warmup: before them, in which steps and scales are tuned.
        chains: independent ones, for R-hat.
        seed: of all random numbers.
        random_effects: whether to draw the random effects too.
        progress: show a progress bar on stderr; if stderr is a terminal, if left out.

    Raises:
        DataError: names that the model does not have, or parameters without a default; a fit
            without an optimum; residuals at so many times that JAX has no derivatives for them;
            blackjax is not installed; a prior that is not finite at the start.
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
    fit.require_optimum("draw from the posterior")
    fit.require_likelihood("draw from the posterior")
    for what, count in (("draws", draws), ("warmup", warmup), ("chains", chains)):
        if not (isinstance(count, (int, np.integer)) and count >= 1):
            raise ValueError(f"{what} must be a number of at least 1, not {count!r}")
    if isinstance(fit.design.structure, OfRows):
        raise DataError(
            f"cannot draw from the posterior of a fit with residual={fit.residual.text!r} at so "  # pyright: ignore
            "many different times: JAX has no derivatives for it"
        )
    _require_blackjax()
    prior = log_prior(fit, priors)
    spare_memory_maps()
    rng = np.random.default_rng(seed)
    start = _start(fit)
    with (
        neutral(),
        progress_bar(
            chains * (warmup + draws), progress, "{task.fields[rate]:.0f} draws/s", divergent=0
        ) as advance,
    ):
        design = jax.tree.map(jnp.asarray, fit.design.without_names())
        _require_finite(prior, start)
        runs = []
        for _ in range(chains):  # one by one: side by side they wait for the longest of each draw
            key = jax.random.PRNGKey(int(rng.integers(2**31)))
            away = start + JITTER * rng.standard_normal(start.size) * _spreads(fit)
            runs.append(_chain(key, away, design, prior, draws, warmup, advance))
        parts = (np.stack(part) for part in zip(*runs, strict=True))
        parameters, divergent, gradients, beta = parts
        effects = None
        if random_effects:
            key = jax.random.PRNGKey(int(rng.integers(2**31)))
            beta, effects = jax.device_get(_with_effects(key, fit, parameters))
    return Posterior(
        fit, parameters, _variables(fit, beta, parameters), effects, divergent, gradients, seed
    )


def _require_blackjax() -> None:
    try:
        import blackjax  # noqa: F401
    except ImportError:
        raise DataError("posterior needs blackjax: pip install 'jaxreml[bayes]'") from None


def _start(fit: FittedModel) -> np.ndarray:
    """The estimates, away from the boundary."""
    parameters = np.array(fit.parameters)
    logs, others = fit.covariance.positions, fit.covariance.others
    scales = log_variance_scales(fit)
    least = parameters[-1] + 2 * np.log(LEAST * scales / scales[-1])
    parameters[logs] = np.maximum(parameters[logs], least)
    z = np.clip(np.nan_to_num(parameters[others]), -FAR, FAR)
    parameters[others] = np.where(np.isfinite(parameters[others]), parameters[others], z)
    return parameters


def _spreads(fit: FittedModel) -> np.ndarray:
    """Standard errors, where they exist and are not large: what chains start apart by."""
    errors = np.sqrt(np.diagonal(fit.parameters_vcov_array))
    return np.where(np.isfinite(errors), np.minimum(errors, 1.0), 1.0)


def _require_finite(prior: Any, start: np.ndarray) -> None:
    value = jax.jit(prior)(start)
    if np.shape(value) != () or not np.isfinite(value):
        raise DataError(
            f"the logarithm of the prior density is {value} where chains start, at parameters "
            f"{np.round(start, 3).tolist()}: it must be a finite number"
        )


def _chain(
    key: Array, start: np.ndarray, design: Design, prior: Any, draws: int, warmup: int, advance: Any
) -> tuple[np.ndarray, ...]:
    """A chain from a start (k,): its draws (draws, k), which of them diverged, how many gradients
    each took, and fixed effects given them (draws, p)."""
    of_warmup, of_draws = jax.random.split(key)
    state, tuned = _warmed_up(of_warmup, start, design, prior, warmup)
    advance(warmup)
    size = -(-draws // BLOCKS)
    blocks = []
    for key in jax.random.split(of_draws, -(-draws // size)):
        state, found = _drawn(key, state, tuned, design, prior, size)
        blocks.append(jax.device_get(found))
        advance(min(size, draws - size * (len(blocks) - 1)))
    return tuple(np.concatenate(part)[:draws] for part in zip(*blocks, strict=True))


def _density(design: Design, prior: Any) -> Any:
    return lambda parameters: prior(parameters) - reml_objective(parameters, design) / 2


@deferred(lambda: partial(quick_jit, static_argnums=(3, 4)))
def _warmed_up(key: Array, start: Array, design: Design, prior: Any, count: int) -> Any:
    """The state of the sampler and its tuning."""
    import blackjax as package

    blackjax: Any = package
    tuning = blackjax.window_adaptation(blackjax.nuts, _density(design, prior))
    (state, tuned), _ = tuning.run(key, start, num_steps=count)
    return state, tuned


@deferred(lambda: partial(quick_jit, static_argnums=(4, 5)))
def _drawn(key: Array, state: Any, tuned: Any, design: Design, prior: Any, count: int) -> Any:
    """The state after so many draws, and what `_chain` gives of them."""
    import blackjax as package

    blackjax: Any = package
    step = blackjax.nuts(_density(design, prior), **tuned).step

    def advance(state: Any, key: Array) -> Any:
        about: Any
        of_step, of_effects = jax.random.split(key)
        state, about = step(of_step, state)
        omega, log_sigma2 = design.units.omega(state.position, design.covariance)
        beta = fixed_effects(of_effects, omega, jnp.exp(log_sigma2 / 2), design)
        return state, (state.position, about.is_divergent, about.num_integration_steps, beta)

    return jax.lax.scan(advance, state, jax.random.split(key, count))


def _with_effects(
    key: Array, fit: FittedModel, parameters: np.ndarray
) -> tuple[Array, tuple[Array, ...]]:
    """Fixed and random effects drawn given the parameters (..., k)."""
    frame, covariance = fit.frame, fit.covariance
    basis = frame.basis(fit.structure)
    terms = read_terms(frame.random_terms, fit.nobs, np.dtype(float))

    def one(arguments: Any) -> Any:
        key, parameters, factors = arguments
        sigma = jnp.exp(parameters[-1] / 2)
        omega, _ = basis.units.omega(parameters, covariance)
        roots = [sigma * factor for factor in factors]
        return all_effects(key, omega, roots, sigma, fit.y, basis, terms)

    flat = parameters.reshape(-1, parameters.shape[-1])
    factors = [np.moveaxis(own, -1, 0) for own in _factors(fit, flat)]
    keys = jax.random.split(key, len(flat))
    found = jax.jit(lambda arguments: jax.lax.map(one, arguments))((keys, flat, factors))
    return jax.tree.map(lambda own: own.reshape(*parameters.shape[:-1], *own.shape[1:]), found)


def _factors(fit: FittedModel, parameters: np.ndarray) -> tuple[np.ndarray, ...]:
    """Relative Cholesky factors (q, q, n) at parameters (n, k)."""
    covariance = fit.covariance
    omega, _ = covariance.natural(parameters.T)
    return covariance.factors(covariance.canonical(covariance.chart_of_omega(omega)))


def _variables(fit: FittedModel, beta: np.ndarray, parameters: np.ndarray) -> dict[str, np.ndarray]:
    """What `Posterior.variables` has."""
    flat = parameters.reshape(-1, parameters.shape[-1])
    theta = natural.join_triangles(_factors(fit, flat))
    sigma, statistics = np.exp(flat[:, -1] / 2), default(fit)
    values = statistics.values(beta.reshape(len(flat), -1).T, theta, sigma, flat.T)
    shape = parameters.shape[:-1]
    return {name: own.reshape(shape) for name, own in zip(statistics.names, values, strict=True)}
