"""Responses of a design with crossed factors: the host projects them on the basis of the design,
and `estimate` is mapped over what that leaves of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreml.backend.compilation import quick_jit, remembered
from jaxreml.backend.devices import working_bytes
from jaxreml.backend.runtime import neutral
from jaxreml.backend.threads import cores
from jaxreml.many.base import Known, Options
from jaxreml.many.contributions import Parts
from jaxreml.many.lanes import power_of_two
from jaxreml.many.numbers import Table
from jaxreml.many.steps import of_rows, pack, tests_of
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design
from jaxreml.model.objective import ml_objective, reml_objective
from jaxreml.model.response import Response
from jaxreml.model.structures import Crossed
from jaxreml.optimum.effects import conditional_modes, criterion, relative_covariances
from jaxreml.optimum.estimate import estimate
from jaxreml.optimum.report import Estimate

LANES = 64  # most responses that `estimate` is mapped over at a time on a CPU,
LANES_APART = 1024  # and on an accelerator
NUMBERS = 2**21  # most numbers in the larger arrays of them on a CPU


class CrossedEngine:
    """`Engine` of crossed designs."""

    def __init__(self, basis: Basis, X: np.ndarray, known: Known, options: Options):
        self.basis, self.known, self.options = basis, known, options
        self.design = Design.of(basis, basis.blank())  # what all responses share
        of_x: Crossed = basis.structure
        numbers = of_x.rest.size + sum(own.tail.size + own.matrix.size for own in of_x.stages)
        apart = working_bytes(options.devices[0])
        most, room = (LANES, NUMBERS) if apart is None else (LANES_APART, apart // 8)
        self.lanes = options.lanes or min(max(room // numbers, 1), most)
        # Large factorisations take all cores each; on an accelerator the second thread copies.
        self.threads = 2 if apart else cores() if self.lanes == most else 1

    def fit(
        self, values: np.ndarray, columns: np.ndarray, kept: np.ndarray | None, table: Table
    ) -> None:
        """As `Engine.fit`."""
        options = self.options
        devices = options.devices
        programs = _programs(options.reml, options.df, options.max_iterations)
        blank = self.design if options.df.startswith("kenward-roger") else None
        # A pattern of missing values of its own often has one response.
        lanes = 1 if columns.size == 1 else min(self.lanes, max(LANES, power_of_two(columns.size)))

        def work(k: int) -> tuple[np.ndarray, np.ndarray, Any]:
            chunk = columns[k : k + lanes]
            block = values[:, np.resize(chunk, lanes)]
            if kept is not None:
                block = np.where(kept[:, None], block, 0.0)
            responses = self.basis.response(block)
            with neutral(), jax.default_device(devices[k // lanes % len(devices)]):
                found = programs.estimate(self.design, responses)
                rows = options.contrasts, options.parts
                packed = programs.certify(self.design, responses, found, *rows, blank)
                own = programs.modes(self.design, responses, found) if options.modes else None
                return chunk, np.asarray(packed), jax.device_get(own)

        with ThreadPoolExecutor(self.threads) as pool:
            for chunk, packed, own in pool.map(work, range(0, columns.size, lanes)):
                table.store(chunk, packed, own, *self.known)

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """As `Engine.gradients`."""
        program = _gradient_program(self.options.reml)
        found = []
        for start in range(0, values.shape[1], self.lanes):
            columns = np.arange(start, min(start + self.lanes, values.shape[1]))
            responses = self.basis.response(values[:, np.resize(columns, self.lanes)])
            gradients = program(self.design, parameters, responses)
            found.append(np.asarray(gradients)[: columns.size])
        return np.concatenate(found)


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


def _estimates(shared: Design, responses: Response, *, reml: bool, max_iterations: int) -> Estimate:
    """Fits, the responses on the first axis."""
    method = "REML" if reml else "ML"

    def fit(own: Response) -> Estimate:
        return estimate(shared.with_response(own), method, max_iterations=max_iterations)

    return jax.vmap(fit, in_axes=-1)(responses)


def _certified(
    shared: Design,
    responses: Response,
    found: Estimate,
    contrasts: Array,
    parts: Parts,
    blank: Design | None,
    *,
    reml: bool,
    df: str,
) -> Array:
    """Certified status and numbers of fits as `Table.store` takes them."""

    def certify(own: Response, found: Estimate) -> Array:
        design = shared.with_response(own)
        value, gradient = criterion(found.theta, design, reml, found.parameters)
        again = replace(found, gradient_norm=jnp.sqrt(jnp.sum(gradient**2)))
        tests = tests_of(found, contrasts, df, shared.n - shared.p, blank)
        return pack(again, value, tests, of_rows(found, design, parts))

    return jax.vmap(certify, in_axes=(-1, 0), out_axes=-1)(responses, found)


def _modes(shared: Design, responses: Response, found: Estimate) -> tuple[Array, ...]:
    """Conditional modes, per term (levels, effects, lanes)."""

    def modes(own: Response, found: Estimate) -> tuple[Array, ...]:
        return conditional_modes(relative_covariances(found, shared), shared.with_response(own))

    return jax.vmap(modes, in_axes=(-1, 0), out_axes=-1)(responses, found)


def _gradients(shared: Design, parameters: Array, responses: Response, *, reml: bool) -> Array:
    slope = jax.grad(reml_objective if reml else ml_objective)
    return jax.vmap(lambda own: slope(parameters, shared.with_response(own)), in_axes=-1)(responses)
