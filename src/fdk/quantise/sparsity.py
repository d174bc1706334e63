"""16:32 sparsity: which 16 of every 32 weights are kept, and the codes of those."""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import check_dense
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.sparse import check_keep, pack_mask, take_kept


@torch.no_grad()
def keep_largest(weight: Tensor, activations: Tensor | None = None, name: str = "weight") -> Tensor:
    """bool [n, k]: the 16 of every 32 consecutive weights of a row of [n, k] that matter most.

    Importance is |w|, or with calibration inputs of the layer, activations [..., k], |w| times the 2-norm of the input
    it meets (Wanda, Sun et al., 2023). Ties go to the lower column. FormatError, naming `name`, unless k is a multiple
    of 32, every weight is finite and the activations fit.
    """
    check_dense(weight, name)
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise FormatError(
            f"{name} is {list(weight.shape)}; {KEPT}:{BLOCK} sparsity needs [n, k], k a multiple of {BLOCK}"
        )
    check_finite_weight(weight, name)
    importance = weight.float().abs()
    if activations is not None:
        check_dense(activations, f"{name}: activations")
        if not activations.dim() or activations.shape[-1] != weight.shape[1]:
            raise FormatError(
                f"{name}: activations are {list(activations.shape)}, but the layer takes [..., {weight.shape[1]}]"
            )
        importance = importance * activations.reshape(-1, weight.shape[1]).float().norm(dim=0).to(weight.device)
    blocks = importance.unflatten(1, (-1, BLOCK))
    order = blocks.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, order[..., :KEPT], True).flatten(1)


def check_finite_weight(weight: Tensor, name: str) -> None:
    """FormatError with the first weight of [n, k] that is NaN or infinite."""
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise FormatError(
            f"{name}[{row}, {column}] is {weight[row, column].item()}; a weight must be finite, "
            "so repair the checkpoint or skip this layer"
        )


def compact(weight: Tensor, format: Format, keep: Tensor | None, name: str) -> tuple[Tensor, Format, Tensor]:
    """(kept weights [n, k/2], the plain format of half the group that quantises them, mask).

    A group of a sparse format holds whole blocks, so its kept weights are half as many neighbours. keep: bool [n, k],
    or None for the largest.
    """
    if keep is None:
        keep = keep_largest(weight, name=name)
    else:
        check_dense(keep, f"{name}: keep")
        if keep.shape != weight.shape or keep.dtype != torch.bool:
            raise FormatError(f"{name}: keep must be bool {list(weight.shape)}, not {keep.dtype} {list(keep.shape)}")
        check_keep(keep, f"keep of {name}")
        check_finite_weight(weight, name)
    group = None if format.group is None else format.group * KEPT // BLOCK
    return take_kept(weight, keep), Format(format.kind, format.bits, group), pack_mask(keep)
