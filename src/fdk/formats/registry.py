"""The kinds of format that exist. Registering one puts it under the whole test suite."""

from __future__ import annotations

from math import isfinite

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
    """Add a kind of format; its name must be new. Returns the kind. FormatError if it makes no sense."""
    if reason := _why_not(kind):
        raise FormatError(f"format kind {kind.name!r} {reason}")
    _kinds[kind.name] = kind
    return kind


def _why_not(kind: Kind) -> str | None:
    """What is wrong with a kind, as a clause with the remedy; None if nothing is."""
    if kind.name in _kinds:
        return "is already registered; choose another name"
    if not (kind.name.isascii() and kind.name.isalpha() and kind.name.islower()):
        return "is no name of a kind, since a width follows it; use lower-case letters only"
    if not kind.bits or not set(kind.bits) <= set(ALL_BITS):
        return f"has widths {list(kind.bits)}; choose from 1 to 8 bits"
    if kind.table not in (None, "stored", "fixed"):
        return f"has table={kind.table!r}; use 'stored', 'fixed' or None"
    if (kind.table == "fixed") != (kind.values is not None):
        return "needs values with table='fixed', and none without it"
    if kind.table == "fixed" and any(len(kind.values) != 1 << bits for bits in kind.bits):
        return f"has a fixed table of {len(kind.values)} values, but its widths {list(kind.bits)} need 2^bits of them"
    if kind.table == "fixed" and not all(map(isfinite, kind.values)):
        return "has a value that is not finite; a table holds finite values only"
    if kind.table and kind.zeros:
        return "has a table, and zero points have no meaning beside one; leave out zeros=True"
    if kind.slices and (kind.bits != (MASTER_BITS,) or not set(kind.slices) <= set(SLICES)):
        return f"is nested, so it has a master of {MASTER_BITS} bits and slices of 2 to {MASTER_BITS}"
    if not set(kind.sparse) <= set(kind.bits):
        return f"has a sparse form of {list(kind.sparse)} bits, but widths of {list(kind.bits)}"
    return None


def kind(name: str) -> Kind:
    """The kind registered under `name`."""
    try:
        return _kinds[name]
    except KeyError:
        known = ", ".join(_kinds)
        raise FormatError(
            f"unknown format kind {name!r}; known kinds: {known}; one of your own is known once its module is imported"
        ) from None


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
