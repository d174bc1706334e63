"""QuantisedWeight: the tensors of one low-bit weight, with their format and logical shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fdk.arguments import as_integer, as_integers, check_dtype, check_parts, check_tensor, shown
from fdk.device import device_of
from fdk.errors import FormatError
from fdk.formats import Format, parse
from fdk.formats.registry import INT, LUT
from fdk.packing.bits import pack_codes, unpack_planes
from fdk.packing.layouts import CANONICAL, DTYPES, Geometry, Parts, check_canonical, code_parts, layout
from fdk.packing.slices import COLUMNS, ROWS, check_dim, cut_geometry, cut_part, join_parts, shard_bounds
from fdk.packing.sparse import check_keep, unpack_mask

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

T = TypeVar("T")


class QuantisedWeight:
    """A low-bit weight [n, k] = (out_features, in_features).

    It holds one copy of its bits, in one layout at a time: canonical as checkpoints store it, or the layout that
    the kernels of its device want. `geometry` says what the tensors in `parts` mean.

    Attributes: geometry, parts, layout, device; cache, where kernels keep what they derive from the parts; choices,
    what was chosen for a number of rows of x, which may be forgotten at any time (`remember`).
    The weight is never changed in value; `relayout_` replaces its parts by an equivalent arrangement.
    """

    __slots__ = ("__weakref__", "cache", "choices", "device", "geometry", "layout", "parts")

    MOST_CHOICES = 1024

    def __init__(self, geometry: Geometry, parts: Parts, layout: str = "canonical") -> None:
        if not isinstance(geometry, Geometry) or not isinstance(parts, dict) or not parts:
            raise FormatError(
                f"geometry is {shown(geometry)} and parts is {shown(parts)}; "
                "make weights of canonical tensors by QuantisedWeight.from_parts"
            )
        first = next(iter(parts.values()))
        check_tensor(first, "the first of parts")
        self.geometry = geometry
        self.parts = parts
        self.layout = layout
        self.device: torch.device = first.device
        self.cache: dict = {}
        self.choices: dict = {}

    def __getstate__(self) -> tuple:
        # The cache may hold addresses of the parts, which a copy does not share.
        return self.geometry, self.parts, self.layout

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)
        encode_spec(self)

    def remember(self, key: object, choice: T) -> T:
        """Put `choice` into `choices`. When there are many all go, or prompts of ever new lengths would fill memory."""
        if len(self.choices) >= self.MOST_CHOICES:
            self.choices.clear()
        self.choices[key] = choice
        return choice

    @classmethod
    def from_parts(
        cls, format: Format | str, k: int, parts: Parts, row_ends: Sequence[int] | None = None, name: str = "weight"
    ) -> QuantisedWeight:
        """Build from canonical parts (shapes and dtypes are in `fdk.packing.layouts`).

        k cannot be told from the packed codes and is given. A table [2^bits] or shorter, as the source project
        stores it, is widened to [1, 2^bits] by repeating its last entry. `row_ends` gives the end of the range of
        rows that each table serves; one table serves all rows. Raises FormatError, naming `name`, if the parts do
        not fit or a scale, table or zero is not finite.
        """
        fmt = parse(format)
        try:
            k = as_integer(k, "k")
            check_parts(parts)
            parts = {key: value.contiguous() for key, value in parts.items()}
            needed = (*code_parts(fmt), "scales")
            if missing := [part for part in needed if part not in parts]:
                raise FormatError(f"{fmt} stores {' and '.join(needed)}, but {', '.join(missing)} is missing")
            if fmt.is_table and "table" in parts:
                parts["table"] = widen_table(parts["table"], fmt.bits)
            if parts["scales"].dim() != 2:
                raise FormatError(f"scales must be [n, groups], not {list(parts['scales'].shape)}")
            n = parts["scales"].shape[0]
            ends = (n,) if row_ends is None else as_integers(row_ends, "row_ends")
            geometry = Geometry(fmt, n, k, parts["scales"].dtype, ends)
            check_canonical(geometry, parts)
            check_values(geometry, parts)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        return cls(geometry, parts)

    @property
    def format(self) -> Format:
        """What the codes mean."""
        return self.geometry.format

    @property
    def shape(self) -> torch.Size:
        """(n, k), the shape of the dense weight."""
        return torch.Size((self.geometry.n, self.geometry.k))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of scales and table, and of the activations that the weight multiplies."""
        return self.geometry.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the present layout."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and tables included, over n * k, in the canonical layout."""
        geometry = self.geometry
        zeros = self.parts.get("zeros")
        size = geometry.dtype.itemsize
        zero_size = zeros.element_size() if zeros is not None else None
        total = geometry.format.nbytes(geometry.n, geometry.k, size, len(geometry.row_ends), zero_size)
        return 8 * total / max(1, geometry.n * geometry.k)

    def __repr__(self) -> str:
        n, k = self.shape
        return f"QuantisedWeight({self.format}, [{n}, {k}], {_DTYPE_NAMES[self.dtype]}, {self.device}, {self.layout})"

    def to_layout(self, name: str) -> QuantisedWeight:
        """The same weight with its bits arranged as layout `name`; itself if it already is."""
        if isinstance(name, str) and name == self.layout:
            return self
        canonical = layout(self.layout).unpack(self.geometry, self.parts)
        return QuantisedWeight(self.geometry, layout(name).pack(self.geometry, canonical), name)

    def canonical(self) -> QuantisedWeight:
        """The same weight in the layout that checkpoints hold."""
        return self.to_layout(CANONICAL.name)

    def relayout_(self, name: str) -> QuantisedWeight:
        """Like `to_layout`, in place: the old arrangement is dropped, so that one copy stays in memory."""
        other = self.to_layout(name)
        self.parts, self.layout, self.cache, self.choices = other.parts, other.layout, {}, {}
        return self

    def at(self, bits: int) -> QuantisedWeight:
        """A nested weight served at another width, 2 to 8 bits: the same tensors, so nothing is copied or repacked.

        Both weights stay valid; layouts of nested formats do not depend on the width. A later change of layout is each
        weight's own, so ask for widths once the weight has the layout of its kernel, as the first `fdk.linear` and
        `fdk.nn.Linear` bring about. FormatError if the format is not nested or has no such slice.
        """
        geometry = self.geometry
        served = Geometry(geometry.format.at(bits), geometry.n, geometry.k, geometry.dtype, geometry.row_ends)
        return QuantisedWeight(served, self.parts, self.layout)

    def shard(self, dim: int, rank: int, world: int, name: str = "weight") -> QuantisedWeight:
        """Shard `rank` of `world` equal ones along n (dim 0, column-parallel) or k (dim 1, row-parallel).

        Its dense weight is `dequantise(self).chunk(world, dim)[rank]` bit for bit, and `concat` of all shards along
        `dim` is this weight again. It is canonical and has memory of its own. FormatError, naming `name`, if n is not
        a multiple of `world`, or k not of `world` times the columns that share a scale (32 of a sparse format).
        """
        try:
            return self.cut(dim, *shard_bounds(self.geometry, dim, rank, world))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None

    def cut(self, dim: int, start: int, stop: int) -> QuantisedWeight:
        """Rows (dim 0) or columns (dim 1) start to stop, canonical, in memory of their own.

        FormatError for a range that does not exist, or that splits a group of columns.
        """
        old = self.canonical()
        geometry = cut_geometry(old.geometry, dim, start, stop)
        parts = {
            key: cut_part(old.geometry, key, part, dim, start, stop).clone(memory_format=torch.contiguous_format)
            for key, part in old.parts.items()
        }
        return QuantisedWeight(geometry, parts)

    def export(self, bits: int | None = None) -> QuantisedWeight:
        """The slice of `bits` bits (default: the width served) as a plain weight of exactly that many bits a code.

        It has the same values bit for bit: an int weight for rounded slices, a lut weight for cut ones, with scales
        2^(8 - bits) times as large. FormatError if the format is not nested, or float16 cannot hold such a scale.
        """
        weight = self.at(self.format.served if bits is None else bits).canonical()
        fmt, (_, k) = weight.format, weight.shape
        values = torch.tensor(fmt.slice_values(), dtype=torch.float64, device=weight.device)
        step = float(1 << (fmt.bits - fmt.served))
        # A rounded slice has fewer codes than leading bits: one for every distinct value.
        codes = torch.round(values / step - values[0] / step).to(torch.uint8)
        sliced = codes[unpack_planes(weight.parts["planes"], k, fmt.read_bits).int()]
        parts = {"codes": pack_codes(sliced, fmt.served), "scales": weight.parts["scales"] * step}
        if fmt.kind.cuts:
            parts["table"] = (values / step).to(weight.dtype)
        plain = Format(LUT if fmt.kind.cuts else INT, fmt.served, fmt.group)
        return QuantisedWeight.from_parts(plain, k, parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantisedWeight:
        """The same weight on another device, or with scales and table rounded to another dtype (canonical layout).

        FormatError if a scale or table entry overflows the new dtype, UnsupportedError if there is no such device.
        """
        target = device_of(device) or self.device
        dtype = self.dtype if dtype is None else dtype
        check_dtype(dtype, "dtype", DTYPES)
        if target == self.device and dtype == self.dtype:
            return self
        canonical = self.canonical()
        floats = {key for key, part in canonical.parts.items() if part.is_floating_point()}
        parts = {key: part.to(target, dtype if key in floats else part.dtype) for key, part in canonical.parts.items()}
        geometry = Geometry(self.format, *self.shape, dtype, self.geometry.row_ends)
        if dtype != self.dtype:
            check_values(geometry, parts)
        return QuantisedWeight(geometry, parts)


def widen_table(table: Tensor, bits: int) -> Tensor:
    """A table [entries] or [tables, entries] as [tables, 2^bits]; missing entries repeat the last one."""
    table = table.reshape(1, -1) if table.dim() < 2 else table
    missing = (1 << bits) - table.shape[1]
    if missing < 0 or table.shape[1] == 0:
        raise FormatError(f"a table of {bits} bits has 1 to {1 << bits} entries, not {table.shape[1]}")
    return torch.cat([table, table[:, -1:].expand(-1, missing)], 1) if missing else table


def check_values(geometry: Geometry, parts: Parts) -> None:
    """FormatError if a scale, table entry or zero is not finite, a fixed table was altered, or a mask is not 16:32."""
    for name in ("scales", "table", "zeros"):
        part = parts.get(name)
        if part is None or part.is_meta or not part.is_floating_point():
            continue
        finite = part.isfinite()
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            raise FormatError(
                f"{name}[{row}, {column}] = {part[row, column].item()} is not finite in "
                f"{str(part.dtype).removeprefix('torch.')}; quantise again from finite weights, or use a wider dtype"
            )
    if geometry.format.sparse and not parts["mask"].is_meta:
        check_keep(unpack_mask(parts["mask"], geometry.k))
    kind = geometry.format.kind
    if kind.table == "fixed" and not parts["table"].is_meta:
        expected = torch.tensor(kind.values, dtype=torch.float64).to(parts["table"])
        if not (parts["table"] == expected).all():
            raise FormatError(
                f"the table of a {geometry.format} weight is fixed; store other tables as lut{geometry.format.bits}"
            )


def concat(weights: Sequence[QuantisedWeight], dim: int = ROWS) -> QuantisedWeight:
    """One weight of several: below each other (dim 0: merged q/k/v or gate/up projections) or beside (dim 1: shards).

    Along n each weight keeps its table for its range of rows; equal neighbouring tables are shared. Along k all need
    the same tables and, where a row has one scale, the same scales. All weights need the same format, dtype, device and
    size in the other dimension, else FormatError.
    """
    check_dim(dim)
    if not isinstance(weights, list | tuple) or not weights:
        raise FormatError(f"weights is {shown(weights)}; give a list of at least one QuantisedWeight")
    for index, weight in enumerate(weights):
        if not isinstance(weight, QuantisedWeight):
            raise FormatError(f"weights[{index}] is {shown(weight)}, not a QuantisedWeight; quantise it")
    first = weights[0]
    canonical = [weight.canonical() for weight in weights]
    for index, weight in enumerate(canonical):
        same = (weight.format, weight.shape[1 - dim], weight.dtype, weight.device)
        if same != (first.format, first.shape[1 - dim], first.dtype, first.device):
            raise FormatError(
                f"weight {index} is {weight!r}, which cannot be merged with {first!r}; requantise it alike"
            )
    names = list(canonical[0].parts)
    if "zeros" in names and len({weight.parts["zeros"].dtype for weight in canonical}) > 1:
        raise FormatError("integer and fractional zeros cannot be merged; convert the zeros to the weight's dtype")
    if dim == COLUMNS:
        _check_shared(canonical)
    geometries = [weight.geometry for weight in canonical]
    parts = {name: join_parts(geometries, name, [w.parts[name] for w in canonical], dim) for name in names}
    if dim == COLUMNS:
        k = sum(geometry.k for geometry in geometries)
        return QuantisedWeight.from_parts(first.format, k, parts, first.geometry.row_ends)
    row_ends, offset = [], 0
    for weight in canonical:
        row_ends += [offset + end for end in weight.geometry.row_ends]
        offset += weight.shape[0]
    if not first.format.is_table:
        row_ends = [offset]
    elif first.device.type != "meta":
        table = parts["table"]
        last = [i for i in range(len(table)) if i + 1 == len(table) or not torch.equal(table[i], table[i + 1])]
        row_ends, parts["table"] = [row_ends[i] for i in last], table[last]
    return QuantisedWeight.from_parts(first.format, first.shape[1], parts, row_ends)


def _check_shared(weights: Sequence[QuantisedWeight]) -> None:
    """FormatError unless weights to stand beside each other have what belongs to all columns in common."""
    first = weights[0]
    shared = ["table"] if first.format.is_table else []
    shared += [name for name in ("scales", "zeros") if name in first.parts and first.format.group is None]
    for index, weight in enumerate(weights):
        for name in shared:
            if weight.geometry.row_ends != first.geometry.row_ends or not torch.equal(
                weight.parts[name], first.parts[name]
            ):
                raise FormatError(
                    f"weight {index} has {name} of its own, but columns beside each other share them; "
                    "join shards of one weight only"
                )


# Weights by their spec and first tensor, for `from_spec`; only while somebody holds them.
_described: WeakValueDictionary[tuple[str, int], QuantisedWeight] = WeakValueDictionary()


def encode_spec(weight: QuantisedWeight) -> str:
    """All that the tensors do not say, as one string: what the op carries beside the parts."""
    geometry = weight.geometry
    ends = ",".join(map(str, geometry.row_ends))
    names = ",".join(weight.parts)
    spec = f"{geometry.format}|{geometry.k}|{_DTYPE_NAMES[geometry.dtype]}|{ends}|{weight.layout}|{names}"
    _described[spec, id(next(iter(weight.parts.values())))] = weight
    return spec


@lru_cache(maxsize=4096)
def decode_spec(spec: str) -> tuple[Geometry, str, tuple[str, ...]]:
    """Inverse of `encode_spec`: geometry, layout and the names of the parts in order."""
    fmt, k, dtype, ends, layout_name, names = spec.split("|")
    row_ends = tuple(map(int, ends.split(",")))
    return Geometry(parse(fmt), row_ends[-1], int(k), _DTYPES[dtype], row_ends), layout_name, tuple(names.split(","))


def from_spec(spec: str, parts: Sequence[Tensor]) -> QuantisedWeight:
    """The weight that `encode_spec` described, around its tensors; nothing is checked or copied.

    While that weight lives and holds the same tensors it is returned itself, with all that kernels derived from it.
    """
    described = _described.get((spec, id(parts[0])))
    if described is not None and len(parts) == len(described.parts) and all(map(is_, described.parts.values(), parts)):
        return described
    geometry, layout_name, names = decode_spec(spec)
    return QuantisedWeight(geometry, dict(zip(names, parts, strict=True)), layout_name)
