"""What is printed: a table for every shape and m, notes, and a progress bar on a terminal."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TextIO

from fdk.bench.records import FIELDS, Record

COLUMNS = ("name", "us (p20-p80)", "GB/s", "TFLOP/s", "x torch bf16", "x floor", "% of pool")

NEEDED_WIDTH = 116


def significant(value: float, digits: int = 3) -> str:
    """A positive number with `digits` significant digits and no exponent: 0.0123, 1.23, 12.3, 1234."""
    if value <= 0:
        return f"{value:g}"
    decimals = digits - 1
    scaled = value
    while scaled >= 10 and decimals > 0:
        scaled, decimals = scaled / 10, decimals - 1
    while scaled < 1 and decimals < 12:
        scaled, decimals = scaled * 10, decimals + 1
    return f"{value:.{decimals}f}"


def name(record: Record) -> str:
    """Test, format, provider and, where it is not the provider's own name, kernel."""
    kernel = record["kernel"]
    provider = str(record["provider"])
    if kernel and not provider.endswith(f":{kernel}"):
        provider += f" ({kernel})"
    return f"{record['test']} {record['format']} {provider}"


def slower_with_fewer_rows(records: Iterable[Record]) -> list[str]:
    """Lines about our products that took 2 % longer than those of more rows, and should run as those do."""
    times: dict[tuple[object, ...], dict[int, float]] = {}
    for record in records:
        if record["status"] == "ok" and str(record["provider"]).partition(":")[0] == "fdk":
            key = tuple(record[field] for field in ("format", "provider", "dtype", "n", "k", "threads"))
            times.setdefault(key, {})[record["m"]] = record["time_p50"]
    found = []
    for (format, provider, _, n, k, _), by_rows in times.items():
        for m, seconds in by_rows.items():
            more = min((rows for rows in by_rows if rows > m), key=by_rows.get, default=m)
            if seconds > 1.02 * by_rows[more]:
                us, other = significant(seconds * 1e6), significant(by_rows[more] * 1e6)
                found.append(f"{format} {provider}, {n} x {k}: m={m} takes {us} us, m={more} {other}")
    return found


def cells(record: Record) -> list[str]:
    """The columns of a record whose status is ok."""

    def number(field: str, text: str = "{}") -> str:
        value = record[field]
        return "-" if value is None else text.format(significant(value))

    middle, low, high = (significant(record[f"time_{p}"] * 1e6) for p in ("p50", "p20", "p80"))
    seconds = record["time_p50"]
    return [
        name(record),
        f"{middle} ({low}-{high})",
        significant(record["bytes_rw"] / seconds / 1e9),
        significant(record["ops"] / seconds / 1e12),
        number("x_bf16"),
        number("x_floor"),
        "-" if record["read_fraction"] is None else f"{100 * record['read_fraction']:.0f}",
    ]


def markdown(rows: list[list[str]], columns: Sequence[str] = COLUMNS) -> str:
    """An aligned Markdown table with `columns` as its head."""
    table = [list(columns), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]

    def line(row: Iterable[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(table[0]), rule, *(line(row) for row in table[1:])])


class Report:
    """Prints in one of the forms md, jsonl and csv. Notes go to standard error unless the form is md."""

    def __init__(self, form: str, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.form = form
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.rich = form == "md" and self.out.isatty()
        self._csv = csv.DictWriter(self.out, FIELDS, lineterminator="\n") if form == "csv" else None
        if self._csv:
            self._csv.writeheader()
        self._stack = ExitStack()
        self._progress = self._task = None
        self._console = None
        if self.rich:
            from rich.console import Console

            self._console = Console(file=self.out, highlight=False)
            # A narrower terminal breaks lines, which is better than a table that cuts digits off.
            self._console.width = max(self._console.width, NEEDED_WIDTH)

    def start(self, total: int) -> None:
        """Begin a progress bar of `total` steps, on a terminal."""
        if not (self.rich or self.err.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = self._console or Console(file=self.err)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # A refreshing thread would inherit the core that the timed thread is bound to, and disturb it.
        progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._progress = self._stack.enter_context(progress)
        self._task = self._progress.add_task("", total=total)

    def doing(self, text: str, advance: int = 0) -> None:
        """Say what is being done on the progress bar."""
        if self._progress:
            self._progress.update(self._task, description=text, advance=advance, refresh=True)

    def note(self, text: str, style: str | None = None) -> None:
        """A line for people."""
        if self._console:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, file=self.out if self.form == "md" else self.err, flush=True)

    def results(self, title: str, records: list[Record], warning: str | None = None) -> None:
        """One table: what was measured, a warning, what was wrong, and what could not run, with reasons."""
        if self.form == "jsonl":
            for record in records:
                print(json.dumps(record, allow_nan=False), file=self.out, flush=True)
        elif self._csv:
            self._csv.writerows(records)
            self.out.flush()
        rows = [cells(record) for record in records if record["status"] == "ok"]
        if self.form == "md":
            self._table(title, rows)
        if self.form == "md":
            for record in records:
                if record.get("chain_time"):
                    layer, ratio = significant(record["chain_time"] * 1e6), significant(record["x_chain"])
                    self.note(f"in a chain: {name(record)}: {layer} us a layer, {ratio} x the independent calls")
        if warning:
            self.note(warning, "yellow")
        for record in records:
            if record["status"] == "failed":
                self.note(f"FAILED {name(record)}: {record['reason']}", "bold red")
        for record in records:
            if record["status"] == "skipped":
                self.note(f"not run: {name(record)}: {record['reason']}", "dim")
        if self.form == "md":
            self.note("")

    def _table(self, title: str, rows: list[list[str]]) -> None:
        if not rows:
            self.note(f"{title}: nothing to show")
        elif self._console:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table

            table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
            for index, column in enumerate(COLUMNS):
                table.add_column(column, justify="right" if index else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
        else:
            self.note(f"{title}\n\n{markdown(rows)}")

    def close(self) -> None:
        self._stack.close()
