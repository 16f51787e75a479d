"""`SinglesEngine`: responses one after the other on NumPy, as `fit` does it, on one basis.

For designs whose lanes do not go in step on NumPy (crossed factors, many effects), where there are
too few responses to wait for a compiler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jaxreml.backend.threads import suited_blas
from jaxreml.many.base import Known, Options
from jaxreml.many.numbers import Table
from jaxreml.many.steps import objective_gradients, of_rows, pack, tests_of
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design
from jaxreml.optimum.effects import conditional_modes, differences, relative_covariances
from jaxreml.optimum.estimate import estimate_on_host

Array = np.ndarray


class SinglesEngine:
    """`Engine` of any design on NumPy."""

    def __init__(self, basis: Basis, X: Array, known: Known, options: Options):
        self.basis, self.known, self.options = basis, known, options
        self.design = Design.of(basis, basis.blank())  # what all responses share

    def fit(self, values: Array, columns: Array, kept: Array | None, table: Table) -> None:
        """As `Engine.fit`."""
        with suited_blas(self.design.numbers), np.errstate(all="ignore"):
            for column in columns:
                y = values[:, column]
                packed, modes = self._fitted(y if kept is None else np.where(kept, y, 0.0))
                table.store(np.array([column]), packed, modes, *self.known)

    def _fitted(self, y: Array) -> tuple[Array, tuple[Array, ...] | None]:
        """Numbers of one response for `Table.store`, and modes; the certificate by differences."""
        options = self.options
        design = self._design(y)
        method = "REML" if options.reml else "ML"
        found, _ = estimate_on_host(design, method, max_iterations=options.max_iterations)
        value, gradient = differences(found.theta, design, options.reml, found.parameters)
        again = replace(found, gradient_norm=np.linalg.norm(gradient))
        blank = self.design if options.df.startswith("kenward-roger") else None
        tests = tests_of(found, options.contrasts, options.df, design.n - design.p, blank)
        modes = None
        if options.modes:
            own = conditional_modes(relative_covariances(found, design), design)
            modes = tuple(part[..., None] for part in own)
        rows = of_rows(found, design, options.parts)
        return pack(again, np.asarray(value), tests, rows)[:, None], modes

    def gradients(self, parameters: Array, values: Array) -> Array:
        """As `Engine.gradients`."""
        reml, units = self.options.reml, self.basis.units
        designs = map(self._design, values.T)
        return np.stack([objective_gradients(parameters, own, units, reml=reml) for own in designs])

    def _design(self, y: Any) -> Design:
        return self.design.with_response(self.basis.response(y))
