"""16:32 sparse integers multiplied as dense ones: masks spread their codes to memory (csrc/spread.cuh), then prefill.

Half a byte a weight is written and read again, not two as by way of dense weights, and it need not leave the L2 cache.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fdk.kernels.cuda import decode_config, driver, jit, prefill, prefill_choice, prefill_config
from fdk.packing.fragments import UNIT, block_counts, units
from fdk.weight import QuantisedWeight

BITS = 4
"""Of a code, dense."""

_WARPS, _CTAS, _BUFFER, _WINDOW = 8, 3, 32 * 80, 1024


def dense_shape(shape: decode_config.Shape) -> decode_config.Shape | None:
    """The shape of a weight once its codes are spread; None where masks drop weights that no code stands for."""
    if shape.kind != decode_config.SPARSE_INT:
        return None
    return replace(shape, bits=BITS, kind=decode_config.INT)


def choose(shape: decode_config.Shape, m: int, blocks: tuple[int, ...], sms: int) -> prefill_config.Config | None:
    """The configuration of the product of m rows of x with spread codes; None where there is none."""
    dense = dense_shape(shape)
    found = None if dense is None else prefill_choice.choose(dense, m, blocks, sms)
    return None if found is None else replace(found, fresh=True)


def shared_bytes(hopper: bool) -> int:
    """Shared memory of a CTA; the host twin of `Smem` in csrc/spread.cuh, which asserts it."""
    table = decode_config.table_aligned(BITS, decode_config.SPARSE_INT)
    before = table - _WINDOW if hopper else 0
    return before + table + (0 if before >= _WARPS * _BUFFER else _WARPS * _BUFFER)


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/spread.cuh."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("units", ctypes.c_int),
        ("zero", ctypes.c_uint32),
    )


def source(capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    defines = {"FDK_SHARED_BYTES": shared_bytes(capability >= (9, 0))}
    return "spread.cuh", defines, jit.architecture(capability)


@cache
def load(device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    capability = torch.cuda.get_device_capability(device)
    hopper = capability >= (9, 0)
    cubin = jit.cubin(*source(capability))
    return driver.Function(cubin, "fdk_spread", _WARPS * 32, shared_bytes(hopper), 1, dependent=hopper)


class Plan:
    """A sparse weight bound to the kernel that spreads its codes and to a configuration of the product."""

    def __init__(self, weight: QuantisedWeight, config: prefill_config.Config) -> None:
        shape = dense_shape(decode_config.shape_of(weight.geometry, None))
        assert shape is not None and config.fresh
        self.product = prefill.Plan(weight, config, shape)
        self.units = sum(block_counts(weight.geometry)) * units(shape.k)
        self.codes, self.device, self.sms = weight.parts["codes"], weight.device, self.product.sms
        with torch.cuda.device(self.device):
            self.function = load(self.device.index)

    def spread(self) -> Tensor:
        """The codes as those of a dense weight, int32 [blocks * units, 4, 32, 4]; OutOfMemoryError without room."""
        out = torch.empty((self.units, BITS, 32, UNIT // 16), dtype=torch.int32, device=self.device)
        params = Params(self.codes.data_ptr(), out.data_ptr(), self.units)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            self.function(min(-(-self.units // _WARPS), _CTAS * self.sms), stream, params)
        return out

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [m, n] = x [m, k] @ W.T + bias on the current stream; OutOfMemoryError without room for codes."""
        self.product(x, bias, out, codes=self.spread())
