"""Refits of one model to blocks of responses, for every structure.

One grouping factor, and the dense structure, go through `BatchFitter`. Crossed designs have a
program of their own: the host projects a block on the basis, and `estimate` is mapped over it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from jaxreml.arguments import is_reml
from jaxreml.backend.compilation import quick_compilation, remembered
from jaxreml.backend.runtime import neutral
from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.many.engine import BatchFitter, Table
from jaxreml.many.programs import pack, satterthwaite_tests
from jaxreml.many.record import Fits
from jaxreml.many.shared import Reduced, SharedDesign
from jaxreml.model import linalg
from jaxreml.model.design import Design, structure_basis
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.structures import Crossed
from jaxreml.model.structures.crossed.planning import CrossedBasis
from jaxreml.model.units import Units, orthonormal
from jaxreml.optimum.effects import criterion
from jaxreml.optimum.estimate import Estimate, Status, estimate

LANES = 64  # most responses that `estimate` is mapped over at a time
NUMBERS = 2**21  # and most numbers in the larger arrays of them
AGREES = 1e-9  # difference of the two programs' criteria, per unit of the criterion


class Refitter(Protocol):
    """Fits one model to blocks of responses."""

    def fit(self, values: np.ndarray) -> Fits:
        """Fit each column of (n, b) complete `values`."""
        ...

    def gradients(self, params: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients of the objective at `params` for each column of `values`, (b, m + 1)."""
        ...


def refitter(frame: ModelFrame, method: str, structure: str | None = None) -> Refitter:
    """The refitter of a frame, whose own response is not looked at.

    Args:
        frame: rows and terms.
        method: "REML" or "ML".
        structure: as in `fit`; "crossed" where there are several factors, if left out.

    Raises:
        DataError: a structure that the model cannot have.
    """
    if structure is None:
        codes = [term.codes for term in frame.terms]
        one_factor = all(np.array_equal(codes[0], other) for other in codes[1:])
        structure = "grouped" if one_factor else "crossed"
    if structure == "crossed":
        return CrossedRefitter(frame, method)
    return SharedRefitter(frame, method, structure)


def require_some(status: np.ndarray) -> None:
    """Raise DataError if no refit converged."""
    if not np.any(status == Status.CONVERGED):
        why = count_failures(status).index[0]
        raise DataError(f"none of the {len(status)} refits has an optimum: {why}")


def count_failures(status: np.ndarray) -> pd.Series:
    """How many refits ended in each way other than with an optimum, by sentence."""
    codes, counts = np.unique(status[status != Status.CONVERGED], return_counts=True)
    return pd.Series(counts, [Status(code).sentence for code in codes], name="refits", dtype=int)


class SharedRefitter:
    """`BatchFitter` with gradients."""

    def __init__(self, frame: ModelFrame, method: str, structure: str):
        self._fitter = BatchFitter(frame, method, structure=structure)
        self._reml = is_reml(method)
        self.fit = self._fitter.fit

    def gradients(self, params: np.ndarray, values: np.ndarray) -> np.ndarray:
        """As in `Refitter`."""
        shared = replace(self._fitter.whole[0], collapse=None, spectral=None)
        with neutral():
            return np.asarray(_programs(self._reml).shared_gradients(shared, params, values))


class Lane(NamedTuple):
    """What a crossed design has of its response; of many of them, they are the last axis.

    Attributes:
        stages: per stage (q, J), projections of the response.
        tail: (Q,).
        remainder_xy, remainder_yy: (p,) and ().
        beta_ols: (p,).
        residual_ss, total_ss: ().
    """

    stages: tuple[Any, ...]
    tail: Any
    remainder_xy: Any
    remainder_yy: Any
    beta_ols: Any
    residual_ss: Any
    total_ss: Any


class CrossedRefitter:
    """`estimate` mapped over responses of a crossed design.

    Raises:
        DataError: the model does not fit into memory.
    """

    def __init__(self, frame: ModelFrame, method: str):
        self._frame, self._reml = frame, is_reml(method)
        n = len(frame.X)
        roots = np.ones((n, 1)) if frame.weights is None else np.sqrt(frame.weights)[:, None]
        self._roots = roots
        weighted = [term.effects * roots for term in frame.terms]
        units = Units.of(weighted, n)
        effects = [
            (term.codes, units.rows(k, weighted[k]), len(term.levels))
            for k, term in enumerate(frame.terms)
        ]
        basis: Any = structure_basis(effects, "crossed", n)
        self._basis: CrossedBasis = basis
        self._sizes = tuple(columns.shape[1] for columns in weighted)
        self._rows, self._triangle = orthonormal(frame.X * roots)
        fields: Any = {
            "structure": basis.structure(self._rows, self._sizes),
            "basis": self._triangle,
            "beta_ols": np.zeros(frame.X.shape[1]),
            "residual_ss": np.zeros(()),
            "total_ss": np.zeros(()),
            "log_weights": 2 * np.sum(np.log(roots)),
            "log_gram_x": np.full((), np.nan),  # nothing here asks for it
            "units": units,
            "n": np.float64(n),
            "trouble": np.int32(0),
        }
        names = tuple((term.name, term.effect_names) for term in frame.terms)
        design = Design(**fields, p=frame.X.shape[1], names=names, dtype="float64")
        self.shared = design.without_names()
        structure = self.shared.structure
        assert isinstance(structure, Crossed)
        numbers = structure.rest.size + sum(
            stage.tail.size + stage.matrix.size for stage in structure.stages
        )
        self.lanes = min(max(NUMBERS // numbers, 1), LANES)

    def fit(self, values: np.ndarray) -> Fits:
        """As in `Refitter`."""
        b = values.shape[1]
        table = Table(self._frame, b, False, 0)
        p = self.shared.p
        coefficients, estimable = np.arange(p), np.ones(p, bool)
        programs = _programs(self._reml)

        def work(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lanes = self._reduce(values[:, np.resize(columns, self.lanes)])
            with neutral():
                found = programs.estimate(self.shared, lanes)
                return columns, np.asarray(programs.certify(self.shared, lanes, found))

        chunks = np.split(np.arange(b), range(self.lanes, b, self.lanes))
        with ThreadPoolExecutor(os.cpu_count() if self.lanes == LANES else 1) as pool:
            for columns, packed in pool.map(work, chunks):
                table.store(columns, packed, None, coefficients, estimable)
        return table.fits(np.full(b, len(values)), np.zeros(b, int))

    def gradients(self, params: np.ndarray, values: np.ndarray) -> np.ndarray:
        """As in `Refitter`."""
        found = []
        for start in range(0, values.shape[1], self.lanes):
            columns = np.arange(start, min(start + self.lanes, values.shape[1]))
            lanes = self._reduce(values[:, np.resize(columns, self.lanes)])
            with neutral():
                gradients = _programs(self._reml).gradients(self.shared, params, lanes)
            found.append(np.asarray(gradients)[: columns.size])
        return np.concatenate(found)

    def _reduce(self, values: np.ndarray) -> Lane:
        """The cross-products of (n, b) responses."""
        offset = self._frame.offset
        response = (values if offset is None else values - offset[:, None]) * self._roots
        coefficients = self._rows.T @ response
        residual = response - self._rows @ coefficients
        again = self._rows.T @ residual  # what rounding left of a large mean
        residual -= self._rows @ again
        p = self.shared.p
        columns = np.concatenate([self._rows, residual], axis=1)
        structure = self._basis.structure(columns, self._sizes)
        of_stages = [np.asarray(stage.columns)[:, p:] for stage in structure.stages]
        remainder: Any = structure.remainder
        return Lane(
            tuple(np.moveaxis(part, 1, 2) for part in of_stages),
            np.asarray(structure.columns)[:, p:],
            remainder[:p, p:],
            np.diagonal(remainder)[p:],
            np.linalg.solve(self._triangle, coefficients + again),
            np.sum(residual**2, axis=0),
            np.sum(response**2, axis=0),
        )


def _design(shared: Design, lane: Lane) -> Design:
    """The design of one response."""
    structure: Any = shared.structure
    stages = tuple(
        replace(stage, columns=jnp.concatenate([stage.columns, own[:, None]], axis=1))
        for stage, own in zip(structure.stages, lane.stages, strict=True)
    )
    remainder = linalg.border(structure.remainder, lane.remainder_xy, lane.remainder_yy)
    columns = jnp.concatenate([structure.columns, lane.tail[:, None]], axis=1)
    return replace(
        shared,
        structure=replace(structure, stages=stages, columns=columns, remainder=remainder),
        beta_ols=lane.beta_ols,
        residual_ss=lane.residual_ss,
        total_ss=lane.total_ss,
    )


class _Programs:
    """The compiled programs; the certificate is apart from the search."""

    def __init__(self, reml: bool):
        options = quick_compilation(jax.default_backend())
        self.estimate = jax.jit(partial(_estimates, reml=reml), compiler_options=options)
        self.certify = jax.jit(partial(_certified, reml=reml), compiler_options=options)
        self.gradients = jax.jit(partial(_gradients, reml=reml), compiler_options=options)
        self.shared_gradients = jax.jit(
            partial(_shared_gradients, reml=reml), compiler_options=options
        )


_programs = remembered(_Programs)


def _estimates(shared: Design, lanes: Lane, *, reml: bool) -> Estimate:
    """Fits, the responses on the first axis."""
    method = "REML" if reml else "ML"
    return jax.vmap(lambda lane: estimate(_design(shared, lane), method), in_axes=-1)(lanes)


def _certified(shared: Design, lanes: Lane, found: Estimate, *, reml: bool) -> Array:
    """Certified status and numbers of fits as `Table.store` takes them."""

    def certify(lane: Lane, found: Estimate) -> Array:
        value, gradient = criterion(found, _design(shared, lane), reml)
        agrees = jnp.abs(value - found.criterion) <= AGREES * (1 + jnp.abs(value))
        converged = found.status == Status.CONVERGED
        status = jnp.where(converged & ~agrees, Status.NOT_CERTIFIED, found.status)
        norm = jnp.sqrt(jnp.sum(gradient**2))
        tests = satterthwaite_tests(found, jnp.eye(shared.p))
        return pack(replace(found, status=status, gradient_norm=norm), found.criterion, tests)

    return jax.vmap(certify, in_axes=(-1, 0), out_axes=-1)(lanes, found)


def _gradients(shared: Design, params: Array, lanes: Lane, *, reml: bool) -> Array:
    slope = jax.grad(reml_objective if reml else ml_objective)
    return jax.vmap(lambda lane: slope(params, _design(shared, lane)), in_axes=-1)(lanes)


def _shared_gradients(shared: SharedDesign, params: Array, values: Array, *, reml: bool) -> Array:
    slope = jax.grad(reml_objective if reml else ml_objective)

    def of_one(reduced: Reduced) -> Array:
        return slope(params, shared.each(reduced))

    return jax.vmap(of_one, in_axes=-1)(shared.reduce(values, exact=True))
