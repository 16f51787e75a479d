"""NumPy and JAX run the same source: they agree, and the certificate of a fit catches faults."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import ConvergenceWarning, DataError, Design, Term, datasets
from jaxreml.fitting.engines import engine_for
from jaxreml.model.covariance.correlations import Exchangeable
from jaxreml.model.covariance.structured import Structured
from jaxreml.model.structures import Crossed, Grouped
from jaxreml.optimum.effects import inspect_on_host
from jaxreml.optimum.estimate import estimate, estimate_on_host
from jaxreml.status import Status

MODELS = {
    "slopes": ("sleepstudy", "Reaction ~ Days + (Days | Subject)", None),
    "uncorrelated": ("sleepstudy", "Reaction ~ Days + (Days || Subject)", None),
    "boundary": ("dyestuff2", "Yield ~ 1 + (1 | Batch)", None),
    "three effects": ("machines", "score ~ Machine + (Machine | Worker)", None),
    "dense": ("penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)", "dense"),
    "crossed": ("pastes", "strength ~ 1 + (1 | sample) + (1 | batch) + (1 | cask)", "crossed"),
}
REPORTED = (
    "criterion",
    "sigma",
    "theta",
    "parameters",
    "parameters_vcov_array",
    "beta",
    "vcov_array",
    "vcov_slopes",
    "hessian",
)


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_agree(name, method):
    data, formula, structure = MODELS[name]
    table = datasets.load(data)
    ours, theirs = (
        jaxreml.fit(formula, table, method, structure=structure, engine=engine)
        for engine in ("numpy", "jax")
    )
    assert (ours.engine, theirs.engine) == ("numpy", "jax")
    assert ours.structure == theirs.structure
    assert ours.status == theirs.status == Status.CONVERGED
    assert (ours.is_singular, ours.inertia) == (theirs.is_singular, theirs.inertia)
    assert ours.criterion == pytest.approx(theirs.criterion, rel=1e-12)
    for what in REPORTED:
        mine, other = (np.asarray(getattr(fit, what)) for fit in (ours, theirs))
        np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(other), err_msg=what)
        mine, other = (np.where(np.isfinite(own), own, 0.0) for own in (mine, other))
        # The Hessian in a nearly flat direction magnifies the rounding error of the optimum.
        size = np.abs(other).max(initial=0.0)
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-8 * size, err_msg=what)
    pd.testing.assert_frame_equal(ours.tidy(), theirs.tidy(), rtol=1e-6)
    for mine, other in zip(ours.groupings, theirs.groupings, strict=True):
        np.testing.assert_allclose(mine.modes, other.modes, atol=1e-7 * ours.sigma)
        np.testing.assert_allclose(mine.modes_vcov, other.modes_vcov, rtol=1e-6, atol=1e-9)
    if method == "REML":
        tables = [fit.coefficients(df="kenward-roger") for fit in (ours, theirs)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-7)


def random_design(seed: int) -> Design:
    """Unbalanced, with two effects; some are singular."""
    rng = np.random.default_rng(seed)
    n, J = 60, 9
    codes = np.sort(rng.integers(0, J, n))
    codes[:J] = np.arange(J)
    x = rng.normal(size=n) * 10 ** rng.uniform(-2, 2)
    effects = rng.normal(size=(J, 2)) * rng.choice([0.0, 0.3, 3.0], 2)
    y = 1 + x + effects[codes, 0] + effects[codes, 1] * x + rng.standard_t(3, size=n)
    X = np.column_stack([np.ones(n), x])
    return Design.from_arrays(y, X, [Term(codes, X)])


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_engines_agree_on_random_designs(method):
    designs = [random_design(seed) for seed in range(25)]
    compiled = jax.jit(estimate, static_argnames="method")
    singular = 0
    for design in designs:
        ours, _ = estimate_on_host(design.without_names(), method)
        theirs = jax.device_get(compiled(design.without_names(), method=method))
        assert ours.status == theirs.status == Status.CONVERGED
        assert float(ours.criterion) == pytest.approx(float(theirs.criterion), rel=1e-11)
        assert bool(ours.is_singular) == bool(theirs.is_singular)
        np.testing.assert_allclose(ours.beta, theirs.beta, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours.log_variances, theirs.log_variances, atol=1e-4)
        inspection = inspect_on_host(ours, design, method)
        assert np.linalg.norm(inspection.gradient) < 1e-6 * (1 + abs(ours.criterion))
        singular += bool(ours.is_singular)
    assert 0 < singular < len(designs)


def wrong_slope(monkeypatch, structure):
    """A sign, in one of the derivatives."""
    slope = structure.slope
    monkeypatch.setattr(structure, "slope", lambda self, p: slope(self, p) * np.array([1, -1, 1.0]))


def stale_factor(monkeypatch, structure):
    """The projection of the first point, for all the others."""
    kept: list = []
    project = structure.project

    def first(self, omega):
        kept.append(project(self, omega))
        return kept[0]

    monkeypatch.setattr(structure, "project", first)


def another_criterion(monkeypatch, structure):
    """What a miscompiled program is: another number for the same thing."""
    marginal = structure.marginal

    def wrong(self, omega):
        found = marginal(self, omega)
        return found._replace(logdet=found.logdet * (1 + 1e-6))

    monkeypatch.setattr(structure, "marginal", wrong)


FAULTY = {
    Grouped: ("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
    Crossed: ("pastes", "strength ~ 1 + (1 | sample) + (1 | batch) + (1 | cask)"),
}


@pytest.mark.parametrize("structure", FAULTY)
@pytest.mark.parametrize("fault", [wrong_slope, stale_factor, another_criterion])
def test_the_certificate_catches(fault, structure, monkeypatch):
    fault(monkeypatch, structure)
    data, formula = FAULTY[structure]
    kind = structure.__name__.lower()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = jaxreml.fit(formula, datasets.load(data), structure=kind, engine="numpy")
        except DataError:
            return  # a status without numbers
    assert not fit.converged
    assert any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def test_choice_of_engine():
    table = datasets.load("penicillin")
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)"
    fit = jaxreml.fit(formula, table)
    assert (fit.engine, fit.structure) == ("numpy", "dense")
    assert "Structure: dense (numpy)" in fit.summary()
    with pytest.raises(ValueError, match='"numpy" or "jax"'):
        jaxreml.fit(formula, table, engine="rust")
    fit = jaxreml.fit(formula, table, structure="crossed")
    assert (fit.engine, fit.structure) == ("numpy", "crossed")
    X = np.column_stack([np.ones(len(table)), np.linspace(-1, 1, len(table))])

    @dataclass(frozen=True)
    class Compiled(Structured):
        written_out = False

    term = Term(table["plate"], X, covariance=lambda q: Compiled(q, Exchangeable(q), False))
    design = Design.from_arrays(table["diameter"], X, term)
    assert engine_for(design, None) == "jax"  # its derivatives are not written out
    with pytest.raises(ValueError, match="leave engine out"):
        engine_for(design, "numpy")
