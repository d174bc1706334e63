"""What the codes of a low-bit weight mean, free of any tensor operation."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from fdk.arguments import as_integer, shown
from fdk.errors import FormatError

MIN_GROUP = 16
MASTER_BITS = 8
BLOCK = 32
"""Consecutive weights along k of which a sparse format keeps KEPT."""
KEPT = 16


@dataclass(frozen=True)
class Kind:
    """A family of code meanings: how an integer code becomes a number before it is scaled.

    table   "stored": the weight carries its own table; "fixed": `values` is the table; None: affine.
    offset  affine kinds without stored zeros: value(code) = code - offset(bits).
    zeros   affine kinds with one stored zero per group: value(code) = code - zero.
    slices  nested kinds: the widths at which one 8-bit master is served. Empty: the kind is not nested.
    cuts    nested kinds: True if a slice drops the lower bits, False if it rounds them. See `Format.slice_values`.
    sparse  widths that also exist with 16 of every 32 weights kept.
    """

    name: str
    bits: tuple[int, ...]
    summary: str
    table: str | None = None
    values: tuple[float, ...] | None = None
    zeros: bool = False
    slices: tuple[int, ...] = ()
    cuts: bool = False
    sparse: tuple[int, ...] = ()

    def offset(self, bits: int) -> int:
        """The implicit zero of a symmetric integer kind: the middle code, 2^(bits-1)."""
        return 1 << (bits - 1)

    def __reduce__(self) -> tuple:
        # Kinds are told apart by identity, so copies and pickles lead back to the registered one.
        from fdk.formats.registry import kind

        return kind, (self.name,)


@dataclass(frozen=True)
class Format:
    """`W[n, k] = scale[n, k // group] * value(code[n, k]) * keep[n, k]`, codes of `bits` bits.

    group is the number of consecutive weights along k that share a scale; None means one scale per row
    (`chan` in the name). `str(format)` is the name used in Python, C++, records and checkpoints, and
    `fdk.formats.parse` is its inverse.

    served  nested kinds: the width in bits at which the master is read, 8 if not given; others: None.
    sparse  keep is 1 for 16 of every 32 consecutive weights of a row and 0 for the others; without it keep is 1.
    """

    kind: Kind
    bits: int
    group: int | None
    served: int | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, Kind):
            raise FormatError(f"kind is {shown(self.kind)}, not a fdk.formats.Kind; use fdk.parse with a format name")
        if not isinstance(self.sparse, bool):
            raise FormatError(f"sparse is {shown(self.sparse)}; give True or False")
        for name in ("bits", "group", "served"):
            if (value := getattr(self, name)) is not None or name == "bits":
                object.__setattr__(self, name, as_integer(value, name))
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
        if self.is_nested:
            self._check_served()
        elif self.served is not None:
            raise FormatError(
                f"format kind {self.kind.name!r} is not nested, so it has no slice of {self.served} bits; "
                f"use {self.kind.name}{self.served}, or a nested kind such as nest8"
            )
        if self.sparse:
            self._check_sparse()

    def _check_served(self) -> None:
        if self.served is None:
            object.__setattr__(self, "served", self.bits)
        if self.served not in self.kind.slices:
            wider = f"wider than its {self.bits} bits" if self.served > self.bits else "not served"
            raise FormatError(
                f"a slice of {self.served} bits of {self.kind.name}{self.bits} is {wider}; "
                f"choose one of {', '.join(map(str, self.kind.slices))}"
            )

    def _check_sparse(self) -> None:
        if self.bits not in self.kind.sparse:
            widths = ", ".join(f"{self.kind.name}{bits}" for bits in self.kind.sparse)
            raise FormatError(
                f"{self.kind.name}{self.bits} has no {KEPT}:{BLOCK} sparse form; "
                + (f"choose {widths}" if widths else "choose int4, uint4, lut4, nf4 or fp4")
            )
        if self.group is not None and self.group % BLOCK:
            raise FormatError(
                f"group size {self.group} cuts blocks of {BLOCK} weights, of which {KEPT} are kept; "
                f"use a multiple of {BLOCK} or None for one scale per row ('chan')"
            )

    def __str__(self) -> str:
        group = "chan" if self.group is None else f"g{self.group}"
        served = f"s{self.served}" if self.is_nested and self.served != self.bits else ""
        return f"{self.kind.name}{self.bits}{served}_{group}" + (f"_sp{KEPT}of{BLOCK}" if self.sparse else "")

    @property
    def is_nested(self) -> bool:
        """True if slices of several widths are served from one stored master."""
        return bool(self.kind.slices)

    @property
    def width(self) -> int:
        """Bits of a code as a product sees it: those of the served slice of a nested format."""
        return self.served or self.bits

    @property
    def storage(self) -> str:
        """How the codes are stored: "plain", "nested" (bit planes) or "sparse" (mask and kept codes)."""
        return "nested" if self.is_nested else "sparse" if self.sparse else "plain"

    @property
    def read_bits(self) -> int:
        """Bits of each stored code that a product reads: one more than a rounded slice has, for its rounding."""
        if not self.is_nested or self.served == self.bits:
            return self.bits
        return self.served + (not self.kind.cuts)

    def slice_values(self) -> tuple[float, ...]:
        """Nested kinds: the value of a weight, before its scale, by the `read_bits` leading bits u of its master code.

        Rounded (MatGPTQ): 2^(8-r) * (min((u >> 1) + (u & 1), 2^r - 1) - 2^(r-1)) for a slice of r < 8 bits, u - 128
        for r = 8. Cut: the middle of the cell that the leading bits leave, 2^(8-r) * (u - 2^(r-1) + 1/2).
        """
        r, step = self.served, float(1 << (self.bits - self.served))
        codes = range(1 << self.read_bits)
        if self.kind.cuts:
            return tuple(step * (u - (1 << (r - 1)) + 0.5) for u in codes)
        if r == self.bits:
            return tuple(float(u - (1 << (r - 1))) for u in codes)
        return tuple(step * (min((u >> 1) + (u & 1), (1 << r) - 1) - (1 << (r - 1))) for u in codes)

    def at(self, bits: int) -> Format:
        """The same nested format served at another width; FormatError if it is not nested or has no such slice."""
        if not self.is_nested:
            raise FormatError(f"{self} has one width; only nested formats such as nest8_g128 are served at several")
        return Format(self.kind, self.bits, self.group, as_integer(bits, "bits"))

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
        """Scales per row of a weight with k input features; FormatError if the format does not fit k."""
        if self.sparse and k % BLOCK:
            raise FormatError(
                f"k = {k} is not a multiple of {BLOCK}, of which {self} keeps {KEPT}; "
                "use a dense format or skip this layer"
            )
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

    @property
    def k_multiple(self) -> int:
        """What k must be a multiple of."""
        return lcm(self.group or 1, BLOCK if self.sparse else 1)

    def code_bytes(self, n: int, k: int) -> int:
        """Bytes of the canonical codes of an [n, k] weight, a mask included: each row is padded to a whole byte."""
        if self.is_nested:
            return n * self.bits * -(-k // 8)
        if self.sparse:
            return n * (k // BLOCK) * (KEPT * self.bits + BLOCK) // 8
        return n * (-(-k * self.bits // 8))

    def bytes_read(self, n: int, k: int, element_size: int = 2, zero_size: int | None = None) -> int:
        """Bytes of a stored [n, k] weight that a product reads, tables not counted: the planes of a slice only."""
        unread = n * (self.bits - self.read_bits) * -(-k // 8)
        return self.nbytes(n, k, element_size, 0, zero_size) - unread

    def nbytes(self, n: int, k: int, element_size: int = 2, tables: int = 1, zero_size: int | None = None) -> int:
        """Bytes of a stored [n, k] weight: codes, scales, zeros (element_size unless given) and tables."""
        total = self.code_bytes(n, k) + n * self.groups(k) * element_size
        if self.has_zeros:
            total += n * self.groups(k) * (element_size if zero_size is None else zero_size)
        if self.is_table:
            total += tables * (1 << self.bits) * element_size
        return total
