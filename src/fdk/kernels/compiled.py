"""The reference through torch.compile: dequantise and product in one graph, as the compiled yardstick.

It is chosen by name only. Compiling takes seconds for every new format and shape.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.kernels import Problem
from fdk.packing.layouts import Geometry, code_parts
from fdk.weight import QuantisedWeight


def unpack(stream: Tensor, bits: int, k: int) -> Tensor:
    """Canonical codes uint8 [n, bytes] as int32 [n, k], with operations that a compiler fuses."""
    if bits == 8:
        return stream.int()
    octets = -(-k // 8)
    stream = torch.nn.functional.pad(stream, (0, octets * bits - stream.shape[1])).int()
    stream = stream.view(-1, octets, bits)
    codes = []
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, 2).view(-1, octets * 8)[:, :k]


def unpack_leading(planes: Tensor, count: int, k: int) -> Tensor:
    """The `count` leading bits of nested codes from planes uint8 [n, 8, bytes], as int32 [n, k]."""
    places = torch.arange(8, dtype=torch.int32, device=planes.device)
    bits = (planes[:, :count, :, None].int() >> places) & 1
    weights = 1 << torch.arange(count - 1, -1, -1, dtype=torch.int32, device=planes.device)
    return (bits.flatten(2) * weights[:, None]).sum(1, dtype=torch.int32)[:, :k]


def slice_table(format: Format, device: torch.device) -> Tensor:
    """[1, 2^read_bits] float32: the values of a nested format's leading bits."""
    return torch.tensor([format.slice_values()], device=device)


def fused_linear(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, zeros: Tensor | None, bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """x [m, k] @ W.T + bias in x's dtype; the body that is compiled, the same arithmetic as `fdk.reference`."""
    fmt: Format = geometry.format
    if fmt.is_nested:
        values, table = unpack_leading(codes, fmt.read_bits, geometry.k), slice_table(fmt, x.device)
    else:
        values = unpack(codes, fmt.bits, geometry.k)
    if table is not None:
        first = torch.zeros(geometry.n, dtype=torch.int32, device=x.device)
        for end in geometry.row_ends[:-1]:
            first = first + (torch.arange(geometry.n, device=x.device) >= end).int()
        values = table.float().reshape(-1)[values + (first << fmt.bits)[:, None]]
    else:
        values = values.float()
    values = values.view(geometry.n, geometry.groups, geometry.group_size)
    if table is None:
        values = values - (zeros.float().unsqueeze(2) if fmt.has_zeros else fmt.offset)
    dense = (values * scales.float().unsqueeze(2)).view(geometry.n, geometry.k)
    if x.shape[0] == 1:
        y = (dense * x.float()).sum(1).unsqueeze(0)
    else:
        # A product in 16 bits accumulates in float32 and rounds once, but not before a bias is added.
        dense = dense if bias is not None else dense.to(x.dtype)
        y = (x.float() @ dense.T) if bias is not None else x @ dense.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(fused_linear, dynamic=False, fullgraph=True)


class CompiledKernel:
    """`fused_linear` through torch.compile, compiled at first use for every format and shape."""

    name = "torch.compile"
    layout = "canonical"

    def supports(self, problem: Problem) -> str | None:
        if problem.geometry.format.sparse:
            return "does not fuse the spreading of kept weights; the reference computes the same"
        if problem.device.type == "cuda" and find_spec("triton") is None:
            return "torch.compile needs the triton package on a GPU"
        if problem.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")) and sys.platform != "win32":
            return "torch.compile needs a C++ compiler on the CPU (install g++, or name one in CXX)"
        return None

    def rounds_weights(self, problem: Problem) -> bool:
        return problem.m > 1

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        parts = weight.parts
        # Each combination of format and shape is a graph of its own; dynamo's limit is made for far fewer.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
            y = _compiled()(
                x,
                parts[code_parts(weight.format)[0]],
                parts["scales"],
                parts.get("table"),
                parts.get("zeros"),
                bias,
                weight.geometry,
            )
        out.copy_(y)


KERNEL = CompiledKernel()
