"""Portable GPU kernel in Triton: every format and shape, from the canonical layout.

vector.py has the algorithm for one token, source.py that for several, nested.py and sparse.py both
for nested and 16:32 sparse weights.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.kernels import Problem
from fdk.kernels.triton.config import Config, VectorConfig, choose, choose_vector
from fdk.kernels.triton.launch_nested import launch_nested
from fdk.kernels.triton.launch_sparse import launch_sparse
from fdk.kernels.triton.tiles import row_tiles
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight

_WORDS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
ADD_BLOCK = 256


def interpreted() -> bool:
    """True if Triton functions run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def word_bits(geometry: Geometry, address: int = 0) -> int:
    """Width of the words that codes are read in: the widest that rows are made of and that stays inside a group."""
    bits, group = geometry.format.bits, geometry.format.group or 32
    if bits not in (1, 2, 4, 8):
        return 8
    apart = address | -(-geometry.k * bits // 8)
    return next(width for width in (32, 16, 8) if apart % (width // 8) == 0 and group % (width // bits) == 0)


class TritonKernel:
    """Looks weights up in registers: float32 sums for one token, else tiles in x's dtype for dot products."""

    name = "triton"
    layout = "canonical"

    def supports(self, problem: Problem) -> str | None:
        if find_spec("triton") is None:
            return "the triton package is not installed"
        if problem.device.type == "cpu" and not interpreted():
            return "on the CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1, for tests)"
        if problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or newer"
        return None

    def rounds_weights(self, problem: Problem) -> bool:
        return problem.m > 1

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        fmt = weight.format
        assert out.shape == (len(x), weight.shape[0]) and out.is_contiguous() and x.is_contiguous()
        if weight.shape[1] == 0:
            out.zero_() if bias is None else out.copy_(bias.expand_as(out))
            return
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            if fmt.is_nested:
                launch_nested(x, weight, bias, out, interpreted())
                return
            if fmt.sparse:
                launch_sparse(x, weight, bias, out, interpreted())
                return
            if x.shape[0] == 1:
                most = fmt.group or 32
                launch_vector(x, weight, bias, out, choose_vector(*weight.shape, fmt.bits, most, x.element_size()))
                return
            launch(x, weight, bias, out, self._tile(x, weight))

    def _tile(self, x: Tensor, weight: QuantisedWeight) -> Config:
        fmt = weight.format
        # A table of 2^8 codes has bank conflicts, and arithmetic on codes of many bits costs no more than a lookup.
        lookup = fmt.is_table or fmt.bits <= 4
        return choose(x.shape[0], *weight.shape, fmt.bits, lookup, x.element_size())


def _pointers(x: Tensor, codes: Tensor, weight: QuantisedWeight, bias: Tensor | None, tiles: Tensor) -> tuple:
    """The inputs of both products in the order of their arguments; for what is missing, a pointer that is not read."""
    parts = weight.parts
    zeros, table = parts.get("zeros", codes), parts.get("table", x)
    return x, codes, parts["scales"], zeros, table, x if bias is None else bias, tiles


def _meaning(fmt: Format) -> dict[str, int | bool]:
    """What the codes of a format mean, as constants of both products."""
    offset = 0 if fmt.is_table or fmt.has_zeros else fmt.offset
    return {
        "BITS": fmt.bits, "GROUP": fmt.group or 0, "OFFSET": offset, "STORED": fmt.is_table, "ZEROS": fmt.has_zeros
    }  # fmt: skip


def launch(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor, config: Config) -> None:
    """out [m, n] = x [m, k] W^T + bias with the given tile, k > 0; weight in the canonical layout."""
    from fdk.kernels.triton.source import add_splits, product

    geometry, parts, fmt = weight.geometry, weight.parts, weight.format
    (m, k), n = x.shape, geometry.n
    width = word_bits(geometry, parts["codes"].data_ptr())
    codes = parts["codes"].view(_WORDS[width])
    several = fmt.is_table and len(geometry.row_ends) > 1
    tiles = row_tiles(geometry, config.bn, x.device) if several else codes
    blocks = tiles.shape[0] if several else -(-n // config.bn)
    steps = -(-k // (config.bk * config.splits))
    split = config.splits > 1
    target = torch.empty((config.splits, m, n), dtype=torch.float32, device=x.device) if split else out
    product[(blocks, -(-m // config.bm), config.splits)](
        *_pointers(x, codes, weight, bias, tiles),
        target,
        m,
        n,
        k,
        codes.shape[1],
        geometry.groups,
        **_meaning(fmt),
        LOOKUP=fmt.is_table or fmt.bits <= 4,
        BIAS=bias is not None and not split,
        TILES=several,
        SPLIT=split,
        EVEN_K=k == config.bk * steps * config.splits,
        CODES=width // fmt.bits if fmt.bits in (1, 2, 4, 8) else 8,
        BN=config.bn,
        BM=config.bm,
        BK=config.bk,
        STEPS=steps,
        PACK=config.pack,
        STAGES=config.stages,
        INTERPRETED=interpreted(),
        num_warps=config.warps,
    )
    if split:
        add_splits[(-(-m * n // ADD_BLOCK),)](
            target,
            x if bias is None else bias,
            out,
            m * n,
            n,
            SPLITS=config.splits,
            BIAS=bias is not None,
            BLOCK=ADD_BLOCK,
            INTERPRETED=interpreted(),
        )


def launch_vector(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor, config: VectorConfig) -> None:
    """out [1, n] = x [1, k] W^T + bias with the given blocks, k > 0; weight in the canonical layout."""
    from fdk.kernels.triton.vector import vector_product

    geometry, parts, fmt = weight.geometry, weight.parts, weight.format
    n, k = geometry.n, geometry.k
    # With a single word to a lane, Triton would give a lane several runs of codes instead of several rows.
    whole = fmt.bits in (1, 2, 4, 8)
    width = min(word_bits(geometry, parts["codes"].data_ptr()), config.run * fmt.bits // 2) if whole else 8
    codes = parts["codes"].view(_WORDS[width])
    several = fmt.is_table and len(geometry.row_ends) > 1
    tiles = row_tiles(geometry, config.rows, x.device) if several else codes
    steps = -(-k // config.bk)
    vector_product[(tiles.shape[0] if several else -(-n // config.rows),)](
        *_pointers(x, codes, weight, bias, tiles),
        out,
        n,
        k,
        codes.shape[1],
        geometry.groups,
        **_meaning(fmt),
        BIAS=bias is not None,
        TILES=several,
        CHECK=k % config.run != 0,
        EVEN_RUNS=k % config.run == 0 and k != config.bk * steps,
        CODES=width // fmt.bits if whole else 8,
        RUN=config.run,
        ROWS=config.rows,
        BK=config.bk,
        STEPS=steps,
        PACK=config.pack,
        WIDE=config.wide,
        INTERPRETED=interpreted(),
        num_warps=config.warps,
    )


KERNEL = TritonKernel()
