"""What a table is: headings, rows in sections, a caption and notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        header: its heading.
        symbol: whether the heading is a statistical symbol, set in italics.
        align: "l" or "r".
    """

    header: str
    symbol: bool = False
    align: str = "r"


class Section(NamedTuple):
    """Rows that belong together.

    Attributes:
        title: shown above them; none if empty.
        rows: cells, text as readers see it, as many as the table has columns.
    """

    title: str
    rows: list[list[str]]


class Spanner(NamedTuple):
    """A heading over several columns, `start` to `stop` - 1."""

    header: str
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class Content:
    """What a `Table` shows; see there."""

    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    spanners: tuple[Spanner, ...] = ()
    caption: str = ""
    label: str = ""
    notes: tuple[str, ...] = ()
