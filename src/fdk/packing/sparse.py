"""16:32 sparsity: of every 32 consecutive weights of a row exactly 16 are kept.

mask    uint8 [n, k/8]              bit j of a row's little-endian stream: weight j is kept
codes   uint8 [n, k/2 * bits/8]     dense stream of the kept codes, ascending in k
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.errors import FormatError
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import pack_codes, unpack_codes


def check_keep(keep: Tensor, name: str = "mask") -> None:
    """FormatError with the first offender unless keep bool [n, k] has 16 of every 32 weights of a row."""
    if keep.dim() != 2 or keep.shape[1] % BLOCK:
        raise FormatError(f"{name} must be [n, k] with k a multiple of {BLOCK}, not {list(keep.shape)}")
    count = keep.unflatten(1, (-1, BLOCK)).sum(2)
    if (count != KEPT).any():
        row, block = (count != KEPT).nonzero()[0].tolist()
        raise FormatError(
            f"{name} keeps {count[row, block].item()} of the {BLOCK} weights of row {row}, columns {block * BLOCK} to "
            f"{block * BLOCK + BLOCK - 1}; {KEPT}:{BLOCK} sparsity keeps exactly {KEPT}, see fdk.quantise.keep_largest"
        )


def pack_mask(keep: Tensor) -> Tensor:
    """mask uint8 [n, k/8] of keep bool [n, k]; FormatError if it is not 16:32."""
    check_keep(keep)
    return pack_codes(keep.to(torch.uint8), 1)


def unpack_mask(mask: Tensor, k: int) -> Tensor:
    """Inverse of `pack_mask`: bool [n, k]."""
    return unpack_codes(mask, 1, k).bool()


def take_kept(values: Tensor, keep: Tensor) -> Tensor:
    """[n, k/2]: the kept entries of values [n, k], in order."""
    return values[keep].view(values.shape[0], values.shape[1] * KEPT // BLOCK)


def spread_kept(kept: Tensor, keep: Tensor) -> Tensor:
    """Inverse of `take_kept`: [n, k] with zeros where nothing was kept."""
    return torch.zeros(keep.shape, dtype=kept.dtype, device=kept.device).masked_scatter_(keep, kept)
