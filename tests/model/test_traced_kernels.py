"""Kernels that are traced by JAX: values of the concrete ones, derivatives in their entries and in
what makes them, and statuses where they are no covariances."""

from __future__ import annotations

from functools import partial

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml import DataError, Design, Status, Term, estimate, ml_objective, reml_objective
from jaxreml.optimum.estimate import estimate_on_host

RNG = np.random.default_rng(3)
LEVELS, N = 9, 36
CODES = np.concatenate([np.arange(7), RNG.integers(0, 7, N - 7)])  # levels 7 and 8 have no rows
OTHER = np.concatenate([np.arange(6), RNG.integers(0, 6, N - 6)])
PLACES = RNG.uniform(size=(LEVELS, 2))
APART = np.linalg.norm(PLACES[:, None] - PLACES, axis=-1)
EFFECTS = np.column_stack([np.ones(N), RNG.normal(size=N)])
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
WEIGHTS = RNG.uniform(0.5, 2, N)
ROOT = np.linalg.cholesky(np.exp(-APART / 0.5))
LUCKY = np.random.default_rng(6)  # no variance of the first five models is zero
B = ROOT @ LUCKY.normal(size=(LEVELS, 2)) * [2, 1]
Y = X @ [1, 2] + np.sum(EFFECTS * B[CODES], axis=1) + LUCKY.normal(size=6)[OTHER]
Y = Y + 0.5 * LUCKY.normal(size=N)
FEW = RNG.normal(size=(LEVELS, 3))
AT = -0.7  # logarithm of the length scale


def rbf(log_length, xp=jnp):
    """Positive definite, with a scale of its own that changes nothing."""
    return 1e3 * xp.exp(-0.5 * (APART / xp.exp(log_length)) ** 2)


def low_rank(t, xp=jnp):
    """Singular at all t, with equal eigenvalues (zeros)."""
    root = FEW * xp.stack([1 + t, xp.cos(t), 2 + t**2])
    return root @ root.T


def one(t, xp, **options):
    return [Term(CODES, name="g", kernel=rbf(t, xp), **options)]


# Terms as a function of t, concrete if `xp` is NumPy.
MODELS = {
    "one kernel": one,
    "singular": lambda t, xp: [Term(CODES, name="g", kernel=low_rank(t, xp))],
    "slopes": lambda t, xp: one(t, xp, effects=EFFECTS),
    "two kernels, one of them traced": lambda t, xp: [
        *one(t, xp),
        Term(CODES, name="h", kernel=low_rank(0.2, np)),
    ],
    "beside independent levels": lambda t, xp: [*one(t, xp), Term(OTHER, name="f")],
    "of two factors": lambda t, xp: [
        Term(CODES, EFFECTS, "g", kernel=rbf(t, xp)),
        Term(OTHER, name="f", kernel=low_rank(t, xp)[:6, :6]),
        Term(np.arange(N) // 2, name="pair"),  # more effects than rows: these are worked on
    ],
}  # fmt: skip


def design(name, t, xp=jnp, y=Y, weights=None):
    return Design.from_arrays(y, X, MODELS[name](t, xp), weights=weights)


def at_parameters(name):
    count = len(design(name, AT, np).parameter_names)
    return np.linspace(0.4, -0.3, count)


def known_value(params, terms, *, reml=True, weights=None):
    """By dense algebra."""
    dense = [
        (
            own.group,
            np.ones((N, 1)) if own.effects is None else own.effects,
            *([] if own.kernel is None else [own.kernel]),
        )
        for own in terms
    ]
    return independent.neg2_loglik(params, Y, X, dense, reml=reml, weights=weights)


@pytest.mark.parametrize("name", MODELS)
def test_objectives(name):
    params = at_parameters(name)
    reml = name != "slopes"
    weights, objective = (WEIGHTS, reml_objective) if reml else (None, ml_objective)
    value, slope = jax.jit(
        jax.value_and_grad(lambda t: objective(params, design(name, t, weights=weights)))
    )(AT)

    def known(t):
        return known_value(params, MODELS[name](float(t[0]), np), reml=reml, weights=weights)

    assert float(value) == pytest.approx(known([AT]), rel=1e-9)
    by_hand = independent.gradient(known, [AT])[0]
    assert float(slope) == pytest.approx(by_hand, rel=1e-6)
    assert abs(by_hand) > 1e-3


def test_traced_levels_effects_and_weights_beside_a_kernel():
    """All at once, in the rows themselves: the same as what was worked on level by level."""
    params = at_parameters("slopes")

    @jax.jit
    def value(codes, effects, weights, kernel):
        term = Term(codes, effects, "g", kernel=kernel)
        return reml_objective(params, Design.from_arrays(Y, X, [term], weights=weights))

    for left_out in ([], [3, 20]):
        weights = WEIGHTS.copy()
        weights[left_out] = 0
        kept = weights > 0
        term = Term(CODES[kept], EFFECTS[kept], "g", kernel=rbf(AT, np))
        known = Design.from_arrays(Y[kept], X[kept], [term], weights=weights[kept])
        found = float(value(CODES, EFFECTS, weights, rbf(AT, np)))
        assert found == pytest.approx(float(reml_objective(params, known)), rel=1e-11)
    assert np.isnan(value(CODES + 4, EFFECTS, WEIGHTS, rbf(AT, np)))


def test_derivatives_in_entries():
    """First and second derivatives, along symmetric changes, of which each entry has a half."""
    params = at_parameters("one kernel")
    kernel = rbf(AT, np)
    direction = RNG.normal(size=(LEVELS, LEVELS))
    direction = 10 * (direction + direction.T)

    def value(kernel):
        return reml_objective(params, Design.from_arrays(Y, X, Term(CODES, kernel=kernel)))

    @jax.jit
    def derivatives(kernel):
        along = partial(jax.jvp, jax.grad(value), (kernel,), (direction,))
        return *along(), jax.vmap(value)(jnp.stack([kernel, 2 * kernel]))

    slope, second, both = derivatives(kernel)
    np.testing.assert_allclose(slope, slope.T, rtol=1e-13)
    assert (np.asarray(slope)[7:] == 0).all()  # no rows

    def known(t):
        return known_value(params, [Term(CODES, kernel=kernel + t[0] * direction)])

    by_hand = independent.gradient(known, [0.0], step=1e-3)[0]
    assert np.sum(slope * direction) == pytest.approx(by_hand, rel=1e-6)
    by_hand = independent.hessian(known, [0.0], step=1e-2)[0, 0]
    assert np.sum(second * direction) == pytest.approx(by_hand, rel=1e-5)
    np.testing.assert_allclose(both[0], known([0.0]), rtol=1e-9)


FIELDS = ("parameters", "parameters_vcov", "beta", "vcov", "vcov_slopes", "criterion", "hessian")


def figures(name, t, y=Y):
    """What an `Estimate` says, in one vector."""
    found = estimate(design(name, t, y=y))
    return jnp.concatenate([jnp.ravel(getattr(found, field)) for field in FIELDS])


def refitted(name, t, y=Y):
    """By NumPy: one kernel alone by its eigenvectors."""
    found, _ = estimate_on_host(design(name, float(t), np, y=y))
    assert found.status == Status.CONVERGED
    return np.concatenate([np.ravel(getattr(found, field)) for field in FIELDS])


def slopes(name, t, y=Y, step=2e-3):
    def at(k):
        return refitted(name, t + k * step, y)

    return (8 * (at(1) - at(-1)) - at(2) + at(-2)) / (12 * step)


def test_estimates():
    value, slope = jax.jit(lambda t: jax.jvp(partial(figures, "one kernel"), (t,), (1.0,)))(AT)
    np.testing.assert_allclose(value, refitted("one kernel", AT), rtol=1e-7, atol=1e-9)
    by_hand = slopes("one kernel", AT)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-5, atol=1e-7)
    assert (np.abs(by_hand) > 1e-4).mean() > 0.5


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_estimates(name):
    """In reverse, under `vmap` against a loop, and twice."""
    function = partial(figures, name)
    at = np.array([AT, -0.4])
    backwards = jax.jit(jax.jacrev(function))
    batch = jax.jit(jax.vmap(jax.jacfwd(function)))(at)
    twice = jax.jit(jax.jacfwd(jax.jacrev(function)))(AT)
    for t, slope in zip(at, batch, strict=True):
        by_hand = slopes(name, t)  # NaN of what is not finite on the boundary
        slope, known = np.asarray(slope), np.isfinite(by_hand)
        np.testing.assert_allclose(slope[known], by_hand[known], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, backwards(t), rtol=1e-8, atol=1e-9)
        assert (slope[~known] == 0).all()
    step = 1e-3
    by_hand = (backwards(AT + step) - backwards(AT - step)) / (2 * step)
    np.testing.assert_allclose(twice, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_variance_of_zero_has_no_derivatives():
    """The optimum without the kernel does not depend on it."""
    levels = np.column_stack([X, np.eye(LEVELS)[CODES]])
    noise = RNG.normal(size=N)
    y = X @ [1, 2] + noise - levels @ np.linalg.lstsq(levels, noise)[0]  # none between levels
    function = partial(figures, "one kernel", y=y)
    assert np.exp(function(AT)[0]) == 0
    value, slope = jax.jit(lambda t: (function(t), jax.jacrev(function)(t)))(AT)
    finite = np.isfinite(value)
    np.testing.assert_allclose(slope[finite], 0, atol=1e-30)
    np.testing.assert_allclose(slopes("one kernel", AT, y)[finite], 0, atol=1e-9)


# What is the matter, and the status.
INDEFINITE = np.where(
    np.eye(LEVELS) > 0, 1.0, 0.9 * np.sign(np.cos(np.add.outer(*[np.arange(9)] * 2)))
)
BAD = {
    "not symmetric": (np.eye(LEVELS) + 0.01 * np.eye(LEVELS, k=1), Status.BAD_KERNEL),
    "indefinite": (INDEFINITE, Status.BAD_KERNEL),
    "no variance": (np.zeros((LEVELS, LEVELS)), Status.BAD_KERNEL),
    "a negative variance": (-rbf(AT, np), Status.BAD_KERNEL),
    "NaN": (np.where(np.eye(LEVELS) > 0, 1.0, np.nan), Status.NOT_FINITE),
    "infinite": (np.diag([np.inf] + [1.0] * (LEVELS - 1)), Status.NOT_FINITE),
    "rounding": (low_rank(0.1, np) + 1e-11 * np.tri(LEVELS), Status.CONVERGED),
    "good": (rbf(AT, np), Status.CONVERGED),
}  # fmt: skip


def of_kernel(kernel):
    return Design.from_arrays(Y, X, Term(CODES, name="g", kernel=kernel))


def test_bad_kernels_have_statuses_and_do_not_spoil_others():
    kernels = np.array([kernel for kernel, _ in BAD.values()])

    @jax.jit
    def masked(kernels):
        def loss(kernels):
            found = jax.vmap(lambda kernel: estimate(of_kernel(kernel)))(kernels)
            good = found.status == Status.CONVERGED
            return jnp.sum(jnp.where(good, found.criterion, 0.0)), found.status

        values = jax.vmap(lambda own: reml_objective(jnp.zeros(2), of_kernel(own)))(kernels)
        return jax.value_and_grad(loss, has_aux=True)(kernels), values

    ((_, status), slope), values = masked(kernels)
    expected = [status for _, status in BAD.values()]
    assert [Status(int(own)) for own in status] == expected
    good = np.array(expected) == Status.CONVERGED
    np.testing.assert_array_equal(np.isfinite(values), good)
    assert (np.asarray(slope)[~good] == 0).all()
    assert np.isfinite(slope[good]).all()
    assert np.abs(slope[-1]).max() > 0
    for (kernel, wrong), value in zip(BAD.values(), values, strict=True):
        if wrong == Status.CONVERGED:
            term = Term(CODES, kernel=kernel)
            assert float(value) == pytest.approx(known_value(np.zeros(2), [term]), rel=1e-7)
            continue
        with pytest.raises(DataError, match=r"the kernel of '?g'? (is|has|contains)"):
            of_kernel(kernel)


def test_what_residuals_say_too_has_the_right_criterion():
    """Refused of a concrete kernel. Of a traced one the criterion is right, the variances are one
    pair of all that say the same, and there are no standard errors."""
    with pytest.raises(DataError, match="cannot be told apart"):
        Design.from_arrays(Y, X, Term(np.arange(N), kernel=np.eye(N)))

    @jax.jit
    def fit(kernel):
        return estimate(Design.from_arrays(Y, X, Term(np.arange(N), kernel=kernel)))

    found = fit(np.eye(N))
    rss = np.linalg.lstsq(X, Y)[1][0]
    degrees = N - 2
    value = degrees * (np.log(2 * np.pi * rss / degrees) + 1) + np.linalg.slogdet(X.T @ X)[1]
    assert float(found.criterion) == pytest.approx(value, rel=1e-10)
    assert found.status == Status.CONVERGED
    assert np.isnan(found.parameters_vcov).all()


def test_the_eigendecomposition_is_of_concrete_kernels():
    def decomposed(kernel):
        term = Term(CODES, kernel=kernel)
        return reml_objective(jnp.zeros(2), Design.from_arrays(Y, X, term, structure="kernel"))

    with pytest.raises(DataError, match=r'"kernel" is of one term .* concrete'):
        jax.eval_shape(decomposed, rbf(AT, np))
