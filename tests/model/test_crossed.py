"""Several grouping factors: the crossed structure equals the dense one in everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxreml
from jaxreml import DataError, Design, Term, estimate, ml_objective, reml_objective
from jaxreml.model.covariance import natural
from jaxreml.model.design import stack
from jaxreml.model.objective import expand
from jaxreml.model.structures import Crossed
from jaxreml.model.structures.crossed import planning
from jaxreml.optimum.estimate import estimate_on_host

KINDS = ["crossed", "partial", "nested", "three nested", "vectors", "one factor", "mixed", "chain"]
N = 120


def factors(kind: str, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """Codes and numbers of effects of a kind of design; unbalanced."""

    def codes(levels: int, n: int = N) -> np.ndarray:
        some = rng.choice(levels, n, p=rng.dirichlet(np.full(levels, 2.0)))
        some[:levels] = np.arange(levels)
        return rng.permutation(some)

    fine = codes(24)
    return {
        "crossed": [(codes(9), 1), (codes(14), 1)],
        "partial": [(fine, 1), (np.where(rng.random(N) < 0.8, fine // 3, codes(8)), 1)],
        "nested": [(fine // 4, 1), (fine, 1)],
        "three nested": [(fine // 2, 1), (fine, 1), (fine // 8, 1)],
        "vectors": [(codes(9), 2), (codes(6), 2), (codes(7), 1)],
        "one factor": [(codes(12), 2)],
        "mixed": [(codes(5), 2), (fine // 4, 1), (fine, 1), (codes(4), 1)],
        "chain": [(fine, 2), (fine // 3, 2), (fine // 12, 1), (codes(6), 2)],
    }[kind]


def random_design(kind: str, pattern: int, seed: int, structure: str) -> Design:
    """The pattern of the factors has a seed of its own: it sets the shapes that are compiled."""
    groups = factors(kind, np.random.default_rng(pattern))
    rng = np.random.default_rng(seed)
    terms = []
    for codes, q in groups:
        columns = rng.normal(size=(N, q)) * 10.0 ** rng.uniform(-2, 2, q)
        columns[:, 0] = 1.0
        terms.append(Term(codes, columns))
    X = np.column_stack([np.ones(N), rng.normal(size=N)])
    y = rng.normal(size=N) + 3 * rng.normal(size=N)[groups[0][0]]
    weights = rng.uniform(0.2, 3, N)
    return Design.from_arrays(y, X, terms, weights=weights, structure=structure)


def random_omega(seed: int, sizes: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=natural.count_theta(sizes)) * 10 ** rng.uniform(-2, 2)
    theta[rng.random(theta.size) < 0.2] = 0  # singular ones too
    return natural.omega_from_theta(theta, sizes)


expand_jit = jax.jit(expand, static_argnames="reml")


def assemble_by_pairs(monkeypatch) -> None:
    """The tail's cross-products pair by pair; designs as small as these use matrix products."""
    monkeypatch.setattr(planning, "PAIR", 0)


def compare(kind: str, pattern: int, seed: int, reml: bool, expand=expand) -> None:
    crossed = random_design(kind, pattern, seed, "crossed")
    dense = random_design(kind, pattern, seed, "dense")
    assert isinstance(crossed.structure, Crossed)
    omega = random_omega(seed, crossed.sizes)
    left, right = (expand(omega, design, reml=reml) for design in (crossed, dense))
    np.testing.assert_allclose(left.value, right.value, rtol=1e-9)
    for name in ("gradient", "hessian", "joint_hessian", "gram_slopes", "log_sigma2"):
        a, b = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(a, b, atol=1e-9 * (1 + np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize("by_pairs", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(pattern=st.integers(0, 5), seed=st.integers(0, 2**31), reml=st.booleans())
def test_crossed_equals_dense(kind, by_pairs, monkeypatch, pattern, seed, reml):
    if by_pairs:
        assemble_by_pairs(monkeypatch)
    compare(kind, pattern, seed, reml)


@pytest.mark.parametrize("kind", ["partial", "vectors", "chain"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_crossed_equals_dense_by_jax(kind, monkeypatch, seed):
    if kind != "partial":
        assemble_by_pairs(monkeypatch)
    compare(kind, 0, seed, reml=kind != "vectors", expand=expand_jit)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(pattern=st.integers(1, 5), seed=st.integers(0, 2**31), reml=st.booleans())
def test_crossed_equals_dense_on_400_designs(kind, monkeypatch, pattern, seed, reml):
    if pattern % 2:
        assemble_by_pairs(monkeypatch)
    compare(kind, pattern, seed, reml, expand=expand_jit)


def test_autodiff_of_the_objectives():
    """Through the custom rules, at first and second order, a variance of zero included."""
    crossed = random_design("mixed", 0, 3, "crossed")
    dense = random_design("mixed", 0, 3, "dense")
    names = crossed.parameter_names
    for low in (0.0, -60.0):  # exp(-60): as good as a variance of zero
        params = jnp.linspace(-0.4, 0.3, len(names)).at[0].add(low)
        objective = reml_objective if low else ml_objective
        one, other = (
            jax.jit(lambda p, d: (objective(p, d), jax.grad(objective)(p, d)))(params, design)  # noqa: B023
            for design in (crossed, dense)
        )
        np.testing.assert_allclose(one[0], other[0], rtol=1e-10)
        np.testing.assert_allclose(one[1], other[1], atol=1e-8)
    params = jnp.linspace(-0.4, 0.3, len(names))
    ours = jax.jit(jax.hessian(reml_objective))(params, crossed)
    theirs = jax.jit(jax.hessian(reml_objective))(params, dense)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)
    gradient = jax.jit(jax.grad(reml_objective))
    step = 1e-5
    for k in (0, len(names) // 2):
        by_k = (
            gradient(params.at[k].add(step), crossed) - gradient(params.at[k].add(-step), crossed)
        ) / (2 * step)
        np.testing.assert_allclose(ours[k], by_k, atol=1e-5 * (1 + np.abs(by_k).max()))


def test_fit_can_be_differentiated_through():
    """Derivatives of the estimates in the response, both ways, equal those of the dense fit."""
    groups = factors("crossed", np.random.default_rng(0))
    rng = np.random.default_rng(1)
    X = np.column_stack([np.ones(N), rng.normal(size=N)])
    effects = [rng.normal(size=codes.max() + 1)[codes] for codes, _ in groups]
    y = jnp.asarray(rng.normal(size=N) + sum(effects))

    def sigma(y, structure):
        design = Design.from_arrays(y, X, [codes for codes, _ in groups], structure=structure)
        return estimate(design).theta.sum()

    by_y = jax.jit(jax.grad(lambda y: sigma(y, "crossed")))(y)
    np.testing.assert_allclose(by_y, jax.jit(jax.grad(lambda y: sigma(y, "dense")))(y), atol=1e-7)
    direction = jnp.asarray(rng.normal(size=N))
    _, along = jax.jit(lambda y, v: jax.jvp(lambda y: sigma(y, "crossed"), (y,), (v,)))(
        y, direction
    )
    assert float(along) == pytest.approx(float(by_y @ direction), rel=1e-8)


def test_vmap_equals_a_loop():
    groups = factors("partial", np.random.default_rng(0))
    rng = np.random.default_rng(2)
    n = 3 * N  # every row three times: the pattern is kept
    codes = [np.tile(codes, 3) for codes, _ in groups]
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    designs = [
        Design.from_arrays(
            rng.normal(size=n) + sum(s * rng.normal(size=c.max() + 1)[c] for c in codes), X, codes
        )
        for s in (0.0, 0.3, 1.0, 3.0, 10.0)
    ]
    together = jax.jit(jax.vmap(estimate))(stack(designs))
    alone = jax.jit(estimate)
    for k, design in enumerate(designs):
        one = alone(design)
        assert int(one.status) == int(together.status[k]) == 0
        assert float(together.criterion[k]) == pytest.approx(float(one.criterion), abs=1e-8)
        np.testing.assert_allclose(together.theta[k], one.theta, atol=2e-5)


def table(rng: np.random.Generator, n: int = 400) -> pd.DataFrame:
    """Sessions in subjects in sites, crossed with items."""
    subject = rng.integers(0, 20, n)
    frame = pd.DataFrame(
        {
            "x": rng.normal(size=n),
            "subject": subject,
            "session": subject * 3 + rng.integers(0, 3, n),
            "site": subject // 4,
            "item": rng.integers(0, 9, n),
        }
    )
    effects = rng.normal(size=9)[frame["item"]] * (1 + 0.5 * frame["x"])
    for name in ("subject", "session", "site"):
        effects += rng.normal(size=frame[name].max() + 1)[frame[name]]
    return frame.assign(y=effects + rng.normal(size=n))


def test_fit_equals_dense():
    data = table(np.random.default_rng(5))
    formula = "y ~ x + (x | item) + (1 | session) + (1 | subject) + (1 | site)"
    ours, theirs = (jaxreml.fit(formula, data, structure=s) for s in ("crossed", "dense"))
    assert (ours.structure, theirs.structure) == ("crossed", "dense")
    assert "crossed" in ours.summary()
    assert ours.criterion == pytest.approx(theirs.criterion, abs=1e-9)
    np.testing.assert_allclose(ours.theta, theirs.theta, atol=1e-6)
    np.testing.assert_allclose(ours.bse, theirs.bse, rtol=1e-6)
    np.testing.assert_allclose(ours.log_variance_se, theirs.log_variance_se, rtol=1e-5)
    np.testing.assert_allclose(ours.df_satterthwaite, theirs.df_satterthwaite, rtol=1e-5)
    np.testing.assert_allclose(ours.fittedvalues, theirs.fittedvalues, atol=1e-6)
    for one, other in zip(ours.groupings, theirs.groupings, strict=True):
        np.testing.assert_allclose(one.modes, other.modes, atol=1e-6)
        np.testing.assert_allclose(one.modes_vcov, other.modes_vcov, atol=1e-6)


def test_variance_of_zero_at_scale():
    """A factor that explains nothing: its variance is exactly 0, and the rest is as without it."""
    rng = np.random.default_rng(11)
    n = 20_000
    user, item = rng.integers(0, 1500, n), rng.integers(0, 120, n)
    idle = rng.integers(0, 40, n)
    noise = rng.normal(size=n)
    sums = np.bincount(idle, noise, 40) / np.bincount(idle, minlength=40)
    y = noise - sums[idle] + rng.normal(size=1500)[user] + 0.5 * rng.normal(size=120)[item]
    data = {"y": y, "user": user, "item": item, "idle": idle}
    whole = jaxreml.fit("y ~ 1 + (1 | user) + (1 | item) + (1 | idle)", data)
    part = jaxreml.fit("y ~ 1 + (1 | user) + (1 | item)", data)
    assert whole.converged and whole.is_singular
    assert whole.log_variances["idle", "(Intercept)"] == -np.inf
    assert np.isnan(whole.log_variance_se["idle", "(Intercept)"])
    assert whole.criterion == pytest.approx(part.criterion, abs=1e-6)
    np.testing.assert_allclose(whole.log_variance_se.dropna(), part.log_variance_se, rtol=1e-5)


def test_variances_where_a_level_meets_few_effects_of_a_large_tail():
    rng = np.random.default_rng(2)
    a, b, x = rng.integers(0, 150, 600), rng.integers(0, 120, 600), rng.normal(size=600)
    y = rng.normal(size=150)[a] * (1 + x) + rng.normal(size=120)[b] + rng.normal(size=600)
    data = {"y": y, "x": x, "a": a, "b": b}
    formula = "y ~ x + (x | a) + (1 | b)"
    ours, theirs = (jaxreml.fit(formula, data, structure=s) for s in ("crossed", "dense"))
    for mine, other in zip(ours.groupings, theirs.groupings, strict=True):
        np.testing.assert_allclose(mine.modes_vcov, other.modes_vcov, rtol=1e-6, atol=1e-9)


def test_purely_nested_has_no_tail():
    codes = np.repeat(np.arange(3000), 4)
    rng = np.random.default_rng(3)
    y = (
        rng.normal(size=codes.size)
        + rng.normal(size=3000)[codes]
        + rng.normal(size=100)[codes // 30]
    )
    design = Design.from_arrays(
        y, np.ones((codes.size, 1)), [codes // 30, codes, codes // 300], structure=None
    )
    structure = design.structure
    assert isinstance(structure, Crossed)
    assert structure.order == (1, 0, 2) and not structure.levels
    largest = max(np.size(leaf) for leaf in jax.tree.leaves(structure))
    assert largest <= 2 * 3000  # X and y by level
    assert int(estimate_on_host(design)[0].status) == 0


def test_crowded_later_factor_goes_to_the_tail(monkeypatch):
    fine = np.random.default_rng(0).integers(0, 30, N)
    fine[:30] = np.arange(30)
    other = np.arange(N) % 7
    y = np.random.default_rng(1).normal(size=N)
    terms = [fine, fine // 3, other]
    chained = Design.from_arrays(y, np.ones((N, 1)), terms)
    monkeypatch.setattr(planning, "MOST_PAIRS", 10)
    crowded = Design.from_arrays(y, np.ones((N, 1)), terms)
    assert [len(d.structure.stages) for d in (chained, crowded)] == [2, 1]
    params = jnp.array([0.1, -0.2, 0.3, 0.0])
    values = [float(reml_objective(params, design)) for design in (chained, crowded)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_too_large_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(planning, "_memory", lambda: 1e5)
    rng = np.random.default_rng(0)
    terms = [rng.integers(0, 50, 400), rng.integers(0, 40, 400)]
    with pytest.raises(DataError, match=r"GiB.*40 random effects.*would help"):
        Design.from_arrays(rng.normal(size=400), np.ones((400, 1)), terms)


def test_confounded_factors_say_so():
    """Two names for one partition: only the sum of the variances is identified."""
    rng = np.random.default_rng(4)
    a = rng.integers(0, 12, 200)
    relabelled = (a * 5 + 3) % 12
    c = rng.integers(0, 8, 200)
    y = rng.normal(size=200) + rng.normal(size=12)[a] + rng.normal(size=8)[c]
    data = {"y": y, "a": a, "b": relabelled, "c": c}
    with pytest.raises(DataError, match=r"a.*b|b.*a"):
        jaxreml.fit("y ~ 1 + (1 | a) + (1 | b) + (1 | c)", data)


def test_disconnected_factors_and_levels_emptied_by_missing_values():
    rng = np.random.default_rng(8)
    block = np.repeat([0, 1], 150)
    a, b = block * 10 + rng.integers(0, 10, 300), block * 6 + rng.integers(0, 6, 300)
    y = rng.normal(size=300) + rng.normal(size=20)[a] + rng.normal(size=12)[b]
    data = pd.DataFrame({"y": y, "a": a, "b": b})
    data.loc[data["a"] == 3, "y"] = np.nan
    ours = jaxreml.fit("y ~ 1 + (1 | a) + (1 | b)", data)
    theirs = jaxreml.fit("y ~ 1 + (1 | a) + (1 | b)", data, structure="dense")
    assert ours.n_dropped == int((a == 3).sum()) and ours.ngroups["a"] == 19
    assert ours.criterion == pytest.approx(theirs.criterion, abs=1e-8)


def test_single_precision_is_taken_when_asked_for():
    rng = np.random.default_rng(9)
    a, b = rng.integers(0, 20, 300), rng.integers(0, 10, 300)
    y = rng.normal(size=300) + rng.normal(size=20)[a] + rng.normal(size=10)[b]
    exact = jax.jit(estimate)(Design.from_arrays(y, np.ones((300, 1)), [a, b]))
    single = jax.jit(estimate)(Design.from_arrays(y, np.ones((300, 1)), [a, b], dtype="float32"))
    assert single.theta.dtype == np.float32 and int(single.status) == 0
    np.testing.assert_allclose(single.theta, exact.theta, rtol=1e-2)


def test_effects_of_equal_squares_have_a_start():
    """Moments cannot tell an intercept from an effect of 1 and -1; the fit can."""
    rng = np.random.default_rng(0)
    g, h, z = rng.integers(0, 20, 300), rng.integers(0, 10, 300), rng.choice([-1.0, 1.0], 300)
    y = rng.normal(size=300) + rng.normal(size=20)[g] + 0.5 * z * rng.normal(size=20)[g]
    data = {"y": y, "z": z, "g": g, "h": h}
    formula = "y ~ z + (z || g) + (1 | h)"
    ours, theirs = (jaxreml.fit(formula, data, structure=s) for s in ("crossed", "dense"))
    assert ours.criterion == pytest.approx(theirs.criterion, abs=1e-8)
    np.testing.assert_allclose(ours.theta, theirs.theta, atol=1e-5)
