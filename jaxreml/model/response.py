"""`Response`: what a response says on a `Basis`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Response(NamedTuple):
    """What one response says of a model, or many: these are the last axis then, the lanes.

    Attributes:
        scores: projections on Z, in the layout of the structure: as its `columns` without their
            second axis. Of collapsed levels where there are (`Collapse`).
        remainder_xy, remainder_yy: (p,) and (), cross-products of what they leave.
        beta_ols: (p,), coefficients of weighted least squares.
        residual_ss: (), the weighted sum of squares of what X leaves.
        total_ss: (), that of the response less its offset.
        trouble: (), the `Status` that no fit of the response can be better than; CONVERGED if
            there is none.
        products: Z'r, U'r and r'r of the residual r, by which traced effects have their
            derivatives; None where they are not needed.
    """

    scores: Any
    remainder_xy: Any
    remainder_yy: Any
    beta_ols: Any
    residual_ss: Any
    total_ss: Any
    trouble: Any = np.int32(0)
    products: Any = None

    @staticmethod
    def blank(scores: Any, p: int, last: tuple[int, ...] = (), dtype: Any = float) -> Response:
        """One of length 1 that neither X nor Z explains.

        Args:
            scores: `Structure.silent`.
            p: number of fixed effects.
            last: the lanes, an axis at the end; none if empty.
            dtype: of the numbers.
        """
        one, none = np.ones(last, dtype), np.zeros((p, *last), dtype)
        return Response(scores, none, one, none, one, one, products=(scores, none, one))
