"""Integer products of two and four tokens, outside of chains, by pairs of CTAs that split k.

csrc/digits_many.cuh; docs/findings.md: "Integer products for four and eight tokens", "Integers of every width by
integer products".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fdk.kernels.cuda.decode_choice import two_places
from fdk.kernels.cuda.decode_choice.case import Case, Share
from fdk.kernels.cuda.decode_config import INT, MAX_SHARED, ROUNDED, UINT_U8, Config, Shape


@dataclass(frozen=True)
class Gain:
    """Where they were faster on an H200: of a pair of CTAs first and last count of blocks, and of units of each CTA."""

    tokens: tuple[int, ...]
    bits: tuple[int, ...]
    blocks: tuple[int, int]
    units: tuple[int, int]

    def holds(self, shape: Shape, tokens: int, share: Share) -> bool:
        inside = self.blocks[0] <= share.blocks <= self.blocks[1] and self.units[0] <= share.units <= self.units[1]
        return inside and tokens in self.tokens and shape.bits in self.bits


_ALL = (2, 3, 4, 5, 6, 7, 8)

# One block of 32 units is 4096^2 and fewer rows, two of 64 are 8192^2, seven of 64 28672 x 8192, four of 128 16384^2.
_SMALL = Gain(tokens=(2, 4), bits=_ALL, blocks=(1, 1), units=(32, 32))
OF_INTEGERS = (
    _SMALL,
    Gain(tokens=(2,), bits=_ALL, blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(5, 6, 7), blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(8,), blocks=(2, 7), units=(64, 64)),
)

# Of groups of 128. Four planes of four tokens take as long either way.
OF_SLICES = (
    _SMALL,
    Gain(tokens=(2,), bits=_ALL, blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(2, 3, 5, 6, 7, 8), blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(2, 4), bits=(5, 6, 7, 8), blocks=(2, 7), units=(64, 64)),
    Gain(tokens=(2, 4), bits=(2, 3, 5, 6, 7, 8), blocks=(3, 4), units=(65, 128)),
)

# Codes of 3 bits spill in groups of 64; four tokens take less by look-ups.
OF_ZEROS = (Gain(tokens=(2,), bits=(2, 4, 5, 6, 7, 8), blocks=(1, 1), units=(32, 32)),)


def with_many_digits(case: Case, config: Config) -> Config:
    """`config` of two or four tokens by integer products where they pay and fit shared memory."""
    shape, tokens, share = case.shape, config.tokens, case.share(2)
    if tokens not in (2, 4) or not shape.allows_many_digits or not shape.allows_digits_of(tokens):
        return config
    slices = OF_SLICES if shape.nested and shape.group % 128 == 0 else ()
    gains = {INT: OF_INTEGERS, UINT_U8: OF_ZEROS}.get(shape.kind, slices)
    if not any(gain.holds(shape, tokens, share) for gain in gains):
        return config
    if share.blocks == 1:
        return two_places.of_one_block(case) if two_places.enough_blocks(case) else config
    for tried in _arrangements(shape, tokens, share):
        parts = tried.cluster * tried.k_warps
        if shape.allows_stage_units(tried.stage_units, parts) and tried.shared_bytes(shape) <= MAX_SHARED:
            return tried
    return config


def _arrangements(shape: Shape, tokens: int, share: Share) -> Iterator[Config]:
    """Configurations of a pair's blocks, most preferred first: 16 warps on k, blocks in turn or side by side."""
    blocks = share.blocks
    start = Config(tokens, 2, 16, 1, 1, 2, blocks, 1, 1, digits=True, paired=True)
    in_turn = replace(start, uniform=True, alone=True, batch=blocks if blocks <= 2 else 1)
    if shape.kind == INT and 5 <= shape.bits <= 7:
        # Two units of codes that lie across bytes are more than registers hold beside the sums of four tokens.
        yield replace(in_turn, stages=2, stage_units=1)
        return
    # What memory has no room for, and two planes of four blocks, go side by side.
    beside = replace(in_turn, k_warps=4, row_warps=blocks, batch=1)
    if blocks != 4:
        tried = [in_turn]
    else:
        tried = [beside] if shape.bits == 2 else [in_turn, beside]
    # Two units of other slices are more than the 128 registers of 16 warps hold.
    light = tokens == 2 or shape.kind == INT or (shape.group == 128 and (shape.kind == ROUNDED or shape.bits < 5))
    two = light and blocks <= 4 and (tokens == 4 or shape.bits < 8)
    for config in tried:
        for stage_units in (2, 1) if two else (1,):
            yield replace(config, stage_units=stage_units)
