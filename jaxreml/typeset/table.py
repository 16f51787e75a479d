"""`Table`: a table for a paper or a notebook, and a mix-in for what can be shown as one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxreml.typeset import writers
from jaxreml.typeset.content import Content


@dataclass(frozen=True, repr=False)
class Table(Content):
    r"""A table for a paper or a notebook.

    `jaxreml.model_table` and `jaxreml.frame_table` make one; fits, marginal means, profiles and
    bootstraps have methods of the same names as its own. Cells are text as readers see it; each
    writer replaces what has a meaning in its language.

    Attributes:
        columns, sections: headings and rows.
        spanners: headings over several columns.
        caption: above the table.
        label: LaTeX's name of the table, for ``\ref``; in HTML the ``id``.
        notes: sentences below the table.

    Examples:
        >>> jaxreml.frame_table(fit.anova())
        <Table of 1 row and 7 columns: , Sum sq., Mean sq., df1, df2, F, p>
    """

    def to_latex(self, path: str | Path | None = None) -> str:
        r"""The table in LaTeX, for the package booktabs (``\usepackage{booktabs}``).

        Args:
            path: also write it to this file.

        Examples:
            >>> latex = jaxreml.frame_table(fit.anova()).to_latex("anova.tex")
            >>> latex.count(r"\toprule")
            1
        """
        return _written(writers.latex(self), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The table as an HTML element ``<table>``, in the colours of the page that it stands in.

        Args:
            path: also write it to this file.

        Examples:
            >>> html = jaxreml.frame_table(fit.anova()).to_html("anova.html")
        """
        return _written(writers.html(self), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table as a pipe table, which GitHub, Jupyter, Quarto and pandoc render.

        Args:
            path: also write it to this file.

        Examples:
            >>> print(jaxreml.frame_table(fit.anova()).to_markdown())
            |      |  Sum sq. | Mean sq. | *df1* | *df2* |   *F* |    *p* |
            | ---- | -------: | -------: | ----: | ----: | ----: | -----: |
            | Days | 30031.01 | 30031.01 |     1 |    17 | 45.85 | < .001 |
        """
        return _written(writers.markdown(self), path)

    def described(
        self, caption: str | None = None, label: str | None = None, note: str | None = None
    ) -> Table:
        """The table with another caption and label, and `note` after its other notes.

        Examples:
            >>> table = jaxreml.frame_table(fit.anova()).described("F tests.", note="18 people.")
            >>> table.caption, table.notes
            ('F tests.', ('18 people.',))
        """
        return replace(
            self,
            caption=self.caption if caption is None else caption,
            label=self.label if label is None else label,
            notes=(*self.notes, note) if note else self.notes,
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        count = sum(len(section.rows) for section in self.sections)
        rows = f"{count} row" + "s" * (count != 1)
        headers = ", ".join(column.header for column in self.columns)
        return f"<Table of {rows} and {len(self.columns)} columns: {headers}>"


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


class Tabulated:
    """What can be written as a table: a class has `as_table`, and gets its writers."""

    def as_table(self, *which: Any, **options: Any) -> Table:
        """The table."""
        raise NotImplementedError

    def to_latex(self, *which: Any, **options: Any) -> str:
        """The table in LaTeX, for the package booktabs; arguments as for `as_table`.

        Examples:
            >>> means = scores.emmeans("Machine")
            >>> means.to_latex(caption="Marginal means.", label="tab:means").splitlines()[0]
            '\\\\begin{table}[htbp]'
        """
        return self.as_table(*which, **options).to_latex()

    def to_html(self, *which: Any, **options: Any) -> str:
        """The table as an HTML element; arguments as for `as_table`.

        Examples:
            >>> scores.emmeans("Machine").to_html()[:7]
            '<table '
        """
        return self.as_table(*which, **options).to_html()

    def to_markdown(self, *which: Any, **options: Any) -> str:
        """The table as a pipe table of Markdown; arguments as for `as_table`.

        Examples:
            >>> print(scores.emmeans("Machine").to_markdown())
            | Machine | Estimate | *SE* | *df* |         95% CI |   *t* |    *p* |
            | ------- | -------: | ---: | ---: | -------------: | ----: | -----: |
            | A       |    52.36 | 2.23 |  5.8 | [46.86, 57.85] | 23.49 | < .001 |
            | B       |    60.32 | 2.23 |  5.8 | [54.83, 65.82] | 27.06 | < .001 |
            | C       |    66.27 | 2.23 |  5.8 | [60.78, 71.77] | 29.73 | < .001 |
            <BLANKLINE>
            *Note.* Degrees-of-freedom method: satterthwaite.
        """
        return self.as_table(*which, **options).to_markdown()

    def _repr_html_(self) -> str:
        return self.as_table().to_html()
