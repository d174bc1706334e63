"""CUDA C++ kernels for NVIDIA GPUs from compute capability 8.0, tuned for 9.0, compiled at first use by NVRTC.

decode.py   up to 64 tokens (csrc/decode.cuh): configuration, launch arithmetic, launcher
stream.py   the streaming floor (csrc/stream.cuh), for the benchmark
jit.py      NVRTC and the cubin cache;  driver.py  loading and launching
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from fdk.errors import UnsupportedError
from fdk.kernels import Problem
from fdk.kernels.cuda import decode, jit
from fdk.kernels.cuda.stream import stream_floor
from fdk.packing import fragments
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight

__all__ = ["KERNEL", "stream_floor", "warmup"]


@cache
def _device_facts(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of a CUDA device."""
    facts = torch.cuda.get_device_properties(index)
    return (facts.major, facts.minor), facts.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _config(shape: decode.Shape, m: int, blocks: int, device: torch.device) -> decode.Config | None:
    capability, sms = _device_facts(_index(device))
    return decode.choose_config(shape, m, blocks, sms, capability >= (9, 0))


class CudaKernel:
    """Tensor-core products with weights dequantised on the way; more than 64 rows of x are taken 64 at a time."""

    name = "cuda"
    layout = fragments.FRAGMENTS.name

    def supports(self, problem: Problem) -> str | None:
        geometry = problem.geometry
        if geometry.dtype not in (torch.bfloat16, torch.float16):
            return f"multiplies bfloat16 and float16, the weight is {str(geometry.dtype).removeprefix('torch.')}"
        if len(geometry.row_ends) > decode.MAX_RANGES:
            return f"holds up to {decode.MAX_RANGES} tables, the weight has {len(geometry.row_ends)}"
        if geometry.n == 0 or geometry.k == 0:
            return "has nothing to multiply in an empty weight"
        if reason := jit.unavailable():
            return reason
        capability, _ = _device_facts(_index(problem.device))
        if capability < (8, 0):
            return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
        shape = decode.shape_of(geometry, geometry.dtype if geometry.format.has_zeros else None)
        if self._at_once(shape, max(1, problem.m), geometry, problem.device) == 0:
            return f"has no room for {geometry.k} activations in shared memory"
        return None

    def _at_once(self, shape: decode.Shape, m: int, geometry: Geometry, device: torch.device) -> int:
        """Rows of x per launch: all m, or as many of 64, 32, ... as shared memory holds; 0 if not even one fits."""
        blocks = sum(fragments.block_counts(geometry))
        fitting = (
            rows for rows in (min(m, 64), 32, 16, 8, 4, 2, 1) if rows <= m and _config(shape, rows, blocks, device)
        )
        return next(fitting, 0)

    def rounds_weights(self, problem: Problem) -> bool:
        return False

    def plan(self, weight: QuantisedWeight, m: int) -> decode.Plan:
        """The compiled kernel for m rows of x, bound to `weight` and remembered in its cache."""
        key = ("cuda", decode.token_tile(m))
        found = weight.cache.get(key)
        if found is None:
            zeros = weight.parts.get("zeros")
            shape = decode.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
            config = _config(shape, m, sum(fragments.block_counts(weight.geometry)), weight.device)
            if config is None:
                raise UnsupportedError(f"cuda: {weight!r} does not fit shared memory with {m} rows of x")
            found = weight.cache[key] = decode.Plan(weight, config)
        return found

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        m = x.shape[0]
        if x.data_ptr() % 16:
            x = x.clone()
        rows = weight.cache.get(("cuda rows", m))
        if rows is None:
            zeros = weight.parts.get("zeros")
            shape = decode.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
            rows = weight.cache[("cuda rows", m)] = self._at_once(shape, m, weight.geometry, weight.device)
        if rows == m:
            self.plan(weight, m)(x, bias, out)
            return
        for start in range(0, m, rows):
            part = x[start : start + rows]
            # A row of x need not be a whole number of 16-byte pieces.
            part = part if part.data_ptr() % 16 == 0 else part.clone()
            self.plan(weight, part.shape[0])(part, bias, out[start : start + rows])


KERNEL = CudaKernel()


def warmup(weights: Iterable[QuantisedWeight], rows: Iterable[int] = (1,)) -> None:
    """Compile and load what products of up to those rows of x with `weights` need, so that no call waits for it.

    Needed before a CUDA graph is captured. The weights are brought into the kernels' layout, in place; those that
    the kernel does not serve are left alone.
    """
    rows = tuple(rows)
    for weight in weights:
        if weight.device.type != "cuda":
            continue
        for m in rows:
            if KERNEL.supports(Problem(m, weight.geometry, weight.device)) is None:
                KERNEL.plan(weight.relayout_(KERNEL.layout), m)
