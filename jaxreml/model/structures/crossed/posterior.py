"""Conditional variances of the random effects of a chain and its tail, on the host.

Given y and the parameters, the tail's effects b_D have covariance R and those of a stage
b_k = -G_k w_k + e_k, with w_k what its couplings make of b_D and of the effects of its later
factors, and e_k of variance E_k, independent of them. The covariances are carried from the last
stage to the first, only where a stage has couplings (`derivatives`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from jaxreml.backend.arrays import mapped
from jaxreml.model.structures.crossed.derivatives import Given, given
from jaxreml.model.structures.crossed.elimination import Couplings

CHUNK = 10**7  # entries of a product at a time
PICKED = 16  # entries of a row that can be added in the time that one is picked
ROW_ENTRIES = 2 * 10**7  # of rows by effects of the tail at a time


class Posterior(NamedTuple):
    """What `variances` needs of each stage, and the tail.

    Attributes:
        gains: per stage G (q, q, J).
        own: per stage E (q, q, J).
        couplings: per stage when it is eliminated.
        inverse: R, (Q, Q).
    """

    gains: tuple[Any, ...]
    own: tuple[Any, ...]
    couplings: tuple[Couplings, ...]
    inverse: Any


def variances(stages: Any, posterior: Posterior) -> list[np.ndarray]:
    """Per stage (q, q, J), in units of the residual variance."""
    R = np.asarray(posterior.inverse)
    found: list[Given] = []
    for k in reversed(range(len(stages))):
        stage, here = stages[k], mapped(np.asarray, posterior.couplings[k])
        gain, own = np.asarray(posterior.gains[k]), np.asarray(posterior.own[k])
        pulled = _at_couplings(here.tail, stage.level, stage.effect, stage.n_levels, R)
        found.insert(0, given(stage, here, gain, own, found, pulled))
    return [one.own for one in found]


def _at_couplings(
    tail: np.ndarray, level: np.ndarray, effect: np.ndarray, n_levels: int, R: np.ndarray
) -> np.ndarray:
    """Row by level of the couplings times R, where that level has couplings: (q, k)."""
    result = np.zeros(tail.shape)
    counts = np.bincount(level, minlength=n_levels)
    starts = np.cumsum(counts) - counts
    for count in np.unique(counts[counts > 0]):
        firsts = starts[counts == count]
        step = max(1, CHUNK // (count * min(PICKED * count, len(R))))
        for start in range(0, firsts.size, step):
            places = firsts[start : start + step, None] + np.arange(count)
            own = effect[places]
            if PICKED * count < len(R):
                between = R[own[:, :, None], own[:, None]]
                result[:, places] = np.einsum("nij,anj->ani", between, tail[:, places])
                continue
            rows, ends = np.arange(len(own))[:, None], np.arange(0, own.size + 1, count)
            for a, values in enumerate(tail):
                shape = len(own), len(R)
                sparse = sp.csr_matrix((values[places].ravel(), own.ravel(), ends), shape)
                result[a, places] = np.asarray(sparse @ R)[rows, own]
    return result


def row_variances(
    stages: Any, posterior: Posterior, of_stages: list[Any], of_tail: Any
) -> np.ndarray:
    """Var(z b) of rows z, (k,), in units of the residual variance.

    Substituting b_k = -G_k w_k + e_k from the first stage to the last turns z b into a sum of
    independent parts, one in each e_k and one in b_D. A block of rows at a time: rows of one level
    of the first stage are put together, as R times its couplings is then computed once.

    Args:
        stages: the chain.
        posterior: what is known of it.
        of_stages: per stage the rows' effects, sparse (k, q J), effect by effect.
        of_tail: likewise of the tail, (k, Q).
    """
    R = np.asarray(posterior.inverse)
    k = of_tail.shape[0]
    gains, owns, chains, tails = [], [], [], []
    for number, stage in enumerate(stages):
        here = np.arange(stage.n_levels)
        gains.append(_sparse(posterior.gains[number], here, stage.n_levels))
        owns.append(_sparse(posterior.own[number], here, stage.n_levels))
        later = zip(posterior.couplings[number].chain, stage.up, stages[number + 1 :], strict=True)
        chains.append(
            [_sparse(across, np.asarray(up), other.n_levels) for across, up, other in later]
        )
        tails.append(_couplings(posterior.couplings[number].tail, stage, len(R)))
    order = np.argsort(of_stages[0].indices[of_stages[0].indptr[:-1]], kind="stable")
    found = np.zeros(k)
    step = max(1, ROW_ENTRIES // max(len(R), 1))
    for start in range(0, k, step):
        block = order[start : start + step]
        rows = [part[block] for part in of_stages]
        tail = of_tail[block]
        images = np.asarray(tail @ R) if len(R) else np.zeros((block.size, 0))
        total = np.zeros(block.size)
        for number, (gain, own, chain, coupled) in enumerate(
            zip(gains, owns, chains, tails, strict=True)
        ):
            total += _row_products(rows[number] @ own, rows[number])
            pulled = rows[number] @ gain
            for later, across in enumerate(chain, number + 1):
                rows[later] = rows[later] - pulled @ across
            if len(R):
                used = np.unique(pulled.indices)
                images -= pulled[:, used] @ np.asarray(coupled[used] @ R)
                tail = tail - pulled @ coupled
        if len(R):
            tail = tail.tocsr()
            places = np.repeat(np.arange(block.size), np.diff(tail.indptr))
            products = tail.data * images[places, tail.indices]
            total += np.bincount(places, products, block.size)
        found[block] = total
    return found


def _sparse(blocks: Any, columns: np.ndarray, n_columns: int) -> Any:
    """The matrix with blocks (q, s, J), level j's in column `columns[j]`: (q J, s n_columns)."""
    blocks = np.asarray(blocks)
    q, s, n_levels = blocks.shape
    rows = np.arange(q)[:, None, None] * n_levels + np.arange(n_levels)
    places = np.arange(s)[:, None] * n_columns + columns
    where = [np.broadcast_to(part, blocks.shape).ravel() for part in (rows, places[None])]
    return sp.csr_matrix((blocks.ravel(), where), (q * n_levels, s * n_columns))


def _couplings(tail: Any, stage: Any, total: int) -> Any:
    """Couplings (q, k) of a stage with the tail, sparse (q J, Q)."""
    tail = np.asarray(tail)
    level, effect = np.asarray(stage.level), np.asarray(stage.effect)
    rows = np.arange(len(tail))[:, None] * stage.n_levels + level
    columns = np.broadcast_to(effect, rows.shape)
    where = (rows.ravel(), columns.ravel())
    return sp.csr_matrix((tail.ravel(), where), (len(tail) * stage.n_levels, total))


def _row_products(left: Any, right: Any) -> np.ndarray:
    """Inner products of the rows of two sparse matrices, (k,)."""
    return np.asarray(left.multiply(right).sum(axis=1)).ravel()
