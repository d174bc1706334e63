"""What was measured of two to sixteen tokens on Hopper, outside of chains, beside how they multiply and load.

docs/findings.md: "Zero points, and two CTAs on a multiprocessor", "What bounds the rows that stay open", "What
activations cost at eight and sixteen tokens".
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, Share
from fdk.kernels.cuda.decode_choice.fill import fill
from fdk.kernels.cuda.decode_choice.lookups import zeros_fill_16_warps
from fdk.kernels.cuda.decode_choice.rings import eight_bits_fill_up
from fdk.kernels.cuda.decode_config import INT, TABLE, Config


def may_run_as_eight(case: Case, config: Config) -> bool:
    """Whether two and four tokens of zeros or slices are few for what a CTA has, so that eight may take less."""
    shape = case.shape
    few = case.hopper and not case.chained and case.tokens in (2, 4) and not config.digits
    if shape.nested:
        return few and case.measured
    return few and shape.zeros and not zeros_fill_16_warps(shape, case.tokens, Share.of(shape, config))


def runs_as_eight(case: Case, config: Config, eight: Config) -> bool:
    """Whether they do: where eight have 16 warps, or more equal shares, which two and four were not given."""
    if case.shape.zeros and eight.warps > 8 and eight.row_warps <= 4:
        return True
    work = (eight.blocks - 0.5 * eight.half_blocks) / eight.cluster
    even = work <= 0.85 * config.blocks / config.cluster or config.steps > eight.steps
    return case.measured and (even or (case.shape.nested and eight.warps >= 1.5 * config.warps))


def with_uniform_eight(case: Case, config: Config) -> Config:
    """`config` of eight tokens with fewer instructions a copy, but for 14 warps and more that spill by it.

    Those have two units of wider codes. Of two and four tokens 16 warps of wide codes spill without, and seven and nine
    blocks in whole steps were measured with it.
    """
    if case.shape.kind not in LOOKED_UP or case.shape.subs > 1 or config.tokens not in (2, 4, 8):
        return config
    if config.tokens < 8:
        with_it = config.warps == 16 or config.row_warps in (3, 7)
        return replace(config, uniform=config.uniform or (case.shape.bits > 4 and with_it))
    return replace(config, uniform=case.shape.bits <= 2 or config.warps <= 12 or config.stage_units == 1)


# (tokens, bits): most blocks of a CTA where fewer than sixteen tokens gained by a wide table.
WIDE_UP_TO = {(4, 4): 1, (8, 2): 7, (8, 4): 7, (8, 8): 2}


def with_wide_table(case: Case, config: Config) -> Config:
    """`config` with a wide table where four tokens and more were measured to gain by it.

    That is where activations come in no more parts for it, or many blocks of rows share them; of fewer than sixteen
    tokens where a CTA has work for longer than the table takes to fill.
    """
    shape = case.shape
    many = config.tokens == 16 and shape.bits in (4, 8) and shape.kind in LOOKED_UP
    # Fourteen warps of one unit at 4 bits were measured with a wide table only, which integers fill like tables.
    crowded = (config.tokens, shape.bits, shape.kind) == (8, 4, INT) and config.warps > 12
    busy = Share.of(shape, config).work >= 128 and (shape.kind == TABLE or crowded)
    busy &= config.blocks <= WIDE_UP_TO.get((config.tokens, shape.bits), 0) or eight_bits_fill_up(shape, config)
    if not (many or busy) or shape.subs > 1:
        return config
    wide = fill(shape, replace(config, wide=True), case.capability)
    if wide is None or (wide.stages, wide.stage_units) != (config.stages, config.stage_units):
        return config
    return wide if wide.phases == config.phases or config.row_warps > 4 else config


# (tokens, bits): blocks of a cluster where half a block less won: at 14336 x 4096 (4), 10240 x 4096 (3) and
# 18944 x 3584 (5).
HALVES_OF = {(8, 2): (4,), (8, 4): (3, 4, 5), (8, 8): (4,), (16, 8): (4,)}


def with_half_blocks(case: Case, config: Config) -> Config:
    """`config` with half a block less for each cluster, where every two share one, as far as measured to pay."""
    shape = case.shape
    blocks = HALVES_OF.get((config.tokens, shape.bits), ())
    if shape.kind not in LOOKED_UP or shape.subs > 1 or config.blocks not in blocks:
        return config
    one_step = config.cluster == 2 and config.row_warps == config.blocks and config.phases == 1
    halves = replace(config, half_blocks=True)
    return halves if one_step and halves.clusters(case.blocks) <= case.at_once(2) else config
