"""What the decode kernel (csrc/decode.cuh) is compiled for: the shape of a weight and a tile configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fdk.packing.fragments import BLOCK, units
from fdk.packing.layouts import Geometry

MAX_TOKENS = 64

MAX_RANGES = 16

MAX_SHARED = 227 * 1024
"""Bytes of shared memory that a CTA may use on compute capability 9.0 and 10.0."""

# Of what a multiprocessor has, each CTA costs 1 KB extra.
SHARED_PER_CTA_EXTRA = 1024


def max_shared(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a CTA may use; CUDA C++ programming guide, table of compute capabilities."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 99 * 1024 if capability[0] == 8 or capability >= (12, 0) else MAX_SHARED


def shared_for_places(places: int, capability: tuple[int, int]) -> int:
    """Bytes of shared memory with which at most so many CTAs fit on a multiprocessor."""
    return (max_shared(capability) + SHARED_PER_CTA_EXTRA) // (places + 1)


def shared_of_two(capability: tuple[int, int]) -> int:
    """Bytes of shared memory with which two CTAs fit on a multiprocessor."""
    return shared_for_places(1, capability) - SHARED_PER_CTA_EXTRA


TABLE, INT, UINT_U8, UINT_FLOAT, ROUNDED, CUT, SPARSE_INT, SPARSE_TABLE = range(8)
"""Kinds of codes, as csrc/kinds.cuh has them."""

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


def format_defines(bits: int, group: int, bf16: bool, kind: int, served: int) -> dict[str, int]:
    """Macros that say what a weight's codes mean, for every kernel that reads them."""
    return {"FDK_BITS": bits, "FDK_GROUP": group, "FDK_BF16": int(bf16), "FDK_KIND": kind, "FDK_SLICE": served}


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

    def defines(self) -> dict[str, int]:
        """Macros that every product of such a weight is compiled with."""
        means = format_defines(self.bits, self.group, self.bf16, self.kind, self.served)
        return {"FDK_N": self.n, "FDK_K": self.k, **means}

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
        """Whether integer products can serve it: values affine in the code."""
        affine = self.kind in (INT, UINT_U8, UINT_FLOAT) or (self.kind == TABLE and self.bits == 1)
        return (self.nested or self.kind == SPARSE_INT or affine) and self.subs == 1

    def allows_digits_of(self, tokens: int) -> bool:
        """The same for so many tokens."""
        return self.allows_digits and (tokens <= 2 or (tokens <= 8 and self.allows_many_digits))

    @property
    def allows_many_digits(self) -> bool:
        """Whether csrc/digits_many.cuh can: neither tables nor masks, and k is even."""
        return self.kind != TABLE and not self.sparse and self.k % 2 == 0

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
    x_ahead    of those, how many are asked for before the products, the others as these go on; 0: all
    x_buffers  phases of interleaved warps whose activations are in shared memory at once, as a ring; 0: two by barriers
    interleaved  warps that split k take its stages in turn, so that each piece of activations is one for all of them
    half_blocks  each two clusters share a block of rows: half a block less for each of them
    epilogue   what becomes of the sums
    bulk         fill rings by bulk copies, else by cp.async as before Hopper
    scales_once  fetch scales and zeros of a warp's slice of k in one piece each, not with each stage
    x_sums       have warps add up activations for zero points and one bit, not find their sums in shared memory
    indices    codes as the indices of sparse products (csrc/indices.cuh)
    hold       clocks for which CTAs without work stay, so that each multiprocessor has a place for the next launch
    wide       rows of the table 256 bytes apart, for cheaper addresses: 2, 4 and 8 bits
    octets     look up one bit eight codes at a time, which needs no sums of activations
    selected   row tiles of those, of four, whose operands are selected bit by bit instead of looked up
    ahead      make operands of a warp's first unit while its activations come (1), or before the dependency wait,
               with its stage refilled behind that (2) or at once (3)
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
    half_blocks: bool = False
    ahead: int = 0
    x_ahead: int = 0
    x_buffers: int = 0
    interleaved: bool = False
    selected: int = 0

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

    def clusters(self, blocks: int) -> int:
        """Clusters that serve so many blocks of rows."""
        return -(-2 * blocks // (2 * self.blocks - 1)) if self.half_blocks else -(-blocks // self.blocks)

    def allows_scales_once(self, shape: Shape) -> bool:
        """Whether each warp has one slice of k, of whole groups or inside one."""
        slices = self.cluster * self.k_warps
        columns = 64 * (shape.units // slices)
        aligned = shape.groups == 1 or columns % shape.group == 0 or shape.group % columns == 0
        single = self.steps == 1 and self.phases == 1 and shape.units % slices == 0
        return single and aligned and shape.subs == 1

    def many_digits(self, shape: Shape) -> bool:
        """Whether integer products are those of csrc/digits_many.cuh, not of csrc/digits.cuh."""
        two = self.tokens == 2 and shape.bits > 1 and shape.allows_many_digits
        return self.digits and (self.tokens > 2 or two)

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
        if self.digits:
            summed = not self.many_digits(shape)
        else:
            summed = not (self.x_sums or self.indices) and (shape.zeros or one_bit_sums)
        x_buffers = self.x_buffers or (2 if self.phases > 1 and hopper and shape.k % 64 == 0 and not summed else 1)
        row = cta_units * 128 + (16 if self.tokens >= 8 else 32)
        head = self.tokens * (cta_units * 256 if self.digits else x_buffers * row)
        head += 256 * self.stage_units - 240 if self.digits and self.paired and self.tokens == 1 else 0
        head = max(head, sums) if self.steps == 1 and self.tokens >= 8 else head + sums
        if self.digits:
            head += -(-self.tokens * (self.warps + self.k_warps) * 4 // 16) * 16
            head += -(-cta_units * self.tokens * 4 // 16) * 16 if summed else 0
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
            **shape.defines(),
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
            "FDK_MANY_DIGITS": int(self.many_digits(shape)),
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
            "FDK_HALF_BLOCKS": int(self.half_blocks),
            "FDK_AHEAD": self.ahead,
            "FDK_X_AHEAD": self.x_ahead,
            "FDK_X_BUFFERS": self.x_buffers,
            "FDK_INTERLEAVED": int(self.interleaved),
            "FDK_SELECTED": self.selected,
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


# cuOccupancyMaxActiveClusters on an H200 (132 multiprocessors), 2026-11-20 and 22.
_CLUSTERS_OF_132 = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}


def clusters_at_once(sms: int, cluster: int) -> int:
    """Clusters that run at once with one CTA per multiprocessor; larger ones leave over what does not fill a GPC."""
    return max(1, _CLUSTERS_OF_132[cluster] * sms // 132)
