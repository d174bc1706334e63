"""What a checkpoint holds of one projection, cut to the shard of this process while it is read.

A source takes the tensors of one layer on disk by part (`codes`, `scales`, `weight`, ...), in any order, keeps its own
rows and columns on `device`, and gives the weight when all are there. Nothing here knows vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import LUT, NEST
from fdk.formats.spec import MASTER_BITS
from fdk.importers.matgptq import check_zeros, from_matgptq
from fdk.nn.convert import Recipe, quantise_weight
from fdk.packing.layouts import Geometry, canonical_dtypes, canonical_shapes, check_canonical
from fdk.packing.slices import COLUMNS, ROWS, cut_geometry, cut_part, shard_bounds
from fdk.weight import QuantisedWeight, check_values


@dataclass(frozen=True)
class Place:
    """Which part of a weight [n, k] on disk belongs here: shard `rank` of `world`, of local size [n, k].

    offset, total  the rows on disk that the layer's own begin at, and how many they are of several in one tensor;
                   total None: all rows.
    rows           explicit (start, stop) on disk, where a vocabulary is cut by rules of its own.
    """

    rank: int
    world: int
    n: int
    k: int
    offset: int = 0
    total: int | None = None
    rows: tuple[int, int] | None = None

    def row_bounds(self, n: int, name: str) -> tuple[int, int]:
        """(start, stop) of the rows on disk; FormatError, naming the layer, if [n, ...] is no multiple of the shard."""
        if self.rows is not None:
            if self.rows[1] > n:
                raise FormatError(f"{name} has {n} rows, but the model needs {self.rows[1]}; they do not fit together")
            return self.rows
        total = n if self.total is None else self.total
        if self.n == 0 or total % self.n or self.n * self.world % total or self.offset + total > n:
            raise FormatError(
                f"{name} has {n} rows, which are not shards of {self.n} rows for {self.world} processes; "
                "use a tensor-parallel size that divides it"
            )
        # Heads of keys and values are repeated where there are more processes than heads.
        repeated = self.n * self.world // total
        start = self.offset + self.rank // repeated * self.n
        return start, start + self.n

    def column_bounds(self, geometry: Geometry, name: str) -> tuple[int, int]:
        """(start, stop) of the columns on disk; FormatError, naming the layer, if a group would be split."""
        if geometry.k == self.k:
            return 0, self.k
        if geometry.k != self.k * self.world:
            raise FormatError(
                f"{name} has {geometry.k} columns, but the model needs {self.k} for each of {self.world} processes; "
                "the weights and the model do not fit together"
            )
        try:
            return shard_bounds(geometry, COLUMNS, self.rank, self.world)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None


def widened(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A scale, table or zero in the dtype of the activations, exactly; FormatError if that could round it."""
    if tensor.dtype in (dtype, torch.uint8):
        return tensor
    if dtype != torch.float32:
        given, wanted = (str(d).removeprefix("torch.") for d in (tensor.dtype, dtype))
        raise FormatError(
            f"{name} is {given}, but the model runs in {wanted}, which would round it; "
            f"serve it with --dtype {given}, or quantise it again with --dtype {wanted}"
        )
    return tensor.to(dtype)


class Source(Protocol):
    """One projection on disk."""

    name: str
    parts: tuple[str, ...]

    def load(self, part: str, tensor: Tensor) -> None:
        """Take one tensor of the checkpoint, whole as it is on disk."""

    def finish(self) -> QuantisedWeight | Tensor:
        """The shard [n, k]; FormatError if a part never came."""

    def invent(self) -> None:
        """Take made-up tensors, for a run that measures speed without a checkpoint."""


def _missing(name: str, part: str) -> FormatError:
    return FormatError(f"the checkpoint has no tensor {name}.{part}; copy the whole folder again")


class Stored:
    """Canonical parts, as `fdk.save` writes them."""

    def __init__(self, name: str, geometry: Geometry, place: Place, device: torch.device) -> None:
        self.name, self.geometry, self.device = name, geometry, device
        self.parts = tuple(canonical_shapes(geometry))
        self._rows = place.row_bounds(geometry.n, name)
        self._by_rows = cut_geometry(geometry, ROWS, *self._rows)
        self._columns = place.column_bounds(geometry, name)
        self._cut = cut_geometry(self._by_rows, COLUMNS, *self._columns)
        self._held: dict[str, Tensor] = {}

    def load(self, part: str, tensor: Tensor) -> None:
        full = f"{self.name}.{part}"
        shape = canonical_shapes(self.geometry)[part]
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{full} is {list(tensor.shape)}, but a {self.geometry.format} weight "
                f"[{self.geometry.n}, {self.geometry.k}] has {list(shape)}; copy the folder again"
            )
        tensor = cut_part(self.geometry, part, tensor, ROWS, *self._rows)
        tensor = cut_part(self._by_rows, part, tensor, COLUMNS, *self._columns)
        if tensor.is_floating_point():
            tensor = widened(tensor, self.geometry.dtype, full)
        # A copy of its own: what the loader gave may be a view of a whole mapped file.
        self._held[part] = tensor.to(self.device, copy=True, memory_format=torch.contiguous_format)

    def finish(self) -> QuantisedWeight:
        for part in self.parts:
            if part not in self._held:
                raise _missing(self.name, part)
        try:
            check_canonical(self._cut, self._held)
            check_values(self._cut, self._held)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}; copy the folder again") from None
        held, self._held = self._held, {}
        return QuantisedWeight(self._cut, held)

    def invent(self) -> None:
        shapes, dtypes = canonical_shapes(self._cut), canonical_dtypes(self._cut)
        for part, shape in shapes.items():
            if dtypes[part] == torch.uint8:
                self._held[part] = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
            else:
                self._held[part] = torch.full(shape, self._cut.k**-0.5, dtype=dtypes[part], device=self.device)
        if self._cut.format.sparse:
            self._held["mask"].fill_(0b01010101)
        values = self._cut.format.kind.values
        if "table" in self._held:
            entries = values or torch.linspace(-1, 1, self._held["table"].shape[1]).tolist()
            self._held["table"][:] = torch.tensor(entries, device=self.device)


class Dense:
    """A weight that stays as it is."""

    parts = ("weight",)

    def __init__(self, name: str, place: Place, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.place, self.dtype, self.device = name, place, dtype, device
        self._held: Tensor | None = None

    def load(self, part: str, tensor: Tensor) -> None:
        self._held = dense_shard(tensor, self.place, self.name).to(self.device, self.dtype, copy=True)

    def finish(self) -> Tensor:
        if self._held is None:
            raise _missing(self.name, "weight")
        held, self._held = self._held.contiguous(), None
        return held

    def invent(self) -> None:
        shape = self.place.n, self.place.k
        self._held = torch.randn(shape, dtype=self.dtype, device=self.device) * self.place.k**-0.5


def dense_shard(tensor: Tensor, place: Place, name: str, group: int | None = None) -> Tensor:
    """The view of this process's rows and columns of a dense [n, k]; `group` columns stay together."""
    if tensor.dim() != 2:
        raise FormatError(f"{name}.weight is {list(tensor.shape)}, not [n, k]; leave this layer dense with skip")
    n, k = tensor.shape
    start, stop = place.row_bounds(n, name)
    if k == place.k:
        return tensor[start:stop]
    # Any format with this group says where columns may be cut.
    first, last = place.column_bounds(Geometry(Format(LUT, 4, group), n, k, torch.float32, (n,)), name)
    return tensor[start:stop, first:last]


class Quantising:
    """A 16-bit weight, quantised while it is read: one dense tensor at a time, on `device`."""

    parts = ("weight",)

    def __init__(self, name: str, recipe: Recipe, place: Place, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.recipe, self.place, self.dtype, self.device = name, recipe, place, dtype, device
        self._held: QuantisedWeight | None = None

    def load(self, part: str, tensor: Tensor) -> None:
        if tensor.dim() != 2:
            raise FormatError(f"{self.name}.weight is {list(tensor.shape)}, not [n, k]; leave it dense with skip")
        n, k = tensor.shape
        rows = self.place.row_bounds(n, self.name)
        columns = self.place.column_bounds(Geometry(self.recipe.format, n, k, self.dtype, (n,)), self.name)
        where = f"{self.name}.weight"
        if self._shards_alone(columns == (0, k)):
            dense = tensor[slice(*rows), slice(*columns)].to(self.device)
            self._held = quantise_weight(dense, self.recipe, where, self.dtype)
        else:
            whole = quantise_weight(tensor.to(self.device), self.recipe, where, self.dtype)
            self._held = whole.cut(ROWS, *rows).cut(COLUMNS, *columns)

    def _shards_alone(self, all_columns: bool) -> bool:
        """Whether the shard of the quantised weight is the quantised shard: no table or scale spans shards."""
        fmt, codebook = self.recipe.format, self.recipe.codebook
        fitted = fmt.kind is LUT and isinstance(codebook, str) and codebook == "kmeans"
        return not fitted and not fmt.is_nested and (all_columns or fmt.group is not None)

    def finish(self) -> QuantisedWeight:
        if self._held is None:
            raise _missing(self.name, "weight")
        held, self._held = self._held, None
        return held

    def invent(self) -> None:
        shape = self.place.n, self.place.k
        dense = torch.randn(shape, device=self.device) * self.place.k**-0.5
        self._held = quantise_weight(dense, self.recipe, self.name, self.dtype)


class MatGPTQ:
    """The 8-bit codes and scales of a packed MatGPTQ folder, served at `bits`."""

    parts = ("qweight", "scales", "zeros")

    def __init__(
        self, name: str, bits: int, group_size: int | None, place: Place, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.bits, self.group_size, self.place = name, bits, group_size, place
        self.dtype, self.device = dtype, device
        self._read: dict[str, Tensor] = {}
        self._held: QuantisedWeight | None = None

    def load(self, part: str, tensor: Tensor) -> None:
        if part == "zeros":
            # Zeros come last; all that they can say is that the codes are symmetric.
            check_zeros(tensor, self.name)
            return
        self._read[part] = tensor
        if "qweight" not in self._read or "scales" not in self._read:
            return
        scales = widened(self._read["scales"], self.dtype, f"{self.name}.scales")
        whole = from_matgptq(self._read["qweight"], scales, bits=self.bits, group_size=self.group_size, name=self.name)
        self._read.clear()
        rows = self.place.row_bounds(whole.shape[0], self.name)
        columns = self.place.column_bounds(whole.geometry, self.name)
        self._held = whole.cut(ROWS, *rows).cut(COLUMNS, *columns).to(self.device)

    def finish(self) -> QuantisedWeight:
        if self._held is None:
            raise _missing(self.name, "scales" if "qweight" in self._read else "qweight")
        held, self._held = self._held, None
        return held

    def invent(self) -> None:
        group = None if self.group_size in (None, -1) else self.group_size
        geometry = Geometry(
            Format(NEST, MASTER_BITS, group, self.bits), self.place.n, self.place.k, self.dtype, (self.place.n,)
        )
        stored = Stored(self.name, geometry, Place(0, 1, self.place.n, self.place.k), self.device)
        stored.invent()
        self._held = stored.finish()
