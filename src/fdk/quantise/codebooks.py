"""Where the table of a table format comes from: uniform, fixed by the format, or given by the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import as_integer, check_dtype, shown
from fdk.errors import FormatError
from fdk.formats import Format


def uniform_table(bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The default table of the lut formats, [2^bits] in `dtype`: linspace(-1, 1, 2^bits) as the source project has it.

    The source computes it in `dtype`, which differs from rounding the float32 table once (0.0625, not 0.0667, as the
    middle of bfloat16 with 4 bits) and costs or gains less than 0.1 dB.
    """
    return torch.linspace(-1.0, 1.0, 1 << bits, dtype=dtype)


def fixed_table(format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The table that the format itself defines (nf4, fp4), in the order of its codes, rounded to `dtype`."""
    if format.kind.values is None:
        raise FormatError(f"{format} has no fixed table")
    return torch.tensor(format.kind.values, dtype=torch.float64).to(dtype)


def stored_table(values: Tensor, bits: int, dtype: torch.dtype, name: str = "weight") -> Tensor:
    """A caller's table of 1 to 2^bits finite values as [2^bits] in `dtype`; a short one repeats its last value.

    The order is kept, so codes mean what the caller says they mean. FormatError names the tensor, the entry
    and the remedy for a wrong rank or length, a NaN or an infinity, or a value that `dtype` cannot hold.
    """
    if not 1 <= as_integer(bits, "bits") <= 8:
        raise FormatError(f"table of {name}: {bits} bits; give 1 to 8")
    check_dtype(dtype, f"table of {name}: dtype", (torch.bfloat16, torch.float16, torch.float32))
    size = 1 << bits
    if not isinstance(values, Tensor) or values.dim() != 1 or not 1 <= values.numel() <= size:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else shown(values)
        raise FormatError(f"table of {name}: {bits} bits need a 1-D tensor of 1 to {size} values, not {got}")
    if values.dtype == torch.bool or values.is_complex() or values.is_meta:
        raise FormatError(f"table of {name}: needs real values in memory, not {values.dtype} on {values.device}")
    given = values.detach().to("cpu", torch.float64)
    table = given.to(dtype)
    bad = ~torch.isfinite(table)
    if bad.any():
        index = int(bad.nonzero()[0])
        reason = "finite values only" if not torch.isfinite(given[index]) else f"a value within the range of {dtype}"
        raise FormatError(f"table of {name}: entry {index} is {given[index].item()}; a table holds {reason}")
    return torch.cat([table, table[-1:].expand(size - table.numel())])
