"""Responses of a design with crossed factors: the host projects them on the basis of the design,
and `estimate` is mapped over what that leaves of them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.backend.compilation import quick_jit, remembered
from jaxreml.backend.runtime import neutral
from jaxreml.many.numbers import Table
from jaxreml.many.programs import pack, tests_of
from jaxreml.many.shared import Prepared
from jaxreml.model import linalg
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.design import Design, placeholders
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.structures import Crossed
from jaxreml.model.structures.crossed.planning import CrossedBasis
from jaxreml.optimum.effects import conditional_modes, criterion, relative_covariances
from jaxreml.optimum.estimate import estimate
from jaxreml.optimum.report import Estimate

LANES = 64  # most responses that `estimate` is mapped over at a time
NUMBERS = 2**21  # and most numbers in the larger arrays of them


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


@dataclass(frozen=True)
class CrossedRows:
    """A crossed design without a response.

    Attributes:
        prepared: its rows.
        basis: what its random terms span.
        design: the arrays that all responses share; its own response is zero.
        lanes: responses to work on at a time.
    """

    prepared: Prepared
    basis: CrossedBasis
    design: Design
    lanes: int

    @classmethod
    def of(cls, prepared: Prepared, basis: CrossedBasis, lanes: int | None) -> CrossedRows:
        """The design of prepared rows; `lanes` by its size if None."""
        p = len(prepared.triangle)
        fields: Any = {
            "structure": basis.structure(prepared.basis_rows, prepared.sizes),
            "basis": prepared.triangle,
            "beta_ols": np.zeros(p),
            "residual_ss": np.zeros(()),
            "total_ss": np.zeros(()),
            "log_weights": np.float64(prepared.log_weights),
            "log_gram_x": np.full((), np.nan),  # nothing here asks for it
            "units": prepared.units,
            "n": np.float64(prepared.n_used),
            "trouble": np.int32(0),
        }
        design = Design(
            **fields,
            p=p,
            names=placeholders(prepared.sizes),
            covariance=unstructured(prepared.sizes),
            dtype="float64",
        )
        structure = design.structure
        assert isinstance(structure, Crossed)
        numbers = structure.rest.size + sum(
            stage.tail.size + stage.matrix.size for stage in structure.stages
        )
        return cls(prepared, basis, design, lanes or min(max(NUMBERS // numbers, 1), LANES))

    @property
    def threads(self) -> int:
        """How many chunks to work on at a time: large factorisations take all cores each."""
        return (os.cpu_count() or 1) if self.lanes == LANES else 1

    def reduce(self, values: np.ndarray) -> Lane:
        """The cross-products of (n, b) responses; rows that are not used may be anything finite."""
        prepared, p = self.prepared, self.design.p
        response = values if prepared.offset is None else values - prepared.offset[:, None]
        if prepared.roots is not None:
            response = response * prepared.roots[:, None]
        rows = prepared.basis_rows
        coefficients = rows.T @ response
        residual = response - rows @ coefficients
        again = rows.T @ residual  # what rounding left of a large mean
        residual -= rows @ again
        structure = self.basis.structure(np.concatenate([rows, residual], axis=1), prepared.sizes)
        remainder: Any = structure.remainder
        return Lane(
            tuple(np.moveaxis(np.asarray(own.columns)[:, p:], 1, 2) for own in structure.stages),
            np.asarray(structure.columns)[:, p:],
            remainder[:p, p:],
            np.diagonal(remainder)[p:],
            np.linalg.solve(prepared.triangle, coefficients + again),
            np.sum(residual**2, axis=0),
            np.sum(response**2, axis=0),
        )

    def blank(self) -> Design:
        """The design with a response of length 1 that neither X nor Z explains."""
        lane = jax.tree.map(lambda leaf: leaf[..., 0], self.reduce(np.zeros((len(self), 1))))
        return _design(self.design, lane._replace(remainder_yy=np.float64(1)))

    def __len__(self) -> int:
        return len(self.prepared.basis_rows)

    def fit(
        self,
        values: np.ndarray,
        columns: np.ndarray,
        table: Table,
        contrasts: np.ndarray,
        devices: list[Any],
        *,
        reml: bool,
        df: str,
        max_iterations: int,
        modes: bool,
        known: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Fit these columns of (n, b) `values` and store their numbers in the table.

        Args:
            values: missing ones in rows that are not used.
            columns: which.
            table: of the block.
            contrasts: (k, p).
            devices: to work on in turn.
            reml: REML or ML.
            df: degrees of freedom of tests, as in `fit_many`.
            max_iterations: as in `estimate`.
            modes: whether to store conditional modes.
            known: coefficients and estimable, as `Table.store` takes them.
        """
        programs = _programs(reml, df, max_iterations)
        blank = self.blank() if df.startswith("kenward-roger") else None
        lanes = 1 if columns.size == 1 else self.lanes  # a pattern of missing values of its own
        unused = None if self.prepared.used.all() else ~self.prepared.used

        def work(k: int) -> tuple[np.ndarray, np.ndarray, Any]:
            chunk = columns[k : k + lanes]
            block = values[:, np.resize(chunk, lanes)]
            if unused is not None:
                block = np.where(unused[:, None], 0.0, block)
            reduced = self.reduce(block)
            with neutral(), jax.default_device(devices[k // lanes % len(devices)]):
                found = programs.estimate(self.design, reduced)
                packed = programs.certify(self.design, reduced, found, contrasts, blank)
                own = programs.modes(self.design, reduced, found) if modes else None
                return chunk, np.asarray(packed), jax.device_get(own)

        with ThreadPoolExecutor(self.threads) as pool:
            for chunk, packed, own in pool.map(work, range(0, columns.size, lanes)):
                table.store(chunk, packed, own, *known)

    def gradients(self, parameters: np.ndarray, values: np.ndarray, *, reml: bool) -> np.ndarray:
        """Gradients of the objective at `parameters` for each column of `values`, (b, m + 1)."""
        programs = _gradient_program(reml)
        found = []
        for start in range(0, values.shape[1], self.lanes):
            columns = np.arange(start, min(start + self.lanes, values.shape[1]))
            lanes = self.reduce(values[:, np.resize(columns, self.lanes)])
            with neutral():
                gradients = programs(self.design, parameters, lanes)
            found.append(np.asarray(gradients)[: columns.size])
        return np.concatenate(found)


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

    def __init__(self, reml: bool, df: str, max_iterations: int):
        estimates = partial(_estimates, reml=reml, max_iterations=max_iterations)
        self.estimate = quick_jit(estimates)
        self.certify = quick_jit(partial(_certified, reml=reml, df=df))
        self.modes = quick_jit(_modes)


_programs = remembered(_Programs)


@remembered
def _gradient_program(reml: bool) -> Any:
    return quick_jit(partial(_gradients, reml=reml))


def _estimates(shared: Design, lanes: Lane, *, reml: bool, max_iterations: int) -> Estimate:
    """Fits, the responses on the first axis."""
    method = "REML" if reml else "ML"

    def fit(lane: Lane) -> Estimate:
        return estimate(_design(shared, lane), method, max_iterations=max_iterations)

    return jax.vmap(fit, in_axes=-1)(lanes)


def _certified(
    shared: Design,
    lanes: Lane,
    found: Estimate,
    contrasts: Array,
    blank: Design | None,
    *,
    reml: bool,
    df: str,
) -> Array:
    """Certified status and numbers of fits as `Table.store` takes them."""

    def certify(lane: Lane, found: Estimate) -> Array:
        value, gradient = criterion(found, _design(shared, lane), reml)
        again = replace(found, gradient_norm=jnp.sqrt(jnp.sum(gradient**2)))
        tests = tests_of(found, contrasts, df, shared.n - shared.p, blank)
        return pack(again, value, tests)

    return jax.vmap(certify, in_axes=(-1, 0), out_axes=-1)(lanes, found)


def _modes(shared: Design, lanes: Lane, found: Estimate) -> tuple[Array, ...]:
    """Conditional modes, per term (levels, effects, lanes)."""

    def modes(lane: Lane, found: Estimate) -> tuple[Array, ...]:
        return conditional_modes(relative_covariances(found, shared), _design(shared, lane))

    return jax.vmap(modes, in_axes=(-1, 0), out_axes=-1)(lanes, found)


def _gradients(shared: Design, parameters: Array, lanes: Lane, *, reml: bool) -> Array:
    slope = jax.grad(reml_objective if reml else ml_objective)
    return jax.vmap(lambda lane: slope(parameters, _design(shared, lane)), in_axes=-1)(lanes)
