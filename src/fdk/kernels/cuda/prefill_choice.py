"""Which tile configuration the prefill kernel takes: the fastest by a prediction, fitted to an H200.

`_candidates` names tiles and ways to cut k of which times are known; `_refined` gives each what else its launch was
measured to gain by: x shared in pairs, stages, a wide table, an unrolled loop; `_us` predicts its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from fdk.kernels.cuda.decode_config import (
    INT,
    MAX_RANGES,
    MAX_SHARED,
    TABLE,
    UINT_FLOAT,
    UINT_U8,
    Shape,
    clusters_at_once,
)
from fdk.kernels.cuda.prefill_config import Config, clusters_and_streamed, row_tiles

TOKENS = (*range(16, 129, 8), *range(144, 257, 16))
"""Tokens of a tile: all that the kernel can have, so that few of the last one's are not there (docs/findings.md)."""

EXACT_TOKENS = 32
"""Up to this many tokens scales of groups multiply float32 sums; above, weights, as cuBLAS on dense ones would."""

# Slices of k of a cluster, and whether tiles are cut into equal shares instead.
_CUTS = ((1, False), (2, False), (3, False), (4, False), (5, False), (1, True))


@dataclass(frozen=True)
class Times:
    """Microseconds of a launch's parts, by warpgroups; fitted to graph replays with cold weights of 4 bits, group 64.

    start      of a launch
    per_round  of a round of one unit per k group;  per_token: of a round, of each token of its tile
    meeting    of slices of k
    output     of a tile's outputs, of each token
    """

    start: float
    per_round: float
    per_token: float
    meeting: float
    output: float


@dataclass(frozen=True)
class Sharing:
    """Microseconds where tiles are cut along k: a wait for sums of others, and adding up those of each token."""

    wait: float
    per_token: float


# By (blocks, k groups): docs/findings.md.
_TIMES = {
    (2, 1): Times(0.5, 0.154, 0.0023, 1.99, 0.0),
    (1, 2): Times(0.42, 0.231, 0.00166, 1.75, 0.0122),
    (2, 2): Times(1.89, 0.405, 0.00121, 0.74, 0.0270),
    (3, 1): Times(0.5, 0.234, 0.00323, 2.26, 0.0),
    (4, 1): Times(1.68, 0.352, 0.00189, 1.70, 0.0159),
}
# The same where scales of groups multiply sums, and where the loop over units is unrolled besides.
_LATE_TIMES = {
    (2, 1): Times(0.99, 0.236, 0.00112, 2.01, 0.0098),
    (1, 2): Times(0.39, 0.288, 0.00092, 1.76, 0.0158),
    (2, 2): Times(1.37, 0.338, 0.00277, 1.45, 0.0219),
    (3, 1): Times(1.51, 0.265, 0.00221, 1.91, 0.0100),
    (4, 1): Times(2.02, 0.302, 0.00348, 1.92, 0.0079),
}
_LATE_UNROLLED_TIMES = {
    (2, 1): Times(0.99, 0.236, 0.00112, 2.01, 0.0098),
    (1, 2): Times(0.31, 0.231, 0.0015, 1.76, 0.0158),
    (2, 2): Times(1.37, 0.249, 0.0052, 0.75, 0.0219),
    (3, 1): Times(1.51, 0.223, 0.00156, 1.91, 0.0100),
    (4, 1): Times(2.52, 0.245, 0.0043, 1.92, 0.0079),
}
_WARPGROUPS = tuple(_TIMES)

# Where tiles are cut along k, by blocks; what each further share of a tile takes.
_SHARING, _FURTHER_SHARE = {2: Sharing(9.8, 0.0083), 3: Sharing(7.65, 0.014)}, 0.5
# What less such a wait is of tiles that each go to more than two, and more of three blocks that share no x in pairs;
# and how much longer rounds of cut tiles in pairs take above 4 bits (docs/findings.md).
_WAIT_SAVED, _WAIT_ALONE, _PAIRED_CUT_LONG = 4.0, 2.0, 1.04
# Whole tiles in pairs: what a place that the last wave leaves empty costs of one that it fills, since its power goes to
# the others; and how much longer those of some tokens take than the fit has it.
_EMPTY_PLACE, _PAIRED_TOKENS = 0.55, {192: 1.025, 208: 0.985, 224: 0.985}
# What each slice of k beyond two takes.
_FURTHER_SLICE = 0.35
# To these tokens of a tile the times are fitted; between them lie those of what was fitted, but for two cases: 72, and
# tiles of several waves that are too short to share x, whose power lowers the clock, 160 tokens among them.
_FITTED_TOKENS, _BETWEEN = frozenset((16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 224, 256)), 1.04
# How much longer two k groups of a block take by themselves, from so many tokens on: their power lowers the clock.
_ALONE, _ALONE_TOKENS = 1.04, 112
# What a unit of one warpgroup takes more: single look-ups, integers made by arithmetic, zero points, another group of
# scales on sums, of each token.
_SINGLE_LOOKUPS, _ARITHMETIC, _ZEROS, _GROUP, _GROUP_TOKEN = 0.065, 0.025, 0.02, 0.015, 0.0005
# What one of 3 bits takes more in an unrolled loop with scales on sums, and of 2 bits and 16 tokens, by blocks.
_THREE_BITS, _TWO_BITS = 0.006, {2: -0.004, 4: -0.0165}
# What a unit of bit planes takes more for each of them beyond 2.5; with scales on sums in an unrolled loop, beyond 3,
# and there with four blocks.
_PLANE, _PLANE_UNROLLED, _PLANES_OF_FOUR_BLOCKS = 0.012, 0.006, -0.010
# What a round of two blocks and two k groups of planes takes less of up to 16 tokens with 16 stages, and how much of
# that is gone with each plane beyond four.
_SLICES_SAVED, _SAVED_PLANE = 0.05, 0.0125
# What an unrolled loop saves of a round: by most tokens of a tile, and at least above 4 bits; nothing up to 4 bits
# where tiles are cut along k.
_UNROLLED, _UNROLLED_LONG = {64: 0.0, 128: 0.02, 192: 0.04, 256: 0.0}, 0.03
# Bytes and operations that no product exceeded, on so many multiprocessors, and the time below which none was measured.
_BYTES_PER_US, _OPERATIONS_PER_US, _SMS, _LEAST_US = 4.1e6, 8e8, 132, 5.0

_MOST_STAGES = 12

# Tokens for which registers last, by warpgroups. Two k groups fetch x twice as fast, too fast from so many tokens on.
_MOST_TOKENS, _MOST_TOKENS_OF_K_GROUPS = {2: 256, 3: 192, 4: 64}, 128
# Unrolled loops of slices whose scales multiply sums, by (blocks, k groups): stages, and most planes that do not spill;
# most planes for which 16 stages pay in two blocks of two slices of k, by most tokens.
_SLICES_STAGES = {(1, 2): (16, 8), (2, 2): (16, 8), (4, 1): (8,)}
_SLICES_PLANES = {(1, 2): 8, (2, 2): 8, (4, 1): 4}
_SLICES_PLANES_OF_16_STAGES = {16: 5, 32: 3}
# More than two slices have been measured from so many rows on (fewer are the decode kernel's), where they fill so much
# of the multiprocessors, up to so many blocks of a CTA.
_SLICES_ROWS, _SLICES_FILL, _SLICES_BLOCKS = 17, 0.75, {3: 2, 4: 3, 5: 2}
# CTAs share x in pairs from so many tokens a tile on, because the multiprocessors then draw less power; if so much more
# of a weight's rows as the last pair may lack costs less than that.
_PAIR_TOKENS, _PAIR_ROWS = 192, 1.02
# Tiles are cut along k while x stays in the second-level cache, because they read it at different places; or in pairs,
# where few are cut: from so many waves on. Fewer tokens have not been measured.
_STREAM_X_BYTES, _STREAM_WAVES, _STREAM_TOKENS = 40e6, 8, 96
# In pairs, sums of cut tiles come through the ring while x is not larger.
_FETCH_X_BYTES = 20e6


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


@dataclass(frozen=True)
class Product:
    """m rows of x by a weight of so many blocks of 64 rows for each of its tables, on so many multiprocessors."""

    shape: Shape
    m: int
    blocks: tuple[int, ...]
    sms: int

    @property
    def rounds(self) -> bool:
        """Whether scales of groups are multiplied into the weights."""
        return self.m > EXACT_TOKENS and self.shape.groups > 1

    @property
    def x_bytes(self) -> int:
        return 2 * self.m * self.shape.k

    def tiles(self, config: Config) -> int:
        """Tiles of a cluster over all rows and tokens."""
        return row_tiles(self.blocks, config) * -(-self.m // config.tokens)

    def waves(self, config: Config) -> int:
        """How often the multiprocessors are filled with tiles."""
        return -(-self.tiles(config) // clusters_at_once(self.sms, config.cluster))


@lru_cache(maxsize=64)
def _tiles(shape: Shape, rounds: bool) -> tuple[Config, ...]:
    """Tiles and ways to cut k for which registers last; their stages and what else they gain by are left open."""
    found = []
    for tokens, (split, stream), (blocks, k_groups) in itertools.product(TOKENS, _CUTS, _WARPGROUPS):
        # Half of a unit at a time needs fewer registers; planes of nested weights are gathered all at once.
        parts = 2 if blocks == 3 and tokens > 160 else 1
        turns = blocks * k_groups == 4 and tokens == 64 and not rounds
        config = Config(tokens, blocks, 2, 1, split, k_groups, turns, rounds, parts, stream=stream)
        if _fits_registers(shape, config):
            found.append(config)
    return tuple(found)


def _candidates(product: Product) -> Iterator[Config]:
    """Those whose times are known for the product."""
    for config in _tiles(product.shape, product.rounds):
        if _fitted(product, config) and _may_cut(product, config):
            yield config


def _fits_registers(shape: Shape, config: Config) -> bool:
    """Whether registers last for the sums of its tokens."""
    most = _MOST_TOKENS[config.warpgroups]
    if config.k_groups > 1:
        most = min(most, _MOST_TOKENS_OF_K_GROUPS)
    if shape.nested and config.blocks == 3:
        most = min(most, 128)
    return config.tokens <= most


def _fitted(product: Product, config: Config) -> bool:
    """Whether the times are fitted to such tiles."""
    if config.late(product.shape):
        return product.m <= config.tokens <= EXACT_TOKENS
    if config.tokens == 56 and product.shape.bits > 4 and not product.shape.nested:
        return False  # took longer than 64: 1.04
    # Of few tokens of two and three blocks they are those of one scale per row; with groups, four warpgroups were
    # measured.
    few = config.rounds and config.tokens <= 64 and config.k_groups == 1 and config.blocks < 4
    return not few or (config.blocks, config.split) == (3, 4)


def _may_cut(product: Product, config: Config) -> bool:
    """Whether its cuts along k were measured not to lose for such a product."""
    shape, slices = product.shape, config.split * config.k_groups
    if config.split > product.sms:
        return False  # no cluster would ever start
    if 2 * slices > shape.units:
        return False
    if slices > 1 and product.waves(config) > 1:
        return False  # such tiles are not taken in turn: each wave would start anew
    if config.split > 2:
        # Halves of a unit lost by 4 % in four and five slices; planes spill in places.
        if config.blocks > _SLICES_BLOCKS[config.split] or config.parts > 1 or shape.nested:
            return False
        fill = product.tiles(config) * config.split
        return product.m >= _SLICES_ROWS and fill >= _SLICES_FILL * product.sms
    if config.stream:
        if config.late(shape) or config.k_groups > 1 or config.blocks not in _SHARING:
            return False
        cached = product.x_bytes <= _STREAM_X_BYTES or product.waves(config) >= _STREAM_WAVES
        return cached and config.tokens >= _STREAM_TOKENS and _halves(config)
    return True


def _refined(product: Product, config: Config) -> Config | None:
    """A candidate with what else its launch gains by, or None if shared memory has no room for it."""
    shape = product.shape
    tiles, waves = product.tiles(config), product.waves(config)
    paired = replace(config, pair=2)
    alike = 2 * row_tiles(product.blocks, paired) <= _PAIR_ROWS * row_tiles(product.blocks, config)
    if product.sms > 1 and alike and _pairs(shape, config, waves):
        config = paired
    plain = _fill(shape, config)
    wide = _fill(shape, replace(config, wide=True)) if _wide(shape, config) else None
    # A wide table that leaves fewer than four stages costs 3 to 4 %, more than it saves.
    filled = wide if wide and (plain is None or wide.stages >= min(plain.stages, 4)) else plain
    if filled is None:
        return None
    filled = _unrolled(shape, filled)
    fetches = tiles * filled.pair >= product.sms and _fetches_sums(product, filled)
    return replace(filled, fetch_sums=fetches)


def _halves(config: Config) -> bool:
    """Whether two CTAs can fetch half of a tile's tokens each: they come in eights."""
    return config.tokens % 16 == 0


def _pairs(shape: Shape, config: Config, waves: int) -> bool:
    """Whether CTAs share x in pairs: where that was measured to win (docs/findings.md), each behind its own calls."""
    if config.split * config.k_groups > 1 or not _halves(config):
        return False
    few = 4 if shape.bits < 3 or shape.nested else 2
    return config.stream or (waves >= few and config.tokens >= _PAIR_TOKENS)


@lru_cache(maxsize=8192)
def _fill(shape: Shape, config: Config) -> Config | None:
    """`config` with as many stages as shared memory allows and pay; None if it has no room for two per k group."""
    for stages in range(_MOST_STAGES, 2 * config.k_groups - 1, -1):
        filled = replace(config, stages=stages)
        if filled.shared_bytes(shape) <= MAX_SHARED:
            return filled
    return None


def _wide(shape: Shape, config: Config) -> bool:
    """Whether the table has rows 256 bytes apart: measured with 4 bits; 2 and 8 could have them too."""
    return config.rounds and shape.bits == 4 and not shape.nested


def _fetches_sums(product: Product, config: Config) -> bool:
    """Whether sums come through the ring: measured with 2, 4 and 8 bits, beside an x that leaves room in the cache.

    Tiles that are cut more than once took longer so.
    """
    shape = product.shape
    if not config.stream or shape.bits not in (2, 4, 8) or shape.kind not in (TABLE, INT):
        return False
    if config.pair > 1 and product.x_bytes > _FETCH_X_BYTES:
        return False
    per_stage = config.tokens // (16 * config.blocks)  # token tiles, as in csrc/prefill_shape.cuh
    return not config.unrolled or -(-config.tokens // 8 // per_stage) % config.stages == 0


def _unrolled(shape: Shape, config: Config) -> Config:
    """`config` with its loop over units unrolled if that was measured to win (docs/findings.md), else as it is.

    Where a warpgroup's own look-ups take longer than its turn of the tensor cores, it does: up to 224 tokens a tile,
    and above 4 bits. A ring of less than four stages a k group costs more than all that.
    """
    if config.late(shape):
        return _unrolled_late(shape, config)
    if config.rounds and config.split > 2 and config.blocks == 3:
        return _unrolled_slices(shape, config)
    # Registers of three and four blocks last for eight units in a row of the widths that lie in whole words.
    light = shape.bits in (1, 2, 4) and shape.kind in (TABLE, INT)
    few = (
        32 < config.tokens <= 64
        and (config.blocks < 3 or light)
        and not (shape.nested and shape.bits == 8 and shape.subs > 1)
    )
    many = config.tokens >= 96 and config.warpgroups == 2 and (shape.subs == 1 or config.k_groups == 2)
    many &= config.tokens < 256 or config.stream or (shape.bits > 4 and not shape.nested)
    if not few and not many:
        return config
    for stages, wide in ((8, True), (6, True), (4, True), (8, False), (6, False), (4, False)):
        measured = (stages == 8 and not wide) if few else stages >= 4 * config.k_groups and wide <= config.wide
        unrolled = replace(config, wide=wide, stages=stages, turns=False, unrolled=True)
        if measured and _whole_rounds(shape, unrolled) and unrolled.shared_bytes(shape) <= MAX_SHARED:
            return replace(unrolled, codes_ahead=_codes_ahead(shape, unrolled))
    return config


def _unrolled_late(shape: Shape, config: Config) -> Config:
    """The same where scales multiply sums: few tokens, where more stages gain most and a wide table comes next."""
    # Other widths spill in places; where units share a scale, the compiler waits between their products.
    few_bits = shape.kind == TABLE and shape.bits in (2, 3)
    arrangement = config.blocks, config.k_groups
    # Two bits of sixteen tokens have a wide table besides, by which four blocks, too, are faster.
    two_bits = shape.bits == 2 and config.tokens == 16 and shape.n * shape.k < 1 << 28
    two_bits &= arrangement in ((2, 2), (4, 1))
    stages_measured: tuple[int, ...]
    if shape.nested:
        stages_measured = _slices_stages(shape, config)
    elif shape.kind in (TABLE, INT) and shape.bits in (1, 4, 8):
        stages_measured = (16, 12, 8)
    elif few_bits and ((arrangement in ((1, 2), (2, 2)) and shape.n * shape.k <= 1 << 26) or two_bits):
        stages_measured = (16,)
    elif few_bits and arrangement == (4, 1):
        stages_measured = (8,)
    else:
        return config
    if shape.subs > 1 if shape.nested else shape.group != 64:
        return config
    wide_pays = shape.bits == 4 and not shape.nested
    two_or_eight = shape.bits == 2 or (shape.bits == 8 and config.blocks < 4)
    wide_pays |= config.tokens == 16 and shape.kind == TABLE and two_or_eight
    # Twelve stages beside a wide table won over twelve beside another by 9 % (22528 x 3072), sixteen over eight by 8 %.
    rings = ((16, True), (12, True), (16, False), (12, False), (8, True), (8, False))
    # Of 8 bits a wide table is worth more than stages.
    for stages, wide in sorted(rings, key=lambda ring: shape.bits == 8 and not ring[1]):
        measured = stages in stages_measured and (wide_pays or not wide)
        unrolled = replace(config, stages=stages, wide=wide, unrolled=True)
        if measured and _whole_rounds(shape, unrolled) and unrolled.shared_bytes(shape) <= MAX_SHARED:
            return unrolled
    return config


def _slices_stages(shape: Shape, config: Config) -> tuple[int, ...]:
    """Stages that unrolled loops of planes were measured to gain by, where scales multiply sums; others spill."""
    arrangement = config.blocks, config.k_groups
    if shape.bits > _SLICES_PLANES.get(arrangement, 0):
        return ()
    stages = _SLICES_STAGES[arrangement]
    if (*arrangement, config.split) != (2, 2, 2):
        return stages
    if shape.bits == 8:
        return ()
    most = next(planes for tokens, planes in _SLICES_PLANES_OF_16_STAGES.items() if config.tokens <= tokens)
    return stages if shape.bits <= most else stages[1:]


def _unrolled_slices(shape: Shape, config: Config) -> Config:
    """The same for more than two slices of three blocks: up to 128 tokens, of the widths that lie in whole words."""
    if config.tokens > 128 or shape.bits not in (1, 2, 4, 8) or shape.kind not in (TABLE, INT) or shape.subs > 1:
        return config
    for stages in (8, 6, 4):
        unrolled = replace(config, stages=stages, unrolled=True)
        if unrolled.shared_bytes(shape) <= MAX_SHARED:
            return unrolled
    return config


def _whole_rounds(shape: Shape, config: Config) -> bool:
    """Whether a loop can be unrolled over the stages: runs of units are whole rounds of it, or more than two slices."""
    whole = config.split > 2 or shape.units % (config.stages * config.split) == 0
    return config.stages % (2 * config.k_groups) == 0 and whole


def _codes_ahead(shape: Shape, config: Config) -> bool:
    """Whether codes leave the ring a unit earlier: measured with 2 and 4 bits, where one warpgroup has a block.

    Tables of 8 bits gain where CTAs share x.
    """
    if shape.kind == TABLE and shape.bits == 8:
        return config.pair == 2 and shape.subs == config.k_groups == config.parts == 1
    measured = (shape.bits in (2, 4) and shape.kind in (TABLE, INT)) or (shape.bits == 4 and shape.kind == UINT_U8)
    return measured and shape.subs == config.k_groups == config.parts == 1 and not config.stream and config.split <= 2


def _us(product: Product, config: Config) -> float:
    """Predicted time of a launch: waves of tiles, each some rounds of a unit per k group."""
    shape, key = product.shape, (config.blocks, config.k_groups)
    if config.late(shape):
        times = (_LATE_UNROLLED_TIMES if config.unrolled else _LATE_TIMES)[key]
    else:
        times = _TIMES[key]
    if config.stream:
        waves, meeting = _shared_waves(product, config)
        outputs = waves + 1
    else:
        outputs = product.waves(config)
        waves = _whole_waves(product, config)
        meeting = times.meeting + _FURTHER_SLICE * max(0, config.split - 2) if config.split > 1 else 0.0
    rounds = -(-shape.units // (config.split * config.k_groups))
    return _longer(config, waves) * (
        times.start
        + waves * rounds * _round_us(shape, config, times)
        + outputs * times.output * config.tokens
        + meeting
    )


def _longer(config: Config, waves: float) -> float:
    """How much longer a tile of so many tokens takes than the fit to others has it."""
    if config.pair > 1:
        return 1.0 if config.stream else _PAIRED_TOKENS.get(config.tokens, 1.0)
    between = config.tokens not in _FITTED_TOKENS and config.tokens < _PAIR_TOKENS and config.blocks < 3
    return _BETWEEN if between and (config.tokens == 72 or waves > 1) else 1.0


def _whole_waves(product: Product, config: Config) -> float:
    """Waves of whole tiles: as many as are begun, but of a last one in pairs less than one if it has empty places."""
    begun = product.waves(config)
    if config.pair == 1:
        return begun
    filled = product.tiles(config) / clusters_at_once(product.sms, config.cluster)
    return filled + _EMPTY_PLACE * (begun - filled)


def _shared_waves(product: Product, config: Config) -> tuple[float, float]:
    """Waves of tiles that are cut along k into equal shares, not whole ones, and how long sums take to meet."""
    tiles = product.tiles(config)
    clusters, streamed = clusters_and_streamed(product.shape, config, tiles, product.sms)
    # Every cluster leaves sums to another one; it adds those of one share, or of all that finish its tile.
    further = max(0.0, clusters / streamed - 1)
    sharing = _SHARING[config.blocks]
    wait = sharing.wait - _WAIT_SAVED * (further > 1) + _WAIT_ALONE * (config.blocks == 3 and config.pair == 1)
    meeting = wait + sharing.per_token * config.tokens * (1 + further) + _FURTHER_SHARE * further
    return (tiles - streamed) // clusters + streamed / clusters, meeting


def _round_us(shape: Shape, config: Config, times: Times) -> float:
    """Time of one unit per k group."""
    late = config.late(shape)
    more = _unit_us(shape, config) * config.blocks * config.k_groups
    # Planes take so long to gather that up to 32 tokens make no difference behind them.
    tokens = max(config.tokens, 32) if shape.nested and late and config.unrolled else config.tokens
    a_round = times.per_round + times.per_token * tokens + more
    if shape.nested and config.tokens <= 16 <= config.stages and (config.blocks, config.k_groups) == (2, 2):
        a_round -= max(0.0, _SLICES_SAVED - _SAVED_PLANE * max(0, shape.bits - 4))
    if config.unrolled and not late and (shape.bits > 4 or not config.stream):
        saved = next(saved for most, saved in _UNROLLED.items() if config.tokens <= most)
        long = shape.bits > 4 and not shape.nested and config.tokens > 64
        a_round -= max(saved, _UNROLLED_LONG) if long else saved
    if config.stream and config.pair > 1 and shape.bits > 4:
        a_round *= _PAIRED_CUT_LONG
    alone = (config.blocks, config.k_groups) == (1, 2) and not late and config.tokens >= _ALONE_TOKENS
    return a_round * _ALONE if alone else a_round


def _unit_us(shape: Shape, config: Config) -> float:
    """What a unit of one warpgroup takes more, or less, than one of 4 bits and groups of 64."""
    late = config.late(shape)
    unrolled_late = late and config.unrolled
    more = 0.0
    if shape.nested:
        more = _PLANE * max(0, shape.bits - 2.5)
        if unrolled_late:
            more = _PLANE_UNROLLED * max(0, shape.bits - 3) + _PLANES_OF_FOUR_BLOCKS * (config.blocks == 4)
    elif shape.bits > 4:
        # Three warpgroups wait for each other's look-ups.
        unrolled_crowd = 1.03 if config.split <= 2 else 1.15
        crowded = (unrolled_crowd if unrolled_late else 1.3) if config.warpgroups > 2 else 1
        crowded = 0.5 if unrolled_late and (config.blocks, config.k_groups, config.split) == (1, 2, 2) else crowded
        more = _SINGLE_LOOKUPS * crowded if shape.kind == TABLE else _ARITHMETIC
    elif unrolled_late and shape.bits == 3:
        more = _THREE_BITS
    elif unrolled_late and shape.bits == 2 and config.tokens == 16:
        more = _TWO_BITS.get(config.blocks, 0.0)
    more += _ZEROS * (shape.kind == UINT_U8)
    if late:
        more += (shape.subs - 1) * (_GROUP + _GROUP_TOKEN * config.tokens)
    return more


def _least_us(shape: Shape, m: int, sms: int) -> float:
    """Time of bytes or operations, which no configuration undercuts."""
    moved = shape.n * shape.k * (shape.bits / 8 + 2 / shape.group) + 2 * m * (shape.n + shape.k)
    floor = max(moved / _BYTES_PER_US, 2 * m * shape.n * shape.k / _OPERATIONS_PER_US)
    return max(1.0 + floor * _SMS / sms, _LEAST_US)


@lru_cache(maxsize=4096)
def _best(shape: Shape, m: int, blocks: tuple[int, ...], sms: int) -> tuple[float, Config] | None:
    """Predicted time and configuration of the fastest one, or None."""
    if m < 1 or unsupported(shape, blocks):
        return None
    product = Product(shape, m, blocks, sms)
    refined = (_refined(product, config) for config in _candidates(product))
    # Of equally fast ones the first, which has the fewest tokens.
    found = min(
        ((_us(product, config), config) for config in refined if config), key=lambda pair: pair[0], default=None
    )
    return found and (found[0], _with_fewer_tokens(product, found[1]))


def _with_fewer_tokens(product: Product, config: Config) -> Config:
    """The same tile with as many tokens as there are, which does less of everything; how much less has no fit."""
    if not product.rounds or config.stream or not product.m <= 64 < config.tokens:
        return config
    fewer = replace(config, tokens=next(tokens for tokens in TOKENS if tokens >= product.m), wide=False)
    filled = _fill(product.shape, fewer)
    return config if filled is None else _unrolled(product.shape, filled)


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
