"""What a gradient and a Hessian say: Newton's step, and how a function curves.

For one function, or for lanes on the last axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreml.backend.arrays import namespace, still
from jaxreml.model import linalg

FLAT = 1e-10  # Eigenvalues below this fraction of the largest count as zero.
NEGATIVE = 1e-8  # Eigenvalues below minus this fraction of the largest count as negative.
SHIFT = 1e-8  # What NEGATIVE is for the Cholesky factorisation of a batch.
ESCAPE = 0.3  # Length of the first step away from a saddle point, in units of the coordinates.

Array = Any  # NumPy's or JAX's


class Step(NamedTuple):
    """What a step rule makes of a gradient and a Hessian.

    Attributes:
        newton: (m,), Newton's step, downhill where the function is not convex.
        decrement: (), half its squared length in the metric of the Hessian.
        escape: (m,), a step along negative curvature.
        negative: (), whether there is any.
    """

    newton: Array
    decrement: Array
    escape: Array
    negative: Array


def eigen_step(gradient: Array, hessian: Array) -> Step:
    """Newton's step with the eigenvalues' absolute values, and the most negative direction; also in
    lanes."""
    xp = namespace(hessian)
    values, vectors = linalg.eigh(hessian)
    size = xp.max(abs(values), axis=0)
    size = xp.where(size > 0, size, 1.0)
    along = xp.sum(gradient[:, None] * vectors, axis=0)
    scaled = along / xp.maximum(abs(values), linalg.negligible(FLAT, hessian.dtype, 1) * size)
    return Step(
        -xp.sum(vectors * scaled, axis=1),
        xp.sum(along * scaled, axis=0) / 2,
        ESCAPE * vectors[:, 0],
        values[0] < -linalg.negligible(NEGATIVE, hessian.dtype) * size,
    )


def steepened(hessian: Array, flat: Array | None) -> Array:
    """The Hessian made as steep along `flat` as anywhere."""
    xp = namespace(hessian)
    if flat is None:
        return hessian
    lengths = xp.sum(flat * flat, axis=1, keepdims=True)
    unit = flat * xp.sqrt(_size(hessian) / xp.where(lengths > 0, lengths, 1.0))
    return hessian + linalg.matmul(linalg.transpose(unit), unit)


def shifted_step(gradient: Array, hessian: Array) -> Step:
    """`eigen_step` of a batch on the trailing axis, without eigenvectors.

    The Newton step if H + SHIFT |H| is positive definite, and else that of H shifted by
    Gershgorin's bound on its eigenvalues. There is no escape.
    """
    xp = namespace(hessian)
    identity = linalg.eye_like(hessian)
    size = _size(hessian)
    least = linalg.negligible(SHIFT, hessian.dtype) * size
    rows = xp.sum(abs(hessian), axis=1)
    factor = linalg.cholesky(hessian + least * identity)
    negative = xp.isnan(factor[-1, -1])
    centres = linalg.diagonal(hessian)
    lowest = xp.min(centres - (rows - abs(centres)), axis=0)
    shift = xp.where(negative, xp.maximum(-lowest, 0.0) * 1.1 + least, least)
    factor = linalg.cholesky(hessian + shift * identity)
    half = linalg.solve_lower(factor, gradient[:, None])
    step = -linalg.solve_lower(_flip(factor), half[::-1])[::-1, 0]
    decrement = xp.sum(half * half, axis=(0, 1)) / 2
    return Step(step, decrement, xp.zeros_like(step), negative)


def _size(hessian: Array) -> Array:
    """A bound on the eigenvalues of a batch, 1 for zero."""
    xp = namespace(hessian)
    size = xp.max(xp.sum(abs(hessian), axis=1), axis=0)
    return xp.where(size > 0, size, 1.0)


def _flip(factor: Array) -> Array:
    """The transpose of a lower triangle with rows and columns reversed: lower again."""
    return linalg.transpose(factor)[::-1, ::-1]


def is_convex(hessian: Array) -> Array:
    """Whether no eigenvalue is negative, up to rounding; also for a batch."""
    xp = namespace(hessian)
    if hessian.ndim == 2:
        return inertia(hessian)[0] == 0
    least = linalg.negligible(SHIFT, hessian.dtype) * _size(hessian)
    shifted = hessian + least * linalg.eye_like(hessian)
    return ~xp.isnan(linalg.cholesky(shifted)[-1, -1])


def inertia(hessian: Array) -> Array:
    """Numbers of negative, zero and positive eigenvalues, (3, ...) integers."""
    xp = namespace(hessian)
    values, _ = linalg.eigh(hessian)
    size = xp.max(abs(values), axis=0)
    least = linalg.negligible(NEGATIVE, hessian.dtype) * size
    negative, positive = values < -least, values > least
    return xp.stack([kind.sum(axis=0) for kind in (negative, ~negative & ~positive, positive)])


def solve_flat(hessian: Array, right: Array) -> Array:
    """Minimum-norm solution of ``hessian x = right``, flat directions left out.

    Of one Hessian (m, m), with one right side (m,) or lanes of them, or of lanes of both.
    """
    xp = namespace(hessian)
    values, vectors = linalg.eigh(still(hessian))
    size = xp.max(abs(values), axis=0)
    least = linalg.negligible(FLAT, hessian.dtype, 10) * size
    flat = xp.where(abs(values) <= least, 1.0, 0.0)
    onto_flat = linalg.matmul(vectors * flat, linalg.transpose(vectors))
    filled, _ = linalg.inverse(hessian + size * onto_flat, False)
    if hessian.ndim == 2:
        return filled @ (right - onto_flat @ right)
    rest = right[:, None] - linalg.matmul(onto_flat, right[:, None])
    return linalg.matmul(filled, rest)[:, 0]
