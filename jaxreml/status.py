"""How an optimisation ended, in a number and in words."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """How an optimisation ended; `sentence` says it in words.

    Examples:
        >>> jaxreml.Status(fit.status)
        <Status.CONVERGED: 0>
        >>> jaxreml.Status.MAX_ITERATIONS.sentence.split(";")[0]
        'the iteration limit was reached before the gradient vanished'
        >>> results.status.value_counts().to_dict()
        {0: 40}
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    SADDLE = 3
    NOT_FINITE = 4
    PERFECT_FIT = 5
    NOT_CERTIFIED = 6
    CONSTANT = 7
    INFINITE = 8
    TOO_FEW_ROWS = 9
    UNDERFLOW = 10
    RANK_DEFICIENT = 11
    BAD_WEIGHTS = 12
    ILL_CONDITIONED = 13
    BAD_LEVELS = 14
    BAD_KERNEL = 15

    @property
    def sentence(self) -> str:
        """One sentence for people.

        Examples:
            >>> jaxreml.Status.CONSTANT.sentence
            'the response is constant: there is nothing to fit'
        """
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "converged: the gradient is zero and the Hessian has no negative eigenvalue",
    Status.MAX_ITERATIONS: "the iteration limit was reached before the gradient vanished; raise "
    "max_iterations, or rescale or simplify the model",
    Status.STALLED: "no downhill step could be found although the gradient is not zero: the model "
    "may be badly scaled or nearly unidentified",
    Status.SADDLE: "the gradient is zero but the Hessian has a negative eigenvalue: this is a "
    "saddle point, not a minimum",
    Status.NOT_FINITE: "the criterion or its derivatives are not finite: a value of the data is "
    "NaN or infinite, squares of the response overflow, or the covariance matrix is not positive "
    "definite in floating point; correct or rescale the data",
    Status.PERFECT_FIT: "the model fits the response perfectly: the residual variance is zero and "
    "the likelihood has no maximum",
    Status.NOT_CERTIFIED: "the separately compiled gradient at the reported optimum is not zero: "
    "the result is not trusted; please report it",
    Status.CONSTANT: "the response is constant: there is nothing to fit",
    Status.INFINITE: "the response has an infinite value; set it to NaN to leave its row out, or "
    "correct it",
    Status.TOO_FEW_ROWS: "the rows where the response is not missing are too few for the model: no "
    "more than the fixed or the random effects, or all in one level",
    Status.UNDERFLOW: "the squares of the response underflow: its values are too small for "
    "floating point; rescale it, by its standard deviation say",
    Status.RANK_DEFICIENT: "a column of X is zero or a linear combination of the others: the data "
    "say nothing about its coefficient, which is NaN; leave the column out",
    Status.BAD_WEIGHTS: "a prior weight is negative, infinite or NaN; weights must be positive, or "
    "zero for rows to leave out where they are traced by JAX (but not where residuals are at times "
    "of each subject's own)",
    Status.BAD_LEVELS: "a code of a grouping factor is negative or not below n_levels: correct the "
    "codes, or raise n_levels",
    Status.BAD_KERNEL: "a known covariance of levels that is traced by JAX is not symmetric or not "
    "positive semidefinite: correct the function that makes it",
    Status.ILL_CONDITIONED: "cross-products have too few digits left of what the fixed and random "
    "effects do not explain: centre and scale the columns before they are summed, or make the "
    "design from rows",
}

# What the response is to blame for: `fit` refuses it as data.
NO_FIT = (Status.NOT_FINITE, Status.PERFECT_FIT, Status.CONSTANT, Status.UNDERFLOW)
