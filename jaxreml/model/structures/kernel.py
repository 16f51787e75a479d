r"""One random effect per level whose covariance over the levels is known up to a factor.

With b ~ N(0, sigma2 omega K) and Z = Q F as in `grouped`, V0 = I + omega Q (F K F) Q'. One
eigendecomposition F K F = U diag(d) U', made once, turns the rows into the directions Q U, in which
V0 is diagonal: a `Grouped` structure with a "level" for each eigenvector, whose effect is
sqrt(d_i). Everything that serves one random intercept serves a kernel (Kang et al. 2008, Genetics
178:1709; Lippert et al. 2011, Nature Methods 8:833).

The random effects of the user's levels are b = A u + e, with u those of the eigenvectors,
A = K F U diag(d)^-1/2 and e independent of the data: zero for levels with rows, and for others
what K leaves of their variance, diag(K - A A').
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace
from jaxreml.backend.lazy import record
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.structures.base import Projection, Rows
from jaxreml.model.structures.grouped import Grouped, GroupedBasis

Array = Any  # NumPy's or JAX's
MOST_LEVELS = 10_000  # with rows, of an eigendecomposition: 2.4 GB, some minutes
NULL = 1e-14  # eigenvalues below this fraction of the largest, per level, are zero
EQUAL = 1e-10  # relative differences of eigenvalues that are none


@record
@dataclass(frozen=True)
class Kernel(Grouped):
    """A `Grouped` structure of one effect whose levels are eigenvectors.

    Attributes:
        loadings: (L, J), A of the user's L levels.
        apart: (L,), diag(K - A A'), zero for levels with rows.
    """

    loadings: Any = None
    apart: Any = None

    @property
    def evaluated(self) -> Grouped:
        return Grouped(self.factors, self.scores, self.remainder, self.sizes)

    def padded(self, n_levels: int) -> Kernel:
        """As it is: sizes of kernels are not made alike."""
        return self

    def modes(self, omega: Array, cross: Array) -> tuple[Array, ...]:
        of_vectors = super().modes(omega, cross)[0]
        return (self.loadings @ of_vectors,)

    def posterior(self, projection: Projection, factors: tuple[Array, ...]) -> Array:
        """Var(b | y), (L,)."""
        of_vectors = super().posterior(projection, factors)[0, 0]
        return (self.loadings**2) @ of_vectors + factors[0][0, 0] ** 2 * self.apart

    def variances(self, posterior: Array) -> tuple[np.ndarray, ...]:
        return (np.asarray(posterior)[:, None, None],)

    def row_variances(self, posterior: Array, rows: Rows) -> np.ndarray:
        ((codes, effects),) = rows
        return np.asarray(posterior)[codes] * np.asarray(effects)[:, 0] ** 2


@record
@dataclass(frozen=True)
class KernelBasis:
    """Z = Q F, and the eigenvectors of F K F.

    Attributes:
        rows: Q and F of the J levels with rows.
        vectors: (J, J), U.
        factors: (1, 1, J), square roots of the eigenvalues d.
        loadings, apart: as in `Kernel`.
    """

    rows: GroupedBasis
    vectors: Any
    factors: Any
    loadings: Any
    apart: Any
    name: str = field(default="", metadata={"static": True})

    @staticmethod
    def of(codes: np.ndarray, column: np.ndarray, kernel: np.ndarray, name: str) -> KernelBasis:
        """Decompose.

        Args:
            codes: (n,) levels of the rows, places in the kernel.
            column: (n,) effects, scaled; zero in rows left out.
            kernel: (L, L).
            name: of the grouping factor.

        Raises:
            DataError: too many levels, or a covariance that is the residual's.
        """
        seen, compact = np.unique(codes, return_inverse=True)
        if seen.size > MOST_LEVELS:
            raise DataError(
                f"{seen.size} levels of {name!r} have rows; the eigendecomposition of a kernel is "
                f"there for {MOST_LEVELS} at most"
            )
        rows = GroupedBasis.of(compact, column[:, None], seen.size)
        lengths = rows.factors[0, 0]
        own = kernel if len(seen) == len(kernel) else kernel[np.ix_(seen, seen)]
        values, vectors = linalg.eigh(lengths[:, None] * own * lengths)
        values = np.where(values > NULL * seen.size * values[-1], values, 0.0)
        used = int(np.count_nonzero(column))
        equal = np.count_nonzero(values) == used and np.ptp(values[-used:]) <= EQUAL * values[-1]
        if equal:
            raise DataError(
                f"the kernel of {name!r} gives every row the same variance and no two rows a "
                "covariance, as residuals have: their variances cannot be told apart. Leave the "
                "term out, or give known weights that are not all equal"
            )
        roots = np.sqrt(values)
        inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
        loadings = np.empty((len(kernel), seen.size))
        away = np.flatnonzero(~np.isin(np.arange(len(kernel)), seen[lengths > 0]))
        within = lengths > 0
        loadings[seen[within]] = vectors[within] * roots / lengths[within, None]
        loadings[away] = kernel[np.ix_(away, seen)] @ (lengths[:, None] * vectors * inverse)
        apart = np.zeros(len(kernel))
        left = np.diagonal(kernel)[away] - np.sum(loadings[away] ** 2, axis=1)
        apart[away] = np.maximum(left, 0.0)
        return KernelBasis(rows, vectors, roots[None, None], loadings, apart, name)

    def project(self, columns: Any) -> tuple[Any, Any]:
        """Scores (1, k, J), and what the directions leave, (n, k)."""
        scores, rest = self.rows.project(columns)
        return namespace(scores).tensordot(scores, self.vectors, axes=1), rest

    def scores(self, columns: Any) -> Any:
        """The scores with the columns last, (1, J, k)."""
        return (self.vectors.T @ self.rows.scores(columns)[0])[None]

    def products(self, columns: Any) -> None:
        """Effects are concrete."""

    def of_levels(self, modes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Effects of the user's levels, (L, 1, ...), of those of the eigenvectors."""
        return (namespace(modes[0]).tensordot(self.loadings, modes[0], axes=1),)

    def structure(
        self, scores: Any, remainder: Any, products: Any, sizes: tuple[int, ...]
    ) -> Kernel:
        """The structure of columns."""
        return Kernel(
            self.factors,
            scores,
            remainder,
            sizes,
            loadings=self.loadings,
            apart=self.apart,
        )
