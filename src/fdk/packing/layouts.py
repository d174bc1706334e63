"""Where the bits of a weight live. Every layout has `pack` and an exact inverse `unpack`.

The canonical layout is what checkpoints hold; a kernel names the layout it wants, which is derived from the
canonical parts once, on load, and converted back on save.

Canonical parts of an [n, k] weight:
    codes   uint8 [n, ceil(k*bits/8)]   dense little-endian stream along k, see packing.bits
    mask    uint8 [n, k/8]              sparse formats: bit of every weight along k, 1 if kept; codes hold the kept ones
    planes  uint8 [n, 8, ceil(k/8)]     nested formats, in place of codes: bit planes, most significant first
    scales  [n, groups]                 bfloat16, float16 or float32: the weight's dtype
    table   [tables, 2^bits]            table formats; one table for each range of rows
    zeros   [n, groups]                 zero-point formats; uint8, or the weight's dtype for fractional zeros
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fdk.arguments import as_integer, shown
from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import row_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """The shape of a stored weight: format, n, k, dtype and where each table's range of rows ends."""

    format: Format
    n: int
    k: int
    dtype: torch.dtype
    row_ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise FormatError(f"format is {shown(self.format)}, not a fdk.Format; use fdk.parse with a format name")
        for name in ("n", "k"):
            as_integer(getattr(self, name), name)
        if not isinstance(self.row_ends, tuple):
            raise FormatError(f"row_ends is {shown(self.row_ends)}, not a tuple; give the end of each table's rows")
        for end in self.row_ends:
            as_integer(end, "row_ends")
        if not isinstance(self.dtype, torch.dtype):
            raise FormatError(
                f"weight dtype is {shown(self.dtype)}; use torch.bfloat16, torch.float16 or torch.float32"
            )
        ascending = all(a < b for a, b in pairwise((0, *self.row_ends))) or self.row_ends == (0,)
        if not self.row_ends or self.row_ends[-1] != self.n or not ascending:
            raise FormatError(f"row_ends {self.row_ends} must ascend and end at n = {self.n}")
        if self.dtype not in DTYPES:
            raise FormatError(f"weight dtype {self.dtype} is not supported; use bfloat16, float16 or float32")

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.format.groups(self.k)

    @property
    def group_size(self) -> int:
        """Weights per scale along k."""
        return self.format.group_size(self.k)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of the rows that each table serves."""
        return tuple(zip((0, *self.row_ends[:-1]), self.row_ends, strict=True))


class Layout(ABC):
    """An arrangement of a weight's bits in named tensors."""

    name: str
    devices: tuple[str, ...] = ("cpu", "cuda", "meta")
    """Types of device on which its tensors may lie."""
    storages: tuple[str, ...] = ("plain",)
    """What it holds of `Format.storage`. A nested weight's tensors may not depend on the width it is served at."""

    def supports(self, geometry: Geometry) -> str | None:
        """None if the layout can hold such a weight, else the reason why not."""
        storage = geometry.format.storage
        return None if storage in self.storages else f"its layout {self.name} holds no {storage} codes"

    @abstractmethod
    def pack(self, geometry: Geometry, parts: Parts) -> Parts:
        """The layout's tensors, from canonical parts, on the same device."""

    @abstractmethod
    def unpack(self, geometry: Geometry, parts: Parts) -> Parts:
        """The canonical parts, bit for bit those that `pack` was given."""


class Canonical(Layout):
    """Row-major dense streams with scales (zeros, tables) beside them; what checkpoints hold."""

    name = "canonical"
    storages = ("plain", "nested", "sparse")

    def pack(self, geometry: Geometry, parts: Parts) -> Parts:
        check_canonical(geometry, parts)
        return parts

    def unpack(self, geometry: Geometry, parts: Parts) -> Parts:
        check_canonical(geometry, parts)
        return parts


def code_parts(format: Format) -> tuple[str, ...]:
    """Names of the canonical parts that hold the codes."""
    return {"plain": ("codes",), "nested": ("planes",), "sparse": ("codes", "mask")}[format.storage]


def canonical_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical part that the format stores."""
    fmt, n, k, groups = geometry.format, geometry.n, geometry.k, geometry.groups
    if fmt.storage == "nested":
        shapes = {"planes": (n, fmt.bits, row_bytes(k, 1))}
    elif fmt.storage == "sparse":
        shapes = {"codes": (n, row_bytes(k * KEPT // BLOCK, fmt.bits)), "mask": (n, row_bytes(k, 1))}
    else:
        shapes = {"codes": (n, row_bytes(k, fmt.bits))}
    shapes["scales"] = (n, groups)
    if fmt.is_table:
        shapes["table"] = (len(geometry.row_ends), 1 << fmt.bits)
    if fmt.has_zeros:
        shapes["zeros"] = (n, groups)
    return shapes


def canonical_dtypes(geometry: Geometry, zeros: torch.dtype = torch.uint8) -> dict[str, torch.dtype]:
    """Name and dtype of every canonical part; `zeros` is that of the zeros, uint8 or the weight's."""
    dtypes = {**dict.fromkeys(code_parts(geometry.format), torch.uint8), "zeros": zeros}
    return {name: dtypes.get(name, geometry.dtype) for name in canonical_shapes(geometry)}


def check_canonical(geometry: Geometry, parts: Parts) -> None:
    """FormatError unless `parts` are exactly the canonical tensors of such a weight (values are not read)."""
    shapes = canonical_shapes(geometry)
    if parts.keys() != shapes.keys():
        raise FormatError(f"{geometry.format} stores {', '.join(shapes)}, but got {', '.join(parts) or 'nothing'}")
    devices = {tensor.device for tensor in parts.values()}
    if len(devices) > 1:
        raise FormatError(f"the parts of one weight lie on several devices ({', '.join(map(str, devices))}); move them")
    for name, shape in shapes.items():
        tensor = parts[name]
        allowed = (torch.uint8, geometry.dtype) if name == "zeros" else (canonical_dtypes(geometry)[name],)
        if tuple(tensor.shape) != shape or tensor.dtype not in allowed:
            raise FormatError(
                f"{name} of a {geometry.format} weight [{geometry.n}, {geometry.k}] must be "
                f"{' or '.join(str(d).removeprefix('torch.') for d in allowed)} {list(shape)}, "
                f"not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise FormatError(f"{name} of a {geometry.format} weight must be contiguous; call .contiguous() on it")


_layouts: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Add a layout; registering one puts it under the round-trip tests. Returns the layout."""
    if layout.name in _layouts:
        raise FormatError(f"layout {layout.name!r} is already registered; choose another name")
    _layouts[layout.name] = layout
    return layout


def layout(name: str) -> Layout:
    """The layout registered under `name`."""
    if not isinstance(name, str) or name not in _layouts:
        raise UnsupportedError(f"unknown layout {shown(name)}; known: {', '.join(_layouts)}")
    return _layouts[name]


def layouts() -> tuple[Layout, ...]:
    """All registered layouts."""
    return tuple(_layouts.values())


CANONICAL = register_layout(Canonical())
