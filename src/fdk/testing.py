"""What correct means, as functions: error bounds, one-hot probes, exact grids, poison. See docs/numerics.md.

The tests and the benchmark's gate use the same ones, so that a number is printed only for a product that passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdk import reference
from fdk.formats import Format
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import pack_codes, pack_planes
from fdk.packing.sparse import pack_mask, take_kept
from fdk.weight import QuantisedWeight

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

# bfloat16 and float32 share an exponent range in which hardware may flush subnormals, so a flushed one is allowed.
SUBNORMAL_HALF = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25, torch.float32: 2.0**-126}


def random_weight(
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tables: int = 1,
    float_zeros: bool = False,
) -> QuantisedWeight:
    """A weight with uniformly random codes, scales in [0.5, 1.5) of random sign, normal tables; seeded on the CPU.

    `tables` > 1 splits the rows into that many ranges at random places, each with its own table.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = format.groups(k)
    codes = torch.randint(0, 1 << format.bits, (n, k), generator=generator, dtype=torch.uint8)
    if format.is_nested:
        code_parts = {"planes": pack_planes(codes)}
    elif format.sparse:
        order = torch.rand(n, k // BLOCK, BLOCK, generator=generator).argsort(2)
        keep = (order < KEPT).flatten(1)
        code_parts = {"codes": pack_codes(take_kept(codes, keep), format.bits), "mask": pack_mask(keep)}
    else:
        code_parts = {"codes": pack_codes(codes, format.bits)}
    signs = torch.randint(0, 2, (n, groups), generator=generator) * 2 - 1
    parts = {
        **code_parts,
        "scales": ((torch.rand(n, groups, generator=generator) + 0.5) * signs).to(dtype),
    }
    row_ends = [n]
    if format.kind.table == "fixed":
        parts["table"] = torch.tensor(format.kind.values).to(dtype)
    elif format.is_table:
        cuts = torch.randperm(max(0, n - 1), generator=generator)[: tables - 1] + 1
        row_ends = [*sorted(cuts.tolist()), n]
        table = torch.randn(len(row_ends), 1 << format.bits, generator=generator)
        parts["table"] = table.sort(1).values.to(dtype)
    if format.has_zeros:
        zeros = torch.randint(0, 1 << format.bits, (n, groups), generator=generator, dtype=torch.uint8)
        parts["zeros"] = (zeros + torch.rand(n, groups, generator=generator)).to(dtype) if float_zeros else zeros
    parts = {name: part.to(device) for name, part in parts.items()}
    return QuantisedWeight.from_parts(format, k, parts, row_ends)


def exact(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """x [m, k] @ W.T + bias in float64 from the stored codes, scales and table: no quantisation error in it."""
    return reference.linear(x.double(), weight, None if bias is None else bias.double())


def error_bound(
    x: Tensor, weight: QuantisedWeight, y: Tensor, dtype: torch.dtype, rounds_weights: bool = False
) -> Tensor:
    """Largest |error| per element [m, n] that rounding explains; y is the exact result in float64.

    6 * (u_w / sqrt(3)) * |x o w|  +  6 * sqrt(k) * 2^-24 * |x o w|  +  1.01 * u * |y|  +  half the least subnormal,
    with |.| the 2-norm over k, u the unit roundoff of `dtype`, and u_w = u if scaled weights are rounded before they
    are multiplied, else 0.
    """
    return dense_bound(x, reference.dequantise(weight, torch.float64), y, dtype, rounds_weights)


def dense_bound(x: Tensor, dense: Tensor, y: Tensor, dtype: torch.dtype, rounds_weights: bool = False) -> Tensor:
    """`error_bound` for a weight given as its exact float64 matrix [n, k]."""
    u = UNIT_ROUNDOFF[dtype]
    norm = (x.double().square() @ dense.square().T).sqrt()
    weights = 6 * u / math.sqrt(3) if rounds_weights else 0.0
    return (weights + 6 * math.sqrt(x.shape[1]) * 2.0**-24) * norm + 1.01 * u * y.abs() + SUBNORMAL_HALF[dtype]


@dataclass(frozen=True)
class Violation:
    """The worst element of a product that left its bound."""

    row: int
    column: int
    got: float
    expected: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"y[{self.row}, {self.column}] = {self.got:.8g}, expected {self.expected:.8g}: "
            f"{self.ratio:.3g} times the bound"
        )


def violation(y: Tensor, expected: Tensor, bound: Tensor) -> Violation | None:
    """The element of y [m, n] that exceeds its bound most, or None if every element is within it. NaN exceeds it.

    An infinity counts as the value at which y's dtype overflows, so that a product too large for it may be infinite.
    """
    if y.numel() == 0:
        return None
    limit = torch.finfo(y.dtype).max * (1 + UNIT_ROUNDOFF[y.dtype])
    error = (y.double().clamp(-limit, limit) - expected.clamp(-limit, limit)).abs()
    ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    worst = int(ratio.argmax())
    row, column = divmod(worst, y.shape[1])
    if ratio[row, column] <= 1:
        return None
    return Violation(row, column, y[row, column].item(), expected[row, column].item(), ratio[row, column].item())


def poisoned(m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An output [m, n] full of NaN: what a kernel leaves unwritten stays visible."""
    return torch.full((m, n), math.nan, dtype=dtype, device=device)


def one_hot_probe(k: int, columns: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Unit activations x [len(columns), k]: row i is one at columns[i], so the product is W[:, columns].T, rounded."""
    x = torch.zeros(len(columns), k, dtype=dtype, device=device)
    x[torch.arange(len(columns), device=device), columns.to(device)] = 1
    return x


def check_product(
    kernel, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, rounds_weights: bool
) -> Violation | None:
    """Run `kernel` on poisoned output and hold it to the bound; None if every element passes.

    kernel: a function (x, weight, bias, out) -> None that writes out [m, n].
    """
    out = poisoned(x.shape[0], weight.shape[0], x.dtype, x.device)
    kernel(x, weight, bias, out)
    expected = exact(x, weight, bias)
    bound = error_bound(x, weight, expected, x.dtype, rounds_weights)
    if bias is not None:
        # The sum of product and bias is one more float32 rounding, relative to the larger of the two.
        bound += 2.0**-23 * (expected.abs() + bias.double().abs())
    return violation(out, expected, bound)
