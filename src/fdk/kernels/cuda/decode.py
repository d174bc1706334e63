"""The decode kernel (csrc/decode.cuh): its argument, launch arithmetic and launcher, for up to 64 tokens.

decode_config.py  what it is compiled for;  decode_choice/  which configuration serves a product
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fdk.kernels.cuda import driver, jit
from fdk.kernels.cuda.decode_choice import choose_config
from fdk.kernels.cuda.decode_config import (
    MAX_RANGES,
    TABLE,
    Config,
    Shape,
    shape_of,
    shared_for_places,
    squares_left,
)
from fdk.packing.bits import pack_codes
from fdk.packing.fragments import block_counts
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight


class Range(ctypes.Structure):
    """Blocks and rows that one table serves, and its first cluster (prefill: row tile); twin of fdk::Range in csrc."""

    _fields_ = (
        ("first", ctypes.c_int),
        ("first_block", ctypes.c_int),
        ("end_block", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("first_row", ctypes.c_int64),
        ("end_row", ctypes.c_int64),
    )


WEIGHT_FIELDS = tuple((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table"))
"""Of every kernel's argument; `weight_values` has what belongs there."""


def weight_values(weight: QuantisedWeight) -> dict[str, int | None]:
    """Addresses of a weight's tensors, None for those that its format has not, and how many ranges of rows it has."""
    found = {name: weight.parts[name].data_ptr() if name in weight.parts else None for name, _ in WEIGHT_FIELDS}
    return {**found, "ranges": len(weight.geometry.row_ends)}


def fill_ranges(ranges: ctypes.Array, geometry: Geometry, places: Callable[[int], int]) -> int:
    """Write blocks and rows of each range of rows; how many clusters or row tiles they take, `places(blocks)` each."""
    place = block = 0
    for i, ((start, end), count) in enumerate(zip(geometry.ranges, block_counts(geometry), strict=True)):
        ranges[i] = Range(place, block, block + count, 0, start, end)
        place += places(count)
        block += count
    return place


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/decode.cuh."""

    _fields_ = (
        *WEIGHT_FIELDS,
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("ranges", ctypes.c_int),
        ("blocks_per_cluster", ctypes.c_int),
        ("one_bit", ctypes.c_uint32 * 3),
        ("zero", ctypes.c_uint32),
        ("squares", ctypes.c_void_p),
        ("squares_out", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("range", Range * MAX_RANGES),
    )


_ONE_BIT = {True: (0x3F803F80, 0x40004000, 0x40804080), False: (0x3C003C00, 0x4C004C00, 0x50005000)}


def params_for(weight: QuantisedWeight, config: Config) -> tuple[Params, int]:
    """The kernel's argument without the operands of a call, and the number of CTAs."""
    geometry = weight.geometry
    params = Params(
        **weight_values(weight),
        blocks_per_cluster=config.blocks,
        one_bit=_ONE_BIT[geometry.dtype == torch.bfloat16],
    )
    if config.epilogue.gated:
        # Blocks of gate and up in turn, whose tables the kernel finds by their place.
        count = sum(block_counts(geometry))
        params.ranges = 1
        params.range[0] = Range(0, 0, count, 0, 0, geometry.n)
        return params, config.clusters(count) * config.cluster
    return params, fill_ranges(params.range, geometry, config.clusters) * config.cluster


def source(shape: Shape, config: Config, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "decode.cuh", config.defines(shape, capability >= (9, 0)), jit.architecture(capability)


@cache
def load(shape: Shape, config: Config, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    capability = torch.cuda.get_device_capability(device)
    hopper = capability >= (9, 0)
    cubin = jit.cubin(*source(shape, config, capability))
    # Launches then spread evenly over multiprocessors.
    shared = max(config.shared_bytes(shape, hopper), shared_for_places(1 if config.alone else 2, capability))
    return driver.Function(cubin, "fdk_decode", config.threads, shared, config.cluster, dependent=hopper)


# What a device is asked with, before it serves weights that need the answer.
ASKED = Shape(64, 256, 2, 64, True, TABLE), Config(1, 1, 2, 1, 1, 2, 1, 1, 1, indices=True)


def asks(shape: Shape, config: Config) -> bool:
    """Whether a configuration relies on `equal_indices`."""
    return config.indices and shape.bits == 2


def _of_equal_indices() -> tuple[QuantisedWeight, Tensor, Tensor]:
    """A weight of two bits, x [1, 256] and their product [1, 64], exact: every nibble of codes at every place."""
    drawn = torch.randint(
        0, 4, (64, 256), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.uint8, device="cpu"
    )
    table = torch.tensor([[1, -2, 4, -7]], dtype=torch.bfloat16, device="cpu")
    scales = torch.ones(64, 4, dtype=torch.bfloat16, device="cpu")
    parts = {"codes": pack_codes(drawn, 2), "scales": scales, "table": table}
    x = (torch.arange(256, device="cpu") * 37 % 61 - 30)[None].to(torch.bfloat16)
    product = (x.float() @ table.float()[0, drawn.long()].T).to(torch.bfloat16)
    return QuantisedWeight.from_parts("lut2_g64", 256, parts), x, product


@cache
def equal_indices(device: torch.device) -> bool:
    """Whether a sparse product of this device selects one row twice by two equal indices, which PTX leaves undefined.

    Compute capability 9.0 does (H200, 2026-11-22). One launch and a comparison, once for each device.
    """
    with torch.cuda.device(device):
        load(*ASKED, device.index)  # first, since it says what to do where a graph is being captured
    weight, x, product = _of_equal_indices()
    weight, x, product = weight.to(device).to_layout("fragments"), x.to(device), product.to(device)
    out = torch.full_like(product, float("nan"))
    Plan(weight, ASKED[1], asked=True)(x, None, out)
    return torch.equal(out, product)


class Plan:
    """A weight bound to a configuration on its device: what is left for a call are four fields and a launch."""

    def __init__(self, weight: QuantisedWeight, config: Config, asked: bool = False) -> None:
        """asked: that the device has been asked for `equal_indices`, or is just being asked."""
        zeros = weight.parts.get("zeros")
        assert weight.layout == "fragments" and all(part.data_ptr() % 16 == 0 for part in weight.parts.values())
        self.shape = shape_of(weight.geometry, None if zeros is None else zeros.dtype)
        self.device = weight.device
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        if not asked and asks(self.shape, config) and not equal_indices(self.device):
            capability = torch.cuda.get_device_capability(self.device)
            blocks = sum(block_counts(weight.geometry))
            config = choose_config(self.shape, config.tokens, blocks, sms, capability, config.epilogue, False)
        self.config = config
        self.template, grid = params_for(weight, config)
        # CTAs without work keep every multiprocessor equally full: where one is left empty, the next launch puts two
        # of its CTAs there, and they take twice as long as all others.
        self.grid = max(grid, sms // config.cluster * config.cluster)
        self.squares = squares_left(self.shape.n, config)
        with torch.cuda.device(self.device):
            self.function = load(self.shape, config, self.device.index)

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor, **operands: Tensor | float) -> None:
        """out [m, n] = x [m, k] @ W.T + bias on the current stream of the weight's device, m <= config.tokens.

        operands: what the epilogue reads and writes, by the names of `Params`.
        """
        assert 0 < x.shape[0] <= self.config.tokens and x.data_ptr() % 16 == 0
        params = Params.from_buffer_copy(self.template)
        params.x = x.data_ptr()
        params.bias = None if bias is None else bias.data_ptr()
        params.out = out.data_ptr()
        params.m = x.shape[0]
        for name, value in operands.items():
            setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if torch.cuda.current_device() == self.device.index:
            self.function(self.grid, stream, params)
        else:
            with torch.cuda.device(self.device):
                self.function(self.grid, stream, params)
