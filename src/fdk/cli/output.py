"""What commands print: tables, a bar of progress, and nothing to a closed pipe."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack


def unwritten(error: OSError) -> str:
    """What to say of a file that could not be read or written."""
    remedy = "free some space, or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}; {remedy or 'check the path'}; nothing half-written was kept"


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, title: str | None = None) -> None:
    """A table: by rich on a terminal, aligned text elsewhere. The first `left` columns are text, the others numbers."""
    rows = [list(row) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    if title:
        print(title)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = (
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def progress_bar(stack: ExitStack, what: str):
    """A function of (text, done, total) that moves a bar on standard error if that is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = bar.add_task(what)
    return lambda text, done, total: bar.update(task, completed=done, total=total, description=f"{what} {text}")


def until_the_reader_leaves(main: Callable[[], int]) -> int:
    """The status of `main`; 1, and no more output, once what reads ours has gone, as `head` does."""
    try:
        status = main()
        print(end="", flush=True)
        return status
    except BrokenPipeError:
        # The interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
