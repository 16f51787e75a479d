"""Priors of variance parameters: densities of standard deviations and correlations, as densities of
the coordinates that a sampler moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import jax, jnp
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.model import linalg
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.correlations import Unrestricted
from jaxreml.model.covariance.distances import Distance
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.covariance.unstructured import Unstructured

Array = Any  # JAX's
Density = Callable[[Array], Array]

CORRELATION = "correlation"
DEGREES = 3.0  # of the default half-t prior
WIDE = 2.5  # its scale, in standard deviations of the response


def default_scales(columns: Any, spread: Any) -> Any:
    """Scales of the default priors of SDs of effects with columns (n, q), of a response with this
    standard deviation."""
    xp = namespace(columns)
    return WIDE * spread / xp.sqrt(xp.mean(columns**2, axis=0))


def log_prior(fit: FittedModel, priors: Any) -> Density:
    """The logarithm of the prior density of `fit.parameters`, up to a constant.

    Args:
        fit: of the model.
        priors: as in `posterior`.

    Raises:
        DataError: names that the model does not have; a parameter that has no default.
        ValueError: something else than functions and a number.
    """
    if callable(priors):
        return _hashable(priors)
    names, covariance = fit.parameter_names, fit.covariance
    starts = [*covariance.starts[:-1], len(names) - 1]
    groups = [group for group, _ in fit.labels]
    of_group = dict.fromkeys((len(names) - 1, *range(starts[-1])), RESIDUAL)
    for group, start, stop in zip(groups, starts, starts[1:], strict=False):
        of_group |= dict.fromkeys(range(start, stop), group)
    logs = covariance.positions.tolist()
    labels = {place: names[place].partition("[")[2][:-1] for place in logs}
    others = {names[place] for place in covariance.others}
    given = _checked(priors, {*labels.values(), *(of_group[place] for place in logs)}, others)
    eta = float(given.pop(CORRELATION, 1.0))
    _require_default(fit, starts, given)
    scales = log_variance_scales(fit)
    densities = [
        given.get(labels[place], given.get(of_group[place], HalfT(float(scale))))
        for place, scale in zip(logs, scales, strict=True)
    ]
    own = {int(place): given[names[place]] for place in covariance.others if names[place] in given}
    return Named(covariance, tuple(densities), tuple(own.items()), eta)


@dataclass(frozen=True)
class Named:
    """A prior by names: equal ones are one for `jax.jit`.

    Attributes:
        covariance: whose parameters these are.
        densities: of the SDs whose log-variances it has, the residual's last.
        others: places of other parameters, and their densities.
        eta: of LKJ's prior of the correlation matrices.
    """

    covariance: Covariance
    densities: tuple[Density, ...]
    others: tuple[tuple[int, Density], ...]
    eta: float

    def __call__(self, parameters: Array) -> Array:
        """The logarithm of its density, up to a constant."""
        logs = parameters[self.covariance.positions]
        sds = jnp.exp(logs / 2)
        # of an SD, times d SD / d log-variance
        total = jnp.sum(logs) / 2 + sum(own(sds[k]) for k, own in enumerate(self.densities))
        given = dict(self.others)
        total = total + sum(own(parameters[place]) for place, own in given.items())
        starts = self.covariance.starts
        for block, start, stop in zip(self.covariance.blocks, starts, starts[1:], strict=False):
            first = start + block.log_variances
            if first not in given:
                total = total + self._of_correlations(block, parameters[first:stop])
        return total

    def _of_correlations(self, block: Block, z: Array) -> Array:
        """LKJ's density, or a uniform one of what describes the correlations."""
        if not len(z):
            return 0.0
        if _is_unrestricted(block):
            log_cosh = jnp.abs(z) + jnp.log1p(jnp.exp(-2 * jnp.abs(z)))
            return -2 * jnp.sum(_lkj_exponents(block.size, self.eta) * log_cosh)
        slopes = jax.jacfwd(block.stated)(z)
        return linalg.inverse(slopes @ slopes.T, definite=True)[1] / 2


@dataclass(frozen=True)
class HalfT:
    """The logarithm of a half-t density with 3 degrees of freedom, up to a constant."""

    scale: float

    def __call__(self, sd: Array) -> Array:
        """At a standard deviation."""
        return jax.scipy.stats.t.logpdf(sd / self.scale, DEGREES)


def log_variance_scales(fit: FittedModel) -> np.ndarray:
    """Scales of the default priors of the SDs whose log-variances a fit has, the residual's last:
    of the response per root mean square of each effect."""
    spread = float(np.std(fit.y if fit.offset is None else fit.y - fit.offset))
    found = []
    for k, block in enumerate(fit.covariance.blocks):
        if block.residual:
            found += [WIDE * spread] * block.log_variances
            continue
        each = default_scales(fit.frame.terms[k].lengths, spread)
        for variance in range(block.log_variances):
            own = each[block.of_effects == variance] if block.of_variances else each
            found.append(float(np.sqrt(np.mean(own**2))))
    return np.array([*found, WIDE * spread])


def _is_unrestricted(block: Block) -> bool:
    own = getattr(block, "correlation", None)
    return isinstance(block, Unstructured) or isinstance(own, Unrestricted)


def _require_default(fit: FittedModel, starts: list[int], given: dict[str, Any]) -> None:
    """Raise DataError for parameters that have neither a default nor a prior that is given."""
    for block, start, stop in zip(fit.covariance.blocks, starts, starts[1:], strict=False):
        kind = getattr(block, "correlation", None)
        known = isinstance(block, Unstructured) or not (kind is None or isinstance(kind, Distance))
        names = fit.parameter_names[start:stop]
        others = names[block.log_variances :]
        missing = [name for name in others if name not in given]
        if not missing or (known and len(missing) == len(others)):
            continue
        raise DataError(
            f"priors needs densities of {', '.join(map(repr, missing))}: JAX functions of each to "
            "the logarithm of its density; or give priors=f, a function of all parameters "
            f"({', '.join(fit.parameter_names)}) to the logarithm of theirs"
        )


def require_names(priors: Mapping[str, Any], known: set[str], others: set[str]) -> None:
    """Raise DataError for names that a model does not have, ValueError for an eta that is no
    number."""
    for name, given in priors.items():
        if name == CORRELATION:
            if not (isinstance(given, (int, float)) and given > 0):
                raise ValueError(
                    f"priors[{name!r}] must be a positive number, LKJ's eta: {given!r}"
                )
        elif name not in known | others:
            shown = ", ".join([*sorted(known), *sorted(others)])
            raise DataError(f"priors has {name!r}; the model has {shown} and {CORRELATION!r}")


def _checked(priors: Any, known: set[str], others: set[str]) -> dict[str, Any]:
    """The given priors as functions."""
    if priors is None:
        return {}
    if not isinstance(priors, Mapping):
        raise ValueError(
            "priors must be a dict of functions by name, or a function of all parameters, not "
            f"{type(priors).__name__}"
        )
    require_names(priors, known, others)
    found = {}
    for name, given in priors.items():
        if name != CORRELATION and not callable(given):
            what = "a standard deviation" if name in known else "the parameter"
            raise ValueError(
                f"priors[{name!r}] must be a JAX function of {what} to the logarithm of its "
                f"density, or a distribution of numpyro's, not {given!r}"
            )
        if callable(given):
            given = _hashable(getattr(given, "log_prob", given))  # a distribution's
        found[name] = given
    return found


def _hashable(function: Density) -> Density:
    """A function that `jax.jit` takes as static; itself if it can."""
    try:
        hash(function)
    except TypeError:
        return lambda value: function(value)
    return function


def _lkj_exponents(q: int, eta: float) -> np.ndarray:
    """b of (1 - r^2)^b for each partial correlation r, d r / d z included (Lewandowski, Kurowicka
    and Joe 2009, J. Multivariate Analysis 100:1989): row by row, as coordinates are."""
    return np.array([eta + (q - 2 - j) / 2 for i in range(1, q) for j in range(i)], float)
