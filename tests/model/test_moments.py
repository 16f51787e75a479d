"""`Design.from_moments` is `Design.from_arrays` of the rows that were summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreml
from jaxreml import DataError, Design, Status, Term, estimate, ml_objective, reml_objective

RNG = np.random.default_rng(3)
NAMES = [("g", ("(Intercept)", "x"))]


def sums(y, X, codes, Z, weights=1.0):
    """The arguments of `from_moments`, NumPy or traced; levels 0..J-1."""
    xp = jnp if isinstance(y * weights, jax.Array) else np
    level = np.equal(codes, np.arange(codes.max() + 1)[:, None]).astype(float)
    weights = weights * np.ones(len(codes))
    of_z = xp.einsum("jn,na,n->jna", level, Z, weights)
    of_x = X * weights[:, None]
    zx, zy = xp.einsum("jna,np->jap", of_z, X), xp.einsum("jna,n->ja", of_z, y)
    zz = xp.einsum("jna,nb->jab", of_z, Z)
    return zz, zx, zy, of_x.T @ X, of_x.T @ y, (weights * y) @ y, len(codes)


def rows(seed: int, n: int = 60, levels: int = 8, spread: float = 1.0):
    """Unbalanced: some levels have fewer rows than effects, in others the covariate ties."""
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(levels), rng.choice(levels - 2, n - levels)])
    x = rng.integers(0, 4, n) * 1.5
    X = np.column_stack([np.ones(n), x, rng.normal(size=n)])
    y = 2 + 0.3 * x + rng.normal(size=n) + (spread * rng.normal(size=(levels, 2)) @ [1, 0.2])[codes]
    return y, X, codes, X[:, :2]


def designs(y, X, codes, Z, weights=None):
    of_rows = Design.from_arrays(y, X, [Term(codes, Z, *NAMES[0])], weights=weights)
    if weights is None:
        return of_rows, Design.from_moments(*sums(y, X, codes, Z), names=NAMES)
    logs = np.log(weights).sum()
    moments = sums(y, X, codes, Z, weights)
    return of_rows, Design.from_moments(*moments, log_weights=logs, names=NAMES)


@pytest.mark.parametrize("objective", [reml_objective, ml_objective])
def test_sleepstudy(objective):
    data = jaxreml.datasets.load("sleepstudy")
    codes = data["Subject"].cat.codes.to_numpy()
    X = np.column_stack([np.ones(180), data["Days"]])
    of_rows, of_sums = designs(data["Reaction"].to_numpy(), X, codes, X)
    assert of_rows.parameter_names == of_sums.parameter_names
    for seed in range(3):
        parameters = np.random.default_rng(seed).normal(size=4) + 3
        wanted = objective(parameters, of_rows)
        assert objective(parameters, of_sums) == pytest.approx(float(wanted), abs=1e-8)
    method = "REML" if objective is reml_objective else "ML"
    one, other = estimate(of_rows, method), estimate(of_sums, method)
    assert other.status == Status.CONVERGED
    assert float(other.criterion) == pytest.approx(float(one.criterion), abs=1e-8)
    np.testing.assert_allclose(other.beta, one.beta, rtol=1e-8)
    np.testing.assert_allclose(other.theta, one.theta, rtol=1e-5)
    np.testing.assert_allclose(other.vcov, one.vcov, rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_designs(seed, weighted):
    given = rows(seed)
    weights = np.random.default_rng(seed).uniform(0.3, 3, 60) if weighted else None
    of_rows, of_sums = designs(*given, weights)
    for k in range(4):
        parameters = np.random.default_rng(k).normal(size=4) * (1 + k)
        for objective in (reml_objective, ml_objective):
            wanted = float(objective(parameters, of_rows))
            assert float(objective(parameters, of_sums)) == pytest.approx(wanted, abs=1e-8)
    if not weighted:
        wanted = float(reml_objective(parameters, of_rows, harville=True))
        found = float(reml_objective(parameters, of_sums, harville=True))
        assert found == pytest.approx(wanted, abs=1e-8)
    else:
        assert np.isnan(reml_objective(parameters, of_sums, harville=True))


def test_traced_as_concrete_with_its_derivatives():
    """Also where the covariate ties within a level."""
    y, X, codes, Z = rows(1)
    weights = RNG.uniform(0.5, 2, y.size)
    parameters = np.array([0.3, -0.5, 0.2, 0.1])

    def of_sums(y, scale, w):
        effects = Z * jnp.stack([1.0, scale])
        moments = sums(y, X * jnp.stack([1.0, scale, 1.0]), codes, effects, w)
        return Design.from_moments(*moments, log_weights=jnp.sum(jnp.log(w)), names=NAMES)

    def of_rows(y, scale, w):
        effects = Z * jnp.stack([1.0, scale])
        columns = X * jnp.stack([1.0, scale, 1.0])
        return Design.from_arrays(y, columns, [Term(codes, effects, *NAMES[0])], weights=w)

    def slopes(objective, of):
        def value(*own):
            return objective(parameters, of(*own))

        at = jnp.asarray(y), 1.3, jnp.asarray(weights)
        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*at)

    for objective in (reml_objective, ml_objective):
        found, wanted = slopes(objective, of_sums), slopes(objective, of_rows)
        assert float(found[0]) == pytest.approx(float(wanted[0]), abs=1e-8)
        for one, other in zip(found[1], wanted[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_mapped_over_responses_and_what_is_wrong_with_them():
    y, X, codes, Z = rows(2)
    others = np.stack([y, y + RNG.normal(size=y.size), 1e9 + y])
    others = np.concatenate([others, np.full((1, y.size), np.nan)])

    @jax.jit
    def fits(responses):
        def fit(y):
            return estimate(Design.from_moments(*sums(y, X, codes, Z), names=NAMES))

        return jax.vmap(fit)(responses)

    found = fits(jnp.asarray(others))
    wanted = [Status.CONVERGED, Status.CONVERGED, Status.ILL_CONDITIONED, Status.NOT_FINITE]
    assert [Status(int(status)) for status in found.status] == wanted
    for k in range(2):
        alone = estimate(Design.from_arrays(others[k], X, [Term(codes, Z, *NAMES[0])]))
        assert float(found.criterion[k]) == pytest.approx(float(alone.criterion), abs=1e-8)


def test_digits_lost_to_squares_are_told():
    y, X, codes, Z = rows(3)
    assert designs(y, X, codes, Z)[1].trouble == Status.CONVERGED
    far = X.copy()
    far[:, 2] += 1e6
    assert designs(y, far, codes, Z)[1].trouble == Status.ILL_CONDITIONED
    assert designs(y + 1e9, X, codes, Z)[1].trouble == Status.ILL_CONDITIONED
    late = np.column_stack([np.ones(60), X[:, 1] + 1e6])
    assert designs(y, X[:, :1], codes, late)[1].trouble == Status.ILL_CONDITIONED


def test_dependent_columns_are_left_out_if_traced():
    y, X, codes, Z = rows(4)
    twice = np.column_stack([X, X[:, 1]])
    parameters = np.zeros(4)
    alone = reml_objective(parameters, designs(y, X, codes, Z)[0])

    @jax.jit
    def found(X):
        design = Design.from_moments(*sums(jnp.asarray(y), X, codes, Z), names=NAMES)
        return reml_objective(parameters, design), design.trouble

    value, trouble = found(twice)
    assert float(value) == pytest.approx(float(alone), abs=1e-8)
    assert trouble == Status.RANK_DEFICIENT


def test_without_fixed_effects_and_with_terms():
    y, _, codes, Z = rows(5)
    none = np.zeros((y.size, 0))
    names = [("g", ("a",)), ("g", ("b",))]
    of_sums = Design.from_moments(*sums(y, none, codes, Z), names=names)
    of_rows = Design.from_arrays(y, none, [(codes, Z[:, :1]), (codes, Z[:, 1:])])
    assert of_sums.sizes == (1, 1)
    parameters = np.array([0.1, 0.2, 0.3])
    wanted = float(reml_objective(parameters, of_rows))
    assert float(reml_objective(parameters, of_sums)) == pytest.approx(wanted, abs=1e-8)


GOOD = dict(zip(("zz", "zx", "zy", "xx", "xy", "yy", "n"), sums(*rows(0)), strict=True))


class TestRefused:
    """Bad arguments, each named."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"zz": np.ones((8, 2))}, "zz must have shape"),
            ({"zx": np.ones((8, 2, 2))}, "zx must have shape"),
            ({"zy": np.ones((7, 2))}, "zy must have shape"),
            ({"xx": np.ones((3, 2))}, "xx must have shape"),
            ({"xy": np.ones(2)}, "xy must have shape"),
            ({"yy": np.ones(1)}, "yy must have shape"),
            ({"xy": np.array([1.0, np.nan, 2.0])}, "xy contains NaN"),
            ({"zz": GOOD["zz"] + np.triu(np.ones((2, 2)), 1)}, "zz is not symmetric"),
            ({"xx": GOOD["xx"] + np.triu(np.ones((3, 3)), 1)}, "xx is not symmetric"),
            ({"yy": -1.0}, "yy has a negative"),
            ({"xx": np.ones((3, 3)) * GOOD["yy"]}, "column 1 of X"),
            ({"n": 3}, "3 columns and only 3 rows"),
            ({"zz": np.ones((60, 1, 1)), "zx": np.ones((60, 1, 3)), "zy": np.ones((60, 1))}, "one"),
            ({"zz": GOOD["zz"][:1]}, "must have shape|one level"),
            ({"names": [("g", ("a",))]}, "names must have 2 effects"),
        ],
    )
    def test_named(self, change, message):
        with pytest.raises(DataError, match=message):
            Design.from_moments(**GOOD | change)
