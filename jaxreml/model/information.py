"""Expected (Fisher) information of fixed effects and variance parameters: what a design will say,
before there is a response."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jaxreml.arguments import is_reml
from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import deferred, jax, jnp
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model import linalg
from jaxreml.model.design import Design, with_spare_levels
from jaxreml.model.objective import Expansion, degrees_of_freedom, expand, parameters_for

Array = Any  # NumPy's or JAX's


class Information(NamedTuple):
    """Expected information of the two kinds of parameters, which are independent of each other: a
    pytree.

    Attributes:
        beta: (p, p), X'V^-1 X of the fixed effects; zero for columns of a traced X that depend on
            those before them.
        parameters: (m + 1, m + 1), of the variance parameters in the order of
            ``design.parameter_names``: half the Hessian of the criterion, on average over
            responses. Zero in entries on the boundary.

    Examples:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     known = jaxreml.expected_information(fit.parameters, design)
        >>> known.beta.shape, known.parameters.shape
        ((2, 2), (4, 4))
    """

    beta: Array
    parameters: Array


def expected_information(parameters: Array, design: Design, method: str = "REML") -> Information:
    r"""What a design is expected to say of its parameters, whatever the response will be.

    The inverses are the covariances that estimates will have in large samples: what a study is
    planned by. A pure function as the objectives: its derivatives, in weights, times of
    measurement, or sizes of groups by `Design.from_moments`, say how a plan gets better. Under
    maximum likelihood the information of independent groups is the sum of theirs, so that so many
    groups of a kind count by a factor.

    Args:
        parameters: (m + 1,), guesses or those of a pilot study, as for `reml_objective`.
        design: the plan; its response does not matter (zeros will do).
        method: "REML", tr(P V_i P V_j) / 2 with V_i the derivatives of V in the parameters and
            P = V^-1 - V^-1 X (X'V^-1 X)^-1 X'V^-1; or "ML", with V^-1 in the place of P.

    Raises:
        ValueError: `parameters` of the wrong length; another method.
        PrecisionError: a float64 design with JAX set to float32.

    Examples:
        Standard errors of fixed effects and log-variances that sleepstudy's plan leads to, and with
        every day measured twice:

        >>> import jax
        >>> @jax.jit
        ... def planned(repeats):
        ...     X = np.stack([np.ones(180), data["Days"]], axis=1)
        ...     term = jaxreml.Term(data["Subject"], X)
        ...     plan = jaxreml.Design.from_arrays(np.zeros(180), X, term, weights=repeats)
        ...     known = jaxreml.expected_information(fit.parameters, plan)
        ...     return jax.numpy.sqrt(jax.numpy.diagonal(jax.numpy.linalg.inv(known.beta)))
        >>> with jax.enable_x64(True):
        ...     once, twice = planned(np.ones(180)), planned(np.full(180, 2.0))
        >>> np.round(once, 3), np.round(twice, 3)
        (Array([6.825, 1.546], dtype=float64), Array([6.347, 1.473], dtype=float64))
    """
    reml = is_reml(method)
    parameters = parameters_for(design, parameters)
    return _information(parameters, with_spare_levels(design).without_names(), reml)


@deferred(lambda: partial(jax.jit, static_argnums=2))
def _information(parameters: Array, design: Design, reml: bool) -> Information:
    with usual_arithmetic():

        def inside(parameters: Array) -> Array:
            omega, log_sigma2 = design.units.omega(parameters, design.covariance)
            return jnp.concatenate([omega, log_sigma2[None]])

        at, jacobian = inside(parameters), jax.jacfwd(inside)(parameters)
        found, information = of_relative(at[:-1], design.blank(), reml=reml)
        root = linalg.matmul(linalg.transpose(design.basis), found.gram_factor[:-1, :-1])
        return Information(
            root @ root.T * jnp.exp(-at[-1]), jacobian.T @ information @ jacobian / 2
        )


def of_relative(omega: Array, design: Design, *, reml: bool) -> tuple[Expansion, Array]:
    """tr(P V_i P V_j) for V_i of omega and log sigma2, (m + 1, m + 1), or tr(V^-1 V_i V^-1 V_j)
    under ML, and the expansion that it comes from, of a criterion without a response.

    They are minus the second derivatives of log|V_0| + log|M|, as V_0 = V / sigma2 is linear in
    omega; what belongs to sigma2 follows from V_0^-1 V_0 = I. Takes lanes too.
    """
    xp = namespace(omega, design.residual_ss)
    degrees = degrees_of_freedom(design, reml=reml)
    # Without the part of y, which counts as often as there are degrees of freedom
    found = expand(omega, replace(design, n=design.n - degrees), reml=reml)
    last = xp.broadcast_to(xp.asarray(degrees, omega.dtype), omega.shape[1:])
    return found, linalg.border(-found.hessian, found.gradient, last)
