r"""The likelihoods: pure scalars on the -2 log-likelihood scale, constants included.

With V = sigma2 V0, V0 = I + Z Omega Z', gram = [X y]' V0^-1 [X y] = R R' (Cholesky, y last), its
last pivot squared is the residual sum of squares rss and its X block is M = X' V0^-1 X:

    ML    n log(2 pi sigma2) + log|V0| + rss / sigma2
    REML  (n - p) log(2 pi sigma2) + log|V0| + log|M| + rss / sigma2

`profiled` and `expand` also take batches: arrays with one more axis at the end, the lanes, of the
same length or 1 everywhere.

(Patterson and Thompson 1971, Biometrika 58:545; Harville 1974, Biometrika 61:383, without his
log|X'X|; the constants of lme4, Bates et al. 2015, J. Stat. Softw. 67(1), eqs 37 and 41).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import deferred, jax, jnp
from jaxreml.backend.runtime import usual_arithmetic
from jaxreml.model import linalg
from jaxreml.model.design import Design, require_precision, with_spare_levels
from jaxreml.model.penalties import Penalty, penalty_of
from jaxreml.model.structures import Marginal

Array = Any  # NumPy's or JAX's


def reml_objective(
    parameters: Array, design: Design, *, harville: bool = False, penalty: Any = None
) -> Array:
    r"""-2 log restricted likelihood of a design at given variance parameters.

    A pure function of arrays: compile it, differentiate it, map it by `jax.vmap`, or minimise it by
    any optimiser. `estimate` finds its lowest minimum, which is ``fit(...).criterion`` too.

    It contains log|X'V^-1 X|, so it depends on the columns of X and not only on their span: with
    X A in the place of X it is 2 log|det A| higher. As a function of X it has no minimum: it falls
    to -inf as X shrinks or two of its columns become one. To learn X (a network's features, say)
    minimise `ml_objective`, which depends on the span alone, or take off log|X'X| by `harville`.

    Columns of a traced X that depend on those before them (a share of 1e-10 or less of their length
    is outside the others' span; zeros, the output of a dead unit, do) count as left out, from n - p
    too: value and derivatives are those of the model without them. The derivative in such a column,
    which does not exist, is zero. The value jumps where a column becomes dependent.

    Args:
        parameters: (m + 1,), log-variances and correlation coordinates, the residual's last, in the
            order of ``design.parameter_names``. On the boundary, as `Estimate.parameters` has them
            (-inf, +-inf, NaN where these leave a correlation undefined), value and derivatives are
            their limits; the derivatives in entries on the boundary are zero.
        design: the data.
        harville: take off log|X'X| (X without prior weights), as Harville (1974, Biometrika 61:383)
            does: -2 log density of orthonormal contrasts of y, the same for X and X A. It differs
            by what no variance parameter changes.
        penalty: a density of the parameters as in `estimate`; -2 times its logarithm is added.

    Returns:
        A scalar; NaN, with derivatives of NaN, where V is not positive definite in floating point
        or traced data are not finite or weights not positive. Where a variance is best at zero
        there is no minimum: an optimiser runs off to -inf and may stop anywhere on the way.
        `estimate` reports it as zero.

    Raises:
        ValueError: `parameters` of the wrong length.
        DataError: a penalty that does not fit the design.
        PrecisionError: a float64 design with JAX set to float32.
        RuntimeError: in a process that was forked after JAX had run, as `fit`.

    Examples:
        The criterion of a fit at its optimum, its gradient there, and a step away:

        >>> import jax
        >>> import numpy as np
        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")
        >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     at = jax.numpy.array(fit.parameters)
        ...     value, slope = jax.value_and_grad(jaxreml.reml_objective)(at, design)
        ...     away = jaxreml.reml_objective(at + 0.1, design)
        >>> design.parameter_names
        ('log_variance[Subject, (Intercept)]', 'log_variance[Subject, Days]', ...
        >>> round(float(value), 2), bool(np.abs(slope).max() < 1e-3), round(float(away), 2)
        (1743.63, True, 1744.61)
    """
    value = _objective(parameters, design, penalty, reml=True)
    return value - design.log_gram_x if harville else value


def ml_objective(parameters: Array, design: Design, *, penalty: Any = None) -> Array:
    """-2 log likelihood of a design at given variance parameters, fixed effects profiled out.

    It depends on the span of X's columns alone: X may be an output of a network. Otherwise as
    `reml_objective`, dependent columns of a traced X included.

    Examples:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        ...     value = jaxreml.ml_objective(fit.parameters, design)
        >>> round(float(value), 3)
        1751.997
    """
    return _objective(parameters, design, penalty, reml=False)


def _objective(parameters: Array, design: Design, penalty: Any, *, reml: bool) -> Array:
    density = penalty_of(penalty, design.covariance, design.names)
    parameters = parameters_for(design, parameters)
    return _compiled_objective(parameters, with_spare_levels(design).without_names(), reml, density)


def parameters_for(design: Design, parameters: Any) -> Array:
    """Parameters (m + 1,) that a user gave, of the design's type.

    Raises:
        ValueError: of another length.
        PrecisionError: a float64 design with JAX set to float32.
    """
    require_precision(design)
    length = len(design.parameter_names)
    parameters = jnp.asarray(parameters)
    if parameters.shape != (length,):
        raise ValueError(
            f"parameters must have shape ({length},), one entry each for "
            f"{', '.join(design.parameter_names)}; got shape {parameters.shape}"
        )
    return parameters.astype(design.dtype)


@deferred(lambda: partial(jax.jit, static_argnums=(2, 3)))
def _compiled_objective(
    parameters: Array, design: Design, reml: bool, penalty: Penalty | None
) -> Array:
    with usual_arithmetic():
        omega, log_sigma2 = design.units.omega(parameters, design.covariance)
        value = neg2_loglik(omega, log_sigma2, design, reml=reml)
        if penalty is not None:
            value = value + penalty.value(parameters, design.covariance)
        # derivatives of NaN where it is NaN
        return value * jnp.where(jnp.isnan(value), jnp.nan, 1.0)


def neg2_loglik(omega: Array, log_sigma2: Array, design: Design, *, reml: bool) -> Array:
    """-2 log (restricted) likelihood at relative covariances in scaled units."""
    marginal = design.structure.marginal(omega)
    return _at_sigma2(log_pivots(marginal), marginal.logdet, log_sigma2, design, reml=reml)


def _at_sigma2(
    pivots: Array, logdet: Array, log_sigma2: Array, design: Design, *, reml: bool
) -> Array:
    xp = namespace(pivots)
    degrees = degrees_of_freedom(design, reml=reml)
    value = degrees * log_sigma2 + logdet + xp.exp(2 * pivots[-1] - log_sigma2)
    if reml:
        value = value + 2 * xp.sum(pivots[:-1], axis=0)
    return value + constant(design, reml=reml)


def log_pivots(marginal: Marginal) -> Array:
    """Logarithms of the diagonal of the Cholesky factor of the gram matrix."""
    xp = namespace(marginal.gram)
    return xp.log(linalg.diagonal(linalg.cholesky(marginal.gram)))


def degrees_of_freedom(design: Design, *, reml: bool) -> Array | int:
    """What the residual sum of squares is divided by: n less the rank of X, or n."""
    return design.n - design.rank if reml else design.n


def profiled(omega: Array, design: Design, *, reml: bool) -> Array:
    """`neg2_loglik` at the residual variance that minimises it, rss / degrees of freedom."""
    return profiled_of(design.structure.marginal(omega), design, reml=reml)


def profiled_of(marginal: Marginal, design: Design, *, reml: bool) -> Array:
    """`profiled`, of what the structure says there."""
    return _profiled(log_pivots(marginal), marginal.logdet, design, reml=reml)


def _profiled(pivots: Array, logdet: Array, design: Design, *, reml: bool) -> Array:
    xp = namespace(pivots)
    degrees = degrees_of_freedom(design, reml=reml)
    value = degrees * (2 * pivots[-1] + 1 - xp.log(degrees)) + logdet
    if reml:
        value = value + 2 * xp.sum(pivots[:-1], axis=0)
    return value + constant(design, reml=reml)


def constant(design: Design, *, reml: bool) -> Array:
    """The part of the objective that no variance parameter changes."""
    xp = namespace(design.basis)
    value = degrees_of_freedom(design, reml=reml) * math.log(2 * math.pi) - design.log_weights
    if reml:  # X enters as an orthonormal basis; this puts its own scale back
        pivots = xp.where(design.absent, 1.0, xp.abs(linalg.diagonal(design.basis)))
        value = value + 2 * xp.sum(xp.log(pivots), axis=0)
    return value


class Expansion(NamedTuple):
    """Value and derivatives of the criterion in omega (m,), with what they were made from.

    Attributes:
        value: of the criterion, ().
        gradient, hessian: of the profiled criterion, (m,) and (m, m); see `expand`.
        log_sigma2: the residual log-variance, (), profiled or given.
        joint_gradient, joint_hessian: (m + 1,) and (m + 1, m + 1), of the criterion in
            (omega, log sigma2), sigma2 not profiled.
        gram_factor: (p + 1, p + 1), lower Cholesky factor R of the gram matrix.
        gram_slopes: (m, p + 1, p + 1), R^-1 (d_i gram) R^-T.
    """

    value: Array
    gradient: Array
    hessian: Array
    log_sigma2: Array
    joint_gradient: Array
    joint_hessian: Array
    gram_factor: Array
    gram_slopes: Array


def expand(
    omega: Array,
    design: Design,
    *,
    reml: bool,
    exact: Array | bool = True,
    log_sigma2: Array | None = None,
) -> Expansion:
    r"""The profiled criterion with its first and second derivatives, in closed form.

    With W_i = R^-1 (d_i gram) R^-T and W_ij likewise, split into the X block and the y entry,
    d_i log|M| = tr_X W_i and d_i log rss = (W_i)_yy, and the second derivatives follow from
    log|gram| = log|M| + log rss. All weights (1 for X under REML, 0 under ML, the degrees of
    freedom for y) go into the contractions, so each is computed once.

    At a given `log_sigma2` the value is `neg2_loglik`, and rss / sigma2 takes the place of the
    degrees of freedom in the weight of y: `gradient` is then the first part of `joint_gradient`,
    while `hessian` lacks the term in (d_i log rss) (d_j log rss) that `joint_hessian` has.

    Unless `exact`, a structure whose second derivatives are `costly` gives average information in
    their place (Gilmour, Thompson and Cullis 1995, Biometrics 51:1440): with u the last row of
    R^-1 [X y]', the weight of y times u'V_i P V_j u, P free of X and y.
    """
    structure, xp = design.structure, namespace(omega)
    p = design.p
    degrees = degrees_of_freedom(design, reml=reml)
    projection = structure.project(omega)
    factor = linalg.cholesky(projection.gram)
    inverse = linalg.solve_lower(factor, linalg.eye_like(factor))
    to_unit = linalg.transpose(inverse)
    slopes = -structure.form(projection.cross, to_unit)
    pivots = xp.log(linalg.diagonal(factor))
    if log_sigma2 is None:
        of_y: Any = degrees
        value = _profiled(pivots, projection.logdet, design, reml=reml)
        log_sigma2 = 2 * pivots[-1] - xp.log(degrees)
    else:
        of_y = xp.exp(2 * pivots[-1] - log_sigma2)
        value = _at_sigma2(pivots, projection.logdet, log_sigma2, design, reml=reml)

    # How much each entry of W counts: log|M| (REML) for X, `of_y` times log rss for y.
    k, lanes = p + 1, [1] * (factor.ndim - 2)
    in_x = np.zeros((k, k))
    in_x[:p, :p] = 1.0
    in_x = in_x.reshape(k, k, *lanes).astype(factor.dtype)
    entries = float(reml) * in_x + (1 - in_x) * of_y
    flat = slopes.reshape(slopes.shape[0], k * k, *slopes.shape[3:])
    flat_entries = entries.reshape(k * k, *entries.shape[2:])
    on_diagonal = flat_entries * linalg.eye_like(entries).reshape(k * k, *lanes)
    gradient = structure.slope(projection) + xp.sum(flat * on_diagonal, axis=1)

    def observed() -> Array:
        curvature = structure.curvature(projection, to_unit, linalg.diagonal(entries))
        return curvature - linalg.row_products(flat * flat_entries, flat)

    def average() -> Array:
        rows = slopes[:, p]
        spread = structure.spread(projection, to_unit[:, p:])[:, 0, :, 0]
        return of_y * (spread - rows @ rows.T)

    if exact is True or not structure.costly:
        hessian = observed()
    else:
        hessian = linalg.cond(exact, observed, average)

    # d2 rss / rss = d2 log rss + (d log rss)^2
    slope_y = slopes[:, p, p]
    slope_y = xp.concatenate([slope_y, -xp.ones_like(slope_y[:1])])
    none = xp.zeros_like(gradient)
    joint = linalg.border(hessian, none, none[0])
    joint = joint + of_y * slope_y[:, None] * slope_y[None]
    in_sigma2 = xp.broadcast_to(xp.asarray(degrees - of_y, gradient.dtype), gradient.shape[1:])
    slope = xp.concatenate([gradient, in_sigma2[None]])
    at: Any = log_sigma2
    return Expansion(value, gradient, hessian, at, slope, joint, factor, slopes)
