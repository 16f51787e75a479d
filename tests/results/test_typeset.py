"""Tables in LaTeX, HTML and Markdown, each read back by a strict reader of its language."""

# ruff: noqa: RUF001 (true minus signs and Greek letters are what is tested)

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import jaxreml
from jaxreml.typeset import numbers, writers
from jaxreml.typeset.content import Column, Section, Spanner
from jaxreml.typeset.table import Table

SPECIAL = r"""a_b & 50% $x$ #1 {y} ~z^2 \n | <b> "q" 'r' `s` [t](u) *v* -- &amp; μ ≤"""
TEXT = st.text(st.sampled_from(list("\\{}&%$#_~^<>|\"'`[]()*-!; aμσ²−×∞ ")), max_size=20)


def table(cells=(SPECIAL, "1.0")):
    rows = [list(cells), ["[0, 1]", "2"], ["*", "3"]]
    heads = (Column(SPECIAL, align="l"), Column("p", symbol=True))
    return Table(
        heads, (Section("", rows), Section(SPECIAL, rows)), (Spanner(SPECIAL, 1, 2),),
        SPECIAL, "tab:a_b", (SPECIAL,),
    )  # fmt: skip


# LaTeX

COMMANDS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textbar{}": "|", r"\textasciigrave{}": "`", r"{\char34}": '"', "-{}": "-",
    r"\{": "{", r"\}": "}", r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_",
}  # fmt: skip
SYMBOLS = {"<": "<", ">": ">", "-": "−", r"\mu": "μ", r"\sigma": "σ", "^2": "²",
           r"\times": "×", r"\infty": "∞"}  # fmt: skip


def read_latex(text: str) -> str:
    """Text as LaTeX reads it; AssertionError at a character that it takes for something else."""
    found, k = "", 0
    while k < len(text):
        command = next((own for own in COMMANDS if text.startswith(own, k)), None)
        if command is not None:
            found, k = found + COMMANDS[command], k + len(command)
        elif text[k] == "$":
            end = text.index("$", k + 1)
            rest = text[k + 1 : end]
            assert rest, "$$ begins a display"
            while rest:
                symbol = next(own for own in SYMBOLS if rest.startswith(own))
                found, rest = found + SYMBOLS[symbol], rest.removeprefix(symbol)
            k = end + 1
        else:
            assert text[k] not in '\\{}&%#_~^<>|"`', text[k:]
            assert text[k : k + 2] != "--", "a dash"
            found, k = found + text[k], k + 1
    return found


@given(TEXT)
def test_latex_reads_what_was_written(text):
    assert read_latex(writers.escape_latex(text)) == text


def test_a_table_in_latex_is_whole():
    lines = table().to_latex().splitlines()
    assert lines[0] == r"\begin{table}[htbp]" and lines[-1] == r"\end{table}"
    assert read_latex(lines[2].removeprefix(r"\caption{").removesuffix("}")) == SPECIAL
    assert r"\label{tab:a_b}" in lines and r"\begin{tabular}{lr}" in lines
    inside = lines[lines.index(r"\toprule") + 1 : lines.index(r"\bottomrule")]
    rows = [line for line in inside if line.endswith(r" \\")]
    assert len(rows) == 2 + 3 + 1 + 3
    for row in rows:
        assert not row.startswith(("[", "*")), "an argument of the line before"
        spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row))
        assert len(re.findall(r"(?<!\\)&", row)) + spanned == 1, row
    text = "\n".join(lines)
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    bare = re.sub(r"\\[{}\\]", "", text)
    assert bare.count("{") == bare.count("}")


def test_a_label_that_latex_would_not_take_is_refused():
    with pytest.raises(ValueError, match="label='a #1'"):
        table().described(label="a #1").to_latex()


# HTML and Markdown


def test_a_table_in_html_is_well_formed_and_has_no_colour_of_its_own():
    text = table().to_html()
    root = ElementTree.fromstring(text)
    assert root.tag == "table" and root.get("id") == "tab:a_b"
    for row in root.iter("tr"):
        assert sum(int(cell.get("colspan", 1)) for cell in row) == 2
    cells = ["".join(cell.itertext()) for cell in root.iter("td")]
    assert cells.count(SPECIAL) == 2 and root.findtext("caption") == SPECIAL
    colours = re.findall(r"(?:color|background|border[a-z-]*):([^;\"]*)", text)
    assert set(colours) <= {
        "inherit", "transparent", "none", "collapse", "1px solid currentColor",
        "2px solid currentColor",
    }  # fmt: skip


def test_a_table_in_markdown_renders_as_it_was():
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    root = ElementTree.fromstring(f"<div>{reader.render(table().to_markdown())}</div>")
    found = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert found[0] == [SPECIAL, f"{SPECIAL}: p"]
    assert found[1:4] == [[SPECIAL, "1.0"], ["[0, 1]", "2"], ["*", "3"]]
    assert found[4] == [SPECIAL, ""] and len(found) == 8
    paragraphs = ["".join(p.itertext()) for p in root.iter("p")]
    assert paragraphs == [f"Table: {SPECIAL}", f"Note. {SPECIAL}."]


@given(TEXT)
def test_cells_of_markdown_are_what_was_written(text):
    made = Table((Column("h", align="l"),), (Section("", [[f"x{text}x"]]),)).to_markdown()
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    cell = ElementTree.fromstring(f"<div>{reader.render(made)}</div>").find(".//tbody/tr/td")
    assert cell is not None and "".join(cell.itertext()) == f"x{text}x"


def test_tables_go_to_files(tmp_path):
    path = tmp_path / "table.tex"
    assert table().to_latex(path) == path.read_text(encoding="utf-8")


# Numbers


@given(st.floats(1e-300, 1))
def test_no_p_value_is_zero(p):
    text = numbers.p_value(p)
    assert text == "< .001" or text == "> .999" or abs(float(text) - p) <= 0.0005 + 1e-12
    assert not text.startswith("0") and "0.00" not in text


def test_points_stand_under_each_other():
    texts = numbers.padded(["12", "0.004", "1.50", ""], [0, 3, 2, 0])
    assert texts == ["12\u2008\u2007\u2007\u2007", "0.004", "1.50\u2007", ""]
    latex = writers.escape_latex(texts[0])
    assert latex == r"12\phantom{.000}"


@pytest.mark.parametrize(
    "error, decimals", [(1.55, 2), (0.0301, 3), (0.00099, 5), (1e-12, 6), (5000.0, 0), (np.nan, 2)]
)
def test_decimals_follow_the_standard_error(error, decimals):
    assert numbers.decimals_for(error) == decimals


def test_small_estimates_are_not_shown_as_zero():
    frame = pd.DataFrame({"estimate": [3.2e-5, 2e-9], "std_error": [1.1e-5, 1e-9]}, ["a", "b"])
    (section,) = jaxreml.frame_table(frame).sections
    assert section.rows == [["a", "0.000032", "0.000011"], ["b", "2.0e−9", "1.0e−9"]]


# Frames


def test_known_columns_of_a_frame():
    frame = pd.DataFrame(
        {
            "estimate": [1.0, -2.0], "std_error": [0.5, np.nan], "lower": [0.02, np.nan],
            "upper": [1.98, np.nan], "num_df": [1.0, 2.0], "den_df": [10.0, 12.3],
            "statistic": [4.0, 5.0], "p_value": [0.0735, 1e-9], "group": [None, "g"],
            "empty": [np.nan, np.nan], "good": [True, False], "note": ["", "by hand"],
        },
        index=pd.Index(["x_1", "x_2"], name="term"),
    )  # fmt: skip
    made = jaxreml.frame_table(frame, conf_level=0.9, rename={"x_2": "second"}, note="More")
    heads = ["", "Estimate", "SE", "90% CI", "df1", "df2", "F", "p", "Group", "good"]
    assert [column.header for column in made.columns] == heads
    assert made.sections[0].rows == [
        ["x_1", "1.00", "0.50", "[0.02, 1.98]", "1", "10.0", "4.00", ".073", "", "yes"],
        ["second", "−2.00", "", "", "2", "12.3", "5.00", "< .001", "g", "no"],
    ]
    assert made.notes == ("second: by hand", "More")


def test_frames_with_columns_in_two_levels_have_spanners():
    part = pd.DataFrame({"estimate": [1.0], "p_value": [0.5]}, ["y"])
    made = jaxreml.frame_table(pd.concat({"a": part, "b": part}, axis=1))
    assert made.spanners == (Spanner("a", 1, 3), Spanner("b", 3, 5))
    assert made.sections[0].rows == [["y", "1.00", ".500", "1.00", ".500"]]


def test_frames_of_other_libraries():
    polars = pytest.importorskip("polars")
    made = jaxreml.frame_table(polars.DataFrame({"term": ["x"], "p_value": [1e-5]}))
    assert made.sections[0].rows == [["x", "< .001"]]


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match="takes a dataframe, not list"):
        jaxreml.frame_table([1, 2])  # pyright: ignore
