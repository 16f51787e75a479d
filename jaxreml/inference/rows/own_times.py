"""Predictions where the residuals of a subject are at times of its own (`covariance.timed`).

What a subject has shown says something of its residuals at other times: with c the covariances,
over sigma2, of z'b + e at a new time with the subject's rows, and V0 those of these rows,

    E(z'b + e | y) = c'V0^-1 (y - X beta),
    Var = sigma2 [c0 - c'V0^-1 c + (x - c'V0^-1 X) Phi (x - c'V0^-1 X)'].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel

MOST_ROWS = 2000  # of a subject, whose matrix intervals take


class AtTimes(NamedTuple):
    """What residuals add to predictions of k rows.

    Attributes:
        mean: (k,), of the residuals at times without a response; zero for other rows.
        other: (k,) booleans, which rows these are.
        variance: (k,), of x'(beta_hat - beta) + z'(b_hat - b), and of the residual where `other`,
            over sigma2; None if not asked for.
    """

    mean: np.ndarray
    other: np.ndarray
    variance: np.ndarray | None


def at_times(fit: FittedModel, rows: Any, chosen: list[Any], wanted: bool, spread: bool) -> AtTimes:
    """Of rows as `prediction.Rows` has them, whose `visits` are times, NaN for those not known.

    Args:
        fit: with residuals at times of each subject's own.
        rows: k of them.
        chosen: per random term the levels (k,) and effects (k, q), zero where they are not used.
        wanted: whether residuals count.
        spread: whether to give variances.

    Raises:
        DataError: a subject with too many rows for variances.
    """
    frame, residual = fit.frame, fit.residual
    assert frame.residual is not None and residual is not None
    own, root = frame.residual, np.sqrt(fit.prior_weights)
    order = np.argsort(own.codes, kind="stable")
    ends = np.append(0, np.cumsum(np.bincount(own.codes)))
    k = len(rows.subjects)
    mean, other, variance = np.zeros(k), np.zeros(k, bool), np.zeros(k)
    blocks = [block / fit.sigma**2 for block in fit.cov_re_arrays]
    law: Any = residual.block
    z = fit.theta[-1]
    for subject in np.unique(rows.subjects):
        here = np.flatnonzero(rows.subjects == subject)
        mine = order[ends[subject] : ends[subject + 1]] if subject >= 0 else order[:0]
        times, known = residual.times[own.places[mine]], rows.visits[here]
        seen = (known[:, None] == times).any(axis=1)
        other[here] = wanted & (subject >= 0) & np.isfinite(known) & ~seen
        new_root = np.sqrt(rows.weights[here])
        near = law.relative(z, np.where(other[here], known, 0.0), times)
        near = near * other[here][:, None] / new_root[:, None]
        mean[here] = near @ residual.modes[mine, 0]
        if not spread:
            continue
        if len(mine) > MOST_ROWS:
            raise DataError(
                f"intervals of predictions take a matrix of the rows of a subject, and "
                f"{residual.words.subject} {residual.subjects[subject]!r} has {len(mine):,}; it "
                f"may be {MOST_ROWS:,}"
            )
        V = law.relative(z, times, times)
        value = other[here] / rows.weights[here]
        for term, block, (_, effects) in zip(frame.terms, blocks, chosen, strict=True):
            Z = term.effects[mine] * root[mine, None]
            V, near = V + Z @ block @ Z.T, near + effects[here] @ block @ Z.T
            value = value + np.sum(effects[here] @ block * effects[here], axis=1)
        half = np.linalg.solve(V, near.T).T
        rest = rows.X[here] - half @ (frame.X[mine] * root[mine, None])
        variance[here] = value - np.sum(near * half, axis=1)
        variance[here] += np.sum(rest @ fit.vcov_array * rest, axis=1) / fit.sigma**2
    return AtTimes(mean, other, variance if spread else None)
