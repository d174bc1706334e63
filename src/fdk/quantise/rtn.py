"""Round to nearest: codes for a weight, given or derived scales and table, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdk.arguments import check_name
from fdk.errors import FormatError
from fdk.formats import Format, parse
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import pack_codes, row_bytes
from fdk.quantise.checks import check_finite, check_weight, storage_dtype
from fdk.quantise.codebooks import fixed_table, stored_table, uniform_table
from fdk.quantise.kmeans import fit_table
from fdk.quantise.nearest import Nearest
from fdk.quantise.nested import quantise_nested
from fdk.quantise.scales import METHODS, base_scales, round_scales, search_scales
from fdk.quantise.sparsity import compact

# Weights per chunk: 1 MiB of float32 stays in a core's L2 cache; an accelerator wants enough to fill it.
CHUNK_CPU = 1 << 18
CHUNK_ACCELERATOR = 1 << 24
ARITHMETIC = ("exact", "source")


@torch.no_grad()
def quantise(
    weight: Tensor,
    format: Format | str,
    *,
    dtype: torch.dtype | None = None,
    codebook: str | Tensor = "uniform",
    scale: str = "auto",
    arithmetic: str = "exact",
    keep: Tensor | None = None,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Canonical parts of `weight` in `format`: {codes, scales, table (table formats), zeros (uint formats)}.

    Nested formats: {planes, scales}, by `fdk.quantise.quantise_nested` with its default widths. Sparse formats also
    {mask}, and codes of the kept weights only; dropped ones do not enter scales, zeros or tables.

    weight      [n, k] bfloat16, float16, float32 or float64, any strides, any device; not changed.
    dtype       of scales and table; default: the weight's own (float32 for float64).
    codebook    lut formats: "uniform" (linspace(-1, 1, 2^bits)), "kmeans" (fitted to this tensor on its base
                scales) or a tensor of at most 2^bits values. Other formats define their own values.
    scale       "absmax", "absmean", "auto" (absmean to 2 bits, absmax above) or "search" (from "auto", the scale
                that minimises each group's squared error). Conventions: `fdk.quantise.scales.base_scales`.
    arithmetic  "exact": the nearest entry of the stored table to w / stored scale in float32, ties to the lower
                index. "source": the source project's codes bit for bit (lut formats): the quotient and the
                midpoints between entries are rounded to `dtype` first.
    keep        sparse formats: bool [n, k] with 16 of every 32 set; default: the largest (`keep_largest`).
    name        what error messages call the weight.

    Integer formats round w / scale half to even. Returned: codes uint8 [n, ceil(k*bits/8)], scales [n, groups],
    table [1, 2^bits], zeros uint8 [n, groups], on the weight's device. Extra memory: a few chunks of rows.
    FormatError or UnsupportedError (naming `name`, the value, its place and the remedy) for input it refuses.
    """
    format = parse(format)
    if format.is_nested:
        _check_options(format, codebook, scale, arithmetic, name)
        return quantise_nested(weight, format, dtype=dtype, scale=scale, name=name).parts
    _check_options(format, codebook, scale, arithmetic, name)
    check_weight(weight, format, name)
    if format.sparse:
        kept, plain, mask = compact(weight.detach(), format, keep, name)
        options = {"dtype": dtype, "codebook": codebook, "scale": scale, "arithmetic": arithmetic, "name": name}
        parts = quantise(kept, plain, **options)
        return {"codes": parts.pop("codes"), "mask": mask, **parts}
    if keep is not None:
        raise FormatError(f"{name}: {format} keeps every weight; use {format}_sp{KEPT}of{BLOCK} or leave keep out")
    dtype = storage_dtype(weight, dtype, name)
    weight = weight.detach()
    table = _given_table(format, codebook, dtype, name)
    chunks = _Chunks(weight, format)
    scales, zeros = _base(chunks, scale, dtype, name)
    if table is None and format.is_table:
        pairs = ((blocks, scales[rows]) for rows, blocks in chunks.floats())
        table = fit_table(pairs, scales.amax(), format.bits).to(dtype)

    rounding = _Rounding(format, table, weight.device, dtype, arithmetic)
    n, k = weight.shape
    codes = torch.empty(n, row_bytes(k, format.bits), dtype=torch.uint8, device=weight.device)
    for rows, blocks in chunks:
        zero = None if zeros is None else zeros[rows]
        if scale == "search":
            blocks = blocks.float()
            scales[rows] = search_scales(blocks, scales[rows], rounding.values_of(zero), format.bits, dtype)
        chunk = rounding.codes(rounding.quotient(blocks, scales[rows]), zero)
        codes[rows] = pack_codes(chunk.view(-1, k), format.bits)

    parts = {"codes": codes, "scales": scales}
    if table is not None:
        parts["table"] = table.to(weight.device)[None]
    if zeros is not None:
        parts["zeros"] = zeros
    return parts


def _check_options(format: Format, codebook: str | Tensor, scale: str, arithmetic: str, name: str) -> None:
    check_name(scale, "scale", METHODS, name)
    check_name(arithmetic, "arithmetic", ARITHMETIC, name)
    if isinstance(codebook, str) and codebook not in ("uniform", "kmeans"):
        raise FormatError(f"{name}: unknown codebook {codebook!r}; choose uniform, kmeans or a tensor of values")
    stored = format.kind.table == "stored"
    if not stored and not (isinstance(codebook, str) and codebook == "uniform"):
        raise FormatError(f"{name}: {format} defines its own values and takes no codebook; use lut{format.bits}")
    if arithmetic == "source" and (not stored or scale == "search"):
        raise FormatError(f"{name}: arithmetic='source' exists for lut formats without scale search; use 'exact'")


def _given_table(format: Format, codebook: str | Tensor, dtype: torch.dtype, name: str) -> Tensor | None:
    """The table [2^bits] in `dtype` that is known before the weights are read; None if there is none."""
    if not format.is_table or (isinstance(codebook, str) and codebook == "kmeans"):
        return None
    if format.kind.table == "fixed":
        return fixed_table(format, dtype)
    if isinstance(codebook, str):
        return uniform_table(format.bits, dtype)
    return stored_table(codebook, format.bits, dtype, name)


class _Chunks:
    """Iterates over (slice of rows, weight blocks [rows, groups, group] in the weight's dtype)."""

    def __init__(self, weight: Tensor, format: Format) -> None:
        self.weight, self.format = weight, format
        self.groups = format.groups(weight.shape[1])
        budget = CHUNK_CPU if weight.device.type == "cpu" else CHUNK_ACCELERATOR
        self.rows = max(1, budget // weight.shape[1])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        n, k = self.weight.shape
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            blocks = self.weight[rows].reshape(-1, self.groups, k // self.groups)
            # A float64 weight is quantised as float32, so that every dtype takes the same path.
            yield rows, blocks.float() if blocks.dtype == torch.float64 else blocks

    def floats(self) -> Iterator[tuple[slice, Tensor]]:
        """The same in float32."""
        return ((rows, blocks.float()) for rows, blocks in self)


def _base(chunks: _Chunks, scale: str, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor | None]:
    """Base scales as stored and zeros of the whole weight; FormatError if one is not finite."""
    weight, format = chunks.weight, chunks.format
    shape = weight.shape[0], chunks.groups
    scales = torch.empty(shape, dtype=dtype, device=weight.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=weight.device) if format.has_zeros else None
    for rows, blocks in chunks:
        base, zero = base_scales(blocks, format, scale)
        scales[rows] = round_scales(base, dtype)
        if zeros is not None:
            zeros[rows] = zero
    check_finite(weight, scales, format, chunks.rows, name)
    return scales, zeros


class _Rounding:
    """From w / scale to codes and to the values they stand for, for one format and table."""

    def __init__(
        self, format: Format, table: Tensor | None, device: torch.device, dtype: torch.dtype, arithmetic: str
    ) -> None:
        self.format = format
        self.dtype = dtype if arithmetic == "source" else torch.float32
        midpoints = "storage" if arithmetic == "source" else "exact"
        self.nearest = None if table is None else Nearest(table, device, midpoints)
        self.top = (1 << format.bits) - 1

    def quotient(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """blocks [n, groups, group] over scales [n, groups], rounded once to float32 (or to `dtype` for "source")."""
        return torch.div(blocks.to(self.dtype), scales.to(self.dtype)[..., None]).float()

    def codes(self, x: Tensor, zero: Tensor | None) -> Tensor:
        """uint8 codes of x [n, groups, group]; zero: uint8 [n, groups] of a uint format."""
        if self.nearest is not None:
            return self.nearest.codes(x)
        offset = self.format.offset if zero is None else zero[..., None]
        return x.round_().add_(offset).clamp_(0, self.top).to(torch.uint8)

    def values_of(self, zero: Tensor | None):
        """A function from x to the value that its code stands for, float32."""
        if self.nearest is not None:
            return lambda x: self.nearest.values(self.nearest.codes(x))
        offset = self.format.offset if zero is None else zero[..., None].float()
        return lambda x: x.round_().clamp_(-offset, self.top - offset)
