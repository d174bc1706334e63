"""What the prefill kernel (csrc/prefill.cuh) is compiled for, a tile configuration, and the tiles of a launch."""

from __future__ import annotations

from dataclasses import dataclass

from fdk.kernels.cuda.decode_config import INT, UINT_U8, Shape

# Rows of staged outputs in shared memory (csrc/prefill_shape.cuh: OUT_STRIDE), and what the system keeps of it.
_OUT_STRIDE, _WINDOW = 144, 1024

# Units that a cluster gets at least where tiles are cut along k.
_LEAST_SHARE = 8


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

    def late(self, shape: Shape) -> bool:
        """Whether scales of groups multiply float32 sums; `LATE` of the kernel."""
        return shape.groups > 1 and not self.rounds

    def block_bytes(self, shape: Shape) -> int:
        """Bytes of a stage for one block of rows: codes, scales, zeros."""
        staged = shape.unit_groups if shape.groups > 1 or shape.kind == UINT_U8 else 0
        return shape.bits * 512 + staged * (128 + (64 if shape.kind == UINT_U8 else 0))

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of a CTA; the host twin of `Smem` in csrc/prefill_shape.cuh, which asserts that they agree."""
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
