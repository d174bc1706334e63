"""The bridge from tensors to the CPU library: weight handles, the layout packed by the library, the kernel."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from array import array
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.kernels import Problem
from fdk.kernels.cpu.library import Library, library, why_not
from fdk.packing.layouts import (
    Geometry,
    Parts,
    canonical_dtypes,
    canonical_shapes,
    code_parts,
    register_layout,
)
from fdk.packing.rows16 import Rows16, sizes
from fdk.weight import QuantisedWeight

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_TABLE, _INT, _UINT_U8, _UINT_FLOAT = range(4)
_STORAGES = ("plain", "nested", "sparse")
_HUGE = 2 << 20


@cache
def plane_table(format: Format, dtype: torch.dtype) -> Tensor:
    """[2^read_bits] values of a nested format in the library's order: bit t of an index is plane t."""
    bits = format.read_bits
    values = torch.tensor(format.slice_values(), dtype=torch.float64)
    index = torch.arange(1 << bits)
    leading = sum((index >> t & 1) << (bits - 1 - t) for t in range(bits))
    return values[leading].to(dtype)


class Description(NamedTuple):
    """What the library is told about a weight besides its sizes and bytes (fdk_weight_init)."""

    bits: int
    group: int
    dtype: int
    family: int
    storage: int
    row_ends: tuple[int, ...]
    table: Tensor | None


def _description(geometry: Geometry, zeros_dtype: torch.dtype | None, table: Tensor | None) -> Description:
    fmt = geometry.format
    if fmt.is_nested:
        table = plane_table(fmt, geometry.dtype)
    if table is not None:
        family = _TABLE
    elif zeros_dtype is None:
        family = _INT
    else:
        family = _UINT_U8 if zeros_dtype == torch.uint8 else _UINT_FLOAT
    return Description(
        fmt.read_bits, fmt.group or 0, _DTYPES[geometry.dtype], family, _STORAGES.index(fmt.storage),
        tuple(geometry.row_ends), table,
    )  # fmt: skip


def description(weight: QuantisedWeight) -> Description:
    """The description of a weight in rows16."""
    zeros = weight.parts.get("zeros")
    return _description(weight.geometry, None if zeros is None else zeros.dtype, weight.parts.get("table"))


class Handle:
    """The library's description of one weight (struct fdk_weight), valid as long as this object lives."""

    __slots__ = ("__weakref__", "_memory", "address", "blocks", "dtype", "k", "n")

    def __init__(
        self,
        loaded: Library,
        geometry: Geometry,
        data: Tensor,
        zeros_dtype: torch.dtype | None,
        table: Tensor | None,
    ) -> None:
        arguments = _description(geometry, zeros_dtype, table)
        ends, table = array("q", arguments.row_ends), arguments.table
        self._memory = ctypes.create_string_buffer(loaded.weight_size(len(ends)) + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        status = loaded.weight_init(
            self.address, data.data_ptr(), geometry.n, geometry.k, arguments.bits, arguments.group, arguments.dtype,
            arguments.family, ends.buffer_info()[0], len(ends), table.data_ptr() if table is not None else None,
            arguments.storage,
        )  # fmt: skip
        if status:
            raise AssertionError(f"the CPU library refused {geometry}")
        self.n, self.k, self.dtype = geometry.n, geometry.k, geometry.dtype
        self.blocks = sizes(geometry, zeros_dtype).blocks


def aligned_bytes(size: int) -> Tensor:
    """uint8 [size] on 2 MiB boundaries that the kernel is asked to back with huge pages; small sizes plain."""
    if size < _HUGE:
        return torch.empty(size, dtype=torch.uint8)
    storage = torch.empty(-(-size // _HUGE) * _HUGE + _HUGE, dtype=torch.uint8)
    start = -storage.data_ptr() % _HUGE
    # Advice only: where it is not taken, the weight is merely read through small pages.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        libc = ctypes.CDLL(None)
        libc.madvise(
            ctypes.c_void_p(storage.data_ptr() + start), ctypes.c_size_t(-(-size // _HUGE) * _HUGE), mmap.MADV_HUGEPAGE
        )
    return storage[start : start + size]


class NativeRows16(Rows16):
    """rows16 packed by the library where there is one, by torch where there is none."""

    def pack_data(self, geometry: Geometry, parts: Parts) -> Tensor:
        loaded = library() if parts["scales"].device.type == "cpu" else None
        if loaded is None:
            return super().pack_data(geometry, parts)
        if geometry.format.sparse:
            packed = super().pack_data(geometry, parts)
            return aligned_bytes(packed.numel()).copy_(packed)
        zeros = parts.get("zeros")
        zeros_dtype = None if zeros is None else zeros.dtype
        cut = sizes(geometry, zeros_dtype)
        data = aligned_bytes(cut.blocks * cut.block_bytes)
        handle = Handle(loaded, geometry, data, zeros_dtype, parts.get("table"))
        codes = parts[code_parts(geometry.format)[0]]
        loaded.pack(
            handle.address, data.data_ptr(), codes.data_ptr(), parts["scales"].data_ptr(),
            None if zeros is None else zeros.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return data

    def unpack_data(self, geometry: Geometry, data: Tensor, zeros_dtype: torch.dtype | None) -> Parts:
        loaded = library() if data.device.type == "cpu" else None
        if loaded is None or geometry.format.sparse:
            return super().unpack_data(geometry, data, zeros_dtype)
        dtypes = canonical_dtypes(geometry, zeros_dtype or torch.uint8)
        shapes = {name: shape for name, shape in canonical_shapes(geometry).items() if name != "table"}
        parts = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        # The values of the table do not matter for moving bits.
        entries = 1 << geometry.format.bits
        table = torch.zeros(len(geometry.row_ends), entries, dtype=geometry.dtype) if geometry.format.is_table else None
        handle = Handle(loaded, geometry, data, zeros_dtype, table)
        codes = parts[code_parts(geometry.format)[0]]
        loaded.unpack(
            handle.address, data.data_ptr(), codes.data_ptr(), parts["scales"].data_ptr(),
            parts["zeros"].data_ptr() if zeros_dtype else None, torch.get_num_threads(),
        )  # fmt: skip
        return parts


LAYOUT = register_layout(NativeRows16())

# Handles of weights that the op rebuilds around the same tensors on every call: an exported program holds tensors only.
_handles: dict[tuple[int, Format], tuple[weakref.ref, Handle]] = {}


def handle_of(weight: QuantisedWeight) -> Handle:
    """The handle of a weight in rows16, made once."""
    handle = weight.cache.get("cpu")
    if handle is not None:
        return handle
    data = weight.parts["data"]
    key = id(data), weight.format
    known = _handles.get(key)
    if known is not None and known[0]() is data:
        handle = known[1]
    else:
        zeros = weight.parts.get("zeros")
        zeros_dtype = None if zeros is None else zeros.dtype
        handle = Handle(library(), weight.geometry, data, zeros_dtype, weight.parts.get("table"))
        _handles[key] = (weakref.ref(data, lambda _: _handles.pop(key, None)), handle)
    weight.cache["cpu"] = handle
    return handle


def dequantise(weight: QuantisedWeight, out: Tensor | None = None) -> Tensor:
    """The dense weight [n, k] in its dtype, from rows16: scale times value, rounded once to nearest even."""
    handle = handle_of(weight)
    if out is None:
        out = torch.empty(handle.n, handle.k, dtype=handle.dtype)
    library().dequantise(handle.address, out.data_ptr(), 0, handle.blocks, torch.get_num_threads())
    return out


class CpuKernel:
    """The C++ kernels: exact activations, float32 accumulation.

    Scales are applied to the sums of each group; where hundreds of bf16 rows are multiplied, to the weights instead.
    """

    name = "cpu"
    layout = LAYOUT.name

    def supports(self, problem: Problem) -> str | None:
        return why_not()

    def rounds_weights(self, problem: Problem) -> bool:
        loaded = library()
        rows, geometry = loaded.exact_rows() if loaded else -1, problem.geometry
        return 0 <= rows < problem.m and geometry.dtype == torch.bfloat16 and geometry.format.storage == "plain"

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        handle = weight.cache.get("cpu") or handle_of(weight)
        loaded = library()
        status = loaded.linear(
            handle.address, x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), x.shape[0],
            torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for the packed activations {list(x.shape)}")


KERNEL = CpuKernel()
