"""Nested codes: one 8-bit master that serves several widths, by rounding or by error compensation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fdk.arguments import check_dense, check_name, check_parts, shown
from fdk.errors import FormatError
from fdk.formats import Format, parse
from fdk.packing.bits import pack_planes, unpack_planes
from fdk.quantise.checks import check_finite, check_weight, storage_dtype
from fdk.quantise.metrics import sqnr_db
from fdk.quantise.scales import METHODS, base_scales, candidate_factors, round_scales

CHUNK = 1 << 18
COLUMNS = 128
"""Columns of error compensation whose effect on later columns is applied at once."""
DAMPING = 0.01
TIES = 1e-6
"""Weight of every width, in multiples of its default, beside the weights that were asked for."""


@dataclass(frozen=True)
class NestedQuantisation:
    """parts: canonical, {planes, scales}. sqnr_db: the ratio at every width that the format is served at, in dB."""

    parts: dict[str, Tensor]
    sqnr_db: dict[int, float]


def default_widths(format: Format) -> dict[int, float]:
    """Every width, its squared error relative to the square of its own step: no width drowns in another's noise."""
    return {bits: 4.0 ** (bits - format.bits) for bits in format.kind.slices}


def master_values(format: Format, bits: int) -> Tensor:
    """float64 [256]: the value of every master code, before its scale, when served at `bits`."""
    served = format.at(bits)
    return torch.tensor(served.slice_values(), dtype=torch.float64).repeat_interleave(
        1 << (format.bits - served.read_bits)
    )


class BestCode:
    """code(x) = argmin over the 256 codes q of sum over widths r of weight_r * (x - value_r(q))^2, exactly.

    Less the x^2 that all codes share, the objective of a code is a line in x; the best code at x is the line that is
    lowest there. So the search over all codes is one look-up among the corners of their lower envelope.
    """

    def __init__(self, format: Format, widths: Mapping[int, float], device: torch.device) -> None:
        values = {bits: master_values(format, bits) for bits in widths}
        total = sum(widths.values())
        slope = sum(weight / total * values[bits] for bits, weight in widths.items())
        height = sum(weight / total * values[bits].square() for bits, weight in widths.items())
        codes, corners = _lower_envelope((-2 * slope).tolist(), height.tolist())
        self._codes = torch.tensor(codes, dtype=torch.uint8, device=device)
        self._corners = torch.tensor(corners, dtype=torch.float64).float().to(device)
        self.slope, self.height = slope.float().to(device), height.float().to(device)

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of float32 x of any shape."""
        return self._codes[torch.bucketize(x, self._corners, out_int32=True)]

    def error(self, x: Tensor, codes: Tensor) -> Tensor:
        """float32: the weighted mean over widths of (x - value)^2."""
        index = codes.int()
        return x.square() - 2 * x * self.slope[index] + self.height[index]

    def mean_value(self, codes: Tensor) -> Tensor:
        """float32: the weighted mean over widths of the codes' values."""
        return self.slope[codes.int()]


def _lower_envelope(slopes: list[float], heights: list[float]) -> tuple[list[int], list[float]]:
    """Lines slope * x + height that are lowest somewhere, from left to right, and the x where one follows another."""
    order = sorted(range(len(slopes)), key=lambda i: (-slopes[i], heights[i]))
    lines: list[int] = []
    corners: list[float] = []
    for i in order:
        if lines and slopes[i] == slopes[lines[-1]]:
            continue
        while lines:
            corner = (heights[i] - heights[lines[-1]]) / (slopes[lines[-1]] - slopes[i])
            if corners and corner <= corners[-1]:
                lines.pop()
                corners.pop()
                continue
            corners.append(corner)
            break
        lines.append(i)
    return lines, corners


@torch.no_grad()
def quantise_nested(
    weight: Tensor,
    format: Format | str,
    *,
    widths: Mapping[int, float] | None = None,
    dtype: torch.dtype | None = None,
    scale: str = "auto",
    hessian: Tensor | None = None,
    activations: Tensor | None = None,
    name: str = "weight",
) -> NestedQuantisation:
    """A nested master of `weight` [n, k] whose slices together err least. The format's served width plays no part.

    widths       {bits: weight}: the objective is the sum of weight * squared error over them; default: every width,
                 relative to its own step (`default_widths`). Widths not named only settle ties between codes.
    scale        "auto" and "absmax": max |w| / 127.5; "absmean": mean |w| / 32, so that half of the range is four
                 times the mean; "search": the factor on "auto" with the least objective for each group.
    hessian      [k, k] symmetric, sum of x x^T over calibration tokens: errors are compensated column by column in the
                 columns to come (GPTQ, Frantar et al., 2022), with the weighted mean error of all widths, which is
                 what minimises the sum of the layer's output errors (MatGPTQ). None: round to the best code.
    activations  [..., k] calibration inputs of the layer, in place of the Hessian.

    FormatError (naming `name`) for input it refuses, a Hessian of another size or one that is not positive definite.
    """
    format = parse(format)
    if not format.is_nested:
        raise FormatError(f"{name}: {format} is not nested; use fdk.quantise.quantise")
    widths = _checked_widths(format, widths, name)
    check_name(scale, "scale", METHODS, name)
    check_weight(weight, format, name)
    dtype = storage_dtype(weight, dtype, name)
    n, k = weight.shape
    best = BestCode(format, widths, weight.device)
    scales = torch.empty(n, format.groups(k), dtype=dtype, device=weight.device)
    rows_at_once = max(1, CHUNK // k)
    chunks = [slice(start, min(start + rows_at_once, n)) for start in range(0, n, rows_at_once)]
    for rows in chunks:
        blocks = weight[rows].float().reshape(-1, scales.shape[1], k // scales.shape[1])
        scales[rows] = _scales(blocks, format, best, scale, dtype)
    check_finite(weight, scales, format, rows_at_once, name)
    factor = _inverse_factor(hessian, activations, k, weight.device, name)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for rows in chunks:
        steps = scales[rows].float().repeat_interleave(k // scales.shape[1], 1)
        part = weight[rows].float()
        codes[rows] = best.codes(part / steps) if factor is None else _compensated(part, steps, best, factor)
    parts = {"planes": pack_planes(codes), "scales": scales}
    return NestedQuantisation(parts, sqnr_by_width(weight, format, parts))


def sqnr_by_width(weight: Tensor, format: Format | str, parts: Mapping[str, Tensor]) -> dict[int, float]:
    """{bits: SQNR in dB} of canonical nested parts against the weight [n, k] they stand for, at every served width."""
    format = parse(format)
    check_weight(weight, format, "weight")
    check_parts(parts)
    k = weight.shape[1]
    master = unpack_planes(parts["planes"], k).int()
    steps = parts["scales"].float().repeat_interleave(format.group_size(k), 1)
    return {
        bits: sqnr_db(weight, master_values(format, bits).float().to(weight.device)[master] * steps)
        for bits in format.kind.slices
    }


def _checked_widths(format: Format, widths: Mapping[int, float] | None, name: str) -> dict[int, float]:
    if widths is None:
        return default_widths(format)
    if not isinstance(widths, Mapping):
        raise FormatError(f"{name}: widths is {shown(widths)}; give {{bits: weight}}, such as {{8: 1.0, 4: 0.1}}")
    for bits, weight in widths.items():
        format.at(bits)
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise FormatError(f"{name}: the weight of {bits} bits is {shown(weight)}; give a positive number")
    if not widths:
        raise FormatError(f"{name}: widths is empty; give {{bits: weight}}, such as {{8: 1.0, 4: 0.1}}")
    # Codes that are alike at the named widths are told apart by the others.
    return {bits: widths.get(bits, 0.0) + TIES * other for bits, other in default_widths(format).items()}


def _scales(blocks: Tensor, format: Format, best: BestCode, scale: str, dtype: torch.dtype) -> Tensor:
    """Stored scales of blocks [n, groups, group]."""
    if scale == "absmean":
        return round_scales(blocks.abs().mean(-1) / 32, dtype)
    base, _ = base_scales(blocks, format, "absmax")
    found = round_scales(base, dtype)
    if scale != "search":
        return found
    least = None
    for factor in (1.0, *candidate_factors(3)):
        candidate = round_scales(base * factor, dtype)
        x = blocks / candidate.float()[..., None]
        error = best.error(x, best.codes(x)).sum(-1) * candidate.float().square()
        if least is None:
            least = error
        wins = error < least * (1 - 1e-5)
        found, least = torch.where(wins, candidate, found), torch.where(wins, error, least)
    return found


def _inverse_factor(
    hessian: Tensor | None, activations: Tensor | None, k: int, device: torch.device, name: str
) -> Tensor | None:
    """Upper Cholesky factor [k, k] of the damped Hessian's inverse, float32; None without calibration."""
    if hessian is not None and activations is not None:
        raise FormatError(f"{name}: give a Hessian or activations, not both")
    if activations is not None:
        check_dense(activations, f"{name}: activations")
        if not activations.dim() or activations.shape[-1] != k:
            raise FormatError(f"{name}: activations are {list(activations.shape)}, but the layer takes [..., {k}]")
        x = activations.reshape(-1, k).to(device, torch.float64)
        hessian = x.T @ x
    if hessian is None:
        return None
    check_dense(hessian, f"{name}: hessian")
    if hessian.shape != (k, k):
        raise FormatError(f"{name}: the Hessian is {list(hessian.shape)}, but the layer needs [{k}, {k}]")
    hessian = hessian.to(device, torch.float64).clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        raise FormatError(f"{name}: the Hessian is zero or not finite; calibrate with activations that reach the layer")
    diagonal += DAMPING * mean
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise FormatError(f"{name}: the Hessian is not positive definite; it must be the sum of x x^T over tokens")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


def _compensated(weight: Tensor, steps: Tensor, best: BestCode, factor: Tensor) -> Tensor:
    """Codes uint8 [n, k] of float32 weights, each column's error spread over the columns after it."""
    weight = weight.clone()
    k = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        errors = torch.empty(weight.shape[0], end - start, dtype=torch.float32, device=weight.device)
        for column in range(start, end):
            step = steps[:, column]
            code = best.codes(weight[:, column] / step)
            error = (weight[:, column] - best.mean_value(code) * step) / factor[column, column]
            weight[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            codes[:, column], errors[:, column - start] = code, error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return codes
