"""Mixed models inside numpyro models: the marginal likelihood as one distribution.

`MixedNormal` is the normal distribution of a response with random effects integrated out, so that a
sampler moves neither these nor the funnel that they make with their variances. Its mean, covariates
and variances may be what else the model samples; `MixedNormal.effects` draws the effects
afterwards, exactly. `variances` samples SDs and correlations under the priors that
``fit.posterior`` has. Needs ``pip install 'jaxreml[bayes]'``, and float64:
``numpyro.enable_x64()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.random_terms import RESIDUAL
from jaxreml.inference.resampling.conditional import all_effects, simulated
from jaxreml.inference.resampling.priors import (
    CORRELATION,
    DEGREES,
    WIDE,
    default_scales,
    require_names,
)
from jaxreml.model import linalg
from jaxreml.model.arrays import (
    Effects,
    Term,
    floating_type,
    is_traced,
    listed_terms,
    read,
    read_terms,
)
from jaxreml.model.arrays import row_vector as read_vector
from jaxreml.model.basis import Basis
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.unstructured import Unstructured
from jaxreml.model.design import Design, require_precision
from jaxreml.model.objective import neg2_loglik

try:
    import numpyro as package
    import numpyro.distributions as distributions
    from numpyro.distributions import constraints
except ImportError:
    raise ImportError("jaxreml.numpyro needs numpyro: pip install 'jaxreml[bayes]'") from None
package: Any = package
distributions: Any = distributions

Array = Any  # NumPy's or JAX's


class Drawn(NamedTuple):
    """Effects drawn given the response and all parameters: a pytree.

    Attributes:
        beta: (..., p), coefficients of X; of length 0 without X.
        random: per random term (..., levels, q).

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxreml.numpyro import MixedNormal
        >>> with jax.enable_x64(True):
        ...     term = jaxreml.Term(data["Subject"])
        ...     scores = MixedNormal(jnp.full(180, 300.0), [term], [[[35.0]]], 45.0)
        ...     drawn = scores.effects(jax.random.key(0), data["Reaction"].to_numpy())
        >>> drawn.beta.shape, drawn.random[0].shape
        ((0,), (18, 1))
    """

    beta: Array
    random: tuple[Array, ...]


class _Held:
    """Rows, static in the pytree of a distribution: equal to themselves only.

    Attributes:
        terms: as numbers.
        known: whether none of them is traced.
    """

    def __init__(self, X: Any, terms: tuple[Effects, ...], weights: Any, structure: str | None):
        self.terms = terms
        own = [part for term in terms for part in (term.codes, term.columns, term.kernel)]
        self.known = not any(map(is_traced, (X, weights, *own)))
        self._make = partial(Basis.of, X, terms, weights=weights, structure=structure)
        self._basis = self._make() if self.known else None

    @property
    def basis(self) -> Basis:
        """Of known rows made once; of others where it is used, in the program that uses it."""
        return self._make() if self._basis is None else self._basis


class MixedNormal(distributions.Distribution):
    """The distribution of a response with random effects: y ~ N(loc, sum_k Z_k G_k Z_k' + R).

    G_k has the covariance L L' of a term's effects for each level, R = sigma^2 / weights. It costs
    what `ml_objective` costs: with `loc` and the response known, nothing that grows with the number
    of rows.

    Args:
        loc: (..., n) or a number, the mean, or what is left of it beside X; sampled or known.
        terms: the random terms, as `Design.from_arrays` takes them. Their effects may be sampled;
            the covariance of a level's effects is what `factors` say.
        factors: per term a lower Cholesky factor L (..., q, q), or the standard deviation (...) of
            a term of one effect. A single term needs no list.
        sigma: (...), residual standard deviation.
        X: (n, p) columns whose coefficients have a flat prior and are integrated out: the density
            is the restricted likelihood. It is one of y less X times anything, so that no response
            can be drawn from it. As a function of X it grows as X shrinks: for columns that are
            sampled, sample coefficients too and make them part of `loc`.
        weights: (n,), prior weights.
        structure: as in `Design.from_arrays`.

    Raises:
        DataError: as `Design.from_arrays`; a term with a covariance of its own.
        ValueError: factors that do not go with the terms.
        PrecisionError: by methods, with JAX set to float32.

    Examples:
        >>> import jax
        >>> from jaxreml.numpyro import MixedNormal
        >>> subjects = jaxreml.Term(data["Subject"], name="Subject")
        >>> with jax.enable_x64(True):
        ...     scores = MixedNormal(300.0, subjects, 35.0, sigma=45.0)
        ...     log_density = scores.log_prob(data["Reaction"].to_numpy())
        ...     new = scores.sample(jax.random.key(0), (2,))
        >>> round(float(log_density), 2), new.shape
        (-955.33, (2, 180))
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector, "sigma": constraints.positive}
    support = constraints.real_vector
    pytree_data_fields = ("factors",)
    pytree_aux_fields = ("_held", "_flat")

    def __init__(
        self,
        loc: Any,
        terms: Term | Sequence[Any],
        factors: Any,
        sigma: Any,
        *,
        X: Any = None,
        weights: Any = None,
        structure: str | None = None,
        validate_args: bool | None = None,
    ):
        kind = floating_type([loc, X, weights], None)
        read_, n = _read_terms(terms, kind)
        columns = np.zeros((n, 0), kind) if X is None else read(X, kind, "X")
        if columns.ndim != 2 or len(columns) != n:
            raise DataError(f"X must have shape ({n}, p) as the terms, not {columns.shape}")
        weights = read_vector(weights, kind, n, "weights")
        self._held = _Held(columns, read_, weights, structure)
        self._flat = X is not None
        self.factors = _factors(factors, read_)
        self.sigma = sigma
        if np.ndim(loc) and np.shape(loc)[-1] != n:
            raise ValueError(f"loc must be a number or have shape (..., {n}), not {np.shape(loc)}")
        self.loc = loc if np.ndim(loc) else np.full(n, loc) if not is_traced(loc) else loc[None]
        shapes = [own.shape[:-2] for own in self.factors]
        batch = jnp.broadcast_shapes(np.shape(self.loc)[:-1], np.shape(sigma), *shapes)
        super().__init__(batch_shape=batch, event_shape=(n,), validate_args=validate_args)

    @distributions.util.validate_sample
    def log_prob(self, value: Array) -> Array:
        """The logarithm of the density at responses (..., n), with all effects integrated out."""
        return self._mapped(self._log_prob, [value], [1])

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Responses drawn with new random effects, ``(*sample_shape, ..., n)``.

        Raises:
            ValueError: with X, whose coefficients have a flat prior.
        """
        if self._flat:
            raise ValueError(
                "no response can be drawn where the coefficients of X have a flat prior: sample "
                "them and give loc=X @ coefficients, or draw `effects` given a response"
            )
        shape = (*sample_shape, *self.batch_shape)
        keys = _keys(key, shape)
        return self._mapped(self._sample, [keys], [keys.ndim - len(shape)])

    def effects(self, key: Array, value: Array) -> Drawn:
        """Coefficients of X and random effects drawn from their normal distribution given responses
        (..., n) and all parameters: exact, and independent of other draws.

        `draw_effects` does this for all posterior draws of a model.

        Args:
            key: of JAX's random numbers.
            value: the response.

        Examples:
            >>> import jax
            >>> from jaxreml.numpyro import MixedNormal
            >>> subjects = jaxreml.Term(data["Subject"], name="Subject")
            >>> with jax.enable_x64(True):
            ...     mixed = MixedNormal(300.0, subjects, 35.0, sigma=45.0)
            ...     drawn = mixed.effects(jax.random.key(0), data["Reaction"].to_numpy())
            >>> drawn.random[0].shape
            (18, 1)
        """
        shape: Any = jnp.broadcast_shapes(np.shape(value)[:-1], self.batch_shape)
        keys = _keys(key, shape)
        return self._mapped(self._effects, [keys, value], [keys.ndim - len(shape), 1])

    def _mapped(self, function: Callable, values: list[Array], ranks: list[int]) -> Any:
        """A function of values of these ranks, `loc`, factors and sigma, over all batches."""
        arguments = [*values, self.loc, *self.factors, self.sigma]
        ranks = [*ranks, 1, *[2] * len(self.factors), 0]
        pairs = list(zip(arguments, ranks, strict=True))
        shape = jnp.broadcast_shapes(*(np.shape(own)[: np.ndim(own) - r] for own, r in pairs))
        if not shape:  # one program, also where a sampler looks at its first point op by op
            return jax.jit(lambda: function(*arguments))()
        whole = []
        for own, rank in pairs:
            own = jnp.asarray(own)
            tail = own.shape[own.ndim - rank :]
            whole.append(jnp.broadcast_to(own, (*shape, *tail)).reshape(-1, *tail))
        found = jax.jit(jax.vmap(function))(*whole)
        return jax.tree.map(lambda own: own.reshape(*shape, *own.shape[1:]), found)

    def _log_prob(self, value: Array, loc: Array, *scales: Array) -> Array:
        basis = self._held.basis
        omega, _, sigma = _read(basis, *scales)
        design = Design.of(basis, basis.response(_difference(value, loc)))
        found = neg2_loglik(omega, 2 * jnp.log(sigma), design, reml=True)
        return found * jnp.where(jnp.isnan(found), jnp.nan, -0.5)  # derivatives of NaN, too

    def _sample(self, key: Array, loc: Array, *scales: Array) -> Array:
        basis = self._held.basis
        _, factors, sigma = _read(basis, *scales)
        return loc + simulated(key, self._held.terms, factors, sigma, basis.roots)[1]

    def _effects(self, key: Array, value: Array, loc: Array, *scales: Array) -> Drawn:
        basis = self._held.basis
        omega, factors, sigma = _read(basis, *scales)
        rest = _difference(value, loc)
        return Drawn(*all_effects(key, omega, factors, sigma, rest, basis, self._held.terms))


def _read(basis: Basis, *scales: Array) -> tuple[Array, list[Array], Array]:
    """Relative covariances inside a design, factors and sigma."""
    require_precision(basis)
    *factors, sigma = (jnp.asarray(own, basis.dtype) for own in scales)
    roots = [
        linalg.matmul(matrix, factor / sigma)
        for matrix, factor in zip(basis.units.matrices, factors, strict=True)
    ]
    return natural.omega_from_factors(tuple(roots)), factors, sigma


def variances(
    terms: Term | Sequence[Any], spread: Any, priors: Mapping[str, Any] | None = None
) -> tuple[tuple[Array, ...], Array]:
    """Sample standard deviations and correlations in a numpyro model, for `MixedNormal`.

    The sites are ``sd[group, effect]``, ``sigma`` and, for correlated effects, a Cholesky factor
    ``cholesky[group, effects]``; correlations are there as ``correlation[group, effect, effect]``.

    Args:
        terms: the random terms.
        spread: standard deviation of the response, which the default priors are in units of: those
            of ``fit.posterior``.
        priors: distributions of numpyro's for standard deviations, by ``"group, effect"``, by
            ``"group"`` for all its effects, or by ``"Residual"``; and under ``"correlation"`` a
            number, LKJ's eta.

    Returns:
        Per term the Cholesky factor (q, q) of its effects' covariance; the residual SD.

    Raises:
        DataError: terms as `Design.from_arrays`; names that they do not have.
        ValueError: priors that are no distributions of one number.

    Examples:
        >>> import jax
        >>> import numpyro
        >>> from jaxreml.numpyro import MixedNormal, variances
        >>> subjects = jaxreml.Term(data["Subject"], name="Subject")
        >>> def model(y):
        ...     factors, sigma = variances(subjects, y.std())
        ...     numpyro.sample("y", MixedNormal(300.0, subjects, factors, sigma), obs=y)
        >>> with numpyro.handlers.seed(rng_seed=0), jax.enable_x64(True):
        ...     sites = numpyro.handlers.trace(model).get_trace(data["Reaction"].to_numpy())
        >>> list(sites)
        ['sd[Subject, (Intercept)]', 'sigma', 'y']
    """
    read_, _ = _read_terms(terms, np.dtype(float))
    given = dict(priors or {})
    known = {name for own in read_ for name in (own.name, *_labels(own))} | {RESIDUAL}
    require_names(given, known, set())
    for name, prior in given.items():
        single = isinstance(prior, distributions.Distribution) and not (
            prior.event_shape or prior.batch_shape
        )
        if name != CORRELATION and not single:
            raise ValueError(
                f"priors[{name!r}] must be a distribution of numpyro's of one number, not {prior!r}"
            )
    eta, factors = given.get(CORRELATION, 1.0), []
    for own in read_:
        sds = []
        scales = default_scales(own.lengths, spread)
        for label, scale in zip(_labels(own), scales, strict=True):
            prior = given.get(label, given.get(own.name, _half_t(scale)))
            sds.append(package.sample(f"sd[{label}]", prior))
        factor = jnp.stack(sds)[:, None]
        if len(sds) > 1:
            label = f"{own.name}, {', '.join(own.effect_names)}"
            root = package.sample(f"cholesky[{label}]", distributions.LKJCholesky(len(sds), eta))
            factor = factor * root
            for i, j in zip(*np.tril_indices(len(sds), -1), strict=True):
                label = f"{own.name}, {own.effect_names[j]}, {own.effect_names[i]}"
                package.deterministic(f"correlation[{label}]", root[i] @ root[j])
        factors.append(factor)
    prior = given.get(RESIDUAL, _half_t(WIDE * spread))
    return tuple(factors), package.sample("sigma", prior)


def draw_effects(
    model: Callable[..., Any], samples: Mapping[str, Array], key: Array, *args: Any, **kwargs: Any
) -> dict[str, Drawn]:
    """Draw the effects of a numpyro model's `MixedNormal` sites for each of its posterior draws.

    Args:
        model: with `MixedNormal` as the distribution of observed sites.
        samples: posterior draws by site, (draws, ...): ``mcmc.get_samples()``.
        key: of JAX's random numbers.
        args, kwargs: of the model, as they were for the sampler.

    Returns:
        By the name of the site `Drawn`, with an axis of draws first.

    Raises:
        DataError: no observed site is `MixedNormal`.

    Examples:
        >>> import jax
        >>> import numpyro
        >>> from jaxreml.numpyro import MixedNormal, draw_effects
        >>> subjects = jaxreml.Term(data["Subject"], name="Subject")
        >>> def model(y):
        ...     sd = numpyro.sample("sd", numpyro.distributions.HalfNormal(50.0))
        ...     numpyro.sample("y", MixedNormal(300.0, subjects, sd, 45.0), obs=y)
        >>> with jax.enable_x64(True):
        ...     some = {"sd": np.array([30.0, 40.0])}  # of mcmc.get_samples()
        ...     found = draw_effects(model, some, jax.random.key(0), data["Reaction"].to_numpy())
        >>> found["y"].random[0].shape
        (2, 18, 1)
    """
    seeded = package.handlers.seed(model, jax.random.PRNGKey(0))

    def one(drawn: Any) -> dict[str, Drawn]:
        key, sample = drawn
        own = package.handlers.substitute(seeded, data=sample)
        sites = package.handlers.trace(own).get_trace(*args, **kwargs)
        found = {}
        for name, site in sites.items():
            mixed = site.get("fn")
            while not isinstance(mixed, MixedNormal) and hasattr(mixed, "base_dist"):
                mixed = mixed.base_dist  # of a plate
            if isinstance(mixed, MixedNormal) and site["is_observed"]:
                key, of_site = jax.random.split(key)
                found[name] = mixed.effects(of_site, site["value"])
        if not found:
            raise DataError("the model has no observed site whose distribution is MixedNormal")
        return found

    count = len(next(iter(samples.values())))
    draws = jax.random.split(key, count), {name: jnp.asarray(own) for name, own in samples.items()}
    return jax.jit(lambda draws: jax.lax.map(one, draws))(draws)


def _half_t(scale: Any) -> Any:
    return distributions.FoldedDistribution(distributions.StudentT(DEGREES, 0.0, scale))


def _labels(term: Effects) -> list[str]:
    return [f"{term.name}, {effect}" for effect in term.effect_names]


def _read_terms(terms: Any, kind: np.dtype) -> tuple[tuple[Effects, ...], int]:
    """Random terms as numbers, and how many rows they have."""
    listed = listed_terms(terms)
    shape = np.shape(listed[0].group)
    n = shape[0] if shape else 0
    found = tuple(read_terms(listed, n, kind))
    for own in found:
        if not isinstance(own.covariance, Unstructured):
            raise DataError(
                f"the term {own.name} has a covariance of its own; here `factors` say all: leave "
                "covariance= out and give the Cholesky factor of the matrix"
            )
    return found, n


def _factors(given: Any, terms: Sequence[Effects]) -> tuple[Array, ...]:
    """Cholesky factors (..., q, q), one for every term."""
    factors = tuple(given) if isinstance(given, list | tuple) else (given,)
    if len(factors) != len(terms):
        raise ValueError(
            f"there are {len(factors)} factors for {len(terms)} terms, "
            f"{', '.join(own.name for own in terms)}: give a list of one for each"
        )
    found = []
    for factor, own in zip(factors, terms, strict=True):
        factor, q = jnp.asarray(factor), own.columns.shape[1]
        if q == 1 and factor.shape[-2:] != (1, 1):
            factor = factor[..., None, None]
        if factor.shape[-2:] != (q, q):
            raise ValueError(
                f"the factor of the term {own.name} must have shape (..., {q}, {q}), the Cholesky "
                f"factor of the covariance of {', '.join(own.effect_names)}, not {factor.shape}"
            )
        found.append(factor)
    return tuple(found)


def _keys(key: Array | None, shape: tuple[int, ...]) -> Array:
    """Keys of this shape; of new or old style."""
    if not shape:
        return key
    keys = jax.random.split(key, int(np.prod(shape)))  # pyright: ignore
    return keys.reshape(*shape, *keys.shape[1:])


def _difference(value: Array, loc: Array) -> Array:
    """Known if both are, so that a likelihood works with sums over rows that are made once."""
    if is_traced(value) or is_traced(loc):
        return jnp.asarray(value) - loc
    return np.asarray(value) - np.asarray(loc)
