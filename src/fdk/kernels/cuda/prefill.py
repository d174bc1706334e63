"""The prefill kernel (csrc/prefill.cuh) for many tokens on Hopper: tile configuration, launch arithmetic, launcher."""

from __future__ import annotations

import ctypes
import itertools
import warnings
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from fdk.kernels.cuda import decode, decode_config, driver, flags, jit
from fdk.kernels.cuda.decode_config import INT, MAX_RANGES, MAX_SHARED, TABLE, UINT_FLOAT, UINT_U8, Shape
from fdk.packing.fragments import BLOCK
from fdk.weight import QuantisedWeight

TOKENS = (16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Tokens of a tile: few enough that a layer compiles a handful of kernels, close enough that padding costs little."""

EXACT_TOKENS = 32
"""Up to this many tokens scales of groups multiply float32 sums; above, weights, as cuBLAS on dense ones would."""

_SMS = 132
_MOST_STAGES = 12

# Microseconds, fitted to graph replays with cold weights of 4 bits, group 64 (docs/findings.md): start of a launch, a
# round of one unit per k group, per token of it, meeting of slices, output per token; by (blocks, k groups, late).
_TIMES = {
    (2, 1, True): (0.99, 0.236, 0.00112, 2.01, 0.0098),
    (1, 2, True): (0.39, 0.288, 0.00092, 1.76, 0.0158),
    (2, 2, True): (1.37, 0.338, 0.00277, 1.45, 0.0219),
    (2, 1, False): (0.5, 0.154, 0.0023, 1.99, 0.0),
    (1, 2, False): (0.42, 0.231, 0.00166, 1.75, 0.0122),
    (2, 2, False): (1.89, 0.405, 0.00121, 0.74, 0.0270),
    (3, 1, True): (1.51, 0.265, 0.00221, 1.91, 0.0100),
    (3, 1, False): (0.5, 0.234, 0.00323, 2.26, 0.0),
    (4, 1, True): (2.02, 0.302, 0.00348, 1.92, 0.0079),
    (4, 1, False): (1.68, 0.352, 0.00189, 1.70, 0.0159),
}
# The same where scales multiply sums and the loop over units is unrolled.
_UNROLLED_TIMES = {
    (2, 1): (0.99, 0.236, 0.00112, 2.01, 0.0098),
    (1, 2): (0.31, 0.231, 0.0015, 1.76, 0.0158),
    (2, 2): (1.37, 0.249, 0.0052, 0.75, 0.0219),
    (3, 1): (1.51, 0.223, 0.00156, 1.91, 0.0100),
    (4, 1): (2.52, 0.245, 0.0043, 1.92, 0.0079),
}
# Where tiles are cut along k: one wait for sums of others, and adding up those of a token, by blocks.
_SHARES = {2: (5.8, 0.0083), 3: (2.65, 0.014)}
# What each further share of a tile takes.
_FURTHER_SHARE = 0.5
# How much longer two k groups of a block take by themselves, from so many tokens on: their power lowers the clock.
_ALONE, _ALONE_TOKENS = 1.04, 112
# Tokens for which registers last, by warpgroups; with late scales, whose sums take as many again.
_MOST_TOKENS = {2: (256, 64), 3: (192, 64), 4: (64, 64)}
# What a unit of one warpgroup takes more: single look-ups, integers made by arithmetic, zero points, another group of
# scales on sums, of each token.
_SINGLE_LOOKUPS, _ARITHMETIC, _ZEROS, _GROUP, _GROUP_TOKEN = 0.065, 0.025, 0.02, 0.015, 0.0005
# What one of 3 bits takes more in an unrolled loop with scales on sums, and of 2 bits and 16 tokens, by blocks.
_THREE_BITS, _TWO_BITS = 0.006, {2: -0.004, 4: -0.0165}
# What a unit of bit planes takes more for each of them beyond 2.5.
_PLANE = 0.012
# What an unrolled loop saves of a round: by most tokens of a tile, and at least above 4 bits; nothing up to 4 bits
# where tiles are cut along k.
_UNROLLED, _UNROLLED_LONG = {64: 0.0, 128: 0.02, 192: 0.04, 256: 0.0}, 0.03
# Slices of k of a cluster, and whether tiles are cut into equal shares instead.
_CUTS = ((1, False), (2, False), (3, False), (4, False), (5, False), (1, True))
# More than two slices have been measured from so many rows on (fewer are the decode kernel's), where they fill so much
# of the multiprocessors, up to so many blocks of a CTA; what each takes.
_SLICES_ROWS, _SLICES_FILL, _SLICES_BLOCKS, _FURTHER_SLICE = 17, 0.75, {3: 2, 4: 3, 5: 2}, 0.35
# CTAs share x in pairs from so many tokens a tile on, because the multiprocessors then draw less power; if so much more
# of a weight's rows as the last pair may lack costs less than that.
_PAIR_TOKENS, _PAIR_ROWS = 192, 1.02
# From so many waves on tiles are cut although x is large.
_LARGE_WAVES = 8
# Tiles are cut along k while x stays in the second-level cache, because they read it at different places; or in pairs,
# where few are cut. Fewer tokens have not been measured.
_STREAM_X_BYTES, _STREAM_TOKENS = 40e6, 96
# In pairs, sums of cut tiles come through the ring while x is not larger.
_FETCH_X_BYTES = 20e6
# Bytes and operations that no product exceeded, and the time below which none was measured.
_BYTES_PER_US, _OPERATIONS_PER_US, _LEAST_US = 4.1e6, 8e8, 5.0

# Units that a cluster gets at least where tiles are cut along k.
_LEAST_SHARE = 8

# Tiles of tokens that neighbouring rows take before the next ones: what they share of x stays in L2.
_BAND = 8

# Rows of staged outputs in shared memory (csrc/prefill.cuh: OUT_STRIDE), and what the system keeps of it.
_OUT_STRIDE, _WINDOW = 144, 1024


def _whole(nbytes: int) -> int:
    """Rounded up to the kilobyte that a swizzled tile starts at."""
    return -(-nbytes // 1024) * 1024


@dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    tokens      tokens of a tile: a multiple of 8, of 16 above 128 and in pairs
    blocks      blocks of 64 rows of a tile, a warpgroup each
    stages      units of 64 columns in the ring
    pair        CTAs of a cluster that share x;  split: CTAs of a cluster that split k; one of them is 1
    codes_ahead while a unit is multiplied and the next one dequantised, load the codes of the one behind that from the
                ring if they are there; unrolled loops in whole units
    k_groups    warpgroups of a block of rows, which take its units in turn
    turns       warpgroups multiply one after the other
    rounds      multiply scales of groups into the weights, rounded to 16 bits, instead of scaling float32 sums
    parts       parts of a unit that are dequantised one after the other: two need half the registers
    wide        rows of the table 256 bytes apart, for cheaper addresses: 2, 4 and 8 bits
    stream      cut the tiles that do not fill all multiprocessors along k into equal shares
    fetch_sums  what other shares leave of a tile comes through the ring, behind its last unit, instead of being loaded
    unrolled    unroll the loop over units over the ring: stages are a multiple of 2 * k_groups and divide the
                units of a slice of k
    fresh       the kernel in front writes the codes, so that they are not fetched before it is done
    """

    tokens: int
    blocks: int
    stages: int
    pair: int = 1
    split: int = 1
    k_groups: int = 1
    turns: bool = False
    rounds: bool = False
    parts: int = 1
    wide: bool = False
    stream: bool = False
    fetch_sums: bool = False
    unrolled: bool = False
    codes_ahead: bool = False
    fresh: bool = False

    @property
    def cluster(self) -> int:
        return self.pair * self.split

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return self.blocks * self.k_groups

    @property
    def threads(self) -> int:
        return (self.warpgroups + 1) * 128

    def block_bytes(self, shape: Shape) -> int:
        """Bytes of a stage for one block of rows: codes, scales, zeros."""
        staged = shape.unit_groups if shape.groups > 1 or shape.kind == UINT_U8 else 0
        return shape.bits * 512 + staged * (128 + (64 if shape.kind == UINT_U8 else 0))

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of a CTA; the host twin of `Smem` in csrc/prefill.cuh, which asserts that they agree."""
        integers = shape.kind in (INT, UINT_U8) and shape.bits >= 5 and not self.wide
        table_bytes = 0 if integers else shape.table_bytes << self.wide
        table = max(0, table_bytes - _WINDOW)
        slices = self.split * self.k_groups
        share = -(-(self.tokens // 8) // slices)
        chunks = self.warpgroups * -(-share * 8 // min(self.tokens, 64))
        all_barriers = 2 * self.stages + (1 + chunks if self.split > 1 else 0)
        x_bytes, codes_bytes = self.tokens * 128, self.blocks * self.block_bytes(shape)
        out = self.warpgroups * min(self.tokens, 64) * _OUT_STRIDE
        barriers = -(-all_barriers * 8 // 16) * 16
        receive = 0 if slices == 1 else self.k_groups * slices * share * self.blocks * 128 * 16
        stage = _whole(x_bytes + codes_bytes)
        head = _whole(out + barriers)
        low = head if head <= table else 0
        low_stages = min(self.stages, (table - low) // stage)
        high = table + table_bytes + (0 if low else head)
        return high + max((self.stages - low_stages) * stage, receive)

    def defines(self, shape: Shape) -> dict[str, int]:
        """Macros that the kernel is compiled with."""
        return {
            **shape.defines(),
            "FDK_TOKENS": self.tokens,
            "FDK_TOKEN_TILES": self.tokens // 8,
            "FDK_BLOCKS": self.blocks,
            "FDK_K_GROUPS": self.k_groups,
            "FDK_STAGES": self.stages,
            "FDK_PAIR": self.pair,
            "FDK_SPLIT": self.split,
            "FDK_CODES_AHEAD": int(self.codes_ahead),
            "FDK_TURNS": int(self.turns),
            "FDK_ROUND": int(self.rounds),
            "FDK_PARTS": self.parts,
            "FDK_STREAM": int(self.stream),
            "FDK_FETCH_SUMS": int(self.fetch_sums),
            "FDK_WIDE": int(self.wide),
            "FDK_UNROLLED": int(self.unrolled),
            "FDK_FRESH": int(self.fresh),
            "FDK_SHARED_BYTES": self.shared_bytes(shape),
        }


def _fill(shape: Shape, config: Config) -> Config | None:
    """`config` with as many stages as shared memory allows and pay; None if it has no room for two per k group."""
    for stages in range(_MOST_STAGES, 2 * config.k_groups - 1, -1):
        filled = replace(config, stages=stages)
        if filled.shared_bytes(shape) <= MAX_SHARED:
            return filled
    return None


def unsupported(shape: Shape, blocks: tuple[int, ...]) -> str | None:
    """Why the kernel cannot serve a weight of this shape, or None. Capability 9.0 is the caller's to check."""
    if shape.kind == UINT_FLOAT:
        return "subtracts whole zero points only, the weight has fractional ones"
    if shape.sparse:
        return "spreads no codes by masks"
    if shape.k % 8:
        return f"copies rows of x of whole 16-byte pieces, k = {shape.k} is no multiple of 8"
    if len(blocks) > MAX_RANGES:
        return f"holds up to {MAX_RANGES} tables, the weight has {len(blocks)}"
    return None


def row_tiles(blocks: tuple[int, ...], config: Config) -> int:
    """Row tiles of a cluster over all ranges of rows; none reaches over the end of its range."""
    step = config.blocks * config.pair
    return sum(-(-count // step) for count in blocks)


def clusters_and_streamed(shape: Shape, config: Config, tiles: int, sms: int) -> tuple[int, int]:
    """Clusters of a launch, and how many of its tiles they cut along k: those of the last one to two waves."""
    if not config.stream:
        return (tiles if config.split * config.k_groups > 1 else min(tiles, sms // config.pair)), 0
    clusters = max(1, min(sms // config.pair, tiles * shape.units // _LEAST_SHARE))
    return clusters, tiles - max(0, tiles // clusters - 1) * clusters


def _waves(m: int, blocks: tuple[int, ...], sms: int, config: Config) -> int:
    """How often the multiprocessors are filled with tiles."""
    return -(-row_tiles(blocks, config) * -(-m // config.tokens) // decode_config.clusters_at_once(sms, config.cluster))


def _us(shape: Shape, m: int, blocks: tuple[int, ...], sms: int, config: Config) -> float:
    """Time by waves of tiles, each some rounds of a unit per k group."""
    late = shape.groups > 1 and not config.rounds
    unrolled_late = late and config.unrolled
    times = (
        _UNROLLED_TIMES[config.blocks, config.k_groups]
        if unrolled_late
        else _TIMES[config.blocks, config.k_groups, late]
    )
    start, per_round, per_token, meeting, per_output = times
    extra = 0.0
    if shape.nested:
        extra = _PLANE * max(0, shape.bits - 2.5)
    elif shape.bits > 4:
        # Three warpgroups wait for each other's look-ups.
        unrolled_crowd = 1.03 if config.split <= 2 else 1.15
        crowded = (unrolled_crowd if unrolled_late else 1.3) if config.warpgroups > 2 else 1
        crowded = 0.5 if unrolled_late and (config.blocks, config.k_groups, config.split) == (1, 2, 2) else crowded
        extra = _SINGLE_LOOKUPS * crowded if shape.kind == TABLE else _ARITHMETIC
    elif unrolled_late:
        two_bits = shape.bits == 2 and config.tokens == 16
        extra = _THREE_BITS if shape.bits == 3 else _TWO_BITS.get(config.blocks, 0.0) if two_bits else 0.0
    extra += _ZEROS * (shape.kind == UINT_U8)
    if late:
        extra += (shape.subs - 1) * (_GROUP + _GROUP_TOKEN * config.tokens)
    a_round = per_round + per_token * config.tokens + extra * config.blocks * config.k_groups
    if config.unrolled and not late and (shape.bits > 4 or not config.stream):
        saved = next(saved for most, saved in _UNROLLED.items() if config.tokens <= most)
        long = shape.bits > 4 and not shape.nested and config.tokens > 64
        a_round -= max(saved, _UNROLLED_LONG) if long else saved
    if config.stream:
        tiles = row_tiles(blocks, config) * -(-m // config.tokens)
        clusters, streamed = clusters_and_streamed(shape, config, tiles, sms)
        waves = (tiles - streamed) // clusters + streamed / clusters
        meeting, per_sum = _SHARES[config.blocks]
        # Every cluster leaves sums to another one; it adds those of one share, or of all that finish its tile.
        further = max(0.0, clusters / streamed - 1)
        meeting += per_sum * config.tokens * (1 + further) + _FURTHER_SHARE * further
        outputs = waves + 1
    else:
        waves = outputs = _waves(m, blocks, sms, config)
        meeting = meeting + _FURTHER_SLICE * max(0, config.split - 2) if config.split > 1 else 0.0
    rounds = -(-shape.units // (config.split * config.k_groups))
    if (config.blocks, config.k_groups, late) == (1, 2, False) and config.tokens >= _ALONE_TOKENS:
        a_round *= _ALONE
    return start + waves * rounds * a_round + outputs * per_output * config.tokens + meeting


def _least_us(shape: Shape, m: int, sms: int) -> float:
    """Time of bytes or operations, which no configuration undercuts."""
    moved = shape.n * shape.k * (shape.bits / 8 + 2 / shape.group) + 2 * m * (shape.n + shape.k)
    floor = max(moved / _BYTES_PER_US, 2 * m * shape.n * shape.k / _OPERATIONS_PER_US)
    return max(1.0 + floor * _SMS / sms, _LEAST_US)


def _wide(shape: Shape, config: Config) -> bool:
    """Whether the table has rows 256 bytes apart: measured with 4 bits; 2 and 8 could have them too."""
    return config.rounds and shape.bits == 4 and not shape.nested


def _whole_rounds(shape: Shape, config: Config, stages: int) -> bool:
    """Whether a loop can be unrolled over `stages`: runs of units are whole rounds of it, or more than two slices."""
    return stages % (2 * config.k_groups) == 0 and (config.split > 2 or shape.units % (stages * config.split) == 0)


def _unrolled(shape: Shape, config: Config) -> Config:
    """`config` with its loop over units unrolled if that was measured to win (docs/findings.md), else as it is.

    Where a warpgroup's own look-ups take longer than its turn of the tensor cores, it does: up to 224 tokens a tile,
    and above 4 bits. A ring of less than four stages a k group costs more than all that.
    """
    late = shape.groups > 1 and not config.rounds
    if config.rounds and config.split > 2 and config.blocks == 3:
        return _unrolled_slices(shape, config)
    # Other widths spill in places; where units share a scale, the compiler waits between their products.
    even = shape.kind in (TABLE, INT) and shape.bits in (1, 4, 8)
    narrow = shape.kind == TABLE and shape.bits in (2, 3) and config.blocks == config.k_groups == 2
    narrow = narrow and shape.n * shape.k <= 1 << 26  # larger weights have not been measured
    # Two bits of sixteen tokens have a wide table besides, by which four blocks, too, are faster.
    two_bits = shape.kind == TABLE and shape.bits == 2 and config.tokens == 16
    two_bits &= shape.n * shape.k < 1 << 28
    narrow |= two_bits and (config.blocks, config.k_groups) in ((2, 2), (4, 1))
    if late and shape.group == 64 and (even or narrow):
        return _unrolled_few(shape, config, (16,) if narrow else (16, 12, 8))
    # Registers of three and four blocks last for eight units in a row of the widths that lie in whole words.
    light = shape.bits in (1, 2, 4) and shape.kind in (TABLE, INT)
    few = (
        32 < config.tokens <= 64
        and (config.blocks < 3 or light)
        and not (shape.nested and shape.bits == 8 and shape.subs > 1)
    )
    many = config.tokens >= 96 and config.warpgroups == 2 and (shape.subs == 1 or config.k_groups == 2)
    long = config.tokens < 256 or config.stream or (shape.bits > 4 and not shape.nested)
    if late or not (few or (many and long)):
        return config
    for stages, wide in ((8, True), (6, True), (4, True), (8, False), (6, False), (4, False)):
        unrolled = replace(config, wide=wide, stages=stages, turns=False, unrolled=True)
        whole = _whole_rounds(shape, config, stages)
        measured = (stages == 8 and not wide) if few else stages >= 4 * config.k_groups and wide <= config.wide
        if whole and measured and unrolled.shared_bytes(shape) <= MAX_SHARED:
            return replace(unrolled, codes_ahead=_codes_ahead(shape, unrolled))
    return config


def _unrolled_slices(shape: Shape, config: Config) -> Config:
    """The same for more than two slices of three blocks: up to 128 tokens, of the widths that lie in whole words."""
    if config.tokens > 128 or shape.bits not in (1, 2, 4, 8) or shape.kind not in (TABLE, INT) or shape.subs > 1:
        return config
    for stages in (8, 6, 4):
        unrolled = replace(config, stages=stages, unrolled=True)
        if unrolled.shared_bytes(shape) <= MAX_SHARED:
            return unrolled
    return config


def _codes_ahead(shape: Shape, config: Config) -> bool:
    """Whether codes leave the ring a unit earlier: measured with 2 and 4 bits, where one warpgroup has a block.

    Tables of 8 bits gain where CTAs share x.
    """
    if shape.kind == TABLE and shape.bits == 8:
        return config.pair == 2 and shape.subs == config.k_groups == config.parts == 1
    measured = (shape.bits in (2, 4) and shape.kind in (TABLE, INT)) or (shape.bits == 4 and shape.kind == UINT_U8)
    return measured and shape.subs == config.k_groups == config.parts == 1 and not config.stream and config.split <= 2


def _pairs(shape: Shape, config: Config, waves: int) -> bool:
    """Whether CTAs share x in pairs: where that was measured to win (docs/findings.md), each behind its own calls."""
    if config.split * config.k_groups > 1:
        return False
    few = 4 if shape.bits < 3 or shape.nested else 2
    return config.stream or (waves >= few and config.tokens >= _PAIR_TOKENS)


def _fetches_sums(shape: Shape, config: Config, m: int) -> bool:
    """Whether sums come through the ring: measured with 2, 4 and 8 bits, beside an x that leaves room in the cache.

    Tiles that are cut more than once took longer so.
    """
    if not config.stream or shape.bits not in (2, 4, 8) or shape.kind not in (TABLE, INT):
        return False
    if config.pair > 1 and 2 * m * shape.k > _FETCH_X_BYTES:
        return False
    per_stage = config.tokens // (16 * config.blocks)  # token tiles, as in csrc/prefill.cuh
    return not config.unrolled or -(-config.tokens // 8 // per_stage) % config.stages == 0


def _unrolled_few(shape: Shape, config: Config, most: tuple[int, ...]) -> Config:
    """The same for few tokens, where more stages gain most and a wide table comes next; `most`: stages measured."""
    # Twelve stages beside a wide table won over twelve beside another by 9 % (22528 x 3072), sixteen over eight by 8 %.
    rings = ((16, True), (12, True), (16, False), (12, False), (8, True), (8, False))
    # Of 8 bits a wide table is worth more than stages.
    for stages, wide in sorted(rings, key=lambda ring: shape.bits == 8 and not ring[1]):
        filled = replace(config, stages=stages, wide=wide, unrolled=True)
        whole = _whole_rounds(shape, config, stages)
        wide_pays = shape.bits == 4 and config.tokens <= 32
        two_or_eight = shape.bits == 2 or (shape.bits == 8 and config.blocks < 4)
        wide_pays |= config.tokens == 16 and shape.kind == TABLE and two_or_eight
        measured = stages in most and (not wide or wide_pays)
        if whole and measured and filled.shared_bytes(shape) <= MAX_SHARED:
            return filled
    return config


@lru_cache(maxsize=4096)
def _best(shape: Shape, m: int, blocks: tuple[int, ...], sms: int) -> tuple[float, Config] | None:
    """Predicted time and configuration of the fastest one, or None."""
    if m < 1 or unsupported(shape, blocks):
        return None
    rounds = m > EXACT_TOKENS and shape.groups > 1
    late = shape.groups > 1 and not rounds
    found = None
    for tokens, (split, stream), (per_cta, k_groups, scales_sums) in itertools.product(TOKENS, _CUTS, _TIMES):
        warpgroups = per_cta * k_groups
        most = _MOST_TOKENS[warpgroups][late]
        # Two k groups fetch x twice as fast, which is too fast from 128 tokens on.
        if late and tokens < m:
            continue  # such tiles have not been measured
        if scales_sums != late or tokens > (most if k_groups == 1 else min(most, 128)):
            continue
        if split > sms:
            continue  # no cluster would ever start
        if split * k_groups * 2 > shape.units or (stream and (late or k_groups > 1 or per_cta not in _SHARES)):
            continue
        if rounds and tokens <= 64 and (per_cta, k_groups) in ((2, 1), (3, 1)) and (per_cta, split) != (3, 4):
            continue  # the fit is that of one scale per row; with more of them four warpgroups were measured
        # Half of a unit at a time needs fewer registers; planes of nested weights are gathered all at once.
        parts = 2 if per_cta == 3 and tokens > 160 else 1
        if shape.nested and per_cta == 3 and tokens > 128:
            continue
        turns = warpgroups == 4 and tokens == 64 and not rounds
        config = Config(tokens, per_cta, 2, 1, split, k_groups, turns, rounds, parts, stream=stream)
        waves = _waves(m, blocks, sms, config)
        if waves > 1 and split * k_groups > 1:
            continue  # such tiles are not taken in turn: each wave would start anew
        tiles = row_tiles(blocks, config) * -(-m // tokens)
        # Halves of a unit lost by 4 % in four and five slices; planes spill in places.
        if split > 2 and (per_cta > _SLICES_BLOCKS[split] or parts > 1 or shape.nested):
            continue
        if split > 2 and (m < _SLICES_ROWS or tiles * split < _SLICES_FILL * sms):
            continue
        if stream and (tokens < _STREAM_TOKENS or (2 * m * shape.k > _STREAM_X_BYTES and waves < _LARGE_WAVES)):
            continue
        paired = replace(config, pair=2)
        alike = 2 * row_tiles(blocks, paired) <= _PAIR_ROWS * row_tiles(blocks, config)
        if sms > 1 and alike and _pairs(shape, config, waves):
            config = paired
        plain = _fill(shape, config)
        wide = _fill(shape, replace(config, wide=True)) if _wide(shape, config) else None
        # A wide table that leaves fewer than four stages costs 3 to 4 %, more than it saves.
        config = wide if wide and (plain is None or wide.stages >= min(plain.stages, 4)) else plain
        if config is None:
            continue
        config = _unrolled(shape, config)
        config = replace(config, fetch_sums=tiles * config.pair >= sms and _fetches_sums(shape, config, m))
        us = _us(shape, m, blocks, sms, config)
        if found is None or us < found[0]:
            found = (us, config)
    if found and rounds and m <= 64 < found[1].tokens and not found[1].stream:
        # The same tile with as many tokens as there are does less of everything; how much less has no fit.
        fewer = replace(found[1], tokens=next(tokens for tokens in TOKENS if tokens >= m), wide=False)
        if (filled := _fill(shape, fewer)) is not None:
            found = (found[0], _unrolled(shape, filled))
    return found


def choose(shape: Shape, m: int, blocks: tuple[int, ...], sms: int) -> Config | None:
    """The fastest configuration by prediction for m rows of x; None if the kernel cannot serve them.

    blocks: blocks of 64 rows of each table's range of rows.
    """
    best = _best(shape, m, blocks, sms)
    return best[1] if best else None


def predict_us(shape: Shape, m: int, blocks: tuple[int, ...], sms: int) -> float | None:
    """Predicted microseconds of `choose`'s configuration; None if the kernel cannot serve them."""
    best = _best(shape, m, blocks, sms)
    return max(best[0], _least_us(shape, m, sms)) if best else None


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/prefill.cuh."""

    _fields_ = (
        ("x_map", ctypes.c_uint64 * 16),
        *decode.WEIGHT_FIELDS,
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("ranges", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("band", ctypes.c_int),
        ("streamed", ctypes.c_int),
        ("zero", ctypes.c_uint32),
        ("partial", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("range", decode.Range * MAX_RANGES),
        # The kernel's struct is a multiple of 64 bytes, and a launch copies all of it.
        ("pad", ctypes.c_uint64 * 4),
    )


def params_for(weight: QuantisedWeight, config: Config) -> Params:
    """The kernel's argument without what a call brings: x, bias, out, m."""
    params = Params(**decode.weight_values(weight))
    params.row_tiles = decode.fill_ranges(params.range, weight.geometry, lambda count: row_tiles((count,), config))
    return params


def source(shape: Shape, config: Config, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "prefill.cuh", config.defines(shape), jit.architecture(capability)


@cache
def load(shape: Shape, config: Config, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    cubin = jit.cubin(*source(shape, config, torch.cuda.get_device_capability(device)))
    return driver.Function(cubin, "fdk_prefill", config.threads, config.shared_bytes(shape), config.cluster)


@cache
def _warn_of_sums(device: torch.device) -> None:
    warnings.warn(
        f"fdk: no memory is left on {device} for the sums of tiles cut along k, so products of many rows take whole "
        "tiles and are slower; free memory or use smaller batches",
        RuntimeWarning,
        stacklevel=5,
    )


class Plan:
    """A weight bound to a configuration on its device: what is left for a call are x, bias, out and a launch.

    shape: that of codes which every call brings with it, where they are not the weight's own.
    """

    def __init__(self, weight: QuantisedWeight, config: Config, shape: Shape | None = None) -> None:
        zeros = weight.parts.get("zeros")
        assert weight.layout == "fragments" and all(part.data_ptr() % 16 == 0 for part in weight.parts.values())
        self.shape = shape or decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
        self.config = config
        self.template = params_for(weight, config)
        self.device = weight.device
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.maps: dict[tuple[int, int], driver.TensorMap] = {}
        with torch.cuda.device(self.device):
            self.function = load(self.shape, config, self.device.index)
        if config.stream:
            # After loading, which says what to do where a graph is being captured.
            self.flags = flags.of_device(self.device)
            assert self.sms // config.pair * config.pair * config.warpgroups <= flags.FLAGS

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor, **operands: Tensor | float) -> None:
        """out [m, n] = x [m, k] @ W.T + bias on the current stream of the weight's device.

        operands: codes if they are not the weight's, by the names of `Params`.
        """
        m, config = x.shape[0], self.config
        assert m > 0 and x.data_ptr() % 16 == 0 and x.is_contiguous()
        params = Params.from_buffer_copy(self.template)
        for name, value in operands.items():
            setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
        key = (x.data_ptr(), m)
        found = self.maps.get(key)
        if found is None:
            if len(self.maps) >= 64:
                self.maps.clear()
            found = self.maps[key] = driver.tensor_map(
                key[0], self.shape.bf16, (m, self.shape.k), (config.tokens // config.pair, BLOCK)
            )
        params.x_map = found
        params.bias = None if bias is None else bias.data_ptr()
        params.out = out.data_ptr()
        params.m = m
        params.token_tiles = -(-m // config.tokens)
        params.band = min(params.token_tiles, _BAND)
        tiles = params.row_tiles * params.token_tiles
        clusters, params.streamed = clusters_and_streamed(self.shape, config, tiles, self.sms)
        grid = clusters * config.cluster
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if config.stream:
            try:
                # Sums of the tiles that CTAs end but do not begin, and by which flags they say so.
                sums = torch.empty(grid * config.blocks * 64 * config.tokens, dtype=torch.float32, device=self.device)
                ready = self.flags.take(stream)
                params.partial, params.flags = sums.data_ptr(), ready.data_ptr()
            except torch.cuda.OutOfMemoryError:
                params.streamed = 0
                _warn_of_sums(self.device)
        if torch.cuda.current_device() == self.device.index:
            self.function(grid, stream, params)
        else:
            with torch.cuda.device(self.device):
                self.function(grid, stream, params)
