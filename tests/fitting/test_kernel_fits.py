"""Fits with ``kernels=``: against dense algebra, and against ordinary terms where these are the
same model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from independent import gradient, hessian, marginal_covariance, neg2_loglik

import jaxreml
from jaxreml import kernels

LEVELS, SEEN = 24, 20


def relationship(seed: int, rank: int = 40) -> pd.DataFrame:
    """A covariance of animals; singular where the rank is below their number."""
    G = np.random.default_rng(seed).normal(size=(LEVELS, rank))
    names = [f"a{i:02d}" for i in range(LEVELS)]
    return pd.DataFrame(G @ G.T / rank, names, names)


@cache
def animals(n: int = 60) -> pd.DataFrame:
    """Records of some of the animals in litters; animals 20 to 23 have none."""
    rng = np.random.default_rng(0)
    codes, litter = rng.integers(0, SEEN, n), rng.integers(0, 7, n)
    codes[:SEEN] = np.arange(SEEN)
    b = np.linalg.cholesky(relationship(1).to_numpy()) @ rng.normal(size=(LEVELS, 2))
    x = rng.normal(size=n)
    y = 1 + x + 1.4 * b[codes, 0] + 0.7 * x * b[codes, 1] + 0.8 * rng.normal(size=7)[litter]
    names = relationship(1).index.to_numpy()
    return pd.DataFrame(
        {
            "y": y + rng.normal(size=n),
            "x": x,
            "w": rng.uniform(0.5, 2, n),
            "animal": names[codes],
            "litter": litter,
        }
    )


A, D = relationship(1), relationship(2, rank=15)
MODELS = {
    "one": ("y ~ x + (1 | animal)", {"animal": A}, {}),
    "one, singular": ("y ~ x + (1 | animal)", {"animal": D}, {}),
    "one, ML": ("y ~ x + (1 | animal)", {"animal": A}, {"method": "ML"}),
    "one, weights": ("y ~ x + (1 | animal)", {"animal": A}, {"weights": "w"}),
    "one, linear": ("y ~ x + (1 | animal)", {"animal": A}, {"structure": "linear"}),
    "litter": ("y ~ x + (1 | animal) + (1 | litter)", {"animal": A}, {}),
    "two": ("y ~ x + (1 | animal)", {"animal": {"additive": A, "dominance": D}}, {}),
    "permanent": ("y ~ x + (1 | animal)", {"animal": {"additive": A, "own": None}}, {}),
    "slope": ("y ~ x + (x | animal)", {"animal": A}, {"weights": "w"}),
    "fewer rows than effects": (
        "y ~ x + (1 | animal) + (1 | litter)",
        {"animal": {"a": A, "d": D}},
        {},
    ),
    "slope, litter": ("y ~ x + (x | animal) + (1 | litter)", {"animal": A}, {"method": "ML"}),
}


@cache
def fitted(name: str) -> jaxreml.LMMResults:
    formula, known, options = MODELS[name]
    n = 35 if name == "fewer rows than effects" else 60
    return jaxreml.fit(formula, animals(n), kernels=known, **options)


def parts(fit):
    """Terms of `independent`, in the order of the fit, and their kernels of all levels."""
    frame = fit.frame
    whole = [np.eye(len(t.levels)) if t.kernel is None else t.kernel for t in frame.terms]
    return [(t.codes, t.effects, K) for t, K in zip(frame.terms, whole, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_dense_algebra(name):
    fit = fitted(name)
    assert fit.converged
    frame, reml = fit.frame, fit.method == "REML"
    free = np.isfinite(fit.parameters)
    at = np.where(free, fit.parameters, -30.0)

    def criterion(own):
        whole = at.copy()
        whole[free] = own
        return neg2_loglik(whole, fit.y, frame.X, parts(fit), reml=reml, weights=fit.weights)

    assert criterion(at[free]) == pytest.approx(fit.criterion, abs=1e-7)
    np.testing.assert_allclose(gradient(criterion, at[free]), 0, atol=1e-5)
    curved = hessian(criterion, at[free])
    np.testing.assert_allclose(fit.hessian[np.ix_(free, free)], curved, rtol=1e-4, atol=1e-4)

    # Random effects of all levels, and what is left of their variance
    V = marginal_covariance(at, parts(fit), fit.weights, fit.nobs)
    inverse = np.linalg.inv(V)
    residual = fit.y - frame.X @ fit.beta
    np.testing.assert_allclose(
        fit.vcov_array, np.linalg.inv(frame.X.T @ inverse @ frame.X), rtol=1e-6
    )
    for (codes, Z, K), sigma, own in zip(parts(fit), fit.cov_re_arrays, fit.groupings, strict=True):
        across = np.einsum("ln,nb,ab->lan", K[:, codes], Z, sigma)  # Cov(b, y)
        np.testing.assert_allclose(own.modes, across @ inverse @ residual, atol=1e-6)
        left = np.einsum("ll,ab->lab", K, sigma) - np.einsum(
            "lan,nm,lbm->lab", across, inverse, across
        )
        np.testing.assert_allclose(own.modes_vcov, left, atol=1e-6)


@pytest.mark.parametrize("name", ["one", "slope, litter"])
def test_predictions_of_levels_without_rows(name):
    """Against the conditional distribution in dense algebra, fixed effects unknown."""
    fit = fitted(name)
    new = pd.DataFrame(
        {"x": [0.3, -1.0, 2.0], "animal": ["a22", "a03", "a20"], "litter": [0, 3, 6]}
    )
    X = np.column_stack([np.ones(3), new["x"]])
    both = [np.concatenate([own, other]) for own, other in zip(fit.frame.X.T, X.T, strict=True)]
    terms = []
    for term, (codes, Z, K) in zip(fit.frame.terms, parts(fit), strict=True):
        places = [term.levels.index(level) for level in new[term.factors[0]]]
        own = X[:, : Z.shape[1]]
        terms.append((np.append(codes, places), np.concatenate([Z, own]), K))
    n = fit.nobs
    V = marginal_covariance(fit.parameters, terms, None, n + 3)
    V[n:, n:] -= fit.sigma**2 * np.eye(3)
    inverse = np.linalg.inv(V[:n, :n])
    weights = V[n:, :n] @ inverse
    whole = np.column_stack(both)
    rest = whole[n:] - weights @ whole[:n]
    mean = whole[n:] @ fit.beta + weights @ (fit.y - whole[:n] @ fit.beta)
    variance = V[n:, n:] - weights @ V[:n, n:] + rest @ fit.vcov_array @ rest.T
    found = fit.predict(new, interval="confidence")
    np.testing.assert_allclose(found["prediction"], mean, rtol=1e-7)
    np.testing.assert_allclose(found["std_error"], np.sqrt(np.diagonal(variance)), rtol=1e-6)
    unknown = new.assign(animal="nobody")
    with pytest.raises(jaxreml.DataError, match="'nobody'"):
        fit.predict(unknown)
    assert fit.predict(unknown, allow_new_levels=True).notna().all()


@pytest.mark.parametrize(
    ("formula", "structure"),
    [
        ("Reaction ~ Days + (1 | Subject)", "kernel"),
        ("Reaction ~ Days + (Days | Subject)", "linear"),
    ],
)
def test_independent_levels(formula, structure):
    """A kernel that is the identity is the ordinary model in all that is reported."""
    data = jaxreml.datasets.load("sleepstudy").iloc[:-3]
    plain = jaxreml.fit(formula, data)
    fit = jaxreml.fit(formula, data, kernels={"Subject": np.eye(18)})
    assert fit.structure == structure and plain.structure == "grouped"
    assert fit.criterion == pytest.approx(plain.criterion, abs=1e-8)
    np.testing.assert_allclose(fit.parameters, plain.parameters, rtol=1e-6)
    np.testing.assert_allclose(fit.parameters_vcov(), plain.parameters_vcov(), rtol=1e-4)
    for df in ("satterthwaite", "kenward-roger", "kenward-roger-sas"):
        pd.testing.assert_frame_equal(fit.coefficients(df), plain.coefficients(df), rtol=1e-5)
    pd.testing.assert_frame_equal(
        fit.predict(interval="prediction"), plain.predict(interval="prediction"), rtol=1e-6
    )
    for name in ("random_effects", "random_effects_se"):
        ours, theirs = getattr(fit, name)["Subject"], getattr(plain, name)["Subject"]
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5, check_index_type=False)
    pd.testing.assert_series_equal(fit.leverage(), plain.leverage(), rtol=1e-6)
    pd.testing.assert_frame_equal(fit.dfbetas(), plain.dfbetas(), rtol=1e-5)


def test_forms_of_a_kernel():
    """Rows and columns in any order, arrays of sorted levels, a labelled matrix, an inverse."""
    data, rng = animals(), np.random.default_rng(3)
    expected = fitted("one")
    shuffled = A.iloc[rng.permutation(LEVELS), rng.permutation(LEVELS)]
    seen = A.iloc[:SEEN, :SEEN].to_numpy()
    forms = [
        shuffled,
        seen,
        kernels.Kernel(A.to_numpy(), list(A.index)),
        kernels.Inverse(np.linalg.inv(A.to_numpy()), list(A.index)),
    ]
    for own in forms:
        fit = jaxreml.fit("y ~ x + (1 | animal)", data, kernels={"animal": own})
        assert fit.criterion == pytest.approx(expected.criterion, abs=1e-7)
        modes, others = (f.random_effects["animal"]["(Intercept)"] for f in (fit, expected))
        np.testing.assert_allclose(modes, others[modes.index], atol=1e-7)
        assert fit.ngroups == {"animal": SEEN}


def test_a_variance_of_zero():
    data = animals()
    data = data.assign(y=data["y"] - data.groupby("animal")["y"].transform("mean"))
    for structure in ("kernel", "linear"):
        fit = jaxreml.fit("y ~ 1 + (1 | animal)", data, kernels={"animal": A}, structure=structure)
        assert fit.is_singular and fit.converged
        assert fit.variances.iloc[0] == 0 and np.isnan(fit.log_variance_se.iloc[0])
        assert not fit.random_effects["animal"].to_numpy().any()


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"sire": A}, "'sire', which is no grouping factor"),
        ({"animal": A.iloc[:10, :10]}, "no label for 10 of 20 levels of the data: 'a10'"),
        ({"animal": A.iloc[:, :-1]}, "not square"),
        ({"animal": A.rename(index={"a03": "b"})}, "'b', which is no label of its columns"),
        ({"animal": A.rename(index={"a03": "a04"})}, "'a04' more than once"),
        ({"animal": A + np.triu(np.ones((LEVELS, LEVELS)), 1)}, "not symmetric"),
        ({"animal": A - 0.5 * np.eye(LEVELS)}, "not positive semidefinite: its smallest eigen"),
        ({"animal": A.where(A.iloc[2, 3] != A)}, "entry nan at 'a02', 'a03'"),
        ({"animal": np.eye(7)}, "order 7, and the data have 20 levels"),
        ({"animal": {"a": A, "b": A}}, "animal .a. and animal .b. cannot be told apart"),
        ({"animal": None}, "leave it out for independent levels"),
        (A, "must be a dict"),
    ],
)
def test_bad_kernels(known, message):
    with pytest.raises(jaxreml.DataError, match=message):
        jaxreml.fit("y ~ x + (1 | animal)", animals(), kernels=known)


def test_a_kernel_that_is_the_residual():
    data = animals().iloc[:SEEN]
    with pytest.raises(jaxreml.DataError, match="cannot be told apart"):
        jaxreml.fit("y ~ x + (1 | animal)", data, kernels={"animal": np.eye(SEEN)})
    fit = jaxreml.fit("y ~ x + (1 | animal)", data, kernels={"animal": A})
    assert fit.nobs == fit.ngroups["animal"] == SEEN
    labels = data.assign(animal=np.arange(SEEN))
    with pytest.raises(jaxreml.DataError, match="types of the labels differ: int, str"):
        jaxreml.fit("y ~ x + (1 | animal)", labels, kernels={"animal": A})


HERE = Path(__file__).parents[1] / "reference" / "kernels"


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("one", "y ~ x + (1 | animal)", {}),
        ("one_ml", "y ~ x + (1 | animal)", {"method": "ML"}),
        ("one_weights", "y ~ x + (1 | animal)", {"weights": "w"}),
        ("litter", "y ~ x + (1 | animal) + (1 | litter)", {}),
        ("slope", "y ~ x + (x | animal) + (1 | litter)", {}),
    ],
)
def test_lme4_with_the_relationship_in_its_design(name, formula, options):
    """R's lme4 with Z L in the place of Z, on a pedigree with animals without records."""
    expected = json.loads((HERE / "lme4.json").read_text())["models"][name]
    table, herd = (pd.read_csv(HERE / f"{own}.csv.gz") for own in ("pedigree", "herd"))
    tree = kernels.pedigree(table["animal"], table["sire"], table["dam"])
    fit = jaxreml.fit(formula, herd, kernels={"animal": tree}, **options)
    assert fit.ngroups["animal"] == 50 and len(fit.random_effects["animal"]) == 60
    assert fit.criterion == pytest.approx(expected["criterion"], abs=1e-5)
    np.testing.assert_allclose(fit.params, expected["beta"], rtol=1e-4)
    np.testing.assert_allclose(fit.bse, expected["se"], rtol=1e-3)
    found = fit.variances.tolist()
    if name == "slope":  # R puts the covariance after the two variances
        found.insert(2, fit.cov_re.iloc[0, 1])
    np.testing.assert_allclose(found, expected["vcov"], rtol=2e-3)


@pytest.mark.parametrize("term", ["cs(0 + f | animal)", "diag(x | animal)", "ar1(0 + f | animal)"])
def test_words_for_covariances(term):
    """Omega of any family, Kronecker's product with K: the criterion at what was found."""
    data = animals().assign(f=lambda table: np.where(table["x"] > 0.3, "u", "v"))
    fit = jaxreml.fit(f"y ~ x + {term} + (1 | litter)", data, kernels={"animal": A})
    assert fit.converged
    V = fit.sigma**2 * np.eye(fit.nobs)
    for (codes, Z, K), sigma in zip(parts(fit), fit.cov_re_arrays, strict=True):
        V += (Z @ sigma @ Z.T) * K[np.ix_(codes, codes)]
    X, inverse = fit.frame.X, np.linalg.inv(V)
    M = X.T @ inverse @ X
    rest = fit.y - X @ np.linalg.solve(M, X.T @ inverse @ fit.y)
    value = np.linalg.slogdet(V)[1] + np.linalg.slogdet(M)[1] + rest @ inverse @ rest
    value += (fit.nobs - 2) * np.log(2 * np.pi)
    assert value == pytest.approx(fit.criterion, abs=1e-7)
    plain = jaxreml.fit("y ~ x + (1 | litter)", data)
    assert fit.criterion < plain.criterion
