"""Priors of variance parameters: densities of standard deviations and correlations, as densities of
the coordinates that a sampler moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxreml.backend.lazy import jax, jnp
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.model.covariance.unstructured import Unstructured

Array = Any  # JAX's
Density = Callable[[Array], Array]

CORRELATION = "correlation"
DEGREES = 3.0  # of the default half-t prior
WIDE = 2.5  # its scale, in standard deviations of the response


def log_prior(fit: FittedModel, priors: Any) -> Density:
    """The logarithm of the prior density of `fit.parameters`, up to a constant.

    Args:
        fit: of the model.
        priors: as in `posterior`.

    Raises:
        DataError: names that the model does not have; a covariance that has no default.
        ValueError: something else than functions and a number.
    """
    if callable(priors):
        return priors
    blocks = fit.covariance.blocks
    if not all(isinstance(block, Unstructured) for block in blocks):
        raise DataError(
            "priors by name are for (x | g) and (x || g): give priors=f, a JAX function of all "
            f"parameters ({', '.join(fit.parameter_names)}) to the logarithm of their density"
        )
    labels = [
        (group, effect, scale)
        for (group, effects), own in zip(fit.groups, _scales(fit), strict=True)
        for effect, scale in zip(effects, own, strict=True)
    ]
    labels.append((RESIDUAL, RESIDUAL, WIDE * _spread(fit)))
    given = _checked(priors, labels)
    eta = given.pop(CORRELATION, 1.0)
    densities = [
        given.get(f"{group}, {effect}", given.get(group, half_t(scale)))
        for group, effect, scale in labels
    ]
    positions = fit.covariance.positions
    exponents = _lkj_exponents(fit.covariance.sizes, float(eta))
    others = fit.covariance.others

    def density(parameters: Array) -> Array:
        logs = parameters[positions]
        sds = jnp.exp(logs / 2)
        # of an SD, times d SD / d log-variance
        parts = [own(sds[k]) + logs[k] / 2 for k, own in enumerate(densities)]
        z = parameters[others]
        log_cosh = jnp.abs(z) + jnp.log1p(jnp.exp(-2 * jnp.abs(z)))
        return sum(parts) - 2 * jnp.sum(exponents * log_cosh)

    return density


def half_t(scale: float) -> Density:
    """The logarithm of a half-t density with 3 degrees of freedom, up to a constant."""

    def density(sd: Array) -> Array:
        return jax.scipy.stats.t.logpdf(sd / scale, DEGREES)

    return density


def _spread(fit: FittedModel) -> float:
    return float(np.std(fit.y if fit.offset is None else fit.y - fit.offset))


def _scales(fit: FittedModel) -> list[np.ndarray]:
    """Scales of the default priors: of the response per root mean square of each effect."""
    spread = _spread(fit)
    return [WIDE * spread / np.sqrt(np.mean(term.effects**2, axis=0)) for term in fit.frame.terms]


def _checked(priors: Any, labels: list[tuple[str, str, float]]) -> dict[str, Any]:
    if priors is None:
        return {}
    if not isinstance(priors, Mapping):
        raise ValueError(
            "priors must be a dict of functions by name, or a function of all parameters, not "
            f"{type(priors).__name__}"
        )
    known = {f"{group}, {effect}" for group, effect, _ in labels} | {row[0] for row in labels}
    for name, given in priors.items():
        if name == CORRELATION:
            if not (isinstance(given, (int, float)) and given > 0):
                raise ValueError(
                    f"priors[{name!r}] must be a positive number, LKJ's eta: {given!r}"
                )
        elif name not in known:
            shown = ", ".join(sorted(known))
            raise DataError(f"priors has {name!r}; the model has {shown} and {CORRELATION!r}")
        elif not callable(given):
            raise ValueError(
                f"priors[{name!r}] must be a JAX function of a standard deviation to the logarithm "
                f"of its density, not {given!r}"
            )
    return dict(priors)


def _lkj_exponents(sizes: tuple[int, ...], eta: float) -> np.ndarray:
    """b of (1 - r^2)^b for each partial correlation r, d r / d z included (Lewandowski, Kurowicka
    and Joe 2009, J. Multivariate Analysis 100:1989): row by row, as coordinates are."""
    return np.array(
        [eta + (q - 2 - j) / 2 for q in sizes for i in range(1, q) for j in range(i)], float
    )
