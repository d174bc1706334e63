"""Places on a multiprocessor, outside of chains: who shares one, who holds one, and what is made while waiting there.

docs/findings.md: "Zero points, and two CTAs on a multiprocessor", "Places held for launches that follow", "The start of
a launch", "One token near its bar".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fdk.kernels.cuda.decode_choice.case import MIDDLE, Case, Share, coded, weights
from fdk.kernels.cuda.decode_config import TABLE, UINT_U8, Config, Shape


def needs_its_own(shape: Shape, config: Config) -> bool:
    """Whether CTAs of nested weights, which have no table, or of zeros need their multiprocessor to themselves.

    Where two fit, launches of large weights took 1.3 to 1.7 times as long.
    """
    if Share.of(shape, config).work <= 64:
        return False
    if shape.zeros:
        return config.tokens <= 8 and config.warps <= 8
    return shape.nested and config.tokens <= 4


def apart(case: Case, config: Config) -> Config:
    """`config` alone on its multiprocessor where CTAs of two launches of integer products would fit side by side.

    Some launches then took 1.4 times as long.
    """
    turns = config.steps > 1 and config.row_warps == 1
    one = config.paired and config.min_ctas == 1 and (config.cluster == 1 or turns) and not coded(case.shape)
    return replace(config, alone=True) if one and case.hopper else config


_MOST_HOLD = 8000

# At 1.75 GHz and 4.8 TB/s, those of an H200.
_CLOCKS_PER_BYTE = 1.75e9 / 4.8e12


def _hold_clocks(shape: Shape) -> int:
    """Clocks for which CTAs without work keep their places: most of the time that the weights take to arrive.

    At least until the next launch has filled the others' places; kept for longer than a launch takes, they delay it.
    """
    code_bytes = shape.n * shape.k * shape.bits // 8
    clocks = 0.8 * (code_bytes + shape.groups * shape.n * 2) * _CLOCKS_PER_BYTE
    return min(max(2500, int(clocks)), _MOST_HOLD)


@dataclass(frozen=True)
class Two:
    """Two CTAs of a table on a multiprocessor, one block each, as measured.

    units    of k that clusters of `cluster` CTAs split;  digits: by integer products, else by indices
    k_warps  of a CTA, with so many stages of so many units;  hold: clocks for which places are held
    """

    cluster: int
    units: int
    digits: bool
    k_warps: int
    stages: int
    stage_units: int
    hold: int


# At 8192^2, where with 1500 to 5000 clocks some launches took 1.25 to 1.5 times as long, and at 4096 x 14336.
TWO = (
    Two(cluster=1, units=128, digits=True, k_warps=8, stages=3, stage_units=4, hold=_MOST_HOLD),
    Two(cluster=1, units=128, digits=False, k_warps=8, stages=2, stage_units=2, hold=_MOST_HOLD),
    Two(cluster=2, units=224, digits=True, k_warps=7, stages=3, stage_units=4, hold=4000),
)


def beside_the_next(case: Case, config: Config) -> Config:
    """`config` with a second CTA, of the next launch, beside one token's, where places that idle ones hold pay.

    Measured at 4096^2 and, for tables, 8192^2 and 4096 x 14336.
    """
    shape = case.shape
    idle = case.sms // config.cluster - -(-case.blocks // config.blocks)  # clusters that find no work
    if idle <= 0 or config.tokens > 1 or shape.kind not in (TABLE, UINT_U8) or weights(shape) < MIDDLE:
        return config
    if config.digits and shape.zeros and shape.bits not in (1, 2, 4, 8):
        return replace(config, min_ctas=1)
    single = shape.kind == TABLE and (config.digits or config.indices) and config.blocks == 1
    single &= shape.allows_stage_units(4, 8)
    here = (config.cluster, shape.units, config.digits)
    if single and (two := next((two for two in TWO if (two.cluster, two.units, two.digits) == here), None)):
        even = replace(config, k_warps=two.k_warps, stages=two.stages, stage_units=two.stage_units)
        return replace(even, alone=False, min_ctas=2, hold=two.hold)
    if config.min_ctas == 1 and (config.alone or not config.paired or shape.kind != TABLE):
        return config
    late = config.late or (shape.kind == TABLE and shape.bits > 4)
    return replace(config, hold=_hold_clocks(shape), late=late)


def with_operands_ahead(case: Case, config: Config) -> Config:
    """`config` of one token whose warps make operands of their first units ahead of activations, where that pays.

    Measured with tables of 3, 4 and 8 bits at 8192^2, 14336 x 4096 and 4096 x 14336, sparse integers at 8192^2 and
    20480 x 5120, slices of 2 and 4 bits at 8192^2.
    """
    shape = case.shape
    one_stage = config.tokens == config.steps == config.stages == shape.subs == 1 and shape.k % 64 == 0
    busy = Share.of(shape, config).work >= 112
    if not one_stage or not busy or config.indices or config.warps < 16:
        return config
    if shape.sparse:
        return replace(config, ahead=1) if config.digits and config.scales_once else config
    if shape.nested:
        fits = config.cluster == config.blocks == 1 and shape.units == 128 and shape.bits <= 5
        return replace(config, ahead=2) if fits else config
    if config.digits or shape.zeros or not config.scales_once:
        return config
    if config.warps != 16:
        return replace(config, uniform=True, ahead=1)
    # Scales in one piece, which come last, delay operands that are made at once; of 4 bits copies cost as much.
    return replace(config, uniform=True, ahead=3, scales_once=shape.bits == 4)
