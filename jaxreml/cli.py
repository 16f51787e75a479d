"""The command line: `jaxreml fit DATA "FORMULA"`, `jaxreml fit-many RESPONSES "FORMULA"`.

Results go to stdout or a file, everything else to stderr. Exit codes: 0 fitted, 1 data or numerical
error, 2 usage, 3 fitted without an optimum (`fit-many`: too many responses without). JAX, pandas
and formulaic are imported inside the commands, so that help and usage errors are instant.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jaxreml

if TYPE_CHECKING:
    import pandas as pd

    from jaxreml.results import LMMResults

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
Quiet = Annotated[bool, typer.Option("--quiet", help="No messages on stderr.")]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Linear mixed models by REML and ML."""


@app.command()
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
    format: Annotated[Format, typer.Option(help="Summary, or tidy estimates.")] = Format.text,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write there instead of to stdout.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model to data and print its summary."""
    _favour_start()
    from jaxreml.cache import enable_compilation_cache
    from jaxreml.errors import JaxremlError

    try:
        table = _read(data)
        enable_compilation_cache()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = jaxreml.fit(formula, table, "ML" if ml else "REML", weights=weights)
        text = _render(result, format)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text, encoding="utf-8")
    except (JaxremlError, OSError, UnicodeDecodeError) as error:
        typer.echo(f"jaxreml: {error}", err=True)
        raise typer.Exit(DATA_ERROR) from None
    if not quiet:
        _report_drops(result.n_dropped, result.aliased)
    if not result.converged:
        typer.echo(f"jaxreml: not converged: {result.message}", err=True)
        raise typer.Exit(NOT_CONVERGED)
    if result.is_singular and not quiet:
        typer.echo(f"jaxreml: {result.message}", err=True)


@app.command("fit-many")
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
            ".csv: tidy estimates.",
        ),
    ],
    id: Annotated[
        str | None,
        typer.Option(help="Column of both tables that matches rows. [default: by position]"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--responses", help='Glob for the columns to fit, such as "gene_*". [default: all]'
        ),
    ] = None,
    ml: Ml = False,
    weights: Weights = None,
    batch: Annotated[
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
    if device is not None:  # read when JAX is imported
        os.environ["JAX_PLATFORMS"] = "cuda" if device is Device.gpu else "cpu"
    from jaxreml.cache import enable_compilation_cache
    from jaxreml.errors import DataError, JaxremlError
    from jaxreml.parts import count_failures

    started = time.perf_counter()
    try:
        if output.exists() and not overwrite:
            raise DataError(f"{str(output)!r} exists; give --overwrite or another name")
        _require_device(device)
        table = _read(data)
        source = _read_responses(responses, id, pattern)
        enable_compilation_cache()
        options: dict[str, Any] = {"id": id, "weights": weights, "batch_size": batch}
        options["progress"] = False if quiet else None
        if output.suffix == ".parquet":
            options |= {"output": output, "overwrite": overwrite}
        result = jaxreml.fit_many(formula, table, source, "ML" if ml else "REML", **options)
        if output.suffix == ".parquet":
            count, failures = result.n_responses, result.failures
        else:
            count, failures = len(result), count_failures(result.fits.status)
            result.tidy().to_csv(output, index=False)
    except (JaxremlError, OSError, UnicodeDecodeError) as error:
        typer.echo(f"jaxreml: {error}", err=True)
        raise typer.Exit(DATA_ERROR) from None
    failed = sum(failures.values())
    if not quiet:
        _report_drops(result.model.n_dropped, result.model.aliased)
        seconds = time.perf_counter() - started
        typer.echo(
            f"jaxreml: {count} responses in {seconds:.1f} s, {failed} without an optimum", err=True
        )
        for reason, times in failures.items():
            typer.echo(f"jaxreml: {times}: {reason}", err=True)
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


def _favour_start() -> None:
    """Settings for a process that fits once, where starting and compiling are most of the time.

    Garbage collection costs a tenth of a warm run and finds nothing. LLVM without optimisation
    compiles in three quarters of the time; 100,000 groups then take 0.45 s instead of 0.3 s.
    """
    gc.disable()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()


def _report_drops(rows: int, columns: tuple[str, ...]) -> None:
    if rows:
        typer.echo(f"jaxreml: {rows} rows with missing values dropped", err=True)
    if columns:
        typer.echo(f"jaxreml: dependent columns dropped: {', '.join(columns)}", err=True)


def _require_device(device: Device | None) -> None:
    """DataError if JAX cannot compute on the device asked for."""
    if device is not Device.gpu:
        return
    import jax

    from jaxreml.errors import DataError

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise DataError(
            "--device gpu: JAX finds no GPU. Install JAX for it (pip install 'jax[cuda12]'), or "
            f"use --device cpu. JAX says: {error}"
        ) from None


def _read_responses(responses: str, id: str | None, pattern: str | None) -> Any:
    """What `fit_many` takes for the argument RESPONSES; files that can stay on disk do."""
    from jaxreml.errors import DataError
    from jaxreml.sources import Parquet, matching

    path = Path(responses)
    if not path.is_file():
        raise DataError(f"there is no file {responses!r}")
    if path.suffix == ".npy":
        if pattern is not None:
            raise DataError("--responses chooses columns by name, and a .npy file has no names")
        return path
    if path.suffix == ".parquet":
        return Parquet(path, id, pattern)
    table = _read(responses)
    names = matching([name for name in table.columns if name != id], pattern)
    return table[names if id is None or id not in table else [id, *names]]


def _read(data: str) -> pd.DataFrame:
    """The table behind the argument DATA."""
    import pandas as pd

    from jaxreml.datasets import load, names
    from jaxreml.errors import DataError

    if data in names() and not Path(data).exists():
        return load(data)
    path = Path(data)
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".xz", ".bz2")), "")
    readers: dict[str, Any] = {
        ".csv": pd.read_csv,
        ".tsv": lambda source: pd.read_csv(source, sep="\t"),
        ".parquet": pd.read_parquet,
        ".feather": pd.read_feather,
    }
    if data != "-" and suffix not in readers:
        raise DataError(
            f"{data!r} is neither a file ending in {', '.join(readers)} nor a bundled data set "
            f"({', '.join(names())})"
        )
    if data != "-" and not path.is_file():
        raise DataError(f"there is no file {data!r}")
    try:
        table = pd.read_csv(sys.stdin) if data == "-" else readers[suffix](path)
        if suffix in (".csv", ".tsv", "") and data != "-":
            _refuse_repeated_header(path, "\t" if suffix == ".tsv" else ",")
    except pd.errors.EmptyDataError:
        raise DataError(f"{data!r} is empty") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{data!r} cannot be read: {error}") from None
    except ImportError:
        raise DataError(
            f"reading {suffix} files needs pyarrow: pip install 'jaxreml[arrow]'"
        ) from None
    except ValueError as error:
        raise DataError(f"{data!r} cannot be read: {error}") from None
    return table


def _refuse_repeated_header(path: Path, separator: str) -> None:
    """pandas renames repeated columns silently (x, x.1); a formula would take the first."""
    import pandas as pd

    from jaxreml.errors import DataError

    header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
    repeated = header[header.duplicated()].dropna()
    if len(repeated):
        raise DataError(f"column {repeated.iloc[0]!r} occurs more than once in {str(path)!r}")


def _render(result: LMMResults, format: Format) -> str:
    if format is Format.text:
        return result.summary()
    if format is Format.csv:
        return result.tidy(conf_int=True).to_csv(index=False)
    import json

    from jaxreml.storage import json_ready

    record = {
        "formula": result.formula,
        "method": result.method,
        **result.glance().iloc[0].to_dict(),
        "ngroups": result.ngroups,
        "message": result.message,
        "aliased": list(result.aliased),
        "fixed": result.tidy("fixed", conf_int=True).to_dict("records"),
        "variance_components": result.variance_components.to_dict("records"),
        "correlations": result.correlations.to_dict("records"),
    }
    return json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n"
