"""What `BatchFitter` needs of a design with many responses, whatever its structure."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxreml.many.contributions import Parts
from jaxreml.many.numbers import Table
from jaxreml.model.basis import Basis


class Options(NamedTuple):
    """How responses are fitted.

    Attributes:
        reml: REML or ML.
        df: degrees of freedom of tests, as in `fit_many`.
        contrasts: (k, p), linear functions of the fixed effects to give besides them.
        max_iterations: as in `estimate`.
        modes: whether to keep conditional modes.
        lanes: responses in a chunk, for each device; None to choose.
        devices: to work on.
        parts: what adds to the variance of the rows.
    """

    reml: bool
    df: str
    contrasts: np.ndarray
    max_iterations: int
    modes: bool
    lanes: int | None
    devices: list[Any]
    parts: Parts


class Known(NamedTuple):
    """What some of the rows say of the fixed effects.

    Attributes:
        coefficients: which columns of X the design has, so many as their rank in these rows.
        estimable: (p + k,) booleans, which coefficients and contrasts the rows say anything about:
            one whose row is in the row space of X. Another would be a comparison with what is not
            in the rows, such as a level of a factor, under its name.
    """

    coefficients: np.ndarray
    estimable: np.ndarray


class Engine(Protocol):
    """A design without a response, and what fits it to many."""

    def __init__(self, basis: Basis, X: np.ndarray, known: Known, options: Options) -> None:
        """Prepare rows; `X`, (rows used, p), is as given."""
        ...

    def fit(
        self, values: np.ndarray, columns: np.ndarray, kept: np.ndarray | None, table: Table
    ) -> None:
        """Fit these columns of (n, b) `values` and store their numbers in the table.

        `kept` (n,) are the rows that the basis uses, None for all; the others' values are missing.
        """
        ...

    def gradients(self, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Gradients (b, m + 1) of the objective at `parameters` for complete (n, b) `values`."""
        ...
