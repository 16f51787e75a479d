"""Mini-batches of whole groups, for losses that a mixed model's likelihood is a part of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxreml.errors import DataError


class Batch(NamedTuple):
    """Rows of some groups, padded to one shape for all batches.

    Attributes:
        rows: (r,), which rows; padding repeats the first.
        codes: (r,), their groups, 0 to size - 1.
        weights: (r,), 1 for rows and 0 for padding, as prior weights leave it out.
        scale: what a sum over the batch's groups is to be multiplied by, for an unbiased estimate
            of that over all groups: the number of batches in a pass.

    Examples:
        >>> batch = next(jaxreml.batches.groups([0, 0, 1, 2, 2, 2], size=2, seed=0))
        >>> batch.rows.size, int(batch.weights.sum()), batch.scale
        (4, 3, 2.0)
    """

    rows: np.ndarray
    codes: np.ndarray
    weights: np.ndarray
    scale: float


def groups(codes: Any, size: int, seed: Any = None) -> Iterator[Batch]:
    """One pass over all groups in batches at random, so many at a time.

    Groups stay whole, as rows of a group are correlated. At given fixed effects (a network's mean,
    say) minus twice the log-likelihood is a sum over groups, and `scale` times that of a batch is
    an unbiased estimate of it: ``ml_objective`` of a design without columns in X, of the response
    less its mean. The restricted likelihood's log|X'V^-1 X| is no sum over groups; leave it out, as
    maximum likelihood does, or take it from all rows now and then.

    Shapes are the same for all batches and all passes, so that a function of a batch compiles once.
    Groups are dealt out to the batches, those of many rows first and equal ones in random order, so
    that batches have nearly equal numbers of rows: what they are padded by is no more than the rows
    of the largest group. Every group is equally likely to be in any batch.

    Args:
        codes: (n,) group of each row: any labels.
        size: groups in a batch, at most; some have one less.
        seed: of the order: a number or a NumPy generator.

    Raises:
        DataError: no rows, or labels that have no order.
        ValueError: a size below 1 or above the number of groups.

    Examples:
        The criterion at given parameters is the sum of those of an epoch's batches:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> y = data["Reaction"].to_numpy() - 300
        >>> at = jnp.array([6.0, 7.0])
        >>> def criterion(rows, codes, weights):
        ...     term = jaxreml.Term(codes, n_levels=4)
        ...     none = jnp.zeros((len(rows), 0))
        ...     own = jnp.asarray(y)[rows]
        ...     design = jaxreml.Design.from_arrays(own, none, term, weights=weights)
        ...     return jaxreml.ml_objective(at, design)
        >>> with jax.enable_x64(True):
        ...     compiled = jax.jit(criterion)
        ...     total = sum(
        ...         compiled(batch.rows, batch.codes, batch.weights)
        ...         for batch in jaxreml.batches.groups(data["Subject"], size=4, seed=0)
        ...     )
        ...     whole = jaxreml.Design.from_arrays(y, np.zeros((180, 0)), [data["Subject"]])
        ...     expected = jaxreml.ml_objective(at, whole)
        >>> round(float(total), 6) == round(float(expected), 6)
        True
    """
    try:
        levels, places = np.unique(np.asarray(codes), return_inverse=True)
    except TypeError:
        raise DataError("the groups' labels cannot be put in order; make text of them") from None
    if not levels.size:
        raise DataError("there are no rows")
    if not 1 <= size <= levels.size:
        raise ValueError(f"size must be between 1 and {levels.size}, the number of groups: {size}")
    return _passes(places.reshape(-1), levels.size, size, np.random.default_rng(seed))


def _passes(places: np.ndarray, count: int, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    counts = np.bincount(places, minlength=count)
    by_group = np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])
    batches = -(-count // size)
    order = rng.permutation(count)
    order = order[np.argsort(-counts[order], kind="stable")]
    dealt: list[list[int]] = [[] for _ in range(batches)]
    for start in range(0, count, batches):  # as many groups as batches, of like numbers of rows
        hand = order[start : start + batches]
        for batch, group in zip(rng.permutation(batches), hand, strict=False):
            dealt[batch].append(group)
    length = int(counts[order[::batches]].sum())  # the largest of every hand
    for chosen in dealt:
        rows = np.concatenate([by_group[group] for group in chosen])
        codes = np.repeat(np.arange(len(chosen)), counts[chosen])
        spare = length - len(rows)
        yield Batch(
            np.concatenate([rows, np.full(spare, rows[0])]),
            np.concatenate([codes, np.zeros(spare, codes.dtype)]),
            np.concatenate([np.ones(len(rows)), np.zeros(spare)]),
            float(batches),
        )
