"""The decode kernel (csrc/decode.cuh): its tile configuration, launch arithmetic and launcher, for up to 64 tokens."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from fdk.kernels.cuda import driver, jit
from fdk.packing.bits import pack_codes
from fdk.packing.fragments import BLOCK, block_counts, units
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight

MAX_TOKENS = 64
MAX_RANGES = 16

MAX_SHARED = 227 * 1024
"""Bytes of shared memory that a CTA may use on compute capability 9.0 and 10.0."""

# Of what a multiprocessor has, each CTA costs 1 KB extra.
_SHARED_PER_CTA_EXTRA = 1024


def max_shared(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a CTA may use; CUDA C++ programming guide, table of compute capabilities."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 99 * 1024 if capability[0] == 8 or capability >= (12, 0) else MAX_SHARED


def shared_for_places(places: int, capability: tuple[int, int]) -> int:
    """Bytes of shared memory with which at most so many CTAs fit on a multiprocessor."""
    return (max_shared(capability) + _SHARED_PER_CTA_EXTRA) // (places + 1)


TABLE, INT, UINT_U8, UINT_FLOAT, ROUNDED, CUT, SPARSE_INT, SPARSE_TABLE = range(8)


OCTET_TABLE_BYTES = 256 * 128
"""Bytes of the table of eight one-bit codes (csrc/dequantise.cuh)."""


def table_aligned(bits: int, kind: int) -> int:
    """Bytes of the table in shared memory that starts at a multiple of them (csrc/dequantise.cuh, csrc/sparse.cuh)."""
    if kind in (SPARSE_INT, SPARSE_TABLE):
        return 256 * 128
    if bits == 1 or kind in (ROUNDED, CUT):
        return 0
    return 128 << bits * (4 if bits == 2 else 2 if bits <= 4 else 1)


def table_bytes(bits: int, kind: int) -> int:
    """Bytes of that table and of what lies behind it."""
    return table_aligned(bits, kind) + (32 * 128 if kind == SPARSE_TABLE else 0)


@dataclass(frozen=True)
class Shape:
    """What is fixed at compile time about a weight; `group` is k for one scale per row.

    Nested weights (kinds ROUNDED and CUT): `bits` planes of their codes are read, for a slice of `served` bits.
    16:32 sparse weights take 3 bits: the mask and, for half of the weights, codes of 4 bits.
    """

    n: int
    k: int
    bits: int
    group: int
    bf16: bool
    kind: int
    served: int = 0

    @property
    def nested(self) -> bool:
        return self.kind in (ROUNDED, CUT)

    @property
    def sparse(self) -> bool:
        return self.kind in (SPARSE_INT, SPARSE_TABLE)

    @property
    def units(self) -> int:
        return units(self.k)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def subs(self) -> int:
        """Scale changes inside a unit of 64 columns, at most."""
        if self.group % 64 == 0 or self.groups == 1:
            return 1
        return 2 if self.group % 32 == 0 else 4

    @property
    def zeros(self) -> bool:
        return self.kind in (UINT_U8, UINT_FLOAT)

    @property
    def lean(self) -> bool:
        """Whether a unit has one scale per row and no zeros, so that 16 warps have registers enough for many tokens."""
        return self.subs == 1 and not self.zeros

    @property
    def unit_groups(self) -> int:
        """Groups that a unit touches, at most."""
        if self.subs == 1:
            return 1
        whole = self.group < 64 and 64 % self.group == 0
        return min(self.groups, 64 // self.group if whole else (self.group + 47) // self.group + 1)

    @property
    def table_bytes(self) -> int:
        """Bytes of the replicated table in shared memory."""
        return table_bytes(self.bits, self.kind)

    @property
    def allows_digits(self) -> bool:
        """Whether integer products can serve it: values affine in the code, codes that a mask turns into bytes."""
        affine = self.kind in (INT, UINT_U8, UINT_FLOAT) or (self.kind == TABLE and self.bits == 1)
        bytes_of_codes = self.nested or self.kind == SPARSE_INT or (self.bits in (1, 2, 4, 8) and affine)
        return bytes_of_codes and self.subs == 1

    @property
    def allows_indices(self) -> bool:
        """Whether sparse products can serve it: codes of one or two bits, one scale of a unit for each row."""
        return self.bits <= 2 and not self.nested and self.subs == 1

    def stage_groups(self, stage_units: int) -> int:
        """Groups that a stage of that many units holds."""
        return self.unit_groups if stage_units == 1 else max(1, stage_units * 64 // self.group)

    @property
    def group_bytes(self) -> int:
        """Bytes of the scales and zeros of a group of 64 rows."""
        return 128 + {UINT_U8: 64, UINT_FLOAT: 128}.get(self.kind, 0)

    def stage_bytes(self, stage_units: int) -> int:
        """Bytes of a stage in the ring: codes, scales, zeros."""
        return stage_units * self.bits * 512 + self.stage_groups(stage_units) * self.group_bytes

    def allows_stage_units(self, stage_units: int, slices: int) -> bool:
        """Whether k splits into that many slices of whole stages of whole groups."""
        columns = 64 * stage_units
        aligned = self.groups == 1 or columns % self.group == 0 or self.group % columns == 0
        return stage_units == 1 or (self.units % (slices * stage_units) == 0 and aligned)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums of a product, besides the plain output; see csrc/epilogue.cuh.

    squares   partial sums of squares per token by which the product is normalised, 0 for none
    gated     rows are those of a gate and of what it multiplies: half as many outputs, silu(gate) * up
    tables    tables of a gated product: 2 if gate and up have their own
    residual  the product is added to a residual, whose next norm it prepares
    chained   none of these, for a product between others of a chain
    """

    squares: int = 0
    gated: bool = False
    tables: int = 1
    residual: bool = False
    chained: bool = False


PLAIN = Epilogue()


@dataclass(frozen=True)
class Config:
    """Tile configuration of the decode kernel.

    tokens     tokens that the compiled kernel serves
    cluster    CTAs that split k and add up through distributed shared memory
    k_warps    warps of a CTA that split its share of k;  row_warps: blocks of 64 rows that it takes at once
    stages     stages of a warp's ring;  stage_units: units of each
    blocks     blocks of rows per cluster
    batch      row steps whose partial sums are kept before they are added up: 1, or all of them
    min_ctas   CTAs per multiprocessor that registers are limited for
    alone      ask for so much shared memory that a multiprocessor takes one CTA of the launch
    late       let the next launch start once the activations are here, not at once
    digits     integer products (csrc/digits.cuh) instead of bf16 or fp16 ones
    paired     of those: two row tiles share an accumulator, and pairs of digits are added up before scaling
    uniform    tell the compiler that a warp's lanes agree on what they copy: fewer instructions a copy
    phases     parts of the CTA's share of k whose activations are in shared memory one after the other
    x_chunks   pieces that a warp's slice of a phase's activations arrives in, so that it starts with the first
    epilogue   what becomes of the sums
    bulk         fill rings by bulk copies, else by cp.async as before Hopper
    scales_once  fetch scales and zeros of a warp's slice of k in one piece each, not with each stage
    x_sums       have warps add up activations for zero points and one bit, not find their sums in shared memory

    Not chosen so far (docs/findings.md, `python -m fdk.bench.variants --list`):

    hold         clocks for which CTAs without work stay, so that each multiprocessor has a place for the next launch
    wide         rows of the table 256 bytes apart, for cheaper addresses: 2, 4 and 8 bits
    octets       look up one bit eight codes at a time, which needs no sums of activations
    """

    tokens: int
    cluster: int
    k_warps: int
    row_warps: int
    stages: int
    stage_units: int
    blocks: int
    batch: int
    min_ctas: int
    late: bool = False
    digits: bool = False
    phases: int = 1
    x_chunks: int = 1
    epilogue: Epilogue = PLAIN
    alone: bool = False
    bulk: bool = True
    scales_once: bool = False
    x_sums: bool = False
    wide: bool = False
    octets: bool = False
    uniform: bool = False
    paired: bool = False
    hold: int = 0
    indices: bool = False

    @property
    def squares_per_block(self) -> int:
        """Partial sums of squares that a `residual` product leaves for 64 rows and each token."""
        return max(2, self.cluster)

    @property
    def warps(self) -> int:
        return self.k_warps * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def steps(self) -> int:
        """Blocks that a row warp works through."""
        return -(-self.blocks // self.row_warps)

    def allows_scales_once(self, shape: Shape) -> bool:
        """Whether each warp has one slice of k, of whole groups or inside one."""
        slices = self.cluster * self.k_warps
        columns = 64 * (shape.units // slices)
        aligned = shape.groups == 1 or columns % shape.group == 0 or shape.group % columns == 0
        single = self.steps == 1 and self.phases == 1 and shape.units % slices == 0
        return single and aligned and shape.subs == 1

    def shared_bytes(self, shape: Shape, hopper: bool = True) -> int:
        """Shared memory of a CTA; the host twin of `Smem` in csrc/decode.cuh, which asserts that they agree."""
        cta_units = -(-shape.units // (self.cluster * self.phases))
        octets = OCTET_TABLE_BYTES * self.octets
        no_table = (self.digits and not shape.sparse) or self.indices
        table = 0 if no_table else octets or shape.table_bytes << self.wide
        aligned = octets or table_aligned(shape.bits, shape.kind) << self.wide
        before = 0 if no_table or not hopper else max(0, aligned - 1024)
        table *= self.epilogue.tables
        buffers = 2 if self.batch == 1 and self.steps > 1 else 1
        slot = BLOCK * self.tokens * 4
        ring = self.stages * shape.stage_bytes(self.stage_units)
        if self.scales_once:
            columns = 64 * (shape.units // (self.cluster * self.k_warps))
            groups = max(1, columns // shape.group) - self.stages * shape.stage_groups(self.stage_units)
            ring += groups * shape.group_bytes
        sums = 0 if self.steps == 1 and ring >= slot else buffers * self.batch * self.warps * slot
        sums += 0 if self.cluster == 1 else buffers * self.batch * self.row_warps * slot
        one_bit_sums = shape.bits == 1 and self.tokens < 16 and not self.octets
        summed = self.digits or (not (self.x_sums or self.indices) and (shape.zeros or one_bit_sums))
        x_buffers = 2 if self.phases > 1 and hopper and shape.k % 64 == 0 and not summed else 1
        row = cta_units * 128 + (16 if self.tokens >= 8 else 32)
        head = self.tokens * (cta_units * 256 if self.digits else x_buffers * row)
        head += 256 * self.stage_units - 240 if self.digits and self.paired and self.tokens == 1 else 0
        head = max(head, sums) if self.steps == 1 and self.tokens >= 8 else head + sums
        if self.digits:
            head += (
                -(-cta_units * self.tokens * 4 // 16) * 16
                + -(-self.tokens * (self.warps + self.k_warps) * 4 // 16) * 16
            )
        elif summed:
            columns = 1 if self.tokens == 1 else -(-self.tokens // 8) * 8
            kinds = 3 if shape.bits == 1 and (self.tokens < 16 or (shape.kind != TABLE and shape.kind != INT)) else 1
            head += -(-cta_units * shape.subs * kinds * columns * 4 // 16) * 16
        head += -(-(self.warps * self.stages * 8 + 8 + x_buffers * self.k_warps * self.x_chunks * 8) // 16) * 16
        if self.epilogue.squares:
            head += -(-self.tokens * 4 // 16) * 16
        low = head if head <= before else 0
        low_rings = min(self.warps, (before - low) // ring)
        return before + table + (0 if low else head) + (self.warps - low_rings) * ring

    def defines(self, shape: Shape, hopper: bool = True) -> dict[str, int]:
        """Macros that the kernel is compiled with."""
        return {
            "FDK_N": shape.n,
            "FDK_K": shape.k,
            "FDK_BITS": shape.bits,
            "FDK_GROUP": shape.group,
            "FDK_BF16": int(shape.bf16),
            "FDK_KIND": shape.kind,
            "FDK_SLICE": shape.served,
            "FDK_M": self.tokens,
            "FDK_CLUSTER": self.cluster,
            "FDK_K_WARPS": self.k_warps,
            "FDK_ROW_WARPS": self.row_warps,
            "FDK_STAGES": self.stages,
            "FDK_HOLD": self.hold,
            "FDK_STAGE_UNITS": self.stage_units,
            "FDK_STEPS": self.steps,
            "FDK_BATCH": self.batch,
            "FDK_MIN_CTAS": self.min_ctas,
            "FDK_LATE": int(self.late),
            "FDK_DIGITS": int(self.digits),
            "FDK_PHASES": self.phases,
            "FDK_SQUARES": self.epilogue.squares,
            "FDK_GATED": int(self.epilogue.gated),
            "FDK_TABLES": self.epilogue.tables,
            "FDK_RESIDUAL": int(self.epilogue.residual),
            "FDK_X_CHUNKS": self.x_chunks,
            "FDK_BULK": int(self.bulk),
            "FDK_X_SUMS": int(self.x_sums),
            "FDK_WIDE": int(self.wide),
            "FDK_OCTETS": int(self.octets),
            "FDK_UNIFORM": int(self.uniform),
            "FDK_INDICES": int(self.indices),
            "FDK_PAIRED": int(self.digits and self.paired),
            "FDK_SCALES_ONCE": int(self.scales_once),
            "FDK_SHARED_BYTES": self.shared_bytes(shape, hopper),
        }


def squares_left(n: int, config: Config) -> int:
    """Partial sums of squares that a `residual` product of n rows leaves for each token."""
    return -(-n // BLOCK) * config.squares_per_block


def shape_of(geometry: Geometry, zeros_dtype: torch.dtype | None) -> Shape:
    """The compile-time shape of a weight whose zeros, if any, have `zeros_dtype`."""
    fmt = geometry.format
    if fmt.sparse:
        kind = SPARSE_TABLE if fmt.is_table else SPARSE_INT
    elif fmt.is_nested:
        kind = CUT if fmt.kind.cuts else ROUNDED
    elif fmt.is_table:
        kind = TABLE
    elif not fmt.has_zeros:
        kind = INT
    else:
        kind = UINT_U8 if zeros_dtype == torch.uint8 else UINT_FLOAT
    bf16 = geometry.dtype == torch.bfloat16
    bits = 1 + fmt.bits // 2 if fmt.sparse else fmt.read_bits
    return Shape(geometry.n, geometry.k, bits, geometry.group_size, bf16, kind, fmt.served or 0)


def token_tile(m: int) -> int:
    """Tokens that the kernel serving m is compiled for."""
    return next(tile for tile in (1, 2, 4, 8, 16, 32, 64) if m <= tile)


# cuOccupancyMaxActiveClusters on an H200 (132 multiprocessors in GPCs of 16 and 18), 2026-11-20.
_CLUSTERS_OF_132 = {1: 132, 2: 66, 4: 30, 8: 15}


def clusters_at_once(sms: int, cluster: int) -> int:
    """Clusters that run at once with one CTA per multiprocessor; larger ones leave over what does not fill a GPC."""
    return max(1, _CLUSTERS_OF_132[cluster] * sms // 132)


# Preference among cluster sizes at equal balance: sums travel further in larger ones, activations less far.
_CLUSTER_WORTH_FEW = {1: 1.0, 2: 0.97, 4: 0.5, 8: 0.45}
_CLUSTER_WORTH_MANY = {1: 0.9, 2: 1.0, 4: 0.66, 8: 0.55}


def _bytes_pay(shape: Shape, tokens: int, blocks: int) -> bool:
    """Whether integer products of slices and of sparse integers, whose bytes are made from planes or masks, pay.

    Measured on an H200, 2026-11-22, at 4096^2 to 16384^2 and 20480 x 5120: docs/findings.md.
    """
    if tokens > 1 or not shape.allows_digits:
        return False
    # Digits cost what bytes save on the planes of 4096^2; more than two blocks a CTA were not measured.
    return shape.sparse or (shape.nested and shape.n * shape.k >= 1 << 26 and blocks <= 2)


def _warps(shape: Shape, config: Config, cta_units: int) -> tuple[int, int]:
    """(k_warps, row_warps): few tokens split k over warps, many give each block of rows warps of its own."""
    tokens, blocks = config.tokens, config.blocks
    if tokens <= 4:
        row_warps = 1 if blocks == 1 else 2 if blocks < 4 else 4
        warps = 8
        if shape.nested and config.digits:
            warps, row_warps = 16, 1
        elif shape.nested:
            # Codes that are computed hide no latency: more warps only keep more of few planes on their way.
            warps = 16 if tokens == 1 and shape.bits <= 4 and blocks == 1 and cta_units > 32 else 8
        elif (
            tokens == shape.subs == 1 and cta_units * blocks > 32 and (shape.bits >= 3 or (shape.zeros and blocks == 1))
        ):
            # Look-ups of one code each hide their latency better behind more warps than behind more units per warp.
            warps, row_warps = 16, 1 if blocks == 2 and not shape.zeros else row_warps
        return min(max(4, warps // row_warps), cta_units), row_warps
    row_warps = next(r for r in range(min(blocks, 8), 0, -1) if r == 1 or -(-blocks // r) * r <= blocks)
    # Each block of rows has warps of its own: where those leave room, two of them and more share its slice of k.
    few = tokens <= 16 and shape.lean and not shape.nested
    # One bit by look-ups, at sixteen tokens, would rather have four units a warp than twice as many warps.
    most_blocks = 2 if tokens == 16 else 1
    narrow = (shape.bits == 1 and row_warps > most_blocks) or (shape.bits > 4 and tokens == 16 and row_warps == 4)
    # Zeros leave registers for 16 warps of eight tokens if codes take few.
    zeros = shape.zeros and shape.subs == 1 and tokens == 8 and shape.bits <= 4 and 1 < row_warps <= 4
    warps = 16 if zeros or (few and (row_warps > 4 or narrow)) else 8
    return max(1, min(warps // row_warps, cta_units)), row_warps


def _digits_pay(shape: Shape, cluster: int, blocks: int, cta_units: int, large: bool) -> bool:
    """Whether integer products serve one token of a weight faster, outside of chains; where not measured, not."""
    if shape.bits == 1:
        return large or shape.kind in (TABLE, INT)
    if not large:
        if shape.bits == 4:
            return shape.kind == INT and cta_units <= 32
        return shape.kind == INT or shape.bits == 8
    if shape.bits == 2 and shape.kind == INT:
        # Making digits pays where a CTA has many units for each that it makes them of.
        return cluster == 1 or blocks >= 4
    # Look-ups of 4 bits without zero points wait for memory alone.
    return cluster == blocks == 1 and shape.kind in (INT, UINT_U8) and (shape.bits, shape.kind) != (4, INT)


def _two_digits_pay(shape: Shape) -> bool:
    """The same for two tokens, which fill the columns of a product; measured at 8192^2."""
    return shape.bits == 1 and shape.kind in (TABLE, INT) and shape.subs == 1 and shape.units >= 128


def _digit_warps(shape: Shape, blocks: int, cta_units: int) -> tuple[int, int]:
    """(k_warps, row_warps) of integer products, outside of chains; 16 warps where they have work."""
    one_bit = shape.bits == 1 and shape.kind in (TABLE, INT)
    if blocks == 1:
        few = 128 if shape.bits <= 2 else 64
        return (16 if cta_units >= few else 14 if one_bit and cta_units >= 112 else min(8, cta_units)), 1
    row_warps = blocks if blocks <= (8 if one_bit else 4) else 4
    return min(16 // row_warps, cta_units), row_warps


def _chain_warps(config: Config, shape: Shape, cta_units: int) -> tuple[int, int]:
    """(k_warps, row_warps) in a chain, where a CTA has its multiprocessor to itself: 8 to 16 warps keep it busy.

    Measured in the step of custom-llama-4B on an H200, 2026-11-21; docs/findings.md.
    """
    tokens, blocks = config.tokens, config.blocks
    work, least = cta_units * blocks, 2 if config.epilogue.gated else 1
    if not config.alone:
        most = 8
    elif tokens <= 4:
        most = 16 if work > (64 if shape.bits == 1 else 32) else 8
    else:
        # Two sums of an output, scales inside a unit, zeros and planes leave registers for 12 warps of many tokens.
        light = shape.lean and not shape.nested and not config.epilogue.gated
        most = 8 if work <= 64 else 16 if light else 12
    whole = [r for r in range(least, min(blocks, 8) + 1, least) if -(-blocks // r) * r <= blocks] or [least]
    row_warps = max(whole, key=lambda r: (most // r * r if tokens > 4 else 0, r))
    most = min(max(1, most // row_warps), cta_units)
    if config.digits and most > 8 and (even := [w for w in range(most, 7, -1) if cta_units % (4 * w) == 0]):
        # Stages of four units are waited for a quarter as often.
        return even[0], row_warps
    # The fewest warps with which the longest share of k is as short.
    share = -(-cta_units // most)
    return -(-cta_units // share), row_warps


def _alone(shape: Shape, config: Config, cta_units: int) -> bool:
    """Whether CTAs of nested weights, which have no table, or of zeros need their multiprocessor to themselves.

    Where two fit, launches of large weights took 1.3 to 1.7 times as long: docs/findings.md.
    """
    large = cta_units * config.blocks > 64
    if shape.zeros:
        return large and config.tokens <= 8 and config.warps <= 8
    return shape.nested and large and config.tokens <= 4


def _stages(shape: Shape, config: Config) -> list[tuple[int, int]]:
    """(stage_units, stages) in order of preference."""
    per_warp = config.steps * -(-shape.units // (config.cluster * config.k_warps))
    if config.indices:
        # Where everything would be on its way from the start, half of it first is faster.
        return [(4, 2 if per_warp > 8 else 1)]
    if shape.zeros:
        if config.digits and config.epilogue == PLAIN and config.blocks == 1 and config.k_warps > 8:
            return [(2, 1), (1, 2), (1, 1)]
        if shape.subs > 1 or config.tokens > 8 or config.digits or config.epilogue != PLAIN:
            return [(1, 2), (1, 1)]
        if config.tokens == 1 and per_warp <= 4 and shape.bits <= 4:
            return [(1, 4), (1, 2), (1, 1)]  # everything is on its way before the launch in front has ended
        return [(1, 1)] if config.warps > 8 and config.steps == 1 else [(1, 2), (1, 1)]
    if config.digits and shape.nested:
        # Registers of 16 warps do not hold two units of seven planes beside where the next block starts.
        return [(2, 1), (1, 2), (1, 1)][shape.bits > 6 and config.steps > 1 :]
    if config.digits and not shape.sparse:
        if config.alone:
            found = [(4, 3), (2, 3), (1, 4), (1, 2), (1, 1)] if shape.bits == 1 else [(1, 3), (1, 2), (1, 1)]
            return found[config.warps > 12 :]
        single = config.blocks == 1 and config.k_warps > 8
        if shape.bits == 1 and config.tokens == 1:
            # More on its way before the launch in front has ended only delays activations.
            first = (2, 2) if single and config.cluster > 1 else (4, 2 if config.steps > 1 else 1)
            return [first, (2, 2), (1, 4), (1, 2), (1, 1)]
        return [(2, 1) if single else (1, 3) if shape.bits == 4 else (2, 2), (1, 3), (1, 2), (1, 1)]
    if config.warps > 8 and config.row_warps <= 2 and (config.tokens == 1 or config.alone):
        return [(1, 1)]
    if config.warps > 12 and config.alone:
        # 128 registers are not enough for two units.
        return [(1, 2), (1, 1)]
    if config.tokens <= 4 and per_warp <= 4:
        # Everything is on its way before the launch in front has ended.
        if shape.bits == 1:
            return [(2, 2), (1, 4), (1, 2), (1, 1)]
        return [(1, {2: 4, 3: 4, 4: 3}.get(shape.bits, 1 if shape.nested else 2)), (1, 1)]
    if shape.nested and shape.bits > 4 and config.tokens == 1:
        return [(1, 3), (1, 2), (1, 1)] if config.alone else [(1, 1)]
    if shape.bits == 1:
        if config.tokens <= 4:
            return [(4, 1), (2, 1), (1, 2)]
        if config.octets and not config.alone:
            return [*([(4, 1)] if config.warps <= 8 else []), *([(2, 1)] if config.warps < 16 else []), (1, 2)]
        crowded = config.row_warps > 4 and config.tokens >= 16 and not config.alone
        # Two units beside the sums of 32 tokens are more than registers hold.
        crowded |= config.tokens == 32
        return [(1, 2)] if crowded else [(2, 1), (1, 2)]
    if shape.bits <= 4 and config.tokens <= 16:
        # Two units at once take more registers than 16 warps leave in these cases.
        wide = config.tokens == 16 or (shape.bits, config.tokens) in ((4, 1), (2, 8))
        return [(1, 2), (1, 1)] if config.warps > 8 and wide and not config.alone else [(2, 1), (1, 2), (1, 1)]
    return [(1, 2), (1, 1)] if config.tokens <= 4 or (config.tokens < 16 and config.warps > 8) else [(1, 1)]


def _x_chunks(shape: Shape, config: Config) -> int:
    """Pieces of at least four units that a slice's activations come in; one where sums of them are needed first."""
    slices = config.cluster * config.phases * config.k_warps
    if config.tokens < 16 or config.phases > 1 or shape.zeros or shape.units % slices:
        return 1
    mine = shape.units // slices
    return next((n for n in (4, 3, 2) if mine % (n * config.stage_units) == 0 and mine >= 4 * n), 1)


def _with_loads(shape: Shape, config: Config) -> Config:
    """`config` with how its scales, codes and sums of activations come to its warps; on an H200: docs/findings.md."""
    if config.digits and (shape.nested or shape.sparse):
        return replace(config, scales_once=config.allows_scales_once(shape), bulk=not shape.sparse)
    if config.epilogue != PLAIN or config.digits or config.indices or config.tokens > 8:
        return config
    slices = config.cluster * config.phases * config.k_warps
    units_per_warp = config.steps * -(-shape.units // slices)
    # Four more products a unit cost less than a pass over x and a barrier of the CTA while a warp has few units.
    own_sums = shape.zeros or (shape.bits == 1 and shape.kind in (TABLE, INT))
    config = replace(config, x_sums=own_sums and shape.subs == 1 and units_per_warp <= 16)
    # Scales in one piece halve the copies of a warp that refills single units, which pays from the second refill on.
    refills = units_per_warp - config.stages if config.stage_units == 1 else 0
    if not shape.zeros and refills >= 2 and units_per_warp <= 16 and config.allows_scales_once(shape):
        # Without small copies, sparse weights come faster by cp.async, whose refills no fence holds up.
        return replace(config, scales_once=True, bulk=not shape.sparse or config.tokens > 1)
    return config


def _fill(shape: Shape, config: Config, capability: tuple[int, int]) -> Config | None:
    """`config` with the ring, phases and batch that shared memory allows, or None."""
    hopper, most_shared = capability >= (9, 0), max_shared(capability)
    batches = (config.steps, 1) if config.tokens == 1 else (1,)
    for phases in (1, 2, 4, 8, 16):
        if phases > 1 and (
            config.steps > 1 or config.digits or shape.units % (config.cluster * phases * config.k_warps)
        ):
            continue
        slices = config.cluster * phases * config.k_warps
        for stage_units, stages in _stages(shape, config):
            if not shape.allows_stage_units(stage_units, slices):
                continue
            for batch in batches:
                filled = replace(config, phases=phases, stage_units=stage_units, stages=stages, batch=batch)
                filled = replace(filled, x_chunks=_x_chunks(shape, filled))
                if hopper:
                    filled = _with_loads(shape, filled)
                shared = filled.shared_bytes(shape, hopper)
                if shared <= most_shared:
                    per_warp = config.steps * -(-shape.units // slices)
                    # Two CTAs of 16 warps would spill in 64 registers a thread, and zeros of several groups in 128.
                    crowded = config.warps > 8 or (shape.kind == UINT_FLOAT and shape.subs > 1)
                    # Beside it a CTA of the next launch can start.
                    half = (most_shared + _SHARED_PER_CTA_EXTRA) // 2 - _SHARED_PER_CTA_EXTRA
                    fits = shared <= half and not crowded and not config.alone
                    beside = hopper and config.tokens == 1 and per_warp <= 4 and fits
                    return replace(filled, min_ctas=2 if beside else 1)
    return None


def _allows_indices(shape: Shape, tokens: int, capability: tuple[int, int], equal_indices: bool) -> bool:
    """Whether sparse products have been measured to win: two bits where large, one bit at 4096^2; docs/findings.md.

    At two bits they are bound by the tensor cores, at 60 clocks a unit against 86 of look-ups; at one bit integer
    products have fewer, once their digits are made.
    """
    if tokens > 1 or capability != (9, 0) or not shape.allows_indices or shape.kind not in (TABLE, INT):
        return False
    weights, large = shape.n * shape.k, 1 << 25
    if shape.bits == 2:
        return equal_indices and shape.kind == TABLE and weights >= large
    return large // 2 <= weights < large


def _with_indices(shape: Shape, start: Config, cta_units: int) -> Config | None:
    """`start` with sparse products and their warps: whole stages of four units each; None if those are few."""
    blocks = start.blocks
    row_warps = max(range(1, min(blocks, 8) + 1), key=lambda r: (blocks / -(-blocks // r) / r, r))
    slices = [warps for warps in range(1, 16 // row_warps + 1) if cta_units % (4 * warps) == 0]
    k_warps = 8 if 8 in slices else max(slices, default=0)
    if k_warps * row_warps < 8:
        return None
    large = shape.n * shape.k >= 1 << 25
    return replace(start, indices=True, k_warps=k_warps, row_warps=row_warps, alone=large, uniform=large)


def _with_wide_table(shape: Shape, config: Config, capability: tuple[int, int]) -> Config:
    """`config` with a wide table where sixteen tokens were measured to gain by it.

    That is where activations come in no more parts for it, or many blocks of rows share them.
    """
    measured = config.tokens == 16 and shape.bits in (4, 8) and shape.kind in (TABLE, INT) and shape.subs == 1
    if not measured or config.epilogue != PLAIN or capability < (9, 0):
        return config
    wide = _fill(shape, replace(config, wide=True), capability)
    if wide is None or (wide.stages, wide.stage_units) != (config.stages, config.stage_units):
        return config
    return wide if wide.phases == config.phases or config.row_warps > 4 else config


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

    equal_indices: whether the device multiplies by equal indices as csrc/indices.cuh needs it (`equal_indices` below).

    Measured on an H200 (CUDA 13.0), 2026-11-21, at 4096^2 to 28672 x 8192, 1 to 8 bits, m = 1 to 64: docs/findings.md.
    """
    hopper = capability >= (9, 0)
    tokens = token_tile(m)
    chained = epilogue != PLAIN
    # The registers that it saves are those by which 16 and more tokens spilled.
    uniform = hopper and tokens >= 16
    if shape.sparse and (tokens > 32 or epilogue.tables > 1):
        return None  # registers do not hold the words of a unit beside the sums of 64 tokens; one table of values
    if hopper and tokens in (2, 4) and shape.zeros and not chained:
        # Fewer tokens took longer than eight where those have 16 warps.
        eight = choose_config(shape, 8, blocks, sms, capability)
        if eight and eight.warps > 8:
            return eight
    if tokens > 32 and capability != (9, 0):
        return None  # registers do not hold the sums of 64 tokens; two launches of 32 have not been measured on 9.0
    coded = shape.nested or shape.sparse  # whose integer products have configurations of their own
    best = None
    for cluster in (1, 2, 4, 8) if hopper else (1,):
        at_once = clusters_at_once(sms, cluster)
        per_cluster = max(1, -(-blocks // at_once))
        if epilogue.gated:
            per_cluster += per_cluster % 2
        cta_units = -(-shape.units // cluster)
        alone = hopper and chained
        start = Config(tokens, cluster, 1, 1, 1, 1, per_cluster, 1, 1, epilogue=epilogue, alone=alone, uniform=uniform)
        if hopper and tokens == 16 and shape.bits == 1 and shape.kind in (TABLE, INT):
            start = replace(start, octets=True)
        if hopper and not chained and _bytes_pay(shape, tokens, per_cluster):
            start = replace(start, digits=True, paired=True)
        elif tokens == 1 and shape.allows_digits and not coded:
            large = shape.n * shape.k >= 1 << 25
            if chained:
                digits = shape.bits == 1 or (shape.bits == 8 and not large)
            else:
                digits = _digits_pay(shape, cluster, per_cluster, cta_units, large)
            if digits:
                start = replace(start, digits=True, paired=shape.bits == 1 or not chained)
                start = start if chained else replace(start, uniform=hopper, late=large)
        elif not chained and tokens == 2 and cluster == per_cluster == 1 and _two_digits_pay(shape):
            start = replace(start, digits=True, paired=True, uniform=hopper, late=True)
        if chained:
            most, row_warps = _chain_warps(start, shape, cta_units)
        elif start.digits and not coded:
            most, row_warps = _digit_warps(shape, per_cluster, cta_units)
        else:
            most, row_warps = _warps(shape, start, cta_units)
        warps = sorted({most, *(w for w in (8, 7, 4, 2, 1) if w < most)}, reverse=True)
        tried = [replace(start, k_warps=k_warps, row_warps=row_warps) for k_warps in warps]
        if not chained and _allows_indices(shape, tokens, capability, equal_indices):
            selected = _with_indices(shape, replace(start, digits=False, paired=False, late=False), cta_units)
            tried = tried if selected is None else [selected]
        for config in tried:
            k_warps = config.k_warps
            config = replace(config, alone=config.alone or (hopper and _alone(shape, config, cta_units)))
            filled = _fill(shape, config, capability)
            if filled is None:
                continue
            if filled.paired and filled.min_ctas == 1 and cluster == 1 and not coded:
                # Where CTAs of two launches fit beside each other, some launches took 1.4 times as long.
                filled = replace(filled, alone=hopper)
            score = blocks / (per_cluster * at_once)
            # In a chain more warps are worth more than an even share of k for each.
            score *= 1 if chained and k_warps == most else cta_units / k_warps / -(-cta_units // k_warps)
            if chained and tokens >= 8 and per_cluster == 1:
                # Activations of many tokens cost nearly as much as the weights of the one block that they are for.
                score /= 1.4
            score *= (_CLUSTER_WORTH_FEW if tokens <= 4 else _CLUSTER_WORTH_MANY)[cluster]
            # A CTA that goes through its activations more than once waits for them each time.
            score *= 0.9 ** (filled.phases - 1) * (0.25 + 0.09375 * min(8, filled.warps))
            if best is None or score > best[0]:
                best = (score, filled)
    if best and chained and hopper and tokens == 1:
        # Fewer instructions; here registers decide nothing about where CTAs run.
        return replace(best[1], uniform=True, paired=best[1].digits and shape.bits == 1)
    if best and chained and best[1].warps > 12:
        return replace(best[1], uniform=False)  # 128 registers are not enough for what the compiler then keeps
    if best and hopper and tokens == 8 and not chained and shape.kind in (TABLE, INT) and shape.subs == 1:
        # Fewer instructions again, but for 14 warps and more of wider codes, which spill.
        return replace(best[1], uniform=shape.bits <= 2 or best[1].warps <= 12)
    return _with_wide_table(shape, best[1], capability) if best else None


class Range(ctypes.Structure):
    """Blocks and rows that one table serves, and its first cluster (prefill: row tile); twin of fdk::Range in csrc."""

    _fields_ = (
        ("first", ctypes.c_int),
        ("first_block", ctypes.c_int),
        ("end_block", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("first_row", ctypes.c_int64),
        ("end_row", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """Twin of fdk::Params in csrc/decode.cuh."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("ranges", ctypes.c_int),
        ("blocks_per_cluster", ctypes.c_int),
        ("one_bit", ctypes.c_uint32 * 3),
        ("zero", ctypes.c_uint32),
        ("squares", ctypes.c_void_p),
        ("squares_out", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("range", Range * MAX_RANGES),
    )


_ONE_BIT = {True: (0x3F803F80, 0x40004000, 0x40804080), False: (0x3C003C00, 0x4C004C00, 0x50005000)}


def params_for(weight: QuantisedWeight, config: Config) -> tuple[Params, int]:
    """The kernel's argument without the operands of a call, and the number of CTAs."""
    geometry, parts = weight.geometry, weight.parts
    params = Params(
        codes=parts["codes"].data_ptr(),
        scales=parts["scales"].data_ptr(),
        zeros=parts["zeros"].data_ptr() if "zeros" in parts else None,
        table=parts["table"].data_ptr() if "table" in parts else None,
        ranges=len(geometry.row_ends),
        blocks_per_cluster=config.blocks,
        one_bit=_ONE_BIT[geometry.dtype == torch.bfloat16],
    )
    if config.epilogue.gated:
        # Blocks of gate and up in turn, whose tables the kernel finds by their place.
        count = sum(block_counts(geometry))
        params.ranges = 1
        params.range[0] = Range(0, 0, count, 0, 0, geometry.n)
        return params, -(-count // config.blocks) * config.cluster
    cluster = block = 0
    for i, ((start, end), count) in enumerate(zip(geometry.ranges, block_counts(geometry), strict=True)):
        params.range[i] = Range(cluster, block, block + count, 0, start, end)
        cluster += -(-count // config.blocks)
        block += count
    return params, cluster * config.cluster


def source(shape: Shape, config: Config, capability: tuple[int, int]) -> jit.Source:
    """What the kernel is compiled from."""
    return "decode.cuh", config.defines(shape, capability >= (9, 0)), jit.architecture(capability)


@cache
def load(shape: Shape, config: Config, device: int) -> driver.Function:
    """The compiled kernel on CUDA device `device`, which must be the current one."""
    capability = torch.cuda.get_device_capability(device)
    hopper = capability >= (9, 0)
    cubin = jit.cubin(*source(shape, config, capability))
    # Launches then spread evenly over multiprocessors.
    shared = max(config.shared_bytes(shape, hopper), shared_for_places(1 if config.alone else 2, capability))
    return driver.Function(cubin, "fdk_decode", config.threads, shared, config.cluster, dependent=hopper)


# What a device is asked with, before it serves weights that need the answer.
ASKED = Shape(64, 256, 2, 64, True, TABLE), Config(1, 1, 2, 1, 1, 2, 1, 1, 1, indices=True)


def asks(shape: Shape, config: Config) -> bool:
    """Whether a configuration relies on `equal_indices`."""
    return config.indices and shape.bits == 2


def _of_equal_indices() -> tuple[QuantisedWeight, Tensor, Tensor]:
    """A weight of two bits, x [1, 256] and their product [1, 64], exact: every nibble of codes at every place."""
    drawn = torch.randint(
        0, 4, (64, 256), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.uint8, device="cpu"
    )
    table = torch.tensor([[1, -2, 4, -7]], dtype=torch.bfloat16, device="cpu")
    scales = torch.ones(64, 4, dtype=torch.bfloat16, device="cpu")
    parts = {"codes": pack_codes(drawn, 2), "scales": scales, "table": table}
    x = (torch.arange(256, device="cpu") * 37 % 61 - 30)[None].to(torch.bfloat16)
    product = (x.float() @ table.float()[0, drawn.long()].T).to(torch.bfloat16)
    return QuantisedWeight.from_parts("lut2_g64", 256, parts), x, product


@cache
def equal_indices(device: torch.device) -> bool:
    """Whether a sparse product of this device selects one row twice by two equal indices, which PTX leaves undefined.

    Compute capability 9.0 does (H200, 2026-11-22). One launch and a comparison, once for each device.
    """
    with torch.cuda.device(device):
        load(*ASKED, device.index)  # first, since it says what to do where a graph is being captured
    weight, x, product = _of_equal_indices()
    weight, x, product = weight.to(device).to_layout("fragments"), x.to(device), product.to(device)
    out = torch.full_like(product, float("nan"))
    Plan(weight, ASKED[1], asked=True)(x, None, out)
    return torch.equal(out, product)


class Plan:
    """A weight bound to a configuration on its device: what is left for a call are four fields and a launch."""

    def __init__(self, weight: QuantisedWeight, config: Config, asked: bool = False) -> None:
        """asked: that the device has been asked for `equal_indices`, or is just being asked."""
        zeros = weight.parts.get("zeros")
        assert weight.layout == "fragments" and all(part.data_ptr() % 16 == 0 for part in weight.parts.values())
        self.shape = shape_of(weight.geometry, None if zeros is None else zeros.dtype)
        self.device = weight.device
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        if not asked and asks(self.shape, config) and not equal_indices(self.device):
            capability = torch.cuda.get_device_capability(self.device)
            blocks = sum(block_counts(weight.geometry))
            config = choose_config(self.shape, config.tokens, blocks, sms, capability, config.epilogue, False)
        self.config = config
        self.template, grid = params_for(weight, config)
        # CTAs without work keep every multiprocessor equally full: where one is left empty, the next launch puts two
        # of its CTAs there, and they take twice as long as all others.
        self.grid = max(grid, sms // config.cluster * config.cluster)
        self.squares = squares_left(self.shape.n, config)
        with torch.cuda.device(self.device):
            self.function = load(self.shape, config, self.device.index)

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor, **operands: Tensor | float) -> None:
        """out [m, n] = x [m, k] @ W.T + bias on the current stream of the weight's device, m <= config.tokens.

        operands: what the epilogue reads and writes, by the names of `Params`.
        """
        assert 0 < x.shape[0] <= self.config.tokens and x.data_ptr() % 16 == 0
        params = Params.from_buffer_copy(self.template)
        params.x = x.data_ptr()
        params.bias = None if bias is None else bias.data_ptr()
        params.out = out.data_ptr()
        params.m = x.shape[0]
        for name, value in operands.items():
            setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if torch.cuda.current_device() == self.device.index:
            self.function(self.grid, stream, params)
        else:
            with torch.cuda.device(self.device):
                self.function(self.grid, stream, params)
