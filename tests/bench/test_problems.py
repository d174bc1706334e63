"""Bytes, operations and names of benchmark lines, against examples counted by hand."""

import pytest

from fdk.bench.problems import BASELINE, Line, Selection, activation_bytes, lines, operations, weight_bytes


@pytest.mark.parametrize(
    "format, expected",
    [
        # n = 32 rows of k = 128: codes + scales (+ zeros), tables not counted.
        ("bf16", 32 * 128 * 2),
        ("fp32", 32 * 128 * 4),
        ("lut4_g64", 32 * 64 + 32 * 2 * 2),
        ("lut1_g64", 32 * 16 + 32 * 2 * 2),
        ("lut3_g32", 32 * 48 + 32 * 4 * 2),
        ("int8_chan", 32 * 128 + 32 * 2),
        ("nf4_g128", 32 * 64 + 32 * 2),
        ("uint4_g64", 32 * 64 + 32 * 2 * 2 + 32 * 2),
    ],
)
def test_weight_bytes(format, expected):
    assert weight_bytes(format, n=32, k=128, dtype="bf16") == expected


def test_scales_take_the_dtype_of_the_run():
    assert weight_bytes("lut4_g64", n=32, k=128, dtype="fp32") == 32 * 64 + 32 * 2 * 4


def test_activation_bytes_and_operations():
    assert activation_bytes(m=3, n=32, k=128, dtype="bf16") == 2 * (3 * 128 + 3 * 32)
    assert operations(m=3, k=128, n=32) == 24576


@pytest.mark.parametrize(
    "line, one_row, several",
    [
        (BASELINE, "mv", "mm"),
        (Line("reference", "", "bf16", "bf16", ref=True), "mv_ref", "mm_ref"),
        (Line("fdk", "lut8", "lut4_g64", "bf16"), "mv_lut8", "mm_lut8"),
        (Line("reference", "lut8", "lut1_g64", "bf16", ref=True), "mv_lut8_ref", "mm_lut8_ref"),
        (Line("torch-int4pack", "int", "int4_g64", "bf16"), "mv_int", "mm_int"),
        (Line("fdk", "marlin", "int4_g64", "fp16"), "marlin", "marlin"),
        (Line("fdk", "marlin_lut", "lut4_g64", "fp16"), "marlin_lut", "marlin_lut"),
    ],
)
def test_names_are_those_of_the_source(line, one_row, several):
    assert (line.test(1), line.test(2)) == (one_row, several)


def test_lines_of_the_default_widths():
    found = lines(Selection((16, 4, 1)), 64)
    assert {(line.provider, line.format) for line in found if not line.ref} == {
        ("torch-bf16", "bf16"),
        ("torch-float32", "fp32"),
        ("fdk", "lut4_g64"),
        ("fdk", "lut1_g64"),
        ("fdk", "int4_g64"),
        ("torch-int4pack", "int4_g64"),
        ("bitsandbytes-nf4", "nf4_g64"),
    }
    assert {line.format for line in found if line.ref} == {"bf16", "lut4_g64", "lut1_g64"}


def test_named_formats_replace_widths_and_groups_and_keep_the_baseline():
    found = lines(Selection((16, 4, 1), ("int4_g128", "lut2_chan")), 64)
    assert BASELINE in found
    assert {line.format for line in found if line.provider == "fdk"} == {"int4_g128", "lut2_chan"}
    assert {line.format for line in found if line.provider == "bitsandbytes-nf4"} == {"nf4_g128"}
    assert not any(line.family.startswith("marlin") for line in found)


def test_peers_beside_sparse_weights_have_dense_ones_of_the_same_groups():
    found = lines(Selection((16,), ("int4_g64_sp16of32",)), 64)
    assert {(line.provider, line.format) for line in found if line.bits == 4 and not line.ref} == {
        ("fdk", "int4_g64_sp16of32"),
        ("torch-int4pack", "int4_g64"),
        ("bitsandbytes-nf4", "nf4_g64"),
    }
