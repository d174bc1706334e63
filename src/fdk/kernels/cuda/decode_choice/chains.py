"""Products of a chain (models/chain.py): their warps, where integer products pay, and what was measured in whole steps.

Steps of custom-llama-4B, 12B and 31B on an H200; docs/findings.md: "Five kernels a layer", "The step once more",
"Chained products of larger models", "Where the other half of a step goes".
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, Share, coded
from fdk.kernels.cuda.decode_config import MAX_SHARED, TABLE, Config, Shape


def with_digits_in_chain(case: Case, share: Share, start: Config) -> Config:
    """`start` of one token by integer products: one bit, 8 bits of small weights and, where measured, integers of 4."""
    shape = case.shape
    if case.tokens > 1 or not shape.allows_digits or coded(shape):
        return start
    digits = shape.bits == 1 or (shape.bits == 8 and not case.large)
    # 4B 0.89, with zeros 0.87; 12B 0.99, 0.93; 31B 1.007: not there.
    digits |= case.measured and shape.bits == 4 and share.units <= (64 if share.cluster == 1 else 112)
    return replace(start, digits=True, paired=shape.bits in (1, 4)) if digits else start


def chain_warps(case: Case, share: Share, start: Config) -> tuple[int, int]:
    """(k_warps, row_warps), where a CTA has its multiprocessor to itself: 8 to 16 warps keep it busy."""
    most, least = _most_warps(case.shape, share, start), 2 if case.epilogue.gated else 1
    whole = [r for r in range(least, min(share.blocks, 8) + 1, least) if share.blocks % r == 0]
    row_warps = max(whole, key=lambda r: (most // r * r if case.tokens > 4 else 0, r))
    k_warps = min(max(1, most // row_warps), share.units)
    stage = 4 if case.shape.bits == 1 else 1
    even = [warps for warps in range(k_warps, 7, -1) if share.units % (stage * warps) == 0]
    if start.digits and k_warps > 8 and even:
        # Stages of four units are waited for a quarter as often.
        return even[0], row_warps
    # The fewest warps with which the longest share of k is as short.
    longest = -(-share.units // k_warps)
    return -(-share.units // longest), row_warps


def _most_warps(shape: Shape, share: Share, start: Config) -> int:
    """Warps of a CTA at most."""
    if not start.alone:
        return 8
    if start.tokens <= 4:
        return 16 if share.work > (64 if shape.bits == 1 else 32) else 8
    # One bit by look-ups of eight codes is as busy with 8 warps on two blocks, which have two stages each.
    if share.work <= 64 or (start.octets and share.blocks <= 2 and share.work < 96):
        return 8
    # Two sums of an output, scales inside a unit, zeros and planes leave registers for 12 warps of many tokens.
    return 16 if shape.lean and not shape.nested and not start.epilogue.gated else 12


def with_fewest_instructions(case: Case, config: Config) -> Config:
    """`config` of one token with fewer instructions; here registers decide nothing about where CTAs run."""
    return replace(config, uniform=True)


def within_registers(case: Case, config: Config) -> Config:
    """`config` for which registers suffice.

    With more than 12 warps 128 do not for what the compiler keeps for `uniform`, but for one bit in look-ups of eight.
    """
    return replace(config, uniform=config.octets) if config.warps > 12 else config


def with_few_stages(case: Case, config: Config) -> Config:
    """`config` of one bit with as few stages, and digits that a CTA makes, as pay."""
    shape, epilogue = case.shape, config.epilogue
    if not config.digits or shape.bits > 1:
        return config
    single = config.cluster == config.blocks == 1
    quarter = single and case.blocks % 4 == 0 and case.blocks // 4 <= case.at_once(4)
    k_warps = 3 if shape.units >= 256 else 2
    if epilogue.residual and quarter and shape.units >= 96 and shape.allows_stage_units(4, 4 * k_warps):
        # Four blocks of a cluster need a quarter of the activations each.
        config = replace(config, cluster=4, blocks=4, row_warps=4, k_warps=k_warps, stage_units=4, stages=2, batch=1)
    elif epilogue.squares and not epilogue.gated and shape.units == 96 and config.k_warps == 12:
        config = replace(config, k_warps=8, stage_units=4, stages=1)  # query/key/value of 31B
    elif epilogue.gated and config.stage_units == 4:
        config = replace(config, stages=1)
    per_warp = config.steps * -(-shape.units // (config.cluster * config.k_warps))
    return replace(config, stages=min(config.stages, -(-per_warp // config.stage_units)))


# (units of k, blocks of rows) of products of custom-llama-12B.
_QUERY_KEY_VALUE, _GATE_UP, _DOWN = (64, 96), (64, 448), (224, 64)


def with_two_places(case: Case, config: Config) -> Config:
    """`config` of one bit beside a CTA of the next launch, in the pair gate/up and *down* of custom-llama-12B.

    Measured there only, since it loses in other pairs of launches, and at 6144 x 21504.
    """
    shape, epilogue, size = case.shape, config.epilogue, (case.shape.units, case.blocks)
    if not config.digits or shape.bits > 1 or shape.kind not in LOOKED_UP:
        return config
    if size == _QUERY_KEY_VALUE and epilogue.squares:
        # Between *down*, whose places are held, and attention: beside either.
        return replace(config, alone=False)
    if size not in (_GATE_UP, _DOWN):
        return config
    beside = replace(config, stage_units=4, stages=2, alone=False, min_ctas=2, hold=2000)
    if epilogue.gated and config.cluster == 1 and shape.allows_stage_units(4, 4):
        return replace(beside, k_warps=4, row_warps=2, batch=2)
    if epilogue.residual and config.cluster == 2 and shape.allows_stage_units(4, 14):
        return replace(beside, k_warps=7)
    return config


def kept_apart_by_registers(case: Case, config: Config) -> Config:
    """`config` of one bit that is not alone by shared memory where registers see to that.

    That is where 11 warps and more have stages of four units, 88 to 96 registers a thread: gate/up begins beside the
    output product, query/key/value beside *down*. 4B 0.96, 31B 1.00.
    """
    full = config.paired and config.warps >= 11 and config.stage_units == 4
    fits = full and (config.epilogue.gated or config.epilogue.residual)
    return replace(config, alone=False) if fits else config


def with_operands_ahead_in_chain(case: Case, config: Config) -> Config:
    """`config` of a table of 4 bits whose warps make first operands ahead of activations.

    4B 0.957 of gate/up, 0.986 of the output product; 12B 0.963, 31B 0.978.
    """
    shape = case.shape
    single = config.steps == config.tokens == config.phases == shape.subs == 1 and shape.k % 64 == 0
    if not single or config.digits or (shape.bits, shape.kind) != (4, TABLE):
        return config
    if config.epilogue.gated:
        # Registers, 80 and 96 a thread, keep its CTAs apart, so that they begin beside the output product's.
        beside = replace(config, stage_units=1, alone=False)
        if config.warps == 16 and shape.units <= 64:
            return replace(beside, stages=1)
        few = config.warps == 12 and shape.units <= 16 * config.cluster * config.k_warps
        return replace(beside, stages=2, ahead=3) if few else config
    if not config.epilogue.residual or config.stage_units > 1 or config.k_warps not in (8, 16):
        return config
    # Seven units a warp were measured with scales beside each.
    once = replace(config, scales_once=True, ahead=3)
    few = once.allows_scales_once(shape) and (config.cluster == 1 or config.k_warps == 8)
    return once if few and once.shared_bytes(shape) <= MAX_SHARED else replace(config, ahead=3)
