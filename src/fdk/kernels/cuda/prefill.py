"""The prefill kernel (csrc/prefill.cuh) for many tokens on Hopper: its argument, launch arithmetic and launcher.

prefill_config.py  what it is compiled for;  prefill_choice.py  which configuration serves a product
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch
from torch import Tensor

from fdk.kernels.cuda import decode, decode_config, driver, flags, jit
from fdk.kernels.cuda.decode_config import MAX_RANGES, Shape
from fdk.kernels.cuda.prefill_config import Config, clusters_and_streamed, row_tiles
from fdk.packing.fragments import BLOCK
from fdk.weight import QuantisedWeight

# Tiles of tokens that neighbouring rows take before the next ones: what they share of x stays in L2.
_BAND = 8


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/prefill_shape.cuh."""

    _fields_ = (
        ("x_map", ctypes.c_uint64 * 16),
        *decode.WEIGHT_FIELDS,
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("ranges", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("band", ctypes.c_int),
        ("streamed", ctypes.c_int),
        ("zero", ctypes.c_uint32),
        ("partial", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("range", decode.Range * MAX_RANGES),
        # The kernel's struct is a multiple of 64 bytes, and a launch copies all of it.
        ("pad", ctypes.c_uint64 * 4),
    )


def params_for(weight: QuantisedWeight, config: Config) -> Params:
    """The kernel's argument without what a call brings: x, bias, out, m."""
    params = Params(**decode.weight_values(weight))
    params.row_tiles = decode.fill_ranges(params.range, weight.geometry, lambda count: row_tiles((count,), config))
    return params


def source(shape: Shape, config: Config, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "prefill.cuh", config.defines(shape), jit.architecture(capability)


@cache
def load(shape: Shape, config: Config, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    cubin = jit.cubin(*source(shape, config, torch.cuda.get_device_capability(device)))
    return driver.Function(cubin, "fdk_prefill", config.threads, config.shared_bytes(shape), config.cluster)


@cache
def _warn_of_sums(device: torch.device) -> None:
    warnings.warn(
        f"fdk: no memory is left on {device} for the sums of tiles cut along k, so products of many rows take whole "
        "tiles and are slower; free memory or use smaller batches",
        RuntimeWarning,
        stacklevel=5,
    )


class Plan:
    """A weight bound to a configuration on its device: what is left for a call are x, bias, out and a launch.

    shape: that of codes which every call brings with it, where they are not the weight's own.
    """

    def __init__(self, weight: QuantisedWeight, config: Config, shape: Shape | None = None) -> None:
        zeros = weight.parts.get("zeros")
        assert weight.layout == "fragments" and all(part.data_ptr() % 16 == 0 for part in weight.parts.values())
        self.shape = shape or decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
        self.config = config
        self.template = params_for(weight, config)
        self.device = weight.device
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.maps: dict[tuple[int, int], driver.TensorMap] = {}
        with torch.cuda.device(self.device):
            self.function = load(self.shape, config, self.device.index)
        if config.stream:
            # After loading, which says what to do where a graph is being captured.
            self.flags = flags.of_device(self.device)
            assert self.sms // config.pair * config.pair * config.warpgroups <= flags.FLAGS

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor, **operands: Tensor | float) -> None:
        """out [m, n] = x [m, k] @ W.T + bias on the current stream of the weight's device.

        operands: codes if they are not the weight's, by the names of `Params`.
        """
        m, config = x.shape[0], self.config
        assert m > 0 and x.data_ptr() % 16 == 0 and x.is_contiguous()
        params = Params.from_buffer_copy(self.template)
        for name, value in operands.items():
            setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
        key = (x.data_ptr(), m)
        found = self.maps.get(key)
        if found is None:
            if len(self.maps) >= 64:
                self.maps.clear()
            found = self.maps[key] = driver.tensor_map(
                key[0], self.shape.bf16, (m, self.shape.k), (config.tokens // config.pair, BLOCK)
            )
        params.x_map = found
        params.bias = None if bias is None else bias.data_ptr()
        params.out = out.data_ptr()
        params.m = m
        params.token_tiles = -(-m // config.tokens)
        params.band = min(params.token_tiles, _BAND)
        tiles = params.row_tiles * params.token_tiles
        clusters, params.streamed = clusters_and_streamed(self.shape, config, tiles, self.sms)
        grid = clusters * config.cluster
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if config.stream:
            try:
                # Sums of the tiles that CTAs end but do not begin, and by which flags they say so.
                sums = torch.empty(grid * config.blocks * 64 * config.tokens, dtype=torch.float32, device=self.device)
                ready = self.flags.take(stream)
                params.partial, params.flags = sums.data_ptr(), ready.data_ptr()
            except torch.cuda.OutOfMemoryError:
                params.streamed = 0
                _warn_of_sums(self.device)
        if torch.cuda.current_device() == self.device.index:
            self.function(grid, stream, params)
        else:
            with torch.cuda.device(self.device):
                self.function(grid, stream, params)
