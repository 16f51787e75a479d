"""Satterthwaite's degrees of freedom by their definition, exact ones, and flat directions."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml.model.satterthwaite import degrees, spread


def random_case(seed: int):
    """A definite Hessian (m, m), variances (k,) and slopes (m, k)."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    return root @ root.T, rng.uniform(1, 2, 2), rng.normal(size=(3, 2))


def test_by_definition_alone_and_in_lanes():
    cases = [random_case(seed) for seed in range(4)]
    lanes = [np.stack(parts, axis=-1) for parts in zip(*cases, strict=True)]
    together = degrees(*lanes[1:], spread(lanes[0]))
    for k, (hessian, variance, slopes) in enumerate(cases):
        squares = np.diagonal(slopes.T @ (2 * np.linalg.inv(hessian)) @ slopes)
        expected = 2 * variance**2 / squares
        np.testing.assert_allclose(degrees(variance, slopes, spread(hessian)), expected)
        np.testing.assert_allclose(together[:, k], expected)


@pytest.mark.parametrize("between", [1.3, 1e-3, 1e-6])
def test_balanced_one_way_has_one_less_than_levels(between):
    """The mean's variance is one mean square's expectation over n: exact degrees of freedom, also
    where the variance between levels is next to zero."""
    levels, rows, within = 7, 4, 0.8
    mean_square = within + rows * between
    # The criterion's Hessian at the optimum, in the two mean squares, and these in logarithms
    of_squares = np.diag([(levels - 1) / mean_square**2, levels * (rows - 1) / within**2])
    jacobian = np.array([[rows * between, within], [0.0, within]])
    hessian = jacobian.T @ of_squares @ jacobian
    variance = np.array([mean_square]) / (levels * rows)
    slopes = jacobian[:1].T / (levels * rows)
    assert degrees(variance, slopes, spread(hessian))[0] == pytest.approx(levels - 1)


def test_parameters_on_the_boundary_are_held():
    hessian, variance, slopes = random_case(5)
    inner = degrees(variance, slopes[1:], spread(hessian[1:, 1:]))
    hessian[0] = hessian[:, 0] = np.nan
    slopes[0] = 0.0
    known = spread(hessian)
    assert not known.vcov[0].any() and not known.vcov[:, 0].any()
    np.testing.assert_allclose(degrees(variance, slopes, known), inner)


def test_flat_directions_matter_to_what_moves_along_them():
    hessian, variance, slopes = random_case(6)
    inner = degrees(variance, slopes[:2], spread(hessian[:2, :2]))
    # The third parameter adds to the second alone: they cannot be told apart
    adds = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    flat = adds.T @ hessian[:2, :2] @ adds
    np.testing.assert_allclose(degrees(variance, adds.T @ slopes[:2], spread(flat)), inner)
    moving = adds.T @ slopes[:2] + np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    found = degrees(variance, moving, spread(flat))
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1], inner[1])


def test_none_where_the_hessian_is_not_semidefinite():
    hessian, variance, slopes = random_case(7)
    hessian[0, 0] = -1.0
    assert np.isnan(degrees(variance, slopes, spread(hessian))).all()
