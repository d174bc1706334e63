"""What the GPU kernels were asked to reach before they were written, and what records say they take: docs/targets.md.

`python -m fdk.bench.targets RECORDS... --into FILE` puts the tables between the markers `<!-- targets -->` and
`<!-- /targets -->`; without `--into` it prints them. Every figure is of the newest run in a file of records.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdk.bench.plots import shape_of
from fdk.bench.records import Record, read
from fdk.bench.runs import newest
from fdk.bench.summary import PEERS, command, on_gpu, ours, over_cublas, table

NAME = "targets"
SQUARE = (4096, 4096)
LARGE = ((8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192))

DECODE = {
    8: (1.20, 1.25, 1.3, 1.3),
    4: (1.30, 1.35, 1.5, 1.5),
    3: (1.45, 1.5, 1.7, 1.6),
    2: (1.45, 1.5, 1.8, 1.8),
    1: (1.70, 1.8, 2.2, 2.2),
}
"""Times over the streaming floor by bits: 1, 8 and 16 rows at the large shapes, 1 row at 4096 x 4096."""
FEW_ROWS = (32, 64)
FEW = {SQUARE: 2.0}
"""32 and 64 rows: time over the larger of streaming floor and operations at the measured bf16 rate, 1.5 but here."""
PEER, BITS_APART = 1.2, 2.2
PREFILL = {64: 0.80, 96: 0.85, 128: 0.85, 192: 0.95, 256: 0.95, 384: 1.00, 512: 1.00, 768: 1.00}
"""4 bits: time over cuBLAS bf16 by rows; 1.02 from 1024 rows on, and from 256 on for every other width."""
PREFILL_8192 = {64: 0.60, 96: 0.75, 128: 0.75}
NESTED = 1.4
NESTED_SPEED = {
    "nest8s2": 3.6, "nest8s3": 2.9, "nest8s4": 2.3, "nest8s6": 1.8, "nest8": 1.65,
    "trunc8s2": 5.3, "trunc8s3": 4.0, "trunc8s4": 3.2, "trunc8s6": 2.1, "trunc8": 1.7,
    "int2": 5.3, "int3": 4.0, "int4": 3.2, "int6": 2.1, "int8": 1.7,
}  # fmt: skip
"""Speed-up over torch bf16 at 16384 x 16384, one row, groups of 128; intN is what `export(N)` gives."""
MATGPTQ = {
    (4096, 1): 9.8, (4096, 4): 14.27, (4096, 16): 19.76, (4096, 64): 68.24,
    (8192, 1): 26.13, (8192, 4): 44.21, (8192, 16): 70.25, (8192, 64): 251.49,
}  # fmt: skip
"""Microseconds of MatGPTQ's 4-bit kernel, rebuilt for an H200 and timed there in the same way, by n = k and m."""
SPARSE_FLOOR, SPARSE_ROWS = 1.4, 1.12


@dataclass(frozen=True)
class Figure:
    """A measured ratio and what it should be: at most `target`, or at least where `at_least`."""

    row: str
    column: str
    value: float
    target: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """As it is shown, with two digits behind the point."""
        value = round(self.value, 2)
        return value >= self.target if self.at_least else value <= self.target

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return (
            f"{self.value:.2f} {sign} {self.target:g}" if self.met else f"**{self.value:.2f}** {sign} {self.target:g}"
        )


def shown(title: str, figures: Iterable[Figure]) -> str:
    """One table of figures, with how many reach their targets; nothing without figures."""
    found = list(figures)
    if not found:
        return ""
    columns = list(dict.fromkeys(figure.column for figure in found))
    cells: dict[str, dict[str, str]] = {}
    for figure in found:
        cells.setdefault(figure.row, {})[figure.column] = str(figure)
    met = sum(figure.met for figure in found)
    head = [f"{title}: {met} of {len(found)}", *columns]
    return table(head, [[row, *(texts.get(column, "") for column in columns)] for row, texts in cells.items()])


def size(entry: Record) -> str:
    """n x k."""
    return "{} x {}".format(*shape_of(entry))


def _decode(entries: Sequence[Record]) -> Iterable[Figure]:
    for m, column in ((1, 0), (8, 1), (16, 2)):
        for entry in ours(entries):
            large = shape_of(entry) in LARGE
            if (
                entry["m"] != m
                or entry["g"] != 64
                or entry["bits"] not in DECODE
                or not (large or (shape_of(entry) == SQUARE and m == 1))
            ):
                continue
            target = DECODE[entry["bits"]][column if large else 3]
            yield Figure(f"`{entry['format']}`", f"m = {m}, {size(entry)}", entry["x_floor"], target)


def _few_rows(entries: Sequence[Record]) -> Iterable[Figure]:
    for entry in ours(entries):
        if entry["m"] in FEW_ROWS and entry["g"] == 64:
            least = max(entry["floor"], entry["ops"] / entry["peak"])
            yield Figure(
                f"`{entry['format']}`",
                f"m = {entry['m']}, {size(entry)}",
                entry["time_p50"] / least,
                FEW.get(shape_of(entry), 1.5),
            )


def _against(entries: Sequence[Record], m: int) -> Iterable[Figure]:
    """Fastest peer of equal bits, which should take 1.2 times as long, at one number of rows."""
    for entry in ours(entries):
        peers = [
            other["time_p50"]
            for other in entries
            if other["provider"] in PEERS and all(other[key] == entry[key] for key in ("id", "m", "n", "k", "bits"))
        ]
        if entry["m"] == m and entry["g"] == 64 and peers:
            yield Figure(
                f"`{entry['format']}`", f"m = {m}, {size(entry)}", min(peers) / entry["time_p50"], PEER, at_least=True
            )


def _cublas(entries: Sequence[Record]) -> Iterable[Figure]:
    for m in sorted({entry["m"] for entry in entries}):
        ratios = [entry["x_bf16"] for entry in ours(entries) if entry["m"] == m and entry["x_bf16"]]
        if ratios and m <= 64:
            yield Figure("slowest product of any width", f"m = {m}", min(ratios), 1.0, at_least=True)


def _bits_apart(entries: Sequence[Record]) -> Iterable[Figure]:
    times = {(entry["format"], entry["m"], shape_of(entry)): entry["time_p50"] for entry in ours(entries)}
    one, four = (times.get((name, 1, (8192, 8192))) for name in ("lut1_g64", "lut4_g64"))
    if one and four:
        yield Figure("lut4 over lut1", "m = 1, 8192 x 8192", four / one, BITS_APART, at_least=True)


def _prefill(entries: Sequence[Record], every: Sequence[Record]) -> Iterable[Figure]:
    """Each product against cuBLAS of its own run, of which `entries` may have another one's, if that is newer."""
    for entry in sorted(ours(entries), key=lambda e: (shape_of(e), e["m"])):
        m, four = entry["m"], entry["format"] in ("lut4_g64", "int4_g64") and entry["dtype"] == "bf16"
        if m < 64 or (not four and m < 256):
            continue
        target = (PREFILL | (PREFILL_8192 if shape_of(entry) == (8192, 8192) else {})).get(m, 1.02) if four else 1.02
        yield Figure(f"`{entry['format']}` {size(entry)}", f"m = {m}", 1 / over_cublas(entry, every), target)


def _prefill_peers(entries: Sequence[Record], every: Sequence[Record]) -> Iterable[Figure]:
    """The same against the peer."""
    for entry in sorted(ours(entries), key=lambda e: (shape_of(e), e["m"])):
        for other in every:
            if other["provider"] == "humming" and all(
                other[key] == entry[key] for key in ("id", "m", "n", "k", "bits")
            ):
                yield Figure(
                    f"`{entry['format']}` {size(entry)}",
                    f"m = {entry['m']}",
                    other["time_p50"] / entry["time_p50"],
                    1.0,
                    at_least=True,
                )


def _nested(entries: Sequence[Record]) -> Iterable[Figure]:
    for entry in ours(entries):
        if entry["m"] <= 16 and str(entry["format"]).startswith(("nest8", "trunc8")):
            yield Figure(f"`{entry['format']}`", f"m = {entry['m']}, {size(entry)}", entry["x_floor"], NESTED)


def _nested_speed(entries: Sequence[Record]) -> Iterable[Figure]:
    for entry in ours(entries):
        target = NESTED_SPEED.get(str(entry["format"]).removesuffix("_g128"))
        if entry["m"] == 1 and shape_of(entry) == (16384, 16384) and target:
            yield Figure(
                f"`{entry['format']}`", "m = 1, 16384 x 16384, x torch bf16", entry["x_bf16"], target, at_least=True
            )


def _matgptq(entries: Sequence[Record]) -> Iterable[Figure]:
    for entry in ours(entries):
        (n, k), m = shape_of(entry), entry["m"]
        if n == k and (n, m) in MATGPTQ and entry["format"] == "nest8s4_g128":
            value = MATGPTQ[n, m] * 1e-6 / entry["time_p50"]
            yield Figure(
                f"`{entry['format']}`", f"m = {m}, {size(entry)}", value, 1.8 if m < 16 else 4.0, at_least=True
            )


def _sparse(entries: Sequence[Record]) -> Iterable[Figure]:
    dense = {
        (entry["m"], shape_of(entry)): entry["time_p50"] for entry in ours(entries) if "_sp" not in entry["format"]
    }
    for entry in ours(entries):
        if "_sp" not in entry["format"]:
            continue
        row, where = f"`{entry['format']}`", f"m = {entry['m']}, {size(entry)}"
        if entry["m"] == 1:
            yield Figure(row, f"{where}, x floor", entry["x_floor"], SPARSE_FLOOR)
            yield Figure(
                row, f"{where}, dense int4 over it", dense[1, shape_of(entry)] / entry["time_p50"], 1.0, at_least=True
            )
        elif entry["m"] == 2048:
            yield Figure(row, f"{where}, x cuBLAS time", 1 / entry["x_bf16"], SPARSE_ROWS)


def section(path: Path) -> str:
    """The tables of one file of records: what its formats and numbers of rows have targets for."""
    every = [entry for entry in read([path]) if entry["status"] == "ok" and entry["dtype"] in ("bf16", "fp16")]
    entries = newest(every)
    if not ours(entries) or not on_gpu(entries):
        return ""
    names = [str(entry["format"]) for entry in ours(entries)]
    if any("_sp" in name for name in names):
        tables = [shown("16:32 sparse weights", _sparse(entries))]
    elif any(name.startswith("nest8") for name in names):
        tables = [
            shown("Slices, time over the floor of the planes they read", _nested(entries)),
            shown("Slices, speed", _nested_speed(entries)),
            shown("MatGPTQ's 4-bit kernel over it", _matgptq(entries)),
        ]
    elif min(entry["m"] for entry in ours(entries)) == 1:
        tables = [
            *(
                shown("Time over the floor", [f for f in _decode(entries) if f.column.startswith(f"m = {m},")])
                for m in (1, 8, 16)
            ),
            shown("Time over the larger of floor and operations", _few_rows(entries)),
            *(
                shown("Fastest peer of equal bits over it", _against(entries, m))
                for m in sorted({e["m"] for e in entries})
            ),
            shown("cuBLAS bf16 over it", _cublas(entries)),
            shown("Widths", _bits_apart(entries)),
        ]
    else:
        dtypes = "/".join(sorted({str(entry["dtype"]) for entry in entries}))
        cublas, peers = _prefill(entries, every), _prefill_peers(entries, every)
        tables = [shown(f"Time over cuBLAS {dtypes}", cublas), shown("humming over it", peers)]
    first = entries[0]
    title = f"**{first['device']}**, {str(first['date'])[:10]}, {first['commit']}, `{path.as_posix()}`:"
    return "\n\n".join([title, *filter(None, tables)])


def main(argv: list[str] | None = None) -> int:
    """Print the tables or put them into a file; returns 0, or 2 if records or markers are missing."""
    return command(argv, NAME, NAME, section, __doc__)


if __name__ == "__main__":
    sys.exit(main())
