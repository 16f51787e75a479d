"""`Lanes`: a basis with what makes blocks of responses cheap, and how a block is reduced.

The lanes of a batch are the last axis everywhere. Rows may be left out (missing values of a
response) without changing a shape: they become zeros, so that all patterns of missing values share
one compiled program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.backend.arrays import mapped, namespace
from jaxreml.backend.lazy import record
from jaxreml.model import linalg
from jaxreml.model.basis import Basis
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.design import Design
from jaxreml.model.response import Response
from jaxreml.model.structures.collapse import Collapse, collapse
from jaxreml.model.structures.lanes import GroupedBatch, cross_products
from jaxreml.model.structures.spectral import Spectral, spectral
from jaxreml.status import Status

# Share of the sum of squares, per row, that rounding leaves uncertain in what X and Z do not
# explain, so that the criterion would be off by 1e-9.
DOUBTFUL = 1e9 * np.finfo(float).eps
Array = Any  # NumPy's or JAX's
MOST_EFFECTS = 4  # and
MOST_PAIRS = 5 * 10**6  # of `Lanes.pairs`; above, responses go through `estimate` singly


@record
@dataclass(frozen=True)
class Lanes:
    """A grouped or dense basis, prepared for blocks of responses: a pytree of arrays.

    Attributes:
        basis: of the rows.
        constant: (p,), coefficients with which X makes 1 in every row, zeros if it does not.
        collapse, spectral: plans, or None.
        pairs: `cross_products` of the (collapsed) scores of X where batches are a `GroupedBatch`,
            else None.
    """

    basis: Basis
    constant: Array
    collapse: Collapse | None
    spectral: Spectral | None
    pairs: Array | None

    @staticmethod
    def of(basis: Basis, X: np.ndarray, *, reml: bool) -> Lanes:
        """Plan for a basis of `X` (rows used, p), as given; `reml` says which criterion the
        spectral form is for.

        Equal levels are not collapsed where not all rows are used, so that all patterns have the
        same shapes.
        """
        of_x = basis.structure
        whole = basis.n == len(basis.rows)
        plan = eigen = pairs = None
        if Lanes.in_step(basis):
            factors, scores, counts = of_x.factors, of_x.scores, np.ones(of_x.scores.shape[2])
            plan = collapse(factors, scores) if whole else None
            if plan is not None:
                factors, scores, counts = plan.factors, plan.scores_x, plan.counts
            # Of a kernel V0 is diagonal as it stands: a decomposition more would cost as much.
            if len(scores) == 1 and whole and basis.kind == "grouped":
                eigen = spectral(factors, counts, scores, reml=reml)  # pyright: ignore
            pairs = cross_products(scores)  # pyright: ignore
        return Lanes(basis, _constant(X), plan, eigen, pairs)  # pyright: ignore

    @staticmethod
    def in_step(basis: Basis) -> bool:
        """Whether batches are a `GroupedBatch`, all lanes in one."""
        if basis.kind not in ("grouped", "kernel"):
            return False
        (q, p, levels) = basis.structure.scores.shape
        size = p * (p + 1) // 2 * (q * (q + 1) // 2) * levels
        return q <= MOST_EFFECTS and size <= MOST_PAIRS

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return self.basis.p

    @property
    def covariance(self) -> Covariance:
        """Of the random effects."""
        return self.basis.covariance

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per term."""
        return self.basis.sizes

    @property
    def levels(self) -> tuple[Array, Array, Array]:
        """Of a grouped basis, as collapsed: F, the scores of X, and how many levels each is."""
        if self.collapse is not None:
            return self.collapse.factors, self.collapse.scores_x, self.collapse.counts
        of_x = self.basis.structure
        return of_x.factors, of_x.scores, np.ones(of_x.factors.shape[-1])  # pyright: ignore

    @property
    def largest(self) -> int:
        """Numbers per lane of the larger arrays of a search."""
        return max(self.levels[0].shape[-1] * sum(self.sizes) ** 2, (self.p + 1) ** 2)

    @property
    def loses_digits(self) -> bool:
        """Whether one pass over so many rows leaves every response doubtful."""
        return DOUBTFUL * len(self.basis.rows) > 0.1

    @cached_property
    def plain(self) -> Lanes:
        """Without plans: no level is collapsed."""
        pairs = self.pairs
        if self.collapse is not None:
            pairs = cross_products(self.basis.structure.scores)
        return replace(self, collapse=None, spectral=None, pairs=pairs)

    def reduce(self, values: Array, shift: Array | float = 0.0, *, exact: bool) -> Response:
        """Reduce responses y = values + shift.

        In one pass over the rows, sums of squares being differences of what X and Z explain from
        the whole, ILL_CONDITIONED where too much cancels; or `exact`, from residuals row by row, in
        several.

        Args:
            values: (n, B), zero in rows left out.
            shift: (B,), only if `constant` is not zero.
            exact: see above.
        """
        found = self.basis.response(values) if exact else self._one_pass(values)
        xp = namespace(values)
        triangle = xp.asarray(self.basis.triangle)
        of_shift = triangle @ self.constant
        products = of_shift @ (triangle @ found.beta_ols)
        scores = found.scores if self.collapse is None else self.collapse.scores(found.scores)
        return found._replace(
            scores=scores,
            beta_ols=found.beta_ols + self.constant[:, None] * shift,
            total_ss=found.total_ss + shift * (2 * products + shift * xp.sum(of_shift**2)),
        )

    def _one_pass(self, values: Array) -> Response:
        basis = self.basis
        if basis.offset is not None:
            values = values - basis.offset[:, None]
        if basis.roots is not None:
            values = values * basis.roots[:, None]
        xp = namespace(values)
        coefficients = basis.rows.T @ values
        total = xp.einsum("nB,nB->B", values, values)
        of_x = basis.structure.scores
        scores = basis.projector.scores(values)
        scores = scores - xp.tensordot(of_x, coefficients, axes=((1,), (0,)))
        inner = tuple(range(scores.ndim - 1))  # all axes but that of X, or of the responses
        rest_xy = -xp.tensordot(of_x, scores, axes=((0, *range(2, of_x.ndim)), inner))
        residual_ss = total - xp.sum(coefficients * coefficients, axis=0)
        rest_yy = residual_ss - xp.sum(scores * scores, axis=inner)
        sure = rest_yy > DOUBTFUL * basis.n * total
        return Response(
            scores=scores,
            remainder_xy=rest_xy,  # as U'y - U'U U'y = 0
            remainder_yy=rest_yy,
            beta_ols=linalg.solve_upper(xp.asarray(basis.triangle), coefficients),
            residual_ss=residual_ss,
            total_ss=total,
            trouble=xp.where(sure, 0, Status.ILL_CONDITIONED).astype(np.int32),
        )

    def batch(self, response: Response) -> Design:
        """The designs of a block in one, lanes last; what they share has one lane."""
        assert self.pairs is not None
        factors, scores_x, counts = self.levels
        remainder = self.basis.structure.remainder[..., None]
        structure = GroupedBatch(
            factors[..., None],
            counts[:, None],
            scores_x,
            self.pairs,
            response.scores,
            remainder,
            self.sizes,
        )
        return replace(self._shared, structure=structure).with_response(response)

    @cached_property
    def _shared(self) -> Design:
        """A design without structure or response, in one lane."""
        blank: Any = replace(self.blank(), structure=None)  # pyright: ignore
        return mapped(lambda leaf: namespace(leaf).asarray(leaf)[..., None], blank)

    def each(self, response: Response) -> Design:
        """The design of one response, for `vmap` over the lanes; levels are not collapsed."""
        return Design.of(self.basis, response)

    def blank(self) -> Design:
        """The design with a response of length 1 that neither X nor Z explains."""
        return Design.of(self.basis, self.basis.blank())

    def rotated(self, response: Response, *, reml: bool) -> Design:
        """The designs that have the same criterion without fixed effects; needs `spectral`."""
        assert self.spectral is not None
        whole, basis, xp = self.batch(response), self.basis, namespace(response.residual_ss)
        scores, shift = self.spectral.scores(response.scores)
        across = xp.sum(response.remainder_xy * shift, axis=0)
        within = xp.sum(shift * (basis.structure.remainder @ shift), axis=0)
        remainder = response.remainder_yy + 2 * across + within
        log_basis = xp.sum(xp.log(xp.abs(basis.triangle.diagonal())))
        levels = self.spectral.factors.shape[-1]
        return replace(
            whole,
            structure=GroupedBatch(
                self.spectral.factors[..., None],
                self.spectral.counts[:, None],
                np.zeros((1, 0, levels), basis.dtype),
                np.zeros((0, 1, levels), basis.dtype),
                scores,
                remainder[None, None],
                self.sizes,
            ),
            basis=np.zeros((0, 0, 1), basis.dtype),
            beta_ols=response.beta_ols[:0],
            log_weights=whole.log_weights - 2 * log_basis * reml,
            n=whole.n - self.p if reml else whole.n,
            p=0,
        )


def fitting(numbers: int, cache: int, least: int, most: int) -> int:
    """How many lanes of so many numbers each fit into `cache` bytes, a power of two in bounds."""
    lanes = max(cache // (8 * numbers), 1)
    return min(max(2 ** int(math.log2(lanes)), least), most)


def power_of_two(count: int) -> int:
    """The least that is not below."""
    return 2 ** math.ceil(math.log2(count))


def _constant(X: np.ndarray) -> np.ndarray:
    coefficients = np.linalg.lstsq(X, np.ones(len(X)))[0]
    exact = np.max(np.abs(X @ coefficients - 1), initial=0.0) < 1e-12
    return coefficients if exact else np.zeros(X.shape[1])
