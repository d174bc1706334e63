"""One scale per group: the conventions of every kind of format, and the search for a better scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdk.formats import Format

METHODS = ("auto", "absmax", "absmean", "search")
SMALLEST = 1e-12


def resolve_method(format: Format, method: str) -> str:
    """The statistic behind `method`: "auto" and the start of "search" are absmean to 2 bits and absmax above."""
    if method in ("absmax", "absmean"):
        return method
    return "absmean" if format.bits <= 2 else "absmax"


def base_scales(blocks: Tensor, format: Format, method: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of weight blocks [n, groups, group] before any search: float32, uint8, both [n, groups].

    absmean     mean |w| of the block, for every kind.
    absmax      lut, nf: max |w|, so that values lie in [-1, 1]. fp: max |w| over the largest entry (6).
                int: max |w| / ((2^bits - 1) / 2), the smallest scale at which no weight errs by more than half a step.
                uint: (max(w, 0) - min(w, 0)) / (2^bits - 1), so that 0 is always exact.

    Zeros (uint formats only) put 0 where it lies in [min(w, 0), max(w, 0)]: 0 for a block without negative
    weights, 2^bits - 1 for one without positive weights, the middle code for a block of zeros.
    """
    method = resolve_method(format, method)
    steps = (1 << format.bits) - 1
    zeros = None
    if format.has_zeros:
        low = blocks.amin(-1).float().clamp_(max=0)
        extent = blocks.amax(-1).float().clamp_(min=0).sub_(low)
        middle = 1 << (format.bits - 1)
        zeros = torch.where(extent > 0, low.div(-extent).mul_(steps).round_(), middle).clamp_(0, steps)
        # A NaN or an infinity has no integer; the scale carries it to the check that reports it.
        zeros = zeros.nan_to_num_(nan=0.0).to(torch.uint8)
    if method == "absmean":
        scales = blocks.abs().mean(-1, dtype=torch.float32)
    elif format.has_zeros:
        scales = _divided(extent, steps)
    else:
        scales = blocks.abs().amax(-1).float()
        if format.kind.values is not None:
            scales = _divided(scales, max(abs(v) for v in format.kind.values))
        elif not format.is_table:
            scales = _divided(scales, steps / 2)
    return scales, zeros


def _divided(scales: Tensor, by: float) -> Tensor:
    """scales / by, rounded once on every device: torch multiplies by the reciprocal of a number on CUDA.

    The last bit decides the codes of the largest weights of int formats, which lie half-way between two.
    """
    return scales / torch.full((), by, dtype=scales.dtype, device=scales.device)


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: at least 1e-12, rounded to `dtype`, and never rounded down to zero."""
    stored = scales.clamp(min=SMALLEST).to(dtype)
    if dtype == torch.float16:
        # 1e-12 is zero in float16; the smallest positive number keeps w / scale finite.
        stored = stored.clamp_(min=2.0**-24)
    return stored


def candidate_factors(bits: int) -> list[float]:
    """Factors on the base scale that the search tries: dense where most groups settle, sparse down to heavy clipping.

    Chosen so that the search loses at most 0.15 dB to 160 factors on normal and Student-t (3 and 4 degrees of
    freedom) weights, with groups of 64 and with one scale per row.
    """
    if bits <= 2:
        return [0.3 * (40 / 3) ** (i / 15) for i in range(16)]
    factors, factor = [1.25, 1.1, 1.04], 0.97
    while factor > min(0.7, 2.0 ** (bits - 7)):
        factors.append(factor)
        factor *= 0.95 if factor > 0.7 else 0.82
    return factors


def search_scales(
    blocks: Tensor,
    scales: Tensor,
    values_of: Callable[[Tensor], Tensor],
    bits: int,
    dtype: torch.dtype,
    refinements: int = 2,
) -> Tensor:
    """Scales in `dtype` that minimise the squared error of each block; no block gets worse than with `scales`.

    blocks      float32 [n, groups, group];  scales: base scales as stored, [n, groups].
    values_of   x = w / scale, float32 [n, groups, group], to the value that the quantiser would store for it.
    Tries `candidate_factors`, then `refinements` times the least-squares scale of the best codes so far.
    """
    best = scales
    best_values, best_error = _error(blocks, scales, values_of)

    def consider(candidate: Tensor) -> None:
        nonlocal best, best_values, best_error
        values, error = _error(blocks, candidate, values_of)
        # The margin is above the rounding of a float32 sum, so a win is a win in exact arithmetic too.
        wins = error < best_error * (1 - 1e-5)
        best = torch.where(wins, candidate, best)
        best_error = torch.where(wins, error, best_error)
        best_values = torch.where(wins[..., None], values, best_values)

    base = scales.float()
    for factor in candidate_factors(bits):
        consider(round_scales(base * factor, dtype))
    for _ in range(refinements):
        square = best_values.square().sum(-1)
        fitted = (blocks * best_values).sum(-1) / square
        usable = (square > 0) & (fitted > 0) & torch.isfinite(fitted)
        consider(torch.where(usable, round_scales(torch.where(usable, fitted, base), dtype), best))
    return best


def _error(blocks: Tensor, scales: Tensor, values_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    scale = scales.float()[..., None]
    values = values_of(blocks / scale)
    return values, torch.addcmul(blocks, values, scale, value=-1).square_().sum(-1)
