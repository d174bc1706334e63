"""What is benchmarked: cases with their bytes and operations, and the lines that a run consists of.

Test names are those of the source project: `mv` and `mm` multiply by a dense 16-bit weight (one row of activations,
or several), `mv_lut8` and `mm_lut8` by a table weight, `*_ref` are plain torch, `marlin` is the symmetric 4-bit
integer grid with fp16 activations and `marlin_lut` the same grid through a table. `mv_int` and `mm_int` are ours:
integer weights in the dtype of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fdk.formats import parse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of activation dtypes. A dense weight's format is the name of its dtype."""

DENSE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
MARLIN_GROUPS = (64, 128)


@dataclass(frozen=True)
class Line:
    """One row of the results for every m: who multiplies which weight.

    family  what the test name says about the weight: "" dense, "lut8", "int", "marlin", "marlin_lut"
    """

    provider: str
    family: str
    format: str
    dtype: str
    ref: bool = False

    def test(self, m: int) -> str:
        """The benchmark's name for m rows of activations."""
        if self.family.startswith("marlin"):
            return self.family
        return "_".join(["mv" if m == 1 else "mm", *filter(None, [self.family, "ref" if self.ref else ""])])

    @property
    def dense(self) -> bool:
        return self.format in DTYPES

    @property
    def bits(self) -> int:
        return DENSE_BITS[self.format] if self.dense else parse(self.format).width


def operations(m: int, k: int, n: int) -> int:
    """Multiplications and additions of x [m, k] times W [n, k]."""
    return 2 * m * k * n


def weight_bytes(format: str, n: int, k: int, dtype: str) -> int:
    """Bytes of a weight that one product reads: codes (the planes of a slice), scales and zeros, or the dense matrix.

    A table is not counted, as in the source project: it is a few entries, which stay in the cache.
    """
    size = DTYPES[dtype].itemsize
    if format in DTYPES:
        return n * k * DTYPES[format].itemsize
    fmt = parse(format)
    return fmt.bytes_read(n, k, size, zero_size=1)


def activation_bytes(m: int, n: int, k: int, dtype: str) -> int:
    """Bytes of x [m, k], read, and of the output [m, n], written."""
    return m * (k + n) * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Selection:
    """Which lines a run has: the part of the command line that does not concern sizes."""

    bits: tuple[int, ...]
    formats: tuple[str, ...] = ()
    dtype: str = "bf16"
    fdk: tuple[str, ...] = ("fdk",)
    """Providers of ours: "fdk" for the kernel that dispatch chooses, "fdk:NAME" for one kernel."""
    cuda: bool = False
    """Whether it runs on a GPU, where the peers are others."""


def lines(selection: Selection, group: int | None) -> list[Line]:
    """All lines of a shape, before names and providers are filtered; `group` is None for one scale per row."""
    suffix = "chan" if group is None else f"g{group}"
    dtype = selection.dtype
    found: list[Line] = []
    widths = [bits for bits in selection.bits if bits == 16 or not selection.formats]
    formats = [(parse(name).bits, name) for name in selection.formats]
    if formats and 16 not in widths:
        widths.insert(0, 16)
    for bits in widths:
        if bits == 16:
            # A dense float32 weight of usual sizes has no place in GPU inference, and fills the GPU with its copies.
            dense = ["bf16", *(["fp16"] if dtype == "fp16" else []), *([] if selection.cuda else ["fp32"])]
            found += [Line({"fp32": "torch-float32"}.get(d, f"torch-{d}"), "", d, d) for d in dense]
            found.append(Line("reference", "", dtype, dtype, ref=True))
        else:
            formats.append((bits, f"lut{bits}_{suffix}"))
    for bits, name in formats:
        family = "lut8" if parse(name).is_table else "int"
        found += [Line(provider, family, name, dtype) for provider in selection.fdk]
        found.append(Line("reference", family, name, dtype, ref=True))
        # No peer has sparse weights, so beside those it multiplies dense ones of the same groups.
        tail = name.partition("_")[2].partition("_")[0]
        if selection.cuda:
            found += [Line(peer, "int", f"int{bits}_{tail}", dtype) for peer in ("humming", "gemlite")]
        if bits == 4:
            four_bits = "torch-tinygemm" if selection.cuda else "torch-int4pack"
            found.append(Line(four_bits, "int", f"int4_{tail}", dtype))
            found.append(Line("bitsandbytes-nf4", "lut8", f"nf4_{tail}", dtype))
            if not selection.formats:
                found += [Line(provider, "marlin", f"int4_{tail}", "fp16") for provider in selection.fdk]
                found += [Line(provider, "marlin_lut", f"lut4_{tail}", "fp16") for provider in selection.fdk]
    return list(dict.fromkeys(found))


BASELINE = Line("torch-bf16", "", "bf16", "bf16")
"""What speed-ups are relative to; timed in every run, whether or not it is shown."""
