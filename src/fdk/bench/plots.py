"""Figures from records, as SVG and PNG: roofline, speed-up over torch bf16, time over bits.

`python -m fdk.bench.plots RECORDS... --output-dir FOLDER` draws them again at any time; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import log2
from pathlib import Path

from fdk.bench.records import Record, RecordError, read
from fdk.bench.runs import fullest_run, needed_runs, pieces
from fdk.errors import FormatError
from fdk.formats import parse

# Okabe and Ito's palette, which stays distinct for colour-blind readers; yellow is left out on a light background.
# Our lines take their colour from the width, their marker from the kind of format.
COLOUR_OF_BITS = dict(
    zip(
        range(1, 9),
        ("#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#E69F00", "#882255", "#000000"),
        strict=True,
    )
)
MARKER_OF_KIND = {"lut": "o", "int": "s", "uint": "^", "nf": "D", "fp": "v", "nest": "o", "trunc": "X"}
# Others are dotted, black or grey, with hollow markers.
PEERS = {
    "torch-bf16": ("torch bf16", "#000000", "s"),
    "torch-fp16": ("torch fp16", "#000000", "v"),
    "torch-float32": ("torch float32", "#777777", "o"),
    "torch-int4pack": ("torch int4pack", "#000000", "^"),
    "bitsandbytes-nf4": ("bitsandbytes NF4", "#777777", "D"),
    "torch-tinygemm": ("torch tinygemm", "#000000", "^"),
    "humming": ("humming int{}", "#444444", "v"),
    "gemlite": ("gemlite int{}", "#999999", "P"),
    "plain-bf16": ("bf16 in plain C++", "#000000", "s"),
    "byte-table": ("byte table in plain C++", "#777777", "D"),
}
GREY = "#555555"


class PlotError(Exception):
    """Plots cannot be drawn; the text names the remedy."""


def pyplot():
    """matplotlib.pyplot without a display; PlotError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError(
            "plots need matplotlib, which is not installed; pip install 'fused-dequantisation-kernels[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#dddddd",
            "font.size": 10,
            "svg.fonttype": "none",
            "svg.hashsalt": "fdk",
            "savefig.dpi": 130,
        }
    )
    return plt


def shape_of(entry: Record) -> tuple[int, int]:
    return entry["n"], entry["k"]


def label_of(entry: Record, width: bool = True) -> str:
    """Who ran it: fdk's format with the kernel where one was asked for or the reference had to serve, or the peer.

    width: whether the label of a peer with several widths says which.
    """
    provider = str(entry["provider"])
    if provider in PEERS:
        return PEERS[provider][0].format(entry["bits"] if width else "")
    if provider == "fdk" and entry.get("kernel") == "reference":
        provider = "fdk:reference"
    return f"{provider} {entry['format']}"


def family_of(entry: Record) -> str:
    """A label for entries of all widths of a peer."""
    return label_of(entry, width=False)


def style_of(entry: Record) -> dict[str, object]:
    """Colour, marker and line of an entry's series, the same in every figure."""
    if str(entry["provider"]) in PEERS:
        _, colour, marker = PEERS[entry["provider"]]
        return {"color": colour, "marker": marker, "linestyle": ":", "linewidth": 1.3, "markerfacecolor": "white"}
    fmt = parse(entry["format"])
    marker = MARKER_OF_KIND.get(fmt.kind.name, "P")
    line = "-" if entry["provider"] == "fdk" else "--"
    return {"color": COLOUR_OF_BITS[fmt.width], "marker": marker, "linestyle": line, "linewidth": 1.8}


def series_of(entries: Iterable[Record]) -> dict[tuple[str, object], list[Record]]:
    """Entries by label and run, each in ascending m; ours by width first, then peers.

    Points of two runs are never joined: a process has its own memory and its own moment.
    """
    found: dict[tuple[str, object], list[Record]] = {}
    for entry in sorted(entries, key=lambda e: (e["provider"] in PEERS, e["bits"], label_of(e), e["m"])):
        found.setdefault((label_of(entry), entry.get("id")), []).append(entry)
    return found


def caption(entries: Sequence[Record]) -> str:
    """Device, threads and date of records that share them, and of how many runs they are."""
    first = entries[0]
    threads = first.get("threads")
    parts = [str(first.get("device"))]
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    dates = sorted({str(entry.get("date", ""))[:10] for entry in entries})
    parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    if (runs := len({entry.get("id") for entry in entries})) > 1:
        parts.append(f"{runs} runs, a line for each")
    return ", ".join(parts)


def titled(axes, headline: str, entries: Sequence[Record]) -> None:
    """A bold headline with the caption below it, both at the left."""
    axes.set_title(f"{headline}\n", loc="left", fontsize=12, fontweight="bold")
    axes.text(0, 1.015, caption(entries), transform=axes.transAxes, fontsize=9, color=GREY, va="bottom")


def spread_labels(ys: Sequence[float], gap: float) -> list[float]:
    """Positions for labels at ys, moved apart to at least `gap`, in the order of ys and near them."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    placed = [ys[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
                moved = True
        if not moved:
            break
    found = [0.0] * len(ys)
    for position, i in zip(placed, order, strict=True):
        found[i] = position
    return found


def roofline(plt, entries: list[Record]):
    """Arithmetic intensity against GFLOP/s (TFLOP/s) under the measured read bandwidth and bf16 rate, for one shape."""
    figure, axes = plt.subplots(figsize=(9.2, 5.4), layout="constrained")
    read = max(entry["read_bandwidth"] for entry in entries)
    peak = max(entry["peak"] for entry in entries)
    unit, prefix = (1e12, "T") if peak >= 1e13 else (1e9, "G")

    def place(entry: Record) -> tuple[float, float]:
        return entry["ops"] / entry["bytes_rw"], entry["ops"] / entry["time_p50"] / unit

    points = [place(entry) for entry in entries]
    corner = peak / read
    left = min(x for x, _ in points) / 1.6
    right = max(corner, *(x for x, _ in points)) * 1.8
    bandwidth = f"{read / 1e12:.2f} TB/s" if read >= 1e12 else f"{read / 1e9:.1f} GB/s"
    ceiling = f"ceilings measured in the same run:\nread {bandwidth}\nbf16 matmul {peak / unit:.0f} {prefix}FLOP/s"
    heights = [left * read / unit, peak / unit, peak / unit]
    axes.plot([left, corner, right], heights, color=GREY, linewidth=2, zorder=1, label=ceiling)
    for (label, _), group in series_of(entries).items():
        xs, ys = zip(*(place(entry) for entry in group), strict=True)
        axes.plot(xs, ys, label=label, markersize=5, **style_of(group[0]))
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(min(min(y for _, y in points), heights[0]) / 1.5, max(peak / unit, *(y for _, y in points)) * 1.6)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("arithmetic intensity, FLOP per byte moved")
    axes.set_ylabel(f"{prefix}FLOP/s")
    ms = sorted({entry["m"] for entry in entries})
    n, k = shape_of(entries[0])
    rows = f"m = {ms[0]}" if len(ms) == 1 else f"m = {', '.join(map(str, ms))} from left to right"
    titled(axes, f"Roofline, [{n}, {k}], {rows}", entries)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def speedup(plt, entries: list[Record]):
    """Speed-up over torch bf16 against m, one line for every format and provider, named at its right end."""
    timed = [e for e in entries if e["provider"] != "torch-bf16" and e.get("x_bf16")]
    # In the order of series_of, so that lines lie on one another as in the other figures.
    order = {label: place for place, (label, _) in enumerate(series_of(timed))}
    found = sorted(pieces(timed, label_of), key=lambda group: order[label_of(group[0])])
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9.2, 5.4), layout="constrained")
    shown = [entry for group in found for entry in group]
    ms = sorted({entry["m"] for entry in shown if entry["m"] > 0})
    axes.axhline(1, color=GREY, linewidth=1.2, linestyle="--")
    ends: dict[str, tuple[str, float, float, str]] = {}
    for group in found:
        label, style = label_of(group[0]), style_of(group[0])
        axes.plot([e["m"] for e in group], [e["x_bf16"] for e in group], markersize=5, **style)
        end = (label, group[-1]["x_bf16"], group[-1]["m"], style["color"])
        ends[label] = max(ends.get(label, end), end, key=lambda e: e[2])
    # Log axes: a slow-down and a speed-up of the same factor are equally far from 1.
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    named = spaced(ms)
    axes.set_xticks(ms, [str(m) if m in named else "" for m in ms], fontsize=10 if len(named) <= 8 else 7.5)
    axes.minorticks_off()
    axes.set_xlabel("m, rows of activations")
    axes.set_ylabel("speed-up over torch bf16 (median of ratios)")
    axes.set_xlim(ms[0] / 1.6, ms[-1] * 1.6)
    label_ends(axes, list(ends.values()))
    axes.text(0.0, 1, " torch bf16 = 1", transform=axes.get_yaxis_transform(), fontsize=9, color=GREY, va="bottom")
    n, k = shape_of(entries[0])
    titled(axes, f"Speed-up over torch bf16, [{n}, {k}]", shown)
    return figure


def spaced(ms: Sequence[int]) -> set[int]:
    """Those of ms whose labels fit on a log axis beside each other, powers of two before others."""
    octaves = log2(ms[-1] / ms[0])

    def apart(m: int, other: int) -> bool:
        digits = len(str(m)) + len(str(other))
        return abs(log2(m / other)) >= max(0.036, 0.006 * digits) * octaves

    found: set[int] = set()
    for m in sorted(ms, key=lambda m: (m & (m - 1) != 0, m)):
        if all(apart(m, other) for other in found):
            found.add(m)
    return found


def label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Name lines at their right ends, outside the axes, in their colours, moved apart where they would overlap."""
    low, high = (log2(limit) for limit in axes.get_ylim())
    heights = [(log2(y) - low) / (high - low) for _, y, _, _ in ends]
    for (label, y, x, colour), height in zip(ends, spread_labels(heights, 0.05), strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.02, height), textcoords="axes fraction", color=colour, fontsize=9, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def over_bits(plt, entries: list[Record]):
    """Time and fraction of the streaming floor against bits, for our formats and their peers; one m."""
    kinds: dict[str, list[Record]] = {}
    for entry in sorted(entries, key=lambda e: e["bits"]):
        if entry["provider"] not in PEERS:
            kinds.setdefault(label_of(entry).replace(entry["format"], parse(entry["format"]).kind.name), []).append(
                entry
            )
    if max((len({e["bits"] for e in group}) for group in kinds.values()), default=0) < 2:
        return None
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9.2, 6.6), layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    longest = max(kinds.values(), key=len)
    peers = sorted((e for e in entries if e["provider"] in PEERS), key=family_of)
    floors = {e["bits"]: e["floor"] * 1e6 for e in [*peers, *longest]}
    upper.plot(
        *zip(*sorted(floors.items()), strict=True),
        color=GREY,
        linestyle="--",
        label="streaming floor\nfor the same bytes",
    )
    for (label, group), colour in zip(kinds.items(), COLOUR_OF_BITS.values(), strict=False):
        style = style_of(group[0]) | {"color": colour}
        bits, times = [e["bits"] for e in group], [e["time_p50"] * 1e6 for e in group]
        below = [max(0.0, e["time_p50"] - e["time_p20"]) * 1e6 for e in group]
        above = [max(0.0, e["time_p80"] - e["time_p50"]) * 1e6 for e in group]
        upper.errorbar(bits, times, yerr=[below, above], label=label, capsize=3, elinewidth=1, **style)
        lower.plot(bits, [1 / e["x_floor"] for e in group], **style)
    for label, same in groupby(peers, family_of):
        group = sorted(same, key=lambda e: e["bits"])
        widths = [e["bits"] for e in group]
        style = style_of(group[0])
        upper.plot(widths, [e["time_p50"] * 1e6 for e in group], label=label, **style)
        lower.plot(widths, [1 / e["x_floor"] for e in group], **style)
    plain = {e["bits"]: e["floor_plain"] * 1e6 for e in [*peers, *longest] if e.get("floor_plain")}
    if plain:
        upper.plot(*zip(*sorted(plain.items()), strict=True), color=GREY, linestyle=":", label="floor, plain launches")
    # On logarithmic axes time that is proportional to bits is a straight line parallel to the floor's.
    upper.set_xscale("log", base=2)
    upper.set_yscale("log", base=2)
    upper.yaxis.set_major_formatter("{x:g}")
    upper.set_ylabel("us per product (bars: p20 to p80)")
    shown = [*peers, *(e for group in kinds.values() for e in group)]
    lower.set_ylabel("fraction of the floor's speed")
    lower.set_ylim(0, 1.1 * max(1, *(1 / e["x_floor"] for e in shown)))
    lower.axhline(1, color=GREY, linestyle="--")
    widths = sorted({e["bits"] for e in shown})
    lower.set_xticks(widths, [str(bits) for bits in widths])
    lower.minorticks_off()
    lower.set_xlabel("bits per weight, without scales")
    upper.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    n, k = shape_of(entries[0])
    titled(upper, f"Time over bits, m = {entries[0]['m']}, [{n}, {k}]", shown)
    return figure


def over_size(plt, entries: list[Record]):
    """Fraction of the floor's speed against the bytes moved, for one m on a GPU: a line for each of our formats."""
    found = {
        label: group
        for label, group in series_of(entries).items()
        if group[0]["provider"] not in PEERS and len({e["bytes_rw"] for e in group}) > 1
    }
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9.2, 5.4), layout="constrained")
    for (label, _), unordered in found.items():
        group = sorted(unordered, key=lambda e: e["bytes_rw"])
        style = style_of(group[0])
        axes.plot([e["bytes_rw"] / 1e6 for e in group], [1 / e["x_floor"] for e in group], label=label, **style)
    axes.axhline(1, color=GREY, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, None)
    axes.set_xlabel("MB moved: codes, scales, activations, output")
    axes.set_ylabel("fraction of the streaming floor's speed")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    titled(axes, f"Fraction of the floor over size, m = {entries[0]['m']}", entries)
    return figure


def _grouped(entries: list[Record], *names: str) -> Iterable[tuple[tuple, list[Record]]]:
    def key(entry: Record) -> tuple:
        return tuple(entry.get(name) for name in names)

    for values, group in groupby(sorted(entries, key=lambda e: tuple(map(str, key(e)))), key):
        yield values, list(group)


def save(plt, figure, folder: Path, name: str) -> list[Path]:
    """Write SVG and PNG under temporary names first, so that a broken write leaves the old figure."""
    paths = []
    for suffix in ("svg", "png"):
        path = folder / f"{name}.{suffix}"
        partial = folder / f".{name}.partial.{suffix}"
        metadata = {"Date": None} if suffix == "svg" else {}
        try:
            figure.savefig(partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        paths.append(path)
    plt.close(figure)
    return paths


def draw(sources: Iterable[Path], folder: Path) -> list[Path]:
    """Draw every figure that the records of `sources` (files or folders) allow into `folder`; the paths written.

    Raises RecordError if the records cannot be read, PlotError if there is nothing to draw or no matplotlib.
    """
    plt = pyplot()
    entries = [e for e in read(sources) if e["status"] == "ok" and drawable(str(e["test"]))]
    if not entries:
        raise PlotError("no record has a time to draw; the runs failed or were skipped, see the field 'reason'")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    devices = {entry.get("device") for entry in entries}
    for (device, threads, n, k), group in _grouped(entries, "device", "threads", "n", "k"):
        group = needed_runs(group)
        tail = f"{n}x{k}" + (f"_t{threads}" if threads is not None else "")
        if len(devices) > 1:
            tail += "_" + "".join(c if c.isalnum() else "-" for c in str(device)).strip("-").lower()
        drawn += save(plt, roofline(plt, fullest_run(group)), folder, f"roofline_{tail}")
        if (figure := speedup(plt, group)) is not None:
            drawn += save(plt, figure, folder, f"speedup_{tail}")
        for (m,), rows in _grouped(group, "m"):
            if (figure := over_bits(plt, fullest_run(rows))) is not None:
                drawn += save(plt, figure, folder, f"bits_{tail}_m{m}")
    on_gpus = [entry for entry in entries if str(entry.get("isa") or "").startswith("sm_")]
    for (device, m), group in _grouped(on_gpus, "device", "m"):
        if (figure := over_size(plt, fullest_run(group))) is not None:
            tail = "" if len(devices) == 1 else "_" + "".join(c if c.isalnum() else "-" for c in str(device)).lower()
            drawn += save(plt, figure, folder, f"sizes_m{m}{tail}")
    return drawn


def drawable(test: str) -> bool:
    """Not references, the fp16 grids of `marlin`, or what is no product: they stay in the records."""
    return not test.endswith("_ref") and not test.startswith(("marlin", "memcpy", "reduce_sum"))


def main(argv: list[str] | None = None) -> int:
    """Draw figures; returns 0, or 2 if records or matplotlib are missing or the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="fdk plot", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, help=".jsonl files of the benchmark, or folders with them")
    parser.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for the figures (out)")
    try:
        args = parser.parse_args(argv)
        for path in draw(args.records, args.output_dir):
            print(path)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (PlotError, RecordError, FormatError) as error:
        print(f"fdk plot: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or args.output_dir
        print(f"fdk plot: cannot write {where} ({error.strerror}); choose another --output-dir", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
