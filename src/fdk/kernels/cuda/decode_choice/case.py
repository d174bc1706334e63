"""What a configuration of the decode kernel is chosen for, and what each of its CTAs then has of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from fdk.kernels.cuda.decode_config import INT, PLAIN, TABLE, UINT_U8, Config, Epilogue, Shape, clusters_at_once

LOOKED_UP = (TABLE, INT)
"""Kinds whose operands are codes alone: no zeros, planes or masks."""

INTEGERS = (INT, UINT_U8)
"""Integers without zeros and with bytes as zeros."""

MIDDLE, LARGE = 1 << 24, 1 << 25
"""Weights from which a matrix counts as middling (4096^2) and as large (8192 x 4096)."""


def token_tile(m: int) -> int:
    """Tokens that the kernel serving m is compiled for."""
    return next(tile for tile in (1, 2, 4, 8, 16, 32, 64) if m <= tile)


def weights(shape: Shape) -> int:
    """Weights of a matrix."""
    return shape.n * shape.k


def coded(shape: Shape) -> bool:
    """Whether codes are planes or have masks, so that their integer products have configurations of their own."""
    return shape.nested or shape.sparse


def few_codes_and_zeros(shape: Shape) -> bool:
    """Whether zeros and codes of a unit take few enough registers for 16 warps of two to eight tokens."""
    return shape.kind == UINT_U8 and 2 <= shape.bits <= 4 and shape.subs == 1


@dataclass(frozen=True)
class Share:
    """What a CTA has of a weight: `units` of 64 columns of each of `blocks` of 64 rows, in a cluster that splits k."""

    cluster: int
    units: int
    blocks: int

    @classmethod
    def of(cls, shape: Shape, config: Config) -> Share:
        """That of each CTA of a configuration."""
        return cls(config.cluster, -(-shape.units // config.cluster), config.blocks)

    @property
    def work(self) -> int:
        """Units of 64 columns and 64 rows."""
        return self.units * self.blocks


@dataclass(frozen=True)
class Case:
    """A product for which a configuration is chosen.

    shape       the weight;  blocks: of 64 rows, in all
    tokens      that the kernel is compiled for
    sms         multiprocessors of the device;  capability: its compute capability
    epilogue    what becomes of the sums: PLAIN, or a product of a chain
    equal_indices  whether the device multiplies by equal indices as csrc/indices.cuh needs it
    """

    shape: Shape
    tokens: int
    blocks: int
    sms: int
    capability: tuple[int, int]
    epilogue: Epilogue
    equal_indices: bool

    @property
    def hopper(self) -> bool:
        """Whether the device has clusters and bulk copies."""
        return self.capability >= (9, 0)

    @property
    def measured(self) -> bool:
        """Whether the device is of the architecture on which the rules were measured."""
        return self.capability == (9, 0)

    @property
    def chained(self) -> bool:
        return self.epilogue != PLAIN

    @property
    def large(self) -> bool:
        return weights(self.shape) >= LARGE

    @property
    def side_by_side(self) -> bool:
        """Whether CTAs of two launches, a pair for each block, have multiprocessors of their own."""
        return 4 * self.blocks <= self.sms

    def at_once(self, cluster: int) -> int:
        """Clusters of that size that run at once."""
        return clusters_at_once(self.sms, cluster)

    def share(self, cluster: int) -> Share:
        """What a CTA has in clusters of that size that all run at once."""
        blocks = max(1, -(-self.blocks // self.at_once(cluster)))
        if self.epilogue.gated:
            blocks += blocks % 2
        return Share(cluster, -(-self.shape.units // cluster), blocks)
