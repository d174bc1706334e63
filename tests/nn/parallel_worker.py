"""One process of the tensor-parallel tests: builds the same weights as every other, compares its part with the whole.

python parallel_worker.py STORE RANK WORLD gloo|nccl|fails
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import fdk
from fdk import reference, testing
from fdk.nn import ColumnParallelLinear, Linear, RowParallelLinear

# How long a process waits for the others, which may be compiling kernels.
LIMIT = timedelta(seconds=240)
FORMATS = (
    "lut4_g32", "lut3_chan", "int4_g32", "uint4_g32", "nf4_g32", "nest8s4_g32", "trunc8s3_g32", "lut4_g32_sp16of32"
)  # fmt: skip


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    fmt = fdk.parse(name)
    up = testing.random_weight(fmt, 192, 128, dtype, seed=1, tables=3 if fmt.kind.table == "stored" else 1)
    down = testing.random_weight(fmt, 96, 192, dtype, seed=2)
    generator = torch.Generator().manual_seed(3)
    x, bias_up, bias_down = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 128), (192,), (96,)))
    scale = 2.0**-6
    hidden = reference.linear(x.double(), up, bias_up.double())
    expected = reference.linear(hidden * scale, down, bias_down.double())

    first, second = (Linear(weight.to(device), bias.to(device)) for weight, bias in ((up, bias_up), (down, bias_down)))
    column = ColumnParallelLinear.from_linear(first, name="up")
    row = RowParallelLinear.from_linear(second, name="down")
    x = x.to(device).requires_grad_()
    part = column(x)
    assert part.shape == (5, 192 // column.world)
    whole = ColumnParallelLinear.from_linear(first, gather=True)(x)
    assert torch.equal(whole.chunk(column.world, -1)[column.rank], part), "gathered rows are not this process's"
    # Up to six roundings of half a unit each (weights, two products, the sum), and float32 sums of 192 terms.
    limit = 8 * torch.finfo(dtype).eps
    for got, want in ((whole, hidden), (row(part * scale), expected)):
        error = (got.detach().cpu().double() - want).norm() / want.norm()
        assert error < limit, f"{name}: relative error {error:.2e} on rank {column.rank}, limit {limit:.2e}"
    split = RowParallelLinear.from_linear(second, split=True)(whole * scale)
    assert torch.equal(split, row(part * scale)), "split input differs from the process's own part"

    row(part * scale).sum().backward()
    dense = [reference.dequantise(weight, torch.float64) for weight in (up, down)]
    grad = torch.ones(5, 96, dtype=torch.float64) @ dense[1] * scale @ dense[0]
    error = (x.grad.cpu().double() - grad).norm() / grad.norm()
    assert error < limit, f"{name}: gradient off by {error:.2e} on rank {column.rank}, limit {limit:.2e}"


def refuse_what_does_not_divide(world: int) -> None:
    if world == 1:
        return
    layer = Linear(testing.random_weight(fdk.parse("lut4_g64"), 6, 64))
    try:
        RowParallelLinear.from_linear(layer, name="o_proj")
    except fdk.FormatError as error:
        assert "o_proj.weight: k / " in str(error), error
    else:
        raise AssertionError("a group was split over processes")


def main() -> None:
    store, rank, world, backend = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if backend == "fails":
        # One process ends with an error while the other waits for it.
        backend = "gloo"
        if rank == 0:
            raise SystemExit("rank 0 fails")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    for name in FORMATS:
        for dtype in (torch.bfloat16, torch.float16, *([torch.float32] if device.type == "cpu" else [])):
            print(name, dtype, flush=True)
            check(name, device, dtype)
    refuse_what_does_not_divide(world)
    dist.destroy_process_group()
    print("ok")


main()
