"""Which kernels products will need, found without a GPU, so that they can be compiled ahead, all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fdk.kernels.cuda import decode, decode_choice, decode_config, dense, jit, prefill, routes, spread
from fdk.packing.fragments import FRAGMENTS, block_counts
from fdk.packing.layouts import Geometry

# Multiprocessors of the largest number of devices sold with a compute capability: A100, RTX 3090, RTX 4090, H100 SXM
# and H200, B200, RTX 5090.
_USUAL_SMS = {(8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


class Target(NamedTuple):
    """What configurations depend on of a GPU."""

    capability: tuple[int, int]
    sms: int

    @classmethod
    def of(cls, arch: str, sms: int | None = None) -> Target:
        """A GPU of an architecture like "sm_90a"; UnsupportedError for no such name. sms: multiprocessors."""
        capability = jit.capability(arch)
        return cls(capability, sms or _USUAL_SMS.get(capability, 132))


class Product(NamedTuple):
    """Products of m rows of x with weights of a geometry; zeros: dtype of their zero points, None without."""

    geometry: Geometry
    zeros: torch.dtype | None
    m: int


def unsupported(geometry: Geometry) -> str | None:
    """Why the kernels serve no weight of this geometry on any device, or None."""
    if geometry.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bfloat16 and float16, the weight is {str(geometry.dtype).removeprefix('torch.')}"
    if len(geometry.row_ends) > decode_config.MAX_RANGES:
        return f"holds up to {decode_config.MAX_RANGES} tables, the weight has {len(geometry.row_ends)}"
    if geometry.n == 0 or geometry.k == 0:
        return "has nothing to multiply in an empty weight"
    return FRAGMENTS.supports(geometry)


def sources(products: Iterable[Product], target: Target) -> list[jit.Source]:
    """What has to be compiled for products on a GPU, each kernel once; nothing for those it does not serve."""
    found: dict[str, jit.Source] = {}
    for geometry, zeros, m in products:
        if m < 1 or unsupported(geometry):
            continue
        shape = decode_config.shape_of(geometry, zeros)
        for route in routes.launched(shape, m, block_counts(geometry), target.sms, target.capability):
            for source in _sources(shape, route, target):
                found[repr(source)] = source
    return list(found.values())


def _sources(shape: decode_config.Shape, route: routes.Route, target: Target) -> Iterator[jit.Source]:
    """What a route of a product is compiled from."""
    if route.name == "dense":
        yield dense.source(dense.variant_of(shape), target.capability)
    elif route.name == "spread":
        yield spread.source(target.capability)
        yield prefill.source(spread.dense_shape(shape), route.config, target.capability)
    elif route.name == "prefill":
        yield prefill.source(shape, route.config, target.capability)
    else:
        yield decode.source(shape, route.config, target.capability)
        if decode.asks(shape, route.config):
            yield decode.source(*decode.ASKED, target.capability)


def chain_config(product: Product, epilogue: decode_config.Epilogue, target: Target) -> decode_config.Config | None:
    """The configuration of a product with an epilogue, None if there is none."""
    shape, blocks = decode_config.shape_of(product.geometry, product.zeros), sum(block_counts(product.geometry))
    return decode_choice.choose_config(shape, product.m, blocks, target.sms, target.capability, epilogue)


def source_of(product: Product, config: decode_config.Config, target: Target) -> jit.Source:
    """What a product with a configuration of `chain_config` is compiled from."""
    return decode.source(decode_config.shape_of(product.geometry, product.zeros), config, target.capability)


def chain_us(product: Product, target: Target, gated: bool = False) -> tuple[float, float]:
    """Predicted microseconds of a product by one launch of the decode kernel, inf if it cannot, and at best."""
    geometry, zeros, m = product
    shape, blocks = decode_config.shape_of(geometry, zeros), block_counts(geometry)
    best = routes.routes(shape, max(1, m), blocks, target.sms, target.capability)[0].us
    pairs = geometry.n % 128 == 0 and geometry.row_ends in ((geometry.n,), (geometry.n // 2, geometry.n))
    # Two tables and norms take most shared memory, so what fits with them fits in any part of a chain.
    widest = decode_config.Epilogue(squares=1, gated=gated, tables=1 + gated)
    fits = m <= decode_config.MAX_TOKENS and all(
        chain_config(product, one, target) for one in (widest, decode_config.PLAIN)
    )
    if not fits or (gated and not pairs):
        return math.inf, best
    return routes.decode_us(shape, m, m, sum(blocks), target.sms, target.capability), best
