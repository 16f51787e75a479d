"""Any structure with linear combinations of [X y] in the place of X and y.

A fixed effect held at a value b leaves the response y - b x and the other columns of X: both are
combinations of what the structure has, so that nothing is projected anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxreml.model.structures.base import Marginal, Projection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Combined:
    """`Structure` as far as likelihoods go, of the columns [X y] C.

    Attributes:
        whole: the structure of [X y].
        columns: C, (p + 1, p + 1), the response last. A column of zeros is absent.
        absent: (p + 1,), 1 for absent columns, 0 for the others.
    """

    whole: Any
    columns: Array
    absent: Array

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.whole.sizes

    @property
    def costly(self) -> bool:
        return self.whole.costly

    def _gram(self, gram: Array) -> Array:
        """With 1 on the diagonal for absent columns, which changes no determinant."""
        return self.columns.T @ gram @ self.columns + jnp.diag(self.absent)

    def marginal(self, omega: Array) -> Marginal:
        logdet, gram = self.whole.marginal(omega)
        return Marginal(logdet, self._gram(gram))

    def project(self, omega: Array) -> Projection:
        projection = self.whole.project(omega)
        return projection._replace(gram=self._gram(projection.gram))

    def slope(self, projection: Projection) -> Array:
        return self.whole.slope(projection)

    def curvature(self, projection: Projection, matrix: Array, weights: Array) -> Array:
        return self.whole.curvature(projection, self.columns @ matrix, weights)

    def spread(self, projection: Projection, matrix: Array) -> Array:
        return self.whole.spread(projection, self.columns @ matrix)

    def form(self, cross: Any, matrix: Array) -> Array:
        return self.whole.form(cross, self.columns @ matrix)
