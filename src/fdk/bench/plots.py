"""Figures from records, as SVG and PNG: roofline, speed-up over torch bf16, time over bits.

`python -m fdk.bench.plots RECORDS... --output-dir FOLDER` draws them again at any time; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from fdk.bench.records import Record, RecordError, read
from fdk.errors import FormatError
from fdk.formats import parse

# Okabe and Ito's palette, which stays distinct for colour-blind readers; yellow is left out on a light background.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
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


def provider_label(entry: Record) -> str:
    """Who ran it: fdk with its kernel, or the peer; the source's fp16 benchmarks are named."""
    provider = str(entry["provider"])
    label = {
        "torch-bf16": "torch bf16",
        "torch-fp16": "torch fp16",
        "torch-float32": "torch float32",
        "torch-int4pack": "torch int4pack",
        "bitsandbytes-nf4": "bitsandbytes NF4",
    }.get(provider, provider)
    return f"fdk {entry['test']}" if str(entry["test"]).startswith("marlin") else label


def caption(entries: Sequence[Record]) -> str:
    """Device, threads and date of records that share them."""
    first = entries[0]
    threads = first.get("threads")
    parts = [str(first.get("device"))]
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    dates = sorted({str(entry.get("date", ""))[:10] for entry in entries})
    parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return ", ".join(parts)


def newest(entries: Iterable[Record]) -> list[Record]:
    """The last record of every line, so that a folder of many runs draws the newest of each."""
    found: dict[tuple, Record] = {}
    for entry in sorted(entries, key=lambda e: str(e.get("date"))):
        found[tuple(entry[name] for name in ("test", "provider", "format", "dtype", "m", "n", "k"))] = entry
    return list(found.values())


def titled(axes, headline: str, entries: Sequence[Record]) -> None:
    """A bold headline with the caption below it, both at the left."""
    axes.set_title(f"{headline}\n", loc="left", fontsize=12, fontweight="bold")
    axes.text(0, 1.015, caption(entries), transform=axes.transAxes, fontsize=9, color=GREY, va="bottom")


def us_label(value: float, _position: object = None) -> str:
    return f"{value:g}"


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
    """Arithmetic intensity against GFLOP/s under the measured read bandwidth and bf16 rate, for one shape."""
    figure, axes = plt.subplots(figsize=(8.6, 5.4), layout="constrained")
    read = max(entry["read_bandwidth"] for entry in entries)
    peak = max(entry["peak"] for entry in entries)
    points = [(entry["ops"] / entry["bytes_rw"], entry["ops"] / entry["time_p50"] / 1e9) for entry in entries]
    left = min(x for x, _ in points) / 1.6
    right = max(max(x for x, _ in points), peak / read) * 1.8
    corner = peak / read
    axes.plot([left, corner, right], [left * read / 1e9, peak / 1e9, peak / 1e9], color=GREY, linewidth=1.6, zorder=1)
    series: dict[str, list[tuple[Record, float, float]]] = {}
    for entry, (x, y) in zip(entries, points, strict=True):
        label = f"{provider_label(entry)} {entry['format']}"
        if entry["provider"].startswith("torch-") and entry["format"] in ("bf16", "fp16", "fp32"):
            label = provider_label(entry)
        series.setdefault(label, []).append((entry, x, y))
    for index, (label, found) in enumerate(sorted(series.items())):
        found.sort(key=lambda point: point[0]["m"])
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        }
        axes.plot([x for _, x, _ in found], [y for _, _, y in found], label=label, linewidth=1, markersize=5, **style)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(min(y for _, y in points) / 1.6, peak / 1e9 * 2.2)
    axes.set_xlabel("arithmetic intensity, FLOP per byte moved")
    axes.set_ylabel("GFLOP/s")
    ms = sorted({entry["m"] for entry in entries})
    axes.annotate(
        f"bf16 matmul {peak / 1e9:.0f} GFLOP/s", (right, peak / 1e9), xytext=(-4, 5), textcoords="offset points",
        ha="right", color=GREY, fontsize=9,
    )  # fmt: skip
    axes.annotate(
        f"read {read / 1e9:.1f} GB/s", (0.02, 0.93), xycoords="axes fraction", color=GREY, fontsize=9, va="top",
    )  # fmt: skip
    n, k = shape_of(entries[0])
    rows = f"m = {ms[0]}" if len(ms) == 1 else f"m = {', '.join(map(str, ms))} from left to right"
    titled(axes, f"Roofline, [{n}, {k}], {rows}", entries)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def speedup(plt, entries: list[Record]):
    """Speed-up over torch bf16 against m, one line for every format and provider, named at its right end."""
    found: dict[str, list[Record]] = {}
    for entry in entries:
        if entry["provider"] != "torch-bf16" and entry.get("x_bf16"):
            label = provider_label(entry)
            if entry["format"] not in ("fp16", "fp32"):
                label += f" {entry['format']}"
            found.setdefault(label, []).append(entry)
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 5.4), layout="constrained")
    ms = sorted({entry["m"] for group in found.values() for entry in group})
    places = {m: place for place, m in enumerate(ms)}
    # Log axis: slowdowns and speed-ups of the same factor are equally far from 1.
    axes.axhline(1, color=GREY, linewidth=1.2, linestyle="--")
    ends = []
    for index, (label, group) in enumerate(sorted(found.items())):
        group.sort(key=lambda entry: entry["m"])
        colour = COLOURS[index % len(COLOURS)]
        dashed = not label.startswith("fdk")
        axes.plot(
            [places[e["m"]] for e in group], [e["x_bf16"] for e in group], color=colour, linewidth=1.8,
            marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)], linestyle=":" if dashed else "-",
        )  # fmt: skip
        ends.append((label, group[-1]["x_bf16"], places[group[-1]["m"]], colour))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(us_label)
    axes.set_xticks(range(len(ms)), [str(m) for m in ms])
    axes.set_xlabel("m, rows of activations")
    axes.set_ylabel("speed-up over torch bf16 (median of ratios)")
    axes.set_xlim(-0.15 - 0.05 * len(ms), len(ms) - 1 + 0.1 * len(ms))
    label_ends(axes, ends, len(ms) - 1)
    axes.text(0.0, 1, " torch bf16 = 1", transform=axes.get_yaxis_transform(), fontsize=9, color=GREY, va="bottom")
    n, k = shape_of(entries[0])
    titled(axes, f"Speed-up over torch bf16, [{n}, {k}]", entries)
    return figure


def label_ends(axes, ends: list[tuple[str, float, float, str]], last: float) -> None:
    """Name lines at their right ends, outside the axes, in their colours, moved apart where they would overlap."""
    from math import log2

    low, high = (log2(limit) for limit in axes.get_ylim())
    heights = [(log2(y) - low) / (high - low) for _, y, _, _ in ends]
    for (label, y, x, colour), height in zip(ends, spread_labels(heights, 0.05), strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.02, height), textcoords="axes fraction", color=colour, fontsize=9, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
        )  # fmt: skip


def over_bits(plt, entries: list[Record]):
    """Time and fraction of the streaming floor against bits, for our table formats and their peers; one m."""
    ours = sorted(
        (e for e in entries if e["provider"].startswith("fdk") and e["test"] in ("mv_lut8", "mm_lut8")),
        key=lambda e: e["bits"],
    )
    if len({entry["bits"] for entry in ours}) < 2:
        return None
    kinds: dict[str, list[Record]] = {}
    for entry in ours:
        kinds.setdefault(f"{entry['provider']} {parse(entry['format']).kind.name}", []).append(entry)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8.6, 6.4), layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    for index, (label, group) in enumerate(kinds.items()):
        style = {"color": COLOURS[index], "marker": MARKERS[index], "linewidth": 1.8}
        bits = [e["bits"] for e in group]
        times = [e["time_p50"] * 1e6 for e in group]
        spread = [[t - e["time_p20"] * 1e6 for t, e in zip(times, group, strict=True)],
                  [e["time_p80"] * 1e6 - t for t, e in zip(times, group, strict=True)]]  # fmt: skip
        upper.errorbar(bits, times, yerr=spread, label=label, capsize=3, elinewidth=1, **style)
        lower.plot(bits, [1 / e["x_floor"] for e in group], label=label, **style)
        if index == 0:
            floor = [e["floor"] * 1e6 for e in group]
            upper.plot(bits, floor, color=GREY, linestyle="--", linewidth=1.4, label="streaming floor, same bytes")
    others = [e for e in entries if not e["provider"].startswith(("fdk", "reference")) and e["bits"] <= 16]
    for index, entry in enumerate(sorted(others, key=provider_label), len(kinds)):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
        upper.plot([entry["bits"]], [entry["time_p50"] * 1e6], label=provider_label(entry), **style)
        lower.plot([entry["bits"]], [1 / entry["x_floor"]], **style)
    upper.set_ylabel("us per product")
    upper.set_ylim(bottom=0)
    lower.set_ylabel("fraction of floor speed")
    lower.set_ylim(0, max(1.1, 1.1 * max(1 / e["x_floor"] for e in [*ours, *others])))
    lower.axhline(1, color=GREY, linestyle="--", linewidth=1.2)
    widths = sorted({e["bits"] for e in [*ours, *others]})
    lower.set_xticks(widths, [str(bits) for bits in widths])
    lower.set_xlabel("bits per weight, without scales")
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    n, k = shape_of(entries[0])
    titled(upper, f"Time over bits, m = {entries[0]['m']}, [{n}, {k}]", [*ours, *others])
    return figure


def _grouped(entries: list[Record], *names: str) -> Iterable[tuple[tuple, list[Record]]]:
    def key(entry: Record) -> tuple:
        return tuple(entry.get(name) for name in names)

    for values, group in groupby(sorted(entries, key=lambda e: tuple(map(str, key(e)))), key):
        yield values, list(group)


def _save(plt, figure, folder: Path, name: str) -> list[Path]:
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
    entries = [e for e in read(sources) if e["status"] == "ok" and e["provider"] != "reference" and not _is_ref(e)]
    if not entries:
        raise PlotError("no record has a time to draw; the runs failed or were skipped, see the field 'reason'")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    devices = {entry.get("device") for entry in entries}
    for (device, threads, n, k), group in _grouped(entries, "device", "threads", "n", "k"):
        group = newest(group)
        tail = f"{n}x{k}" + (f"_t{threads}" if threads is not None else "")
        if len(devices) > 1:
            tail += "_" + "".join(c if c.isalnum() else "-" for c in str(device)).strip("-").lower()
        drawn += _save(plt, roofline(plt, group), folder, f"roofline_{tail}")
        if (figure := speedup(plt, group)) is not None:
            drawn += _save(plt, figure, folder, f"speedup_{tail}")
        for (m,), rows in _grouped(group, "m"):
            if (figure := over_bits(plt, rows)) is not None:
                drawn += _save(plt, figure, folder, f"bits_{tail}_m{m}")
    return drawn


def _is_ref(entry: Record) -> bool:
    return str(entry["test"]).endswith("_ref")


def main(argv: list[str] | None = None) -> int:
    """Draw figures; returns 0, or 2 if records or matplotlib are missing or the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m fdk.bench.plots", description=__doc__)
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
