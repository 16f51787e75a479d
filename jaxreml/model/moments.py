"""A basis and its response from cross-products alone: sums that a database has, or a program makes.

Squares have half the digits: what is left of a sum of squares (of a column of X or of an effect by
those before it, of the response by all) has an error of rounding over the share that is left. Where
that share is below the root of rounding, half of the digits are gone: ILL_CONDITIONED.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jaxreml.backend.arrays import namespace, still
from jaxreml.errors import DataError
from jaxreml.model import linalg
from jaxreml.model.arrays import (
    finite,
    instead_of_residual,
    is_traced,
    read,
    spans_identity,
)
from jaxreml.model.basis import Basis, first_of, solve
from jaxreml.model.covariance.unstructured import unstructured
from jaxreml.model.response import Response
from jaxreml.model.structures.grouped import Grouped, Products
from jaxreml.model.units import Units
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's

SYMMETRIC = 1e-10  # asymmetry that rounding explains, relative to the lengths of the columns
Names = Sequence[tuple[str, Sequence[str]]]


def of_moments(
    arrays: dict[str, Any], n: Any, log_weights: Any, names: Names | None, kind: np.dtype
) -> tuple[Basis, Response]:
    """The basis, which has no rows, and the response of `Design.from_moments`.

    Args:
        arrays: zz, zx, zy, xx, xy, yy.
        n, log_weights, names: as there.
        kind: to work in.
    """
    arrays = {name: read(value, kind, name) for name, value in arrays.items()}
    q, p = _check_shapes(arrays)
    terms = _named(names, q)
    _check(arrays, terms, n)
    (zz, zx, zy, xx, xy, yy), infinite = finite(list(arrays.values()))
    zz, zx, zy = (namespace(own).moveaxis(own, 0, -1) for own in (zz, zx, zy))
    xp = namespace(zz, zx, zy, xx, xy, yy)
    close = float(np.sqrt(np.finfo(kind).eps))

    # X = U R, y = U c + r
    triangle, share = semidefinite_root((xx + xx.T) / 2)
    absent = triangle.diagonal() == 0
    if namespace(xx) is np and absent.any():
        raise DataError(
            f"column {int(np.argmax(absent))} of X is, as far as xx can tell, a linear combination "
            "of those before it; drop it"
        )
    triangle = namespace(xx).where(absent, 0.0, triangle)
    inverse = namespace(xx).where(absent, 0.0, solve(triangle, np.eye(p, dtype=kind)))
    coefficients = inverse.T @ xy
    residual_ss = yy - coefficients @ coefficients
    ill = (~absent & (share < close)).any()

    # Z of unit root mean squares, and what it has of [U r]
    scale = xp.sqrt(_fixed(zz).sum(axis=-1).diagonal() / n)
    scale = xp.where(scale > 0, scale, 1.0)
    zz = (zz + xp.swapaxes(zz, 0, 1)) / (2 * scale[:, None, None] * scale[:, None])
    of_x = xp.einsum("apJ,pu->auJ", zx, inverse)
    of_r = zy - xp.einsum("apJ,p->aJ", of_x, coefficients)
    columns = xp.concatenate([of_x, of_r[:, None]], axis=1) / scale[:, None, None]
    present = xp.diag(xp.where(absent, 0.0, xp.ones(p, kind)))
    rest = linalg.border(present, xp.zeros(p, kind), xp.asarray(residual_ss))

    # Q and F of traced effects have no derivatives, the products have
    factors, scores, left, share = by_level(*map(_fixed, (zz, columns, rest)))
    ill = ill | (share < close)
    remainder = left[:p, :p] + xp.diag(xp.where(absent, xp.ones(p, kind), 0.0))
    products = of_y = None
    if xp is not np:
        products = Products(zz, columns[:, :p], present)
        of_y = columns[:, p], rest[:p, p], rest[p, p]
    sizes = tuple(len(effects) for _, effects in terms)
    parts = [slice(*ends) for ends in pairwise(np.cumsum((0, *sizes)))]
    pivots = xp.where(absent, 1.0, triangle.diagonal())
    basis = Basis(
        roots=None,
        offset=None,
        rows=None,
        triangle=triangle,
        rest=None,
        projector=None,
        structure=Grouped(factors, scores[:, :p], remainder, sizes, products),
        units=Units(tuple(xp.diag(scale[part]) for part in parts), (False,) * len(sizes)),
        log_weights=np.zeros((), kind) if log_weights is None else log_weights,
        log_gram_x=2 * xp.sum(xp.log(pivots)) if log_weights is None else xp.full((), xp.nan),
        n=n,
        trouble=first_of(
            {
                Status.NOT_FINITE: infinite,
                Status.TOO_FEW_ROWS: n <= p - absent.sum(),
                Status.RANK_DEFICIENT: absent.any(),
                Status.ILL_CONDITIONED: ill,
            }
        ),
        names=terms,
        covariance=unstructured(sizes),
        dtype=kind.name,
    )
    response = Response(
        scores=scores[:, p],
        remainder_xy=left[:p, p],
        remainder_yy=left[p, p],
        beta_ols=inverse @ coefficients,
        residual_ss=xp.asarray(residual_ss),
        total_ss=xp.asarray(yy),
        trouble=first_of({Status.ILL_CONDITIONED: ~(left[p, p] > close * yy)}),
        products=of_y,
    )
    return basis, response


def by_level(zz: Any, columns: Any, rest: Any) -> tuple[Any, Any, Any, Any]:
    """Z = Q F level by level, NumPy or traced; lanes may follow on the last axis.

    Args:
        zz: (q, q, J), Z'Z.
        columns: (q, k, J), Z'C of columns C.
        rest: (k, k), C'C.

    Returns:
        F, (q, q, J); scores Q'C, (q, k, J); what they leave of C'C, (k, k), zero where that is
        rounding error; the least share of a column's square that those before it leave in a level,
        () (of columns that are not dependent).
    """
    xp = namespace(zz, columns, rest)
    factors, shares = semidefinite_root(zz)
    shares = xp.where(linalg.diagonal(factors) > 0, shares, 1.0)
    scores = _scores(factors, columns)
    left = rest - sum(linalg.row_products(own, own) for own in scores)
    sizes = linalg.diagonal(rest)
    some = linalg.diagonal(left) > linalg.negligible(0.0, rest.dtype) * sizes
    left = xp.where(some[:, None] & some, left, 0.0)
    return factors, scores, left, xp.min(shares, axis=(0, 1))


def semidefinite_root(matrix: Any) -> tuple[Any, Any]:
    """R of cross-products R'R, (k, k, ...), by Cholesky; NumPy or traced.

    Returns:
        R, upper triangular, with rows of zeros for columns that are, but for rounding, dependent on
        those before them; and the share of each column's square that these leave, (k, ...).
    """
    xp = namespace(matrix)
    k = len(matrix)
    tolerance = linalg.negligible(0.0, matrix.dtype)
    ahead = np.triu(np.ones((k, k), matrix.dtype)).reshape(k, k, *[1] * (matrix.ndim - 2))
    rest, rows, shares = matrix, [], []
    for i in range(k):
        size = matrix[i, i]
        share = rest[i, i] / xp.where(size > 0, size, 1.0)
        kept = share > tolerance
        pivot = xp.sqrt(xp.where(kept, rest[i, i], 1.0))
        row = xp.where(kept, rest[i] / pivot, 0.0) * ahead[i]
        rest = rest - row[:, None] * row
        rows.append(row)
        shares.append(share)
    if not k:
        return matrix, xp.zeros(matrix.shape[1:], matrix.dtype)
    return xp.stack(rows), xp.stack(shares)


def _scores(factors: Any, columns: Any) -> Any:
    """Q'C of Z'C = F'Q'C, (q, k, J, ...), zero for the rows of F that are."""
    xp = namespace(factors, columns)
    found: list[Any] = []
    for i in range(len(factors)):
        rest = columns[i]
        for j, own in enumerate(found):
            rest = rest - factors[j, i] * own
        pivot = factors[i, i]
        found.append(xp.where(pivot > 0, rest / xp.where(pivot > 0, pivot, 1.0), 0.0))
    return xp.stack(found)


def _fixed(array: Any) -> Any:
    """Without derivatives."""
    return still(array)


def _named(names: Names | None, q: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Design.names`."""
    if names is None:
        return (("group", tuple(f"x{i + 1}" for i in range(q))),)
    found = tuple((group, tuple(effects)) for group, effects in names)
    if sum(len(effects) for _, effects in found) != q or not all(own for _, own in found):
        raise DataError(f"names must have {q} effects altogether, at least one per term: {found}")
    return found


def _check_shapes(arrays: dict[str, Any]) -> tuple[int, int]:
    """Numbers of effects and of columns of X."""
    zz, xx = arrays["zz"], arrays["xx"]
    if zz.ndim != 3 or zz.shape[1] != zz.shape[2] or not zz.shape[1]:
        raise DataError(f"zz must have shape (J, q, q), not {zz.shape}")
    if xx.ndim != 2 or xx.shape[0] != xx.shape[1]:
        raise DataError(f"xx must have shape (p, p), not {xx.shape}")
    (levels, q, _), p = zz.shape, len(xx)
    shapes = {"zx": (levels, q, p), "zy": (levels, q), "xy": (p,), "yy": ()}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise DataError(
                f"{name} must have shape {shape} to match zz and xx, not {arrays[name].shape}"
            )
    if levels < 2:
        raise DataError("zz has one level; two or more are needed")
    return q, p


def _check(arrays: dict[str, Any], terms: tuple[Any, ...], n: Any) -> None:
    """Refuse concrete values that are no cross-products of a model."""
    zz, xx, yy = arrays["zz"], arrays["xx"], arrays["yy"]
    counted = not is_traced(n)
    if counted and n <= len(xx):
        raise DataError(f"X has {len(xx)} columns and only {n} rows")
    for name, matrix in (("zz", zz), ("xx", xx), ("yy", yy.reshape(1, 1))):
        if namespace(matrix) is not np:
            continue
        squares = matrix[..., np.arange(matrix.shape[-1]), np.arange(matrix.shape[-1])]
        if np.any(squares < 0):
            raise DataError(f"{name} has a negative sum of squares")
        lengths = np.sqrt(squares)
        most = SYMMETRIC * lengths[..., :, None] * lengths[..., None, :]
        if np.any(np.abs(matrix - matrix.swapaxes(-1, -2)) > most):
            raise DataError(f"{name} is not symmetric")
    start = 0
    for name, effects in terms:
        stop = start + len(effects)
        if counted and namespace(zz) is np and spans_identity(zz[:, start:stop, start:stop], n):
            raise DataError(instead_of_residual(name, len(zz), effects, n))
        start = stop
