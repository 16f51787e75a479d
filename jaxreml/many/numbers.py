"""The numbers of many fits: while a block is worked on, and when it is done."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxreml.data.frame import ModelFrame
from jaxreml.errors import DataError
from jaxreml.model.covariance import natural
from jaxreml.optimum.rivals import is_lower
from jaxreml.status import Status


class Fits(NamedTuple):
    """Numbers of many fits, NumPy arrays with the responses on the first axis.

    NaN (False for `is_singular`, 0 for `n_iter`) where `status` is not CONVERGED.

    Attributes:
        beta, se, df: (b, p), fixed effects, standard errors, degrees of freedom.
        sigma, residual_df: (b,), residual standard deviations, and the degrees of freedom that
            their squares have (`residual_degrees`).
        theta: (b, m), relative Cholesky factors as in `Estimate`.
        parameters, parameters_se: (b, m + 1), `Estimate.parameters` and their standard errors.
        criterion, gradient_norm: (b,).
        n_iter, nobs, n_missing, rank: (b,) integers; `n_missing` counts rows without a value,
            `rank` the fixed effects that were fitted: the rank of X in the rows used. Those of
            `beta` and `contrast` that these rows say nothing about are NaN.
        mean: (b,), means of the responses over the rows used, with or without an optimum.
        is_singular: (b,) booleans.
        status: (b,) `Status` codes.
        contributions, contributions_cov: (b, C) and (b, K), what parts of the model add to the
            variance of a row, in the order of `BatchModel.parts`, and covariances, as the function
            `contributions` has them.
        contrast, contrast_se, contrast_df: (b, k), likewise of k contrasts.
        modes: per random term (b, levels, effects), or None.
    """

    beta: np.ndarray
    se: np.ndarray
    df: np.ndarray
    sigma: np.ndarray
    residual_df: np.ndarray
    theta: np.ndarray
    parameters: np.ndarray
    parameters_se: np.ndarray
    criterion: np.ndarray
    gradient_norm: np.ndarray
    n_iter: np.ndarray
    nobs: np.ndarray
    n_missing: np.ndarray
    rank: np.ndarray
    mean: np.ndarray
    is_singular: np.ndarray
    status: np.ndarray
    contributions: np.ndarray
    contributions_cov: np.ndarray
    contrast: np.ndarray
    contrast_se: np.ndarray
    contrast_df: np.ndarray
    modes: tuple[np.ndarray, ...] | None = None


SCALARS = ("sigma", "residual_df", "criterion", "gradient_norm", "n_iter", "is_singular")
# Fields that are not among the numbers of a `Table`.
APART = ("nobs", "n_missing", "rank", "mean", "status", "modes")


class Table:
    """The numbers of a block while it is worked on: responses on the first axis.

    Attributes:
        status: (b,) `Status` codes.
        rank, mean, n_missing: (b,), as in `Fits`.
        numbers: (b, R), the other fields of `Fits` side by side, in the order of `widths`.
        widths: columns of each field.
        modes: per random term (b, levels, effects), or None.
    """

    FIELDS = tuple(name for name in Fits._fields if name not in APART)

    def __init__(self, frame: ModelFrame, b: int, modes: bool, k: int):
        p = len(frame.fixed_names)
        m = natural.count_theta(tuple(len(term.effect_names) for term in frame.terms))
        self.p, self.k = p, k
        groups = len({term.name for term in frame.terms})
        of_rows = groups + len(frame.fixed_terms) + 1, (groups + 1) * (groups + 2) // 2 + 1
        names = [term.effect_names for term in frame.terms]
        blocks = [term.block(len(own)) for term, own in zip(frame.terms, names, strict=True)]
        if frame.residual is not None:
            term = frame.residual.term
            blocks.append(frame.residual.block)
            names.append(term.effect_names or ())
            m += natural.count_theta((blocks[-1].size,))
        known = 1 + sum(
            len(block.parameter_names("", own)) for block, own in zip(blocks, names, strict=True)
        )
        self.widths = (p, p, p, 1, 1, m, known, known, 1, 1, 1, 1, *of_rows, k, k, k)
        self.numbers = np.full((b, sum(self.widths)), np.nan)
        self.status = np.full(b, Status.NOT_FINITE.value)
        self.rank = np.full(b, p)
        self.n, self.n_missing = len(frame.X), np.zeros(b, int)
        self.mean = np.full(b, np.nan)
        self.modes = None
        if modes:
            self.modes = tuple(
                np.full((b, len(term.levels), len(term.effect_names)), np.nan)
                for term in frame.terms
            )

    def store(
        self,
        columns: np.ndarray,
        packed: np.ndarray,
        modes: Any,
        coefficients: np.ndarray,
        estimable: np.ndarray,
        *,
        rival: bool = False,
    ) -> np.ndarray:
        """Take over a chunk's numbers, (1 + R, lanes), status first; its statuses.

        `coefficients` and `estimable` as in `Known`.

        Of `rival` searches, those with a criterion lower than the one here.
        """
        packed = packed[:, : columns.size]
        status = packed[0].astype(int)
        good = status == Status.CONVERGED
        if rival:
            place = sum(self.widths[: self.FIELDS.index("criterion")])
            good &= is_lower(packed[1 + place], self.numbers[columns, place])
        p, k, whole = self.p, self.k, self.numbers.shape[1]
        fixed = [coefficients + part * p for part in range(3)]
        places = np.concatenate([*fixed, np.arange(3 * p, whole)])
        written = good if rival else np.ones_like(good)
        self.status[columns[written]] = status[written]
        self.rank[columns[good]] = coefficients.size
        self.numbers[columns[good, None], places] = packed[1:, good].T
        unknown = np.flatnonzero(~estimable[:p]), np.flatnonzero(~estimable[p:])
        for part in range(3):  # estimates, standard errors, degrees of freedom
            for first, some in zip((part * p, whole - (3 - part) * k), unknown, strict=True):
                self.numbers[np.ix_(columns[good], first + some)] = np.nan
        if modes is not None:
            for own, new in zip(self.modes, modes, strict=True):  # pyright: ignore
                own[columns[good]] = np.moveaxis(new[..., : columns.size], -1, 0)[good]
        return status

    def of(self, column: int) -> dict[str, np.ndarray]:
        """The numbers of one response, by field."""
        parts = np.split(self.numbers[column], np.cumsum(self.widths)[:-1])
        return dict(zip(self.FIELDS, parts, strict=True))

    def blank(self, column: int, status: Status) -> None:
        """Take back the numbers of a response."""
        self.status[column] = status
        self.numbers[column] = np.nan
        for own in self.modes or ():
            own[column] = np.nan

    def take(self, columns: np.ndarray, other: Table) -> None:
        """Take over all numbers of a table of these columns."""
        for name in ("status", "rank", "mean", "n_missing", "numbers"):
            getattr(self, name)[columns] = getattr(other, name)
        for own, new in zip(self.modes or (), other.modes or (), strict=True):
            own[columns] = new

    def fits(self) -> Fits:
        """The numbers by name."""
        parts = np.split(self.numbers, np.cumsum(self.widths)[:-1], axis=1)
        named = dict(zip(self.FIELDS, parts, strict=True))
        for name in SCALARS:
            named[name] = named[name][:, 0]
        with np.errstate(invalid="ignore"):
            named["n_iter"] = np.nan_to_num(named["n_iter"]).astype(int)
            named["is_singular"] = np.nan_to_num(named["is_singular"]).astype(bool)
        return Fits(
            **{name: np.ascontiguousarray(part) for name, part in named.items()},
            nobs=self.n - self.n_missing,
            n_missing=self.n_missing,
            rank=self.rank,
            mean=self.mean,
            status=self.status,
            modes=self.modes,
        )


def require_some(status: np.ndarray) -> None:
    """Raise DataError if no refit converged."""
    if not np.any(status == Status.CONVERGED):
        why = next(iter(count_failures(status)))
        raise DataError(f"none of the {len(status)} refits has an optimum: {why}")


def count_failures(status: np.ndarray) -> dict[str, int]:
    """How many fits ended in each way other than with an optimum, by sentence."""
    codes, counts = np.unique(status[status != Status.CONVERGED], return_counts=True)
    pairs = zip(codes.tolist(), counts.tolist(), strict=True)
    return {Status(code).sentence: count for code, count in pairs}
