"""Up to 16 tokens where CTAs would have very different work, or take blocks of rows in several steps.

A launch takes as long as its busiest CTA. At sizes like 5120, 6144 or 10240 rows whole blocks for whole CTAs leave a
quarter to 40 % of the multiprocessors idle; half blocks (csrc/shape.cuh) and clusters of four share them out better.
docs/findings.md: "Sizes of models", "Rings asked again".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, few_codes_and_zeros
from fdk.kernels.cuda.decode_choice.digit_rings import SINGLE, Ring
from fdk.kernels.cuda.decode_config import MAX_SHARED, Config, Shape

# Of the time of what is chosen so much is promised by another split, or all of it where one step replaces several.
_PROMISE = 0.85
# Units of a CTA from which up to eight tokens have been measured to gain: of fewer a launch is its start and its end.
_LEAST_WORK = 48
# Units of k from which splitting it further costs no more than it saves in activations.
_LONG = 200
# Warps on k of each block of rows, by blocks of a CTA, which are all that there is room for: up to four tokens; two and
# four tokens of more than 4 bits, of which 15 warps spilled; more tokens.
_WARPS_FEW = {1: 16, 2: 8, 3: 5, 4: 4, 5: 4, 6: 2, 7: 2}
_WARPS_WIDE = {1: 16, 2: 8, 3: 4, 4: 4, 6: 2, 7: 2}
_WARPS_MANY = {1: 8, 2: 4, 3: 5, 4: 2, 5: 3, 6: 2, 7: 2} | dict.fromkeys(range(8, 14), 1)


@dataclass(frozen=True)
class Split:
    """How a weight is split over CTAs: blocks of rows of a cluster, half a block less where every two share one."""

    cluster: int
    blocks: int
    half: bool

    def time(self, shape: Shape, tokens: int) -> float:
        """Predicted, in times of a block of all columns, with what clusters cost."""
        few, many = (1.1, 1.02) if shape.units < _LONG else (1.0, 0.98)
        worth = {2: 1.07, 4: few, 8: 1.1} if tokens <= 4 else {4: many}
        return (self.blocks - 0.5 * self.half) / self.cluster * worth.get(self.cluster, 1.0)

    def units(self, shape: Shape) -> int:
        """Units of k of a CTA."""
        return -(-shape.units // self.cluster)

    def k_warps(self, shape: Shape, tokens: int) -> int:
        """Warps that split those."""
        if tokens <= 4:
            most = (_WARPS_WIDE if tokens > 1 and shape.bits > 4 else _WARPS_FEW)[self.blocks]
            if shape.bits == 1 and self.units(shape) % (2 * most):
                most = max(1, most & -2)  # units of one bit come in twos, or go faster so
            return min(most, self.units(shape))
        if (tokens, self.cluster, self.blocks) == (8, 4, 2):
            return 8
        return min(_WARPS_MANY[self.blocks], max(1, self.units(shape) // 4))


def with_even_shares(case: Case, config: Config) -> Config:
    """`config` with more equal shares of the weight, and all blocks of a CTA at once, where that pays.

    Measured at up to 16 tokens with tables of 2, 3, 4, 5 and 8 bits and integers of 4 and 6, from two on with one bit,
    at eight and 16 with integers of 4 bits with zeros and slices of 4, at twenty sizes of layers from 2560 x 4096 to
    51200 x 5120: 0.6 to 0.99 of the time, in places 1.01.
    """
    shape, tokens = case.shape, config.tokens
    if not _measured(shape, tokens) or config.digits or config.indices:
        return config
    if tokens <= 8 and shape.units * config.blocks < _LEAST_WORK * config.cluster:
        return config
    best = min(_splits(case), key=lambda split: split.time(shape, tokens), default=None)
    if best is None or not _pays(shape, config, best):
        return config
    for found in _arrangements(shape, config, best):
        slices = found.cluster * found.k_warps
        if shape.allows_stage_units(found.stage_units, slices) and found.shared_bytes(shape) <= MAX_SHARED:
            return found
    return config


def _measured(shape: Shape, tokens: int) -> bool:
    """Whether codes and tokens are like those that were measured."""
    if shape.subs > 1 or tokens > 16:
        return False
    if shape.kind in LOOKED_UP:
        return shape.bits > 1 or tokens > 1
    return tokens > 4 and (shape.nested or few_codes_and_zeros(shape))


def _splits(case: Case) -> Iterator[Split]:
    """Every split of which all clusters run at once."""
    shape, few = case.shape, case.tokens <= 4
    wide = case.tokens > 1 and shape.bits > 4
    warps = (_WARPS_WIDE if wide else _WARPS_FEW) if few else _WARPS_MANY
    for cluster in (1, 2, 4) if few else (2, 4):
        blocks = case.share(cluster).blocks
        for half in (False, True):
            # Halves of planes and of codes across words have not been built; of one block there are none.
            if half and (blocks < 2 or shape.nested or shape.bits not in (2, 4, 8)):
                continue
            clusters = -(-2 * case.blocks // (2 * blocks - half))
            if blocks in warps and clusters <= case.at_once(cluster):
                yield Split(cluster, blocks, half)


def _pays(shape: Shape, config: Config, split: Split) -> bool:
    """Whether `split` is better than what `config` has, by enough to be trusted."""
    tokens = config.tokens
    few_warps = shape.bits in (1, 8) or (shape.bits == 3 and config.row_warps > 1)
    if tokens == 8 and split.blocks > 7 and few_warps:
        return False  # nine warps are too few for single look-ups, codes across words and one bit: 1.05, 1.09 and 1.02
    if tokens > 4 and split.units(shape) < 16:
        return False  # 4608 x 3584: 1.04 to 1.08
    ratio = split.time(shape, tokens) / Split(config.cluster, config.blocks, config.half_blocks).time(shape, tokens)
    # What computes its operands longest waits for them where it has few warps.
    busier = split.blocks * split.k_warps(shape, tokens) >= 1.5 * config.warps and shape.kind not in LOOKED_UP
    # Of long k two steps of few tokens are as fast as one, but where the second has blocks for a few warps only.
    lone = 0 < 2 * (config.blocks % config.row_warps) < config.row_warps and (shape.bits > 4 or not split.half)
    steps = config.steps > 1 and (tokens > 4 or shape.units < 128 or lone)
    return ratio <= _PROMISE or ((steps or busier) and ratio <= 1)


def _arrangements(shape: Shape, config: Config, split: Split) -> Iterator[Config]:
    """Configurations of that split, most preferred first."""
    tokens, blocks = config.tokens, split.blocks
    even = replace(config, cluster=split.cluster, blocks=blocks, half_blocks=split.half, row_warps=blocks, batch=1)
    even = replace(even, phases=1, x_chunks=1, x_ahead=0, x_buffers=0, interleaved=False, scales_once=False)
    even = replace(even, min_ctas=1, hold=0, ahead=0, late=False, alone=False, k_warps=split.k_warps(shape, tokens))
    # Nine blocks would each add up activations for themselves.
    one_bit = shape.bits == 1 and tokens <= 8 and shape.kind in LOOKED_UP
    even = replace(even, x_sums=(shape.zeros or one_bit) and blocks <= 7)
    if tokens > 4 or (tokens > 1 and shape.bits == 8):
        even = replace(even, uniform=True)
    wides = (True, False) if config.wide or (tokens == 16 and shape.bits in (4, 8) and not shape.zeros) else (False,)
    for wide in wides if shape.kind in LOOKED_UP else (False,):
        for stage_units, stages in _rings(shape, even, split.units(shape)):
            found = replace(even, wide=wide, stages=stages, stage_units=stage_units)
            yield replace(found, scales_once=(tokens <= 4 or one_bit) and found.allows_scales_once(shape))


def _rings(shape: Shape, config: Config, units: int) -> list[Ring]:
    """(stage_units, stages), most preferred first."""
    if config.tokens > 4:
        # Registers of more than 12 warps hold one unit, those of fewer two of up to five planes.
        two = config.warps <= 12 and not (shape.nested and shape.bits > 5)
        return [(2, 1), (1, 2), SINGLE] if two else [(1, 2), SINGLE]
    if shape.bits == 1:
        return [(2, 1), SINGLE]
    long = units >= 10 * config.k_warps and config.warps <= 16
    return [(1, 2), SINGLE] if config.tokens == 1 and long else [SINGLE]
