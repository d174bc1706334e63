"""The choice of a configuration: candidates by cluster size, of which the best by a score is refined as measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from fdk.kernels.cuda.decode_choice import activations, chains, lookups, many_digits, many_tokens, places, two_places
from fdk.kernels.cuda.decode_choice.blocks_in_turn import with_blocks_in_turn
from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, Share, coded, token_tile
from fdk.kernels.cuda.decode_choice.digits import digit_warps, with_digits
from fdk.kernels.cuda.decode_choice.even_shares import with_even_shares
from fdk.kernels.cuda.decode_choice.fill import fill
from fdk.kernels.cuda.decode_choice.indices import with_indices
from fdk.kernels.cuda.decode_config import PLAIN, Config, Epilogue, Shape

Refinement = Callable[[Case, Config], Config]


@lru_cache(maxsize=4096)
def choose_config(
    shape: Shape,
    m: int,
    blocks: int,
    sms: int,
    capability: tuple[int, int] = (9, 0),
    epilogue: Epilogue = PLAIN,
    equal_indices: bool = True,
) -> Config | None:
    """The configuration for m tokens of a weight with that many blocks of rows; None if none fits shared memory.

    equal_indices: whether the device multiplies by equal indices as csrc/indices.cuh needs it (decode.equal_indices).

    Measured on an H200 (CUDA 13.0), 2026-11-21 and 22, at 4096^2 to 28672 x 8192, 1 to 8 bits, m = 1 to 64:
    docs/findings.md.
    """
    case = Case(shape, token_tile(m), blocks, sms, capability, epilogue, equal_indices)
    if not _registers_suffice(case):
        return None
    found = max(_candidates(case), key=lambda scored: scored[0], default=None)
    if found is None:
        return None
    config = found[1]
    if many_tokens.may_run_as_eight(case, config) and not many_digits.with_many_digits(case, config).digits:
        eight = choose_config(shape, 8, blocks, sms, capability)
        if eight and many_tokens.runs_as_eight(case, config, eight):
            return eight
    for refine in _refinements(case):
        config = refine(case, config)
    return config


def _registers_suffice(case: Case) -> bool:
    """Whether registers hold the sums of that many tokens, and shared memory the tables of sparse weights."""
    if case.shape.sparse and (case.tokens > 32 or case.epilogue.tables > 1):
        return False  # the words of a unit beside the sums of 64 tokens; one table of values
    # Elsewhere they do not hold the sums of 64 tokens; on 9.0 two launches of 32 instead have not been measured.
    return case.tokens <= 32 or case.measured


def _candidates(case: Case) -> Iterator[tuple[float, Config]]:
    """Configurations that fit shared memory, several for each size of clusters, with their scores."""
    for cluster in (1, 2, 4, 8) if case.hopper else (1,):
        share = case.share(cluster)
        start = _products(case, share)
        most, row_warps = _warps(case, share, start)
        fewer = [warps for warps in (8, 7, 4, 2, 1) if warps < most]
        tried = [replace(start, k_warps=k_warps, row_warps=row_warps) for k_warps in (most, *fewer)]
        indices = None if case.chained else with_indices(case, share, start)
        if indices and fill(case.shape, indices, case.capability):
            tried = [indices]  # groups that stages of two and four units cut have none
        for config in tried:
            if case.hopper and places.needs_its_own(case.shape, config):
                config = replace(config, alone=True)
            if filled := fill(case.shape, config, case.capability):
                filled = places.apart(case, filled)
                yield _score(case, share, filled, most), filled


def _products(case: Case, share: Share) -> Config:
    """How CTAs of a share multiply; warps, ring, phases and batch are open."""
    start = Config(case.tokens, share.cluster, 1, 1, 1, 1, share.blocks, 1, 1, epilogue=case.epilogue)
    # At 16 tokens and more the registers that `uniform` saves are those that spilled.
    start = replace(start, alone=case.hopper and case.chained, uniform=case.hopper and case.tokens >= 16)
    if case.hopper and case.tokens == 16 and case.shape.bits == 1 and case.shape.kind in LOOKED_UP:
        return replace(start, octets=True)
    return chains.with_digits_in_chain(case, share, start) if case.chained else with_digits(case, share, start)


def _warps(case: Case, share: Share, start: Config) -> tuple[int, int]:
    """(k_warps, row_warps), of which fewer on k are tried too."""
    if case.chained:
        return chains.chain_warps(case, share, start)
    if start.digits and not coded(case.shape):
        return digit_warps(case.shape, share, case.hopper)
    return lookups.lookup_warps(case, share, start)


# Preference among cluster sizes at equal balance: sums travel further in larger ones, activations less far.
_CLUSTER_WORTH_FEW = {1: 1.0, 2: 0.97, 4: 0.5, 8: 0.45}

_CLUSTER_WORTH_MANY = {1: 0.9, 2: 1.0, 4: 0.66, 8: 0.55}


def _score(case: Case, share: Share, config: Config, most: int) -> float:
    """How busy a configuration keeps the device; most: the most warps on k that were tried for its size of clusters."""
    score = case.blocks / (share.blocks * case.at_once(share.cluster))
    if not (case.chained and config.k_warps == most):
        # In a chain more warps are worth more than an even share of k for each.
        score *= share.units / config.k_warps / -(-share.units // config.k_warps)
    if case.chained and case.tokens >= 8 and share.blocks == 1:
        # Activations of many tokens cost nearly as much as the weights of the one block that they are for.
        score /= 1.4
    score *= (_CLUSTER_WORTH_FEW if case.tokens <= 4 else _CLUSTER_WORTH_MANY)[share.cluster]
    # A CTA that goes through its activations more than once waits for them each time.
    return score * (0.9 ** (config.phases - 1) * (0.25 + 0.09375 * min(8, config.warps)))


# What each does and where says its docstring; it leaves alone what it was not measured to improve.
_PLAIN: tuple[Refinement, ...] = (
    many_tokens.with_uniform_eight,
    many_digits.with_many_digits,
    many_tokens.with_wide_table,
    many_tokens.with_half_blocks,
    activations.with_pieces,
    activations.with_two_pieces,
    places.beside_the_next,
    two_places.held_for_few,
    places.with_operands_ahead,
    with_blocks_in_turn,
    with_even_shares,
)

_PLAIN_UNMEASURED: tuple[Refinement, ...] = (
    many_tokens.with_uniform_eight,
    many_tokens.with_wide_table,
    lookups.within_registers_of_blackwell,
)

_CHAINED: tuple[Refinement, ...] = (chains.within_registers,)

_CHAINED_ONE_TOKEN: tuple[Refinement, ...] = (chains.with_fewest_instructions, chains.with_few_stages)

_CHAINED_H200: tuple[Refinement, ...] = (
    chains.with_two_places,
    chains.kept_apart_by_registers,
    chains.with_operands_ahead_in_chain,
)


def _refinements(case: Case) -> tuple[Refinement, ...]:
    """What is done to the best candidate, in order; nothing outside of chains before Hopper."""
    if not case.chained:
        return _PLAIN if case.measured else _PLAIN_UNMEASURED if case.hopper else ()
    if not case.hopper or case.tokens > 1:
        return _CHAINED
    h200 = case.measured and case.sms == 132
    return _CHAINED_ONE_TOKEN + (_CHAINED_H200 if h200 else ())
