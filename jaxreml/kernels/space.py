"""Covariances in space and on networks: of distances, and of neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.kernels.known import Inverse, labelled, require_covariance

# Matern correlations at u = d / range, as Rasmussen and Williams (2006, section 4.2.1) scale it.
MATERN: dict[float, Callable[[np.ndarray], np.ndarray]] = {
    0.5: lambda u: np.exp(-u),
    1.5: lambda u: (1 + 3**0.5 * u) * np.exp(-(3**0.5) * u),
    2.5: lambda u: (1 + 5**0.5 * u + 5 * u**2 / 3) * np.exp(-(5**0.5) * u),
}
FLAT = 1e-10  # eigenvalues of a Laplacian below this fraction of the largest are zero


def matern(
    coordinates: Any,
    range: float,
    nu: float = 1.5,
    labels: Sequence[Any] | None = None,
    *,
    distances: bool = False,
) -> pd.DataFrame:
    """Matern correlations of places at their distances.

    Neighbouring places are alike, the more the larger the range. The field is rough for nu = 1/2
    (the exponential correlation), differentiable once for 3/2 and twice for 5/2. The range is not
    estimated: compare the criteria of fits, or minimise the criterion in it, by
    `jaxreml.optimise`, with a kernel of your own in JAX.

    Args:
        coordinates: (places, dimensions), a frame with the places as its index or an array. Of
            longitudes and latitudes take distances instead.
        range: the distance over which correlations fall: to 0.37, 0.48 and 0.52 for nu of 1/2, 3/2
            and 5/2.
        nu: smoothness, 1/2, 3/2 or 5/2.
        labels: of the places; those of the frame, or 0, 1, ..., if left out.
        distances: whether the first argument is the matrix of distances, (places, places).

    Returns:
        A frame with the labels on both sides, for ``kernels=``.

    Raises:
        DataError: coordinates that are not finite, distances that give no covariance.
        ValueError: another nu, a range that is not positive.

    Examples:
        >>> import pandas as pd
        >>> from jaxreml import kernels
        >>> fields = pd.DataFrame({"x": [0, 1, 5], "y": [0, 1, 0]}, ["a", "b", "c"])
        >>> kernels.matern(fields, range=2).round(2)
              a     b     c
        a  1.00  0.65  0.07
        b  0.65  1.00  0.13
        c  0.07  0.13  1.00
    """
    if nu not in MATERN:
        raise ValueError(f"nu must be 0.5, 1.5 or 2.5, not {nu!r}")
    if not (np.isfinite(range) and range > 0):
        raise ValueError(f"range must be positive, not {range!r}")
    what = "distances" if distances else "coordinates"
    index = labelled(what, coordinates, labels)
    try:
        values = np.asarray(coordinates, float)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be numbers") from None
    if distances:
        apart = _square(what, values, index)
        if np.any(apart < 0) or np.any(np.diagonal(apart) != 0):
            raise DataError("distances must not be negative, and zero on the diagonal")
    else:
        from scipy.spatial.distance import cdist

        values = values.reshape(len(index), -1)
        if not np.all(np.isfinite(values)):
            row = int(np.argmax(~np.isfinite(values).all(axis=1)))
            raise DataError(f"the coordinates of {index[row]!r} are not finite")
        apart = cdist(values, values)
    matrix = MATERN[nu](apart / range)
    if distances:  # that are not Euclidean may give none
        require_covariance("the matrix of correlations at these distances", matrix, index)
    return pd.DataFrame(matrix, index, index)


def car(adjacency: Any, rho: float, labels: Sequence[Any] | None = None) -> Inverse:
    """Proper conditional autoregression of areas, or of the nodes of a network.

    Each area varies around rho times the mean of its neighbours (Besag 1974, J. Royal Statistical
    Society B 36:192): the inverse of the covariance is D - rho W, with W the adjacency and D its
    row sums.

    Args:
        adjacency: (areas, areas), 1 for neighbours and 0 for others, or weights: a frame with
            labels, an array, or SciPy's sparse matrix.
        rho: spatial dependence, above -1 and below 1; 0 is none. It is not estimated.
        labels: of the areas; those of the frame, or 0, 1, ..., if left out.

    Raises:
        DataError: no symmetric adjacency, areas without neighbours, named.
        ValueError: another rho.

    Examples:
        >>> import numpy as np
        >>> from jaxreml import kernels
        >>> row = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
        >>> kernels.car(row, rho=0.9, labels=["west", "centre", "east"]).covariance().round(2)
                west  centre  east
        west    3.13    2.37  2.13
        centre  2.37    2.63  2.37
        east    2.13    2.37  3.13
    """
    from scipy import sparse

    if not -1 < rho < 1:
        raise ValueError(f"rho must be between -1 and 1, not {rho!r}; at 1 it is icar")
    weights, index = _adjacency(adjacency, labels)
    sums = np.asarray(weights.sum(axis=1)).ravel()
    matrix = sparse.diags_array(sums) - rho * weights
    return Inverse(sparse.csc_matrix(matrix), tuple(index.tolist()))


def icar(adjacency: Any, labels: Sequence[Any] | None = None) -> pd.DataFrame:
    """Intrinsic conditional autoregression: the limit of `car` as rho comes to 1.

    The covariance is the generalised inverse of D - W: effects sum to zero over each connected
    part. It is scaled, in each part, so that the geometric mean of the variances is 1 (Sorbye and
    Rue 2014, Spatial Statistics 8:39), which makes its variance comparable to that of
    independent areas beside it: ``{"area": {"space": icar(W), "own": None}}`` is the model of
    Besag, York and Mollie (1991).

    Args:
        adjacency, labels: as for `car`.

    Returns:
        A frame with the labels on both sides, for ``kernels=``.

    Raises:
        DataError: no symmetric adjacency, areas without neighbours, named.

    Examples:
        >>> import numpy as np
        >>> from jaxreml import kernels
        >>> row = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
        >>> kernels.icar(row, labels=["west", "centre", "east"]).round(2)
                west  centre  east
        west    1.36   -0.27 -1.09
        centre -0.27    0.54 -0.27
        east   -1.09   -0.27  1.36
    """
    from scipy.sparse.csgraph import connected_components

    weights, index = _adjacency(adjacency, labels)
    count, part = connected_components(weights, directed=False)
    found = np.zeros((len(index),) * 2)
    for k in np.arange(count):
        places = np.flatnonzero(part == k)
        own = weights[places][:, places].toarray()
        values, vectors = np.linalg.eigh(np.diag(own.sum(axis=1)) - own)
        inverse = np.where(values > FLAT * values[-1], values, np.inf)
        block = (vectors / inverse) @ vectors.T
        variance = np.exp(np.mean(np.log(np.diagonal(block))))
        found[np.ix_(places, places)] = block / variance
    return pd.DataFrame(found, index, index)


def _adjacency(adjacency: Any, labels: Sequence[Any] | None) -> tuple[Any, pd.Index]:
    """Weights, sparse, and labels."""
    from scipy import sparse

    index = labelled("adjacency", adjacency, labels)
    if isinstance(adjacency, pd.DataFrame) and labels is None:
        if set(adjacency.columns) != set(index):
            raise DataError("the rows and the columns of the adjacency have different labels")
        adjacency = adjacency[index]
    values = adjacency if sparse.issparse(adjacency) else _numbers(adjacency)
    weights: Any = sparse.csr_matrix(values, dtype=float)
    if weights.shape[0] != weights.shape[1]:
        raise DataError(f"the adjacency must be square, not {weights.shape}")
    if weights.nnz and (weights.data.min() < 0 or not np.all(np.isfinite(weights.data))):
        raise DataError("the adjacency must be 1 for neighbours and 0 for others, or weights")
    if abs(weights - weights.T).max() > 0:
        raise DataError("the adjacency must be symmetric: neighbours are each other's")
    weights.setdiag(0)
    weights.eliminate_zeros()
    alone = np.flatnonzero(np.asarray(weights.sum(axis=1)).ravel() == 0)
    if alone.size:
        raise DataError(
            f"{alone.size} of {len(index)} areas have no neighbour, the first {index[alone[0]]!r}: "
            "give them one, or leave them out"
        )
    return weights, index


def _numbers(table: Any) -> np.ndarray:
    try:
        return np.asarray(table, float)
    except (TypeError, ValueError):
        raise DataError("the adjacency must be numbers") from None


def _square(what: str, values: np.ndarray, index: pd.Index) -> np.ndarray:
    if values.shape != (len(index),) * 2 or not np.all(np.isfinite(values)):
        raise DataError(f"{what} must be a square matrix of finite numbers")
    if not np.allclose(values, values.T):
        raise DataError(f"{what} must be symmetric")
    return values
