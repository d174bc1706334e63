"""The streaming floor (csrc/stream.cuh): what reading a weight's bytes takes when nothing is done with them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fdk.errors import FormatError
from fdk.kernels.cuda import driver, jit


@dataclass(frozen=True)
class StreamConfig:
    """Grid of the streaming kernel: CTAs, threads of each, 16-byte loads in flight per thread."""

    ctas: int
    threads: int
    unroll: int


CANDIDATES = tuple(
    StreamConfig(c, t, u) for c, t in ((132, 512), (132, 1024), (264, 512), (264, 1024), (528, 512)) for u in (2, 4, 8)
)
"""Grids worth trying; a floor is the best of them."""


class _Params(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("out", ctypes.c_void_p))


def source(nbytes: int, n: int, config: StreamConfig, capability: tuple[int, int]) -> jit.Source:
    """What the kernel that reads `nbytes` and writes n outputs is compiled from."""
    defines = {
        "FDK_BYTES": nbytes,
        "FDK_N": n,
        "FDK_CTAS": config.ctas,
        "FDK_THREADS": config.threads,
        "FDK_UNROLL": config.unroll,
    }
    return "stream.cuh", defines, jit.architecture(capability)


@cache
def _load(nbytes: int, n: int, config: StreamConfig, dependent: bool, device: int) -> driver.Function:
    capability = torch.cuda.get_device_capability(device)
    cubin = jit.cubin(*source(nbytes, n, config, capability))
    return driver.Function(cubin, "fdk_stream", config.threads, 0, 1, dependent=dependent and capability >= (9, 0))


def stream_floor(data: Tensor, out: Tensor, config: StreamConfig = CANDIDATES[1], dependent: bool = True) -> None:
    """Read all of `data` (contiguous, 16-byte aligned, a multiple of 16 bytes) and write out [n] (16-bit elements).

    dependent: launch as the product kernels do, so that loads start before the kernel in front has ended.
    """
    nbytes = data.numel() * data.element_size()
    if nbytes % 16 or data.data_ptr() % 16 or not data.is_contiguous() or not data.is_cuda:
        raise FormatError("stream_floor reads contiguous CUDA tensors of a multiple of 16 bytes, 16-byte aligned")
    if out.element_size() != 2 or not out.is_contiguous() or out.device != data.device:
        raise FormatError("stream_floor writes a contiguous tensor of 16-bit elements on the device of its data")
    with torch.cuda.device(data.device):
        function = _load(nbytes, out.numel(), config, dependent, data.device.index)
        params = _Params(data.data_ptr(), out.data_ptr())
        function(config.ctas, torch.cuda.current_stream().cuda_stream, params)
