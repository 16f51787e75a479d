"""Statistics of a fit: functions g(beta, components), mapped over many refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.compilation import remembered
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL, Layout, fisher_columns
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.components import Components
from jaxreml.many.numbers import Fits

Array = Any  # NumPy's or JAX's

Statistic = Callable[[Array, Components], Any]
TOGETHER = 1024  # refits that a statistic is computed of at a time


def fits_of(fit: FittedModel) -> Fits:
    """One fit as a batch of one, as far as statistics and their standard errors need it."""
    known: dict[str, Any] = dict.fromkeys(Fits._fields)
    known |= {
        "beta": fit.beta,
        "se": np.sqrt(np.diagonal(fit.vcov_array)),
        "sigma": np.asarray(fit.sigma),
        "theta": fit.theta,
        "parameters": fit.parameters,
        "parameters_se": np.sqrt(np.diagonal(fit.parameters_vcov_array)),
    }
    return Fits(*(None if part is None else part[None] for part in known.values()))  # pyright: ignore


def default(fit: FittedModel) -> Statistic:
    """The default statistics, equal for all fits of the same labels."""
    return Default(fit.fixed_names, fit.groups)


@dataclass(frozen=True)
class Default:
    """Fixed effects, sigma, SDs, correlations within terms and log-variances, by name.

    Of one fit, or of many on the last axis.

    Attributes:
        fixed: names of the fixed effects.
        terms: per term the grouping factor and the names of its effects.
    """

    fixed: tuple[str, ...]
    terms: tuple[tuple[str, tuple[str, ...]], ...]

    def __call__(self, beta: Array, components: Components) -> dict[str, Array]:
        """As any statistic."""
        xp = namespace(beta)
        found = {f"beta[{name}]": beta[k] for k, name in enumerate(self.fixed)}
        found["sigma"] = xp.sqrt(components[RESIDUAL])
        starts = dict.fromkeys(components, 0)
        correlations, logs = {}, {}
        for group, effects in self.terms:
            start = starts[group]
            starts[group] += len(effects)
            places = range(start, starts[group])
            matrix = components[group]
            for k, effect in zip(places, effects, strict=True):
                found[f"sd[{group}, {effect}]"] = xp.sqrt(matrix[k, k])
                logs[f"log_variance[{group}, {effect}]"] = xp.log(matrix[k, k])
            labelled = zip(places, effects, strict=True)
            for (j, first), (i, second) in combinations(labelled, 2):
                scale = xp.sqrt(matrix[i, i]) * xp.sqrt(matrix[j, j])
                correlations[f"correlation[{group}, {first}, {second}]"] = xp.clip(
                    matrix[i, j] / scale, -1.0, 1.0
                )
        logs[f"log_variance[{RESIDUAL}]"] = xp.log(components[RESIDUAL])
        return found | correlations | logs


def standard_errors(fits: Fits, layout: Layout) -> np.ndarray:
    """Standard errors of the default statistics on their `working_scale`, (b, k)."""
    of_logs = fits.parameters_se[:, layout.covariance.positions]
    of_fisher = fisher_columns(fits.parameters_se, layout.covariance.sizes)
    parts = [fits.se, of_logs[:, -1:] / 2, of_logs[:, :-1] / 2, of_fisher, of_logs]
    return np.concatenate(parts, axis=1)


def working_scale(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The scale on which a default statistic is studentised, and the way back."""
    if name == "sigma" or name.startswith("sd["):
        return np.log, np.exp
    if name.startswith("correlation["):
        return np.arctanh, np.tanh
    return np.asarray, np.asarray


def evaluate(function: Statistic, fits: Fits, layout: Layout) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the statistics and their values, (b, k).

    Raises:
        ValueError: the function gives something else than numbers, arrays or a dict of them.
    """
    if isinstance(function, Default):
        with np.errstate(all="ignore"):
            found = function(fits.beta.T, components.of_theta(fits.theta.T, fits.sigma, layout))
        return tuple(found), np.stack(list(found.values()), axis=1)
    b, p = fits.beta.shape
    size = min(TOGETHER, b)
    rows = []
    with neutral():
        names = _names(function, layout, p, fits.theta.shape[1])
        for start in range(0, b, max(size, 1)):  # of one size, for one compilation
            which = np.resize(np.arange(start, min(start + size, b)), size)
            values = _mapped(function, layout)(
                fits.beta[which], fits.theta[which], fits.sigma[which]
            )
            rows.append(np.asarray(values)[: b - start])
    return names, np.concatenate(rows) if rows else np.zeros((0, len(names)))


@remembered
def _mapped(function: Statistic, layout: Layout) -> Callable[..., Array]:
    def flat(beta: Array, theta: Array, sigma: Array) -> Array:
        return _flat(function(beta, components.of_theta(theta, sigma, layout)))

    return jax.jit(jax.vmap(flat))


def _flat(value: Any) -> Array:
    parts = [jnp.ravel(jnp.asarray(part, float)) for part in _parts(value).values()]
    return jnp.concatenate(parts)


def _parts(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {"statistic": value}


@lru_cache(maxsize=32)
def _names(function: Statistic, layout: Layout, p: int, m: int) -> tuple[str, ...]:
    """A name for every number that a statistic gives."""

    def parts(beta: Any, theta: Any, sigma: Any) -> dict[Any, Any]:
        found = _parts(function(beta, components.of_theta(theta, sigma, layout)))
        labels.extend(map(str, found))
        return {k: jnp.asarray(part) for k, part in enumerate(found.values())}

    labels: list[str] = []
    arguments = [jax.ShapeDtypeStruct(shape, float) for shape in ((p,), (m,), ())]
    try:
        leaves = jax.eval_shape(parts, *arguments)
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(
            "the statistic must be a JAX function g(beta, components) that gives a number, an "
            f"array or a dict of them: {error}"
        ) from error
    names = []
    for label, leaf in zip(labels, leaves.values(), strict=True):
        places = list(np.ndindex(leaf.shape))
        names += [f"{label}[{', '.join(map(str, place))}]" if place else label for place in places]
    return tuple(names)


def slopes(function: Statistic, fit: FittedModel) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the statistics in beta, (k, p), and in `Estimate.parameters`, (k, m + 1)."""

    with neutral():
        slopes = _slopes(function, fit.layout)(fit.beta, components.finite(fit))
        return tuple(np.asarray(slope) for slope in slopes)  # pyright: ignore


@remembered
def _slopes(function: Statistic, layout: Layout) -> Callable[..., tuple[Array, Array]]:
    def flat(beta: Array, parameters: Array) -> Array:
        return _flat(function(beta, components.of_parameters(parameters, layout)))

    return jax.jit(jax.jacfwd(flat, argnums=(0, 1)))
