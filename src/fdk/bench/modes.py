"""The kernel benchmarks of two of the projects before this one, as modes of the command: sizes, formats, tables.

Everything is measured, gated and recorded as in any other run; a mode chooses what is run and adds a table and a
figure. What the command line names goes before what a mode would choose.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from fdk.bench.records import Record, read
from fdk.bench.report import markdown, significant
from fdk.errors import FormatError
from fdk.formats import parse


class Mode(ABC):
    """What a mode runs by default on a GPU (True) and on a CPU (False), and what it prints at the end."""

    batches: ClassVar[dict[bool, tuple[int, ...]]]
    shapes: ClassVar[dict[bool, tuple[str, ...]]]
    widths: ClassVar[tuple[int, ...]]

    @abstractmethod
    def formats(self, widths: Sequence[int], group: str) -> list[str]:
        """Format names of the widths; `group` is g128 or chan."""

    @abstractmethod
    def summary(self, records: list[Record]) -> str:
        """The table over all records of a run, Markdown."""

    def draw(self, path: Path, folder: Path) -> list[Path]:
        """Figures from a file of records, beside those that every run can have."""
        return []

    def fill(self, args: argparse.Namespace, on_cpu: bool) -> None:
        """Put the mode's choices where the command line says nothing."""
        widths = [bits for bits in args.bits or self.widths if bits != 16]
        groups = ["chan" if g == "chan" else f"g{g}" for g in args.g or ["128"]]
        args.format = args.format or [name for group in groups for name in self.formats(widths, group)]
        args.bits, args.g = [16], None
        args.m = args.m or list(self.batches[not on_cpu])
        if not args.shapes and args.k is None and args.n == ["k"]:
            args.shapes = list(self.shapes[not on_cpu])
        args.providers = args.providers or ["fdk", "torch-bf16"]
        args.threads = args.threads or ["all"]


class MatGPTQ(Mode):
    """Slices of one 8-bit master at small batches: speed-up over torch.nn.functional.linear in bf16.

    Rounded slices, cut ones, and the integers that `QuantisedWeight.export` makes of rounded ones.
    """

    batches: ClassVar = dict.fromkeys((True, False), (1, 2, 4, 8, 16, 32, 64))
    shapes: ClassVar = {True: ("2048x2048", "4096x4096", "8192x8192", "16384x16384"), False: ("2048x2048",)}
    widths = (2, 3, 4, 6, 8)

    def formats(self, widths: Sequence[int], group: str) -> list[str]:
        return [f"{kind}{bits}_{group}" for kind in ("nest8s", "trunc8s", "int") for bits in widths]

    def summary(self, records: list[Record]) -> str:
        found = speedups(records)
        batches = sorted({entry["m"] for entry in found})
        rows: dict[tuple, dict[int, str]] = {}
        for entry in found:
            key = (entry["n"], entry["k"], entry["bits"], entry["format"], entry["provider"])
            rows.setdefault(key, {})[entry["m"]] = significant(entry["x_bf16"])
        head = ["n x k, format: x torch bf16", *(f"batch {m}" for m in batches)]
        table = []
        for n, k, bits, name, provider in sorted(rows):
            label = f"{n} x {k} `{name}`" + ("" if provider == "fdk" else f" {provider}")
            table.append([label, *(rows[n, k, bits, name, provider].get(m, "-") for m in batches)])
        return "speed-up over torch.nn.functional.linear in bf16\n\n" + markdown(table, head)

    def draw(self, path: Path, folder: Path) -> list[Path]:
        """matgptq.svg and .png: speed-up against batch, a panel for each size, a line for each format."""
        from fdk.bench import plots

        entries = speedups(read([path]))
        sizes = sorted({(entry["n"], entry["k"]) for entry in entries})
        if not sizes:
            return []
        plt = plots.pyplot()
        figure, panels = plt.subplots(
            1, len(sizes), figsize=(2.2 + 3.4 * len(sizes), 4.2), layout="constrained", sharey=True, squeeze=False
        )
        batches = sorted({entry["m"] for entry in entries})
        for axes, size in zip(panels[0], sizes, strict=True):
            here = [entry for entry in entries if (entry["n"], entry["k"]) == size]
            for (label, _), group in plots.series_of(here).items():
                xs = [batches.index(entry["m"]) for entry in group]
                axes.plot(xs, [e["x_bf16"] for e in group], label=label, markersize=5, **plots.style_of(group[0]))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.axhline(1, color=plots.GREY, linewidth=1)
            axes.set_xticks(range(len(batches)), [str(m) for m in batches])
            axes.set_title(f"{size[0]} x {size[1]}", fontsize=10)
            axes.set_xlabel("batch")
        panels[0][0].set_ylabel("speed-up over torch bf16")
        panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
        figure.suptitle(plots.caption(entries), fontsize=9, color=plots.GREY)
        return plots.save(plt, figure, folder, "matgptq")


class Int4Matmul(Mode):
    """4-bit integers with zero points, dense and 16:32 sparse, one row of activations and many."""

    batches: ClassVar = {True: (1, 128, 1024, 2048), False: (1, 128)}
    shapes: ClassVar = {
        True: ("1024x1024", "5120x5120", "8192x8192", "16384x16384", "20480x5120", "5120x20480"),
        False: ("1024x1024", "5120x5120"),
    }
    widths = (4,)

    def formats(self, widths: Sequence[int], group: str) -> list[str]:
        names = [f"uint{bits}_{group}" for bits in widths]
        for bits in widths:
            try:
                names.append(str(parse(f"uint{bits}_{group}_sp16of32")))
            except FormatError:
                # 2 and 3 bits have no sparse form.
                continue
        return names

    def summary(self, records: list[Record]) -> str:
        """B x M rows of activations times a weight [S, N], as in the project's own tables."""
        head = ["B", "S", "N", "M", "sparsity", "left", "right", "us", "error"]
        rows = []
        for entry in sorted(timed(records), key=lambda e: (e["m"], e["n"], e["k"])):
            left, sparse, _ = str(entry["format"]).partition("_sp16of32")
            sizes = [str(entry[field]) for field in ("n", "k", "m")]
            time = significant(entry["time_p50"] * 1e6)
            what = ["16:32" if sparse else "", left, str(entry["dtype"])]
            rows.append(["1", *sizes, *what, time, f"{entry['relative_error']:.2e}"])
        note = "weight [S, N] times M rows of activations; error: 2-norm, relative to the product in float64"
        return f"{note}\n\n{markdown(rows, head)}"


def timed(records: list[Record]) -> list[Record]:
    """Records with times; of several numbers of threads the largest."""
    most = max((entry["threads"] or 0 for entry in records), default=0)
    return [entry for entry in records if entry["status"] == "ok" and (entry["threads"] or 0) == most]


def speedups(records: list[Record]) -> list[Record]:
    """Those of low-bit products that stand beside a dense one."""
    return [entry for entry in timed(records) if entry["x_bf16"] and entry["provider"] != "torch-bf16"]


MODES: dict[str, Mode] = {"matgptq": MatGPTQ(), "int4matmul": Int4Matmul()}
"""By the value of --mode."""
