"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int | None, wanted: bool | None, text: str, **counts: int) -> Iterator[Any]:
    """A bar; gives a function of how many more are done, and of what else there is more of by name.

    Args:
        total: how many there will be, if it is known.
        wanted: whether to show it; None for only on a terminal.
        text: beside it, a format of ``{task.fields[rate]}``, how many per second, and of `counts`.
        counts: of what else is counted, at first.
    """
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty()
    if not wanted:
        yield lambda more, **counts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn(text)]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        fields: dict[str, Any] = {"rate": 0, **counts}
        task = bar.add_task("", total=total, **fields)

        def advance(more: int, **counts: int) -> None:
            now = bar.tasks[0]
            fields = {name: now.fields[name] + count for name, count in counts.items()}
            bar.update(task, advance=more, **fields)
            bar.update(task, rate=now.completed / max(now.elapsed or 0, 1e-9))

        yield advance
