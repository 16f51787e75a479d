"""`score_tests`: a covariate for every fit, at the variance ratio of the model without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.backend.threads import single_blas
from jaxreml.data.companions import Companions
from jaxreml.data.frame import covariate_frame
from jaxreml.data.grouping import require_plain
from jaxreml.data.pairs import Pairs, taken
from jaxreml.data.responses import Responses
from jaxreml.errors import DataError
from jaxreml.many.engine import BatchFitter
from jaxreml.model import linalg
from jaxreml.model.basis import Basis
from jaxreml.model.design import Design
from jaxreml.status import Status

BLOCK_BYTES = 2 << 20  # of covariates at a time, to stay in the cache
DEPENDENT = 1e-10  # share of a covariate that the others leave which is rounding error
COLUMNS = ("estimate", "std_error", "df", "statistic", "p_value", "n_missing")


def score_tests(
    formula: str,
    data: Any,
    responses: Any,
    covariates: Any,
    method: str = "REML",
    *,
    pairs: Any = None,
    id: str | None = None,
    weights: Any = None,
    context: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Test covariates one by one at the variance ratio of the model without them.

    The fast way through millions of covariates, as EMMAX (Kang et al. 2010, Nature Genetics
    42:348): each response is fitted once, and its variances, but for a common factor, are taken for
    known. A covariate enters by generalised least squares then, with n - p - 1 degrees of freedom.
    That is near to the full refit, ``fit_many(covariates=)``, where no single covariate explains
    much.

    Args:
        formula: without the covariate and without a left side, with one grouping factor.
        data, id, weights, context: as for `fit_many`; one set of weights for all.
        responses: as for `fit_many`, not a stream.
        covariates: an (n, C) matrix in any form that responses may have. Missing values are
            replaced by the covariate's mean.
        method: of the fits without covariates, "REML" or "ML".
        pairs: as for `fit_many`.

    Returns:
        A row per covariate, or per pair, named as by `fit_many`: estimate, std_error, df,
        statistic, p_value, and n_missing, the values of the covariate that were replaced. NaN where
        the response has no optimum, and for a covariate that is constant or depends on X.

    Raises:
        FormulaError, DataError, ValueError: as `fit_many`; several grouping factors.

    Examples:
        >>> snps = np.random.default_rng(1).binomial(2, 0.3, (180, 100))
        >>> found = jaxreml.score_tests("~ Days + (1 | Subject)", data, data["Reaction"], snps)
        >>> found.shape
        (100, 6)
        >>> found.nsmallest(2, "p_value")[["estimate", "std_error", "p_value"]].round(3)
            estimate  std_error  p_value
        53   -10.559      3.916    0.008
        42     8.111      3.768    0.033
    """
    from scipy.special import stdtr

    frame = covariate_frame(formula, data, weights=weights, context=context)
    require_plain(frame.terms, "test many covariates")
    read = Responses(responses, data, frame.rows, id)
    source = Companions(read, frame.table)
    matrix = Responses(covariates, data, frame.rows, id, role="covariates")
    both = Pairs(source, matrix, pairs)
    fitter = BatchFitter(frame, method, engine="numpy")
    if fitter.structure != "grouped":
        raise DataError(
            "score tests are for one grouping factor: use fit_many(covariates=) for several"
        )
    nulls = partial(_null, fitter)
    names, parts = [], []
    size = max(1, BLOCK_BYTES // (8 * len(frame.X)))
    with single_blas():
        for own, found in _blocks(both, source, matrix, nulls, size):
            names.append(own)
            parts.append(found)
    table = np.concatenate(parts) if parts else np.zeros((0, len(COLUMNS)))
    frame_of = pd.DataFrame(table, names[0].append(names[1:]), list(COLUMNS))
    frame_of["p_value"] = 2 * stdtr(frame_of["df"], -np.abs(frame_of["statistic"]))
    return frame_of.astype({"n_missing": int})


class _Null(NamedTuple):
    """What a response says at the variance ratio of its fit without covariates, in weighted rows.

    Attributes:
        basis: of its rows.
        used: (n,) booleans, these rows.
        kernel: (q, q, J), I - P^-1 of the levels: V^-1 = I - Q (I - P^-1) Q'.
        columns: (n, p + 1), V^-1 U, and P y with P the projection that leaves out X.
        half: (p, p), the inverse of the Cholesky factor of U'V^-1 U.
        rss: y'P y.
        df: n - p - 1.
    """

    basis: Basis
    used: np.ndarray
    kernel: np.ndarray
    columns: np.ndarray
    half: np.ndarray
    rss: float
    df: float

    def tests(self, x: np.ndarray) -> np.ndarray:
        """COLUMNS but for p-values, (b, 6), of covariates (n, b)."""
        if not self.used.all():
            x = np.where(self.used[:, None], x, 0.0)
        lacking = np.zeros(x.shape[1], int)
        if not np.isfinite(x.sum()):
            missing = np.isnan(x)
            lacking = missing.sum(axis=0)
            x = np.where(missing, 0.0, x)
            with np.errstate(invalid="ignore"):
                x = x + missing * (x.sum(axis=0) / (self.used.sum() - lacking))
        if self.basis.roots is not None:
            x = x * self.basis.roots[:, None]
        scores = self.basis.projector.scores(x)
        squares = np.einsum("nb,nb->b", x, x)
        across = np.einsum("ajb,acj,cjb->b", scores, self.kernel, scores, optimize=True)
        products = self.columns.T @ x
        left = self.half @ products[:-1]
        own = squares - across - np.sum(left**2, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(own > DEPENDENT * squares, own, np.nan)
            estimate = products[-1] / own
            sigma2 = (self.rss - products[-1] * estimate) / self.df
            error = np.sqrt(sigma2 / own)
            statistic = estimate / error
        df = np.where(np.isnan(own), np.nan, self.df)
        parts = [estimate, error, df, statistic, np.full(len(own), np.nan), lacking]
        return np.stack(parts, axis=1)


def _null(fitter: BatchFitter, y: np.ndarray) -> _Null | None:
    """Of one response, (n,); None if it has no optimum."""
    fits = fitter.fit(y[:, None])
    if fits.status[0] != Status.CONVERGED:
        return None
    used = ~np.isnan(y)
    basis = fitter.basis_in(used)
    design = Design.of(basis, basis.response(np.where(used, y, 0.0)))
    root = linalg.block_diagonal(list(design.scaled_factors(fits.theta[0])))
    loadings = np.einsum("abj,bc->jac", basis.structure.factors, root)
    eye = np.eye(len(root))
    inverse = np.linalg.inv(eye + loadings @ loadings.swapaxes(1, 2))
    kernel = np.moveaxis(eye - inverse, 0, 2)

    U, p = basis.rows, basis.p
    residual = np.where(used, y if basis.offset is None else y - basis.offset, 0.0)
    residual = residual if basis.roots is None else residual * basis.roots
    residual = residual - U @ (U.T @ residual)
    both = np.column_stack([U, residual])
    scores = basis.projector.scores(both)
    weighted = both - basis.projector.spread(np.einsum("acj,cjk->ajk", kernel, scores))
    half = np.linalg.inv(np.linalg.cholesky(U.T @ weighted[:, :p]))
    of_y = half.T @ (half @ (U.T @ weighted[:, p]))
    projected = weighted[:, p] - weighted[:, :p] @ of_y
    columns = np.column_stack([weighted[:, :p], projected])
    return _Null(basis, used, kernel, columns, half, float(residual @ projected), basis.n - p - 1.0)


def _blocks(
    pairs: Pairs, responses: Companions, covariates: Responses, nulls: Any, size: int
) -> Iterator[tuple[pd.Index, np.ndarray]]:
    """Names and tests of some pairs at a time."""
    null = cache(lambda k: nulls(responses.read(k, k + 1).values[:, 0]))
    if pairs.names is None:  # a stream, for one response
        for block in covariates.blocks(size):
            yield block.names, _tested(null(0), block.read())
        return
    for start in range(0, len(pairs.names), size):
        own = slice(start, start + size)
        left = pairs.left[own]
        values: Any = taken(lambda *ends: (covariates.read(*ends),), pairs.right[own])[0]
        found = np.empty((len(left), len(COLUMNS)))
        for k in np.unique(left):
            found[left == k] = _tested(null(int(k)), values[:, left == k])
        yield pairs.names[own], found


def _tested(null: _Null | None, x: Any) -> np.ndarray:
    if null is None:
        return np.column_stack([np.full((x.shape[1], 5), np.nan), np.isnan(x).sum(axis=0)])
    return null.tests(x)
