"""`quant_matmul`: the function of int4matmul, on its own packed tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from fdk import ops
from fdk.errors import FormatError
from fdk.importers.int4matmul import from_int4matmul
from fdk.weight import QuantisedWeight


@dataclass(frozen=True)
class Imported:
    """A weight, and the tensors and their versions that it was imported from."""

    matrix: weakref.ref
    others: tuple[Tensor | None, ...]
    versions: tuple
    weight: QuantisedWeight

    def came_from(self, matrix: Tensor, others: tuple[Tensor | None, ...], versions: tuple) -> bool:
        same = all(a is b for a, b in zip(self.others, others, strict=True))
        return self.matrix() is matrix and same and self.versions == versions


# By the id of the matrix, as long as that lives.
_imported: dict[int, Imported] = {}


def quant_matmul(
    bits: int,
    outs: Tensor,
    matrix: Tensor,
    x: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int = -1,
    mask: Tensor | None = None,
    mode: str = "linear",
) -> Tensor:
    """outs [B, M, N] = x [B, M, K] times the packed `matrix`; written in place and returned.

    matrix int32 [K*bits/32, N], or [K/16, N] with a mask int32 [K/32, N]; scales, zeros half [K/group_size, N], or
    [1, N] for group_size -1. The matrix is imported at its first use and again after one of them has been written.
    FormatError for shapes that do not fit, see `fdk.importers.int4matmul`.
    """
    weight = _weight_of(bits, matrix, scales, zeros, mask, mode)
    n, k = weight.shape
    found = weight.geometry.group_size
    if found != (k if group_size == -1 else group_size):
        raise FormatError(f"group_size = {group_size}, but scales {list(scales.shape)} have groups of {found} of {k}")
    if outs.shape != (*x.shape[:-1], n):
        raise FormatError(f"outs is {list(outs.shape)}, but x {list(x.shape)} gives {[*x.shape[:-1], n]}")
    return outs.copy_(ops.linear(x, weight))


def _weight_of(
    bits: int, matrix: Tensor, scales: Tensor, zeros: Tensor, mask: Tensor | None, mode: str
) -> QuantisedWeight:
    others = (scales, zeros, mask)
    versions = (bits, mode, *(None if tensor is None else tensor._version for tensor in (matrix, *others)))
    key = id(matrix)
    known = _imported.get(key)
    if known is not None and known.came_from(matrix, others, versions):
        return known.weight
    weight = from_int4matmul(bits, matrix, scales, zeros, mask, mode, name="matrix")
    _imported[key] = Imported(weakref.ref(matrix, lambda _: _imported.pop(key, None)), others, versions, weight)
    return weight
