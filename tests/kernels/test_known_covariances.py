"""`jaxreml.kernels`: against definitions worked out another way, and published pedigrees."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.special import gamma, kv

import jaxreml
from jaxreml import kernels

# Mrode (2005, Linear Models for the Prediction of Animal Breeding Values), example 2.1: A is
# worked out here by the tabular method.
ANIMAL, SIRE, DAM = [3, 4, 5, 6], [1, 1, 4, 5], [2, None, 3, 2]


def tabular(sires: np.ndarray, dams: np.ndarray) -> np.ndarray:
    """A row by row (Emik and Terrill 1949), of animals after their parents."""
    n = len(sires)
    A = np.zeros((n, n))
    for i in range(n):
        known = [p for p in (sires[i], dams[i]) if p >= 0]
        A[i, :i] = A[:i, i] = sum((A[p, :i] for p in known), np.zeros(i)) / 2
        A[i, i] = 1 + (A[sires[i], dams[i]] / 2 if len(known) == 2 else 0)
    return A


def test_a_published_pedigree():
    found = kernels.pedigree(ANIMAL, SIRE, DAM).relationship(range(1, 7))
    expected = [
        [1.0, 0.0, 0.5, 0.5, 0.5, 0.25],
        [0.0, 1.0, 0.5, 0.0, 0.25, 0.625],
        [0.5, 0.5, 1.0, 0.25, 0.625, 0.5625],
        [0.5, 0.0, 0.25, 1.0, 0.625, 0.3125],
        [0.5, 0.25, 0.625, 0.625, 1.125, 0.6875],
        [0.25, 0.625, 0.5625, 0.3125, 0.6875, 1.125],
    ]
    np.testing.assert_allclose(found, expected)


def random_pedigree(seed: int, founders: int = 8, n: int = 60):
    rng = np.random.default_rng(seed)
    labels = [f"x{k}" for k in rng.permutation(n)]
    rows = []
    for k in range(founders, n):
        # Sires are even and dams odd; some are unknown.
        sire, dam = 2 * int(rng.integers(0, k // 2)), 2 * int(rng.integers(0, k // 2)) + 1
        rows.append(
            (
                labels[k],
                labels[sire] if rng.random() > 0.1 else None,
                labels[dam] if rng.random() > 0.1 else None,
            )
        )
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["animal", "sire", "dam"])


@pytest.mark.parametrize("seed", [0, 1])
def test_pedigrees(seed):
    table = random_pedigree(seed)
    tree = kernels.pedigree(table["animal"], table["sire"], table["dam"])
    A = tabular(tree.sires, tree.dams)
    assert tree.inbreeding.max() > 0.05
    np.testing.assert_allclose(tree.relationship(), A, atol=1e-12)
    np.testing.assert_allclose(tree.inbreeding, np.diagonal(A) - 1, atol=1e-12)
    inverse = tree.inverse.matrix
    assert sparse.issparse(inverse) and inverse.nnz < inverse.shape[0] ** 2 / 3
    np.testing.assert_allclose(inverse.toarray() @ A, np.eye(len(A)), atol=1e-10)
    some = list(tree.labels[3:30:4])
    np.testing.assert_allclose(tree.inverse.covariance(some), tree.relationship(some), atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b", None), ("b", "a", None)], "its own ancestor"),
        ([("a", "b", "c"), ("a", "b", "c")], "'a' has more than one row"),
        ([("a", "b", "b")], "'b' is both the sire and the dam of 'a'"),
        ([(None, "b", "c")], "a row without an animal"),
    ],
)
def test_bad_pedigrees(rows, message):
    with pytest.raises(jaxreml.DataError, match=message):
        kernels.pedigree(*zip(*rows, strict=True))


def test_breeding_values_of_a_published_herd():
    """Mrode (2005), example 3.1: weaning gains of five calves, variances 20 and 40 given; modes
    against Henderson's equations, whose solution he prints."""
    tree = kernels.pedigree(range(1, 9), [0, 0, 0, 1, 3, 1, 4, 3], [0, 0, 0, 0, 2, 2, 5, 6],
                            unknown=[0])  # fmt: skip
    calf, sex = np.array([4, 5, 6, 7, 8]), np.array([0, 1, 1, 0, 0])
    y = np.array([4.5, 2.9, 3.9, 3.5, 5.0])
    X, Z = np.eye(2)[sex], np.eye(8)[calf - 1]
    labels = list(tree.labels)
    order = [labels.index(k) for k in range(1, 9)]
    inverse = tree.inverse.matrix.toarray()[np.ix_(order, order)]
    whole = np.block([[X.T @ X, X.T @ Z], [Z.T @ X, Z.T @ Z + 2 * inverse]])
    solution = np.linalg.solve(whole, np.concatenate([X.T @ y, Z.T @ y]))
    printed = [4.358, 3.404, 0.098, -0.019, -0.041, -0.009, -0.186, 0.177, -0.249, 0.183]
    np.testing.assert_allclose(solution, printed, atol=6e-4)

    term = jaxreml.Term(calf - 1, kernel=tree.relationship(range(1, 9)), name="animal")
    design = jaxreml.Design.from_arrays(y, X, [term])
    from jaxreml.optimum.effects import conditional_modes

    omega = design.omega_of_theta(np.sqrt([20 / 40]))
    (modes,) = conditional_modes(omega, design)
    np.testing.assert_allclose(modes[:, 0], solution[2:], atol=1e-10)


def test_genotypes():
    rng = np.random.default_rng(2)
    counts = rng.binomial(2, rng.uniform(0.1, 0.9, 300), size=(20, 300)).astype(float)
    counts[:, 0] = 1.0  # heterozygous in all
    p = counts.mean(axis=0) / 2
    M = counts - 2 * p
    found = kernels.from_genotypes(counts)
    np.testing.assert_allclose(found, M @ M.T / np.sum(2 * p * (1 - p)))
    assert np.abs(found.to_numpy().sum(axis=0)).max() < 1e-10
    holes = counts.copy()
    holes[3, 5] = np.nan
    filled = counts.copy()
    filled[3, 5] = np.nanmean(holes[:, 5])
    np.testing.assert_allclose(
        kernels.from_genotypes(holes), kernels.from_genotypes(filled), atol=1e-12
    )
    H = np.where(counts == 1, 2 * p * (1 - p), np.where(counts == 2, -2 * (1 - p) ** 2, -2 * p**2))
    D = kernels.from_genotypes(counts, effect="dominance")
    np.testing.assert_allclose(D, H @ H.T / np.sum((2 * p * (1 - p)) ** 2))
    with pytest.raises(jaxreml.DataError, match="'b' has 3 at marker 1"):
        kernels.from_genotypes(pd.DataFrame([[0, 1], [2, 3]], ["a", "b"]))
    with pytest.raises(jaxreml.DataError, match="no marker varies"):
        kernels.from_genotypes([[2, 0], [2, 0]])


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_matern(nu):
    """By the modified Bessel function."""
    places = np.random.default_rng(4).uniform(size=(15, 2))
    apart = np.linalg.norm(places[:, None] - places, axis=2)
    u = np.sqrt(2 * nu) * apart / 0.4
    with np.errstate(invalid="ignore"):
        expected = np.where(u > 0, 2 ** (1 - nu) / gamma(nu) * u**nu * kv(nu, u), 1.0)
    np.testing.assert_allclose(kernels.matern(places, 0.4, nu), expected, rtol=1e-12)
    np.testing.assert_allclose(kernels.matern(apart, 0.4, nu, distances=True), expected)
    bent = np.ones((4, 4)) - np.eye(4)
    bent[0, 1] = bent[1, 0] = 50.0
    with pytest.raises(jaxreml.DataError, match="not positive semidefinite"):
        kernels.matern(bent, 20.0, nu, distances=True)


def test_neighbours():
    W = np.zeros((7, 7))
    for i, j in [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 6)]:
        W[i, j] = W[j, i] = 1
    names = list("abcdefg")
    frame = pd.DataFrame(W, names, names)
    degrees = np.diag(W.sum(axis=1))
    proper = kernels.car(frame, 0.8)
    np.testing.assert_allclose(proper.covariance(), np.linalg.inv(degrees - 0.8 * W), atol=1e-12)
    found = kernels.icar(sparse.csr_matrix(W), names).to_numpy()
    for part in (slice(0, 3), slice(3, 7)):
        own = found[part, part]
        expected = np.linalg.pinv((degrees - W)[part, part])
        np.testing.assert_allclose(own / own[0, 0], expected / expected[0, 0], atol=1e-10)
        assert np.log(np.diagonal(own)).mean() == pytest.approx(0)
        assert np.abs(own.sum(axis=0)).max() < 1e-10
    assert not found[:3, 3:].any()
    W[6] = W[:, 6] = 0
    with pytest.raises(jaxreml.DataError, match="1 of 7 areas have no neighbour, the first 'g'"):
        kernels.icar(W, names)
    with pytest.raises(jaxreml.DataError, match="positive definite, and this is not"):
        kernels.Inverse(degrees - W, names).covariance()


def test_phylogeny():
    tree = "(((a:1,'b c':2)ab:0.5,d:2.5):1 , (e:3,f:1[extinct]):0.25)root;"
    found = kernels.phylogeny(tree, scale=False)
    expected = pd.DataFrame(np.diag([2.5, 3.5, 3.5, 3.25, 1.25]), found.index, found.index)
    for first, second, shared in [("a", "b c", 1.5), ("a", "d", 1.0), ("b c", "d", 1.0),
                                  ("e", "f", 0.25)]:  # fmt: skip
        expected.loc[first, second] = expected.loc[second, first] = shared
    pd.testing.assert_frame_equal(found, expected)
    assert kernels.phylogeny(tree).to_numpy().max() == 1
    for text, message in [
        ("((a:1,b:1):1,c:2", "brackets"),
        ("(a:1,b)", "'b'"),
        ("(a:1,a:1)", "twice"),
        ("(a:1,b:-1)", "no number from 0 on"),
        ("a,b", "brackets"),
    ]:
        with pytest.raises(jaxreml.DataError, match=message):
            kernels.phylogeny(text)
