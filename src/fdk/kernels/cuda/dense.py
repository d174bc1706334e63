"""Products by way of dense weights: dequantise a bounded part (csrc/dequantise_weights.cuh), then cuBLAS.

What is left where dequantising inside the product loses, the gradient with respect to x, and `fdk.dequantise`. Scratch
comes from torch's allocator at every call, which reuses it per stream and keeps that of a captured graph apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from fdk.kernels.cuda import decode, decode_config, driver, jit
from fdk.packing.fragments import BLOCK, UNIT, block_counts, units
from fdk.weight import QuantisedWeight

SCRATCH_BYTES = 256 << 20
"""Dense weights held at a time; cuBLAS on whole weights was up to a tenth faster than on parts of 64 MB (H200)."""

T = TypeVar("T")

_WARPS, _BUFFER, _WINDOW = 8, 16 * 144, 1024


@dataclass(frozen=True)
class Variant:
    """What is fixed at compile time, as in `decode_config.Shape`; `group` is 0 for one scale per row."""

    bits: int
    group: int
    bf16: bool
    kind: int
    served: int = 0

    def shared_bytes(self, hopper: bool) -> int:
        """Shared memory of a CTA; the host twin of `Smem` in csrc/dequantise_weights.cuh, which asserts it."""
        aligned = decode_config.table_aligned(self.bits, self.kind)
        before = aligned - _WINDOW if aligned > _WINDOW and hopper else 0
        end = before + decode_config.table_bytes(self.bits, self.kind)
        return end if before >= _WARPS * _BUFFER else end + _WARPS * _BUFFER

    def defines(self, hopper: bool) -> dict[str, int]:
        """Macros that the kernel is compiled with."""
        return {
            **decode_config.format_defines(self.bits, self.group, self.bf16, self.kind, self.served),
            "FDK_SHARED_BYTES": self.shared_bytes(hopper),
        }


def variant_of(shape: decode_config.Shape) -> Variant:
    """The variant that dequantises weights of this shape."""
    return Variant(shape.bits, 0 if shape.groups == 1 else shape.group, shape.bf16, shape.kind, shape.served)


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/dequantise_weights.cuh."""

    _fields_ = (
        *decode.WEIGHT_FIELDS,
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("origin", ctypes.c_int64),
        ("units", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("first_block", ctypes.c_int),
        ("end_block", ctypes.c_int),
        ("first_unit", ctypes.c_int),
        ("end_unit", ctypes.c_int),
        ("ranges", ctypes.c_int),
        ("zero", ctypes.c_uint32),
        ("range", decode.Range * decode_config.MAX_RANGES),
    )


def source(variant: Variant, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "dequantise_weights.cuh", variant.defines(capability >= (9, 0)), jit.architecture(capability)


@cache
def load(variant: Variant, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    capability = torch.cuda.get_device_capability(device)
    hopper = capability >= (9, 0)
    cubin = jit.cubin(*source(variant, capability))
    shared = variant.shared_bytes(hopper)
    return driver.Function(cubin, "fdk_dequantise", _WARPS * 32, shared, 1, dependent=hopper)


def within_memory(run: Callable[[int], T]) -> T:
    """run(bytes of scratch), again with less where memory is short; torch.cuda.OutOfMemoryError if that fails too."""
    for scratch in (SCRATCH_BYTES, SCRATCH_BYTES // 8):
        try:
            return run(scratch)
        except torch.cuda.OutOfMemoryError:
            continue
    return run(SCRATCH_BYTES // 64)


def parts_of(lengths: tuple[int, ...], most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the fewest nearly equal runs of at most `most` of sum(lengths) things."""
    total = sum(lengths)
    count = -(-total // max(1, most))
    yield from pairwise(total * i // count for i in range(count + 1))


class Plan:
    """A weight bound to the compiled kernel on its device."""

    def __init__(self, weight: QuantisedWeight) -> None:
        parts, geometry = weight.parts, weight.geometry
        assert weight.layout == "fragments" and all(part.data_ptr() % 16 == 0 for part in parts.values())
        zeros = parts.get("zeros")
        shape = decode_config.shape_of(geometry, None if zeros is None else zeros.dtype)
        self.geometry, self.device = geometry, weight.device
        self.counts = block_counts(geometry)
        self.params = Params(**decode.weight_values(weight), units=shape.units, groups=shape.groups)
        decode.fill_ranges(self.params.range, geometry, lambda count: 0)
        # First row of every block, and the end of the last one.
        self.rows = [row for start, end in geometry.ranges for row in range(start, end, BLOCK)] + [geometry.n]
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        with torch.cuda.device(self.device):
            self.function = load(variant_of(shape), self.device.index)

    def dequantise(self, blocks: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Rows of a range of blocks, columns of a range of units (with zeros past k), rounded to the weight's dtype."""
        first_row, end_row = self.rows[blocks[0]], self.rows[blocks[1]]
        stride = (columns[1] - columns[0]) * UNIT
        out = torch.empty((end_row - first_row, stride), dtype=self.geometry.dtype, device=self.device)
        params = Params.from_buffer_copy(self.params)
        params.out, params.stride, params.origin = out.data_ptr(), stride, first_row
        params.first_block, params.end_block = blocks
        params.first_unit, params.end_unit = columns
        items = (blocks[1] - blocks[0]) * -(-(columns[1] - columns[0]) // _WARPS)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            self.function(min(items, 2 * self.sms), stream, params)
        return out

    def dense(self) -> Tensor:
        """The weight [n, k], each value rounded once to its dtype."""
        geometry = self.geometry
        dense = self.dequantise((0, sum(self.counts)), (0, units(geometry.k)))
        return dense[:, : geometry.k].contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor, scratch_bytes: int = SCRATCH_BYTES) -> None:
        """out [m, n] = x [m, k] @ W.T + bias, W rounded to its dtype; torch.cuda.OutOfMemoryError without scratch."""
        k = self.geometry.k
        across = (0, units(k))
        for blocks in parts_of(self.counts, scratch_bytes // (across[1] * UNIT * 2 * BLOCK)):
            rows = slice(self.rows[blocks[0]], self.rows[blocks[1]])
            dense = self.dequantise(blocks, across)[:, :k].T
            if bias is None:
                torch.mm(x, dense, out=out[:, rows])
            else:
                torch.addmm(bias[rows], x, dense, out=out[:, rows])

    def grad(self, grad: Tensor, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
        """grad [m, n] @ W -> [m, k]; torch.cuda.OutOfMemoryError without scratch."""
        n, k = self.geometry.n, self.geometry.k
        out = grad.new_empty((grad.shape[0], k))
        everything = (0, sum(self.counts))
        # Parts of k, not of n: sums of parts of n would be rounded once for each.
        for columns in parts_of((units(k),), scratch_bytes // (n * UNIT * 2)):
            first, end = columns[0] * UNIT, min(k, columns[1] * UNIT)
            torch.mm(grad, self.dequantise(everything, columns)[:, : end - first], out=out[:, first:end])
        return out
