"""What the codes of a low-bit weight mean, free of any tensor operation."""

from __future__ import annotations

from dataclasses import dataclass

from fdk.errors import FormatError

MIN_GROUP = 16


@dataclass(frozen=True)
class Kind:
    """A family of code meanings: how an integer code becomes a number before it is scaled.

    table   "stored": the weight carries its own table; "fixed": `values` is the table; None: affine.
    offset  affine kinds without stored zeros: value(code) = code - offset(bits).
    zeros   affine kinds with one stored zero per group: value(code) = code - zero.
    """

    name: str
    bits: tuple[int, ...]
    summary: str
    table: str | None = None
    values: tuple[float, ...] | None = None
    zeros: bool = False

    def offset(self, bits: int) -> int:
        """The implicit zero of a symmetric integer kind: the middle code, 2^(bits-1)."""
        return 1 << (bits - 1)


@dataclass(frozen=True)
class Format:
    """`W[n, k] = scale[n, k // group] * value(code[n, k])`, codes of `bits` bits.

    group is the number of consecutive weights along k that share a scale; None means one scale per row
    (`chan` in the name). `str(format)` is the name used in Python, C++, records and checkpoints, and
    `fdk.formats.parse` is its inverse.
    """

    kind: Kind
    bits: int
    group: int | None

    def __post_init__(self) -> None:
        if self.bits not in self.kind.bits:
            raise FormatError(
                f"format kind {self.kind.name!r} has no width of {self.bits} bits; "
                f"choose one of {', '.join(map(str, self.kind.bits))}"
            )
        if self.group is not None and (self.group < MIN_GROUP or self.group % MIN_GROUP):
            raise FormatError(
                f"group size {self.group} is not a positive multiple of {MIN_GROUP}; "
                "use 16, 32, 64, 128, ... or None for one scale per row ('chan')"
            )

    def __str__(self) -> str:
        group = "chan" if self.group is None else f"g{self.group}"
        return f"{self.kind.name}{self.bits}_{group}"

    @property
    def is_table(self) -> bool:
        """True if values come from a table of 2^bits entries, stored or fixed."""
        return self.kind.table is not None

    @property
    def has_zeros(self) -> bool:
        """True if the weight stores a zero point per group."""
        return self.kind.zeros

    @property
    def offset(self) -> int:
        """The implicit zero of an affine format without stored zeros."""
        return self.kind.offset(self.bits)

    def groups(self, k: int) -> int:
        """Scales per row of a weight with k input features; FormatError if the group does not divide k."""
        if self.group is None:
            return 1
        if k % self.group:
            fitting = [g for g in (128, 64, 32, 16) if g < self.group and k % g == 0]
            remedy = f"use a group of {fitting[0]} or one scale" if fitting else "use one scale"
            raise FormatError(
                f"group {self.group} does not divide k = {k}; {remedy} per row (chan), or skip this layer"
            )
        return k // self.group

    def group_size(self, k: int) -> int:
        """Weights per scale along k: the group, or k itself for one scale per row."""
        self.groups(k)
        return k if self.group is None else self.group

    def code_bytes(self, n: int, k: int) -> int:
        """Bytes of the canonical codes of an [n, k] weight: each row is padded to a whole byte."""
        return n * (-(-k * self.bits // 8))

    def nbytes(self, n: int, k: int, element_size: int = 2, tables: int = 1, zero_size: int | None = None) -> int:
        """Bytes of a stored [n, k] weight: codes, scales, zeros (element_size unless given) and tables."""
        total = self.code_bytes(n, k) + n * self.groups(k) * element_size
        if self.has_zeros:
            total += n * self.groups(k) * (element_size if zero_size is None else zero_size)
        if self.is_table:
            total += tables * (1 << self.bits) * element_size
        return total
