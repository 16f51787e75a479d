"""The command line: `jaxreml fit DATA "FORMULA"`, `jaxreml fit-many RESPONSES "FORMULA"`.

Results go to stdout or a file, everything else to stderr. Exit codes: 0 fitted, 1 data or numerical
error, 2 usage, 3 fitted without an optimum (`fit-many`: too many responses without). JAX, pandas
and formulaic are imported inside the commands, so that help and usage errors are instant.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jaxreml
from jaxreml.cli.tables import Dialect, read_responses, read_table

if TYPE_CHECKING:
    from jaxreml.results.results import LMMResults
    from jaxreml.results.streamed import StreamedResults

DATA_ERROR, NOT_CONVERGED = 1, 3

app = typer.Typer(
    name="jaxreml",
    help="Linear mixed models by REML and ML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """How results are written."""

    text = "text"
    json = "json"
    csv = "csv"


class Df(StrEnum):
    """Degrees of freedom of tests."""

    satterthwaite = "satterthwaite"
    kenward_roger = "kenward-roger"
    kenward_roger_sas = "kenward-roger-sas"
    kenward_roger_linear = "kenward-roger-linear"
    between_within = "between-within"
    residual = "residual"
    inf = "inf"


class Device(StrEnum):
    """What computes."""

    cpu = "cpu"
    gpu = "gpu"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"jaxreml {jaxreml.__version__}")
        raise typer.Exit


# Options of both commands
Ml = Annotated[bool, typer.Option("--ml", help="Maximum likelihood instead of REML.")]
Weights = Annotated[str | None, typer.Option(help="Column of prior weights, as in lme4.")]
Degrees = Annotated[
    Df, typer.Option("--df", help="Degrees of freedom of tests of fixed effects and contrasts.")
]
Sep = Annotated[
    str | None,
    typer.Option(
        help="What separates the columns of text files, such as ';'. "
        "[default: , in .csv, a tabulator in .tsv]"
    ),
]
NaValues = Annotated[
    list[str] | None,
    typer.Option(
        "--na-values",
        help="Text that stands for a missing value, besides the empty field, NA and NaN; "
        "several separated by commas.",
    ),
]
Encoding = Annotated[str, typer.Option(help="Of text files, such as latin-1.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No messages on stderr.")]
EXIT_CODES = """\b
Exit codes:
  0  fitted
  1  data that cannot be fitted, a file that cannot be read, no such device
  2  usage
  3  fitted without an optimum (fit-many: more than --max-failures)
"""


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Linear mixed models by REML and ML."""


@app.command(
    epilog=EXIT_CODES,
    help="""Fit a model to data and print its summary.

\b
Examples:
  jaxreml fit sleepstudy "Reaction ~ Days + (Days | Subject)"
  jaxreml fit study.csv "y ~ arm * week + (week | patient)" --anova --df kenward-roger
  jaxreml fit study.csv "y ~ arm + (1 | patient)" --sep ";" --na-values . -o fit.csv
""",
)
def fit(
    data: Annotated[
        str,
        typer.Argument(
            help="A bundled data set's name (see `jaxreml datasets`), a .csv, .tsv, .parquet or "
            ".feather file (.csv and .tsv may be compressed), or - for CSV on stdin.",
        ),
    ],
    formula: Annotated[str, typer.Argument(help='For example "y ~ x + (x | group)".')],
    ml: Ml = False,
    weights: Weights = None,
    residual: Annotated[
        list[str] | None,
        typer.Option(
            help='Covariance of the residuals within subjects, such as "us(visit | subject)"; '
            "given again, another to try if that cannot be estimated."
        ),
    ] = None,
    df: Degrees = Df.satterthwaite,
    anova: Annotated[
        bool, typer.Option("--anova", help="F tests of the terms too, of type III.")
    ] = False,
    sep: Sep = None,
    na_values: NaValues = None,
    encoding: Encoding = "utf-8",
    layout: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Summary, or tidy estimates (with --anova as csv: the tests of the terms alone). "
            "[default: by the output's suffix, else text]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write there (.csv, .json, .txt), not to stdout."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model to data and print its summary."""
    if layout is None:
        suffix = "" if output is None else output.suffix[1:]
        layout = Format(suffix) if suffix in ("csv", "json") else Format.text
    method = _method(ml, df)
    gc.disable()  # costs a tenth of a run and finds nothing
    with _errors_as_exits():
        table = read_table(data, Dialect.of(sep, na_values, encoding))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = residual[0] if residual and len(residual) == 1 else residual or None
            result = jaxreml.fit(formula, table, method, weights=weights, residual=own)
        text = _render(result, layout, df.value, anova)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text, encoding="utf-8")
    if not quiet:
        _report_drops(result.n_dropped, result.aliased)
    if not result.converged:
        typer.echo(f"jaxreml: not converged: {result.message}", err=True)
        raise typer.Exit(NOT_CONVERGED)
    if result.is_singular and not quiet:
        typer.echo(f"jaxreml: {result.message}", err=True)


@app.command(
    "fit-many",
    epilog=EXIT_CODES,
    help="""Fit one model to many responses and write a table of results.

\b
Examples:
  jaxreml fit-many genes.parquet "~ age + (1 | donor)" --data donors.csv --id sample \\
      -o fits.parquet
  jaxreml fit-many genes.csv "~ arm + (1 | donor)" --data donors.csv --responses "gene_*" \\
      --df kenward-roger --contrasts "b-c: `arm[T.b]` - `arm[T.c]`" -o fits.csv
""",
)
def fit_many(
    responses: Annotated[
        str,
        typer.Argument(
            help="Table with a column per response: .csv, .tsv, .parquet, .feather or .npy. "
            ".parquet and .npy are read bit by bit and may be larger than memory.",
        ),
    ],
    formula: Annotated[str, typer.Argument(help='Without a left side: "~ x + (x | group)".')],
    data: Annotated[
        str, typer.Option(help="Covariates, a row per row of RESPONSES: as DATA of `fit`.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help=".parquet: a row per response; an interrupted run goes on when started again. "
            ".csv: tidy estimates, a row per response and term. Both have p-values as they are "
            "and adjusted over the responses (Benjamini and Hochberg).",
        ),
    ],
    id: Annotated[
        str | None,
        typer.Option(
            help="Column of both tables that matches rows; row names, a first column without a "
            "name, serve in one of them. [default: by position]"
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--responses", help='Glob for the columns to fit, such as "gene_*". [default: all]'
        ),
    ] = None,
    ml: Ml = False,
    weights: Weights = None,
    df: Degrees = Df.satterthwaite,
    contrasts: Annotated[
        list[str] | None,
        typer.Option(
            "--contrasts",
            help="Linear functions of the fixed effects to test: NAME: EXPRESSION, several "
            "separated by ; or the option repeated. Names of fixed effects that are not plain "
            'words stand in backticks: "b-c: `arm[T.b]` - `arm[T.c]`; slope: 2 * age".',
        ),
    ] = None,
    sep: Sep = None,
    na_values: NaValues = None,
    encoding: Encoding = "utf-8",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Responses at a time. [default: by memory]")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="[default: JAX's choice]")] = None,
    max_failures: Annotated[
        float,
        typer.Option(
            min=0,
            help="Responses without an optimum above which the exit code is 3: a share if below "
            "1, else a count.",
        ),
    ] = 0.1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output; start anew.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fit one model to many responses and write a table of results."""
    if output.suffix not in (".parquet", ".csv"):
        raise typer.BadParameter("the output must end in .parquet or .csv", param_hint="--output")
    method = _method(ml, df)
    if device is not None:  # read when JAX is imported
        os.environ["JAX_PLATFORMS"] = "cuda" if device is Device.gpu else "cpu"
    from jaxreml.backend.compilation import enable_compilation_cache
    from jaxreml.backend.devices import has_accelerator, local_devices
    from jaxreml.backend.lazy import when_imported
    from jaxreml.errors import DataError

    started = time.perf_counter()
    with _errors_as_exits():
        if output.exists() and not overwrite:
            raise DataError(f"{str(output)!r} exists; give --overwrite or another name")
        if has_accelerator():
            local_devices("gpu" if device is Device.gpu else None)
        when_imported(enable_compilation_cache)
        dialect = Dialect.of(sep, na_values, encoding)
        table = read_table(data, dialect, labelled=True)
        source = read_responses(responses, id, pattern, dialect)
        options: dict[str, Any] = {"id": id, "weights": weights, "batch_size": batch_size}
        options |= {"df": df.value, "contrasts": _contrasts(contrasts or [])}
        options["progress"] = False if quiet else None
        written = _fit_to_file((formula, table, source, method), output, overwrite, options)
    if not quiet:
        _report_drops(written.model.n_dropped, written.model.aliased)
        _report_failures(written, time.perf_counter() - started)
    failed, count = written.n_failed, written.n_responses
    if failed > (max_failures * count if max_failures < 1 else max_failures):
        typer.echo(
            f"jaxreml: {failed} of {count} responses have no optimum, more than --max-failures "
            f"{max_failures:g} allows",
            err=True,
        )
        raise typer.Exit(NOT_CONVERGED)


@app.command()
def datasets() -> None:
    """List the bundled data sets and their textbook models."""
    from jaxreml.datasets import SOURCES

    width = max(map(len, SOURCES))
    for name, source in SOURCES.items():
        typer.echo(f"{name.ljust(width)}  {source.formula}")


def _method(ml: bool, df: Df) -> str:
    """REML or ML; a usage error if the degrees of freedom are not for it."""
    from jaxreml.arguments import check_df

    method = "ML" if ml else "REML"
    try:
        check_df(df.value, method)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--df") from None
    return method


@contextmanager
def _errors_as_exits() -> Iterator[None]:
    """One line on stderr and an exit code for what is wrong with data, files or devices."""
    from jaxreml.errors import JaxremlError

    try:
        yield
    except (JaxremlError, OSError, UnicodeDecodeError) as error:
        text = re.sub(r'\bid="([^"]*)"', r"--id '\1'", str(error)).replace("(id=...)", "(--id)")
        typer.echo(f"jaxreml: {text}", err=True)
        raise typer.Exit(DATA_ERROR) from None


def _contrasts(texts: list[str]) -> dict[str, str]:
    """Contrasts by name; one without a name is called by its expression.

    A ; or : between backticks belongs to a name of a fixed effect.
    """
    from jaxreml.errors import DataError

    outside = r"(?=(?:[^`]*`[^`]*`)*[^`]*$)"
    found: dict[str, str] = {}
    for text in [part for given in texts for part in re.split(f";{outside}", given)]:
        if not text.strip():
            continue
        parts = [part.strip() for part in re.split(f":{outside}", text, maxsplit=1)]
        if not all(parts):
            raise DataError(f"--contrasts {text.strip()!r}: write NAME: EXPRESSION")
        if parts[0] in found:
            raise DataError(f"--contrasts: two are called {parts[0]!r}")
        found[parts[0]] = parts[-1]
    return found


def _fit_to_file(
    arguments: tuple[Any, ...], output: Path, overwrite: bool, options: dict[str, Any]
) -> StreamedResults:
    """`fit_many` with its results in a file, as parquet or as tidy CSV."""
    from jaxreml.results.streamed import StreamedResults, first_failed, frequent_failures

    if output.suffix == ".parquet":
        return jaxreml.fit_many(*arguments, output=output, overwrite=overwrite, **options)
    results = jaxreml.fit_many(*arguments, output=None, **options)
    effects = ("fixed", "contrasts", "ran_pars") if results.model.contrasts else None
    frame = results.tidy(effects or ("fixed", "ran_pars"), output="pandas")
    frame.to_csv(output, index=False)
    status = results.fits.status
    failures = frequent_failures(status), first_failed(results.responses, status)
    return StreamedResults(output, results.model, len(results), *failures)


def _report_failures(written: StreamedResults, seconds: float) -> None:
    typer.echo(
        f"jaxreml: {written.n_responses} responses in {seconds:.1f} s, {written.n_failed} without "
        "an optimum",
        err=True,
    )
    for reason, times in written.failures.items():
        names = written.failed[reason]
        some = [*map(str, names), *["..."] * (times > len(names))]
        typer.echo(f"jaxreml: {times}: {reason} ({', '.join(some)})", err=True)


def _report_drops(rows: int, columns: tuple[str, ...]) -> None:
    if rows:
        typer.echo(f"jaxreml: {rows} rows with missing values dropped", err=True)
    if columns:
        typer.echo(f"jaxreml: dependent columns dropped: {', '.join(columns)}", err=True)


def _render(result: LMMResults, layout: Format, df: str, anova: bool) -> str:
    tests = result.anova(df=df) if anova else None
    if layout is Format.text:
        text = result.summary(df)
        if tests is not None:
            text += f"\nAnalysis of variance, type III, df by {df}:\n{tests.to_string()}\n"
        return text
    if layout is Format.csv:
        if tests is not None:
            return tests.rename_axis("term").to_csv()
        return result.tidy(conf_int=True, df=df).to_csv(index=False)
    import json

    from jaxreml.results.storage import json_ready

    record = {
        "formula": result.formula,
        "method": result.method,
        **result.glance().iloc[0].to_dict(),
        "ngroups": result.ngroups,
        "message": result.message,
        "aliased": list(result.aliased),
        "fixed": result.tidy("fixed", conf_int=True, df=df).to_dict("records"),
        "variance_components": result.variance_components.to_dict("records"),
        "correlations": result.correlations.to_dict("records"),
    }
    if tests is not None:
        record["anova"] = tests.rename_axis("term").reset_index().to_dict("records")
    return json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n"
