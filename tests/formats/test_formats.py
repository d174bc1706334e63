"""Names, registry and the arithmetic of sizes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest

from fdk.errors import FormatError
from fdk.formats import Format, Kind, all_formats, kind, kinds, parse, register
from fdk.formats.registry import FP4_VALUES, NF4_VALUES


@pytest.mark.parametrize("fmt", all_formats((16, 48, 64, 128, None)), ids=str)
def test_names_round_trip(fmt: Format) -> None:
    assert parse(str(fmt)) == fmt
    assert parse(fmt) == fmt


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda fmt: pickle.loads(pickle.dumps(fmt))], ids=["copy", "pickle"]
)
def test_copies_are_of_the_registered_kind(duplicate) -> None:
    for fmt in all_formats((64, None)):
        assert duplicate(fmt) == fmt
        assert duplicate(fmt).kind is fmt.kind


def test_names_are_those_of_the_grammar() -> None:
    assert str(Format(kind("lut"), 4, 64)) == "lut4_g64"
    assert str(Format(kind("uint"), 4, 128)) == "uint4_g128"
    assert str(Format(kind("lut"), 3, None)) == "lut3_chan"
    assert parse("nf4_g64").kind.values == NF4_VALUES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lut4", "not a format name"),
        ("lut4_64", "not a format name"),
        ("lut4_g064", "not a format name"),
        ("LUT4_g64", "not a format name"),
        ("lut4_g64 ", "not a format name"),
        ("", "not a format name"),
        ("lut9_g64", "no width of 9 bits"),
        ("nf3_g64", "no width of 3 bits"),
        ("lut4_g8", "group size 8 is not a positive multiple of 16"),
        ("lut4_g65", "group size 65"),
        ("foo4_g64", "unknown format kind 'foo'; known kinds: lut, int"),
        (4, "not a format name"),
    ],
)
def test_bad_names_are_refused(name, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(name)


def test_groups_must_divide_k() -> None:
    fmt = parse("lut4_g64")
    assert fmt.groups(256) == 4 and parse("lut4_chan").groups(77) == 1
    with pytest.raises(FormatError, match=r"group 64 does not divide k = 96; use a group of 32 "):
        fmt.groups(96)
    with pytest.raises(FormatError, match=r"group 64 does not divide k = 100; use one scale per row"):
        fmt.groups(100)


def test_bytes_of_a_weight_by_hand() -> None:
    # 4096 x 4096 at 4 bits: 8 MiB of codes, 64 scales a row of 2 bytes, one table of 16 entries of 2 bytes.
    assert parse("lut4_g64").nbytes(4096, 4096) == 8 * 2**20 + 4096 * 64 * 2 + 32
    assert parse("int3_g128").nbytes(256, 1024) == 256 * 1024 * 3 // 8 + 256 * 8 * 2
    assert parse("uint4_g64").nbytes(64, 128, zero_size=1) == 64 * 64 + 64 * 2 * 2 + 64 * 2
    assert parse("lut3_chan").code_bytes(2, 11) == 2 * 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kind("lut", (4,), "again"), "'lut' is already registered"),
        (Kind("Odd", (4,), "upper case"), "'Odd' is no name"),
        (Kind("odd4", (4,), "a digit"), "'odd4' is no name"),
        (Kind("", (4,), "no name"), "'' is no name"),
        (Kind("odd", (), "no width"), "widths \\[\\]; choose from 1 to 8"),
        (Kind("odd", (9,), "too wide"), "widths \\[9\\]; choose from 1 to 8"),
        (Kind("odd", (4,), "mistyped", table="fixd"), "table='fixd'; use"),
        (Kind("odd", (1,), "no values", table="fixed"), "needs values with table='fixed'"),
        (Kind("odd", (1,), "idle values", values=(0.0, 1.0)), "none without it"),
        (Kind("odd", (4,), "short table", table="fixed", values=(1.0,)), "fixed table of 1 values"),
        (Kind("odd", (1,), "not finite", table="fixed", values=(0.0, math.nan)), "not finite"),
        (Kind("odd", (4,), "both", table="stored", zeros=True), "leave out zeros=True"),
        (Kind("odd", (4,), "nested", slices=(2, 4)), "is nested, so it has a master of 8 bits"),
        (Kind("odd", (3,), "sparse", sparse=(4,)), "sparse form of \\[4\\] bits"),
    ],
)
def test_a_kind_that_makes_no_sense_is_refused(kind: Kind, message: str) -> None:
    before = kinds()
    with pytest.raises(FormatError, match=message):
        register(kind)
    assert kinds() == before


def test_fixed_tables() -> None:
    assert len(NF4_VALUES) == 16 and NF4_VALUES[7] == 0 and list(NF4_VALUES) == sorted(NF4_VALUES)
    # e2m1: exponent bias 1, one mantissa bit, subnormal at exponent 0.
    for code, value in enumerate(FP4_VALUES):
        sign, exponent, mantissa = -1 if code >> 3 else 1, (code >> 1) & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == sign * magnitude
