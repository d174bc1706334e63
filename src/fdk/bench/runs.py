"""Which records of many runs belong together.

A line of a figure is of one run: in another process the same product has other memory, and on a CPU other speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fdk.bench.records import Record

LINE = ("test", "provider", "format", "dtype", "m", "n", "k")


def what_was_timed(entry: Record) -> tuple:
    """Equal for records whose times may be compared."""
    return tuple(entry.get(name) for name in LINE)


def by_run(entries: Iterable[Record]) -> list[list[Record]]:
    """Entries of each run (`id`), the newest run first."""
    found: dict[object, list[Record]] = {}
    for entry in sorted(entries, key=lambda e: str(e.get("date")), reverse=True):
        found.setdefault(entry.get("id"), []).append(entry)
    return list(found.values())


def newest(entries: Iterable[Record]) -> list[Record]:
    """The last record of every line, whichever run it is from."""
    found: dict[tuple, Record] = {}
    for entry in sorted(entries, key=lambda e: str(e.get("date"))):
        found[what_was_timed(entry)] = entry
    return list(found.values())


def needed_runs(entries: Iterable[Record]) -> list[Record]:
    """All records of the newest runs, without runs that hold no line that a newer one does not hold too."""
    known: set[tuple] = set()
    found: list[Record] = []
    for run in by_run(entries):
        lines = {what_was_timed(entry) for entry in run}
        if not lines <= known:
            known |= lines
            found += newest(run)
    return found


def pieces(entries: Iterable[Record], label: Callable[[Record], str]) -> list[list[Record]]:
    """Lines over m, each of one run and one label: all rows of the newest run that has the label, of older ones those
    below and those above what newer ones reach."""
    reach: dict[str, tuple[int, int]] = {}
    found: list[list[Record]] = []
    for run in by_run(entries):
        groups: dict[str, list[Record]] = {}
        for entry in sorted(newest(run), key=lambda e: e["m"]):
            groups.setdefault(label(entry), []).append(entry)
        for name, group in groups.items():
            ms = [entry["m"] for entry in group]
            if name not in reach:
                found.append(group)
            else:
                low, high = reach[name]
                below, above = [e for e in group if e["m"] < low], [e for e in group if e["m"] > high]
                found += [part for part in (below, above) if part]
                ms += [low, high]
            reach[name] = min(ms), max(ms)
    return found


def fullest_run(entries: Iterable[Record]) -> list[Record]:
    """The records of the run with the most lines, the newest of such."""
    runs = [newest(run) for run in by_run(entries)]
    return max(runs, key=len, default=[])
