"""The tables of README.md and docs/results.md, made from the records under results/: no figure is typed by hand.

`python -m fdk.bench.summary RECORDS... --into FILE` replaces what lies between the markers `<!-- summary -->`
and `<!-- /summary -->`; without `--into` it prints the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fdk.bench.plots import shape_of
from fdk.bench.records import Record, RecordError, files, read
from fdk.bench.runs import newest, what_was_timed

NAME = "summary"
PEERS = {
    "torch-int4pack": "torch int4pack",
    "torch-tinygemm": "torch tinygemm",
    "bitsandbytes-nf4": "bitsandbytes NF4",
    "humming": "humming",
    "gemlite": "gemlite",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def best_peer(entries: Sequence[Record], of: Record) -> float | None:
    """Time of the fastest low-bit peer of the same run and problem; None if none ran."""
    times = [
        entry["time_p50"]
        for entry in entries
        if entry["provider"] in PEERS and all(entry[key] == of[key] for key in ("id", "m", "n", "k", "threads"))
    ]
    return min(times, default=None)


def ours(entries: Iterable[Record]) -> list[Record]:
    """fdk's own lines through the public path, by m, width and name."""
    found = [entry for entry in entries if entry["provider"] == "fdk" and not str(entry["test"]).endswith("_ref")]
    return sorted(found, key=lambda e: (e["m"], e["bits"], e["format"]))


def floor_of_weights(entry: Record) -> bool:
    """Whether the floor read the bytes of the weight that was multiplied."""
    return entry.get("floor_memory") == "weights"


def decode_table(entries: Sequence[Record], others: Sequence[Record] = (), m: int = 1) -> str:
    """One row of activations: speed-up over torch bf16, x of the floor, over the best peer, and what other runs got.

    others: records of the same machine; which part of its memory a process gets changes every ratio, so the speed-ups
    of other runs stand beside. A floor that read other memory than the weights' own says where the pool lay, and is
    not shown.
    """
    shapes = sorted({shape_of(entry) for entry in ours(entries)})
    honest = any(floor_of_weights(entry) for entry in ours(entries))
    what = f"x torch bf16 (p20-p80), {'x floor, ' if honest else ''}x best 4-bit peer; x torch bf16 in other runs"
    head = [f"m = {m}", *(f"{n} x {k}: {what}" for n, k in shapes)]
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for entry in ours(entries):
        if entry["m"] != m or entry["dtype"] != "bf16":
            continue
        text = f"{entry['x_bf16']:.1f} ({entry['x_bf16_p20']:.1f}-{entry['x_bf16_p80']:.1f})"
        text += f", {entry['x_floor']:.2f}" if floor_of_weights(entry) else ""
        if (peer := best_peer(entries, entry)) and entry["bits"] == 4:
            text += f", {peer / entry['time_p50']:.1f}"
        same = [other for other in others if what_was_timed(other) == what_was_timed(entry)]
        text += "; " + ", ".join(f"{other['x_bf16']:.1f}" for other in same) if same else ""
        cells.setdefault(f"`{entry['format']}`", {})[shape_of(entry)] = text
    return table(head, [[name, *(row.get(shape, "") for shape in shapes)] for name, row in cells.items()])


def batch_table(entries: Sequence[Record]) -> str:
    """Speed-up over torch bf16 for every m and format at the first shape."""
    own = [entry for entry in ours(entries) if entry["dtype"] == "bf16"]
    shape = min(shape_of(entry) for entry in own)
    own = [entry for entry in own if shape_of(entry) == shape]
    ms = sorted({entry["m"] for entry in own})
    names = list(dict.fromkeys(entry["format"] for entry in own))
    value = {(entry["format"], entry["m"]): f"{entry['x_bf16']:.2f}" for entry in own}
    head = [f"x torch bf16, {shape[0]} x {shape[1]}", *(f"m = {m}" for m in ms)]
    return table(head, [[f"`{name}`", *(value.get((name, m), "") for m in ms)] for name in names])


def on_gpu(entries: Sequence[Record]) -> bool:
    """Whether the records are a GPU's."""
    return str(entries[0].get("isa") or "").startswith("sm_")


def gpu_table(entries: Sequence[Record], m: int) -> str:
    """fdk's formats at every shape for one m: us, x of the streaming floor with PDL, x cuBLAS bf16, x best peer."""
    rows = [entry for entry in entries if entry["m"] == m and entry["dtype"] == "bf16"]
    dense = [entry for entry in rows if entry["provider"] == "torch-bf16"]
    shapes = sorted({shape_of(entry) for entry in rows}, key=lambda shape: (shape[0] * shape[1], shape))
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for entry in (*ours(rows), *dense):
        bf16 = entry["provider"] == "torch-bf16"
        text = f"{entry['time_p50'] * 1e6:.1f}"
        text += "" if entry["x_floor"] is None else f", {entry['x_floor']:.2f}"
        if not bf16:
            text += "" if entry["x_bf16"] is None else f", {entry['x_bf16']:.2f}"
            peer = best_peer([other for other in rows if other["bits"] == entry["bits"]], entry)
            text += f", {peer / entry['time_p50']:.2f}" if peer else ""
        cells.setdefault("cuBLAS bf16" if bf16 else f"`{entry['format']}`", {})[shape_of(entry)] = text
    head = [f"m = {m}: us, x floor, x cuBLAS, x best peer of equal bits", *(f"{n} x {k}" for n, k in shapes)]
    return table(head, [[name, *(row.get(shape, "") for shape in shapes)] for name, row in cells.items()])


def over_cublas(entry: Record, entries: Sequence[Record]) -> float:
    """Its speed over cuBLAS in its own dtype: of medians but in bf16, which alone is compared round by round."""
    if entry["dtype"] == "bf16":
        return entry["x_bf16"]
    theirs = next(
        other
        for other in entries
        if other["provider"] == f"torch-{entry['dtype']}"
        and all(other[key] == entry[key] for key in ("id", "m", "n", "k"))
    )
    return theirs["time_p50"] / entry["time_p50"]


def many_rows_table(entries: Sequence[Record], every: Sequence[Record]) -> str:
    """Speed-up over cuBLAS for every m at every shape, fdk's formats and the peers', all of one dtype.

    every: what `entries` are the newest of; cuBLAS is that of each one's own run.
    """
    dtype = ours(entries)[0]["dtype"]
    rows = [entry for entry in entries if entry["provider"] != f"torch-{dtype}" and entry["dtype"] == dtype]
    ms = sorted({entry["m"] for entry in rows})
    cells: dict[str, dict[int, str]] = {}
    for entry in sorted(rows, key=lambda e: (shape_of(e), e["provider"] != "fdk", e["bits"], e["format"])):
        n, k = shape_of(entry)
        own = "" if entry["provider"] == "fdk" else f"{entry['provider']} "
        cells.setdefault(f"{n} x {k} {own}`{entry['format']}`", {})[entry["m"]] = f"{over_cublas(entry, every):.2f}"
    head = [f"x cuBLAS {dtype}", *(f"m = {m}" for m in ms)]
    return table(head, [[name, *(row.get(m, "") for m in ms)] for name, row in cells.items()])


def section(path: Path, brief: bool = False) -> str:
    """The tables of one file of records, for all threads, with where and how they were measured.

    brief: one row of activations only, where there is a record of it.
    """
    every = [entry for entry in read([path]) if entry["status"] == "ok"]
    threads = max((entry["threads"] or 0) for entry in every)
    entries = newest(entry for entry in every if (entry["threads"] or 0) == threads)
    if not ours(entries):
        return ""
    first = entries[0]
    others = [
        entry
        for entry in read([path.parent])
        if entry["status"] == "ok" and entry["id"] != first["id"]
        and (entry["device"], entry["threads"]) == (first["device"], first["threads"])
    ]  # fmt: skip
    where = f"{first['device']}, {first['isa']}, {threads} threads" if threads else str(first["device"])
    title = f"**{where}**, {first['date'][:10]}, `{path.as_posix()}`:"
    if on_gpu(entries):
        sizes = sorted({entry["m"] for entry in ours(entries)})
        if 1 not in sizes:
            return "\n\n".join([title, many_rows_table(entries, every)])
        return "\n\n".join([title, *(gpu_table(entries, m) for m in (sizes[:1] if brief else sizes))])
    tables = [decode_table(entries, others)] if any(e["m"] == 1 for e in ours(entries)) else []
    if len({entry["m"] for entry in ours(entries)}) > 1 and not (brief and tables):
        tables.append(batch_table(entries))
    return "\n\n".join([title, *tables])


def replace_between(text: str, content: str, name: str = NAME) -> str:
    """`text` with what lies between the markers <!-- name --> and <!-- /name --> replaced. RecordError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise RecordError(f"no {begin} ... {end} to put the tables into; add the two markers")
    return f"{before}{begin}\n{content}\n{end}{after}"


def command(
    argv: list[str] | None,
    module: str,
    name: str,
    section: Callable[[Path], str],
    about: str | None,
    brief: Callable[[Path], str] | None = None,
) -> int:
    """Print the sections of files of records, or put them between markers in a file; 0, or 2 if that cannot be done.

    brief: what makes a section with --brief, where there is such a flag.
    """
    parser = argparse.ArgumentParser(prog=f"python -m fdk.bench.{module}", description=about)
    parser.add_argument("records", nargs="+", type=Path, help=".jsonl files of the benchmark, or folders with them")
    parser.add_argument("--into", type=Path, help="Markdown file with the markers")
    if brief:
        parser.add_argument("--brief", action="store_true", help="tables of one row of activations only")
    args = parser.parse_args(argv)
    try:
        chosen = brief if brief and args.brief else section
        content = "\n\n".join(filter(None, map(chosen, files(args.records))))
        if args.into is None:
            print(content)
            return 0
        text = replace_between(args.into.read_text(), content, name)
        handle, temporary = tempfile.mkstemp(dir=args.into.parent, prefix=args.into.name)
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(temporary, args.into.stat().st_mode)
        os.replace(temporary, args.into)
    except (RecordError, OSError) as error:
        print(f"fdk.bench.{module}: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Print the tables or put them into a file; returns 0, or 2 if records or markers are missing."""
    return command(argv, "summary", NAME, section, __doc__, lambda path: section(path, brief=True))


if __name__ == "__main__":
    sys.exit(main())
