"""What shared memory allows: the ring, phases and batch of a configuration, and how scales, codes and sums come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fdk.kernels.cuda.decode_choice.activations import pieces_of_slice
from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Share, few_codes_and_zeros
from fdk.kernels.cuda.decode_choice.digits import small_slices
from fdk.kernels.cuda.decode_choice.rings import rings
from fdk.kernels.cuda.decode_config import PLAIN, UINT_FLOAT, Config, Shape, max_shared, shared_of_two


def fill(shape: Shape, config: Config, capability: tuple[int, int]) -> Config | None:
    """`config` with the ring, phases and batch that shared memory allows, or None; fewest phases, best ring first."""
    hopper, most = capability >= (9, 0), max_shared(capability)
    for filled in _rings_and_phases(shape, config):
        filled = replace(filled, x_chunks=pieces_of_slice(shape, filled, hopper))
        if hopper:
            filled = _with_loads(shape, filled)
        if filled.shared_bytes(shape, hopper) <= most:
            return replace(filled, min_ctas=2 if hopper and _has_room_beside(shape, filled, capability) else 1)
    return None


def _rings_and_phases(shape: Shape, config: Config) -> Iterator[Config]:
    """`config` with all phases, rings and batches that k allows."""
    batches = (config.steps, 1) if config.tokens == 1 else (1,)
    found = rings(shape, config)
    for phases in (1, 2, 4, 8, 16):
        slices = config.cluster * phases * config.k_warps
        if phases > 1 and (config.steps > 1 or config.digits or shape.units % slices):
            continue
        for stage_units, stages in found:
            if shape.allows_stage_units(stage_units, slices):
                for batch in batches:
                    yield replace(config, phases=phases, stage_units=stage_units, stages=stages, batch=batch)


def _has_room_beside(shape: Shape, config: Config, capability: tuple[int, int]) -> bool:
    """Whether a CTA of the next launch can start beside one of one token, and registers are limited for that."""
    per_warp = config.steps * -(-shape.units // (config.cluster * config.phases * config.k_warps))
    # Two CTAs of 16 warps would spill in 64 registers a thread, and zeros of several groups in 128.
    crowded = config.warps > 8 or (shape.kind == UINT_FLOAT and shape.subs > 1)
    single = config.tokens == 1 and per_warp <= 4 and not crowded and not config.alone
    return single and config.shared_bytes(shape) <= shared_of_two(capability)


def _with_loads(shape: Shape, config: Config) -> Config:
    """`config` with how its scales, codes and sums of activations come to its warps.

    docs/findings.md: "Copies, addresses, rows and sums", "Zero points, and two CTAs on a multiprocessor".
    """
    if config.digits and (shape.nested or shape.sparse):
        small = small_slices(shape, Share.of(shape, config))
        once = config.allows_scales_once(shape) and not small
        return replace(config, scales_once=once, bulk=not shape.sparse)
    if config.epilogue != PLAIN or config.digits or config.indices or config.tokens > 8:
        return config
    per_warp = config.steps * -(-shape.units // (config.cluster * config.phases * config.k_warps))
    # Four more products a unit cost less than a pass over x and a barrier of the CTA while a warp has few units.
    own_sums = shape.zeros or (shape.bits == 1 and shape.kind in LOOKED_UP)
    config = replace(config, x_sums=own_sums and shape.subs == 1 and per_warp <= 16)
    # Scales in one piece halve the copies of a warp that refills single units, which pays from the second refill on.
    refills = per_warp - config.stages if config.stage_units == 1 else 0
    pays = refills >= 2 and per_warp <= 16 and (not shape.zeros or (per_warp >= 8 and few_codes_and_zeros(shape)))
    if pays and config.allows_scales_once(shape):
        # Without small copies, sparse weights come faster by cp.async, whose refills no fence holds up.
        return replace(config, scales_once=True, bulk=not shape.sparse or config.tokens > 1)
    return config
