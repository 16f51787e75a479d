"""Covariances of a user's own: a JAX function of named parameters, in the place of a built-in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxreml.model.covariance.custom import VARIANCE, Parameter, Transform
from jaxreml.model.covariance.own import Custom as Custom


def custom(
    fn: Callable[..., Any],
    parameters: Mapping[str, Any],
    transforms: Mapping[str, Any] | None = None,
    *,
    data: Any = None,
) -> Custom:
    """A covariance that a function of your own says.

    It is estimated as the built-in ones are: with standard errors of its parameters, degrees of
    freedom, predictions, and derivatives through the fit. The function is differentiated and
    compiled once; the rest of a fit stays on NumPy.

    Args:
        fn: a JAX function ``fn(at, **parameters)`` to the (q, q) covariance matrix of a term's q
            effects. `at` is what is known of the effects: see `data`. It must be smooth in its
            parameters, and proportional to its variances; one without variances gives a
            correlation matrix, say, and is multiplied by a parameter ``variance``.
        parameters: names of the arguments, with the values that a search starts from: numbers, or
            vectors for several parameters of a kind. Variances need only be right relative to each
            other; all else should be plausible.
        transforms: what each parameter is. ``"variance"`` is one that is in the squared units of
            the response, the default for names that begin so. For the others, how a number without
            bounds becomes one: ``"log"`` (positive), ``"tanh"`` (between -1 and 1), ``"logit"``
            (between 0 and 1), ``(lower, upper)`` (between these, one of which may be infinite), or
            ``"identity"``. Standard errors and intervals are made on that scale.
        data: what is known of the effects, in their order: an array, or a dict, list or tuple of
            arrays, none of them traced by JAX. If it is left out, `at` is the numbers 0, 1, ...,
            q - 1.

    Returns:
        What `jaxreml.Term` takes as its `covariance`.

    Raises:
        ValueError: names, starts or transforms that do not fit together. What is wrong with the
            function itself is said when a model is made with it: a matrix of another shape, not
            symmetric, not positive semidefinite or not finite at its start, derivatives that
            differences do not confirm.

    Examples:
        AR(1) of the effects of four occasions, each measured twice for every subject:

        >>> import jax.numpy as jnp
        >>> def ar1(at, variance, rho):
        ...     return variance * rho ** jnp.abs(at[:, None] - at)
        >>> own = jaxreml.covariance.custom(ar1, {"variance": 1.0, "rho": 0.3}, {"rho": "tanh"})
        >>> subject, occasion = np.repeat(np.arange(30), 8), np.tile(np.repeat(np.arange(4), 2), 30)
        >>> rng = np.random.default_rng(1)
        >>> effects = rng.normal(size=(30, 4)).cumsum(axis=1)
        >>> y = effects[subject, occasion] + rng.normal(size=240)
        >>> term = jaxreml.Term(subject, np.eye(4)[occasion], name="subject", covariance=own)
        >>> design = jaxreml.Design.from_arrays(y, np.ones((240, 1)), [term])
        >>> design.parameter_names
        ('log_variance[subject, variance]', 'z[subject, rho]', 'log_variance[Residual]')
    """
    name = getattr(fn, "__name__", "fn")
    if not callable(fn):
        raise ValueError(f"fn must be a JAX function fn(at, **parameters), not {fn!r}")
    if not isinstance(parameters, Mapping) or not parameters:
        raise ValueError('parameters must be a dict of names and starts, as {"variance": 1.0}')
    given = dict(transforms or {})
    unknown = [other for other in given if other not in parameters]
    if unknown:
        raise ValueError(f"transforms has {unknown[0]!r}, which is no parameter of {name!r}")
    return Custom(fn, tuple(_parameter(*item, given) for item in parameters.items()), data)


def _parameter(name: str, start: Any, transforms: dict[str, Any]) -> Parameter:
    if name not in transforms and not name.startswith(VARIANCE):
        raise ValueError(
            f'say what {name!r} is: transforms={{"{name}": "log"}} for a positive number, "tanh" '
            'for one between -1 and 1, "logit" for one between 0 and 1, (lower, upper), '
            '"identity", or "variance"'
        )
    kind = Transform.of(transforms.get(name, VARIANCE), name)
    try:
        values = np.asarray(start, float)
    except (TypeError, ValueError):
        raise ValueError(f"the start of {name!r} must be a number, not {start!r}") from None
    if values.ndim > 1 or not values.size:
        raise ValueError(f"the start of {name!r} must be a number or a vector, not {start!r}")
    lower, upper = kind.domain
    wrong = ~((values > lower) & (values < upper) & np.isfinite(values))
    if wrong.any():
        raise ValueError(
            f"{name!r} starts at {float(values[wrong].flat[0]):g}, and must start between "
            f"{lower:g} and {upper:g}"
        )
    return Parameter(name, values, kind)
