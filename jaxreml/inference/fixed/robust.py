r"""Covariances of the fixed effects that hold whatever the covariance of the responses: sandwiches.

With clusters c whose responses are independent of each other's, working covariances V_c, residuals
e_c = y_c - X_c beta and M = (X'V^-1 X)^-1 they are

    M [sum X_c'V_c^-1 A_c e_c e_c' A_c' V_c^-1 X_c] M

(Liang and Zeger 1986, Biometrika 73:13). A_c is the identity for "CR0", SAS's EMPIRICAL, and "CR1",
which is m / (m - 1) times that for m clusters. For "CR2" it makes the sum unbiased if V_c is right
(Bell and McCaffrey 2002, Survey Methodology 28:169, as Pustejovsky and Tipton 2018, J. Business &
Economic Statistics 36:672, have it); for "CR3" it is that of leaving each cluster out, nearly.
Degrees of freedom are Satterthwaite's under the working model, those of joint tests of Hotelling's
T squared (their HTZ).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from jaxreml.errors import DataError
from jaxreml.fitting.fitted import Fit, FittedModel
from jaxreml.inference.rows.marginal import covariances
from jaxreml.model.groups import contains

KINDS = ("CR0", "CR1", "CR2", "CR3")
MOST_CLUSTERS = 5000  # degrees of freedom take matrices of this order
MOST_NUMBERS = 10**8  # of a joint test
SINGULAR = 1e-10  # eigenvalues, relative to the largest, that are zero


def robust(fit: Fit, kind: str = "CR2", cluster: Any = None) -> Fit:
    """The same fit with a robust covariance of its fixed effects, which standard errors, tests,
    intervals, marginal means and contrasts of what is returned are by.

    They hold if the covariance of the responses within clusters is not what the model says, given
    enough clusters. Estimates, variances and predictions stay those of the model, and degrees of
    freedom are those of the robust covariance, whatever `df` is asked for.

    Args:
        fit: the fit.
        kind: "CR0" (SAS's EMPIRICAL), "CR1", "CR2" (the best with few clusters) or "CR3".
        cluster: a column of the table; the grouping factor with the fewest levels, or the subjects
            of ``residual=``, if left out. Random effects and correlated residuals must not reach
            from one cluster into another.

    Returns:
        A fit like `fit`.

    Raises:
        DataError: clusters that share random effects or correlated residuals, fewer than two
            clusters, or too many rows in one; a column that the fit does not use.
        ValueError: another kind.

    Examples:
        >>> fit.robust("CR2").coefficients().loc["Days", ["std_error", "df"]].round(2).tolist()
        [1.55, 17.0]
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    fit.require_optimum("give robust standard errors")
    fit.require_independent_levels("give robust standard errors")
    codes, name = _clusters(fit, cluster)
    found = Sandwich.of(fit, codes, kind)
    note = f"{kind} robust standard errors, clustered by {name}"
    return replace(fit, vcov_array=found.vcov, sandwich=found, sandwich_note=note)


def _clusters(fit: FittedModel, cluster: Any) -> tuple[np.ndarray, str]:
    """Codes (n,) of the clusters, and their name."""
    frame = fit.frame
    parts = [(term.name, term.codes) for term in frame.terms]
    if frame.residual is not None and frame.residual.words.subject is not None:
        parts.append((frame.residual.words.subject, frame.residual.codes))
    if cluster is None and not parts:
        raise DataError("the rows are independent in this fit: give cluster= a column of clusters")
    if cluster is None:
        # The coarsest; what it does not contain is refused below.
        name, codes = min(parts, key=lambda part: int(part[1].max()))
    else:
        if cluster not in fit.table:
            known = ", ".join(map(repr, fit.table.columns))
            raise DataError(
                f"cluster {cluster!r} is not a column that the fit uses; there are {known}"
            )
        values = fit.table[cluster]
        codes, name = np.unique(values, return_inverse=True)[1], str(cluster)
    for other, own in parts:
        if not contains(codes, own):
            raise DataError(
                f"levels of {other!r} are in several clusters of {name!r}, which are not "
                "independent then; give cluster= a column that contains them"
            )
    if codes.max() < 1:
        raise DataError(f"{name!r} has one cluster; robust standard errors need many")
    return codes, name


class Cluster(NamedTuple):
    """Rows of a cluster: X_c (k, p), V_c (k, k), and e_c (k,)."""

    X: np.ndarray
    V: np.ndarray
    residual: np.ndarray


def _each(fit: FittedModel, codes: np.ndarray) -> Iterator[Cluster]:
    order, residual = np.argsort(codes, kind="stable"), fit.y - fit.fixed_fitted
    for rows in np.split(order, np.cumsum(np.bincount(codes))[:-1]):
        yield Cluster(fit.frame.X[rows], covariances(fit, rows)[0], residual[rows])


@dataclass(frozen=True)
class Sandwich:
    """An `Approximation` for tests.

    Attributes:
        vcov: (p, p).
        model: (p, p), M.
        weights: per cluster (k, p), A_c'V_c^-1 X_c M.
        clusters: the rows.
    """

    vcov: np.ndarray
    model: np.ndarray
    weights: list[np.ndarray]
    clusters: list[Cluster]

    @staticmethod
    def of(fit: FittedModel, codes: np.ndarray, kind: str) -> Sandwich:
        """Of a fit and the clusters of its rows."""
        model = fit.vcov_array if fit.sandwich is None else fit.sandwich.model
        clusters = list(_each(fit, codes))
        weights = [_weights(own, model, kind) for own in clusters]
        factor = len(clusters) / (len(clusters) - 1) if kind == "CR1" else 1.0
        scores = np.array(
            [own.residual @ part for own, part in zip(clusters, weights, strict=True)]
        )
        return Sandwich(factor * scores.T @ scores, model, weights, clusters)

    def single(self, rows: np.ndarray) -> np.ndarray:
        """Degrees of freedom (k,) of the t tests of (k, p) `rows`."""
        return np.array([self._freedom(row[None]) for row in rows])

    def several(self, rows: np.ndarray, rank: int) -> tuple[float, float]:
        """Denominator degrees of freedom and the factor of F of the joint test of (k, p) `rows`, of
        which `rank` are linearly independent."""
        basis = np.linalg.svd(rows, full_matrices=False)[2][:rank]
        freedom = self._freedom(basis)
        left = freedom - rank + 1
        return left, left / freedom

    def _freedom(self, rows: np.ndarray) -> float:
        """eta with which the estimated covariance of (q, p) `rows` of the fixed effects is about a
        Wishart matrix: q (q + 1) over the sum of the variances of its entries, standardised."""
        if len(self.clusters) > MOST_CLUSTERS:
            raise DataError(
                f"degrees of freedom for {len(self.clusters)} clusters are not there: with so "
                'many, ask for normal tests by df="inf" of the model'
            )
        if len(rows) ** 2 * len(self.clusters) ** 2 > MOST_NUMBERS:
            raise DataError(
                f"a joint test of {len(rows)} hypotheses with {len(self.clusters)} clusters is too "
                "large; test fewer at a time"
            )
        ways = [part @ rows.T for part in self.weights]  # (k, q)
        pairs = list(zip(self.clusters, ways, strict=True))
        own = np.array([way.T @ cluster.V @ way for cluster, way in pairs])
        across = np.array([cluster.X.T @ way for cluster, way in pairs])  # (m, p, q)
        shared = np.einsum("cps,pr,drt->scdt", across, self.model, across, optimize=True)
        cov = -shared.transpose(0, 3, 1, 2)  # (q, q, m, m)
        diagonal = np.arange(len(own))
        cov[:, :, diagonal, diagonal] += own.transpose(1, 2, 0)
        expected = np.einsum("stcc->st", cov)
        values, vectors = np.linalg.eigh((expected + expected.T) / 2)
        root = vectors / np.sqrt(values)  # root' expected root = I
        cov = np.einsum("sa,stcd,tb->abcd", root, cov, root, optimize=True)
        total = np.einsum("aacd,bbcd->", cov, cov) + np.einsum("abcd,bacd->", cov, cov)
        q = len(rows)
        return float(q * (q + 1) / total)


def _weights(cluster: Cluster, model: np.ndarray, kind: str) -> np.ndarray:
    """A'V^-1 X M of a cluster."""
    X, V, _ = cluster
    root = np.linalg.cholesky(V)  # D' of V = D'D
    half = scipy.linalg.solve_triangular(root, X @ model, lower=True)
    plain = scipy.linalg.solve_triangular(root.T, half)
    if kind in ("CR0", "CR1"):
        return plain
    inside = X @ model @ X.T
    if kind == "CR3":
        rest = np.eye(len(V)) - np.linalg.solve(V, inside)  # (I - H_cc)'
        return np.linalg.solve(rest, plain)
    middle = root.T @ (V - inside) @ root
    values, vectors = np.linalg.eigh((middle + middle.T) / 2)
    kept = values > SINGULAR * values.max()
    vectors = vectors[:, kept]
    return root @ (vectors / np.sqrt(values[kept])) @ (vectors.T @ (root.T @ plain))
