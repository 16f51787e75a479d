"""The command `fit-many`: files in, files out, streams, exit codes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import jaxreml
from jaxreml.cli.commands import app

FORMULA = "~ Days + (1 | Subject)"


pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with covariates and 10 responses, one of them constant, in every format."""
    folder = tmp_path_factory.mktemp("study")
    data = jaxreml.datasets.load("sleepstudy")
    data["row"] = np.arange(len(data))
    data["name"] = [f"s{k}" for k in range(len(data))]
    data.to_csv(folder / "data.csv", index=False)
    noise = np.random.default_rng(2).normal(size=(len(data), 10))
    values = data["Reaction"].to_numpy()[:, None] + 30 * noise
    values[:, 9] = 1.0
    table = pd.DataFrame(values, columns=[*(f"gene_{k}" for k in range(8)), "other", "flat"])
    table.insert(0, "row", data["row"])
    table = table.iloc[::-1]
    table.to_csv(folder / "values.csv", index=False)
    table.to_csv(folder / "values.tsv", index=False, sep="\t")
    table.to_csv(folder / "values.csv.gz", index=False)
    table.to_parquet(folder / "values.parquet", index=False)
    table.reset_index(drop=True).to_feather(folder / "values.feather")
    table.assign(sex="m").to_csv(folder / "text.csv", index=False)
    labelled = table.drop(columns="row").set_axis(data["name"][::-1].rename(None))
    labelled.to_csv(folder / "labelled.csv")  # an unnamed first column
    labelled.T.to_csv(folder / "turned.csv")
    german = labelled.rename_axis("name").replace(values[5, 3], np.nan)
    german.rename(columns={"other": "größe"}).to_csv(
        folder / "german.txt", sep=";", encoding="latin-1", na_rep="-99"
    )
    np.save(folder / "values.npy", values)
    return folder


@pytest.fixture(scope="module")
def expected(study):
    """What Python gives for it."""
    import jax

    data = pd.read_csv(study / "data.csv")
    with jax.enable_x64(True):
        return jaxreml.fit_many(FORMULA, data, pd.read_csv(study / "values.csv"), id="row")


def run(study, responses, *arguments, formula=FORMULA):
    command = ["fit-many", str(study / responses), formula, "--data", str(study / "data.csv")]
    return CliRunner().invoke(app, [*command, *map(str, arguments)])


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "parquet", "feather", "npy"])
def test_files(study, tmp_path, expected, suffix):
    out = tmp_path / "out.parquet"
    match = [] if suffix == "npy" else ["--id", "row"]
    result = run(study, f"values.{suffix}", *match, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "jaxreml: 10 responses in " in result.stderr
    assert " s, 1 without an optimum\njaxreml: 1: " in result.stderr
    found = jaxreml.BatchResults.read_parquet(out)
    np.testing.assert_allclose(found.fits.beta, expected.fits.beta, rtol=1e-9)
    names = list(range(10)) if suffix == "npy" else expected.responses.tolist()
    assert found.responses.tolist() == names


def test_row_names_serve_as_ids(study, tmp_path, expected):
    """R and pandas write them as a first column without a name."""
    out = tmp_path / "out.parquet"
    assert run(study, "labelled.csv", "--id", "name", "-o", out).exit_code == 0
    found = jaxreml.BatchResults.read_parquet(out)
    np.testing.assert_allclose(found.fits.beta, expected.fits.beta, rtol=1e-9)


def test_text_of_any_kind_tests_and_failures(study, tmp_path):
    """Separators, missing values and encodings; df, contrasts; failed responses by name."""
    out = tmp_path / "out.csv"
    jaxreml.datasets.load("sleepstudy").assign(name=[f"s{k}" for k in range(180)]).to_csv(
        tmp_path / "data.csv", sep=";", index=False
    )
    command = ["fit-many", study / "german.txt", FORMULA, "--data", tmp_path / "data.csv"]
    options = ["--sep", ";", "--na-values", "-99,.", "--encoding", "latin-1", "--id", "name"]
    tests = ["--df", "kenward-roger", "--contrasts", "a week: 7 * Days; `(Intercept)` + Days"]
    result = CliRunner().invoke(app, [*map(str, [*command, *options, *tests, "-o", out])])
    assert result.exit_code == 0, result.stderr
    assert re.search(r"jaxreml: 1: the response is constant.* \(flat\)$", result.stderr, re.M)
    tidy = pd.read_csv(out).set_index(["response", "term"])
    assert "größe" in tidy.index.get_level_values(0)
    week, day = tidy.loc[("gene_3", "a week")], tidy.loc[("gene_3", "Days")]
    for name, factor in {"estimate": 7, "std_error": 7, "p_value": 1, "p_adjusted": 1}.items():
        assert week[name] == pytest.approx(factor * day[name])
    assert ("gene_0", "`(Intercept)` + Days") in tidy.index
    data = pd.read_csv(study / "data.csv")
    values = pd.read_csv(study / "values.csv").sort_values("row").reset_index()["gene_3"]
    values[5] = np.nan
    single = jaxreml.fit(f"y {FORMULA}", data.assign(y=values))
    expected = single.coefficients("kenward-roger").loc["Days"]
    assert day["df"] == pytest.approx(expected["df"], rel=1e-6)
    assert day["p_value"] == pytest.approx(expected["p_value"], rel=1e-5)
    for wrong, message in ((["--sep", ";"], "--encoding"), (["--encoding", "klingon"], "klingon")):
        arguments = [*command, *wrong, "-o", tmp_path / "o.csv"]
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 1 and message in result.stderr


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_pattern_ml_and_tidy_csv(study, tmp_path, kind):
    out = tmp_path / "out.csv"
    options = ["--id", "row", "--responses", "gene_[0-2]", "--ml", "--batch-size", "2", "--quiet"]
    result = run(study, f"values.{kind}", *options, "-o", out)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    tidy = pd.read_csv(out)
    assert set(tidy["response"]) == {"gene_0", "gene_1", "gene_2"}
    data = pd.read_csv(study / "data.csv")
    values = pd.read_csv(study / "values.csv").sort_values("row").reset_index()
    alone = jaxreml.fit(f"y {FORMULA}", data.assign(y=values["gene_1"]), "ML")
    row = (tidy["response"] == "gene_1") & (tidy["term"] == "Days")
    assert tidy.loc[row, "estimate"].item() == pytest.approx(alone.params["Days"], rel=1e-7)


def test_weights_and_dropped_rows(study, tmp_path):
    data = pd.read_csv(study / "data.csv")
    data["w"] = np.linspace(1, 2, len(data))
    data["twice"] = 2 * data["Days"]
    data.loc[3, ["Days", "twice"]] = np.nan
    data.to_csv(tmp_path / "data.csv", index=False)
    command = ["fit-many", str(study / "values.npy"), "~ Days + twice + (1 | Subject)"]
    options = ["--data", tmp_path / "data.csv", "--weights", "w", "-o", tmp_path / "out.parquet"]
    result = CliRunner().invoke(app, [*command, *map(str, options)])
    assert result.exit_code == 0, result.stderr
    assert "1 rows with missing values dropped" in result.stderr
    assert "dependent columns dropped: twice" in result.stderr


@pytest.mark.parametrize(
    ("allowed", "code"), [("0.1", 0), ("0.09", 3), ("0", 3), ("1", 0), ("2", 0)]
)
def test_too_many_failures_exit_3(study, tmp_path, allowed, code):
    out = tmp_path / "out.parquet"
    result = run(study, "values.npy", "-o", out, "--max-failures", allowed, "--quiet")
    assert result.exit_code == code
    assert out.exists()
    message = f"1 of 10 responses have no optimum, more than --max-failures {allowed} allows"
    assert (message in result.stderr) == (code == 3)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_output_is_not_replaced_unasked(study, tmp_path, monkeypatch, suffix):
    out = tmp_path / f"out.{suffix}"
    out.write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr(pd, "read_csv", None)  # no work is done before it is refused
        result = run(study, "values.npy", "-o", out)
    assert result.exit_code == 1
    assert "exists; give --overwrite or another name" in result.stderr
    assert out.read_text() == "precious"
    assert run(study, "values.npy", "-o", out, "--overwrite").exit_code == 0
    assert out.read_bytes()[:8] != b"precious"


@pytest.mark.parametrize(
    ("responses", "options", "message"),
    [
        ("nowhere.csv", [], "there is no file"),
        ("values.csv", ["--responses", "gne_*"], "no response matches the pattern 'gne_*'; the"),
        ("values.parquet", ["--responses", "gne_*"], "the columns are: row, gene_0"),
        ("values.npy", ["--responses", "gene_*"], "a .npy file has no names"),
        ("values.npy", ["--id", "row"], "needs responses in a dataframe"),
        ("values.csv", ["--id", "raw"], "did you mean 'row'"),
        ("text.csv", ["--responses", "s*"], "not numeric: 'sex' ("),
        ("values.npy", ["--weights", "w"], "'w' is not a column"),
        ("values.npy", ["--device", "gpu"], "no GPU that JAX can use: install"),
        ("values.csv", [], "'row' of the data and of the responses .*: pass --id 'row'"),
        ("labelled.csv", [], "values of the column 'name' of the data.*: pass --id 'name'"),
        ("turned.csv", [], "labels of rows: the column 'name' of the data.* transpose them"),
        ("values.npy", ["--contrasts", "a: "], "--contrasts 'a:': write NAME: EXPRESSION"),
        ("values.npy", ["--contrasts", "a: Days; a: Days"], "two are called 'a'"),
        ("values.npy", ["--contrasts", "Dais"], "'Dais' is not a hypothesis about"),
    ],
)
def test_errors_exit_1(study, tmp_path, responses, options, message):
    result = run(study, responses, *options, "-o", tmp_path / "out.parquet")
    assert result.exit_code == 1, result.stderr
    assert message in result.stderr or (".*" in message and re.search(message, result.stderr))
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not list(tmp_path.glob("out.parquet*"))


def test_left_side_exits_1(study, tmp_path):
    result = run(study, "values.npy", "-o", tmp_path / "o.parquet", formula=f"gene_1 {FORMULA}")
    assert result.exit_code == 1
    assert "start the formula with ~" in result.stderr


def test_usage_exits_2(study, tmp_path):
    assert run(study, "values.npy").exit_code == 2  # no output
    for options in (
        ["-o", tmp_path / "out.txt"],
        ["-o", tmp_path / "out.csv", "--batch-size", "0"],
        ["-o", tmp_path / "out.csv", "--device", "tpu"],
        ["-o", tmp_path / "out.csv", "--max-failures", "-1"],
        ["-o", tmp_path / "out.csv", "--ml", "--df", "kenward-roger"],
    ):
        assert run(study, "values.npy", *options).exit_code == 2
    missing = CliRunner().invoke(app, ["fit-many", "values.npy", FORMULA, "-o", "out.csv"])
    assert missing.exit_code == 2
    assert "--data" in missing.stderr


def test_interrupted_command_goes_on(study, tmp_path, monkeypatch):
    from jaxreml.many.engine import BatchFitter

    out = tmp_path / "out.parquet"
    fit, sizes = BatchFitter.fit, []

    def interrupted(self, values):
        if sizes:
            raise OSError("the disk is gone")
        return recorded(self, values)

    def recorded(self, values):
        if values.shape[1]:  # without columns it gives the layout of the table
            sizes.append(values.shape[1])
        return fit(self, values)

    monkeypatch.setattr(BatchFitter, "fit", interrupted)
    arguments = "values.parquet", "--id", "row", "--batch-size", "4", "-o", out
    first = run(study, *arguments)
    assert (first.exit_code, out.exists()) == (1, False)
    assert "the disk is gone" in first.stderr
    monkeypatch.setattr(BatchFitter, "fit", recorded)
    assert run(study, *arguments).exit_code == 0
    assert sizes == [4, 4, 2]
