"""Sparse products of one token whose indices are the codes, outside of chains: where they were measured to win.

csrc/indices.cuh; docs/findings.md: "Codes as the indices of sparse products", "What is chosen since the open sets were
answered".
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import LARGE, LOOKED_UP, MIDDLE, Case, Share, weights
from fdk.kernels.cuda.decode_config import TABLE, Config


def with_indices(case: Case, share: Share, start: Config) -> Config | None:
    """`start` with sparse products and their warps: whole stages of two or four units; None if they do not pay."""
    if not _pay(case):
        return None
    two_bits, blocks = case.shape.bits == 2, share.blocks
    row_warps = max(range(1, min(blocks, 8) + 1), key=lambda r: (blocks / -(-blocks // r) / r, r))
    stage = 2 if two_bits and blocks == 1 else 4
    slices = [warps for warps in range(1, 16 // row_warps + 1) if share.units % (stage * warps) == 0]
    k_warps = 8 if 8 in slices else max(slices, default=0)
    if k_warps * row_warps < 8 or (two_bits and not case.large and k_warps != 8):
        return None
    alone = case.large or (two_bits and share.work > 32)
    start = replace(start, digits=False, paired=False, late=False)
    return replace(start, indices=True, k_warps=k_warps, row_warps=row_warps, alone=alone, uniform=case.large)


def _pay(case: Case) -> bool:
    """Whether they have been measured to win: two bits from 2048 x 4096 on, one bit at 4096^2.

    At two bits they are bound by the tensor cores, at 60 clocks a unit against 86 of look-ups; at one bit integer
    products have fewer, once their digits are made.
    """
    shape = case.shape
    if case.tokens > 1 or not case.measured or not shape.allows_indices or shape.kind not in LOOKED_UP:
        return False
    if shape.bits == 2:
        return case.equal_indices and shape.kind == TABLE and weights(shape) >= MIDDLE // 2
    return MIDDLE <= weights(shape) < LARGE
