"""`fit_many`: one formula, one table, many responses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from keyword import iskeyword
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from jaxreml.api.blocks import Job, block_size, fit_in_memory, fit_to_file, progress_of_fits
from jaxreml.arguments import is_reml, refuse_arguments
from jaxreml.data.companions import Companions, Measured, of_each
from jaxreml.data.frame import ModelFrame, covariate_frame, with_response
from jaxreml.data.grouping import require_plain
from jaxreml.data.hypotheses import hypotheses
from jaxreml.data.pairs import Pairs, paired_frame
from jaxreml.data.responses import Responses
from jaxreml.errors import FormulaError
from jaxreml.fitting.fit import fit_frame
from jaxreml.fitting.residuals import ResidualCovariance
from jaxreml.many.fitted import BatchModel
from jaxreml.many.own_fitter import fitter_for
from jaxreml.many.processes import Crew
from jaxreml.results.batch import BatchResults
from jaxreml.results.results import LMMResults
from jaxreml.results.streamed import (
    Parts,
    StreamedResults,
    check_output,
    describe_run,
)

BLOCK_BYTES = 64 << 20  # of values or results of one block, whichever is more

Advance = Callable[[np.ndarray], None]


@overload
def fit_many(
    formula: str,
    data: Any,
    responses: Any,
    method: str = "REML",
    *,
    id: str | None = None,
    layer: str | None = None,
    weights: Any = None,
    offset: Any = None,
    covariates: Mapping[str, Any] | None = None,
    pairs: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    modes: bool = False,
    df: str = "satterthwaite",
    contrasts: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
    batch_size: int | None = None,
    devices: Any = None,
    engine: Literal["numpy", "jax"] | None = None,
    output: None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    kernels: Mapping[str, Any] | None = None,
    residual: str | None = None,
) -> BatchResults: ...


@overload
def fit_many(
    formula: str,
    data: Any,
    responses: Any,
    method: str = "REML",
    *,
    output: str | Path,
    **options: Any,
) -> StreamedResults: ...


def fit_many(
    formula: str,
    data: Any,
    responses: Any,
    method: str = "REML",
    *,
    id: str | None = None,
    layer: str | None = None,
    weights: Any = None,
    offset: Any = None,
    covariates: Mapping[str, Any] | None = None,
    pairs: Any = None,
    structure: str | None = None,
    context: Mapping[str, Any] | None = None,
    modes: bool = False,
    df: str = "satterthwaite",
    contrasts: Mapping[str, Any] | None = None,
    max_iterations: int = 100,
    batch_size: int | None = None,
    devices: Any = None,
    engine: Literal["numpy", "jax"] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    kernels: Mapping[str, Any] | None = None,
    residual: str | None = None,
    **others: Any,
) -> BatchResults | StreamedResults:
    """Fit one linear mixed model to many responses: genes, voxels, metrics, simulated draws.

    Rows are samples and columns are responses: the model is fitted to every column (a table with
    genes in its rows is to be transposed). Results are those of `fit`, response by response; what
    depends on the design alone is computed once for all.

    Args:
        formula: as for `fit`, without a left side: ``"~ age + (1 | subject)"``.
        data: the covariates, as for `fit`, n rows. Rows with a missing value in a column that the
            formula uses are dropped for all responses.
        responses: a dataframe (pandas, polars, pyarrow, ...), a column per response; an (n, B)
            array (NumPy, JAX, xarray, memory map, h5py, Zarr) or SciPy sparse matrix, made dense
            some columns at a time; an AnnData object, a response per variable (with its ``obs`` as
            `data`); `jaxreml.Images`; the path of a .parquet, .feather or .npy file, or of a folder
            of parquet or feather files that hold the rows in the order of their names; a data set
            of pyarrow; or an iterable of blocks, (names, (n, b) array) pairs or dataframes. Rows
            are those of `data`, NaN where a value is missing.
        method: "REML" or "ML".
        id: name of a column of `data` and of the responses by which rows are matched; their order
            may then differ. It may be the name of an index, or be so in one of the two with the
            other's index holding the same values. By position if left out; tables are refused then
            whose row labels differ, or whose labels are values of a column in another order.
        layer: of an AnnData object, the layer to fit; its X if left out.
        weights, offset: as for `fit`; or of each response's own, (n, B) in any form that
            `responses` may have, matched by name, or by position if one of the two has no names. A
            weight of zero, or a missing one, leaves the row out for the response, as a missing
            value does, and is counted in `n_missing`. With one grouping factor of up to four
            effects such responses go side by side, in designs of their own; others one by one.
        covariates: ``{"X": matrix}`` where every fit has a covariate of its own (a SNP, a voxel of
            another image): a term of the formula that is no column of the data, with its values as
            an (n, C) matrix in any form that `responses` may have. One response goes with all of
            them, and the results have their names. A constant one, or one that depends on the other
            columns of X, has status RANK_DEFICIENT.
        pairs: which of several responses go with which covariates: "all", "matched" (the k-th with
            the k-th), or a list of pairs of names or positions, as windows of genes and SNPs. The
            results are named ``response:covariate``.
        structure, context, max_iterations: as for `fit`.
        modes: keep the conditional modes of the random effects (`BatchResults.random_effects`);
            with `output` in the file, a list with a number per level for every effect.
        df: degrees of freedom of the tests, as for `LMMResults.test`; Kenward-Roger's come with
            adjusted standard errors.
        contrasts: linear functions of the fixed effects to test for every response, by name: each
            a row of p numbers, a dict from names of fixed effects to coefficients, or an expression
            such as ``"`group[T.b]` - `group[T.c]`"`` (`BatchResults.contrasts`).
        batch_size: responses to read, fit and write at a time; chosen by memory if left out.
        devices: JAX devices to share the responses between, or "cpu" or "gpu" for all of a kind;
            this process's if left out.
        engine: "numpy" or "jax" to force one, as for `fit`. If left out, NumPy works on the CPU for
            one grouping factor, in as many threads as there are cores, and for up to 32 responses
            of other designs (crossed factors, more than four effects), one after the other. JAX
            works for all else: for more responses of these, and for GPUs (JAX's default device is
            one, or `devices`).
        output: a .parquet file to write the results to, block by block, in bounded memory. A run
            that was interrupted goes on when it is started again with the same arguments: blocks
            fitted are kept in the folder ``<output>.parts`` until all are.
        overwrite: replace `output`, and do not go on from an interrupted run.
        progress: show a progress bar on stderr; if stderr is a terminal, if left out.
        kernels: known covariances of levels, as for `fit`. One kernel, alone, is decomposed once
            for all responses; a response that lacks values needs a decomposition for its rows,
            which responses with the same rows share. Several are fitted one response after the
            other.
        residual: a covariance of the residuals within subjects, as for `fit`, on NumPy: responses
            with up to four visits go side by side, and others one after the other.
        others: none; as for `fit`.

    With several processes (``jax.distributed.initialize`` called before), each fits its share;
    all call `fit_many` with the same arguments and get the same results. `output` is then on a
    filesystem that they share.

    Columns of X are made once, from all rows of the data: coefficients have one meaning for all
    responses. One that the rows of a response say nothing about, being outside the row space of X
    there, is NaN, and so is a contrast; what these rows do tell is given (of levels a, b, c the
    difference of b and c, where all of the reference level a is missing).

    Returns:
        The results, or, with `output`, where they are. Responses without an optimum have a
        ``status`` that says why, and `message` names what is not estimable.

    Raises:
        FormulaError: a formula outside the grammar, or with a left side; a contrast that is not one
            linear function.
        DataError: data or responses that the model cannot be fitted to, named; an output that
            exists; an interrupted run of another model or of other data; no device of that kind.
        ValueError: arguments out of range, such as another method or devices that are none, or a
            `layer` of what has no layers.
        RuntimeError, TypeError: as `fit`.

    Examples:
        Forty genes in samples of 18 people on ten days, a row per sample and a column per gene; the
        first five rise by 0.2 a day:

        >>> import numpy as np
        >>> import jaxreml
        >>> data = jaxreml.datasets.load("sleepstudy")[["Days", "Subject"]]
        >>> random = np.random.default_rng(0)
        >>> genes = random.normal(size=(180, 40)) + random.normal(size=(18, 40)).repeat(10, axis=0)
        >>> genes[:, :5] += 0.2 * data[["Days"]].to_numpy()
        >>> results = jaxreml.fit_many("~ Days + (1 | Subject)", data, genes)
        >>> results
        <BatchResults '~ Days + (1 | Subject)', REML, 40 responses, 0 without an ...
        >>> results.top_table("Days", 6)[["estimate", "std_error", "df", "p_adjusted"]].round(3)
            estimate  std_error     df  p_adjusted
        4      0.231      0.026  161.0       0.000
        2      0.192      0.023  161.0       0.000
        1      0.200      0.026  161.0       0.000
        3      0.196      0.027  161.0       0.000
        0      0.183      0.025  161.0       0.000
        17    -0.055      0.023  161.0       0.126

        One response with all that `fit` reports, and a contrast of the fixed effects:

        >>> results.estimate(0).report("Days")
        'b = 0.183, SE = 0.025, 95% CI [0.133, 0.233], t(161.0) = 7.23, p < .001'
        >>> week = {"a week": {"Days": 7}}
        >>> tested = jaxreml.fit_many(
        ...     "~ Days + (1 | Subject)", data, genes, df="kenward-roger", contrasts=week
        ... )
        >>> tested.contrasts["a week"][["estimate", "std_error", "df"]].round(3).head(2)
           estimate  std_error     df
        0     1.282      0.177  161.0
        1     1.403      0.185  161.0

        ``print(results.summary())`` says how it went; `BatchResults` lists what else there is.
    """
    refuse_arguments("fit_many", others)
    is_reml(method)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    path = None if output is None else check_output(output, overwrite)
    given = {"weights": weights, "offset": offset}
    own = {role: value for role, value in given.items() if of_each(value, data)}
    shared = {role: value for role, value in given.items() if role not in own}
    covariate, matrix = _only(covariates)
    if kernels is not None and (own or covariate is not None):
        raise ValueError(
            "with kernels responses share weights, offset and covariates: each with its own would "
            "need a decomposition of its own. Fit these one by one"
        )
    if residual is not None:
        _refuse_beside_residuals(own, covariate, output)
    if covariate is None:
        frame = covariate_frame(
            formula, data, context=context, kernels=kernels, residual=residual, **shared
        )
    else:
        frame = paired_frame(formula, data, covariate, context=context, **shared)
    require_plain(frame.terms, "fit many responses")
    rows = _contrast_rows(frame, contrasts or {})

    def beside(role: str, value: Any) -> Responses:
        return Responses(value, data, frame.rows, id, role=role)

    source: Companions | Pairs = Companions(
        Responses(responses, data, frame.rows, id, layer),
        frame.table,
        **{role: beside(role, value) for role, value in own.items()},
    )
    if covariate is not None:
        source = Pairs(source, beside("covariates", matrix), pairs)
    elif pairs is not None:
        raise ValueError("pairs are of responses and covariates: give covariates={name: matrix}")
    fitter = fitter_for(
        frame,
        method,
        own=source.weighted,
        covariate=covariate,
        structure=structure,
        modes=modes,
        df=df,
        contrasts=rows,
        max_iterations=max_iterations,
        devices=devices,
        engine=engine,
        count=None if source.names is None else len(source.names),
    )
    crew = Crew.present()
    template = fitter.fit(np.empty((len(frame.X), 0)))
    apart = (*own, *(() if covariate is None else ("covariate",)))
    model = _model(frame, fitter, contrasts or {}, apart)
    job = Job(fitter, source, model, template, crew)
    size = batch_size or block_size(frame, template, source, crew)
    total = None if source.names is None else len(source.names)
    with progress_of_fits(total, progress if crew.index == 0 else False) as advance:
        if path is not None:
            run = describe_run(
                frame,
                source.names,
                method,
                fitter.structure,
                max_iterations,
                size,
                (df, list(contrasts or {}), rows),
                modes,
            )
            return fit_to_file(job, size, Parts(path, run), overwrite, advance)
        names, fits = fit_in_memory(job, size, advance)

    def refit(i: int) -> LMMResults:
        measured = source.read(i, i + 1)
        name = _response_name(names[i], frame.formula.text)
        return _fit_alone(
            frame, name, measured, covariate, method, structure, context, max_iterations
        )

    def revisit(theta: np.ndarray) -> Iterator[tuple[np.ndarray, Any, Any]]:
        start = 0
        for own, read in source.blocks(size):
            places = slice(start, start := start + len(own))
            for columns, *found in fitter.estimates(**read().arguments, theta=theta[places]):
                yield places.start + columns, *found

    def values(start: int, stop: int) -> np.ndarray:
        return source.read(start, stop).values

    shown = None if covariate else frame
    if source.names is None:
        return BatchResults(job.model, names, fits, shown)
    return BatchResults(job.model, names, fits, shown, refit, revisit, values)


def _refuse_beside_residuals(own: Mapping[str, Any], covariate: str | None, output: Any) -> None:
    """ValueError for what batches with a covariance of residuals within subjects do not have."""
    asked = [*own, *(["covariates"] if covariate else []), *(["output"] if output else [])]
    if asked:
        raise ValueError(
            f"with residual= there is no {asked[0]}= of the responses' own, so far: they share "
            "weights, offset and covariates, and results stay in memory"
            if asked[0] != "output"
            else "with residual= results stay in memory, so far: leave output= out"
        )


def _only(covariates: Mapping[str, Any] | None) -> tuple[str | None, Any]:
    """Name and values of the covariate that the responses have their own of."""
    if covariates is None:
        return None, None
    if len(covariates) != 1:
        raise ValueError(f"covariates must be one name with its matrix, not {list(covariates)}")
    return next(iter(covariates.items()))


def _contrast_rows(frame: ModelFrame, contrasts: Mapping[str, Any]) -> np.ndarray:
    """The contrasts as rows, (k, p)."""
    rows = np.zeros((0, len(frame.fixed_names)))
    for name, contrast in contrasts.items():
        own, values, _ = hypotheses(frame.fixed_names, contrast)
        if len(own) != 1 or values.any():
            raise FormulaError(
                f"the contrast {name!r} must be one linear function of the fixed effects, without "
                "a right side"
            )
        if not own.any():
            raise FormulaError(f"the contrast {name!r} has no coefficient other than zero")
        rows = np.concatenate([rows, own])
    return rows


def _model(
    frame: ModelFrame, fitter: Any, contrasts: Mapping[str, Any], own: tuple[str, ...]
) -> BatchModel:
    return BatchModel(
        frame.formula.text,
        fitter.method,
        fitter.structure,
        frame.fixed_names,
        frame.aliased,
        tuple((term.name, term.effect_names) for term in frame.terms),
        tuple(term.levels for term in frame.terms),
        frame.n_dropped,
        fitter.df,
        tuple(map(str, contrasts)),
        fitter.engine_name,
        tuple(frame.fixed_terms),
        own,
        frame.library,
        frame.residual and ResidualCovariance.of_labels(frame.residual),
    )


def _response_name(name: Any, formula: str) -> str:
    """The name of a response if it can stand left of the formula, else one that can."""
    usable = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
    if usable and name not in formula:
        return name
    free = "response"
    while free in formula:
        free += "_"
    return free


def _fit_alone(
    frame: ModelFrame,
    name: str,
    measured: Measured,
    covariate: str | None,
    method: str,
    structure: str | None,
    context: Mapping[str, Any] | None,
    max_iterations: int,
) -> LMMResults:
    """`fit` of one response on the columns and rows of a frame."""
    y, weights, offset, x = (None if own is None else own[:, 0] for own in measured)
    assert y is not None
    if weights is not None:
        y = np.where(weights > 0, y, np.nan)
        weights = np.where(weights > 0, weights, 1.0)
    columns: Any = {} if covariate is None else {covariate: x}
    own = with_response(frame, name, y, context, weights=weights, offset=offset, columns=columns)
    result = fit_frame(own, method, structure, context, max_iterations, kind=LMMResults)
    _warn_of_coding(frame, result, ~np.isnan(y))
    return replace(result, n_dropped=result.n_dropped + frame.n_dropped)


def _warn_of_coding(frame: ModelFrame, result: LMMResults, kept: np.ndarray) -> None:
    """Warn where `fit` of the rows `kept` has coded them otherwise than `fit_many` had."""
    same = result.fixed_names == frame.fixed_names
    if kept.all() or (same and np.allclose(result.frame.X, frame.X[kept], rtol=1e-9, atol=1e-12)):
        return
    warnings.warn(
        "coded from the rows where the response is not missing, where other levels are the "
        "reference or functions of the data have other values: the coefficients, "
        f"{', '.join(result.fixed_names)}, are not those of `BatchResults.params`",
        stacklevel=4,
    )
