"""Kenward-Roger's adjustment against its formulas with n x n matrices, at any parameters."""

from __future__ import annotations

import numpy as np
import pytest
from independent import covariance_matrix, kenward_roger, marginal_covariance

from jaxreml import Design
from jaxreml.backend.compilation import evaluated
from jaxreml.model.covariance import natural
from jaxreml.model.kenward_roger import adjust, single_degrees

N = 48
CASES = {  # per random term the number of levels and of effects; structure
    "intercept": ([(8, 1)], "grouped"),
    "slopes": ([(8, 2)], "grouped"),
    "two terms": ([(8, 1), (8, 2)], "grouped"),
    "crossed": ([(8, 2), (5, 1)], "dense"),
}


@pytest.mark.parametrize("name", CASES)
def test_covariance_and_degrees_by_definition(name):
    groups, structure = CASES[name]
    sizes = tuple(q for _, q in groups)
    rng = np.random.default_rng(len(name))
    order = rng.permutation(N)
    codes = [(order if levels == 8 else np.arange(N)) % levels for levels, _ in groups]
    terms = [(own, rng.normal(size=(N, q))) for own, q in zip(codes, sizes, strict=True)]
    X, weights = rng.normal(size=(N, 3)), rng.uniform(0.5, 2, N)
    parameters = rng.normal(size=natural.count_theta(sizes) + 1)
    V = marginal_covariance(parameters, terms, weights, N)
    vcov, degrees = kenward_roger(X, V, terms, weights)

    roots, start = [], 0
    for q in sizes:
        variances = np.exp(parameters[start : start + q] - parameters[-1])
        stop = start + q * (q + 1) // 2
        relative = covariance_matrix(variances, parameters[start + q : stop])
        roots.append(np.linalg.cholesky(relative))
        start = stop
    theta = natural.join_triangles(tuple(roots))
    y = rng.normal(size=N)
    design = Design.from_arrays(y, X, terms, weights=weights, structure=structure)
    found = evaluated(adjust, theta, parameters, design, on_host=True)
    assert isinstance(found.vcov, np.ndarray) and found.exists
    np.testing.assert_allclose(found.vcov, vcov, rtol=1e-9, atol=1e-12)
    rows = rng.normal(size=(4, 3))
    expected = [degrees(row) for row in rows]
    np.testing.assert_allclose(single_degrees(found, rows), expected, rtol=1e-9)


def test_variances_that_cannot_be_told_apart():
    """It does not matter which where they do the same; nothing is known of those that X takes."""
    rng = np.random.default_rng(1)
    codes, signs = np.arange(N) // 4, np.repeat([1.0, -1.0], N // 2)
    y, one = rng.normal(size=N), np.ones((N, 1))
    x = rng.normal(size=(N, 1))

    def adjusted(X, effects):
        terms = [(codes, own) for own in effects]
        theta, parameters = np.full(len(terms), np.sqrt(1 / len(terms))), np.zeros(len(terms) + 1)
        return evaluated(adjust, theta, parameters, Design.from_arrays(y, X, terms), on_host=True)

    twice, once = (
        adjusted(np.column_stack([one, x]), own) for own in ([one, signs[:, None]], [one])
    )
    assert twice.exists and once.exists
    np.testing.assert_allclose(twice.vcov, once.vcov, rtol=1e-9)
    np.testing.assert_allclose(single_degrees(twice, np.eye(2)), single_degrees(once, np.eye(2)))
    assert not adjusted(np.eye(N // 4)[codes], [one]).exists
