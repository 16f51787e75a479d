"""Derivatives of estimates in the data, for every structure and covariance: against central
differences of refits by NumPy, which compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreml
from jaxreml import DataError, Design, Status, Term, estimate
from jaxreml.data.residual import Words
from jaxreml.data.residual import covariance as of_residuals
from jaxreml.model.covariance.words import covariance_of
from jaxreml.optimum.estimate import estimate_on_host

FIGURES = ("theta", "parameters", "parameters_vcov", "log_variances", "log_variance_se", "beta")
FIGURES += ("vcov", "vcov_slopes", "sigma", "criterion", "hessian")
STEP = 5e-4
ALL = ("y", "X", "offset", "weights", "effects")
CONCRETE = ("y", "X", "offset")  # what structures take that need concrete effects and weights
RNG = np.random.default_rng(0)

# Groups of rows with three visits, two rows each


@dataclass
class Data:
    """Arrays of a model, and a direction for each."""

    arrays: dict[str, Any]
    rng: Any = field(default_factory=lambda: np.random.default_rng(5))

    def __post_init__(self):
        for name, value in self.arrays.items():
            self.arrays[name] = np.asarray(value, float)
        self.along = {
            name: 0.3 * self.rng.normal(size=value.shape) for name, value in self.arrays.items()
        }
        self.along["weights"] *= self.arrays["weights"]

    def moved(self, steps: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value + steps[name] * self.along[name] if name in steps else value
            for name, value in self.arrays.items()
        }


J, N = 16, 96
GROUP, VISIT = np.repeat(np.arange(J), 6), np.tile(np.repeat(np.arange(3), 2), J)
ITEM, SITE = RNG.integers(0, 6, N), GROUP % 5
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
SHARED = {"X": X, "weights": RNG.uniform(0.5, 2, N), "offset": RNG.normal(size=N)}
NOISE = X @ [1, 0.5] + RNG.normal(size=N) / np.sqrt(SHARED["weights"]) + SHARED["offset"]
ROOT = np.linalg.cholesky([[1.5, 0.8, 0.5], [0.8, 1.2, 0.8], [0.5, 0.8, 1.0]])
VISITS = np.eye(3)[VISIT]
OF_VISITS = np.sum((RNG.normal(size=(J, 3)) @ ROOT.T)[GROUP] * VISITS, axis=1)
OF_SLOPES = np.sum((RNG.normal(size=(J, 2)) @ [[1, 0.4], [0, 0.8]])[GROUP] * X, axis=1)
CROSSING = RNG.normal(size=6)[ITEM]
BY_VISIT = Data({"y": NOISE + OF_VISITS, "effects": VISITS, **SHARED})
SLOPES = Data({"y": NOISE + OF_SLOPES, "effects": X, **SHARED})
NESTED = Data({"y": NOISE + OF_SLOPES + 2.5 * RNG.normal(size=5)[SITE], "effects": X, **SHARED})
CROSSED = Data({"y": NOISE + OF_SLOPES + CROSSING, "effects": X, **SHARED})

# Subjects with a row at each of four visits, some of them missing

KEPT = RNG.random(96) > 0.12
SUBJECT, TIME = np.repeat(np.arange(24), 4)[KEPT], np.tile(np.arange(4), 24)[KEPT]
M = SUBJECT.size
SIGMA = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4))) * np.outer(
    1 + 0.2 * np.arange(4), 1 + 0.2 * np.arange(4)
)
OF_TIMES = (RNG.normal(size=(24, 4)) @ np.linalg.cholesky(SIGMA).T)[SUBJECT, TIME]
THEIRS = {
    "X": np.column_stack([np.ones(M), RNG.normal(size=M)]),
    "weights": RNG.uniform(0.5, 2, M),
    "offset": RNG.normal(size=M),
}
RESIDUALS = OF_TIMES / np.sqrt(THEIRS["weights"]) + THEIRS["offset"]
AT = np.eye(4)[TIME]
WITHIN = Data({"y": RESIDUALS, "effects": np.ones((M, 1)), **THEIRS})
BESIDE = Data(
    {"y": RESIDUALS + 1.5 * RNG.normal(size=24)[SUBJECT], "effects": np.ones((M, 1)), **THEIRS}
)
ACROSS = Data(
    {"y": RESIDUALS + RNG.normal(size=6)[TIME + SUBJECT % 3], "effects": np.ones((M, 1)), **THEIRS}
)

# Subjects at times of their own

OWN, WHEN = np.repeat(np.arange(12), 8), np.sort(RNG.uniform(0, 8, (12, 8)), axis=1).ravel()
NEAR = np.exp(-np.abs(WHEN[:, None] - WHEN) / 2) * (OWN[:, None] == OWN)
SMOOTH = np.linalg.cholesky(NEAR) @ RNG.normal(size=N)
CURVES = SMOOTH / np.sqrt(SHARED["weights"]) + SHARED["offset"]
TIMED = Data({"y": CURVES, "effects": np.ones((N, 1)), **SHARED})
TIMED_BESIDE = Data({"y": CURVES + RNG.normal(size=12)[OWN], "effects": np.ones((N, 1)), **SHARED})

KERNEL = np.cov(RNG.normal(size=(J, 40))) + 0.2 * np.eye(J)

Terms = Callable[[Any], list[Term]]  # of the effects


def design_of(terms: Terms, structure: str | None = None) -> Callable[..., Design]:
    def made(y, X, offset, weights, effects) -> Design:
        return Design.from_arrays(
            y, X, terms(effects), weights=weights, offset=offset, structure=structure
        )

    return made


def by_word(word: str, places: tuple[float, ...] = (), **options) -> Callable[..., Design]:
    def block(size):
        return covariance_of(word, options, {}, size, places)

    return design_of(lambda effects: [Term(GROUP, effects, covariance=block)])


def residual(word: str, *beside: Callable[[Any], Term], structure=None) -> Callable[..., Design]:
    def block(size):
        return of_residuals(Words("", word, "v", "s"), (0.0, 1.0, 2.0, 3.0), ())

    def terms(effects):
        return [*(term(effects) for term in beside), Term(SUBJECT, AT, covariance=block)]

    return design_of(terms, structure)


def timed(word: str, *beside: Callable[[Any], Term]) -> Callable[..., Design]:
    def block(size):
        return of_residuals(Words("", word, "v", "s"), tuple(np.unique(WHEN)), ())

    when = np.ceil(WHEN) + np.tile(np.arange(8.0), 12) if word == "ar1" else WHEN

    def terms(effects):
        return [*(term(effects) for term in beside), Term(OWN, when, covariance=block)]

    return design_of(terms)


def moments(y, X, offset, weights, effects) -> Design:
    """What a database sums by group."""
    xp = np if all(isinstance(own, np.ndarray) for own in (y, X, offset, weights, effects)) else jnp
    member = 1.0 * (GROUP[:, None] == np.arange(J))
    y, weighted = y - offset, weights[:, None] * X
    zz, zx = (xp.einsum("nj,n,na,nb->jab", member, weights, effects, own) for own in (effects, X))
    zy = xp.einsum("nj,n,na,n->ja", member, weights, effects, y)
    logs = xp.log(weights).sum()
    return Design.from_moments(
        zz, zx, zy, weighted.T @ X, weighted.T @ y, y @ (weights * y), N, log_weights=logs
    )


def ar1(at, variance, rho):
    return variance * rho ** jnp.abs(at[:, None] - at)


def unequal(at, variances, rho):
    sds = jnp.sqrt(variances)
    return sds[:, None] * sds * rho ** jnp.abs(at[:, None] - at)


ONE_VARIANCE = jaxreml.covariance.custom(ar1, {"variance": 1.0, "rho": 0.3}, {"rho": "tanh"})
EACH_VARIANCE = jaxreml.covariance.custom(
    unequal, {"variances": np.ones(3), "rho": 0.3}, {"rho": (0, 1)}
)
OF_RESIDUALS = jaxreml.covariance.custom(
    unequal, {"variances": np.ones(4), "rho": 0.3}, {"rho": "tanh"}
)


def intercepts(codes, name="g") -> Callable[[Any], Term]:
    return lambda effects: Term(codes, None, name)


PLACES = (0.0, 1.0, 2.5)
# Design, its data, and what may be traced
CASES: dict[str, tuple[Callable[..., Design], Data, tuple[str, ...]]] = {
    "grouped intercept": (design_of(lambda Z: [Term(GROUP, Z[:, :1])]), SLOPES, ALL),
    "grouped us": (design_of(lambda Z: [Term(GROUP, Z)]), SLOPES, ALL),
    "grouped terms": (
        design_of(lambda Z: [Term(GROUP, Z[:, :1], "g"), Term(GROUP, Z[:, 1:], "g")]),
        SLOPES,
        ALL,
    ),
    "dense": (design_of(lambda Z: [Term(GROUP, Z)], "dense"), SLOPES, ALL),
    "dense crossed": (design_of(lambda Z: [Term(GROUP, Z), Term(ITEM)], "dense"), CROSSED, ALL),
    "crossed": (design_of(lambda Z: [Term(GROUP, Z), Term(ITEM)], "crossed"), CROSSED, CONCRETE),
    "nested": (design_of(lambda Z: [Term(GROUP), Term(SITE)]), NESTED, CONCRETE),
    "moments": (moments, SLOPES, ALL),
    **{
        word: (by_word(word), BY_VISIT, ALL)
        for word in ("us", "diag", "homdiag", "cs", "homcs", "ar1", "hetar1", "toep", "homtoep")
    },
    **{word: (by_word(word, PLACES), BY_VISIT, ALL) for word in ("ou", "exp", "gau", "mat")},
    "rr": (by_word("rr", d=1), BY_VISIT, ALL),
    "own of one variance": (
        design_of(lambda Z: [Term(GROUP, Z, covariance=ONE_VARIANCE)]),
        BY_VISIT,
        ALL,
    ),
    "own of variances": (
        design_of(lambda Z: [Term(GROUP, Z, covariance=EACH_VARIANCE)]),
        BY_VISIT,
        ALL,
    ),
    **{
        f"residual {word}": (residual(word), WITHIN, ALL[:4])
        for word in ("us", "cs", "csh", "ar1", "ar1h", "ad", "toep", "toeph", "sp_exp", "sp_gau")
    },
    "residual own": (
        design_of(lambda Z: [Term(SUBJECT, AT, covariance=OF_RESIDUALS.residual)]),
        WITHIN,
        ALL[:4],
    ),
    "residual beside": (residual("ar1", lambda Z: Term(SUBJECT, Z)), BESIDE, ALL),
    "residual crossed": (residual("ar1", intercepts(TIME + SUBJECT % 3)), ACROSS, CONCRETE),
    "residual dense": (
        residual("ar1", lambda Z: Term(TIME + SUBJECT % 3, Z), structure="dense"),
        ACROSS,
        ALL,
    ),
    "times chain": (timed("sp_exp"), TIMED, ALL[:4]),
    "times ar1": (timed("ar1"), TIMED, ALL[:4]),
    "times series": (timed("sp_gau"), TIMED, ALL[:4]),
    "times beside": (timed("sp_exp", lambda Z: Term(OWN, Z)), TIMED_BESIDE, ALL),
    "kernel": (
        design_of(lambda Z: [Term(GROUP, kernel=KERNEL)]),
        SLOPES,
        CONCRETE,
    ),
    "linear": (
        design_of(lambda Z: [Term(GROUP, name="g", kernel=KERNEL), Term(ITEM)]),
        CROSSED,
        CONCRETE,
    ),
}
SHORT = ("grouped us", "times chain")


def figures_of(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in FIGURES}


def refitted(case: str, steps: dict[str, float]) -> dict[str, np.ndarray]:
    made, data, _ = CASES[case]
    found, _ = estimate_on_host(made(**data.moved(steps)))
    assert int(found.status) == Status.CONVERGED
    return figures_of(found)


def differences(of: Callable[[float], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Central ones of fourth order, of what has a finite number in all places."""
    far, near, ahead, beyond = (of(k * STEP) for k in (-2, -1, 1, 2))
    with np.errstate(invalid="ignore"):
        return {
            name: (8 * (ahead[name] - near[name]) - beyond[name] + far[name]) / (12 * STEP)
            for name in far
        }


def assert_close(found: dict[str, Any], expected: dict[str, np.ndarray], rtol: float = 1e-5):
    for name, own in expected.items():
        known = np.isfinite(own)
        scale = np.abs(own[known]).max(initial=1e-6)
        np.testing.assert_allclose(
            np.asarray(found[name])[known], own[known], atol=rtol * scale, rtol=0, err_msg=name
        )


@pytest.mark.parametrize(
    "case",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_derivatives_equal_differences_of_refits(case):
    """Along a direction of each array; forward and reverse mode; the values are those of NumPy."""
    made, data, inputs = CASES[case]

    def figures(steps):
        return figures_of(estimate(made(**data.moved(steps))))

    zero = dict.fromkeys(inputs, jnp.zeros(()))
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(figures, zero)
    weights = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)

    @jax.jit
    def slopes(steps):
        value, back = jax.vjp(figures, steps)
        return value, back(weights)[0], jax.jacfwd(figures)(steps)

    value, backward, forward = slopes(zero)
    at = refitted(case, {})
    assert_close(value, at, 1e-9)
    # Where second derivatives are costly the search stops 1e-7 standard errors from the optimum.
    rtol = 3e-5 if case == "linear" else 1e-5
    for name in inputs:
        ours = {figure: own[name] for figure, own in forward.items()}
        expected = differences(lambda step, name=name: refitted(case, {name: step}))
        assert_close(ours, expected, rtol)
        total = sum(np.sum(ours[figure] * weights[figure]) for figure in FIGURES)
        assert float(backward[name]) == pytest.approx(float(total), rel=1e-8, abs=1e-10)


# At singular optima: the derivatives of the constrained solution


def least_squares(y: np.ndarray) -> dict[str, np.ndarray]:
    """REML without random effects, weighted, y less its offset."""
    roots = np.sqrt(SHARED["weights"])
    A, b = roots[:, None] * X, roots * (y - SHARED["offset"])
    inverse = np.linalg.inv(A.T @ A)
    beta = inverse @ A.T @ b
    variance = np.sum((b - A @ beta) ** 2) / (N - 2)
    logs = (N - 2) * (np.log(2 * np.pi * variance) + 1) - np.linalg.slogdet(inverse)[1]
    criterion = logs - np.sum(np.log(SHARED["weights"]))
    return {
        "beta": beta,
        "vcov": variance * inverse,
        "sigma": np.sqrt(variance),
        "criterion": criterion,
    }


def refit_of(made: Callable[..., Design]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    def refit(y):
        found, _ = estimate_on_host(made(**{**SHARED, "y": y, "effects": X}))
        return figures_of(found)

    return refit


def unexplained(noise: np.ndarray) -> np.ndarray:
    """What groups, their slopes and items leave: less than nothing varies between them."""
    member, which = np.eye(J)[GROUP], np.eye(6)[ITEM]
    columns = np.column_stack([member, member * X[:, 1:], which])
    roots = np.sqrt(SHARED["weights"])
    share = np.linalg.lstsq(roots[:, None] * columns, roots * noise)[0]
    return noise - columns @ share


FLAT = X @ [1, 0.5] + SHARED["offset"] + unexplained(NOISE)
PARALLEL = FLAT + 1.5 * RNG.normal(size=J)[GROUP]
INTERCEPT = design_of(lambda Z: [Term(GROUP)])
# A model with a part that the data say nothing for, and the model without it
SINGULAR = {
    "variance": (INTERCEPT, FLAT, least_squares),
    "own": (
        design_of(lambda Z: [Term(GROUP, VISITS, covariance=ONE_VARIANCE)]),
        FLAT,
        least_squares,
    ),
    "one of two": (
        design_of(lambda Z: [Term(GROUP), Term(GROUP, Z[:, 1:])]),
        PARALLEL,
        refit_of(INTERCEPT),
    ),
    "of two factors": (
        design_of(lambda Z: [Term(GROUP), Term(ITEM)], "crossed"),
        PARALLEL,
        refit_of(INTERCEPT),
    ),
    "correlation": (
        design_of(lambda Z: [Term(GROUP, VISITS, covariance="homcs")]),
        PARALLEL,
        refit_of(INTERCEPT),
    ),
    "beside times": (
        timed("sp_exp", lambda Z: Term(OWN)),
        CURVES,
        refit_of(timed("sp_exp")),
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        name if name == "variance" else pytest.param(name, marks=pytest.mark.long)
        for name in SINGULAR
    ],
)
def test_singular_optima_have_the_derivatives_of_the_model_without(case):
    made, y, without = SINGULAR[case]
    along = 0.3 * np.random.default_rng(1).normal(size=N)

    def fitted(step):
        return estimate(made(**{**SHARED, "y": y + step * along, "effects": X}))

    def floats(step):
        found = fitted(step)
        return figures_of(found) | {"gradient_norm": found.gradient_norm}, found

    @jax.jit
    def slopes(step):
        """Backwards with weights of zero for all but one figure, as a whole tree has them."""
        figures, back, found = jax.vjp(floats, step, has_aux=True)
        weights = jax.tree.map(jnp.zeros_like, figures) | {"beta": jnp.ones(2)}
        forward = jax.jvp(fitted, (step,), (jnp.ones(()),))[1]
        return found, forward, back(weights)[0]

    found, forward, backward = slopes(jnp.zeros(()))
    assert int(found.status) == Status.CONVERGED
    assert bool(found.is_singular)

    expected = differences(lambda step: without(y + step * along))
    same = {name: expected[name] for name in ("beta", "vcov", "sigma", "criterion")}
    assert_close(figures_of(forward), same)
    assert float(backward) == pytest.approx(float(np.sum(forward.beta)), rel=1e-9)
    assert float(forward.gradient_norm) == 0


# Higher derivatives, vmap


@pytest.mark.long
@pytest.mark.parametrize("case", ["times beside", "own of one variance", "residual own"])
def test_second_derivatives(case):
    made, data, _ = CASES[case]

    def figure(step):
        found = estimate(made(**data.moved({"y": step})))
        return found.parameters[0] + found.beta[1] + found.log_variance_se.sum()

    slope = jax.jit(jax.grad(figure))
    expected = (slope(STEP) - slope(-STEP)) / (2 * STEP)
    for second in (jax.grad(jax.grad(figure)), jax.jacfwd(jax.grad(figure))):
        assert float(jax.jit(second)(0.0)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.long
@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["times", "beside", "own"])
def test_vmap_of_derivatives_equals_a_loop(kind):
    codes, n = np.repeat(np.arange(20), 8), 160
    when = np.sort(RNG.uniform(0, 8, (20, 8)), axis=1).ravel()
    columns = np.column_stack([np.ones(n), RNG.normal(size=n)])
    near = np.exp(-np.abs(when[:, None] - when) / 2) * (codes[:, None] == codes)
    root = np.linalg.cholesky(near)
    responses = (root @ RNG.normal(size=(n, 3)) + RNG.normal(size=(20, 3))[codes]).T

    if kind == "own":  # whose correlation is between 0 and 1
        responses = responses + RNG.normal(size=(3, 20, 3))[:, codes, np.arange(n) % 3]

    def block(size):
        return of_residuals(Words("", "sp_exp", "v", "s"), tuple(np.unique(when)), ())

    terms = {
        "times": [Term(codes, when, covariance=block)],
        "beside": [Term(codes), Term(codes, when, covariance=block)],
        "own": [Term(codes, np.eye(3)[np.arange(n) % 3], covariance=EACH_VARIANCE)],
    }

    def figure(y):
        found = estimate(Design.from_arrays(y, columns, terms[kind]))
        return jnp.where(found.status == Status.CONVERGED, found.parameters[0], jnp.nan)

    both = jax.value_and_grad(figure)
    values, slopes = jax.jit(jax.vmap(both))(jnp.asarray(responses))
    alone = jax.jit(both)
    for k, y in enumerate(responses):
        value, slope = alone(jnp.asarray(y))
        assert float(values[k]) == pytest.approx(float(value), rel=1e-7)
        np.testing.assert_allclose(slopes[k], slope, rtol=1e-6, atol=1e-9)


# How a response is traced, and what cannot be


def test_a_response_in_the_place_of_a_left_side():
    """The design is that of the formula; rows with a missing covariate are left out of both."""
    import pandas as pd

    x, x0 = THEIRS["X"][:, 1].copy(), THEIRS["offset"]
    x[3] = np.nan
    table = pd.DataFrame({"y": RESIDUALS, "x": x, "s": SUBJECT, "t": TIME})
    model = {"residual": "ar1(t | s)", "weights": THEIRS["weights"]}
    whole = jaxreml.design("y ~ x + (1 | s)", table, **model)
    apart = jaxreml.design("~ x + (1 | s)", table, response=table["y"], **model)
    for own, other in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(own, other)

    @jax.jit
    def traced(y, weights, offset):
        own = model | {"weights": weights, "offset": offset}
        found = jaxreml.design("~ x + (1 | s)", table, response=y, **own)
        return found.residual_ss, found.log_weights

    moved = jaxreml.design("y ~ x + (1 | s)", table, offset=2 * x0, **model)
    found = traced(RESIDUALS, THEIRS["weights"], 2 * x0)
    np.testing.assert_allclose(found, [moved.residual_ss, moved.log_weights], rtol=1e-10)
    with pytest.raises(DataError, match=r"response must have shape \(\d+,\)"):
        jaxreml.design("~ x + (1 | s)", table, response=np.zeros(5), **model)


def test_what_cannot_be_traced_is_refused_by_name():
    def refused(function, value, message):
        with pytest.raises(DataError, match=message):
            jax.eval_shape(function, value)

    def times(when):
        made = Term(OWN, when, covariance=lambda size: chain)
        return Design.from_arrays(CURVES, X, [made])

    chain = of_residuals(Words("", "sp_exp", "v", "s"), tuple(np.unique(WHEN)), ())
    refused(times, WHEN, "need concrete subjects and times")

    def known(data):
        own = jaxreml.covariance.custom(
            ar1, {"variance": 1.0, "rho": 0.3}, {"rho": "tanh"}, data=data
        )
        return Design.from_arrays(NOISE, X, [Term(GROUP, VISITS, covariance=own)])

    refused(known, np.arange(3.0), 'Z L\\(h\\) with K = L L\' and the covariance "homdiag"')


def test_no_row_of_a_chain_can_be_left_out():
    def trouble(weights):
        made, data, _ = CASES["times chain"]
        return made(**{**data.arrays, "weights": weights}).trouble

    weights = SHARED["weights"].copy()
    assert int(jax.jit(trouble)(weights)) == Status.CONVERGED
    weights[4] = 0.0
    assert int(jax.jit(trouble)(weights)) == Status.BAD_WEIGHTS
