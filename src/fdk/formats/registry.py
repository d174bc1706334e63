"""The kinds of format that exist. Registering one puts it under the whole test suite."""

from __future__ import annotations

from fdk.errors import FormatError
from fdk.formats.spec import BLOCK, MASTER_BITS, Format, Kind

ALL_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SLICES = ALL_BITS[1:]

# QLoRA (Dettmers et al., 2023), appendix E: quantiles of a standard normal, normalised to [-1, 1].
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # fmt: skip

# OCP Microscaling Formats specification 1.0: e2m1, sign in the top bit, in the order of its codes.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_kinds: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Add a kind of format; its name must be new. Returns the kind."""
    if kind.name in _kinds:
        raise FormatError(f"format kind {kind.name!r} is already registered; choose another name")
    if kind.table == "fixed" and (kind.values is None or any(len(kind.values) != 1 << b for b in kind.bits)):
        raise FormatError(f"format kind {kind.name!r} has a fixed table, so it needs 2^bits values")
    _kinds[kind.name] = kind
    return kind


def kind(name: str) -> Kind:
    """The kind registered under `name`."""
    try:
        return _kinds[name]
    except KeyError:
        raise FormatError(f"unknown format kind {name!r}; known kinds: {', '.join(_kinds)}") from None


def kinds() -> tuple[Kind, ...]:
    """All registered kinds, in order of registration."""
    return tuple(_kinds.values())


def all_formats(groups: tuple[int | None, ...] = (64,)) -> tuple[Format, ...]:
    """Every registered format (kind, width, slice, sparse or not) with the given groups, as far as it has them.

    What parametrised tests iterate over.
    """
    every = []
    for entry in _kinds.values():
        for bits in entry.bits:
            for group in groups:
                every += [Format(entry, bits, group, served) for served in entry.slices or (None,)]
                if bits in entry.sparse and (group is None or group % BLOCK == 0):
                    every.append(Format(entry, bits, group, sparse=True))
    return tuple(every)


LUT = register(Kind("lut", ALL_BITS, "any table of 2^bits values, stored with the weight", table="stored", sparse=(4,)))
INT = register(Kind("int", ALL_BITS, "code - 2^(bits-1)", sparse=(4,)))
UINT = register(Kind("uint", ALL_BITS, "code - zero, one stored zero per group", zeros=True, sparse=(4,)))
NF4 = register(Kind("nf", (4,), "normal-float table of QLoRA", table="fixed", values=NF4_VALUES, sparse=(4,)))
FP4 = register(
    Kind("fp", (4,), "e2m1 float of the OCP microscaling formats", table="fixed", values=FP4_VALUES, sparse=(4,))
)
# MatGPTQ: the slice of r bits is the master code rounded half up to r bits, saturating.
NEST = register(Kind("nest", (MASTER_BITS,), "8-bit master, slices of 2 to 8 bits by rounding", slices=SLICES))
TRUNC = register(
    Kind("trunc", (MASTER_BITS,), "8-bit master, slices of 2 to 8 bits by dropping bits", slices=SLICES, cuts=True)
)
