"""Conditional modes of the random effects, variances of predictions, certificate of an optimum."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from jaxreml.arguments import is_reml
from jaxreml.backend.arrays import namespace, on_host
from jaxreml.backend.compilation import evaluated
from jaxreml.backend.lazy import deferred, jax, jnp
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model import linalg
from jaxreml.model.basis import solve
from jaxreml.model.design import Design
from jaxreml.model.objective import parameters_for, profiled, profiled_of
from jaxreml.model.penalties import Penalty
from jaxreml.model.structures.base import Projection, Rows
from jaxreml.model.structures.collapse import conditional, marginal_by_classes
from jaxreml.optimum import penalised
from jaxreml.optimum.certificate import STEP, slopes_by_differences
from jaxreml.optimum.report import Estimate

Array = Any  # NumPy's or JAX's


MOST_WAYS = 12  # in which slopes are taken by differences


class Inspection(NamedTuple):
    """What a fit reports beyond its `Estimate`.

    Attributes:
        criterion: (), by the objective alone, without a penalty.
        gradient: (r,), of the objective in the chart of the covariance (scaled effects), by
            reverse-mode autodiff; where it has places to spare, in those that suffice. With a
            penalty, that of the penalised objective in `Estimate.parameters`.
        modes: per term (levels, effects), conditional modes of the random effects given y,
            Omega Z' V0^-1 (y - X beta) (best linear unbiased predictors).
        posterior: what `conditional_variances` makes their variances from.
        omega: (m,), relative covariances in scaled units.
    """

    criterion: Array
    gradient: Array
    modes: tuple[Array, ...]
    posterior: Any
    omega: Array


def inspect(
    estimate: Estimate, design: Design, method: str, penalty: Penalty | None = None
) -> Inspection:
    """Conditional modes at an estimate, and its criterion and gradient by another route.

    A program of its own, compiled apart from `estimate`: it computes derivatives by reverse-mode
    autodiff through `Structure.marginal` where `estimate` uses closed forms through
    `Structure.project`. An estimate whose gradient is not zero here was miscompiled.
    """
    return _inspect(estimate, design.without_names(), is_reml(method), penalty)


def inspect_on_host(
    estimate: Estimate, design: Design, method: str, penalty: Penalty | None = None
) -> Inspection:
    """`inspect` of NumPy's arrays by NumPy: the gradient is by differences."""
    slopes = differences if penalty is None else partial(penalised.differences, penalty=penalty)
    with np.errstate(all="ignore"):
        return _inspection(estimate, design, is_reml(method), slopes)


@deferred(lambda: partial(jax.jit, static_argnums=(2, 3)))
def _inspect(estimate: Estimate, design: Design, reml: bool, penalty: Penalty | None) -> Inspection:
    slopes = criterion if penalty is None else partial(penalised.slopes, penalty=penalty)
    return _inspection(estimate, design, reml, slopes)


def _inspection(estimate: Estimate, design: Design, reml: bool, slopes: Any) -> Inspection:
    factors = design.scaled_factors(estimate.theta)
    value, gradient = slopes(estimate.theta, design, reml, estimate.parameters)
    omega = design.covariance.omega_of_factors(factors)
    if design.collapsed is not design and on_host(omega):
        return Inspection(value, gradient, *_of_few_classes(omega, design), omega)
    projection = design.structure.project(omega)
    posterior = _posterior(projection, omega, factors, design)
    return Inspection(value, gradient, _modes(projection, omega, design), posterior, omega)


def _of_few_classes(omega: np.ndarray, design: Design) -> tuple[tuple[Array, ...], Any]:
    """Modes and `Inspection.posterior` of a design that has a `collapsed` one."""
    structure: Any = design.structure
    column = unexplained(design.collapsed.structure.marginal(omega).gram, design.p)[:, 0]
    found, posterior = conditional(structure, omega, column, bool(design.covariance.random.any()))
    parts = np.split(found.T, np.cumsum(design.sizes)[:-1], axis=1)
    return tuple(design.units.modes(k, part) for k, part in enumerate(parts)), posterior


def _posterior(
    projection: Projection, omega: Array, factors: tuple[Array, ...], design: Design
) -> Any:
    if design.covariance.random.all():
        return design.structure.posterior(projection, factors)
    return design.structure.posterior_by_omega(projection.inner, omega)


def relative_covariances(estimate: Estimate, design: Design) -> Array:
    """Omega (m,) at an estimate, in the units of the design."""
    return design.omega_of_theta(estimate.theta)


def criterion(
    theta: Array, design: Design, reml: bool, parameters: Array | None = None
) -> tuple[Array, Array]:
    """The objective at `Estimate.theta` and its gradient, as in `Inspection`. A covariance may need
    `Estimate.parameters`, too."""
    covariance, whole = design.covariance, _chart(theta, design, parameters)

    def objective(inside: Array) -> Array:
        chart = whole.at[covariance.inside].set(inside)
        return profiled(covariance.omega(chart), design, reml=reml)

    return jax.value_and_grad(objective)(whole[covariance.inside])


def _chart(theta: Array, design: Design, parameters: Array | None) -> Array:
    factors = design.scaled_factors(theta)
    if parameters is None:
        return design.covariance.chart(factors)
    return design.covariance.chart_at(factors, parameters)


def differences(
    theta: Array, design: Design, reml: bool, parameters: Array | None = None
) -> tuple[Array, Array]:
    """`criterion` by values of the objective alone, which curves by a few n at most."""
    covariance = design.covariance

    fewer = design.collapsed

    def value(chart: Array) -> float:
        return float(profiled(covariance.omega(chart), fewer, reml=reml))

    whole = _chart(theta, design, parameters)
    ways = np.eye(whole.size)[covariance.inside]
    if len(ways) > MOST_WAYS:  # a slope that is not zero shows in as many directions at random
        mixed = np.random.default_rng(0).standard_normal((len(ways), MOST_WAYS))
        ways = np.sqrt(len(ways) / MOST_WAYS) * np.linalg.qr(mixed)[0].T @ ways
    here, slopes = slopes_by_differences(value, whole, ways, STEP / np.sqrt(design.n))
    if fewer is not design:
        structure: Any = design.structure
        marginal = marginal_by_classes(structure, covariance.omega(whole))
        here = float(profiled_of(marginal, design, reml=reml))
    return here, slopes


def conditional_variances(
    estimate: Estimate, inspection: Inspection, design: Design
) -> tuple[np.ndarray, ...]:
    """Per term (levels, effects, effects), Var(b | y) given the parameters; none without random
    effects. On the host."""
    if inspection.posterior is None:
        return ()
    relative = design.structure.variances(inspection.posterior)
    sigma2 = float(estimate.sigma) ** 2
    return tuple(
        sigma2 * design.units.variances(k, variance) for k, variance in enumerate(relative)
    )


def conditional_modes(omega: Array, design: Design) -> tuple[Array, ...]:
    """Per term (levels, effects, ...), Omega Z' V0^-1 (y - X beta) at relative covariances."""
    return _modes(design.structure.project(omega), omega, design)


def effects_at(omega: Array, design: Design) -> tuple[Array, tuple[Array, ...]]:
    """Generalised least squares (p,) and `conditional_modes` at relative covariances: what solves
    Henderson's mixed model equations."""
    projection = design.structure.project(omega)
    residual = unexplained(projection.gram, design.p)
    beta = design.beta_ols - solve(design.basis, residual[: design.p])[:, 0]
    return beta, _combined_modes(projection, residual, omega, design)


def _modes(projection: Projection, omega: Array, design: Design) -> tuple[Array, ...]:
    return _combined_modes(projection, unexplained(projection.gram, design.p), omega, design)


def _combined_modes(
    projection: Projection, residual: Array, omega: Array, design: Design
) -> tuple[Array, ...]:
    cross = design.structure.combine(projection.cross, residual)
    modes = design.structure.modes(omega, cross)
    return tuple(design.units.modes(k, mode) for k, mode in enumerate(modes))


class Effects(NamedTuple):
    """Fixed and random effects at given variance parameters: what `effects` gives.

    Attributes:
        fixed: (p,), generalised least squares, (X'V^-1 X)^-1 X'V^-1 y; NaN for a column of a traced
            X that depends on those before it.
        random: per term (levels, effects), conditional means given y, G Z'V^-1 (y - X beta).

    Examples:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     found = jaxreml.effects(fit.parameters, design)
        >>> [part.shape for part in found.random]
        [(18, 2)]
    """

    fixed: Array
    random: tuple[Array, ...]


def effects(parameters: Array, design: Design) -> Effects:
    """Fixed and random effects of a design at given variance parameters.

    The solution of Henderson's mixed model equations: best linear unbiased predictions, if the
    parameters are the true ones, of what is to come in known levels. For a row of a level that is
    x'beta + z'b with the level's row b; for a new level b is zero. At the optimum,
    ``effects(estimate.parameters, design)``, it is what `fit` reports as `params` and
    `random_effects`.

    A pure function as the objectives are: compile it, map it, differentiate it in the parameters
    and in whatever the design is made of.

    Args:
        parameters: (m + 1,), as those of `reml_objective`, on the boundary too: a variance of zero
            has effects of zero.
        design: the data.

    Returns:
        The effects, in the units of the data; NaN where an objective is.

    Raises:
        ValueError: `parameters` of the wrong length.
        PrecisionError: a float64 design with JAX set to float32.
        RuntimeError: in a process that was forked after JAX had run, as `fit`.

    Examples:
        A subject's own line is the mean line and its effects:

        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     estimate = jaxreml.estimate(design)
        ...     beta, (by_subject,) = jaxreml.effects(estimate.parameters, design)
        >>> np.round(beta + by_subject[0], 1)
        Array([253.7,  19.7], dtype=float64)
        >>> fit.predict({"Days": [0, 1], "Subject": ["308"] * 2}).round(1).tolist()
        [253.7, 273.3]
    """
    return _effects(parameters_for(design, parameters), design.without_names())


@deferred(lambda: jax.jit)
def _effects(parameters: Array, design: Design) -> Effects:
    with usual_arithmetic():
        omega, _ = design.units.omega(parameters, design.covariance)
        projection = design.structure.project(omega)
        of_basis = unexplained(projection.gram, design.p)[: design.p, 0]
        beta = design.beta_ols - solve(design.basis, of_basis[:, None])[:, 0]
        known = jnp.where(jnp.isnan(design.log_weights), jnp.nan, 1.0)
        fixed = jnp.where(design.absent, jnp.nan, beta) * known
        terms = zip(design.covariance.blocks, _modes(projection, omega, design), strict=True)
        return Effects(fixed, tuple(own * known for block, own in terms if not block.residual))


def unexplained(gram: Array, p: int) -> Array:
    """The combination (p + 1, 1, ...) of the columns [X y] that is y - X beta."""
    factor = linalg.cholesky(gram)
    # In the orthonormal basis, on top of what `beta_ols` explains
    beta = linalg.solve_lower(factor[:p, :p], factor[p, :p, None], transposed=True)
    one = np.ones((1, *beta.shape[1:]), beta.dtype)
    return namespace(beta).concatenate([-beta, one])


class Henderson(NamedTuple):
    """What the variances of x'beta + z'b given y are made of (`row_variances`).

    Attributes:
        posterior: of the random effects given the fixed ones, as the structure has it.
        shifts: per term (levels, effects, p), Omega Z' V0^-1 U for X = U `basis`: what the modes
            lose per unit of a coefficient of U. In scaled units of the effects.
        factor: (p, p), lower Cholesky factor of U' V0^-1 U.
    """

    posterior: Any
    shifts: tuple[Array, ...]
    factor: Array


def henderson(theta: np.ndarray, design: Design) -> Henderson:
    """The parts of the inverse of Henderson's mixed model equations that predictions need.

    Args:
        theta: (m,), relative Cholesky factors as in `Estimate`.
        design: the data.
    """
    bare = design.without_names()
    return evaluated(_henderson, theta, bare, on_host=design.written_out)


def _henderson(theta: Array, design: Design) -> Henderson:
    structure, p = design.structure, design.p
    factors = design.scaled_factors(theta)
    omega = design.covariance.omega_of_factors(factors)
    projection = structure.project(omega)

    def shift(column: Array) -> tuple[Array, ...]:
        return structure.modes(omega, structure.combine(projection.cross, column[:, None]))

    units = np.eye(p + 1, dtype=theta.dtype)[:, : max(p, 1)]
    if on_host(theta):
        columns = zip(*map(shift, units.T), strict=True)
        shifts: Any = [np.stack(own, axis=-1) for own in columns]
    else:
        shifts = jax.vmap(shift, in_axes=1, out_axes=-1)(jnp.asarray(units))
    return Henderson(
        _posterior(projection, omega, factors, design),
        tuple(part[..., :p] for part in shifts),
        linalg.cholesky(projection.gram[:p, :p]),
    )


def row_variances(parts: Henderson, design: Design, X: np.ndarray, rows: Rows) -> np.ndarray:
    """Var(x'(beta_hat - beta) + z'(b_hat - b)) of rows (x, z), over sigma2, (k,). On the host.

    z K z' + (x - z H) Phi (x - z H)' with K the relative covariance of b given y and beta,
    H = K Z'X = Omega Z' V0^-1 X and Phi = (X' V0^-1 X)^-1: a quadratic form of the inverse of the
    coefficients of the mixed model equations (Henderson 1975, Biometrics 31:423).

    Args:
        parts: `henderson` of the design.
        design: the data.
        X: (k, p) fixed-effects columns.
        rows: per term the levels, (k,) integers, and the effects, (k, q), in the user's units;
            zero where a row does without them.
    """
    scaled = scaled_rows(design, rows)
    white = whitened(parts, design, X, scaled)
    return design.structure.row_variances(parts.posterior, scaled) + np.sum(white**2, axis=1)


def scaled_rows(design: Design, rows: Rows) -> Rows:
    """Rows of Z in the units of the structure."""
    return [
        (codes, np.asarray(design.units.rows(k, effects)))
        for k, (codes, effects) in enumerate(rows)
    ]


def whitened(parts: Henderson, design: Design, X: np.ndarray, scaled: Rows) -> np.ndarray:
    """(x - z H) A with A A' = Phi, (k, p), for rows of `scaled_rows`."""
    rest = from_basis(design, X)
    for (codes, effects), shifts in zip(scaled, parts.shifts, strict=True):
        for a, column in enumerate(effects.T):
            rest = rest - column[:, None] * np.asarray(shifts)[codes, a]
    if not design.p:
        return rest
    return scipy.linalg.solve_triangular(parts.factor, rest.T, lower=True).T


def from_basis(design: Design, X: np.ndarray) -> np.ndarray:
    """Rows of U with X = U `basis`, (k, p)."""
    if not design.p:
        return X
    return scipy.linalg.solve_triangular(design.basis, X.T, trans=1).T
