"""What a quantiser refuses, with the tensor, the value, the place and the remedy in the message."""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import shown
from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_weight(weight: Tensor, format: Format, name: str) -> None:
    """FormatError or UnsupportedError unless weight is a dense, non-empty float [n, k] in memory that `format` fits."""
    if not isinstance(weight, Tensor):
        raise FormatError(f"{name} is {shown(weight)}, not a torch.Tensor; pass a float tensor [n, k]")
    if weight.layout != torch.strided or weight.is_quantized:
        raise FormatError(f"{name} has layout {weight.layout} and dtype {weight.dtype}; pass a dense float tensor")
    if weight.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in WEIGHT_DTYPES)
        raise FormatError(f"{name} has dtype {weight.dtype}; quantise takes {allowed}, so cast or import it first")
    if weight.dim() != 2:
        raise FormatError(f"{name} has shape {list(weight.shape)}; quantise takes two dimensions, so reshape it")
    if not weight.numel():
        raise FormatError(f"{name} has shape {list(weight.shape)} and nothing to quantise; skip this layer")
    if weight.is_meta:
        raise UnsupportedError(f"{name} is on the meta device and has no values; load it before quantising")
    try:
        format.groups(weight.shape[1])
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def storage_dtype(weight: Tensor, dtype: torch.dtype | None, name: str) -> torch.dtype:
    """The dtype of scales and table: `dtype`, or that of the weight (float32 for a float64 weight)."""
    if dtype is None:
        return torch.float32 if weight.dtype == torch.float64 else weight.dtype
    if not isinstance(dtype, torch.dtype) or dtype not in STORAGE_DTYPES:
        raise FormatError(f"{name}: scales cannot be stored as {shown(dtype)}; use bfloat16, float16 or float32")
    return dtype


def check_finite(weight: Tensor, scales: Tensor, format: Format, chunk_rows: int, name: str) -> None:
    """FormatError with the first offender if a stored scale is not finite; one synchronisation.

    A NaN or an infinity anywhere in a block reaches its scale, so the weights are read again only on failure.
    """
    if torch.isfinite(scales).all():
        return
    row = int((~torch.isfinite(scales)).any(1).nonzero()[0])
    for start in range(row, weight.shape[0], chunk_rows):
        bad = (~torch.isfinite(weight[start : start + chunk_rows])).nonzero()
        if len(bad):
            row, column = start + int(bad[0, 0]), int(bad[0, 1])
            raise FormatError(
                f"{name}[{row}, {column}] is {weight[row, column].item()}; a weight must be finite, "
                "so repair the checkpoint or skip this layer"
            )
    group = int((~torch.isfinite(scales[row])).nonzero()[0])
    size = format.group_size(weight.shape[1])
    largest = weight[row, group * size : (group + 1) * size].abs().amax().item()
    raise FormatError(
        f"{name}: the scale of row {row}, columns {group * size} to {(group + 1) * size - 1} (largest weight "
        f"{largest:g}) exceeds the range of {scales.dtype}; store it as bfloat16 or float32 (dtype=...)"
    )
