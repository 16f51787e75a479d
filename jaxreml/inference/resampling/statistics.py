"""Statistics of a fit: functions g(beta, components), mapped over many refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from jaxreml.backend.compilation import remembered
from jaxreml.backend.lazy import jax, jnp
from jaxreml.backend.runtime import neutral
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import Layout
from jaxreml.inference.parameters import components
from jaxreml.inference.parameters.components import Components
from jaxreml.inference.parameters.delta import interior
from jaxreml.inference.parameters.linearised import scale_of
from jaxreml.inference.parameters.variances import (
    Named,
    Places,
    derivatives,
    estimates,
    named_readings,
)
from jaxreml.many.numbers import Fits
from jaxreml.model.covariance import natural

Array = Any  # NumPy's or JAX's

Statistic = Callable[[Array, Components], Any]
NEGLIGIBLE = 1e-9  # of a derivative
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


def default(fit: FittedModel) -> Default:
    """The default statistics of a fit."""
    return Default(fit.fixed_names, fit.layout, tuple(named_readings(fit)))


@dataclass(frozen=True)
class Default:
    """Fixed effects, sigma, SDs, correlations within terms, other parameters and log-variances.

    Attributes:
        fixed: names of the fixed effects.
        layout: what the variance parameters are of.
        known: what describes the covariances.
    """

    fixed: tuple[str, ...]
    layout: Layout
    known: tuple[Named, ...]

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """Which of `known` follow the fixed effects, and of which logarithms of variances do."""
        kinds = [own.kind for own in self.known]

        def of(*wanted: str) -> list[int]:
            return [k for k, kind in enumerate(kinds) if kind in wanted]

        return [*of("sigma"), *of("sd"), *of("cor"), *of("parameter")], [*of("sd"), *of("sigma")]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all."""
        shown, logs = self._order
        found = [f"beta[{name}]" for name in self.fixed]
        for own in (self.known[k] for k in shown):
            label = ", ".join(own.effects) if own.kind == "cor" else own.term
            prefix = {"sd": "sd", "cor": "correlation", "parameter": own.term}.get(own.kind)
            label = own.group if own.kind == "parameter" else f"{own.group}, {label}"
            found.append("sigma" if prefix is None else f"{prefix}[{label}]")
        for own in (self.known[k] for k in logs):
            label = own.group if own.kind == "sigma" else f"{own.group}, {own.term}"
            found.append(f"log_variance[{label}]")
        return tuple(found)

    @cached_property
    def scales(self) -> tuple[Any, ...]:
        """On which each is studentised, as `scale_of` takes them."""
        usual = {"sigma": "log", "sd": "log", "cor": "fisher"}
        shown, logs = self._order
        of_known = [usual.get(own.kind, own.reading.transform) for own in self.known]
        return (*[None] * len(self.fixed), *(of_known[k] for k in shown), *[None] * len(logs))

    @cached_property
    def _places(self) -> Places:
        return Places.of(self.layout.covariance, list(self.known))

    def values(self, beta: Array, theta: Array, sigma: Array, parameters: Array) -> np.ndarray:
        """All, (k, ...), at arrays (p, ...), (m, ...), (...) and (parameters, ...)."""
        squares = natural.omega_from_theta(theta, self.layout.covariance.sizes)
        whole = sigma**2 * np.concatenate([squares, np.ones_like(squares[:1])])
        with np.errstate(all="ignore"):
            found = self._places.values(whole, parameters)
            shown, logs = self._order
            correlations = np.array([own.kind == "cor" for own in self.known])
            found[correlations] = np.clip(found[correlations], -1.0, 1.0)
            return np.concatenate([beta, found[shown], 2 * np.log(found[logs])])

    def slopes(self, fit: FittedModel) -> tuple[np.ndarray, np.ndarray]:
        """As the function `slopes`."""
        covariance, p = self.layout.covariance, len(self.fixed)
        at = covariance.finite(fit.parameters)
        with derivatives(covariance), np.errstate(all="ignore"):
            found = self._places.slopes(covariance, at)
            values = estimates(fit, list(self.known))
        shown, logs = self._order
        none = np.zeros((len(shown) + len(logs), p))
        with np.errstate(invalid="ignore", divide="ignore"):
            of_logs = 2 * found[logs] / values[logs, None]
        rows = np.concatenate([np.zeros((p, len(at))), found[shown], np.nan_to_num(of_logs)])
        return np.concatenate([np.eye(p), none]), rows

    def errors(self, fits: Fits, fit: FittedModel) -> np.ndarray:
        """Standard errors on the `scales`, (b, k); NaN for what depends on several parameters."""
        column, factor = self._alone(fit)
        unknown = np.full((len(fits.se), 1), np.nan)
        spread = np.concatenate([fits.parameters_se, unknown], axis=1)[:, column] * factor
        shown, logs = self._order
        return np.concatenate([fits.se, spread[:, shown], 2 * spread[:, logs]], axis=1)

    def _alone(self, fit: FittedModel) -> tuple[np.ndarray, np.ndarray]:
        """The parameter that each of `known` follows from alone, or -1, and its factor on the
        scale: one half for logarithms of SDs, one for what is a parameter."""
        covariance, at = self.layout.covariance, interior(fit)
        with derivatives(covariance), np.errstate(all="ignore"):
            slope = self._places.slopes(covariance, at)
            omega, log_sigma2 = covariance.natural(at)
            whole = covariance.whole(np.asarray(omega))
            whole = np.exp(np.asarray(log_sigma2)) * np.append(whole, 1.0)
            values = self._places.values(whole, at)
            kinds = {"sigma": "log", "sd": "log", "cor": "fisher"}
            for k, own in enumerate(self.known):
                transform = scale_of(kinds.get(own.kind, own.reading.transform))
                slope[k] *= transform.slope(values[k])
        wanted = np.array([0.5 if own.kind in ("sd", "sigma") else 1.0 for own in self.known])
        moved = np.abs(slope) > NEGLIGIBLE
        alone = moved.sum(axis=1) == 1
        column = np.argmax(moved, axis=1)
        found = slope[np.arange(len(slope)), column]
        alone &= np.abs(found - wanted) < NEGLIGIBLE
        return np.where(alone, column, -1), wanted


def evaluate(
    function: Statistic | Default, fits: Fits, layout: Layout
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the statistics and their values, (b, k).

    Raises:
        ValueError: the function gives something else than numbers, arrays or a dict of them.
    """
    if isinstance(function, Default):
        found = function.values(fits.beta.T, fits.theta.T, fits.sigma, fits.parameters.T)
        return function.names, found.T
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


def slopes(function: Statistic | Default, fit: FittedModel) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the statistics in beta, (k, p), and in `Estimate.parameters`."""
    if isinstance(function, Default):
        return function.slopes(fit)
    with neutral():
        slopes = _slopes(function, fit.layout)(fit.beta, components.finite(fit))
        return tuple(np.asarray(slope) for slope in slopes)  # pyright: ignore


@remembered
def _slopes(function: Statistic, layout: Layout) -> Callable[..., tuple[Array, Array]]:
    def flat(beta: Array, parameters: Array) -> Array:
        return _flat(function(beta, components.of_parameters(parameters, layout)))

    return jax.jit(jax.jacfwd(flat, argnums=(0, 1)))
