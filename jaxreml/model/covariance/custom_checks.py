"""What can be the matter with a user's own covariance, found at its start and named."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreml.backend.runtime import neutral
from jaxreml.model.covariance.custom import VARIANCE, Derivatives, Function

SYMMETRIC = 1e-10  # relative differences that are none
DEFINITE = 1e-10  # share of the largest eigenvalue that a negative one may be
PROPORTIONAL = 1e-8
STEP, AGREE = 1e-4, 1e-5  # of differences, and relative errors of theirs


def check_function(function: Function, *, definite: bool) -> None:
    """Refuse a function that is no covariance at its start.

    Args:
        function: of q effects.
        definite: whether the matrix must be positive definite, or may be semidefinite.

    Raises:
        ValueError: it cannot be called or differentiated by JAX; another shape than (q, q); values
            that are not finite; a matrix that is not symmetric, not positive, not proportional to
            its variances; derivatives that are not finite or that differences of values contradict;
            a parameter that changes nothing.
    """
    name = f"the covariance {function.name!r}"
    _check_shape(function, name)
    found = function.derivatives(function.start)
    matrix = found.matrix
    where = f"at its start, {_described(function)}"
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"{name} is {matrix[row, column]} in row {row}, column {column} {where}; start it "
            "where its entries are finite"
        )
    size = np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.T)
    if asymmetry.max() > SYMMETRIC * size:
        row, column = np.unravel_index(np.argmax(asymmetry), matrix.shape)
        raise ValueError(
            f"{name} is not symmetric {where}: its entry ({row}, {column}) is "
            f"{matrix[row, column]:.6g} and ({column}, {row}) is {matrix[column, row]:.6g}"
        )
    lowest, *_, highest = np.append(np.linalg.eigvalsh(matrix), [0.0] * (len(matrix) == 1))
    if len(matrix) == 1:
        lowest = highest = matrix[0, 0]
    if lowest < -DEFINITE * highest or (definite and lowest <= DEFINITE * highest) or highest <= 0:
        kind = "positive definite" if definite else "positive semidefinite"
        raise ValueError(
            f"{name} is not {kind} {where}: its eigenvalues go from {lowest:.3g} to {highest:.3g}"
        )
    _check_proportional(function, found, name)
    _check_derivatives(function, found, name, where)


def _described(function: Function) -> str:
    return ", ".join(
        f"{label} = {kind.value(x) if kind.word != VARIANCE else x:.6g}"
        for label, kind, x in zip(function.labels, function.transforms, function.start, strict=True)
    )


def _check_shape(function: Function, name: str) -> None:
    import jax

    q = function.size
    try:
        with jax.ensure_compile_time_eval(), neutral():
            found: Any = jax.eval_shape(function.matrix, function.start)
            shape, kind = np.shape(found), found.dtype
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"{name} must be a JAX function: write it with jax.numpy, and without conditions on "
            f"its parameters. JAX says: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:
        arguments = ", ".join(own[0] for own in function.parameters)
        raise ValueError(
            f"{name} is called as fn(at, {arguments}), with the parameters by name, and ended in "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if shape != (q, q):
        raise ValueError(
            f"{name} must return a matrix of shape ({q}, {q}), one row for each effect, not of "
            f"shape {shape}"
        )
    if not np.issubdtype(kind, np.floating):
        raise ValueError(f"{name} must return real numbers, not {kind}")


def _check_proportional(function: Function, found: Derivatives, name: str) -> None:
    start, k = function.start.copy(), function.variances
    start[:k] *= 4.0
    more = function.derivatives(start).matrix
    if np.abs(more - 4 * found.matrix).max() <= PROPORTIONAL * np.abs(more).max():
        return
    own = ", ".join(map(repr, function.labels[:k]))
    raise ValueError(
        f"{name} must be proportional to its variances, {own}: with all of them four times as "
        f"large, its entries should be, too. Give every parameter that is in the squared units of "
        f'the response the transform "{VARIANCE}", and no other; or leave variances out of the '
        "function, which is then multiplied by one"
    )


def _check_derivatives(function: Function, found: Derivatives, name: str, where: str) -> None:
    for k, label in enumerate(function.labels):
        first, second = found.first[:, k], found.second[:, :, k]
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError(
                f"the derivatives of {name} in {label!r} are not finite {where}: a square root or "
                "a power of zero has none. Write it so that it is smooth there, or start elsewhere"
            )
        if not (first.any() or second[:, k].any()):
            raise ValueError(
                f"{name} does not depend on {label!r} {where}, so it cannot be estimated; leave it "
                "out or start elsewhere"
            )
        step = STEP * max(abs(function.start[k]), 1.0 if k >= function.variances else 0.0)
        ends = []
        for sign in (1, -1):
            moved = function.start.copy()
            moved[k] += sign * step
            ends.append(function.derivatives(moved))
        up, down = ends
        slope = (up.value - down.value) / (2 * step)
        bend = (up.first - down.first) / (2 * step)
        for order, own, wanted in (("first", first, slope), ("second", second, bend)):
            # Differences of a step h are wrong by about h^2, in the size of what varies.
            error = np.abs(own - wanted).max()
            scale = max(np.abs(found.first[:, k]).max(), np.abs(own).max(), np.abs(wanted).max())
            if error > AGREE * scale and error * step > 1e-9 * np.abs(found.matrix).max():
                raise ValueError(
                    f"the {order} derivatives of {name} in {label!r} are not those of its values "
                    f"{where}: they differ from differences by {error:.3g}. Rounding, stopped "
                    "gradients and derivatives of your own can do that"
                )
