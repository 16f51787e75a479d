"""Responses drawn from a model with known parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.arguments import is_reml
from jaxreml.data.formula import parse
from jaxreml.data.frame import ModelFrame, covariate_frame
from jaxreml.errors import DataError
from jaxreml.fitting.fitted import FittedModel
from jaxreml.inference.resampling.own_times import OwnTimes

NEW, CONDITIONAL = "~0", None
TOGETHER = 256  # most responses drawn at a time from one stream of random numbers
NUMBERS = 2**18  # of a stream's responses; a processor's cache holds them
BLOCK = 2**23  # numbers of a block of responses
NEGATIVE = 1e-10  # eigenvalues of a covariance matrix, relative to its entries, that are rounding


@dataclass(frozen=True, eq=False, repr=False)
class Population:
    """A linear mixed model with known parameters.

    Made by `population` from given values, or by `of_fit` from a fit.

    Attributes:
        frame: the rows and terms.
        beta: (p,), fixed effects in the order of ``frame.fixed_names``.
        factors: per random term (q, q), a square root L of the effects' covariance matrix L L'.
        sigma: residual standard deviation at weight 1.
        method: "REML" or "ML", by which responses are fitted.
        structure: as in `fit`.
        context: names the formula may use besides columns.
        residual: (q, q), a square root of the covariance matrix of a subject's residuals over
            sigma2, where ``frame.residual`` says whose they are; `OwnTimes` where each subject has
            its own.
        start: theta and parameters of the fit that it is made from.

    Examples:
        >>> planned.beta.tolist(), planned.sigma
        ([250.0, 10.0], 25.0)
    """

    frame: ModelFrame
    beta: np.ndarray
    factors: tuple[np.ndarray, ...]
    sigma: float
    method: str = "REML"
    structure: str | None = None
    context: Mapping[str, Any] | None = None
    residual: np.ndarray | OwnTimes | None = None
    start: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def mean(self) -> np.ndarray:
        """X beta + offset, (n,).

        Examples:
            >>> planned.mean[:3].tolist()
            [250.0, 260.0, 270.0]
        """
        mean = self.frame.X @ self.beta
        return mean if self.frame.offset is None else mean + self.frame.offset

    def simulate(self, nsim: int = 1, seed: int = 0) -> pd.DataFrame:
        """Draw responses with new random effects; see `simulate`.

        Examples:
            >>> planned.simulate(2, seed=1).shape
            (180, 2)
        """
        return _labelled(self, self.mean, nsim, seed, new=True)

    def __repr__(self) -> str:
        return (
            f"<Population {self.frame.formula.text!r}, {len(self.frame.X)} rows, known parameters, "
            f"for {self.method}>"
        )

    def blocks(self, nsim: int, seed: int) -> Iterator[np.ndarray]:
        """The responses of `simulate` in blocks (rows, b) of bounded size."""
        size = max(BLOCK // len(self.frame.X), 1)
        size = max(size // self._together, 1) * self._together
        for start in range(0, nsim, size):
            yield self._draw(self.mean, start, min(start + size, nsim), seed, new=True)

    @property
    def _together(self) -> int:
        """Responses from one stream of random numbers; it depends on the model only."""
        return min(max(NUMBERS // len(self.frame.X), 1), TOGETHER)

    def _draw(self, mean: np.ndarray, start: int, stop: int, seed: int, *, new: bool) -> np.ndarray:
        """Responses start..stop-1, (rows, stop - start); `start` begins a stream."""
        values = np.empty((stop - start, mean.size))
        starts = range(start, stop, self._together)

        def fill(first: int) -> None:
            part = values[first - start : first - start + self._together]
            self._fill(part, mean, np.random.SeedSequence((seed, first // self._together)), new)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, starts))
        return values.T

    def _fill(
        self, out: np.ndarray, mean: np.ndarray, seed: np.random.SeedSequence, new: bool
    ) -> None:
        """Responses (b, rows); the first of them do not depend on b."""
        of_errors, *of_terms = map(np.random.default_rng, seed.spawn(1 + len(self.factors)))
        if self.residual is None:
            of_errors.standard_normal(out=out)
        elif isinstance(self.residual, OwnTimes):
            assert self.frame.residual is not None
            of_errors.standard_normal(out=out)
            out[:] = self.residual.correlated(out, self.frame.residual)
        else:
            own = self.frame.residual
            assert own is not None
            shape = len(out), len(own.subjects), len(self.residual)
            standard = of_errors.standard_normal(shape)
            out[:] = (standard @ self.residual.T)[:, own.codes, own.places]
        weights = self.frame.weights
        out *= self.sigma if weights is None else self.sigma / np.sqrt(weights)
        out += mean
        if not new:
            return
        for term, factor, rng in zip(self.frame.terms, self.factors, of_terms, strict=True):
            effects = term.drawn(rng, len(out), factor)
            for k, column in enumerate(term.effects.T):
                of_rows = np.take(effects[:, :, k], term.codes, axis=1)
                out += of_rows if np.all(column == 1) else of_rows * column


def of_fit(fit: FittedModel) -> Population:
    """The population with the parameters of a fit.

    Raises:
        DataError: the fit did not converge.
    """
    fit.require_optimum("simulate from it")
    factors = [fit.sigma * factor for factor in fit._factors[: len(fit.groupings)]]
    root = None
    if fit.residual is not None and not fit.residual.block.of_matrix:
        root = OwnTimes(fit.residual, fit._factors[-1])
    elif fit.residual is not None:
        root = np.linalg.cholesky(fit.residual_cov.to_numpy() / fit.sigma**2)
    return Population(
        fit.frame,
        fit.beta,
        tuple(factors),
        fit.sigma,
        fit.method,
        fit.structure,
        fit.context,
        root,
        (fit.theta, fit.parameters),
    )


def population(
    formula: str,
    data: Any,
    beta: Mapping[str, float],
    variances: Mapping[str, Any],
    sigma: float,
    method: str = "REML",
    *,
    weights: Any = None,
    offset: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> Population:
    """A linear mixed model with given parameters, as ``simr::makeLmer``.

    Args:
        formula: as for `fit`; what is left of the ~ is not looked at.
        data: the covariates, as for `fit`.
        beta: every fixed effect by its name, such as ``{"(Intercept)": 250, "Days": 10}``.
        variances: for every grouping factor the variance of its effect, or a vector of the
            variances of its uncorrelated effects, or their covariance matrix; all its terms
            together, in the order of `LMMResults.cov_re`.
        sigma: residual standard deviation.
        method: by which simulated responses are to be fitted, "REML" or "ML".
        weights, offset, structure, context, kernels: as for `fit`.

    Raises:
        FormulaError, DataError: as `fit`; parameters that are missing or unknown.
        ValueError: parameters that are not finite, not positive or no covariance matrix, named.

    Examples:
        A study that is planned: there are covariates and guesses, but no responses yet:

        >>> plan = pd.DataFrame({"day": list(range(5)) * 12, "person": np.repeat(np.arange(12), 5)})
        >>> beta = {"(Intercept)": 250, "day": 10}
        >>> variances = {"person": [[600, 0], [0, 35]]}
        >>> planned = jaxreml.population("~ day + (day | person)", plan, beta, variances, sigma=25)
        >>> planned
        <Population '~ day + (day | person)', 60 rows, known parameters, for REML>
    """
    is_reml(method)
    parsed = parse(formula)
    right = parsed.text[len(parsed.response) :]
    frame = covariate_frame(
        right, data, weights=weights, offset=offset, context=context, kernels=kernels
    )
    values = _checked("beta", beta, frame.fixed_names)
    coefficients = np.array([float(values[name]) for name in frame.fixed_names])
    if not np.all(np.isfinite(coefficients)):
        raise ValueError(f"beta has values that are not finite: {dict(values)}")
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive, not {sigma}")
    factors = _roots(variances, frame)
    return Population(frame, coefficients, factors, float(sigma), method, structure, context)


def _checked(what: str, values: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """`values` by name, exactly these names."""
    found = {str(name): value for name, value in dict(values).items()}
    for name in found:
        if name not in names:
            raise DataError(
                f"{what} has {name!r}, which the model does not have; it has {', '.join(names)}"
            )
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{what} has no value for {', '.join(missing)}")
    return found


def _roots(variances: Mapping[str, Any], frame: ModelFrame) -> tuple[np.ndarray, ...]:
    """Per term a square root of its covariance matrix."""
    names = tuple(dict.fromkeys(term.name for term in frame.terms))
    given = _checked("variances", variances, names)
    roots: dict[int, np.ndarray] = {}
    for name in names:
        terms = [k for k, term in enumerate(frame.terms) if term.name == name]
        sizes = [len(frame.terms[k].effect_names) for k in terms]
        whole = _covariance(name, given[name], sum(sizes))
        start = 0
        for k, q in zip(terms, sizes, strict=True):
            inside = slice(start, start + q)
            outside = np.delete(whole[inside], np.arange(start, start + q), axis=1)
            if np.any(outside):
                raise ValueError(
                    f"the covariance matrix of {name} correlates effects that the formula has in "
                    "different terms"
                )
            values, vectors = np.linalg.eigh(whole[inside, inside])
            roots[k] = vectors * np.sqrt(np.maximum(values, 0.0))
            start += q
    return tuple(roots[k] for k in range(len(frame.terms)))


def _covariance(name: str, value: Any, q: int) -> np.ndarray:
    matrix = np.asarray(value, float)
    if matrix.ndim < 2:
        matrix = np.diag(np.atleast_1d(matrix))
    if matrix.shape != (q, q):
        raise ValueError(
            f"{name} has {q} random effects: its entry of variances must be {q} variances or a "
            f"({q}, {q}) covariance matrix, not of shape {np.shape(value)}"
        )
    ok = np.all(np.isfinite(matrix)) and np.allclose(matrix, matrix.T)
    if not ok or np.linalg.eigvalsh(matrix)[0] < -NEGATIVE * np.abs(matrix).max():
        raise ValueError(f"the entry {name!r} of variances is not a covariance matrix:\n{matrix}")
    return matrix


def simulate(
    fit: FittedModel, nsim: int = 1, seed: int = 0, re_form: str | None = NEW
) -> pd.DataFrame:
    """Draw new responses from a fitted model, as lme4's ``simulate``.

    y = X beta + offset + Z b + e with b ~ N(0, G) and e_i ~ N(0, sigma2 / w_i), on the scale of the
    formula's left side. The first responses are the same for every nsim.

    Args:
        fit: a fit that converged.
        nsim: number of responses.
        seed: of NumPy's generator; the same seed gives the same responses.
        re_form: ``"~0"`` for new random effects, lme4's default; None to keep the conditional
            modes and draw the residuals only.

    Returns:
        (rows, nsim), in the labels of the rows used, columns ``sim_1``, ...

    Raises:
        DataError: the fit did not converge.
        ValueError: nsim, seed or re_form out of range.

    Examples:
        >>> drawn = fit.simulate(3, seed=1)
        >>> drawn.shape, list(drawn.columns)
        ((180, 3), ['sim_1', 'sim_2', 'sim_3'])
        >>> refits = jaxreml.fit_many("~ Days + (Days | Subject)", data, drawn)
        >>> len(refits)
        3
    """
    people = of_fit(fit)
    if re_form not in (NEW, CONDITIONAL):
        raise ValueError(
            f're_form must be "~0" (new random effects) or None (the conditional modes), not '
            f"{re_form!r}"
        )
    new = re_form == NEW
    return _labelled(people, people.mean if new else fit.fitted, nsim, seed, new=new)


def _labelled(
    people: Population, mean: np.ndarray, nsim: int, seed: int, *, new: bool
) -> pd.DataFrame:
    check_count(nsim, seed)
    values = people._draw(mean, 0, nsim, seed, new=new)
    return pd.DataFrame(values, people.frame.table.index, [f"sim_{k + 1}" for k in range(nsim)])


def check_count(nsim: int, seed: int) -> None:
    """Raise ValueError unless nsim is an integer of at least 1 and the seed one of at least 0."""
    for name, value, least in (("nsim", nsim, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
