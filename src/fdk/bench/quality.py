"""The README's table of what formats cost in quality, made from the records of `python -m fdk.models.tiny`.

`python -m fdk.bench.quality RECORDS --into README.md` replaces what lies between the markers `<!-- quality -->` and
`<!-- /quality -->`; without `--into` it prints the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fdk.bench.records import Record
from fdk.bench.summary import command, table
from fdk.formats import parse

BY_WIDTH = {
    "uniform": "uniform table",
    "kmeans": "k-means table",
    "nest": "`nest8` slice",
    "trunc": "`trunc8` slice",
    "budget, weights alone": "k-means, widths by layer (weights)",
    "budget, calibrated": "k-means, widths by layer (calibrated)",
}
"""Columns of the table by width, and their heads."""


def column(entry: Record) -> str | None:
    """The column of a record in the table by width; None if it is listed below."""
    if note := entry.get("note"):
        return str(note)
    fmt = parse(str(entry["format"]))
    if fmt.is_nested:
        return fmt.kind.name
    return str(entry["codebook"]) if fmt.kind.name == "lut" and not fmt.sparse else None


def divergence(entry: Record) -> str:
    """Mean KL in thousandths of a nat with half of its interval, three digits of the first."""
    value, half = (1e3 * x for x in (entry["kl"], (entry["kl_high"] - entry["kl_low"]) / 2))
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} +- {half:.{digits}f}"


def by_width(entries: Sequence[Record]) -> str:
    """Widths down, ways of spending them across."""
    cells: dict[int, dict[str, str]] = {}
    for entry in entries:
        if (name := column(entry)) is not None:
            cells.setdefault(entry["bits"], {})[name] = divergence(entry)
    columns = [name for name in BY_WIDTH if any(name in row for row in cells.values())]
    head = ["bits", *(BY_WIDTH[name] for name in columns)]
    return table(head, [[str(b), *(cells[b].get(name, "") for name in columns)] for b in sorted(cells, reverse=True)])


def section(path: Path) -> str:
    """The tables of one file of records, with what was measured and how."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry.get("test") == "quality"]
    low = [entry for entry in entries if entry["format"] != "bf16"]
    if not low:
        return ""
    first = low[0]
    dense = next(entry for entry in entries if entry["format"] == "bf16")
    title = (
        f"**Llama of {first['parameters'] / 1e6:.1f} million parameters**, trained on {first['device']}, "
        f"{first['date'][:10]}, `{path.as_posix()}`: perplexity {dense['perplexity']:.3f} a byte in bf16. "
        f"Mean KL to it, 10^-3 nats a byte, with 95 % intervals, over {first['sequences']} held-out sequences of "
        f"{first['length']} bytes; groups of {parse(first['format']).group}, {first['scale']} scales:"
    )
    head = ["others", "bits read a weight", "KL", "same top-1, %", "perplexity / bf16"]
    others = [
        [
            f"`{entry['format']}`" + (" k-means" if entry["codebook"] == "kmeans" else ""),
            f"{entry['bits_per_weight']:.2f}",
            divergence(entry),
            f"{100 * entry['top1']:.1f}",
            f"{entry['perplexity_ratio']:.4f}",
        ]
        for entry in low
        if column(entry) is None
    ]
    return "\n\n".join([title, by_width(low), *([table(head, others)] if others else [])])


def main(argv: list[str] | None = None) -> int:
    """Print the table or put it into a file; returns 0, or 2 if records or markers are missing."""
    return command(argv, "quality", "quality", section, __doc__)


if __name__ == "__main__":
    sys.exit(main())
