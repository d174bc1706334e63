"""Attention of one new token (csrc/attend.cuh): configuration and launcher; Hopper only."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fdk.kernels.cuda import driver, jit

_MOST_OWN = 4
"""Query heads of a warp: their queries and sums fill its registers."""

_LONG = 1024
"""Positions of a cache above which one cluster a head is not enough."""

_SHORT = 384
"""Positions of a cache up to which few turns of a warp leave its query heads as what takes time."""

_MOST_SPLITS = 16
"""Clusters of a head: the last one adds up the sums of all."""


@dataclass(frozen=True)
class Config:
    """Tile configuration of the attention kernel.

    heads       query heads for each key/value head;  head_warps: groups of warps that share them
    warps       warps of a CTA that share the positions
    cluster     CTAs that share them
    stages      turns of positions that are in flight, 4 KB of each warp
    splits      clusters of a key/value head, whose sums meet in global memory
    norm        queries and keys are normed before they are turned
    """

    head_dim: int
    heads: int
    bf16: bool
    head_warps: int
    warps: int
    cluster: int
    stages: int
    norm: bool = False
    splits: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.head_warps * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA: the rings, the sums of all warps for its outputs, and barriers."""
        sums = self.cluster * self.warps * (self.heads * self.head_dim // 4 // self.cluster + self.heads) * 16
        return self.threads // 32 * self.stages * (4096 + 8) + sums + 16

    def workspace(self, key_heads: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """What launches for so many key/value heads, one after the other, share between splits; None for one split.

        Sums [key_heads, splits, heads * head_dim / 4, 2, 4] float32, and counts [key_heads, cluster] int32 of zeros.
        """
        if self.splits == 1:
            return None
        sums = torch.empty(key_heads, self.splits, self.heads * self.head_dim // 4, 2, 4, device=device)
        return sums, torch.zeros(key_heads, self.cluster, dtype=torch.int32, device=device)

    def defines(self) -> dict[str, int]:
        """Macros that the kernel is compiled with."""
        return {
            "FDK_BF16": int(self.bf16),
            "FDK_HEAD_DIM": self.head_dim,
            "FDK_HEADS": self.heads,
            "FDK_HEAD_WARPS": self.head_warps,
            "FDK_WARPS": self.warps,
            "FDK_CLUSTER": self.cluster,
            "FDK_STAGES": self.stages,
            "FDK_SPLITS": self.splits,
            "FDK_NORM": int(self.norm),
            "FDK_SHARED_BYTES": self.shared_bytes,
        }


def choose_config(
    head_dim: int, heads: int, key_heads: int, length: int, bf16: bool, norm: bool = False, sms: int = 132
) -> Config | None:
    """The configuration for a cache of `length` positions; key_heads: key/value heads of all sequences together.

    None where the kernel has none. Measured on an H200, 2026-11-21 and 22; docs/findings.md.
    """
    if head_dim not in (32, 64, 128, 256) or heads > 4 * _MOST_OWN:
        return None
    head_warps = -(-heads // _MOST_OWN)
    # As many CTAs as multiprocessors hold one of, if there are positions enough; larger clusters find no place at once.
    fitting = (
        cluster
        for cluster in (8, 4, 2)
        if cluster * key_heads <= sms and cluster * 2048 // head_dim <= length and heads * head_dim // 4 % cluster == 0
    )
    cluster, splits = next(fitting, 1), 1
    if length > _LONG and heads * head_dim // 4 % 2 == 0 and (most := min(sms // (2 * key_heads), _MOST_SPLITS)) > 1:
        # Pairs of CTAs find places on all multiprocessors, which clusters of 8 for few heads leave half empty.
        cluster, splits = 2, most
    warps = 8 if (cluster == 1 or length > _LONG) and head_warps == 1 else 4
    if 64 <= length <= _SHORT and head_dim == 128 and 3 <= heads <= 6 and 8 * key_heads <= sms:
        # Half as many warps for positions, and one or two heads each.
        cluster, head_warps, warps = 8, heads if heads == 3 else -(-heads // 2), 2
    turns = -(-length // (splits * cluster * warps * (1024 // head_dim)))
    stages = min(turns, 2 if length <= _LONG or head_warps == 1 else 3, max(1, 24 // (head_warps * warps)))
    return Config(head_dim, heads, bf16, head_warps, warps, cluster, stages, norm, splits)


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/attend.cuh."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("groups", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
    )


def source(config: Config, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "attend.cuh", config.defines(), jit.architecture(capability)


@cache
def load(config: Config, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    capability = torch.cuda.get_device_capability(device)
    cubin = jit.cubin(*source(config, capability))
    return driver.Function(cubin, "fdk_attend", config.threads, config.shared_bytes, config.cluster)


def attend(
    config: Config,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    out: Tensor,
    scale: float,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    workspace: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Rotary embedding of a token's queries and key, its key and value into the cache, attention to all up to it.

    qkv [b, (g * h + 2 * g) * d]: queries, keys, values; keys, values [b, g, length, d]; cos, sin [length, d];
    position [1] int32: tokens in the cache before this one; out [b, g * h * d]; scale: 1/sqrt(d) times log2(e);
    norms: weights [d] of the norms of queries and keys, with `eps`, if config.norm; workspace: of the configuration.
    """
    batch, groups, length, _ = keys.shape
    tensors = (qkv, keys, values, cos, sin, position, out, *(norms or (qkv, qkv)))
    assert config.norm == (norms is not None) and (config.splits > 1) == (workspace is not None)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    shared = (tensor.data_ptr() for tensor in workspace or ())
    params = Params(*(tensor.data_ptr() for tensor in tensors), length, groups, eps, scale, *shared)
    function = load(config, qkv.device.index)
    function(batch * groups * config.splits * config.cluster, torch.cuda.current_stream(qkv.device).cuda_stream, params)
