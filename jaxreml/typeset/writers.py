r"""A `Table` in LaTeX, HTML and Markdown.

Cells are plain text with the characters that readers see: a true minus sign, figure spaces where
numbers are padded to stand under each other, Greek letters. What has a meaning in a language is
escaped: in LaTeX \ { } & % $ # _ ~ ^ and what its fonts or ligatures change; in HTML < > & and
quotes; in Markdown | and what it takes for emphasis, code, links or mathematics.
"""

from __future__ import annotations

import html as _html
import re
import unicodedata

from jaxreml.typeset.content import Content

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': r"{\char34}",  # babel gives the character itself a meaning in some languages
    "`": r"\textasciigrave{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{INFINITY}": r"$\infty$",
    "\N{SUPERSCRIPT TWO}": "$^2$",
    "\N{EN DASH}": "--",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{FIGURE SPACE}": r"\phantom{0}",
    "\N{PUNCTUATION SPACE}": r"\phantom{.}",
    "\N{NO-BREAK SPACE}": "~",
}
_MARKDOWN = {mark: f"\\{mark}" for mark in "\\|*_`~$"}
_LATIN_LIKE = {"OMICRON"}  # Greek letters that LaTeX has no command for


def escape_latex(text: str) -> str:
    r"""Text as LaTeX sets it, in any encoding of the document.

    Examples:
        >>> print(escape_latex("p_value < 5%"))
        p\_value $<$ 5\%
    """
    parts = re.split("(?<=-)(?=-)", _one_line(text))  # hyphens in a row would become a dash
    plain = "{}".join("".join(_LATEX.get(c) or _greek(c) for c in part) for part in parts)
    plain = plain.replace(r"}\phantom{", "")  # one space where two meet
    return re.sub(r"(?<!\\)\$\$", "", plain)  # one formula likewise


def _greek(mark: str) -> str:
    """A small Greek letter as its command, another character as itself."""
    found = re.fullmatch(r"GREEK SMALL LETTER (\w+)", unicodedata.name(mark, ""))
    if mark == "\N{MICRO SIGN}":
        return r"$\mu$"
    if found is None or found[1] in _LATIN_LIKE:
        return mark
    name = {"LAMDA": "lambda", "FINAL": "varsigma"}.get(found[1], found[1].lower())
    return f"$\\{name}$"


def escape_html(text: str) -> str:
    """Text in HTML."""
    return _html.escape(_one_line(text))


def escape_markdown(text: str) -> str:
    r"""Text in a cell of a pipe table.

    Examples:
        >>> print(escape_markdown("a|b*c"))
        a\|b\*c
    """
    escaped = "".join(_MARKDOWN.get(mark, mark) for mark in _one_line(text))
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", escaped)  # no entity
    escaped = re.sub(r"<(?=[\w/!?])", "&lt;", escaped)  # no element
    return escaped.replace("](", "]&#40;")  # no link


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n\t]+", " ", text)


def latex(table: Content) -> str:
    r"""See `Table.to_latex`."""
    escape = escape_latex
    width = len(table.columns)
    lines = [r"\begin{table}[htbp]", r"\centering"]
    if table.caption:
        lines.append(rf"\caption{{{escape(table.caption)}}}")
    if table.label:
        lines.append(rf"\label{{{_label(table.label)}}}")
    lines += [rf"\begin{{tabular}}{{{''.join(own.align for own in table.columns)}}}", r"\toprule"]
    if table.spanners:
        cells, rules, place = [], [], 0
        for own in table.spanners:
            cells += [""] * (own.start - place)
            cells.append(rf"\multicolumn{{{own.stop - own.start}}}{{c}}{{{escape(own.header)}}}")
            rules.append(rf"\cmidrule(lr){{{own.start + 1}-{own.stop}}}")
            place = own.stop
        cells += [""] * (width - place)
        lines += [" & ".join(cells) + r" \\", " ".join(rules)]
    heads = [
        rf"\textit{{{escape(own.header)}}}" if own.symbol else escape(own.header)
        for own in table.columns
    ]
    lines += [" & ".join(_centred(heads, table)) + r" \\", r"\midrule"]
    for k, section in enumerate(table.sections):
        if k:
            lines.append(r"\addlinespace")
        if section.title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape(section.title)}}}}} \\")
        for row in section.rows:
            line = " & ".join(map(escape, row)) + r" \\"
            if section.title:
                line = r"\quad " + line
            elif line.startswith(("[", "*")):  # after \\ these would begin an argument
                line = "{}" + line
            lines.append(line)
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        notes = " ".join(map(escape, map(_sentence, table.notes)))
        lines.append(rf"\par\smallskip{{\footnotesize \textit{{Note.}} {notes}\par}}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _label(text: str) -> str:
    """A name that LaTeX takes as a label; ValueError for others, as escapes do not work there."""
    if re.search(r"[\\{}%#~^&$\s]", text):
        raise ValueError(
            f"label={text!r} is not one for LaTeX: use letters, digits and : - _ . such as "
            '"tab:model"'
        )
    return text


def _centred(heads: list[str], table: Content) -> list[str]:
    """Headings of columns of numbers, centred over them."""
    return [
        rf"\multicolumn{{1}}{{c}}{{{head}}}" if own.align == "r" and head else head
        for head, own in zip(heads, table.columns, strict=True)
    ]


# Nothing here has a colour of its own: borders and text are those of the page, light or dark.
_RULE = "border-top:1px solid currentColor;"
_CELL = "padding:.15em .6em;border:none;background:transparent;white-space:nowrap;"
_NUMBERS = "font-variant-numeric:tabular-nums lining-nums;"


def html(table: Content) -> str:
    """See `Table.to_html`."""
    escape = escape_html
    width = len(table.columns)
    opening = f' id="{escape(table.label)}"' if table.label else ""
    lines = [
        f'<table{opening} class="jaxreml tex2jax_ignore mathjax_ignore" '
        f'style="border-collapse:collapse;color:inherit;background:transparent;{_NUMBERS}'
        'border-bottom:2px solid currentColor;margin:.5em 0;">'
    ]
    if table.caption:
        lines.append(
            '<caption style="caption-side:top;text-align:left;color:inherit;padding:.3em 0;">'
            f"{escape(table.caption)}</caption>"
        )
    lines.append('<thead style="border-top:2px solid currentColor;">')
    if table.spanners:
        cells, place = "", 0
        for own in table.spanners:
            cells += f'<td style="{_CELL}"></td>' * (own.start - place)
            cells += (
                f'<th colspan="{own.stop - own.start}" scope="colgroup" '
                f'style="{_CELL}text-align:center;">{escape(own.header)}</th>'
            )
            place = own.stop
        lines.append(f"<tr>{cells}</tr>")
    cells = ""
    for own in table.columns:
        text = f"<i>{escape(own.header)}</i>" if own.symbol else escape(own.header)
        cells += f'<th scope="col" style="{_CELL}{_side(own.align)}">{text}</th>'
    lines += [f"<tr>{cells}</tr>", "</thead>"]
    for section in table.sections:
        lines.append(f'<tbody style="{_RULE}">')
        if section.title:
            lines.append(
                f'<tr><th colspan="{width}" scope="rowgroup" style="{_CELL}text-align:left;'
                f'font-weight:normal;font-style:italic;">{escape(section.title)}</th></tr>'
            )
        for row in section.rows:
            cells = "".join(
                f'<td style="{_CELL}{_side(own.align)}">{escape(cell)}</td>'
                for cell, own in zip(row, table.columns, strict=True)
            )
            lines.append(f'<tr style="background:transparent;">{cells}</tr>')
        lines.append("</tbody>")
    if table.notes:
        notes = " ".join(escape(_sentence(note)) for note in table.notes)
        lines.append(
            f'<tfoot style="{_RULE}"><tr><td colspan="{width}" style="{_CELL}white-space:normal;'
            f'text-align:left;font-size:85%;max-width:0;"><i>Note.</i> {notes}</td></tr></tfoot>'
        )
    return "\n".join([*lines, "</table>"]) + "\n"


def _side(align: str) -> str:
    return f"text-align:{'left' if align == 'l' else 'right'};"


def markdown(table: Content) -> str:
    """See `Table.to_markdown`."""
    escape = escape_markdown
    over = {
        k: own.header for own in table.spanners for k in range(own.start, own.stop) if own.header
    }
    heads = []
    for k, own in enumerate(table.columns):
        text = f"*{escape(own.header)}*" if own.symbol else escape(own.header)
        heads.append(f"{escape(over[k])}: {text}" if k in over else text)
    rows = [heads]
    for section in table.sections:
        if section.title:
            rows.append([f"**{escape(section.title)}**", *[""] * (len(heads) - 1)])
        rows += [[escape(cell) for cell in row] for row in section.rows]
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(heads))]
    lines = [_pipes(row, widths, table) for row in rows]
    marks = [
        "-" * width if own.align == "l" else "-" * (width - 1) + ":"
        for width, own in zip(widths, table.columns, strict=True)
    ]
    lines.insert(1, "| " + " | ".join(marks) + " |")
    if table.caption:
        lines = [f"Table: {escape(table.caption)}", "", *lines]
    if table.notes:
        notes = " ".join(escape(_sentence(note)) for note in table.notes)
        lines += ["", f"*Note.* {notes}"]
    return "\n".join(lines) + "\n"


def _pipes(row: list[str], widths: list[int], table: Content) -> str:
    cells = [
        cell.ljust(width) if own.align == "l" else cell.rjust(width)
        for cell, width, own in zip(row, widths, table.columns, strict=True)
    ]
    return "| " + " | ".join(cells) + " |"


def _sentence(note: str) -> str:
    """A note with a full stop."""
    return note if note.endswith((".", "!", "?")) else f"{note}."
