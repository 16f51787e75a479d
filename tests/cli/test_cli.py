"""The command line: output, streams, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import watchdog
from typer.testing import CliRunner

import jaxreml
from jaxreml.cli.commands import app

SLEEP = "Reaction ~ Days + (Days | Subject)"


pytestmark = pytest.mark.usefixtures("command_line")


def run(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def test_text():
    result = run("fit", "sleepstudy", SLEEP)
    assert result.exit_code == 0
    assert "REML criterion at convergence: 1743.6" in result.stdout
    assert result.stderr == ""


def test_ml_json_to_file(tmp_path):
    out = tmp_path / "fit.json"
    result = run("fit", "sleepstudy", SLEEP, "--ml", "--format", "json", "-o", str(out))
    assert (result.exit_code, result.stdout) == (0, "")
    record = json.loads(out.read_text())
    assert record["deviance"] == pytest.approx(1751.939344, abs=1e-5)
    assert record["fixed"][1]["term"] == "Days"
    assert record["variance_components"][-1]["group"] == "Residual"


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "parquet", "feather", "-"])
def test_files(tmp_path, kind):
    data = jaxreml.datasets.load("sleepstudy")
    path = tmp_path / f"data.{kind}"
    write = {
        "csv": data.to_csv,
        "csv.gz": data.to_csv,
        "tsv": lambda path, **_: data.to_csv(path, sep="\t", index=False),
        "parquet": data.to_parquet,
        "feather": lambda path, **_: data.to_feather(path),
    }
    text = None
    if kind == "-":
        path, text = "-", data.to_csv(index=False)
    else:
        write[kind](path, index=False)
    result = run("fit", str(path), SLEEP, "--format", "csv", input=text)
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(io.StringIO(result.stdout))
    assert table.loc[table["term"] == "Days", "estimate"].item() == pytest.approx(10.467286)


def test_tests_and_suffixes(tmp_path):
    """--df and --anova in every format; the output's suffix chooses it."""
    data = jaxreml.datasets.load("sleepstudy")
    fit = jaxreml.fit(SLEEP, data)
    options = ["--df", "kenward-roger"]
    for name in ("out.csv", "out.json", "out.txt"):
        result = run("fit", "sleepstudy", SLEEP, *options, "-o", str(tmp_path / name))
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    tidy = pd.read_csv(tmp_path / "out.csv").set_index("term")
    degrees = fit.coefficients("kenward-roger")["df"]["Days"]
    assert tidy.loc["Days", "df"] == pytest.approx(degrees)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["fixed"][1]["df"] == pytest.approx(degrees)
    assert (tmp_path / "out.txt").read_text() == fit.summary("kenward-roger")
    expected = fit.anova(df="kenward-roger")
    for format in ("text", "csv", "json"):
        result = run("fit", "sleepstudy", SLEEP, *options, "--anova", "--format", format)
        assert result.exit_code == 0, result.stderr
        if format == "text":
            assert result.stdout.startswith(fit.summary("kenward-roger"))
            assert "Analysis of variance, type III, df by kenward-roger" in result.stdout
            continue
        text = result.stdout
        rows = pd.read_csv(io.StringIO(text)) if format == "csv" else json.loads(text)["anova"]
        found = pd.DataFrame(rows).set_index("term")
        assert found.loc["Days", "statistic"] == pytest.approx(expected.loc["Days", "statistic"])


def test_text_files_of_other_dialects(tmp_path):
    """Separators by name or as they are, missing values, encodings, a byte order mark."""
    data = jaxreml.datasets.load("sleepstudy").rename(columns={"Days": "Tage_ä"})
    data.loc[3, "Tage_ä"] = np.nan
    formula = "Reaction ~ Tage_ä + (Tage_ä | Subject)"
    dialects = {
        "a.csv": (";", "latin-1", ["--sep", ";", "--encoding", "latin-1"]),
        "b.dat": ("\t", "utf-8", ["--sep", "tab"]),
        "c.txt": (" ", "utf-8-sig", ["--sep", r"\s+", "--encoding", "utf-8-sig"]),
    }
    for name, (sep, encoding, options) in dialects.items():
        data.to_csv(tmp_path / name, sep=sep, encoding=encoding, na_rep="?", index=False)
        result = run("fit", str(tmp_path / name), formula, *options, "--na-values", ".,?")
        assert result.exit_code == 0, (result.stderr, name)
        assert "1 rows with missing values dropped" in result.stderr
    result = run("fit", str(tmp_path / "a.csv"), formula, "--sep", ";")
    assert result.exit_code == 1
    assert "is not text in utf-8" in result.stderr and "--encoding" in result.stderr
    result = run("fit", str(tmp_path / "b.dat"), formula)
    assert result.exit_code == 1 and "with --sep any text file is read" in result.stderr


def test_help_has_examples_and_exit_codes():
    for command in ("fit", "fit-many"):
        text = run(command, "--help").stdout
        assert "Examples:\n    jaxreml " in text and "Exit codes:\n    0  fitted\n" in text


def test_no_device_exits_1():
    """One line where JAX_PLATFORMS asks for a platform that is not there; one fit needs none."""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    code = "from jaxreml.cli.commands import app; app()"
    command = [sys.executable, "-c", code]
    fit = [*command, "fit", "sleepstudy", SLEEP]
    process = subprocess.run(fit, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and "numpy" in process.stdout
    fit_many = [*command, "fit-many", "y.csv", "~ x + (1 | g)", "--data", "x.csv", "-o", "z.csv"]
    process = subprocess.run(fit_many, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("jaxreml: no GPU that JAX can use")


def test_singular_and_dropped_rows_go_to_stderr_unless_quiet(tmp_path):
    data = jaxreml.datasets.load("dyestuff2")
    data.loc[30] = ["A", np.nan]
    path = tmp_path / "data.csv"
    data.to_csv(path, index=False)
    result = run("fit", str(path), "Yield ~ 1 + (1 | Batch)")
    assert result.exit_code == 0
    assert "1 rows with missing values dropped" in result.stderr
    assert "singular" in result.stderr
    assert run("fit", str(path), "Yield ~ 1 + (1 | Batch)", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sleepstudies", SLEEP], "neither a file"),
        (["nowhere.csv", SLEEP], "no file"),
        (["sleepstudy", "Reaction ~ Dais + (1 | Subject)"], "did you mean 'Days'"),
        (["sleepstudy", "Reaction ~ Days"], "no random term"),
        (["EMPTY", SLEEP], "is empty"),
        (["TWICE", "a ~ 1 + (1 | b)"], "'a' occurs more than once"),
        (["BINARY", SLEEP], "jaxreml:"),
    ],
)
def test_errors_exit_1(tmp_path, arguments, message):
    files = {"EMPTY": b"", "TWICE": b"a,a,b\n1,2,3\n", "BINARY": bytes(range(256))}
    for name, content in files.items():
        (tmp_path / f"{name}.csv").write_bytes(content)
    if arguments[0] in files:
        arguments = [str(tmp_path / f"{arguments[0]}.csv"), *arguments[1:]]
    result = run("fit", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_usage_exits_2():
    assert run("fit", "sleepstudy").exit_code == 2
    assert run("fit", "sleepstudy", SLEEP, "--format", "xml").exit_code == 2
    refused = run("fit", "sleepstudy", SLEEP, "--ml", "--df", "kenward-roger")
    assert refused.exit_code == 2 and "defined for REML" in refused.stderr.replace("\n", " ")
    assert run("nosuch").exit_code == 2


def test_no_optimum_exits_3(monkeypatch):
    fit = jaxreml.fit
    monkeypatch.setattr(
        jaxreml, "fit", lambda *a, **k: fit(*a, **k, max_iterations=1), raising=False
    )
    result = run("fit", "sleepstudy", SLEEP)
    assert result.exit_code == 3
    assert "not converged" in result.stderr


def test_datasets_and_version():
    assert "insteval" in run("datasets").stdout
    assert jaxreml.__version__ in run("--version").stdout


def test_help_imports_no_jax():
    code = "import sys, jaxreml.cli; sys.exit('jax' in sys.modules or 'formulaic' in sys.modules)"
    watchdog.run(code, check=True)
