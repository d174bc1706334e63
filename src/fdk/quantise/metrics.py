"""How far a quantised weight is from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdk.arguments import check_dense
from fdk.errors import FormatError
from fdk.formats import Format

CHUNK = 1 << 22


@dataclass(frozen=True)
class LayerError:
    """Error of one quantised layer.

    sqnr_db          10 log10(sum w^2 / sum (w - dequantised)^2); inf if there is no error.
    max_abs_error    max |w - dequantised|, in the unit of the weight.
    bits_per_weight  stored bits, scales, zeros and tables included, over n * k.
    """

    name: str
    format: str
    shape: tuple[int, int]
    sqnr_db: float
    max_abs_error: float
    bits_per_weight: float


@torch.no_grad()
def _error_sums(weight: Tensor, dequantised: Tensor, name: str) -> tuple[float, float, float]:
    """(sum w^2, sum (w - d)^2, max |w - d|), float32 differences summed in float64, a chunk of rows at a time."""
    check_dense(weight, name)
    check_dense(dequantised, f"{name}, dequantised,")
    if weight.shape != dequantised.shape or weight.dim() != 2:
        raise FormatError(
            f"{name} has shape {list(weight.shape)} and its dequantised form {list(dequantised.shape)}; "
            "an error needs two [n, k] tensors of one shape"
        )
    signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    noise, largest = signal.clone(), signal.clone()
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        w = weight[start : start + rows].to(torch.float32)
        error = dequantised[start : start + rows].to(w.device, torch.float32) - w
        signal += w.square().sum(dtype=torch.float64)
        noise += error.square().sum(dtype=torch.float64)
        if error.numel():
            largest = torch.maximum(largest, error.abs().amax().double())
    return signal.item(), noise.item(), largest.item()


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def sqnr_db(weight: Tensor, dequantised: Tensor) -> float:
    """Signal to quantisation noise ratio of two [n, k] tensors in dB; inf without error. FormatError: shapes differ."""
    signal, noise, _ = _error_sums(weight, dequantised, "weight")
    return _decibel(signal, noise)


def layer_error(
    name: str, format: Format, weight: Tensor, dequantised: Tensor, stored_bytes: int | None = None
) -> LayerError:
    """The error record of one layer.

    stored_bytes    bytes of its parts; default: those of `format` with 16-bit scales, one table, 8-bit zeros.
    """
    signal, noise, largest = _error_sums(weight, dequantised, name)
    n, k = weight.shape
    if stored_bytes is None:
        stored_bytes = format.nbytes(n, k, zero_size=1)
    return LayerError(name, str(format), (n, k), _decibel(signal, noise), largest, 8 * stored_bytes / max(1, n * k))
